"""Pictures of single tokens' losses: which tokens are kept, and what becomes of their loss.

results/plots.py --publish calls these. `losses` is what logs.read_losses gives: for each run
(evaluations, N) nats of the same N tokens of held-out corpus text.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from drawing import (  # noqa: E402
    INK,
    LINES,
    SEEN,
    End,
    draw_lines,
    finish,
    label_ends,
    new_figure,
)
from experiments import RUNS, TITLES  # noqa: E402
from logs import CLASSES, KINDS, SLIP, dynamics, kept, value  # noqa: E402

ARMS = ["clm", "slm"]
MARKERS = {"clm": "s", "slm": "o"}


# ---- which tokens are kept -----------------------------------------------------------------------


def kept_by_kind(ax, losses, ratio):
    """Share kept of each kind of token that the generator wrote."""
    is_kept = kept(losses, "slm", ratio)  # (evaluations, N)
    shares = {}
    for kind, name in KINDS.items():
        label = name.replace(": ", ":\n")
        of_kind = losses["kinds"] == kind
        shares[label] = 100 * is_kept[:, of_kind].mean(1)
    ends = draw_lines(ax, losses["slm seen"] / 1e6, shares)
    ax.set(title="what SLM keeps", xlabel=SEEN, ylabel="kept of this kind of token, %")
    return ends


def excess_by_kind(ax, losses):
    """Mean excess loss of target text and of wrong numbers, in both arms."""
    sets = [
        (0, "target text", "solid"),
        (SLIP, "wrong numbers", "dashed"),
    ]
    ends = []
    for run in ARMS:
        excess = losses[run].astype(float) - losses["ref"][-1]  # (evaluations, N)
        # The first evaluation, of a model that knows next to nothing, would set the scale.
        excess = excess[1:]
        seen = losses[f"{run} seen"][1:] / 1e6
        color = RUNS[run].color
        for kind, name, dash in sets:
            of_kind = losses["kinds"] == kind
            means = excess[:, of_kind].mean(1)
            label = f"{run.upper()}:\n{name}"
            ax.plot(seen, means, color=color, ls=dash, label=label)
            ends.append(End(seen[-1], means[-1], label, color))
    ax.axhline(0, color=INK, lw=0.6)
    ax.set_xlim(0, round(seen[-1], 1))
    ax.set(title="excess loss over the reference", xlabel=SEEN, ylabel="mean excess, nats")
    return ends


def selection(losses, ratio, path):
    """What SLM keeps, and the excess loss that it goes by."""
    fig, axes = new_figure(1, 2, 3.8)
    left, right = axes[0]
    label_ends(left, kept_by_kind(left, losses, ratio))
    label_ends(right, excess_by_kind(right, losses))
    note = "Held-out corpus text, seed 1. On the right, solid: target text; dashed: wrong numbers."
    finish(fig, path, note)


# ---- loss and answers ----------------------------------------------------------------------------


def loss_by_set(ax, losses, is_kept):
    """Loss on the tokens that SLM keeps at the end, on the others and on all (paper, Fig. 6)."""
    sets = [
        ("kept", is_kept, "solid"),
        ("left out", ~is_kept, "dashed"),
        ("all", np.ones_like(is_kept), "dotted"),
    ]
    ends = []
    for run in ARMS:
        seen = losses[f"{run} seen"] / 1e6
        color = RUNS[run].color
        for name, tokens, dash in sets:
            means = losses[run][:, tokens].mean(1, dtype=float)
            label = f"{run.upper()}: {name}"
            ax.plot(seen, means, color=color, ls=dash, label=label)
            ends.append(End(seen[-1], means[-1], label, color))
    ax.set_yscale("log")
    ax.set_yticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
    ax.minorticks_off()
    ax.set_xlim(0, round(seen[-1], 1))
    ax.set(title="loss on the tokens kept and left out", xlabel=SEEN, ylabel="loss, nats")
    return ends


def perplexity_of_kept(ax, losses, is_kept):
    """SLM's perplexity, all through training, on what it kept at four times (Fig. 8)."""
    seen = losses["slm seen"] / 1e6
    four_times = np.linspace(1, len(seen) - 1, 4).astype(int)
    lines = {}
    for at in four_times:
        tokens = is_kept[at]
        means = losses["slm"][1:, tokens].mean(1, dtype=float)
        lines[f"kept at {seen[at]:.1f} M"] = np.exp(means)
    ends = draw_lines(ax, seen[1:], lines)
    ax.set(title="perplexity of what SLM kept at four times", xlabel=SEEN, ylabel="perplexity")
    return ends


