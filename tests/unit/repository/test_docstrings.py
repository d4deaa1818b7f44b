"""Public callables say what they take, return and raise: Google sections, read from the sources."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SOURCES = sorted(
    path
    for package in ("python/dynadepth", "search/dynadepth_search")
    for path in (ROOT / package).rglob("*.py")
)
# From so many arguments on, `self` and `cls` aside, each is described.
MANY = 3


def public_functions(tree):
    """Yield (qualified name, node) of public functions and methods of public classes; verbs of a command line aside.

    A verb's options describe themselves: each has a `help` text.
    """
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and not item.name.startswith("_"):
                    yield f"{node.name}.{item.name}", item


def arguments_of(node):
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [each.arg for each in every if each.arg not in ("self", "cls")]


def raises_of_ours(node):
    """Return the names of errors of the tree that a function raises in its own body."""
    found = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Raise) and isinstance(inner.exc, ast.Call):
            name = getattr(inner.exc.func, "id", "")
            if name.endswith("Error"):
                found.add(name)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arguments_and_errors_are_described(path):
    lacking = []
    for name, node in public_functions(ast.parse(path.read_text(encoding="utf-8"))):
        text = ast.get_docstring(node) or ""
        arguments = arguments_of(node)
        is_verb = any("typer.Option" in ast.unparse(each) for each in [node.args]) or (
            path.parent.name == "cli" and "as_json" in arguments
        )
        if len(arguments) >= MANY and not is_verb:
            described = re.search(r"(?ms)^Args:\n(.*?)(?=^\S|\Z)", text)
            missing = [
                each
                for each in arguments
                if described is None or not re.search(rf"(?m)^ +\**{each}:", described[1])
            ]
            if missing:
                lacking.append(f"{name}: Args of {', '.join(missing)}")
        undocumented = {
            error for error in raises_of_ours(node) if not re.search(rf"\b{error}\b", text)
        }
        # An override may leave the errors to the method that it overrides.
        if (
            undocumented
            and not is_verb
            and not re.search(r"(?i)\bas for `|; see `|raises as", text)
        ):
            lacking.append(f"{name}: Raises {', '.join(sorted(undocumented))}")
    assert lacking == []
