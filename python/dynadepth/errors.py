"""Every error and warning that dynadepth raises on purpose, in one tree.

Each error also inherits the built-in that a caller may already catch. A message says what was given, what was
expected and what to do. A missing file raises `FileNotFoundError`, not an error of this tree.
"""

__all__ = [
    "AssetError",
    "BudgetError",
    "CheckpointError",
    "ConfigError",
    "DynadepthError",
    "DynadepthWarning",
    "ExportError",
    "HubError",
    "LabelError",
    "PlanError",
    "RunnerError",
    "SearchError",
    "ShortcutError",
    "TaskError",
    "UnsupportedModelError",
    "WrapError",
]


class DynadepthError(Exception):
    """Root of all errors of dynadepth."""


class ConfigError(DynadepthError, ValueError):
    """A setting or a configuration file is invalid."""


class UnsupportedModelError(DynadepthError, ValueError):
    """The model, or the way it is called, is outside what dynadepth runs exactly."""


class PlanError(DynadepthError, ValueError):
    """A plan has a wrong shape or wrong actions, or runs no layer."""


class BudgetError(DynadepthError, ValueError):
    """A budget is not a number, or lies outside the calibrated range."""


class WrapError(DynadepthError, RuntimeError):
    """A model is already wrapped, is not wrapped, or cannot be restored."""


class RunnerError(DynadepthError, RuntimeError):
    """Workers died, cannot be had, or do not run what the process that started them runs."""


class SearchError(DynadepthError, RuntimeError):
    """An unknown or reused ticket, or a search that cannot continue."""


class CheckpointError(DynadepthError, ValueError):
    """A routers folder is damaged, or belongs to another base model."""


class ShortcutError(DynadepthError, ValueError):
    """Shortcuts are damaged, belong to another base model, or are not those that a policy was calibrated with."""


class ExportError(DynadepthError, RuntimeError):
    """An ONNX file cannot be made or does not decide as the routers do."""


class HubError(DynadepthError, RuntimeError):
    """The Hugging Face hub cannot be reached, or refuses a request."""


class TaskError(DynadepthError, ValueError):
    """A task file or one of its lines is invalid."""


class LabelError(DynadepthError, ValueError):
    """A labels folder is damaged, or belongs to another model, task or search."""


class AssetError(DynadepthError, RuntimeError):
    """A model or question file cannot be fetched, or has a wrong hash."""


class DynadepthWarning(UserWarning):
    """Root of all warnings of dynadepth."""
