"""The package's structure: the order of its packages, no import cycles, the size of functions, and the length of lines.

A part of the package imports only from parts further down in `ORDER`; the design is in docs/design.md. What breaks a
rule stands in the lists below, with the reason.
"""

from __future__ import annotations

import ast
import fnmatch
import functools
import graphlib
import pathlib
import tomllib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "tpu_tune"
MAX_LINES, MAX_PARAMETERS, MAX_COLUMNS = 80, 8, 120

# From low to high. Parts in one set do not import each other, except within `cli` and `__init__`.
ORDER = (
    {"kernels"},
    {"tensors"},
    {"models", "transforms"},
    {"checkpoints"},
    {"inference"},
    {"data"},
    {"training"},
    {"planning", "curves"},
    {"cli", "notebook", "__main__", "__init__"},
)
ANYWHERE = {"ctrl_c", "errors", "config"}

# Functions over 80 lines or 8 parameters, outside kernels/, where the mathematics decides.
TOO_LARGE = {
    "tpu_tune/training/schedules.py: _warmup_stable_decay",  # its keywords are those of transformers' schedule
}


@functools.cache
def modules() -> dict[str, tuple[pathlib.Path, ast.Module]]:
    """Return path and syntax tree of every module of the package, by dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = (path, ast.parse(path.read_text(encoding="utf-8")))
    return found


def imported(name: str, node: ast.AST) -> Iterator[str]:
    """Yield the package's modules that an import statement in module `name` names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in modules())
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, f"{name}: a relative import"
        for alias in node.names:
            submodule = f"{node.module}.{alias.name}"
            if submodule in modules():
                yield submodule
            elif node.module in modules():
                yield node.module


def run_at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the statements that importing a module runs: all but those in functions and under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from run_at_import(node)


def functions() -> Iterator[tuple[pathlib.Path, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield every function of the package with its file."""
    for path, tree in modules().values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield path, node


def test_a_part_imports_only_from_lower_ones() -> None:
    floor = {part: number for number, parts in enumerate(ORDER) for part in parts}
    wrong = []
    for name, (path, tree) in modules().items():
        part = name.split(".")[1] if "." in name else "__init__"
        if part in ANYWHERE or floor[part] == len(ORDER) - 1:
            continue
        for node in ast.walk(tree):
            for target in imported(name, node):
                other = target.split(".")[1] if "." in target else "__init__"
                if other not in ANYWHERE and other != part and floor[other] >= floor[part]:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {part} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_the_design_page_lists_the_parts_in_this_order() -> None:
    page = (ROOT / "docs" / "design.md").read_text()
    listed = page[page.index("## The rooms") :]
    positions = [[listed.index(f"tpu_tune/{part}/") for part in parts] for parts in ORDER[:-1]]
    for lower, upper in zip(positions, positions[1:], strict=False):
        assert min(lower) > max(upper)


def test_no_modules_import_each_other() -> None:
    graph = {
        name: {target for node in run_at_import(tree) for target in imported(name, node)} - {name}
        for name, (_, tree) in modules().items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_functions_are_small() -> None:
    found = set()
    for path, node in functions():
        a = node.args
        parameters = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
        count = len([parameter for parameter in parameters if parameter.arg not in ("self", "cls")])
        if node.end_lineno - node.lineno >= MAX_LINES or count > MAX_PARAMETERS:
            found.add(f"{path.relative_to(ROOT)}: {node.name}")
    assert {function for function in found if not function.startswith("tpu_tune/kernels/")} <= TOO_LARGE


def test_lines_are_short() -> None:
    """Ruff holds this for all files; here it is held without ruff, with the exceptions that pyproject.toml lists."""
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]
    exceptions = [glob for glob, rules in ruff["lint"].get("per-file-ignores", {}).items() if "E501" in rules]
    long = [
        f"{path.relative_to(ROOT)}:{number}"
        for path, _ in modules().values()
        if not any(fnmatch.fnmatch(str(path.relative_to(ROOT)), glob) for glob in exceptions)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if len(line) > MAX_COLUMNS
    ]
    assert ruff["line-length"] == MAX_COLUMNS and not long, long


def test_only_tables_are_laid_out_by_hand() -> None:
    """`fmt: skip` stands at the end of a constant that is a list, tuple, set or dict."""
    wrong = []
    for path, tree in modules().values():
        tables = {
            node.end_lineno
            for node in ast.walk(tree)
            if isinstance(node, (ast.Assign, ast.AnnAssign))
            and isinstance(node.value, (ast.List, ast.Tuple, ast.Set, ast.Dict))
        }
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if ("fmt: skip" in line and number not in tables) or "fmt: off" in line:
                wrong.append(f"{path.relative_to(ROOT)}:{number}")
    assert not wrong, wrong
