"""From labels to a routers folder that keeps its budget, on a tiny random model."""

from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest
import torch

from dynadepth import load_routers, unwrap_model, wrap_model
from dynadepth.config import TrainConfig
from dynadepth.errors import CheckpointError, LabelError, PlanError, WrapError
from dynadepth.fingerprint import fingerprint
from dynadepth.forest import EditPrior, Evaluated
from dynadepth.plans import identity_plan, plan_depth
from dynadepth.shrinkage import ShrinkageChoice
from dynadepth_search import fitting
from dynadepth_search.fitting import fit_routers, write_routers
from dynadepth_search.labels import Labels, Manifest
from dynadepth_search.measuring import planned, wrapped
from dynadepth_search.scoring import Scorer
from dynadepth_search.tasks import Example
from tests.tiny import tiny_model
from tests.tiny_text import word_tokenizer

LAYERS, PROMPTS = 6, 50
FRONT = np.array(
    [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1], [1, 0, 1, 0, 1, 1], [1, 0, 1, 0, 0, 1]], dtype=np.uint8
)
QUICK = TrainConfig(epochs=4, learning_rate=5e-3)


@pytest.fixture(scope="module")
def model():
    return tiny_model(num_layers=LAYERS, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def make_examples(count: int, seed: int) -> list[Example]:
    """Prompts of very different lengths; half of them end with a question mark."""
    rng = np.random.default_rng(seed)
    examples = []
    for index in range(count):
        text = "".join(rng.choice(list("abcdefgh "), size=rng.integers(2, 30)))
        examples.append(Example(f"{index} {text}{'?' if rng.random() < 0.5 else '!'}"))
    return examples


def make_labels(model, *, protect=(), count=PROMPTS) -> Labels:
    """Labels that skip other layers for questions than for exclamations."""
    examples = make_examples(count, seed=0)
    plans = np.tile(identity_plan(LAYERS), (count, 1))
    for row, example in enumerate(examples):
        plans[row, [1, 3] if example.prompt.endswith("?") else [3, 4]] = 0
    prior = EditPrior(mean=np.zeros(2 * LAYERS), variance=np.ones(2 * LAYERS), count=1)
    manifest = Manifest(
        base_model=fingerprint(model),
        num_layers=LAYERS,
        dtype="torch.float32",
        task={
            "name": "hand",
            "kind": "prompt",
            "scoring": "raw",
            "sha256": "0" * 64,
            "prompts": count,
        },
        search={"objective": "preserve", "config": {"protect": list(protect)}},
        depth_penalty=0.1,
        prior=prior,
        versions={},
    )
    both = [np.stack([identity_plan(LAYERS), plan]) for plan in plans]
    return Labels(
        manifest=manifest,
        examples=tuple(examples),
        base_rewards=np.zeros(count),
        plans=plans,
        rewards=np.zeros(count),
        values=np.zeros(count),
        depths=plan_depth(plans),
        evaluated=tuple(
            Evaluated(rows, np.zeros(2), plan_depth(rows), rows.sum(axis=1).astype(np.uint32))
            for rows in both
        ),
    )


@pytest.fixture(scope="module")
def labels(model):
    return make_labels(model)


def force_shrinkage(monkeypatch, shrinkage):
    choice = ShrinkageChoice(shrinkage=shrinkage, trials=(), prompts=40, evaluations=1)
    monkeypatch.setattr(fitting, "select_shrinkage", lambda *args, **kwargs: choice)


def plans_at(model, tokenizer, routers, budget, examples):
    with wrapped(model, routers=routers, budget=budget):
        return planned(model, Scorer(model, tokenizer), examples)


def same_logits(model, before):
    ids = torch.arange(10, 20).reshape(1, -1)
    with torch.no_grad():
        return torch.equal(model(ids).logits, before)


@pytest.fixture
def untouched(model):
    """The model's logits, which must be the same to the bit after the test, on an unwrapped model."""
    ids = torch.arange(10, 20).reshape(1, -1)
    with torch.no_grad():
        before = model(ids).logits
    yield
    assert "dynadepth" not in model.__dict__
    assert same_logits(model, before)


@pytest.mark.usefixtures("untouched")
def test_labels_become_a_folder_that_wraps_the_model(model, tokenizer, labels, tmp_path):
    routers = fit_routers(model, tokenizer, labels, FRONT, training=QUICK)
    evidence = routers.training["shrinkage"]
    assert evidence["shrinkage"] == routers.shrinkage
    assert evidence["prompts"] == routers.training["train_prompts"] == 40
    assert routers.training["validation_prompts"] == 10
    assert routers.training["recipe"] == QUICK.to_dict()
    # 40 prompts without the recipe's held-out fifth: one batch in each of four epochs, all in the warm-up.
    assert routers.training["optimiser_steps"] == 4
    assert routers.training["warmup_steps"] == 10
    assert routers.calibration.range[0] == pytest.approx(0.5)
    assert routers.calibration.range[1] == 1.0

    folder = write_routers(tmp_path / "routers", routers)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "router_config.json",
        "routers.onnx",
        "routers.safetensors",
    ]
    loaded = load_routers(folder, model=model)
    assert loaded.training == routers.training
    wrap_model(model, routers=folder, budget=0.8, router_backend="onnx")
    ids = tokenizer("abc?", return_tensors="pt")["input_ids"]
    made = model.generate(ids, max_new_tokens=2, do_sample=False)
    unwrap_model(model)
    assert made.shape == (1, ids.shape[1] + 2)


