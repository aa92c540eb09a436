"""Documents: python -m pytest tests/test_documents.py"""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace

import pytest
from real_data import REAL_DATA, needs_real_data

from nbutils.data.corpora import SPLITS, CorpusRequest, Document, read_corpus
from nbutils.data.documents import (
    WordHashes,
    clean_documents,
    clean_text,
    measure_leakage,
    ngram_hashes,
    remove_duplicates,
    split_documents,
    split_words,
    text_position,
)
from nbutils.foundation.errors import CorpusError

VOCABULARY = [f"word{number}" for number in range(500)]


def make_documents(count: int, words: int = 60, seed: int = 0) -> list[Document]:
    choose = random.Random(seed)
    return [Document(f"d{n}", " ".join(choose.choices(VOCABULARY, k=words))) for n in range(count)]


def names(documents: list[Document], split: str | None = None) -> list[str]:
    return [document.name for document in documents if split is None or document.split == split]


# ---- cleaning


def test_clean_text() -> None:
    text = "\n\n  A\tline  with \xa0 gaps \r\n\r\n\n\n   another\u2028third  \n"
    assert clean_text(text) == "A line with gaps\nanother\nthird"
    assert clean_text(clean_text(text)) == clean_text(text)


def test_short_documents_go_after_cleaning() -> None:
    documents = [Document("just", "a" * 128), Document("short", "a" * 127), Document("padded", "a" + " " * 500 + "b")]
    assert names(clean_documents(documents)) == ["just"]
    assert names(clean_documents(documents, minimum_characters=3)) == ["just", "short", "padded"]


def test_clean_none_changes_nothing() -> None:
    documents = [Document("a", "  two\n\n\nlines\t"), Document("short", "x"), Document("empty", "")]
    assert clean_documents(documents, clean="none") == documents[:2]


def test_ascii_only() -> None:
    documents = [Document("a", "naïve – café\n日本 x")]
    assert clean_documents(documents, "none", ascii_only=True)[0].text == "nave  caf\n x"
    assert clean_documents(documents, ascii_only=True, minimum_characters=1)[0].text == "nave caf\nx"


def test_clean_newlines_changes_line_ends_alone() -> None:
    (cleaned,) = clean_documents([Document("a", "one\r\ntwo\n\n three\t \r")], "newlines")
    assert cleaned.text == "one two   three\t  "


def test_nothing_left_after_cleaning() -> None:
    with pytest.raises(CorpusError, match=r"longest has 5 characters, minimum_characters is 128\. Lower"):
        clean_documents([Document("a", "short")])


# ---- duplicates


