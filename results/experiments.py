"""What is run: the arms with their colors, and the command lines behind each published table.

    python results/experiments.py             every command of the runs on the demo's data
    python results/experiments.py real        those of the runs on real text
    python results/experiments.py ratio lr    those behind single tables (-h: the names)

Each line is one job of the shell. Start the jobs in the order printed, at most two at once: what
a job needs is made by jobs well before it. Single tables need the references of `main` first.
"""

import argparse
import re
from typing import NamedTuple

from controls import (
    changed_copy,
    clean_commands,
    clean_data_commands,
    clean_trials_commands,
    controls_commands,
    dirtier_commands,
    model_commands,
    rho,
    slm_lr_commands,
)


class Style(NamedTuple):
    """How an arm is called in tables and drawn in pictures; color and line as in matplotlib."""

    label: str
    color: str
    line: object


# The colors are Okabe and Ito's, which people with any kind of color vision can tell apart. The
# line styles differ as well: a picture printed in gray can still be read.
RUNS = {
    "ref": Style("reference (clean text only)", "#0072B2", "dotted"),
    "clm": Style("CLM: all tokens", "#555555", "dashed"),
    "slm-random": Style("random tokens", "#E69F00", "dashdot"),
    "slm": Style("SLM: selected tokens", "#D55E00", "solid"),
    "slm-oracle": Style("oracle: target tokens", "#009E73", (0, (5, 1, 1, 1, 1, 1))),
    "slm-30": Style("SLM, 30 % selected", "#CC79A7", (0, (8, 2))),
    "self-ref_loss": Style("self-reference: low loss, 70 %", "#56B4E9", (0, (2, 2))),
    "self-ref_both": Style("self-reference: both, 70 %", "#000000", (0, (1, 3))),
}
MAIN_RUNS = ["ref", "clm", "slm-random", "slm", "slm-oracle"]
REAL_RUNS = ["ref", "clm", "slm-random", "slm", "slm-30", "self-ref_loss", "self-ref_both"]
TITLES = {
    "right": "questions answered right, %",
    "val_loss": "loss on held-out target text, nats",
    "val_corpus_loss": "loss on held-out corpus text, nats",
}


# ---- the grids -----------------------------------------------------------------------------------

SEEDS = [1, 2, 3]
MAIN_SEEDS = [1, 2, 3, 4, 5]
# Used for nothing before: no setting was chosen with them. Run once, published beside the five.
FRESH_SEEDS = [6, 7]
LONG = "--tokens 2000000 --evals 20"
LONG_REF = "--ref_tokens 900000"
SHORT = "--evals 3"

RATIOS = [0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0]
THRESHOLDS = [0.0, 0.5, 1.0]
SCOPES = [1, 2, 4]
# The runs at the demo's length that other tables compare with: CLM, and SLM at the demo's ratio.
CLM_RUN = "ratio-1.0"
SLM_RUN = "ratio-0.5"

# Tokens: learning rates. 7.5e-4 is the default: at 900,000 tokens it is the run ratio-1.0, at
# 2,000,000 the run clm of the main table.
LEARNING_RATES = {
    900_000: ["3.75e-4", "5e-4", "1e-3", "1.5e-3", "3e-3"],
    2_000_000: ["5e-4", "1e-3"],
}
# (share of wrong answers, pieces of dirt for each problem); (0.75, 1) is the demo itself.
DIRT = [(0, 0), (0, 1), (0, 3), (0.5, 1), (0.5, 3), (0.75, 1), (0.75, 3), (0.75, 6), (0.9, 1)]


def dirt_runs(wrong, dirty):
    """(data, CLM's run, SLM's run) of a cell of DIRT."""
    if (wrong, dirty) == (0.75, 1):
        return "demo", CLM_RUN, SLM_RUN
    data = f"w{wrong}-d{dirty}"
    return data, f"{data}-clm", f"{data}-slm"


