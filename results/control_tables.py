"""The tables of controls.py's runs, and the sentences below them."""

import statistics

from controls import (
    BEGUN_ARMS,
    BETTER,
    BETTER_SLM,
    CLEAN_CELLS,
    CLOSE_CELL,
    CONTROL_CLM,
    CONTROL_SLM,
    CONTROLS,
    DIRTIER_MIX,
    FEWER_SEEDS,
    KEPT_CELL,
    KEPT_MIXES,
    KEPT_RATIOS,
    MIX,
    MODEL_RATES,
    MODEL_RATIO,
    MODEL_RATIOS,
    MODEL_SEEDS,
    MODEL_TRIED,
    MODEL_USES,
    NEW_RATE,
    RATES,
    SLM_RATES,
    TRIED_MIX,
    TRIED_RATES,
    TRIED_RATIOS,
    USES,
    dirtier_name,
    kept_name,
    model_name,
    new_rate_name,
    ratio_name,
    trial_name,
    tried_name,
    use_name,
)
from logs import (
    ends,
    gains,
    interval,
    percent,
    published,
    spread,
    value,
    with_interval,
)

from rho import tokens_in_all

DEMO_CELL = ("1", "third")
RIVAL = "mixed_clm"


# ---- the same clean text, used otherwise ---------------------------------------------------------


def uses_compared(folder, runs, seeds, rival, over):
    """Rows of runs {run: label}: what each costs, where it ends, its points over the run `rival`.

    over: the rival's name in the header.
    """
    part = folder / "runs"
    costs = ["tokens of its own", "in all", "seeds"]
    yield ["use", *costs, "target loss", "answers right, %", f"points over {over}"]
    rivals = published(rival, part)
    for run, label in runs.items():
        logs = {seed: log for seed, log in published(run, part).items() if seed in seeds}
        if not logs:
            continue
        ended = {seed: log[-1] for seed, log in logs.items()}
        own = {f"{end['tokens']:,}" for end in ended.values()}
        in_all = {f"{tokens_in_all(log):,}" for log in logs.values()}
        row = [label, " / ".join(own), " / ".join(in_all), str(len(logs))]
        row.append(spread([end["val_loss"] for end in ended.values()], 3))
        answers = {seed: value(end, "right") for seed, end in ended.items()}
        row.append(spread(list(answers.values())))
        points = []
        for seed in answers:
            if seed in rivals:
                points.append(answers[seed] - value(rivals[seed][-1], "right"))
        yield [*row, "" if run == rival else with_interval(points)]


def clean_table(folder):
    """The demo's cell: every use of the clean text at equal tokens in all."""
    labels = {"ref": "(the reference)", **{arm: use.label for arm, use in USES.items()}}
    runs = {use_name(*DEMO_CELL, arm): label for arm, label in labels.items()}
    rival = use_name(*DEMO_CELL, RIVAL)
    return uses_compared(folder, runs, CLEAN_CELLS[DEMO_CELL], rival, USES[RIVAL].label)


# What one must have for each arm, in the order of the front page's table.
AT_HAND = {
    "the corpus only": ["clm"],
    "a model of clean text": ["ref", "slm", "distilled", "clean_then_clm", "clean_then_slm"],
    "the clean text": ["mixed_slm", "mixed_clm", "clean_only"],
}


def uses_table(folder):
    """The front page's table: the same arms, by what one must have for them."""
    part = folder / "runs"
    yield ["you have", "you train", "target loss", "answers right, %"]
    labels = {"ref": "nothing: that model itself"}
    labels.update({arm: use.label for arm, use in USES.items()})
    for at_hand, arms in AT_HAND.items():
        for arm in arms:
            run = use_name(*DEMO_CELL, arm)
            loss = spread(ends(run, "val_loss", part), 3)
            first_cell = at_hand if arm == arms[0] else ""
            yield [first_cell, labels[arm], loss, spread(ends(run, "right", part))]


REF_SHARES = {"third": "1/3", "tenth": "1/10"}


def cells(folder, key):
    """{(amount, share): {arm: {seed: where it ended}}} of the cells that were run."""
    found = {}
    for (amount, share), seeds in CLEAN_CELLS.items():
        arms = {}
        for arm in (*USES, "ref"):
            logs = published(use_name(amount, share, arm), folder / "runs")
            # An arm without a reference is shared by cells, and may have more seeds than this one.
            arms[arm] = {seed: value(logs[seed][-1], key) for seed in seeds if seed in logs}
        if arms["slm"]:
            found[amount, share] = arms
    return found


