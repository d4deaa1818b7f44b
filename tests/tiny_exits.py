"""Exits with random weights, for tests that need no training."""

import torch

from dynadepth.checkpoints.trained_exits import TrainedExits
from dynadepth.exits.exit_calibration import ExitCalibration
from dynadepth.exits.exit_heads import ExitWeights
from dynadepth.models.fingerprint import fingerprint

PROMISES = ExitCalibration(
    thresholds=(4.0, 1.0, 0.0, -1.0),
    passes=(1.0, 0.9, 0.75, 0.6),
    kept=(1.0, 0.97, 0.93, 0.9),
    likely=(1.0, 0.96, 0.9, 0.85),
    certain=(1.0, 0.9, 0.85, 0.8),
    prompts=40,
)


def random_weights(layer_idx, *, hidden=32, width=6, seed=0):
    """Return a head whose scores spread around 0."""
    generator = torch.Generator().manual_seed(seed + layer_idx)

    def drawn(*shape):
        return torch.randn(shape, generator=generator) / (shape[0] if shape else 1) ** 0.5

    tensors = {
        "lens.weight": 0.3 * drawn(hidden, hidden),
        "lens.bias": 0.1 * drawn(hidden),
        "lens.down": drawn(hidden, width),
        "lens.down_bias": drawn(width),
        "lens.up": drawn(width, hidden),
        "router.mean": 0.1 * drawn(hidden),
        "router.scale": 1.0 + drawn(hidden).abs(),
        "router.down": 3 * drawn(hidden, width),
        "router.down_bias": drawn(width),
        "router.up": 3 * drawn(width),
        "router.bias": torch.tensor(0.0),
    }
    return ExitWeights(layer_idx, tensors)


def random_exits(model=None, *, layers=(1, 2), num_layers=4, hidden=32, **changes):
    """Return exits for a model, or for none."""
    if model is not None:
        config = model.config.get_text_config()
        num_layers, hidden = config.num_hidden_layers, config.hidden_size
    given = {
        "heads": tuple(random_weights(layer, hidden=hidden) for layer in layers),
        "layers": num_layers,
        "promises": PROMISES,
        "calibration": PROMISES.budgets(),
        "fingerprint": {} if model is None else fingerprint(model),
    }
    return TrainedExits(**{**given, **changes})
