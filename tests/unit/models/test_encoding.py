"""From a prompt to tokens: what a user's own call gives, and errors of ours for what cannot be read."""

import pytest

from dynadepth.errors import TaskError
from dynadepth.models.encoding import chat_text, encode_prompt, encode_text, lone_surrogate
from tests.tiny_text import word_tokenizer

TURNS = (
    "{% for message in messages %}({{ message['role'] }}) {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}(assistant){% endif %}"
)


def chat_tokenizer(*, begins, **settings):
    tokenizer = word_tokenizer(**settings)
    tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + TURNS
    return tokenizer


@pytest.mark.parametrize("bos", [True, False])
def test_a_plain_prompt_is_what_the_tokenizer_makes_of_it(bos):
    tokenizer = word_tokenizer(bos=bos)
    for prompt in ("Answer the question:", "A", "\n", "\x00", "<s>A"):
        assert encode_prompt(tokenizer, prompt, chat=False) == tokenizer(prompt)["input_ids"]


@pytest.mark.parametrize("system", [None, "", "Be brief."])
@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("bos", [True, False])
def test_a_turn_is_what_the_template_makes_of_it(bos, begins, system):
    tokenizer = chat_tokenizer(begins=begins, bos=bos)
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": "Answer the question:"})
    own = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    ids = encode_prompt(tokenizer, "Answer the question:", chat=True, system=system)
    assert ids == own["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == begins
    text = chat_text(tokenizer, "Answer the question:", system=system)
    assert text == tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    assert encode_text(tokenizer, text, special_tokens=False) == ids


@pytest.mark.parametrize("template", [None, ""])
def test_without_a_template_there_is_no_chat(template):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(TaskError, match="the tokenizer has no chat template; leave the chat form"):
        encode_prompt(tokenizer, "A", chat=True)
    with pytest.raises(TaskError, match="the tokenizer has no chat template"):
        chat_text(tokenizer, "A")


def test_a_template_that_fails_is_named():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    with pytest.raises(TaskError, match="cannot be applied to 'A': no users here") as caught:
        encode_prompt(tokenizer, "A", chat=True)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("text", ["\ud800", "A \udfff B", "\udc80\udc81"])
@pytest.mark.parametrize("chat", [True, False])
def test_half_of_a_surrogate_pair_is_refused(text, chat):
    tokenizer = chat_tokenizer(begins=True)
    with pytest.raises(TaskError, match="half of a surrogate pair") as caught:
        encode_prompt(tokenizer, text, chat=chat)
    str(caught.value).encode()  # the message itself can be printed
    with pytest.raises(TaskError, match="half of a surrogate pair"):
        encode_text(tokenizer, text)
    assert lone_surrogate(text) == next(i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff")


def test_a_whole_pair_is_text():
    assert lone_surrogate("\U0001f600 \x00 \u2028") is None


def test_what_the_tokenizer_refuses_is_ours_to_name():
    class NoNull:
        chat_template = None

        def __call__(self, text, **_):
            if "\x00" in text:
                raise TypeError("embedded null character")
            return {"input_ids": [7] * len(text)}

    assert encode_prompt(NoNull(), "ab", chat=False) == [7, 7]
    with pytest.raises(TaskError, match=r"cannot tokenise 'a\\x00' \(TypeError: embedded null"):
        encode_prompt(NoNull(), "a\x00", chat=False)


@pytest.mark.parametrize("chat", [True, False])
def test_a_prompt_without_tokens_is_refused(chat):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(TaskError, match="the prompt '' has no tokens"):
        encode_prompt(tokenizer, "", chat=chat)
