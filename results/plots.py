"""Draw the pictures, from logs alone.

    python results/plots.py out/demo      the runs of one folder: out/demo/demo.png
    python results/plots.py --publish     the published runs: results/*.png

Runs of another length than CLM's, or that go on from another model, are marked as such.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import token_plots  # noqa: E402
import tokens_page  # noqa: E402
from drawing import SEEN, End, finish, label_ends, new_figure  # noqa: E402
from experiments import (  # noqa: E402
    CLM_RUN,
    DIRT,
    MAIN_RUNS,
    REFERENCES,
    RUNS,
    SEEDS,
    SLM_RUN,
    TITLES,
    Style,
    dirt_runs,
)
from logs import deviation, published, read_log, read_losses, read_runs, value  # noqa: E402

from prepare_data import InputError  # noqa: E402
from rho import why_not_comparable  # noqa: E402

# ---- runs against tokens -------------------------------------------------------------------------

# For runs without a style of their own: color, dash and marker.
SPARE = [
    ("#CC79A7", (0, (6, 2)), "D"),
    ("#56B4E9", (0, (3, 1)), "P"),
    ("#8C6D31", "dashdot", "v"),
    ("#000000", (0, (4, 1, 1, 1)), "X"),
    ("#7B61C9", "dotted", "^"),
    ("#0072B2", "dashed", "s"),
]


def is_reference(run):
    return run.split("-")[0] == "ref"


def style_of(run, runs):
    """The style of a run. One that experiments.py does not name is called by its own name."""
    if run in RUNS:
        return RUNS[run]
    others = [name for name in runs if name not in RUNS]
    color, line, _ = SPARE[others.index(run) % len(SPARE)]
    return Style(run, color, line)


def marker_of(run, runs):
    """A run that experiments.py does not name has markers too: colors alone do not reach far."""
    if run in RUNS:
        return None
    others = [name for name in runs if name not in RUNS]
    return SPARE[others.index(run) % len(SPARE)][2]


def run_label(run, runs):
    """The label of a run, with what a reader must know before comparing it with CLM."""
    label = style_of(run, runs).label
    label = label.replace(": ", ":\n").replace(" (", "\n(")
    if "clm" not in runs or is_reference(run):
        return label
    records = runs[run][0]
    clm = runs["clm"][0]
    tokens = records[-1]["tokens"]
    start = records[0]["config"].get("init", "")
    if tokens != clm[-1]["tokens"]:
        label += f"\n({tokens / 1e6:.2g} M tokens)"
    elif start != clm[0]["config"].get("init", ""):
        label += f"\n(from {Path(start).name})"
    elif why_not_comparable(records, clm):
        label += " *"
    return label


def over_seeds(seeds, key):
    """(millions of tokens, mean, standard deviation) at each evaluation of one run's seeds."""
    tokens, means, deviations = [], [], []
    evaluations = [records[1:] for records in seeds]
    for same_step in zip(*evaluations, strict=True):
        values = [value(record, key) for record in same_step]
        tokens.append(same_step[0]["tokens"] / 1e6)
        means.append(statistics.mean(values))
        deviations.append(deviation(values))
    return np.array(tokens), np.array(means), np.array(deviations)


def draw_runs(ax, runs, key):
    """Lines and bands of one quantity against tokens; returns the lines' ends.

    runs: {run: [records of each seed]}.
    """
    ends = []
    longest = max(seeds[0][-1]["tokens"] for seeds in runs.values()) / 1e6
    for run, seeds in runs.items():
        if key not in seeds[0][-1]:
            continue
        _, color, line = style_of(run, runs)
        label = run_label(run, runs)
        tokens, means, deviations = over_seeds(seeds, key)
        if is_reference(run) and len(runs) > 1:
            # It reads other text than the rest: only where it ends can be compared.
            ax.axhline(means[-1], color=color, ls=line, lw=1.4, label=run)
            ends.append(End(longest, means[-1], label, color))
            continue
        marker = marker_of(run, runs)
        ax.plot(tokens, means, color=color, ls=line, lw=1.8, marker=marker, ms=4, label=run)
        low = means - deviations
        high = means + deviations
        ax.fill_between(tokens, low, high, color=color, alpha=0.15, lw=0)
        ends.append(End(tokens[-1], means[-1], label, color))
        if run == "clm":
            ax.axhline(means[-1], color=color, lw=0.8, alpha=0.6)
    ax.set_xlim(0, max(longest, round(longest, 1)))
    ax.set(xlabel=SEEN, ylabel=TITLES[key])
    return ends


def limit_losses(ax, runs, key, ends):
    """Cut off the first evaluations: beside an untrained model's loss all others look alike."""
    firsts = []
    for seeds in runs.values():
        first = seeds[0][1]
        if key in first:
            firsts.append(value(first, key))
    last = max(end.y for end in ends)
    ax.set_ylim(top=min(max(firsts), 1.9 * last))


