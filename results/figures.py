"""Draw every picture, and write every table of the README, from logs alone.

    python results/figures.py out/demo    one set of runs: its table, picture and page of tokens
    python results/figures.py             the published logs: pictures, summary.json, README tables
    python results/figures.py commands    the commands that made the published logs, one job a line
    python results/figures.py commands real                     those of the runs on real text
    python results/figures.py collect     their logs, and seed 1's looks, into results/
    python results/figures.py tokenizer 4096 data/bpe A.jsonl B.jsonl   a small one, of this text

rho.py computes, this file draws; no number in the README is typed by hand.
"""

import base64
import heapq
import json
import re
import statistics
import sys
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import regex

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
KINDS = {0: "target text", 6: "a slip: the wrong number itself", 1: "what follows a slip"}
KINDS |= {2: "chatter", 3: "article", 4: "furniture", 5: "noise"}  # as in prepare_data.py, but 6
ARMS = {  # run: (label, color)
    "ref": ("reference (clean text only)", "#2b6cb0"),
    "clm": ("CLM: all tokens", "#8a8f98"),
    "slm-random": ("random tokens", "#d6a03a"),
    "slm": ("SLM: selected tokens", "#c8372d"),
    "slm-oracle": ("oracle: target tokens", "#4a9a5b"),
}
REAL = {run: ARMS[run] for run in ("ref", "clm", "slm-random", "slm")}
REAL |= {
    "slm-30": ("SLM, 30 % selected", "#8e44ad"),
    "self-ref_loss": ("self-reference: low loss, 70 %", "#555555"),
    "self-ref_both": ("self-reference: both, 70 %", "#555555"),
}
TASKS = ("singleop", "addsub")  # of MAWPS: the easiest word problems there are
TITLES = {
    "right": "questions answered right, %",
    "val_loss": "loss on held-out target text, nats",
    "val_corpus_loss": "loss on held-out corpus text, nats",
}
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # Student's t for a 95 % interval of n values
LONG, SHORT = "--tokens 2000000 --evals 20", "--evals 3"
LR = {900_000: ("3.75e-4", "5e-4", "1e-3", "1.5e-3", "3e-3")}  # 7.5e-4 is ratio-1.0's
LR |= {2_000_000: ("5e-4", "1e-3")}  # and the main table's
REAL_LR, REAL_LR_CHOSEN = ("5e-4", "1e-3", "2e-3", "4e-3"), "2e-3"
# share of wrong answers, and pieces of dirt
DIRT = [(0, 0), (0, 1), (0, 3), (0.5, 1), (0.5, 3), (0.75, 1), (0.75, 3), (0.75, 6), (0.9, 1)]
REFERENCES = {  # --n_ref, and the reference's shape where it is not the student's
    "1500": ("0.3 x clean text", ""),
    "15000": ("3 x clean text", ""),
    "50000": ("10 x clean text, 3.3 times as long", "--ref_tokens 3000000"),
    "small": ("smaller: 2 x 64", "--n_layer 2 --n_embd 64 --n_inner 192 --n_head 2 --n_kv_head 2"),
    "large": ("larger: 3 x 192", "--n_embd 192 --n_inner 576"),
}
VARIANTS = {  # a change of results/variants/NAME.diff: (what it does, flags)
    "soft": ("every token, weighted by sigmoid(2 x excess)", ""),
    "falling": ("share kept falls from 100 % to 30 %", " --ratio 0.3"),
    "averaged": ("two references, their losses averaged", ""),
    "sure": ("excess, where the reference is below 1 nat; 40 %", " --ratio 0.4"),
    "absolute": ("excess without its sign: a mistake", ""),
}
ALONE = {"loss": "student's loss alone", "ref_loss": "reference's loss alone"}
LONGER = {  # data: (share of wrong answers, pieces of dirt, tokens seen, ratio: of target text)
    "long": (0.75, 1, 6_000_000, 0.5),
    "long-w0.9": (0.9, 1, 4_000_000, 0.5),
    "long-d6": (0.75, 6, 6_000_000, 0.2),
}
SELF = {"ref_loss": "low loss", "ref_entropy": "low entropy", "ref_both": "both"}


def commands():
    """The published runs on the demo as shell lines, to be started in this order: what a line
    needs is made by lines well before it (at most two of them at once)."""

    def rho(name, flags, seed, data="demo"):
        places = f"--data data/{data} --out out/seed{seed} --seed {seed} --name {name}"
        return f"python rho.py {places} {flags}"

    for seed in (1, 2, 3, 4, 5):
        long = {"clm": "--stage clm", "slm": "--stage slm"}
        long |= {f"slm-{rule}": f"--stage slm --select {rule}" for rule in ("random", "oracle")}
        arms = [rho(name, f"{flags} {LONG}", seed) for name, flags in long.items()]
        yield " && ".join([rho("ref", "--stage ref", seed), *arms])
    for seed in (1, 2, 3):
        slm = f"--stage slm {SHORT}"
        for ratio in (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0):
            yield rho(f"ratio-{ratio}", f"{slm} --ratio {ratio}", seed)
        for threshold in (0.0, 0.5, 1.0):
            yield rho(f"threshold-{threshold}", f"{slm} --threshold {threshold}", seed)
    for data, (wrong, dirty, tokens, ratio) in LONGER.items():
        made = f"--wrong {wrong} --dirty {dirty} --max_tokens {tokens + 200_000} --out data/{data}"
        long = f"--tokens {tokens} --evals {tokens // 200_000}"
        slm = f"--stage slm {long} --ratio {ratio} --reference out/seed1/ref.pt"
        line = [f"python prepare_data.py {made}"]
        line.append(rho(f"{data}-clm", f"--stage clm {long}", 1, data))
        yield " && ".join([*line, rho(f"{data}-slm", slm, 1, data)])
    for tokens, rates in LR.items():
        for lr in rates:
            yield rho(f"lr{lr}-{tokens}", f"--stage clm {SHORT} --lr {lr} --tokens {tokens}", 1)
    for wrong, dirty in DIRT:
        if (wrong, dirty) != (0.75, 1):
            data = f"w{wrong}-d{dirty}"
            made = f"--wrong {wrong} --dirty {dirty} --max_tokens 1e6 --out data/{data}"
            line = [f"python prepare_data.py {made}"]
            for seed in (1, 2, 3):
                line.append(rho(f"{data}-clm", f"--stage clm {SHORT}", seed, data))
                known = f"--reference out/seed{seed}/ref.pt"
                line.append(rho(f"{data}-slm", f"--stage slm {SHORT} {known}", seed, data))
            yield " && ".join(line)
    for seed in (1, 2, 3):
        for size in (1, 2, 4):
            yield rho(f"scope-{size}", f"--stage slm {SHORT} --micro_batch {size}", seed)
    for name, (_, flags) in REFERENCES.items():
        data = f"ref{name}" if name.isdigit() else "demo"
        line = [f"python prepare_data.py --n_ref {name} --out data/{data}"] * name.isdigit()
        for seed in (1, 2, 3):
            known = f"--stage slm {SHORT} --reference out/seed{seed}/ref-{name}.pt"
            line.append(rho(f"ref-{name}", f"--stage ref {SHORT} {flags}".strip(), seed, data))
            line.append(rho(f"slm-ref-{name}", known, seed))
        yield " && ".join(line)
    yield "python rho.py --out out/seed1 --seed 1 --stage dynamics"
    for seed in (1, 2, 3):
        slm, other = f"--stage slm {SHORT}", seed % 3 + 1
        for ratio in (0.5, 0.7, 0.8):
            yield rho(f"random-{ratio}", f"{slm} --select random --ratio {ratio}", seed)
        for rule in ALONE:
            yield rho(f"rule-{rule}", f"{slm} --select {rule}", seed)
        for ratio in (0.6, 0.7, 0.8):
            flags = f"{slm} --ratio {ratio} --reference out/seed{other}/ratio-1.0.pt --select"
            line = [rho(f"self-{rule}-{ratio}", f"{flags} {rule}", seed) for rule in SELF]
            yield " && ".join(line)
    for name, (_, flags) in VARIANTS.items():
        made = f"mkdir -p out/{name} && cp *.py out/{name}"
        made += f" && git apply --directory=out/{name} results/variants/{name}.diff"
        runs = []
        for seed in (1, 2, 3):
            known = ",".join(f"out/seed{s}/ref.pt" for s in (seed, seed % 3 + 1))
            known = f" --reference {known}" if name == "averaged" else ""
            flags_here = f"--stage slm {SHORT}{flags}{known}"
            run = rho(f"variant-{name}", flags_here, seed)
            runs.append(run.replace("rho.py", f"out/{name}/rho.py"))
        yield " && ".join([made, *runs])


