"""Greedy text of a frozen model: what it says after prompts, wrapped or not, each prompt under its own plan."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dynadepth.models.encoding import answer_length, end_tokens
from dynadepth.plans import check_plans, identity_plan
from dynadepth_search.data.solutions import is_right
from dynadepth_search.data.tasks import Example
from dynadepth_search.scoring.batching import pad_left
from dynadepth_search.scoring.own_text import Text
from dynadepth_search.scoring.runtime_checks import wrapped
from dynadepth_search.scoring.scorer import Scorer

__all__ = ["answers_under_plans", "continue_prompts", "judge_answers"]

_Ids = npt.NDArray[np.int64]


def answers_under_plans(
    scorer: Scorer,
    examples: Sequence[Example],
    plans: Any,
    example: npt.NDArray[np.integer[Any]],
    *,
    new_tokens: int,
    batch_size: int = 16,
) -> list[str]:
    """Let a model answer N pairs of example and plan greedily, wrapped as a user wraps it.

    Pairs of one plan share batches, so that a layer runs for all rows of a batch or for none; plans of few pairs share
    batches with others, since a step costs about the same for one row as for many. Equal pairs are answered once. What
    shares a batch changes an answer only where rounding turns a token.

    Args:
        scorer: Has the unwrapped base model, its tokenizer, the prompts' form and the shortcuts; the model is unwrapped
            again afterwards.
        examples: The examples.
        plans: One plan for each pair. Shape (N, layers), uint8.
        example: Index into `examples` for each pair. Shape (N,), whole numbers.
        new_tokens: The most tokens of an answer, 1 or more.
        batch_size: Rows of a batch.

    Returns:
        The texts, without special tokens, in the order of the pairs. The answer to a prompt that is no turn of a chat
        ends at the first blank line, after which a base model goes on with something else.

    Raises:
        PlanError: The plans have a wrong shape or wrong actions.
        TaskError: A prompt cannot be encoded.
        WrapError: The model is wrapped.
    """
    rows = check_plans(plans, scorer.num_layers, num_rows=len(example))
    asked = list(zip(map(bytes, rows), example.tolist(), strict=True))
    prompts = {index: scorer.encode(examples[index]).prompt_ids for _, index in asked}
    pairs = sorted(set(asked), key=lambda pair: (pair[0], len(prompts[pair[1]]), pair[1]))
    answers: dict[tuple[bytes, int], str] = {}
    how = {"plan": identity_plan(scorer.num_layers), "shortcuts": scorer.shortcuts or False}
    with wrapped(scorer.model, **how) as model:
        for batch in _batches_by_plan(pairs, batch_size):
            together = np.array([list(plan) for plan, _ in batch], dtype=np.uint8)
            with model.dynadepth.plans(together):
                texts = continue_prompts(
                    model, [prompts[index] for _, index in batch], new_tokens=new_tokens
                )
            for pair, text in zip(batch, texts, strict=True):
                said = scorer.tokenizer.decode(text.ids[text.prompt :], skip_special_tokens=True)
                answers[pair] = said if scorer.chat else said.lstrip().partition("\n\n")[0]
    return [answers[pair] for pair in asked]


def _batches_by_plan(
    pairs: Sequence[tuple[bytes, int]], batch_size: int
) -> Iterator[list[tuple[bytes, int]]]:
    """Yield pairs of plan and example in batches of one plan, and what is left of all plans together."""
    left: list[tuple[bytes, int]] = []
    for _, group in groupby(pairs, key=itemgetter(0)):
        same = list(group)
        whole = len(same) - len(same) % batch_size
        yield from (same[first : first + batch_size] for first in range(0, whole, batch_size))
        left += same[whole:]
    yield from (left[first : first + batch_size] for first in range(0, len(left), batch_size))


def judge_answers(
    scorer: Scorer,
    examples: Sequence[Example],
    plans: Any,
    example: npt.NDArray[np.integer[Any]],
    *,
    new_tokens: int,
) -> tuple[list[str], list[bool]]:
    """Let a model answer N pairs of example and plan greedily, and compare the answers with the examples' solutions.

    Args:
        scorer: As for `answers_under_plans`.
        examples: The examples; all have solutions.
        plans: One plan for each pair. Shape (N, layers), uint8.
        example: Index into `examples` for each pair. Shape (N,), whole numbers.
        new_tokens: The most tokens of an answer, 1 or more.

    Returns:
        The answers, and whether each is right. Equal answers to equal solutions are compared once, and so judged alike.

    Raises:
        PlanError: The plans have a wrong shape or wrong actions.
        SearchError: Called beside the main thread.
        TaskError: A prompt cannot be encoded.
        WrapError: The model is wrapped.
    """
    answers = answers_under_plans(scorer, examples, plans, example, new_tokens=new_tokens)
    solutions = [examples[index].solution or "" for index in example.tolist()]
    pairs = list(zip(answers, solutions, strict=True))
    known = {pair: is_right(*pair) for pair in dict.fromkeys(pairs)}
    return answers, [known[pair] for pair in pairs]


def continue_prompts(model: Any, prompts: Sequence[_Ids], *, new_tokens: int) -> list[Text]:
    """Let a model continue prompts greedily, in one batch, each up to the end of its answer.

    Where the model has no positions for so many tokens, the continuations are shorter.

    Args:
        model: The model, wrapped or not.
        prompts: Token ids of each prompt.
        new_tokens: The most tokens of a continuation; 0: none.

    Returns:
        The texts, in the order of the prompts; the token that ends an answer is the last one.
    """
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None:
        new_tokens = min(new_tokens, most - max(map(len, prompts)))
    if new_tokens < 1:
        return [Text(prompt, len(prompt)) for prompt in prompts]
    ends = end_tokens(model)
    ids, mask = pad_left(prompts, model.device)
    with torch.inference_mode(), _plain_generation(model):
        grown = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=min(ends, default=0),
        )
    answers = grown[:, ids.shape[1] :].cpu().numpy()
    return [
        Text(np.concatenate([prompt, answer[: answer_length(answer.tolist(), ends)]]), len(prompt))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


@contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """Set aside what a model's own generation config says of sampling, penalties, lengths and outputs."""
    own = model.generation_config
    model.generation_config = type(own)(
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id
    )
    try:
        yield
    finally:
        model.generation_config = own
