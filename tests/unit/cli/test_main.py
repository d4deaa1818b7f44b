"""The command line: exit codes, streams, plugins, and that a failure leaves nothing behind."""

import importlib.metadata
import json
import shutil
import subprocess
import sys
import types

import pytest
import typer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynadepth.cli import main as cli
from dynadepth.errors import LabelError
from dynadepth.models import loading

PROMPT = "The sky is"


def run(capsys, *argv):
    """Return exit code, stdout and stderr of one command line."""
    capsys.readouterr()
    code = cli.main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def plugin(monkeypatch, register, name="plugged"):
    """Make `register` the only plugin."""
    module = types.ModuleType("a_plugin")
    module.register = register
    monkeypatch.setitem(sys.modules, "a_plugin", module)
    entry = importlib.metadata.EntryPoint(name, "a_plugin:register", "dynadepth.commands")
    monkeypatch.setattr(cli, "entry_points", lambda *, group: [entry])
    assert entry.group == "dynadepth.commands"


def raising(error):
    def register(app):
        def fail():
            raise error

        app.command("fail")(fail)
        app.command("idle")(lambda: None)

    return register


def test_the_version_is_the_distributions(capsys):
    code, out, _ = run(capsys, "--version")
    assert (code, out) == (0, f"dynadepth {importlib.metadata.version('dynadepth')}\n")


def test_help_names_the_verbs_of_the_runtime_and_of_the_search_application(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    verbs = {line.split()[0] for line in out.partition("Commands:")[2].splitlines() if line.strip()}
    assert verbs >= {
        "generate",
        "bake",
        "export",
        "push",
        "search",
        "train",
        "eval",
        "report",
        "demo",
    }


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], ""),
        (["genrate"], "No such command 'genrate'. Did you mean 'generate'?"),
        (["generate"], "Missing option '--model'"),
        (
            ["generate", "--model", "m", "--prompt", "p"],
            "give one of --budget, --fidelity and --plan",
        ),
        (
            ["generate", "--model", "m", "--prompt", "p", "--budget", "0.8", "--plan", "1"],
            "give one of --budget, --fidelity and --plan",
        ),
        (
            ["generate", "--model", "m", "--prompt", "p", "--plan", "1", "--routers", "r"],
            "a --plan needs no routers",
        ),
        (["generate", "--model", "m", "--prompt", " ", "--plan", "1"], "--prompt is empty"),
        (
            ["generate", "--model", "m", "--prompt", "p", "--budget", "much"],
            "Invalid value for '--budget'",
        ),
        (
            ["generate", "--model", "m", "--prompt", "p", "--plan", "1", "--max-new-tokens", "0"],
            "--max-new-tokens",
        ),
        (["export", "--routers", "no/where"], "--routers no/where is not a folder, so --out"),
        (["bake", "--model", "m", "--plan", "1"], "Missing option '--out'"),
        (["push", "--routers", "no/where", "--repo", "org/name"], "no/where is not a folder"),
        (["push", "--routers", "."], "Missing option '--repo'"),
        (["--plan"], "No such option: --plan"),
    ],
)
def test_a_wrong_command_line_exits_2_and_prints_no_result(capsys, argv, message):
    code, out, err = run(capsys, *argv)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    # Without any argument the help is the answer.
    assert out == "" or argv == []


def test_our_errors_are_one_line_and_exit_1(capsys, monkeypatch):
    plugin(monkeypatch, raising(LabelError("labels of another model; search again")))
    assert run(capsys, "fail") == (1, "", "error: labels of another model; search again\n")


def test_a_missing_file_is_one_line_and_exits_1(capsys, monkeypatch):
    plugin(monkeypatch, raising(FileNotFoundError(2, "No such file", "x.json")))
    code, out, err = run(capsys, "fail")
    assert (code, out) == (1, "")
    assert err == "error: [Errno 2] No such file: 'x.json'\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    plugin(monkeypatch, raising(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        cli.main(["fail"])


def test_a_plugin_adds_its_verbs_anew_for_every_command_line(capsys, monkeypatch):
    def register(app: typer.Typer) -> None:
        @app.command("one")
        def _one() -> None:
            typer.echo("one")

        @app.command("two")
        def _two() -> None:
            typer.echo("two")

    plugin(monkeypatch, register)
    assert run(capsys, "one") == (0, "one\n", "")
    assert run(capsys, "two") == (0, "two\n", "")