REAL_TEXT = """
mkdir -p data/src/corpus data/src/base
sed -n 1,500p $PACK/reference/gsm8k_train_text.jsonl > data/src/gsm8k_dev.jsonl
sed -n 501~2p $PACK/reference/gsm8k_train_text.jsonl > data/src/gsm8k_ref.jsonl
sed -n 502~2p $PACK/reference/gsm8k_train_text.jsonl > data/src/gsm8k_corpus.jsonl
sed -n 1~4p $PACK/reference/math_train_text.jsonl > data/src/math_ref.jsonl
sed -n 1~4p $PACK/corpus/openstax_math.jsonl > data/src/corpus/openstax_math.jsonl
sed -n 1~8p $PACK/corpus/planetmath.jsonl > data/src/corpus/planetmath.jsonl
sed -n 1~8p $PACK/corpus/mathbooks_bysa.jsonl > data/src/corpus/mathbooks_bysa.jsonl
sed -n 1~8p $PACK/corpus/mathbooks_gfdl.jsonl > data/src/corpus/mathbooks_gfdl.jsonl
sed -n 2p $PACK/corpus/stacks.jsonl > data/src/corpus/stacks.jsonl
cp $PACK/corpus/stackmathqa.jsonl data/src/corpus
sed -n 1~3p $PACK/corpus/openstax_other.jsonl > data/src/base/openstax_other.jsonl
sed -n 1~2p $PACK/corpus/techdocs.jsonl > data/src/base/techdocs.jsonl
sed -n 1~16p $PACK/corpus/afp.jsonl > data/src/base/afp.jsonl
cp $PACK/corpus/shakespeare.jsonl data/src/base
for t in singleop addsub; do sed 's/"input"/"question"/;s/"target"/"answer"/'\
 $PACK/eval/math-evaluation-harness/data/mawps/$t.jsonl > data/src/$t.jsonl; done
"""  # GSM8K's training problems: 500 held out, the rest in halves; other text thinned out


def train_bpe(text, size, pattern):
    """Tokens by rank of a byte pair encoding: the bytes, then the commonest pair, and so on."""
    ranks, words = [bytes([b]) for b in range(256)], Counter(regex.findall(pattern, text))
    words = [(word.encode().decode("latin-1"), n) for word, n in words.items()]  # chr: its rank
    while len(ranks) < size:
        pairs = Counter()
        for word, n in words:
            for pair in pairwise(word):
                pairs[pair] += n
        a, b = max(pairs, key=pairs.get)
        words = [(word.replace(a + b, chr(len(ranks))), n) for word, n in words]
        ranks.append(ranks[ord(a)] + ranks[ord(b)])
    return ranks


def write_tokenizer(size, folder, paths):
    """folder/meta.json for --tokenizer: `size` tokens, of the first 2,000 texts of .jsonl files.

    The vocabulary matrix is most of a small model: of gpt2's 50,257 tokens, 85 % of its work.
    """
    from prepare_data import PATTERN

    def read(path):  # in step with the other files, in proportion to their size
        done = 0
        for line in path.read_text().splitlines():
            text = json.loads(line)["text"]
            done += len(text.encode())
            yield done / path.stat().st_size, text

    texts = [text for _, text in islice(heapq.merge(*map(read, paths)), 2000)]
    ranks = train_bpe("\n".join(texts), size - 1, PATTERN)
    spec = {"name": "bpe", "n_vocab": size, "eot": size - 1, "pat_str": PATTERN}
    spec["ranks"] = [base64.b64encode(token).decode() for token in ranks]
    folder.mkdir(parents=True, exist_ok=True)
    meta = {"tokenizer": spec, "dtype": "uint16", "tokens": {}}
    (folder / "meta.json").write_text(json.dumps(meta))


def real_commands():
    """The published runs on real text as shell lines, in order; REAL_TEXT makes their data/src."""
    clean = "--reference data/src/gsm8k_ref.jsonl data/src/math_ref.jsonl"
    clean += " --val data/src/gsm8k_dev.jsonl --questions data/src/singleop.jsonl"
    clean = f"python prepare_data.py {clean} data/src/addsub.jsonl"
    clean = f"{clean} --tokenizer data/bpe/meta.json"
    made = "python results/figures.py tokenizer 4096 data/bpe"
    made += " data/src/gsm8k_ref.jsonl data/src/math_ref.jsonl"
    noisy = "--corpus data/src/gsm8k_corpus.jsonl data/src/corpus"
    yield f"{made} && {clean} {noisy} --out data/real"
    yield f"{clean} --corpus data/src/base --out data/base"
    shape = "--n_layer 4 --n_head 3 --n_kv_head 3 --n_embd 192 --n_inner 512 --block_size 256"
    base = f"--data data/base --out out/real --name base --stage clm --seed 1 {shape} --lr 2e-3"
    yield f"python rho.py {base} --tokens 2400000 --evals 8 --eval_windows 128 --questions 0"
    same = "--data data/real --init out/real/base.pt --block_size 256 --questions 0"

    def rho(seed, name, flags):
        places = f"--out out/real/seed{seed} --seed {seed} --name {name}"
        return f"python rho.py {same} {places} {flags}"

    for lr in REAL_LR:
        short = f"--stage clm --lr {lr} --tokens 400000 --evals 1 --eval_windows 352"
        yield rho(1, f"lr{lr}", short)
    full = f"--lr {REAL_LR_CHOSEN} --evals 6 --eval_windows 352"
    for seed in (1, 2, 3):
        slm = f"--stage slm {full} --tokens 1200000"
        arms = {"ref": f"--stage ref {full} --ref_tokens 1200000"}
        arms |= {"clm": f"--stage clm {full} --tokens 1200000"}
        arms |= {"slm-random": f"{slm} --select random --ratio 0.6"}
        arms |= {"slm": f"{slm} --ratio 0.6", "slm-30": f"{slm} --ratio 0.3"}
        if seed == 3:  # another seed's CLM run as the reference
            known = "--ratio 0.7 --reference out/real/seed2/clm.pt --select"
            arms |= {f"self-{rule}": f"{slm} {known} {rule}" for rule in ("ref_loss", "ref_both")}
        for name, flags in arms.items():
            asked = f"python eval_math.py --ckpt out/real/seed{seed}/{name}.pt --shots 0"
            asked += " --max_new_tokens 128 --task data/src"
            yield " && ".join([rho(seed, name, flags), *(f"{asked}/{t}.jsonl" for t in TASKS)])


