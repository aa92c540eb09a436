"""How the numbers were made: formulas, the way of the data, and the architecture of each model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from IPython.display import HTML

from nbutils.foundation import LONGEST_PARAGRAPH, escaped, read_json
from nbutils.report.evidence import Evidence, Study
from nbutils.report.page import frame_of, of_studies, table
from nbutils.report.studies.description import Description, Formula, Known, reports
from nbutils.report.studies.registry import STUDIES
from nbutils.runs import UNKNOWN

MEASURE_FORMULAS = (
    Formula(
        "Perplexity",
        "exp(CE); means over seeds are geometric, exp of the mean CE",
        reports("_perplexity"),
    ),
    Formula(
        "Bits per byte",
        "Σ CE / (ln 2 × bytes of the scored tokens)",
        reports("_bits_per_byte"),
    ),
    Formula(
        "Models of counts",
        "interpolated Kneser-Ney: P(w | h) = (max(c(hw) − D, 0) + D N<sub>1+</sub>(h·) P(w | h')) / c(h), D = "
        "n<sub>1</sub> / (n<sub>1</sub> + 2 n<sub>2</sub>), of as many train tokens as were seen",
        reports("bigram_eval_ce_loss"),
    ),
    Formula(
        "Cosine proxy",
        "mean of cos(μ, E<sub>y</sub>) at T = 1; centred: the mean embedding of the text is taken away from both "
        "first; tuned: at the T that is best on validation, judged on test",
        reports("eval_cosine"),
    ),
    Formula(
        "Calibration error",
        "Σ<sub>b</sub> (n<sub>b</sub> / n) |accuracy<sub>b</sub> − confidence<sub>b</sub>| over 15 bins b of the "
        "top probability",
        reports("_ece"),
    ),
    Formula(
        "Differences",
        "d<sub>s</sub> = treatment − control for every seed s; interval: mean(d) ± t<sub>n−1, 1−a/2</sub> · sd(d)"
        " / √n, with a = 0.04 at the first look (0.005, 0.0025, … at extensions) for the primary contrast, and "
        "Holm's share of it for the others",
    ),
)
DIVERGENCES = {"forward": "KL(t ‖ p)", "reverse": "KL(p ‖ t)", "jsd": "JSD(t, p)"}
UNITS = ("documents", "tokens", "bytes", "blocks")
# Names of one thing in the configurations of several families.
ARCHITECTURE = {
    "Family": ("model_type",),
    "Layers": ("n_layer", "num_hidden_layers"),
    "Width": ("n_embd", "hidden_size"),
    "Heads": ("n_head", "num_attention_heads"),
    "Key/value heads": ("num_key_value_heads",),
    "Inner width": ("n_inner", "intermediate_size"),
    "Positions": ("n_positions", "max_position_embeddings"),
    "Vocabulary": ("vocab_size",),
    "Tied embeddings": ("tie_word_embeddings",),
}


def method(evidence: Evidence) -> HTML:
    """Formulas, data and models behind all runs of a report."""
    known = _known(evidence)
    made = [each for each in STUDIES if each.parameter in known.values]
    formulas = [pair for each in made for pair in _of_study(each, known, len(made) > 1)]
    formulas += _of_terms(evidence)
    formulas += [(each.name, each.text) for each in MEASURE_FORMULAS if each.shown(known)]
    items = "".join(f"<dt>{name}</dt><dd>{formula}</dd>" for name, formula in formulas)
    return HTML(f"<dl>{items}</dl>{_distillation(evidence)}{_data(evidence)}{_models(evidence)}")


def _of_terms(evidence: Evidence) -> list[tuple[str, str]]:
    """The terms that runs of 10_own_objective were trained on, as each run recorded them."""
    found = {}
    for slot in evidence.slots:
        file = slot.run.folder / "objective.json" if slot.run and "terms" in slot.run.params else None
        for term in read_json(file) if file and file.is_file() else ():
            unit = f", in {term['unit']}" if term["unit"] else ""
            found[term["label"]] = f"{term['formula']}{unit} ({term['source']})"
    named = [(escaped(label.capitalize()), escaped(text)) for label, text in sorted(found.items())]
    return (
        [("Objective", "L = Σ<sub>i</sub> w<sub>i</sub> × the mean of term i over its tokens"), *named] if named else []
    )


def _known(evidence: Evidence) -> Known:
    """The results and the values of parameters of all runs."""
    runs, values = [slot.run for slot in evidence.slots if slot.run], {}
    for run in runs:
        for name, value in run.params.items():
            values.setdefault(name, set()).add(str(value))
    return Known(
        frozenset(name for run in runs for name in run.result),
        {name: frozenset(found) for name, found in values.items()},
    )


def _of_study(study: Description, known: Known, among_others: bool) -> list[tuple[str, str]]:
    """The formulas that apply, the objective named after its study where there are several."""
    named = f"Objective ({study.name})" if among_others else "Objective"
    shown = [each for each in study.formulas if each.shown(known)]
    return [(named if each.name == "Objective" else each.name, each.text) for each in shown]


def _distillation(evidence: Evidence) -> str:
    """What each arm of a study with teachers minimised, with its numbers, and where the teacher's words came from."""
    shown = of_studies(evidence, evidence.studies, _objectives)
    return shown.data if shown else ""


