"""Options that several commands of the runtime share."""

from typing import Annotated, Literal

import typer

__all__ = ["PLAN_HELP", "Device", "Dtype", "Json", "Model"]

Model = Annotated[str, typer.Option("--model", help="Folder or Hub id of the base model")]
PLAN_HELP = (
    "One digit for each layer (0 skips, 1 executes, 2 repeats it), "
    "or the layers in the order of their visits: 0-3,5,5"
)
Device = Annotated[str, typer.Option("--device", help="torch device that the model runs on")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16", "float64"],
    typer.Option("--dtype", help="dtype of the weights; auto keeps the checkpoint's own"),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object")]
