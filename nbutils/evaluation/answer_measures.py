"""How near generated answers come to the references: BLEU two ways, chrF, exact match, F1 of tokens; paired bootstrap.

Every score has a signature that names all that decides it, for another's numbers are the same measure only if it is.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import nltk
import numpy as np
import pandas as pd
from nltk.tokenize import TreebankWordTokenizer
from nltk.tokenize.punkt import PunktSentenceTokenizer
from nltk.translate import bleu_score
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest, _bootstrap_resample

from nbutils.foundation import RunError

BLEU_SIGNATURE = (
    f"mean sentence BLEU|nltk:{nltk.__version__}|smooth:method4|weights:0.25,0.25,0.25,0.25|eff:no|case:mixed|"
    "tok:PunktSentenceTokenizer(untrained)+TreebankWordTokenizer|empty:0"
)
SQUAD_SIGNATURE = "SQuAD|case:lower|punctuation:ASCII removed (12.5 is 125)|articles:removed|whitespace:one space"
CORPUS_METRICS = {"corpus_bleu": BLEU, "chrf": CHRF}
RESAMPLES = 1000
COLUMNS = ["question", "reference", "answer", "bleu", "exact_match", "token_f1"]


class AnswerMeasures(NamedTuple):
    """A row for every answer, the numbers over all of them, and what each number is."""

    examples: pd.DataFrame  # COLUMNS
    numbers: dict[str, float]
    signatures: dict[str, str]


@dataclass(frozen=True)
class PairedScore:
    """A corpus score of two sides on the same questions; difference, interval and p value are of b minus a."""

    metric: str
    score_a: float
    score_b: float
    difference: float
    low: float  # 2.5th and 97.5th percentile of the difference over the resamples
    high: float
    p_value: float
    signature: str


def measure_answers(questions: Sequence[str], references: Sequence[str], answers: Sequence[str]) -> AnswerMeasures:
    """All measures of answers, one reference each: bleu, exact_match, token_f1 (0 to 1), corpus_bleu, chrf (0 to 100).

    `bleu_limit` is what the references themselves would get as answers: method 4 gives less than 1 to two or three
    tokens, which have no 4-grams. Without answers, as a diverged model has, the numbers are NaN.
    Raises RunError where there are other numbers of questions, references and answers.
    """
    signatures = {"bleu": BLEU_SIGNATURE, "bleu_limit": BLEU_SIGNATURE}
    signatures |= {"exact_match": SQUAD_SIGNATURE, "token_f1": SQUAD_SIGNATURE}
    if not len(answers):
        names = ["bleu", "bleu_limit", *CORPUS_METRICS, "exact_match", "token_f1"]
        empty = pd.DataFrame({name: pd.Series(dtype=str if name in COLUMNS[:3] else float) for name in COLUMNS})
        return AnswerMeasures(empty, dict.fromkeys(names, math.nan), signatures)
    if not len(questions) == len(references) == len(answers):
        raise RunError(
            f"There are {len(questions)} questions, {len(references)} references and {len(answers)} answers. Give one "
            "reference and one answer for every question."
        )
    pairs = list(zip(references, answers, strict=True))
    scores = [(sentence_bleu(*pair), exact_match(*pair), token_f1(*pair)) for pair in pairs]
    texts = pd.DataFrame({"question": questions, "reference": references, "answer": answers}, dtype=str)
    examples = texts.join(pd.DataFrame(scores, columns=COLUMNS[3:]))
    numbers = {name: float(examples[name].mean()) for name in COLUMNS[3:]}
    numbers["bleu_limit"] = float(np.mean([sentence_bleu(each, each) for each in references]))
    for name, make in CORPUS_METRICS.items():
        metric = make()
        score = metric.corpus_score(list(answers), [list(references)])
        numbers[name], signatures[name] = score.score, f"{score.name}|{metric.get_signature()}"
    return AnswerMeasures(examples, numbers, signatures)


def sentence_bleu(reference: str, answer: str) -> float:
    """NLTK's sentence BLEU with smoothing method 4 (Chen and Cherry 2014), in [0, 1]; 0 for an answer with no token.

    An answer of one token is not smoothed: to a reference of two tokens, one of them gets more (0.37) than both (0.22).
    """
    tokens = _words(answer)
    if not tokens:
        return 0.0
    smoothing = bleu_score.SmoothingFunction().method4
    return float(bleu_score.sentence_bleu([_words(reference)], tokens, smoothing_function=smoothing))


def exact_match(reference: str, answer: str) -> float:
    """1 where both are the same after SQuAD's normalisation (Rajpurkar et al. 2016), else 0."""
    return float(_squad_tokens(reference) == _squad_tokens(answer))


