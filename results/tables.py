"""The published tables: each a function from the logs in a folder to rows of text, header first.

    python results/tables.py out/demo     the table of one set of runs: your own
    python results/tables.py              every published table, printed
    python results/tables.py --publish    writes them into both READMEs, and results/summary.json

A table stands in a README between <!-- marker --> and <!-- /marker -->, with the sentences of
findings.py below it, and the commits of its logs. No measured number there is typed by hand.
"""

import argparse
import json
import re
import statistics
import sys
from functools import partial
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from checks import (  # noqa: E402
    bench_table,
    faults_table,
    hf_table,
    memory_table,
    paper_table,
)
from control_tables import (  # noqa: E402
    cheap_table,
    clean_map,
    clean_table,
    control_table,
    dirtier_table,
    kept_table,
    model_more_table,
    model_rates_table,
    model_summary,
    model_table,
    shares_table,
    slm_rates_table,
    trials_table,
    uses_table,
)
from controls import CONTROLS  # noqa: E402
from experiments import (  # noqa: E402
    CLM_RUN,
    DEMO,
    DIRT,
    LONGER,
    MAIN_RUNS,
    REAL,
    REAL_RUNS,
    REFERENCES,
    RUNS,
    SLM_RUN,
    STARTED,
    TASKS,
    dirt_runs,
    logs_made,
    started_name,
)
from factors import factor_table  # noqa: E402
from findings import FINDINGS, summary  # noqa: E402
from logs import (  # noqa: E402
    CLASSES,
    KINDS,
    SOURCES,
    count_answers,
    dynamics,
    ends,
    gains,
    kept,
    percent,
    provenance,
    published,
    read_log,
    read_losses,
    read_runs,
    seconds,
    sources,
    spread,
    value,
)
from sweeps import sft_table, sweep_table  # noqa: E402

from eval_math import wilson_interval  # noqa: E402
from prepare_data import InputError  # noqa: E402
from rho import show_table, table_rows  # noqa: E402


def demo_table(folder):
    """What `make demo` prints at its end."""
    return table_rows(read_runs(folder / "demo"))


# ---- the demo's data -----------------------------------------------------------------------------


def main_table(folder):
    """The picture's runs on the front page: means over the seeds."""
    yield ["arm", "target loss", "answers right, %"]
    for run in MAIN_RUNS:
        losses = ends(run, "val_loss", folder / "runs")
        right = ends(run, "right", folder / "runs")
        yield [RUNS[run].label, spread(losses, 3), spread(right)]


def arms_table(folder):
    """The same with what each arm has seen and trained on."""
    yield ["arm", "tokens seen", "trained on", "target loss", "corpus loss", "answers right, %"]
    for run in MAIN_RUNS:
        row = arm_row(run, folder / "runs")
        yield [*row, spread(ends(run, "right", folder / "runs"))]


def arm_row(run, part):
    last = [records[-1] for records in published(run, part).values()]
    trained = statistics.mean(record["trained"] for record in last)
    row = [RUNS[run].label, f"{last[0]['tokens']:,}", f"{trained:,.0f}"]
    for key in ("val_loss", "val_corpus_loss"):
        row.append(spread(ends(run, key, part), 3))
    return row


def fresh_table(folder):
    """The same arms at seeds that nothing was chosen with."""
    five, more = folder / "runs", folder / "fresh"
    seeds = sorted(published("slm", more))
    titles = ["the five seeds", *(f"seed {seed}" for seed in seeds)]
    yield ["arm", *(f"right, %: {t}" for t in titles), *(f"target loss: {t}" for t in titles)]
    for run in MAIN_RUNS:
        row = [RUNS[run].label]
        for key, digits in (("right", 1), ("val_loss", 3)):
            row.append(spread(ends(run, key, five), digits))
            row += [f"{end:.{digits}f}" for end in ends(run, key, more)]
        yield row


