"""Imports point one way, and the command line does not wait for torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import adaptive_lora

ROOT = Path(adaptive_lora.__file__).parent
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}


def imported(path: Path) -> set[str]:
    """Return the modules that the import statements of a file name, wherever they stand, TYPE_CHECKING blocks aside."""

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


def offenders(modules: set[str], forbidden: set[str]) -> set[tuple[str, str]]:
    """Return (module, import) where a module imports a forbidden package, or a module inside it."""
    return {
        (module, name)
        for module in modules
        for name in GRAPH[module]
        if any(name == bad or name.startswith(f"{bad}.") for bad in forbidden)
    }


def modules(*names: str) -> set[str]:
    """Return those of `names` that exist, and what is inside those that are packages."""
    wanted = {f"adaptive_lora.{name}" for name in names}
    return {m for m in GRAPH if m in wanted or any(m.startswith(f"{package}.") for package in wanted)}


def test_the_graph_is_of_this_package() -> None:
    """The tests below would hold of an empty graph."""
    assert "adaptive_lora.errors" in GRAPH["adaptive_lora.allocate"]
    assert "torch" in GRAPH["adaptive_lora.adapters"]
    assert "adaptive_lora.run" in GRAPH["adaptive_lora.cli"]  # inside a function


@pytest.mark.parametrize("name", ["allocate", "budget", "history", "rules", "adapter_file", "naming", "errors"])
def test_what_is_pure_knows_nothing_of_models(name: str) -> None:
    assert not offenders(modules(name), {"torch", "transformers", "peft", "datasets"})


def test_reports_read_files_only() -> None:
    own = {name for name in GRAPH if name.startswith("adaptive_lora")}
    allowed = modules("errors", "naming", "history", "adapter_file", "report", "study")
    assert not offenders(
        modules("report"), {"torch", "transformers", "peft", "datasets", *(own - allowed - {"adaptive_lora"})}
    )
    assert not {m for m in modules("report") if "adaptive_lora" in GRAPH[m]}
    of_studies = {name for m in modules("report") for name in GRAPH[m] if name.startswith("adaptive_lora.study")}
    assert of_studies == {"adaptive_lora.study.records", "adaptive_lora.study.analysis"}  # neither grid nor workers


def test_studies_read_files_except_where_runs_are_planned_and_done() -> None:
    """`plan` checks recipes and `worker` trains; both import what they need of them inside functions."""
    heavy = {"torch", "transformers", "peft", "datasets", "adaptive_lora.run", "adaptive_lora.config"}
    doing = modules("study.plan", "study.worker", "study.executors")
    assert not offenders(modules("study") - doing, heavy)
    assert not offenders(
        modules("study.statistics", "study.selection", "study.records", "study.grid"), {"adaptive_lora.run"}
    )
    own = {name for name in GRAPH if name.startswith("adaptive_lora")}
    pure = modules("errors")
    assert not offenders(
        modules("study.statistics"),
        own - pure - {"adaptive_lora", "adaptive_lora.study", "adaptive_lora.study.records"},
    )
    users = modules("study", "cli_study", "report")
    assert not offenders(set(GRAPH) - users, {"adaptive_lora.study"})


def test_the_command_line_is_at_the_top() -> None:
    assert not offenders(set(GRAPH), {"adaptive_lora.cli"})
    assert not offenders(set(GRAPH) - {"adaptive_lora.cli"}, {"adaptive_lora.cli_adapters"})


def test_the_core_knows_nothing_of_trainers_runs_and_recipes() -> None:
    above = {
        f"adaptive_lora.{name}" for name in ("trainer", "run", "config", "data", "tasks", "report", "demo", "study")
    }
    assert not offenders(
        modules("targets", "adapters", "methods", "allocate", "resizing", "importance", "controller"), above
    )


def test_tools_on_adapter_folders_need_no_runs_and_no_reports() -> None:
    above = {f"adaptive_lora.{name}" for name in ("run", "use", "config", "data", "tasks", "report", "demo", "cli")}
    tools = modules("adapter_folder", "adapter_checks", "compression", "conversion", "inspection", "singular")
    assert len(tools) == 6
    assert not offenders(tools, above)


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


@pytest.mark.parametrize("name", adaptive_lora.__all__)
def test_no_module_takes_the_name_of_what_the_package_offers(name: str) -> None:
    """Importing `package.thing` sets `package.thing` to the module, and a function of that name is gone."""
    assert f"adaptive_lora.{name}" not in MODULES or name == "methods"


def test_neither_the_package_nor_the_help_imports_torch() -> None:
    """A real process: `adaptive-lora --help` answers in a fraction of the time torch takes to import."""
    script = (
        "import sys; sys.argv = ['adaptive-lora', '--help']\n"
        "import adaptive_lora.cli\n"
        "try: adaptive_lora.cli.main()\n"
        "finally: print('loaded:', sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "Usage" in ended.stdout
    assert ended.stdout.endswith("loaded: []\n")
