"""lm-evaluation-harness with a wrapped model: likelihoods under plans of the contexts alone, and the stock model's."""

import json
import sys

import numpy as np
import pytest
import torch

from dynadepth import unwrap_model, wrap_model
from dynadepth.checkpoints.save_load import save_policy
from dynadepth.cli import main as cli
from dynadepth.errors import ConfigError, UnsupportedModelError
from dynadepth.models.fingerprint import fingerprint
from dynadepth.models.loading import load_model, load_tokenizer
from dynadepth_search.data.tasks import Example
from dynadepth_search.scoring.scorer import Scorer
from tests.tiny_exits import random_exits
from tests.tiny_menus import random_menu

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, get_peft_model

from dynadepth_search.harness.model import DynadepthLM

pytestmark = pytest.mark.usefixtures("search_verbs")

CONTEXTS = ("why is snow", "the river is deep and", "red", "it is the day of the sun and")
CHOICES = ("up", "down and out", "on the way", "1")
PLANS = np.array([[1, 1, 1, 1], [1, 1, 0, 1], [1, 0, 1, 0], [1, 1, 2, 1]], dtype=np.uint8)
DEVICE = {"device": "cpu", "dtype": "float32"}


def requests(kind, arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=number)
        for number, each in enumerate(arguments)
    ]


def scored(model, pairs):
    return model.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)


PAIRS = [(context, f" {choice}") for context in CONTEXTS for choice in CHOICES]


@pytest.fixture(scope="module")
def menu(tiny_base, tmp_path_factory):
    """A menu that gives these contexts different plans."""
    model = load_model(str(tiny_base))
    made = random_menu(
        layers=(1,), hidden_size=32, plans=PLANS, seed=1, fingerprint=fingerprint(model)
    )
    return save_policy(tmp_path_factory.mktemp("menu") / "menu", made)


def alone(base, pairs, **how):
    """Return the log-likelihood of each continuation, planned by its context alone and run without a batch."""
    model, tokenizer = load_model(str(base)), load_tokenizer(str(base))
    wrap_model(model, **how)
    found = []
    for context, continuation in pairs:
        prompt = tokenizer(context).input_ids
        whole = tokenizer(context + continuation).input_ids
        assert whole[: len(prompt)] == prompt
        plans = model.dynadepth.plan_prompts(torch.tensor([prompt]))
        with model.dynadepth.plans(plans), torch.no_grad():
            logits = model(torch.tensor([whole[:-1]]), use_cache=False).logits[0].double()
        places = range(len(prompt) - 1, len(whole) - 1)
        scores = logits.log_softmax(dim=-1)
        found.append(sum(float(scores[at, whole[at + 1]]) for at in places))
    return found


@pytest.mark.parametrize("batch_size", [1, 4, "auto"])
def test_identity_is_the_stock_model_to_the_last_bit(tiny_base, batch_size):
    given = {"pretrained": str(tiny_base), "batch_size": batch_size, "max_length": 64, **DEVICE}
    stock, ours = HFLM(**given), DynadepthLM(plan="0-3", **given)
    assert scored(ours, PAIRS) == scored(stock, PAIRS)
    texts = [(context,) for context in CONTEXTS]
    rolling = [
        each.loglikelihood_rolling(requests("loglikelihood_rolling", texts))
        for each in (stock, ours)
    ]
    assert rolling[0] == rolling[1]
    asked = [(context, {"until": ["."], "max_gen_toks": 6}) for context in CONTEXTS]
    texts = [
        each.generate_until(requests("generate_until", asked), disable_tqdm=True)
        for each in (stock, ours)
    ]
    assert texts[0] == texts[1]
    said = ours.get_model_info()["dynadepth"]
    assert (said["depth"], said["compute"], said["identity"]) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("batch_size", [1, 4, "auto"])
def test_no_plan_sees_the_continuation_or_the_padding(tiny_base, menu, batch_size):
    how = {"routers": str(menu), "budget": 0.7}
    model = DynadepthLM(
        pretrained=str(tiny_base), batch_size=batch_size, max_length=64, **how, **DEVICE
    )
    found = [score for score, _ in scored(model, PAIRS)]
    assert found == pytest.approx(alone(tiny_base, PAIRS, **how), abs=1e-4)
    said = model.get_model_info()["dynadepth"]
    assert said["prompts"] == len(CONTEXTS)

    # Our own scorer's, too.
    base, tokenizer = load_model(str(tiny_base)), load_tokenizer(str(tiny_base))
    wrap_model(base, **how)
    plans = np.concatenate(
        [
            base.dynadepth.plan_prompts(tokenizer(each, return_tensors="pt").input_ids)
            for each in CONTEXTS
        ]
    )
    unwrap_model(base)
    assert said["depth"] == pytest.approx(plans.mean())
    assert said["identity"] == pytest.approx((plans == 1).all(axis=1).mean())
    # Or the contexts would not tell.
    assert len(np.unique(plans, axis=0)) > 1
    examples = [Example(prompt=each, choices=CHOICES, answer=0) for each in CONTEXTS]
    outcomes = Scorer(base, tokenizer).outcomes(examples, plans, np.arange(len(examples)))
    assert found == pytest.approx(np.concatenate(outcomes.scores).tolist(), abs=1e-4)


