"""Minimal pairs: scores by hand and against full logits, macro means, files that are none, our own pairs."""

from __future__ import annotations

import copy
import json
import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
import torch
from real_data import REAL_DATA, needs_real_data
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from nbutils.batch.preflight import check_variant
from nbutils.data.tokenization import train_byte_level_bpe
from nbutils.evaluation.harness import PAIRS_FILE, MinimalPairs, append_items, check_pairs, score_pairs
from nbutils.evaluation.harness.agreement_pairs import FRAMES, agreement_pairs
from nbutils.evaluation.harness.callback import HarnessEvaluation, HarnessSettings
from nbutils.evaluation.harness.minimal_pairs import COLUMNS, EMBEDDED, read_pairs, sentence_log_probs
from nbutils.foundation.errors import ParameterError
from nbutils.runs.plans import Variant

WORDS = ("<end>", "<begin>", "that", "those", "cat", "cats", "sleeps", "sleep")
END, BEGIN = 0, 1
TOLERANCE = 1e-6  # the norm is taken in float32
FILES = {  # as BLiMP has them, with a UID; the last as BabyLM's supplement, without one
    "agreement.jsonl": [
        ("subject_verb", "that cat sleeps", "that cat sleep"),
        ("subject_verb", "those cats sleep", "those cats sleeps"),
        ("subject_verb", "that cat sleeps", "that cats sleeps"),
        ("order", "those cats sleep", "cats sleep those"),
    ],
    "supplement.jsonl": [(None, "that cat", "cat that")],
}


def write_files(folder: Path, files=FILES) -> Path:
    folder.mkdir(exist_ok=True)
    for name, pairs in files.items():
        rows = [
            {"sentence_good": good, "sentence_bad": bad} | ({"UID": uid, "pairID": "0"} if uid else {})
            for uid, good, bad in pairs
        ]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_files(tmp_path / "blimp")


def tokenizer_of(words=WORDS, template: str = ""):
    """A token a word; `template`, as "<begin> $A <end>", says what the tokenizer adds by itself."""
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token=words[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        special = [("<end>", END), ("<begin>", BEGIN)]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", bos_token="<begin>")


@pytest.fixture(scope="module")
def table():
    """log P(next | previous), drawn, in float64."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(len(WORDS), len(WORDS), generator=generator, dtype=torch.float64).mul(2).log_softmax(-1)


def bigram(table):
    """A model with no layers whose next token depends on the last alone, as `table` says."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = len(table)
    width = size + size % 2
    sizes = {"hidden_size": width, "intermediate_size": 8, "num_attention_heads": 1, "max_position_embeddings": 16}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=size, num_hidden_layers=0, rms_norm_eps=0.0, **sizes)).double()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size, width))
        model.lm_head.weight.zero_()[:, :size] = table.T / math.sqrt(width)  # the norm of what it is given
    return model.eval()


def by_hand(table, text: str, before: tuple[int, ...] = ()) -> float:
    tokens = [*before, *(WORDS.index(word) for word in text.split())]
    return sum(float(table[one, next_one]) for one, next_one in pairwise(tokens))


# scores


def test_a_sentence_is_the_sum_of_its_tokens_but_the_first(table):
    texts = ["that cat sleeps", "those cats", "cat"]
    found = sentence_log_probs(bigram(table), tokenizer_of(), texts)
    assert found == {text: pytest.approx(by_hand(table, text), rel=TOLERANCE) for text in texts}
    assert found["cat"] == 0


def test_special_tokens_are_context_and_no_more(table):
    """What the tokenizer puts before a sentence makes its first word count; what it puts after it never does."""
    begun = sentence_log_probs(bigram(table), tokenizer_of(template="<begin> $A <end>"), ["that cat sleeps"])
    assert begun["that cat sleeps"] == pytest.approx(by_hand(table, "that cat sleeps", (BEGIN,)), rel=TOLERANCE)


