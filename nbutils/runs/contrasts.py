"""The comparisons a plan announces before any run: what they may name, and whether they were changed later.

A contrast is judged on pairs: the runs of the treatment and of the control whose other matrix values (the seeds) are
equal. The control may stand in another stage, so that studies share it: pairs then have equal seeds, and equal values
of every other name that both stages' matrices have. What no contrast asked for is exploratory.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

from nbutils.evaluation import SPELLING, TASKS, number_names
from nbutils.foundation import NOTEBOOKS, PlanError, did_you_mean, now, read_json, write_json
from nbutils.interaction import read_rubric, rubric_names

SPLITS = ("eval", "test")
MEASURED = ("loss", "ce_loss", "perplexity", "token_acc", "entropy", "bits_per_byte", "ece")  # of a split, as are these
ANSWERS = ("bleu", "bleu_limit", "corpus_bleu", "chrf", "exact_match", "token_f1")
PROXIES = ("cosine_loss", "cosine", "cosine_centred", "cosine_unigram", "cosine_tuned")
SMOOTHED = ("prefix_loss", "kl_to_target", "prefix_mass", "clipped_gold", "clipped_mass", "predicted_cost")
SMOOTHED += ("unsmoothed_ce", "unsmoothed_bits_per_byte")
SAID = ("distinct_1", "distinct_2", "repetition", "response_words")
OF_A_JUDGE = ("score", "failures", "not_asked", "number_mass")
RULES = ("readability", "repetition", "length", "known_words", "completeness", "variety", "balance")  # rules' aspects
TRAINED = ("parameters", "steps", "tokens_seen", "train_seconds", "tokens_per_second", "peak_memory_mib")
TRAINED += ("evaluation_seconds",)
TRAINED += tuple(f"{model}_{split}_ce_loss" for model in ("unigram", "bigram", "trigram") for split in SPLITS)
BY_STEPS = ("seconds_per_step", "best_eval_ce_loss", "best_step")
BY_STEPS += ("gradient_spikes", "early_gradient_peak", "early_ce_rise", "unstable_early", "diverged")
SAMPLES = tuple(
    f"samples_{what}" for what in ("distinct_1", "distinct_2", "repetition", "similarity", "similarity_shuffled")
)
SIZES = ("parameters", "bytes_on_disk", "generation_tokens_per_second", "scoring_tokens_per_second")
CACHE = tuple(
    f"teacher_cache_{what}" for what in ("kl_error", "gradient_error", "context_kl", "bytes_per_token", "seconds")
)
# Names that plans, files or measured programs have a word in, by notebook
PATTERNS = {
    "06_interaction": r"(blimp|pairs)_\w+_acc",
    "10_own_objective": r"(eval|test)_\w+_loss",  # of terms of their own
}

CHOICES = {"better": ("lower", "higher"), "claim": ("better", "no worse")}
PAIRED_BY = "seed"  # the one matrix name whose values make independent pairs
LEFT_OUT = ("control_metric", "control_stage")  # what a contrast may leave out
USED_FILE = "contrasts.json"  # in the plan's folder: what the contrasts were, and since when


class InMatrix(Protocol):
    """A variant of a plan, or a run of one."""

    stage: str
    matrix: dict[str, Any]


class Named(InMatrix, Protocol):
    """A variant of a plan."""

    name: str


Item = TypeVar("Item", bound=InMatrix)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two settings of one stage, `treatment` and `control`, as matrix values. The noise floor is one: an A/A pair."""

    stage: str
    metric: str
    treatment: dict[str, Any]
    control: dict[str, Any]

    @property
    def stage_of_control(self) -> str:
        """The stage in which the control stands."""
        return self.stage

    def sides(self, items: Iterable[Item]) -> dict[str, list[Item]]:
        """The items that are "treatment" and those that are "control", in the plan's order."""
        asked = {"treatment": (self.stage, self.treatment), "control": (self.stage_of_control, self.control)}
        items = list(items)
        return {
            side: [item for item in items if item.stage == stage and item.matrix.items() >= values.items()]
            for side, (stage, values) in asked.items()
        }

    def pairs(self, items: Iterable[Item]) -> list[tuple[Item, Item]]:
        """(treatment, control) for all values of the matrix's other names that both sides have, in the plan's order.

        A name that only one of two stages has makes no pairs.
        """
        sides = self.sides(items)
        names = [set().union(*(item.matrix for item in members)) for members in sides.values()]
        shared = set.intersection(*names) - self.treatment.keys() - self.control.keys()

        def rest(item: Item) -> str:
            return json.dumps({name: item.matrix.get(name) for name in sorted(shared)})

        controls = {rest(item): item for item in sides["control"]}
        return [(item, controls[rest(item)]) for item in sides["treatment"] if rest(item) in controls]


