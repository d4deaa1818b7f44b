"""Inspections of what is made up: which kind a folder is of, texts of plans, oracles, and pages that nothing breaks."""

import io
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from dynadepth.checkpoints.save_load import save_policy
from dynadepth.errors import ConfigError
from dynadepth.policies.calibration import Calibration
from dynadepth_search.evaluation.notes import one_line
from dynadepth_search.inspecting.edit_maps import edit_shares_map, plan_map_picture
from dynadepth_search.inspecting.folders import kind_of
from dynadepth_search.inspecting.inspecting import (
    inspect_folder,
    inspection_html,
    print_inspection,
    write_inspection,
)
from dynadepth_search.inspecting.inspection import Inspection, Table, edits_text, share_text
from dynadepth_search.inspecting.routers_seen import router_figures
from dynadepth_search.inspecting.scores_seen import score_figures
from tests.tiny_menus import PLANS, random_menu
from tests.tiny_routers import random_routers
from tests.tiny_scores import MENU, made_up_scores

MADE_UP = Inspection(
    kind="labels",
    title="<b>labels</b> & more",
    said=["<script>verdict</script>", "a <note>"],
    figures={},
    parts=[
        Table(title="<i>", head=["<u>"], rows=[["<script>cell</script>"]], note="<s>", texts=(0,))
    ],
    facts={"<task>": {"<name>": "<script>fact</script>"}},
)


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        ("1111", "identity"),
        ("0111", "skip 0"),
        ("1001", "skip 1-2"),
        ("010012", "skip 0 2-3, repeat 5"),
        ("2211", "repeat 0-1"),
    ],
)
def test_a_plan_is_written_as_what_it_changes(plan, text):
    assert edits_text(plan) == text


def test_a_share_that_is_not_nothing_is_not_shown_as_nothing():
    assert [share_text(share) for share in (0.0, 0.001, 0.01, 0.456, 1.0)] == [
        "",
        "<1%",
        "1%",
        "46%",
        "100%",
    ]


@given(st.text(max_size=3000))
def test_a_prompt_in_one_line_is_short_and_holds_nothing_that_a_terminal_obeys(text):
    line = one_line(text)
    assert line.isprintable()
    assert len(line) <= 90


def test_a_prompt_that_fits_is_kept():
    assert one_line(" Why \x1b[31m is\nit? ") == "Why [31m is it?"
    assert one_line("x" * 91) == "x" * 87 + "..."
    assert one_line("x" * 90) == "x" * 90


@pytest.mark.parametrize(
    ("files", "kind", "inner"),
    [
        (["manifest.json"], "labels", ""),
        (["scores.json"], "scores", ""),
        (["router_config.json", "shortcut_config.json"], "routers", ""),
        (["config.json", "routers/router_config.json"], "routers", "routers"),
        (["evaluation.json"], "evaluation", ""),
        (["report.json", "evaluation/evaluation.json"], "evaluation", "evaluation"),
    ],
)
def test_the_kind_of_a_folder_is_known_by_its_files(tmp_path, files, kind, inner):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert kind_of(tmp_path) == (kind, tmp_path / inner)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            [],
            "looked for manifest.json (labels), scores.json (scores), router_config.json (routers)",
        ),
        (["menu.json"], "It holds static plans: `dynadepth search static` prints what it found"),
        (["shortcut_config.json"], "It holds shortcuts"),
        (["study.json"], "It holds a study: `dynadepth tune` writes its report.html"),
        (["config.json"], "It holds a model without routers"),
        (["a/scores.json", "b/manifest.json"], "Folders in it do: inspect a, b"),
        (
            ["scores.json", "manifest.json"],
            "holds manifest.json and scores.json, so it is not clear",
        ),
    ],
)
def test_a_folder_of_no_kind_says_what_was_looked_for(tmp_path, files, words):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ConfigError) as raised:
        kind_of(tmp_path)
    assert words in str(raised.value)


