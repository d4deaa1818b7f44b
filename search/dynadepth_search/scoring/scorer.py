"""Scores examples under plans with a frozen model, and caches the outcomes of the identity plan.

A plan belongs to a prompt: all answers of an example run under the same plans.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dynadepth.errors import SearchError, TaskError
from dynadepth.execution.sweep import Sweeper
from dynadepth.plans import Plans, check_plans, identity_plan, plan_text
from dynadepth.proving.prove import proved_stack
from dynadepth.shortcuts.maps import Shortcuts
from dynadepth.wrapping.skipping import skips_of
from dynadepth_search.data.chat_template import check_template
from dynadepth_search.data.encoding import EncodedExample, check_tokenizer, encode_example
from dynadepth_search.data.tasks import ChatForm, Example, Scoring, check_scoring, located
from dynadepth_search.scoring.batching import (
    Answered,
    Work,
    batches_of,
    pack,
    pad_left,
    run_sweep,
    sweep_size,
)
from dynadepth_search.scoring.objectives import Objective
from dynadepth_search.scoring.outcomes import OutcomeBuilder, Outcomes
from dynadepth_search.scoring.states import PromptStates

__all__ = ["Scorer"]


class Scorer:
    """Scores examples under plans with a frozen model.

    The model must not be wrapped; no call changes it. The outcome of an example under the identity
    plan is cached, within `max_base_bytes`. The same calls in the same order on a new scorer give
    results that are equal to the last bit on one machine; which examples share a call, and whether
    their base outcome is cached, changes results only by rounding.

    Args:
        model: The base model, in evaluation mode.
        tokenizer: Tokenizer of the base model.
        scoring: How choices are scored, see `Task`.
        chat: The chat form of the prompts, see `Task`.
        max_logit_bytes: Maximum size of the logits of one sweep in bytes, counted as float32.
        max_tokens: Maximum number of padded tokens of one sweep, counted once for each plan.
        sweep_tokens: Number of padded tokens at which a sweep takes no further example; None: what suits the device,
            few on a CPU (so that states stay in its caches), `max_tokens` elsewhere.
        sweep_cost: What a sweep costs besides its tokens, in tokens: the less, the fewer prompts of unlike length share
            one, which pads all to the longest; None: what suits the device, `max_tokens` where it is no CPU.
        shortcuts: What states take in place of layers that a plan skips; None: nothing.
        max_base_bytes: Maximum size of the cached next-token distributions of the identity plan, in bytes.

    Raises:
        ShortcutError: The shortcuts belong to another base model.
        TaskError: The scoring is unknown, the tokenizer ends every text, or its chat template is not that of `chat`.
        UnsupportedModelError: The family is not supported.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        scoring: str = "raw",
        *,
        chat: ChatForm | None = None,
        shortcuts: Shortcuts | None = None,
        max_logit_bytes: int = 400_000_000,
        max_tokens: int = 65_536,
        sweep_tokens: int | None = None,
        sweep_cost: int | None = None,
        max_base_bytes: int = 400_000_000,
    ) -> None:
        check_tokenizer(tokenizer)
        self.model = model
        self.tokenizer = tokenizer
        self.scoring: Scoring = check_scoring(scoring)
        if chat is not None:
            check_template(tokenizer, chat)
        self.chat = chat
        self._stack = proved_stack(model)
        if shortcuts is not None:
            shortcuts.check_model(model)
        self.shortcuts = shortcuts
        self.num_layers: int = self._stack.num_layers
        config = model.config.get_text_config()
        self._max_positions: int | None = getattr(config, "max_position_embeddings", None)
        self._max_scored = max(1, max_logit_bytes // (4 * config.vocab_size))
        self._max_tokens = max_tokens
        aim, cost = sweep_size(model.device, max_tokens)
        self._aim, self._cost = sweep_tokens or aim, sweep_cost or cost
        self._max_base_bytes = max_base_bytes
        self._encoded: dict[Example, EncodedExample] = {}
        self._bases: OrderedDict[Example, Answered] = OrderedDict()
        self._base_bytes = 0

    @property
    def limits(self) -> dict[str, int]:
        """What decides which plans share a sweep, and so the last bits of outcomes; values that JSON knows."""
        return {
            "scored_places": self._max_scored,
            "tokens": self._max_tokens,
            "sweep_tokens": self._aim,
            "sweep_cost": self._cost,
        }

    def encode(self, example: Example) -> EncodedExample:
        """Return the token rows of an example, as they are scored.

        Raises:
            TaskError: It cannot be encoded, or is longer than the model supports.
        """
        known = self._encoded.get(example)
        if known is None:
            with located(example):
                known = self._encode(example)
            self._encoded[example] = known
        return known

    def check(self, examples: Iterable[Example]) -> None:
        """Encode examples and keep nothing of them, so that those that cannot be encoded are found before any work.

        Raises:
            TaskError: One cannot be encoded, or is longer than the model supports.
        """
        for example in examples:
            with located(example):
                self._encode(example)

    def _encode(self, example: Example) -> EncodedExample:
        encoded = encode_example(self.tokenizer, example, self.scoring, self.chat)
        if self._max_positions is not None and encoded.longest > self._max_positions:
            raise TaskError(
                f"prompt {example.prompt[:40]!r} with its answer is {encoded.longest} tokens long; "
                f"the model has positions for {self._max_positions}: leave it out or shorten it"
            )
        return encoded

    def encode_prompts(self, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the prompts alone, as a policy sees them: the tokens that begin every scored row.

        Args:
            examples: The examples.

        Returns:
            Token ids and attention mask on the model's device, padded on the left. Shape
            (examples, longest), int64.
        """
        return pad_left((self.encode(item).prompt_ids for item in examples), self.model.device)

    def prompt_batches(
        self, examples: Sequence[Example], batch_size: int
    ) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
        """Yield prompts in batches of similar length: their indices, token ids and attention mask, as they are encoded.

        Args:
            examples: The examples.
            batch_size: Prompts of a batch.
        """
        lengths = [len(self.encode(item).prompt_ids) for item in examples]
        for rows in batches_of(lengths, batch_size):
            yield rows, *self.encode_prompts([examples[row] for row in rows])

    def base(self, examples: Sequence[Example]) -> Outcomes:
        """Return the outcomes of the identity plan, one for each example. See `outcomes`."""
        count = len(examples)
        plans = np.tile(identity_plan(self.num_layers), (count, 1))
        return self.outcomes(examples, plans, np.arange(count))

    def forget(self) -> None:
        """Clear the cached outcomes of the identity plan, so that the next call depends on nothing before it."""
        self._bases.clear()
        self._base_bytes = 0

    def outcomes(
        self,
        examples: Sequence[Example],
        plans: Any,
        example: npt.NDArray[np.integer[Any]],
        *,
        states: PromptStates | None = None,
    ) -> Outcomes:
        """Score N pairs of example and plan.

        The identity plan runs once for each example whose outcome is not cached.

        Args:
            examples: The examples, all of one kind.
            plans: One plan for each pair. Shape (N, layers), uint8.
            example: Index into `examples` for each pair. Shape (N,), whole numbers.
            states: Collects the states of these examples' prompts; call `forget` first, since cached examples are not
                swept again.

        Returns:
            The outcomes, in the order of the pairs.

        Raises:
            PlanError: The plans have a wrong shape or wrong actions.
            TaskError: An example cannot be encoded.
            WrapError: The model is wrapped.
        """
        rows = check_plans(plans, self.num_layers, num_rows=len(example))
        builder = OutcomeBuilder(len(rows))
        works = self._works(examples, rows, np.asarray(example, dtype=np.int64), builder)
        device = self.model.device
        last: int | None = None
        skips = skips_of(self.shortcuts, self.num_layers)
        with Sweeper(self.model, self._stack, skips) as sweeper:
            for group in pack(
                works,
                max_scored=self._max_scored,
                max_tokens=self._max_tokens,
                aim=self._aim,
                sweep_cost=self._cost,
            ):
                next_tokens = examples[group[0].example].kind != "choices"
                answers, naive, executed = run_sweep(
                    sweeper, group, device, next_tokens=next_tokens, states=states
                )
                builder.naive_visits += naive
                builder.executed_visits += executed
                for work, answered in zip(group, answers, strict=True):
                    # Only an example that was split occurs more than once, and then consecutively.
                    if last is not None and last != work.example:
                        builder.bases.pop(last, None)
                    last = work.example
                    item = examples[last]
                    if work.rows[0] < 0:
                        base = builder.bases[last] = _first(answered)
                        self._keep(item, base)
                        builder.write(item, last, builder.waiting.pop(last), base)
                    builder.write(item, last, work.rows, answered)
        return builder.outcomes()

    def rewards(
        self,
        examples: Sequence[Example],
        plans: Any,
        example: npt.NDArray[np.integer[Any]],
        objective: Objective,
    ) -> tuple[npt.NDArray[np.float64], int, int]:
        """Score pairs as `outcomes` does, for one objective.

        Args:
            examples: The examples, all of one kind.
            plans: One plan for each pair. Shape (N, layers), uint8.
            example: Index into `examples` for each pair. Shape (N,), whole numbers.
            objective: The objective whose rewards are returned.

        Returns:
            The rewards, all finite, shape (N,); naive visits; executed visits.

        Raises:
            SearchError: A reward is not finite.
        """
        outcomes = self.outcomes(examples, plans, example)
        rewards = outcomes.of(objective)
        bad = np.flatnonzero(~np.isfinite(rewards))
        if len(bad):
            raise SearchError(
                f"plan {plan_text(plans[bad[0]])} gives prompt {examples[example[bad[0]]].prompt[:40]!r} the reward "
                f"{rewards[bad[0]]}; the model's logits overflow there: load it in another dtype, or protect the "
                "layers that overflow"
            )
        return rewards, outcomes.naive_visits, outcomes.executed_visits

    def _works(
        self,
        examples: Sequence[Example],
        plans: Plans,
        example: npt.NDArray[np.int64],
        builder: "OutcomeBuilder",
    ) -> Iterator[Work]:
        identity = identity_plan(self.num_layers)
        is_identity = (plans == identity).all(axis=1)
        numbers = np.unique(example).tolist()
        # Equal lengths are adjacent, so that there is little padding; equal examples are in a fixed order.
        for number in sorted(
            numbers, key=lambda index: (self.encode(examples[index]).longest, index)
        ):
            item = examples[number]
            rows = np.flatnonzero((example == number) & ~is_identity)
            same = np.flatnonzero((example == number) & is_identity)
            base = self._bases.get(item)
            asked = plans[rows]
            if base is None:
                builder.waiting[number] = same
                rows = np.concatenate(([-1], rows))
                asked = np.concatenate((identity[None], asked))
            else:
                builder.bases[number] = base
                builder.write(item, number, same, base)
            if len(rows):
                yield Work(number, self.encode(item), asked, rows)
            else:
                del builder.bases[number]

    def _keep(self, example: Example, base: Answered) -> None:
        self._bases[example] = base
        self._base_bytes += _num_bytes(base)
        while self._base_bytes > self._max_base_bytes and len(self._bases) > 1:
            _, oldest = self._bases.popitem(last=False)
            self._base_bytes -= _num_bytes(oldest)


def _first(given: Answered) -> Answered:
    probs = given.next_log_probs
    return Answered(
        scores=given.scores[:1],
        greedy=given.greedy[:1],
        next_token=given.next_token[:1],
        # A copy, because a view would keep every plan's row alive.
        next_log_probs=None if probs is None else probs[:1].clone(),
    )


def _num_bytes(given: Answered) -> int:
    return 0 if given.next_log_probs is None else given.next_log_probs.nbytes