@dataclass(frozen=True, kw_only=True)
class Contrast(Comparison):
    """A question with its criterion. `smallest_effect` is in the metric's unit; for "no worse" it is the margin.

    Where `control_metric` is given, the control is judged on that result instead, which must be in the same unit: a
    treatment's proxy against the proxy of a control whose temperature was tuned. `control_stage` is the stage in which
    the control stands, where that is not the treatment's.
    """

    name: str
    question: str
    better: str
    claim: str
    smallest_effect: float
    primary: bool = False
    control_metric: str = ""
    control_stage: str = ""

    @property
    def stage_of_control(self) -> str:
        """The stage in which the control stands."""
        return self.control_stage or self.stage


def contrasts_sha256(contrasts: Iterable[Comparison]) -> str:
    """A hash of what the contrasts ask."""
    asked = [asdict(each) for each in contrasts]
    for each in asked:
        for name in LEFT_OUT:
            if not each.get(name):
                each.pop(name, None)  # what a plan leaves out asks nothing
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Registration:
    """What a plan asked from a moment on: the hash of its contrasts, and the pairs that each of them planned.

    pairs: {contrast: ((treatment's variant, control's variant), ...)}; empty where an early version wrote the record.
    """

    sha256: str
    at: str  # ISO 8601, UTC
    pairs: Mapping[str, tuple[tuple[str, str], ...]]


def record_contrasts(contrasts: Iterable[Comparison], folder: Path, variants: Sequence[Named] = ()) -> None:
    """Register in plan folder `folder` what these contrasts ask and which pairs of `variants` they plan.

    Nothing is written where both are as they were last registered.
    """
    contrasts, path = list(contrasts), folder / USED_FILE
    entry = {"sha256": contrasts_sha256(contrasts), "pairs": planned_pairs(contrasts, variants)}
    used = read_json(path) if path.is_file() else []
    if not used or any(used[-1].get(name) != value for name, value in entry.items()):
        write_json(path, [*used, entry | {"first_used": now()}])


def planned_pairs(contrasts: Iterable[Comparison], variants: Sequence[Named]) -> dict[str, list[list[str]]]:
    """The pairs of each contrast, as names of variants."""
    asked = [each for each in contrasts if isinstance(each, Contrast)]
    return {each.name: [[one.name, other.name] for one, other in each.pairs(variants)] for each in asked}


def registrations(folder: Path) -> list[Registration]:
    """What was registered in plan folder `folder`, the first first; empty where nothing was."""
    path = folder / USED_FILE
    return [
        Registration(
            str(each["sha256"]),
            str(each["first_used"]),
            {name: tuple((one, other) for one, other in pairs) for name, pairs in each.get("pairs", {}).items()},
        )
        for each in (read_json(path) if path.is_file() else [])
    ]


def check_criterion(where: str, given: Mapping[str, Any]) -> None:
    """Raise PlanError where `better`, `claim` or `smallest_effect` of a contrast is not what it can be."""
    for name, words in CHOICES.items():
        if given[name] not in words:
            raise PlanError(f"{where}: {name} is {given[name]!r}. {did_you_mean(str(given[name]), words)}")
    effect = given["smallest_effect"]
    if isinstance(effect, bool) or not isinstance(effect, int | float) or not 0 < effect < float("inf"):
        raise PlanError(
            f"{where}: smallest_effect is {effect!r}. Give the smallest difference in the metric that would matter to "
            "you, a number above 0."
        )
    if given.get("control_metric") == given["metric"]:
        raise PlanError(f"{where}: control_metric is the metric itself. Leave it out.")
    if given.get("control_stage") == given["stage"]:
        raise PlanError(f"{where}: control_stage is the contrast's own stage. Leave it out.")
    if not isinstance(given.get("primary", False), bool):
        raise PlanError(f"{where}: primary is {given['primary']!r}. Write true or false.")


def check_metrics(where: str, comparison: Comparison, notebooks: Mapping[str, Path]) -> None:
    """Raise PlanError where a side is judged by a number that its notebook, by its stage's name, does not write."""
    check_metric(f"{where}: metric", comparison.metric, notebooks[comparison.stage])
    of_control = getattr(comparison, "control_metric", "")
    label = "control_metric" if of_control else "metric"
    check_metric(f"{where}: {label}", of_control or comparison.metric, notebooks[comparison.stage_of_control])


