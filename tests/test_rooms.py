"""The order of rooms in docs/design.md: no import runs up the house."""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterator

PROJECT = pathlib.Path(__file__).parents[1]
FLOORS = (  # from the ground up; rooms on one floor do not know each other
    {"kernels"},
    {"tensors"},
    {"models", "transforms"},
    {"checkpoints"},
    {"inference"},
    {"data"},
    {"training"},
    {"planning", "curves"},
    {"cli", "notebook", "__init__"},
)
ANYWHERE = {"errors", "config"}
ROOMS = set().union(*FLOORS)


def imports(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """Yield (line, room or name imported from the package itself) of each import of our own package."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import"
            module = node.module or ""
            names = [f"tpu_tune.{name}" for name in names] if module == "tpu_tune" else [module]
        for name in names:
            if name.split(".")[0] == "tpu_tune":
                yield node.lineno, (name.split(".") + ["__init__"])[1]


def test_no_import_runs_up_the_house() -> None:
    for path in sorted((PROJECT / "tpu_tune").rglob("*.py")):
        room = path.relative_to(PROJECT / "tpu_tune").parts[0].removesuffix(".py")
        if room in ANYWHERE or room == "__main__":
            continue
        assert room in ROOMS, f"{path}: not in a room of docs/design.md"
        floor = next(number for number, rooms in enumerate(FLOORS) if room in rooms)
        below = set().union(*FLOORS[:floor]) if floor < len(FLOORS) - 1 else ROOMS
        for line, other in imports(path):
            allowed = other == room or other in below or other in ANYWHERE or (other == "__version__" and room == "cli")
            assert allowed, f"{path}:{line}: {room} imports {other}"


def test_the_design_page_lists_the_rooms_in_this_order() -> None:
    page = (PROJECT / "docs" / "design.md").read_text()
    listed = page[page.index("## The rooms") :]
    places = [[listed.index(f"tpu_tune/{room}/") for room in rooms] for rooms in FLOORS[:-1]]
    for lower, upper in zip(places, places[1:], strict=False):
        assert min(lower) > max(upper)
