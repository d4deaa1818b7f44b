"""The error tree: one root, and the built-in that a caller may already catch."""

import pytest

from dynadepth import errors

BUILTINS = {
    "AssetError": RuntimeError,
    "BudgetError": ValueError,
    "CheckpointError": ValueError,
    "ConfigError": ValueError,
    "ExportError": RuntimeError,
    "HubError": RuntimeError,
    "LabelError": ValueError,
    "PlanError": ValueError,
    "RunnerError": RuntimeError,
    "SearchError": RuntimeError,
    "ShortcutError": ValueError,
    "TaskError": ValueError,
    "UnsupportedModelError": ValueError,
    "WrapError": RuntimeError,
}


def test_every_error_is_listed_here_and_in_all():
    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and value.__module__ == errors.__name__
    }
    assert defined == set(BUILTINS) | {"DynadepthError", "DynadepthWarning"}
    assert sorted(defined) == list(errors.__all__)


@pytest.mark.parametrize(("name", "builtin"), BUILTINS.items())
def test_an_error_is_caught_by_the_root_and_by_its_builtin(name, builtin):
    error = getattr(errors, name)
    for handler in (errors.DynadepthError, builtin):
        with pytest.raises(handler, match=r"^given, expected, to do$"):
            raise error("given, expected, to do")


@pytest.mark.parametrize("name", BUILTINS)
def test_an_error_says_in_its_docstring_when_it_is_raised(name):
    assert (getattr(errors, name).__doc__ or "").endswith(".")


def test_the_warning_is_a_user_warning_and_no_error():
    assert issubclass(errors.DynadepthWarning, UserWarning)
    assert not issubclass(errors.DynadepthWarning, errors.DynadepthError)
