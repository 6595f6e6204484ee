"""Write the published tables, from the logs alone.

    python results/tables.py        each into its page, between its two markers

A table is a function of the logs. Rates, arms and the comparisons made here were fixed before the
seeds after the first were looked at.
"""

import json
import math
import re
import statistics
import sys
from pathlib import Path

import numpy as np
import pandas
from plots import SEEDS, read_log

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))

from rho import tokens_to_reach  # noqa: E402

FEW = [1, 2, 3]
# Student's t for an interval of 95 %, by the number of values.
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}

# {run: how it is called}
FRONT = {
    "ref": "reference: clean text alone",
    "clm": "CLM: all tokens of the corpus",
    "slm": "SLM: selected tokens of the corpus",
    "clm-mixed": "CLM, 60 % clean text mixed in",
}
MAIN = {
    "ref": "reference",
    "clm": "CLM",
    "slm-random": "random half",
    "slm": "SLM",
    "started": "SLM, started from the reference",
    "clm-mixed": "CLM, 60 % clean text mixed in",
    "clean": "reference, trained for longer",
}
DIRTIER = {
    "ref": "the model itself",
    "d6-started-clm": "CLM, started from the model",
    "d6-started": "SLM, started from the model",
    "d6-new": "SLM, new weights",
    "d6-distilled": "distillation, new weights",
}
RULES = {
    "keep-0.2": "excess, 20 %",
    "slm": "excess, 50 % (SLM)",
    "keep-0.8": "excess, 80 %",
    "half-nat": "excess above 0.5 nats",
    "soft": "all, weighted by excess",
    "pages": "pages, by their mean excess",
    "mask": "excess of another student",
    "slm-ref_loss": "reference's loss, lowest",
    "slm-ref_both": "reference's loss and entropy",
    "self": "the same, 80 %, reference without clean text",
    "slm-loss": "student's loss, highest",
    "slm-random": "random",
}
REAL = {
    "ref": "reference",
    "clm": "CLM",
    "slm-random": "random, 60 %",
    "slm": "SLM, 60 %",
    "slm-30": "SLM, 30 %",
}


class Logs:
    """All logs of a folder: logs[seed, run] is a list, the header and a record an evaluation."""

    def __init__(self, root=HERE / "logs"):
        self.root = Path(root)

    def __getitem__(self, key):
        seed, run = key
        return read_log(Path(self.root, f"seed{seed}", f"{run}.jsonl"))

    def last(self, seed, run):
        """The last evaluation, with the tokens of all models and the share of right answers."""
        header, *_, last = self[seed, run]
        in_all = last["tokens"] + header["tokens_before"]
        return {**last, "in all": in_all, "right, %": 100 * last["right"] / last["questions"]}

    def ends(self, seeds, run, key):
        return [self.last(seed, run)[key] for seed in seeds]

    def real(self):
        return Logs(self.root / "real")


# ==== numbers =====================================================================================


def spread(values, digits):
    """Mean and standard deviation over seeds."""
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    return text


def points(values, others):
    """The mean of the differences, seed by seed, with the interval of 95 %."""
    differences = [value - other for value, other in zip(values, others, strict=True)]
    mean = statistics.mean(differences)
    half = STUDENT[len(differences)] * statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{mean:+.1f} ({mean - half:.1f} to {mean + half:.1f})"


def markdown(rows):
    """Rows, dicts with the same keys, as a table."""
    table = pandas.DataFrame(rows)
    lines = [table.columns, ["---"] * len(table.columns), *table.to_numpy()]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


# ==== tables ======================================================================================


def arms(logs, labels, seeds, *bases):
    """A row for each arm; its points over each of the `bases`, seed by seed."""
    rows = []
    for run, label in labels.items():
        last = logs.last(seeds[0], run)
        right = logs.ends(seeds, run, "right, %")
        row = {"arm": label, "tokens": f"{last['tokens'] / 1e6:.1f} M"}
        row["in all"] = f"{last['in all'] / 1e6:.1f} M"
        row["target loss"] = spread(logs.ends(seeds, run, "val_loss"), 3)
        row["right, %"] = spread(right, 1)
        for base in bases:
            cell = points(right, logs.ends(seeds, base, "right, %")) if run != base else ""
            row[f"points over {labels[base]}"] = cell
        rows.append(row)
    return rows


def with_rates(logs, labels, rows):
    """Rows of arms, with right answers of seed 1 at each rate that was tried; bold: chosen."""
    for run, row in zip(labels, rows, strict=True):
        names = {logs[1, run][0]["flags"]["lr"]: run}
        for path in logs.root.glob(f"seed1/{run}-lr*.jsonl"):
            names[float(path.stem.split("-lr")[1])] = path.stem
        cells = []
        for lr, name in sorted(names.items()):
            cell = f"{1e4 * lr:g}: {logs.last(1, name)['right, %']:.1f}"
            cells.append(f"**{cell}**" if name == run else cell)
        row["rates in 1e-4: right, %, seed 1"] = ", ".join(cells)
    return rows


def front(logs):
    return markdown(arms(logs, FRONT, SEEDS))


