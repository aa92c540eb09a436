"""A report of hostile runs in a real browser: nothing runs, nothing is requested, nothing is out of its place.

python -m pytest tests/test_report_in_browser.py -v

Every text of the run folders is an attack (hostile_runs.PAYLOADS). The report is made from them as the command line
makes it, and held against the report of runs that hold plain words in the same places.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

import mistune
import pytest
from browser import Browser, Seen, Trap, find_browser
from hostile_runs import HOST, PAYLOADS, WEEK, numbered, plain_words, write_hostile
from PIL import Image

from nbutils.foundation.plaintext import LONGEST_TEXT, shortened, visible
from nbutils.report.comparison import compare

pytestmark = pytest.mark.slow

MAKE = Path(__file__).parents[1] / "make_report.py"
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
PICTURES = re.compile(r"data:image/png;base64,[^\"]*")
CONTROL = f"""<!DOCTYPE html><html><head><title>control</title></head><body>
<img src="http://{HOST}/picture.png"><img src="https://{HOST}/secure.png"><iframe src="http://{HOST}/frame"></iframe>
<script>document.title = "owned"; window.owned = 1; alert("dialog")</script>
<p onclick="document.body.append('clicked')">press</p><a href="javascript:alert(2)">go</a></body></html>"""
# The same process made elsewhere, at another time of day, by somebody with other habits.
OTHER_HABITS = "figure.facecolor: black\naxes.prop_cycle: cycler('color', ['r'])\nfont.size: 20\ntext.usetex: True\n"


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, Path]:
    """Folders of two reports: of hostile runs, and of their harmless twin."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("hostile", "harmless")}
    started = [
        started_report(folders["hostile"], PAYLOADS, MAKE.parent, TZ="America/Anchorage"),
        started_report(folders["harmless"], plain_words(len(PAYLOADS)), MAKE.parent),
    ]
    for process in started:
        finish(process)
    return {name: folder / "reports" for name, folder in folders.items()}


def started_report(folder: Path, texts: Sequence[str], where: Path, **settings: str) -> subprocess.Popen:
    """The making of a report of runs whose every text is one of `texts`, in a process of its own."""
    write_hostile(folder, texts)
    command = [sys.executable, str(MAKE), str(folder / "runs"), str(folder / "reports"), WEEK, ""]
    environment = os.environ | settings | {"PYTHONHASHSEED": str(len(settings)), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, cwd=where, **pipes)


def finish(process: subprocess.Popen) -> None:
    output = process.communicate(timeout=900)[0]
    assert process.returncode == 0, output[-3000:]


@pytest.fixture(scope="module")
def trap() -> Iterator[Trap]:
    with Trap() as trap:
        yield trap


@pytest.fixture(scope="module")
def browser(trap) -> Iterator[Browser]:
    executable = find_browser()
    if executable is None:
        pytest.skip("no Chromium or Chrome on PATH: what a page does can only be seen in a browser")
    with Browser(executable, trap.port) as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(reports, browser) -> dict[str, Seen]:
    """The hostile and the harmless report as the browser shows them."""
    return {name: browser.open(reports[name] / f"{WEEK}.html") for name in ("hostile", "harmless")}


def squeezed(text: str) -> str:
    """`text` without the white space that a line break leaves or takes."""
    return "".join(text.split())


def spelled(text: str, longest: int = LONGEST_TEXT) -> str:
    return squeezed(shortened(visible(text[: longest + 1]), longest))


# --- what the browser sees ------------------------------------------------------------------------


def test_the_browser_and_the_trap_notice_what_a_page_does(browser, trap, tmp_path):
    control = tmp_path / "control.html"
    control.write_text(CONTROL)
    before = len(trap.heard)
    seen = browser.open(control)
    assert seen.read["title"] == "owned" and seen.dialogs == ["dialog"]
    assert seen.did.keys() == {"dialogs", "requests", "complaints", "windows", "marks", "events", "markup"}
    heard = b"\n".join(trap.heard[before:])
    for asked in (b"GET /picture.png", b"GET /frame", HOST.encode()):
        assert asked in heard
    assert any(first[:1] == b"\x16" for first in trap.heard[before:])  # the TLS of the picture asked for securely
    quiet = tmp_path / "quiet.html"
    quiet.write_text("<!DOCTYPE html><html><head><title>quiet</title></head><body><p>words</p></body></html>")
    before = len(trap.heard)
    assert browser.open(quiet).did == {} and len(trap.heard) == before


