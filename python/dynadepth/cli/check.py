"""The command check: whether a model runs exactly, proved on a tiny copy, without its weights."""

import json
from typing import Annotated, Any

import typer

from dynadepth.cli.options import Json

__all__ = ["check"]


def check(
    *,
    model: Annotated[
        str,
        typer.Argument(help="Folder or Hub id of a model, or its config.json; no weights are read"),
    ],
    again: Annotated[
        bool, typer.Option("--again", help="Prove even if there is a verdict already")
    ] = False,
    as_json: Json = False,
) -> None:
    """Prove that a model runs exactly under every plan, or say what is in the way; exit 1 if it is refused."""
    from transformers.utils import logging

    from dynadepth.models.loading import load_skeleton
    from dynadepth.proving.prove import prove

    # Defaults of families that a tiny copy changes would be warned about.
    logging.set_verbosity_error()
    skeleton = load_skeleton(model)
    verdict = prove(skeleton, again=again)
    if as_json:
        typer.echo(
            json.dumps({"model": model, "class": type(skeleton).__name__, **verdict.to_dict()})
        )
    else:
        for name, value in _lines(type(skeleton).__name__, verdict):
            typer.echo(f"{name:22} {value}")
    if not verdict.exact:
        raise typer.Exit(1)


def _lines(cls: str, verdict: Any) -> list[tuple[str, str]]:
    """Return the verdict as lines for a terminal."""
    lines = [
        ("model", f"{cls} (model_type {verdict.model_type})"),
        ("verdict", "exact" if verdict.exact else f"refused: {verdict.reason}"),
    ]
    if verdict.num_layers:
        lines.append(
            ("proved on", f"a random copy of {verdict.num_layers} layers, {verdict.seconds:.1f} s")
        )
    if verdict.exact:
        lines += [
            ("every plan within", f"{verdict.worst:.1e} of the largest logit"),
            ("base against itself", f"{verdict.noise:.1e} (padded, cached)"),
        ]
        why = verdict.traits.no_exits
        lines.append(("late exits", "exact" if why is None else f"refused: {why}"))
    if verdict.num_layers:
        lines.append(("kept in", verdict.kept))
    return lines
