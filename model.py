"""The GPT that reference and student both are, the fast loss, and Hugging Face weights in and out.

RMSNorm, rotary positions, SwiGLU and grouped-query attention: the shape of Llama, and with one
more field each of Qwen2.5, Qwen3 and Mistral. `forward` stops at the hidden state, `head` makes
logits. The file, from top to bottom: the network; `generate`; the loss in two phases
(`all_losses`, `selected_loss`); checkpoints; Hugging Face folders in; Hugging Face folders out.

  python model.py out/demo/slm.pt FOLDER     export a student: seconds; then in Python
                                             AutoModelForCausalLM.from_pretrained("FOLDER")

Shapes: B sequences, T tokens, C channels, V vocabulary, H heads of D channels, G key-value heads,
S cached positions, N = B * T tokens, k of them selected, v columns of one block of the vocabulary.
"""

import json
import math
import re
import zipfile
from argparse import RawDescriptionHelpFormatter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed

from prepare_data import (
    InputError,
    OneLineParser,
    get_tokenizer,
    prompt_start,
    tokenizer_spec,
    whole_file,
)


class ModelError(InputError):
    """A shape that cannot be, or a file that cannot be read: one line that names it."""


# ==== the network =================================================================================


@dataclass
class GPTConfig:
    vocab_size: int = 1024
    block_size: int = 128  # the longest sequence, prompt and answer together
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 0  # fewer than n_head: grouped-query attention; 0: n_head
    n_embd: int = 128
    n_inner: int = 384  # width inside the SwiGLU; 8/3 * n_embd costs what a 4x GELU costs
    head_dim: int = 0  # 0: n_embd / n_head
    qk_norm: bool = True  # RMSNorm on queries and keys: small models learn far faster with it
    tied: bool = False  # one matrix for embedding and head
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    qkv_bias: bool = False  # as in Qwen2.5
    window: int = 0  # a query sees this many positions, its own included; 0: all (Mistral v0.1)
    rope_scaling: dict | None = None  # slower rotation for longer contexts (Llama 3.1, 3.2)

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        if self.n_head % self.n_kv_head or self.head_dim % 2 or not self.head_dim:
            raise ModelError("n_head must be a multiple of n_kv_head, and head_dim even")


def rotary_tables(config):
    """cos and sin of the angle by which each channel of each position turns: (block_size, D)."""
    D = config.head_dim
    # On the CPU even where `model_with` builds everything else on the meta device.
    speed = config.rope_theta ** (torch.arange(0, -D, -2, device="cpu") / D)  # (D/2,)
    if config.rope_scaling:
        speed = scale_rotary(speed, config.rope_scaling)
    position = torch.arange(config.block_size, device="cpu")
    angle = torch.outer(position, speed)  # (block_size, D/2)
    cos = torch.cat((angle, angle), 1).cos()
    sin = torch.cat((-angle, angle), 1).sin()
    return cos, sin


