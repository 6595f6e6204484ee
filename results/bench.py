"""How fast: ratios of this code to another way of doing the same thing.

    python results/bench.py                    all of them, about half an hour on two quiet cores
    python results/bench.py step generate      the groups whose names begin so (-h: the names)
    python results/bench.py --against FOLDER   steps, scoring and generation of this checkout over
                                               those of another one, of an older commit for example
    python results/bench.py --quick            tiny sizes, once each: does every measurement run?

Both sides of a ratio run in turn, and the median of the pairs' ratios is taken: a noisy machine
blurs a ratio but does not shift it, while a time in seconds would mean little. Each ratio is
written to results/bench.jsonl once it is known, the growth with the sizes to results/growth.jsonl.
--quick and --against write nothing.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.profiler import profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's messages

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import growth  # noqa: E402
from contenders import RATIO, Generation, Layer, Scoring, Steps, sizes_of  # noqa: E402
from tokens_page import demo_tokenizer  # noqa: E402

import prepare_data  # noqa: E402


def alternate(ours, other, repeat):
    """Times of ours over times of other, pair by pair; who begins changes from pair to pair."""
    ours()
    other()  # both are warm now
    ratios = []
    for i in range(repeat):
        order = [ours, other] if i % 2 else [other, ours]
        seconds = {}
        for function in order:
            start = time.perf_counter()
            function()
            seconds[function] = time.perf_counter() - start
        ratios.append(seconds[ours] / seconds[other])
    return ratios


def inverse(ratios):
    """Ratios of rates, from those of times."""
    return [1 / ratio for ratio in ratios]


def peak_bytes(function):
    """The most bytes that a function holds at once, beyond what was there, by torch's count."""
    function()
    with profile(profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    held = []
    for event in events:
        if event["name"] == "[memory]":
            found = event["args"]
            held.append((event["ts"], found["Total Allocated"], found["Bytes"]))
    held.sort()
    _, first_total, first_change = held[0]
    before = first_total - first_change
    return max(total for _, total, _ in held) - before


# ---- the measurements: each yields (name, ratios) ------------------------------------------------


def step(shape, repeat, quick):
    """Ours, SLM and CLM, over plain CLM; and SLM over SLM with the reference run online."""
    steps = Steps(sizes_of(shape, quick))
    yield f"step_slm_over_plain {shape}", alternate(steps.our_slm, steps.plain_clm, repeat)
    yield f"step_slm_over_online_ref {shape}", alternate(steps.our_slm, steps.online_slm, repeat)
    yield f"step_clm_over_plain {shape}", alternate(steps.our_clm, steps.plain_clm, repeat)


def compiled(repeat, quick):
    """The demo's SLM step with a compiled model over the one without, once it is warm."""
    eager = Steps(sizes_of("demo", quick))
    other = Steps(sizes_of("demo", quick))
    backend = "eager" if quick else "inductor"
    other.trunk = torch.compile(other.model, backend=backend)
    yield "step_compiled_over_eager demo", alternate(other.our_slm, eager.our_slm, repeat)


def recompute(repeat, quick):
    """The SLM step with --recompute over the one without: memory and time."""
    keeping = Steps(sizes_of("6x384", quick))
    other = Steps(sizes_of("6x384", quick))
    other.model.recompute = True
    memory = peak_bytes(other.our_slm) / peak_bytes(keeping.our_slm)
    yield "step_memory_recompute_over_keeping 6x384", [memory]
    ratios = alternate(other.our_slm, keeping.our_slm, repeat)
    yield "step_time_recompute_over_keeping 6x384", ratios


def loss(repeat, quick):
    """The loss alone, with the logits kept and computed again, over the plain loss."""
    layer = Layer(sizes_of("6x384", quick))
    plain = peak_bytes(layer.plain)
    for form, ours in [("", layer.ours), ("_recomputing", layer.ours_recomputing)]:
        yield f"loss_memory{form}_over_plain 6x384", [peak_bytes(ours) / plain]
        yield f"loss_time{form}_over_plain 6x384", alternate(ours, layer.plain, repeat)


def peak(repeat, quick):
    """Products of our SLM step per second, over the most that matrix products reach here."""
    sizes = sizes_of("6x384", quick)
    steps = Steps(sizes)
    n = 64 if quick else 2048
    matrix = torch.randn(n, n)

    def products():
        for _ in range(4):
            matrix @ matrix

    # Multiplications for one token. Attention is causal: on average it sees half of T positions.
    inside = sum(p.numel() for p in steps.model.layers.parameters() if p.dim() == 2)
    attention = 2 * sizes.n_layer * sizes.n_embd * sizes.T / 2
    head = sizes.V * sizes.n_embd
    forward = inside + attention + head
    gradient = 2 * (inside + attention + RATIO * head)
    multiplications = sizes.B * sizes.T * (forward + gradient)
    least = multiplications / (4 * n**3)  # the step's least time, in times of `products`
    ratios = alternate(steps.our_slm, products, repeat)
    yield "fraction_of_peak 6x384", [least / ratio for ratio in ratios]


# torch's names of operations, without the underscore of those that work in place.
KINDS_OF_WORK = {
    "matrix products": ["mm", "addmm", "bmm", "baddbmm"],
    "attention": [
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    ],
    "exp, log-sum-exp": ["exp", "log", "logsumexp", "logaddexp"],
    "gather, scatter, top k": [
        "gather",
        "scatter_add",
        "index",
        "index_put",
        "_index_put_impl",
        "index_select",
        "embedding_dense_backward",
        "nonzero",
        "topk",
        "where",
    ],
}
OTHER_WORK = "norms, SwiGLU, rotary, copies"


def kind_of_work(event):
    """Which of KINDS_OF_WORK an operation of torch belongs to: it, or what it is a part of.

    Names are compared whole: "exp" is in "expand", and "index" in much.
    """
    while event is not None:
        name = event.name.removeprefix("aten::").removesuffix("_")
        for kind, names in KINDS_OF_WORK.items():
            if name in names:
                return kind
        event = event.cpu_parent
    return OTHER_WORK


def shares(repeat, quick):
    """What our SLM step spends its time on; of one step, whatever `repeat` is."""
    steps = Steps(sizes_of("6x384", quick))
    steps.our_slm()
    with profile() as profiler:
        steps.our_slm()
    spent = dict.fromkeys([*KINDS_OF_WORK, OTHER_WORK], 0.0)
    for event in profiler.events():
        spent[kind_of_work(event)] += event.self_cpu_time_total
    for kind, seconds in spent.items():
        yield f"share of the SLM step 6x384: {kind}", [seconds / sum(spent.values())]


def score(repeat, quick):
    """Scoring the corpus, over the same model's forward pass and logits."""
    scoring = Scoring(sizes_of("6x384", quick))
    ratios = alternate(scoring.ours, scoring.forward, repeat)
    yield "score_rate_over_forward 6x384", inverse(ratios)


def generate(repeat, quick):
    """Greedy answers with the cache, over those without."""
    answers = Generation("6x384", 32, 128, quick)
    ratios = alternate(answers.ours, answers.uncached, repeat)
    yield "generate_rate_over_uncached 32 rows 6x384", inverse(ratios)


def transformers(shape, new, repeat, quick):
    """Greedy answers, over transformers' generate on the same weights, which must say the same.

    Where no answer ends, and where answers "that end" leave our batch.
    """
    batches = [32] if quick else [32, 128]
    for rows in batches:
        for often in (False, True):
            answers = Generation(shape, rows, new, quick, often)
            answers.load_transformers()
            ratios = alternate(answers.ours, answers.transformers, repeat)
            answers.check_same()
            name = f"{rows} rows {shape}"
            if often:
                name += ", that end"
            yield f"generate_rate_over_transformers {name}", inverse(ratios)
            if not often:
                ratios = alternate(answers.matrix_products, answers.ours, repeat)
                yield f"share of generate: the new tokens' matrix products {name}", ratios


def tokenise(repeat, quick):
    """From text to a file of tokens, over tiktoken's own encoding of a batch."""
    # gpt2's needs network, or tiktoken's cache of it.
    encoding = demo_tokenizer() if quick else prepare_data.get_tokenizer({"name": "gpt2"})
    words = []
    for path in sorted(HERE.parent.glob("*.py")):
        words += path.read_text().split()
    rng = random.Random(0)
    n_texts = 20 if quick else 3000
    texts = [" ".join(rng.choices(words, k=800)) for _ in range(n_texts)]
    documents = [prepare_data.Document(text) for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.bin"

        def ours():
            prepare_data.write_tokens(path, iter(documents), encoding, np.dtype("<u2"))

        def tiktoken():
            encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count())

        ratios = alternate(ours, tiktoken, repeat)
    yield "tokenise_rate_over_tiktoken", inverse(ratios)


# {group: (its measurement, its arguments, repetitions)}
GROUPS = {
    "step demo": (step, ["demo"], 15),
    "step 6x384": (step, ["6x384"], 7),
    "step 12x768": (step, ["12x768"], 2),
    "compile": (compiled, [], 15),
    "loss": (loss, [], 7),
    "recompute": (recompute, [], 5),
    "peak": (peak, [], 7),
    "shares": (shares, [], 1),
    "score": (score, [], 7),
    "generate": (generate, [], 2),
    "transformers demo": (transformers, ["demo", 64], 5),
    "transformers 6x384": (transformers, ["6x384", 128], 5),
    "tokenise": (tokenise, [], 5),
}


# ---- two checkouts side by side ------------------------------------------------------------------

AGAINST = {  # contender: repetitions
    "step_slm demo": 31,
    "step_clm demo": 31,
    "step_slm 6x384": 11,
    "step_clm 6x384": 11,
    "score 6x384": 11,
    "generate demo": 11,
    "generate 6x384": 5,
}


class Worker:
    """A process with the code of one checkout loaded, which runs contenders by name."""

    def __init__(self, folder, quick):
        command = [sys.executable, str(HERE / "contenders.py")]
        if quick:
            command.append("--quick")
        env = {**os.environ, "BENCH_CODE": str(Path(folder).resolve())}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=env, **pipes)

    def run(self, name):
        """Run a contender once, and wait for it. While it waits, a worker takes no time."""
        self.process.stdin.write(f"{name}\n")
        self.process.stdin.flush()
        if self.process.stdout.readline() != "done\n":
            raise RuntimeError(f"the worker ended at {name}: its error stands above")

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def against(folder, quick=False):
    """Times of this checkout over those of another one, in turn: yields (name, ratios)."""
    ours = Worker(HERE.parent, quick)
    other = Worker(folder, quick)
    try:
        for name, repeat in AGAINST.items():
            if quick:
                repeat = 1
            yield name, alternate(partial(ours.run, name), partial(other.run, name), repeat)
    finally:
        ours.close()
        other.close()


