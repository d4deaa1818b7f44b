"""The report: one well-formed page that needs nothing else, whatever the names in it."""

import json
import re
from collections import Counter
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dynadepth_search.evaluation.metrics import METRIC_LABELS
from dynadepth_search.report.plots import pareto_plot
from dynadepth_search.report.report import report_html, report_markdown, write_report
from dynadepth_search.report.tables import (
    AGAINST_STATIC,
    against_base_table,
    as_markdown,
    cost_table,
    evaluation_tables,
    quality_table,
)
from dynadepth_search.report.verdict import verdict
from tests.tiny_evaluation import made_up

_VOID = {"meta", "br", "img", "link", "hr", "input"}


class PageReader(HTMLParser):
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
    page = PageReader(html)
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
    page = PageReader(report_html(made_up(labels=labels, headline=headline)))
    assert [name for name, count in page.ids.items() if count > 1] == []


def test_the_page_is_called_after_the_model_and_the_task(html: str) -> None:
    assert PageReader(html).title == "dynadepth: tiny-llama on piqa"


def test_the_page_shows_which_prompts_got_which_plan(html: str) -> None:
    text = PageReader(html).text
    for words in (
        "Which prompts got which plan at budget 0.70",
        "111101 0.833 75% Is a < b? piqa?",
        "111111 1.000 25%",
        "How many prompts it takes",
    ):
        assert words in text, words
    assert "Is a &lt; b?<br>piqa?" in html


def test_without_a_learning_curve_none_is_drawn() -> None:
    page = PageReader(report_html(made_up(curve=False)))
    assert "How many prompts it takes" not in page.text
    assert page.tags["svg"] == 3


def test_the_page_fetches_nothing(html: str) -> None:
    page = PageReader(html)
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
    page = PageReader(report_html(evaluation, {"answer": bad, bad: {bad: bad}}))
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert page.text.count('alert("x")') >= 7


def test_the_page_says_what_was_found_and_run(html: str, evaluation: dict[str, Any]) -> None:
    text = PageReader(html).text
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
    page = PageReader(report_html(made_up(labels=False)))
    assert "accuracy" not in page.text
    # Agreement, what is done to each layer, and the learning curve; no plot twice.
    assert page.tags["svg"] == 3


def test_nothing_is_said_of_scores_that_were_not_compared() -> None:
    evaluation = made_up(labels=False)
    check = evaluation["runtime_check"]["menu 0.70"]
    check |= {"choices": 0, "mean_difference": 0.0, "max_difference": 0.0, "plans_differing": 1}
    text = PageReader(report_html(evaluation)).text
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


def test_a_table_as_markdown() -> None:
    head, rows = ["policy", "depth"], [["a | b", "1.0"], ["c", ""]]
    assert as_markdown(head, rows).splitlines() == [
        "| policy | depth |",
        "| --- | ---: |",
        "| a \\| b | 1.0 |",
        "| c |  |",
    ]


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("headline", ["agreement", "preserve", "reward"])
def test_the_page_opens_with_verdict_picture_table_and_findings(
    labels: bool, headline: str
) -> None:
    if headline == "reward" and not labels:
        pytest.skip("there is no reward without labels")
    evaluation = made_up(labels=labels, headline=headline)
    html = report_html(evaluation)
    body = html[html.index("<main>") :]
    places = [
        body.index(part)
        for part in (
            "<h1>",
            f'<p class="verdict">{escape(verdict(evaluation))}</p>',
            "<svg ",
            "<table>",
            "<h2>Findings</h2>",
            f"<li>{escape(evaluation['findings'][0])}</li>",
        )
    ]
    assert places == sorted(places)
    # The first picture is of the headline metric, the first table of all metrics.
    assert body[places[2] :].split('aria-label="')[1].startswith(escape(METRIC_LABELS[headline]))
    assert body[places[3] : places[4]].count("<table>") == 1
    assert body[: places[4]].count("<svg ") == 1
    assert "<h2>" not in body[: places[2]]


def test_findings_stand_one_a_line_below_the_policy_that_they_are_about() -> None:
    evaluation = made_up(preset="twin")
    evaluation["findings"] += [
        "twin 0.90 was left out: budget 0.9 is out of range.",
        "On 9 prompts of another kind the depth is 0.8.",
    ]
    html = report_html(evaluation)
    section = html[html.index("<h2>Findings</h2>") :].split("<h2>")[1]
    parts = re.findall(r"<h3>(.*?)</h3><ul>(.*?)</ul>", section)
    assert [title for title, _ in parts] == ["menu", "twin", "Notes"]
    lines = [re.findall(r"<li>(.*?)</li>", items) for _, items in parts]
    assert [[line.split(" (")[0] for line in group] for group in lines] == [
        ["menu 0.90", "menu 0.70"],
        ["twin 0.90", "twin 0.70", "twin 0.90 was left out: budget 0.9 is out of range."],
        ["On 9 prompts of another kind the depth is 0.8."],
    ]
    assert sorted(line for group in lines for line in group) == sorted(
        escape(finding) for finding in evaluation["findings"]
    )


def test_nothing_that_is_known_is_left_out_of_the_page_and_the_markdown() -> None:
    evaluation = made_up(preset="twin")
    page, markdown = PageReader(report_html(evaluation)).text, report_markdown(evaluation)
    assert markdown.startswith(f"{verdict(evaluation)}\n\n| policy | depth | agreement, % |")
    for head, rows in evaluation_tables(evaluation):
        for row in rows:
            assert f"| {' | '.join(row)} |" in markdown
            # An empty cell has no words.
            assert " ".join(" ".join(row).split()) in page, row
        for title in head:
            assert f" {title} |" in markdown
            assert title in page or title == AGAINST_STATIC
    for finding in evaluation["findings"]:
        assert f"\n- {finding}" in markdown
        assert finding in page
    for policy in evaluation["policies"]:
        shown = f"{policy['depth']:.3f} {policy['identity_rate']:.0%} {policy['distinct_plans']}"
        assert shown in page


def test_an_oracle_stands_below_every_policy() -> None:
    evaluation = made_up(preset="twin")
    oracles = ["oracle 0.90 (saw the answers)", "oracle 0.70 (saw the answers)"]
    for _, rows in evaluation_tables(evaluation):
        assert [row[0] for row in rows][-2:] == oracles
        assert not any("oracle" in row[0] for row in rows[:-2])
    html = report_html(evaluation)
    assert html.count('<tr class="oracle first">') == html.count('<tr class="oracle">') == 3
