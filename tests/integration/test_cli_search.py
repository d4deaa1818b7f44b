"""The verbs search, train, eval and report, one after the other as a model owner runs them, and bad input."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dynadepth import cli, load_routers
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


SEARCH = ("--evaluations", 4, "--probe", 2, "--min-depth", 0.8)


@pytest.fixture(scope="module")
def place(tiny_deep_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `my-model` and two tasks."""
    folder = tmp_path_factory.mktemp("owner")
    shutil.copytree(tiny_deep_base, folder / "my-model")
    write_task(folder / "train.jsonl", 0, 20)
    write_task(folder / "heldout.jsonl", 100, 10)
    return folder


def search(place: Path, *more: Any, task: str = "train.jsonl", out: str = "labels") -> list[Any]:
    return [
        "search",
        "--model",
        place / "my-model",
        "--task",
        place / task,
        "--out",
        place / out,
        *SEARCH,
        *more,
    ]


def train(place: Path, *more: Any, out: str = "my-model/routers") -> list[Any]:
    return [
        "train",
        "--model",
        place / "my-model",
        "--labels",
        place / "labels",
        "--out",
        place / out,
        *more,
    ]


def evaluation(
    place: Path, *more: Any, task: str = "heldout.jsonl", out: str = "report"
) -> list[Any]:
    argv = ["eval", "--model", place / "my-model", "--routers", place / "my-model" / "routers"]
    argv += ["--labels", place / "labels", "--task", place / task, "--out", place / out]
    return [*argv, *more]


