"""Kernels forked from a process that has imported already are as fresh ones, and nothing outlives its runner."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from batch_processes import PIDS, assert_gone, is_alive, numbers_in, processes_of, start_marked, wait_until
from one_run import run, start_cli
from small_batches import LIGHT, STUDY, batch, endings, run_batch, study_plan
from tiny_notebooks import write_notebook

from nbutils.batch.fork_server import PRELOADED
from nbutils.batch.kernel_keeper import Imports, file_status
from nbutils.batch.local_engine import LocalEngine
from nbutils.foundation.places import ROOT
from nbutils.runs.attempts import Place
from nbutils.runs.metric_labels import is_of_the_machine
from nbutils.runs.run_folder import load_runs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux alone"),
]
STATE = """\
import json, os, random, signal, sys
before = sorted(set(sys.modules) & {"torch", "transformers", "datasets", "pandas", "nbutils.training.trainer"})
from nbutils.batch.fork_server import PRELOADED
for module in PRELOADED:
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


@pytest.mark.soak
def test_a_warm_kernel_finds_what_a_fresh_one_finds(tmp_path):
    states, shown, at_first = [], [], dict(os.environ)
    for kernels, preloaded in ((1, ()), (2, PRELOADED)):
        folder = tmp_path / str(kernels)
        folder.mkdir()
        write_notebook(folder / "study.ipynb", STATE, FIGURE, parameters=STUDY)
        assert set(endings(batch(folder, kernels, preloaded)).values()) == {"finished"}
        for number in range(kernels):
            states.append(json.loads((folder / "runs" / f"study-seed{number}" / "state.json").read_text()))
            shown.append(outputs(folder / "runs" / f"study-seed{number}"))
            assert states[-1].pop("folder") == str(folder)
    warm = ["datasets", "nbutils.training.trainer", "pandas", "torch", "transformers"]
    assert [state.pop("imported before") for state in states] == [[], warm, warm]
    unseeded = [state.pop("unseeded") for state in states]
    assert all(len(set(numbers)) == 3 for numbers in zip(*unseeded, strict=True))
    late = {name for name, value in os.environ.items() if at_first.get(name) != value}  # as torch does, by this process
    for state in states:
        state["environment"] = {name: value for name, value in state["environment"].items() if name not in late}
    fresh, *others = states
    assert [{name for name in fresh if each[name] != fresh[name]} for each in others] == [set(), set()]
    assert shown[0] == shown[1] == shown[2]
    assert "a library's complaint" in str(shown[1]) and "image/png" in str(shown[1])


