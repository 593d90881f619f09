"""`benchmarks/house.py` counts right: a made-up package whose counts are plain to see."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path
from typing import Any

import pytest

HOUSE = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "house.py"))
FILES = {
    "adaptive_lora/__init__.py": '"""Door."""\nfrom adaptive_lora.attic.top import go\n',
    "adaptive_lora/errors.py": '"""Errors."""\n\n\nclass Wrong(Exception):\n    """It."""\n',
    "adaptive_lora/cellar/__init__.py": "",
    "adaptive_lora/cellar/low.py": "from adaptive_lora import errors\n",
    "adaptive_lora/cellar/deep.py": "from adaptive_lora.cellar.low import x\n# Why.\ny = 1  # no\n",
    "adaptive_lora/attic/__init__.py": "",
    "adaptive_lora/attic/top.py": (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import adaptive_lora.attic.other\n"
        "def go(x):\n"
        '    """Doc."""\n'
        "    from adaptive_lora.cellar.deep import y\n"
        "    def inner(z):\n        return z and y or x\n"
        "    if isinstance(x, (int, rules.At)) or isinstance(x, Attic):\n        return [*x]\n"
        f"    return inner('{'-' * 90}')\n"
    ),
    "tests/test_imports.py": 'FLOORS = ("errors", "cellar", "attic")\n',
    "docs/page.md": f"{'w ' * 60}\n| {'w ' * 60}|\n```\n{'w ' * 60}\n```\n",
}  # fmt: skip


def test_every_count_of_a_made_up_house() -> None:
    found = HOUSE["measure"](FILES)
    expected: dict[str, Any] = {
        "packages": 2,
        "modules_at_top_level": 1,
        "modules": 7,
        "longest_import_chain": 4,  # top, deep, low, errors
        "rooms": 3,
        "levels": 3,
        "arrows": 2,
        "arrows_up": [],
        "circles": [],
        "type_questions": 1,
        "own_line_comments": 1,
        "long_lines_package": 1,
        "long_lines_prose": 1,
        "code_lines_adaptive_lora": 15,
        "code_lines_tests": 1,
        "statements_adaptive_lora": 15,
    }
    assert {name: found[name] for name in expected} == expected


def test_a_circle_and_an_arrow_back_up_are_named() -> None:
    files = FILES | {"adaptive_lora/errors.py": "def f():\n    import adaptive_lora.cellar.deep\n"}
    found = HOUSE["measure"](files)
    assert found["arrows_up"] == ["errors -> cellar"]
    assert found["circles"] == [
        "adaptive_lora.cellar.deep <-> adaptive_lora.cellar.low <-> adaptive_lora.errors"
    ]
    assert found["longest_import_chain"] == 2  # top, and the circle


@pytest.mark.parametrize(
    ("body", "ways"),
    [
        ("return x", 1),
        ("return 1 if x else 2", 2),
        ("if x: pass\n elif y: pass\n else: pass", 3),
        ("return x and y and z", 3),
        ("return [i for i in x if i for j in i]", 4),
        ("try: pass\n except A: pass\n except B: pass\n with x: pass", 3),
        ("match x:\n  case 1: pass\n  case _: pass", 3),
        ("for i in x: pass\n while y: pass", 3),
        ("def inner():\n  if x: pass", 2),
    ],
)
def test_branches_are_counted_as_the_script_says(body: str, ways: int) -> None:
    assert HOUSE["branching"](ast.parse(f"def f():\n {body}").body[0]) == ways


def test_no_function_of_the_package_branches_over_fifteen_ways() -> None:
    """ruff's count, which the lint holds at 15 too, leaves out conditions and comprehensions."""
    package = Path(__file__).parent.parent / "adaptive_lora"
    trees = {
        str(file): ast.parse(file.read_text(encoding="utf-8")) for file in package.rglob("*.py")
    }
    assert HOUSE["branching_over"](15, trees) == {}
