"""Reading the logs, pairing them by seed, and the few statistics that the tables need.

    python results/logs.py --collect    copy the logs of your own runs from out/ into results/

Terms: a run is one training; its log holds a header, then one record for each evaluation. An arm
is a run's rule (CLM, SLM, ...). A part is a folder of seed*/ folders: runs (the demo), fresh (two
seeds more of its main table) or real.
"""

import argparse
import json
import statistics
import sys
from collections import Counter
from fnmatch import fnmatch
from math import comb
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from controls import (  # noqa: E402
    BEGUN_ARMS,
    BETTER,
    BETTER_SLM,
    CLEAN_CELLS,
    CLOSE_CELL,
    CONTROL_CLM,
    CONTROL_SLM,
    CONTROLS,
    KEPT_CELL,
    KEPT_MIXES,
    KEPT_RATIOS,
    MODEL_RATES,
    MODEL_RATIO,
    MODEL_RATIOS,
    MODEL_TRIED,
    SLM_RATES,
    TRIED,
    TRIED_MIX,
    TRIED_RATIOS,
    USES,
    kept_name,
    model_name,
    new_rate_name,
    ratio_name,
    trial_name,
    tried_name,
    use_name,
)
from experiments import CLM_RUN, MAIN_RUNS, REAL_RUNS, SLM_RUN  # noqa: E402

from rho import read_log, read_runs, tokens_to_reach, total_seconds, value  # noqa: E402, F401

# The kinds of token that prepare_data.py writes down, and one that read_losses adds.
SLIP = 6
KINDS = {
    0: "target text",
    SLIP: "a slip: the wrong number itself",
    1: "what follows a slip",
    2: "chatter",
    3: "article",
    4: "boilerplate",
    5: "noise",
}
CLASSES = ["H->H", "L->H", "H->L", "L->L"]
LOSS_RUNS = ["ref", "clm", "slm", "dynamics-clm", "dynamics-slm"]

# Student's t for a 95 % interval: {n values: t with n - 1 degrees of freedom}, n from 2 to 10.
T95 = dict(enumerate((12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262), start=2))


# ---- reading -------------------------------------------------------------------------------------


def published(run, part="runs"):
    """{seed: records} of a published run. part: a folder of seed*/, by itself one in results/."""
    folder = HERE / part  # an absolute part stays as it is
    paths = sorted(folder.glob(f"seed*/{run}.jsonl"))
    return {int(path.parent.name.removeprefix("seed")): read_log(path) for path in paths}


# ---- where a table comes from --------------------------------------------------------------------

MAIN_LOGS = [f"runs/seed*/{run}.jsonl" for run in MAIN_RUNS]
FRESH_LOGS = [f"fresh/seed*/{run}.jsonl" for run in MAIN_RUNS]
BASELINES = [f"runs/seed*/{CLM_RUN}.jsonl", f"runs/seed*/{SLM_RUN}.jsonl"]
DEMO_USES = [use_name("1", "third", arm) for arm in ("ref", *USES)]
MAP_LOGS = []
for cell, seeds in CLEAN_CELLS.items():
    runs = [use_name(*cell, arm) for arm in ("ref", *USES)]
    MAP_LOGS += [f"runs/seed{seed}/{run}.jsonl" for seed in seeds for run in runs]
MIX_TRIALS = []
for amount, tried in TRIED_MIX.items():
    MIX_TRIALS += [use_name(amount, "third", "mixed_clm", mix) for mix in tried]
BOTH = [use_name(*CLOSE_CELL, arm) for arm in ("mixed_clm", "mixed_slm")]
CHEAP_TRIALS = [ratio_name(ratio) for ratio in TRIED_RATIOS]
CHEAP_TRIALS += [new_rate_name(arm) for arm in BEGUN_ARMS]
KEPT_RUNS = [use_name(*KEPT_CELL, "mixed_slm")]
for mix in KEPT_MIXES:
    KEPT_RUNS.append(use_name(*KEPT_CELL, "mixed_clm", mix))
    KEPT_RUNS += [tried_name(mix, ratio) for ratio in KEPT_RATIOS]