@pytest.mark.parametrize("policy", [True, False], ids=["as it is", "without its policy"])
def test_a_report_of_hostile_runs_does_nothing(policy, reports, browser, trap, tmp_path):
    page = tmp_path / "report.html"
    content = (reports["hostile"] / f"{WEEK}.html").read_text()
    page.write_text(content if policy else POLICY.sub("", content))
    assert bool(POLICY.search(page.read_text())) == policy
    before = len(trap.heard)
    seen = browser.open(page)
    assert seen.did == {} and trap.heard[before:] == []
    assert seen.read["title"] == "What the runs say"
    assert seen.read["lifted"] == seen.read["backgrounds"] == 0
    assert seen.read["width"] <= seen.read["room"]


def test_tables_headings_and_figures_are_those_of_the_harmless_twin(pages):
    hostile, harmless = pages["hostile"].read, pages["harmless"].read
    assert hostile["skeleton"] == harmless["skeleton"] and len(hostile["skeleton"]) > 1000
    sections = [[text for tag, text in page["headings"] if tag == "h2"] for page in (hostile, harmless)]
    assert sections[0] == sections[1]
    shapes = [
        [(table["section"], [len(row) for row in table["rows"]]) for table in page["tables"] if table["section"]]
        for page in (hostile, harmless)
    ]
    assert shapes[0] == shapes[1]
    widths = [[width for _, width in page["pictures"] if width] for page in (hostile, harmless)]
    assert widths[0] == widths[1] and len(widths[0]) > 10
    assert len(hostile["markup"]) < 2 * len(harmless["markup"])


def test_every_attack_stands_in_its_own_cell_spelled_out(pages):
    tables = pages["hostile"].read["tables"]
    failed = next(table["rows"] for table in tables if table["section"] == "Failed runs")
    cells = {squeezed(row[3]) for row in failed[1:]}
    named = {squeezed(row[0]) for table in tables if table["section"].startswith("Appendix") for row in table["rows"]}
    asked = [squeezed(text) for text in pages["hostile"].read["strong"]]
    said = " ".join(map(squeezed, pages["hostile"].read["paragraphs"]))
    for text in numbered(PAYLOADS):
        assert spelled(text) in cells
        assert spelled(text) in asked
        assert any(name.startswith(spelled(text)) for name in named) or len(text) > LONGEST_TEXT
        assert f"Data:{spelled(text)}"[:300] in said
    assert cells == {spelled(text) for text in numbered(PAYLOADS)}


def test_no_character_of_a_page_is_hidden_or_reorders_others(pages):
    text = pages["hostile"].read["text"]
    for character in sorted(set(text) - set("\n\t")):
        assert unicodedata.category(character) not in {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}, ascii(character)
    assert not re.search("[\u0300-\u036f\u20d0-\u20ff]{5}", text)
    for code in (
        r"\u202egnp.elif\u202c",
        r"\ud800 and \udfff",
        r"\u001b[31m",
        r"\u0000\u0001",
        r"\U000e0041",
        r"\u3164",
    ):
        assert code in text


def test_the_weeks_note_is_markdown_and_nothing_more(pages):
    text, headings = pages["hostile"].read["text"], pages["hostile"].read["headings"]
    assert "A note by hand, with a list:" in text
    assert ["h4", "heading"] in headings and ["h4", "Forged"] in headings
    assert [tag for tag, _ in headings].count("h1") == 1


# --- what is written beside the page --------------------------------------------------------------


