"""Selective Language Modeling (SLM), the method of Rho-1 (arXiv 2404.07965), in one file.

A reference model learns clean text, and its loss on every token of a large dirty corpus is computed
once. A student then reads the whole corpus, but trains only on the tokens with the highest
excess loss: its own loss minus the reference's. A token that neither model predicts is noise, and a
token that the student predicts well is learned already: both have a low excess.

The demo: clean text is grade-school problems with worked answers ("target text" is text like it).
The corpus is web-like pages that hide such problems, most of them answered wrong. The test is 500
held-out questions. CLM (causal language modeling) is ordinary training on all tokens.

    command                               minutes (*)  correct answers after training
    python rho.py                                   7  the next four runs, then their table
    python rho.py --stage ref                       1  reference, on clean text: 112 of 500
    python rho.py --stage clm                     1.5  all tokens of the corpus: 54 of 500
    python rho.py --stage slm                     1.5  the half with the most excess: 117 of 500
    python rho.py --stage clm --corpus mixed --tokens 1350000
                                                    2  clean text in the corpus: 292 of 500
    python rho.py --stage slm --select random       2  the control, a random half: 35 of 500
    python rho.py --stage sft --init out/demo/slm.pt   fine-tuning on answers
    python rho.py --stage table                        all runs in out/demo, beside CLM
    (*) on two cores of a laptop; they need neither AVX-512 nor bfloat16

The mixed corpus is SLM's rival: as many tokens as SLM and its reference read together. So why SLM?
It needs no clean text, only a model trained on it, which may be somebody else's. (In the demo SLM
only draws level with its reference, which is as large as the student. Compare it with CLM.)

    code              paper          where
    student_loss      L_theta(x_i)   section 2.2
    ref_loss          L_ref(x_i)     equation 1
    excess            L_delta(x_i)   equation 2
    selective_loss    L_SLM          equation 3
    ratio, mask       k %, I_k%      equations 3 and 4
    ref_entropy       H_ref          section 3.4

    window        block_size tokens of a text and the token that follows each
    batch         the windows of one optimizer step; a micro-batch fits on a device at once
    run           one training with a name: NAME.pt (to resume), NAME.jsonl (the log)
    rank          one of torchrun's processes, each with a GPU of its own: number RANK of WORLD

Differences from the paper:
1. Models of 0.8 M parameters are trained from scratch, so that it runs on a laptop. With `--init` a
   trained model is continued, as in the paper.
2. The reference's losses are stored as float16: rounding changes a loss of 2 nats by 0.001.
3. The top k are taken over each micro-batch. The paper says only "batch".
4. Muon updates the matrices and AdamW the rest. The paper names no optimizer.

How to read: THE METHOD and `train`; then what you need, in the order in which `train` calls it.
After you have edited this file, give your runs a new --name (with --stage all, a new --out): a run
resumes only with the code that began it.
"""

import argparse
import ast
import inspect
import json
import math
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import lru_cache
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout
from tqdm import tqdm

from eval_math import answer_questions, load_questions
from model import (
    BEST_DEVICE,
    GPT,
    GPTConfig,
    check_rows,
    load_checkpoint,
    load_model,
    make_optimizers,
    weights_hash,
)
from prepare_data import get_tokenizer, load_meta, prepare_demo, run_script, whole_file

# ==== THE METHOD ==================================================================================
# Ordinary training averages token_loss over all tokens. SLM scores them, selects some, and averages
# over those. Shapes: B windows (a micro-batch) of T tokens, V tokens in the vocabulary.

# What each rule of `score_tokens` needs to know from the reference. To add a rule, add a line here
# and a branch there; --select then accepts it. If it needs another quantity of the reference,
# compute that in `reference_values` and give score_tokens a parameter of the same name.
NEEDS = {
    "excess": ["ref_loss"],
    "ref_loss": ["ref_loss"],
    "ref_entropy": ["ref_entropy"],
    "ref_both": ["ref_loss", "ref_entropy"],
    "loss": [],
    "random": [],
    "all": [],
}


def token_loss(logits, targets):
    """Cross-entropy of each token in nats, float32 (B, T); logits (B, T, V), targets (B, T).

    The formula of equation 1, used for student and reference. The targets are the inputs shifted by
    one: position t of `logits` predicts `targets[:, t]`.
    """
    logits = logits.float().flatten(0, -2)  # (B * T, V)
    loss = F.cross_entropy(logits, targets.flatten(), reduction="none")
    return loss.view(targets.shape)  # (B, T)


