"""`wrap_model` and `unwrap_model`: give a model a dynamic depth and remove it without a trace."""

import copy
import math
from collections.abc import Iterable
from functools import partial
from typing import Any, Literal

from torch import nn

from dynadepth.caching.depth_cache import DepthCache
from dynadepth.checkpoints.save_load import TrainedPolicy, find_routers, load_policy
from dynadepth.checkpoints.trained_exits import TrainedExits
from dynadepth.config import plain_number
from dynadepth.errors import ConfigError, PlanError, UnsupportedModelError, WrapError
from dynadepth.execution.attachment import check_text_only
from dynadepth.execution.executor import is_installed
from dynadepth.exits.exit_forward import Exits
from dynadepth.exits.lossless import LosslessDecoding
from dynadepth.models.structure import LayerStack, check_not_parallel
from dynadepth.plans import check_plans, identity_plan
from dynadepth.policies.base import Policy, StaticPolicy
from dynadepth.proving.prove import Unlisted, proved_stack
from dynadepth.wrapping.budgets import Budgets
from dynadepth.wrapping.controller import Controller, controller_of
from dynadepth.wrapping.skipping import GivenShortcuts, place_shortcuts, resolve_shortcuts
from dynadepth.wrapping.verify import check_identity

__all__ = ["unwrap_model", "wrap_model"]


