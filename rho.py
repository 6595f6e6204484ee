"""Selective Language Modeling (Rho-1, arXiv 2404.07965): train on the tokens that are worth it.

A reference model learns clean text and scores every token of a large dirty corpus once. A student
then reads the whole corpus but is trained, at each step, only on the tokens whose excess loss, its
own loss minus the reference's, is highest. What the reference cannot predict either is noise;
what the student predicts already is learned: both are left out.

    python rho.py                 everything below on the embedded demo, then a table
    python rho.py --stage ref     train the reference on clean text         -> out/demo/ref.pt
    python rho.py --stage score   the reference's loss on every token       -> out/demo/scores/
    python rho.py --stage clm     the baseline: ordinary training, all tokens
    python rho.py --stage slm     the paper: the same steps, loss on selected tokens
    python rho.py --stage slm --select random        the control: as many tokens, any tokens
    python rho.py --stage dynamics                   which tokens are learned when (CLM, and SLM)

Glossary (code = paper)                            Where this differs from the paper, and why
    student_loss   L_theta(x_i)           s. 2.2    1. Models of 1 M parameters from scratch, not
    ref_loss       L_ref(x_i)             eq. 1        1-7 B continued: it must run on a laptop.
    excess         L_delta(x_i)           eq. 2    2. Reference losses are computed once and kept
    ratio          k %                    eq. 3        on disk, not run beside the student.
    mask           I_k%(x_i)              eq. 4    3. top-k over each device's micro-batch: the
    selective_loss L_SLM                  eq. 3        paper says "batch" and no more.
    ref_entropy    H_ref                  s. 3.4    4. Muon beside AdamW; the paper names none.
"""

import argparse
import hashlib
import inspect
import json
import math
import os
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from eval_math import answer_questions, load_questions
from model import GPT, GPTConfig, ModelError, load_checkpoint, load_model, whole_file
from prepare_data import InputError, get_tokenizer, load_meta, prepare_demo

RULES = ("excess", "ref_loss", "ref_entropy", "ref_both", "loss", "random", "oracle")
CHOICES = {"stage": ("ref", "score", "clm", "slm", "dynamics", "all"), "select": RULES}
CHOICES["optimizer"] = ("muon", "adamw")
DYNAMICS = ("H->H", "L->H", "H->L", "L->L")
ARMS = (("ref", "loss"), ("clm", "loss"), ("slm", "excess"), ("slm", "random"))
BLOCK = {True: 2**20, False: 2**28}  # logits worked on together, on a processor or not
KEEP = 2**28  # logits that may stay in memory from the forward pass to the gradient
SHOWN = ("tokens", "seconds", "selected_loss", "val_loss", "val_corpus_loss", "right")
PLACES = ("stage", "data", "out", "name", "reference", "device", "compile", "entropy")  # no recipe