def read_log(path):
    """The records of a log: the first says what was run, the others what came of it."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def read_logs(folder):
    """{run: records} of the arms in a folder, in the order of ARMS."""
    paths = {run: Path(folder) / f"{run}.jsonl" for run in ARMS}
    logs = {run: read_log(path) for run, path in paths.items() if path.exists()}
    if "clm" not in logs:
        print(f"{folder}/clm.jsonl not found. Run: python rho.py", file=sys.stderr)
        sys.exit(2)
    return logs


def published(run, part="runs"):
    """{seed: records} of a published run; part: runs (the demo) or real."""
    paths = sorted(HERE.glob(f"{part}/seed*/{run}.jsonl"))
    return {int(path.parent.name.removeprefix("seed")): read_log(path) for path in paths}


def value(record, key):
    """What a look found; `right` in percent."""
    return 100 * record[key] / record["questions"] if key == "right" else record[key]


def ends(run, key, part="runs"):
    """Where each seed ended."""
    return [value(records[-1], key) for records in published(run, part).values()]


def gains(run, other, key="right", part="runs"):
    """run minus other where both ended, seed by seed; only of seeds that both have."""
    a, b = published(run, part), published(other, part)
    return [value(a[seed][-1], key) - value(b[seed][-1], key) for seed in a if seed in b]


def deviation(values):
    return statistics.stdev(values) if len(values) > 1 else 0.0


def spread(values, digits=1):
    """mean ± standard deviation over seeds; of a single seed only the value."""
    sd = f" ± {deviation(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{sd}"


def interval(values):
    """Mean and 95 % interval (Student's t) of paired differences."""
    mean = statistics.mean(values)
    half = T95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def passed(logs, key):
    """(tokens that slm had seen when it first was where clm ended, how many times fewer)."""
    end, sign = logs["clm"][-1], -1 if key == "right" else 1
    there = [r["tokens"] for r in logs["slm"][1:] if sign * r[key] <= sign * end[key]]
    return (there[0], end["tokens"] / there[0]) if there else (None, None)


def rows(logs):
    """The table of one set of runs, its head first; every cell a text."""
    asked = ["answers right"] if "right" in logs["clm"][-1] else []
    yield ["arm", "tokens seen", "trained on", "target loss", "corpus loss", *asked, "seconds"]
    for run, records in logs.items():
        r = records[-1]
        cells = [ARMS[run][0], f"{r['tokens']:,}", f"{r['trained']:,}"]
        cells += [f"{r['val_loss']:.3f}", f"{r['val_corpus_loss']:.3f}"]
        cells += [f"{r['right']} of {r['questions']}"] if asked else []
        yield [*cells, f"{r['seconds']:.0f}"]


def sentences(logs):
    """What the reader came for, in words."""
    named = {"right": "final accuracy", "val_loss": "final held-out loss"}
    for key in named if "slm" in logs else ():
        if key in logs["clm"][-1]:
            tokens, times = passed(logs, key)
            end = f"after {tokens:,} tokens: {times:.1f} times fewer" if tokens else "at no point"
            yield f"SLM passed CLM's {named[key]} {end}"


def main_rows():
    """The README's first table: means over the seeds."""
    yield ["arm", "tokens seen", "trained on", "target loss", "answers right, %"]
    for run in ARMS:
        last = [records[-1] for records in published(run).values()]
        trained = statistics.mean(r["trained"] for r in last)
        cells = [ARMS[run][0], f"{last[0]['tokens']:,}", f"{trained:,.0f}"]
        yield [*cells, spread(ends(run, "val_loss"), 3), spread(ends(run, "right"))]


def by_seed():
    """{"gain": [points], "right": [times fewer], "val_loss": ..., "over_ref": [points], ...}"""
    found = {"gain": [], "over_ref": [], "right": [], "val_loss": [], "seconds": [], "all": []}
    runs = {run: published(run) for run in ("ref", "clm", "slm")}
    assert runs["ref"].keys() == runs["clm"].keys() == runs["slm"].keys()
    for ref, clm, slm in zip(*(seeds.values() for seeds in runs.values()), strict=True):
        logs = {"clm": clm, "slm": slm}
        found["gain"].append(value(slm[-1], "right") - value(clm[-1], "right"))
        found["over_ref"].append(value(slm[-1], "right") - value(ref[-1], "right"))
        for key in ("right", "val_loss"):
            found[key].append(passed(logs, key)[1])
        there = next(r for r in slm if r.get("tokens", 0) >= passed(logs, "right")[0])
        scoring = clm[-1]["seconds"] / 3  # a forward pass is a third of a step
        found["seconds"].append(clm[-1]["seconds"] / there["seconds"])
        found["all"].append((there["seconds"] + ref[-1]["seconds"] + scoring) / clm[-1]["seconds"])
    return found


def main_words():
    """What the main table shows, in words."""
    found, n = by_seed(), len(published("slm"))
    gain, low, high = interval(found["gain"])
    sure = f"(paired over {n} seeds, 95 % interval {low:.1f} to {high:.1f})"
    yield f"SLM is **{gain:.1f} points** above CLM {sure}"
    times = f"**{spread(found['right'])} times fewer tokens** by accuracy"
    loss = f"{spread(found['val_loss'])} times fewer by held-out loss"
    yield f"it is where CLM ends after {times}, {loss}"
    over, low, high = interval(found["over_ref"])
    yield f"over its reference the student is {over:+.1f} points ({low:+.1f} to {high:+.1f})"
    yield f"in seconds, SLM reaches CLM's end {spread(found['seconds'])} times sooner"
    counted = "the reference's training, and scoring as a third of CLM's time (one pass of three)"
    yield f"with {counted}, it takes {spread(found['all'])} times as long as CLM does"


def long_rows():
    """Longer runs of one seed, at every millionth token: does CLM catch up?"""
    arms = [f"{arm} {what}" for what in ("right, %", "target loss") for arm in ("CLM", "SLM")]
    yield ["wrong answers", "dirt per problem", "tokens seen", *arms, "points"]
    for data, (wrong, dirty, _, _) in LONGER.items():
        runs = [published(f"{data}-{arm}")[1] for arm in ("clm", "slm")]
        for clm, slm in list(zip(*runs, strict=True))[5::5]:
            right = [value(r, "right") for r in (clm, slm)]
            cells = [f"{100 * wrong:.0f} %", str(dirty), f"{clm['tokens']:,}"]
            cells += [*(f"{v:.1f}" for v in right), f"{clm['val_loss']:.3f}"]
            yield [*cells, f"{slm['val_loss']:.3f}", f"{right[1] - right[0]:.1f}"]


def long_words():
    for data, (wrong, dirty, _, _) in LONGER.items():
        log = {arm: published(f"{data}-{arm}")[1] for arm in ("clm", "slm")}
        right, loss = (passed(log, key)[1] for key in ("right", "val_loss"))
        yield (
            f"with {100 * wrong:.0f} % wrong and {dirty} of dirt, SLM is where CLM ends after"
            f" {right:.1f} times fewer tokens by accuracy, {loss:.1f} times fewer by held-out loss"
        )


def sweep_rows(head, runs):
    """A table of short runs: {label: run}, and what each gains over CLM of the same length."""
    yield [head, "seeds", "target loss", "answers right, %", "points over CLM"]
    for label, run in runs.items():
        over = gains(run, "ratio-1.0")
        cells = [label, str(len(over)), spread(ends(run, "val_loss"), 3)]
        yield [*cells, spread(ends(run, "right")), spread(over)]


def ratio_runs():
    runs = {"100 % (CLM)": "ratio-1.0"}
    runs |= {f"{100 * r:.0f} %": f"ratio-{r}" for r in (0.8, 0.7, 0.6, 0.5, 0.4, 0.2)}
    return runs | {f"excess above {t}": f"threshold-{t}" for t in (0.0, 0.5, 1.0)}


def scope_runs():
    named = {"scope-1": "a window", "scope-2": "2 windows", "scope-4": "4 windows"}
    return {label: run for run, label in named.items()} | {"8 windows (batch)": "ratio-0.5"}


def variant_runs():
    runs = {"CLM": "ratio-1.0", "random": "random-0.5", "excess (SLM)": "ratio-0.5"}
    runs |= {label: f"rule-{rule}" for rule, label in ALONE.items()}
    return runs | {label: f"variant-{name}" for name, (label, _) in VARIANTS.items()}


def self_runs():
    runs = {"CLM": "ratio-1.0", "random, 70 %": "random-0.7", "random, 80 %": "random-0.8"}
    for rule, label in SELF.items():
        runs |= {f"{label}, {100 * r:.0f} %": f"self-{rule}-{r}" for r in (0.6, 0.7, 0.8)}
    return runs


def dirt_cells():
    """[(wrong, dirty, share of tokens that are target, CLM's values, SLM's values)]"""
    shares = json.loads((HERE / "runs" / "shares.json").read_text())
    for wrong, dirty in DIRT:
        cell = f"w{wrong}-d{dirty}"
        names = ("ratio-1.0", "ratio-0.5") if cell == "w0.75-d1" else (f"{cell}-clm", f"{cell}-slm")
        yield wrong, dirty, shares["demo" if cell == "w0.75-d1" else cell], *names


def dirt_rows():
    yield [
        "wrong answers",
        "dirt per problem",
        "target tokens",
        "seeds",
        "CLM right, %",
        "SLM right, %",
        "points",
        "target loss, SLM minus CLM",
    ]
    for wrong, dirty, share, clm, slm in dirt_cells():
        over, losses = gains(slm, clm), gains(slm, clm, "val_loss")
        cells = [f"{100 * wrong:.0f} %", str(dirty), f"{100 * share:.0f} %", str(len(over))]
        cells += [spread(ends(clm, "right")), spread(ends(slm, "right"))]
        yield [*cells, spread(over), spread(losses, 3)]


def map_rows():
    """Points over CLM, by how much of the corpus is wrong and how much of it is dirt."""
    points = {(wrong, dirty): gains(slm, clm) for wrong, dirty, _, clm, slm in dirt_cells()}
    wrongs, dirts = (sorted(set(values)) for values in zip(*points, strict=True))
    yield ["wrong answers", *(f"{dirty} of dirt" for dirty in dirts)]
    for wrong in wrongs:
        means = [points.get((wrong, dirty)) for dirty in dirts]
        cells = [f"{statistics.mean(m):+.1f}" if m else "" for m in means]
        yield [f"{100 * wrong:.0f} %", *cells]


def reference_rows():
    yield [
        "reference",
        "seeds",
        "its target loss",
        "its answers right, %",
        "student right, %",
        "points over CLM",
    ]
    for ref, slm, label in [
        ("ref", "ratio-0.5", "as published"),
        *((f"ref-{n}", f"slm-ref-{n}", label) for n, (label, _) in REFERENCES.items()),
    ]:
        over = gains(slm, "ratio-1.0")
        known = [ends(ref, key)[: len(over)] for key in ("val_loss", "right")]
        cells = [label, str(len(over)), spread(known[0], 3), spread(known[1])]
        yield [*cells, spread(ends(slm, "right")), spread(over)]


def hours_rows():
    """What each part of `commands` took, from its logs."""
    parts = {"main table, what is kept": ("ref", "clm", "slm", "slm-random", "slm-oracle")}
    parts |= {"how much": ("ratio-*", "threshold-*"), "how dirty": ("w*-clm", "w*-slm")}
    parts |= {"how good": ("ref-*", "slm-ref-*"), "how long": ("long-*",), "scope": ("scope-*",)}
    parts |= {"learning rate": ("lr*",), "dynamics": ("dynamics-*",), "self-reference": ("self-*",)}
    parts |= {"controls, other rules, variants": ("random-*", "rule-*", "variant-*")}
    parts = {part: [f"runs/seed*/{name}" for name in names] for part, names in parts.items()}
    parts |= {"real text": ("real/base", "real/seed*/*")}
    yield ["part", "runs", "core-hours"]
    for part, patterns in parts.items():
        logs = [read_log(path) for name in patterns for path in HERE.glob(f"{name}.jsonl")]
        took = sum(seconds({"": records}) for records in logs) / 3600
        yield [part, str(len(logs)), f"{took:.1f}"]


def real_answers(run, task):
    """Right answers of the seeds, % and, of all seeds' answers together, the 95 % interval."""
    from eval_math import wilson_interval

    found = json.loads((HERE / "real" / "answers.json").read_text())
    right, asked = map(
        sum, zip(*(found[key] for key in found if f"/{run}.{task}" in key), strict=True)
    )
    low, high = wilson_interval(right, asked)
    return f"{100 * right / asked:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def real_rows():
    tasks = [f"{task} right, %" for task in TASKS]
    yield ["arm", "seeds", "tokens seen", "trained on", "target loss", "corpus loss", *tasks]
    for run, (label, _) in REAL.items():
        last = [records[-1] for records in published(run, "real").values()]
        trained = statistics.mean(r["trained"] for r in last)
        cells = [label, str(len(last)), f"{last[0]['tokens']:,}", f"{trained:,.0f}"]
        cells += [spread(ends(run, key, "real"), 3) for key in ("val_loss", "val_corpus_loss")]
        yield [*cells, *(real_answers(run, task) for task in TASKS)]


def real_words():
    clm = published("clm", "real")
    for run, name in (("slm", "SLM"), ("slm-30", "at 30 % it"), ("slm-random", "random selection")):
        over, low, high = interval(gains(run, "clm", "val_loss", "real"))
        side, near, far = ("below", -high, -low) if over < 0 else ("above", low, high)
        told = f"{name} ends {abs(over):.3f} nats {side} CLM"
        told += f" (paired over {len(clm)} seeds, 95 % interval {near:.3f} to {far:.3f})"
        logs = [{"clm": clm[seed], "slm": r} for seed, r in published(run, "real").items()]
        times = [passed(log, "val_loss")[1] for log in logs]
        if None not in times:
            told += f" and is where CLM ends after {spread(times)} times fewer tokens"
        yield told


def lr_rows():
    yield ["tokens", "learning rate", "CLM's target loss", "answers right, %"]
    found = [read_log(path) for path in (HERE / "runs").glob("seed1/lr*.jsonl")]
    found += [published("ratio-1.0")[1], published("clm")[1]]
    for records in sorted(found, key=lambda r: (r[-1]["tokens"], r[0]["config"]["lr"])):
        r = records[-1]
        rate = f"{records[0]['config']['lr']:g}"
        yield [f"{r['tokens']:,}", rate, f"{r['val_loss']:.3f}", f"{value(r, 'right'):.1f}"]


def real_lr_rows():
    yield ["tokens", "learning rate", "CLM's target loss", "corpus loss"]
    found = [read_log(path) for path in HERE.glob("real/seed1/lr*.jsonl")]
    for records in sorted(found, key=lambda r: r[0]["config"]["lr"]):
        r, rate = records[-1], f"{records[0]['config']['lr']:g}"
        yield [f"{r['tokens']:,}", rate, f"{r['val_loss']:.3f}", f"{r['val_corpus_loss']:.3f}"]


def collect():
    """Copy the logs of `commands` to results/runs; pack a seed's looks; note the data's shares."""
    for path in Path("out").glob("seed*/*.jsonl"):
        copy = HERE / "runs" / path.relative_to("out")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    for path in Path("out/real").glob("**/*.jsonl"):
        copy = HERE / path.relative_to("out")
        if "answers" not in path.name:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    answers = {}
    for path in sorted(Path("out/real").glob("seed*/*.answers.jsonl")):
        records = read_log(path)
        name = f"{path.parent.name}/{path.name.removesuffix('.answers.jsonl')}"
        answers[name] = [sum(r["correct"] for r in records), len(records)]
    if answers:
        (HERE / "real" / "answers.json").write_text(json.dumps(answers, indent=1) + "\n")
    if Path("out/seed1/dynamics-slm.jsonl").exists():
        np.savez_compressed(HERE / "runs" / "seed1" / "looks.npz", **read_looks("out/seed1"))
    kinds = {path.parent.name: np.load(path) for path in sorted(Path("data").glob("*/kinds.npz"))}
    shares = json.loads((HERE / "runs" / "shares.json").read_text())
    shares |= {name: round(float((k["train"] == 0).mean()), 4) for name, k in kinds.items()}
    (HERE / "runs" / "shares.json").write_text(json.dumps(shares, indent=1) + "\n")


def plots():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(fig, axes, path):
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=110)
    plots().close(fig)


