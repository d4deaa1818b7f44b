"""What dynamic depth costs and saves at run time: wrapped, baked and routed models, in pairs within one run.

    python benches/python/bench_runtime.py --model smollm2 --json runtime-smollm2.json
    python benches/python/bench_runtime.py --model 1b --json runtime-1b.json         (random weights; over an hour)

Each comparison alternates A, B, B, A, ... and reports the median of the pairs' ratios with the order statistics that
enclose it with 95 % confidence. Everything is wrapped before the clock starts, and all models share one set of weights.
`--quick` runs a tiny model twice and only shows that the bench works.
"""

import argparse
import inspect
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

from dynadepth.models.fingerprint import fingerprint
from dynadepth.models.loading import load_model
from dynadepth.models.structure import layer_stack
from dynadepth.models.weight_sharing import share_weights
from dynadepth.plans import Plans, plan_depth, plan_ranges
from dynadepth.policies.base import Policy
from dynadepth.policies.menu import Menu, MenuHead
from dynadepth.policies.menu_policy import MenuPolicy
from dynadepth.policies.prompt_batch import PromptBatch
from dynadepth.policies.router_heads import RouterConfig, RouterHeads
from dynadepth.policies.router_policy import RouterPolicy
from dynadepth.shortcuts.maps import LinearShortcut, Shortcuts
from dynadepth.wrapping.bake import bake
from dynadepth.wrapping.wrap import wrap_model
from dynadepth_search.data.downloads import SMOLLM2, default_cache, fetch_model

DEPTH = 0.8
SHAPES: dict[str, dict[str, int]] = {
    "1b": {
        "vocab_size": 32768,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
}
Run = Callable[[], object]


def make_model(name: str, device: str, dtype: torch.dtype) -> Any:
    if name == "smollm2":
        model = load_model(str(fetch_model(default_cache(), source=SMOLLM2)))
    else:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[name]), dtype=dtype)
    return model.to(device, dtype).eval()


