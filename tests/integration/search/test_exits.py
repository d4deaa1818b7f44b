"""Exits from the command line: train, inspect, generate and eval."""

import html
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from dynadepth import unwrap_model, wrap_model
from dynadepth.checkpoints.save_load import save_policy
from dynadepth.cli import main as cli
from dynadepth.models.fingerprint import fingerprint
from dynadepth.models.loading import load_model, load_tokenizer
from dynadepth_search.data.splits import prompt_hashes
from dynadepth_search.data.tasks import Example
from dynadepth_search.exits.judging import evaluating
from tests.tiny_exits import PROMISES, random_exits
from tests.tiny_menus import random_menu

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


@pytest.fixture
def trained(tiny_base, tmp_path):
    """Exits of the tiny model, some held-out prompts, and static plans from others."""
    model = load_model(str(tiny_base))
    save_policy(tmp_path / "exits", random_exits(model, answers=PROMISES))
    heldout = tmp_path / "heldout.txt"
    heldout.write_text("".join(f"why is {word}\n" for word in ("snow", "red", "it deep", "1")))
    others = tmp_path / "others.txt"
    others.write_text("".join(f"the river {number} is deep\n" for number in range(44)))
    argv = ["search", "static", "--model", tiny_base, "--task", others]
    argv += ["--size", 2, "--min-depth", 0.5, "--out", tmp_path / "plans"]
    assert cli.main([str(each) for each in argv]) == 0
    return tmp_path


def by_hand(base, folder, prompts, new_tokens, **promise):
    """Return passes, kept and identical of each answer, from the model's own forwards, one prompt at a time."""
    model, tokenizer = load_model(str(base)), load_tokenizer(str(base))
    rows = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        given = {"max_new_tokens": new_tokens, "do_sample": False}
        own = model.generate(ids, **given)
        wrap_model(model, routers=folder / "exits", **promise)
        text = model.generate(ids, **given)
        passes, run = model.dynadepth.exit_totals.passes, model.dynadepth.last_layers_run
        unwrap_model(model)
        choices = model(text).logits.argmax(dim=-1)[0, ids.shape[1] : -1]
        new = text[0, ids.shape[1] + 1 :]
        early = torch.as_tensor(run[0, : len(new)]) < 4
        changed = float((early & (choices != new)).float().mean())
        rows.append((passes, 1 - changed, torch.equal(text, own)))
    return rows


def test_eval_measures_what_a_user_would(tiny_base, trained, capsys):
    out = trained / "report"
    argv = ["eval", "--model", tiny_base, "--routers", trained / "exits", "--out", out]
    argv += ["--task", trained / "heldout.txt", "--plans", trained / "plans", "--new-tokens", 9]
    argv += ["--budget", 0.8, "--budget", 0.65, "--fidelity", 0.2, "--json"]
    code, printed, err = run(capsys, *argv)
    assert code == 0, err
    found = json.loads(printed)["exit_evaluation"]
    assert [(row["dial"], row["value"]) for row in found["rows"]] == [
        ("budget", 0.8),
        ("budget", 0.65),
    ]
    assert "fidelity 0.2" in found["refused"][0]
    prompts = (trained / "heldout.txt").read_text().splitlines()
    for row in found["rows"]:
        expected = by_hand(tiny_base, trained, prompts, 9, budget=row["value"])
        for name, values in zip(
            ("passes", "kept", "identical"), zip(*expected, strict=True), strict=True
        ):
            assert row[name]["mean"] == pytest.approx(sum(values) / len(values), abs=1e-9)
        assert row["time"]["batches"] >= 1
    # Something was changed, or the figures would say nothing.
    assert found["rows"][1]["kept"]["mean"] < 1
    static = found["rows"][1]["static"]
    depths = [sum(map(int, plan)) / 4 for plan in static["plans"]]
    mixed = sum(d * s for d, s in zip(depths, static["shares"], strict=True))
    assert mixed == pytest.approx(found["rows"][1]["passes"]["mean"])
    text = "".join(piece for piece, _ in found["examples"][0]["answers"][1])
    page = (out / "report.html").read_text()
    assert html.escape(text[:8]) in re.sub(r"</?span[^>]*>", "", page)
    assert "before layer" in page

    # The page is drawn again from the file, by two verbs.
    (out / "report.html").unlink()
    assert run(capsys, "report", "--run", out)[0] == 0
    assert (out / "report.html").read_text() == page
    code, shown, _ = run(capsys, "inspect", out, "--html", trained / "page.html")
    assert code == 0
    assert "budget 0.65" in shown
    assert (trained / "page.html").read_text() == page


