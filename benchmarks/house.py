"""The plan of the house, counted: packages, imports, lines and branches of one revision or more.

    python benchmarks/house.py a87d032 HEAD [--output FILE.json]    # before and after
    python benchmarks/house.py                                      # the working tree

A revision is read with `git archive`, never checked out; `.` is the working tree. How things count:

- room: a package or module directly in `adaptive_lora/`; an arrow leads from a room to one that a
  module of it imports, inside functions too, `TYPE_CHECKING` blocks and `adaptive_lora` itself
  aside. It runs back up when it contradicts FLOORS in `tests/test_imports.py`; in a revision
  without FLOORS, the order that leaves the rooms with the fewest arrows below.
- longest import chain: modules on it, both ends counted; a circle counts as one module. Levels: the
  same of rooms, so how many storeys the house has.
- code line: no blank, no comment, no docstring; statements: docstrings aside, the same at any
  width of lines. What studies made, in `studies/results/`, is not counted.
- branching of a function: 1, and 1 for each if, elif, conditional expression, for, while, except,
  case, `and`, `or`, comprehension and its ifs. A function inside another counts in both.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import subprocess
import tarfile
import tokenize
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGE = "adaptive_lora"
FAMILIES = {"At", "OnPlateau", "MaskedByPeft"}
COLUMNS = 100
WAYS = 15
FOLDERS = (PACKAGE, "tests", "studies", "benchmarks")
KINDS = ("lines", "code_lines", "statements")
PAGE = (".js", ".css", ".html")
TEXT = (".py", ".md", *PAGE)
MADE = "studies/results/*/*"
BLANK = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENDMARKER,
}  # fmt: skip

Files = dict[str, str]
"""The text of a revision's files by their path."""
Graph = dict[str, set[str]]
"""What each module, or room, imports."""


def files_of(revision: str) -> Files:
    """Return the text files of a revision, but for results; `.` is the working tree."""
    found: dict[str, bytes] = {}
    if revision == ".":
        listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard").decode()
        paths = [name for name in listed.split("\0") if (ROOT / name).is_file()]
        found = {name: (ROOT / name).read_bytes() for name in paths if name.endswith(TEXT)}
    else:
        with tarfile.open(fileobj=io.BytesIO(git("archive", "--format=tar", revision))) as archive:
            for member in archive:
                if member.name.endswith(TEXT) and (file := archive.extractfile(member)):
                    found[member.name] = file.read()
    return {name: text.decode() for name, text in found.items() if not fnmatch(name, MADE)}


def git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout


def graph_of(files: Files) -> Graph:
    """Return which modules of the package each of them imports."""
    paths = {
        name.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): name
        for name in files
        if name.startswith(f"{PACKAGE}/") and name.endswith(".py")
    }
    graph: Graph = {module: set() for module in paths}
    for module, path in paths.items():
        for node in at_run_time(ast.parse(files[path])):
            if isinstance(node, ast.Import):
                graph[module] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                graph[module] |= {n if n in paths else str(node.module) for n in names}
        graph[module] &= paths.keys() - {PACKAGE, module}
    graph.pop(PACKAGE, None)
    return graph


