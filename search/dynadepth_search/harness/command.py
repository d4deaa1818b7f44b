"""`dynadepth lm-eval`: lm-evaluation-harness' own command line, which knows `--model dynadepth`.

Versions of the harness that look for plug-ins find the model by its entry point; released ones do not look yet.
"""

import sys
from collections.abc import Sequence

from dynadepth.errors import ConfigError

__all__ = ["register_model", "run_harness"]

_NAME = "dynadepth"
_TARGET = "dynadepth_search.harness.model:DynadepthLM"


def register_model() -> None:
    """Let the harness know the model, which is imported when it is asked for.

    Raises:
        ConfigError: lm-eval is not installed.
    """
    try:
        from lm_eval.api.registry import model_registry
    except ImportError as error:
        raise ConfigError(
            f"lm-eval is not installed ({error}); `pip install dynadepth-search[lm-eval]`"
        ) from error
    if _NAME not in model_registry.keys():  # noqa: SIM118 (a registry is no mapping)
        model_registry.register(_NAME, target=_TARGET)


def run_harness(arguments: Sequence[str]) -> None:
    """Run the harness' command line.

    Args:
        arguments: What follows its name there.

    Raises:
        ConfigError: lm-eval is not installed.
    """
    register_model()
    from lm_eval.__main__ import cli_evaluate

    # It reads its own arguments.
    before, sys.argv = sys.argv, ["lm-eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
