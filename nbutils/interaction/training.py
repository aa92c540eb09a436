"""Training with a judge or a teacher: rounds of samples on the trainer, checkpoints and metrics of everything else.

    numbers = launch(train_interactively, InteractionConfig(...), processes=1)

An epoch is a round: at its start the first process makes the examples and keeps them in a file, and all train on them.
A run that was killed in between draws the same samples again, for they follow from the seed, the round and the weights;
one that was killed in a round goes on with that round's examples, which belong to its checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging as logging_of_transformers

from nbutils.data import PreparedData, load_data
from nbutils.foundation import noted, resolve
from nbutils.interaction.correction import make_corrector
from nbutils.interaction.distilling import distilling_teacher
from nbutils.interaction.examples import ROUND_FILE, RoundOrder, RoundRows
from nbutils.interaction.judges import RULE, Judge, JudgeLimits, known_words_of, make_judge
from nbutils.interaction.policy import CROSS_ENTROPY, LOSSES, MEANS, PolicyModel
from nbutils.interaction.replies import Budget
from nbutils.interaction.rollouts import story_prompt
from nbutils.interaction.rounds import ROUNDS, SAMPLES, WORDS, RoundMaker, read_rounds
from nbutils.interaction.settings import NO_JUDGE, ON_POLICY, STORY, Interaction
from nbutils.models import load_model, saved_model
from nbutils.objectives import Objective, smoothing
from nbutils.training import (
    CHECKPOINTS,
    ObjectiveTrainer,
    TrainingConfig,
    make_deterministic,
    memory_mib,
    plain_rows,
    reset_peak_memory,
)

MOST_BLOCKS = 5_000  # of the training text, that a judge of rules learns words from
JUDGE_CACHE = f"{CHECKPOINTS}/judge_cache"  # in the run's folder: what outlives it where the run is tried again


@dataclass(frozen=True)
class InteractionConfig(TrainingConfig):
    """What an interaction is; the names are those of the notebook's parameters."""

    objective: Objective = field(default_factory=lambda: smoothing(None))  # evaluated by cross entropy
    start_model: str = ""  # a run, a model folder or a Hub name; empty: model_name with random weights
    interaction: Interaction = field(default_factory=Interaction)
    judge: str = "rule"
    rubric: str = "weekly"
    correcting_teacher: str = "human"
    distilling_teacher: str = ""  # a run, a model folder or a Hub name
    judge_limits: JudgeLimits = field(default_factory=JudgeLimits)


def train_interactively(config: InteractionConfig) -> dict[str, float]:
    """Train one variant with its judge or teacher; resumes, saves and returns as `nbutils.training.trainer.train` does.

    Over all rounds: human_words, student_words, teacher_words; where a judge was asked, judge_failure_rate, the share
    of those texts that it gave no score, in [0, 1].
    """
    logging_of_transformers.disable_progress_bar()
    reset_peak_memory()
    config = replace(config, num_train_epochs=config.interaction.rounds, max_steps=0, audit_blocks=0)
    data = load_data(config.data_folder)
    make_deterministic(config.deterministic)
    set_seed(config.seed)
    teacher = distilling_teacher(
        config.interaction, config.distilling_teacher, data.tokenizer, plain_rows(data)["train"]
    )
    policy = PolicyModel(starting_model(config, data), config.interaction, teacher=teacher)
    check_lengths(config.interaction, policy, data)
    trainer = InteractionTrainer(config, policy, data)
    with noted() as trainer.checkpointing.stop:
        trainer.train(resume_from_checkpoint=trainer.checkpointing.find())
    policy.release_teacher()
    seconds = trainer.training_seconds
    if trainer.is_world_process_zero():
        policy.model.save_pretrained(config.run_folder / "model")
        data.tokenizer.save_pretrained(config.run_folder / "model")
        (config.run_folder / ROUND_FILE).unlink(missing_ok=True)
    rows = read_rounds(config.run_folder)
    scored, failed = (sum(float(row[name]) for row in rows if row[name] != "nan") for name in ("scored", "failures"))
    failures = {"judge_failure_rate": failed / (scored + failed)} if scored + failed else {}
    return {
        "parameters": sum(parameter.numel() for parameter in policy.model.parameters()),
        "steps": trainer.state.global_step,
        "tokens_seen": trainer.tokens_seen,
        "train_seconds": seconds,
        "tokens_per_second": trainer.tokens_seen / seconds,
        "peak_memory_mib": memory_mib(),
        **{name: int(rows[-1][name]) for name in WORDS},
        **failures,
    }


