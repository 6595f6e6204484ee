"""The GPT that reference and student both are, its optimizers, and Hugging Face weights in and out.

RMSNorm, rotary positions, SwiGLU and grouped-query attention: the shape of Llama, and with one
more field each of Qwen2.5, Qwen3 and Mistral. The file, from top to bottom: the network;
`generate`; Muon; checkpoints; Hugging Face folders in; Hugging Face folders out.

  python model.py out/demo/slm.pt FOLDER     export a student (takes seconds); then, in Python:
                                             AutoModelForCausalLM.from_pretrained("FOLDER")

Shapes: B sequences, T tokens, C channels, V vocabulary, H query heads of D channels, G key-value
heads, S positions that can be attended to: those in the cache and the T new ones.
"""

import hashlib
import json
import math
import re
import sys
import zipfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from prepare_data import get_tokenizer, one_line, run_script, tokenizer_spec

# check_available: a CUDA build of torch may run on a machine without a GPU.
ACCELERATOR = torch.accelerator.current_accelerator(check_available=True)
BEST_DEVICE = ACCELERATOR.type if ACCELERATOR else "cpu"

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
            sys.exit("n_head has to be a multiple of n_kv_head, and head_dim even and not 0")


def rotary_angles(position, config):
    """cos and sin, (B, 1, T, D/2) each, of the angle at each position for each pair of channels.

    position: (B, T).
    """
    D = config.head_dim
    speed = config.rope_theta ** (torch.arange(0, -D, -2, device=position.device) / D)  # (D/2,)
    if config.rope_scaling:
        speed = scale_rotary(speed, config.rope_scaling)
    angle = position[:, None, :, None] * speed
    return angle.cos(), angle.sin()


def scale_rotary(speed, scaling):
    """Slow the rotation down by a factor, as a model does that was trained on longer contexts."""
    slow = speed / scaling["factor"]  # (D/2,)
    if scaling["rope_type"] == "linear":
        return slow
    # Llama 3: channels that turn often within the original context keep their speed, channels that
    # turn seldom become slow, and between the two the speeds are mixed.
    turns = scaling["original_max_position_embeddings"] * speed / (2 * math.pi)
    low = scaling["low_freq_factor"]
    share = (turns - low) / (scaling["high_freq_factor"] - low)
    return slow.lerp(speed, share.clamp(0, 1))


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + D/2]) of x (B, H, T, D) by its angle."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attention_mask(position, T, window):
    """What each of the last T positions sees: (B, 1, T, S) bool. position (B, S), padding < 0."""
    key = position[:, None, None, :]  # (B, 1, 1, S)
    query = position[:, None, -T:, None]  # (B, 1, T, 1)
    # Padding attends to padding: a softmax over an empty row is NaN.
    visible = (key <= query) & ((key >= 0) | (query < 0))
    if window:
        visible &= key > query - window
    return visible


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
        norm = nn.RMSNorm if config.qk_norm else nn.Identity
        self.q_norm = norm(D, config.norm_eps)
        self.k_norm = norm(D, config.norm_eps)

    def forward(self, x, rotary, mask, cache):
        B, T, _ = x.shape
        projections = (self.q_proj, self.k_proj, self.v_proj)
        # (B, H, T, D) and twice (B, G, T, D)
        q, k, v = [
            project(x).view(B, T, -1, self.head_dim).transpose(1, 2) for project in projections
        ]
        q = rotate(self.q_norm(q), *rotary)
        k = rotate(self.k_norm(k), *rotary)
        if cache is not None:
            S = mask.shape[-1]
            cache[:, :, :, S - T : S] = torch.stack((k, v))
            k, v = cache[:, :, :, :S]  # (B, G, S, D) each
        gqa = k.shape[1] < q.shape[1]
        causal = mask is None
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=gqa)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)


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

    def forward(self, x, rotary, mask, cache):
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))  # (B, T, C)


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
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

    def forward(self, tokens):
        """Logits (B, T, V) of tokens (B, T)."""
        return self.lm_head(self.hidden(tokens))

    def hidden(self, tokens, cache=None, pad=0, start=0):
        """What `lm_head` turns into logits: (B, T, C) for tokens (B, T).

        For `generate`: cache, for each layer the keys and values, (2, B, G, room, D), of which the
        first `start` positions are filled; pad (B, 1), how many of these are padding, on the left.
        """
        T = tokens.shape[1]
        S = start + T
        position = torch.arange(S, device=tokens.device)[None] - pad  # (1, S) or (B, S)
        rotary = rotary_angles(position[:, start:], self.config)
        window = self.config.window
        mask = None  # plain causal attention: each position sees itself and all before it
        if cache is not None or 0 < window < S:
            mask = attention_mask(position, T, window)
        x = self.embed_tokens(tokens)  # (B, T, C)
        for i, layer in enumerate(self.layers):
            x = layer(x, rotary, mask, cache and cache[i])
        return self.norm(x)

    def num_params(self):
        return sum(p.numel() for p in self.parameters())


