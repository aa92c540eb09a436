"""The process that kernels are forked from: nobody outlives anybody, and what cannot be forked is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from small_batches import LIGHT, STUDY, batch, endings
from tiny_notebooks import write_notebook, write_plan

from nbutils.batch.hosting import kernel_host
from nbutils.batch.kernel_host import KernelHost, read_sources
from nbutils.batch.runner import flat_variant, run_variant
from nbutils.batch.warm_kernels import HostUnavailable, WarmKernel
from nbutils.runs.attempts import Place
from nbutils.runs.run_folder import load_runs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux alone"),
]
RUNNER = """
import sys
from pathlib import Path
from nbutils.batch.runner import flat_variant, run_variant
from nbutils.batch.hosting import use_host
host, notebook, folder = map(Path, sys.argv[1:])
use_host(host)
sys.exit(run_variant(flat_variant(notebook, "variant", {}), "plan", folder).exit_code)
"""
PIDS = """\
import os, subprocess, time
child = subprocess.Popen(["sleep", "300"])
open(run_folder + "/pids", "w").write(f"{os.getpid()} {child.pid} {os.getppid()}")
"""


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(path: Path, seconds: float = 60) -> str:
    deadline = time.monotonic() + seconds
    while not (path.is_file() and path.read_text()):
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.05)
    return path.read_text()


def assert_gone(processes: list[int], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while any(map(is_alive, processes)):
        assert time.monotonic() < deadline, processes
        time.sleep(0.05)


@contextmanager
def host_of(folder: Path, *modules: str):
    with kernel_host(modules or LIGHT, dict(os.environ), folder / "host.log") as address:
        yield address


def start_runner(host: Path, folder: Path, *cells: str, **environment: str) -> subprocess.Popen:
    notebook = write_notebook(folder / "variant.ipynb", *cells)
    command = [sys.executable, "-c", RUNNER, str(host), str(notebook), str(folder / "runs")]
    # The environment as the host has it, without what readline hides in the process's own.
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment)


# ---- nothing outlives its runner ------------------------------------------------------------------------------------


@pytest.mark.parametrize("busy", ["time.sleep(100)", "sum(range(10**12))"])  # the second never lets go of the GIL
def test_a_kernel_ends_with_its_runner(tmp_path, busy):
    with host_of(tmp_path) as host:
        with start_runner(host, tmp_path, PIDS, busy) as runner:
            kernel, child, parent = map(int, wait_for(tmp_path / "runs/.attempts/variant/pids").split())
            runner.kill()
        assert_gone([kernel, child])
        assert is_alive(parent)  # the host, for other runners
    assert not is_alive(parent)


def test_a_kernel_that_its_batch_host_refuses_has_one_of_its_runner(tmp_path):
    """As one with other threads than most: it ends with its runner all the same, and its memory is counted."""
    with host_of(tmp_path) as host:
        with start_runner(host, tmp_path, PIDS, "time.sleep(100)", OMP_NUM_THREADS="3") as runner:
            processes = [*map(int, wait_for(tmp_path / "runs/.attempts/variant/pids").split())]
            runner.kill()
        assert_gone(processes)
        with start_runner(host, tmp_path, PIDS, OMP_NUM_THREADS="3") as runner:
            told = runner.communicate(timeout=30)[1]
            assert runner.returncode == 0
    assert "This kernel imports for itself" in told and "is not the one it imported under: OMP_NUM_THREADS" in told
    (run,) = load_runs(tmp_path / "runs")
    assert_gone([*map(int, (run.folder / "pids").read_text().split())])
    assert 20 < run.manifest["attempts"][-1]["peak_memory_mib"] < 300


def test_a_kernel_ends_with_its_host(tmp_path):
    """Also where it never lets go of the GIL and its runner is asleep; that wakes up to the rest."""
    with host_of(tmp_path) as host, start_runner(host, tmp_path, PIDS, "sum(range(10**12))") as runner:
        kernel, child, parent = map(int, wait_for(tmp_path / "runs/.attempts/variant/pids").split())
        runner.send_signal(signal.SIGSTOP)
        os.kill(parent, signal.SIGKILL)
        try:
            assert_gone([kernel])
        finally:
            runner.send_signal(signal.SIGCONT)
        assert runner.wait(20) == 138
        assert not is_alive(child)


@pytest.mark.parametrize("busy", ["time.sleep(100)", "sum(range(10**12))"])
def test_a_runner_asked_to_stop_ends_its_kernel(tmp_path, busy):
    with host_of(tmp_path) as host, start_runner(host, tmp_path, PIDS, busy) as runner:
        kernel, child, _ = map(int, wait_for(tmp_path / "runs/.attempts/variant/pids").split())
        time.sleep(0.3)
        runner.terminate()
        assert runner.wait(20) == 75
        assert not is_alive(kernel)
        assert not is_alive(child)


def test_a_cell_is_interrupted(tmp_path):
    """SIGINT reaches a warm kernel as it does a fresh one: KeyboardInterrupt in the cell, the kernel lives on."""
    interrupt = "import os, signal, time\ntry:\n    os.kill(os.getpid(), signal.SIGINT); time.sleep(30)\n"
    note = "except KeyboardInterrupt:\n    open(run_folder + '/interrupted', 'w').write('yes')"
    with host_of(tmp_path) as host, start_runner(host, tmp_path, interrupt + note) as runner:
        assert runner.wait(25) == 0
    assert (tmp_path / "runs" / "variant" / "interrupted").read_text() == "yes"


def test_without_its_host_a_batch_goes_on_with_fresh_kernels(tmp_path):
    kill = "import os, signal, time\nif seed == 0: os.kill(os.getppid(), signal.SIGKILL); time.sleep(10)"
    write_notebook(tmp_path / "study.ipynb", kill, parameters=STUDY)
    work = batch(tmp_path, 3, LIGHT, workers=1)
    assert [*endings(work).values()] == ["killed", "finished", "finished"]
    log = Place(tmp_path / "runs", "study-seed1").log.read_text()
    assert "This kernel imports for itself: the kernel host forks none, because it does not answer" in log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("words", [[], ["--fresh-kernels"]])
def test_a_stopped_batch_leaves_no_process(tmp_path, number, words):
    write_notebook(tmp_path / "study.ipynb", PIDS, "time.sleep(100)", parameters=STUDY)
    stage = "{name: study, notebook: {here}/study.ipynb, matrix: {seed: [1, 2, 3]}}"
    plan, folder = write_plan(tmp_path / "p.yaml", f"name: p\nstages:\n  - {stage}\n"), tmp_path / "runs"
    command = [sys.executable, "-m", "nbutils", "batch", plan, "--workers", "2", "--out", folder, *words]
    heard = partial(signal.signal, number, signal.SIG_DFL)  # children of a background job are born deaf to Ctrl-C
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, preexec_fn=heard) as process:
        pids = [wait_for(folder / f".attempts/study-seed{seed}/pids").split() for seed in (1, 2)]
        process.send_signal(number)
        process.wait(30)
    assert not any(is_alive(int(pid)) for pid in pids[0] + pids[1])
    parents = {runner for _, _, runner in pids}
    assert len(parents) == (2 if words else 1)  # a runner each, or the host


def test_a_batch_that_is_killed_leaves_its_runners_to_finish_and_then_nothing(tmp_path):
    write_notebook(tmp_path / "study.ipynb", PIDS, "time.sleep(3)", "child.kill()", parameters=STUDY)
    text = "name: p\nstages:\n  - {name: study, notebook: {here}/study.ipynb, matrix: {seed: [1, 2]}}\n"
    plan, folder = write_plan(tmp_path / "p.yaml", text), tmp_path / "runs"
    code = (
        "import sys; from pathlib import Path\n"
        "from nbutils.batch.batch import Batch; from nbutils.runs.plans import load_plan\n"
        "from nbutils.batch.local_engine import LocalEngine; from nbutils.batch.progress import LogDisplay\n"
        "if __name__ == '__main__':\n"
        "    plan = load_plan(Path(sys.argv[1]))\n"
        "    engine = LocalEngine(plan.name, Path(sys.argv[2]), 1, preloaded=('json',))\n"
        "    Batch(plan, Path(sys.argv[2]), plan.variants, engine).run(LogDisplay(sys.stdout))\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    with subprocess.Popen([sys.executable, script, plan, folder], stdout=subprocess.DEVNULL) as process:
        processes = [*map(int, wait_for(folder / ".attempts/study-seed1/pids").split())]
        process.kill()
    wait_for(folder / "study-seed1" / "manifest.json")
    assert_gone(processes)
    assert [run.status for run in load_runs(folder)] == ["finished"]


# ---- nor does what it has started, in a session of its own ----------------------------------------------------------

SESSIONS = """\
import os, subprocess, time
own = subprocess.Popen(["sleep", "300"], start_new_session=True)
orphan = subprocess.run("setsid sh -c 'sleep 300 >/dev/null & echo $!'", shell=True, stdout=-1, text=True).stdout
nested = subprocess.Popen(["setsid", "sh", "-c", "setsid sleep 300 & echo $! > nested; wait"], cwd=run_folder)
while not (os.path.exists(run_folder + "/nested") and open(run_folder + "/nested").read()): time.sleep(0.01)
open(run_folder + "/pids", "w").write(f"{own.pid} {orphan} {nested.pid} {open(run_folder + '/nested').read()}")
"""


def started(folder: Path) -> list[int]:
    """The processes that SESSIONS has started."""
    processes = [*map(int, wait_for(folder / "pids").split())]
    assert len(processes) == 4 and all(map(is_alive, processes))
    return processes


def test_a_session_of_its_own_ends_with_the_runner_whose_kernel_began_it(tmp_path):
    """And not with that of another kernel of the same host."""
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
    with host_of(tmp_path) as host:
        runners = [start_runner(host, folder, SESSIONS, "time.sleep(100)") for folder in folders]
        one, other = (started(folder / "runs/.attempts/variant") for folder in folders)
        runners[0].kill()
        assert_gone(one)
        assert all(map(is_alive, other))
        runners[1].kill()
        assert_gone(other)
        for runner in runners:
            runner.communicate(timeout=10)


@pytest.mark.parametrize("environment", [{}, {"OMP_NUM_THREADS": "3"}])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_session_of_its_own_ends_with_a_stopped_runner(tmp_path, environment, number):
    with (
        host_of(tmp_path) as host,
        start_runner(host, tmp_path, SESSIONS, "sum(range(10**12))", **environment) as runner,
    ):
        processes = started(tmp_path / "runs/.attempts/variant")
        runner.send_signal(number)
        runner.communicate(timeout=30)
        assert_gone(processes)


@pytest.mark.parametrize(
    ("end", "code"), [("x = 1", 0), ("1 / 0", 1), ("os._exit(3)", 138), ("os.kill(os.getpid(), 9)", 138)]
)
def test_a_session_of_its_own_ends_with_its_notebook(tmp_path, end, code):
    write_notebook(tmp_path / "variant.ipynb", SESSIONS, end)
    outcome = run_variant(flat_variant(tmp_path / "variant.ipynb", "variant", {}), "plan", tmp_path / "runs")
    assert outcome.exit_code == code
    processes = [*map(int, (outcome.folder / "pids").read_text().split())]
    assert len(processes) == 4 and not any(map(is_alive, processes))


# ---- where no kernel can be forked ----------------------------------------------------------------------------------


def refused(tmp_path: Path, source: str, **environment: str) -> str:
    """Why a host that has imported a module of this source forks no kernel."""
    (tmp_path / "library.py").write_text(source)
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    with (
        kernel_host(["library"], variables, tmp_path / "host.log") as address,
        pytest.raises(HostUnavailable) as refusal,
    ):
        WarmKernel(address, [], variables | environment, str(tmp_path), (1, 2))
    return str(refusal.value)


def test_no_kernel_is_forked_from_a_process_with_threads(tmp_path):
    source = "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    assert refused(tmp_path, source).startswith("it has threads: ")


def test_an_import_that_fails_is_told(tmp_path):
    assert refused(tmp_path, "raise RuntimeError('broken')") == "it could not import library"
    assert "RuntimeError: broken" in (tmp_path / "host.log").read_text()


def test_another_environment_needs_another_import(tmp_path):
    told = refused(tmp_path, "", HF_HOME="/elsewhere", CUDA_VISIBLE_DEVICES="1")
    assert told == "the environment is not the one it imported under: HF_HOME, TQDM_MININTERVAL"


def test_changed_code_is_imported_anew(tmp_path):
    environment = {"A": "1"}
    host = KernelHost(None, None, environment, {}, read_sources())
    assert host._another_kernel(environment | {"CUDA_VISIBLE_DEVICES": "1"}) is None
    path = tmp_path / "training.py"
    path.write_text("a = 1")
    host.sources[path] = (path.stat().st_size, path.stat().st_mtime_ns)
    assert host._another_kernel(environment) is None
    path.write_text("a = 10")
    assert host._another_kernel(environment) == "nbutils has changed since it was imported: training.py"
    path.unlink()
    assert "training.py" in host._another_kernel(environment)


def test_signals_of_the_host_are_not_its_kernels(tmp_path):
    """The host hears no SIGTERM, which a scheduler sends to all processes at once; its kernels do."""
    code = "import os, signal\nos.kill(os.getppid(), signal.SIGTERM)\nassert signal.getsignal(15) == signal.SIG_DFL"
    with host_of(tmp_path) as host:
        for number in (1, 2):
            (tmp_path / str(number)).mkdir()
            with start_runner(host, tmp_path / str(number), code) as runner:
                assert runner.wait(30) == 0
                assert "imports for itself" not in runner.stderr.read()
