"""What a logged number is called, its unit, which way is better, and how it is written in tables and on axes.

A study adds its own measures to MEASURES; a name that is not there is shown as it is, without a direction.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

MINUS = "−"
UNKNOWN = "–"  # shown where a number does not exist


@dataclass(frozen=True)
class Measure:
    """One metric of metrics.csv or result.json.

    `better` is "lower", "higher" or "" (neither); `scale` multiplies the stored value for display; `chance` is what a
    guess reaches, as stored, nan where none is known. `geometric`: means are geometric, as of a perplexity, whose mean
    is then the exponential of the mean cross entropy, and differences are per cent.
    """

    label: str
    unit: str = ""
    better: str = ""
    digits: int = 4
    scale: float = 1.0
    chance: float = math.nan
    geometric: bool = False

    @property
    def axis(self) -> str:
        """An axis title: label and unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    @property
    def difference_unit(self) -> str:
        """The unit of a difference: two percentages differ by percentage points, two scores on a scale have none."""
        if self.unit.startswith("0 to "):
            return ""
        return "percentage points" if self.unit == "%" else self.unit

    def number(self, value: float) -> str:
        """`value` for a table, without the unit; a dash where it is not finite."""
        return _grouped(value * self.scale, self.digits)

    def short(self, value: float) -> str:
        """`value` with as few digits as it needs, as a person writes a planned effect: 0.01."""
        return f"{value * self.scale:.6g}"

    def interval(self, low: float, high: float) -> str:
        """`[low, high]`; a dash where there is none (one seed)."""
        if not (math.isfinite(low) and math.isfinite(high)):
            return UNKNOWN
        return f"[{self.number(low)}, {self.number(high)}]"

    def signed(self, value: float) -> str:
        """A signed difference with as few digits as it needs, for the ticks of an axis."""
        text = f"{value * self.scale:+.6g}" if abs(value * self.scale) > 1e-12 else "0"
        return text.replace("-", MINUS)

    def difference(self, value: float) -> str:
        """A signed difference in the measure's unit."""
        text = self.number(value)
        return f"+{text}" if value > 0 and any(digit in text for digit in "123456789") else text

    def difference_interval(self, low: float, high: float) -> str:
        """`[low, high]` with signs; a dash where there is none."""
        if not (math.isfinite(low) and math.isfinite(high)):
            return UNKNOWN
        return f"[{self.difference(low)}, {self.difference(high)}]"


