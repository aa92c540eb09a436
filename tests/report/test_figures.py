"""Figures say what the data says, with units, for every reader, and come out the same every time.

python -m pytest tests/test_figures.py -v
"""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image
from synthetic_runs import STEPS, UNIGRAM, final_numbers, write_run

from nbutils.report import figures
from nbutils.report.evidence import Arm, Study, one_run
from nbutils.report.figures.style import COLOURS, look
from nbutils.report.studies.interaction_figures import rounds_and_judges
from nbutils.report.studies.prefix_figures import by_smoothing, target_examples

CARD = {
    "splits": {
        "train": {"documents": 2400, "tokens": 1_500_000},
        "validation": {"documents": 60, "tokens": 40_000},
        "test": {"documents": 120, "tokens": 70_000},
    },
    "leakage": {
        "validation": {"ngram_share": 0.031, "document_share": 0.4},
        "test": {"ngram_share": 0.0, "document_share": 0.0},
    },
}
DOCUMENTS = pd.DataFrame(
    {"split": ["train"] * 300 + ["test"] * 30, "tokens": np.random.default_rng(0).integers(1, 5000, 330)}
)
NOTHING = Study("toy", "cosine", (), (Arm("alpha 0", {}, (), 3),))


@pytest.fixture(scope="module")
def study(toy_evidence):
    return toy_evidence.studies[0]


def draw_all(study: Study) -> dict[str, Figure]:
    return {
        "loss": figures.loss_curves(study),
        "perplexity": figures.perplexity_curves(study),
        "proxy": figures.proxy(study),
        "contrasts": figures.contrast_forest(study),
        "cost": figures.cost_quality(study),
        "documents": figures.documents_per_split(CARD),
        "lengths": figures.document_lengths(DOCUMENTS),
        "leakage": figures.leakage(CARD),
    }


def test_every_axis_is_named(study):
    for name, figure in draw_all(study).items():
        for axes in figure.axes:
            categories = any(text.get_text().strip() and not _is_number(text) for text in axes.get_yticklabels())
            assert axes.get_xlabel(), name
            assert axes.get_ylabel() or categories or not axes.get_yticklabels(), name


def _is_number(text) -> bool:
    return bool(re.fullmatch(r"[−+\-\d.,%\s]*", text.get_text()))


def test_units_stand_on_the_axes(study):
    loss = figures.loss_curves(study).axes
    assert [axes.get_ylabel() for axes in loss[:2]] == [
        "objective\n(nats per token)",
        "cross entropy\n(nats per token)",
    ]
    assert {axes.get_xlabel() for axes in loss} == {"optimiser step"}
    cost = [axes.get_xlabel() for axes in figures.cost_quality(study).axes]
    assert cost == ["training time (s)", "peak memory (MiB)"]
    assert "tokens" in figures.document_lengths(DOCUMENTS).axes[0].get_xlabel()


def test_curves_are_means_over_seeds_and_the_unigram_level_is_drawn(study):
    axes = figures.perplexity_curves(study).axes[0]
    runs = [run.metrics().dropna(subset="eval_perplexity") for run in study.arms[0].runs]
    means = pd.concat(runs).groupby("step")["eval_perplexity"].mean()
    assert axes.lines[0].get_xdata() == pytest.approx(means.index)
    assert axes.lines[0].get_ydata() == pytest.approx(means.values)
    assert axes.get_yscale() == "log"
    level = next(line for line in axes.lines if len(set(line.get_ydata())) == 1)
    assert level.get_ydata()[0] == pytest.approx(np.exp(UNIGRAM))
    assert f"{np.exp(UNIGRAM):,.0f}" in " ".join(text.get_text() for text in axes.texts).replace("\n", " ")


def test_bands_are_student_intervals_over_seeds(study):
    axes = figures.perplexity_curves(study).axes[0]
    last = [run.metrics()["eval_perplexity"].dropna().iloc[-1] for run in study.arms[0].runs]
    half = 2.7764451 * np.std(last, ddof=1) / np.sqrt(5)  # t(4, .975)
    on_top = figures.contrast_forest(study).axes[0]
    assert any(tuple(line.get_xdata()) == (0.01, 0.01) for line in on_top.lines)  # no worse: lower is better
    band = axes.collections[0].get_paths()[0].vertices
    at_end = band[band[:, 0] == STEPS][:, 1]
    assert (at_end.min(), at_end.max()) == pytest.approx((np.mean(last) - half, np.mean(last) + half))


