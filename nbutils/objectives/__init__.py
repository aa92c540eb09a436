"""Training objectives: the chunked head, one file per term, and the textbook reference."""

from nbutils.objectives.cosine import CosineProxy, ExpectedEmbeddingCosine, UnigramCosine
from nbutils.objectives.cross_entropy import Accuracy, CrossEntropy
from nbutils.objectives.head import IGNORE_INDEX, Term, WeightedTerm, chunked_head, term_values
from nbutils.objectives.objective import Objective, ObjectiveModel, cosine_mixing

__all__ = [
    "IGNORE_INDEX",
    "Accuracy",
    "CosineProxy",
    "CrossEntropy",
    "ExpectedEmbeddingCosine",
    "Objective",
    "ObjectiveModel",
    "Term",
    "UnigramCosine",
    "WeightedTerm",
    "chunked_head",
    "cosine_mixing",
    "term_values",
]