SELECTIVE = [arm for arm in USES if "slm" in arm]
OF_A_MODEL = [*AT_HAND["the corpus only"], *AT_HAND["a model of clean text"]]
# {what one has: (the arms with selection, their rivals)}
CONTESTS = {
    "the text at hand": (SELECTIVE, [*(arm for arm in USES if arm not in SELECTIVE), "ref"]),
    "only a model of it": (
        [arm for arm in OF_A_MODEL if arm in SELECTIVE],
        [arm for arm in OF_A_MODEL if arm not in SELECTIVE],
    ),
}


def lead(arms, contest, key):
    """The best arm with selection minus the best without, seed by seed; best by their means."""
    best = max if key == "right" else min
    mine, rival = [
        best(group, key=lambda arm: statistics.mean(arms[arm].values()))
        for group in CONTESTS[contest]
    ]
    return [arms[mine][seed] - arms[rival][seed] for seed in arms[mine]]


def clean_map(folder):
    """Right answers by amount of clean text and the reference's share of all tokens."""
    answers = cells(folder, "right")
    losses = cells(folder, "val_loss")
    yield ["use", *(f"{amount} x, reference {REF_SHARES[share]}" for amount, share in answers)]
    labels = {**{arm: use.label for arm, use in USES.items()}, "ref": "(the reference itself)"}
    for arm, label in labels.items():
        yield [label, *(spread(list(arms[arm].values())) for arms in answers.values())]
    yield ["seeds", *(str(len(arms["slm"])) for arms in answers.values())]
    for contest in CONTESTS:
        leads = [with_interval(lead(arms, contest, "right")) for arms in answers.values()]
        yield [f"selection's lead in points, {contest}", *leads]
    for contest in CONTESTS:
        leads = [with_interval(lead(arms, contest, "val_loss"), 3) for arms in losses.values()]
        yield [f"in target loss (below 0 is better), {contest}", *leads]


def map_sentences(folder):
    """In how many cells selection leads, with the text at hand and with a model of it only."""
    several = [arms for arms in cells(folder, "right").values() if len(arms["slm"]) > 1]
    yield f"Of the {len(several)} cells with several seeds, the best arm with selection is shown"
    yield "to be better or worse than the best without:"
    counts = []
    for key, words in {"right": "answers", "val_loss": "target loss"}.items():
        for contest in CONTESTS:
            leads = [lead(arms, contest, key) for arms in cells(folder, key).values()]
            if key == "val_loss":  # less is better
                leads = [[-difference for difference in values] for values in leads]
            intervals = [interval(values) for values in leads if len(values) > 1]
            better = sum(low > 0 for _, low, _ in intervals)
            worse = sum(high < 0 for _, _, high in intervals)
            counts.append(f"by {words}, with {contest}, better in {better} and worse in {worse}")
    yield f"{'; '.join(counts)}."


def shares_table(folder):
    """CLM on both texts by the share of clean text in the mixture, seed 1; the chosen one bold."""
    shares = sorted({mix for tried in TRIED_MIX.values() for mix in tried}, key=float)
    yield ["clean text", *(f"{percent(float(mix))} of the mixture" for mix in shares)]
    for amount, tried in TRIED_MIX.items():
        row = [f"{amount} x"]
        for mix in shares:
            run = use_name(amount, "third", "mixed_clm", mix)
            records = published(run, folder / "runs").get(1)
            cell = f"{value(records[-1], 'right'):.1f}" if mix in tried else ""
            row.append(f"**{cell}**" if mix == MIX[amount] else cell)
        yield row


