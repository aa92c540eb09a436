"""Training objectives: the chunked head, one file per term, measures, and the textbook reference."""

from nbutils.data.batches import IGNORE_INDEX, UNLABELLED
from nbutils.models.loading import head_matrices
from nbutils.models.teacher_target import TeacherStates, TeacherTarget, TopTokens
from nbutils.objectives.head import chunked_head, term_values
from nbutils.objectives.measures import (
    Accuracy,
    Confidence,
    CosineProxy,
    Entropy,
    TeacherAccuracy,
    TeacherAgreement,
    TeacherCrossEntropy,
    UnigramCosine,
)
from nbutils.objectives.objective import Objective, cosine_mixing, distillation, smoothing
from nbutils.objectives.objective_model import ObjectiveModel, Teacher, next_tokens
from nbutils.objectives.term import Term, WeightedTerm
from nbutils.objectives.terms.cosine import ExpectedEmbeddingCosine
from nbutils.objectives.terms.cross_entropy import CrossEntropy
from nbutils.objectives.terms.distillation import Distillation
from nbutils.objectives.terms.sparse_target import PrefixMass, SmoothedCrossEntropy, SparseTargets, TargetDivergence

__all__ = [
    "IGNORE_INDEX",
    "UNLABELLED",
    "Accuracy",
    "Confidence",
    "CosineProxy",
    "CrossEntropy",
    "Distillation",
    "Entropy",
    "ExpectedEmbeddingCosine",
    "Objective",
    "ObjectiveModel",
    "PrefixMass",
    "SmoothedCrossEntropy",
    "SparseTargets",
    "TargetDivergence",
    "Teacher",
    "TeacherAccuracy",
    "TeacherAgreement",
    "TeacherCrossEntropy",
    "TeacherStates",
    "TeacherTarget",
    "Term",
    "TopTokens",
    "UnigramCosine",
    "WeightedTerm",
    "chunked_head",
    "cosine_mixing",
    "distillation",
    "head_matrices",
    "next_tokens",
    "smoothing",
    "term_values",
]
