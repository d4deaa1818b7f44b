"""One prompt answered in several ways, to be read side by side."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dynadepth.plans import Plans, plan_depth, plan_text
from dynadepth_search.progress import Progress
from dynadepth_search.scoring.runtime_checks import wrapped
from dynadepth_search.search.static_files import StaticPlans

__all__ = ["answer_prompt", "plan_of_depth", "show_answers", "talkative_prompt"]

_NEW_TOKENS, _TURNS = 40, 2


def plan_of_depth(found: StaticPlans, depth: float) -> Plans:
    """Return the best measured plan of the depth that is nearest to one; of two such depths, the lower.

    Args:
        found: What a search of static plans found.
        depth: The depth asked for.

    Returns:
        The plan. Shape (num_layers,), uint8.
    """
    depths = plan_depth(found.pool)
    # Less than a visit of any model, so that it decides between equals alone.
    away = np.abs(depths - depth) + 1e-6 * depths
    near = away <= away.min() + 1e-9
    plan: Plans = found.pool[int(np.argmax(np.where(near, found.pool_values, -np.inf)))]
    return plan


def talkative_prompt(model: Any, tokenizer: Any, prompts: Sequence[str]) -> str:
    """Return the first prompt that the base model answers at full length; else the one that it says most to.

    Only the base model is asked, so that the choice favours nothing that is compared.

    Args:
        model: The unwrapped base model.
        tokenizer: Tokenizer of the base model.
        prompts: The prompts, one or more.
    """
    longest = (-1, "")
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=_NEW_TOKENS, do_sample=False)
        count = int(tokens.shape[1] - inputs["input_ids"].shape[1])
        if count >= _NEW_TOKENS:
            return prompt
        longest = max(longest, (count, prompt), key=lambda found: found[0])
    return longest[1]


def answer_prompt(
    model: Any,
    tokenizer: Any,
    prompt: str,
    ways: Mapping[str, Mapping[str, Any]],
    *,
    progress: Progress,
) -> dict[str, Any]:
    """Continue a prompt greedily with the model wrapped in several ways, in turns.

    Args:
        model: The unwrapped base model; it is unwrapped again afterwards.
        tokenizer: Tokenizer of the base model.
        prompt: The prompt.
        ways: Arguments of `wrap_model`, by what they are called.
        progress: Called with the stage, the number of finished answers and of all.

    Returns:
        `prompt` and `answers`: what each was answered `by`, its `text`, `plan`, and `depth`, which with exits are the
        mean passes; and `milliseconds` of a new token, of the faster of two turns. JSON data.
    """
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    answers: dict[str, dict[str, Any]] = {}
    steps = list(ways) * _TURNS
    for step, name in enumerate(steps):
        progress("generate", step, len(steps))
        with wrapped(model, **ways[name]), torch.inference_mode():
            begun = time.perf_counter()
            tokens = model.generate(**inputs, max_new_tokens=_NEW_TOKENS, do_sample=False)
            seconds = time.perf_counter() - begun
            controller = model.dynadepth
            plan, passes = controller.last_plans[0], controller.exit_totals.passes
        new = tokens[0, inputs["input_ids"].shape[1] :]
        took = 1e3 * seconds / max(1, len(new))
        known = answers.get(name)
        answers[name] = {
            "by": name,
            "text": tokenizer.decode(new, skip_special_tokens=True).strip(),
            "plan": plan_text(plan),
            # An answer of one token has no passes.
            "depth": float(plan_depth(plan)) if passes is None else passes,
            "milliseconds": took if known is None else min(took, known["milliseconds"]),
        }
    progress("generate", len(steps), len(steps))
    return {"prompt": prompt, "answers": list(answers.values())}


def show_answers(answered: Mapping[str, Any]) -> str:
    """Write the answers below their prompt, each with the depth and the time that it took.

    Args:
        answered: What `answer_prompt` returned.
    """
    lines = [answered["prompt"]]
    for answer in answered["answers"]:
        title = f"--- {answer['by']}, depth {answer['depth']:.3f}, {answer['milliseconds']:.1f} ms a token"
        lines += ["", title, answer["text"] or "(no text)"]
    return "\n".join(lines)
