"""Packages are floors: each imports from those below it only. And the command line does not wait
for torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import adaptive_lora

ROOT = Path(adaptive_lora.__file__).parent
FLOORS = (
    "errors", "naming", "hub", "files", "allocation", "model", "methods", "adapter_tools",
    "training", "testing", "recipe",
    "tasks", "runs", "study", "report", "demo", "cli",
)  # fmt: skip
"""Packages and modules at the top level, the lowest first."""
HEAVY = {"torch", "transformers", "peft", "datasets"}
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}


def imported(path: Path) -> set[str]:
    """Return the modules that the import statements of a file name, wherever they stand,
    TYPE_CHECKING blocks aside."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            nodes: list[ast.stmt] = node.orelse
        else:
            yield node
            nodes = list(ast.iter_child_nodes(node))  # type: ignore[arg-type]
        for child in nodes:
            yield from walk(child)

    names: set[str] = set()
    for node in walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else str(node.module) for name in full}
    return names


GRAPH = {name: imported(path) for name, path in MODULES.items()}


def floor(module: str) -> int:
    """Return how high the package of a module stands; the bare package `adaptive_lora` is a door on
    the ground."""
    return -1 if module == "adaptive_lora" else FLOORS.index(module.split(".")[1])


def below(*packages: str) -> set[tuple[str, str]]:
    """Return (module, import) for all imports of these packages and modules."""
    return {
        (m, name)
        for m in GRAPH
        for name in GRAPH[m]
        if m.removeprefix("adaptive_lora.").startswith(packages)
    }


def test_the_graph_is_of_this_package() -> None:
    """The tests below would hold of an empty graph."""
    assert "adaptive_lora.errors" in GRAPH["adaptive_lora.allocation.allocate"]
    assert "torch" in GRAPH["adaptive_lora.model.adapters"]
    assert "adaptive_lora.runs.run" in GRAPH["adaptive_lora.cli.main"]  # inside a function


def test_every_package_has_its_floor() -> None:
    assert {name.split(".")[1] for name in MODULES if name != "adaptive_lora"} == set(FLOORS)


def test_no_arrow_runs_back_up() -> None:
    ours = {(m, name) for m in GRAPH for name in GRAPH[m] & MODULES.keys() if m != "adaptive_lora"}
    assert {(m, name) for m, name in ours if floor(name) > floor(m)} == set()


def test_no_module_imports_itself_by_a_detour() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"cycle: {' -> '.join([*path, module])}"
        if module not in done:
            for name in sorted(GRAPH[module] & GRAPH.keys()):
                visit(name, (*path, module))
            done.add(module)

    for module in GRAPH:
        visit(module, ())


def test_allocation_is_numbers_in_and_ranks_out() -> None:
    """Only importances are made of tensors, and none knows a module, a Trainer or PEFT."""
    found = below("allocation")
    assert {name for _, name in found} & HEAVY <= {"torch"}
    assert {m for m, name in found if name == "torch"} == {
        f"adaptive_lora.allocation.{name}" for name in ("importance", "singular")
    }


def test_reports_read_files_only() -> None:
    """Of studies they know the records and their analysis, neither grid nor workers."""
    found = {name for _, name in below("report")}
    assert not found & HEAVY
    above = {name for name in found & MODULES.keys() if floor(name) >= FLOORS.index("model")}
    study = {f"adaptive_lora.study.{name}" for name in ("records", "analysis")}
    assert {name for name in above if not name.startswith("adaptive_lora.report")} <= study | {
        "adaptive_lora.model.adapter_file"
    }


def test_studies_read_files_except_where_runs_are_planned_and_done() -> None:
    """`plan` checks recipes, `worker` and `after` make runs; all import what they need of them
    inside functions."""
    doing = {f"adaptive_lora.study.{name}" for name in ("plan", "worker", "after", "executors")}
    heavy = HEAVY | {"adaptive_lora.runs.run", "adaptive_lora.recipe.config"}
    assert {(m, name) for m, name in below("study") if m not in doing and name in heavy} == set()


@pytest.mark.parametrize("name", adaptive_lora.__all__)
def test_no_module_takes_the_name_of_what_the_package_offers(name: str) -> None:
    """Importing `package.thing` sets `package.thing` to the module, and a function of that name is
    gone."""
    assert f"adaptive_lora.{name}" not in MODULES or name == "methods"


def test_neither_the_package_nor_the_help_imports_torch() -> None:
    """A real process: `adaptive-lora --help` answers in a fraction of the time torch takes to
    import."""
    script = (
        "import sys; sys.argv = ['adaptive-lora', '--help']\n"
        "import adaptive_lora.cli.main\n"
        "try: adaptive_lora.cli.main.main()\n"
        "finally: print('loaded:', sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert "Usage" in ended.stdout
    assert ended.stdout.endswith("loaded: []\n")