def wrap_model(
    model: Any,
    *,
    budget: float | None = None,
    routers: Any = None,
    plan: Any = None,
    policy: Policy | None = None,
    exits: Exits | None = None,
    fidelity: float | None = None,
    adapt: bool = True,
    audit: float = 1.0,
    max_depth: float | None = None,
    protect: Iterable[int] = (),
    router_backend: Literal["torch", "onnx"] = "torch",
    shortcuts: GivenShortcuts = None,
    unlisted: Unlisted = "prove",
    verify: bool = False,
) -> Any:
    """Give a causal language model a dynamic depth; its weights, names and classes stay as they are.

    Everything is checked before the model is touched. Each prompt is planned once, from its own tokens, and the plan is
    kept on the cache. `unwrap_model` undoes it all.

    Args:
        model: A transformers causal language model, bare or inside a PEFT or a `torch.compile` model. The first of its
            shape is proved on a tiny copy of it, which takes seconds; the verdict is kept.
        budget: Mean depth over prompts, each prompt counting once, as a fraction of the full depth; needs routers. If
            these are exits: mean passes of new tokens; prompts are read in full.
        routers: A routers folder, a hub id, or what `load_policy` returned. None: `routers/` beside the base model.
        plan: One plan for every prompt. Shape (num_layers,), uint8; or a text that `parse_plan` reads: "0-11,14-27".
        policy: Any other policy, made for a model of as many layers.
        exits: Where new tokens may leave early, with heads of your own. A token that leaves owes its later layers,
            which run in one call with a later token, so all keys and values are the base model's own. Prompts are read
            in full.
        fidelity: Share of new tokens that are the base model's own choice after the same text; needs routers that
            `dynadepth train --policy exits` wrote. At 1, early tokens are drafts which the base model verifies before
            they are given out, one prompt at a time; drafts stop where they measure slower than plain decoding. Which
            of two tokens of nearly equal logits is the choice, is decided by rounding where many share a call.
        adapt: Whether audits move the threshold of `fidelity`, so that the share is kept on prompts unlike those that
            it was calibrated on too. Without, held-out prompts have to prove it.
        audit: Share of early tokens whose true reading is looked at once their layers have run; 0: none.
        max_depth: Hard limit on each prompt's depth, as a fraction of the full depth, at least 1; repeats beyond it are
            removed. A layer is decided before the later ones are known, so a repeat is kept only if the remaining
            layers, each run once, still fit.
        protect: Layers that always run once. With `budget`, only layers that the routers never skip.
        router_backend: What runs the routers: "torch", or "onnx" (onnxruntime on `routers.onnx`).
        shortcuts: What rows take in place of layers that they skip: a folder that `dynadepth shortcuts` wrote, a hub
            id, or what `load_shortcuts` returned. None: with `budget` those that the routers were calibrated with,
            otherwise nothing. False: nothing.
        unlisted: What to do with a model whose shape has no verdict yet: "prove" it, or "refuse" it.
        verify: Whether to compare one short forward of the model itself, wrapped with the identity plan, with the one
            before wrapping: a proof on a copy cannot see the kernels, quantised weights and devices of the model.

    Returns:
        The same model, changed in place; `model.dynadepth` is its controller.

    Raises:
        BudgetError: The budget is not a number or outside the calibrated range.
        CheckpointError: The routers are damaged or belong to another base model.
        ConfigError: Not exactly one of budget, plan and policy, or settings that do not go together, such as limits
            that a menu of several steps cannot keep.
        FileNotFoundError: There are no routers beside the base model.
        PlanError: The plan does not fit this model.
        ShortcutError: The shortcuts are damaged, belong to another base model, or are not those that the routers were
            calibrated with.
        UnsupportedModelError: The model cannot run exactly; says what differs, or what stands in the way.
        WrapError: The model is already wrapped, or another library has replaced one of its methods.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> shape = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **shape))
        >>> model = wrap_model(model, plan=[1, 0, 1])
        >>> model = unwrap_model(model)
    """
    given = [
        name
        for name, value in (
            ("budget", budget),
            ("plan", plan),
            ("policy", policy),
            ("exits", exits),
            ("fidelity", fidelity),
        )
        if value is not None
    ]
    if len(given) != 1:
        raise ConfigError(
            f"wrap_model was given {' and '.join(given) or 'none of budget, fidelity, plan, policy and exits'}; "
            "expected exactly one of them"
        )
    if router_backend not in ("torch", "onnx"):
        raise ConfigError(f"router_backend is {router_backend!r}; expected 'torch' or 'onnx'")
    promised = budget is not None or fidelity is not None
    if not promised and (routers is not None or router_backend != "torch"):
        raise ConfigError(
            f"routers and router_backend go with budget or fidelity, but {given[0]} was given; leave them out"
        )
    inner = _causal_lm(model)
    stack = proved_stack(inner, unlisted=unlisted)
    if is_installed(stack) or "dynadepth" in inner.__dict__:
        raise WrapError(
            f"this {type(model).__name__} is wrapped already; call unwrap_model(model) first"
        )
    replaced = [name for name in ("generate", *_PACKED) if name in inner.__dict__]
    if replaced:
        raise WrapError(
            f"another library has replaced this model's {replaced[0]}; remove that before wrapping"
        )
    protected = _check_protect(protect, stack)
    max_depth = _check_max_depth(max_depth)

    budgets, loaded = None, None
    if promised:
        loaded = _resolve_routers(inner, routers)
        budgets = Budgets(loaded, router_backend)
    if fidelity is not None and not isinstance(loaded, TrainedExits):
        raise ConfigError(
            f"fidelity={fidelity!r} needs exits, and the routers are of kind {loaded.kind if loaded else ''!r}; "
            "train some with `dynadepth train --policy exits`, or give a budget"
        )
    if isinstance(loaded, TrainedExits):
        exits = loaded.exits(
            fidelity=fidelity, budget=budget, adapt=adapt, audit=audit, backend=router_backend
        )
    if budget is not None and budgets is not None and loaded is not None:
        chosen: Policy = budgets.policy(budget)
        movable = sorted(set(protected) - set(loaded.protect))
        # With exits every layer runs once for every token, sooner or later.
        if movable and exits is None:
            raise ConfigError(
                f"layers {movable} are to be protected, but the budget was calibrated with routers that may skip them; "
                "train routers with these layers protected"
            )
        protected = tuple(sorted(set(protected) | set(loaded.protect)))
    else:
        chosen = (
            policy
            if policy is not None
            else StaticPolicy(
                identity_plan(stack.num_layers)
                if plan is None
                else check_plans(plan, stack.num_layers, num_rows=1)[0]
            )
        )
    if chosen.num_layers != stack.num_layers:
        raise PlanError(
            f"the policy plans {chosen.num_layers} layers, but the model has {stack.num_layers}; "
            "use a policy made for this model"
        )
    if exits is not None:
        _check_exits(exits, stack, shortcuts)
    maps = resolve_shortcuts(shortcuts, inner, loaded)
    controller = Controller(
        stack.num_layers,
        chosen,
        max_depth=max_depth,
        protect=protected,
        budget=None if budget is None else float(budget),
        budgets=budgets,
        shortcuts=maps,
        exits=exits,
        fidelity=None if fidelity is None else float(fidelity),
        adapt=adapt,
    )
    if isinstance(chosen, StaticPolicy):
        controller.check_limits(chosen.initial_plans(1))
    controller.check_menu()
    if verify:
        check_identity(inner, stack)
    if maps is not None:
        place_shortcuts(maps, stack.layers)
    controller.attachment.attach(controller, inner, stack)
    inner.__dict__["dynadepth"] = controller
    # Partials of module-level functions: deepcopy rebinds them to the copy, and PEFT reaches them.
    inner.__dict__["generate"] = partial(_generate, inner)
    for name in _PACKED:
        inner.__dict__[name] = partial(_refuse_packed, name)
    return model


