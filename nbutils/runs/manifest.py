"""manifest.json: what a run was made from, on what, and how each attempt at it ended.

The record is ours alone. A notebook's metadata is never believed: papermill marks the cells of a killed kernel as
completed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from nbutils.data.fingerprints import output_fingerprint
from nbutils.foundation import environment
from nbutils.foundation.errors import RunError
from nbutils.foundation.files import MANIFEST, atomic_write, now, read_json, write_json
from nbutils.foundation.places import relative
from nbutils.runs.keys import data_fingerprint, nbutils_sha256, prompts_content, read_inputs, run_key
from nbutils.runs.notebooks import source_sha256
from nbutils.runs.plans import Variant

RUNNING, FINISHED, FAILED, KILLED = "running", "finished", "failed", "killed"
PREEMPTED = "preempted"  # asked to stop: it goes on from what it saved when it is run again

Manifest = dict[str, Any]


def begin(folder: Path, plan: str, variant: Variant, earlier: list[dict[str, Any]]) -> Manifest:
    """Write params.yaml and the manifest of a run that starts now in `folder`, after the `earlier` attempts."""
    inputs = read_inputs(variant.params)
    source = {"notebook_sha256": source_sha256(variant.notebook), "nbutils_sha256": nbutils_sha256()}
    manifest = {
        "plan": plan,
        "stage": variant.stage,
        "variant": variant.name,
        "notebook": relative(variant.notebook),
        "key": run_key(variant.notebook, variant.params, inputs),
        "status": RUNNING,
        "exit_code": None,
        "error": None,
        "params": variant.params,
        "matrix": variant.matrix,
        "inputs": inputs,
        "prompts": prompts_content(variant.params),  # and the model of a server that judges
        "fingerprint": None,  # of the data or model the run makes, once it is finished
        "data_fingerprint": data_fingerprint(folder, inputs),
        "source": environment.git_state() | source,
        "packages": environment.packages(),
        "hardware": environment.hardware(),
        "attempts": [*earlier, {"start": now(), "end": None, "exit_code": None, "status": RUNNING}],
    }
    atomic_write(folder / "params.yaml", yaml.safe_dump(variant.params, sort_keys=False, allow_unicode=True))
    write_json(folder / MANIFEST, manifest)
    return manifest


def end(
    folder: Path,
    manifest: Manifest,
    status: str,
    exit_code: int,
    error: dict[str, Any] | None,
    peak_memory_mib: float | None = None,
) -> Manifest:
    """Write how the run in `folder` ended. `error` is None or has `type`, `message`, `cell` and `log` (lines).

    peak_memory_mib: of the kernel's process, None where it is not known.
    """
    last = manifest["attempts"][-1] | {"end": now(), "exit_code": exit_code, "status": status}
    last["peak_memory_mib"] = peak_memory_mib
    manifest = manifest | {"status": status, "exit_code": exit_code, "error": error}
    manifest["attempts"] = [*manifest["attempts"][:-1], last]
    manifest["data_fingerprint"] = data_fingerprint(folder, manifest["inputs"])
    if status == FINISHED:
        manifest["fingerprint"] = output_fingerprint(folder) or manifest["key"]
    write_json(folder / MANIFEST, manifest)
    return manifest


def find_manifest(folder: Path) -> Manifest | None:
    """The manifest of run folder `folder`, None where there is none. Raises RunError where it is damaged."""
    try:
        return read_json(folder / MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise RunError(f"{relative(folder / MANIFEST)} is damaged ({error}). Delete the folder, run again.") from None
    except OSError as error:
        raise RunError(f"{relative(folder / MANIFEST)} cannot be read ({error}). Mend that, then try again.") from None


def read_manifest(folder: Path) -> Manifest:
    """The manifest of run folder `folder`. Raises RunError where it is missing or damaged."""
    manifest = find_manifest(folder)
    if manifest is None:
        raise RunError(f"{relative(folder)} is not a run folder: it has no {MANIFEST}.")
    return manifest


def as_killed(manifest: Manifest) -> Manifest:
    """`manifest` of a run that nobody works on though it says running: its runner was ended before it could write."""
    last = manifest["attempts"][-1] | {"status": KILLED}
    message = "The runner was ended before it could record how (power, memory, or a kill). Run it again."
    error = {"type": "RunnerKilled", "message": message, "cell": None, "log": []}
    return manifest | {"status": KILLED, "error": error, "attempts": [*manifest["attempts"][:-1], last]}