def test_scores_are_those_of_full_logits_however_they_are_batched():
    from transformers import GPT2Config, GPT2LMHeadModel

    pairs = read_pairs(EMBEDDED, 10)
    texts = list(dict.fromkeys(text for pair in pairs for text in (pair.good, pair.bad)))
    tokenizer = train_byte_level_bpe(texts, 300)
    torch.manual_seed(0)
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).double().eval()
    with torch.no_grad():
        for text, found in sentence_log_probs(model, tokenizer, texts, 7).items():
            ids = torch.tensor([tokenizer.encode(text)])
            steps = model(ids).logits[0, :-1].log_softmax(-1)
            assert found == pytest.approx(float(steps.gather(1, ids[0, 1:, None]).sum()), rel=1e-10)
    alone = sentence_log_probs(model, tokenizer, texts, 1)
    assert sentence_log_probs(model, tokenizer, texts[::-1], 64) == {
        text: pytest.approx(value, rel=1e-10) for text, value in alone.items()
    }
    narrow = sentence_log_probs(copy.deepcopy(model).float(), tokenizer, texts)
    assert narrow == {text: pytest.approx(value, rel=1e-5) for text, value in alone.items()}


def test_lm_eval_s_convention_is_another_one(table):
    """It scores the first token, too, after a begin token: the same pair, the other choice."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from nbutils.evaluation.harness.loading import ModelInMemory

    texts = sorted(("that cats sleep", "those cats sleep"), key=lambda text: by_hand(table, text))
    table = table.clone()
    table[BEGIN, WORDS.index(texts[1].split()[0])] = -20  # a sentence seldom begins so
    table = table.log_softmax(-1)
    model, tokenizer = bigram(table), tokenizer_of()
    ours = sentence_log_probs(model, tokenizer, texts)
    asked = [Instance("loglikelihood", {}, ("", f" {text}"), place) for place, text in enumerate(texts)]
    harness = ModelInMemory(model, tokenizer, 2, None)
    theirs = [found[0] for found in harness.loglikelihood(asked, disable_tqdm=True)]
    assert theirs == pytest.approx([by_hand(table, text, (BEGIN,)) for text in texts], rel=1e-5)
    assert ours[texts[1]] > ours[texts[0]] and theirs[1] < theirs[0]


# paradigms


def test_the_accuracy_is_the_mean_over_paradigms_of_any_size(folder, table):
    found = score_pairs(bigram(table), tokenizer_of(), str(folder), step=4)
    rights: dict[str, list[bool]] = {}
    for name, pairs in FILES.items():
        for uid, good, bad in pairs:
            rights.setdefault(uid or name[:-6], []).append(by_hand(table, good) > by_hand(table, bad))
    means = {paradigm: sum(each) / len(each) for paradigm, each in rights.items()}
    assert means.keys() == {"subject_verb", "order", "supplement"} and len(set(means.values())) > 1
    assert found.paradigms == means
    assert found.numbers == {
        "blimp_acc": pytest.approx(sum(means.values()) / 3),
        **{f"blimp_{paradigm}_acc": value for paradigm, value in means.items()},
    }
    assert found.accuracy != pytest.approx(found.items["correct"].mean())  # which a large paradigm would rule
    assert list(found.items.columns) == list(COLUMNS) and (found.items["step"] == 4).all()
    first = found.items[found.items["paradigm"] == "order"].iloc[0]
    expected = [by_hand(table, text) for text in FILES["agreement.jsonl"][3][1:]]
    assert [first["good_logp"], first["bad_logp"]] == pytest.approx(expected)
    assert len(set(found.items["item"])) == 5


def test_a_tie_is_no_right_answer_and_no_number_no_accuracy(tmp_path):
    folder = write_files(tmp_path / "ties", {"a.jsonl": [("a", "that cat sleeps", "that cat sleep")]})
    even = torch.full((8, 8), 1 / 8, dtype=torch.float64).log()
    assert score_pairs(bigram(even), tokenizer_of(), str(folder)).numbers == {"blimp_acc": 0, "blimp_a_acc": 0}
    write_files(folder, {"a.jsonl": [("a", "that cat sleeps", "that cat sleep"), ("a", "cats sleep", "cats sleeps")]})
    diverged = bigram(even)
    with torch.no_grad():
        diverged.model.embed_tokens.weight[WORDS.index("cats")] = math.nan
    found = score_pairs(diverged, tokenizer_of(), str(folder))
    assert found.items["good_logp"].isna().tolist() == [False, True]
    assert all(math.isnan(value) for value in found.numbers.values())


def test_pairs_with_more_tokens_than_positions_are_left_out(tmp_path, table, caplog):
    long = " ".join(["cat"] * 18)
    files = {"a.jsonl": [("a", "that cat", "cat that"), ("a", long, "cat")], "b.jsonl": [("b", "cat", long)]}
    model, folder = bigram(table), write_files(tmp_path / "long", files)
    with pytest.raises(ParameterError, match=r"No pair of b fits the model's 16 positions.*block_size"):
        score_pairs(model, tokenizer_of(), str(folder))
    (folder / "b.jsonl").unlink()
    found = score_pairs(model, tokenizer_of(), str(folder))
    assert (found.skipped, len(found.items)) == (1, 1)
    assert "1 of 2 pairs do not fit the model's 16 positions" in caplog.text
    exact = " ".join(["cat"] * 17)  # the last token is only predicted
    assert exact in sentence_log_probs(model, tokenizer_of(), [exact])


def test_items_are_evenly_spread(tmp_path):
    pairs = [("a", f"good {place}", f"bad {place}") for place in range(10)]
    folder = write_files(tmp_path / "many", {"a.jsonl": pairs, "b.jsonl": [("b", "one", "two")]})
    assert [pair.good for pair in read_pairs(str(folder), 4)] == ["good 0", "good 2", "good 5", "good 7", "one"]
    assert len(read_pairs(str(folder))) == 11


def test_nothing_is_disturbed(folder, table):
    model = bigram(table).train()
    model.model.norm.eval()
    state = torch.get_rng_state()
    score_pairs(model, tokenizer_of(), str(folder))
    assert torch.equal(state, torch.get_rng_state())
    assert model.training and not model.model.norm.training
    assert all(each.grad is None for each in model.parameters())


# at intervals, and kept


def test_pairs_at_intervals_of_a_training(tmp_path, folder, table):
    settings = HarnessSettings(pairs=MinimalPairs(str(folder)), steps=2)
    logged = []
    callback = HarnessEvaluation(settings, bigram(table), tokenizer_of(), tmp_path, logged.append)
    assert callback.columns == ["eval_blimp_acc"]
    control, args = SimpleNamespace(should_log=False), SimpleNamespace(world_size=1)
    for step in (1, 2, 3, 4, 2, 6):
        state = SimpleNamespace(global_step=step, max_steps=6, is_world_process_zero=True)
        callback.on_step_end(args, state, control)
    whole = score_pairs(bigram(table), tokenizer_of(), str(folder))
    assert logged == [{"eval_blimp_acc": whole.accuracy}] * 3
    kept = pandas.read_parquet(tmp_path / PAIRS_FILE)
    assert kept["step"].tolist() == [2] * 5 + [4] * 5  # step 2 was taken again
    append_items(tmp_path / PAIRS_FILE, whole.items.assign(step=6))
    assert len(pandas.read_parquet(tmp_path / PAIRS_FILE)) == 15
    assert MinimalPairs().evaluate(bigram(table), tokenizer_of()) is None and MinimalPairs().columns == []


# what is no folder of pairs


def check(params):
    check_variant(Variant("v", "", Path("06_interaction.ipynb"), params))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not json\n", r"line 1: not JSON"),
        (b'{"sentence_good": "A."}\n', r"pair 1: sentence_good and sentence_bad are two sentences"),
        (b'{"sentence_good": "A.", "sentence_bad": " "}\n', r"pair 1: sentence_good and sentence_bad"),
        (b"[1, 2]\n", r"pair 1: sentence_good and sentence_bad"),
        (b'\n{"goal": "x", "sol1": "y", "sol2": "z"}\n', r"files of other kinds out of blimp_folder"),
        (b"", r"holds no pair"),
        (b"\xff\xfe\x00", r"no UTF-8 text"),
        (b'{"sentence_good": "A.", "sentence_bad": "B.", "UID": "<b>x</b>"}', r"its paradigm is '<b>x</b>'"),
        (b'{"sentence_good": "A.", "sentence_bad": "B.", "UID": 3}', r"its paradigm is '3'"),
    ],
)
def test_a_file_that_holds_no_pairs(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(ParameterError, match=message) as error:
        check({"blimp_folder": str(tmp_path)})
    assert "x.jsonl" in str(error.value)


def test_folders_that_are_none(tmp_path, folder):
    with pytest.raises(ParameterError, match=r"nowhere is not there.*BLiMP's \.jsonl files.*'embedded'"):
        check({"blimp_folder": str(tmp_path / "nowhere")})
    with pytest.raises(ParameterError, match=r"order.jsonl is a file"):
        (tmp_path / "order.jsonl").write_text("")
        check({"blimp_folder": str(tmp_path / "order.jsonl")})
    (tmp_path / "order.jsonl").unlink()
    with pytest.raises(ParameterError, match=r"holds no \.jsonl file\. .*blimp has some\."):
        check({"blimp_folder": str(tmp_path)})
    with pytest.raises(ParameterError, match="blimp_items is -1"):
        check({"blimp_folder": EMBEDDED, "blimp_items": -1})
    for fine in ("", EMBEDDED, str(folder)):
        check({"blimp_folder": fine, "blimp_items": 3})
        check_pairs(fine)


# our own pairs


def test_our_pairs_ask_for_grammar_alone():
    """Twins differ in one word and cross: whoever goes by words alone has half of each paradigm right."""
    paradigms = agreement_pairs()
    assert len(paradigms) == 6 and all(len(set(pairs)) == 2 * FRAMES for pairs in paradigms.values())
    for pairs in (*paradigms.values(), *agreement_pairs(3).values()):
        for twins in zip(pairs[::2], pairs[1::2], strict=True):
            changed = [_changed(*pair) for pair in twins]
            assert changed[0] == changed[1][::-1]
            assert all(good.endswith(".") and good[0].isupper() for good, _ in twins)
    assert agreement_pairs() == paradigms
    assert [len(pairs) for pairs in agreement_pairs(3).values()] == [4] * 6


def _changed(good: str, bad: str) -> tuple[str, str]:
    different = [each for each in zip(good.split(), bad.split(), strict=True) if each[0] != each[1]]
    assert len(different) == 1, (good, bad)
    return different[0]


def test_our_pairs_are_never_called_blimp():
    words = dict.fromkeys(word for pair in read_pairs(EMBEDDED) for word in f"{pair.good} {pair.bad}".split())
    words = ("<end>", "<begin>", *words)
    frequencies = torch.randn(len(words), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unigram = frequencies.log_softmax(-1).expand(len(words), -1)
    found = score_pairs(bigram(unigram), tokenizer_of(words), EMBEDDED)
    assert set(found.numbers) == {"pairs_acc", *(f"pairs_{name}_acc" for name in agreement_pairs())}
    assert set(found.numbers.values()) == {0.5}
    assert MinimalPairs(EMBEDDED).columns == ["pairs_acc"]


@needs_real_data
def test_a_trained_model_knows_agreement():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(REAL_DATA) / "models" / "stories260k_llama"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = score_pairs(model, tokenizer, EMBEDDED)
    assert found.skipped == 0 and found.accuracy > 0.6
    assert found.paradigms["be_number"] > 0.85 and found.paradigms["determiner_noun"] > 0.75
