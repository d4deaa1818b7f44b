"""KvBytes: how much memory a cache's key and value states take, and what the plain model's would.

Read from the shapes of the states, so nothing waits for a device. Knows nothing of controllers or policies.
"""

from dataclasses import dataclass
from typing import Any

from dynadepth.caching.depth_cache import DepthCache

__all__ = ["KvBytes", "kv_bytes"]


@dataclass(frozen=True, slots=True)
class KvBytes:
    """Bytes of key and value states.

    Attributes:
        held: What the cache holds: each slot the rows that make its visit.
        plain: What the plain model would hold for the same rows and tokens: one slot for each layer, with all rows.

    Example:
        >>> KvBytes(held=800, plain=1000).saved
        200
    """

    held: int
    plain: int

    @property
    def saved(self) -> int:
        """`plain` less `held`; negative if repeats take more than skips save."""
        return self.plain - self.held


def kv_bytes(cache: DepthCache) -> KvBytes:
    """Return what a cache holds now.

    A layer that no row runs has no states. It would hold what a layer of the same kind (of attention, of window) holds
    for each row; if all layers of the kind are skipped, it is reckoned from the tokens that have passed.
    """
    plans, held = cache.row_plans, cache.state_bytes
    # Of one row: by layer, by kind of layer, and of one token.
    by_layer: dict[int, int] = {}
    by_kind: dict[Any, int] = {}
    of_token = 0
    # Another thread may be running this cache's model.
    for (layer_idx, _), slot in list(cache.slots.items()):
        if slot.keys is None or not slot.keys.numel():
            continue
        rows, _, tokens, _ = slot.keys.shape
        size = slot.keys.nbytes + slot.values.nbytes
        by_layer[layer_idx] = by_kind[_kind(cache.layers[layer_idx])] = size // rows
        of_token = size // (rows * tokens)
    plain = 0
    if plans is not None:
        for layer_idx, length_layer in enumerate(cache.layers):
            of_row = by_layer.get(layer_idx, by_kind.get(_kind(length_layer)))
            plain += plans.num_rows * (
                of_token * _tokens_kept(length_layer) if of_row is None else of_row
            )
    return KvBytes(held, plain)


def _kind(length_layer: Any) -> Any:
    return getattr(length_layer, "sliding_window", None)


def _tokens_kept(length_layer: Any) -> int:
    """Return how many tokens a layer's slot holds that no row has."""
    length: int = length_layer.get_seq_length()
    window = _kind(length_layer)
    # The window counts the token that is asking, which is not in the cache yet.
    return length if window is None or length_layer.record_past else min(length, window - 1)
