"""The GPT that the reference and the student both are: forward, generate, checkpoints, HF weights.

Decoder-only with RMSNorm, rotary positions, SwiGLU and grouped-query attention, no biases: the
shape of Llama and TinyLlama (the paper's base) and, with `qk_norm`, of Qwen3. Parameters carry the
names that Hugging Face gives them, so weights load and export without a table of translations.

`forward` stops at the hidden state and `head` makes logits: in this project the loss *is* the
paper, so it lives in rho.py. Shapes: B sequences, T tokens, C channels, V vocabulary, H heads,
G key-value heads, D channels of a head, S positions in the cache.
"""

import json
import os
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


class ModelError(ValueError):
    """A shape that cannot be, or a file that cannot be read: one line that names it."""


@dataclass
class GPTConfig:
    vocab_size: int = 1024
    block_size: int = 128  # the longest sequence, prompt and answer together
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 4  # fewer than n_head: grouped-query attention
    n_embd: int = 128
    n_inner: int = 384  # width inside the SwiGLU; 8/3 · n_embd costs what a 4x GELU costs
    head_dim: int = 0  # 0: n_embd / n_head
    qk_norm: bool = True  # RMSNorm on queries and keys: small models learn far faster with it
    tied: bool = False  # one matrix for embedding and head
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6

    def __post_init__(self):
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        if self.n_head % self.n_kv_head:
            raise ModelError(f"n_head {self.n_head} is no multiple of n_kv_head {self.n_kv_head}")
        if self.head_dim % 2:
            raise ModelError(f"head_dim {self.head_dim} is odd: rotary positions turn pairs")


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + D/2]) by its position's angle. x (B, H, T, D), cos (B|1, T, D)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-b, a), dim=-1) * sin[:, None]


class Attention(nn.Module):
    def __init__(self, c: GPTConfig):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.n_embd, c.n_head * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.n_head * c.head_dim, c.n_embd, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.gqa = c.n_kv_head != c.n_head

    def forward(self, x, cos, sin, mask, cache):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # (B, T, H, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # (B, T, G, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, G, T, D)
        q = rotate(self.q_norm(q).transpose(1, 2), cos, sin)  # (B, H, T, D)
        k = rotate(self.k_norm(k).transpose(1, 2), cos, sin)  # (B, G, T, D)
        if cache is not None:
            k, v = cache.extend(self, k, v)  # (B, G, S, D)
        causal = mask is None and T > 1
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=self.gqa)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)


class MLP(nn.Module):
    def __init__(self, c: GPTConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.n_embd, c.n_inner, bias=False)
        self.up_proj = nn.Linear(c.n_embd, c.n_inner, bias=False)
        self.down_proj = nn.Linear(c.n_inner, c.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c: GPTConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(c.n_embd, c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.n_embd, c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, mask, cache):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = c = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.n_embd)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = RMSNorm(c.n_embd, c.norm_eps)
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        if c.tied:
            self.lm_head.weight = self.embed_tokens.weight
        for name, p in self.named_parameters():
            if p.dim() == 2:  # what adds to the residual stream starts smaller, as in GPT-2
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / (2 * c.n_layer) ** 0.5 if residual else 0.02)
        power = torch.arange(0, c.head_dim, 2) / c.head_dim
        angle = torch.outer(torch.arange(c.block_size), c.rope_theta**-power).repeat(1, 2)
        self.register_buffer("cos", angle.cos(), persistent=False)  # (block_size, D)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, tokens, cache=None, pad=None):
        """Hidden states (B, T, C) of tokens (B, T), to be given to `head`.

        cache: a KVCache; the tokens then stand after those that it holds. pad (B,): how many
        positions on the left of each row, counted from the cache's beginning, are filling.
        Raises ValueError when the sequence outgrows block_size.
        """
        start = cache.length if cache is not None else 0
        end = start + tokens.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens do not fit block_size {self.config.block_size}")
        position, mask = torch.arange(start, end, device=tokens.device)[None], None  # (1, T)
        if pad is not None:
            key = torch.arange(end, device=tokens.device)  # (S,)
            query = position[0, :, None]  # (T, 1)
            seen = (key <= query) & (key >= pad[:, None, None])  # (B, T, S)
            mask = (seen | (key == query))[:, None]  # filling sees itself: a softmax of nothing is NaN
            position = (position - pad[:, None]).clamp(min=0)  # (B, T)
        elif start and end - start > 1:
            raise ValueError("a cache that is not empty takes one token at a time, or needs pad")
        x = self.embed_tokens(tokens)  # (B, T, C)
        cos, sin = self.cos[position].to(x.dtype), self.sin[position].to(x.dtype)  # (B|1, T, D)
        for layer in self.layers:
            x = layer(x, cos, sin, mask, cache)
        if cache is not None:
            cache.length = end
        return self.norm(x)

    def head(self, hidden):
        """Logits (..., V) of hidden states (..., C)."""
        return self.lm_head(hidden)

    def num_params(self):
        return sum(p.numel() for p in self.parameters())