MODEL_RUNS = {arm: model_name(arm, rate) for arm, rate in MODEL_RATES.items()}
MODEL_USE_RUNS = [run for arm, run in MODEL_RUNS.items() if arm in USES]
MORE_RUNS = ["ref", *(kept_name(ratio) for ratio in (MODEL_RATIO, *MODEL_RATIOS))]
MODEL_TRIALS = [model_name(arm, rate) for arm, rates in MODEL_TRIED.items() for rate in rates]
TRIALS = [trial_name(arm, rate) for arm, rates in TRIED.items() for rate in rates]
SLM_TRIALS = [trial_name("slm", rate) for rate in (*TRIED["slm"], *SLM_RATES)]
# {table: the files that it is made from, as patterns within results/}.
SOURCES = {
    "main": MAIN_LOGS,
    "demo": ["demo/*.jsonl"],
    "arms": MAIN_LOGS,
    "fresh": [*MAIN_LOGS, *FRESH_LOGS],
    "ratio": ["runs/seed*/ratio-*.jsonl", "runs/seed*/threshold-*.jsonl"],
    "map": ["runs/seed*/w*-*.jsonl", *BASELINES],
    "dirt": ["runs/seed*/w*-*.jsonl", *BASELINES, "runs/shares.json"],
    "references": ["runs/seed[123]/ref*.jsonl", "runs/seed*/slm-ref-*.jsonl", *BASELINES],
    "long": ["runs/seed1/long*.jsonl"],  # and of ref.jsonl the reference's right answers
    "factor": [  # and of ref.jsonl the number of tokens
        *("runs/seed*/clm.jsonl", "runs/seed*/slm.jsonl", "runs/seed1/long*.jsonl"),
        *("runs/seed*/w*-*.jsonl", *BASELINES),
    ],
    "scope": ["runs/seed*/scope-*.jsonl", *BASELINES],
    "kinds": ["runs/seed1/losses.npz", "runs/seed1/slm.jsonl"],
    "dynamics": ["runs/seed1/losses.npz"],
    "self": ["runs/seed*/self-*.jsonl", "runs/seed*/random-0.[78].jsonl", BASELINES[0]],
    "variants": [
        "runs/seed*/variant-*.jsonl",
        "runs/seed*/rule-*.jsonl",
        "runs/seed*/random-0.5.jsonl",
        *BASELINES,
    ],
    "lr": ["runs/seed1/lr*.jsonl", f"runs/seed1/{CLM_RUN}.jsonl", "runs/seed1/clm.jsonl"],
    "sft": ["runs/seed*/sft-*.jsonl"],
    "real": [*(f"real/seed*/{run}.jsonl" for run in REAL_RUNS), "real/answers.json"],
    "real-lr": ["real/seed1/lr*.jsonl"],
    "real-model": ["real/seed1/ref.jsonl", "real/seed1/started-*.jsonl", "real/answers.json"],
    "uses": [f"runs/seed*/{run}.jsonl" for run in DEMO_USES],
    "clean": [f"runs/seed*/{run}.jsonl" for run in DEMO_USES],
    "clean-map": MAP_LOGS,
    "clean-shares": [f"runs/seed1/{run}.jsonl" for run in MIX_TRIALS],
    "clean-cheap": [f"runs/seed*/{run}.jsonl" for run in (*BOTH, *CHEAP_TRIALS)],
    "clean-kept": [f"runs/seed1/{run}.jsonl" for run in KEPT_RUNS],
    "clean-dirtier": ["runs/seed1/dirty-*.jsonl"],
    "model": [f"runs/seed*/{run}.jsonl" for run in ("ref", *MODEL_USE_RUNS)],
    "clean-model": [f"runs/seed*/{run}.jsonl" for run in ("ref", *MODEL_RUNS.values())],
    "clean-model-more": [
        *(f"runs/seed1/{run}.jsonl" for run in MORE_RUNS),
        *(f"runs/seed[123]/{run}.jsonl" for run in (BETTER, BETTER_SLM)),
    ],
    "clean-model-rates": [f"runs/seed1/{run}.jsonl" for run in MODEL_TRIALS],
    "clean-trials": [f"runs/seed1/{run}.jsonl" for run in TRIALS],
    **{
        table: [f"runs/seed*/{run}.jsonl" for run in (CONTROL_CLM, CONTROL_SLM, *controls)]
        for table, controls in CONTROLS.items()
    },
    "slm-lr": [f"runs/seed1/{run}.jsonl" for run in SLM_TRIALS],
    "hours": ["runs/seed*/*.jsonl", *FRESH_LOGS, "real/base.jsonl", "real/seed*/*.jsonl"],
    "faults": ["faults.jsonl"],
    "hf": ["hf.json"],
    "bench": ["bench.jsonl"],
    "paper": [],
    "memory": ["memory.jsonl"],
}


