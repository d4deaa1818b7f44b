"""The verb fold, from a model's folder and prompts to a plain checkpoint; killed runs, and bad input."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynadepth.cli import main as cli
from dynadepth.errors import ConfigError, LabelError
from dynadepth.models.loading import load_model, load_tokenizer
from dynadepth.proving.prove import proved_stack
from dynadepth.wrapping.bake import bake, save_baked, save_checkpoint
from dynadepth_search.data.tasks import Example, Task
from dynadepth_search.scoring.generating import continue_prompts
from dynadepth_search.scoring.own_text import compare_models, score_texts
from dynadepth_search.shortcuts.folding import fold_plan
from dynadepth_search.shortcuts.spec import ShortcutSpec
from tests.tiny_folder import save_tiny_base

pytestmark = pytest.mark.usefixtures("search_verbs")

PLAN = "110101"
SPEC = ShortcutSpec(new_tokens=8, num_places=8)


def run(capsys, *argv):
    """Return exit code, stdout and stderr of one command line."""
    capsys.readouterr()
    code = cli.main([str(word) for word in argv])
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    return code, shown.out, shown.err


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `my-model` of 6 layers and `train.txt`."""
    folder = tmp_path_factory.mktemp("owner")
    save_tiny_base(folder / "my-model", num_layers=6)
    lines = [f"Question {index}{' and so on' * (index % 4)}: {7 * index}?" for index in range(60)]
    (folder / "train.txt").write_text("\n".join(lines) + "\n")
    return folder


def fold(place, out, *more, model=None, plan=PLAN):
    argv = ["fold", "--model", model or place / "my-model", "--plan", plan, "--out", out]
    return [*argv, "--task", place / "train.txt", "--new-tokens", 8, *more]


def task_of(place):
    lines = (place / "train.txt").read_text().splitlines()
    return Task("train", tuple(Example(line) for line in lines))


def test_fold_writes_a_checkpoint_that_is_closer_to_the_base(place, tmp_path, capsys):
    code, out, err = run(capsys, *fold(place, tmp_path / "folded", "--json"))
    assert code == 0, err
    found = json.loads(out)
    assert (found["plan"], found["out"]) == (PLAN, str(tmp_path / "folded"))
    assert found["depth"] == pytest.approx(4 / 6)
    assert found["heldout_prompts"] == 6
    assert [(row["first"], row["last"]) for row in found["runs"]] == [(2, 2), (4, 4)]
    for row in found["runs"]:
        assert row["states"] in ("base", "folded", None)
        assert row["into"] == (None if row["states"] is None else row["first"] - 1)
    plain, folded = found["divergence_of_plain_bake"], found["divergence"]
    assert 0 < folded["mean"] < plain["mean"]
    less = found["less_divergence"]
    assert less["mean"] == pytest.approx(plain["mean"] - folded["mean"])
    assert less["low"] <= less["mean"] <= less["high"]
    assert less["n"] == 6
    assert 0 <= found["agreement"]["mean"] <= 1
    # What was worked on is gone, and the folder holds what bake writes.
    assert [path.name for path in tmp_path.iterdir()] == ["folded"]
    save_baked(
        load_model(place / "my-model"),
        PLAN,
        tmp_path / "baked",
        tokenizer=load_tokenizer(place / "my-model", for_generation=False),
    )
    names = {path.name for path in (tmp_path / "baked").iterdir()}
    assert {path.name for path in (tmp_path / "folded").iterdir()} == names
    weights, others = (
        load_file(tmp_path / each / "model.safetensors") for each in ("folded", "baked")
    )
    changed = {name for name in weights if not torch.equal(weights[name], others[name])}
    # Layers 1 and 3 are the second and the third visit.
    into = [at for at, row in zip((1, 2), found["runs"], strict=True) if row["states"]]
    assert changed == {f"model.layers.{at}.mlp.down_proj.weight" for at in into}
    text = AutoTokenizer.from_pretrained(tmp_path / "folded")("Question 1: so?")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    assert model.config.num_hidden_layers == 4
    assert model.generate(torch.tensor([text]), max_new_tokens=3).shape == (1, len(text) + 3)


def test_the_lines_for_people_say_which_states_were_kept(place, tmp_path, capsys):
    code, out, err = run(capsys, *fold(place, tmp_path / "folded"))
    assert code == 0, err
    lines = dict(line.partition(": ")[::2] for line in out.splitlines())
    assert lines["plan"] == PLAN
    assert "2 into 1 (states of the " in lines["runs"] or "2 left out" in lines["runs"]
    assert lines["divergence of plain bake"].count("[") == 1
    assert "continuing prompts" in err
    assert "choosing for run 2" in err


