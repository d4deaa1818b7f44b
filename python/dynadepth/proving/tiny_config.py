"""A model's config with everything small: few layers, narrow states, few experts, a small vocabulary.

What decides how layers work is kept: their types and order, the ratio of heads, switches and scales. Sizes are told
by the names of their fields, and fields that were equal stay equal, so that projections still fit each other.
"""

import copy
import re
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["VOCAB_SIZE", "tiny_config"]

VOCAB_SIZE = 96
_MOST_HEADS = 4
_MOST_EXPERTS = 8
_CHOSEN = 2
# Layers of what is not the text's part of a composite config.
_LAYERS_ELSEWHERE = 2
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

_HEADS = re.compile(r"^(num_attention_heads|num_heads|n_heads?|(encoder_)?attention_heads)$")
_GROUPS = re.compile(
    r"^(num_key_value_heads|num_kv_heads|n_kv_heads?|kv_n_heads|num_query_groups)$"
)
_LAYERS = re.compile(r"^(num_hidden_layers|n_layers?|depth|(num_)?(encoder_|decoder_)?layers)$")
_EXPERTS = re.compile(r"(num_experts|n_routed_experts|num_local_experts|n_experts)$")
_CHOSEN_NAMES = re.compile(r"(experts_per_tok|experts_per_token|top_?k|moe_k|selected_experts)$")
_ROTARY = re.compile(r"^(rotary_dim|rotary_ndims)$")
_HIDDEN = re.compile(r"^(hidden_size|n_embd|d_model|hidden_dim|embed_dim|dim)$")
_WIDTHS = re.compile(r"(size|dim|dims|rank|width|n_inner|d_ff|d_kv|d_head|channels|features)$")
_NO_WIDTHS = re.compile(r"(image_size|patch|kernel|tokens?_size|batch|group_size|block_size)")
_POSITIONS = re.compile(
    r"(position_embeddings|_positions|n_ctx|max_seq_len|sequence_length|seq_length)$"
)
# Windows and chunks are shorter than the prompts of a proof, so that they matter.
_WINDOWS = (
    (re.compile(r"^(attention_)?chunk_size$"), 8),
    (re.compile(r"(sliding_window|window_size|local_window)$"), 6),
)
# What configs of a family leave open by default, and its published ones always set.
_OPEN = ("head_dim", "num_key_value_heads", "num_experts_per_tok")


def tiny_config(config: Any, num_layers: int, head_dim: int | Literal["all"] | None) -> Any:
    """Return a small config of the same class.

    Args:
        config: The config of a transformers model; not changed.
        num_layers: Decoder layers of the copy: the first ones.
        head_dim: Width of a head; None keeps the config's own, "all" keeps every width and count.

    Returns:
        A new config, without quantisation.
    """
    names = getattr(type(config), "attribute_map", {})
    layers_name = names.get("num_hidden_layers", "num_hidden_layers")
    small = _Sizes.of(config.to_dict(), num_layers, layers_name, head_dim).shrink()
    small.pop("quantization_config", None)
    return type(config).from_dict(small)


