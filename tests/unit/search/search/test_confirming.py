"""Confirmation: which variants a prompt has, that plans are scored on them as any example is, and what it costs."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from dynadepth.errors import ConfigError, LabelError, SearchError, TaskError
from dynadepth.plans import plan_depth
from dynadepth.tree_search.forest import Evaluated
from dynadepth_search.data.tasks import Task
from dynadepth_search.data.variants import ContinuedExample, in_other_orders, in_other_words
from dynadepth_search.scoring.generating import answers_under_plans, continue_prompts
from dynadepth_search.scoring.scorer import Scorer
from dynadepth_search.search.confirming import Confirmation
from dynadepth_search.search.per_prompt import search_prompts
from dynadepth_search.storage.answer_counts import answer_counts
from dynadepth_search.storage.labels import read_labels
from tests.tiny import tiny_model
from tests.tiny_search import folder_bytes, tiny_spec, tiny_task
from tests.tiny_text import word_tokenizer

SOLVING = tiny_spec(objective="reward", new_tokens=12, depth_penalty=0.5)
PLANS = np.array([[1, 1, 1, 1], [0, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 0]], dtype=np.uint8)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def evaluated(rewards):
    return Evaluated(
        PLANS, np.array(rewards), plan_depth(PLANS), PLANS.sum(axis=1).astype(np.uint32)
    )


def tried(model, task, spec):
    """Let a task's prompts be confirmed; return the choices, what was scored, and the confirmation."""
    scorer, asked = Scorer(model, word_tokenizer(), task.scoring), []
    confirmation = Confirmation(scorer, task.kind, spec)
    confirmation.check(task.examples)

    def rewards(examples, plans, tree):
        found = scorer.rewards(examples, plans, tree, spec.objective)[0]
        asked.extend(
            (examples[index], tuple(plan), reward)
            for index, plan, reward in zip(tree.tolist(), plans.tolist(), found, strict=True)
        )
        return found

    known = [evaluated([0.0, 2.0, 1.0, -1.0])] * len(task.examples)
    return confirmation.choose(task.examples, known, 0.5, rewards), asked, confirmation


@pytest.mark.parametrize(
    ("kind", "scoring", "objective"),
    [
        ("choices", "letter", "preserve"),
        ("choices", "raw", "reward"),
        ("completion", "raw", "reward"),
        ("completion", "raw", "preserve"),
        ("solution", "raw", "reward"),
        ("solution", "raw", "preserve"),
        ("prompt", "raw", "preserve"),
    ],
)
def test_the_best_plans_and_the_identity_are_scored_on_variants(model, kind, scoring, objective):
    task = replace(tiny_task(3, kind=kind), scoring=scoring)
    spec = tiny_spec(objective=objective, confirm=2, variants=2, own_tokens=3)
    choices, asked, confirmation = tried(model, task, spec)
    wanted = {(0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 1, 1)}
    for example, choice in zip(task.examples, choices, strict=True):
        if scoring == "letter":
            variants = list(in_other_orders(example, 2))
        elif objective == "reward":
            variants = [in_other_words(example, spec.wording)]
        else:
            variants = [
                each
                for each, *_ in asked
                if isinstance(each, ContinuedExample) and each.prompt == example.prompt
            ][:1]
            prompt = Scorer(model, word_tokenizer()).encode(example).prompt_ids
            own = continue_prompts(model, [prompt], new_tokens=3)[0].ids[len(prompt) :]
            assert variants[0].continuation == tuple(own.tolist())
        for variant in variants:
            assert {plan for each, plan, _ in asked if each == variant} == wanted
        assert [len(item.variant_rewards) for item in choice.candidates] == [len(variants)] * 3
        assert choice.raw.plan == "0111"
        for item in choice.candidates:
            plan = tuple(int(digit) for digit in item.plan)
            found = [reward for each, given, reward in asked if each in variants and given == plan]
            assert item.variant_rewards == tuple(found)
    continued = 0 if objective == "reward" or scoring == "letter" else len(task.examples)
    # Three plans answer the prompt and its second wording.
    answered = 6 * len(task.examples) if (kind, objective) == ("solution", "reward") else 0
    assert confirmation.evaluations == len(asked) + continued + answered
    assert sum(len(item.answers) for choice in choices for item in choice.candidates) == answered