def test_what_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is a file; give the folder that `dynadepth search"):
        kind_of(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        kind_of(tmp_path / "none")


def test_nothing_breaks_out_of_the_page():
    page = inspection_html(MADE_UP)
    for tag in ("<script", "<b>", "<i>", "<u>", "<s>", "<note>", "<task>", "<name>"):
        assert tag not in page
    assert page.count("&lt;script&gt;") == 3


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_page_whose_writing_is_killed_is_the_old_one(tmp_path, monkeypatch, step):
    page = write_inspection(MADE_UP, tmp_path / "page.html")
    page.write_text("old")

    def killed(*_args):
        raise KeyboardInterrupt

    owner = {"fsync": "dynadepth.files.os.fsync", "replace": "pathlib.Path.replace"}[step]
    monkeypatch.setattr(owner, killed)
    with pytest.raises(KeyboardInterrupt):
        write_inspection(MADE_UP, page)
    assert page.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("width", [60, 80, 100])
@pytest.mark.parametrize("prompt", ["why so long? " * 7, "为什么这么长" * 14, "why?"])
def test_a_long_prompt_is_cut_and_figures_are_not(width, prompt):
    rows = [["+0.1234", "skip 1 3 5 7 9 11 13 15 17 19", "1.000", prompt]] * 7
    table = Table(title="Hardest", head=["gain", "edit", "depth", "prompt"], rows=rows, texts=(3,))
    console = Console(width=width, file=io.StringIO(), markup=False)
    print_inspection(replace(MADE_UP, parts=[replace(table, shown=5)]), console)
    lines = console.file.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= width
    shown = [line for line in lines if "+0.1234" in line]
    assert len(shown) == 5
    assert all("1.000" in line and prompt[:3] in line for line in shown)
    assert lines[-1] == "on the page: 2 more"


def test_of_many_sentences_the_first_are_printed():
    console = Console(width=80, file=io.StringIO(), markup=False)
    print_inspection(replace(MADE_UP, said=[f"sentence {n}" for n in range(9)], parts=[]), console)
    lines = console.file.getvalue().splitlines()
    assert lines[1:] == [f"- sentence {n}" for n in range(6)] + ["- on the page: 3 more"]


@pytest.mark.parametrize("graded", [True, False])
def test_the_figures_of_scores_are_those_counted_by_hand(graded):
    table = made_up_scores(30, graded=graded)
    found = score_figures(table)
    taken = []
    for row in range(len(table)):
        kept = [k for k in range(len(MENU)) if table.agreement[row, k] == 1]
        taken.append(min(kept, key=lambda k: (MENU[k].sum(), table.divergence[row, k], k)))
    assert [row["oracle_prompts"] for row in found["by_plan"]] == [
        taken.count(k) for k in range(len(MENU))
    ]
    assert found["oracle"]["depth"] == pytest.approx(np.mean([MENU[k].sum() / 6 for k in taken]))
    assert found["oracle"]["identity_rate"] == pytest.approx(taken.count(0) / 30)
    assert found["oracle"]["ranked"] is False
    for k, row in enumerate(found["by_plan"]):
        assert row["depth"] == pytest.approx(MENU[k].sum() / 6)
        for metric in ("agreement", "divergence"):
            mean = sum(getattr(table, metric)[:, k]) / 30
            assert row[metric]["mean"] == pytest.approx(mean)
            assert row[metric]["low"] <= mean <= row[metric]["high"]
        assert ("correct" in row) == graded
    means = [sum(table.divergence[row, 1:]) / 5 for row in range(30)]
    assert [row["divergence"] for row in found["hardest"]] == pytest.approx(
        sorted(means, reverse=True)[:20]
    )
    hardest = table.examples[int(np.argmax(means))]
    assert (found["hardest"][0]["prompt"], found["hardest"][0]["prompt_id"]) == (
        hardest.prompt,
        hardest.prompt_id,
    )


def test_of_many_plans_those_of_the_oracle_are_shown():
    plans = np.array([[1 - (number >> bit & 1) for bit in range(6)] for number in range(63)])
    table = made_up_scores(40, plans=plans.astype(np.uint8))
    found = score_figures(table)
    assert len(found["by_plan"]) == 40
    assert found["plans"] == 63
    assert sum(row["oracle_prompts"] for row in found["by_plan"]) == 40


def test_a_table_of_the_identity_alone_has_no_hardest_prompt():
    found = score_figures(made_up_scores(5, plans=MENU[:1]))
    assert (found["hardest"], found["oracle"]["depth"]) == ([], 1.0)


def test_a_menu_says_where_it_decides_and_what_its_plans_edit(tmp_path):
    save_policy(tmp_path / "menu", random_menu(layers=(2, 3), windows=(1, 0), base_model="a/b"))
    found = inspect_folder(tmp_path / "menu")
    assert found.said[0].startswith(
        "A menu of 6 plans, chosen from the states that enter layer 2 and layer 3; budgets from 0.5 to 1 are"
    )
    assert found.figures["decision_layers"] == [
        {"layer": 2, "num_windows": 1},
        {"layer": 3, "num_windows": 0},
    ]
    assert [row["plan"] for row in found.figures["plans"]] == [
        "".join(map(str, plan)) for plan in PLANS.tolist()
    ]
    tables = {part.title: part for part in found.parts}
    assert ["decides at", "layer 2, last token and 1 windows; layer 3, last token"] in tables[
        "Policy"
    ].rows
    assert ["skip 2 4-5", "0.500"] in tables["Plans of the menu"].rows
    assert tables["Calibrated budgets"].rows[0] == ["0.5000", "3"]


def test_routers_show_the_plans_of_their_static_part():
    routers = random_routers(protect=(1,))
    found = router_figures(routers)
    bias = routers.bias.numpy()
    expected = {}
    # The budgets of the table that are accepted: 1.1 is not.
    for depth, penalty in ((0.9, 0.25), (0.7, 1.0), (0.5, 3.0)):
        plan = [int(np.argmax(row - penalty * np.arange(3))) for row in bias]
        plan[1] = 1
        expected.setdefault("".join(map(str, plan)), []).append(depth)
    assert {row["plan"]: row["budgets"] for row in found["plans"]} == {
        plan: [min(depths), max(depths)] for plan, depths in expected.items()
    }
    assert found["decision_layers"] == [{"layer": n, "num_windows": 8} for n in range(4)]


def test_a_long_calibration_is_shown_in_part(tmp_path):
    depths = tuple((0.5 + 0.005 * np.arange(101)).round(4).tolist())
    table = Calibration(
        lambdas=tuple(np.linspace(3, -1, 101).tolist()), depths=depths, lowest=0.5, highest=1.0
    )
    save_policy(tmp_path / "menu", random_menu(calibration=table))
    found = inspect_folder(tmp_path / "menu")
    (shown,) = [part for part in found.parts if part.title == "Calibrated budgets"]
    assert [row[0] for row in (shown.rows[0], shown.rows[-1])] == ["0.5000", "1.0000"]
    assert len(shown.rows) == 12
    assert shown.note.startswith("12 of 101 entries")
    assert len(found.figures["calibration"]) == 101


def test_a_map_draws_each_edit_once():
    plans = ["1111", "0121", "2200"]
    svg = plan_map_picture(plans, ["a", "b", "c"], "what plans do")
    colours = {"#c26a0a": "0", "#1261a0": "2"}
    for colour, digit in colours.items():
        # One more is that of the legend.
        assert svg.count(f"fill: {colour}") == 1 + "".join(plans).count(digit)


def test_a_map_of_shares_has_a_bar_for_each_layer_and_set():
    shares = {name: [[0.5, 0.25, 0.25]] * 7 for name in ("raw", "confirmed")}
    svg = edit_shares_map(shares)
    for colour in ("#f3d9b8", "#c26a0a", "#b9d3ea", "#1261a0"):
        assert svg.count(f"fill: {colour}") == 7 + 1
