"""What a run will cost: training FLOPs, memory, hours on a GPU. Estimates, and said to be.

    python -m nbutils check params/cosine.yaml --gpu A100 --utilisation 0.4

FLOPs of one token, forward and backward, as PaLM counts them (Chowdhery et al. 2022, appendix B; Kaplan et al. 2020):

    6 N + 12 L d T     N parameters that are multiplied with, L layers, d width of all heads together, T block length

Attention without the saving of a causal mask. An input embedding that is not also the output matrix is looked up, not
multiplied, and does not count. The expected embedding of the cosine term is another output layer: 6 V d more.

A teacher only runs forward, 2 N + 4 L d T; where its hidden states are stored (teacher_cache hidden) it is its output
layer, 2 V d, where its most probable tokens are (topk) nothing. Storing them is paid once for all students that read
them; no run counts it, nor any evaluation but that by judges. A run with a judge (06_interaction) counts passes forward
of the model that makes them:

    sample     the student writes a sequence; student and frozen start read it again, to weigh it: 3
    train      3 over each sequence, both of a pair; beside them 1 of a distilling teacher
    judge      1 over rubric and sequence, in the rounds and at the end; the grades are a few tokens more
    correct    1 over what a teacher is told, the prompt twice and the sample among it, and over what it writes
    at the end the student writes responses to contexts, weighed as above, and stories: 1

All at the utilisation of training, which sampling does not reach. Beside such a student lie its frozen start, judge and
teacher as they were published, once where they are one; at the end one judge after the other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from nbutils import interaction
from nbutils.batch.preflight import INTERACTION, START, data_facts
from nbutils.foundation import ParameterError, Unreachable, did_you_mean, resolve
from nbutils.models import TOKENIZERS
from nbutils.runs import Plan, Variant

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Dense bfloat16 FLOP/s with float32 accumulation, from the makers' data sheets (without sparsity)
PEAK = {
    "A10": 125e12,
    "A100": 312e12,
    "B200": 2250e12,
    "H100": 989e12,
    "H100-PCIe": 756e12,
    "H200": 989e12,
    "L4": 121e12,
    "L40S": 362e12,
    "RTX3090": 71e12,
    "RTX4090": 165e12,
}
FROZEN_BYTES, HALF_BYTES = 4, 2  # a parameter that does not learn, in float32 and in 16 bit
TRAINING_BYTES = 16  # a parameter in float32: weight 4, gradient 4, AdamW's two moments 8
ACTIVATION_BYTES = 34  # a token, layer and unit of width in 16 bit, attention scores not kept (Korthikanti et al. 2022)
CHARACTERS = 4.4  # of English text, about, that a token of GPT-2 stands for
WEIGHED = 3  # passes over a sample: written, and read by student and start
# Parameters that name a model, each a run of the plan, a folder or a Hub name
TEACHERS = ("teacher", "second_teacher")
JUDGE, SECOND_JUDGE, TEACHER, DISTILLING = "judge", "second_judge", "correcting_teacher", "distilling_teacher"


@dataclass(frozen=True)
class Cost:
    """The estimate for one training run. `tokens`, `flops` and `hours` are None where they depend on unprepared data.

    `hours`: of all its GPUs together. `memory`: bytes on one GPU, without the logits of a chunk and the library's own.
    """

    parameters: int
    tokens: int | None
    flops: float | None
    memory: float
    hours: float | None = None
    left_out: tuple[str, ...] = ()  # what else is not counted


@dataclass(frozen=True)
class Model:
    """A model of the estimate."""

    config: PretrainedConfig
    parameters: int
    name: str = ""  # what a parameter calls it

    @property
    def embeddings(self) -> int:
        """Numbers in an embedding or output matrix."""
        return self.config.vocab_size * self.config.hidden_size

    @property
    def published_bytes(self) -> int:
        """Bytes of its weights as they were published."""
        return self.parameters * (HALF_BYTES if "16" in str(self.config.dtype) else FROZEN_BYTES)

    def forward(self, block_size: int) -> float:
        """2 N + 4 L d T: FLOPs of the forward pass of one token."""
        config, width = self.config, self.config.hidden_size
        multiplied = self.parameters - (0 if config.tie_word_embeddings else self.embeddings)
        heads = config.num_attention_heads * (getattr(config, "head_dim", None) or width // config.num_attention_heads)
        return 2 * multiplied + 4 * config.num_hidden_layers * heads * block_size

    def reads(self, tokens: int) -> float:
        """FLOPs of a pass over a text of so many tokens, or as many as it has positions for."""
        tokens = min(tokens, getattr(self.config, "max_position_embeddings", None) or tokens)
        return tokens * self.forward(tokens)

    def taught(self, block_size: int, cache: str) -> float:
        """FLOPs of a teacher for each token that a student trains on, live or read from a cache of the kind `cache`."""
        stored = {"hidden": 2 * self.embeddings, "topk": 0}
        return stored[cache] if cache in stored else self.forward(block_size)

    def teaching_bytes(self, cache: str) -> float:
        """Bytes of a teacher while a student trains: its weights, its output layer, or none where it is stored."""
        return FROZEN_BYTES * {"hidden": self.embeddings, "topk": 0}.get(cache, self.parameters)

    def training_bytes(self, tokens: int) -> float:
        """Weights, gradients and AdamW states in float32, and activations of so many tokens in 16 bit, roughly."""
        activations = ACTIVATION_BYTES * tokens * self.config.hidden_size * self.config.num_hidden_layers
        return TRAINING_BYTES * self.parameters + activations


def check_gpu(gpu: str, utilisation: float) -> None:
    """Raise ParameterError for a GPU that is not in PEAK or a utilisation outside (0, 1]."""
    if gpu not in PEAK:
        raise ParameterError(f"There is no data on a GPU {gpu!r}. {did_you_mean(gpu, PEAK)}")
    if not 0 < utilisation <= 1:
        raise ParameterError(f"utilisation is {utilisation}; it is the fraction of the GPU's peak in use, in (0, 1].")


def flops_per_token(config: PretrainedConfig, parameters: int, block_size: int, params: Mapping[str, Any]) -> float:
    """FLOPs to train on one token, by the formula at the top of this file."""
    model = Model(config, parameters)
    mixture = 6 * model.embeddings if params.get("alpha", 0) > 0 and not params.get("cos_topk") else 0
    return 3 * model.forward(block_size) + mixture


def estimate(variant: Variant, plan: Plan, gpu: str, utilisation: float) -> Cost | None:
    """The cost of `variant`, None where it trains no model or its vocabulary or block length is not known yet.

    Raises ModelError for a model that cannot be found, ParameterError as `check_gpu` does.
    """
    check_gpu(gpu, utilisation)
    params, data = variant.params, data_facts(variant, plan)
    if not {"model_name", "per_device_train_batch_size"} <= params.keys() or not data.get("block_size"):
        return None
    student = _student(variant, plan, data)
    if student is None:
        return None
    of_kind = _rounds if {*INTERACTION} <= params.keys() else _training
    cost = of_kind(variant, plan, student, data)
    return cost if cost.flops is None else replace(cost, hours=cost.flops / (PEAK[gpu] * utilisation) / 3600)


# ---- models ----------------------------------------------------------------------------------------------------------


def _student(variant: Variant, plan: Plan, data: Mapping[str, Any]) -> Model | None:
    """The model that a run trains: the one it begins with, where it names one. None: its vocabulary is not known."""
    from nbutils.models import model_of

    params = variant.params
    if START in variant.needs:
        return _made_by(plan.variant(variant.needs[START]).params, data)
    if params.get(START):
        return _model(model_of(params[START]), 0, data["block_size"])
    return _made_by(params | {"from_scratch": True} if START in params else params, data)


def _made_by(params: Mapping[str, Any], data: Mapping[str, Any]) -> Model | None:
    """The model that a training run makes; None where its vocabulary is not known."""
    vocab_size = 0  # pretrained models keep their own vocabulary
    if params.get("from_scratch") and not (vocab_size := _vocabulary(data)):
        return None
    return _model(params["model_name"], vocab_size, data["block_size"])


def _vocabulary(data: Mapping[str, Any]) -> int:
    """Tokens of the vocabulary of `data`; 0 of a Hub's tokenizer that is not known here."""
    tokenizer = data.get("tokenizer", "train")
    if tokenizer in ("train", "unigram"):
        return data["vocab_size"]
    if resolve(tokenizer).is_dir():
        from nbutils.data import load_tokenizer

        return len(load_tokenizer(tokenizer))
    return TOKENIZERS.get(tokenizer, 0)


