"""The README tells the truth: its code runs, its commands exist, its lists are complete."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import typer

from dynadepth.cli import main as cli
from dynadepth.models.families import SUPPORTED_FAMILIES

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "search/README.md", "benches/README.md")
}
SETUP, TESTS = re.findall(r"(?m)^python3 -m venv .*$", README)


def blocks(language, text=README):
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", text)


def section(title, text=README):
    found = re.search(rf"(?ms)^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text)
    assert found is not None, f"there is no section {title!r}"
    return found[1]


def command_lines():
    """Return every command line `dynadepth ...` of the pages: in blocks of shell, and between back-ticks."""
    lines = []
    for name, text in PAGES.items():
        shell = "\n".join(blocks("bash", text)).replace("\\\n", " ")
        found = [line for line in shell.splitlines() if line.startswith("dynadepth ")]
        outside = re.sub(r"(?ms)^```.*?^```$", "", text)
        found += re.findall(r"`(dynadepth [^`]+)`", outside)
        lines += [pytest.param(line, id=f"{name}: {line}") for line in found]
    return lines


@pytest.fixture
def with_model(tiny_routed, tmp_path, monkeypatch):
    """Stand in an empty folder that has the README's `my-model` with its routers."""
    shutil.copytree(tiny_routed, tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("with_model")
def test_the_python_blocks_run_one_after_the_other(capsys):
    names = {}
    code = blocks("python")
    assert len(code) > 1
    for block in code:
        exec(compile(block, "README.md", "exec"), names)
    assert capsys.readouterr().out.strip()


def test_the_first_example_is_short():
    lines = [line for line in blocks("python")[0].splitlines() if line.strip()]
    assert len(lines) <= 8
    assert sum("dynadepth" in line for line in lines) == 1


@pytest.mark.parametrize("line", command_lines())
def test_a_command_and_its_options_exist(line):
    words = shlex.split(line, comments=True)[1:]
    command = typer.main.get_command(cli.command_line())
    if words and not words[0].startswith("-"):
        for verb in words.pop(0).split("|"):
            assert verb in command.commands, f"there is no verb {verb!r}"
        command = command.commands[verb]
    known = {option for parameter in command.params for option in parameter.opts}
    given = {word.partition("=")[0] for word in words if word.startswith("-")}
    assert given <= known | {"--help"}


def test_every_verb_is_in_the_readme():
    verbs = set(typer.main.get_command(cli.command_line()).commands)
    named = {
        word for line in re.findall(r"dynadepth ([a-z|]+)", README) for word in line.split("|")
    }
    assert verbs <= named


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


def test_the_table_of_families_is_the_allow_list():
    rows = re.findall(r"(?m)^\| `(\w+)`", section("Supported models"))
    assert sorted(rows) == sorted(SUPPORTED_FAMILIES)


@pytest.mark.parametrize(
    ("page", "packages"),
    [
        ("README.md", ["python/dynadepth", "rust/core/src", "rust/py/src"]),
        ("search/README.md", ["dynadepth_search"]),
    ],
)
def test_a_tree_names_every_file_of_the_sources_and_nothing_else(page, packages):
    root = (ROOT / page).parent
    named, folders = set(), []
    (tree,) = blocks("text", section("The tree", PAGES[page]))
    for line in tree.splitlines():
        entry = re.fullmatch(r"( *)(\S+) {2,}\S.*", line)
        assert entry is not None, f"no name and comment in {line!r}"
        folders = [*folders[: len(entry[1]) // 2], entry[2].rstrip("/")]
        path = "/".join(folders)
        assert (root / path).exists(), f"the tree of {page} names {path}, which is not there"
        named.add(path)
    for package in packages:
        files = {
            f"{package}/{path.name}"
            for path in (root / package).iterdir()
            if path.suffix in {".py", ".rs"} and path.name != "__init__.py"
        }
        assert files <= named, f"not in the tree of {page}: {sorted(files - named)}"


def test_links_lead_to_files():
    for name, text in PAGES.items():
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert ((ROOT / name).parent / target).exists(), f"{name} links to {target}"


@pytest.mark.usefixtures("with_model")
def test_the_pipeline_runs_as_it_stands(capsys):
    """Every line of the pipeline's block, on a tiny model and a tiny task of the README's names."""
    rng = np.random.default_rng(0)
    for name, count in (("train.jsonl", 60), ("heldout.jsonl", 12)):
        prompts = ["".join(rng.choice(list("abcdefgh"), 6)) + "\nAnswer" for _ in range(count)]
        examples = [
            {"prompt": f"{name} {index} {prompt}", "choices": [" yes", " no"], "answer": index % 2}
            for index, prompt in enumerate(prompts)
        ]
        Path(name).write_text("".join(f"{json.dumps(example)}\n" for example in examples))
    (block, *_) = blocks("bash", section("The pipeline"))
    steps = [shlex.split(line) for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    assert [step[:2] for step in steps] == [
        ["dynadepth", verb] for verb in ("search", "score", "train", "eval", "export", "generate")
    ]
    for step in steps:
        code = cli.main(step[1:])
        captured = capsys.readouterr()
        assert code == 0, f"{shlex.join(step)}\n{captured.err}"


@pytest.mark.parametrize("page", PAGES)
def test_no_figure_is_left_to_be_filled_in(page):
    assert not re.search(r"(?m)^(RESULTS|SWEEP|TODO|TBD)\b", PAGES[page])