class Longer(NamedTuple):
    """Data for a longer run. `ratio` is near the share of its tokens that are target text."""

    wrong: float
    dirty: int
    tokens: int
    ratio: float


LONGER = {
    "long": Longer(0.75, 1, 6_000_000, 0.5),
    "long-w0.9": Longer(0.9, 1, 4_000_000, 0.5),
    "long-d6": Longer(0.75, 6, 6_000_000, 0.2),
}
REFERENCES = {  # name: (label, flags); a name that is a number is a --n_ref
    "1500": ("0.3 x clean text", ""),
    "15000": ("3 x clean text", ""),
    "50000": ("10 x clean text, 3.3 times as long", "--ref_tokens 3000000"),
    "small": ("smaller: 2 x 64", "--n_layer 2 --n_embd 64 --n_inner 192 --n_head 2 --n_kv_head 2"),
    "large": ("larger: 3 x 192", "--n_embd 192 --n_inner 576"),
}
RULES = {"loss": "student's loss alone", "ref_loss": "reference's loss alone"}
VARIANTS = {  # the change in results/variants/NAME.diff: (what it does, flags)
    "soft": ("every token, weighted by sigmoid(2 x excess)", ""),
    "falling": ("share kept falls from 100 % to 30 %", " --ratio 0.3"),
    "averaged": ("two references, their losses averaged", ""),
    "sure": ("excess, where the reference is below 1 nat, 40 %", " --ratio 0.4"),
    "absolute": ("excess without its sign (a mistake)", ""),
}
SELF_RULES = {"ref_loss": "low loss", "ref_entropy": "low entropy", "ref_both": "both"}
SELF_RATIOS = [0.6, 0.7, 0.8]

SFT_RATE = "7.5e-4"
SFT_RATES = ["2.5e-4", "2.25e-3"]  # of plain fine-tuning, besides the one above
SFT_RUN = "sft-all"  # plain fine-tuning: what the others are compared with
SFT_ARMS = {  # run: (label, flags)
    SFT_RUN: ("all answer tokens", ""),
    "sft-excess": ("excess, 60 %", "--select excess --ratio 0.6"),
    "sft-random": ("random, 60 %", "--select random --ratio 0.6"),
}

REAL_LEARNING_RATES = ["5e-4", "1e-3", "2e-3", "4e-3"]
REAL_LEARNING_RATE = "2e-3"  # the best of them for CLM
TASKS = ["singleop", "addsub"]  # of MAWPS: the easiest word problems there are


class Started(NamedTuple):
    """An arm that starts from the reference: how it is called, its flags, the rates tried."""

    label: str
    flags: str
    rates: list


# Kept are 30 %, as in the table `real`, or 10 %, near the share of target text in the corpus.
STARTED = {
    "clm": Started("CLM, started from the model", "--stage clm", ["5e-4", "2.5e-4", "1.25e-4"]),
    "slm": Started(
        "SLM, started from the model, 30 % kept",
        "--stage slm --ratio 0.3 --reference REF",
        ["5e-4", "2.5e-4", "1.25e-4"],
    ),
    "slm-10": Started(
        "SLM, started from the model, 10 % kept",
        "--stage slm --ratio 0.1 --reference REF",
        ["2.5e-4", "1.25e-4"],
    ),
}

# GSM8K's training problems: 500 are held out, the rest is split in halves. Other text is thinned
# out. $PACK is a folder of public text under open licenses, which is not in this repository.
REAL_TEXT = r"""
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
M=$PACK/eval/math-evaluation-harness/data/mawps
sed 's/"input"/"question"/;s/"target"/"answer"/' $M/singleop.jsonl > data/src/singleop.jsonl
sed 's/"input"/"question"/;s/"target"/"answer"/' $M/addsub.jsonl > data/src/addsub.jsonl
"""


# ---- the commands: each function gives the lines behind one table --------------------------------


