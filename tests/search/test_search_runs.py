"""The search with real runs: trials pruned, shared, stopped and gone on with, and the notebook of it all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from student import PARAMETERS, SPACE, loss, refused, search_for, tried, write_student, write_study
from tiny_notebooks import write_notebook

from nbutils.batch.status import plan_status
from nbutils.foundation.errors import RunError
from nbutils.foundation.places import ROOT
from nbutils.runs.attempts import Place
from nbutils.runs.plans import load_plan
from nbutils.runs.run_folder import load_runs
from nbutils.search import Confirmation, best_plan, read_setting, trial_table
from nbutils.search.setting import prepare
from nbutils.search.study import INDEX, PARAMS

pytestmark = pytest.mark.slow


@pytest.fixture
def notebook(tmp_path):
    return write_student(tmp_path)


@pytest.fixture
def setting(notebook):
    return read_setting(str(notebook))


@pytest.fixture
def plan(tmp_path):
    return write_study(tmp_path)


def test_trials_are_runs_and_are_pruned_and_become_a_plan(setting, notebook, tmp_path, capsys):
    slow = read_setting(str(notebook), fixed=["seconds: 1.0"])
    # the first two run at once; the third is worse than both
    search = search_for(tmp_path / "study.db", slow, trials=4, pruning_startup=1, seed=4, workers=2)
    good = {"learning_rate": 1e-3, "kl_weight": 0.3}
    for values in (good, good | {"learning_rate": 1e-2}, good | {"learning_rate": 1e-1}):
        search.shared.study.enqueue_trial(values)
    search.run()
    table = trial_table(search.shared)
    assert table["trial"].tolist() == [0, 1, 2, 3]
    assert table["state"][0] == "finished" and table["value"][0] == pytest.approx(1 + 4 / 30 - 0.1)  # not the last
    assert table["state"][2] == "pruned" and 1 <= table["evaluations"][2] < 4
    runs = {run.variant: run for run in load_runs(tmp_path / "trials")}
    assert list(runs) == ["trial-0000", "trial-0001", "trial-0002", "trial-0003"]
    assert (runs["trial-0000"].status, runs["trial-0002"].status) == ("finished", "preempted")
    assert runs["trial-0000"].params["evaluate_test"] is False
    assert not any("test" in name for run in runs.values() for name in run.result)
    assert not (runs["trial-0000"].folder / "model").exists()
    assert "trial 2: pruned at step 10" in capsys.readouterr().out
    plan = load_plan(tmp_path / "trials.yaml")
    told = plan_status(plan, tmp_path / "trials")
    assert "trials: " in told and "trial-0002  preempted" in told and "waiting" not in told
    made = load_plan(best_plan(search, Confirmation("divergence: none", (1, 2))))
    assert [variant.params["divergence"] for variant in made.variants] == ["none", "none", "forward", "forward"]


@pytest.mark.soak
def test_a_finished_trial_is_not_run_again(setting, tmp_path):
    search_for(tmp_path / "study.db", setting, trials=2, workers=2).run()
    times = {run.variant: run.manifest["attempts"] for run in load_runs(tmp_path / "trials")}
    again = search_for(tmp_path / "study.db", setting, trials=2)
    again.run()
    (tmp_path / "study.db").unlink()
    search_for(tmp_path / "study.db", setting, trials=2).run()
    assert {run.variant: run.manifest["attempts"] for run in load_runs(tmp_path / "trials")} == times
    assert len(times) == 2 and all(len(attempts) == 1 for attempts in times.values())


SCRIPT = """\
import sys
from pathlib import Path
from nbutils.search import Search, SearchConfig, read_setting, read_space
setting = read_setting(sys.argv[1], fixed=["seconds: " + sys.argv[3]])
config = SearchConfig(trials=int(sys.argv[4]), startup_trials=2, pruner="none")
Search(Path(sys.argv[2]), setting, read_space({space!r}, setting), config).run()
"""


def worker(notebook: Path, database: Path, seconds: float, trials: int) -> subprocess.Popen:
    script = notebook.with_name("search.py")
    script.write_text(SCRIPT.format(space=SPACE))
    words = [sys.executable, script, notebook, database, str(seconds), str(trials)]
    return subprocess.Popen(
        list(map(str, words)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(condition, seconds: float = 60.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
    return found


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def processes_of(folder: Path) -> list[psutil.Process]:
    """Runners of trials in `folder`, and the kernels they started."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), process.environ().get("WORKBOOK_RUN_FOLDER", "")]
        except psutil.Error:
            continue
        if any(str(folder) in word for word in words) and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


