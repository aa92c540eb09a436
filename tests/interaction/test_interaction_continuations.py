"""Continuations in context: nothing is gained or lost where a prompt and what follows it meet."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from small_interaction import settings, student
from small_judges import LIMITS
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from nbutils.data.tokenization import character_tokenizer, train_byte_level_bpe, train_unigram
from nbutils.interaction import rounds
from nbutils.interaction.continuations import as_text, text_after, tokens_after
from nbutils.interaction.correction import make_corrector
from nbutils.interaction.correctors import Corrections
from nbutils.interaction.policy import PolicyModel
from nbutils.interaction.rounds import RoundMaker

STORY = 'Anna grabbed his blue hat. "Oh no", said Bob there.\nThe end'
TEXTS = ["lue hat", " lue hat", " there", "\nThe end", '"Oh', "", "d. said", "  two spaces", "<s>there"]


def sentencepiece_bpe(collapses: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of Llama 2's kind: a space before every text, which decoding drops; or T5's, one space for many."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    parts = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    if collapses:
        parts = [normalizers.Replace("\n", " "), normalizers.Strip(), *parts]
    tokenizer.normalizer = normalizers.Sequence(parts)
    restored = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(restored)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([STORY.replace("\n", " "), *(text.strip() for text in TEXTS)] * 3, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # bytes are written, what is special is not
    tokenizer = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


TOKENIZERS = {
    "sentencepiece": sentencepiece_bpe,
    "bytes": lambda: train_byte_level_bpe([STORY] * 3, 300),
    "unigram": lambda: train_unigram([STORY * 3], 400),
    "characters": lambda: character_tokenizer([STORY, *TEXTS]),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_continuation_is_the_same_text_where_it_follows(name):
    """Behind an end token, too, where a text begins and SentencePiece's own space is right."""
    tokenizer = TOKENIZERS[name]()
    end = tokenizer.eos_token_id
    started = tokenizer.encode("Anna grabbed his b", add_special_tokens=False)
    for prompt in ([*started], [end, *started], [*started, end, *started], [end], [*started, end]):
        prompt = np.array(prompt)
        parted = "\n\n" if prompt[-1] == end and len(prompt) > 1 else ""
        for text in TEXTS:
            tokens = tokens_after(tokenizer, prompt, text)
            assert end not in tokens and tokenizer.bos_token_id not in tokens.tolist()
            whole = as_text(tokenizer, np.concatenate([prompt, tokens]))
            assert whole == as_text(tokenizer, prompt) + (parted if text else "") + text, (name, prompt, text)
            assert text_after(tokenizer, prompt, tokens) == text


def test_a_tokenizer_that_makes_one_space_of_many_gains_none():
    tokenizer = sentencepiece_bpe(collapses=True)
    prompt = np.array(tokenizer.encode("Anna grabbed his b", add_special_tokens=False))
    for text in ("lue hat", " there"):
        assert as_text(tokenizer, np.concatenate([prompt, tokens_after(tokenizer, prompt, text)])).endswith(f"b{text}")


def test_what_a_tokenizer_cannot_write_is_still_put_in_context():
    tokenizer = sentencepiece_bpe()
    tokenizer.backend_tokenizer.model.byte_fallback = False
    prompt = np.array(tokenizer.encode("Anna grabbed his b", add_special_tokens=False))
    lossy = tokens_after(tokenizer, prompt, "lue ж hat")
    assert tokenizer.unk_token_id in lossy
    assert as_text(tokenizer, np.concatenate([prompt, lossy])).startswith("Anna grabbed his blue")


# ---- rounds ----------------------------------------------------------------------------------------------------------


class WritesOn:
    """A teacher that ends the word the prompt is in, and goes on."""

    name = "toy"

    def correct(self, prompts, completions, references, round, max_tokens=0) -> Corrections:
        many = np.ones(len(prompts), bool)
        return Corrections(("lue hat",) * len(many), many, ~many, ("",) * len(many), 2 * len(many))


@pytest.fixture
def made(tmp_path):
    """corrector -> (tokenizer, the only block, the example made of it) of a SentencePiece student."""
    tokenizer = sentencepiece_bpe()
    data = SimpleNamespace(tokenizer=tokenizer)
    prompt = np.array(tokenizer.encode("Anna grabbed his b", add_special_tokens=False))
    response = np.array(tokenizer.convert_tokens_to_ids(list("luehat")))
    blocks = [{"input_ids": np.concatenate([prompt, response])}]
    lengths = {"prompt_tokens": len(prompt), "response_tokens": len(response), "prompts_per_round": 1}
    given = settings("sft", min_response_tokens=len(response), **lengths)

    def round_of(corrector):
        policy = PolicyModel(student(data, positions=64), given)
        maker = RoundMaker(given, policy, tokenizer, blocks, tmp_path, None, corrector, 0, 8)
        return tokenizer, blocks[0]["input_ids"], maker.make(0, 0)[0]

    return round_of


def test_a_round_joins_the_correction_to_its_prompt(made, tmp_path):
    tokenizer, _, example = made(WritesOn())
    assert tokenizer.decode(example["input_ids"], skip_special_tokens=True) == "Anna grabbed his blue hat"
    kept = json.loads((tmp_path / rounds.SAMPLES).read_text().splitlines()[0])
    assert kept["prompt"] + kept["correction"] == "Anna grabbed his blue hat"


def test_what_a_person_wrote_is_learned_as_it_stands(made):
    """Read again, the characters would be other tokens: they are split here, as no tokenizer would."""
    _, block, example = made(make_corrector("human", limits=LIMITS))
    assert example["input_ids"][1:].tolist() == block.tolist()