def scale_rotary(speed, scaling):
    """Slow the rotation down by a factor, as a model does that was trained on longer contexts."""
    slow = speed / scaling["factor"]  # (D/2,)
    if scaling["rope_type"] == "linear":
        return slow
    # Llama 3: channels that turn often within the original context keep their speed, channels that
    # turn seldom become slow, and between the two the speeds are mixed.
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * speed / (2 * math.pi)
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return share * speed + (1 - share) * slow


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + D/2]) of x (B, T, H, D). sin has its first half negated."""
    half = x.shape[-1] // 2
    return torch.addcmul(x * cos, x.roll(half, -1), sin)


def attention_mask(start, end, pad, window, device):
    """What each query sees: (1, T, S) or (B, 1, T, S) bool; None: all that stands before it."""
    if pad is None and not 0 < window < end:
        return None
    key = torch.arange(end, device=device)  # (S,)
    query = key[start:, None]  # (T, 1)
    visible = key <= query  # (T, S)
    if window:
        visible = visible & (key > query - window)
    if pad is not None:
        first = pad[:, None, None]  # (B, 1, 1)
        # Padding attends to padding: a softmax over an empty row is NaN.
        visible = visible & ((key >= first) | (query < first))  # (B, T, S)
    return visible.unsqueeze(-3)


class Attention(nn.Module):
    # In all three classes the names of the attributes are Hugging Face's names of the parameters.
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        D = config.head_dim
        self.head_dim = D
        self.q_proj = nn.Linear(C, config.n_head * D, bias=config.qkv_bias)
        self.k_proj = nn.Linear(C, config.n_kv_head * D, bias=config.qkv_bias)
        self.v_proj = nn.Linear(C, config.n_kv_head * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.n_head * D, C, bias=False)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(D, config.norm_eps)
            self.k_norm = nn.RMSNorm(D, config.norm_eps)
        else:
            self.q_norm = nn.Identity()
            self.k_norm = nn.Identity()

    def forward(self, x, cos, sin, mask, cache):
        B, T, C = x.shape
        heads = (B, T, -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(heads))
        q = rotate(q, cos, sin).transpose(1, 2)  # (B, H, T, D)
        k = self.k_norm(self.k_proj(x).view(heads))
        k = rotate(k, cos, sin).transpose(1, 2)  # (B, G, T, D)
        v = self.v_proj(x).view(heads).transpose(1, 2)  # (B, G, T, D)
        if cache is not None:
            keys, values = cache.extend(self, k, v)  # (B, G, S, D)
        if cache is not None and T == 1:
            y = attend_one(q, keys, values, mask)
        else:
            # Keys and values are those of this call: only an empty cache takes several tokens.
            gqa = k.shape[1] < q.shape[1]
            causal = mask is None
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=gqa)
        y = y.transpose(1, 2).reshape(B, T, -1)  # (B, T, H * D)
        return self.o_proj(y)  # (B, T, C)


def attend_one(q, keys, values, mask):
    """Attention of one query a row, q (B, H, 1, D): by hand takes half of torch's time on a CPU."""
    B, H, _, D = q.shape
    G = keys.shape[1]
    grouped = q.reshape(B, G, H // G, D) * D**-0.5
    score = grouped @ keys.mT  # (B, G, H/G, S)
    if mask is not None:
        score = score.masked_fill(~mask, -torch.inf)
    return (score.softmax(-1) @ values).reshape(q.shape)  # (B, H, 1, D)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.down_proj = nn.Linear(config.n_inner, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # (B, T, C)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, mask, cache):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x  # (B, T, C)


class KVCache:
    """For each Attention the keys and the values seen so far, both (B, G, S, D)."""

    def __init__(self, size):
        self.size = size
        self.length = 0
        self.store = {}

    def extend(self, attention, k, v):
        """Append k and v (B, G, T, D), and return all keys and all values."""
        B, G, T, D = k.shape
        if attention not in self.store:
            room = (B, G, self.size, D)
            self.store[attention] = k.new_empty(room), v.new_empty(room)
        keys, values = self.store[attention]
        end = self.length + T
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def keep_rows(self, rows):
        for attention, (keys, values) in self.store.items():
            self.store[attention] = keys[rows], values[rows]


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        # True: each block's activations are computed again in the backward pass and not stored.
        self.recompute = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.embed_tokens.weight
        for name, p in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                # What adds to the residual stream starts smaller, as in GPT-2.
                nn.init.normal_(p, std=0.02 / (2 * config.n_layer) ** 0.5)
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        cos, sin = rotary_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens, cache=None, pad=None):
        """Hidden states (B, T, C) of tokens (B, T), to be given to `head`.

        cache: a KVCache; if it is not empty, the tokens are the next one of each row. pad (B,): how
        many positions on the left are padding. ValueError when the sequence outgrows block_size.
        """
        start = cache.length if cache is not None else 0
        end = start + tokens.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens do not fit block_size {self.config.block_size}")
        assert start in (0, end - 1), "a cache that is not empty takes one token at a time"

        mask = attention_mask(start, end, pad, self.config.window, tokens.device)
        if pad is None:
            position = slice(start, end)
        else:
            position = torch.arange(start, end, device=tokens.device) - pad[:, None]  # (B, T)
            position = position.clamp(min=0)
        x = self.embed_tokens(tokens)  # (B, T, C)
        cos = self.cos[position].to(x.dtype).unsqueeze(-2)  # (T, 1, D) or (B, T, 1, D)
        sin = self.sin[position].to(x.dtype).unsqueeze(-2)
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                x = recomputed(layer, x, cos, sin, mask, cache, use_reentrant=False)
            else:
                x = layer(x, cos, sin, mask, cache)
        if cache is not None:
            cache.length = end
        return self.norm(x)

    def head(self, hidden):
        return self.lm_head(hidden)  # logits (B, T, V)

    def num_params(self):
        return sum(p.numel() for p in self.parameters())


