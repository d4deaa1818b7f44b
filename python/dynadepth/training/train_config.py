"""The recipes that train routers."""

from dataclasses import dataclass
from typing import Any

from dynadepth.config import check_fields, config_from_dict, config_to_dict
from dynadepth.errors import ConfigError
from dynadepth.policies.router_heads import check_preset

__all__ = [
    "TrainConfig",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How routers are trained.

    The defaults are those of the preset `dynadepth`: features are standardised, the output of the perceptron starts at
    the best constant, and each layer keeps the weights of the epoch that was best on prompts held out from training. A
    layer that learns nothing that generalises keeps its constant output, and so never deviates from the static plans.

    Args:
        epochs: Passes over the prompts.
        batch_size: Prompts per step.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Weight decay of the weight matrices.
        warmup_steps: Steps of linear warm-up; the cosine begins after them and ends at zero. If there are not more
            steps in total, the peak is never reached.
        focal_gamma: Exponent of the focal loss.
        class_balance: beta of the effective number of labels; 0 weights all actions equally.
        standardise: Scale every dimension to unit spread; folded into the first linear layer afterwards.
        centre: Subtract the mean logits over the prompts; folded into the last bias.
        held_out: Fraction of the prompts that is held out to choose each layer's epoch; 0: outputs start at random and
            the weights of the last epoch are kept.

    Raises:
        ConfigError: A value has the wrong type or is out of range.

    Source:
        Dr.LLM (arXiv 2510.12773), for what `for_preset("drllm")` returns.
    """

    epochs: int = 12
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup_steps: int = 10
    focal_gamma: float = 2.0
    class_balance: float = 0.999
    standardise: bool = True
    centre: bool = True
    held_out: float = 0.2

    def __post_init__(self) -> None:
        check_fields(self)
        ranges: dict[str, tuple[bool, str]] = {
            "epochs": (self.epochs >= 1, "1 or more"),
            "batch_size": (self.batch_size >= 1, "1 or more"),
            "learning_rate": (self.learning_rate > 0, "more than 0"),
            "weight_decay": (self.weight_decay >= 0, "0 or more"),
            "warmup_steps": (self.warmup_steps >= 0, "0 or more"),
            "focal_gamma": (self.focal_gamma >= 0, "0 or more"),
            "class_balance": (0 <= self.class_balance < 1, "0 or more and less than 1"),
            "held_out": (0 <= self.held_out <= 0.5, "0 to 0.5"),
        }
        for name, (good, words) in ranges.items():
            if not good:
                raise ConfigError(f"TrainConfig.{name} is {getattr(self, name)}; expected {words}")

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as values that JSON can hold."""
        return config_to_dict(self)

    @classmethod
    def from_dict(cls, content: Any) -> "TrainConfig":
        """Make the configuration from what `to_dict` wrote.

        Raises:
            ConfigError: A key is unknown, or a value has the wrong type or size.
        """
        return config_from_dict(cls, content)

    @classmethod
    def for_preset(cls, preset: str) -> "TrainConfig":
        """Return a preset's recipe.

        Args:
            preset: `"dynadepth"` or `"drllm"`, the published settings.

        Raises:
            ConfigError: The preset is unknown.
        """
        check_preset(preset)
        if preset != "drllm":
            return cls()
        return cls(
            epochs=25,
            batch_size=16,
            learning_rate=1e-3,
            weight_decay=0.01,
            warmup_steps=500,
            standardise=False,
            centre=False,
            held_out=0.0,
        )
