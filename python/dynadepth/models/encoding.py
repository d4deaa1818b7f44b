"""From a prompt to tokens: the one way, for generation, search, scoring, training and evaluation alike.

A policy must see in use what it saw in training, to the token. So nobody else applies a chat template or decides on
special tokens. This module knows tokenizers, and nothing of models, tasks or plans.
"""

from typing import Any

from dynadepth.errors import TaskError

__all__ = ["chat_text", "encode_prompt", "encode_text", "lone_surrogate"]


def encode_prompt(
    tokenizer: Any, prompt: str, *, chat: bool, system: str | None = None
) -> list[int]:
    """Return the tokens of a prompt, as the model is given them.

    Args:
        tokenizer: Of the base model.
        prompt: What the user says.
        chat: False: the tokens of `tokenizer(prompt)`, special tokens included. True: those of
            `tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)`, the prompt being the
            user's turn. The template then says which special tokens there are, and the tokenizer adds none.
        system: What the system's turn says; None leaves it to the template. It goes with `chat`.

    Returns:
        One token or more.

    Raises:
        TaskError: The tokenizer has no chat template, the template cannot be applied, or the prompt has no tokens or
            cannot be tokenised.
    """
    if not chat:
        ids = encode_text(tokenizer, prompt)
    else:
        _check_text(prompt)
        ids = _apply(tokenizer, prompt, system, tokenize=True)
    if not ids:
        raise TaskError(f"the prompt {_short(prompt)} has no tokens; give a prompt that has")
    return ids


def chat_text(tokenizer: Any, prompt: str, *, system: str | None = None) -> str:
    """Return what the chat template makes of a prompt, up to where the model answers.

    Its tokens are those of `encode_text(tokenizer, text, special_tokens=False)`.

    Args:
        tokenizer: Of the base model.
        prompt: What the user says.
        system: What the system's turn says; None leaves it to the template.

    Returns:
        The text.

    Raises:
        TaskError: The tokenizer has no chat template, or it cannot be applied.
    """
    _check_text(prompt)
    text: str = _apply(tokenizer, prompt, system, tokenize=False)
    return text


def encode_text(tokenizer: Any, text: str, *, special_tokens: bool = True) -> list[int]:
    """Return the tokens of a text.

    Args:
        tokenizer: Of the base model.
        text: Any.
        special_tokens: Whether the tokenizer adds its own, as it does for a user.

    Returns:
        The tokens; there may be none.

    Raises:
        TaskError: The text cannot be tokenised.
    """
    _check_text(text)
    options = {} if special_tokens else {"add_special_tokens": False}
    try:
        return list(tokenizer(text, **options)["input_ids"])
    except Exception as error:  # tokenizers raise whatever they like
        raise TaskError(
            f"the tokenizer cannot tokenise {_short(text)} ({type(error).__name__}: {error}); give another text"
        ) from error


def lone_surrogate(text: str) -> int | None:
    r"""Return where a text holds half of a UTF-16 pair, which is no character and has no UTF-8 form.

    JSON can write one, and so can a command line that is not UTF-8.

    Args:
        text: Any.

    Returns:
        Its index; None if there is none.

    Example:
        >>> lone_surrogate("a\ud800"), lone_surrogate("a\U0001f600")
        (1, None)
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def _apply(tokenizer: Any, prompt: str, system: str | None, *, tokenize: bool) -> Any:
    if not getattr(tokenizer, "chat_template", None):
        raise TaskError(
            "the tokenizer has no chat template; leave the chat form out, or give a model tuned for chat"
        )
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": prompt})
    # Without `tokenize` transformers returns no dictionary, whatever is asked for.
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=tokenize, return_dict=False
        )
    except Exception as error:  # templates raise whatever they like
        raise TaskError(
            f"the chat template cannot be applied to {_short(prompt)}: {error}"
        ) from error


def _check_text(text: str) -> None:
    place = lone_surrogate(text)
    if place is not None:
        raise TaskError(
            f"the text {_short(text)} holds {text[place]!a} at character {place}, half of a surrogate pair, which "
            "no tokenizer can read; give a text that has a UTF-8 form"
        )


def _short(text: str) -> str:
    # `repr` escapes what cannot be printed, lone surrogates among it.
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