def curves(runs, path, keys=("right", "val_loss")):
    """Accuracy, where questions were asked, and held-out loss against tokens seen, by arm.

    runs: {arm: [records by seed]}; a line is the mean, a band one standard deviation.
    """
    keys = [key for key in keys if key in runs["clm"][0][-1]]
    keys += ["val_corpus_loss"] * (len(keys) < 2)
    fig, axes = plots().subplots(1, len(keys), figsize=(10, 3.8), constrained_layout=True)
    for ax, key in zip(axes, keys, strict=True):
        for run, seeds in runs.items():
            label, color = (ARMS | REAL)[run]
            x = [r["tokens"] / 1e6 for r in seeds[0][1:]]
            looks = [
                [value(look, key) for look in at]
                for at in zip(*(s[1:] for s in seeds), strict=True)
            ]
            mean = [statistics.mean(look) for look in looks]
            sd = [deviation(look) for look in looks]
            if run == "ref":  # it sees other text: only where it ends can be compared
                ax.axhline(mean[-1], ls=":", color=color, label=label)
                continue
            ax.plot(x, mean, color=color, label=label)
            low, high = ([m + sign * d for m, d in zip(mean, sd, strict=True)] for sign in (-1, 1))
            ax.fill_between(x, low, high, color=color, alpha=0.2, lw=0)
            if run == "clm":
                ax.axhline(mean[-1], ls="--", lw=0.8, color=color)
        ax.set_title(TITLES[key], fontsize=10)
        ax.set_xlabel("tokens seen, millions")
        if key != "right":  # not all of the first fall
            highest = max(look[key] for seeds in runs.values() for s in seeds for look in s[1:])
            ax.set_ylim(top=min(2 * runs["clm"][0][-1][key], highest))
    axes[1].legend(frameon=False, fontsize=9)
    save(fig, axes, path)


