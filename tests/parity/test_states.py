"""States picked up in a sweep against hooks on baked models, one unpadded prompt at a time.

Tolerances: float64 1e-9; with windows the states are averaged in float32, so 1e-6 of the largest.
"""

import numpy as np
import pytest
import torch

from dynadepth.execution.sweep import Sweeper
from dynadepth.models.structure import layer_stack
from dynadepth.plans import prefix_numbers
from dynadepth.proving.prove import proved_stack
from dynadepth.wrapping.bake import bake
from dynadepth_search.data.tasks import Example
from dynadepth_search.scoring.scorer import Scorer
from dynadepth_search.scoring.states import PromptStates
from tests.parity.drivers import Watch
from tests.tiny import MECHANISMS, random_batch, tiny_model
from tests.tiny_text import word_tokenizer

NUM_LAYERS = 4
LAYERS = range(NUM_LAYERS)
# Layer 0 skipped and repeated, prefixes that part early and late, two plans that are one up to layer 3.
PLANS = np.array(
    [
        [1, 1, 1, 1],
        [0, 1, 1, 1],
        [0, 0, 2, 1],
        [2, 1, 0, 1],
        [1, 2, 0, 0],
        [1, 2, 0, 2],
        [2, 1, 1, 0],
        [0, 0, 0, 1],
    ],
    dtype=np.uint8,
)
EXAMPLES = {
    # Of one token, of two, and longer than gemma's window; answers with rows of their own, and of one length.
    "choices": [
        Example("x", ("one two three", "one two", "four"), 2),
        Example("Which letter comes first in the alphabet?", ("b", "a"), 1),
        Example("Hi", ("yes", "no"), 0),
    ],
    "completion": [Example("a b c d", completion="e f g"), Example("p", completion="qrs")],
    "prompt": [Example("Once upon a time"), Example("x"), Example("def main(): return")],
}
BAKED = {}


@pytest.fixture(scope="module", params=MECHANISMS)
def model(request):
    return tiny_model(request.param, num_layers=NUM_LAYERS)


@pytest.fixture(autouse=True, scope="module")
def _clear():
    yield
    BAKED.clear()


def entering(model, prefix, ids):
    """Return the states that enter layer `len(prefix)`, seen by a hook. Shape (tokens, hidden)."""
    key = (model, tuple(prefix))
    if key not in BAKED:
        BAKED[key] = bake(model, [*prefix, *[1] * (NUM_LAYERS - len(prefix))])
    seen = []

    def look(_layer, args, kwargs):
        seen.append((args[0] if args else kwargs["hidden_states"])[0].clone())

    layer = layer_stack(BAKED[key]).layers[sum(prefix)]
    handle = layer.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.no_grad():
            BAKED[key](torch.tensor([ids]), use_cache=False)
    finally:
        handle.remove()
    (states,) = seen
    return states


