"""Kernels forked from a process that has imported already are the same as fresh ones."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from small_batches import LIGHT, STUDY, batch, endings
from tiny_notebooks import write_notebook

from nbutils.batch.batch import Batch
from nbutils.batch.hosting import PRELOADED
from nbutils.batch.local_engine import LocalEngine
from nbutils.batch.progress import LogDisplay
from nbutils.runs.attempts import Place
from nbutils.runs.metric_labels import is_of_the_machine
from nbutils.runs.plans import load_plan
from nbutils.runs.run_folder import load_runs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux alone"),
]
STATE = """\
import json, os, random, signal, sys
before = sorted(set(sys.modules) & {"torch", "transformers", "datasets", "pandas", "nbutils.training.trainer"})
for module in __import__("nbutils.batch.hosting").hosting.PRELOADED:
    __import__(module)
import matplotlib, numpy, torch, tqdm.auto, transformers.trainer
from datasets.fingerprint import generate_random_fingerprint as random_name
state = {
    "argv": [sys.argv[0], len(sys.argv)],
    "path": sys.path,
    "folder": os.getcwd(),
    "environment": {k: v for k, v in os.environ.items() if k not in ("JPY_PARENT_PID", "WORKBOOK_RUN_FOLDER", "_")},
    "session": [os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid()],
    "signals": {each.name: str(signal.getsignal(each)).split(" at 0x")[0] for each in signal.Signals},
    "blocked": list(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "input": os.read(0, 1).decode(),
    "main": sys.modules["__main__"].__name__ + str(hasattr(sys.modules["__main__"], "__file__")),
    "progress": [str(transformers.trainer.DEFAULT_PROGRESS_CALLBACK), str(tqdm.auto.tqdm.__mro__)],
    "shell": str(type(sys.modules["IPython"].get_ipython())),
    "figures": matplotlib.get_backend(),
    "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
    "sum": torch.ones(3000, 300).softmax(1).pow(2).sum().item().hex(),
    "allocator": os.environ.get("JE_ARROW_MALLOC_CONF"),
    "unseeded": [random.random(), numpy.random.rand(), torch.rand(1).item(), random_name()],
    "imported before": before,
}
print("printed")
print("complaint", file=sys.stderr)
sys.modules["transformers"].logging.get_logger("transformers.a").warning("a library's complaint")
os.system("echo from a process")
json.dump(state, open(run_folder + "/state.json", "w"))
"""
FIGURE = "import matplotlib.pyplot as plt\nplt.plot([1, 2]);"


def outputs(run_folder: Path) -> list:
    """What the cells printed, all of a stream together, and the kinds of what they showed."""
    cells = json.loads((run_folder / "notebook.ipynb").read_text())["cells"]
    streams: dict[str, str] = {}
    kinds = []
    for output in [each for cell in cells for each in cell.get("outputs", [])]:
        if output["output_type"] == "stream":
            lines = [line for line in output["text"] if "TqdmWarning" not in line and "notebook_tqdm" not in line]
            streams[output["name"]] = streams.get(output["name"], "") + "".join(lines)
        else:
            kinds.append((output["output_type"], sorted(output.get("data", []))))
    return [{name: sorted(text.split("\n")) for name, text in streams.items()}, kinds]


# ---- the same as fresh ones -----------------------------------------------------------------------------------------


def test_a_warm_kernel_finds_what_a_fresh_one_finds(tmp_path):
    states, shown, at_first = {}, {}, dict(os.environ)
    for kind, preloaded in (("fresh", ()), ("warm", PRELOADED)):
        folder = tmp_path / kind
        folder.mkdir()
        write_notebook(folder / "study.ipynb", STATE, FIGURE, parameters=STUDY)
        assert set(endings(batch(folder, 2, preloaded)).values()) == {"finished"}
        states[kind] = [json.loads((folder / "runs" / f"study-seed{i}" / "state.json").read_text()) for i in (0, 1)]
        shown[kind] = outputs(folder / "runs" / "study-seed0")
        assert [state.pop("folder") for state in states[kind]] == [str(folder)] * 2
    before = [state.pop("imported before") for state in states["fresh"] + states["warm"]]
    assert before[:2] == [[], []]
    assert before[2:] == [["datasets", "nbutils.training.trainer", "pandas", "torch", "transformers"]] * 2
    unseeded = [state.pop("unseeded") for state in states["fresh"] + states["warm"]]
    assert all(len(set(numbers)) == 4 for numbers in zip(*unseeded, strict=True))
    late = {name for name, value in os.environ.items() if at_first.get(name) != value}  # as torch does, by this process
    for state in states["fresh"] + states["warm"]:
        state["environment"] = {name: value for name, value in state["environment"].items() if name not in late}
    for warm, fresh in zip(states["warm"], states["fresh"], strict=True):
        assert {name for name in warm if warm[name] != fresh[name]} == set()
    assert shown["warm"] == shown["fresh"]
    assert "a library's complaint" in str(shown["warm"]) and "image/png" in str(shown["warm"])


def test_a_warm_kernel_trains_to_the_same_bits(tmp_path):
    words = ["the", "small", "model", "reads", "what", "every", "cat", "writes", "of", "a", "large", "text"]
    for i in range(40):
        text = " ".join(words[(i * j + j // 7) % len(words)] for j in range(60))
        (tmp_path / f"document{i}.txt").write_text(f"{text} number {i}.")
    plan = tmp_path / "small.yaml"
    plan.write_text(f"""
name: small
stages:
  - name: data
    notebook: 01_data_prep
    params: {{dataset_name: text, data_files: "{tmp_path}/*.txt", vocab_size: 300, block_size: 32, dedup: "off"}}
  - name: cosine
    notebook: 04_cosine_mixing
    needs: {{data_folder: data}}
    params: {{max_steps: 8, eval_steps: 4, samples: 1, alpha: 0.5, seed: 1}}
""")
    small, numbers = load_plan(plan), {}
    for kind, preloaded in (("fresh", ()), ("warm", PRELOADED)):
        engine = LocalEngine(small.name, tmp_path / kind, 2, preloaded=preloaded)
        work = Batch(small, tmp_path / kind, list(small.variants), engine)
        with (tmp_path / "display").open("w") as log:
            work.run(LogDisplay(log))
        assert set(endings(work).values()) == {"finished"}, work.table()
        folder = tmp_path / kind / "cosine"
        result = json.loads((folder / "result.json").read_text())
        metrics = next(run for run in load_runs(tmp_path / kind) if run.variant == "cosine").metrics()
        numbers[kind] = [
            {name: value for name, value in result.items() if not is_of_the_machine(name)},
            metrics.drop(columns=[name for name in metrics if is_of_the_machine(name)]).to_csv(),
            (folder / "model" / "model.safetensors").read_bytes(),
            (folder / "samples.jsonl").read_bytes(),
        ]
    assert len(numbers["warm"][0]) > 10
    assert numbers["warm"] == numbers["fresh"]
    assert "imports for itself" not in Place(tmp_path / "warm", "cosine").log.read_text()


def test_every_ending_is_recorded_as_a_fresh_kernels_is(tmp_path):
    ends = (
        "import os, signal, time\nprint('start')\ntime.sleep(0.5)\n"
        "if seed == 1: 1 / 0\n"
        "if seed == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "if seed == 3: os.kill(os.getpid(), signal.SIGTERM); time.sleep(5)\n"
        "if seed == 4: os._exit(3)\n"
        "if seed == 5: import ctypes; ctypes.string_at(0)\n"
    )
    records = {}
    for kind, preloaded in (("fresh", ()), ("warm", LIGHT)):
        folder = tmp_path / kind
        folder.mkdir()
        write_notebook(folder / "study.ipynb", "x = 1", ends, "x = 2", parameters=STUDY)
        batch(folder, 7, preloaded)
        runs = {run.variant: run for run in load_runs(folder / "runs")}
        records[kind] = {
            name: (run.status, run.manifest["exit_code"], run.manifest["error"]) for name, run in runs.items()
        }
    assert records["warm"] == records["fresh"]
    assert [status for status, _, _ in records["warm"].values()].count("finished") == 2
    assert "ended by SIGKILL" in str(records["warm"]["study-seed2"])
    assert "exit code 3" in str(records["warm"]["study-seed4"])
