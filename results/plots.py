"""Draw pictures from logs alone.

    python results/plots.py               the published runs of results/logs, into results/*.png
    python results/plots.py out/demo      every run in the folder, into out/demo/demo.png

Color never stands alone: lines also differ in dash and marker, and each is named where it ends.
"""

import argparse
import json
import sys
from itertools import cycle, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))

from prepare_data import run_script  # noqa: E402
from rho import select_tokens  # noqa: E402

LOGS = HERE / "logs"
SEEDS = [1, 2, 3, 4, 5]
MAIN = ["ref", "clm", "slm", "clm-mixed", "started"]
WIDTH = 9  # inches; a README shows a picture about as wide as this
DPI = 160
GRAY = "#555555"
PANELS = {"right": "questions answered right, %", "val_loss": "loss on held-out target text, nats"}


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
    "started": Style("SLM, started\nfrom the reference", "#CC79A7", (0, (5, 1)), "D"),
}
# For runs with other names, which are also their labels.
SPARE = [
    ("#B8860B", "dashdot", "v"),
    ("#56B4E9", "dotted", "P"),
    ("#000000", "solid", "X"),
    ("#7B61C9", "dashed", "*"),
]


def read_log(path):
    """A run: [header, evaluation, ...]."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError):
        sys.exit(f"{path} is missing or damaged; the command of this run writes it again")


def read_runs(folder):
    """The logs in a folder, {run: [header, evaluation, ...]}.

    A run without an evaluation is left out. Exits if there is none, or if a log is damaged.
    """
    runs = {}
    for path in sorted(Path(folder).glob("*.jsonl")):
        records = read_log(path)
        if len(records) > 1:
            runs[path.stem] = records
    if not runs:
        sys.exit(f"{folder} has no run with an evaluation; python rho.py --out {folder}")
    return runs


def value(record, key):
    """What a picture shows of an evaluation: answers in %, and losses as they are."""
    return 100 * record[key] / record["questions"] if key == "right" else record[key]


# ==== the frame that all pictures share ===========================================================


def new_figure(rows, columns, height):
    """(figure, axes (rows, columns)), `height` in inches."""
    # Imported here: tokens_page.py reads logs with this file, and draws nothing.
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        sys.exit("pictures need matplotlib: pip install matplotlib")

    # Hinting would make letters wider than tokens_picture counts on.
    matplotlib.rcParams.update({"font.size": 9, "text.hinting": "none"})
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


def write_note(fig, note):
    """Under the picture: what a reader has to know."""
    fig.supxlabel(note, fontsize=8, color=GRAY, x=0.01, ha="left")


def label_ends(ax, ends):
    """Write each line's label to the right of the axes, and join it to the line's end.

    Called last: where the labels stand depends on the limits of the axes.
    """
    ax.set_ylim(ax.get_ylim())  # they stay as they are now
    to_axes = ax.transData + ax.transAxes.inverted()
    points = ax.get_window_extent().height * 72 / ax.figure.dpi

    ends = sorted(ends, key=lambda end: end[1])
    # What each label takes of the height of the axes.
    shares = [(13 + 11 * style.label.count("\n")) / points for _, _, style in ends]
    top = 0.0  # of the label below
    # Dotted and gray: the line that it joins to its label has ended.
    joint = {"arrowstyle": "-", "color": GRAY, "lw": 0.8, "ls": ":", "relpos": (0, 0.5)}
    for i, (x, y, style) in enumerate(ends):
        _, height = to_axes.transform((x, y))
        bottom = max(height - shares[i] / 2, top)  # no label covers another
        bottom = min(bottom, 1 - sum(shares[i:]))  # and those above it have room
        top = bottom + shares[i]
        place = (1.04, bottom + shares[i] / 2)
        how = {"color": style.color, "fontsize": 8.5, "va": "center", "annotation_clip": False}
        ax.annotate(style.label, (x, y), place, textcoords=ax.transAxes, arrowprops=joint, **how)


# ==== runs against tokens =========================================================================


def draw_runs(ax, runs, key):
    """One quantity of each run against tokens in all; returns the lines' ends."""
    longest = max(millions(seeds[0])[-1] for seeds in runs.values())
    spare = cycle(SPARE)
    ends = []
    for run, seeds in runs.items():
        style = STYLES.get(run) or Style(run, *next(spare))
        first = seeds[0]
        if key not in first[-1]:
            continue
        x = millions(first)
        y = [[value(record, key) for record in records[1:]] for records in seeds]
        y = np.array(y)  # (seeds, evaluations)
        if first[0]["flags"]["stage"] == "ref":
            # It reads other text than the rest: only where it ends can be compared.
            x, y = [0, longest], y[:, [-1, -1]]
        mean = y.mean(0)
        if len(seeds) > 1:
            spread = y.std(0, ddof=1)
            ax.fill_between(x, mean - spread, mean + spread, color=style.color, alpha=0.15, lw=0)
        ends.append(draw_line(ax, x, mean, style))
        if run == "clm":
            ax.hlines(mean[-1], 0, longest, color=GRAY, lw=0.7)
    ax.set(xlim=(0, 1.02 * longest), xlabel="tokens in all, millions", ylabel=PANELS[key])
    return ends


