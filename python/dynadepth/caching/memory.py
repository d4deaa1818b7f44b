"""KvBytes: how much memory a cache's key and value states take, and what the plain model's would.

It is computed from the shapes of the states, so nothing waits for a device.
"""

from dataclasses import dataclass
from typing import Any

from dynadepth.caching.depth_cache import DepthCache

__all__ = ["KvBytes", "kv_bytes"]


@dataclass(frozen=True, slots=True)
class KvBytes:
    """Bytes of key and value states.

    Attributes:
        held: What the cache holds, in bytes: one slot for each visit, with the rows that make it.
        plain: What the plain model would hold for the same rows and tokens, in bytes: one slot for each layer, with all
            rows.

    Example:
        >>> KvBytes(held=800, plain=1000).saved
        200
    """

    held: int
    plain: int

    @property
    def saved(self) -> int:
        """`plain` minus `held`, in bytes; negative if repeats take more than skips save."""
        return self.plain - self.held


def kv_bytes(cache: DepthCache) -> KvBytes:
    """Return what a cache holds now.

    A layer that no row runs has no states. In the plain model it would hold as much for each row as a layer of the same
    kind (same window, if any); if all layers of that kind are skipped, its size is estimated from the number of tokens.
    """
    plans, held = cache.row_plans, cache.state_bytes
    # Bytes of one row, by layer and by kind of layer, and bytes of one token.
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
    """Return how many tokens the slot of a layer would hold, for a layer that no row runs."""
    length: int = length_layer.get_seq_length()
    window = _kind(length_layer)
    # The window includes the querying token, which is not in the cache yet.
    return length if window is None or length_layer.record_past else min(length, window - 1)
