"""Laws 1 and 2: the wrapped model does in everything what the baked model does."""

import copy

import numpy as np
import pytest
import torch

from dynadepth.plans import identity_plan
from dynadepth.wrapping.bake import bake
from dynadepth.wrapping.wrap import unwrap_model, wrap_model
from tests.parity.drivers import MODES, baked_rows, drive, mixed_plans
from tests.tiny import FAMILIES, KINDS, VARIANTS, VOCAB_SIZE, random_batch, tiny_model

NAMES = [*FAMILIES, *VARIANTS]
LENGTHS = [9, 5, 7, 12]
NEW = 7
NUM_LAYERS = 4
TOLERANCE = 1e-9


def continued(side: str, seed: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return padded prompts with NEW more tokens for every row, and the prompts' width."""
    lengths = LENGTHS if side != "none" else [9] * len(LENGTHS)
    ids, mask = random_batch(lengths, seed=seed, side="left" if side == "none" else side)
    generator = torch.Generator().manual_seed(seed + 1)
    more = torch.randint(2, VOCAB_SIZE, (len(lengths), NEW), generator=generator)
    return torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1), ids.shape[1]


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize(("family", "attention"), KINDS)
def test_mixed_padded_batch_equals_baked_rows(family, attention, side):
    model = tiny_model(family, attention=attention)
    plans = mixed_plans(NUM_LAYERS, len(LENGTHS), seed=3)
    ids, mask, width = continued(side, seed=5)
    expected = baked_rows(model, plans, ids, mask, padded=side == "right")
    wrap_model(model, plan=identity_plan(NUM_LAYERS))
    for mode in MODES:
        with model.dynadepth.plans(plans):
            logits = drive(model, ids, mask, width, mode)
        for row, reference in enumerate(expected):
            difference = (logits[row][mask[row].bool()] - reference).abs().max().item()
            assert difference < TOLERANCE, (mode, row, plans[row], difference)
    assert (model.dynadepth.last_plans == plans).all()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("family", NAMES)
def test_random_plans_cached_left_padded(family, seed):
    model = tiny_model(family, seed=seed)
    plans = mixed_plans(NUM_LAYERS, len(LENGTHS), seed=100 + seed)
    ids, mask, width = continued("left", seed=seed)
    expected = baked_rows(model, plans, ids, mask, padded=False)
    wrap_model(model, plan=identity_plan(NUM_LAYERS))
    with model.dynadepth.plans(plans):
        logits = drive(model, ids, mask, width, "chunks")
    for row, reference in enumerate(expected):
        assert (logits[row][mask[row].bool()] - reference).abs().max().item() < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "attention"), KINDS)
def test_identity_is_bit_equal(family, attention, dtype):
    model = tiny_model(family, attention=attention, dtype=dtype)
    ids, mask, width = continued("left", seed=1)
    before = [drive(model, ids, mask, width, mode) for mode in MODES]
    prompt, prompt_mask = ids[:, :width], mask[:, :width]
    settings = {"attention_mask": prompt_mask, "max_new_tokens": 6, "do_sample": False}
    tokens = model.generate(prompt, **settings)
    wrap_model(model, plan=identity_plan(NUM_LAYERS))
    for mode, reference in zip(MODES, before, strict=True):
        assert torch.equal(drive(model, ids, mask, width, mode), reference), mode
    assert torch.equal(model.generate(prompt, **settings), tokens)


@pytest.mark.parametrize("family", NAMES)
def test_bfloat16_equals_baked_in_the_same_batch(family):
    model = tiny_model(family, dtype=torch.bfloat16)
    plan = np.array([2, 0, 1, 2], dtype=np.uint8)
    ids, mask, width = continued("left", seed=2)
    reference = bake(model, plan)
    wrap_model(model, plan=plan)
    for mode in MODES:
        assert torch.equal(
            drive(model, ids, mask, width, mode), drive(reference, ids, mask, width, mode)
        ), mode


GENERATION = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "sampling": {"do_sample": True, "temperature": 0.7},
    "beams": {"num_beams": 3},
    "beams without cache": {"num_beams": 3, "use_cache": False},
    "sequences": {"num_beams": 4, "num_return_sequences": 2},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "chunked prefill": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("kind", GENERATION)
