"""Plans for all prompts: a beam search over sets of skipped layers, the static front in it, and a menu from it.

Owns the search; how `menu.json` is read is `static_files`. The beam is the look-ahead: a plan that is not the best of
its depth may lead to the best one below.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dynadepth.config import config_to_dict
from dynadepth.errors import ConfigError, SearchError, TaskError
from dynadepth.evaluation.folds import draw_parts
from dynadepth.files import write_json_atomic
from dynadepth.models.fingerprint import fingerprint, fingerprint_digest
from dynadepth.plans import SKIP, Plans, identity_plan, plan_text
from dynadepth.shortcuts.maps import Shortcuts
from dynadepth.training.menu.fit import choose_plans
from dynadepth_search.data.splits import prompt_hashes
from dynadepth_search.data.tasks import Example, Task
from dynadepth_search.files.locking import locked
from dynadepth_search.progress import Progress, silent
from dynadepth_search.scoring.objectives import (
    check_answers,
    plan_values,
    refuse_solutions,
)
from dynadepth_search.scoring.outcomes import Outcomes
from dynadepth_search.scoring.score_table import menu_data, score_prompts
from dynadepth_search.scoring.scorer import Scorer
from dynadepth_search.search.static_files import (
    MENU,
    SCHEMA_VERSION,
    StaticPlans,
    read_menu,
    read_static,
)
from dynadepth_search.search.static_spec import StaticSpec
from dynadepth_search.storage.compatibility import (
    check_asked,
    dtype_name,
    shortcut_fields,
    task_fields,
)

__all__ = ["MENU", "StaticPlans", "StaticSpec", "read_static", "search_static"]

_POOL = "pool"
_FEWEST_PROMPTS = 40
# The fewest distinct prompts that can cross-validate the choice of a menu.
_FEWEST_CONFIRMED = 20

_Floats = npt.NDArray[np.float64]


def search_static(
    model: Any,
    tokenizer: Any,
    task: Task,
    folder: str | os.PathLike[str],
    spec: StaticSpec,
    *,
    shortcuts: Shortcuts | None = None,
    progress: Progress = silent,
) -> StaticPlans:
    """Search for plans that suit all prompts of a task, or continue a search that was interrupted.

    First, every layer is removed on its own. From the layers whose removal costs least, sets are grown by one layer at
    a time; the best few sets of each size are extended further. All of these plans form the pool. Other prompts measure
    the pool and, by cross-fitting, choose the menu. The front is the chain of nested plans within the pool with the
    highest sum of means on the first prompts.

    Args:
        model: The unwrapped base model; not changed.
        tokenizer: Tokenizer of the base model.
        task: Training prompts; a sample of them is used.
        folder: Folder for `menu.json` and the score table of the pool.
        spec: Settings of the search.
        shortcuts: What states take in place of layers that a plan skips; None: nothing.
        progress: Called with the stage, the number of finished steps and the number of all steps.

    Returns:
        The plans found.

    Raises:
        ConfigError: Nothing can be removed within `min_depth`, `from_layer` and `protect`, or these name a layer that
            the model does not have.
        LabelError: The folder holds a search with other settings, or is in use.
        SearchError: A metric is not finite.
        ShortcutError: The shortcuts belong to another base model.
        TaskError: There are too few prompts, the objective needs answers that the task does not have, or its answers
            are to be generated.

    Source:
        Layers are removed by their measured cost as in SLEB (arXiv 2402.09025); deviation: a beam instead of a greedy
        chain, and the model's own answers instead of perplexity.
    """
    refuse_solutions(task, before="a search for plans that suit all prompts")
    check_answers(task, spec.objective)
    different = len({example.prompt.strip() for example in task.examples})
    if different < _FEWEST_PROMPTS:
        raise TaskError(
            f"{different} different prompts cannot choose plans for all; give {_FEWEST_PROMPTS} or more"
        )
    place = Path(folder)
    # Everything that can be refused is refused before a folder is made.
    search = _StaticSearch(model, tokenizer, task, place, spec, shortcuts, progress)
    with locked(place):
        search.run()
    return read_static(place)


class _StaticSearch:
    """One run; `_content` is the content of the file on disk."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        task: Task,
        folder: Path,
        spec: StaticSpec,
        shortcuts: Shortcuts | None,
        progress: Progress,
    ) -> None:
        self._model, self._tokenizer, self._task = model, tokenizer, task
        self._folder, self._spec, self._progress = folder, spec, progress
        self._shortcuts = shortcuts
        self._scorer = Scorer(model, tokenizer, task.scoring, chat=task.chat, shortcuts=shortcuts)
        self._num_layers = self._scorer.num_layers
        # At most a third of the prompts chooses the beam: the menu needs prompts that did not.
        names = [example.prompt.strip() for example in task.examples]
        count = min(spec.num_prompts, len(set(names)) // 3)
        first, others = draw_parts(
            names, [count, spec.num_confirmed], np.random.default_rng(spec.seed)
        )
        drawn = [len({names[index] for index in part.tolist()}) for part in (first, others)]
        if drawn[0] < 1 or drawn[1] < _FEWEST_CONFIRMED:
            raise TaskError(
                f"{count} and {spec.num_confirmed} of {len(names)} examples were drawn, those of one prompt together, "
                f"which gave {drawn[0]} and {drawn[1]} different prompts; expected 1 and {_FEWEST_CONFIRMED} or more: "
                "give fewer examples of one prompt, or draw more (num_prompts, num_confirmed)"
            )
        self._examples = [task.examples[index] for index in first.tolist()]
        self._others = [task.examples[index] for index in np.sort(others).tolist()]
        wrong = [layer for layer in spec.protect if not 0 <= layer < self._num_layers]
        if wrong:
            raise ConfigError(
                f"StaticSpec.protect names layers {wrong}; expected layers from 0 to {self._num_layers - 1}"
            )
        for example in (*self._examples, *self._others):
            self._scorer.encode(example)  # fail before an hour of work, not after it
        self._asked = {
            "base_model": fingerprint_digest(fingerprint(model)),
            "dtype": dtype_name(model),
            "task": task_fields(task),
            "search": config_to_dict(spec),
            **shortcut_fields(shortcuts),
        }
        self._path = folder / MENU
        self._content: dict[str, Any] = {}

    def run(self) -> None:
        if self._path.exists():
            self._content = read_menu(self._path, self._num_layers)
            check_asked(self._path, self._asked, self._content["asked"])
            if self._content["complete"]:
                return
        else:
            self._content = {
                "schema_version": SCHEMA_VERSION,
                "asked": self._asked,
                "base_model": fingerprint(self._model),
                "complete": False,
                "evaluations": 0,
                "prompt_hashes": prompt_hashes([*self._examples, *self._others]),
                # The layers that plans may skip, the cheapest first.
                "candidates": [],
                # The plans of the beam, by the number of skipped layers, with their mean on the first prompts.
                "levels": [],
            }
        most = self._most_skipped()
        if not self._content["candidates"]:
            self._progress("removing single layers", 0, 1)
            self._open()
        while len(self._content["levels"]) < most:
            self._progress("growing plans", len(self._content["levels"]), most)
            self._grow()
        self._measure()
        self._content["complete"] = True
        write_json_atomic(self._path, self._content)

    def _most_skipped(self) -> int:
        spec = self._spec
        free = [
            layer for layer in range(spec.from_layer, self._num_layers) if layer not in spec.protect
        ]
        fewest = max(1, int(np.ceil(spec.min_depth * self._num_layers - 1e-9)))
        most = min(self._num_layers - fewest, len(free), spec.num_candidates)
        if most < 1:
            raise ConfigError(
                f"nothing can be removed: {len(free)} of {self._num_layers} layers are free from layer "
                f"{spec.from_layer} on, and min_depth {spec.min_depth} keeps {fewest}; free more layers or lower it"
            )
        return most

    def _open(self) -> None:
        """Remove every free layer on its own."""
        spec = self._spec
        layers = [
            layer for layer in range(spec.from_layer, self._num_layers) if layer not in spec.protect
        ]
        few = min(spec.num_screened, len(self._examples))
        values = self._values([frozenset([layer]) for layer in layers], range(few))
        order = np.argsort(-values.mean(axis=1), kind="stable")
        self._content["candidates"] = [layers[index] for index in order[: spec.num_candidates]]
        write_json_atomic(self._path, self._content)

    def _grow(self) -> None:
        """Add the plans that skip one more layer."""
        spec, content = self._spec, self._content
        known = (
            [frozenset(item["skips"]) for item in content["levels"][-1]]
            if content["levels"]
            else []
        )
        grown = {
            before | {layer}
            for before in known or [frozenset()]
            for layer in content["candidates"]
            if layer not in before
        }
        plans = sorted(grown, key=sorted)
        count = len(self._examples)
        few = min(spec.num_screened, count)
        screened = self._values(plans, range(few))
        order = np.argsort(-screened.mean(axis=1), kind="stable")
        kept = sorted(order[: spec.beam + -(-spec.beam // 2)].tolist())
        if not content["levels"]:
            kept = list(range(len(plans)))
        values = np.empty((len(kept), count))
        values[:, :few] = screened[kept]
        if few < count:
            values[:, few:] = self._values([plans[index] for index in kept], range(few, count))
        # There are few single layers, and the best sets need not consist of the best of them.
        most = spec.beam if content["levels"] else len(kept)
        best = np.argsort(-values.mean(axis=1), kind="stable")[:most]
        content["levels"].append(
            [
                {"skips": sorted(plans[kept[row]]), "value": float(values[row].mean())}
                for row in best.tolist()
            ]
        )
        write_json_atomic(self._path, content)

    def _measure(self) -> None:
        """Measure the pool on other prompts, and choose the front and the menu."""
        spec, content = self._spec, self._content
        pool: list[frozenset[int]] = [frozenset()]
        pool += [frozenset(item["skips"]) for level in content["levels"] for item in level]
        plans = np.stack([self._plan(skips) for skips in pool])
        first = int(np.flatnonzero((plans != 1).any(axis=0))[0])
        task = replace(self._task, name=f"{self._task.name}, pool", examples=tuple(self._others))
        table = score_prompts(
            self._model,
            self._tokenizer,
            task,
            plans,
            self._folder / _POOL,
            layers=[first],
            shortcuts=self._shortcuts,
            plan_prompts=self._content.get("prompt_hashes", ()),
            progress=self._progress,
        )
        content["evaluations"] += len(self._others) * len(pool)
        values = table.agreement if spec.objective == "preserve" else table.reward
        means, changes = values.mean(axis=0), values - values[:, :1]
        content["pool"] = [
            {
                "plan": plan_text(plan),
                "value": float(mean),
                "standard_error": float(change.std(ddof=1) / np.sqrt(len(change))),
                "agreement": float(agreement),
            }
            for plan, mean, change, agreement in zip(
                plans, means, changes.T, table.agreement.mean(axis=0), strict=True
            )
        ]
        content["confirmed"] = len(self._others)
        content["front"] = self._chain(pool)
        content["menu"] = choose_plans(
            menu_data(table), spec.size, objective=spec.objective, seed=spec.seed
        ).tolist()

    def _chain(self, pool: list[frozenset[int]]) -> list[int]:
        """Return the nested plans with the highest sum of values on the prompts that grew them."""
        total: dict[frozenset[int], float] = {frozenset(): 0.0}
        before: dict[frozenset[int], frozenset[int]] = {}
        for level in self._content["levels"]:
            for item in level:
                skips = frozenset(item["skips"])
                under = [known for known in total if len(known) == len(skips) - 1 and known < skips]
                best = max(under, key=lambda known: (total[known], sorted(known)))
                before[skips], total[skips] = best, total[best] + item["value"]
        deepest = max(len(skips) for skips in total)
        at = max((s for s in total if len(s) == deepest), key=lambda s: (total[s], sorted(s)))
        chain = [at]
        while at:
            at = before[at]
            chain.append(at)
        return [pool.index(skips) for skips in reversed(chain)]

    def _values(self, skips: list[frozenset[int]], prompts: Iterable[int]) -> _Floats:
        """Return the values of plans on some of the first prompts, see `plan_values`. Shape (plans, prompts)."""
        examples = [self._examples[index] for index in prompts]
        plans = np.stack([self._plan(each) for each in skips])
        # The values of a step do not depend on what was scored before it.
        self._scorer.forget()
        outcomes = self._scorer.outcomes(
            examples,
            np.repeat(plans, len(examples), axis=0),
            np.tile(np.arange(len(examples)), len(plans)),
        )
        self._check_finite(outcomes, examples, plans)
        values = plan_values(outcomes, self._spec.objective)
        self._content["evaluations"] += values.size
        return values.reshape(len(plans), len(examples))

    def _check_finite(self, outcomes: Outcomes, examples: Sequence[Example], plans: Plans) -> None:
        """Refuse outcomes of logits that overflow."""
        reward = self._spec.objective == "reward"
        metric = outcomes.reward if reward else outcomes.total_variation
        bad = np.flatnonzero(~np.isfinite(metric))
        if len(bad):
            plan, prompt = divmod(int(bad[0]), len(examples))
            raise SearchError(
                f"plan {plan_text(plans[plan])} gives prompt {examples[prompt].prompt[:40]!r} the "
                f"{'reward' if reward else 'total variation'} {metric[bad[0]]}; the model's logits overflow there: "
                "load it in another dtype, or protect the layers that overflow"
            )

    def _plan(self, skips: Iterable[int]) -> Plans:
        plan = identity_plan(self._num_layers)
        plan[list(skips)] = int(SKIP)
        return plan
