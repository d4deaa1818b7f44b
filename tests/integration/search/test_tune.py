"""The verbs of tuning, as a model owner runs them: a study, a part of it again, its policy; and bad input."""

import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dynadepth import load_policy, unwrap_model, wrap_model
from dynadepth.cli import main as cli
from dynadepth.models.loading import load_model
from dynadepth_search.scoring.score_table import read_scores
from tests.integration.search.test_cli import run, write_task

pytestmark = pytest.mark.usefixtures("search_verbs")


@pytest.fixture(scope="module")
def place(tiny_deep_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `my-model`, the scores of a menu, and those of all subsets of three layers."""
    folder = tmp_path_factory.mktemp("tuner")
    shutil.copytree(tiny_deep_base, folder / "my-model")
    write_task(folder / "train.jsonl", 0, 40)
    write_task(folder / "few.jsonl", 0, 20)
    given = ["--model", f"{folder}/my-model"]
    train, few = ["--task", f"{folder}/train.jsonl"], ["--task", f"{folder}/few.jsonl"]
    with pytest.MonkeyPatch.context() as patch:
        entry = importlib.metadata.EntryPoint(
            "search", "dynadepth_search.cli.main:register", "dynadepth.commands"
        )
        patch.setattr(cli, "entry_points", lambda *, group: [entry])
        plans = ["search", "static", *given, *train, "--out", f"{folder}/plans"]
        for argv in (
            [*plans, "--min-depth", "0.8", "--size", "4", "--beam", "2"],
            ["score", *given, *train, "--plans", f"{folder}/plans", "--out", f"{folder}/scores"],
            ["score", *given, *few, "--subsets", "5,7,8", "--out", f"{folder}/subsets"],
        ):
            assert cli.main(argv) == 0
    return folder


def tune(place: Path, *more: Any, what: str = "menu", study: str = "study") -> list[Any]:
    scores = {"menu": "scores", "search": "subsets"}[what]
    return ["tune", what, "--scores", place / scores, "--study", place / study, *more]


def test_all_subsets_are_scored(place: Path) -> None:
    table = read_scores(place / "subsets")
    assert len(table.plans) == 8
    assert set(map(tuple, table.plans[:, [5, 7, 8]])) == {
        (a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)
    }
    assert (table.plans[0] == 1).all()
    assert table.plan_prompt_hashes == ()


def test_a_study_of_a_menu_goes_on_and_becomes_a_policy(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = tune(place, "--objective-at", 0.9, "--json")
    code, out, err = run(capsys, *argv, "--trials", 2)
    assert code == 0, err
    assert json.loads(out)["complete"] == 2
    assert "trials: 0/2" in err
    code, out, err = run(capsys, *argv, "--trials", 4)
    assert code == 0, err
    found = json.loads(out)
    assert (found["complete"], found["running"], found["fail"]) == (4, 0, 0)
    assert found["difference_low"] <= found["difference_mean"] <= found["difference_high"]
    assert Path(found["report"]).read_text().startswith("<!DOCTYPE html>")
    apply = ["tune", "--apply", place / "study", "--out", place / "my-model" / "routers", "--json"]
    code, out, err = run(capsys, *apply)
    assert code == 0, err
    applied = json.loads(out)
    assert applied["trial"] == found["best_trial"]
    assert applied["rank"] == found["rank"]
    model = load_model(place / "my-model")
    policy = load_policy(place / "my-model" / "routers", model=model)
    assert policy.training["tuned"]["trial"] == applied["trial"]
    assert policy.training["folders"]["scores"] == "../../scores"
    wrap_model(model, budget=0.95)
    unwrap_model(model)
    # Another trial, by its number.
    code, out, err = run(capsys, *apply, "--trial", 0)
    assert code == 0, err
    assert json.loads(out)["default_settings"] is True


def test_a_study_with_two_goals_is_applied_at_a_depth(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, err = run(
        capsys, *tune(place, "--trials", 4, "--sampler", "random", "--json", study="both")
    )
    assert code == 0, err
    assert json.loads(out)["pareto_front"] >= 1
    apply = ["tune", "--apply", place / "both", "--out", tmp_path / "routers"]
    code, _, err = run(capsys, *apply)
    assert code == 1
    assert "--at-depth" in err
    code, _, err = run(capsys, *apply, "--at-depth", 0.9)
    assert code == 0, err
    assert load_policy(tmp_path / "routers").training["tuned"]["params"]["depth"] <= 1


def test_a_study_of_the_search_compares_on_the_other_half(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    argv = tune(place, "--trials", 3, "--evaluations", 5, what="search", study="searches")
    code, out, err = run(capsys, *argv)
    assert code == 0, err
    assert "verdict: 3 trials" in out
    assert "exploration" in out
    code, _, err = run(capsys, "tune", "--apply", place / "searches", "--out", tmp_path / "x")
    assert code == 1
    assert "expected one of `tune menu`" in err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["tune"], 2, "name what to tune"),
        (["tune", "--apply", "study"], 2, "give --apply and --out"),
        (["tune", "--apply", "nowhere", "--out", "x"], 1, "tune menu"),
        (["tune", "--out", "x", "menu", "--scores", "scores", "--study", "s"], 2, "stand without"),
        (["tune", "menu", "--scores", "nowhere", "--study", "s"], 1, "nowhere"),
        (["tune", "menu", "--scores", "scores", "--study", "s", "--trials", "0"], 2, "trials"),
        (["tune", "menu", "--scores", "scores", "--study", "s", "--objective-at", "0.1"], 1, "0.1"),
        (["tune", "menu", "--scores", "subsets", "--study", "s"], 1, "no states"),
        (["tune", "search", "--scores", "scores", "--study", "s"], 1, "score --subsets"),
        (["score", "--model", "m", "--task", "t", "--out", "o"], 2, "one of --plans and --subsets"),
        (
            [
                "score",
                "--model",
                "m",
                "--task",
                "t",
                "--out",
                "o",
                "--plans",
                "p",
                "--subsets",
                "1",
            ],
            2,
            "one of --plans and --subsets",
        ),
        (
            [
                "score",
                "--model",
                "my-model",
                "--task",
                "few.jsonl",
                "--out",
                "o",
                "--subsets",
                "99,1",
            ],
            1,
            "expected 2 to 9 layers from 0 to 9",
        ),
    ],
)
def test_bad_input(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    code: int,
    says: str,
) -> None:
    monkeypatch.chdir(place)
    found, _, err = run(capsys, *argv)
    assert found == code, err
    assert says in " ".join(err.replace("│", " ").split())
    assert not (place / "s").exists()
    assert not (place / "o").exists()
