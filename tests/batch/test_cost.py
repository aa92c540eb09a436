"""Cost estimates against what PyTorch counts, and against numbers that others published."""

from __future__ import annotations

import json

import pytest
from tiny_notebooks import write_notebook, write_plan

from nbutils.batch.cost import Model, check_gpu, estimate, flops_per_token
from nbutils.batch.listing import plan_listing
from nbutils.foundation.errors import ParameterError, UnreachableModelError
from nbutils.models.loading import build_config, count_parameters
from nbutils.runs.plans import load_plan

DATA = """\
run_folder: str = ""  # r
task: str = "lm"  # t
tokenizer: str = "train"  # t
vocab_size: int = 512  # tokens
block_size: int = 64  # tokens in a block
"""
STUDY = """\
run_folder: str = ""  # r
data_folder: str = ""  # d
model_name: str = "tiny"  # m
from_scratch: bool = True  # f
max_steps: int = 100  # s
num_train_epochs: float = 1.0  # e
per_device_train_batch_size: int = 8  # b
gradient_accumulation_steps: int = 1  # g
processes: int = 1  # p
alpha: float = 0.0  # a
"""


@pytest.fixture
def make_plan(tmp_path):
    write_notebook(tmp_path / "data.ipynb", parameters=DATA)
    write_notebook(tmp_path / "study.ipynb", parameters=STUDY)

    def make(params: str = "", data: str = ""):
        text = f"""\
name: p
stages:
  - {{name: data, notebook: {{here}}/data.ipynb, params: {{{data}}}}}
  - {{name: study, notebook: {{here}}/study.ipynb, needs: {{data_folder: data}}, params: {{{params}}}}}
"""
        return load_plan(write_plan(tmp_path / "p.yaml", text))

    return make