def token_f1(reference: str, answer: str) -> float:
    """F1 of the tokens both share after SQuAD's normalisation; where one has none, 1 if the other has none either."""
    wanted, given = _squad_tokens(reference), _squad_tokens(answer)
    if not wanted or not given:
        return float(wanted == given)
    shared = (Counter(wanted) & Counter(given)).total()
    return 2 * shared / (len(wanted) + len(given))


def paired_bleu(
    references: Sequence[str],
    answers_a: Sequence[str],
    answers_b: Sequence[str],
    metric: Literal["corpus_bleu", "chrf"] = "corpus_bleu",
) -> PairedScore:
    """Is side b better than side a on the same questions? sacrebleu's paired bootstrap, 1000 resamples, seed 12345.

    The p value is PairedTest's, two-sided (Koehn 2004); that the same answers do not differ has p 1 here, where
    sacrebleu gives its least. Raises RunError where a side has not one answer for each reference.
    """
    for side, answers in (("first", answers_a), ("second", answers_b)):
        if len(answers) != len(references):
            raise RunError(
                f"The {side} side has {len(answers)} answers to {len(references)} questions. Compare variants on the "
                "same questions, each answered by both."
            )
    if not len(references):
        raise RunError("There is no question to compare answers to. Generate answers first.")
    subject, truth, sides = CORPUS_METRICS[metric](), [list(references)], (list(answers_a), list(answers_b))
    signatures, results = PairedTest([("a", sides[0]), ("b", sides[1])], {metric: subject}, truth, "bs", RESAMPLES)()
    ((name, signature),) = signatures.items()  # sacrebleu's own name of the metric
    first, second = results[name]
    # PairedTest gives no interval of the difference. These are its own resamples: one seed, so paired.
    stats = [subject._extract_corpus_statistics(side, truth) for side in sides]
    resampled = [[each.score for each in _bootstrap_resample(side, subject, RESAMPLES)[1]] for side in stats]
    differences = np.subtract(resampled[1], resampled[0])
    low, high = np.percentile(differences, [2.5, 97.5])
    return PairedScore(
        metric=metric,
        score_a=float(first.score),
        score_b=float(second.score),
        difference=float(second.score - first.score),
        low=float(low),
        high=float(high),
        p_value=float(second.p_value) if differences.any() else 1.0,
        signature=f"{name}|{signature}",
    )


def compare_answers(
    table_a: pd.DataFrame,
    table_b: pd.DataFrame,
    names: tuple[str, str] = ("a", "b"),
    metric: Literal["corpus_bleu", "chrf"] = "corpus_bleu",
) -> PairedScore:
    """`paired_bleu` of two tables of answers (columns question, reference, answer), of one split each.

    Raises RunError, with the variants' `names`, where they answer different questions or have other references.
    """
    one, other = (table[["question", "reference"]].reset_index(drop=True) for table in (table_a, table_b))
    cure = "Compare variants that were run on the same data, split and number of answers."
    if len(one) != len(other):
        raise RunError(
            f"{names[0]} answered {len(one)} questions and {names[1]} {len(other)}: not the same ones. {cure}"
        )
    for column in one.columns:
        differing = (one[column] != other[column]).to_numpy().nonzero()[0]
        if len(differing):
            row = differing[0]
            raise RunError(
                f"{names[0]} and {names[1]} have another {column} in row {row}: {one[column][row][:60]!r} and "
                f"{other[column][row][:60]!r}. {cure}"
            )
    return paired_bleu(list(one["reference"]), list(table_a["answer"]), list(table_b["answer"]), metric)


def _words(text: str) -> list[str]:
    sentences, words = _tokenizers()
    return [word for sentence in sentences.tokenize(text) for word in words.tokenize(sentence)]


@lru_cache(maxsize=1)
def _tokenizers() -> tuple[PunktSentenceTokenizer, TreebankWordTokenizer]:
    return PunktSentenceTokenizer(), TreebankWordTokenizer()  # untrained: word_tokenize needs downloaded data


def _squad_tokens(text: str) -> list[str]:
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()