@pytest.mark.parametrize("error", [ImportError("no module pyarrow"), TypeError("old interface")])
def test_a_plugin_that_does_not_load_is_named_and_costs_its_own_verbs_only(
    capsys, monkeypatch, error
):
    def register(app):
        raise error

    plugin(monkeypatch, register)
    code, out, err = run(capsys, "--version")
    assert code == 0
    assert out.startswith("dynadepth ")
    assert "'a_plugin:register' of another distribution do not load" in err
    assert f"({type(error).__name__}: {error}); install that distribution again" in err


def test_a_verb_of_a_missing_distribution_says_where_it_comes_from(capsys, monkeypatch):
    monkeypatch.setattr(cli, "entry_points", lambda *, group: [])
    code, out, err = run(capsys, "demo", "--quick")
    assert (code, out) == (2, "")
    assert "'demo' is not available; it belongs to dynadepth-search" in err
    assert "pip install ./search" in err


@pytest.mark.parametrize("verb", ["generate", "bake"])
def test_a_wrong_model_id_names_what_was_tried(capsys, tmp_path, monkeypatch, verb):
    monkeypatch.chdir(tmp_path)
    rest = ["--prompt", PROMPT] if verb == "generate" else ["--out", "baked"]
    code, out, err = run(capsys, verb, "--model", "nobody/nothing", "--plan", "1111", *rest)
    assert (code, out) == (1, "")
    assert err.startswith("error: cannot load the model 'nobody/nothing': tried the folder ")
    assert f"{tmp_path / 'nobody/nothing'}, which does not exist, then the Hub id" in err
    assert "give a folder with config.json and weights, or a Hub id that can be reached" in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_model_is_named(capsys, tmp_path):
    code, _, err = run(
        capsys, "generate", "--model", tmp_path, "--prompt", PROMPT, "--plan", "1111"
    )
    assert code == 1
    assert f"{str(tmp_path)!r}" in err
    assert "Traceback" not in err


def test_a_damaged_weights_file_is_named(capsys, tiny_copy):
    weights = tiny_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, out, err = run(
        capsys, "generate", "--model", tiny_copy, "--prompt", PROMPT, "--plan", "1111"
    )
    assert (code, out) == (1, "")
    assert f"tried the folder {tiny_copy} (SafetensorError: " in err


def test_missing_weights_are_refused_rather_than_drawn_at_random(capsys, tiny_copy):
    weights = load_file(tiny_copy / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tiny_copy / "model.safetensors", metadata={"format": "pt"})
    code, _, err = run(
        capsys, "generate", "--model", tiny_copy, "--prompt", PROMPT, "--plan", "1111"
    )
    assert code == 1
    assert "lack 1 tensors of the model (model.norm.weight)" in err


def test_a_model_that_is_no_causal_language_model_is_refused(capsys, tiny_copy):
    (tiny_copy / "config.json").write_text(json.dumps({"model_type": "t5"}))
    code, _, err = run(
        capsys, "generate", "--model", tiny_copy, "--prompt", PROMPT, "--plan", "1111"
    )
    assert code == 1
    assert "is not a causal language model that transformers can build" in err


@pytest.fixture
def tiny_copy(tiny_base, tmp_path):
    """A copy of the tiny base model that a test may damage."""
    return shutil.copytree(tiny_base, tmp_path / "base")


def generate(capsys, tiny_base, *more):
    code, out, err = run(
        capsys, "generate", "--model", tiny_base, "--prompt", PROMPT, "--max-new-tokens", 8, *more
    )
    assert code == 0, err
    return out, err


def test_generate_with_the_identity_is_the_base_model(capsys, tiny_base):
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    names = ("input_ids", "attention_mask")
    tokens = model.generate(**{name: inputs[name] for name in names}, max_new_tokens=8)
    expected = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    out, err = generate(capsys, tiny_base, "--plan", "1111")
    assert out == expected + "\n"
    assert "depth 1.000, plan 1111, 8 tokens in " in err


