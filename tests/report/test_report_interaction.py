"""Interaction in the report: numbers against hand calculation, what is said of judges and words, hostile text.

python -m pytest tests/test_report_interaction.py
"""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import yaml
from page_structure import row_of, text_of
from synthetic_interaction import (
    HOSTILE,
    SCORE,
    SECOND,
    SEEDS,
    TOLD,
    arm,
    changed,
    interaction_numbers,
    rows_of_rounds,
    values,
    with_arm,
    with_params,
    write_interaction,
)
from synthetic_runs import write_run

from nbutils import report
from nbutils.report.evidence import gather
from nbutils.report.log import results_log
from nbutils.report.studies.gains import round_table
from nbutils.report.studies.interaction import (
    arm_table,
    aspect_table,
    equal_words,
    interaction,
    response_table,
    word_table,
)
from nbutils.report.studies.interaction_figures import rounds_and_judges
from nbutils.report.studies.rounds import by_round, one_of_each_method, words_of
from nbutils.report.weekly import summary


@pytest.fixture(scope="module")
def study(talk_group):
    return talk_group.study


def test_a_teacher_that_one_side_alone_has_is_its_method_and_no_other_setting(tmp_path):
    runs, file = write_interaction(tmp_path)
    plan = yaml.safe_load(file.read_text())
    other = {"correcting_teacher": "a model", "rounds": 9, "data_folder": "elsewhere"}
    plan["stages"][1]["params"] |= other
    file.write_text(yaml.safe_dump(plan, sort_keys=False))
    for path in runs.glob("talk/judged-*/manifest.json"):
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps(manifest | {"params": manifest["params"] | other}))
    text = text_of(report.verdicts(gather(runs, str(file))))
    assert "settings than the treatment (data_folder elsewhere, not empty; rounds 9, not 5), which may" in text


# --- tables -------------------------------------------------------------------------------------------


def test_the_table_of_arms_has_every_number_by_hand(study):
    html = arm_table(study)
    row = row_of(html, "SimPO by the judge")
    found = values("simpo_judge", SCORE)
    low, high = scipy.stats.ttest_1samp(found, 0).confidence_interval(0.95)
    readability = np.mean(values("simpo_judge", "test_judge_readability"))
    assert row[1] == "3" and row[2].startswith(f"{np.mean(found):.3f} [{low:.3f}, {high:.3f}]")
    aspects = aspect_table(study)
    column = re.findall(r"<th.*?>(.*?)</th>", aspects.data).index("SimPO by the judge")
    assert row_of(aspects, ">readability")[column] == f"{readability:.2f}"
    assert row_of(aspects, ">known words")[column] == f"{readability - 0.2:.2f}"
    assert row[3].startswith(f"{np.mean(values('simpo_judge', SECOND)):.3f} [")
    assert row[4].startswith(f"{scipy.stats.gmean(values('simpo_judge', 'test_perplexity')):.2f} [")
    assert row[5].startswith(f"{100 * np.mean(values('simpo_judge', 'pairs_acc')):.2f} [")
    marked = re.findall(r'<tr class="control">.*?</tr>', html.data)
    assert len(marked) == 1 and "text alone" in marked[0]
    assert row_of(html, "distilled")[2:4] == ["–", "–"] and "failures" not in html.data
    responses = row_of(response_table(study), "SimPO by the judge")
    assert responses[1].startswith(f"{100 * np.mean(values('simpo_judge', 'test_distinct_2')):.1f} [")
    assert responses[2] == "5.0" and responses[3].startswith("21.0 [") and responses[4] == "3.000"


def test_scores_of_other_prompts_or_judges_are_marked_and_the_difference_named(study):
    assert "†" not in arm_table(study).data  # PPO learned from stories, and is asked what all are
    html = arm_table(with_arm(study, with_params(arm(study, "PPO"), judged_samples=20)))
    assert "†" in row_of(html, ">PPO")[2] and "†" not in row_of(html, "imitation")[2]
    assert "PPO (judged_samples 20, not 40)" in html.data
    other = with_arm(study, with_params(arm(study, "imitation (SFT)"), judge=f"runs/{HOSTILE}"))
    html = arm_table(other)
    assert "†" in row_of(html, "imitation")[2] and "†" not in row_of(html, "imitation")[3]
    rubric = with_arm(study, with_params(arm(study, "imitation (SFT)"), rubric="story"))
    assert "†" not in row_of(arm_table(rubric), "imitation")[2]  # of the training alone


