"""Teachers: frozen models a student learns from, their logits averaged; and what a distillation may be asked for.

teacher = load_teachers(["runs/babylm/teacher"], tokenizer, block_size)      # a run of 02_teacher_finetune
target = teacher.target(input_ids, {})                                       # for the chunked head
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from nbutils.foundation import ModelError, ParameterError, UnreachableModelError, did_you_mean, file_sha256, places

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from nbutils.models.teacher_target import TeacherStates
    from nbutils.training import TrainingConfig

NO_DIVERGENCE = "none"  # cross entropy alone: the control
DIVERGENCES = ("forward", "reverse", "jsd")
POSITIONS = ("all", "answers")
REDUCTIONS = ("token", "batchmean")
NO_CACHE = "off"
CACHES = ("hidden", "topk")


class LiveTeacher:
    """Models in evaluation mode that run on every batch; those that are only named are loaded when they first run."""

    def __init__(self, models: Sequence[PreTrainedModel] = (), names: Sequence[str] = ()) -> None:
        self.names = tuple(model_of(name) for name in names)
        self._models = tuple(models)

    @property
    def models(self) -> tuple[PreTrainedModel, ...]:
        if not self._models:
            from transformers.utils import logging as logging_of_transformers

            from nbutils.models.loading import load_trained

            logging_of_transformers.disable_progress_bar()  # a bar for each teacher is noise
            self._models = tuple(load_trained(name).requires_grad_(False) for name in self.names)
        return self._models

    def target(self, input_ids: Tensor, stored: Mapping[str, Tensor]) -> TeacherStates:
        """Hidden states of all positions of `input_ids` (batch, time), flat, and the matrices that make them logits."""
        from nbutils.models.loading import head_matrices
        from nbutils.models.teacher_target import TeacherStates

        hidden = (model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state for model in self.models)
        weights = tuple(head_matrices(model)[0].weight.detach() for model in self.models)
        return TeacherStates(tuple(states.flatten(0, 1) for states in hidden), weights)

    def to(self, device: torch.device) -> LiveTeacher:
        """The same models, moved to `device`."""
        for model in self.models:
            model.to(device)
        return self

    @property
    def vocab(self) -> int:
        """Tokens that every model has; needs no weights where the models are named."""
        from nbutils.models.loading import build_config, head_matrices

        if self._models:
            return min(len(head_matrices(model)[0].weight) for model in self._models)
        return min(build_config(name, 0, 0).vocab_size for name in self.names)

    def parameters(self) -> list[int]:
        """How many parameters each model has; needs no weights where the models are named."""
        from nbutils.models.loading import build_config, count_parameters

        if self._models:
            return [model.num_parameters() for model in self._models]
        return [count_parameters(build_config(name, 0, 0)) for name in self.names]

    def fingerprint(self) -> str:
        """A hash of all weights; of the files they lie in where the models are named, which loads nothing."""
        from nbutils.models.loading import weight_files

        if self.names:
            if not all(weight_files(name) for name in self.names):
                _ = self.models  # of the Hub, and not on this machine yet
            files = [path for name in self.names for path in weight_files(name)]
            return hashlib.sha256(" ".join(map(file_sha256, files)).encode()).hexdigest()
        digest = hashlib.sha256()
        for model in self.models:
            for name, tensor in model.state_dict().items():
                digest.update(f"{name} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def load_teachers(names: Sequence[str], tokenizer: PreTrainedTokenizerBase, block_size: int) -> LiveTeacher:
    """The teachers called `names`: each a run of 02_teacher_finetune, a model folder or a Hub name.

    Raises ModelError where one is no model, is too short for `block_size`, or has another vocabulary than `tokenizer`,
    that of the data and the student.
    """
    for name in names:
        check_teacher(name, block_size, tokenizer)
    return LiveTeacher(names=names)


def before_training(config: TrainingConfig) -> PreTrainedModel:
    """The model that `train(config)` starts from, in evaluation mode."""
    import torch
    from transformers import set_seed

    from nbutils.data import load_data
    from nbutils.models.loading import load_model

    data = load_data(config.data_folder)
    set_seed(config.seed)
    shape = config.model_name, data.tokenizer, data.card["block_size"]
    model = load_model(*shape, config.from_scratch, config.dropout, config.quantised)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def model_of(name: str) -> str:
    """The folder or Hub name of the model that `name` stands for: the best of a run, or `name` itself."""
    from nbutils.models.loading import saved_model

    return str(saved_model(places.resolve(name)) or name)


def check_teacher(name: str, block_size: int, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Raise ModelError where the run, model folder or Hub name `name` cannot teach on the tokens of `tokenizer`."""
    from nbutils.models.loading import build_config, check_model, check_vocabulary
    from nbutils.models.shapes import CONFIGURATIONS

    if name in CONFIGURATIONS:
        raise ModelError(
            f"teacher {name!r} is a configuration and has no weights. Train one with 02_teacher_finetune and give its "
            "run folder, or give the name or the folder of a trained model."
        )
    model = model_of(name)
    try:
        check_model(model, from_scratch=False, block_size=block_size)
        if tokenizer is not None:
            check_vocabulary(model, build_config(model, 0, block_size).vocab_size, tokenizer)
    except ModelError as error:
        kind = UnreachableModelError if isinstance(error, UnreachableModelError) else ModelError
        raise kind(f"The teacher cannot be used. {error}") from None


