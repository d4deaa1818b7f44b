"""The verbs search, score, train, eval and report, one after the other as a model owner runs them, and bad input."""

import json
import shutil
from html import escape
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from dynadepth import load_policy
from dynadepth.cli import main as cli
from dynadepth_search.data.solutions import is_right
from dynadepth_search.scoring.score_table import read_scores
from dynadepth_search.search.static import read_static
from dynadepth_search.storage.labels import read_labels
from tests.tiny_folder import save_tiny_base

pytestmark = pytest.mark.usefixtures("search_verbs")


def run(capsys: pytest.CaptureFixture[str], *argv: Any) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of one command line."""
    capsys.readouterr()
    code = cli.main([str(word) for word in argv])
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    return code, shown.out, shown.err


def write_task(path: Path, first: int, count: int, **changes: Any) -> Path:
    lines = [
        {"prompt": f"Question {index}: so?", "choices": [" yes", " no it is"], "answer": index % 2}
        for index in range(first, first + count)
    ]
    path.write_text("".join(json.dumps({**line, **changes}) + "\n" for line in lines))
    return path


LABELS = ("prompts", "--evaluations", 4, "--probe", 2)
STATIC = ("static", "--min-depth", 0.8, "--size", 4, "--beam", 2)


@pytest.fixture(scope="module")
def place(tiny_deep_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `my-model` and its tasks."""
    folder = tmp_path_factory.mktemp("owner")
    shutil.copytree(tiny_deep_base, folder / "my-model")
    write_task(folder / "train.jsonl", 0, 44)
    write_task(folder / "few.jsonl", 0, 20)
    write_task(folder / "heldout.jsonl", 100, 10)
    return folder


def search(
    place: Path,
    *more: Any,
    task: str = "train.jsonl",
    out: str = "plans",
    how: tuple[Any, ...] = STATIC,
) -> list[Any]:
    argv = [
        "search",
        how[0],
        "--model",
        place / "my-model",
        "--task",
        place / task,
        "--out",
        place / out,
    ]
    return [*argv, *how[1:], *more]


def score(place: Path, *more: Any, task: str = "train.jsonl", out: str = "scores") -> list[Any]:
    argv = ["score", "--model", place / "my-model", "--task", place / task, "--out", place / out]
    return [*argv, "--plans", place / "plans", *more]


def train(place: Path, *more: Any, out: str = "my-model/routers") -> list[Any]:
    argv = ["train", "--model", place / "my-model", "--scores", place / "scores"]
    return [*argv, "--out", place / out, *more]


def evaluation(
    place: Path, *more: Any, task: str = "heldout.jsonl", out: str = "report"
) -> list[Any]:
    argv = ["eval", "--model", place / "my-model", "--routers", place / "my-model" / "routers"]
    argv += ["--plans", place / "plans", "--scores", place / "scores"]
    return [*argv, "--task", place / task, "--out", place / out, *more]


def without(argv: list[Any], option: str) -> list[Any]:
    """Leave an option and its value out."""
    at = argv.index(option)
    return argv[:at] + argv[at + 2 :]


