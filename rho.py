"""Selective Language Modeling (Rho-1, arXiv 2404.07965): train on the tokens that are worth it.

A reference model learns clean text and scores every token of a large dirty corpus once. A student
then reads the whole corpus but is trained, at each step, only on the tokens whose excess loss, its
own loss minus the reference's, is highest. What the reference cannot predict either is noise;
what the student predicts already is learned: both are left out.

    python rho.py                 reference, clm, slm and control on the demo, then a table
    python rho.py --stage ref     train the reference on clean text         -> out/demo/ref.pt
    python rho.py --stage score   the reference's loss on every token       -> out/demo/scores/
    python rho.py --stage clm     the baseline: ordinary training, all tokens
    python rho.py --stage slm     the paper: the same steps, loss on selected tokens
    python rho.py --stage slm --select random        the control: as many tokens, any tokens
    python rho.py --stage dynamics   how each token's loss moves as clm.pt trains on (section 2.1)

Glossary (code = paper)                            Where this differs from the paper, and why
    student_loss   L_theta(x_i)           s. 2.2    1. Models of 1 M parameters from scratch, not
    ref_loss       L_ref(x_i)             eq. 1        1-7 B continued: it must run on a laptop.
    excess         L_delta(x_i)           eq. 2    2. Reference losses, computed once as in the
    ratio          k %                    eq. 3        paper, are kept on disk as float16.
    mask           I_k%(x_i)              eq. 4    3. top-k over each device's micro-batch: the
    selective_loss L_SLM                  eq. 3        paper says "batch" and no more.
    ref_entropy    H_ref                  s. 3.4    4. Muon beside AdamW; the paper names none.
"""

import argparse
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
from functools import lru_cache, partial
from hashlib import sha256
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

STAGES = ("ref", "score", "clm", "slm", "dynamics", "all")
ARMS = (("ref", "loss"), ("clm", "loss"), ("slm", "excess"), ("slm", "random"))
BLOCK = {True: 2**20, False: 2**28}  # logits worked on together, on CPU or elsewhere
KEEP = 2**28  # logits that may stay in memory from the forward pass to the gradient
BEST = (torch.accelerator.current_accelerator(True) or torch.device("cpu")).type
SHOWN = ("tokens", "seconds", "selected_loss", "val_loss", "val_corpus_loss", "right")
PLACES = ("stage", "data", "out", "name", "reference", "device", "compile")  # no recipe