@torch.inference_mode()
def generate(gpt, prompts, max_new_tokens, stop=(), temperature=0, generator=None, use_cache=True):
    """Continue each prompt until its own stop token, or for max_new_tokens.

    prompts: lists of token ids of any lengths. stop: a token id or several. temperature 0: greedy.
    Returns a list of new ids for each prompt, without the stop token. ValueError if a prompt is
    empty, or too long for the answer to fit block_size.
    """
    longest = max(map(len, prompts), default=0)
    room = gpt.config.block_size - max_new_tokens
    if not all(prompts) or not 0 < longest <= room:
        raise ValueError(
            f"block_size has room for prompts of 1 to {room} tokens, not of {longest} or 0"
        )
    device = gpt.cos.device
    padding = [longest - len(prompt) for prompt in prompts]
    padded = [[0] * n + list(prompt) for n, prompt in zip(padding, prompts, strict=True)]
    tokens = torch.tensor(padded, device=device)  # (b, T), of the b rows still in the batch
    pad = torch.tensor(padding, device=device) if any(padding) else None  # (b,)
    cache = KVCache(longest + max_new_tokens) if use_cache else None
    stops = {stop} if isinstance(stop, int) else set(stop)
    answers = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # which prompts the rows of the batch are
    ended = set()

    for _ in range(max_new_tokens):
        unseen = tokens[:, cache.length :] if use_cache else tokens
        hidden = gpt(unseen, cache, pad)[:, -1]  # (b, C)
        logits = gpt.head(hidden).float()  # (b, V)
        if temperature > 0:
            probability = (logits / temperature).softmax(-1)
            chosen = torch.multinomial(probability, 1, generator=generator)  # (b, 1)
        else:
            chosen = logits.max(-1, keepdim=True).indices  # (b, 1); argmax is much slower
        tokens = torch.cat((tokens, chosen), dim=1)

        for row, token in zip(rows, chosen[:, 0].tolist(), strict=True):
            if token in stops:
                ended.add(row)
            if row not in ended:
                answers[row].append(token)
        alive = [i for i, row in enumerate(rows) if row not in ended]
        if not alive:
            break
        # Ended rows leave the batch; not each at once, for leaving copies the cache.
        if len(alive) < 0.8 * len(rows):
            rows = [rows[i] for i in alive]
            tokens = tokens[alive]
            if pad is not None:
                pad = pad[alive]
            if use_cache:
                cache.keep_rows(alive)
    return answers


# ==== the loss in two phases ======================================================================
#
# The definition in rho.py holds the logits of all tokens, (N, V), and their gradient, most of which
# is zero. Here phase one finds every token's loss without gradient, by blocks of the vocabulary
# that are small enough to be worked on quickly. Selection comes between. Phase two forms the
# gradient of the selected rows alone, again by blocks. Where all logits fit into memory, phase two
# reuses those of phase one.

CPU_BLOCK = 2**20  # logits worked on together: what stays in a CPU's cache
GPU_BLOCK = 2**28  # elsewhere: enough to keep the device busy
KEEP = 2**28  # logits that may stay in memory from phase one to phase two


@dataclass
class Kept:
    """What phase one leaves to phase two."""

    student_loss: torch.Tensor  # (N,)
    log_z: torch.Tensor  # (N, 1), the logarithm of the softmax's denominator
    logits: list  # blocks (N, v), in hidden's type, or none; phase two takes them out