def cost(plan, gpu="A100", utilisation=0.4):
    return estimate(plan.variant("study"), plan, gpu, utilisation)


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_pytorch_counts(tied):
    """Forward and backward of a GPT-2 style and a Llama style model, counted kernel by kernel."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM, LlamaConfig

    block_size, batch = 64, 2
    if tied:
        config = build_config("tiny", 512, block_size)
    else:
        shape = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=512, **shape, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    ids = torch.zeros(batch, block_size, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    estimated = flops_per_token(config, count_parameters(config), block_size, {}) * batch * block_size
    assert estimated == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_the_cosine_term_is_another_output_layer():
    """One product with the embeddings forward (mu = p E) and two backward, as PyTorch counts them."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    config = build_config("tiny", 512, 64)
    parameters = count_parameters(config)
    ours = flops_per_token(config, parameters, 64, {"alpha": 0.5}) - flops_per_token(
        config, parameters, 64, {"alpha": 0}
    )
    tokens = 32
    probabilities = torch.rand(tokens, config.vocab_size, requires_grad=True)
    embeddings = torch.rand(config.vocab_size, config.n_embd, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        (probabilities @ embeddings).sum().backward()
    assert ours * tokens == counter.get_total_flops()


def test_flops_of_gpt2_are_those_nanogpt_states():
    """nanoGPT's README and estimate_mfu: 6 N + 12 L H Q T at 124 M parameters without positions, T = 1024."""
    config = build_config("gpt2", 0, 1024)
    parameters = count_parameters(config)
    assert parameters == 124_439_808
    theirs = 6 * (parameters - 1024 * 768) + 12 * 12 * 12 * 64 * 1024
    assert flops_per_token(config, parameters, 1024, {}) == pytest.approx(theirs, rel=0.01)


def test_memory_is_16_bytes_a_parameter_and_some_for_activations():
    config = build_config("gpt2", 0, 1024)
    assert Model(config, 124_439_808).training_bytes(4 * 1024) == 16 * 124_439_808 + 34 * 4 * 1024 * 768 * 12


TAUGHT = """\
divergence: str = "forward"  # d
teacher: str = ""  # t
second_teacher: str = ""  # s
teacher_cache: str = "off"  # one of off, hidden, topk: c
cache_top_k: int = 32  # k
ce_weight: float = 0.5  # w
kl_weight: float = 0.5  # w
kl_temperature: float = 2.0  # T
jsd_beta: float = 0.5  # b
kl_positions: str = "all"  # p
kd_reduction: str = "token"  # r
"""
LARGE = 774_030_080  # parameters of gpt2-large as its authors' checkpoint has them
ATTENTION = 4 * 36 * 1280 * 128  # QK^T and AV of its 36 layers, a multiply and an add each


@pytest.fixture
def taught(tmp_path):
    """The cost of gpt2 on blocks of 128, taught as `params` say."""
    write_notebook(tmp_path / "data.ipynb", parameters=DATA)
    write_notebook(tmp_path / "student.ipynb", parameters=STUDY + TAUGHT)
    write_notebook(tmp_path / "teacher.ipynb", parameters=STUDY)

    def make(params: str, needs: str = "", teacher: str = "model_name: gpt2-large, from_scratch: false"):
        text = f"""\
name: p
stages:
  - {{name: data, notebook: {{here}}/data.ipynb, params: {{block_size: 128, tokenizer: characters}}}}
  - {{name: large, notebook: {{here}}/teacher.ipynb, needs: {{data_folder: data}}, params: {{{teacher}}}}}
  - name: study
    notebook: {{here}}/student.ipynb
    needs: {{data_folder: data{needs}}}
    params: {{model_name: gpt2, from_scratch: false, {params}}}
"""
        return cost(load_plan(write_plan(tmp_path / "p.yaml", text)))

    return make


def test_a_teachers_forward_pass_and_weights_are_counted(taught):
    alone = taught("divergence: none, teacher: gpt2-large")
    assert alone.flops / alone.tokens == pytest.approx(0.76e9, rel=0.01)
    given = taught("teacher: gpt2-large")
    assert (given.flops - alone.flops) / given.tokens == 2 * LARGE + ATTENTION == pytest.approx(1.55e9, rel=0.02)
    assert given.memory - alone.memory == 4 * LARGE
    assert given.hours / alone.hours == pytest.approx(given.flops / alone.flops)
    needed = taught("max_steps: 100", ", teacher: large")
    assert (needed.flops, needed.memory, needed.left_out) == (given.flops, given.memory, ())
    two = taught("second_teacher: gpt2-large", ", teacher: large")
    assert two.flops - alone.flops == 2 * (given.flops - alone.flops)


def test_a_forward_pass_is_what_pytorch_counts():
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    config = build_config("tiny", 512, 64)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(2, 64, dtype=torch.long))
    estimated = Model(config, count_parameters(config)).forward(64) * 2 * 64
    assert estimated == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_a_stored_teacher_is_paid_once_and_that_is_said(taught, tmp_path):
    alone = taught("divergence: none")
    output = 50257 * 1280
    hidden = taught("teacher: gpt2-large, teacher_cache: hidden")
    assert (hidden.flops - alone.flops) / alone.tokens == 2 * output
    assert hidden.memory - alone.memory == 4 * output
    topk = taught("teacher: gpt2-large, teacher_cache: topk")
    assert (topk.flops, topk.memory) == (alone.flops, alone.memory)
    listing = plan_listing(load_plan(tmp_path / "p.yaml"), "A100", 0.4)
    assert listing.count("Not counted: storing what a teacher says, one forward pass over the data") == 1


def test_a_teacher_that_cannot_be_sized_is_said_to_be_left_out(taught, monkeypatch):
    alone = taught("divergence: none")
    unknown = taught("max_steps: 100", ", teacher: large", "from_scratch: true, model_name: gpt2-large")
    assert unknown.flops == alone.flops
    assert unknown.left_out == ("the teacher of large, whose size is not known yet",)
    assert taught("max_steps: 100").left_out == ("the small teacher that is made where none is named",)
    monkeypatch.setattr("nbutils.batch.cost._model", unreachable_but("gpt2"))
    far = taught("teacher: some/model")
    assert far.flops == alone.flops and "some/model, which cannot be reached" in far.left_out[0]


def unreachable_but(here: str):
    """The sizes of models without a network: every name but one is out of reach."""

    def size(name, vocab_size, block_size):
        if name != here:
            raise UnreachableModelError(name)
        config = build_config(name, vocab_size, block_size)
        return Model(config, count_parameters(config))

    return size


