"""Objectives: what training minimises.

The chunked head turns hidden states into a weighted sum of terms. Each file of `terms` is one term: value,
gradient, textbook form, formula. `prefixes` has the soft targets over prefixes of a token's text.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "check": ["compare_with_textbook", "textbook_loss"],
        "chunk": ["Gradients"],
        "head": ["chunked_head", "term_values", "walk"],
        "measures": [
            "Accuracy",
            "Confidence",
            "CosineProxy",
            "Entropy",
            "TeacherAccuracy",
            "TeacherAgreement",
            "TeacherCrossEntropy",
            "UnigramCosine",
        ],
        "objective": [
            "Objective",
            "ObjectiveModel",
            "Teacher",
            "cosine_mixing",
            "distillation",
            "next_tokens",
            "smoothing",
        ],
        "prefixes.description": [
            "count_distribution",
            "describe",
            "effective_smoothing",
            "mean_target_entropy",
            "predicted_cost",
        ],
        "prefixes.inverse": ["Unsmoothing"],
        "prefixes.settings": [
            "BUT_WHITESPACE",
            "FORMS",
            "MIXED_FORMS",
            "NO_SMOOTHING",
            "PREFIXES",
            "RANDOM",
            "SOFTMAX_FORMS",
            "Smoothing",
            "UNIFORM",
            "check_smoothing",
            "equals_cross_entropy",
            "leaves_no_gold_mass",
        ],
        "prefixes.table": ["PrefixTable", "prefix_table"],
        "prefixes.targets": ["SmoothedTargets", "smoothed_targets"],
        "registry": ["objective_from"],
        "term": ["Term", "WeightedTerm"],
        "terms.cross_entropy": ["CrossEntropy"],
        "terms.distillation": ["Distillation", "relative_entropy"],
        "terms.sparse_target": ["PrefixMass", "SparseTargets"],
    },
)
