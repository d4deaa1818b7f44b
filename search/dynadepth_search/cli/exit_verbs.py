"""What the verbs train and eval do where the policy is exits: it learns from prompts alone, and writes to be judged."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynadepth_search.cli.options import (
    display,
    in_chat,
    load,
    load_shortcuts_for,
    print_result,
    show_inspection,
)

if TYPE_CHECKING:
    from dynadepth.checkpoints.trained_exits import TrainedExits
    from dynadepth_search.data.tasks import Task

__all__ = ["evaluate_exits", "train_exits"]

_FIDELITIES = (0.99, 0.98, 0.95)


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
    from dynadepth_search.data.tasks import read_task
    from dynadepth_search.exits.building import clear_work, fit_exits
    from dynadepth_search.exits.spec import ExitSpec
    from dynadepth_search.training.router_fit import write_routers

    spec = ExitSpec(layers=layers or None, new_tokens=new_tokens, seed=seed)
    prompts = read_task(task, limit=limit)
    base, tokenizer = load(model, device, dtype)
    prompts = in_chat(prompts, tokenizer, chat=chat)
    work = out.with_name(f"{out.name}.work")
    with display() as progress:
        trained = fit_exits(base, tokenizer, prompts, work, spec, progress=progress)
    write_routers(out, trained)
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


def evaluate_exits(
    model: str,
    exits: "TrainedExits",
    prompts: "Task",
    out: Path,
    *,
    plans: Path | None,
    shortcuts: Path | None,
    against: Mapping[str, Path],
    fidelities: Sequence[float],
    budgets: Sequence[float],
    new_tokens: int,
    chat: bool,
    device: str,
    dtype: str,
    as_json: bool,
) -> None:
    """Evaluate late exits on held-out prompts, and write the page and print it.

    Args:
        model: The base model, as the verb was given it.
        exits: Its exits.
        prompts: The held-out prompts.
        out: Folder of results and page.
        plans: Folder of static plans to compare with; None: nothing but the base model.
        shortcuts: The shortcuts that these plans were found with, as the verb was given them; None: nothing.
        against: Folders of policies that plan prompts, by name.
        fidelities: Shares to keep; if these and the budgets are empty: some.
        budgets: Mean passes.
        new_tokens: The most tokens of an answer.
        chat: Whether prompts are turns of a chat.
        device: Where the model runs.
        dtype: Its dtype.
        as_json: Whether the result is printed as JSON.
    """
    from dynadepth.checkpoints.save_load import load_policy
    from dynadepth.errors import ConfigError
    from dynadepth_search.exits.judging.evaluating import Promise
    from dynadepth_search.exits.judging.evaluating import evaluate_exits as judge
    from dynadepth_search.inspecting.folders import check_free
    from dynadepth_search.inspecting.late_exits.judged import see_exit_evaluation
    from dynadepth_search.search.static import read_static
    from dynadepth_search.storage.compatibility import check_same_shortcuts

    check_free(out, "exit evaluation")
    asked = [Promise("fidelity", each) for each in fidelities]
    asked += [Promise("budget", each) for each in budgets]
    base, tokenizer = load(model, device, dtype)
    exits.check_model(base)
    heldout = in_chat(prompts, tokenizer, chat=chat)
    static = None if plans is None else read_static(plans, model=base)
    own = None if shortcuts is None else load_shortcuts_for(base, shortcuts)
    if static is not None:
        check_same_shortcuts(
            static.shortcuts,
            own,
            what=f"the plans in {plans} were",
            advice="give the --shortcuts that these plans were found with",
        )
    policies = {name: load_policy(folder, model=base) for name, folder in against.items()}
    for name, policy in policies.items():
        if policy.kind == "exits":
            raise ConfigError(
                f"--against gives {against[name]}, which holds exits too; give policies that plan prompts, and "
                "evaluate each exits folder by itself"
            )
    with display() as progress:
        content = judge(
            base,
            tokenizer,
            heldout=heldout,
            exits=exits,
            promises=asked or [Promise("fidelity", each) for each in _FIDELITIES],
            folder=out,
            pool=None if static is None else (static.pool, static.pool_values),
            shortcuts=own,
            against=policies,
            seen={} if static is None else {f"the plans in {plans}": static.prompt_hashes},
            new_tokens=new_tokens,
            progress=progress,
        )
    show_inspection(see_exit_evaluation(content), out, as_json=as_json)