def score_tokens(select, student_loss, ref_loss=None, ref_entropy=None, generator=None):
    """How much each token is worth training on, (B, T). Inputs are (B, T).

    excess: the student's loss minus the reference's, signed (equation 2).
    ref_loss: tokens that the reference finds easy (self-reference, section 3.4).
    ref_entropy: tokens whose prediction the reference is sure of (the same section).
    ref_both: tokens with a low loss and a low entropy.
    loss: tokens that the student finds hard.
    random: the control. all: ordinary training.
    """
    # The score decides which tokens count. No gradient may flow through that decision.
    student_loss = student_loss.detach()  # (B, T)
    if select == "excess":
        return student_loss - ref_loss
    if select == "ref_loss":
        return -ref_loss
    if select == "ref_entropy":
        return -ref_entropy
    if select == "ref_both":
        # Sorting twice gives each token its place in the micro-batch, 0 for the best. A token's
        # score is the worse of its two places, so it must be good in both.
        loss_place = ref_loss.flatten().argsort().argsort()  # (B * T)
        entropy_place = ref_entropy.flatten().argsort().argsort()  # (B * T)
        worse_place = torch.maximum(loss_place, entropy_place)
        return -worse_place.view_as(ref_loss).float()
    if select == "loss":
        return student_loss
    if select == "random":
        return torch.rand(student_loss.shape, generator=generator, device=student_loss.device)
    if select == "all":
        return torch.zeros_like(student_loss)
    raise ValueError(f"--select {select}: no such rule in score_tokens")


def select_tokens(score, ratio=None, threshold=None, valid=None):
    """Which tokens to train on, bool (B, T): the k highest scores, or all above a threshold.

    k = round(ratio * number of valid tokens), over the whole of `score` (equation 4). valid (B, T)
    is False where there is nothing to learn. To exclude more tokens, a rule scores them -inf: k
    stays the same, and if fewer than k are left, all of them are selected.
    ValueError: a score is NaN, or score and valid differ in shape.
    """
    if valid is None:
        valid = torch.ones_like(score, dtype=torch.bool)
    if score.shape != valid.shape:
        raise ValueError(f"scores of shape {tuple(score.shape)}; needed: {tuple(valid.shape)}")
    if score.isnan().any():
        raise ValueError("a score is NaN")
    score = score.float().masked_fill(~valid, -torch.inf)  # (B, T)
    if threshold is not None:
        return score > threshold
    k = round(ratio * int(valid.sum()))
    # The place of each token, 0 for the best. (topk would give the places of the chosen only.)
    place = score.flatten().argsort(descending=True).argsort().view(score.shape)
    return (place < k) & (score > -torch.inf)  # (B, T)


def selective_loss(student_loss, mask):
    """L_SLM (equation 3) as numerator and denominator, two scalars.

    The loss is their quotient: the mean of the student's own loss over the selected tokens. Kept
    apart, both can be added over micro-batches before one is divided by the other.
    mask (B, T): bool, or weights of at least 0, which make it a weighted mean.
    """
    if mask.shape != student_loss.shape or not (mask >= 0).all():
        raise ValueError(f"the mask needs shape {tuple(student_loss.shape)} and weights >= 0")
    return (student_loss * mask).sum(), mask.sum()


# ==== flags =======================================================================================

# The number of this process among torchrun's, and their count.
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