@pytest.mark.soak
def test_a_warm_kernel_trains_to_the_same_bits(tmp_path):
    words = ["the", "small", "model", "reads", "what", "every", "cat", "writes", "of", "a", "large", "text"]
    for i in range(40):
        text = " ".join(words[(i * j + j // 7) % len(words)] for j in range(60))
        (tmp_path / f"document{i}.txt").write_text(f"{text} number {i}.")
    data = f"{{dataset_name: text, data_files: {tmp_path}/*.txt, vocab_size: 300, block_size: 32, dedup: 'off'}}"
    study = "{max_steps: 8, eval_steps: 4, samples: 1, alpha: 0.5, seed: 1}"
    plan = study_plan(
        tmp_path,
        f"{{name: data, notebook: 01_data_prep, params: {data}}}",
        f"{{name: cosine, notebook: 04_cosine_mixing, needs: {{data_folder: data}}, params: {study}}}",
    )
    numbers = {}
    for kind, preloaded in (("fresh", ()), ("warm", PRELOADED)):
        work = run_batch(plan, LocalEngine(plan.name, tmp_path / kind, 2, preloaded=preloaded))
        assert set(endings(work).values()) == {"finished"}, work.table()
        folder = tmp_path / kind / "cosine"
        metrics = next(run for run in load_runs(tmp_path / kind) if run.variant == "cosine").metrics()
        numbers[kind] = [
            {k: v for k, v in json.loads((folder / "result.json").read_text()).items() if not is_of_the_machine(k)},
            metrics.drop(columns=[name for name in metrics if is_of_the_machine(name)]).to_csv(),
            (folder / "model" / "model.safetensors").read_bytes(),
            (folder / "samples.jsonl").read_bytes(),
        ]
    assert len(numbers["warm"][0]) > 10
    assert numbers["warm"] == numbers["fresh"]
    assert "imports for itself" not in Place(tmp_path / "warm", "cosine").log.read_text()


@pytest.mark.parametrize("endings_made", [3, pytest.param(7, marks=pytest.mark.soak)])
def test_every_ending_is_recorded_as_a_fresh_kernels_is(tmp_path, endings_made):
    ends = (
        "import os, signal, time\nprint('start')\ntime.sleep(0.5)\n"
        "if seed == 1: 1 / 0\n"
        "if seed == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "if seed == 3: os.kill(os.getpid(), signal.SIGTERM); time.sleep(5)\n"
        "if seed == 4: os._exit(3)\n"
        "if seed == 5: import ctypes; ctypes.string_at(0)\n"
        "if seed == 6:\n    try:\n        os.kill(os.getpid(), signal.SIGINT); time.sleep(30)\n"
        "    except KeyboardInterrupt: pass"
    )
    records = {}
    for kind, preloaded in (("fresh", ()), ("warm", LIGHT)):
        folder = tmp_path / kind
        folder.mkdir()
        write_notebook(folder / "study.ipynb", "x = 1", ends, "x = 2", parameters=STUDY)
        batch(folder, endings_made, preloaded)
        records[kind] = {
            run.variant: (run.status, run.manifest["exit_code"], run.manifest["error"])
            for run in load_runs(folder / "runs")
        }
    assert records["warm"] == records["fresh"]
    assert [status for status, _, _ in records["warm"].values()].count("finished") == (2 if endings_made == 7 else 1)
    assert "ended by SIGKILL" in str(records["warm"]["study-seed2"])
    assert endings_made < 7 or "exit code 3" in str(records["warm"]["study-seed4"])


# ---- where none can be forked ---------------------------------------------------------------------------------------


@pytest.mark.soak
def test_a_kernel_of_another_environment_is_a_fresh_process(tmp_path):
    note = (
        "told = os.environ['OMP_NUM_THREADS'] + str('wave' in sys.modules)\nopen(run_folder + '/told', 'w').write(told)"
    )
    write_notebook(tmp_path / "study.ipynb", f"import os, sys\n{note}", parameters=STUDY)
    stage = "{name: %s, notebook: {here}/study.ipynb, matrix: {seed: [1, 2]}, resources: {cpus: %d}}"
    plan = study_plan(tmp_path, stage % ("one", 1), stage.replace("1, 2", "1") % ("two", 2))
    run_batch(plan, LocalEngine(plan.name, tmp_path / "runs", 1, preloaded=("wave",)))
    told = {run.variant: (run.folder / "told").read_text() for run in load_runs(tmp_path / "runs")}
    assert told == {"one-seed1": "1True", "one-seed2": "1True", "two-seed1": "2False"}
    log = Place(tmp_path / "runs", "two-seed1").log.read_text()
    assert "This kernel imports for itself: its environment is not the one of the imports: MKL_NUM_THREADS, OMP" in log


def test_changed_code_and_other_variables_need_another_import(tmp_path):
    path = tmp_path / "training.py"
    path.write_text("a = 1")
    imports = Imports("", {"A": "1"}, {}, {path: file_status(path)}, frozenset())
    assert imports.why_not({"A": "1", "CUDA_VISIBLE_DEVICES": "1"}) == ""
    assert imports.why_not({"A": "2", "B": ""}) == "its environment is not the one of the imports: A, B"
    path.write_text("a = 10")
    assert imports.why_not({"A": "1"}) == "nbutils has changed since it was imported: training.py"
    path.unlink()
    assert "training.py" in imports.why_not({"A": "1"})
    assert Imports("it has threads", {}, {}, {}, frozenset()).why_not({}) == "it has threads"


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()", "started thr"),
        pytest.param("raise RuntimeError('broken')", "library could not be imported", marks=pytest.mark.soak),
    ],
)
def test_imports_that_no_kernel_could_be_forked_from(tmp_path, monkeypatch, source, told):
    (tmp_path / "library.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    write_notebook(tmp_path / "study.ipynb", "x = 1", parameters=STUDY)
    assert set(endings(batch(tmp_path, 2, ("library",))).values()) == {"finished"}
    assert told in Place(tmp_path / "runs", "study-seed0").log.read_text()


# ---- nothing outlives its runner ------------------------------------------------------------------------------------

SESSIONS = """\
import os, subprocess, time
own = subprocess.Popen(["sleep", "300"], start_new_session=True)
orphan = subprocess.run("setsid sh -c 'sleep 300 >/dev/null & echo $!'", shell=True, stdout=-1, text=True).stdout
nested = subprocess.Popen(["setsid", "sh", "-c", "setsid sleep 300 & echo $! > nested; wait"], cwd=run_folder)
while not (os.path.exists(run_folder + "/nested") and open(run_folder + "/nested").read()): time.sleep(0.01)
open(run_folder + "/sessions", "w").write(f"{own.pid} {orphan} {nested.pid} {open(run_folder + '/nested').read()}")
"""
BUSY = "sum(range(10**12))"  # never lets go of the GIL


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.soak), signal.SIGKILL])
def test_what_a_kernel_has_started_ends_with_its_runner(tmp_path, number):
    """Also in sessions of its own, while the kernel is in compiled code."""
    attempt = tmp_path / "runs/.attempts/variant"
    with start_cli(tmp_path / "runs", PIDS, SESSIONS, BUSY) as runner:
        processes = numbers_in(attempt / "sessions") + numbers_in(attempt / "pids")
        assert all(map(is_alive, processes)) and processes[-1] == runner.pid
        runner.send_signal(number)
        assert_gone(processes[:-1])
        runner.communicate()
    assert runner.returncode == (75 if number == signal.SIGTERM else -9)