def answers_against_loss(ax, losses, runs, tokens, name):
    """Each evaluation a point: answers right against the loss on a set of tokens (Fig. 7)."""
    for run in ARMS:
        _, color, dash = RUNS[run]
        # Left out: the first two evaluations, where nothing is learned yet.
        loss = losses[run][2:, tokens].mean(1, dtype=float)
        records = runs[run][3:]  # the first record of a log is its header
        right = [value(record, "right") for record in records]

        log_loss = np.log(loss)
        r = np.corrcoef(log_loss, right)[0, 1]
        label = f"{run.upper()}: r = {r:.2f}".replace("-", "−")
        ax.plot(loss, right, MARKERS[run], ms=4, color=color, label=label)

        slope, start = np.polyfit(log_loss, right, 1)
        line = np.linspace(loss.min(), loss.max(), 50)
        fitted = slope * np.log(line) + start
        ax.plot(line, fitted, color=color, ls=dash, lw=1)
    ax.set_ylim(bottom=0)
    ax.set(title=f"answers against loss on tokens {name}", xlabel=f"loss on tokens {name}, nats")
    ax.set_ylabel(TITLES["right"])
    ax.legend(frameon=False, loc="upper center")


def loss_and_answers(losses, runs, path):
    """Kept and left-out tokens through training: the paper's Figs. 6, 8 and 7."""
    ratio = runs["slm"][0]["config"]["ratio"]
    is_kept = kept(losses, "slm", ratio)
    at_end = is_kept[-1]
    fig, axes = new_figure(2, 2, 6.6)
    by_set, perplexity, left, right = axes.flat
    label_ends(by_set, loss_by_set(by_set, losses, at_end))
    label_ends(perplexity, perplexity_of_kept(perplexity, losses, is_kept))
    answers_against_loss(left, losses, runs, at_end, "kept")
    answers_against_loss(right, losses, runs, ~at_end, "left out")
    note = "Held-out corpus text, seed 1. Top left: kept by SLM at the end (solid), left out"
    note += " (dashed), all (dotted).\nBottom: a point is an evaluation; lines: accuracy fitted"
    note += " to the logarithm of the loss; r: their correlation."
    finish(fig, path, note)


# ---- dynamics: how the loss of a token moves as training goes on (section 2.1) -------------------


def seen_since_start(losses, run, moves):
    """Millions of tokens at each row of `moves`, which may begin with the model before training."""
    seen = np.append(0, losses[f"{run} seen"]) / 1e6
    return seen[-len(moves) :]


def arm_of(run):
    return run.removeprefix("dynamics-").upper()


def arrow(name):
    return name.replace("->", "→")


def class_lines(ax, losses, run):
    """Mean loss of each class of token."""
    classes, moves = dynamics(losses, run)
    seen = seen_since_start(losses, run, moves)
    lines = {}
    for name, tokens in classes.items():
        label = f"{arrow(name)}\n{100 * tokens.mean():.0f} % of tokens"
        if tokens.any():
            lines[label] = moves[:, tokens].mean(1)
        else:
            lines[label] = np.full(len(moves), np.nan)  # keeps the colors in step
    ends = draw_lines(ax, seen, lines)
    ax.set(title=f"{arm_of(run)}: mean of each class", ylabel="mean loss, nats")
    return [end for end in ends if np.isfinite(end.y)]


def single_tokens(ax, losses, run):
    """Of the classes without a trend, the three tokens each whose loss moves most."""
    classes, moves = dynamics(losses, run)
    seen = seen_since_start(losses, run, moves)
    ends = []
    for name in ("H->H", "L->L"):
        color, dash, marker = LINES[CLASSES.index(name)]
        numbers = np.flatnonzero(classes[name])
        restless = np.argsort(-moves[:, numbers].std(0))
        for token in numbers[restless[:3]]:
            line = moves[:, token]
            ax.plot(seen, line, color=color, ls=dash, lw=0.9, marker=marker, ms=2.5)
            ends.append(End(seen[-1], line[-1], arrow(name), color))
    ax.set_xlim(0, round(seen[-1], 1))
    ax.set(title=f"{arm_of(run)}: six single tokens", ylabel="loss, nats")
    return ends


def dynamics_picture(losses, path):
    """Mean loss by class in both arms, and single tokens about a flat line."""
    fig, axes = new_figure(2, 2, 6.6, sharey="row")
    ends = [
        class_lines(axes[0, 0], losses, "dynamics-clm"),
        class_lines(axes[0, 1], losses, "dynamics-slm"),
        single_tokens(axes[1, 0], losses, "dynamics-clm"),
        single_tokens(axes[1, 1], losses, "dynamics-slm"),
    ]
    for ax, mine in zip(axes.flat, ends, strict=True):
        ax.set_ylim(bottom=0)
        ax.set_xlabel("tokens seen since clm.pt, millions")
        ax.tick_params(labelleft=True)
        label_ends(ax, mine)
    note = "H→H: stays high, L→H: rises, H→L: falls, L→L: stays low "
    note += "(section 2.1 of the paper).\n"
    note += "Bottom: of H→H (solid) and of L→L (broken) the three tokens whose loss moves most."
    finish(fig, path, note)