def test_tokens_count_accumulation_and_processes(make_plan):
    base = cost(make_plan())
    assert base.tokens == 100 * 8 * 64
    assert cost(make_plan("gradient_accumulation_steps: 3")).tokens == 3 * base.tokens
    double = cost(make_plan("processes: 2"))
    assert double.tokens == 2 * base.tokens
    assert double.hours == pytest.approx(2 * base.hours)  # of two GPUs together
    assert cost(make_plan(), "H100").hours == pytest.approx(base.hours * 312 / 989)
    assert cost(make_plan(), utilisation=0.2).hours == pytest.approx(2 * base.hours)


def test_by_epochs_nothing_is_invented_before_the_data_is_there(make_plan, tmp_path):
    plan = make_plan("max_steps: 0, num_train_epochs: 2.5")
    unknown = cost(plan)
    assert (unknown.tokens, unknown.flops, unknown.hours) == (None, None, None)
    assert unknown.parameters > 0
    listing = plan_listing(plan, "A100", 0.4)
    assert "by the data" in listing
    assert "Not counted: 1 runs whose tokens" in listing
    card = {"block_size": 64, "vocab_size": 300, "splits": {"train": {"blocks": 40}}, "fingerprint": "f"}
    (tmp_path / "prepared" / "data").mkdir(parents=True)
    (tmp_path / "prepared" / "data" / "card.json").write_text(json.dumps(card))
    params = f"{{max_steps: 0, data_folder: {tmp_path}/prepared}}"
    text = f"name: p\nstages:\n  - {{name: study, notebook: {{here}}/study.ipynb, params: {params}}}\n"
    known = cost(load_plan(write_plan(tmp_path / "q.yaml", text)))
    assert known.tokens == 40 * 64
    assert known.parameters == count_parameters(build_config("tiny", 300, 64))


def test_questions_and_answers_are_counted_by_their_tokens(make_plan, tmp_path):
    """100 examples of 30 tokens and an end token in mean, in blocks of at most 64."""
    unknown = cost(make_plan(data="task: qa"))
    assert (unknown.tokens, unknown.parameters > 0) == (None, True)
    train = {"blocks": 100, "tokens": 3000, "end_tokens": 100}
    card = {"task": "qa", "block_size": 64, "vocab_size": 300, "splits": {"train": train}, "fingerprint": "f"}
    (tmp_path / "pairs" / "data").mkdir(parents=True)
    (tmp_path / "pairs" / "data" / "card.json").write_text(json.dumps(card))
    for params, tokens in (("max_steps: 0, num_train_epochs: 2.0", 6200), ("max_steps: 5", 5 * 8 * 31)):
        text = f"{{{params}, data_folder: {tmp_path}/pairs}}"
        plan = f"name: p\nstages:\n  - {{name: study, notebook: {{here}}/study.ipynb, params: {text}}}\n"
        assert cost(load_plan(write_plan(tmp_path / "q.yaml", plan))).tokens == tokens


def test_a_vocabulary_that_is_not_known_gives_no_estimate(make_plan):
    assert cost(make_plan(data="tokenizer: unigram")).parameters == cost(make_plan()).parameters
    assert cost(make_plan(data="tokenizer: characters")) is None
    assert cost(make_plan("model_name: gpt2, from_scratch: false", data="tokenizer: gpt2")).parameters == 124_439_808


def test_unknown_gpus_are_refused():
    with pytest.raises(ParameterError, match=r"no data on a GPU 'A1000'. Did you mean 'A100'"):
        check_gpu("A1000", 0.4)
    for utilisation in (0.0, 1.5, float("nan")):
        with pytest.raises(ParameterError, match="fraction of the GPU's peak"):
            check_gpu("A100", utilisation)


def test_the_listing_names_variants_parameters_and_totals(make_plan):
    listing = plan_listing(make_plan("max_steps: 7"), "A100", 0.4)
    assert "max_steps=7" in listing
    assert "needs     data_folder from data" in listing
    assert f"{7 * 8 * 64:,}" in listing
    assert "in 1 training runs" in listing
    assert listing.endswith("Nothing was started.")
