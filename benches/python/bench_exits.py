"""Late exits: what they keep of given and of freely written text, what they cost in passes and time, on a real model.

    python benches/python/bench_exits.py --model smollm2 --json exits.json
    python benches/python/bench_exits.py --model smollm2 --unseen passage --json unseen.json

Exits are trained on prompts of three kinds (or on two, with `--unseen`) and judged on held-out prompts (of the third).
`given` reads the base model's own text and the prompts themselves, and says how many passes each way to leave needs for
99, 98 and 95 % of the tokens, each with the threshold that is best on just these tokens; the sum of the ranks by router
and margin, and the lens without its bottleneck, are ablations. `written` lets the model write
with exits on, the dial moved by its own audits, and reads the text again; with fidelity 1 it verifies every early token
(lossless), and the text is compared with the base model's. `time` compares with the base model's own decoding, in
turns, and `profile` says where a token's milliseconds go; nothing else may run meanwhile. `answers`, if it is asked
for, answers the prompts with one token each, kind by kind beside static plans (`--plans`). A killed run goes on.
`--quick` only shows that the bench works.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from late_exits.answers import answers_by_kind
from late_exits.part_clock import PartClock

from dynadepth import load_policy, load_shortcuts
from dynadepth.checkpoints.save_load import save_policy
from dynadepth.checkpoints.trained_exits import TrainedExits
from dynadepth.drafting.pace import Pace
from dynadepth.errors import BudgetError
from dynadepth.execution.few_tokens import few_token_products
from dynadepth.execution.reading import StateReader
from dynadepth.exits.exit_forward import Exits
from dynadepth.models.loading import load_model, load_tokenizer
from dynadepth.proving.prove import proved_stack
from dynadepth_search.data.downloads import GEMMA3, QWEN_CODER, SMOLLM2, default_cache, fetch_model
from dynadepth_search.data.kinds import KINDS, fetch_kinds
from dynadepth_search.data.tasks import Example, Task
from dynadepth_search.exits.building import fit_exits
from dynadepth_search.exits.choosing import ExitScores, passes_at, thresholds_for
from dynadepth_search.exits.exit_states import ExitStates, collect_states
from dynadepth_search.exits.judging.timing import (
    Batch,
    Way,
    base_way,
    exits_way,
    long_answers,
    time_in_turns,
)
from dynadepth_search.exits.judging.written import base_texts, write_with_exits
from dynadepth_search.exits.lens_training import read_choices
from dynadepth_search.exits.spec import ExitSpec
from dynadepth_search.scoring.batching import pad_left
from dynadepth_search.scoring.generating import continue_prompts
from dynadepth_search.scoring.own_text import Text
from dynadepth_search.scoring.runtime_checks import wrapped
from dynadepth_search.scoring.scorer import Scorer
from dynadepth_search.search.static import read_static

MODELS = {"smollm2": SMOLLM2, "gemma": GEMMA3, "qwen": QWEN_CODER}
SHARES = (0.99, 0.98, 0.95)
STAGES = ("given", "written", "time", "profile", "answers")
BUDGETS = (0.95, 0.9, 0.85, 0.8, 0.7)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="smollm2")
    parser.add_argument("--train", type=int, default=400, help="prompts, calibration included")
    parser.add_argument("--heldout", type=int, default=96)
    parser.add_argument("--unseen", choices=KINDS, help="a kind that no training prompt is of")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--fidelities", nargs="+", type=float, default=[0.99, 0.98, 0.95])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=3, help="of the times, each way once")
    parser.add_argument("--timed-prompts", type=int, default=12, help="at batch 1")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES[:-1])
    parser.add_argument("--plans", type=Path, help="static plans, for the stage `answers`")
    parser.add_argument("--shortcuts", type=Path, help="the shortcuts of these plans")
    parser.add_argument(
        "--out", type=Path, help="folder of the run [default: runs/bench-exits/MODEL]"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if "answers" in options.stages and options.plans is None:
        parser.error("the stage `answers` compares with static plans: give --plans")
    with tempfile.TemporaryDirectory() as scratch:
        name = options.model if options.unseen is None else f"{options.model}-no-{options.unseen}"
        folder = options.out or Path("runs/bench-exits") / name
        if options.quick:
            folder, options.train, options.heldout = Path(scratch), 30, 3
            options.timed_prompts = 1
            options.new_tokens, options.rounds, options.batches = 8, 1, [1]
            options.fidelities = [0.95]
        report = Bench(options, folder).run()
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write("\n".join(lines_of(report)) + "\n")


class Bench:
    """One run: a model, trained exits, and held-out prompts."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options, self._folder = options, folder
        source = str(fetch_model(default_cache(), source=MODELS[options.model]))
        self._model, self._tokenizer = load_model(source, dtype="fast"), load_tokenizer(source)
        self._stack = proved_stack(self._model)
        train, heldout = fetch_kinds(default_cache(), train=options.train, heldout=options.heldout)
        unseen = options.unseen
        seen = [
            example
            for example, kind in zip(train.task.examples, train.kinds, strict=True)
            if kind != unseen
        ]
        judged = [
            (example, kind)
            for example, kind in zip(heldout.task.examples, heldout.kinds, strict=True)
            if unseen in (None, kind)
        ]
        self._kinds = [kind for _, kind in judged]
        self._examples = [example for example, _ in judged]
        self._exits = self._trained(seen)
        scorer = Scorer(self._model, self._tokenizer)
        self._prompts = [scorer.encode(example).prompt_ids for example, _ in judged]
        self._own: list[Text] = []

    def _trained(self, examples: Sequence[Example]) -> TrainedExits:
        """Return the exits; they are trained once for a folder."""
        routers = self._folder / "routers"
        if not routers.exists():
            spec = ExitSpec(new_tokens=self._options.new_tokens)
            if self._options.quick:
                spec = ExitSpec(
                    layers=(9,), new_tokens=16, rounds=0, lens_epochs=0, router_epochs=2
                )
            task = Task("kinds to train on", tuple(examples))
            work = self._folder / "routers.work"
            save_policy(
                routers, fit_exits(self._model, self._tokenizer, task, work, spec, progress=say)
            )
        loaded = load_policy(routers, model=self._model)
        assert isinstance(loaded, TrainedExits)
        return loaded

    def run(self) -> dict[str, Any]:
        options = self._options
        report: dict[str, Any] = {
            "model": options.model,
            "dtype": str(self._model.dtype),
            "unseen": options.unseen,
            "exit layers": [head.layer_idx for head in self._exits.heads],
            "layers": self._exits.num_layers,
            "prompts": len(self._prompts),
            "train": self._exits.training["train_prompts"],
            "calibration": self._exits.promises.to_dict(),
        }
        if "answers" in options.stages:
            report["answers"] = self._answers()
        if set(options.stages) == {"answers"}:
            return report
        self._own = base_texts(
            self._model, self._prompts, new_tokens=options.new_tokens, progress=say
        )
        if "given" in options.stages:
            report["given"] = self._given()
        if "written" in options.stages:
            report["written"] = self._written()
            report["lossless"] = self._lossless()
        if "time" in options.stages:
            report["time"] = self._times()
        if "profile" in options.stages:
            report["profile"] = self._profile()
        return report

    def _answers(self) -> list[dict[str, Any]]:
        options = self._options
        static = read_static(options.plans, model=self._model)
        maps = None
        if options.shortcuts is not None:
            maps = load_shortcuts(options.shortcuts, model=self._model)
        return answers_by_kind(
            self._model,
            Scorer(self._model, self._tokenizer, shortcuts=maps),
            self._examples,
            self._kinds,
            self._exits,
            (static.pool, static.pool_values),
            BUDGETS,
            progress=say,
        )

    def _given(self) -> list[dict[str, Any]]:
        layers = [head.layer_idx for head in self._exits.heads]
        with tempfile.TemporaryDirectory() as scratch:
            states = collect_states(
                self._model,
                self._stack,
                self._own,
                layers,
                Path(scratch),
                batch_size=16,
                name="states",
                progress=say,
            )
        rows = []
        for name, tokens in (
            ("own text", states.take(states.own)),
            ("prompts", states.take(~states.own)),
        ):
            for way, scores in self._ways(tokens).items():
                thresholds = thresholds_for(scores, SHARES, self._exits.num_layers)
                passes = [passes_at(scores, each, self._exits.num_layers)[0] for each in thresholds]
                right = {
                    str(layer): float(each.right.float().mean()) for layer, each in scores.items()
                }
                rows.append(
                    {
                        "text": name,
                        "way": way,
                        "tokens": len(tokens),
                        "passes": passes,
                        "right": right,
                    }
                )
        return rows

    def _ways(self, tokens: ExitStates) -> dict[str, dict[int, ExitScores]]:
        """Return how each way to leave scores tokens."""
        names = ("router", "margin", "router and margin", "margin, affine lens", "logit lens")
        ways: dict[str, dict[int, ExitScores]] = {name: {} for name in names}
        device = self._model.device
        with StateReader(self._model, self._stack) as reader:
            for head in self._exits.heads:
                layer, before = head.layer_idx, tokens.before[head.layer_idx]
                lens = {
                    name: each for name, each in head.tensors.items() if name.startswith("lens")
                }
                nothing = {name: torch.zeros_like(each) for name, each in lens.items()}
                found = read_choices(lens, before, reader.read, device)
                plain = read_choices(nothing, before, reader.read, device)
                # Without the bottleneck, which is trained beside the affine map.
                affine = lens | {"lens.up": nothing["lens.up"]}
                mapped = read_choices(affine, before, reader.read, device)
                right, plainly = found[0] == tokens.choice, plain[0] == tokens.choice
                both = _ranks(head.score(before)) + _ranks(found[1])
                ways["router and margin"][layer] = ExitScores(both, right)
                ways["margin, affine lens"][layer] = ExitScores(
                    mapped[1], mapped[0] == tokens.choice
                )
                ways["router"][layer] = ExitScores(head.score(before), right)
                ways["margin"][layer] = ExitScores(found[1], right)
                ways["logit lens"][layer] = ExitScores(plain[1], plainly)
        return ways

    def _written(self) -> list[dict[str, Any]]:
        rows = []
        for fidelity in self._options.fidelities:
            for adapt in (True, False):
                row = self._write(fidelity, adapt=adapt)
                if row is not None:
                    rows.append(row)
                    say(json.dumps(row), len(rows), 0)
        return rows

    def _write(self, fidelity: float, *, adapt: bool) -> dict[str, Any] | None:
        """Write with exits on, and read the text again; None if the promise cannot be made."""
        try:
            exits = self._exits.exits(fidelity=fidelity)
        except BudgetError as error:
            say(str(error), 0, 0)
            return None
        assert exits.dial is not None
        exits.dial.adapt = adapt
        begun = exits.dial.threshold
        found = write_with_exits(
            self._model,
            self._prompts,
            self._own,
            exits,
            num_layers=self._exits.num_layers,
            new_tokens=self._options.new_tokens,
            progress=say,
        )
        kinds = np.array(self._kinds)[found.prompts]
        return {
            "fidelity": fidelity,
            "dial": "moved by audits" if adapt else "fixed",
            "passes": float(found.passes.mean()),
            "answers": len(found.prompts),
            "kept": 100 * float(found.kept.mean()),
            "kept by kind": {
                str(kind): 100 * float(found.kept[kinds == kind].mean())
                for kind in np.unique(kinds)
            },
            "kept, by its own audits": None if found.audited is None else 100 * found.audited,
            "identical": 100 * float(found.identical.mean()),
            "common beginning, median": float(np.median(found.common)),
            "common beginning, mean": float(found.common.mean()),
            "threshold": [begun, exits.dial.threshold],
        }

    def _lossless(self) -> dict[str, Any]:
        """Write with every early token verified, one prompt at a time, and compare with the base model's own text."""
        same = tokens = 0
        with wrapped(self._model, exits=self._exits.exits(fidelity=1.0)) as model:
            model.dynadepth.exit_pace = Pace(measured=False)
            for row, (prompt, own) in enumerate(zip(self._prompts, self._own, strict=True)):
                say("lossless", row, len(self._prompts))
                (text,) = continue_prompts(model, [prompt], new_tokens=self._options.new_tokens)
                same += np.array_equal(text.ids, own.ids)
                tokens += len(text.ids) - text.prompt
            totals = model.dynadepth.exit_totals
        return {
            "answers": len(self._prompts),
            "identical": same,
            "tokens": tokens,
            "drafts": totals.drafted.drafts,
            "kept": totals.drafted.kept,
            "passes": totals.passes,
        }

    def _batches(self, batch: int) -> list[Batch]:
        """Return batches of prompts with long answers, for times; of single prompts, as many as were asked for."""
        count = self._options.timed_prompts if batch == 1 else 1
        rows = long_answers(self._own, self._options.new_tokens, count * batch)
        chosen = [self._prompts[row] for row in rows]
        return [
            pad_left(chosen[at : at + batch], self._model.device)
            for at in range(0, len(chosen), batch)
        ]

    def _times(self) -> list[dict[str, Any]]:
        """Return how long a step of new tokens takes, over the base model's."""
        rows = []
        for batch in self._options.batches:
            ways: dict[str, Way] = {}
            for fidelity in self._options.fidelities:
                for audit in (1.0, 0.1):
                    with suppress(BudgetError):
                        exits = self._exits.exits(fidelity=fidelity, audit=audit)
                        ways[f"exits {fidelity:g}, audit {audit:g}"] = self._with(exits)
            if batch == 1:
                sure = self._exits.exits(fidelity=1.0)
                ways["lossless, always drafting"] = self._with(sure, Pace(measured=False))
                ways["lossless, by its own pace"] = self._with(sure, Pace())
                ways["prompt lookup"] = self._base(prompt_lookup_num_tokens=7)
                ways["prompt lookup, products for few tokens"] = self._base(
                    few=True, prompt_lookup_num_tokens=7
                )
                ways["early exit drafts"] = self._base(
                    assistant_early_exit=self._exits.heads[0].layer_idx
                )
            else:
                ways["base, products for few tokens"] = self._base(few=True)
            rows += self._in_turns(ways, batch)
        return rows

    def _in_turns(self, ways: Mapping[str, Way], batch: int) -> list[dict[str, Any]]:
        batches = self._batches(batch)
        if not batches:
            say(f"no answer is long enough for batches of {batch}", 0, 0)
            return []
        tried = {name: _failure(way, batches[0]) for name, way in ways.items()}
        times = time_in_turns(
            self._base(),
            {name: way for name, way in ways.items() if tried[name] is None},
            batches,
            rounds=self._options.rounds,
            progress=say,
        )
        return [
            {"batch": batch, "way": name}
            | (times[name].to_dict() if name in times else {"failed": tried[name]})
            for name in ways
        ]

    def _base(self, *, few: bool = False, **more: Any) -> Way:
        plain = base_way(self._model, new_tokens=self._options.new_tokens, **more)

        def way(batch: Batch) -> tuple[float, int]:
            # The tool of ours that has nothing to do with exits, for those who compare with us.
            module = self._model if few else None
            with torch.inference_mode(), few_token_products(module, 2):
                return plain(batch)

        return way

    def _with(self, exits: Exits, pace: Pace | None = None) -> Way:
        new = self._options.new_tokens
        return exits_way(self._model, exits, new_tokens=new, pace=pace)

    def _profile(self) -> list[dict[str, Any]]:
        """Return where the time of a new token goes, at batch 1, beside the base model's."""
        ways: dict[str, Exits | None] = {"base": None}
        for fidelity in (*self._options.fidelities, 1.0):
            with suppress(BudgetError):
                name = f"exits {fidelity:g}" if fidelity < 1 else "lossless"
                ways[name] = self._exits.exits(fidelity=fidelity)
        rows = []
        for name, exits in ways.items():
            clock, pace = PartClock(self._model, self._stack), Pace()
            seconds, tokens = 0.0, 0
            for batch in self._batches(1):
                say(f"profile of {name}", len(rows), len(ways))
                with clock.over(exits) as timed:
                    way = self._base() if timed is None else self._with(timed, pace)
                    took, new = way(batch)
                seconds, tokens = seconds + took, tokens + new
            if tokens:
                rows.append({"way": name, "parts": clock.parts(seconds, tokens)})
        return rows


