"""Method, audit, stability, calibration and budget in the report, with everything there and with nothing.

python -m pytest tests/test_report_sections.py
"""

from __future__ import annotations

import ast
import base64
import re
from dataclasses import replace

import nbformat
import pandas as pd
import pytest
from IPython.display import HTML
from page_structure import Structure, text_of
from synthetic_runs import FULL_CARD, PNG, audit_rows, write_full

from nbutils import report
from nbutils.report import figures
from nbutils.report.diagnostics import finding, proxy_table, soft_share
from nbutils.report.evidence import Evidence, gather
from nbutils.report.html_export import clean
from nbutils.report.page import together
from nbutils.report.studies.mixing import composite_table
from nbutils.runs.params import find_notebook

BY_STUDY = [
    report.audit_findings,
    report.audit_table,
    report.stability_table,
    report.calibration_table,
    proxy_table,
    report.sample_table,
    report.budget_table,
    composite_table,
    report.samples,
]
FIGURES = [figures.heat_map, figures.gradient_audit, figures.reliability]


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    card = FULL_CARD | {"seen_by_base_model": "<script>seen</script>"}
    runs, file = write_full(tmp_path_factory.mktemp("full"), card)
    return gather(runs, str(file))


def told(rows: list[dict], **changes: float) -> str:
    audit = pd.DataFrame([row | {"run": "a"} for row in rows])
    for name, value in changes.items():
        audit.loc[(audit["term"] == "objective") & (audit["space"] == "parameters"), name] = value
    return finding(audit)["Finding"]


def test_did_nothing_and_was_not_applied_are_told_apart():
    assert told(audit_rows(0.5)).startswith("Applied, and it pulls elsewhere")
    assert told(audit_rows(0.5, error=0.9)).startswith("Not applied")
    assert told(audit_rows(0.5, alike=0.9999)).startswith("Applied, but it asks for nothing else")
    assert told(audit_rows(0.0)).startswith("Applied: plain cross entropy")
    assert told(audit_rows(0.5), applied_error=float("nan")).startswith("Cannot be told")
    assert told(audit_rows(0.5, error=0.005)).startswith("Applied")  # bfloat16's rounding


def test_an_objective_that_was_not_applied_is_a_warning_at_the_headline(tmp_path):
    runs, file = write_full(tmp_path)
    assert "gradient audit" not in text_of(report.verdicts(gather(runs, str(file))))
    run = runs / "full" / "cosine-alpha0.5-temperature0.7-num_train_epochs1.0-seed2"
    rows = [row | ({"applied_error": 0.8} if row["applied_error"] and row["step"] else {}) for row in audit_rows(0.5)]
    pd.DataFrame(rows).to_csv(run / "audit.csv", index=False)
    evidence = gather(runs, str(file))
    text = text_of(report.verdicts(evidence))
    assert "objective was not applied in alpha 0.5, temperature 0.7." in text
    steps = report.audit_table(evidence.studies[0]).data
    assert "<td>–<br>–<br>1e-06 → 8e-01 → 8e-01</td>" in steps
    assert steps.count("<td>–<br>–<br>1e-06</td>") == 5 and steps.count("<td>1e-06</td>") == 2  # plain cross entropy


def test_one_bad_step_of_one_run_is_enough():
    rows = [row | {"run": "a"} for row in audit_rows(0.5)] + [row | {"run": "b"} for row in audit_rows(0.5)]
    rows[-1]["applied_error"] = 0.5
    assert finding(pd.DataFrame(rows))["Finding"].startswith("Not applied")


def test_the_soft_share_is_the_weighted_norms():
    parameters = pd.DataFrame([row | {"run": "a"} for row in audit_rows(0.5)]).query("space == 'parameters'")
    assert soft_share(parameters) == pytest.approx(0.5 * 0.5 / (0.5 * 2.0 + 0.5 * 0.5))


