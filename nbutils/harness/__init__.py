"""Tasks of EleutherAI's harness on a model in memory, and a spelling probe of the tokenizer's own words.

    result = evaluate_tasks(model, tokenizer, "hellaswag, piqa, spelling", tasks_folder="", items=500)
    result.numbers["piqa_acc"], result.items

Nothing heavy is imported before an evaluation: `check_tasks` costs a plan's check nothing.
"""

from nbutils.harness.comparison import compare_items
from nbutils.harness.evaluation import HarnessResult, append_items, evaluate_tasks
from nbutils.harness.settings import SPELLING, TASKS, check_tasks, number_names, task_names

__all__ = [
    "SPELLING",
    "TASKS",
    "HarnessResult",
    "append_items",
    "check_tasks",
    "compare_items",
    "evaluate_tasks",
    "number_names",
    "task_names",
]
