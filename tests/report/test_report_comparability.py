"""What the report compares must be comparable: tokens of the models judged, units of the divergence.

python -m pytest tests/test_report_comparability.py
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from page_structure import text_of
from synthetic_distillation import SEEDS, student_numbers, write_distillation

from nbutils import report
from nbutils.report import figures
from nbutils.report.evidence import Evidence, gather
from nbutils.report.studies.distillation import distillation
from nbutils.runs.run_folder import Run


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
    assert "Equal tokens: Δ" in text and "not equal" not in text
    edit(written[0], "qa-divergenceforward-seed1", "result.json", tokens_seen=round(0.99 * 200 * 1024))
    assert "Equal tokens: Δ" in text_of(report.budget_table(named(written, "qa")))


def test_a_run_that_stopped_early_is_not_at_equal_tokens(written):
    """One control of five stopped at half of its 204,800 tokens: 0.9 of them in mean."""
    edit(written[0], "qa-divergencenone-seed2", "result.json", tokens_seen=102_400, steps=100)
    text = text_of(report.budget_table(named(written, "qa")))
    assert "Equal tokens" not in text and "Where tokens are not equal" in text
    assert "(not equal: 204,800 against 184,320)" in text


def test_a_model_of_the_best_step_has_seen_the_tokens_up_to_it(written):
    """Both sides trained 200 steps; the students are best at step 80 of them, the controls at their end."""
    edit(written[0], "qa-divergenceforward-*", "result.json", best_step=80)
    assert "Equal tokens: Δ" in text_of(report.budget_table(named(written, "qa")))  # the last model is judged
    edit(written[0], "qa-*", "manifest.json", params={"evaluated_model": "best"})
    text = text_of(report.budget_table(named(written, "qa")))
    assert "Equal tokens" not in text and f"(not equal: {204_800 * 80 // 200:,} against 204,800)" in text
    edit(written[0], "qa-divergencenone-*", "result.json", best_step=80)
    assert "Equal tokens: Δ" in text_of(report.budget_table(named(written, "qa")))


# --- units of the divergence


@pytest.fixture(scope="module")
def evidence(tmp_path_factory):
    runs, file = write_distillation(tmp_path_factory.mktemp("units"))
    return gather(runs, str(file))


def trained_with(evidence, stage: str, label: str, **params) -> Evidence:
    """Only this study, its arms whose label holds `label` trained with other parameters."""
    (plan,) = evidence.plans
    study = next(each for each in plan.studies if each.stage == stage)
    arms = tuple(_trained_with(arm, params) if label in arm.label else arm for arm in study.arms)
    return replace(evidence, plans=(replace(plan, studies=(replace(study, arms=arms, control=arms[0]),), teachers=()),))


def _trained_with(arm, params):
    runs = (replace(run, manifest=run.manifest | {"params": run.params | params}) for run in arm.runs)
    return replace(arm, runs=tuple(runs))


def last_divergence(divergence: str) -> float:
    """Where the made-up curves end: 4 times the plain KL, and what is left of the fall."""
    return float(np.mean([4 * student_numbers(divergence, s)["eval_kl_to_teacher"] for s in SEEDS]) + 4 * np.exp(-5))


def ends(figure) -> list[float]:
    """The last value of each curve of the left panel."""
    return [float(line.get_ydata()[-1]) for line in figure.axes[0].lines if len(line.get_xdata()) > 1]


def test_a_stored_top_k_has_no_curve_beside_divergences_over_all_tokens(evidence, tmp_path):
    both = [last_divergence("forward"), last_divergence("reverse")]
    assert ends(figures.distance_to_teacher(evidence.studies[1])) == pytest.approx(both)
    one = trained_with(evidence, "distillation", "reverse", teacher_cache="topk")
    assert ends(figures.distance_to_teacher(one.studies[0])) == pytest.approx(both[:1])
    text = text_of(distillation(one, tmp_path))
    assert "Not on the left: divergence reverse, whose teacher's top k were stored" in text
    all_of_them = trained_with(evidence, "distillation", "divergence", teacher_cache="topk").studies[0]
    left, right = figures.distance_to_teacher(all_of_them).axes
    assert [each.get_text() for each in left.texts] == ["not logged in nats per token"] and len(right.lines)


def test_a_sum_over_a_block_is_shown_per_token(evidence, tmp_path):
    """The plan's data have blocks of 128; arms that are means keep their values."""
    summed = trained_with(evidence, "distillation", "reverse", kd_reduction="batchmean")
    figure = figures.distance_to_teacher(summed.studies[0])
    assert ends(figure) == pytest.approx([last_divergence("forward"), last_divergence("reverse") / 128])
    labels = [axes.get_ylabel() for axes in figures.loss_terms(summed.studies[0]).axes]
    assert labels == ["weight × term\n(nats per token)", "weight × term\n(nats per token,\ndivergence per sequence)"]
    text = text_of(distillation(summed, tmp_path))
    assert "128 times, the tokens of a block, heavier" in text
    assert "On the left the sums of divergence reverse over a block are divided by its tokens." in text
    assert "Not on the left" not in text


def test_sums_over_answers_of_unlike_lengths_are_left_out(evidence, tmp_path, monkeypatch):
    summed = trained_with(evidence, "qa", "forward", kd_reduction="batchmean")
    monkeypatch.setattr(Run, "data_card", lambda run: {"task": "qa", "block_size": 128})
    assert ends(figures.distance_to_teacher(summed.studies[0])) == []
    text = text_of(distillation(summed, tmp_path))
    assert "Not on the left: divergence forward, whose divergence is a sum over sequences of unlike lengths." in text
