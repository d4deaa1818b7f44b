"""Lossless late exits give the base model's own ids: counted over every family whose tokens may leave early.

    python benches/python/bench_lossless.py --json lossless.json

Of each family a tiny random copy in float64 (as the proof makes it) answers prompts of several lengths, greedily, with
random exit heads before two of its layers and with prompt lookup: most drafts are wrong, and all are verified. Every
answer is compared with the one that the same model gives without exits. `--quick` takes three families.
"""

import argparse
import json
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from survey_families import QUICK, base_model, known_families

from dynadepth import unwrap_model, wrap_model
from dynadepth.drafting.pace import Pace
from dynadepth.errors import DynadepthError
from dynadepth.exits.dial import Dial
from dynadepth.exits.exit_forward import Exits
from dynadepth.exits.exit_heads import ExitWeights, TrainedHead
from dynadepth.models.structure import layer_stack
from dynadepth.proving.tiny_copy import layers_needed, tiny_copy

NEW, WIDTH = 24, 6


def random_weights(layer_idx: int, hidden: int, generator: torch.Generator) -> ExitWeights:
    """Return a head whose scores spread around 0 and whose lens turns states a little."""

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[0] ** 0.5

    return ExitWeights(
        layer_idx,
        {
            "lens.weight": 0.3 * drawn(hidden, hidden),
            "lens.bias": 0.1 * drawn(hidden),
            "lens.down": drawn(hidden, WIDTH),
            "lens.down_bias": drawn(WIDTH),
            "lens.up": drawn(WIDTH, hidden),
            "router.mean": 0.1 * drawn(hidden),
            "router.scale": 1.0 + drawn(hidden).abs(),
            "router.down": 3 * drawn(hidden, WIDTH),
            "router.down_bias": drawn(WIDTH),
            "router.up": 3 * drawn(WIDTH),
            "router.bias": torch.tensor(0.0),
        },
    )


def judged(family: str, answers: int) -> dict[str, Any]:
    """Return what became of one family's answers, or why it has none."""
    try:
        model = base_model(family)
        model = tiny_copy(model, layers_needed(layer_stack(model).layers))
        stack = layer_stack(model)
    except Exception as error:  # whatever a family's own code raises
        return {"family": family, "refused": f"{type(error).__name__}: {error}"[:120]}
    generator = torch.Generator().manual_seed(0)
    weights = [
        random_weights(layer, stack.hidden_size, generator)
        for layer in range(1, min(3, stack.num_layers))
    ]
    dial = Dial(0.0, fidelity=1.0, adapt=False, verify=True)
    exits = Exits(tuple(TrainedHead(each, dial) for each in weights), audit=0, dial=dial)
    given = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    vocabulary = model.config.get_text_config().vocab_size
    prompts = [
        torch.randint(2, vocabulary, (1, 3 + number % 9), generator=generator)
        for number in range(answers)
    ]
    try:
        expected = [model.generate(prompt, **given) for prompt in prompts]
        wrap_model(model, exits=exits)
    except DynadepthError as error:
        return {"family": family, "refused": str(error)[:120]}
    except Exception as error:  # as above
        return {"family": family, "refused": f"{type(error).__name__}: {error}"[:120]}
    model.dynadepth.exit_pace = Pace(measured=False)
    try:
        found = [model.generate(prompt, **given) for prompt in prompts]
        drafted = model.dynadepth.exit_totals.drafted
    finally:
        unwrap_model(model)
    same = sum(torch.equal(each, own) for each, own in zip(found, expected, strict=True))
    return {
        "family": family,
        "answers": answers,
        "identical": same,
        "drafts": drafted.drafts,
        "kept": drafted.kept,
        "looked up": drafted.looked_up,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="families; all if none is named")
    parser.add_argument("--answers", type=int, default=20, help="of each family")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    names = options.families or (QUICK if options.quick else known_families())
    rows = []
    for name in names:
        rows.append(judged(name, 2 if options.quick else options.answers))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    ran = [row for row in rows if "answers" in row]
    total = Counter[str]()
    for row in ran:
        total.update({name: row[name] for name in ("answers", "identical", "drafts", "kept")})
    print(
        f"{len(ran)} of {len(rows)} families run late exits: {total['identical']} of {total['answers']} answers are "
        f"the base model's own; {total['drafts']} drafts, of which {total['kept']} were kept"
    )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    # Drafts of two families at least, or there was nothing to verify.
    enough = len(ran) > 1 and all(row["drafts"] for row in ran)
    return 0 if enough and total["identical"] == total["answers"] else 1


if __name__ == "__main__":
    sys.exit(main())
