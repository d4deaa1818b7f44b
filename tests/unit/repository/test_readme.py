"""The README is short and tells the truth: its code runs, its two commands are what CI runs."""

import re

import pytest

from tests.pages import PAGES, README, ROOT, blocks, shell_lines

SETUP, TESTS = re.findall(r"(?m)^python3 -m venv .*$", README)


def test_it_is_short():
    assert len(README.splitlines()) <= 200


def test_the_first_example_is_short():
    lines = [line for line in blocks("python")[0].splitlines() if line.strip()]
    assert len(lines) <= 8
    assert sum("dynadepth" in line for line in lines) == 1


def test_it_has_one_table_of_results_and_no_more_than_six_rows():
    rows = re.findall(r"(?m)^\|.*\[[+-]\d.*\|$", README)
    assert 0 < len(rows) <= 6
    tables = re.findall(r"(?m)(?:^\|.*\n)+", README)
    (results,) = [table for table in tables if rows[0] in table]
    assert all(row in results for row in rows)


def test_both_commands_are_one_line_and_stand_in_a_block_of_their_own():
    alone = [block.strip() for block in blocks("bash")]
    for command in (SETUP, TESTS):
        assert command in alone
        assert command.startswith("python3 -m venv .venv && ")
    assert SETUP.endswith(".venv/bin/dynadepth demo")
    assert "cargo test --workspace --locked" in TESTS
    assert ".venv/bin/pytest" in TESTS


def test_ci_runs_the_second_command_as_it_stands():
    script = (ROOT / ".ci/run").read_text()
    pattern = re.search(r"grep -E '([^']+)' README\.md", script)
    assert pattern is not None
    taken = [line for line in README.splitlines() if re.search(pattern[1], line)]
    assert taken == [TESTS]
    assert '-c "$readme_tests"' in script


@pytest.mark.parametrize("page", ["README.md", "search/README.md"])
def test_its_pipeline_is_the_one_of_the_docs(page):
    """The docs' pipeline runs in a test; every line of the short ones is a line of it, in the same order."""
    docs = shell_lines(PAGES["docs/pipeline.md"])
    lines = [line for line in shell_lines(PAGES[page]) if line.startswith("dynadepth ")]
    verbs = [line.split()[1] for line in lines]
    assert verbs[:5] == ["shortcuts", "search", "score", "train", "eval"]
    assert [line for line in docs if line in lines] == lines


def test_its_pipeline_ends_with_an_answer():
    lines = [line.split()[1] for line in shell_lines(README) if line.startswith("dynadepth ")]
    assert lines == [
        "shortcuts",
        "search",
        "score",
        "train",
        "eval",
        "report",
        "export",
        "generate",
    ]


def test_it_leads_to_every_page_of_the_docs():
    linked = set(re.findall(r"\]\((docs/[^)#]+)", README))
    assert linked == {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