def test_nothing_is_scored_where_nothing_is_confirmed(model):
    choices, asked, confirmation = tried(model, tiny_task(2, kind="prompt"), tiny_spec(confirm=0))
    assert asked == []
    assert confirmation.evaluations == 0
    assert [choice.label.plan for choice in choices] == ["0111", "0111"]
    assert [choice.candidates for choice in choices] == [(), ()]


def test_a_variant_that_is_too_long_is_told_before_the_search(model, tmp_path):
    example = tiny_task(1, kind="completion").examples[0]
    spec = tiny_spec(objective="reward", wording="red " * 200 + "{prompt}")
    task = Task("long", (example,))
    with pytest.raises(TaskError, match=r"variant of the prompt.*--confirm 0"):
        search_prompts(model, word_tokenizer(), task, tmp_path, spec)
    assert folder_bytes(tmp_path) == {}


def test_a_margin_that_nothing_has_leaves_the_identity(model, tmp_path):
    task = tiny_task(6)
    search_prompts(model, word_tokenizer(), task, tmp_path / "any", tiny_spec(depth_penalty=2.0))
    spec = tiny_spec(depth_penalty=2.0, margin=100.0)
    search_prompts(model, word_tokenizer(), task, tmp_path / "none", spec)
    found, none = read_labels(tmp_path / "any"), read_labels(tmp_path / "none")
    assert found.identity_rate < 1
    assert none.identity_rate == 1
    np.testing.assert_array_equal(found.raw_plans, none.raw_plans)
    assert (found.margins >= 0).all()
    assert found.confirmations > 0


def ends_with(answer, solution):
    """A comparison that tells something of the soup that a tiny model says: by its last digit."""
    return [mark for mark in answer if mark.isdigit()][-1:] == [solution]


@pytest.fixture(scope="module")
def solved(model, tmp_path_factory):
    """Labels of prompts half of whose solutions are what the base model says, with their task and their folder."""
    examples = tiny_task(10, kind="solution").examples
    said = answers_under_plans(
        Scorer(model, word_tokenizer()),
        examples,
        np.ones((10, 4), dtype=np.uint8),
        np.arange(10),
        new_tokens=12,
    )
    digits = [[mark for mark in text if mark.isdigit()] or ["7"] for text in said]
    task = Task(
        "sums",
        tuple(
            replace(item, solution=found[-1] if row % 2 else "987")
            for row, (item, found) in enumerate(zip(examples, digits, strict=True))
        ),
    )
    folder = tmp_path_factory.mktemp("solved")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dynadepth_search.scoring.generating.is_right", ends_with)
        search_prompts(model, word_tokenizer(), task, folder, SOLVING)
    return task, folder, read_labels(folder)


def test_labels_answer_right_whatever_the_identity_answers_right(model, solved):
    task, _, labels = solved
    assert labels.examples == task.examples
    scorer = Scorer(model, word_tokenizer())
    counts = answer_counts(labels)
    for example, candidates, label in zip(
        task.examples, labels.candidates, labels.plans, strict=True
    ):
        forms = [example, in_other_words(example, SOLVING.wording)]
        by_plan = {}
        for item in candidates:
            plan = np.array([[int(digit) for digit in item.plan]] * 2, dtype=np.uint8)
            said = answers_under_plans(scorer, forms, plan, np.arange(2), new_tokens=12)
            assert list(item.answers) == said
            assert list(item.right) == [ends_with(text, example.solution) for text in said]
            by_plan[item.plan] = item
        assert by_plan["".join(map(str, label))].keeps(by_plan["1111"])
    assert counts["answered_prompts"] == 10
    assert counts["base_right"] > 0
    assert counts["labels_right"] >= counts["base_right"]
    assert counts["losses_avoided"] > 0
    assert labels.confirmations == sum(
        3 * len(candidates) for candidates in labels.candidates
    ) / len(labels)


