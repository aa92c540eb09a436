"""Sections of one kind of study alone: whole, safe, light; nothing where no run is of the kind.

python -m pytest tests/report/test_study_sections.py
"""

from __future__ import annotations

import json
import re

import pytest
from page_structure import Structure, text_of
from synthetic_distillation import write_distillation
from synthetic_interaction import interaction_numbers
from synthetic_prefix import ARMS, prefix_numbers
from synthetic_runs import write_run

from nbutils import report
from nbutils.report.evidence import gather
from nbutils.report.html_export import clean
from nbutils.report.studies.registry import STUDIES

FIGURES = {
    "Teachers and distillation": {
        *("kd-teacher-overfitting", "kd-qa-bleu"),
        *(f"kd-{study}-{name}" for study in ("distillation", "qa") for name in ("kl", "terms")),
    },
    "Prefix smoothing": {"smooth-prefix-smoothing", "smooth-prefix-targets"},
    "Interaction": {"talk-corrected-judged-stories-distilled-rounds"},
}


@pytest.fixture(scope="module")
def taught_evidence(tmp_path_factory):
    runs, file = write_distillation(tmp_path_factory.mktemp("kd"))
    return gather(runs, str(file))


@pytest.mark.parametrize(
    ("heading", "evidence"),
    zip(FIGURES, ("taught_evidence", "smooth_evidence", "talk_evidence"), strict=True),
)
def test_a_whole_section_survives_cleaning_and_is_light(heading, evidence, tmp_path, request):
    html = report.study_sections(request.getfixturevalue(evidence), tmp_path).data
    own = html[html.index(f"<h2>{heading}</h2>") :]
    assert Structure(clean(html)).tags == Structure(html).tags
    assert not {"nan", "None", "[nan,", "inf"} & {*re.sub("<[^>]+>", " ", own).split()}
    names = {path.stem for path in tmp_path.glob("*.svg")}
    assert {name for name in names if not name.endswith(("-proxy", "-grid"))} == FIGURES[heading]
    assert len(re.sub(r"data:image/png;base64,[^\"]*", "", html).encode()) < 40_000


def test_of_other_kinds_nothing_is_shown(toy_evidence, tmp_path):
    html, method = report.study_sections(toy_evidence, tmp_path).data, text_of(report.method(toy_evidence))
    assert html.count("<h2>") == 3 and "Win, trade-off or neither" in html and "The proxy" in html
    assert not any(f"<h2>{heading}" in html for heading in FIGURES)
    for words in ("Divergence", "Effective smoothing", "Minimal pairs"):
        assert words not in method


@pytest.mark.parametrize(
    ("notebook", "numbers", "params", "shown"),
    [
        ("05_prefix_smoothing", prefix_numbers("prefixes", 1), ARMS["prefixes"], "(tau 0.2)"),
        (
            "06_interaction",
            interaction_numbers("ppo", 1),
            {"method": "ppo", "prompts_per_round": 8, "judge": "runs/<script>", "second_judge": "none"},
            "nothing checks its score",
        ),
    ],
)
def test_one_run_by_hand_has_its_section(notebook, numbers, params, shown, tmp_path, undrawn):
    run = write_run(tmp_path / "interactive", notebook, {}, numbers | {"eval_cosine": 0.1})
    manifest = json.loads((run / "manifest.json").read_text()) | {"stage": "", "params": params}
    (run / "manifest.json").write_text(json.dumps(manifest))
    html = report.study_sections(gather(tmp_path, "interactive"), tmp_path / "figures").data
    assert shown in html and "<script>" not in html


def test_every_kind_of_study_is_described_whole():
    for kind in STUDIES:
        assert kind.formulas[0].name == "Objective" and all(kind.settings({}))
        assert len({each.name for each in kind.formulas}) == len(kind.formulas)
    assert len({kind.parameter for kind in STUDIES}) == len(STUDIES)


@pytest.mark.parametrize(
    ("evidence", "there", "not_there"),
    [
        ("toy_evidence", ("(1 − α) CE", "Cosine proxy", "Perplexity"), ("Calibration", "Bits per byte", "Models of")),
        ("taught_evidence", ("Forward divergence", "KL to the teacher"), ("Jensen-Shannon", "batchmean")),
        ("smooth_evidence", ("Normalised target", "Uniform control", "Un-smoothed"), ("Forward divergence", "PPO")),
        ("talk_evidence", ("SimPO", "PPO", "Judge's score"), ("RLOO", "Three-way", "Normalised target")),
    ],
)
def test_the_method_defines_what_was_trained_and_measured_and_nothing_else(evidence, there, not_there, request):
    text = text_of(report.method(request.getfixturevalue(evidence)))
    assert all(words in text for words in there) and not any(words in text for words in not_there)
