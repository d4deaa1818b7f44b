"""The report: one well-formed page that needs nothing else, whatever the names in it."""

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynadepth.plans import identity_plan
from dynadepth_search.evaluation.comparison import Comparison, Front, PlannedPolicy
from dynadepth_search.evaluation.metrics import action_shares, findings, policy_metrics
from dynadepth_search.evaluation.outcome_cache import Table
from dynadepth_search.report.plots import pareto_plot
from dynadepth_search.report.report import report_html, write_report
from dynadepth_search.report.tables import (
    against_base_table,
    as_markdown,
    as_text,
    cost_table,
    quality_table,
)

LAYERS, PROMPTS = 6, 12
_VOID = {"meta", "br", "img", "link", "hr", "input"}


def made_up(
    *, labels: bool = True, name: str = "piqa", headline: str = "agreement", curve: bool = True
) -> dict[str, Any]:
    """An evaluation whose outcomes are made up."""
    rng = np.random.default_rng(0)
    plans = [identity_plan(LAYERS)]
    for layer in (3, 4, 1):
        plans.append(plans[-1].copy())
        plans[-1][layer] = 0
    planned = []
    for budget, share in ((0.9, 0.6), (0.7, 1.8)):
        routed = np.ones((PROMPTS, LAYERS), dtype=np.uint8)
        routed[:, 3] = rng.random(PROMPTS) > share
        routed[:, 4] = rng.random(PROMPTS) > share - 0.9
        planned.append(
            PlannedPolicy(name=f"menu {budget:.2f}", kind="routed", budget=budget, plans=routed)
        )
    comparison = Comparison(
        policies=planned,
        front=Front(np.array(plans), np.array([0.0, -0.1, -0.3, -0.6])),
        influence=rng.random(LAYERS),
        num_prompts=PROMPTS,
        random_draws=2,
        seed=0,
    )
    stack = np.stack(list(comparison.sets.values()))
    quality = -((stack == 0) * rng.random((PROMPTS, LAYERS))).sum(axis=-1)
    values = {"preserve": quality, "agreement": (quality > -0.5).astype(float)}
    if labels:
        values |= {"reward": quality - 0.7, "accuracy": (quality > -0.3).astype(float)}
    table = Table(rows={each: row for row, each in enumerate(comparison.sets)}, values=values)
    compared = list(comparison.compared(table, headline))
    time = {"median": 0.9, "low": 0.8, "high": 1.0, "rounds": 3, "prompts": 4, "milliseconds": 5.0}
    policies = [
        policy_metrics(
            item.run,
            compared[0].run,
            item.static,
            seed=0,
            time=time if item.run.kind == "routed" else None,
        )
        for item in compared
    ]
    content = {
        "schema_version": 2,
        "model": "tiny-llama",
        "task": {
            "name": name,
            "kind": "choices",
            "scoring": "raw",
            "sha256": "ab" * 32,
            "heldout_prompts": PROMPTS,
            "train_prompts": 9,
        },
        "headline": headline,
        "num_layers": LAYERS,
        "dtype": "bfloat16",
        "config": {"seed": 0},
        "routers": {
            "kind": "menu",
            "range": [0.5, 1.0],
            "layers": [3],
            "ridge": 100.0,
            "weights": {"agreement": 1.0},
            "shrinkage": 0.25,
        },
        "policies": policies,
        "findings": findings(policies, headline),
        "drift": [],
        "actions": [
            {"budget": policy.budget, "shares": action_shares(policy.plans)} for policy in planned
        ],
        "plan_map": [
            {
                "budget": 0.7,
                "different_plans": 3,
                "rows": [
                    {
                        "plan": "111101",
                        "depth": 5 / 6,
                        "share": 0.75,
                        "examples": ["Is a < b?", f"{name}?"],
                    },
                    {"plan": "111111", "depth": 1.0, "share": 0.25, "examples": []},
                ],
            }
        ],
        "front": comparison.front_metrics(table),
        "runtime_check": {
            "menu 0.70": {
                "prompts": 2,
                "choices": 4,
                "mean_difference": 0.005,
                "max_difference": 0.01,
                "plans_differing": 0,
            }
        },
        "base_prefill_milliseconds": 5.0,
        "versions": {"dynadepth": "0.1.0"},
        "seconds": 1.5,
    }
    if curve:
        content["learning_curve"] = [
            {"prompts": count, "gain": 0.01 * count / 40, "standard_error": 0.02}
            for count in (40, 80, 160)
        ]
    return content


