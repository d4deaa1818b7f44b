"""Shortcuts as a model owner uses them: fitted, searched with, trained with, reported and run; never mixed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynadepth import load_policy, load_shortcuts, unwrap_model, wrap_model
from dynadepth.cli import main as cli
from dynadepth.errors import ShortcutError
from dynadepth.shortcuts.save_load import save_shortcuts
from dynadepth_search.scoring.score_table import read_scores
from dynadepth_search.search.static import read_static
from dynadepth_search.storage.labels import read_labels
from tests.tiny_folder import save_tiny_base
from tests.tiny_search import folder_bytes
from tests.tiny_shortcuts import random_shortcuts

pytestmark = pytest.mark.usefixtures("search_verbs")

FIT = ("--rank", 8, "--new-tokens", 4)
STATIC = ("--min-depth", 0.8, "--size", 4, "--beam", 2)


def run(capsys: pytest.CaptureFixture[str], *argv: Any) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr, its lines joined, of one command line."""
    capsys.readouterr()
    code = cli.main([str(word) for word in argv])
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    return code, shown.out, " ".join(shown.err.replace("│", " ").split())


def succeed(capsys: pytest.CaptureFixture[str], *argv: Any) -> Any:
    code, out, err = run(capsys, *argv, "--json")
    assert code == 0, err
    return json.loads(out)


