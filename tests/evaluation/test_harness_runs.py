"""The harness in a training, data sets of the Hub, and two models compared item by item."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
from harness_data import HUB, write_tasks
from local_hub import LocalHub
from prepared_hub import parquet_file

from nbutils.evaluation.harness import number_names
from nbutils.foundation.errors import ParameterError
from nbutils.report.studies.tasks import compare_items, items_interval

# ---- at intervals ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def train(folder: Path, tasks_folder: Path, steps: int, logs: list | None = None):
    """A model with dropout, trained for six steps; its weights."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

    from nbutils.data.tokenization import train_byte_level_bpe
    from nbutils.evaluation.harness.callback import HarnessEvaluation, HarnessSettings

    tokenizer = train_byte_level_bpe(["a few words for a tokenizer"], 270)
    set_seed(1)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": None, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=384, **sizes))
    ids = torch.randint(0, 256, (12, 8))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    settings = {"max_steps": 6, "per_device_train_batch_size": 2, "save_strategy": "no", "report_to": "none"}
    arguments = TrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, logging_strategy="no", **settings)
    trainer = Trainer(model, arguments, train_dataset=rows)
    log = (lambda numbers: logs.append((trainer.state.global_step, numbers))) if logs is not None else trainer.log
    tasks = HarnessSettings("piqa arc_easy", str(tasks_folder), items=2, steps=steps)
    callback = HarnessEvaluation(tasks, model, tokenizer, folder, log)
    trainer.add_callback(callback)
    trainer.train()
    return torch.cat([each.detach().flatten() for each in model.parameters()]), callback


def test_a_training_is_the_same_with_and_without_it(folder, tmp_path):
    import torch

    logs: list = []
    weights, callback = train(tmp_path, folder, 2, logs)
    (tmp_path / "other").mkdir()
    plain, other = train(tmp_path / "other", folder, 0, logs)
    assert torch.equal(weights, plain)
    assert [step for step, _ in logs] == [2, 4]  # of the last step the notebook asks
    assert callback.columns == [f"eval_{name}" for name in number_names("piqa, arc_easy")] and other.columns == []
    assert all(list(numbers) == callback.columns for _, numbers in logs)
    assert callback.seconds > 0 == other.seconds and not (tmp_path / "other" / "harness.parquet").exists()
    items = pandas.read_parquet(tmp_path / "harness.parquet")
    assert items["step"].tolist() == [2] * 4 + [4] * 4 and set(items["task"]) == {"piqa", "arc_easy"}
    train(tmp_path, folder, 4, logs)  # as a resumed run: step 4 is taken again
    assert pandas.read_parquet(tmp_path / "harness.parquet").equals(items)


# ---- from the Hub ----------------------------------------------------------------------------------------------------

SCRIPT = """
import json, os, sys
from nbutils.foundation.errors import CorpusError
from nbutils.evaluation.harness.items import check_reachable, splits
for task in ("piqa", "winogrande_debiased"):
    try:
        check_reachable([task])
        print(json.dumps(splits(task)["validation"].to_list()))
    except CorpusError as error:
        print(type(error).__name__, error)
sys.stdout.flush()
os._exit(0)  # threads of pyarrow and datasets abort a busy machine's interpreter now and then, once all is said
"""


def ask_hub(home: Path, endpoint: str) -> list[str]:
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    output = subprocess.check_output([sys.executable, "-c", SCRIPT], text=True, env=environment, timeout=100)
    return output.splitlines()


def winogrande_hub(ordinary: list[dict]) -> LocalHub:
    def columns(rows: list[dict]) -> bytes:
        return parquet_file(**{name: [row[name] for row in rows] for name in rows[0]})

    sets = {"winogrande_debiased": HUB["winogrande_debiased"]["validation"], "winogrande_xl": ordinary}
    configs = [
        {"config_name": name, "data_files": [{"split": "validation", "path": f"{name}/validation-*"}]} for name in sets
    ]
    files = {f"{name}/validation-0.parquet": columns(rows) for name, rows in sets.items()}
    card = f"---\nconfigs: {json.dumps(configs)}\n---\n".encode()
    piqa = {"data/validation-0.parquet": columns(HUB["piqa"]["validation"])}
    return LocalHub(
        {"baber/piqa": piqa, "allenai/winogrande": files | {"README.md": card}},
        cards={"allenai/winogrande": {"configs": configs}},
    )


