"""What every arm is asked once it has learned, however it learned: as settings, without torch.

Of a test block the first half is the prompt and the other the room for the response, each at most MOST_TOKENS; of
stories their prompt file says how long they may be.
"""

from __future__ import annotations

from dataclasses import replace

from nbutils.interaction.prompts import read_story
from nbutils.interaction.settings import CONTEXTS, STORY, Interaction

RUBRICS = {CONTEXTS: "weekly", STORY: "story"}  # whatever an arm learned by
MOST_TOKENS = 256  # of a context, its end token included, and of a response to it


def held_out(settings: Interaction, kind: str, block_size: int) -> Interaction:
    """`settings` with the prompts of `kind`, and as many tokens as those and their responses may have."""
    half = block_size // 2
    tokens = min(MOST_TOKENS, half) - 1, min(MOST_TOKENS, block_size - half)
    if kind == STORY:
        tokens = 0, read_story().max_new_tokens
    return replace(settings, prompts=kind, prompt_tokens=tokens[0], response_tokens=tokens[1])
