"""Training objectives: the chunked head, one file per term, measures, and the textbook reference."""

from nbutils.objectives.cosine import ExpectedEmbeddingCosine
from nbutils.objectives.cross_entropy import CrossEntropy
from nbutils.objectives.head import IGNORE_INDEX, Term, WeightedTerm, chunked_head, term_values
from nbutils.objectives.measures import Accuracy, Confidence, CosineProxy, Entropy, UnigramCosine
from nbutils.objectives.objective import Objective, ObjectiveModel, cosine_mixing

__all__ = [
    "IGNORE_INDEX",
    "Accuracy",
    "Confidence",
    "CosineProxy",
    "CrossEntropy",
    "Entropy",
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