def test_stability_counts_runs_and_names_the_worst(full):
    text = text_of(report.stability_table(full.studies[0]))
    assert "alpha 1.033 of 30 of 3" in text.replace("alpha 1.0, ", "") and "(worst 7.40)" in text


def test_equal_tokens_and_equal_time_name_their_controls(full):
    (study,) = full.studies
    text = text_of(report.budget_table(study))
    assert "Equal time is judged against alpha 0.0, num_train_epochs 1.45" in text and "(× 1.45)" in text
    arm, longer = study.arms[2], study.arms[1]
    theirs = longer.by_seed("test_ce_loss")
    gap = sum(value - theirs[seed] for seed, value in arm.by_seed("test_ce_loss").items()) / 3
    assert f"{gap:+.4f}".replace("-", "−") in text


def test_the_method_has_formulas_data_and_models_and_no_script(full):
    html = report.method(full)
    text = text_of(html)
    for needed in ("(1 − α) CE + α C", "read 6,500 → split 6,000", "Layers", "768", "<script>seen</script>"):
        assert needed in text
    assert "<script>" not in html.data and text.count("HuggingFaceFW") == 1
    assert Structure(clean(html.data)).tags == Structure(html.data).tags


def test_samples_are_picked_by_closeness_in_meaning_where_it_was_measured(full, toy_evidence):
    text = text_of(report.samples(full.studies[0]))
    prompts = re.findall(r"The function number (\d)", text)
    assert prompts == ["6", "5", "4", "3", "2"] and "closest in meaning" in text and "repetition 0.60" in text
    assert "the first all arms share" in text_of(report.samples(toy_evidence.studies[0]))


def test_the_heat_map_shows_paired_differences(full):
    (study,) = full.studies
    left, right = figures.heat_map(study).axes
    shown = [text.get_text() for text in left.texts]
    mean = sum(study.differences(study.arms[2], "test_ce_loss")) / 3
    assert len(shown) == 9 and f"{mean:+.4f}".replace("-", "−") in shown and shown[:3] == ["0.0000"] * 3
    assert "cosine" in right.get_title(loc="left")


def test_reliability_lies_where_the_sums_say(full):
    left, right = figures.reliability(full.studies[0]).axes
    curve = left.lines[1].get_xydata()  # the first is the diagonal
    assert curve[0] == pytest.approx([0.5 / 15, 0.5 / 15 * 0.97]) and len(curve) == 15
    assert sum(right.lines[0].get_ydata()) == pytest.approx(1.0)


@pytest.mark.parametrize("show", BY_STUDY)
def test_what_is_not_there_is_said_and_what_is_there_survives_cleaning(show, full, toy_evidence):
    assert text_of(show(toy_evidence.studies[0]))
    html = show(full.studies[0]).data
    assert Structure(clean(html)).tags == Structure(html).tags and "nan" not in text_of(show(full.studies[0])).split()


def test_no_runs_at_all(tmp_path):
    empty = Evidence(tmp_path)
    assert "No data card" in text_of(report.method(empty)) and "No trained model" in text_of(report.method(empty))


def test_a_proxys_verdict_says_what_token_frequencies_alone_would_give(tmp_path):
    runs, file = write_full(tmp_path)
    text = text_of(report.verdicts(gather(runs, str(file))))
    assert "In the embeddings of alpha 0.5, token frequencies alone would give 0.2000 where the model gives" in text
    assert text.count("token frequencies alone") == 1  # not beside the cross entropy's verdict


# --- several stages --------------------------------------------------------------------------------


def of_stages(full: Evidence, count: int) -> Evidence:
    """The study as so many stages of three arms each."""
    (plan,), (study,) = full.plans, full.studies
    study = replace(study, arms=study.arms[:3])
    own = [slot for slot in study.slots if slot.run in study.runs]
    studies = []
    for name in (f"stage-{number}" for number in range(1, count + 1)):
        slots = tuple(replace(slot, stage=name) for slot in own)
        studies.append(replace(study, stage=name, slots=slots))
    slots = tuple(slot for each in studies for slot in each.slots)
    return replace(full, plans=(replace(plan, studies=tuple(studies), slots=slots),))


