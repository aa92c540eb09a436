"""Documents made fit for training: cleaned, without duplicates, split, and the splits checked for leakage.

Everything here is a function of the documents alone: the same corpus gives the same splits on any machine. Duplicates
go before the split, since a copy on the other side of it would be leakage.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import pairwise

import numpy as np

from nbutils.data.corpora import SPLITS, Document
from nbutils.data.text_corpora import join_lines
from nbutils.foundation import CorpusError

CLEAN = ("standard", "newlines", "none")
DEDUP = ("near", "exact", "off")
SPLIT = ("hash", "given", "counts", "contiguous")

# FineWeb's setting: word 5-grams, 14 bands of 8 hashes. A pair of Jaccard similarity s is found with probability
# 1 - (1 - s^8)^14: .05 at s = .5, .56 at .7, .92 at .8, 1.00 at .9
SHINGLE_WORDS = 5
BANDS, HASHES_PER_BAND = 14, 8
SHINGLES_AT_ONCE = 8192  # bounds the memory of a novel's shingles x hashes matrix

LEAKAGE_WORDS = 13  # as GPT-3 and lm-eval decontaminate
HASH_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # any odd number that spreads bits; this is 2^64 / golden ratio
HELD_OUT_SHARE = 0.1  # of validation, and of test
CONTIGUOUS_TRAIN_SHARE = 0.9  # nanoGPT's


@dataclass(frozen=True)
class Duplicate:
    """A document that was dropped, the earlier one that was kept for it, and their Jaccard similarity by MinHash."""

    dropped: str
    kept: str
    similarity: float
    exact: bool


# ---- cleaning --------------------------------------------------------------------------------------------------------


def clean_text(text: str) -> str:
    """One space between words, no space at the ends of lines, no empty lines."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def clean_documents(
    documents: Iterable[Document], clean: str = "standard", ascii_only: bool = False, minimum_characters: int = 128
) -> list[Document]:
    """The documents cleaned, those of under `minimum_characters` left out.

    clean="none" leaves whitespace and short documents as they are (empty ones go all the same); "newlines" does so too,
    but for a space in place of each line end; `ascii_only` drops every character outside ASCII and works with all.
    Raises CorpusError where no document is left.
    """
    cleaned = []
    longest = 0
    for document in documents:
        text = tidy_text(document.text, clean, ascii_only)
        longest = max(longest, len(text))
        if is_long_enough(text, clean, minimum_characters):
            cleaned.append(replace(document, text=text))
    if not cleaned:
        raise CorpusError(none_left(longest, minimum_characters))
    return cleaned


def tidy_text(text: str, clean: str, ascii_only: bool) -> str:
    """One document's text as `clean_documents` has it, however short."""
    tidy = {"standard": clean_text, "newlines": join_lines, "none": str}[clean]
    return tidy(text.encode("ascii", "ignore").decode() if ascii_only else text)


def is_long_enough(text: str, clean: str, minimum_characters: int) -> bool:
    """Whether a tidied text stays."""
    return bool(text) and (clean != "standard" or len(text) >= minimum_characters)


def none_left(longest: int, minimum_characters: int) -> str:
    """Why cleaning left nothing, and what to do."""
    return (
        f"Cleaning left no document: the longest has {longest} characters, minimum_characters is {minimum_characters}. "
        "Lower minimum_characters, or set clean to none."
    )


# ---- duplicates ------------------------------------------------------------------------------------------------------


def remove_duplicates(documents: Sequence[Document], dedup: str = "near") -> tuple[list[Document], list[Duplicate]]:
    """The documents without copies, and what was dropped. Of each cluster the first document stays.

    dedup: "exact" drops equal texts; "near" also those that MinHash finds alike, where alike is passed on (if A is like
    B and B like C, one of the three stays); "off" drops nothing. Case and punctuation do not count.
    """
    if dedup == "off":
        return list(documents), []
    first: dict[str, Document] = {}
    duplicates = []
    for document in documents:
        kept = first.setdefault(document.text, document)
        if kept is not document:
            duplicates.append(Duplicate(document.name, kept.name, 1.0, exact=True))
    unique = list(first.values())
    if dedup == "exact":
        return unique, duplicates
    leaders, similarities = _near_duplicates(unique)
    for number, leader in enumerate(leaders):
        if leader != number:
            dropped, kept = unique[number].name, unique[leader].name
            duplicates.append(Duplicate(dropped, kept, similarities[number], exact=False))
    return [unique[number] for number, leader in enumerate(leaders) if leader == number], duplicates