def sources(table, folder=HERE):
    """The files that a table is made from, in order."""
    found = set()
    for pattern in SOURCES[table]:
        found.update(folder.glob(pattern))
    return sorted(found)


def provenance(table, folder=HERE):
    """The commits of a table's logs as a sentence, the commit of most logs first."""
    paths = []
    for path in sources(table, folder):
        if path.name == "losses.npz":  # packed from runs whose logs stand beside it
            paths += [path.with_name(f"{run}.jsonl") for run in LOSS_RUNS]
        elif path.suffix == ".jsonl":
            paths.append(path)
    headers = [read_log(path)[0] for path in paths]
    commits = Counter(header["commit"] for header in headers if "config" in header)
    if not commits:
        return ""
    names = ", ".join(commit for commit, _ in commits.most_common())
    return f"Logs: commit {names}." if len(commits) == 1 else f"Logs: commits {names}."


def where(header):
    """The size of a run's model, and what it was run on."""
    params = f"{header['params'] / 1e6:.1f} M parameters"
    model = f"{params}, windows of {header['config']['block_size']}"
    return f"{model}; {header['device']}, {header['threads']} thread(s), torch {header['torch']}"


# ---- statistics ----------------------------------------------------------------------------------


def ends(run, key, part="runs"):
    """Where each seed of a run ended."""
    return [value(records[-1], key) for records in published(run, part).values()]


def gains(run, other, key="right", part="runs"):
    """run minus other where both ended, seed by seed; only of seeds that both have."""
    mine = published(run, part)
    theirs = published(other, part)
    both = [seed for seed in mine if seed in theirs]
    return [value(mine[seed][-1], key) - value(theirs[seed][-1], key) for seed in both]


def deviation(values):
    """Standard deviation over seeds; 0 for a single one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def spread(values, digits=1):
    """Mean ± standard deviation over seeds as text; of a single seed only the value."""
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {deviation(values):.{digits}f}"


def percent(share):
    return f"{100 * share:.0f} %"


def interval(values):
    """(mean, low, high): the mean of paired differences and its 95 % interval, Student's t."""
    mean = statistics.mean(values)
    half = T95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def with_interval(values, digits=1):
    """`+2.7 (0.1 to 5.3)`: mean and 95 % interval of paired differences; of one the value alone."""
    if len(values) == 1:
        return f"{values[0]:+.{digits}f}"
    # Adding 0.0 turns a rounded -0.0 into 0.0.
    mean, low, high = [round(x, digits) + 0.0 for x in interval(values)]
    return f"{mean:+.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def tokens_between(records, goal_record, key):
    """As tokens_to_reach, but read off the line between the evaluations before and after.

    At the first evaluation nothing comes before: its own tokens, an upper bound, are returned.
    """
    reached = tokens_to_reach(records, goal_record, key)
    seen = [record.get("tokens") for record in records]
    if reached is None or reached == seen[1]:
        return reached
    after = records[seen.index(reached)]
    before = records[seen.index(reached) - 1]
    start = value(before, key)
    share = (value(goal_record, key) - start) / (value(after, key) - start)
    return before["tokens"] + share * (after["tokens"] - before["tokens"])


def times_fewer(slm, clm, key, between=False):
    """How many times fewer tokens SLM needs to be, for good, where CLM ends; None where never.

    On the grid of evaluations the answer errs against SLM; between=True interpolates.
    """
    reach = tokens_between if between else tokens_to_reach
    tokens = reach(slm, clm[-1], key)
    return clm[-1]["tokens"] / tokens if tokens else None