def millions(records):
    """Tokens at each evaluation, with those that made what the run started with."""
    header, *evaluations = records
    return [(header["tokens_before"] + record["tokens"]) / 1e6 for record in evaluations]


def runs_picture(runs):
    """Questions answered right, where they were asked, and loss, beside each other.

    runs: {run: [its records with one seed, with the next, ...]}
    """
    keys = [key for key in PANELS if any(key in seeds[0][-1] for seeds in runs.values())]
    fig, axes = new_figure(1, len(keys), height=3.9)
    for ax, key in zip(axes.flat, keys, strict=True):
        ends = draw_runs(ax, runs, key)
        if key == "right":
            ax.set_ylim(bottom=0)
        else:
            # Beside the loss of a model that has hardly begun, all others look alike.
            worst = max(y for _, y, _ in ends)
            ax.set_ylim(top=min(1.9 * worst, ax.get_ylim()[1]))
        label_ends(ax, ends)
    note = "Tokens in all: SLM starts where its reference ends. "
    note += "Across: the reference (dotted) and CLM (thin) at their ends."
    n_seeds = max(len(seeds) for seeds in runs.values())
    if n_seeds > 1:
        note += f"\nLines and bands: mean and one standard deviation over {n_seeds} seeds."
    write_note(fig, note)
    return fig


# ==== single tokens ===============================================================================
# `tokens` is what tokens_page.py --save writes: for each of N held-out tokens of the corpus its
# text, its kind and its losses. clm and slm are (evaluations, N), the rest (N,).

# How each kind is drawn: color, dash, marker.
KINDS = {
    "target": ("#D55E00", "solid", "o"),
    "wrong": ("#0072B2", "dashed", "s"),
    "article": ("#B8860B", "dashdot", "v"),
    "noise": (GRAY, "dotted", "X"),
    "furniture": ("#009E73", (0, (5, 1)), "^"),
    "chatter": ("#CC79A7", (0, (3, 1, 1, 1, 1, 1)), "D"),
}


def select(tokens, run, at, flags):
    """The excess loss (N,) at one evaluation, and which tokens SLM would train on, bool (N,)."""
    excess = tokens[run][at] - tokens["ref"].astype(np.float32)
    mask = select_tokens(torch.from_numpy(excess), flags["ratio"], flags["threshold"])
    return excess, mask.numpy()