def _named(variant: Variant, plan: Plan, block_size: int, names: Sequence[str]) -> tuple[list[Model], list[str]]:
    """The models that the parameters `names` name, and a remark on each whose size is not known."""
    from nbutils.models import model_of

    found, unknown = [], []
    for name in names:
        if name in variant.needs:
            needed = plan.variant(variant.needs[name])
            data = data_facts(needed, plan)
            known = "model_name" in needed.params and data.get("block_size")
            model = _made_by(needed.params, data) if known else None
            found += [replace(model, name=needed.name)] if model else []
            unknown += [] if model else [f"the teacher of {needed.name}, whose size is not known yet"]
        elif given := variant.params.get(name):
            try:
                found.append(replace(_model(model_of(given), 0, block_size), name=given))
            except Unreachable:
                unknown.append(f"the teacher {given}, which cannot be reached from here")
    return found, unknown


@lru_cache(maxsize=64)
def _model(model_name: str, vocab_size: int, block_size: int) -> Model:
    from nbutils.models import build_config, count_parameters

    config = build_config(model_name, vocab_size, block_size)
    return Model(config, count_parameters(config))


# ---- a training ------------------------------------------------------------------------------------------------------


def _training(variant: Variant, plan: Plan, student: Model, data: Mapping[str, Any]) -> Cost:
    params, block_size = variant.params, data["block_size"]
    teachers, left_out = _taught_by(variant, plan, block_size)
    tokens, cache = training_tokens(params, data), params.get("teacher_cache", "off")
    of_token = flops_per_token(student.config, student.parameters, block_size, params)
    of_token += sum(teacher.taught(block_size, cache) for teacher in teachers)
    memory = student.training_bytes(params["per_device_train_batch_size"] * block_size)
    memory += sum(teacher.teaching_bytes(cache) for teacher in teachers)
    flops = None if tokens is None else tokens * of_token
    return Cost(student.parameters, tokens, flops, memory, left_out=tuple(left_out))


