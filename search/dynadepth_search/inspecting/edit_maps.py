"""Pictures of edits by layer, as inline SVG: how often each layer is edited, and what each plan edits."""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from dynadepth.plans import REPEAT, SKIP, Action
from dynadepth_search.report.plots import STYLE, inline_svg

__all__ = ["edit_shares_map", "plan_map_picture"]

_COLOURS = {SKIP: "#c26a0a", REPEAT: "#1261a0"}
_PALE = {SKIP: "#f3d9b8", REPEAT: "#b9d3ea"}
_WORDS = {SKIP: "skip", REPEAT: "repeat"}
_ROW, _GRID = "#eef1f4", "#e4e7eb"


def edit_shares_map(shares: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """Draw the share of plans that skip and that repeat each layer; two sets of plans side by side, the first one pale.

    Args:
        shares: By the name of a set of plans, for each layer its shares of SKIP, EXECUTE and REPEAT; one set or two.

    Returns:
        An svg element.
    """
    sets = [(name, np.array(rows)) for name, rows in shares.items()]
    num_layers = len(sets[0][1])
    layers = np.arange(num_layers)
    width = 0.8 / len(sets)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(6.0, 1.6 + 0.26 * num_layers), 4.6), layout="constrained")
        panels = figure.subplots(2, 1, sharex=True)
        for panel, action in zip(panels, (SKIP, REPEAT), strict=True):
            for number, (name, rows) in enumerate(sets):
                last = number == len(sets) - 1
                panel.bar(
                    layers + (number - (len(sets) - 1) / 2) * width,
                    100 * rows[:, int(action)],
                    width,
                    color=(_COLOURS if last else _PALE)[action],
                    label=name,
                )
            panel.set_title(f"{_WORDS[action]} the layer, %")
            panel.set_ylim(0, max(5.0, 130 * max(rows[:, int(action)].max() for _, rows in sets)))
            panel.grid(axis="y", color=_GRID, lw=0.8)
            panel.set_axisbelow(True)
            if len(sets) > 1:
                panel.legend(loc="upper left", fontsize=8, ncols=2)
        panels[-1].set_xlabel("decoder layer")
        _layer_ticks(panels[-1], num_layers)
        return inline_svg(figure, "share of plans that skip and repeat each layer", "edits")


def plan_map_picture(plans: Sequence[str], names: Sequence[str], title: str) -> str:
    """Draw what each plan does to each layer: layers from left to right, one row for each plan.

    Args:
        plans: The plans, one digit for each layer.
        names: What stands before each row: figures, no text of a user.
        title: What the picture shows.

    Returns:
        An svg element.
    """
    num_layers = len(plans[0])
    with mpl.rc_context(STYLE):
        size = (max(6.0, 2.0 + 0.26 * num_layers), 1.3 + 0.24 * len(plans))
        figure = Figure(figsize=size, layout="constrained")
        panel = figure.subplots()
        for row, plan in enumerate(plans):
            panel.add_patch(
                Rectangle((-0.5, row - 0.4), num_layers, 0.8, facecolor=_ROW, linewidth=0)
            )
            for layer, digit in enumerate(plan):
                colour = _COLOURS.get(Action(int(digit)))
                if colour is not None:
                    panel.add_patch(
                        Rectangle(
                            (layer - 0.45, row - 0.4), 0.9, 0.8, facecolor=colour, linewidth=0
                        )
                    )
        panel.set_xlim(-0.5, num_layers - 0.5)
        panel.set_ylim(len(plans) - 0.5, -0.5)
        panel.set_yticks(range(len(plans)), list(names), fontsize=8)
        panel.set_xlabel("decoder layer")
        _layer_ticks(panel, num_layers)
        panel.tick_params(length=0)
        for spine in panel.spines.values():
            spine.set_visible(False)
        handles = [Patch(facecolor=_COLOURS[each], label=_WORDS[each]) for each in (SKIP, REPEAT)]
        figure.legend(handles=handles, loc="outside upper right", ncols=2, fontsize=8)
        return inline_svg(figure, title, "plans")


def _layer_ticks(panel: object, num_layers: int) -> None:
    step = max(1, -(-num_layers // 40))
    panel.set_xticks(range(0, num_layers, step))  # type: ignore[attr-defined]