def sweeps(path):
    """Where selection pays: by ratio, by wrong answers, by dirt, by reference (mean and sd)."""
    fig, axes = plots().subplots(1, 4, figsize=(12, 3.2), constrained_layout=True, sharey=True)
    clm, slm = ARMS["clm"][1], ARMS["slm"][1]

    def line(ax, x, names, color, label):
        mean = [statistics.mean(ends(name, "right")) for name in names]
        sd = [deviation(ends(name, "right")) for name in names]
        ax.errorbar(x, mean, sd, fmt="o-", color=color, ms=3, capsize=2, label=label)

    ratios = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)
    line(axes[0], [100 * r for r in ratios], [f"ratio-{r}" for r in ratios], slm, "SLM")
    axes[0].set_title("tokens selected, % (100: CLM)", fontsize=9)
    cells = list(dirt_cells())
    for ax, at, title in (
        (axes[1], [c for c in cells if c[1] == 1], "wrong answers, % (1 piece of dirt)"),
        (axes[2], [c for c in cells if c[0] == 0.75], "tokens that are not target, % (75 % wrong)"),
    ):
        x = [100 * c[0] if ax is axes[1] else 100 * (1 - c[2]) for c in at]
        line(ax, x, [c[3] for c in at], clm, "CLM")
        line(ax, x, [c[4] for c in at], slm, "SLM")
        ax.set_title(title, fontsize=9)
    known = [("ref", "ratio-0.5"), *((f"ref-{n}", f"slm-ref-{n}") for n in REFERENCES)]
    known.sort(key=lambda pair: statistics.mean(ends(pair[0], "right")))
    x = [statistics.mean(ends(ref, "right")) for ref, _ in known]
    line(axes[3], x, [run for _, run in known], slm, "SLM")
    axes[3].axhline(statistics.mean(ends("ratio-1.0", "right")), color=clm, ls="--", label="CLM")
    axes[3].set_title("right answers of the reference, %", fontsize=9)
    axes[0].set_ylabel("answers right, %")
    axes[1].legend(frameon=False, fontsize=9)
    save(fig, axes, path)


