"""Tasks of the harness: the same requests as its own, scores against a direct computation, nothing disturbed."""

from __future__ import annotations

import copy
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
import yaml
from harness_data import HUB, prompts, write_rows, write_tasks
from real_data import REAL_DATA, needs_real_data

from nbutils.data.tokenization import train_byte_level_bpe
from nbutils.evaluation.harness import append_items, check_tasks, evaluate_tasks, number_names, task_names
from nbutils.evaluation.harness.items import check_debiased, splits, spread
from nbutils.evaluation.harness.settings import TASKS, read_rows
from nbutils.foundation.errors import CorpusError, ParameterError

FOUR = list(TASKS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def tokenizer():
    texts = [text for task in FOUR for pairs, _ in prompts(task) for pair in pairs for text in pair]
    return train_byte_level_bpe(texts, 400)


@pytest.fixture(scope="module")
def model(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, initializer_range=0.3, **sizes)
    return LlamaForCausalLM(config)


def direct(model, tokenizer, task: str, start: list[int] | None = None) -> list[tuple[float, bool, bool, int]]:
    """(bits of the gold answer, right, right for each character, bytes) of each item, in float64."""
    exact = copy.deepcopy(model).double().eval()
    found = []
    for pairs, gold in prompts(task):
        scores = []
        for prompt, answer in pairs:
            special = {"add_special_tokens": start is None}
            ids = (start or []) + tokenizer.encode(prompt + answer, **special)
            begin = len((start or []) + tokenizer.encode(prompt, **special))
            with torch.no_grad():
                logits = exact(torch.tensor([ids])).logits[0]
            steps = logits.log_softmax(-1)[torch.arange(begin - 1, len(ids) - 1), torch.tensor(ids[begin:])]
            scores.append(float(steps.sum()))
        by_length = [score / len(answer[1:]) for score, (_, answer) in zip(scores, pairs, strict=True)]
        right = [max(range(len(each)), key=each.__getitem__) == gold for each in (scores, by_length)]
        found.append((-scores[gold] / math.log(2), *right, len(pairs[gold][1].encode())))
    return found


@pytest.mark.parametrize("task", FOUR)
def test_scores_are_those_of_a_direct_computation(model, tokenizer, folder, task):
    result = evaluate_tasks(model, tokenizer, task, tasks_folder=str(folder), step=7)
    expected = direct(model, tokenizer, task)
    items = result.items
    assert items["gold_bits"].tolist() == pytest.approx([bits for bits, *_ in expected], rel=1e-5)
    assert items["correct"].tolist() == [right for _, right, *_ in expected]
    assert items["correct_norm"].tolist() == [right for *_, right, _ in expected]
    assert items["gold_bytes"].tolist() == [size for *_, size in expected]
    assert (items["step"] == 7).all() and items["item"].is_unique
    bits, size = (sum(each[place] for each in expected) for place in (0, 3))
    assert result.numbers == pytest.approx(
        {
            f"{task}_acc": np.mean([right for _, right, *_ in expected]),
            f"{task}_acc_norm": np.mean([right for *_, right, _ in expected]),
            f"{task}_gold_bits_per_byte": bits / size,
        },
        rel=1e-5,
    )
    assert list(result.numbers) == number_names(task)


def test_a_prompt_starts_with_what_documents_started_with(model, tokenizer, folder):
    start = [tokenizer.eos_token_id]
    result = evaluate_tasks(model, tokenizer, "piqa", tasks_folder=str(folder), prompt_start=start)
    expected = [bits for bits, *_ in direct(model, tokenizer, "piqa", start)]
    assert result.items["gold_bits"].tolist() == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx([bits for bits, *_ in direct(model, tokenizer, "piqa")], rel=1e-3)


def stock_task(task: str, folder: Path, few_shot: int):
    """The harness's own task, its data set alone replaced by rows with the Hub's columns."""
    import lm_eval.tasks

    name = "winogrande" if task == "winogrande_debiased" else task
    own = Path(lm_eval.tasks.__file__).parent / {"winogrande": "winogrande/default.yaml"}.get(
        name, TASKS[task].task_file
    )
    given = {split: str(write_rows(folder / name / f"{split}.jsonl", rows)) for split, rows in HUB[task].items()}
    content = {
        "include": str(own),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": given, "cache_dir": str(folder / "cache")},
        "num_fewshot": few_shot,
        **({} if "train" in given else {"training_split": None}),
        **({"validation_split": None} if task == "arc_easy" else {}),
    }
    (folder / "files").mkdir(exist_ok=True)
    (folder / "files" / f"{name}.yaml").write_text(yaml.safe_dump(content))
    manager = lm_eval.tasks.TaskManager(include_path=str(folder / "files"), include_defaults=False)
    return manager.load([name])["tasks"][name]


def requests(task) -> list[tuple[tuple[str, str], int]]:
    task.set_fewshot_seed(3)
    task.build_all_requests()
    return [(each.args, each.idx) for each in task.instances]


@pytest.mark.parametrize(("task", "few_shot"), [(task, 0) for task in FOUR] + [("arc_easy", 2)])
def test_requests_are_those_of_the_harness_s_own_task(tokenizer, folder, tmp_path, task, few_shot):
    from nbutils.evaluation.harness.loading import load_tasks

    ours = load_tasks([task], tokenizer, str(folder), few_shot, seed=3)[task]
    own = stock_task(task, tmp_path, few_shot)
    assert requests(ours) == requests(own)
    assert [(each["metric"]) for each in ours.config.metric_list] == [each["metric"] for each in own.config.metric_list]
    if not few_shot:
        written = [(pair, place) for pairs, _ in prompts(task) for place, pair in enumerate(pairs)]
        assert requests(ours) == written


def test_an_item_is_no_example_of_its_own(tokenizer, folder):
    from nbutils.evaluation.harness.loading import load_tasks

    task = load_tasks(["piqa"], tokenizer, str(folder), few_shot=2)["piqa"]
    for (prompt, _), _ in requests(task):
        assert all(prompt.count(row["goal"]) == 1 for row in HUB["piqa"]["validation"])


def test_reading_tasks_says_nothing(tokenizer, folder, capfd, caplog):
    from nbutils.evaluation.harness.loading import load_tasks

    load_tasks(["piqa"], tokenizer, str(folder))
    assert not caplog.records and capfd.readouterr() == ("", "")


def test_nothing_is_disturbed(model, tokenizer, folder, tmp_path, monkeypatch, capfd, caplog):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    model.train()
    model.model.layers[0].eval()  # a part that is kept fixed
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = None
    modes = [module.training for module in model.modules()]
    parameters = [(name, id(each), each.detach().clone()) for name, each in model.named_parameters()]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first = evaluate_tasks(model, tokenizer, FOUR, tasks_folder=str(folder))
    again = evaluate_tasks(model, tokenizer, FOUR, tasks_folder=str(folder))
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert [module.training for module in model.modules()] == modes
    for (name, identity, before), (_, after) in zip(parameters, model.named_parameters(), strict=True):
        assert identity == id(after) and torch.equal(before, after), name
    assert tokenizer.pad_token is None
    assert first.numbers == again.numbers and first.items.equals(again.items)
    assert not (tmp_path / "cache").exists()
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_answers_that_the_model_has_no_positions_for_are_left_out(model, tokenizer, folder, tmp_path, caplog):
    short = copy.deepcopy(model)
    short.config.max_position_embeddings = 20
    result = evaluate_tasks(short, tokenizer, "winogrande_debiased", tasks_folder=str(folder))
    assert result.skipped == {"winogrande_debiased": 0} and "4 prompts begin later than they should" in caplog.text
    long = [{"goal": "x", "sol1": "12 34 56 78 90 " * 9, "sol2": "2", "label": 1}, *HUB["piqa"]["validation"][1:]]
    write_rows(tmp_path / "piqa" / "validation.jsonl", long)
    short.config.max_position_embeddings = 40
    result = evaluate_tasks(short, tokenizer, "piqa", tasks_folder=str(tmp_path))
    assert result.skipped == {"piqa": 1} and len(result.items) == 2 and "1 of 3 items of piqa do not fit" in caplog.text
    write_rows(tmp_path / "piqa" / "validation.jsonl", long[:1])
    with pytest.raises(ParameterError, match=r"No item of piqa fits the model's 40 positions.*Take piqa out"):
        evaluate_tasks(short, tokenizer, "piqa", tasks_folder=str(tmp_path))


def test_items_are_spread_over_the_file(folder):
    assert spread(10, 4) == [0, 2, 5, 7] and spread(3, 0) == spread(3, 9) == [0, 1, 2]
    found = splits("hellaswag", str(folder), items=2)["validation"]
    assert found["activity_label"][:] == ["Roof shingle removal", "Sharpening knives"]


def test_no_tasks_no_evaluation():
    result = evaluate_tasks(None, None, "")
    assert result.numbers == {} and result.items.empty and task_names(" ,") == []
    check_tasks("", "no/such/folder")


def test_items_of_a_step_are_replaced(tmp_path):
    def rows(step: int, *bits: float) -> pandas.DataFrame:
        return pandas.DataFrame({"step": step, "item": list(map(str, range(len(bits)))), "gold_bits": bits})

    path = tmp_path / "harness.parquet"
    append_items(path, rows(1))
    assert not path.exists()
    for items in (rows(2, 1.0, 2.0), rows(4, 3.0), rows(2, 5.0, 6.0)):
        append_items(path, items)
    found = pandas.read_parquet(path)
    assert found["step"].tolist() == [2, 2, 4] and found["gold_bits"].tolist() == [5.0, 6.0, 3.0]


def test_a_check_imports_nothing_heavy(folder):
    heavy = "'torch', 'transformers', 'lm_eval', 'datasets', 'pandas'"
    script = (
        "import sys; from nbutils.evaluation.harness import check_tasks\n"
        f"check_tasks('hellaswag piqa winogrande_debiased arc_easy spelling', {str(folder)!r}, 2, 9)\n"
        f"print({{{heavy}}} & sys.modules.keys())"
    )
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "set()"


@pytest.mark.parametrize(
    ("tasks", "change", "few_shot", "message"),
    [
        ("hellaswagg", "", 0, "tasks names 'hellaswagg'. Did you mean 'hellaswag'"),
        ("piqa", "missing", 0, "tasks_folder: there is no folder .*missing.*from the Hub"),
        ("piqa", "rm piqa", 0, "has no folder 'piqa', which holds the items of piqa.*take piqa out of tasks"),
        ("arc_easy", "rm arc_easy/test.jsonl", 0, "has no test items of arc_easy: none of test.jsonl, test.parquet"),
        ("piqa", "", 3, "few_shot is 3, but .*valid.jsonl has 2 examples for piqa, the item itself left out"),
        ("arc_easy", "", 4, "few_shot is 4, but .*train.jsonl has 3 examples"),
        ("spelling", "", 25, "few_shot is 25, but the probe has 24 examples for spelling_count"),
        ("piqa", "", -1, "few_shot is -1 and items is 0. Neither can be negative"),
    ],
)
def test_mistakes_are_told_before_anything_starts(tmp_path, tasks, change, few_shot, message):
    folder = write_tasks(tmp_path)
    if change.startswith("rm "):
        gone = folder / change.removeprefix("rm ")
        gone.rename(tmp_path / "elsewhere")
    elif change:
        folder = tmp_path / change
    with pytest.raises(ParameterError, match=message):
        check_tasks(tasks, str(folder), few_shot)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("piqa/valid-labels.lst", "1\n", "has 1 answers for 3 items. Fetch both again"),
        ("piqa/valid.jsonl", '{"goal": "x"\n', r"valid.jsonl, line 1: not JSON .*Fetch it again"),
        (
            "hellaswag/hellaswag_val.jsonl",
            '{"ctx": "A b."}\n',
            "item 1: activity_label, endings, label is missing among",
        ),
        ("winogrande/validation.jsonl", "\n", "holds no item"),
        ("arc_easy/test.jsonl", '{"query": "x"}\n', "question, choices, answerKey is missing among query. The columns"),
    ],
)
def test_damaged_files_are_named(tmp_path, file, content, message):
    (write_tasks(tmp_path) / file).write_text(content)
    task = next(task for task, source in TASKS.items() if source.folder == file.split("/")[0])
    with pytest.raises(ParameterError, match=message):
        splits(task, str(tmp_path))