def test_one_row_of_tokens_with_two_contexts_has_two_plans(tiny_base, menu):
    pairs = [
        ("the river is deep", " and red and"),
        ("the river is deep and", " red and"),
        ("the river", " is deep and red and"),
        ("the river is deep", " and red on"),
    ]
    how = {"routers": str(menu), "budget": 0.7}
    model = DynadepthLM(pretrained=str(tiny_base), batch_size=4, **how, **DEVICE)
    found = [score for score, _ in scored(model, pairs)]
    assert found == pytest.approx(alone(tiny_base, pairs, **how), abs=1e-4)


def test_what_is_too_long_is_cut_as_the_harness_cuts(tiny_base, menu):
    long = " ".join(CONTEXTS * 3)
    how = {"routers": str(menu), "budget": 0.7}
    given = {"pretrained": str(tiny_base), "max_length": 30, "batch_size": 2, **DEVICE}
    ours, stock = DynadepthLM(plan="0-3", **given), HFLM(**given)
    pairs = [(long, " up"), (long, " down and out")]
    assert scored(ours, pairs) == scored(stock, pairs)
    assert len(scored(DynadepthLM(**how, **given), pairs)) == 2


def test_exits_score_as_the_base_and_decode_as_asked(tiny_base, tmp_path):
    folder = save_policy(tmp_path / "exits", random_exits(load_model(str(tiny_base))))
    given = {"pretrained": str(tiny_base), "max_length": 64, **DEVICE}
    stock = HFLM(batch_size=4, **given)
    ours = DynadepthLM(routers=str(folder), budget=0.7, batch_size=4, **given)
    assert [each for each, _ in scored(ours, PAIRS)] == pytest.approx(
        [each for each, _ in scored(stock, PAIRS)], abs=1e-4
    )
    asked = [(context, {"until": ["."], "max_gen_toks": 8}) for context in CONTEXTS]
    ours.generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert ours.get_model_info()["dynadepth"]["passes"] < 1
    lossless = DynadepthLM(routers=str(folder), fidelity=1.0, batch_size=1, **given)
    texts = [
        each.generate_until(requests("generate_until", asked), disable_tqdm=True)
        for each in (HFLM(batch_size=1, **given), lossless)
    ]
    assert texts[0] == texts[1]
    lossless = DynadepthLM(routers=str(folder), fidelity=1.0, batch_size=4, **given)
    with pytest.raises(UnsupportedModelError):
        lossless.generate_until(requests("generate_until", asked), disable_tqdm=True)


def test_digits_that_the_harness_read_as_a_number_are_a_plan(tiny_base):
    model = DynadepthLM(pretrained=str(tiny_base), plan=111, **DEVICE)
    scored(model, PAIRS[:2])
    assert model.get_model_info()["dynadepth"]["depth"] == 0.75
    assert model.model.dynadepth.last_plans[0].tolist() == [0, 1, 1, 1]


def test_an_adapter_of_peft_is_scored_too(tiny_base, tmp_path):
    base = load_model(str(tiny_base))
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "lora")
    given = {"pretrained": str(tiny_base), "peft": str(tmp_path / "lora"), **DEVICE}
    stock = HFLM(**given)
    ours = DynadepthLM(plan="0-3", **given)
    assert scored(ours, PAIRS[:4]) == scored(stock, PAIRS[:4])
    assert scored(HFLM(pretrained=str(tiny_base), **DEVICE), PAIRS[:4]) != scored(stock, PAIRS[:4])


@pytest.mark.parametrize(
    "how", [{}, {"plan": "0-3", "budget": 0.9}, {"routers": "somewhere"}], ids=str
)
def test_exactly_one_dial_is_needed(tiny_base, how):
    with pytest.raises(ConfigError, match="exactly one of budget, fidelity and plan"):
        DynadepthLM(pretrained=str(tiny_base), **how, **DEVICE)


TASK = """
task: toy
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def test_from_the_command_line(tiny_base, menu, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    lines = [
        {"prompt": context, "choices": list(CHOICES), "answer": number % 4}
        for number, context in enumerate(CONTEXTS)
    ]
    file = tmp_path / "toy.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "toy.yaml").write_text(TASK.format(file=file))
    argv = ["lm-eval", "run", "--model", "dynadepth", "--tasks", "toy", "--device", "cpu"]
    argv += ["--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out")]
    argv += ["--batch_size", "2", "--model_args"]
    argv += [f"pretrained={tiny_base},routers={menu},budget=0.7,dtype=float32"]
    before = list(sys.argv)
    assert cli.main(argv) == 0, capfd.readouterr().err
    assert sys.argv == before
    assert "|toy" in capfd.readouterr().out
    (path,) = (tmp_path / "out").rglob("results_*.json")
    content = json.loads(path.read_text())
    said = content["config"]["dynadepth"]
    assert (said["asked"]["budget"], said["prompts"]) == ("0.7", len(CONTEXTS))
    base, tokenizer = load_model(str(tiny_base)), load_tokenizer(str(tiny_base))
    wrap_model(base, routers=menu, budget=0.7)
    plans = [
        base.dynadepth.plan_prompts(tokenizer(each, return_tensors="pt").input_ids)[0]
        for each in CONTEXTS
    ]
    unwrap_model(base)
    examples = [
        Example(prompt=line["prompt"], choices=CHOICES, answer=line["answer"]) for line in lines
    ]
    outcomes = Scorer(base, tokenizer).outcomes(examples, np.stack(plans), np.arange(4))
    assert content["results"]["toy"]["acc,none"] == pytest.approx(outcomes.correct.mean())
    assert said["depth"] == pytest.approx(np.stack(plans).mean())


def test_without_the_harness_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    assert cli.main(["lm-eval", "run"]) == 1
    assert "dynadepth-search[lm-eval]" in " ".join(capsys.readouterr().err.split())
