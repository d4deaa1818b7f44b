"""Evaluation of random routers on a tiny model: every part runs, agrees with a recount, and goes on."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dynadepth.errors import (
    BudgetError,
    CheckpointError,
    ConfigError,
    LabelError,
    RunnerError,
    SearchError,
    TaskError,
)
from dynadepth.models.fingerprint import fingerprint
from dynadepth.plans import identity_plan, parse_plan, plan_depth, plan_text
from dynadepth.policies.calibration import Calibration
from dynadepth.training.train_config import TrainConfig
from dynadepth.wrapping.wrap import unwrap_model, wrap_model
from dynadepth_search.data.chat_template import as_chat
from dynadepth_search.data.splits import prompt_hashes
from dynadepth_search.data.tasks import Example, Task
from dynadepth_search.evaluation.comparison import Front
from dynadepth_search.evaluation.evaluating import (
    EvaluationConfig,
    check_trained_on,
    evaluate,
    read_evaluation,
)
from dynadepth_search.evaluation.outcome_cache import OutcomeCache
from dynadepth_search.runners.local import LocalRunner
from dynadepth_search.runners.work import Loaded
from dynadepth_search.scoring.scorer import Scorer
from tests.tiny import tiny_model
from tests.tiny_menus import random_menu
from tests.tiny_routers import random_routers
from tests.tiny_shortcuts import random_shortcuts
from tests.tiny_text import word_tokenizer

LAYERS = 6
CONFIG = EvaluationConfig(
    budgets=(0.9, 0.7),
    timing_prompts=1,
    timing_rounds=1,
    check_prompts=3,
    batch_size=4,
    random_draws=2,
)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(num_layers=LAYERS, dtype=torch.float32)


@pytest.fixture(scope="module")
def routers(model: Any) -> Any:
    calibration = Calibration(
        lambdas=(2.0, 1.0, 0.5, 0.0, -1.0),
        depths=(0.4, 0.7, 0.8, 0.95, 1.2),
        lowest=0.4,
        highest=1.0,
    )
    return random_routers(
        num_layers=LAYERS, fingerprint=fingerprint(model), calibration=calibration
    )


@pytest.fixture(scope="module")
def front() -> Front:
    plans = [identity_plan(LAYERS)]
    for layer in (3, 1, 4, 2, 0):
        plans.append(plans[-1].copy())
        plans[-1][layer] = 0
    return Front(np.array(plans), np.array([0.0, -0.1, -0.3, -0.6, -1.0, -1.5]))


def _task(name: str, first: int, count: int) -> Task:
    examples = [
        Example(f"Question {index}: {'the ' * (index % 4)}?", (" yes", " no I do"), index % 2)
        for index in range(first, first + count)
    ]
    return Task(name, tuple(examples))


HELDOUT, TRAIN = _task("heldout", 0, 10), _task("train", 50, 6)


def _evaluate(
    model: Any, routers: Any, front: Front, folder: Path, **changes: Any
) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "heldout": HELDOUT,
        "train": TRAIN,
        "routers": routers,
        "front": front,
        "objective": "preserve",
        "folder": folder,
        "config": CONFIG,
        "progress": lambda what, done, total: None,
    }
    return evaluate(model, word_tokenizer(), **{**settings, **changes})


@pytest.fixture(scope="module")
def result(
    model: Any, routers: Any, front: Front, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    return _evaluate(model, routers, front, tmp_path_factory.mktemp("evaluation"))


def _policy(result: dict[str, Any], name: str) -> dict[str, Any]:
    return next(policy for policy in result["policies"] if policy["name"] == name)


def test_every_policy_of_the_issue_is_there(result: dict[str, Any]) -> None:
    names = [policy["name"] for policy in result["policies"]]
    for budget in ("0.90", "0.70"):
        kinds = ["routers", "static mixture", "ShortGPT", "random", "oracle"]
        assert [name for name in names if budget in name] == [f"{kind} {budget}" for kind in kinds]
    assert names[0] == "base"
    assert [p["ranked"] for p in result["policies"] if p["kind"] == "oracle"] == [False, False]


def test_figures_agree_with_a_recount_by_the_wrapped_model(
    model: Any, routers: Any, result: dict[str, Any]
) -> None:
    scorer = Scorer(model, word_tokenizer())
    depths, agreed = [], []
    base = scorer.base(HELDOUT.examples)
    for index, example in enumerate(HELDOUT.examples):
        ids, mask = scorer.encode_prompts([example])
        wrap_model(model, budget=0.7, routers=routers)
        with torch.inference_mode():
            model(input_ids=ids, attention_mask=mask)
        plan = model.dynadepth.last_plans
        unwrap_model(model)
        depths.append(plan.sum() / LAYERS)
        agreed.append(
            scorer.outcomes([example], plan, np.array([0])).answer[0] == base.answer[index]
        )
    routed = _policy(result, "routers 0.70")
    assert routed["depth"] == pytest.approx(np.mean(depths))
    assert routed["metrics"]["agreement"]["mean"] == pytest.approx(np.mean(agreed))
    assert _policy(result, "base")["metrics"]["preserve"]["mean"] == 0.0
    accuracy = _policy(result, "base")["metrics"]["accuracy"]["mean"]
    assert accuracy == pytest.approx(base.correct.mean())


def test_policies_of_a_budget_have_one_depth(result: dict[str, Any]) -> None:
    depth = _policy(result, "routers 0.70")["depth"]
    for name in ("static mixture 0.70", "ShortGPT 0.70", "random 0.70"):
        assert _policy(result, name)["depth"] == pytest.approx(
            depth, abs=0.5 / (LAYERS * 10) + 1e-9
        )


def test_the_wrapped_model_scores_as_the_sweep(result: dict[str, Any]) -> None:
    for check in result["runtime_check"].values():
        assert check["choices"] == 6
        assert check["max_difference"] < 1e-3
        assert check["plans_differing"] == 0


def test_times_and_findings_are_there(result: dict[str, Any]) -> None:
    for name in ("routers 0.90", "static mixture 0.90", "ShortGPT 0.90", "random 0.90"):
        assert _policy(result, name)["time"]["median"] > 0
    assert _policy(result, "oracle 0.90")["time"] is None
    sentences = [finding for finding in result["findings"] if finding.startswith("routers 0.90")]
    assert len(sentences) == 1
    for words in ("fidelity", "agreement", "accuracy", "graded reward", "identity plan"):
        assert words in sentences[0]


def test_the_model_is_left_as_it_was(model: Any, result: dict[str, Any]) -> None:
    assert "dynadepth" not in model.__dict__


def test_an_evaluation_goes_on_where_it_stopped(
    model: Any, routers: Any, front: Front, tmp_path: Path, result: dict[str, Any]
) -> None:
    whole = _evaluate(model, routers, front, tmp_path)
    assert read_evaluation(tmp_path) == whole
    comparable = [{**policy, "time": None} for policy in whole["policies"]]
    assert comparable == [{**policy, "time": None} for policy in result["policies"]]
    path = tmp_path / "outcomes.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 11
    path.write_text("".join(lines[:6]) + lines[6][:40])  # killed in the middle of a line
    (tmp_path / "evaluation.json").unlink()
    seen: list[tuple[str, int]] = []
    again = _evaluate(
        model,
        routers,
        front,
        tmp_path,
        progress=lambda what, done, total: seen.append((what, done)),
    )
    assert ("scoring held-out prompts", 5) in seen
    assert ("scoring held-out prompts", 0) not in seen
    assert _untimed(again) == _untimed(whole)
    assert path.read_text() == "".join(lines)


def _untimed(result: dict[str, Any]) -> dict[str, Any]:
    """What an evaluation says, without what a clock said."""
    content = {
        key: value
        for key, value in result.items()
        if key not in ("seconds", "base_prefill_milliseconds")
    }
    content["policies"] = [{**policy, "time": None} for policy in result["policies"]]
    # Findings about time have figures of it.
    content["findings"] = len(result["findings"])
    return content


def _outcomes(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "outcomes.jsonl").read_text().splitlines()]


def _pairs(folder: Path) -> dict[tuple[str, str], tuple[float, ...]]:
    """Figures by prompt and plan."""
    found: dict[tuple[str, str], tuple[float, ...]] = {}
    for line in _outcomes(folder)[1:]:
        figures = zip(
            *(line[name] for name in ("reward", "preserve", "agreement", "accuracy")), strict=True
        )
        for plan, values in zip(line["plans"], figures, strict=True):
            assert (line["example"], plan) not in found
            found[line["example"], plan] = values
    return found


class TestOutcomesAreKept:
    def test_the_same_again_scores_nothing_and_says_the_same(
        self, model: Any, routers: Any, front: Front, tmp_path: Path, result: dict[str, Any]
    ) -> None:
        first = _evaluate(model, routers, front, tmp_path)
        before = (tmp_path / "outcomes.jsonl").read_bytes()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dynadepth_search.evaluation.outcome_cache.score_outcomes", _never)
            again = _evaluate(model, routers, front, tmp_path)
        assert _untimed(again) == _untimed(first) == _untimed(result)
        assert (tmp_path / "outcomes.jsonl").read_bytes() == before

    def test_one_more_budget_adds(
        self, model: Any, routers: Any, front: Front, tmp_path: Path, result: dict[str, Any]
    ) -> None:
        _evaluate(model, routers, front, tmp_path / "a", config=replace(CONFIG, budgets=(0.9,)))
        first = _pairs(tmp_path / "a")
        more = _evaluate(model, routers, front, tmp_path / "a")
        both = _pairs(tmp_path / "a")
        assert {pair: both[pair] for pair in first} == first
        assert len(both) > len(first)
        _evaluate(model, routers, front, tmp_path / "b")
        whole = _pairs(tmp_path / "b")
        assert both.keys() == whole.keys()
        for pair, figures in whole.items():
            np.testing.assert_allclose(both[pair], figures, rtol=0, atol=1e-4)
        assert [policy["name"] for policy in more["policies"]] == [
            policy["name"] for policy in result["policies"]
        ]
        for one, other in zip(more["policies"], result["policies"], strict=True):
            for metric, found in one["metrics"].items():
                assert found["mean"] == pytest.approx(other["metrics"][metric]["mean"], abs=1e-4)
        # Fewer budgets take nothing away.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dynadepth_search.evaluation.outcome_cache.score_outcomes", _never)
            _evaluate(model, routers, front, tmp_path / "a", config=replace(CONFIG, budgets=(0.7,)))
        assert _pairs(tmp_path / "a") == both

    def test_another_policy_scores_its_own_plans_alone(
        self, model: Any, routers: Any, front: Front, tmp_path: Path
    ) -> None:
        config = replace(CONFIG, budgets=(0.9,))
        _evaluate(model, routers, front, tmp_path, config=config)
        first = _pairs(tmp_path)
        other = random_routers(
            num_layers=LAYERS,
            fingerprint=fingerprint(model),
            calibration=routers.calibration,
            seed=9,
        )
        _evaluate(model, routers, front, tmp_path, config=config, presets={"other": other})
        second = _pairs(tmp_path)
        assert {pair: second[pair] for pair in first} == first
        assert 0 < len(second) - len(first) <= len(HELDOUT.examples)

    def test_a_prompt_depends_on_no_other(
        self, model: Any, routers: Any, front: Front, tmp_path: Path
    ) -> None:
        """Fewer prompts, more prompts, another order: to the bit what all of them give at once."""
        scorer = Scorer(model, word_tokenizer())
        plans = np.stack([plan for plan in front.plans for _ in HELDOUT.examples])
        sets = dict(enumerate(plans.reshape(len(front.plans), -1, LAYERS)))
        quiet: Any = lambda done, total: None  # noqa: E731

        def score(folder: str, rows: list[int]) -> Any:
            task = Task("t", tuple(HELDOUT.examples[row] for row in rows))
            cache = OutcomeCache(scorer, task, tmp_path / folder)
            return cache.score({str(k): v[rows] for k, v in sets.items()}, progress=quiet)

        every = list(range(10))
        whole = score("a", every)
        score("b", [7, 2])
        score("b", [2, 3, 9])
        for rows in ([4, 9, 2], every, every[::-1]):
            table = score("b", rows)
            for metric, values in whole.values.items():
                np.testing.assert_array_equal(table.values[metric], values[:, rows])

    @pytest.mark.parametrize("after", [0, 1, 4, 9])
    def test_killed_after_any_prompt_it_ends_alike(
        self, model: Any, routers: Any, front: Front, tmp_path: Path, after: int
    ) -> None:
        def stop(what: str, done: int, total: int) -> None:
            if what == "scoring held-out prompts" and done == after:
                raise KeyboardInterrupt

        config = replace(CONFIG, budgets=(0.9,))
        with pytest.raises(KeyboardInterrupt):
            _evaluate(model, routers, front, tmp_path / "a", config=config, progress=stop)
        one = _evaluate(model, routers, front, tmp_path / "a", config=config)
        two = _evaluate(model, routers, front, tmp_path / "b", config=config)
        assert _untimed(one) == _untimed(two)
        assert _outcomes(tmp_path / "a") == _outcomes(tmp_path / "b")

    def test_outcomes_of_another_dtype_or_model_are_refused(
        self, model: Any, routers: Any, front: Front, tmp_path: Path
    ) -> None:
        _evaluate(model, routers, front, tmp_path)
        before = (tmp_path / "outcomes.jsonl").read_bytes()
        other = tiny_model(num_layers=LAYERS, dtype=torch.float32).to(torch.bfloat16)
        with pytest.raises(LabelError, match='made with dtype = "float32", but now .*bfloat16'):
            _evaluate(other, routers, front, tmp_path)
        stranger = tiny_model(num_layers=LAYERS, seed=5, dtype=torch.float32)
        with pytest.raises(LabelError, match="outcomes.jsonl was made with base_model = "):
            OutcomeCache(Scorer(stranger, word_tokenizer()), HELDOUT, tmp_path / "outcomes.jsonl")
        prompts = Task("prompts", (Example("the prompt"),))
        with pytest.raises(LabelError, match='made with kind = "choices", but now it is "prompt"'):
            _evaluate(model, routers, front, tmp_path, heldout=prompts)
        assert (tmp_path / "outcomes.jsonl").read_bytes() == before

    def test_outcomes_of_another_form_of_a_prompt_are_not_taken(
        self, model: Any, front: Front, tmp_path: Path
    ) -> None:
        tokenizer = word_tokenizer()
        tokenizer.chat_template = "{{ messages[0]['content'] }} user"
        answered = tuple(replace(each, answer=1 - (each.answer or 0)) for each in HELDOUT.examples)
        tasks = [
            HELDOUT,
            as_chat(HELDOUT, tokenizer),
            replace(HELDOUT, scoring="letter"),
            replace(HELDOUT, scoring="normalized"),
            replace(HELDOUT, examples=answered),
        ]
        path = tmp_path / "outcomes.jsonl"
        plans = np.tile(front.plans[2], (10, 1))
        for number, task in enumerate(tasks, start=1):
            scorer = Scorer(model, tokenizer, task.scoring, chat=task.chat)
            found = OutcomeCache(scorer, task, path).score(
                {"a": plans}, progress=lambda done, total: None
            )
            assert len(_pairs(tmp_path)) == 10 * number
            fresh = OutcomeCache(scorer, task, tmp_path / f"{number}.jsonl").score(
                {"a": plans}, progress=lambda done, total: None
            )
            for metric, values in fresh.of("a").items():
                np.testing.assert_array_equal(found.of("a")[metric], values)

    def test_a_worker_with_shortcuts_leaves_them_out_for_plain_plans(
        self, model: Any, front: Front, tmp_path: Path
    ) -> None:
        quiet: Any = lambda done, total: None  # noqa: E731
        tokenizer, maps = word_tokenizer(), random_shortcuts(model)
        loaded = Loaded(model, tokenizer, maps)
        sets = {"a": np.tile(front.plans[2], (len(HELDOUT.examples), 1))}
        found = {}
        for name, shortcuts in (("with", maps), ("plain", None)):
            scorer = Scorer(model, tokenizer, shortcuts=shortcuts)
            here = OutcomeCache(scorer, HELDOUT, tmp_path / f"{name}-here.jsonl")
            there = OutcomeCache(
                scorer,
                HELDOUT,
                tmp_path / f"{name}-there.jsonl",
                runner=LocalRunner(),
                loaded=loaded,
            )
            found[name] = here.score(sets, progress=quiet).of("a")["preserve"]
            there.score(sets, progress=quiet)
            written = [tmp_path / f"{name}-{place}.jsonl" for place in ("here", "there")]
            assert written[0].read_bytes() == written[1].read_bytes()
        assert (found["with"] != found["plain"]).any()

    def test_a_worker_whose_outcomes_would_be_others_is_refused(
        self, model: Any, front: Front, tmp_path: Path
    ) -> None:
        """As on another kind of device; here it is the size of a sweep."""
        scorer = Scorer(model, word_tokenizer(), sweep_tokens=99)
        cache = OutcomeCache(scorer, HELDOUT, tmp_path / "outcomes.jsonl", runner=LocalRunner())
        sets = {"a": np.tile(front.plans[2], (len(HELDOUT.examples), 1))}
        with pytest.raises(
            RunnerError, match="outcomes are kept for limits .* give the driver a -"
        ):
            cache.score(sets, progress=lambda done, total: None)

    def test_two_in_one_folder(
        self, model: Any, routers: Any, front: Front, tmp_path: Path
    ) -> None:
        def other(what: str, done: int, total: int) -> None:
            if what == "scoring held-out prompts" and done == 3:
                with pytest.raises(LabelError, match="another process is writing to .*; wait"):
                    _evaluate(model, routers, front, tmp_path)
                refused.append(done)

        refused: list[int] = []
        _evaluate(model, routers, front, tmp_path, progress=other)
        assert refused == [3]
        assert len(_outcomes(tmp_path)) == 1 + len(HELDOUT.examples)

    def test_an_older_file_says_so(
        self, model: Any, routers: Any, front: Front, tmp_path: Path
    ) -> None:
        path = tmp_path / "outcomes.jsonl"
        path.write_text('{"spec": "abc"}\n{"prompt_id": "a", "preserve": [0.0]}\n')
        with pytest.raises(LabelError, match="written by an older dynadepth, .*: delete the file"):
            _evaluate(model, routers, front, tmp_path)


def _never(*_arguments: Any, **_others: Any) -> Any:
    raise AssertionError("nothing is left to score")


@pytest.mark.parametrize("name", ["routed", "Random", "ShortGPT"])
def test_a_preset_cannot_take_the_name_of_something_else(
    name: str, model: Any, routers: Any, front: Front, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"routers to compare are named '{name}'.*rename"):
        _evaluate(model, routers, front, tmp_path, presets={name: routers})
    assert list(tmp_path.iterdir()) == []


def test_routers_to_compare_cannot_have_the_name_of_those_under_test(
    model: Any, routers: Any, front: Front, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="named 'routers', like those under test; rename"):
        _evaluate(model, routers, front, tmp_path, presets={"routers": routers})
    assert list(tmp_path.iterdir()) == []


def test_routers_of_another_task_than_the_labels(routers: Any) -> None:
    task = {"name": "piqa", "sha256": "a" * 64}
    check_trained_on({"a/routers": routers}, task)  # records nothing
    own = replace(routers, training={"task": dict(task)})
    check_trained_on({"a/routers": own}, task)
    other = replace(routers, training={"task": {"name": "arc", "sha256": "b" * 64}})
    with pytest.raises(
        LabelError,
        match="routers b were trained on task 'arc' .sha256 bbbbbbbbbbbb., but .* 'piqa'.*give --labels",
    ):
        check_trained_on({"a/routers": own, "b": other}, task)


def test_training_that_ended_in_its_warm_up_is_said_so(
    model: Any, routers: Any, front: Front, tmp_path: Path
) -> None:
    def trained(prompts: int) -> Any:
        recipe = TrainConfig.for_preset("drllm").to_dict()
        return replace(routers, training={"recipe": recipe, "train_prompts": prompts})

    # 25 epochs of 16 prompts a step: 320 prompts are 500 steps, one more is 525.
    presets = {"few": trained(320), "many": trained(321)}
    config = replace(CONFIG, budgets=(0.9,))
    result = _evaluate(model, routers, front, tmp_path, presets=presets, config=config)
    notes = [finding for finding in result["findings"] if "warm-up" in finding]
    assert notes == [
        "The training of few ended inside its warm-up: 500 steps on 320 prompts, 500 steps of warm-up."
    ]


def test_outcomes_of_other_plans_are_not_taken(model: Any, tmp_path: Path) -> None:
    scorer, path = Scorer(model, word_tokenizer()), tmp_path / "outcomes.jsonl"
    task = Task("prompts", tuple(Example(f"the prompt {index}") for index in range(6)))
    plans = np.tile(identity_plan(LAYERS), (6, 1))
    quiet: Any = lambda done, total: None  # noqa: E731
    first = OutcomeCache(scorer, task, path).score({"a": plans}, progress=quiet)
    plans[:, 2] = 0
    second = OutcomeCache(scorer, task, path).score({"a": plans}, progress=quiet)
    assert (first.of("a")["preserve"] == 0.0).all()
    assert (second.of("a")["preserve"] < 0.0).all()


def test_a_task_without_answers_has_two_metrics(
    model: Any, routers: Any, front: Front, tmp_path: Path
) -> None:
    prompts = Task("prompts", tuple(Example(f"the prompt {index}") for index in range(6)))
    train = Task("train", (Example("the other"),))
    result = _evaluate(model, routers, front, tmp_path, heldout=prompts, train=train)
    assert set(result["policies"][1]["metrics"]) == {"preserve", "agreement"}
    with pytest.raises(
        ConfigError, match="objective 'reward' needs answers; use objective 'preserve'"
    ):
        _evaluate(model, routers, front, tmp_path, heldout=prompts, train=train, objective="reward")


def test_another_preset_that_reaches_less_is_left_out_with_a_note(
    model: Any, routers: Any, front: Front, tmp_path: Path
) -> None:
    narrow = Calibration(lambdas=(0.5, 0.0), depths=(0.85, 1.0), lowest=0.85, highest=1.0)
    preset = random_routers(
        num_layers=LAYERS, fingerprint=fingerprint(model), calibration=narrow, seed=3
    )
    result = _evaluate(model, routers, front, tmp_path, presets={"drllm": preset})
    names = [policy["name"] for policy in result["policies"]]
    assert "drllm 0.90" in names
    assert "drllm 0.70" not in names
    assert any(
        finding.startswith("drllm 0.70 was left out: budget 0.7") for finding in result["findings"]
    )


def _hashes(first: int, count: int) -> list[str]:
    return prompt_hashes(_task("x", first, count).examples)


@pytest.mark.parametrize("key", ["prompt_hashes", "plan_prompt_hashes"])
@pytest.mark.parametrize("where", ["given", "preset"])
def test_prompts_that_trained_a_policy_or_chose_its_plans_are_not_held_out(
    model: Any, routers: Any, front: Front, tmp_path: Path, key: str, where: str
) -> None:
    stained = replace(routers, training={key: _hashes(7, 8)})
    changes = {"routers": stained} if where == "given" else {"presets": {"other": stained}}
    name = "routers" if where == "given" else "other"
    with pytest.raises(TaskError, match=f"of 10 .*: 3 in the training of {name}; give prompts"):
        _evaluate(model, **{"routers": routers, "front": front, "folder": tmp_path, **changes})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["prompt_hashes", "plan_prompt_hashes"])
@pytest.mark.parametrize("value", [3, "abc", [["a"]], [None], {"a": 1}, None])
def test_a_damaged_memory_of_the_training_prompts_is_none(
    model: Any, routers: Any, front: Front, tmp_path: Path, key: str, value: Any
) -> None:
    damaged = replace(routers, training={key: value})
    with pytest.raises(
        CheckpointError,
        match=f"the training of routers is damaged .{key}.* is .*; expected a .*train",
    ):
        _evaluate(model, damaged, front, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_prompts_that_chose_the_static_plans_are_not_held_out(
    model: Any, routers: Any, front: Front, tmp_path: Path
) -> None:
    seen = {"the plans in a": _hashes(8, 10), "the scores in b": _hashes(9, 1), "c": _hashes(90, 5)}
    with pytest.raises(TaskError, match=r": 2 in the plans in a, 1 in the scores in b; give"):
        _evaluate(model, routers, front, tmp_path, seen=seen)
    assert list(tmp_path.iterdir()) == []


def test_unseen_prompts_must_be_unseen(
    model: Any, routers: Any, front: Front, tmp_path: Path
) -> None:
    for unseen, words in (
        (_task("x", 53, 9), "3 in the training task"),
        (_task("x", 200, 4), "4 in a"),
    ):
        with pytest.raises(
            TaskError, match=f"different unseen prompts, some took part .*: {words}"
        ):
            _evaluate(model, routers, front, tmp_path, unseen=unseen, seen={"a": _hashes(200, 4)})
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_say_who_took_part_is_named(
    model: Any, routers: Any, front: Front, tmp_path: Path
) -> None:
    known = replace(routers, training={"prompt_hashes": _hashes(90, 5)})
    config = replace(CONFIG, budgets=(0.9,))
    result = _evaluate(model, known, front, tmp_path / "a", config=config, seen={"p": []})
    assert not any("recorded" in finding for finding in result["findings"])
    result = _evaluate(model, routers, front, tmp_path / "b", config=config, seen={"p": None})
    assert [finding for finding in result["findings"] if "recorded" in finding] == [
        "It is not recorded which prompts took part in p, the training of routers: nobody has checked that none of "
        "the held-out ones did."
    ]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"heldout": _task("x", 48, 4)},
            TaskError,
            "2 of 4 held-out prompts are training prompts too",
        ),
        ({"objective": "fidelity"}, ConfigError, "objective 'fidelity' is unknown"),
        ({"config": EvaluationConfig(budgets=(0.3,))}, BudgetError, "0.4 to 1"),
        ({"config": EvaluationConfig(budgets=(float("nan"),))}, BudgetError, "budget nan"),
    ],
)
def test_what_cannot_be_evaluated_leaves_nothing(
    model: Any, routers: Any, front: Front, tmp_path: Path, changes: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        _evaluate(model, routers, front, tmp_path, **changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("budgets", "message"), [((), "no budgets"), ((0.9, 0.9), "name one twice")]
)
def test_budgets_that_make_no_evaluation(budgets: tuple[float, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EvaluationConfig(budgets=budgets)


def test_a_model_that_overflows_is_an_error(tmp_path: Path) -> None:
    broken = tiny_model(num_layers=LAYERS, dtype=torch.float32)
    with torch.no_grad():
        broken.model.layers[2].mlp.down_proj.weight.fill_(float("nan"))
    scorer = Scorer(broken, word_tokenizer())
    plans = np.tile(identity_plan(LAYERS), (len(HELDOUT.examples), 1))
    path = tmp_path / "outcomes.jsonl"
    with pytest.raises(
        SearchError, match="has reward nan under plan 111111; expected a finite number"
    ):
        OutcomeCache(scorer, HELDOUT, path).score({"a": plans}, progress=lambda done, total: None)
    assert len(_outcomes(tmp_path)) == 1


def test_a_damaged_evaluation_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_evaluation(tmp_path)
    (tmp_path / "evaluation.json").write_text('{"schema_version": 2')
    with pytest.raises(ConfigError, match="is not JSON"):
        read_evaluation(tmp_path)
    (tmp_path / "evaluation.json").write_text(json.dumps({"schema_version": 1}))
    with pytest.raises(
        ConfigError, match="has schema version 1; this dynadepth reads 2: evaluate again"
    ):
        read_evaluation(tmp_path)


class TestMenu:
    """A menu under test, routers beside it, and prompts of another kind."""

    UNSEEN = Task("elsewhere", tuple(Example(f"{'no ' * (i % 5)}the end {i}") for i in range(7)))

    @pytest.fixture(scope="class")
    def menu(self, model: Any, routers: Any) -> Any:
        return random_menu(
            layers=(2,),
            hidden_size=32,
            seed=2,
            fingerprint=fingerprint(model),
            calibration=routers.calibration,
            training={"recipe": {"layers": [2], "rank": 16}, "task": {"name": "train"}},
        )

    @pytest.fixture(scope="class")
    def result(
        self,
        model: Any,
        menu: Any,
        routers: Any,
        front: Front,
        tmp_path_factory: pytest.TempPathFactory,
    ) -> dict[str, Any]:
        return _evaluate(
            model,
            menu,
            front,
            tmp_path_factory.mktemp("menu"),
            presets={"routers": routers},
            unseen=self.UNSEEN,
        )

    def test_the_menu_is_under_test_and_the_routers_are_compared(
        self, result: dict[str, Any]
    ) -> None:
        kinds = {policy["name"]: policy["kind"] for policy in result["policies"]}
        assert kinds["menu 0.90"] == kinds["menu 0.70"] == "routed"
        assert kinds["routers 0.90"] == kinds["routers 0.70"] == "preset"
        assert result["routers"] == {"kind": "menu", "range": [0.4, 1.0], "layers": [2], "rank": 16}
        assert set(result["runtime_check"]) == {"menu 0.90", "menu 0.70"}
        assert [action["budget"] for action in result["actions"]] == [0.9, 0.7]

    def test_to_preserve_is_measured_by_agreement(
        self, model: Any, menu: Any, front: Front, result: dict[str, Any], tmp_path: Path
    ) -> None:
        assert (result["schema_version"], result["headline"]) == (2, "agreement")
        graded = _evaluate(model, menu, front, tmp_path, objective="reward")
        assert graded["headline"] == "reward"

    def test_the_map_shows_which_prompts_got_which_plan(
        self, model: Any, menu: Any, result: dict[str, Any]
    ) -> None:
        scorer = Scorer(model, word_tokenizer())
        texts = {" ".join(example.prompt.split()) for example in HELDOUT.examples}
        for mapped, budget in zip(result["plan_map"], (0.9, 0.7), strict=True):
            plans = {}
            wrap_model(model, budget=budget, routers=menu)
            for example in HELDOUT.examples:
                ids, mask = scorer.encode_prompts([example])
                with torch.inference_mode():
                    model(input_ids=ids, attention_mask=mask)
                plans[" ".join(example.prompt.split())] = plan_text(model.dynadepth.last_plans[0])
            unwrap_model(model)
            assert mapped["budget"] == budget
            assert mapped["different_plans"] == len(set(plans.values())) == len(mapped["rows"])
            shares = [row["share"] for row in mapped["rows"]]
            assert shares == sorted(shares, reverse=True)
            assert sum(shares) == pytest.approx(1.0)
            for row in mapped["rows"]:
                got = [text for text, plan in plans.items() if plan == row["plan"]]
                assert row["share"] == pytest.approx(len(got) / len(plans))
                assert row["depth"] == pytest.approx(plan_depth(parse_plan(row["plan"], LAYERS)))
                assert row["examples"] == got[:2]
                assert set(row["examples"]) <= texts

    def test_the_depth_of_prompts_of_another_kind_is_told(
        self, model: Any, menu: Any, result: dict[str, Any]
    ) -> None:
        scorer = Scorer(model, word_tokenizer())
        assert [row["budget"] for row in result["drift"]] == [0.9, 0.7]
        for row in result["drift"]:
            wrap_model(model, budget=row["budget"], routers=menu)
            depths = []
            for example in self.UNSEEN.examples:
                ids, mask = scorer.encode_prompts([example])
                with torch.inference_mode():
                    model(input_ids=ids, attention_mask=mask)
                depths.append(float(model.dynadepth.last_plans.sum() / LAYERS))
            unwrap_model(model)
            assert (row["n"], row["task"]) == (7, "elsewhere")
            assert row["depth"] == pytest.approx(np.mean(depths))
        (finding,) = (text for text in result["findings"] if "another kind" in text)
        shown = [f"{row['depth']:.3f} for {row['budget']:.2f}" for row in result["drift"]]
        assert finding.startswith("On 7 prompts of another kind (elsewhere)")
        assert finding.endswith(f"the mean depth is {shown[0]}, {shown[1]}.")


def test_without_prompts_of_another_kind_nothing_is_said_of_them(result: dict[str, Any]) -> None:
    assert result["drift"] == []
    assert not any("another kind" in finding for finding in result["findings"])


def test_a_long_prompt_is_cut_in_the_map(
    model: Any, routers: Any, front: Front, tmp_path: Path
) -> None:
    long = Task("heldout", tuple(Example(f"{i} {'the ' * 20}\n\tend") for i in range(4)))
    train = Task("train", (Example("the other"),))
    result = _evaluate(model, routers, front, tmp_path, heldout=long, train=train)
    texts = [text for row in result["plan_map"][0]["rows"] for text in row["examples"]]
    assert texts
    whole = [" ".join(example.prompt.split()) for example in long.examples]
    assert all(len(text) <= 90 and "\n" not in text for text in texts)
    assert set(texts) <= set(whole) | {f"{text[:87]}..." for text in whole}
