"""The same endings with plain papermill and with `python -m nbutils run`: what each says of them, as a table.

    python tests/endings_beside_papermill.py

Each ending comes to a run that had a good result before, in a folder of its own. What is true is known from the cells,
which note in a file of their own that they ended; what is claimed is read from exit code and saved notebook. A tool is
right where its exit code is 0 exactly if the run finished, no cell is called completed that did not end, and what it
saved can be read; ours must have recorded it, too, as finished exactly if it is. The endings of a full folder and of
one that cannot be written need the right to mount, and are left out without it.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import yaml
from batch_processes import is_alive, wait_until
from tiny_notebooks import write_notebook

from nbutils.runs.attempts import Place
from nbutils.runs.run_folder import load_runs

PARAMETERS = 'run_folder: str = ""  # where results go\n'
GOOD = "the good result"
NOTE = 'with open({trace!r}, "a") as trace: trace.write("{number} ")'
SLEEP = "import time; time.sleep(100)"
DEEP = "sum(range(10**12))  # compiled code, which hears nothing"
FILL = "with open(run_folder + '/data', 'wb', buffering=0) as file:\n    while True: file.write(bytes(1 << 16))"
CELLS = 3  # in each notebook; the second is the one where it happens
WAIT_SECONDS, ORPHAN_SECONDS = 60, 5
FOLDER_BYTES = 1 << 21  # of a folder that will be full
PAPERMILL, OURS = "papermill", "run"
LONGEST_MESSAGE = 90  # characters of it in the table


@dataclass(frozen=True)
class Ending:
    """What happens. `options` by tool; `signal`: to the tool's process while the second cell is at work."""

    name: str
    cell: str = "pass"
    signal: int = 0
    options: dict[str, list[str]] = field(default_factory=dict)
    before: list[str] = field(default_factory=list)  # words before papermill's own
    folder: str = ""  # full, read-only


ENDINGS = (
    Ending("finished"),
    Ending("exception in a cell", "1 / 0"),
    Ending("kernel killed (SIGKILL, as the memory killer does)", "import os; os.kill(os.getpid(), 9)"),
    Ending("runner killed (SIGKILL)", DEEP, signal=signal.SIGKILL),
    Ending("SIGTERM to the runner (preemption)", SLEEP, signal=signal.SIGTERM),
    Ending(
        "a cell takes too long",
        SLEEP,
        options={PAPERMILL: ["--execution-timeout", "3"], OURS: ["--cell-minutes", "0.05"]},
    ),
    Ending("the run takes too long", SLEEP, options={OURS: ["--run-minutes", "0.15"]}, before=["timeout", "9"]),
    Ending("`sys.exit(0)` in a cell", "import sys; sys.exit(0)"),
    Ending("folder full", FILL, folder="full"),
    Ending("folder not writable", folder="read-only"),
)


@dataclass(frozen=True)
class Told:
    """How a tool told of an ending."""

    exit_code: int
    completed: frozenset[int] | None  # cells that its notebook calls so; None where that cannot be read
    done: frozenset[int]  # the cells that did end
    kept: bool  # the good result is there: the earlier one or, of a run that finished, its own
    status: str = ""  # as recorded, by ours alone
    message: str = ""
    orphan: bool = False  # the kernel lives on

    @property
    def is_right(self) -> bool:
        """Whether all it says is so."""
        finished = len(self.done) == CELLS
        recorded = not self.status or (self.status == "finished") == finished
        claimed = self.completed is not None and self.completed <= self.done
        return recorded and claimed and (self.exit_code == 0) == finished

    def cells(self) -> str:
        """What is told, for the table: exit code as a shell has it, what is claimed, whether the result is there."""
        code = self.exit_code if self.exit_code >= 0 else 128 - self.exit_code
        claims = "its notebook cannot be read"
        if self.completed is not None:
            claims = f"{len(self.completed)} of {CELLS} cells completed ({len(self.done)} did)"
        told = f"{self.status or 'not recorded'}: {shortened(self.message)}" if self.message or self.status else claims
        wrong, orphan = "" if self.is_right else "**wrong**: ", "; its kernel lives on" if self.orphan else ""
        return f"{code} | {wrong}{told}{orphan} | {'yes' if self.kept else '**no**'}"


