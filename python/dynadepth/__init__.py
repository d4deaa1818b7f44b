"""Dynamic depth for frozen language models: every prompt skips, executes or repeats each decoder layer.

The public names are below; each is imported when it is first used, so that `import dynadepth` costs nothing
(neither torch nor transformers). Errors are in `dynadepth.errors`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynadepth._core import __version__
    from dynadepth.checkpoints.hub import push_policy
    from dynadepth.checkpoints.save_load import load_policy, save_policy
    from dynadepth.checkpoints.trained_policy import Routers, TrainedMenu, TrainedPolicy
    from dynadepth.errors import DynadepthError, DynadepthWarning
    from dynadepth.execution.callbacks import VisitEvent
    from dynadepth.models.weight_sharing import share_weights
    from dynadepth.plans import (
        Action,
        check_plans,
        identity_plan,
        parse_plan,
        plan_depth,
        plan_ranges,
        plan_text,
    )
    from dynadepth.policies.base import Policy, StaticPolicy
    from dynadepth.policies.menu import Menu, MenuHead
    from dynadepth.policies.menu_policy import MenuPolicy
    from dynadepth.policies.prompt_batch import PromptBatch
    from dynadepth.policies.router_policy import RouterPolicy
    from dynadepth.shortcuts.maps import Shortcuts
    from dynadepth.shortcuts.save_load import load_shortcuts
    from dynadepth.wrapping.bake import bake
    from dynadepth.wrapping.wrap import unwrap_model, wrap_model

__all__ = [
    "Action",
    "DynadepthError",
    "DynadepthWarning",
    "Menu",
    "MenuHead",
    "MenuPolicy",
    "Policy",
    "PromptBatch",
    "RouterPolicy",
    "Routers",
    "Shortcuts",
    "StaticPolicy",
    "TrainedMenu",
    "TrainedPolicy",
    "VisitEvent",
    "__version__",
    "bake",
    "check_plans",
    "identity_plan",
    "load_policy",
    "load_shortcuts",
    "parse_plan",
    "plan_depth",
    "plan_ranges",
    "plan_text",
    "push_policy",
    "save_policy",
    "share_weights",
    "unwrap_model",
    "wrap_model",
]

_MODULES = {
    "__version__": "_core",
    "Action": "plans",
    "DynadepthError": "errors",
    "DynadepthWarning": "errors",
    "Menu": "policies.menu",
    "MenuHead": "policies.menu",
    "MenuPolicy": "policies.menu_policy",
    "Policy": "policies.base",
    "PromptBatch": "policies.prompt_batch",
    "RouterPolicy": "policies.router_policy",
    "Routers": "checkpoints.trained_policy",
    "Shortcuts": "shortcuts.maps",
    "StaticPolicy": "policies.base",
    "TrainedMenu": "checkpoints.trained_policy",
    "TrainedPolicy": "checkpoints.trained_policy",
    "VisitEvent": "execution.callbacks",
    "bake": "wrapping.bake",
    "check_plans": "plans",
    "identity_plan": "plans",
    "load_policy": "checkpoints.save_load",
    "load_shortcuts": "shortcuts.save_load",
    "parse_plan": "plans",
    "plan_depth": "plans",
    "plan_ranges": "plans",
    "plan_text": "plans",
    "push_policy": "checkpoints.hub",
    "save_policy": "checkpoints.save_load",
    "share_weights": "models.weight_sharing",
    "unwrap_model": "wrapping.wrap",
    "wrap_model": "wrapping.wrap",
}


def __getattr__(name: str) -> Any:
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
