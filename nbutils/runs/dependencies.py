"""Which of nbutils' files decide a run's numbers: those its notebook imports, directly or through others.

Found from the source, without importing anything. Only the rooms of `DECIDING` are followed: the others start, record
or show runs. A name that is imported from a room's door (`from nbutils.data import pack`) leads to the file that the
door takes it from, so that a file nobody imports changes no key.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from nbutils.foundation import ROOT, file_sha256, resolve
from nbutils.runs.params import read_cells

DECIDING = ("data", "models", "objectives", "training", "evaluation", "interaction")  # rooms that decide numbers
TERMS = "nbutils.objectives.terms"  # of these a run uses those that its parameter `terms` names, too
SHORT = 12  # characters of a hash in a manifest

Import = tuple[str, str]  # module, name taken from it; "" for the module itself


def code_hashes(notebook: Path, params: Mapping[str, Any] | None = None) -> dict[str, str]:
    """{file: short hash} of the nbutils files, and of the term files, that decide the numbers of `notebook`."""
    cells = "\n".join(_python(cell["source"]) for cell in read_cells(notebook) if cell["cell_type"] == "code")
    files: set[Path] = set()
    todo = [*_files(_imports(cells)), *(file for name in _terms(params or {}) for file in _term_files(name))]
    while todo:
        file = todo.pop()
        if file not in files:
            files.add(file)
            todo += _files(_imports_of(file, file.stat().st_mtime_ns))
    ours = [file for file in files if file.is_relative_to(ROOT / "nbutils")]
    files |= {data for file in ours for data in file.parent.rglob("*.yaml")}  # tasks that lie beside their reader
    return {_shown(file): file_sha256(file)[:SHORT] for file in sorted(files)}


def _shown(file: Path) -> str:
    return (file.relative_to(ROOT) if file.is_relative_to(ROOT) else file).as_posix()


class CodeOf:
    """`code_hashes`, each asked for once: for a look at many variants."""

    def __init__(self) -> None:
        self._known: dict[tuple[Path, tuple[str, ...]], dict[str, str]] = {}

    def __call__(self, notebook: Path, params: Mapping[str, Any]) -> dict[str, str]:
        key = notebook, tuple(_terms(params))
        if key not in self._known:
            self._known[key] = code_hashes(notebook, params)
        return self._known[key]


def _terms(params: Mapping[str, Any]) -> list[str]:
    """The first word of each entry of `terms`, as 10_own_objective takes them."""
    terms = params.get("terms")
    return [str(each).split()[0] for each in terms if str(each).strip()] if isinstance(terms, list) else []


def _term_files(name: str) -> list[Path]:
    """The file that `name` is the path of, else those in the folder of terms that register this name."""
    if name.endswith(".py"):
        return [resolve(name)] if resolve(name).is_file() else []
    folder = ROOT.joinpath(*TERMS.split("."))
    return [file for file in sorted(folder.glob("*.py")) if name in _registered(file, file.stat().st_mtime_ns)]


@lru_cache(maxsize=1024)
def _registered(file: Path, modified: int) -> frozenset[str]:
    """The names in a file's calls of `register`."""
    calls = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    named = [call.args[0] for call in calls if ast.unparse(call.func).split(".")[-1] == "register" and call.args]
    return frozenset(arg.value for arg in named if isinstance(arg, ast.Constant))


def _python(cell: str) -> str:
    """A cell without IPython's commands."""
    return "\n".join(line for line in cell.splitlines() if not line.lstrip().startswith(("%", "!", "?")))


def _files(imports: Iterable[Import]) -> Iterator[Path]:
    for module, name in imports:
        yield from _resolved(module, name)


def _resolved(module: str, name: str) -> Iterator[Path]:
    """The files that an import of `name` from `module` comes from."""
    parts = module.split(".")
    if parts[0] != "nbutils" or (len(parts) > 1 and parts[1] not in DECIDING):
        return
    if module == "nbutils":  # a whole room: `_taken_from_rooms` finds what is taken from it
        return
    if name and (file := _file(f"{module}.{name}")):
        yield file
        return
    file = _file(module)
    if file is None:
        return
    door = _door(module, file, file.stat().st_mtime_ns) if file.name == "__init__.py" else {}
    if name in door:
        yield from _resolved(door[name], name)
    elif len(parts) > 1:
        yield file


def _file(module: str) -> Path | None:
    base = ROOT.joinpath(*module.split("."))
    return next((each for each in (base / "__init__.py", base.with_suffix(".py")) if each.is_file()), None)


@lru_cache(maxsize=1024)
def _door(package: str, file: Path, modified: int) -> dict[str, str]:
    """{name: module} of what a package's `__init__.py` hands on: by lazy_loader.attach, or by imports."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = {name: module for module, name in _imports_in(tree) if name}
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "submod_attrs":
            for module, handed_on in ast.literal_eval(node.value).items():
                names |= dict.fromkeys(handed_on, f"{package}.{module}")
    return names


@lru_cache(maxsize=1024)
def _imports_of(file: Path, modified: int) -> tuple[Import, ...]:
    return _imports(file.read_text(encoding="utf-8"))


def _imports(source: str) -> tuple[Import, ...]:
    try:
        tree = ast.parse(source)
    except SyntaxError:  # the kernel will say so
        return ()
    return tuple(_imports_in(tree)) + tuple(_taken_from_rooms(tree))


def _taken_from_rooms(tree: ast.AST) -> Iterator[Import]:
    """(room, name) of each `room.name` where the room itself was imported: `from nbutils import objectives`."""
    nodes = list(ast.walk(tree))
    rooms = {
        alias.asname or alias.name: f"nbutils.{alias.name}"
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module == "nbutils"
        for alias in node.names
    }
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in rooms:
            yield rooms[node.value.id], node.attr


def _imports_in(tree: ast.AST) -> Iterator[Import]:
    """Imports of nbutils anywhere in the source, but those that are for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "nbutils":
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] == "nbutils")
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        else:
            yield from _imports_in(node)
