"""Was the training stable, and did it do what any training must? Read off metrics.csv, the same for every variant."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

SPIKE = 5.0  # times the running median of the gradient norm, as the cosine study defines an unstable step
RISE = 0.5  # nats that cross entropy may rise above its lowest value so far
EARLY = 0.2  # of the steps
MEDIAN_STEPS = 50  # that the running median looks back over, the present one not among them
FLOORS = ("unigram", "bigram", "trigram")
WARM_STEPS = 5  # before a median says anything


def stability(metrics: pd.DataFrame) -> dict[str, float]:
    """gradient_spikes, early_gradient_peak, early_ce_rise (nats), unstable_early (0 or 1), diverged (0 or 1).

    early_gradient_peak is the largest gradient norm over its running median in the first 20 % of the steps; a run is
    unstable early where that exceeds 5 or cross entropy rises by more than 0.5. early_ce_rise is NaN where the
    objective has no cross entropy term.
    """
    steps = metrics.dropna(subset="loss")
    norms = steps["grad_norm"]
    median = norms.shift().rolling(MEDIAN_STEPS, min_periods=WARM_STEPS).median()
    ratios = norms / median
    early = steps["step"] <= EARLY * steps["step"].max()
    peak = ratios[early].max()
    losses = steps.loc[early, "ce_loss"].dropna() if "ce_loss" in steps else pd.Series(dtype=float)
    rise = float((losses - losses.cummin()).max()) if len(losses) else math.nan
    diverged = not np.isfinite(steps["loss"].to_numpy(float)).all() or not np.isfinite(norms.to_numpy(float)).all()
    return {
        "gradient_spikes": int((ratios > SPIKE).sum()),
        "early_gradient_peak": float(peak),
        "early_ce_rise": rise,
        "unstable_early": int(diverged or peak > SPIKE or rise > RISE),
        "diverged": int(diverged),
    }


def functional_check(
    metrics: pd.DataFrame, numbers: Mapping[str, float], samples: Sequence[Mapping[str, Any]]
) -> dict[str, bool]:
    """What must hold of a run before its numbers are worth comparing: {sentence: whether it does}.

    Losses are compared between the first and the last tenth of the steps, cross entropy between the first and the last
    evaluation, and with the models of counts (`nbutils.evaluation.floors`) that `numbers`, the run's metrics, have.
    `samples` have a completion each.
    """
    losses = metrics["loss"].dropna()
    tenth = max(1, len(losses) // 10)
    evaluations = metrics["eval_ce_loss"].dropna()
    completions = [sample["completion"].strip() for sample in samples]
    return {
        "the objective falls": bool(losses.iloc[-tenth:].mean() < losses.iloc[:tenth].mean()),
        "validation cross entropy falls": bool(evaluations.iloc[-1] < evaluations.iloc[0]),
        **{
            f"it ends below a {name} model of as many tokens": bool(numbers["eval_ce_loss"] < level)
            for name in FLOORS
            if (level := numbers.get(f"{name}_eval_ce_loss")) is not None
        },
        "all metrics are numbers": all(math.isfinite(value) for value in numbers.values()),
        "samples are text, each its own": bool(completions)
        and all(completions)
        and len({*completions}) == len(completions),
    }
