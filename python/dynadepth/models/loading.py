"""Load a base model and its tokenizer for a command line, with errors that say what was tried.

The library itself takes any model that is already in memory; only the command lines load one by its name.
"""

import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dynadepth.config import did_you_mean
from dynadepth.errors import AssetError, ConfigError, UnsupportedModelError
from dynadepth.files import lfs_hint
from dynadepth.models.names import is_path_like

__all__ = ["check_device", "check_dtype", "load_model", "load_skeleton", "load_tokenizer"]

_SHOWN_WEIGHTS = 3
_DTYPES = ("auto", "fast", "float32", "bfloat16", "float16", "float64")


def load_model(
    name_or_path: str | os.PathLike[str], *, device: str = "cpu", dtype: str = "auto"
) -> PreTrainedModel:
    """Load a causal language model for inference.

    Args:
        name_or_path: A folder with `config.json` and weights, or a Hugging Face Hub id.
        device: The torch device that the model is moved to, such as "cuda:0".
        dtype: "auto" keeps the checkpoint's own dtype; "fast" does so too, but takes float32 for half precision that
            the device computes slowly, at twice the memory; otherwise "float32", "bfloat16", "float16" or "float64".

    Returns:
        The model, in evaluation mode.

    Raises:
        AssetError: There is no such model, one of its files is damaged, or weights are missing.
        ConfigError: There is no such device or dtype; nothing was loaded.
        UnsupportedModelError: It is not a causal language model that transformers knows.
    """
    check_device(device)
    check_dtype(dtype)
    name = _local_or_hub(name_or_path, "model")
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name, dtype="auto" if dtype == "fast" else dtype, output_loading_info=True
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise AssetError(_cannot_load("model", name, error)) from error
    except (ValueError, StrictDataclassError) as error:
        raise UnsupportedModelError(
            f"{name!r} is not a causal language model that transformers can build "
            f"({_first_line(error)}); give a decoder-only text model"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        shown = ", ".join(missing[:_SHOWN_WEIGHTS]) + (
            ", ..." if len(missing) > _SHOWN_WEIGHTS else ""
        )
        raise AssetError(
            f"the weights of {name!r} lack {len(missing)} tensors of the model ({shown}), which would "
            "run at random values; fetch the checkpoint again"
        )
    if dtype == "fast" and not _computes_fast(torch.device(device), model.dtype):
        model = model.float()
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded


def load_skeleton(name_or_path: str | os.PathLike[str]) -> PreTrainedModel:
    """Build a causal language model from its config alone, on the meta device: all modules, no weights.

    Args:
        name_or_path: A folder with `config.json`, such a file, or a Hugging Face Hub id.

    Returns:
        The model.

    Raises:
        AssetError: There is no such config, or it is damaged.
        UnsupportedModelError: It is not the config of a causal language model that transformers knows.
    """
    file = Path(name_or_path)
    name = os.fspath(file) if file.is_file() else _local_or_hub(name_or_path, "config")
    try:
        config: Any = AutoConfig.from_pretrained(name)
    except (OSError, KeyError, TypeError) as error:
        raise AssetError(_cannot_load("config", name, error)) from error
    except (ValueError, StrictDataclassError) as error:
        raise UnsupportedModelError(
            f"{name!r} is not the config of a model that transformers can build ({_first_line(error)})"
        ) from error
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever a family raises on a config
        raise UnsupportedModelError(
            f"{name!r} is not a causal language model that transformers can build "
            f"({_first_line(error)}); give a decoder-only text model"
        ) from error
    return model


def check_device(device: str) -> None:
    """Refuse a device that this machine cannot use, before anything is loaded.

    Args:
        device: Name of a torch device.

    Raises:
        ConfigError: There is no such torch device, or this machine does not have it.
    """
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"device {device!r} is unknown to torch; expected a name such as cpu, cuda, cuda:1 or mps"
        ) from error
    try:
        # Reading a value back fails on the meta device.
        torch.zeros(1, device=place).item()
    except Exception as error:  # what torch raises differs from device to device
        raise ConfigError(
            f"device {device!r} cannot be used here ({type(error).__name__}: {_first_line(error)}); give one that this "
            "machine has, such as cpu"
        ) from error


def check_dtype(dtype: str) -> None:
    """Refuse a dtype in which a model cannot be loaded.

    Args:
        dtype: Name of the dtype, or "auto".

    Raises:
        ConfigError: The name is unknown.
    """
    if dtype not in _DTYPES:
        raise ConfigError(
            f"dtype {dtype!r} is unknown{did_you_mean(str(dtype), _DTYPES)}; expected one of {', '.join(_DTYPES)}"
        )


def load_tokenizer(
    name_or_path: str | os.PathLike[str], *, for_generation: bool = True
) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Args:
        name_or_path: A folder with the tokenizer's files, or a Hugging Face Hub id.
        for_generation: Whether it pads on the left, and with the end-of-text token if it has no padding token. False:
            as its files say, which is how a checkpoint is saved.

    Returns:
        The tokenizer.

    Raises:
        AssetError: There is no such tokenizer, or one of its files is damaged.
    """
    name = _local_or_hub(name_or_path, "tokenizer")
    try:
        options = {"padding_side": "left"} if for_generation else {}
        tokenizer: Any = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise AssetError(_cannot_load("tokenizer", name, error)) from error
    if for_generation and tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


def _computes_fast(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether products in a dtype are about as fast as in float32, or faster.

    CPUs without instructions for half precision take several times as long; what they have decides, not a timing, so
    that a run which goes on loads the same dtype again.
    """
    names = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    if device.type != "cpu" or dtype not in names:
        return True
    # Builds of torch without oneDNN do not have the question.
    supported = getattr(torch.ops.mkldnn, names[dtype], None)
    return supported is not None and bool(supported())


def _local_or_hub(name_or_path: str | os.PathLike[str], what: str) -> str:
    """Return the name, but never ask the hub for one that looks like a path: a stranger may own it there."""
    name = os.fspath(name_or_path)
    if is_path_like(name) and not Path(name).is_dir():
        raise AssetError(_cannot_load(what, name, FileNotFoundError("there is no such folder")))
    return name


def _cannot_load(what: str, name: str, error: Exception) -> str:
    """Say what was tried: the folder, or the Hub if there is no such folder."""
    if Path(name).is_dir():
        tried = f"the folder {Path(name).absolute()}"
        hint = lfs_hint(name)
    elif is_path_like(name):
        tried, hint = f"the folder {Path(name).absolute()}, which does not exist", ""
    else:
        tried = (
            f"the folder {Path(name).absolute()}, which does not exist, then the Hub id {name!r}"
        )
        hint = ""
    return (
        f"cannot load the {what} {name!r}: tried {tried} ({type(error).__name__}: {_first_line(error)}){hint}; "
        "give a folder with config.json and weights, or a Hub id that can be reached"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1].strip()}".rstrip(".")
    return lines[0].rstrip(".") if lines else "no message"