def at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a tree but for what only a type checker reads."""
    yield node
    children = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        children = [*node.orelse]
    for child in children:
        yield from at_run_time(child)


def rooms_of(graph: Graph) -> Graph:
    """Return the arrows between the packages and loose modules of the top level."""
    rooms: Graph = {room_of(module): set() for module in graph}
    for module, names in graph.items():
        rooms[room_of(module)] |= {room_of(name) for name in names} - {room_of(module)}
    return rooms


def room_of(module: str) -> str:
    return module.split(".")[1]


def circles_of(graph: Graph) -> dict[str, frozenset[str]]:
    """Return for each module those that it reaches and that reach it, itself among them."""
    reached: Graph = {}
    for module in graph:
        seen, waiting = {module}, [module]
        while waiting:
            new = graph[waiting.pop()] - seen
            seen |= new
            waiting += new
        reached[module] = seen
    return {m: frozenset(n for n in reached[m] if m in reached[n]) for m in graph}


def longest_chain(graph: Graph) -> int:
    """Return how many modules the longest chain of imports has."""
    circles = circles_of(graph)
    lengths: dict[frozenset[str], int] = {}

    def length(circle: frozenset[str]) -> int:
        if circle not in lengths:
            beyond = {circles[name] for module in circle for name in graph[module]} - {circle}
            lengths[circle] = 1 + max(map(length, beyond), default=0)
        return lengths[circle]

    return max(map(length, circles.values()), default=0)


def floors_of(files: Files, rooms: Graph) -> list[str]:
    """Return the rooms, the lowest first: as FLOORS says, or sorted so that few arrows go up."""
    for node in ast.parse(files.get("tests/test_imports.py", "")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS":
            return list(ast.literal_eval(node.value))
    floors: list[str] = []
    while waiting := rooms.keys() - set(floors):
        floors.append(min(sorted(waiting), key=lambda room: len(rooms[room] & waiting)))
    return floors


def questions(tree: ast.AST) -> int:
    """Return how often a type of FAMILIES is asked for: isinstance, issubclass, a case."""
    count = 0
    for node in ast.walk(tree):
        asked: ast.AST | None = node.cls if isinstance(node, ast.MatchClass) else None
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            asked = node.args[1]
        if asked is not None:
            named = {ast.unparse(part).split(".")[-1] for part in ast.walk(asked)}
            count += bool(named & FAMILIES)
    return count


def is_docstring(node: ast.AST) -> bool:
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def code_lines(text: str, tree: ast.AST) -> int:
    """Return how many lines are code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in BLANK:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and is_docstring(node):
            lines -= set(range(node.lineno, int(node.end_lineno or 0) + 1))
    return len(lines)


def statements(tree: ast.AST) -> int:
    """Return how many statements there are, docstrings aside: no width of lines changes that."""
    return sum(isinstance(node, ast.stmt) and not is_docstring(node) for node in ast.walk(tree))


def own_line_comments(text: str) -> int:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(t.type == tokenize.COMMENT and t.line.lstrip().startswith("#") for t in tokens)


