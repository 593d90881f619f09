"""Every state of a model before every public function: it works, in numbers, or is refused in one
paragraph with nothing changed. What comes of each is recorded in `states.json`, and told in
`docs/states.md`; `python tests/model/cells.py` writes both."""

from __future__ import annotations

import pytest
from cells import FUNCTIONS, PAGE, cells, page, recorded
from states import BY_NAME

RECORDED = recorded()
# State by state: each is made, and looked at, once.
CELLS = [(state, function) for state in BY_NAME for function in FUNCTIONS]


@pytest.mark.parametrize(("state", "function"), CELLS, ids=lambda part: part)
def test_a_cell_is_no_fault_and_as_recorded(state: str, function: str) -> None:
    if not BY_NAME[state].available:
        pytest.skip(f"needs {BY_NAME[state].needs}")
    outcome = cells(state)[function]
    assert not outcome.startswith("FAULT"), outcome
    assert outcome == RECORDED[state][function]


def test_the_page_is_what_was_recorded() -> None:
    assert list(RECORDED) == list(BY_NAME)
    assert PAGE.read_text(encoding="utf-8") == page(RECORDED)


def test_every_state_says_what_it_is() -> None:
    assert [state.name for state in BY_NAME.values() if not state.sentence] == []