def _ranks(scores: torch.Tensor) -> torch.Tensor:
    """Return the share of scores that are below each one."""
    return scores.argsort().argsort() / len(scores)


def _failure(way: Way, batch: Batch) -> str | None:
    """Run a way for the first time; say why it does not run, if so."""
    try:
        way(batch)
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        return str(error)[:80]
    return None


def lines_of(report: dict[str, Any]) -> list[str]:
    lines = [
        f"{report['model']} in {report['dtype']}, exits before {report['exit layers']} of {report['layers']} layers, "
        f"{report['train']} training and {report['prompts']} held-out prompts, unseen: {report['unseen']}, "
        f"{os.cpu_count()} cores",
    ]
    if "answers" in report:
        lines += [
            "",
            "| budget | kind | prompts | depth | kept, % | base or the kind's usual answer, % | "
            "static of the kind, in hindsight, % | gain over it |",
            "|---" * 8 + "|",
        ]
        lines += [
            f"| {row['budget']:g} | {row['kind']} | {row['prompts']} | {row['depth']:.3f} | {_percent(row['kept'])} | "
            f"{100 * row['guess']:.1f} | "
            + ("" if row["static"] is None else f"{100 * row['static']:.1f}")
            + f" | {'' if row['gain'] is None else _percent(row['gain'])} |"
            for row in report["answers"]
        ]
    if "given" in report:
        lines += [
            "",
            "| text | way | tokens | right if all leave | 99 % | 98 % | 95 % |",
            "|---" * 7 + "|",
        ]
        lines += [
            f"| {row['text']} | {row['way']} | {row['tokens']} | "
            + ", ".join(f"{100 * share:.1f}" for share in row["right"].values())
            + f" | {' | '.join(f'{each:.3f}' for each in row['passes'])} |"
            for row in report["given"]
        ]
    if "written" in report:
        lines += [
            "",
            "| promise | dial | passes | kept, % | by its audits | by kind | identical, % | common beginning | mean |",
            "|---" * 9 + "|",
        ]
        lines += [
            f"| {row['fidelity']:g} | {row['dial']} | {row['passes']:.3f} | {row['kept']:.1f} | "
            f"{row['kept, by its own audits'] or float('nan'):.1f} | "
            + ", ".join(f"{kind} {share:.1f}" for kind, share in row["kept by kind"].items())
            + f" | {row['identical']:.0f} | {row['common beginning, median']:.0f} | "
            f"{row['common beginning, mean']:.1f} |"
            for row in report["written"]
        ]
    if "lossless" in report:
        found = report["lossless"]
        lines += [
            "",
            f"Lossless: {found['identical']} of {found['answers']} answers are the base model's own ({found['tokens']} "
            f"tokens, one prompt at a time against its batches of 16), {found['kept']} of {found['drafts']} drafts "
            f"kept, passes {found['passes']:.3f}.",
        ]
    if "time" in report:
        lines += ["", "| batch | way | time of a step over the base's |", "|---" * 3 + "|"]
        lines += [
            f"| {row['batch']} | {row['way']} | "
            + (
                f"does not run: {row['failed']}"
                if "failed" in row
                else f"{row['median']:.3f} ({row['low']:.3f} to {row['high']:.3f}), {row['milliseconds']:.1f} ms"
            )
            + " |"
            for row in report["time"]
        ]
    if report.get("profile"):
        parts = list(report["profile"][0]["parts"])
        lines += ["", f"| way | {' | '.join(parts)} |", "|---" * (1 + len(parts)) + "|"]
        lines += [
            f"| {row['way']} | {' | '.join(f'{each:.2f}' for each in row['parts'].values())} |"
            for row in report["profile"]
        ]
    return lines


def _percent(found: Mapping[str, Any]) -> str:
    return f"{100 * found['mean']:.1f} ({100 * found['low']:.1f} to {100 * found['high']:.1f})"


def say(stage: str, done: int, total: int) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {stage} {done}/{total}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
