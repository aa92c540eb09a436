"""Parts of a Kubernetes manifest, each read with its place: whatever stands there, PlanError says what should."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nbutils.errors import PlanError
from nbutils.plaintext import shortened, visible

GPU = "nvidia.com/gpu"
SHELLS = ("sh", "bash", "dash", "ash", "zsh", "ksh")
PLACES_SHOWN = 60  # characters of a name in a message
_TYPES = {dict: "a mapping", list: "a list", str: "text", int: "a whole number", bool: "true or false"}
_MISSING = object()


@dataclass(frozen=True)
class Pod:
    """One pod template of a manifest: where it stands, how many there are of it, its first container."""

    where: str
    replicas: int
    labels: Mapping[str, str]
    spec: Mapping[str, Any]
    container: Mapping[str, Any]

    @property
    def grace(self) -> int:
        """Seconds between SIGTERM and SIGKILL."""
        return maybe(self.where, self.spec, "terminationGracePeriodSeconds", kind=int, default=30)

    def limit(self, name: str) -> float:
        """The container's limit of a resource, in units of it; 0 where there is none."""
        given = str(maybe(self.where, self.container, "resources", "limits").get(name, 0))
        found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]+)?)(m?)", given)
        if not found:
            raise PlanError(f"{self.where}: the limit of {name} is {given!r}. Give a number.")
        return float(found[1]) / (1000 if found[2] else 1)

    def shared(self) -> dict[str, str]:
        """{place in the container: claim} of the volumes that outlive the pod."""
        claims = {
            part(place, volume, "name", kind=str): part(place, volume, "persistentVolumeClaim", "claimName", kind=str)
            for place, volume in mappings(self.where, self.spec, "volumes")
            if maybe(place, volume, "persistentVolumeClaim")
        }
        mounts = [
            (part(place, mount, "name", kind=str), part(place, mount, "mountPath", kind=str))
            for place, mount in mappings(self.where, self.container, "volumeMounts")
        ]
        return {path: claims[name] for name, path in mounts if name in claims}

    def variables(self) -> dict[str, str]:
        """The container's environment, as far as it stands in the file."""
        given = mappings(self.where, self.container, "env")
        return {part(place, each, "name", kind=str): str(each.get("value") or "") for place, each in given}

    def words(self) -> list[str]:
        """The container's command and its arguments."""
        return [word for name in ("command", "args") for word in texts(self.where, self.container, name)]


def part(where: str, content: Any, *names: str, kind: type = dict) -> Any:
    """What stands at `names`, one within the other. Raises PlanError where there is nothing, or not such a thing."""
    found = maybe(where, content, *names, kind=kind, default=_MISSING)
    if found is _MISSING:
        place = ".".join(names[: _depth(content, names)])
        whole = place == ".".join(names)
        raise PlanError(f"{where}: {place} is missing. Give {_TYPES[kind if whole else dict]}.")
    return found


def maybe(where: str, content: Any, *names: str, kind: type = dict, default: Any = None) -> Any:
    """What stands at `names`, or `default` (an empty one of its kind) where nothing does.

    Raises PlanError where another kind of thing stands there.
    """
    for position in range(len(names) + 1):
        wanted = kind if position == len(names) else dict
        if content is None:
            return kind() if default is None else default
        if not isinstance(content, wanted) or (wanted is int and isinstance(content, bool)):
            place = ".".join(names[:position]) or "this"
            raise PlanError(f"{where}: {place} is {shown(content)}. Give {_TYPES[wanted]}.")
        content = content.get(names[position]) if position < len(names) else content
    return content


def mappings(where: str, content: Any, *names: str) -> list[tuple[str, Mapping[str, Any]]]:
    """(place, mapping) of each item of the list at `names`, none where there is no list."""
    found = [
        (f"{where}, {'.'.join(names)}[{position}]", each)
        for position, each in enumerate(maybe(where, content, *names, kind=list))
    ]
    for place, each in found:
        if not isinstance(each, dict):
            raise PlanError(f"{place} is {shown(each)}. Give a mapping.")
    return found


def texts(where: str, content: Any, *names: str) -> list[str]:
    """The texts of the list at `names`, none where there is no list."""
    found = maybe(where, content, *names, kind=list)
    for position, each in enumerate(found):
        if not isinstance(each, str):
            raise PlanError(f"{where}: {'.'.join(names)}[{position}] is {shown(each)}. Give text, in quotation marks.")
    return found


def read_pod(where: str, template: Any, replicas: int = 1) -> Pod:
    """The pod of a template. Raises PlanError where it has no container."""
    spec = part(where, template, "spec")
    containers = mappings(where, spec, "containers")
    if not containers:
        given = shown(part(where, spec, "containers", kind=list))
        raise PlanError(f"{where}: containers is {given}. Give a list of one container.")
    place, container = containers[0]
    name = one_line(part(place, container, "name", kind=str))
    return Pod(f"{where}, {name}", replicas, read_labels(f"{where}, {name}", template), spec, container)


def read_labels(where: str, content: Any) -> dict[str, str]:
    """The labels in the metadata of `content`. Raises PlanError where one is no text."""
    labels = maybe(where, content, "metadata", "labels")
    for name, value in labels.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise PlanError(f"{where}: the label {shown(name)} is {shown(value)}. Give text, in quotation marks.")
    return labels


def one_line(name: str) -> str:
    """A name from the file as it can stand in a line of ours."""
    return shortened(visible(" ".join(name.split())), PLACES_SHOWN)


def shown(value: Any) -> str:
    """A value from the file, as YAML's reader took it."""
    return shortened(visible(repr(value)), PLACES_SHOWN)


def _depth(content: Any, names: tuple[str, ...]) -> int:
    """How many of the names lead to the first thing that is missing."""
    for position, name in enumerate(names, 1):
        content = content.get(name) if isinstance(content, Mapping) else None
        if content is None:
            return position
    return len(names)
