"""What the report says of judges: whether they can be believed, and whether a student only pleases them.

python -m pytest tests/test_report_judges.py
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from page_structure import row_of, text_of
from synthetic_interaction import (
    HOSTILE,
    SCORE,
    SECOND,
    SEEDS,
    arm,
    changed,
    interaction_numbers,
    values,
    with_arm,
    with_params,
)

from nbutils.report.studies.gains import gains
from nbutils.report.studies.interaction import arm_table, aspect_table
from nbutils.report.studies.judges import judge_table


@pytest.fixture(scope="module")
def study(talk_group):
    return talk_group.study


def test_reward_hacking_is_a_warning_with_both_gains(study):
    html = gains(study)
    found = [
        [ours - theirs for ours, theirs in zip(values("simpo_judge", name), values("text", name), strict=True)]
        for name in (SCORE, SECOND)
    ]
    low, high = scipy.stats.ttest_1samp(found[1], 0).confidence_interval(0.95)
    told = f"{np.mean(found[1]):+.3f} [{low:+.3f}, {high:+.3f}]".replace("-", "−")
    text = text_of(html)
    assert html.data.startswith('<div class="warning">') and html.data.count("warning") == 1
    assert "Reward hacking in SimPO by the judge: against text alone" in text and told in text
    assert ". It has learned what its judge likes, not to write better." in text
    assert f"says {np.mean(found[0]):+.3f} [" in text
    assert "PPO: against text alone the judge it learned from says −0.200" in text and "imitation" not in text
    other = with_arm(study, with_params(arm(study, "PPO"), judged_samples=20))
    assert "PPO: no arm of text alone was asked the same" in text_of(gains(other))


def test_stories_are_judged_of_every_arm_and_check_who_learned_from_them(study):
    stories = {"text alone": (0.5, 0.6), "PPO": (0.9, 0.3)}
    told = study
    for label, (first, second) in stories.items():
        own = changed(arm(study, label), judge_length_correlation=0.9, judges_agreement=0.9)
        for number, run in enumerate(own.runs):
            more = {"test_story_judge_score": first, "test_story_second_judge_score": second + 0.01 * number}
            more |= {"story_judge_length_correlation": 0.1, "story_judges_agreement": 0.2}
            run.__dict__["result"] |= more | {"story_judges_agreement_samples": 16, "test_story_judge_wit": 0.25}
            run.__dict__["result"]["test_story_judge_not_asked"] = 7.0
        told = with_arm(told, own)
    row = row_of(arm_table(told), ">PPO")
    assert row[4] == "0.900" and row[5].startswith("0.310 [")
    aspects = aspect_table(told)
    assert row_of(aspects, ">wit")[0] == "first judge, stories" and row_of(aspects, ">wit").count("0.25") == len(
        stories
    )
    assert "not asked" not in aspects.data
    assert row_of(arm_table(told), "imitation")[4:6] == ["–", "–"]
    text = text_of(gains(told))
    assert "Reward hacking in PPO: against text alone the judge it learned from says +0.400" in text
    assert "on stories, the held-out" in text
    row = row_of(judge_table(told), ">PPO")
    assert row[4] == "0.10" and row[5] == "0.20 (n 48)"  # of stories
    assert row_of(judge_table(told), "text alone")[4].startswith("0.90")  # of contexts


def test_what_was_not_asked_and_how_probable_numbers_were_is_shown(study):
    assert "Not<br" not in judge_table(study).data and "Numbers" not in judge_table(study).data.split("<caption")[0]
    masses = {"judge": 0.9, "story_judge": 0.125, "second_judge": 0.75}
    one = changed(arm(study, "PPO"), **{f"test_{judge}_number_mass": mass for judge, mass in masses.items()})
    for run in one.runs:
        frame = run.rounds().assign(not_asked=2)
        object.__setattr__(run, "rounds", lambda frame=frame: frame)
    row = row_of(judge_table(with_arm(study, one)), ">PPO")
    assert row[4] == "30" and row[5] == "12.5 (held out: 75.0)"  # of contexts and stories the lower one
    assert row_of(judge_table(with_arm(study, one)), "imitation")[4:6] == ["–", "–"]
    assert "of the time" not in row[-1]


def test_a_judge_that_hardly_writes_a_number_is_told_of_in_words(study):
    said = "writes a number {} % of the time: its grades say little"
    for masses, told in (
        ({"judge": 0.004}, said.format("0.4")),
        ({"judge": 0.9, "second_judge": 0.5, "story_second_judge": 0.099}, f"the held-out judge {said.format('9.9')}"),
    ):
        one = changed(arm(study, "PPO"), **{f"test_{judge}_number_mass": mass for judge, mass in masses.items()})
        row = row_of(judge_table(with_arm(study, one)), ">PPO")
        assert row[-1].startswith(f"fails often: 25 % {told} ") and row[-1].count("of the time") == 1


def test_a_gain_both_judges_see_and_one_within_noise_are_no_gains(study):
    hacked, numbers = arm(study, "SimPO by the judge"), interaction_numbers
    gained = [changed(hacked).runs, changed(hacked).runs, changed(hacked).runs]
    for runs, first, seconds in zip(
        gained, (0.1, 0.1, 0.0), ((0.1, 0.1, 0.11), (-0.1, 0.09, 0.0), (-0.1, -0.1, -0.11)), strict=True
    ):
        for run, seed, second in zip(runs, SEEDS, seconds, strict=True):
            text = numbers("text", seed)
            noise = 0.01 * (seed - 2)
            run.__dict__["result"] |= {SCORE: text[SCORE] + first + noise, SECOND: text[SECOND] + second}
            run.__dict__["result"]["test_ce_loss"] = text["test_ce_loss"] + noise
    told = [text_of(gains(with_arm(study, replace(hacked, runs=runs)))) for runs in gained]
    assert "Both see the gain." in told[0] and "Reward hacking" not in told[0]
    assert "The second sees no gain; perhaps it has learned what its judge likes" in told[1]
    assert "Reward hacking" not in told[1]  # the second's difference is within the noise of seeds
    assert "The first is no gain beyond the noise of seeds." in told[2] and "Reward hacking" not in told[2]


def test_a_gain_that_costs_perplexity_is_no_plain_gain(study):
    better, told = changed(arm(study, "SimPO by the judge"), judges_agreement=-0.14), []
    for seconds in ((0.10, 0.11, 0.12), (-0.1, 0.09, 0.1)):
        for run, seed, second in zip(better.runs, SEEDS, seconds, strict=True):
            run.__dict__["result"][SECOND] = interaction_numbers("text", seed)[SECOND] + second
        html = gains(with_arm(study, better))
        assert html.data.startswith('<div class="warning">')
        told.append(text_of(html).split("PPO:")[0])
    assert "Both scores rose, but it predicts what people wrote worse." in told[0] and "Both see" not in told[0]
    assert "Only the first score rose beyond noise, but it predicts what people wrote worse." in told[1]
    ours, theirs = (scipy.stats.gmean(values(method, "test_perplexity")) for method in ("simpo_judge", "text"))
    assert f"Perplexity of what people wrote: {ours:.2f}, text alone {theirs:.2f} (cross entropy +0.3000 [" in told[0]
    assert "rank correlation on its responses: −0.14." in told[0]


def test_a_judge_that_is_not_held_out_checks_nothing(study):
    same = with_params(arm(study, "SimPO by the judge"), second_judge="rule")
    assert "nothing checks its score" in text_of(gains(with_arm(study, same)))
    assert "no other judge looks on" in row_of(judge_table(with_arm(study, same)), "SimPO by the judge")[-1]


def test_failures_length_and_agreement_in_words(study):
    html = judge_table(study)
    row = row_of(html, "SimPO by the judge")
    assert row[2:6] == ["0.00 (0 of 120)", "–", "0.80 (n 90)", "0.10 (n 120)"]
    assert row_of(html, "imitation")[3] == "15 (of 120)" and row_of(html, "SimPO on")[3] == "0 (of 120)"
    assert row[6] == "scores follow length: 0.80 agreement with the held-out judge may be chance: 0.10"
    row = row_of(html, ">PPO")
    assert row[2] == "25.00 (30 of 150)" and row[6].startswith("fails often: 25 % length: 0.10, which may be chance")
    assert row_of(html, "text alone")[2] == "–"  # no judge was asked while it learned
    only = replace(study, arms=study.arms[-3:])
    assert "Without a" not in judge_table(only).data


def test_an_interval_of_correlations_is_one(study):
    text = changed(arm(study, "text alone"))
    for run, value in zip(text.runs, (0.9, 0.5, 0.9), strict=True):
        run.__dict__["result"] |= {"judge_length_correlation": value}
    low = scipy.stats.ttest_1samp([0.9, 0.5, 0.9], 0).confidence_interval(0.95).low
    assert row_of(judge_table(with_arm(study, text)), "text alone")[4] == f"0.77 [{low:.2f}, 1.00] (n 90)"


def test_what_a_judge_left_out_at_the_end_is_shown(study):
    """There the verdicts come from: a mean over what is left may be one over another kind of text."""
    assert "at the end" not in judge_table(study).data.split("<caption")[0]
    failures = {"test_judge_failures": 0, "test_second_judge_failures": 5, "test_story_second_judge_failures": 1}
    row = row_of(judge_table(with_arm(study, changed(arm(study, "imitation (SFT)"), **failures))), "imitation")
    assert row[4] == "(held out: 18 of 120)"  # of three seeds
    assert row[-1].startswith("at the end the held-out judge gave 15 % no score ")


@pytest.mark.parametrize("number, told", [(16, "may be chance: 0.45"), (30, "judge agrees in part: 0.45")])
def test_of_few_texts_no_agreement_is_claimed(study, number, told):
    few = changed(arm(study, "text alone"), judges_agreement=0.45, judges_agreement_samples=number / 3)
    assert told in row_of(judge_table(with_arm(study, few)), "text alone")[-1]


@pytest.mark.parametrize(
    ("length", "agreement", "told"),
    [
        (-0.6, 0.5, "scores follow shortness: −0.60 the held-out judge agrees in part: 0.50"),
        (0.4, 0.3, "scores lean towards length: 0.40 the held-out judge hardly agrees: 0.30"),
        (0.25, -0.5, "scores hardly depend on length: 0.25 the held-out judge says the opposite: −0.50"),
        (None, None, ""),
    ],
)
def test_rules_of_thumb(study, length, agreement, told):
    text = arm(study, "imitation (SFT)")
    other = changed(text, judge_length_correlation=length, judges_agreement=agreement)
    assert row_of(judge_table(with_arm(study, other)), "imitation")[-1] == told


@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        ({"server_model": f"judge-8b{HOSTILE}"}, "server judge-8b&lt;script&gt;"),
        ({}, "server<br"),
        (["server_model"], "server<br"),
        (None, "server<br"),
    ],
)
def test_the_model_of_a_server_is_named(study, prompts, told):
    one = with_params(arm(study, "PPO"), judge="server")
    runs = tuple(replace(run, manifest=run.manifest | {"prompts": prompts}) for run in one.runs)
    html = judge_table(with_arm(study, replace(one, runs=runs))).data
    assert told in html and "\u202e" not in html
