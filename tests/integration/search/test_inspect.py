"""The verb inspect on real folders of every kind, finished or not, and on wrong ones."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from dynadepth.checkpoints.save_load import save_policy
from dynadepth.cli import main as cli
from dynadepth.models.fingerprint import fingerprint
from dynadepth_search.data.tasks import Example, Task
from dynadepth_search.files.sealed import write_sealed
from dynadepth_search.report.report import write_report
from dynadepth_search.report.verdict import verdict
from dynadepth_search.scoring.score_table import read_scores, score_prompts
from dynadepth_search.search.null_control import search_null
from dynadepth_search.search.per_prompt import search_prompts
from dynadepth_search.storage.labels import read_labels
from tests.tiny import tiny_model
from tests.tiny_evaluation import made_up
from tests.tiny_routers import random_routers
from tests.tiny_search import folder_bytes, tiny_spec, tiny_task
from tests.tiny_shortcuts import random_shortcuts
from tests.tiny_text import word_tokenizer
from tests.unit.search.report.test_report import PageReader

pytestmark = pytest.mark.usefixtures("search_verbs")

COUNT = 20
SCRIPT = "<script>alert(1)</script>"
PLANS = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 1, 1], [1, 0, 1, 0]], dtype=np.uint8)


def graded_task() -> Task:
    task = replace(tiny_task(COUNT), scoring="letter")
    bad = Example(f"{SCRIPT}\x1b[31m " + "so " * 25, (" yes", " no"), 0)
    return replace(task, examples=(bad, *task.examples[1:]))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one folder of every kind, of one tiny model; read only."""
    folder = tmp_path_factory.mktemp("kinds")
    model, tokenizer, task = tiny_model(dtype=torch.float32), word_tokenizer(), graded_task()
    spec = tiny_spec(objective="reward")
    search_prompts(model, tokenizer, task, folder / "labels", spec)
    search_null(model, tokenizer, folder / "labels", folder / "null")
    search_prompts(model, tokenizer, task, folder / "preserved", tiny_spec(confirm=0))
    score_prompts(model, tokenizer, task, PLANS, folder / "scores", layers=(0, 2))
    routers = random_routers(
        hidden_size=model.config.hidden_size,
        fingerprint=fingerprint(model),
        base_model="tiny-llama",
        shortcuts=random_shortcuts(model),
    )
    save_policy(folder / "routers", routers)
    (folder / "report").mkdir()
    write_sealed(folder / "report" / "evaluation.json", made_up())
    write_report(folder / "report", made_up(), {"training": {"answer": 42}})
    return folder


