"""From a score table, or labels, to a routers folder that keeps its budget, on a tiny random model."""

from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest
import torch

from dynadepth import load_policy, unwrap_model, wrap_model
from dynadepth.errors import CheckpointError, ConfigError, LabelError, PlanError, WrapError
from dynadepth.models.fingerprint import fingerprint
from dynadepth.plans import identity_plan, plan_depth
from dynadepth.training.shrinkage import ShrinkageChoice
from dynadepth.training.train_config import TrainConfig
from dynadepth.tree_search.forest import EditPrior, Evaluated
from dynadepth_search.data.chat_template import as_chat
from dynadepth_search.data.tasks import Example, Task
from dynadepth_search.scoring.objectives import plan_values
from dynadepth_search.scoring.runtime_checks import planned, wrapped
from dynadepth_search.scoring.score_table import score_prompts
from dynadepth_search.scoring.scorer import Scorer
from dynadepth_search.storage.label_manifest import Manifest
from dynadepth_search.storage.labels import Labels
from dynadepth_search.training import router_fit, training_prompts
from dynadepth_search.training.router_fit import (
    fit_imitation,
    fit_routers,
    router_plans,
    write_routers,
)
from dynadepth_search.training.training_prompts import TrainingPrompts
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
        raw_plans=plans,
        raw_values=np.zeros(count),
        candidates=((),) * count,
        margins=np.zeros(count),
        leads=np.zeros(count),
    )


@pytest.fixture(scope="module")
def labels(model):
    return make_labels(model)


def make_table(model, tokenizer, folder, *, count=PROMPTS, plans=None, kind="prompt"):
    """What the plans that routers learn from do to prompts."""
    examples = make_examples(count, seed=0)
    if kind == "choices":
        examples = [Example(item.prompt, (" yes", " no"), 0) for item in examples]
    return score_prompts(
        model,
        tokenizer,
        Task("hand", tuple(examples)),
        router_plans(FRONT) if plans is None else plans,
        folder,
        layers=(),
    )


@pytest.fixture(scope="module")
def table(model, tokenizer, tmp_path_factory):
    return make_table(model, tokenizer, tmp_path_factory.mktemp("scores"))


