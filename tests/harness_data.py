"""A few items of each task: with the Hub's columns, and the same as local files of the published kinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def _activity(label: str, first: str, begun: str, gold: int, *endings: str) -> Row:
    return {"activity_label": label, "ctx_a": first, "ctx_b": begun, "endings": list(endings), "label": str(gold)}


def _how_to(label: str, context: str, gold: int, *endings: str) -> Row:
    return {"activity_label": label, "ctx_a": context, "ctx_b": "", "endings": list(endings), "label": str(gold)}


# ActivityNet's as published; WikiHow's in the published form, whose marks the harness takes out
HELLASWAG = [
    _activity(
        "Roof shingle removal", "A man is sitting on a roof.", "he", 3, "is using wrap to wrap a pair of skis.",
        "is ripping level tiles off.", "is holding a rubik's cube.", "starts pulling up roofing on a roof.",
    ),
    _activity(
        "Clean and jerk", "A lady walks to a barbell. She bends down and grabs the pole.", "the lady", 3,
        "swings and lands in her arms.", "pulls the barbell forward.", "pulls a rope attached to the barbell.",
        "stands and lifts the weight over her head.",
    ),
    _activity(
        "Sharpening knives", "A man is holding a pocket knife while sitting on some rocks in the wilderness.",
        "then he", 1, "opens a can of oil.", "takes a small stone from the flowing river and smashes it.",
        "uses the knife to shave his leg.", "sand the rocks and tops them by using strong pressure.",
    ),
    _how_to(
        "Pets and Animals", "[header] How to wash a dog [title] Fill a tub. [step] Warm water is best.", 0,
        "Wet the dog [title] Begin at the neck.", "Let it run away.", "Empty it again.", "Call the cat [now].",
    ),
]  # fmt: skip
PIQA = [
    {
        "goal": "dresser",
        "sol1": "replace drawer with bobby pin ",
        "sol2": "finish, woodgrain with  bobby pin ",
        "label": 1,
    },
    {"goal": "How do I boil an egg?", "sol1": "Put it in hot water.", "sol2": "Put it in a warm hat.", "label": 0},
    {"goal": "To cool soup,", "sol1": "blow on it.", "sol2": "shout at it.", "label": 0},
]
WINOGRANDE = [
    {
        "sentence": f"Sarah was a much better surgeon than Maria so _ always got the {kind} cases.",
        "option1": "Sarah",
        "option2": "Maria",
        "answer": answer,
    }
    for kind, answer in (("easier", "2"), ("harder", "1"))
] + [{"sentence": "The cup held the ball as _ was big.", "option1": "the cup", "option2": "the ball", "answer": "1"}]


def _question(text: str, gold: int, *choices: str, letters: str = "ABCDE") -> Row:
    labels = list(letters[: len(choices)])
    return {"question": text, "choices": {"text": list(choices), "label": labels}, "answerKey": labels[gold]}


ARC_EASY = [
    _question("Which technology was developed most recently?", 0, "cellular telephone", "television", "refrigerator"),
    _question("What do plants need?", 2, "a hat", "a boat", "light", "a song"),
    _question(
        "When a switch is used in a circuit, the switch can", 1, "cause the charge to build.", "stop the current."
    ),
]
ARC_EASY_TRAIN = [
    _question("Is ice cold?", 0, "yes", "no"),
    _question("What is made by bees?", 1, "milk", "honey", "iron"),
    _question("Where do fish live?", 0, "in water", "in trees"),
]
HUB = {
    "hellaswag": {"validation": HELLASWAG},
    "piqa": {"validation": PIQA},
    "winogrande_debiased": {"validation": WINOGRANDE},
    "arc_easy": {"test": ARC_EASY, "train": ARC_EASY_TRAIN},
}


def write_rows(path: Path, rows: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_tasks(folder: Path) -> Path:
    """The four tasks as local files: contexts in one piece, answers apart, prompts finished."""
    marks = ("[header] ", ""), (" [title]", ". "), ("[step] ", "")
    write_rows(
        folder / "hellaswag" / "hellaswag_val.jsonl",
        [
            {
                "ind": number,
                "activity_label": row["activity_label"],
                "ctx": _without(f"{row['ctx_a']} {row['ctx_b']}".strip(), marks),
                "endings": [_without(ending, marks) for ending in row["endings"]],
                "label": int(row["label"]),
            }
            for number, row in enumerate(HELLASWAG)
        ],
    )
    items = write_rows(
        folder / "piqa" / "valid.jsonl", [{k: v for k, v in row.items() if k != "label"} for row in PIQA]
    )
    items.with_name("valid-labels.lst").write_text("".join(f"{row['label']}\n" for row in PIQA))
    write_rows(folder / "winogrande" / "validation.jsonl", [row | {"index": n} for n, row in enumerate(WINOGRANDE)])
    for split, rows in HUB["arc_easy"].items():
        write_rows(folder / "arc_easy" / f"{split}.jsonl", [_finished(n, row) for n, row in enumerate(rows)])
    return folder


def _without(text: str, marks: tuple[tuple[str, str], ...]) -> str:
    for mark, instead in marks:
        text = text.replace(mark, instead)
    return text.replace("  ", " ")


def _finished(number: int, row: Row) -> Row:
    return {
        "id": f"item {number}",
        "query": f"Question: {row['question']}\nAnswer:",
        "choices": row["choices"]["text"],
        "gold": row["choices"]["label"].index(row["answerKey"]),
    }


def prompts(task: str) -> list[tuple[list[tuple[str, str]], int]]:
    """For each item of a task its (prompt, answer) pairs and the gold one, written out by hand."""
    if task == "hellaswag":
        begin = [
            "Roof shingle removal: A man is sitting on a roof. He",
            "Clean and jerk: A lady walks to a barbell. She bends down and grabs the pole. The lady",
            "Sharpening knives: A man is holding a pocket knife while sitting on some rocks in the wilderness. Then he",
            "Pets and Animals: How to wash a dog. Fill a tub. Warm water is best.",
        ]
        wet = [" Wet the dog. Begin at the neck.", " Let it run away.", " Empty it again.", " Call the cat ."]
        endings = [[f" {ending}" for ending in row["endings"]] for row in HELLASWAG[:3]] + [wet]
        golds = [int(row["label"]) for row in HELLASWAG]
        return [([(b, e) for e in each], gold) for b, each, gold in zip(begin, endings, golds, strict=True)]
    if task == "piqa":
        return [
            ([(f"Question: {row['goal']}\nAnswer:", f" {row[name]}") for name in ("sol1", "sol2")], row["label"])
            for row in PIQA
        ]
    if task == "winogrande_debiased":
        easier, harder = " always got the easier cases.", " always got the harder cases."
        surgeon = "Sarah was a much better surgeon than Maria so "
        cup = "The cup held the ball as "
        return [
            ([(f"{surgeon}Sarah", easier), (f"{surgeon}Maria", easier)], 1),
            ([(f"{surgeon}Sarah", harder), (f"{surgeon}Maria", harder)], 0),
            ([(f"{cup}the cup", " was big."), (f"{cup}the ball", " was big.")], 0),
        ]
    return [
        ([(f"Question: {row['question']}\nAnswer:", f" {text}") for text in row["choices"]["text"]], gold)
        for row, gold in zip(ARC_EASY, (0, 2, 1), strict=True)
    ]
