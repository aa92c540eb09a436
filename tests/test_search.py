"""The search: its space, its study shared and resumed, its trials as runs, and the plan it leaves."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from tiny_notebooks import write_notebook, write_plan

from nbutils.attempts import Place
from nbutils.errors import ParameterError, PlanError, RunError
from nbutils.files import write_json
from nbutils.places import ROOT
from nbutils.plans import load_plan
from nbutils.runs import load_runs
from nbutils.search import (
    Confirmation,
    Search,
    SearchConfig,
    best_plan,
    check_confirmation,
    importances,
    prepare,
    read_setting,
    read_space,
    trial_table,
)
from nbutils.search.study import INDEX, PARAMS, SharedStudy
from nbutils.search.work import lowest_loss, validation_results
from nbutils.status import plan_status

PARAMETERS = """\
run_folder: str = ""  # where results go
data_folder: str = ""  # an earlier run
divergence: str = "forward"  # one of none, forward: what is trained on
learning_rate: float = 1e-3  # > 0
kl_weight: float = 0.5  # in [0, 1]
layers: int = 2  # at least 1
names: list[str] = []  # of anything
seconds: float = 0.0  # between evaluations, at least 0
evaluate_test: bool = True  # judge the test split too
seed: int = 0  # at least 0
"""
# The loss has its minimum, 1, at a learning rate of 1e-3 and a weight of 0.3; it falls over four evaluations.
TRAINING = """\
import json, math, os, time
floor = 1 + (math.log10(learning_rate) + 3) ** 2 + (kl_weight - 0.3) ** 2
if data_folder and not os.path.isfile(os.path.join(data_folder, "made")):
    raise OSError("no data")
with open(run_folder + "/metrics.csv", "w") as file:
    file.write("step,loss,eval_ce_loss\\n")
    for step in (10, 20, 30, 40):
        file.write(f"{step - 5},9,\\n{step},,{floor + 4 / step - 0.1 + (step == 40) * 0.05}\\n")
        file.flush()
        time.sleep(seconds)
os.mkdir(run_folder + "/model")
result = {"eval_ce_loss": floor + 0.05}
if evaluate_test:
    result["test_ce_loss"] = -5.0
