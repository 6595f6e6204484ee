"""Controls: other uses of the clean text, other units and rules, other masks: the commands.

experiments.py prints them. Arms and settings were fixed on seed 1, before other seeds were run.
"""

from typing import NamedTuple


def rho(name, flags, seed, data="demo"):
    """One run on one of the demo's data sets."""
    places = f"--data data/{data} --out out/seed{seed} --seed {seed} --name {name}"
    return f"python rho.py {places} {flags}"


# ---- the same clean text, used otherwise ---------------------------------------------------------

# Each arm costs this many tokens in all: its own, its reference's and its first model's.
IN_ALL = 1_350_000
# The reference's share of them. The demo is the cell ("1", "third").
REF_TOKENS = {"third": 450_000, "tenth": 135_000}
# The amount of clean text: the demo's, three tenths of it, a tenth. {amount: problems}
AMOUNTS = {"1": 5000, "0.3": 1500, "0.1": 500}
# Which cells were run: {(amount, reference's share): seeds}.
CLEAN_CELLS = {
    ("1", "third"): (1, 2, 3, 4, 5),
    ("1", "tenth"): (1, 2, 3),
    ("0.3", "third"): (1, 2, 3),
    ("0.3", "tenth"): (1, 2, 3),
    ("0.1", "third"): (1, 2, 3),
    ("0.1", "tenth"): (1, 2, 3),
}

# With the cheaper reference, SLM on both texts is nearer to CLM on them: more seeds, and other
# shares of the corpus kept (seed 1). The arms started from that poor reference have a low rate,
# chosen for a better one: they are also run at the rate of new weights (seed 1).
CLOSE_CELL = ("1", "tenth")
CLOSE_SEEDS = (4, 5)
TRIED_RATIOS = ["0.3", "0.7"]
BEGUN_ARMS = ["clean_then_clm", "clean_then_slm"]
NEW_RATE = "1.5e-3"
# With less clean text, the shares of it and of the corpus were also looked for with SLM (seed 1).
KEPT_CELL = ("0.3", "tenth")
KEPT_MIXES = ["0.6", "0.8"]
KEPT_RATIOS = ["0.15", "0.3"]


class Use(NamedTuple):
    """A way to use clean text. needs_ref: it needs a reference first, whose tokens count."""

    label: str
    flags: str
    needs_ref: bool = True


# {arm: its label, its flags besides data, seed and length}. REF stands for the reference's path.
USES = {
    "clean_only": Use("clean text alone", "--stage ref", needs_ref=False),
    "clm": Use("CLM on the corpus", "--stage clm", needs_ref=False),
    "mixed_clm": Use("CLM on corpus and clean text", "--stage clm --mix MIX", needs_ref=False),
    "clean_then_clm": Use("CLM, started from the reference", "--stage clm --init REF"),
    "slm": Use("SLM (the paper's)", "--stage slm --reference REF"),
    "clean_then_slm": Use(
        "SLM, started from the reference", "--stage slm --reference REF --init REF"
    ),
    "mixed_slm": Use("SLM on corpus and clean text", "--stage slm --reference REF --mix MIX"),
    "distilled": Use("distillation", "--stage clm --reference REF --fast false"),
}
# What was tried on seed 1 of the demo's cell, with a reference at 7.5e-4, before the other runs
# (1.9e-4, 6e-3 and 3e-3 for CLM on the corpus: after them).
TRIED_RATES = ["1.9e-4", "3.75e-4", "7.5e-4", "1.5e-3", "3e-3", "6e-3"]
TRIED = {
    "ref": TRIED_RATES[2:5],
    "clean_only": TRIED_RATES[1:5],
    "clm": TRIED_RATES[2:5],
    "mixed_clm": TRIED_RATES[1:5],
    "clean_then_clm": TRIED_RATES[:4],
    "slm": TRIED_RATES[1:5],
    "clean_then_slm": TRIED_RATES[:4],
    "mixed_slm": TRIED_RATES[1:],
    "distilled": TRIED_RATES[1:4],
}
# The best of them by answers, or one within two points of it.
RATES = {
    "ref": "1.5e-3",
    "clean_only": "1.5e-3",
    "clm": "1.5e-3",
    "mixed_clm": "1.5e-3",
    "clean_then_clm": "3.75e-4",
    "slm": "1.5e-3",
    "clean_then_slm": "7.5e-4",
    "mixed_slm": "3e-3",
    "distilled": "7.5e-4",
}
# The share of clean text in a mixture: those tried with CLM on seed 1, the first one tried, and the
# one chosen. The name of a run with another share than the first ends in it.
TRIED_MIX = {
    "1": ["0.3", "0.6", "0.8"],
    "0.3": ["0.15", "0.3", "0.6", "0.8"],
    "0.1": ["0.05", "0.15", "0.3", "0.6"],
}
FIRST_MIX = {"1": "0.6", "0.3": "0.3", "0.1": "0.15"}
MIX = {"1": "0.6", "0.3": "0.8", "0.1": "0.3"}


