"""A token that leaves early is read through its head; all other tokens, and all states, are the base model's own."""

from dataclasses import dataclass

import pytest
import torch

from dynadepth.caching.depth_cache import DepthCache
from dynadepth.exits.exit_forward import Exits
from dynadepth.models.structure import position_arguments
from dynadepth.plans import identity_plan
from dynadepth.proving.driving import FixedPlans
from dynadepth.proving.prove import proved_stack
from tests.tiny import KINDS, MECHANISMS, random_batch, tiny_model

NEW = 9
LIMIT = 1e-9


@dataclass
class Head:
    """Leaves for about a share of all states, which follows from the state alone."""

    layer_idx: int
    share: float = 0.5

    def leaves(self, states):
        weights = torch.linspace(-1.0, 1.0, states.shape[-1], dtype=states.dtype)
        return (states @ weights * 7.0).frac().abs() < self.share

    def final(self, states):
        return 0.5 * states.flip(-1)


def cache_of(output):
    return output.get("past_key_values") if output.get("cache") is None else output["cache"]


def step(model, ids, mask, cache=None, **more):
    given = {} if cache is None else {"past_key_values": cache}
    positions = position_arguments(model, mask)
    given |= {name: each[:, -ids.shape[1] :] for name, each in positions.items()}
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=True, **given, **more)


def decode(model, ids, mask, prefill, *, cache=None, sizes=()):
    """Return the logits of all columns and the cache, after a prefill and then so many tokens at a time."""
    sizes = list(sizes) or [1] * (ids.shape[1] - prefill)
    output = step(model, ids[:, :prefill], mask[:, :prefill], cache)
    pieces, begin = [output.logits], prefill
    for size in sizes:
        end = begin + size
        output = step(model, ids[:, begin:end], mask[:, :end], cache_of(output))
        pieces.append(output.logits)
        begin = end
    return torch.cat(pieces, dim=1), cache_of(output)


class Reference:
    """The base model's logits, its states before each layer, and its readings through heads."""

    def __init__(self, model, stack, ids, mask, prefill):
        self.logits, self.cache = decode(model, ids, mask, prefill)
        self.states = {}
        self.prefill = prefill
        handles = [
            layer.register_forward_pre_hook(self._note(layer_idx), with_kwargs=True)
            for layer_idx, layer in enumerate(stack.layers)
        ]
        decode(model, ids, mask, prefill)
        for handle in handles:
            handle.remove()
        self.model, self.stack, self.given = model, stack, (ids, mask, prefill)

    def _note(self, layer_idx):
        def hook(_module, args, kwargs):
            states = args[0] if args else kwargs["hidden_states"]
            self.states.setdefault(layer_idx, []).append(states)

        return hook

    def before(self, layer_idx):
        return torch.cat(self.states[layer_idx], dim=1)

    def read_through(self, head):
        """Return the logits of all columns if the last layer gave out what the head does."""
        final = head.final(self.before(head.layer_idx))
        places = iter(final.split([part.shape[1] for part in self.states[0]], dim=1))

        def replaced(_module, _args, output):
            given = next(places)
            return (given, *output[1:]) if isinstance(output, tuple) else given

        handle = self.stack.layers[-1].register_forward_hook(replaced)
        logits, _ = decode(self.model, *self.given)
        handle.remove()
        return logits

    def expected(self, heads):
        """Return the logits with early tokens read through their heads, and which are early. Shape (rows, tokens)."""
        early = torch.zeros(self.logits.shape[:2], dtype=torch.bool)
        logits = self.logits.clone()
        for head in heads:
            leaves = head.leaves(self.before(head.layer_idx)) & ~early
            leaves[:, : self.prefill] = False
            logits = torch.where(leaves[..., None], self.read_through(head), logits)
            early |= leaves
        return logits, early


def same(found, expected, mask):
    real = mask.bool()
    return float((found - expected).abs()[real].max())


