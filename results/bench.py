"""Ratios of this code to the plain way, both sides measured in one run, interleaved; medians.

    python results/bench.py            all of them, about ten minutes on two quiet cores
    python results/bench.py step       only those whose name begins so

Writes results/bench.jsonl, one record a ratio: its median, its spread over the repetitions, and the
machine. These machines are noisy: a ratio within one run means something, a time does not.
"""

import json
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import prepare_data  # noqa: E402
import rho  # noqa: E402
from model import GPT, GPTConfig, generate  # noqa: E402

SHAPES = {  # n_layer, n_embd, n_head, T, V, batch
    "demo": (4, 128, 4, 128, 768, 16),
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


def step_ratios(shape, repeat):
    """Forward and backward: ours CLM and SLM, plain CLM, and SLM with the reference run online."""
    model, x, y = make(shape)
    reference = make(shape)[0].eval()
    ref_loss = torch.rand(y.numel()) * 10

    def plain():
        loss = F.cross_entropy(model.head(model(x)).flatten(0, 1), y.flatten())
        loss.backward()
        model.zero_grad()

    def online():
        with torch.no_grad():
            known = rho.token_loss(reference.head(reference(x)), y)
        student_loss = rho.token_loss(model.head(model(x)), y)
        mask = rho.select_tokens(rho.score_tokens("excess", student_loss, known), 0.6)
        rho.selective_loss(student_loss, mask).backward()
        model.zero_grad()

    def ours(ratio):
        def choose(student_loss):
            return rho.select_tokens(rho.score_tokens("excess", student_loss, ref_loss), ratio)

        def step():
            hidden = model(x).flatten(0, 1)
            loss, _, mask = rho.HeadLoss.apply(hidden, model.lm_head.weight, y.flatten(), choose)
            (loss / mask.sum()).backward()
            model.zero_grad()

        return step

    yield f"step_slm_over_plain {shape}", interleaved(ours(0.6), plain, repeat)
    yield f"step_slm_over_online_ref {shape}", interleaved(ours(0.6), online, repeat)
    yield f"step_clm_over_plain {shape}", interleaved(ours(1.0), plain, repeat)


def score_ratios():
    """Scoring from disk to disk against the same model's forward over the same batches."""
    model, x, y = make("6x384")

    def forward():
        with torch.no_grad():
            model.head(model(x))

    yield "score_rate_over_forward", interleaved(forward, lambda: rho.score_batch(model, x, y), 7)


def generate_ratios():
    """Rates, ours over the other: greedy, batch 32, 128 new tokens, 64-token prompts."""
    model = make("6x384")[0].eval()
    prompts = torch.randint(50304, (32, 64)).tolist()
    cached = lambda: generate(model, prompts, 128)  # noqa: E731
    uncached = lambda: generate(model, prompts, 128, use_cache=False)  # noqa: E731
    ratio, low, high = interleaved(cached, uncached, 2)
    yield "generate_rate_over_uncached", (1 / ratio, 1 / high, 1 / low)


def tokenise_ratios():
    """Rates: prepare_data's stream from text to disk over a bare encode_ordinary_batch."""
    import os
    import random
    import tempfile

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


def main(wanted):
    machine = {"cores": torch.get_num_threads(), "torch": str(torch.__version__)}
    machine["machine"] = platform.machine()
    groups = {
        "step demo": lambda: step_ratios("demo", 15),
        "step 6x384": lambda: step_ratios("6x384", 7),
        "step 12x768": lambda: step_ratios("12x768", 3),
        "score": score_ratios,
        "generate": generate_ratios,
        "tokenise": tokenise_ratios,
    }
    path = HERE / "bench.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = {r["name"]: r for r in map(json.loads, lines)}
    for group, run in groups.items():
        if group.startswith(wanted):
            for name, (median, low, high) in run():
                print(f"{name:40} {median:6.2f}   [{low:.2f}, {high:.2f}]", flush=True)
                ratio = {"ratio": round(median, 3), "low": round(low, 3), "high": round(high, 3)}
                records[name] = {"name": name, **ratio, **machine}
    path.write_text("".join(json.dumps(r) + "\n" for r in records.values()))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
