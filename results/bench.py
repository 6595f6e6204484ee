"""Ratios of this code to the plain way, both sides measured in one run, interleaved; medians.

    python results/bench.py            all of them, about half an hour on two quiet cores
    python results/bench.py step       only those whose name begins so

Writes results/bench.jsonl, one record a ratio (its median, its spread over the repetitions, and the
machine), and results/growth.jsonl. These machines are noisy: a ratio within one run means
something, a time does not.
"""

import contextlib
import copy
import io
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.profiler import profile

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import prepare_data  # noqa: E402
import rho  # noqa: E402
from model import GPT, GPTConfig, generate, save_hf  # noqa: E402

SHAPES = {  # n_layer, n_embd, n_head, T, V, batch
    "demo": (3, 128, 4, 128, 768, 8),
    "6x384": (6, 384, 6, 256, 50304, 4),
    "12x768": (12, 768, 12, 1024, 50304, 1),
}


def interleaved(ours, other, repeat):
    """Time of ours over other: (median of the pairs' ratios, lowest, highest)."""
    ours(), other()
    ratios = []
    for i in range(repeat):
        times = {}
        for f in (ours, other) if i % 2 else (other, ours):
            start = time.perf_counter()
            f()
            times[f] = time.perf_counter() - start
        ratios.append(times[ours] / times[other])
    return statistics.median(ratios), min(ratios), max(ratios)


def make(shape):
    n_layer, n_embd, n_head, T, V, B = SHAPES[shape]
    torch.manual_seed(0)
    inner = n_embd * 8 // 3 // 64 * 64
    config = GPTConfig(V, T, n_layer, n_head, n_head, n_embd, inner)
    x, y = torch.randint(V, (2, B, T))
    return GPT(config), x, y


def contenders(shape):
    """One step's forward and backward, by name; and the loss layer alone, by name."""
    model, x, y = make(shape)
    reference = make(shape)[0].eval()
    ref_loss = torch.rand(y.numel()) * 10
    weight = model.lm_head.weight

    def plain():  # as nanoGPT: the logits are returned, hence alive until the step ends
        logits = model.head(model(x))
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        loss.backward()
        model.zero_grad()

    def online():
        with torch.no_grad():
            known = rho.token_loss(reference.head(reference(x)), y)
        student_loss = rho.token_loss(model.head(model(x)), y)
        mask = rho.select_tokens(rho.score_tokens("excess", student_loss, known), 0.6)
        rho.selective_loss(student_loss, mask).backward()
        model.zero_grad()

    def layer(hidden, ratio):
        def choose(student_loss):
            return rho.select_tokens(rho.score_tokens("excess", student_loss, ref_loss), ratio)

        k = round(ratio * y.numel())
        loss, _, _ = rho.HeadLoss.apply(hidden, weight, y.flatten(), choose, k)
        (loss / k).backward()

    def ours(ratio):
        layer(model(x).flatten(0, 1), ratio)
        model.zero_grad()

    hidden = model(x).detach().flatten(0, 1).requires_grad_()

    def plain_layer():
        logits = hidden @ weight.T
        F.cross_entropy(logits, y.flatten()).backward()
        hidden.grad = weight.grad = None

    def our_layer(keep):
        rho.KEEP, before = keep, rho.KEEP
        layer(hidden, 0.6)
        rho.KEEP = before
        hidden.grad = weight.grad = None

    steps = {"plain": plain, "online": online, "slm": lambda: ours(0.6), "clm": lambda: ours(1.0)}
    kept, again = lambda: our_layer(2**40), lambda: our_layer(0)
    return model, steps, {"plain": plain_layer, "kept": kept, "again": again}


def step_ratios(shape, repeat):
    """Forward and backward: ours CLM and SLM, plain CLM, and SLM with the reference run online."""
    _, f, _ = contenders(shape)
    yield f"step_slm_over_plain {shape}", interleaved(f["slm"], f["plain"], repeat)
    yield f"step_slm_over_online_ref {shape}", interleaved(f["slm"], f["online"], repeat)
    yield f"step_clm_over_plain {shape}", interleaved(f["clm"], f["plain"], repeat)


