"""Print the house in numbers, from the real imports: rooms, floors, arrows, and arrows that run up.

A room is what lies directly in a package: a sub-package, or a module by itself. An arrow joins two rooms of which one
imports the other. Floors are those of the import contracts in `pyproject.toml`; an arrow runs up if it does not go to a
lower floor. Run it in a clone: `.venv/bin/python .ci/rooms.py`; `--arrows` lists every arrow with how many imports it
stands for.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import grimp
from importlinter.api import read_configuration

ROOT = Path(__file__).parents[1]


def floors_of(pyproject: Path) -> dict[str, dict[str, int]]:
    """Return by package the floor of each room, 1 being the ground."""
    contracts = read_configuration(str(pyproject))["contracts_options"]
    return {
        contract["containers"][0]: {
            room.strip(): floor
            for floor, layer in enumerate(reversed(contract["layers"]), start=1)
            for room in layer.split("|")
        }
        for contract in contracts
        if contract["type"] == "layers"
    }


def measure(package: str, floors: dict[str, int]) -> dict[str, Any]:
    """Return rooms, floors and arrows of a package."""
    graph = grimp.build_graph(package, exclude_type_checking_imports=True)
    rooms = sorted(name.rpartition(".")[2] for name in graph.find_children(package))
    arrows: Counter[tuple[str, str]] = Counter()
    for module in sorted(graph.modules - {package}):
        for imported in graph.find_modules_directly_imported_by(module):
            ends = [name.split(".")[1] for name in (module, imported) if name.count(".")]
            if len(ends) == 2 and ends[0] != ends[1]:
                arrows[ends[0], ends[1]] += 1
    # A package in a room is a room of its own here.
    files = Counter(
        module.rpartition(".")[0] for module in graph.modules if not graph.find_children(module)
    )
    up = [pair for pair in arrows if floors[pair[0]] <= floors[pair[1]]]
    return {
        "rooms": len(rooms),
        "files": sum(files.values()),
        "most files in a room": max(files.values()),
        "floors": len(set(floors.values())),
        "arrows between rooms": len(arrows),
        "arrows that run up": len(up),
        "arrows": {f"{a} -> {b}": count for (a, b), count in sorted(arrows.items())},
    }


def main() -> None:
    """Print the numbers of both packages."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pyproject", type=Path, default=ROOT / "pyproject.toml")
    parser.add_argument("--arrows", action="store_true", help="list every arrow")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options = parser.parse_args()
    found = {
        package: measure(package, floors)
        for package, floors in floors_of(options.pyproject).items()
    }
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for package, numbers in found.items():
        arrows = numbers.pop("arrows")
        print(f"{package}: " + ", ".join(f"{name} {value}" for name, value in numbers.items()))
        if options.arrows:
            for arrow, count in arrows.items():
                print(f"    {arrow} ({count})")


if __name__ == "__main__":
    main()