@dataclass
class Config:
    stage: str = "all"  # ref, score, clm, slm, dynamics, or all
    data: str = "data/demo"  # folder that prepare_data.py wrote
    out: str = "out/demo"  # folder for checkpoints, scores and logs
    name: str = ""  # name of the run's files; empty: the stage's, and the rule unless excess
    seed: int = 1337  # of the first weights and of the order of windows
    device: str = BEST  # cuda, mps or cpu
    # selection, the paper's part
    select: str = "excess"  # excess, ref_loss, ref_entropy, ref_both, loss, random, oracle
    reference: str = ""  # checkpoint or Hugging Face folder that scores; empty: OUT/ref.pt
    ratio: float = 0.5  # share of tokens trained on, of each micro-batch (paper: 0.6); 1 is CLM
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
    lr: float = 7.5e-4  # chosen for clm (README, "The learning rate"), used by all
    lr_end: float = 0.1  # last learning rate, as a share of lr (cosine)
    warmup: float = 0.02  # share of the steps that warm up
    weight_decay: float = 0.1
    clip: float = 1.0  # norm of the gradient above which it is scaled down
    compile: bool | None = None  # torch.compile; unset: on CUDA only
    evals: int = 9  # evaluations over the run, evenly spaced; each also saves
    eval_windows: int = 64  # windows of held-out text in one evaluation
    questions: int = 500  # of DATA/questions.jsonl answered in one evaluation

    @property
    def steps(self):
        return max(1, self.tokens // (self.batch_size * self.block_size))


# ==== THE METHOD: the only lines that differ from ordinary pre-training ==========================

KNOWN = ("ref_loss", "ref_entropy")  # by the reference; each rule needs so many of them:
RULES = {"excess": 1, "ref_loss": 1, "ref_entropy": 2, "ref_both": 2, "loss": 0, "random": 0}


def token_loss(logits, targets):
    """Cross-entropy of each token in nats, float32 (B, T); logits (B, T, V), targets (B, T).

    Paper, eq. 1. Position t of `logits` predicts `targets[t]`, which is already the next token.
    """
    loss = F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none")
    return loss.view(targets.shape)  # (B, T)


def score_tokens(select, student_loss, ref_loss=None, ref_entropy=None, generator=None):
    """How much each token is worth training on (B, T); the highest are kept. No gradient.

    excess: student minus reference, signed (eq. 2). ref_loss, ref_entropy, ref_both: what the
    reference finds easy, is sure of, or both (self-reference, section 3.4). loss: what the student
    finds hard. random: the control. Raises ValueError for another rule, or a missing input.
    """
    known = ref_loss, ref_entropy
    if select not in RULES or any(values is None for values in known[: RULES[select]]):
        raise ValueError(f"--select {select} is no rule, or the scores it needs were not given")
    student_loss = student_loss.detach()  # (B, T)
    if select == "excess":
        return student_loss - ref_loss  # (B, T)
    if select == "ref_loss":
        return -ref_loss  # (B, T)
    if select == "ref_entropy":
        return -ref_entropy  # (B, T)
    if select == "ref_both":  # in both sets: by the worse of its two ranks
        ranks = [values.flatten().argsort().argsort() for values in known]
        return -torch.maximum(*ranks).view_as(ref_loss).float()  # (B, T)
    if select == "loss":
        return student_loss
    return torch.rand(student_loss.shape, generator=generator, device=student_loss.device)


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
    score = score.masked_fill(~valid, -torch.inf).flatten()  # (B * T)
    best = score.topk(round(ratio * n), sorted=False).indices  # (k,)
    return torch.zeros_like(valid).flatten().index_fill(0, best, True).view(valid.shape)  # (B, T)


def selective_loss(student_loss, mask):
    """L_SLM (eq. 3): the mean of the student's own loss over the selected tokens; 0 if none is."""
    return (student_loss * mask).sum() / mask.sum().clamp(min=1)


# ==== the same, fast: what training runs ==========================================================


class HeadLoss(torch.autograd.Function):
    """Sum of the selected tokens' loss, with gradient through the head for those tokens only.

    The definition above holds (B * T, V) logits and their gradient, mostly zero. Here a first pass
    over all tokens, by blocks of the vocabulary, finds the losses, hence the selection; a second,
    over the k selected rows, forms their gradient, softmax minus one-hot, and multiplies it out.
    Between the two the logits are kept where they fit (KEEP), and else computed again.
    apply(hidden (N, C), weight (V, C), targets (N,), choose: student_loss -> mask, k=None) gives
    the sum (with gradient), student_loss (N,) float32 and mask (N,), multiplying in hidden's type.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, choose, k=None):  # given k, a GPU need not wait
        N, head, targets = len(hidden), weight.to(hidden.dtype), targets[:, None]
        size, kept = max(1, BLOCK[hidden.is_cpu] // N), []
        total = torch.full(targets.shape, -torch.inf, device=hidden.device)  # log-sum-exp (N, 1)
        target, label = torch.zeros_like(total), targets  # target: its logit (N, 1)
        for part in head.split(size):
            logits = hidden @ part.T  # (N, v)
            kept.append(logits if k != 0 and N * len(head) <= KEEP else None)
            logits, at = logits.float(), label.clamp(0, len(part) - 1)
            target += logits.gather(1, at) * (at == label)
            total = torch.logaddexp(total, logits.logsumexp(-1, keepdim=True))
            label = label - len(part)  # the next block's first column is 0
        student_loss = (total - target)[:, 0]  # (N,)
        mask = choose(student_loss)  # (N,)
        rows = slice(None)  # all of them: no need to gather
        if k != N:
            rows = mask.nonzero()[:, 0] if k is None else mask.float().topk(k).indices  # (k,)
        h, total, label = hidden[rows], total[rows], targets[rows]
        grad_h, grad_weight = torch.zeros_like(h, dtype=torch.float32), torch.empty_like(weight)
        for part, logits, grad in zip(head.split(size), kept, grad_weight.split(size), strict=True):
            logits = h @ part.T if logits is None else logits[rows]  # (k, v)
            error, at = logits.float().sub_(total).exp_(), label.clamp(0, len(part) - 1)  # (k, v)
            error.scatter_add_(1, at, -(at == label).float())
            error, label = error.to(h.dtype), label - len(part)
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
            raise InputError(f"{path}: {tokens} tokens are not one window (--block_size {self.T})")
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


class Run:
    """Where this process runs: on what device, in what precision, as which rank of how many."""

    def __init__(self, cfg):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device(cfg.device)
        self.cuda = self.device.type == "cuda"
        if self.cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            torch.set_float32_matmul_precision("high")  # TF32
        bf16 = self.cuda and torch.cuda.is_bf16_supported()
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.precision = torch.autocast(self.device.type, self.dtype, enabled=bf16)
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.cuda else "gloo")
        if self.rank == 0 and cfg.data == Config.data and not Path(cfg.data, "meta.json").exists():
            prepare_demo(cfg.data)
        self.reduce()
        self.meta = load_meta(cfg.data)

    def put(self, *tensors):  # from pinned memory: the copy runs while the device works on
        tensors = [t.pin_memory() if self.cuda else t for t in tensors]
        return [t.to(self.device, non_blocking=self.cuda) for t in tensors]

    def reduce(self, tensor=None):  # sum over the ranks, in place; of nothing: a barrier
        if self.world > 1:
            dist.barrier() if tensor is None else dist.all_reduce(tensor)

    def bar(self, steps, name, tokens):
        hidden = self.rank > 0 or None  # None: hidden where there is no terminal
        return tqdm(steps, name, unit="tok", unit_scale=tokens, disable=hidden, leave=False)


def open_model(path, cfg, run):
    """The model of a checkpoint or Hugging Face folder. InputError if it does not fit the data."""
    stage = path.stem if path.stem in STAGES else f"ref --name {path.stem}"
    mend = f"Run: python rho.py --stage {stage} --data {cfg.data} --out {path.parent}"
    if not path.exists():
        raise InputError(f"{path} not found. {mend}")
    model, checkpoint = load_model(path)
    spec = run.meta["tokenizer"]
    fits = spec["n_vocab"] == model.config.vocab_size and cfg.block_size <= model.config.block_size
    if checkpoint.get("tokenizer", spec) != spec or not fits:
        raise InputError(f"{path}: wrong tokenizer or --block_size for {cfg.data}. {mend}")
    if checkpoint and checkpoint["records"][-1]["step"] < checkpoint["steps"]:
        raise InputError(f"{path} is not trained to its end. {mend} (it goes on where it stopped)")
    return model.to(run.device)


@torch.no_grad()
def score_batch(run, model, pair, entropy=False):
    """[loss of each target in nats (B, T)] and, if asked for, entropy of its prediction (B, T)."""
    x, y = run.put(*pair)  # (B, T)
    none = partial(torch.zeros_like, dtype=torch.bool)  # nothing selected: no gradient, no logits
    with run.precision:
        hidden = model(x).to(run.dtype)  # (B, T, C)
        flat = hidden.flatten(0, 1), model.lm_head.weight, y.flatten()
        loss = HeadLoss.apply(*flat, none, 0)[1].view(y.shape)  # (B, T)
        if not entropy:
            return [loss]
        entropies = [torch.special.entr(model.head(h).float().softmax(-1)).sum(-1) for h in hidden]
    return [loss, torch.stack(entropies)]


def score_corpus(cfg, run, windows):
    """The reference's loss of the corpus' targets: {"ref_loss": float16 (windows, T) on disk, ...}

    Only windows that a run of --tokens will visit are scored; NaN marks the rest, so a run that was
    interrupted, or asks for more, goes on from there. Ranks share the work, for the same bytes.
    """
    reference = open_model(Path(cfg.reference or Path(cfg.out, "ref.pt")), cfg, run).eval()
    basis = f"{run.meta['files']['train.bin']} {cfg.block_size} {run.dtype} {reference.config}"
    fingerprint = sha256(basis.encode())  # of all that the scores depend on: never stale
    for tensor in reference.state_dict().values():
        fingerprint.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    scores = {}
    for name in KNOWN[: max(1, RULES.get(cfg.select, 1))]:
        path = Path(cfg.out) / "scores" / fingerprint.hexdigest()[:16] / f"{name}.f16"
        if run.rank == 0 and not path.exists():
            tqdm.write(f"scores: {path}")
            with whole_file(path) as f:
                f.writelines([np.full(windows.T, np.nan, np.float16).tobytes()] * windows.n)
        run.reduce()
        scores[name] = np.memmap(path, np.float16, "r+", shape=(windows.n, windows.T))
    wanted = np.sort(permutation(windows.n, cfg.seed, 0)[: cfg.steps * cfg.batch_size])
    parts = torch.tensor(wanted).split(cfg.micro_batch)[run.rank :: run.world]  # before any is made
    parts = [w for w in parts if any(np.isnan(s[w, -1]).any() for s in scores.values())]
    for w in run.bar(parts, "score", cfg.micro_batch * windows.T):
        found = score_batch(run, reference, windows[w], len(scores) > 1)
        for stored, values in zip(scores.values(), found, strict=True):
            stored[w] = values.cpu().numpy()
    run.reduce()
    return scores


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
    return cfg.lr * ((step + 1) / warm if step < warm else cfg.lr_end + (1 - cfg.lr_end) * cosine)


def train(cfg, run, name, split):
    """Train one arm to its end, going on where it stopped; returns the records of its log."""
    windows = Windows(cfg, run.meta, split)
    held_out = {f"{s}_loss": Windows(cfg, run.meta, s) for s in ("val", "val_corpus")}
    scores = score_corpus(cfg, run, windows) if RULES.get(cfg.select) else {}
    if cfg.select == "oracle":  # the generator's own truth stands in for a reference's loss
        kinds = np.load(Path(cfg.data) / "kinds.npz")[split][1 : windows.n * windows.T + 1]
        scores = {"ref_loss": kinds.reshape(windows.n, windows.T)}  # 0 is target text
        cfg = replace(cfg, select="ref_loss", ratio=None, threshold=-0.5)
    torch.manual_seed(cfg.seed)
    shape = {f.name: getattr(cfg, f.name) for f in fields(GPTConfig) if hasattr(cfg, f.name)}
    shape = GPTConfig(vocab_size=run.meta["tokenizer"]["n_vocab"], **shape)
    model = open_model(Path(cfg.init), cfg, run) if cfg.init else GPT(shape).to(run.device)
    optimizers = make_optimizers(cfg, model)
    commit = subprocess.getoutput(f"git -C '{Path(__file__).parent}' describe --always --dirty")
    first = {"run": name, "config": asdict(cfg), "model": asdict(model.config), "commit": commit}
    first |= {"params": model.num_params(), "torch": str(torch.__version__), "world": run.world}
    first |= {"device": str(run.device), "threads": torch.get_num_threads()}
    records = [first | {"step": 0, "trained": 0, "seconds": 0.0}]
    recipe = {k: v for k, v in asdict(cfg).items() if k not in PLACES} | run.meta["files"]
    recipe["scores"] = Path(getattr(scores.get("ref_loss"), "filename", "")).parent.name
    recipe["start"] = cfg.init and sha256(model.lm_head.weight.numpy(force=True)).hexdigest()
    if (path := Path(cfg.out, f"{name}.pt")).exists():
        saved = load_checkpoint(path)
        if saved["recipe"] == recipe:
            records = saved["records"]
            if run.rank == 0:
                tqdm.write(f"{path}: same flags, same data: goes on at step {records[-1]['step']}")
            model.load_state_dict(saved["model"])
            for optimizer, moments in zip(optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(moments)
    trunk = DistributedDataParallel(model) if run.world > 1 else model
    if cfg.compile or (cfg.compile is None and run.cuda):
        trunk = torch.compile(trunk)
    generator, step_tokens = torch.Generator(run.device), cfg.batch_size * cfg.block_size
    looks = {round(cfg.steps * (i + 1) / cfg.evals) for i in range(cfg.evals)}
    sums, started = torch.zeros(3, device=run.device), time.time()  # loss of kept, of all; n kept
    for step in run.bar(range(records[-1]["step"], cfg.steps), name, step_tokens):
        lr = learning_rate(cfg, step, cfg.steps)
        here = batch(windows.n, cfg.batch_size, cfg.seed, step)[run.rank :: run.world]
        n_selected = torch.zeros((), device=run.device)
        for i in range(0, len(here), cfg.micro_batch):
            w = here[i : i + cfg.micro_batch]
            x, y = run.put(*windows[w])  # (B, T)
            generator.manual_seed(hash((cfg.seed, step, i, run.rank)) % 2**62)
            known = [torch.from_numpy(s[w]).flatten().float() for s in scores.values()]
            known = dict(zip(scores, run.put(*known), strict=True))

            def choose(student_loss, known=known):
                score = score_tokens(cfg.select, student_loss, **known, generator=generator)
                return select_tokens(score, cfg.ratio, cfg.threshold)

            k = round(cfg.ratio * y.numel()) if cfg.threshold is None else None
            last = i + cfg.micro_batch >= len(here)
            with nullcontext() if last or run.world == 1 else trunk.no_sync():
                with run.precision:
                    hidden = trunk(x).flatten(0, 1).to(run.dtype)  # (B * T, C)
                head = model.lm_head.weight  # (V, C)
                loss, student_loss, mask = HeadLoss.apply(hidden, head, y.flatten(), choose, k)
                loss.backward()  # of the sum: how many it is a mean over, the step's end knows
            n_selected += mask.sum()
            sums += torch.stack((loss.detach(), student_loss.sum(), mask.sum().float()))
        run.reduce(n_selected)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, run.world / n_selected.clamp(min=1))  # undo DDP's mean
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        if step + 1 in looks:
            run.reduce(sums)
            (chosen, everything, n_chosen), sums = sums.tolist(), torch.zeros_like(sums)
            before, n = records[-1], (step + 1 - records[-1]["step"]) * step_tokens
            record = {"step": step + 1, "tokens": (step + 1) * step_tokens, "lr": lr}
            record |= {"trained": before["trained"] + round(n_chosen), "grad_norm": norm.item()}
            record |= {"seconds": round(before["seconds"] + time.time() - started, 2)}
            record |= {"student_loss": everything / n, "selected_loss": chosen / max(1, n_chosen)}
            records.append(record)
            if run.rank == 0:
                look, losses = evaluate(cfg, run, model, held_out)
                record |= look
                path.with_suffix("").mkdir(parents=True, exist_ok=True)
                np.save(path.with_suffix("") / f"{step + 1}.npy", losses)
                saved = {"model": model.state_dict(), "model_config": asdict(model.config)}
                saved |= {"recipe": recipe, "tokenizer": run.meta["tokenizer"], "steps": cfg.steps}
                saved |= {"optimizers": [o.state_dict() for o in optimizers], "records": records}
                with whole_file(path) as f:
                    torch.save(saved, f)
                with whole_file(path.with_suffix(".jsonl")) as f:
                    f.writelines(f"{json.dumps(r)}\n".encode() for r in records)
                shown = (f"{k} {v:,.7g}" for k, v in record.items() if k in SHOWN)
                tqdm.write(f"{name:>11}  " + "  ".join(shown))
            started = time.time()
    return records


def evaluate(cfg, run, model, held_out):
    """(record, losses): held-out losses (mean over all tokens, nats) and right answers, which arms
    are compared on; and the loss of each token of the last held-out split, float16 (windows, T)."""
    started, record = time.time(), {}
    model.eval()
    for name, windows in held_out.items():
        parts = torch.arange(min(cfg.eval_windows, windows.n)).split(cfg.micro_batch)
        losses = torch.cat([score_batch(run, model, windows[w])[0] for w in parts])
        record[name] = losses.mean().item()
    if cfg.questions and (path := Path(cfg.data, "questions.jsonl")).exists():
        asked, encoding = load_questions(path, cfg.questions), get_tokenizer(run.meta["tokenizer"])
        answers = answer_questions(model, encoding, asked, batch_size=2**16 // cfg.block_size)
        record |= {"right": sum(a["correct"] for a in answers), "questions": len(answers)}
    model.train()
    record["eval_seconds"] = round(time.time() - started, 2)
    return record, losses.half().cpu().numpy()


def token_dynamics(losses):
    """Class of each token by how its loss moved (N,): H->L (learned), L->H, L->L (easy) or H->H.

    losses (n + 1, N): the tokens' losses at n + 1 evenly spaced checkpoints, nats. A least-squares
    line that falls or rises by over 0.2 is a move; else the last mean loss divides (section 2.1).
    """
    losses = np.asarray(losses, np.float32)
    change = np.polyfit(np.arange(len(losses)), losses, 1)[0] * (len(losses) - 1)  # (N,)
    flat = np.where(losses[-1] <= losses[-1].mean(), "L->L", "H->H")
    return np.select([change < -0.2, change > 0.2], ["H->L", "L->H"], flat)


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
        if type(value) is int and value < (least := int(flag not in ("seed", "questions"))):
            raise InputError(f"--{flag} {value}: must be at least {least}")
    if cfg.stage == "all" and (cfg.name or cfg.threshold is not None):
        raise InputError("--stage all: --name and --threshold are of one run, as --stage slm")
    run = Run(cfg)
    if cfg.batch_size % run.world:
        raise InputError(f"--batch_size {cfg.batch_size}: not a multiple of {run.world} processes")
    if cfg.stage == "score":
        score_corpus(cfg, run, Windows(cfg, run.meta, "train"))
    elif cfg.stage == "dynamics":  # of training that goes on, as in the paper, from a trained model
        base = cfg.init or f"{cfg.out}/clm.pt"
        cfg = replace(cfg, init=base, seed=cfg.seed + 1, evals=max(16, cfg.evals))
        for stage in ("clm", "slm"):
            train_arm(replace(cfg, name=f"dynamics-{stage}"), run, stage)
    else:
        for stage, select in ARMS if cfg.stage == "all" else [(cfg.stage, cfg.select)]:
            train_arm(replace(cfg, select=select), run, stage)
    run.reduce()  # wait for rank 0: one that leaves while gloo holds its last tensor aborts
    if run.world > 1:
        dist.destroy_process_group()
    figures = Path(__file__).parent / "results" / "figures.py"
    if cfg.stage in ("all", "dynamics") and run.rank == 0 and figures.exists():
        subprocess.run([sys.executable, str(figures), cfg.out])  # the tables and the pictures


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    choices = {"stage": STAGES, "select": (*RULES, "oracle"), "optimizer": ("muon", "adamw")}
    choices |= {"device": ("cpu", BEST)}
    helps = dict(re.findall(r"    (\w+): .* = .*?  # (.*)", inspect.getsource(Config)))
    for f in fields(Config):
        kind = {"threshold": float, "compile": bool}.get(f.name, type(f.default))
        how = {"type": kind, "choices": choices.get(f.name)}
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
        parser.exit(2, f"rho.py: another process has stopped ({str(error).splitlines()[0]})\n")
    except OSError as error:  # a full disk, a folder that may not be written
        parser.exit(2, f"rho.py: {error.filename or 'writing'}: {error.strerror}\n")


if __name__ == "__main__":
    main()
