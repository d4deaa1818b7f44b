"""Tasks as turns of a chat, in the form that a base model was tuned on.

A check ensures that a tokenizer's chat template fits a task. The prompts themselves are not changed: the template is
applied when they become tokens, so that prompts are stored and compared as the user wrote them.
"""

from dataclasses import replace
from typing import Any

from dynadepth.errors import TaskError
from dynadepth.files import sha256_text
from dynadepth.models.encoding import chat_text
from dynadepth_search.data.encoding import prompt_text
from dynadepth_search.data.tasks import ChatForm, Task, located

__all__ = ["as_chat", "check_template", "template_hash"]


def as_chat(task: Task, tokenizer: Any, *, system: str | None = None) -> Task:
    """Return a task whose prompts are the user's turn of a chat, up to the point where the model answers.

    Args:
        task: The task.
        tokenizer: Tokenizer of the base model.
        system: Text of the system's turn; None: that of the template.

    Returns:
        The task in chat form, with the same examples.

    Raises:
        TaskError: The tokenizer has no chat template, or it cannot be applied to a prompt.
    """
    for example in task.examples:
        with located(example):
            chat_text(tokenizer, prompt_text(example, task.scoring), system=system)
    return replace(task, chat=ChatForm(template=template_hash(tokenizer), system=system))


def check_template(tokenizer: Any, chat: ChatForm) -> None:
    """Refuse a tokenizer whose chat template is not the one of a task in chat form.

    Raises:
        TaskError: The tokenizer has another chat template or none.
    """
    given = template_hash(tokenizer)
    if given != chat.template:
        raise TaskError(
            f"the tokenizer's chat template (sha256 {given[:12]}) is not the one that was applied to the prompts "
            f"({chat.template[:12]}); give the tokenizer that they were scored with, or score them again"
        )


def template_hash(tokenizer: Any) -> str:
    """Return the hash of a tokenizer's chat template, in hexadecimal; that of an empty text if there is none."""
    template = getattr(tokenizer, "chat_template", None) or ""
    # A tokenizer may have several templates, by name.
    return sha256_text(template if isinstance(template, str) else repr(sorted(template.items())))