def _near_duplicates(documents: Sequence[Document]) -> tuple[list[int], dict[int, float]]:
    """For each document the first of its cluster (itself where it is that), and the similarity of the others to it."""
    from datasketch import MinHash, MinHashLSH

    empty = MinHash(BANDS * HASHES_PER_BAND, hashfunc=int)  # the shingles come hashed
    index = MinHashLSH(num_perm=BANDS * HASHES_PER_BAND, params=(BANDS, HASHES_PER_BAND))
    hashes = WordHashes()
    sketches = []
    leaders = list(range(len(documents)))
    for number, document in enumerate(documents):
        shingles = np.unique(_shingles(document.text, hashes) & np.uint64(0xFFFFFFFF))
        sketches.append(empty.copy())
        for begin in range(0, len(shingles), SHINGLES_AT_ONCE):
            sketches[number].update_batch(shingles[begin : begin + SHINGLES_AT_ONCE])
        if len(shingles):  # texts without a single word would all look the same
            for other in index.query(sketches[number]):
                here, there = _leader(leaders, number), _leader(leaders, other)
                leaders[max(here, there)] = min(here, there)
            index.insert(number, sketches[number])
    leaders = [_leader(leaders, number) for number in range(len(documents))]
    pairs = ((number, leader) for number, leader in enumerate(leaders) if leader != number)
    return leaders, {number: float(sketches[number].jaccard(sketches[leader])) for number, leader in pairs}


def _leader(leaders: list[int], number: int) -> int:
    while leaders[number] != number:
        leaders[number] = leaders[leaders[number]]  # shortens the way for the next call
        number = leaders[number]
    return number


def _shingles(text: str, hashes: WordHashes) -> np.ndarray:
    words = split_words(text)
    return ngram_hashes(words, min(SHINGLE_WORDS, max(1, len(words))), hashes)


# ---- word n-grams ----------------------------------------------------------------------------------------------------


def split_words(text: str) -> list[str]:
    """Lower-case words: runs of letters, digits and underscores."""
    return re.findall(r"\w+", text.lower())


class WordHashes(dict[str, int]):
    """Word -> 64 bits of blake2b, computed once a word."""

    def __missing__(self, word: str) -> int:
        self[word] = int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little")
        return self[word]


def ngram_hashes(words: Sequence[str], length: int, hashes: WordHashes) -> np.ndarray:
    """A 64-bit hash of each run of `length` words, in order; uint64 of shape (max(0, words - length + 1),)."""
    values = np.fromiter((hashes[word] for word in words), np.uint64, len(words))
    count = max(0, len(words) - length + 1)
    total = np.zeros(count, np.uint64)
    for offset in range(length):
        total = total * HASH_MULTIPLIER + values[offset : offset + count]  # wraps at 2^64
    return total


# ---- splits ----------------------------------------------------------------------------------------------------------


def split_documents(
    documents: Sequence[Document],
    split: str = "hash",
    subset_train: int = 0,
    subset_val: int = 0,
    subset_test: int = 0,
    held_out_share: float = HELD_OUT_SHARE,
) -> list[Document]:
    """The documents with their `split` set; within a split they keep their order.

    split:
      hash        by a hash of the text, `held_out_share` to validation and as much to test: equal texts never part, new
                  documents move none
      given       as the corpus says; subset_train, subset_val and subset_test, where not 0, are the most of each
      counts      exactly subset_train, subset_val and subset_test documents, by the same hash; the rest is left out
      contiguous  one running text. Its first 90 % of characters train, the rest validates, a document across the cut
                  becomes two; a corpus that has its own splits keeps them
    Raises CorpusError where train or validation stay empty (with hash also test), or documents are too few.
    """
    counts = {"train": subset_train, "validation": subset_val, "test": subset_test}
    if split == "contiguous":
        divided = _split_running_text(documents)
    elif split == "counts":
        divided = _split_by_counts(documents, counts)
    elif split == "hash":
        divided = [
            replace(document, split=split_at(text_position(document.text), held_out_share)) for document in documents
        ]
    else:
        divided = _take_given(documents, counts)
    return require_splits(divided, SPLITS if split == "hash" else SPLITS[:2], f"split={split}")


def require_splits(documents: list[Document], needed: Sequence[str], cause: str) -> list[Document]:
    """The documents, if none of the splits `needed` is empty. Raises CorpusError that names the `cause`."""
    check_filled({document.split for document in documents}, needed, f"{cause} of {len(documents)} documents")
    return documents


def check_filled(filled: Collection[str], needed: Sequence[str], cause: str) -> None:
    """Raises CorpusError that names the `cause`, where one of the splits `needed` is not among those `filled`."""
    if missing := [name for name in needed if name not in filled]:
        raise CorpusError(
            f"{cause} leaves {' and '.join(missing)} empty. Give more documents, or divide them with split=counts."
        )