def clean_data(amount):
    """The folder in data/ with this amount of clean text."""
    return "demo" if amount == "1" else f"clean{amount}"


def use_name(amount, share, arm, mix=None):
    """The name of a run: an arm that needs no reference is the same for every share."""
    name = f"use-{amount}-{share}-{arm}"
    if arm in USES and not USES[arm].needs_ref:
        name = f"use-{amount}-{arm}"
    mix = mix or MIX[amount]
    if arm.startswith("mixed") and mix != FIRST_MIX[amount]:
        name += f"-mix{mix}"
    return name


def trial_name(arm, rate):
    """The name of a run in which a learning rate was tried."""
    name = use_name("1", "third", arm).replace("use", "clean", 1)
    return name if rate == "7.5e-4" else f"{name}-lr{rate}"


def use_command(amount, share, arm, seed, rate, name, ref, mix=None):
    """The command of one arm, or of the reference (arm "ref")."""
    if arm == "ref":
        flags = f"--stage ref --ref_tokens {REF_TOKENS[share]}"
    else:
        use = USES[arm]
        tokens = IN_ALL - REF_TOKENS[share] * use.needs_ref
        length = "--ref_tokens" if arm == "clean_only" else "--tokens"
        flags = f"{use.flags} {length} {tokens}".replace("MIX", mix or MIX[amount])
        flags = flags.replace("REF", f"out/seed{seed}/{ref}.pt")
    line = rho(name, f"{flags} --lr {rate} --evals 3", seed, clean_data(amount))
    if arm == "distilled":
        line = line.replace("rho.py", "out/distilled/rho.py")
    return line


def use_run(amount, share, arm, seed, mix=None):
    name = use_name(amount, share, arm, mix)
    ref = use_name(amount, share, "ref")
    return use_command(amount, share, arm, seed, RATES[arm], name, ref, mix)


def trial_run(arm, rate, seed=1):
    name = trial_name(arm, rate)
    return use_command("1", "third", arm, seed, rate, name, trial_name("ref", "7.5e-4"))


def changed_copy(name):
    """Commands that make a changed copy of the scripts: several variants can run at once."""
    return [
        f"mkdir -p out/{name} && cp *.py out/{name}",
        f"git apply --directory=out/{name} results/variants/{name}.diff",
    ]


def clean_data_commands():
    for amount, problems in AMOUNTS.items():
        if amount != "1":
            yield f"python prepare_data.py --n_ref {problems} --out data/{clean_data(amount)}"
    yield " && ".join(changed_copy("distilled"))


def clean_trials_commands():
    for arm, rates in TRIED.items():
        for rate in rates:
            yield trial_run(arm, rate)
    for amount, tried in TRIED_MIX.items():
        for mix in tried:
            if mix != MIX[amount]:  # that one is a run of `clean`
                yield use_run(amount, "third", "mixed_clm", 1, mix)