def main_table(logs):
    return markdown(with_rates(logs, MAIN, arms(logs, MAIN, SEEDS, "clm", "ref")))


def dirtier(logs):
    return markdown(with_rates(logs, DIRTIER, arms(logs, DIRTIER, FEW, "ref", "d6-started-clm")))


def rules(logs):
    clm = logs.ends(FEW, "clm", "right, %")
    rows = []
    for run, label in RULES.items():
        right = logs.ends(FEW, run, "right, %")
        last = logs.last(1, run)
        row = {"kept": label, "of all tokens": f"{100 * last['trained'] / last['tokens']:.0f} %"}
        row["target loss"] = spread(logs.ends(FEW, run, "val_loss"), 3)
        row["right, %"] = spread(right, 1)
        row["points over CLM"] = points(right, clm)
        rows.append(row)
    return markdown(rows)


def fewer(logs, seed, clm, slm, key, in_all):
    """CLM's tokens, over those that SLM needed to be as good as CLM ends; NaN: it never was.

    in_all: the reference's tokens count, too, and each scored token as a third of one.
    """
    goal = logs.last(seed, clm)
    tokens = tokens_to_reach(logs[seed, slm], goal, key)
    if tokens is None:
        return math.nan
    if in_all:
        tokens += logs.last(seed, "ref")["tokens"] + tokens / 3
    return goal["tokens"] / tokens


def factor(logs):
    comparisons = [
        ("main, 5 seeds", logs, SEEDS, "clm", "slm"),
        ("three times as long, 3 seeds", logs, FEW, "long-clm", "long-slm"),
        ("the same, 6 pieces of dirt", logs, FEW, "long-d6-clm", "long-d6-slm"),
        ("real text, 3 seeds", logs.real(), FEW, "clm", "slm"),
    ]
    rows = []
    for label, source, seeds, clm, slm in comparisons:
        row = {"comparison": label}
        for name, run in (("CLM right, %", clm), ("SLM right, %", slm)):
            row[name] = spread(source.ends(seeds, run, "right, %"), 1)
        for in_all, of in ((False, "fewer"), (True, "fewer in all")):
            for key, by in (("right", "answers"), ("val_loss", "loss")):
                values = [fewer(source, seed, clm, slm, key, in_all) for seed in seeds]
                never = sum(map(math.isnan, values))
                text = f"never in {never} of {len(values)}" if never else spread(values, 1)
                row[f"{of}, by {by}"] = text
        rows.append(row)
    return markdown(rows)


def dynamics(logs):
    """The classes of section 2.1, by a line through the losses of each token.

    From 0.5 M tokens on, so that the model can read already, as the paper's could.
    """
    stored = np.load(logs.root / "tokens.npz")
    losses = stored["clm"][stored["tokens"] > 450_000].astype(float)  # (evaluations, N)
    last = losses[-1]
    x = np.arange(len(losses))
    change = np.polyfit(x, losses, 1)[0] * x[-1]  # (N,)
    fell, rose = change < -0.2, change > 0.2
    rest = ~fell & ~rose
    low = last <= last.mean()
    masks = {"stays high": rest & ~low, "rises": rose, "falls": fell, "stays low": rest & low}
    shares = {"here": [100 * mask.mean() for mask in masks.values()]}
    shares |= {"paper, 1 B": [11, 12, 26, 51], "paper, 7 B": [8, 13, 28, 51]}
    rows = []
    for label, numbers in shares.items():
        cells = [f"{number:.0f} %" for number in numbers]
        rows.append({"loss of a token": label, **dict(zip(masks, cells, strict=True))})
    return markdown(rows)


def real(logs):
    # In all, each has also read what the base model read. Answers: too few for points.
    rows = arms(logs.real(), REAL, FEW)
    return markdown([{key: row[key] for key in row if key != "in all"} for row in rows])


def bench(logs):
    rows = [json.loads(line) for line in (HERE / "bench.jsonl").read_text().splitlines()]
    where = f"{rows[0]['processor']}, {rows[0]['threads']} threads, commit {rows[0]['commit']}"
    return markdown([{"ratio": r["row"], where: f"{r['ratio']:.2f}"} for r in rows])


# ==== pages =======================================================================================

HERE_PAGE, FRONT_PAGE = HERE / "README.md", HERE.parent / "README.md"
TABLES = {
    "front": (FRONT_PAGE, front),
    "main": (HERE_PAGE, main_table),
    "dirtier": (HERE_PAGE, dirtier),
    "rules": (HERE_PAGE, rules),
    "factor": (HERE_PAGE, factor),
    "dynamics": (HERE_PAGE, dynamics),
    "real": (HERE_PAGE, real),
    "bench": (HERE_PAGE, bench),
}


def publish(page, name, table):
    """The text of a page with a table between its markers."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    text, n = re.subn(pattern, lambda m: f"{m[1]}{table}\n{m[2]}", page, flags=re.S)
    if n != 1:
        sys.exit(f"a page needs the markers <!-- {name} --> and <!-- /{name} --> once")
    return text


def main():
    logs = Logs()
    for name, (path, table) in TABLES.items():
        path.write_text(publish(path.read_text(), name, table(logs)))


if __name__ == "__main__":
    main()
