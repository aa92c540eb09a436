"""Judges: what rules say, what is kept, what it may cost, how far it can be trusted."""

from __future__ import annotations

import json
import logging
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from small_judges import ASPECTS

from nbutils.foundation.errors import ParameterError, RunError
from nbutils.foundation.places import NOTEBOOKS
from nbutils.interaction.judges import JudgeLimits, agreement, known_words_of, length_correlation, make_judge
from nbutils.interaction.judges.judged import Judged, Reply, ScoringJudge, judged
from nbutils.interaction.judges.rules import balance, completeness, readability, variety
from nbutils.interaction.replies import FILE, ReplyCache, reply_key


def test_rule_judges_by_hand():
    assert readability("The cat sat.") == pytest.approx(1.0)  # 206.8 - 3.0 - 84.6 is above 100
    assert readability("Internationalisation.") == 0.0
    text = "The little river ran away. The summer evening was beautiful and quiet."
    # 12 words, 2 sentences; lit-tle 2 (-le), river 2, away 2, summer 2, evening 3, beautiful 3, quiet 1: 20 syllables
    assert readability(text) == pytest.approx((206.835 - 1.015 * 6 - 84.6 * 20 / 12) / 100)
    assert completeness("went home. She slept! and then") == pytest.approx(2 / 3)
    assert completeness('"Hello," he said. "Bye."') == 1.0
    assert balance('(a [b]) "c" “d”') == 1.0
    assert balance('(a] "') == 0.0
    assert variety("a b a b") == 0.5
    assert variety(" ".join(["a", "b"] * 100)) == pytest.approx(2 / 50)
    assert variety(" ".join(map(str, range(500)))) == 1.0


def test_the_rule_judge_grades_what_it_says():
    known = known_words_of(["The cat sat. the dog", "cat Cat"])
    assert known == {"the", "cat"}
    judge = make_judge("rule", "weekly", None, JudgeLimits(), known_words=known, asked_words=4)
    found = judge.score(["x"] * 3, ["The cat sat down.", "a b c d a b c d", " \n"])
    assert judge.aspects == ("readability", "repetition", "length", "known_words")
    assert found.aspects["known_words"].tolist() == [0.5, 0.0, 0.0]
    assert found.aspects["length"].tolist() == [1.0, 0.5, 0.0]
    assert found.aspects["repetition"].tolist() == pytest.approx([1.0, 0.8, 0.0])
    assert found.scores == pytest.approx(np.mean(list(found.aspects.values()), 0))
    assert found.scores[2] == 0
    assert found.ok.all()
    assert found.words == 8  # nobody is asked about nothing
    assert "known_words" not in make_judge("rule", "weekly", None, JudgeLimits()).aspects


@pytest.mark.parametrize("name", ["rule", "rule_plain"])
def test_rule_judges_stay_in_range_and_repeat_whatever_the_text(name):
    judge = make_judge(name, "story", None, JudgeLimits())
    generator = random.Random(0)
    letters = [*"abc .!?\"'()[]“”\n\x00", "\u202e", "\ud800", "ß", "字", "e\u0301"]
    texts = ["".join(generator.choices(letters, k=generator.randint(0, 80))) for _ in range(300)] + ["(" * 10**6]
    first, second = judge.score([""] * len(texts), texts), judge.score([""] * len(texts), texts)
    assert first.ok.all()
    assert ((first.scores >= 0) & (first.scores <= 1)).all()
    assert np.array_equal(first.scores, second.scores)
    assert first.raw == second.raw


def test_the_held_out_rule_judge_is_another_judge():
    texts = ["the cat sat on the mat the cat sat on the mat", "Dogs bark. Cats do not!", 'She said "hello']
    first, second = (make_judge(name, "story", None, JudgeLimits()) for name in ("rule", "rule_plain"))
    assert not set(first.aspects) & set(second.aspects)
    assert not np.allclose(first.score(texts, texts).scores, second.score(texts, texts).scores)


class CountingJudge(ScoringJudge):
    """Says half of everything, but nothing of texts with `bad` in them; counts what it was asked."""

    def __init__(self, limits=JudgeLimits(), cache=None, seconds=0.0):  # noqa: B008
        super().__init__("counting", ASPECTS, limits, cache)
        self.asked, self.seconds = [], seconds

    def key(self, text):
        return reply_key("counting", text.prompt, text.completion)

    def ask(self, texts, missing):
        for index in sorted(missing):
            if not self.budget.seconds_left():
                return
            time.sleep(self.seconds)
            self.asked.append(texts[index].completion)
            bad = "bad" in texts[index].completion
            yield {index: Reply(None, "no\x1b[2J\u202e" * 100) if bad else Reply((0.5, 1.0), "7 10")}


