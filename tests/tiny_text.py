"""A tiny tokenizer with words, so that borders between tokens are not borders between characters."""

import string
from collections.abc import Iterable
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.tiny import VOCAB_SIZE

_WORDS = [" A", " B", " C", " D", " yes", " no", "Answer", " the"]


def word_tokenizer(*, bos: bool = False, eos: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer of a few words and of characters, at most `VOCAB_SIZE` tokens.

    Args:
        bos: Begin every text with `<s>`, as Llama's tokenizers do.
        eos: End every text with `</s>`.
    """
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    characters = "\n " + string.ascii_letters + string.digits + ".,:?!()"
    vocabulary = {word: index for index, word in enumerate([*special, *_WORDS, *characters])}
    if len(vocabulary) > VOCAB_SIZE:
        raise ValueError(f"{len(vocabulary)} tokens for a vocabulary of {VOCAB_SIZE}")
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words = "|".join(rf"{word}(?![A-Za-z])" for word in _WORDS)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{words}|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if bos or eos:
        parts = (["<s>"] if bos else []) + ["$A"] + (["</s>"] if eos else [])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(parts), special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def as_lists(texts: Iterable[Any]) -> list[tuple[int, list[int]]]:
    """Return the length of each text's prompt and its tokens, to be compared."""
    return [(text.prompt, text.ids.tolist()) for text in texts]
