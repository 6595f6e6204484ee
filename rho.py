"""Selective Language Modeling (Rho-1, arXiv 2404.07965): train on the tokens that are worth it.

A reference model learns clean text and scores every token of a large dirty corpus once. A student
then reads the whole corpus, but its loss counts only the tokens whose excess loss, its own loss
minus the reference's, is highest. What neither model can predict is noise, and what the student
predicts already is learned: both are left out.

    command, on the demo, two cores           minutes   what it should print at its end
    python rho.py                                   5   the four runs below, then a table
    python rho.py --stage ref                       1   the reference: 326 of 500 answers right
    python rho.py --stage clm                       1   ordinary training, all tokens: 56 of 500
    python rho.py --stage slm                       2   the paper, half of the tokens: 169 of 500
    python rho.py --stage slm --select random       1   the control, any half: 33 of 500
    python rho.py --stage score                     1   the reference's loss on every token
    python rho.py --stage sft --init out/demo/slm.pt    fine-tuning on answers
    python rho.py --stage dynamics                  3   how each token's loss moves (section 2.1)
    python rho.py --stage table                         every run in out/demo, compared with CLM
    python rho.py --stage check                         are all files what they were when written?

    code              paper           where
    student_loss      L_theta(x_i)    section 2.2
    ref_loss          L_ref(x_i)      equation 1
    excess            L_delta(x_i)    equation 2
    ratio             k %             equation 3
    selective_loss    L_SLM           equation 3
    mask              I_k%(x_i)       equation 4
    ref_entropy       H_ref           section 3.4

Where this differs from the paper, and why:
1. Models of 1 M parameters from scratch, not 1 to 7 B continued: it must run on a laptop.
   `--init` is the paper's way.
2. The reference's losses are computed once, as in the paper, and kept on disk as float16.
3. The top k are taken over each device's micro-batch: the paper says "batch" and no more.
4. Muon for the matrices and AdamW for the rest: the paper names no optimizer.
"""

import argparse
import ast
import inspect
import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from eval_math import answer_questions, load_questions
from model import GPT, GPTConfig, all_losses, load_checkpoint, load_model, selected_loss
from prepare_data import (
    InputError,
    check_files,
    file_digest,
    get_tokenizer,
    load_meta,
    prepare_demo,
    whole_file,
)

try:
    import fcntl
except ImportError:  # Windows has no such locks: there nothing keeps two writers apart
    fcntl = None

BEST_DEVICE = (torch.accelerator.current_accelerator(True) or torch.device("cpu")).type
STAGES = ("all", "ref", "score", "clm", "slm", "sft", "dynamics", "table", "check")
# What each rule of `score_tokens` must be given besides the student's own losses.
NEEDS = {
    "excess": ["ref_loss"],
    "ref_loss": ["ref_loss"],
    "ref_entropy": ["ref_entropy"],
    "ref_both": ["ref_loss", "ref_entropy"],
    "loss": [],
    "random": [],
    "all": [],
    "oracle": ["truth"],
}
# The rule that a stage stands for when --select does not say.
STAGE_RULES = {"ref": "all", "clm": "all", "sft": "all", "slm": "excess", "score": "excess"}


def option(default, help, least=None, above=None, most=None, choices=None):
    """A field of Config with its help text and its range; the command line is made of them."""
    limits = {"least": least, "above": above, "most": most, "choices": choices}
    return field(default=default, metadata={"help": help, **limits})