def test_the_debiased_set_has_the_ordinary_validation_items(tmp_path):
    rows = HUB["winogrande_debiased"]["validation"]
    check_debiased(rows, list(reversed(rows)))
    with pytest.raises(CorpusError, match=r"not those of the ordinary set \(3; 2 in common\)"):
        check_debiased(rows[:2], rows)
    folder = write_tasks(tmp_path)
    write_rows(folder / "winogrande_debiased" / "validation.jsonl", [*rows[:2], rows[2] | {"answer": "2"}])
    with pytest.raises(CorpusError, match="Use files of one release"):
        splits("winogrande_debiased", str(folder))


@needs_real_data
def test_real_files_give_the_harness_s_prompts():
    from lm_eval.tasks.hellaswag.utils import process_docs

    folder = Path(REAL_DATA, "tasks")
    counts = {task: len(splits(task, str(folder))[TASKS[task].evaluated]) for task in FOUR}
    assert counts == {"hellaswag": 10042, "piqa": 1838, "winogrande_debiased": 1267, "arc_easy": 2376}
    asked = process_docs(splits("hellaswag", str(folder))["validation"])
    published = read_rows(folder / "hellaswag" / "hellaswag_val.jsonl")
    other = [(ours, row["query"]) for ours, row in zip(asked["query"], published, strict=True) if ours != row["query"]]
    # the harness writes the sentence begun with a capital, and takes out what stands in brackets
    assert sum(ours.lower() != query.lower() for ours, query in other) == 2
    assert len(other) > 3200 and asked[0]["query"] == "Roof shingle removal: A man is sitting on a roof. He"


