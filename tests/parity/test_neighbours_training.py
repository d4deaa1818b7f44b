"""Gradients of a wrapped model, with and without activation checkpointing: the sums of those of the baked visits."""

import threading

import numpy as np
import pytest
import torch
import transformers

from dynadepth.errors import UnsupportedModelError, WrapError
from dynadepth.models.structure import layer_stack
from dynadepth.plans import identity_plan
from dynadepth.policies.base import Policy
from dynadepth.wrapping.bake import bake
from dynadepth.wrapping.wrap import unwrap_model, wrap_model
from tests.parity.drivers import drive, mixed_plans, positions_of
from tests.tiny import MECHANISMS, random_batch, tiny_model

PLAN = np.array([0, 2, 1, 2], dtype=np.uint8)
CHECKPOINTING = {
    "none": None,
    "replayed": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
}


def trained(model, checkpointing=None):
    """Set a model to training, and checkpoint its layers if that is asked for."""
    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        assert layer_stack(model).layers[0].gradient_checkpointing
    return model


def loss_of(model, ids, mask):
    """A loss in which every real token's logits weigh differently."""
    logits = model(ids, attention_mask=mask, position_ids=positions_of(mask)).logits
    weights = torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype)
    return (torch.tanh(logits) * weights * mask.unsqueeze(-1) * ids.unsqueeze(-1)).sum()


def gradients(model):
    return {name: weight.grad for name, weight in model.named_parameters()}


def baked_gradients(base, plan, ids, mask):
    """Gradients through the baked model, each visit's brought back to the layer it is a copy of."""
    baked = trained(bake(base, plan))
    loss_of(baked, ids, mask).backward()
    visits = [layer for layer, action in enumerate(plan) for _ in range(action)]
    prefix = layers_of(base)
    totals = {}
    for name, grad in gradients(baked).items():
        if grad is None:
            continue  # an expert that no token was sent to
        home = name
        if name.startswith(prefix):
            place, _, rest = name.removeprefix(prefix).partition(".")
            home = f"{prefix}{visits[int(place)]}.{rest}"
        totals[home] = totals[home] + grad if home in totals else grad
    return totals


def layers_of(model):
    """Return what the names of all weights of decoder layers begin with."""
    layers = layer_stack(model).layers
    return next(f"{name}." for name, module in model.named_modules() if module is layers)


def assert_gradients(model, *expected, relative=1e-9):
    """Compare with the sum of baked gradients; a layer that no row runs has none."""
    for name, grad in gradients(model).items():
        parts = [grads[name] for grads in expected if name in grads]
        if parts:
            scale = sum(part.abs().max() for part in parts)
            assert (grad - sum(parts)).abs().max() < relative * scale, name
        else:
            assert grad is None or not grad.any(), name


def counted_visits(model):
    """Collect the layers of all visits that begin from now on."""
    visits = []
    for layer_idx, layer in enumerate(layer_stack(model).layers):
        # A replay stops as soon as it has what it needs, so the end of a visit may not come.
        layer.mlp.register_forward_pre_hook(
            lambda *_, layer_idx=layer_idx: visits.append(layer_idx)
        )
    return visits


@pytest.mark.parametrize("checkpointing", CHECKPOINTING.values(), ids=CHECKPOINTING.keys())
@pytest.mark.parametrize("family", MECHANISMS)
def test_gradients_are_those_of_the_visits(family, checkpointing):
    ids, mask = random_batch([9, 9], seed=1)
    expected = baked_gradients(tiny_model(family), PLAN, ids, mask)
    model = trained(wrap_model(tiny_model(family), plan=PLAN), checkpointing)
    assert not any(name.startswith(f"{layers_of(model)}0.") for name in expected)
    visits = counted_visits(model)
    loss_of(model, ids, mask).backward()
    # A checkpointed layer runs its visits again in the backward pass.
    assert sorted(visits) == sorted([1, 1, 2, 3, 3] * (1 if checkpointing is None else 2))
    assert_gradients(model, expected)
    unwrap_model(model).zero_grad()
    loss_of(model, ids, mask).backward()
    assert_gradients(model, baked_gradients(tiny_model(family), identity_plan(4), ids, mask))


