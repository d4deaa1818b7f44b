"""The verdict of a proof, and where it is kept: in memory, and in this user's cache folder if that can be written."""

import hashlib
import inspect
import json
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from platformdirs import user_cache_path

from dynadepth._core import __version__
from dynadepth.config import config_from_dict
from dynadepth.errors import CheckpointError, ConfigError
from dynadepth.files import read_versioned_json, write_json_atomic
from dynadepth.models.structure import LayerStack, LayerTraits
from dynadepth.proving.tiny_config import tiny_config
from dynadepth.proving.tiny_copy import HEAD_DIMS, own_class

__all__ = ["Verdict", "proofs_folder", "recall", "remember", "verdict_key"]

_SCHEMA_VERSION = 1
_KNOWN: dict[str, "Verdict"] = {}


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether models of one shape run exactly.

    Attributes:
        exact: Whether every law holds on the tiny copy.
        reason: If not, what differed and by how much, or what stands in the way; else empty.
        model_type: The family, as named in the config.
        num_layers: Layers of the copy.
        noise: Largest difference between the base model's own padded, single and cached rows, as a fraction of the
            largest logit; None if it was refused before.
        worst: Largest difference between any plan's rows and their reference, in the same unit.
        seconds: What the proof took.
        traits: How the layers are called; None if not exact.
        kept: Where the verdict is kept: a file, or "memory".
    """

    exact: bool
    reason: str
    model_type: str
    num_layers: int
    noise: float | None
    worst: float | None
    seconds: float
    traits: LayerTraits | None
    kept: str = "memory"

    def to_dict(self) -> dict[str, Any]:
        """Return values that JSON knows."""
        return asdict(self)


def proofs_folder() -> Path:
    """Return the folder of this user's verdicts; it need not exist yet."""
    return Path(user_cache_path("dynadepth", appauthor=False)) / "proofs"


def verdict_key(model: Any, stack: LayerStack, num_layers: int) -> str:
    """Return what a verdict depends on, as a name of a file.

    That is: the code of the model's classes, of transformers, torch and dynadepth, the attention kernel and everything
    of the config that remains in the tiny copy's.

    Args:
        model: The model.
        stack: Its layers.
        num_layers: Layers of the tiny copy.
    """
    try:
        config = tiny_config(model.config, num_layers, HEAD_DIMS[0]).to_dict()
    except Exception:  # as any check of the family raises it; the proof will say so
        config = model.config.to_dict()
    classes = {own_class(module) for module in (model, stack.stack, *stack.layers)}
    parts = {
        "schema": _SCHEMA_VERSION,
        "versions": [__version__, transformers.__version__, torch.__version__, _own_source()],
        "classes": sorted(_class_source(cls) for cls in classes),
        "forwards": sorted({_code(layer) for layer in stack.layers}),
        "attention": str(getattr(model.config, "_attn_implementation", None)),
        "config": {name: value for name, value in config.items() if name not in _INDIFFERENT},
    }
    text = json.dumps(parts, sort_keys=True, default=str)
    return f"{stack.model_type}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


# Fields that no forward reads.
_INDIFFERENT = frozenset(
    {
        "_name_or_path",
        "architectures",
        "id2label",
        "label2id",
        "torch_dtype",
        "dtype",
        "transformers_version",
    }
)


@cache
def _own_source() -> str:
    """Return a hash of the code that a proof exercises."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for room in ("caching", "execution", "exits", "models", "proving"):
        for file in sorted((root / room).glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _class_source(cls: Any) -> str:
    return f"{cls.__module__}.{cls.__qualname__} {_file_of(cls)}"


@cache
def _file_of(cls: Any) -> str:
    try:
        return hashlib.sha256(Path(inspect.getfile(cls)).read_bytes()).hexdigest()
    except (OSError, TypeError):  # defined where there is no file: in a session or a zip
        return "unknown"


def _code(layer: Any) -> str:
    """Return a hash of the layer's forward, which kernel libraries replace while the file stays."""
    forward = inspect.unwrap(type(layer).forward)
    code = getattr(forward, "__code__", None)
    return hashlib.sha256(code.co_code if code else b"").hexdigest()


def recall(key: str) -> Verdict | None:
    """Return a verdict that is known, from memory or from the folder; None if there is none or it cannot be read."""
    known = _KNOWN.get(key)
    if known is not None:
        return known
    file = proofs_folder() / f"{key}.json"
    try:
        content = read_versioned_json(
            file, _SCHEMA_VERSION, error=CheckpointError, make_again="prove the model again"
        )
        traits = content["traits"]
        found = Verdict(
            **{
                name: content[name]
                for name in Verdict.__dataclass_fields__
                if name not in ("traits", "kept")
            },
            traits=None if traits is None else config_from_dict(LayerTraits, traits),
            kept=str(file),
        )
    except (OSError, CheckpointError, ConfigError, KeyError, TypeError):
        return None
    _KNOWN[key] = found
    return found


def remember(key: str, verdict: Verdict, *, on_disk: bool = True) -> Verdict:
    """Keep a verdict and return it with its place.

    Args:
        key: What `verdict_key` returned.
        verdict: The verdict.
        on_disk: Whether to keep it in the folder, if that can be written; else in memory only.

    Returns:
        The verdict, with where it is kept.
    """
    if not on_disk:
        _KNOWN[key] = verdict
        return verdict
    file = proofs_folder() / f"{key}.json"
    content = {"schema_version": _SCHEMA_VERSION, **asdict(verdict)}
    del content["kept"]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(file, content)
        verdict = replace(verdict, kept=str(file))
    except OSError:  # a read-only or full cache folder
        verdict = replace(verdict, kept="memory")
    _KNOWN[key] = verdict
    return verdict
