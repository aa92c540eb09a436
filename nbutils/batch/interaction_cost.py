"""What a run with a judge will cost: rounds of samples, passes over the examples, and how it is judged at the end.

In passes forward of the model that makes them, 2 N + 4 L d T a token (nbutils/batch/cost.py):

    sample     the student writes a sequence; student and frozen start read it again, to weigh it: 3
    train      3 over each sequence, both of a pair; beside them 1 of a distilling teacher
    judge      1 over rubric and sequence, in the rounds and at the end; the grades are a few tokens more
    correct    1 over what a teacher is told, the prompt twice and the sample among it, and over what it writes
    at the end the student writes responses to contexts, weighed as above, and stories: 1

All at the utilisation of training, which sampling does not reach: it takes longer. The length of rubrics is told by
their characters, as for models that chat; others get less. Who is no model in memory computes nothing here.

In memory, beside the student that trains: its frozen start, the judge and the teacher of its rounds in the precision
they were published in, once where they are one, or a distilling teacher. At the end, beside the student: one judge
after the other, then the start.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbutils.batch.cost import (
    FROZEN_BYTES,
    PEAK,
    Cost,
    teacher_flops_per_token,
    teacher_memory,
    teachers_of,
    training_memory,
)
from nbutils.interaction import (
    CONTEXTS,
    DISTILL,
    NO_JUDGE,
    PAIRED,
    RUBRICS,
    SERVER,
    STORY,
    Interaction,
    held_out,
    read_correction,
    read_rubric,
    read_story,
)
from nbutils.interaction import CORRECTORS as NO_TEACHERS
from nbutils.interaction import JUDGES as NO_JUDGES
from nbutils.runs import Plan, Variant

if TYPE_CHECKING:
    from transformers import PretrainedConfig

HALF_BYTES = 2  # a parameter of a judge that was published in 16 bit
CHARACTERS = 4.4  # of English text, about, that a token of GPT-2 stands for
WEIGHED = 3  # passes over a sample: written, and read by student and start
JUDGE, SECOND_JUDGE, TEACHER = (
    "judge",
    "second_judge",
    "correcting_teacher",
)  # parameters: a run, a folder or a Hub name
DISTILLING = ("distilling_teacher",)


@dataclass(frozen=True)
class Model:
    """A model that writes or reads. `name`: a run of the plan, a folder or a Hub name, empty of the student."""

    config: PretrainedConfig
    parameters: int
    name: str = ""

    @property
    def memory(self) -> int:
        """Bytes of its weights as they were published."""
        return self.parameters * (HALF_BYTES if "16" in str(self.config.dtype) else FROZEN_BYTES)

    def reads(self, tokens: int) -> float:
        """FLOPs of a pass over a text of so many tokens, or as many as it has positions for."""
        tokens = min(tokens, getattr(self.config, "max_position_embeddings", None) or tokens)
        return tokens * teacher_flops_per_token(self.config, self.parameters, tokens)


@dataclass(frozen=True)
class Samples:
    """Sequences that the student writes: how many, of how many tokens each, passes over them, by whom they are graded.

    `judges` are roles: parameters of the notebook.
    """

    number: int
    tokens: int
    passes: int
    rubric: str
    judges: tuple[str, ...]

    def flops(self, student: Model, asked: Mapping[str, Model]) -> float:
        """To write, weigh and judge them; `asked` are the models by role."""
        rubric = read_rubric(self.rubric)
        told = round((len(rubric.system) + len(rubric.user)) / CHARACTERS) + self.tokens
        judging = sum(asked[role].reads(told) for role in self.judges if role in asked)
        return self.number * (self.passes * student.reads(self.tokens) + judging)


def interaction_cost(
    variant: Variant, plan: Plan, student: Model, block_size: int, gpu: str, utilisation: float
) -> Cost:
    """The estimate for a run of 06_interaction, as `cost.estimate` has it; blocks have `block_size` tokens."""
    settings = Interaction.of(variant.params)
    rounds, *ends = samples = _samples(variant, settings, block_size)
    teacher = (TEACHER,) if settings.needs_teacher else ()
    asked, left_out = _asked(variant, plan, {*teacher, *(role for each in samples for role in each.judges)})
    length, both = rounds.tokens, 2 if settings.method in PAIRED else 1
    tokens = settings.rounds * settings.examples_per_round * settings.all_passes * both * length
    distilling, unknown = teachers_of(variant, plan, length, DISTILLING) if settings.method == DISTILL else ([], ())
    flops = 3 * tokens * teacher_flops_per_token(student.config, student.parameters, length)
    flops += tokens * sum(teacher_flops_per_token(*each, length) for each in distilling)
    flops += sum(each.flops(student, asked) for each in samples)
    if TEACHER in asked:
        flops += rounds.number * asked[TEACHER].reads(_told_to_correct() + 2 * length)
    weights = FROZEN_BYTES * student.parameters
    learning = training_memory(student.config, student.parameters, both * length, variant.params) + weights
    learning += sum(teacher_memory(*each) for each in distilling)
    learning += sum(
        {asked[role].name: asked[role].memory for role in (*rounds.judges, *teacher) if role in asked}.values()
    )
    judging = [asked[role].memory for each in ends for role in each.judges if role in asked]
    hours = flops / (PEAK[gpu] * utilisation) / 3600
    memory = max(learning, weights + max(weights, *judging, 0))
    return Cost(student.parameters, tokens, flops, memory, hours, (*left_out, *unknown))


def _samples(variant: Variant, settings: Interaction, block_size: int) -> list[Samples]:
    """What is written in all rounds, to contexts at the end, and as stories at the end."""
    params, drawn = variant.params, settings.draws_samples
    number = settings.rounds * settings.prompts_per_round * settings.samples_per_prompt * drawn
    samples = [Samples(number, _length(settings), WEIGHED, params["rubric"], (JUDGE,) if drawn else ())]
    for name, kind, passes in (("judged_samples", CONTEXTS, WEIGHED), ("judged_stories", STORY, 1)):
        number, length = params.get(name, 0), _length(held_out(settings, kind, block_size))
        samples.append(Samples(number, length, passes, RUBRICS[kind], (JUDGE, SECOND_JUDGE) if number else ()))
    return samples


def _length(settings: Interaction) -> int:
    """Tokens of a prompt behind an end token and of a response, at most."""
    prompt = len(read_story().prompt) / CHARACTERS if settings.prompts == STORY else settings.prompt_tokens
    return round(prompt) + settings.response_tokens + 1


def _told_to_correct() -> int:
    """Tokens of what a teacher is told beside prompt and sample."""
    told = read_correction()
    return round(len("".join((told.system, *told.user, told.prefill))) / CHARACTERS)


def _asked(variant: Variant, plan: Plan, roles: Collection[str]) -> tuple[dict[str, Model], tuple[str, ...]]:
    """The models in memory that have these roles, and what is not known of the others."""
    found, left_out = {}, {}
    for role in (JUDGE, SECOND_JUDGE, TEACHER):
        name = str(variant.needs.get(role) or variant.params.get(role, NO_JUDGE))
        if role not in roles or name in {NO_JUDGE, *NO_JUDGES, *NO_TEACHERS} - {SERVER}:
            continue
        models, _ = ([], ()) if name == SERVER else teachers_of(variant, plan, 0, (role,))
        if models:
            found[role] = Model(*models[0], name)
        elif name == SERVER:
            left_out[name] = "what a server computes that judges or corrects"
        else:
            left_out.setdefault(name, f"{name}, the {role.replace('_', ' ')}, whose size is not known from here")
    return found, tuple(left_out.values())