@pytest.mark.parametrize("checkpointing", CHECKPOINTING.values(), ids=CHECKPOINTING.keys())
def test_gradients_of_rows_with_plans_of_their_own_add_up(checkpointing):
    ids, mask = random_batch([9, 9, 9], seed=1)
    plans = mixed_plans(4, 3, seed=2)
    rows = [slice(row, row + 1) for row in range(3)]
    expected = [
        baked_gradients(tiny_model("gemma3"), plan, ids[row], mask[row])
        for plan, row in zip(plans, rows, strict=True)
    ]
    model = trained(wrap_model(tiny_model("gemma3"), plan=PLAN), checkpointing)
    with model.dynadepth.plans(plans):
        loss_of(model, ids, mask).backward()
    # The families' norms sum in float32, here over the rows together and there one by one.
    assert_gradients(model, *expected, relative=1e-6)


def test_a_backward_pass_replays_the_plan_of_its_own_forward():
    """Two forwards, then one backward in another thread, when neither plan is in force any more."""
    model = trained(wrap_model(tiny_model(), plan=identity_plan(4)), CHECKPOINTING["replayed"])
    ids, mask = random_batch([9], seed=1)
    plans = [[0, 2, 1, 2], [2, 1, 0, 1]]
    losses = []
    for plan in plans:
        with model.dynadepth.plans(plan):
            losses.append(loss_of(model, ids, mask))
    thread = threading.Thread(target=sum(losses).backward)
    thread.start()
    thread.join()
    expected = [baked_gradients(tiny_model(), plan, ids, mask) for plan in plans]
    assert_gradients(model, *expected)


class Counting(Policy):
    """Plans by the prompt's states, and counts how often it is asked."""

    num_layers = 4
    decision_layers = (1, 3)

    def __init__(self):
        self.asked = 0

    def initial_plans(self, num_rows):
        return np.tile(identity_plan(4), (num_rows, 1))

    def decide(self, layer_idx, hidden_states, prompts):
        self.asked += 1
        action = int(hidden_states.sum().abs() * 10) % 3
        return np.full((len(hidden_states), 2 if layer_idx == 1 else 1), action, dtype=np.uint8)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING.values(), ids=CHECKPOINTING.keys())
def test_a_policy_decides_once_though_its_layer_runs_again(checkpointing):
    policy = Counting()
    model = trained(wrap_model(tiny_model(), policy=policy), checkpointing)
    ids, mask = random_batch([9], seed=3)
    loss_of(model, ids, mask).backward()
    assert policy.asked == 2
    plan = model.dynadepth.last_plans[0]
    assert plan.tolist() != [1, 1, 1, 1]
    assert_gradients(model, baked_gradients(tiny_model(), plan, ids, mask))


def test_a_model_in_training_generates_by_its_plan():
    model = trained(wrap_model(tiny_model(), plan=PLAN), CHECKPOINTING["replayed"])
    ids, mask = random_batch([9], seed=1)
    settings = {"max_new_tokens": 5, "do_sample": False, "attention_mask": mask}
    same = [trained(bake(tiny_model(), PLAN), CHECKPOINTING["replayed"])]
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (5, 24):
        # Before, checkpointing takes the cache away even here.
        same.append(bake(tiny_model(), PLAN))
    for expected in same:
        assert torch.equal(model.generate(ids, **settings), expected.generate(ids, **settings))
        assert torch.equal(
            drive(model, ids, mask, 5, "steps"), drive(expected, ids, mask, 5, "steps")
        )


@pytest.mark.parametrize("checkpointing", CHECKPOINTING.values(), ids=CHECKPOINTING.keys())
def test_a_layer_called_by_itself_is_refused(checkpointing):
    model = trained(wrap_model(tiny_model(), plan=PLAN), checkpointing)
    with pytest.raises(WrapError, match="layer 2 was called outside a forward of the model"):
        model.model.layers[2](torch.zeros(1, 3, 32, dtype=torch.float64))