def check_pairs(
    where: str, comparison: Comparison, matrices: Mapping[str, Mapping[str, list[Any]]], items: Iterable[InMatrix]
) -> None:
    """Raise PlanError where a comparison names no values of its stage's matrix, has two equal sides, or has no pair.

    `matrices` are those of the plan's stages, by name.
    """
    for side, stage in (("treatment", comparison.stage), ("control", comparison.stage_of_control)):
        _check_side(where, side, getattr(comparison, side), matrices[stage])
    if comparison.stage == comparison.stage_of_control:
        if comparison.treatment.keys() != comparison.control.keys():
            raise PlanError(
                f"{where}: treatment and control must name the same matrix values, so that pairs can be formed."
            )
        if comparison.treatment == comparison.control:
            raise PlanError(f"{where}: treatment and control are the same.")
    else:
        _check_seeds(where, comparison, matrices)
    items = list(items)
    if not comparison.pairs(items):
        raise PlanError(
            f"{where}: no variant of the treatment has a partner of the control with equal other matrix values. "
            "Look at what the stage excludes."
        )
    _check_independent(where, comparison, items)


def _check_side(where: str, side: str, values: Mapping[str, Any], matrix: Mapping[str, list[Any]]) -> None:
    for name, value in values.items():
        if name not in matrix:
            near = did_you_mean(name, matrix)
            raise PlanError(f"{where}: {side} names {name!r}, not in the matrix of its stage. {near}")
        if value not in matrix[name]:
            told = ", ".join(map(str, matrix[name]))
            raise PlanError(f"{where}: {side} has {name} {value!r}; the matrix has {told}.")


def _check_seeds(where: str, comparison: Comparison, matrices: Mapping[str, Mapping[str, list[Any]]]) -> None:
    """Two stages make pairs by equal seeds: both must have them, and neither side may name one."""
    for side, stage in (("treatment", comparison.stage), ("control", comparison.stage_of_control)):
        if PAIRED_BY not in matrices[stage]:
            raise PlanError(
                f"{where}: the matrix of stage {stage!r} has no {PAIRED_BY}, by which runs of two stages make pairs. "
                f"Add {PAIRED_BY} to it, with the values the other stage has."
            )
        if PAIRED_BY in getattr(comparison, side):
            raise PlanError(f"{where}: {side} names {PAIRED_BY}, by which runs of two stages make pairs. Leave it out.")


def _check_independent(where: str, comparison: Comparison, items: Sequence[InMatrix]) -> None:
    """Raise PlanError where a seed gives more than one pair."""
    pairs = comparison.pairs(items)
    members = {"treatment and control": [treatment for treatment, _ in pairs]}
    if comparison.stage != comparison.stage_of_control:
        members = comparison.sides(items)  # of names that one stage alone has, pairs show one value only
    for side, own in members.items():
        names = {name for item in own for name in item.matrix} - {PAIRED_BY}
        unnamed = sorted(name for name in names if len({str(item.matrix.get(name)) for item in own}) > 1)
        if unnamed:
            raise PlanError(
                f"{where}: pairs with equal seed differ in {', '.join(unnamed)}, but runs of one seed are not "
                f"independent of each other. Name one value of each in {side}."
            )


def check_metric(where: str, name: str, notebook: Path) -> None:
    """Raise PlanError where `notebook` is one of ours and writes no result `name`; `where` begins the message."""
    known = known_results(notebook.stem) if notebook.parent == NOTEBOOKS else None
    if known and name not in known and not re.fullmatch(PATTERNS.get(notebook.stem, ""), name):
        of_split = {f"{split}_{name}" for split in SPLITS} & known  # nothing is nearer than a name without its split
        near = did_you_mean(f"test_{name}" if of_split else name, of_split or known)
        raise PlanError(f"{where} {name} is no known result of {notebook.stem}. {near}")


@lru_cache
def known_results(notebook: str) -> frozenset[str]:
    """The names that a run of our notebook of that name may write; none of a notebook that is no study."""
    names = {
        "02_teacher_finetune": lambda: _trained(ANSWERS) | {*BY_STEPS, "expected_before", "expected_after"} | _before(),
        "03_distillation": lambda: _trained((*ANSWERS, "kl_loss", "kl_to_teacher", "agreement")) | _of_teachers(),
        "04_cosine_mixing": lambda: _trained(PROXIES) | {*BY_STEPS, *SAMPLES, "tuned_temperature"},
        "05_prefix_smoothing": lambda: _trained(SMOOTHED) | {*BY_STEPS, *SAMPLES} | _smoothed(),
        "06_interaction": lambda: _trained() | {*SAMPLES} | _judged(),
        "10_own_objective": lambda: _trained(PROXIES) | {*BY_STEPS, *SAMPLES, "tuned_temperature"},
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