MEASURES = {
    "loss": Measure("objective", "nats per token", "lower"),
    "ce_loss": Measure("cross entropy", "nats per token", "lower"),
    "prefix_loss": Measure("smoothed cross entropy", "nats per token", "lower"),
    "kl_to_target": Measure("KL to its own target", "nats per token", "lower"),
    "target_entropy": Measure("entropy of the target", "nats per token", ""),
    "unsmoothed_ce": Measure("un-smoothed cross entropy", "nats per token", "lower"),
    "unsmoothed_bits_per_byte": Measure("un-smoothed bits per byte", "", "lower"),
    "unsmoothing_d": Measure("share of the smoothed model mixed in, d", "", "", digits=3),
    "clipped_gold": Measure("gold tokens clipped", "%", "lower", digits=2, scale=100.0),
    "clipped_mass": Measure("mass clipped per position", "", "lower", digits=6),
    "prefix_mass": Measure("mass on strict prefixes at word starts", "%", "lower", digits=2, scale=100.0),
    "effective_smoothing": Measure("effective smoothing", "%", "", digits=2, scale=100.0),
    "predicted_cost": Measure("most that the target alone costs", "nats per token", ""),
    "equals_cross_entropy": Measure("equals cross entropy", "", "", digits=0),
    "kl_loss": Measure("divergence term", "nats per token", "lower"),
    "kl_to_teacher": Measure("KL to the teacher", "nats per token", "lower"),
    "agreement": Measure("agreement with the teacher", "%", "higher", digits=2, scale=100.0),
    "cosine_loss": Measure("cosine term, 1 − cosine", "", "lower"),
    "perplexity": Measure("perplexity", "", "lower", digits=2, geometric=True),
    "token_acc": Measure("token accuracy", "%", "higher", digits=2, scale=100.0),
    "cosine": Measure("cosine proxy", "", "higher"),
    "cosine_centred": Measure("centred cosine proxy", "", "higher"),
    "cosine_unigram": Measure("cosine proxy of the unigram model", "", ""),
    "cosine_tuned": Measure("cosine proxy at the tuned temperature", "", "higher"),
    "tuned_temperature": Measure("tuned temperature", "", "", digits=2),
    "bits_per_byte": Measure("bits per byte", "", "lower"),
    "entropy": Measure("entropy", "nats per token", ""),
    "ece": Measure("calibration error", "%", "lower", digits=2, scale=100.0),
    "bleu": Measure("sentence BLEU", "0 to 1", "higher"),
    "bleu_limit": Measure("sentence BLEU of the references themselves", "0 to 1", ""),
    "corpus_bleu": Measure("corpus BLEU", "0 to 100", "higher", digits=2),
    "chrf": Measure("chrF", "0 to 100", "higher", digits=2),
    "exact_match": Measure("exact match", "%", "higher", digits=2, scale=100.0),
    "token_f1": Measure("token F1", "%", "higher", digits=2, scale=100.0),
    "gradient_spikes": Measure("steps with a gradient spike", "", "lower", digits=1),
    "early_gradient_peak": Measure("early gradient peak", "× running median", "lower", digits=2),
    "early_ce_rise": Measure("early rise of training cross entropy", "nats", "lower", digits=3),
    "unstable_early": Measure("unstable early", "share of runs", "lower", digits=2),
    "diverged": Measure("diverged", "share of runs", "lower", digits=2),
    "samples_distinct_1": Measure("distinct words in samples", "%", "", digits=1, scale=100.0),
    "samples_distinct_2": Measure("distinct word pairs in samples", "%", "higher", digits=1, scale=100.0),
    "samples_repetition": Measure("repetition in samples", "%", "lower", digits=1, scale=100.0),
    "samples_similarity": Measure("similarity of samples to the truth", "", "higher", digits=3),
    "samples_similarity_shuffled": Measure("similarity to another truth", "", "", digits=3),
    "judge_score": Measure("judge's score", "0 to 1", "higher", digits=3),
    "second_judge_score": Measure("held-out judge's score", "0 to 1", "higher", digits=3),
    "judge_failures": Measure("responses the judge gave no score", "", "lower", digits=1),
    "second_judge_failures": Measure("responses the held-out judge gave no score", "", "lower", digits=1),
    "judge_not_asked": Measure("responses the judge was not asked about", "", "lower", digits=1),
    "second_judge_not_asked": Measure("responses the held-out judge was not asked about", "", "lower", digits=1),
    "judge_number_mass": Measure("probability that the judge grades by a number", "%", "higher", digits=1, scale=100.0),
    "second_judge_number_mass": Measure(
        "probability that the held-out judge grades by a number", "%", "higher", digits=1, scale=100.0
    ),
    "judge_failure_rate": Measure("failures of the judge", "%", "lower", digits=2, scale=100.0),
    "uncorrected": Measure("samples the teacher did not correct", "", "lower", digits=1),
    "judge_length_correlation": Measure("rank correlation of score and length", "", "", digits=2),
    "judges_agreement": Measure("rank correlation of the judges", "", "", digits=2),
    "judges_agreement_samples": Measure("responses that both judges scored", "", "", digits=0),
    "reward": Measure("reward, the judge's score of a round's samples", "0 to 1", "higher", digits=3),
    "reward_sd": Measure("standard deviation of the reward", "", "", digits=3),
    "distinct_1": Measure("distinct words", "%", "", digits=1, scale=100.0),
    "distinct_2": Measure("distinct word pairs", "%", "higher", digits=1, scale=100.0),
    "repetition": Measure("repetition", "%", "lower", digits=1, scale=100.0),
    "response_words": Measure("words of a response", "", "", digits=1),
    "kl": Measure("KL from the start", "nats per token", "", digits=3),
    "kl_response": Measure("KL from the start", "nats per response", "", digits=2),
    "kl_to_start": Measure("KL from the start", "nats per token", "", digits=3),
    "kl_coefficient": Measure("price of a nat of KL", "", "", digits=3),
    "clip_fraction": Measure("tokens that the clip left out", "%", "", digits=2, scale=100.0),
    "approximate_kl": Measure("KL from the policy that sampled", "nats per token", "", digits=4),
    "simpo_loss": Measure("preference loss (SimPO)", "nats per pair", "lower"),
    "policy_loss": Measure("policy loss", "", ""),
    "value_loss": Measure("loss of the expected reward", "", "lower"),
    "human_words": Measure("words of people", "", "", digits=0),
    "student_words": Measure("words of the student", "", "", digits=0),
    "teacher_words": Measure("words of the judge or teacher", "", "", digits=0),
    "all_words": Measure("words of people, student and teacher", "", "", digits=0),
    "seconds_per_step": Measure("time of a step", "s", "lower", digits=3),
    "train_seconds": Measure("training time", "s", "lower", digits=1),
    "tokens_per_second": Measure("speed", "tokens/s", "higher", digits=0),
    "peak_memory_mib": Measure("peak memory", "MiB", "lower", digits=0),
    "tokens_seen": Measure("tokens seen", "", "", digits=0),
    "parameters": Measure("parameters", "", "", digits=0),
    "steps": Measure("steps", "", "", digits=0),
    "bytes_on_disk": Measure("size on disk", "MB", "lower", digits=1, scale=1e-6),
    "generation_tokens_per_second": Measure("generation speed", "tokens/s", "higher", digits=1),
    "scoring_tokens_per_second": Measure("scoring speed", "tokens/s", "higher", digits=0),
    "times_smaller": Measure("times fewer parameters", "", "higher", digits=1),
    "times_smaller_on_disk": Measure("times smaller on disk", "", "higher", digits=1),
    "times_faster": Measure("times faster in generation", "", "higher", digits=1),
    "teacher_cache_kl_error": Measure("relative KL error of the stored teacher", "", "lower", digits=6),
    "teacher_cache_gradient_error": Measure("relative gradient error of the stored teacher", "", "lower", digits=6),
    "teacher_cache_context_kl": Measure("KL between stored and own context", "nats per token", "lower"),
    "teacher_cache_bytes_per_token": Measure("size of the stored teacher", "bytes per token", "lower", digits=1),
    "teacher_cache_seconds": Measure("time to store the teacher", "s", "lower", digits=1),
    "expected_before": Measure("published perplexity before fine-tuning", "", "lower", digits=2),
    "expected_after": Measure("published perplexity after fine-tuning", "", "lower", digits=2),
}

