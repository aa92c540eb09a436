"""The spelling probe: right answers, no help for who does not know the word, the tokenizer's own words."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from real_data import REAL_DATA, needs_real_data

from nbutils.data.tokenization import character_tokenizer, load_tokenizer, train_byte_level_bpe
from nbutils.evaluation.harness import SPELLING, evaluate_tasks
from nbutils.evaluation.harness.settings import read_rows
from nbutils.evaluation.harness.spelling import own_words, write_spelling
from nbutils.foundation.errors import ParameterError

QUESTION = {
    "spelling_count": re.compile(r"How many times does the letter (\w) occur in (\w+)\?"),
    "spelling_first_index": re.compile(r"At which position is the first (\w) in (\w+), counting from 1\?"),
    "spelling_character": re.compile(r"What is letter (\d+) of (\w+)\?"),
}
RIGHT = {
    "spelling_count": lambda letter, word: str(sum(each == letter for each in word)),
    "spelling_first_index": lambda letter, word: str(len(word.split(letter)[0]) + 1),
    "spelling_character": lambda place, word: word[int(place) - 1 : int(place)],
}


@pytest.fixture(scope="module")
def tokenizer():
    """Some hundred made-up words, each often enough to be a token after a space."""
    import random

    generator = random.Random(0)
    words = sorted({"".join(generator.choices("abcdeilnorst", k=generator.choice((4, 5, 6)))) for _ in range(400)})
    return train_byte_level_bpe([" ".join(words)] * 4, 5000)


def probe(folder: Path, tokenizer, seed: int = 0, items: int = 0) -> dict[str, dict[str, list[dict]]]:
    write_spelling(folder, tokenizer, seed, items)
    return {
        task: {split: read_rows(folder / task / f"{split}.jsonl") for split in ("validation", "train")}
        for task in SPELLING
    }


def check_answers(rows: dict[str, dict[str, list[dict]]]) -> None:
    for task, by_split in rows.items():
        for row in (*by_split["validation"], *by_split["train"]):
            asked, word = QUESTION[task].fullmatch(row["question"]).groups()
            assert word == row["word"]
            assert row["choices"][row["gold"]] == RIGHT[task](asked, word), row
            assert len(set(row["choices"])) == len(row["choices"])


def check_chance(task: str, rows: list[dict]) -> None:
    """Whoever sees all of an item but the word is right in one of `choices` cases, whatever the rule."""
    seen = defaultdict(Counter)
    for row in rows:
        asked, word = QUESTION[task].fullmatch(row["question"]).groups()
        known = (tuple(row["choices"]), word) if task == "spelling_character" else (asked, len(word))
        seen[known][row["gold"]] += 1
    for golds in seen.values():
        assert set(golds) == set(range(len(rows[0]["choices"]))) and len(set(golds.values())) == 1


def test_answers_are_right_and_nothing_but_the_word_tells_them(tokenizer, tmp_path):
    rows = probe(tmp_path, tokenizer)
    check_answers(rows)
    for task, by_split in rows.items():
        check_chance(task, by_split["validation"])
        scored, examples = ({row["word"] for row in by_split[split]} for split in ("validation", "train"))
        assert not scored & examples and len(by_split["validation"]) >= 24


def test_words_are_tokens_after_a_space(tokenizer, tmp_path):
    words = own_words(tokenizer)
    assert len(words) >= 200 and all(word.isascii() and word.islower() and 4 <= len(word) <= 14 for word in words)
    ids = tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"]
    assert all(len(row) == 1 for row in ids)
    for row in probe(tmp_path, tokenizer)["spelling_count"]["validation"][:20]:
        tokens = tokenizer.tokenize(f"Question: {row['question']}\nAnswer:")
        assert f"Ġ{row['word']}" in tokens


def test_the_same_tokenizer_and_seed_give_the_same_items(tokenizer, tmp_path):
    first, again = (probe(tmp_path / name, tokenizer, seed=1) for name in "ab")
    assert first == again != probe(tmp_path / "c", tokenizer, seed=2)
    fewer = probe(tmp_path / "d", tokenizer, seed=1, items=13)
    assert all(9 <= len(by_split["validation"]) <= 13 for by_split in fewer.values())
    check_chance("spelling_character", fewer["spelling_character"]["validation"])


def test_a_vocabulary_without_words_is_refused(tmp_path):
    with pytest.raises(ParameterError, match=r"has 0 words of 4 to 14 letters.*Take spelling out of tasks"):
        write_spelling(tmp_path, character_tokenizer(["no words, letters alone"]), 0)


def test_the_harness_scores_the_probe(tokenizer, tmp_path):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from nbutils.evaluation.harness.loading import load_tasks

    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": None}
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=256, n_embd=16, n_layer=1, n_head=2, **ends)
    result = evaluate_tasks(GPT2LMHeadModel(config), tokenizer, "spelling", few_shot=1, items=24)
    sizes = result.items.groupby("task").size()
    assert set(sizes.index) == set(SPELLING) and (sizes <= 24).all() and (sizes >= 16).all()
    for number in ("acc", "gold_bits_per_byte"):
        parts = [result.numbers[f"{task}_{number}"] for task in SPELLING]
        assert result.numbers[f"spelling_{number}"] == pytest.approx(sum(parts) / 3)
    assert (result.items["gold_bytes"] == 2).all()  # a space and a letter or digit
    examples = len(probe(tmp_path, tokenizer)["spelling_count"]["train"])
    with pytest.raises(ParameterError, match=f"few_shot is {examples + 1}, but there are {examples} examples"):
        load_tasks(["spelling_count"], tokenizer, few_shot=examples + 1)


@needs_real_data
def test_a_real_vocabulary_has_words_for_a_whole_probe(tmp_path):
    tokenizer = load_tokenizer(Path(REAL_DATA, "tokenizers", "gpt2"))
    rows = probe(tmp_path, tokenizer)
    check_answers(rows)
    for task, by_split in rows.items():
        check_chance(task, by_split["validation"])
        assert len(by_split["validation"]) == 600 and len(by_split["train"]) == 24
    assert {len(by_split["validation"][0]["choices"]) for by_split in rows.values()} == {3, 4}
    assert "strawberry" in own_words(tokenizer)