def vocabulary_blocks(head, n_rows, dtype):
    """Yield (first row, rows (v, C) of head): together, n_rows * v is at most one block."""
    block = CPU_BLOCK if head.is_cpu else GPU_BLOCK
    size = max(1, block // max(1, n_rows))
    for start in range(0, len(head), size):
        yield start, head[start : start + size].to(dtype)


def target_column(targets, start, size):
    """(column, inside): where each target stands in a block's columns, and whether it does."""
    column = targets - start  # (N, 1)
    inside = (column >= 0) & (column < size)
    return column.clamp(0, size - 1), inside


@torch.no_grad()
def all_losses(hidden, head, targets, keep=True):
    """Phase one: the loss of every token, without gradient.

    hidden (..., C), head (V, C), targets (...) -> (losses (...) float32 in nats, Kept). Products
    are in hidden's type. keep=False, for scoring and evaluation: no logits stay in memory. The loss
    of a target that is not in the vocabulary is NaN.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])  # (N, C)
    target = targets.reshape(-1, 1)  # (N, 1)
    N = len(flat)
    log_z = torch.full((N, 1), -torch.inf, device=flat.device)
    target_logit = torch.full((N, 1), torch.nan, device=flat.device)
    kept_logits = []
    for start, part in vocabulary_blocks(head, N, flat.dtype):
        logits = flat @ part.T  # (N, v)
        if keep and N * len(head) <= KEEP:
            kept_logits.append(logits)
        logits = logits.float()
        log_z = torch.logaddexp(log_z, logits.logsumexp(-1, keepdim=True))
        column, inside = target_column(target, start, len(part))
        target_logit = torch.where(inside, logits.gather(1, column), target_logit)
    losses = log_z - target_logit  # (N, 1)
    return losses.view(targets.shape), Kept(losses[:, 0], log_z, kept_logits)


def selected_loss(hidden, head, targets, weights, kept=None):
    """Phase two: the sum of weights * loss, with gradient for hidden and head.

    hidden (..., C), head (V, C), targets (...), weights (...): a bool mask, or any numbers. Only
    rows whose weight is not 0 cost anything. kept: phase one's, of the same hidden, head and
    targets; its logits are used up.
    """
    if kept is None:
        _, kept = all_losses(hidden, head, targets)
    flat = hidden.reshape(-1, hidden.shape[-1])  # (N, C)
    return SelectedLoss.apply(flat, head, targets.reshape(-1, 1), weights.flatten(), kept)


class SelectedLoss(torch.autograd.Function):
    """The gradients are known with the loss: softmax minus one-hot, times weight, multiplied out.

    So they are formed at once, and `backward` only hands them on.
    """

    @staticmethod
    def forward(ctx, hidden, head, targets, weights, kept):
        rows = weights.nonzero()[:, 0]  # (k,)
        if len(rows) == len(weights):
            rows = slice(None)  # all of them: indexing then copies nothing
        weight = weights[rows, None].float()  # (k, 1)
        log_z = kept.log_z[rows]  # (k, 1)
        target = targets[rows]  # (k, 1)
        h = hidden[rows]  # (k, C)
        # The weight could multiply the (k, v) errors as well; here it costs v / C times less.
        weighted_h = (h * weight).to(h.dtype)  # (k, C)
        grad_h = torch.zeros_like(h, dtype=torch.float32)  # (k, C), without the weight
        grad_head = torch.empty_like(head)  # (V, C)
        kept_logits = kept.logits
        kept.logits = []  # used up below: worked on in place, and each block freed after its use
        for start, part in vocabulary_blocks(head, len(hidden), hidden.dtype):
            logits = kept_logits.pop(0)[rows] if kept_logits else h @ part.T  # (k, v)
            # In float32: in bfloat16 the error of a learned token, 0.999 - 1, would be 0.
            error = logits.float().sub_(log_z).exp_()  # (k, v), the softmax
            column, inside = target_column(target, start, len(part))
            error.scatter_add_(1, column, -inside.float())
            error = error.to(h.dtype)
            grad_h += error @ part
            grad_head[start : start + len(part)] = error.T @ weighted_h
        grad_hidden = torch.zeros_like(hidden)  # (N, C)
        grad_hidden[rows] = (grad_h * weight).to(hidden.dtype)
        ctx.gradients = (grad_hidden, grad_head)
        return (kept.student_loss[rows, None] * weight).sum()

    @staticmethod
    def backward(ctx, scale):
        grad_hidden, grad_head = ctx.gradients
        del ctx.gradients  # held once, autograd takes them over and copies nothing
        return grad_hidden.mul_(scale), grad_head.mul_(scale), None, None, None


# ==== checkpoints =================================================================================


def load_checkpoint(path):
    """The dict that a run saved. ModelError if it is cut short, damaged or something else."""
    with open(path, "rb") as file:
        try:
            # torch.load does not compare the checksums that torch.save wrote: a flipped bit would
            # become a weight.
            if zipfile.ZipFile(file).testzip() is not None:
                raise ValueError("a checksum is wrong")
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            what = "is cut short, damaged or no checkpoint of rho.py"
            remedy = "If it was one, delete it and run its stage again"
            raise ModelError(f"{path} {what}. {remedy}") from error


def load_model(path, device="cpu", block_size=None):
    """(GPT, checkpoint) of a file that rho.py wrote, or of a Hugging Face folder.

    Of a folder, the second is {"tokenizer": spec}, or {} where it has no tokenizer.json.
    block_size: the longest sequence that will come, so that longer tables take no memory.
    """
    if Path(path).is_dir():
        model = load_hf(path, block_size).to(device)
        if not Path(path, "tokenizer.json").exists():
            return model, {}
        return model, {"tokenizer": tokenizer_spec(Path(path, "tokenizer.json"))}
    checkpoint = load_checkpoint(path)
    try:
        config = GPTConfig(**checkpoint["model_config"])
        config.block_size = min(config.block_size, block_size or config.block_size)
        weights = {name: tensor.float() for name, tensor in checkpoint["model"].items()}
    except (LookupError, TypeError, AttributeError, ModelError) as error:
        what = f"holds no model that fits this model.py ({error})"
        raise ModelError(f"{path} {what}: delete it and run its stage again") from error
    return model_with(config, weights, path).to(device), checkpoint


def model_with(config, weights, path):
    """A GPT with these weights {name: tensor}. ModelError names the tensors that do not fit."""
    with torch.device("meta"):  # no time for first weights that are replaced at once
        model = GPT(config)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:  # it lists what is missing, unexpected or of another shape
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{path} does not fit its configuration. {reason}") from error
    if config.tied:
        model.lm_head.weight = model.embed_tokens.weight
    return model


# ==== Hugging Face folders in =====================================================================

# GPTConfig's fields in config.json. The others differ between families, see `config_from_hf`.
HF_NAMES = {
    "vocab_size": "vocab_size",
    "block_size": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_embd": "hidden_size",
    "n_inner": "intermediate_size",
    "head_dim": "head_dim",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
}
# Keys that change the function, each with the one value by which GPT is that function.
HF_NEUTRAL = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_qk_norm": False,
    "partial_rotary_factor": 1.0, "rope_interleaved": False, "no_rope_layers": None,
    "quantization_config": None, "pretraining_tp": 1, "clip_qkv": None, "alibi": False,
    "num_experts": 0, "num_local_experts": 0, "n_routed_experts": 0, "logit_scale": 1.0,
    "logits_scaling": 1.0, "attention_multiplier": None, "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0, "attn_logit_softcapping": None, "final_logit_softcapping": None,
}  # fmt: skip
# What a rope_type is given by, besides rope_theta.
ROPE_KEYS = {
    "default": "",
    "linear": "factor",
    "llama3": "factor low_freq_factor high_freq_factor original_max_position_embeddings",
}
DOWNLOAD = "download it again (in a git clone: git lfs pull)"


def load_hf(folder, block_size=None):
    """A GPT, in float32, from a folder with config.json and safetensors.

    Llama (TinyLlama, SmolLM2, Llama 3.2), Mistral, Qwen2.5 and Qwen3. ModelError names the file,
    key or tensor that GPT cannot be.
    """
    path = Path(folder, "config.json")
    settings = read_json(path)
    try:
        config = config_from_hf(settings, block_size)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    weights = read_safetensors(Path(folder))
    embedding = weights.get("embed_tokens.weight")
    if config.tied and embedding is not None:
        head = weights.setdefault("lm_head.weight", embedding)
        if not torch.equal(head, embedding):
            raise ModelError(f"{path}: tie_word_embeddings is true, but lm_head.weight differs")
    return model_with(config, weights, folder)


def read_json(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path} not found: {path.parent} is no Hugging Face folder") from error
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ModelError(f"{path} is cut short or not JSON: {DOWNLOAD}")
    return content


def read_safetensors(folder):
    """All tensors of a folder, {our name: float32}: of the shards in the index, or of one file."""
    index = folder / "model.safetensors.index.json"
    old = folder / "pytorch_model.bin"
    names = ["model.safetensors"]
    if index.exists():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise ModelError(f"{index} has no weight_map: {DOWNLOAD}")
        names = sorted(set(map(str, places.values())))
    elif old.exists() and not (folder / names[0]).exists():
        convert = "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        raise ModelError(f"{old}: only safetensors are read. Convert it by transformers' {convert}")
    weights = {}
    for name in names:
        for key, tensor in read_shard(folder / name).items():
            # Tables that the first Llamas stored; here they follow from the configuration.
            if not key.endswith("rotary_emb.inv_freq"):
                # A copy, for what load_file returns changes or vanishes with the file.
                weights[key.removeprefix("model.")] = tensor.to(torch.float32, copy=True)
    return weights


def read_shard(path):
    safetensors, _ = hf_packages()
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError as error:
        raise ModelError(f"{path} not found: {DOWNLOAD}") from error
    except safetensors.SafetensorError as error:
        raise ModelError(f"{path} is cut short, damaged or an LFS pointer: {DOWNLOAD}") from error


def hf_packages():
    """The packages of the extra `hf`."""
    try:
        import safetensors.torch
        import tokenizers
    except ImportError as error:
        remedy = "Run: pip install safetensors tokenizers"
        raise ModelError(f"Hugging Face folders need {error.name}. {remedy}") from error
    return safetensors, tokenizers


def config_from_hf(settings, block_size=None):
    """The GPTConfig of a config.json. ModelError names the key that GPT has no form for."""
    family = settings.get("model_type")
    if family not in ("llama", "mistral", "qwen2", "qwen3"):
        raise ModelError(f"model_type {family!r} is not llama, mistral, qwen2 or qwen3")
    settings = with_rope(settings)
    for key, neutral in HF_NEUTRAL.items():
        if settings.get(key) not in (None, neutral):
            raise ModelError(f"{key} {settings[key]!r} makes a model that GPT is not")

    shape = {}
    for field, key in HF_NAMES.items():
        value = settings.get(key)
        if value is None and field in ("n_kv_head", "head_dim", "rope_theta", "norm_eps"):
            continue  # then GPTConfig's own default is the right one
        whole = GPTConfig.__annotations__[field] is int
        shape[field] = number(key, value, (int,) if whole else (int, float))
    if family == "qwen3":
        shape.setdefault("head_dim", 128)
    shape["block_size"] = min(shape["block_size"], block_size or shape["block_size"])
    return GPTConfig(
        **shape,
        qk_norm=family == "qwen3",
        qkv_bias=family == "qwen2",
        tied=settings.get("tie_word_embeddings") is True,
        window=window_from_hf(settings, family, shape["block_size"]),
        rope_scaling=scaling_from_hf(settings),
    )


def number(key, value, kinds):
    if type(value) not in kinds or not 0 < value < math.inf:
        raise ModelError(f"{key} has to be a number above 0, not {value!r}")
    return value


def with_rope(settings):
    """config.json with its rotary keys among the others, whichever way they are written.

    transformers 4 writes rope_theta and, if there is one, rope_scaling. transformers 5 writes both
    into rope_parameters, or one such dict for each type of layer.
    """
    rope = {}
    for key in ("rope_parameters", "rope_scaling"):
        value = settings.get(key) or {}
        if not isinstance(value, dict):
            raise ModelError(f"{key} has to be an object, not {value!r}")
        layers = [inner for inner in value.values() if isinstance(inner, dict)]
        if any(inner != layers[0] for inner in layers):
            raise ModelError(f"{key} differs from layer to layer: GPT has one for all")
        rope.update(layers[0] if layers else value)
    return {**settings, **rope}


def scaling_from_hf(settings):
    """GPTConfig.rope_scaling: None, or rope_type and its numbers."""
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind not in ROPE_KEYS:
        raise ModelError(f"rope_type {kind!r} is none of {', '.join(ROPE_KEYS)}")
    if kind == "default":
        return None
    scaling = {"rope_type": kind}
    for key in ROPE_KEYS[kind].split():
        scaling[key] = number(key, settings.get(key), (int, float))
    return scaling


def window_from_hf(settings, family, block_size):
    """GPTConfig.window: 0 where the window is off, or no shorter than any sequence."""
    # Left out, it is 4096 in Mistral, and off elsewhere.
    window = settings.get("sliding_window", 4096 if family == "mistral" else None)
    if family.startswith("qwen") and not settings.get("use_sliding_window"):
        window = None
    if window is None or number("sliding_window", window, (int,)) >= block_size:
        return 0
    if family != "mistral":
        raise ModelError(f"sliding_window {window}: GPT has one in every layer (Mistral) or none")
    return window


# ==== Hugging Face folders out ====================================================================

EXPORTED = ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"]
EXPORTED += ["generation_config.json"]


def save_hf(model, folder, tokenizer=None):
    """Write what AutoModelForCausalLM and, given meta.json's tokenizer, AutoTokenizer load.

    ModelError if GPT's shape is that of no family, or the folder holds something else.
    """
    safetensors, _ = hf_packages()
    folder = Path(folder)
    config = config_to_hf(model.config)
    config["torch_dtype"] = str(model.norm.weight.dtype).removeprefix("torch.")
    folder.mkdir(parents=True, exist_ok=True)
    for other in sorted(folder.iterdir()):
        if other.name.removesuffix(".tmp") not in EXPORTED:
            raise ModelError(f"{other} is not part of an export: choose a folder of its own")
    # Written last: a folder without config.json is no model, so half an export is taken for none.
    (folder / "config.json").unlink(missing_ok=True)

    special = {}
    if tokenizer is not None:
        special = save_tokenizer(tokenizer, folder, model.config.block_size)
    weights = {}
    for name, p in model.named_parameters():  # a tied head comes once, as the embedding
        key = name if name.startswith("lm_head") else f"model.{name}"
        weights[key] = p.detach().contiguous()
    path = folder / "model.safetensors"
    try:
        safetensors.torch.save_file(weights, path, {"format": "pt"})
    except safetensors.SafetensorError as error:  # a full disk
        raise ModelError(f"{path} cannot be written: {error}") from error
    generation = {"do_sample": False, "pad_token_id": special.get("eos_token_id")}
    write_json(folder / "generation_config.json", {**special, **generation})
    write_json(folder / "config.json", {**config, **special})


def config_to_hf(config):
    """config.json of a GPTConfig. ModelError where no family has this shape."""
    special = {"Qwen3": config.qk_norm, "Qwen2": config.qkv_bias, "Mistral": config.window > 0}
    families = [name for name, present in special.items() if present] or ["Llama"]
    if len(families) > 1:
        raise ModelError(f"no Hugging Face model is both {families[0]} and {families[1]}")
    settings = {key: getattr(config, field) for field, key in HF_NAMES.items()}
    return settings | {
        "architectures": [f"{families[0]}ForCausalLM"],
        "model_type": families[0].lower(),
        "hidden_act": "silu",
        "tie_word_embeddings": config.tied,
        "rope_scaling": config.rope_scaling,
        "sliding_window": config.window or None,
    }


def save_tokenizer(spec, folder, block_size):
    """tokenizer.json and tokenizer_config.json, for AutoTokenizer; returns their special ids."""
    _, tokenizers = hf_packages()
    encoding = get_tokenizer(spec)
    # Of a tokenizer.json, the package's own tokenizer.
    tokenizer = encoding.tokenizer if "file" in spec else tokenizer_of(encoding)
    bos = prompt_start(encoding)[-1]
    eos = getattr(encoding, "eos_token", None)
    if eos is None:
        eos = encoding.eot_token
    front = tokenizer.id_to_token(bos)
    # The student has read this token in front of every document, so each text gets it.
    if tokenizer.encode("").ids != [bos]:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{front} $A", pair=f"{front} $A $B", special_tokens=[(front, bos)]
        )
    with whole_file(folder / "tokenizer.json") as file:
        file.write(tokenizer.to_str(pretty=True).encode())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": front,
        "eos_token": tokenizer.id_to_token(eos),
        "model_max_length": block_size,
        # The text of a special token inside a document stays text, as where the data were made.
        "split_special_tokens": True,
    }
    write_json(folder / "tokenizer_config.json", settings)
    return {"bos_token_id": bos, "eos_token_id": eos}


def tokenizer_of(encoding):
    """A tiktoken.Encoding as a tokenizers.Tokenizer."""
    _, tokenizers = hf_packages()
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = byte_letters(byte_level.alphabet())
    ranks = encoding._mergeable_ranks  # {bytes: id}
    spelled = {}
    for token in ranks:
        spelled[token] = "".join(letters[byte] for byte in token)
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()}
    vocabulary.update(encoding._special_tokens)
    # As in tiktoken, any two neighbors that are a token together join, the lowest rank first.
    merges = []
    for token in sorted(ranks, key=ranks.get):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [pair for pair in cuts if pair[0] in ranks and pair[1] in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(spelled[left], spelled[right]) for left, right in pairs]
    model = tokenizers.models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True)
    tokenizer = tokenizers.Tokenizer(model)

    # Only what the pattern matches is text, and each match is a piece of its own. A plus after a
    # count means "again" to this package and "never give back" to tiktoken: left out, it is right.
    pattern = tokenizers.Regex(re.sub(r"(\{\d+,\d+\})\+", r"\1", encoding._pat_str))
    split = tokenizers.pre_tokenizers.Split(pattern, behavior="removed", invert=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(encoding._special_tokens))
    return tokenizer


def byte_letters(alphabet):
    """{byte: its letter in byte-level BPE}: itself if it is printable, else one beyond 255."""
    letters = sorted(alphabet)
    printable = [ord(letter) for letter in letters if ord(letter) < 256]
    others = [byte for byte in range(256) if byte not in printable]
    return dict(zip(printable + others, letters, strict=True))


def write_json(path, content):
    with whole_file(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


def main(argv=None):
    parser = OneLineParser(
        "model.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("ckpt", metavar="CKPT", help="a checkpoint that rho.py wrote")
    parser.add_argument("folder", metavar="FOLDER", help="a new folder, or that of an old export")
    args = parser.parse_args(argv)
    try:
        if Path(args.ckpt).is_dir():
            raise ModelError(f"{args.ckpt} is a folder: CKPT is a file, as out/demo/slm.pt")
        model, checkpoint = load_model(args.ckpt)
        save_hf(model, args.folder, checkpoint.get("tokenizer"))
    except FileNotFoundError as error:
        parser.exit(2, f"model.py: {error.filename} not found. Run first: python rho.py\n")
    except InputError as error:
        parser.exit(2, f"model.py: {error}\n")
    except OSError as error:  # a full disk, a folder that may not be written
        parser.exit(2, f"model.py: {error.filename or args.folder}: {error.strerror}\n")
    except KeyboardInterrupt:
        parser.exit(130, "model.py: interrupted; the same command starts again\n")
    print(f"{args.folder}: {model.num_params():,} parameters, for AutoModelForCausalLM")


if __name__ == "__main__":
    main()
