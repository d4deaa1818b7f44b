"""A fit from prompts to a folder: killed anywhere it goes on to the same maps, and what it refuses."""

import itertools
import json
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynadepth import load_shortcuts, wrap_model
from dynadepth.errors import ConfigError, LabelError, ShortcutError, TaskError, WrapError
from dynadepth.shortcuts import save_load
from dynadepth_search.data.splits import prompt_hashes
from dynadepth_search.data.tasks import Example, Task
from dynadepth_search.shortcuts import building, choosing, moment_files, texts
from dynadepth_search.shortcuts.building import fit_shortcuts
from dynadepth_search.shortcuts.collecting import MomentCollector
from dynadepth_search.shortcuts.spec import ShortcutSpec
from tests.tiny import tiny_model
from tests.tiny_search import tiny_task

SPEC = ShortcutSpec(
    rank=8, new_tokens=4, ridges=(1e-3, 1e-1), num_heldout=3, num_places=3, batch_size=4
)
TASK = tiny_task(16, kind="prompt")


class Killed(BaseException):
    """Stands for a signal."""


@pytest.fixture(scope="module")
def base(tiny_base):
    return AutoModelForCausalLM.from_pretrained(tiny_base), AutoTokenizer.from_pretrained(tiny_base)


@pytest.fixture(scope="module")
def calm(base, tmp_path_factory):
    """A fit that nothing disturbed."""
    folder = tmp_path_factory.mktemp("calm") / "maps"
    return fit_shortcuts(*base, TASK, folder, SPEC), folder


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def contents(folder):
    return {name: (folder / name).read_bytes() for name in names(folder) if name != ".lock"}