def test_what_fails_is_left_out_and_counted_and_told_once(caplog):
    judge = CountingJudge()
    with caplog.at_level(logging.WARNING):
        found = judge.score(["p"] * 3, ["a", "bad", "b"])
        judge.score(["p"], ["bad"])
    assert found.ok.tolist() == [True, False, True]
    assert np.isnan(found.scores[1])
    assert np.isnan(found.aspects["coherence"][1])
    assert found.scores[[0, 2]].tolist() == [0.75, 0.75]
    assert len(found.raw[1]) <= 400
    assert found.raw[1].startswith("no\\u001b[2J\\u202e")
    assert found.words == 6
    assert (found.not_asked, found.failures) == (0, 1)
    assert caplog.text.count("gave no score to 1 of 3 texts") == 1
    assert caplog.text.count("gave no score") == 1


def test_the_budget_of_words_is_kept_and_a_ledger_sets_it(caplog):
    judge = CountingJudge(JudgeLimits(most_words=7))
    found = judge.score(["p"] * 4, ["a", "b", "c", "d"])
    assert found.ok.tolist() == [True, True, True, False]
    assert found.words == 6
    assert (found.not_asked, found.failures) == (1, 0)  # a spent budget is no failure of the judge's
    assert "budget" in found.raw[3]
    assert judge.score(["p"], ["e"]).words == 0
    assert judge.asked == ["a", "b", "c"]
    assert caplog.text.count("has spent its 7 words") == 1
    resumed = CountingJudge(JudgeLimits(most_words=7))
    resumed.budget.words = 6
    assert not resumed.score(["p"], ["a"]).ok.any()


def test_an_empty_completion_has_the_lowest_grade_and_costs_nothing():
    judge = CountingJudge(JudgeLimits(most_words=2))
    found = judge.score(["p"] * 4, ["", "a", " \n", "bad"])
    assert judge.asked == ["a"]
    assert found.ok.tolist() == [True, True, True, False]
    assert found.scores[:3].tolist() == [0.0, 0.75, 0.0]
    assert (found.words, found.not_asked, found.failures) == (2, 1, 0)


def test_empty_completions_are_no_scores_where_there_are_no_others():
    failed = CountingJudge().score(["p"] * 3, ["", "bad", "bad bad"])
    assert not failed.ok.any() and (failed.failures, failed.not_asked) == (2, 1)
    spent = CountingJudge(JudgeLimits(most_words=2)).score(["p"] * 5, ["", "a", "", "b", ""])
    assert spent.ok.tolist() == [True, True, True, False, False]  # else those behind would be all there is
    assert CountingJudge().score(["p"] * 2, ["", " "]).scores.tolist() == [0.0, 0.0]


def test_empty_completions_say_nothing_of_the_judges():
    generator = random.Random(1)
    texts = [f"{number} " + "word " * generator.randint(0, 9) for number in range(200)] + [""] * 200
    first, second = RandomJudge(2).score([""] * 400, texts), RandomJudge(3).score([""] * 400, texts)
    assert first.ok.all() and first.by_judge.sum() == 200
    assert agreement(first, second).texts == 200
    assert abs(agreement(first, second).correlation) < 0.2 and abs(length_correlation(first, texts)) < 0.2


class RandomJudge(ScoringJudge):
    """Grades that depend on nothing."""

    def __init__(self, seed):
        super().__init__("random", ASPECTS, JudgeLimits())
        self.generator = random.Random(seed)

    def ask(self, texts, missing):
        yield {index: Reply((self.generator.random(),) * len(ASPECTS), "") for index in missing}


def test_the_budget_of_seconds_is_kept(caplog):
    judge = CountingJudge(JudgeLimits(most_seconds=0.12), seconds=0.05)
    found = judge.score(["p"] * 20, [str(i) for i in range(20)])
    assert 2 <= found.ok.sum() <= 3
    assert found.words == 2 * found.ok.sum()
    assert not judge.score(["p"], ["x"]).ok.any()
    assert caplog.text.count("has spent its 0.12 seconds") == 1


def test_a_kept_reply_is_not_asked_again_and_costs_the_same_words(tmp_path):
    first = CountingJudge(cache=ReplyCache(tmp_path))
    before = first.score(["p"] * 4, ["a", "bad", "a", "\ud800"])
    assert first.asked == ["a", "bad", "\ud800"]
    again = CountingJudge(cache=ReplyCache(tmp_path))
    after = again.score(["p"] * 4, ["a", "bad", "a", "\ud800"])
    assert again.asked == []
    assert after.words == before.words == 8
    assert after.ok.tolist() == before.ok.tolist() == [True, False, True, True]
    assert after.raw == before.raw
    again.score(["q"], ["a"])
    assert again.asked == ["a"]  # of another prompt


