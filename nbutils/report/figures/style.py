"""How every figure looks, and how it is saved and shown.

Colours are those of seaborn's "colorblind" palette with a grey for the control and a darker green that does
not look like it; each arm also has its own dash and marker, so a grey print still tells them apart. Text is
never read as TeX: an arm called "$x" is shown, not parsed. Every character of it is drawn: what is invisible, or not in
the font, as its code.
"""

from __future__ import annotations

import base64
import hashlib
import io
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from nbutils.foundation import FIGURES, LONGEST_PARAGRAPH, escape, escaped, shortened, visible

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from IPython.display import HTML

    from nbutils.report.evidence import Arm

WIDTH = 7.2  # inches: the text width of an A4 page, so that 8 point text prints as 8 points
DOTS_PER_INCH = 200
PNG_COLOURS = 128  # a palette makes a plot a third as heavy, and no eye sees it
LEGEND_ROW = 0.17  # inches
LONGEST_LINE, MOST_LINES = 90, 12  # of text in a figure: what fits its width
LONGEST_NAME = 120  # characters of a file name; its ending and the name it is written under come on top
INK, QUIET, LINE = "#1b1f24", "#5b6570", "#d8dee4"

# Colour, dash and marker of the first, second, ... arm. The control comes first: grey, and drawn wide, so
# that a dashed line upon it still shows both.
COLOURS = ("#8a8a8a", "#0173b2", "#de8f05", "#cc78bc", "#00684b", "#d55e00", "#56b4e9", "#ca9161")
DASHES = ("", (4, 1.5), (1, 1), (3, 1.25, 1.5, 1.25), (5, 1, 1, 1, 1, 1), (2, 2), (6, 2), (3, 1, 1, 1, 1, 1))
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "p")

RC = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same figure on every machine
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "axes.edgecolor": QUIET,
    "axes.linewidth": 0.8,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "svg.hashsalt": "soft-targets-workbook",
    "svg.fonttype": "path",
}