def test_words_are_those_of_the_ledger(study):
    assert words_of(arm(study, "SimPO on corrections")) == {
        "human_words": 4000, "student_words": 4100, "teacher_words": 4000, "all_words": 12100,
    }  # fmt: skip
    html = word_table(study)
    assert row_of(html, "SimPO by the judge")[1:] == ["4,000", "16,000", "2,000", "22,000", "× 1.83", "5", "40"]
    assert row_of(html, "distilled")[1:] == ["–"] * 7
    told = "The distributions of a teacher that is distilled from cost no words"
    assert told not in text_of(html)
    distilled = with_arm(study, with_params(arm(study, "imitation (SFT)"), method="distill"))
    assert told in text_of(word_table(distilled))


def test_equal_and_unequal_words_are_said(talk_group, talk_evidence):
    text = text_of(equal_words(talk_group))
    assert (
        "About equal words (within 5 %), 12,000 to 12,100: imitation (SFT); text alone; SimPO on corrections." in text
    )
    told = "words were unequal: SimPO by the judge used 22,000 (1.83 times as many), text alone 12,000."
    assert f"Contrast ranking: the {told}" in text and "Contrast beats-sft" not in text
    assert "Contrast distilled: no words were counted of distilled" in text
    alike = replace(talk_group, contrasts=talk_group.contrasts[:2])
    assert "Every planned contrast compares arms at about equal words." in text_of(equal_words(alike))
    absent = replace(alike.contrasts[1], control=replace(alike.contrasts[1].control, runs=()))
    assert text_of(equal_words(replace(alike, contrasts=(absent,)))).count("compares arms") == 0
    some = replace(alike, contrasts=(alike.contrasts[0], absent))
    assert "Every contrast that has runs compares arms at about equal words." in text_of(equal_words(some))
    verdicts = text_of(report.verdicts(talk_evidence))
    assert "The words were unequal: simpo_judge used 22,000" in verdicts.replace("judged used", "simpo_judge used")
    assert verdicts.count("The words were unequal") == 1 and verdicts.count("No words were counted") == 1


# --- figures ------------------------------------------------------------------------------------------


def test_reward_is_drawn_over_words_and_kl_over_steps(study):
    reward, stories, kl, judges = rounds_and_judges(study).axes
    rows = [rows_of_rounds("simpo_judge", seed) for seed in SEEDS]
    line = next(each for each in reward.lines if max(each.get_xdata()) == 22_000)
    assert list(line.get_ydata()) == pytest.approx(np.mean([[row["reward"] for row in each] for each in rows], axis=0))
    assert line.get_xdata()[0] == 4_400 and len(reward.lines) == 3 and len(kl.lines) == 4  # text alone has no samples
    assert len(stories.lines) == 1 and stories.get_title(loc="left") == "prompts story"
    band = by_round(arm(study, "SimPO by the judge"), "reward").iloc[-1]
    low, high = scipy.stats.ttest_1samp([each[-1]["reward"] for each in rows], 0).confidence_interval(0.95)
    assert (band["low"], band["high"]) == pytest.approx((low, high))
    assert list(kl.lines[-1].get_xdata()) == [0, 10, 20, 30, 40] and kl.lines[-1].get_ydata()[-1] == TOLD["ppo"][4]
    means = [tuple(each.get_offsets()[0]) for each in judges.collections if len(each.get_offsets()) == 1]
    assert len(means) == 5
    assert means[-2] == pytest.approx([np.mean(values("simpo_judge", name)) for name in (SCORE, SECOND)])
    (suspect,) = judges.patches
    assert suspect.contains_point(judges.transData.transform(means[-2]))
    assert not suspect.contains_point(judges.transData.transform(means[-3]))


def test_a_legend_names_what_is_drawn_alone(study):
    shown = replace(study, arms=tuple(changed(each, test_second_judge_score=None) for each in study.arms))
    figure = rounds_and_judges(shown)
    assert len(figure.axes) == 3
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["imitation (SFT)", "SimPO on corrections", "SimPO by the judge", "PPO"]
    colours = [line.get_color() for line in figure.legends[0].get_lines()]
    assert colours == [line.get_color() for axes in figure.axes[:2] for line in axes.lines]


def test_rewards_that_cannot_be_compared_share_no_panel(study):
    other = with_arm(study, with_params(arm(study, "SimPO by the judge"), judge="runs/models/large"))
    titles = [axes.get_title(loc="left") for axes in rounds_and_judges(other).axes]
    assert titles[:3] == ["judge rule\nprompts contexts", "judge large\nprompts contexts", "judge rule\nprompts story"]
    rubric = with_arm(study, with_params(arm(study, "SimPO by the judge"), rubric="story"))
    assert [len(axes.lines) for axes in rounds_and_judges(rubric).axes[:3]] == [2, 1, 1]
    alike = with_arm(study, with_params(arm(study, "PPO"), prompts="contexts"))
    reward = rounds_and_judges(alike).axes[0]
    assert len(reward.lines) == 4 and reward.get_title(loc="left") == ""


# --- samples ------------------------------------------------------------------------------------------