def text_position(text: str) -> float:
    """Where a text falls in [0, 1): the top 53 bits of blake2b of its UTF-8 bytes, so the same on any machine."""
    return position_of(text_hash(text))


def text_hash(text: str) -> int:
    """64 bits of blake2b of the text's UTF-8 bytes."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


def position_of(hashed: int) -> float:
    """`text_position` of a text's hash."""
    return (hashed >> 11) / 2**53


def split_at(position: float, held_out_share: float) -> str:
    """The split of split=hash at a `text_position`: train, then validation, then as much of test."""
    if position < 1 - 2 * held_out_share:
        return "train"
    return "validation" if position < 1 - held_out_share else "test"


def _split_by_counts(documents: Sequence[Document], counts: dict[str, int]) -> list[Document]:
    wanted = sum(counts.values())
    if wanted > len(documents):
        asked = " + ".join(str(count) for count in counts.values())
        raise CorpusError(
            f"split=counts asks for {asked} = {wanted} documents, but {len(documents)} are left after cleaning and "
            "duplicate removal. Lower subset_train, subset_val or subset_test, or raise max_documents."
        )
    order = sorted(range(len(documents)), key=lambda number: text_position(documents[number].text))
    names = [name for name, count in counts.items() for _ in range(count)]
    chosen = dict(zip(order, names, strict=False))  # more documents than names: the rest is left out
    return [replace(documents[number], split=chosen[number]) for number in sorted(chosen)]


def _take_given(documents: Sequence[Document], most: dict[str, int]) -> list[Document]:
    """The documents with the corpus's own splits; of each at most so many, chosen by the hash of their texts."""
    _check_given(documents)
    kept: set[int] = set()
    for split in SPLITS:
        numbers = [number for number, document in enumerate(documents) if document.split == split]
        if most[split]:
            numbers = sorted(numbers, key=lambda number: text_position(documents[number].text))[: most[split]]
        kept.update(numbers)
    return [documents[number] for number in sorted(kept)]


def _check_given(documents: Sequence[Document]) -> list[Document]:
    if without := [document.name for document in documents if not document.split]:
        raise CorpusError(
            f"split=given needs a corpus with splits of its own, but {len(without)} of {len(documents)} documents have "
            f"none ({without[0]!r} is one). Set split to hash, counts or contiguous."
        )
    return list(documents)


def _split_running_text(documents: Sequence[Document]) -> list[Document]:
    """Joined, the texts of a split are its running text; documents that end in mid-line get the line end they lack.

    Not where whitespace parts them as it is, nor at the end of a split.
    """
    *before, last = documents
    parted = [
        d.text[-1:].isspace() or after.text[:1].isspace() or d.split != after.split for d, after in pairwise(documents)
    ]
    ended = [d if apart else replace(d, text=d.text + "\n") for d, apart in zip(before, parted, strict=True)] + [last]
    if any(document.split for document in documents):
        return _check_given(ended)
    cut = int(CONTIGUOUS_TRAIN_SHARE * sum(len(document.text) for document in ended))
    divided, begin = [], 0
    for document in ended:
        middle = max(0, cut - begin)
        pieces = {"train": document.text[:middle], "validation": document.text[middle:]}
        divided += [replace(document, text=text, split=name) for name, text in pieces.items() if text]
        begin += len(document.text)
    return divided


# ---- leakage ---------------------------------------------------------------------------------------------------------


def measure_leakage(documents: Sequence[Document], length: int = LEAKAGE_WORDS) -> dict[str, dict[str, float]]:
    """How much of validation and test stands in train word for word, in runs of `length` words.

    Per split: `ngrams`, `seen_ngrams` and their share `ngram_share`; `documents`, `touched_documents` (with at least
    one seen run) and their share `document_share`. Case and punctuation do not count; every occurrence does.
    """
    hashes = WordHashes()
    grams = {
        name: [ngram_hashes(split_words(d.text), length, hashes) for d in documents if d.split == name]
        for name in SPLITS
    }
    seen_in_train = np.unique(np.concatenate([np.zeros(0, np.uint64), *grams["train"]]))
    table = {}
    for name in SPLITS[1:]:
        if not grams[name]:
            continue
        owner = np.repeat(np.arange(len(grams[name])), [len(values) for values in grams[name]])
        seen = np.isin(np.concatenate(grams[name]), seen_in_train)
        touched = len(np.unique(owner[seen]))
        table[name] = {
            "ngrams": len(seen),
            "seen_ngrams": int(seen.sum()),
            "ngram_share": float(seen.mean()) if len(seen) else 0.0,
            "documents": len(grams[name]),
            "touched_documents": touched,
            "document_share": touched / len(grams[name]),
        }
    return table