@contextmanager
def styled() -> Iterator[None]:
    """The house style, and nothing else, while a figure is drawn or saved; the reader's own settings afterwards."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(RC)
        yield


def canvas(panels: int = 1, height: float = 2.3, columns: int = 3) -> tuple[Figure, list]:
    """A figure of the page's width with `panels` axes in rows of at most `columns`; `height` inches a row."""
    columns = min(panels, columns)
    rows = -(-panels // columns)
    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in axes[panels:]:
        unused.remove()
    return figure, list(axes[:panels])


def look(labels: Sequence[str]) -> dict[str, dict]:
    """Colour, dash and marker of each label, by its place; past eight they repeat in another pairing."""
    return {
        label: {
            "color": COLOURS[index % len(COLOURS)],
            "dash": DASHES[(index + index // len(COLOURS)) % len(DASHES)],
            "marker": MARKERS[(index + index // len(COLOURS)) % len(MARKERS)],
        }
        for index, label in enumerate(labels)
    }


def arm_legend(figure: Figure, arms: Sequence[Arm]) -> None:
    """One legend above all panels: colour, dash and marker of every arm with runs. A single one needs none."""
    styles = look([arm.label for arm in arms])
    labels = [arm.label for arm in arms if arm.runs]
    if len(labels) < 2:
        return
    handles = []
    for label in labels:
        style = styles[label]
        line = Line2D([], [], color=style["color"], marker=style["marker"], markersize=4, label=label)
        line.set_dashes(style["dash"] or (None, None))
        handles.append(line)
    columns = max(1, min(len(handles), 90 // (8 + max(map(len, labels)))))
    rows = -(-len(handles) // columns)
    figure.set_figheight(figure.get_figheight() + LEGEND_ROW * (rows - 1))  # or a long legend would eat the panels
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, handlelength=3)


def log_axis(axes: Axes, name: str) -> None:
    """Make the axis called `name`, "x" or "y", logarithmic, with plain numbers at 1, 2 and 5 of each decade."""
    axis = {"x": axes.xaxis, "y": axes.yaxis}[name]
    axes.set(**{f"{name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.set_minor_formatter(NullFormatter())


def empty(message: str) -> Figure:
    """A small figure that says why there is nothing to draw."""
    figure, (axes,) = canvas(height=0.8)
    axes.set_axis_off()
    axes.text(0.0, 0.5, message, color=QUIET, transform=axes.transAxes, va="center")
    return figure


def show(figure: Figure, name: str, caption: str, folder: Path = FIGURES) -> HTML:
    """Save `figure` as `<name>.png` and `<name>.svg` in `folder`; return it with its caption for a notebook.

    The same figure gives the same bytes: no date, no version, fixed ids. Characters of `name` that do not
    belong in a file name become "-", and a long one is cut. It is the picture's alternative text, too: what can be seen
    says the caption, which is plain text and is escaped.
    """
    from IPython.display import HTML

    from nbutils.foundation import atomic_write

    name = _file_name(name)
    _spell_out(figure)
    _settle(figure)
    png = _with_palette(_rendered(figure, "png", dpi=DOTS_PER_INCH))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / f"{name}.png", png)
        atomic_write(folder / f"{name}.svg", _rendered(figure, "svg", metadata={"Date": None, "Creator": None}))
    except OSError as error:  # the notebook and the report carry the picture themselves
        logger.warning("Figure %s is shown, but not saved: %s cannot be written (%s).", name, folder, error.strerror)
    figure.clear()
    caption = escaped(caption, LONGEST_PARAGRAPH)
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return HTML(f'<figure><img alt="{name}" src="{source}"><figcaption>{caption}</figcaption></figure>')


def _file_name(name: str) -> str:
    """`name` in characters of a file name; of a long one the beginning and a hash."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "figure"
    if len(plain) <= LONGEST_NAME:
        return plain
    return f"{plain[:LONGEST_NAME]}-{hashlib.sha256(visible(name).encode()).hexdigest()[:8]}"


def _spell_out(figure: Figure) -> None:
    """Make all text of a figure drawable: its font warns of what it lacks, and a long line would leave no axes."""
    with styled():
        for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
            told = [tick.get_text() for tick in axis.get_ticklabels()]  # made anew from the axis whenever it is drawn
            if told != (plain := [drawable(text) for text in told]):
                axis.set_ticks(axis.get_ticklocs(), plain)
        for text in figure.findobj(Text):
            if text.get_text() != (plain := drawable(text.get_text())):
                text.set_text(plain)


def drawable(text: str) -> str:
    """`text` with every character that is invisible or not in the font as its code, and no line too long."""
    known = _characters()
    spelled = "".join(c if c == "\n" or ord(c) in known else escape(c) for c in visible(text[:LONGEST_PARAGRAPH]))
    return "\n".join(shortened(line, LONGEST_LINE) for line in spelled.split("\n")[:MOST_LINES])


@lru_cache(maxsize=1)
def _characters() -> frozenset[int]:
    """The codes of all characters that the figures' font has."""
    return frozenset(get_font(findfont(FontProperties(family=RC["font.sans-serif"]))).get_charmap())


def _settle(figure: Figure) -> None:
    """Lay out once and round: the solver's last bits differ from call to call, and with them the SVG's ids."""
    with styled():
        figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        axes.set_position([round(number, 4) for number in axes.get_position().bounds])


def _with_palette(png: bytes) -> bytes:
    """The same picture with PNG_COLOURS colours and no metadata but its size on paper."""
    from PIL import Image

    buffer = io.BytesIO()
    picture = Image.open(io.BytesIO(png)).convert("RGB").quantize(PNG_COLOURS, dither=Image.Dither.NONE)
    picture.save(buffer, "png", optimize=True, dpi=(DOTS_PER_INCH, DOTS_PER_INCH))
    return buffer.getvalue()


def _rendered(figure: Figure, kind: str, **options: object) -> bytes:
    """`figure` as the bytes of a file."""
    buffer = io.BytesIO()
    with styled():  # some text is made only while saving
        figure.savefig(buffer, format=kind, **options)
    return buffer.getvalue()