def main_line(seed):
    arms = {
        "ref": f"--stage ref {LONG_REF}",
        "clm": f"--stage clm {LONG}",
        "slm": f"--stage slm {LONG}",
        "slm-random": f"--stage slm --select random {LONG}",
        "slm-oracle": f"--stage slm --select oracle {LONG}",
    }
    return " && ".join(rho(name, flags, seed) for name, flags in arms.items())


def main_commands():
    for seed in MAIN_SEEDS:
        yield main_line(seed)


def fresh_commands():
    for seed in FRESH_SEEDS:
        yield main_line(seed).replace("out/seed", "out/fresh/seed")


def ratio_commands():
    for seed in SEEDS:
        for ratio in RATIOS:
            yield rho(f"ratio-{ratio}", f"--stage slm {SHORT} --ratio {ratio}", seed)
        for threshold in THRESHOLDS:
            flags = f"--stage slm {SHORT} --threshold {threshold}"
            yield rho(f"threshold-{threshold}", flags, seed)


def long_commands():
    for data, (wrong, dirty, tokens, ratio) in LONGER.items():
        make = f"python prepare_data.py --wrong {wrong} --dirty {dirty}"
        make += f" --max_tokens {tokens + 200_000} --out data/{data}"
        length = f"--tokens {tokens} --evals {tokens // 200_000}"
        slm = f"--stage slm {length} --ratio {ratio} --reference out/seed1/ref.pt"
        runs = [
            rho(f"{data}-clm", f"--stage clm {length}", 1, data),
            rho(f"{data}-slm", slm, 1, data),
        ]
        yield " && ".join([make, *runs])


def lr_commands():
    for tokens, rates in LEARNING_RATES.items():
        for lr in rates:
            yield rho(f"lr{lr}-{tokens}", f"--stage clm {SHORT} --lr {lr} --tokens {tokens}", 1)


def dirt_commands():
    for wrong, dirty in DIRT:
        data, clm, slm = dirt_runs(wrong, dirty)
        if data == "demo":
            continue  # runs of `ratio`
        make = f"python prepare_data.py --wrong {wrong} --dirty {dirty}"
        runs = []
        for seed in SEEDS:
            flags = f"--stage slm {SHORT} --reference out/seed{seed}/ref.pt"
            runs.append(rho(clm, f"--stage clm {SHORT}", seed, data))
            runs.append(rho(slm, flags, seed, data))
        yield " && ".join([f"{make} --max_tokens 1e6 --out data/{data}", *runs])


def scope_commands():
    for seed in SEEDS:
        for size in SCOPES:
            yield rho(f"scope-{size}", f"--stage slm {SHORT} --micro_batch {size}", seed)


def references_commands():
    for name, (_, flags) in REFERENCES.items():
        data = "demo"
        line = []
        if name.isdigit():
            data = f"ref{name}"
            line.append(f"python prepare_data.py --n_ref {name} --out data/{data}")
        for seed in SEEDS:
            slm = f"--stage slm {SHORT} --reference out/seed{seed}/ref-{name}.pt"
            line.append(
                rho(f"ref-{name}", f"--stage ref {LONG_REF} {SHORT} {flags}".strip(), seed, data)
            )
            line.append(rho(f"slm-ref-{name}", slm, seed))
        yield " && ".join(line)


def dynamics_commands():
    yield "python rho.py --out out/seed1 --seed 1 --stage dynamics"


def self_commands():
    """Another seed's CLM run is the reference. Random selection stands beside it."""
    for seed in SEEDS:
        for ratio in (0.7, 0.8):
            flags = f"--stage slm {SHORT} --select random --ratio {ratio}"
            yield rho(f"random-{ratio}", flags, seed)
        for ratio in SELF_RATIOS:
            flags = f"--stage slm {SHORT} --ratio {ratio}"
            flags += f" --reference out/seed{seed % 3 + 1}/ratio-1.0.pt"
            runs = []
            for rule in SELF_RULES:
                runs.append(rho(f"self-{rule}-{ratio}", f"{flags} --select {rule}", seed))
            yield " && ".join(runs)