def clean_commands():
    """The map: every amount of clean text, both shares of the reference."""
    for (amount, share), seeds in CLEAN_CELLS.items():
        arms = [arm for arm, use in USES.items() if use.needs_ref or share == "third"]
        for seed in seeds:
            # One job, as all but three of its runs need its first one.
            runs = [use_run(amount, share, arm, seed) for arm in ("ref", *arms)]
            yield " && ".join(runs)
    for seed in CLOSE_SEEDS:
        yield " && ".join(use_run(*CLOSE_CELL, arm, seed) for arm in ("ref", "mixed_slm"))
    for ratio in TRIED_RATIOS:
        run = use_run(*CLOSE_CELL, "mixed_slm", 1)
        name = use_name(*CLOSE_CELL, "mixed_slm")
        yield run.replace(name, ratio_name(ratio)) + f" --ratio {ratio}"
    for arm in BEGUN_ARMS:
        ref = use_name(*CLOSE_CELL, "ref")
        yield use_command(*CLOSE_CELL, arm, 1, NEW_RATE, new_rate_name(arm), ref)
    ref = use_name(*KEPT_CELL, "ref")
    for mix in KEPT_MIXES:
        for ratio in KEPT_RATIOS:
            name = tried_name(mix, ratio)
            run = use_command(*KEPT_CELL, "mixed_slm", 1, RATES["mixed_slm"], name, ref, mix)
            yield f"{run} --ratio {ratio}"


def ratio_name(ratio):
    return f"{use_name(*CLOSE_CELL, 'mixed_slm')}-ratio{ratio}"


def tried_name(mix, ratio):
    """SLM on both texts with this share of clean text, this share of the corpus kept."""
    return f"try-{KEPT_CELL[0]}-mix{mix}-ratio{ratio}"


def new_rate_name(arm):
    return f"{use_name(*CLOSE_CELL, arm)}-lr{NEW_RATE}"


# ---- a dirtier corpus, for longer ----------------------------------------------------------------

# Six pieces of dirt for each problem, 1,500 clean problems, three times as many tokens. Of the
# corpus a fifth is kept, near its share of target text, as in the long runs with such a corpus.
DIRTIER_DATA = "dirty0.3"
DIRTIER_IN_ALL = 4_000_000
DIRTIER_REF = 400_000
# The shares of clean text in the mixture that were tried, seed 1.
DIRTIER_MIX = {
    "mixed_clm": ["0.15", "0.3", "0.6", "0.8"],
    "mixed_slm": ["0.15", "0.3", "0.6"],
}


def dirtier_name(arm, mix=None):
    name = f"dirty-{arm}"
    if mix:
        name += f"-mix{mix}"
    return name


def dirtier_run(arm, mix=None):
    """The command of one arm; mix: the share of clean text, where the arm has one."""
    if arm == "ref":
        flags = f"--stage ref --ref_tokens {DIRTIER_REF} --lr {RATES[arm]} --evals 3"
        return rho(dirtier_name(arm), flags, 1, DIRTIER_DATA)
    use = USES[arm]
    tokens = DIRTIER_IN_ALL
    if use.needs_ref:
        tokens -= DIRTIER_REF
    length = "--ref_tokens" if arm == "clean_only" else "--tokens"
    flags = f"{use.flags} {length} {tokens} --lr {RATES[arm]} --evals 10"
    if "slm" in arm:
        flags += " --ratio 0.2"
    flags = flags.replace("MIX", mix or "").replace("REF", f"out/seed1/{dirtier_name('ref')}.pt")
    return rho(dirtier_name(arm, mix), flags, 1, DIRTIER_DATA)


def dirtier_commands():
    make = "python prepare_data.py --wrong 0.75 --dirty 6 --n_ref 1500"
    make += f" --max_tokens {DIRTIER_IN_ALL + 200_000} --out data/{DIRTIER_DATA}"
    yield " && ".join([make, *(dirtier_run(arm) for arm in ("ref", "slm"))])
    yield dirtier_run("clean_only")
    for arm, mixes in DIRTIER_MIX.items():
        for mix in mixes:
            yield dirtier_run(arm, mix)


# ---- only a model of clean text, beside that dirtier corpus --------------------------------------

