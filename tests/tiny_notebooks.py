"""Notebooks and plans of a few lines, for the tests of what runs them: nothing heavy, a run takes a second."""

from __future__ import annotations

import json
from pathlib import Path

PARAMETERS = """\
run_folder: str = ""  # where results go
alpha: float = 0.5  # weight, in [0, 1]
seed: int = 0  # of everything, at least 0
"""


def write_notebook(path: Path, *cells: str, parameters: str | None = PARAMETERS) -> Path:
    """A notebook of code cells behind a parameters cell (none where `parameters` is None)."""
    code = [_cell(source, []) for source in cells]
    if parameters is not None:
        code.insert(0, _cell(parameters, ["parameters"]))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    heading = {"cell_type": "markdown", "metadata": {}, "id": "heading", "source": "# A question?"}
    content = {"cells": [heading, *code], "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    for number, cell in enumerate(code):
        cell["id"] = f"cell-{number}"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_plan(path: Path, text: str) -> Path:
    """A plan file; `{here}` in the text is its folder, where the notebooks lie."""
    path.write_text(text.replace("{here}", str(path.parent)), encoding="utf-8")
    return path


def _cell(source: str, tags: list[str]) -> dict:
    metadata = {"tags": tags} if tags else {}
    return {"cell_type": "code", "execution_count": None, "metadata": metadata, "outputs": [], "source": source}