def selection_picture(tokens, flags):
    """What SLM keeps, and what becomes of the loss on it (the paper's figure 6)."""
    fig, axes = new_figure(1, 2, height=3.9)
    left, right = axes.flat
    seen = tokens["tokens"] / 1e6
    kept = np.stack([select(tokens, "slm", at, flags)[1] for at in range(len(seen))])
    ends = []
    for kind, look in KINDS.items():
        share = 100 * kept[:, tokens["kinds"] == kind].mean(1)
        ends.append(draw_line(left, seen, share, Style(kind, *look)))
    left.set(title="what SLM keeps", ylabel="kept of this kind of token, %")
    label_ends(left, ends)

    # The same for both, and chosen when neither has learned much.
    _, chosen = select(tokens, "clm", 0, flags)
    ends = []
    for run in ("clm", "slm"):
        for of, dash, name in ((chosen, "solid", "selected"), (~chosen, "dotted", "the others")):
            loss = tokens[run][:, of].mean(1, dtype=np.float32)
            style = STYLES[run]._replace(dash=dash, label=f"{run.upper()}:\n{name}")
            ends.append(draw_line(right, seen, loss, style))
    right.set(title="loss on two halves of the corpus", ylabel="loss, nats", yscale="log")
    right.set_yticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
    right.minorticks_off()
    label_ends(right, ends)
    for ax in axes.flat:
        ax.set(xlim=(0, 1.02 * seen[-1]), xlabel="tokens seen by the student, millions")
    note = "Held-out text, seed 1. wrong: an answer from its first wrong number on. "
    note += "furniture: menus, dates, views.\nOn the right, selected: what has the most excess for "
    note += "CLM at its first evaluation, the same tokens for both."
    write_note(fig, note)
    return fig


COLUMNS = 84  # letters on a line of text
MARGIN = 18  # letters beside it, for the kinds
TOP = 4  # lines above it


def place_tokens(words):
    """(line, column) of each token. Lines break before a space, and may hang over a little."""
    line, column, places = TOP, 0, []
    for word in words:
        if word.startswith(" ") and column + len(word.rstrip()) > COLUMNS:
            line += 1
            column = -1  # its space stands in the margin
        places.append((line, column))
        column += len(word)
        if "\n" in word:
            line += 1
            column = 0
    return places


def draw_token(ax, place, word, excess, kept):
    """One token, in the signs that the legend explains."""
    line, column = place
    color = "#E67310" if excess > 0 else "#2680D9"
    ax.barh(line, len(word), 0.84, column, color=color, alpha=0.7 * min(1, abs(excess) / 3))
    # A space before a word is not underlined; one that is a token is.
    letters = word.replace("\n", "\u21b5").lstrip() or word
    stop = column + len(word)
    start = stop - len(letters)
    if kept:
        ax.hlines(line + 0.38, start + 0.1, stop - 0.1, color="#222222", lw=1.2)
    weight = "bold" if kept else "normal"
    write(ax, line, start, letters, weight=weight, style="italic" if excess < 0 else "normal")


def write(ax, line, column, text, color="#222222", **how):
    size = WIDTH * 72 / (COLUMNS + MARGIN) / 0.602  # a letter is 0.602 of its size wide
    how |= {"family": "DejaVu Sans Mono", "size": size, "va": "center_baseline"}
    ax.text(column, line, text, color=color, parse_math=False, **how)


def tokens_picture(tokens, flags):
    """A held-out page at SLM's first evaluation, when its choices tell most."""
    kinds = tokens["kinds"]
    for start, stop in pairwise(np.flatnonzero(tokens["starts"])):
        page = slice(start + 1, stop)
        if set(kinds[page]) == set(kinds):
            break  # the first with every kind
    excess, kept = select(tokens, "slm", 0, flags)
    words = tokens["text"][page]
    places = place_tokens(words)

    n_lines = places[-1][0] + 1
    fig, axes = new_figure(1, 1, height=0.23 * n_lines)
    fig.set_layout_engine("none")  # the axes are the whole picture: letters by lines
    ax = axes[0, 0]
    ax.set(position=(0, 0, 1, 1), xlim=(-1.5, COLUMNS + MARGIN - 1.5), ylim=(n_lines - 0.4, -0.6))
    ax.axis("off")
    seen = tokens["tokens"][0] / 1e6
    title = f"What SLM keeps after {seen:.1f} million tokens: a page of the held-out corpus"
    write(ax, 0.4, 0, title, weight="bold")
    draw_token(ax, (2, 0), "kept: trained on", 0, True)
    draw_token(ax, (2, 23), "the student's loss is higher", 3, False)
    draw_token(ax, (2, 58), "the reference's loss is higher", -3, False)
    for token in zip(places, words, excess[page], kept[page], strict=True):
        draw_token(ax, *token)
    lines, _ = np.transpose(places)
    for line in set(lines):
        found = dict.fromkeys(kinds[page][lines == line])  # each once, in their order
        write(ax, line, COLUMNS + 2, ", ".join(found), color=GRAY)
    return fig


