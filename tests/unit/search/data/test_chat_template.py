"""Tasks in chat form: the prompts stay, the tokens are the template's own, and letters stay what they were."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dynadepth.errors import LabelError, TaskError
from dynadepth_search.data.chat_template import as_chat
from dynadepth_search.data.encoding import encode_example, prompt_text
from dynadepth_search.data.tasks import Example, Task
from dynadepth_search.scoring.scorer import Scorer
from dynadepth_search.storage.compatibility import chat_form, task_fields
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


class TestForm:
    def test_the_prompts_stay_as_the_user_wrote_them(self):
        for task in (LETTERED, tiny_task(5), tiny_task(3, kind="completion")):
            chat = as_chat(task, chat_tokenizer())
            assert chat.examples == task.examples
            assert (chat.name, chat.scoring, chat.kind) == (task.name, task.scoring, task.kind)

    def test_the_task_is_another_one(self):
        tokenizer = chat_tokenizer()
        forms = [
            LETTERED,
            as_chat(LETTERED, tokenizer),
            as_chat(LETTERED, tokenizer, system=""),
            as_chat(LETTERED, tokenizer, system="Be brief."),
            as_chat(LETTERED, chat_tokenizer(STRICT)),
        ]
        assert len({task.sha256 for task in forms}) == len(forms)
        assert as_chat(LETTERED, tokenizer) == as_chat(LETTERED, chat_tokenizer())

    def test_files_remember_the_form(self):
        for task in (LETTERED, as_chat(LETTERED, chat_tokenizer(), system="Be brief.")):
            fields = json.loads(json.dumps(task_fields(task)))
            assert chat_form(fields) == task.chat
        for damaged in ("yes", {"template": 3}, {"templates": "a"}, {"template": "a", "system": 1}):
            with pytest.raises(LabelError, match="expected"):
                chat_form({"chat": damaged})


def read_back(tokenizer, task, number=0):
    """Return the text of an example's tokens, of which each is written as it is in the vocabulary."""
    item = encode_example(tokenizer, task.examples[number], task.scoring, task.chat)
    return "".join(tokenizer.convert_ids_to_tokens(item.prompt_ids))