json.dump(result, open(run_folder + "/result.json", "w"))
"""
SPACE = ["learning_rate: 1e-5..1e-1 log", "kl_weight: 0..1"]


@pytest.fixture
def notebook(tmp_path):
    return write_notebook(tmp_path / "student.ipynb", TRAINING, parameters=PARAMETERS)


@pytest.fixture
def setting(notebook):
    return read_setting(str(notebook))


@contextmanager
def refused(kind: type[Exception], text: str):
    """This error, whose message holds `text`."""
    with pytest.raises(kind) as caught:
        yield
    assert text in str(caught.value)


def loss(params) -> float:
    return 1 + (math.log10(params["learning_rate"]) + 3) ** 2 + (params["kl_weight"] - 0.3) ** 2


def search_for(path: Path, setting, lines=SPACE, **config) -> Search:
    return Search(path, setting, read_space(lines, setting), SearchConfig(**config))


def tried(shared: SharedStudy) -> list[dict]:
    return [trial.user_attrs[PARAMS] for trial in shared.counted()]


# --- the space


def test_the_space_is_read(setting):
    lines = ["learning_rate: 1e-4..1e-2 log", "kl_weight:.25 .. 1", "layers: 1..8", "divergence: none, forward"]
    rate, weight, layers, divergence = read_space(lines, setting)
    assert (rate.low, rate.high, rate.log, rate.integer) == (1e-4, 1e-2, True, False)
    assert (weight.low, weight.high, weight.log) == (0.25, 1.0, False)
    assert (layers.low, layers.high, layers.integer) == (1, 8, True)
    assert divergence.choices == ("none", "forward")
    assert rate.rounded(0.00123456) == 0.001235
    assert rate.rounded(1.00004e-4) == 1e-4
    assert [str(each) for each in (rate, layers, divergence)] == [
        "learning_rate: 0.0001..0.01 log",
        "layers: 1..8",
        "divergence: none, forward",
    ]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "The search space is empty"),
        (["learning_rate"], "Write it as 'learning_rate: 1e-4..1e-2 log'"),
        (["learning_rat: 1..2"], "no parameter 'learning_rat' to search. Did you mean 'learning_rate'?"),
        (["kl_weight: 0..1.5"], "'kl_weight' must be >= 0 and <= 1; given '1.5'"),
        (["kl_weight: 1..0"], "low end is not below its high end"),
        (["kl_weight: 0..1 log"], "log needs a low end above 0"),
        (["kl_weight: 0..one"], "A range is low..high or low..high log"),
        (["layers: 1.5..3"], "'layers' must be an int"),
        (["divergence: 1..2"], "'divergence' is a str and has no range"),
        (["divergence: forward"], "Give two different values or more"),
        (["divergence: forward, forwards"], "Did you mean 'forward'?"),
        (["names: a, b"], "list[str] and cannot be searched"),
        (["seed: 1..5"], "'seed' cannot be searched: it only repeats a setting: its best value is luck"),
        (["kl_weight: 0..1", "kl_weight: 0..0.5"], "has 'kl_weight' twice"),
    ],
)
def test_a_space_that_cannot_be_is_refused_with_its_line(setting, lines, message):
    with pytest.raises(ParameterError) as caught:
        read_space(lines, setting)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        (["layers 3"], "'layers 3', which is no `name: value`"),
        (["layer: 3"], "Did you mean 'layers'?"),
        (["layers: 3", "layers: 4"], "fixed has 'layers' twice"),
        (["run_folder: x"], "set by the runner"),
    ],
)
def test_fixed_values_that_cannot_be_are_refused(notebook, fixed, message):
    with pytest.raises(ParameterError) as caught:
        read_setting(str(notebook), fixed=fixed)
    assert message in str(caught.value)


def test_searched_and_fixed_is_one_too_many(notebook):
    with refused(ParameterError, "'kl_weight' is searched and fixed"):
        read_space(SPACE, read_setting(str(notebook), fixed=["kl_weight: 0.5"]))


# --- the study


def drawn(path: Path, setting, number: int, seed: int = 1, of: int | None = None) -> SharedStudy:
    """Run `number` trials of the known loss without any notebook, in one opening of the study."""
    config = SearchConfig(trials=of or number, seed=seed, startup_trials=6)
    shared = SharedStudy(path, setting, read_space(SPACE, setting), config)
    for _ in range(number):
        trial = shared.claim()
        shared.study.tell(trial, loss(trial.user_attrs[PARAMS]))
    return shared


def test_tpe_finds_the_known_optimum_and_knows_what_mattered(setting, tmp_path):
    shared = drawn(tmp_path / "study.db", setting, 40)
    best = min(shared.counted(), key=lambda trial: trial.value)
    start = min(trial.value for trial in shared.counted()[:6])
    assert best.value < 1.05 and best.value < start
    assert best.user_attrs[PARAMS]["learning_rate"] == pytest.approx(1e-3, rel=0.5)
    late = [math.log10(values["learning_rate"]) for values in tried(shared)[20:]]
    assert sum(abs(rate + 3) < 1 for rate in late) > 0.6 * len(late)  # at random: half of them
    shares = importances(shared)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["learning_rate"] > 0.8  # its term varies by 4, the other's by 0.49


def test_an_interrupted_study_goes_on_as_if_it_had_not_been(setting, tmp_path):
    whole = tried(drawn(tmp_path / "whole.db", setting, 14))
    drawn(tmp_path / "parts.db", setting, 5, of=14).close()
    first = drawn(tmp_path / "parts.db", setting, 4, of=14)
    lost = first.claim()  # its process dies here
    first.close()
    again = drawn(tmp_path / "parts.db", setting, 5, of=14)
    assert tried(again) == whole
    assert [trial.user_attrs[INDEX] for trial in again.counted()] == list(range(14))
    assert again.claim() is None
    assert lost.number not in [trial.number for trial in again.counted()]
    assert tried(drawn(tmp_path / "other.db", setting, 3, seed=2)) != whole[:3]


def test_trials_of_a_living_process_are_not_taken(setting, tmp_path):
    one = SharedStudy(tmp_path / "study.db", setting, read_space(SPACE, setting), SearchConfig(trials=3))
    two = SharedStudy(tmp_path / "study.db", setting, read_space(SPACE, setting), SearchConfig(trials=3))
    claimed = [one.claim(), two.claim(), one.claim()]
    assert two.claim() is None
    assert len({trial.number for trial in claimed}) == 3
    values = [trial.user_attrs[PARAMS] for trial in claimed]
    assert values[0] != values[1] != values[2] != values[0]
    one.abandon([claimed[2].number])
    assert two.claim().user_attrs[PARAMS] == values[2]
    one.close()
    assert two.claim().user_attrs[PARAMS] == values[0]
    assert two.claim() is None


def test_a_study_is_not_continued_as_another(notebook, setting, tmp_path):
    path = tmp_path / "study.db"
    drawn(path, setting, 1).close()
    other = read_setting(str(notebook), fixed=["layers: 3"])
    with refused(RunError, "begun with another setting: layers was 2, now it is 3"):
        SharedStudy(path, other, read_space(SPACE, other), SearchConfig())
    with refused(RunError, "kl_weight was 'kl_weight: 0..1', now it is 'kl_weight: 0..0.5'"):
        search_for(path, setting, [SPACE[0], "kl_weight: 0..0.5"])
    broken = tmp_path / "broken.db"
    broken.write_text("no database at all, but long enough to look at" * 20)
    with refused(RunError, "broken.db is no study that can be opened (file is not a database)"):
        search_for(broken, setting)


def test_a_config_that_cannot_be_is_refused(setting, tmp_path):
    with refused(ParameterError, "trials is 0, workers 1. Give at least 1"):
        search_for(tmp_path / "study.db", setting, trials=0)
    with refused(ParameterError, "pruner is 'mean'. Give one of median, halving, none"):
        search_for(tmp_path / "study.db", setting, pruner="mean")


# --- what a search may see


def test_only_validation_results_are_seen(tmp_path):
    result = {"eval_ce_loss": 2.5, "test_ce_loss": 0.1, "best_test_ce_loss": 0.1, "teacher_test_ce_loss": 0.2}
    assert validation_results(result) == {"eval_ce_loss": 2.5}
    write_json(tmp_path / "result.json", result)
    assert lowest_loss(tmp_path) == 2.5
    (tmp_path / "metrics.csv").write_text("step,test_ce_loss,eval_ce_loss\n1,0.1,2.4\n2,0.1,nan\n3,0.1,\n4,0.1,1.")
    assert lowest_loss(tmp_path) == 2.4  # the last line is not whole
    write_json(tmp_path / "result.json", {"eval_ce_loss": math.nan, "test_ce_loss": 0.1})
    (tmp_path / "metrics.csv").unlink()
    assert math.isnan(lowest_loss(tmp_path))


# --- trials as runs


@pytest.mark.slow
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
    assert (runs["trial-0000"].status, runs["trial-0002"].status) == ("finished", "killed")
    assert runs["trial-0000"].params["evaluate_test"] is False
    assert not any("test" in name for run in runs.values() for name in run.result)
    assert not (runs["trial-0000"].folder / "model").exists()
    assert "trial 2: pruned at step 10" in capsys.readouterr().out
    plan = load_plan(tmp_path / "trials.yaml")
    told = plan_status(plan, tmp_path / "trials")
    assert "trials: " in told and "trial-0002  killed" in told and "waiting" not in told
    made = load_plan(best_plan(search, Confirmation("divergence: none", (1, 2))))
    assert [variant.params["divergence"] for variant in made.variants] == ["none", "none", "forward", "forward"]


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_stopped_search_leaves_no_process_and_goes_on(notebook, tmp_path, number):
    database = tmp_path / "study.db"
    process = worker(notebook, database, 0.7, 1)
    first = Place(tmp_path / "trials", "trial-0000")
    wait_for(lambda: (first.attempt / "metrics.csv").is_file())
    assert len(processes_of(tmp_path)) > 2
    os.kill(process.pid, number)
    process.communicate(timeout=60)
    wait_for(lambda: not processes_of(tmp_path))
    (run,) = load_runs(tmp_path / "trials")
    assert run.status == "killed"
    setting = read_setting(str(notebook), fixed=["seconds: 0.7"])
    search = search_for(database, setting, trials=1, startup_trials=2, pruner="none")
    lost = [trial for trial in search.shared.trials() if trial.number == 0]
    search.run()
    assert [trial.state.name for trial in search.shared.counted()] == ["COMPLETE"]
    assert tried(search.shared)[0] == lost[0].user_attrs[PARAMS]
    (run,) = load_runs(tmp_path / "trials")
    assert run.status == "finished" and len(run.manifest["attempts"]) == 2


@pytest.mark.slow
def test_trials_that_fail_are_told_and_a_mistake_ends_the_search(tmp_path):
    failing = write_notebook(tmp_path / "bad.ipynb", "raise ValueError('out of luck')", parameters=PARAMETERS)
    setting = read_setting(str(failing))
    with refused(RunError, "All 3 trials failed, the last with: ValueError: out of luck"):
        search_for(tmp_path / "bad.db", setting, trials=9, workers=3).run()
    mistaken = write_notebook(
        tmp_path / "mistaken.ipynb",
        "from nbutils.errors import ModelError\nraise ModelError('no such model.')",
        parameters=PARAMETERS,
    )
    search = search_for(tmp_path / "other" / "study.db", read_setting(str(mistaken)), trials=9)
    with refused(RunError, "Trial 0 was refused, as all others would be: ModelError: no such model."):
        search.run()
    with refused(RunError, "study.db finished (no trial was run)"):
        search.best()


# --- a plan's stage, and the plan that comes out

PLAN = """\
name: study
stages:
  - {name: data, notebook: {here}/data.ipynb}
  - name: student
    notebook: {here}/student.ipynb
    needs: {data_folder: data}
    params: {layers: 4}
    matrix: {divergence: [none, forward], seed: [5, 6]}
