"""Which shortcuts a model is wrapped with, and how they are put in place of the layers that are skipped."""

import os
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

from dynadepth.checkpoints.paths import locate_shortcuts
from dynadepth.checkpoints.trained_policy import TrainedPolicy
from dynadepth.errors import ConfigError, ShortcutError
from dynadepth.execution.executor import NOTHING, Skipped
from dynadepth.shortcuts.maps import Shortcuts
from dynadepth.shortcuts.save_load import load_shortcuts

__all__ = ["GivenShortcuts", "place_shortcuts", "resolve_shortcuts", "skips_of"]

# Dtypes that states have; quantised weights are stored in others.
_COMPUTED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# A folder, a hub id, loaded shortcuts; False: none, whatever there is; None: those of the policy.
GivenShortcuts = str | os.PathLike[str] | Shortcuts | Literal[False] | None


def resolve_shortcuts(
    given: Any, model: nn.Module, trained: TrainedPolicy | None
) -> Shortcuts | None:
    """Return the shortcuts that a model is to be wrapped with.

    Args:
        given: What the caller gave, see `GivenShortcuts`.
        model: The base model.
        trained: The routers or the menu whose budget is to be kept; None with a plan or the caller's own policy.

    Returns:
        The shortcuts; None: a skipped layer leaves nothing behind.

    Raises:
        ConfigError: Something else was given, or the policy was calibrated otherwise.
        FileNotFoundError: There are none where they are said to be.
        ShortcutError: They are damaged or belong to another base model.
    """
    if not (given is False or isinstance(given, str | os.PathLike | Shortcuts | None)):
        raise ConfigError(
            f"shortcuts is {given!r}; expected a folder, a hub id, what load_shortcuts returned, or False"
        )
    own = None if trained is None else trained.shortcuts
    if given is None:
        found = own
    elif given is False:
        found = None
    else:
        found = (
            given
            if isinstance(given, Shortcuts)
            else load_shortcuts(locate_shortcuts(os.fspath(given)))
        )
    if found is not None:
        found.check_model(model)
    if trained is not None:
        digests = [None if each is None else each.digest for each in (found, own)]
        if digests[0] != digests[1]:
            what = [
                "without shortcuts" if digest is None else f"with shortcuts {digest}"
                for digest in digests
            ]
            raise ShortcutError(
                f"the policy was calibrated {what[1]}, but is to run {what[0]}, where its budgets were not measured; "
                "leave shortcuts out, or train a policy on scores that were made so"
            )
    return found


def skips_of(shortcuts: Shortcuts | None, num_layers: int) -> tuple[Skipped, ...]:
    """Return what rows go through in place of each layer that they skip.

    Args:
        shortcuts: The shortcuts; None: nothing.
        num_layers: Decoder layers of the model.
    """
    if shortcuts is None:
        return (NOTHING,) * num_layers
    return tuple(NOTHING if each is None else Skipped(each) for each in shortcuts.maps)


def place_shortcuts(shortcuts: Shortcuts, layers: Iterable[nn.Module]) -> None:
    """Copy each map to its layer's device, in the layer's dtype, ahead of the first forward.

    Args:
        shortcuts: The shortcuts.
        layers: The decoder layers. Those whose weights are offloaded are left to their first call.
    """
    for each, layer in zip(shortcuts.maps, layers, strict=True):
        weight = next((weight for weight in layer.parameters() if weight.dtype in _COMPUTED), None)
        if each is not None and weight is not None and weight.device.type != "meta":
            each.place(weight.device, weight.dtype)
