"""What `train --policy exits` does."""

from pathlib import Path
from typing import Any

from dynadepth_search.cli.options import display, in_chat, load, print_result

__all__ = ["train_exits"]


def train_exits(
    model: str,
    task: Path,
    out: Path,
    *,
    layers: tuple[int, ...],
    new_tokens: int,
    chat: bool,
    limit: int | None,
    seed: int,
    device: str,
    dtype: str,
    as_json: bool,
) -> None:
    """Train exit heads, calibrate them on text that they produced, and write the routers folder.

    Args:
        model: The base model, as the verb was given it.
        task: File of the training prompts.
        out: Folder of the routers. What is worked on lies in one beside it, named after it with `.work`.
        layers: Exit layers; none: chosen.
        new_tokens: The most tokens by which each prompt is continued.
        chat: Whether prompts are turns of a chat.
        limit: The most prompts; None: all.
        seed: Seed of everything random.
        device: Where the model runs.
        dtype: Its dtype.
        as_json: Whether the result is printed as JSON.
    """
    from dynadepth.checkpoints.save_load import save_policy
    from dynadepth_search.data.tasks import read_task
    from dynadepth_search.exits.building import clear_work, fit_exits
    from dynadepth_search.exits.spec import ExitSpec

    spec = ExitSpec(layers=layers or None, new_tokens=new_tokens, seed=seed)
    prompts = read_task(task, limit=limit)
    base, tokenizer = load(model, device, dtype)
    prompts = in_chat(prompts, tokenizer, chat=chat)
    work = out.with_name(f"{out.name}.work")
    with display() as progress:
        trained = fit_exits(base, tokenizer, prompts, work, spec, progress=progress)
    save_policy(out, trained)
    clear_work(work)
    promises = trained.promises
    lowest, highest = trained.calibration.range
    result: dict[str, Any] = {
        "routers": str(out),
        "policy": "exits",
        "exit_layers": ",".join(str(head.layer_idx) for head in trained.heads),
        "lowest_budget": lowest,
        "highest_budget": highest,
        "train_prompts": trained.training["train_prompts"],
        "validation_prompts": trained.training["validation_prompts"],
        "prompts_of_task": trained.training["prompts_of_task"],
        "lowest_fidelity": promises.likely[-1],
        **{
            f"passes_at_{kept:.3f}_kept": passes
            for kept, passes in zip(promises.kept[1:], promises.passes[1:], strict=True)
        },
    }
    print_result(result, as_json=as_json)
