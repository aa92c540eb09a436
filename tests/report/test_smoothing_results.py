"""What runs of prefix smoothing say: which arm smooths what, the noise band, and whose control is borrowed.

python -m pytest tests/test_smoothing_results.py
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import yaml
from page_structure import text_of
from synthetic_prefix import ARMS, SEEDS, arm_of, increases, write_prefix
from synthetic_runs import PARAMETERS, final_numbers, write_run

from nbutils.report.evidence import gather
from nbutils.report.studies.prefix import arm_table, ceiling_table, prefix_smoothing
from nbutils.report.studies.smoothing import (
    arm_names,
    by_seed,
    cross_entropy,
    effective,
    is_null,
    noise_band,
    smooths,
    with_repeats,
)
from nbutils.runs.plans import variant_name


@pytest.fixture(scope="module")
def study(smooth_evidence):
    return smooth_evidence.studies[0]


def test_the_arms_are_known_by_what_they_smooth(study):
    assert cross_entropy(study) is arm_of(study, "none") is study.control
    assert [name for name in ARMS if is_null(arm_of(study, name))] == ["null"]
    assert effective(arm_of(study, "prefixes")) == 0.233 and effective(arm_of(study, "none")) == 0
    names = arm_names(study)
    assert names[arm_of(study, "random").label] == "normalised, tau 0.2, random tokens"
    assert names[arm_of(study, "no-gold").label] == "mixed uniform, eps 1"
    twins = replace(study, arms=(*study.arms, replace(study.arms[1], label="another learning rate")))
    assert arm_names(twins)["another learning rate"] == "another learning rate"


def test_the_noise_band_is_that_of_all_pairs_for_an_arms_own_number_of_seeds(study):
    """Null arm and planned pair are the same runs here: t(5, .975) times the root mean square over the root of n."""
    rms = math.sqrt(np.mean(np.square(increases("null"))))
    for seeds in (1, 5):
        expected = scipy.stats.t(5).ppf(0.975) * rms / math.sqrt(seeds)
        assert noise_band(study, "test_ce_loss", seeds) == pytest.approx(expected)
    assert noise_band(replace(study, repeats=()), "test_ce_loss", 5) == pytest.approx(expected)
    arms = tuple(arm for arm in study.arms if not is_null(arm))
    assert noise_band(replace(study, arms=arms), "test_ce_loss", 5) == pytest.approx(expected)
    assert math.isnan(noise_band(replace(study, arms=arms, repeats=()), "test_ce_loss", 5))


def test_a_null_arm_of_one_seed_widens_no_band_of_means_over_five(study):
    """Its one difference is averaged with that of its seed: a band of its own would be t(1, .975) wide."""
    null = arm_of(study, "null")
    run = null.runs[0]
    another = replace(run, manifest=run.manifest | {"variant": "another"})
    single = replace(null, runs=(another,), label="another null")
    expected = scipy.stats.t(5).ppf(0.975) * math.sqrt(np.mean(np.square(increases("null"))) / 5)
    assert noise_band(replace(study, arms=(*study.arms, single)), "test_ce_loss", 5) == pytest.approx(expected)


def test_an_equal_cell_with_a_noise_seed_of_its_own_is_named_too(tmp_path, undrawn):
    """It repeats the control in all but name, so it stands in no arm of the study; the section shows it."""
    runs, file = write_prefix(tmp_path)
    plan = yaml.safe_load(file.read_text())
    stage, floor = plan["stages"][0], plan["noise_floor"]
    stage["matrix"]["noise_seed"] = [0, 1]
    null = {name: ARMS["null"][name] for name in ("smoothing", "tau")}
    stage["exclude"] += [
        null | {"noise_seed": 0},
        {"smoothing": ["none", "normalised", "mixed_uniform"], "noise_seed": 1},
    ]
    for sides in (*plan["contrasts"], floor):
        sides["treatment"] |= {"noise_seed": 0}
        sides["control"] = sides["control"] | {"noise_seed": 0}
    floor["treatment"] = ARMS["null"] | {"noise_seed": 1}
    file.write_text(yaml.safe_dump(plan, sort_keys=False))
    for path in (runs / "smooth").glob("prefix-*/manifest.json"):
        manifest = json.loads(path.read_text())
        noise = {"noise_seed": int(manifest["matrix"]["smoothing"] == "unnormalised")}
        matrix = manifest["matrix"] | noise
        manifest |= {"matrix": matrix, "params": manifest["params"] | noise, "variant": variant_name("prefix", matrix)}
        path.write_text(json.dumps(manifest))
        path.parent.rename(path.parent.parent / manifest["variant"])
    study = gather(runs, str(file)).studies[0]
    assert not any(map(is_null, study.arms)) and noise_band(study, "test_ce_loss", 5) > 0
    shown = with_repeats(study)
    assert len(shown.arms) == len(study.arms) + 1 and is_null(shown.arms[-1])
    assert noise_band(shown, "test_ce_loss", 5) == pytest.approx(noise_band(study, "test_ce_loss", 5))
    html = prefix_smoothing(gather(runs, str(file)), tmp_path / "figures")
    assert "equals cross entropy: serves as A/A" in html.data


def test_a_borrowed_control_is_its_own_un_smoothed_model(tmp_path):
    """Cross entropy of another notebook reports no smoothing: it smooths by 0, and its KL is its cross entropy."""
    runs, file = write_prefix(tmp_path)
    plan = yaml.safe_load(file.read_text())
    notebook = json.loads((tmp_path / "prefix.ipynb").read_text())
    notebook["cells"][0]["source"] = PARAMETERS
    (tmp_path / "cosine.ipynb").write_text(json.dumps(notebook))
    matrix = {"alpha": [0.0], "seed": [*SEEDS]}
    plan["stages"].append({"name": "cosine", "notebook": str(tmp_path / "cosine.ipynb"), "matrix": matrix})
    del plan["noise_floor"]
    primary = plan["contrasts"][0] | {"control": {"alpha": 0.0}, "control_stage": "cosine"}
    plan["contrasts"] = [primary | {"control_metric": "test_bits_per_byte"}]
    file.write_text(yaml.safe_dump(plan, sort_keys=False))
    for seed in SEEDS:
        numbers = final_numbers(0.0, seed, 0)
        numbers = {name: numbers[name] for name in ("test_ce_loss", "eval_ce_loss", "eval_cosine")}
        numbers["test_bits_per_byte"] = numbers["test_ce_loss"] / 3.0
        write_run(runs / "smooth", "cosine", {"alpha": 0.0, "seed": seed}, numbers)
    study = next(study for study in gather(runs, str(file)).studies if study.stage == "prefix")
    control = cross_entropy(study)
    assert control.borrowed_from == "cosine" and effective(control) == 0 and smooths(study)
    assert by_seed(control, "test_unsmoothed_bits_per_byte") == by_seed(control, "test_bits_per_byte")
    assert by_seed(control, "test_kl_to_target") == by_seed(control, "test_ce_loss")
    assert by_seed(control, "test_clipped_gold") == {}
    html = arm_table(study).data
    assert "(stage cosine)" in html and "its own stand for its un-smoothed ones" in html
    assert f"{np.mean(increases('prefixes')):+.4f}" in text_of(ceiling_table(study))
