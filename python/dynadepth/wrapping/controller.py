"""The controller of a wrapped model: plans each prompt once and lets the executor run the plan.

A hook opens a `PlanScope` for each forward; the first layers of the first forward on an empty cache plan the
prompts (the policy sees prompt tokens only); the plans are kept on the cache, or by `generate` if there is none.
`model.dynadepth` is the controller.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dynadepth.caching.depth_cache import DepthCache
from dynadepth.caching.memory import KvBytes
from dynadepth.caching.row_plans import RowPlans
from dynadepth.checkpoints.trained_exits import TrainedExits
from dynadepth.checkpoints.trained_policy import TrainedPolicy
from dynadepth.drafting.pace import Pace
from dynadepth.errors import ConfigError, PlanError, WrapError
from dynadepth.execution.attachment import Attachment
from dynadepth.execution.context_stack import Context, contexts_of, open_context
from dynadepth.execution.plan_forward import PlanScope
from dynadepth.exits.audit import Audit, Audited
from dynadepth.exits.exit_forward import Exits, ExitScope
from dynadepth.exits.exit_stats import ExitStats, ExitTotals
from dynadepth.exits.prompt_exits import PromptAnswers, PromptExitScope
from dynadepth.models.structure import position_arguments
from dynadepth.plans import REPEAT, Plans, plan_depth, plan_ranges
from dynadepth.policies.base import Policy, StaticPolicy
from dynadepth.policies.prompt_batch import PromptBatch
from dynadepth.shortcuts.maps import Shortcuts
from dynadepth.wrapping.budgets import Budgets
from dynadepth.wrapping.constraints import Limits
from dynadepth.wrapping.contexts import ContextMethods
from dynadepth.wrapping.skipping import skips_of
from dynadepth.wrapping.stats import Stats, Totals

__all__ = ["Controller"]

# The attribute in which a model keeps its controller.
_ATTRIBUTE = "dynadepth"


class Controller(ContextMethods):
    """The object `model.dynadepth`: a wrapped model's policy, what it has planned, and the resulting depth and memory.

    If several threads run the model, everything called `last` refers to the batch that was planned last in any of them.

    Attributes:
        num_layers: Decoder layers of the model.
        attachment: What it has put on the model.
        shortcuts: The maps that rows take in place of layers that they skip; None: nothing is in their place.
        skips: What rows go through in place of each layer that they skip.
        exits: Where new tokens may leave early; None: nowhere.
        exit_stats: What `exit_totals` are read from.
        exit_pace: Decides whether lossless decoding drafts.
        exit_audit: Compares early tokens with what the base model says; None: nothing is compared.
        scope_class: What a forward of the model runs in.
        last_layers_run: Of the last `generate`, for each token that was decoded one at a time, the number of layers
            that had run when it was chosen. Shape (rows, tokens), int64; None without exits or before the first.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from dynadepth import wrap_model
        >>> shape = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **shape))
        >>> model = wrap_model(model, plan="0-1,3")
        >>> _ = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, min_new_tokens=3, pad_token_id=0)
        >>> model.dynadepth.last_plans, model.dynadepth.last_depths
        (array([[1, 1, 0, 1]], dtype=uint8), array([0.75]))
        >>> kv = model.dynadepth.last_kv
        >>> kv.saved / kv.plain
        0.25
        >>> model.dynadepth.totals  # doctest: +NORMALIZE_WHITESPACE
        Totals(prompts=1, planned_visits=3, plain_planned_visits=4, prefill_forwards=1, decode_forwards=2,
               visits=9, plain_visits=12)
        >>> model.dynadepth
        <Controller: 4 layers, StaticPolicy 0-1,3; last batch 1 row at depth 0.750; in all 1 row at depth 0.750>
    """

    def __init__(
        self,
        num_layers: int,
        policy: Policy,
        *,
        max_depth: float | None = None,
        protect: Iterable[int] = (),
        budget: float | None = None,
        budgets: Budgets | None = None,
        shortcuts: Shortcuts | None = None,
        exits: Exits | None = None,
        fidelity: float | None = None,
        adapt: bool = True,
    ) -> None:
        limits = Limits(num_layers, max_depth=max_depth, protect=protect)
        super().__init__(limits, Stats(), budgets or Budgets(None))
        self._default, self._budget = policy, budget
        self._fidelity, self._adapt = fidelity, adapt
        self.attachment = Attachment()
        self.exits, self.exit_stats = exits, ExitStats(num_layers)
        self.exit_pace = Pace()
        self.exit_audit = (
            None if exits is None or not exits.audit else Audit(exits.audit, exits.dial)
        )
        self.scope_class = PlanScope if exits is None else ExitScope
        self.shortcuts = shortcuts
        self.skips = skips_of(shortcuts, num_layers)

    @property
    def policy(self) -> Policy:
        """The policy that plans prompts now: that of the current `at_budget` block, or else the model's own."""
        given = next((each.policy for each in contexts_of(self) if each.policy is not None), None)
        return self._default if given is None else given

    @property
    def trained(self) -> TrainedPolicy | None:
        """The trained policy that the model was wrapped with, if any."""
        return self._budgets.trained

    @property
    def budget(self) -> float | None:
        """The mean depth asked for, as a fraction of the full depth; None if the model was wrapped without a budget.

        It can be set while the model is wrapped. It then applies to all prompts planned later, in all threads; existing
        caches keep their plans.

        Raises:
            BudgetError: On setting: it is not a number or outside the calibrated range. Nothing is changed then.
            ConfigError: On setting: the model was wrapped without a budget.
        """
        return self._budget

    @budget.setter
    def budget(self, budget: float) -> None:
        chosen = self._budgets.policy(budget)
        self._turn(budget=budget)
        self._default, self._budget, self._fidelity = chosen, float(budget), None

    @property
    def fidelity(self) -> float | None:
        """The share of new tokens promised to be the base model's own choice; None if the model has no such promise.

        It can be set while the model is wrapped with exits. The threshold then begins where held-out prompts say.

        Raises:
            BudgetError: On setting: it is no share, or outside of what was measured. Nothing is changed then.
            ConfigError: On setting: the model was not wrapped with trained exits.
        """
        return self._fidelity

    @fidelity.setter
    def fidelity(self, fidelity: float) -> None:
        self._budgets.exits()
        self._turn(fidelity=fidelity)
        self._fidelity, self._budget = float(fidelity), None

    def _turn(self, **promise: Any) -> None:
        trained = self._budgets.trained
        if (
            isinstance(trained, TrainedExits)
            and self.exits is not None
            and self.exits.dial is not None
        ):
            trained.turn(self.exits.dial, adapt=self._adapt, **promise)

    def plan_prompts(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **inputs: Any,
    ) -> Plans:
        """Return the plans that `generate` would give prompts, without generating.

        Runs the layers up to the policy's last decision, which is not counted in `totals`. A server can then put
        prompts with the same plan into one batch, which is faster than mixed plans, and run it inside `plans(...)`.

        Args:
            input_ids: Token ids of the prompts. Shape (batch, tokens), int64, on the model's device.
            attention_mask: 1 for real tokens. Shape (batch, tokens).
            **inputs: Other arguments of the model's forward, such as `inputs_embeds` instead of token ids.

        Returns:
            Plans. Shape (batch, num_layers), uint8.

        Raises:
            ConfigError: There are no prompts.
            UnsupportedModelError: The padding of the prompts cannot be determined.
            WrapError: The model is no longer wrapped.

        Example:
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> from dynadepth import wrap_model
            >>> shape = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_attention_heads=2)
            >>> model = wrap_model(LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **shape)), plan="0,2")
            >>> model.dynadepth.plan_prompts(torch.tensor([[5, 6, 7], [8, 9, 5]]))
            array([[1, 0, 1],
                   [1, 0, 1]], dtype=uint8)
        """
        context = Context(self, only_plans=True)
        self._read(context, input_ids, attention_mask, inputs, what="plan_prompts")
        planned = context.row_plans
        if planned is None:
            raise WrapError(
                "the forward did not reach any decoder layer; unwrap the model and wrap it again"
            )
        plans: Plans = planned.plans.copy()
        return plans

    def answer_prompts(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **inputs: Any,
    ) -> PromptAnswers:
        """Answer prompts with one token each: those that exits are sure of leave early, the others go on together.

        For choices, classes and scores, where nothing is decoded: the later layers of a prompt that leaves never run.
        The promise is the model's own: with `fidelity` the share of answers that are the base model's, with `budget`
        the mean depth, both as held-out prompts had them; no audit watches it. Prompts are counted in `totals` and
        `last_plans`.

        Args:
            input_ids: Token ids of the prompts. Shape (batch, tokens), int64, on the model's device.
            attention_mask: 1 for real tokens; padding may be on either side. Shape (batch, tokens).
            **inputs: Other arguments of the model's forward, such as `inputs_embeds` instead of token ids.

        Returns:
            The logits of the token after each prompt, and how many layers each ran.

        Raises:
            BudgetError: The promise is outside of what was measured on prompts that are answered with one token.
            ConfigError: There are no prompts; the model was not wrapped with trained exits, or with `protect` for a
                layer that a prompt would leave before; its exits know nothing of such prompts; or it is called inside
                `plans(...)`.
            UnsupportedModelError: The padding of the prompts cannot be determined.
            WrapError: The model is no longer wrapped.

        Example:
            A model that was wrapped with exits, such as `wrap_model(model, fidelity=0.98, routers="exits")`::

                inputs = tokenizer(questions, return_tensors="pt", padding=True)
                answers = model.dynadepth.answer_prompts(**inputs)
                answers.logits[:, [a, b, c]].argmax(dim=-1)  # among the tokens of three letters
                answers.layers_run.mean() / model.dynadepth.num_layers  # the mean depth
        """
        policy = self._budgets.prompt_exits(fidelity=self._fidelity, budget=self._budget)
        if any(each.plans is not None for each in contexts_of(self)):
            raise ConfigError(
                "answer_prompts was called inside plans(...), which says itself what runs; call it outside, or the "
                "model itself"
            )
        first = policy.decision_layers[0]
        kept = [layer for layer in self._limits.protect if layer >= first]
        if kept:
            raise ConfigError(
                f"prompts that are answered with one token may leave before layer {first}, and protect names layers "
                f"{kept}; wrap without protect, or call the model itself"
            )
        given_out: list[tuple[torch.Tensor, Plans]] = []
        scope = partial(PromptExitScope, heads=policy.heads, given_out=given_out)
        context = Context(self, policy=policy, scope=scope)
        self._read(context, input_ids, attention_mask, inputs, what="answer_prompts")
        if not given_out:
            raise WrapError(
                "the forward did not reach the last decoder layer; unwrap the model and wrap it again"
            )
        states, plans = given_out[0]
        logits = self.attachment.read(self, states)
        return PromptAnswers(logits, plans.sum(axis=1, dtype=np.int64))

    def _read(
        self,
        context: Context,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        inputs: dict[str, Any],
        *,
        what: str,
    ) -> None:
        """Run the layers once over prompts, without a cache and without the head."""
        stack = self.attachment.stack
        if stack is None:
            raise WrapError("this model is no longer wrapped; call wrap_model(model, ...) first")
        if input_ids is None and inputs.get("inputs_embeds") is None:
            raise ConfigError(f"{what} was given no prompts; pass input_ids or inputs_embeds")
        # Numbered as in `generate`; families without this argument use the mask instead.
        if attention_mask is not None and inputs.get("position_ids") is None:
            inputs |= position_arguments(stack, attention_mask)
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        with torch.no_grad(), open_context(context):
            stack(**{**inputs, **given})

    def __repr__(self) -> str:
        policy = type(self.policy).__name__
        if self.budget is not None:
            policy += f" at budget {self.budget:g}"
        if isinstance(self.policy, StaticPolicy):
            policy += f" {plan_ranges(self.policy.plan)}"
        parts = [f"{self.num_layers} layers", policy]
        if self.shortcuts is not None:
            parts.append(
                f"shortcuts of rank {self.shortcuts.rank} for {len(self.shortcuts.mapped_layers)} layers"
            )
        if self._limits.max_depth is not None:
            parts.append(f"max_depth {self._limits.max_depth:g}")
        if self._limits.protect:
            parts.append(f"protect {list(self._limits.protect)}")
        done = ["nothing planned yet"]
        plans, totals = self.last_plans, self.totals
        if plans is not None:
            done = [_summary("last batch", len(plans), float(plan_depth(plans).mean()))]
        if totals.mean_depth is not None:
            done.append(_summary("in all", totals.prompts, totals.mean_depth))
        return f"<{type(self).__name__}: {', '.join(parts)}; {'; '.join(done)}>"

    @property
    def last_plans(self) -> Plans | None:
        """The plans of the batch planned last. Shape (rows, num_layers), uint8; None before the first."""
        return self._stats.last_plans

    @property
    def last_depths(self) -> npt.NDArray[np.float64] | None:
        """The depth of each of its rows, 1.0 being the plain model's. Shape (rows,), float64; None before the first."""
        plans = self.last_plans
        return None if plans is None else plan_depth(plans)

    @property
    def last_mean_depth(self) -> float | None:
        """The mean of `last_depths`; None before the first batch."""
        depths = self.last_depths
        return None if depths is None else float(depths.mean())

    @property
    def last_kv(self) -> KvBytes | None:
        """Bytes of key and value states of that batch, and what the plain model would hold.

        They are current for as long as the cache exists; after `generate`, they are those at its end. None if there is
        no cache, or if the cache of a plain forward no longer exists.
        """
        return self._stats.last_kv

    @property
    def totals(self) -> Totals:
        """What has been planned and run since wrapping, or since `reset_totals`."""
        return self._stats.totals

    def reset_totals(self) -> None:
        """Set `totals` and `exit_totals` back to zero; what is known of the last batch is kept."""
        self._stats.reset()
        self.exit_stats.reset()
        self.exit_pace.reset()
        if self.exit_audit is not None:
            self.exit_audit.reset()

    @property
    def exit_totals(self) -> ExitTotals:
        """How many new tokens left early, what decoding cost, and what audits found.

        Since wrapping or since `reset_totals`. What waits for an audit is looked at first, which runs the model's head.
        """
        audit, found = self.exit_audit, Audited()
        if audit is not None:
            audit.look(partial(self.attachment.read, self))
            found = audit.found
        return replace(self.exit_stats.totals, audited=found, drafted=self.exit_pace.totals)

    def start(self, num_rows: int, cache: DepthCache | None) -> tuple[RowPlans, bool]:
        """Return the plans of a batch as far as they are known before its first layer, and whether they are new.

        Raises:
            PlanError: The cache was planned for another number of rows, or the rows are not a multiple of the plans
                that the caller gave.
        """
        contexts = contexts_of(self)
        asking = next((context for context in contexts if context.only_plans), None)
        if asking is not None:
            asking.row_plans = self._fresh_plans(num_rows, contexts)
            return asking.row_plans, True
        generation = next((context for context in contexts if context.in_generate), None)
        # Without a cache, only `generate` knows that a longer input is the same prompt again.
        keeper = generation if cache is None else cache
        known = keeper.row_plans if keeper is not None else None
        is_new = known is None
        if known is None:
            self._stats.begin(cache)
            if generation is not None:
                generation.cache = cache
            known = self._fresh_plans(num_rows, contexts)
        if known.num_rows != num_rows:
            raise PlanError(
                f"the cache holds {known.num_rows} planned rows, but the batch has {num_rows}; "
                "a cache can only be continued with the sequences that it was begun with"
            )
        if keeper is not None:
            keeper.row_plans = known
        return known, is_new

    def check_menu(self) -> None:
        """Refuse limits that can leave a prompt without a plan, for a menu of several steps.

        Raises:
            ConfigError: Some step can be left without a plan.
        """
        menu = self.policy.known_plans()
        if menu is not None:
            self._limits.check_menu(menu, self.policy.decision_layers)

    def finish(self, plans: RowPlans, *, is_prefill: bool) -> None:
        """Record a forward that has completed."""
        self._stats.ran(plans, is_prefill=is_prefill)

    def _fresh_plans(self, num_rows: int, contexts: list[Context]) -> RowPlans:
        said = next((each for each in contexts if each.plans is not None or each.policy), None)
        fixed = None if said is None else said.plans
        if fixed is not None:
            if num_rows % len(fixed):
                raise PlanError(
                    f"{len(fixed)} plans were given for a batch of {num_rows} rows, not a multiple"
                )
            plans = RowPlans(np.repeat(fixed, num_rows // len(fixed), axis=0))
        else:
            given = self.policy.initial_plans(num_rows)
            initial = self._checked(given, (num_rows, self.num_layers), 0)
            initial = self._limits.apply(initial, 0, np.zeros(num_rows, dtype=np.int64))
            reads = self.policy.decision_layers
            plans = RowPlans(initial, num_decided=reads[0] if reads else self.num_layers)
        self._note_plans(plans)
        return plans

    def _note_plans(self, plans: RowPlans) -> None:
        if plans.num_decided == self.num_layers and not self.only_plans():
            self._stats.planned(plans)

    def only_plans(self) -> bool:
        """Say whether this forward is only for the plans, so that nothing runs once they are decided."""
        return any(context.only_plans for context in contexts_of(self))

    def decide(
        self,
        plans: RowPlans,
        layer_idx: int,
        hidden_states: torch.Tensor,
        prompts: PromptBatch,
    ) -> None:
        """Ask the policy for the actions of the layers from `layer_idx` to its next decision.

        Args:
            plans: The plans of the batch; the decided actions are written into it.
            layer_idx: The layer that the states enter.
            hidden_states: Shape (rows, tokens, hidden), model dtype and device.
            prompts: The prompts of the batch, which see the same plans.

        Raises:
            PlanError: The policy gave actions of a wrong shape, or other than 0, 1 and 2.
        """
        reads = self.policy.decision_layers
        end = next((layer for layer in reads if layer > layer_idx), self.num_layers)
        with torch.no_grad():
            given = self.policy.decide(layer_idx, hidden_states, prompts)
        actions = self._checked(given, (plans.num_rows, end - layer_idx), layer_idx)
        visits = plans.plans[:, :layer_idx].sum(axis=1, dtype=np.int64)
        plans.decide(layer_idx, self._limits.apply(actions, layer_idx, visits))
        self._note_plans(plans)

    def _checked(self, actions: Any, shape: tuple[int, int], layer_idx: int) -> Plans:
        """Return a policy's actions as a new array; refuse wrong ones before the cast to uint8 could change them."""
        array = np.asarray(actions)
        low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
        if array.dtype.kind not in "iu" or array.shape != shape or low < 0 or high > int(REPEAT):
            raise PlanError(
                f"{type(self.policy).__name__} gave {array.dtype} of shape {array.shape} with values from {low} to "
                f"{high} at layer {layer_idx}; expected whole numbers 0, 1 and 2 of shape {shape}"
            )
        checked: Plans = array.astype(np.uint8)
        return checked

    def knows_lengths(self) -> bool:
        """Say whether the caller has set how many tokens of each row form the prompt."""
        return self._prompt_lengths(contexts_of(self)) is not None

    @staticmethod
    def _prompt_lengths(contexts: list[Context]) -> torch.Tensor | None:
        return next(
            (context.prompt_lengths for context in contexts if context.prompt_lengths is not None),
            None,
        )

    def prompt_mask(self, real: torch.Tensor) -> torch.Tensor:
        """Return which of the real tokens belong to the prompt. Shape (rows, tokens), bool, like `real`.

        Raises:
            PlanError: The number of prompt lengths is not the number of rows.
        """
        mask, (rows, tokens) = real, real.shape
        contexts = contexts_of(self)
        lengths = self._prompt_lengths(contexts)
        generation = next((context for context in contexts if context.in_generate), None)
        width = None
        if generation is not None:
            # The width is that of the prompt planned first; guidance's negative prompt is prompt tokens throughout.
            width, generation.prompt_width = generation.prompt_width, None
        if lengths is not None:
            if lengths.numel() != rows:
                raise PlanError(
                    f"{lengths.numel()} prompt lengths were given for a batch of {rows} rows"
                )
            mask = mask & (mask.long().cumsum(dim=1) <= lengths.to(mask.device).unsqueeze(1))
        elif width is not None and width < tokens:
            mask = mask.clone()
            mask[:, width:] = False
        return mask


def _summary(what: str, rows: int, depth: float) -> str:
    return f"{what} {rows} {'row' if rows == 1 else 'rows'} at depth {depth:.3f}"


def controller_of(model: nn.Module) -> Controller:
    """Return the controller of a wrapped model.

    Raises:
        WrapError: The model is not wrapped.
    """
    controller = model.__dict__.get(_ATTRIBUTE)
    if not isinstance(controller, Controller):
        raise WrapError(
            f"this {type(model).__name__} is not wrapped; call wrap_model(model, ...) first"
        )
    return controller