class TestAFit:
    def test_what_it_leaves(self, calm, base, tiny_base):
        found, folder = calm
        assert names(folder) == [
            ".lock", "README.md", "shortcut_config.json", "shortcuts.safetensors",
        ]  # fmt: skip
        loaded = load_shortcuts(folder, model=base[0])
        assert loaded.digest == found.digest
        assert (found.folder, found.rank, found.base_model) == (folder, 8, tiny_base.name)
        assert {tensor.dtype for tensor in found.tensors().values()} == {torch.float32}
        assert [row["layer"] for row in found.layers] == [0, 1, 2, 3]
        assert [row["mapped"] for row in found.layers] == [each is not None for each in found.maps]
        assert {row["ridge"] for row in found.layers} <= set(SPEC.ridges)
        for row in found.layers:
            if row["mapped"]:
                assert row["divergence"] < row["divergence_without"]
        training = found.training
        assert (training["prompts"], training["heldout_prompts"]) == (13, 3)
        assert training["prompt_hashes"] == list(prompt_hashes(TASK.examples))
        assert training["asked"]["fit"]["ridges"] == [1e-3, 1e-1]
        wrap_model(AutoModelForCausalLM.from_pretrained(tiny_base), plan="0,2-3", shortcuts=folder)

    def test_the_card_says_what_was_measured(self, calm):
        found, folder = calm
        card = (folder / "README.md").read_text()
        assert card.count("\n| ") == 1 + len(found.layers)
        assert f"fitted on {found.training['tokens']} tokens of 13 prompts of colours" in card
        for row in found.layers:
            assert f"| {row['layer']} | {row['divergence_without']:.3f} |" in card

    def test_tokens_are_those_of_prompts_and_continuations_without_the_first(self, calm, base):
        found, _ = calm
        lengths = [len(base[1](example.prompt)["input_ids"]) + 4 - 1 for example in TASK.examples]
        # Three of sixteen are held out, and lengths differ.
        assert sum(sorted(lengths)[:13]) <= found.training["tokens"] <= sum(sorted(lengths)[3:])

    def test_again_elsewhere_it_is_the_same_to_the_byte(self, calm, base, tmp_path):
        fit_shortcuts(*base, TASK, tmp_path / "again", SPEC)
        assert contents(tmp_path / "again") == contents(calm[1])

    def test_the_model_is_not_changed(self, base, tmp_path):
        model, tokenizer = base
        traces = [(name, type(each), set(each.__dict__)) for name, each in model.named_modules()]
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        config = model.generation_config.to_dict()
        fit_shortcuts(model, tokenizer, TASK, tmp_path / "new", replace(SPEC, seed=3))
        assert traces == [
            (name, type(each), set(each.__dict__)) for name, each in model.named_modules()
        ]
        assert all(torch.equal(weights[name], each) for name, each in model.state_dict().items())
        assert model.generation_config.to_dict() == config

    def test_run_again_it_returns_at_once(self, calm, base, monkeypatch):
        found, folder = calm
        before = contents(folder)
        for module, name in (
            (building, "TextFile"), (building, "MomentFiles"), (building, "choose_maps"),
        ):  # fmt: skip
            monkeypatch.setattr(module, name, None)
        said = []
        again = fit_shortcuts(*base, TASK, folder, SPEC, progress=lambda *what: said.append(what))
        assert again.digest == found.digest
        assert contents(folder) == before
        assert said == []

    @pytest.mark.parametrize("rank", [0, 32, "full", None])
    def test_every_rank(self, base, tmp_path, rank):
        found = fit_shortcuts(*base, TASK, tmp_path / "new", replace(SPEC, rank=rank))
        assert found.rank == (4 if rank is None else rank)
        shapes = {
            tuple(each.A.shape) if each.A is not None else None for each in found.maps if each
        }
        assert shapes == {{0: None, "full": (32, 32), None: (32, 4), 32: (32, 32)}[rank]}

    def test_prompts_alone(self, base, tmp_path):
        found = fit_shortcuts(*base, TASK, tmp_path / "new", replace(SPEC, new_tokens=0))
        assert found.training["tokens"] > 0

    def test_progress_names_every_stage(self, base, tmp_path):
        said = []
        fit_shortcuts(*base, TASK, tmp_path / "new", SPEC, progress=lambda *what: said.append(what))
        stages = list(dict.fromkeys(stage for stage, _, _ in said))
        assert stages == [
            "continuing prompts", "moments", "held-out moments", "choosing shortcuts",
        ]  # fmt: skip
        for stage in stages:
            steps = [(done, total) for each, done, total in said if each == stage]
            assert steps[-1][0] == steps[-1][1]
            assert steps == sorted(steps)

    @pytest.mark.parametrize("family", ["gpt2", "gemma3", "falcon"])
    def test_other_families(self, base, family, tmp_path):
        model = tiny_model(family, dtype=torch.float32)
        found = fit_shortcuts(model, base[1], TASK, tmp_path / "new", SPEC)
        assert found.mapped_layers

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_maps_have_the_models_dtype(self, base, tmp_path, dtype):
        model = tiny_model(dtype=dtype)
        found = fit_shortcuts(model, base[1], TASK, tmp_path / "new", SPEC)
        assert {tensor.dtype for tensor in found.tensors().values()} == {dtype}


def killed_fit(monkeypatch, base, folder, owner, name, call):
    """Fit, and raise at a call of something, if there are so many, after which nothing of this process runs on."""
    own, counter = getattr(owner, name), itertools.count()

    def killed(*args, **kwargs):
        if next(counter) == call:
            raise Killed
        return own(*args, **kwargs)

    with monkeypatch.context() as patched, suppress(Killed):
        patched.setattr(owner, name, killed)
        fit_shortcuts(*base, TASK, folder, SPEC)


PLACES = [
    (texts.Journal, "append", 0),
    (texts.Journal, "append", 5),
    (texts, "continue_prompts", 1),
    (MomentCollector, "run", 0),
    (MomentCollector, "run", 2),
    (MomentCollector, "run", 4),
    (moment_files, "_write", 0),
    (moment_files, "_write", 1),
    (choosing, "score_texts", 0),
    (choosing, "score_texts", 2),
    (building, "write_text_atomic", 0),
    (building, "save_shortcuts", 0),
    (save_load, "write_bytes_atomic", 0),
    (save_load, "write_bytes_atomic", 1),
    (building.shutil, "rmtree", 0),
]


