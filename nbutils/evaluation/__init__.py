"""Evaluation: what a trained model is judged on.

Perplexity from sums per document, un-smoothing, samples, answers to questions, and tasks of lm-eval.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "answer_measures": ["compare_answers"],
        "count_models": ["beside_floors", "floors"],
        "generation": ["continued", "sample_continuations", "seeded"],
        "harness.callback": ["HarnessEvaluation", "HarnessSettings"],
        "harness.evaluation": ["append_items"],
        "harness.items": ["check_reachable"],
        "harness.minimal_pairs": ["MinimalPairs", "PAIRS_FILE", "check_pairs"],
        "harness.settings": ["SPELLING", "TASKS", "check_tasks", "number_names", "task_names"],
        "perplexity": ["PROXIES", "combine", "evaluate", "evaluate_run"],
        "prefix_study": [
            "evaluate_unsmoothed",
            "mass_at_word_starts",
            "predicted_costs",
            "smoothing_facts",
            "smoothing_sweep",
            "token_counts",
            "unsmoothed_samples",
            "unsmoothing_of",
        ],
        "question_answering": ["Generation", "answer_questions", "answers_of_run", "left_padded"],
        "sample_measures": ["distinct", "measure_samples", "repetition"],
    },
)