def branching(function: ast.AST) -> int:
    """Return how many ways a function can go, as the head of this file counts them."""
    count = 1
    for node in ast.walk(function):
        if isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            count += 1 + len(node.ifs)
        else:
            count += isinstance(
                node,
                ast.If | ast.IfExp | ast.For | ast.AsyncFor | ast.While | ast.ExceptHandler
                | ast.match_case,
            )  # fmt: skip
    return count


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Yield functions with their names, `Class.method` and `outer.inner`."""
    for node in ast.iter_child_nodes(tree):
        inner = prefix
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if not isinstance(node, ast.ClassDef):
                yield prefix + node.name, node
            inner = f"{prefix}{node.name}."
        yield from functions(node, inner)


def prose(text: str) -> str:
    """Return a Markdown page without its code and its tables."""
    blocks = "".join(text.split("```")[::2])
    return "\n".join(line for line in blocks.splitlines() if not line.lstrip().startswith("|"))


def too_long(text: str) -> int:
    return sum(len(line) > COLUMNS for line in text.splitlines())


def measure(files: Files) -> dict[str, Any]:
    """Return every count of one revision."""
    trees = {name: ast.parse(text) for name, text in files.items() if name.endswith(".py")}
    ours = {name: tree for name, tree in trees.items() if name.startswith(f"{PACKAGE}/")}
    return {
        **plan(files, list(ours)),
        "type_questions": sum(map(questions, ours.values())),
        **sizes(files, trees),
        "own_line_comments": (comments := sum(own_line_comments(files[name]) for name in ours)),
        "comment_share": comments / sum(code_lines(files[n], tree) for n, tree in ours.items()),
        "long_lines_package": sum(too_long(files[name]) for name in ours),
        "long_lines_python": sum(too_long(files[name]) for name in trees),
        "long_lines_page": sum(too_long(files[name]) for name in files if name.endswith(PAGE)),
        "long_lines_prose": sum(too_long(prose(files[n])) for n in files if n.endswith(".md")),
        "functions_over_15_ways": branching_over(WAYS, ours),
    }


def plan(files: Files, ours: list[str]) -> dict[str, Any]:
    """Return the counts of packages, modules and imports."""
    graph = graph_of(files)
    rooms = rooms_of(graph)
    floors = floors_of(files, rooms)
    up = sorted((a, b) for a in rooms for b in rooms[a] if floors.index(b) > floors.index(a))
    circles = {circle for circle in circles_of(graph).values() if len(circle) > 1}
    loose = [name for name in ours if name.count("/") == 1 and not name.endswith("__.py")]
    return {
        "packages": sum(name.endswith("/__init__.py") for name in ours) - 1,
        "modules_at_top_level": len(loose),
        "modules": len(ours),
        "longest_import_chain": longest_chain(graph),
        "rooms": len(rooms),
        "levels": longest_chain(rooms),
        "arrows": sum(map(len, rooms.values())),
        "arrows_up": [f"{a} -> {b}" for a, b in up],
        "circles": sorted(" <-> ".join(sorted(circle)) for circle in circles),
    }


def sizes(files: Files, trees: dict[str, ast.Module]) -> dict[str, int]:
    """Return lines, code lines and statements of each folder, and of the first three together."""
    found: dict[str, int] = {}
    for folder in FOLDERS:
        inside = {name: tree for name, tree in trees.items() if name.startswith(f"{folder}/")}
        found[f"lines_{folder}"] = sum(len(files[name].splitlines()) for name in inside)
        found[f"code_lines_{folder}"] = sum(code_lines(files[n], t) for n, t in inside.items())
        found[f"statements_{folder}"] = sum(map(statements, inside.values()))
    for kind in KINDS:
        found[f"{kind}_together"] = sum(found[f"{kind}_{folder}"] for folder in FOLDERS[:3])
    return found


def branching_over(ways: int, trees: dict[str, ast.Module]) -> dict[str, int]:
    """Return the functions that branch over so many ways, the worst first."""
    found = {
        f"{path.removeprefix(f'{PACKAGE}/').removesuffix('.py')}:{name}": branching(node)
        for path, tree in trees.items()
        for name, node in functions(tree)
    }
    return {name: n for name, n in sorted(found.items(), key=lambda i: (-i[1], i[0])) if n > ways}


ROWS = {
    "packages": "packages",
    "modules at the top level": "modules_at_top_level",
    "modules in all": "modules",
    "longest import chain, modules": "longest_import_chain",
    "rooms": "rooms",
    "levels of rooms": "levels",
    "arrows between rooms": "arrows",
    "arrows back up": "arrows_up",
    "import circles": "circles",
    "questions of At, OnPlateau, MaskedByPeft": "type_questions",
    "comments on lines of their own": "own_line_comments",
    "their share of code lines": "comment_share",
    "lines over 100 columns, package": "long_lines_package",
    "lines over 100 columns, all Python": "long_lines_python",
    "lines over 100 columns, page's scripts": "long_lines_page",
    "lines over 100 columns, prose": "long_lines_prose",
    **{
        f"{label}: {kind.replace('_', ' ')}": f"{kind}_{key}"
        for label, key in (
            *zip(FOLDERS, FOLDERS, strict=True),
            ("package + tests + studies", "together"),
        )
        for kind in KINDS
    },
    "functions that branch over 15 ways": "functions_over_15_ways",
}


def shown(value: Any) -> str:
    """Return a count as text; of lists and tables how long they are."""
    if isinstance(value, float):
        return f"{value:.1%}"
    return f"{value if isinstance(value, int) else len(value):,}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("revisions", nargs="*", default=["."])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    counts = {revision: measure(files_of(revision)) for revision in arguments.revisions}
    print(" " * 40, *(f"{revision:>12}" for revision in counts))
    for label, key in ROWS.items():
        print(f"{label:<40}", *(f"{shown(found[key]):>12}" for found in counts.values()))
    for revision, found in counts.items():
        for key in ("arrows_up", "circles"):
            for line in found[key]:
                print(f"{revision}: {key}: {line}")
        print(f"{revision}: functions that branch over {WAYS} ways:")
        for name, count in found["functions_over_15_ways"].items():
            print(f"{count:6} {name}")
    if arguments.output:
        arguments.output.write_text(json.dumps(counts, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