# ---- main ----------------------------------------------------------------------------------------


def show(name, ratios):
    median = statistics.median(ratios)
    print(f"{name:60} {median:6.2f}   [{min(ratios):.2f}, {max(ratios):.2f}]", flush=True)


def write_record(path, name, ratios):
    """One more ratio in bench.jsonl, in the place of an older one of its name."""
    records = {}
    if path.exists():
        for line in path.read_text().splitlines():
            record = json.loads(line)
            records[record["name"]] = record
    records[name] = {
        "name": name,
        "ratio": round(statistics.median(ratios), 3),
        "low": round(min(ratios), 3),
        "high": round(max(ratios), 3),
        "cores": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "machine": platform.machine(),
    }
    with prepare_data.whole_file(path) as file:
        for record in records.values():
            file.write(f"{json.dumps(record)}\n".encode())


def measure(wanted, quick, folder=HERE):
    """Show the ratios of the groups whose names begin with one of `wanted`, and write them."""
    groups = [group for group in GROUPS if group.startswith(wanted)]
    path = folder / "bench.jsonl"
    if not quick and len(groups) == len(GROUPS):
        path.unlink(missing_ok=True)  # all anew: no ratio of an older commit stays
    for group in groups:
        measurement, arguments, repeat = GROUPS[group]
        if quick:
            repeat = 1
        try:
            for name, ratios in measurement(*arguments, repeat, quick):
                show(name, ratios)
                if not quick:
                    write_record(path, name, ratios)
        except (ImportError, prepare_data.InputError) as error:
            print(f"{group}: skipped, {error}", flush=True)


def measure_growth(quick, folder=HERE):
    lines = []
    for record in growth.measure(quick):
        lines.append(json.dumps(record))
        print(lines[-1], flush=True)
    if not quick:
        (folder / "growth.jsonl").write_text("\n".join(lines) + "\n")


def main(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__, formatter_class=form)
    names = [*GROUPS, "growth"]
    help_groups = f"beginnings of: {', '.join(names)} (default: all)"
    parser.add_argument("groups", nargs="*", help=help_groups)
    parser.add_argument("--against", metavar="FOLDER", help="time this checkout over that one")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, once; writes nothing")
    args = parser.parse_args(argv)
    for group in args.groups:
        if not any(name.startswith(group) for name in names):
            parser.exit(2, f"bench.py: {group} is no group. There are: {', '.join(names)}\n")
    if args.against:
        if not Path(args.against, "rho.py").exists():
            parser.exit(2, f"bench.py: --against {args.against}: no rho.py there\n")
        for name, ratios in against(args.against, args.quick):
            show(f"{name}: this over {args.against}", ratios)
        return
    wanted = tuple(args.groups) or ("",)
    measure(wanted, args.quick)
    if "growth".startswith(wanted):
        measure_growth(args.quick)


if __name__ == "__main__":
    main()
