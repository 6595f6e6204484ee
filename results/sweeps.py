"""Tables whose rows are short runs of one kind, set beside one of them, seed by seed."""

import statistics

from experiments import (
    CLM_RUN,
    RULES,
    SELF_RATIOS,
    SFT_ARMS,
    SFT_RATES,
    SFT_RUN,
    SLM_RUN,
    THRESHOLDS,
    VARIANTS,
)
from logs import ends, gains, percent, published, spread

# The tables whose rows are runs at the demo's length, set beside CLM's: what is said above the
# rows, and {table: {row: run}}.
HEADERS = {"ratio": "selected", "scope": "top k over", "self": "kept", "variants": "rule"}
SWEEPS = {
    "ratio": {
        "100 % (CLM)": CLM_RUN,
        **{f"{100 * ratio:.0f} %": f"ratio-{ratio}" for ratio in (0.8, 0.7, 0.6, 0.5, 0.4, 0.2)},
        **{f"excess above {nats}": f"threshold-{nats}" for nats in THRESHOLDS},
    },
    "scope": {
        "a window": "scope-1",
        "2 windows": "scope-2",
        "4 windows": "scope-4",
        "8 windows (batch)": SLM_RUN,
    },
    "self": {
        "CLM": CLM_RUN,
        "random, 70 %": "random-0.7",
        "random, 80 %": "random-0.8",
        **{f"low loss, {100 * r:.0f} %": f"self-ref_loss-{r}" for r in SELF_RATIOS},
        **{f"low entropy, {100 * r:.0f} %": f"self-ref_entropy-{r}" for r in SELF_RATIOS},
        **{f"both, {100 * r:.0f} %": f"self-ref_both-{r}" for r in SELF_RATIOS},
    },
    "variants": {
        "CLM": CLM_RUN,
        "random": "random-0.5",
        "excess (SLM)": SLM_RUN,
        **{label: f"rule-{rule}" for rule, label in RULES.items()},
        **{label: f"variant-{name}" for name, (label, _) in VARIANTS.items()},
    },
}


def sweep_table(name, folder):
    """A table of SWEEPS: short runs, and what each gains over CLM of the same length, by seed."""
    part = folder / "runs"
    header = [HEADERS[name], "seeds", "trained on", "target loss", "answers right, %"]
    yield [*header, "points over CLM"]
    for label, run in SWEEPS[name].items():
        points = gains(run, CLM_RUN, "right", part)
        ended = [records[-1] for records in published(run, part).values()]
        trained = statistics.mean(record["trained"] / record["tokens"] for record in ended)
        row = [label, str(len(points)), percent(trained), spread(ends(run, "val_loss", part), 3)]
        yield [*row, spread(ends(run, "right", part)), spread(points)]


# ---- fine-tuning ---------------------------------------------------------------------------------

SFT_ROWS = {  # label: run
    "nothing: CLM": "sft-base",
    **{label: run for run, (label, _) in SFT_ARMS.items()},
    **{f"all, learning rate {rate}": f"sft-lr{rate}" for rate in SFT_RATES},
}


def sft_table(folder):
    """Fine-tuning on answers: what selection gains over plain fine-tuning, seed by seed."""
    part = folder / "runs"
    header = ["fine-tuned on", "seeds", "target loss", "answers right, %"]
    yield [*header, "points over plain fine-tuning"]
    for label, run in SFT_ROWS.items():
        points = gains(run, SFT_RUN, "right", part)
        if points:  # else it has not been run
            row = [label, str(len(points)), spread(ends(run, "val_loss", part), 3)]
            yield [*row, spread(ends(run, "right", part)), spread(points)]
