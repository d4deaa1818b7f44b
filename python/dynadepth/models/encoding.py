"""From a prompt to tokens, in one way for generation, search, scoring, training and evaluation.

A policy must see exactly the same tokens in use as in training, so only this module applies a chat template or decides
on special tokens.
"""

from collections.abc import Collection, Sequence
from typing import Any

from dynadepth.errors import TaskError

__all__ = [
    "answer_length",
    "chat_text",
    "encode_prompt",
    "encode_text",
    "end_tokens",
    "lone_surrogate",
]


def encode_prompt(
    tokenizer: Any, prompt: str, *, chat: bool, system: str | None = None
) -> list[int]:
    """Return the tokens of a prompt, as the model is given them.

    Args:
        tokenizer: Tokenizer of the base model.
        prompt: The user's text.
        chat: False: the tokens of `tokenizer(prompt)`, special tokens included. True: those of
            `tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)`, the prompt being the
            user's turn. The special tokens are then those of the template, and the tokenizer adds none.
        system: Text of the system's turn; None: that of the template. It is used only with `chat`.

    Returns:
        Token ids, at least one.

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
    """Return the text that the chat template makes of a prompt, up to the point where the model answers.

    Its tokens are those of `encode_text(tokenizer, text, special_tokens=False)`.

    Args:
        tokenizer: Tokenizer of the base model.
        prompt: The user's text.
        system: Text of the system's turn; None: that of the template.

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
        tokenizer: Tokenizer of the base model.
        text: Any text.
        special_tokens: Whether the tokenizer adds its special tokens, as it does by default.

    Returns:
        Token ids; there may be none.

    Raises:
        TaskError: The text cannot be tokenised.
    """
    _check_text(text)
    options = {} if special_tokens else {"add_special_tokens": False}
    try:
        return list(tokenizer(text, **options)["input_ids"])
    except Exception as error:  # tokenizers may raise anything
        raise TaskError(
            f"the tokenizer cannot tokenise {_short(text)} ({type(error).__name__}: {error}); give another text"
        ) from error


def lone_surrogate(text: str) -> int | None:
    r"""Return the index of the first half of a UTF-16 pair in a text, which is not a character and has no UTF-8 form.

    JSON can contain one, and so can a command line that is not UTF-8.

    Args:
        text: Any text.

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
    # Without `tokenize`, transformers never returns a dictionary.
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=tokenize, return_dict=False
        )
    except Exception as error:  # templates may raise anything
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
    # `repr` escapes what cannot be printed, including lone surrogates.
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def end_tokens(model: Any) -> frozenset[int]:
    """Return the tokens that end a model's text; none if its generation config names none."""
    ends = model.generation_config.eos_token_id
    return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])


def answer_length(answer: Sequence[int], ends: Collection[int]) -> int:
    """Return the number of tokens of an answer up to the one that ends it, which padding may follow."""
    return next(
        (place for place, token in enumerate(answer, start=1) if token in ends), len(answer)
    )
