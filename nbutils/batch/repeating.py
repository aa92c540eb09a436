"""A finished run made again from its manifest alone, and whether the numbers are the same.

    python -m nbutils run --from runs/quick/cosine-alpha0.5-seed1-noise_seed0/manifest.json

Same notebook, parameters, inputs and threads, executed anew in runs/.repeated/<plan>/<variant>, where no report looks.
On a CPU in float32 the numbers are the same bit for bit; where they are not, the files, the sizes of the differences,
and what else is different are told.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nbutils.batch.differences import SHORT, Change, FileDifference, changes, compare_runs, in_few
from nbutils.batch.progress import duration, text_table
from nbutils.batch.runner import BROKEN, DONE, Outcome, run_variant, summary
from nbutils.data import fingerprint
from nbutils.foundation import (
    MANIFEST,
    RUNS,
    ParameterError,
    PlanError,
    Resources,
    RunError,
    read_json,
    relative,
    resolve,
    visible,
    write_json,
)
from nbutils.runs import (
    FINISHED,
    RUN_FOLDER,
    Manifest,
    Place,
    Variant,
    find_manifest,
    find_notebook,
    is_of_the_machine,
    read_manifest,
    read_schema,
)

SEARCHES = {"study", "space", "trials"}  # parameters of a notebook that searches
NEEDED = ("plan", "stage", "variant", "notebook", "status", "params", "matrix", "key", "inputs", "attempts")
REPEATED = ".repeated"  # beside the plans' folders; reports and status pass over what is hidden
REPEAT_OF = "repeat of "  # begins the plan's name in a repeat's record, which no plan's own name can
RECORD = "repeat.json"  # in the repeated run's folder
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
IN_KEY = ("notebook", "nbutils", "parameter", "content", "package")  # what such a change is called begins so
MOST_CHANGES = 20  # lines about what else is different, packages apart
NOTHING_CHANGED = "Nothing that is recorded of code, packages, machine and inputs has changed since."
NOTHING_ELSE = (
    "Nothing else that is recorded is different. Either the run draws on something that its seed does not set, or it "
    "adds in another order each time, as GPUs may."
)
CURE = "Give the manifest.json of a finished run, as runs/<plan>/<variant>/manifest.json."


@dataclass(frozen=True)
class Repeat:
    """How a run came out when it was made again. `files` are those with numbers, `changes` what else is different."""

    original: Path
    plan: str
    outcome: Outcome
    files: tuple[FileDifference, ...] = ()
    changes: tuple[Change, ...] = ()

    @property
    def same(self) -> bool:
        """Whether it finished and every number of the original came out again, bit for bit."""
        return self.outcome.status == FINISHED and all(file.same for file in self.files)

    @property
    def exit_code(self) -> int:
        """0 the same; 1 other numbers, or a cell failed; else as of the run: 2, 75, 138."""
        if self.outcome.exit_code != DONE:
            return self.outcome.exit_code
        return DONE if self.same else BROKEN

    def told(self) -> str:
        """What a reader at the terminal wants to know, in a few lines."""
        return visible("\n".join([self._ending(), *self._numbers(), "", *self._explanations()]).rstrip())

    def _ending(self) -> str:
        name, folder = f"{self.plan}/{self.outcome.variant}", relative(self.outcome.folder)
        if self.outcome.status != FINISHED:
            return f"{name}: the repeat is {self.outcome.status} -> {folder}\n{self.outcome.message}"
        numbers = "the same numbers, bit for bit" if self.same else "OTHER NUMBERS"
        return f"{name}: {numbers}, repeated in {duration(self.outcome.seconds)} -> {folder}"

    def _numbers(self) -> list[str]:
        header = ("file", "compared", "differing", "largest difference, relative", "where")
        added = [f"{file.file} has now in addition: {', '.join(file.added)}." for file in self.files if file.added]
        return [text_table(header, map(_row, self.files)), *added] if self.files else []

    def _explanations(self) -> list[str]:
        if not self.changes:
            nothing = NOTHING_ELSE if self.outcome.status == FINISHED else NOTHING_CHANGED
            return [] if self.same else [nothing]
        title = "Different, without effect:" if self.same else "Different, which may explain it:"
        shown, more = in_few(self.changes, MOST_CHANGES)
        rows = [(each.what, each.first, each.second) for each in shown]
        rest = [f"and {more} more, in {relative(self.outcome.folder / RECORD)}"] if more else []
        return [title, text_table(("what", "then", "now"), rows), *rest]

    def record(self) -> dict[str, Any]:
        """The same for programs, ready for JSON."""
        return {
            "same": self.same,
            "original": relative(self.original),
            "repeated": relative(self.outcome.folder),
            "status": self.outcome.status,
            "exit_code": self.exit_code,
            "message": self.outcome.message,
            "files": [{"same": each.same} | asdict(each) for each in self.files],
            "changes": [asdict(each) for each in self.changes],
        }


def _row(file: FileDifference) -> tuple[str, str, str, str, str]:
    size = f"{file.largest:.1e}" if file.largest < float("inf") else "not a number's"
    of = (str(len(file.differing)), size, file.where) if file.differing else ("none", "", "")
    return file.file, f"{file.compared:,} {file.what}", *of


def repeat(manifest: Path, out: Path | None = None, resources: Resources | None = None) -> Repeat:
    """Make the run of `manifest`, a manifest.json or its run folder, again; its numbers beside those it had.

    out: a plan folder to make it in, else runs/.repeated/<plan>. An earlier repeat there is replaced; a run that
    is none is not. resources: the time it may take; a manifest does not hold its plan's, so not given is for ever.
    Raises WorkbookError, with cause and cure, where the run cannot be made again or did not finish.
    """
    folder, original = _read_finished(manifest)
    _check_comparable(folder, original)
    variant = replace(_recorded_variant(folder, original), resources=resources or Resources())
    plan = original["plan"].removeprefix(REPEAT_OF)
    place = Place(resolve(out) if out else RUNS / REPEATED / plan, variant.name)
    _make_room(place, folder)
    with _threads(original.get("hardware", {}).get("threads")):
        outcome = run_variant(variant, REPEAT_OF + plan, place.plan_folder)
    files = compare_runs(folder, outcome.folder) if outcome.status == FINISHED else ()
    others = _what_else(original, read_manifest(outcome.folder))
    done = Repeat(folder, plan, outcome, tuple(files), tuple(others))
    write_json(outcome.folder / RECORD, done.record())
    return done


def _what_else(original: Manifest, repeated: Manifest) -> list[Change]:
    """What else is different. Of documents only the key tells: where all else that is in it is the same, they are."""
    found = changes([original], [repeated])
    keys = [manifest["key"] for manifest in (original, repeated)]
    if keys[0] != keys[1] and not any(each.what.startswith(IN_KEY) for each in found):
        found.append(Change("documents read (key)", *(key[:SHORT] for key in keys)))
    return found


def _make_room(place: Place, original: Path) -> None:
    """Remove an earlier repeat, which would be taken as the answer; one that was stopped goes on from what it saved.

    Raises RunError where anything else is in the place.
    """
    if place.published.resolve() == original:
        raise RunError(f"{relative(original)} is the run to repeat itself. Name another folder with --out.")
    with place.lock():
        for found in (place.result(), find_manifest(place.attempt)):
            if found is not None and not found["plan"].startswith(REPEAT_OF):
                raise RunError(
                    f"{relative(place.published)} is taken by a run of plan {found['plan']}, which a repeat would "
                    "replace. Name another folder with --out."
                )
        place.mend()
        shutil.rmtree(place.published, ignore_errors=True)


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """Within, kernels compute with so many threads: sums over other parts are rounded in another way."""
    before = {name: os.environ.get(name) for name in THREADS}
    if number:
        os.environ.update(dict.fromkeys(THREADS, str(number)))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _read_finished(path: Path) -> tuple[Path, Manifest]:
    """(folder, manifest) of the finished run at `path`, a manifest or a run folder, from here or the repository's root.

    Raises RunError where there is none, or the run did not finish.
    """
    path = Path(path).resolve() if Path(path).exists() else resolve(path)
    file = path / MANIFEST if path.is_dir() else path
    if not file.is_file():
        raise RunError(f"There is no manifest {relative(file)}. {CURE}")
    try:
        content = read_json(file)
    except (OSError, ValueError) as error:
        raise RunError(f"{relative(file)} is no manifest that can be read ({error}). {CURE}") from None
    lacking = [name for name in NEEDED if name not in content]
    if lacking:
        raise RunError(f"{relative(file)} is not the manifest of a run: it has no {', '.join(lacking)}. {CURE}")
    for name in ("plan", "variant"):
        if not content[name] or Path(content[name]).name != content[name] or content[name].startswith("."):
            raise RunError(f"{relative(file)}: the {name} {content[name]!r} cannot be a folder's name. {CURE}")
    if content["status"] != FINISHED:
        why = f" ({summary(content)})" if content.get("error") else ""
        raise RunError(
            f"{relative(file)}: this run is {content['status']}, not finished{why}, so there are no numbers to "
            "compare. Run it again first."
        )
    return file.parent, content


def _check_comparable(folder: Path, manifest: Manifest) -> None:
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


def _recorded_variant(folder: Path, manifest: Manifest) -> Variant:
    """The variant to run. Raises WorkbookError where notebook, parameters or inputs are not what they were."""
    source = manifest.get("source", {})
    commit = str(source.get("git_commit") or "not recorded")[:SHORT]
    commit += ", with changes that were not committed" * bool(source.get("git_dirty"))
    try:
        notebook = find_notebook(resolve(manifest["notebook"]))
        params = read_schema(notebook).resolve(manifest["params"])
    except PlanError as error:
        raise PlanError(
            f"{relative(folder)}: its notebook is gone. {error} Bring {manifest['notebook']} back, as it was at "
            f"commit {commit}."
        ) from None
    except ParameterError as error:
        raise ParameterError(
            f"{relative(folder)} was made with another {notebook.name}: {error} Check out the notebook of commit "
            f"{commit}."
        ) from None
    params.pop(RUN_FOLDER, None)
    for name, each in manifest["inputs"].items():
        _check_input(name, resolve(each["folder"]), each["fingerprint"])
        params[name] = each["folder"]
    return Variant(manifest["variant"], manifest["stage"], notebook, params, manifest["matrix"])


def _check_input(name: str, folder: Path, wanted: str) -> None:
    """Raise RunError, with what made it, where the content of an input folder is not what the run read."""
    found = fingerprint(name, folder) if folder.is_dir() else ""
    if found == wanted:
        return
    what = f"holds other content than the run read: {found[:SHORT]}, not {wanted[:SHORT]}"
    if not found:
        what = f"that the run read (content {wanted[:SHORT]}) is gone"
    made = find_manifest(folder)
    by = f" That was made by {made['plan']}/{made['variant']} ({made['notebook']})." if made else ""
    raise RunError(f"{name}: the folder {relative(folder)} {what}.{by} Make it again as it was, or put it back.")