def map_table(folder):
    """Points over CLM, by how much of the corpus is wrong and how much of it is dirt."""
    pieces = sorted({dirty for _, dirty in DIRT})
    yield ["wrong answers", *(f"dirt per problem: {dirty}" for dirty in pieces)]
    for wrong in sorted({wrong for wrong, _ in DIRT}):
        row = [percent(wrong)]
        for dirty in pieces:
            cell = ""
            if (wrong, dirty) in DIRT:
                _, clm, slm = dirt_runs(wrong, dirty)
                cell = f"{statistics.mean(gains(slm, clm, 'right', folder / 'runs')):+.1f}"
            row.append(cell)
        yield row


def dirt_table(folder):
    setting = ["wrong answers", "dirt per problem", "target tokens", "seeds"]
    found = ["CLM right, %", "SLM right, %", "points", "target loss, SLM minus CLM"]
    yield setting + found
    shares = json.loads((folder / "runs" / "shares.json").read_text())
    for wrong, dirty in DIRT:
        data, clm, slm = dirt_runs(wrong, dirty)
        points = gains(slm, clm, "right", folder / "runs")
        losses = gains(slm, clm, "val_loss", folder / "runs")
        row = [percent(wrong), str(dirty), percent(shares[data]), str(len(points))]
        for run in (clm, slm):
            row.append(spread(ends(run, "right", folder / "runs")))
        yield [*row, spread(points), spread(losses, 3)]


def references_table(folder):
    part = folder / "runs"
    yield [
        "reference",
        "seeds",
        "its target loss",
        "its answers right, %",
        "student right, %",
        "points over CLM",
    ]
    known = [("the main comparison's", "ref", SLM_RUN)]
    known += [(label, f"ref-{name}", f"slm-ref-{name}") for name, (label, _) in REFERENCES.items()]
    for label, ref, slm in known:
        points = gains(slm, CLM_RUN, "right", part)
        # The published references have five seeds; only those of the students are meant here.
        losses = ends(ref, "val_loss", part)[: len(points)]
        right = ends(ref, "right", part)[: len(points)]
        row = [label, str(len(points)), spread(losses, 3), spread(right)]
        yield [*row, spread(ends(slm, "right", part)), spread(points)]


def long_table(folder):
    """Longer runs of one seed, at every millionth token: does CLM catch up?"""
    setting = ["wrong answers", "dirt per problem", "tokens seen"]
    arms = ["CLM right, %", "SLM right, %", "CLM target loss", "SLM target loss"]
    yield [*setting, *arms, "points"]
    for data, longer in LONGER.items():
        clm_log = published(f"{data}-clm", folder / "runs")[1]
        slm_log = published(f"{data}-slm", folder / "runs")[1]
        # Behind the header there is an evaluation every 200,000 tokens.
        for clm, slm in zip(clm_log[5::5], slm_log[5::5], strict=True):
            clm_right = value(clm, "right")
            slm_right = value(slm, "right")
            row = [percent(longer.wrong), str(longer.dirty), f"{clm['tokens']:,}"]
            row += [f"{clm_right:.1f}", f"{slm_right:.1f}"]
            row += [f"{clm['val_loss']:.3f}", f"{slm['val_loss']:.3f}"]
            yield [*row, f"{slm_right - clm_right:.1f}"]


def lr_table(folder):
    seed = folder / "runs" / "seed1"
    return rates_table([*seed.glob("lr*.jsonl"), seed / f"{CLM_RUN}.jsonl", seed / "clm.jsonl"])


def real_lr_table(folder):
    return rates_table((folder / "real" / "seed1").glob("lr*.jsonl"))