# What a name begins with, and what its label becomes.
PREFIXES = {
    "eval_": "validation {}",
    "test_": "test {}",
    "teacher_": "{} of the teacher",
    "before_": "{} before fine-tuning",
    "story_": "{} in stories",
}

# In the names of what a clock or a meter of memory read: the same run gives another number each time.
OF_THE_MACHINE = ("seconds", "per_second", "memory", "mib", "times_faster", "time_ratio", "time_bar", "bars_missed")
TASKS = {
    "hellaswag": "HellaSwag",
    "piqa": "PIQA",
    "winogrande_debiased": "Winogrande (debiased)",
    "arc_easy": "ARC-Easy",
    "spelling": "spelling",
    "spelling_count": "spelling, count",
    "spelling_first_index": "spelling, first index",
    "spelling_character": "spelling, n-th character",
}
_SPLIT, _TASK = "(?:eval_|test_)?", f"({'|'.join(TASKS)})"
_ACCURACY, _SCORE = Measure("", "%", "higher", digits=2, scale=100.0), Measure("", "0 to 1", "higher", digits=3)
# Names with a part that files or tasks decide, and the measure, whose label takes that part. Tasks have no splits.
PATTERNS = {
    f"{_SPLIT}{_TASK}_acc_norm": replace(_ACCURACY, label="{}: normalised accuracy"),
    f"{_SPLIT}{_TASK}_acc": replace(_ACCURACY, label="{}: accuracy"),
    f"{_SPLIT}{_TASK}_gold_bits_per_byte": Measure("{}: bits per byte of the gold answer", "", "lower"),
    f"{_SPLIT}(blimp|pairs)_acc": replace(_ACCURACY, label="{}: mean accuracy", chance=0.5),
    rf"{_SPLIT}blimp_(\w+)_acc": replace(_ACCURACY, label="BLiMP, {}: accuracy", chance=0.5),
    rf"{_SPLIT}pairs_(\w+)_acc": replace(_ACCURACY, label="minimal pairs, {}: accuracy", chance=0.5),
    r"judge_(\w+)": replace(_SCORE, label="judge's score of {}"),
    r"second_judge_(\w+)": replace(_SCORE, label="held-out judge's score of {}"),
}
PARTS = TASKS | {"blimp": "BLiMP", "pairs": "minimal pairs of our own"}  # how such a part is written


def measure(name: str) -> Measure:
    """The measure called `name`, the split and the model named in the label: `test_ce_loss` is "test cross entropy".

    A task has no splits: `eval_piqa_acc` and `piqa_acc` are the same measure at different steps.
    """
    if name in MEASURES:
        return MEASURES[name]
    for pattern, found in PATTERNS.items():
        if match := re.fullmatch(pattern, name):
            return replace(found, label=found.label.format(PARTS.get(match[1], match[1].replace("_", " "))))
    for prefix, label in PREFIXES.items():
        if name.startswith(prefix):
            plain = measure(name.removeprefix(prefix))
            return replace(plain, label=label.format(plain.label))
    return Measure(name.replace("_", " "))


def is_of_the_machine(name: str) -> bool:
    """Whether the number called `name` is a time, a speed or a size in memory, which no two runs share."""
    return any(each in name for each in OF_THE_MACHINE)


def percent(value: float) -> str:
    """A signed percentage with two digits: 0.0123 is "+1.23 %"."""
    return f"{Measure('', digits=2, scale=100.0).difference(value)} %"


def p_text(p: float) -> str:
    """A p value as journals print it."""
    if not math.isfinite(p):
        return UNKNOWN
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _grouped(value: float, digits: int) -> str:
    """Fixed digits, thousands apart, a true minus sign, no minus before a rounded zero."""
    if not math.isfinite(value):
        return UNKNOWN
    text = f"{value:,.{digits}f}"
    if text.startswith("-"):
        text = text[1:] if float(text.replace(",", "")) == 0 else MINUS + text[1:]
    return text