def starting_model(config: InteractionConfig, data: PreparedData) -> Any:
    """The model that all arms begin with; without dropout where samples must keep their probability in training."""
    dropout = 0.0 if config.interaction.method in ON_POLICY else config.dropout
    name, from_scratch = config.start_model or config.model_name, not config.start_model
    folder = saved_model(resolve(name), "last") if config.start_model else None
    return load_model(str(folder or name), data.tokenizer, data.card["block_size"], from_scratch, dropout)


def check_lengths(settings: Interaction, policy: PolicyModel, data: PreparedData) -> None:
    """Raise ParameterError where sequences would be longer than the blocks or the model's positions."""
    story = len(story_prompt(data.tokenizer)) if settings.prompts == STORY else 0
    positions = getattr(policy.model.config, "max_position_embeddings", None)
    settings.check_lengths(data.card["block_size"], positions, story)


def judge_of(config: InteractionConfig, data: PreparedData, name: str) -> Judge | None:
    """The judge called `name`, None where there is none. A judge of rules knows the training text's words and lengths.

    It expects a response of as many words as the text has in so many tokens.
    """
    if name == NO_JUDGE:
        return None
    asked = config.rubric, config.run_folder / JUDGE_CACHE, config.judge_limits, config.seed
    if name != RULE:  # nobody else looks at the text
        return make_judge(name, *asked)
    read = plain_rows(data)["train"][:MOST_BLOCKS]["input_ids"]  # at once: row by row takes seconds
    texts = data.tokenizer.batch_decode(list(read), skip_special_tokens=True)
    words_of_a_token = sum(len(text.split()) for text in texts) / max(1, sum(map(len, read)))
    words = max(1, round(config.interaction.response_tokens * words_of_a_token))
    return make_judge(name, *asked, known_words_of(texts), words)