def test_a_fix_is_chosen_and_counted(model, tmp_path, monkeypatch):
    """Where every answer but the identity's is right, each label is a plan that was found."""
    task = tiny_task(6, kind="solution")
    scorer = Scorer(model, word_tokenizer())
    forms = [
        form for item in task.examples for form in (item, in_other_words(item, SOLVING.wording))
    ]
    plans = np.ones((len(forms), 4), dtype=np.uint8)
    base = set(answers_under_plans(scorer, forms, plans, np.arange(len(forms)), new_tokens=12))
    monkeypatch.setattr(
        "dynadepth_search.scoring.generating.is_right", lambda text, _solution: text not in base
    )
    # A margin that no value has.
    spec = replace(SOLVING, margin=1e6)
    search_prompts(model, word_tokenizer(), task, tmp_path, spec)
    labels = read_labels(tmp_path)
    counts = answer_counts(labels)
    assert counts["base_right"] == 0
    assert counts["fixes_confirmed"] > 0
    assert counts["fixes_confirmed"] == (labels.plans != 1).any(axis=1).sum()


def test_nothing_is_generated_where_nothing_is_confirmed_or_the_base_model_is_preserved(
    model, tmp_path
):
    for changes in ({"confirm": 0}, {"objective": "preserve"}):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        spec = replace(SOLVING, **changes)
        search_prompts(model, word_tokenizer(), tiny_task(4, kind="solution"), folder, spec)
        assert answer_counts(read_labels(folder))["answered_prompts"] == 0


def test_what_no_answer_can_be_compared_with_is_told_before_the_search(model, tmp_path):
    task = tiny_task(2, kind="solution")
    name = replace(task.examples[1], solution="Tim", where="sums.jsonl, line 2")
    named = replace(task, examples=(task.examples[0], name))
    with pytest.raises(TaskError, match=r"^sums\.jsonl, line 2: `solution` is 'Tim'"):
        search_prompts(model, word_tokenizer(), named, tmp_path, SOLVING)
    with ThreadPoolExecutor() as pool:
        found = pool.submit(search_prompts, model, word_tokenizer(), task, tmp_path, SOLVING)
        with pytest.raises(SearchError, match="beside the main thread"):
            found.result()
    assert folder_bytes(tmp_path) == {}


@pytest.mark.parametrize("new_tokens", [0, -1, 2.5, True, "8"])
def test_a_limit_of_tokens_is_a_whole_number(new_tokens):
    with pytest.raises(ConfigError, match=r"new_tokens is .*expected a whole number, 1 or more"):
        tiny_spec(new_tokens=new_tokens)


def test_another_limit_of_tokens_is_another_search(model, solved):
    task, folder, _ = solved
    spec = replace(SOLVING, new_tokens=13)
    with pytest.raises(LabelError, match=r"made with search\.new_tokens = 12, but now it is 13"):
        search_prompts(model, word_tokenizer(), task, folder, spec)


@pytest.mark.parametrize("kind", ["prompt", "choices", "solution"])
def test_an_interrupted_search_ends_with_the_same_bytes(model, tmp_path, kind):
    task = replace(tiny_task(11, kind=kind), scoring="letter")

    class Stop(BaseException):
        pass

    def stop(stage, done, _total):
        if stage == "search" and done >= 8:
            raise Stop

    spec = SOLVING if kind == "solution" else tiny_spec(own_tokens=3)
    search_prompts(model, word_tokenizer(), task, tmp_path / "whole", spec)
    with pytest.raises(Stop):
        search_prompts(model, word_tokenizer(), task, tmp_path / "killed", spec, progress=stop)
    # A line of the last block is lost: its block is searched again, and what it held before stays.
    journal = tmp_path / "killed" / "journal.jsonl"
    if journal.exists():
        lines = journal.read_bytes().splitlines(keepends=True)
        journal.write_bytes(b"".join(lines[:-1]))
    search_prompts(model, word_tokenizer(), task, tmp_path / "killed", spec)
    assert folder_bytes(tmp_path / "killed") == folder_bytes(tmp_path / "whole")


def test_the_search_itself_does_not_depend_on_confirmation(model, tmp_path):
    task = tiny_task(6, kind="completion")
    for count in (0, 2):
        spec = tiny_spec(confirm=count)
        search_prompts(model, word_tokenizer(), task, tmp_path / str(count), spec)
    off, on = read_labels(tmp_path / "0"), read_labels(tmp_path / "2")
    np.testing.assert_array_equal(off.plans, on.raw_plans)
    np.testing.assert_array_equal(off.raw_values, on.raw_values)
    assert off.kept_rate == 1
