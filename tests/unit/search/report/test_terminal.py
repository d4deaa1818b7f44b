"""What a terminal shows: the verdict and a table of at most eight rows in 100 columns."""

import io
import re
from typing import Any

import pytest
from rich.console import Console

from dynadepth_search.report.findings import general_notes
from dynadepth_search.report.tables import outside_summary, summary_table
from dynadepth_search.report.terminal import WIDTH, print_summary, result_console
from dynadepth_search.report.verdict import verdict
from tests.tiny_evaluation import made_up

BUDGETS = tuple(round(0.99 - 0.03 * step, 2) for step in range(12))
LONG = "routers-of-a-very-long-experiment-name-" * 6 + "[bold]x[/bold]"


@pytest.fixture(autouse=True)
def no_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


def _shown(evaluation: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> list[str]:
    print_summary(evaluation, result_console())
    return capsys.readouterr().out.splitlines()


def _table_rows(lines: list[str]) -> list[str]:
    """Return the lines of the table below its rule."""
    (rule,) = (number for number, line in enumerate(lines) if line.startswith("───"))
    return lines[rule + 1 : lines.index("", rule)]


def _stretched(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Give every policy a long name and figures as wide as they become."""
    wide = {"mean": -12.3456, "low": -123.4567, "high": -12.3456, "n": 100_000}
    share = {"mean": -1.0, "low": -1.0, "high": 1.0, "n": 100_000}
    for policy in evaluation["policies"]:
        if policy["kind"] in ("routed", "preset"):
            policy["name"] = f"{LONG} {policy['budget']:.2f}"
        for against in (policy["metrics"], policy["against_static"] or {}):
            for metric in against:
                against[metric] = share if metric in ("agreement", "accuracy") else wide
    return evaluation


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("headline", ["agreement", "preserve", "reward"])
@pytest.mark.parametrize("budgets", [(0.9,), (0.9, 0.7), (0.95, 0.9, 0.85, 0.8), BUDGETS])
@pytest.mark.parametrize("preset", [None, "twin"])
@pytest.mark.parametrize("stretched", [False, True])
def test_eight_rows_and_100_columns_are_enough(
    labels: bool,
    headline: str,
    budgets: tuple[float, ...],
    preset: str | None,
    stretched: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if headline == "reward" and not labels:
        pytest.skip("there is no reward without labels")
    evaluation = made_up(labels=labels, headline=headline, budgets=budgets, preset=preset)
    lines = _shown(_stretched(evaluation) if stretched else evaluation, capsys)
    assert max(map(len, lines)) <= WIDTH == 100
    rows = _table_rows(lines)
    assert len(rows) == len(summary_table(evaluation)[1]) <= 8
    assert rows[0].startswith("base ")
    assert not any("oracle" in row or "..." in row[-60:] for row in rows)
    assert not re.search(r"\x1b", "".join(lines))
    assert len(lines) <= 40


def test_the_summary_is_read_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = made_up()
    evaluation["findings"].append("The training ended inside its [warm-up].")
    lines = _shown(evaluation, capsys)
    text = " ".join(" ".join(lines).split())
    assert text.startswith(
        f"{verdict(evaluation)} - The training ended inside its [warm-up]. tiny-llama on piqa"
    )
    assert text.endswith(outside_summary(evaluation))
    assert [row.split()[0] for row in _table_rows(lines)] == ["base", "menu", "menu"]


def test_the_identity_rate_and_the_interval_are_in_the_table() -> None:
    evaluation = made_up(headline="reward")
    head, rows = summary_table(evaluation)
    assert head == [
        "policy",
        "depth",
        "graded\nreward",
        "gain over static\n[95 %]",
        "agreement,\n%",
        "identity\nplan",
        "time /\nbase's",
    ]
    (policy,) = (each for each in evaluation["policies"] if each["name"] == "menu 0.90")
    (row,) = (each for each in rows if each[0] == "menu 0.90")
    gain = policy["against_static"]["reward"]
    assert row == [
        "menu 0.90",
        f"{policy['depth']:.3f}",
        f"{policy['metrics']['reward']['mean']:.4f}",
        f"{gain['mean']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}]",
        f"{100 * policy['metrics']['agreement']['mean']:.1f}",
        f"{policy['identity_rate']:.0%}",
        "0.90",
    ]
    assert rows[0][3:] == ["", "100.0", "100%", "1.00"]
    for each in evaluation["policies"]:
        each["time"] = None
    assert summary_table(evaluation)[0] == head[:-1]


def _names(evaluation: dict[str, Any]) -> list[str]:
    return [row[0] for row in summary_table(evaluation)[1]]


def test_others_are_shown_if_all_of_them_have_room() -> None:
    few = made_up(budgets=(0.9, 0.8, 0.7), preset="twin")
    tested = ["menu 0.90", "menu 0.80", "menu 0.70"]
    assert _names(few) == ["base", *tested, "twin 0.90", "twin 0.80", "twin 0.70"]
    assert outside_summary(few) == (
        "The report also has all metrics, the static plans, the oracle and every finding."
    )
    many = made_up(budgets=(0.9, 0.8, 0.7, 0.6), preset="twin")
    assert _names(many) == ["base", *tested, "menu 0.60"]
    assert outside_summary(many).startswith("The report also has twin, all metrics, ")


def test_of_too_many_budgets_those_around_the_verdicts_are_shown() -> None:
    evaluation = made_up(budgets=BUDGETS)
    assert _names(evaluation) == ["base", *(f"menu {budget:.2f}" for budget in BUDGETS[:7])]
    assert outside_summary(evaluation).startswith("The report also has 5 more budgets, all metrics")


def test_many_long_names_are_counted() -> None:
    evaluation = made_up(budgets=(0.9, 0.8, 0.7, 0.6))
    (twin,) = (p for p in evaluation["policies"] if p["name"] == "menu 0.90")
    others = [{**twin, "kind": "preset", "name": f"{LONG}{i} 0.90"} for i in range(40)]
    evaluation["policies"] += others
    assert _names(evaluation) == ["base", *(f"menu {b:.2f}" for b in (0.9, 0.8, 0.7, 0.6))]
    assert outside_summary(evaluation).startswith("The report also has 40 other policies, all")
    evaluation["policies"] = made_up(budgets=BUDGETS)["policies"] + others[:2]
    words = outside_summary(evaluation)
    assert words.count("routers-of") == 2
    assert len(words) < 200


def test_a_long_name_keeps_its_budget() -> None:
    evaluation = made_up(preset=LONG)
    name = _names(evaluation)[3]
    assert len(name) == 20
    assert name.startswith("routers-of")
    assert name.endswith("0.90")


def test_notes_are_those_about_no_row_and_not_many(capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = made_up(preset="twin")
    assert general_notes(evaluation) == []
    notes = [f"twin {budget} was left out: too low." for budget in (0.5, 0.4, 0.3, 0.2, 0.1)]
    evaluation["findings"] += notes
    assert general_notes(evaluation) == notes
    text = "\n".join(_shown(evaluation, capsys))
    assert "- twin 0.3 was left out: too low.\n- 2 more notes are in the report.\n" in text
    assert "twin 0.2" not in text


def test_a_terminal_may_be_narrower_but_is_never_used_wider(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    for columns, width in ((60, 60), (240, 100)):
        monkeypatch.setenv("COLUMNS", str(columns))
        screen = Screen()
        monkeypatch.setattr("sys.stdout", screen)
        console = result_console()
        assert console.is_terminal
        assert console.width == width
        print_summary(made_up(), console)
        plain = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue())
        assert max(map(len, plain.splitlines())) <= width
    # Elsewhere the width of the terminal has no say.
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert result_console().width == 100


def test_a_stream_that_knows_ascii_alone_gets_a_table_too() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    print_summary(made_up(), Console(file=stream, width=WIDTH, markup=False, highlight=False))
    stream.flush()
    text = raw.getvalue().decode("ascii")
    assert "menu 0.90" in text
    assert max(map(len, text.splitlines())) <= WIDTH
