"""Tokenizers: python -m pytest tests/test_tokenization.py"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from real_data import REAL_DATA, needs_real_data

from nbutils.data.bytes_of_tokens import token_bytes, token_lengths
from nbutils.data.tokenization import (
    END_TOKEN,
    SPELLING,
    UNKNOWN_TOKEN,
    character_tokenizer,
    check_tokenizer,
    load_tokenizer,
    make_tokenizer,
    tokenize,
    train_byte_level_bpe,
    train_unigram,
)
from nbutils.foundation.errors import ModelError

TEXTS = [
    "The default value is None.\n\n  If it is not, the value is used.",
    "Grüße, 日本 and \U0001f600: every text goes through.\r\n",
    "x" * 3000,
    "special tokens in a text: <|endoftext|> and <|unknown|> ",
]
STRANGE = [*TEXTS, "", " ", "\n\n\n", "\x07 bell", "e\u0301 is two code points", "unseen: ʘ"]


@pytest.fixture(params=["train", "characters", "unigram"])
def own(request: pytest.FixtureRequest):
    return make_tokenizer(request.param, TEXTS, vocab_size=400)


def test_own_tokenizers_lose_nothing(own) -> None:
    assert [own.decode(ids) for ids in tokenize(TEXTS, own)] == TEXTS


@pytest.mark.parametrize(("train", "size"), [(train_byte_level_bpe, 260), (train_unigram, 300)])
def test_trained_tokenizers_encode_what_they_never_saw(train, size: int) -> None:
    tokenizer = train(["abc"], size)
    assert [tokenizer.decode(ids) for ids in tokenize(STRANGE, tokenizer)] == STRANGE


def test_every_byte_of_a_text_is_in_a_unigram_token() -> None:
    texts = [*STRANGE, "<0x41> and <0xE2><0x96> spelt out", "tab\tand  two   spaces", "".join(map(chr, range(256)))]
    tokenizer = train_unigram(TEXTS, 400)
    lengths = token_lengths(tokenizer, len(tokenizer))
    pieces = token_bytes(tokenizer)
    for text, ids in zip(texts, tokenize(texts, tokenizer), strict=True):
        assert lengths[ids].sum() == len(text.encode())
        assert b"".join(pieces[number] for number in ids) == text.encode()
        assert tokenizer.unk_token_id not in ids


def test_unigram_encodes_as_sentencepiece_does() -> None:
    """The same pieces, most probable first, and the same cuts as SentencePiece's own encoder makes with its model."""
    import io

    import sentencepiece

    choose = random.Random(0)
    words = [f"{a}{b}" for a in ("token", "block", "split", "größ") for b in ("ise", "ing", "er", "en")]
    text = " ".join(choose.choices(words, k=3000))
    model = io.BytesIO()
    settings = {"model_type": "unigram", "byte_fallback": True, "hard_vocab_limit": False, "num_threads": 4}
    settings |= {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}
    sentences = iter([text[begin : begin + 500] for begin in range(0, len(text), 500)])
    settings |= {"bos_id": -1, "eos_id": -1, "minloglevel": 2, "required_chars": SPELLING}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_writer=model, vocab_size=330, **settings
    )
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ours = train_unigram((text[begin : begin + 500] for begin in range(0, len(text), 500)), 331)
    assert len(ours) == len(theirs) + 1
    pieces = [theirs.id_to_piece(number) for number in range(257, len(theirs))]
    assert ours.convert_ids_to_tokens(range(257, len(theirs))) == pieces
    assert "\u2581block" in pieces and "ing" in pieces
    sample = " ".join(choose.choices(words, k=50)) + " unseen, ʘ!"
    assert ours.convert_ids_to_tokens(tokenize([sample], ours)[0]) == theirs.encode(sample, out_type=str)


def test_unigram_learns_from_text_of_one_long_line_and_not_across_lines() -> None:
    """A text without a line end is cut for training, none of it passed over."""
    tokenizer = train_unigram(["first words " + "filling " * 2000 + "lastly " * 500], 320)
    vocabulary = tokenizer.get_vocab()
    assert "\u2581lastly" in vocabulary and "\u2581filling" in vocabulary
    assert not any("\n" in piece for piece in train_unigram(["ab\ncd\n" * 500], 300).get_vocab())


def test_end_token_is_last_single_and_never_made_from_text(own) -> None:
    assert own.eos_token == own.pad_token == END_TOKEN
    assert own.eos_token_id == own.pad_token_id == len(own) - 1
    assert not any(own.eos_token_id in ids for ids in tokenize(TEXTS, own))
    assert own.encode(END_TOKEN) == [own.eos_token_id]


def test_own_tokenizers_survive_saving(own, tmp_path: Path) -> None:
    own.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.get_vocab() == own.get_vocab()
    assert (loaded.eos_token_id, loaded.pad_token_id, loaded.unk_token) == (
        own.eos_token_id,
        own.pad_token_id,
        own.unk_token,
    )
    for before, after in zip(tokenize(STRANGE, own), tokenize(STRANGE, loaded), strict=True):
        assert before.tolist() == after.tolist()
    assert [loaded.decode(ids) for ids in tokenize(TEXTS, loaded)] == TEXTS