def test_long_curves_are_thinned_without_moving(study):
    line = figures.loss_curves(study).axes[1].lines[0]
    runs = pd.concat(run.metrics()[["step", "ce_loss"]].dropna() for run in study.arms[0].runs)
    means = runs.groupby("step")["ce_loss"].mean()
    assert len(line.get_xdata()) == 100 < len(means)
    assert line.get_ydata()[-1] == pytest.approx(means.iloc[-2:].mean())
    assert STEPS - 2 <= line.get_xdata()[-1] <= STEPS


def test_forest_shows_interval_threshold_and_floor_of_each_contrast(study):
    axes = figures.contrast_forest(study).axes[1]
    judged = next(j for j in study.judged if j.contrast.name == "mixing-proxy")
    drawn = [tuple(line.get_xdata()) for line in axes.lines]
    assert (judged.verdict.low, judged.verdict.high) in drawn
    assert (0.005, 0.005) in drawn  # better: higher by at least .005
    on_top = figures.contrast_forest(study).axes[0]
    assert any(tuple(line.get_xdata()) == (0.01, 0.01) for line in on_top.lines)  # no worse: lower is better
    band = axes.collections[0].get_paths()[0].vertices[:, 0]
    assert (band.min(), band.max()) == pytest.approx((-judged.floor.band(5), judged.floor.band(5)))


def test_an_interval_far_out_becomes_an_arrow_and_leaves_the_scale_to_the_others(study):
    axes = figures.contrast_forest(study).axes[0]
    assert axes.get_xlim()[1] < 0.02  # alpha 1 is worse by .5
    assert any("+0.50" in text.get_text() for text in axes.texts)
    alone = replace(study, judged=tuple(j for j in study.judged if j.contrast.name == "cosine-alone"))
    assert figures.contrast_forest(alone).axes[0].get_xlim()[1] > 0.5


def test_arms_differ_without_colour_and_the_legend_names_them(study):
    figure = figures.loss_curves(study)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["alpha 0.0", "alpha 0.5", "alpha 1.0"]
    assert len({line.get_linestyle() + str(line._dash_pattern) for line in figure.axes[0].lines}) == 3
    styles = look([f"arm {number}" for number in range(20)]).values()
    assert len({(style["color"], style["dash"]) for style in styles}) == 20
    assert len({style["dash"] for style in list(styles)[:8]}) == len({s["marker"] for s in list(styles)[:8]}) == 8


def test_arm_colours_stay_apart_for_colour_blind_readers():
    """Every two of the eight, seen as a deuteranope sees them (Viénot, Brettel and Mollon 1999)."""
    to_deutan = np.array([[0.29031, 0.70969, 0], [0.29031, 0.70969, 0], [-0.02197, 0.02197, 1]])
    seen = [to_deutan @ np.array(mpl.colors.to_rgb(colour)) ** 2.2 for colour in COLOURS]
    assert min(np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i]) > 0.1


def test_nothing_to_draw_says_so():
    for draw in (figures.loss_curves, figures.perplexity_curves, figures.proxy, figures.cost_quality):
        texts = [text.get_text() for text in draw(NOTHING).axes[0].texts]
        assert texts and texts[0].startswith("No run"), draw
    assert figures.contrast_forest(NOTHING).axes[0].texts
    assert figures.leakage({"leakage": {}}).axes[0].texts
    nothing_seen = {"validation": {"ngram_share": 0.0, "document_share": 0.1, "answer_share": 0.0}}
    of_questions = figures.leakage({"leakage": nothing_seen, "leakage_words": 8})
    assert [axes.get_xlabel() for axes in of_questions.axes] == [
        "8-word runs also in train (%)",
        "answers that a train answer equals (%)",
    ]
    assert [axes.get_xlim() for axes in of_questions.axes] == [(0, 1), (0, 1)]  # else ticks of a billionth each
    assert figures.document_lengths(DOCUMENTS.iloc[:0]).axes[0].texts


