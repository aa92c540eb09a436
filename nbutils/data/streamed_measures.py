"""What can be known of a corpus that is read once and never held: exact copies, and a sample of the leakage."""

from __future__ import annotations

import numpy as np

from nbutils.data.documents import LEAKAGE_WORDS, WordHashes, ngram_hashes, split_words
from nbutils.data.sources import SPLITS

FIRST_SLOTS = 1 << 16
LARGEST_SAMPLE = 1 << 23  # runs of words kept of a split: 64 MiB of hashes
MOST_WORDS = 1 << 20  # whose hashes are kept for the next document
ALL = 1 << 64  # of the hashes
MOST_ARRAYS = 4096  # that are kept apart; each takes some hundred bytes beside its numbers


class SeenTexts:
    """Which document had a text first, by 64-bit hash: 24 bytes a document at most, all that grows with a corpus.

    Of 10 million documents the chance that any two texts share a hash is 3 in a million; one of them would go.
    """

    def __init__(self) -> None:
        self._hashes, self._numbers, self._used = self._slots(FIRST_SLOTS)

    def first(self, hashed: int, number: int) -> int:
        """The number given with this hash the first time; `number` itself, if that is now."""
        hashed = hashed or 1  # an empty slot is 0
        if 2 * self._used >= len(self._hashes):
            self._grow()
        slot = self._slot(hashed)
        if not self._hashes[slot]:
            self._hashes[slot], self._numbers[slot] = hashed, number
            self._used += 1
        return int(self._numbers[slot])

    @staticmethod
    def _slots(count: int) -> tuple[np.ndarray, np.ndarray, int]:
        return np.zeros(count, np.uint64), np.zeros(count, np.int32), 0

    def _slot(self, hashed: int) -> int:
        """Where the hash stands, or the empty place for it."""
        slot, last = hashed % len(self._hashes), len(self._hashes) - 1
        while (found := self._hashes[slot]) and found != hashed:
            slot = (slot + 1) & last
        return slot

    def _grow(self) -> None:
        hashes, numbers = self._hashes, self._numbers
        self._hashes, self._numbers, self._used = self._slots(2 * len(hashes))
        for slot in np.flatnonzero(hashes):
            self.first(int(hashes[slot]), int(numbers[slot]))


class LeakageSample:
    """`measure_leakage` of a stream: exact as long as the runs of words fit, from then on by a sample of them.

    Kept are the runs whose hash lies below a limit, which is halved whenever a split has over LARGEST_SAMPLE of them.
    The limit depends on a run's words alone, so a kept run of validation is found in train if it is there: the share
    that is seen is estimated without bias. Whether a document has any seen run cannot be told from a sample.
    """

    def __init__(self) -> None:
        self._limit = ALL
        self._words = WordHashes()
        self._runs = {split: [np.zeros(0, np.uint64)] for split in SPLITS}
        self._owners = {split: [np.zeros(0, np.int32)] for split in SPLITS[1:]}
        self._kept = dict.fromkeys(SPLITS, 0)
        self._total = dict.fromkeys(SPLITS[1:], 0)
        self._documents = dict.fromkeys(SPLITS[1:], 0)

    def add(self, text: str, split: str) -> None:
        """A document of a split."""
        if len(self._words) > MOST_WORDS:
            self._words = WordHashes()
        runs = ngram_hashes(split_words(text), LEAKAGE_WORDS, self._words)
        if split in self._total:
            self._total[split] += len(runs)
            self._documents[split] += 1
        runs = self._below(runs)
        _append(self._runs[split], runs)
        if split in self._owners:
            _append(self._owners[split], np.full(len(runs), self._documents[split], np.int32))
        self._kept[split] += len(runs)
        while self._kept[split] > LARGEST_SAMPLE:
            self._compact(split)

    def table(self) -> dict[str, dict[str, float]]:
        """As `measure_leakage`; of a sample `sampled_ngrams` in place of what only all runs can tell."""
        train = np.unique(np.concatenate(self._runs["train"]))
        table = {}
        for split, documents in self._documents.items():
            if not documents:
                continue
            seen = np.isin(np.concatenate(self._runs[split]), train)
            row = {"ngrams": self._total[split], "ngram_share": float(seen.mean()) if len(seen) else 0.0}
            row["documents"] = documents
            if self._limit < ALL:
                row["sampled_ngrams"] = len(seen)
            else:
                touched = len(np.unique(np.concatenate(self._owners[split])[seen]))
                row |= {"seen_ngrams": int(seen.sum()), "touched_documents": touched}
                row["document_share"] = touched / documents
            table[split] = row
        return table

    def _below(self, runs: np.ndarray) -> np.ndarray:
        return runs if self._limit == ALL else runs[runs < np.uint64(self._limit)]

    def _compact(self, split: str) -> None:
        """Without repetitions, which count in train no more than once; where that is not enough, of half the hashes."""
        if split == "train":
            self._runs[split] = [np.unique(np.concatenate(self._runs[split]))]
            self._kept[split] = len(self._runs[split][0])
            if self._kept[split] <= LARGEST_SAMPLE // 2:
                return
        self._limit //= 2
        for name, runs in self._runs.items():
            together = np.concatenate(runs)
            below = together < np.uint64(self._limit)
            self._runs[name] = [together[below]]
            self._kept[name] = int(below.sum())
            if name in self._owners:
                self._owners[name] = [np.concatenate(self._owners[name])[below]]


def _append(arrays: list[np.ndarray], further: np.ndarray) -> None:
    arrays.append(further)
    if len(arrays) > MOST_ARRAYS:
        arrays[:] = [np.concatenate(arrays)]