def cheap_table(folder):
    """SLM with the cheaper reference, beside CLM on both texts; what was tried, on seed 1."""
    part = folder / "runs"
    rival = USES[RIVAL].label
    both = USES["mixed_slm"].label
    yield ["use", "seeds", "target loss", "answers right, %", f"points over {rival}"]
    rival_run = use_name(*CLOSE_CELL, RIVAL)
    both_run = use_name(*CLOSE_CELL, "mixed_slm")
    # (label, run, its seeds: None for all)
    rows = [(rival, rival_run, None), (f"{both}, 50 % kept", both_run, None)]
    rows += [(f"{rival}, seed 1", rival_run, [1]), (f"{both}, 50 % kept, seed 1", both_run, [1])]
    for ratio in TRIED_RATIOS:
        rows.append((f"{both}, {percent(float(ratio))} kept, seed 1", ratio_name(ratio), [1]))
    for arm in BEGUN_ARMS:
        rows.append((f"{USES[arm].label}, rate {NEW_RATE}, seed 1", new_rate_name(arm), [1]))
    rivals = published(rival_run, part)
    for label, run, seeds in rows:
        logs = published(run, part)
        ended = {seed: logs[seed][-1] for seed in seeds or logs}
        losses = [end["val_loss"] for end in ended.values()]
        answers = {seed: value(end, "right") for seed, end in ended.items()}
        points = [right - value(rivals[seed][-1], "right") for seed, right in answers.items()]
        row = [label, str(len(ended)), spread(losses, 3), spread(list(answers.values()))]
        yield [*row, "" if run == rival_run else with_interval(points)]


def kept_table(folder):
    """SLM on both texts with less clean text, by its share and the share kept; seed 1."""
    part = folder / "runs"
    rival = USES[RIVAL].label
    both = USES["mixed_slm"].label
    yield ["use", "clean share of the mixture", "of the corpus kept", "target loss", "right, %"]
    amount, share = KEPT_CELL
    rows = []
    for mix in KEPT_MIXES:
        rows.append((rival, mix, "1", use_name(amount, share, RIVAL, mix)))
    rows.append((both, MIX[amount], "0.5", use_name(amount, share, "mixed_slm")))
    for mix in KEPT_MIXES:
        for ratio in KEPT_RATIOS:
            rows.append((both, mix, ratio, tried_name(mix, ratio)))
    for label, mix, ratio, run in rows:
        end = published(run, part)[1][-1]
        shares = [percent(float(mix)), percent(float(ratio))]
        yield [label, *shares, f"{end['val_loss']:.3f}", f"{value(end, 'right'):.1f}"]


def dirtier_runs():
    """{run: (label, share of clean text in its mixture)} of the dirtier corpus."""
    runs = {dirtier_name("ref"): ("(the reference)", "")}
    for arm in ("clean_only", "slm"):
        runs[dirtier_name(arm)] = (USES[arm].label, "")
    for arm, mixes in DIRTIER_MIX.items():
        for mix in mixes:
            runs[dirtier_name(arm, mix)] = (USES[arm].label, percent(float(mix)))
    return runs


def dirtier_table(folder):
    """The uses of a little clean text beside a dirtier corpus, in longer runs, seed 1."""
    yield ["use", "clean share of the mixture", "in all", "target loss", "answers right, %"]
    for run, (label, share) in dirtier_runs().items():
        records = published(run, folder / "runs").get(1)
        if records:
            end = records[-1]
            right = f"{value(end, 'right'):.1f}"
            in_all = f"{tokens_in_all(records):,}"
            yield [label, share, in_all, f"{end['val_loss']:.3f}", right]


# The model itself is the reference of the main comparison.
MODEL_RUN = "ref"


def model_table(folder):
    """What to do with a model of clean text, beside a dirtier corpus, in longer runs."""
    runs = {MODEL_RUN: "(the model itself)"}
    runs.update({model_name(arm, rate): MODEL_USES[arm].label for arm, rate in MODEL_RATES.items()})
    return uses_compared(folder, runs, MODEL_SEEDS, MODEL_RUN, "the model")


def model_more_table(folder):
    """SLM started from the model: other shares kept (seed 1), and with a better model."""
    started = USES["clean_then_slm"].label
    shares = {MODEL_RUN: "(the model itself), seed 1"}
    for ratio in sorted([MODEL_RATIO, *MODEL_RATIOS], key=float):
        shares[kept_name(ratio)] = f"{started}, {percent(float(ratio))} kept, seed 1"
    yield from uses_compared(folder, shares, (1,), MODEL_RUN, "its model")
    better = {BETTER: "(the better model itself)", BETTER_SLM: f"{started}, with the better model"}
    _, *rows = uses_compared(folder, better, FEWER_SEEDS, BETTER, "its model")
    yield from rows


