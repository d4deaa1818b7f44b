"""The commands of the runtime: generate, bake, export, push.

Each command checks its options, loads what they name and calls the library; everything here can be done from Python as
well. Heavy imports are inside the commands, so that `dynadepth --version` needs neither torch nor transformers.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dynadepth.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["register"]

_Model = Annotated[str, typer.Option("--model", help="Folder or Hub id of the base model")]
_PLAN_HELP = (
    "One digit for each layer (0 skips, 1 executes, 2 repeats it), "
    "or the layers in the order of their visits: 0-3,5,5"
)
_Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("generate")(_generate)
    app.command("bake")(_bake)
    app.command("export")(_export)
    app.command("push")(_push)


def _generate(
    *,
    model: _Model,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue")],
    budget: Annotated[
        float | None,
        typer.Option("--budget", help="Mean depth over prompts, as a fraction of the full depth"),
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option("--plan", help=_PLAN_HELP),
    ] = None,
    routers: Annotated[
        str | None,
        typer.Option(
            "--routers", help="Folder or Hub id of the routers [default: beside the model]"
        ),
    ] = None,
    router_backend: Annotated[
        Literal["torch", "onnx"],
        typer.Option("--router-backend", help="Library that computes the decisions"),
    ] = "torch",
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Maximum length of the answer in tokens")
    ] = 64,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template")
    ] = False,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature", min=0.0, help="Sampling temperature; 0 takes the likeliest token"
        ),
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the sampling")] = 0,
    device: Annotated[
        str, typer.Option("--device", help="torch device that the model runs on")
    ] = "cpu",
    as_json: _Json = False,
) -> None:
    """Continue a prompt at a mean depth (--budget) or with one plan (--plan)."""
    if (budget is None) == (plan is None):
        raise typer.BadParameter("give either --budget or --plan")
    if plan is not None and routers is not None:
        raise typer.BadParameter("--routers goes with --budget; a --plan needs no routers")
    if plan is not None and router_backend != "torch":
        raise typer.BadParameter("--router-backend goes with --budget; a --plan needs no routers")
    if not prompt.strip():
        raise typer.BadParameter("--prompt is empty")

    import torch

    from dynadepth import wrap_model
    from dynadepth.models.loading import load_model, load_tokenizer
    from dynadepth.plans import plan_depth, plan_text

    base = load_model(model, device=device)
    tokenizer = load_tokenizer(model)
    if plan is not None:
        wrapped = wrap_model(base, plan=plan)
    else:
        wrapped = wrap_model(base, budget=budget, routers=routers, router_backend=router_backend)
    inputs = _encode(tokenizer, prompt, chat=chat, model=wrapped)
    torch.manual_seed(seed)
    start = time.perf_counter()
    sampling = (
        {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    )
    tokens = wrapped.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)
    seconds = time.perf_counter() - start
    answer = tokens[0, inputs["input_ids"].shape[1] :]
    text = tokenizer.decode(answer, skip_special_tokens=True)
    used = wrapped.dynadepth.last_plans[0]
    depth = float(plan_depth(used))
    if as_json:
        result = {
            "model": model,
            "prompt": prompt,
            "text": text,
            "budget": budget,
            "depth": depth,
            "plan": plan_text(used),
            "new_tokens": len(answer),
            "seconds": round(seconds, 3),
        }
        typer.echo(json.dumps(result, indent=2, sort_keys=True))
        return
    typer.echo(text)
    typer.echo(
        f"depth {depth:.3f}, plan {plan_text(used)}, {len(answer)} tokens in {seconds:.1f} s",
        err=True,
    )


def _bake(
    *,
    model: _Model,
    plan: Annotated[str, typer.Option("--plan", help=_PLAN_HELP)],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; new or empty")],
    as_json: _Json = False,
) -> None:
    """Write a plain checkpoint that always follows one plan."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder; give a new folder as --out")

    from dynadepth.models.families import layer_stack
    from dynadepth.models.loading import load_model, load_tokenizer
    from dynadepth.plans import parse_plan, plan_depth, plan_text
    from dynadepth.wrapping.bake import save_baked

    base = load_model(model)
    actions = parse_plan(plan, layer_stack(base).num_layers)
    tokenizer = load_tokenizer(model)
    out.parent.mkdir(parents=True, exist_ok=True)
    # The folder appears complete or not at all.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        folder = Path(scratch) / "checkpoint"
        save_baked(base, actions, folder)
        tokenizer.save_pretrained(folder)
        if out.exists():
            out.rmdir()
        folder.rename(out)
    depth = float(plan_depth(actions))
    if as_json:
        result = {"out": str(out), "depth": depth, "plan": plan_text(actions)}
        typer.echo(json.dumps(result, sort_keys=True))
    else:
        typer.echo(str(out))
        typer.echo(f"depth {depth:.3f}: {int(actions.sum())} layers", err=True)


def _export(
    *,
    routers: Annotated[str, typer.Option("--routers", help="Folder or Hub id of the routers")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="File to write [default: routers.onnx in --routers]"),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Write the routers as one ONNX file that decides without Python."""
    if out is None and not Path(routers).is_dir():
        raise typer.BadParameter(f"--routers {routers} is not a folder, so --out is needed")

    from dynadepth.checkpoints.paths import ONNX_NAME
    from dynadepth.checkpoints.save_load import export_policy, load_routers

    loaded = load_routers(routers)
    # The folder where the routers were found: `routers/` if the folder of a base model was given.
    target = (loaded.folder or Path(routers)) / ONNX_NAME if out is None else out
    export_policy(loaded, target)
    if as_json:
        typer.echo(json.dumps({"out": str(target), "bytes": target.stat().st_size}, sort_keys=True))
    else:
        typer.echo(str(target))


def _push(
    *,
    routers: Annotated[Path, typer.Option("--routers", help="Folder of the routers")],
    repo: Annotated[
        str,
        typer.Option(
            "--repo", help="Hub id, org/name; the repository is created if it does not exist"
        ),
    ],
    beside_model: Annotated[
        bool,
        typer.Option("--beside-model", help="Put them into routers/ of the model's repository"),
    ] = False,
    private: Annotated[
        bool,
        typer.Option(
            "--private", help="Create a private repository; an existing one must be private"
        ),
    ] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch to push to [default: main]")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Publish the routers on the Hugging Face hub, in one commit."""
    if not routers.is_dir():
        raise typer.BadParameter(f"--routers {routers} is not a folder")

    from dynadepth.checkpoints.hub import push_routers

    url = push_routers(
        routers,
        repo,
        beside_model=beside_model,
        # Without the option, the default of the owner's account applies.
        private=private or None,
        revision=revision,
    )
    if as_json:
        typer.echo(json.dumps({"repo": repo, "revision": revision, "url": url}, sort_keys=True))
    else:
        typer.echo(url)


def _encode(
    tokenizer: "PreTrainedTokenizerBase", prompt: str, *, chat: bool, model: "PreTrainedModel"
) -> "dict[str, torch.Tensor]":
    """Return the prompt's token ids and attention mask, on the model's device."""
    if chat:
        if not tokenizer.chat_template:
            raise ConfigError("the model has no chat template; leave out --chat")
        messages = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    names = ("input_ids", "attention_mask")
    return {name: encoded[name].to(model.device) for name in names}
