"""One prompt answered in several ways, to be read side by side."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from dynadepth.plans import Plans, plan_depth, plan_text
from dynadepth_search.progress import Progress
from dynadepth_search.scoring.runtime_checks import wrapped
from dynadepth_search.search.static_files import StaticPlans

__all__ = ["answer_prompt", "plan_of_depth", "show_answers"]

_NEW_TOKENS = 40


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


def answer_prompt(
    model: Any,
    tokenizer: Any,
    prompt: str,
    ways: Mapping[str, Mapping[str, Any]],
    *,
    progress: Progress,
) -> dict[str, Any]:
    """Continue a prompt greedily with the model wrapped in several ways.

    Args:
        model: The unwrapped base model; it is unwrapped again afterwards.
        tokenizer: Tokenizer of the base model.
        prompt: The prompt.
        ways: Arguments of `wrap_model`, by what they are called.
        progress: Called with the stage, the number of finished answers and of all.

    Returns:
        `prompt` and `answers`: what each was answered `by`, its `text`, `plan` and `depth`. JSON data.
    """
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    answers = []
    for step, (name, how) in enumerate(ways.items()):
        progress("generate", step, len(ways))
        with wrapped(model, **how), torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=_NEW_TOKENS, do_sample=False)
            plan = model.dynadepth.last_plans[0]
        new = tokens[0, inputs["input_ids"].shape[1] :]
        answers.append(
            {
                "by": name,
                "text": tokenizer.decode(new, skip_special_tokens=True).strip(),
                "plan": plan_text(plan),
                "depth": float(plan_depth(plan)),
            }
        )
    progress("generate", len(ways), len(ways))
    return {"prompt": prompt, "answers": answers}


def show_answers(answered: Mapping[str, Any]) -> str:
    """Write the answers below their prompt, each with the depth that it took.

    Args:
        answered: What `answer_prompt` returned.
    """
    lines = [answered["prompt"]]
    for answer in answered["answers"]:
        title = f"--- {answer['by']}, depth {answer['depth']:.3f}"
        lines += ["", title, answer["text"] or "(no text)"]
    return "\n".join(lines)