def model_sentences(folder):
    """SLM from the model's weights against each rival, in points and in target loss."""
    part = folder / "runs"
    mine = model_name("clean_then_slm", MODEL_RATES["clean_then_slm"])
    rivals = {"the model itself": MODEL_RUN}
    for arm in ("clean_then_clm", "random", "low_loss", "distilled", "slm", "clm"):
        rivals[MODEL_USES[arm].label] = model_name(arm, MODEL_RATES[arm])
    yield "SLM, started from the reference, against the others, paired by seed:"
    words = []
    for label, run in rivals.items():
        points = gains(mine, run, "right", part)
        losses = gains(mine, run, "val_loss", part)
        if points:
            both = f"{with_interval(points)} points and {with_interval(losses, 3)} in target loss"
            words.append(f"{both} over {label}")
    yield f"{'; '.join(words)}."


def model_summary(folder):
    """The arms of the front page's first table, a column for each."""
    runs = {}
    for arm in ("clm", "slm", "distilled", "clean_then_clm"):
        runs[USES[arm].label] = model_name(arm, MODEL_RATES[arm])
    # model_lead compares these two.
    runs["nothing: the model itself"] = MODEL_RUN
    runs[USES["clean_then_slm"].label] = kept_name(MODEL_RATIO)
    answers = {label: ends(run, "right", folder / "runs") for label, run in runs.items()}
    columns = [label for label in answers if answers[label]]
    yield ["you train", *columns]
    yield ["answers right, %", *(spread(answers[label]) for label in columns)]


def model_lead(folder):
    """SLM, started from the model, over that model: the table's last two columns."""
    points = gains(kept_name(MODEL_RATIO), MODEL_RUN, "right", folder / "runs")
    yield f"The last two columns differ by {with_interval(points)} points,"
    yield f"paired over {len(points)} seeds (95 % interval)."


def model_rates_table(folder):
    """Answers and held-out loss of the same arms on seed 1, by learning rate."""
    rates = sorted({rate for tried in MODEL_TRIED.values() for rate in tried}, key=float)
    yield ["use", *(f"rate {rate}" for rate in rates), "chosen"]
    for arm, tried in MODEL_TRIED.items():
        row = [MODEL_USES[arm].label]
        for rate in rates:
            records = published(model_name(arm, rate), folder / "runs").get(1)
            cell = ""
            if records and rate in tried:
                end = records[-1]
                cell = f"{value(end, 'right'):.1f} %, {end['val_loss']:.3f}"
            row.append(cell)
        yield [*row, MODEL_RATES[arm]]


def trials_table(folder):
    """Answers and held-out loss on seed 1, by learning rate."""
    yield ["use", *(f"rate {rate}" for rate in TRIED_RATES), "chosen"]
    labels = {"ref": "the reference", **{arm: use.label for arm, use in USES.items()}}
    for arm, label in labels.items():
        row = [label]
        for rate in TRIED_RATES:
            records = published(trial_name(arm, rate), folder / "runs").get(1)
            cell = ""
            if records:
                end = records[-1]
                cell = f"{value(end, 'right'):.1f} %, {end['val_loss']:.3f}"
            row.append(cell)
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
        "SLM, started from the reference,": ("clean_then_slm", ["clean_then_clm", "ref"]),
        "SLM on corpus and clean text": ("mixed_slm", ["mixed_clm"]),
    }
    lines = []
    for label, (arm, others) in pairs.items():
        words = []
        for other in others:
            points = gains(use_name(*DEMO_CELL, arm), use_name(*DEMO_CELL, other), "right", part)
            if points:
                over = "the reference" if other == "ref" else USES[other].label
                words.append(f"{with_interval(points)} over {over}")
        lines.append(f"{label} {', '.join(words)}")
    yield f"{'; '.join(lines)}."


# ---- other units, other rules, other masks -------------------------------------------------------


def control_table(name, folder):
    """Runs at the demo's length beside SLM, and CLM."""
    part = folder / "runs"
    header = ["rule", "seeds", "in all", "trained on", "target loss", "answers right, %"]
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
        over_clm = "" if run == CONTROL_CLM else with_interval(points)
        yield [*row, spread(ends(run, "right", part)), over_clm]


def slm_rates_table(folder):
    """SLM by its learning rate, seed 1."""
    yield ["learning rate", "SLM's target loss", "answers right, %"]
    for rate in sorted({*TRIED_RATES, *SLM_RATES}, key=float):
        records = published(trial_name("slm", rate), folder / "runs").get(1)
        if records:
            yield [rate, f"{records[-1]['val_loss']:.3f}", f"{value(records[-1], 'right'):.1f}"]
