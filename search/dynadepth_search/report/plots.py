"""The plots of a report as inline SVG."""

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from dynadepth_search.evaluation.metrics import METRIC_LABELS, SHARES, show_budget

__all__ = ["STYLE", "action_map", "fidelity_plot", "inline_svg", "learning_plot", "pareto_plot"]

_INK, _MUTED, _GRID = "#1f2933", "#697586", "#e4e7eb"
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": _INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "text.color": _INK,
    "legend.frameon": False,
    # Text stays text: it can be searched and read aloud, and the file is small.
    "svg.fonttype": "none",
    "svg.hashsalt": "dynadepth",
}
# kind: marker, colour, filled, label
_MARKS: dict[str, tuple[str, str, bool, str]] = {
    "base": ("*", _INK, True, "base model"),
    "routed": ("o", "#1261a0", True, "routers under test"),
    "preset": ("^", "#8e5ea2", True, "other routers"),
    "plain": ("v", "#c2410c", False, "static, without shortcuts"),
    "shortgpt": ("s", "#c26a0a", True, "ShortGPT, static"),
    "random": ("X", "#9aa5b1", True, "random skips"),
    "oracle": ("o", "#2f8f5b", False, "oracle (saw the answers)"),
}
# What is done, its colours, and the share that would have the darkest of them: the usual case stays
# pale.
_ACTIONS = (
    ("skipped", "Oranges", 1.3),
    ("executed once", "Greys", 3.5),
    ("executed twice", "Blues", 1.3),
)


