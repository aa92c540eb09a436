"""The report's HTML file is safe, whole and the same every time, and the report notebook makes it.

python -m pytest tests/test_export.py -v
"""

from __future__ import annotations

import base64
import re
from pathlib import Path

import nbformat
import pytest
from page_structure import Structure
from synthetic_runs import PNG, write_plan, write_runs

from nbutils import report
from nbutils.foundation.places import NOTEBOOKS
from nbutils.report.html_export import CLASSES, TAGS, clean

HOSTILE = [
    "<script>document.title='owned'</script>",
    "<scr<script>ipt>document.title='owned'</scr</script>ipt>",
    "<img src=x onerror=\"document.title='owned'\">",
    "<img src='https://example.com/pixel.png'>",
    "<img src='data:text/html;base64,PHNjcmlwdD4='>",
    "<img src='data:image/svg+xml;base64,PHN2ZyBvbmxvYWQ9ImFsZXJ0KDEpIi8+'>",
    "<img src='data:image/png;base64,PHNjcmlwdD4='>",
    "<svg onload=\"document.title='owned'\"><script>1</script></svg>",
    "<svg><a xlink:href='javascript:document.title=1'>x</a></svg>",
    "<math><mtext><table><mglyph><style><img src=x onerror=\"document.title='owned'\">",
    "<a href=\"javascript:document.title='owned'\">x</a>",
    "<a href='https://example.com'>x</a>",
    "<iframe src='https://example.com'></iframe>",
    "<iframe srcdoc=\"<script>parent.document.title='owned'</script>\"></iframe>",
    "<object data='https://example.com'></object><embed src='https://example.com'>",
    "<link rel=stylesheet href='https://example.com/x.css'>",
    "<style>@import 'https://example.com/x.css'; body { display: none }</style>",
    "<div style='position:fixed;inset:0;background:url(https://example.com)'>over all</div>",
    "<meta http-equiv=refresh content='0;url=https://example.com'>",
    "<base href='https://example.com/'>",
    "<form action='https://example.com'><input name=x><button>go</button></form>",
    "<video src='https://example.com/x.mp4' autoplay></video>",
    "<details open ontoggle=\"document.title='owned'\">x</details>",
    "<body onload=\"document.title='owned'\">",
    "<template><script>document.title='owned'</script></template>",
    "<noscript><p title=\"</noscript><script>document.title='owned'</script>\">",
    "<!--><script>document.title='owned'</script>-->",
    "<p id='section-1' class='verdict supported'>Supported.</p>",
    "</td></tr></table></main></body><h2>Forged</h2>",
    "]]><![CDATA[<script>document.title='owned'</script>]]>",
    "&lt;script&gt;document.title='owned'&lt;/script&gt;",
    "\u202egnp.elif\u202c \u200b\u2066hidden\u2069",
    "$\\href{javascript:document.title='owned'}{x}$ `code` **bold** # not a heading",
]


def assert_safe(page: str) -> Structure:
    """Nothing in `page` can run, ask a server, restyle the page or forge its structure."""
    structure = Structure(page)
    body = Structure(page[page.index("<main>") : page.index("</main>")])
    assert set(body.tags) <= TAGS | {"main", "nav", "a"}
    assert structure.tags.count("style") == 1 and "script" not in structure.tags
    for tag, name, value in body.attributes:
        assert name in {"src", "alt", "class", "colspan", "rowspan", "scope", "id", "href", "aria-label"}, (tag, name)
        if name == "src":
            assert base64.b64decode(value.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
        if name == "href":
            assert re.fullmatch(r"#section-\d+", value)
        if name == "id":
            assert tag == "h2" and re.fullmatch(r"section-\d+", value)
    assert [value for _, name, value in structure.attributes if name in {"href", "src"} and value == "data:,"]
    return structure


def notebook_with(*outputs, markdown: str = "# A title") -> nbformat.NotebookNode:
    cells = [nbformat.v4.new_markdown_cell(markdown), nbformat.v4.new_code_cell("secret_input = 1", outputs=[*outputs])]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    return nbformat.v4.new_notebook(cells=cells, nbformat_minor=5)


def exported(notebook: nbformat.NotebookNode, folder: Path) -> str:
    nbformat.write(notebook, folder / "executed.ipynb")
    return report.export(folder / "executed.ipynb", folder / "report.html").read_text()


def html_output(data: str):
    return nbformat.v4.new_output("display_data", {"text/html": data})


@pytest.fixture(scope="module")
def study(toy_evidence):
    return toy_evidence.studies[0]


# --- the file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("payload", HOSTILE)
def test_hostile_output_is_disarmed_wherever_it_stands(payload, tmp_path):
    outputs = [
        html_output(payload),
        nbformat.v4.new_output("execute_result", {"text/html": f"<table><tr><td>{payload}</td></tr></table>"}),
        nbformat.v4.new_output("display_data", {"text/markdown": payload}),
        nbformat.v4.new_output("display_data", {"image/svg+xml": payload, "text/plain": payload}),
        nbformat.v4.new_output("display_data", {"application/javascript": payload}),
        nbformat.v4.new_output("display_data", {"text/latex": payload}),
        nbformat.v4.new_output("stream", name="stdout", text=payload),
        nbformat.v4.new_output("error", ename=payload, evalue=payload, traceback=[payload]),
    ]
    page = exported(
        notebook_with(*outputs, markdown=f"# Title {payload}\n\n{payload}\n\n## Section {payload}"), tmp_path
    )
    structure = assert_safe(page)
    assert structure.text.count("\u202e") == 0
    assert page.count("</main>") == page.count("</body>") == 1


def test_what_the_report_makes_itself_survives_cleaning(toy_evidence, study):
    for html in (report.verdicts(toy_evidence), report.headline_table(study), report.samples(study)):
        assert Structure(clean(html.data)).tags.count("td") == Structure(html.data).tags.count("td")
        assert sorted(re.findall('class="(.*?)"', clean(html.data))) == sorted(re.findall('class="(.*?)"', html.data))
    picture = f'<figure><img alt="a" src="data:image/png;base64,{base64.b64encode(PNG).decode()}"></figure>'
    assert clean(picture) == picture


def test_scripts_and_styles_do_not_even_leave_their_text():
    assert clean("<script>a()</script><style>b {}</style><svg><text>c</text></svg><p>d</p>") == "<p>d</p>"


def test_every_class_that_survives_is_styled():
    template = (Path(report.__file__).parent / "page.html.j2").read_text()
    for names in CLASSES.values():
        for name in names:
            assert f".{name}" in template, name


def test_the_page_is_complete_in_itself(tmp_path):
    markdown = "# The title & more\n\nA question.\n\n## First part\n\ntext\n\n## Second <em>part</em>"
    page = exported(notebook_with(html_output("<p>shown</p>"), markdown=markdown), tmp_path)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert f'http-equiv="Content-Security-Policy" content="{policy}' in page
    assert "<title>The title &amp; more</title>" in page
    assert '<a href="#section-2">Second part</a>' in page and '<h2 id="section-2">Second <em>part</em></h2>' in page
    assert "shown" in page and "secret_input" not in page
    assert not re.search(r"https?://", page)
    assert "@media print" in page and page.startswith("<!DOCTYPE html>")


def test_the_same_notebook_gives_the_same_bytes(tmp_path):
    notebook = notebook_with(html_output("<p>a</p>"), markdown="# T\n\n## S")
    assert exported(notebook, tmp_path) == exported(notebook, tmp_path)


def test_a_report_that_stopped_says_so_and_papermills_banner_is_left_out(tmp_path):
    error = nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=["\x1b[31mValueError: no"])
    notebook = notebook_with(error)
    banner = nbformat.v4.new_markdown_cell("<span>An Exception was encountered</span>")
    banner["metadata"]["tags"] = ["papermill-error-cell-tag"]
    notebook.cells.insert(0, banner)
    page = exported(notebook, tmp_path)
    assert "This report is incomplete" in page and "ValueError: no" in page
    assert "An Exception was encountered" not in page and "\x1b" not in page
    assert "incomplete" not in exported(notebook_with(), tmp_path)