def curves(runs, path):
    """Accuracy, where questions were asked, and held-out loss against tokens seen."""
    lasts = [seeds[0][-1] for seeds in runs.values()]
    keys = [key for key in TITLES if any(key in last for last in lasts)]
    keys = keys[:2]
    fig, axes = new_figure(1, len(keys), 3.9)
    for ax, key in zip(axes[0], keys, strict=True):
        ends = draw_runs(ax, runs, key)
        if key == "right":
            ax.set_ylim(0, max(5, ax.get_ylim()[1]))
        else:
            limit_losses(ax, runs, key, ends)
        label_ends(ax, ends)

    notes = []
    n_seeds = max(len(seeds) for seeds in runs.values())
    if "clm" in runs:
        notes.append("Thin gray line: where CLM ends.")
    if any(is_reference(run) for run in runs):
        notes.append("Across: where the reference ends.")
    if any(end.text.endswith("*") for end in ends):
        notes.append("*: unlike CLM's settings; `python rho.py --stage table` says which.")
    if n_seeds > 1:
        notes.append(f"Bands: one standard deviation over {n_seeds} seeds.")
    finish(fig, path, " ".join(notes))


def all_seeds(names, part="runs"):
    """{run: [records of each seed]} of published runs."""
    return {name: [*published(name, part).values()] for name in names}


# ---- sweeps --------------------------------------------------------------------------------------


def right_answers(run):
    """Final accuracy in percent, of the seeds that a sweep has; the main runs have more."""
    found = published(run)
    return [value(found[seed][-1], "right") for seed in SEEDS if seed in found]


def draw_points(ax, places, runs, arm, marker):
    """Final accuracy of one run after another, mean and standard deviation; returns the end."""
    label, color, line = RUNS[arm]
    means, bars = [], []
    for run in runs:
        values = right_answers(run)
        means.append(statistics.mean(values))
        bars.append(deviation(values))
    ax.errorbar(
        places,
        means,
        bars,
        label=arm,
        color=color,
        ls=line,
        lw=1.6,
        marker=marker,
        ms=4.5,
        elinewidth=1,
        capsize=2.5,
    )
    return End(places[-1], means[-1], label.split(":")[0], color)


def sweep_ratio(ax):
    """How much is kept: by SLM, and at random. At 100 % both are CLM."""
    ends = []
    lines = [
        ("slm", "ratio", [0.2, 0.4, 0.5, 0.6, 0.7, 0.8], "o"),
        ("slm-random", "random", [0.5, 0.7, 0.8], "^"),
    ]
    for arm, name, ratios, marker in lines:
        places = [100 * ratio for ratio in ratios]
        runs = [f"{name}-{ratio}" for ratio in ratios]
        places.append(100)
        runs.append(CLM_RUN)
        ends.append(draw_points(ax, places, runs, arm, marker))
    ax.set(title="how much is kept", xlabel="tokens kept, % (100: CLM)")
    return ends


def draw_dirt(ax, places, corpora):
    """CLM's and SLM's accuracy on corpora of DIRT; returns the ends."""
    clm, slm = [], []
    for wrong, dirty in corpora:
        _, clm_run, slm_run = dirt_runs(wrong, dirty)
        clm.append(clm_run)
        slm.append(slm_run)
    return [draw_points(ax, places, clm, "clm", "s"), draw_points(ax, places, slm, "slm", "o")]


def sweep_wrong(ax):
    corpora = [(wrong, dirty) for wrong, dirty in DIRT if dirty == 1]
    places = [100 * wrong for wrong, _ in corpora]
    ax.set(title="how many answers are wrong", xlabel="wrong answers, % (1 piece of dirt each)")
    return draw_dirt(ax, places, corpora)


def sweep_dirt(ax):
    corpora = [(wrong, dirty) for wrong, dirty in DIRT if wrong == 0.75]
    shares = json.loads((HERE / "runs" / "shares.json").read_text())
    places = []
    for wrong, dirty in corpora:
        data, _, _ = dirt_runs(wrong, dirty)
        places.append(100 - 100 * shares[data])
    ax.set(title="how much dirt there is", xlabel="not target text, % of tokens (75 % wrong)")
    return draw_dirt(ax, places, corpora)


