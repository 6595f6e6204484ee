"""Draw pictures from logs alone.

    python results/plots.py out/demo      every run in the folder, into out/demo/demo.png

Color never stands alone: lines also differ in dash and marker, and each is named where it ends.
"""

import argparse
import json
import sys
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).parents[1]))

from prepare_data import run_script  # noqa: E402

WIDTH = 9  # inches; a README shows a picture about as wide as this
DPI = 160
GRAY = "#555555"
PANELS = {"right": "questions answered right", "val_loss": "loss on held-out target text, nats"}


class Style(NamedTuple):
    label: str
    color: str
    dash: str
    marker: str


# The colors of Okabe and Ito, which people with any kind of color vision can tell apart.
STYLES = {
    "ref": Style("reference:\nclean text alone", "#0072B2", "dotted", ""),
    "clm": Style("CLM:\nall tokens", GRAY, "dashed", "s"),
    "slm": Style("SLM:\nselected tokens", "#D55E00", "solid", "o"),
    "clm-mixed": Style("CLM:\nclean text mixed in", "#009E73", "dashdot", "^"),
}
# For runs with other names, which are also their labels.
SPARE = [
    ("#CC79A7", "dashed", "D"),
    ("#B8860B", "dashdot", "v"),
    ("#56B4E9", "dotted", "P"),
    ("#000000", "solid", "X"),
]


def read_runs(folder):
    """The logs in a folder, {run: [header, evaluation, ...]}.

    A run without an evaluation is left out. Exits if there is none, or if a log is damaged.
    """
    runs = {}
    for path in sorted(Path(folder).glob("*.jsonl")):
        try:
            records = [json.loads(line) for line in path.read_text().splitlines()]
        except ValueError:
            sys.exit(f"{path} is damaged; the command of this run writes it again")
        if len(records) > 1:
            runs[path.stem] = records
    if not runs:
        sys.exit(f"{folder} has no run with an evaluation; python rho.py --out {folder}")
    return runs


# ==== the frame that all pictures share ===========================================================


def new_figure(rows, columns, height):
    """(figure, axes (rows, columns)), `height` in inches."""
    # Imported here: tokens_page.py reads logs with this file, and draws nothing.
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        sys.exit("pictures need matplotlib: pip install matplotlib")

    matplotlib.rcParams["font.size"] = 9
    fig = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#e8e8e8", lw=0.6)
        ax.set_axisbelow(True)
    return fig, axes


def draw_line(ax, x, y, style):
    """A line with its markers; returns where it ends, for label_ends: (x, y, style)."""
    _, color, dash, marker = style
    ax.plot(x, y, color=color, ls=dash, lw=1.6, marker=marker, ms=4, label=style.label)
    return x[-1], y[-1], style


def label_ends(ax, ends):
    """Write each line's label to the right of the axes, and join it to the line's end.

    Called last: where the labels stand depends on the limits of the axes.
    """
    ax.set_ylim(ax.get_ylim())  # they stay as they are now
    to_axes = ax.transData + ax.transAxes.inverted()
    points = ax.get_window_extent().height * 72 / ax.figure.dpi
    top = 0.0  # of the label below, as a share of the height of the axes
    # Dotted and gray: the line that it joins to its label has ended.
    joint = {"arrowstyle": "-", "color": GRAY, "lw": 0.8, "ls": ":", "relpos": (0, 0.5)}
    for x, y, style in sorted(ends, key=lambda end: end[1]):
        n_lines = 1 + style.label.count("\n")
        half = 0.5 * (11 * n_lines + 2) / points
        _, height = to_axes.transform((x, y))
        height = max(height, top + half)  # no label covers another
        top = height + half
        ax.annotate(
            style.label,
            xy=(x, y),
            xytext=(1.04, height),
            textcoords=ax.transAxes,
            color=style.color,
            fontsize=8.5,
            va="center",
            arrowprops=joint,
            annotation_clip=False,
        )


# ==== runs against tokens =========================================================================


def draw_runs(ax, runs, key):
    """One quantity of each run against tokens seen; returns the lines' ends."""
    longest = max(records[-1]["tokens"] for records in runs.values()) / 1e6
    spare = cycle(SPARE)
    ends = []
    for run, (header, *evaluations) in runs.items():
        style = STYLES.get(run) or Style(run, *next(spare))
        if key not in evaluations[-1]:
            continue
        tokens = [record["tokens"] / 1e6 for record in evaluations]
        values = [record[key] for record in evaluations]
        if header["flags"]["stage"] == "ref":
            # It reads other text than the rest: only where it ends can be compared.
            tokens = [0, longest]
            values = [values[-1], values[-1]]
        ends.append(draw_line(ax, tokens, values, style))
    ax.set_xlim(0, 1.02 * longest)
    ax.set(xlabel="tokens seen, millions", ylabel=PANELS[key])
    return ends


def runs_picture(runs):
    """Questions answered right, where they were asked, and loss, beside each other."""
    lasts = [records[-1] for records in runs.values()]
    keys = [key for key in PANELS if any(key in last for last in lasts)]
    fig, axes = new_figure(1, len(keys), height=3.9)
    for ax, key in zip(axes.flat, keys, strict=True):
        ends = draw_runs(ax, runs, key)
        if key == "right":
            n_questions = max(last.get("questions", 0) for last in lasts)
            ax.set_ylabel(f"{PANELS[key]}, of {n_questions}")
            ax.set_ylim(bottom=0)
        else:
            # Beside the loss of a model that has hardly begun, all others look alike.
            worst = max(y for _, y, _ in ends)
            ax.set_ylim(top=min(1.9 * worst, ax.get_ylim()[1]))
        label_ends(ax, ends)
    if "ref" in runs:
        note = "Across: where the reference ends. Its tokens are not counted in those of SLM."
        fig.supxlabel(note, fontsize=8, color=GRAY, x=0.01, ha="left")
    return fig


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="folder of runs, as rho.py --out FOLDER writes it")
    folder = Path(parser.parse_args(argv).folder)
    runs_picture(read_runs(folder)).savefig(folder / "demo.png", dpi=DPI)
    print(f"questions and loss against tokens: {folder / 'demo.png'}")


if __name__ == "__main__":
    run_script(main)
