"""What can be known of a variant before a kernel or a GPU is taken for it: corpus, folders, model, block length.

Which checks apply is decided by the names among its parameters. The modules that know corpora and models are imported
only where their check applies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbutils.data import DATA_FOLDER, check_prepared
from nbutils.foundation import NOTEBOOKS, ModelError, RunError, Unreachable, WorkbookError, read_json, relative, resolve
from nbutils.models import check_cache, check_distillation
from nbutils.runs import (
    FINISHED,
    CodeOf,
    Manifest,
    Place,
    Plan,
    Variant,
    made_of,
    read_inputs,
    run_key,
    was_made_of,
    what_changed,
)

if TYPE_CHECKING:
    from nbutils.data import DataConfig

# Parameters of a distillation, in the order in which its checks take them
WEIGHTS = ("divergence", "ce_weight", "kl_weight", "kl_temperature", "jsd_beta")
WORDS = ("kl_positions", "kd_reduction")
SMOOTHING = ("smoothing", "tau", "eps", "smoothed_over")
TASKS = ("tasks", "tasks_folder", "few_shot", "task_items")
PAIRS = ("blimp_folder", "blimp_items")
INTERACTION = ("method", "rubric", "prompts_per_round")  # its judges and its teacher may be runs still to be made
START = "start_model"  # what a run of 06_interaction begins with
CACHE = ("teacher_cache", "divergence", "cache_top_k")


def check_variant(variant: Variant, plan: Plan | None = None) -> None:
    """Raise WorkbookError, with cause and cure, where the variant could not run to its end.

    Of a run it needs that is still to be made, `plan` tells what its parameters will be.
    """
    params = variant.params
    if params.get(DATA_FOLDER) and resolve(params[DATA_FOLDER]).is_dir() and variant.notebook.parent == NOTEBOOKS:
        check_prepared(resolve(params[DATA_FOLDER]))
    if {"dataset_name", "data_files"} <= params.keys():
        from nbutils.data import DataConfig

        _check_data(DataConfig(**{each.name: params[each.name] for each in fields(DataConfig) if each.name in params}))
    if {*WEIGHTS, *WORDS, *CACHE} <= params.keys():
        check_distillation(*(params[name] for name in (*WEIGHTS, *WORDS)))
        check_cache(*(params[name] for name in CACHE))
    if "terms" in params:
        from nbutils.objectives import objective_from

        objective_from(params["terms"])
    if {*SMOOTHING} <= params.keys():
        from nbutils.objectives import check_smoothing

        check_smoothing(*(params[name] for name in SMOOTHING))
    if {*TASKS} <= params.keys():
        from nbutils.evaluation import check_tasks, task_names

        check_tasks(*(params[name] for name in TASKS))
        if not params["tasks_folder"]:
            _check_tasks_of_hub(tuple(task_names(params["tasks"])))
    if params.get(PAIRS[0]):
        _check_pairs(*(params[name] for name in PAIRS if name in params))
    block_size = data_facts(variant, plan).get("block_size", 0)
    if {*INTERACTION} <= params.keys():
        from nbutils.interaction import check_interaction

        check_interaction(params, block_size)
    read_inputs(params)  # says which folder is missing
    starts = START in params  # from the model that is named, or from scratch where none is
    if "model_name" in params and not params.get(START) and START not in variant.needs:
        _check_model(params["model_name"], starts or params.get("from_scratch", False), block_size)
    for name in (params.get(each) for each in (START, "teacher", "second_teacher")):
        if name:
            _check_teacher(name, block_size)
    check_inputs(variant)


def place_of(variant: Variant, plan: Plan) -> str:
    """Where a mistake of the variant stands, as errors of plans begin: its file, its stage, which one of the stage."""
    which = f", variant {variant.name!r}" if variant.name != variant.stage else ""
    return f"{relative(plan.file)}: stage {variant.stage!r}{which}"


def check_inputs(variant: Variant) -> None:
    """The part of `check_variant` that only the runs it needs can answer.

    Has its model the vocabulary of the data? Do stories fit the model? With a model that is only on the Hub, or data
    without a tokenizer's file, the run itself says so.
    """
    params, card = variant.params, data_card(variant.params)
    if card and "model_name" in params and START not in params and not params.get("from_scratch", False):
        tokenizer = resolve(params[DATA_FOLDER]) / "data" / "tokenizer"
        _check_vocabulary(params["model_name"], tokenizer, card["fingerprint"])
    if card and {*INTERACTION, START} <= params.keys():
        _check_stories(params, card["block_size"])


def _check_stories(params: dict[str, Any], block_size: int) -> None:
    """Do the written prompt and a story fit the model? Needs neither torch nor transformers."""
    from tokenizers import Tokenizer

    from nbutils.interaction import STORY, Interaction, read_story
    from nbutils.models import saved_model

    asked, tokenizer = Interaction.of(params), resolve(params[DATA_FOLDER]) / "data" / "tokenizer" / "tokenizer.json"
    if asked.prompts != STORY or not tokenizer.is_file():
        return
    positions = block_size  # of a model from scratch
    if params[START]:
        start = resolve(params[START])
        config = (saved_model(start, "last") or start) / "config.json"
        told = read_json(config) if config.is_file() else {}
        positions = told.get("max_position_embeddings") or told.get("n_positions")
    prompt = Tokenizer.from_file(str(tokenizer)).encode(read_story().prompt, add_special_tokens=False)
    asked.check_lengths(block_size, positions, len(prompt.ids) + 1)


def remarks(plan: Plan) -> list[str]:
    """What whoever starts `plan` should know of its variants, a line each: targets that do not smooth, or only do."""
    from nbutils.objectives import NO_SMOOTHING, Smoothing, equals_cross_entropy, leaves_no_gold_mass

    lines = []
    for stage in plan.stages:
        smoothings: dict[Smoothing, int] = {}
        for variant in plan.variants:
            if variant.stage == stage.name and {*SMOOTHING} <= variant.params.keys():
                asked = Smoothing(*(variant.params[name] for name in SMOOTHING))
                smoothings[asked] = smoothings.get(asked, 0) + 1
        for asked, count in smoothings.items():
            of = f"{stage.name}: {asked.told()} ({count} run{'s' * (count > 1)})"
            if asked.form != NO_SMOOTHING and equals_cross_entropy(asked):
                lines.append(f"{of} equals plain cross entropy: an A/A null, whose effect is the noise floor.")
            elif leaves_no_gold_mass(asked):
                lines.append(f"{of} gives gold tokens that have prefixes no mass: it cannot be taken out again.")
    return lines


def data_facts(variant: Variant, plan: Plan | None = None) -> dict[str, Any]:
    """The card of the data that a variant reads, or the parameters of the run that will make them, or {}."""
    card = data_card(variant.params)
    if not card and plan is not None and DATA_FOLDER in variant.needs:
        return plan.variant(variant.needs[DATA_FOLDER]).params
    return card


def data_card(params: dict[str, Any]) -> dict[str, Any]:
    """The card of the prepared data that `params` name, {} where there is none (yet)."""
    card = resolve(params[DATA_FOLDER]) / "data" / "card.json" if params.get(DATA_FOLDER) else None
    return read_json(card) if card and card.is_file() else {}


# ---- finished or stale, and what it needs ----------------------------------------------------------------------------


def place_needs(variant: Variant, plan_folder: Path) -> Variant:
    """`variant` with the folders of the runs it needs as parameters. Raises RunError where one is not finished."""
    folders = {}
    for parameter, needed in variant.needs.items():
        place = Place(plan_folder, needed)
        result = place.result()
        if result is None or result["status"] != FINISHED:
            state = result["status"] if result else "not run yet"
            raise RunError(f"{variant.name} needs {needed} for {parameter}, which is {state}. Run {needed} first.")
        folders[parameter] = relative(place.published)
    return replace(variant, params=variant.params | folders)


def is_finished(variant: Variant, plan_folder: Path, code: CodeOf | None = None) -> bool:
    """Whether a run of exactly this variant is published and finished, its needs included; starts nothing.

    code: one for all, where many variants are looked at.
    """
    made = made_now(variant, plan_folder, code)
    return made is not None and Place(plan_folder, variant.name).is_finished(run_key(made))


def made_now(variant: Variant, plan_folder: Path, code: CodeOf | None = None) -> dict[str, Any] | None:
    """What a run of this variant would be made of now, None where something it reads is not there."""
    try:
        variant = place_needs(variant, plan_folder)
        return made_of(variant.notebook, variant.params, code=(code or CodeOf())(variant.notebook, variant.params))
    except WorkbookError:
        return None


def stale_of(manifest: Manifest, variant: Variant, plan_folder: Path, code: CodeOf | None = None) -> str:
    """What has changed since a finished run of this variant; empty where it is what would be made now."""
    made = made_now(variant, plan_folder, code)
    if made is None:
        return "something it reads is not there any more"
    return "" if run_key(made) == manifest["key"] else what_changed(was_made_of(manifest), made)


# ---- each question asked once ----------------------------------------------------------------------------------------


def _once(check: Callable[..., None]) -> Callable[..., None]:
    """`check` once for equal arguments, also where the Hub did not answer, for which it may wait seconds each time."""

    @lru_cache(maxsize=256)
    def answer(*given: Any) -> Unreachable | None:
        try:
            check(*given)
        except Unreachable as error:
            return error
        return None

    def once(*given: Any) -> None:
        if error := answer(*given):
            raise error.with_traceback(None)

    return once


@_once
def _check_data(config: DataConfig) -> None:
    from nbutils.data import check_config

    check_config(config)


@_once
def _check_model(model_name: str, from_scratch: bool, block_size: int) -> None:
    from nbutils.models import check_model

    check_model(model_name, from_scratch, block_size)


@_once
def _check_teacher(name: str, block_size: int) -> None:
    from nbutils.models import check_teacher

    check_teacher(name, block_size)


@_once
def _check_tasks_of_hub(tasks: tuple[str, ...]) -> None:
    from nbutils.evaluation import check_reachable

    check_reachable(tasks)


@_once
def _check_pairs(folder: str, items: int = 0) -> None:
    from nbutils.evaluation import check_pairs

    check_pairs(folder, items)


@_once
def _check_vocabulary(model_name: str, tokenizer_folder: Path, data_fingerprint: str) -> None:
    from transformers import AutoTokenizer

    from nbutils.models import build_config, check_vocabulary

    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    except (OSError, ValueError):
        raise ModelError(
            f"{relative(tokenizer_folder)} holds no tokenizer that can be read. Prepare the data again."
        ) from None
    check_vocabulary(model_name, build_config(model_name, 0, 0).vocab_size, tokenizer)