class TestKills:
    @pytest.mark.parametrize("every", [True, False])
    @pytest.mark.parametrize(
        ("owner", "name", "call"), PLACES, ids=[f"{name}-{call}" for _, name, call in PLACES]
    )
    def test_it_goes_on_to_the_same_bytes(
        self, calm, base, tmp_path, monkeypatch, owner, name, call, every
    ):
        """Killed there, and again where the next run gets to it; moments written after every batch or in the end."""
        found, folder = calm
        monkeypatch.setattr(moment_files, "_WRITE_SECONDS", -1.0 if every else 1e9)
        for _ in range(2):
            killed_fit(monkeypatch, base, tmp_path / "maps", owner, name, call)
        again = fit_shortcuts(*base, TASK, tmp_path / "maps", SPEC)
        assert again.digest == found.digest
        assert contents(tmp_path / "maps") == contents(folder)

    def test_other_settings_are_refused_before_it_is_finished_too(
        self, base, tmp_path, monkeypatch
    ):
        killed_fit(monkeypatch, base, tmp_path / "maps", building, "choose_maps", 0)
        assert names(tmp_path / "maps" / "work") == [
            "asked.json", "held-out-moments-0.safetensors", "moments-0.safetensors", "texts.jsonl",
        ]  # fmt: skip
        self.refuse_others(base, tmp_path / "maps")

    def test_other_settings_are_refused_afterwards(self, base, tmp_path, calm):
        before = contents(calm[1])
        self.refuse_others(base, calm[1])
        assert contents(calm[1]) == before

    def refuse_others(self, base, folder):
        for change, words in (
            ({"rank": 4}, "fit.rank = 8, but now it is 4"),
            ({"ridges": (1e-3,)}, "fit.ridges = [0.001, 0.1], but now it is [0.001]"),
            ({"new_tokens": 5}, "fit.new_tokens = 4, but now it is 5"),
            ({"batch_size": 5}, "fit.batch_size = 4, but now it is 5"),
            ({"num_heldout": 2}, "fit.num_heldout = 3, but now it is 2"),
            ({"num_places": 4}, "fit.num_places = 3, but now it is 4"),
            ({"seed": 1}, "fit.seed = 0, but now it is 1"),
        ):
            with pytest.raises(LabelError) as error:
                fit_shortcuts(*base, TASK, folder, replace(SPEC, **change))
            assert f"was made with {words}" in str(error.value)
        with pytest.raises(LabelError, match="was made with task.prompts = 16, but now it is 17"):
            fit_shortcuts(*base, tiny_task(17, kind="prompt"), folder, SPEC)
        changed = Task("colours", (*TASK.examples[:-1], Example("another")))
        with pytest.raises(LabelError, match="was made with task.sha256 = "):
            fit_shortcuts(*base, changed, folder, SPEC)
        with pytest.raises(LabelError, match='was made with dtype = "float32", but now it is "bf'):
            fit_shortcuts(tiny_model(dtype=torch.bfloat16), base[1], TASK, folder, SPEC)

    def test_another_model_is_refused(self, base, tmp_path, calm, monkeypatch):
        other = tiny_model(seed=1, dtype=torch.float32)
        with pytest.raises(ShortcutError, match="belong to another base model"):
            fit_shortcuts(other, base[1], TASK, calm[1], SPEC)
        killed_fit(monkeypatch, base, tmp_path / "maps", building, "choose_maps", 0)
        with pytest.raises(LabelError, match="was made with base_model = "):
            fit_shortcuts(other, base[1], TASK, tmp_path / "maps", SPEC)

    def test_damaged_work_is_named(self, base, tmp_path, monkeypatch):
        killed_fit(monkeypatch, base, tmp_path / "maps", building, "choose_maps", 0)
        work = tmp_path / "maps" / "work"
        for name in names(work):
            data = (work / name).read_bytes()
            (work / name).write_bytes(b"{}" + data[3:])
            with pytest.raises(LabelError, match=f"{name}.*(delete|again)"):
                fit_shortcuts(*base, TASK, tmp_path / "maps", SPEC)
            (work / name).write_bytes(data)
        asked = json.loads((work / "asked.json").read_text())
        (work / "asked.json").write_text(json.dumps({**asked, "dtype": "float64"}))
        with pytest.raises(LabelError, match=r"asked.json is damaged .*its seal is broken"):
            fit_shortcuts(*base, TASK, tmp_path / "maps", SPEC)

    def test_a_damaged_result_is_named(self, base, tmp_path):
        folder = tmp_path / "maps"
        fit_shortcuts(*base, TASK, folder, SPEC)
        (folder / "shortcuts.safetensors").write_bytes(b"")
        with pytest.raises(ShortcutError, match=r"shortcuts.safetensors is damaged"):
            fit_shortcuts(*base, TASK, folder, SPEC)