class KVCache:
    """Keys and values of the positions seen so far, (B, G, S, D) for each attention layer."""

    def __init__(self, size):
        self.size, self.length, self.store = size, 0, {}

    def extend(self, layer, k, v):
        if layer not in self.store:
            B, G, _, D = k.shape
            self.store[layer] = k.new_empty(2, B, G, self.size, D)
        kv, end = self.store[layer], self.length + k.shape[2]
        kv[0, :, :, self.length : end] = k
        kv[1, :, :, self.length : end] = v
        return kv[0, :, :, :end], kv[1, :, :, :end]

    def keep(self, rows):
        self.store = {layer: kv[:, rows] for layer, kv in self.store.items()}


@torch.no_grad()
def generate(
    model, prompts, max_new_tokens, stop=(), temperature=0.0, generator=None, use_cache=True
):
    """Continue each prompt until its own stop token, or for max_new_tokens.

    prompts: lists of token ids, of any lengths (shorter ones are filled on the left). stop: a token
    id or several. temperature 0 is greedy. Returns one list of new token ids per prompt, without
    the stop token. Rows that ended leave the batch. Raises ValueError for an empty prompt, or where
    the longest prompt and the answer together outgrow block_size.
    """
    if not prompts or not all(prompts):
        raise ValueError("generate needs at least one prompt, and none of them empty")
    device, longest = model.embed_tokens.weight.device, max(map(len, prompts))
    if longest + max_new_tokens > model.config.block_size:
        room = f"block_size {model.config.block_size}"
        raise ValueError(f"{longest} prompt + {max_new_tokens} new tokens do not fit {room}")
    stops = torch.tensor([stop] if isinstance(stop, int) else sorted(stop), device=device)
    filled = [[0] * (longest - len(p)) + list(p) for p in prompts]
    tokens = torch.tensor(filled, device=device)  # (B, T)
    pad = torch.tensor([longest - len(p) for p in prompts], device=device)  # (B,)
    pad = pad if pad.any() else None
    new = torch.full((len(prompts), max_new_tokens), -1, device=device)  # (B, max_new_tokens)
    rows = torch.arange(len(prompts), device=device)  # the prompts still in the batch
    ended = torch.zeros_like(rows, dtype=torch.bool)  # of those, the ones that met a stop token
    cache = KVCache(longest + max_new_tokens) if use_cache else None
    for i in range(max_new_tokens):
        unseen = tokens[:, cache.length :] if use_cache else tokens
        logits = model.head(model(unseen, cache, pad)[:, -1]).float()  # (b, V)
        if temperature > 0:
            p = (logits / temperature).softmax(-1)
            chosen = torch.multinomial(p, 1, generator=generator)  # (b, 1)
        else:
            chosen = logits.argmax(-1, keepdim=True)  # (b, 1)
        new[rows, i] = chosen[:, 0]
        tokens = torch.cat((tokens, chosen), dim=1)
        ended |= torch.isin(chosen[:, 0], stops)
        if i % 8 == 7:  # not at every token: asking waits for the device
            alive = (~ended).nonzero()[:, 0]
            if len(alive) == 0:
                break
            if len(alive) <= 0.75 * len(rows):
                tokens, rows, ended = tokens[alive], rows[alive], ended[alive]
                pad = pad[alive] if pad is not None else None
                if use_cache:
                    cache.keep(alive)
    stops = set(stops.tolist()) | {-1}
    answers = []
    for row in new.tolist():
        end = next((i for i, token in enumerate(row) if token in stops), max_new_tokens)
        answers.append(row[:end])
    return answers


