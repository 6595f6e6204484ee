"""The frame that all pictures share: size, axes, colors, and labels at the ends of the lines.

Color never stands alone: lines also differ in dash or marker, and each is named where it ends.
"""

from typing import NamedTuple

SEEN = "tokens seen, millions"
INK = "#222222"
SOFT = "#666666"
WIDTH = 9  # inches; a README shows a picture about as wide as this
DPI = 160
LABEL_SIZE = 8.5

# For lines that are not arms: the colors of Okabe and Ito, which people with any kind of color
# vision can tell apart; each with a dash and a marker of its own.
LINES = [
    ("#D55E00", "solid", "o"),
    ("#0072B2", "dashed", "s"),
    ("#009E73", "dashdot", "^"),
    ("#CC79A7", (0, (6, 2)), "D"),
    ("#E69F00", (0, (4, 1, 1, 1)), "v"),
    ("#56B4E9", (0, (3, 1)), "P"),
    ("#555555", "dotted", "X"),
]


class End(NamedTuple):
    """The end of a line, in the units of its axes, and what is written beside it."""

    x: float
    y: float
    text: str
    color: str


def new_figure(rows, columns, height, **how):
    """(figure, axes (rows, columns)) of a given height in inches."""
    # Imported here, so that results/ can be read from, and tested, without matplotlib.
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.edgecolor": INK,
    }
    matplotlib.rcParams.update(style)
    fig = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False, **how)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#e8e8e8", lw=0.6)
        ax.set_axisbelow(True)
    return fig, axes


def finish(fig, path, note=""):
    """Write the note below the axes, then the file."""
    if note:
        fig.supxlabel(note, fontsize=8, color=SOFT, x=0.01, ha="left")
    fig.savefig(path, dpi=DPI)


def spread_out(places, heights):
    """Sorted places of labels, moved apart until none covers another and none ends below 0."""
    places = list(places)
    for _ in range(500):
        places[0] = max(places[0], heights[0] / 2)
        for i in range(1, len(places)):
            apart = (heights[i - 1] + heights[i]) / 2
            overlap = apart - (places[i] - places[i - 1])
            if overlap > 0:
                places[i - 1] -= overlap / 2
                places[i] += overlap / 2
    return places


def label_ends(ax, ends):
    """Write each line's label to the right of its end and join the two.

    Called last: where the labels stand depends on the limits of the axes.
    """
    ax.set_ylim(*ax.get_ylim())  # as they are now, whatever is drawn later
    ends = sorted(ends, key=lambda end: end.y)

    # In shares of the axes' height, for which a logarithmic axis is no special case.
    to_axes = ax.transData + ax.transAxes.inverted()
    places = [to_axes.transform((end.x, end.y))[1] for end in ends]
    axes_points = ax.get_window_extent().height * 72 / ax.figure.dpi
    line_height = 1.2 * LABEL_SIZE / axes_points
    heights = [(end.text.count("\n") + 1.15) * line_height for end in ends]

    for end, place in zip(ends, spread_out(places, heights), strict=True):
        joint = {"arrowstyle": "-", "color": end.color, "lw": 0.6, "relpos": (0, 0.5)}
        ax.annotate(
            end.text,
            xy=(end.x, end.y),
            xytext=(1.04, place),
            textcoords=ax.transAxes,
            color=end.color,
            fontsize=LABEL_SIZE,
            va="center",
            arrowprops=joint,
            annotation_clip=False,
        )


def draw_lines(ax, seen, lines):
    """Lines against millions of tokens seen, {label: values}; returns their ends."""
    ends = []
    for (label, values), (color, dash, marker) in zip(lines.items(), LINES, strict=False):
        ax.plot(
            seen,
            values,
            label=label,
            color=color,
            ls=dash,
            lw=1.5,
            marker=marker,
            markersize=3.5,
            markevery=3,
        )
        ends.append(End(seen[-1], values[-1], label, color))
    ax.set_xlim(0, round(seen[-1], 1))
    return ends
