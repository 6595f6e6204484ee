"""What a run needs of a card's memory: measured pieces, and from them what fits on 24 and 80 GB.

    python results/memory.py             the pieces and the table: minutes; writes memory.jsonl
    python results/memory.py --check     the sum of the pieces beside the true peak of one step
    python results/memory.py --quick     tiny sizes: does it run? Writes nothing

It is measured on a CPU, in the precision that rho.py has on CUDA: weights, gradients and optimizer
states in float32, products in bfloat16 (autocast). CUDA's kernels keep a little less for the
backward pass, and torch.compile less again: the table is a careful guess, no promise.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from bench import peak_bytes  # noqa: E402

import model as model_py  # noqa: E402
from model import GPT, Block, GPTConfig, rotary_tables  # noqa: E402
from prepare_data import whole_file  # noqa: E402
from rho import Config, make_optimizers  # noqa: E402

GB = 10**9
CARDS = [24, 80]  # GB
USABLE = 0.92  # of a card: the rest is CUDA's own, and gaps between tensors
T = 2048  # tokens in a window, as in the paper's 1 B runs
RATIO = 0.6
MODELS = {
    "SmolLM2 135 M": GPTConfig(
        vocab_size=49152, n_layer=30, n_head=9, n_kv_head=3, n_embd=576, n_inner=1536, tied=True,
        qk_norm=False, block_size=T,
    ),
    "TinyLlama 1.1 B": GPTConfig(
        vocab_size=32000, n_layer=22, n_head=32, n_kv_head=4, n_embd=2048, n_inner=5632,
        qk_norm=False, block_size=T,
    ),
    "Mistral 7 B": GPTConfig(
        vocab_size=32000, n_layer=32, n_head=32, n_kv_head=8, n_embd=4096, n_inner=14336,
        qk_norm=False, block_size=T,
    ),
}  # fmt: skip
TINY = GPTConfig(vocab_size=300, n_layer=2, n_head=2, n_embd=32, n_inner=64, block_size=64)
# A size that this machine can hold, for the check.
SMALL = GPTConfig(
    vocab_size=8192, n_layer=6, n_head=8, n_kv_head=2, n_embd=512, n_inner=1408, qk_norm=False,
    block_size=256,
)  # fmt: skip


# ---- counted pieces ------------------------------------------------------------------------------


def count(config):
    """Parameters (in all, in the matrices of the blocks), without making the model."""
    with torch.device("meta"):
        model = GPT(config)
    matrices = sum(p.numel() for p in model.layers.parameters() if p.dim() == 2)
    return model.num_params(), matrices


def state_bytes(optimizer):
    """Bytes of optimizer state: (for one matrix entry, for one other parameter), measured."""
    model = GPT(TINY)
    optimizers = make_optimizers(Config(optimizer=optimizer), model)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    held = {}
    for part in optimizers:
        part.step()
        for p, state in part.state.items():
            tensors = [value for value in state.values() if torch.is_tensor(value)]
            held[p] = sum(t.nbytes for t in tensors if t.numel() > 1) / p.numel()
    return held[model.layers[0].mlp.up_proj.weight], held[model.lm_head.weight]


# ---- measured pieces -----------------------------------------------------------------------------


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def saved_bytes(function):
    """Bytes of all tensors that autograd keeps for the backward pass of function()."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    del output
    return sum(kept.values())


class OneBlock:
    """A block of a model at its true width, on one window of so many tokens."""

    def __init__(self, config, block, n_tokens):
        self.block = block
        cos, sin = rotary_tables(config)
        self.cos = cos[:n_tokens, None].bfloat16()
        self.sin = sin[:n_tokens, None].bfloat16()
        # The residual stream is float32; here it comes from somewhere that needs a gradient.
        self.x = torch.randn(1, n_tokens, config.n_embd, requires_grad=True)

    def forward(self):
        with autocast():
            return self.block(self.x, self.cos, self.sin, None, None)

    def step(self):
        self.forward().sum().backward()
        self.x.grad = None


def activations(config, n_tokens=16):
    """Bytes for a token of one block: (kept for its backward pass, at the peak of its work).

    Slopes between two lengths, so that weights, which do not grow with tokens, fall out.
    """
    block = Block(config)
    kept, peak = [], []
    for length in (n_tokens, 2 * n_tokens):
        one = OneBlock(config, block, length)
        kept.append(saved_bytes(one.forward))
        peak.append(peak_bytes(one.step))
    kept_slope = (kept[1] - kept[0]) / n_tokens
    peak_slope = (peak[1] - peak[0]) / n_tokens
    # The block's own input is counted with what is kept: every block has one.
    return kept_slope, max(peak_slope, kept_slope)


