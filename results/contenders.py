"""What bench.py times: training steps, losses, scoring and generation, each in several ways.

    python results/contenders.py    a worker of `bench.py --against`: reads a name, runs it once

The code that is timed is this checkout's, or that of the folder in the variable BENCH_CODE.
"""

import contextlib
import copy
import os
import sys
import tempfile
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

CODE = Path(os.environ.get("BENCH_CODE", Path(__file__).parent.parent))
sys.path.insert(0, str(CODE))

import model as model_py  # noqa: E402
import rho  # noqa: E402


class Sizes(NamedTuple):
    n_layer: int
    n_embd: int
    n_head: int
    T: int
    V: int
    B: int


SHAPES = {
    "demo": Sizes(3, 128, 4, 128, 768, 8),
    "6x384": Sizes(6, 384, 6, 256, 50304, 4),
    "12x768": Sizes(12, 768, 12, 1024, 50304, 1),
}
TINY = Sizes(2, 32, 2, 32, 300, 2)  # for bench.py --quick: instead of every shape
RATIO = 0.6  # the paper's share of selected tokens


def sizes_of(shape, quick):
    return TINY if quick else SHAPES[shape]


def make_model(sizes):
    torch.manual_seed(0)
    inner = sizes.n_embd * 8 // 3 // 64 * 64
    config = model_py.GPTConfig(
        vocab_size=sizes.V,
        block_size=sizes.T,
        n_layer=sizes.n_layer,
        n_head=sizes.n_head,
        n_kv_head=sizes.n_head,
        n_embd=sizes.n_embd,
        n_inner=max(64, inner),
    )
    return model_py.GPT(config)


# ---- a training step -----------------------------------------------------------------------------


def backward(hidden, head, batch, rule, ratio, keep=True):
    """Losses, scores, selection and gradients as in rho.py's loop; returns the number selected.

    keep=False: the logits of phase one are dropped, and phase two computes them again.
    """
    if not hasattr(model_py, "all_losses"):
        return backward_before(hidden, head, batch, rule, ratio)
    student_loss, kept = model_py.all_losses(hidden, head, batch.y, keep=keep)
    score = rho.score_tokens(rule, student_loss, batch.ref_loss)
    mask = rho.select_tokens(score, ratio, valid=batch.valid)
    loss = model_py.selected_loss(hidden, head, batch.y, mask, kept)
    loss.backward()
    return mask.sum()


def backward_before(hidden, head, batch, rule, ratio):
    """The same in an older checkout, where selection was a callback of one autograd function."""
    ref_loss = batch.ref_loss.flatten()
    k = round(ratio * batch.y.numel())

    def choose(student_loss):
        score = rho.score_tokens(rule, student_loss, ref_loss)
        return rho.select_tokens(score, ratio)

    loss, _, mask = rho.HeadLoss.apply(hidden.flatten(0, 1), head, batch.y.flatten(), choose, k)
    loss.backward()
    return mask.sum()


class Steps:
    """One training step, forward and backward, in several ways: same weights, same tokens."""

    def __init__(self, sizes):
        self.model = make_model(sizes)
        self.trunk = self.model
        self.reference = make_model(sizes).eval()
        self.x, self.y = torch.randint(sizes.V, (2, sizes.B, sizes.T))
        self.ref_loss = 10 * torch.rand(self.y.shape)
        self.valid = torch.ones_like(self.y, dtype=torch.bool)

    def plain_clm(self):
        """All tokens, as nanoGPT: the logits are returned, hence alive until the step ends."""
        logits = self.model.head(self.model(self.x))
        loss = F.cross_entropy(logits.flatten(0, 1), self.y.flatten())
        loss.backward()
        self.model.zero_grad()

    def online_slm(self):
        """SLM as it is usually written: the reference runs beside the student."""
        with torch.no_grad():
            ref_logits = self.reference.head(self.reference(self.x))
            ref_loss = rho.token_loss(ref_logits, self.y)
        student_loss = rho.token_loss(self.model.head(self.model(self.x)), self.y)
        score = rho.score_tokens("excess", student_loss, ref_loss)
        mask = rho.select_tokens(score, RATIO)
        rho.selective_loss(student_loss, mask).backward()
        self.model.zero_grad()

    def our_slm(self):
        self.our_step("excess", RATIO)

    def our_clm(self):
        self.our_step("loss", 1.0)  # at ratio 1 any rule keeps every token

    def our_step(self, rule, ratio):
        """As rho.py's loop has it, its division by the number of selected tokens included."""
        hidden = self.trunk(self.x)
        n_selected = backward(hidden, self.model.lm_head.weight, self, rule, ratio)
        gradients = [p.grad for p in self.model.parameters()]
        torch._foreach_mul_(gradients, 1 / n_selected)
        self.model.zero_grad()