@pytest.mark.parametrize(("end", "code"), [("x = 1", 0), ("os.kill(os.getpid(), 9)", 138)])
def test_what_a_kernel_has_started_ends_with_its_notebook(tmp_path, end, code):
    outcome, _ = run(tmp_path / "runs", SESSIONS, end)
    assert outcome.exit_code == code
    processes = numbers_in(outcome.folder / "sessions")
    assert len(processes) == 4 and not any(map(is_alive, processes))


def test_a_kernel_ends_with_its_keeper(tmp_path):
    with start_cli(tmp_path / "runs", PIDS, BUSY) as runner:
        kernel, child, keeper, _ = numbers_in(tmp_path / "runs/.attempts/variant/pids")
        os.kill(keeper, signal.SIGKILL)
        assert runner.wait() == 138
        assert_gone([kernel, child])


def test_warm_runners_and_kernels_end_alone(tmp_path):
    """A runner is killed: its kernel ends, and not the one of another runner of the same batch."""
    kill = "time.sleep(1)\nif seed == 0: os.kill(runner, 9)\ntime.sleep(3)\nchild.kill()"
    write_notebook(tmp_path / "study.ipynb", PIDS, kill, parameters=STUDY)
    work = batch(tmp_path, 2, LIGHT)
    assert endings(work) == {"study-seed0": "killed", "study-seed1": "finished"}
    assert work.outcomes["study-seed0"].message.startswith("the runner itself was killed; its log is ")
    assert_gone(numbers_in(tmp_path / "runs/.attempts/study-seed0/pids"))


@pytest.mark.soak
def test_a_server_that_is_killed_is_replaced_and_its_runners_go_on(tmp_path):
    kill = f"{PIDS}\nserver = int(open(f'/proc/{{runner}}/stat').read().rsplit(')', 1)[1].split()[1])\nchild.kill()"
    kill += "\nif seed == 0: os.kill(server, 9); time.sleep(1)"
    write_notebook(tmp_path / "study.ipynb", kill, parameters=STUDY)
    assert [*endings(batch(tmp_path, 3, LIGHT, workers=1)).values()] == ["finished"] * 3


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.soak),
        signal.SIGTERM,
        pytest.param(signal.SIGKILL, marks=pytest.mark.soak),
    ],
)
def test_a_batch_that_ends_leaves_no_process(tmp_path, number):
    """Asked to stop, it stops its runners; killed, it leaves them to finish what they are at."""
    write_notebook(tmp_path / "study.ipynb", PIDS, "time.sleep(3 if seed < 2 else 300)", parameters=STUDY)
    seeds = [1] if number == signal.SIGKILL else [2, 3, 4]
    study_plan(tmp_path, f"{{name: study, notebook: {{here}}/study.ipynb, matrix: {{seed: {[*seeds, 5]}}}}}")
    runs, workers = tmp_path / "runs", min(2, len(seeds))
    words = ("batch", str(tmp_path / "p.yaml"), "--out", str(runs), "--workers", str(workers), "--fresh-kernels")
    with start_marked(tmp_path, *words) as process:
        wait_until(lambda: len([*runs.glob(".attempts/*/pids")]) == workers)
        process.send_signal(number)
        told = process.stdout.read() if number != signal.SIGKILL else ""
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGKILL: -9}[number], told
    if number != signal.SIGKILL:
        assert "go on with: python -m nbutils batch" in told
    wait_until(lambda: not processes_of(str(tmp_path)), 30)
    expected = ["finished"] if number == signal.SIGKILL else ["preempted"] * 2
    assert [run.status for run in load_runs(runs)] == expected


def test_what_is_preloaded_is_there():
    """A module that has moved would make every kernel of a batch import for itself."""
    ours = [ROOT / each.replace(".", "/") for each in PRELOADED if each.startswith("nbutils.")]
    assert len(ours) > 3 and all(each.is_dir() or each.with_suffix(".py").is_file() for each in ours)
