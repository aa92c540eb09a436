"""Where things are: relative paths in parameters mean the repository's root, whatever the working directory."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
PARAMS = ROOT / "params"
RUNS = ROOT / "runs"
FIGURES = ROOT / "figures"
REPORTS = ROOT / "reports"


def resolve(path: str | Path) -> Path:
    """`path` made absolute against the repository's root; `~` is the home folder."""
    return (ROOT / _expanded(path)).resolve()


def typed(path: str | Path) -> Path:
    """`path` as typed on the command line, made absolute against the working directory; `~` is the home folder."""
    return _expanded(path).resolve()


def relative(path: str | Path) -> str:
    """`path` as a user would type it: relative to the repository's root where it lies inside it."""
    path = Path(path)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _expanded(path: str | Path) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # `~name` of nobody: then it is a name like any other
        return Path(path)