# The model is the main comparison's reference. The corpus is that of the longest run with six
# pieces of dirt for each problem; of it a fifth is kept, as there.
MODEL_DATA = "long-d6"
MODEL_IN_ALL = 4_000_000
MODEL_REF = 900_000
MODEL_RATIO = "0.2"
MODEL_USES = {
    arm: USES[arm] for arm in ("clm", "slm", "distilled", "clean_then_clm", "clean_then_slm")
}
# Two controls: as many tokens, by chance; and without the student's half of the excess.
MODEL_USES["random"] = Use(
    "random tokens, started from the reference", "--stage slm --select random --init REF"
)
MODEL_USES["low_loss"] = Use(
    "low reference loss, started from the reference",
    "--stage slm --select ref_loss --reference REF --init REF",
)
# {arm: the learning rates tried on seed 1}. Of an arm with several the last was no better.
MODEL_TRIED = {
    "clm": ["1.5e-3"],
    "slm": ["1.5e-3"],
    "distilled": ["7.5e-4", "1.5e-3", "3e-3"],
    "clean_then_clm": ["3.75e-4", "1.9e-4", "9.4e-5"],
    "clean_then_slm": ["7.5e-4", "3.75e-4", "1.9e-4", "9.4e-5"],
    "random": ["1.9e-4"],
    "low_loss": ["1.9e-4"],
}
# The best of them by answers.
MODEL_RATES = {
    "clm": "1.5e-3",
    "slm": "1.5e-3",
    "distilled": "1.5e-3",
    "clean_then_clm": "1.9e-4",
    "clean_then_slm": "1.9e-4",
    "random": "1.9e-4",
    "low_loss": "1.9e-4",
}
# The arms that start from the model are the nearest to it, and have more seeds.
MODEL_SEEDS = (1, 2, 3, 4, 5)
FEWER_SEEDS = (1, 2, 3)


def model_name(arm, rate):
    """The name of a run; the rate that was tried first is not in it."""
    name = f"model-{arm}"
    return name if rate == MODEL_TRIED[arm][0] else f"{name}-lr{rate}"


def model_run(arm, rate, seed):
    use = MODEL_USES[arm]
    tokens = MODEL_IN_ALL
    if use.needs_ref:
        tokens -= MODEL_REF
    flags = use.flags.replace("REF", f"out/seed{seed}/ref.pt")
    flags += f" --tokens {tokens} --lr {rate} --evals 10"
    if "--stage slm" in use.flags:
        flags += f" --ratio {MODEL_RATIO}"
    line = rho(model_name(arm, rate), flags, seed, MODEL_DATA)
    if arm == "distilled":
        line = line.replace("rho.py", "out/distilled/rho.py")
    return line


# Other shares of the corpus kept by SLM that starts from the model, on seed 1.
MODEL_RATIOS = ["0.1", "0.4"]
# The same with a better model, which was trained at another rate.
BETTER = "model-better"
BETTER_SLM = "model-better_slm"


def kept_name(ratio):
    """The run of SLM, started from the model, that keeps this share of the corpus."""
    if ratio == MODEL_RATIO:
        return model_name("clean_then_slm", MODEL_RATES["clean_then_slm"])
    return f"model-clean_then_slm-ratio{ratio}"


def better_run(seed):
    train = f"--stage ref --ref_tokens {MODEL_REF} --lr {RATES['ref']} --evals 3"
    rate = MODEL_RATES["clean_then_slm"]
    started = model_run("clean_then_slm", rate, seed).replace("ref.pt", f"{BETTER}.pt")
    started = started.replace(kept_name(MODEL_RATIO), BETTER_SLM)
    return " && ".join([rho(BETTER, train, seed), started])


def model_commands():
    """They need the text of `long`, the references of `main` and the changed copy of `clean`."""
    for arm, rates in MODEL_TRIED.items():
        for rate in rates:
            yield model_run(arm, rate, 1)
    for seed in MODEL_SEEDS[1:]:
        for arm, rate in MODEL_RATES.items():
            if seed in FEWER_SEEDS or arm in BEGUN_ARMS:
                yield model_run(arm, rate, seed)
    for ratio in MODEL_RATIOS:
        rate = MODEL_RATES["clean_then_slm"]
        run = model_run("clean_then_slm", rate, 1)
        run = run.replace(f"--ratio {MODEL_RATIO}", f"--ratio {ratio}")
        yield run.replace(kept_name(MODEL_RATIO), kept_name(ratio))
    for seed in FEWER_SEEDS:
        yield better_run(seed)


