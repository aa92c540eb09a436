"""Two reports or sets of runs side by side: what is told of them, and what is refused.

python -m pytest tests/test_comparison.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from page_structure import Structure
from synthetic_runs import CONTRASTS, final_numbers, write_plan, write_run, write_runs

from nbutils.foundation.files import read_json, write_json
from nbutils.report import write_summary
from nbutils.report.comparison import COLUMNS, OTHER_DATA, SAME, UNDECIDED, changed, compare, means, runs, verdicts
from nbutils.report.evidence import gather
from nbutils.report.html_export import CLASSES, TAGS, ReportError
from nbutils.report.sides import read_sides
from nbutils.report.statistics import mean_interval
from nbutils.runs.metric_labels import UNKNOWN, measure

SHIFTED = "alpha0.5"  # the arm whose cross entropy is another in the second set


def seed_of(folder: Path) -> int:
    return int(folder.name.split("seed")[1].split("-")[0])


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> tuple[Path, Path]:
    """Two plans' folders: the second without seed 5, with fewer steps, another torch, other numbers, another margin."""
    folders = []
    for name in ("first", "second"):
        where = tmp_path_factory.mktemp(name)
        runs = write_runs(where / "runs", keep=lambda m, name=name: name == "first" or m["seed"] != 5)
        contrasts = [CONTRASTS[0] | {"smallest_effect": 0.01 if name == "first" else 0.02}, *CONTRASTS[1:]]
        shutil.copy(write_plan(where, contrasts=contrasts), runs / "toy" / "plan.yaml")
        folders.append(runs / "toy")
    for run in folders[1].glob("cosine-*"):
        manifest, result = read_json(run / "manifest.json"), read_json(run / "result.json")
        manifest["packages"]["torch"] = "9.9.9"
        manifest["hardware"]["gpus"] = ["H200"]
        manifest["params"]["max_steps"] = 100
        result["test_ce_loss"] += (0.5 + 0.01 * seed_of(run)) * (SHIFTED in run.name)
        result["test_token_acc"] += 0.01 * (-1) ** seed_of(run) * (SHIFTED in run.name)
        write_json(run / "manifest.json", manifest)
        write_json(run / "result.json", result)
    plan = folders[1] / "plan.yaml"
    plan.write_text(plan.read_text().replace("max_steps: 200", "max_steps: 100"))
    return folders[0], folders[1]


@pytest.fixture(scope="module")
def reports(sets, tmp_path_factory) -> tuple[Path, Path]:
    """What two weekly reports of them leave: the HTML and its numbers."""
    folder = tmp_path_factory.mktemp("reports")
    for week, side in zip(("2026-W46", "2026-W47"), sets, strict=True):
        write_summary(gather(side, str(side / "plan.yaml")), folder, week)
        (folder / f"{week}.html").write_text("<p>a report</p>")
    return folder / "2026-W46.html", folder / "2026-W47.html"


def rows(*sides) -> dict[tuple[str, str], SimpleNamespace]:
    """The rows of the means, by arm and measure."""
    names = ("arm", "measure", "first", "second", "difference", "interval", "pairs", "reading")
    told = [SimpleNamespace(**dict(zip(names, row, strict=False))) for row in means(*read_sides(*sides)).rows]
    return {(row.arm.removeprefix("cosine: "), row.measure): row for row in told}


# ---- two sets of runs -----------------------------------------------------------------------------------------------


def test_means_are_compared_over_the_seeds_that_both_have(sets):
    told = rows(*sets)
    shifted, quantity = told["alpha 0.5", "test cross entropy"], measure("test_ce_loss")
    differences = [0.51, 0.52, 0.53, 0.54]
    assert shifted.difference == quantity.difference(float(np.mean(differences))) == "+0.5250"
    assert shifted.interval == quantity.difference_interval(*mean_interval(differences))
    assert (shifted.pairs, shifted.reading) == ("4", "B worse")
    everyone = [final_numbers(0.5, seed, 0)["test_ce_loss"] for seed in range(1, 6)]
    assert shifted.first == quantity.number(float(np.mean(everyone)))  # with the seed that only A has
    accuracy, alone = told["alpha 0.5", "test token accuracy"], told["alpha 0.0", "test cross entropy"]
    assert (accuracy.difference, accuracy.reading) == ("0.00", UNDECIDED)
    assert (alone.difference, alone.reading) == ("0.0000", SAME)


