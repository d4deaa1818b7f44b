"""`wrap_model(shortcuts=...)`: which shortcuts a model gets, that they do what the formula says, and that they go."""

import copy
import gc
import threading

import numpy as np
import pytest
import torch

from dynadepth import load_shortcuts, save_policy
from dynadepth.errors import ConfigError, ShortcutError
from dynadepth.models.fingerprint import fingerprint
from dynadepth.policies.base import Policy, StaticPolicy
from dynadepth.shortcuts.maps import LinearShortcut, Shortcuts
from dynadepth.shortcuts.save_load import WEIGHTS_NAME, save_shortcuts
from dynadepth.wrapping.skipping import resolve_shortcuts
from dynadepth.wrapping.wrap import unwrap_model, wrap_model
from tests.tiny import random_batch, tiny_model
from tests.tiny_routers import random_routers
from tests.tiny_shortcuts import Jump, random_shortcuts

PLAN = np.array([0, 1, 0, 1], dtype=np.uint8)


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def batch():
    return random_batch([9, 6], seed=1)


def logits(model, batch):
    ids, mask = batch
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


def last(model, batch):
    return logits(model, batch)[:, -1]


def traces(model):
    """Everything that an undo must bring back."""
    modules = [
        (name, type(module), tuple(module.__dict__), tuple(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]
    return modules, list(model.state_dict()), [name for name, _ in model.named_buffers()]


class Replaced(torch.nn.Module):
    """An ordinary module in a layer's place."""

    def __init__(self, shortcut):
        super().__init__()
        self.jump = Jump(shortcut)

    def forward(self, hidden_states, *_, **__):
        return self.jump(hidden_states)


def with_modules(model, plan, shortcuts):
    """Return a copy of a Llama whose skipped layers are ordinary modules that compute the maps."""
    other = copy.deepcopy(model)
    for layer, action in enumerate(plan):
        if not action:
            other.model.layers[layer] = Replaced(shortcuts.maps[layer])
    return other


class TestWhatTheyDo:
    @pytest.mark.parametrize(
        "plan", [(0, 1, 1, 1), (1, 1, 1, 0), (1, 0, 1, 0), (0, 0, 1, 1), (1, 0, 0, 0), (0, 0, 0, 1)]
    )
    def test_ordinary_modules_in_place_of_the_layers_give_the_same_logits(self, model, batch, plan):
        shortcuts = random_shortcuts(model)
        expected = logits(with_modules(model, plan, shortcuts), batch)
        plain = logits(wrap_model(model, plan=plan), batch)
        unwrap_model(model)
        found = logits(wrap_model(model, plan=plan, shortcuts=shortcuts), batch)
        # Padding is no token.
        real = batch[1].bool()
        assert float((found - expected)[real].abs().max()) < 1e-9
        assert float((plain - expected)[real].abs().max()) > 1e-3

    def test_a_layer_without_a_map_leaves_nothing(self, model, batch):
        wrap_model(model, plan="1-3", shortcuts=random_shortcuts(model, without=(0,)))
        with_none = last(model, batch)
        unwrap_model(model)
        assert torch.equal(last(wrap_model(model, plan="1-3"), batch), with_none)

    def test_the_identity_plan_is_bit_equal_and_runs_none(self, model, batch, monkeypatch):
        before = logits(model, batch)
        generated = model.generate(batch[0], attention_mask=batch[1], max_new_tokens=5)
        wrap_model(model, plan="0-3", shortcuts=random_shortcuts(model))

        def forbidden(*_):
            raise AssertionError("a shortcut ran")

        monkeypatch.setattr(LinearShortcut, "__call__", forbidden)
        assert torch.equal(logits(model, batch), before)
        again = model.generate(batch[0], attention_mask=batch[1], max_new_tokens=5)
        assert torch.equal(again, generated)
        # Repeats run none either.
        with model.dynadepth.plans("0-3,3"):
            logits(model, batch)
        with model.dynadepth.plans("0-2"), pytest.raises(AssertionError, match="a shortcut ran"):
            logits(model, batch)

    def test_each_row_takes_its_own_way(self, model):
        """Rows of one batch that skip different layers, and one that skips none."""
        ids, mask = random_batch([7, 9, 5], seed=2)
        shortcuts = random_shortcuts(model)
        plans = np.array([[0, 1, 1, 1], [1, 1, 1, 1], [1, 2, 0, 0]], dtype=np.uint8)
        wrap_model(model, plan="0-3", shortcuts=shortcuts)
        with model.dynadepth.plans(plans):
            together = last(model, (ids, mask))
        for row, plan in enumerate(plans):
            alone = ids[row : row + 1, -int(mask[row].sum()) :]
            with model.dynadepth.plans(plan):
                found = last(model, (alone, torch.ones_like(alone)))
            assert float((found - together[row]).abs().max()) < 1e-9

    def test_gradients_flow_through_to_what_was_before(self, model, batch):
        shortcuts = random_shortcuts(model)
        reference = with_modules(model, PLAN, shortcuts)
        wrap_model(model, plan=PLAN, shortcuts=shortcuts)
        for each in (model, reference):
            each(batch[0], attention_mask=batch[1]).logits[:, -1].square().sum().backward()
        for name in ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"):
            found, expected = (each.get_parameter(name).grad for each in (model, reference))
            assert float(expected.abs().max()) > 0
            assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)
        assert model.get_parameter("model.layers.0.mlp.up_proj.weight").grad is None

    def test_gradients_flow_after_a_forward_in_inference_mode_in_a_new_dtype(self, model, batch):
        wrap_model(model, plan=PLAN, shortcuts=random_shortcuts(model))
        model.float()
        with torch.inference_mode():
            model(batch[0], attention_mask=batch[1])
        model(batch[0], attention_mask=batch[1]).logits.sum().backward()
        assert bool(torch.isfinite(model.model.embed_tokens.weight.grad).all())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_model_moved_to_another_dtype_takes_copies_in_it(self, model, batch, dtype):
        shortcuts = random_shortcuts(model)
        wrap_model(model, plan=PLAN, shortcuts=shortcuts)
        exact = last(model, batch)
        model.to(dtype)
        moved = last(model, batch)
        assert moved.dtype == dtype
        expected = last(with_modules(unwrap_model(model), PLAN, shortcuts), batch)
        rough = {torch.float32: 1e-4, torch.bfloat16: 0.3}[dtype]
        assert float((moved - expected).abs().max()) < rough
        assert float((moved.double() - exact).abs().max()) < 4 * rough
        assert {kept for _, kept in shortcuts.maps[0]._placed} == {torch.float64, dtype}

    def test_maps_are_copied_to_the_layers_dtype_when_wrapping(self, model):
        shortcuts = random_shortcuts(model, without=(1,))
        wrap_model(model.to(torch.bfloat16), plan=PLAN, shortcuts=shortcuts)
        for each in shortcuts.maps:
            if each is not None:
                assert set(each._placed) == {(torch.device("cpu"), torch.bfloat16)}

    def test_two_threads_with_other_plans_do_not_mix(self, model):
        ids, mask = random_batch([8, 8], seed=3)
        wrap_model(model, plan="0-3", shortcuts=random_shortcuts(model))
        plans = ["0-3", "1-3", "0,2", "2-3"]
        expected = {}
        for plan in plans:
            with model.dynadepth.plans(plan):
                expected[plan] = logits(model, (ids, mask))
        wrong, barrier = [], threading.Barrier(len(plans))

        def work(plan):
            barrier.wait(20)
            for _ in range(15):
                with model.dynadepth.plans(plan):
                    if not torch.equal(logits(model, (ids, mask)), expected[plan]):
                        wrong.append(plan)

        threads = [threading.Thread(target=work, args=(plan,)) for plan in plans]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not wrong

    def test_a_deep_copy_has_them_and_is_unwrapped_alone(self, model, batch):
        shortcuts = random_shortcuts(model)
        wrap_model(model, plan=PLAN, shortcuts=shortcuts)
        expected = last(model, batch)
        other = copy.deepcopy(model)
        assert other.dynadepth.shortcuts.digest == shortcuts.digest
        assert torch.equal(last(other, batch), expected)
        unwrap_model(model)
        assert torch.equal(last(other, batch), expected)
        unwrap_model(other)
        assert torch.equal(last(other, batch), last(model, batch))

    def test_a_policy_sees_the_states_that_the_shortcuts_leave(self, model, batch):
        """What is decided later depends on what an earlier skip left."""
        seen = {}

        class Watching(Policy):
            num_layers = 4
            decision_layers = (2,)

            def initial_plans(self, num_rows):
                return np.tile(np.array([0, 0, 1, 1], dtype=np.uint8), (num_rows, 1))

            def decide(self, layer_idx, hidden_states, prompts):
                seen[self.name] = hidden_states.clone()
                return np.ones((len(hidden_states), 2), dtype=np.uint8)

        shortcuts = random_shortcuts(model)
        for name, given in (("with", shortcuts), ("without", False)):
            policy = Watching()
            policy.name = name
            logits(wrap_model(model, policy=policy, shortcuts=given), batch)
            unwrap_model(model)
        states = model.get_input_embeddings()(batch[0])
        real = batch[1].bool()
        assert torch.equal(seen["without"][real], states[real])
        expected = shortcuts.maps[1](shortcuts.maps[0](states))
        assert torch.allclose(seen["with"][real], expected[real])


class TestUndo:
    def test_nothing_is_left_and_nothing_is_in_the_module_tree(self, model, batch):
        before, output = traces(model), logits(model, batch)
        parameters = sum(each.numel() for each in model.parameters())
        wrap_model(model, plan=PLAN, shortcuts=random_shortcuts(model))
        assert [name for name, _ in model.named_modules()] == [name for name, *_ in before[0]]
        assert list(model.state_dict()) == before[1]
        assert [name for name, _ in model.named_buffers()] == before[2]
        assert sum(each.numel() for each in model.parameters()) == parameters
        assert "shortcuts of rank 3 for 4 layers" in repr(model.dynadepth)
        assert not torch.equal(logits(model, batch), output)
        model.generate(batch[0], attention_mask=batch[1], max_new_tokens=3)
        unwrap_model(model)
        assert traces(model) == before
        assert torch.equal(logits(model, batch), output)

    def test_after_an_error_in_a_forward(self, model, batch):
        before, output = traces(model), logits(model, batch)
        broken = LinearShortcut(None, None, torch.zeros(32))

        class Failing(LinearShortcut):
            def __call__(self, states):
                raise RuntimeError("out of memory")

        shortcuts = random_shortcuts(model)
        maps = [*shortcuts.maps[:2], Failing(None, None, broken.b), shortcuts.maps[3]]
        bad = Shortcuts(maps=maps, fingerprint=fingerprint(model), rank=3)
        wrap_model(model, plan=PLAN, shortcuts=bad)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="out of memory"):
                logits(model, batch)
        with model.dynadepth.plans("0-3"):
            assert torch.equal(logits(model, batch), output)
        unwrap_model(model)
        assert traces(model) == before
        assert torch.equal(logits(model, batch), output)

    def test_the_maps_are_freed_with_the_last_who_holds_them(self, model):
        import weakref

        shortcuts = random_shortcuts(model)
        wrap_model(model, plan=PLAN, shortcuts=shortcuts)
        held = weakref.ref(shortcuts.maps[0])
        del shortcuts
        unwrap_model(model)
        gc.collect()
        assert held() is None

    def test_a_saved_model_holds_nothing_of_them(self, model, tmp_path):
        wrap_model(model, plan=PLAN, shortcuts=random_shortcuts(model))
        model.save_pretrained(tmp_path / "wrapped")
        unwrap_model(model)
        model.save_pretrained(tmp_path / "plain")
        for file in ("config.json", "model.safetensors"):
            files = [tmp_path / name / file for name in ("wrapped", "plain")]
            assert files[0].read_bytes() == files[1].read_bytes()


