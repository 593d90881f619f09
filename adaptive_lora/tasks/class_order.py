"""In which order a model has the classes of some data. Names only: no records, no model.

A base with a trained head has an order of its own; one that another order is forced on knows every
class by a wrong number before its first step.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from adaptive_lora.recipe.presets import PRESETS

# The lists of class names that GLUE numbers its labels by; QNLI's and RTE's before WNLI's.
GLUE = [preset["data"]["classes"] for preset in PRESETS.values() if "classes" in preset["data"]]


def in_order(names: Sequence[str], order: Sequence[str]) -> list[str] | None:
    """Return `names`, arranged as `order` has them; None unless both have the same names, up to
    case, space around them, and "-", "_" and " " being alike.

    >>> in_order(["negative", "not sure"], ["NOT_SURE", "NEGATIVE"])
    ['not sure', 'negative']
    """
    for alike in (str, _plain):
        by_name = {alike(name): name for name in names}
        wanted = [alike(name) for name in order]
        if len(by_name) == len(names) == len(order) and by_name.keys() == set(wanted):
            return [by_name[name] for name in wanted]
    return None


def order_of(names: Sequence[str], own: Sequence[str] | None) -> tuple[list[str], str]:
    """Return the classes of the data in the order of the model's outputs, and whose order it is: ""
    for the data's own.

    Args:
        names: the classes, in the data's order.
        own: the names that the base has for its outputs, None where it has none.

    >>> order_of(["contradiction", "entailment", "neutral"], None)
    (['entailment', 'neutral', 'contradiction'], 'GLUE')
    """
    if own is not None:
        found = in_order(names, own)
        return (list(names), "") if found is None else (found, "the base")
    # Every published head without names was trained on GLUE's own numbers.
    known = [found for order in GLUE if (found := in_order(names, order)) is not None]
    return (known[0], "GLUE") if known and list(names) not in known else (list(names), "")


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", " ", name.strip()).casefold()