def answers_by_hand(base, folder, prompts, tokens, **promise):
    """Return depth and whether the answer is the base model's, one prompt at a time; tokens: the choices, or None."""
    model, tokenizer = load_model(str(base)), load_tokenizer(str(base))
    rows = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        own = model(ids).logits[0, -1]
        wrap_model(model, routers=folder / "exits", **promise)
        found = model.dynadepth.answer_prompts(ids)
        unwrap_model(model)
        both = [each if tokens is None else each[tokens] for each in (own, found.logits[0])]
        rows.append((found.layers_run[0] / 4, both[0].argmax() == both[1].argmax()))
    return [sum(float(each) for each in column) / len(rows) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("kind", ["prompt", "choices"])
def test_eval_answers_prompts_with_one_token(tiny_base, trained, capsys, kind):
    out, task, tokens, prompts = trained / "report", trained / "heldout.txt", None, None
    more, budgets = [], (0.9, 0.75, 0.6)
    if kind == "choices":
        lines = [
            {"prompt": text, "choices": ["up", "down", "on"], "answer": 1}
            for text in task.read_text().splitlines() * 3
        ]
        lines = [{**line, "prompt": f"{line['prompt']} {n}"} for n, line in enumerate(lines)]
        task = trained / "heldout.jsonl"
        task.write_text("".join(json.dumps(line) + "\n" for line in lines))
        prompts = [f"{line['prompt']}\nA. up\nB. down\nC. on\nAnswer:" for line in lines]
        tokenizer = load_tokenizer(str(tiny_base))
        tokens = [tokenizer(f" {each}", add_special_tokens=False).input_ids[-1] for each in "ABC"]
        more = ["--scoring", "letter"]
    argv = ["eval", "--model", tiny_base, "--routers", trained / "exits", "--out", out]
    argv += ["--task", task, "--plans", trained / "plans", "--new-tokens", 3, "--json", *more]
    argv += [each for budget in budgets for each in ("--budget", budget)]
    code, printed, err = run(capsys, *argv)
    assert code == 0, err
    rows = json.loads(printed)["exit_evaluation"]["rows"]
    prompts = prompts or task.read_text().splitlines()
    for row in rows:
        expected = answers_by_hand(tiny_base, trained, prompts, tokens, budget=row["value"])
        found = row["answers"]
        assert [found["depth"]["mean"], found["kept"]["mean"]] == pytest.approx(expected)
    judged = [row["answers"] for row in rows]
    assert {round(each["depth"]["mean"], 3) for each in judged} != {1.0}
    compared = [each for each in judged if each["static"] is not None]
    for each in compared:
        difference = each["kept"]["mean"] - each["static"]["kept"]
        assert each["gain"]["mean"] == pytest.approx(difference)
    assert compared
    assert "Prompts answered with one token" in (out / "report.html").read_text()


def test_eval_compares_with_a_menu_at_equal_passes(tiny_base, trained, capsys):
    model = load_model(str(tiny_base))
    plans = np.array([[1, 1, 1, 1], [1, 1, 0, 1], [1, 0, 1, 0]], dtype=np.uint8)
    menu = random_menu(
        layers=(1,), hidden_size=32, plans=plans, seed=3, fingerprint=fingerprint(model)
    )
    save_policy(trained / "menu", menu)
    argv = ["eval", "--model", tiny_base, "--routers", trained / "exits", "--new-tokens", 9]
    argv += ["--task", trained / "heldout.txt", "--out", trained / "report", "--budget", 0.7]
    code, printed, err = run(capsys, *argv, "--against", trained / "menu", "--json")
    assert code == 0, err
    (row,) = json.loads(printed)["exit_evaluation"]["rows"]
    found = row["against"]["menu"]
    tokenizer = load_tokenizer(str(tiny_base))
    kept = depth = 0.0
    prompts = (trained / "heldout.txt").read_text().splitlines()
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        wrap_model(model, routers=trained / "menu", budget=row["passes"]["mean"])
        text = model.generate(ids, max_new_tokens=9, do_sample=False)
        depth += model.dynadepth.last_mean_depth / len(prompts)
        unwrap_model(model)
        choices = model(text).logits.argmax(dim=-1)[0, ids.shape[1] : -1]
        kept += float((choices == text[0, ids.shape[1] + 1 :]).float().mean()) / len(prompts)
    assert (found["kept"], found["passes"]) == pytest.approx((kept, depth))
    assert found["time"] > 0
    assert row["answers"]["against"]["menu"]["depth"]["n"] == len(prompts)
    page = (trained / "report" / "report.html").read_text()
    assert "Static plans and policies of as many passes" in page
    assert ", menu " in page


def test_an_opponent_that_says_one_token_says_nothing(tiny_base, trained, capsys, monkeypatch):
    judged = evaluating.write_with_plans

    def silent(*given, **how):
        found = judged(*given, **how)
        nothing = {
            name: getattr(found, name)[:0]
            for name in ("prompts", "passes", "kept", "common", "identical")
        }
        return replace(found, **nothing)

    monkeypatch.setattr(evaluating, "write_with_plans", silent)
    argv = ["eval", "--model", tiny_base, "--routers", trained / "exits", "--new-tokens", 3]
    argv += ["--task", trained / "heldout.txt", "--out", trained / "report", "--budget", 0.7]
    code, printed, err = run(capsys, *argv, "--plans", trained / "plans", "--json")
    assert code == 0, err
    assert json.loads(printed)["exit_evaluation"]["rows"][0]["static"] is None


def test_a_promise_of_answers_that_cannot_be_made_says_why(tiny_base, trained, capsys):
    argv = ["eval", "--model", tiny_base, "--routers", trained / "exits", "--new-tokens", 3]
    argv += ["--task", trained / "heldout.txt", "--out", trained / "report", "--fidelity", 0.95]
    code, printed, err = run(capsys, *argv, "--json")
    assert code == 0, err
    (row,) = json.loads(printed)["exit_evaluation"]["rows"]
    assert "needs more held-out prompts than 40" in row["answers"]["refused"]
    assert "needs more held-out prompts" in (trained / "report" / "report.html").read_text()


def test_what_is_not_known_of_answers_is_left_out(tiny_base, trained, capsys):
    save_policy(trained / "exits", random_exits(load_model(str(tiny_base))))
    argv = ["eval", "--model", tiny_base, "--routers", trained / "exits", "--new-tokens", 3]
    argv += ["--task", trained / "heldout.txt", "--out", trained / "report", "--budget", 0.8]
    code, printed, err = run(capsys, *argv, "--json")
    assert code == 0, err
    assert json.loads(printed)["exit_evaluation"]["rows"][0]["answers"] is None
    assert "answered with one token" not in (trained / "report" / "report.html").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--against", "{folder}/exits", "--budget", "0.8"), "which holds exits too"),
        (("--scores", "{folder}/plans"), "leave out --scores"),
        (("--fidelity", "0.2"), "expected a share from"),
        (("--budget", "0.1"), "budget 0.1"),
        (("--fidelity", "1"), "every token is verified"),
        (("--fidelity", "0.9", "--new-tokens", "1"), "--new-tokens"),
    ],
)
def test_wrong_evaluations_say_so(tiny_base, trained, capsys, more, message):
    argv = ["eval", "--model", tiny_base, "--routers", trained / "exits"]
    argv += ["--task", trained / "heldout.txt", "--out", trained / "report"]
    code, _, err = run(capsys, *argv, *(each.format(folder=trained) for each in more))
    assert code in (1, 2)
    assert message in " ".join(err.split())
    assert not (trained / "report").exists()