def read_looks(folder):
    """The losses of the same held-out corpus tokens at every look of the runs in a folder.

    {run: (looks, N) nats, run + " seen": tokens seen at each look, "text": token ids (N,), "kinds":
    (N,) index of KINDS or empty}; runs are ref, clm, slm, dynamics-clm and dynamics-slm.
    """
    if (Path(folder) / "looks.npz").exists():
        return dict(np.load(Path(folder) / "looks.npz"))
    looks = {}
    for run in ("ref", "clm", "slm", "dynamics-clm", "dynamics-slm"):
        if (log := Path(folder) / f"{run}.jsonl").exists():
            first, *records = read_log(log)
            paths = [Path(folder) / run / f"{r['step']}.npy" for r in records]
            looks[run] = np.stack([np.load(path).flatten() for path in paths])
            looks[f"{run} seen"] = np.array([r["tokens"] for r in records])
            looks[f"{run} on"] = (
                first["config"].get("init", "").endswith("clm.pt")
            )  # goes on from it
    n, data = looks["ref"].shape[1], Path(first["config"]["data"])
    kinds = np.load(data / "kinds.npz") if (data / "kinds.npz").exists() else {}
    looks["kinds"] = kinds["val_corpus"][1 : n + 1] if kinds else np.empty(0)
    dtype = json.loads((data / "meta.json").read_text())["dtype"]
    looks["text"] = np.fromfile(data / "val_corpus.bin", dtype)[1 : n + 1]
    for i in np.flatnonzero(looks["kinds"] == 1):  # the demo's digits are the tokens of their bytes
        if chr(looks["text"][i]).isdigit() and (i == 0 or looks["kinds"][i - 1] != 1):
            looks["kinds"][i] = 6
    return looks


def kept(looks, run, ratio):
    """What the rule would keep of the looks' tokens, by excess over the reference (looks, N)."""
    excess = looks[run].astype(float) - looks["ref"][-1]
    return excess >= np.quantile(excess, 1 - ratio, axis=1, keepdims=True)


def looks_picture(looks, logs, path):
    """Kept and left-out tokens through training: the paper's Figs. 6, 8 and 7, and their kinds.

    Fig. 7 is, for each arm, a line of accuracy on the loss's logarithm; r is their correlation.
    """
    fig, axes = plots().subplots(2, 3, figsize=(11, 6.4), constrained_layout=True)
    seen = looks["slm seen"] / 1e6
    mine = kept(looks, "slm", logs["slm"][0]["config"]["ratio"])
    ways = {"kept": mine[-1], "left out": ~mine[-1]}
    for ax, (way, tokens) in zip(axes[1], ways.items(), strict=False):
        found = {run: looks[run][:, tokens].mean(1, dtype=float) for run in ("clm", "slm")}
        right = {run: [value(r, "right") for r in logs[run][1:]] for run in found}
        for run, losses in found.items():
            label, style = f"{run.upper()}: {way}", "-" if way == "kept" else "--"
            axes[0, 0].plot(seen, losses, style, color=ARMS[run][1], label=label)
            x, y = np.log(losses[2:]), right[run][2:]
            label = f"{run.upper()}, r = {np.corrcoef(x, y)[0, 1]:.2f}"
            ax.plot(losses[2:], y, "o", ms=3, color=ARMS[run][1], label=label)
            slope, start = np.polyfit(x, y, 1)
            ax.plot(losses[2:], slope * x + start, ":", color=ARMS[run][1])
        ax.set_xlabel(f"loss on tokens {way}, nats")
        ax.set_title(f"answers right, %, against loss on tokens {way}", fontsize=9)
    for run in ("clm", "slm"):
        mean = looks[run].mean(1, dtype=float)
        axes[0, 0].plot(seen, mean, ":", color=ARMS[run][1], label=f"{run.upper()}: all")
    axes[0, 0].set(yscale="log")
    axes[0, 0].set_title(
        "loss on tokens that SLM keeps at the end, on the others, on all", fontsize=8
    )
    for i in np.linspace(1, len(seen) - 1, 4).astype(int):
        perplexity = np.exp(looks["slm"][1:, mine[i]].mean(1, dtype=float))
        axes[0, 1].plot(seen[1:], perplexity, label=f"kept at {seen[i]:.1f} M")
    axes[0, 1].set_title("SLM: perplexity of what was kept when", fontsize=9)
    for kind, name in KINDS.items():
        axes[0, 2].plot(seen, 100 * mine[:, looks["kinds"] == kind].mean(1), label=name)
    axes[0, 2].set_title("SLM: % kept, by what the generator wrote", fontsize=9)
    for run in ("clm", "slm"):
        for name, tokens in {"target": looks["kinds"] == 0, "slip": looks["kinds"] == 6}.items():
            excess = (looks[run].astype(float) - looks["ref"][-1])[:, tokens].mean(1)
            style = "-" if name == "target" else "--"
            label = f"{run.upper()}: {name}"
            axes[1, 2].plot(seen[1:], excess[1:], style, color=ARMS[run][1], label=label)
    axes[1, 2].set_title("mean excess loss, nats", fontsize=9)
    for ax in axes.flat:
        ax.legend(frameon=False, fontsize=7)
    for ax in (*axes[0], axes[1, 2]):
        ax.set_xlabel("tokens seen, millions")
    save(fig, axes.flat, path)


