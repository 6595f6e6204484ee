"""The tables of controls.py's runs, and the sentences below them."""

import statistics

from controls import (
    AMOUNTS,
    CONTROL_CLM,
    CONTROL_SLM,
    CONTROLS,
    MIX,
    RATES,
    REF_TOKENS,
    SLM_RATES,
    TRIED_MIX,
    TRIED_RATES,
    USES,
    mix_trial_name,
    trial_name,
    use_name,
)
from logs import ends, gains, interval, published, spread

from rho import tokens_in_all

DEMO_CELL = ("1", "third")
RIVAL = "mixed_clm"


def mean_interval(values):
    """`+2.7 (0.1 to 5.3)`; of a single seed the difference alone."""
    if len(values) == 1:
        return f"{values[0]:+.1f}"
    mean, low, high = [round(x, 1) + 0.0 for x in interval(values)]
    return f"{mean:+.1f} ({low:.1f} to {high:.1f})"


# ---- the same clean text, used otherwise ---------------------------------------------------------


def clean_table(folder):
    """The demo's cell: every use of the clean text at equal tokens in all."""
    part = folder / "runs"
    yield [
        "use",
        "tokens of its own",
        "in all",
        "seeds",
        "target loss",
        "answers right, %",
        "points over CLM on corpus and clean text",
    ]
    labels = {"ref": "(the reference)", **{arm: use.label for arm, use in USES.items()}}
    for arm, label in labels.items():
        run = use_name(*DEMO_CELL, arm)
        logs = list(published(run, part).values())
        if not logs:
            continue
        in_all = {tokens_in_all(records) for records in logs}
        row = [label, f"{logs[0][-1]['tokens']:,}", " / ".join(f"{n:,}" for n in in_all)]
        row += [str(len(logs)), spread(ends(run, "val_loss", part), 3)]
        points = gains(run, use_name(*DEMO_CELL, RIVAL), "right", part)
        yield [
            *row,
            spread(ends(run, "right", part)),
            "" if arm == RIVAL else mean_interval(points),
        ]


# What one must have for each arm, in the order of the front page's table.
AT_HAND = {
    "corpus only": ["clm"],
    "a model of clean text": ["ref", "slm", "distilled", "clean_then_clm", "clean_then_slm"],
    "the clean text": ["mixed_slm", "mixed_clm", "clean_only"],
}


def uses_table(folder):
    """The front page's table: the same arms, by what one must have for them."""
    part = folder / "runs"
    yield ["at hand: training", "target loss", "answers right, %"]
    labels = {"ref": "that model itself", **{arm: use.label for arm, use in USES.items()}}
    for at_hand, arms in AT_HAND.items():
        for arm in arms:
            run = use_name(*DEMO_CELL, arm)
            if published(run, part):
                loss = spread(ends(run, "val_loss", part), 3)
                label = f"{at_hand}: {labels[arm]}"
                yield [label, loss, spread(ends(run, "right", part))]


def clean_map(folder):
    """Right answers by amount of clean text and the reference's share of all tokens, seed 1."""
    shares = {"third": "1/3", "tenth": "1/10"}
    cells = [(amount, share) for amount in AMOUNTS for share in REF_TOKENS]
    yield ["use", *(f"{amount} x, reference {shares[share]}" for amount, share in cells)]
    for arm, use in USES.items():
        row = [use.label]
        for amount, share in cells:
            records = published(use_name(amount, share, arm), folder / "runs").get(1)
            row.append(f"{right(records):.1f}" if records else "")
        yield row
    row = ["(the reference itself)"]
    for amount, share in cells:
        records = published(use_name(amount, share, "ref"), folder / "runs").get(1)
        row.append(f"{right(records):.1f}" if records else "")
    yield row


def map_sentences(folder):
    yield "CLM on both texts, by the share of clean text in the mixture (the table's is set bold):"
    found = []
    for amount, shares in TRIED_MIX.items():
        words = []
        for mix in sorted([MIX[amount], *shares], key=float):
            records = published(mix_trial_name(amount, mix), folder / "runs").get(1)
            if records:
                share = f"{100 * float(mix):.0f} %"
                if mix == MIX[amount]:
                    share = f"**{share}**"
                words.append(f"{share} {right(records):.1f}")
        found.append(f"{amount} x: {', '.join(words)}")
    yield f"{'; '.join(found)}."


def right(records):
    return 100 * records[-1]["right"] / records[-1]["questions"]


def trials_table(folder):
    """Answers and held-out loss on seed 1, by learning rate."""
    yield ["use", *(f"rate {rate}" for rate in TRIED_RATES), "chosen"]
    labels = {"ref": "the reference", **{arm: use.label for arm, use in USES.items()}}
    for arm, label in labels.items():
        row = [label]
        for rate in TRIED_RATES:
            records = published(trial_name(arm, rate), folder / "runs").get(1)
            row.append(f"{right(records):.1f} %, {records[-1]['val_loss']:.3f}" if records else "")
        yield [*row, RATES[arm]]


def clean_text_summary(folder):
    """{arm: mean of right answers, %} of the demo's arrangement."""
    found = {}
    for arm in USES:
        values = ends(use_name(*DEMO_CELL, arm), "right", folder / "runs")
        if values:
            found[arm] = round(statistics.mean(values), 2)
    return found


def clean_sentences(folder):
    part = folder / "runs"
    slm = use_name(*DEMO_CELL, "slm")
    seeds = len(published(slm, part))
    intervals = f"with 95 % intervals, paired over {seeds} seeds" if seeds > 1 else "one seed"
    yield f"In points, {intervals}:"
    pairs = {
        "SLM": ("slm", ["clm", "distilled", "ref"]),
        "SLM begun from the reference": ("clean_then_slm", ["clean_then_clm", "ref"]),
        "SLM on corpus and clean text": ("mixed_slm", ["mixed_clm"]),
    }
    lines = []
    for label, (arm, others) in pairs.items():
        words = []
        for other in others:
            points = gains(use_name(*DEMO_CELL, arm), use_name(*DEMO_CELL, other), "right", part)
            if points:
                over = "the reference" if other == "ref" else USES[other].label
                words.append(f"{mean_interval(points)} over {over}")
        lines.append(f"{label} {', '.join(words)}")
    yield f"{'; '.join(lines)}."


# ---- other units, other rules, other masks -------------------------------------------------------


def control_table(name, folder):
    """Runs at the demo's length beside SLM, and CLM."""
    part = folder / "runs"
    header = ["trained on", "seeds", "in all", "trained on", "target loss", "answers right, %"]
    yield [*header, "points over CLM"]
    rows = {"all tokens (CLM)": CONTROL_CLM, "tokens, by excess (SLM)": CONTROL_SLM}
    rows.update({control.label: run for run, control in CONTROLS[name].items()})
    for label, run in rows.items():
        logs = list(published(run, part).values())
        if not logs:
            continue
        points = gains(run, CONTROL_CLM, "right", part)
        row = [label, str(len(logs)), f"{tokens_in_all(logs[0]):,}"]
        row.append(f"{logs[0][-1]['trained']:,}")
        row.append(spread(ends(run, "val_loss", part), 3))
        yield [*row, spread(ends(run, "right", part)), mean_interval(points)]


def slm_rates_table(folder):
    """SLM by its learning rate, seed 1."""
    yield ["learning rate", "SLM's target loss", "answers right, %"]
    for rate in sorted({*TRIED_RATES, *SLM_RATES}, key=float):
        records = published(trial_name("slm", rate), folder / "runs").get(1)
        if records:
            yield [rate, f"{records[-1]['val_loss']:.3f}", f"{right(records):.1f}"]
