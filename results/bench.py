"""What each part costs, as ratios: both sides in one run, in turns, so that noise meets both.

    python results/bench.py             prints the rows, and writes them to results/bench.jsonl

A row is the median over pairs of times. An ordinary step is forward, mean of the loss, backward and
the optimizers; a step of SLM also scores, selects and divides, with stored reference losses.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import rho  # noqa: E402
from model import GPT, GPTConfig, generate, make_optimizers, save_hf  # noqa: E402

# (blocks, heads, channels, inner, vocabulary, tokens in a window, windows)
SHAPES = {
    "demo": (3, 4, 128, 384, 768, 128, 8),
    "6 x 384": (6, 6, 384, 1024, 50_304, 256, 4),
    "12 x 768": (12, 12, 768, 2048, 50_304, 256, 2),
}
# Makes a processor with AVX-512 and bfloat16 compute like most laptops.
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


class Bench:
    """A model of one shape with random text, its optimizers and a reference."""

    def __init__(self, shape):
        n_layer, n_head, n_embd, n_inner, n_vocab, T, B = SHAPES[shape]
        sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "n_inner": n_inner}
        config = GPTConfig(n_vocab, T, **sizes)
        torch.manual_seed(0)
        self.model, self.reference = GPT(config), GPT(config).eval()
        self.optimizers = make_optimizers(self.model, "muon", 1e-4, 0.1)
        self.x = torch.randint(n_vocab, (B, T))
        self.y = torch.randint(n_vocab, (B, T))
        self.ref_loss = self.score()

    @torch.no_grad()
    def score(self):
        return rho.token_loss(self.reference(self.x), self.y)

    @torch.no_grad()
    def forward(self):
        return self.reference(self.x)

    def backward(self):
        rho.token_loss(self.model(self.x), self.y).mean().backward()

    def optimize(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def plain(self):
        self.backward()
        self.optimize()
        self.model.zero_grad()

    def slm(self):
        student_loss = rho.token_loss(self.model(self.x), self.y)
        score = rho.score_tokens("excess", student_loss, self.ref_loss)
        mask = rho.select_tokens(score, 0.5)
        loss_sum, mask_sum = rho.selective_loss(student_loss, mask)
        loss_sum.backward()
        for p in self.model.parameters():
            p.grad /= mask_sum
        self.optimize()
        self.model.zero_grad()

    def slm_online(self):
        self.ref_loss = self.score()
        self.slm()


def ratio(a, b, seconds=12):
    """The median of a's time over b's, each pair measured one after the other."""
    ratios = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(ratios) < 5:
        times = []
        for function in (a, b):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        ratios.append(times[0] / times[1])
    return statistics.median(ratios[1:])  # the first pair warms up


def generation(folder):
    """Our greedy generation over that of transformers, the same weights and prompts."""
    from transformers import AutoModelForCausalLM

    model = Bench("demo").model.eval()
    save_hf(model, folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    prompts = torch.randint(700, (64, 48))
    length = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    everything = torch.ones_like(prompts)
    return ratio(
        lambda: generate(model, prompts.tolist(), 64),
        lambda: theirs.generate(prompts, attention_mask=everything, **length),
    )


def alone(row, environment):
    """A row that needs a process of its own: its number."""
    command = [sys.executable, __file__, row]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    return float(done.stdout)


def peak_memory(step):
    bench = Bench("6 x 384")
    for _ in range(3):
        getattr(bench, step)()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def optimizer_share():
    bench = Bench("demo")
    bench.backward()  # so that there are gradients
    return ratio(bench.optimize, bench.backward)


def main():
    if sys.argv[1:]:
        print(optimizer_share() if sys.argv[1] == "optimizer" else peak_memory(sys.argv[1]))
        return
    from tempfile import TemporaryDirectory

    rows = {"optimizer over forward and backward, AVX2, demo": alone("optimizer", AVX2)}
    memory = alone("slm", {}) / alone("plain", {})
    rows["memory of an SLM step over a plain one, 6 x 384"] = memory
    for shape in SHAPES:
        bench = Bench(shape)
        rows[f"SLM step over plain, {shape}"] = ratio(bench.slm, bench.plain)
        rows[f"SLM step over one with an online reference, {shape}"] = ratio(
            bench.slm, bench.slm_online
        )
        rows[f"scoring over a forward pass, {shape}"] = ratio(bench.score, bench.forward)
    with TemporaryDirectory() as folder:
        rows["generation over transformers, demo"] = generation(folder)
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    where = {
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "processor": torch.backends.cpu.get_cpu_capability() + " " + platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }
    with open(HERE / "bench.jsonl", "w") as file:
        for name, value in rows.items():
            print(f"{value:.2f}  {name}")
            file.write(json.dumps({"row": name, "ratio": round(value, 3), **where}) + "\n")


if __name__ == "__main__":
    main()