@dataclass
class Config:
    stage: str = option("all", "what to do; all: ref, clm, slm, control, table", choices=STAGES)
    data: str = option("data/demo", "folder that prepare_data.py wrote")
    out: str = option("out/demo", "folder for checkpoints, scores and logs")
    name: str = option("", "name of the run's files; empty: the stage's, and the rule's")
    seed: int = option(1337, "of the first weights and of the order of windows", 0, most=2**62)
    device: str = option(BEST_DEVICE, "where to compute", choices=sorted({BEST_DEVICE, "cpu"}))
    # Selection: the paper's part.
    select: str = option("", "rule; empty: excess for slm, all for others", choices=("", *NEEDS))
    reference: str = option("", "checkpoint or Hugging Face folder that scores; empty: OUT/ref.pt")
    ratio: float = option(0.5, "share of the tokens trained on (paper: 0.6)", above=0, most=1)
    threshold: float | None = option(None, "instead of ratio: all that score above it, nats")
    fast: bool = option(True, "false: the four plain functions alone, to read and to check")
    # The model. The reference's shape is in its own checkpoint and may be another.
    n_layer: int = option(3, "blocks of the model", 1)
    n_head: int = option(4, "attention heads", 1)
    n_kv_head: int = option(4, "key-value heads; fewer than n_head: grouped-query attention", 1)
    n_embd: int = option(128, "channels of the residual stream", 1)
    n_inner: int = option(384, "channels inside each MLP", 1)
    qk_norm: bool = option(True, "normalise queries and keys: small models learn far faster")
    tied: bool = option(False, "one matrix for the embedding and the head")
    block_size: int = option(128, "tokens in a window", 1)
    init: str = option("", "start from this checkpoint, or folder of Hugging Face weights")
    # Training. "Tokens" are tokens seen, trained on or not.
    tokens: int = option(900_000, "how many clm and slm see", 1)
    ref_tokens: int = option(900_000, "how many the reference sees", 1)
    sft_tokens: int = option(200_000, "how many fine-tuning sees", 1)
    batch_size: int = option(8, "windows in one optimizer step, over all devices", 1)
    micro_batch: int = option(8, "windows that a device holds at once; the rest accumulates", 1)
    optimizer: str = option("muon", "muon: AdamW for what is no matrix", choices=("muon", "adamw"))
    lr: float = option(7.5e-4, "highest learning rate; chosen for clm", above=0, most=10)
    lr_end: float = option(0.1, "last learning rate as a share of lr (cosine)", 0, most=1)
    warmup: float = option(0.02, "share of the steps that warm up", 0, most=1)
    weight_decay: float = option(0.1, "of the matrices", 0, most=10)
    clip: float = option(1.0, "norm above which the gradient is scaled down", above=0)
    compile: bool | None = option(None, "torch.compile; unset: on CUDA only")
    recompute: bool = option(False, "activations computed twice, not kept: less memory")
    evals: int = option(9, "evaluations over the run, evenly spaced; each also saves", 1)
    eval_windows: int = option(64, "windows of held-out text in one evaluation", 1)
    questions: int = option(500, "of DATA/questions.jsonl answered in one evaluation", 0)
    save_minutes: float = option(20, "a checkpoint at least this often", above=0)
    restart: bool = option(False, "begin again, replacing the run of this name")

    @property
    def steps(self):
        return max(1, self.tokens // (self.batch_size * self.block_size))


# What does not change the result of a run: where files lie, and how it is computed or saved.
# The contents of init and reference count, not their names: see `run_identity`.
NOT_IDENTITY = {"stage", "data", "out", "name", "reference", "init", "device", "compile"}
NOT_IDENTITY |= {"recompute", "restart", "save_minutes", "ref_tokens", "sft_tokens"}


# ==== THE METHOD ==================================================================================
# Ordinary pre-training averages the loss over all tokens. These four functions are the difference.


def token_loss(logits, targets):
    """Cross-entropy of each token in nats, float32 (B, T); logits (B, T, V), targets (B, T).

    Paper, equation 1. Position t of `logits` predicts `targets[:, t]`, already the next token.
    """
    logits = logits.float().flatten(0, -2)  # (B * T, V)
    loss = F.cross_entropy(logits, targets.flatten(), reduction="none")
    return loss.view(targets.shape)  # (B, T)


def score_tokens(select, student_loss, ref_loss=None, ref_entropy=None, truth=None, generator=None):
    """How much each token is worth training on (B, T): the highest are kept. No gradient.

    excess: the student's loss minus the reference's, signed (equation 2). ref_loss, ref_entropy,
    ref_both: what the reference finds easy, is sure of, or both (self-reference, section 3.4).
    loss: what the student finds hard. random: the control. all: ordinary training. oracle: what
    the demo's generator knows to be target text. Each input is (B, T).
    ValueError for another rule, or if an input that NEEDS lists for the rule is missing.
    """
    given = {"ref_loss": ref_loss, "ref_entropy": ref_entropy, "truth": truth}
    missing = [name for name in NEEDS.get(select, []) if given[name] is None]
    if missing:
        raise ValueError(f"--select {select} needs {', '.join(missing)}")
    # The score decides which tokens count. No gradient may flow through that decision.
    student_loss = student_loss.detach()  # (B, T)
    if select == "excess":
        return student_loss - ref_loss
    if select == "ref_loss":
        return -ref_loss
    if select == "ref_entropy":
        return -ref_entropy
    if select == "ref_both":
        # In both top sets: rank by the worse of the two ranks.
        loss_rank = ref_loss.flatten().argsort().argsort()  # (B * T)
        entropy_rank = ref_entropy.flatten().argsort().argsort()
        worse = torch.maximum(loss_rank, entropy_rank)
        return -worse.view_as(ref_loss).float()
    if select == "loss":
        return student_loss
    if select == "random":
        return torch.rand(student_loss.shape, generator=generator, device=student_loss.device)
    if select == "all":
        return torch.zeros_like(student_loss)
    if select == "oracle":
        return truth.float()
    raise ValueError(f"--select {select}: no such rule in score_tokens")


def select_tokens(score, ratio=None, threshold=None, valid=None):
    """Which tokens to train on, bool (B, T): the k highest scores, or all above a threshold.

    k = round(ratio * number of valid tokens), over the whole of `score` (equation 4). valid (B, T)
    is False where there is nothing to learn: never selected, and not counted into k. A score of
    -inf is never selected either. ValueError if a score is NaN, or not one of ratio and threshold.
    """
    if (ratio is None) == (threshold is None):
        raise ValueError("select_tokens takes a ratio or a threshold, one of them")
    if score.isnan().any():
        raise ValueError("a score is NaN: the rule divides by zero, or a loss is not finite")
    if valid is None:
        valid = torch.ones_like(score, dtype=torch.bool)
    score = score.masked_fill(~valid, -torch.inf)  # (B, T)
    if threshold is not None:
        return score > threshold
    k = round(ratio * int(valid.sum()))
    best = score.flatten().topk(k, sorted=False).indices  # (k,)
    mask = torch.zeros_like(valid).flatten()  # (B * T)
    mask[best] = True
    return mask.view(score.shape) & (score > -torch.inf)  # (B, T)


def selective_loss(student_loss, mask):
    """L_SLM (equation 3): the mean of the student's own loss over the selected tokens.

    mask (B, T): bool, or weights of any size. 0, with gradient 0, where nothing is selected.
    """
    selected = mask.sum()
    # The numerator is 0 where nothing is selected: any positive denominator does then.
    return (student_loss * mask).sum() / selected.clamp(min=1e-9)


# ==== data ========================================================================================


class Windows:
    """A token file cut into fixed windows: window w predicts tokens w * T + 1 ... w * T + T.

    So every token is a target once per epoch, always in the same context, and one reference loss
    belongs to it. Attention crosses the borders of documents inside a window, as in the paper's
    packing. Indexed with B window numbers it gives inputs and targets, both (B, T) int64.
    """

    def __init__(self, cfg, meta, split):
        self.path = Path(cfg.data) / f"{split}.bin"
        self.T = cfg.block_size
        if split not in meta["tokens"]:
            raise InputError(f"{self.path} is not there. Run: python prepare_data.py -h")
        n_tokens = meta["tokens"][split]
        self.n = (n_tokens - 1) // self.T
        if self.n < 1:
            raise InputError(
                f"{self.path}: {n_tokens} tokens are not one window (--block_size {self.T})"
            )
        self.tokens = np.memmap(self.path, dtype=meta["dtype"], mode="r")
        # Beside text for fine-tuning: which tokens are an answer's. Elsewhere all count.
        self.answers = None
        mask_path = Path(cfg.data) / f"{split}_mask.bin"
        if mask_path.exists():
            self.answers = np.memmap(mask_path, dtype=np.uint8, mode="r")

    def positions(self, w):
        first = np.asarray(w)[:, None] * self.T
        return first + np.arange(self.T + 1)  # (B, T + 1)

    def __getitem__(self, w):
        tokens = torch.from_numpy(self.tokens[self.positions(w)].astype(np.int64))
        return tokens[:, :-1], tokens[:, 1:]  # (B, T), (B, T)

    def valid(self, w):
        """Which targets may be trained on, bool (B, T)."""
        if self.answers is None:
            return torch.ones(len(w), self.T, dtype=torch.bool)
        answers = torch.from_numpy(self.answers[self.positions(w)].astype(bool))
        return answers[:, 1:]


@lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


def batch(n, size, seed, step):
    """Window numbers (size,) of a step, out of n windows.

    A pure function: all arms see the same windows in the same order, and a resumed run repeats
    none. Each epoch visits every window once, in an order of its own.
    """
    windows = []
    for place in range(step * size, (step + 1) * size):
        epoch = place // n
        windows.append(permutation(n, seed, epoch)[place % n])
    return np.array(windows)


# ==== device, precision, ranks ====================================================================


class Run:
    """Where this process runs: on which device, in which precision, as which rank of how many."""

    def __init__(self, cfg):
        self.data = cfg.data
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device(cfg.device)
        self.cuda = self.device.type == "cuda"
        self.stop_signal = 0
        if self.cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            torch.set_float32_matmul_precision("high")  # TF32
        bf16 = self.cuda and torch.cuda.is_bf16_supported()
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.precision = torch.autocast(self.device.type, self.dtype, enabled=bf16)
        if self.world > 1 and not dist.is_initialized():
            # Long, since all ranks wait while rank 0 answers questions.
            backend = "nccl" if self.cuda else "gloo"
            dist.init_process_group(backend, timeout=timedelta(hours=3))

    @cached_property
    def meta(self):
        return load_meta(self.data)

    def put(self, tensor):
        """The tensor on the device. From pinned memory the copy runs while the device works."""
        if self.cuda:
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def sum(self, tensor):
        """Sum over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)

    def any(self, wish):
        """Whether any rank wishes so: all ranks must stop, or save, at the same step."""
        if self.world == 1:
            return wish
        wishes = torch.tensor(float(wish), device=self.device)
        dist.all_reduce(wishes)
        return wishes.item() > 0

    def wait(self):
        """Until all ranks are here."""
        if self.world > 1:
            dist.barrier()

    def say(self, message):
        if self.rank == 0:
            tqdm.write(message)

    def bar(self, steps, name, tokens):
        # None: hidden where there is no terminal.
        hidden = True if self.rank > 0 else None
        return tqdm(steps, name, unit="tok", unit_scale=tokens, disable=hidden, leave=False)

    def request_stop(self, number, frame):
        """Ctrl-C or SIGTERM in training: it saves after its step. A second one ends it at once."""
        if self.stop_signal:
            raise_interrupt(number, frame)
        self.stop_signal = number
        self.say("stopping after this step (again: at once, back to the last checkpoint)")


# ==== the reference's scores ======================================================================


def open_model(path, cfg, run):
    """The model of a checkpoint or Hugging Face folder. InputError if it does not fit the data."""
    stage = path.stem if path.stem in STAGES else f"ref --name {path.stem}"
    remedy = f"Run: {command(replace(cfg, out=str(path.parent)), stage)}"
    if not path.exists():
        raise InputError(f"{path} not found. {remedy}")
    model, checkpoint = load_model(path)
    spec = run.meta["tokenizer"]
    theirs = checkpoint.get("tokenizer")
    if theirs is None:
        # A folder without a tokenizer.json: at least the number of tokens must be the data's.
        fits = spec["n_vocab"] == model.config.vocab_size
    else:
        # Of a tokenizer.json the content counts, not where it lies.
        fits = theirs.get("sha256", theirs) == spec.get("sha256", spec)
    if not fits:
        raise InputError(f"{path} has another tokenizer than {cfg.data}. {remedy}")
    if cfg.block_size > model.config.block_size:
        longest = model.config.block_size
        raise InputError(f"--block_size {cfg.block_size}: {path} takes at most {longest}")
    if "step" in checkpoint and checkpoint["step"] < checkpoint["steps"]:
        raise InputError(f"{path} is not trained to its end. {remedy} (it resumes)")
    return model.to(run.device)


@torch.no_grad()
def score_batch(run, model, pair, entropy=False):
    """Loss of each target in nats and, if asked for, entropy of its prediction: [(B, T), ...]"""
    x, y = [run.put(tensor) for tensor in pair]  # (B, T)
    with run.precision:
        hidden = model(x).to(run.dtype)  # (B, T, C)
        loss, _ = all_losses(hidden, model.lm_head.weight, y, keep=False)  # (B, T)
        if not entropy:
            return [loss]
        entropies = []
        for row in hidden:  # one window at a time: its logits are large
            probabilities = model.head(row).float().softmax(-1)  # (T, V)
            entropies.append(torch.special.entr(probabilities).sum(-1))  # (T,)
    return [loss, torch.stack(entropies)]


def weights_hash(model):
    digest = sha256(repr(model.config).encode())
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_scores(path):
    """InputError if a finished score file is not what it was when it was written."""
    known = Path(f"{path}.sha256")
    if known.exists() and known.read_text() != file_digest(path):
        raise InputError(f"{path} is damaged. Delete {path.parent}; the same command scores again")


def open_scores(path, windows):
    """The score file as an array (windows, T), made first if need be; NaN: not scored yet."""
    if not path.exists():
        Path(f"{path}.sha256").unlink(missing_ok=True)
        empty = np.full(windows.T, np.nan, np.float16).tobytes()
        with whole_file(path) as f:
            for _ in range(windows.n):
                f.write(empty)
    # A shorter file would be extended with zeros, which look like scores.
    size = path.stat().st_size
    if size != windows.n * windows.T * 2:
        remedy = f"Delete {path.parent}; the same command scores again"
        raise InputError(f"{path} has {size} bytes, not {windows.n * windows.T * 2}. {remedy}")
    if size < 2**30:  # larger ones: --stage check
        check_scores(path)
    return np.memmap(path, np.float16, "r+", shape=(windows.n, windows.T))


def visited_windows(cfg, windows):
    """The windows that a run of --tokens sees, each once, in order."""
    first_epoch = permutation(windows.n, cfg.seed, 0)
    return np.sort(first_epoch[: cfg.steps * cfg.batch_size])


def score_corpus(cfg, run, windows):
    """The reference's scores of a corpus' targets: {"ref_loss": float16 (windows, T), ...} on disk.

    Only windows that a run of --tokens will visit are scored; a run that was interrupted, or asks
    for more, continues. Ranks share the work, for the same bytes.
    """
    names = ["ref_loss"]
    if "ref_entropy" in NEEDS.get(cfg.select, []):
        names.append("ref_entropy")
    path = Path(cfg.reference or Path(cfg.out, "ref.pt"))
    reference = open_model(path, cfg, run).eval()
    # The folder's name covers all that the scores depend on, so a stale score is never used.
    basis = [run.meta["files"][windows.path.name], cfg.block_size, str(run.dtype)]
    fingerprint = sha256(f"{basis} {weights_hash(reference)}".encode()).hexdigest()[:16]
    folder = Path(cfg.out) / "scores" / fingerprint
    paths = [folder / f"{name}.f16" for name in names]
    with only_writer(folder, run, wait=True):
        if run.rank == 0:
            for file in paths:
                open_scores(file, windows)
        run.wait()
        scores = {name: open_scores(f, windows) for name, f in zip(names, paths, strict=True)}
        # Every rank takes its share first and only then drops what is done: ranks that look at
        # different times must still agree on who scores what.
        parts = torch.tensor(visited_windows(cfg, windows)).split(cfg.micro_batch)
        mine = parts[run.rank :: run.world]
        run.wait()
        todo = [w for w in mine if any(np.isnan(s[w, -1]).any() for s in scores.values())]
        if todo:
            run.say(f"score: {len(todo)} batches by {path} -> {folder}")
            for file in paths:
                Path(f"{file}.sha256").unlink(missing_ok=True)
        for w in run.bar(todo, "score", cfg.micro_batch * windows.T):
            found = score_batch(run, reference, windows[w], len(names) > 1)
            for stored, values in zip(scores.values(), found, strict=True):
                check_finite(values, f"{path}: its score", f"windows {w.tolist()}")
                stored[w] = values.cpu().numpy()
        run.wait()
        if run.rank == 0:
            for file in paths:
                seal_scores(file, scores)
    return scores


def seal_scores(path, scores):
    """Write the file's sha256 beside it, if it is not there."""
    seal = Path(f"{path}.sha256")
    if not seal.exists():
        scores[path.stem].flush()
        with whole_file(seal) as f:
            f.write(file_digest(path).encode())


# ==== optimizer and schedule ======================================================================


def make_optimizers(cfg, model):
    """Muon for the matrices inside the blocks and AdamW for the rest, or AdamW for everything."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and name.startswith("layers"):
            matrices.append(parameter)
        else:
            rest.append(parameter)
    adamw = {"lr": cfg.lr, "betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}
    if cfg.optimizer == "adamw":
        decayed = {"params": matrices, "weight_decay": cfg.weight_decay}
        return [torch.optim.AdamW([decayed, {"params": rest}], **adamw)]
    # match_rms_adamw: steps of the size that AdamW makes, so that one learning rate serves both.
    muon = {"lr": cfg.lr, "weight_decay": cfg.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
    return [torch.optim.Muon(matrices, **muon), torch.optim.AdamW(rest, **adamw)]


def learning_rate(cfg, step, steps):
    """Linear warm-up, then half a cosine down to lr * lr_end."""
    warmup_steps = max(1, round(cfg.warmup * steps))
    if step < warmup_steps:
        return cfg.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    cosine = 0.5 + 0.5 * math.cos(math.pi * progress)  # from 1 to 0
    return cfg.lr * (cfg.lr_end + (1 - cfg.lr_end) * cosine)


def take_step(cfg, run, model, optimizers, step, weight):
    """One optimizer step on gradients of a sum over `weight` tokens; returns the norm."""
    # Only here is the number of selected tokens of the whole batch known. Dividing each
    # micro-batch by its own number would give a mean of means. DDP averages over the ranks, where
    # a sum is needed: hence run.world.
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    torch._foreach_mul_(gradients, run.world / weight)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
    check_finite(norm, f"--lr {cfg.lr}: the gradient's norm", f"step {step}")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step, cfg.steps)
        optimizer.step()
    return norm.item()


# ==== training ====================================================================================


def first_model(cfg, run):
    """The model that a run starts from: --init, or new weights of the seed."""
    shape = {f.name: getattr(cfg, f.name) for f in fields(GPTConfig) if hasattr(cfg, f.name)}
    if cfg.init:
        model = open_model(Path(cfg.init), cfg, run)
        shape.pop("block_size")  # there the longest possible, here the window's length
        for key, wish in shape.items():
            if wish not in (getattr(Config, key), getattr(model.config, key)):
                raise InputError(f"--{key} {wish}: the model of --init has a shape of its own")
        if Path(cfg.init).is_dir() and cfg.lr > 4e-4:
            run.say(f"--lr {cfg.lr} is for small models from scratch: the paper takes 8e-5 for 1 B")
    else:
        n_vocab = run.meta["tokenizer"]["n_vocab"]
        model = GPT(GPTConfig(vocab_size=n_vocab, **shape)).to(run.device)
    model.recompute = cfg.recompute
    return model.train()


def known_scores(cfg, run, windows):
    """What the rule needs to know of each target: {name: array (windows, T)}, by NEEDS."""
    needs = NEEDS[cfg.select]
    if "truth" in needs:
        path = Path(cfg.data) / "kinds.npz"
        if not path.exists():
            raise InputError(f"--select oracle: {cfg.data} is no demo, so the truth is not known")
        kinds = np.load(path)[windows.path.stem][1 : windows.n * windows.T + 1]
        return {"truth": (kinds == 0).reshape(windows.n, windows.T)}  # 0: target text
    if needs:
        return score_corpus(cfg, run, windows)
    return {}


def train(cfg, run, name, split):
    """Train one run to its end, resuming where it stopped; returns the records of its log."""
    # The text, and what the rule needs to know of it.
    windows = Windows(cfg, run.meta, split)
    scores = known_scores(cfg, run, windows)

    # The model: all runs of a seed start from the same weights.
    torch.manual_seed(cfg.seed)
    model = first_model(cfg, run)
    optimizers = make_optimizers(cfg, model)

    # A run of this name may be there: finished, half done, or another run.
    path = Path(cfg.out, f"{name}.pt")
    identity = run_identity(cfg, run, model, windows, scores)
    saved = saved_run(path, identity, cfg)
    if saved:
        first_step, records, sums = restore(saved, model, optimizers)
    else:
        first_step, records, sums = 0, [header(cfg, run, name, model, identity)], new_sums()
    announce(run, path, windows, records, first_step, cfg.steps)

    trunk = model
    if run.world > 1:
        trunk = DistributedDataParallel(model)
    if cfg.compile or (cfg.compile is None and run.cuda):
        trunk = torch.compile(trunk)
    generator = torch.Generator(run.device)
    evaluations = {round(cfg.steps * (i + 1) / cfg.evals) for i in range(cfg.evals)}
    step_tokens = cfg.batch_size * cfg.block_size
    last_save = time.time()

    for step in run.bar(range(first_step, cfg.steps), name, step_tokens):
        started = time.time()
        mine = batch(windows.n, cfg.batch_size, cfg.seed, step)[run.rank :: run.world]
        # Over the step: loss of the selected tokens, loss of all tokens, weight of the selected
        # tokens (1 each, unless the mask is soft), their number.
        step_sums = torch.zeros(4, device=run.device)

        for first in range(0, len(mine), cfg.micro_batch):
            w = mine[first : first + cfg.micro_batch]
            x, y, valid, known = fetch(run, windows, scores, w)  # (B, T) each
            generator.manual_seed(hash((cfg.seed, step, first, run.rank)) % 2**62)
            is_last = first + cfg.micro_batch >= len(mine)

            with nullcontext() if is_last or run.world == 1 else trunk.no_sync():
                with run.precision:
                    hidden = trunk(x).to(run.dtype)  # (B, T, C)

                # 1. The student's loss on every token. (Fast: without gradient.)
                if cfg.fast:
                    student_loss, kept = all_losses(hidden, model.lm_head.weight, y)  # (B, T)
                else:
                    student_loss = token_loss(model.head(hidden), y)  # (B, T)
                check_finite(
                    student_loss, f"{name}: the loss", f"step {step}, windows {w.tolist()}"
                )
                # 2. What each token is worth.
                score = score_tokens(cfg.select, student_loss, **known, generator=generator)
                # 3. The tokens to train on.
                mask = select_tokens(score, cfg.ratio, cfg.threshold, valid)  # (B, T)
                # 4. The loss on those alone: a sum, which `take_step` divides by their number.
                if cfg.fast:
                    loss = selected_loss(hidden, model.lm_head.weight, y, mask, kept)
                else:
                    loss = selective_loss(student_loss, mask) * mask.sum()
                loss.backward()

            parts = [loss.detach(), student_loss.detach().sum(), mask.sum(), (mask != 0).sum()]
            step_sums += torch.stack([part.float() for part in parts])

        # With nothing selected there is nothing to learn, but momentum and weight decay would
        # move the weights all the same: no step.
        run.sum(step_sums)
        weight = step_sums[2].item()
        if weight > 0:
            sums["grad_norm"] = take_step(cfg, run, model, optimizers, step, weight)
        model.zero_grad()
        add_step(sums, step_sums.tolist(), time.time() - started)

        save_now = run.any(time.time() > last_save + 60 * cfg.save_minutes)
        stop = run.any(run.stop_signal > 0)

        if step + 1 in evaluations:
            record = training_record(cfg, step + 1, sums, records[-1])
            if run.rank == 0:
                evaluation, losses = evaluate(cfg, run, model)
                record = {**record, **evaluation}
                save_losses(path, step + 1, losses)
            records.append(record)
            report(run, cfg, name, records)
            sums = new_sums(sums["trained"], sums["seconds"])
            save_now = True
        if stop or save_now:
            if run.rank == 0:
                save_run(path, run, model, optimizers, identity, step + 1, cfg.steps, records, sums)
            last_save = time.time()
        if stop:
            raise Interrupted(run.stop_signal or signal.SIGTERM)
    return records


def fetch(run, windows, scores, w):
    """Windows w on the device, (B, T) each: inputs, targets, which may be trained on, scores."""
    x, y = windows[w]
    known = {}
    for name, values in scores.items():
        known[name] = run.put(torch.from_numpy(values[w]).float())
    return run.put(x), run.put(y), run.put(windows.valid(w)), known


def new_sums(trained=0, seconds=0.0):
    """What adds up from one evaluation to the next; the two arguments over the whole run."""
    return {
        "selected_loss": 0.0,
        "student_loss": 0.0,
        "weight": 0.0,
        "empty_steps": 0,
        "grad_norm": 0.0,
        "trained": trained,
        "seconds": seconds,
    }


def add_step(sums, step_sums, seconds):
    selected_loss_sum, student_loss_sum, weight, n_selected = step_sums
    sums["selected_loss"] += selected_loss_sum
    sums["student_loss"] += student_loss_sum
    sums["weight"] += weight
    sums["trained"] += round(n_selected)
    sums["seconds"] += seconds
    if weight == 0:
        sums["empty_steps"] += 1


def training_record(cfg, step, sums, before):
    """What training says of itself since the record `before`. Means are over its own tokens."""
    step_tokens = cfg.batch_size * cfg.block_size
    tokens_between = (step - before["step"]) * step_tokens
    return {
        "step": step,
        "tokens": step * step_tokens,
        "lr": learning_rate(cfg, step - 1, cfg.steps),
        "trained": sums["trained"],
        "grad_norm": sums["grad_norm"],
        "seconds": round(sums["seconds"], 2),
        "student_loss": sums["student_loss"] / tokens_between,
        "selected_loss": sums["selected_loss"] / max(sums["weight"], 1e-9),
        "empty_steps": sums["empty_steps"],
    }


# ---- evaluation ----------------------------------------------------------------------------------


def corpus_losses(cfg, run, model, split):
    """The loss of each token of the first --eval_windows windows of a split (windows, T), nats."""
    windows = Windows(cfg, run.meta, split)
    chosen = torch.arange(min(cfg.eval_windows, windows.n))
    parts = []
    for w in chosen.split(cfg.micro_batch):
        parts.append(score_batch(run, model, windows[w])[0])
    return torch.cat(parts)


def evaluate(cfg, run, model):
    """What runs are compared on: held-out losses over all tokens, in nats, and right answers.

    Returns the record, and the losses of held-out corpus tokens (windows, T) in float16.
    """
    started = time.time()
    model.eval()
    target = corpus_losses(cfg, run, model, "val")
    corpus = corpus_losses(cfg, run, model, "val_corpus")
    record = {"val_loss": target.mean().item(), "val_corpus_loss": corpus.mean().item()}
    path = Path(cfg.data, "questions.jsonl")
    if cfg.questions and path.exists():
        questions = load_questions(path, cfg.questions)
        encoding = get_tokenizer(run.meta["tokenizer"])
        rows = 2**16 // cfg.block_size
        shown = sys.stderr.isatty()
        answers = answer_questions(model, encoding, questions, batch_size=rows, progress=shown)
        record["right"] = sum(answer["correct"] for answer in answers)
        record["questions"] = len(answers)
    record["eval_seconds"] = round(time.time() - started, 2)
    model.train()
    return record, corpus.half().cpu().numpy()


def took(records):
    """Seconds of a run so far: training and evaluating."""
    return records[-1]["seconds"] + sum(r["eval_seconds"] for r in records[1:])


def report(run, cfg, name, records):
    """One line of the last evaluation on the screen, and a warning if nothing was selected."""
    if run.rank > 0:
        return
    last = records[-1]
    line = [f"{name:>11}", f"{last['tokens']:>9,} tokens", f"target loss {last['val_loss']:.3f}"]
    line.append(f"corpus loss {last['val_corpus_loss']:.3f}")
    if "right" in last:
        line.append(f"{last['right']:>3} of {last['questions']} right")
    run.say("  ".join([*line, f"{took(records):.0f} s"]))
    if last["empty_steps"]:
        rule = f"--threshold {cfg.threshold}"
        if cfg.threshold is None:
            rule = f"--ratio {cfg.ratio}"
        run.say(f"{name}: {last['empty_steps']} steps selected no token, so made no step ({rule})")


# ---- what makes two runs the same, and resuming --------------------------------------------------


def code_hash():
    """Of what rho.py and model.py do: of their syntax trees, so that a comment may change."""
    digest = sha256()
    for file in (__file__, inspect.getsourcefile(GPT)):
        digest.update(ast.dump(ast.parse(Path(file).read_text())).encode())
    return digest.hexdigest()[:16]


def scores_hash(cfg, windows, scores):
    """Of the numbers that the rule is given, wherever they came from: of a thousand windows."""
    visited = visited_windows(cfg, windows)
    sample = visited[:: max(1, len(visited) // 1000)]
    digest = sha256()
    for values in scores.values():
        digest.update(np.ascontiguousarray(values[sample]).tobytes())
    return digest.hexdigest()[:16]


def run_identity(cfg, run, model, windows, scores):
    """All that decides what a run computes. If any of it differs, it is another run."""
    settings = {k: v for k, v in asdict(cfg).items() if k not in NOT_IDENTITY}
    return {
        **settings,
        "processes": run.world,
        "first weights": weights_hash(model)[:16],
        "scores of the reference": scores_hash(cfg, windows, scores),
        "code of rho.py or model.py": code_hash(),
        **run.meta["files"],
    }


def saved_run(path, identity, cfg):
    """The checkpoint to resume, None if there is none. InputError if it is of another run."""
    if cfg.restart or not path.exists():
        return None
    saved = load_checkpoint(path)
    theirs = saved.get("identity", {})
    differing = []
    for key in [*identity, *(key for key in theirs if key not in identity)]:
        if theirs.get(key) != identity.get(key):
            is_flag = hasattr(cfg, key)
            differing.append(f"--{key} was {theirs.get(key)}" if is_flag else key)
    if differing:
        shown = ", ".join(differing[:3])
        raise InputError(
            f"{path} is another run ({shown}). Give this one a --name, or --restart to replace it"
        )
    return saved


def restore(saved, model, optimizers):
    """Put a checkpoint's state back; returns the step to begin with, its records and sums."""
    model.load_state_dict(saved["model"])
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    return saved["step"], saved["records"], saved["sums"]


def header(cfg, run, name, model, identity):
    """The first record of a log: what was run, with what, and where."""
    commit = subprocess.getoutput(f"git -C '{Path(__file__).parent}' describe --always --dirty")
    return {
        "run": name,
        "config": asdict(cfg),
        "model": asdict(model.config),
        "params": model.num_params(),
        "commit": commit,
        "code": identity["code of rho.py or model.py"],
        "torch": str(torch.__version__),
        "device": str(run.device),
        "threads": torch.get_num_threads(),
        "world": run.world,
        "step": 0,
    }


def announce(run, path, windows, records, first_step, steps):
    """Say what begins: sizes, device, files; or that there is nothing left to do."""
    first = records[0]
    if first_step == steps:
        run.say(f"{path}: finished already, by the same code with the same flags and data")
        return
    size = f"{first['params'] / 1e6:.2f} M parameters on {first['device']}"
    length = f"{steps} steps over {windows.path}"
    begins = f"resumes at step {first_step}" if first_step else "starts"
    run.say(f"{first['run']}: {size}, {length} -> {path}; {begins}")


def save_losses(path, step, losses):
    folder = path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / f"{step}.npy") as f:
        np.save(f, losses)


