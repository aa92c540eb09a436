"""The plans of interaction: published values, costs and checks without a network, and every arm through its notebook.

python -m pytest tests/test_interaction_plans.py
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from real_data import REAL_DATA, needs_real_data
from small_batches import endings, run_batch
from small_judges import write_model

from nbutils.batch.cost import estimate
from nbutils.batch.listing import plan_listing
from nbutils.batch.local_engine import LocalEngine
from nbutils.foundation.places import NOTEBOOKS, PARAMS
from nbutils.interaction.settings import FROM_TEXT, METHODS, Interaction
from nbutils.runs.contrasts import check_metric
from nbutils.runs.plans import Plan, Variant, load_plan
from nbutils.runs.run_folder import load_runs

METHOD = "method"
HUB = ("meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen2.5-7B-Instruct")
# BabyLM's interaction baseline (the card of babylm-interaction-baseline-simpo and its code), and the PPO of Once Upon a
# Time (arXiv 2509.15714). There gamma is told as its ratio to beta, 0.5; a context of 256 begins with the end token.
CORRECTED = {"rounds": 20, "prompt_tokens": 255, "response_tokens": 256, "min_response_tokens": 255}
CORRECTED |= {"temperature": 1.0, "top_p": 0.8, "beta": 2.0, "gamma": 2.0 * 0.5, "sft_weight": 0.2}
CORRECTED |= {"learning_rate": 5e-5, "weight_decay": 0.0, "max_grad_norm": 1.0, "per_device_train_batch_size": 16}
CORRECTED |= {"lr_scheduler_type": "cosine", "warmup_ratio": 2_000 / 200_000, "model_name": "gpt2"}
CORRECTED |= {"correcting_teacher": HUB[0]}
STORIES = {"rounds": 920, "prompts_per_round": 360, "passes": 4, "per_device_train_batch_size": 360}
STORIES |= {"learning_rate": 1e-6, "kl_coefficient": 0.2, "kl_target": 6.0, "kl_horizon": 10_000, "discount": 1.0}
STORIES |= {"trace": 0.95, "clip": 0.2, "value_clip": 0.2, "value_weight": 0.1, "max_grad_norm": 0.0}
STORIES |= {"temperature": 1.0, "top_p": 1.0, "prompts": "story", "rubric": "story", "judge": HUB[0]}


def arms(plan: Plan) -> dict[str, Variant]:
    """A run of each method."""
    return {each.params["method"]: each for each in plan.variants if "method" in each.params}


def steps(variant: Variant) -> int:
    """Optimiser steps of all rounds."""
    params, asked = variant.params, Interaction.of(variant.params)
    rows = asked.examples_per_round * asked.all_passes
    batches = math.ceil(rows / params["per_device_train_batch_size"])
    return asked.rounds * math.ceil(batches / params["gradient_accumulation_steps"])


# ---- what they hold --------------------------------------------------------------------------------------------------


def test_values_are_those_that_were_published():
    runs = arms(load_plan(PARAMS / "interaction.yaml"))
    for method in ("simpo", "three_way", "sft", "simpo_judge", *FROM_TEXT):
        wanted = CORRECTED | ({"per_device_train_batch_size": 24} if method in FROM_TEXT else {})  # as many steps
        assert {name: runs[method].params[name] for name in CORRECTED} == wanted, method
    assert (runs["simpo"].params["sft_passes"], runs["simpo"].params["passes"]) == (8, 2)
    assert {name: runs["ppo"].params[name] for name in STORIES} == STORIES
    asked = Interaction.of(runs["ppo"].params)
    assert (asked.response_tokens, asked.length_weight) == (90, 0.4)
    for method in ("ppo", "rloo"):
        asked = Interaction.of(runs[method].params)
        assert asked.rounds * asked.prompts_per_round * asked.samples_per_prompt == 331_200
    assert {each.params["second_judge"] for each in runs.values()} == {HUB[1]}


@pytest.mark.parametrize("name, most", [("interaction", 16_000), ("quick-interaction", 32), ("tinystories", 40)])
def test_arms_on_the_same_prompts_make_the_same_steps(name, most):
    runs = arms(load_plan(PARAMS / f"{name}.yaml"))
    assert runs.keys() == {*METHODS}
    same = ("sft", "simpo", "three_way", "simpo_judge")
    assert {steps(runs[method]) for method in (*same, *FROM_TEXT)} == {most}
    asked, read = ([Interaction.of(runs[method].params) for method in methods] for methods in (same, FROM_TEXT))
    assert len({(each.rounds, each.prompts_per_round, each.all_passes) for each in asked}) == 1
    assert {(each.rounds, each.all_passes) for each in read} == {(asked[0].rounds, asked[0].all_passes)}
    longer = {each.prompts_per_round / asked[0].prompts_per_round for each in read}
    assert longer == {1.625 if name == "tinystories" else 1.5}, "what others write, these read"
    leave_one_out = Interaction.of(runs["rloo"].params)
    assert steps(runs["rloo"]) == leave_one_out.rounds, "one step a round is on-policy"
    if name != "interaction":
        assert steps(runs["rloo"]) == steps(runs["ppo"]) == most
        assert leave_one_out.rounds * leave_one_out.prompts_per_round == asked[0].rounds * asked[0].prompts_per_round


# ---- checked without a network ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_size(tmp_path_factory) -> Path:
    """The plan of real size with a corpus, minimal pairs and models that are stubs; of the judges the shapes alone."""
    from transformers import GPT2Config, LlamaConfig

    folder = tmp_path_factory.mktemp("real")
    (folder / "train_10M").mkdir()
    (folder / "train_10M" / "bnc_spoken.train").write_text("A cat sat on a mat.\n" * 50)
    (folder / "pair.jsonl").write_text('{"sentence_good": "A cat sits.", "sentence_bad": "A cat sit.", "UID": "a"}\n')
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    shape |= {"num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": False}
    write_model(folder / "tokenizer")
    text = (PARAMS / "interaction.yaml").read_text()
    for number, name in enumerate(HUB):
        LlamaConfig(**shape, dtype="bfloat16").save_pretrained(folder / f"judge{number}")
        text = text.replace(name, str(folder / f"judge{number}"))
    GPT2Config(n_embd=1280, n_layer=36, n_head=20).save_pretrained(folder / "large")
    text = re.sub(r"(distilling_teacher: )\S+", rf"\g<1>{folder / 'large'}", text)
    text = text.replace("data/babylm", str(folder)).replace("data/blimp", str(folder))
    text = text.replace("tokenizer: gpt2", f"tokenizer: {folder / 'tokenizer'}")
    (folder / "interaction.yaml").write_text(text)
    return folder / "interaction.yaml"


def test_the_plan_of_real_size_passes_its_check(real_size, monkeypatch):
    def asked(self, name, **settings):
        pytest.fail(f"the Hub was asked for {name}")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", asked)
    listing = plan_listing(load_plan(real_size), "H100", 0.4)
    assert "It would not run" not in listing and "whose size is not known" not in listing
    assert listing.count("Not counted") == 1 and "Not counted: 1 runs whose tokens are known once" in listing


def test_what_judges_and_teachers_take_of_the_memory_is_counted(real_size):
    """By hand: 8.03e9 parameters in 16 bit, once where judge and teacher are one; both sequences of a pair.

    GPT-2 Large, 774e6 in 32 bit, beside a student that is distilled.
    """
    plan = load_plan(real_size)
    judge = 2 * 8_030_261_248
    runs = {method: (each, estimate(each, plan, "H100", 0.4)) for method, each in arms(plan).items()}
    student = runs["simpo"][1].parameters
    lengths = {"sft": 512, "text": 512, "distill": 512, "ppo": 108, "rloo": 108}
    lengths |= dict.fromkeys(("simpo", "three_way", "simpo_judge"), 2 * 512)
    assert runs.keys() == lengths.keys()
    learning = {
        method: 20 * student + 34 * 768 * 12 * each.params["per_device_train_batch_size"] * lengths[method]
        for method, (each, _) in runs.items()
    }
    for method, (_, cost) in runs.items():
        asked = {"text": 0, "distill": 4 * 774_030_080}.get(method, judge)
        assert cost.memory == pytest.approx(max(learning[method] + asked, 4 * student + judge), rel=1e-3), method
    tokens = {method: cost.tokens for method, (_, cost) in runs.items()}
    assert tokens["three_way"] == tokens["simpo"] == tokens["simpo_judge"] == 2 * tokens["sft"]


def test_a_teacher_that_cannot_be_reached_is_told(monkeypatch):
    def unreachable(self, name, **settings):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    plan = load_plan(PARAMS / "interaction.yaml")
    cost = estimate(arms(plan)["simpo"], plan, "H100", 0.4)
    roles = zip(HUB, ("judge", "second judge"), strict=True)
    assert cost.left_out == tuple(f"{name}, the {role}, whose size is not known from here" for name, role in roles)


def test_a_teacher_of_the_plan_is_counted():
    plan = load_plan(PARAMS / "quick-interaction.yaml")
    simpo, text, distilled = (estimate(arms(plan)[each], plan, "H100", 0.4) for each in ("simpo", "text", "distill"))
    simpo_batch, text_batch = (arms(plan)[each].params["per_device_train_batch_size"] for each in ("simpo", "text"))
    sequences = 34 * (2 * simpo_batch - text_batch) * (24 + 32 + 1) * 64 * 2  # of a pair two
    assert simpo.memory - text.memory == 4 * simpo.parameters + sequences
    assert distilled.memory - text.memory == 4 * text.parameters  # of the same shape
    forward = 2 * text.parameters + 4 * 2 * 64 * (24 + 32 + 1)  # of a token: one more pass
    assert distilled.tokens == text.tokens and distilled.flops - text.flops == text.tokens * forward


# ---- every arm, from the data to its result --------------------------------------------------------------------------


def cut_down(source: Path, folder: Path, only: tuple[str, ...] = (), **shared: object) -> Plan:
    """`source` with a seed, a round or two and few prompts; of its arms those that have one of the methods `only`."""
    content = yaml.safe_load(source.read_text())
    for stage in content["stages"]:
        params = stage["params"]
        if "subset_train" in params:
            params |= {"subset_train": 60, "subset_val": 8, "subset_test": 8, "max_documents": 150, "vocab_size": 500}
        if "max_steps" in params:
            params |= {"max_steps": 4, "eval_steps": 4}
        methods = stage.get("matrix", {}).pop("method", [params[METHOD]] if METHOD in params else [])
        if methods:
            params.pop(METHOD, None)
            stage["matrix"] = stage.get("matrix", {}) | {METHOD: [m for m in methods if not only or m in only]}
            params |= {"rounds": 2, "prompts_per_round": 4, "judged_samples": 3, "judged_stories": 3}
            params |= {"per_device_train_batch_size": 8, "eval_steps": 99, "blimp_items": 2, "samples": 1, **shared}
        if "matrix" in stage:
            stage["matrix"]["seed"] = [1]
    content["stages"] = [each for each in content["stages"] if each.get("matrix", {}).get(METHOD, True) != []]
    content["name"] = "cut"
    content.pop("contrasts")
    (folder / "cut.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return load_plan(folder / "cut.yaml")


def results(plan: Plan, folder: Path) -> dict[str, dict]:
    """method -> result.json, of a batch of the plan."""
    work = run_batch(plan, LocalEngine(plan.name, folder, 2), retries=0)
    assert set(endings(work).values()) == {"finished"}, work.table()
    files = {run.variant: run.folder / "result.json" for run in load_runs(folder)}
    return {each.params["method"]: json.loads(files[each.name].read_text()) for each in arms(plan).values()}


@pytest.mark.parametrize(
    "methods", [("text", "simpo", "ppo"), pytest.param(METHODS, marks=pytest.mark.soak)], ids=["three", "all"]
)
def test_every_arm_runs_through_its_notebook(tmp_path, methods):
    plan = cut_down(PARAMS / "quick-interaction.yaml", tmp_path, methods)
    found = results(plan, tmp_path / "runs")
    assert found.keys() == {*methods}
    for method, numbers in found.items():
        assert {"test_ce_loss", "test_judge_score", "test_second_judge_score", "pairs_acc", "kl_to_start"} <= {*numbers}
        for name in numbers:
            check_metric("metric", name, NOTEBOOKS / "06_interaction.ipynb")
        assert numbers["steps"] == steps(arms(plan)[method])
        assert numbers["kl_to_start"] >= 0 and numbers["human_words"] + numbers["student_words"] > 0
    for method in {*methods} & {*FROM_TEXT}:
        assert found[method]["student_words"] == 0 < found[method]["human_words"]
    assert {method for method, numbers in found.items() if numbers["teacher_words"]} == {*methods} - {*FROM_TEXT}


@pytest.mark.slow
@needs_real_data
@pytest.mark.soak
def test_a_small_language_model_corrects_and_is_no_judge(tmp_path):
    """It would write something else than a number: no score is made up, and the student learns from its texts."""
    model = f"{REAL_DATA}/models/stories260k_llama"
    source = tmp_path / "source.yaml"
    text = (PARAMS / "tinystories.yaml").read_text()
    text = text.replace("data/models/stories260k_llama", model)
    source.write_text(text.replace("data/tinystories/stories.jsonl", f"{tmp_path}/stories.jsonl"))
    words = ["cat", "dog", "hen", "fox", "sun", "hat", "bed", "cup", "tree", "bird", "girl", "boy", "lake", "hill"]
    drawn = np.random.default_rng(0).choice(words, (90, 40))
    stories = [f"Once upon a time there was a {' and a '.join(each)}." for each in drawn]
    (tmp_path / "stories.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in stories))
    plan = cut_down(source, tmp_path, ("simpo",), judge=model, least_number_mass=0.1)
    numbers = results(plan, tmp_path / "runs")["simpo"]
    assert numbers["judge_failure_rate"] == 1 and 0 < numbers["test_judge_number_mass"] < 0.1
    assert "test_judge_score" not in numbers and 0 < numbers["test_second_judge_score"] < 1
    assert numbers["teacher_words"] > 0 and numbers["kl_to_start"] > 0