def _objectives(study: Study) -> HTML:
    rows = []
    for arm in study.own_arms:
        params = arm.runs[0].params if arm.runs else {}
        if "divergence" in params:
            rows.append({"Arm": arm.label, "Objective": objective_text(params)})
            rows[-1] |= {"Teacher": _teacher(params), "Taken": _taken(params)}
    note = "What each arm of distillation minimised. KL positions and reduction hold for the divergence alone."
    return table(frame_of(rows), note, text=rows[0]) if rows else HTML("")


def objective_text(params: Mapping[str, Any]) -> str:
    """The objective of a distillation run with its numbers: "0.5 CE + 0.5 T² KL(t ‖ p), T = 2"."""
    divergence, weight = params.get("divergence"), params.get("kl_weight", UNKNOWN)
    if divergence == "none" or weight == 0:
        return "CE alone"
    name = DIVERGENCES.get(str(divergence), str(divergence))
    beta = f", β = {params['jsd_beta']:g}" if divergence == "jsd" and "jsd_beta" in params else ""
    text = (
        f"{params.get('ce_weight', UNKNOWN)} CE + {weight} T² {name}, T = {params.get('kl_temperature', UNKNOWN)}{beta}"
    )
    where = "answer tokens" if params.get("kl_positions") == "answers" else "all real tokens"
    return f"{text}\n(divergence over {where}, reduction {params.get('kd_reduction', 'token')})"


def _teacher(params: Mapping[str, Any]) -> str:
    given = [str(params[name]) for name in ("teacher", "second_teacher") if params.get(name)]
    names = [name if name.count("/") == 1 else Path(name).name for name in given]  # of the Hub, or a run's folder
    return ", ".join(names) or "a small one made once"


def _taken(params: Mapping[str, Any]) -> str:
    """Whether the teacher ran for each student or was read from a store."""
    cache = params.get("teacher_cache", "off")
    top_k = f" {params['cache_top_k']}" if cache == "topk" and "cache_top_k" in params else ""
    return {"off": "live", "hidden": "stored hidden states", "topk": f"stored top{top_k}"}.get(str(cache), str(cache))


def _data(evidence: Evidence) -> str:
    """What became of the documents of each data set that any run read."""
    cards: dict[str, dict[str, Any]] = {}
    for slot in evidence.slots:
        card = slot.run.data_card() if slot.run else {}
        if card:
            cards.setdefault(str(card.get("fingerprint")), card)
    return "".join(map(_card, cards.values())) or '<p class="note">No data card lies beside the runs.</p>'


def _seen(card: dict[str, Any], split: str) -> dict[str, str]:
    """Of questions: how many answers of a split are also answers in train, which a model may know by heart."""
    if card.get("task") != "qa":
        return {}
    share = card.get("leakage", {}).get(split, {}).get("answer_share")
    return {"Answers also in train": _number(share, ".0f", " %", 100)}


def _card(card: dict[str, Any]) -> str:
    """One data card: a paragraph and a table of the splits."""
    way = " → ".join(f"{stage.get('stage')} {_count(stage.get('documents', 0))}" for stage in card.get("stages", []))
    text = (
        f"Data: {card.get('dataset_name', UNKNOWN)}. Documents: {way or UNKNOWN}; then tokenised with "
        f"{_count(card.get('vocab_size', 0))} tokens and packed into blocks of {card.get('block_size', UNKNOWN)}. "
        f"{card.get('seen_by_base_model') or ''}"
    )
    rows, words = [], card.get("leakage_words", 13)
    for split, counts in card.get("splits", {}).items():
        leaked = card.get("leakage", {}).get(split, {}).get("ngram_share")
        unigram = card.get("unigram_ce", {}).get(split)
        rows.append(
            {
                "Split": split,
                **{unit.capitalize(): _count(counts.get(unit, 0)) for unit in UNITS},
                f"{words}-word runs also in train": _number(leaked, ".2f", " %", 100),
                **_seen(card, split),
                "Unigram cross entropy\n(nats per token)": _number(unigram, ".4f"),
            }
        )
    splits = table(frame_of(rows), "The splits.").data if rows else ""
    return f"<p>{escaped(text, LONGEST_PARAGRAPH)}</p>{splits}"


def _models(evidence: Evidence) -> str:
    """The architecture of each model, once for all runs that share it."""
    rows: dict[str, dict[str, str]] = {}
    for study in [*evidence.studies, *evidence.teachers]:
        for run in study.runs:
            config = run.model_config()
            if config:
                row = {"Model": str(run.params.get("model_name", study.stage))}
                row |= {name: _first(config, keys) for name, keys in ARCHITECTURE.items()}
                row["Parameters"] = _count(run.result.get("parameters", UNKNOWN))
                rows.setdefault(str(row), row)
    if not rows:
        return '<p class="note">No trained model lies beside the runs.</p>'
    frame = frame_of(rows.values())
    empty = [name for name in frame.columns if (frame[name] == UNKNOWN).all()]
    return table(frame.drop(columns=empty), "From config.json of the trained models.", text=("Model", "Family")).data


def _first(config: dict[str, Any], keys: tuple[str, ...]) -> str:
    """The first of `keys` that the configuration gives a value, as text."""
    value = next((config[key] for key in keys if config.get(key) is not None), UNKNOWN)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _count(value) if isinstance(value, int) else str(value)


def _number(value: Any, form: str, unit: str = "", scale: float = 1) -> str:
    return f"{scale * value:{form}}{unit}" if isinstance(value, int | float) else UNKNOWN


def _count(value: Any) -> str:
    """A whole number with its thousands apart; what is none, as it stands."""
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value)
