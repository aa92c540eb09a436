"""Small interactions for tests: a judge whose taste is known, teachers, configurations that run in a second."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nbutils.data.batches import collate
from nbutils.data.preparation import load_data
from nbutils.interaction import training
from nbutils.interaction.correctors import Corrections
from nbutils.interaction.examples import RoundRows
from nbutils.interaction.judges import Judged, JudgeLimits
from nbutils.interaction.replies import Budget
from nbutils.interaction.rounds import read_rounds
from nbutils.interaction.settings import DISTILL, Interaction
from nbutils.interaction.training import InteractionConfig, train_interactively
from nbutils.models.loading import load_model
from nbutils.runs.metric_labels import is_of_the_machine

WANTED = "abcdefghi"  # some 0.18 of what random weights say in the data of kill_many.write_data
SHARP = 3.0  # random weights times this differ from one context to the next


class ToyJudge:
    """Scores the share of characters that are wanted; of the text (call, index), both from 0, `fails` says whether not.

    `asked` is (prompts, completions) of each call.
    """

    aspects = ("wanted",)

    def __init__(self, wanted: str = WANTED, fails: Callable[[int, int], bool] = lambda call, index: False) -> None:
        self.name, self.wanted, self.fails = "toy", set(wanted), fails
        self.budget = Budget(JudgeLimits(), "The toy judge")
        self.asked: list[tuple[list[str], list[str]]] = []

    def score(self, prompts: Sequence[str], completions: Sequence[str]) -> Judged:
        call = len(self.asked)
        self.asked.append((list(prompts), list(completions)))
        ok = np.array([not self.fails(call, index) for index in range(len(completions))])
        scores = np.array([share(text, self.wanted) for text in completions])
        scores[~ok] = np.nan
        self.budget.words += len(scores)
        return Judged(scores, ok, tuple("said" for _ in scores), {"wanted": scores}, len(scores))


class ToyTeacher:
    """Writes `text`, whatever it is asked, and ends it or is cut off; has nothing to say where `fails`."""

    name = "toy"

    def __init__(
        self, text: str, fails: Callable[[int, int], bool] = lambda call, index: False, ended: bool = True
    ) -> None:
        self.text, self.fails, self.ended = text, fails, ended
        self.budget = Budget(JudgeLimits(), "The toy teacher")
        self.calls = 0

    def correct(self, prompts, completions, references, round, max_tokens=0) -> Corrections:
        ok = np.array([not self.fails(self.calls, index) for index in range(len(prompts))])
        self.calls += 1
        texts = tuple(self.text if each else "" for each in ok)
        return Corrections(texts, ok, ok & self.ended, texts, sum(len(text.split()) for text in texts))


def share(text: str, wanted: set[str]) -> float:
    """Of the characters of `text`, those that are wanted."""
    return sum(character in wanted for character in text) / len(text) if text else 0.0


def settings(method: str, **changes: object) -> Interaction:
    """Two rounds of six prompts, three samples of each where the method has several; checked."""
    several = 3 if method in ("simpo_judge", "ppo", "rloo") else 1
    given = {"rounds": 2, "prompts_per_round": 6, "samples_per_prompt": several, "top_p": 1.0}
    given |= {"prompt_tokens": 5, "response_tokens": 8} | ({"passes": 1} if method == "rloo" else {})
    made = Interaction(**{"method": method, **given, **changes})
    made.check()
    return made


def configuration(data: Path, run: Path, interaction: Interaction, **changes: object) -> InteractionConfig:
    """A run of a micro model, in a folder that is made; one evaluation at the end. A teacher where it is distilled."""
    run.mkdir(parents=True, exist_ok=True)
    config = InteractionConfig(
        data_folder=data,
        run_folder=run,
        interaction=interaction,
        model_name="micro",
        dropout=0.0,
        learning_rate=1e-3,
        lr_scheduler_type="constant_with_warmup",
        weight_decay=0.0,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=64,
        eval_steps=10_000,
        distilling_teacher=saved_teacher(data) if interaction.method == DISTILL else "",
    )
    return replace(config, **changes)


def trained(config: InteractionConfig, judge: ToyJudge | None = None, teacher: ToyTeacher | None = None) -> dict:
    """The numbers of a run with that judge and teacher in the place of those it names."""
    with pytest.MonkeyPatch.context() as patch:
        if judge is not None:
            patch.setattr(training, "make_judge", lambda *given, **named: judge)
        if teacher is not None:
            patch.setattr(training, "make_corrector", lambda *given, **named: teacher)
        return train_interactively(config)


def rounds_of(run: Path, *names: str) -> list[tuple[float, ...]]:
    """These columns of rounds.csv, a tuple for each round."""
    return [tuple(float(row[name]) for name in names) for row in read_rounds(run)]


def metrics_of(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv that tell of steps."""
    with (run / "metrics.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["loss"]]


def left_behind(run: Path) -> dict[str, object]:
    """All that a run ends with and that does not hang on the clock."""
    tables = {}
    for name in ("metrics.csv", "rounds.csv"):
        with (run / name).open(newline="") as file:
            rows = [{n: v for n, v in row.items() if not is_of_the_machine(n)} for row in csv.DictReader(file)]
        tables[name] = rows
    samples = run / "round_samples.jsonl"
    weights = {name: (run / name / "model.safetensors").read_bytes() for name in ("model", "model_best")}
    return {**weights, **tables, "samples": samples.read_text() if samples.exists() else ""}


def student(data, name="micro", positions=32, sharp=SHARP):
    """A small model whose predictions hang on what it read."""
    torch.manual_seed(3)
    model = load_model(name, data.tokenizer, positions, from_scratch=True, dropout=0.0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(sharp)
    return model


def saved_teacher(data: Path) -> str:
    """The folder of a model of another kind that knows the tokens of `data` and has opinions; written once."""
    folder = data.parent / "teacher"
    if not folder.is_dir():
        student(load_data(data), "llama3-micro", positions=16).save_pretrained(folder)
    return str(folder)


def ending_soon(model, data, factor=4.0):
    """The same model; its end token is likely."""
    end = data.tokenizer.eos_token_id
    with torch.no_grad():
        model.get_output_embeddings().weight[end] *= factor
    return model


def prompts_of(data, lengths):
    """Beginnings of training blocks behind an end token."""
    blocks = data.blocks["train"].with_format("numpy")
    tokens = [np.asarray(blocks[i]["input_ids"][:length], np.int64) for i, length in enumerate(lengths)]
    return [np.insert(each, 0, data.tokenizer.eos_token_id) for each in tokens]


def fused(policy, *batches):
    """The loss of micro-batches of examples, added up as the trainer does it."""
    batches = [collate(each) for each in batches]
    units = [policy.units(each) for each in batches]
    counts = {name: sum(each[name] for each in units) for name in units[0]}
    return sum(policy(counts=counts, **each)["loss"] for each in batches)


def gradients(policy, loss):
    parameters = dict(policy.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, found, strict=True))


def same_gradients(found, wanted, **tolerance):
    for name, each in wanted.items():
        torch.testing.assert_close(found[name], each, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def empty_row(method, width=np.float64):
    """A row that holds nothing, as a round that is short has them."""
    row = RoundRows(settings(method), SimpleNamespace())[0]
    return {name: value.astype(width) if value.dtype == np.float32 else value for name, value in row.items()}