"""


@pytest.fixture
def plan(notebook, tmp_path):
    write_notebook(tmp_path / "data.ipynb", "open(run_folder + '/made', 'w').close()", parameters=PARAMETERS)
    return str(write_plan(tmp_path / "study.yaml", PLAN))


def test_a_setting_is_taken_from_a_plans_stage(plan):
    setting = read_setting(plan=plan, stage="student", fixed=["divergence: forward"], space=SPACE)
    assert setting.params["layers"] == 4 and setting.params["seed"] == 5
    assert setting.needs == {"data_folder": "data"}
    params = setting.trial_params({"kl_weight": 0.25})
    assert params == {"layers": 4, "seed": 5, "kl_weight": 0.25, "evaluate_test": False}
    with refused(ParameterError, "'data_folder' comes from an earlier stage"):
        read_space(["data_folder: a, b"], setting)
    assert read_setting(plan=plan, stage="student", space=["divergence: none, forward"]).params["layers"] == 4


def test_a_plan_that_leaves_open_what_is_searched_is_refused(plan):
    with refused(
        PlanError,
        "several values of divergence (none, forward). Say in `fixed` which one the",
    ):
        read_setting(plan=plan, stage="student", space=SPACE)
    with refused(PlanError, "no stage 'studen'. Did you mean 'student'?"):
        read_setting(plan=plan, stage="studen")
    with refused(PlanError, "is given without the stage to search"):
        read_setting(plan=plan)
    with refused(ParameterError, "stage is 'student', but no plan is given"):
        read_setting("04_cosine_mixing", stage="student")


@pytest.mark.slow
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


def finished(search: Search, *values: dict) -> Search:
    """Let the search's study hold finished trials of these values."""
    for each in values:
        search.shared.study.enqueue_trial(each)
        search.shared.study.tell(search.shared.claim(), loss(each))
    return search


