"""Which runs of interactions belong together, and what their words and rounds are.

python -m pytest tests/test_interaction_results.py
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
from synthetic_interaction import arm, changed, write_interaction

from nbutils.report.evidence import gather
from nbutils.report.studies.rounds import _named, groups, rounds_of, sampled_rounds, unequal_words


@pytest.fixture(scope="module")
def study(talk_group):
    return talk_group.study


def test_stages_of_one_control_or_one_beginning_are_one_study(talk_group, study):
    assert study.stage == "corrected, judged, stories, distilled"
    labels = ["text alone", "imitation (SFT)", "SimPO on corrections", "SimPO by the judge", "PPO", "distilled"]
    assert [each.label for each in study.arms] == labels
    assert study.control.label == "text alone" and [each.label for each in study.own_arms] == labels[:-1]
    sides = [(each.treatment.label, each.control.label) for each in talk_group.contrasts]
    assert sides[0] == ("SimPO on corrections", "imitation (SFT)") and sides[2] == ("SimPO by the judge", "text alone")
    assert sides[3] == ("distilled", "SimPO on corrections")


def test_what_begins_otherwise_and_shares_no_control_stands_alone(tmp_path):
    runs, _ = write_interaction(tmp_path, seeds=(1,))
    for path in runs.glob("talk/stories-*/manifest.json"):
        manifest = json.loads(path.read_text())
        manifest["params"] |= {"model_name": "tiny"}
        path.write_text(json.dumps(manifest))
    found = groups(gather(runs, "talk"))  # without its plan: every run is then an arm, and no contrast is known
    assert [each.study.stage for each in found] == ["corrected, judged", "stories"]


def test_two_arms_of_one_method_keep_their_own_names(study):
    simpo = arm(study, "SimPO on corrections")
    twins = [(("a", ""), replace(simpo, label="beta 2.0")), (("b", ""), replace(simpo, label="beta 2.0"))]
    assert [each.label for each in _named(twins, True)] == [
        "SimPO on corrections, beta 2.0 (stage a)",
        "SimPO on corrections, beta 2.0 (stage b)",
    ]
    judges = [(("a", ""), replace(simpo, label=f"method simpo, judge {judge}")) for judge in ("rule", "server")]
    labels = ["SimPO on corrections, judge rule", "SimPO on corrections, judge server"]
    assert [each.label for each in _named(judges, True)] == labels


def test_words_at_the_edge_of_equal(study):
    text, other = arm(study, "text alone"), arm(study, "imitation (SFT)")
    assert unequal_words(changed(other, human_words=4600), text) == ""
    assert "(1.06 times as many)" in unequal_words(text, changed(other, human_words=4720))
    none = changed(text, human_words=0)
    assert "used 12,000, text alone 0." in unequal_words(other, none)
    assert unequal_words(None, text) == ""


def test_fewer_rounds_and_damaged_samples():
    numbers = [[each["round"] for each in samples] for samples in sampled_rounds({"round": n} for n in (2, 1, 1))]
    assert numbers == [[1, 1], [2]]
    odd = [3, {"round": None}, {"round": "x"}, {"round": float("nan")}, {"round": 10**400}, {}]
    assert sampled_rounds(odd) == []


def test_what_is_no_number_in_a_round_is_none():
    written = pd.DataFrame({"round": [2, 1, "x", 1], "reward": ["inf", "0.5", 0.1, 0.9], "human_words": 10})
    found = rounds_of(SimpleNamespace(rounds=lambda: written))
    assert [*found.index] == [1, 2] and found["reward"][1] == 0.5 and math.isnan(found["reward"][2])
    assert found["all_words"].isna().all()  # of a part alone
    assert not len(rounds_of(SimpleNamespace(rounds=pd.DataFrame)))
