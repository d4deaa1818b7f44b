"""Tasks in chat form: the text is the template's, the tokens begin once, and letters stay what they were."""

import numpy as np
import pytest

from dynadepth.errors import TaskError
from dynadepth_search.data.chat_template import as_chat
from dynadepth_search.data.encoding import encode_example, prompt_text
from dynadepth_search.data.tasks import Example, Task
from dynadepth_search.scoring.scorer import Scorer
from tests.tiny import tiny_model
from tests.tiny_search import tiny_task
from tests.tiny_text import word_tokenizer

TURNS = (
    "{{ bos_token }}{% for message in messages %}({{ message['role'] }}) {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}(assistant){% endif %}"
)
# As gemma's: there is no system's turn.
STRICT = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ messages[0]['content'] }}{{ '\n' }}"
)


def chat_tokenizer(template=TURNS, **settings):
    tokenizer = word_tokenizer(**settings)
    tokenizer.chat_template = template
    return tokenizer


LETTERED = Task(
    "lettered",
    (
        Example("Which one?", ("up", "down", "left"), 1),
        Example("Which one?", ("down", "up", "left"), 1),
        Example("And now?", ("a", "b"), 0),
    ),
    "letter",
)


class TestText:
    def test_a_prompt_is_the_users_turn(self):
        task = Task("t", (Example("Say it"), Example("Say it again")))
        chat = as_chat(task, chat_tokenizer())
        assert [item.prompt for item in chat.examples] == [
            "<s>(user) Say it\n(assistant)",
            "<s>(user) Say it again\n(assistant)",
        ]
        assert (chat.name, chat.scoring, chat.kind) == ("t", "raw", "prompt")

    def test_a_system_turn_comes_first(self):
        chat = as_chat(tiny_task(1, kind="prompt"), chat_tokenizer(), system="Be brief.")
        assert chat.examples[0].prompt == "<s>(system) Be brief.\n(user) Number 0:\n(assistant)"

    def test_an_empty_system_turn_is_one(self):
        chat = as_chat(tiny_task(1, kind="prompt"), chat_tokenizer(), system="")
        assert chat.examples[0].prompt.startswith("<s>(system) \n(user)")

    @pytest.mark.parametrize("scoring", ["raw", "normalized"])
    def test_choices_stay_as_they_are(self, scoring):
        task = Task("t", tiny_task(5).examples, scoring)
        chat = as_chat(task, chat_tokenizer())
        assert chat.scoring == scoring
        for old, new in zip(task.examples, chat.examples, strict=True):
            assert (new.choices, new.answer, new.completion) == (old.choices, old.answer, None)
            assert new.prompt == f"<s>(user) {old.prompt}\n(assistant)"

    def test_a_completion_stays_as_it_is(self):
        task = tiny_task(3, kind="completion")
        chat = as_chat(task, chat_tokenizer())
        assert chat.kind == "completion"
        assert [item.completion for item in chat.examples] == ["red", "green", "blue"]

    def test_letters_are_listed_inside_the_turn(self):
        chat = as_chat(LETTERED, chat_tokenizer())
        assert chat.scoring == "raw"
        assert chat.examples[0] == Example(
            "<s>(user) Which one?\nA. up\nB. down\nC. left\nAnswer:\n(assistant)",
            ("A", "B", "C"),
            1,
        )
        assert chat.examples[2].choices == ("A", "B")
        assert [item.answer for item in chat.examples] == [1, 1, 0]

    def test_letter_scoring_without_choices_has_no_letters(self):
        task = Task("t", tiny_task(2, kind="completion").examples, "letter")
        chat = as_chat(task, chat_tokenizer())
        assert chat.examples[0].prompt == "<s>(user) Number 0:\n(assistant)"
        assert chat.examples[0].completion == "red"

    def test_examples_stay_apart_and_the_task_is_another(self):
        chat = as_chat(LETTERED, chat_tokenizer())
        assert len({item.prompt_id for item in chat.examples}) == len(LETTERED.examples)
        assert chat.sha256 != LETTERED.sha256
        assert as_chat(LETTERED, chat_tokenizer()) == chat

    def test_the_task_given_is_left_as_it_was(self):
        before = LETTERED.sha256
        as_chat(LETTERED, chat_tokenizer())
        assert LETTERED.sha256 == before


