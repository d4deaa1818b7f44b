"""One sweep against one forward for each plan, in one run, with interleaved rounds.

    python benches/python/bench_sweep.py --json sweep.json

The model has the shape of SmolLM2-135M and random weights, so nothing is fetched; `--model` takes a real one. Plans are
edits of the identity: anywhere, and in the upper half of the layers.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from dynadepth.execution.sweep import Sweeper
from dynadepth.proving.prove import proved_stack
from dynadepth.wrapping.wrap import unwrap_model, wrap_model

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def edited_plans(
    num_plans: int, num_layers: int, lowest: int, rng: np.random.Generator
) -> np.ndarray:
    """Return plans of one to four edits at `lowest` or above."""
    plans = np.ones((num_plans, num_layers), dtype=np.uint8)
    for plan in plans:
        layers = rng.choice(np.arange(lowest, num_layers), size=rng.integers(1, 5), replace=False)
        plan[layers] = rng.choice([0, 0, 0, 2], size=len(layers))
    return plans


def run_separately(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    plans: np.ndarray,
    example: np.ndarray,
    scored: int,
) -> None:
    """Run one forward for each plan, as the published searches do, on the wrapped model."""
    wrap_model(model, plan=[1] * plans.shape[1])
    try:
        for plan, row in zip(plans, example, strict=True):
            with model.dynadepth.plans(plan), torch.inference_mode():
                model(
                    ids[row : row + 1],
                    attention_mask=mask[row : row + 1],
                    use_cache=False,
                    logits_to_keep=scored,
                )
    finally:
        unwrap_model(model)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="path or id of a real model; default: random weights")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--plans", type=int, default=40, help="plans for each prompt")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument(
        "--scored", type=int, default=16, help="last tokens of each row that are scored"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--quick", action="store_true", help="a small run that only shows that the bench works"
    )
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.prompts, options.plans = 1, 1, 4
    torch.manual_seed(0)
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    else:
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), dtype=torch.bfloat16)
    model.eval()
    num_layers = model.config.num_hidden_layers
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(
        rng.integers(5, model.config.vocab_size, size=(options.prompts, options.tokens))
    )
    mask = torch.ones_like(ids)
    example = np.repeat(np.arange(options.prompts), options.plans)
    rows = np.arange(len(example))
    last = np.arange(options.tokens - options.scored, options.tokens)
    score = torch.from_numpy(
        np.stack(np.meshgrid(rows, last, indexing="ij"), axis=-1).reshape(-1, 2)
    )
    table = []
    for name, lowest in (("anywhere", 0), ("upper half", num_layers // 2)):
        plans = edited_plans(len(example), num_layers, lowest, rng)
        ratios, seconds = [], []
        for _ in range(options.rounds):
            begin = time.perf_counter()
            run_separately(model, ids, mask, plans, example, options.scored)
            middle = time.perf_counter()
            with Sweeper(model, proved_stack(model)) as sweeper:
                result = sweeper.sweep(ids, mask, plans, example, score=score)
            end = time.perf_counter()
            ratios.append((middle - begin) / (end - middle))
            seconds.append(end - middle)
        table.append(
            {
                "edits": name,
                "plans": len(plans),
                "sharing_factor": result.naive_visits / result.executed_visits,
                "speed_up_median": statistics.median(ratios),
                "speed_up_range": [min(ratios), max(ratios)],
                "sweep_seconds_per_plan": statistics.median(seconds) / len(plans),
            }
        )
    report = {"threads": torch.get_num_threads(), "torch": torch.__version__, "rows": table}
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write("edits       sharing  speed-up (median, range)  seconds per plan\n")
    for row in table:
        low, high = row["speed_up_range"]
        sys.stdout.write(
            f"{row['edits']:11} {row['sharing_factor']:7.2f}  {row['speed_up_median']:8.2f} ({low:.2f}-{high:.2f})"
            f"       {row['sweep_seconds_per_plan']:.4f}\n"
        )


if __name__ == "__main__":
    main()