# ---- files: our checkpoints, and Hugging Face's --------------------------------------------------


@contextmanager
def whole_file(path):
    """Open for writing so that `path` is whole or as it was: temporary name, fsync, rename."""
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, checkpoint):
    with whole_file(path) as f:
        torch.save(checkpoint, f)


def load_checkpoint(path, device="cpu"):
    """The dict that save_checkpoint wrote. ModelError if it is cut short or something else."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ModelError(f"{path} is cut short or no checkpoint: delete it, run again") from error


def load_model(path, device="cpu"):
    """(GPT, checkpoint) from a file of save_checkpoint, with keys `model_config` and `model`."""
    checkpoint = load_checkpoint(path, device)
    if "model_config" not in checkpoint:
        raise ModelError(f"{path} holds no model_config: it is not a checkpoint of rho.py")
    model = GPT(GPTConfig(**checkpoint["model_config"])).to(device)
    model.load_state_dict(checkpoint["model"])
    return model, checkpoint


def load_hf(folder):
    """A GPT from a folder with config.json and *.safetensors (Llama, Mistral, TinyLlama, Qwen3)."""
    from safetensors.torch import load_file  # extra: hf

    c = json.loads((Path(folder) / "config.json").read_text())
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    if c["model_type"] not in ("llama", "mistral", "qwen3") or c.get("attention_bias"):
        raise ModelError(f"{folder}: model_type {c['model_type']} is not of the shape that GPT has")
    if rope.get("rope_type", rope.get("type", "default")) != "default" or c.get("sliding_window"):
        raise ModelError(f"{folder}: scaled rotary positions or a sliding window are not built in")
    config = GPTConfig(
        vocab_size=c["vocab_size"],
        block_size=c["max_position_embeddings"],
        n_layer=c["num_hidden_layers"],
        n_head=c["num_attention_heads"],
        n_kv_head=c.get("num_key_value_heads") or c["num_attention_heads"],
        n_embd=c["hidden_size"],
        n_inner=c["intermediate_size"],
        head_dim=c.get("head_dim") or 0,
        qk_norm=c["model_type"] == "qwen3",
        tied=c.get("tie_word_embeddings", False),
        rope_theta=rope.get("rope_theta", c.get("rope_theta", 10000.0)),
        norm_eps=c["rms_norm_eps"],
    )
    model, weights = GPT(config), {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        weights |= {k.removeprefix("model."): v for k, v in load_file(file).items()}
    if config.tied:
        weights["lm_head.weight"] = weights["embed_tokens.weight"]
    model.load_state_dict(weights)
    return model


def save_hf(model, folder, eot=None):
    """Write config.json and model.safetensors that transformers loads as Llama or Qwen3."""
    from safetensors.torch import save_file  # extra: hf

    c, folder = asdict(model.config), Path(folder)
    names = {
        "vocab_size": "vocab_size",
        "max_position_embeddings": "block_size",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "head_dim": "head_dim",
        "tie_word_embeddings": "tied",
        "rope_theta": "rope_theta",
        "rms_norm_eps": "norm_eps",
    }
    kind = ("qwen3", "Qwen3ForCausalLM") if c["qk_norm"] else ("llama", "LlamaForCausalLM")
    config = {"model_type": kind[0], "architectures": [kind[1]], "hidden_act": "silu"}
    config |= {"attention_bias": False, "bos_token_id": eot, "eos_token_id": eot}
    config |= {theirs: c[ours] for theirs, ours in names.items()}
    weights = {
        k if k.startswith("lm_head") else f"model.{k}": v.contiguous()
        for k, v in model.state_dict().items()
        if not (c["tied"] and k.startswith("lm_head"))
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))
