"""Which base model this is: its architecture and samples of its weights.

Routers read the hidden states of one base model, so they are useless on another, and nothing else
would show it. Parameters are read by name only, so a wrapped model has the fingerprint of its base
model.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from dynadepth.errors import DynadepthError, UnsupportedModelError
from dynadepth.files import sha256_text

__all__ = [
    "FINGERPRINT_SCHEME",
    "check_base_model",
    "compare_fingerprints",
    "fingerprint",
    "fingerprint_digest",
]

FINGERPRINT_SCHEME = 1

_ARCHITECTURE = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
_SAMPLES = 256
_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# float16 represents every bfloat16 number from here up to 65504 exactly, but not those outside.
_SMALLEST = 2.0**-16


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Describe a base model so that another model, or a changed one, can be told apart from it.

    The weights are sampled (up to 256 values of each parameter of the first, middle and last
    decoder layer and of everything outside the layers), rounded to bfloat16 and hashed. So the
    fingerprint is the same on every device and in float64, float32 and bfloat16; also in float16,
    unless the weights were published in float32 or leave float16's range. Quantised weights are
    hashed as they are stored, so they differ from the base model's own. Weights that cannot be read
    (offloaded, or not loaded) are named as unreadable and never compare equal. Settings that change
    no weight, such as a stretched RoPE, are not seen.

    Args:
        model: A transformers model, wrapped by dynadepth or not. It is only read.

    Returns:
        A dictionary for JSON: `scheme`, `architecture` (None where a family lacks a field), `quantization`,
        and `weights`, which maps names of parameters and layers to their hashes.

    Raises:
        UnsupportedModelError: The model has no config, or no decoder layers can be found among its
            parameters.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no config; expected a transformers causal language model"
        )
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    quantization = getattr(config, "quantization_config", None)
    return {
        "scheme": FINGERPRINT_SCHEME,
        "architecture": {name: _plain(getattr(text_config, name, None)) for name in _ARCHITECTURE},
        "quantization": None if quantization is None else _quantization_method(quantization),
        "weights": _weights(model),
    }


def compare_fingerprints(given: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """List, field by field, how two base models differ.

    Args:
        given: Fingerprint of the model at hand.
        expected: Fingerprint of the model to compare it with, such as the one that routers were trained on.

    Returns:
        One line for each difference; none if the models are the same.
    """
    if given.get("scheme") != expected.get("scheme"):
        return [
            f"the fingerprint was made by scheme {expected.get('scheme')}, this dynadepth makes "
            f"scheme {given.get('scheme')}, so the two cannot be compared"
        ]
    found, wanted = given.get("architecture", {}), expected.get("architecture", {})
    differences = [
        f"{name} is {found.get(name)}, expected {wanted.get(name)}"
        for name in dict.fromkeys((*wanted, *found))
        if found.get(name) != wanted.get(name)
    ]
    if given.get("quantization") != expected.get("quantization"):
        differences.append(
            f"quantization is {given.get('quantization')}, expected {expected.get('quantization')}"
        )
    return differences + _weight_differences(given.get("weights", {}), expected.get("weights", {}))


def check_base_model(
    model: nn.Module,
    expected: Mapping[str, Any],
    *,
    holder: str,
    error: type[DynadepthError],
    advice: str,
    made_with: str = "",
    shape: tuple[int, int] | None = None,
    accepted: bool = False,
    how_to_accept: str = "",
) -> None:
    """Check that a model is the one that something (routers, labels, scores) was made with.

    Args:
        model: The base model at hand, wrapped or not.
        expected: Fingerprint of the model that it was made with.
        holder: What was made with that model, in the plural, for the message: "the labels in DIR".
        error: Raised if the models differ.
        advice: What the message tells the user to do.
        made_with: Name of the model that it was made with, if known.
        shape: Number of decoder layers and hidden size that it needs; None: those of `expected`.
        accepted: Whether the user has accepted that the weights differ; another shape is never accepted.
        how_to_accept: How the user can accept that, for the message; empty: not at all.

    Raises:
        DynadepthError: Of type `error`: the models differ.
    """
    given = fingerprint(model)
    differences = compare_fingerprints(given, expected)
    needed = _shape(expected) if shape is None else shape
    fits = _shape(given) == needed
    if fits and (accepted or not differences):
        return
    if not fits:
        differences.insert(0, f"they need {needed[0]} layers of width {needed[1]}")
    if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        differences.append(
            "this model is in float16, which weights published in float32 or bfloat16 may not survive: load it in the "
            "dtype of its checkpoint before you think of another model"
        )
    origin = f" they were made with {made_with}, and here" if made_with else ""
    knowingly = f"; or, if you know that it behaves alike, {how_to_accept}" if fits else ""
    raise error(
        f"{holder} belong to another base model than this {type(model).__name__}:{origin} {'; '.join(differences)}. "
        f"To go on, {advice}{knowingly if how_to_accept else ''}"
    )


def _shape(fingerprint: Mapping[str, Any]) -> tuple[Any, Any]:
    architecture = fingerprint.get("architecture", {})
    return architecture.get("num_hidden_layers"), architecture.get("hidden_size")


def fingerprint_digest(fingerprint: Mapping[str, Any]) -> str:
    """Shorten a fingerprint to 16 hexadecimal digits, for file metadata and log lines."""
    return sha256_text(json.dumps(fingerprint, sort_keys=True))[:16]


def _weight_differences(found: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    differences = []
    for name in dict.fromkeys((*wanted, *found)):
        if name not in found:
            differences.append(f"{name} is missing")
        elif name not in wanted:
            differences.append(f"{name} is not in the expected model")
        elif found[name].startswith("unreadable"):
            differences.append(f"weights of {name} are {found[name]}, so they cannot be compared")
        elif found[name] != wanted[name]:
            kinds = found[name].partition(":")[0], wanted[name].partition(":")[0]
            stored = f" (stored as {kinds[0]}, expected {kinds[1]})" if kinds[0] != kinds[1] else ""
            differences.append(f"weights of {name} differ{stored}")
    return differences


def _weights(model: nn.Module) -> dict[str, str]:
    """Hash everything outside the layers by name, and three decoder layers as a whole."""
    outside: dict[str, nn.Parameter] = {}
    stacks: dict[str, dict[int, dict[str, nn.Parameter]]] = {}
    for raw_name, parameter in model.named_parameters():
        name = raw_name.replace("_orig_mod.", "")  # torch.compile's wrapper
        parts = name.split(".")
        place = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if place is None:
            outside[name] = parameter
        else:
            stack = stacks.setdefault(".".join(parts[:place]), {})
            stack.setdefault(int(parts[place]), {})[".".join(parts[place + 1 :])] = parameter
    if not stacks:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no numbered decoder layers among its parameters; expected "
            "a transformers causal language model"
        )
    prefix = max(stacks, key=lambda name: len(stacks[name]))
    layers = sorted(stacks[prefix])
    chosen = dict.fromkeys((layers[0], layers[len(layers) // 2], layers[-1]))
    hashes = {name: _hash([(name, parameter)]) for name, parameter in sorted(outside.items())}
    for index in chosen:
        hashes[f"{prefix}.{index}"] = _hash(sorted(stacks[prefix][index].items()))
    return hashes


def _hash(parameters: Iterable[tuple[str, nn.Parameter]]) -> str:
    """Hash names, shapes and sampled values; the hash is prefixed with the storage format of the values."""
    digest = hashlib.sha256()
    kinds = set()
    for name, parameter in parameters:
        try:
            kind, data = _sample(parameter)
        except (RuntimeError, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0][:80]
            return f"unreadable: {name} on {parameter.device.type} ({reason})"
        kinds.add(kind)
        digest.update(f"{name} {tuple(parameter.shape)} {kind}\n".encode())
        digest.update(data)
    return f"{'+'.join(sorted(kinds))}:{digest.hexdigest()}"


def _sample(parameter: nn.Parameter) -> tuple[str, bytes]:
    """Return the storage format of a parameter and the bytes of its samples."""
    flat = parameter.detach().reshape(-1)
    size = flat.numel()
    # Fractional parts of multiples of the golden ratio: evenly spread, and never in the same few columns of
    # a matrix.
    places = (
        sorted({(i * 0x9E3779B97F4A7C15 % 2**64) * size >> 64 for i in range(_SAMPLES)})
        if size
        else []
    )
    values = flat[torch.tensor(places, dtype=torch.long, device=flat.device)].cpu()
    if values.dtype not in _PLAIN:
        return str(values.dtype).removeprefix("torch."), values.view(torch.uint8).numpy().tobytes()
    rounded = values.to(torch.bfloat16).float()
    kept = torch.where(rounded.abs() < _SMALLEST, 0.0, rounded)
    return "bfloat16", kept.numpy().tobytes()


def _plain(value: Any) -> Any:
    """Convert a config value to what it would be after a round trip through JSON."""
    return list(value) if isinstance(value, tuple) else value


def _quantization_method(quantization: Any) -> str:
    found = (
        quantization.get("quant_method")
        if isinstance(quantization, Mapping)
        else getattr(quantization, "quant_method", None)
    )
    return str(getattr(found, "value", found))
