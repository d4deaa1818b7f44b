"""Exits from the command line: train, inspect, generate; and `eval`, which refuses them."""

import json

import pytest

from dynadepth.checkpoints.save_load import save_policy
from dynadepth.cli import main as cli
from tests.tiny_exits import PROMISES, random_exits

pytestmark = pytest.mark.usefixtures("search_verbs")


@pytest.fixture
def folder(tmp_path):
    training = {"train_prompts": 28, "tokens": 900, "passes of layers": {"1": 0.8, "1,2": 0.7}}
    return save_policy(tmp_path / "exits", random_exits(training=training))


def run(capsys, *argv):
    capsys.readouterr()
    code = cli.main([str(each) for each in argv])
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    return code, shown.out, shown.err


def test_from_prompts_to_text(tiny_base, tmp_path, capsys):
    task, out = tmp_path / "train.txt", tmp_path / "exits"
    task.write_text("".join(f"the river {number} is deep\n" for number in range(30)))
    train = ["train", "--policy", "exits", "--model", tiny_base, "--task", task, "--out", out]
    train += ["--exit-layers", "1,2", "--new-tokens", 8, "--json"]
    code, printed, err = run(capsys, *train)
    assert code == 0, err
    said = json.loads(printed)
    assert (said["policy"], said["exit_layers"]) == ("exits", "1,2")
    assert said["train_prompts"] + said["validation_prompts"] == 30
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exits", "train.txt"]
    names = {"README.md", "router_config.json", "routers.onnx", "routers.safetensors"}
    assert {path.name for path in out.iterdir()} == names
    generate = ["generate", "--model", tiny_base, "--routers", out, "--prompt", "snow", "--json"]
    generate += ["--budget", said["lowest_budget"], "--max-new-tokens", 12]
    found = []
    for backend in ("torch", "onnx"):
        code, printed, err = run(capsys, *generate, "--router-backend", backend)
        assert code == 0, err
        found.append(json.loads(printed))
    assert found[0]["text"] == found[1]["text"]
    assert min(found[0]["layers_run"]) < 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "--policy exits needs --task"),
        (("--task", "{task}", "--protect", "1"), "leave out --protect"),
        (("--task", "{task}", "--exit-layers", "7"), "exit layer 7"),
        (("--task", "{task}"), "20 or more"),
    ],
)
def test_wrong_trainings_say_so(tiny_base, tmp_path, capsys, more, message):
    task = tmp_path / "few.txt"
    task.write_text("why\nsnow\n")
    argv = ["train", "--policy", "exits", "--model", tiny_base, "--out", tmp_path / "exits"]
    code, _, err = run(capsys, *argv, *(each.format(task=task) for each in more))
    assert code in (1, 2)
    assert message in " ".join(err.split())
    assert not (tmp_path / "exits").exists()


def test_it_shows_every_threshold(folder, capsys, tmp_path):
    page = tmp_path / "page.html"
    assert cli.main(["inspect", str(folder), "--html", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "before layer 1 and layer 2 of 4" in " ".join(shown.split())
    for passes, kept in zip(PROMISES.passes[1:], PROMISES.kept[1:], strict=True):
        assert f"{passes:.3f}" in shown
        assert f"{100 * kept:.2f}" in shown
    assert "1,2" in page.read_text()


def test_json_has_the_figures(folder, capsys, tmp_path):
    argv = ["inspect", str(folder), "--html", str(tmp_path / "page.html"), "--json"]
    assert cli.main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["policy"], found["exit_layers"]) == ("routers", "exits", [1, 2])
    assert [row["passes"] for row in found["promises"]] == list(PROMISES.passes[1:])


def test_eval_says_that_they_plan_nothing(folder, capsys, tmp_path):
    task = tmp_path / "task.txt"
    task.write_text("why\n")
    argv = ["eval", "--model", "none", "--routers", str(folder), "--task", str(task)]
    assert cli.main([*argv, "--out", str(tmp_path / "report")]) == 1
    assert "plan no prompt" in " ".join(capsys.readouterr().err.split())
