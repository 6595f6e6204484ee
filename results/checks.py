"""Tables and sentences about the program itself: its speed, its memory, its faults, other tools.

tables.py and findings.py publish them with the others. Each function takes the folder of the
published logs; a table yields rows of text, header first, and `..._sentences` pieces of sentences.
"""

import json
from collections import Counter

from logs import read_log

# ---- speed ---------------------------------------------------------------------------------------


def bench_table(folder):
    yield ["ratio", "median", "lowest", "highest"]
    for record in read_log(folder / "bench.jsonl"):
        numbers = [record["ratio"], record["low"], record["high"]]
        yield [record["name"], *(f"{number:.2f}" for number in numbers)]


def bench_sentences(folder):
    records = read_log(folder / "bench.jsonl")
    machines = {f"{r['cores']} cores, {r['machine']}, torch {r['torch']}" for r in records}
    yield "Measured on " + "; ".join(sorted(machines)) + "."


# Ratios that are also known by a name without a shape: {name: the row of the bench}.
HEADLINE_RATIOS = {
    "step_slm_over_plain": "step_slm_over_plain 6x384",
    "step_slm_over_online_ref": "step_slm_over_online_ref 6x384",
    "step_clm_over_plain": "step_clm_over_plain 6x384",
    "loss_memory_over_plain": "loss_memory_over_plain 6x384",
    "score_rate_over_forward": "score_rate_over_forward 6x384",
    "fraction_of_peak": "fraction_of_peak 6x384",
    "generate_rate_over_uncached": "generate_rate_over_uncached 32 rows 6x384",
    "generate_rate_over_transformers": "generate_rate_over_transformers 32 rows 6x384",
}


def bench_summary(folder):
    ratios = {record["name"]: record["ratio"] for record in read_log(folder / "bench.jsonl")}
    headlines = {name: ratios[row] for name, row in HEADLINE_RATIOS.items() if row in ratios}
    return headlines | ratios


def paper_table(folder):
    """The paper's 1 B run in hours, from counted operations alone; TinyLlama's shape."""
    attention = 2 * 2048**2 + 2 * 2048 * 256  # multiplications for a token in one layer
    scores = 2048 * 2048  # q times k, then times v: over half of 2,048 tokens on average
    mlp = 3 * 2048 * 5632
    inside = 22 * (attention + scores + mlp)
    head = 2048 * 32000
    forward = inside + head
    rate = 0.4 * 989e12  # an H100's peak in bf16, 40 % of it
    tokens = 15e9
    costs = {
        "reference: 3 epochs of 0.5 B tokens": 1.5e9 * 3 * forward,
        "scoring 15 B tokens once (30 GB on disk)": tokens * forward,
        "student, CLM": tokens * 3 * forward,
        "student, SLM 60 %, scores from disk": tokens * (forward + 2 * (inside + 0.6 * head)),
        "student, SLM with the reference online": tokens * 4 * forward,
    }
    yield ["stage", "1 H100", "8 H100", "32 H100"]
    for stage, multiplications in costs.items():
        hours = 2 * multiplications / rate / 3600
        yield [stage, *(f"{hours / gpus:.1f} h" for gpus in (1, 8, 32))]


# ---- memory --------------------------------------------------------------------------------------


def memory_table(folder):
    """The largest micro-batch that fits on each card; "no" where not even one window does."""
    records = [record for record in read_log(folder / "memory.jsonl") if "card_gb" in record]
    cards = sorted({record["card_gb"] for record in records})
    cells = {}
    for record in records:
        row = cells.setdefault((record["model"], record["optimizer"], record["processes"]), {})
        row[record["card_gb"], record["recompute"]] = memory_cell(record)
    header = ["model", "optimizer", "GPUs"]
    for card in cards:
        header += [f"{card} GB", f"{card} GB, --recompute"]
    yield header
    for (model, optimizer, processes), row in cells.items():
        found = [row[card, recompute] for card in cards for recompute in (False, True)]
        yield [model, optimizer, str(processes), *found]


def memory_cell(record):
    """`8 windows: 19.8 GB`, or `no: 147.2 GB`."""
    windows = record["micro_batch"]
    fits = "no"
    if windows:
        fits = f"{windows} windows" if windows > 1 else "1 window"
    return f"{fits}: {record['needed_gb']:.1f} GB"


def memory_sentences(folder):
    records = read_log(folder / "memory.jsonl")
    tokens = {record["tokens"] for record in records if "standing_gb" in record}
    (window,) = tokens
    yield f"Windows of {window:,} tokens. The pieces were measured on a CPU, not on a card."
    checks = [record for record in records if "check" in record]
    ratios = [record["summed_over_peak"] for record in checks]
    yield f"Beside the true peak of a step on a CPU ({checks[0]['check']}; {len(checks)} settings)"
    yield f"their sum is {min(ratios):.2f} to {max(ratios):.2f} times as large."


# ---- other people's models and tools -------------------------------------------------------------


def read_hf(folder):
    return json.loads((folder / "hf.json").read_text())


# What a test calls a family, where that says too little in a table.
FAMILIES = {"linear": "Llama with linear scaling"}


