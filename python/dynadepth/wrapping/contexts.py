"""ContextMethods: what the caller can set for the forwards inside a `with model.dynadepth....:`.

Checks the settings and keeps them in a context, where the controller finds them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dynadepth.checkpoints.trained_exits import TrainedExits
from dynadepth.errors import ConfigError, PlanError
from dynadepth.execution.callbacks import VisitCallback
from dynadepth.execution.context_stack import Context, open_context
from dynadepth.plans import Plans, check_plans
from dynadepth.wrapping.budgets import Budgets
from dynadepth.wrapping.constraints import Limits
from dynadepth.wrapping.stats import Stats

__all__ = ["ContextMethods"]


class ContextMethods:
    """The `with` blocks of a controller; a base class, so that contexts belong to the controller itself.

    Args:
        limits: The limits that given plans must respect.
        stats: Where the memory of a generation's cache is recorded.
        budgets: Makes the policy of each budget.
    """

    def __init__(self, limits: Limits, stats: Stats, budgets: Budgets) -> None:
        self.num_layers = limits.num_layers
        self._limits = limits
        self._stats = stats
        self._budgets = budgets
        self.last_layers_run: npt.NDArray[np.int64] | None = None

    @contextmanager
    def plans(self, plans: Any) -> Iterator[None]:
        """Run fixed plans instead of the policy's, for the forwards and generations inside the block.

        The block applies to this thread: a thread started inside it runs the policy's plans.

        Args:
            plans: One plan for all rows, or one for each row. Shape (num_layers,) or (rows, num_layers), uint8; or
                texts that `parse_plan` reads: one for all rows, or a list with one for each row. In a batch of k times
                as many rows (beams, return sequences) each plan is used for k consecutive rows.

        Raises:
            PlanError: A plan does not fit this model, changes a protected layer, or exceeds `max_depth`; or, at the
                forward, the number of rows of the batch is not a multiple of the number of plans.

        Example:
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> from dynadepth import wrap_model
            >>> shape = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_attention_heads=2)
            >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **shape))
            >>> model = wrap_model(model, plan="0-3")
            >>> with model.dynadepth.plans(["0-1,3", "0-3,3"]):
            ...     _ = model(torch.tensor([[5, 6, 7], [8, 9, 5]]))
            >>> model.dynadepth.last_depths
            array([0.75, 1.25])
        """
        fixed = check_plans(plans, self.num_layers)
        self.check_limits(fixed)
        with open_context(Context(self, plans=fixed)):
            yield

    @contextmanager
    def at_budget(self, budget: float) -> Iterator[None]:
        """Use another budget for the prompts that are planned inside the block.

        The block applies to this thread, so each request of a server can have its own budget. Caches of prompts that
        are already planned keep their plans.

        Args:
            budget: Mean depth over prompts, each counting once, as a fraction of the full depth.

        Raises:
            BudgetError: The budget is not a number or outside the calibrated range.
            ConfigError: The model was not wrapped with a budget, or it is one of exits, which hold for all threads.
        """
        if isinstance(self._budgets.trained, TrainedExits):
            raise ConfigError(
                "at_budget plans prompts, and exits plan none; set model.dynadepth.budget, which holds for all threads"
            )
        with open_context(Context(self, policy=self._budgets.policy(budget))):
            yield

    @contextmanager
    def watch(
        self, before: VisitCallback | None = None, *, after: VisitCallback | None = None
    ) -> Iterator[None]:
        """Call a function at every visit of a decoder layer, for the forwards and generations inside the block.

        The block applies to this thread. An exception raised by a callback ends the forward; the model can be used
        again, but the cache of that forward cannot. A callback must not run the model itself. Outside such a block,
        callbacks cost nothing.

        Args:
            before: Called with a `VisitEvent` before each visit.
            after: Called with a `VisitEvent` after each visit.

        Raises:
            ConfigError: No callback is given, or one is not callable.

        Example:
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> from dynadepth import wrap_model
            >>> shape = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_attention_heads=2)
            >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **shape))
            >>> model = wrap_model(model, plan="0,2,2")
            >>> with model.dynadepth.watch(print):
            ...     _ = model(torch.tensor([[5, 6, 7], [8, 9, 5]]))
            VisitEvent(layer_idx=0, visit=0, rows=(0, 1), num_tokens=3)
            VisitEvent(layer_idx=2, visit=0, rows=(0, 1), num_tokens=3)
            VisitEvent(layer_idx=2, visit=1, rows=(0, 1), num_tokens=3)
        """
        given: list[Any] = [each for each in (before, after) if each is not None]
        wrong = [each for each in given if not callable(each)]
        if not given or wrong:
            what = repr(wrong[0]) if wrong else "nothing"
            raise ConfigError(
                f"watch was given {what} to call; expected a function that takes one VisitEvent"
            )
        with open_context(Context(self, before=before, after=after)):
            yield

    @contextmanager
    def prompt(self, lengths: Sequence[int] | torch.Tensor) -> Iterator[None]:
        """Set how many tokens of each row form the prompt, for plain forwards of prompt and continuation together.

        Args:
            lengths: Real tokens of the prompt at the start of each row, padding not counted. Shape (rows,), integer.

        Raises:
            PlanError: A length is below 1.
        """
        tensor = torch.as_tensor(lengths, dtype=torch.long).cpu()
        if tensor.dim() != 1 or tensor.numel() == 0 or int(tensor.min()) < 1:
            raise PlanError(
                f"prompt lengths are {tensor.tolist()}; expected one number of at least 1 for each row"
            )
        with open_context(Context(self, prompt_lengths=tensor)):
            yield

    @contextmanager
    def generation(
        self, prompt_width: int | None, *, ends: frozenset[int] = frozenset()
    ) -> Iterator[None]:
        """Mark the forwards inside as one `generate` call, so that drafts and later tokens do not count as prompt.

        Args:
            prompt_width: Number of columns of the batch passed to `generate`, padding included; None if unknown.
            ends: The tokens after which a row pads.
        """
        context = Context(self, prompt_width=prompt_width, in_generate=True, ends=ends)
        with open_context(context):
            try:
                yield
            finally:
                if context.cache is not None:
                    self._stats.measure(context.cache)
                    owed = context.cache.owed
                    self.last_layers_run = None if owed is None else owed.layers_run()

    def check_limits(self, plans: Plans) -> None:
        """Refuse plans that break the limits that the model was wrapped with.

        Raises:
            PlanError: A protected layer does not run once, or a plan has more visits than `max_depth` allows.
        """
        self._limits.check(plans)