def test_the_sides_the_other_way_round_read_the_other_way_round(sets):
    told = rows(*sets[::-1])
    assert told["alpha 0.5", "test cross entropy"].difference == "−0.5250"
    assert told["alpha 0.5", "test cross entropy"].reading == "B better"


def test_the_text_tells_verdicts_runs_and_what_else_is_different(sets, tmp_path):
    text = compare(*sets, tmp_path / "c.html")
    assert max(map(len, text.splitlines()[:-1])) <= COLUMNS
    assert text.splitlines()[-1] == str(tmp_path / "c.html") and (tmp_path / "c.html").is_file()
    lines = [" ".join(line.split()) for line in text.splitlines()]
    (first,) = [i for i, line in enumerate(lines) if line.startswith("mixing-perplexity A supported −0.00")]
    assert lines[first + 1].startswith("test cross entropy B interim +0.52")
    assert lines[first].endswith("] 5") and lines[first + 1].endswith("] 4")
    assert "finished on both sides: 16" in lines and "in B alone: 0" in lines
    assert "in A alone: 4 (cosine-alpha0.0-seed5-noise_seed0 and 3 more)" in lines
    assert (
        lines.index("parameter max_steps 200 100")
        < lines.index("GPU none H200")
        < lines.index("package torch 2.13.0 9.9.9")
    )
    assert "package torch 2.13.0 9.9.9" in lines and "GPU none H200" in lines
    assert "parameter max_steps 200 100" in lines and "smallest_effect of mixing-perplexity 0.01 0.02" in lines
    assert "Exploratory: no contrast asked for it" in text and "unrelated" not in text


def test_the_page_holds_the_same_and_looks_like_the_report(sets, tmp_path):
    compare(*sets, tmp_path / "c.html")
    page = (tmp_path / "c.html").read_text()
    shown = Structure(page)
    assert "Content-Security-Policy" in page and "script" not in shown.tags
    for words in (
        "toy beside toy",
        "Verdicts",
        "What else is different",
        "9.9.9",
        "B worse",
        "finished on both sides: 16",
    ):
        assert words in shown.text
    assert page.count('<tr class="control">') == 8  # both rows of every contrast: B lacks registered pairs
    before = page.encode()
    compare(*sets, tmp_path / "c.html")
    assert (tmp_path / "c.html").read_bytes() == before


def test_a_folder_of_plans_and_one_of_its_plans_are_the_same_runs(sets, tmp_path):
    text = compare(sets[0].parent, sets[0], tmp_path / "c.html")
    assert (
        "B worse" not in text and "B better" not in text and UNDECIDED not in text.lower().replace("undecided: it", "")
    )
    assert "finished on both sides: 20" in text and "Nothing: plan, parameters" in text


def test_plans_of_other_names_are_laid_beside_each_other_by_stage(sets, tmp_path):
    again = shutil.copytree(sets[0], tmp_path / "again" / "toy")
    (again / "plan.yaml").unlink()
    for manifest in again.glob("*/manifest.json"):
        write_json(manifest, read_json(manifest) | {"plan": "repeat of toy"})
    told = rows(sets[0], again).values()
    assert {row.arm.split(":")[0] for row in told} == {"cosine"} and {row.reading for row in told} == {SAME}
    assert runs(*read_sides(sets[0], again)).notes[1:] == ("in A alone: 0", "in B alone: 0")


def test_what_one_side_alone_has_is_named(sets, tmp_path):
    other = shutil.copytree(sets[0].parent, tmp_path / "runs")
    matrix = {"seed": 1}
    write_run(other / "more", "extra", matrix, final_numbers(0.5, 1, 0))
    text = compare(sets[0], other, tmp_path / "c.html")
    assert "more-extra" in text and "in B alone: 1 (more/extra-seed1)" in text, text
    assert "more-extra" in Structure((tmp_path / "c.html").read_text()).text
    again = compare(other, sets[0], tmp_path / "c.html")
    assert "in A alone: 1 (more/extra-seed1)" in again


