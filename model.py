"""The GPT that reference and student both are: forward, generate, checkpoints, HF weights.

RMSNorm, rotary positions, SwiGLU, grouped-query attention and no biases: the shape of Llama and
TinyLlama (the paper's base) and, with `qk_norm`, of Qwen3. `forward` stops at the hidden state and
`head` makes logits; the loss, which here *is* the paper, lives in rho.py. Shapes: B sequences,
T tokens, C channels, V vocabulary, H heads of D channels, G key-value heads, S cached positions.
"""

import json
import os
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import takewhile
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
    n_kv_head: int = 0  # fewer than n_head: grouped-query attention; 0: n_head
    n_embd: int = 128
    n_inner: int = 384  # width inside the SwiGLU; 8/3 · n_embd costs what a 4x GELU costs
    head_dim: int = 0  # 0: n_embd / n_head
    qk_norm: bool = True  # RMSNorm on queries and keys: small models learn far faster with it
    tied: bool = False  # one matrix for embedding and head
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        if self.n_head % self.n_kv_head or self.head_dim % 2:
            raise ModelError("n_head must be a multiple of n_kv_head, and head_dim even")


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + D/2]) of x (B, T, H, D). sin has its first half negated."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Block(nn.Module):
    def __init__(self, c: GPTConfig):
        super().__init__()
        self.head_dim = D = c.head_dim
        linear, norm = partial(nn.Linear, bias=False), partial(nn.RMSNorm, eps=c.norm_eps)
        self.input_layernorm = norm(c.n_embd)
        self.self_attn = a = nn.Module()  # so the parameters carry Hugging Face's names
        a.q_proj = linear(c.n_embd, c.n_head * D)
        a.k_proj = linear(c.n_embd, c.n_kv_head * D)
        a.v_proj = linear(c.n_embd, c.n_kv_head * D)
        a.o_proj = linear(c.n_head * D, c.n_embd)
        a.q_norm = norm(D) if c.qk_norm else nn.Identity()
        a.k_norm = norm(D) if c.qk_norm else nn.Identity()
        self.post_attention_layernorm = norm(c.n_embd)
        self.mlp = m = nn.Module()
        m.gate_proj = linear(c.n_embd, c.n_inner)
        m.up_proj = linear(c.n_embd, c.n_inner)
        m.down_proj = linear(c.n_inner, c.n_embd)

    def forward(self, x, cos, sin, mask, cache):
        (B, T, _), D, a, m = x.shape, self.head_dim, self.self_attn, self.mlp
        h = self.input_layernorm(x)  # (B, T, C)
        q = rotate(a.q_norm(a.q_proj(h).view(B, T, -1, D)), cos, sin).transpose(1, 2)
        k = rotate(a.k_norm(a.k_proj(h).view(B, T, -1, D)), cos, sin).transpose(1, 2)
        v = a.v_proj(h).view(B, T, -1, D).transpose(1, 2)  # (B, G, T, D); q: (B, H, T, D)
        if cache is not None:
            keys, values = cache.extend(self, k, v)  # (B, G, S, D)
        if cache is None or T > 1:
            causal, gqa = mask is None, k.shape[1] < q.shape[1]
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=gqa)
        else:  # one query a row: the same by hand, which on CPU takes half the time
            score = q.reshape(B, k.shape[1], -1, D) * D**-0.5 @ keys.mT  # (B, G, H/G, S)
            score = score if mask is None else score.masked_fill(~mask, -torch.inf)
            y = (score.softmax(-1) @ values).reshape(q.shape)  # (B, H, 1, D)
        x = x + a.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)
        h = self.post_attention_layernorm(x)
        return x + m.down_proj(F.silu(m.gate_proj(h)) * m.up_proj(h))  # (B, T, C)