@dataclass
class Config:
    """Each field is a flag, as in --ratio 0.6. `run_config` fills in the defaults of a stage."""

    stage: str = "all"  # ref, clm, slm, sft: one run; all: the demo's four; table: all in OUT
    data: str = "data/demo"  # folder that prepare_data.py wrote
    out: str = "out/demo"  # folder for checkpoints, scores and logs
    name: str = ""  # of the run and its files; default: stage, rule and corpus
    seed: int = 1337  # of the first weights and the order of windows
    device: str = BEST_DEVICE  # where to compute
    # Selection.
    select: str = ""  # a rule of score_tokens; default: excess for slm, else all
    ratio: float = 0.5  # share of the tokens to select (paper: 0.6)
    threshold: float = None  # in place of ratio: all tokens that score above it
    reference: str = ""  # checkpoint or Hugging Face folder; default: OUT/ref.pt
    corpus: str = "train"  # train, or mixed: train with clean text in it
    # The model. The reference may have another shape: it is read from its file.
    n_layer: int = 3  # blocks
    n_head: int = 4  # attention heads
    n_kv_head: int = 0  # fewer key-value heads than n_head; 0: as many
    n_embd: int = 128  # channels of the residual stream
    n_inner: int = 384  # channels inside each MLP
    qk_norm: bool = True  # normalize queries and keys: small models learn faster
    tied: bool = False  # use one matrix for embedding and head
    block_size: int = 128  # tokens in a window
    init: str = ""  # checkpoint or Hugging Face folder to start from
    # Training. Tokens are counted as seen, trained on or not.
    tokens: int = 900_000  # that clm, slm and sft read (9e5 is a number, too)
    ref_tokens: int = 450_000  # that ref reads
    batch_size: int = 8  # windows in an optimizer step
    micro_batch: int = 8  # windows on a device at once
    optimizer: str = "muon"  # muon for the matrices in blocks, or adamw for all
    lr: float = 7.5e-4  # highest learning rate (tuned for clm and 9e5 tokens; for 2e6: 1.5e-3)
    lr_end: float = 0.1  # what it falls to, as a share of lr
    warmup: float = 0.02  # share of the steps in which lr rises
    weight_decay: float = 0.1  # of the matrices in blocks
    clip: float = 1.0  # largest norm of the gradient
    compile: bool = None  # use torch.compile; default: on cuda
    # Measuring and saving.
    evals: int = 9  # evaluations over the run, each with a checkpoint
    eval_windows: int = 64  # windows of held-out text in an evaluation
    questions: int = 500  # questions of DATA/questions.jsonl in an evaluation
    save_minutes: float = 20  # save at least this often
    restart: bool = False  # start over, and replace the run of this name

    @property
    def split(self):
        """The file of DATA that a run trains on."""
        return self.stage if self.stage in ("ref", "sft") else self.corpus

    @property
    def steps(self):
        return max(1, self.tokens // (self.batch_size * self.block_size))


# ==== training ====================================================================================


def train(cfg):
    """Train one run to its end, resuming where it stopped."""
    path = Path(cfg.out, f"{cfg.name}.pt")
    meta = load_meta(cfg.data)  # meta.json: the tokenizer, each file's tokens and its hash
    model = first_model(cfg, meta)
    reference = open_model(cfg.reference, cfg, meta) if cfg.reference else None
    optimizers = make_optimizers(model, cfg.optimizer, cfg.lr, cfg.weight_decay)
    identity = make_identity(cfg, meta, model, reference)
    first_step = 0
    # Totals since the start of the run, and since the last evaluation.
    sums = {"trained": 0, "empty_steps": 0, "seconds": 0.0}
    sums |= {"loss_since_eval": 0.0, "mask_since_eval": 0.0}

    # There may already be a run of this name: finished, interrupted, or a different one.
    saved = open_run(path, identity, cfg.restart)
    if saved:
        first_step, records, sums = saved["step"], saved["records"], saved["sums"]
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    else:
        records = [header(cfg, model, identity)]  # the log: then a record for each evaluation
    if first_step == cfg.steps:
        say(f"{path}: finished already, by the same code with the same flags and data")
        return
    size = f"{model.num_params() / 1e6:.2f} M parameters on {cfg.device}"
    say(f"{cfg.name}: {size}, steps {first_step} to {cfg.steps} over {cfg.data}, to {path}")

    inputs, targets, valid = open_windows(cfg, meta, cfg.split)  # (n, T) each
    # What the rule NEEDS: {"ref_loss": (n, T), ...}, or nothing.
    ref_values = score_corpus(cfg, meta, reference, inputs, targets)
    del reference  # its losses are on disk: make room
    # Only training is compiled: answers have many lengths, and each would be compiled anew.
    compiled = torch.compile(model) if cfg.compile else model
    # Steps after which to evaluate. The last is cfg.steps, so the finished model is saved.
    eval_steps = {round(cfg.steps * (i + 1) / cfg.evals) for i in range(cfg.evals)}
    last_save = time.time()

    for step in progress_bar(range(first_step, cfg.steps), cfg.name):
        started = time.time()
        # Of the whole batch: the sum of the selected losses, the sum of the mask, the number of
        # selected tokens (which is not the sum of the mask if the mask has weights).
        batch_sums = torch.zeros(3, device=cfg.device)

        # A batch may be too large for the device: its micro-batches go through one after another.
        # Each rank has micro-batches of its own. ids (B,): the numbers of the windows.
        for ids in micro_batches(cfg, step, len(inputs)):
            x, y, is_valid = [take(array, ids, cfg) for array in (inputs, targets, valid)]  # (B, T)
            # Stored values. If your reference changes during training, compute them here instead.
            ref = {name: take(array, ids, cfg) for name, array in ref_values.items()}
            generator = generator_for(cfg, step, ids)

            with precision(cfg.device):
                logits = compiled(x)  # (B, T, V)
            # 1. The student's loss on every token.
            student_loss = token_loss(logits, y)  # (B, T)
            # Check now: 0 * NaN is NaN, so even a token that is not selected would spoil the sum.
            check_finite(student_loss.detach().sum(), cfg, step)
            # 2. What each token is worth.
            score = score_tokens(cfg.select, student_loss, **ref, generator=generator)  # (B, T)
            # 3. The tokens to train on.
            mask = select_tokens(score, cfg.ratio, cfg.threshold, is_valid)  # (B, T)
            # 4. The loss on those tokens: numerator and denominator of equation 3.
            loss_sum, mask_sum = selective_loss(student_loss, mask)
            # The gradient of the numerator adds up in p.grad, over the micro-batches.
            loss_sum.backward()
            batch_sums += torch.stack((loss_sum.detach(), mask_sum, (mask > 0).sum()))

        sum_over_ranks([batch_sums, *[p.grad for p in model.parameters()]])
        batch_loss, batch_mask, n_trained = batch_sums.tolist()
        # If no token was selected there is nothing to learn. Momentum and weight decay would still
        # move the weights, so the step is skipped.
        if batch_mask > 0:
            # The division of equation 3. It comes after backward, because only now all
            # micro-batches of all ranks have said how many tokens they selected. (With equal counts
            # this is nanoGPT's division by gradient_accumulation_steps.)
            for p in model.parameters():
                p.grad /= batch_mask
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
            check_finite(norm, cfg, step)
            # Muon's steps are scaled to the size of AdamW's, so one learning rate serves both.
            lr = learning_rate(cfg, step)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
        model.zero_grad()
        sums["loss_since_eval"] += batch_loss
        sums["mask_since_eval"] += batch_mask
        sums["trained"] += round(n_trained)
        sums["empty_steps"] += batch_mask == 0
        sums["seconds"] += time.time() - started

        is_eval = step + 1 in eval_steps
        # The other ranks go on, and wait for rank 0 in the next sum_over_ranks.
        if is_eval and RANK == 0:
            records.append(evaluate(cfg, meta, model, step + 1, sums))
            check_finite(records[-1]["val_loss"], cfg, step)
            sums["loss_since_eval"] = sums["mask_since_eval"] = 0.0
        if RANK == 0 and (is_eval or time.time() - last_save > 60 * cfg.save_minutes):
            # All that a resumed run needs to end with the same weights: bit for bit on a CPU, with
            # as many threads. Have you added something that changes from step to step (a second
            # model, a running mean)? Update it above this line, save it here, and load it where
            # `saved` is loaded. Draw random numbers from `generator`, not from torch's own state.
            state = {
                "model": model.state_dict(),
                "model_config": asdict(model.config),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "identity": identity,
                "tokenizer": meta["tokenizer"],
                "records": records,
                "step": step + 1,
                "steps": cfg.steps,
                "sums": sums,
            }
            # The checkpoint first: a run that is killed in between writes its log when resumed.
            with whole_file(path) as file:
                torch.save(state, file)
            write_log(path, records)
            last_save = time.time()


# ==== models ======================================================================================


def first_model(cfg, meta):
    """The model that a run starts from: --init, or new weights from the seed."""
    if cfg.init:
        return open_model(cfg.init, cfg, meta)
    torch.manual_seed(cfg.seed)
    # Config and GPTConfig have these fields in common.
    shape = {f.name: getattr(cfg, f.name) for f in fields(GPTConfig) if hasattr(cfg, f.name)}
    return GPT(GPTConfig(meta["tokenizer"]["n_vocab"], **shape)).to(cfg.device)


def open_model(path, cfg, meta):
    """The model of a checkpoint or Hugging Face folder, if it fits the data."""
    if not Path(path).exists():
        remedy = "python rho.py --stage ref makes a reference, hf download fetches a model"
        sys.exit(f"{path} is missing; {remedy}")
    model, checkpoint = load_model(path, cfg.device, cfg.block_size)
    if checkpoint.get("tokenizer", meta["tokenizer"]) != meta["tokenizer"]:
        sys.exit(f"{path} has another tokenizer than {cfg.data}; prepare the text with its own")
    check_rows(model, meta["tokenizer"], path)
    if cfg.block_size > model.config.block_size:
        sys.exit(f"{path} takes at most --block_size {model.config.block_size}")
    # (A Hugging Face folder has neither, and None equals None.)
    if checkpoint.get("step") != checkpoint.get("steps"):
        sys.exit(f"{path} has not finished training; the command that began it resumes it")
    return model


# ==== what makes two runs the same ================================================================

# A run is resumed, or called finished, only if flags, data, first weights and code are those it
# began with. So no old result can pass for one of an edited rule.


def code_of(text, names=None):
    """A hash of Python code, or of some of its functions, without comments and docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant("")  # a docstring
    parts = [ast.dump(n) for n in tree.body if names is None or getattr(n, "name", "") in names]
    return sha256(repr(parts).encode()).hexdigest()[:16]


# Read when the program starts, since the files may be edited while it runs.
HERE = Path(__file__).parent
NAMES = ("rho.py", "model.py", "eval_math.py")
TEXTS = {name: Path(HERE, name).read_text(encoding="utf-8") for name in NAMES}
CODE = {name: code_of(text) for name, text in TEXTS.items()}
# The functions that stored scores depend on. If you make one of them call a new function of this
# file, add its name, or scores of the old code are used again.
SCORING = ("open_windows", "take", "precision", "is_bf16", "token_loss", "reference_values")
SCORING_CODE = code_of(TEXTS["rho.py"], SCORING)

# Flags that are not compared: they change no number, or name files whose contents are compared.
NO_MATTER = {"stage", "data", "out", "name", "init", "reference", "ref_tokens", "corpus"}
NO_MATTER |= {"restart", "save_minutes"}


def make_identity(cfg, meta, model, reference):
    """A run is resumed, or called finished, only if all of this is equal: {what: value}.

    model: with its first weights, before a checkpoint is loaded into it.
    """
    flags = {name: value for name, value in asdict(cfg).items() if name not in NO_MATTER}
    # After --init the shape is that of the file, whatever the flags say.
    flags |= {name: value for name, value in asdict(model.config).items() if name in flags}
    text = [f"{cfg.split}.bin", f"{cfg.split}_mask.bin"]
    text += ["val.bin", "val_corpus.bin", "questions.jsonl"]
    files = {name: digest for name, digest in meta["files"].items() if name in text}
    weights = {"first weights": weights_hash(model)}
    if reference is not None:
        weights["reference"] = weights_hash(reference)
    return {**flags, **files, **weights, "ranks": WORLD, **CODE}


def header(cfg, model, identity):
    """The first record of a log: what is run, with what, and where."""
    # Tokens that other models read before this run could begin, {run: tokens}: if the reference
    # began with the same --init, that counts once. Those of a folder are unknown.
    read_before = {}
    for path in (cfg.reference, cfg.init):
        if Path(path).is_file():
            checkpoint = load_checkpoint(path)
            first, *_, last = checkpoint["records"]
            run = sha256(repr(checkpoint["identity"]).encode()).hexdigest()[:16]
            read_before |= {**first.get("read_before", {}), run: last["tokens"]}
    return {
        "flags": asdict(cfg),  # among them the device
        "identity": identity,
        "params": model.num_params(),
        "read_before": read_before,
        "tokens_before": sum(read_before.values()),
        "commit": subprocess.getoutput(f"git -C '{HERE}' describe --always --dirty"),
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
    }


def open_run(path, identity, restart):
    """The checkpoint to resume; None if there is none. Exits if it belongs to another run."""
    if restart or not path.exists():
        return None
    saved = load_checkpoint(path)
    before = saved.get("identity", {})
    for what in {**identity, **before}:
        if before.get(what) != identity.get(what):
            change = f"{what} was {before.get(what)} and is {identity.get(what)}"
            sys.exit(f"{path} is another run: {change}; give another --name or --out, or --restart")
    write_log(path, saved["records"])  # it may have been killed before it wrote its log
    return saved


def write_log(path, records):
    """NAME.jsonl beside NAME.pt: what is run, then a line for each evaluation."""
    if RANK == 0:
        with whole_file(path.with_suffix(".jsonl")) as file:
            for record in records:
                file.write(f"{json.dumps(record)}\n".encode())


# ==== data ========================================================================================


def open_windows(cfg, meta, split):
    """A token file as windows: inputs, targets, and which targets may be trained on, all (n, T).

        the file         a b c d e f g h i j k         T = 3
        inputs           a b c | d e f | g h i
        targets          b c d | e f g | h i j         each input's next token

    The windows are fixed. A random offset, as nanoGPT has, would put a token into a new context
    each time, and the reference's loss that is stored for it holds in one context only. Windows
    ignore the borders of documents, and attention crosses them, as usual in pre-training.
    """
    path = Path(cfg.data, f"{split}.bin")
    if split not in meta["tokens"]:
        sys.exit(f"{path} is missing; prepare_data.py --mix writes mixed.bin, --sft writes sft.bin")
    tokens = np.memmap(path, meta["dtype"], "r")
    T = cfg.block_size
    n = (len(tokens) - 1) // T
    if n < 1:
        sys.exit(f"{path} has {len(tokens)} tokens, too few for --block_size {T}")
    inputs = tokens[: n * T].reshape(n, T)
    targets = tokens[1 : n * T + 1].reshape(n, T)
    valid = np.broadcast_to(True, (n, T))  # all; takes no memory
    if split == "sft":  # only the tokens of answers
        answers = np.memmap(Path(cfg.data, "sft_mask.bin"), np.bool_, "r")
        valid = answers[1 : n * T + 1].reshape(n, T)
    return inputs, targets, valid


@lru_cache(maxsize=2)  # a batch can lie across two epochs
def permutation(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


def batch(cfg, step, n):
    """The numbers of a step's windows (batch_size,), of n windows.

    A pure function of seed and step: all arms see the same windows in the same order, and a resumed
    run continues where it stopped. Each epoch has every window once, in an order of its own.
    """
    positions = range(step * cfg.batch_size, (step + 1) * cfg.batch_size)
    return np.array([permutation(n, cfg.seed, p // n)[p % n] for p in positions])


def micro_batches(cfg, step, n):
    """This rank's share of a batch, in arrays of at most micro_batch numbers of windows."""
    share = np.split(batch(cfg, step, n), WORLD)[RANK]
    return np.split(share, range(cfg.micro_batch, len(share), cfg.micro_batch))


def take(array, ids, cfg):
    """Some windows of an array, on the device: token ids as int64, losses as float32, or bool."""
    dtype = {"u": np.int64, "f": np.float32, "b": np.bool_}[array.dtype.kind]
    return torch.from_numpy(array[ids].astype(dtype)).to(cfg.device)


def generator_for(cfg, step, ids):
    """For random numbers that differ between micro-batches and are the same in a resumed run."""
    seed = np.random.SeedSequence((cfg.seed, step, ids[0])).generate_state(1)[0]
    return torch.Generator(cfg.device).manual_seed(int(seed))


# ==== the reference's scores ======================================================================


def score_corpus(cfg, meta, reference, inputs, targets):
    """What the rule needs to know of each target, on disk: {"ref_loss": float16 (n, T), ...}.

    Computed once for each window that the run will see, in the order in which it sees them. Runs
    share the files, and a later run adds the windows that it needs. (The size of the micro-batch
    that a window was scored in may change the last bit of a number.)
    """
    if reference is None:
        return {}
    reference.eval()
    # The folder's name is a hash of all that the numbers depend on, so none can be stale.
    depends_on = [SCORING_CODE, CODE["model.py"], weights_hash(reference)]
    depends_on += [meta["files"][f"{cfg.split}.bin"], cfg.block_size, is_bf16(cfg.device)]
    folder = Path(cfg.out, "scores", sha256(repr(depends_on).encode()).hexdigest()[:16])
    folder.mkdir(parents=True, exist_ok=True)

    with FileLock(folder / "lock") if RANK == 0 else nullcontext():
        scores = {
            name: open_scores(folder / f"{name}.f16", inputs.shape) for name in NEEDS[cfg.select]
        }
        for step in progress_bar(range(cfg.steps), f"scores by {cfg.reference}"):
            for ids in micro_batches(cfg, step, len(inputs)):
                for name, values in scores.items():
                    # A window is written as a whole: if its last score is missing, all are.
                    missing = np.isnan(values[ids, -1])
                    if missing.any():
                        # Score the whole micro-batch, though some of it may be there: a smaller
                        # one could be rounded differently, and an interruption must not matter.
                        x, y = take(inputs, ids, cfg), take(targets, ids, cfg)
                        new = reference_values(name, reference, x, y)
                        if not np.isfinite(new).all():
                            sys.exit(f"{cfg.reference}: its {name} is not finite; retrain it")
                        values[ids[missing]] = new[missing]
        wait_for_ranks()
    return scores


def open_scores(path, shape):
    """A file of scores as an array (n, T) that can be written to. NaN: not scored yet."""
    if RANK == 0 and not path.exists():
        with whole_file(path) as file:
            for _ in range(shape[0]):
                file.write(np.full(shape[1], np.nan, np.float16).tobytes())
    wait_for_ranks()
    # np.memmap would pad a shorter file with zeros, which look like scores.
    if path.stat().st_size != 2 * math.prod(shape):
        sys.exit(f"{path} is cut short; delete it, and the same command scores again")
    return np.memmap(path, np.float16, "r+", shape=shape)


@torch.no_grad()
def reference_values(name, reference, x, y):
    """The loss of each target, or the entropy of its prediction, in nats: float16 (B, T)."""
    with precision(x.device):
        logits = reference(x).float()  # (B, T, V)
    if name == "ref_loss":
        values = token_loss(logits, y)
    elif name == "ref_entropy":
        values = torch.special.entr(logits.softmax(-1)).sum(-1)
    else:
        raise ValueError(f"{name}: no such branch in reference_values")
    return values.half().cpu().numpy()


# ==== the optimizer's step ========================================================================


def check_finite(value, cfg, step):
    if not math.isfinite(value):
        sys.exit(f"{cfg.name}: loss or gradient is not finite at step {step}; try a lower --lr")


def learning_rate(cfg, step):
    """Linear warm-up to lr, then half a cosine down to lr * lr_end."""
    warmup_steps = max(1, round(cfg.warmup * cfg.steps))
    if step < warmup_steps:
        return cfg.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, cfg.steps - warmup_steps)
    cosine = 0.5 + 0.5 * math.cos(math.pi * progress)  # from 1 to 0
    return cfg.lr * (cfg.lr_end + (1 - cfg.lr_end) * cosine)


