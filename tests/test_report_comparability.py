"""What the report compares must be comparable: tokens of the models judged, units of the divergence.

python -m pytest tests/test_report_comparability.py
"""

from __future__ import annotations

import json

import pytest
from page_structure import text_of
from synthetic_distillation import write_distillation

from nbutils import report
from nbutils.studies import gather


@pytest.fixture
def written(tmp_path):
    return write_distillation(tmp_path / "kd")


def edit(runs, variants: str, name: str, **changes):
    """Change entries of the file `name` of all runs whose name matches; `params` are merged."""
    for path in runs.glob(f"kd/{variants}/{name}"):
        content = json.loads(path.read_text())
        params = {"params": content["params"] | changes["params"]} if "params" in changes else {}
        path.write_text(json.dumps(content | changes | params))


def named(written, stage):
    return next(study for study in gather(written[0], str(written[1])).studies if study.stage == stage)


# --- tokens


def test_tokens_that_are_equal_are_called_equal(written):
    text = text_of(report.budget_table(named(written, "qa")))
    assert "Equal tokens: Δ" in text and "Not at equal tokens" not in text
    edit(written[0], "qa-divergenceforward-seed1", "result.json", tokens_seen=round(0.99 * 200 * 1024))
    assert "Equal tokens: Δ" in text_of(report.budget_table(named(written, "qa")))


def test_a_run_that_stopped_early_is_not_at_equal_tokens(written):
    """One control of five stopped at half of its 204,800 tokens: 0.9 of them in mean."""
    edit(written[0], "qa-divergencenone-seed2", "result.json", tokens_seen=102_400, steps=100)
    text = text_of(report.budget_table(named(written, "qa")))
    assert "Equal tokens" not in text and "Not at equal tokens: divergence forward." in text
    assert "(204,800 against 184,320)" in text


def test_a_model_of_the_best_step_has_seen_the_tokens_up_to_it(written):
    """Both sides trained 200 steps; the students are best at step 80 of them, the controls at their end."""
    edit(written[0], "qa-divergenceforward-*", "result.json", best_step=80)
    assert "Equal tokens: Δ" in text_of(report.budget_table(named(written, "qa")))  # the last model is judged
    edit(written[0], "qa-*", "manifest.json", params={"evaluated_model": "best"})
    text = text_of(report.budget_table(named(written, "qa")))
    assert "Equal tokens" not in text and f"({204_800 * 80 // 200:,} against 204,800)" in text
    edit(written[0], "qa-divergencenone-*", "result.json", best_step=80)
    assert "Equal tokens: Δ" in text_of(report.budget_table(named(written, "qa")))