@pytest.mark.usefixtures("untouched")
def test_without_shrinkage_every_budget_of_the_front_is_exact(
    model, tokenizer, labels, monkeypatch
):
    force_shrinkage(monkeypatch, 0.0)
    routers = fit_routers(model, tokenizer, labels, FRONT, training=QUICK)
    for plan in FRONT:
        plans = plans_at(model, tokenizer, routers, float(plan_depth(plan)), make_examples(3, 9))
        assert (plans == plan).all()


@pytest.mark.usefixtures("untouched")
def test_with_shrinkage_the_budget_is_that_of_the_policy_as_it_runs(
    model, tokenizer, labels, monkeypatch
):
    force_shrinkage(monkeypatch, 1.0)
    routers = fit_routers(model, tokenizer, labels, FRONT, training=QUICK)
    assert routers.shrinkage == 1.0
    validation = [
        labels.examples[i] for i in fitting._split([item.prompt for item in labels.examples], 0)[1]
    ]
    seen = set()
    for budget in (0.6, 0.7, 0.8, 0.9):
        plans = plans_at(model, tokenizer, routers, budget, validation)
        # Ten prompts of six layers: steps of 1/60, and a near-tie may fall otherwise in another batch.
        measured = float(plan_depth(plans).mean())
        assert measured == pytest.approx(routers.calibration.depth_for(budget), abs=1 / 60 + 1e-9)
        assert measured == pytest.approx(budget, abs=0.07)
        seen |= {plan.tobytes() for plan in plans}
    assert len(seen) > len(FRONT), "the policy must tell prompts apart"


@pytest.mark.usefixtures("untouched")
def test_the_papers_preset_has_no_static_part(model, tokenizer, labels):
    routers = fit_routers(model, tokenizer, labels, FRONT, preset="drllm")
    assert routers.config.preset == "drllm"
    assert routers.shrinkage == 1.0
    assert routers.bias.eq(0).all()
    assert routers.heads.last is None
    assert routers.training["shrinkage"] is None
    assert routers.training["recipe"] == TrainConfig.for_preset("drllm").to_dict()
    assert routers.calibration.highest == 1.0


def test_validation_prompts_take_no_part_in_training(model, tokenizer, labels, monkeypatch):
    force_shrinkage(monkeypatch, 0.0)
    first = fit_routers(model, tokenizer, labels, FRONT, training=QUICK)
    spoilt = make_labels(model)
    validation = fitting._split([item.prompt for item in spoilt.examples], 0)[1]
    assert len(validation) == 10
    spoilt.plans[validation] = [1, 1, 1, 1, 1, 0]
    second = fit_routers(model, tokenizer, spoilt, FRONT, training=QUICK)
    expected = first.heads.state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in second.heads.state_dict().items())


def test_rows_of_one_prompt_are_on_one_side_of_every_split(model, tokenizer, labels, monkeypatch):
    """The same text with other choices is the same prompt to a router."""
    texts = [f"prompt {index // 3}" for index in range(60)]
    for seed in range(5):
        train, validation = fitting._split(texts, seed)
        assert sorted([*train, *validation]) == list(range(60))
        assert len(validation) == 12
        assert not {texts[i] for i in train} & {texts[i] for i in validation}

    given = {}

    def choose(*args, **kwargs):
        given.update(kwargs)
        return ShrinkageChoice(shrinkage=0.0, trials=(), prompts=40, evaluations=1)

    monkeypatch.setattr(fitting, "select_shrinkage", choose)
    fit_routers(model, tokenizer, labels, FRONT, training=QUICK)
    train = fitting._split([item.prompt for item in labels.examples], 0)[0]
    assert given["groups"] == [labels.examples[i].prompt for i in train]