def pareto_plot(evaluation: Mapping[str, Any], metrics: Sequence[str]) -> str:
    """Draw quality against depth.

    The line joins the static plans whose mixtures are the baseline. A bar is the paired 95 %
    interval of the difference from the static mixture, added to that mixture: a bar that does not
    touch the line shows a difference. What lies far below the line is shown at the lower edge with
    its figure.

    Args:
        evaluation: Content of `evaluation.json`.
        metrics: One panel for each.

    Returns:
        An svg element.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.6 if len(metrics) == 1 else 9.6, 4.4), layout="constrained")
        panels = figure.subplots(1, len(metrics), squeeze=False)[0]
        for panel, metric in zip(panels, metrics, strict=True):
            _panel(panel, evaluation, metric)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
        names = " and ".join(METRIC_LABELS[metric] for metric in metrics)
        return inline_svg(figure, f"{names} against mean depth", f"pareto-{'-'.join(metrics)}")


def _panel(panel: Any, evaluation: Mapping[str, Any], metric: str) -> None:
    policies = evaluation["policies"]
    front = evaluation["front"]
    # Shares are shown in points of a hundred.
    unit = 100.0 if metric in SHARES else 1.0
    line_x = [point["depth"] for point in front]
    line_y = [unit * point["metrics"][metric] for point in front]
    panel.plot(line_x, line_y, "-", color=_MUTED, lw=1.6, zorder=2, label="static plans, mixed")
    panel.plot(line_x, line_y, ".", color=_MUTED, ms=5, zorder=2)
    shown = [p for p in policies if p["kind"] != "static"]
    floor, ceiling = _limits(shown, line_y, metric, unit)
    labelled: set[str] = set()
    for policy in shown:
        kind, depth = policy["kind"], policy["depth"]
        value = unit * policy["metrics"][metric]["mean"]
        marker, colour, filled, label = _MARKS[kind]
        if kind == "routed" and evaluation["routers"]["kind"] == "menu":
            label = "menu"
        style = {
            "marker": marker,
            "ms": 11 if kind == "base" else 7.5,
            "mfc": colour if filled else "white",
            "mec": colour if not filled else "white",
            "mew": 1.6 if not filled else 0.8,
            "ls": "none",
            "zorder": 4 if kind in ("routed", "base") else 3,
            "label": None if kind in labelled else label,
        }
        labelled.add(kind)
        if value < floor:
            panel.plot(depth, floor, **style, clip_on=False)
            panel.annotate(
                f"{value:.3g}",
                (depth, floor),
                (0, 8),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=_MUTED,
            )
            continue
        against = policy["against_static"]
        if kind in ("routed", "preset") and against is not None:
            # The mixture is the policy's mean less the mean difference.
            low, high = (
                value + unit * (against[metric][end] - against[metric]["mean"])
                for end in ("low", "high")
            )
            panel.plot([depth, depth], [low, high], color=colour, lw=1.4, alpha=0.75, zorder=3)
            for end in (low, high):
                panel.plot(depth, end, marker="_", color=colour, ms=7, mew=1.4, zorder=3)
        panel.plot(depth, value, **style)
    panel.set_ylim(floor, ceiling)
    panel.set_xlabel("mean depth (1 = every layer once)")
    panel.set_title(METRIC_LABELS[metric])
    panel.grid(color=_GRID, lw=0.8)
    panel.set_axisbelow(True)


def _limits(
    policies: Sequence[Mapping[str, Any]], line: Sequence[float], metric: str, unit: float
) -> tuple[float, float]:
    """Return a range that shows the line and what is near it, and leaves out what is far below."""
    near = list(line)
    for policy in policies:
        mean = policy["metrics"][metric]["mean"]
        if policy["kind"] in ("base", "routed", "oracle"):
            near.append(unit * mean)
        if policy["kind"] == "routed" and policy["against_static"] is not None:
            against = policy["against_static"][metric]
            near += [unit * (mean + against[end] - against["mean"]) for end in ("low", "high")]
    low, high = min(near), max(near)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 0.05
    # Others may stretch the range by half of itself, not more.
    others = [unit * policy["metrics"][metric]["mean"] for policy in policies]
    reachable = [value for value in others if value >= low - 0.5 * (high - low)]
    return min([low, *reachable]) - margin, high + margin


def fidelity_plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw what late exits keep against their passes and, where it was measured, their time, beside their opponents.

    Args:
        rows: The rows of an evaluation of late exits.

    Returns:
        An svg element.
    """
    timed = [row for row in rows if row["time"] is not None]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.6 if timed else 7.6, 4.0), layout="constrained")
        panels = figure.subplots(1, 2 if timed else 1, sharey=True, squeeze=False)[0]
        _fidelity_panel(panels[0], [(row["passes"]["mean"], row) for row in rows], "passes")
        panels[0].set_xlabel("mean passes of a new token (1 = every layer once)")
        panels[0].set_title("new tokens that are the base model's own choice, %")
        if timed:
            _fidelity_panel(panels[1], [(row["time"]["median"], row) for row in timed], "time")
            panels[1].set_xlabel("time of a new token (1 = the base model's)")
        figure.legend(
            *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9
        )
        return inline_svg(figure, "fidelity against passes and time", "fidelity")


def _fidelity_panel(panel: Any, rows: Sequence[tuple[float, Mapping[str, Any]]], cost: str) -> None:
    """Draw what is kept at the cost of each row; opponents have the cost of the same name."""
    marker, colour, *_ = _MARKS["routed"]
    for x, row in rows:
        ends = [100 * row["kept"]["low"], 100 * row["kept"]["high"]]
        panel.plot([x, x], ends, color=colour, lw=1.4, alpha=0.75)
        if row["dial"] == "fidelity":
            panel.plot(x, 100 * row["value"], "_", color=_MUTED, ms=14, mew=1.4)
    kept = [100 * row["kept"]["mean"] for _, row in rows]
    panel.plot([x for x, _ in rows], kept, marker, color=colour, ms=7.5, label="late exits")
    panel.plot([], [], "_", color=_MUTED, ms=14, mew=1.4, label="promised")
    others: dict[str, list[tuple[float, float]]] = {}
    for _, row in rows:
        for name, found in {"static mixture": row["static"], **row["against"]}.items():
            if found is not None and found[cost] is not None:
                others.setdefault(name, []).append((found[cost], 100 * found["kept"]))
    for index, (name, points) in enumerate(others.items()):
        style = (".-", "x--", "+:", "1-.")[index % 4]
        panel.plot(
            *zip(*sorted([(1.0, 100.0), *points]), strict=True), style, color=_MUTED, label=name
        )
    panel.plot(1.0, 100.0, "*", color=_INK, ms=11, label="base model")
    panel.grid(color=_GRID, lw=0.8)
    panel.set_axisbelow(True)


