"""The commands of the runtime: generate, bake, export, push, check.

Each command checks its options, loads what they name and calls the library; everything here can be done from Python as
well. Heavy imports are inside the commands, so that `dynadepth --version` needs neither torch nor transformers.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from dynadepth.cli.check import check
from dynadepth.cli.generate import generate
from dynadepth.cli.options import PLAN_HELP, Json, Model
from dynadepth.errors import ConfigError

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("generate")(generate)
    app.command("bake")(_bake)
    app.command("export")(_export)
    app.command("push")(_push)
    app.command("check")(check)


def _bake(
    *,
    model: Model,
    plan: Annotated[str, typer.Option("--plan", help=PLAN_HELP)],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; new or empty")],
    shortcuts: Annotated[
        str | None,
        typer.Option(
            "--shortcuts",
            help="Refused: a plain checkpoint has no place for shortcuts; see the verb fold",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a plain checkpoint that always follows one plan."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder; give a new folder as --out")

    from dynadepth.models.loading import load_model, load_tokenizer
    from dynadepth.models.structure import layer_stack
    from dynadepth.plans import parse_plan, plan_depth, plan_text
    from dynadepth.wrapping.bake import check_no_shortcuts, save_baked

    check_no_shortcuts(shortcuts)
    base = load_model(model)
    actions = parse_plan(plan, layer_stack(base).num_layers)
    # The tokenizer as in its files: the padding that generation needs does not belong into the checkpoint.
    tokenizer = load_tokenizer(model, for_generation=False)
    save_baked(base, actions, out, tokenizer=tokenizer)
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
    as_json: Json = False,
) -> None:
    """Write the routers as one ONNX file that decides without Python."""
    if out is None and not Path(routers).is_dir():
        raise typer.BadParameter(f"--routers {routers} is not a folder, so --out is needed")

    from dynadepth.checkpoints.paths import ONNX_NAME
    from dynadepth.checkpoints.save_load import export_policy, load_policy

    loaded = load_policy(routers)
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
    as_json: Json = False,
) -> None:
    """Publish the routers on the Hugging Face hub, in one commit."""
    if not routers.is_dir():
        raise typer.BadParameter(f"--routers {routers} is not a folder")

    from dynadepth.checkpoints.hub import push_policy

    url = push_policy(
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