def test_repeated_prompts_do_not_count_as_enough(model, tokenizer):
    few = make_labels(model)
    repeated = tuple(few.examples[index % 15] for index in range(PROMPTS))
    with pytest.raises(LabelError, match="15 labelled prompts cannot .* 16 or more different ones"):
        fit_routers(model, tokenizer, replace(few, examples=repeated), FRONT)


def test_the_same_seed_gives_the_same_routers(model, tokenizer, labels):
    first = fit_routers(model, tokenizer, labels, FRONT, training=QUICK, seed=3)
    second = fit_routers(model, tokenizer, labels, FRONT, training=QUICK, seed=3)
    expected = first.heads.state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in second.heads.state_dict().items())
    assert torch.equal(first.bias, second.bias)
    assert (first.shrinkage, first.calibration) == (second.shrinkage, second.calibration)
    assert first.training == second.training


@pytest.mark.usefixtures("untouched")
def test_an_error_in_the_middle_leaves_the_model_unwrapped(
    model, tokenizer, labels, monkeypatch, tmp_path
):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    force_shrinkage(monkeypatch, 1.0)
    monkeypatch.setattr(fitting, "planned", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        fit_routers(model, tokenizer, labels, FRONT, training=QUICK)


def test_protected_layers_are_never_decided(model, tokenizer, monkeypatch):
    force_shrinkage(monkeypatch, 1.0)
    protecting = make_labels(model, protect=(0, 5))
    routers = fit_routers(model, tokenizer, protecting, FRONT, training=QUICK)
    assert routers.protect == (0, 5)
    plans = plans_at(model, tokenizer, routers, routers.calibration.lowest, make_examples(8, 5))
    assert (plans[:, [0, 5]] == 1).all()
    with pytest.raises(PlanError, match=r"skips layers \[3\], which are protected"):
        fit_routers(model, tokenizer, make_labels(model, protect=(3,)), FRONT)


def test_every_stage_reports_until_it_is_done(model, tokenizer, labels):
    seen = []
    fit_routers(
        model,
        tokenizer,
        labels,
        FRONT,
        training=QUICK,
        progress=lambda *report: seen.append(report),
    )
    stages = [stage for stage, _ in groupby(seen, key=lambda report: report[0])]
    assert stages[:5] == [
        "reading states under the labels",
        "reading states under the static front",
        "cross-validating",
        "scoring held-out plans",
        "training",
    ]
    for stage in set(stages):
        reports = [(done, total) for name, done, total in seen if name == stage]
        assert reports[-1][0] == reports[-1][1]
        assert reports == sorted(reports)


@pytest.mark.usefixtures("untouched")
def test_wrong_arguments_are_refused_before_any_work(model, tokenizer, labels):
    def no_progress(*report):
        raise AssertionError(f"work began: {report}")

    def fit(labels, front, on=model):
        fit_routers(on, tokenizer, labels, front, progress=no_progress)

    with pytest.raises(LabelError, match="15 labelled prompts cannot train and calibrate routers"):
        fit(make_labels(model, count=15), FRONT)
    with pytest.raises(LabelError, match="the static front is for 5 layers, but the model has 6"):
        fit(labels, FRONT[:, :5])
    with pytest.raises(PlanError, match="starts with a plan that edits layers"):
        fit(labels, FRONT[1:])
    with pytest.raises(LabelError, match="the labels are for 6 layers, but the model has 4"):
        fit(labels, FRONT, on=tiny_model(num_layers=4))


def test_a_wrapped_model_is_refused(model, tokenizer, labels):
    wrap_model(model, plan=FRONT[1])
    try:
        with pytest.raises(WrapError, match="wrapped"):
            fit_routers(model, tokenizer, labels, FRONT)
    finally:
        unwrap_model(model)


def test_a_folder_with_other_files_is_left_alone(model, tokenizer, labels, tmp_path, monkeypatch):
    force_shrinkage(monkeypatch, 0.0)
    routers = fit_routers(model, tokenizer, labels, FRONT, training=QUICK)
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(CheckpointError, match="thesis.tex"):
        write_routers(tmp_path, routers)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