def write_task(path: Path, first: int, count: int) -> Path:
    rows = [{"prompt": f"Question {index}: so?"} for index in range(first, first + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Owner:
    """The commands of one model owner, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, folder / "my-model"
        self.maps = folder / "maps"

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def verb(self, *words: Any, task: str | None = "train.jsonl", out: Any) -> list[Any]:
        argv = [*words, "--model", self.model]
        argv += [] if task is None else ["--task", self / task]
        return [*argv, "--out", self.folder / out]

    def fit(self, *more: Any, out: Any = "maps") -> list[Any]:
        return [*self.verb("shortcuts", out=out), *FIT, *more]

    def search(self, *more: Any, out: Any = "plans") -> list[Any]:
        return [*self.verb("search", "static", out=out), *STATIC, *more]

    def score(self, *more: Any, plans: str = "plans", out: Any = "scores") -> list[Any]:
        return [*self.verb("score", out=out), "--plans", self / plans, *more]

    def train(self, *more: Any, scores: str = "scores", out: Any = "my-model/routers") -> list[Any]:
        return [*self.verb("train", task=None, out=out), "--scores", self / scores, *more]

    def evaluate(
        self,
        *more: Any,
        plans: str = "plans",
        scores: str = "scores",
        routers: str = "my-model/routers",
        out: Any = "report",
    ) -> list[Any]:
        argv = [*self.verb("eval", task="heldout.jsonl", out=out), "--routers", self / routers]
        argv += ["--plans", self / plans, "--scores", self / scores, "--budget", 0.9]
        return [*argv, *more]


@pytest.fixture(scope="module")
def owner(tiny_deep_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Owner:
    """A folder with `my-model` and its tasks."""
    folder = tmp_path_factory.mktemp("owner")
    shutil.copytree(tiny_deep_base, folder / "my-model")
    write_task(folder / "train.jsonl", 0, 44)
    write_task(folder / "heldout.jsonl", 100, 10)
    return Owner(folder)


@pytest.fixture
def made(owner: Owner, capsys: pytest.CaptureFixture[str]) -> Owner:
    """The same folder after everything was made with shortcuts and, as `plain-...`, without; once for all tests."""
    if not (owner / "report" / "report.html").exists():
        for argv in (
            owner.fit(),
            owner.search("--shortcuts", owner.maps),
            owner.score("--shortcuts", owner.maps),
            owner.train("--shortcuts", owner.maps),
            owner.search(out="plain-plans"),
            owner.score(plans="plain-plans", out="plain-scores"),
            owner.train(scores="plain-scores", out="plain-routers"),
            owner.evaluate(),
        ):
            succeed(capsys, *argv)
    return owner


def digest(owner: Owner) -> str:
    return load_shortcuts(owner.maps).digest


def test_a_fit_says_what_it_did_and_goes_on(
    made: Owner, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file.name: file.read_bytes() for file in made.maps.iterdir()}
    said = succeed(capsys, *made.fit())
    found = load_shortcuts(made.maps)
    assert said["shortcuts"] == str(made.maps)
    assert (said["rank"], said["digest"]) == (8, found.digest)
    assert said["layers"] == f"{len(found.mapped_layers)} of 10"
    assert (said["heldout_prompts"], found.training["prompts"]) == (9, 35)
    assert said["tokens"] == found.training["tokens"]
    assert said["divergence_of_one_skip"] < said["without_shortcut"]
    assert {file.name: file.read_bytes() for file in made.maps.iterdir()} == before
    code, out, _ = run(capsys, *made.fit())
    assert code == 0
    assert out.startswith(f"shortcuts: {made.maps}\nrank: 8\nlayers: ")


def test_every_folder_names_the_shortcuts_that_it_was_made_with(made: Owner) -> None:
    own = digest(made)
    assert read_static(made / "plans").shortcuts == own
    assert read_scores(made / "scores").shortcuts == own
    policy = load_policy(made.model)
    assert policy.shortcuts is not None
    assert policy.shortcuts.digest == own
    assert read_static(made / "plain-plans").shortcuts is None
    assert read_scores(made / "plain-scores").shortcuts is None
    assert load_policy(made / "plain-routers").shortcuts is None
    files = {file.name for file in (made.model / "routers").iterdir()}
    assert {"shortcuts.safetensors", "shortcut_config.json", "routers.onnx"} <= files


def test_scores_are_what_the_wrapped_model_does(made: Owner) -> None:
    table = read_scores(made / "scores")
    tokenizer = AutoTokenizer.from_pretrained(made.model)
    model = AutoModelForCausalLM.from_pretrained(made.model)

    def log_probs(row: int) -> torch.Tensor:
        ids = tokenizer(table.examples[row].prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            return model(ids).logits[0, -1].double().log_softmax(dim=-1)

    base = [log_probs(row) for row in range(8)]
    for number, plan in enumerate(table.plans):
        wrap_model(model, plan=plan, shortcuts=made.maps)
        for row in range(8):
            found = log_probs(row)
            assert table.agreement[row, number] == (found.argmax() == base[row].argmax())
            apart = float((found.exp() - base[row].exp()).abs().sum() / 2)
            assert table.total_variation[row, number] == pytest.approx(apart, abs=1e-4)
        unwrap_model(model)
    assert (table.plans == 0).any()


def test_the_report_is_of_policies_with_shortcuts(
    made: Owner, capsys: pytest.CaptureFixture[str]
) -> None:
    content = succeed(capsys, "report", "--run", made / "report")["evaluation"]
    assert "menu 0.90" in [policy["name"] for policy in content["policies"]]
    code, out, err = run(capsys, "report", "--run", made / "report", "--markdown")
    assert code == 0, err
    assert "menu 0.90" in out
    # Naming the routers' own again changes nothing.
    named = made.evaluate("--shortcuts", made.maps, out="named")
    again = succeed(capsys, *named)["evaluation"]
    shown = [
        [{key: value for key, value in each.items() if key != "time"} for each in found["policies"]]
        for found in (content, again)
    ]
    assert shown[0] == shown[1]


def test_processes_take_them_too_and_write_the_same_files(
    made: Owner, capsys: pytest.CaptureFixture[str]
) -> None:
    """Search, score and evaluation, which takes the shortcuts of its routers."""
    labels = ["--evaluations", 4, "--probe", 2, "--limit", 20, "--shortcuts", made.maps]
    many = ["--runner", "processes", "--workers", 2, "--threads", 1]
    succeed(capsys, *made.verb("search", "prompts", out="one/labels"), *labels)
    succeed(capsys, *made.verb("search", "prompts", out="two/labels"), *labels, *many)
    succeed(capsys, *made.score("--shortcuts", made.maps, out="two/scores"), *many)
    succeed(capsys, *made.evaluate(out="two/report"), *many)
    assert folder_bytes(made / "one" / "labels") == folder_bytes(made / "two" / "labels")
    assert folder_bytes(made / "scores") == folder_bytes(made / "two" / "scores")
    outcomes = [made / place / "outcomes.jsonl" for place in ("report", "two/report")]
    assert outcomes[0].read_bytes() == outcomes[1].read_bytes()
    argv = made.score("--shortcuts", made.maps, "--workers", 2, out="new")
    code, _, err = run(capsys, *argv)
    assert (code, "--workers was given, but the runner local has no" in err) == (1, True)
    assert not (made / "new").exists()


def test_generating_with_a_budget_loads_them_by_itself(
    made: Owner, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["generate", "--model", made.model, "--prompt", "Question 0: so?"]
    argv += ["--max-new-tokens", 12]
    said = succeed(capsys, *argv, "--budget", 0.8)
    assert "0" in said["plan"]
    fixed = succeed(capsys, *argv, "--plan", said["plan"], "--shortcuts", made.maps)
    assert fixed["text"] == said["text"]
    assert succeed(capsys, *argv, "--plan", said["plan"])["text"] != said["text"]
    again = succeed(capsys, *argv, "--budget", 0.8, "--shortcuts", made.model / "routers")
    assert again["text"] == said["text"]


def test_generating_with_a_plan(made: Owner, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", "--model", made.model, "--prompt", "Question 7: so?", "--plan", "0-4,7-9"]
    argv += ["--max-new-tokens", 12]
    plain = succeed(capsys, *argv)["text"]
    assert succeed(capsys, *argv, "--shortcuts", made.maps)["text"] != plain
    # Beside the model they are found under its name too.
    assert succeed(capsys, *argv, "--shortcuts", made.model)["text"] != plain
    out = made / "answers.jsonl"
    del argv[3:5]
    argv += ["--task", made / "heldout.jsonl", "--out", out, "--shortcuts", made.maps]
    assert succeed(capsys, *argv)["prompts"] == 10


def test_what_ships_runs_for_the_application_engineer(made: Owner, tmp_path: Path) -> None:
    """One folder, moved elsewhere, with nothing but the model and its routers."""
    place = shutil.copytree(made.model, tmp_path / "shipped")
    model = AutoModelForCausalLM.from_pretrained(place)
    wrap_model(model, budget=0.85)
    assert model.dynadepth.shortcuts.digest == digest(made)
    model(torch.tensor([[5, 6, 7, 8]]))
    assert model.dynadepth.last_mean_depth <= 1
    other = AutoModelForCausalLM.from_pretrained(place)
    with pytest.raises(ShortcutError, match="was calibrated with shortcuts"):
        wrap_model(other, budget=0.85, shortcuts=False)


def test_the_published_routers_learn_with_them_too(
    made: Owner, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = made.verb("search", "prompts", out="labels")
    labels += ["--evaluations", 4, "--probe", 2, "--limit", 20, "--shortcuts", made.maps]
    succeed(capsys, *labels)
    assert read_labels(made / "labels").manifest.shortcuts == digest(made)
    argv = made.verb("train", task=None, out="drllm")
    argv += ["--policy", "drllm", "--labels", made / "labels"]
    code, out, err = run(capsys, *argv)
    assert (code, out) == (1, "")
    assert f"the labels were made with shortcuts {digest(made)}, but now it is without" in err
    succeed(capsys, *argv, "--shortcuts", made.maps)
    assert load_policy(made / "drllm").shortcuts is not None
    # A search goes on with its own only.
    code, _, err = run(capsys, *labels[:-2])
    assert code == 1
    assert f'was made with shortcuts = "{digest(made)}", but now it is null' in err


def test_routers_of_all_layers_learn_with_them_too(
    made: Owner, capsys: pytest.CaptureFixture[str]
) -> None:
    maps = ("--shortcuts", made.maps)
    succeed(capsys, *made.score("--policy", "routers", *maps, out="router-scores"))
    argv = made.train("--policy", "routers", scores="router-scores", out="all")
    succeed(capsys, *argv, "--plans", made / "plans", *maps)
    assert load_policy(made / "all").shortcuts is not None
    # The plans that routers start from must have been chosen alike.
    code, out, err = run(capsys, *argv, "--plans", made / "plain-plans", *maps)
    assert (code, out) == (1, "")
    assert "the plans in" in err
    assert "made without shortcuts, but now it is with shortcuts" in err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        # Plans with, scores without, and the reverse.
        (lambda o, new: o.score(out=new), "were made with shortcuts {own}, but now it is without"),
        (
            lambda o, new: o.score("--shortcuts", o.maps, plans="plain-plans", out=new),
            "were made without shortcuts, but now it is with shortcuts {own}; give the same",
        ),
        # Scores with, training without, and the reverse.
        (
            lambda o, new: o.train(out=new),
            "the scores were made with shortcuts {own}, but now it is without shortcuts",
        ),
        (
            lambda o, new: o.train("--shortcuts", o.maps, scores="plain-scores", out=new),
            "the scores were made without shortcuts, but now it is with shortcuts {own}",
        ),
        # A policy with, static plans or training prompts without, and the reverse.
        (
            lambda o, new: o.evaluate(plans="plain-plans", out=new),
            "the plans were made without shortcuts, but now it is with shortcuts {own}",
        ),
        (
            lambda o, new: o.evaluate(scores="plain-scores", out=new),
            "the scores were made without shortcuts, but now it is with shortcuts {own}",
        ),
        (
            lambda o, new: o.evaluate(routers="plain-routers", out=new),
            "the plans were made with shortcuts {own}, but now it is without shortcuts",
        ),
        (
            lambda o, new: o.evaluate(
                "--shortcuts",
                o.maps,
                routers="plain-routers",
                plans="plain-plans",
                scores="plain-scores",
                out=new,
            ),
            "the routers in",
        ),
        # Two policies that skip otherwise.
        (
            lambda o, new: o.evaluate("--against", o / "plain-routers", out=new),
            "routers plain-routers were made without shortcuts, but now it is with shortcuts {own}",
        ),
    ],
)
def test_what_was_made_with_and_without_is_not_mixed(
    command: Any,
    words: str,
    made: Owner,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, err = run(capsys, *command(made, tmp_path / "new"))
    assert (code, out) == (1, "")
    assert words.format(own=digest(made)) in err
    assert not (tmp_path / "new").exists()


def test_a_run_goes_on_with_its_own_shortcuts_only(
    made: Owner, capsys: pytest.CaptureFixture[str]
) -> None:
    own = digest(made)
    for argv, words in (
        (made.search(), f'was made with shortcuts = "{own}", but now it is null'),
        (
            made.search("--shortcuts", made.maps, out="plain-plans"),
            f'was made with shortcuts = null, but now it is "{own}"',
        ),
        (made.fit("--new-tokens", 5), "was made with fit.new_tokens = 4, but now it is 5"),
        (made.fit("--rank", "full"), "was made with fit.rank = 8, but now it is "),
        (made.fit("--limit", 30), "was made with task.prompts = 44, but now it is 30"),
    ):
        code, out, err = run(capsys, *argv)
        assert (code, out) == (1, "")
        assert words in err


def test_the_shortcuts_of_another_model_or_fit_are_refused(
    made: Owner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_tiny_base(tmp_path / "other", num_layers=10, family="qwen3")
    base = AutoModelForCausalLM.from_pretrained(other)
    foreign = save_shortcuts(tmp_path / "foreign", random_shortcuts(base))
    own = AutoModelForCausalLM.from_pretrained(made.model)
    another = save_shortcuts(tmp_path / "another", random_shortcuts(own))
    new = tmp_path / "new"
    generate = ["generate", "--model", made.model, "--prompt", "Question 7: so?"]
    for place, plan_words, budget_words in (
        (foreign, *["belong to another base model than this LlamaForCausalLM"] * 2),
        (another, None, "was calibrated with shortcuts"),
    ):
        for argv in (
            made.search("--shortcuts", place, out=new),
            made.score("--shortcuts", place, out=new),
            made.train("--shortcuts", place, out=new),
            made.evaluate("--shortcuts", place, out=new),
        ):
            if place == another and argv[0] == "search":
                continue
            code, out, err = run(capsys, *argv)
            assert (code, out) == (1, "")
            assert (plan_words or "but now it is with shortcuts") in err
            assert not new.exists()
        code, out, err = run(capsys, *generate, "--budget", 0.9, "--shortcuts", place)
        assert (code, out) == (1, "")
        assert budget_words in err
    code, out, err = run(capsys, *generate, "--plan", "0-8", "--shortcuts", foreign)
    assert (code, out) == (1, "")
    assert "belong to another base model" in err


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda place: None, "expected what `dynadepth shortcuts` writes"),
        (lambda place: place.mkdir(), "make it with `dynadepth shortcuts`"),
    ],
)
def test_a_folder_without_shortcuts_is_named(
    made: Owner, tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Any, words: str
) -> None:
    make(tmp_path / "nothing")
    for argv in (
        made.search("--shortcuts", tmp_path / "nothing", out=tmp_path / "new"),
        made.score("--shortcuts", tmp_path / "nothing", out=tmp_path / "new"),
        made.train("--shortcuts", tmp_path / "nothing", out=tmp_path / "new"),
    ):
        code, out, err = run(capsys, *argv)
        assert (code, out) == (1, "")
        assert words in err
        assert not (tmp_path / "new").exists()


def test_too_few_prompts_and_a_rank_too_high_leave_nothing(
    made: Owner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more, words in (
        (("--limit", 9), "9 different prompts cannot fit shortcuts; give 10 or more"),
        (("--rank", 33), "rank is 33, more than the 32 numbers of a state"),
        (("--device", "nonsense"), "device 'nonsense' is unknown to torch"),
    ):
        code, out, err = run(capsys, *made.fit(*more, out=tmp_path / "new"))
        assert (code, out) == (1, "")
        assert words in err
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "more",
    [
        ("--rank", "half"),
        ("--rank", "-1"),
        ("--rank", "2.5"),
        ("--rank", ""),
        ("--distil", "-1"),
        ("--new-tokens", "-1"),
        ("--limit", "0"),
        ("--seed", "-1"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2(
    owner: Owner, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, str]
) -> None:
    code, out, err = run(capsys, *owner.fit(*more, out=tmp_path / "new"))
    assert (code, out) == (2, "")
    assert more[0] in err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("verb", ["score", "shortcuts"])
def test_without_the_search_application_a_verb_says_what_is_missing(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "entry_points", lambda *, group: [])
    code, _, err = run(capsys, verb, "--model", "x")
    assert code == 2
    assert f"the command '{verb}' is not available; it belongs to dynadepth-search" in err


def test_a_line_that_cannot_be_read_is_named_before_a_model_is_loaded(
    owner: Owner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.jsonl").write_text('{"prompt": "fine"}\n{"prompt": "half \\ud83d"}\n')
    argv = ["shortcuts", "--model", tmp_path / "no-such-model"]
    argv += ["--task", tmp_path / "broken.jsonl", "--out", tmp_path / "new"]
    code, _, err = run(capsys, *argv)
    assert code == 1
    assert "line 2: `prompt` holds '\\ud83d' at character 5" in err
