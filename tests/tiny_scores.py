"""Score tables whose values are made up, for work that runs no model."""

from typing import Any

import numpy as np
import torch

from dynadepth.plans import plan_text
from dynadepth_search.data.tasks import Example
from dynadepth_search.scoring.score_table import ScoreTable

# All alike before layer 3.
MENU = np.array(
    [
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 0, 1, 1],
        [1, 1, 1, 1, 0, 1],
        [1, 1, 1, 0, 0, 1],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 0],
    ],
    dtype=np.uint8,
)


def made_up_scores(
    count: int = 60,
    *,
    plans: Any = MENU,
    layers: tuple[int, ...] = (2, 3, 4),
    windows: int = 1,
    graded: bool = False,
    strength: float = 0.5,
    seed: int = 0,
) -> ScoreTable:
    """Return a table in which the first number of each state tells how much a prompt suffers from a skip."""
    rng = np.random.default_rng(seed)
    frail = rng.standard_normal(count)
    cost = rng.uniform(0.1, 0.3, plans.shape[1])
    lost = np.clip((plans == 0) @ cost + strength * (plans == 0).any(1) * frail[:, None], 0, 1)
    agreement = (rng.random(lost.shape) >= lost).astype(np.float64)
    agreement[:, 0] = 1.0
    lost[:, 0] = 0.0
    views = {}
    for layer in layers:
        prefixes = len({plan[:layer].tobytes() for plan in plans})
        states = rng.standard_normal((count, prefixes, windows + 1, 8))
        states[..., 0] = frail[:, None, None]
        views[layer] = torch.from_numpy(states).float()
    examples = tuple(
        Example(f"Question {index}:", (" yes", " no"), index % 2)
        if graded
        else Example(f"Question {index}:")
        for index in range(count)
    )
    reward = np.log(np.clip(0.9 - 0.8 * lost, 0.05, 1)) if graded else np.full(lost.shape, np.nan)
    task = {"kind": "prompt", "scoring": "raw", "prompts": count, "sha256": "ab" * 32}
    manifest = {
        "task_name": "made up",
        "asked": {
            "base_model": "cd" * 8,
            "task": task,
            "plans": [plan_text(plan) for plan in plans],
            "layers": list(layers),
            "num_windows": windows,
        },
        "base_model": {"name": "tiny", "fingerprint": {}},
    }
    return ScoreTable(
        plans=plans,
        examples=examples,
        given=np.zeros(lost.shape, dtype=np.int64),
        agreement=agreement,
        total_variation=lost,
        divergence=4.0 * lost + 0.01 * rng.random(lost.shape) * (lost > 0),
        reward=reward,
        correct=agreement,
        views=views,
        manifest=manifest,
    )
