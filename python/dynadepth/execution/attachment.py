"""What wrapping puts on a model: the executor on its layers, two hooks and the controller on their stack.

The stack's forward pre-hook opens a `PlanScope` for the forward, and the hook behind it closes the scope.
"""

import re
from collections.abc import Mapping
from typing import Any, Protocol
from weakref import WeakSet, ref

import torch
from torch import nn

from dynadepth.caching.depth_cache import DepthCache
from dynadepth.errors import UnsupportedModelError, WrapError
from dynadepth.execution.context_stack import Context, contexts_of, open_context
from dynadepth.execution.executor import (
    check_installed,
    enter_scope,
    install_executor,
    leave_scope,
    obeys,
    remove_executor,
    scope_paused,
)
from dynadepth.execution.plan_forward import Planner, PlanScope
from dynadepth.execution.reading import ReadScope, read_states
from dynadepth.models.structure import LayerStack, forward_parameters

__all__ = ["Attachment", "check_text_only"]

# The attribute in which the stack of layers keeps who plans its forwards.
_CONTROLLER = "_dynadepth_controller"
# Parameters of a forward that take something else than text.
_NOT_TEXT = re.compile(r"pixel|image|video|audio|vision|input_features")


class _AttachedPlanner(Planner, Protocol):
    """A planner that remembers what it has put on its model."""

    attachment: "Attachment"
    # What a forward of the model runs in.
    scope_class: type[PlanScope]


