"""Selective Language Modeling (SLM), the method of Rho-1 (arXiv 2404.07965).

A reference model learns clean text, and its loss on every token of a large dirty corpus is computed
once. A student then reads the whole corpus, but trains only on the tokens with the highest
excess loss: its own loss minus the reference's. A token that neither model predicts is noise, and a
token that the student predicts well is learned already: both have a low excess.

The demo: clean text is grade-school problems with worked answers ("target text" is text like it).
The corpus is web-like pages in which such problems hide, most of them answered wrong, and 500
held-out questions are asked. CLM (causal language modeling) is ordinary training on all tokens.
We call each way to train an arm; arms are compared after the same number of tokens seen.

    command                                     minutes   correct answers after training
    python rho.py                                     8   runs the next five, prints their table
    python rho.py --stage ref                         1   reference, on clean text: 112 of 500
    python rho.py --stage clm                         1   all tokens of the corpus: 56 of 500
    python rho.py --stage slm --select random         2   a random half of them: 32 of 500
    python rho.py --stage slm                         2   the half with the most excess: 115 of 500
    python rho.py --stage clm --mix 0.6               2   clean text in the corpus: 307 of 500 (*)
    python rho.py --stage score                           the reference's losses alone
    python rho.py --stage dynamics                        how each token's loss moves (section 2.1)
    python rho.py --stage sft --init out/demo/slm.pt      fine-tuning on answers
    python rho.py --stage table                           all runs in out/demo, beside CLM
    python rho.py --stage check                           compares every file with its checksum
    (*) with --tokens 1350000: as many as SLM and its reference read together

    code              paper          where
    student_loss      L_theta(x_i)   section 2.2
    ref_loss          L_ref(x_i)     equation 1
    excess            L_delta(x_i)   equation 2
    selective_loss    L_SLM          equation 3
    ratio, mask       k %, I_k%      equations 3 and 4
    ref_entropy       H_ref          section 3.4

Differences from the paper:
1. Models of 0.8 M parameters are trained from scratch, so that it runs on a laptop. With `--init` a
   trained model is continued, as in the paper.
2. The reference's losses are stored as float16: rounding changes a loss of 2 nats by 0.001.
3. The top k are taken over each device's micro-batch. The paper says only "batch".
4. Muon updates the matrices and AdamW the rest. The paper names no optimizer.

How to read this file: THE METHOD, `train`, `score_corpus`. By default `train` does not execute
token_loss and selective_loss but faster forms of model.py that compute the same (checked at each
start); `--fast false` executes the four functions as written.
"""

import argparse
import ast
import inspect
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
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
    Interrupted,
    OneLineParser,
    catch_signals,
    check_files,
    file_digest,
    get_tokenizer,
    load_meta,
    only_writer,
    prepare_demo,
    raise_interrupted,
    whole_file,
)

# ==== THE METHOD ==================================================================================
# Ordinary training averages token_loss over all tokens. SLM scores them, selects, averages a part.
# Shapes: B windows of T tokens, V tokens in the vocabulary.

# The inputs that each rule of `score_tokens` needs besides the student's loss. A rule of your own
# is a line here and a branch there; --select, scoring and the table follow.
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


def token_loss(logits, targets):
    """Cross-entropy of each token in nats, float32 (B, T); logits (B, T, V), targets (B, T).

    The formula of equation 1, used for student and reference. The targets are the inputs shifted by
    one: position t of `logits` predicts `targets[:, t]`.
    """
    logits = logits.float().flatten(0, -2)  # (B * T, V)
    loss = F.cross_entropy(logits, targets.flatten(), reduction="none")
    return loss.view(targets.shape)  # (B, T)


def score_tokens(select, student_loss, ref_loss=None, ref_entropy=None, truth=None, generator=None):
    """How much each token is worth training on, (B, T). No gradient. Inputs are (B, T).

    excess: the student's loss minus the reference's, signed (equation 2).
    ref_loss: tokens that the reference finds easy (self-reference, section 3.4).
    ref_entropy: tokens whose prediction the reference is sure of (the same section).
    ref_both: tokens of a low loss and a low entropy.
    loss: tokens that the student finds hard.
    random: the control. all: ordinary training.
    oracle: tokens that the demo's generator knows to be target text (truth: 1, else 0).
    ValueError if there is no such rule, or if an input that it NEEDS is missing.
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
        # Sorting twice gives ranks, 0 for the best. A token's score is the worse of its two ranks,
        # so it must be good in both.
        loss_rank = ref_loss.flatten().argsort().argsort()  # (B * T)
        entropy_rank = ref_entropy.flatten().argsort().argsort()  # (B * T)
        worse_rank = torch.maximum(loss_rank, entropy_rank)
        return -worse_rank.view_as(ref_loss).float()
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
    is False where there is nothing to learn: such a token is not selected and does not count in k.
    A rule may exclude a token by a score of -inf. ValueError: a score that is NaN, scores of
    another shape than valid, or both or neither of ratio and threshold.
    """
    if (ratio is None) == (threshold is None):
        raise ValueError("select_tokens takes a ratio or a threshold, one of them")
    if not score.is_floating_point():  # a rule may give integers, or True and False
        score = score.float()
    if score.isnan().any():
        raise ValueError("a score is NaN: the rule may divide 0 by 0 (clamp what it divides by)")
    if valid is None:
        valid = torch.ones_like(score, dtype=torch.bool)
    if score.shape != valid.shape:
        raise ValueError(f"a rule gave scores {tuple(score.shape)} for {tuple(valid.shape)} tokens")
    score = score.masked_fill(~valid, -torch.inf)  # (B, T)
    if threshold is not None:
        return score > threshold
    k = round(ratio * int(valid.sum()))
    best = score.flatten().topk(k, sorted=False).indices  # (k,)
    mask = torch.zeros_like(valid).flatten()  # (B * T)
    mask[best] = True
    # If a rule leaves fewer than k tokens, the k best include some with -inf: drop those.
    return mask.view(score.shape) & (score > -torch.inf)  # (B, T)


def selective_loss(student_loss, mask):
    """L_SLM (equation 3): the mean of the student's own loss over the selected tokens.

    mask (B, T): bool, or weights of at least 0. If nothing is selected, loss and gradient are 0.
    """
    mask_sum = mask.sum()  # of a bool mask, the number of selected tokens
    # The clamp only avoids 0 / 0: if nothing is selected, the numerator is 0.
    return (student_loss * mask).sum() / mask_sum.clamp(min=1e-9)


# ==== flags =======================================================================================

# check_available=True: a CUDA build of torch may run on a machine without a GPU.
ACCELERATOR = torch.accelerator.current_accelerator(check_available=True)
BEST_DEVICE = (ACCELERATOR or torch.device("cpu")).type
STAGES = ("all", "ref", "score", "clm", "slm", "sft", "dynamics", "table", "check")
# The share of clean text in the fifth run of --stage all.
DEMO_MIX = 0.6
# The default --select of each training stage.
STAGE_RULES = {"ref": "all", "clm": "all", "sft": "all", "slm": "excess"}


def option(default, help, least=None, above=None, most=None, choices=None):
    """A field of Config with its help text and its range. `parse` makes a flag of each field."""
    limits = {"least": least, "above": above, "most": most, "choices": choices}
    return field(default=default, metadata={"help": help, **limits})