def unwrap_model(model: Any) -> Any:
    """Remove everything that `wrap_model` put on a model.

    Args:
        model: A wrapped model, bare or inside a PEFT or a `torch.compile` model, whichever came first.

    Returns:
        The same model, with its own classes, attributes and outputs.

    Raises:
        WrapError: The model is not wrapped.
    """
    inner = _causal_lm(model)
    controller = controller_of(inner)
    controller.attachment.detach(controller, inner)
    for name in ("dynadepth", "generate", *_PACKED):
        inner.__dict__.pop(name, None)
    return model


def _causal_lm(model: Any) -> Any:
    """Return the model that has the layers and `generate`, unwrapping what torch.compile and PEFT put around it."""
    check_not_parallel(model)
    inner = getattr(model, "_orig_mod", model)
    get_base_model = getattr(inner, "get_base_model", None)
    return inner if get_base_model is None else get_base_model()


# Entry points of continuous batching, whose worker thread would swallow an error raised in a layer.
_PACKED = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


def _refuse_packed(name: str, *_: Any, **__: Any) -> None:
    raise UnsupportedModelError(
        f"{name} packs all requests into one row, where prompts cannot have plans of their own; "
        "call generate on padded batches, or unwrap_model(model) first"
    )


def _generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the model's own `generate`, uncompiled, and tell the controller the width of the prompt."""
    controller: Controller = model.__dict__["dynadepth"]
    given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)

    def setting(name: str) -> Any:
        if name in kwargs:
            return kwargs[name]
        # What the given config leaves open, `generate` takes from the model's own.
        values = (getattr(config, name, None) for config in (given, model.generation_config))
        return next((value for value in values if value is not None), None)

    check_text_only(model, kwargs)
    if setting("assistant_early_exit"):
        raise UnsupportedModelError(
            "assistant_early_exit changes the number of layers that the plan was made for; use assistant_model= or no "
            "assistant"
        )
    reads_prompts = controller.policy.decision_layers or controller.exits is not None
    if setting("prefill_chunk_size") and reads_prompts:
        raise UnsupportedModelError(
            f"prefill_chunk_size={setting('prefill_chunk_size')} shows the policy only a part of the prompt; "
            "leave it out, or wrap with plan="
        )
    if (
        setting("guidance_scale") not in (None, 1)
        and setting("use_cache") is False
        and controller.policy.decision_layers
    ):
        raise UnsupportedModelError(
            "guidance without a cache cannot tell the prompt from the negative prompt, which has a plan of its own; "
            "leave use_cache=False out, or wrap with plan="
        )
    prepare = getattr(model.prepare_inputs_for_generation, "__func__", None)
    if (
        controller.policy.decision_layers
        and prepare is not type(model).prepare_inputs_for_generation
    ):
        raise UnsupportedModelError(
            "another library prepares the inputs of this model's generate (prompt tuning of PEFT puts tokens before "
            "them), so the policy cannot tell where the prompt ends; wrap with plan="
        )
    if setting("compile_config") is not None or kwargs.get("disable_compile") is False:
        raise UnsupportedModelError(
            "generate was asked to compile (compile_config, or disable_compile=False); a wrapped model decides in "
            "Python which rows run which layer, so it runs uncompiled: leave these out, or bake(model, plan) and "
            "compile that"
        )
    # With a static cache on an accelerator, generate compiles the forward by itself: one graph for each plan, and after
    # a few plans silently none. A fixed plan is no exception, as `model.dynadepth.plans` may change it at any time.
    if given is None:
        kwargs["disable_compile"] = True
    else:
        # Passing settings beside a config is deprecated, so this one goes into a copy: the config is the caller's.
        given = copy.copy(given)
        given.disable_compile = True
        if kwargs.get("generation_config") is None:
            args = (args[0], given, *args[2:])
        else:
            kwargs["generation_config"] = given
    prompt = kwargs.get("inputs_embeds")
    for candidate in (kwargs.get("input_ids"), kwargs.get("inputs"), args[0] if args else None):
        if prompt is None:
            prompt = candidate
    width = int(prompt.shape[1]) if prompt is not None and getattr(prompt, "ndim", 0) >= 2 else None
    ends = setting("eos_token_id")
    ends = [] if ends is None else ends if isinstance(ends, (list, tuple)) else [ends]
    dial = None if controller.exits is None else controller.exits.dial
    if controller.exits is not None and dial is not None and dial.verify:
        if kwargs.get("custom_generate") is not None:
            raise UnsupportedModelError(
                "custom_generate was given, and fidelity 1 decodes in a loop of its own; leave it out, or set "
                "model.dynadepth.fidelity below 1"
            )
        kwargs["custom_generate"] = LosslessDecoding(
            controller.exit_pace, controller.exits.window - 1, kwargs.get("streamer")
        )
    with controller.generation(width, ends=frozenset(int(each) for each in ends)):
        output = type(model).generate(model, *args, **kwargs)
    cache = output.get("past_key_values") if isinstance(output, dict) else None
    if isinstance(cache, DepthCache):
        cache.settle()
    return output


