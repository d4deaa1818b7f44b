"""Dynamic depth for frozen language models: every prompt skips, executes or repeats each decoder layer.

The public names are below; each is imported when it is first asked for, so that `import dynadepth` costs nothing
(neither torch nor transformers). Errors are in `dynadepth.errors`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynadepth._core import __version__
    from dynadepth.baking import bake
    from dynadepth.checkpoint import load_routers, save_routers
    from dynadepth.errors import DynadepthError, DynadepthWarning
    from dynadepth.hub import push_routers
    from dynadepth.menus import Menu, MenuHead
    from dynadepth.plans import (
        Action,
        check_plans,
        identity_plan,
        parse_plan,
        plan_depth,
        plan_ranges,
        plan_text,
    )
    from dynadepth.policies import MenuPolicy, Policy, RouterPolicy, StaticPolicy
    from dynadepth.prompts import PromptBatch
    from dynadepth.sharing import share_weights
    from dynadepth.trained import Routers, TrainedMenu, TrainedPolicy
    from dynadepth.watching import VisitEvent
    from dynadepth.wrap import unwrap_model, wrap_model

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
    "StaticPolicy",
    "TrainedMenu",
    "TrainedPolicy",
    "VisitEvent",
    "__version__",
    "bake",
    "check_plans",
    "identity_plan",
    "load_routers",
    "parse_plan",
    "plan_depth",
    "plan_ranges",
    "plan_text",
    "push_routers",
    "save_routers",
    "share_weights",
    "unwrap_model",
    "wrap_model",
]

_MODULES = {
    "__version__": "_core",
    "Action": "plans",
    "DynadepthError": "errors",
    "DynadepthWarning": "errors",
    "Menu": "menus",
    "MenuHead": "menus",
    "MenuPolicy": "policies",
    "Policy": "policies",
    "PromptBatch": "prompts",
    "RouterPolicy": "policies",
    "Routers": "trained",
    "StaticPolicy": "policies",
    "TrainedMenu": "trained",
    "TrainedPolicy": "trained",
    "VisitEvent": "watching",
    "bake": "baking",
    "check_plans": "plans",
    "identity_plan": "plans",
    "load_routers": "checkpoint",
    "parse_plan": "plans",
    "plan_depth": "plans",
    "plan_ranges": "plans",
    "plan_text": "plans",
    "push_routers": "hub",
    "save_routers": "checkpoint",
    "share_weights": "sharing",
    "unwrap_model": "wrap",
    "wrap_model": "wrap",
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