def test_runs_on_other_data_are_never_called_better(sets, tmp_path):
    other = shutil.copytree(sets[1], tmp_path / "other" / "toy")
    for manifest in other.glob(f"cosine-{SHIFTED}-seed[12]-*/manifest.json"):
        write_json(manifest, read_json(manifest) | {"data_fingerprint": "e" * 64})
    told = rows(sets[0], other)
    shifted = told["alpha 0.5", "test cross entropy"]
    assert (shifted.reading, shifted.difference, shifted.interval, shifted.pairs) == (OTHER_DATA, UNKNOWN, UNKNOWN, "0")
    assert shifted.first != UNKNOWN and told["alpha 0.0", "test cross entropy"].reading == SAME
    text = compare(sets[0], other, tmp_path / "c.html")
    assert "finished on both sides: 14" in text and "of the same name on other data: 2 (cosine-alpha0.5-seed1" in text
    assert "Their numbers do not compare" in text and "in A alone: 4 " in text
    shown = Structure((tmp_path / "c.html").read_text()).text
    assert "finished on both sides: 14" in shown and "of the same name on other data: 2" in shown


def test_verdicts_in_other_metrics_keep_their_own(sets, tmp_path):
    other = shutil.copytree(sets[0], tmp_path / "other" / "toy")
    plan = other / "plan.yaml"
    before, asked = "metric: test_ce_loss\n  smallest_effect: 0.01", "metric: test_token_acc\n  smallest_effect: 0.01"
    assert before in plan.read_text()
    plan.write_text(plan.read_text().replace(before, asked, 1))
    text = compare(sets[0], other, tmp_path / "c.html")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    (first,) = [i for i, line in enumerate(lines) if line.startswith("mixing-perplexity (not one question")]
    assert "−0.00" in lines[first] and lines[first + 1].startswith("test_token_acc B") and "+0.1" in lines[first + 1]
    assert "metric of mixing-perplexity test_ce_loss test_token_acc" in lines
    shown = Structure((tmp_path / "c.html").read_text()).text
    assert "the metrics differ" in shown and "test_token_acc" in shown


# ---- reports --------------------------------------------------------------------------------------------------------


def test_two_reports_have_no_intervals_and_nothing_is_called_better(reports, tmp_path):
    text = compare(*reports, tmp_path / "c.html")
    first = text.splitlines()[0]  # cut to the width of a terminal where the folder's name is long
    whole = f"A  {reports[0].with_suffix('.json')}: report of week 2026-W46, of toy; 20 of 20 runs"
    assert whole.startswith(first.removesuffix("…")) or first.startswith(whole)
    assert "+0.5" in text and "B worse" not in text and "B better" not in text
    assert "intervals need two folders of runs" in text and "reading" not in text
    assert "A report's numbers tell no parameters" in text
    shown = Structure((tmp_path / "c.html").read_text()).text
    assert "2026-W46 beside 2026-W47" in shown and "Reading" not in shown and "B worse" not in shown
    assert len(means(*read_sides(*reports)).header) == 5


def test_a_report_beside_runs_has_no_intervals_either(reports, sets, tmp_path):
    sides = reports[0].with_suffix(".json"), sets[1]
    assert len(means(*read_sides(*sides)).header) == 5 and changed(*read_sides(*sides)) is None
    assert rows(*sides)["alpha 0.5", "test cross entropy"].difference.startswith("+0.5")
    assert "in A alone: 4" in compare(reports[0], sets[1], tmp_path / "c.html")


def test_the_file_is_named_after_both_sides(reports, sets, tmp_path, monkeypatch):
    monkeypatch.setattr("nbutils.report.comparison.REPORTS", tmp_path / "reports")
    compare(reports[0], sets[1])
    assert [path.name for path in (tmp_path / "reports").iterdir()] == ["2026-W46-beside-toy.html"]