def main_pairs(part="runs"):
    """What the headline compares, seed by seed: {name: [one value a seed]}.

    times_*: how many times fewer tokens, see times_fewer; times_seconds: the same of the time spent
    in training; times_all: the time of the reference, of scoring and of SLM until it is where CLM
    ends, over CLM's. None stands for a seed in which SLM never stays where CLM ends.
    """
    names = ["points", "points_over_ref", "times_right", "times_loss"]
    found = {name: [] for name in [*names, "times_seconds", "times_all"]}
    refs, clms, slms = (published(run, part) for run in ("ref", "clm", "slm"))
    for seed, slm in slms.items():
        ref, clm = refs[seed], clms[seed]
        right = value(slm[-1], "right")
        found["points"].append(right - value(clm[-1], "right"))
        found["points_over_ref"].append(right - value(ref[-1], "right"))
        found["times_right"].append(times_fewer(slm, clm, "right"))
        found["times_loss"].append(times_fewer(slm, clm, "val_loss"))

        reached = tokens_to_reach(slm, clm[-1], "right")
        times_seconds = times_all = None
        if reached is not None:
            spent = next(r["seconds"] for r in slm[1:] if r["tokens"] == reached)
            whole = clm[-1]["seconds"]
            scoring = whole / 3  # one forward pass, of a step's forward and twofold backward
            times_seconds = whole / spent
            times_all = (ref[-1]["seconds"] + scoring + spent) / whole
        found["times_seconds"].append(times_seconds)
        found["times_all"].append(times_all)
    return found


def count_answers(run, task, part="real", seeds="*"):
    """(right, asked) of a task's questions, over all seeds together or those named."""
    answers = json.loads((HERE / part / "answers.json").read_text())
    right = asked = 0
    for name, (seed_right, seed_asked) in answers.items():
        if fnmatch(name, f"seed{seeds}/{run}.{task}"):
            right += seed_right
            asked += seed_asked
    return right, asked


def fisher_p(right_a, asked_a, right_b, asked_b):
    """Two-sided p of Fisher's exact test: tables no likelier than the one found, all together."""
    right = right_a + right_b
    all_ways = comb(asked_a + asked_b, right)

    def ways(a):  # tables in which the first arm has a of the right answers
        return comb(asked_a, a) * comb(asked_b, right - a)

    found = ways(right_a)
    as_extreme = [ways(a) for a in range(right + 1) if ways(a) <= found]
    return sum(as_extreme) / all_ways


def seconds(runs):
    """Of training and of answering, over all runs of {run: records}."""
    return sum(total_seconds(records) for records in runs.values())


# ---- the losses of single tokens -----------------------------------------------------------------


def read_losses(folder):
    """The losses of the same held-out corpus tokens at every evaluation of the runs in a folder.

    {run: (evaluations, N) nats, run + " seen": tokens seen at each evaluation, run + " on": whether
    it goes on from clm.pt, "text": token ids (N,), "kinds": (N,) keys of KINDS, or empty}.
    The runs are those of LOSS_RUNS that are there; {} where there are none.
    """
    folder = Path(folder)
    if (folder / "losses.npz").exists():
        return dict(np.load(folder / "losses.npz"))
    losses = {}
    for run in LOSS_RUNS:
        log = folder / f"{run}.jsonl"
        if not log.exists():
            continue
        header, *records = read_log(log)
        paths = [folder / run / f"{record['step']}.npy" for record in records]
        losses[run] = np.stack([np.load(path).flatten() for path in paths])
        losses[f"{run} seen"] = np.array([record["tokens"] for record in records])
        losses[f"{run} on"] = header["config"].get("init", "").endswith("clm.pt")
        n = losses[run].shape[1]
        data = Path(header["config"]["data"])
    if losses:
        losses["text"], losses["kinds"] = corpus_tokens(data, n)
    return losses