@pytest.fixture
def stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *argv: Any) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(["inspect", *(str(word) for word in argv)])
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    return code, shown.out, shown.err


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of labels as they lie in the files."""
    return [
        row
        for part in sorted(folder.glob("part-*.parquet"))
        for row in pq.ParquetFile(part).read().to_pylist()
    ]


def line_of(out: str, start: str) -> list[str]:
    """Return the cells of the one line of a printed table that starts with a text."""
    (line,) = [line for line in out.splitlines() if line.startswith(f"{start}  ")]
    return re.split(r"  +", line.strip())


@pytest.mark.parametrize("name", ["labels", "null", "preserved", "scores", "routers", "report"])
def test_every_kind_is_shown_and_left_as_it_is(
    place: Path, stand: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    before = folder_bytes(place / name)
    code, out, err = run(capsys, place / name)
    assert code == 0, err
    assert folder_bytes(place / name) == before
    lines = out.splitlines()
    assert lines[-1] == f"page: inspect-{name}.html"
    assert max(map(len, lines)) <= 100
    assert "\x1b" not in out
    assert [each.name for each in stand.iterdir()] == [f"inspect-{name}.html"]
    page = Path(f"inspect-{name}.html").read_text()
    read = PageReader(page)
    assert read.tags["svg"] > 0
    assert [each for each, count in read.ids.items() if count > 1] == []
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(read.tags)
    assert "\x1b" not in page
    assert set(re.findall(r"https?://[^\s\"'<>]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    code, out, err = run(capsys, place / name, "--html", "other.html", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["page"] == "other.html"
    assert Path("other.html").read_text() == page


def test_the_figures_of_labels_are_those_counted_by_hand(
    place: Path, stand: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, place / "labels", "--null", place / "null")
    assert code == 0, err
    rows = rows_of(place / "labels")
    manifest = json.loads((place / "labels" / "manifest.json").read_text())
    penalty = manifest["depth_penalty"]
    assert len(rows) == COUNT

    def depth(plan: str) -> float:
        return sum(map(int, plan)) / 4

    def on_variants(row: dict[str, Any], plan: str) -> float:
        rewards = row["variant_rewards"][row["candidates"].index(plan)]
        return sum(rewards) / len(rewards) - penalty * depth(plan)

    for name, key, value in (
        ("raw labels", "raw_label", "raw_value"),
        ("confirmed labels", "label", "label_value"),
    ):
        cells = line_of(out, name)
        plans = [row[key] for row in rows]
        assert cells[1] == f"{sum(map(depth, plans)) / COUNT:.3f}"
        assert cells[2] == f"{plans.count('1111') / COUNT:.0%}"
        own = sum(row[value] - (row["base_reward"] - penalty) for row in rows) / COUNT
        assert cells[3].startswith(f"{own:+.4f} [")
        other = sum(on_variants(row, row[key]) - on_variants(row, "1111") for row in rows) / COUNT
        assert cells[4].startswith(f"{other:+.4f} [")
    same = sum(row["label"] == row["raw_label"] for row in rows) / COUNT
    assert line_of(out, "confirmed as found")[1] == f"{same:.0%}"
    tried = sum(len(row["plans"]) for row in rows) / COUNT
    assert line_of(out, "evaluations per label")[1] == f"{tried:.1f}"
    table = out.partition("Layers that labels edit")[2].partition("Who gets")[0]
    found = json.loads(run(capsys, place / "labels", "--json")[1])
    for layer in range(4):
        shares = [
            sum(row[key][layer] == action for row in rows) / COUNT
            for action in "02"
            for key in ("raw_label", "label")
        ]
        shown = [f"{share:.0%}" for share in shares if share]
        assert line_of(table, str(layer)) == [str(layer), *shown]
        assert found["layers"]["confirmed"][layer][0] == pytest.approx(shares[1])
    gains = {
        row["prompt_id"]: max(
            reward - penalty * depth(plan)
            for plan, reward in zip(row["plans"], row["rewards"], strict=True)
            if plan != "1111"
        )
        - (row["base_reward"] - penalty)
        for row in rows
    }
    assert [row["gain"] for row in found["hardest"]] == pytest.approx(sorted(gains.values()))
    assert all(row["gain"] == pytest.approx(gains[row["prompt_id"]]) for row in found["hardest"])
    # The verdict goes by what chose no plan.
    said = " ".join(out.split())
    assert f"the identity plan: {line_of(out, 'raw labels')[4]} (mean value" in said
    assert f"what they gain there, {line_of(out, 'confirmed labels')[4]}, flatters them" in said
    assert "Null control, raw labels: " in out
    control = json.loads((place / "null" / "null.json").read_text())
    fixes = f"{control['real']['raw']['fixes']} of {control['real']['base_wrong']} fixed"
    assert fixes in " ".join(out.split())


def test_a_prompt_cannot_break_out_of_the_page(
    place: Path, stand: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("labels", "scores"):
        assert run(capsys, place / name)[0] == 0
        page = Path(f"inspect-{name}.html").read_text()
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
        assert "<script" not in page
        assert f"[31m{' so' * 19}...</td>" in page


def test_labels_without_confirmation_say_so_and_ask_for_no_control(
    place: Path, stand: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = run(capsys, place / "preserved")
    assert line_of(out, "raw labels")[-1] == "not confirmed"
    assert "On the prompts themselves, which chose them, they " in " ".join(out.split())
    assert "--null" not in out
    assert "`--null` shows it here" in " ".join(run(capsys, place / "labels")[1].split())


def test_a_null_control_says_that_it_is_one(
    place: Path, stand: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = run(capsys, place / "null", "--json")
    found = json.loads(out)
    assert (found["kind"], found["answers_shuffled"]) == ("null control", True)
    assert found["null"] == json.loads((place / "null" / "null.json").read_text())
    assert "the answers were shuffled between the prompts" in run(capsys, place / "null")[1]


def test_labels_that_are_unfinished_are_shown_as_far_as_they_are(
    stand: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(stage: str, done: int, _total: int) -> None:
        if stage == "search" and done >= 12:
            raise KeyboardInterrupt

    model = tiny_model(dtype=torch.float32)
    with pytest.raises(KeyboardInterrupt):
        search_prompts(
            model, word_tokenizer(), tiny_task(COUNT), stand / "labels", tiny_spec(), progress=stop
        )
    known = len(read_labels(stand / "labels", accept_partial=True))
    assert 0 < known < COUNT
    code, out, err = run(capsys, stand / "labels")
    assert code == 0, err
    assert f"Labels of {known} prompts of {COUNT} (the search is unfinished)" in " ".join(
        out.split()
    )
    assert line_of(out, "prompts")[1] == f"{known} of {COUNT}"


def test_the_figures_of_scores_stand_in_the_table(
    place: Path, stand: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = run(capsys, place / "scores")
    table = read_scores(place / "scores")
    part = out.partition("What each plan does")[2].partition("Hardest")[0]
    names = ["identity", "skip 3", "skip 1", "skip 1 3"]
    for column, (name, plan) in enumerate(zip(names, PLANS, strict=True)):
        cells = line_of(part, name)
        assert cells[1] == f"{plan.sum() / 4:.3f}"
        assert cells[2].startswith(f"{100 * table.agreement[:, column].sum() / COUNT:.1f} [")
        assert cells[3].startswith(f"{table.divergence[:, column].sum() / COUNT:.4f} [")
        assert cells[4] == f"{100 * table.correct[:, column].sum() / COUNT:.1f}"
        assert cells[5].endswith("%")
    assert "saw the" in part


def test_scores_that_are_unfinished_are_shown_as_far_as_they_are(
    place: Path, stand: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(place / "scores", stand / "scores"))
    (folder / "part-00001.parquet").unlink()
    code, out, err = run(capsys, folder)
    assert code == 0, err
    assert f"16 prompts of {COUNT} (the scoring is unfinished) under 4 plans" in out


def test_routers_say_what_they_carry_also_beside_their_model(
    place: Path, stand: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "routers", stand / "model" / "routers")
    (stand / "model" / "config.json").touch()
    _, out, _ = run(capsys, stand / "model")
    assert line_of(out, "base model")[1] == "tiny-llama"
    assert line_of(out, "budgets")[1] == "0.5 to 1"
    assert "on 4 layers" in line_of(out, "shortcuts")[1]
    assert out.endswith("page: inspect-model.html\n")


def test_an_evaluation_is_its_report(
    place: Path, stand: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = run(capsys, place / "report")
    assert verdict(made_up()) in " ".join(out.split())
    assert "Who gets which plan at budget 0.70" in out
    assert line_of(out, "skip 4")[1:3] == ["0.833", "75%"]
    assert Path("inspect-report.html").read_text() == (place / "report" / "report.html").read_text()
    # A demo keeps its evaluation in a folder of its own, and the report beside it.
    shutil.copytree(place / "report", stand / "demo" / "evaluation")
    (stand / "demo" / "evaluation" / "report.json").rename(stand / "demo" / "report.json")
    assert run(capsys, stand / "demo")[0] == 0
    assert Path("inspect-demo.html").read_text() == Path("inspect-report.html").read_text()


def change_control(folder: Path) -> None:
    path = folder / "null.json"
    content = json.loads(path.read_text())
    content["real"]["raw"]["fixes"] = -1
    path.write_text(json.dumps(content))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("argv", "spoil", "words"),
    [
        (["nowhere"], None, "there is no folder nowhere"),
        (["."], None, "holds nothing that can be inspected; looked for manifest.json (labels)"),
        (["."], None, "Folders in it do: inspect labels, null"),
        (["labels/manifest.json"], None, "is a file; give the folder that `dynadepth search"),
        (["scores", "--null", "null"], None, "holds scores, and a null control (null) is one of"),
        (["labels", "--null", "labels"], None, "null.json; `dynadepth search null` writes it once"),
        (["labels", "--null", "scores"], None, "there is no scores/manifest.json"),
        (["preserved", "--null", "null"], None, "is not one of the labels in preserved: it was"),
        (["null"], lambda: change_control(Path("null")), "real.raw.fixes is -1; expected a whole"),
        (["labels"], lambda: cut(Path("labels/part-00000.parquet")), "is not the file that was"),
        (["scores"], lambda: cut(Path("scores/part-00000.safetensors")), "is not the file that"),
        (["routers"], lambda: cut(Path("routers/routers.safetensors")), "is damaged"),
        (["report"], lambda: cut(Path("report/evaluation.json")), "is not JSON"),
    ],
)
def test_wrong_folders_are_errors_that_leave_no_page(
    place: Path,
    stand: Path,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    spoil: Any,
    words: str,
) -> None:
    for folder in place.iterdir():
        shutil.copytree(folder, stand / folder.name)
    if spoil is not None:
        spoil()
    code, out, err = run(capsys, *argv)
    assert (code, out) == (1, "")
    assert words in err
    assert not list(stand.glob("*.html"))


@pytest.mark.parametrize("page", ["page", "manifest.json", "folder.html"])
def test_a_page_is_a_file_of_its_own(
    place: Path, stand: Path, capsys: pytest.CaptureFixture[str], page: str
) -> None:
    (stand / "folder.html").mkdir()
    code, _, err = run(capsys, place / "labels", "--html", page)
    assert code == 2
    assert "name a file that ends in .html" in " ".join(err.split())