# ==== generate ====================================================================================


@torch.inference_mode()
def generate(gpt, prompts, max_new_tokens, stop=()):
    """Continue each prompt greedily until a token of `stop`, or for max_new_tokens.

    prompts: lists of token ids of any lengths. Returns a list of new ids for each prompt, without
    the stop token. ValueError if a prompt is empty, or too long for the answer to fit block_size.
    """
    lengths = [len(prompt) for prompt in prompts]
    size = max(lengths) + max_new_tokens
    if not all(lengths) or size > gpt.config.block_size:
        raise ValueError(f"a prompt is empty, or {size} tokens do not fit block_size")
    device = gpt.lm_head.weight.device
    prompts = [torch.tensor(prompt, device=device) for prompt in prompts]
    # (b, T), of the b rows in the batch
    tokens = nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left")
    pad = max(lengths) - torch.tensor(lengths, device=device)[:, None]  # (b, 1)
    room = (2, len(prompts), gpt.config.n_kv_head, size, gpt.config.head_dim)
    cache = [gpt.lm_head.weight.new_empty(room) for _ in gpt.layers]
    start = 0
    rows = list(range(len(prompts)))  # which prompts the rows of the batch are
    ended = set()
    answers = [[] for _ in prompts]
    for _ in range(max_new_tokens):
        hidden = gpt.hidden(tokens, cache, pad, start)  # (b, T, C)
        start += tokens.shape[1]
        # The head sees one position of each row: logits of all of them would be the largest tensor.
        tokens = gpt.lm_head(hidden[:, -1:]).max(-1).indices  # (b, 1); argmax is slower on a CPU
        for row, token in zip(rows, tokens.flatten().tolist(), strict=True):
            if token in stop:
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
            pad = pad[alive]
            cache = [layer[:, alive] for layer in cache]
    return answers


# ==== optimizers ==================================================================================


