"""The whole way on one small model: prompts, shortcuts, search, a menu, evaluation, report, answers.

Owns the order of the steps; their sizes are those of `DemoConfig`. Every step is a function that has its own
command.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dynadepth.checkpoints.save_load import TrainedPolicy
from dynadepth.errors import ConfigError
from dynadepth.models.loading import load_model, load_tokenizer
from dynadepth.plans import identity_plan
from dynadepth.proving.prove import proved_stack
from dynadepth.shortcuts.maps import Shortcuts
from dynadepth.shortcuts.save_load import load_shortcuts
from dynadepth.training.menu.fit import decision_layers
from dynadepth_search.cli.demo.answers import (
    answer_prompt,
    plan_of_depth,
    show_answers,
    talkative_prompt,
)
from dynadepth_search.cli.demo.config import DemoConfig
from dynadepth_search.cli.demo.late_exits import LateExits
from dynadepth_search.cli.demo.saved import policy_of_run
from dynadepth_search.data.downloads import fetch_model
from dynadepth_search.data.kinds import fetch_kinds, instruction
from dynadepth_search.data.questions import fetch_questions
from dynadepth_search.data.splits import split_examples, write_task
from dynadepth_search.data.tasks import Task, read_task
from dynadepth_search.evaluation.comparison import Front
from dynadepth_search.evaluation.evaluating import evaluate, read_evaluation
from dynadepth_search.evaluation.metrics import show_interval, show_number
from dynadepth_search.exits.judging.evaluating import read_exit_evaluation
from dynadepth_search.files.locking import locked
from dynadepth_search.progress import Progress, silent
from dynadepth_search.report.report import write_report
from dynadepth_search.scoring.objectives import check_answers, check_objective
from dynadepth_search.scoring.score_table import read_scores, score_prompts
from dynadepth_search.scoring.scorer import Scorer
from dynadepth_search.search.per_prompt import search_prompts
from dynadepth_search.search.static import read_static, search_static
from dynadepth_search.shortcuts.building import fit_shortcuts
from dynadepth_search.storage.labels import read_labels
from dynadepth_search.storage.steps import Steps
from dynadepth_search.training.menu_fit import fit_trained_menu, learning_curve
from dynadepth_search.training.router_fit import (
    fit_imitation,
    fit_routers,
    router_plans,
    write_routers,
)

__all__ = ["card_table", "run_demo"]

# Of the prompts that train the menu, those that the dearer comparisons learn from.
_ROUTER_SHARE = 0.4
_LABEL_SHARE = 0.2
# Prompts among which one is looked for that the base model has something to say to.
_LISTENED_TO = 9
_FEWEST_LABELS = 16


def run_demo(config: DemoConfig, *, progress: Progress = silent) -> dict[str, Any]:
    """Run a demo, or go on with one that was interrupted.

    Args:
        config: What is asked for.
        progress: Called with a stage, how much of it is done, and of how much.

    Returns:
        What was measured, as values that JSON knows: `shortcuts`, `search`, `train`, `evaluation`, `seconds` of
        each step, the `report`'s path and the `answers` generated; in a full demo `piqa` and `exits`, evaluations too.

    Raises:
        AssetError: Something cannot be fetched.
        LabelError: The folder is in use, or holds a run that was asked for otherwise.
        TaskError: The task is not what it must be, or too small.
        UnsupportedModelError: The model's family is not supported.
    """
    with locked(config.out):
        return _Demo(config, progress).run()


class _Demo:
    """One run of a demo; everything that a later step needs of an earlier one is on disk."""

    def __init__(self, config: DemoConfig, progress: Progress) -> None:
        self._config, self._progress, self._out = config, progress, config.out
        self._maps: Shortcuts | None = None
        if config.scoring != "raw" and config.task is None:
            raise ConfigError(
                "scoring goes with a task of your own; the demo's prompts have no choices"
            )
        self._steps = Steps(config.out / "steps.json", config.asked())

    def run(self) -> dict[str, Any]:
        config, steps = self._config, self._steps
        source = config.model
        if source is None:
            steps.run("fetch the model", self._fetch_model, write=False)
            # It may have left the cache since.
            source = str(fetch_model(config.cache))
        self._progress("load the model", 0, 1)
        model, tokenizer = load_model(source, dtype="fast"), load_tokenizer(source)
        proved_stack(model)
        self._progress("load the model", 1, 1)
        # The first step that writes: a run folder is bound to what was asked for, so whatever can
        # be refused has been by then.
        steps.run("fetch the prompts", lambda: self._split(model, tokenizer))
        train, heldout = (self._task(name) for name in ("train", "heldout"))
        fitted = steps.run("fit shortcuts", lambda: self._fit_shortcuts(model, tokenizer, train))
        self._maps = load_shortcuts(config.maps or self._out / "shortcuts", model=model)
        steps.run(
            "search plain plans", lambda: self._search(model, tokenizer, train, "plain-plans", None)
        )
        found = steps.run(
            "search plans", lambda: self._search(model, tokenizer, train, "plans", self._maps)
        )
        scored = steps.run("score plans", lambda: self._score(model, tokenizer, train))
        trained = steps.run("train the menu", self._train_menu)
        presets, curve = {}, []
        if config.full:
            steps.run("train routers", lambda: self._train_routers(model, tokenizer, train))
            steps.run("train drllm", lambda: self._train_imitation(model, tokenizer, train))
            presets = {name: policy_of_run(self._out, name, model) for name in ("routers", "drllm")}
            curve = steps.run("learning curve", self._learning_curve)["points"]
        menu = policy_of_run(self._out, "menu", model)
        steps.run(
            "evaluate", lambda: self._evaluate(model, tokenizer, train, heldout, menu, presets)
        )
        evaluation = read_evaluation(self._out / "evaluation")
        evaluation["learning_curve"] = curve
        piqa = None
        if config.full and config.task is None:
            steps.run(
                "evaluate on PIQA", lambda: self._evaluate_piqa(model, tokenizer, train, menu)
            )
            piqa = read_evaluation(self._out / "piqa")
        exits, about_exits = None, {}
        if config.full:
            part = LateExits(config, model, tokenizer, self._maps, self._progress)
            about_exits = steps.run("train exits", lambda: part.train(train))
            if "left out" not in about_exits:
                about_exits |= steps.run("evaluate exits", lambda: part.evaluate(heldout))
            if "left out" not in about_exits:
                exits = read_exit_evaluation(self._out / "exits-evaluation")
        steps.run("write the model card", lambda: self._write_card(menu, evaluation))
        answers = steps.run("generate", lambda: self._generate(model, tokenizer, heldout))
        run = {
            "shortcuts": fitted,
            "search": {**found, **scored},
            "training": {key: value for key, value in trained.items() if key != "trials"},
            "seconds of each step": steps.seconds,
            "answers": show_answers(answers),
            **({"late exits": about_exits} if about_exits else {}),
        }
        page = write_report(self._out, evaluation, run)
        return {
            "asked": config.asked(),
            "shortcuts": fitted,
            "search": {**found, **scored},
            "train": trained,
            "evaluation": evaluation,
            "piqa": piqa,
            "exits": exits,
            "identity_rate": {
                policy["name"]: policy["identity_rate"]
                for policy in evaluation["policies"]
                if policy["kind"] in ("routed", "preset")
            },
            "seconds": {**steps.seconds, "total": round(sum(steps.seconds.values()), 2)},
            "answers": answers,
            "report": str(page),
        }

    def _fetch_model(self) -> dict[str, Any]:
        self._progress("fetch the model", 0, 1)
        folder = fetch_model(self._config.cache)
        self._progress("fetch the model", 1, 1)
        return {"folder": str(folder)}

    def _split(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        config = self._config
        self._progress("fetch the prompts", 0, 1)
        if config.task is None:
            first, second = fetch_kinds(
                config.cache, train=config.prompts, heldout=config.heldout, seed=config.seed
            )
            train, heldout = list(first.task.examples), list(second.task.examples)
        else:
            task = read_task(config.task, scoring=config.scoring)
            check_answers(task, check_objective(config.objective))
            train, heldout = split_examples(
                task.examples, train=config.prompts, heldout=config.heldout, seed=config.seed
            )
        scorer = Scorer(model, tokenizer, config.scoring)
        for example in (*train, *heldout):
            scorer.encode(example)
        write_task(self._out / "train.jsonl", train)
        write_task(self._out / "heldout.jsonl", heldout)
        self._progress("fetch the prompts", 1, 1)
        return {"train": len(train), "heldout": len(heldout)}

    def _task(self, name: str) -> Task:
        given = self._config.task
        title = "three kinds" if given is None else given.stem
        path = self._out / f"{name}.jsonl"
        return read_task(path, scoring=self._config.scoring, name=f"{title}, {name}")

    def _fit_shortcuts(self, model: Any, tokenizer: Any, train: Task) -> dict[str, Any]:
        given, spec = self._config.maps, self._config.shortcuts
        if given is None:
            folder = self._out / "shortcuts"
            found = fit_shortcuts(model, tokenizer, train, folder, spec, progress=self._progress)
        else:
            found = load_shortcuts(given, model=model)
        return {
            "rank": found.rank,
            "layers with a map": len(found.mapped_layers),
            "tokens": found.training.get("tokens"),
        }

    def _search(
        self, model: Any, tokenizer: Any, train: Task, name: str, maps: Shortcuts | None
    ) -> dict[str, Any]:
        found = search_static(
            model,
            tokenizer,
            train,
            self._out / name,
            self._config.static(proved_stack(model).num_layers),
            shortcuts=maps,
            progress=self._progress,
        )
        return {
            "plans on the menu": len(found.menu),
            "plans measured": len(found.pool),
            "evaluations to find them": found.evaluations,
        }

    def _score(self, model: Any, tokenizer: Any, train: Task) -> dict[str, Any]:
        found = read_static(self._out / "plans")
        table = score_prompts(
            model,
            tokenizer,
            train,
            found.menu,
            self._out / "scores",
            layers=decision_layers(found.menu),
            shortcuts=self._maps,
            plan_prompts=found.prompt_hashes or (),
            progress=self._progress,
        )
        return {"prompts scored": len(table), "mean agreement": float(table.agreement.mean())}

    def _train_menu(self) -> dict[str, Any]:
        table = read_scores(self._out / "scores")
        objective, seed = self._config.objective, self._config.seed
        trained = fit_trained_menu(
            table,
            objective=objective,
            shortcuts=self._maps,
            seed=seed,
            progress=self._progress,
        )
        write_routers(self._out / "menu", trained)
        recipe = trained.training["recipe"]
        return {
            "policy": "menu",
            "layers": recipe["layers"],
            "rank": recipe["rank"],
            "ridge": recipe["ridge"],
            "shrinkage s": recipe["shrinkage"],
            "budgets": list(trained.calibration.range),
            "train prompts": trained.training["train_prompts"],
            "trials": trained.training["trials"],
        }

    def _learning_curve(self) -> dict[str, Any]:
        table = read_scores(self._out / "scores")
        objective, seed = self._config.objective, self._config.seed
        return {
            "points": learning_curve(table, objective=objective, seed=seed, progress=self._progress)
        }

    def _train_routers(self, model: Any, tokenizer: Any, train: Task) -> dict[str, Any]:
        found = read_static(self._out / "plans")
        part = self._part(train, _ROUTER_SHARE)
        table = score_prompts(
            model,
            tokenizer,
            part,
            router_plans(found.front),
            self._out / "router-scores",
            layers=(),
            shortcuts=self._maps,
            plan_prompts=found.prompt_hashes or (),
            progress=self._progress,
        )
        routers = fit_routers(
            model,
            tokenizer,
            table,
            found.front,
            objective=self._config.objective,
            shortcuts=self._maps,
            seed=self._config.seed,
            progress=self._progress,
        )
        write_routers(self._out / "routers", routers)
        return {"prompts": len(table), "shrinkage s": routers.shrinkage}

    def _train_imitation(self, model: Any, tokenizer: Any, train: Task) -> dict[str, Any]:
        folder = self._out / "labels"
        part = self._part(train, _LABEL_SHARE)
        summary = search_prompts(
            model,
            tokenizer,
            part,
            folder,
            self._config.search,
            shortcuts=self._maps,
            progress=self._progress,
        )
        labels = read_labels(folder, model=model)
        routers = fit_imitation(
            model,
            tokenizer,
            labels,
            shortcuts=self._maps,
            seed=self._config.seed,
            progress=self._progress,
        )
        write_routers(self._out / "drllm", routers)
        return {
            "labels": len(labels),
            "evaluations per label": labels.evaluations,
            "probe evaluations": summary.probe_evaluations,
            # Of the run that finished the search; unknown if an earlier one had made all visits.
            "sharing factor": summary.sharing_factor if summary.executed_visits else None,
            "identity rate of the labels": labels.identity_rate,
            "mean depth of the labels": float(labels.depths.mean()),
        }

    def _part(self, task: Task, share: float) -> Task:
        count = max(_FEWEST_LABELS, round(share * len(task.examples)))
        return replace(task, examples=task.examples[:count])

    def _evaluate(
        self,
        model: Any,
        tokenizer: Any,
        train: Task,
        heldout: Task,
        routers: TrainedPolicy,
        presets: Mapping[str, TrainedPolicy],
    ) -> dict[str, Any]:
        static, plain = (read_static(self._out / name) for name in ("plans", "plain-plans"))
        content = evaluate(
            model,
            tokenizer,
            heldout=heldout,
            train=train,
            routers=routers,
            front=Front(static.pool, static.pool_values),
            plain_front=Front(plain.pool, plain.pool_values),
            objective=self._config.objective,
            folder=self._out / "evaluation",
            presets=presets,
            seen={f"the plans in {self._out / 'plans'}": static.prompt_hashes},
            config=self._config.evaluation,
            progress=self._progress,
        )
        return {"policies": len(content["policies"])}

    def _evaluate_piqa(
        self, model: Any, tokenizer: Any, train: Task, routers: TrainedPolicy
    ) -> dict[str, Any]:
        """Measure accuracy on questions with right answers, which the menu has not been trained on."""
        static, plain = (read_static(self._out / name) for name in ("plans", "plain-plans"))
        trained_on = {example.prompt for example in train.examples}
        # The instructions among the training prompts are made of the same goals.
        questions = [
            question.raw_example()
            for question in fetch_questions(self._config.cache, "PIQA")
            if instruction(question.text) not in trained_on
        ][: self._config.heldout]
        content = evaluate(
            model,
            tokenizer,
            heldout=Task("PIQA", tuple(questions)),
            train=train,
            routers=routers,
            front=Front(static.pool, static.pool_values),
            plain_front=Front(plain.pool, plain.pool_values),
            objective="preserve",
            folder=self._out / "piqa",
            seen={f"the plans in {self._out / 'plans'}": static.prompt_hashes},
            config=self._config.evaluation,
            progress=self._progress,
        )
        return {"questions": len(questions), "policies": len(content["policies"])}

    def _write_card(self, routers: TrainedPolicy, evaluation: Mapping[str, Any]) -> dict[str, Any]:
        self._progress("write the model card", 0, 1)
        rows = card_table(evaluation)
        write_routers(
            self._out / "menu",
            replace(routers, metrics={"table": rows, "drifts": _drift_texts(evaluation)}),
        )
        self._progress("write the model card", 1, 1)
        return {"rows": len(rows)}

    def _generate(self, model: Any, tokenizer: Any, heldout: Task) -> dict[str, Any]:
        """Continue one held-out prompt as the base model, and at one depth without and with shortcuts."""
        depth = self._config.shown_depth
        plain, mapped = (
            plan_of_depth(read_static(self._out / name), depth) for name in ("plain-plans", "plans")
        )
        ways: dict[str, dict[str, Any]] = {
            "base": {"plan": identity_plan(len(plain))},
            "without shortcuts": {"plan": plain},
            "with shortcuts": {"plan": mapped, "shortcuts": self._maps},
            # As a user would have it: by the folder.
            "menu with shortcuts": {"budget": depth, "routers": str(self._out / "menu")},
        }
        if (self._out / "exits").is_dir():
            # With as many passes as the plans have layers, or as few as they go down to.
            lowest = policy_of_run(self._out, "exits", model).calibration.range[0]
            passes = max(depth, lowest)
            ways["late exits"] = {"budget": passes, "routers": str(self._out / "exits")}
        prompts = [example.prompt for example in heldout.examples[:_LISTENED_TO]]
        prompt = talkative_prompt(model, tokenizer, prompts)
        return answer_prompt(model, tokenizer, prompt, ways, progress=self._progress)


def card_table(evaluation: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the rows of a model card: what the base and the routed model are worth.

    Args:
        evaluation: Content of `evaluation.json`.

    Returns:
        Cells by title.
    """
    metrics = [
        metric
        for metric in dict.fromkeys([evaluation["headline"], "agreement", "accuracy"])
        if metric in evaluation["policies"][0]["metrics"]
    ]
    rows = []
    for policy in evaluation["policies"]:
        if policy["kind"] not in ("base", "routed"):
            continue
        row = {"policy": policy["name"], "depth": f"{policy['depth']:.3f}"}
        for metric in metrics:
            row[metric] = show_number(metric, policy["metrics"][metric]["mean"])
            against = policy["against_static"]
            row[f"{metric} against static [95 %]"] = (
                "" if against is None else show_interval(metric, against[metric])
            )
        rows.append(row)
    return rows


def _drift_texts(evaluation: Mapping[str, Any]) -> list[str]:
    """Return for the model card what is known of the depth of prompts of another kind."""
    return [
        f"budget {row['budget']:g}: mean depth {row['depth']:.3f} on {row['n']} prompts of {row['task']}"
        for row in evaluation["drift"]
    ]
