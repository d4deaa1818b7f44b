"""`dynadepth generate` with exits: a fidelity or a budget of passes, and tokens in the colour of where they left."""

import json
import re

import pytest
from transformers import AutoModelForCausalLM

from dynadepth.checkpoints.save_load import save_policy
from dynadepth.cli import main as cli
from dynadepth.cli.exit_colours import coloured, legend
from tests.tiny_exits import random_exits

ESCAPES = re.compile(r"\x1b\[\d+m")


def run(capsys, *argv):
    code = cli.main([str(each) for each in argv])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def exits(tiny_base, tmp_path_factory):
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    return save_policy(tmp_path_factory.mktemp("exits") / "exits", random_exits(model))


@pytest.fixture
def options(tiny_base, exits):
    given = ("generate", "--model", tiny_base, "--routers", exits)
    return (*given, "--prompt", "the river is deep", "--max-new-tokens", 12)


def test_an_answer_says_where_its_tokens_left(capsys, options):
    code, out, err = run(capsys, *options, "--budget", 0.7, "--json")
    assert code == 0, err
    answer = json.loads(out)
    run_before = answer["layers_run"]
    assert len(run_before) == answer["new_tokens"]
    # The prompt's own forward gives the first token.
    assert run_before[0] == 4
    assert set(run_before) - {4} <= {1, 2}
    assert min(run_before) < 4
    assert 0 < answer["passes"] < 1
    assert 0 <= answer["measured_fidelity"] <= 1
    assert "ids" not in answer


def test_colours_change_no_text(capsys, options):
    _, plain, _ = run(capsys, *options, "--budget", 0.7)
    code, shown, err = run(capsys, *options, "--budget", 0.7, "--show-exits")
    assert code == 0, err
    assert ESCAPES.search(shown)
    assert ESCAPES.sub("", shown).strip() == plain.strip()
    assert "before layer" in err
    assert "fidelity by audits" in err


def test_a_file_of_prompts_keeps_a_fidelity(capsys, options, tmp_path):
    task, out = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    task.write_text("why\nsnow\nblue sky and sea\n")
    argv = list(options)
    at = argv.index("--prompt")
    argv[at : at + 2] = ["--task", task, "--out", out]
    code, _, err = run(capsys, *argv, "--fidelity", 0.9)
    assert code == 0, err
    assert len(out.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "give one of --budget, --fidelity and --plan"),
        (("--budget", 0.7, "--fidelity", 0.9), "give one of"),
        (("--fidelity", 0.9, "--show-exits", "--json"), "--show-exits goes with --prompt"),
        (("--fidelity", 0.2), "which held-out prompts support"),
        (("--fidelity", "x"), "--fidelity"),
    ],
)
def test_wrong_options_say_so(capsys, options, more, message):
    code, _, err = run(capsys, *options, *more)
    assert code == 2 if "support" not in message else code == 1
    assert message in " ".join(err.split())


@pytest.mark.filterwarnings("ignore::dynadepth.errors.DynadepthWarning")
def test_routers_that_are_no_exits_are_named(capsys, tiny_routed):
    argv = ("generate", "--model", tiny_routed, "--prompt", "why")
    code, _, err = run(capsys, *argv, "--fidelity", 0.9)
    assert (code, "kind 'routers'" in err) == (1, True)
    code, _, err = run(capsys, *argv, "--budget", 0.7, "--show-exits")
    assert (code, "are no exits" in err) == (1, True)


class Bytes:
    """A tokenizer of bytes, several of which may make one character."""

    def decode(self, ids, *, skip_special_tokens):
        assert skip_special_tokens
        return bytes(ids).decode("utf-8", errors="replace")


def test_a_character_of_several_tokens_is_whole():
    ids = list("aé€b".encode())
    shown = coloured(Bytes(), ids, [4, 1, 1, 2, 2, 2, 4], 4)
    assert ESCAPES.sub("", shown) == "aé€b"
    assert "\N{REPLACEMENT CHARACTER}" not in shown


def test_the_legend_counts_all():
    assert (
        ESCAPES.sub("", legend([4, 1, 1, 2], 4))
        == "2 before layer 1, 1 before layer 2, 1 after all 4 layers"
    )