@dataclass(frozen=True, slots=True)
class _Sizes:
    """The sizes of one config, or of one part of a composite one, and the small ones that take their place.

    Attributes:
        fields: The config.
        num_layers: Layers that the copy keeps of it.
        layers_name: The field that says how many it has.
        head_dim: As `tiny_config` was given it.
        heads: New number of heads.
        groups: New number of key-value heads.
        width: New width of a head.
        width_before: Its width so far.
        widths: New widths by old ones.
        other: New width of what is equal to none of these.
    """

    fields: dict[str, Any]
    num_layers: int
    layers_name: str
    head_dim: int | Literal["all"] | None
    heads: int
    groups: int
    width: int
    width_before: int
    widths: dict[int, int]
    other: int

    @classmethod
    def of(
        cls,
        fields: dict[str, Any],
        num_layers: int,
        layers_name: str,
        head_dim: int | Literal["all"] | None,
    ) -> "_Sizes":
        """Read the sizes of a config and choose the small ones."""
        heads = _named(fields, _HEADS) or 1
        groups = _named(fields, _GROUPS) or heads
        hidden = _named(fields, _HIDDEN) or 64
        before = _number(fields.get("head_dim")) or max(1, hidden // heads)
        if groups == heads:
            new_groups = new_heads = min(heads, _MOST_HEADS)
        else:
            new_groups = 1 if groups == 1 else 2
            new_heads = new_groups * max(2, min(heads // groups, _MOST_HEADS))
        width = min(before, head_dim) if isinstance(head_dim, int) else before
        new_hidden = new_heads * (width if hidden == heads * before else width + 4)
        widths = {hidden: new_hidden, 2 * hidden: 2 * new_hidden, 4 * hidden: 2 * new_hidden + 8}
        widths.setdefault(heads * before, new_heads * width)
        widths.setdefault(groups * before, new_groups * width)
        widths.setdefault(before, width)
        return cls(
            fields,
            num_layers,
            layers_name,
            head_dim,
            new_heads,
            new_groups,
            width,
            before,
            widths,
            new_hidden + 16,
        )

    def shrink(self) -> dict[str, Any]:
        """Return the small config."""
        return {key: self._small(key, value) for key, value in self.fields.items()}

    def _small(self, key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return self._part(key, value)
        if isinstance(value, (list, tuple)):
            per_layer = len(value) == self.fields.get(self.layers_name)
            kept = per_layer and not key.endswith("token_id")
            return copy.deepcopy(value[: self.num_layers] if kept else value)
        if key.endswith("token_id") and type(value) is int:
            return _TOKENS.get(key, VOCAB_SIZE - 1 - value % 5)
        if value is None and key in _OPEN and isinstance(self.head_dim, int):
            return {"head_dim": self.width, "num_key_value_heads": self.groups}.get(key, _CHOSEN)
        number = _number(value)
        return value if number is None else self._number(key, number)

    def _part(self, key: str, value: dict[str, Any]) -> dict[str, Any]:
        """Return the small form of a dictionary: a whole config inside this one, or settings of it."""
        if key == "per_layer_config":
            return {k: copy.deepcopy(v) for k, v in value.items() if int(k) < self.num_layers}
        if "model_type" not in value:
            return {name: self._small(str(name), inner) for name, inner in value.items()}
        name = self.layers_name if self.layers_name in value else "num_hidden_layers"
        layers = self.num_layers if key.endswith("text_config") else _LAYERS_ELSEWHERE
        return _Sizes.of(value, layers, name, self.head_dim).shrink()

    def _number(self, key: str, number: int) -> int:
        """Return the small form of a number."""
        if key == self.layers_name or _LAYERS.match(key):
            return min(number, self.num_layers)
        if "vocab_size" in key:
            return VOCAB_SIZE
        if _POSITIONS.search(key):
            # What a stretched range was stretched from stays the smaller one.
            return 64 if key.startswith("original") else 128
        for pattern, most in _WINDOWS:
            if pattern.search(key):
                return min(number, most)
        return number if self.head_dim == "all" else self._narrow(key, number)

    def _narrow(self, key: str, number: int) -> int:
        """Return the small form of a width or a count."""
        if _EXPERTS.search(key):
            per_group = self.fields.get("n_group") or self.fields.get("n_expert_group") or 1
            return min(number, max(_MOST_EXPERTS, 2 * per_group))
        if _HEADS.match(key):
            return self.heads
        if _GROUPS.match(key):
            return self.groups
        if _ROTARY.match(key):
            return max(2, number * self.width // self.width_before // 2 * 2)
        if _CHOSEN_NAMES.search(key):
            return min(number, _CHOSEN)
        if (_HIDDEN.match(key) or _WIDTHS.search(key)) and not _NO_WIDTHS.search(key):
            return self.widths.get(number, min(number, self.other))
        return number


def _number(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


def _named(fields: dict[str, Any], pattern: re.Pattern[str]) -> int | None:
    return next(
        (n for key, value in fields.items() if pattern.match(key) and (n := _number(value))), None
    )