class TestWhatIsGiven:
    def test_a_folder_a_text_what_was_loaded_and_folders_around(self, model, batch, tmp_path):
        shortcuts = random_shortcuts(model)
        folder = save_shortcuts(tmp_path / "base" / "shortcuts", shortcuts)
        given = [shortcuts, folder, str(folder), load_shortcuts(folder), tmp_path / "base"]
        routers = random_routers(fingerprint=fingerprint(model), shortcuts=shortcuts)
        given += [
            save_policy(tmp_path / "policy", routers),
            save_policy(tmp_path / "other" / "routers", routers).parent,
        ]
        outputs = []
        for each in given:
            wrap_model(model, plan=PLAN, shortcuts=each)
            assert model.dynadepth.shortcuts.digest == shortcuts.digest
            outputs.append(last(model, batch))
            unwrap_model(model)
        assert all(torch.equal(output, outputs[0]) for output in outputs)

    @pytest.mark.parametrize("nothing", [False, None])
    def test_none_are_used_if_none_are_asked_for(self, model, batch, nothing):
        wrap_model(model, plan=PLAN, shortcuts=nothing)
        assert model.dynadepth.shortcuts is None
        assert "shortcuts" not in repr(model.dynadepth)
        found = last(model, batch)
        unwrap_model(model)
        assert torch.equal(last(wrap_model(model, plan=PLAN), batch), found)

    @pytest.mark.parametrize("how", ["plan", "policy"])
    def test_a_policy_of_the_callers_own_takes_them_too(self, model, batch, how):
        given = {"plan": PLAN} if how == "plan" else {"policy": StaticPolicy(PLAN)}
        wrap_model(model, shortcuts=random_shortcuts(model), **given)
        found = last(model, batch)
        unwrap_model(model)
        expected = last(with_modules(model, PLAN, random_shortcuts(model)), batch)
        assert float((found - expected).abs().max()) < 1e-9

    @pytest.mark.parametrize("bad", [True, 0, 1, 3.5, [], {}, b"folder", object()])
    def test_something_else_is_refused(self, model, bad):
        before = traces(model)
        message = "expected a folder, a hub id, what load_shortcuts returned, or False"
        with pytest.raises(ConfigError, match=message):
            wrap_model(model, plan=PLAN, shortcuts=bad)
        assert traces(model) == before

    def test_folders_without_shortcuts_are_refused(self, model, tmp_path):
        before = traces(model)
        (tmp_path / "empty").mkdir()
        for place, words in (
            (tmp_path / "empty", "has no shortcut_config.json, neither there nor in shortcuts/ or"),
            (
                tmp_path / "nothing",
                "there is no folder .*; expected what `dynadepth shortcuts` wri",
            ),
        ):
            with pytest.raises(FileNotFoundError, match=words):
                wrap_model(model, plan=PLAN, shortcuts=place)
        assert traces(model) == before

    def test_those_of_another_model_are_refused(self, model, batch, tmp_path):
        others = random_shortcuts(tiny_model(seed=1))
        folder = save_shortcuts(tmp_path / "others", others)
        before = traces(model)
        for given in (others, folder):
            with pytest.raises(ShortcutError, match="belong to another base model"):
                wrap_model(model, plan=PLAN, shortcuts=given)
        assert traces(model) == before
        accepted = load_shortcuts(folder, model=model, accept_mismatch=True)
        wrap_model(model, plan=PLAN, shortcuts=accepted)
        found = last(model, batch)
        reference = with_modules(unwrap_model(model), PLAN, others)
        assert float((found - last(reference, batch)).abs().max()) < 1e-9

    def test_damaged_files_leave_the_model_alone(self, model, tmp_path):
        folder = save_shortcuts(tmp_path / "maps", random_shortcuts(model))
        before = traces(model)
        (folder / WEIGHTS_NAME).write_bytes(b"")
        with pytest.raises(ShortcutError, match="is damaged"):
            wrap_model(model, plan=PLAN, shortcuts=folder)
        assert traces(model) == before


def test_what_is_resolved_is_what_was_given(model):
    shortcuts = random_shortcuts(model)
    assert resolve_shortcuts(shortcuts, model, None) is shortcuts
    assert resolve_shortcuts(None, model, None) is None
    assert resolve_shortcuts(False, model, None) is None
    routers = random_routers(fingerprint=fingerprint(model), shortcuts=shortcuts)
    assert resolve_shortcuts(None, model, routers) is shortcuts