def assert_same_states(cache, base, mask):
    assert isinstance(cache, DepthCache)
    real = mask.bool()
    for layer_idx, layer in enumerate(base.layers):
        keys, values, _ = cache.states(layer_idx)
        kept = real[:, -layer.keys.shape[-2] :]
        for found, expected in ((keys, layer.keys), (values, layer.values)):
            differ = (found - expected).abs().amax(dim=(1, 3))[kept]
            assert float(differ.max()) < LIMIT


@pytest.fixture(params=KINDS, ids=" ".join)
def kind(request):
    return request.param


def made(family, attention=None, num_layers=4):
    model = tiny_model(family, num_layers=num_layers, attention=attention)
    return model, proved_stack(model)


def leaving(model, stack, heads, window=8):
    plan = identity_plan(stack.num_layers)[None]
    return FixedPlans(model, stack, plan, exits=Exits(tuple(heads), window))


def test_what_goes_on_and_all_states_are_the_base_models(kind):
    model, stack = made(*kind)
    ids, mask = random_batch([7 + NEW, 4 + NEW, 5 + NEW], seed=3)
    heads = [Head(1), Head(2, share=0.3)]
    reference = Reference(model, stack, ids, mask, 7)
    expected, early = reference.expected(heads)
    assert 0 < int(early.sum()) < early[:, 7:].numel()
    with leaving(model, stack, heads):
        logits, cache = decode(model, ids, mask, 7)
        assert same(logits, expected, mask) < LIMIT
        assert_same_states(cache, reference.cache, mask)


@pytest.mark.parametrize("family", MECHANISMS)
def test_a_row_alone_gives_what_it_gives_in_a_batch(family):
    model, stack = made(family)
    ids, mask = random_batch([7 + NEW, 4 + NEW, 5 + NEW], seed=4)
    with leaving(model, stack, [Head(1, share=0.7)]):
        together, _ = decode(model, ids, mask, 7)
        for row, padding in enumerate((0, 3, 2)):
            alone = ids[row : row + 1, padding:], mask[row : row + 1, padding:]
            logits, _ = decode(model, *alone, 7 - padding)
            assert float((logits[0] - together[row, padding:]).abs().max()) < LIMIT


@pytest.mark.parametrize("family", MECHANISMS)
@pytest.mark.parametrize("window", [1, 2, 3, 8])
def test_all_leave(family, window):
    model, stack = made(family)
    ids, mask = random_batch([5 + NEW, 5 + NEW], seed=5)
    reference = Reference(model, stack, ids, mask, 5)
    heads = [Head(2, share=2.0)]
    expected, early = reference.expected(heads)
    assert bool(early[:, 5:].all())
    with leaving(model, stack, heads, window):
        logits, cache = decode(model, ids, mask, 5)
        assert same(logits, expected, mask) < LIMIT
        assert len(cache.owed) == NEW % window
        assert_same_states(cache, reference.cache, mask)
        assert len(cache.owed) == 0


@pytest.mark.parametrize("family", MECHANISMS)
def test_who_never_leaves_is_bit_equal(family):
    model, stack = made(family)
    ids, mask = random_batch([5 + NEW, 3 + NEW], seed=6)
    expected, _ = decode(model, ids, mask, 5)
    with leaving(model, stack, [Head(1, share=0.0), Head(3, share=0.0)]):
        logits, _ = decode(model, ids, mask, 5)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("family", MECHANISMS)
def test_several_tokens_at_once_settle_what_is_owed(family):
    model, stack = made(family)
    ids, mask = random_batch([5 + NEW, 4 + NEW], seed=7)
    sizes = [1, 1, 3, 1, 1, 2]
    base, base_cache = decode(model, ids, mask, 5, sizes=sizes)
    with leaving(model, stack, [Head(1, share=2.0)]):
        logits, cache = decode(model, ids, mask, 5, sizes=sizes)
        assert_same_states(cache, base_cache, mask)
    real = mask.bool()
    for columns in (slice(0, 5), slice(7, 10), slice(12, 14)):
        assert float((logits - base)[:, columns][real[:, columns]].abs().max()) < LIMIT
