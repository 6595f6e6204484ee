"""The sentences below the published tables, and results/summary.json: every number from the logs.

tables.py writes both. Each function takes the folder of the published logs, as a table does, and
yields pieces of sentences, which are joined by a space.
"""

import json
import statistics
from functools import partial

from checks import (
    bench_sentences,
    bench_summary,
    faults_sentences,
    faults_summary,
    hf_sentences,
    hf_summary,
    memory_sentences,
)
from control_tables import (
    clean_sentences,
    clean_text_summary,
    map_sentences,
    model_lead,
    model_sentences,
)
from controls import CONTROL_SLM, CONTROLS
from experiments import (
    CLM_RUN,
    LONGER,
    RULES,
    SELF_RATIOS,
    SELF_RULES,
    SFT_RATE,
    SFT_RATES,
    SFT_RUN,
    SLM_RUN,
    TASKS,
    VARIANTS,
    dirt_runs,
)
from factors import factor_sentences
from logs import (
    CLASSES,
    SLIP,
    count_answers,
    deviation,
    dynamics,
    ends,
    fisher_p,
    gains,
    interval,
    kept,
    main_pairs,
    percent,
    published,
    read_log,
    read_losses,
    read_runs,
    seconds,
    sources,
    spread,
    times_fewer,
    value,
    where,
    with_interval,
)
from sweeps import SWEEPS

# ---- phrases -------------------------------------------------------------------------------------


def against(other, run, part):
    """How a list of with_interval, all paired like this run, is introduced."""
    seeds = len(gains(run, other, "right", part))
    return f"in points with 95 % intervals, paired over {seeds} seeds"


def times_text(times, what="times fewer tokens"):
    """`1.9 ± 0.2 times fewer tokens`; in how many seeds, where it is not all of them."""
    reached = [ratio for ratio in times if ratio is not None]
    if not reached:
        return "at no point"
    text = f"{spread(reached)} {what}"
    if len(reached) < len(times):
        text += f" (in {len(reached)} of {len(times)} seeds; in the others at no point)"
    return text


def after(times):
    text = times_text(times)
    return text if text == "at no point" else f"with {text}"


def mean_gain(run, other, part, key="right"):
    return statistics.mean(gains(run, other, key, part))


def mean_end(run, key, part):
    return statistics.mean(ends(run, key, part))


# ---- the demo's data -----------------------------------------------------------------------------


def demo(folder):
    yield f"{where(read_runs(folder / 'demo')['clm'][0])}."


def main(folder):
    found = main_pairs(folder / "runs")
    points, low, high = interval(found["points"])
    seeds = f"paired over {len(found['points'])} seeds, 95 % interval {low:.1f} to {high:.1f}"
    yield f"SLM ends **{points:.1f} points** above CLM ({seeds})."
    yield f"It is at CLM's final accuracy for good **{after(found['times_right'])}**,"
    yield f"at CLM's final held-out loss {after(found['times_loss'])}"
    yield "(the reference's not counted)."
    yield f"{where(published('clm', folder / 'runs')[1][0])}."


def arms(folder):
    part = folder / "runs"
    found = main_pairs(part)
    over = with_interval(found["points_over_ref"])
    yield f"The student ends {over} points over its reference (95 % interval)."
    clms, slms = published("clm", part), published("slm", part)
    right = [times_fewer(slms[seed], clms[seed], "right", True) for seed in slms]
    loss = [times_fewer(slms[seed], clms[seed], "val_loss", True) for seed in slms]
    yield "SLM is where CLM ends"
    yield f"{after(right)} by accuracy, {after(loss)} by held-out loss,"
    yield "read off the line between two evaluations. In whole evaluations, as on the front page:"
    yield f"{times_text(found['times_right'])} by accuracy,"
    yield f"{times_text(found['times_loss'])} by held-out loss."
    sooner = times_text(found["times_seconds"], "times fewer seconds")
    yield f"In training time it is at CLM's final accuracy with {sooner}."
    yield "With the training of the reference, and the scoring of all of its pages counted as a"
    yield "third of CLM's time,"
    yield f"it takes {times_text(found['times_all'], 'times as long as CLM')} to get there."


def fresh(folder):
    found = []
    for points in gains("slm", "clm", "right", folder / "fresh"):
        found.append(f"{points:+.1f}")
    others = gains("slm", "clm", "right", folder / "runs")
    yield f"SLM's points over CLM: {' and '.join(found)};"
    yield f"of the five seeds {min(others):.1f} to {max(others):.1f}."


