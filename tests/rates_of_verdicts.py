"""How often verdicts are wrong, by simulation with the report's own functions: the table of docs/verdicts.md.

python tests/rates_of_verdicts.py [studies]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats

from nbutils.report import judging
from nbutils.report.judging import Look, judge
from nbutils.report.statistics import minimum_detectable_effect


@dataclass(frozen=True)
class Claim:
    smallest_effect: float = 1.0
    primary: bool = True
    claim: str = "better"
    better: str = "higher"


def outcomes(studies: np.ndarray, sizes: Sequence[int], effect: float = 1.0) -> list[str]:
    """The outcome of each study (studies, pairs), looked at when each of `sizes` pairs, all registered, are in."""
    claim = Claim(effect)
    return [judge([(claim, [Look(size, tuple(own[:size])) for size in sizes])])[0].outcome for own in studies]


def share(found: Sequence[str], *wanted: str) -> float:
    return float(np.mean([each in wanted for each in found]))


def main(studies: int) -> None:
    draw = np.random.default_rng(0)
    held = judging.SUPPORTED, judging.TOO_SMALL
    for pairs in (2, 3, 5, 10):
        print(f"no effect, {pairs} pairs: {share(outcomes(draw.normal(0, 1, (studies, pairs)), [pairs]), *held):.3f}")
    for first, last in ((2, 5), (5, 20), (3, 30)):
        null = draw.normal(0, 1, (studies, last))
        print(
            f"no effect, a look at each of {first} to {last}: "
            f"{share(outcomes(null, range(first, last + 1)), *held):.3f}"
        )
    claims = [Claim(primary=number == 0) for number in range(6)]
    wrong = []
    for family in draw.normal(0, 1, (studies // 2, 6, 20)):
        looks = [[Look(size, tuple(own[:size])) for size in (5, 10, 20)] for own in family]
        wrong.append(any(each.outcome in held for each in judge(list(zip(claims, looks, strict=True)))))
    print(f"no effect, six contrasts, looks at 5, 10, 20: {np.mean(wrong):.3f}")
    for name, skewed in (
        ("lognormal", np.exp(0.5) - draw.lognormal(0, 1, (studies, 10))),
        (
            "collapses in 15 %",
            np.where(draw.random((studies, 10)) < 0.15, -10, 0) + draw.normal(1.5, 0.5, (studies, 10)),
        ),
    ):
        for pairs in (5, 10):
            print(f"no mean effect, {name}, {pairs} pairs: {share(outcomes(skewed, [pairs], 100.0), *held):.3f}")
    for pairs in (5, 10):
        found = outcomes(draw.normal(0.3, 0.15, (studies, pairs)), [pairs])
        told = ", ".join(f"{each} {share(found, each):.2f}" for each in judging.OUTCOMES[:4])
        print(f"three tenths of the smallest effect, {pairs} pairs: {told}")
    for pairs in (3, 5, 10):
        spreads = draw.normal(0, 1, (studies, pairs))
        effects = np.array([minimum_detectable_effect(own, judging.FIRST_LOOK) for own in spreads])
        again = draw.normal(effects[:, None], 1, (studies, pairs))
        p_values = scipy.stats.ttest_1samp(again, 0, axis=1).pvalue
        print(f"power at the printed minimum, {pairs} pairs: {np.mean(p_values < judging.FIRST_LOOK):.2f}")
    for spread in (0.3, 0.5):
        found = outcomes(draw.normal(0, spread, (studies, 5)), [5])
        print(f"no effect, spread {spread} of the smallest, 5 pairs: undecided {share(found, judging.UNDECIDED):.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3000)
