"""Lossless decoding: early tokens are drafts, and the call that settles them verifies them.

The tokens of one row are drafted by tokens that leave early, until one goes on. In that call the owed layers of all of
them run, the model's own norm and head read every place, and drafts are kept up to the first that the base model would
not have chosen; what follows is rolled back. So the text is the base model's own, up to how rounding differs between a
call with several tokens and calls with one. Where the newest tokens have stood in the text before, what followed them
there is drafted instead, which costs no layer of its own.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from dynadepth.caching.depth_cache import DepthCache
from dynadepth.drafting.pace import Drafts, Pace
from dynadepth.drafting.prompt_lookup import PromptLookup
from dynadepth.errors import UnsupportedModelError
from dynadepth.execution.few_tokens import few_token_products
from dynadepth.models.structure import position_arguments, takes

__all__ = ["LosslessDecoding"]

_CACHE_NAMES = ("cache", "past_key_values")
_KNOWN = frozenset({*_CACHE_NAMES, "attention_mask", "use_cache", "logits_to_keep", "position_ids"})


@dataclass(slots=True)
class _Draft:
    """A token that left early, and the distribution that it was drawn from (None: the likeliest was taken)."""

    token: torch.Tensor
    probs: torch.Tensor | None


class LosslessDecoding:
    """The decoding loop that `generate` of a lossless model runs, as its `custom_generate`.

    Args:
        pace: Decides whether drafts are worth their time.
        most_drafts: Tokens that are verified in one call, at most.
        streamer: Is given verified tokens only; None: nobody.

    Source:
        Leviathan et al., speculative decoding (arXiv 2211.17192), with the early layers of the model itself as the
        draft, as LayerSkip (arXiv 2404.16710) and Kangaroo (arXiv 2404.18911) have it. Deviation: the layers that
        drafts have run are not run again, and a router says where drafts end.
    """

    def __init__(self, pace: Pace, most_drafts: int, streamer: Any = None) -> None:
        self._pace, self._most, self._streamer = pace, most_drafts, streamer

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """Decode one row.

        Args:
            model: The wrapped model.
            input_ids: The prompt. Shape (1, tokens), int64.
            logits_processor: As `generate` made it.
            stopping_criteria: As `generate` made it.
            generation_config: As `generate` made it.
            **model_kwargs: What the model's forward is given besides.

        Returns:
            What `generate` returns.

        Raises:
            UnsupportedModelError: There are several rows, no cache, or inputs that are no text.
        """
        self._check(input_ids, generation_config, model_kwargs)
        row = _Row(
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            model_kwargs,
            self._most,
        )
        with torch.no_grad():
            row.prefill()
            self._stream(row)
            while not row.finished:
                self._cycle(row)
                self._stream(row)
        if self._streamer is not None:
            self._streamer.end()
        return row.result()

    def _cycle(self, row: "_Row") -> None:
        """Draft and verify once."""
        begun = time.perf_counter()
        looked_up = row.looked_up()
        kind = self._pace.choose(lookup=bool(looked_up))
        if kind is Drafts.LOOKUP:
            drafts = looked_up
            logits = row.run_all(drafts)
        else:
            drafts, logits = self._draft(row, may_leave=kind is Drafts.EXITS)
        kept, tokens = row.verify(drafts, logits)
        self._pace.cycle(
            kind, drafts=len(drafts), kept=kept, tokens=tokens, seconds=time.perf_counter() - begun
        )

    def _draft(self, row: "_Row", *, may_leave: bool) -> tuple[list[_Draft], torch.Tensor]:
        """Return drafts by tokens that leave, and the logits of all places up to the token that went on."""
        drafts: list[_Draft] = []
        while True:
            may = may_leave and len(drafts) < self._most and row.room(len(drafts))
            logits, left = row.step(drafts, may_leave=may)
            if not left:
                return drafts, logits
            drafts.append(row.draw(drafts, logits[:, -1]))
            if row.would_stop(drafts):
                # Nothing is drafted behind an end.
                return drafts, row.step(drafts, may_leave=False)[0]

    def _stream(self, row: "_Row") -> None:
        if self._streamer is not None:
            for token in row.unseen():
                self._streamer.put(token.cpu())

    def _check(self, ids: torch.Tensor, config: Any, model_kwargs: dict[str, Any]) -> None:
        wrong = [
            name for name, value in model_kwargs.items() if value is not None and name not in _KNOWN
        ]
        several = len(ids) > 1 or getattr(config, "num_beams", 1) not in (None, 1)
        if several or wrong or model_kwargs.get("use_cache") is False:
            what = (
                f"{len(ids)} rows or beams were given"
                if several
                else f"{wrong[0]} was given"
                if wrong
                else "use_cache=False was given"
            )
            raise UnsupportedModelError(
                f"fidelity 1 verifies drafts of one row of text on its cache, and {what}; give one prompt at a time, "
                "or a fidelity below 1"
            )
        asked = [
            name
            for name in ("output_hidden_states", "output_attentions")
            if getattr(config, name, False)
        ]
        if asked:
            raise UnsupportedModelError(
                f"{asked[0]} was asked for, and drafts have no states of their own; leave it out, or set "
                "model.dynadepth.fidelity below 1"
            )


class _Row:
    """The text of one row, its cache, and what `generate` wants to know of it."""

    def __init__(
        self,
        model: Any,
        ids: torch.Tensor,
        processors: Any,
        criteria: Any,
        config: Any,
        model_kwargs: dict[str, Any],
        most_drafts: int,
    ) -> None:
        self._model, self._processors, self._criteria, self._config = (
            model,
            processors,
            criteria,
            config,
        )
        self._ids, self._begin = ids, ids.shape[1]
        self._name = next(name for name in _CACHE_NAMES if name in model_kwargs)
        self._cache: Any = model_kwargs[self._name]
        mask = model_kwargs.get("attention_mask")
        self._mask = torch.ones_like(ids) if mask is None else mask
        self._seen = ids.shape[1]
        self._scores: list[torch.Tensor] = []
        self._logits: list[torch.Tensor] = []
        self._known = 0
        self._lookup = PromptLookup(most_drafts)
        self.finished = False

    def prefill(self) -> None:
        """Read the prompt and choose the first new token."""
        held = int(self._cache.get_seq_length())
        output = self._forward(self._ids[:, held:], self._mask, keep=1)
        self._cache = getattr(output, self._name)
        self._cache.activate_past_recording()
        self._accept(output.logits[:, -1])

    def looked_up(self) -> list[_Draft]:
        """Return what prompt lookup drafts, as far as a token of the base model can still follow."""
        self._lookup.extend(self._ids[0, self._known :].tolist())
        self._known = self._ids.shape[1]
        drafts = self._lookup.drafts()
        while drafts and not self.room(len(drafts) - 1):
            drafts.pop()
        return [_Draft(self._ids.new_tensor([[token]]), None) for token in drafts]

    def run_all(self, drafts: list[_Draft]) -> torch.Tensor:
        """Run the newest token and drafts through every layer at once; return the logits of these places."""
        ids = torch.cat([self._ids[:, -1:], *(draft.token for draft in drafts)], dim=1)
        return self._verifiable(ids, len(drafts), may_leave=False)

    def step(self, drafts: list[_Draft], *, may_leave: bool) -> tuple[torch.Tensor, bool]:
        """Run the newest token; return the logits of all places that are known now, and whether it left."""
        newest = drafts[-1].token if drafts else self._ids[:, -1:]
        cache: DepthCache = self._cache
        waiting = len(cache.owed)
        logits = self._verifiable(newest, len(drafts), may_leave=may_leave)
        # Some families put the tokens that settle into rows, by the number of tokens that they were given.
        return logits.flatten(0, 1)[None], len(cache.owed) > waiting

    def _verifiable(self, ids: torch.Tensor, drafted: int, *, may_leave: bool) -> torch.Tensor:
        """Return the logits of a forward that gives out all tokens that settle in it."""
        owed = self._cache.owed
        owed.hold, owed.verify = not may_leave, True
        try:
            with few_token_products(self._model.get_output_embeddings(), drafted + 1):
                logits: torch.Tensor = self._forward(ids, self._mask_with(drafted), keep=0).logits
        finally:
            owed.hold = owed.verify = False
        return logits

    def draw(self, drafts: list[_Draft], logits: torch.Tensor) -> _Draft:
        """Choose the token that an early reading says."""
        scores = self._processors(self._text(drafts), logits.float().to(self._ids.device))
        if not self._config.do_sample:
            return _Draft(scores.argmax(dim=-1)[:, None], None)
        probs = scores.softmax(dim=-1)
        return _Draft(torch.multinomial(probs, 1), probs)

    def verify(self, drafts: list[_Draft], logits: torch.Tensor) -> tuple[int, int]:
        """Accept drafts up to the first that the base model would not choose, and one token of its own.

        Returns:
            Drafts that were kept, and tokens that were accepted.
        """
        kept, length = 0, self._ids.shape[1]
        for place, draft in enumerate(drafts):
            self._accept(logits[:, place], draft)
            same = torch.equal(self._ids[:, -1:], draft.token)
            kept += same
            if self.finished or not same:
                break
        else:
            self._accept(logits[:, len(drafts)])
        # The cache holds all but the newest token.
        surplus = length + len(drafts) - (self._ids.shape[1] - 1)
        if surplus:
            self._cache.crop(-surplus)
        return kept, self._ids.shape[1] - length

    def room(self, drafted: int) -> bool:
        """Say whether another draft could still be followed by a token of the base model."""
        most = self._criteria.max_length
        return most is None or self._ids.shape[1] + drafted + 1 < most

    def would_stop(self, drafts: list[_Draft]) -> bool:
        """Say whether the text ends with the newest draft."""
        return bool(self._criteria(self._text(drafts), None).all())

    def unseen(self) -> list[torch.Tensor]:
        """Return the tokens that were accepted since this was last asked."""
        new = self._ids[0, self._seen :]
        self._seen = self._ids.shape[1]
        return list(new[:, None].unbind())

    def result(self) -> Any:
        """Return what `generate` is to return."""
        config = self._config
        if not config.return_dict_in_generate:
            return self._ids
        return GenerateDecoderOnlyOutput(
            sequences=self._ids,
            scores=tuple(self._scores) if config.output_scores else None,
            logits=tuple(self._logits) if config.output_logits else None,
            **{self._name: self._cache},
        )

    def _accept(self, logits: torch.Tensor, draft: _Draft | None = None) -> None:
        """Append the base model's choice for a place, which with sampling is the draft as often as it may be."""
        # Copied, or one place would keep the logits of all.
        logits = logits.to(self._ids.device, torch.float32, copy=True)
        scores = self._processors(self._ids, logits)
        if self._config.output_scores:
            self._scores.append(scores)
        if self._config.output_logits:
            self._logits.append(logits)
        if not self._config.do_sample:
            token = scores.argmax(dim=-1)[:, None]
        else:
            token = _sampled(scores.softmax(dim=-1), draft)
        self._ids = torch.cat([self._ids, token], dim=1)
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        self.finished = bool(self._criteria(self._ids, None).all())

    def _text(self, drafts: list[_Draft]) -> torch.Tensor:
        return torch.cat([self._ids, *(draft.token for draft in drafts)], dim=1)

    def _mask_with(self, drafted: int) -> torch.Tensor:
        return torch.cat([self._mask, self._mask.new_ones((1, drafted))], dim=1)

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, *, keep: int) -> Any:
        positions = position_arguments(self._model, mask)
        given: dict[str, Any] = {name: each[:, -ids.shape[1] :] for name, each in positions.items()}
        if keep and takes(self._model, "logits_to_keep"):
            given["logits_to_keep"] = keep
        call: Callable[..., Any] = self._model.__call__
        return call(
            input_ids=ids,
            attention_mask=mask,
            use_cache=True,
            return_dict=True,
            **{self._name: self._cache},
            **given,
        )


def _sampled(probs: torch.Tensor, draft: _Draft | None) -> torch.Tensor:
    """Draw a token from a distribution, which is a draft as often as both distributions allow. Shape (1, 1)."""
    if draft is None or draft.probs is None:
        return torch.multinomial(probs, 1)
    drawn = float(draft.probs.gather(1, draft.token))
    wanted = float(probs.gather(1, draft.token))
    if float(torch.rand(())) * drawn <= wanted:
        return draft.token
    rest = (probs - draft.probs).clamp(min=0)
    # Equal distributions leave nothing but rounding.
    return torch.multinomial(rest if float(rest.sum()) > 0 else probs, 1)
