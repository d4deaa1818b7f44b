"""The command line `dynadepth`: what all commands share, and where they come from.

Logs and progress go to stderr, results to stdout. The exit code is 0, 1 (an error of dynadepth: one line, no traceback)
or 2 (a wrong command line). The commands of the runtime are in `dynadepth.cli.commands`; another distribution adds
commands through the entry-point group `dynadepth.commands`, each entry of which is a function `register(app)`.
"""

from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dynadepth.cli import commands
from dynadepth.errors import DynadepthError

__all__ = ["command_line", "main"]

_PLUGINS = "dynadepth.commands"
_VERBS_OF_SEARCH = (
    "demo",
    "eval",
    "fold",
    "inspect",
    "report",
    "score",
    "search",
    "shortcuts",
    "train",
    "tune",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        argv: The arguments after the program's name; those of this process if None.

    Returns:
        0; 1 for an error of dynadepth, whose message is printed; 2 for a wrong command line.
    """
    try:
        command_line()(args=None if argv is None else list(argv), prog_name="dynadepth")
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except (DynadepthError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        return 1
    return 0


def command_line() -> typer.Typer:
    """Return the command line with the commands of the runtime and of every plugin."""
    app = typer.Typer(
        cls=_Verbs,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback(invoke_without_command=True)(_options)
    commands.register(app)
    for entry in entry_points(group=_PLUGINS):
        _add_plugin(app, entry)
    return app


class _Verbs(TyperGroup):
    """The commands, with a hint about those that come with another distribution."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in _VERBS_OF_SEARCH and self.get_command(ctx, args[0]) is None:
            ctx.fail(
                f"the command {args[0]!r} is not available; it belongs to dynadepth-search, which is "
                "not installed or does not load: install it with `pip install ./search`"
            )
        return super().resolve_command(ctx, args)


def _add_plugin(app: typer.Typer, entry: EntryPoint) -> None:
    """Let a plugin add its commands; if it does not load, only its own commands are missing."""
    try:
        entry.load()(app)
    except Exception as error:  # whatever a plugin raises, the other commands still work
        owner = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "another distribution"
        typer.echo(
            f"warning: the commands {entry.value!r} of {owner} do not load "
            f"({type(error).__name__}: {error}); install that distribution again",
            err=True,
        )


def _options(
    *,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit")] = False,
) -> None:
    """Dynamic depth for frozen language models."""
    if version:
        from dynadepth._core import __version__

        typer.echo(f"dynadepth {__version__}")
        raise typer.Exit
