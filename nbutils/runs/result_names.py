"""The names of the numbers that our notebooks write to result.json, so that a plan can be told of one that is none.

Which of them a run writes depends on its parameters: a task that nobody asked for has no number. Notebooks of a user's
own write what they like.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from nbutils.evaluation import SPELLING, TASKS, number_names
from nbutils.foundation import NOTEBOOKS, PlanError, did_you_mean
from nbutils.interaction import read_rubric, rubric_names

SPLITS = ("eval", "test")
MEASURED = ("loss", "ce_loss", "perplexity", "token_acc", "entropy", "bits_per_byte", "ece")  # of a split, as are these
ANSWERS = ("bleu", "bleu_limit", "corpus_bleu", "chrf", "exact_match", "token_f1")
PROXIES = ("cosine_loss", "cosine", "cosine_centred", "cosine_unigram", "cosine_tuned")
SMOOTHED = ("prefix_loss", "kl_to_target", "prefix_mass", "clipped_gold", "clipped_mass", "predicted_cost")
SMOOTHED += ("unsmoothed_ce", "unsmoothed_bits_per_byte")
DATA = ("tokens", "blocks", "documents", "answer_tokens")
LEAKED = tuple(f"leaked_{what}_share" for what in ("ngram", "document", "question", "answer"))
SAID = ("distinct_1", "distinct_2", "repetition", "response_words")
OF_A_JUDGE = ("score", "failures", "not_asked", "number_mass")
RULES = ("readability", "repetition", "length", "known_words", "completeness", "variety", "balance")  # rules' aspects
TRAINED = ("parameters", "steps", "tokens_seen", "train_seconds", "tokens_per_second", "peak_memory_mib")
TRAINED += ("evaluation_seconds", "unigram_eval_ce_loss", "unigram_test_ce_loss")
BY_STEPS = ("seconds_per_step", "best_eval_ce_loss", "best_step")
BY_STEPS += ("gradient_spikes", "early_gradient_peak", "early_ce_rise", "unstable_early", "diverged")
SAMPLES = tuple(
    f"samples_{what}" for what in ("distinct_1", "distinct_2", "repetition", "similarity", "similarity_shuffled")
)
SIZES = ("parameters", "bytes_on_disk", "generation_tokens_per_second", "scoring_tokens_per_second")
CACHE = tuple(
    f"teacher_cache_{what}" for what in ("kl_error", "gradient_error", "context_kl", "bytes_per_token", "seconds")
)
PREPARED = ("vocab_size", "block_size", "fallback_taken", *(f"unigram_{each}_ce_loss" for each in ("train", *SPLITS)))
TRIALS = ("trials", "trials_finished", "trials_pruned", "trials_failed", "best_eval_ce_loss")
# Names that plans, files or measured programs have a word in, by notebook
PATTERNS = {
    "06_interaction": r"(blimp|pairs)_\w+_acc",
    "07_search": r"(best|importance)_\w+",
    "10_own_objective": r"(eval|test)_\w+_loss",  # of terms of their own
    "09_benchmarks": r"\w+_(seconds|mib|ratio|bar|mib_at_\d+|step_\w+|loss|per_token|noise)",
}


def check_metric(where: str, name: str, notebook: Path) -> None:
    """Raise PlanError where `notebook` is one of ours and writes no result `name`; `where` begins the message."""
    known = known_results(notebook.stem) if notebook.parent == NOTEBOOKS else None
    if known and name not in known and not re.fullmatch(PATTERNS.get(notebook.stem, ""), name):
        of_split = {f"{split}_{name}" for split in SPLITS} & known  # nothing is nearer than a name without its split
        near = did_you_mean(f"test_{name}" if of_split else name, of_split or known)
        raise PlanError(f"{where} {name} is no known result of {notebook.stem}. {near}")


@lru_cache
def known_results(notebook: str) -> frozenset[str]:
    """The names that a run of our notebook of that name may write; none where it writes no result."""
    names = {
        "01_data_prep": lambda: {*PREPARED, *_of(("train", *SPLITS), DATA), *_of(SPLITS, LEAKED)},
        "02_teacher_finetune": lambda: _trained(ANSWERS) | {*BY_STEPS, "expected_before", "expected_after"} | _before(),
        "03_distillation": lambda: _trained((*ANSWERS, "kl_loss", "kl_to_teacher", "agreement")) | _of_teachers(),
        "04_cosine_mixing": lambda: _trained(PROXIES) | {*BY_STEPS, *SAMPLES, "tuned_temperature"},
        "05_prefix_smoothing": lambda: _trained(SMOOTHED) | {*BY_STEPS, *SAMPLES} | _smoothed(),
        "06_interaction": lambda: _trained() | {*SAMPLES} | _judged(),
        "07_search": lambda: {*TRIALS},
        "10_own_objective": lambda: _trained(PROXIES) | {*BY_STEPS, *SAMPLES, "tuned_temperature"},
        "09_benchmarks": lambda: {"bars_missed"},
    }
    return frozenset(names.get(notebook, set)())


def _of(beginnings: tuple[str, ...], names: tuple[str, ...]) -> set[str]:
    return {f"{beginning}_{name}" for beginning in beginnings for name in names}


def _trained(measured: tuple[str, ...] = ()) -> set[str]:
    return {*TRAINED, *_of(SPLITS, MEASURED + measured)}


def _before() -> set[str]:
    return _of(tuple(f"before_{split}" for split in SPLITS), ("ce_loss", "perplexity", "bits_per_byte"))


def _of_teachers() -> set[str]:
    measured = _of(tuple(f"teacher_{split}" for split in SPLITS), ("ce_loss", "perplexity", "token_acc"))
    return {*BY_STEPS, *SAMPLES, *SIZES, *CACHE, *_of(("teacher",), SIZES), *measured}


def _smoothed() -> set[str]:
    facts = ("effective_smoothing", "target_entropy", "equals_cross_entropy", "predicted_cost", "unsmoothing_d")
    return {*facts, *number_names([*TASKS, *SPELLING])}


def _judged() -> set[str]:
    aspects = {aspect.name for rubric in rubric_names() for aspect in read_rubric(rubric).aspects}
    names = {"blimp_acc", "pairs_acc", "judge_failure_rate", "kl_to_start"}
    names |= {f"{who}_words" for who in ("human", "student", "teacher")}
    for kind in ("", "story_"):
        names |= {f"{kind}{of}" for of in ("judge_length_correlation", "judges_agreement", "judges_agreement_samples")}
        judges = tuple(f"test_{kind}{judge}" for judge in ("judge", "second_judge"))
        names |= _of((f"test_{kind}".rstrip("_"),), SAID) | _of(judges, (*OF_A_JUDGE, *RULES, *sorted(aspects)))
    return names
