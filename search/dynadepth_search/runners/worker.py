"""A worker outside the driver: it loads the model once, checks that it is the driver's, and does jobs.

The same class serves as a process of this machine and as an actor of a Ray cluster. Errors travel as text, so that a
worker that fails tells why in words of the driver's own classes.
"""

import os
import platform
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dynadepth import _core, errors
from dynadepth.checkpoints.paths import locate_shortcuts
from dynadepth.errors import DynadepthError, RunnerError
from dynadepth.models.fingerprint import fingerprint, fingerprint_digest
from dynadepth.models.loading import load_model, load_tokenizer
from dynadepth.shortcuts.save_load import load_shortcuts
from dynadepth_search.runners.work import Loaded, Work

__all__ = ["Call", "ModelSource", "Reply", "Setup", "Worker", "result_of", "what_runs"]

# Results may differ between versions of these, so all processes of a run have the same.
_LIBRARIES = ("dynadepth-search", "numpy", "pyarrow", "torch", "transformers")
_BUILTIN_ERRORS = {"FileNotFoundError": FileNotFoundError}


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where workers load the model from.

    Args:
        model: Folder or Hub id of the base model.
        dtype: As for `load_model`.
        shortcuts: Folder of the shortcuts, or one that contains it; None: there are none.
    """

    model: str
    dtype: str = "fast"
    shortcuts: str | None = None

    def absolute(self) -> "ModelSource":
        """Return the source with whole paths, since workers may stand in another folder."""
        model, shortcuts = self.model, self.shortcuts
        return replace(
            self,
            model=os.fspath(Path(model).absolute()) if Path(model).exists() else model,
            shortcuts=None if shortcuts is None else os.fspath(Path(shortcuts).absolute()),
        )


@dataclass(frozen=True, slots=True)
class Setup:
    """What a worker needs to begin.

    Args:
        source: Where the model is.
        device: Where the model runs, as torch names it.
        threads: Number of threads of torch in the worker.
        expected: What runs in the driver, as `what_runs` tells it.
    """

    source: ModelSource
    device: str
    threads: int
    expected: Mapping[str, str]


# A call of a worker: "open" and nothing; or "do", the name of a work, the work if the worker has not seen it yet, and
# the content of a job.
Call = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Reply:
    """What a worker answers.

    Args:
        value: The result of the call.
        error: Name of the class of the error that it raised; None: it raised none.
        message: The text of the error.
    """

    value: Any = None
    error: str | None = None
    message: str = ""


def what_runs(loaded: Loaded | None = None) -> dict[str, str]:
    """Return what decides results and must be the same in all processes: versions, and the model if it is loaded.

    Args:
        loaded: What this process has loaded; None: nothing yet.
    """
    found = {"python": platform.python_version(), "dynadepth": _core.__version__}
    found |= {name: version(name) for name in _LIBRARIES}
    if loaded is not None:
        maps = loaded.shortcuts
        found["base model"] = fingerprint_digest(fingerprint(loaded.model))
        found["dtype"] = str(loaded.model.dtype).removeprefix("torch.")
        found["shortcuts"] = "none" if maps is None else maps.digest
    return found


class Worker:
    """The state of a worker, in its own process.

    Args:
        setup: What it needs to begin; nothing is loaded yet.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._loaded: Loaded | None = None
        self._name: int | None = None
        self._do: Callable[[Any], Any] | None = None

    def call(self, call: Call) -> Reply:
        """Answer a call; an error is an answer too.

        Args:
            call: What is asked.
        """
        try:
            return Reply(self._open() if call[0] == "open" else self._job(*call[1:]))
        except (DynadepthError, FileNotFoundError) as error:
            return Reply(error=type(error).__name__, message=str(error))
        except Exception as error:  # whatever torch or a family raises
            last = "".join(traceback.format_exception(error)).strip()
            message = f"a worker on {self._setup.device} failed ({type(error).__name__}):\n{last}"
            return Reply(error="RunnerError", message=message)

    def _open(self) -> dict[str, Any]:
        """Load the model; return what the driver may want to know of this machine."""
        setup, source = self._setup, self._setup.source
        _check_same(what_runs(), setup.expected)
        torch.set_num_threads(setup.threads)
        _silence()
        model = load_model(source.model, device=setup.device, dtype=source.dtype)
        maps = None
        if source.shortcuts is not None:
            maps = load_shortcuts(locate_shortcuts(Path(source.shortcuts)), model=model)
        loaded = Loaded(model, load_tokenizer(source.model), maps)
        _check_same(what_runs(loaded), setup.expected)
        self._loaded = loaded
        return {"process": os.getpid(), "machine": _machine(model.device)}

    def _job(self, name: int, work: Work | None, content: Any) -> Any:
        if self._loaded is None:
            raise RunnerError("a worker was given a job before it was opened; open it first")
        if name != self._name and work is not None:
            self._do, self._name = work.start(self._loaded), name
        if self._do is None or name != self._name:
            raise RunnerError(f"a worker was given a job of work {name} that it has not seen")
        return self._do(content)


def result_of(reply: Reply) -> Any:
    """Return what a worker answered, or raise the error that it met.

    Raises:
        DynadepthError: The worker's, of the same class.
        FileNotFoundError: The worker did not find a file.
    """
    if reply.error is None:
        return reply.value
    known = _BUILTIN_ERRORS.get(reply.error) or getattr(errors, reply.error)
    raise known(reply.message)


def _check_same(found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Refuse to work where results would not be the driver's.

    Raises:
        RunnerError: Something differs.
    """
    for name, here in found.items():
        if here != expected[name]:
            raise RunnerError(
                f"a worker on {platform.node()} has {name} {here}, but the driver has {expected[name]}; results would "
                f"not be the same: {_ADVICE.get(name, 'install the same version on all machines')}"
            )


_ADVICE = {
    "base model": "give a model that is the same on all machines, such as a folder that they share",
    "dtype": "name the dtype (--dtype) instead of letting each machine choose",
    "shortcuts": "give shortcuts that are the same on all machines, and the same that the run has",
}


def _machine(device: torch.device) -> str:
    """Return the type of what computes; the last bits of results depend on it."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    if device.type == "cpu":
        return f"CPU with {torch.backends.cpu.get_cpu_capability()}"
    return device.type


def _silence() -> None:
    """Take transformers' own bars off stderr, which many workers may share."""
    from transformers.utils import logging

    logging.disable_progress_bar()
