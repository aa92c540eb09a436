"""The command line: one clean line and exit code 2 for a user's mistake, help with examples, a quick `status`."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import pytest
from tiny_notebooks import write_notebook, write_plan

from nbutils import __main__ as cli
from nbutils.foundation.places import ROOT

PLAN = "name: p\nstages:\n  - {name: study, notebook: {here}/study.ipynb, matrix: {seed: [1, 2]}}\n"


@pytest.fixture
def here(tmp_path):
    write_notebook(tmp_path / "study.ipynb", "print('hello')", "if seed == 2: 1 / 0")
    write_plan(tmp_path / "p.yaml", PLAN)
    return tmp_path


def call(capsys, *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(each) for each in arguments])
    return code, *capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("check", "nowhere.yaml"), "There is no file nowhere.yaml"),
        (("check", "quik"), "There is no file params/quik.yaml. Did you mean 'quick.yaml'?"),
        (("check", "{here}/bad.yaml"), "bad.yaml, line 2, column 1, is not YAML"),
        (("check", "{here}/p.yaml", "--gpu", "A101"), "no data on a GPU 'A101'. Did you mean 'A10"),
        (("batch", "{here}/p.yaml", "--workers", "0"), "--workers is 0. Give the number"),
        (("batch", "{here}/p.yaml", "--retries", "-1"), "--retries is -1. Give 0, for no second attempt, or more."),
        (("batch", "{here}/p.yaml", "--address", "auto"), "--address auto is that of a Ray cluster. Add --engine ray"),
        (
            ("batch", "{here}/p.yaml", "--engine", "ray", "--gpus", "0"),
            "--gpus is for this machine alone: Ray shares out what its nodes have. Leave it out.",
        ),
        (("batch", "{here}/p.yaml", "--only", "x*"), "No variant of plan 'p' matches 'x*'"),
        (("status", "{here}/q.yaml"), "There is no file"),
        (
            ("run", "stdy", "--params", "{here}/p.yaml", "--variant", "study-seed1"),
            "There is no notebook notebooks/stdy",
        ),
        (
            ("run", "{here}/study", "--params", "{here}/p.yaml", "--variant", "study-seed1", "--cell-minutes", "0"),
            "run: resources cell_minutes is 0.0. Give a number of minutes above 0.",
        ),
        (("run", "--from", "{here}/nowhere/manifest.json"), "There is no manifest"),
        (("run", "study", "--from", "{here}/manifest.json"), "Leave those out, or --from."),
        (("report", "--compare", "{here}/a", "{here}/b"), "{here}/a"),
        (
            ("run", "{here}/study", "--params", "{here}/p.yaml", "--variant", "study-seed3"),
            "no variant 'study-seed3'. Did",
        ),
        (
            ("run", "01_data_prep", "--params", "{here}/p.yaml", "--variant", "study-seed1"),
            "is a run of another notebook",
        ),
        (
            ("run", "{here}/study", "--params", "{here}/flat.yaml", "--variant", "a"),
            "study has no parameter 'sede' (given 1",
        ),
        (("run", "{here}/study", "--params", "{here}/list.yaml", "--variant", "a"), "neither a plan nor a mapping"),
        (("run", "{here}/study", "--params", "{here}/empty.yaml", "--variant", "../a"), "'../a' becomes a folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(here, capsys, arguments, words):
    (here / "bad.yaml").write_text("name: [\n")
    (here / "flat.yaml").write_text("sede: 1\n")
    (here / "list.yaml").write_text("- 1\n")
    (here / "empty.yaml").write_text("")
    code, out, err = call(
        capsys,
        *(each.replace("{here}", str(here)) for each in arguments),
        *(OUT.get(arguments[0], ()) if "--from" not in arguments else ()),
    )
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words.replace("{here}", str(here)) in err
    assert not list(ROOT.glob("runs/p"))


OUT = {"run": ("--out", "nowhere"), "batch": ("--out", "nowhere")}


def test_run_must_know_what_to_run(capsys):
    with pytest.raises(SystemExit) as leaving:
        cli.main(["run", "04_cosine_mixing", "--variant", "a"])
    assert leaving.value.code == 2
    assert "run needs NOTEBOOK, --params and --variant, or --from with the manifest.json" in capsys.readouterr().err


def test_names_for_scripts(here, capsys):
    code, told, _ = call(capsys, "check", here / "p.yaml", "--names")
    assert (code, [line.split("\t")[2] for line in told.splitlines()]) == (0, ["study-seed1", "study-seed2"])


@pytest.mark.slow
def test_limits_of_the_command_line_reach_the_run(here, capsys):
    write_notebook(here / "study.ipynb", "import time; time.sleep(60)")
    words = ("run", here / "study", "--params", here / "p.yaml", "--variant", "study-seed1", "--out", here / "runs")
    code, _, error = call(capsys, *words, "--cell-minutes", "0.02")
    assert (code, "CellTimeout: the cell took longer than cell_minutes 0.02" in error) == (1, True)
    code, table, _ = call(capsys, "status", here / "p.yaml", "--out", here / "runs", "--watch")  # ends: nothing runs
    assert (code, "CellTimeout" in table) == (0, True)


@pytest.mark.slow
def test_run_and_status_tell_the_same_story(here, capsys):
    out = ("--out", here / "runs")
    code, told, _ = call(capsys, "run", here / "study", "--params", here / "p.yaml", "--variant", "study-seed1", *out)
    assert (code, told) == (0, told)
    assert re.search(r"^study-seed1: finished in \d+ s -> .*runs/study-seed1$", told.strip())
    code, told, _ = call(capsys, "run", here / "study", "--params", here / "p.yaml", "--variant", "study-seed1", *out)
    assert (code, "was finished before" in told) == (0, True)
    code, _, error = call(capsys, "run", here / "study", "--params", here / "p.yaml", "--variant", "study-seed2", *out)
    assert code == 1
    assert "hello" in error  # the last lines of its log
    assert "error: ZeroDivisionError: division by zero (In [" in error
    code, table, _ = call(capsys, "status", here / "p.yaml", *out)
    assert code == 0
    assert re.search(r"^study-seed1  finished  1 +\d+ s$", table, re.MULTILINE)
    assert re.search(r"^study-seed2  failed    1 +\d+ s +ZeroDivisionError", table, re.MULTILINE)
    write_notebook(here / "study.ipynb", "changed = 1")
    assert "batch makes it again" in call(capsys, "status", here / "p.yaml", *out)[1]
    assert (here / "runs" / "plan.yaml").is_file()


@pytest.mark.soak
@pytest.mark.slow
def test_run_takes_a_flat_file_and_batch_ends_with_a_table(here, capsys):
    (here / "flat.yaml").write_text("alpha: 1e-4\nseed: 3\n")
    code, _, _ = call(
        capsys, "run", here / "study", "--params", here / "flat.yaml", "--variant", "mine", "--out", here / "runs"
    )
    assert code == 0
    assert (here / "runs" / "mine" / "params.yaml").read_text() == "alpha: 0.0001\nseed: 3\n"
    code, table, _ = call(capsys, "batch", here / "p.yaml", "--out", here / "runs")
    assert code == 1
    assert re.search(r"^study-seed1 +finished +\d+ s$", table, re.MULTILINE)
    assert re.search(r"^study-seed2 +failed +\d+ s +ZeroDivisionError", table, re.MULTILINE)


@pytest.mark.slow
def test_report_executes_and_exports(here, capsys, monkeypatch):
    """The command alone: what the notebook and the page say is tested elsewhere."""
    cells = "run = (runs_folder, plan, week)\nprint(run)", "if plan.endswith('broken.yaml'): 1 / 0"
    names = ("runs_folder", "reports_folder", "plan", "week")
    parameters = "".join(f'{name}: str = ""  # text\n' for name in names)
    notebook = write_notebook(here / "08_report.ipynb", *cells, parameters=parameters)
    monkeypatch.setattr("nbutils.runs.params.NOTEBOOKS", notebook.parent)
    monkeypatch.setattr(cli, "REPORTS", here / "reports")
    monkeypatch.chdir(here)
    (here / "runs").mkdir()
    page, files = here / "report.html", [here / f"report{ending}" for ending in (".html", "-results.md", ".json")]
    code, told, _ = call(capsys, "report", "--runs", "runs", "--plan", "p.yaml", "--out", "report.html")
    assert (code, told.split()) == (0, list(map(str, files)))
    assert str(here / "runs") in page.read_text() and str(here / "p.yaml") in page.read_text()
    assert files[1].read_text().startswith("# Results")
    week = re.search(r"\d{4}-W\d\d", page.read_text())[0]
    assert call(capsys, "report", "--runs", "runs", "--plan", "p.yaml")[0] == 0
    assert call(capsys, "report", "--runs", "runs")[0] == 0
    names = {f"{week}{ending}" for ending in (".html", ".json", "-p.html", "-p.json", "-p-results.md")}
    assert {path.name for path in (here / "reports").iterdir()} == names | {"results.md"}
    code, told, _ = call(capsys, "report", "--compare", "report.html", f"reports/{week}-p.html", "--out", "c.html")
    assert (code, "A  ", (here / "c.html").is_file()) == (0, told[:3], True)
    write_plan(here / "broken.yaml", PLAN)
    code, _, error = call(capsys, "report", "--plan", "broken.yaml", "--out", here / "other.html")
    assert code == 1
    assert "ZeroDivisionError: division by zero" in error
    assert not (here / "other.html").exists()


@pytest.mark.parametrize("command", [[], ["check"], ["run"], ["batch"], ["status"], ["report"]])
def test_help_explains(capsys, command):
    with pytest.raises(SystemExit) as leaving:
        cli.main([*command, "--help"])
    assert leaving.value.code == 0
    told = capsys.readouterr().out
    assert ("examples:" in told) if not command else ("usage: python -m nbutils " + command[0] in told)


def test_status_answers_at_once(here):
    start = time.perf_counter()
    done = subprocess.run(
        [
            sys.executable,
            "-X",
            "importtime",
            "-m",
            "nbutils",
            "status",
            str(here / "p.yaml"),
            "--out",
            str(here / "runs"),
        ],
        capture_output=True,
        text=True,
    )
    assert time.perf_counter() - start < 2
    assert "p: 0 of 2 finished" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "papermill", "nbformat", "pandas", "numpy"}


def test_check_looks_at_a_plan_whose_hub_names_cannot_be_reached(monkeypatch, capsys):
    def no_network(*_, **__):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", no_network)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_network)
    assert cli.main(["check", "cosine"]) == 0
    told = capsys.readouterr().out
    assert "81.9 M" in told and "106 variants" in told
    assert "here and now. params/cosine.yaml: stage 'data': The data set 'HuggingFaceFW/finepdfs' cannot be had" in told
