"""Prove every family that `AutoModelForCausalLM` knows, and write the table of docs/families.md.

    python benches/python/survey_families.py --write docs/families.md --json survey.json

A family's model is built on the meta device from its config class's own defaults, so nothing is fetched and no weights
are made; the proof then runs on a tiny copy, as `wrap_model` does for a user's model. Families whose base does not
build or run are counted apart.
"""

import argparse
import copy
import json
import re
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from dynadepth.proving.prove import prove

QUICK = ("llama", "gpt2", "mamba")
# Refusals by what their message says, in the order in which they are looked for.
REASONS = (
    ("recurrent or other states", r"states that are not keys and values"),
    ("cross-attention", r"cross-attention"),
    ("encoder", r"has an encoder"),
    ("keys and values shared between layers", r"read another layer's keys"),
    (
        "a cache of another kind",
        r"cache is a |cache has a layer of|returns no cache|takes no cache",
    ),
    (
        "not causal, or no reference for a plan",
        r"not causal|itself differs|two answers|no reference",
    ),
    ("layers in another order or number", r"calls its layers|holds \d+ decoder layers"),
    ("no list of decoder layers", r"has no list|has \d+ lists"),
    ("states of another shape", r"states that enter|returns .* for states"),
    ("no tiny copy, or it does not run", r"no tiny copy|tiny copy fails"),
    ("wrong: a law is broken", r"law \d"),
)
BEGIN, END = "<!-- survey: begin -->", "<!-- survey: end -->"


def base_model(model_type: str) -> Any:
    """Return a family's causal language model by its defaults, without weights."""
    config = CONFIG_MAPPING[model_type]()
    cls = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    cls = cls[0] if isinstance(cls, tuple) else cls
    if cls.config_class is getattr(type(config), "sub_configs", {}).get("text_config"):
        config = config.get_text_config()
    if getattr(config, "is_decoder", None) is False:
        # Families that are encoders by default.
        config.is_decoder = True
    try:
        with torch.device("meta"):
            return cls(copy.deepcopy(config))
    except TypeError:
        # Some classes leave these open, and cannot be built so.
        config.num_key_value_heads = config.num_attention_heads
        config.head_dim = config.hidden_size // config.num_attention_heads
    with torch.device("meta"):
        return cls(config)


def known_families() -> list[str]:
    """Return every family of causal language models that transformers has."""
    return sorted(
        name for name, config in CONFIG_MAPPING.items() if config in MODEL_FOR_CAUSAL_LM_MAPPING
    )


def surveyed(model_type: str) -> dict[str, Any]:
    """Return one row of the survey."""
    begin = time.monotonic()
    try:
        model = base_model(model_type)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return {
            "family": model_type,
            "verdict": "base",
            "reason": f"{type(error).__name__}: {lines[-1].strip()}",
            "seconds": 0.0,
        }
    verdict = prove(model, again=True)
    kind = "exact" if verdict.exact else kind_of(verdict.reason)
    return {
        "family": model_type,
        "verdict": kind,
        "reason": verdict.reason,
        "layers": verdict.num_layers,
        "worst": verdict.worst,
        "noise": verdict.noise,
        "no_exits": None if verdict.traits is None else verdict.traits.no_exits,
        "seconds": round(time.monotonic() - begin, 2),
    }


def kind_of(reason: str) -> str:
    """Return the kind of a refusal."""
    return next((kind for kind, pattern in REASONS if re.search(pattern, reason)), "other")


def table(rows: list[dict[str, Any]]) -> str:
    """Return the survey as Markdown."""
    exact = [row for row in rows if row["verdict"] == "exact"]
    leaving = [row for row in exact if row["no_exits"] is None]
    lines = [
        f"transformers {transformers.__version__}: {len(rows)} families, {len(exact)} exact, {len(leaving)} of "
        "them with late exits too.",
        "",
        "| exact | late exits | layers of the copy | largest difference | seconds |",
        "|---|---|---:|---:|---:|",
    ]
    lines += [
        f"| `{row['family']}` | {'yes' if row['no_exits'] is None else 'no'} | {row['layers']} | {row['worst']:.0e} | "
        f"{row['seconds']:.1f} |"
        for row in exact
    ]
    lines += ["", "| refused: why | families |", "|---|---|"]
    others: dict[str, list[str]] = {}
    for row in rows:
        if row["verdict"] not in ("exact", "base"):
            others.setdefault(row["verdict"], []).append(row["family"])
    order = [kind for kind, _ in REASONS] + ["other"]
    for kind in sorted(others, key=order.index):
        names = ", ".join(f"`{name}`" for name in others[kind])
        lines.append(f"| {kind} ({len(others[kind])}) | {names} |")
    left = [row["family"] for row in rows if row["verdict"] == "base"]
    if left:
        lines += [
            "",
            f"Not built by its config's defaults: {', '.join(f'`{name}`' for name in left)}.",
        ]
    return "\n".join(lines)


def write_table(page: Path, text: str) -> None:
    """Put the table between its marks in a page."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="families; all if none is named")
    parser.add_argument("--write", type=Path, help="page whose table is replaced")
    parser.add_argument("--json", type=Path, help="file for all rows")
    parser.add_argument("--quick", action="store_true", help="three families only")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    names = options.families or (QUICK if options.quick else known_families())
    rows = []
    for name in names:
        rows.append(surveyed(name))
        print(f"{name:28} {rows[-1]['verdict']:12} {rows[-1]['seconds']:5.1f} s", file=sys.stderr)
    text = table(rows)
    print(text)
    print(json.dumps(Counter(row["verdict"] for row in rows)))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    if options.write:
        write_table(options.write, text)
    return 1 if any(row["verdict"].startswith("wrong") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