@needs_real_data
@pytest.mark.soak
def test_a_real_model_runs_all_four():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = Path(REAL_DATA, "models", "stories260k_llama")
    tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name)
    folder = str(Path(REAL_DATA, "tasks"))
    result = evaluate_tasks(model, tokenizer, FOUR, tasks_folder=folder, items=24)
    assert result.items.groupby("task").size().to_dict() == dict.fromkeys(FOUR, 24)
    for task in FOUR:
        assert 2 < result.numbers[f"{task}_gold_bits_per_byte"] < 4  # it knows English words, and little else
    first = read_rows(Path(folder, "winogrande", "validation.jsonl"))[0]
    blank = first["sentence"].index("_")
    prompt, answer = first["sentence"][:blank] + first["option2"], " " + first["sentence"][blank + 1 :].strip()
    ids, begin = tokenizer.encode(prompt + answer), len(tokenizer.encode(prompt))
    assert ids[0] == tokenizer.bos_token_id and first["answer"] == "2"
    with torch.no_grad():
        steps = model.double()(torch.tensor([ids])).logits[0].log_softmax(-1)
    bits = -sum(float(steps[place - 1, ids[place]]) for place in range(begin, len(ids))) / math.log(2)
    found = result.items[result.items["task"] == "winogrande_debiased"].iloc[0]
    assert found["gold_bits"] == pytest.approx(bits, rel=1e-5) and found["gold_bytes"] == len(answer)
