"""The executor: lets a scope decide what each decoder layer of a model runs.

Each decoder layer's class is swapped for a generated subclass of the same name, whose forward hands the call to the
scope of the forward pass that is under way. A scope (of a plan or of a sweep) decides; `LayerCall.visit` runs. Masks
and positions come from the model's own forward and the computation from the layer's own forward, so no family's code
is copied.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from types import MethodType, TracebackType
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from dynadepth.errors import UnsupportedModelError, WrapError
from dynadepth.execution.layer_call import LayerCall
from dynadepth.models.structure import (
    LayerSignature,
    LayerStack,
    LayerTraits,
    layer_signature,
    layer_stack,
)

__all__ = [
    "NOTHING",
    "PER_ROW",
    "OnUnwrapped",
    "Scope",
    "Skipped",
    "check_installed",
    "check_unwrapped",
    "enter_scope",
    "install_executor",
    "is_compiled",
    "is_installed",
    "leave_scope",
    "obeys",
    "remove_executor",
    "scope_paused",
]

# An entry of a scope's `dispatch`: call the scope's `run`.
PER_ROW: Any = object()


class Skipped:
    """An entry of a scope's `dispatch`: the layer runs for no row.

    Attributes:
        through: What the rows go through in place of the layer, from states of shape (rows, tokens, hidden) to states
            of the same shape, dtype and device.
    """

    __slots__ = ("through",)

    def __init__(self, through: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.through = through

    # A copied model has the same nothing.
    def __reduce__(self) -> str | tuple[Any, ...]:
        return "NOTHING" if self is NOTHING else (Skipped, (self.through,))


def _unchanged(states: torch.Tensor) -> torch.Tensor:
    return states


# A layer that is skipped without anything in its place.
NOTHING = Skipped(_unchanged)


class Scope(Protocol):
    """Decides what a layer does while one forward pass of its model is under way."""

    owner: object
    outer: "Scope | None"
    # One entry for each layer. If the layer is known to run once for all rows: the cache that it is given, which may be
    # None. If it is known to run for no row: a `Skipped`. Otherwise `PER_ROW`, and `run` must be called.
    dispatch: Sequence[Any]

    def run(self, call: LayerCall) -> torch.Tensor:
        """Run a layer call and return the states that enter the next layer."""
        ...


# Each thread and task has its own scopes, so two threads may run one model.
_SCOPE: ContextVar[Scope | None] = ContextVar("dynadepth_scope", default=None)


def enter_scope(scope: Scope) -> None:
    """Make `scope` the one that its owner's layers obey in this thread."""
    outer = _SCOPE.get()
    # A forward that a KeyboardInterrupt cut short could not leave its scope.
    while outer is not None and outer.owner is scope.owner:
        outer = outer.outer
    scope.outer = outer
    _SCOPE.set(scope)


def leave_scope(owner: object) -> Scope | None:
    """Undo the last `enter_scope` of this owner and return its scope, or None if there is none."""
    scope = _SCOPE.get()
    if scope is None or scope.owner is not owner:
        return None
    _SCOPE.set(scope.outer)
    return scope


@contextmanager
def scope_paused(owner: object) -> Iterator[None]:
    """Let an owner's layers run in scopes of their own inside a forward of its model, whose scope then goes on."""
    paused = leave_scope(owner)
    try:
        yield
    finally:
        if paused is not None:
            enter_scope(paused)


@dataclass(slots=True)
class _Installed:
    """What an installed layer carries: its number, whose scopes it obeys, and its compiled own forward, if any."""

    layer_idx: int
    owner: object
    traits: LayerTraits
    compiled: Callable[..., Any] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and pickles are not compiled, as with any module.
        return _Installed, (self.layer_idx, self.owner, self.traits)


_INSTALLED = "_dynadepth_installed"
# Activation checkpointing keeps a layer's arguments and runs the layer again in the backward pass, perhaps in another
# thread, after the forward's scope has been closed. So the scope travels with the arguments.
_SCOPE_ARGUMENT = "_dynadepth_scope"


def _scope_of(installed: _Installed) -> Scope:
    scope = _SCOPE.get()
    while scope is not None and scope.owner is not installed.owner:
        scope = scope.outer
    if scope is None:
        raise WrapError(
            f"decoder layer {installed.layer_idx} was called outside a forward of the model that it was wrapped with; "
            "call the model itself. If layers were copied or replaced after wrapping (layer_replication of PEFT), "
            "call unwrap_model(model) and wrap it again"
        )
    return scope


