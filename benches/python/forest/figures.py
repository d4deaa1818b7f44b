"""Regret after some evaluations, compared in pairs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dynadepth.tree_search.forest import EditPrior
from forest import methods
from forest.oracles import Oracle, within

BUDGETS = (10, 20, 40, 80, 160, 240)
OURS = "forest, prior"
# Half the width of a 95 % interval, in standard errors.
Z = 1.96

# From an oracle, its prior and a seed to the true gain of what is found, shape (prompts, budgets).
Method = Callable[[Oracle, EditPrior, int], np.ndarray]


@dataclass
class Column:
    """What all methods find on one oracle.

    Args:
        name: Kind of the oracle.
        num_layers: Its layers.
        gains: True gain of the plan that each method recommends. Shape (prompts, budgets), by method.
        achievable: The best gain. Shape (prompts,).
        proved: For how many prompts that is proved; for the others it is the best known.
    """

    name: str
    num_layers: int
    gains: dict[str, np.ndarray] = field(default_factory=dict)
    achievable: np.ndarray = field(default_factory=lambda: np.zeros(0))
    proved: int = 0

    @property
    def title(self) -> str:
        return f"{self.name}, L = {self.num_layers}"

    def regret(self, method: str) -> np.ndarray:
        """Return what is missed, in shares of the mean achievable gain. Shape (prompts, budgets)."""
        return np.asarray((self.achievable[:, None] - self.gains[method]) / self.achievable.mean())

    def more_than(self, method: str) -> np.ndarray:
        """Return the regret of ours beyond that of a method. Shape (prompts, budgets)."""
        return np.asarray(self.regret(OURS) - self.regret(method))

    def hits(self, method: str) -> np.ndarray:
        """Return where 95 % of the gain are found. Shape (prompts, budgets)."""
        return np.asarray(self.gains[method] >= 0.95 * self.achievable[:, None] - 1e-12)

    def joined(self, other: "Column") -> "Column":
        gains = {name: np.concatenate([own, other.gains[name]]) for name, own in self.gains.items()}
        achievable = np.concatenate([self.achievable, other.achievable])
        return Column(self.name, self.num_layers, gains, achievable, self.proved + other.proved)


def found(oracle: Oracle, prompt: int, plans: np.ndarray) -> np.ndarray:
    """Return the true gain of the plan that looks best after 1, 2, ... evaluations; the identity plan gains 0."""
    plans = np.asarray(plans)
    seen = oracle.gains(prompt, plans, oracle.seen(prompt, plans))
    true = oracle.gains(prompt, plans, oracle.truth(prompt, plans))
    seen = np.where(within(plans, oracle.caps), seen, -np.inf)
    best, curve = 0, np.empty(len(plans))
    for index, value in enumerate(seen):
        if value > seen[best]:
            best = index
        curve[index] = true[best]
    return curve


def at_budgets(curve: np.ndarray) -> np.ndarray:
    """Return a curve at `BUDGETS`; a search that ended early keeps what it had."""
    return np.array([curve[min(count, len(curve)) - 1] for count in BUDGETS])


def forest_method(*, with_prior: bool, **settings: Any) -> Method:
    def run(oracle: Oracle, prior: EditPrior, seed: int) -> np.ndarray:
        given = prior if with_prior else None
        searches = methods.by_forest(oracle, max(BUDGETS), seed, prior=given, **settings)
        return np.array([at_budgets(found(oracle, *each)) for each in enumerate(searches)])

    return run


def each_prompt(
    search: Callable[[methods.Judge, EditPrior, np.random.Generator], Any], *, anew: bool = False
) -> Method:
    """Run a search prompt by prompt; `anew` for each budget, where it depends on that."""

    def run(oracle: Oracle, prior: EditPrior, seed: int) -> np.ndarray:
        rows = np.empty((oracle.num_prompts, len(BUDGETS)))
        for prompt in range(oracle.num_prompts):
            for index, count in enumerate(BUDGETS):
                if anew or index == 0:
                    judge = methods.Judge(oracle, prompt, count if anew else max(BUDGETS))
                    rng = np.random.default_rng([seed, prompt])
                    plans = search(judge, prior, rng) or judge.plans
                    curve = at_budgets(found(oracle, prompt, np.stack(plans)))
                rows[prompt, index] = curve[index]
        return rows

    return run


METHODS: dict[str, Method] = {
    OURS: forest_method(with_prior=True),
    "forest, flat prior": forest_method(with_prior=False),
    "published walk": each_prompt(
        lambda judge, _, rng: methods.new_plans(judge, methods.published_walk(judge.oracle, rng))
    ),
    "singles, greedy union": each_prompt(
        lambda judge, prior, _: methods.singles_then_union(judge, prior), anew=True
    ),
    "beam": each_prompt(lambda judge, prior, _: methods.beam(judge, prior)),
    "Thompson, linear": each_prompt(methods.thompson),
    "random plans": each_prompt(
        lambda judge, _, rng: methods.new_plans(judge, methods.random_plans(judge.oracle, rng))
    ),
}
BASELINES = [name for name in METHODS if not name.startswith("forest")]


def other_settings(given: str) -> tuple[str, Method]:
    """Return the forest with other settings, and its name; `given` is like "exploration=2.5,interaction=0.1"."""
    settings = {
        name: float(number) for name, number in (pair.split("=") for pair in given.split(","))
    }
    return f"forest, {given.replace('=', ' ').replace(',', ', ')}", forest_method(
        with_prior=True, **settings
    )


def measured(oracle: Oracle, name: str, seed: int, methods: dict[str, Method]) -> Column:
    """Run methods on an oracle."""
    column = Column(name, oracle.num_layers)
    prior = oracle.prior(seed)
    for method, run in methods.items():
        column.gains[method] = run(oracle, prior, seed)
    known = np.max([gains.max(axis=1) for gains in column.gains.values()], axis=0)
    bests = [oracle.best_gain(prompt, max(0.0, each)) for prompt, each in enumerate(known)]
    column.achievable = np.array([best for best, _ in bests])
    column.proved = sum(proved for _, proved in bests)
    return column


def interval(numbers: np.ndarray) -> tuple[float, float, float]:
    """Return a mean and its 95 % interval."""
    mean = float(numbers.mean())
    half = Z * float(numbers.std(ddof=1)) / np.sqrt(len(numbers))
    return mean, mean - half, mean + half


def losses(column: Column) -> list[str]:
    """Name the baselines and budgets where ours has more regret beyond the paired interval."""
    lost = []
    for name in BASELINES:
        more = column.more_than(name)
        for index, count in enumerate(BUDGETS):
            mean, low, high = interval(more[:, index])
            if low > 0:
                lost.append(f"{name} at {count}: {mean:+.3f} [{low:+.3f}, {high:+.3f}]")
    return lost


def rows_of(column: Column) -> list[dict[str, Any]]:
    """Return one row for each method and budget."""
    rows = []
    for name in column.gains:
        regret, hits = column.regret(name), column.hits(name)
        more = column.more_than(name)
        for index, count in enumerate(BUDGETS):
            mean, low, high = interval(more[:, index])
            rows.append(
                {
                    "column": column.title,
                    "method": name,
                    "evaluations": count,
                    "regret": float(regret[:, index].mean()),
                    "hits": float(hits[:, index].mean()),
                    "ours_minus_this": [mean, low, high],
                }
            )
    return rows


def shown(column: Column) -> str:
    """Return a column as a table."""
    title = (
        f"{column.title}: {len(column.achievable)} prompts, optimum proved for {column.proved}, "
        f"mean achievable gain {column.achievable.mean():.3f}"
    )
    heads = " | ".join(str(count) for count in BUDGETS)
    lines = [title, "", f"| method | {heads} |", f"|---|{'---:|' * len(BUDGETS)}"]
    for name in column.gains:
        regret, hits = column.regret(name).mean(axis=0), column.hits(name).mean(axis=0)
        cells = [f"{miss:.3f}, {hit:.0%}" for miss, hit in zip(regret, hits, strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lost = losses(column) or ["nowhere"]
    lines += ["", "ours is worse beyond the paired interval: " + "; ".join(lost), ""]
    walk, ours = column.regret("published walk")[:, -1], column.regret(OURS)[:, BUDGETS.index(40)]
    mean, low, high = interval(ours - walk)
    lines += [f"ours at 40 minus the walk at 240: {mean:+.3f} [{low:+.3f}, {high:+.3f}]", ""]
    return "\n".join(lines)


def verdicts(columns: list[Column], other: str) -> str:
    """Return, for each budget, the mean regret of ours and of another method, and on how many columns each is worse."""
    lines = [f"{OURS} against {other}, {len(columns)} columns", ""]
    lines += ["| evaluations | mean regret | of the other | ours is surely worse | better |"]
    lines += ["|---:|---:|---:|---:|---:|"]
    for index, count in enumerate(BUDGETS):
        ends = [interval(column.more_than(other)[:, index]) for column in columns]
        means = (
            np.mean([column.regret(name)[:, index].mean() for column in columns])
            for name in (OURS, other)
        )
        worse, better = sum(low > 0 for _, low, _ in ends), sum(high < 0 for *_, high in ends)
        lines.append(
            f"| {count} | {' | '.join(f'{mean:.4f}' for mean in means)} | {worse} | {better} |"
        )
    return "\n".join([*lines, ""])
