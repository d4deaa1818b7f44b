"""What shortcuts keep of a base model's own text: by rank, by prompts, by form of map, by kind, and in generation.

    python benches/python/bench_shortcuts.py maps --json maps.json
    python benches/python/bench_shortcuts.py distil --steps 300 --json distil.json
    python benches/python/bench_shortcuts.py generation --run runs/demo --heldout 200 --json generation.json

Everything is judged on the base model's own greedy continuations of held-out prompts, at every token (teacher-forced):
divergence from the base, and agreement with its choice. `maps` does so under fixed plans that skip 5, 10, 20 and 30 %
of the layers, drawn so that layers that are missed less are skipped more often. `generation` takes the static plans
of a demo (or of bench_policy.py), plain and with shortcuts, and lets the model write freely as well. `--quick` only
shows that the bench works.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from shortcut_variants import (
    NORMALISED,
    PROMPTS,
    UNWEIGHTED,
    PartCollector,
    SpanCollector,
    diagonal,
    normalised,
    summed,
)

from dynadepth.execution.executor import NOTHING, Skipped
from dynadepth.models.loading import load_model, load_tokenizer
from dynadepth.models.structure import LayerStack
from dynadepth.plans import Plans, plan_depth, plan_ranges
from dynadepth.proving.prove import proved_stack
from dynadepth.shortcuts.fit import fit_shortcut
from dynadepth.shortcuts.maps import LinearShortcut, Rank
from dynadepth.shortcuts.moments import Moments
from dynadepth.shortcuts.save_load import load_shortcuts
from dynadepth.wrapping.skipping import skips_of
from dynadepth_search.cli.demo.answers import plan_of_depth
from dynadepth_search.data.downloads import GEMMA3, QWEN_CODER, SMOLLM2, default_cache, fetch_model
from dynadepth_search.data.kinds import KINDS, KindsTask, fetch_kinds
from dynadepth_search.scoring.batching import batches_of
from dynadepth_search.scoring.generating import continue_prompts
from dynadepth_search.scoring.own_text import Text, score_texts
from dynadepth_search.scoring.runtime_checks import wrapped
from dynadepth_search.scoring.scorer import Scorer
from dynadepth_search.search.static import read_static
from dynadepth_search.shortcuts.choosing import single_skips
from dynadepth_search.shortcuts.collecting import MomentCollector
from dynadepth_search.shortcuts.distilling import distil, draw_plans
from dynadepth_search.shortcuts.texts import TextFile

MODELS = {"smollm2": SMOLLM2, "gemma": GEMMA3, "qwen": QWEN_CODER}
SHARES = (0.05, 0.1, 0.2, 0.3)
PLANS = 4
RANKS: tuple[Rank, ...] = (0, 16, 64, 128, "full")
COUNTS = (100, 300, 1000)
RIDGE = 1e-2
DEPTHS = (0.95, 0.9, 0.85)
Maps = Sequence[LinearShortcut | None]


class Material:
    """A model, and texts of three kinds: to fit on, to choose by, and to judge by."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        source = str(fetch_model(default_cache(), source=MODELS[options.model]))
        self.model, self.tokenizer = load_model(source, dtype="fast"), load_tokenizer(source)
        self.stack: LayerStack = proved_stack(self.model)
        train, heldout = fetch_kinds(default_cache(), train=options.train, heldout=options.heldout)
        self._new_tokens = options.new_tokens
        self.train_kinds, self.heldout_kinds = train.kinds, heldout.kinds
        self.train = self._texts(train, folder / "train.jsonl")
        self.heldout = self._texts(heldout, folder / "heldout.jsonl")

    def _texts(self, given: KindsTask, path: Path) -> list[Text]:
        scorer = Scorer(self.model, self.tokenizer)
        prompts = [scorer.encode(example).prompt_ids for example in given.task.examples]
        path.parent.mkdir(parents=True, exist_ok=True)
        return TextFile(path).continued(
            self.model, prompts, new_tokens=self._new_tokens, progress=say
        )

    def moments(self, texts: Sequence[Text]) -> dict[int, Moments]:
        moments = {
            layer: Moments.zero(self.stack.hidden_size) for layer in range(self.stack.num_layers)
        }
        self.collect(MomentCollector(self.stack, moments, self.model.device), texts)
        return moments

    def moments_by_part(self, counts: Sequence[int]) -> PartCollector:
        """Return the moments of each kind of prompts, among the first ones and among those up to each further count."""
        rows: dict[tuple[int, str], list[Text]] = {}
        for row, (text, kind) in enumerate(zip(self.train, self.train_kinds, strict=True)):
            count = next(count for count in counts if row < count)
            rows.setdefault((count, kind), []).append(text)
        collector = PartCollector(self.stack, self.model.device)
        for collector.part, texts in rows.items():
            self.collect(collector, texts)
        return collector

    def collect(self, collector: MomentCollector, texts: Sequence[Text]) -> None:
        batches = batches_of([len(text.ids) for text in texts], 16)
        with collector:
            for step, rows in enumerate(batches):
                say("moments", step, len(batches))
                collector.run([texts[row] for row in rows])

    def maps(self, moments: dict[int, Moments], rank: Rank, ridge: float = RIDGE) -> Maps:
        return [
            fit_shortcut(each, rank=rank, ridge=ridge, dtype=self.model.dtype)
            for each in moments.values()
        ]