def hf_table(folder):
    found = read_hf(folder)
    yield ["what", "compared with", "found"]
    if "families_equal" in found:
        families = found["families_equal"]
        names = ", ".join(FAMILIES.get(name, name) for name in families["names"])
        outcome = f"{families['n']} equal: {names}"
        yield ["families: logits and greedy text, in and out", "transformers", outcome]
    if "smollm2" in found:
        yield from smollm2_rows(found["smollm2"])
    if "train" in found:
        yield from train_rows(found["train"])
    if "lm_eval" in found:
        outcome = "{right_eval_math} of {n} here, {right_lm_eval} of {n} there"
        outcome = outcome.format_map(found["lm_eval"])
        yield ["a demo student, exported: right answers", "lm-evaluation-harness", outcome]


def smollm2_rows(values):
    name = f"SmolLM2-{values['parameters'] / 1e6:.0f}M"
    differences = [values[f"logits_difference_{kind}"] for kind in ("float32", "float64")]
    of = f"of logits up to {values['largest_logit']:.0f}"
    outcome = "{:.0e} in float32, {:.0e} in float64".format(*differences)
    yield [f"{name}: largest difference of logits", "transformers", f"{outcome}, {of}"]
    yield [f"{name}: the same token ids", "transformers", values["same_ids"]]
    same = "the same" if values["same_greedy_text"] else "another"
    yield [f"{name}: greedy text", "transformers", same]
    outcome = f"{values['loss_nats']:.2f} nats on {values['loss_is_of']}"
    yield [f"{name}: loss on prose", "", outcome]


def train_rows(values):
    slm = values["slm"]
    what = f"SmolLM2: {slm['tokens']:,} tokens of SLM, {slm['trained']:,} of them selected"
    losses = " → ".join(f"{loss:.2f}" for loss in slm["val_loss"])
    yield [what, "", f"target loss {losses} nats at its evaluations"]


def hf_sentences(folder):
    found = read_hf(folder)
    commits = Counter(values["commit"] for values in found.values())
    yield f"Measured at commit {', '.join(commits)}"
    packages = {}
    for values in found.values():
        packages |= values["packages"]
    yield "with " + ", ".join(f"{name} {version}" for name, version in packages.items()) + "."


def hf_summary(folder):
    found = read_hf(folder)
    summary = {}
    if "families_equal" in found:
        summary["families_equal"] = found["families_equal"]["n"]
    if "lm_eval" in found:
        summary["lm_eval_difference"] = found["lm_eval"]["difference"]
    return summary


# ---- faults --------------------------------------------------------------------------------------


def read_faults(folder):
    """{part: its last row}; {} where faults.py has not been run."""
    path = folder / "faults.jsonl"
    if not path.exists():
        return {}
    return {row["part"]: row for row in read_log(path)}


# {part: [(what was done, how often, what was found), ...]}, filled in with the part's row.
FAULTS = {
    "kills": [
        (
            "`kill -9` at a random moment, up to three in a row, then the same command again",
            "{kills:,} kills",
            "{bit_identical:,} of {ends:,} ends bit-identical to an undisturbed run",
        ),
        (
            "Ctrl-C or SIGTERM, then the same command again",
            "{signals:,} signals",
            "{one_line_and_resumed:,} said so in one line and resumed",
        ),
    ],
    "fuzz": [
        (
            "hostile inputs to the public functions",
            "{inputs_fuzzed:,} calls",
            "{crashes:,} undocumented exceptions or wrong results, {slow:,} over half a second",
        )
    ],
    "damage": [
        (
            "a file cut short, emptied, with a bit flipped, or garbage",
            "{damaged:,} files",
            "{refused_in_one_line:,} refused in one line, {ran_right:,} ran as without damage",
        )
    ],
    "full_disk": [
        (
            "a disk that fills up",
            "{full:,} times",
            "{one_line:,} said so in one line, {old_files_intact:,} left old files intact, "
            "{ends_right:,} ended right with room again",
        )
    ],
    "writers": [
        (
            "two writers of one run or data set",
            "{pairs:,} pairs",
            "{one_refused_one_right:,} times one refused and one ended right",
        ),
        (
            "two writers of the same scores",
            "{score_pairs:,} pairs",
            "{score_pairs_same_bytes:,} times both ended with the same bytes",
        ),
    ],
    "memory": [
        (
            "a long run: anonymous memory after its first two minutes",
            "{minutes:.0f} minutes, {steps:,} steps",
            "{mean_mb:.0f} MB, highest minus lowest {spread:.1%}, {mb_per_hour:+.1f} MB an hour",
        )
    ],
}


def faults_table(folder):
    yield ["what", "how often", "found"]
    measured = read_faults(folder)
    for part, rows in FAULTS.items():
        if part in measured:
            for row in rows:
                cells = [text.format_map(measured[part]) for text in row]
                yield [cell.replace("%", " %") for cell in cells]


def faults_sentences(folder):
    measured = read_faults(folder)
    failed = sum(row["n_failed"] for row in measured.values())
    yield f"{failed:,} attempts ended otherwise than they should."
    places = Counter(f"commit {row['commit']}, {row['machine']}" for row in measured.values())
    yield f"Measured at {'; '.join(places)}."


MOST_KILLS = 3  # before an end, see faults.py


def faults_summary(folder):
    """bit_identical: kills after which the end was; at least so many where one end was not."""
    measured = read_faults(folder)
    summary = {}
    if "kills" in measured:
        row = measured["kills"]
        other_ends = row["ends"] - row["bit_identical"]
        summary["kills"] = row["kills"]
        summary["bit_identical"] = max(0, row["kills"] - MOST_KILLS * other_ends)
    if "fuzz" in measured:
        summary["inputs_fuzzed"] = measured["fuzz"]["inputs_fuzzed"]
        summary["crashes"] = measured["fuzz"]["crashes"]
    return summary
