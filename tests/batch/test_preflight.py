"""What is refused before a kernel starts: each mistake with its cause and cure, and nothing that would have run."""

from __future__ import annotations

import json

import pytest
from tiny_notebooks import write_notebook

from nbutils.batch.preflight import check_inputs, check_variant
from nbutils.batch.runner import run_variant
from nbutils.foundation.errors import CorpusError, ModelError, ParameterError, RunError, Unreachable
from nbutils.foundation.places import NOTEBOOKS
from nbutils.runs.plans import Variant

WORDS = ["<|end|>", "the", "model", "reads", "text", "and", "a"]


@pytest.fixture(scope="module")
def model_and_data(tmp_path_factory):
    """A pretrained model of 7 tokens and 16 positions, its data, and data of another tokenizer of 7 tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

    here = tmp_path_factory.mktemp("pretrained")

    def tokenizer(words):
        model = WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0])
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token=words[0])

    config = GPT2Config(vocab_size=len(WORDS), n_positions=16, n_embd=8, n_layer=1, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(here / "model")
    tokenizer(WORDS).save_pretrained(here / "model")
    for name, words in {
        "own": WORDS,
        "other": ["<|end|>", *"bcdefg"],
        "larger": [*WORDS, *map(str, range(500))],
    }.items():
        tokenizer(words).save_pretrained(here / name / "data" / "tokenizer")
        card = {"block_size": 16, "vocab_size": len(words), "fingerprint": name}
        (here / name / "data" / "card.json").write_text(json.dumps(card))
    return here


def variant(here, **params):
    return Variant("study", "study", here / "study.ipynb", params)


def test_a_task_whose_items_cannot_be_had_is_told_before_a_kernel_starts(tmp_path, monkeypatch):
    """The Hub, which may take seconds to be silent, is asked once for all variants, and not where it is not needed."""
    asked = []

    def no_network(self, name, **_):
        asked.append(name)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", no_network)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    params = {"tasks": ["spelling", "piqa"], "tasks_folder": "", "few_shot": 0, "task_items": 0}
    check_variant(variant(tmp_path, **params | {"tasks": ["spelling"]}))
    assert not asked
    for task_items in (0, 1):
        with pytest.raises(Unreachable, match=r"'baber/piqa' cannot .* service not known\).*set tasks_folder"):
            check_variant(variant(tmp_path, **params | {"task_items": task_items}))
    assert asked == ["baber/piqa"]
    (tmp_path / "baber___piqa").mkdir()
    check_variant(variant(tmp_path, **params | {"tasks": ["piqa"]}))


def test_a_model_that_fits_its_data_passes(model_and_data):
    params = {"model_name": str(model_and_data / "model"), "data_folder": str(model_and_data / "own")}
    check_variant(variant(model_and_data, **params, from_scratch=False))
    params["data_folder"] = str(model_and_data / "larger")
    check_variant(variant(model_and_data, **params, from_scratch=True))  # it gets the vocabulary of the data


@pytest.mark.parametrize(
    ("data", "words"),
    [("larger", r"has 7 tokens, the tokenizer of the data 507\. Prepare the data with"), ("other", "but other ones")],
)
def test_another_vocabulary_is_refused(model_and_data, data, words):
    params = {"model_name": str(model_and_data / "model"), "data_folder": str(model_and_data / data)}
    study = variant(model_and_data, **params, from_scratch=False)
    with pytest.raises(ModelError, match=words):
        check_variant(study)
    with pytest.raises(ModelError, match=words):
        check_inputs(study)


def test_a_block_longer_than_the_models_positions_is_refused(model_and_data, tmp_path):
    (tmp_path / "data").mkdir()
    card = {"block_size": 17, "vocab_size": len(WORDS), "fingerprint": "long"}
    (tmp_path / "data" / "card.json").write_text(json.dumps(card))
    params = {"model_name": str(model_and_data / "model"), "data_folder": str(tmp_path), "from_scratch": True}
    with pytest.raises(ModelError, match="block_size 17 is longer than the 16 positions"):
        check_variant(variant(tmp_path, **params))


@pytest.mark.parametrize("what", ["no run", "a run without data", "a damaged card"])
def test_a_folder_without_data_is_refused_as_the_notebook_does_and_unread(tmp_path, monkeypatch, what):
    from nbutils.data.preparation import load_data
    from nbutils.runs import keys

    (tmp_path / "data").mkdir()
    (tmp_path / "large.bin").write_bytes(b"never to be hashed")
    if what == "a run without data":
        told = {"plan": "p", "status": "finished", "fingerprint": "abc"}
        (tmp_path / "manifest.json").write_text(json.dumps(told))
    if what == "a damaged card":
        (tmp_path / "data" / "card.json").write_text('{"block_size"')
    monkeypatch.setattr(keys, "file_sha256", lambda path: pytest.fail(f"{path} was read"))
    study = Variant("study", "study", NOTEBOOKS / "04_cosine_mixing.ipynb", {"data_folder": str(tmp_path)})
    with pytest.raises(CorpusError, match="holds no prepared data") as in_the_notebook:
        load_data(tmp_path)
    with pytest.raises(CorpusError) as refusal:
        check_variant(study)
    assert str(refusal.value) == str(in_the_notebook.value)
    if what != "a run without data":  # which a notebook of a user's own may read for something else
        with pytest.raises(CorpusError, match="holds no prepared data"):
            keys.read_inputs(study.params)


@pytest.mark.parametrize(
    ("params", "error", "words"),
    [
        ({"dataset_name": "txt", "data_files": ""}, CorpusError, "'txt' is not a known corpus. Did you mean 'text'"),
        ({"dataset_name": "text", "data_files": "no/*.where"}, CorpusError, "matches no file"),
        ({"dataset_name": "pydoc", "data_files": "", "subset_train": 5}, ParameterError, "split=counts"),
        ({"teacher_folder": "runs/no/teacher"}, RunError, "teacher_folder: there is no folder runs/no/teacher"),
        ({"model_name": "tiny", "from_scratch": False}, ModelError, "has no pretrained weights. Set from_scratch"),
        ({"model_name": "models/no/such", "from_scratch": True}, ModelError, "is not a model folder"),
    ],
)
def test_what_can_be_known_is_refused(tmp_path, params, error, words):
    with pytest.raises(error, match=words):
        check_variant(variant(tmp_path, **params))


def test_columns_of_questions_are_looked_for(tmp_path):
    (tmp_path / "qa.csv").write_text("question,reply\nWho?,me\n")
    params = {"dataset_name": "csv", "data_files": str(tmp_path / "qa.csv"), "task": "qa"}
    check_variant(variant(tmp_path, **params, answer_field="reply"))
    with pytest.raises(CorpusError, match=r"no column for answer_field 'answer'. Valid names: question, reply"):
        check_variant(variant(tmp_path, **params))


def test_a_refusal_while_a_run_starts_is_its_record(model_and_data, tmp_path):
    """It is known only when the data is there: the batch has begun, and the report must say why a run is missing."""
    notebook = write_notebook(tmp_path / "study.ipynb", "raise AssertionError('a kernel was started')")
    params = {"model_name": str(model_and_data / "model"), "data_folder": str(model_and_data / "other")}
    study = Variant("study", "study", notebook, params | {"from_scratch": False})
    outcome = run_variant(study, "plan", tmp_path / "runs", check_inputs)
    assert (outcome.status, outcome.exit_code) == ("failed", 2)
    assert outcome.message.startswith("ModelError: ")
    assert (tmp_path / "runs" / "study" / "manifest.json").is_file()


@pytest.mark.parametrize("start", ["model", "", "unknown/model"])
def test_a_story_longer_than_the_models_positions_is_refused_where_they_are_known(model_and_data, start):
    """A model of the Hub is asked by the run alone; blocks may be longer than the positions of what it begins with."""
    params = {"method": "ppo", "prompts": "story", "rubric": "story", "prompts_per_round": 4, "top_p": 1.0}
    params |= {"start_model": str(model_and_data / start) if start == "model" else start, "model_name": "micro"}
    params |= {"data_folder": str(model_and_data / "own")}
    check_inputs(variant(model_and_data, **params, response_tokens=10))
    check_inputs(variant(model_and_data, **params | {"prompts": "contexts"}, response_tokens=200))
    if start == "unknown/model":
        check_inputs(variant(model_and_data, **params, response_tokens=200))
        return
    with pytest.raises(ParameterError, match="The story prompt's 2 tokens and response_tokens 16, with an end token"):
        check_inputs(variant(model_and_data, **params, response_tokens=16))
    with pytest.raises(ParameterError, match="The story prompt's 2 tokens and response_tokens 90"):  # as its file says
        check_inputs(variant(model_and_data, **params, response_tokens=0))