class Attachment:
    """What a planner has put on its model; begins with nothing."""

    def __init__(self) -> None:
        self._handles: list[Any] = []
        # Weak, so that a discarded layer is freed.
        self._wrapped: WeakSet[nn.Module] = WeakSet()
        self._list_name = ""
        self._stack: ref[nn.Module] | None = None
        self._model: ref[nn.Module] | None = None

    # A copy of the model has a stack of its own, and no layers but those that stand in it.
    def __getstate__(self) -> dict[str, Any]:
        model = None if self._model is None else self._model()
        return {**self.__dict__, "_wrapped": None, "_stack": self.stack, "_model": model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._wrapped = WeakSet()
        for name in ("_stack", "_model"):
            self.__dict__[name] = None if state[name] is None else ref(state[name])

    @property
    def stack(self) -> nn.Module | None:
        """The module whose forward runs the layers; None while nothing is attached."""
        return None if self._stack is None else self._stack()

    def layers(self) -> list[nn.Module]:
        """Return the decoder layers as they stand now; none while nothing is attached."""
        stack = self.stack
        return [] if stack is None else list(stack.get_submodule(self._list_name).children())

    def attach(self, planner: _AttachedPlanner, model: nn.Module, stack: LayerStack) -> None:
        """Put the executor and the hooks on a model; if it raises, nothing is changed.

        Args:
            planner: Who plans the model's forwards.
            model: The model.
            stack: Its layers, proved.

        Raises:
            UnsupportedModelError: The model has not been proved.
            WrapError: An executor is there already, or another library has replaced a layer's forward.
        """
        install_executor(stack, planner)
        self._wrapped = WeakSet(stack.layers)
        self._list_name = _path_inside(stack.stack, stack.holder, stack.name)
        self._stack, self._model = ref(stack.stack), ref(model)
        stack.stack.__dict__[_CONTROLLER] = planner
        self._handles = [
            stack.stack.register_forward_pre_hook(_open_scope, with_kwargs=True),
            stack.stack.register_forward_hook(_close_scope, always_call=True),
        ]
        if any(_NOT_TEXT.search(name) for name in forward_parameters(type(model).forward)):
            self._handles.append(
                model.register_forward_pre_hook(_refuse_what_is_not_text, with_kwargs=True)
            )

    def detach(self, planner: object, model: nn.Module) -> None:
        """Remove everything that `attach` put on the model."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._stack, self._model = [], None, None
        # Other libraries may have moved, copied or replaced layers since wrapping.
        modules = list(model.modules())
        for module in modules:
            if module.__dict__.get(_CONTROLLER) is planner:
                del module.__dict__[_CONTROLLER]
        remove_executor(modules)
        remove_executor([layer for layer in self._wrapped if obeys(layer, planner)])
        # An interrupt (Ctrl-C) in a forward leaves its scope open.
        leave_scope(planner)

    def read(self, planner: object, states: torch.Tensor) -> torch.Tensor:
        """Return what the model's own norm and head say of states after its last layer.

        Args:
            planner: Who plans the model's forwards.
            states: Shape (states, hidden).

        Returns:
            Logits. Shape (states, vocabulary), model dtype.

        Raises:
            WrapError: Nothing is attached.
        """
        model = None if self._model is None else self._model()
        if model is None:
            raise WrapError("this model is no longer wrapped; call wrap_model(model, ...) first")
        context = Context(planner, reading=states[:, None])
        with torch.no_grad(), scope_paused(planner), open_context(context):
            return read_states(model, states)

    def check_layers(self, planner: _AttachedPlanner, stack: nn.Module) -> None:
        """Refuse a stack whose layers are no longer those that were wrapped.

        Raises:
            WrapError: They were changed after wrapping.
        """
        layers: Any = stack.get_submodule(self._list_name)
        check_installed(layers, planner, planner.num_layers)


def check_text_only(model: nn.Module, given: Mapping[str, Any]) -> None:
    """Refuse images, sounds and the like, for a forward or for `generate`.

    Args:
        model: The model that they are given to.
        given: What it is given, by name.

    Raises:
        UnsupportedModelError: One of them is not text.
    """
    for name, value in given.items():
        if value is not None and _NOT_TEXT.search(name):
            raise UnsupportedModelError(
                f"{name} was given, and a wrapped {type(model).__name__} reads text only: what images and sounds do "
                "under a plan has not been proved; leave it out, or unwrap_model(model) first"
            )


def _refuse_what_is_not_text(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    names = forward_parameters(type(module).forward)[1:]
    check_text_only(module, {**dict(zip(names, args, strict=False)), **kwargs})


def _path_inside(stack: nn.Module, holder: nn.Module, name: str) -> str:
    """Return the list's path from the stack: its name, unless a container lies between."""
    path = next(path for path, module in stack.named_modules() if module is holder)
    return f"{path}.{name}" if path else name


# Hooks find the controller through their module: in a deep-copied model, a closure would still refer to the original's
# controller.
def _open_scope(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    planner: _AttachedPlanner = module.__dict__[_CONTROLLER]
    planner.attachment.check_layers(planner, module)
    contexts = contexts_of(planner)
    reading = next((each.reading for each in contexts if each.reading is not None), None)
    if reading is not None:
        enter_scope(ReadScope(planner, planner.num_layers, reading))
        return
    given = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    mask = given if isinstance(given, torch.Tensor) and given.dim() == 2 else None
    tokens = kwargs.get("input_ids", args[0] if args else None)
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    states_asked = any(
        kwargs.get(name, getattr(module.config, name, False))
        for name in ("output_hidden_states", "output_attentions")
    )
    if states_asked:
        # Here, where what layers give out is not collected yet.
        for value in (*args, *kwargs.values()):
            if isinstance(value, DepthCache):
                value.settle()
    asked = (each.scope for each in contexts if each.scope is not None)
    scope = next(asked, planner.scope_class)
    enter_scope(
        scope(
            planner,
            mask,
            tokens,
            config=module.config,
            mask_given=given is not None,
            router_logits=kwargs.get("output_router_logits"),
            states_asked=states_asked,
        )
    )


def _close_scope(module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
    scope = leave_scope(module.__dict__[_CONTROLLER])
    # There is no output if the forward raised.
    if output is not None and isinstance(scope, PlanScope):
        scope.finish()