@pytest.mark.parametrize("family", NAMES)
def test_generate_equals_baked(family, kind):
    model = tiny_model(family)
    plan = np.array([0, 2, 1, 2], dtype=np.uint8)
    # Prompt lookup takes one prompt at a time.
    lengths = [11] if kind == "lookup" else [6, 11, 8]
    ids, mask = random_batch(lengths, seed=4)
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, **GENERATION[kind]}
    baked = bake(model, plan)
    torch.manual_seed(0)
    expected = baked.generate(ids, **settings)
    wrap_model(model, plan=plan)
    torch.manual_seed(0)
    assert torch.equal(model.generate(ids, **settings), expected)


@pytest.mark.parametrize("family", NAMES)
def test_generate_with_mixed_plans_equals_baked_rows(family):
    model = tiny_model(family)
    plans = mixed_plans(NUM_LAYERS, 3, seed=9)
    ids, mask = random_batch([6, 11, 8], seed=4)
    for settings in ({}, {"num_beams": 3}, {"use_cache": False}):
        settings = {"max_new_tokens": 8, "do_sample": False, **settings}
        expected = [
            bake(model, plan).generate(ids[row : row + 1, mask[row].bool()], **settings)[
                0, mask[row].sum() :
            ]
            for row, plan in enumerate(plans)
        ]
        wrap_model(model, plan=identity_plan(NUM_LAYERS))
        with model.dynadepth.plans(plans):
            tokens = model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]
        unwrap_model(model)
        for row, reference in enumerate(expected):
            assert tokens[row].tolist() == reference.tolist(), (settings, row)


def test_a_skipping_row_saves_key_value_memory():
    model = tiny_model("llama")
    ids, mask = random_batch([8, 8])
    wrap_model(model, plan=identity_plan(NUM_LAYERS))
    held = {}
    for name, plans in {"identity": [[1] * 4] * 2, "mixed": [[1, 0, 1, 0], [1, 1, 1, 0]]}.items():
        with model.dynadepth.plans(plans), torch.no_grad():
            held[name] = model(ids, attention_mask=mask, use_cache=True).past_key_values.state_bytes
    assert held["mixed"] * 8 == held["identity"] * 5


def test_several_turns_on_one_cache_keep_the_plan_of_the_first():
    from transformers import DynamicCache

    model = tiny_model("gemma3")
    plans = mixed_plans(NUM_LAYERS, 2, seed=2)
    ids, mask = random_batch([20, 20], seed=3)
    expected = baked_rows(model, plans, ids, mask, padded=False)
    wrap_model(model, plan=identity_plan(NUM_LAYERS))
    cache, logits = DynamicCache(config=model.config), []
    with torch.no_grad():
        with model.dynadepth.plans(plans):
            logits.append(model(ids[:, :8], past_key_values=cache, use_cache=True).logits)
        for begin, end in ((8, 13), (13, 14), (14, 20)):
            logits.append(model(ids[:, begin:end], past_key_values=cache, use_cache=True).logits)
    for row, reference in enumerate(expected):
        assert (torch.cat(logits, 1)[row] - reference).abs().max().item() < TOLERANCE


@pytest.mark.parametrize("family", NAMES)
def test_cropping_the_cache_equals_never_having_gone_on(family):
    from transformers import DynamicCache

    model = tiny_model(family)
    plans = mixed_plans(NUM_LAYERS, 2, seed=2)
    ids, mask = random_batch([16, 16], seed=3)
    expected = baked_rows(model, plans, ids, mask, padded=False)
    wrap_model(model, plan=identity_plan(NUM_LAYERS))
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    with torch.no_grad(), model.dynadepth.plans(plans):
        model(ids[:, :10], past_key_values=cache, use_cache=True)
        model(ids[:, :3], past_key_values=cache, use_cache=True)
        cache.crop(-3)
        logits = model(ids[:, 10:], past_key_values=cache, use_cache=True).logits
    for row, reference in enumerate(expected):
        assert (logits[row] - reference[10:]).abs().max().item() < TOLERANCE


def test_a_deep_copy_runs_its_own_weights_and_plans():
    model = tiny_model("llama")
    ids, mask = random_batch([9])
    plan = np.array([1, 0, 2, 1], dtype=np.uint8)
    reference = bake(model, plan)
    wrap_model(model, plan=plan)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (
        drive(twin, ids, mask, 9, "full") - drive(reference, ids, mask, 9, "full")
    ).abs().max() < TOLERANCE
    assert torch.equal(
        twin.generate(ids, max_new_tokens=5, do_sample=False),
        reference.generate(ids, max_new_tokens=5, do_sample=False),
    )
    unwrap_model(twin)
    assert "dynadepth" not in twin.__dict__
    assert "dynadepth" in model.__dict__