def bench_maps(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    material, started = Material(options, folder), time.perf_counter()
    counts = [count for count in COUNTS if count < len(material.train)] + [len(material.train)]
    found = material.moments_by_part(counts)
    moments = {
        count: summed(part for (upto, _), part in found.parts.items() if upto <= count)
        for count in counts
    }
    most, width = counts[-1], material.stack.hidden_size
    default = width // 8
    fitted = material.maps(moments[most], default)
    plans = fixed_plans(material, fitted)
    rows: list[dict[str, Any]] = []

    def note(name: str, skips: Sequence[Skipped], texts: Sequence[Text] | None = None) -> None:
        judged = judge(material, plans, skips, material.heldout if texts is None else texts)
        rows.append({"maps": name, **judged})
        say(json.dumps(rows[-1]), len(rows), 0)

    nothing = [NOTHING] * material.stack.num_layers
    note("nothing (plain skip)", nothing)
    for rank in sorted({*RANKS, default}, key=lambda rank: width if rank == "full" else int(rank)):
        note(f"rank {rank}, {most} prompts", in_place(material.maps(moments[most], rank)))
    for count in counts[:-1]:
        for rank in (default, "full"):
            note(f"rank {rank}, {count} prompts", in_place(material.maps(moments[count], rank)))
    variants = {name: material.maps(each, default) for name, each in found.variants.items()}
    note(f"rank {default}, fitted on prompts without continuations", in_place(variants[PROMPTS]))
    note(
        "a diagonal and a bias",
        [Skipped(diagonal(each, material.model.dtype)) for each in moments[most].values()],
    )
    note(f"rank {default}, tokens unweighted", in_place(variants[UNWEIGHTED]))
    note(
        f"rank {default}, input normalised",
        [Skipped(normalised(each)) for each in variants[NORMALISED] if each],
    )
    for kind in KINDS:
        own = [
            t for t, k in zip(material.heldout, material.heldout_kinds, strict=True) if k == kind
        ]
        others = summed(part for (_, of), part in found.parts.items() if of != kind)
        foreign = material.maps(others, default)
        note(f"{kind}: nothing", nothing, own)
        note(f"{kind}: fitted on all kinds", in_place(fitted), own)
        note(f"{kind}: fitted on the two other kinds", in_place(foreign), own)
    return {
        "train_prompts": len(material.train),
        "tokens": int(moments[most][0].tokens),
        "heldout_prompts": len(material.heldout),
        "plans": [plan_ranges(plan) for plan in plans],
        "rows": rows,
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "spans": bench_spans(material, fitted, plans, default),
    }


def bench_spans(material: Material, fitted: Maps, plans: Plans, rank: int) -> list[dict[str, Any]]:
    """Replace the maps of each run of two to four neighbours by one map of the whole run."""
    runs_by_plan = [runs_of(plan) for plan in plans]
    spans = {span for runs in runs_by_plan for span in runs.items()}
    collector = SpanCollector(material.stack, spans, material.model.device)
    material.collect(collector, material.train)
    found = []
    for plan, runs in zip(plans, runs_by_plan, strict=True):
        if not runs:
            continue
        skips = in_place(fitted)
        for first, last in runs.items():
            whole = fit_shortcut(
                collector.spans[first, last], rank=rank, ridge=RIDGE, dtype=material.model.dtype
            )
            skips[first] = Skipped(whole)
            skips[first + 1 : last + 1] = [NOTHING] * (last - first)
        before, after = (
            score_texts(
                material.model, material.stack, material.heldout, plan[None], skips=each
            ).by_text()[0][0]
            for each in (in_place(fitted), skips)
        )
        change = after - before
        found.append(
            {
                "plan": plan_ranges(plan),
                "runs": [f"{first}-{last}" for first, last in runs.items()],
                "divergence": float(before.mean()),
                "with span maps": float(after.mean()),
                "change": float(change.mean()),
                "standard error": float(change.std(ddof=1) / np.sqrt(len(change))),
            }
        )
        say(json.dumps(found[-1]), len(found), len(plans))
    return found


def runs_of(plan: Plans) -> dict[int, int]:
    """Return the first and last layer of each run of two to four skipped neighbours."""
    runs, layer = {}, 0
    while layer < len(plan):
        last = layer
        while last < len(plan) and plan[last] == 0:
            last += 1
        if 2 <= last - layer <= 4:
            runs[layer] = last - 1
        layer = max(last, layer + 1)
    return runs


def fixed_plans(material: Material, maps: Maps) -> Plans:
    """Return the plans that all maps are judged under; a few texts say which layers are missed least."""
    few = material.train[:: max(1, len(material.train) // 12)][:12]
    plans = single_skips(material.stack.num_layers)
    found = score_texts(material.model, material.stack, few, plans, skips=in_place(maps))
    harm = found.by_text()[0].mean(axis=1)
    shares = np.repeat(SHARES, PLANS).tolist()
    return draw_plans(harm, shares, np.random.default_rng(0))


def in_place(maps: Maps) -> list[Skipped]:
    return [NOTHING if each is None else Skipped(each) for each in maps]


def judge(
    material: Material, plans: Plans, skips: Sequence[Skipped], texts: Sequence[Text]
) -> dict[str, Any]:
    divergence, agreement = score_texts(
        material.model, material.stack, texts, plans, skips=skips
    ).by_text()
    groups = np.array_split(np.arange(len(plans)), len(SHARES))
    return {
        "divergence": [float(divergence[group].mean()) for group in groups],
        "agreement": [float(100 * agreement[group].mean()) for group in groups],
    }


def bench_distil(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    material = Material(options, folder)
    moments = material.moments(material.train)
    rank = material.stack.hidden_size // 8
    maps = material.maps(moments, rank)
    plans = fixed_plans(material, maps)
    few = material.train[:: max(1, len(material.train) // 12)][:12]
    singles = single_skips(material.stack.num_layers)
    found = score_texts(material.model, material.stack, few, singles, skips=in_place(maps))
    half = len(material.heldout) // 2
    begun = time.perf_counter()
    distilled = distil(
        material.model,
        material.stack,
        maps,
        found.by_text()[0].mean(axis=1),
        material.train,
        material.heldout[:half],
        folder / "distillation.safetensors",
        steps=options.steps,
        seed=0,
        progress=say,
    )
    minutes = (time.perf_counter() - begun) / 60
    rest = material.heldout[half:]
    return {
        "minutes": round(minutes, 1),
        "notes": distilled.notes,
        "rows": [
            {"maps": name, **judge(material, plans, in_place(each), rest)}
            for name, each in (("fitted", maps), ("after distillation", distilled.maps))
        ],
    }


def run_folders(run: Path) -> dict[str, Path]:
    """Return where a demo, or bench_policy.py, has its maps and its plans of both ways."""
    if (run / "plain-plans").is_dir():
        names = {"maps": "shortcuts", "plain": "plain-plans", "shortcuts": "plans"}
    else:
        names = {"maps": "shortcuts/maps", "plain": "plain/plans", "shortcuts": "shortcuts/plans"}
    return {what: run / name for what, name in names.items()}


def bench_generation(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    material = Material(options, folder)
    folders = run_folders(options.run)
    maps = load_shortcuts(folders["maps"], model=material.model)
    texts = material.heldout
    rows = []
    for depth in DEPTHS:
        for way in ("plain", "shortcuts"):
            plan = plan_of_depth(read_static(folders[way]), depth)
            given = maps if way == "shortcuts" else None
            skips = skips_of(given, material.stack.num_layers)
            forced = score_texts(
                material.model, material.stack, texts, plan[None], skips=skips
            ).agreement[0]
            with wrapped(material.model, plan=plan, shortcuts=given or False):
                written = write_freely(material, texts, options.new_tokens)
            common = [
                common_beginning(text.ids[text.prompt :], new)
                for text, new in zip(texts, written, strict=True)
            ]
            lengths = [len(text.ids) - text.prompt for text in texts]
            bins = np.array_split(np.arange(forced.shape[1]), 4)
            rows.append(
                {
                    "depth": float(plan_depth(plan)),
                    "asked": depth,
                    "way": way,
                    "plan": plan_ranges(plan),
                    "agreement": float(100 * np.nanmean(forced)),
                    "agreement by quarter": [
                        float(100 * np.nanmean(forced[:, each])) for each in bins if len(each)
                    ],
                    "first token": float(100 * np.nanmean(forced[:, 0])),
                    "identical": float(
                        100 * np.mean([a >= b for a, b in zip(common, lengths, strict=True)])
                    ),
                    "common beginning": float(np.median(common)),
                    "mean common beginning": float(np.mean(common)),
                }
            )
            say(json.dumps(rows[-1]), len(rows), 2 * len(DEPTHS))
    return {"prompts": len(texts), "new_tokens": options.new_tokens, "rows": rows}


def write_freely(material: Material, texts: Sequence[Text], new_tokens: int) -> list[Any]:
    prompts = [text.ids[: text.prompt] for text in texts]
    written: dict[int, Any] = {}
    for rows in batches_of([len(prompt) for prompt in prompts], 32):
        say("writing", len(written), len(prompts))
        made = continue_prompts(
            material.model, [prompts[row] for row in rows], new_tokens=new_tokens
        )
        written |= {row: text.ids[text.prompt :] for row, text in zip(rows, made, strict=True)}
    return [written[row] for row in range(len(prompts))]


def common_beginning(first: Any, second: Any) -> int:
    count = min(len(first), len(second))
    differ = np.flatnonzero(first[:count] != second[:count])
    return int(differ[0]) if len(differ) else count


def show(report: dict[str, Any]) -> None:
    rows = report["rows"]
    if "way" in rows[0]:
        lines = [
            "| depth | way | agreement, % | by quarter | identical, % | common beginning, median | mean |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['depth']:.3f} | {row['way']} | {row['agreement']:.1f} | "
            f"{', '.join(f'{each:.1f}' for each in row['agreement by quarter'])} | {row['identical']:.1f} | "
            f"{row['common beginning']:.0f} | {row['mean common beginning']:.1f} |"
            for row in rows
        ]
    else:
        titles = " | ".join(f"{share:.0%} skipped" for share in SHARES)
        lines = [f"| maps | {titles} |", "|---" * (1 + len(SHARES)) + "|"]
        lines += [
            f"| {row['maps']} | "
            + " | ".join(
                f"{divergence:.3f} / {agreement:.1f}"
                for divergence, agreement in zip(row["divergence"], row["agreement"], strict=True)
            )
            + " |"
            for row in rows
        ]
    if report.get("spans"):
        lines += [
            "",
            "| plan | runs | divergence | with span maps | change (standard error) |",
            "|---" * 5 + "|",
        ]
        lines += [
            f"| {row['plan']} | {', '.join(row['runs'])} | {row['divergence']:.3f} | {row['with span maps']:.3f} | "
            f"{row['change']:+.4f} ({row['standard error']:.4f}) |"
            for row in report["spans"]
        ]
    sys.stdout.write("\n".join(lines) + "\n")


def say(stage: str, done: int, total: int) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {stage} {done}/{total}\n")
    sys.stderr.flush()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    benches = {"maps": bench_maps, "distil": bench_distil, "generation": bench_generation}
    parser.add_argument("what", choices=sorted(benches), nargs="?", default="maps")
    parser.add_argument("--model", choices=sorted(MODELS), default="smollm2")
    parser.add_argument("--train", type=int, default=1200)
    parser.add_argument("--heldout", type=int, default=120)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300, help="of the distillation")
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    parser.add_argument("--out", type=Path, help="folder of the texts [default: a temporary one]")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--quick", action="store_true", help="a small run that only shows that it works"
    )
    options = parser.parse_args()
    if options.quick:
        options.train, options.heldout, options.new_tokens, options.steps = 24, 6, 6, 2
    with tempfile.TemporaryDirectory() as scratch:
        report = benches[options.what](options, options.out or Path(scratch))
    show(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