def variants_commands():
    for seed in SEEDS:
        yield rho("random-0.5", f"--stage slm {SHORT} --select random --ratio 0.5", seed)
        for rule in RULES:
            yield rho(f"rule-{rule}", f"--stage slm {SHORT} --select {rule}", seed)
    for name, (_, flags) in VARIANTS.items():
        line = changed_copy(name)
        for seed in SEEDS:
            references = ""
            if name == "averaged":
                references = f" --reference out/seed{seed}/ref.pt,out/seed{seed % 3 + 1}/ref.pt"
            run = rho(f"variant-{name}", f"--stage slm {SHORT}{flags}{references}", seed)
            line.append(run.replace("rho.py", f"out/{name}/rho.py"))
        yield " && ".join(line)


def sft_commands():
    """A CLM run, then fine-tuning from it on questions with answers, by three rules."""
    for seed in SEEDS:
        tuned = f"--stage sft --init out/seed{seed}/sft-base.pt {SHORT}"
        runs = [rho("sft-base", f"--stage clm --tokens 900000 {SHORT}", seed)]
        for run, (_, flags) in SFT_ARMS.items():
            if "excess" in flags:
                flags += f" --reference out/seed{seed}/ref.pt"
            runs.append(rho(run, f"{tuned} --lr {SFT_RATE} {flags}".strip(), seed))
        if seed == 1:
            for rate in SFT_RATES:
                runs.append(rho(f"sft-lr{rate}", f"{tuned} --lr {rate}", seed))
        yield " && ".join(runs)


def real_rho(seed, name, flags):
    """One run on real text; every one goes on from the base model."""
    same = "--data data/real --init out/real/base.pt --block_size 256 --questions 0"
    return f"python rho.py {same} --out out/real/seed{seed} --seed {seed} --name {name} {flags}"


def real_text_commands():
    yield " && ".join(REAL_TEXT.strip().splitlines())


def real_base_commands():
    """The small tokenizer, both data sets, and the base model, which learns general text."""
    train = "python prepare_data.py --train_tokenizer 4096 --out data/bpe"
    train += " data/src/gsm8k_ref.jsonl data/src/math_ref.jsonl"
    clean = "python prepare_data.py --reference data/src/gsm8k_ref.jsonl data/src/math_ref.jsonl"
    clean += " --val data/src/gsm8k_dev.jsonl"
    clean += " --questions data/src/singleop.jsonl data/src/addsub.jsonl"
    clean += " --tokenizer data/bpe/meta.json"
    noisy = "--corpus data/src/gsm8k_corpus.jsonl data/src/corpus --out data/real"
    yield f"{train} && {clean} {noisy}"
    yield f"{clean} --corpus data/src/base --out data/base"
    shape = "--n_layer 4 --n_head 3 --n_kv_head 3 --n_embd 192 --n_inner 512 --block_size 256"
    base = f"--data data/base --out out/real --name base --stage clm --seed 1 {shape} --lr 2e-3"
    yield f"python rho.py {base} --tokens 2400000 --evals 8 --eval_windows 128 --questions 0"


def real_lr_commands():
    for lr in REAL_LEARNING_RATES:
        flags = f"--stage clm --lr {lr} --tokens 400000 --evals 1 --eval_windows 352"
        yield real_rho(1, f"lr{lr}", flags)


