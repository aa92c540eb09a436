"""What a run ran on: commit, package versions, machine. Found without importing torch or any other heavy library."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from nbutils.foundation.places import ROOT

SHOWN = ("torch", "transformers", "datasets", "accelerate", "numpy", "pandas", "papermill")
SECONDS = 10  # git and nvidia-smi answer at once, or hang on a broken file system or driver


def git_state() -> dict[str, Any]:
    """`git_commit` and `git_dirty` of the repository; both None where it is no git checkout."""
    commit = _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    changed = _output(["git", "-C", str(ROOT), "status", "--porcelain"])
    return {"git_commit": commit, "git_dirty": None if commit is None else bool(changed)}


@lru_cache(maxsize=1)
def packages() -> dict[str, str]:
    """Version by name of every installed distribution, and of Python."""
    found = {each.metadata["Name"].lower(): each.version for each in metadata.distributions() if each.metadata["Name"]}
    return {"python": platform.python_version()} | dict(sorted(found.items()))


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@lru_cache(maxsize=1)
def gpus() -> tuple[str, ...]:
    """Names of the NVIDIA GPUs of this machine, none where the driver's tool is missing."""
    listed = _output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]) or ""
    return tuple(line.strip() for line in listed.splitlines() if line.strip())


def hardware() -> dict[str, Any]:
    """The machine: its name, processor, cores and threads in use, memory in GiB, GPUs."""
    import psutil

    return {
        "machine": platform.node(),
        "processor": _processor(),
        "cores": cores(),
        "threads": int(os.environ.get("OMP_NUM_THREADS") or cores()),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": list(gpus()),
    }


def memory_kills() -> int:
    """How many processes this machine's memory killer has ended since it was started; 0 where that is not known."""
    try:
        counted = re.search(r"^oom_kill (\d+)", Path("/proc/vmstat").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(counted[1]) if counted else 0


def versions_line() -> str:
    """Python and the libraries that decide a result, for the top of a notebook."""
    versions = [f"{name} {metadata.version(name)}" for name in SHOWN]
    return " · ".join([f"python {sys.version.split()[0]}", *versions])


def _processor() -> str:
    try:
        model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        model = None
    return model[1] if model else platform.processor() or platform.machine()


def _output(command: list[str]) -> str | None:
    """What the command prints, None where it is not installed, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
