"""Training objectives: the chunked head, one file per term, measures, and the textbook reference."""

from nbutils.objectives.cosine import ExpectedEmbeddingCosine
from nbutils.objectives.cross_entropy import CrossEntropy
from nbutils.objectives.distillation import Distillation
from nbutils.objectives.head import IGNORE_INDEX, UNLABELLED, Term, WeightedTerm, chunked_head, term_values
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
from nbutils.objectives.objective_model import ObjectiveModel, Teacher, head_matrices, next_tokens
from nbutils.objectives.sparse_target import PrefixMass, SmoothedCrossEntropy, SparseTargets, TargetDivergence
from nbutils.objectives.teacher_target import TeacherStates, TeacherTarget, TopTokens

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
