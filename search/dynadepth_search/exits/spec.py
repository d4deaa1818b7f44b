"""The settings of exit heads."""

from dataclasses import dataclass

from dynadepth.config import check_lowest, config_to_dict
from dynadepth.errors import ConfigError

__all__ = ["ExitSpec"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitSpec:
    """The settings of a training of exit heads.

    Args:
        layers: Exit layers; None: chosen by held-out passes, among layers from a sixth of the depth to three quarters.
        most_exits: The most exit layers that are chosen.
        new_tokens: The most tokens by which the model continues each prompt.
        rounds: How often text is produced with exits on and learnt from.
        heldout: Share of the prompts that choose and calibrate.
        lens_width: Width of the lens' bottleneck; None: a quarter of the states' width.
        router_width: Width of the exit router's bottleneck.
        lens_epochs: Passes over the training tokens that train the lens.
        router_epochs: Passes over the training tokens that train the router.
        most_positions: The most tokens that a stage trains on.
        window: Most tokens of a row that later layers run for in one call of decoding.
        batch_size: Texts of one forward.
        seed: Seed of everything random.

    Raises:
        ConfigError: A value is out of range.
    """

    layers: tuple[int, ...] | None = None
    most_exits: int = 2
    new_tokens: int = 64
    rounds: int = 2
    heldout: float = 0.3
    lens_width: int | None = None
    router_width: int = 128
    lens_epochs: int = 1
    router_epochs: int = 8
    most_positions: int = 60_000
    window: int = 8
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        lowest = {
            "most_exits": 1,
            "new_tokens": 2,
            "rounds": 0,
            "router_width": 1,
            "lens_epochs": 0,
            "router_epochs": 1,
            "most_positions": 1,
            "window": 1,
            "batch_size": 1,
        }
        check_lowest(self, lowest)
        if not 0 < self.heldout < 1:
            raise ConfigError(
                f"ExitSpec.heldout is {self.heldout}; expected a share between 0 and 1"
            )
        if self.lens_width is not None and self.lens_width < 1:
            raise ConfigError(f"ExitSpec.lens_width is {self.lens_width}; expected 1 or more")
        layers = self.layers
        if layers is not None and (not layers or list(layers) != sorted(set(layers))):
            raise ConfigError(
                f"exit layers are {list(layers)}; expected one or more, ascending, each once"
            )

    def to_dict(self) -> dict[str, object]:
        """Return the settings as values that JSON can hold."""
        return config_to_dict(self)

    def candidates(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers before which tokens may leave, from which the best are chosen.

        Args:
            num_layers: Decoder layers of the model.

        Raises:
            ConfigError: A given layer is not one of the model's, or is the first.
        """
        if self.layers is not None:
            wrong = [layer for layer in self.layers if not 1 <= layer < num_layers]
            if wrong:
                raise ConfigError(
                    f"exit layer {wrong[0]} was given; expected layers from 1 to {num_layers - 1}"
                )
            return self.layers
        shares = (1 / 6, 0.3, 0.45, 0.6, 0.75)
        return tuple(
            sorted({max(1, round(share * num_layers)) for share in shares if num_layers > 1})
        )