def naive_views(states, num_windows):
    count = len(states)
    views = []
    for window in range(num_windows):
        start = window * count // num_windows
        stop = max(start + 1, (window + 1) * count // num_windows)
        views.append(states[start:stop].mean(dim=0))
    return torch.stack([*views, states[-1]])


def collect(scorer, examples, *, num_windows=0, layers=LAYERS, plans=PLANS):
    states = PromptStates(
        plans,
        list(layers),
        num_windows=num_windows,
        num_prompts=len(examples),
        hidden_size=32,
        dtype=scorer.model.dtype,
    )
    scorer.outcomes(
        examples,
        np.tile(plans, (len(examples), 1)),
        np.repeat(np.arange(len(examples)), len(plans)),
        states=states,
    )
    return states.views


def test_an_observer_is_shown_the_state_of_every_plan(model):
    ids, mask = random_batch([9, 2, 12], seed=3)
    example = np.array([0, 1, 2, 0, 2, 1, 0, 2])
    score = torch.tensor([[row, 11] for row in range(len(PLANS))])
    watch = Watch(frozenset(LAYERS))
    with Sweeper(model, proved_stack(model)) as sweeper:
        plain = sweeper.sweep(ids, mask, PLANS, example, score=score)
        watched = sweeper.sweep(ids, mask, PLANS, example, score=score, observer=watch)
    # Where tokens that nobody reads pass the feed-forward module or not, products with a bias round differently.
    if any(name.endswith(".bias") for name, _ in layer_stack(model).layers.named_parameters()):
        assert (plain.logits - watched.logits).abs().max().item() < 1e-9
    else:
        assert torch.equal(plain.logits, watched.logits)
    assert (plain.naive_visits, plain.executed_visits) == (
        watched.naive_visits,
        watched.executed_visits,
    )
    assert [layer for layer, _, _ in watch.seen] == list(LAYERS)
    for layer, states, rows in watch.seen:
        distinct = {(int(e), bytes(p[:layer])) for e, p in zip(example, PLANS, strict=True)}
        # Before layer 0 the states are the prompts; later one for each distinct prefix of a prompt.
        assert len(states) == len(distinct)
        for plan, number, row in zip(PLANS, example, rows, strict=True):
            real = mask[number].bool()
            expected = entering(model, plan[:layer].tolist(), ids[number, real].tolist())
            assert (states[row, real] - expected).abs().max().item() < 1e-9


def test_an_observer_sees_its_layers_only(model):
    ids, mask = random_batch([5])
    watch = Watch((2,))
    with Sweeper(model, proved_stack(model)) as sweeper:
        sweeper.sweep(ids, mask, PLANS[:3], [0, 0, 0], score=torch.tensor([[0, 4]]), observer=watch)
    assert [layer for layer, _, _ in watch.seen] == [2]


@pytest.mark.parametrize("num_windows", [0, 2])
@pytest.mark.parametrize("kind", EXAMPLES)
def test_states_are_those_of_the_baked_model(model, kind, num_windows):
    tokenizer, examples = word_tokenizer(bos=kind == "choices"), EXAMPLES[kind]
    views = collect(Scorer(model, tokenizer), examples, num_windows=num_windows)
    assert list(views) == list(LAYERS)
    for layer in LAYERS:
        numbers = prefix_numbers(PLANS, layer)
        shape = (len(examples), numbers.max() + 1, num_windows + 1, 32)
        assert views[layer].shape == shape
        assert views[layer].dtype == torch.float64
        for index, item in enumerate(examples):
            ids = tokenizer(item.prompt)["input_ids"]
            for plan, number in zip(PLANS, numbers, strict=True):
                states = entering(model, plan[:layer].tolist(), ids)
                expected = naive_views(states, num_windows)
                tolerance = 1e-6 * states.abs().max().item() if num_windows else 1e-9
                error = (views[layer][index, number] - expected).abs().max().item()
                assert error < tolerance, (layer, index, plan)
        if layer:
            assert (views[layer].diff(dim=1).abs().amax(dim=(2, 3)) > 1e-3).all()


@pytest.mark.parametrize(
    "limits", [{"max_tokens": 1}, {"max_logit_bytes": 4 * 97 * 5}, {"sweep_tokens": 1}]
)
@pytest.mark.parametrize("kind", EXAMPLES)
def test_how_sweeps_are_cut_does_not_matter(kind, limits):
    model, tokenizer = tiny_model("gemma3", num_layers=NUM_LAYERS), word_tokenizer()
    whole = collect(Scorer(model, tokenizer), EXAMPLES[kind])
    cut = collect(Scorer(model, tokenizer, **limits), EXAMPLES[kind])
    for layer in LAYERS:
        assert (whole[layer] - cut[layer]).abs().max().item() < 1e-9


def test_layers_in_any_order_and_only_those():
    model, tokenizer = tiny_model(num_layers=NUM_LAYERS), word_tokenizer()
    whole = collect(Scorer(model, tokenizer), EXAMPLES["choices"])
    some = collect(Scorer(model, tokenizer), EXAMPLES["choices"], layers=[3, 1])
    assert list(some) == [3, 1]
    assert all(torch.equal(some[layer], whole[layer]) for layer in some)


def test_only_prefixes_that_were_asked_for_are_kept():
    model, tokenizer = tiny_model(num_layers=NUM_LAYERS), word_tokenizer()
    examples = EXAMPLES["prompt"]
    states = PromptStates(
        PLANS[[0, 3]], [2], num_windows=0, num_prompts=3, hidden_size=32, dtype=model.dtype
    )
    # Plans that were not asked for are swept too, and the second prompt's second plan is not.
    scored = [(0, 0), (0, 2), (0, 3), (1, 0), (1, 1), (2, 0), (2, 3)]
    example, rows = np.array(scored).T
    Scorer(model, tokenizer).outcomes(examples, PLANS[rows], example, states=states)
    view = states.views[2]
    assert view.shape == (3, 2, 1, 32)
    expected = collect(Scorer(model, tokenizer), examples)[2]
    assert torch.isnan(view[1, 1]).all()
    numbers = prefix_numbers(PLANS, 2)
    for prompt, number in [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]:
        wanted = expected[prompt, numbers[[0, 3][number]]]
        assert (view[prompt, number] - wanted).abs().max().item() < 1e-9


@pytest.mark.parametrize("num_windows", [0, 3])
def test_states_are_kept_in_the_dtype_asked_for(num_windows):
    model, tokenizer = tiny_model(num_layers=2, dtype=torch.bfloat16), word_tokenizer()
    plans = np.array([[1, 1], [0, 1]], dtype=np.uint8)
    views = collect(
        Scorer(model, tokenizer),
        EXAMPLES["prompt"],
        plans=plans,
        layers=[1],
        num_windows=num_windows,
    )
    assert views[1].dtype == torch.bfloat16
    assert views[1].shape == (3, 2, num_windows + 1, 32)
    assert views[1].isfinite().all()
    # Skipping layer 0 leaves the embeddings, which no batch rounds differently.
    ids = tokenizer("def main(): return")["input_ids"]
    embedded = model.get_input_embeddings()(torch.tensor(ids))
    assert torch.equal(views[1][2, 1, -1], embedded[-1])


def test_equal_prompts_each_have_their_states():
    model, tokenizer = tiny_model(num_layers=NUM_LAYERS), word_tokenizer()
    examples = [
        Example("Hi", ("yes", "no"), 0),
        Example("Hi", ("up", "down"), 0),
        Example("Hi", ("yes", "no"), 1),
    ]
    views = collect(Scorer(model, tokenizer, sweep_tokens=1), examples)
    for layer in LAYERS:
        assert views[layer].isfinite().all()
        assert (views[layer] - views[layer][:1]).abs().max().item() < 1e-9