def test_one_run_alone_can_be_drawn_while_it_trains(tmp_path):
    folder = write_run(tmp_path / "toy", "cosine", {"alpha": 0.5, "seed": 1}, final_numbers(0.5, 1, 0))
    (folder / "result.json").unlink()
    study = one_run(folder)
    assert len(figures.loss_curves(study).axes) == 3
    lines = figures.perplexity_curves(study, unigram_ce=2.0).axes[0].lines
    assert len(lines) == 2 and lines[1].get_ydata()[0] == pytest.approx(np.exp(2.0))


def test_data_card_figures_show_its_numbers():
    bars = [bar.get_width() for bar in figures.documents_per_split(CARD).axes[0].patches]
    assert bars == [2400, 60, 120]
    assert "2,400" in [text.get_text() for text in figures.documents_per_split(CARD).axes[0].texts]
    shares = [text.get_text() for text in figures.leakage(CARD).axes[0].texts]
    assert shares == ["3.10 %", "0.00 %"]


def test_lengths_are_shares_of_each_split():
    lines = figures.document_lengths(DOCUMENTS).axes[0].lines
    assert len(lines) == 2
    for line in lines:
        assert sum(line.get_ydata()[:-1]) == pytest.approx(100)  # the last point closes the last step


def test_show_saves_png_and_svg_and_returns_the_picture_with_its_caption(study, tmp_path):
    shown = figures.show(figures.loss_curves(study), "loss", 'Loss "a" <b>', tmp_path).data
    png = (tmp_path / "loss.png").read_bytes()
    assert base64.b64encode(png).decode() in shown
    assert 'alt="loss"' in shown and "<figcaption>Loss &quot;a&quot;" in shown
    assert Image.open(io.BytesIO(png)).size[0] >= 1400  # 7.2 inches at 200 dots each
    assert len(png) < 100_000
    assert (tmp_path / "loss.svg").read_text().lstrip().startswith("<?xml")


def test_the_same_figure_gives_the_same_bytes(study, tmp_path):
    """The layout solver's last bits differ between calls in one process; the saved file's must not."""
    for folder in ("a", "b"):
        for draw in (figures.contrast_forest, figures.loss_curves, figures.contrast_forest):
            figures.show(draw(study), draw.__name__, "", tmp_path / folder)
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_a_name_cannot_leave_the_folder(study, tmp_path):
    figures.show(figures.loss_curves(study), "../../up/<x>", "", tmp_path / "figures")
    assert [path.name for path in sorted((tmp_path / "figures").iterdir())] == ["up-x.png", "up-x.svg"]


def test_the_readers_own_style_and_open_figures_are_left_alone(study, tmp_path):
    before = dict(mpl.rcParams)
    figures.show(figures.proxy(study), "proxy", "", tmp_path)
    assert dict(mpl.rcParams) == before
    assert plt.get_fignums() == []


def test_a_proxy_that_was_only_judged_at_the_end_is_drawn_by_arm(toy_evidence):
    study = toy_evidence.studies[0]
    for run in study.runs:
        assert "eval_token_acc" not in run.metrics().columns
    left, right = figures.proxy(study, "token_acc").axes
    assert left.texts and not left.lines and right.get_xlabel() == "test token accuracy (%)"
    assert len(right.collections) >= 3


def test_a_folder_that_cannot_be_written_costs_the_file_not_the_picture(study, tmp_path, caplog):
    (tmp_path / "figures").write_text("a file in the folder's place")
    shown = figures.show(figures.loss_curves(study), "loss", "Loss.", tmp_path / "figures")
    assert "data:image/png" in shown.data
    assert "is shown, but not saved" in caplog.text


@pytest.mark.parametrize(
    "draw",
    [
        *(figures.heat_map, figures.gradient_audit, figures.reliability, figures.loss_terms, figures.overfitting),
        *(figures.distance_to_teacher, by_smoothing, target_examples, rounds_and_judges),
    ],
)
def test_a_study_without_what_a_figure_shows_gets_a_sentence(draw):
    (axes,) = draw(NOTHING).axes[:1]
    assert axes.texts