def action_map(actions: Sequence[Mapping[str, Any]]) -> str:
    """Draw what is done to each layer at each budget, as shares of the prompts.

    Args:
        actions: For each budget, its `shares` of skip, execute and repeat of each layer.

    Returns:
        An svg element.
    """
    names = [show_budget(action["budget"]) for action in actions]
    shares = np.array([action["shares"] for action in actions])  # (budgets, layers, 3)
    num_layers = shares.shape[1]
    with mpl.rc_context(STYLE):
        height = 1.0 + 0.2 * num_layers
        figure = Figure(figsize=(1.4 + 2.5 * len(_ACTIONS), height), layout="constrained")
        panels = figure.subplots(1, len(_ACTIONS), sharey=True)
        for action, (panel, (title, colours, darkest)) in enumerate(
            zip(panels, _ACTIONS, strict=True)
        ):
            _heat(panel, shares[:, :, action].T, title, colours, darkest)
            panel.set_xticks(range(len(names)), names)
            panel.set_xlabel("budget")
        # Layer 0, which reads the prompt, is on top.
        panels[0].set_ylim(num_layers - 0.5, -0.5)
        panels[0].set_yticks(range(num_layers))
        panels[0].set_ylabel("decoder layer")
        return inline_svg(
            figure, "share of prompts that skip, execute and repeat each layer", "actions"
        )


def learning_plot(points: Sequence[Mapping[str, Any]]) -> str:
    """Draw what a policy gains by the number of prompts that trained it.

    Args:
        points: `prompts`, `gain` and `standard_error` of each number.

    Returns:
        An svg element.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        panel = figure.subplots()
        panel.axhline(0.0, color="#9aa5b1", linewidth=1)
        panel.errorbar(
            [point["prompts"] for point in points],
            [100 * point["gain"] for point in points],
            yerr=[100 * point["standard_error"] for point in points],
            marker="o",
            capsize=3,
        )
        panel.set_xscale("log", base=2)
        panel.set_xticks(
            [point["prompts"] for point in points], [str(point["prompts"]) for point in points]
        )
        panel.minorticks_off()
        panel.set_xlabel("training prompts")
        panel.set_ylabel("gain over the static mixture, points")
        return inline_svg(
            figure, "cross-validated gain by the number of training prompts", "learning"
        )


def _heat(panel: Any, shares: Any, title: str, colours: str, darkest: float) -> None:
    # Cells are centred on whole numbers.
    edges = [np.arange(size + 1) - 0.5 for size in shares.shape]
    panel.pcolormesh(
        edges[1],
        edges[0],
        shares,
        cmap=colours,
        vmin=0,
        vmax=darkest,
        edgecolors="white",
        linewidth=0.8,
    )
    for (layer, column), share in np.ndenumerate(shares):
        if share > 0:
            text = f"{100 * share:.0f}" if share >= 0.01 else "<1"
            colour = "white" if share > 0.6 * darkest else _INK
            panel.text(column, layer, text, ha="center", va="center", fontsize=7.5, color=colour)
    panel.set_title(f"{title}, %")
    panel.tick_params(length=0)
    for spine in panel.spines.values():
        spine.set_visible(False)


def inline_svg(figure: Figure, title: str, prefix: str) -> str:
    """Return a figure as an element that can stand in a page beside others.

    Args:
        figure: The figure.
        title: What it shows, for those who cannot see it.
        prefix: Of every id in it; each figure of a page has its own.
    """
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    # Every id once in the page.
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = text.replace("url(#", f"url(#{prefix}-")
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    opening = re.compile(r"<svg [^>]*>")
    first = opening.search(text)
    if first is None:
        return text
    box = re.search(r'viewBox="[^"]*"', first.group())
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'{box.group() if box else ""} role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>"
    )
    return text[: first.start()] + head + text[first.end() :].strip()
