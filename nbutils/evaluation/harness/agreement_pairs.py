"""Minimal pairs of agreement, made from simple English words: what is asked where no BLiMP files are at hand.

They are ours and no part of BLiMP; their numbers are called pairs_*, never blimp_*. The two sentences of a pair differ
in one word, and each pair comes with its twin in which the other word is right: "The cat sleeps" beats "The cat sleep",
"The cats sleep" beats "The cats sleeps". A model that knows words and no grammar gets half of each paradigm right.
"""

from __future__ import annotations

from collections.abc import Iterator

from nbutils.evaluation.harness.items import spread

FRAMES = 20  # of each paradigm; each gives a pair and its twin
NOUNS = ("cat", "dog", "bird", "bear", "girl", "boy", "duck", "frog", "teacher", "farmer", "king")
VERBS = ("sleep", "play", "sing", "jump", "walk", "wait", "smile", "work", "eat")
PLACES = ("in the garden", "at home", "near the river", "by the door", "under the tree", "in the sun", "every day")
ADJECTIVES = ("happy", "sad", "late", "quiet", "hungry", "tired", "kind")
HE, SHE = ("boy", "king", "father", "brother", "uncle"), ("girl", "queen", "mother", "sister", "aunt")
DONE = ("saw", "washed", "helped", "hurt", "liked", "hid", "dressed")
MOMENTS = ("today", "again", "at school", "in the morning", "after lunch", "yesterday")
THINGS = ("book", "ball", "tree", "hat", "cup", "apple", "toy", "flower", "boat", "house", "stone")
FINDERS = ("Mom saw", "We found", "Tom liked", "They wanted", "Anna took", "I had", "You lost")


def agreement_pairs(items: int = 0) -> dict[str, list[tuple[str, str]]]:
    """(good sentence, bad sentence) of each paradigm, twins side by side; always the same.

    items: so many of each paradigm, evenly spread and rounded up to whole twins; 0 for all.
    """
    makers = {
        "be_number": _be,
        "determiner_noun": _determiner,
        "reflexive_gender": _reflexive_gender,
        "reflexive_number": _reflexive_number,
        "subject_verb": _subject_verb,
        "subject_verb_distractor": _distractor,
    }
    places = spread(FRAMES, (items + 1) // 2)
    return {name: [pair for place in places for pair in make(place)] for name, make in makers.items()}


def _of(words: tuple[str, ...], place: int) -> str:
    return words[place % len(words)]


def _twins(frame: str, first: str, second: str, words: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """`first` and `second` fill {this} in turns; the word of the same place is right in {word}, the other is not."""
    for this, right, wrong in ((first, *words), (second, *reversed(words))):
        yield frame.format(this=this, word=right), frame.format(this=this, word=wrong)


def _subject_verb(place: int) -> Iterator[tuple[str, str]]:
    noun, verb = _of(NOUNS, place), _of(VERBS, place)
    yield from _twins(f"The {{this}} {{word}} {_of(PLACES, place)}.", noun, f"{noun}s", (f"{verb}s", verb))


def _distractor(place: int) -> Iterator[tuple[str, str]]:
    """Between subject and verb stands a noun of the other number."""
    noun, other, verb = _of(NOUNS, place), _of(NOUNS, place + 4), _of(VERBS, place)
    subjects = f"{noun} near the {other}s", f"{noun}s near the {other}"
    yield from _twins(f"The {{this}} {{word}} {_of(PLACES, place)}.", *subjects, (f"{verb}s", verb))


def _be(place: int) -> Iterator[tuple[str, str]]:
    noun = _of(NOUNS, place)
    frame = f"The {{this}} {{word}} {_of(ADJECTIVES, place)} {_of(MOMENTS, place)}."
    yield from _twins(frame, noun, f"{noun}s", ("was", "were"))


def _determiner(place: int) -> Iterator[tuple[str, str]]:
    thing = _of(THINGS, place)
    singular, plural = (("this", "these"), ("that", "those"))[place % 2]
    frame = f"{_of(FINDERS, place)} {{this}} {{word}} {_of(MOMENTS, place)}."
    yield from _twins(frame, singular, plural, (thing, f"{thing}s"))


def _reflexive_number(place: int) -> Iterator[tuple[str, str]]:
    people, pronoun = ((HE, "himself"), (SHE, "herself"))[place % 2]
    person = _of(people, place // 2)
    frame = f"The {{this}} {_of(DONE, place)} {{word}} {_of(MOMENTS, place)}."
    yield from _twins(frame, person, f"{person}s", (pronoun, "themselves"))


def _reflexive_gender(place: int) -> Iterator[tuple[str, str]]:
    frame = f"The {{this}} {_of(DONE, place)} {{word}} {_of(MOMENTS, place)}."
    yield from _twins(frame, _of(HE, place), _of(SHE, place), ("himself", "herself"))