def baked_twin(model: Any, plan: Plans) -> Any:
    """Return the baked model, on the weights of `model`: another copy would be other memory to read from."""
    baked = bake(model, plan)
    layers = layer_stack(model).layers
    visits = np.repeat(np.arange(len(plan)), plan)
    for layer, layer_idx in zip(layer_stack(baked).layers, visits, strict=True):
        _share(layer, layers[int(layer_idx)])
    own = {id(each) for layer in layers for each in layer.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in own:
            path, _, leaf = name.rpartition(".")
            baked.get_submodule(path)._parameters[leaf] = parameter
    return baked.eval()


def _share(target: Any, source: Any) -> None:
    for module, other in zip(target.modules(), source.modules(), strict=True):
        module._parameters.update(other._parameters)


def menu_plans(num_layers: int, first: int, count: int = 4) -> Plans:
    """Return different plans of the same depth, which skip layers from `first` on."""
    skipped = max(1, round((1 - DEPTH) * num_layers))
    rng = np.random.default_rng(0)
    plans: dict[bytes, Plans] = {}
    while len(plans) < min(count, math.comb(num_layers - first, skipped)):
        plan = np.ones(num_layers, dtype=np.uint8)
        plan[rng.choice(np.arange(first, num_layers), size=skipped, replace=False)] = 0
        plans.setdefault(plan.tobytes(), plan)
    return np.stack(list(plans.values()))


def menu_policy(plans: Plans, hidden_size: int, first: int) -> MenuPolicy:
    """Return a menu of one random linear head on the last token's state."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(len(plans), hidden_size, generator=generator)
    return MenuPolicy(Menu(plans, (MenuHead(first, 0, weight, torch.zeros(len(plans))),)))


def router_policy(num_layers: int, hidden_size: int) -> RouterPolicy:
    """Return random heads of the default shape on every layer."""
    config = RouterConfig(num_layers=num_layers, hidden_size=hidden_size)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator) * hidden_size**-0.5
        for name, shape in RouterHeads.expected_shapes(config).items()
    }
    return RouterPolicy(RouterHeads.from_state_dict(config, tensors))


def random_shortcuts(model: Any, num_layers: int, hidden_size: int) -> Shortcuts:
    """Return maps of the default rank; their values do not matter for the time."""
    generator = torch.Generator().manual_seed(0)
    rank = max(1, hidden_size // 8)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * shape[0] ** -0.5

    maps = [
        LinearShortcut(
            normal(hidden_size, rank), normal(rank, hidden_size), torch.zeros(hidden_size)
        )
        for _ in range(num_layers)
    ]
    return Shortcuts(maps=maps, fingerprint=fingerprint(model), rank=rank)


class Decided(Policy):
    """Lets a policy decide, takes the time, and gives row r the plan r modulo the number of plans instead."""

    def __init__(self, policy: Policy, plans: Plans, clock: "Clock | None" = None) -> None:
        self._policy, self._plans, self._clock = policy, plans, clock
        self.num_layers, self.decision_layers = policy.num_layers, policy.decision_layers
        self.seconds = 0.0

    def initial_plans(self, num_rows: int) -> Plans:
        return self._policy.initial_plans(num_rows)

    def decide(self, layer_idx: int, hidden_states: torch.Tensor, prompts: PromptBatch) -> Plans:
        begin = self._clock.now() if self._clock else 0.0
        actions = self._policy.decide(layer_idx, hidden_states, prompts)
        self.seconds += self._clock.now() - begin if self._clock else 0.0
        rows = np.arange(len(actions)) % len(self._plans)
        return self._plans[rows, layer_idx : layer_idx + actions.shape[1]]


class Clock:
    """Wall time of a device; of an accelerator, once all its work is done."""

    def __init__(self, device: str) -> None:
        self._wait = torch.cuda.synchronize if device.startswith("cuda") else None

    def now(self) -> float:
        if self._wait is not None:
            self._wait()
        return time.perf_counter()

    def time(self, run: Run) -> float:
        begin = self.now()
        run()
        return self.now() - begin


def prefill(model: Any, ids: torch.Tensor) -> Run:
    def run() -> object:
        with torch.inference_mode():
            return model(ids, logits_to_keep=1)

    return run


def decode(model: Any, ids: torch.Tensor) -> Run:
    """Return one step of decoding, on a cache that grows by a token with every call."""
    # transformers 5.24 gives the argument another name.
    known = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in known else "past_key_values"
    with torch.inference_mode():
        cache = model(ids, logits_to_keep=1).past_key_values
    step = ids[:, :1].contiguous()

    def run() -> object:
        with torch.inference_mode():
            return model(step, **{name: cache})

    return run


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """Return the median and the order statistics around it with at least 95 % confidence, if there are so many."""
    ordered, count = sorted(values), len(values)
    cut, tail = 0, 0.5**count
    # P(at most `cut` of the values lie below the true median) must stay within 2.5 %.
    while cut + 1 < (count + 1) // 2 and tail + math.comb(count, cut + 1) * 0.5**count <= 0.025:
        cut += 1
        tail += math.comb(count, cut) * 0.5**count
    return statistics.median(ordered), ordered[cut], ordered[count - 1 - cut]


def rounds(options: argparse.Namespace) -> Iterator[int]:
    """Count until the time for one comparison is over."""
    began = time.perf_counter()
    for count in range(options.most_pairs):
        if count >= options.fewest_pairs and time.perf_counter() - began > options.seconds:
            return
        yield count


def figures(first: list[float], second: list[float]) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    found = dict(zip(("ratio", "low", "high"), median_interval(ratios), strict=True))
    milliseconds = [1e3 * statistics.median(each) for each in (first, second)]
    return {**found, "pairs": len(ratios), "milliseconds": milliseconds}


def in_pairs(first: Run, second: Run, clock: Clock, options: argparse.Namespace) -> dict[str, Any]:
    """Time two runs in turns; the ratio is of the first to the second."""
    for run in (first, second, second, first):
        run()
    seconds: tuple[list[float], list[float]] = ([], [])
    for count in rounds(options):
        for which in (0, 1) if count % 2 == 0 else (1, 0):
            seconds[which].append(clock.time((first, second)[which]))
    return figures(*seconds)


def router_share(
    model: Any, policy: Policy, ids: torch.Tensor, clock: Clock, options: argparse.Namespace
) -> dict[str, Any]:
    """Time the decisions inside a prefill in which all layers run, as a share of it."""
    timed = Decided(policy, np.ones((1, policy.num_layers), dtype=np.uint8), clock)
    run = prefill(wrap_model(share_weights(model), policy=timed), ids)
    run()
    deciding: list[float] = []
    whole: list[float] = []
    for _ in rounds(options):
        timed.seconds = 0.0
        whole.append(clock.time(run))
        deciding.append(timed.seconds)
    return figures(deciding, whole)


def check_equal(first: Any, second: Any) -> None:
    ids = torch.arange(8, device=first.device).unsqueeze(0)
    with torch.inference_mode():
        if not torch.equal(first(ids).logits, second(ids).logits):
            raise SystemExit("two models that are to be compared do not compute the same")


def kv_row(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    with torch.inference_mode():
        output = model(ids, logits_to_keep=1)
    kv, told = model.dynadepth.last_kv, model.dynadepth
    del output
    return {
        "held": kv.held,
        "plain": kv.plain,
        "saved": kv.saved / kv.plain,
        "depth": told.last_mean_depth,
        "distinct_plans": len(np.unique(told.last_plans, axis=0)),
    }


def bench_model(name: str, options: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    clock = Clock(options.device)
    say(f"{name}: build")
    model = make_model(name, options.device, getattr(torch, options.dtype))
    num_layers, hidden_size = model.config.num_hidden_layers, model.config.hidden_size
    first = num_layers // 4
    plans = menu_plans(num_layers, first)
    say(f"{name}: plans {', '.join(map(plan_ranges, plans))}, depth {plan_depth(plans)[0]:.3f}")
    menu = menu_policy(plans, hidden_size, first)
    routers = router_policy(num_layers, hidden_size)
    baked = baked_twin(model, plans[0])
    identity = wrap_model(share_weights(model), plan=[1] * num_layers)
    static = wrap_model(share_weights(model), plan=plans[0])
    maps = random_shortcuts(model, num_layers, hidden_size)
    mapped = wrap_model(share_weights(model), plan=plans[0], shortcuts=maps)
    grouped = wrap_model(share_weights(model), policy=Decided(menu, plans[:1]))
    mixed = wrap_model(share_weights(model), policy=Decided(menu, plans))
    check_equal(identity, model)
    check_equal(static, baked)
    rows: list[Any] = []
    memory: list[Any] = []

    def note(row: dict[str, Any], batch: int, work: str, what: str, goal: float | None) -> None:
        goal = None if name == "tiny" else goal
        rows.append(
            {"model": name, "batch": batch, "work": work, "what": what, "goal": goal, **row}
        )
        say(f"{name}, batch {batch}, {work}: {what} {row['ratio']:.4f}")

    rng = np.random.default_rng(0)
    for batch in options.batches:
        contests: list[tuple[str, Any, Any, float | None]] = [
            ("identity / plain", identity, model, 1.01),
            ("static / baked", static, baked, 1.03),
            ("static with shortcuts / baked", mapped, baked, 1.03),
            ("routed, one plan / plain", grouped, model, None),
        ]
        if batch > 1:
            contests.append(("routed, mixed rows / plain", mixed, model, None))
        for tokens in options.tokens:
            ids = torch.from_numpy(rng.integers(5, model.config.vocab_size, size=(batch, tokens)))
            ids = ids.to(options.device)
            for what, left, right, goal in contests:
                pair = in_pairs(prefill(left, ids), prefill(right, ids), clock, options)
                note(pair, batch, f"prefill {tokens}", what, goal)
            for what, policy in (("menu's share", menu), ("routers' share", routers)):
                goal = 0.005 if (name, tokens) == ("1b", 512) else None
                share = router_share(model, policy, ids, clock, options)
                note(share, batch, f"prefill {tokens}", what, goal)
            for what, wrapped in (("static", static), ("routed, mixed rows", mixed)):
                row = {"model": name, "batch": batch, "tokens": tokens, "what": what}
                memory.append({**row, **kv_row(wrapped, ids)})
        ids = ids[:, : options.tokens[0]]
        for what, left, right, goal in contests:
            pair = in_pairs(decode(left, ids), decode(right, ids), clock, options)
            note(pair, batch, "decode", what, goal)
    return rows, memory


def show(rows: list[Any], memory: list[Any]) -> None:
    lines = [
        "| model | batch | work | comparison | median ratio [95 %] | pairs | ms | goal |",
        "|---|---:|---|---|---|---:|---|---|",
    ]
    for row in rows:
        met = ""
        if row["goal"] is not None:
            met = f"<= {row['goal']:g}, {'met' if row['ratio'] <= row['goal'] else 'MISSED'}"
        digits = 4 if "share" in row["what"] else 3
        numbers = [f"{row[key]:.{digits}f}" for key in ("ratio", "low", "high")]
        lines.append(
            f"| {row['model']} | {row['batch']} | {row['work']} | {row['what']} | "
            f"{numbers[0]} [{numbers[1]}, {numbers[2]}] | {row['pairs']} | "
            f"{row['milliseconds'][0]:.2f} / {row['milliseconds'][1]:.2f} | {met} |"
        )
    lines += [
        "",
        "| model | batch | tokens | plans | distinct | mean depth | key-value MB | plain MB | saved |",
        "|---|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['model']} | {row['batch']} | {row['tokens']} | {row['what']} | {row['distinct_plans']} | "
        f"{row['depth']:.3f} | {row['held'] / 1e6:.2f} | {row['plain'] / 1e6:.2f} | {row['saved']:.1%} |"
        for row in memory
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["smollm2", "1b", "all"], default="all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 512], help="of a prefill")
    parser.add_argument("--seconds", type=float, default=30.0, help="for one comparison, about")
    parser.add_argument("--fewest-pairs", type=int, default=7)
    parser.add_argument("--most-pairs", type=int, default=200)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--quick", action="store_true", help="a small run that only shows that the bench works"
    )
    options = parser.parse_args()
    names = ["smollm2", "1b"] if options.model == "all" else [options.model]
    if options.quick:
        names, options.batches, options.tokens = ["tiny"], [1, 3], [8, 16]
        options.seconds, options.fewest_pairs, options.most_pairs = 0.0, 2, 2
    rows: list[Any] = []
    memory: list[Any] = []
    for name in names:
        for all_of, found in zip((rows, memory), bench_model(name, options), strict=True):
            all_of.extend(found)
    show(rows, memory)
    report = {
        "device": options.device,
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rows": rows,
        "memory": memory,
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
