"""The search of plans for prompts, by the clock: against one forward for each plan, and the published procedure.

    python benches/python/bench_search.py --json search.json     (SmolLM2-135M, on two idle cores)

64 prompts of three kinds, objective `preserve`. The search runs as `dynadepth search prompts` runs it, but for
stopping early, so that every label takes `--evaluations` plans. What confirms the labels afterwards is timed by
itself, since the others confirm nothing. The same pairs of prompt and plan are then judged without sweeps: the
wrapped model runs batches of pairs, each under its own plan, at the batch size that is fastest, and at batch 1 as
published code does; a part of them before the search and a part after it, so that a machine that slows down slows
both. Setting the model up is not counted, nor the probe, which both need.

The goal is 0.8 of the sharing factor (how many visits of layers a sweep saves); what is missing of it is overhead. The
published procedure (Dr.LLM, arXiv 2510.12773) takes 240 evaluations for a label; what each finds is measured by
bench_forest.py. Operations are counted by torch, once, outside of what is timed, and compared with a large matrix
product of the same dtype.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from dynadepth.models.loading import load_model, load_tokenizer
from dynadepth.tree_search.forest import Forest
from dynadepth_search.data.downloads import SMOLLM2, default_cache, fetch_model
from dynadepth_search.data.kinds import fetch_kinds
from dynadepth_search.data.tasks import Example, Task
from dynadepth_search.scoring.runtime_checks import wrapped
from dynadepth_search.scoring.scorer import Scorer
from dynadepth_search.search.confirming import Confirmation
from dynadepth_search.search.per_prompt import search_prompts
from dynadepth_search.search.per_prompt_spec import PromptSearchSpec
from dynadepth_search.storage.labels import Labels, read_labels

PUBLISHED = 240
BATCHES = (1, 4, 8, 16, 32)


class Clock:
    """Sums the time that some functions take."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started

        return run