def check_shared_vocabulary(divergence: str, teacher: LiveTeacher, student: PreTrainedModel) -> None:
    """Raise ParameterError where the divergence would be infinite: reverse KL, and tokens that the teacher lacks."""
    from nbutils.models.loading import head_matrices

    wanted = len(head_matrices(student)[0].weight)
    if divergence == "reverse" and wanted > teacher.vocab:
        raise ParameterError(
            f"divergence reverse needs a teacher with the student's {wanted} tokens, and it has {teacher.vocab}: where "
            "the teacher's probability is 0, the divergence is infinite. Use forward or jsd."
        )


def check_distillation(
    divergence: str,
    ce_weight: float,
    kl_weight: float,
    temperature: float,
    beta: float,
    positions: str,
    reduction: str,
) -> None:
    """Raise ParameterError, naming the notebook's parameter, where a value cannot be, whether it is used or not."""
    for name, given, words in (
        ("divergence", divergence, (NO_DIVERGENCE, *DIVERGENCES)),
        ("kl_positions", positions, POSITIONS),
        ("kd_reduction", reduction, REDUCTIONS),
    ):
        if given not in words:
            raise ParameterError(f"{name} is {given!r}. {did_you_mean(given, words)}")
    if not 0 < temperature < float("inf"):
        raise ParameterError(f"kl_temperature is {temperature}; logits are divided by it, so give a number above 0.")
    for name, weight in (("ce_weight", ce_weight), ("kl_weight", kl_weight)):
        if not 0 <= weight < float("inf"):
            raise ParameterError(f"{name} is {weight}; the weight of a term is a number of at least 0.")
    if ce_weight == kl_weight == 0:
        raise ParameterError("ce_weight and kl_weight are both 0, so nothing would be learned. Raise one of them.")
    if not 0 < beta < 1:
        raise ParameterError(
            f"jsd_beta is {beta}; it weighs teacher against student and lies between 0 and 1, both excluded. At the "
            "ends the divergence is one of two others: set divergence to forward or reverse."
        )


def check_cache(kind: str, divergence: str = "forward", top_k: int = 32) -> None:
    """Raise ParameterError where a notebook's teacher_cache cannot serve its objective; "off" is no cache."""
    if kind == NO_CACHE:
        return
    if kind not in CACHES:
        raise ParameterError(f"teacher_cache is {kind!r}. {did_you_mean(kind, (NO_CACHE, *CACHES))}")
    if kind == "topk" and divergence not in ("forward", NO_DIVERGENCE):
        raise ParameterError(
            f"divergence {divergence} needs the teacher's probability of every token, and teacher_cache topk holds "
            "those of a few. Set teacher_cache to hidden or off, or divergence to forward."
        )
    if kind == "topk" and top_k < 1:
        raise ParameterError(f"cache_top_k is {top_k}; give the number of tokens to keep at each position, 32 say.")