@pytest.mark.soak
def test_two_processes_share_a_study(notebook, tmp_path):
    database = tmp_path / "study.db"
    processes = [worker(notebook, database, 0.1, 5) for _ in range(2)]
    told = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    search = search_for(database, read_setting(str(notebook), fixed=["seconds: 0.1"]), trials=5)
    assert [trial.user_attrs[INDEX] for trial in search.shared.counted()] == list(range(5))
    assert len(search.shared.trials()) == 5
    assert len({str(values) for values in tried(search.shared)}) == 5
    begun = [{line.split(":")[0] for line in text.splitlines()} for text in told]
    assert begun[0] and begun[1] and not begun[0] & begun[1]
    runs = load_runs(tmp_path / "trials")
    assert len(runs) == 5 and all(len(run.manifest["attempts"]) == 1 for run in runs)


SOAK = pytest.mark.soak
STOPS = [signal.SIGKILL, pytest.param(signal.SIGINT, marks=SOAK), pytest.param(signal.SIGTERM, marks=SOAK)]


@pytest.mark.soak
@pytest.mark.parametrize("number", STOPS)
def test_a_stopped_search_leaves_no_process_and_goes_on(notebook, tmp_path, number):
    database = tmp_path / "study.db"
    process = worker(notebook, database, 6.5, 1)
    first = Place(tmp_path / "trials", "trial-0000")
    wait_for(lambda: (first.attempt / "metrics.csv").is_file())
    started = psutil.Process(process.pid).children(recursive=True)  # a runner, its kernel's host, the kernel
    assert len(started) > 2
    os.kill(process.pid, number)
    process.communicate(timeout=60)
    wait_for(lambda: not processes_of(tmp_path) and not any(map(is_alive, started)))
    (run,) = load_runs(tmp_path / "trials")
    assert run.status == "preempted"
    setting = read_setting(str(notebook), fixed=["seconds: 6.5"])
    search = search_for(database, setting, trials=1, startup_trials=2, pruner="none")
    lost = [trial for trial in search.shared.trials() if trial.number == 0]
    search.run()
    assert [trial.state.name for trial in search.shared.counted()] == ["COMPLETE"]
    assert tried(search.shared)[0] == lost[0].user_attrs[PARAMS]
    (run,) = load_runs(tmp_path / "trials")
    assert run.status == "finished" and len(run.manifest["attempts"]) == 2


@pytest.mark.soak
def test_trials_that_fail_are_told_and_a_mistake_ends_the_search(tmp_path):
    failing = write_notebook(tmp_path / "bad.ipynb", "raise ValueError('out of luck')", parameters=PARAMETERS)
    setting = read_setting(str(failing))
    with refused(RunError, "All 3 trials failed, the last with: ValueError: out of luck"):
        search_for(tmp_path / "bad.db", setting, trials=9, workers=3).run()
    mistaken = write_notebook(
        tmp_path / "mistaken.ipynb",
        "from nbutils.foundation.errors import ModelError\nraise ModelError('no such model.')",
        parameters=PARAMETERS,
    )
    search = search_for(tmp_path / "other" / "study.db", read_setting(str(mistaken)), trials=9)
    with refused(RunError, "Trial 0 was refused, as all others would be: ModelError: no such model."):
        search.run()
    with refused(RunError, "study.db finished (no trial was run)"):
        search.best()