class Pairs:
    """Pairs of prompt and plan, judged by one row of a forward each.

    Args:
        scorer: Has the model, and encodes the prompts.
        examples: The prompts.
        plans: The plan of each pair.
        example: The prompt of each pair.
    """

    def __init__(
        self, scorer: Scorer, examples: Sequence[Example], plans: np.ndarray, example: np.ndarray
    ) -> None:
        self._scorer, self._examples, self._plans, self._example = scorer, examples, plans, example
        self._base: dict[int, torch.Tensor] = {}

    def read_base(self) -> None:
        """Read the base model's distributions, which every way of searching needs once."""
        for number, example in enumerate(self._examples):
            ids, mask = self._scorer.encode_prompts([example])
            self._base[number] = self._read(self._scorer.model, ids, mask)[0]

    def judge(self, pairs: np.ndarray, batch_size: int) -> np.ndarray:
        """Return the rewards of some pairs, minus the divergence from the base; rows of a batch are of like length."""
        lengths = [
            len(self._scorer.encode(self._examples[self._example[pair]]).prompt_ids)
            for pair in pairs
        ]
        order = pairs[np.argsort(lengths, kind="stable")]
        rewards = dict.fromkeys(pairs.tolist(), 0.0)
        with wrapped(self._scorer.model, plan=[1] * self._plans.shape[1]) as model:
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                numbers = self._example[batch].tolist()
                ids, mask = self._scorer.encode_prompts([self._examples[each] for each in numbers])
                with model.dynadepth.plans(self._plans[batch]):
                    read = self._read(model, ids, mask)
                base = torch.stack([self._base[each] for each in numbers])
                kl = (base.exp() * (base - read)).sum(dim=-1)
                rewards.update(zip(batch.tolist(), (-kl).tolist(), strict=True))
        return np.array([rewards[pair] for pair in pairs.tolist()])

    @staticmethod
    @torch.inference_mode()
    def _read(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        logits = model(
            input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1
        ).logits[:, -1]
        return torch.log_softmax(logits.float(), dim=-1)


def pairs_of(scorer: Scorer, labels: Labels) -> Pairs:
    plans = np.concatenate([each.plans for each in labels.evaluated])
    example = np.repeat(np.arange(len(labels)), [len(each) for each in labels.evaluated])
    return Pairs(scorer, labels.examples, plans, example)


def seconds_of(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def peak(dtype: torch.dtype, size: int, repeats: int) -> float:
    """Return the operations per second of a square matrix product, the median over repeats."""
    left = torch.randn(size, size).to(dtype)
    left @ left
    times = [seconds_of(lambda: left @ left) for _ in range(repeats)]
    return 2 * size**3 / statistics.median(times)


def hottest(scorer: Scorer, labels: Labels, count: int) -> list[dict[str, Any]]:
    """Return where the time of a sweep goes: the operators with the largest shares of their own."""
    plans = np.concatenate([each.plans for each in labels.evaluated[:count]])
    tree = np.repeat(np.arange(count), [len(each) for each in labels.evaluated[:count]])
    scorer.forget()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        scorer.rewards(labels.examples[:count], plans, tree, "preserve")
    events = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return [
        {
            "operator": event.key,
            "share": event.self_cpu_time_total / total,
            "calls": event.count,
        }
        for event in events[:10]
    ]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    source = str(fetch_model(default_cache(), source=SMOLLM2))
    model, tokenizer = load_model(source, dtype=options.dtype), load_tokenizer(source)
    drawn, _ = fetch_kinds(default_cache(), train=options.prompts, heldout=0)
    task = Task("three kinds", drawn.task.examples)
    default = PromptSearchSpec()
    config = replace(default.config, max_evaluations=options.evaluations, stop_at=0.0)
    spec = replace(default, config=config, block_size=min(16, options.prompts))
    scorer = Scorer(model, tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        # A first search, not measured: it warms everything up and says which pairs there are.
        counted = FlopCounterMode(display=False)
        with counted:
            alone = search_prompts(
                model, tokenizer, task, Path(scratch) / "first", replace(spec, confirm=0)
            )
        labels = read_labels(Path(scratch) / "first")
        pairs = pairs_of(scorer, labels)
        pairs.read_base()
        total = sum(len(each) for each in labels.evaluated)
        rng = np.random.default_rng(0)
        sample = rng.permutation(total)[: options.sample]
        tried = sample[: max(BATCHES)]
        rates = {size: seconds_of(lambda s=size: pairs.judge(tried, s)) for size in BATCHES}
        best = min(rates, key=lambda size: rates[size])
        before, after = np.array_split(sample, 2)
        separate = [seconds_of(lambda: pairs.judge(before, best))]
        single = [seconds_of(lambda: pairs.judge(before[:64], 1))]
        clock, confirming = Clock(), Clock()
        kept = Forest.ask, Forest.tell, Confirmation.choose
        Forest.ask, Forest.tell = clock.timed(Forest.ask), clock.timed(Forest.tell)
        Confirmation.choose = confirming.timed(Confirmation.choose)
        try:
            summary = search_prompts(model, tokenizer, task, Path(scratch) / "second", spec)
        finally:
            Forest.ask, Forest.tell, Confirmation.choose = kept
        separate.append(seconds_of(lambda: pairs.judge(after, best)))
        single.append(seconds_of(lambda: pairs.judge(after[:64], 1)))
        again = read_labels(Path(scratch) / "second")
        swept = np.concatenate([each.rewards for each in labels.evaluated])
        own = pairs.judge(sample[:64], best)
    most = peak(model.dtype, options.size, options.repeats)
    searching = summary.search_seconds - confirming.seconds
    per_pair = sum(separate) / len(sample)
    one_by_one = sum(single) / (len(before[:64]) + len(after[:64]))
    # Counted over probe and search, which do the same work per visit.
    probe = summary.probe_seconds / (summary.probe_seconds + searching)
    operations = counted.get_total_flops() * (1 - probe)
    faster = per_pair * total / searching
    return {
        "dtype": str(model.dtype),
        "threads": torch.get_num_threads(),
        "prompts": len(labels),
        "evaluations": total,
        "search_seconds": searching,
        "probe_seconds": summary.probe_seconds,
        "confirming_seconds": confirming.seconds,
        "confirmations": summary.confirming_evaluations,
        "prompts_per_hour": 3600 * len(labels) / searching,
        "prompts_per_hour_confirmed": 3600 * len(labels) / (searching + confirming.seconds),
        "batch": best,
        "seconds_by_batch": {str(size): found for size, found in rates.items()},
        "prompts_per_hour_separately": 3600 * len(labels) / (per_pair * total),
        "times_faster": faster,
        "sharing_factor": alone.sharing_factor,
        "of_sharing": faster / alone.sharing_factor,
        "labels_per_hour_published": 3600 / (PUBLISHED * one_by_one),
        "labels_per_hour_published_batched": 3600 / (PUBLISHED * per_pair),
        "tree_share": clock.seconds / searching,
        "operations_per_second": operations / searching,
        "peak_operations_per_second": most,
        "of_peak": operations / searching / most,
        "largest_difference": float(np.abs(swept[sample[:64]] - own).max()),
        "same_labels": bool((labels.raw_plans == again.raw_plans).all()),
        "hottest": hottest(scorer, labels, min(16, len(labels))),
    }


def show(found: dict[str, Any]) -> None:
    ours = found["prompts_per_hour"]
    print(
        f"{found['prompts']} prompts, {found['evaluations']} evaluations, {found['dtype']}, "
        f"{found['threads']} threads\n"
    )
    print("| way | labels per hour | against the search |\n|---|---:|---:|")
    for name, rate in (
        ("search, sweeps", ours),
        ("search, sweeps, labels confirmed", found["prompts_per_hour_confirmed"]),
        (
            f"the same plans one by one, batch {found['batch']}",
            found["prompts_per_hour_separately"],
        ),
        (f"published: {PUBLISHED} plans, batch 1", found["labels_per_hour_published"]),
        (
            f"published: {PUBLISHED} plans, batch {found['batch']}",
            found["labels_per_hour_published_batched"],
        ),
    ):
        print(f"| {name} | {rate:.0f} | {ours / rate:.2f} |")
    print(
        f"\nSharing factor {found['sharing_factor']:.2f}; of it the search is faster by {found['of_sharing']:.2f}. "
        f"The forests take {found['tree_share']:.2%} of the time; the search takes {found['search_seconds']:.0f} s, "
        f"the probe {found['probe_seconds']:.0f} s, {found['confirmations']} evaluations that confirm labels "
        f"{found['confirming_seconds']:.0f} s. {found['operations_per_second'] / 1e9:.0f} GFLOP/s, "
        f"{found['of_peak']:.0%} of a large matrix product's. Rewards differ from those of single forwards by at most "
        f"{found['largest_difference']:.3g}; searched again, the labels are "
        f"{'the same' if found['same_labels'] else 'others'}.\n"
    )
    print("| operator | share of a sweep | calls |\n|---|---:|---:|")
    for row in found["hottest"]:
        print(f"| {row['operator']} | {row['share']:.1%} | {row['calls']} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--evaluations", type=int, default=40)
    parser.add_argument("--sample", type=int, default=640, help="pairs that are judged one by one")
    parser.add_argument("--dtype", default="fast")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--quick", action="store_true", help="a small run that only shows that the bench works"
    )
    options = parser.parse_args()
    options.size, options.repeats = 2048, 10
    if options.quick:
        options.prompts, options.evaluations, options.sample = 4, 6, 16
        options.size, options.repeats = 256, 3
    found = measure(options)
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
