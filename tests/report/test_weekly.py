"""What changed since the last report, the week's note and dates, and the warning about fallback data.

python -m pytest tests/test_weekly.py
"""

from __future__ import annotations

import json

import pytest
from page_structure import Structure, text_of
from synthetic_runs import FULL_CARD, final_numbers, write_full, write_plan, write_run, write_runs

from nbutils import report
from nbutils.report.evidence import Evidence, gather
from nbutils.report.html_export import CLASSES
from nbutils.report.weekly import dates, summary

FIRST = {"alpha": 0.5, "seed": 1, "noise_seed": 0}


@pytest.mark.parametrize(
    ("week", "days"),
    [
        ("2026-W47", "16 to 22 November 2026"),
        ("2026-W49", "30 November to 6 December 2026"),
        ("2026-W53", "28 December 2026 to 3 January 2027"),
        ("2026-W60", ""),
        ("next", ""),
    ],
)
def test_the_days_of_a_week(week, days):
    assert dates(week) == days


def test_the_first_report_has_nothing_to_compare_with(toy_evidence, tmp_path):
    report.write_summary(toy_evidence, tmp_path, "2026-W47")  # its own week is not an earlier one
    assert "no earlier report" in text_of(report.since_last(toy_evidence, tmp_path))
    assert "no earlier report" in text_of(report.since_last(Evidence(tmp_path), tmp_path))


def test_new_failed_repeated_and_gone_runs_are_counted_and_named(tmp_path):
    runs, file = write_runs(tmp_path / "runs", keep=lambda m: m != FIRST), write_plan(tmp_path)
    report.write_summary(gather(runs, str(file)), tmp_path, "2026-W45")
    (tmp_path / "2026-W46.json").write_text('{"cut')  # a torn one is passed over
    (tmp_path / "2026-W48.json").write_text("{}")  # a later one too
    write_run(runs / "toy", "cosine", FIRST, final_numbers(0.5, 1, 0))
    failed, again = (runs / "toy" / f"cosine-alpha1.0-seed{seed}-noise_seed0" / "manifest.json" for seed in (1, 2))
    failed.write_text(json.dumps(json.loads(failed.read_text()) | {"status": "failed"}))
    gone = runs / "toy" / "cosine-alpha1.0-seed3-noise_seed0"
    gone.rename(tmp_path / "elsewhere")
    manifest = json.loads(again.read_text())
    manifest["attempts"][0]["end"] = "2026-11-19T00:00:00.000+00:00"
    again.write_text(json.dumps(manifest))
    text = text_of(report.since_last(gather(runs, str(file)), tmp_path))
    assert "since the report of week 2026-W45: 1 new, 1 made again, 1 failed, 1 gone." in text
    assert "Runs newtoy/cosine-alpha0.5-seed1-noise_seed0" in text
    assert "test cross entropy (nats per token)" in text  # the mean of alpha 0.5 moved


def test_one_plan_is_compared_with_its_own_report_or_its_part_of_another(toy_evidence, tmp_path):
    content = summary(toy_evidence, "2026-W45")
    content["runs"] |= {"other/data": {"state": "finished", "finished": None}}
    (tmp_path / "2026-W45.json").write_text(json.dumps(content))
    assert "1 gone" in text_of(report.since_last(toy_evidence, tmp_path))
    assert "none new, none failed" in text_of(report.since_last(toy_evidence, tmp_path, plan="toy"))
    report.write_summary(toy_evidence, tmp_path, "2026-W46", "2026-W46-toy")
    report.write_summary(toy_evidence, tmp_path, "2026-W46", "2026-W46-another")
    assert "of week 2026-W46: none new" in text_of(report.since_last(toy_evidence, tmp_path, plan="toy.yaml"))
    assert "of week 2026-W45: 1 gone" in text_of(report.since_last(toy_evidence, tmp_path))
    (tmp_path / "2026-W46.json").write_text(json.dumps(content | {"runs": {}}))  # has nothing of the plan
    (tmp_path / "2026-W46-toy.json").unlink()
    assert "of week 2026-W45: none new" in text_of(report.since_last(toy_evidence, tmp_path, plan="toy"))


def test_an_equal_report_says_that_nothing_changed(toy_evidence, tmp_path):
    report.write_summary(toy_evidence, tmp_path, "2026-W40")
    text = text_of(report.since_last(toy_evidence, tmp_path))
    assert "none new, none failed" in text and "is the same" in text and "Then" not in text


def test_changed_verdicts_and_means_stand_side_by_side(toy_evidence, tmp_path):
    then = summary(toy_evidence, "2026-W40")
    then["verdicts"]["toy: mixing-perplexity"]["outcome"] = "<i>not supported</i>"
    before = then["arms"]["toy-cosine"]["alpha 0.5"]["test_ce_loss"]
    then["arms"]["toy-cosine"]["alpha 0.5"]["test_ce_loss"] = before + 0.01
    (tmp_path / "2026-W40.json").write_text(json.dumps(then))
    shown = report.since_last(toy_evidence, tmp_path)
    assert "<i>" not in shown.data
    assert f"{before + 0.01:.4f}{before:.4f}−0.0100" in text_of(shown).replace(" ", "")
    assert "toy: mixing-perplexityverdict<i>not supported</i>supported" in text_of(shown)


def test_the_numbers_are_the_same_bytes_each_time(toy_evidence, tmp_path):
    first = report.write_summary(toy_evidence, tmp_path, "2026-W47").read_bytes()
    assert report.write_summary(toy_evidence, tmp_path, "2026-W47").read_bytes() == first


def test_the_note_is_rendered_and_safe(tmp_path):
    (tmp_path / "notes").mkdir()
    note = "# Forged\n\n## Headline\n\nA **bold** word. <script>steal()</script><p class='verdict supported'>x</p>\n"
    note += "![p](https://example.com/p.png) [l](javascript:alert(1)) <b onclick='x'>y</b> \u202etxt"
    (tmp_path / "notes" / "2026-W47.md").write_text(note)
    shown = report.note(tmp_path, "2026-W47").data
    page = Structure(shown)
    assert "<strong>bold</strong>" in shown and not {"h1", "h2", "script", "a", "b"} & {*page.tags}
    assert page.tags.count("h4") == 2 and "steal" not in shown and "https" not in shown and "javascript" not in shown
    assert "\\u202e" in shown and "verdict" in str(CLASSES)


@pytest.mark.parametrize("week", ["2026-W47", "../../secret", ""])
def test_no_note_says_where_to_write_one(tmp_path, week):
    (tmp_path / "secret.md").write_text("hidden")
    assert "No note for this week" in text_of(report.note(tmp_path / "a" / "b", week))


def test_a_fallback_heads_the_report(tmp_path):
    runs, file = write_full(tmp_path, FULL_CARD | {"fallback_taken": "Another one <script>x</script> was read."})
    html = report.period(gather(runs, str(file)))
    assert html.data.startswith('<div class="warning">') and html.data.count("Another one") == 1
    assert "<script>" not in html.data and "Another one <script>x</script> was read." in text_of(html)
    runs, file = write_full(tmp_path / "as-planned")
    assert "warning" not in report.period(gather(runs, str(file))).data
