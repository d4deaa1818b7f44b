"""`dynadepth compare`: several ways to wrap a model on the same prompts, against what its own forwards give."""

import html
import json

import numpy as np
import pytest
import torch

from dynadepth import unwrap_model, wrap_model
from dynadepth.checkpoints.save_load import save_policy
from dynadepth.cli import main as cli
from dynadepth.models.fingerprint import fingerprint
from dynadepth.models.loading import load_model, load_tokenizer
from dynadepth_search.comparing import comparing
from dynadepth_search.comparing.configurations import Configuration
from dynadepth_search.data.splits import prompt_hashes
from dynadepth_search.data.tasks import Example, Task
from dynadepth_search.inspecting.compared_seen import see_comparison
from dynadepth_search.progress import silent
from dynadepth_search.scoring.own_text import score_texts
from tests.tiny_exits import random_exits
from tests.tiny_menus import random_menu

pytestmark = pytest.mark.usefixtures("search_verbs")

PROMPTS = ("why is snow", "red", "it deep", "1", "the river is")
PLANS = np.array([[1, 1, 1, 1], [1, 1, 0, 1], [1, 0, 1, 0]], dtype=np.uint8)
NEW = 9


def run(capsys, *argv):
    """Return exit code, stdout and stderr of one command line."""
    code = cli.main([str(each) for each in argv])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture
def folder(tiny_base, tmp_path):
    """A menu and exits of the tiny model, and a task."""
    model = load_model(str(tiny_base))
    menu = random_menu(
        layers=(1,),
        hidden_size=32,
        plans=PLANS,
        seed=1,
        fingerprint=fingerprint(model),
        training={"prompt_hashes": prompt_hashes([Example(prompt="red")])},
    )
    save_policy(tmp_path / "menu", menu)
    save_policy(tmp_path / "exits", random_exits(model))
    (tmp_path / "task.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    return tmp_path


def by_hand(base, **how):
    """Return texts, passes, and by place of the base model's own text whether its choice is kept."""
    model, tokenizer = load_model(str(base)), load_tokenizer(str(base))
    given = {"max_new_tokens": NEW, "do_sample": False}
    rows = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        own = model.generate(ids, **given)[0]
        wrap_model(model, **how)
        text = model.generate(ids, **given)[0]
        controller = model.dynadepth
        passes = controller.last_mean_depth if controller.exits is None else None
        with torch.no_grad(), controller.plans(controller.last_plans):
            choices = model(own[None], use_cache=False).logits[0].argmax(dim=-1)
        unwrap_model(model)
        places = slice(ids.shape[1] - 1, len(own) - 1)
        kept = (choices[places] == own[ids.shape[1] :]).tolist()
        rows.append((own[ids.shape[1] :].tolist(), text[ids.shape[1] :].tolist(), passes, kept))
    return rows


def common(own, text):
    return next(
        (at for at, pair in enumerate(zip(own, text, strict=False)) if pair[0] != pair[1]),
        min(len(own), len(text)),
    )


def test_it_measures_what_the_models_own_forwards_give(tiny_base, folder, capsys):
    ways = ["plan=0-1+3", f"budget=0.7,routers={folder / 'menu'}"]
    ways += [f"budget=0.7,routers={folder / 'exits'}", "plan=0-3"]
    out = folder / "compared"
    argv = ["compare", "--model", tiny_base, "--task", folder / "task.txt", "--out", out]
    argv += ["--new-tokens", NEW, *(part for way in ways for part in ("--way", way))]
    code, printed, err = run(capsys, *argv, "--json")
    assert code == 0, err
    found = json.loads(printed)["comparison"]
    rows = dict(zip(ways, found["rows"], strict=True))
    hows = [
        {"plan": "0-1,3"},
        {"budget": 0.7, "routers": folder / "menu"},
        {"budget": 0.7, "routers": folder / "exits"},
        {"plan": "0-3"},
    ]
    for (name, row), how in zip(rows.items(), hows, strict=True):
        assert row["name"] == name
        expected = by_hand(tiny_base, **how)
        same = [own == text for own, text, _, _ in expected]
        assert row["identical"]["mean"] == pytest.approx(np.mean(same))
        begins = [common(own, text) for own, text, _, _ in expected]
        assert row["common"]["mean"] == pytest.approx(np.mean(begins))
        if row["kind"] == "exits":
            assert row["by_place"] is None
            assert row["passes"] < 1
            continue
        assert row["passes"] == pytest.approx(np.mean([depth for _, _, depth, _ in expected]))
        for place in range(NEW):
            kept = [each[place] for _, _, _, each in expected if place < len(each)]
            if kept:
                assert row["by_place"]["agreement"][place] == pytest.approx(np.mean(kept))
    assert rows["plan=0-3"]["identical"]["mean"] == 1
    assert rows["plan=0-3"]["by_place"]["divergence"][0] == pytest.approx(0, abs=1e-6)
    # Or nothing would be seen to part.
    assert rows["plan=0-1+3"]["identical"]["mean"] < 1
    for answer in found["answers"]:
        assert answer["answers"][3] == [answer["base"], ""]
        for beginning, _ in answer["answers"]:
            assert answer["base"].startswith(beginning)

    # The page is drawn again from the file.
    page = (out / "report.html").read_text()
    assert "On the base model" in page
    assert f"1 of the prompts took part in the training of {ways[1]}" in html.unescape(page)
    assert "▸" in page
    code, shown, _ = run(capsys, "inspect", out, "--html", folder / "page.html")
    assert code == 0
    assert "plan=0-1+3" in shown
    assert (folder / "page.html").read_text() == page


@pytest.mark.parametrize(
    ("ways", "message"),
    [
        (("plan",), "has 'plan'"),
        (("bugdet=0.9",), "did you mean 'budget'"),
        (("budget=much",), "expected a number"),
        (("budget=0.9,plan=0-3",), "exactly one of budget, fidelity, plan"),
        (("routers=menu",), "exactly one of"),
        (("plan=0-3", "plan=0-3"), "each given once"),
        (("plan=0-9",), "0-9"),
        (("fidelity=1,routers=x",), "verifies every token"),
        (("budget=0.9,routers={folder}/nothing",), "nothing"),
    ],
)
def test_wrong_ways_say_so_and_leave_nothing(tiny_base, folder, capsys, ways, message):
    out = folder / "compared"
    argv = ["compare", "--model", tiny_base, "--task", folder / "task.txt", "--out", out]
    argv += [part for way in ways for part in ("--way", way.format(folder=folder))]
    code, _, err = run(capsys, *argv)
    assert code == 1
    assert message in " ".join(err.split())
    assert not out.exists()


def test_answers_of_one_token_have_the_depth_of_their_plan(tiny_base, folder, capsys):
    argv = ["compare", "--model", tiny_base, "--task", folder / "task.txt", "--new-tokens", 1]
    argv += ["--out", folder / "compared", "--way", "plan=0-0", "--json"]
    argv += ["--way", f"budget=0.7,routers={folder / 'exits'}"]
    code, printed, err = run(capsys, *argv)
    assert code == 0, err
    plan, exits = json.loads(printed)["comparison"]["rows"]
    assert (plan["passes"], plan["kept"]) == (0.25, None)
    assert (exits["passes"], exits["kept"]) == (1.0, None)


def test_logits_that_overflow_are_said_to(tiny_base, folder, monkeypatch):
    content = {
        "model": "m",
        "task": {"name": "t", "prompts": 1},
        "took_part": {},
        "rows": [
            {
                "name": "plan=0-0",
                "passes": 0.25,
                "kept": None,
                "identical": {"mean": 0.0, "low": 0.0, "high": 1.0, "n": 1},
                "common": {"median": 0.0, "mean": 0.0},
                "time": None,
                "by_place": {"agreement": [0.0], "divergence": [None], "answers": [1]},
            }
        ],
        "answers": [{"prompt": "p", "base": "b", "answers": [["", "c"]]}],
    }
    tables = {part.title: part for part in see_comparison(content).parts}
    assert tables["On the base model's own text"].rows == [["plan=0-0", "0.0 (overflows)"]]

    # And what is measured so can be written.
    def overflowing(*given, **how):
        found = score_texts(*given, **how)
        found.divergence[:, :, 0] = np.inf
        return found

    monkeypatch.setattr(comparing, "score_texts", overflowing)
    model = load_model(str(tiny_base))
    found = comparing.compare(
        model,
        load_tokenizer(str(tiny_base)),
        task=Task("few", (Example(prompt="why is snow"),)),
        configurations=[Configuration.parse("plan=0-1+3")],
        folder=folder / "compared",
        new_tokens=3,
        progress=silent,
    )
    assert found["rows"][0]["by_place"]["divergence"][0] is None


@pytest.mark.parametrize("verb", ["compare", "eval"])
def test_a_folder_with_another_result_is_left_alone(tiny_base, folder, capsys, verb):
    out = folder / "taken"
    out.mkdir()
    other = out / ("exit_evaluation.json" if verb == "compare" else "comparison.json")
    other.write_text("{}")
    more = ["--way", "plan=0-3"] if verb == "compare" else ["--routers", folder / "exits"]
    argv = [verb, "--model", tiny_base, "--task", folder / "task.txt", "--out", out, *more]
    code, _, err = run(capsys, *argv)
    assert code == 1
    assert "a folder of its own" in " ".join(err.split())
    assert [each.name for each in out.iterdir()] == [other.name]
    argv[argv.index(out)] = other
    code, _, err = run(capsys, *argv)
    assert code == 1
    assert "is a file" in " ".join(err.split())


def test_a_damaged_comparison_is_refused(tiny_base, folder, capsys):
    out = folder / "compared"
    argv = ["compare", "--model", tiny_base, "--task", folder / "task.txt", "--out", out]
    code, shown, err = run(capsys, *argv, "--new-tokens", 3, "--way", "plan=0-1+3")
    assert code == 0, err
    assert "How like the base model's" in shown
    path = out / "comparison.json"
    path.write_text(path.read_text().replace('"new_tokens": 3', '"new_tokens": 4'))
    code, _, err = run(capsys, "inspect", out)
    assert code == 1
    assert "compare again" in err