# ==== evaluation ==================================================================================


def evaluate(cfg, meta, model, step, sums):
    """What runs are compared on, as the record of a log; also printed.

    val_loss is the mean loss of target text, selected or not; val_corpus_loss is that of corpus
    text. (Its loss of each token goes to OUT/NAME-STEP.npy, for pictures.) selected_loss is a mean
    over different tokens in each run: do not compare runs by it.
    """
    started = time.time()
    model.eval()
    corpus_loss = held_out_loss(cfg, meta, model, "val_corpus")  # (windows, T)
    np.save(Path(cfg.out, f"{cfg.name}-{step}.npy"), corpus_loss.half().numpy())
    record = {
        "step": step,
        "tokens": step * cfg.batch_size * cfg.block_size,
        "trained": sums["trained"],
        "seconds": round(sums["seconds"], 2),
        "val_loss": held_out_loss(cfg, meta, model, "val").mean().item(),
        "val_corpus_loss": corpus_loss.mean().item(),
        "selected_loss": sums["loss_since_eval"] / max(sums["mask_since_eval"], 1e-9),
        "empty_steps": sums["empty_steps"],
    }
    answered = ""
    question_path = Path(cfg.data, "questions.jsonl")
    if cfg.questions and question_path.exists():
        questions = load_questions(question_path, cfg.questions)
        tokenizer = get_tokenizer(meta["tokenizer"])
        rows = 2**16 // cfg.block_size  # 65,536 tokens at once
        answers = answer_questions(model, tokenizer, questions, batch_size=rows)
        record["right"] = sum(answer["correct"] for answer in answers)
        record["questions"] = len(answers)
        answered = f"  {record['right']:>3} of {len(answers)} right"
        too_long = sum(answer["shots"] is None for answer in answers)
        if too_long:
            answered += f" ({too_long} not asked: longer than --block_size)"
    model.train()
    record["eval_seconds"] = round(time.time() - started, 2)
    losses = f"target loss {record['val_loss']:.3f}  corpus loss {record['val_corpus_loss']:.3f}"
    say(f"{cfg.name:>11} {record['tokens']:>13,} tokens  {losses}{answered}")
    if sums["empty_steps"]:
        say(f"{cfg.name}: {sums['empty_steps']} steps selected no token, and were skipped")
    return record