def _taught_by(variant: Variant, plan: Plan, block_size: int) -> tuple[list[Model], list[str]]:
    """The teachers of a distillation, and what cannot be counted."""
    params = variant.params
    if params.get("divergence", "none") == "none":
        return [], []
    found, left_out = _named(variant, plan, block_size, TEACHERS)
    if params.get("teacher_cache", "off") != "off":
        left_out.append("storing what a teacher says, one forward pass over the data for all students that read it")
    if "teacher" not in variant.needs and not params.get("teacher"):
        left_out.append("the small teacher that is made where none is named")
    return found, left_out


def training_tokens(params: Mapping[str, Any], data: Mapping[str, Any]) -> int | None:
    """Tokens trained on, over all processes; None where they depend on data that is not prepared.

    Of questions and answers, whose lengths differ, padding is not counted.
    """
    examples = data.get("task") == "qa"
    if examples and "splits" not in data:
        return None
    train = data["splits"]["train"] if examples else {}
    length = (train["tokens"] + train["end_tokens"]) / train["blocks"] if examples else data["block_size"]
    blocks = params["per_device_train_batch_size"] * params.get("processes", 1)
    if params.get("max_steps", 0) > 0:
        return round(params["max_steps"] * blocks * params.get("gradient_accumulation_steps", 1) * length)
    if "splits" not in data:
        return None
    return round(data["splits"]["train"]["blocks"] * length * params["num_train_epochs"])


# ---- rounds with a judge ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """Sequences that the student writes: how many, of how many tokens, passes over them, and the roles that grade."""

    number: int
    tokens: int
    passes: int
    rubric: str
    judges: tuple[str, ...]

    def flops(self, student: Model, asked: Mapping[str, Model]) -> float:
        """To write, weigh and judge them; `asked` are the models by role."""
        rubric = interaction.read_rubric(self.rubric)
        told = round((len(rubric.system) + len(rubric.user)) / CHARACTERS) + self.tokens
        judging = sum(asked[role].reads(told) for role in self.judges if role in asked)
        return self.number * (self.passes * student.reads(self.tokens) + judging)


