"""Prefix smoothing: soft targets over the tokens whose text is a prefix of the gold token's.

table = prefix_table(tokenizer, vocab)                     # built from token bytes, or read where it was built before
targets = smoothed_targets(table, Smoothing("normalised", tau=0.2))
effective_smoothing(targets, counts)                       # 1 - mean gold mass: the x axis of a study
Unsmoothing(targets, table.lengths).invert(p)  # what the model says of the text, smoothing taken out
"""

from nbutils.objectives.prefixes.description import (
    count_distribution,
    describe,
    effective_smoothing,
    mean_target_entropy,
    predicted_cost,
)
from nbutils.objectives.prefixes.inverse import Unsmoothed, Unsmoothing
from nbutils.objectives.prefixes.settings import Smoothing, check_smoothing, equals_cross_entropy, leaves_no_gold_mass
from nbutils.objectives.prefixes.table import PrefixTable, prefix_table
from nbutils.objectives.prefixes.targets import SmoothedTargets, smoothed_targets

__all__ = [
    "PrefixTable",
    "SmoothedTargets",
    "Smoothing",
    "Unsmoothed",
    "Unsmoothing",
    "check_smoothing",
    "count_distribution",
    "describe",
    "effective_smoothing",
    "equals_cross_entropy",
    "leaves_no_gold_mass",
    "mean_target_entropy",
    "predicted_cost",
    "prefix_table",
    "smoothed_targets",
]