def test_the_log_is_markdown_in_which_no_attack_is_read(reports, browser, trap, tmp_path):
    render = mistune.create_markdown(escape=False, plugins=["table", "strikethrough", "url", "task_lists", "math"])
    pages, before = {}, len(trap.heard)
    for name in ("hostile", "harmless"):
        page = tmp_path / f"{name}.html"
        body = render((reports[name] / "results.md").read_text())
        page.write_text(
            f'<!DOCTYPE html><html><head><meta charset="utf-8"><title>log</title></head><body>{body}</body>'
        )
        pages[name] = browser.open(page)
    assert pages["hostile"].did == {} and len(trap.heard) == before
    hostile, harmless = (page.read for page in pages.values())
    assert hostile["title"] == "log" and hostile["tags"] == harmless["tags"]
    assert len(hostile["headings"]) > 10
    for text in numbered(PAYLOADS)[::5]:
        assert spelled(" ".join(text.split()), 200)[:50] in squeezed(hostile["text"])


def test_the_weeks_numbers_are_json_with_every_name(reports):
    told = json.loads((reports["hostile"] / f"{WEEK}.json").read_text())
    assert {f"toy: {text}" for text in numbered(PAYLOADS)} <= told["verdicts"].keys()
    assert json.loads((reports["hostile"].parent / "runs" / "toy" / "metrics.json").read_text())["plan"] == "toy"


def test_figures_hold_no_active_content_and_lie_in_their_folder(reports, browser, trap):
    folder = reports["hostile"] / "figures"
    files = sorted(folder.iterdir())
    assert len(files) > 20 and all(re.fullmatch(r"[A-Za-z0-9._-]{1,140}\.(png|svg)", file.name) for file in files)
    for file in files:
        if file.suffix == ".png":
            assert Image.open(file).info.keys() <= {"dpi", "transparency"}
            continue
        for element in ElementTree.parse(file).iter():
            assert element.tag.rpartition("}")[2] not in {"script", "foreignObject", "a", "animate", "set"}
            for name, value in element.attrib.items():
                assert not name.lower().startswith("on") and "javascript" not in value
                assert value.startswith(("#", "data:image/png;base64,")) or not name.endswith("href")
    before = len(trap.heard)
    for file in [file for file in files if file.name.endswith(("contrasts.svg", "targets.svg"))]:
        assert browser.open(file).did == {}
    assert len(trap.heard) == before


def test_nothing_is_written_outside_the_folders_of_runs_and_reports(reports):
    root = reports["hostile"].parent
    assert {path.name for path in root.iterdir()} == {"runs", "reports", "prepared", "study.ipynb"}
    written = [path for path in (root / "runs").rglob("metrics.json")]
    assert written == [root / "runs" / "toy" / "metrics.json"]


def test_two_sides_of_hostile_runs_beside_each_other_do_nothing(reports, browser, trap, tmp_path):
    sides = [reports[name].parent / "runs" / "toy" for name in ("hostile", "harmless")]
    told = compare(*sides, tmp_path / "both.html")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", told)
    before = len(trap.heard)
    seen = browser.open(tmp_path / "both.html")
    assert seen.did == {} and len(trap.heard) == before
    assert seen.read["width"] <= seen.read["room"] and len(seen.read["tables"]) > 0


# --- the same bytes -------------------------------------------------------------------------------


@pytest.mark.soak
def test_the_same_runs_give_the_same_bytes_elsewhere_and_at_another_time(reports, tmp_path):
    habits = tmp_path / "matplotlibrc"
    habits.write_text(OTHER_HABITS)
    other = {"TZ": "Pacific/Kiritimati", "LC_ALL": "C", "TMPDIR": str(tmp_path), "MATPLOTLIBRC": str(habits)}
    again = tmp_path / "again"
    again.mkdir()
    finish(started_report(again, PAYLOADS, again, **other))
    files = sorted(path.relative_to(reports["hostile"]) for path in reports["hostile"].rglob("*") if path.is_file())
    assert len(files) > 25
    for file in files:
        assert (reports["hostile"] / file).read_bytes() == (again / "reports" / file).read_bytes(), file
    page = (reports["hostile"] / f"{WEEK}.html").read_text()
    assert len(PICTURES.findall(page)) > 10 and str(reports["hostile"].parent) not in page