class OneLoss:
    """Both phases of the loss, in bfloat16, on as many logits as make two blocks."""

    def __init__(self, n_tokens, width, vocabulary):
        self.hidden = torch.randn(n_tokens, width, dtype=torch.bfloat16, requires_grad=True)
        self.head = torch.randn(vocabulary, width, requires_grad=True)
        self.targets = torch.randint(vocabulary, (n_tokens,))
        self.mask = torch.rand(n_tokens) < RATIO

    def step(self):
        loss, kept = model_py.all_losses(self.hidden, self.head, self.targets)
        total = model_py.selected_loss(self.hidden, self.head, self.targets, self.mask, kept)
        total.backward()
        self.hidden.grad = None
        self.head.grad = None


def loss_entry_bytes(n_tokens=256, width=8, vocabulary=8192):
    """Bytes at the loss's peak for each logit that is worked on at once, and for each kept one."""
    before = model_py.CPU_BLOCK, model_py.KEEP
    one = OneLoss(n_tokens, width, vocabulary)
    logits = n_tokens * vocabulary
    try:
        peaks = []
        for block, keep in [(logits // 4, 0), (logits // 2, 0), (logits // 4, logits)]:
            model_py.CPU_BLOCK, model_py.KEEP = block, keep
            peaks.append(peak_bytes(one.step))
    finally:
        model_py.CPU_BLOCK, model_py.KEEP = before
    worked = (peaks[1] - peaks[0]) / (logits // 4)
    kept = (peaks[2] - peaks[0]) / logits
    return worked, kept


# ---- the sum -------------------------------------------------------------------------------------


class Pieces(NamedTuple):
    """Numbers of parameters; then bytes for each parameter, token of a block, logit."""

    parameters: int
    matrices: int  # those in the blocks: what Muon trains, and what is copied to bfloat16
    matrix_state: float
    other_state: float
    kept: float
    peak: float
    worked_logit: float
    kept_logit: float


def measure(config):
    """{optimizer: Pieces} of a model."""
    numbers = count(config)
    block = activations(config)
    loss = loss_entry_bytes()
    found = {}
    for optimizer in ("muon", "adamw"):
        found[optimizer] = Pieces(*numbers, *state_bytes(optimizer), *block, *loss)
    return found


def standing_bytes(pieces, processes=1):
    """What is there all the time: weights, gradients, optimizer states, DDP's copy of gradients."""
    n = pieces.parameters
    weights = 4 * n
    gradients = 4 * n
    matrix_states = pieces.matrix_state * pieces.matrices
    states = matrix_states + pieces.other_state * (n - pieces.matrices)
    buckets = 4 * n if processes > 1 else 0
    return weights + gradients + states + buckets


def loss_bytes(config, pieces, n_tokens, block):
    """The peak of the loss: gradient and copy of the head, hidden states, one block of logits."""
    columns = min(config.vocab_size, max(1, block // n_tokens))  # of a block
    head = config.n_embd * (4 * config.vocab_size + 2 * columns)
    # bfloat16: hidden states, their gradient, the selected rows twice; float32: two gradients.
    rows = n_tokens * config.n_embd * (2 + 2 + RATIO * (2 + 2 + 4 + 4))
    logits = n_tokens * config.vocab_size
    kept = pieces.kept_logit * logits if logits <= model_py.KEEP else 0
    return head + rows + kept + pieces.worked_logit * min(block, logits)


def needed_bytes(config, pieces, micro_batch, recompute, processes=1, block=None):
    """The peak of a step that accumulates: the largest of three moments, over what stands."""
    n_tokens = micro_batch * config.block_size
    block = block or model_py.GPU_BLOCK
    copies = 2 * pieces.matrices  # the matrices in bfloat16
    loss = loss_bytes(config, pieces, n_tokens, block)
    working = n_tokens * pieces.peak
    if recompute:
        stored = config.n_layer * n_tokens * 4 * config.n_embd  # each block's input, float32
        # Autocast holds its copies until the forward pass ends; then they are gone.
        moments = [stored + working + copies, stored + loss]
    else:
        stored = config.n_layer * n_tokens * pieces.kept
        moments = [stored + copies + loss, stored + copies + working - n_tokens * pieces.kept]
    return standing_bytes(pieces, processes) + max(moments)


def largest_micro_batch(config, pieces, card, recompute, processes=1):
    """The largest power of two of windows that fits; 0 if not even one does."""
    largest = 0
    micro_batch = 1
    while micro_batch <= 64:
        needed = needed_bytes(config, pieces, micro_batch, recompute, processes)
        if needed > USABLE * card * GB:
            break
        largest = micro_batch
        micro_batch *= 2
    return largest


# ---- the table -----------------------------------------------------------------------------------


def table(quick):
    """Rows of memory.jsonl: the pieces of each model, then what fits on which card."""
    models = {"tiny": TINY} if quick else MODELS
    for name, config in models.items():
        for optimizer, pieces in measure(config).items():
            yield {
                "model": name,
                "optimizer": optimizer,
                "tokens": config.block_size,
                "standing_gb": gigabytes(standing_bytes(pieces)),
                **{key: round(value, 2) for key, value in pieces._asdict().items()},
            }
            for recompute in (False, True):
                yield from fits(name, config, optimizer, pieces, recompute)


def fits(name, config, optimizer, pieces, recompute):
    """One row for each card, and for one process and several."""
    for card in CARDS:
        for processes in (1, 8):
            largest = largest_micro_batch(config, pieces, card, recompute, processes)
            shown = max(1, largest)
            needed = needed_bytes(config, pieces, shown, recompute, processes)
            yield {
                "model": name,
                "optimizer": optimizer,
                "recompute": recompute,
                "card_gb": card,
                "processes": processes,
                "micro_batch": largest,
                "needed_gb": gigabytes(needed),
                "fits": largest > 0,
            }


def gigabytes(n_bytes):
    return round(n_bytes / GB, 2)


# ---- the check -----------------------------------------------------------------------------------


class Accumulating:
    """rho.py's step on two micro-batches, in the precision of CUDA."""

    def __init__(self, config, optimizer, micro_batch, recompute):
        torch.manual_seed(0)
        self.model = GPT(config)
        self.model.recompute = recompute
        self.optimizers = make_optimizers(Config(optimizer=optimizer), self.model)
        self.x, self.y = torch.randint(config.vocab_size, (2, micro_batch, config.block_size))
        self.mask = torch.rand(self.y.shape) < RATIO

    def step(self):
        head = self.model.lm_head.weight
        for _ in range(2):
            with autocast():
                hidden = self.model(self.x).bfloat16()
            _, kept = model_py.all_losses(hidden, head, self.y)
            loss = model_py.selected_loss(hidden, head, self.y, self.mask, kept)
            del hidden, kept
            loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad()

    def standing(self):
        """Weights and states, which are there before a step and after it."""
        total = sum(p.nbytes for p in self.model.parameters())
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                total += sum(value.nbytes for value in state.values() if torch.is_tensor(value))
        return total


def check(quick):
    """Rows: the sum of the pieces beside the peak that torch counts in a true step."""
    config = TINY if quick else SMALL
    for optimizer, pieces in measure(config).items():
        for recompute in (False, True):
            for micro_batch in (1, 4):
                true = Accumulating(config, optimizer, micro_batch, recompute)
                peak = peak_bytes(true.step) + true.standing()
                block = model_py.CPU_BLOCK
                summed = needed_bytes(config, pieces, micro_batch, recompute, block=block)
                yield {
                    "check": f"{config.n_layer} x {config.n_embd}, {config.block_size} tokens",
                    "optimizer": optimizer,
                    "recompute": recompute,
                    "micro_batch": micro_batch,
                    "peak_mb": round(peak / 10**6, 1),
                    "summed_mb": round(summed / 10**6, 1),
                    "summed_over_peak": round(summed / peak, 3),
                }


def main(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="memory.py", description=__doc__, formatter_class=form)
    parser.add_argument("--check", action="store_true", help="the check alone; writes nothing")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; writes nothing")
    args = parser.parse_args(argv)
    rows = []
    sources = [check] if args.check else [table, check]
    for source in sources:
        for row in source(args.quick):
            print(json.dumps(row), flush=True)
            rows.append(row)
    if args.quick or args.check:
        return
    with whole_file(HERE / "memory.jsonl") as file:
        for row in rows:
            file.write(f"{json.dumps(row)}\n".encode())


if __name__ == "__main__":
    main()