def _rounds(variant: Variant, plan: Plan, student: Model, data: Mapping[str, Any]) -> Cost:
    settings = interaction.Interaction.of(variant.params)
    rounds, *ends = samples = _samples(variant, settings, data["block_size"])
    teacher = (TEACHER,) if settings.needs_teacher else ()
    asked, left_out = _asked(variant, plan, {*teacher, *(role for each in samples for role in each.judges)})
    length, both = rounds.tokens, 2 if settings.method in interaction.PAIRED else 1
    tokens = settings.rounds * settings.examples_per_round * settings.all_passes * both * length
    distilling, unknown = _named(variant, plan, length, (DISTILLING,) if settings.method == interaction.DISTILL else ())
    flops = tokens * (3 * student.forward(length) + sum(each.forward(length) for each in distilling))
    flops += sum(each.flops(student, asked) for each in samples)
    if TEACHER in asked:
        told = interaction.read_correction()
        told_tokens = round(len("".join((told.system, *told.user, told.prefill))) / CHARACTERS)
        flops += rounds.number * asked[TEACHER].reads(told_tokens + 2 * length)
    weights = FROZEN_BYTES * student.parameters
    in_rounds = {asked[role].name: asked[role].published_bytes for role in (*rounds.judges, *teacher) if role in asked}
    learning = student.training_bytes(variant.params["per_device_train_batch_size"] * both * length) + weights
    learning += sum(each.teaching_bytes("off") for each in distilling) + sum(in_rounds.values())
    judging = [asked[role].published_bytes for each in ends for role in each.judges if role in asked]
    memory = max(learning, weights + max(weights, *judging, 0))
    return Cost(student.parameters, tokens, flops, memory, left_out=(*left_out, *unknown))


def _samples(variant: Variant, settings: interaction.Interaction, block_size: int) -> list[Samples]:
    """What is written in all rounds, to contexts at the end, and as stories at the end."""
    params, drawn = variant.params, settings.draws_samples
    number = settings.rounds * settings.prompts_per_round * settings.samples_per_prompt * drawn
    samples = [Samples(number, _length(settings), WEIGHED, params["rubric"], (JUDGE,) if drawn else ())]
    kinds = {"judged_samples": (interaction.CONTEXTS, WEIGHED), "judged_stories": (interaction.STORY, 1)}
    for name, (kind, passes) in kinds.items():
        number, length = params.get(name, 0), _length(interaction.held_out(settings, kind, block_size))
        judges = (JUDGE, SECOND_JUDGE) if number else ()
        samples.append(Samples(number, length, passes, interaction.RUBRICS[kind], judges))
    return samples


def _length(settings: interaction.Interaction) -> int:
    """Tokens of a prompt behind an end token and of a response, at most."""
    is_story = settings.prompts == interaction.STORY
    prompt = len(interaction.read_story().prompt) / CHARACTERS if is_story else settings.prompt_tokens
    return round(prompt) + settings.response_tokens + 1


def _asked(variant: Variant, plan: Plan, roles: Collection[str]) -> tuple[dict[str, Model], Collection[str]]:
    """The models in memory that have these roles, and a remark on each of the others. Rules compute nothing."""
    found, left_out = {}, {}
    compute_nothing = {interaction.NO_JUDGE, *interaction.JUDGES, *interaction.CORRECTORS} - {interaction.SERVER}
    for role in (JUDGE, SECOND_JUDGE, TEACHER):
        name = str(variant.needs.get(role) or variant.params.get(role, interaction.NO_JUDGE))
        if role not in roles or name in compute_nothing:
            continue
        if name == interaction.SERVER:
            left_out[name] = "what a server computes that judges or corrects"
        elif models := _named(variant, plan, 0, (role,))[0]:
            found[role] = models[0]
        else:
            left_out.setdefault(name, f"{name}, the {role.replace('_', ' ')}, whose size is not known from here")
    return found, left_out.values()