def test_hostile_names_and_numbers_are_text(tmp_path):
    hostile = "<script>document.title='owned'</script><img src=x onerror=alert(1)>\u202e\x1b[31m| # `x`"
    verdict = {"outcome": hostile, "metric": hostile, "difference": None, "low": hostile, "high": [], "pairs": hostile}
    for name in ("a", "b"):
        run, mean = {"state": "finished" if name == "a" else hostile}, {hostile: hostile, "test_ce_loss": 1.5}
        content = {"week": hostile, "runs": {f"{hostile}/{hostile}": run}, "arms": {hostile: {hostile: mean}}}
        (tmp_path / f"{name}.json").write_text(json.dumps(content | {"verdicts": {hostile: verdict}}))
    text = compare(tmp_path / "a.json", tmp_path / "b.json", tmp_path / "c.html")
    assert "\x1b" not in text and "\u202e" not in text and max(map(len, text.splitlines()[:-1])) <= COLUMNS
    page = (tmp_path / "c.html").read_text()
    main = Structure(page[page.index("<main>") :])
    assert {*main.tags} <= TAGS | {"main", "nav", "a"} and "img" not in main.tags
    assert not {name for _, name, _ in main.attributes} - {"class", "id", "href", "aria-label"}
    allowed = set().union(*CLASSES.values())
    assert {value for _, name, value in main.attributes if name == "class"} <= allowed | {""}
    assert "document.title='owned'" in main.text and "\u202e" not in page


# ---- refused --------------------------------------------------------------------------------------------------------


def refusal(*arguments) -> str:
    with pytest.raises(ReportError) as caught:
        compare(*arguments)
    return str(caught.value)


def test_what_is_neither_a_report_nor_runs_is_refused(sets, tmp_path):
    cure = "Give a report (reports/<week>.html or .json), a plan's folder of runs"
    gone = refusal(sets[0], tmp_path / "gone")
    assert "There is no" in gone and cure in gone
    (tmp_path / "notes.md").write_text("notes")
    assert "notes.md is neither a report nor a folder of runs" in refusal(tmp_path / "notes.md", sets[0])
    (tmp_path / "empty").mkdir()
    assert "empty holds no runs" in refusal(sets[0], tmp_path / "empty")
    one = refusal(sets[0], sets[0] / "cosine-alpha0.5-seed1-noise_seed0")
    assert "is one run" in one and "run --from" in one


def test_a_report_without_its_numbers_is_refused(sets, tmp_path):
    (tmp_path / "2026-W40.html").write_text("<p>a report</p>")
    message = refusal(sets[0], tmp_path / "2026-W40.html")
    assert "2026-W40.json is not there" in message and "Make the report again" in message
    numbers = tmp_path / "2026-W40.json"
    numbers.write_text('{"cut')
    assert "cannot be read" in refusal(sets[0], tmp_path / "2026-W40.html")
    whole = {"week": "2026-W40", "runs": {}, "arms": {}, "verdicts": {}}
    for wrong in ([], {"plan": "toy"}, whole | {"week": 40}, whole | {"arms": {"toy": {"alpha": 1}}}, {"runs": []}):
        numbers.write_text(json.dumps(wrong))
        assert "does not hold the numbers of a report" in refusal(sets[0], numbers)


def test_the_same_twice_and_a_file_that_would_be_lost_are_refused(sets, reports):
    assert "Both sides are" in refusal(sets[0], sets[0])
    assert "Both sides are" in refusal(reports[0], reports[0].with_suffix(".json"))
    before = reports[0].read_bytes()
    assert "is one of the two reports" in refusal(*reports, reports[0])
    assert reports[0].read_bytes() == before


def test_a_folder_that_cannot_be_written_is_refused(sets, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal(*sets, tmp_path / "file" / "c.html")


def test_runs_of_a_plan_that_cannot_be_read_are_compared_without_verdicts(sets, tmp_path):
    broken = shutil.copytree(sets[0], tmp_path / "broken" / "toy")
    (broken / "plan.yaml").write_text("name: [")
    write_run(broken, "cosine", {"alpha": 0.0, "seed": 9, "noise_seed": 0}, final_numbers(0.0, 9, 0))
    sides = read_sides(sets[0], broken)
    assert runs(*sides).notes[1:] == ("in A alone: 0", "in B alone: 1 (cosine-alpha0.0-seed9-noise_seed0)")
    assert {row[2] for row in verdicts(*sides).rows if row[1] == "B"} == {UNKNOWN}
    assert {row.reading for row in rows(sets[0], broken).values()} == {SAME}
