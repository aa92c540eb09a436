"""`register`: the one line by which a term's file makes it known (see registry.py)."""

from __future__ import annotations

from collections.abc import Callable

from nbutils.objectives.term import Term

REGISTERED: dict[str, type[Term]] = {}


def register(name: str) -> Callable[[type[Term]], type[Term]]:
    """Make a term known by `name`: what a line in a notebook's `terms` calls it."""

    def remember(kind: type[Term]) -> type[Term]:
        REGISTERED[name] = kind
        return kind

    return remember