def _check_max_depth(given: Any) -> float | None:
    max_depth = plain_number(given)
    if max_depth is None:
        return None
    if type(max_depth) not in (int, float) or not 1 <= max_depth < math.inf:
        raise ConfigError(
            f"max_depth is {given!r}; expected a number of at least 1 (1 removes all repeats)"
        )
    return float(max_depth)


def _check_protect(protect: Iterable[Any], stack: LayerStack) -> tuple[int, ...]:
    layers = tuple(plain_number(layer) for layer in protect)
    for layer in layers:
        if type(layer) is not int or not 0 <= layer < stack.num_layers:
            raise ConfigError(
                f"protect names layer {layer!r}; expected layer numbers from 0 to {stack.num_layers - 1}"
            )
    return layers


def _check_exits(exits: Any, stack: LayerStack, shortcuts: GivenShortcuts) -> None:
    """Refuse what new tokens cannot leave by."""
    if not isinstance(exits, Exits):
        raise ConfigError(
            f"exits is a {type(exits).__name__}; expected Exits((head, ...)) with heads of your own"
        )
    reason = None if stack.traits is None else stack.traits.no_exits
    if reason is not None:
        raise UnsupportedModelError(
            f"no token of this {stack.model_type} may leave early: {reason}. Wrap it without exits"
        )
    last = exits.heads[-1].layer_idx
    if last >= stack.num_layers:
        raise ConfigError(
            f"exits have a head before layer {last}; the model's layers are 0 to {stack.num_layers - 1}"
        )
    if shortcuts:
        raise ConfigError(
            "shortcuts go with plans that skip layers, and exits skip none; leave shortcuts out"
        )


def _resolve_routers(model: nn.Module, routers: Any) -> TrainedPolicy:
    if isinstance(routers, TrainedPolicy):
        routers.check_model(model)
        return routers
    return load_policy(find_routers(model) if routers is None else routers, model=model)