class TestWhatIsRefused:
    @pytest.mark.parametrize("count", [1, 9])
    def test_too_few_prompts(self, base, tmp_path, count):
        examples = tiny_task(count, kind="prompt").examples
        for each in (examples, examples * 3, (*examples, Example(f" {examples[0].prompt}\n"))):
            with pytest.raises(TaskError, match=f"^{count} different prompts cannot fit shortcuts"):
                fit_shortcuts(*base, Task("few", each), tmp_path / "new", SPEC)
        assert not (tmp_path / "new").exists()

    def test_prompts_that_repeat_are_held_out_whole(self, base, tmp_path):
        """Ten prompts, each five times: no copy of a held-out one is fitted on."""
        ten = tiny_task(10, kind="prompt")
        task = Task("repeated", ten.examples * 5)
        found = fit_shortcuts(*base, task, tmp_path / "new", SPEC)
        assert found.training["heldout_prompts"] == 2
        assert found.training["prompts"] == 40

    def test_a_rank_above_the_width(self, base, tmp_path):
        with pytest.raises(ConfigError, match="rank is 33, more than the 32 numbers of a state"):
            fit_shortcuts(*base, TASK, tmp_path / "new", replace(SPEC, rank=33))
        assert not (tmp_path / "new").exists()

    def test_a_wrapped_model(self, base, tmp_path):
        model = wrap_model(tiny_model(), plan="0-2")
        with pytest.raises(WrapError, match="before fitting shortcuts"):
            fit_shortcuts(model, base[1], TASK, tmp_path / "new", SPEC)
        assert not (tmp_path / "new").exists()

    def test_a_folder_that_another_run_is_writing(self, base, tmp_path):
        from dynadepth_search.files.locking import locked

        with (
            locked(tmp_path / "new"),
            pytest.raises(LabelError, match="another process is writing to"),
        ):
            fit_shortcuts(*base, TASK, tmp_path / "new", SPEC)

    def test_no_map_that_beats_nothing(self, base, tmp_path, monkeypatch):
        def worse(*args, **kwargs):
            return [choosing.ChosenMap(None, {"layer": layer}) for layer in range(4)]

        monkeypatch.setattr(building, "choose_maps", worse)
        with pytest.raises(ShortcutError, match="no map of rank 8 beats nothing on 3 held-out"):
            fit_shortcuts(*base, TASK, tmp_path / "new", SPEC)
        assert "shortcut_config.json" not in names(tmp_path / "new")

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"rank": "half"}, "rank is 'half'; expected a whole number of 0 or more, or full"),
            ({"rank": -1}, "rank is -1; expected 0 or more, or full"),
            ({"new_tokens": -1}, "new_tokens is -1; expected 0 or more"),
            ({"num_heldout": 0}, "num_heldout is 0; expected 1 or more"),
            ({"num_places": 0}, "num_places is 0; expected 1 or more"),
            ({"distil_steps": -1}, "distil_steps is -1; expected 0 or more"),
            ({"batch_size": 0}, "batch_size is 0; expected 1 or more"),
            ({"ridges": ()}, "ridges are .*; expected one or more, each above 0"),
            ({"ridges": (1e-3, 0.0)}, "ridges are .*; expected one or more, each above 0"),
            ({"ridges": (float("nan"),)}, "ridges are .*; expected one or more, each above 0"),
            ({"ridges": (float("inf"),)}, "ridges are .*; expected one or more, each above 0"),
        ],
    )
    def test_settings_out_of_range(self, change, words):
        with pytest.raises(ConfigError, match=words):
            ShortcutSpec(**change)

    def test_the_rank_by_default(self):
        ranks = [ShortcutSpec().rank_for(width) for width in (4, 8, 576, 1536)]
        assert ranks == [1, 1, 72, 192]
        assert ShortcutSpec(rank="full").rank_for(4) == "full"
        assert ShortcutSpec(rank=0).rank_for(4) == 0
