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
import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from model import GPT, GPTConfig, load_checkpoint, load_hf, load_model, save_checkpoint
from prepare_data import InputError, get_tokenizer, load_meta, prepare_demo


@dataclass
class Config:
    # what to run
    stage: str = "all"  # ref, score, clm, slm, or all
    data: str = "data/demo"  # folder that prepare_data.py wrote
    out: str = "out/demo"  # folder for checkpoints, scores and logs
    name: str = ""  # name of the run's files; empty: the stage's, and the rule unless excess
    seed: int = 1337  # of the first weights and of the order of windows
    device: str = ""  # cuda, mps or cpu; empty: the best there is
    # selection, the paper's part
    select: str = "excess"  # excess, ref_loss, ref_entropy, loss, random, oracle (demo only)
    ratio: float = 0.6  # share of tokens trained on, over each micro-batch; 1 is plain CLM
    threshold: float | None = None  # instead of ratio: every token that scores above it (nats)
    # the model; the reference's shape is in its own checkpoint and may be another
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 4
    n_embd: int = 128
    n_inner: int = 384
    qk_norm: bool = True
    tied: bool = False
    block_size: int = 128  # tokens in a window
    init: str = ""  # start from this checkpoint, or folder of Hugging Face weights
    # training; "tokens" are tokens seen, trained on or not
    tokens: int = 2_000_000  # for clm and slm
    ref_tokens: int = 1_500_000  # for ref
    batch_size: int = 16  # windows in one optimizer step, over all devices
    micro_batch: int = 16  # windows that a device holds at once; the rest is accumulated
    optimizer: str = "muon"  # muon (matrices; AdamW for the rest) or adamw
    lr: float = 3e-3
    lr_end: float = 0.1  # last learning rate, as a share of lr (cosine)
    warmup: float = 0.02  # share of the steps that warm up
    weight_decay: float = 0.1
    clip: float = 1.0  # norm of the gradient above which it is scaled down
    compile: bool | None = None  # torch.compile; unset: on CUDA only
    # looking
    evals: int = 10  # evaluations over the run, evenly spaced; each also saves
    eval_windows: int = 256  # windows of held-out text in one evaluation
    questions: int = 500  # demo questions answered in one evaluation
    entropy: bool = False  # score: also write the reference's entropy


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
    easy or is sure of (self-reference, section 3.4). loss: what the student finds hard. random: the
    control. Raises ValueError for another rule, or where a rule's input is missing.
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
    raise ValueError(f"--select {select} is no rule, or the scores it needs were not given")


