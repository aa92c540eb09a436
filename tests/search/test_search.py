"""The search without a single run: its space, its study shared and resumed, the plan it leaves."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
from student import PARAMETERS, SPACE, loss, refused, search_for, tried, write_student, write_study
from tiny_notebooks import write_notebook

from nbutils.foundation.errors import ParameterError, PlanError, RunError
from nbutils.foundation.files import write_json
from nbutils.runs.plans import load_plan
from nbutils.search import (
    Confirmation,
    Search,
    SearchConfig,
    best_plan,
    check_confirmation,
    importances,
    read_setting,
    read_space,
)
from nbutils.search.figures import search_history, search_importances, search_slices
from nbutils.search.study import INDEX, PARAMS, SharedStudy
from nbutils.search.work import lowest_loss, validation_results


@pytest.fixture
def notebook(tmp_path):
    return write_student(tmp_path)


@pytest.fixture
def setting(notebook):
    return read_setting(str(notebook))


@pytest.fixture
def plan(tmp_path):
    return write_study(tmp_path)


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


# --- a plan's stage, and the plan that comes out


def test_a_setting_is_taken_from_a_plans_stage(plan):
    setting = read_setting(plan=plan, stage="student", fixed=["divergence: forward"], space=SPACE)
    assert setting.params["layers"] == 4 and setting.params["seed"] == 5
    assert setting.needs == {"data_folder": "data"}
    params = setting.trial_params({"kl_weight": 0.25})
    assert params == {"layers": 4, "seed": 5, "kl_weight": 0.25, "evaluate_test": False}
    with refused(ParameterError, "'data_folder' comes from an earlier stage"):
        read_space(["data_folder: a, b"], setting)
    assert read_setting(plan=plan, stage="student", space=["divergence: none, forward"]).params["layers"] == 4


def test_run_folders_given_to_the_search_are_the_trials_own(plan, notebook, tmp_path):
    folders = {"data_folder": str(tmp_path), "teacher": ""}
    setting = read_setting(plan=plan, stage="student", fixed=["divergence: forward"], folders=folders)
    assert setting.needs == {} and setting.trial_params({})["data_folder"] == str(tmp_path)
    assert read_setting(str(notebook), folders=folders).trial_params({})["data_folder"] == str(tmp_path)
    with refused(ParameterError, "student has no parameter 'teacher'"):
        read_setting(str(notebook), folders={"teacher": "runs/teacher"})


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


@pytest.mark.parametrize(
    ("splits", "metric", "evaluated"),
    [(["train", "validation"], "eval_ce_loss", "last"), (["train", "validation", "test"], "test_ce_loss", "best")],
)
def test_data_without_a_test_split_are_judged_on_validation(tmp_path, splits, metric, evaluated):
    (tmp_path / "prepared" / "data").mkdir(parents=True)
    write_json(tmp_path / "prepared" / "data" / "card.json", {"splits": {split: {} for split in splits}})
    parameters = f'{PARAMETERS}evaluated_model: str = "best"  # one of best, last: which weights\n'
    notebook = write_notebook(tmp_path / "student.ipynb", parameters=parameters)
    setting = read_setting(str(notebook), folders={"data_folder": str(tmp_path / "prepared")})
    search = finished(search_for(tmp_path / "study.db", setting), {"learning_rate": 1e-3, "kl_weight": 0.31})
    path = best_plan(search, Confirmation("divergence: none"))
    made = load_plan(path)
    assert made.contrasts[0].metric == metric
    assert {variant.params["evaluated_model"] for variant in made.variants} == {evaluated}
    assert ("no test split" in path.read_text()) == ("validation loss" in path.read_text()) == ("test" not in splits)


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
        ({"plan_file": "params/tuned"}, "Give a .yaml file with a name of"),
        ({"plan_file": "params/quick.yaml"}, "params/quick.yaml is a plan that no search wrote"),
    ],
)
def test_a_confirmation_that_cannot_be_is_refused_before_any_trial(setting, asked, message):
    with pytest.raises((ParameterError, PlanError)) as caught:
        check_confirmation(setting, read_space(SPACE, setting), Confirmation(**asked))
    assert message in str(caught.value)


# --- what is shown


def test_figures_show_every_trial_with_a_loss(setting):
    space = read_space([*SPACE, "divergence: none, forward"], setting)
    table = pd.DataFrame(
        {
            "trial": range(5),
            "state": ["finished", "pruned", "finished", "failed", "running"],
            "value": [3.0, 3.5, 2.5, None, None],
            "learning_rate": [1e-5, 1e-3, 1e-2, 1e-4, 1e-1],
            "kl_weight": [0.1, 0.2, 0.3, 0.4, 0.5],
            "divergence": ["none", "forward", "forward", "none", "none"],
        }
    )
    (axes,) = search_history(table).axes
    assert sorted(len(points.get_offsets()) for points in axes.collections) == [1, 2]
    assert axes.lines[0].get_ydata().tolist() == [3.0, 2.5]
    figure = search_slices(table, space)
    panels = figure.axes
    assert [panel.get_xscale() for panel in panels] == ["log", "linear", "linear"]
    assert [panel.get_xlabel() for panel in panels] == ["learning_rate", "kl_weight", "divergence"]
    finished = next(points for points in panels[2].collections if points.get_label() == "finished")
    assert finished.get_offsets().tolist() == [[0, 3.0], [1, 2.5]]
    figure.draw_without_rendering()
    assert "0.001" in [label.get_text() for label in panels[0].get_xticklabels()]
    bars = search_importances({"kl_weight": 0.3, "learning_rate": 0.7}).axes[0]
    assert [label.get_text() for label in bars.get_yticklabels()] == ["kl_weight", "learning_rate"]
    for figure in (search_history(table[3:]), search_slices(table[3:], space), search_importances({})):
        assert "rial" in figure.axes[0].texts[0].get_text()
