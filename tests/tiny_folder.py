"""Folders as a user has them: a tiny base model with a tokenizer, and routers beside it."""

import string
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny import VOCAB_SIZE, tiny_model

_SPECIAL = ["<pad>", "<s>", "<unk>"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each common character."""
    characters = "\n " + string.ascii_letters + string.digits + string.punctuation
    words = (_SPECIAL + list(characters))[:VOCAB_SIZE]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", unk_token="<unk>"
    )


def save_tiny_base(folder: Path, *, family: str = "llama", num_layers: int = 4) -> Path:
    """Write a tiny random model and its tokenizer, as `from_pretrained` reads them."""
    model = tiny_model(family, num_layers=num_layers, dtype=torch.float32)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
