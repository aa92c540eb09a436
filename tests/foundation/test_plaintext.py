"""Text of others is seen as it is, short enough to leave room, and leads to no file of its own choosing.

python -m pytest tests/test_plaintext.py -v
"""

from __future__ import annotations

import json

import pytest
from synthetic_runs import final_numbers, write_run

from nbutils import report
from nbutils.foundation.files import read_json, write_json
from nbutils.foundation.plaintext import LONGEST_TEXT, MOST_MARKS, escaped, shortened, visible
from nbutils.report.arms import LONGEST_LABEL, Slot, group_arms
from nbutils.report.evidence import gather
from nbutils.report.figures.style import LONGEST_LINE, drawable


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("plain\n\ttext, é 你 😀", "plain\n\ttext, é 你 😀"),
        ("\x1b[31mred\x07\r", r"\u001b[31mred\u0007\u000d"),
        ("\u202egnp.\u202c", r"\u202egnp.\u202c"),
        ("a\u200bb\ufeffc\u00ad\u2028", r"a\u200bb\ufeffc\u00ad\u2028"),
        ("\ud800 \ufffe \U0001ffff", r"\ud800 \ufffe \U0001ffff"),
        ("\u3164\u2800", r"\u3164\u2800"),
        ("e" + "\u0301" * (MOST_MARKS + 2), "e" + "\u0301" * MOST_MARKS + r"\u0301\u0301"),
        ("Tiê\u0301ng \u05d1\u05bc\u05b0", "Tiê\u0301ng \u05d1\u05bc\u05b0"),
        (3.5, "3.5"),
    ],
)
def test_what_hides_is_spelled_and_what_is_read_stays(given, shown):
    assert visible(given) == shown


def test_html_of_a_text_is_the_text_and_no_longer_than_a_cell():
    assert escaped("<b title='x'>&\"") == "&lt;b title=&#x27;x&#x27;&gt;&amp;&quot;"
    assert escaped("x" * LONGEST_TEXT) == "x" * LONGEST_TEXT
    assert escaped("x" * 100_000) == "x" * LONGEST_TEXT + " …"
    assert len(escaped("\u202e" * 100_000)) <= LONGEST_TEXT + 2


def test_a_long_text_is_cut_between_words_where_it_has_some():
    assert shortened("one two three", 13) == "one two three"
    assert shortened("one two three", 12) == shortened("one two three", 8) == "one two …"
    assert shortened("one two three", 7) == "one two …"
    assert shortened("x" * 200, 100) == "x" * 100 + " …"
    assert shortened("a " + "x" * 200, 100) == "a " + "x" * 98 + " …"


def test_figures_draw_only_what_their_font_has_in_lines_that_fit():
    assert drawable("alpha 0.5, τ −1 → é\nnext") == "alpha 0.5, τ −1 → é\nnext"
    assert drawable("你$x\t") == r"\u4f60$x\u0009"
    assert max(map(len, drawable("x" * 500 + "\n" * 500).split("\n"))) <= LONGEST_LINE + 2
    assert drawable("a\n" * 500).count("\n") < 20


def test_labels_of_arms_are_short_and_no_two_alike():
    values = ["<b>", "x" * 1000 + "a", "x" * 1000 + "b", "\u202e"]
    slots = [Slot("stage", f"v{n}", {"remark": value}, None) for n, value in enumerate(values)]
    labels = [arm.label for arm in group_arms(slots)]
    assert labels[0] == "remark <b>" and labels[3] == r"remark \u202e"
    assert labels[2] == f"{labels[1]} (no. 2)" and max(map(len, labels)) < LONGEST_LABEL
    assert [arm.values["remark"] for arm in group_arms(slots)] == values


def test_half_a_character_is_kept_in_json(tmp_path):
    write_json(tmp_path / "told.json", {"error": "\ud800 é"})
    assert read_json(tmp_path / "told.json") == {"error": "\ud800 é"}


@pytest.mark.parametrize("name", ["../elsewhere", "..", "", "a/b", "x" * 300, "nul\0", "../toy/../../elsewhere"])
def test_a_plan_whose_name_is_no_folders_is_reported_and_nothing_is_written_for_it(name, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    run = write_run(tmp_path / "runs" / "toy", "cosine", {"alpha": 0.5, "seed": 1}, final_numbers(0.5, 1, 0))
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"plan": name}))
    evidence = gather(tmp_path / "runs")
    assert len(evidence.studies) == 1 and "no name of a folder" in evidence.plans[0].problems[0]
    assert report.write_metrics(evidence) == []
    assert [*tmp_path.rglob("metrics.json")] == []
