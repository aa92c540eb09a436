"""What an entry of a plan file must be: its keys and their kinds, names that can be folders, nothing twice."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from nbutils.foundation import LONGEST_QUOTED, PlanError, did_you_mean, shortened

KINDS = {str: "text, in quotes if it looks like a number", list: "a list", dict: "a mapping, {name: value}"}

SLUG = re.compile(r"[a-z0-9][a-z0-9._-]*")
LONGEST_NAME = 120  # a variant is a folder name; file systems allow 255 bytes and temporary names add to it


def check_keys(where: str, given: Any, kinds: Mapping[str, type], required: Iterable[str] = ()) -> None:
    """Raise PlanError where `given` is no mapping, or has a key that is none, of another kind, or missing."""
    if not isinstance(given, dict):
        raise PlanError(
            f"{where} is {_quoted(given)}. Give a mapping with the keys {', '.join(kinds) or 'of a matrix'}."
        )
    for key, value in given.items():
        if key not in kinds:
            raise PlanError(f"{where} has no key {_quoted(str(key))}. {did_you_mean(str(key), kinds)}")
        if value is not None and not isinstance(value, kinds[key]):
            raise PlanError(f"{where}: {key} is {_quoted(value)}. Give {KINDS[kinds[key]]}.")
    for key in required:
        if given.get(key) in (None, ""):
            raise PlanError(f"{where}: {key} is missing.")


def _quoted(given: Any) -> str:
    return shortened(repr(given), LONGEST_QUOTED)


def check_slug(where: str, name: str) -> str:
    """`name`, which becomes a folder. Raises PlanError where it cannot."""
    if not SLUG.fullmatch(name):
        raise PlanError(
            f"{where}: the name {name!r} becomes a folder. Use a-z, 0-9 and ._- only, a letter or digit first."
        )
    return name


def refuse_equal(where: str, names: list[Any], cure: str = "Each needs a name of its own.") -> None:
    """Raise PlanError where a name stands there twice."""
    for name, times in Counter(names).items():
        if times > 1:
            raise PlanError(f"{where} {name!r} stands there {times} times. {cure}")