@dataclass
class Config:
    stage: str = option(
        "all", "what to do; all: the demo's five runs and the table", choices=STAGES
    )
    data: str = option("data/demo", "folder that prepare_data.py wrote")
    out: str = option("out/demo", "folder for checkpoints, scores and logs")
    name: str = option("", "name of the run and its files; default: the stage and the rule")
    seed: int = option(1337, "for the first weights and the order of windows", least=0, most=2**62)
    device: str = option(BEST_DEVICE, "where to compute", choices=sorted({BEST_DEVICE, "cpu"}))
    # Selection: the paper's part.
    select: str = option("", "rule; default: excess for slm, else all", choices=("", *NEEDS))
    reference: str = option("", "checkpoint or Hugging Face folder of the reference [OUT/ref.pt]")
    ratio: float = option(
        0.5, "share of the corpus's tokens to select (paper: 0.6)", above=0, most=1
    )
    threshold: float | None = option(None, "in place of ratio: all that score above it")
    mix: float = option(
        0.0, "share of windows that are clean text, all trained on", least=0, most=0.9
    )
    fast: bool = option(True, "run model.py's forms of token_loss, selective_loss")
    # The model. The reference may have another shape: it is read from its checkpoint.
    n_layer: int = option(3, "blocks of the model", least=1)
    n_head: int = option(4, "attention heads", least=1)
    n_kv_head: int = option(4, "key-value heads; below n_head: grouped-query attention", least=1)
    n_embd: int = option(128, "channels of the residual stream", least=1)
    n_inner: int = option(384, "channels inside each MLP", least=1)
    qk_norm: bool = option(True, "normalize queries and keys, with which small models learn faster")
    tied: bool = option(False, "use one matrix for embedding and head")
    block_size: int = option(128, "tokens in a window", least=1)
    init: str = option("", "checkpoint or Hugging Face folder to start from")
    # Training. Tokens are counted as seen, trained on or not.
    tokens: int = option(900_000, "tokens that clm and slm read", least=1, most=10**15)
    ref_tokens: int = option(450_000, "tokens that ref reads", least=1, most=10**15)
    sft_tokens: int = option(200_000, "tokens that sft reads", least=1, most=10**15)
    batch_size: int = option(8, "windows in an optimizer step, over all devices", least=1)
    micro_batch: int = option(8, "windows on a device at once; gradients accumulate", least=1)
    optimizer: str = option(
        "muon", "muon for matrices, or adamw for all", choices=("muon", "adamw")
    )
    lr: float = option(7.5e-4, "highest learning rate (tuned for clm)", above=0, most=10)
    lr_end: float = option(0.1, "last learning rate, as a share of lr", least=0, most=1)
    warmup: float = option(0.02, "share of the steps in which lr rises", least=0, most=1)
    weight_decay: float = option(0.1, "decay of the matrices", least=0, most=10)
    clip: float = option(1.0, "largest norm of the gradient", above=0)
    compile: bool | None = option(None, "use torch.compile; default: on CUDA only")
    recompute: bool = option(False, "compute activations again in backward: slower, less memory")
    evals: int = option(9, "evaluations over the run; each renews the checkpoint", least=1)
    eval_windows: int = option(64, "windows of held-out text in an evaluation", least=1)
    questions: int = option(500, "questions of DATA/questions.jsonl in an evaluation", least=0)
    save_minutes: float = option(20, "save at least this often, in minutes", above=0)
    restart: bool = option(False, "start over, and replace the run of this name")

    @property
    def steps(self):
        return max(1, self.tokens // (self.batch_size * self.block_size))


# ==== training ====================================================================================


def train(cfg, process, split):
    """Train one run to its end, resuming where it stopped; returns the records of its log."""
    path = Path(cfg.out, f"{cfg.name}.pt")
    refuse_other_flags(path, cfg)
    # The text, and the rule's inputs for each of its tokens.
    windows = Windows(cfg, process.meta, split, "ref" if cfg.mix else None)
    held_out = [Windows(cfg, process.meta, name) for name in ("val", "val_corpus")]
    inputs = rule_inputs(cfg, process, windows)

    # All runs of a seed start from the same weights.
    torch.manual_seed(cfg.seed)
    model = first_model(cfg, process)
    optimizers = make_optimizers(cfg, model)
    first_step = 0
    sums = new_sums()

    # There may already be a run of this name: finished, interrupted, or a different one.
    identity = run_identity(cfg, process, model, windows, inputs)
    records = [header(cfg, process, model, identity)]
    saved = checkpoint_to_resume(path, identity, cfg)
    if saved:
        first_step, records, sums = restore(path, process, saved, model, optimizers)
    announce(process, path, windows, records, first_step, cfg.steps)

    # forward() returns hidden states, and the losses below apply the head, outside of DDP. The
    # head's gradient is exchanged all the same: DDP's hooks sit on the parameters.
    wrapped = model
    if process.world > 1:
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    if cfg.compile or (cfg.compile is None and process.cuda):
        wrapped = torch.compile(wrapped)
    generator = torch.Generator(process.device)
    eval_steps = {round(cfg.steps * (i + 1) / cfg.evals) for i in range(cfg.evals)}
    last_save = time.time()
    process.finish_step = True

    step_tokens = cfg.batch_size * cfg.block_size
    for step in process.bar(range(first_step, cfg.steps), cfg.name, step_tokens):
        started = time.time()
        step_windows = batch(windows.n, cfg.batch_size, cfg.seed, step, cfg.mix, windows.n_clean)
        my_windows = process.share(step_windows)
        # Sums: loss of the selected tokens, loss of all tokens, the mask, how many tokens the mask
        # lets through, how many of these are in the corpus.
        step_sums = torch.zeros(5, device=process.device)

        for start in range(0, len(my_windows), cfg.micro_batch):
            ids = my_windows[start : start + cfg.micro_batch]
            x, y, valid, corpus, rule_values = fetch(process, windows, inputs, ids)
            # For --select random: a resumed run draws the same numbers.
            generator.manual_seed(hash((cfg.seed, step, start, process.rank)) % 2**62)
            is_last = start + cfg.micro_batch >= len(my_windows)

            with gradient_exchange(process, wrapped, is_last), process.precision:
                hidden = wrapped(x).to(process.dtype)  # (B, T, C): logits are model.head(hidden)

                # 1. The student's loss on every token. (The fast form makes no gradient, but saves
                #    what step 4 needs for it.)
                if cfg.fast:
                    student_loss, saved_for_gradient = all_losses(
                        hidden, model.lm_head.weight, y
                    )  # (B, T)
                else:
                    student_loss = token_loss(model.head(hidden), y)  # (B, T)
                check_finite(student_loss, f"{cfg.name}: the loss", f"step {step}, windows {ids}")
                # 2. What each token of the corpus is worth.
                corpus_loss = student_loss[corpus]  # (windows of the corpus, T)
                score = score_tokens(cfg.select, corpus_loss, **rule_values, generator=generator)
                # 3. The tokens to train on: the best of the corpus, and all of clean windows.
                chosen = select_tokens(score, cfg.ratio, cfg.threshold, valid[corpus])
                check_mask(chosen, corpus_loss)
                mask = torch.ones_like(student_loss, dtype=chosen.dtype)  # (B, T)
                mask[corpus] = chosen
                # 4. The loss on those tokens. Equation 3's mean is turned back into a sum: it is
                #    `take_step` that divides, by the number selected in the whole batch, over all
                #    micro-batches and ranks. (Fast: makes the gradient of these tokens only.)
                if cfg.fast:
                    loss = selected_loss(hidden, model.lm_head.weight, y, mask, saved_for_gradient)
                else:
                    loss = selective_loss(student_loss, mask) * mask.sum()
            loss.backward()

            losses = [loss.detach(), student_loss.detach().sum()]
            counts = [mask.sum(), (mask > 0).sum(), (chosen > 0).sum()]
            step_sums += torch.stack(losses + counts)

        process.all_reduce(step_sums)
        selected_sum, all_sum, mask_sum, n_trained, n_of_corpus = step_sums.tolist()
        # If no token was selected there is nothing to learn. A step would still move the weights,
        # by momentum and weight decay: so none is made.
        if mask_sum > 0:
            sums["grad_norm"] = take_step(cfg, process, model, optimizers, step, mask_sum)
        model.zero_grad()
        sums["loss_of_selected"] += selected_sum
        sums["loss_of_all"] += all_sum
        sums["mask"] += mask_sum
        sums["trained"] += round(n_trained)
        sums["seconds"] += time.time() - started
        if (step_windows < windows.n).any() and n_of_corpus == 0:
            sums["empty_steps"] += 1

        if step + 1 in eval_steps:
            record = training_record(cfg, step + 1, sums, records[-1])
            if process.rank == 0:
                record = {**record, **evaluate(cfg, process, model, held_out, path, step + 1)}
            records.append(record)
            report(process, cfg, records)
            sums = new_sums(sums["trained"], sums["seconds"])
        # All ranks must save, and stop, at the same step.
        stop, overdue = process.any(
            process.stop_signal > 0, time.time() > last_save + 60 * cfg.save_minutes
        )
        if stop or overdue or step + 1 in eval_steps:
            if process.rank == 0:
                save_run(
                    path, process, model, optimizers, identity, step + 1, cfg.steps, records, sums
                )
            last_save = time.time()
        if stop:
            raise Interrupted(process.stop_signal or signal.SIGTERM)
    return records


def fetch(process, windows, inputs, ids):
    """Windows on the device: inputs and targets (B, T), and what is known of them.

    valid (B, T): what may be trained on. corpus (B,): which windows are of the corpus, the others
    are clean text (--mix). The rule's inputs are of the former alone: clean text is not ranked.
    """
    x, y = windows[ids]
    corpus = ~windows.is_clean(ids)
    rule_values = {}
    valid = windows.valid(ids)
    for name, values in inputs.items():
        of_corpus = torch.from_numpy(values[ids[corpus]]).float()
        # `ref_both` ranks: what may not be trained on comes last.
        rule_values[name] = process.put(of_corpus.masked_fill(~valid[corpus], torch.inf))
    known = [x, y, valid, torch.from_numpy(corpus)]
    return *[process.put(tensor) for tensor in known], rule_values


def gradient_exchange(process, wrapped, is_last):
    """Until the last micro-batch of a step, gradients only add up on each rank."""
    if is_last or process.world == 1:
        return nullcontext()
    return wrapped.no_sync()


def check_fast_form(n_vocab):
    """InputError unless the fast forms compute what token_loss and selective_loss compute."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 128, 16, generator=generator)  # (B, T, C)
    head = torch.randn(n_vocab, 16, generator=generator)  # (V, C)
    # Random targets are hard. Every other one is what these hidden states predict: easy.
    targets = torch.randint(n_vocab, (2, 128), generator=generator)
    targets[:, ::2] = (hidden[:, ::2] @ head.T).argmax(-1)
    hidden.requires_grad_()
    weights = torch.rand(2, 128, generator=generator)
    # Half of the tokens, few, one, none; and weights.
    for mask in (weights < 0.5, weights < 0.05, weights == weights.min(), weights < 0, weights):
        losses, saved_for_gradient = all_losses(hidden, head, targets)
        loss = selected_loss(hidden, head, targets, mask, saved_for_gradient)
        plain_losses = token_loss(hidden @ head.T, targets)
        plain_loss = selective_loss(plain_losses, mask) * mask.sum()
        gradient, plain_gradient = [torch.autograd.grad(x, hidden)[0] for x in (loss, plain_loss)]
        pairs = [(losses, plain_losses), (loss, plain_loss), (gradient, plain_gradient)]
        if not all(torch.allclose(fast, plain, atol=1e-3) for fast, plain in pairs):
            raise InputError(
                "token_loss or selective_loss was changed: add --fast false to run them"
            )


def check_mask(mask, loss):
    """InputError if what select_tokens returned is no mask and no weights for these tokens."""
    if mask.shape != loss.shape:
        raise InputError(f"select_tokens gave {tuple(mask.shape)} for {tuple(loss.shape)} tokens")
    if mask.dtype != torch.bool and not (mask >= 0).all():
        raise InputError("select_tokens gave a weight that is negative or NaN")


def check_finite(values, what, where):
    """InputError if a loss, score, norm or weight is NaN or infinite."""
    if not torch.isfinite(values).all():
        raise InputError(f"{what} is not finite at {where}. The last checkpoint is intact")


def take_step(cfg, process, model, optimizers, step, mask_sum):
    """One optimizer step on gradients of a sum; returns the gradient's norm before clipping."""
    # The mean of equation 3 is formed here, where the number of selected tokens of the whole batch
    # is known: a mean for each micro-batch would become a mean of means.
    # Times process.world: that undoes DDP's average over the ranks.
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad *= process.world / mask_sum
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
    check_finite(norm, f"--lr {cfg.lr}: the gradient's norm", f"step {step}")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step, cfg.steps)
        optimizer.step()
    return norm.item()