class InteractionTrainer(ObjectiveTrainer):
    """ObjectiveTrainer whose epochs are rounds; a step without an example changes nothing."""

    kept_files = (*ObjectiveTrainer.kept_files, ROUNDS, SAMPLES, ROUND_FILE)

    def __init__(self, config: InteractionConfig, policy: PolicyModel, data: PreparedData) -> None:
        self.settings = config.interaction
        losses = [name for name in LOSSES[self.settings.method] if name != CROSS_ENTROPY]
        means = MEANS if self.settings.method == "ppo" else ()
        self.further_columns = (*(f"{name}_loss" for name in losses), *means, *WORDS)
        self._idle = False
        self._stopped_round = -1  # whose remaining steps are left out: the policy has gone too far
        self._divergence: dict[str, Tensor] = {}  # of the present step
        rows = RoundRows(self.settings, config.run_folder / ROUND_FILE)
        known = {"data_fingerprint": data.card["fingerprint"], "tokenizer": data.tokenizer}
        self.run_folder = config.run_folder
        super().__init__(config, policy, rows, plain_rows(data)["validation"], **known)
        self.train_dataset = self.rows = rows
        rows.wait = self.accelerator.wait_for_everyone
        self._budgets: dict[str, Budget] = {}  # of who is asked, by this process alone
        if self.is_world_process_zero():
            maker = round_maker(config, policy, data)
            maker.precision = self.accelerator.autocast
            rows.make = lambda number: maker.make(number, self.state.global_step)
            asked = {"judge": maker.judge, "corrector": maker.corrector}
            self._budgets = {role: each.budget for role, each in asked.items() if each is not None}
        policy.start.to(self.args.device)
        self.remembering.append(self)

    @property
    def trained_module(self) -> nn.Module:
        """The model and, of PPO, the value head."""
        return self.objective_model

    def train(self, resume_from_checkpoint: str | None = None, **settings: Any) -> TrainOutput:
        """The parent's. Rounds that an earlier process left without a checkpoint are made anew, by other settings."""
        if not resume_from_checkpoint and self.is_world_process_zero():
            for name in (ROUNDS, SAMPLES, ROUND_FILE):
                (self.run_folder / name).unlink(missing_ok=True)
        return super().train(resume_from_checkpoint, **settings)

    def remembered(self) -> dict[str, Any]:
        """Which round was left early, and what judge and teacher have spent of their budgets: words, seconds."""
        spent = {role: (budget.words, budget.seconds) for role, budget in self._budgets.items()}
        return {"stopped_round": self._stopped_round, "spent": spent}

    def resume(self, remembered: Mapping[str, Any]) -> None:
        """Go on with the same."""
        self._stopped_round = remembered["stopped_round"]
        for role, budget in self._budgets.items():
            budget.words, budget.seconds = remembered["spent"][role]

    def _get_train_sampler(self, train_dataset: Any = None) -> RoundOrder:
        ranks = self.args.world_size
        filled = ranks * self.args.train_batch_size if ranks > 1 else 1
        self._order = RoundOrder(self.rows, self.args.data_seed, filled)
        return self._order

    def _count(self, batches: Sequence[Mapping[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
        """What each loss of a step is divided by, over all ranks; notes whether there is anything to learn from."""
        units = [self.objective_model.units(batch) for batch in batches]
        counts = {
            name: self.accelerator.reduce(sum(each[name] for each in units).to(device), "sum") for name in units[0]
        }
        self._idle = self._stopped_round == self.rows.round or not any(bool(count) for count in counts.values())
        return counts

    def _tokens_read(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Of both sequences of a pair; none of a step that is left out."""
        return self.objective_model.tokens_read(batch) * (not self._idle)

    def training_step(self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The Trainer's; where there is nothing to learn from no gradient is made, so that the optimiser passes by."""
        self.optimizer.scaler = None if self._idle else self.accelerator.scaler  # float16's insists on gradients
        if self._idle:
            self.optimizer._is_overflow = False  # of an earlier step: the schedule goes on
            return torch.zeros((), device=self.args.device)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.settings.kl_stop and self.accelerator.sync_gradients:
            self._stop_when_far()
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        return torch.zeros((), device=self.args.device) if self._idle else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return 0.0 if self._idle else super()._get_grad_norm(model, grad_norm)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As the parent's; the KL from the policy that sampled is noted."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        for name in MEANS[1:]:
            if name in outputs:
                self._divergence[name] = self._divergence.get(name, 0) + outputs[name]
                self._divergence["count"] = num_items_in_batch[name]
        return (loss, outputs) if return_outputs else loss

    def _stop_when_far(self) -> None:
        if not self._divergence:
            return
        kl = self.accelerator.reduce(self._divergence[MEANS[1]], "sum") / self._divergence["count"].clamp_min(1)
        self._divergence = {}
        if float(kl) > self.settings.kl_stop:
            self._stopped_round = self.rows.round

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The parent's, with the words spent so far."""
        rows = read_rounds(self.run_folder) if "loss" in logs else []
        if rows:
            logs |= {name: int(rows[-1][name]) for name in WORDS}
        super().log(logs, start_time)

    def _logged_name(self, name: str) -> str:
        return name if name in MEANS else super()._logged_name(name)


def round_maker(config: InteractionConfig, policy: PolicyModel, data: PreparedData) -> RoundMaker:
    """What makes the rounds of a run, with its judge or its teacher."""
    settings = config.interaction
    corrector = None
    if settings.needs_teacher:
        sampling = {"temperature": settings.temperature, "top_p": settings.top_p, "seed": config.seed}
        cache = config.run_folder / JUDGE_CACHE
        corrector = make_corrector(config.correcting_teacher, "correction", cache, config.judge_limits, **sampling)
    story = story_prompt(data.tokenizer) if settings.prompts == STORY else None
    size = config.per_device_eval_batch_size
    where = policy, data.tokenizer, plain_rows(data)["train"], config.run_folder
    return RoundMaker(settings, *where, judge_of(config, data, config.judge), corrector, config.seed, size, story)
