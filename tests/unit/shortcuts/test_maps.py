"""One map and the maps of a model: the formula, copies on devices and in dtypes, digests, and what is refused."""

import copy
import pickle

import pytest
import torch

from dynadepth.errors import ConfigError, ShortcutError
from dynadepth.models.fingerprint import fingerprint
from dynadepth.shortcuts.maps import LinearShortcut, Shortcuts
from tests.tiny import tiny_model
from tests.tiny_shortcuts import random_shortcuts

WIDTH = 6
RANKS = (0, 1, 3, 6, "full")


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def random_map(rank, *, seed=0, width=WIDTH):
    bias = normal(width, seed=seed + 2)
    if rank == 0:
        return LinearShortcut(None, None, bias)
    if rank == "full":
        return LinearShortcut(normal(width, width, seed=seed), None, bias)
    return LinearShortcut(normal(width, rank, seed=seed), normal(rank, width, seed=seed + 1), bias)


def shortcuts(*maps, **parts):
    return Shortcuts(**{"maps": maps, "fingerprint": {}, "rank": 1, **parts})


class TestOneMap:
    @pytest.mark.parametrize("rank", RANKS)
    @pytest.mark.parametrize("shape", [(WIDTH,), (3, WIDTH), (2, 5, WIDTH), (0, 4, WIDTH)])
    def test_the_formula_for_every_shape(self, rank, shape):
        shortcut, states = random_map(rank), normal(*shape, seed=7)
        expected = states.clone()
        if rank == "full":
            expected += states @ shortcut.A
        elif rank:
            expected += states @ shortcut.A @ shortcut.B
        before = states.clone()
        found = shortcut(states)
        assert found.shape == shape
        assert torch.allclose(found, expected + shortcut.b, rtol=0, atol=1e-12)
        assert torch.equal(states, before)
        assert found.untyped_storage().data_ptr() != states.untyped_storage().data_ptr() or (
            not states.numel()
        )

    def test_states_that_are_not_contiguous(self):
        shortcut, states = random_map(3), normal(WIDTH, 5, 2, seed=7).transpose(0, 2)
        assert torch.equal(shortcut(states), shortcut(states.contiguous()))

    @pytest.mark.parametrize("rank", RANKS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_the_dtype_is_that_of_the_states(self, rank, dtype):
        shortcut, states = random_map(rank), normal(4, WIDTH, seed=7).to(dtype)
        found = shortcut(states)
        assert found.dtype == dtype
        rough = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.1)
        assert torch.allclose(found.double(), shortcut(states.double()), atol=rough, rtol=rough)
        # The map itself keeps its own numbers.
        assert shortcut.b.dtype == torch.float64

    @pytest.mark.parametrize("rank", RANKS)
    def test_placed_ahead_is_placed_at_the_first_call(self, rank):
        ahead, later = random_map(rank), random_map(rank)
        cpu = torch.device("cpu")
        down, up, bias = ahead.place(cpu, torch.float32)
        assert bias.dtype == torch.float32
        for each, own in ((down, ahead.A), (up, ahead.B)):
            assert (each is None) == (own is None)
            if each is not None:
                assert each.is_contiguous()
                assert torch.equal(each, own.float().T)
        states = normal(3, WIDTH, seed=7).float()
        assert torch.equal(ahead(states), later(states))
        assert set(later._placed) == {(cpu, torch.float32)}

    def test_a_copy_that_was_placed_is_used_again(self):
        shortcut, states = random_map(3), normal(3, WIDTH)
        shortcut(states)
        (placed,) = shortcut._placed.values()
        shortcut(states)
        (again,) = shortcut._placed.values()
        assert placed is again

    def test_a_map_on_another_device_than_the_states(self):
        shortcut = random_map(2)
        found = shortcut(torch.empty(2, 3, WIDTH, device="meta"))
        assert (found.device.type, found.shape, found.dtype) == (
            "meta",
            (2, 3, WIDTH),
            torch.float32,
        )

    @pytest.mark.parametrize("rank", RANKS)
    def test_gradients_reach_the_states_and_not_the_map(self, rank):
        parts = random_map(rank)
        given = [
            None if each is None else each.requires_grad_() for each in (parts.A, parts.B, parts.b)
        ]
        shortcut = LinearShortcut(*given)
        states = normal(2, WIDTH, seed=7).requires_grad_()
        shortcut(states).sum().backward()
        expected = torch.eye(WIDTH, dtype=torch.float64)
        if parts.A is not None:
            expected += (parts.A if parts.B is None else parts.A @ parts.B).detach()
        assert torch.allclose(states.grad, expected.sum(dim=1).expand(2, WIDTH))
        assert all(each is None or each.grad is None for each in given)

    @pytest.mark.parametrize("rank", RANKS)
    def test_first_called_in_inference_mode_it_still_lets_gradients_through(self, rank):
        shortcut, states = random_map(rank), normal(2, WIDTH)
        with torch.inference_mode():
            shortcut(states)
        states = states.clone().requires_grad_()
        shortcut(states).square().sum().backward()
        assert bool(torch.isfinite(states.grad).all())

    def test_copies_are_the_same_and_pickles_are_equal(self):
        shortcut = random_map(3)
        shortcut(normal(2, WIDTH))
        assert copy.deepcopy(shortcut) is shortcut
        assert copy.deepcopy({"a": [shortcut]})["a"][0] is shortcut
        again = pickle.loads(pickle.dumps(shortcut))
        assert again._placed == {}
        for name in ("A", "B", "b"):
            assert torch.equal(getattr(again, name), getattr(shortcut, name))
        assert torch.equal(again(normal(2, WIDTH)), shortcut(normal(2, WIDTH)))

    def test_what_it_costs(self):
        costs = {rank: random_map(rank).multiply_adds for rank in RANKS}
        assert costs == {0: 0, 1: 12, 3: 36, 6: 72, "full": 36}
        assert {random_map(rank).hidden_size for rank in RANKS} == {WIDTH}

    @pytest.mark.parametrize(
        ("down", "up", "bias"),
        [
            ((4, 2), (2, 4), (3,)),
            ((4, 2), (3, 4), (4,)),
            ((4, 2), (2, 5), (4,)),
            ((4, 2), None, (4,)),
            (None, (2, 4), (4,)),
            ((2, 4), (4, 2), (4,)),
            ((4, 5), (5, 4), (4,)),
            ((4, 4), (4,), (4,)),
            ((4,), (4,), (4,)),
            ((1, 4, 2), (2, 4), (4,)),
            ((4, 2), (2, 4), (1, 4)),
            ((4, 2), (2, 4), ()),
            (None, None, (0,)),
            (None, None, ()),
            ((0, 0), None, (0,)),
        ],
    )
    def test_shapes_that_do_not_fit_are_refused(self, down, up, bias):
        given = [None if shape is None else torch.zeros(shape) for shape in (down, up, bias)]
        with pytest.raises(ConfigError, match="a shortcut was given A .*; expected") as found:
            LinearShortcut(*given)
        assert str(bias) in str(found.value)

    @pytest.mark.parametrize("name", ["A", "B", "b"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_values_that_are_not_finite_are_refused(self, name, value):
        good = random_map(2)
        parts = {each: getattr(good, each).clone() for each in ("A", "B", "b")}
        parts[name].view(-1)[-1] = value
        message = f"^{name} of a shortcut holds values that are not finite; fit it again$"
        with pytest.raises(ConfigError, match=message):
            LinearShortcut(**parts)


class TestAllMaps:
    def test_what_they_say_of_themselves(self):
        found = shortcuts(None, random_map(2), None, random_map("full"), random_map(0))
        assert (found.num_layers, found.hidden_size) == (5, WIDTH)
        assert found.mapped_layers == (1, 3, 4)
        assert isinstance(found.maps, tuple)
        assert sorted(found.tensors()) == [
            "layers.1.A", "layers.1.B", "layers.1.b", "layers.3.A", "layers.3.b", "layers.4.b",
        ]  # fmt: skip

    @pytest.mark.parametrize(
        "maps", [(), (None, None), (random_map(1), random_map(1, width=4), None)]
    )
    def test_no_map_or_two_widths_are_refused(self, maps):
        with pytest.raises(
            ConfigError, match="expected one width, and a map for one layer or more"
        ):
            shortcuts(*maps)

    def test_the_digest_tells_maps_apart_and_nothing_else(self):
        maps = [None, random_map(2), random_map("full"), random_map(0)]
        digest = shortcuts(*maps).digest
        assert len(digest) == 16
        assert set(digest) <= set("0123456789abcdef")
        alike = [None, *(pickle.loads(pickle.dumps(each)) for each in maps[1:])]
        alike[1](normal(2, WIDTH))
        assert shortcuts(*alike, rank=3, base_model="other", training={"a": 1}).digest == digest
        changed = pickle.loads(pickle.dumps(maps[1]))
        changed.b[0] = torch.nextafter(changed.b[0], torch.tensor(9.0, dtype=torch.float64))
        others = [
            [None, changed, *maps[2:]],
            [maps[1], None, *maps[2:]],
            [None, maps[1], maps[3], maps[2]],
            [None, maps[1], maps[2], None],
            [
                None,
                LinearShortcut(maps[1].A, maps[1].B, maps[1].b.float()),
                *maps[2:],
            ],
        ]
        assert len({digest, *(shortcuts(*each).digest for each in others)}) == 6

    def test_the_digest_does_not_depend_on_strides_or_gradients(self):
        good = random_map(2)
        strided = LinearShortcut(
            good.A.T.contiguous().T, good.B.T.contiguous().T, good.b.clone().requires_grad_()
        )
        assert not strided.A.is_contiguous()
        assert shortcuts(strided).digest == shortcuts(good).digest

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_a_digest_in_every_dtype(self, dtype):
        good = random_map(2)
        lower = LinearShortcut(good.A.to(dtype), good.B.to(dtype), good.b.to(dtype))
        assert shortcuts(lower).digest != shortcuts(good).digest

    def test_copies_share_the_maps(self):
        found = random_shortcuts(tiny_model())
        again = copy.deepcopy(found)
        assert again.digest == found.digest
        assert all(one is other for one, other in zip(found.maps, again.maps, strict=True))
        pickled = pickle.loads(pickle.dumps(found))
        assert (pickled.digest, pickled.rank) == (found.digest, found.rank)

    def test_they_cannot_be_changed(self):
        found = random_shortcuts(tiny_model())
        with pytest.raises(AttributeError):
            found.maps = ()
        with pytest.raises(TypeError):
            found.maps[0] = None


class TestTheModel:
    def test_its_own_in_any_dtype(self):
        model = tiny_model()
        found = random_shortcuts(model)
        found.check_model(model)
        found.check_model(model.float())

    def test_another_model_is_refused_unless_it_is_accepted(self):
        model, other = tiny_model(), tiny_model(seed=1)
        found = random_shortcuts(model)
        with pytest.raises(ShortcutError) as error:
            found.check_model(other)
        said = str(error.value)
        assert "the shortcuts belong to another base model than this LlamaForCausalLM" in said
        assert "they were made with tiny, and here weights of" in said
        assert "fit shortcuts on this model" in said
        assert "shortcuts=load_shortcuts(path, model=model, accept_mismatch=True)" in said
        accepted = Shortcuts(maps=found.maps, fingerprint=found.fingerprint, rank=3, accepted=True)
        accepted.check_model(other)

    @pytest.mark.parametrize("accepted", [False, True])
    def test_another_shape_is_never_accepted(self, accepted):
        model = tiny_model()
        found = Shortcuts(
            maps=random_shortcuts(model).maps,
            fingerprint=fingerprint(model),
            rank=3,
            accepted=accepted,
        )
        with pytest.raises(ShortcutError, match="they need 4 layers of width 32") as error:
            found.check_model(tiny_model(num_layers=5))
        assert "accept_mismatch" not in str(error.value)

    def test_maps_for_fewer_layers_than_the_fingerprint_says_are_refused(self):
        model = tiny_model()
        found = Shortcuts(
            maps=random_shortcuts(model).maps[:3], fingerprint=fingerprint(model), rank=3
        )
        with pytest.raises(ShortcutError, match="they need 3 layers of width 32"):
            found.check_model(model)
