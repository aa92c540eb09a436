"""manifest.json: what a run was made from, on what, and how each attempt at it ended.

The record is ours alone. A notebook's metadata is never believed: papermill marks the cells of a killed kernel as
completed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from nbutils.data import output_fingerprint
from nbutils.foundation import (
    MANIFEST,
    RunError,
    atomic_write,
    environment,
    now,
    read_json,
    relative,
    sha256_of_hashes,
    write_json,
)
from nbutils.runs.keys import data_fingerprint, made_of, read_inputs, run_key
from nbutils.runs.params import RUN_FOLDER
from nbutils.runs.plans import Variant

RUNNING, FINISHED, FAILED, KILLED = "running", "finished", "failed", "killed"
PREEMPTED = "preempted"  # asked to stop: it goes on from what it saved when it is run again

Manifest = dict[str, Any]


def begin(folder: Path, plan: str, variant: Variant, earlier: list[dict[str, Any]]) -> Manifest:
    """Write params.yaml and the manifest of a run that starts now in `folder`, after the `earlier` attempts."""
    inputs = read_inputs(variant.params)
    content = made_of(variant.notebook, variant.params, inputs)
    manifest = {
        "plan": plan,
        "stage": variant.stage,
        "variant": variant.name,
        "notebook": relative(variant.notebook),
        "key": run_key(content),
        "corpus": content["corpus"],
        "status": RUNNING,
        "exit_code": None,
        "error": None,
        "params": variant.params,
        "matrix": variant.matrix,
        "inputs": inputs,
        "prompts": content["prompts"],  # and the model of a server that judges
        "fingerprint": None,  # of the data or model the run makes, once it is finished
        "data_fingerprint": data_fingerprint(folder, inputs),
        "source": environment.git_state() | _code(content),
        "packages": environment.packages(),
        "hardware": environment.hardware(),
        "attempts": [*earlier, {"start": now(), "end": None, "exit_code": None, "status": RUNNING}],
    }
    atomic_write(folder / "params.yaml", yaml.safe_dump(variant.params, sort_keys=False, allow_unicode=True))
    write_json(folder / MANIFEST, manifest)
    return manifest


def _code(content: Mapping[str, Any]) -> dict[str, Any]:
    files = content["nbutils"]
    together = sha256_of_hashes(files.items())
    return {"notebook_sha256": content["notebook"], "nbutils_sha256": together, "nbutils_files": files}


def was_made_of(manifest: Manifest) -> dict[str, Any] | None:
    """What `made_of` returned when this run began; None of a run by a version that did not record it."""
    source, inputs = manifest.get("source", {}), manifest.get("inputs", {})
    if "nbutils_files" not in source:
        return None
    return {
        "notebook": source["notebook_sha256"],
        "params": {name: value for name, value in manifest["params"].items() if name not in {*inputs, RUN_FOLDER}},
        "inputs": {name: each["fingerprint"] for name, each in inputs.items()},
        "corpus": manifest["corpus"],
        "prompts": manifest["prompts"],
        "nbutils": source["nbutils_files"],
    }


def versions_of_code(manifests: Iterable[Manifest]) -> int:
    """How many versions of the code made these runs; where they are of several notebooks, of the files they share."""
    sources = [each.get("source", {}) for each in manifests]
    files = [each.get("nbutils_files") for each in sources]
    if None in files:  # of a version that recorded one hash of all files
        return len({each.get("nbutils_sha256") for each in sources})
    shared = set.intersection(*(set(each) for each in files)) if files else set()
    return len({tuple(each[name] for name in sorted(shared)) for each in files})


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