@pytest.mark.soak
def test_what_the_stage_needs_is_made_first_and_once(plan, tmp_path):
    folder = tmp_path / "runs"
    setting = read_setting(plan=plan, stage="student", fixed=["divergence: forward"], plan_folder=folder)
    search = search_for(tmp_path / "search" / "study.db", setting, trials=1)
    assert [run.variant for run in load_runs(folder)] == ["data"]
    search.run()
    (trial,) = load_runs(tmp_path / "search" / "trials")
    assert trial.status == "finished" and trial.params["data_folder"] == str(folder / "data")
    prepare(setting)
    (data,) = load_runs(folder)
    assert len(data.manifest["attempts"]) == 1
    made = load_plan(best_plan(search, Confirmation("divergence: none", (1, 2, 3))))
    (contrast,) = made.contrasts
    assert (contrast.treatment, contrast.control) == ({"divergence": "forward"}, {"divergence": "none"})
    assert (contrast.metric, contrast.better, contrast.primary) == ("test_ce_loss", "lower", True)
    best = search.best().user_attrs[PARAMS]
    for variant in made.variants:
        assert variant.params.items() >= (best | {"layers": 4, "data_folder": str(folder / "data")}).items()
        assert variant.params["evaluate_test"] is True
    assert sorted({variant.params["seed"] for variant in made.variants}) == [1, 2, 3]
    done = subprocess.run(
        [sys.executable, "-m", "nbutils", "batch", made.file, "--out", tmp_path / "tuned"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [run.result["test_ce_loss"] for run in load_runs(tmp_path / "tuned")] == [-5.0] * 6


@pytest.mark.soak
def test_the_notebook_is_stopped_and_gone_on_with_and_sees_no_test_result(notebook, tmp_path):
    given = {
        "notebook": str(notebook),
        "fixed": ["seconds: 0.7"],
        "space": SPACE,
        "trials": 3,
        "pruner": "none",
        "control": "divergence: none",
    }
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(given))
    out = tmp_path / "runs"
    words = [sys.executable, "-m", "nbutils", "run", "07_search", "--params", tmp_path / "given.yaml", "--variant", "s"]
    words += ["--out", out]
    studies = out / ".studies" / "s"
    process = subprocess.Popen(list(map(str, words)), cwd=ROOT)
    wait_for(lambda: list((studies / "trials").glob(".attempts/*/metrics.csv")))
    process.terminate()
    assert process.wait(60) == 75
    wait_for(lambda: not processes_of(tmp_path))
    done = subprocess.run(list(map(str, words)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    trials = load_runs(studies / "trials")
    assert [run.status for run in trials] == ["finished"] * 3
    assert len(trials[0].manifest["attempts"]) == 2
    assert not [name for run in trials for name in run.result if "test" in name]
    (run,) = load_runs(out)
    assert run.result["trials_finished"] == 3 and not [name for name in run.result if "test" in name]
    values = {name: run.result[f"best_{name}"] for name in ("learning_rate", "kl_weight")}
    assert run.result["best_eval_ce_loss"] == pytest.approx(loss(values) + 4 / 30 - 0.1)
    assert (run.folder / "figures" / "slices.svg").is_file() and (run.folder / "trials.csv").is_file()
    check = [sys.executable, "-m", "nbutils", "check", str(run.folder / "best.yaml")]
    assert subprocess.run(check, cwd=ROOT, capture_output=True).returncode == 0


@pytest.mark.soak
def test_a_trial_of_distillation_does_not_look_at_the_test_split(tmp_path):
    from nbutils.data.preparation import DataConfig, load_data, prepare_data
    from nbutils.models.loading import load_model

    prepare_data(DataConfig(max_documents=40, vocab_size=300, block_size=32), tmp_path / "data")
    data = load_data(tmp_path / "data")
    teacher = str(tmp_path / "teacher")
    load_model("micro", data.tokenizer, 32, from_scratch=True).save_pretrained(teacher)
    data.tokenizer.save_pretrained(teacher)
    fixed = ["max_steps: 4", "eval_steps: 2", "samples: 0", "audit_blocks: 0"]
    folders = {"data_folder": str(data.folder), "teacher": teacher}
    setting = read_setting("03_distillation", fixed=fixed, folders=folders)
    search_for(tmp_path / "study.db", setting, ["kl_weight: 0..1"], trials=1).run()
    (run,) = load_runs(tmp_path / "trials")
    assert run.status == "finished" and "eval_ce_loss" in run.result
    measured = [name for name in run.result if "test" in name and not name.startswith("unigram_")]
    assert measured == []  # the unigram's floor is the data card's
    assert set(run.per_document()["split"]) == {"validation"}
