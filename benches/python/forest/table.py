"""A table of a real model's rewards: every set of skips of ten layers, for 64 prompts of three kinds.

SmolLM2-135M, objective `preserve`, prompts of at most 40 tokens, scored as `dynadepth score --subsets` does, so
`dynadepth tune search --scores` reads the same folder. The ten layers are those of the upper half whose single skips 16
other prompts miss least (late layers share most of a sweep); lambda and the prior are what these prompts say of them.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dynadepth.plans import EXECUTE, SKIP
from dynadepth.tree_search.forest import EditPrior
from dynadepth_search.scoring.score_table import read_scores, score_prompts
from dynadepth_search.tuning.replay import ReplayTable, skip_subsets

PROMPTS, PROBED, EDITED, MOST_TOKENS = 64, 16, 10, 40
OBJECTIVE = "preserve"


@dataclass
class Table:
    """Rewards of all sets of skips of some layers.

    Args:
        rewards: Of the prompts that searches are judged by.
        prior: What single skips do to the other prompts.
        depth_penalty: Lambda.
        made_of: What it is made of, for the report.
    """

    rewards: ReplayTable
    prior: EditPrior
    depth_penalty: float
    made_of: dict[str, Any]

    @classmethod
    def of(cls, known: ReplayTable, made_of: dict[str, Any], probed: int = PROBED) -> "Table":
        """Split prompts: the last `probed` of them tell the prior."""
        split = len(known) - probed
        others = known.take(np.arange(split, len(known)))
        judged = known.take(np.arange(split))
        return cls(judged, others.prior(), others.penalty(), made_of)

    @classmethod
    def load(cls, folder: Path) -> "Table":
        scores = read_scores(folder)
        return cls.of(ReplayTable.from_scores(scores, OBJECTIVE), scores.manifest["asked"])


def default_folder() -> Path:
    """Return where the table lies in the cache."""
    from dynadepth_search.data.downloads import default_cache

    return default_cache() / f"bench-forest/{OBJECTIVE}-{PROMPTS}-{PROBED}-{EDITED}-{MOST_TOKENS}"


def make_table(folder: Path) -> None:
    """Score all sets of skips; a run that was killed goes on."""
    from dynadepth.models.loading import load_model, load_tokenizer
    from dynadepth_search.data.downloads import SMOLLM2, default_cache, fetch_model
    from dynadepth_search.data.kinds import KINDS, fetch_kinds, in_turns
    from dynadepth_search.data.tasks import Task
    from dynadepth_search.scoring.scorer import Scorer

    source = str(fetch_model(default_cache(), source=SMOLLM2))
    model, tokenizer = load_model(source, dtype="fast"), load_tokenizer(source)
    scorer = Scorer(model, tokenizer)
    drawn, _ = fetch_kinds(default_cache(), train=20 * (PROMPTS + PROBED), heldout=0)
    short = {kind: [] for kind in KINDS}
    for example, kind in zip(drawn.task.examples, drawn.kinds, strict=True):
        if scorer.encode(example).longest <= MOST_TOKENS:
            short[kind].append(example)
    examples, _ = in_turns(short, PROMPTS + PROBED)
    num_layers = scorer.num_layers
    singles = np.full((num_layers, num_layers), EXECUTE, dtype=np.uint8)
    np.fill_diagonal(singles, SKIP)
    nowhere = np.zeros(num_layers, dtype=np.int64)
    changes = [
        scorer.rewards([example], singles, nowhere, OBJECTIVE)[0] for example in examples[PROMPTS:]
    ]
    late = np.arange(num_layers) >= num_layers // 2
    missed = np.where(late, -np.mean(changes, axis=0), np.inf)
    layers = sorted(np.argsort(missed, kind="stable")[:EDITED].tolist())

    def told(_stage: str, done: int, of: int) -> None:
        sys.stderr.write(f"\rtable: {done}/{of} prompts")

    task = Task("short prompts of three kinds", tuple(examples))
    plans = skip_subsets(layers, num_layers)
    score_prompts(model, tokenizer, task, plans, folder, layers=(0,), progress=told)
    sys.stderr.write("\n")