@dataclass
class Config:
    # what to run
    stage: str = "all"  # ref, score, clm, slm, dynamics, or all
    data: str = "data/demo"  # folder that prepare_data.py wrote
    out: str = "out/demo"  # folder for checkpoints, scores and logs
    name: str = ""  # name of the run's files; empty: the stage's, and the rule unless excess
    seed: int = 1337  # of the first weights and of the order of windows
    device: str = ""  # cuda, mps or cpu; empty: the best there is
    # selection, the paper's part
    select: str = "excess"  # excess, ref_loss, ref_entropy, ref_both, loss, random, oracle
    reference: str = ""  # checkpoint or Hugging Face folder that scores; empty: OUT/ref.pt
    ratio: float = 0.35  # share of tokens trained on, of each micro-batch (paper: 0.6); 1 is CLM
    threshold: float | None = None  # instead of ratio: every token that scores above it (nats)
    # the model; the reference's shape is in its own checkpoint and may be another
    n_layer: int = 3
    n_head: int = 4
    n_kv_head: int = 4
    n_embd: int = 128
    n_inner: int = 384
    qk_norm: bool = True
    tied: bool = False
    block_size: int = 128  # tokens in a window
    init: str = ""  # start from this checkpoint, or folder of Hugging Face weights
    # training; "tokens" are tokens seen, trained on or not
    tokens: int = 900_000  # for clm and slm
    ref_tokens: int = 900_000  # for ref
    batch_size: int = 8  # windows in one optimizer step, over all devices
    micro_batch: int = 8  # windows that a device holds at once; the rest is accumulated
    optimizer: str = "muon"  # muon (matrices; AdamW for the rest) or adamw
    lr: float = 7.5e-4  # chosen for clm (results/lr.jsonl), used by all
    lr_end: float = 0.1  # last learning rate, as a share of lr (cosine)
    warmup: float = 0.02  # share of the steps that warm up
    weight_decay: float = 0.1
    clip: float = 1.0  # norm of the gradient above which it is scaled down
    compile: bool | None = None  # torch.compile; unset: on CUDA only
    # looking
    evals: int = 9  # evaluations over the run, evenly spaced; each also saves
    eval_windows: int = 64  # windows of held-out text in one evaluation
    questions: int = 500  # demo questions answered in one evaluation
    entropy: bool = False  # score: also write the reference's entropy

    @property
    def steps(self):
        return max(1, self.tokens // (self.batch_size * self.block_size))


# ==== THE METHOD: the only lines that differ from ordinary pre-training ==========================


def token_loss(logits, targets):
    """Cross-entropy of each token in nats, float32 (B, T); logits (B, T, V), targets (B, T).

    Paper, eq. 1. Position t of `logits` predicts `targets[t]`, which is already the next token.
    """
    loss = F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none")
    return loss.view(targets.shape)  # (B, T)


def score_tokens(select, student_loss, ref_loss=None, ref_entropy=None, generator=None):
    """How much each token is worth training on (B, T); the highest are kept. No gradient.

    excess: student minus reference, signed (eq. 2). ref_loss, ref_entropy: what the reference finds
    easy, or is sure of; ref_both: what is high in both orders, their intersection (self-reference,
    section 3.4). loss: what the student finds hard. random: the control. Raises ValueError for
    another rule, or where a rule's input is missing.
    """
    student_loss = student_loss.detach()  # (B, T)
    if select == "random":
        device = student_loss.device
        return torch.rand(student_loss.shape, generator=generator, device=device)  # (B, T)
    if select == "loss":
        return student_loss
    if select == "excess" and ref_loss is not None:
        return student_loss - ref_loss  # (B, T)
    if select == "ref_loss" and ref_loss is not None:
        return -ref_loss  # (B, T)
    if select == "ref_entropy" and ref_entropy is not None:
        return -ref_entropy  # (B, T)
    if select == "ref_both" and ref_loss is not None and ref_entropy is not None:
        ranks = [s.flatten().argsort().argsort().view(s.shape) for s in (ref_loss, ref_entropy)]
        return -torch.maximum(*ranks)  # (B, T)
    raise ValueError(f"--select {select} is no rule, or the scores it needs were not given")


def select_tokens(score, ratio=None, threshold=None, valid=None):
    """Which tokens to train on, bool (B, T): the k highest scores, or all above a threshold.

    k = round(ratio * number of valid tokens), over the whole of `score` (eq. 4). valid (B, T) is
    False where there is nothing to predict: neither selected nor counted into k.
    """
    if (ratio is None) == (threshold is None):
        raise ValueError("select_tokens takes a ratio or a threshold, one of them")
    n = score.numel() if valid is None else int(valid.sum())
    valid = torch.ones_like(score, dtype=torch.bool) if valid is None else valid
    if threshold is not None:
        return (score > threshold) & valid
    score = score.float().masked_fill(~valid, -torch.inf).flatten()  # (B * T)
    best = score.topk(round(ratio * n), sorted=False).indices  # (k,)
    return torch.zeros_like(valid).flatten().index_fill(0, best, True).view(valid.shape)  # (B, T)


def selective_loss(student_loss, mask):
    """L_SLM (eq. 3): the mean of the student's own loss over the selected tokens; 0 if none is."""
    return (student_loss * mask).sum() / mask.sum().clamp(min=1)


# ==== the same, fast: what training runs ==========================================================


def scan_head(hidden, head, targets, keep=False, entropy=False):
    """What the losses are made of, without ever holding (N, V) logits: block by block of head.

    hidden (N, C), head (V, C), targets (N, 1). Returns log-sum-exp, target's logit and, if asked
    for, mean logit, each (N, 1) float32; and the logits by block, (N, v) each, if asked to keep.
    """
    total = torch.full(targets.shape, -torch.inf, device=hidden.device)  # (N, 1)
    target, mean, kept = torch.zeros_like(total), torch.zeros_like(total), []
    for part in head.split(max(1, BLOCK[hidden.is_cpu] // len(hidden))):
        logits = hidden @ part.T  # (N, v)
        kept.append(logits if keep else None)
        logits, at = logits.float(), targets.clamp(0, len(part) - 1)
        target += logits.gather(1, at) * (at == targets)
        here = logits.logsumexp(-1, keepdim=True)
        before, total = total, torch.logaddexp(total, here)
        if entropy:
            inside = ((logits - here).exp_() * logits).sum(-1, keepdim=True)
            mean = mean * (before - total).exp() + inside * (here - total).exp()
        targets = targets - len(part)  # the next block's first column is 0
    return total, target, mean, kept


class HeadLoss(torch.autograd.Function):
    """Sum of the selected tokens' loss, with gradient through the head for those tokens only.

    The definition above would hold (B * T, V) logits and their gradient, mostly zero. Here a first
    pass over all tokens finds the losses, hence the selection; a second, over the k selected rows,
    forms their gradient, softmax minus one-hot, and at once multiplies it out. The logits are kept
    between the two passes where they fit (KEEP), and else computed again.
    apply(hidden (N, C), weight (V, C), targets (N,), choose: student_loss -> mask, k=None) gives
    the sum (with gradient), student_loss (N,) float32 and mask (N,); matrix products are in
    hidden's type. Give k, the number that `choose` selects, and a GPU need not wait to hear it.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, choose, k=None):
        N, head, targets = len(hidden), weight.to(hidden.dtype), targets[:, None]
        total, target, _, kept = scan_head(hidden, head, targets, N * len(head) <= KEEP)
        student_loss = (total - target)[:, 0]  # (N,)
        mask = choose(student_loss)  # (N,)
        rows = slice(None)  # all of them: no need to gather
        if k != N:
            static = k is not None and not mask.is_mps  # which does not know nonzero_static
            rows = (mask.nonzero_static(size=k) if static else mask.nonzero())[:, 0]  # (k,)
        h, total, targets = hidden[rows], total[rows], targets[rows]
        grad_h, grad_weight = torch.zeros_like(h, dtype=torch.float32), torch.empty_like(weight)
        size = max(1, BLOCK[hidden.is_cpu] // N)
        for part, logits, grad in zip(head.split(size), kept, grad_weight.split(size), strict=True):
            logits = h @ part.T if logits is None else logits[rows]  # (k, v)
            error, at = (logits - total).exp_(), targets.clamp(0, len(part) - 1)  # (k, v), (k, 1)
            error.scatter_add_(1, at, -(at == targets).float())
            error, targets = error.to(h.dtype), targets - len(part)
            grad_h += error @ part
            grad[:] = error.T @ h
        grad_hidden = torch.zeros_like(hidden)
        grad_hidden[rows] = grad_h.to(h.dtype)
        ctx.gradients = grad_hidden, grad_weight
        ctx.mark_non_differentiable(student_loss, mask)
        return (student_loss * mask).sum(), student_loss, mask

    @staticmethod
    def backward(ctx, scale, *_):
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None  # held once: not copied
        return grad_hidden.mul_(scale), grad_weight.mul_(scale), None, None, None


# ==== windows and batches =========================================================================


class Windows:
    """A token file cut into fixed windows: window w predicts tokens w * T + 1 ... w * T + T.

    So every token is a target once and has one reference loss. Indexed with B window numbers it
    gives inputs and targets, both (B, T) int64.
    """

    def __init__(self, cfg, meta, split):
        path = Path(cfg.data) / f"{split}.bin"
        self.T, tokens = cfg.block_size, meta["tokens"][split]
        self.n = (tokens - 1) // self.T
        if self.n < 1:
            few = f"{path} has {tokens} tokens, too few for one window of {self.T}"
            raise InputError(f"{few}: prepare more text, or lower --block_size")
        self.tokens = np.memmap(path, dtype=meta["dtype"], mode="r")

    def __getitem__(self, w):
        at = np.asarray(w)[:, None] * self.T + np.arange(self.T + 1)  # (B, T + 1)
        tokens = torch.from_numpy(self.tokens[at].astype(np.int64))
        return tokens[:, :-1], tokens[:, 1:]  # (B, T), (B, T)


@lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


def batch(n, size, seed, step):
    """Window numbers (size,) of a step: a pure function, so arms and resumed runs see the same."""
    places = range(step * size, (step + 1) * size)
    return np.array([permutation(n, seed, p // n)[p % n] for p in places])


# ==== this process, and the models it opens =======================================================


class Run:
    """Where this process runs: on what device, in what precision, as which rank of how many."""

    def __init__(self, cfg):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        best = "mps" if torch.backends.mps.is_available() else "cpu"
        self.device = torch.device(cfg.device or ("cuda" if torch.cuda.is_available() else best))
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # TF32
        bf16 = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        if self.rank == 0 and cfg.data == Config.data and not Path(cfg.data, "meta.json").exists():
            prepare_demo(cfg.data)
        self.barrier()
        self.meta = load_meta(cfg.data)

    def precision(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def put(self, *tensors):
        """On the device; from pinned memory the copy runs while the device works on."""
        if self.device.type == "cuda":
            tensors = [t.pin_memory() for t in tensors]
        return [t.to(self.device, non_blocking=True) for t in tensors]

    def reduce(self, *tensors):
        for tensor in tensors if self.world > 1 else ():
            dist.all_reduce(tensor)

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def say(self, text):
        if self.rank == 0:
            tqdm.write(text)

    def bar(self, **kwargs):
        kwargs |= {"disable": self.rank > 0 or None}  # None: hidden where there is no terminal
        return tqdm(unit="tok", unit_scale=True, dynamic_ncols=True, **kwargs)


def open_model(path, cfg, run, mend):
    """(GPT, checkpoint) of a file or Hugging Face folder that fits the data, or an InputError."""
    if not path.exists():
        raise InputError(f"{path} not found. {mend}")
    model, checkpoint = load_model(path)
    spec = run.meta["tokenizer"]
    if checkpoint.get("tokenizer", spec) != spec or model.config.vocab_size < spec["n_vocab"]:
        raise InputError(f"{path} and {cfg.data} differ in tokenizer or vocabulary. {mend}")
    if cfg.block_size > model.config.block_size:
        raise InputError(f"--block_size {cfg.block_size} is longer than {path} was made for")
    return model.to(run.device), checkpoint


def open_reference(cfg, run):
    """The frozen reference. InputError if it is missing, unfinished, or does not fit the data."""
    same = (cfg.data, cfg.out) == (Config.data, Config.out)
    places = "" if same else f" --data {cfg.data} --out {cfg.out}"
    mend = f"Run: python rho.py --stage ref{places}"
    path = Path(cfg.reference or Path(cfg.out, "ref.pt"))
    reference, checkpoint = open_model(path, cfg, run, mend)
    if checkpoint and checkpoint["step"] < checkpoint["steps"]:
        raise InputError(f"{path} is not trained to its end. {mend} (it goes on where it stopped)")
    return reference.eval().requires_grad_(False)


# ==== scoring =====================================================================================


def fingerprint(model, data_sha256, block_size):
    """Names a score folder by all that the scores depend on, so that none is ever stale."""
    digest = hashlib.sha256(f"{data_sha256} {block_size} {model.config}".encode())
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


@torch.no_grad()
def score_batch(model, x, y, entropy=False):
    """[loss of each target in nats (B, T)] and, if asked for, entropy of its prediction (B, T)."""
    hidden, targets = model(x).flatten(0, 1), y.flatten()[:, None]  # (B * T, C), (B * T, 1)
    total, target, mean, _ = scan_head(hidden, model.lm_head.weight, targets, entropy=entropy)
    return [(total - part).view(y.shape) for part in (target, mean)[: 1 + entropy]]


def score_corpus(cfg, run, windows):
    """The reference's loss of the corpus' targets: {"ref_loss": float16 (windows, T) on disk, ...}

    Only windows that a run of --tokens will visit are scored; NaN marks the others, so a run that
    was interrupted, or that asks for more, goes on from there. Streams in constant memory. Under
    torchrun each rank takes every world-th batch; the bytes do not depend on the ranks.
    """
    reference = open_reference(cfg, run)
    key = fingerprint(reference, run.meta["files"]["train.bin"], cfg.block_size)
    folder, scores = Path(cfg.out) / "scores" / key, {}
    entropy = cfg.entropy or cfg.select in ("ref_entropy", "ref_both")
    for name in ("ref_loss", "ref_entropy")[: 1 + entropy]:
        path = folder / f"{name}.f16"
        if run.rank == 0 and not path.exists():
            with whole_file(path) as f:
                for _ in range(windows.n):
                    f.write(np.full(windows.T, np.nan, np.float16).tobytes())
        run.barrier()
        scores[name] = np.memmap(path, np.float16, "r+", shape=(windows.n, windows.T))
    visits = min(windows.n, cfg.steps * cfg.batch_size)
    wanted = np.sort(permutation(windows.n, cfg.seed, 0)[:visits])
    parts = [wanted[i : i + cfg.micro_batch] for i in range(0, visits, cfg.micro_batch)]
    parts = parts[run.rank :: run.world]  # shared out before looking: others write meanwhile
    parts = [w for w in parts if any(np.isnan(s[w, -1]).any() for s in scores.values())]
    bar = run.bar(total=sum(map(len, parts)) * windows.T, desc="score")
    for w in parts:
        x, y = run.put(*windows[w])
        with run.precision():
            found = score_batch(reference, x, y, entropy)
        for stored, values in zip(scores.values(), found, strict=True):
            stored[w] = values.float().cpu().numpy()
        bar.update(len(w) * windows.T)
    bar.close()
    run.barrier()
    return scores


# ==== training ====================================================================================


def make_optimizers(cfg, model):
    """Muon for the matrices inside the layers and AdamW for the rest, or AdamW for everything."""
    inside = {p: p.dim() == 2 and k.startswith("layers") for k, p in model.named_parameters()}
    matrices, rest = ([p for p in inside if inside[p] == where] for where in (True, False))
    adamw = {"lr": cfg.lr, "betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}
    if cfg.optimizer == "adamw":
        decayed = {"params": matrices, "weight_decay": cfg.weight_decay}
        return [torch.optim.AdamW([decayed, {"params": rest}], **adamw)]
    muon = {"lr": cfg.lr, "weight_decay": cfg.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
    return [torch.optim.Muon(matrices, **muon), torch.optim.AdamW(rest, **adamw)]


def learning_rate(cfg, step, steps):
    """Linear warm-up, then half a cosine down to lr * lr_end."""
    warm = max(1, round(cfg.warmup * steps))
    cosine = 0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(1, steps - warm))
    share = (step + 1) / warm if step < warm else cfg.lr_end + (1 - cfg.lr_end) * cosine
    return cfg.lr * share


def train(cfg, run, name, split):
    """Train one arm to its end, going on where it stopped; returns the records of its log."""
    windows = Windows(cfg, run.meta, split)
    held_out = {f"{s}_loss": Windows(cfg, run.meta, s) for s in ("val", "val_corpus")}
    scores = {}
    if cfg.select not in ("loss", "random", "oracle"):
        scores = score_corpus(cfg, run, windows)
    elif cfg.select == "oracle":  # the generator's own truth, taken for a reference's loss
        kinds = np.fromfile(Path(cfg.data) / f"{split}.kind.bin", np.uint8)[1:]
        scores = {"ref_loss": kinds[: windows.n * windows.T].reshape(windows.n, windows.T)}
        cfg = replace(cfg, select="ref_loss", ratio=None, threshold=-0.5)

    torch.manual_seed(cfg.seed)
    if cfg.init:
        model, _ = open_model(Path(cfg.init), cfg, run, "--init takes a checkpoint that fits")
    else:
        shape = {f.name: getattr(cfg, f.name) for f in fields(GPTConfig) if hasattr(cfg, f.name)}
        model = GPT(GPTConfig(vocab_size=run.meta["tokenizer"]["n_vocab"], **shape)).to(run.device)
    optimizers = make_optimizers(cfg, model)
    steps, step_tokens = cfg.steps, cfg.batch_size * cfg.block_size
    state = {"step": 0, "steps": steps, "seconds": 0.0, "trained": 0, "records": []}
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    first = {"run": name, "config": asdict(cfg), "params": model.num_params()}
    first |= {"commit": subprocess.run(git, capture_output=True, text=True).stdout.strip()}
    first |= {"torch": str(torch.__version__), "threads": torch.get_num_threads()}
    state["records"].append(first | {"device": str(run.device), "world": run.world})
    recipe = {k: v for k, v in asdict(cfg).items() if k not in PLACES} | run.meta["files"]
    recipe["scores"] = Path(getattr(scores.get("ref_loss"), "filename", "")).parent.name
    path = Path(cfg.out) / f"{name}.pt"
    if path.exists():
        saved = load_checkpoint(path, run.device)
        if saved["recipe"] == recipe:
            state |= {key: saved[key] for key in state}
            model.load_state_dict(saved["model"])
            for optimizer, moments in zip(optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(moments)
    if state["step"] == steps:
        run.say(f"{name}: up to date ({path})")
        return state["records"]

    compiled = cfg.compile if cfg.compile is not None else run.device.type == "cuda"
    trunk = DistributedDataParallel(model) if run.world > 1 else model
    trunk = torch.compile(trunk) if compiled else trunk
    generator = torch.Generator(run.device)
    looks = {round(steps * (i + 1) / cfg.evals) for i in range(cfg.evals)} | {steps}
    sums = torch.zeros(3, device=run.device)  # loss of selected tokens, of all, number selected
    bar = run.bar(total=steps * step_tokens, initial=state["step"] * step_tokens, desc=name)
    started = time.time()
    for step in range(state["step"], steps):
        lr = learning_rate(cfg, step, steps)
        here = batch(windows.n, cfg.batch_size, cfg.seed, step)[run.rank :: run.world]
        n_selected = torch.zeros((), device=run.device)
        for i in range(0, len(here), cfg.micro_batch):
            w = here[i : i + cfg.micro_batch]
            x, y = run.put(*windows[w])  # (B, T)
            generator.manual_seed(hash((cfg.seed, step, i, run.rank)) % 2**62)
            known = [torch.from_numpy(s[w]).flatten() for s in scores.values()]  # (B * T,)
            known = {name: s.float() for name, s in zip(scores, run.put(*known), strict=True)}

            def choose(student_loss, known=known):
                score = score_tokens(cfg.select, student_loss, **known, generator=generator)
                return select_tokens(score, cfg.ratio, cfg.threshold)

            k = round(cfg.ratio * y.numel()) if cfg.threshold is None else None
            last = i + cfg.micro_batch >= len(here)
            with nullcontext() if last or run.world == 1 else trunk.no_sync():
                with run.precision():
                    hidden = trunk(x).flatten(0, 1).to(run.dtype)  # (B * T, C)
                head = model.lm_head.weight  # (V, C)
                loss, student_loss, mask = HeadLoss.apply(hidden, head, y.flatten(), choose, k)
                loss.backward()  # of the sum: how many it is a mean over, the step's end knows
            n_selected += mask.sum()
            sums += torch.stack((loss.detach(), student_loss.sum(), mask.sum().float()))
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        run.reduce(n_selected)
        torch._foreach_mul_(gradients, run.world / n_selected.clamp(min=1))  # undo DDP's mean
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        bar.update(step_tokens)
        if step + 1 in looks:
            run.reduce(sums)
            (chosen, everything, n_chosen), sums = sums.tolist(), torch.zeros_like(sums)
            n = (step + 1 - state["step"]) * step_tokens
            state["step"], state["trained"] = step + 1, state["trained"] + round(n_chosen)
            state["seconds"] += time.time() - started
            record = {"step": step + 1, "tokens": (step + 1) * step_tokens, "lr": lr}
            record |= {"trained": state["trained"], "seconds": round(state["seconds"], 2)}
            record |= {"student_loss": everything / n, "selected_loss": chosen / max(1, n_chosen)}
            unselected = (everything - chosen) / (n - n_chosen) if n > n_chosen else None
            record |= {"unselected_loss": unselected}
            record |= {"grad_norm": norm.item()}
            if run.rank == 0:
                found, losses = evaluate(cfg, run, model, held_out)
                path.parent.mkdir(parents=True, exist_ok=True)
                mode = "r+b" if state["records"][1:] else "wb"
                with open(path.with_suffix(".losses.f16"), mode) as f:  # one row a look
                    f.seek((len(state["records"]) - 1) * losses.nbytes)
                    f.write(losses.tobytes())
                state["records"].append(record | found)
                saved = {"model": model.state_dict(), "model_config": asdict(model.config)}
                saved |= {"recipe": recipe, "tokenizer": run.meta["tokenizer"]}
                saved |= {"optimizers": [o.state_dict() for o in optimizers]} | state
                with whole_file(path) as f:
                    torch.save(saved, f)
                with whole_file(path.with_suffix(".jsonl")) as f:
                    f.writelines(f"{json.dumps(r)}\n".encode() for r in state["records"])
                last = state["records"][-1]
                run.say(
                    f"{name:>11}  " + "  ".join(f"{k} {last[k]:.6g}" for k in SHOWN if k in last)
                )
            run.barrier()
            started = time.time()
    bar.close()
    return state["records"]


def evaluate(cfg, run, model, held_out):
    """What arms are compared on: held-out loss (mean over all tokens, nats), and right answers.

    Returns the record, and the loss of each token of the last of `held_out`, float16 (windows, T).
    """
    started, record = time.time(), {}
    model.eval()
    for name, windows in held_out.items():
        losses = windows_loss(cfg, run, model, windows)
        record[name] = losses.mean(dtype=float).item()
    path = Path(cfg.data) / "questions.jsonl"
    if cfg.questions and path.exists():
        questions = load_questions(path, cfg.questions)
        encoding = get_tokenizer(run.meta["tokenizer"])
        answers = answer_questions(model, encoding, questions, batch_size=512)
        record |= {"right": sum(a["correct"] for a in answers), "questions": len(answers)}
    model.train()
    record["eval_seconds"] = round(time.time() - started, 2)
    return record, losses.astype(np.float16)


def windows_loss(cfg, run, model, windows):
    """The loss of each token of the first --eval_windows windows, float32 (windows, T)."""
    n, losses = min(cfg.eval_windows, windows.n), []
    for w in np.array_split(np.arange(n), -(-n // cfg.micro_batch)):
        x, y = run.put(*windows[w])  # (B, T)
        with run.precision():
            losses.append(score_batch(model, x, y)[0].float().cpu().numpy())
    return np.concatenate(losses)


def token_dynamics(losses):
    """The class of each token (N,), 0 to 3 in the order of DYNAMICS; paper, section 2.1, App. D.

    losses (n + 1, N): of the same tokens at checkpoints evenly spaced. A least-squares line through
    a token's losses rises or falls by more than 0.2 nats over the run, or its last loss is above or
    below the mean of all.
    """
    losses = np.asarray(losses, np.float32)
    x = np.arange(len(losses)) - (len(losses) - 1) / 2  # (n + 1,), of mean zero
    change = (len(losses) - 1) * (x @ losses) / (x @ x)  # (N,): n times the line's slope
    classes = np.where(losses[-1] > losses[-1].mean(), 0, 3)
    classes[change > 0.2], classes[change < -0.2] = 1, 2
    return classes


def dynamics(cfg, run):
    """A CLM and an SLM run with 16 looks or more: the classes of the held-out corpus' tokens."""
    cfg = replace(cfg, select="excess", evals=max(16, cfg.evals))
    ref_loss = windows_loss(
        cfg, run, open_reference(cfg, run), Windows(cfg, run.meta, "val_corpus")
    )
    if run.rank == 0:
        with whole_file(Path(cfg.out) / "dynamics.ref_loss.f16") as f:
            f.write(ref_loss.astype(np.float16).tobytes())
    for stage in ("clm", "slm"):
        train_arm(replace(cfg, name=f"dynamics-{stage}"), run, stage)
        losses = np.fromfile(Path(cfg.out) / f"dynamics-{stage}.losses.f16", np.float16)
        shares = np.bincount(token_dynamics(losses.reshape(-1, ref_loss.size)), minlength=4)
        shares = zip(DYNAMICS, shares / ref_loss.size, strict=True)
        run.say(f"dynamics-{stage}  " + "  ".join(f"{name} {share:.1%}" for name, share in shares))


# ==== stages ======================================================================================


def train_arm(cfg, run, stage):
    """Train what a stage stands for, with the flags that it does not use set aside."""
    if stage in ("ref", "clm"):  # every token: the rule does not matter
        cfg = replace(cfg, select="loss", ratio=1.0, threshold=None)
    rule = f"-{cfg.select}" if stage == "slm" and cfg.select != "excess" else ""
    name, split = cfg.name or f"{stage}{rule}", "ref" if stage == "ref" else "train"
    tokens = cfg.ref_tokens if stage == "ref" else cfg.tokens
    ratio = cfg.ratio if cfg.threshold is None else None
    return train(replace(cfg, tokens=tokens, ref_tokens=0, ratio=ratio), run, name, split)


def run_stage(cfg):
    if not 0 < cfg.ratio <= 1:
        raise InputError(f"--ratio {cfg.ratio}: a share of the tokens, above 0 and at most 1")
    for flag, value in asdict(cfg).items():
        if type(value) is int and value < 1 and flag not in ("seed", "questions"):
            raise InputError(f"--{flag} {value}: must be at least 1")
    run = Run(cfg)
    if cfg.batch_size % run.world:
        raise InputError(f"--batch_size {cfg.batch_size}: not a multiple of {run.world} processes")
    if cfg.stage == "score":
        score_corpus(cfg, run, Windows(cfg, run.meta, "train"))
        run.say(f"scores: {cfg.out}/scores")
    elif cfg.stage == "all":
        for stage, select in ARMS:
            train_arm(replace(cfg, select=select, name=""), run, stage)
        figures = Path(__file__).parent / "results" / "figures.py"
        if run.rank == 0 and figures.exists():  # the table and the picture of what was logged
            subprocess.run([sys.executable, str(figures), cfg.out])
    elif cfg.stage == "dynamics":
        dynamics(cfg, run)
    else:
        train_arm(cfg, run, cfg.stage)


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    helps = dict(re.findall(r"    (\w+): .* = .*?  # (.*)", inspect.getsource(Config)))
    for f in fields(Config):
        kind = {"threshold": float, "compile": bool}.get(f.name, type(f.default))
        how = {"type": kind, "choices": CHOICES.get(f.name)}
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else how
        text = f"{helps.get(f.name, '')} [{f.default}]".replace("%", "%%")
        parser.add_argument(f"--{f.name}", default=f.default, help=text, **how)
    parser.error = lambda message: parser.exit(2, f"rho.py: {message}. See python rho.py -h\n")
    try:
        run_stage(Config(**vars(parser.parse_args(argv))))
    except (InputError, ModelError) as error:
        parser.exit(2, f"rho.py: {error}\n")
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        line = str(error).splitlines()[0]
        parser.exit(2, f"rho.py: another process of this job has stopped ({line})\n")
    except OSError as error:  # a full disk, a folder that may not be written
        parser.exit(2, f"rho.py: {error.filename or 'writing'}: {error.strerror}\n")


if __name__ == "__main__":
    main()