def jaccard(first: str, second: str) -> float:
    """The true similarity of the sets of word 5-grams, in plain Python."""
    one, other = ({tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (first.split(), second.split()))
    return len(one & other) / len(one | other)


def changed(text: str, words: int, seed: int) -> str:
    """`text` with so many of its words replaced, spread evenly."""
    parts = text.split()
    for place in range(words):
        parts[place * len(parts) // words] = f"new{seed}x{place}"
    return " ".join(parts)


def test_near_duplicates_go_and_dissimilar_documents_stay() -> None:
    originals = make_documents(60, words=400)
    near = [Document(f"near{n}", changed(d.text, 3, n)) for n, d in enumerate(originals)]
    far = [Document(f"far{n}", changed(d.text, 40, n)) for n, d in enumerate(originals)]
    assert min(jaccard(a.text, b.text) for a, b in zip(originals, near, strict=True)) > 0.9
    assert max(jaccard(a.text, b.text) for a, b in zip(originals, far, strict=True)) < 0.4
    kept, duplicates = remove_duplicates([*originals, *far, *near])
    assert names(kept) == names([*originals, *far])
    assert {(d.dropped, d.kept) for d in duplicates} == {(f"near{n}", f"d{n}") for n in range(60)}
    truth = {f"near{n}": jaccard(originals[n].text, near[n].text) for n in range(60)}
    errors = [duplicate.similarity - truth[duplicate.dropped] for duplicate in duplicates]
    assert max(map(abs, errors)) < 0.15  # the standard error of 112 hashes at .93 is .024
    assert abs(sum(errors) / len(errors)) < 0.02


def test_the_first_of_a_chain_of_near_copies_stays() -> None:
    texts = [make_documents(1, words=600)[0].text]
    for step in range(1, 5):
        texts.append(changed(texts[0], 1, 0) if step == 1 else changed(texts[-1], step, step))
    documents = [Document(str(n), text) for n, text in enumerate(texts)]
    kept, duplicates = remove_duplicates(documents)
    assert names(kept) == ["0"]
    assert {duplicate.kept for duplicate in duplicates} == {"0"}
    assert names(remove_duplicates(documents[::-1])[0]) == ["4"]


def test_near_ignores_case_and_punctuation_and_exact_does_not() -> None:
    text = make_documents(1)[0].text
    documents = [Document("a", text), Document("b", text.upper().replace(" ", ", ")), Document("c", text)]
    kept, duplicates = remove_duplicates(documents, "exact")
    assert names(kept) == ["a", "b"]
    assert [(d.dropped, d.kept, d.exact) for d in duplicates] == [("c", "a", True)]
    kept, duplicates = remove_duplicates(documents, "near")
    assert names(kept) == ["a"]
    assert sorted((d.dropped, d.exact) for d in duplicates) == [("b", False), ("c", True)]
    assert remove_duplicates(documents, "off") == (documents, [])


def test_texts_of_few_words_or_none() -> None:
    documents = [Document(text, text) for text in ("!!!", "???", "one two", "one three", "one two !", "")]
    assert names(remove_duplicates(documents)[0]) == ["!!!", "???", "one two", "one three", ""]


# ---- splits


def test_hash_split_depends_on_the_text_alone() -> None:
    documents = make_documents(2000, words=12)
    divided = split_documents(documents)
    shares = {split: count / 2000 for split, count in Counter(d.split for d in divided).items()}
    assert shares == pytest.approx({"train": 0.8, "validation": 0.1, "test": 0.1}, abs=0.025)  # 3.7 standard errors
    assert names(divided) == names(documents)
    where = {d.text: d.split for d in divided}
    shuffled = [replace(d, name="other") for d in random.Random(1).sample(documents, 700)]
    assert all(where[d.text] == d.split for d in split_documents(shuffled))


@pytest.mark.parametrize(
    ("text", "b2sum"),  # of `printf "%s" "$text" | b2sum -l 64`
    [("", 0xE4A6A0577479B2B4), ("Hello world", 0xD641D955D12C936F), ("Grüße", 0x06AB58B78490A392)],
)
def test_positions_are_the_same_on_every_machine(text: str, b2sum: int) -> None:
    assert text_position(text) == pytest.approx(b2sum / 2**64, abs=2**-53)


def test_given_split() -> None:
    documents = [Document("a", "x", "train"), Document("b", "y", "validation"), Document("c", "z", "test")]
    assert split_documents(documents, "given") == documents
    assert split_documents(documents[:2], "given") == documents[:2]
    with pytest.raises(CorpusError, match="leaves validation empty"):
        split_documents([documents[0]], "given")
    with pytest.raises(CorpusError, match=r"1 of 3 documents have none \('d'.*Set split to hash"):
        split_documents([*documents[:2], Document("d", "w")], "given")


def test_counts_split_is_exact_disjoint_and_grows_without_moving() -> None:
    documents = make_documents(50, words=8)
    divided = split_documents(documents, "counts", 20, 10, 5)
    assert Counter(d.split for d in divided) == {"train": 20, "validation": 10, "test": 5}
    assert len(set(names(divided))) == 35
    in_hash_order = sorted(documents, key=lambda d: text_position(d.text))
    assert set(names(divided, "train")) == set(names(in_hash_order[:20]))
    assert set(names(divided, "validation")) == set(names(in_hash_order[20:30]))
    assert names(divided) == [name for name in names(documents) if name in set(names(divided))]
    assert not names(split_documents(documents, "counts", 20, 10, 0), "test")
    with pytest.raises(CorpusError, match=r"20 \+ 25 \+ 6 = 51 documents, but 50 are left"):
        split_documents(documents, "counts", 20, 25, 6)


def test_contiguous_split_of_one_text() -> None:
    text = "".join(random.Random(0).choices("ab \n", k=1234))
    train, validation = split_documents([Document("text", text)], "contiguous")
    assert train == Document("text", text[: int(0.9 * 1234)], "train")
    assert validation == Document("text", text[int(0.9 * 1234) :], "validation")


def test_contiguous_split_of_several_texts() -> None:
    documents = [Document("a", "a" * 49), Document("b", "b" * 39 + "\n"), Document("c", "c" * 10)]
    divided = split_documents(documents, "contiguous")
    assert [(d.name, d.split, len(d.text)) for d in divided] == [
        ("a", "train", 50),  # with the line end it lacked
        ("b", "train", 40),
        ("c", "validation", 10),
    ]
    longer = [*documents[:2], Document("c", "c" * 110)]
    assert [(d.name, d.split, len(d.text)) for d in split_documents(longer, "contiguous")[-2:]] == [
        ("c", "train", 90),
        ("c", "validation", 20),
    ]


def test_subsets_of_given_splits_are_limits_and_a_fair_sample() -> None:
    documents = [Document(f"{split}{n}", f"{split} text {n}", split) for split in SPLITS for n in range(40)]
    capped = split_documents(documents, "given", subset_train=10, subset_test=50)
    assert [sum(document.split == split for document in capped) for split in SPLITS] == [10, 40, 40]
    train = [document for document in capped if document.split == "train"]
    assert train == [document for document in documents if document in train]  # in the corpus's order
    assert train != documents[:10]
    more = split_documents(documents, "given", subset_train=20)
    assert {document.name for document in train} < {document.name for document in more}


def test_contiguous_texts_are_parted_by_the_whitespace_they_have() -> None:
    texts = ["ends in mid-line", "next", "ends ", "then", " begins with a space"]
    documents = [Document(str(n), text, "train") for n, text in enumerate(texts)]
    divided = split_documents([*documents, Document("held out", "x", "validation")], "contiguous")
    assert "".join(d.text for d in divided[:-1]) == "ends in mid-line\nnext\nends then begins with a space"


def test_contiguous_keeps_given_splits() -> None:
    documents = [Document("a", "x", "train"), Document("b", "y\n", "validation"), Document("c", "z", "test")]
    assert [(d.split, d.text) for d in split_documents(documents, "contiguous")] == [
        ("train", "x"),
        ("validation", "y\n"),
        ("test", "z"),
    ]


def test_too_few_documents_to_split() -> None:
    with pytest.raises(CorpusError, match=r"split=hash of 1 documents leaves .* empty\. Give more"):
        split_documents([Document("a", "text")])


# ---- leakage


def plain_leakage(documents: list[Document], split: str, length: int) -> tuple[int, int, int]:
    """13-grams, those of them in train, documents with any: with sets of tuples, as the definition reads."""

    def grams(document: Document) -> list[tuple[str, ...]]:
        words = re.findall(r"\w+", document.text.lower())
        return [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]

    train = {gram for document in documents if document.split == "train" for gram in grams(document)}
    found = [[gram in train for gram in grams(document)] for document in documents if document.split == split]
    return sum(map(len, found)), sum(map(sum, found)), sum(map(any, found))


@pytest.mark.parametrize("length", [2, 13])
def test_leakage_is_that_of_plain_sets(length: int) -> None:
    documents = split_documents(make_documents(120, words=80))
    choose = random.Random(2)
    held_out = [n for n, d in enumerate(documents) if d.split != "train"]
    for number in choose.sample(held_out, 8):  # paste a passage of a train document into some of the others
        source = choose.choice([d for d in documents if d.split == "train"]).text.split()[20:50]
        documents[number] = replace(documents[number], text=f"Begin. {', '.join(source).upper()} the end")
    table = measure_leakage(documents, length)
    for split in ("validation", "test"):
        row = table[split]
        ngrams, seen, touched = plain_leakage(documents, split, length)
        assert (row["ngrams"], row["seen_ngrams"], row["touched_documents"]) == (ngrams, seen, touched)
        assert row["ngram_share"] == pytest.approx(seen / ngrams)
        assert row["document_share"] == pytest.approx(touched / row["documents"])
        assert 0 < touched < row["documents"] or length == 2


def test_leakage_does_not_run_across_documents() -> None:
    words = [f"w{n}" for n in range(20)]
    documents = [
        Document("train", " ".join(words), "train"),
        Document("one", " ".join(words[:10]), "validation"),
        Document("two", " ".join(words[10:]), "validation"),
        Document("short", "few words", "validation"),
    ]
    assert measure_leakage(documents) == {
        "validation": {
            "ngrams": 0,
            "seen_ngrams": 0,
            "ngram_share": 0.0,
            "documents": 3,
            "touched_documents": 0,
            "document_share": 0.0,
        }
    }


def test_ngram_hashes_know_order_and_length() -> None:
    hashes = WordHashes()
    assert len(ngram_hashes(["a", "b"], 3, hashes)) == 0
    first = ngram_hashes(split_words("A b, c a b c"), 3, hashes)
    assert first.tolist()[0] == first.tolist()[3]
    assert len(set(first.tolist())) == 3
    assert set(first.tolist()).isdisjoint(ngram_hashes(["c", "b", "a"], 3, WordHashes()).tolist())


@pytest.mark.soak
@needs_real_data
def test_wikitext2_leakage_is_small_and_there() -> None:
    documents = read_corpus(CorpusRequest("wikitext", f"{REAL_DATA}/wikitext2")).documents
    table = measure_leakage(documents)
    for split in ("validation", "test"):
        ngrams, seen, touched = plain_leakage(documents, split, 13)
        assert (table[split]["ngrams"], table[split]["seen_ngrams"]) == (ngrams, seen)
        assert table[split]["touched_documents"] == touched
        assert 0 < table[split]["ngram_share"] < 0.01
