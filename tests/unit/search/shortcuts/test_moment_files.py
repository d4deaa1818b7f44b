"""Which tokens are collected, and that moments on disk are those of one pass, whenever it was killed."""

import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dynadepth.errors import LabelError
from dynadepth.models.structure import layer_stack
from dynadepth.proving.prove import proved_stack
from dynadepth.shortcuts.moments import Moments
from dynadepth_search.progress import silent
from dynadepth_search.scoring.own_text import Text
from dynadepth_search.shortcuts import moment_files
from dynadepth_search.shortcuts.collecting import MomentCollector
from dynadepth_search.shortcuts.moment_files import MomentFiles
from dynadepth_search.shortcuts.texts import batches_of
from tests.tiny import FAMILIES, VOCAB_SIZE, attentions, tiny_model

CPU = torch.device("cpu")
NAMES = tuple(Moments.zero(1).tensors())


def random_texts(lengths, *, seed=0):
    rng = np.random.default_rng(seed)
    return [Text(rng.integers(2, VOCAB_SIZE, length), 1) for length in lengths]


TEXTS = random_texts([5, 9, 2, 12, 7, 3, 9, 4])


class Killed(BaseException):
    """Stands for a signal."""


def states_of(model, text):
    """What enters and leaves each layer in a forward of one text; copies, in case a layer works in place."""
    entering, leaving = [], []
    layers = layer_stack(model).layers
    handles = []
    for layer in layers:
        handles += [
            layer.register_forward_pre_hook(
                lambda _, args, kwargs: entering.append(
                    (args[0] if args else kwargs["hidden_states"])[0].clone()
                ),
                with_kwargs=True,
            ),
            layer.register_forward_hook(
                lambda _, __, output: leaving.append(
                    (output if isinstance(output, torch.Tensor) else output[0])[0].clone()
                )
            ),
        ]
    with torch.no_grad():
        model(torch.from_numpy(text.ids)[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return entering, leaving


def expected_moments(model, texts):
    """Of all tokens but the first of each text, each text by itself."""
    width = layer_stack(model).hidden_size
    found = {}
    for text in texts:
        for layer, (entering, leaving) in enumerate(zip(*states_of(model, text), strict=True)):
            found.setdefault(layer, Moments.zero(width)).add(entering[1:], leaving[1:])
    return found


def assert_close(found, expected, *, bound=1e-9):
    assert sorted(found) == sorted(expected)
    for layer, name in itertools.product(expected, NAMES):
        one, other = getattr(found[layer], name), getattr(expected[layer], name)
        scale = max(float(other.abs().max()), 1.0)
        assert float((one - other).abs().max()) <= bound * scale, (layer, name)


def assert_same(found, expected):
    assert sorted(found) == sorted(expected)
    for layer, name in itertools.product(expected, NAMES):
        assert torch.equal(getattr(found[layer], name), getattr(expected[layer], name)), name


class TestCollector:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_real_token_but_each_texts_first_counts(self, family):
        # Eager attention masks with the lowest float64, which its softmax in float32 does not have.
        eager = attentions(family)[0] == "eager"
        model = tiny_model(family, dtype=torch.float32 if eager else torch.float64)
        stack = proved_stack(model)
        moments = {layer: Moments.zero(stack.hidden_size) for layer in range(4)}
        classes = [type(each) for each in model.modules()]
        with MomentCollector(stack, moments, CPU) as collector:
            collector.run(TEXTS[:4])
            collector.run(TEXTS[4:])
        expected = expected_moments(model, TEXTS)
        assert {float(each.tokens) for each in moments.values()} == {
            sum(len(text.ids) - 1 for text in TEXTS)
        }
        assert_close(moments, expected, bound=1e-4 if eager else 1e-9)
        assert [type(each) for each in model.modules()] == classes
        assert not any(each._forward_hooks for each in model.modules())

    def test_some_layers_alone(self):
        model = tiny_model()
        stack = proved_stack(model)
        moments = {2: Moments.zero(32), 0: Moments.zero(32)}
        with MomentCollector(stack, moments, CPU) as collector:
            collector.run(TEXTS)
        expected = expected_moments(model, TEXTS)
        assert_close(moments, {layer: expected[layer] for layer in (0, 2)})

    def test_texts_of_one_token_add_nothing(self):
        stack = proved_stack(tiny_model())
        moments = {1: Moments.zero(32)}
        with MomentCollector(stack, moments, CPU) as collector:
            collector.run(random_texts([1, 1]))
        assert_same(moments, {1: Moments.zero(32)})

    def test_hooks_go_after_an_error(self):
        model = tiny_model()
        stack = proved_stack(model)
        with (
            pytest.raises(IndexError),
            MomentCollector(stack, {0: Moments.zero(32)}, CPU) as collector,
        ):
            collector.run([Text(np.array([1, VOCAB_SIZE]), 1)])
        assert not any(each._forward_hooks for each in model.modules())

    def test_other_hooks_stay(self):
        model = tiny_model()
        stack = proved_stack(model)
        handle = stack.layers[0].register_forward_hook(lambda *_: None)
        with MomentCollector(stack, {0: Moments.zero(32)}, CPU) as collector:
            collector.run(TEXTS[:2])
        assert list(stack.layers[0]._forward_hooks) == [handle.id]


class TestFiles:
    @pytest.fixture(scope="class")
    def stack(self):
        return proved_stack(tiny_model())

    @pytest.fixture(scope="class")
    def whole(self, stack, tmp_path_factory):
        """Moments of one pass, and the folder that it left."""
        folder = tmp_path_factory.mktemp("whole")
        return MomentFiles(folder, stack, CPU, 3).collect("moments", TEXTS, silent), folder

    def files(self, stack, folder, layers=4):
        return MomentFiles(folder, stack, CPU, 3, group_bytes=layers * 16 * 32**2)

    def test_one_pass_is_what_hooks_see(self, whole):
        moments, folder = whole
        assert_close(moments, expected_moments(tiny_model(), TEXTS))
        assert [file.name for file in folder.iterdir()] == ["moments-0.safetensors"]

    @pytest.mark.parametrize("layers", [0, 1, 2, 3, 4, 9])
    def test_groups_of_layers_give_what_one_pass_gives(self, stack, whole, tmp_path, layers):
        found = self.files(stack, tmp_path, layers).collect("moments", TEXTS, silent)
        assert list(found) == [0, 1, 2, 3]
        assert_same(found, whole[0])
        groups = -(-4 // max(1, layers))
        assert len(list(tmp_path.iterdir())) == groups

    def test_what_is_finished_is_read_and_not_run_again(self, stack, whole, tmp_path, monkeypatch):
        files = self.files(stack, tmp_path, 2)
        files.collect("moments", TEXTS, silent)

        def forbidden(*_):
            raise AssertionError("a text ran again")

        monkeypatch.setattr(MomentCollector, "run", forbidden)
        assert_same(files.collect("moments", TEXTS, silent), whole[0])

    @pytest.mark.parametrize("every", [True, False])
    @pytest.mark.parametrize("layers", [2, 4])
    @pytest.mark.parametrize("batch", range(6))
    def test_a_kill_at_any_batch_goes_on_to_the_same_bytes(
        self, stack, whole, tmp_path, monkeypatch, batch, layers, every
    ):
        """Killed after a batch was added and before it was written; written after every batch, or in the end."""
        monkeypatch.setattr(moment_files, "_WRITE_SECONDS", -1.0 if every else 1e9)
        expected = self.files(stack, tmp_path / "calm", layers)
        assert_same(expected.collect("moments", TEXTS, silent), whole[0])
        run, counter = MomentCollector.run, itertools.count()

        def killed(self, texts):
            run(self, texts)
            if next(counter) == batch:
                raise Killed

        files = self.files(stack, tmp_path / "killed", layers)
        runs = (4 // layers) * len(batches_of([len(text.ids) for text in TEXTS], 3))
        with monkeypatch.context() as patched:
            patched.setattr(MomentCollector, "run", killed)
            if batch < runs:
                with pytest.raises(Killed):
                    files.collect("moments", TEXTS, silent)
        ran = []
        monkeypatch.setattr(
            MomentCollector, "run", lambda self, texts: (ran.append(1), run(self, texts))
        )
        assert_same(files.collect("moments", TEXTS, silent), whole[0])
        if every and batch < runs:
            assert len(ran) == runs - batch
        for file in (tmp_path / "calm").iterdir():
            assert (tmp_path / "killed" / file.name).read_bytes() == file.read_bytes()

    def test_names_do_not_share_files(self, stack, tmp_path):
        files = self.files(stack, tmp_path)
        one = files.collect("moments", TEXTS[:3], silent)
        other = files.collect("held-out moments", TEXTS[3:], silent)
        names = sorted(file.name for file in tmp_path.iterdir())
        assert names == ["held-out-moments-0.safetensors", "moments-0.safetensors"]
        assert float(one[0].tokens) + float(other[0].tokens) == sum(
            len(text.ids) - 1 for text in TEXTS
        )

    def test_progress_counts_the_batches_of_all_groups(self, stack, tmp_path):
        said = []
        self.files(stack, tmp_path, 2).collect("moments", TEXTS, lambda *what: said.append(what))
        assert said == [("moments", done, 6) for done in range(7)]

    @pytest.mark.parametrize(
        "damage",
        [
            lambda file: file.write_bytes(b""),
            lambda file: file.write_bytes(file.read_bytes()[:-9]),
            lambda file: file.write_bytes(b"0" * 500),
            # Of moments, but not of these layers, not whole, of another width, or without the number of batches.
            lambda file: alter(file, lambda t: [t.pop(f"3.{name}") for name in NAMES]),
            lambda file: alter(file, lambda t: t.pop("1.hu")),
            lambda file: alter(file, lambda t: t.update({"1.hh": torch.zeros(2, 2).double()})),
            lambda file: alter(file, lambda t: None, metadata=None),
            lambda file: alter(file, lambda t: None, metadata={"batches": "two"}),
            lambda file: (file.unlink(), file.mkdir()),
        ],
    )
    def test_a_damaged_file_is_named(self, stack, tmp_path, damage):
        files = self.files(stack, tmp_path)
        files.collect("moments", TEXTS, silent)
        file = tmp_path / "moments-0.safetensors"
        damage(file)
        with pytest.raises(LabelError, match=r"moments-0.safetensors is damaged \(.*delete it and"):
            files.collect("moments", TEXTS, silent)


def alter(file, change, *, metadata=None):
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata=metadata)