def peak_bytes(f):
    """Most bytes that f holds at once, beyond what was there, by torch's own count."""
    f()
    with profile(profile_memory=True) as p, tempfile.NamedTemporaryFile(suffix=".json") as out:
        f()
    p.export_chrome_trace(out.name)
    events = json.loads(Path(out.name).read_text())["traceEvents"]
    Path(out.name).unlink()
    held = [e for e in events if e["name"] == "[memory]"]
    held = [(e["ts"], e["args"]["Total Allocated"], e["args"]["Bytes"]) for e in held]
    (_, first, change), *_ = held = sorted(held)
    return max(total for _, total, _ in held) - (first - change)


def loss_ratios():
    """The loss layer: peak memory, and time, of both forms over the plain one's."""
    _, _, f = contenders("6x384")
    plain = peak_bytes(f["plain"])
    for form, name in (("kept", ""), ("again", "_recomputing")):
        ratio = peak_bytes(f[form]) / plain
        yield f"loss_memory{name}_over_plain 6x384", (ratio, ratio, ratio)
        yield f"loss_time{name}_over_plain 6x384", interleaved(f[form], f["plain"], 7)


def peak_ratios():
    """Matrix products of our SLM step per second over what this machine does at best; shares."""
    model, f, _ = contenders("6x384")
    n_layer, C, _, T, V, B = SHAPES["6x384"]
    inside = sum(p.numel() for p in model.layers.parameters() if p.dim() == 2)
    attention = 2 * n_layer * C * T / 2  # multiplications per token, causal: half
    forward, gradient = inside + attention + V * C, 2 * (inside + attention + 0.6 * V * C)
    operations = 2 * B * T * (forward + gradient)
    a = torch.randn(2048, 2048)

    def product():
        for _ in range(4):
            a @ a

    ratio, low, high = interleaved(f["slm"], product, 7)
    at_best = operations / (8 * 2048**3)  # time of the step's products at the peak rate
    yield "fraction_of_peak", (at_best / ratio, at_best / high, at_best / low)
    with profile() as p:
        f["slm"]()
    kinds = {"matrix products": ("mm",), "attention": ("attention",)}
    kinds |= {"exp, log-sum-exp": ("exp", "logsumexp", "log"), "gather": ("index",)}
    rest = "norms, SwiGLU, rotary, copies"
    spent = dict.fromkeys([*kinds, rest], 0.0)
    for e in p.key_averages():
        name = e.key.removeprefix("aten::")
        kind = next((k for k, parts in kinds.items() if any(part in name for part in parts)), rest)
        spent[kind] += e.self_cpu_time_total
    for kind, time_spent in spent.items():
        share = time_spent / sum(spent.values())
        yield f"share of the SLM step: {kind}", (share, share, share)


def compile_ratios():
    """The demo's step with a compiled trunk over without, once it is warm."""
    model, x, y = make("demo")
    trunk, k = torch.compile(model), round(0.6 * y.numel())

    def choose(student_loss):
        return rho.select_tokens(rho.score_tokens("loss", student_loss), 0.6)

    def step(trunk):
        hidden = trunk(x).flatten(0, 1)
        rho.HeadLoss.apply(hidden, model.lm_head.weight, y.flatten(), choose, k)[0].backward()
        model.zero_grad()

    yield "step_compiled_over_eager demo", interleaved(lambda: step(trunk), lambda: step(model), 15)


def score_ratios():
    """Scoring a batch of 16 windows against the same model's forward over the same batch."""
    model, x, y = make("6x384")
    x, y = x.repeat(4, 1), y.repeat(4, 1)
    run = rho.Run.__new__(rho.Run)  # a processor, float32: no data needed
    run.device, run.cuda, run.dtype = torch.device("cpu"), False, torch.float32
    run.precision = contextlib.nullcontext()

    def forward():
        with torch.no_grad():
            model.head(model(x))

    ours = lambda: rho.score_batch(run, model, (x, y))  # noqa: E731
    yield "score_rate_over_forward", interleaved(forward, ours, 7)