class Layer:
    """The loss alone, from the hidden state on: plainly, and in our two phases."""

    def __init__(self, sizes):
        self.batch = Steps(sizes)
        with torch.no_grad():
            hidden = self.batch.model(self.batch.x)
        self.hidden = hidden.requires_grad_()
        self.head = self.batch.model.lm_head.weight

    def plain(self):
        logits = self.hidden @ self.head.T
        loss = F.cross_entropy(logits.flatten(0, 1), self.batch.y.flatten())
        loss.backward()
        self.forget()

    def ours(self, keep=True):
        backward(self.hidden, self.head, self.batch, "excess", RATIO, keep)
        self.forget()

    def ours_recomputing(self):
        self.ours(keep=False)

    def forget(self):
        self.hidden.grad = None
        self.head.grad = None


# ---- scoring -------------------------------------------------------------------------------------


class Scoring:
    """16 windows: scored as rho.py scores the corpus, and run through the same model plainly."""

    def __init__(self, sizes):
        self.model = make_model(sizes).eval()
        self.x, self.y = torch.randint(sizes.V, (2, 16, sizes.T))
        # As much of a Process as rho.score_batch needs: a processor, no data.
        self.process = rho.Process.__new__(rho.Process)
        self.process.device = torch.device("cpu")
        self.process.cuda = False
        self.process.dtype = torch.float32
        self.process.precision = contextlib.nullcontext()

    def ours(self):
        rho.score_batch(self.process, self.model, (self.x, self.y))

    @torch.no_grad()
    def forward(self):
        self.model.head(self.model(self.x))


# ---- generation ----------------------------------------------------------------------------------


class Generation:
    """Greedy answers of `new` tokens to prompts of 64. often: one token in new / 2 ends one."""

    def __init__(self, shape, rows, new, quick, often=False):
        sizes = sizes_of(shape, quick)
        prompt_length = 64
        if quick:
            rows, new, prompt_length = 4, 8, 8
        self.new = new
        self.model = make_model(sizes).eval()
        self.prompts = torch.randint(sizes.V, (rows, prompt_length))
        self.stop = []
        if often:
            self.stop = list(range(0, sizes.V, new // 2))
        self.answers = {}  # the last of each way

    def ours(self, use_cache=True):
        prompts = self.prompts.tolist()
        answers = model_py.generate(self.model, prompts, self.new, self.stop, use_cache=use_cache)
        self.answers["ours"] = answers

    def uncached(self):
        self.ours(use_cache=False)

    def load_transformers(self):
        """The same weights as a model of transformers (extra: dev)."""
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        with tempfile.TemporaryDirectory() as folder:
            model_py.save_hf(self.model, folder)
            self.other = AutoModelForCausalLM.from_pretrained(folder)

    def transformers(self):
        rows = self.other.generate(
            self.prompts,
            max_new_tokens=self.new,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=self.stop or None,
            attention_mask=torch.ones_like(self.prompts),
        )
        stop = set(self.stop)
        answers = []
        for row in rows[:, self.prompts.shape[1] :].tolist():
            answers.append(list(takewhile(lambda token: token not in stop, row)))
        self.answers["transformers"] = answers

    @torch.inference_mode()
    def matrix_products(self):
        """Only the products that the new tokens need: the least that both could take."""
        weights = [p for p in self.model.parameters() if p.dim() == 2]
        weights = weights[1:]  # no embedding
        inputs = [torch.ones(len(self.prompts), weight.shape[1]) for weight in weights]
        for _ in range(self.new):
            for x, weight in zip(inputs, weights, strict=True):
                F.linear(x, weight)

    def check_same(self):
        """Both say the same, or part where only rounding tells two tokens apart.

        Untrained weights make such ties, a few in a thousand answers; float64 says how near one is.
        """
        exact = copy.deepcopy(self.model).double()
        answers = zip(self.answers["ours"], self.answers["transformers"], strict=True)
        for prompt, (ours, theirs) in zip(self.prompts.tolist(), answers, strict=True):
            if ours == theirs:
                continue
            same = len(os.path.commonprefix([ours, theirs]))
            logits = exact.head(exact(torch.tensor([prompt + ours[:same]])))[0, -1]  # (V,)
            for answer in (ours, theirs):
                said = answer[same : same + 1] or self.stop
                assert logits.max() - logits[said].max() < 1e-4, f"unlike: {ours}, {theirs}"


# ---- a worker of `bench.py --against` ------------------------------------------------------------


def contender(name, quick):
    """ "step_slm 6x384" and the like as a function to be timed."""
    what, shape = name.split()
    sizes = sizes_of(shape, quick)
    if what == "step_slm":
        return Steps(sizes).our_slm
    if what == "step_clm":
        return Steps(sizes).our_clm
    if what == "score":
        return Scoring(sizes).ours
    new = 64 if shape == "demo" else 128
    return Generation(shape, 32, new, quick).ours


def work(quick):
    """Read names, line by line; run each once and say so. A new name replaces what is loaded."""
    loaded, function = None, None
    for line in sys.stdin:
        name = line.strip()
        if name != loaded:
            function = None  # its memory is free before the next one's is taken
            loaded, function = name, contender(name, quick)
        function()
        print("done", flush=True)


if __name__ == "__main__":
    work("--quick" in sys.argv)
