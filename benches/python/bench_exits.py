"""Late exits: what they keep of given and of freely written text, what they cost in passes and time, on a real model.

    python benches/python/bench_exits.py --model smollm2 --json exits.json
    python benches/python/bench_exits.py --model smollm2 --unseen passage --json unseen.json

Exits are trained on prompts of three kinds (or on two, with `--unseen`) and judged on held-out prompts (of the third).
`given` reads the base model's own text and the prompts themselves, and says how many passes each way to leave needs for
99, 98 and 95 % of the tokens, each with the threshold that is best on just these tokens. `written` lets the model write
with exits on, the dial moved by its own audits, and reads the text again; with fidelity 1 it verifies every early token
(lossless), and the text is compared with the base model's. `time` compares with the base model's own decoding, in
turns, and `profile` says where a token's milliseconds go; nothing else may run meanwhile. A killed run goes on.
`--quick` only shows that the bench works.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from late_exits.part_clock import PartClock

from dynadepth import load_policy
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
from dynadepth_search.exits.lens_training import read_choices
from dynadepth_search.exits.producing import base_choices, produce
from dynadepth_search.exits.spec import ExitSpec
from dynadepth_search.scoring.batching import batches_of, pad_left
from dynadepth_search.scoring.generating import continue_prompts
from dynadepth_search.scoring.own_text import Text
from dynadepth_search.scoring.runtime_checks import wrapped
from dynadepth_search.scoring.scorer import Scorer

MODELS = {"smollm2": SMOLLM2, "gemma": GEMMA3, "qwen": QWEN_CODER}
SHARES = (0.99, 0.98, 0.95)
STAGES = ("given", "written", "time", "profile")


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
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument(
        "--out", type=Path, help="folder of the run [default: runs/bench-exits/MODEL]"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
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
        self._own = self._continue()
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

    def _continue(self) -> list[Text]:
        """Return the base model's own text."""
        found: dict[int, Text] = {}
        for rows in batches_of([len(prompt) for prompt in self._prompts], 16):
            say("base text", len(found), len(self._prompts))
            texts = continue_prompts(
                self._model,
                [self._prompts[row] for row in rows],
                new_tokens=self._options.new_tokens,
            )
            found |= dict(zip(rows, texts, strict=True))
        return [found[row] for row in range(len(self._prompts))]

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
        ways: dict[str, dict[int, ExitScores]] = {"router": {}, "margin": {}, "logit lens": {}}
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
                right, plainly = found[0] == tokens.choice, plain[0] == tokens.choice
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
        produced, fidelity_seen = self._produce(exits)
        layers, window = self._exits.num_layers, self._exits.window
        choices = base_choices(
            self._model,
            [each.text for each in produced],
            batch_size=8,
            name="reading",
            progress=say,
        )
        # One token is the prompt's own forward; there is nothing to leave early.
        decoded = [
            (each, chosen, kind, own)
            for each, chosen, kind, own in zip(
                produced, choices, self._kinds, self._own, strict=True
            )
            if each.num_decoded > 0
        ]
        kept = [1.0 - float(each.changed(chosen, layers).mean()) for each, chosen, *_ in decoded]
        kinds = [kind for *_, kind, _ in decoded]
        same = [common(each.text, own) for each, *_, own in decoded]
        return {
            "fidelity": fidelity,
            "dial": "moved by audits" if adapt else "fixed",
            "passes": float(np.mean([each.passes(layers, window) for each, *_ in decoded])),
            "answers": len(decoded),
            "kept": 100 * float(np.mean(kept)),
            "kept by kind": {
                kind: 100
                * float(np.mean([k for k, its in zip(kept, kinds, strict=True) if its == kind]))
                for kind in sorted(set(kinds))
            },
            "kept, by its own audits": None if fidelity_seen is None else 100 * fidelity_seen,
            "identical": 100 * float(np.mean([whole for _, whole in same])),
            "common beginning, median": float(np.median([length for length, _ in same])),
            "common beginning, mean": float(np.mean([length for length, _ in same])),
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

    def _produce(self, exits: Exits) -> tuple[Any, float | None]:
        seen: list[float | None] = []
        produced = produce(
            self._model,
            self._prompts,
            exits,
            new_tokens=self._options.new_tokens,
            batch_size=4,
            name="writing",
            progress=say,
            finished=lambda model: seen.append(model.dynadepth.exit_totals.fidelity),
        )
        return produced, seen[0]

    def _timed_prompts(self, batch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return batches of prompts for times; of single prompts, as many as were asked for.

        Only of prompts that the base model gives a long answer by itself: text behind an answer's end is no use's.
        """
        count = self._options.timed_prompts if batch == 1 else 1
        long = [
            prompt
            for prompt, own in zip(self._prompts, self._own, strict=True)
            if 2 * (len(own.ids) - own.prompt) >= self._options.new_tokens
        ]
        step = max(1, len(long) // (count * batch))
        chosen = long[::step][: count * batch]
        return [
            pad_left(chosen[at : at + batch], self._model.device)
            for at in range(0, len(chosen), batch)
        ]

    def _times(self) -> list[dict[str, Any]]:
        """Return how long a step of new tokens takes, over the base model's, in turns on the same prompts."""
        rows = []
        for batch in self._options.batches:
            ways: dict[str, Way] = {}
            for fidelity in self._options.fidelities:
                for audit in (1.0, 0.1):
                    try:
                        exits = self._exits.exits(fidelity=fidelity, audit=audit)
                    except BudgetError:
                        continue
                    ways[f"exits {fidelity:g}, audit {audit:g}"] = self._with(exits)
            if batch == 1:
                sure = self._exits.exits(fidelity=1.0)
                ways["lossless, always drafting"] = self._with(sure, Pace(measured=False))
                ways["lossless, by its own pace"] = self._with(sure, Pace())
                ways["prompt lookup"] = partial(self._plain, prompt_lookup_num_tokens=7)
                ways["prompt lookup, products for few tokens"] = partial(
                    self._few, prompt_lookup_num_tokens=7
                )
                ways["early exit drafts"] = partial(
                    self._plain, assistant_early_exit=self._exits.heads[0].layer_idx
                )
            else:
                ways["base, products for few tokens"] = self._few
            rows += [{"batch": batch, **row} for row in self._in_turns(ways, batch)]
        return rows

    def _in_turns(self, ways: Mapping[str, "Way"], batch: int) -> list[dict[str, Any]]:
        prompts = self._timed_prompts(batch)
        times: dict[str, list[list[float]]] = {"base": [], **{way: [] for way in ways}}
        self._plain(*prompts[0])
        tried = {way: _failure(timed, prompts[0]) for way, timed in ways.items()}
        failed = {way: error for way, error in tried.items() if error is not None}
        for turn in range(self._options.rounds):
            say(f"times at batch {batch}", turn, self._options.rounds)
            for each in times.values():
                each.append([])
            for given in prompts:
                for way, timed in {"base": self._plain, **ways}.items():
                    if way not in failed:
                        seconds, steps = timed(*given)
                        times[way][-1].append(seconds / steps)
        base = np.array(times["base"])
        rows: list[dict[str, Any]] = []
        for way in ways:
            if way in failed:
                rows.append({"way": way, "failed": failed[way]})
                continue
            found = np.array(times[way])
            by_turn = found.sum(axis=1) / base.sum(axis=1)
            by_prompt = found.sum(axis=0) / base.sum(axis=0)
            rows.append(
                {
                    "way": way,
                    "time": float(np.median(by_turn)),
                    "lowest": float(by_turn.min()),
                    "highest": float(by_turn.max()),
                    "by prompt": by_prompt.tolist(),
                }
            )
        return rows

    def _plain(self, ids: torch.Tensor, mask: torch.Tensor, **more: Any) -> tuple[float, int]:
        """Return the seconds of a generation, and the new tokens of its longest row."""
        begun = time.perf_counter()
        with torch.inference_mode():
            text = self._model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=self._options.new_tokens,
                do_sample=False,
                pad_token_id=0,
                **more,
            )
        return time.perf_counter() - begun, text.shape[1] - ids.shape[1]

    def _few(self, ids: torch.Tensor, mask: torch.Tensor, **more: Any) -> tuple[float, int]:
        # The tool of ours that has nothing to do with exits, for those who compare with us.
        with torch.inference_mode(), few_token_products(self._model, 2):
            return self._plain(ids, mask, **more)

    def _with(self, exits: Exits, pace: Pace | None = None) -> "Way":
        def timed(ids: torch.Tensor, mask: torch.Tensor) -> tuple[float, int]:
            with wrapped(self._model, exits=exits) as model:
                if pace is not None:
                    model.dynadepth.exit_pace = pace
                return self._plain(ids, mask)

        return timed

    def _profile(self) -> list[dict[str, Any]]:
        """Return where the time of a new token goes, at batch 1, beside the base model's."""
        ways: dict[str, Exits | None] = {"base": None}
        for fidelity in (*self._options.fidelities, 1.0):
            with suppress(BudgetError):
                ways[f"exits {fidelity:g}" if fidelity < 1 else "lossless"] = self._exits.exits(
                    fidelity=fidelity
                )
        rows = []
        for way, exits in ways.items():
            clock = PartClock(self._model, self._stack)
            seconds, tokens = 0.0, 0
            for given in self._timed_prompts(1):
                say(f"profile of {way}", len(rows), len(ways))
                with clock.over(exits) as timed:
                    way_of = self._plain if timed is None else self._with(timed, Pace())
                    took, new = way_of(*given)
                seconds, tokens = seconds + took, tokens + new
            rows.append({"way": way, "parts": clock.parts(seconds, tokens)})
        return rows


# A way to decode prompts, given with their mask: the seconds, and the new tokens of the longest row.
Way = Callable[[torch.Tensor, torch.Tensor], tuple[float, int]]


def _failure(timed: Way, given: tuple[torch.Tensor, torch.Tensor]) -> str | None:
    """Run a way for the first time; say why it does not run, if so."""
    try:
        timed(*given)
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        return str(error)[:80]
    return None


def common(text: Text, own: Text) -> tuple[int, bool]:
    """Return how many new tokens two texts begin with alike, and whether they are the same."""
    ours, base = (each.ids[each.prompt :] for each in (text, own))
    length = min(len(ours), len(base))
    differ = np.flatnonzero(ours[:length] != base[:length])
    return (int(differ[0]) if len(differ) else length), np.array_equal(ours, base)


def lines_of(report: dict[str, Any]) -> list[str]:
    lines = [
        f"{report['model']} in {report['dtype']}, exits before {report['exit layers']} of {report['layers']} layers, "
        f"{report['train']} training and {report['prompts']} held-out prompts, unseen: {report['unseen']}, "
        f"{os.cpu_count()} cores",
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
        lines += ["", "| batch | way | time over the base's |", "|---" * 3 + "|"]
        lines += [
            f"| {row['batch']} | {row['way']} | "
            + (
                f"does not run: {row['failed']}"
                if "failed" in row
                else f"{row['time']:.3f} ({row['lowest']:.3f} to {row['highest']:.3f})"
            )
            + " |"
            for row in report["time"]
        ]
    if "profile" in report:
        parts = list(report["profile"][0]["parts"])
        lines += ["", f"| way | {' | '.join(parts)} |", "|---" * (1 + len(parts)) + "|"]
        lines += [
            f"| {row['way']} | {' | '.join(f'{each:.2f}' for each in row['parts'].values())} |"
            for row in report["profile"]
        ]
    return lines


def say(stage: str, done: int, total: int) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {stage} {done}/{total}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