def generate_ratios():
    """Rates, ours over the other's: greedy, 64-token prompts, 128 new tokens."""
    model = make("6x384")[0].eval()
    prompts = torch.randint(50304, (32, 64)).tolist()
    cached = lambda: generate(model, prompts, 128)  # noqa: E731
    uncached = lambda: generate(model, prompts, 128, use_cache=False)  # noqa: E731
    ratio, low, high = interleaved(cached, uncached, 2)
    yield "generate_rate_over_uncached", (1 / ratio, 1 / high, 1 / low)


def assert_same_words(model, prompts, ours, theirs, stop):
    """Greedy answers are the same, or part where only rounding tells two tokens apart.

    Untrained weights make such ties, a few in a thousand answers; float64 says how near one is.
    """
    exact = copy.deepcopy(model).double()
    for prompt, a, b in zip(prompts, ours, theirs, strict=True):
        if a != b:
            same = len(os.path.commonprefix([a, b]))
            logits = exact.head(exact(torch.tensor([prompt + a[:same]])))[0, -1]
            said = [logits[words[same : same + 1] or stop].max() for words in (a, b)]
            assert logits.max() - min(said) < 1e-4, f"not the same tokens: {a}, {b}"


def transformers_ratios():
    """The same against transformers' generate on the same weights, which must say the same.

    Where no answer ends, and where answers "that end" leave ours smaller batches.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    for shape, new in (("demo", 64), ("6x384", 128)):
        model = make(shape)[0].eval()
        with tempfile.TemporaryDirectory() as folder:
            save_hf(model, folder)
            theirs = AutoModelForCausalLM.from_pretrained(folder)
        V = model.config.vocab_size
        often = list(range(0, V, new // 2))  # two in `new` tokens end an answer
        for size, stop in itertools.product((32, 128), ([], often)):
            prompts = torch.randint(V, (size, 64))
            how = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
            how |= {"eos_token_id": stop or None, "attention_mask": torch.ones_like(prompts)}
            said = []

            def ours(prompts=prompts, said=said, model=model, new=new, stop=stop):
                said.append(generate(model, prompts.tolist(), new, stop))

            def other(prompts=prompts, how=how, said=said, theirs=theirs, stop=frozenset(stop)):
                rows = theirs.generate(prompts, **how)[:, 64:].tolist()
                said.append([list(itertools.takewhile(lambda t: t not in stop, r)) for r in rows])

            def products(model=model, new=new, size=size):
                weights = [p for p in model.parameters() if p.dim() == 2][1:]  # no embedding
                inputs = [torch.ones(size, weight.shape[1]) for weight in weights]
                for _ in range(new):
                    for x, weight in zip(inputs, weights, strict=True):
                        F.linear(x, weight)

            ratio, low, high = interleaved(ours, other, 5)
            for words in said[1:]:
                assert_same_words(model, prompts.tolist(), said[0], words, stop)
            name = f"{size} rows {shape}" + ", that end" * bool(stop)
            yield f"generate_rate_over_transformers {name}", (1 / ratio, 1 / high, 1 / low)
            if not stop:
                name = f"share of generate: the new tokens' matrix products {name}"
                with torch.inference_mode():
                    yield name, interleaved(products, ours, 3)


def tokenise_ratios():
    """Rates: prepare_data's stream from text to disk over a bare encode_ordinary_batch."""
    spec = {"name": "gpt2"}
    try:
        encoding = prepare_data.get_tokenizer(spec)
    except prepare_data.InputError as error:
        print(f"tokenise: skipped, {error}")
        return
    rng = random.Random(0)
    words = [w for path in HERE.parent.glob("*.py") for w in path.read_text().split()]
    texts = [" ".join(rng.choices(words, k=800)) for _ in range(3000)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.bin"

        def ours():
            prepare_data.write_tokens(path, iter(texts), encoding, np.dtype("<u2"))

        def bare():
            encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count())

        ratio, low, high = interleaved(ours, bare, 5)
    yield "tokenise_rate_over_tiktoken", (1 / ratio, 1 / high, 1 / low)


