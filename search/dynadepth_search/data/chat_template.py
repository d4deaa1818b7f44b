"""Prompts as turns of a chat, in the form that a base model was tuned on.

Owns the use of the tokenizer's chat template. A task in chat form is an ordinary task: whoever scores it need not know.
"""

from dataclasses import replace
from typing import Any

from dynadepth.errors import TaskError
from dynadepth_search.data.encoding import letters, prompt_text
from dynadepth_search.data.tasks import Example, Task

__all__ = ["as_chat"]


def as_chat(task: Task, tokenizer: Any, *, system: str | None = None) -> Task:
    """Return a task whose prompts are the user's turn of a chat, up to where the model answers.

    With letter scoring the options are listed inside the turn and the letters become the choices, scored raw, which is
    the same. The template's own beginning-of-text token is left to the tokenizer, which adds it to every text.

    Args:
        task: The task.
        tokenizer: Of the base model.
        system: What the system's turn says; None leaves it to the template.

    Returns:
        The task in chat form.

    Raises:
        TaskError: The tokenizer has no chat template, or it cannot be applied.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise TaskError(
            "the tokenizer has no chat template; leave the chat form out, or give a model tuned for chat"
        )
    examples = tuple(_turn(example, task, tokenizer, system) for example in task.examples)
    return replace(
        task, examples=examples, scoring="raw" if task.scoring == "letter" else task.scoring
    )


def _turn(example: Example, task: Task, tokenizer: Any, system: str | None) -> Example:
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": prompt_text(example, task.scoring)})
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise whatever they like
        raise TaskError(
            f"the chat template cannot be applied to {example.prompt[:40]!r}: {error}"
        ) from error
    start = tokenizer.bos_token
    if start and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        text = text.removeprefix(start)
    if task.scoring == "letter" and example.choices is not None:
        return replace(example, prompt=text, choices=tuple(letters(len(example.choices))))
    return replace(example, prompt=text)