class TestTokens:
    @pytest.mark.parametrize("system", [None, "", "Be brief."])
    @pytest.mark.parametrize("scoring", ["raw", "normalized", "letter"])
    @pytest.mark.parametrize("begins", [True, False])
    @pytest.mark.parametrize("bos", [True, False])
    def test_they_are_those_that_a_user_of_the_template_has(self, bos, begins, scoring, system):
        template = TURNS if begins else TURNS.replace("{{ bos_token }}", "")
        tokenizer = chat_tokenizer(template, bos=bos)
        task = replace(LETTERED, scoring=scoring)
        chat = as_chat(task, tokenizer, system=system)
        scorer = Scorer(tiny_model(), tokenizer, chat.scoring, chat=chat.chat)
        for example in chat.examples:
            messages = [] if system is None else [{"role": "system", "content": system}]
            messages.append({"role": "user", "content": prompt_text(example, scoring)})
            own = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
            ids = scorer.encode(example).prompt_ids.tolist()
            assert ids == own
            assert ids.count(tokenizer.bos_token_id) == begins
            # Every answer follows that very prompt.
            assert all(row[: len(own)].tolist() == own for row in scorer.encode(example).rows)

    def test_a_prompt_is_the_users_turn(self):
        tokenizer = chat_tokenizer()
        chat = as_chat(Task("t", (Example("Say it"),)), tokenizer)
        assert read_back(tokenizer, chat) == "<s>(user) Say it\n(assistant)"

    def test_a_system_turn_comes_first(self):
        tokenizer = chat_tokenizer()
        chat = as_chat(tiny_task(1, kind="prompt"), tokenizer, system="Be brief.")
        assert read_back(tokenizer, chat) == "<s>(system) Be brief.\n(user) Number 0:\n(assistant)"
        empty = as_chat(tiny_task(1, kind="prompt"), tokenizer, system="")
        assert read_back(tokenizer, empty).startswith("<s>(system) \n(user)")

    def test_letters_are_listed_inside_the_turn(self):
        tokenizer = chat_tokenizer(bos=True)
        chat = as_chat(LETTERED, tokenizer)
        turn = "Which one?\nA. up\nB. down\nC. left\nAnswer:"
        assert read_back(tokenizer, chat) == f"<s>(user) {turn}\n(assistant)"
        item = encode_example(tokenizer, chat.examples[0], "letter", chat.chat)
        assert tokenizer.convert_ids_to_tokens(item.entry_token) == [" A", " B", " C"]

    def test_an_answer_has_no_beginning_of_its_own(self):
        tokenizer = chat_tokenizer(TURNS.replace("{{ bos_token }}", ""), bos=True)
        chat = as_chat(Task("t", (Example("Q", completion="no way"),)), tokenizer)
        item = encode_example(tokenizer, chat.examples[0], "raw", chat.chat)
        assert "".join(tokenizer.convert_ids_to_tokens(item.entry_token)) == " no way"
        assert tokenizer.bos_token_id not in [*item.rows[0].tolist(), *item.entry_token.tolist()]

    def test_a_tokenizer_without_a_beginning(self):
        tokenizer = chat_tokenizer(TURNS.replace("{{ bos_token }}", ""))
        tokenizer.bos_token = None
        chat = as_chat(tiny_task(1), tokenizer)
        assert read_back(tokenizer, chat) == "(user) Number 0:\n(assistant)"

    def test_letter_scoring_without_choices_has_no_letters(self):
        tokenizer = chat_tokenizer()
        task = Task("t", tiny_task(2, kind="completion").examples, "letter")
        chat = as_chat(task, tokenizer)
        assert read_back(tokenizer, chat) == "<s>(user) Number 0:\n(assistant)"

    def test_a_beginning_inside_the_prompt_stays(self):
        tokenizer = chat_tokenizer(bos=True)
        task = as_chat(Task("t", (Example("<s>quoted<s>"),)), tokenizer)
        assert read_back(tokenizer, task) == "<s>(user) <s>quoted<s>\n(assistant)"

    def test_letters_score_the_same_as_letter_scoring_of_that_text(self):
        model, tokenizer = tiny_model(), chat_tokenizer(bos=True)
        plans = np.array([[1, 1, 1, 1], [0, 1, 2, 1]], dtype=np.uint8)
        pairs = np.tile(plans, (3, 1)), np.repeat(np.arange(3), 2)
        chat = as_chat(LETTERED, tokenizer)
        found = Scorer(model, tokenizer, chat.scoring, chat=chat.chat).outcomes(
            chat.examples, *pairs
        )
        # A template that writes what the tokenizer does to a prompt alone must change nothing.
        plain = chat_tokenizer("{{ bos_token }}{{ messages[0]['content'] }}", bos=True)
        same = as_chat(LETTERED, plain)
        first = Scorer(model, plain, "letter").outcomes(LETTERED.examples, *pairs)
        second = Scorer(model, plain, same.scoring, chat=same.chat).outcomes(same.examples, *pairs)
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
        assert read_back(tokenizer, as_chat(tiny_task(1), tokenizer)) == "<s>Number 0:\n"
        with pytest.raises(TaskError, match="System role not supported"):
            as_chat(tiny_task(1), tokenizer, system="Be brief.")

    def test_another_template_than_that_of_the_task(self):
        chat = as_chat(LETTERED, chat_tokenizer())
        assert Scorer(tiny_model(), chat_tokenizer(), "letter", chat=chat.chat).chat == chat.chat
        for other in (STRICT, None):
            with pytest.raises(TaskError, match="is not the one that was applied to the prompts"):
                Scorer(tiny_model(), chat_tokenizer(other), "letter", chat=chat.chat)