@pytest.mark.parametrize("plan", ["1020", "0,2,2"])
def test_generate_follows_the_plan_and_says_so_in_json(capsys, tiny_base, plan):
    out, _ = generate(capsys, tiny_base, "--plan", plan, "--json")
    result = json.loads(out)
    assert result["plan"] == "1020"
    assert result["depth"] == 0.75
    assert result["new_tokens"] == 8
    assert result["budget"] is None
    identity, _ = generate(capsys, tiny_base, "--plan", "1111", "--json")
    assert json.loads(identity)["text"] != result["text"]


def test_sampling_follows_the_seed(capsys, tiny_base):
    def sample(seed):
        return generate(capsys, tiny_base, "--plan", "1111", "--temperature", 9, "--seed", seed)[0]

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_generate_with_a_plan_of_another_model_fails_before_it_generates(capsys, tiny_base):
    code, out, err = run(
        capsys, "generate", "--model", tiny_base, "--prompt", PROMPT, "--plan", "11111"
    )
    assert (code, out) == (1, "")
    assert "a plan names 5 layers, but the model has 4 decoder layers" in err


def test_a_chat_needs_a_template(capsys, tiny_base):
    code, out, err = run(
        capsys, "generate", "--model", tiny_base, "--prompt", PROMPT, "--plan", "1111", "--chat"
    )
    assert (code, out) == (1, "")
    assert "the tokenizer has no chat template; leave the chat form out" in err


def test_a_chat_uses_the_template(capsys, tiny_copy):
    tokenizer = AutoTokenizer.from_pretrained(tiny_copy)
    tokenizer.chat_template = "{% for m in messages %}Q: {{ m.content }} A:{% endfor %}"
    tokenizer.save_pretrained(tiny_copy)
    chat, _ = generate(capsys, tiny_copy, "--plan", "1111", "--chat")
    code, plain, _ = run(
        capsys,
        *("generate", "--model", tiny_copy, "--prompt", f"Q: {PROMPT} A:", "--plan", "1111"),
        *("--max-new-tokens", 8),
    )
    assert code == 0
    assert chat == plain


