"""The outcomes of a menu on prompts whose plans have all been scored, computed without a forward.

They come from score tables. A menu is compared with the best mixture of the same plans that has the same depth and
does not look at the prompt.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dynadepth.checkpoints.trained_policy import TrainedMenu
from dynadepth.errors import ConfigError
from dynadepth.evaluation.intervals import mean_interval, paired_difference
from dynadepth.evaluation.mixtures import mix_by_kind, mix_to_depth
from dynadepth.plans import prefix_numbers
from dynadepth.policies.menu import Menu, score_states
from dynadepth.policies.prompt_batch import prompt_mix
from dynadepth.training.menu.tradeoff import choose_menu_plans
from dynadepth_search.data.encoding import encode_example
from dynadepth_search.data.splits import check_held_out
from dynadepth_search.evaluation.notes import fitted_on, remembered_prompts
from dynadepth_search.scoring.score_table import ScoreTable
from dynadepth_search.storage.compatibility import chat_form

__all__ = ["chosen_plans", "compare_menu", "menu_scores", "table_mix"]

Floats = npt.NDArray[np.float64]
# The multiples of this number, modulo 1, are evenly spread.
_GOLDEN = 0.6180339887498949
# For each metric: its name, the field of the table, the factor that it is shown with, and the sign that makes higher
# values better; the opponent is the static mixture that is best by this metric on the training prompts.
_METRICS = (
    ("agreement", "agreement", 100.0, 1.0),
    ("total variation", "total_variation", 1.0, -1.0),
    ("divergence", "divergence", 1.0, -1.0),
    ("accuracy", "correct", 100.0, 1.0),
    ("graded reward", "reward", 1.0, 1.0),
)


def menu_scores(menu: Menu, table: ScoreTable) -> list[Floats]:
    """Return the scores of each head, for every plan from the states under its own prefix.

    Args:
        menu: A menu whose plans are all in the table, in any order.
        table: The table, with states of every layer that a head reads.

    Returns:
        Scores, one array for each head. Shape (prompts, K), float64.
    """
    rows = _rows(menu, table)
    return [
        score_states(
            head,
            table.views[head.layer_idx],
            prefix_numbers(table.plans, head.layer_idx)[rows],
        )
        for head in menu.heads
    ]


def chosen_plans(
    trained: TrainedMenu, budget: float, mix: Floats, scores: list[Floats]
) -> npt.NDArray[np.int64]:
    """Return the plan of each prompt at a budget, as `MenuPolicy` chooses it.

    Args:
        trained: The menu with its calibration.
        budget: Mean depth over prompts, as a fraction of the number of layers.
        mix: The number in [0, 1) of each prompt, see `dynadepth.policies.prompt_batch.prompt_mix`. Shape (prompts,),
            float64.
        scores: What `menu_scores` returned.

    Returns:
        Indices into the menu's plans. Shape (prompts,), int64.
    """
    penalties = trained.calibration.mix_for(budget)
    menu = trained.menu
    shallow, deep = (
        choose_menu_plans(scores, menu.plans, menu.decision_layers, penalty)
        for penalty in (penalties.shallow, penalties.deep)
    )
    return np.where(mix < penalties.share, deep, shallow)


def table_mix(table: ScoreTable, tokenizer: Any) -> Floats:
    """Return the number in [0, 1) of each prompt, see `prompt_mix`. Shape (prompts,), float64."""
    task = table.manifest["asked"]["task"]
    scoring, chat = task["scoring"], chat_form(task)
    found = []
    for example in table.examples:
        prompt = encode_example(tokenizer, example, scoring, chat).prompt_ids
        ids = torch.from_numpy(prompt)[None]
        found.append(float(prompt_mix(ids, torch.ones_like(ids, dtype=torch.bool))))
    return np.array(found)


def compare_menu(
    trained: TrainedMenu,
    train: ScoreTable,
    heldout: ScoreTable,
    budgets: Sequence[float],
    *,
    mix: Floats | None = None,
    kinds: tuple[Sequence[str], Sequence[str]] | None = None,
) -> list[dict[str, Any]]:
    """Compare a menu on held-out prompts with the static mixture of the mean depth that it had there.

    The mixture consists of plans of the menu, which are chosen on the training prompts, for each metric separately.

    Args:
        trained: The menu.
        train: Training prompts under its plans.
        heldout: Held-out prompts under its plans.
        budgets: Mean depths asked for; those below its range are left out.
        mix: The number in [0, 1) of each held-out prompt; None: evenly spaced numbers, with which single prompts may
            get another plan than with their own numbers, but means stay the same.
        kinds: The kind of each training and of each held-out prompt. If given, the mean depth of each kind is reported,
            and a second opponent: the best mixtures of equal overall depth that look only at a prompt's kind.

    Returns:
        A row for each budget: `budget`, `depth`, `n`, `identity rate`, `different plans`, and for each metric `static`,
        `policy` and the paired `gain` with their 95 % intervals; with kinds also `depth by kind`, and for each metric
        `static by kind` and the `gain by kind` over it.

    Raises:
        ConfigError: The kinds are not one for each prompt, or not the same on both sides.
        TaskError: A held-out prompt is also a training prompt, or one that chose the plans.
    """
    check_held_out(
        heldout.examples,
        {
            "the training prompts' table": train.prompt_hashes,
            "the search of its plans": train.plan_prompt_hashes,
            "the menu's training": remembered_prompts(trained) or (),
            "the menu's shortcuts": (
                () if trained.shortcuts is None else fitted_on(trained.shortcuts) or ()
            ),
        },
    )
    rows_train, rows_held = _rows(trained.menu, train), _rows(trained.menu, heldout)
    groups = None if kinds is None else _Groups(kinds, (len(train), len(heldout)))
    depths = trained.menu.depths
    scores = menu_scores(trained.menu, heldout)
    spread = np.arange(len(heldout), dtype=np.float64) * _GOLDEN % 1.0
    numbers = spread if mix is None else mix
    lowest, highest = trained.calibration.range
    found = []
    for budget in budgets:
        if not lowest - 1e-6 <= budget <= highest + 1e-6:
            continue
        asked = min(max(budget, lowest), highest)
        choice = chosen_plans(trained, asked, numbers, scores)
        depth = float(depths[choice].mean())
        row: dict[str, Any] = {
            "budget": budget,
            "depth": depth,
            "n": len(heldout),
            "identity rate": float((trained.menu.plans[choice] == 1).all(axis=1).mean()),
            "different plans": len(np.unique(choice)),
        }
        if groups is not None:
            means = groups.heldout @ depths[choice] / groups.heldout.sum(axis=1)
            row["depth by kind"] = dict(zip(groups.names, means.tolist(), strict=True))
        for name, column, factor, sign in _METRICS:
            if column in ("correct", "reward") and not heldout.graded:
                continue
            known = sign * getattr(train, column)[:, rows_train]
            values = factor * getattr(heldout, column)[:, rows_held]
            policy = values[np.arange(len(values)), choice]
            static = mix_to_depth(depths, known.mean(axis=0), depth).expected(values.T)
            row[name] = {
                "static": float(static.mean()),
                "policy": mean_interval(policy).to_dict(),
                "gain": paired_difference(policy, static).to_dict(),
            }
            if groups is not None:
                static = groups.expected(depths, known, values, depth)
                row[name]["static by kind"] = float(static.mean())
                row[name]["gain by kind"] = paired_difference(policy, static).to_dict()
        found.append(row)
    return found


class _Groups:
    """Training and held-out prompts by their kinds.

    Args:
        kinds: Kind of each training and of each held-out prompt.
        counts: Number of training and of held-out prompts.

    Raises:
        ConfigError: There is not one kind for each prompt, or the kinds are not the same on both sides.
    """

    def __init__(self, kinds: tuple[Sequence[str], Sequence[str]], counts: tuple[int, int]) -> None:
        given = (len(kinds[0]), len(kinds[1]))
        if given != counts:
            raise ConfigError(
                f"{given[0]} kinds of {counts[0]} training and {given[1]} of {counts[1]} held-out prompts given; "
                "expected one for each prompt"
            )
        self.names = list(dict.fromkeys(kinds[1]))
        if set(kinds[0]) != set(self.names):
            raise ConfigError(
                f"training prompts are of kinds {sorted(set(kinds[0]))} and held-out prompts of {sorted(self.names)}; "
                "expected the same kinds on both sides"
            )
        # 1 for the prompts of each kind. Shape (kinds, prompts), float64.
        self.train, self.heldout = (
            np.array([[kind == name for kind in side] for name in self.names], dtype=np.float64)
            for side in kinds
        )

    def expected(self, depths: Floats, known: Floats, values: Floats, depth: float) -> Floats:
        """Return each held-out prompt's expected value under the best mixtures of each kind at a depth. Shape (N,)."""
        means = self.train @ known / self.train.sum(axis=1, keepdims=True)
        mixtures = mix_by_kind(depths, means, self.heldout.mean(axis=1), depth)
        found = np.stack([mixture.expected(values.T) for mixture in mixtures])
        expected: Floats = (self.heldout * found).sum(axis=0)
        return expected


def _rows(menu: Menu, table: ScoreTable) -> npt.NDArray[np.int64]:
    known = {plan.tobytes(): row for row, plan in enumerate(table.plans)}
    return np.array([known[plan.tobytes()] for plan in menu.plans])