def ratio(folder):
    part = folder / "runs"
    fifth = with_interval(gains("ratio-0.2", SLM_RUN, "right", part))
    half_nat = with_interval(gains("threshold-0.5", SLM_RUN, "right", part))
    yield f"Against half of the tokens, {against(SLM_RUN, 'ratio-0.2', part)}:"
    yield f"a fifth of them {fifth}, excess above half a nat {half_nat}."


def dirt(folder):
    part = folder / "runs"

    def points(wrong, dirty):
        _, clm, slm = dirt_runs(wrong, dirty)
        return f"{mean_gain(slm, clm, part):.1f}"

    one = [points(wrong, 1) for wrong in (0, 0.5, 0.75, 0.9)]
    three = [points(wrong, 3) for wrong in (0, 0.5, 0.75)]
    yield f"On clean text without dirt SLM gains {points(0, 0)} points."
    yield f"With one piece of dirt for each problem and 0, 50, 75, 90 % wrong: {', '.join(one)}."
    yield f"With three pieces and 0, 50, 75 % wrong: {', '.join(three)}."
    yield f"With six pieces and 75 % wrong: {points(0.75, 6)}."


def references(folder):
    part = folder / "runs"
    own = mean_gain(SLM_RUN, CLM_RUN, part)
    params = {run: published(run, part)[1][0]["params"] for run in ("ref", "ref-small")}
    share = percent(params["ref-small"] / params["ref"])
    for name, words in (("small", f"{share} of the parameters"), ("50000", "10 x clean text")):
        right = mean_end(f"ref-{name}", "right", part)
        points = mean_gain(f"slm-ref-{name}", CLM_RUN, part)
        yield f"The reference with {words} answers {right:.1f} % itself;"
        yield f"its student gains {points:.1f} points, where a student of the main comparison's"
        yield f"reference gains {own:.1f} at this length."


def long(folder):
    for data, longer in LONGER.items():
        clm = published(f"{data}-clm", folder / "runs")[1]
        slm = published(f"{data}-slm", folder / "runs")[1]
        right = after([times_fewer(slm, clm, "right", True)])
        loss = after([times_fewer(slm, clm, "val_loss", True)])
        points = value(slm[-1], "right") - value(clm[-1], "right")
        pieces = "1 piece" if longer.dirty == 1 else f"{longer.dirty} pieces"
        yield f"With {percent(longer.wrong)} wrong and {pieces} of dirt per problem,"
        yield "SLM is where CLM ends"
        yield f"{right} by accuracy, {loss} by held-out loss;"
        yield f"at the end it is {points:.1f} points above."
    reference = value(published("ref", folder / "runs")[1][-1], "right")
    yield "(Read off the line between two evaluations.)"
    yield f"The reference of all three answers {reference:.1f} %."


def scope(folder):
    part = folder / "runs"
    narrow = [run for run in SWEEPS["scope"].values() if run != SLM_RUN]
    found = [with_interval(gains(run, SLM_RUN, "right", part)) for run in narrow]
    yield f"Against the whole batch, {against(SLM_RUN, 'scope-1', part)}:"
    yield f"one window {found[0]}, two {found[1]}, four {found[2]}."


def kinds(folder):
    seed = folder / "runs" / "seed1"
    losses = read_losses(seed)
    share = read_log(seed / "slm.jsonl")[0]["config"]["ratio"]
    last = kept(losses, "slm", share)[-1]
    target = losses["kinds"] == 0
    slips = losses["kinds"] == SLIP
    yield f"At the end {percent(last[target].mean())} of the target text is kept"
    yield f"and {percent(last[slips].mean())} of the slips;"
    yield f"{percent(target[last].mean())} of what is kept is target text."


def token_dynamics(folder):
    return dynamics_sentences(read_losses(folder / "runs" / "seed1"))


def dynamics_sentences(losses):
    classes, _ = dynamics(losses, "dynamics-slm")
    lost = classes["L->H"]
    kinds_lost = losses["kinds"][lost]
    dirt_lost = (kinds_lost >= 2) & (kinds_lost <= 5)
    yield f"Selective training lets go of {percent(lost.mean())} of the tokens (L→H):"
    yield f"{percent(dirt_lost.mean())} of these are dirt"
    yield f"and {percent((kinds_lost == 0).mean())} target text."


