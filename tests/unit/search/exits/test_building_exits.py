"""A training of exits from prompts to a routers folder: killed anywhere it goes on to the same, and what it refuses."""

import itertools
import json
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynadepth import load_policy, unwrap_model, wrap_model
from dynadepth.checkpoints.save_load import save_policy
from dynadepth.errors import BudgetError, CheckpointError, ConfigError, LabelError, TaskError
from dynadepth_search.data.tasks import Example, Task
from dynadepth_search.exits import building, exit_states
from dynadepth_search.exits.building import fit_exits
from dynadepth_search.exits.spec import ExitSpec
from tests.tiny_search import tiny_task

SPEC = ExitSpec(
    layers=(1, 2), new_tokens=6, rounds=1, lens_width=4, router_width=8, batch_size=8, heldout=0.3
)
TASK = tiny_task(24, kind="prompt")


class Killed(BaseException):
    """Stands for a signal."""


@pytest.fixture(scope="module")
def base(tiny_base):
    return AutoModelForCausalLM.from_pretrained(tiny_base), AutoTokenizer.from_pretrained(tiny_base)


@pytest.fixture(scope="module")
def calm(base, tmp_path_factory):
    """A training that nothing disturbed."""
    folder = tmp_path_factory.mktemp("calm") / "exits.work"
    return fit_exits(*base, TASK, folder, SPEC), folder


@pytest.fixture
def prompts(base):
    ids = base[1](
        [example.prompt for example in TASK.examples[:2]], padding=True, return_tensors="pt"
    )
    return dict(ids)


def test_what_it_says_of_itself(calm):
    found, _ = calm
    training = found.training
    assert training["train_prompts"] + training["validation_prompts"] == 24
    assert training["asked"]["fit"]["layers"] == [1, 2]
    assert len(training["given text"]) == 1 + SPEC.rounds
    promises = found.promises
    assert promises.passes[0] == promises.kept[0] == 1.0
    assert all(low <= kept for low, kept in zip(promises.likely, promises.kept, strict=True))
    assert all(low <= kept for low, kept in zip(promises.certain, promises.kept, strict=True))