def test_data_sets_of_the_hub(tmp_path):
    rows = HUB["winogrande_debiased"]["validation"]
    with winogrande_hub(list(reversed(rows))).serve() as endpoint:
        piqa, winogrande = ask_hub(tmp_path / "one", endpoint)
    assert json.loads(piqa) == HUB["piqa"]["validation"] and json.loads(winogrande) == rows
    assert ask_hub(tmp_path / "one", endpoint) == [piqa, winogrande]  # nobody answers there now: from the cache
    for line in ask_hub(tmp_path / "two", endpoint):
        assert line.startswith("UnreachableCorpusError The task data set") and "set tasks_folder" in line
    with winogrande_hub([rows[0], rows[1], rows[2] | {"answer": "2"}]).serve() as endpoint:
        piqa, refused = ask_hub(tmp_path / "three", endpoint)
    assert refused.startswith("CorpusError The validation items of winogrande_debiased (3) are not those")


# ---- in pairs --------------------------------------------------------------------------------------------------------


def items(correct: list[int], bits: list[float], sizes: list[int], step: int = 10, task: str = "piqa"):
    names = [f"item {place}" for place in range(len(correct))]
    right = [bool(each) for each in correct]
    columns = {"correct": right, "correct_norm": right[::-1], "gold_bits": bits, "gold_bytes": sizes}
    return pandas.DataFrame({"step": step, "task": task, "item": names, **columns})


def test_a_comparison_by_hand():
    treatment = items([1, 1, 1, 1, 0, 1], [10.0, 8.0, 6.0, 4.0, 9.0, 3.0], [4, 4, 2, 2, 4, 4])
    control = items([1, 0, 0, 0, 1, 0], [12.0, 8.0, 7.0, 4.0, 8.0, 5.0], [4, 4, 2, 2, 4, 4])
    row = compare_items(treatment, control).iloc[0]
    assert (row["task"], row["items"], row["left_out"]) == ("piqa", 6, 0)
    assert (row["only_treatment"], row["only_control"]) == (4, 1)
    assert row["accuracy_difference"] == pytest.approx(0.5)
    assert row["accuracy_p"] == pytest.approx(2 * (1 + 5) / 32)  # five coins, four or five on one side, or the other
    mean, variance = 3 / 8, (5 + 1) / 8 - (3 / 8) ** 2  # Agresti and Min: half an item more in each of four cells
    half = 1.959964 * np.sqrt(variance / 8)
    assert (row["accuracy_low"], row["accuracy_high"]) == pytest.approx((mean - half, mean + half))
    assert row["accuracy_norm_difference"] == pytest.approx(0.5)
    assert row["bits_per_byte_difference"] == pytest.approx((40 - 44) / 20)
    # sizes are the same on both sides: sum of d over sum of n, with d = -2, 0, -1, 0, 1, -2 and the ratio -0.2
    rest = np.array([-2, 0, -1, 0, 1, -2]) + 0.2 * np.array([4, 4, 2, 2, 4, 4])
    half = 2.5705818 * np.sqrt((rest**2).sum() / 5 / 6) / (20 / 6)
    assert row["bits_per_byte_high"] - row["bits_per_byte_difference"] == pytest.approx(half)


def test_the_interval_of_accuracies_holds_its_level_where_few_items_differ():
    """Two models that differ on 2 of 100 items, 200 items: with Student's half of the intervals have no width."""
    generator, inside = np.random.default_rng(3), []
    for _ in range(2000):
        low, high = items_interval(generator.choice([-1, 0, 1], 200, p=[0.005, 0.98, 0.015]))
        assert low < high
        inside.append(low <= 0.01 <= high)
    assert np.mean(inside) > 0.93


def test_the_bits_interval_is_that_of_a_bootstrap():
    generator = np.random.default_rng(0)
    sizes = generator.integers(3, 60, 400)
    first, second = (sizes * generator.normal(mean, 0.3, 400) for mean in (2.0, 2.05))
    right = generator.integers(0, 2, 400).tolist()
    row = compare_items(*(items(right, bits.tolist(), sizes.tolist()) for bits in (first, second))).iloc[0]
    drawn = generator.integers(0, 400, (4000, 400))
    ratios = (first - second)[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    assert (row["bits_per_byte_low"], row["bits_per_byte_high"]) == pytest.approx((low, high), abs=0.005)
    assert high - low > 0.05 and row["accuracy_difference"] == 0 and row["accuracy_p"] == 1


def test_the_last_step_of_items_that_both_have_is_compared():
    control = items([0, 0, 0], [1.0, 1.0, 1.0], [1, 1, 1])
    treatment = pandas.concat([items([0, 0], [9.0, 9.0], [1, 1], step=5), items([1, 1], [2.0, 2.0], [1, 1], step=20)])
    treatment = pandas.concat([treatment, treatment.tail(1)])  # an item that stands twice in its file
    compared = compare_items(treatment, control)
    row = compared.iloc[0]
    assert (row["items"], row["left_out"], row["accuracy_difference"], row["bits_per_byte_difference"]) == (2, 1, 1, 1)
    with pytest.raises(ParameterError, match="no item in common"):
        compare_items(treatment, items([1], [1.0], [1], task="hellaswag"))