def test_samples_are_those_of_first_middle_and_last_round(study):
    html = round_table(study, 8)
    text = text_of(html)
    assert all(f"sft wrote {HOSTILE.replace(chr(0x202E), chr(92) + 'u202e')} in {n}Score" in text for n in (1, 3, 5))
    assert "sft wrote" in text and "in 2Score" not in text
    assert "<script>" not in html.data and "\u202e" not in html.data
    heads = re.findall(r'<tr class="prompt"><th colspan="3">(.*?)</th>', html.data)
    assert heads[0] == "imitation (SFT)" and heads[-1].startswith("PPO: Once &lt;script&gt;")  # one prompt for all
    assert "Round 3: Prompt 3" in text and "Corrected: corrected" in text
    assert text.count("No score; the judge said: I say") == 1


def test_of_many_arms_each_method_is_shown_first(study):
    copies = [
        replace(with_params(arm(study, "SimPO on corrections"), judge="server"), label=f"copy {number}")
        for number in range(9)
    ]
    many = replace(study, arms=(*study.arms[:1], *copies, *study.arms[1:]))
    labels = [each.label for each in study.arms]
    shown = [each.label for each in one_of_each_method(many, 8).arms]
    assert [label for label in shown if not label.startswith("copy")] == labels and len(shown) == 8
    assert [each.label for each in one_of_each_method(many, 3).arms] == labels[:3]
    html = text_of(round_table(many, 5))
    assert "8 more arms are left out." in html and "PPO: Once" in html and "copy 0" in html and "copy 1" not in html
    assert "left out" not in text_of(round_table(study, 5))


# --- the whole section --------------------------------------------------------------------------------


def test_one_seed_missing_rounds_and_diverged_runs_stop_nothing(tmp_path, undrawn):
    runs, file = write_interaction(tmp_path, seeds=(1,))
    for name in ("corrected-methodsft-seed1/rounds.csv", "judged-methodsimpo_judge-seed1/round_samples.jsonl"):
        (runs / "talk" / name).unlink()
    cut = runs / "talk" / "corrected-methodsimpo-seed1" / "rounds.csv"
    cut.write_text("round,reward,<b>x</b>,human_words\n1,oops,2,3\n2,inf,2,3\nx,0.5,2,3\n")
    (runs / "talk" / "judged-methodsimpo_judge-seed1" / "rounds.csv").write_text("something\nelse\n")
    result = runs / "talk" / "stories-methodppo-seed1" / "result.json"
    result.write_text(json.dumps(json.loads(result.read_text()) | {SCORE: None, "judges_agreement": None}))
    samples = runs / "talk" / "corrected-methodsft-seed1" / "round_samples.jsonl"
    samples.write_text("".join(f"{line}\n" for line in samples.read_text().splitlines()[:4]))
    evidence = gather(runs, str(file))
    html = interaction(evidence, tmp_path / "figures")
    text = text_of(html)
    assert "<td>–</td><td><small>Round 2: Prompt 2</small>" in html.data  # two rounds: nothing is halfway
    assert not {"nan", "None", "[nan,", "inf"} & {*text.split()}
    assert "fewer than two seed pairs" in text and "Without rounds: imitation (SFT); SimPO by the judge." in text
    report.verdicts(evidence)


def test_one_run_by_hand_has_its_section(tmp_path, undrawn):
    run = write_run(
        tmp_path / "interactive", "06_interaction", {}, interaction_numbers("ppo", 1) | {"eval_cosine": 0.1}
    )
    params = {"method": "ppo", "prompts_per_round": 8, "judge": f"runs/{HOSTILE}", "second_judge": "none"}
    manifest = json.loads((run / "manifest.json").read_text()) | {"stage": "", "params": params}
    (run / "manifest.json").write_text(json.dumps(manifest))
    html = interaction(gather(tmp_path, "interactive"), tmp_path / "figures")
    assert "nothing checks its score" in html.data and "<script>" not in html.data and "&lt;script&gt;" in html.data


def test_the_other_sections_take_such_runs(talk_evidence):
    text = text_of(report.method(talk_evidence))
    assert "Minimal pairs" in text and "Objective (interaction)" in text
    assert "minimal pairs of our own: mean accuracy" in text_of(report.headline_table(talk_evidence.studies[0]))
    means = summary(talk_evidence, "2026-W47")["arms"]["talk-judged"]
    assert all(SCORE in numbers for numbers in means.values())


def test_the_log_tells_method_judges_and_words(talk_evidence):
    log = results_log(talk_evidence)
    assert "Method: simpo | Judge: rule | Held-out judge: rule\\_plain | Rubric: weekly" in log
    assert "- Words: words of people 4,000; words of the student 4,100; words of the judge or teacher 4,000" in log
    assert "Teacher metrics" not in log and "test judge's score (0 to 1): control 0.517, arm 0.817" in log
