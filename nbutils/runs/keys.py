"""When is a run the same run? Its key is a hash of all that decides its numbers; a finished run with that key is kept.

In the key: the notebook's code, the resolved parameters, the content of the files and folders the parameters name, and
the nbutils files that the notebook imports, directly or through others. Machine and package versions are in the
manifest, not in the key: an upgrade repeats no run, except that of packages whose documentation is the embedded corpus.

Imports are found from the source, without importing anything. Only the rooms of DECIDING are followed: the others
start, record or show runs. A name imported from a room's door (`from nbutils.data import pack`) leads to the file that
the door takes it from, so that a file nobody imports changes no key.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from nbutils.data import CorpusRequest, corpus_versions, fingerprint, locate_corpus, output_fingerprint
from nbutils.foundation import ROOT, file_sha256, relative, resolve, sha256_of_hashes
from nbutils.runs.params import RUN_FOLDER, read_cells, source_sha256

FOLDER_SUFFIX = "_folder"  # a parameter that ends so names a folder the run reads
FILES_NAMED = 4  # of the code, where a message says what changed
DECIDING = ("data", "models", "objectives", "training", "evaluation", "interaction")  # rooms that decide numbers
TERMS = "nbutils.objectives.terms"  # of these a run uses those that its parameter `terms` names, too
SHORT = 12  # characters of a hash in a manifest
BROUGHT_ALONG = [("blimp_folder", "embedded")]  # what stands for a folder and is part of the workbook

Import = tuple[str, str]  # module, name taken from it; "" for the module itself


def run_key(made_of: Mapping[str, Any]) -> str:
    """The key of a run that is made of this: a hash of what `made_of` returns."""
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def made_of(
    notebook: Path,
    params: Mapping[str, Any],
    inputs: Mapping[str, Mapping[str, str]] | None = None,
    code: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """All that decides the numbers of `notebook` with `params`, by kind.

    inputs: what `read_inputs` finds; code: what `code_hashes` finds. Give them where they are at hand already.
    """
    inputs = read_inputs(params) if inputs is None else inputs
    return {
        "notebook": source_sha256(notebook),
        "params": {name: value for name, value in params.items() if name not in inputs and name != RUN_FOLDER},
        "inputs": {name: each["fingerprint"] for name, each in inputs.items()},
        "corpus": corpus_content(params),
        "prompts": prompts_content(params),
        "nbutils": dict(code_hashes(notebook, params) if code is None else code),
    }


def what_changed(recorded: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str:
    """What a finished run is stale of, from what it was made of and what it would be made of now.

    Names parameters with both values, files of the code, and data. recorded: None of a run by an earlier version.
    """
    if not recorded:
        return "it was made by an earlier version of the workbook, which did not record of what"
    found = [f"{name} was {old!r} and is {new!r}" for name, old, new in _apart(recorded["params"], now["params"])]
    if recorded["notebook"] != now["notebook"]:
        found.append("the notebook's code")
    files = [name.removeprefix("nbutils/") for name, _, _ in _apart(recorded["nbutils"], now["nbutils"])]
    if files:
        more = f" and {len(files) - FILES_NAMED} more" if len(files) > FILES_NAMED else ""
        found.append(f"code: {', '.join(files[:FILES_NAMED])}{more}")
    found += [f"the content of {name}" for name, _, _ in _apart(recorded["inputs"], now["inputs"])]
    found += [f"the corpus: {name}" for name, _, _ in _apart(recorded["corpus"], now["corpus"])]
    found += [f"the prompt: {name}" for name, _, _ in _apart(recorded["prompts"], now["prompts"])]
    return "; ".join(found)


def _apart(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, old, new) of what differs, in the order of names; None stands for what is not there."""
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    return [(name, old.get(name), new.get(name)) for name in names]


def read_inputs(params: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """{parameter: {folder, fingerprint}} for every parameter that names a folder with a run, data or a model.

    A parameter called `..._folder` must, but for those of BROUGHT_ALONG; others do where a folder lies at the path they
    hold (model_name, say). Not run_folder, where the run writes, nor data_files, whose content is the corpus.
    Raises RunError where the folder does not exist or holds a run that did not finish.
    """
    return {
        name: {"folder": relative(resolve(value)), "fingerprint": fingerprint(name, resolve(value))}
        for name, value in params.items()
        if name not in (RUN_FOLDER, "data_files") and value and _names_folder(name, value)
    }


def _names_folder(name: str, value: Any) -> bool:
    if (name, value) in BROUGHT_ALONG:
        return False
    return name.endswith(FOLDER_SUFFIX) or (isinstance(value, str) and resolve(value).is_dir())


def data_fingerprint(folder: Path, inputs: Mapping[str, Mapping[str, str]]) -> str | None:
    """The fingerprint of the data a run made in `folder` or read from one of `inputs`, None where there is none."""
    if (folder / "data" / "card.json").is_file():
        return output_fingerprint(folder)
    read = [each for each in inputs.values() if (resolve(each["folder"]) / "data" / "card.json").is_file()]
    return read[0]["fingerprint"] if read else None


def corpus_content(params: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies the documents that a data-preparation run reads; {} where `params` name no corpus.

    Of a Hub data set its configuration and commit (of the fallback, where that would be read). Raises CorpusError
    where the files do not exist or the Hub cannot be reached.
    """
    if not {"dataset_name", "data_files"} <= params.keys():
        return {}
    taken, located, _ = locate_corpus(CorpusRequest.of(params))
    hashes = {relative(path): file_sha256(path) for path in located.files if path.is_file()}
    hub = {"name": located.hub_name, "config": located.config, "revision": located.revision}
    return {"versions": corpus_versions(taken.dataset_name), "files": hashes, "hub": hub}


def prompts_content(params: Mapping[str, Any]) -> dict[str, str]:
    """A hash of each prompt file that judges, teachers and stories are made of; {} where `params` name no judge.

    The rubrics of what every arm is asked at last are among them, whatever it learned by.
    Where a server judges or corrects, server_model, too: the model it is asked for, which no parameter names. Its
    address may change from one machine to the next.
    """
    if not {"rubric", "judge"} <= params.keys():
        return {}
    from nbutils.interaction import RUBRICS, prompts

    rubrics = {"rubric": params["rubric"], **{f"held_out_{kind}": name for kind, name in RUBRICS.items()}}
    files = {name: prompts.read_rubric(rubric) for name, rubric in rubrics.items()}
    files |= {"correction": prompts.read_correction(), "story": prompts.read_story()}
    content = {name: prompts.digest(each) for name, each in files.items()}
    if "server" in (params.get(name) for name in ("judge", "second_judge", "correcting_teacher")):
        content["server_model"] = os.environ.get("WORKBOOK_JUDGE_MODEL", "").strip()
    return content


def nbutils_sha256() -> str:
    """A hash of all nbutils files: whether two machines have the same workbook."""
    files = sorted((ROOT / "nbutils").rglob("*.py"))
    return sha256_of_hashes((path.relative_to(ROOT).as_posix(), file_sha256(path)) for path in files)


# ---- the nbutils files that decide a run's numbers -------------------------------------------------------------------


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