class _Texts(torch.utils.data.Dataset):
    """Padded prompts with labels and what a tokenizer adds."""

    def __init__(self, ids, mask):
        self.ids, self.mask = ids, mask

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        ids, mask = self.ids[index], self.mask[index]
        labels = ids.masked_fill(mask == 0, -100)
        # `Trainer` leaves out what a family's forward does not take.
        positions = positions_of(mask.unsqueeze(0))[0]
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return {**given, "labels": labels}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("family", MECHANISMS)
def test_trainer_trains_evaluates_and_predicts_under_plans_of_rows(family, tmp_path):
    """`Trainer` hands the model what only its loss reads, such as `num_items_in_batch`."""
    model = wrap_model(tiny_model(family, dtype=torch.float32), policy=ByFirstToken())
    ids, mask = random_batch([5, 9, 7, 8], seed=3)
    texts = _Texts(ids, mask)
    settings = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**settings),
        train_dataset=texts,
        eval_dataset=texts,
    )
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    predicted = torch.from_numpy(trainer.predict(texts).predictions)
    plans = model.dynadepth.last_plans
    assert len({tuple(plan) for plan in plans}) > 1
    for row, plan in enumerate(plans):
        alone = drive(
            bake(model_of(family), plan), ids[row : row + 1], mask[row : row + 1], 0, "full"
        )
        real = mask[row].bool()
        assert (predicted[row][real] - alone[0][real]).abs().max() < 1e-3
    loss = trainer.evaluate()["eval_loss"]
    assert np.isfinite(trainer.train().training_loss)
    moved = [name for name, weight in model.named_parameters() if not weight.equal(before[name])]
    assert moved
    assert trainer.evaluate()["eval_loss"] < loss


def model_of(family):
    return tiny_model(family, dtype=torch.float32)


class ByFirstToken(Policy):
    """Gives rows plans by the sum of their token ids, so that a batch is split."""

    num_layers = 4
    decision_layers = (0,)

    def initial_plans(self, num_rows):
        return np.tile(identity_plan(4), (num_rows, 1))

    def decide(self, layer_idx, hidden_states, prompts):
        total = (prompts.tokens * prompts.mask).sum(dim=1).cpu().numpy()
        return np.array([[1, 0, 2, 1], [1, 1, 0, 1], [1, 2, 1, 0]], dtype=np.uint8)[total % 3]


PASSED_THROUGH = {
    "num_items_in_batch": torch.tensor(12),
    "shift_labels": torch.full((3, 9), 5),
    "token_type_ids": torch.zeros(3, 9, dtype=torch.long),
    "of_another_library": torch.zeros(2),
}


@pytest.mark.parametrize("name", PASSED_THROUGH)
@pytest.mark.parametrize("family", MECHANISMS)
def test_a_tensor_that_no_layer_reads_changes_nothing(family, name):
    model = wrap_model(tiny_model(family), plan="0-3")
    if name == "of_another_library" and family in ("bloom", "falcon", "gpt2"):
        pytest.skip("the base model's own forward refuses unknown arguments")
    if name == "token_type_ids" and family == "gpt2":
        pytest.skip("gpt2 adds an embedding of the token types")
    ids, mask = random_batch([9, 6, 8], seed=1)
    with model.dynadepth.plans(mixed_plans(4, 3, seed=2)):
        expected = model(ids, attention_mask=mask).logits
        given = model(ids, attention_mask=mask, **{name: PASSED_THROUGH[name]}).logits
    assert torch.equal(given, expected)


def test_a_tensor_that_a_layer_does_read_is_refused_where_rows_are_split():
    model = wrap_model(tiny_model(), plan="0-3")
    ids, mask = random_batch([9, 6, 8], seed=1)
    extra = torch.ones(3, 1, 1, dtype=torch.float64)
    layer = model.model.layers[1].self_attn

    def read(_module, args, kwargs):
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * kwargs["gate"]}

    layer.register_forward_pre_hook(read, with_kwargs=True)
    model(ids, attention_mask=mask, gate=extra)
    with (
        model.dynadepth.plans([[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 1, 1]]),
        pytest.raises(UnsupportedModelError, match=r"reads the tensor 'gate' of shape \(3, 1, 1\)"),
    ):
        model(ids, attention_mask=mask, gate=extra)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_router_logits_of_experts_are_the_baked_models_or_refused(family):
    model, base = wrap_model(tiny_model(family), plan=PLAN), bake(tiny_model(family), PLAN)
    ids, mask = random_batch([9, 6], seed=1)
    settings = {"attention_mask": mask, "output_router_logits": True, "labels": ids}
    given, expected = model(ids, **settings), base(ids, **settings)
    assert len(given.router_logits) == len(expected.router_logits)
    assert all(map(torch.equal, given.router_logits, expected.router_logits))
    assert torch.equal(given.aux_loss, expected.aux_loss)
    for how in ("argument", "config"):
        asked = dict(settings)
        if how == "config":
            del asked["output_router_logits"]
            model.config.output_router_logits = True
        with (
            model.dynadepth.plans([PLAN, [1, 1, 1, 1]]),
            pytest.raises(UnsupportedModelError, match="output_router_logits=True needs one plan"),
        ):
            model(ids, **asked)
