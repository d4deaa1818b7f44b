"""Late exits in a full demo: trained on its prompts, and compared with what plans and the menu write."""

from dataclasses import replace
from typing import Any

from dynadepth.checkpoints.trained_exits import TrainedExits
from dynadepth.errors import TaskError, UnsupportedModelError
from dynadepth.shortcuts.maps import Shortcuts
from dynadepth_search.cli.demo.config import DemoConfig
from dynadepth_search.cli.demo.saved import policy_of_run
from dynadepth_search.data.tasks import Task
from dynadepth_search.exits.building import clear_work, fit_exits
from dynadepth_search.exits.judging.evaluating import Promise, evaluate_exits
from dynadepth_search.inspecting.inspecting import write_inspection
from dynadepth_search.inspecting.late_exits.judged import see_exit_evaluation
from dynadepth_search.progress import Progress
from dynadepth_search.report.report import REPORT_NAME
from dynadepth_search.search.static import read_static
from dynadepth_search.training.router_fit import write_routers

__all__ = ["LateExits"]

# Held-out prompts from which they write, and the most tokens of an answer.
_WRITTEN, _SAID = 48, 48


class LateExits:
    """The part of a full demo that is about late exits.

    Args:
        config: The demo's settings.
        model: The unwrapped base model; it is unwrapped again afterwards.
        tokenizer: Its tokenizer.
        maps: What plans leave in place of layers that they skip; None: nothing.
        progress: Called with a stage, how much of it is done, and of how much.
    """

    def __init__(
        self,
        config: DemoConfig,
        model: Any,
        tokenizer: Any,
        maps: Shortcuts | None,
        progress: Progress,
    ) -> None:
        self._config, self._out = config, config.out
        self._model, self._tokenizer, self._maps = model, tokenizer, maps
        self._progress = progress

    def train(self, train: Task) -> dict[str, Any]:
        """Train exits on the training prompts.

        Returns:
            `exit layers`, or why the model has none as `left out`; values that JSON knows.
        """
        work = self._out / "exits.work"
        try:
            trained = fit_exits(
                self._model,
                self._tokenizer,
                train,
                work,
                self._config.exits,
                progress=self._progress,
            )
        except UnsupportedModelError as error:
            # All else of a demo is known by now.
            return {"left out": str(error)}
        write_routers(self._out / "exits", trained)
        clear_work(work)
        return {"exit layers": [head.layer_idx for head in trained.heads]}

    def evaluate(self, heldout: Task) -> dict[str, Any]:
        """Let exits, static plans and the menu write with as many passes each, and write the page of it.

        Returns:
            The number of `answers`, or as `left out` why there is nothing to judge; values that JSON knows.
        """
        static = read_static(self._out / "plans")
        exits, menu = (policy_of_run(self._out, name, self._model) for name in ("exits", "menu"))
        assert isinstance(exits, TrainedExits)
        lowest = exits.calibration.range[0]
        passes = [each for each in self._config.budgets if each >= lowest]
        folder = self._out / "exits-evaluation"
        try:
            content = evaluate_exits(
                self._model,
                self._tokenizer,
                heldout=replace(heldout, examples=heldout.examples[:_WRITTEN]),
                exits=exits,
                promises=[Promise("budget", each) for each in passes or [lowest]],
                folder=folder,
                pool=(static.pool, static.pool_values),
                shortcuts=self._maps,
                against={"menu": menu},
                new_tokens=_SAID,
                progress=self._progress,
            )
        except TaskError as error:
            # Every answer is one token.
            return {"left out": str(error)}
        write_inspection(see_exit_evaluation(content), folder / REPORT_NAME)
        return {"answers": content["answers"]}
