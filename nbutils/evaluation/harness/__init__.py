"""Tasks of EleutherAI's harness on a model in memory, a spelling probe of the tokenizer's own words, minimal pairs.

    result = evaluate_tasks(model, tokenizer, "hellaswag, piqa, spelling", tasks_folder="", items=500)
    result.numbers["piqa_acc"], result.items
    score_pairs(model, tokenizer, "embedded").numbers["pairs_acc"]

Nothing heavy is imported before an evaluation: `check_tasks` costs a plan's check nothing.
"""

from nbutils.evaluation.harness.evaluation import HarnessResult, append_items, evaluate_tasks
from nbutils.evaluation.harness.minimal_pairs import PAIRS_FILE, MinimalPairs, PairScores, check_pairs, score_pairs
from nbutils.evaluation.harness.settings import SPELLING, TASKS, check_tasks, number_names, task_names

__all__ = [
    "PAIRS_FILE",
    "SPELLING",
    "TASKS",
    "HarnessResult",
    "MinimalPairs",
    "PairScores",
    "append_items",
    "check_pairs",
    "check_tasks",
    "evaluate_tasks",
    "number_names",
    "score_pairs",
    "task_names",
]