def select_tokens(score, ratio=None, threshold=None, valid=None):
    """Which tokens to train on, bool (B, T): the k highest scores, or all above a threshold.

    k = round(ratio * number of valid tokens), over the whole of `score` (eq. 4). valid (B, T): False
    where there is nothing to predict; such tokens are neither selected nor counted into k.
    """
    if (ratio is None) == (threshold is None):
        raise ValueError("select_tokens takes a ratio or a threshold, one of them")
    if valid is None:
        valid, n = torch.ones_like(score, dtype=torch.bool), score.numel()
    else:
        n = int(valid.sum())
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

    The definition above would carry a gradient of (B * T, V) logits that is mostly zero. Here the
    log-probabilities of all tokens are kept just until the selection is known; then the gradient,
    softmax minus one-hot, is formed for the k selected rows and at once multiplied out.
    forward: hidden (N, C), weight (V, C), targets (N,), choose(student_loss) -> mask (N,)
    returns the sum (with gradient), student_loss (N,) and mask (N,) (without).
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, choose):
        N, V = len(hidden), len(weight)
        part = max(1, 2**23 // V)  # rows at a time, so that what is worked on stays in the cache
        logp = torch.empty(N, V, device=hidden.device)  # (N, V)
        for h, out in zip(hidden.split(part), logp.split(part), strict=True):
            torch.log_softmax((h @ weight.T).float(), -1, out=out)
        student_loss = -logp.gather(1, targets[:, None])[:, 0]  # (N,)
        mask = choose(student_loss)  # (N,)
        grad_hidden = torch.zeros_like(hidden)  # (N, C)
        grad_weight = torch.zeros_like(weight)  # (V, C)
        for kept in mask.nonzero()[:, 0].split(part):
            grad = logp[kept].exp_()  # (rows, V): softmax, and after the next line minus one-hot
            grad[torch.arange(len(kept), device=kept.device), targets[kept]] -= 1
            grad = grad.to(hidden.dtype)
            grad_hidden[kept] = grad @ weight.to(grad.dtype)
            grad_weight.addmm_(grad.T, hidden[kept])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(student_loss, mask)
        return (student_loss * mask).sum(), student_loss, mask

    @staticmethod
    def backward(ctx, scale, *_):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * scale, grad_weight * scale, None, None


# ==== windows and batches =========================================================================


class Windows:
    """A token file cut into fixed windows: window w predicts tokens w * T + 1 ... w * T + T.

    Every token is a target in one window only, so it has one reference loss. Index with an array
    of B window numbers for inputs and targets, both (B, T) int64.
    """

    def __init__(self, data, meta, split, block_size):
        self.tokens = np.memmap(Path(data) / f"{split}.bin", dtype=meta["dtype"], mode="r")
        self.T = block_size
        self.n = (len(self.tokens) - 1) // self.T
        if self.n < 1:
            raise InputError(
                f"{data}/{split}.bin has {len(self.tokens)} tokens, too few for one window of "
                f"{self.T}: prepare more text, or lower --block_size"
            )

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


def steps_of(cfg):
    return max(1, cfg.tokens // (cfg.batch_size * cfg.block_size))


# ==== scoring =====================================================================================


def fingerprint(model, data_sha256, block_size):
    """Names a score folder by all that the scores depend on, so that none is ever stale."""
    digest = hashlib.sha256(f"{data_sha256} {block_size} {model.config}".encode())
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


@torch.no_grad()
def score_batch(model, x, y, entropy=False):
    """Loss of each target in nats (B, T) and, if asked for, the entropy of its prediction (B, T)."""
    hidden = model(x).flatten(0, 1)  # (B * T, C)
    losses, entropies = [], []
    rows = max(1, 2**23 // model.config.vocab_size)  # keeps the logits in the cache
    for h, t in zip(hidden.split(rows), y.flatten().split(rows), strict=True):
        logits = model.head(h).float()  # (rows, V)
        losses.append(token_loss(logits, t))
        if entropy:
            logp = logits.log_softmax(-1)  # (rows, V)
            entropies.append(-(logp.exp() * logp).sum(-1))
    shaped = [torch.cat(part).view(y.shape) for part in (losses, entropies) if part]
    return shaped if entropy else shaped[0]


def score_corpus(cfg, run):
    """Write the reference's loss of every target of train.bin as float16, (windows, T); the folder.

    Only windows that a run of --tokens will visit are scored; NaN marks the others, so a run that
    was interrupted, or that asks for more, goes on from there. Streams in constant memory. Under
    torchrun each rank takes every world-th batch; the bytes do not depend on the ranks.
    """
    reference, _ = load_reference(cfg, run)
    windows = Windows(cfg.data, run.meta, "train", cfg.block_size)
    key = fingerprint(reference, run.meta["files"]["train.bin"], cfg.block_size)
    folder = Path(cfg.out) / "scores" / key
    names = ["ref_loss", "ref_entropy"] if cfg.entropy or "entropy" in cfg.select else ["ref_loss"]
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name in names:
        path = folder / f"{name}.f16"
        if run.rank == 0 and not path.exists():
            blank = np.full(windows.T, np.nan, np.float16).tobytes()
            with open(f"{path}.tmp", "wb") as f:
                for _ in range(windows.n):
                    f.write(blank)
            os.replace(f"{path}.tmp", path)
        run.barrier()
        files.append(np.memmap(path, np.float16, "r+", shape=(windows.n, windows.T)))
    visits = min(windows.n, steps_of(cfg) * cfg.batch_size)
    wanted = np.sort(permutation(windows.n, cfg.seed, 0)[:visits])
    size = max(1, 8192 // windows.T)
    parts = [wanted[i : i + size] for i in range(0, visits, size)]
    parts = [w for w in parts if any(np.isnan(f[w, -1]).any() for f in files)]
    if parts:
        bar = run.bar(total=sum(map(len, parts)) * windows.T, desc="score")
        for w in parts[run.rank :: run.world]:
            x, y = (t.to(run.device) for t in windows[w])
            with run.precision():
                scored = score_batch(reference, x, y, entropy=len(files) > 1)
            for f, values in zip(files, scored if len(files) > 1 else [scored], strict=True):
                f[w] = values.float().cpu().numpy()
            bar.update(len(w) * windows.T)
        bar.close()
        for f in files:
            f.flush()
    run.barrier()
    return folder


# ==== training ====================================================================================


class Run:
    """Where this process runs: device, precision, its rank among how many, and what data."""

    def __init__(self, cfg):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        best = "cuda" if torch.cuda.is_available() else "cpu"
        best = "mps" if torch.backends.mps.is_available() else best
        self.device = torch.device(cfg.device or best)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        self.bf16 = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        self.meta = load_meta(cfg.data)
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def precision(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def say(self, text):
        if self.rank == 0:
            tqdm.write(text)

    def bar(self, **kwargs):
        hide = self.rank > 0 or None  # None: hidden where there is no terminal
        return tqdm(unit="tok", unit_scale=True, dynamic_ncols=True, disable=hide, **kwargs)


def load_reference(cfg, run):
    """The frozen reference and its checkpoint. InputError if it is missing or of another kind."""
    path = Path(cfg.out) / "ref.pt"
    again = f"Run: python rho.py --stage ref{where(cfg)}"
    if not path.exists():
        raise InputError(f"{path} not found. {again}")
    try:
        reference, checkpoint = load_model(path, run.device)
    except ValueError as error:
        raise InputError(f"{error}. {again}") from error
    if checkpoint["step"] < checkpoint["steps"]:
        raise InputError(f"{path} is not trained to its end. {again} (it resumes)")
    if checkpoint["tokenizer"] != run.meta["tokenizer"]:
        raise InputError(f"{path} and {cfg.data} differ in tokenizer or vocabulary. {again}")
    if reference.config.block_size < cfg.block_size:
        raise InputError(f"--block_size {cfg.block_size} is longer than {path} was made for")
    return reference.eval().requires_grad_(False), checkpoint


def where(cfg):
    """The flags that a command needs to speak of the same data and output."""
    default = Config()
    flags = (f" --{name} {getattr(cfg, name)}" for name in ("data", "out"))
    return "".join(f for f, name in zip(flags, ("data", "out"), strict=True)
                   if getattr(cfg, name) != getattr(default, name))  # fmt: skip


def new_model(cfg, run):
    torch.manual_seed(cfg.seed)
    if not cfg.init:
        shape = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(GPTConfig)
                 if hasattr(cfg, f.name)}  # fmt: skip
        return GPT(GPTConfig(vocab_size=run.meta["tokenizer"]["n_vocab"], **shape))
    try:
        hf = Path(cfg.init).is_dir()
        model, checkpoint = (load_hf(cfg.init), None) if hf else load_model(cfg.init)
    except (ValueError, FileNotFoundError) as error:
        raise InputError(f"--init {cfg.init}: {error}") from error
    n_vocab = run.meta["tokenizer"]["n_vocab"]
    other = checkpoint and checkpoint["tokenizer"] != run.meta["tokenizer"]
    if other or model.config.vocab_size < n_vocab:
        raise InputError(f"--init {cfg.init} and {cfg.data} differ in tokenizer or vocabulary")
    if cfg.block_size > model.config.block_size:
        raise InputError(
            f"--block_size {cfg.block_size} is longer than the {model.config.block_size} "
            f"of --init {cfg.init}"
        )
    return model


def make_optimizers(cfg, model):
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
    adamw = {"lr": cfg.lr, "betas": (0.9, 0.95), "weight_decay": 0.0}
    if cfg.optimizer == "adamw":
        decayed = {"params": matrices, "weight_decay": cfg.weight_decay}
        return [torch.optim.AdamW([decayed, {"params": rest}], **adamw)]
    muon = torch.optim.Muon(
        matrices, lr=cfg.lr, weight_decay=cfg.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, torch.optim.AdamW(rest, **adamw)]


def learning_rate(cfg, step, steps):
    """Linear warm-up, then half a cosine down to lr * lr_end."""
    warm = max(1, round(cfg.warmup * steps))
    if step < warm:
        return cfg.lr * (step + 1) / warm
    cosine = 0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(1, steps - warm))
    return cfg.lr * (cfg.lr_end + (1 - cfg.lr_end) * cosine)


def train(cfg, run, name, split):
    """Train one arm to its end, resuming where it stopped; returns the records of its log."""
    windows = Windows(cfg.data, run.meta, split, cfg.block_size)
    held_out = Windows(cfg.data, run.meta, "val", cfg.block_size)
    held_out_corpus = Windows(cfg.data, run.meta, "val_corpus", cfg.block_size)
    ref_loss = ref_entropy = None
    scores = "none"
    if cfg.select in ("excess", "ref_loss", "ref_entropy"):
        folder = score_corpus(cfg, run)
        scores, shape = folder.name, (windows.n, windows.T)
        ref_loss = np.memmap(folder / "ref_loss.f16", np.float16, "r", shape=shape)
        if cfg.select == "ref_entropy":
            ref_entropy = np.memmap(folder / "ref_entropy.f16", np.float16, "r", shape=shape)
    if cfg.select == "oracle":  # the generator's own truth, as if it were a reference
        path = Path(cfg.data) / f"{split}.kind.bin"
        if not path.exists():
            raise InputError(f"{path} not found: --select oracle needs the demo's data")
        kinds = np.memmap(path, np.uint8, "r")[1 : 1 + windows.n * windows.T]
        ref_loss = kinds.reshape(windows.n, windows.T)

    model = new_model(cfg, run).to(run.device)
    optimizers = make_optimizers(cfg, model)
    steps = steps_of(cfg)
    recipe = dataclasses.asdict(cfg) | {"files": run.meta["files"], "scores": scores}
    for key in ("stage", "data", "out", "name", "device", "compile", "entropy"):
        del recipe[key]
    checkpoint_path, log_path = (Path(cfg.out) / f"{name}.{end}" for end in ("pt", "jsonl"))
    step, seconds, trained = 0, 0.0, 0
    head = {"run": name, "config": dataclasses.asdict(cfg), "steps": steps, **provenance(run)}
    head["params"] = model.num_params()
    records = [head]
    if checkpoint_path.exists() and log_path.exists():
        try:
            saved = load_checkpoint(checkpoint_path, run.device)
        except ValueError as error:
            raise InputError(f"{error}: delete it, and the run starts anew") from error
        if saved.get("recipe") == recipe:
            step, seconds, trained = saved["step"], saved["seconds"], saved["trained"]
            model.load_state_dict(saved["model"])
            for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            records = [json.loads(line) for line in log_path.read_text().splitlines()]
            records = [r for r in records if r.get("step", 0) <= step]
    if step == steps:
        run.say(f"{name}: up to date ({checkpoint_path})")
        return records

    compiled = cfg.compile if cfg.compile is not None else run.device.type == "cuda"
    trunk = torch.compile(model) if compiled else model
    generator = torch.Generator(run.device)
    evaluate_at = {round(steps * (i + 1) / cfg.evals) for i in range(cfg.evals)} | {steps}
    sums = torch.zeros(4, device=run.device)  # loss selected, all; tokens selected, all
    bar = run.bar(total=cfg.tokens, initial=step * cfg.batch_size * cfg.block_size, desc=name)
    started = time.time()
    while step < steps:
        lr = learning_rate(cfg, step, steps)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        here = batch(windows.n, cfg.batch_size, cfg.seed, step)[run.rank :: run.world]
        n_selected = torch.zeros((), device=run.device)
        for i in range(0, len(here), cfg.micro_batch):
            w = here[i : i + cfg.micro_batch]
            x, y = (t.to(run.device) for t in windows[w])  # (B, T)
            r, h = (
                torch.from_numpy(np.asarray(a[w], np.float32)).to(run.device).flatten()
                if a is not None
                else None
                for a in (ref_loss, ref_entropy)
            )
            generator.manual_seed(hash((cfg.seed, step, i, run.rank)) % 2**62)

            def choose(student_loss, r=r, h=h):
                if cfg.select == "oracle":
                    return r == 0
                if cfg.ratio == 1 and cfg.threshold is None:
                    return torch.ones_like(student_loss, dtype=torch.bool)
                score = score_tokens(cfg.select, student_loss, r, h, generator)
                ratio = cfg.ratio if cfg.threshold is None else None
                return select_tokens(score, ratio, cfg.threshold)

            with run.precision():
                hidden = trunk(x).flatten(0, 1)  # (B * T, C)
                loss, student_loss, mask = HeadLoss.apply(
                    hidden, model.lm_head.weight, y.flatten(), choose
                )
            loss.backward()  # of the sum; what it is a mean over is known when all have been seen
            n_selected += mask.sum()
            counts = (loss.detach(), student_loss.sum(), mask.sum(), mask.new_tensor(mask.numel()))
            sums += torch.stack([c.float() for c in counts])
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if run.world > 1:
            for tensor in (*gradients, n_selected):
                dist.all_reduce(tensor)
        torch._foreach_div_(gradients, n_selected.clamp(min=1))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        bar.update(cfg.batch_size * cfg.block_size)
        if step in evaluate_at:
            if run.world > 1:
                dist.all_reduce(sums)
            selected, everything, k, n = sums.double().tolist()
            sums.zero_()
            seconds, trained = seconds + time.time() - started, trained + round(k)
            record = {"step": step, "tokens": step * cfg.batch_size * cfg.block_size}
            record |= {"trained": trained, "seconds": round(seconds, 2), "lr": lr}
            record |= {"grad_norm": norm.item(), "selected_loss": selected / max(1, k)}
            record |= {"unselected_loss": (everything - selected) / (n - k) if n > k else None}
            record |= {"student_loss": everything / n}
            if run.rank == 0:
                record |= evaluate(cfg, run, model, held_out, held_out_corpus)
                records.append(record)
                lines = "".join(json.dumps(r) + "\n" for r in records)
                write_text(log_path, lines)
                state = {"model_config": dataclasses.asdict(model.config), "recipe": recipe}
                state |= {"model": model.state_dict(), "tokenizer": run.meta["tokenizer"]}
                state |= {"optimizers": [o.state_dict() for o in optimizers], "steps": steps}
                state |= {"step": step, "seconds": seconds, "trained": trained}
                save_checkpoint(checkpoint_path, state)
                run.say(describe(name, record))
            run.barrier()
            started = time.time()
    bar.close()
    return records


def write_text(path, text):
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(text)
    os.replace(temporary, path)


def provenance(run):
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {
        "commit": commit,
        "torch": torch.__version__,
        "device": str(run.device),
        "threads": torch.get_num_threads(),
        "world": run.world,
    }


# ==== evaluation ==================================================================================


@torch.no_grad()
def held_out_loss(cfg, run, model, windows):
    """Mean loss in nats over the first eval_windows windows, all tokens counted."""
    total, n = 0.0, min(cfg.eval_windows, windows.n)
    for lo in range(0, n, cfg.micro_batch):
        x, y = (t.to(run.device) for t in windows[np.arange(lo, min(lo + cfg.micro_batch, n))])
        with run.precision():
            total += score_batch(model, x, y).double().sum().item()
    return total / (n * windows.T)


def evaluate(cfg, run, model, held_out, held_out_corpus):
    """What arms are compared on: held-out target text, and answers where the data has questions."""
    started = time.time()
    model.eval()
    record = {"val_loss": held_out_loss(cfg, run, model, held_out)}
    record["corpus_loss"] = held_out_loss(cfg, run, model, held_out_corpus)
    path = Path(cfg.data) / "questions.jsonl"
    if cfg.questions and path.exists():
        from eval_math import answer_questions

        questions = [json.loads(line) for line in path.read_text().splitlines()[: cfg.questions]]
        encoding = get_tokenizer(run.meta["tokenizer"])
        answers = answer_questions(model, encoding, questions)
        record |= {"right": sum(a["correct"] for a in answers), "questions": len(answers)}
    model.train()
    return record | {"eval_seconds": round(time.time() - started, 2)}


def describe(name, r):
    parts = [f"{name:>12} {r['tokens']:>12,} tokens", f"held-out loss {r['val_loss']:.3f}"]
    if "right" in r:
        parts.append(f"right {r['right']}/{r['questions']}")
    return "  ".join(parts + [f"{r['tokens'] / max(r['seconds'], 1e-9):,.0f} tok/s"])


def summarise(logs):
    """The closing table, and how many times fewer tokens slm took to clm's last accuracy."""
    rows = [("arm", "seen", "trained on", "held-out loss", "right", "seconds")]
    for name, records in logs.items():
        last = records[-1]
        right = f"{last['right']}/{last['questions']}" if "right" in last else "-"
        numbers = f"{last['tokens']:,}", f"{last['trained']:,}", f"{last['val_loss']:.3f}"
        rows.append((name, *numbers, right, f"{last['seconds']:.0f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(r, widths, strict=True)) for r in rows]
    clm, slm = logs["clm"][-1], logs["slm"][1:]
    for better, what in ((lambda r: r.get("right", 0) >= clm.get("right", 1), "accuracy"),
                         (lambda r: r["val_loss"] <= clm["val_loss"], "held-out loss")):  # fmt: skip
        passed = [r["tokens"] for r in slm if better(r)]
        if passed:
            times = clm["tokens"] / passed[0]
            lines.append(f"slm passed clm's final {what} after {passed[0]:,} tokens: "
                         f"{times:.1f} times fewer")  # fmt: skip
        else:
            lines.append(f"slm did not reach clm's final {what}")
    return "\n".join(lines)


# ==== stages ======================================================================================


def arm(cfg, stage):
    """(config, name, split) of a training stage: what it does not use is set aside."""
    if stage == "ref":
        plain = {"tokens": cfg.ref_tokens, "ratio": 1.0, "threshold": None, "select": ""}
        return dataclasses.replace(cfg, ref_tokens=0, **plain), cfg.name or "ref", "ref"
    cfg = dataclasses.replace(cfg, ref_tokens=0)
    if stage == "clm":
        plain = dataclasses.replace(cfg, ratio=1.0, threshold=None, select="")
        return plain, cfg.name or "clm", "train"
    name = "slm" if cfg.select == "excess" else f"slm-{cfg.select}"
    return cfg, cfg.name or name, "train"


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    comments = {}
    for line in Path(__file__).read_text().split("class Config:")[1].splitlines():
        if line.startswith("    ") and ":" in line and "#" in line:
            comments[line.split(":")[0].strip()] = line.split("#", 1)[1].strip()
    kinds = {"threshold": float, "compile": bool}
    for field in dataclasses.fields(Config):
        kind = kinds.get(field.name, type(field.default))
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        text = comments.get(field.name, "") + f" [{field.default}]"
        parser.add_argument(f"--{field.name}", default=field.default, help=text.replace("%", "%%"), **how)
    cfg = Config(**vars(parser.parse_args(argv)))
    try:
        run_stage(cfg)
    except InputError as error:
        sys.exit(fail(error))
    except OSError as error:
        sys.exit(fail(f"{error.filename or cfg.out}: {error.strerror}"))


def fail(error):
    print(f"rho.py: {error}", file=sys.stderr)
    return 2


def run_stage(cfg):
    if cfg.stage not in ("ref", "score", "clm", "slm", "all"):
        raise InputError(f"--stage {cfg.stage}: choose ref, score, clm, slm or all")
    rules = ("excess", "ref_loss", "ref_entropy", "loss", "random", "oracle")
    if cfg.select not in rules:
        raise InputError(f"--select {cfg.select}: choose {', '.join(rules)}")
    if not 0 < cfg.ratio <= 1:
        raise InputError(f"--ratio {cfg.ratio}: a share of tokens, above 0 and at most 1")
    if cfg.data == Config.data and not (Path(cfg.data) / "meta.json").exists():
        prepare_demo(cfg.data)
    run = Run(cfg)
    if cfg.stage == "score":
        run.say(f"scores: {score_corpus(cfg, run)}")
    elif cfg.stage != "all":
        one, name, split = arm(cfg, cfg.stage)
        train(one, run, name, split)
    else:
        arms = [("ref", "excess"), ("clm", "excess"), ("slm", "excess"), ("slm", "random")]
        logs = {}
        for stage, select in arms:
            one, name, split = arm(dataclasses.replace(cfg, select=select), stage)
            logs[name] = train(one, run, name, split)
        print("\n" + summarise(logs))
        print(f"picture: python results/figures.py {cfg.out}")


if __name__ == "__main__":
    main()
