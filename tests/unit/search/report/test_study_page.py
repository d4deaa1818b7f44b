"""The page of a study: it shows every trial, marks the default, and leaves nothing behind in matplotlib."""

import json
import re
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import pytest
from matplotlib import pyplot as plt

from dynadepth_search.report.study_page import study_html, study_verdict, write_study_report
from dynadepth_search.tuning.applying import study_summary
from dynadepth_search.tuning.space import Outcome
from dynadepth_search.tuning.studies import run_study
from tests.unit.search.tuning.test_studies import Toy, TwoGoals, height


class Compared(Toy):
    """Its studies end with a comparison."""

    low = 0.01

    def findings(self, trials: Any) -> dict[str, Any]:
        gap = {"mean": self.low + 0.02, "low": self.low, "high": self.low + 0.04, "n": 7}
        found = {"default": 0.5, "tuned": 0.6, "difference": gap, "how": "On <other> prompts."}
        return {"comparison": found, "curve": None}


class Front(TwoGoals):
    def findings(self, trials: Any) -> dict[str, Any]:
        rows = [{"depth": x, "default": -x / 9, "static": -x / 8} for x in (1.0, 30.0, 64.0)]
        return {"comparison": None, "curve": rows}


def page_of(folder: Any, tunable: Any, trials: int) -> tuple[str, dict[str, Any]]:
    study, found = run_study(folder, tunable, trials=trials)
    summary = study_summary(tunable, found)
    return study_html(study, summary, {"study": {"seed": 0}}), summary


def pictures(page: str) -> dict[str, ElementTree.Element]:
    found = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    return {
        re.search("<title>(.*?)</title>", each)[1]: ElementTree.fromstring(each) for each in found
    }


def test_a_study_with_one_goal(tmp_path: Any) -> None:
    page, summary = page_of(tmp_path, Compared(), 14)
    drawn = pictures(page)
    assert list(drawn) == ["height of each trial", "how much each setting matters for height"]
    assert "default settings, their trial" in page
    for name in ("x", "size", "way"):
        assert f"<td>{name}</td>" in page
    assert "default (trial 0)" in page
    best = summary["best"]
    assert f"best (trial {best['number']})" in page
    assert best["values"] == [height(best["params"])]
    assert "On &lt;other&gt; prompts." in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert "<script" not in page
    assert not re.search(r'(?:src|href)="(?!#)', page)


def test_importances_are_those_for_good_values(tmp_path: Any) -> None:
    """Where good values turn on `x` and bad ones on `size`, `x` has the longer bar."""

    class Turning(TwoGoals):
        def evaluate(self, params: Any, report: Any) -> Outcome:
            good = params["way"] == "up"
            value = 2 - abs(params["x"] - 0.8) if good else -float(params["size"])
            return Outcome((1.0 + params["size"], value))

    tunable = Turning()
    study, found = run_study(tmp_path, tunable, trials=80, sampler="random")
    page = study_html(study, study_summary(tunable, found), {})
    picture = pictures(page)["how much each setting matters for height"]
    texts = [each.text for each in picture.iter("{http://www.w3.org/2000/svg}text")]
    # Bars are drawn from the least to the most important setting.
    ranked = [text for text in texts if text in ("x", "size", "way")]
    assert sorted(ranked) == ["size", "way", "x"]
    assert ranked.index("x") > ranked.index("size")


def test_a_study_with_two_goals_shows_its_front(tmp_path: Any) -> None:
    page, summary = page_of(tmp_path, Front(), 12)
    assert next(iter(pictures(page))) == "cost and height"
    assert "static mixture" in page
    assert "default settings" in page
    costs = [trial["values"][0] for trial in summary["front"]]
    heights = [trial["values"][1] for trial in summary["front"]]
    assert costs == sorted(costs)
    assert heights == sorted(heights)
    for trial in summary["front"]:
        assert re.search(rf"<td>{trial['number']}(?: \(default\))?</td><td>", page)
    assert "flatters itself" in study_verdict(summary)


def test_trials_that_are_all_alike_have_no_importances(tmp_path: Any) -> None:
    class Flat(Compared):
        def evaluate(self, params: Any, report: Any) -> Outcome:
            return Outcome((1.0,))

    page, _ = page_of(tmp_path, Flat(), 12)
    assert list(pictures(page)) == ["height of each trial"]
    assert "no setting can be said to matter" in page


def test_few_trials_have_no_importances(tmp_path: Any) -> None:
    page, _ = page_of(tmp_path, Compared(), 3)
    assert list(pictures(page)) == ["height of each trial"]
    assert "3 complete trials; importances are shown from 10 on" in page


@pytest.mark.parametrize(
    ("low", "says"),
    [
        (0.01, "tuned settings are better"),
        (-0.02, "no difference that the prompts could show"),
        (-0.2, "tuned settings are worse"),
    ],
)
def test_the_verdict_follows_the_interval(tmp_path: Any, low: float, says: str) -> None:
    tunable = Compared()
    tunable.low = low
    summary = study_summary(tunable, run_study(tmp_path, tunable, trials=2)[1])
    assert study_verdict(summary).startswith(f"2 trials: {says}. Height: default 0.5000, tuned")
    assert "on 7 prompts" in study_verdict(summary)


def test_nothing_is_left_behind_and_the_same_study_gives_the_same_page(tmp_path: Any) -> None:
    before, figures = dict(mpl.rcParams), plt.get_fignums()
    study, trials = run_study(tmp_path, Compared(), trials=12)
    summary = study_summary(Compared(), trials)
    pages = [write_study_report(tmp_path, study, summary, {}) for _ in range(2)]
    assert dict(mpl.rcParams) == before
    assert plt.get_fignums() == figures
    assert pages[0].read_text() == study_html(study, summary, {})
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["study"]["counts"]["complete"] == 12
    assert "seal" in stored


def test_nothing_has_ended_yet(tmp_path: Any) -> None:
    study, trials = run_study(tmp_path, Compared(), trials=1, timeout=1e-9)
    summary = study_summary(Compared(), trials)
    assert "nothing to compare with yet" in study_html(study, summary, {})
