"""results.md and metrics.json: complete, honest, and the same bytes each time.

python -m pytest tests/test_results_log.py
"""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace

import mistune
import pytest
from synthetic_runs import FULL_CARD, write_full, write_plan, write_runs

from nbutils import report
from nbutils.report import judging, statistics
from nbutils.report.evidence import Evidence, gather
from nbutils.report.log import CONCLUSIONS, NO_CONTRAST, results_log, text


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    runs, file = write_full(tmp_path_factory.mktemp("full"), FULL_CARD | {"fallback_taken": "Other *text*.\n# Forged"})
    return gather(runs, str(file))


def test_every_run_has_its_section_as_the_study_kept_it(full):
    log = results_log(full)
    assert log.count("## Run: ") == len(full.slots) == 24
    section = log[log.index("## Run: ") :].split("\n\n")[0]
    assert r"- Dataset: HuggingFaceFW/finepdfs / eng\_Latn (field: text)" in section
    assert "- Block size: 512 | Alpha: 0.0 | Temp: 1.0 | TopK: None" in section
    assert "- Train steps: 200 | Epochs: 1.0 | LR: – | BS train/eval: –/–" in section
    test = json.loads(section[section.index("- Test metrics: ") :].removeprefix("- Test metrics: ").split("\n")[0])
    assert test == {k: v for k, v in full.slots[0].run.result.items() if k.startswith("test_")}


def test_text_cannot_leave_its_line(full):
    assert "\n# Forged" not in results_log(full) and r"Other \*text\*. \# Forged" in results_log(full)
    hostile = "a\n## b <script> [x](y) `c` | ![d](e)"
    assert text(hostile) == r"a \#\# b \<script\> \[x\](y) \`c\` \| \!\[d\](e)"


def test_a_numbers_name_is_no_markdown_however_it_is_escaped(tmp_path):
    runs, file = write_runs(tmp_path / "runs", keep=lambda matrix: matrix["seed"] == 1), write_plan(tmp_path)
    path = runs / "toy" / "cosine-alpha0.0-seed1-noise_seed0" / "result.json"
    name = 'eval_*a*_[x](http://y)"\\'
    path.write_text(json.dumps({name: 0.5} | json.loads(path.read_text())))
    line = next(line for line in results_log(gather(runs, str(file))).splitlines() if "Eval metrics" in line)
    shown = mistune.create_markdown(escape=False, plugins=["url"])(line)
    assert "<em>" not in shown and "<a" not in shown
    told = html.unescape(re.sub("<[^>]+>", "", shown)).strip().removeprefix("Eval metrics: ")
    assert json.loads(told)[name] == 0.5


def test_the_takeaway_is_what_the_intervals_say(full, toy_evidence):
    log = results_log(toy_evidence)
    assert "Takeaway: Test cross entropy is higher in this arm" in log  # alpha 1.0
    differences = toy_evidence.studies[0].differences(toy_evidence.studies[0].arms[1], "test_ce_loss")
    low, high = statistics.mean_interval(differences)
    assert low < 0 < high or f"Test cross entropy is {'lower' if high < 0 else 'higher'}" in log
    assert "5 seed pairs)" in log and "Supported (primary): Is alpha 0.5 no worse" in log
    assert CONCLUSIONS["win"] in log
    assert CONCLUSIONS["undecided"] in results_log(full)  # its primary contrast could not be seen


def test_one_seed_supports_no_takeaway(tmp_path):
    runs, file = write_full(tmp_path, seeds=1)
    log = results_log(gather(runs, str(file)))
    assert "1 seed pairs support no statement" in log and "is lower" not in log and CONCLUSIONS["win"] not in log


def test_a_refuted_primary_contrast_is_never_a_win(toy_evidence):
    (study,) = toy_evidence.studies
    verdict = replace(study.judged[0].verdict, outcome=judging.NOT_SUPPORTED)
    judged = (replace(study.judged[0], verdict=verdict), *study.judged[1:])
    plan = replace(toy_evidence.plans[0], studies=(replace(study, judged=judged),))
    assert CONCLUSIONS["win"] not in results_log(replace(toy_evidence, plans=(plan,)))


def test_without_contrasts_nothing_is_concluded(tmp_path):
    assert NO_CONTRAST in results_log(gather(write_runs(tmp_path / "runs", keep=lambda m: m["seed"] < 3)))
    assert "no finished runs yet" in results_log(Evidence(tmp_path))


def test_the_same_runs_give_the_same_bytes(full, tmp_path):
    first = report.write_log(full, tmp_path).read_bytes()
    again = gather(full.folder, str(full.folder.parent / "full.yaml"))
    assert report.write_log(again, tmp_path).read_bytes() == first


def test_metrics_json_summarises_a_plan(tmp_path):
    keep = {"alpha": 0.5, "seed": 1, "noise_seed": 0}
    runs, file = write_runs(tmp_path / "runs", keep=lambda m: m != keep), write_plan(tmp_path)
    (path,) = report.write_metrics(gather(runs, str(file)))
    assert path == runs / "toy" / "metrics.json"
    content = json.loads(path.read_text())
    assert content["missing"] == {"cosine-alpha0.5-seed1-noise_seed0": "not run yet"} and len(content["runs"]) == 19
    assert content["verdicts"]["toy: mixing-perplexity"]["pairs"] == 4
    assert content["composite"]["toy-cosine"].keys() == {"alpha 0.5", "alpha 1.0"}
    assert len(gather(runs, str(file)).slots) == 20  # the file is no run
