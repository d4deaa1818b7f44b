"""From a score table to a menu that keeps its budget, on a tiny random model."""

from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
import pytest
import torch

from dynadepth import load_policy, unwrap_model, wrap_model
from dynadepth.errors import BudgetError, ConfigError, TaskError
from dynadepth.evaluation.mixtures import mix_to_depth
from dynadepth.plans import plan_depth
from dynadepth.policies.prompt_batch import prompt_mix
from dynadepth_search.data.chat_template import as_chat
from dynadepth_search.data.splits import prompt_hashes
from dynadepth_search.data.tasks import Example, Task
from dynadepth_search.evaluation.menu_outcomes import (
    chosen_plans,
    compare_menu,
    menu_scores,
    table_mix,
)
from dynadepth_search.scoring.runtime_checks import planned, wrapped
from dynadepth_search.scoring.score_table import ScoreTable, score_prompts
from dynadepth_search.scoring.scorer import Scorer
from dynadepth_search.training.menu_fit import fit_trained_menu, learning_curve
from dynadepth_search.training.router_fit import write_routers
from tests.tiny import tiny_model
from tests.tiny_text import word_tokenizer

LAYERS = 6
# A layer is repeated, and at layer 4 there are three groups.
PLANS = np.array(
    [
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 0, 1],
        [1, 1, 0, 1, 1, 1],
        [1, 1, 0, 1, 0, 1],
        [1, 1, 2, 1, 0, 0],
        [1, 1, 0, 1, 0, 0],
    ],
    dtype=np.uint8,
)
BUDGETS = (0.6, 0.7, 0.75, 0.85, 0.95)


def make_task(count: int, seed: int, *, kind: str = "prompt") -> Task:
    """Prompts of very different lengths from one distribution."""
    rng = np.random.default_rng(seed)
    examples = []
    for index in range(count):
        text = "".join(rng.choice(list("abcdefgh "), size=rng.integers(2, 20)))
        prompt = f"{rng.integers(10**6)} {text}{'?' if rng.random() < 0.5 else '!'}"
        examples.append(
            Example(prompt, (" yes", " no"), index % 2) if kind == "choices" else Example(prompt)
        )
    return Task("hand", tuple(examples))


@pytest.fixture(scope="module")
def model() -> Any:
    """A model whose later layers add little, so that most prompts keep their answer, and how sure it is tells which."""
    model = tiny_model(num_layers=LAYERS, dtype=torch.float32, seed=1)
    with torch.no_grad():
        for layer in model.model.layers[2:]:
            layer.self_attn.o_proj.weight.mul_(0.2)
            layer.mlp.down_proj.weight.mul_(0.2)
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return word_tokenizer()