def test_character_vocabulary_is_sorted_and_unknown_characters_are_seen() -> None:
    tokenizer = character_tokenizer(["banana\n", "bread"])
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == [*"\nabdenr", UNKNOWN_TOKEN, END_TOKEN]
    (ids,) = tokenize(["bad\nxx!"], tokenizer)
    unknown = tokenizer.unk_token_id
    assert ids.tolist() == [2, 1, 3, 0, unknown, unknown, unknown]


def test_byte_level_vocabulary_has_the_size_asked_for() -> None:
    words = [f"{a}{b}" for a in ("token", "block", "split") for b in ("ise", "ing", "er")]
    text = " ".join(random.Random(0).choices(words, k=2000))
    assert len(train_byte_level_bpe([text], 280)) == 280
    assert len(train_byte_level_bpe(["ab"], 1000)) < 300  # nothing left to merge


@pytest.mark.parametrize("train", ["train_byte_level_bpe", "train_unigram"])
def test_training_is_deterministic(train: str) -> None:
    script = (
        f"import random; from nbutils.data.tokenization import {train};"
        "choose = random.Random(0); texts = [' '.join(choose.choices(dir(str), k=200)) for _ in range(50)];"
        f"tokenizer = {train}(texts, 400); "
        "print(sorted(tokenizer.get_vocab().items()), tokenizer.backend_tokenizer.to_str())"
    )
    outputs = []
    for threads in "12":
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        outputs.append(subprocess.check_output([sys.executable, "-c", script], env=environment))
    assert outputs[0] == outputs[1]


def test_tokenize_leaves_forked_processes_alone(monkeypatch: pytest.MonkeyPatch, own) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    tokenize(["a"], own)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    tokenize(["a"], own)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


# ---- bad input


def test_vocabulary_too_small_for_bytes() -> None:
    with pytest.raises(ModelError, match=r"vocab_size 256 is too small.*257.*characters"):
        check_tokenizer("train", 256)
    check_tokenizer("train", 257)
    check_tokenizer("characters", 0)
    with pytest.raises(ModelError, match=r"vocab_size 283 is too small for a Unigram tokenizer.*Raise vocab_size"):
        check_tokenizer("unigram", 283)
    check_tokenizer("unigram", 284)


def test_unigram_vocabulary_too_small_for_the_characters_of_the_text() -> None:
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 200)))
    with pytest.raises(ModelError, match=r"vocab_size 300 cannot be trained.*Raise vocab_size, give more text"):
        train_unigram([text], 300)
    with pytest.raises(ModelError, match="cannot be trained"):
        train_unigram(["\n"], 300)


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"{tmp_path} is not a tokenizer folder.*save_pretrained"):
        check_tokenizer(str(tmp_path), 0)
    with pytest.raises(ModelError, match="is not a tokenizer folder"):
        load_tokenizer("./no/such/folder")


def test_damaged_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {')
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_hub_name_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    def no_network(*_: object, **__: object) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(HfApi, "model_info", no_network)
    with pytest.raises(ModelError, match=r"'nobody/nothing'.*Name or service not known.*folder written by save_pretr"):
        check_tokenizer("nobody/nothing", 0)


def test_tokenizer_without_an_end_token(tmp_path: Path) -> None:
    tokenizer = character_tokenizer(["abc"])
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"names no end token.*Add \"eos_token\""):
        load_tokenizer(tmp_path)


def test_published_tokenizers_get_a_pad_token_and_add_nothing(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = character_tokenizer(["abc"])
    begin = [(END_TOKEN, tokenizer.eos_token_id)]
    template = TemplateProcessing(single=f"{END_TOKEN} $A", special_tokens=begin)  # as Llama 3 begins every text
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded("a")["input_ids"] == [4, 0]
    assert [ids.tolist() for ids in tokenize(["a", "cab"], loaded)] == [[0], [2, 0, 1]]
    assert loaded.pad_token_id == loaded.eos_token_id == 4


def test_code_from_outside_is_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["code.Own", null]}}')
    (tmp_path / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    assert not ran.exists()


# ---- published tokenizers


@needs_real_data
@pytest.mark.parametrize(
    ("folder", "size", "hello", "end", "pad"),
    [
        ("tokenizers/gpt2", 50_257, [15496, 995], 50_256, 50_256),
        ("tokenizers/llama3", 128_256, [9906, 1917], 128_001, 128_001),
        ("models/stories260k_llama", 512, None, 2, 2),
    ],
)
def test_published_tokenizers(folder: str, size: int, hello: list[int] | None, end: int, pad: int) -> None:
    tokenizer = load_tokenizer(f"{REAL_DATA}/{folder}")
    (ids,) = tokenize(["Hello world"], tokenizer)
    assert hello is None or ids.tolist() == hello  # and no token before or after
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id) == (size, end, pad)
    (ids,) = tokenize([f"text {tokenizer.eos_token} text"], tokenizer)
    assert end not in ids


@needs_real_data
def test_tinyshakespeare_has_65_characters() -> None:
    text = Path(REAL_DATA, "tinyshakespeare/input.txt").read_text(encoding="utf-8")
    tokenizer = character_tokenizer([text[: int(0.9 * len(text))]])
    assert len(tokenizer) == 65 + 2
    (ids,) = tokenize([text], tokenizer)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text