@pytest.fixture
def made(place: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The same folder after search, train and eval; each runs once for all tests."""
    if not (place / "report" / "report.html").exists():
        for argv in (
            search(place),
            train(place),
            evaluation(place, "--budget", 0.9, "--budget", 0.8),
        ):
            code, _, err = run(capsys, *argv)
            assert code == 0, err
    return place


def test_a_search_says_what_it_did_and_goes_on(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, *search(place, "--json"))
    assert code == 0, err
    first = json.loads(out)
    assert first["prompts"] == 20
    assert 1 <= first["evaluations_per_label"] <= 4
    assert first["static_plans"] == 3
    assert "probe" in err
    code, out, err = run(capsys, *search(place, "--json"))
    again = json.loads(out)
    assert (code, again["searched_now"], again["sharing_factor"]) == (0, 0, None)
    assert again["identity_rate"] == first["identity_rate"]


def test_training_writes_routers_that_load(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    routers = load_routers(made / "my-model")
    assert routers.calibration.range[0] <= 0.85
    assert (made / "my-model" / "routers" / "routers.onnx").is_file()
    code, out, err = run(capsys, *train(made, "--preset", "drllm", "--json", out="drllm"))
    assert code == 0, err
    assert json.loads(out)["preset"] == "drllm"
    assert load_routers(made / "drllm").shrinkage == 1.0


def test_an_evaluation_prints_the_table_and_writes_the_report(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "report", "--run", made / "report", "--json")
    assert code == 0, err
    policies = [policy["name"] for policy in json.loads(out)["evaluation"]["policies"]]
    assert "static mixture 0.80" in policies
    code, out, err = run(capsys, *evaluation(made, "--budget", 0.9, out="again"))
    assert code == 0, err
    assert out.splitlines()[0].startswith("policy")
    assert f"report: {made / 'again' / 'report.html'}" in out
    assert "scoring held-out prompts" in err
    assert "scoring held-out prompts" not in out


def test_a_report_is_drawn_again_alike_and_as_markdown(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "report", "--run", made / "report", "--out", tmp_path / "new")
    assert code == 0, err
    page = (made / "report" / "report.html").read_text()
    assert (tmp_path / "new" / "report.html").read_text() == page
    assert "train_prompts" in page
    code, out, err = run(capsys, "report", "--run", made / "report", "--markdown")
    assert code == 0, err
    assert out.startswith("| policy | depth | fidelity (-KL) | against static [95 %] |")
    assert "| routed 0.80 |" in out
    assert "| against base [95 %] | fidelity (-KL) |" in out


def test_other_routers_can_be_compared(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = shutil.copytree(made / "my-model" / "routers", made / "twin", dirs_exist_ok=True)
    argv = evaluation(made, "--budget", 0.9, "--against", other, "--json", out="compared")
    code, out, err = run(capsys, *argv)
    assert code == 0, err
    policies = {policy["name"]: policy for policy in json.loads(out)["evaluation"]["policies"]}
    assert policies["twin 0.90"]["metrics"] == policies["routed 0.90"]["metrics"]


def test_routers_to_compare_need_names_of_their_own(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = made / "my-model" / "routers"
    one, two = tmp_path / "a" / "routers", tmp_path / "b" / "routers"
    for folder in (one, two, tmp_path / "routed"):
        shutil.copytree(source, folder)
    new = tmp_path / "new"
    both = evaluation(made, "--against", one, "--against", two, out=str(new))
    code, out, err = run(capsys, *both)
    assert (code, out) == (1, "")
    assert f"--against gives {one} and {two}, which a report would both call 'routers'" in err
    code, out, err = run(capsys, *evaluation(made, "--against", tmp_path / "routed", out=str(new)))
    assert (code, out) == (1, "")
    assert "are named 'routed'" in err
    assert not new.exists()


def test_routers_that_were_trained_on_other_labels(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(made / "my-model" / "routers", tmp_path / "other")
    config = json.loads((other / "router_config.json").read_text())
    config["training"]["task"]["sha256"] = "0" * 64
    (other / "router_config.json").write_text(json.dumps(config))
    argv = evaluation(made, "--budget", 0.9, out=str(tmp_path / "new"))
    argv[argv.index("--routers") + 1] = other
    for words in (argv, evaluation(made, "--against", other, out=str(tmp_path / "new"))):
        code, out, err = run(capsys, *words)
        assert (code, out) == (1, "")
        assert f"routers {other} were trained on task 'train' (sha256 000000000000)" in err
        assert "give --labels the folder" in err
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
    code, out, err = run(
        capsys, *search(place, task=str(tmp_path / name), out=str(tmp_path / "labels"))
    )
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert message in err
    assert not (tmp_path / "labels").exists()


def test_a_wrong_model_and_an_unsupported_family(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = search(place, out=str(tmp_path / "labels"))
    argv[2] = tmp_path / "nothing"
    code, out, err = run(capsys, *argv)
    assert (code, out) == (1, "")
    assert f"error: cannot load the model '{tmp_path / 'nothing'}'" in err
    from transformers import GPT2Config, GPT2LMHeadModel

    argv[2] = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=97)).save_pretrained(
        argv[2]
    )
    for path in (place / "my-model").glob("tokenizer*"):
        shutil.copy(path, argv[2])
    code, out, err = run(capsys, *argv)
    assert (code, out) == (1, "")
    assert "has model_type 'gpt2'; supported are gemma3_text, llama" in err
    assert not (tmp_path / "labels").exists()


def test_labels_of_another_model(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_tiny_base(tmp_path / "other", num_layers=10, family="qwen3")
    before = (made / "my-model" / "routers" / "router_config.json").read_bytes()
    argv = train(made)
    argv[2] = other
    code, out, err = run(capsys, *argv)
    assert (code, out) == (1, "")
    assert "belong to another model: model_type is qwen3, expected llama" in err
    assert (made / "my-model" / "routers" / "router_config.json").read_bytes() == before


def test_a_search_into_the_folder_of_another(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, *search(made, "--objective", "reward"))
    assert (code, out) == (1, "")
    assert 'was made with search.objective = "preserve", but now it is "reward"' in err


def test_a_truncated_safetensors_and_a_cut_shard(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = shutil.copytree(made, tmp_path / "copy")
    weights = broken / "my-model" / "routers" / "routers.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    code, out, err = run(capsys, *evaluation(broken, out="new"))
    assert (code, out) == (1, "")
    assert "routers.safetensors" in err
    assert not (broken / "new").exists()
    shard = next((broken / "labels").glob("part-*.parquet"))
    shard.write_bytes(shard.read_bytes()[:300])
    code, out, err = run(capsys, *train(broken, out="fresh"))
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
    assert "20 of 20 held-out prompts are training prompts too" in err
    assert not (made / "new").exists()


def test_a_run_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "report", "--run", tmp_path)
    assert (code, out) == (1, "")
    assert "evaluation.json" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "argv",
    [
        ["search", "--model", "x", "--task", "y"],
        ["search", "--model", "x", "--task", "y", "--out", "z", "--protect", "first"],
        ["search", "--model", "x", "--task", "y", "--out", "z", "--depth-penalty", "-1"],
        ["train", "--model", "x", "--labels", "y", "--out"],
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