def test_a_searched_control_is_one_side_of_the_contrast(setting, tmp_path):
    search = search_for(tmp_path / "study.db", setting)
    finished(search, {"learning_rate": 1e-3, "kl_weight": 0.31}, {"learning_rate": 1e-2, "kl_weight": 0.31})
    plan_file = tmp_path / "params" / "tuned-weight.yaml"
    best_plan(search, Confirmation("kl_weight: 0", (1, 2), plan_file=str(plan_file)))
    assert plan_file.read_text().splitlines()[1].startswith("# The best setting: trial 0 of 2, eval_ce_loss 1.0001.")
    made = load_plan(plan_file)
    assert made.name == "tuned-weight"
    assert made.contrasts[0].treatment == {"kl_weight": 0.31} and made.contrasts[0].control == {"kl_weight": 0.0}
    best_plan(search, Confirmation("", (1, 2), plan_file=str(plan_file)))  # its own file may be written over
    made = load_plan(plan_file)
    assert not made.contrasts and [variant.params["kl_weight"] for variant in made.variants] == [0.31, 0.31]


def test_where_the_control_is_best_nothing_is_compared(setting, tmp_path):
    lines = ["learning_rate: 1e-5..1e-1 log", "kl_weight: 0, 1"]
    search = finished(search_for(tmp_path / "study.db", setting, lines), {"learning_rate": 1e-3, "kl_weight": 0.0})
    made = load_plan(best_plan(search, Confirmation("kl_weight: 0")))
    assert not made.contrasts and {variant.params["kl_weight"] for variant in made.variants} == {0.0}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"seeds": ()}, "Give at least one seed"),
        ({"seeds": (1, 1)}, "Give at least one seed, each once"),
        ({"seeds": (0, 1)}, "has 0, the seed of the trials: its luck would count twice"),
        ({"control": "divergence: forward"}, "which is the control itself. Put another divergence into `fixed`"),
        ({"control": "divergenc: none"}, "Did you mean 'divergence'?"),
        ({"plan_file": "params/tuned"}, "Give a file that ends in .yaml"),
        ({"plan_file": "params/quick.yaml"}, "params/quick.yaml is a plan that no search wrote"),
    ],
)
def test_a_confirmation_that_cannot_be_is_refused_before_any_trial(setting, asked, message):
    with pytest.raises((ParameterError, PlanError)) as caught:
        check_confirmation(setting, read_space(SPACE, setting), Confirmation(**asked))
    assert message in str(caught.value)