def test_what_several_stages_share_is_said_once(full):
    evidence = of_stages(full, 3)
    html = report.by_study(evidence, report.stability_table)
    assert html.data.count("<table") == html.data.count("Unstable early: in the first fifth") == 1
    names = re.findall(r'<tr class="study"><th colspan="8">(.*?)</th></tr>', html.data)
    assert names == ["stage-1", "stage-2", "stage-3"] and html.data.count("<tr") == 1 + 3 * (1 + 3)
    assert Structure(clean(html.data)).tags == Structure(html.data).tags
    last = evidence.studies[2]
    shown = [("a", report.stability_table(last)), ("b", report.cost_table(last)), ("<c>", report.cost_table(last))]
    assert [text_of(together(shown)).count(name) for name in ("<c>", "Training only", "Unstable")] == [1, 1, 2]
    notes = report.by_study(
        evidence, lambda study: HTML(f'<p class="note">{"odd" * (study is not last) or "even"}</p>')
    )
    assert notes.data == '<p class="note">stage-1, stage-2: odd</p><p class="note">stage-3: even</p>'


def test_a_cleaned_page_loses_needless_tags_alone():
    picture = f'<img alt="&lt;/div&gt;" src="data:image/png;base64,{base64.b64encode(PNG).decode()}">'
    light = f'<div class="table"><table><tbody><tr><td>{picture}<td>&lt;/td&gt;</table></div><p>a</p>'
    full = light.replace("<td>&", "</td><td>&").replace("</table>", "</td></tr></tbody></table>")
    assert clean(f'<div class="odd">\n{full}</div>') == clean(light) == light


def test_parameters_that_differ_name_their_stages(full):
    evidence = of_stages(full, 3)
    (plan,) = evidence.plans
    last = plan.studies[2]
    slots = [replace(slot, run=with_params(slot.run, max_steps=7)) for slot in last.slots]
    studies = (*plan.studies[:2], replace(last, slots=tuple(slots)))
    html = report.manifest(replace(evidence, plans=(replace(plan, studies=studies),)))
    assert (
        "<td>200</td><td></td></tr><tr><td></td><td>7</td><td>stage-3</td></tr>" in html.data
        and "<td>0.0, 0.5</td>" in html.data
    )


def with_params(run, **params):
    return replace(run, manifest=run.manifest | {"params": run.params | params})


def test_a_report_of_eight_stages_stays_light(full, tmp_path, monkeypatch):
    """All cells of the report notebook, without its figures, which count for themselves."""
    monkeypatch.setattr("nbutils.report.gather", lambda folder, plan: of_stages(full, 8))
    monkeypatch.setattr("nbutils.report.page.figure_of", lambda *args: HTML(f"<figure>{args[3]}</figure>"))
    notebook, names = nbformat.read(find_notebook("08_report"), as_version=4), {}
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        *statements, last = ast.parse(cell.source).body
        shown = isinstance(last, ast.Expr)
        exec(compile(ast.Module(statements if shown else [*statements, last], []), cell.id, "exec"), names)
        names["reports_folder"] = str(tmp_path)  # the first cell sets it
        value = eval(ast.unparse(last), names) if shown else None
        if isinstance(value, HTML):
            cell.outputs = [nbformat.v4.new_output("display_data", {"text/html": value.data})]
    nbformat.write(notebook, tmp_path / "executed.ipynb")
    page = report.export(tmp_path / "executed.ipynb", tmp_path / "report.html").read_text()
    assert page.count("<figure>") > 40 and page.count("stage-8") > 20
    assert len(page.encode()) < 95_000  # of 100 kB: a real plan's arms have longer names
    print("SIZE", len(page.encode()))
