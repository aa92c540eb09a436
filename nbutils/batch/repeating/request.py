"""What a manifest asks to be made again: read, and checked before anything is executed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nbutils.batch.repeating.circumstances import SHORT
from nbutils.batch.repeating.numbers import compare_runs
from nbutils.batch.runner import summary
from nbutils.data import fingerprint
from nbutils.foundation import MANIFEST, RUNS, ParameterError, PlanError, RunError, read_json, relative, resolve
from nbutils.runs import (
    FINISHED,
    RUN_FOLDER,
    Manifest,
    Variant,
    find_manifest,
    find_notebook,
    is_of_the_machine,
    read_schema,
)

SEARCHES = {"study", "space", "trials"}  # parameters of a notebook that searches
NEEDED = {"plan": str, "stage": str, "variant": str, "notebook": str, "status": str, "params": dict, "matrix": dict}
NEEDED |= {"key": str, "inputs": dict, "attempts": list}


def manifest_file(path: Path) -> Path:
    """The manifest that `path` means, itself or its run folder, from here or from the repository's root."""
    path = Path(path).resolve() if Path(path).exists() else resolve(path)
    return path / MANIFEST if path.is_dir() else path


def read_finished(file: Path) -> Manifest:
    """The content of a finished run's manifest. Raises RunError where there is none, or the run did not finish."""
    cure = "Give the manifest.json of a finished run, as runs/<plan>/<variant>/manifest.json."
    if not file.is_file():
        raise RunError(f"There is no manifest {relative(file)}. {cure}")
    try:
        content = read_json(file)
    except (OSError, ValueError) as error:
        raise RunError(f"{relative(file)} is no manifest that can be read ({error}). {cure}") from None
    lacking = [name for name, kind in NEEDED.items() if not isinstance(_entry(content, name), kind)]
    if lacking:
        raise RunError(f"{relative(file)} is not the manifest of a run: it has no {', '.join(lacking)}. {cure}")
    for name in ("plan", "variant"):
        if not content[name] or Path(content[name]).name != content[name] or content[name].startswith("."):
            raise RunError(f"{relative(file)}: the {name} {content[name]!r} cannot be a folder's name. {cure}")
    if content["status"] != FINISHED:
        why = f" ({summary(content)})" if content.get("error") else ""
        raise RunError(
            f"{relative(file)}: this run is {content['status']}, not finished{why}, so there are no numbers to "
            "compare. Run it again first."
        )
    return content


def _entry(content: Any, name: str) -> Any:
    return content.get(name) if isinstance(content, dict) else None


def check_comparable(folder: Path, manifest: Manifest) -> None:
    """Raise RunError where the run has no numbers that a repeat could show again."""
    if manifest["params"].keys() >= SEARCHES:
        raise RunError(
            f"{relative(folder)} is a search: which setting it draws next hangs on which trial ends first. Repeat one "
            "of its trials, each a run with a manifest of its own, or the plan it wrote."
        )
    if all(not file.compared for file in compare_runs(folder, folder)):
        result = folder / "result.json"
        if result.is_file() and all(map(is_of_the_machine, read_json(result))):
            raise RunError(f"{relative(folder)} holds times and memory alone, which no run shows again.")
        raise RunError(
            f"{relative(folder)} has no numbers beside its manifest to compare a repeat with. If it was copied, copy "
            "the whole folder; a notebook that writes no result.json, as the report, has none."
        )


def recorded_variant(folder: Path, manifest: Manifest) -> Variant:
    """The variant to run. Raises WorkbookError where notebook, parameters or inputs are not what they were."""
    try:
        notebook = find_notebook(resolve(manifest["notebook"]))
    except PlanError as error:
        raise PlanError(
            f"{relative(folder)}: its notebook is gone. {error} Bring {manifest['notebook']} back, as it was at "
            f"commit {_commit(manifest)}."
        ) from None
    try:
        params = read_schema(notebook).resolve(manifest["params"])
    except ParameterError as error:
        raise ParameterError(
            f"{relative(folder)} was made with another {notebook.name}: {error} Check out the notebook of commit "
            f"{_commit(manifest)}."
        ) from None
    params.pop(RUN_FOLDER, None)
    folders = {name: _input(name, each) for name, each in manifest["inputs"].items()}
    return Variant(manifest["variant"], manifest["stage"], notebook, params | folders, manifest["matrix"])


def _commit(manifest: Manifest) -> str:
    source = manifest.get("source", {})
    changed = ", with changes that were not committed" * bool(source.get("git_dirty"))
    return str(source.get("git_commit") or "not recorded")[:SHORT] + changed


def _input(name: str, recorded: dict[str, str]) -> str:
    """The folder a parameter names, if its content is what it was. Raises RunError, with what made it."""
    folder, wanted = resolve(recorded["folder"]), recorded["fingerprint"]
    if not folder.is_dir():
        raise RunError(
            f"{name}: the folder {relative(folder)} that the run read (content {wanted[:SHORT]}) is gone."
            f"{_made_by(folder)} Make it again as it was, or put it back."
        )
    found = fingerprint(name, folder)
    if found != wanted:
        raise RunError(
            f"{name}: {relative(folder)} holds other content than the run read: {found[:SHORT]}, not {wanted[:SHORT]}."
            f"{_made_by(folder)} Make it again as it was, or put it back."
        )
    return recorded["folder"]


def _made_by(folder: Path) -> str:
    """A sentence on the run that made what lies in a folder, by its record or by its place; empty where none tells."""
    manifest = find_manifest(folder)
    if manifest is not None:
        ended = manifest["attempts"][-1]["end"]
        return f" That was made by {manifest['plan']}/{manifest['variant']} ({manifest['notebook']}), ended {ended}."
    if folder.parent.parent == RUNS:
        plan, variant = folder.parent.name, folder.name
        return f" By its place it was run {variant} of plan {plan}: python -m nbutils batch {plan} --only {variant}."
    return ""