class KVCache:
    """For each Block the keys and the values, both (B, G, S, D), seen so far."""

    def __init__(self, size):
        self.size, self.length, self.store = size, 0, {}

    def extend(self, block, k, v):
        B, G, T, D = k.shape
        if block not in self.store:
            self.store[block] = k.new_empty(B, G, self.size, D), v.new_empty(B, G, self.size, D)
        (keys, values), end = self.store[block], self.length + T
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config, c, D = config, config, config.head_dim
        self.embed_tokens = nn.Embedding(c.vocab_size, c.n_embd)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = nn.RMSNorm(c.n_embd, c.norm_eps)
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        if c.tied:
            self.lm_head.weight = self.embed_tokens.weight
        for name, p in self.named_parameters():
            if p.dim() == 2:  # what adds to the residual stream starts smaller, as in GPT-2
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / (2 * c.n_layer) ** 0.5 if residual else 0.02)
        speed = c.rope_theta ** (torch.arange(0, -D, -2) / D)  # (D/2,)
        angle = torch.outer(torch.arange(c.block_size), speed)  # (block_size, D/2)
        self.register_buffer("cos", torch.cat((angle, angle), 1).cos(), persistent=False)
        self.register_buffer("sin", torch.cat((-angle, angle), 1).sin(), persistent=False)

    def forward(self, tokens, cache=None, pad=None):
        """Hidden states (B, T, C) of tokens (B, T), to be given to `head`.

        cache: a KVCache; if it is not empty, the tokens are the next one of each row. pad (B,): how
        many positions on the left are filling. ValueError when the sequence outgrows block_size.
        """
        start = cache.length if cache is not None else 0
        end = start + tokens.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens do not fit block_size {self.config.block_size}")
        assert start in (0, end - 1), "a cache that is not empty takes one token at a time"
        position, mask = slice(start, end), None
        if pad is not None:
            key = torch.arange(end, device=tokens.device)  # (S,)
            query, first = key[start:, None], pad[:, None, None]  # (T, 1), (B, 1, 1)
            # filling sees filling: a softmax over nothing would be NaN
            mask = ((key <= query) & ((key >= first) | (query < first)))[:, None]  # (B, 1, T, S)
            position = (key[start:] - pad[:, None]).clamp(min=0)  # (B, T)
        x = self.embed_tokens(tokens)  # (B, T, C)
        cos, sin = (table[position].to(x.dtype).unsqueeze(-2) for table in (self.cos, self.sin))
        for layer in self.layers:
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
    T, room = max(map(len, prompts), default=0), gpt.config.block_size - max_new_tokens
    if not 0 < T <= room or not all(prompts):
        raise ValueError(f"block_size has room for prompts of 1 to {room} tokens, not of {T} or 0")
    tokens = torch.tensor([[0] * (T - len(p)) + list(p) for p in prompts]).to(gpt.cos.device)
    pad = torch.tensor([T - len(p) for p in prompts], device=tokens.device)  # (B,)
    pad = pad if pad.any() else None
    cache = KVCache(T + max_new_tokens) if use_cache else None
    stops = {stop} if isinstance(stop, int) else set(stop)
    rows, answers = list(range(len(prompts))), [[] for _ in prompts]  # rows: still in the batch
    for _ in range(max_new_tokens):
        unseen = tokens[:, cache.length :] if use_cache else tokens
        logits = gpt.head(gpt(unseen, cache, pad)[:, -1]).float()  # (b, V)
        if temperature > 0:
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        else:
            chosen = logits.max(-1, keepdim=True).indices  # (b, 1); argmax is much slower
        tokens = torch.cat((tokens, chosen), dim=1)
        for row, token in zip(rows, chosen[:, 0].tolist(), strict=True):
            answers[row].append(token)
        alive = [i for i, row in enumerate(rows) if stops.isdisjoint(answers[row])]
        if not alive:
            break
        if len(alive) < 0.8 * len(rows):  # not whenever a row ends, for this copies the cache
            tokens, rows = tokens[alive], [rows[i] for i in alive]
            pad = pad[alive] if pad is not None else None
            if use_cache:
                cache.store = {b: (k[alive], v[alive]) for b, (k, v) in cache.store.items()}
    return [list(takewhile(lambda token: token not in stops, answer)) for answer in answers]


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
    except RuntimeError as error:  # torch.save makes one of the OSError that a full disk is
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path):
    """The dict that a run saved. ModelError if it is cut short or something else."""
    with open(path, "rb") as f:
        try:
            return torch.load(f, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ModelError(f"{path} is cut short or foreign: delete it, run again") from error


def load_model(path, device="cpu"):
    """(GPT, checkpoint) of a file that rho.py wrote, or (GPT, {}) of a Hugging Face folder."""
    try:
        if Path(path).is_dir():
            return load_hf(path).to(device), {}
        checkpoint = load_checkpoint(path)
        model = GPT(GPTConfig(**checkpoint["model_config"])).to(device)
        model.load_state_dict(checkpoint["model"])
    except ImportError as error:
        raise ModelError(f"{path}: Hugging Face weights need pip install safetensors") from error
    except (LookupError, TypeError, RuntimeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path} holds no model that fits this model.py: make it anew") from error
    return model, checkpoint


HF_NAMES = {  # where they differ from the fields of GPTConfig
    "block_size": "max_position_embeddings", "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size",
    "n_inner": "intermediate_size", "tied": "tie_word_embeddings", "norm_eps": "rms_norm_eps",
}  # fmt: skip


def load_hf(folder):
    """A GPT from a folder with config.json and *.safetensors (Llama, Mistral, TinyLlama, Qwen3)."""
    from safetensors.torch import load_file  # extra: hf

    c = json.loads((Path(folder) / "config.json").read_text())
    c |= c.get("rope_parameters") or c.get("rope_scaling") or {}
    odd = [k for k in ("attention_bias", "mlp_bias", "sliding_window") if c.get(k)]
    kind, rope = c["model_type"], c.get("rope_type", c.get("type", "default"))
    if kind not in ("llama", "mistral", "qwen3") or rope != "default" or odd:
        raise ModelError(f"{folder}: GPT is built for no {kind} with {rope} rope, {odd or 'plain'}")
    c |= {"qk_norm": kind == "qwen3"}
    names = {ours: HF_NAMES.get(ours, ours) for ours in GPTConfig.__dataclass_fields__}
    model = GPT(GPTConfig(**{o: c[t] for o, t in names.items() if c.get(t) is not None}))
    files = sorted(Path(folder).glob("*.safetensors"))
    weights = {k.removeprefix("model."): v for f in files for k, v in load_file(f).items()}
    weights.setdefault("lm_head.weight", weights["embed_tokens.weight"])  # tied: stored once
    model.load_state_dict(weights)
    return model


def save_hf(model, folder, eot=None):
    """Write config.json and model.safetensors (a tied head once) for transformers to load."""
    from safetensors.torch import save_file  # extra: hf

    kind = "Qwen3" if model.config.qk_norm else "Llama"
    config = {HF_NAMES.get(ours, ours): value for ours, value in asdict(model.config).items()}
    config |= {"model_type": kind.lower(), "architectures": [f"{kind}ForCausalLM"]}
    config |= {"bos_token_id": eot, "eos_token_id": eot}
    weights = {f"model.{k}".replace("model.lm", "lm"): p.data for k, p in model.named_parameters()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    (Path(folder) / "config.json").write_text(json.dumps(config, indent=1))
