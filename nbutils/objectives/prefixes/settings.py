"""What a prefix smoothing may be asked for; without torch, so that a plan is checked before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nbutils.foundation import ParameterError, did_you_mean

NO_SMOOTHING = "none"  # cross entropy: the control
SOFTMAX_FORMS = ("normalised", "unnormalised")
MIXED_FORMS = ("mixed_uniform", "mixed_normalised", "mixed_unnormalised")
FORMS = (NO_SMOOTHING, *SOFTMAX_FORMS, *MIXED_FORMS)
PREFIXES = "prefixes"
BUT_WHITESPACE = "prefixes_but_whitespace"
UNIFORM = "uniform"
RANDOM = "random"
OVER = (PREFIXES, BUT_WHITESPACE, UNIFORM, RANDOM)
SAME_AS_CROSS_ENTROPY = 1e-4  # mass off the gold token up to which a target is taken for one-hot
TEXT_STANDS = 2  # times at most in a vocabulary: as a piece and as a byte token (SentencePiece)


@dataclass(frozen=True)
class Smoothing:
    """A soft target over the tokens whose text is a prefix of the gold token's.

    form: "none" is cross entropy. With k the bytes of a prefix, L those of the gold token: "normalised" is
    softmax(k / L / tau) and "unnormalised" softmax(k / tau), over the prefixes and the gold token itself; the mixed
    forms leave the gold token 1 - eps and spread eps over the proper prefixes: "mixed_uniform" evenly,
    "mixed_normalised" as softmax(k / L / tau), "mixed_unnormalised" as softmax(k / tau).

    over: "prefixes"; "prefixes_but_whitespace", tokens of whitespace alone left out; and two controls in which the
    gold token keeps the mass it has over prefixes: "uniform", the rest on all other tokens evenly, and "random", each
    proper prefix replaced by a random token of the same length that is none.

    A gold token without a proper prefix and special tokens stay one-hot in every form.
    """

    form: str = "normalised"
    tau: float = 0.2
    eps: float = 0.1
    over: str = PREFIXES

    def check(self) -> Smoothing:
        """Itself; raises ParameterError where a value cannot be."""
        check_smoothing(self.form, self.tau, self.eps, self.over)
        return self

    def told(self) -> str:
        """The parameters that this form uses, in words."""
        used = {"tau": self.tau} if self.form != "mixed_uniform" else {}
        used |= {"eps": self.eps} if self.form in MIXED_FORMS else {}
        over = f" over {self.over}" * (self.over != PREFIXES)
        return ", ".join([f"smoothing {self.form}{over}", *(f"{name} {value}" for name, value in used.items())])


def check_smoothing(form: str, tau: float, eps: float, over: str) -> None:
    """Raise ParameterError, naming the notebook's parameter, where a value cannot be, whether it is used or not."""
    for name, given, words in (("smoothing", form, FORMS), ("smoothed_over", over, OVER)):
        if given not in words:
            raise ParameterError(f"{name} is {given!r}. {did_you_mean(given, words)}")
    if not 0 < tau < math.inf:
        raise ParameterError(
            f"tau is {tau}; the lengths of prefixes are divided by it, so give a number above 0. For plain cross "
            "entropy set smoothing to none."
        )
    if not 0 <= eps <= 1:
        raise ParameterError(
            f"eps is {eps}; it is the share of the target that prefixes get, so give a number from 0 to 1."
        )


def equals_cross_entropy(smoothing: Smoothing) -> bool:
    """Whether for every token of every vocabulary the mass off the gold token is at most SAME_AS_CROSS_ENTROPY.

    Such a target is cross entropy under another name: what its runs differ by is the noise floor (an A/A pair).
    A proper prefix is at least a byte shorter, so the unnormalised softmax leaves off the gold token at most
    exp(-1/tau), twice that where each text stands twice in the vocabulary. The normalised one has no such bound: the
    longer the gold token, the nearer its prefixes.
    """
    if smoothing.form == "unnormalised":
        return TEXT_STANDS * math.exp(-1 / smoothing.tau) <= SAME_AS_CROSS_ENTROPY
    if smoothing.form in MIXED_FORMS:
        return smoothing.eps <= SAME_AS_CROSS_ENTROPY
    return smoothing.form == NO_SMOOTHING


def leaves_no_gold_mass(smoothing: Smoothing) -> bool:
    """Whether gold tokens with a proper prefix get no mass at all; then un-smoothing is impossible."""
    return smoothing.form in MIXED_FORMS and smoothing.eps == 1