def self_reference(folder):
    part = folder / "runs"
    clm_loss = mean_end(CLM_RUN, "val_loss", part)
    worse = rows = 0
    for rule in SELF_RULES:
        for share in SELF_RATIOS:
            rows += 1
            worse += mean_end(f"self-{rule}-{share}", "val_loss", part) > clm_loss
    yield f"Held-out loss is worse than CLM's in {worse} of the {rows} rows of self-reference."
    yield f"At 80 %, {against(CLM_RUN, 'self-ref_loss-0.8', part)}:"
    found = []
    for rule, label in SELF_RULES.items():
        run = f"self-{rule}-0.8"
        over_clm = with_interval(gains(run, CLM_RUN, "right", part))
        over_random = with_interval(gains(run, "random-0.8", "right", part))
        found.append(f"{label} {over_clm} over CLM, {over_random} over random tokens")
    yield "; ".join(found) + "."


def variants(folder):
    part = folder / "runs"
    runs = {f"rule-{rule}": label for rule, label in RULES.items()}
    runs.update({f"variant-{name}": label for name, (label, _) in VARIANTS.items()})
    found = []
    for run, label in runs.items():
        found.append(f"{label}: {with_interval(gains(run, SLM_RUN, 'right', part))}")
    yield f"Against SLM, {against(SLM_RUN, 'rule-loss', part)}:"
    yield "; ".join(found) + "."


def controls_against_slm(table, folder):
    """Each row of a table of CONTROLS against SLM."""
    part = folder / "runs"
    # The runs without a variant are there to make the others.
    runs = [run for run, control in CONTROLS[table].items() if control.variant]
    found = []
    for run in runs:
        points = with_interval(gains(run, CONTROL_SLM, "right", part))
        found.append(f"{CONTROLS[table][run].label}: {points}")
    yield f"Against SLM, {against(CONTROL_SLM, runs[0], part)}:"
    yield "; ".join(found) + "."


def lr(folder):
    seed = folder / "runs" / "seed1"
    logs = [read_log(path) for path in (*seed.glob("lr*.jsonl"), seed / f"{CLM_RUN}.jsonl")]
    header, *_, end = read_log(seed / f"{CLM_RUN}.jsonl")
    short = [log for log in logs if log[-1]["tokens"] == end["tokens"]]
    by_loss = min(short, key=lambda log: log[-1]["val_loss"])
    by_answers = max(short, key=lambda log: value(log[-1], "right"))
    chosen = header["config"]["lr"]
    seeds = deviation(ends(CLM_RUN, "val_loss", folder / "runs"))
    yield f"At {end['tokens']:,} tokens the lowest held-out loss is at"
    yield f"{by_loss[0]['config']['lr']:g}, lower than at the chosen {chosen:g} by"
    yield f"{end['val_loss'] - by_loss[-1]['val_loss']:.3f} nats"
    yield f"(standard deviation over seeds: {seeds:.3f})."
    yield f"By answers the best rate is {by_answers[0]['config']['lr']:g}:"
    yield f"{value(by_answers[-1], 'right'):.1f} % against {value(end, 'right'):.1f} % (one seed)."


def sft(folder):
    part = folder / "runs"
    paired = gains("sft-excess", SFT_RUN, "right", part)
    if len(paired) > 1:
        _, low, high = interval(paired)
        verdict = "is not shown to differ from"
        if low > 0:
            verdict = "is better than"
        if high < 0:
            verdict = "is worse than"
        yield f"By answers, selection {verdict} plain fine-tuning"
        yield f"({against(SFT_RUN, 'sft-excess', part)}):"
        yield f"excess {with_interval(paired)} over all answer tokens"
        over_random = gains("sft-excess", "sft-random", "right", part)
        if len(over_random) > 1:
            yield f"and {with_interval(over_random)} over random ones"
        losses = gains("sft-excess", SFT_RUN, "val_loss", part)
        yield f"(its target loss minus that of plain fine-tuning: {with_interval(losses, 3)} nats)."
    rates = {SFT_RATE: SFT_RUN} | {rate: f"sft-lr{rate}" for rate in SFT_RATES}
    right = {}
    for rate, run in rates.items():
        logs = published(run, part)
        if 1 in logs:
            right[rate] = value(logs[1][-1], "right")
    found = ", ".join(f"{rate}: {percent:.1f} %" for rate, percent in right.items())
    yield f"Right answers of plain fine-tuning by its learning rate (seed 1): {found}."


# ---- real text, and time -------------------------------------------------------------------------