@pytest.fixture(scope="module")
def table(model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> ScoreTable:
    folder = tmp_path_factory.mktemp("scores")
    return score_prompts(
        model, tokenizer, make_task(800, 0), PLANS, folder, layers=(1, 2, 4), num_windows=2
    )


@pytest.fixture(scope="module")
def heldout() -> tuple[Example, ...]:
    return make_task(300, 1).examples


@pytest.fixture(scope="module")
def trained(table: ScoreTable) -> Any:
    return fit_trained_menu(table)


@pytest.fixture(scope="module")
def folder(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_routers(tmp_path_factory.mktemp("run") / "menu", trained)


@pytest.fixture(autouse=True)
def _untouched(model: Any) -> Any:
    yield
    assert "dynadepth" not in model.__dict__


def plans_at(model: Any, tokenizer: Any, examples: Any, budget: float, **options: Any) -> Any:
    with wrapped(model, budget=budget, **options):
        return planned(model, Scorer(model, tokenizer), examples)


def test_a_table_becomes_a_folder_that_wraps_the_model(
    model: Any, tokenizer: Any, table: ScoreTable, trained: Any, folder: Any
) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "router_config.json",
        "routers.onnx",
        "routers.safetensors",
    ]
    loaded = load_policy(folder, model=model)
    assert loaded.kind == "menu"
    assert np.array_equal(loaded.menu.plans, PLANS)
    tensors = trained.menu.state_dict()
    assert {name: tensor.shape for name, tensor in loaded.menu.state_dict().items()} == {
        name: tensor.shape for name, tensor in tensors.items()
    }
    assert all(torch.equal(loaded.menu.state_dict()[name], tensors[name]) for name in tensors)
    for name in ("calibration", "protect", "fingerprint", "training", "base_model"):
        assert getattr(loaded, name) == getattr(trained, name), name
    notes = loaded.training
    assert (notes["train_prompts"], notes["objective"], notes["seed"]) == (800, "preserve", 0)
    assert notes["task"]["sha256"] == table.manifest["asked"]["task"]["sha256"]
    assert tuple(notes["recipe"]["layers"]) == loaded.menu.decision_layers
    assert loaded.calibration.range == pytest.approx((plan_depth(PLANS).min(), 1.0))
    wrap_model(model, routers=folder, budget=0.8, router_backend="onnx")
    ids = tokenizer("abc?", return_tensors="pt")["input_ids"]
    made = model.generate(ids, max_new_tokens=2, do_sample=False)
    unwrap_model(model)
    assert made.shape == (1, ids.shape[1] + 2)


def test_the_states_of_this_model_tell_prompts_apart(trained: Any, table: ScoreTable) -> None:
    """Or the tests below would test a static mixture."""
    assert trained.training["recipe"]["shrinkage"] > 0
    assert trained.training["cross_validated_gain"] > 0.01
    assert table.agreement[:, 1:].mean() > 0.05


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_budget_is_met_on_prompts_that_trained_nothing(
    model: Any, tokenizer: Any, folder: Any, heldout: Any, budget: float
) -> None:
    """The means of 300 prompts here and of 800 in calibration are off by chance as well."""
    plans = plans_at(model, tokenizer, heldout, budget, routers=folder)
    depths = plan_depth(plans)
    assert {plan.tobytes() for plan in plans} <= {plan.tobytes() for plan in PLANS}
    chance = float(depths.std() * np.sqrt(1 / 300 + 1 / 800))
    assert abs(float(depths.mean()) - budget) < 0.01 + 2 * chance


def test_over_all_budgets_the_mean_depth_is_within_a_hundredth(
    model: Any, tokenizer: Any, folder: Any
) -> None:
    examples = make_task(900, 2).examples
    off = [
        float(plan_depth(plans_at(model, tokenizer, examples, budget, routers=folder)).mean())
        - budget
        for budget in BUDGETS
    ]
    assert abs(np.mean(off)) < 0.01
    assert max(map(abs, off)) < 0.02


def test_on_prompts_of_its_own_distribution_it_gains_over_static_mixtures(
    model: Any, tokenizer: Any, trained: Any, table: ScoreTable, heldout: Any, tmp_path: Any
) -> None:
    test = score_prompts(
        model,
        tokenizer,
        Task("test", heldout),
        PLANS,
        tmp_path,
        layers=trained.menu.decision_layers,
        num_windows=table.num_windows,
    )
    rows = compare_menu(trained, table, test, BUDGETS, mix=table_mix(test, tokenizer))
    assert [row["budget"] for row in rows] == list(BUDGETS)
    gains = [row["agreement"]["gain"]["mean"] for row in rows]
    assert np.mean(gains) > 0
    for row in rows:
        # The plans that the runtime chooses, whatever was worked out from the table.
        plans = plans_at(model, tokenizer, heldout, row["budget"], routers=trained)
        assert row["depth"] == pytest.approx(float(plan_depth(plans).mean()), abs=0.005)
        mixture = mix_to_depth(
            trained.menu.depths, table.agreement.mean(axis=0), row["depth"]
        ).expected(test.agreement.T)
        assert row["agreement"]["static"] == pytest.approx(100 * mixture.mean())
        known = {plan.tobytes(): column for column, plan in enumerate(PLANS)}
        columns = [known[plan.tobytes()] for plan in plans]
        agreed = 100 * test.agreement[np.arange(len(columns)), columns].mean()
        assert row["agreement"]["policy"]["mean"] == pytest.approx(agreed, abs=0.7)


def test_kinds_make_an_opponent_that_tells_them_apart(trained: Any, table: ScoreTable) -> None:
    def kinds_of(part: ScoreTable) -> list[str]:
        """Kinds that say all: which plans keep the answer."""
        return [str(row.tolist()) for row in part.agreement]

    # The same figures under other names: what was trained on is not held out.
    other = replace(
        table, examples=tuple(Example(f"other {item.prompt}") for item in table.examples)
    )
    rows = compare_menu(
        trained, table, other, BUDGETS, kinds=(["one"] * len(table), ["one"] * len(table))
    )
    for row in rows:
        agreement = row["agreement"]
        assert agreement["static by kind"] == pytest.approx(agreement["static"])
        assert agreement["gain by kind"]["mean"] == pytest.approx(agreement["gain"]["mean"])
        assert row["depth by kind"] == {"one": pytest.approx(row["depth"])}
    told = compare_menu(trained, table, other, BUDGETS, kinds=(kinds_of(table), kinds_of(table)))
    for row in told:
        # Nobody beats an opponent that knows everything.
        assert row["agreement"]["gain by kind"]["mean"] <= 1e-9
        assert row["agreement"]["static by kind"] >= row["agreement"]["static"] - 1e-9
    assert sum(row["agreement"]["static by kind"] > row["agreement"]["static"] for row in told)
    with pytest.raises(ConfigError, match="same kinds on both sides"):
        compare_menu(trained, table, other, BUDGETS, kinds=(["a"] * len(table), ["b"] * len(table)))
    with pytest.raises(ConfigError, match="one for each prompt"):
        compare_menu(trained, table, other, BUDGETS, kinds=(["a"] * len(table), ["a"]))


def test_prompts_that_took_part_are_not_held_out(trained: Any, table: ScoreTable) -> None:
    with pytest.raises(
        TaskError,
        match="of 10 different held-out prompts, some took part .*: "
        "10 in the training prompts' table, 10 in the menu's",
    ):
        compare_menu(trained, table, table.take(np.arange(10)), BUDGETS)
    chosen = [Example(f"chose {index}") for index in range(10)]
    other = replace(table.take(np.arange(10)), examples=tuple(chosen))
    for part in (
        (replace(trained, training={"plan_prompt_hashes": prompt_hashes(chosen[:3])}), table),
        (
            trained,
            replace(table, manifest=table.manifest | {"prompt_hashes": prompt_hashes(chosen[:3])}),
        ),
        (
            trained,
            replace(
                table, manifest=table.manifest | {"plan_prompt_hashes": prompt_hashes(chosen[:3])}
            ),
        ),
    ):
        with pytest.raises(
            TaskError, match=r"of 10 different held-out prompts, some took part .*: 3 in the"
        ):
            compare_menu(*part, other, BUDGETS)


@pytest.mark.parametrize("scoring", ["raw", "letter"])
@pytest.mark.parametrize("chat", [True, False])
def test_the_number_of_a_prompt_is_that_of_the_tokens_it_has_in_use(
    model: Any, tmp_path: Any, chat: bool, scoring: Any
) -> None:
    tokenizer = word_tokenizer(bos=True)
    tokenizer.chat_template = "({{ messages[0]['role'] }}) {{ messages[0]['content'] }}"
    task = replace(make_task(6, 0, kind="choices"), scoring=scoring)
    task = as_chat(task, tokenizer) if chat else task
    part = score_prompts(model, tokenizer, task, PLANS, tmp_path, layers=())
    scorer = Scorer(model, tokenizer, scoring, chat=task.chat)
    for number, example in zip(table_mix(part, tokenizer), part.examples, strict=True):
        assert number == float(prompt_mix(*scorer.encode_prompts([example])))


def test_what_is_worked_out_from_a_table_is_what_the_runtime_chooses(
    model: Any, tokenizer: Any, trained: Any, table: ScoreTable
) -> None:
    numbers = table_mix(table, tokenizer)
    ids = tokenizer(table.examples[3].prompt, return_tensors="pt")["input_ids"]
    assert numbers[3] == float(prompt_mix(ids, torch.ones_like(ids, dtype=torch.bool)))
    scores = menu_scores(trained.menu, table)
    for budget in BUDGETS:
        by_table = PLANS[chosen_plans(trained, budget, numbers, scores)]
        by_model = plans_at(model, tokenizer, table.examples, budget, routers=trained)
        # A near-tie may fall otherwise in another batch.
        assert (by_table == by_model).all(axis=1).mean() > 0.99


@pytest.mark.parametrize("budget", BUDGETS)
def test_onnxruntime_gives_the_same_plans(
    model: Any, tokenizer: Any, folder: Any, heldout: Any, budget: float
) -> None:
    examples = heldout[:100]
    by_torch = plans_at(model, tokenizer, examples, budget, routers=folder)
    by_onnx = plans_at(model, tokenizer, examples, budget, routers=folder, router_backend="onnx")
    assert np.array_equal(by_onnx, by_torch)
    assert len(np.unique(by_torch, axis=0)) > 1


def test_a_plan_does_not_depend_on_the_batch(
    model: Any, tokenizer: Any, folder: Any, heldout: Any
) -> None:
    scorer = Scorer(model, tokenizer)
    with wrapped(model, budget=0.8, routers=folder):
        together = planned(model, scorer, heldout[:40], batch_size=40)
        alone = planned(model, scorer, heldout[:40], batch_size=1)
    assert np.array_equal(together, alone)


class TestLimits:
    @pytest.fixture(scope="class")
    def early(self, table: ScoreTable) -> Any:
        """A menu of one step, whose plans the limits may cut after they are chosen."""
        few = table.take(np.arange(300))
        return fit_trained_menu(replace(few, views={2: few.views[2]}))

    def test_no_prompt_is_deeper_than_max_depth(
        self, model: Any, tokenizer: Any, heldout: Any, tmp_path: Any
    ) -> None:
        plans = np.array(
            [[1, 1, 1, 1, 1, 1], [1, 1, 2, 2, 2, 1], [1, 1, 0, 1, 0, 1], [1, 1, 1, 1, 1, 2]]
        )
        table = score_prompts(
            model,
            tokenizer,
            make_task(40, 0),
            plans,
            tmp_path,
            layers=(2,),
        )
        menu = fit_trained_menu(table)
        # The plans with repeats are worth as much as the identity, and nothing else is.
        menu.menu.heads[0].bias[:] = torch.tensor([-9.0, 9.0, -9.0, 8.9])
        free = plans_at(model, tokenizer, heldout[:30], 1.0, routers=menu)
        assert plan_depth(free).max() > 1
        for most in (1, 7 / 6):
            cut = plans_at(model, tokenizer, heldout[:30], 1.0, routers=menu, max_depth=most)
            assert plan_depth(cut).max() <= most + 1e-9
            assert np.array_equal(cut == 0, free == 0)

    def test_layers_that_no_plan_edits_can_be_protected(
        self, model: Any, tokenizer: Any, table: ScoreTable, heldout: Any
    ) -> None:
        menu = fit_trained_menu(table.take(np.arange(100)), protect=(0, 3))
        assert menu.protect == (0, 3)
        plans = plans_at(model, tokenizer, heldout[:20], 0.6, routers=menu, protect=(3,))
        assert (plans[:, [0, 3]] == 1).all()
        with pytest.raises(ConfigError, match=r"layers \[1\] are to be protected, but the budget"):
            wrap_model(model, budget=0.6, routers=menu, protect=(1,))

    def test_layers_that_a_plan_edits_cannot(self, table: ScoreTable) -> None:
        with pytest.raises(ConfigError, match=r"plans of the menu edit layers \[2, 4\], which are"):
            fit_trained_menu(table.take(np.arange(40)), protect=(0, 2, 4))

    def test_one_step_can_be_had_from_states_of_one_layer(
        self, model: Any, tokenizer: Any, early: Any, heldout: Any
    ) -> None:
        assert early.menu.decision_layers == (2,)
        plans = plans_at(model, tokenizer, heldout[:50], 0.75, routers=early)
        assert len(np.unique(plans, axis=0)) > 1

    def test_a_budget_that_no_plan_reaches_is_refused(self, model: Any, trained: Any) -> None:
        lowest = float(plan_depth(PLANS).min())
        for budget in (lowest - 0.01, 1.01):
            with pytest.raises(BudgetError, match=r"within the calibrated range, 0\.5 to 1\.0"):
                wrap_model(model, budget=budget, routers=trained)


def test_some_plans_of_a_table_make_a_menu(table: ScoreTable) -> None:
    few = table.take(np.arange(100))
    fit = fit_trained_menu(few, plans=PLANS[[0, 3, 1]])
    assert np.array_equal(fit.menu.plans, PLANS[[0, 3, 1]])
    assert fit.calibration.range == pytest.approx((4 / 6, 1.0))
    with pytest.raises(
        ConfigError, match=r"a plan of depth 0\.833 of the menu is not in the score"
    ):
        fit_trained_menu(few, plans=[PLANS[0], [1, 1, 1, 0, 1, 1]])


def test_what_cannot_be_trained_is_refused(table: ScoreTable) -> None:
    with pytest.raises(
        ConfigError, match="19 different prompts cannot train and cross-validate a menu"
    ):
        fit_trained_menu(table.take(np.arange(19)))
    with pytest.raises(ConfigError, match="objective 'reward' needs prompts with right answers"):
        fit_trained_menu(table, objective="reward")
    with pytest.raises(ConfigError, match="objective 'fidelity' is unknown"):
        fit_trained_menu(table, objective="fidelity")


def test_the_probability_of_the_right_answer_can_be_the_objective(
    model: Any, tokenizer: Any, tmp_path: Any
) -> None:
    table = score_prompts(
        model, tokenizer, make_task(60, 0, kind="choices"), PLANS, tmp_path, layers=(2,)
    )
    fit = fit_trained_menu(table, objective="reward")
    assert fit.training["objective"] == "reward"
    assert fit.calibration.highest == 1.0


def test_the_same_seed_gives_the_same_menu(table: ScoreTable, trained: Any) -> None:
    again = fit_trained_menu(table)
    expected = trained.menu.state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in again.menu.state_dict().items())
    assert (again.calibration, again.training) == (trained.calibration, trained.training)


def test_every_stage_reports_until_it_is_done(table: ScoreTable) -> None:
    seen: list[tuple[str, int, int]] = []
    few = table.take(np.arange(100))
    fit_trained_menu(few, progress=lambda *report: seen.append(report))
    points = learning_curve(few, progress=lambda *report: seen.append(report))
    stages = [stage for stage, _ in groupby(seen, key=lambda report: report[0])]
    assert stages == ["training the menu", "calibrating", "learning curve"]
    for stage in stages:
        reports = [(done, total) for name, done, total in seen if name == stage]
        assert reports == sorted(reports)
        assert reports[-1][0] == reports[-1][1]
    assert [point["prompts"] for point in points] == [50, 100]
    gain = fit_trained_menu(few).training["cross_validated_gain"]
    assert points[-1]["gain"] == pytest.approx(gain)


def test_one_text_is_refused_and_has_no_learning_curve(table: ScoreTable) -> None:
    one = replace(
        table.take(np.arange(80)),
        examples=tuple(Example("one text", (f"a {row}", "b"), 0) for row in range(80)),
    )
    with pytest.raises(ConfigError, match="1 different prompts cannot train and cross-validate"):
        fit_trained_menu(one)
    assert learning_curve(one) == []