def test_a_routers_folder_has_it_all(calm, base, tmp_path, prompts):
    found, _ = calm
    save_policy(tmp_path / "routers", found)
    model = base[0]
    loaded = load_policy(tmp_path / "routers", model=model)
    assert (loaded.promises, loaded.answers) == (found.promises, found.answers)
    for name, tensor in found.tensors().items():
        assert torch.equal(tensor, loaded.tensors()[name])
    card = (tmp_path / "routers" / "README.md").read_text()
    assert "fidelity" in card
    budget = found.calibration.range[0]
    plain = model.generate(**prompts, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    wrap_model(model, budget=budget, routers=tmp_path / "routers")
    try:
        model.generate(**prompts, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        totals = model.dynadepth.exit_totals
        assert totals.left
        assert totals.fidelity is not None
        assert model.dynadepth.last_layers_run.shape == (2, 7)
        # At a budget of 1 no token leaves.
        model.dynadepth.budget = 1.0
        again = model.generate(**prompts, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        assert torch.equal(again, plain)
    finally:
        unwrap_model(model)


def test_answers_are_calibrated_as_the_runtime_answers(calm, base, tmp_path):
    found, (model, tokenizer) = calm[0], base
    run = building._Training(model, tokenizer, TASK, tmp_path, SPEC, lambda *_: None)
    prompts = [torch.from_numpy(prompt)[None] for prompt in run._heldout]
    own = [int(model(prompt).logits[0, -1].argmax()) for prompt in prompts]
    answers = found.answers
    assert answers.prompts == len(prompts)
    for depth, kept in zip(answers.passes, answers.kept, strict=True):
        wrap_model(model, routers=found, budget=1.0)
        try:
            # The dial of decoding has another range.
            model.dynadepth._budget = depth
            given = [model.dynadepth.answer_prompts(prompt) for prompt in prompts]
        finally:
            unwrap_model(model)
        run_layers = [int(each.layers_run[0]) for each in given]
        assert sum(run_layers) / len(prompts) / 4 == pytest.approx(depth)
        same = [
            int(each.logits[0].argmax()) == token for each, token in zip(given, own, strict=True)
        ]
        assert sum(same) / len(same) == pytest.approx(kept)


def test_every_held_out_prompt_calibrates_answers(base, tmp_path):
    spec = replace(SPEC, rounds=0, lens_epochs=0, router_epochs=1, most_positions=10)
    found = fit_exits(*base, TASK, tmp_path / "few.work", spec)
    assert found.answers.prompts == found.training["validation_prompts"] == 7


def test_prompts_of_one_token_calibrate_answers_too(base, tmp_path):
    words = [word for word in base[1].get_vocab() if word.isalpha()][:40]
    task = Task("words", tuple(Example(prompt=word) for word in words))
    lengths = {len(base[1](word).input_ids) for word in words}
    spec = replace(SPEC, rounds=0, lens_epochs=0, router_epochs=1)
    found = fit_exits(*base, task, tmp_path / "words.work", spec)
    assert 1 in lengths
    assert found.answers.prompts == found.training["validation_prompts"]


def test_a_folder_without_answers_is_read(calm, tmp_path):
    save_policy(tmp_path / "routers", calm[0])
    path = tmp_path / "routers" / "router_config.json"
    content = json.loads(path.read_text())
    del content["exits"]["answers"]
    path.write_text(json.dumps(content))
    assert load_policy(tmp_path / "routers").answers is None
    content["exits"]["answers"] = [1]
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"exits\.answers"):
        load_policy(tmp_path / "routers")


def test_a_promise_is_set_and_changed_without_unwrapping(calm, base):
    found, model = calm[0], base[0]
    bounds = found.promises.likely[1:]
    lowest, middle = min(bounds), (min(bounds) + bounds[0]) / 2
    assert lowest < bounds[0]
    wrap_model(model, fidelity=lowest, routers=found)
    try:
        controller = model.dynadepth
        before = controller.exits.dial.threshold
        controller.fidelity = middle
        assert controller.exits.dial.threshold > before
        kept = controller.exits.dial.threshold
        for wrong in (lowest - 0.01, 0.99999, "much", None, True):
            with pytest.raises(BudgetError):
                controller.fidelity = wrong
        assert controller.exits.dial.threshold == kept
        assert controller.fidelity == middle
        assert controller.budget is None
        # Verified, so whatever the threshold nothing is changed.
        controller.fidelity = 1.0
        assert controller.exits.dial.verify
        controller.budget = 1.0
        assert controller.fidelity is None
        assert not controller.exits.dial.verify
        assert not controller.exits.dial.adapt
        with pytest.raises(ConfigError, match="exits plan none"), controller.at_budget(0.9):
            pass
    finally:
        unwrap_model(model)


def test_what_a_wrap_refuses(calm, base):
    found, model = calm[0], base[0]
    names = set(model.__dict__)
    with pytest.raises(ConfigError, match="exactly one"):
        wrap_model(model, fidelity=0.9, budget=0.9, routers=found)
    with pytest.raises(ConfigError, match="audit=0"):
        wrap_model(model, fidelity=found.promises.likely[-1], routers=found, audit=0)
    with pytest.raises(BudgetError, match="adapt=True"):
        wrap_model(model, fidelity=0.9999, routers=found, adapt=False)
    assert set(model.__dict__) == names


def test_killed_anywhere_it_goes_on_to_the_same(calm, base, tmp_path, monkeypatch):
    whole, done = calm[0], False
    write = exit_states.write_bytes_atomic
    for kill_at in itertools.count():
        made = 0

        def stops(*arguments, kill_at=kill_at):
            nonlocal made
            if made == kill_at % 3 + 1:
                raise Killed
            made += 1
            write(*arguments)

        monkeypatch.setattr(exit_states, "write_bytes_atomic", stops)
        monkeypatch.setattr(building, "write_bytes_atomic", stops)
        with suppress(Killed):
            again = fit_exits(*base, TASK, tmp_path / "work", SPEC)
            done = True
        if done:
            break
    assert kill_at > 2
    assert again.promises == whole.promises
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, again.tensors()[name])


def test_what_a_training_refuses(calm, base, tmp_path):
    _, folder = calm
    with pytest.raises(LabelError, match="new_tokens"):
        fit_exits(*base, TASK, folder, replace(SPEC, new_tokens=7))
    with pytest.raises(TaskError, match="20 or more"):
        fit_exits(*base, tiny_task(12, kind="prompt"), tmp_path, SPEC)
    with pytest.raises(ConfigError, match="exit layer 9"):
        fit_exits(*base, TASK, tmp_path, ExitSpec(layers=(1, 9)))
    for wrong in ({"layers": (2, 1)}, {"heldout": 1.0}, {"window": 0}, {"lens_width": 0}):
        with pytest.raises(ConfigError):
            ExitSpec(**wrong)


def test_a_damaged_folder_is_refused(calm, tmp_path):
    found, _ = calm
    config = save_policy(tmp_path / "routers", found) / "router_config.json"
    text = config.read_text()
    for old, new in (('"window": 8', '"window": "8"'), ('"promises"', '"promise"')):
        config.write_text(text.replace(old, new))
        with pytest.raises(CheckpointError):
            load_policy(tmp_path / "routers")
    content = json.loads(text)
    content["exits"]["layers"] = [1]
    config.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="tensors"):
        load_policy(tmp_path / "routers")