class Muon(torch.optim.Optimizer):
    """Momentum whose step for each matrix is made orthogonal: its singular values become about 1.

    A gradient has a few large directions, which would drown its many small ones. Like this, all are
    learned at one pace. Keller Jordan et al. 2024, https://kellerjordan.github.io/posts/muon;
    scaled as in Moonlight, Liu et al. 2025, arXiv 2502.16982. params: matrices only.

    torch.optim.Muon does the same in bfloat16 everywhere, which most processors only emulate, 20 to
    100 times slower. Here only CUDA computes in bfloat16, other devices in the matrix's own type.
    """

    def __init__(self, params, lr, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr = group["lr"]
            for p in group["params"]:
                average = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                average.lerp_(p.grad, 0.05)
                # Nesterov's momentum: the gradient counts once more.
                direction = orthogonal(p.grad.lerp(average, 0.95))
                # An entry of an orthogonal matrix is about 1 / max(rows, columns) ** 0.5, one of
                # AdamW's steps about 0.2: scaled like this, both share one learning rate.
                scale = 0.2 * max(p.shape) ** 0.5
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(direction, alpha=-lr * scale)


def orthogonal(matrix):
    """The same singular vectors, with singular values near 1: five Newton-Schulz steps."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.T).T  # the products below are smaller this way
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    x = x / x.norm().clamp(min=1e-7)  # now no singular value is above 1
    # Each step turns every singular value s into a*s + b*s^3 + c*s^5. These coefficients lift small
    # ones fast: in the end most lie between 0.7 and 1.2, which serves as well as 1.
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        square = x @ x.T
        factor = torch.addmm(square, square, square, beta=b, alpha=c)  # b * square + c * square^2
        x = torch.addmm(x, factor, x, beta=a)  # a * x + factor @ x
    return x


def make_optimizers(model, name, lr, weight_decay):
    """Muon for the matrices inside the blocks, which alone decay, and AdamW for the rest.

    name: "muon", or "adamw" for AdamW everywhere. Returns a list of one or two optimizers.
    """
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    inside = set(matrices)
    rest = [p for p in model.parameters() if p not in inside]
    adamw = torch.optim.AdamW(rest, lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    if name == "muon":
        return [Muon(matrices, lr, weight_decay), adamw]
    adamw.add_param_group({"params": matrices, "weight_decay": weight_decay})
    return [adamw]


# ==== checkpoints =================================================================================


def load_checkpoint(path):
    """The dict that a run saved, on the CPU. Exits where the file is damaged or something else."""
    if not Path(path).exists():
        sys.exit(f"{path} is missing; the demo's are made by: python rho.py")
    with one_line(path, "If it is rho.py's: delete it and run its stage again"):
        # torch.load does not compare the checksums that torch.save wrote: a flipped bit would
        # become a weight.
        if zipfile.ZipFile(path).testzip():
            raise ValueError("a checksum is wrong")
        return dict(torch.load(path, map_location="cpu", weights_only=True))


def load_model(path, device="cpu", block_size=None):
    """(GPT, checkpoint) of a file that rho.py wrote, or of a Hugging Face folder; in float32.

    Of a folder, the checkpoint is {"tokenizer": spec}, or {} where it has no tokenizer.json.
    block_size: the longest sequence that will come. The model's own may be shorter, and then stays.
    """
    if Path(path).is_dir():
        checkpoint = {}
        if Path(path, "tokenizer.json").exists():
            checkpoint["tokenizer"] = tokenizer_spec(path)
        model = load_hf(path, block_size)
    else:
        checkpoint = load_checkpoint(path)
        shape, weights = checkpoint.get("model_config"), checkpoint.get("model")
        model = model_with(shape, weights, path, block_size)
    return model.to(device), checkpoint


def model_with(shape, weights, path, block_size=None):
    """A GPT of GPTConfig(**shape) with weights {name: tensor}. Exits where they do not fit."""
    with one_line(path, "Does the file hold a model of another kind?"):
        config = GPTConfig(**shape)
        config.block_size = min(config.block_size, block_size or config.block_size)
        with torch.device("meta"):  # no time for first weights that are replaced at once
            model = GPT(config)
        if config.tied:
            embedding = weights["embed_tokens.weight"]
            if not torch.equal(weights.setdefault("lm_head.weight", embedding), embedding):
                raise ValueError("tie_word_embeddings is true, but lm_head.weight differs")
        model.load_state_dict(weights, assign=True)
        if config.tied:
            model.lm_head.weight = model.embed_tokens.weight
        return model


def check_rows(model, spec, path):
    """Exits where the tokenizer has ids that the model has no row for. Spare rows are usual."""
    highest = spec["n_vocab"] - 1
    rows = model.config.vocab_size
    if highest >= rows:
        sys.exit(f"{path}: the tokenizer has ids up to {highest}, the model {rows} rows")


def weights_hash(model):
    """A hexadecimal string that stands for every weight and the configuration.

    (With the block_size that `load_model` was given.)
    """
    digest = hashlib.sha256(json.dumps(vars(model.config)).encode())
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().view(torch.uint8).numpy())
    return digest.hexdigest()


# ==== Hugging Face folders in =====================================================================

# GPTConfig's fields in config.json; qk_norm and qkv_bias follow from the family.
HF_NAMES = {
    "vocab_size": "vocab_size", "block_size": "max_position_embeddings",
    "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size", "n_inner": "intermediate_size",
    "head_dim": "head_dim", "tied": "tie_word_embeddings", "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta", "window": "sliding_window",
}  # fmt: skip
# What keys mean that config.json leaves out.
HF_DEFAULTS = {
    "num_key_value_heads": 0, "head_dim": 0, "tie_word_embeddings": False,
    "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "sliding_window": 4096,
}  # fmt: skip
# The keys that each rope_type needs, besides rope_theta.
ROPE_KEYS = {
    "default": "",
    "linear": "factor",
    "llama3": "factor low_freq_factor high_freq_factor original_max_position_embeddings",
}
# Keys that GPT has no form for: refused unless they are off, or 1.
HF_OFF = """attention_bias mlp_bias use_qk_norm use_sliding_window rope_interleaved no_rope_layers
    full_attention sliding_attention quantization_config clip_qkv alibi num_experts
    num_local_experts n_routed_experts attention_multiplier attn_logit_softcapping
    final_logit_softcapping"""
HF_ONE = """partial_rotary_factor pretraining_tp logit_scale logits_scaling embedding_multiplier
    residual_multiplier"""
HF_FIXED = {"hidden_act": "silu"}
HF_FIXED |= dict.fromkeys(HF_OFF.split(), False) | dict.fromkeys(HF_ONE.split(), 1)
DOWNLOAD = "download it again (in a git clone: git lfs pull)"
SHARD_REMEDY = f"Damaged, or an LFS pointer? Then {DOWNLOAD}. It needs: pip install safetensors. "
SHARD_REMEDY += "From a pytorch_model.bin, transformers' save_pretrained makes one"


def load_hf(folder, block_size=None):
    """A GPT, in float32, from a folder with config.json and safetensors.

    Llama (TinyLlama, SmolLM2, Llama 3.2), Mistral, Qwen2.5 and Qwen3. Exits with the file, key or
    tensor that GPT does not support. block_size as in `load_model`.
    """
    path = Path(folder, "config.json")
    with one_line(path, f"GPT has no form for that, or the file is damaged: {DOWNLOAD}"):
        shape = shape_from_hf(json.loads(path.read_bytes()))
    return model_with(shape, read_safetensors(Path(folder)), folder, block_size)


def shape_from_hf(settings):
    """GPTConfig's arguments from those of config.json. An error names the key GPT has no form for.

    transformers 4 writes rope_theta and rope_scaling, transformers 5 both into rope_parameters.
    """
    family = settings["model_type"]
    if family not in ("llama", "mistral", "qwen2", "qwen3"):
        raise ValueError(f"model_type {family!r}")
    # null stands for the default, but a window of null for no window.
    no_window = settings.get("sliding_window", 0) is None
    settings = HF_DEFAULTS | {key: value for key, value in settings.items() if value is not None}
    settings |= settings.get("rope_scaling") or {}
    settings |= settings.get("rope_parameters") or {}
    for key, fixed in HF_FIXED.items():
        if settings.get(key) not in (None, fixed):
            raise ValueError(f"{key} {settings[key]!r}")
    if family != "mistral" or no_window:
        settings["sliding_window"] = 0  # it is off; families other than Mistral ignore it
    shape = {field: settings[key] for field, key in HF_NAMES.items()}
    rope_type = settings.get("rope_type", settings.get("type", "default"))
    if rope_type not in ROPE_KEYS:
        raise ValueError(f"rope_type {rope_type!r}")
    scaling = {key: settings[key] for key in ROPE_KEYS[rope_type].split()}
    for key, value in (shape | scaling).items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{key} {value!r}")
    if scaling:
        shape["rope_scaling"] = {"rope_type": rope_type, **scaling}
    return shape | {"qk_norm": family == "qwen3", "qkv_bias": family == "qwen2"}


def read_safetensors(folder):
    """All tensors of a folder, {our name: float32}: of the shards in the index, or of one file."""
    index = folder / "model.safetensors.index.json"
    places = {}  # {a tensor's name: its shard}
    if index.exists():
        with one_line(index, DOWNLOAD):
            places = json.loads(index.read_bytes())["weight_map"]
    weights = {}
    for shard in sorted(set(places.values())) or ["model.safetensors"]:
        path = folder / shard
        with one_line(path, SHARD_REMEDY):
            from safetensors.torch import load_file

            tensors = load_file(path)
        for key, tensor in tensors.items():
            # Another shard may hold a stale copy of what the index gives to this one. And the first
            # Llamas stored rotary tables, which here follow from the configuration.
            if places.get(key, shard) == shard and not key.endswith("rotary_emb.inv_freq"):
                # A copy, for what load_file returns changes or vanishes with the file.
                weights[key.removeprefix("model.")] = tensor.to(torch.float32, copy=True)
    return weights


# ==== Hugging Face folders out ====================================================================


def save_hf(model, folder, spec=None):
    """Write what AutoModelForCausalLM and, given the spec of a tokenizer, AutoTokenizer load.

    Exits if GPT's shape is that of no family, or the folder holds something else.
    """
    files = tokenizer_files(spec) if spec else {}
    files["config.json"] = config_to_hf(model.config)
    weights = {}
    for name, p in model.named_parameters():  # a tied head comes once, as the embedding
        weights[name if name.startswith("lm_head") else f"model.{name}"] = p.detach()
    folder = Path(folder)
    with one_line(folder, "Is the disk full? It needs: pip install safetensors"):
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        for other in folder.iterdir():
            if other.name not in {"model.safetensors", *files}:
                sys.exit(f"{other} is not part of this export: choose a folder of its own")
        # Without config.json, which is written last, half an export is taken for none.
        (folder / "config.json").unlink(missing_ok=True)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=1))


def config_to_hf(config):
    """config.json of a GPTConfig. Exits if no family has this shape."""
    family = "Llama"
    if config.window:
        family = "Mistral"
    if config.qkv_bias:
        family = "Qwen2"
    if config.qk_norm:
        family = "Qwen3"
    settings = {key: getattr(config, field) for field, key in HF_NAMES.items()}
    settings |= {"model_type": family.lower(), "architectures": [f"{family}ForCausalLM"]}
    settings["rope_scaling"] = config.rope_scaling
    if GPTConfig(**shape_from_hf(settings)) != config:
        sys.exit(f"Hugging Face's {family} has no form for {config}")
    return settings


def tokenizer_files(spec):
    """{file name: content} for AutoTokenizer, and for the stops of `generate` in transformers."""
    from tokenizers import processors

    ours = get_tokenizer(spec)
    theirs = ours.bpe if "json" in spec else tokenizer_of(ours.bpe)
    # The student has read these in front of every document, so each text gets them.
    start = ours.prompt_start
    names = [theirs.id_to_token(i) for i in start]
    if theirs.encode("").ids != start:
        theirs.post_processor = processors.TemplateProcessing(
            single=[*names, "$A"], special_tokens=list(zip(names, start, strict=True))
        )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[-1],
        "eos_token": theirs.id_to_token(ours.eot),
        # The text of a special token inside a document stays text, as where the data were made.
        "split_special_tokens": True,
    }
    # Every id at which eval_math.py stops, so that transformers' generate stops where ours does.
    generation = {"eos_token_id": sorted(ours.stops), "pad_token_id": ours.eot}
    return {
        "tokenizer.json": json.loads(theirs.to_str()),
        "tokenizer_config.json": settings,
        "generation_config.json": generation,
    }


def tokenizer_of(encoding):
    """A tiktoken.Encoding as a tokenizers.Tokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # Byte-level BPE spells each byte as a letter: itself if it is printable, else one beyond 255.
    alphabet = sorted(byte_level.alphabet())
    order = sorted(range(256), key=lambda byte: chr(byte) not in alphabet)
    letters = dict(zip(order, alphabet, strict=True))
    vocabulary = {}
    for token, rank in encoding._mergeable_ranks.items():
        vocabulary[token.decode("latin-1").translate(letters)] = rank
    # As in tiktoken, any two neighbors that are a token together join, the lowest rank first.
    merges = []
    for token in sorted(vocabulary, key=vocabulary.get):
        for i in range(1, len(token)):
            if token[:i] in vocabulary and token[i:] in vocabulary:
                merges.append((token[:i], token[i:]))
    special = encoding._special_tokens  # {text: id}
    model = models.BPE(vocab=vocabulary | special, merges=merges, ignore_merges=True)
    tokenizer = Tokenizer(model)
    # Only what the pattern matches is text, and each match is a piece of its own. A plus after a
    # count means "again" to this package and "never give back" to tiktoken: left out, it is right.
    pattern = re.sub(r"(\{\d+,\d+\})\+", r"\1", encoding._pat_str)
    split = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("ckpt", help="a checkpoint that rho.py wrote")
    parser.add_argument("folder", help="a new folder, or that of an old export")
    args = parser.parse_args(argv)
    model, checkpoint = load_model(args.ckpt)
    save_hf(model, args.folder, checkpoint.get("tokenizer"))
    print(f"{args.folder}: {model.num_params():,} parameters, for AutoModelForCausalLM")


if __name__ == "__main__":
    run_script(main)
