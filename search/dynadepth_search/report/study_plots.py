"""The plots of a study as inline SVG: Optuna's own, in the style of the reports, with the default's trial marked."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import optuna
from matplotlib import pyplot as plt
from optuna.exceptions import ExperimentalWarning
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.visualization import matplotlib as drawn

from dynadepth_search.report.plots import STYLE, inline_svg

__all__ = ["FEWEST", "front_plot", "history_plot", "importance_plot"]

# Complete trials from which on importances say something.
FEWEST = 10
_INK, _MUTED, _ACCENT = "#1f2933", "#697586", "#c2410c"


def history_plot(study: optuna.Study, summary: Mapping[str, Any]) -> str:
    """Draw the quality of each trial by its number, and the best so far.

    Args:
        study: The study; with two goals, the second one is shown.
        summary: What `dynadepth_search.tuning.applying.study_summary` returned.

    Returns:
        An svg element.
    """
    name = summary["goals"][-1]
    two = len(summary["goals"]) == 2
    with _style():
        axes = drawn.plot_optimization_history(
            study, target=_quality if two else None, target_name=name
        )
        _mark(axes, summary, lambda trial: (trial["number"], trial["values"][-1]))
        return _finished(axes, f"{name} of each trial", "history")


def importance_plot(study: optuna.Study, summary: Mapping[str, Any]) -> str:
    """Draw how much each setting decides whether a trial is among the good ones (PED-ANOVA).

    Args:
        study: The study, with `FEWEST` complete trials or more; with two goals, the second one is meant.
        summary: What `dynadepth_search.tuning.applying.study_summary` returned.

    Returns:
        An svg element; empty if trials came to so much the same that none are better than the rest.
    """
    name = summary["goals"][-1]
    with _style():
        try:
            axes = drawn.plot_param_importances(
                study,
                evaluator=PedAnovaImportanceEvaluator(),
                target=_shortfall if len(summary["goals"]) == 2 else None,
                target_name=name,
            )
        except UserWarning:
            return ""
        return _finished(axes, f"how much each setting matters for {name}", "importances")


def front_plot(study: optuna.Study, summary: Mapping[str, Any]) -> str:
    """Draw all trials of a study with two goals and its Pareto front, beside the default settings at every depth.

    Args:
        study: The study.
        summary: What `dynadepth_search.tuning.applying.study_summary` returned.

    Returns:
        An svg element.
    """
    with _style():
        axes = drawn.plot_pareto_front(study, target_names=list(summary["goals"]))
        curve = summary["curve"] or []
        depths = [row["depth"] for row in curve]
        for key, line, label in (
            ("default", "-", "default settings"),
            ("static", "--", "static mixture"),
        ):
            if curve:
                axes.plot(
                    depths, [row[key] for row in curve], line, color=_MUTED, lw=1.4, label=label
                )
        _mark(axes, summary, lambda trial: tuple(trial["values"]))
        return _finished(axes, " and ".join(summary["goals"]), "front")


def _quality(trial: Any) -> float:
    return float(trial.values[-1])


def _shortfall(trial: Any) -> float:
    # PED-ANOVA looks for low values of a target; without one, it goes by the direction of the study.
    return -_quality(trial)


def _mark(axes: Any, summary: Mapping[str, Any], place: Any) -> None:
    default = summary["default"]
    if default is not None:
        x, y = place(default)
        axes.plot(
            x,
            y,
            "*",
            ms=13,
            mfc=_ACCENT,
            mec="white",
            ls="none",
            zorder=5,
            label="default settings, their trial",
        )


@contextmanager
def _style() -> Iterator[None]:
    """Keep Optuna's style sheet and its figures from the rest of the process."""
    before = plt.get_fignums()
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        # These plots are experimental in Optuna; what they draw is checked by tests.
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.filterwarnings("ignore", "PedAnovaImportanceEvaluator computes", UserWarning)
        warnings.filterwarnings("error", "Target and region quantiles", UserWarning)
        try:
            yield
        finally:
            for number in set(plt.get_fignums()) - set(before):
                plt.close(number)


def _finished(axes: Any, title: str, prefix: str) -> str:
    figure = axes.get_figure()
    figure.set_size_inches(7.6, 4.2)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK)
    axes.set_facecolor("white")
    axes.grid(color="#e4e7eb", lw=0.8)
    axes.set_axisbelow(True)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9, frameon=False)
    figure.set_layout_engine("tight")
    return inline_svg(figure, title, prefix)