def _run_call(
    layer: nn.Module,
    own_forward: Callable[..., Any],
    signature: LayerSignature,
    scope: Scope,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    installed: _Installed = layer.__dict__[_INSTALLED]
    arguments = dict(zip(signature.names, args, strict=False))
    arguments.update(kwargs)
    hidden_states = arguments.pop(signature.names[0])
    traits = installed.traits
    call = LayerCall(
        installed.layer_idx,
        hidden_states,
        arguments,
        signature,
        None if traits.num_extras is None else (None,) * traits.num_extras,
        layer,
        installed.compiled or own_forward,
        traits,
    )
    states = scope.run(call)
    return states if call.extras is None else (states, *call.extras)


def _own_forward(base: Any) -> Callable[..., Any]:
    """Return the forward of a layer class without the checkpointing that transformers puts around every forward.

    Since transformers 5.24 only the outermost forward of a class checkpoints, and that is the one of the subclass.
    """
    forward: Any = base.forward
    name = getattr(getattr(forward, "__code__", None), "co_name", "")
    own: Callable[..., Any] = (
        forward.__wrapped__ if name == "forward_with_checkpointing" else forward
    )
    return own


@cache
def _routed_class(base: Any) -> type[nn.Module]:
    """Make the subclass that stands in for a decoder layer class; `isinstance` and the class name still hold."""
    # Kernel libraries replace the forward of a class, some after it was first wrapped: `found` is the
    # one that all else here was read from.
    found = base.forward
    signature, own_forward = layer_signature(found), _own_forward(base)
    cache_name, states_name = signature.cache_name, signature.names[0]

    def read_again() -> None:
        nonlocal found, signature, own_forward, cache_name, states_name
        current = base.forward
        signature, own_forward = layer_signature(current), _own_forward(base)
        cache_name, states_name = signature.cache_name, signature.names[0]
        forward.__wrapped__ = current  # type: ignore[attr-defined]
        # Last, so that another thread that sees it sees the rest.
        found = current

    # `install_executor` refuses layers that torch has compiled, so torch's check for that is bypassed.
    own_call = nn.Module._call_impl if base.__call__ is nn.Module.__call__ else base.__call__

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Which rows run is decided outside compiled graphs; otherwise every plan would need graphs of its own.
        if torch.compiler.is_dynamo_compiling():
            return forward_outside(self, *args, **kwargs)
        if base.forward is not found:
            read_again()
        installed: _Installed = self.__dict__[_INSTALLED]
        scope = kwargs.pop(_SCOPE_ARGUMENT, None) or _SCOPE.get()
        if scope is None or scope.owner is not installed.owner:
            scope = _scope_of(installed)
        # Most calls of most plans take this shortcut; in decoding, these lines are the cost of wrapping.
        if cache_name in kwargs:
            view = scope.dispatch[installed.layer_idx]
            if view.__class__ is Skipped:
                states = view.through(args[0] if args else kwargs[states_name])
                extras = installed.traits.num_extras
                return states if extras is None else (states, *(None,) * extras)
            if view is not PER_ROW:
                kwargs[cache_name] = view
                return (installed.compiled or own_forward)(self, *args, **kwargs)
        return _run_call(self, own_forward, signature, scope, args, kwargs)

    # Used only while compiling: otherwise leaving the graph would cost as much as everything else.
    forward_outside = torch.compiler.disable(forward)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.training and getattr(self, "gradient_checkpointing", False):
            kwargs[_SCOPE_ARGUMENT] = _scope_of(self.__dict__[_INSTALLED])
        return own_call(self, *args, **kwargs)

    def compile_own_forward(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        # Unbound, because a bound method would run this layer's weights in every copy.
        self.__dict__[_INSTALLED].compiled = torch.compile(base.forward, *args, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        _, _, *state = base.__reduce_ex__(self, max(protocol, 2))
        return (_empty_layer, (base,), *state)

    # `capture_outputs`, `_no_split_modules` and PEFT look at names and signatures.
    forward.__wrapped__ = found  # type: ignore[attr-defined]
    attributes = {
        "forward": forward,
        "__call__": call,
        "compile": compile_own_forward,
        "__reduce_ex__": reduce,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_dynadepth_base": base,
    }
    routed: type[nn.Module] = type(base.__name__, (base,), attributes)
    return routed


def _empty_layer(base: Any) -> nn.Module:
    """Make a layer of the stand-in class, without any state, for copying and unpickling to fill."""
    routed = _routed_class(base)
    return routed.__new__(routed)


def is_installed(stack: LayerStack) -> bool:
    """Say whether an executor is on any of these layers, or on a layer inside a module that replaced one."""
    return any(_INSTALLED in module.__dict__ for module in stack.layers.modules())


def is_compiled(layer: nn.Module) -> bool:
    """Say whether torch has compiled the own forward of a layer that an executor is on."""
    installed = layer.__dict__.get(_INSTALLED)
    return installed is not None and installed.compiled is not None


def check_installed(layers: Iterable[Any], owner: object, num_layers: int) -> None:
    """Refuse a list of layers that is no longer the one that the executor was put on.

    Other libraries may put modules around layers, as long as these still run them. Cheap enough for every forward.

    Args:
        layers: The model's list of decoder layers, as it is now.
        owner: Whose scopes the layers obey.
        num_layers: How many there were.

    Raises:
        WrapError: Layers were added, removed, exchanged or replaced, or the forward of one was.
    """
    present = list(layers)
    wrong = None if len(present) == num_layers else f"there are {len(present)} layers"
    for layer_idx, layer in enumerate(present):
        installed = layer.__dict__.get(_INSTALLED)
        if installed is None:
            inside = [
                module.__dict__[_INSTALLED]
                for module in layer.modules()
                if _INSTALLED in module.__dict__
            ]
            installed = inside[0] if len(inside) == 1 else None
        if installed is None:
            wrong = wrong or f"layer {layer_idx} is a {type(layer).__name__} that was not wrapped"
        elif installed.owner is not owner or installed.layer_idx != layer_idx:
            wrong = wrong or f"layer {installed.layer_idx} is at position {layer_idx}"
        elif "forward" in layer.__dict__ and _is_patched(layer):
            wrong = wrong or f"the forward of layer {layer_idx} was replaced"
    if wrong is not None:
        raise WrapError(
            f"the model was wrapped with {num_layers} decoder layers, and since then they were changed (as "
            f"layer_replication of PEFT does): {wrong}. Undo that, or unwrap_model(model) and wrap it again"
        )


def check_unwrapped(model: nn.Module, *, before: str) -> None:
    """Refuse a model that is wrapped or inside a sweep.

    Args:
        model: A supported causal language model.
        before: What the model must be unwrapped for; the message names it.

    Raises:
        UnsupportedModelError: The model's family is not supported.
        WrapError: The model is wrapped, or inside a sweep.
    """
    if is_installed(layer_stack(model)):
        raise WrapError(
            f"this {type(model).__name__} is wrapped; call unwrap_model(model) before {before}"
        )


def install_executor(stack: LayerStack, owner: object) -> None:
    """Put the executor on every decoder layer; changes nothing if it raises.

    Args:
        stack: The layers.
        owner: The object whose scopes the layers obey.

    Raises:
        WrapError: An executor is there already, or another library has replaced a layer's forward.
        UnsupportedModelError: A layer's forward has no known mask argument, or the model has not been proved.
    """
    if stack.traits is None:
        raise UnsupportedModelError(
            f"this {stack.model_type} has not been proved to run exactly; install on what `proved_stack(model)` returns"
        )
    classes: list[Any] = [type(layer) for layer in stack.layers]
    for layer_idx, layer in enumerate(stack.layers):
        if _INSTALLED in layer.__dict__ or hasattr(type(layer), "_dynadepth_base"):
            raise WrapError(
                f"decoder layer {layer_idx} is wrapped already; call unwrap_model(model) first"
            )
        if _is_patched(layer):
            raise WrapError(
                f"the forward of decoder layer {layer_idx} ({type(layer).__name__}) was replaced by another library; "
                "remove that change before wrapping, or its effect would be lost silently"
            )
        if layer._compiled_call_impl is not None:
            raise WrapError(
                f"decoder layer {layer_idx} was compiled as a layer that always runs; do not compile it before "
                "wrapping, but call layer.compile() afterwards, which compiles what one visit runs"
            )
        layer_signature(classes[layer_idx].forward)
    for layer_idx, layer in enumerate(stack.layers):
        layer.__dict__[_INSTALLED] = _Installed(layer_idx, owner, stack.traits)
        _set_class(layer, _routed_class(classes[layer_idx]))


def remove_executor(modules: Iterable[nn.Module]) -> None:
    """Give every decoder layer among some modules its own class back; modules without an executor are not changed."""
    for module in modules:
        if module.__dict__.pop(_INSTALLED, None) is not None:
            _set_class(module, type(module)._dynadepth_base)  # type: ignore[attr-defined]


_Entered = TypeVar("_Entered", bound="OnUnwrapped")


class OnUnwrapped:
    """A context manager that puts the executor on a model that is not wrapped, and leaves it as it found it.

    It owns the scopes that the layers obey meanwhile.

    Args:
        stack: The layers, proved.

    Raises:
        UnsupportedModelError: On entering: the model has not been proved.
        WrapError: On entering: the model is wrapped.
    """

    def __init__(self, stack: LayerStack) -> None:
        self._stack = stack

    def __enter__(self: _Entered) -> _Entered:
        install_executor(self._stack, self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        remove_executor(self._stack.layers)


def obeys(layer: nn.Module, owner: object) -> bool:
    """Say whether a layer carries an executor that obeys the scopes of this owner."""
    installed = layer.__dict__.get(_INSTALLED)
    return installed is not None and installed.owner is owner


# The attributes where accelerate keeps the forward that its hook replaced, and where it restores it.
_FORWARD_PLACES = ("_old_forward", "forward")


def _is_patched(layer: nn.Module) -> bool:
    """Say whether calling the layer runs something other than its class's forward, apart from accelerate's hooks."""
    place = "_old_forward" if hasattr(layer, "_hf_hook") else "forward"
    return place in layer.__dict__ and not _is_own_forward(layer, place)


def _is_own_forward(layer: nn.Module, place: str) -> bool:
    found: Any = layer.__dict__.get(place)
    return getattr(found, "__func__", None) is type(layer).forward and found.__self__ is layer


def _set_class(layer: nn.Module, cls: type[nn.Module]) -> None:
    own = [place for place in _FORWARD_PLACES if _is_own_forward(layer, place)]
    layer.__class__ = cls
    for place in own:
        layer.__dict__[place] = MethodType(cls.forward, layer)
