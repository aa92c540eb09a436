"""Notebook files as plain JSON: found by name, their cells, and a hash of what they compute.

`json` rather than `nbformat`, whose import takes a second; nothing here runs a notebook.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from nbutils.foundation import NOTEBOOKS, PlanError, did_you_mean, relative, resolve


def find_notebook(name: str | Path) -> Path:
    """The notebook called `name` (`04_cosine_mixing`) or lying at `name` (`notebooks/04_cosine_mixing.ipynb`).

    Raises PlanError with the nearest name where there is none.
    """
    file = f"{str(name).removesuffix('.ipynb')}.ipynb"
    path = resolve(file) if "/" in file else NOTEBOOKS / file
    if not path.is_file():
        near = did_you_mean(path.stem, [other.stem for other in NOTEBOOKS.glob("*.ipynb")])
        raise PlanError(f"There is no notebook {relative(path)}. {near}")
    return path


def read_cells(path: Path) -> list[dict[str, Any]]:
    """The cells of notebook `path`, each with `cell_type`, `metadata` and `source` as one string.

    Raises PlanError where the file is not a notebook.
    """
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return [{**cell, "source": "".join(cell["source"])} for cell in cells]
    except (ValueError, KeyError, TypeError) as error:
        raise PlanError(
            f"{relative(path)} is not a notebook that can be read ({type(error).__name__}: {error}). "
            "Open it in JupyterLab and save it again."
        ) from None


def tags(cell: dict[str, Any]) -> list[str]:
    """The tags of a cell."""
    return cell.get("metadata", {}).get("tags", [])


def source_sha256(path: Path) -> str:
    """A hash of what notebook `path` computes: its code cells in order, and which of them holds the parameters.

    Outputs, metadata and prose are left out: none of them changes a number.
    """
    status = path.stat()
    return _source_sha256(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=256)
def _source_sha256(path: Path, modified: int, size: int) -> str:
    code = [(cell["source"], "parameters" in tags(cell)) for cell in read_cells(path) if cell["cell_type"] == "code"]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()