def real_commands():
    shared = f"--lr {REAL_LEARNING_RATE} --evals 6 --eval_windows 352"
    slm = f"--stage slm {shared} --tokens 1200000"
    for seed in SEEDS:
        arms = {
            "ref": f"--stage ref {shared} --ref_tokens 1200000",
            "clm": f"--stage clm {shared} --tokens 1200000",
            "slm-random": f"{slm} --select random --ratio 0.6",
            "slm": f"{slm} --ratio 0.6",
            "slm-30": f"{slm} --ratio 0.3",
        }
        if seed == 3:  # self-reference, with another seed's CLM run as the reference
            for rule in ("ref_loss", "ref_both"):
                reference = "--ratio 0.7 --reference out/real/seed2/clm.pt"
                arms[f"self-{rule}"] = f"{slm} {reference} --select {rule}"
        for name, flags in arms.items():
            yield " && ".join([real_rho(seed, name, flags), *real_questions(seed, name)])


def real_questions(seed, name):
    ask = f"python eval_math.py --ckpt out/real/seed{seed}/{name}.pt --shots 0"
    ask += " --max_new_tokens 128 --task data/src"
    return [f"{ask}/{task}.jsonl" for task in TASKS]


def started_name(arm, rate):
    return f"started-{arm}-lr{rate}"


def started_run(arm, rate):
    """Seed 1 of an arm that starts from its reference, in place of the base model."""
    reference = "out/real/seed1/ref.pt"
    flags = f"{STARTED[arm].flags} --lr {rate} --tokens 1200000 --evals 6 --eval_windows 352"
    run = real_rho(1, started_name(arm, rate), flags.replace("REF", reference))
    run = run.replace("--init out/real/base.pt", f"--init {reference}")
    return " && ".join([run, *real_questions(1, started_name(arm, rate))])


def real_model_commands():
    """Only a model of clean text: the reference of `real-arms`."""
    for arm, started in STARTED.items():
        for rate in started.rates:
            yield started_run(arm, rate)


# {table: its commands}, in the order in which they must be started.
DEMO = {
    "main": main_commands,
    "fresh": fresh_commands,
    "ratio": ratio_commands,
    "long": long_commands,
    "lr": lr_commands,
    "dirt": dirt_commands,
    "scope": scope_commands,
    "references": references_commands,
    "dynamics": dynamics_commands,
    "self": self_commands,
    "variants": variants_commands,
    "sft": sft_commands,
    "clean-data": clean_data_commands,
    "clean-trials": clean_trials_commands,
    "clean": clean_commands,
    "clean-dirtier": dirtier_commands,
    "clean-model": model_commands,
    "controls": controls_commands,
    "slm-lr": slm_lr_commands,
}
REAL = {
    "real-text": real_text_commands,
    "real-base": real_base_commands,
    "real-lr": real_lr_commands,
    "real-arms": real_commands,
    "real-model": real_model_commands,
}
GROUPS = {"demo": DEMO, "real": REAL}


def logs_made(lines):
    """Where the logs of these command lines stand, once collected, as paths within results/."""
    paths = []
    for command in " && ".join(lines).split(" && "):
        out = re.search(r"--out out/(\S+)", command)
        if "rho.py" not in command or not out:
            continue
        # out/seed1 holds runs on the demo's data; out/fresh and out/real stand apart.
        apart = out[1].startswith(("fresh", "real"))
        folder = out[1] if apart else f"runs/{out[1]}"
        if "--stage dynamics" in command:
            paths += [f"{folder}/dynamics-clm.jsonl", f"{folder}/dynamics-slm.jsonl"]
        else:
            name = re.search(r"--name (\S+)", command)[1]
            paths.append(f"{folder}/{name}.jsonl")
    return paths


def main(argv=None):
    words = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="experiments.py", **words)
    names = [*GROUPS, *DEMO, *REAL]
    parser.add_argument("name", nargs="*", help=f"of {', '.join(names)} (default: demo)")
    for name in parser.parse_args(argv).name or ["demo"]:
        if name in GROUPS:
            chosen = [*GROUPS[name].values()]
        elif name in names:
            chosen = [DEMO.get(name) or REAL[name]]
        else:
            parser.error(f"{name}: unknown; there are {', '.join(names)}")
        for commands in chosen:
            print("\n".join(commands()))


if __name__ == "__main__":
    main()
