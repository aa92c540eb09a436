"""Answers to the questions of a prepared split: generated, measured, and kept for comparisons between variants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from nbutils.evaluation.answer_measures import AnswerMeasures, measure_answers
from nbutils.evaluation.answers import generate_answers
from nbutils.evaluation.perplexity import SPLITS

if TYPE_CHECKING:
    from pandas import DataFrame
    from transformers import PreTrainedModel

    from nbutils.data import PreparedData
    from nbutils.runs import RunFolder

SAMPLES = 5  # answers of each run that the report shows side by side


@dataclass(frozen=True)
class Generation:
    """How answers are sampled, by the names of the notebook's parameters; `answers` of each split, 0 for all."""

    max_new_tokens: int = 120
    generation_temperature: float = 0.7
    generation_top_k: int = 50
    generation_top_p: float = 0.95
    answers: int = 0
    seed: int = 0

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> Generation:
        """The settings among a notebook's parameters; not its seed: variants are to differ in their model alone."""
        return cls(**{each.name: parameters[each.name] for each in fields(cls) if each.name != "seed"})


def questions_of(data: PreparedData, split: str, most: int = 0) -> DataFrame:
    """Documents of a split (document, question, answer, prompt), in their order; the first `most`, 0 for all."""
    documents = data.documents[data.documents["split"] == split]
    chosen = documents.head(most) if most else documents
    prompts = [data.card["prompt"].format(question=question) for question in chosen["question"]]
    return chosen[["document", "question", "answer"]].assign(prompt=prompts)


def answer_questions(
    model: PreTrainedModel, data: PreparedData, split: str, generation: Generation, batch_size: int
) -> AnswerMeasures:
    """The model's answers to the questions of a split, with their document, and what they score."""
    asked = questions_of(data, split, generation.answers)
    answers = generate_answers(
        model,
        data.tokenizer,
        list(asked["prompt"]),
        max_new_tokens=generation.max_new_tokens,
        temperature=generation.generation_temperature,
        top_k=generation.generation_top_k,
        top_p=generation.generation_top_p,
        seed=generation.seed,
        batch_size=batch_size,
    )
    measured = measure_answers(list(asked["question"]), list(asked["answer"]), [answer.strip() for answer in answers])
    if len(measured.examples):
        measured.examples.insert(0, "document", asked["document"].to_numpy())
        measured.examples.insert(0, "split", split)
    return measured


def answers_of_run(
    model: PreTrainedModel,
    data: PreparedData,
    generation: Generation,
    batch_size: int,
    run: RunFolder,
    splits: Sequence[str] = tuple(SPLITS),
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Answer the questions of `splits`; writes answers.parquet, answers.json (what each score is) and samples.jsonl.

    Returns the samples, and the scores for result.json: eval_bleu, test_bleu and so on.
    """
    import pandas

    measured = {s: answer_questions(model, data, s, generation, batch_size) for s in splits if s in data.blocks}
    answers = pandas.concat([each.examples for each in measured.values()], ignore_index=True)
    answers.to_parquet(run.path / "answers.parquet")
    signatures = {name: text for each in measured.values() for name, text in each.signatures.items()}
    run.write_json("answers.json", {"signatures": signatures, "generation": asdict(generation)})
    shown = answers[answers["split"] == "validation"].head(SAMPLES) if len(answers) else answers
    samples = shown.rename(columns={"question": "prompt", "answer": "completion"}).to_dict("records")
    run.write_lines("samples.jsonl", samples)
    return samples, {
        f"{SPLITS[s]}_{name}": value for s, each in measured.items() for name, value in each.numbers.items()
    }