def sweep_reference(ax):
    """The student against its reference; CLM, which has none, is a line across."""
    pairs = [("ref", SLM_RUN)]
    pairs += [(f"ref-{name}", f"slm-ref-{name}") for name in REFERENCES]
    accuracy = {slm: statistics.mean(right_answers(ref)) for ref, slm in pairs}
    students = sorted(accuracy, key=accuracy.get)
    places = [accuracy[slm] for slm in students]
    slm = draw_points(ax, places, students, "slm", "o")
    clm = statistics.mean(right_answers(CLM_RUN))
    _, color, line = RUNS["clm"]
    ax.axhline(clm, color=color, ls=line, lw=1.6, label="clm")
    ax.set(title="how good the reference is", xlabel="questions that the reference has right, %")
    return [slm, End(places[-1], clm, "CLM", color)]


def sweeps(path):
    """Where selection pays: by ratio, wrong answers, dirt and reference."""
    fig, axes = new_figure(2, 2, 6, sharey=True)
    panels = [sweep_ratio, sweep_wrong, sweep_dirt, sweep_reference]
    ends = [panel(ax) for panel, ax in zip(panels, axes.flat, strict=True)]
    for ax, mine in zip(axes.flat, ends, strict=True):
        ax.set_ylim(bottom=0)
        ax.set_ylabel(TITLES["right"])
        ax.tick_params(labelleft=True)
        label_ends(ax, mine)
    note = "Points and bars: mean and standard deviation over 3 seeds, 0.9 M tokens."
    finish(fig, path, note)


# ---- growth --------------------------------------------------------------------------------------

GROWTH_UNITS = {"tokens_per_s": "tokens per second", "gib": "peak memory, GiB"}
GROWTH_SIZES = {
    "width": "width, channels",
    "context": "context, tokens",
    "vocabulary": "vocabulary, tokens",
    "corpus": "corpus, tokens",
}


def plain_number(number, _):
    """20,000 rather than 2 x 10^4: what matplotlib asks of a formatter of ticks."""
    return f"{number:,g}"


def growth(path):
    """Tokens per second and peak memory of --stage slm, as one size at a time grows."""
    from matplotlib.ticker import EngFormatter, LogLocator

    records = read_log(HERE / "growth.jsonl")
    short = EngFormatter(places=0, sep="")  # 8k, 1M
    fig, axes = new_figure(2, len(GROWTH_SIZES), 4.8, sharex="col", sharey="row")
    for column, size in zip(axes.T, GROWTH_SIZES, strict=True):
        mine = [record for record in records if record["axis"] == size]
        places = [record[size] for record in mine]
        for ax, key in zip(column, GROWTH_UNITS, strict=True):
            heights = [record[key] for record in mine]
            ax.plot(places, heights, "o-", color="#0072B2", label=key)
            ax.set(xscale="log", yscale="log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(plain_number)
            ax.set_xticks(places, [short(place) for place in places])
            ax.minorticks_off()
            ax.margins(y=0.15)
        column[1].set_xlabel(GROWTH_SIZES[size])
    for ax, unit in zip(axes[:, 0], GROWTH_UNITS.values(), strict=True):
        ax.set_ylabel(unit)
    finish(fig, path, "All axes are logarithmic. Two cores; 4 layers; the other sizes stay small.")


# ---- main ----------------------------------------------------------------------------------------


def publish():
    """All pictures of the published runs, into results/."""
    curves(all_seeds(MAIN_RUNS), HERE / "main.png")
    real = ["ref", "clm", "slm-random", "slm", "slm-30"]  # those with three seeds
    curves(all_seeds(real, "real"), HERE / "real.png")
    sweeps(HERE / "sweeps.png")
    growth(HERE / "growth.png")
    seed1 = HERE / "runs" / "seed1"
    runs = read_runs(seed1)
    losses = read_losses(seed1)
    ratio = runs["slm"][0]["config"]["ratio"]
    token_plots.selection(losses, ratio, HERE / "selection.png")
    token_plots.loss_and_answers(losses, runs, HERE / "loss_and_answers.png")
    token_plots.dynamics_picture(losses, HERE / "dynamics.png")
    tokens_page.picture(losses, ratio, HERE / "tokens.png")


def draw_folder(folder):
    """FOLDER/demo.png, of every run in it."""
    runs = {run: [records] for run, records in read_runs(folder).items()}
    if not runs:
        raise InputError(f"{folder}: no log of a run in it. Run: python rho.py --out {folder}")
    path = Path(folder) / "demo.png"
    curves(runs, path)
    print(f"picture: {path}")


def main(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="plots.py", description=__doc__, formatter_class=form)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("folder", nargs="?", help="draw every run of this folder, into it")
    help_publish = "draw the published runs into results/"
    what.add_argument("--publish", action="store_true", help=help_publish)
    args = parser.parse_args(argv)
    try:
        if args.publish:
            publish()
        else:
            draw_folder(args.folder)
    except ImportError:
        parser.exit(2, "plots.py: pictures need matplotlib. Run: pip install matplotlib\n")
    except InputError as error:
        parser.exit(2, f"plots.py: {error}\n")


if __name__ == "__main__":
    main()