def read_claim(notebook: Path) -> frozenset[int] | None:
    """The cells that the saved `notebook` calls completed, numbered without those of parameters; none without it."""
    if not notebook.is_file():
        return frozenset()
    try:
        saved = nbformat.read(notebook, as_version=4)
    except Exception:  # half of it, or nothing
        return None
    cells = [cell for cell in saved.cells if cell.cell_type == "code" and not cell.metadata.get("tags")]
    statuses = [cell.metadata.get("papermill", {}).get("status") for cell in cells]
    return frozenset(number for number, status in enumerate(statuses, 1) if status == "completed")


def holds_good(notebook: Path) -> bool:
    """Whether the good result stands in a notebook's output."""
    try:
        cells = nbformat.read(notebook, as_version=4).cells
    except Exception:
        return False
    return any(GOOD in output.get("text", "") for cell in cells for output in cell.get("outputs", ()))


# ---- one ending ------------------------------------------------------------------------------------------------------


@dataclass
class Scene:
    """A folder in which one tool meets one ending."""

    tool: str
    ending: Ending
    folder: Path

    def play(self) -> Told:
        """Make the good result, bring about the ending, read what is told."""
        out = self.folder / "out"
        out.mkdir(parents=True)
        with _mounted(out, self.ending.folder) as forbid:
            self._run("pass", Ending("good"), GOOD)
            forbid()
            trace = self.folder / "trace"
            trace.unlink()
            earlier = (out / "study.ipynb").read_bytes() if self.tool == PAPERMILL else b""
            code, errors = self._run(
                self.ending.cell, self.ending, f"{GOOD} again" if self.ending.cell == "pass" else ""
            )
            done = frozenset(map(int, trace.read_text().split())) if trace.exists() else frozenset()
            orphan = self._orphan()
            if self.tool == PAPERMILL:
                return self._told_by_papermill(out, code, earlier, done, orphan)
            return self._told_by_us(out, code, errors, done, orphan)

    def _run(self, cell: str, ending: Ending, printed: str) -> tuple[int, str]:
        """One run to its end; (exit code, what it said)."""
        trace, pid = str(self.folder / "trace"), str(self.folder / "pid")
        begin = f"import os\nwith open({pid!r}, 'w') as file: file.write(str(os.getpid()))"
        sources = (begin, cell, f"print({printed!r})")
        notes = (NOTE.format(trace=trace, number=number) for number in range(1, CELLS + 1))
        notebook = self.folder / "study.ipynb"
        write_notebook(notebook, *map("{}\n{}".format, sources, notes), parameters=PARAMETERS)
        (self.folder / "pid").unlink(missing_ok=True)
        process = subprocess.Popen(
            self._words(notebook, ending), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if ending.signal:
            wait_until(lambda: (self.folder / "pid").exists() and (self.folder / "trace").exists())
            time.sleep(1)  # so that the second cell is at work
            process.send_signal(ending.signal)
            process.wait(WAIT_SECONDS)
            return process.returncode, ""  # a kernel that lives on holds the pipe open
        said, _ = process.communicate(timeout=WAIT_SECONDS)
        return process.returncode, said

    def _words(self, notebook: Path, ending: Ending) -> list[str]:
        out, options = self.folder / "out", ending.options.get(self.tool, [])
        if self.tool == PAPERMILL:
            words = [str(Path(sys.executable).with_name("papermill")), str(notebook), str(out / "study.ipynb")]
            return [*ending.before, *words, "-p", "run_folder", str(out), "--no-progress-bar", *options]
        params = self.folder / "params.yaml"
        params.write_text(yaml.safe_dump({}))
        words = [sys.executable, "-m", "nbutils", "run", str(notebook), "--params", str(params)]
        return [*words, "--variant", "study", "--out", str(out), *options]

    def _told_by_papermill(self, out: Path, code: int, earlier: bytes, done: frozenset[int], orphan: bool) -> Told:
        notebook = out / "study.ipynb"
        claim = frozenset() if notebook.read_bytes() == earlier else read_claim(notebook)
        return Told(code, claim, done, holds_good(notebook), orphan=orphan)

    def _told_by_us(self, out: Path, code: int, errors: str, done: frozenset[int], orphan: bool) -> Told:
        (run,) = load_runs(out)
        latest = run.newer or run.manifest
        attempted = len(latest["attempts"]) > 1
        notebook = (Place(out, "study").attempt if run.newer else run.folder) / "notebook.ipynb"
        claim = read_claim(notebook) if attempted else frozenset()
        said = re.findall(r"^error: (.*)", errors, re.MULTILINE)
        error = latest["error"] if attempted else None
        message = f"{error['type']}: {error['message']}" if error else (said[-1] if said else "")
        message = message.replace(str(out), "FOLDER")
        kept = run.status == "finished" and holds_good(run.folder / "notebook.ipynb")
        return Told(code, claim, done, kept, latest["status"] if attempted else "", message, orphan)

    def _orphan(self) -> bool:
        """Whether the kernel lives on; it is ended then."""
        if not (self.folder / "pid").exists():
            return False
        kernel = int((self.folder / "pid").read_text())
        deadline = time.monotonic() + ORPHAN_SECONDS
        while is_alive(kernel) and time.monotonic() < deadline:
            time.sleep(0.1)
        if left := is_alive(kernel):
            os.kill(kernel, signal.SIGKILL)
        return left


@contextmanager
def _mounted(folder: Path, kind: str) -> Iterator[Callable[[], None]]:
    """A small file system there, where `kind` is not empty; calling what this gives forbids to write to it."""
    if not kind:
        yield lambda: None
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={FOLDER_BYTES}", "tmpfs", str(folder)], check=True)
    read_only = ["mount", "-o", "remount,ro", str(folder)]
    try:
        yield lambda: subprocess.run(read_only, check=True) if kind == "read-only" else None
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def may_mount() -> bool:
    """Whether this user may mount a file system here."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with _mounted(Path(folder), "full"):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


# ---- the table -------------------------------------------------------------------------------------------------------


HEADER = "| what happened | papermill exits with | its notebook | a good result is there | `nbutils run` exits with "
HEADER += "| its record | a good result is there |\n|---|---|---|---|---|---|---|"


def total(*tools: list[Told]) -> str:
    """The last line of the table: how often each was right and kept the result."""
    told = (
        f"{sum(e.is_right for e in each)} of {len(each)} | | {sum(e.kept for e in each)} of {len(each)}"
        for each in tools
    )
    return f"| **right** | {' | '.join(told)} |"


def shortened(message: str) -> str:
    """The first sentence, or as much of it as the table has room for."""
    first = re.split(r"(?<=[a-z0-9)])\. ", message.strip(), maxsplit=1)[0].replace("|", "/")
    return first if len(first) <= LONGEST_MESSAGE else f"{first[: LONGEST_MESSAGE - 1].rstrip()}…"


def main() -> None:
    mounting = may_mount()
    all_told: tuple[list[Told], list[Told]] = ([], [])
    print(HEADER)
    with tempfile.TemporaryDirectory(prefix="endings-") as folder:
        for number, ending in enumerate(each for each in ENDINGS if mounting or not each.folder):
            told = [Scene(tool, ending, Path(folder) / f"{number}-{tool}").play() for tool in (PAPERMILL, OURS)]
            print(f"| {ending.name} | {told[0].cells()} | {told[1].cells()} |", flush=True)
            for each, kept in zip(told, all_told, strict=True):
                kept.append(each)
    print(total(*all_told))
    if not mounting:
        print("\nLeft out, for want of the right to mount: a full folder, one that cannot be written.")


if __name__ == "__main__":
    main()