@torch.no_grad()
def held_out_loss(cfg, meta, model, split):
    """Losses (windows, T) in nats, of the first --eval_windows windows of a text, on the CPU.

    One window at a time, which takes little memory. Not by token_loss: if you edit it, your edit
    must not be what a run is measured by.
    """
    inputs, targets, _ = open_windows(cfg, meta, split)
    losses = []
    for window in range(min(cfg.eval_windows, len(inputs))):
        with precision(cfg.device):
            logits = model(take(inputs, [window], cfg)).float()  # (1, T, V)
        loss = F.cross_entropy(logits[0], take(targets, window, cfg), reduction="none")
        losses.append(loss.cpu())
    return torch.stack(losses)


# ==== the table ===================================================================================


def show_table(folder):
    """Print the last evaluation of each run, and how the run differs from clm.

    fewer: clm's tokens, divided by those that the run needed to match clm's last evaluation.
    """
    import pandas

    runs = {}
    for path in sorted(Path(folder).glob("*.jsonl")):
        try:
            records = [json.loads(line) for line in path.read_text().splitlines()]
        except ValueError:
            sys.exit(f"{path} is damaged; the command of this run writes it again")
        # Only runs, and only those that have been evaluated.
        if len(records) > 1 and "identity" in records[0]:
            runs[path.stem] = records
    if "clm" not in runs:
        sys.exit(f"{folder} has no run to compare with; python rho.py --stage clm --out {folder}")
    clm_header, *_, goal = runs["clm"]
    columns = ["run", "tokens", "in all", "trained on", "target loss", "fewer, loss"]
    columns += ["right", "fewer, right", "differs from clm in"]
    rows = []
    for name in sorted(runs, key=lambda name: (name != "ref", name != "clm", name)):
        first, *_, last = runs[name]
        is_finished = last["step"] == Config(**first["flags"]).steps
        fewer = {}
        for key in ("val_loss", "right"):
            tokens = tokens_to_reach(runs[name], goal, key)
            fewer[key] = f"{goal['tokens'] / tokens:.1f} x" if tokens else "-"
        right = f"{last['right']} of {last['questions']}" if "right" in last else "-"
        counts = [last["tokens"], last["tokens"] + first["tokens_before"], last["trained"]]
        row = [name if is_finished else f"{name} (unfinished)", *[f"{n:,}" for n in counts]]
        row += [f"{last['val_loss']:.3f}", fewer["val_loss"], right, fewer["right"]]
        mine, theirs = first["identity"], clm_header["identity"]
        row.append(", ".join(what for what in mine if mine[what] != theirs.get(what)))
        rows.append(row)
    print(f"\n{pandas.DataFrame(rows, columns=columns).to_string(index=False)}\n")
    print("in all: with the tokens of its reference, and of the model that it started from.")
    print("fewer: clm's tokens / tokens that the run needed to match clm's last evaluation.")