# ==== sweeps ======================================================================================

# {share of tokens kept, %: run}, and {what is on the axis: how the names of its runs begin}
KEPT = {20: "keep-0.2", 50: "slm", 80: "keep-0.8", 100: "clm"}
WRONG = {0: "w0-", 75: "", 90: "w0.9-"}
DIRT = {0: "d0-", 1: "", 6: "d6-"}
# {reference: what is unlike the usual one}
REFERENCES = {
    "ref-short": "a third of the steps",
    "ref": "the usual one",
    "ref-3x": "3 times the text",
}


def sweeps_picture(folder):
    """SLM and CLM where one thing at a time changes."""

    def right(run):
        return value(read_log(Path(folder, f"{run}.jsonl"))[-1], "right")

    references = sorted((right(ref), ref) for ref in REFERENCES)
    # Each panel: (what is on the axis, SLM, CLM).
    panels = {
        "tokens kept, %": [(share, run, "clm") for share, run in KEPT.items()],
        "wrong answers, %": [(x, f"{name}slm", f"{name}clm") for x, name in WRONG.items()],
        "pieces of dirt a problem": [(x, f"{name}slm", f"{name}clm") for x, name in DIRT.items()],
        "right answers of SLM's reference, %": [
            (x, "slm" if ref == "ref" else f"slm-{ref}", "clm") for x, ref in references
        ],
    }
    fig, axes = new_figure(2, 2, height=6)
    for ax, (name, points) in zip(axes.flat, panels.items(), strict=True):
        x, *arms = zip(*points, strict=True)
        ends = []
        for arm, runs in zip(("slm", "clm"), arms, strict=True):
            style = STYLES[arm]._replace(label=arm.upper())
            ends.append(draw_line(ax, x, [right(run) for run in runs], style))
        ax.set(xlabel=name, ylabel=PANELS["right"], ylim=(0, 100))
        label_ends(ax, ends)
    names = ", ".join(REFERENCES[ref] for _, ref in references)
    note = "Seed 1 alone: small differences may be chance. Where CLM is level, it is one run.\n"
    write_note(fig, f"{note}References, from left to right: {names}.")
    return fig


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", help="folder of runs, as rho.py --out writes it")
    folder = parser.parse_args(argv).folder
    if folder:
        runs = {run: [records] for run, records in read_runs(folder).items()}
        path = Path(folder, "demo.png")
        runs_picture(runs).savefig(path, dpi=DPI)
        print(f"questions and loss against tokens: {path}")
        return
    runs = {run: [read_log(LOGS / f"seed{seed}/{run}.jsonl") for seed in SEEDS] for run in MAIN}
    flags = runs["slm"][0][0]["flags"]
    tokens = dict(np.load(LOGS / "tokens.npz"))
    pictures = {
        "main": runs_picture(runs),
        "tokens": tokens_picture(tokens, flags),
        "selection": selection_picture(tokens, flags),
        "sweeps": sweeps_picture(LOGS / "seed1"),
    }
    for name, fig in pictures.items():
        fig.savefig(HERE / f"{name}.png", dpi=DPI)


if __name__ == "__main__":
    run_script(main)
