"""What a run with judges is said to cost, against a calculation by hand."""

from __future__ import annotations

import numpy as np
import pytest
import yaml

from nbutils.batch.cost import Cost, estimate
from nbutils.foundation.places import PARAMS
from nbutils.runs.plans import load_plan

LLAMA = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA |= {"num_key_value_heads": 4, "vocab_size": 500, "tie_word_embeddings": False, "max_position_embeddings": 2048}
LAYER = 4 * 128 * 128 + 3 * 128 * 256 + 2 * 128  # attention, gates, norms
JUDGE = 3 * LAYER + 128 + 500 * 128  # what is multiplied with: not the embeddings, which are looked up


@pytest.fixture
def cost(tmp_path):
    """The cost of one run: a student of GPT-2's shape, judges and a teacher of Llama's, the judge alone in 16 bit."""
    from transformers import GPT2Config, LlamaConfig

    for name, dtype in (("judge", "bfloat16"), ("other", "float32")):
        LlamaConfig(**LLAMA, dtype=dtype).save_pretrained(tmp_path / name)
    GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=500, n_positions=512).save_pretrained(tmp_path / "start")

    def estimated(method: str, **changes: object) -> Cost:
        judges = {"judge": str(tmp_path / "judge"), "second_judge": str(tmp_path / "other")}
        judges |= {"correcting_teacher": str(tmp_path / "judge")}
        given = {"method": method, "start_model": str(tmp_path / "start"), "rounds": 3, "prompts_per_round": 10}
        given |= {"samples_per_prompt": 1, "prompt_tokens": 20, "response_tokens": 30, "passes": 2, **judges}
        given |= {"judged_samples": 7, "judged_stories": 5, "rubric": "story", "per_device_train_batch_size": 1}
        stages = [
            {"name": "data", "notebook": "01_data_prep", "params": {"block_size": 128}},
            {"name": "run", "notebook": "06_interaction", "needs": {"data_folder": "data"}, "params": given | changes},
        ]
        (tmp_path / "p.yaml").write_text(yaml.safe_dump({"name": "p", "stages": stages}))
        plan = load_plan(tmp_path / "p.yaml")
        return estimate(plan.variant("run"), plan, "H100", 0.4)

    return estimated


def told(name: str, *parts: str) -> int:
    """About as many tokens as a prompt file has, by its characters."""
    content = yaml.safe_load((PARAMS / "prompts" / f"{name}.yaml").read_text())
    return round(sum(len(text) for part in parts for text in np.atleast_1d(content[part])) / 4.4)


WEEKLY, STORY = (told(f"judge-{name}", "system", "user") for name in ("weekly", "story"))
LENGTH = 17 + 90 + 1  # of a story, its prompt and the end token before it


def writes(tokens: int, parameters: int) -> int:
    """A pass of the student: 2 layers, 32 wide, its embeddings its output."""
    return tokens * (2 * parameters + 4 * 2 * 32 * tokens)


def reads(tokens: int) -> int:
    """A pass of a judge or teacher."""
    return tokens * (2 * JUDGE + 4 * 3 * 128 * tokens)


def at_the_end(parameters: int) -> int:
    """7 contexts of 64 and responses of as many tokens, drawn and weighed; 5 stories, drawn; two judges of all."""
    contexts = 7 * (3 * writes(128, parameters) + 2 * reads(WEEKLY + 128))
    return contexts + 5 * (writes(LENGTH, parameters) + 2 * reads(STORY + LENGTH))


def test_what_a_run_is_judged_by_at_its_end_is_counted(cost):
    found = cost("text", judge="rule")
    size = found.parameters
    trained = 3 * 10 * 2 * 3 * writes(51, size)
    one_judge = 7 * reads(WEEKLY + 128) + 5 * reads(STORY + LENGTH)
    assert found.flops == trained + at_the_end(size) - one_judge
    assert cost("text").flops == trained + at_the_end(size)
    assert cost("text", judged_samples=0, judged_stories=0).flops == trained
    assert cost("text").tokens == 3 * 10 * 2 * 51  # evaluation is no training


def test_judges_and_teachers_of_the_rounds_are_counted(cost):
    size = cost("text").parameters
    drawn = 3 * 40 * (3 * writes(51, size) + reads(STORY + 51))  # by the rubric of the training
    pairs = 3 * 10 * 2 * 2 * 3 * writes(51, size)
    assert cost("simpo_judge", samples_per_prompt=4).flops == drawn + pairs + at_the_end(size)
    corrected = told("correction", "system", "user", "prefill") + 2 * 51
    taught = 3 * 10 * (3 * writes(51, size) + reads(STORY + 51) + reads(corrected) + 2 * 3 * writes(51, size))
    assert cost("sft").flops == taught + at_the_end(size)
    assert cost("sft", correcting_teacher="human").flops == taught - 30 * reads(corrected) + at_the_end(size)


def test_a_text_is_no_longer_than_a_judge_has_positions(cost, tmp_path):
    from transformers import LlamaConfig

    found = cost("text", judge="rule", judged_stories=0)
    LlamaConfig(**LLAMA | {"max_position_embeddings": 200}).save_pretrained(tmp_path / "short")
    cut = cost("text", judge="rule", judged_stories=0, second_judge=str(tmp_path / "short"))
    assert found.flops - cut.flops == 7 * (reads(WEEKLY + 128) - reads(200))


def test_the_memory_of_judges_is_counted_when_they_are_asked(cost):
    """One judge after the other at the end, beside the student alone; that of the rounds beside all of its training."""
    size = cost("text").parameters
    weights = JUDGE + 500 * 128
    alone = 20 * size + 34 * 51 * 32 * 2
    assert 4 * size + 4 * weights > alone  # the second judge, which no student meets while it learns, decides
    assert cost("text").memory == 4 * size + 4 * weights
    assert cost("text", second_judge="none").memory == max(alone, 4 * size + 2 * weights)
    assert cost("text", judged_samples=0).memory == 4 * size + 4 * weights
    assert cost("text", judged_samples=0, judged_stories=0).memory == alone
    assert cost("sft").memory == max(alone + 2 * weights, 4 * size + 4 * weights)  # judge and teacher are one model


def test_what_is_not_known_is_told(cost, monkeypatch):
    for name, value in (("WORKBOOK_JUDGE_URL", "http://localhost:1/v1"), ("WORKBOOK_JUDGE_MODEL", "m")):
        monkeypatch.setenv(name, value)
    assert cost("text").left_out == ()
    found = cost("sft", judge="server", correcting_teacher="server")
    assert found.left_out == ("what a server computes that judges or corrects",)
    assert cost("text", judge="server", judged_samples=0, judged_stories=0).left_out == ()