def test_an_error_in_a_hidden_cell_is_shown(tmp_path):
    notebook = notebook_with(nbformat.v4.new_output("error", ename="E", evalue="no", traceback=["E: broken"]))
    notebook.cells[1]["metadata"]["tags"] = ["not-in-report"]
    page = exported(notebook, tmp_path)
    assert "This report is incomplete" in page and "E: broken" in page


def test_a_tag_left_open_swallows_nothing_of_the_next_cell(tmp_path):
    notebook = notebook_with(html_output("<table><tr><td><style><b>"))
    notebook.cells.append(nbformat.v4.new_markdown_cell("## The next section", id="next"))
    assert '<h2 id="section-1">The next section</h2>' in exported(notebook, tmp_path)


@pytest.mark.parametrize("content", [None, "", "not json", "[]", '{"cells": 3}'])
def test_what_is_no_notebook_is_refused_with_the_cure(content, tmp_path):
    path = tmp_path / "executed.ipynb"
    if content is not None:
        path.write_text(content)
    with pytest.raises(report.ReportError, match=r"08_report\.ipynb"):
        report.export(path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


# --- the notebook ---------------------------------------------------------------------------------


def run_notebook(runs: Path, plan: str, folder: Path) -> Path:
    import papermill

    executed = folder / "executed.ipynb"
    parameters = {"runs_folder": str(runs), "plan": plan, "figures_folder": str(folder / "figures")}
    parameters["reports_folder"] = str(folder)
    papermill.execute_notebook(NOTEBOOKS / "08_report.ipynb", executed, parameters, progress_bar=False)
    return executed


@pytest.mark.slow
def test_the_notebook_makes_a_light_safe_report_of_a_whole_plan(tmp_path):
    runs, plan = write_runs(tmp_path / "runs"), write_plan(tmp_path)
    page = report.export(run_notebook(runs, str(plan), tmp_path), tmp_path / "report.html").read_text()
    structure = assert_safe(page)
    assert structure.tags.count("img") == 8
    assert len(re.sub(r"data:image/png;base64,[^\"]*", "", page).encode()) < 100_000
    assert len(page) < 1_000_000
    order = [
        '<span class="outcome">Supported.',
        ">Numbers by arm</h2>",
        ">Win, trade-off or neither</h2>",
        ">Appendix: the verdicts in numbers</h2>",
        ">Samples</h2>",
    ]
    places = [page.index(each) for each in order]
    assert places == sorted(places)
    assert len(list((tmp_path / "figures").glob("toy-cosine-*.svg"))) == 8


@pytest.mark.slow
def test_the_notebook_without_runs_explains_how_to_get_some(tmp_path):
    page = report.export(run_notebook(tmp_path / "runs", "", tmp_path), tmp_path / "report.html").read_text()
    assert_safe(page)
    assert "There are no runs to report on yet." in page and "make report" in page
    assert "incomplete" not in page


def test_a_page_that_cannot_be_written_is_told_with_the_cure(tmp_path):
    notebook = tmp_path / "report.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Report")]), notebook)
    (tmp_path / "folder").write_text("a file in the folder's place")
    with pytest.raises(report.ReportError, match=r"report.html cannot be written .*Name another file with --out"):
        report.export(notebook, tmp_path / "folder" / "report.html")