def tokens_to_reach(records, goal, key):
    """Tokens seen when a run reached the goal for good; None if it ends worse.

    For good: from then on it is never worse. Linear between two evaluations.
    """
    if key not in goal or key not in records[-1] or goal[key] == 0:  # no answer is right: no goal
        return None
    sign = 1 if key == "right" else -1  # more answers are better, and less loss
    points = [(record["tokens"], sign * (record[key] - goal[key])) for record in records[1:]]
    reached = points[0][0] if points[0][1] >= 0 else None
    for (x0, lead0), (x1, lead1) in pairwise(points):
        if lead1 < 0:
            reached = None
        elif lead0 < 0:
            reached = x0 + (x1 - x0) * lead0 / (lead0 - lead1)
    return reached


# ==== device and ranks ============================================================================


def is_bf16(device):
    """True where the GPU supports bfloat16. Elsewhere models compute in float32."""
    return "cuda" in str(device) and torch.cuda.is_bf16_supported(including_emulation=False)


def precision(device):
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=is_bf16(device))


def start_ranks(device):
    """Join the other processes of torchrun, each with a GPU of its own."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.set_float32_matmul_precision("high")  # TF32
    if WORLD > 1:
        # A long timeout, since all ranks wait while rank 0 evaluates.
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=3))


def sum_over_ranks(tensors):
    """Sum each tensor over the ranks, in place. (DDP would average, in each backward.)"""
    if WORLD > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def wait_for_ranks():
    if WORLD > 1:
        dist.barrier()


def say(message):
    if RANK == 0:
        tqdm.write(message)


def progress_bar(steps, what):
    hide = True if RANK > 0 else None  # None: hide it if the output is not a terminal
    return tqdm(steps, what, disable=hide, leave=False)


# ==== the command line ============================================================================

CHOICES = {
    "stage": ("all", "ref", "clm", "slm", "sft", "table"),
    "device": (BEST_DEVICE, "cpu"),
    "select": ("", *NEEDS),
    "corpus": ("train", "mixed"),
    "optimizer": ("muon", "adamw"),
}


def whole_number(text):
    value = float(text)  # reads 900000, 900_000 and 9e5
    if not value.is_integer():
        raise ValueError
    return int(value)


MAY_BE_0 = ("seed", "n_kv_head", "questions", "lr", "lr_end", "warmup", "weight_decay")


def parse(argv=None):
    """The command line as a Config. Exits for a value that would silently train nonsense."""
    parser = argparse.ArgumentParser(
        "rho.py",
        usage="python rho.py [--stage STAGE] [--FLAG VALUE ...]; -h lists all flags",
        description=f"{__doc__}\n{inspect.getsource(Config)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for f in fields(Config):
        how = {"default": f.default, "help": argparse.SUPPRESS}
        if f.type is bool:
            how["action"] = argparse.BooleanOptionalAction  # --tied or --no-tied
        else:
            how["type"] = whole_number if f.type is int else f.type
            how["choices"] = CHOICES.get(f.name)
        parser.add_argument(f"--{f.name}", **how)
    cfg = Config(**vars(parser.parse_args(argv)))

    for name, value in vars(cfg).items():
        most = 1 if name in ("ratio", "lr_end", "warmup") else 2**53
        least = 0 if name in MAY_BE_0 else 1e-9
        if name == "threshold":
            least = -most
        if type(value) in (int, float) and not least <= value <= most:
            sys.exit(f"--{name} {value} is out of its range")
    return cfg


def run_config(cfg, stage, **changes):
    """The settings of one run, with the stage's defaults filled in: as it is run and logged."""
    usual_rule = "excess" if stage == "slm" else "all"
    if cfg.select and stage in ("ref", "clm"):
        sys.exit(f"--select: --stage {stage} trains on every token; use --stage slm")
    if cfg.stage == "ref" and cfg.tokens != Config.tokens and cfg.ref_tokens == Config.ref_tokens:
        sys.exit("--tokens: --stage ref reads --ref_tokens")
    if stage == "sft" and not cfg.init:
        sys.exit("--stage sft needs a model to start from, as --init out/demo/slm.pt")
    if cfg.batch_size % WORLD:
        sys.exit(f"--batch_size {cfg.batch_size} is not a multiple of {WORLD} ranks")
    run = replace(cfg, stage=stage, select=cfg.select or usual_rule, **changes)
    if stage == "ref":
        run.tokens = run.ref_tokens
    if run.threshold is not None:
        run.ratio = None
    if run.select == "all":
        # With --stage all, these flags are slm's.
        if cfg.stage != "all" and (cfg.ratio, cfg.threshold) != (Config.ratio, None):
            sys.exit(f"--ratio, --threshold: --stage {stage} trains on every token")
        run.ratio, run.threshold = 1.0, None
    if run.compile is None:
        run.compile = run.device == "cuda"
    if not NEEDS[run.select]:
        run.reference = ""
    elif not run.reference:
        run.reference = f"{run.out}/ref.pt"

    # The stage, and what is not usual in it: clm, slm, slm-random, clm-mixed.
    usual_name = stage
    if run.select != usual_rule:
        usual_name += f"-{run.select}"
    if run.split == "mixed":
        usual_name += "-mixed"
    run.name = run.name or usual_name
    if Path(run.name).name != run.name or (run.name in ("ref", "clm") and run.name != usual_name):
        sys.exit(f"--name {run.name}: use a plain name; ref and clm are reserved")
    return run