def save_run(path, run, model, optimizers, identity, step, steps, records, sums):
    """Write the checkpoint and the log, each whole or not at all."""
    state = {
        "model": model.state_dict(),
        "model_config": asdict(model.config),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "identity": identity,
        "tokenizer": run.meta["tokenizer"],
        "step": step,
        "steps": steps,
        "records": records,
        "sums": sums,
    }
    for parameter in model.parameters():
        check_finite(parameter.detach(), f"{path}: a weight", f"step {step}")
    with whole_file(path) as f:
        torch.save(state, f)
    with whole_file(path.with_suffix(".jsonl")) as f:
        for record in records:
            f.write(f"{json.dumps(record)}\n".encode())


# ==== safety: one writer, signals, damage ========================================================


class Interrupted(KeyboardInterrupt):
    """Ended by a signal, whose number it carries."""


def raise_interrupt(number, frame):
    raise Interrupted(number)


@contextmanager
def catch_signals(handler):
    """Ctrl-C and SIGTERM call `handler` while this lasts."""
    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def only_writer(path, run, wait=False):
    """Hold PATH.lock. A second run of one name is refused; with `wait` it waits for its turn."""
    if run.rank > 0 or fcntl is None:
        yield
        return
    lock_path = Path(f"{path}.lock")
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    lock = take_lock(lock_path, wait)
    try:
        yield
    finally:
        lock_path.unlink(missing_ok=True)
        os.close(lock)


