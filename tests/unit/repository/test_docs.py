"""All pages tell the truth: code runs, commands exist, links lead somewhere, lists are complete."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import typer
from importlinter.api import read_configuration
from lm_eval._cli.harness import HarnessCLI
from transformers import AutoModelForCausalLM

from dynadepth.checkpoints.save_load import save_policy
from dynadepth.cli import main as cli
from dynadepth.shortcuts.save_load import save_shortcuts
from tests.pages import PAGES, README, ROOT, anchors, blocks, section, shell_lines, without_blocks
from tests.tiny_exits import PROMISES, random_exits
from tests.tiny_shortcuts import random_shortcuts
from tests.unit.proving.test_prove import DOZEN

PACKAGES = {"dynadepth": "python/dynadepth", "dynadepth_search": "search/dynadepth_search"}
# Of these pages the code runs; what else has code must be on the list.
PYTHON_PAGES = ("README.md", "docs/python.md", "docs/serving.md")


@pytest.fixture
def with_model(tiny_routed, tmp_path, monkeypatch):
    """Stand in an empty folder that has the pages' `my-model` with its routers, and shortcuts and exits of it."""
    shutil.copytree(tiny_routed, tmp_path / "my-model")
    model = AutoModelForCausalLM.from_pretrained(tiny_routed)
    save_shortcuts(tmp_path / "shortcuts", random_shortcuts(model))
    save_policy(tmp_path / "exits", random_exits(model, answers=PROMISES))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def with_tasks(with_model):
    """Stand there with a tiny task of the pages' names, before anything has been fitted."""
    shutil.rmtree("shortcuts")
    shutil.rmtree("exits")
    rng = np.random.default_rng(0)
    for name, count in (("train.jsonl", 60), ("heldout.jsonl", 12)):
        prompts = ["".join(rng.choice(list("abcdefgh"), 6)) + "\nAnswer" for _ in range(count)]
        examples = [
            {"prompt": f"{name} {index} {prompt}", "choices": [" yes", " no"], "answer": index % 2}
            for index, prompt in enumerate(prompts)
        ]
        Path(name).write_text("".join(f"{json.dumps(example)}\n" for example in examples))
    problems = [
        {"prompt": f"{n} and {n} are", "completion": f" {2 * n}.", "solution": f"{2 * n}"}
        for n in range(10)
    ]
    Path("problems.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in problems))


@pytest.mark.usefixtures("with_model")
@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_the_python_blocks_of_a_page_run_one_after_the_other(page, capsys):
    names = {"__name__": page}
    code = blocks("python", PAGES[page])
    assert len(code) > 1
    for block in code:
        exec(compile(block, page, "exec"), names)
    assert capsys.readouterr().out.strip()


def test_every_page_with_python_runs_in_a_test():
    assert {page for page, text in PAGES.items() if blocks("python", text)} == set(PYTHON_PAGES)


def command_lines():
    """Return every command line `dynadepth ...` of the pages: in blocks of shell, and between back-ticks."""
    lines = []
    for name, text in PAGES.items():
        found = [line for line in shell_lines(text) if line.startswith("dynadepth ")]
        found += re.findall(r"`(dynadepth [^`]+)`", without_blocks(text))
        lines += [pytest.param(line, id=f"{name}: {line}") for line in found]
    return lines


def harness_options():
    """Return the options of lm-evaluation-harness' own verb `run`."""
    run = HarnessCLI()._subparsers.choices["run"]
    return {option for action in run._actions for option in action.option_strings}


@pytest.mark.parametrize("line", command_lines())
def test_a_command_and_its_options_exist(line):
    words = shlex.split(line, comments=True)[1:]
    command = typer.main.get_command(cli.command_line())
    while words and not words[0].startswith("-") and hasattr(command, "commands"):
        for verb in words.pop(0).split("|"):
            assert verb in command.commands, f"there is no verb {verb!r}"
        command = command.commands[verb]
    known = {option for parameter in command.params for option in parameter.opts}
    if command.name == "lm-eval":
        known = harness_options()
    given = {word.partition("=")[0] for word in words if word.startswith("-")}
    assert given <= known | {"--help"}


def verbs_of(command, before=""):
    """Yield the verbs of a command line, those of groups as two words."""
    for name, inner in command.commands.items():
        if hasattr(inner, "commands"):
            yield from verbs_of(inner, f"{before}{name} ")
        else:
            yield f"{before}{name}"


def test_every_verb_is_named():
    text = "\n".join(text for name, text in PAGES.items() if name != "CHANGELOG.md")
    named = {
        verb
        for first, second in re.findall(r"dynadepth ([a-z|-]+)(?: ([a-z]+))?", text)
        for word in first.split("|")
        for verb in (word, f"{word} {second}")
    }
    assert set(verbs_of(typer.main.get_command(cli.command_line()))) <= named


def test_options_named_by_themselves_exist():
    """An option between back-ticks belongs to some verb, to a bench, to a script of CI or to the harness."""
    known = {"--help"} | harness_options()

    def walk(command):
        known.update(option for parameter in command.params for option in parameter.opts)
        for inner in getattr(command, "commands", {}).values():
            walk(inner)

    walk(typer.main.get_command(cli.command_line()))
    for script in (*(ROOT / "benches/python").glob("*.py"), ROOT / ".ci/rooms.py"):
        known |= set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', script.read_text()))
    for name, text in PAGES.items():
        # A change log names what is gone.
        if name != "CHANGELOG.md":
            found = set(re.findall(r"`(--[a-z_-]+)[^`]*`", without_blocks(text)))
            assert found <= known, f"{name} names {sorted(found - known)}"


def test_commands_of_benches_and_their_options_exist():
    found = [
        (name, *match)
        for name, text in PAGES.items()
        for match in re.findall(r"(benches/python/\w+\.py)([^`\n|]*)", text)
    ]
    assert len(found) > 3
    for name, script, rest in found:
        source = (ROOT / script).read_text()
        for option in re.findall(r"--[a-z-]+", rest):
            assert f'"{option}"' in source, f"{name}: {script} has no {option}"


def test_the_survey_of_families_is_whole():
    """The table is the one that the bench writes: no family is wrong, and the README says how many are exact."""
    page = PAGES["docs/families.md"]
    table = page.partition("<!-- survey: begin -->")[2].partition("<!-- survey: end -->")[0]
    exact = re.findall(r"(?m)^\| `([\w-]+)` \| (?:yes|no) \| \d+ \| \d+e-\d+ \| [\d.]+ \|$", table)
    total, counted = re.search(r": (\d+) families, (\d+) exact", table).groups()
    refused = sum(int(number) for number in re.findall(r"(?m)^\| [^`|]+ \((\d+)\) \|", table))
    left = table.partition("Not built")[2].count("`") // 2
    assert len(exact) == int(counted)
    assert len(exact) + refused + left == int(total)
    assert "wrong" not in table
    assert set(DOZEN) <= set(exact)
    assert f"{len(exact)} families of" in " ".join(README.split())


def rooms_of(package):
    """Return the rooms of a package: every folder with sources, by its path in the package."""
    root = ROOT / PACKAGES[package]
    return sorted(
        str(path.parent.relative_to(root))
        for path in root.rglob("__init__.py")
        if path.parent != root
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_the_table_of_rooms_names_every_room_and_no_other(package):
    text = section(f"The rooms of {package}", PAGES["docs/architecture.md"])
    named = re.findall(r"(?m)^\| `([a-z_/]+)/` \|", text)
    assert sorted(named) == rooms_of(package)
    assert all(re.search(rf"(?m)^\| `{room}/` \| \S.{{20,}} \|$", text) for room in named)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_table_of_rooms_names_the_modules_that_are_in_no_room(package):
    text = section(f"The rooms of {package}", PAGES["docs/architecture.md"])
    files = {path.name for path in (ROOT / PACKAGES[package]).glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"`(\w+\.py)`", text)) == files


def test_the_picture_of_the_readme_has_every_room_on_its_floor():
    """A line of the picture is a floor: the rooms that the import contract puts side by side, or a part of them."""
    (picture,) = blocks("text", section("The house"))
    contracts = read_configuration(str(ROOT / "pyproject.toml"))["contracts_options"]
    for package in PACKAGES:
        (layers,) = [
            [[room.strip() for room in layer.split("|")] for layer in contract["layers"]]
            for contract in contracts
            if contract["type"] == "layers" and contract["containers"] == [package]
        ]
        part = re.search(rf"(?ms)^{package}/ .*?\n(.*?)(?=^\S|\Z)", picture)
        assert part is not None
        floors = [
            re.match(r" +(\S+(?: · \S+)*) {2,}\S", line)[1].split(" · ")
            for line in part[1].splitlines()
            if line.strip()
        ]
        rooms = rooms_of(package)
        expected = [[room for room in rooms if room.split("/")[0] in layer] for layer in layers]
        assert [sorted(floor) for floor in floors] == [floor for floor in expected if floor]


def test_links_lead_to_files_and_headings():
    for name, text in PAGES.items():
        for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
            target, _, heading = link.partition("#")
            path = ((ROOT / name).parent / target).resolve() if target else ROOT / name
            assert path.exists(), f"{name} links to {target}"
            if heading:
                found = anchors(path.read_text(encoding="utf-8"))
                assert heading in found, f"{name} links to {link}; headings are {sorted(found)}"


def test_paths_between_back_ticks_exist():
    """A file or folder of this repository that a page names is there."""
    for name, text in PAGES.items():
        if name == "CHANGELOG.md":
            continue
        for path in re.findall(
            r"`((?:python|search|tests|rust|benches|examples|docs|\.ci)/[\w./-]*)`", text
        ):
            assert (ROOT / path).exists(), f"{name} names {path}"


@pytest.mark.usefixtures("with_tasks")
def test_the_pipeline_runs_as_it_stands(capsys):
    """Every line of the pipeline's blocks, on a tiny model and a tiny task of the page's names."""
    steps = [shlex.split(line) for line in shell_lines(PAGES["docs/pipeline.md"])]
    verbs = [" ".join(word for word in step[:3] if not word.startswith("-")) for step in steps]
    one_policy = ["shortcuts", "search static", "score", "train", "eval", "report", "export"]
    one_policy += ["generate", "bake", "fold"]
    others = ["score", "train", "search prompts", "train", *["search prompts", "search null"] * 2]
    others += ["eval"]
    seen = [f"inspect {name}" for name in ("scores", "graded-labels", "my-model/routers", "report")]
    tuning = ["tune menu", "tune", "score", "tune search"]
    exits = ["train", "generate", "eval"]
    every = [*one_policy, *others, *exits, "compare", *seen, *tuning]
    assert verbs == [f"dynadepth {verb}" for verb in every]
    for step in steps:
        code = cli.main(step[1:])
        captured = capsys.readouterr()
        assert code == 0, f"{shlex.join(step)}\n{captured.err}"


@pytest.mark.parametrize("page", PAGES)
def test_no_figure_is_left_to_be_filled_in(page):
    assert not re.search(r"(?m)^(RESULTS|SWEEP|TODO|TBD)\b", PAGES[page])


def test_every_figure_of_the_readmes_results_stands_in_the_docs():
    """What the README shows is an extract: differences are those of docs/results.md, ratios those of the benches."""
    figures = re.findall(r"([+-]?)(\d+\.\d+\s\[[^\]]+\])", README)
    assert len(figures) > 6
    assert {sign == "" for sign, _ in figures} == {True, False}
    for sign, figure in figures:
        known = PAGES["docs/results.md" if sign else "benches/README.md"]
        assert sign + " ".join(figure.split()) in known