GROWTH = {  # one at a time from the first of each; corpus in tokens
    "width": (128, 256, 512, 1024),
    "context": (128, 256, 512, 1024),
    "vocabulary": (1024, 8192, 50304, 131072),
    "corpus": (10**6, 10**7, 10**8, 10**9),
}


def grow(width, context, vocabulary, corpus):
    """In a process of its own: tokens/s, and peak memory, of --stage slm on synthetic text."""
    import resource

    with tempfile.TemporaryDirectory() as folder:
        data, out, dtype = Path(folder), Path(folder, "out"), np.dtype("<u4")
        meta = {"dtype": "uint32", "tokenizer": {"name": "none", "n_vocab": vocabulary}}
        meta["tokens"] = {"train": corpus, "ref": 2 * context, "val": 2 * context}
        meta["tokens"]["val_corpus"] = 2 * context
        for name, n in meta["tokens"].items():
            with open(data / f"{name}.bin", "wb") as f:
                f.truncate(n * dtype.itemsize)  # zeros, which take no space
        meta["files"] = {"train.bin": "zeros"}
        (data / "meta.json").write_text(json.dumps(meta))
        shape = {"n_embd": width, "n_inner": 3 * width, "block_size": context, "n_layer": 4}
        batch = {"batch_size": 2048 // context, "micro_batch": 2048 // context}
        small = {"questions": 0, "eval_windows": 1, "evals": 1, "ref_tokens": 2048}
        cfg = rho.Config(data=str(data), out=str(out), tokens=8 * 2048, **shape, **batch, **small)
        run = rho.Run(cfg)
        with contextlib.redirect_stdout(io.StringIO()):
            rho.train_arm(cfg, run, "ref")
            records = rho.train_arm(cfg, run, "slm")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"tokens_per_s": round(16384 / records[-1]["seconds"]), "gib": peak}))


def growth():
    rows = []
    for axis, values in GROWTH.items():
        for value in values:
            sizes = {k: v[0] for k, v in GROWTH.items()} | {axis: value}
            command = [sys.executable, __file__, "grow", *map(str, sizes.values())]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append({"axis": axis, **sizes, **json.loads(done.stdout.splitlines()[-1])})
            print(rows[-1], flush=True)
    (HERE / "growth.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def main(wanted):
    machine = {"cores": torch.get_num_threads(), "torch": str(torch.__version__)}
    machine["machine"] = platform.machine()
    groups = {
        "step demo": lambda: step_ratios("demo", 15),
        "step 6x384": lambda: step_ratios("6x384", 7),
        "step 12x768": lambda: step_ratios("12x768", 2),
        "compile": compile_ratios,
        "loss": loss_ratios,
        "peak": peak_ratios,
        "score": score_ratios,
        "generate": generate_ratios,
        "transformers": transformers_ratios,
        "tokenise": tokenise_ratios,
    }
    if "growth".startswith(wanted):
        growth()
    path = HERE / "bench.jsonl"
    lines = path.read_text().splitlines() if wanted and path.exists() else []
    records = {r["name"]: r for r in map(json.loads, lines)}
    for group, run in groups.items():
        if group.startswith(wanted):
            for name, (median, low, high) in run():
                print(f"{name:40} {median:6.2f}   [{low:.2f}, {high:.2f}]", flush=True)
                ratio = {"ratio": round(median, 3), "low": round(low, 3), "high": round(high, 3)}
                records[name] = {"name": name, **ratio, **machine}
                path.write_text("".join(json.dumps(r) + "\n" for r in records.values()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["grow"]:
        grow(*map(int, sys.argv[2:]))
    else:
        main(sys.argv[1] if len(sys.argv) > 1 else "")