def test_a_damaged_cache_is_set_aside_and_rows_that_lie_are_not_believed(tmp_path, caplog):
    (tmp_path / FILE).write_bytes(b"SQLite format 3\x00" + b"\xff" * 5000)
    judge = CountingJudge(cache=ReplyCache(tmp_path))
    assert judge.score(["p"], ["a"]).ok.all()
    assert (tmp_path / f"{FILE}.damaged-1").is_file()
    assert "is damaged" in caplog.text
    with sqlite3.connect(tmp_path / FILE) as connection:
        for damage in (
            "{",
            "[1]",
            '{"values": [2, 3], "raw": "", "number_mass": null}',
            '{"values": [0.5], "raw": "", "number_mass": null}',
            '{"values": [NaN, 0], "raw": "", "number_mass": null}',
            '{"values": [1, 1], "raw": "", "number_mass": [2, 0]}',
            '{"values": [1, 1], "raw": "", "number_mass": [1]}',
            '{"values": [1, 1], "raw": "", "number_mass": 0.5}',
        ):
            connection.execute("UPDATE replies SET reply = ?", [damage])
            connection.commit()
            judge.asked.clear()
            assert judge.score(["p"], ["a"]).scores.tolist() == [0.75]
            assert judge.asked == ["a"]
            if damage == "{":
                assert judge.score(["p"], ["a"]).ok.all() and judge.asked == ["a"]  # it was kept anew


def test_a_cache_that_goes_away_costs_its_keeping_alone(tmp_path, caplog):
    judge = CountingJudge(cache=ReplyCache(tmp_path / "cache"))
    shutil.rmtree(tmp_path / "cache")
    assert judge.score(["p"], ["a"]).ok.all() and judge.score(["p"], ["b"]).ok.all()
    assert caplog.text.count("Replies of judges cannot be read") == 1


def test_a_cache_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="Make the folder writable"):
        ReplyCache(tmp_path / "file" / "cache")


WRITER = """
import sys
from pathlib import Path
from nbutils.interaction.replies import ReplyCache
cache = ReplyCache(Path(sys.argv[1]))
print("ready", flush=True)
for number in range(10**9):
    cache.put({f"{sys.argv[2]} {number} {i}": [number] * 50 for i in range(20)})
"""


def test_writers_that_are_killed_leave_whole_batches(tmp_path):
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(n)], stdout=subprocess.PIPE)
        for n in range(2)
    ]
    for writer in writers:
        writer.stdout.readline()
    time.sleep(0.3)
    for writer in writers:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
    cache = ReplyCache(tmp_path)
    kept = [cache.get([f"{n} {number} {i}" for i in range(20)]) for n in range(2) for number in range(200)]
    assert {len(each) for each in kept} <= {0, 20}
    assert any(kept)
    cache.put({"after": 1})
    assert cache.get(["after", "before"]) == {"after": 1}


def made_up(scores) -> Judged:
    replies = [Reply(None if np.isnan(score) else (score,), "") for score in scores]
    return judged(("all",), replies, 0)


def test_how_far_a_judge_can_be_trusted():
    first, second = made_up([0.1, 0.5, np.nan, 0.9, 0.7]), made_up([0.2, np.nan, 0.3, 0.8, 0.9])
    assert length_correlation(first, ["a", "a b", "a b c d e f", "a b c d", "a b c"]) == pytest.approx(1)
    assert agreement(first, second) == pytest.approx((0.5, 3))
    assert np.isnan(agreement(made_up([0.5] * 4), made_up([0.1, 0.2, 0.3, 0.4])).correlation)
    assert np.isnan(length_correlation(made_up([0.1, 0.2]), ["a", "a b"]))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"batch_size": 0}, "batch size of a judge is 0"),
        ({"timeout_seconds": 0}, "time-out is 0 seconds"),
        ({"retries": -1}, "asked again -1 times"),
        ({"most_words": -1}, "may spend -1 words"),
        ({"most_seconds": float("nan")}, "may spend nan seconds"),
        ({"least_number_mass": 1.5}, r"least_number_mass is 1.5; give a number in \[0, 1\]"),
        ({"least_number_mass": float("nan")}, "least_number_mass is nan"),
    ],
)
def test_limits_that_cannot_be_are_refused(limits, message):
    with pytest.raises(ParameterError, match=message):
        make_judge("rule", "weekly", None, JudgeLimits(**limits))


def test_the_notebook_gives_each_limit_its_own_parameter():
    """Every parameter has a value of its own here, so that two of them cannot be confused."""
    given = {"judge_batch_size": 2, "judge_timeout_seconds": 3.0, "judge_retries": 4, "most_teacher_words": 5}
    given |= {"most_teacher_seconds": 6.0, "least_number_mass": 0.7}
    cells = json.loads((NOTEBOOKS / "06_interaction.ipynb").read_text())["cells"]
    (cell,) = [source for each in cells if "limits = " in (source := "".join(each["source"]))]
    told = {"run": SimpleNamespace(params={}), **given}
    exec(cell, told)
    assert told["limits"] == JudgeLimits(2, 3.0, 4, most_words=5, most_seconds=6.0, least_number_mass=0.7)
