"""`dynadepth check`: a verdict without weights."""

import json

import pytest

from dynadepth.cli import main as cli


def run(capsys, *argv):
    """Return exit code, stdout and stderr of one command line."""
    capsys.readouterr()
    code = cli.main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def config(tmp_path):
    """Write a config file and return its path."""

    def write(**settings):
        file = tmp_path / "config.json"
        file.write_text(json.dumps(settings))
        return file

    return write


GLM4 = {"model_type": "glm4", "num_hidden_layers": 40, "hidden_size": 4096}


@pytest.mark.parametrize("whole_folder", [True, False])
def test_a_config_is_enough(capsys, config, whole_folder):
    file = config(**GLM4)
    code, out, _ = run(capsys, "check", file.parent if whole_folder else file)
    assert code == 0
    lines = dict(line.split(maxsplit=1) for line in out.splitlines() if line.startswith(("m", "v")))
    assert lines == {"model": "Glm4ForCausalLM (model_type glm4)", "verdict": "exact"}
    assert "late exits             exact\n" in out


def test_json_has_the_whole_verdict(capsys, config):
    file = config(**GLM4)
    code, out, _ = run(capsys, "check", file, "--json", "--again")
    found = json.loads(out)
    assert code == 0
    assert (found["exact"], found["class"], found["num_layers"]) == (True, "Glm4ForCausalLM", 4)
    assert found["worst"] < 1e-11
    assert found["traits"]["feed_forward"] == "mlp"
    again = json.loads(run(capsys, "check", file, "--json")[1])
    assert again == found


def test_a_refusal_is_an_answer_and_an_exit_code(capsys, config):
    file = config(model_type="mamba", num_hidden_layers=2, hidden_size=16)
    code, out, err = run(capsys, "check", file)
    assert (code, err) == (1, "")
    assert "refused: MambaForCausalLM" in out
    assert "keeps states that are not keys and values by token" in out
    code, out, _ = run(capsys, "check", file, "--json")
    assert (code, json.loads(out)["exact"]) == (1, False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": "nope"}', "is not the config of a model that transformers can build"),
        ("{", "cannot load the config"),
        ('{"model_type": "t5"}', "is not a causal language model"),
        (
            '{"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}',
            "hidden size (30) is not a multiple of the number of attention heads",
        ),
    ],
)
def test_wrong_configs_are_one_line(capsys, tmp_path, content, message):
    file = tmp_path / "config.json"
    file.write_text(content)
    code, out, err = run(capsys, "check", file)
    assert (code, out) == (1, "")
    assert message in err
    assert "Traceback" not in err


def test_a_folder_that_is_not_there(capsys, tmp_path):
    code, _, err = run(capsys, "check", tmp_path / "nowhere")
    assert code == 1
    assert "which does not exist" in err
