"""Fixtures shared by several files of tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def own_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of all runs and of what they share, empty."""
    from nbutils.foundation import places

    monkeypatch.setattr(places, "RUNS", tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hub cache, and no Hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made, but not turned into pictures, which takes seconds."""
    from IPython.display import HTML

    from nbutils.report import figures

    monkeypatch.setattr(figures, "show", lambda figure, name, caption, folder: HTML(f"<figure>{caption}</figure>"))


# ---- made-up runs, which no test changes


@pytest.fixture(scope="session")
def toy_evidence(tmp_path_factory):
    """A whole plan of made-up runs: three arms, five seeds, an A/A pair, four contrasts."""
    from synthetic_runs import write_plan, write_runs

    from nbutils.report.evidence import gather

    folder = tmp_path_factory.mktemp("toy")
    return gather(write_runs(folder / "runs"), str(write_plan(folder)))


@pytest.fixture(scope="session")
def smooth_evidence(tmp_path_factory):
    """A whole plan of prefix smoothing."""
    from synthetic_prefix import write_prefix

    from nbutils.report.evidence import gather

    runs, file = write_prefix(tmp_path_factory.mktemp("prefix"))
    return gather(runs, str(file))


@pytest.fixture(scope="session")
def talk_evidence(tmp_path_factory):
    """A whole plan of interactions."""
    from synthetic_interaction import write_interaction

    from nbutils.report.evidence import gather

    runs, file = write_interaction(tmp_path_factory.mktemp("interaction"))
    return gather(runs, str(file))


@pytest.fixture(scope="session")
def talk_group(talk_evidence):
    """Its stages, which are one group."""
    from nbutils.report.studies.rounds import groups

    (found,) = groups(talk_evidence)
    return found
