"""Models, rubrics and servers for the tests of judges and correcting teachers."""

from __future__ import annotations

from pathlib import Path

import torch

from nbutils.interaction import chat_client
from nbutils.interaction.judges import JudgeLimits
from nbutils.interaction.prompts import Aspect

KEY = "sk-secret-0123456789"
ASPECTS = (Aspect("coherence", 0, 10), Aspect("instruction_following", 0, 10))
WEEKLY = "coherence: 7\nrepetition: 5\ninstruction_following: 10\nstyle: 0"
LIMITS = JudgeLimits(batch_size=4, timeout_seconds=10, retries=2)
TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}"
    "{% if loop.index0 and turn.role == messages[loop.index0 - 1].role %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}"
    "<|turn|>{{ turn.role }}\n{{ turn.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


def use_server(monkeypatch, url: str, key: str = KEY, model: str = "teacher-8b") -> None:
    """The settings of a server in the environment; little waiting between tries."""
    for name, value in ((chat_client.URL, url), (chat_client.MODEL, model), (chat_client.KEY, key), ("NO_PROXY", "*")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(chat_client, "FIRST_WAIT", 0.01)


def write_model(folder: Path, template: str = "", positions: int = 1024) -> Path:
    """A tiny model with random weights and its tokenizer; with a `template` one that chats, and has a BOS."""
    from nbutils.data.tokenization import train_byte_level_bpe
    from nbutils.models.loading import load_model

    text = "coherence: 1\nrepetition: instruction_following style Once upon a time there was a girl. Text story grades "
    tokenizer = train_byte_level_bpe([text * 4], 400)
    if template:
        tokenizer.add_special_tokens({"bos_token": "<|begin|>", "additional_special_tokens": ["<|turn|>", "<|end|>"]})
        tokenizer.chat_template = template
    torch.manual_seed(7)
    model = load_model("micro", tokenizer, positions, from_scratch=True, dropout=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # random predictions that differ from one text to the next
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