@pytest.fixture
def made(place: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The same folder after search, score, train and eval; each runs once for all tests."""
    if not (place / "report" / "report.html").exists():
        for argv in (
            search(place),
            score(place),
            train(place),
            evaluation(place, "--budget", 0.95, "--budget", 0.9),
        ):
            code, _, err = run(capsys, *argv)
            assert code == 0, err
    return place


@pytest.fixture
def labelled(place: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The same folder with labels for the published routers."""
    if not (place / "labels").exists():
        argv = search(place, task="few.jsonl", out="labels", how=LABELS)
        code, _, err = run(capsys, *argv)
        assert code == 0, err
    return place


def test_a_search_says_what_it_did_and_goes_on(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = search(place, "--json", task="few.jsonl", out=str(tmp_path / "labels"), how=LABELS)
    code, out, err = run(capsys, *argv)
    assert code == 0, err
    first = json.loads(out)
    assert first["prompts"] == 20
    assert 1 <= first["evaluations_per_label"] <= 4
    assert "probe" in err
    code, out, err = run(capsys, *argv)
    again = json.loads(out)
    assert (code, again["searched_now"], again["sharing_factor"]) == (0, 0, None)
    assert again["identity_rate"] == first["identity_rate"]


def test_a_null_control_says_how_many_fixes_are_luck(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--objective", "reward", "--scoring", "letter", "--confirm", 1, "--margin", 0.01)
    argv = search(place, *more, task="few.jsonl", out=str(tmp_path / "labels"), how=LABELS)
    code, out, err = run(capsys, *argv)
    assert code == 0, err
    assert "confirmations per label: " in out
    argv = ["search", "null", "--model", place / "my-model", "--labels", tmp_path / "labels"]
    argv += ["--out", tmp_path / "null"]
    code, out, err = run(capsys, *argv)
    assert code == 0, err
    assert "raw labels: " in out
    assert "share that luck explains" in out
    code, out, _ = run(capsys, *argv, "--json")
    assert json.loads(out) == json.loads((tmp_path / "null" / "null.json").read_text())


@pytest.fixture
def problems(place: Path) -> Path:
    """A task whose answers are generated."""
    path = place / "problems.jsonl"
    lines = [
        {"prompt": f"{n} and {n} are", "completion": f" {2 * n}.", "solution": f"{2 * n}"}
        for n in range(6)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_labels_are_confirmed_by_generated_answers(
    place: Path, problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--objective", "reward", "--new-tokens", 8, "--json")
    argv = search(place, *more, task=problems.name, out=str(tmp_path / "labels"), how=LABELS)
    code, out, err = run(capsys, *argv)
    assert code == 0, err
    found = json.loads(out)
    assert found["answered_prompts"] == 6
    assert found["labels_right"] >= found["base_right"]
    labels = read_labels(tmp_path / "labels")
    assert labels.manifest.search["new_tokens"] == 8
    for example, candidates in zip(labels.examples, labels.candidates, strict=True):
        assert example.solution is not None
        for item in candidates:
            assert item.right == tuple(is_right(text, example.solution) for text in item.answers)
    argv = ["search", "null", "--model", place / "my-model", "--labels", tmp_path / "labels"]
    code, out, err = run(capsys, *argv, "--out", tmp_path / "null", "--json")
    assert code == 0, err
    assert json.loads(out)["prompts"] == 6


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--new-tokens", 8), 2, "--new-tokens was given, but no answers are generated"),
        (("--objective", "reward", "--confirm", 0, "--new-tokens", 8), 2, "--confirm above 0"),
        (
            ("--objective", "reward", "--new-tokens", 0),
            2,
            "'--new-tokens': Input should be greater than or equal to 1",
        ),
        (("--objective", "reward", "--new-tokens", -3), 2, "should be greater than or equal to 1"),
    ],
)
def test_a_limit_of_tokens_that_limits_nothing(
    place: Path,
    problems: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[Any, ...],
    code: int,
    message: str,
) -> None:
    argv = search(place, *more, task=problems.name, out=str(tmp_path / "labels"), how=LABELS)
    found, out, err = run(capsys, *argv)
    assert (found, out) == (code, "")
    assert message in " ".join(err.split())
    assert not (tmp_path / "labels").exists()


def test_solutions_are_refused_where_no_answers_are_generated(
    made: Path, problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "new")
    for argv in (
        search(made, task=problems.name, out=out),
        score(made, task=problems.name, out=out),
        evaluation(made, "--budget", 0.95, task=problems.name, out=out),
    ):
        code, shown, err = run(capsys, *argv)
        assert (code, shown) == (1, ""), argv
        said = " ".join(err.split())
        assert "has solutions, which only generated answers can be compared with" in said
        assert "leave the key `solution` out of the task" in said
        assert not Path(out).exists()


def test_a_search_of_plans_for_all_says_what_it_found_and_goes_on(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (made / "plans" / "menu.json").read_bytes()
    code, out, err = run(capsys, *search(made, "--json"))
    assert code == 0, err
    found = json.loads(out)
    # Of ten layers two may go.
    assert found["static_plans"] == 3
    assert 4 <= found["menu"] <= found["pool"]
    assert found["plans"] == str(made / "plans")
    assert found["measured_on_prompts"] == 30
    assert (made / "plans" / "menu.json").read_bytes() == before
    assert "growing plans" not in err


def test_scoring_says_what_plans_do_and_goes_on(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, *score(made, "--json"))
    assert code == 0, err
    found = json.loads(out)
    assert found["prompts"] == 44
    assert found["plans"] == len(read_static(made / "plans").menu)
    assert 0 <= found["agreement"] <= 1
    assert 0 <= found["total_variation"] <= 1
    table = read_scores(made / "scores")
    assert found["layers"] == ", ".join(map(str, sorted(table.views)))
    assert table.num_windows == 0


def test_layers_and_windows_can_be_chosen(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = score(made, "--layers", "4, 1", "--windows", 2, "--limit", 5, out=str(tmp_path / "new"))
    code, _, err = run(capsys, *argv)
    assert code == 0, err
    table = read_scores(tmp_path / "new")
    assert (len(table), sorted(table.views), table.num_windows) == (5, [1, 4], 2)
    code, out, err = run(capsys, *score(made, "--layers", "99", out=str(tmp_path / "newer")))
    assert (code, out) == (1, "")
    assert "expected layers from 0 to 9" in err


def test_prompts_alone_from_a_text_file_are_scored(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("Is it so?\nNo.\nIs it so?\n")
    argv = score(made, "--json", task=str(tmp_path / "mine.txt"), out=str(tmp_path / "new"))
    code, out, err = run(capsys, *argv)
    assert code == 0, err
    assert json.loads(out)["prompts"] == 2
    assert not read_scores(tmp_path / "new").graded


def test_training_writes_a_menu_that_loads(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    menu = load_policy(made / "my-model")
    assert menu.kind == "menu"
    assert menu.calibration.range[0] <= 0.85
    assert (made / "my-model" / "routers" / "routers.onnx").is_file()
    assert menu.training["train_prompts"] == 44
    code, out, err = run(capsys, *train(made, "--json", out="other"))
    assert code == 0, err
    said = json.loads(out)
    assert (said["policy"], said["train_prompts"]) == ("menu", 44)
    recipe = menu.training["recipe"]
    assert {key: said[key] for key in ("layers", "rank", "ridge", "shrinkage", "inner")} == {
        key: recipe[key] for key in ("layers", "rank", "ridge", "shrinkage", "inner")
    }


def test_routers_of_all_layers_learn_from_the_plans_that_they_need(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, *score(made, "--policy", "routers", out="router-scores"))
    assert code == 0, err
    argv = train(made, "--policy", "routers", "--plans", made / "plans", "--json", out="all")
    code, out, err = run(capsys, *argv)
    assert (code, out) == (1, "")
    assert "plans that routers learn from are not in the score table" in err
    argv[argv.index("--scores") + 1] = made / "router-scores"
    code, out, err = run(capsys, *argv)
    assert code == 0, err
    assert json.loads(out)["policy"] == "routers"
    assert load_policy(made / "all").kind == "routers"


def test_the_published_routers_learn_from_labels(
    labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = without(train(labelled, "--policy", "drllm", "--json", out="drllm"), "--scores")
    code, out, err = run(capsys, *argv, "--labels", labelled / "labels")
    assert code == 0, err
    assert json.loads(out)["policy"] == "drllm"
    routers = load_policy(labelled / "drllm")
    assert (routers.kind, routers.shrinkage, routers.config.preset) == ("routers", 1.0, "drllm")


def test_a_policy_says_what_it_needs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = without(train(place), "--scores")
    for policy, needed in (
        ("menu", "--scores"),
        ("routers", "--scores and --plans"),
        ("drllm", "--labels"),
    ):
        code, out, err = run(capsys, *bare, "--policy", policy)
        assert (code, out) == (2, "")
        assert f"--policy {policy} needs {needed}" in " ".join(err.replace("│", " ").split())
    for argv in (train(place, "--policy", "forest"), score(place, "--policy", "forest")):
        code, out, err = run(capsys, *argv)
        assert (code, out) == (2, "")
        assert "'forest' is not one of 'menu', 'routers'" in " ".join(err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("verb", "choices"),
    [
        ("train", ["menu|routers|drllm|exits", "preserve|reward"]),
        ("score", ["menu|routers", "raw|normalized|letter"]),
        ("eval", ["raw|normalized|letter"]),
        ("demo", ["raw|normalized|letter", "preserve|reward"]),
        ("generate", ["torch|onnx", "auto|float32|bfloat16|float16|float64"]),
    ],
)
def test_the_help_of_a_verb_shows_the_choices(
    verb: str, choices: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, verb, "--help")
    assert code == 0
    shown = "".join(out.replace("│", " ").split())
    for each in choices:
        assert f"<{each}>" in shown


def test_an_evaluation_finds_the_folders_that_its_routers_name(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, *train(made, "--plans", made / "plans", out="named"))
    assert code == 0, err
    notes = load_policy(made / "named").training["folders"]
    assert notes == {"plans": "../plans", "scores": "../scores"}
    argv = evaluation(made, "--budget", 0.9, "--json", out="found")
    argv[argv.index("--routers") + 1] = made / "named"
    bare = without(without(argv, "--plans"), "--scores")
    code, out, err = run(capsys, *bare)
    assert code == 0, err
    named = json.loads(out)["evaluation"]
    assert next(each["name"] for each in named["policies"]) == "base"
    # Routers that name no plans, and folders that have gone.
    argv[argv.index("--routers") + 1] = made / "my-model" / "routers"
    code, _, err = run(capsys, *without(argv, "--plans"))
    assert (code, "do not say where their plans are; give --plans" in err) == (1, True)
    shutil.copytree(made / "named", made / "far" / "away" / "named")
    bare[bare.index("--routers") + 1] = made / "far" / "away" / "named"
    code, _, err = run(capsys, *bare)
    assert (code, "which is not there; give --plans" in err) == (1, True)


def test_an_evaluation_prints_the_table_and_writes_the_report(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "report", "--run", made / "report", "--json")
    assert code == 0, err
    content = json.loads(out)["evaluation"]
    policies = [policy["name"] for policy in content["policies"]]
    assert "static mixture 0.90" in policies
    assert (content["headline"], content["drift"]) == ("agreement", [])
    unseen = write_task(made / "unseen.jsonl", 500, 20)
    code, out, err = run(
        capsys, *evaluation(made, "--budget", 0.9, "--unseen", unseen, out="again")
    )
    assert code == 0, err
    assert out.startswith("At depth ")
    assert "- On 20 prompts of another kind (unseen)" in out
    lines = out.splitlines()
    assert lines[-1] == f"report: {made / 'again' / 'report.html'}"
    assert max(map(len, lines[:-1])) <= 100
    (rule,) = (number for number, line in enumerate(lines) if line.startswith("───"))
    assert [line.split("  ")[0] for line in lines[rule + 1 : rule + 4]] == ["base", "menu 0.90", ""]
    assert "scoring held-out prompts" in err
    assert "scoring held-out prompts" not in out


def test_a_report_is_drawn_again_alike_and_as_markdown(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "report", "--run", made / "report", "--out", tmp_path / "new")
    assert code == 0, err
    page = (made / "report" / "report.html").read_text()
    assert (tmp_path / "new" / "report.html").read_text() == page
    assert out.startswith("At depth ")
    assert out.endswith(f"\nreport: {tmp_path / 'new' / 'report.html'}\n")
    verdict = " ".join(out.split("\n\n")[0].split())
    assert f'<p class="verdict">{escape(verdict)}</p>' in page
    assert "train_prompts" in page
    code, out, err = run(capsys, "report", "--run", made / "report", "--markdown")
    assert code == 0, err
    first, tables = out.split("\n\n", 1)
    assert first == verdict
    assert tables.startswith("| policy | depth | agreement, % | against static [95 %] |")
    assert "| menu 0.90 |" in out
    assert "| against base [95 %] | agreement, % |" in out
    content = json.loads((made / "report" / "evaluation.json").read_text())
    assert out.endswith("\n\n" + "".join(f"- {finding}\n" for finding in content["findings"]))


def test_other_routers_can_be_compared(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = shutil.copytree(made / "my-model" / "routers", made / "twin", dirs_exist_ok=True)
    argv = evaluation(made, "--budget", 0.9, "--against", other, "--json", out="compared")
    code, out, err = run(capsys, *argv)
    assert code == 0, err
    policies = {policy["name"]: policy for policy in json.loads(out)["evaluation"]["policies"]}
    assert policies["twin 0.90"]["metrics"] == policies["menu 0.90"]["metrics"]


def test_routers_to_compare_need_names_of_their_own(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = made / "my-model" / "routers"
    one, two = tmp_path / "a" / "routers", tmp_path / "b" / "routers"
    for folder in (one, two, tmp_path / "oracle", tmp_path / "menu"):
        shutil.copytree(source, folder)
    new = tmp_path / "new"
    both = evaluation(made, "--against", one, "--against", two, out=str(new))
    code, out, err = run(capsys, *both)
    assert (code, out) == (1, "")
    assert f"--against gives {one} and {two}, which a report would both call 'routers'" in err
    for name in ("oracle", "menu"):
        argv = evaluation(made, "--against", tmp_path / name, out=str(new))
        code, out, err = run(capsys, *argv)
        assert (code, out) == (1, "")
        assert f"are named '{name}'" in err
    assert not new.exists()


def test_a_menu_that_was_trained_on_another_table(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(made / "my-model" / "routers", tmp_path / "other")
    config = json.loads((other / "router_config.json").read_text())
    config["training"]["task"]["sha256"] = "0" * 64
    (other / "router_config.json").write_text(json.dumps(config))
    argv = evaluation(made, "--budget", 0.9, out=str(tmp_path / "new"))
    argv[argv.index("--routers") + 1] = other
    code, out, err = run(capsys, *argv)
    assert (code, out) == (1, "")
    assert f"routers {other} were trained on task 'train' (sha256 000000000000)" in err
    assert not (tmp_path / "new").exists()


def test_prompts_that_others_were_trained_on_are_no_held_out_prompts_for_them(
    made: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Routers to compare may have learned from other prompts than those of --scores, but not from the held-out ones."""
    heldout = write_task(tmp_path / "mine.jsonl", 200, 20)
    for argv in (
        search(made, task=str(heldout), out=str(tmp_path / "labels"), how=LABELS),
        [
            *without(train(made, "--policy", "drllm", out=str(tmp_path / "drllm")), "--scores"),
            "--labels",
            tmp_path / "labels",
        ],
    ):
        code, _, err = run(capsys, *argv)
        assert code == 0, err
    argv = evaluation(made, "--budget", 0.9, "--against", tmp_path / "drllm", task=str(heldout))
    argv[argv.index("--out") + 1] = tmp_path / "new"
    code, out, err = run(capsys, *argv)
    assert (code, out) == (1, "")
    assert not (tmp_path / "new").exists()


BROKEN = {
    "empty.jsonl": ("", "holds no examples"),
    "words.jsonl": ("Is it so?\n", "words.jsonl, line 1: not JSON"),
    "range.jsonl": (
        '{"prompt": "a", "choices": ["b", "c"], "answer": 2}\n',
        "range.jsonl, line 1: `answer` is 2; expected the index of the right choice",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_bad_task_is_refused_before_anything_is_written(
    name: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, message = BROKEN[name]
    (tmp_path / name).write_text(content)
    for how in (LABELS, STATIC):
        argv = search(place, task=str(tmp_path / name), out=str(tmp_path / "new"), how=how)
        code, out, err = run(capsys, *argv)
        assert (code, out) == (1, "")
        assert err.startswith("error: ")
        assert message in err
        assert not (tmp_path / "new").exists()


def test_a_bad_task_is_not_scored(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, (content, message) in BROKEN.items():
        (tmp_path / name).write_text(content)
        argv = score(made, task=str(tmp_path / name), out=str(tmp_path / "new"))
        code, out, err = run(capsys, *argv)
        assert (code, out) == (1, "")
        assert message in err
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("how", [LABELS, STATIC], ids=["labels", "static"])
def test_a_wrong_model_and_an_unsupported_family(
    how: tuple[Any, ...], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = search(place, out=str(tmp_path / "labels"), how=how)
    argv[argv.index("--model") + 1] = tmp_path / "nothing"
    code, out, err = run(capsys, *argv)
    assert (code, out) == (1, "")
    assert f"error: cannot load the model '{tmp_path / 'nothing'}'" in err
    from transformers import MambaConfig, MambaForCausalLM

    argv[argv.index("--model") + 1] = tmp_path / "mamba"
    shape = {"num_hidden_layers": 2, "hidden_size": 16, "vocab_size": 97}
    MambaForCausalLM(MambaConfig(**shape)).save_pretrained(argv[3])
    for path in (place / "my-model").glob("tokenizer*"):
        shutil.copy(path, argv[3])
    code, out, err = run(capsys, *argv)
    assert (code, out) == (1, "")
    assert "(model_type 'mamba') is refused: it keeps states that are not keys and values" in err
    assert not (tmp_path / "labels").exists()


def test_what_belongs_to_another_model(
    made: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_tiny_base(tmp_path / "other", num_layers=10, family="qwen3")
    before = (made / "my-model" / "routers" / "router_config.json").read_bytes()
    drllm = without(train(made, "--policy", "drllm"), "--scores")
    for argv, words in (
        (train(made), "they were made with my-model, and here"),
        ([*drllm, "--labels", labelled / "labels"], "belong to another base model than this"),
        (score(made, out=str(tmp_path / "new")), "belong to another base model than this"),
        (evaluation(made, out=str(tmp_path / "new")), "belong to another base model than this"),
    ):
        argv[argv.index("--model") + 1] = other
        code, out, err = run(capsys, *argv)
        assert (code, out) == (1, "")
        assert words in err
        assert "model_type is qwen3, expected llama" in err
    assert not (tmp_path / "new").exists()
    assert (made / "my-model" / "routers" / "router_config.json").read_bytes() == before


def test_a_search_into_the_folder_of_another(
    made: Path, labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = search(labelled, "--objective", "reward", task="few.jsonl", out="labels", how=LABELS)
    for argv in (search(made, "--objective", "reward"), labels):
        code, out, err = run(capsys, *argv)
        assert (code, out) == (1, "")
        assert 'was made with search.objective = "preserve", but now it is "reward"' in err
    code, out, err = run(capsys, *score(made, task="few.jsonl"))
    assert (code, out) == (1, "")
    assert "was made with task.prompts = 44, but now it is 20" in err


def test_a_truncated_safetensors_and_cut_shards(
    made: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = shutil.copytree(made, tmp_path / "copy")
    weights = broken / "my-model" / "routers" / "routers.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    code, out, err = run(capsys, *evaluation(broken, out="new"))
    assert (code, out) == (1, "")
    assert "routers.safetensors" in err
    assert not (broken / "new").exists()
    for folder in ("labels", "scores"):
        shard = next((broken / folder).glob("part-*.parquet"))
        shard.write_bytes(shard.read_bytes()[:300])
    code, out, err = run(capsys, *train(broken, out="fresh"))
    assert (code, out) == (1, "")
    assert "is damaged" in err
    assert "delete both files of this block and score again" in err
    drllm = without(train(broken, "--policy", "drllm", out="fresh"), "--scores")
    code, out, err = run(capsys, *drllm, "--labels", broken / "labels")
    assert (code, out) == (1, "")
    assert "is not the file that was written (cut off or altered): delete it" in err
    assert not (broken / "fresh").exists()


@pytest.mark.parametrize(
    ("budget", "words"),
    [("-1", "budget -1"), ("0", "budget 0"), ("nan", "budget nan"), ("3", "budget 3")],
)
def test_a_budget_out_of_range_names_the_range(
    budget: str, words: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = evaluation(made, "--budget", budget, out=str(tmp_path / "new"))
    code, out, err = run(capsys, *argv)
    assert (code, out) == (1, "")
    assert (
        f"error: {words} is out of reach; expected a mean depth within the calibrated range, 0.8"
        in err
    )
    assert not (tmp_path / "new").exists()


def test_heldout_prompts_that_were_trained_on(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, *evaluation(made, "--budget", 0.9, task="train.jsonl", out="new"))
    assert (code, out) == (1, "")
    assert "44 of 44 held-out prompts are training prompts too" in err
    assert not (made / "new").exists()


def test_prompts_that_chose_the_plans_are_not_held_out(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Plans from one task, scores and routers from another: the first is no held-out task for the second."""
    other = write_task(tmp_path / "other.jsonl", 300, 60)
    for argv in (
        score(made, task=str(other), out=str(tmp_path / "scores")),
        train(made, "--scores", tmp_path / "scores", out=str(tmp_path / "routers")),
    ):
        code, _, err = run(capsys, *argv)
        assert code == 0, err
    plans = read_static(made / "plans")
    assert plans.prompt_hashes is not None
    shared = len(plans.prompt_hashes)
    argv = evaluation(
        made, "--scores", tmp_path / "scores", task="train.jsonl", out=str(tmp_path / "new")
    )
    argv[argv.index("--routers") + 1] = tmp_path / "routers"
    code, _, err = run(capsys, *argv)
    assert code == 1
    shown = " ".join(err.split())
    assert f"{shared} in the plans in {made / 'plans'}" in shown
    assert f"{shared} in the plans scored in {tmp_path / 'scores'}" in shown
    assert f"{shared} in the training of menu" in shown
    assert not (tmp_path / "new").exists()


def test_prompts_that_were_a_chat_are_not_held_out_as_text(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(made / "my-model", tmp_path / "chatty")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "({{ messages[0]['role'] }}) {{ messages[0]['content'] }}"
    tokenizer.save_pretrained(model)

    def command(argv: list[Any]) -> list[Any]:
        argv[argv.index("--model") + 1] = model
        return argv

    out = {"out": str(tmp_path / "chat-plans")}
    scores, routers = tmp_path / "chat-scores", tmp_path / "chat-routers"
    chosen = ("--plans", out["out"])
    for argv in (
        search(made, "--chat", **out),
        score(made, "--chat", *chosen, out=str(scores)),
        train(made, "--scores", scores, out=str(routers)),
    ):
        code, _, err = run(capsys, *command(argv))
        assert code == 0, err
    # One prompt of the training task among others that took no part.
    lines = (made / "heldout.jsonl").read_text() + (made / "train.jsonl").read_text().split("\n")[0]
    (tmp_path / "mixed.jsonl").write_text(lines + "\n")
    for more in ((), ("--chat",)):
        argv = evaluation(
            made,
            *more,
            *chosen,
            "--scores",
            scores,
            task=str(tmp_path / "mixed.jsonl"),
            out=str(tmp_path / "new"),
        )
        argv[argv.index("--routers") + 1] = routers
        code, _, err = run(capsys, *command(argv))
        assert code == 1
        assert "1 of 11 held-out prompts are training prompts too" in err
        assert not (tmp_path / "new").exists()


def test_a_run_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "report", "--run", tmp_path)
    assert (code, out) == (1, "")
    assert "evaluation.json" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "argv",
    [
        ["search", "--model", "x", "--task", "y", "--out", "z"],
        ["search", "prompts", "--model", "x", "--task", "y"],
        ["search", "prompts", "--model", "x", "--task", "y", "--out", "z", "--protect", "first"],
        ["search", "prompts", "--model", "x", "--task", "y", "--out", "z", "--depth-penalty", "-1"],
        ["search", "static", "--model", "x", "--task", "y", "--out", "z", "--size", "1"],
        # An option of the other half.
        *(
            ["search", "static", "--model", "x", "--task", "y", "--out", "z", option, "2"]
            for option in ("--evaluations", "--probe", "--depth-penalty")
        ),
        *(
            ["search", "prompts", "--model", "x", "--task", "y", "--out", "z", option, "2"]
            for option in ("--from-layer", "--min-depth", "--size", "--beam")
        ),
        ["score", "--model", "x", "--task", "y", "--out", "z"],
        ["score", "--model", "x", "--task", "y", "--plans", "p", "--out", "z", "--layers", "-1"],
        ["train", "--model", "x", "--labels", "y", "--out"],
        ["train", "--model", "x", "--scores", "y", "--out", "z", "--protect", "last"],
        ["eval", "--model", "x", "--budget", "half"],
        ["report"],
    ],
)
def test_a_wrong_command_line_is_exit_code_2(
    argv: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["static", "prompts", "score", "eval", "unseen"])
def test_a_line_that_cannot_be_read_is_named_before_a_model_is_loaded(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    task = tmp_path / "broken.jsonl"
    task.write_text('{"prompt": "fine"}\n{"prompt": "half \\ud83d"}\n')
    how = {"static": STATIC, "prompts": LABELS}
    argv = {
        "score": score(place, task=str(task)),
        "eval": evaluation(place, task=str(task)),
        "unseen": evaluation(place, "--unseen", task),
    }.get(verb) or search(place, task=str(task), out=str(tmp_path / "out"), how=how[verb])
    argv[argv.index("--model") + 1] = tmp_path / "no-such-model"
    code, _, err = run(capsys, *argv)
    assert code == 1
    assert f"{task}, line 2: `prompt` holds '\\ud83d' at character 5" in " ".join(err.split())


@pytest.mark.parametrize("verb", ["static", "prompts", "score", "train", "eval"])
def test_a_device_that_is_none_is_an_error_of_ours(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    argv = {
        "static": search(place, out=str(tmp_path / "out")),
        "prompts": search(place, out=str(tmp_path / "out"), how=LABELS),
        "score": score(place, out=str(tmp_path / "out")),
        "train": train(place),
        "eval": evaluation(place),
    }[verb]
    code, _, err = run(capsys, *argv, "--device", "nonsense")
    assert (code, "device 'nonsense' is unknown to torch" in " ".join(err.split())) == (
        1,
        True,
    )
    assert not (tmp_path / "out").exists()


def test_a_seed_that_torch_cannot_hold_is_bad_usage(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, *train(place), "--seed", 2**64)
    assert (code, "--seed" in err) == (2, True)


@pytest.mark.parametrize("policy", ["menu", "routers", "drllm"])
def test_what_is_unfinished_trains_only_if_it_is_accepted(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], policy: str
) -> None:
    code, out, err = run(
        capsys,
        *(
            search(made, out=str(tmp_path / "work"), how=LABELS)
            if policy == "drllm"
            else score(made, "--policy", policy, out=str(tmp_path / "work"))
        ),
    )
    assert code == 0, err
    if policy == "drllm":
        # As if more prompts had been asked for.
        manifest = json.loads((tmp_path / "work" / "manifest.json").read_text())
        manifest["task"]["prompts"] = 60
        (tmp_path / "work" / "manifest.json").write_text(json.dumps(manifest))
    else:
        for part in (tmp_path / "work").glob("part-00002*"):
            part.unlink()
    given = {
        "menu": ("--scores", tmp_path / "work"),
        "routers": ("--scores", tmp_path / "work", "--plans", made / "plans"),
        "drllm": ("--labels", tmp_path / "work"),
    }[policy]
    argv = ["train", "--policy", policy, "--model", made / "my-model", *given]
    argv += ["--out", tmp_path / "new", "--json"]
    code, out, err = run(capsys, *argv)
    assert (code, out) == (1, "")
    shown = " ".join(err.split())
    there, asked = (44, 60) if policy == "drllm" else (32, 44)
    assert f"is unfinished: {there} of {asked} prompts" in shown
    assert "--accept-partial" in shown
    assert not (tmp_path / "new").exists()
    code, out, err = run(capsys, *argv, "--accept-partial")
    assert code == 0, err
    result = json.loads(out)
    trained = result["train_prompts"] + (0 if policy == "menu" else result["validation_prompts"])
    assert (trained, result["prompts_of_task"]) == (there, asked)
