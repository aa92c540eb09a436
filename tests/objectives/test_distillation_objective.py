"""The objective of distillation: its settings, its labels, whom it needs, and a teacher that learns nothing.

python -m pytest tests/test_distillation_objective.py
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from nbutils.data.batches import IGNORE_INDEX, UNLABELLED
from nbutils.foundation.errors import ParameterError
from nbutils.models.loading import build_config
from nbutils.models.teachers import LiveTeacher, check_shared_vocabulary
from nbutils.objectives import ObjectiveModel, distillation, next_tokens
from nbutils.objectives.check import compare_with_textbook
from nbutils.objectives.terms.distillation import distillation as textbook_distillation

VOCAB = 37


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"divergence": "backward"}, "divergence is 'backward'. Valid names: forward, jsd, none, reverse"),
        ({"temperature": 0}, "kl_temperature is 0.*above 0"),
        ({"temperature": float("nan")}, "kl_temperature is nan"),
        ({"ce_weight": -1}, "ce_weight is -1.*at least 0"),
        ({"kl_weight": -0.1}, "kl_weight is -0.1"),
        ({"ce_weight": 0, "kl_weight": 0}, "both 0.*Raise one"),
        ({"divergence": "jsd", "beta": 1.0}, "jsd_beta is 1.0.*forward or reverse"),
        ({"positions": "prompts"}, "kl_positions is 'prompts'"),
        ({"reduction": "mean"}, "kd_reduction is 'mean'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ParameterError, match=message):
        distillation(**settings)


def test_the_control_is_cross_entropy_with_weight_one():
    assert distillation("none", ce_weight=0.5).weights == (1.0,)
    assert [term.name for term in distillation("none").terms] == ["ce"]


def test_the_teacher_is_no_part_of_the_module_and_learns_nothing():
    torch.manual_seed(0)
    student, teacher = (AutoModelForCausalLM.from_config(build_config("micro", VOCAB, 16, 0.0)) for _ in range(2))
    subject = ObjectiveModel(student, distillation(), LiveTeacher((teacher.eval().requires_grad_(False),)))
    assert len(list(subject.parameters())) == len(list(student.parameters()))
    tokens = torch.randint(VOCAB, (2, 16))
    counts = {term.name: term.units(next_tokens(tokens)).sum() for term in subject.objective.terms}
    subject(tokens, tokens, counts)["loss"].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    logits, teacher_logits = student(tokens).logits.flatten(0, 1), teacher(tokens).logits.flatten(0, 1)
    wanted = 0.5 * textbook_distillation(logits, teacher_logits, 2.0).mean()
    wanted = wanted + 0.5 * torch.nn.functional.cross_entropy(
        student(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    )
    torch.testing.assert_close(subject(tokens, tokens, counts)["loss"], wanted)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_the_notebooks_own_check_knows_every_divergence(divergence):
    differences = compare_with_textbook(distillation(divergence, reduction="batchmean"))
    assert max(differences.values()) < 1e-12 and set(differences) == {"loss", "d hidden", "d output matrix"}


def test_labels_are_shifted_before_they_mask():
    """Unshifted, the first row would be left out and the last one scored."""
    labels = torch.tensor([[UNLABELLED, UNLABELLED, 5, 2], [UNLABELLED, 4, 2, IGNORE_INDEX]])
    wanted = [[UNLABELLED, 5, 2, UNLABELLED], [4, 2, UNLABELLED, IGNORE_INDEX]]
    assert next_tokens(labels).tolist() == wanted


def test_reverse_kl_to_a_teacher_without_some_tokens_is_refused():
    models = [AutoModelForCausalLM.from_config(build_config("micro", vocab, 16)) for vocab in (50, 64)]
    teacher = LiveTeacher((models[0],))
    with pytest.raises(
        ParameterError, match=r"divergence reverse needs a teacher with the student's 64 tokens.*has 50"
    ):
        check_shared_vocabulary("reverse", teacher, models[1])
    check_shared_vocabulary("forward", teacher, models[1])
    check_shared_vocabulary("reverse", LiveTeacher((models[1],)), models[0])
