"""The whole way: documents in, arms trained through papermill, a report out; and nanoGPT's known answer."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from real_data import REAL_DATA, needs_real_data

from nbutils.foundation.places import PARAMS
from nbutils.runs.contrasts import known_results
from nbutils.runs.run_folder import load_runs

PLAN = """
name: small
stages:
  - name: data
    notebook: 01_data_prep
    params:
      {dataset_name: text, data_files: "FOLDER/*.txt", vocab_size: 320, block_size: 32, dedup: "off", ascii_only: true}
  - name: cosine
    notebook: 04_cosine_mixing
    needs: {data_folder: data}
    params: {max_steps: 12, eval_steps: 6, learning_rate: 3e-3, samples: 2}
    matrix: {alpha: [0.0, 0.5], seed: [1]}
  - name: prefix
    notebook: 05_prefix_smoothing
    needs: {data_folder: data}
    params: {max_steps: 6, eval_steps: 3, per_device_train_batch_size: 4, learning_rate: 3e-3, samples: 1, processes: 2,
             tasks: [piqa], tasks_folder: "FOLDER/tasks", harness_steps: 3, words: [" the"]}
contrasts:
  - name: mixing
    question: Is it worse?
    stage: cosine
    metric: test_ce_loss
    treatment: {alpha: 0.5}
    control: {alpha: 0.0}
    better: lower
    claim: no worse
    smallest_effect: 0.01
    primary: true
"""


def command(*words):
    return subprocess.run([sys.executable, "-m", "nbutils", *map(str, words)], capture_output=True, text=True)


def write_documents(folder, number=60):
    """Sentences of few words, in documents of some 400 characters that are all different, and a task."""
    generator = random.Random(0)
    words = ["the", "a", "small", "large", "model", "reads", "writes", "text", "token", "cat", "sees", "of", "every"]
    for i in range(number):
        text = " ".join(generator.choice(words) for _ in range(80)) + f" number {i}."
        (folder / f"document{i:03d}.txt").write_text(text)
    items = folder / "tasks" / "piqa"
    items.mkdir(parents=True)
    item = json.dumps({"goal": "the cat", "sol1": "reads text", "sol2": "writes text"})
    (items / "valid.jsonl").write_text(f"{item}\n" * 4)
    (items / "valid-labels.lst").write_text("0\n1\n" * 2)


@pytest.mark.slow
def test_documents_become_a_report(tmp_path):
    """Three trainings, one of them in two processes; every number of a run is the one its documents say."""
    write_documents(tmp_path)
    plan = tmp_path / "small.yaml"
    plan.write_text(PLAN.replace("FOLDER", str(tmp_path)))
    runs = tmp_path / "runs"
    done = command("batch", plan, "--out", runs / "small")
    assert done.returncode == 0, done.stdout + done.stderr
    finished = {run.variant: run for run in load_runs(runs)}
    assert len(finished) == 4 and all(run.status == "finished" for run in finished.values())
    for name, run in finished.items():
        if run.stage == "cosine":
            assert run.result.keys() <= known_results(Path(run.notebook).stem)
            assert run.result["steps"] == 12 and run.result["tokens_seen"] == 12 * 8 * 32
            assert run.metrics()["step"].max() == 12 and len(run.samples()) == 2
            assert (run.folder / "model" / "model.safetensors").is_file()
            assert (run.folder / "model_best" / "model.safetensors").is_file()
        if name != "data":
            sums = run.per_document().query("split == 'test'")
            assert sums["ce_sum"].sum() / sums["tokens"].sum() == pytest.approx(run.result["test_ce_loss"])
    run = finished["prefix"]
    assert run.result["tokens_seen"] == 6 * 2 * 4 * 32  # steps, processes, blocks, tokens
    assert sorted(path.name for path in (run.folder / "ranks").glob("*.log")) == ["rank0.log", "rank1.log"]
    assert run.metrics()["loss"].notna().sum() == 6, "the step with tasks has its loss, too"
    assert run.metrics()["eval_piqa_acc"].notna().sum() == 1 and run.result["piqa_acc"] == 0.5
    sums = run.per_document().query("split == 'test'")
    assert sums["unsmoothed_ce_sum"].sum() / sums["tokens"].sum() == pytest.approx(run.result["test_unsmoothed_ce"])
    assert 0 < run.result["effective_smoothing"] < 1

    again = command("batch", plan, "--out", runs / "small")
    assert again.returncode == 0 and "start" not in again.stdout

    html = tmp_path / "report.html"
    report = command("report", "--runs", runs, "--plan", plan, "--out", html)
    assert report.returncode == 0, report.stdout + report.stderr
    text = html.read_text()
    assert "Is it worse?" in text and "<script" not in text and "http://" not in text.replace("http://www.w3.org", "")


@pytest.mark.soak
@needs_real_data
def test_nanogpts_cpu_setting_reaches_its_published_loss(tmp_path):
    """4 layers, 128 wide, 2,000 steps on tinyshakespeare's characters: about 1.88 nats, as nanoGPT's README reports."""
    plan = yaml.safe_load((PARAMS / "nanogpt.yaml").read_text())
    plan["stages"][0]["params"]["data_files"] = f"{REAL_DATA}/tinyshakespeare/input.txt"
    (tmp_path / "nanogpt.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    done = command("batch", tmp_path / "nanogpt.yaml", "--out", tmp_path / "runs")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "runs" / "train" / "result.json").read_text())
    assert 1.80 < result["eval_ce_loss"] < 1.93