def train_alone(run):
    """Train, unless another process is training the same run."""
    Path(run.out).mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{run.out}/{run.name}.lock", timeout=0) if RANK == 0 else nullcontext():
            train(run)
    except Timeout:
        sys.exit(f"{run.out}/{run.name}.pt is being written by another process; give a --name")


def main(argv=None):
    cfg = parse(argv)
    if cfg.stage == "table":
        show_table(cfg.out)
        return
    if cfg.stage == "all" and (cfg.name or cfg.select or cfg.corpus != Config.corpus):
        sys.exit("--name, --select and --corpus belong to one run: give its --stage, too")
    start_ranks(cfg.device)
    # One rank makes the demo's text. The others wait.
    if RANK == 0 and cfg.data == Config.data and not Path(cfg.data, "meta.json").exists():
        say(f"making the demo's text in {cfg.data}")
        prepare_demo(cfg.data)
    wait_for_ranks()
    if cfg.stage == "all":
        # The last is SLM's rival: clean text in the corpus, for as many tokens as SLM and its
        # reference read together.
        runs = [run_config(cfg, stage) for stage in ("ref", "clm", "slm")]
        in_all = cfg.tokens + cfg.ref_tokens
        runs.append(run_config(cfg, "clm", corpus="mixed", tokens=in_all))
        # If the last one lacks data, say so now, and not when the others are done.
        for run in runs:
            open_windows(run, load_meta(run.data), run.split)
    else:
        runs = [run_config(cfg, cfg.stage)]
    for run in runs:
        train_alone(run)
        wait_for_ranks()  # a rank that finds its run finished must not begin the next
    if RANK == 0 and cfg.stage == "all":
        show_table(cfg.out)
    else:
        say(f"to compare: python rho.py --stage table --out {cfg.out}")
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main, "the same command, without --restart, continues")