class _Page(HTMLParser):
    """Reads a page and refuses tags that do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.title = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids.update(value for name, value in attrs if name == "id" and value)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self._open[-1:] == ["title"] and "svg" not in self._open:
            self.title = data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def evaluation() -> dict[str, Any]:
    return made_up()


@pytest.fixture(scope="module")
def html(evaluation: dict[str, Any]) -> str:
    return report_html(evaluation, {"seconds": {"search": 12.345}, "answer": "two\nlines"})


def test_the_page_is_well_formed_and_every_id_is_unique(html: str) -> None:
    page = _Page(html)
    assert html.startswith("<!DOCTYPE html>")
    assert page.tags["svg"] == 4
    assert page.tags["title"] == 5  # the page's and one for each plot
    assert [name for name, count in page.ids.items() if count > 1] == []
    targets = {v[1:] for name, v in page.attributes if name.endswith("href")}
    targets |= set(re.findall(r"url\(#([^)]+)\)", html))
    assert targets
    assert targets <= set(page.ids)


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("headline", ["agreement", "preserve", "reward"])
def test_every_id_is_unique_whatever_was_measured(labels: bool, headline: str) -> None:
    if headline == "reward" and not labels:
        pytest.skip("there is no reward without labels")
    page = _Page(report_html(made_up(labels=labels, headline=headline)))
    assert [name for name, count in page.ids.items() if count > 1] == []


def test_the_page_is_called_after_the_model_and_the_task(html: str) -> None:
    assert _Page(html).title == "dynadepth: tiny-llama on piqa"


def test_the_page_shows_which_prompts_got_which_plan(html: str) -> None:
    text = _Page(html).text
    for words in (
        "Which prompts got which plan at budget 0.70",
        "111101 0.833 75% Is a < b? piqa?",
        "111111 1.000 25%",
        "How many prompts it takes",
    ):
        assert words in text, words
    assert "Is a &lt; b?<br>piqa?" in html


def test_without_a_learning_curve_none_is_drawn() -> None:
    page = _Page(report_html(made_up(curve=False)))
    assert "How many prompts it takes" not in page.text
    assert page.tags["svg"] == 3


def test_the_page_fetches_nothing(html: str) -> None:
    page = _Page(html)
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(page.tags)
    for name, value in page.attributes:
        assert name not in ("src", "srcset", "action")
        assert not name.startswith("on")
        if name.endswith("href"):
            assert value.startswith("#")
    outside = set(re.findall(r"https?://[^\s\"'<>]+", html))
    assert outside == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "@import" not in html


def test_names_cannot_break_out_of_the_page() -> None:
    bad = '<script>alert("x")</script> & <b>'
    evaluation = made_up(name=bad)
    evaluation["findings"].append(bad)
    evaluation["model"] = bad
    page = _Page(report_html(evaluation, {"answer": bad, bad: {bad: bad}}))
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert page.text.count('alert("x")') >= 7


def test_the_page_says_what_was_found_and_run(html: str, evaluation: dict[str, Any]) -> None:
    text = _Page(html).text
    for finding in evaluation["findings"]:
        assert " ".join(finding.split()) in text
    for words in (
        "oracle 0.70 (saw the answers)",
        "oracle (saw the answers)",
        "static plans, mixed",
        "12 held-out prompts, 9 training prompts, 6 decoder layers",
        "kind menu layers 3 ridge 100 shrinkage 0.25 budgets 0.5 to 1",
        "search 12.35",
        "two lines",
        "differ from the sweep's by 0.0050 nats on average and 0.0100 at most (bfloat16)",
        "decoder layer",
        "skipped, %",
    ):
        assert words in text, words


def test_a_task_without_labels_has_no_accuracy() -> None:
    page = _Page(report_html(made_up(labels=False)))
    assert "accuracy" not in page.text
    # Agreement, what is done to each layer, and the learning curve; no plot twice.
    assert page.tags["svg"] == 3


def test_nothing_is_said_of_scores_that_were_not_compared() -> None:
    evaluation = made_up(labels=False)
    check = evaluation["runtime_check"]["menu 0.70"]
    check |= {"choices": 0, "mean_difference": 0.0, "max_difference": 0.0, "plans_differing": 1}
    text = _Page(report_html(evaluation)).text
    assert "nats" not in text
    assert "scored 0 answers" not in text
    assert "1 of 2 plans changed in another batch" in text


def test_page_and_json_are_written_together(tmp_path: Path, evaluation: dict[str, Any]) -> None:
    page = write_report(tmp_path, evaluation, {"seconds": {"search": 1.0}})
    assert page == tmp_path / "report.html"
    assert page.read_text() == report_html(evaluation, {"seconds": {"search": 1.0}})
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["evaluation"] == json.loads(json.dumps(evaluation))
    assert content["run"] == {"seconds": {"search": 1.0}}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_the_same_figures_give_the_same_page(evaluation: dict[str, Any]) -> None:
    assert report_html(evaluation) == report_html(made_up())


def test_what_is_far_below_is_shown_at_the_edge_with_its_figure(evaluation: dict[str, Any]) -> None:
    far = json.loads(json.dumps(evaluation))
    for policy in far["policies"]:
        if policy["name"] == "random 0.70":
            policy["metrics"]["preserve"]["mean"] = -77.7
    assert "-77.7" in pareto_plot(far, ["preserve"])
    assert "-77.7" not in pareto_plot(evaluation, ["preserve"])


def test_tables_have_a_cell_for_every_title(evaluation: dict[str, Any]) -> None:
    for head, rows in (quality_table(evaluation), cost_table(evaluation)):
        assert len(rows) == len(evaluation["policies"])
        assert {len(row) for row in rows} == {len(head)}
    head, rows = against_base_table(evaluation)
    assert head[:2] == ["against base [95 %]", "agreement, %"]
    assert len(rows) == len(evaluation["policies"]) - 1
    assert all(all(row) and len(row) == len(head) for row in rows)
    head, rows = quality_table(evaluation)
    assert head[:4] == ["policy", "depth", "agreement, %", "against static [95 %]"]
    assert [row[3] == "" for row in rows][:4] == [True, False, True, False]


def test_a_table_as_text_and_as_markdown() -> None:
    head, rows = ["policy", "depth"], [["a | b", "1.0"], ["c", ""]]
    assert as_markdown(head, rows).splitlines() == [
        "| policy | depth |",
        "| --- | ---: |",
        "| a \\| b | 1.0 |",
        "| c |  |",
    ]
    assert as_text(head, rows).splitlines() == [
        "policy  depth",
        "------  -----",
        "a | b     1.0",
        "c",
    ]