def corpus_tokens(data, n):
    """(token ids, kinds) of the first n targets of the held-out corpus; kinds are the demo's."""
    meta = json.loads((data / "meta.json").read_text())
    text = np.fromfile(data / "val_corpus.bin", meta["dtype"])[1 : n + 1]
    if not (data / "kinds.npz").exists():
        return text, np.empty(0)
    kinds = np.load(data / "kinds.npz")["val_corpus"][1 : n + 1]
    # The slip itself: the digits that a run of kind 1 begins with. In the demo's vocabulary each
    # digit is a token, numbered as its byte.
    for i in np.flatnonzero(kinds == 1):
        in_what_follows = i > 0 and kinds[i - 1] == 1
        if chr(text[i]).isdigit() and not in_what_follows:
            kinds[i] = SLIP
    return text, kinds


def kept(losses, run, ratio):
    """(evaluations, N) bool: what select_tokens would keep, by the excess over the reference."""
    excess = losses[run].astype(float) - losses["ref"][-1]
    lowest = np.quantile(excess, 1 - ratio, axis=1, keepdims=True)
    return excess >= lowest


def token_dynamics(losses):
    """Class of each token by how its loss moved (N,): H->L (learned), L->H, L->L (easy) or H->H.

    losses (n + 1, N): the tokens' losses at n + 1 evenly spaced checkpoints, nats. A least-squares
    line that falls or rises by over 0.2 is a move; else the last mean loss divides (section 2.1).
    """
    losses = np.asarray(losses, np.float32)
    slope = np.polyfit(np.arange(len(losses)), losses, 1)[0]  # (N,)
    change = slope * (len(losses) - 1)
    flat = np.where(losses[-1] <= losses[-1].mean(), "L->L", "H->H")
    return np.select([change < -0.2, change > 0.2], ["H->L", "L->H"], flat)


def dynamics(losses, run):
    """({class: mask (N,)}, losses (1 + evaluations, N)) of a run that goes on from clm.pt."""
    moves = losses[run]
    if losses.get(f"{run} on", True):
        moves = np.concatenate([losses["clm"][-1:], moves])
    moves = moves.astype(float)
    found = token_dynamics(moves)
    return {name: found == name for name in CLASSES}, moves


# ---- collecting ----------------------------------------------------------------------------------


def copy_logs(paths, source, target):
    for path in paths:
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())


def collect(out, data, results=HERE):
    """Logs from out/ into results/: seed 1's losses packed, answers counted, shares noted."""
    copy_logs(out.glob("seed*/*.jsonl"), out, results / "runs")
    copy_logs(out.glob("fresh/seed*/*.jsonl"), out, results)
    real = [path for path in out.glob("real/**/*.jsonl") if "answers" not in path.name]
    copy_logs(real, out, results)

    answers = {}
    for path in sorted(out.glob("real/seed*/*.answers.jsonl")):
        records = read_log(path)
        name = f"{path.parent.name}/{path.name.removesuffix('.answers.jsonl')}"
        answers[name] = [sum(record["correct"] for record in records), len(records)]
    if answers:
        (results / "real" / "answers.json").write_text(json.dumps(answers, indent=1) + "\n")

    # What was checked of the real text, and which files it was made from.
    real_meta = data / "real" / "meta.json"
    if real_meta.exists():
        copy_logs([real_meta], data, results)

    if (out / "seed1" / "dynamics-slm.jsonl").exists():
        np.savez_compressed(results / "runs/seed1/losses.npz", **read_losses(out / "seed1"))

    # The share of each demo's tokens that is target text.
    shares = json.loads((results / "runs" / "shares.json").read_text())
    for path in sorted(data.glob("*/kinds.npz")):
        kinds = np.load(path)["train"]
        shares[path.parent.name] = round(float((kinds == 0).mean()), 4)
    (results / "runs" / "shares.json").write_text(json.dumps(shares, indent=1) + "\n")


def main(argv=None):
    words = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="logs.py", **words)
    help = "copy the logs from out/ into results/, which is what the tables are made from"
    parser.add_argument("--collect", action="store_true", required=True, help=help)
    parser.parse_args(argv)
    collect(Path("out"), Path("data"))


if __name__ == "__main__":
    main()
