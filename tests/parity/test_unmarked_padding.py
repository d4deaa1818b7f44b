"""Padding on the right that no mask tells, as evaluation harnesses leave it: no row gets another plan than alone."""

import numpy as np
import pytest
import torch

from dynadepth.errors import UnsupportedModelError
from dynadepth.execution.padding import SpecialTokens, unmarked_padding
from dynadepth.plans import identity_plan
from dynadepth.policies.base import Policy
from dynadepth.wrapping.wrap import wrap_model
from tests.tiny import MECHANISMS, tiny_model

LENGTHS = (9, 4, 6, 8)
PAD = 3


class SumOfStates(Policy):
    """Plans by the prompt's states, so that padding read as text gives another plan."""

    num_layers = 4
    decision_layers = (0, 2)

    def initial_plans(self, num_rows):
        return np.tile(identity_plan(4), (num_rows, 1))

    def decide(self, layer_idx, hidden_states, prompts):
        weights = torch.linspace(-1, 2, hidden_states.shape[-1], dtype=hidden_states.dtype)
        total = (hidden_states * weights * prompts.mask.unsqueeze(-1)).sum(dim=(1, 2))
        digits = torch.stack([(total * 10).long(), (total * 1e4).long()], dim=1).remainder(3)
        return np.asarray(digits.to(torch.uint8))


def padded_rows(token):
    """Rows of text without special tokens, padded on the right with `token`."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(10, 97, (len(LENGTHS), max(LENGTHS)), generator=generator)
    for row, length in enumerate(LENGTHS):
        ids[row, length:] = token
    return ids


def model_with(family="llama", **tokens):
    model = tiny_model(family)
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        setattr(model.config, name, tokens.get(name))
    return wrap_model(model, policy=SumOfStates())


@pytest.mark.parametrize("family", MECHANISMS)
def test_rows_padded_with_a_pad_token_are_planned_as_they_are_alone(family):
    model, ids = model_with(family, pad_token_id=PAD, eos_token_id=2), padded_rows(PAD)
    logits = model(ids).logits
    plans = model.dynadepth.last_plans
    assert len({tuple(plan) for plan in plans}) > 1
    for row, length in enumerate(LENGTHS):
        alone = model(ids[row : row + 1, :length]).logits
        assert (model.dynadepth.last_plans == plans[row]).all()
        assert (logits[row, :length] - alone[0]).abs().max() < 1e-9


def test_a_mask_says_more_than_tokens_do():
    model, ids = model_with(pad_token_id=PAD), padded_rows(PAD)
    model(ids, attention_mask=torch.ones_like(ids))
    plans = model.dynadepth.last_plans
    model(padded_rows(PAD), attention_mask=torch.ones_like(ids))
    assert (model.dynadepth.last_plans == plans).all()
    model(ids)
    assert (model.dynadepth.last_plans != plans).any()


@pytest.mark.parametrize(
    ("token", "known"),
    [
        (0, {"pad_token_id": PAD}),  # what evaluation harnesses pad with, whatever the model's own
        (0, {}),
        (2, {"eos_token_id": 2}),
        (2, {"eos_token_id": 2, "pad_token_id": 2}),
        (2, {"eos_token_id": [1, 2], "pad_token_id": 1}),
        (5, {"bos_token_id": 5}),
    ],
)
def test_padding_that_may_be_text_is_refused(token, known):
    model, ids = model_with(**known), padded_rows(token)
    with pytest.raises(UnsupportedModelError, match=rf"3 of 4 rows end with token {token}, which"):
        model(ids)
    # Both ways that the message names, and rows by themselves.
    real = torch.arange(ids.shape[1]) < torch.tensor(LENGTHS)[:, None]
    model(ids, attention_mask=real.long())
    plans = model.dynadepth.last_plans
    with model.dynadepth.prompt(LENGTHS):
        model(ids)
    assert (model.dynadepth.last_plans == plans).all()
    for row, length in enumerate(LENGTHS):
        model(ids[row : row + 1, :length])
        assert (model.dynadepth.last_plans == plans[row]).all()


def test_a_policy_that_reads_no_prompt_asks_for_no_mask():
    model = wrap_model(tiny_model(), plan="0-1,3")
    model(padded_rows(0))
    assert model.dynadepth.last_plans.tolist() == [[1, 1, 0, 1]] * 4


def test_a_row_of_padding_alone_and_padding_within_text_stay():
    real = torch.ones(3, 4, dtype=torch.bool)
    tokens = torch.tensor([[PAD] * 4, [8, PAD, 9, PAD], [PAD, 8, 9, 7]])
    found = unmarked_padding(real, tokens, SpecialTokens(PAD, ()))
    assert found.tolist() == [[True] * 4, [True, True, True, False], [True] * 4]


def test_embeddings_tell_nothing():
    real = torch.ones(2, 3, dtype=torch.bool)
    assert unmarked_padding(real, torch.zeros(2, 3, 8), SpecialTokens(0, (0,))) is real