def real(folder):
    part = folder / "real"
    yield "Held-out target loss against CLM's, in nats with 95 % intervals (paired over seeds):"
    found = []
    for run, label in (("slm", "SLM 60 %"), ("slm-30", "SLM 30 %"), ("slm-random", "random")):
        nats = with_interval(gains(run, "clm", "val_loss", part), 3)
        logs = published(run, part)
        clms = published("clm", part)
        times = [times_fewer(logs[seed], clms[seed], "val_loss", True) for seed in logs]
        found.append(f"{label} {nats}, at CLM's end {after(times)}")
    yield "; ".join(found) + "."
    yield f"30 % against 60 %: {with_interval(gains('slm-30', 'slm', 'val_loss', part), 3)}."
    for task in TASKS:
        ref, clm, slm = (count_answers(run, task, part) for run in ("ref", "clm", "slm"))
        yield f"Right answers on {task}, all seeds together:"
        yield f"reference {ref[0]}, SLM {slm[0]}, CLM {clm[0]} of {clm[1]:,}"
        yield f"(Fisher's exact test against CLM: reference {p_value(ref, clm)},"
        yield f"SLM {p_value(slm, clm)})."
    header = published("clm", part)[1][0]
    size = f"{header['params'] / 1e6:.1f} M parameters, {header['threads']} thread(s)"
    yield f"{size}, torch {header['torch']}."


def p_value(counts, other_counts):
    p = fisher_p(*counts, *other_counts)
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def real_lr(folder):
    logs = [read_log(path) for path in (folder / "real" / "seed1").glob("lr*.jsonl")]
    best = min(logs, key=lambda log: log[-1]["val_loss"])
    yield f"Chosen: {best[0]['config']['lr']:g}, the lowest target loss (one seed)."


def hours(folder):
    paths = sources("hours", folder)
    total = seconds({path: read_log(path) for path in paths}) / 3600
    yield f"Together {len(paths)} runs and {total:.1f} core-hours."


FINDINGS = {
    "main": main,
    "demo": demo,
    "arms": arms,
    "fresh": fresh,
    "ratio": ratio,
    "dirt": dirt,
    "references": references,
    "long": long,
    "factor": factor_sentences,
    "scope": scope,
    "kinds": kinds,
    "dynamics": token_dynamics,
    "self": self_reference,
    "variants": variants,
    "when": partial(controls_against_slm, "when"),
    "fixed": partial(controls_against_slm, "fixed"),
    "lr": lr,
    "sft": sft,
    "real": real,
    "real-lr": real_lr,
    "clean": clean_sentences,
    "clean-map": map_sentences,
    "model": model_lead,
    "clean-model": model_sentences,
    "hours": hours,
    "faults": faults_sentences,
    "hf": hf_sentences,
    "bench": bench_sentences,
    "memory": memory_sentences,
}


# ---- summary.json --------------------------------------------------------------------------------


def mean_or_none(times):
    """None where SLM does not reach CLM's end in every seed: a mean of the others would flatter."""
    return None if None in times else round(statistics.mean(times), 2)


def demo_summary(folder):
    found = main_pairs(folder / "runs")
    points, low, high = interval(found["points"])
    runs = read_runs(folder / "demo")
    return {
        "seeds": len(found["points"]),
        "gain_points": round(points, 2),
        "gain_points_ci95": [round(low, 2), round(high, 2)],
        "tokens_ratio_mean": mean_or_none(found["times_right"]),
        "tokens_ratio_loss_mean": mean_or_none(found["times_loss"]),
        "student_minus_reference_points": round(statistics.mean(found["points_over_ref"]), 2),
        "seconds_total": round(seconds(runs)),
        "cores": runs["clm"][0]["threads"],
    }


def real_summary(folder):
    part = folder / "real"
    names = {"clm": "clm", "random": "slm-random", "slm": "slm", "reference_only": "ref"}
    clm = published("clm", part)
    return {
        "tokens": clm[1][-1]["tokens"],
        "seeds": len(clm),
        "heldout_loss": {
            name: round(mean_end(run, "val_loss", part), 4) for name, run in names.items()
        },
    }


def summary(folder):
    """The text of summary.json. What has not been measured has no key."""
    classes, _ = dynamics(read_losses(folder / "runs" / "seed1"), "dynamics-clm")
    figures = {
        "demo": demo_summary(folder),
        "clean_text": clean_text_summary(folder),
        "real": real_summary(folder),
        "dynamics": {name: round(float(classes[name].mean()), 4) for name in CLASSES},
        "bench": bench_summary(folder),
        "faults": faults_summary(folder),
        "hf": hf_summary(folder),
    }
    figures = {name: values for name, values in figures.items() if values}
    return json.dumps(figures, indent=1) + "\n"