def new_sums(trained=0, seconds=0.0):
    """Sums since the last evaluation. `trained` and `seconds` are since the start of the run."""
    return {
        "loss_of_selected": 0.0,
        "loss_of_all": 0.0,
        "mask": 0.0,
        "empty_steps": 0,  # steps in which no token of the corpus was selected
        "grad_norm": 0.0,  # of the last step, no sum
        "trained": trained,
        "seconds": seconds,
    }


def training_record(cfg, step, sums, before):
    """Training statistics since the record `before`.

    student_loss is the mean over all tokens, selected_loss over the selected ones. Each arm
    averages over different tokens: do not compare arms by them.
    """
    step_tokens = cfg.batch_size * cfg.block_size
    tokens_between = (step - before["step"]) * step_tokens
    return {
        "step": step,
        "tokens": step * step_tokens,
        "lr": learning_rate(cfg, step - 1, cfg.steps),
        "trained": sums["trained"],
        "grad_norm": sums["grad_norm"],
        "seconds": round(sums["seconds"], 2),
        "student_loss": sums["loss_of_all"] / tokens_between,
        "selected_loss": sums["loss_of_selected"] / max(sums["mask"], 1e-9),
        "empty_steps": sums["empty_steps"],
    }


# ==== optimizers and learning rate ================================================================


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
    # match_rms_adamw scales Muon's steps to the size of AdamW's: one learning rate serves both.
    muon = {"lr": cfg.lr, "weight_decay": cfg.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
    return [torch.optim.Muon(matrices, **muon), torch.optim.AdamW(rest, **adamw)]


def learning_rate(cfg, step, steps):
    """Linear warm-up to lr, then half a cosine down to lr * lr_end."""
    warmup_steps = max(1, round(cfg.warmup * steps))
    if step < warmup_steps:
        return cfg.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    cosine = 0.5 + 0.5 * math.cos(math.pi * progress)  # from 1 to 0
    return cfg.lr * (cfg.lr_end + (1 - cfg.lr_end) * cosine)


# ==== data ========================================================================================


class Windows:
    """A token file cut into fixed windows: window i predicts tokens i * T + 1 ... i * T + T.

    So a token is a target once per epoch, always in the same context, and one stored reference
    loss per token is enough. Windows ignore the borders of documents, and attention crosses
    them, as usual in pre-training. windows[ids] returns (inputs, targets), (B, T) int64, for B
    window numbers. With --mix, numbers from n on are windows of the clean text.
    """

    def __init__(self, cfg, meta, split, clean_split=None):
        self.path = Path(cfg.data) / f"{split}.bin"
        self.T = cfg.block_size
        self.tokens, self.n = self.open_split(cfg, meta, split)
        self.n_clean = 0
        if clean_split:
            self.clean_tokens, self.n_clean = self.open_split(cfg, meta, clean_split)
        # Text for fine-tuning has a mask: 1 where a token belongs to an answer.
        self.answers = None
        mask_path = Path(cfg.data) / f"{split}_mask.bin"
        if mask_path.exists():
            self.answers = np.memmap(mask_path, dtype=np.uint8, mode="r")

    def open_split(self, cfg, meta, split):
        """The tokens of a split, and how many windows they are."""
        path = Path(cfg.data) / f"{split}.bin"
        if split not in meta["tokens"]:
            raise InputError(f"{path} is not there: see python prepare_data.py -h, --{split}")
        n_tokens = meta["tokens"][split]
        n = (n_tokens - 1) // self.T
        if n < 1:
            raise InputError(
                f"{path}: {n_tokens} tokens are not one window (--block_size {self.T})"
            )
        return np.memmap(path, dtype=meta["dtype"], mode="r"), n

    def positions(self, ids):
        first = np.asarray(ids)[:, None] * self.T
        return first + np.arange(self.T + 1)  # (B, T + 1)

    def is_clean(self, ids):
        """Which windows are of the clean text, a bool array (B,)."""
        return np.asarray(ids) >= self.n

    def __getitem__(self, ids):
        ids = np.asarray(ids)
        is_clean = self.is_clean(ids)
        tokens = np.empty((len(ids), self.T + 1), np.int64)
        tokens[~is_clean] = self.tokens[self.positions(ids[~is_clean])]
        if is_clean.any():
            tokens[is_clean] = self.clean_tokens[self.positions(ids[is_clean] - self.n)]
        tokens = torch.from_numpy(tokens)
        return tokens[:, :-1], tokens[:, 1:]  # (B, T), (B, T)

    def valid(self, ids):
        """Which targets may be trained on, bool (B, T): all, or those of answers."""
        if self.answers is None:
            return torch.ones(len(ids), self.T, dtype=torch.bool)
        answers = torch.from_numpy(self.answers[self.positions(ids)].astype(bool))
        return answers[:, 1:]


@lru_cache(maxsize=4)  # a step can lie across two epochs, of the corpus and of clean text
def permutation(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


def batch(n, size, seed, step, mix=0.0, n_clean=0):
    """The window numbers (size,) of a step: below n of the corpus, from n on of clean text.

    A pure function of seed and step: all arms of one --mix see the same windows in the same order,
    and a resumed run continues where it stopped. Each epoch of a text has every window once, in an
    order of its own.
    """
    windows = []
    for position in range(step * size, (step + 1) * size):
        clean_before = int(position * mix)
        if int((position + 1) * mix) > clean_before:
            windows.append(n + shuffled(n_clean, seed, clean_before))
        else:
            windows.append(shuffled(n, seed, position - clean_before))
    return np.array(windows)


def shuffled(n, seed, position):
    """The window at a position of the endless order of n windows."""
    return permutation(n, seed, position // n)[position % n]


# ==== the reference's losses, and other inputs of the rules =======================================


def rule_inputs(cfg, process, windows):
    """What the rule needs to know of each target: {name: array (windows.n, T)}, as in NEEDS."""
    inputs = {}
    if "truth" in NEEDS[cfg.select]:
        path = Path(cfg.data) / "kinds.npz"
        kinds_of = np.load(path) if path.exists() else {}
        if windows.path.stem not in kinds_of:
            raise InputError(f"--select oracle: of {windows.path} the truth is not known")
        kinds = kinds_of[windows.path.stem][1 : windows.n * windows.T + 1]  # of the targets
        inputs["truth"] = (kinds == 0).reshape(windows.n, windows.T)  # kind 0: target text
    if needs_reference(cfg.select):
        inputs.update(score_corpus(cfg, process, windows))
    return inputs


def needs_reference(select):
    return any(name in NEEDS[select] for name in ("ref_loss", "ref_entropy"))


def score_corpus(cfg, process, windows):
    """Have the reference score a corpus: {"ref_loss": float16 (windows.n, T), ...}, on disk.

    Only the windows that a run of --tokens sees are scored, and of these what is not scored yet.
    Ranks share the work; the files do not depend on how many they are.
    """
    names = ["ref_loss"]
    if "ref_entropy" in NEEDS.get(cfg.select, []):
        names.append("ref_entropy")
    path = Path(cfg.reference or Path(cfg.out, "ref.pt"))
    reference = open_model(path, cfg, process).eval()
    folder = score_folder(cfg, process, windows, reference)
    files = {name: folder / f"{name}.f16" for name in names}

    with process.only_writer(folder, wait=True):
        if process.rank == 0:
            for file in files.values():
                make_scores(file, windows)
        process.wait()
        scores = {name: open_scores(file, windows) for name, file in files.items()}
        missing = torch.from_numpy(unscored(scores, visited_windows(cfg, windows)))
        # No rank may write before all have looked: they must share out the same windows.
        process.wait()
        my_parts = []
        if not len(missing):
            process.say(f"scored already: {folder}")
        else:
            my_parts = missing.split(cfg.micro_batch)[process.rank :: process.world]
            process.say(f"scoring by {path} -> {folder}")
            for file in files.values():
                checksum_of(file).unlink(missing_ok=True)
        for ids in process.bar(my_parts, "score", cfg.micro_batch * windows.T):
            pair = windows[ids]
            results = score_batch(process, reference, pair, cfg.fast, "ref_entropy" in names)
            for name, values in zip(names, results, strict=True):
                check_finite(values, f"{path}: its {name}", f"windows {ids.tolist()}")
                # With several score files, one may have this window: a run may have begun with it.
                before = scores[name][ids]
                scores[name][ids] = np.where(np.isnan(before), values.cpu().numpy(), before)
        process.wait()
        if process.rank == 0:
            for name, file in files.items():
                scores[name].flush()
                write_checksum(file)
    return scores


def score_folder(cfg, process, windows, reference):
    """Where scores are kept: its name is a hash of what they depend on, so none can be stale."""
    corpus = process.meta["files"][windows.path.name]
    depends_on = [corpus, cfg.block_size, cfg.fast, str(process.dtype)]
    depends_on += [weights_hash(reference), code_hash(GPT)]
    for defined in (Windows, score_batch, token_loss):
        # In a notebook a function may have been put in the place of one of these.
        depends_on.append(SOURCES.get(defined) or inspect.getsource(defined))
    if not cfg.fast:  # token_loss may use anything in this file
        depends_on.append(code_hash(Config))
    return Path(cfg.out, "scores", sha256(str(depends_on).encode()).hexdigest()[:16])


@torch.no_grad()
def score_batch(process, model, pair, fast=True, entropy=False):
    """[loss of each target in nats (B, T)] and, if asked for, the entropy of each prediction."""
    x, y = [process.put(tensor) for tensor in pair]  # (B, T)
    with process.precision:
        hidden = model(x).to(process.dtype)  # (B, T, C)
        if fast:
            loss, _ = all_losses(hidden, model.lm_head.weight, y, keep=False)  # (B, T)
        else:
            loss = token_loss(model.head(hidden), y)  # (B, T)
        if not entropy:
            return [loss]
        entropies = []
        for row in hidden:  # window by window, for the probabilities take much memory
            probabilities = model.head(row).float().softmax(-1)  # (T, V)
            entropies.append(torch.special.entr(probabilities).sum(-1))  # (T,)
    return [loss, torch.stack(entropies)]


def visited_windows(cfg, windows):
    """The numbers of the windows that a run of --tokens sees, ascending."""
    first_epoch = permutation(windows.n, cfg.seed, 0)
    n_visits = cfg.steps * cfg.batch_size
    return np.sort(first_epoch[: n_visits - int(n_visits * cfg.mix)])


def make_scores(path, windows):
    """Create a score file, if there is none. NaN: not scored yet."""
    if path.exists():
        return
    checksum_of(path).unlink(missing_ok=True)
    blank_window = np.full(windows.T, np.nan, np.float16).tobytes()
    with whole_file(path) as f:
        for _ in range(windows.n):
            f.write(blank_window)


def open_scores(path, windows):
    """A score file as an array (windows.n, T) that can be written to."""
    # np.memmap would extend a shorter file by zeros, which look like scores.
    size = path.stat().st_size
    expected = windows.n * windows.T * 2
    if size != expected:
        raise InputError(f"{path} has {size} bytes, not {expected}. {rescore(path)}")
    if size < 2**30:  # a larger one takes long: --stage check
        check_scores(path)
    return np.memmap(path, np.float16, "r+", shape=(windows.n, windows.T))


def unscored(scores, ids):
    """Those of the windows that a score file lacks."""
    # A window is written at once, so its last token speaks for all.
    lacking = [np.isnan(values[ids, -1]) for values in scores.values()]
    return ids[np.any(lacking, axis=0)]


def checksum_of(path):
    return Path(f"{path}.sha256")


def write_checksum(path):
    if not checksum_of(path).exists():
        with whole_file(checksum_of(path)) as f:
            f.write(file_digest(path).encode())


def check_scores(path):
    """InputError if a finished score file has changed since it was written."""
    checksum = checksum_of(path)
    if checksum.exists() and checksum.read_bytes() != file_digest(path).encode():
        raise InputError(f"{path} is damaged. {rescore(path)}")


def rescore(path):
    return f"Delete the folder {path.parent}; the same command scores again"


# ==== models ======================================================================================


def first_model(cfg, process):
    """The model that a run starts from: --init, or new weights from the seed."""
    # The fields that Config and GPTConfig share.
    shape = {f.name: getattr(cfg, f.name) for f in fields(GPTConfig) if hasattr(cfg, f.name)}
    if cfg.init:
        model = open_model(Path(cfg.init), cfg, process)
        # In a model block_size is the longest sequence, in Config the length of a window.
        shape.pop("block_size")
        for key, wanted in shape.items():
            # A flag left at its default counts as not given.
            if wanted not in (getattr(Config, key), getattr(model.config, key)):
                raise InputError(f"--{key} {wanted}: --init {cfg.init} has another shape. Omit it")
        if Path(cfg.init).is_dir() and cfg.lr > 4e-4:
            process.say(f"--lr {cfg.lr} is for small models from scratch. The paper: 8e-5 for 1 B")
    else:
        n_vocab = process.meta["tokenizer"]["n_vocab"]
        model = GPT(GPTConfig(vocab_size=n_vocab, **shape)).to(process.device)
    model.recompute = cfg.recompute
    return model.train()


def open_model(path, cfg, process):
    """The model of a checkpoint or Hugging Face folder. InputError if it does not fit the data."""
    if not path.exists() and path.suffix != ".pt":
        raise InputError(f"{path} not found: give a checkpoint of rho.py or a Hugging Face folder")
    if not path.exists():
        raise InputError(f"{path} not found. Run: {command_for(path, cfg)}")
    model, checkpoint = load_model(path)
    if not same_tokenizer(process.meta["tokenizer"], model, checkpoint):
        raise InputError(f"{path} has another tokenizer than {cfg.data}. Choose another --data")
    longest = model.config.block_size
    if cfg.block_size > longest:
        raise InputError(f"--block_size {cfg.block_size}: {path} takes at most {longest}")
    if "step" in checkpoint and checkpoint["step"] < checkpoint["steps"]:
        command = checkpoint["records"][0].get("command") or command_for(path, cfg)
        raise InputError(f"{path} has not finished training. Run: {command}")
    identity = checkpoint.get("identity", {})
    clean_text = process.meta["files"].get("ref.bin")
    if identity.get("text") == "ref.bin" and identity["ref.bin"] != clean_text:
        # It may be on purpose: another amount of clean text, say.
        process.say(f"{path} was trained with another ref.bin than that of {cfg.data}")
    return model.to(process.device)


def same_tokenizer(spec, model, checkpoint):
    """Whether the data's tokenizer (spec) is the one that a model was trained with."""
    theirs = checkpoint.get("tokenizer")
    if theirs is None:
        # A folder without a tokenizer.json. At least the number of tokens has to agree.
        return spec["n_vocab"] == model.config.vocab_size
    if "sha256" in spec and "sha256" in theirs:
        # Each has a copy of a tokenizer.json: compare the contents, not the paths.
        return spec["sha256"] == theirs["sha256"]
    return spec == theirs


def command_for(path, cfg):
    """The command that makes a checkpoint, as far as its name tells: see arm_config."""
    here = replace(cfg, out=str(path.parent), init="")
    if cfg.stage in ("ref", "sft"):
        here.tokens = Config.tokens  # arm_config has put these stages' own number there
    stage, *rest = path.stem.split("-")
    flags = ""
    if rest[-1:] == ["mix"]:
        flags = f" --mix {DEMO_MIX}"
        rest = rest[:-1]
    if stage in STAGE_RULES and not rest:
        return command_line(here, stage, flags)
    if stage in STAGE_RULES and rest[0] in NEEDS and len(rest) == 1:
        return command_line(here, stage, f" --select {rest[0]}{flags}")
    if stage == "dynamics":
        return command_line(here, stage)
    if stage not in STAGE_RULES:
        stage = "ref"
    return command_line(here, stage, f" --name {shlex.quote(path.stem)}")


# Flags that belong to one run. The others are of the whole experiment.
OF_ONE_RUN = {"stage", "name", "restart", "select", "reference", "ratio", "threshold", "mix"}


def command_line(cfg, stage, flags=""):
    """The command of another stage of the same experiment."""
    for f in fields(cfg):
        given = getattr(cfg, f.name)
        if f.name not in OF_ONE_RUN and given != f.default:
            flags += f" --{f.name} {shlex.quote(str(given))}"
    return f"{launcher()} rho.py --stage {stage}{flags}"


def launcher():
    world = os.environ.get("WORLD_SIZE", "1")
    return "python" if world == "1" else f"torchrun --nproc_per_node={world}"


def weights_hash(model):
    digest = sha256(repr(model.config).encode())
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


# ==== evaluation ==================================================================================


def held_out_losses(cfg, process, model, windows):
    """The loss of each token of the first --eval_windows windows (windows, T), in nats."""
    ids = torch.arange(min(cfg.eval_windows, windows.n))
    losses = []
    for part in ids.split(cfg.micro_batch):
        # By model.py's loss, also with --fast false: an edited token_loss must not measure itself.
        losses.append(score_batch(process, model, windows[part])[0])
    return torch.cat(losses)


def evaluate(cfg, process, model, held_out, path, step):
    """What arms are compared on: the mean loss of held-out tokens, selected or not, and answers.

    The tokens are those of the first --eval_windows windows. The single losses on corpus text go to
    OUT/<run>/<step>.npy.
    """
    started = time.time()
    model.eval()
    target_text, corpus_text = held_out
    target_losses = held_out_losses(cfg, process, model, target_text)
    losses = held_out_losses(cfg, process, model, corpus_text)
    record = {"val_loss": target_losses.mean().item(), "val_corpus_loss": losses.mean().item()}

    question_path = Path(cfg.data, "questions.jsonl")
    if cfg.questions and question_path.exists():
        questions = load_questions(question_path, cfg.questions)
        encoding = get_tokenizer(process.meta["tokenizer"])
        rows = 2**16 // cfg.block_size  # 65,536 tokens at once
        answers = answer_questions(
            model, encoding, questions, batch_size=rows, progress=sys.stderr.isatty()
        )
        record["right"] = sum(answer["correct"] for answer in answers)
        record["questions"] = len(answers)

    folder = path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / f"{step}.npy") as f:
        np.save(f, losses.half().cpu().numpy())
    model.train()
    if step == cfg.steps:  # by which the table knows whether another run used this very model
        record["weights"] = weights_hash(model)
    record["eval_seconds"] = round(time.time() - started, 2)
    return record


def report(process, cfg, records):
    """One line on the screen for the last evaluation, and a warning if nothing was selected."""
    if process.rank > 0:
        return
    last = records[-1]
    parts = [f"{cfg.name:>11}", f"{last['tokens']:>9,} tokens"]
    parts.append(f"target loss {last['val_loss']:.3f}")
    parts.append(f"corpus loss {last['val_corpus_loss']:.3f}")
    if "right" in last:
        parts.append(f"{last['right']:>3} of {last['questions']} right")
    parts.append(f"{total_seconds(records):.0f} s")
    process.say("  ".join(parts))
    if last["empty_steps"]:
        rule = f"--select {cfg.select}, ratio {cfg.ratio}, threshold {cfg.threshold}"
        then = "trained on clean text alone" if cfg.mix else "were not made"
        empty = f"{last['empty_steps']} steps selected no token and {then}"
        process.say(f"{cfg.name}: {empty} ({rule})")


def total_seconds(records):
    """Training and evaluating, since the start of a run."""
    return records[-1]["seconds"] + sum(record["eval_seconds"] for record in records[1:])


# ==== identity of a run, resuming, saving =========================================================

# Flags whose value is no part of a run's identity. For init and reference the weights count, for
# data the files, for ref_tokens and sft_tokens what `arm_config` has copied to tokens.
NOT_IDENTITY = {
    *("stage", "data", "out", "name", "reference", "init", "ref_tokens", "sft_tokens"),
    *("compile", "recompute", "restart", "save_minutes"),
}


# The code is read when this program begins: whoever edits a file while it runs does not change what
# it executes. {object: the text of its file}, {object: its own text}.
FILES = {
    defined: Path(inspect.getsourcefile(defined)).read_text()
    for defined in (Config, GPT, answer_questions)
}
SOURCES = {defined: inspect.getsource(defined) for defined in (Windows, score_batch, token_loss)}


def code_hash(*objects):
    """A hash of the files that define the objects. Comments and docstrings may change."""
    digest = sha256()
    for defined in objects:
        digest.update(code_alone(FILES[defined]).encode())
    return digest.hexdigest()[:16]


@lru_cache
def code_alone(text):
    """The syntax tree of a file's text, written out, without comments and docstrings."""
    try:
        tree = ast.parse(text)
    except SystemError as error:  # so CPython says that a signal came while it was parsing
        raise KeyboardInterrupt from error
    for node in ast.walk(tree):
        may_have_docstring = isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module))
        if may_have_docstring and ast.get_docstring(node):
            node.body = node.body[1:]
    return ast.dump(tree)