def take_lock(path, wait):
    """The file `path`, open and locked. The system drops the lock however the process ends."""
    how = fcntl.LOCK_EX
    if not wait:
        how |= fcntl.LOCK_NB
    while True:
        lock = os.open(path, os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(lock, how)
        except BlockingIOError as error:
            os.close(lock)
            run = path.with_suffix("")
            raise InputError(f"{run} is being written by another run: give a --name") from error
        # The last holder may have deleted the file in between: then this locks nothing.
        if path.exists() and path.stat().st_ino == os.fstat(lock).st_ino:
            return lock
        os.close(lock)


def check_finite(values, what, where):
    """InputError if a loss, score or norm is NaN or infinite: nothing after it means anything."""
    if not torch.isfinite(values).all():
        raise InputError(f"{what} is not finite at {where}. The checkpoint before it is kept")


def command(cfg, stage, **flags):
    """A command line for messages: what to run to get what is missing."""
    places = {"data": cfg.data, "out": cfg.out, **flags}
    defaults = {"data": Config.data, "out": Config.out}
    shown = [f" --{k} {v}" for k, v in places.items() if v != defaults.get(k)]
    return f"python rho.py --stage {stage}" + "".join(shown)


# ==== logs and the table ==========================================================================


def read_log(path):
    """The records of a log: the first says what was run, the others what came of it."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def read_runs(folder):
    """{run: records} of every run in a folder that was evaluated at least once, CLM's first."""
    runs = {}
    for path in sorted(Path(folder).glob("*.jsonl")):
        records = read_log(path)
        if len(records) > 1 and "config" in records[0]:
            runs[path.stem] = records
    usual = [run for run in ("ref", "clm", "slm-random", "slm", "slm-oracle") if run in runs]
    return {run: runs[run] for run in [*usual, *(r for r in runs if r not in usual)]}


def value(record, key):
    """A figure of a record; "right" in percent of the questions asked."""
    if key == "right":
        return 100 * record["right"] / record["questions"]
    return record[key]


def tokens_to_reach(records, goal, key):
    """Tokens seen at the first evaluation from which on every later one is at the goal or past it.

    None if the run does not end there. One lucky evaluation of an untrained model counts nothing.
    """
    reached = None
    for record in reversed(records[1:]):
        better = value(record, key) - value(goal, key)
        if key != "right":
            better = -better
        if better < 0:
            break
        reached = record["tokens"]
    return reached


def unlike(records, clm):
    """What keeps a run from being compared with CLM: settings that differ, or a missing end."""
    mine, theirs = records[0]["config"], clm[0]["config"]
    chosen = {"select", "ratio", "threshold", "fast"}  # these are what a comparison is about
    reasons = []
    for key in theirs:
        ignored = key in chosen or (key in NOT_IDENTITY and key != "data")
        if not ignored and mine.get(key) != theirs[key]:
            reasons.append(f"{key} {mine.get(key)}, not {theirs[key]}")
    step_tokens = mine["batch_size"] * mine["block_size"]
    if records[-1]["step"] < max(1, mine["tokens"] // step_tokens):
        reasons.append("unfinished")
    return reasons


def table_rows(runs):
    """The table of one folder's runs, its head first; every cell a text."""
    rows = [["run", "tokens seen", "trained on", "target loss", "corpus loss", "right", "seconds"]]
    for run, records in runs.items():
        last = records[-1]
        answers = f"{last['right']} of {last['questions']}" if "right" in last else "-"
        comparable = run == "ref" or "clm" not in runs or not unlike(records, runs["clm"])
        rows.append(
            [
                run if comparable else f"{run} *",
                f"{last['tokens']:,}",
                f"{last['trained']:,}",
                f"{last['val_loss']:.3f}",
                f"{last['val_corpus_loss']:.3f}",
                answers,
                f"{took(records):.0f}",
            ]
        )
    return rows


def table_notes(runs):
    """Below the table, in words: how soon each run is where CLM ends, and what is no comparison."""
    if "clm" not in runs:
        return ["no clm run here to compare with"]
    notes = []
    clm = runs["clm"]
    names = {"right": "accuracy", "val_loss": "target loss"}
    for run, records in runs.items():
        if run in ("ref", "clm"):
            continue
        reasons = unlike(records, clm)
        if reasons:
            notes.append(f"* {run} is not comparable with clm: {'; '.join(reasons)}")
            continue
        for key in names:
            # A share of 0 right is reached by any run.
            if key not in records[-1] or not clm[-1].get(key):
                continue
            tokens = tokens_to_reach(records, clm[-1], key)
            if tokens is None:
                notes.append(f"{run} does not reach clm's final {names[key]}")
            else:
                times = f"{tokens:,} tokens: {clm[-1]['tokens'] / tokens:.1f} times fewer"
                notes.append(f"{run} is at clm's final {names[key]} after {times}")
    return notes


def show_table(folder):
    runs = read_runs(folder)
    if not runs:
        raise InputError(f"{folder} holds no runs. Run: python rho.py --out {folder}")
    rows = table_rows(runs)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print()
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    print()
    print("\n".join(table_notes(runs)))


# ==== stages ======================================================================================


def arm_config(cfg, stage):
    """The configuration that a stage really runs, and that its log therefore states."""
    select = cfg.select or STAGE_RULES[stage]
    ratio, threshold = cfg.ratio, cfg.threshold
    if threshold is not None:
        ratio = None
    if select == "all":
        ratio, threshold = 1.0, None
    if select == "oracle":
        ratio, threshold = None, 0.5  # truth is 0 or 1
    name = cfg.name
    if not name:
        name = stage if select == STAGE_RULES[stage] else f"{stage}-{select}"
    tokens = {"ref": cfg.ref_tokens, "sft": cfg.sft_tokens}.get(stage, cfg.tokens)
    reference = cfg.reference
    if "ref_loss" in NEEDS[select] or "ref_entropy" in NEEDS[select]:
        reference = reference or f"{cfg.out}/ref.pt"
    return replace(
        cfg,
        stage=stage,
        name=name,
        select=select,
        ratio=ratio,
        threshold=threshold,
        tokens=tokens,
        reference=reference,
    )


def train_arm(cfg, run, stage):
    """Train what a stage stands for; returns the records of its log."""
    cfg = arm_config(cfg, stage)
    split = {"ref": "ref", "sft": "sft"}.get(stage, "train")
    path = Path(cfg.out, f"{cfg.name}.pt")
    with only_writer(path, run), catch_signals(run.request_stop):
        return train(cfg, run, cfg.name, split)


def train_dynamics(cfg, run):
    """Train a finished CLM model further, with and without selection, as the paper goes on from
    TinyLlama; results/tables.py sorts the tokens by how their losses move (section 2.1)."""
    start = cfg.init or f"{cfg.out}/clm.pt"
    cfg = replace(cfg, init=start, seed=cfg.seed + 1, evals=max(16, cfg.evals))
    for stage in ("clm", "slm"):
        train_arm(replace(cfg, name=f"dynamics-{stage}"), run, stage)


def check_stage(cfg, run):
    """Read every file of the data and of the runs, and compare it with its checksum."""
    check_files(cfg.data, run.meta)
    scores = sorted(Path(cfg.out).glob("scores/*/*.f16"))
    for path in scores:
        check_scores(path)
    checkpoints = sorted(Path(cfg.out).glob("*.pt"))
    for path in checkpoints:
        load_checkpoint(path)
    files = f"{len(run.meta['files'])} files of {cfg.data}"
    run.say(f"whole: {files}, {len(scores)} score files, {len(checkpoints)} checkpoints")


def check_config(cfg, world):
    """InputError for a value out of its range, or flags that do not go together."""
    for f in fields(cfg):
        given = getattr(cfg, f.name)
        limits = f.metadata
        if given is None or isinstance(given, (str, bool)):
            continue
        if limits["least"] is not None and not given >= limits["least"]:
            raise InputError(f"--{f.name} {given}: must be at least {limits['least']}")
        if limits["above"] is not None and not given > limits["above"]:
            raise InputError(f"--{f.name} {given}: must be above {limits['above']}")
        if limits["most"] is not None and not given <= limits["most"]:
            raise InputError(f"--{f.name} {given}: must be at most {limits['most']}")
        if not math.isfinite(given):
            raise InputError(f"--{f.name} {given}: must be a finite number")
    if Path(cfg.name).name != cfg.name:
        raise InputError(f"--name {cfg.name}: a name, without folders (those are --out's)")
    if cfg.stage == "all" and (cfg.name or cfg.select or cfg.threshold is not None):
        raise InputError("--name, --select and --threshold are of one run: --stage slm")
    if cfg.stage in ("ref", "clm") and cfg.select:
        raise InputError(f"--select: --stage {cfg.stage} trains on every token. Use --stage slm")
    if cfg.stage == "sft" and not cfg.init:
        raise InputError("--stage sft goes on from a checkpoint: --init out/demo/slm.pt")
    if cfg.batch_size % world:
        raise InputError(f"--batch_size {cfg.batch_size}: not a multiple of {world} processes")
    held = min(cfg.micro_batch, cfg.batch_size // world) * cfg.block_size
    if round(cfg.ratio * held) < 1:
        raise InputError(f"--ratio {cfg.ratio}: of {held} tokens in a micro-batch it selects none")


def run_stage(cfg):
    """Do what --stage says."""
    if cfg.stage == "table":
        show_table(cfg.out)
        return
    check_config(cfg, int(os.environ.get("WORLD_SIZE", 1)))
    run = Run(cfg)
    if run.rank == 0 and cfg.data == Config.data and not Path(cfg.data, "meta.json").exists():
        run.say(f"making the demo's text in {cfg.data}")
        prepare_demo(cfg.data)
    run.wait()
    if cfg.stage == "all":
        for stage, select in (("ref", ""), ("clm", ""), ("slm", "random"), ("slm", "")):
            train_arm(replace(cfg, select=select), run, stage)
        if run.rank == 0:
            show_table(cfg.out)
    elif cfg.stage == "score":
        score_corpus(cfg, run, Windows(cfg, run.meta, "train"))
    elif cfg.stage == "dynamics":
        train_dynamics(cfg, run)
    elif cfg.stage == "check":
        check_stage(cfg, run)
    else:
        train_arm(cfg, run, cfg.stage)
    next_stage = {"ref": "slm", "score": "slm", "clm": "slm", "slm": "table", "sft": "table"}
    if cfg.stage in next_stage:
        run.say(f"next: {command(cfg, next_stage[cfg.stage])}")
    run.wait()  # for rank 0: one that leaves while gloo still holds its last tensor aborts
    if run.world > 1:
        dist.destroy_process_group()


def whole_number(text):
    """An int from "900000", "900_000" or "9e5"."""
    number = float(text)
    if number != int(number):
        raise ValueError
    return int(text) if text.strip("+-").replace("_", "").isdigit() else int(number)


def true_or_false(text):
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


def parse(argv):
    """The command line as a Config; every flag is one of its fields."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"rho.py: {message}. See python rho.py -h\n")
    kinds = {str: str, int: whole_number, float: float, float | None: float}
    kinds = {**kinds, bool: true_or_false, bool | None: true_or_false}
    for f in fields(Config):
        kind = kinds[f.type]
        how = {"type": kind, "default": f.default, "choices": f.metadata["choices"]}
        how["help"] = f"{f.metadata['help']} [{f.default}]".replace("%", "%%")
        if kind is true_or_false:
            how = {**how, "nargs": "?", "const": True, "metavar": "true|false"}
        parser.add_argument(f"--{f.name}", **how)
    return Config(**vars(parser.parse_args(argv)))


def main(argv=None):
    cfg = parse(argv)
    signal.signal(signal.SIGTERM, raise_interrupt)
    try:
        run_stage(cfg)
        return
    except InputError as error:
        message, status = str(error), 2
    except KeyboardInterrupt as stop:
        number = stop.args[0] if stop.args else signal.SIGINT
        message, status = "interrupted; the same command resumes", 128 + number
    except OSError as error:  # a full disk, a folder that may not be written
        message, status = f"{error.filename or 'writing'}: {error.strerror}", 2
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        message, status = f"another process has stopped ({str(error).splitlines()[0]})", 2
    print(f"rho.py: {message}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