def test_prompts_that_took_part_are_not_held_out(tiny_base, trained, capsys):
    prompts = [Example(prompt=f"why is {word}") for word in ("snow", "red", "the sea")]
    exits = random_exits(
        load_model(str(tiny_base)), training={"prompt_hashes": prompt_hashes(prompts)}
    )
    save_policy(trained / "exits", exits)
    argv = ["eval", "--model", tiny_base, "--routers", trained / "exits", "--budget", 0.8]
    argv += ["--task", trained / "heldout.txt", "--out", trained / "report"]
    code, _, err = run(capsys, *argv)
    assert code == 1
    assert "2 in the training of the exits" in " ".join(err.split())
    assert not (trained / "report").exists()
    # Those that chose the plans did not choose them for others.
    save_policy(trained / "exits", random_exits(load_model(str(tiny_base))))
    argv[argv.index(trained / "heldout.txt")] = trained / "others.txt"
    code, _, err = run(capsys, *argv, "--plans", trained / "plans")
    assert code == 1
    assert "in the plans in" in " ".join(err.split())


def test_a_damaged_evaluation_is_refused(tiny_base, trained, capsys):
    argv = ["eval", "--model", tiny_base, "--routers", trained / "exits", "--new-tokens", 4]
    argv += ["--task", trained / "heldout.txt", "--out", trained / "report", "--budget", 0.8]
    code, _, err = run(capsys, *argv)
    assert code == 0, err
    path = trained / "report" / "exit_evaluation.json"
    path.write_text(path.read_text().replace('"window": 8', '"window": 9'))
    for verb in (("report", "--run"), ("inspect",)):
        code, _, err = run(capsys, *verb, trained / "report")
        assert code == 1
        assert "evaluate again" in err
    code, _, err = run(capsys, "report", "--run", trained / "report", "--markdown")
    assert code == 2
    assert "leave out --markdown" in " ".join(err.split())
    path.unlink()
    code, _, err = run(capsys, "report", "--run", trained / "report", "--markdown")
    assert code == 1