def inputs_hash(cfg, windows, inputs):
    """A hash of what the rule is given, from about a thousand windows spread over the run."""
    visited = visited_windows(cfg, windows)
    sample = visited[:: max(1, len(visited) // 1000)]
    digest = sha256()
    for values in inputs.values():
        digest.update(np.ascontiguousarray(values[sample]).tobytes())
    return digest.hexdigest()[:16]


def run_identity(cfg, process, model, windows, inputs):
    """Everything that must be equal for a run to be resumed, or to be called finished."""
    settings = {key: value for key, value in asdict(cfg).items() if key not in NOT_IDENTITY}
    return {
        **settings,
        "text": windows.path.name,
        "number of processes": process.world,
        "first weights": weights_hash(model),
        "scores of the reference": inputs_hash(cfg, windows, inputs),
        "code of rho.py, model.py or eval_math.py": code_hash(Config, GPT, answer_questions),
        **process.meta["files"],
    }


def checkpoint_to_resume(path, identity, cfg):
    """The checkpoint to resume; None if there is none. InputError if it belongs to another run."""
    if cfg.restart or not path.exists():
        return None
    saved = load_checkpoint(path)
    saved_identity = saved.get("identity", {})
    differing = []
    for key in {**identity, **saved_identity}:
        if saved_identity.get(key) == identity.get(key):
            continue
        if hasattr(cfg, key):
            differing.append(f"--{key} was {saved_identity.get(key)}")
        else:
            differing.append(key)
    if differing:
        raise InputError(another_run(path, differing))
    return saved


def refuse_other_flags(path, cfg):
    """InputError if the log has other flags: to be told before the corpus is scored, not after."""
    log = path.with_suffix(".jsonl")
    if cfg.restart or not (path.exists() and log.exists()):
        return
    flags = read_log(log)[0].get("config")
    if flags is None:
        raise damaged_log(log)
    differing = []
    for key, mine in asdict(cfg).items():
        if key not in NOT_IDENTITY and flags.get(key) != mine:
            differing.append(f"--{key} was {flags.get(key)}")
    if differing:
        raise InputError(another_run(path, differing))


def another_run(path, differing):
    what = ", ".join(differing[:3])
    choice = "Give this one another --name or --out, or --restart to replace it"
    return f"{path} is another run ({what}). {choice}"


def restore(path, process, saved, model, optimizers):
    """Load a checkpoint's state; returns the step to begin with, its records and its sums."""
    if process.rank == 0:
        save_log(path, saved["records"])  # it may have been killed before it wrote its log
    model.load_state_dict(saved["model"])
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    return saved["step"], saved["records"], saved["sums"]


def save_run(path, process, model, optimizers, identity, step, steps, records, sums):
    """Write the checkpoint and the log, each whole or not at all."""
    for parameter in model.parameters():
        check_finite(parameter.detach(), f"{path}: a weight", f"step {step}")
    state = {
        "model": model.state_dict(),
        "model_config": asdict(model.config),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "identity": identity,
        "tokenizer": process.meta["tokenizer"],
        "step": step,
        "steps": steps,
        "records": records,
        "sums": sums,
    }
    # The checkpoint first: a run that is killed in between, or that finds the disk full, writes the
    # log when it resumes, and one that is to be replaced stays whole with its log.
    with whole_file(path) as f:
        torch.save(state, f)
    save_log(path, records)
    # A run that this one has replaced may have been evaluated at other steps.
    evaluated = {f"{record['step']}.npy" for record in records}
    for losses in path.with_suffix("").glob("*.npy"):
        if losses.name not in evaluated:
            losses.unlink()


def save_log(path, records):
    with whole_file(path.with_suffix(".jsonl")) as f:
        for record in records:
            f.write(f"{json.dumps(record)}\n".encode())


def header(cfg, process, model, identity):
    """The first record of a log: what is run, with what, and where."""
    typed = re.sub(r" --restart(=\w+| true| false)?\b", "", shlex.join(sys.argv))
    return {
        "run": cfg.name,
        "command": f"{launcher()} {typed}",
        "config": asdict(cfg),
        "model": asdict(model.config),
        "params": model.num_params(),
        "commit": git_commit(),
        "steps": cfg.steps,
        **models_before(cfg),
        # What must be equal for two runs to be compared, besides the flags: see the table.
        "identity": {k: v for k, v in identity.items() if not hasattr(cfg, k)},
        "torch": str(torch.__version__),
        "device": str(process.device),
        "threads": torch.get_num_threads(),
        "world": process.world,
        "step": 0,
    }


def models_before(cfg):
    """Of the models that a run needs {checkpoint: tokens}, part of its cost, and their weights."""
    tokens = {}
    weights = {}
    paths = [cfg.reference, cfg.init]
    # One file counts once, however its path is written.
    for path in {os.path.realpath(path): path for path in paths if path}.values():
        name = os.path.normpath(path)
        if Path(path).is_dir():  # of a Hugging Face folder the tokens are not known
            tokens[name] = None
            continue
        records = load_checkpoint(path)["records"]
        tokens.update(records[0].get("models_before", {}))
        weights.update(records[0].get("weights_before", {}))
        tokens[name] = records[-1]["tokens"]
        weights[name] = records[-1].get("weights")
    return {"models_before": tokens, "weights_before": weights}


def git_commit():
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    except FileNotFoundError:  # git is not installed
        return "unknown"


def announce(process, path, windows, records, first_step, steps):
    """Print what is about to run, or that it has finished already."""
    first = records[0]
    if first_step == steps:
        process.say(f"{path}: finished already, by the same code with the same flags and data")
        return
    begins = "starts"
    if first_step > 0:
        begins = f"resumes at step {first_step}"
    size = f"{first['params'] / 1e6:.2f} M parameters on {first['device']}"
    process.say(f"{first['run']}: {size}, {steps} steps over {windows.path} -> {path}; {begins}")


# ==== device, precision, ranks ====================================================================


class Process:
    """Where this process runs: its device, its precision, its rank and the number of ranks."""

    def __init__(self, cfg):
        self.data = cfg.data
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.stop_signal = 0
        self.finish_step = False  # a signal waits for the end of the training step
        self.device = torch.device(cfg.device)
        self.cuda = self.device.type == "cuda"
        if self.cuda:
            # From here on "cuda" means this GPU.
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            torch.set_float32_matmul_precision("high")  # TF32
        bf16 = self.cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.precision = torch.autocast(self.device.type, self.dtype, enabled=bf16)
        if self.world > 1 and not dist.is_initialized():
            # Imported later, its functions' defaults would hold this group, and destroying it
            # would not end gloo's threads: they would crash at the exit.
            import torch.distributed.nn as _  # noqa: F401

            backend = "nccl" if self.cuda else "gloo"
            # A long timeout, since all ranks wait while rank 0 evaluates.
            dist.init_process_group(backend, timeout=timedelta(hours=3))

    @cached_property
    def meta(self):
        return load_meta(self.data)

    def share(self, step_windows):
        """This rank's part of a step's windows.

        Pieces, not every n-th: with --mix clean windows come at intervals, and one rank could get
        them all.
        """
        return np.split(step_windows, self.world)[self.rank]

    def put(self, tensor):
        """The tensor on the device. From pinned memory it is copied while the device computes."""
        if self.cuda:
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def all_reduce(self, tensor):
        """Sum a tensor over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)

    def any(self, *flags):
        """For each flag, whether it is set on any rank."""
        if self.world == 1:
            return flags
        counts = torch.tensor([float(flag) for flag in flags], device=self.device)
        dist.all_reduce(counts)
        return [count > 0 for count in counts.tolist()]

    def wait(self):
        """Wait until all ranks are here."""
        if self.world > 1:
            dist.barrier()

    def only_writer(self, path, wait=False):
        """Keep other processes from writing PATH: rank 0 holds a lock for all ranks."""
        if self.rank > 0:
            return nullcontext()
        return only_writer(path, wait)

    def say(self, message):
        if self.rank == 0:
            tqdm.write(message)

    def bar(self, steps, name, tokens_per_step):
        hide = None  # to tqdm: hide if the output is no terminal
        if self.rank > 0:
            hide = True
        return tqdm(steps, name, unit="tok", unit_scale=tokens_per_step, disable=hide, leave=False)

    def on_signal(self, number, frame):
        """Ctrl-C or SIGTERM: a training run finishes its step, saves and stops. Twice: at once."""
        if self.stop_signal or not self.finish_step:
            raise Interrupted(number)
        self.stop_signal = number
        self.say("stopping after this step (once more: at once, without saving)")


# ==== logs and the table ==========================================================================


def damaged_log(path):
    """The error to raise for a log that cannot be read."""
    return InputError(f"{path} is damaged. Delete it: the command that made it writes it again")


def read_log(path):
    """The records of a log: first its header, then one for each evaluation."""
    try:
        records = [json.loads(line) for line in Path(path).read_text().splitlines()]
    except ValueError as error:
        raise damaged_log(path) from error
    if not records or not all(isinstance(record, dict) for record in records):
        raise damaged_log(path)
    return records


def read_runs(folder):
    """{name: records} of all runs in a folder that were evaluated, ref and clm first."""
    runs = {}
    for path in sorted(Path(folder).glob("*.jsonl")):
        records = read_log(path)
        if len(records) > 1 and "config" in records[0]:
            runs[path.stem] = records
    usual = ("ref", "clm", "clm-mix", "slm-random", "slm", "slm-oracle", "slm-mix")
    first = [name for name in usual if name in runs]
    others = [name for name in runs if name not in first]
    return {name: runs[name] for name in [*first, *others]}


def value(record, key):
    """One number of a record; "right" in percent of the questions asked."""
    if key == "right":
        return 100 * record["right"] / record["questions"]
    return record[key]


def tokens_to_reach(records, goal_record, key):
    """How many tokens a run had seen when it reached the goal for good; None if it ends behind.

    For good: from that evaluation on it never falls behind the goal. One lucky evaluation, as of an
    untrained model, does not count.
    """
    sign = 1 if key == "right" else -1  # more answers are better, and less loss
    goal = sign * value(goal_record, key)
    reached = None
    for record in reversed(records[1:]):
        if sign * value(record, key) < goal:
            break
        reached = record["tokens"]
    return reached


# The flags that two runs may differ in and still be compared: those that the comparison is about,
# and those of where and how a run is computed.
MAY_DIFFER = {
    *("select", "ratio", "threshold", "reference", "mix"),
    *("stage", "name", "out", "data", "device", "fast", "compile", "recompute"),
    *("restart", "save_minutes", "evals", "ref_tokens", "sft_tokens"),
}


# The reference may be another model on other text: of it only the measurement has to be the same.
OF_MEASUREMENT = {"eval_windows", "questions", "block_size", "val.bin", "val_corpus.bin"}


def why_not_comparable(records, clm):
    """The reasons, in words, for which a run must not be compared with CLM; mostly none."""
    header, clm_header = records[0], clm[0]
    is_reference = header.get("run") == "ref"
    reasons = []
    for key, clm_value in clm_header["config"].items():
        mine = header["config"].get(key)
        matters = key not in MAY_DIFFER
        if is_reference:
            matters = key in OF_MEASUREMENT
        if matters and mine != clm_value:
            reasons.append(f"{key} {shown(mine)}, not {shown(clm_value)}")
    # Beyond the flags: the text, the data's files, the first weights, the number of processes.
    mine, theirs = header.get("identity", {}), clm_header.get("identity", {})
    for key in theirs:
        matters = not key.startswith(("scores", "code"))
        if is_reference:
            matters = key in OF_MEASUREMENT
        if matters and mine.get(key) != theirs[key]:
            reasons.append(f"different {key}")
    if records[-1]["step"] < header.get("steps", 0):
        reasons.append("unfinished")
    return reasons


def shown(setting):
    return "none" if setting == "" else setting


def table_rows(runs):
    """The table of {name: records} as rows of strings, the header first."""
    titles = ["run", "tokens seen", "in all", "trained on", "target loss", "corpus loss", "right"]
    rows = [[*titles, "seconds"]]
    for name, records in runs.items():
        last = records[-1]
        right = "-"
        if "right" in last:
            right = f"{last['right']} of {last['questions']}"
        in_all = f"{tokens_in_all(records):,}"
        if None in records[0].get("models_before", {}).values():
            in_all += " + ?"
        mark = ""
        if "clm" in runs and why_not_comparable(records, runs["clm"]):
            mark = " *"
        rows.append(
            [
                name + mark,
                f"{last['tokens']:,}",
                in_all,
                f"{last['trained']:,}",
                f"{last['val_loss']:.3f}",
                f"{last['val_corpus_loss']:.3f}",
                right,
                f"{total_seconds(records):.0f}",
            ]
        )
    return rows


def tokens_in_all(records):
    """Tokens seen by a run, by its reference, and by the model that it started from."""
    before = records[0].get("models_before", {}).values()
    return records[-1]["tokens"] + sum(tokens or 0 for tokens in before)


def table_notes(runs):
    """When each run reached CLM's final results, and which runs cannot be compared with CLM."""
    notes = models_replaced(runs)
    if "clm" not in runs:
        return [*notes, "no run named clm to compare with"]
    clm = runs["clm"]
    if why_not_comparable(clm, clm):
        return [*notes, "clm is unfinished: nothing can be compared with it yet"]
    for name, records in runs.items():
        reasons = why_not_comparable(records, clm)
        if reasons:
            notes.append(f"* {name} cannot be compared with clm: {'; '.join(reasons)}")
            continue
        if name in ("ref", "clm"):
            continue
        if code_of(records) != code_of(clm):
            notes.append(f"{name} was run by other code than clm. If that affects clm, rerun it")
        mine, clms = [log[0]["config"].get("mix", 0) for log in (records, clm)]
        if mine != clms:
            notes.append(f"{name} has {mine:.0%} clean text in its corpus, clm {clms:.0%}")
        for key, words in {"right": "accuracy", "val_loss": "target loss"}.items():
            # A goal of 0 right answers is reached by every run: skip it.
            if key in records[-1] and clm[-1].get(key):
                notes.append(reach_note(name, records, clm, key, words))
    return notes


def models_replaced(runs):
    """Of each run that was made with a model of this folder which has been trained again since."""
    notes = []
    for name, records in runs.items():
        here = os.path.normpath(records[0]["config"].get("out", ""))
        for path, weights in records[0].get("weights_before", {}).items():
            folder, file = os.path.split(path)
            model = runs.get(Path(file).stem)
            if folder == here and model and weights != model[-1].get("weights"):
                notes.append(f"{name} was made with another {file} than the one above")
    return notes


def code_of(records):
    identity = records[0].get("identity", {})
    return [value for key, value in identity.items() if key.startswith("code")]


def reach_note(name, records, clm, key, words):
    tokens = tokens_to_reach(records, clm[-1], key)
    if tokens is None:
        return f"{name} does not reach clm's final {words}"
    if tokens == clm[-1]["tokens"]:
        return f"{name} is at clm's final {words} at its last evaluation, at none before"
    times = clm[-1]["tokens"] / tokens
    note = f"{name} is at clm's final {words} after {tokens:,} tokens: {times:.1f} times fewer"
    # What the run needed and clm did not.
    clms = clm[0].get("models_before", {})
    for path, before in records[0].get("models_before", {}).items():
        if path not in clms:
            cost = "those" if before is None else f"{before:,}"
            note += f", {cost} of its reference not counted"
    return note


# What the table reads of each evaluation; of runs that were asked questions also `right`.
EVALUATION = {"step", "tokens", "trained", "seconds", "eval_seconds", "val_loss", "val_corpus_loss"}


def show_table(folder):
    runs = read_runs(folder)
    if not runs:
        raise InputError(f"{folder} holds no runs. Run: python rho.py --out {folder}")
    for name, records in runs.items():
        for record in records[1:]:
            if not record.keys() >= EVALUATION or ("right" in record) != ("questions" in record):
                raise damaged_log(Path(folder, f"{name}.jsonl"))
    rows = table_rows(runs)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print()
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    print()
    print("\n".join(table_notes(runs)))


# ==== stages ======================================================================================


def arm_config(cfg, stage):
    """The configuration of a stage with its defaults filled in, as it is run and logged."""
    select = cfg.select or STAGE_RULES[stage]
    ratio = cfg.ratio
    threshold = cfg.threshold
    if threshold is not None:
        ratio = None
    if select == "all":
        ratio, threshold = 1.0, None
    if select == "oracle":
        ratio, threshold = None, 0.5  # the truth is 0 or 1
    usual_name = stage
    if select != STAGE_RULES[stage]:
        usual_name += f"-{select}"
    if cfg.mix:
        usual_name += "-mix"
    reference = ""
    if needs_reference(select):
        reference = cfg.reference or f"{cfg.out}/ref.pt"
    return replace(
        cfg,
        stage=stage,
        name=cfg.name or usual_name,
        select=select,
        ratio=ratio,
        threshold=threshold,
        tokens={"ref": cfg.ref_tokens, "sft": cfg.sft_tokens}.get(stage, cfg.tokens),
        reference=reference,
    )


def flags_without_effect(cfg, stage):
    """What to say of flags that were given to a training stage and do nothing in it."""
    arm = arm_config(cfg, stage)
    notes = []
    if cfg.ratio != Config.ratio and arm.ratio != cfg.ratio:
        why = "every token is trained on"
        if cfg.threshold is not None:
            why = "--threshold takes its place"
        if arm.select == "oracle":
            why = "--select oracle knows which tokens"
        notes.append(f"--ratio {cfg.ratio} has no effect: {why}")
    if cfg.reference and not arm.reference:
        notes.append(f"--reference {cfg.reference} has no effect: {arm.name} needs none")
    if stage in ("ref", "sft") and cfg.tokens != Config.tokens:
        notes.append(f"--tokens {cfg.tokens} has no effect: --stage {stage} has --{stage}_tokens")
    return notes


def train_arm(cfg, process, stage):
    """Run one training stage; returns the records of its log."""
    if cfg.stage != "all":  # whose flags are of several arms
        for note in flags_without_effect(cfg, stage):
            process.say(note)
    cfg = arm_config(cfg, stage)
    split = {"ref": "ref", "sft": "sft"}.get(stage, "train")
    path = Path(cfg.out, f"{cfg.name}.pt")
    if cfg.fast:
        check_fast_form(process.meta["tokenizer"]["n_vocab"])
    with process.only_writer(path), catch_signals(process.on_signal):
        try:
            return train(cfg, process, split)
        finally:
            process.finish_step = False


def train_dynamics(cfg, process):
    """Continue a finished CLM run, with and without selection, as the paper continues TinyLlama.

    results/tables.py then sorts the tokens by how their losses moved (section 2.1).
    """
    start = cfg.init or f"{cfg.out}/clm.pt"
    cfg = replace(cfg, init=start, seed=cfg.seed + 1, evals=max(16, cfg.evals))
    train_arm(replace(cfg, name="dynamics-clm", select=""), process, "clm")
    train_arm(replace(cfg, name="dynamics-slm"), process, "slm")


def check_stage(cfg, process):
    """Compare every file of the data and of the runs with its checksum."""
    check_files(cfg.data, process.meta)
    # A score file that is still being written has no checksum yet.
    checksums = sorted(Path(cfg.out).glob("scores/*/*.f16.sha256"))
    scores = [checksum.with_suffix("") for checksum in checksums]
    for path in scores:
        check_scores(path)
    checkpoints = sorted(Path(cfg.out).glob("*.pt"))
    for path in checkpoints:
        load_checkpoint(path)
    files = f"{len(process.meta['files'])} files of {cfg.data}"
    process.say(f"whole: {files}, {len(scores)} score files, {len(checkpoints)} checkpoints")


def check_range(name, given, least, above, most):
    if not math.isfinite(given):
        raise InputError(f"--{name} {given}: must be a finite number")
    if least is not None and given < least:
        raise InputError(f"--{name} {given}: must be at least {least}")
    if above is not None and given <= above:
        raise InputError(f"--{name} {given}: must be above {above}")
    if most is not None and given > most:
        raise InputError(f"--{name} {given}: must be at most {most}")


def check_config(cfg, world):
    """InputError for a value out of its range, or for flags that do not go together."""
    for f in fields(cfg):
        given = getattr(cfg, f.name)
        if type(given) in (int, float):
            limits = f.metadata
            check_range(f.name, given, limits["least"], limits["above"], limits["most"])
    if Path(cfg.name).name != cfg.name or cfg.name == "..":
        raise InputError(f"--name {cfg.name}: must be a plain name. --out is the folder")
    # The table knows two runs by their names.
    if cfg.name in ("ref", "clm") and (cfg.stage != cfg.name or cfg.mix):
        raise InputError(f"--name {cfg.name}: is the name of the run of --stage {cfg.name}")
    if cfg.stage == "all" and cfg.reference:
        raise InputError("--reference: --stage all trains its own. Use --stage slm")
    if cfg.stage in ("all", "dynamics") and cfg.name:
        raise InputError(f"--name: --stage {cfg.stage} makes several runs. Use --stage slm")
    if cfg.stage == "all" and (cfg.select or cfg.mix or cfg.threshold is not None):
        raise InputError("--select, --threshold and --mix need a single stage: --stage slm")
    if cfg.stage in ("ref", "clm") and cfg.select:
        raise InputError(f"--select: --stage {cfg.stage} trains on every token. Use --stage slm")
    if cfg.stage in ("ref", "clm", "sft") and cfg.threshold is not None and not cfg.select:
        raise InputError(f"--threshold: --stage {cfg.stage} trains on every token, without a rule")
    if cfg.mix and cfg.stage not in ("clm", "slm", "score"):
        raise InputError("--mix: clean text is mixed into the corpus. Use --stage clm or slm")
    if cfg.threshold is not None and cfg.select in ("random", "ref_both", "all", "oracle"):
        raise InputError(
            f"--threshold: the scores of --select {cfg.select} have no unit. Use --ratio"
        )
    if cfg.stage == "sft" and not cfg.init:
        raise InputError("--stage sft needs a checkpoint to start from: --init out/demo/slm.pt")
    if cfg.batch_size % world:
        raise InputError(f"--batch_size {cfg.batch_size}: not a multiple of {world} processes")
    n_tokens = min(cfg.micro_batch, cfg.batch_size // world) * cfg.block_size
    if round(cfg.ratio * n_tokens) < 1:
        raise InputError(f"--ratio {cfg.ratio} selects none of the {n_tokens} in a micro-batch")


def next_command(cfg):
    """What to run after a stage."""
    if cfg.stage in ("slm", "sft") or (cfg.stage == "clm" and cfg.mix):
        return f"python rho.py --stage table --out {shlex.quote(cfg.out)}"
    flags = ""
    if cfg.stage == "ref" and cfg.name:
        flags = f" --reference {shlex.quote(f'{cfg.out}/{cfg.name}.pt')}"
    if cfg.stage == "score":
        for name in ("select", "reference", "mix"):
            if getattr(cfg, name):
                flags += f" --{name} {shlex.quote(str(getattr(cfg, name)))}"
    return command_line(cfg, "slm", flags)


def run_stage(cfg):
    """Carry out --stage."""
    if cfg.stage == "table":
        show_table(cfg.out)
        return
    check_config(cfg, int(os.environ.get("WORLD_SIZE", 1)))
    process = Process(cfg)
    no_demo = cfg.data == Config.data and not Path(cfg.data, "meta.json").exists()
    if process.rank == 0 and no_demo and cfg.stage != "check":
        process.say(f"making the demo's text in {cfg.data}")
        prepare_demo(cfg.data)
    process.wait()
    if cfg.stage == "all":
        for stage, select in (("ref", ""), ("clm", ""), ("slm", "random"), ("slm", "")):
            train_arm(replace(cfg, select=select), process, stage)
        # SLM's rival: the clean text mixed in, for as many tokens as SLM and its reference had.
        in_all = cfg.tokens + cfg.ref_tokens
        train_arm(replace(cfg, mix=DEMO_MIX, tokens=in_all), process, "clm")
        if process.rank == 0:
            show_table(cfg.out)
    elif cfg.stage == "score":
        score_corpus(cfg, process, Windows(cfg, process.meta, "train"))
    elif cfg.stage == "dynamics":
        train_dynamics(cfg, process)
    elif cfg.stage == "check":
        check_stage(cfg, process)
    else:
        train_arm(cfg, process, cfg.stage)
    if cfg.stage in (*STAGE_RULES, "score"):
        process.say(f"next: {next_command(cfg)}")
    # No rank leaves while rank 0 still evaluates.
    process.wait()


# ==== the command line ============================================================================


def whole_number(text):
    """900000, 900_000 and 9e5 are the same number."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
    if not number.is_integer():
        raise ValueError
    return int(number)


def true_or_false(text):
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


# How the text of a flag becomes the value of a field of this type.
READ_AS = {
    str: str,
    int: whole_number,
    float: float,
    float | None: float,
    bool: true_or_false,
    bool | None: true_or_false,
}


def parse(argv):
    """The command line as a Config: every field is a flag."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser("rho.py", description=__doc__, formatter_class=raw, allow_abbrev=False)
    for f in fields(Config):
        settings = {"type": READ_AS[f.type], "default": f.default}
        settings["choices"] = f.metadata["choices"]
        settings["help"] = f"{f.metadata['help']} [{f.default}]".replace("%", "%%")
        if READ_AS[f.type] is true_or_false:
            # --compile alone means --compile true.
            settings.update(nargs="?", const=True, metavar="true|false")
        parser.add_argument(f"--{f.name}", **settings)
    return Config(**vars(parser.parse_args(argv)))


def main(argv=None):
    cfg = parse(argv)
    signal.signal(signal.SIGTERM, raise_interrupted)
    status = 2
    try:
        run_stage(cfg)
        return
    except InputError as error:
        message = str(error)
    except KeyboardInterrupt as stop:
        # A KeyboardInterrupt without a number was Ctrl-C. Shells report 128 + the signal.
        status = 128 + (stop.args[0] if stop.args else signal.SIGINT)
        message = "interrupted; the same command (without --restart) resumes"
    except OSError as error:  # a full disk, a folder that is not writable
        message = f"{error.filename or cfg.out}: {error.strerror or error}"
    except RuntimeError as error:
        # torch has no class of its own for a CPU without memory, nor for what gloo says when
        # another rank is gone.
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            message = "out of memory. Lower --micro_batch, or add --recompute true"
        elif isinstance(error, dist.DistError) or "gloo" in str(error):
            message = f"another process has stopped ({str(error).splitlines()[0]})"
        else:
            raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    print(f"rho.py: {message}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