def kinds_rows(looks, ratio):
    """Which kinds of token the rule keeps, at an early look, halfway and at the end."""
    mine, seen = kept(looks, "slm", ratio), looks["slm seen"]
    at = [len(seen) // 10, len(seen) // 2, len(seen) - 1]
    yield ["kind of token", "share of tokens", *(f"kept at {seen[i] / 1e6:.1f} M" for i in at)]
    for kind, name in KINDS.items():
        of = looks["kinds"] == kind
        yield [name, f"{of.mean():.0%}", *(f"{mine[i, of].mean():.0%}" for i in at)]
    target = looks["kinds"] == 0
    yield ["precision of target", "", *(f"{target[mine[i]].mean():.0%}" for i in at)]


CLASSES = {  # of the paper's 1 B model: share, mean loss at the first look and at the last
    "H->H": ("11 %", "3.74 flat"),
    "L->H": ("12 %", "3.30 → 3.84"),
    "H->L": ("26 %", "3.34 → 2.51"),
    "L->L": ("51 %", "0.22 flat"),
}


def dynamics(looks, run):
    """({class: mask (N,)}, losses (1 + looks, N)) from clm.pt on; section 2.1 of the paper."""
    from rho import token_dynamics

    start = looks["clm"][-1:] if looks.get(f"{run} on", True) else looks["clm"][:0]
    losses = np.concatenate([start, looks[run]]).astype(float)
    found = token_dynamics(losses)
    return {name: found == name for name in CLASSES}, losses


def dynamics_rows(looks):
    """Shares of the four classes, and their mean loss at the first look and at the last."""
    runs = [dynamics(looks, run) for run in ("dynamics-clm", "dynamics-slm")]
    heads = [f"{arm}: {what}" for arm in ("CLM", "SLM") for what in ("share", "mean loss")]
    yield ["class", "paper: share", "paper: mean loss", *heads]
    for name, paper in CLASSES.items():
        cells = [name.replace("->", "→"), *paper]
        for classes, losses in runs:
            mine = losses[:, classes[name]].mean(1) if classes[name].any() else [np.nan]
            cells += [f"{classes[name].mean():.0%}", f"{mine[0]:.2f} → {mine[-1]:.2f}"]
        yield cells


def dynamics_words(looks):
    """What the tokens are that selective training lets go of."""
    kinds = looks["kinds"][dynamics(looks, "dynamics-slm")[0]["L->H"]]
    dirt, target = ((kinds > 1) & (kinds < 6)).mean(), (kinds == 0).mean()
    yield f"of what SLM lets go (L→H) {dirt:.0%} is dirt and {target:.0%} target text"


def dynamics_picture(looks, path):
    """Mean loss by class in both runs, and single tokens that move most about their line."""
    fig, axes = plots().subplots(1, 3, figsize=(11, 3.4), constrained_layout=True)
    colors = dict(zip(CLASSES, ("#c8372d", "#d6a03a", "#2b6cb0", "#4a9a5b"), strict=True))
    for ax, run in zip(axes, ("dynamics-clm", "dynamics-slm"), strict=False):
        classes, losses = dynamics(looks, run)
        seen = np.append(0, looks[f"{run} seen"])[-len(losses) :] / 1e6
        for name, mine in classes.items():
            label = f"{name.replace('->', '→')}  {mine.mean():.0%}"
            if mine.any():
                ax.plot(seen, losses[:, mine].mean(1), color=colors[name], label=label)
        ax.set_title(f"{run[-3:].upper()}: mean loss by class, nats", fontsize=9)
        ax.legend(frameon=False, fontsize=7)
    classes, losses = dynamics(looks, "dynamics-clm")
    for name in ("H->H", "L->L"):
        mine = np.flatnonzero(classes[name])
        for token in mine[np.argsort(-losses[:, mine].std(0))][:4]:
            axes[2].plot(seen, losses[:, token], color=colors[name], lw=0.9)
    axes[2].set_title("CLM: the H→H (red), L→L (green) that move most", fontsize=9)
    for ax in axes:
        ax.set_xlabel("tokens seen since clm.pt, millions")
    save(fig, axes, path)


def token_page(folder, n=2048):
    """out/.../tokens.html: the first n held-out corpus tokens, at each look; needs no network."""
    from prepare_data import get_tokenizer
    from rho import token_dynamics

    looks, config = read_looks(folder), read_log(Path(folder) / "slm.jsonl")[0]["config"]
    spec = json.loads((Path(config["data"]) / "meta.json").read_text())["tokenizer"]
    encoding, classes = get_tokenizer(spec), ["H->H", "L->H", "H->L", "L->L"]
    words = [encoding.decode([token], errors="replace") for token in looks["text"][:n].tolist()]
    cents = lambda losses: np.round(100 * losses.astype(float)).astype(int).tolist()  # noqa: E731
    data = {"text": words, "end": encoding.decode([spec["eot"]]), "classes": classes, "runs": {}}
    data |= {"ref": cents(looks["ref"][-1, :n]), "labels": {"slm": "SLM", "clm": "CLM"}}
    if len(looks["kinds"]):
        data |= {"kind": looks["kinds"][:n].tolist(), "kinds": KINDS}
    for run in ("slm", "clm"):
        losses, ratio = looks[run].astype(float), config["ratio"] or 0.5  # by threshold: a half
        lowest = np.quantile(losses - looks["ref"][-1], 1 - ratio, axis=1)
        moves = [classes.index(c) for c in token_dynamics(losses)[:n]] if len(losses) > 1 else []
        data["runs"][run] = {
            "loss": cents(losses[:, :n]),
            "cut": lowest.tolist(),
            "dynamics": moves,
            "seen": looks[f"{run} seen"].tolist(),
        }
    safe = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    page = (HERE / "tokens_template.html").read_text().replace("@DATA@", safe)
    (Path(folder) / "tokens.html").write_text(page)
    return Path(folder) / "tokens.html"


def growth(path):
    """Tokens per second, and peak memory, of --stage slm against one size at a time."""
    from matplotlib.ticker import EngFormatter

    short = EngFormatter(places=0, sep="")  # 8k, 1M
    records = read_log(HERE / "growth.jsonl")
    axes_of = dict.fromkeys(r["axis"] for r in records)
    titles = {"tokens_per_s": "tokens per second", "gib": "peak memory, GiB"}
    size = {"figsize": (10, 4.4), "sharex": "col", "sharey": "row", "constrained_layout": True}
    fig, axes = plots().subplots(2, len(axes_of), **size)
    for column, axis in zip(axes.T, axes_of, strict=True):
        mine = [r for r in records if r["axis"] == axis]
        for ax, (key, title) in zip(column, titles.items(), strict=True):
            ax.plot([r[axis] for r in mine], [r[key] for r in mine], "o-", color="#c8372d")
            ax.set(xscale="log", yscale="log")
            ax.set_xticks([r[axis] for r in mine], [short(r[axis]) for r in mine], fontsize=8)
            ax.minorticks_off()
            if axis == "width":
                ax.set_ylabel(title, fontsize=9)
        column[1].set_xlabel(axis + (", tokens" if axis in ("context", "corpus") else ""))
    save(fig, axes.flat, path)


def on_paper():
    """The paper's 1 B run in hours, from operations alone; TinyLlama's shape, windows of 2048."""
    inside = 22 * (2 * 2048**2 + 2 * 2048 * 256 + 3 * 2048 * 5632) + 22 * 2048 * 2048
    head, tokens, rate = 2048 * 32000, 15e9, 0.4 * 989e12  # multiplications a token; H100, bf16
    forward = inside + head
    costs = {
        "reference: 3 epochs of 0.5 B tokens": 1.5e9 * 3 * forward,
        "scoring 15 B tokens once (30 GB on disk)": tokens * forward,
        "student, CLM": tokens * 3 * forward,
        "student, SLM 60 %, scores from disk": tokens * (forward + 2 * (inside + 0.6 * head)),
        "student, SLM with the reference online": tokens * 4 * forward,
    }
    yield ["stage", "1 H100", "8 H100", "32 H100"]
    for stage, cost in costs.items():
        hours = 2 * cost / rate / 3600
        yield [stage, *(f"{hours / n:.1f} h" for n in (1, 8, 32))]


def bench_rows():
    yield ["ratio", "median", "lowest", "highest"]
    for r in read_log(HERE / "bench.jsonl"):
        yield [r["name"], f"{r['ratio']:.2f}", f"{r['low']:.2f}", f"{r['high']:.2f}"]


def markdown(table):
    head, *body = table
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def fill(text, marker, content):
    """`text` with what stands between <!-- marker --> and <!-- /marker --> replaced."""
    found = f"<!-- {marker} -->\n.*?<!-- /{marker} -->"
    if not re.search(found, text, re.S):
        raise SystemExit(f"README.md has no marker {marker}")
    new = f"<!-- {marker} -->\n{content}\n<!-- /{marker} -->"
    return re.sub(found, lambda _: new, text, flags=re.S)


def seconds(logs):
    """Of training and of answering, over all arms."""
    return sum(r[-1]["seconds"] + sum(e["eval_seconds"] for e in r[1:]) for r in logs.values())


def machine(logs):
    """Where and with what a set of runs was made, in one line."""
    first, cfg = logs["clm"][0], logs["clm"][0]["config"]
    shape = f"{first['params'] / 1e6:.1f} M parameters, windows of {cfg['block_size']}"
    where = f"{first['device']}, {first['threads']} thread(s), torch {first['torch']}"
    took = f"{seconds(logs) / 60:.0f} minutes of training and answering for these runs of one seed"
    return f"{shape}; {where}; {took}; commit {first['commit']}."


def text_of(sentences):
    """Sentences as one paragraph."""
    told = "; ".join(sentences)
    return f"{told[0].upper()}{told[1:]}."


def readme(text):
    """The README with all its tables made anew from the logs in results/."""
    seed = {run: published(run)[1] for run in ARMS}
    told = [markdown(main_rows()), text_of(main_words()), machine(seed)]
    tables = {"main": "\n\n".join(told)}
    logs = {run: published(run, "real")[1] for run in ARMS if published(run, "real")}
    told = [markdown(real_rows()), text_of(real_words()), machine(logs)]
    looks, ratio = read_looks(HERE / "runs" / "seed1"), seed["slm"][0]["config"]["ratio"]
    tables |= {"kinds": markdown(kinds_rows(looks, ratio))}
    told = [markdown(dynamics_rows(looks)), text_of(dynamics_words(looks))]
    tables |= {"dynamics": "\n\n".join(told)}
    tables |= {"real": "\n\n".join(told), "paper": markdown(on_paper())}
    tables |= {"real-lr": markdown(real_lr_rows())}
    logs = read_logs(HERE / "demo")
    tables |= {"demo": "\n\n".join([markdown(rows(logs)), machine(logs)])}
    tables |= {"ratio": markdown(sweep_rows("selected", ratio_runs()))}
    tables |= {"scope": markdown(sweep_rows("top k over", scope_runs()))}
    tables |= {"self": markdown(sweep_rows("kept", self_runs()))}
    tables |= {"variants": markdown(sweep_rows("rule", variant_runs()))}
    tables |= {"dirt": markdown(dirt_rows()), "references": markdown(reference_rows())}
    tables |= {"map": markdown(map_rows())}
    tables |= {"long": f"{markdown(long_rows())}\n\n{text_of(long_words())}"}
    tables |= {"hours": markdown(hours_rows())}
    tables |= {"lr": markdown(lr_rows()), "bench": markdown(bench_rows())}
    for marker, content in tables.items():
        text = fill(text, marker, content)
    return text


def summary():
    """results/summary.json: the headline figures, computed from the logs."""
    found = by_seed()
    gain, low, high = interval(found["gain"])
    demo = read_logs(HERE / "demo")  # as `make demo` leaves them
    classes, _ = dynamics(read_looks(HERE / "runs" / "seed1"), "dynamics-clm")
    losses = {"clm": "clm", "random": "slm-random", "slm": "slm", "reference_only": "ref"}
    figures = {
        "demo": {
            "seeds": len(found["gain"]),
            "gain_points": round(gain, 2),
            "gain_points_ci95": [round(low, 2), round(high, 2)],
            "tokens_ratio_mean": round(statistics.mean(found["right"]), 2),
            "student_minus_reference_points": round(statistics.mean(found["over_ref"]), 2),
            "seconds_total": round(seconds(demo)),
            "cores": demo["clm"][0]["threads"],
        },
        "real": {
            "tokens": published("clm", "real")[1][-1]["tokens"],
            "seeds": len(published("clm", "real")),
            "heldout_loss": {
                k: round(statistics.mean(ends(v, "val_loss", "real")), 4) for k, v in losses.items()
            },
        },
        "dynamics": {name: round(float(mine.mean()), 4) for name, mine in classes.items()},
        "bench": {},
    }
    for r in read_log(HERE / "bench.jsonl"):
        figures["bench"][r["name"].replace(" 6x384", "").removesuffix(" 32 rows")] = r["ratio"]
    return json.dumps(figures, indent=1) + "\n"


def aligned(table):
    table = list(table)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ("  ".join(c.rjust(w) for c, w in zip(cells, widths, strict=True)) for cells in table)
    return "\n" + "\n".join(lines) + "\n"


def show(folder):
    """The tables and the picture of one set of runs."""
    logs = read_logs(folder)
    print(aligned(rows(logs)) + "\n" + "\n".join(sentences(logs)))
    if (Path(folder) / "dynamics-slm.jsonl").exists():
        print(aligned(dynamics_rows(read_looks(folder))))
    picture = Path(folder) / "demo.png"
    try:
        curves({run: [records] for run, records in logs.items()}, picture)
        print(f"picture: {picture}")
    except ImportError:
        print("no picture: it needs matplotlib (pip install matplotlib)")
    if "ref" in logs and "slm" in logs:
        print(f"which tokens were kept: {token_page(folder)}")


def main(argv):
    if argv[:1] == ["commands"]:
        print("\n".join(real_commands() if "real" in argv else commands()))
    elif argv[:1] == ["tokenizer"]:
        write_tokenizer(int(argv[1]), Path(argv[2]), [*map(Path, argv[3:])])
    elif argv == ["collect"]:
        collect()
    elif argv:
        show(argv[0])
    else:
        curves({run: [*published(run).values()] for run in ARMS}, HERE / "main.png")
        real = {run: [*published(run, "real").values()] for run in (*ARMS, "slm-30")}
        curves({run: seeds for run, seeds in real.items() if seeds}, HERE / "real.png")
        sweeps(HERE / "sweeps.png")
        looks = read_looks(HERE / "runs" / "seed1")
        looks_picture(looks, read_logs(HERE / "runs" / "seed1"), HERE / "looks.png")
        dynamics_picture(looks, HERE / "dynamics.png")
        growth(HERE / "growth.png")
        (HERE / "summary.json").write_text(summary())
        path = HERE.parent / "README.md"
        path.write_text(readme(path.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