def split(model, tokenizer, examples, seed=0):
    return TrainingPrompts(model, tokenizer, examples, {"scoring": "raw"}).split(seed)


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_routers_and_menus_learn_from_the_tokens_that_a_chat_has(
    model, monkeypatch, tmp_path, system
):
    # The template writes no beginning, and the tokenizer adds one to every text.
    tokenizer = word_tokenizer(bos=True)
    tokenizer.chat_template = (
        "{% for message in messages %}({{ message['role'] }}) {{ message['content'] }}{% endfor %}"
    )
    task = Task("hand", tuple(make_examples(20, seed=0)))
    known = set()
    for example in task.examples:
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": example.prompt})
        own = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
        known.add(tuple(own["input_ids"]))
    read = set()

    def watch(_module, args, kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        mask = kwargs["attention_mask"]
        read.update(tuple(row[keep.bool()].tolist()) for row, keep in zip(ids, mask, strict=True))

    hook = model.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        chat = as_chat(task, tokenizer, system=system)
        table = score_prompts(model, tokenizer, chat, router_plans(FRONT), tmp_path, layers=())
        force_shrinkage(monkeypatch, 0.5)
        fit_routers(model, tokenizer, table, FRONT, training=QUICK)
    finally:
        hook.remove()
    assert read == known
    assert table.examples == task.examples


def force_shrinkage(monkeypatch, shrinkage):
    choice = ShrinkageChoice(shrinkage=shrinkage, trials=(), prompts=40, evaluations=1)
    monkeypatch.setattr(router_fit, "select_shrinkage", lambda *args, **kwargs: choice)


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


class TestPlans:
    def test_the_front_and_the_neighbours_of_its_middle_each_once(self):
        plans = router_plans(FRONT)
        assert (plans[: len(FRONT)] == FRONT).all()
        assert len(np.unique(plans, axis=0)) == len(plans)
        middle = FRONT[2]
        for layer in range(LAYERS):
            beside = middle.copy()
            beside[layer] = 1 - middle[layer]
            assert (plans == beside).all(axis=1).any(), layer
        # The front's plans beside the middle one are neighbours of it.
        assert len(plans) == len(FRONT) + LAYERS - 2

    def test_only_a_front_has_them(self):
        with pytest.raises(PlanError, match="starts with a plan that edits layers"):
            router_plans(FRONT[1:])

    def test_the_identity_alone_has_its_own_neighbours(self):
        assert len(router_plans(FRONT[:1])) == 1 + LAYERS


@pytest.mark.usefixtures("untouched")
def test_a_score_table_becomes_a_folder_that_wraps_the_model(model, tokenizer, table, tmp_path):
    routers = fit_routers(model, tokenizer, table, FRONT, training=QUICK)
    evidence = routers.training["shrinkage"]
    assert evidence["shrinkage"] == routers.shrinkage
    assert evidence["prompts"] == routers.training["train_prompts"] == 40
    assert routers.training["validation_prompts"] == 10
    assert routers.training["plans_scored"] == len(router_plans(FRONT))
    assert routers.training["objective"] == "preserve"
    assert routers.training["task"]["name"] == "hand"
    assert routers.training["task"]["sha256"] == table.manifest["asked"]["task"]["sha256"]
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
    loaded = load_policy(folder, model=model)
    assert loaded.training == routers.training
    wrap_model(model, routers=folder, budget=0.8, router_backend="onnx")
    ids = tokenizer("abc?", return_tensors="pt")["input_ids"]
    made = model.generate(ids, max_new_tokens=2, do_sample=False)
    unwrap_model(model)
    assert made.shape == (1, ids.shape[1] + 2)


@pytest.mark.usefixtures("untouched")
def test_without_shrinkage_every_budget_of_the_front_is_exact(model, tokenizer, table, monkeypatch):
    force_shrinkage(monkeypatch, 0.0)
    routers = fit_routers(model, tokenizer, table, FRONT, training=QUICK)
    for plan in FRONT:
        plans = plans_at(model, tokenizer, routers, float(plan_depth(plan)), make_examples(3, 9))
        assert (plans == plan).all()


@pytest.mark.usefixtures("untouched")
def test_with_shrinkage_the_budget_is_that_of_the_policy_as_it_runs(
    model, tokenizer, table, monkeypatch
):
    force_shrinkage(monkeypatch, 1.0)
    recipe = replace(QUICK, epochs=40, learning_rate=2e-2)
    routers = fit_routers(model, tokenizer, table, FRONT, training=recipe)
    assert routers.shrinkage == 1.0
    validation = [table.examples[i] for i in split(model, tokenizer, table.examples)[1]]
    seen = set()
    for budget in (0.6, 0.7, 0.8, 0.9):
        plans = plans_at(model, tokenizer, routers, budget, validation)
        # Ten prompts of six layers: steps of 1/60, and a near-tie may fall otherwise in another batch.
        measured = float(plan_depth(plans).mean())
        assert measured == pytest.approx(routers.calibration.depth_for(budget), abs=1 / 60 + 1e-9)
        assert measured == pytest.approx(budget, abs=0.07)
        seen |= {plan.tobytes() for plan in plans}
    assert len(seen) > len(FRONT), "the policy must tell prompts apart"


class TestWhatIsLearnt:
    @pytest.fixture
    def learnt(self, monkeypatch):
        """The arguments of every training."""
        calls = []
        genuine = router_fit.train_skip_cost_heads

        def watch(features, costs, *arguments, **options):
            calls.append((features, np.asarray(costs)))
            return genuine(features, costs, *arguments, **options)

        monkeypatch.setattr(router_fit, "train_skip_cost_heads", watch)
        return calls

    @pytest.mark.parametrize("objective", ["preserve", "reward"])
    def test_what_skipping_a_layer_costs_beside_the_middle_plan(
        self, model, tokenizer, tmp_path, learnt, monkeypatch, objective
    ):
        force_shrinkage(monkeypatch, 0.0)
        table = make_table(model, tokenizer, tmp_path, kind="choices")
        fit_routers(model, tokenizer, table, FRONT, training=QUICK, objective=objective)
        ((features, costs),) = learnt
        train = split(model, tokenizer, table.examples)[0]
        assert len(features) == len(costs) == len(train)
        scorer = Scorer(model, tokenizer)
        examples = [table.examples[index] for index in train]

        def values(plan):
            plans = np.tile(plan, (len(examples), 1))
            outcomes = scorer.outcomes(examples, plans, np.arange(len(examples)))
            return plan_values(outcomes, objective)

        for layer in range(LAYERS):
            executed, skipped = FRONT[2].copy(), FRONT[2].copy()
            executed[layer], skipped[layer] = 1, 0
            np.testing.assert_allclose(
                costs[:, layer], values(executed) - values(skipped), atol=1e-4
            )

    def test_states_are_read_under_the_middle_plan(
        self, model, tokenizer, table, learnt, monkeypatch
    ):
        force_shrinkage(monkeypatch, 0.0)
        given = []
        genuine = training_prompts.prompt_features
        monkeypatch.setattr(
            training_prompts,
            "prompt_features",
            lambda model, ids, mask, plans, **options: (
                given.append(plans) or genuine(model, ids, mask, plans, **options)
            ),
        )
        fit_routers(model, tokenizer, table, FRONT, training=QUICK)
        assert sum(len(plans) for plans in given) == 40
        assert all((plans == FRONT[2]).all() for plans in given)

    def test_validation_prompts_take_no_part_in_training(
        self, model, tokenizer, table, monkeypatch
    ):
        first = fit_routers(model, tokenizer, table, FRONT, training=QUICK)
        validation = split(model, tokenizer, table.examples)[1]
        assert len(validation) == 10
        spoilt = replace(
            table,
            agreement=table.agreement.copy(),
            total_variation=table.total_variation.copy(),
        )
        spoilt.agreement[validation] = 0.0
        spoilt.total_variation[validation] = np.linspace(0, 1, len(table.plans))
        second = fit_routers(model, tokenizer, spoilt, FRONT, training=QUICK)
        expected = first.heads.state_dict()
        assert all(torch.equal(t, expected[name]) for name, t in second.heads.state_dict().items())

    def test_validation_prompts_take_no_part_in_choosing_the_shrinkage(
        self, model, tokenizer, table, monkeypatch
    ):
        given = {}

        def choose(features, *args, **kwargs):
            given.update(kwargs, prompts=len(features))
            return ShrinkageChoice(shrinkage=0.0, trials=(), prompts=40, evaluations=1)

        monkeypatch.setattr(router_fit, "select_shrinkage", choose)
        fit_routers(model, tokenizer, table, FRONT, training=QUICK)
        train = split(model, tokenizer, table.examples)[0]
        assert given["prompts"] == len(train)
        # The front's plans are the first of `router_plans`.
        expected = plan_values(table, "preserve")[train, : len(FRONT)].mean(axis=0)
        np.testing.assert_allclose(given["front_rewards"], expected)

    def test_other_plans_and_another_order_in_the_table_change_nothing(
        self, model, tokenizer, table, monkeypatch
    ):
        force_shrinkage(monkeypatch, 0.0)
        plans = np.concatenate([table.plans, [[1, 2, 1, 1, 1, 1], [0, 0, 1, 1, 0, 1]]])
        order = np.r_[0, np.random.default_rng(0).permutation(np.arange(1, len(plans)))]
        figures = {
            name: np.concatenate([getattr(table, name), np.full((PROMPTS, 2), 0.5)], axis=1)
            for name in ("agreement", "total_variation", "reward")
        }
        wide = replace(
            table,
            plans=plans[order].astype(np.uint8),
            **{name: values[:, order] for name, values in figures.items()},
        )
        first = fit_routers(model, tokenizer, table, FRONT, training=QUICK).heads.state_dict()
        second = fit_routers(model, tokenizer, wide, FRONT, training=QUICK).heads.state_dict()
        assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


def test_rows_of_one_prompt_are_on_one_side_of_every_split(model, tokenizer, table, monkeypatch):
    """The same text with other choices is the same prompt to a router."""
    examples = [Example(f"prompt {index // 3}{' ' * (index % 3)}") for index in range(60)]
    for seed in range(5):
        train, validation = split(model, tokenizer, examples, seed)
        assert sorted([*train, *validation]) == list(range(60))
        assert len(validation) == 12
        sides = [{examples[i].prompt.strip() for i in side} for side in (train, validation)]
        assert not sides[0] & sides[1]

    given = {}

    def choose(*args, **kwargs):
        given.update(kwargs)
        return ShrinkageChoice(shrinkage=0.0, trials=(), prompts=40, evaluations=1)

    monkeypatch.setattr(router_fit, "select_shrinkage", choose)
    fit_routers(model, tokenizer, table, FRONT, training=QUICK)
    train = split(model, tokenizer, table.examples)[0]
    assert given["groups"] == [table.examples[i].prompt for i in train]


def test_repeated_prompts_do_not_count_as_enough(model, tokenizer, table, labels):
    repeated = tuple(table.examples[index % 15] for index in range(PROMPTS))
    text = "15 prompts cannot train and calibrate routers; give 16 or more different ones"
    with pytest.raises(LabelError, match=text):
        fit_routers(model, tokenizer, replace(table, examples=repeated), FRONT)
    with pytest.raises(LabelError, match=text):
        fit_imitation(model, tokenizer, replace(labels, examples=repeated))


def test_the_same_seed_gives_the_same_routers(model, tokenizer, table):
    first = fit_routers(model, tokenizer, table, FRONT, training=QUICK, seed=3)
    second = fit_routers(model, tokenizer, table, FRONT, training=QUICK, seed=3)
    expected = first.heads.state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in second.heads.state_dict().items())
    assert torch.equal(first.bias, second.bias)
    assert (first.shrinkage, first.calibration) == (second.shrinkage, second.calibration)
    assert first.training == second.training


