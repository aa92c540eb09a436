"""What a run with a judge may be asked for; without torch, so that a plan is checked before anything is loaded.

method        learns from                                             needs
text          human text alone: the control                           -
distill       the same text, and a teacher's distribution over it     distilling teacher
sft           the teacher's corrections of its samples                teacher
simpo         correction preferred to sample, and corrections         teacher
simpo_judge   the better of its own samples, by the judge's score     judge
three_way     human text preferred to correction, that to sample      teacher
ppo           rewards: the judge's score of each story                judge
rloo          the same, each sample against the others of its prompt  judge
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from nbutils.foundation import ParameterError, did_you_mean
from nbutils.interaction.prompts import read_story

DISTILL = "distill"
FROM_TEXT = ("text", DISTILL)  # methods that read what people wrote, and sample nothing
CORRECTED = ("sft", "simpo", "three_way")  # methods whose completions a teacher corrects
JUDGED = ("simpo_judge", "ppo", "rloo")  # methods that learn from scores
ON_POLICY = ("ppo", "rloo")
PAIRED = ("simpo", "simpo_judge", "three_way")  # methods that learn from preferences
METHODS = (*FROM_TEXT, "sft", "simpo", "simpo_judge", "three_way", "ppo", "rloo")
NO_JUDGE = "none"
STORY, CONTEXTS = "story", "contexts"
AT_LEAST_ONE = ("rounds", "prompts_per_round", "samples_per_prompt", "prompt_tokens", "response_tokens", "passes")
WEIGHTS = ("sft_weight", "gamma", "score_margin", "kl_coefficient", "value_weight", "length_weight", "kl_stop")
LARGEST_ERROR = 0.2  # of the KL, relative to its target, that one update of its price answers to (Ziegler et al. 2019)
END_TOKENS = 1  # of a sequence, before the prompt; that of a response is one of its tokens


@dataclass(frozen=True)
class Interaction:
    """The settings of rounds, samples and learning; the names are the notebook's parameters.

    A round draws samples for its prompts with the student as it is, has them scored or corrected, and trains on them.
    passes: over a round's examples; of SimPO on corrections `sft_passes` of supervised learning come first. RLOO makes
    one, and is on-policy where batch and accumulation make one step of it.
    beta, gamma: of SimPO (gamma is absolute, not the ratio). kl_*, clip, ...: of PPO and RLOO. kd_*: of distillation,
    (1 - kd_weight) cross entropy + kd_weight kd_temperature^2 KL(teacher || student).
    """

    method: str = "simpo"
    prompts: str = CONTEXTS  # contexts: beginnings of training blocks; story: one written prompt
    rounds: int = 4
    prompts_per_round: int = 32
    samples_per_prompt: int = 1
    prompt_tokens: int = 32
    response_tokens: int = 32
    min_response_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 0.8
    passes: int = 2
    sft_passes: int = 0
    beta: float = 2.0
    gamma: float = 1.0
    sft_weight: float = 0.2
    score_margin: float = 0.0
    length_weight: float = 0.0  # of stories, what their length earns
    kl_coefficient: float = 0.2
    kl_target: float = 6.0
    kl_horizon: int = 10_000
    kl_stop: float = 0.0  # 0: never
    clip: float = 0.2
    value_clip: float = 0.2
    value_weight: float = 0.1
    discount: float = 1.0
    trace: float = 0.95
    kd_weight: float = 0.5
    kd_temperature: float = 2.0

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> Interaction:
        """The settings among a notebook's parameters; of stories, length and its weight as the story prompt says.

        Raises ParameterError where the story prompt cannot be read.
        """
        settings = cls(**{each.name: params[each.name] for each in fields(cls) if each.name in params})
        if settings.prompts != STORY:
            return settings
        story = read_story()
        return replace(
            settings,
            response_tokens=settings.response_tokens or story.max_new_tokens,
            length_weight=story.length_weight,
        )

    @property
    def needs_judge(self) -> bool:
        """Whether it learns from scores."""
        return self.method in JUDGED

    @property
    def draws_samples(self) -> bool:
        """Whether the student writes anything while it learns."""
        return self.method not in FROM_TEXT

    @property
    def needs_teacher(self) -> bool:
        """Whether it learns from corrections."""
        return self.method in CORRECTED

    @property
    def all_passes(self) -> int:
        """Over a round's examples, of both kinds."""
        return self.passes + (self.sft_passes if self.method in ("simpo", "three_way") else 0)

    @property
    def examples_per_round(self) -> int:
        """Rows of one pass: at most so many, fewer where scores failed or tied."""
        return self.prompts_per_round * (self.samples_per_prompt if self.method in ON_POLICY else 1)

    @property
    def turns(self) -> int:
        """Examples that a prompt has, of which each pass takes one, the next pass the next."""
        return 3 if self.method == "three_way" else 1

    def check(self) -> None:
        """Raise ParameterError, naming the notebook's parameter, where a value cannot be."""
        for name, given, words in (("method", self.method, METHODS), ("prompts", self.prompts, (CONTEXTS, STORY))):
            if given not in words:
                raise ParameterError(f"{name} is {given!r}. {did_you_mean(given, words)}")
        for name in AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ParameterError(f"{name} is {getattr(self, name)}; give a whole number, at least 1.")
        if self.sft_passes < 0:
            raise ParameterError(f"sft_passes is {self.sft_passes}; give a whole number, at least 0.")
        for name in WEIGHTS:
            if not 0 <= getattr(self, name) < float("inf"):
                raise ParameterError(f"{name} is {getattr(self, name)}; give a number of at least 0.")
        for name in ("temperature", "beta", "clip", "value_clip", "kl_target", "kl_horizon", "kd_temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ParameterError(f"{name} is {getattr(self, name)}; give a number above 0.")
        for name in ("top_p", "discount", "trace"):
            if not 0 < getattr(self, name) <= 1:
                raise ParameterError(f"{name} is {getattr(self, name)}; it lies above 0 and is at most 1.")
        if not 0 <= self.kd_weight <= 1:
            raise ParameterError(
                f"kd_weight is {self.kd_weight}; it is the teacher's share, the text has the rest: give a number in "
                "[0, 1]."
            )
        if not 0 <= self.min_response_tokens <= self.response_tokens:
            raise ParameterError(
                f"min_response_tokens is {self.min_response_tokens}; give a number from 0 to response_tokens, "
                f"{self.response_tokens}."
            )
        self._check_together()

    def _check_together(self) -> None:
        samples = self.prompts_per_round * self.samples_per_prompt
        if self.method == "ppo" and self.kl_horizon <= LARGEST_ERROR * samples:
            raise ParameterError(
                f"kl_horizon {self.kl_horizon} is too short for rounds of {samples} samples: one round could take the "
                f"whole price of KL away. Set it above {LARGEST_ERROR * samples:g}."
            )
        if self.method == "rloo" and self.passes != 1:
            raise ParameterError(
                "method rloo learns from samples of the policy as it is; after a pass over them they are another's. "
                f"Set passes, which is {self.passes}, to 1."
            )
        if self.method in ("simpo_judge", "rloo") and self.samples_per_prompt < 2:
            raise ParameterError(
                f"method {self.method} compares samples of one prompt. Set samples_per_prompt to 2 or more."
            )
        if self.method in (*CORRECTED, *FROM_TEXT) and self.samples_per_prompt != 1:
            raise ParameterError(f"method {self.method} takes one sample of a prompt. Set samples_per_prompt to 1.")
        if self.prompts == STORY and self.method not in JUDGED:
            raise ParameterError(
                f"method {self.method} needs human text after its prompts, and the story prompt has none. Set prompts "
                "to contexts."
            )
        if self.method in ON_POLICY and self.min_response_tokens:
            raise ParameterError(
                f"method {self.method} weighs each token by the probability it was sampled with, and with "
                f"min_response_tokens {self.min_response_tokens} that is not the model's. Set min_response_tokens to 0."
            )
        for name in ("temperature", "top_p"):
            if self.method in ON_POLICY and getattr(self, name) != 1:
                raise ParameterError(
                    f"method {self.method} weighs each token by the probability it was sampled with, and with {name} "
                    f"{getattr(self, name)} that is not the model's. Set {name} to 1."
                )

    def check_lengths(
        self, block_size: int, positions: int | None = None, story_tokens: int = 0, whose: str = "the model"
    ) -> None:
        """Raise ParameterError where prompts and responses are longer than blocks or what a model has positions for.

        positions: of the model, or of `whose` model, None without a limit; story_tokens: of the written prompt, its end
        token included.
        """
        asked = f"prompt_tokens {self.prompt_tokens} and response_tokens {self.response_tokens}"
        prompt = self.prompt_tokens
        if self.prompts == STORY:
            asked = f"The story prompt's {story_tokens} tokens and response_tokens {self.response_tokens}"
            prompt = story_tokens - 1
        elif block_size < self.prompt_tokens + self.response_tokens:
            raise ParameterError(
                f"{asked} are together longer than the blocks of {block_size} tokens they are taken from. Lower one, "
                "or prepare longer blocks."
            )
        if positions is not None and positions < prompt + self.response_tokens + END_TOKENS:
            raise ParameterError(
                f"{asked}, with an end token before, are longer than the {positions} positions of {whose}. "
                "Lower one, or take a model with more positions (one from scratch has as many as blocks have tokens)."
            )

    def check_model(self, name: str, what: str) -> None:
        """Raise ParameterError where the model `name`, which is the parameter `what`, cannot read what it is to.

        Its tokens are taken to be as long as the student's. Reads the model's configuration, no weights.
        """
        from nbutils.models import build_config, model_of

        positions = getattr(build_config(model_of(name), 0, 0), "max_position_embeddings", None)
        story = len(read_story().prompt.split()) + END_TOKENS if self.prompts == STORY else 0
        longest = self.prompt_tokens + self.response_tokens + END_TOKENS
        self.check_lengths(longest, positions, story, whose=f"{what} {name!r}")


def taught_by(params: Mapping[str, Any]) -> dict[str, str]:
    """Whom the student of a variant of 06_interaction learns from, by the parameter; empty of text alone."""
    roles = {"judge": JUDGED, "correcting_teacher": CORRECTED, "distilling_teacher": (DISTILL,)}
    return {role: params[role] for role, methods in roles.items() if params.get("method") in methods and role in params}


def check_held_out(params: Mapping[str, Any]) -> None:
    """Raise ParameterError where the second judge, which is to look on alone, teaches the student."""
    from nbutils.interaction.judges import RULE, RULE_PLAIN

    second = params.get("second_judge", NO_JUDGE)
    is_rule = second in (RULE, RULE_PLAIN)
    for role, name in taught_by(params).items() if second != NO_JUDGE else ():
        if name == second or (not is_rule and _source(name) == _source(second)):
            raise ParameterError(
                f"second_judge {second!r} is to hold out, and method {params['method']} learns from it as {role}. "
                "Set second_judge to another one, or to none."
            )


def _source(name: str) -> str:
    """The same for two names of one model: of a server its model's, of a folder its path."""
    from nbutils.foundation import resolve
    from nbutils.interaction.chat_client import MODEL
    from nbutils.interaction.judges import SERVER
    from nbutils.models import model_of

    if name == SERVER:
        return os.environ.get(MODEL, "").strip() or name
    folder = resolve(model_of(name))
    return str(folder.resolve()) if folder.is_dir() else name