def test_what_is_measured_is_what_a_sweep_measures(place):
    """The plain bake's harm by forwards of two models equals that of its plan in a sweep of one."""
    model, tokenizer = (load(place / "my-model") for load in (load_model, load_tokenizer))
    lines = (place / "train.txt").read_text().splitlines()[:7]
    ids = [np.array(tokenizer(line)["input_ids"], dtype=np.int64) for line in lines]
    texts = continue_prompts(model, ids, new_tokens=8)
    plan = [int(digit) for digit in PLAN]
    swept = score_texts(model, proved_stack(model), texts, [plan])
    found = compare_models(model, bake(model, PLAN), texts, num_places=8)
    for each, expected in zip(found, swept.by_text(), strict=True):
        assert np.allclose(each, expected[0], atol=1e-4)
    first = compare_models(model, bake(model, PLAN), texts, num_places=1)
    assert np.allclose(first[0], swept.divergence[0, :, 0], atol=1e-4)
    divergence, agreement = compare_models(model, model, texts, num_places=8)
    assert not divergence.any()
    assert agreement.all()


class KilledError(Exception):
    pass


@pytest.mark.parametrize("stage", ["continuing prompts", "states for base", "measuring"])
def test_a_killed_fold_goes_on(place, tmp_path, stage):
    model, tokenizer = (load(place / "my-model") for load in (load_model, load_tokenizer))
    given = (model, tokenizer, task_of(place), PLAN)

    def kill(at, done, _total):
        if at == stage and done:
            raise KilledError

    with pytest.raises(KilledError):
        fold_plan(*given, tmp_path / "work", SPEC, progress=kill)
    seen = []
    again = fold_plan(
        *given, tmp_path / "work", SPEC, progress=lambda at, done, _: seen.append((at, done))
    )
    whole = fold_plan(*given, tmp_path / "whole", SPEC)
    assert again.runs == whole.runs
    assert again.divergence == whole.divergence
    assert again.agreement == whole.agreement
    before = model.state_dict()
    for name, weight in again.model.state_dict().items():
        assert torch.equal(weight, whole.model.state_dict()[name])
    # The base's own weights are those of its files.
    files = load_model(place / "my-model").state_dict()
    assert all(torch.equal(before[name], files[name]) for name in files)
    stages = [at for at, _ in seen]
    assert ("states for base" in stages) == (stage != "measuring")
    first = next(done for at, done in seen if at == "continuing prompts")
    assert first > 0
    with pytest.raises(LabelError, match='made with plan = "110101", but now it is "101111"'):
        fold_plan(*given[:3], "101111", tmp_path / "work", SPEC)
    (tmp_path / "work" / "base.safetensors").write_bytes(b"cut off")
    with pytest.raises(LabelError, match="base.safetensors is damaged .* delete it and fold again"):
        fold_plan(*given, tmp_path / "work", SPEC)


def test_equal_prompts_count_once(place, tmp_path):
    model, tokenizer = (load(place / "my-model") for load in (load_model, load_tokenizer))
    task = task_of(place)
    doubled = Task("twice", (*task.examples, *task.examples))
    found = [
        fold_plan(model, tokenizer, each, PLAN, tmp_path / each.name, SPEC)
        for each in (task, doubled)
    ]
    assert found[0].divergence == found[1].divergence
    assert found[0].tokens == found[1].tokens
    save_checkpoint(found[0].model, tmp_path / "folded", plan=found[0].plan)


def test_settings_that_have_no_meaning_are_refused(place, tmp_path):
    model, tokenizer = (load(place / "my-model") for load in (load_model, load_tokenizer))
    for spec in (ShortcutSpec(rank=3), ShortcutSpec(distil_steps=2)):
        with pytest.raises(ConfigError, match="full rank and no second stage"):
            fold_plan(model, tokenizer, task_of(place), PLAN, tmp_path / "work", spec)
    assert list(tmp_path.iterdir()) == []


def test_wrong_input_is_refused_and_leaves_nothing(place, tmp_path, capsys):
    normed = save_tiny_base(tmp_path / "normed", family="gemma3", num_layers=4)
    few = tmp_path / "few.txt"
    few.write_text("".join(f"Question {index}?\n" for index in range(9)))
    before = sorted(path.name for path in tmp_path.iterdir())
    out = tmp_path / "folded"
    wrong = {
        "skips layer 0; what layers leave behind is folded into the layer that runs before": fold(
            place, out, plan="1-5"
        ),
        "skips no layer, so there is nothing to fold; bake it": fold(place, out, plan="0-5"),
        "folded into layer 2 of this gemma3_text: the layer does not add the output of its mlp": (
            fold(place, out, plan="0,0-2", model=normed)
        ),
        "9 different prompts cannot fit what is folded in; give 10 or more": fold(
            place, out, "--task", few
        ),
        "exists already; give a new folder": fold(place, normed),
    }
    for words, argv in wrong.items():
        code, shown, err = run(capsys, *argv)
        assert (code, shown) == (1, "")
        assert words in " ".join(err.split())
        assert sorted(path.name for path in tmp_path.iterdir()) == before
    shutil.rmtree(normed)
    code, _, err = run(capsys, *fold(place, out, "--new-tokens", 0))
    assert (code, "--new-tokens" in err) == (2, True)
