"""Plan files: the variants they make, and every mistake in one told by its place, cause and cure."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from small_plans import PLAN, STUDY
from tiny_notebooks import write_notebook, write_plan

from nbutils.batch.listing import plan_listing
from nbutils.foundation.errors import ParameterError, PlanError
from nbutils.foundation.places import PARAMS
from nbutils.runs.contrasts import contrasts_sha256
from nbutils.runs.params import find_notebook
from nbutils.runs.plans import LONGEST_NAME, SLUG, find_plan, load_plan, variant_name


@pytest.fixture
def here(tmp_path):
    write_notebook(
        tmp_path / "prep.ipynb", parameters='run_folder: str = ""  # r\nvocab_size: int = 512  # tokens, > 1\n'
    )
    write_notebook(tmp_path / "study.ipynb", parameters=STUDY)
    return tmp_path


@pytest.fixture
def plan(here):
    return load_plan(write_plan(here / "quick.yaml", PLAN))


def test_a_listing_tells_contrasts_and_the_noise_floor_with_their_pairs(plan, here):
    listing = plan_listing(plan, "A100", 0.4)
    assert "contrast mixing, primary: Is alpha 0.5 no worse?" in listing
    floor = "test_ce_loss: alpha 0.0, noise_seed 1 against alpha 0.0, noise_seed 0, 3 pairs"
    assert f"noise floor, of stage cosine: differences inside it are not told from noise\n  {floor}\n" in listing
    assert "noise floor" not in plan_listing(load_plan(changed(here, "noise_floor", ...)), "A100", 0.4)


def changed(here: Path, path: str, value: object) -> Path:
    """The plan with the value at `path` (keys and numbers with dots) set, or removed where it is ..."""
    content = yaml.safe_load(PLAN.replace("{here}", str(here)).replace("5e-1", "0.5").replace("1e-2", "0.01"))
    place = content
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    for key in parents:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = copy.deepcopy(value)
    file = here / "quick.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def test_variants_are_the_matrix_without_what_is_excluded(plan):
    names = [variant.name for variant in plan.variants]
    assert names[0] == "data"
    assert names[1:4] == [
        "cosine-alpha0.0-seed1-noise_seed0",
        *(f"cosine-alpha0.0-seed{s}" for s in ("1-noise_seed1", "2-noise_seed0")),
    ]
    assert len(names) == 1 + 3 * 2 + 3 + 3
    assert "cosine-alpha0.5-seed1-noise_seed1" not in names


def test_only_keeps_what_fits_one_of_its_entries_and_is_not_excluded(here):
    keep = [{"alpha": 0.0}, {"alpha": [0.5, 1.0], "seed": 2}]
    plan = load_plan(changed(here, "stages.1.only", keep))
    names = [variant.matrix for variant in plan.variants if variant.stage == "cosine"]
    assert {(each["alpha"], each["noise_seed"]) for each in names if each["seed"] == 1} == {(0.0, 0), (0.0, 1)}
    assert {(each["alpha"], each["noise_seed"]) for each in names if each["seed"] == 2} == {
        (0.0, 0),
        (0.0, 1),
        (0.5, 0),
        (1.0, 0),
    }


def test_a_list_is_one_value_where_the_parameter_is_a_list(here):
    write_notebook(here / "study.ipynb", parameters=STUDY + "widths: list[int] = [1]  # of layers\n")
    matrix = "matrix: {widths: [[1], [1, 2]]}, exclude: [{widths: [1]}]"
    text = f"name: w\nstages: [{{name: s, notebook: {{here}}/study.ipynb, {matrix}}}]\n"
    assert [v.matrix["widths"] for v in load_plan(write_plan(here / "w.yaml", text)).variants] == [[1, 2]]


def test_what_a_contrast_leaves_out_does_not_change_what_it_asks(here, plan):
    other = load_plan(changed(here, "contrasts.0.control_metric", "test_ce_tuned"))
    assert contrasts_sha256(other.contrasts) != contrasts_sha256(plan.contrasts)
    asked = {**asdict(plan.contrasts[0])}
    del asked["control_metric"], asked["control_stage"]  # as recorded by plans before they existed
    digest = hashlib.sha256(json.dumps([asked], sort_keys=True).encode()).hexdigest()
    assert contrasts_sha256(plan.contrasts) == digest


@pytest.mark.parametrize("name", ["cosine", "semantico"])
def test_the_studys_plans_load_and_pair_as_planned(name):
    plan = load_plan(PARAMS / f"{name}.yaml")
    primary = next(each for each in plan.contrasts if each.primary)
    assert len(primary.pairs(plan.variants)) == 5
    assert all(len(each.pairs(plan.variants)) >= 3 for each in plan.comparisons)
    plain = [v.matrix for v in plan.variants if v.matrix.get("alpha") == 0]
    assert all(m["cos_topk"] == 0 and m.get("temperature", 1.0) == 1.0 for m in plain)


def test_a_variant_has_all_parameters_in_their_types(plan):
    variant = plan.variant("cosine-alpha0.5-seed10-noise_seed0")
    assert variant.params == {"alpha": 0.5, "optimizer": "sgd", "seed": 10, "noise_seed": 0}
    assert variant.matrix == {"alpha": 0.5, "seed": 10, "noise_seed": 0}
    assert variant.needs == {"data_folder": "data"}
    assert type(plan.variant("cosine-alpha0.0-seed1-noise_seed0").params["alpha"]) is float  # the plan says 0
    assert plan.variant("data").params == {"vocab_size": 2048}


def test_pairs_are_equal_in_all_else(plan):
    pairs = plan.contrasts[0].pairs(plan.variants)
    assert [(a.matrix["alpha"], b.matrix["alpha"], a.matrix["seed"], b.matrix["seed"]) for a, b in pairs] == [
        (0.5, 0.0, seed, seed) for seed in (1, 2, 10)
    ]
    floor = plan.noise_floor.pairs(plan.variants)
    assert {(a.matrix["noise_seed"], b.matrix["noise_seed"]) for a, b in floor} == {(1, 0)}
    assert plan.noise_floor.metric == "test_ce_loss"  # the primary contrast's


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("stages.0.name", ..., "stage 1: name is missing"),
        ("stages.0.name", "Data!", "'Data!' becomes a folder. Use a-z"),
        ("stages.0.name", 3, "name is 3. Give text, in quotes"),
        ("name", "../up", "becomes a folder"),
        ("name", "interactive", "is kept for runs started by hand"),
        ("stages", [], "stages is missing|nothing to run"),
        ("stages", {}, "stages is {}. Give a list"),
        ("stages.0", "data", "stage 1 is 'data'. Give a mapping"),
        ("stages.0.notebook", "01_data_prp", r"There is no notebook notebooks/01_data_prp.ipynb"),
        ("stages.1.nedes", {}, "stage 2 has no key 'nedes'. Did you mean 'needs'?"),
        ("stages.1.name", "data", "stage 'data' stands there 2 times"),
        ("contrast", [], "has no key 'contrast'. Did you mean 'contrasts'?"),
        ("stages.1.params", {"optimiser": "sgd"}, "stage 'cosine': study has no parameter 'optimiser'.*'optimizer'"),
        ("stages.1.params", {"optimizer": "sgdd"}, "must be one of adam, sgd. Did you mean 'sgd'"),
        ("stages.1.params", {"alpha": 0.5}, "parameter 'alpha' stands there 2 times. Set it in one of"),
        ("stages.1.params", {"run_folder": "x"}, "run_folder is set by the runner"),
        ("stages.1.params", {"data_folder": "x"}, "'data_folder' stands there 2 times"),
        ("stages.1.matrix", {"alpha": [0, 2]}, "must be >= 0 and <= 1; given 2"),
        ("stages.1.matrix", {"alpha": 0.5}, "matrix alpha is 0.5. Give a list"),
        ("stages.1.matrix", {"alpha": []}, "Give a list of values"),
        ("stages.1.matrix", {"seed": [1, 1]}, "matrix seed value '1' stands there 2 times"),
        ("stages.1.exclude", [{"alpha": 0.25}], "exclude has alpha 0.25, which the matrix has not, so it fits"),
        ("stages.1.exclude", [{"alpha": [0.5, 0.25]}], "alpha 0.25, which the matrix has not"),
        ("stages.1.only", [{"alpha": 0.25}], "only has alpha 0.25, which the matrix has not, so it fits nothing"),
        ("stages.1.exclude", [{"alpha": [0.5, "x"]}], "'alpha' must be a float; given 'x'"),
        ("stages.1.exclude", [{"alhpa": 0.5}], "exclude has no key 'alhpa'. Did you mean 'alpha'"),
        ("stages.1.exclude", [{}], "exclude and only leave no variant"),
        ("stages.1.needs", {"data_folder": "dta"}, "needs 'dta' for data_folder, and no earlier.*Did you mean 'data'"),
        ("stages.1.needs", {"data_folder": "cosine"}, "no earlier stage has that name"),
        ("stages.1.needs", {"data_fodler": "data"}, "needs 'data_fodler', which is no parameter.*'data_folder'"),
        ("stages.1.needs", {"seed": "data"}, "needs 'seed', which is no folder|stands there 2 times"),
        ("contrasts.0.metric", ..., "contrast 1: metric is missing"),
        ("contrasts.0.metric", 3, "metric is 3. Give text"),
        ("contrasts.0.control_metric", 3, "control_metric is 3. Give text"),
        ("contrasts.0.control_metric", "test_ce_loss", "control_metric is the metric itself. Leave it out"),
        ("contrasts.0.better", "less", "better is 'less'"),
        ("contrasts.0.claim", "no wores", "claim is 'no wores'. Did you mean 'no worse'"),
        ("contrasts.0.smallest_effect", 0, "smallest_effect is 0. Give the smallest difference"),
        ("contrasts.0.smallest_effect", "x", "smallest_effect is 'x'"),
        ("contrasts.0.primary", "yes", "primary is 'yes'. Write true or false"),
        ("contrasts.0.primary", False, "0 contrasts are primary. Mark one"),
        ("contrasts.0.stage", "cosin", "there is no stage 'cosin'. Did you mean 'cosine'"),
        (
            "contrasts.0.treatment",
            {"alpha": 0.75, "noise_seed": 0},
            "treatment has alpha 0.75; the matrix has 0.0, 0.5, 1.0",
        ),
        ("contrasts.0.treatment", {"optimizer": "sgd"}, "treatment names 'optimizer', not in the matrix"),
        ("contrasts.0.treatment", {"alpah": 1}, "has no parameter 'alpah'.*'alpha'"),
        ("contrasts.0.treatment", {"alpha": 0.5}, "must name the same matrix values"),
        ("contrasts.0.treatment", {"alpha": 0, "noise_seed": 0}, "treatment and control are the same"),
        ("contrasts.0.treatment", {"alpha": 0.5, "noise_seed": 1}, "no variant of the treatment has a partner"),
        ("noise_floor.control", {"alpha": 0.0, "noise_seed": 1}, "noise_floor: treatment and control are the same"),
        ("noise_floor.stage", "x", "noise_floor: there is no stage 'x'"),
    ],
)
def test_every_mistake_is_told_with_place_and_cure(here, path, value, words):
    with pytest.raises((PlanError, ParameterError), match=words) as error:
        load_plan(changed(here, path, value))
    assert "\n" not in str(error.value)
    if "notebook" not in path:
        assert "quick.yaml" in str(error.value)


def test_runs_of_one_seed_are_never_counted_as_independent_pairs(here):
    """The A/A repeats of both sides would double the pairs and halve nothing but the truth of the interval."""
    text = PLAN.replace("    exclude: [{alpha: 0.5, noise_seed: 1}, {alpha: 1.0, noise_seed: 1}]\n", "")
    for side in ("treatment: {alpha: 0.5, noise_seed: 0}", "control: {alpha: 0, noise_seed: 0}"):
        text = text.replace(side, side.replace(", noise_seed: 0", ""), 1)
    with pytest.raises(PlanError, match=r"differ in noise_seed, but runs of one seed are not independent.*Name one"):
        load_plan(write_plan(here / "plan.yaml", text))


def test_one_primary_contrast_and_names_of_their_own(here):
    first = yaml.safe_load(PLAN.replace("{here}", str(here)))["contrasts"][0] | {"smallest_effect": 0.01}
    with pytest.raises(PlanError, match="'mixing' stands there 2 times"):
        load_plan(changed(here, "contrasts", [first, first]))
    with pytest.raises(PlanError, match="2 contrasts are primary"):
        load_plan(changed(here, "contrasts", [first, first | {"name": "other"}]))


def test_a_stage_can_need_one_variant_of_many_by_common_values(here):
    write_notebook(here / "student.ipynb", parameters=STUDY + 'teacher_folder: str = ""  # a run\n')
    teacher = "  - {name: teacher, notebook: {here}/study.ipynb, matrix: {seed: [1, 2]}}\n"
    student = "  - {name: student, notebook: {here}/student.ipynb, needs: {teacher_folder: teacher}, %s}\n"

    def needs(settings: str) -> dict[str, str]:
        plan = load_plan(write_plan(here / "kd.yaml", "name: kd\nstages:\n" + teacher + student % settings))
        return {v.name: v.needs["teacher_folder"] for v in plan.variants if v.stage == "student"}

    assert needs("matrix: {alpha: [0, 1], seed: [2]}") == dict.fromkeys(
        ("student-alpha0.0-seed2", "student-alpha1.0-seed2"), "teacher-seed2"
    )
    assert needs("params: {seed: 1}") == {"student": "teacher-seed1"}
    with pytest.raises(PlanError, match=r"needs one variant of 'teacher' and 2 of them fit.*a value for: seed"):
        needs("matrix: {alpha: [0]}")
    with pytest.raises(PlanError, match="and none of them fit"):
        needs("matrix: {seed: [3]}")


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"alpha": 0.5, "seed": 1}, "s-alpha0.5-seed1"),
        ({"learning_rate": 1e-5}, "s-learning_rate1e-05"),
        ({"model_name": "Qwen/Qwen2 0.5B"}, "s-model_nameqwen-qwen2-0.5b"),
        ({"from_scratch": True}, "s-from_scratchtrue"),
        ({"lengths": [8, 16]}, "s-lengths8_16"),
    ],
)
def test_names_are_folder_names(values, name):
    assert variant_name("s", values) == name


def test_long_names_are_cut_and_stay_different():
    one, two = (variant_name("s", {"prompt": "word " * 100 + end}) for end in "ab")
    assert one != two
    for name in (one, two):
        assert len(name) <= LONGEST_NAME
        assert SLUG.fullmatch(name)


def test_variants_with_one_name_are_refused(here):
    write_notebook(here / "study.ipynb", parameters='text_field: str = ""  # a column\n')
    text = "name: p\nstages:\n  - {name: s, notebook: {here}/study.ipynb, matrix: {text_field: [ab, AB]}}\n"
    with pytest.raises(PlanError, match="variant 's-text_fieldab' stands there 2 times"):
        load_plan(write_plan(here / "p.yaml", text))


def test_a_missing_file_gets_the_nearest_name(here, plan):
    with pytest.raises(PlanError, match=r"There is no file .*quik.yaml. Did you mean 'quick.yaml'"):
        load_plan(here / "quik.yaml")
    with pytest.raises(PlanError, match="holds no YAML file"):
        load_plan(here / "nowhere" / "quick.yaml")


def test_plans_and_notebooks_are_found_by_name_and_by_path(here, plan, monkeypatch):
    assert find_plan("quick").name == "quick.yaml"
    assert find_plan("params/quick.yaml") == find_plan("quick")
    monkeypatch.chdir(here)
    assert find_plan("quick.yaml") == here / "quick.yaml"
    assert find_notebook(here / "study") == find_notebook(here / "study.ipynb") == here / "study.ipynb"
    with pytest.raises(PlanError, match="Did you mean"):
        find_notebook("01_data_pre")


def test_an_unknown_variant_gets_the_nearest(plan):
    with pytest.raises(PlanError, match=r"no variant 'cosine-alpha0.5-seed1'. Did you mean 'cosine-alpha0.5-seed1"):
        plan.variant("cosine-alpha0.5-seed1")
