"""The house: one version, a fixed top level, and a public interface that loads lazily."""

import ast
import importlib
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dynadepth
from dynadepth import _core

ROOT = Path(__file__).parents[3]
TOP_LEVEL = {
    *(
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "Cargo.lock",
        "Cargo.toml",
        "LICENSE",
        "README.md",
        "pyproject.toml",
    ),
    *("benches", "docs", "examples", "python", "rust", "search", "tests"),
}
# What must not come with `import dynadepth`, and what must not come with wrapping either.
HEAVY = ("torch", "transformers", "huggingface_hub", "safetensors", "typer")
OPTIONAL = (
    "gguf",
    "lm_eval",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "optuna",
    "pyarrow",
    "ray",
    "rich",
)


def tracked_files():
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
    )
    return [Path(name) for name in listing.stdout.split("\0") if name]


def modules_after(program):
    """Return the modules that a fresh interpreter holds after a program."""
    script = f"{program}\nimport sys\nprint(*sorted(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=True, text=True
    )
    return set(result.stdout.split())


def test_version_numbers_have_one_source():
    cargo = re.search(r'(?m)^version = "([^"]+)"', (ROOT / "Cargo.toml").read_text())
    assert cargo is not None
    assert {
        _core.__version__,
        dynadepth.__version__,
        importlib.metadata.version("dynadepth"),
        importlib.metadata.version("dynadepth-search"),
    } == {cargo[1]}


def test_no_other_file_states_the_version():
    for name in ("pyproject.toml", "search/pyproject.toml"):
        text = (ROOT / name).read_text()
        assert 'dynamic = ["version"]' in text
        assert not re.search(r"(?m)^version\s*=", text)
    for crate in ("core", "py"):
        assert "version.workspace = true" in (ROOT / f"rust/{crate}/Cargo.toml").read_text()


def test_the_top_level_holds_nothing_else():
    top = {path.parts[0] for path in tracked_files()}
    assert {name for name in top if not name.startswith(".")} == TOP_LEVEL


def test_nothing_built_is_tracked():
    built = {".so", ".pyd", ".whl", ".pyc", ".onnx", ".safetensors", ".parquet", ".gguf", ".pkl"}
    assert [path for path in tracked_files() if path.suffix in built] == []


def test_the_public_names_are_sorted_and_each_loads_from_its_module():
    assert list(dynadepth.__all__) == sorted(dynadepth.__all__)
    assert dir(dynadepth) == list(dynadepth.__all__)
    for name in dynadepth.__all__:
        value = getattr(dynadepth, name)
        assert not isinstance(value, type(sys)), name
        assert name == "__version__" or value.__doc__, name


def test_a_public_name_is_the_same_object_however_it_is_reached():
    program = (
        "import importlib, pkgutil, dynadepth\n"
        "for module in pkgutil.walk_packages(dynadepth.__path__, 'dynadepth.'):\n"
        "    importlib.import_module(module.name)\n"
        "for name in dynadepth.__all__:\n"
        "    value = getattr(dynadepth, name)\n"
        "    assert not isinstance(value, type(dynadepth)), name\n"
    )
    modules_after(program)


@pytest.mark.parametrize("package", ["dynadepth", "dynadepth_search"])
def test_a_room_only_names_itself_and_holds_about_eight_files(package):
    root = Path(importlib.import_module(package).__file__).parent
    for room in {path.parent for path in root.rglob("*.py")} - {root}:
        (named,) = ast.parse((room / "__init__.py").read_text(encoding="utf-8")).body
        assert isinstance(named, ast.Expr), f"{room.name}/__init__.py does more than say what it is"
        files = [path for path in room.glob("*.py") if path.name != "__init__.py"]
        assert 1 < len(files) <= 10, room


def test_the_numbers_of_the_house_show_no_arrow_that_runs_up():
    script = [sys.executable, ".ci/rooms.py", "--json"]
    result = subprocess.run(script, cwd=ROOT, capture_output=True, check=True, text=True)
    for numbers in json.loads(result.stdout).values():
        assert numbers["arrows that run up"] == 0
        assert len(numbers["arrows"]) == numbers["arrows between rooms"] > numbers["floors"] > 1


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'dynadepth' has no attribute 'rap'"):
        dynadepth.__getattr__("rap")
    with pytest.raises(ImportError, match="cannot import name 'rap_model'"):
        exec("from dynadepth import rap_model")


def test_import_is_light():
    modules = modules_after("import dynadepth\ndynadepth.__version__")
    assert "dynadepth._core" in modules
    assert modules.isdisjoint(HEAVY + OPTIONAL)


def test_the_version_command_is_light():
    modules = modules_after("from dynadepth.cli.main import main\nassert main(['--version']) == 0")
    assert "dynadepth_search.cli.main" in modules
    assert modules.isdisjoint({"torch", "transformers", "numpy", *OPTIONAL})


def test_wrapping_imports_neither_models_nor_optional_packages():
    modules = modules_after("from dynadepth import wrap_model, bake, load_policy, RouterPolicy")
    assert "torch" in modules
    assert modules.isdisjoint(OPTIONAL)
    # `auto` holds the table of names; what runs a family is imported with its model.
    families = [
        name for name in modules if re.match(r"transformers\.models\.(?!auto)\w+\.modeling", name)
    ]
    assert families == []


def test_the_runtime_never_imports_the_search_application():
    modules = modules_after(
        "from dynadepth import wrap_model; from dynadepth.cli import main, commands"
    )
    assert not {name for name in modules if name.startswith("dynadepth_search")}


@pytest.mark.parametrize("package", ["dynadepth", "dynadepth_search"])
def test_a_package_tells_type_checkers_that_it_is_typed(package):
    assert (Path(importlib.import_module(package).__file__).parent / "py.typed").is_file()