def rates_table(paths):
    """CLM by its length and learning rate; answers only where questions were asked."""
    runs = [read_log(path) for path in paths]
    runs.sort(key=lambda records: (records[-1]["tokens"], records[0]["config"]["lr"]))
    asked = "right" in runs[0][-1]
    header = ["tokens", "learning rate", "CLM's target loss", "corpus loss"]
    yield [*header, "answers right, %"] if asked else header
    for first, *_, last in runs:
        row = [f"{last['tokens']:,}", f"{first['config']['lr']:g}"]
        row += [f"{last['val_loss']:.3f}", f"{last['val_corpus_loss']:.3f}"]
        if asked:
            row.append(f"{value(last, 'right'):.1f}")
        yield row


def kinds_table(folder):
    """Which kinds of token the rule keeps, at an early evaluation, halfway and at the end."""
    seed = folder / "runs" / "seed1"
    losses = read_losses(seed)
    ratio = read_log(seed / "slm.jsonl")[0]["config"]["ratio"]
    masks = kept(losses, "slm", ratio)
    seen = losses["slm seen"]
    shown = [len(seen) // 10, len(seen) // 2, len(seen) - 1]
    yield ["kind of token", "share of tokens", *(f"kept at {seen[i] / 1e6:.1f} M" for i in shown)]
    for kind, name in KINDS.items():
        of_kind = losses["kinds"] == kind
        yield [name, percent(of_kind.mean()), *(percent(masks[i, of_kind].mean()) for i in shown)]
    target = losses["kinds"] == 0
    yield ["precision of target", "", *(percent(target[masks[i]].mean()) for i in shown)]


PAPER_CLASSES = {  # of the paper's 1 B model: share, mean loss at the first and last checkpoint
    "H->H": ("11 %", "3.74 flat"),
    "L->H": ("12 %", "3.30 → 3.84"),
    "H->L": ("26 %", "3.34 → 2.51"),
    "L->L": ("51 %", "0.22 flat"),
}


def dynamics_table(folder):
    return dynamics_rows(read_losses(folder / "runs" / "seed1"))


def dynamics_rows(losses):
    """Shares of the four classes, and their mean loss at the first evaluation and at the last."""
    paper = ["paper: share", "paper: mean loss"]
    yield ["class", *paper, "CLM: share", "CLM: mean loss", "SLM: share", "SLM: mean loss"]
    runs = [dynamics(losses, "dynamics-clm"), dynamics(losses, "dynamics-slm")]
    for name in CLASSES:
        row = [name.replace("->", "→"), *PAPER_CLASSES[name]]
        for classes, moves in runs:
            mine = classes[name]
            row.append(percent(mine.mean()))
            if mine.any():
                means = moves[:, mine].mean(1)
                row.append(f"{means[0]:.2f} → {means[-1]:.2f}")
            else:
                row.append("")
        yield row


# ---- real text, and time -------------------------------------------------------------------------


def real_table(folder):
    arms = ["arm", "seeds", "tokens seen", "trained on", "target loss", "corpus loss"]
    yield arms + [f"{task} right, %" for task in TASKS]
    for run in REAL_RUNS:
        label, *cells = arm_row(run, folder / "real")
        row = [label, str(len(published(run, folder / "real"))), *cells]
        for task in TASKS:
            right, asked = count_answers(run, task, folder / "real")
            low, high = wilson_interval(right, asked)
            row.append(f"{100 * right / asked:.1f} ({100 * low:.1f} to {100 * high:.1f})")
        yield row


def real_model_table(folder):
    """CLM and SLM that start from the reference, at each rate tried, seed 1."""
    part = folder / "real"
    losses = ["target loss", "minus the model's", "corpus loss"]
    yield ["use", "rate", *losses, *(f"{task} right" for task in TASKS)]
    runs = {"ref": ("(the model itself)", "")}
    for arm, started in STARTED.items():
        for rate in started.rates:
            runs[started_name(arm, rate)] = (started.label, rate)
    model_loss = published("ref", part)[1][-1]["val_loss"]
    for run, (label, rate) in runs.items():
        end = published(run, part)[1][-1]
        difference = ""
        if run != "ref":
            difference = f"{end['val_loss'] - model_loss:+.3f}"
        row = [label, rate, f"{end['val_loss']:.3f}", difference, f"{end['val_corpus_loss']:.3f}"]
        for task in TASKS:
            right, asked = count_answers(run, task, part, seeds=1)
            row.append(f"{right} of {asked}")
        yield row


def hours_table(folder):
    """What each experiment took, training and answering, from its logs."""
    yield ["experiment", "runs", "core-hours"]
    for name, commands in (DEMO | REAL).items():
        paths = [path for path in logs_made(commands()) if (folder / path).exists()]
        if paths:
            hours = seconds({path: read_log(folder / path) for path in paths}) / 3600
            yield [name, str(len(paths)), f"{hours:.1f}"]


TABLES = {
    "main": main_table,
    "demo": demo_table,
    "arms": arms_table,
    "fresh": fresh_table,
    "ratio": partial(sweep_table, "ratio"),
    "map": map_table,
    "dirt": dirt_table,
    "references": references_table,
    "long": long_table,
    "factor": factor_table,
    "scope": partial(sweep_table, "scope"),
    "kinds": kinds_table,
    "dynamics": dynamics_table,
    "self": partial(sweep_table, "self"),
    "variants": partial(sweep_table, "variants"),
    "lr": lr_table,
    "sft": sft_table,
    "real": real_table,
    "real-lr": real_lr_table,
    "real-model": real_model_table,
    "uses": uses_table,
    "clean": clean_table,
    "clean-map": clean_map,
    "clean-shares": shares_table,
    "clean-cheap": cheap_table,
    "clean-kept": kept_table,
    "clean-dirtier": dirtier_table,
    "model": model_summary,
    "clean-model": model_table,
    "clean-model-more": model_more_table,
    "clean-model-rates": model_rates_table,
    "clean-trials": trials_table,
    **{table: partial(control_table, table) for table in CONTROLS},
    "slm-lr": slm_rates_table,
    "hours": hours_table,
    "faults": faults_table,
    "hf": hf_table,
    "bench": bench_table,
    "paper": paper_table,
    "memory": memory_table,
}


# ---- publishing ----------------------------------------------------------------------------------


def markdown(rows):
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def content(marker, folder=HERE):
    """What stands at a marker: the table, its findings in sentences, what it was made with."""
    if SOURCES[marker] and not sources(marker, folder):
        return "Not run yet."
    parts = [markdown(TABLES[marker](folder))]
    if marker in FINDINGS:
        parts.append(" ".join(FINDINGS[marker](folder)))
    parts.append(provenance(marker, folder))
    return "\n\n".join(part for part in parts if part)


def fill(text, folder=HERE):
    """A README with every table in it made anew."""

    def section(found):
        marker = found[1]
        return f"<!-- {marker} -->\n{content(marker, folder)}\n<!-- /{marker} -->"

    return re.sub(r"<!-- (\S+) -->\n.*?<!-- /\1 -->", section, text, flags=re.S)


def show(folder):
    """The tables of one set of runs, on the screen."""
    show_table(folder)
    if (folder / "dynamics-slm.jsonl").exists():
        print(markdown(dynamics_rows(read_losses(folder))))


def main(argv=None):
    words = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="tables.py", **words)
    parser.add_argument("folder", nargs="?", type=Path, help="of your own runs, as out/demo")
    publish = "write README.md, results/README.md and results/summary.json"
    parser.add_argument("--publish", action="store_true", help=publish)
    args = parser.parse_args(argv)
    try:
        if args.publish:
            for readme in (HERE.parent / "README.md", HERE / "README.md"):
                readme.write_text(fill(readme.read_text()))
            (HERE / "summary.json").write_text(summary(HERE))
        elif args.folder:
            show(args.folder)
        else:
            for marker in TABLES:
                print(f"{marker}\n\n{content(marker)}\n")
    except InputError as error:
        parser.exit(2, f"tables.py: {error}\n")


if __name__ == "__main__":
    main()
