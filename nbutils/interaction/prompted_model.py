"""Models in memory that are asked in words: by their chat template, or, where they have none, by plain text.

A template's special tokens come from it alone: those written out in a text are spelled apart ("<|eot_id|>" as
"< |eot_id|>"), so that no student ends its turn and speaks as the judge. There is exactly one BOS where the model has
learned one, and none where its tokenizer would not put one.

A model that judges and corrects is in memory once: `prompted_model` gives the same object to all who ask for it while
any of them has it. `release_models` takes the weights back; whoever asks again loads them again.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from nbutils.foundation import ModelError, did_you_mean, file_sha256, locate
from nbutils.interaction.prompts import Messages
from nbutils.models import model_of

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
LONGEST_TEXT = 100_000  # characters of a prompt or a completion that are tokenised; no model has that many positions
BLOB = re.compile(r"[0-9a-f]{64}")  # the Hub's cache names a file of weights by its SHA-256


def check_prompted_model(name: str, what: str, others: Sequence[str]) -> None:
    """Raise ModelError where `name` is no model folder, run folder or Hub name; `others` are the names that need none.

    Reads no weights and loads no torch; asks the Hub where the model is not on this machine.
    """
    from nbutils.models import CONFIGURATIONS

    near = did_you_mean(name, others)
    if name in CONFIGURATIONS:
        raise ModelError(
            f"{what} {name!r} is a configuration and has no weights. Give the run folder, the folder or the name of a "
            f"trained model, or one of {', '.join(others)}."
        )
    cure = f"Set {what} to a run folder, a model folder, a name on the Hub, or one of {', '.join(others)}. {near}"
    locate(model_of(name), ["config.json"], "model", cure)


class PromptedModel:
    """A causal model by run folder, model folder or Hub name, loaded when its weights are first needed.

    Ask `prompted_model` for one: two objects of one model hold its weights twice.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.source = model_of(name)
        self._told_of_cuts = False

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        from nbutils.data import load_tokenizer

        return load_tokenizer(self.source)

    @cached_property
    def model(self) -> PreTrainedModel:
        """In evaluation mode, without gradients; on a GPU in the precision it was published in, else in float32."""
        import torch
        from transformers.utils import logging as logging_of_transformers

        from nbutils.models import load_trained

        logging_of_transformers.disable_progress_bar()  # a bar for each judge is noise
        return load_trained(self.source, "auto" if torch.cuda.is_available() else "float32").requires_grad_(False)

    def release(self) -> None:
        """Let go of the weights."""
        vars(self).pop("model", None)

    @property
    def chats(self) -> bool:
        """Whether its tokenizer has a chat template."""
        return bool(self.tokenizer.chat_template)

    @cached_property
    def positions(self) -> int:
        """Tokens that a text may have."""
        from nbutils.models import build_config

        return getattr(build_config(self.source, 0, 0), "max_position_embeddings", None) or 1 << 30

    @cached_property
    def identity(self) -> str:
        """A hash of what decides its replies: weights, vocabulary, template, precision and kind of device."""
        from nbutils.models import weight_files

        files = weight_files(self.source) or (self.model and weight_files(self.source))
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        parts = [*map(_sha256, files), str(vocabulary), str(self.tokenizer.chat_template), _precision()]
        return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()

    def clean(self, text: str) -> str:
        """A text as a model may read it: no half characters, no special tokens."""
        text = text.encode("utf-8", "replace").decode()
        for token in self._special_tokens:
            text = text.replace(token, f"{token[:1]} {token[1:]}")
        return text

    @cached_property
    def _special_tokens(self) -> tuple[str, ...]:
        """Those with a role (BOS, EOS) and all that a template may use, as Llama's <|start_header_id|>."""
        added = (str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special)
        return tuple(dict.fromkeys((*self.tokenizer.all_special_tokens, *added)))

    def ids(self, text: str, front: bool = True) -> list[int]:
        """The tokens of a rendered text, whose special tokens count; in `front` the one BOS there is to be."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not front:
            return ids
        bos = self.tokenizer.bos_token_id
        own = self.tokenizer("", verbose=False)["input_ids"][:1] == [bos]  # what the tokenizer puts there by itself
        begin = 0
        while begin < len(ids) and ids[begin] == bos:
            begin += 1
        return [bos] * (begin > 0 or own) * (bos is not None) + ids[begin:]

    def chat(self, messages: Messages) -> str:
        """The chat as text, up to where the model goes on: after its own last turn, or at the start of one.

        Templates that refuse turns of one side in a row, or a system's, get them as one.
        """
        from jinja2 import TemplateError

        ours = messages[-1]["role"] == "assistant"
        settings = {"continue_final_message": True} if ours else {"add_generation_prompt": True}
        for turns in (messages, _one_user_turn(messages), _no_system(messages)):
            try:
                return self.tokenizer.apply_chat_template(turns, tokenize=False, **settings)
            except (TemplateError, ValueError) as error:
                refusal = error
        raise ModelError(f"The chat template of {self.name!r} cannot be used ({refusal}). Take another model.")

    def fitted(self, render: Callable[[str, str], str], prompt: str, completion: str, room: int) -> list[int]:
        """The tokens of render(prompt, completion), at most `room`.

        Where they are more, the prompt's beginning is left out, then the completion's end; the log tells once.
        Raises ModelError where there is no room even for the words around them.
        """
        prompt, completion = self.clean(prompt[-LONGEST_TEXT:]), self.clean(completion[:LONGEST_TEXT])
        ids = self.ids(render(prompt, completion))
        while len(ids) > room:
            if not prompt and not completion:
                raise ModelError(
                    f"{self.name!r} has {self.positions} positions, and what it is told takes {len(ids)} tokens before "
                    "any text. Take a model with more positions, or a shorter rubric."
                )
            if not self._told_of_cuts:
                self._told_of_cuts = True
                logger.warning("Texts are too long for the %s positions of %s, and are cut.", self.positions, self.name)
            over = len(ids) - room
            prompt, completion = self._cut(prompt, over, True), completion if prompt else self._cut(completion, over)
            ids = self.ids(render(prompt, completion))
        return ids

    def _cut(self, text: str, tokens: int, front: bool = False) -> str:
        """`text` without so many tokens at its end, or in `front`; at least a character shorter."""
        ids = self.ids(text, front=False)
        kept = ids[tokens:] if front else ids[: max(0, len(ids) - tokens)]
        cut = self.tokenizer.decode(kept, skip_special_tokens=True) if kept else ""
        most = max(0, len(text) - 1)
        return (cut[-most:] if front else cut[:most]) if most else ""


_SHARED: WeakValueDictionary[str, PromptedModel] = WeakValueDictionary()


def prompted_model(name: str) -> PromptedModel:
    """The model by run folder, model folder or Hub name; one object for all who have it at the same time."""
    source = str(model_of(name))
    found = _SHARED.get(source)
    if found is None:
        found = _SHARED[source] = PromptedModel(name)
    return found


def release_models() -> None:
    """Free the memory of all judges and teachers, and of whatever else nobody holds any more."""
    import torch

    for each in list(_SHARED.values()):
        each.release()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _sha256(path: Path) -> str:
    real = path.resolve()
    return real.name if BLOB.fullmatch(real.name) and real.parent.name == "blobs" else file_sha256(real)


def _precision() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu float32"


def _one_user_turn(messages: Messages) -> Messages:
    texts = "\n".join(turn["content"] for turn in messages if turn["role"] == "user")
    others = {turn["role"]: turn for turn in messages}
    return [turn | {"content": texts} if role == "user" else turn for role, turn in others.items()]


def _no_system(messages: Messages) -> Messages:
    system, *turns = _one_user_turn(messages)
    return [turns[0] | {"content": f"{system['content']}\n\n{turns[0]['content']}"}, *turns[1:]]
