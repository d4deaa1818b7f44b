"""Confirmation: which variants a prompt has, that plans are scored on them as any example is, and what it costs."""

from dataclasses import replace

import numpy as np
import pytest

from dynadepth.errors import TaskError
from dynadepth.plans import plan_depth
from dynadepth.tree_search.forest import Evaluated
from dynadepth_search.data.tasks import Task
from dynadepth_search.data.variants import ContinuedExample, in_other_orders, in_other_words
from dynadepth_search.scoring.generating import continue_prompts
from dynadepth_search.scoring.scorer import Scorer
from dynadepth_search.search.confirming import Confirmation
from dynadepth_search.search.per_prompt import search_prompts
from dynadepth_search.storage.labels import read_labels
from tests.tiny import tiny_model
from tests.tiny_search import folder_bytes, tiny_spec, tiny_task
from tests.tiny_text import word_tokenizer

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
    assert confirmation.evaluations == len(asked) + continued


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


@pytest.mark.parametrize("kind", ["prompt", "choices"])
def test_an_interrupted_search_ends_with_the_same_bytes(model, tmp_path, kind):
    task = replace(tiny_task(11, kind=kind), scoring="letter")

    class Stop(BaseException):
        pass

    def stop(stage, done, _total):
        if stage == "search" and done >= 8:
            raise Stop

    spec = tiny_spec(own_tokens=3)
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