def test_bake_writes_a_plain_checkpoint_of_the_plan(capsys, tiny_base, tmp_path):
    out_folder = tmp_path / "new" / "baked"
    code, out, _ = run(
        capsys, "bake", "--model", tiny_base, "--plan", "0,2,2-3", "--out", out_folder, "--json"
    )
    assert code == 0
    assert json.loads(out) == {"depth": 1.0, "out": str(out_folder), "plan": "1021"}
    assert [path.name for path in out_folder.parent.iterdir()] == ["baked"]
    baked = AutoModelForCausalLM.from_pretrained(out_folder)
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    source = [0, 2, 2, 3]
    assert len(baked.model.layers) == len(source)
    for layer, origin in zip(baked.model.layers, source, strict=True):
        assert layer.mlp.up_proj.weight.equal(base.model.layers[origin].mlp.up_proj.weight)
    tokenizer = AutoTokenizer.from_pretrained(out_folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = baked.generate(input_ids=inputs["input_ids"], max_new_tokens=8)
    expected = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert generate(capsys, tiny_base, "--plan", "1021")[0] == expected + "\n"


def test_bake_does_not_overwrite(capsys, tiny_base, tmp_path):
    (tmp_path / "mine").write_text("keep")
    code, out, err = run(capsys, "bake", "--model", tiny_base, "--plan", "1021", "--out", tmp_path)
    assert (code, out) == (1, "")
    assert f"{tmp_path} exists and is not an empty folder; give a new folder as --out" in err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_bake_with_a_wrong_plan_leaves_nothing(capsys, tiny_base, tmp_path):
    code, _, err = run(
        capsys, "bake", "--model", tiny_base, "--plan", "0000", "--out", tmp_path / "baked"
    )
    assert code == 1
    assert "skips all 4 layers" in err
    assert list(tmp_path.iterdir()) == []


def test_bake_with_shortcuts_points_to_fold(capsys, tiny_base, tmp_path):
    argv = ["bake", "--model", tiny_base, "--plan", "1011", "--out", tmp_path / "baked"]
    code, out, err = run(capsys, *argv, "--shortcuts", tmp_path)
    assert (code, out) == (1, "")
    assert err.startswith("error: a plain checkpoint has no place for shortcuts: each is a map of")
    assert "`dynadepth fold` fits maps that can be multiplied into the weights" in err
    assert list(tmp_path.iterdir()) == []


def test_generate_finds_the_routers_beside_the_model(capsys, tiny_routed):
    shallow = json.loads(generate(capsys, tiny_routed, "--budget", 0.5, "--json")[0])
    deep = json.loads(generate(capsys, tiny_routed, "--budget", 1, "--json")[0])
    assert shallow["budget"] == 0.5
    assert shallow["depth"] < deep["depth"]
    assert len(shallow["plan"]) == 4


def test_generate_takes_routers_from_elsewhere(capsys, tiny_base, tiny_routed):
    here = generate(capsys, tiny_routed, "--budget", 0.7)[0]
    there = generate(capsys, tiny_base, "--budget", 0.7, "--routers", tiny_routed / "routers")[0]
    assert here == there


def test_generate_without_routers_says_where_it_looked(capsys, tiny_base):
    code, out, err = run(
        capsys, "generate", "--model", tiny_base, "--prompt", PROMPT, "--budget", "0.7"
    )
    assert (code, out) == (1, "")
    assert f"there is no {tiny_base / 'routers/router_config.json'} beside the base model" in err
    assert "dynadepth train" in err


@pytest.mark.parametrize("budget", ["-1", "0", "nan", "3"])
def test_a_budget_outside_the_calibrated_range_names_the_range(capsys, tiny_routed, budget):
    code, out, err = run(
        capsys, "generate", "--model", tiny_routed, "--prompt", PROMPT, "--budget", budget
    )
    assert (code, out) == (1, "")
    assert "0.5 to 1.0" in err
    assert err.splitlines()[-1].startswith("error: ")


def test_export_writes_beside_the_routers_and_generate_decides_with_it(
    capsys, tiny_routed, tmp_path
):
    folder = shutil.copytree(tiny_routed, tmp_path / "model")
    code, out, _ = run(capsys, "export", "--routers", folder / "routers")
    target = folder / "routers" / "routers.onnx"
    assert (code, out) == (0, f"{target}\n")
    with_torch = generate(capsys, folder, "--budget", 0.7)[0]
    target.rename(tmp_path / "moved.onnx")
    code, out, _ = run(capsys, "export", "--routers", folder / "routers", "--out", target, "--json")
    assert code == 0
    assert json.loads(out) == {"bytes": target.stat().st_size, "out": str(target)}
    assert generate(capsys, folder, "--budget", 0.7, "--router-backend", "onnx")[0] == with_torch
    target.write_bytes(target.read_bytes()[:100])
    code, out, err = run(
        capsys,
        *("generate", "--model", folder, "--prompt", PROMPT, "--budget", "0.7"),
        *("--router-backend", "onnx"),
    )
    assert (code, out) == (1, "")
    assert "routers.onnx" in err


def test_export_of_damaged_routers_leaves_nothing(capsys, tiny_routed, tmp_path):
    routers = shutil.copytree(tiny_routed / "routers", tmp_path / "routers")
    weights = routers / "routers.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    before = sorted(path.name for path in routers.iterdir())
    code, out, err = run(capsys, "export", "--routers", routers)
    assert (code, out) == (1, "")
    assert f"{weights} is damaged" in err
    assert sorted(path.name for path in routers.iterdir()) == before


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "dynadepth"]
    given = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    version = importlib.metadata.version("dynadepth")
    assert (given.returncode, given.stdout) == (0, f"dynadepth {version}\n")
    wrong = subprocess.run([*command, "no-such-verb"], capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stdout) == (2, "")


@pytest.mark.parametrize("name", ["./no-such-model", "/no/such/model", "runs/demo/model", "model/"])
def test_a_mistyped_path_of_a_model_never_asks_the_hub(capsys, monkeypatch, name):
    def asked(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", asked)
    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", asked)
    options = ("--model", name, "--prompt", "a", "--plan", "0-3")
    code, out, err = run(capsys, "generate", *options)
    assert (code, out) == (1, "")
    assert "which does not exist" in err
    assert "Hub id '" not in err


def test_weights_that_git_lfs_has_not_fetched_are_named(capsys, tiny_copy):
    (tiny_copy / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 12345\n"
    )
    options = ("--model", str(tiny_copy), "--prompt", "a", "--plan", "0-3")
    code, _, err = run(capsys, "generate", *options)
    assert code == 1
    assert "model.safetensors is a Git LFS pointer" in err