class TestTokens:
    @pytest.mark.parametrize("bos", [True, False])
    def test_a_text_begins_once(self, bos):
        tokenizer = chat_tokenizer(bos=bos)
        (item,) = as_chat(tiny_task(1), tokenizer).examples
        ids = encode_example(tokenizer, item, "raw").prompt_ids.tolist()
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id
        # The same tokens as the template's own.
        messages = [{"role": "user", "content": "Number 0:"}]
        own = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert ids == list(own["input_ids"] if hasattr(own, "keys") else own)
        assert item.prompt.startswith("<s>") != bos

    @pytest.mark.parametrize("bos", [True, False])
    def test_a_template_without_a_beginning_gets_none_but_the_tokenizers(self, bos):
        tokenizer = chat_tokenizer(TURNS.replace("{{ bos_token }}", ""), bos=bos)
        (item,) = as_chat(tiny_task(1), tokenizer).examples
        assert item.prompt == "(user) Number 0:\n(assistant)"
        ids = encode_example(tokenizer, item, "raw").prompt_ids.tolist()
        assert ids.count(tokenizer.bos_token_id) == bos

    def test_only_the_first_beginning_is_taken_away(self):
        tokenizer = chat_tokenizer(bos=True)
        task = Task("t", (Example("<s>quoted<s>"),))
        assert as_chat(task, tokenizer).examples[0].prompt == "(user) <s>quoted<s>\n(assistant)"

    def test_a_tokenizer_without_a_beginning(self):
        tokenizer = chat_tokenizer()
        tokenizer.bos_token = None
        tokenizer.chat_template = TURNS.replace("{{ bos_token }}", "")
        assert as_chat(tiny_task(1), tokenizer).examples[0].prompt.startswith("(user) Number 0:")

    def test_letters_score_the_same_as_letter_scoring_of_that_text(self):
        model, tokenizer = tiny_model(), chat_tokenizer(bos=True)
        plans = np.array([[1, 1, 1, 1], [0, 1, 2, 1]], dtype=np.uint8)
        chat = as_chat(LETTERED, tokenizer)
        found = Scorer(model, tokenizer, chat.scoring).outcomes(
            chat.examples, np.tile(plans, (3, 1)), np.repeat(np.arange(3), 2)
        )
        # A template that only ends the prompt as letter scoring itself does must change nothing.
        plain = chat_tokenizer("{{ messages[0]['content'] }}", bos=True)
        same = as_chat(LETTERED, plain)
        assert [item.prompt for item in same.examples] == [
            prompt_text(item, "letter") for item in LETTERED.examples
        ]
        pairs = np.tile(plans, (3, 1)), np.repeat(np.arange(3), 2)
        first = Scorer(model, plain, "letter").outcomes(LETTERED.examples, *pairs)
        second = Scorer(model, plain, same.scoring).outcomes(same.examples, *pairs)
        np.testing.assert_array_equal(np.concatenate(first.scores), np.concatenate(second.scores))
        np.testing.assert_array_equal(first.reward, second.reward)
        assert np.abs(first.reward - found.reward).max() > 1e-3


class TestErrors:
    @pytest.mark.parametrize("template", [None, ""])
    def test_no_template(self, template):
        with pytest.raises(TaskError, match="has no chat template; leave the chat form out, or"):
            as_chat(tiny_task(2), chat_tokenizer(template))

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("{{ raise_exception('no users here') }}", "no users here"),
            ("{% for message in messages %}", "cannot be applied to 'Number 0:'"),
            ("{{ messages[5]['content'] }}", "cannot be applied to 'Number 0:'"),
        ],
    )
    def test_a_template_that_fails(self, template, message):
        with pytest.raises(TaskError, match=message) as caught:
            as_chat(tiny_task(2), chat_tokenizer(template))
        assert str(caught.value).startswith("the chat template cannot be applied to")
        assert caught.value.__cause__ is not None

    def test_a_system_turn_that_the_template_does_not_know(self):
        tokenizer = chat_tokenizer(STRICT)
        assert as_chat(tiny_task(1), tokenizer).examples[0].prompt == "<s>Number 0:\n"
        with pytest.raises(TaskError, match="System role not supported"):
            as_chat(tiny_task(1), tokenizer, system="Be brief.")