@pytest.mark.usefixtures("untouched")
def test_an_error_in_the_middle_leaves_the_model_unwrapped(
    model, tokenizer, table, labels, monkeypatch
):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    force_shrinkage(monkeypatch, 1.0)
    monkeypatch.setattr(training_prompts, "planned", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        fit_routers(model, tokenizer, table, FRONT, training=QUICK)
    with pytest.raises(RuntimeError, match="out of memory"):
        fit_imitation(model, tokenizer, labels, training=QUICK)


def test_protected_layers_are_never_decided(model, tokenizer, table, monkeypatch):
    force_shrinkage(monkeypatch, 1.0)
    routers = fit_routers(model, tokenizer, table, FRONT, training=QUICK, protect=(0, 5))
    assert routers.protect == (0, 5)
    plans = plans_at(model, tokenizer, routers, routers.calibration.lowest, make_examples(8, 5))
    assert (plans[:, [0, 5]] == 1).all()
    with pytest.raises(PlanError, match=r"skips layers \[3\], which are protected"):
        fit_routers(model, tokenizer, table, FRONT, protect=(3,))


def stages_of(seen):
    """Return the stages in their order, having checked that each reports upwards until it is done."""
    for stage in {report[0] for report in seen}:
        reports = [(done, total) for name, done, total in seen if name == stage]
        assert reports[-1][0] == reports[-1][1], stage
        assert reports == sorted(reports), stage
    return [stage for stage, _ in groupby(seen, key=lambda report: report[0])]


def test_every_stage_reports_until_it_is_done(model, tokenizer, table, labels, monkeypatch):
    seen = []
    progress = lambda *report: seen.append(report)  # noqa: E731
    fit_routers(model, tokenizer, table, FRONT, training=QUICK, progress=progress)
    assert stages_of(seen)[:4] == [
        "reading states under the static front",
        "cross-validating",
        "scoring held-out plans",
        "training",
    ]
    seen.clear()
    force_shrinkage(monkeypatch, 1.0)
    fit_routers(model, tokenizer, table, FRONT, training=QUICK, progress=progress)
    assert stages_of(seen)[-1] == "calibrating"
    seen.clear()
    fit_imitation(model, tokenizer, labels, training=QUICK, progress=progress)
    assert stages_of(seen) == ["reading states under the labels", "training", "calibrating"]


@pytest.mark.usefixtures("untouched")
def test_wrong_arguments_are_refused_before_any_work(model, tokenizer, table, labels):
    def no_progress(*report):
        raise AssertionError(f"work began: {report}")

    def fit(table, front, on=model, **options):
        fit_routers(on, tokenizer, table, front, progress=no_progress, **options)

    with pytest.raises(LabelError, match="15 prompts cannot train and calibrate routers"):
        fit(table.take(np.arange(15)), FRONT)
    with pytest.raises(LabelError, match="for 6 layers and the plans for 5, but the model has 6"):
        fit(table, FRONT[:, :5])
    with pytest.raises(PlanError, match="starts with a plan that edits layers"):
        fit(table, FRONT[1:])
    with pytest.raises(LabelError, match="for 6 layers and the plans for 6, but the model has 4"):
        fit(table, FRONT, on=tiny_model(num_layers=4))
    other = FRONT.copy()
    other[1:, 3], other[1:, 5] = 1, 0
    with pytest.raises(ConfigError, match="of the 8 plans that routers learn from are not in the"):
        fit(table, other)
    with pytest.raises(ConfigError, match="objective 'reward' needs prompts with right answers"):
        fit(table, FRONT, objective="reward")
    with pytest.raises(ConfigError, match="objective 'fidelity' is unknown"):
        fit(table, FRONT, objective="fidelity")
    with pytest.raises(LabelError, match="15 prompts cannot train and calibrate routers"):
        fit_imitation(model, tokenizer, make_labels(model, count=15), progress=no_progress)
    with pytest.raises(LabelError, match="for 6 layers and the plans for 6, but the model has 4"):
        fit_imitation(tiny_model(num_layers=4), tokenizer, labels, progress=no_progress)


def test_a_wrapped_model_is_refused(model, tokenizer, table, labels):
    wrap_model(model, plan=FRONT[1])
    try:
        with pytest.raises(WrapError, match="wrapped"):
            fit_routers(model, tokenizer, table, FRONT)
        with pytest.raises(WrapError, match="wrapped"):
            fit_imitation(model, tokenizer, labels)
    finally:
        unwrap_model(model)


def test_a_folder_with_other_files_is_left_alone(model, tokenizer, table, tmp_path, monkeypatch):
    force_shrinkage(monkeypatch, 0.0)
    routers = fit_routers(model, tokenizer, table, FRONT, training=QUICK)
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(CheckpointError, match="thesis.tex"):
        write_routers(tmp_path, routers)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


class TestImitation:
    """The published routers, which learn from labels."""

    @pytest.mark.usefixtures("untouched")
    def test_there_is_no_static_part(self, model, tokenizer, labels, tmp_path):
        routers = fit_imitation(model, tokenizer, labels)
        assert routers.config.preset == "drllm"
        assert routers.shrinkage == 1.0
        assert routers.bias.eq(0).all()
        assert routers.heads.last is None
        assert routers.training["recipe"] == TrainConfig.for_preset("drllm").to_dict()
        assert routers.training["labels"]["identity_rate"] == 0.0
        assert routers.training["labels"]["mean_depth"] == pytest.approx(4 / 6)
        assert routers.training["depth_penalty"] == 0.1
        assert (routers.training["train_prompts"], routers.training["validation_prompts"]) == (
            40,
            10,
        )
        assert routers.calibration.highest == 1.0
        loaded = load_policy(write_routers(tmp_path / "drllm", routers), model=model)
        assert (loaded.kind, loaded.training) == ("routers", routers.training)

    @pytest.mark.usefixtures("untouched")
    def test_the_budget_is_that_of_the_policy_as_it_runs(self, model, tokenizer, labels):
        recipe = replace(TrainConfig.for_preset("drllm"), warmup_steps=10, learning_rate=5e-3)
        routers = fit_imitation(model, tokenizer, labels, training=recipe, lowest=0.6)
        validation = [labels.examples[i] for i in split(model, tokenizer, labels.examples)[1]]
        for budget in (routers.calibration.lowest, 0.8, routers.calibration.highest):
            plans = plans_at(model, tokenizer, routers, budget, validation)
            wanted = routers.calibration.depth_for(budget)
            assert float(plan_depth(plans).mean()) == pytest.approx(wanted, abs=1 / 60 + 1e-9)

    def test_labels_are_imitated_from_states_under_themselves(
        self, model, tokenizer, labels, monkeypatch
    ):
        given = []
        genuine = training_prompts.prompt_features

        def watch(model, ids, mask, plans, **options):
            given.extend(plan.tobytes() for plan in plans)
            return genuine(model, ids, mask, plans, **options)

        monkeypatch.setattr(training_prompts, "prompt_features", watch)
        fit_imitation(model, tokenizer, labels, training=QUICK)
        train = split(model, tokenizer, labels.examples)[0]
        assert sorted(given) == sorted(plan.tobytes() for plan in labels.plans[train])
        assert len(set(given)) == 2

    def test_validation_prompts_take_no_part_in_training(self, model, tokenizer, labels):
        first = fit_imitation(model, tokenizer, labels, training=QUICK)
        spoilt = make_labels(model)
        validation = split(model, tokenizer, spoilt.examples)[1]
        assert len(validation) == 10
        spoilt.plans[validation] = [1, 1, 1, 1, 1, 0]
        second = fit_imitation(model, tokenizer, spoilt, training=QUICK)
        expected = first.heads.state_dict()
        assert all(torch.equal(t, expected[name]) for name, t in second.heads.state_dict().items())

    def test_protected_layers_are_never_decided(self, model, tokenizer):
        routers = fit_imitation(
            model, tokenizer, make_labels(model, protect=(0, 5)), training=QUICK
        )
        assert routers.protect == (0, 5)
        plans = plans_at(model, tokenizer, routers, routers.calibration.lowest, make_examples(8, 5))
        assert (plans[:, [0, 5]] == 1).all()

    def test_the_same_seed_gives_the_same_routers(self, model, tokenizer, labels):
        first = fit_imitation(model, tokenizer, labels, training=QUICK, seed=3)
        second = fit_imitation(model, tokenizer, labels, training=QUICK, seed=3)
        expected = first.heads.state_dict()
        assert all(torch.equal(t, expected[name]) for name, t in second.heads.state_dict().items())
        assert (first.calibration, first.training) == (second.calibration, second.training)


def test_one_text_cannot_train_routers(model, tokenizer, table, labels):
    one = [Example("one text", ("a", f"b {row}"), 0) for row in range(24)]
    few = np.arange(24)
    with pytest.raises(LabelError, match="1 prompts cannot train and calibrate routers; give 16"):
        fit_routers(model, tokenizer, replace(table.take(few), examples=tuple(one)), FRONT)
    with pytest.raises(LabelError, match="1 prompts cannot train and calibrate routers; give 16"):
        fit_imitation(model, tokenizer, replace(labels, examples=tuple(one)))


@pytest.mark.parametrize("imitation", [True, False])
def test_every_training_is_told_which_prompts_are_one(
    model, tokenizer, table, labels, monkeypatch, imitation
):
    told = []
    name = "train_heads" if imitation else "train_skip_cost_heads"
    train = getattr(router_fit, name)

    def watch(features, *args, groups, **kwargs):
        told.append((len(features), list(groups)))
        return train(features, *args, groups=groups, **kwargs)

    monkeypatch.setattr(router_fit, name, watch)
    texts = [f"prompt {row // 2} ?" for row in range(PROMPTS)]
    examples = tuple(Example(text, ("a", f"b {row}"), 0) for row, text in enumerate(texts))
    if imitation:
        routers = fit_imitation(
            model, tokenizer, replace(labels, examples=examples), training=QUICK
        )
    else:
        routers = fit_routers(
            model, tokenizer, replace(table, examples=examples), FRONT, training=QUICK
        )
    assert told
    for count, groups in told:
        assert len(groups) == count
        assert len(set(groups)) == count / 2
    assert routers.training["prompts_of_task"] == PROMPTS