# ---- other units, other rules, other masks -------------------------------------------------------


class Control(NamedTuple):
    """A run as long as the demo's: its label, the diff in variants/ that it needs, its flags.

    In the flags REF is the demo's reference of the same seed; OUT is the folder of that seed.
    """

    label: str
    variant: str = ""
    flags: str = "--select excess --reference REF"


CONTROL_SEEDS = (1, 2, 3)
CONTROL_CLM = "control-clm"
CONTROL_SLM = trial_name("slm", "7.5e-4")
# Another student's losses, stored, in place of the student's own.
OTHER = "--select ref_loss --reference REF,OUT/control-{}.pt"
SMALL = "--n_layer 2 --n_embd 64 --n_inner 192 --n_head 2 --n_kv_head 2"
HALVES = "--select ref_loss --ratio 0.8 --reference OUT/half-0.pt,OUT/half-1.pt"
# {table: {run: Control}}, in the order in which they are run.
CONTROLS = {
    "units": {
        CONTROL_CLM: Control("all tokens (CLM)", flags="--select all"),
        "control-random": Control("random tokens", flags="--select random"),
        "control-windows": Control("windows, by their mean excess", "windows"),
        "control-pages": Control("pages in a window, by their mean excess", "pages"),
    },
    "no-reference": {
        "control-easy-0.5": Control("lowest loss, 50 %", "easy", "--select loss"),
        "control-easy-0.8": Control("lowest loss, 80 %", "easy", "--select loss --ratio 0.8"),
        "control-gradient": Control("highest gradient", "gradient", "--select loss --fast false"),
        "control-tanh": Control("loss x tanh(position)", "tanh", "--select loss"),
        "half-0": Control("(reference 1: CLM on even windows)", "halves", "--select all"),
        "half-1": Control("(reference 2: CLM on odd windows)", "halves", "--select all"),
        "control-halves": Control("each scores the other's: low loss, 80 %", "halves", HALVES),
    },
    "when": {
        "control-late": Control("excess, after a tenth of the steps", "late"),
        "control-stochastic": Control("drawn by excess (Gumbel noise)", "stochastic"),
    },
    "fixed": {
        "control-early": Control("(that early CLM itself)", flags="--select all --tokens 100000"),
        "control-small": Control("(that small CLM itself)", flags=f"--select all {SMALL}"),
        "control-by-clm": Control("mask by a finished CLM", "fixed", OTHER.format("clm")),
        "control-by-early": Control(
            "mask by an early CLM (0.1 M tokens)", "fixed", OTHER.format("early")
        ),
        "control-by-small": Control("mask by a small CLM (2 x 64)", "fixed", OTHER.format("small")),
    },
}
# The two rates of CLM's sweep that clean-trials lacks, for SLM.
SLM_RATES = ["5e-4", "1e-3"]


def control_run(name, control, seed):
    out = f"out/seed{seed}"
    flags = control.flags.replace("REF", f"{out}/{trial_name('ref', '7.5e-4')}.pt")
    line = rho(name, f"--stage slm --evals 3 {flags.replace('OUT', out)}", seed)
    if control.variant:
        line = line.replace("rho.py", f"out/{control.variant}/rho.py")
    return line


def controls_commands():
    """One line for each seed and table: within a table later runs need earlier ones."""
    variants = [control.variant for table in CONTROLS.values() for control in table.values()]
    copies = [command for name in sorted({*variants} - {""}) for command in changed_copy(name)]
    yield " && ".join(copies)
    for seed in CONTROL_SEEDS:
        if seed > 1:  # of seed 1 they are runs of clean-trials
            yield " && ".join(trial_run(arm, "7.5e-4", seed) for arm in ("ref", "slm"))
        for table in CONTROLS.values():
            yield " && ".join(control_run(*item, seed) for item in table.items())


def slm_lr_commands():
    for rate in SLM_RATES:
        yield trial_run("slm", rate)
