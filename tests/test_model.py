"""model.py: against transformers, torch.optim, float64 and one-prompt-at-a-time generation."""

import base64
import json
import os
import pickle
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import model as model_module
from model import (
    GPT,
    GPTConfig,
    Muon,
    check_rows,
    generate,
    load_checkpoint,
    load_hf,
    load_model,
    main,
    make_optimizers,
    orthogonal,
    save_hf,
    weights_hash,
)
from prepare_data import get_tokenizer

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 16
SHAPES = {
    "plain": {},
    "grouped": {"n_head": 6, "n_kv_head": 2, "head_dim": 8},
    "llama": {"n_kv_head": 2, "qk_norm": False, "rope_scaling": LLAMA3},
    "tied": {"n_kv_head": 1, "tied": True, "rope_theta": 500.0},
    "windowed": {"n_kv_head": 2, "qk_norm": False, "window": 5},
    "biased": {"n_kv_head": 2, "qk_norm": False, "qkv_bias": True},
}


def tiny(seed=0, **changes):
    """A GPT in float64 whose weights are large enough for its choices to be far from ties."""
    torch.manual_seed(seed)
    shape = {"vocab_size": 40, "block_size": 48, "n_layer": 2, "n_embd": 32, "n_inner": 48}
    gpt = GPT(GPTConfig(**{**shape, **changes}))
    for p in gpt.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.3)
        else:  # norms all ones would hide norms that are swapped or forgotten
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return gpt.double().eval()


def tokens_of(gpt, *shape):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(gpt.config.vocab_size, shape, generator=generator)


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-5)


def line_of(function, *args):
    """The one line that a call ends the script with."""
    with pytest.raises(SystemExit) as ended:
        function(*args)
    assert isinstance(ended.value.code, str) and "\n" not in ended.value.code
    return ended.value.code


# ---- the network, and generate -------------------------------------------------------------------


def test_first_weights_are_those_of_the_published_results():
    torch.manual_seed(1337)
    weights = dict(GPT(GPTConfig()).named_parameters())
    expected = {
        "embed_tokens.weight": [0.0236474, 0.0231057, -0.0234328],
        "layers.0.self_attn.q_proj.weight": [-0.0280307, 0.00959342, 0.00743405],
        "layers.3.self_attn.o_proj.weight": [0.0053593, -0.00743131, 0.00841031],
        "layers.3.mlp.down_proj.weight": [-0.00113266, 0.000127714, -0.00368661],
        "lm_head.weight": [0.0179001, -0.00109218, 0.00694097],
    }
    for name, numbers in expected.items():
        found = weights[name].detach().flatten()[[0, 1000, -1]].tolist()
        assert found == pytest.approx(numbers, rel=1e-5), name


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_token_changes_what_comes_after_it_and_nothing_before(shape):
    gpt = tiny(**SHAPES[shape], n_layer=1)
    tokens = tokens_of(gpt, 2, 24)
    before = gpt(tokens)
    for t in (1, 7, 23):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 40
        after = gpt(changed)
        end = t + (gpt.config.window or 24)
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[:, t:end] != before[:, t:end]).any(-1).all()
        assert torch.equal(after[:, end:], before[:, end:])


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_the_slopes_of_the_loss(shape):
    gpt = tiny(**SHAPES[shape])
    tokens = tokens_of(gpt, 2, 13)

    def loss():
        return F.cross_entropy(gpt(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    loss().backward()
    for name, p in gpt.named_parameters():
        direction = torch.randn_like(p)
        values = []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                p += step * direction
                values.append(loss().item())
        with torch.no_grad():
            p += 1e-5 * direction
        slope = (values[0] - values[1]) / 2e-5
        assert (p.grad * direction).sum().item() == pytest.approx(slope, rel=1e-4, abs=1e-7), name


@torch.no_grad()
def test_bfloat16_autocast_is_close():
    gpt = tiny(**SHAPES["grouped"]).float()
    tokens = tokens_of(gpt, 3, 24)
    exact = gpt(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        rough = gpt(tokens).float()
        assert [len(answer) for answer in generate(gpt, [[1, 2], [3]], 5)] == [5, 5]
    assert ((rough - exact).norm() / exact.norm()).item() < 0.03


@torch.no_grad()
def alone(gpt, prompt, max_new_tokens, stop):
    """What generate means: one prompt, and the whole sequence again for each token."""
    sequence = list(prompt)
    for _ in range(max_new_tokens):
        token = gpt(torch.tensor([sequence]))[0, -1].argmax().item()
        if token in stop:
            break
        sequence.append(token)
    return sequence[len(prompt) :]


GPTS = {shape: tiny(**changes) for shape, changes in SHAPES.items()}


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from(list(SHAPES)),
    prompts=st.lists(st.lists(st.integers(0, 39), min_size=1, max_size=20), min_size=1, max_size=9),
    max_new_tokens=st.integers(0, 20),
    stop=st.sets(st.integers(0, 39), max_size=12),
)
def test_generate_answers_each_prompt_as_if_alone(shape, prompts, max_new_tokens, stop):
    answers = generate(GPTS[shape], prompts, max_new_tokens, stop)
    assert answers == [alone(GPTS[shape], prompt, max_new_tokens, stop) for prompt in prompts]


def test_rows_that_ended_leave_the_batch_and_one_position_gets_logits():
    gpt = tiny()
    prompts = tokens_of(gpt, 10, 9).tolist()
    prompts = [prompt[: 2 + i % 8] for i, prompt in enumerate(prompts)]
    seen = []
    gpt.lm_head.register_forward_hook(lambda module, args, logits: seen.append(logits.shape))
    stop = {2, 3, 5, 7, 11}
    answers = generate(gpt, prompts, 30, stop)
    assert len({len(answer) for answer in answers}) > 4  # or this test tests little
    assert len(seen) == min(30, max(map(len, answers)) + 1)  # when all have ended, it ends
    rows = [shape.numel() // 40 for shape in seen]
    assert rows == sorted(rows, reverse=True) and rows[0] == 10 > rows[-1]


def test_what_does_not_fit_is_refused():
    gpt = tiny()
    for prompts in ([[1], []], [[1] * 39, [2]]):
        with pytest.raises(ValueError):
            generate(gpt, prompts, 10)
    assert len(generate(gpt, [[1] * 38], 10)[0]) == 10  # to the last position
    with pytest.raises(AssertionError):
        gpt(tokens_of(gpt, 1, 49))
    assert "n_kv_head" in line_of(lambda: GPTConfig(n_head=4, n_kv_head=3))
    check_rows(gpt, {"n_vocab": 40}, "x")
    line = line_of(check_rows, gpt, {"n_vocab": 42}, "some.pt")
    assert "some.pt" in line and "41" in line and "40" in line


# ---- the optimizers ------------------------------------------------------------------------------

MATRICES = {"wide": (24, 70), "tall": (70, 24), "square": (40, 40)}


@pytest.mark.parametrize("kind", MATRICES)
def test_muon_is_that_of_torch_up_to_bfloat16(kind):
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(MATRICES[kind]))
    theirs = torch.nn.Parameter(ours.detach().clone())
    options = {"lr": 0.02, "weight_decay": 0.3}
    optimizers = [Muon([ours], **options)]
    optimizers += [torch.optim.Muon([theirs], **options, adjust_lr_fn="match_rms_adamw")]
    for _ in range(6):
        before = ours.detach().clone()
        with torch.no_grad():
            theirs.copy_(ours)
        ours.grad = torch.randn(MATRICES[kind]) + 0.5
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.7
        assert (ours - theirs).norm() < 0.02 * (theirs - before).norm()


@pytest.mark.parametrize("kind", MATRICES)
def test_muon_keeps_singular_vectors_and_lifts_singular_values_to_one(kind):
    torch.manual_seed(0)
    matrix = torch.randn(MATRICES[kind], dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    S = S / S.norm()
    for _ in range(5):  # on the singular values alone
        S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
    torch.testing.assert_close(orthogonal(matrix), U @ S.diag() @ Vh, atol=1e-9, rtol=0)
    assert S[:-2].min() > 0.6 and S.max() < 1.25
    rough = orthogonal(matrix.float())
    assert rough.dtype == torch.float32  # not bfloat16, which this processor may only emulate
    torch.testing.assert_close(rough.double(), orthogonal(matrix), atol=1e-4, rtol=0)


def test_muon_steps_as_its_formula_says():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(6, 10, dtype=torch.float64))
    expected, average = p.detach().clone(), torch.zeros(6, 10, dtype=torch.float64)
    optimizer = Muon([p], lr=0.1, weight_decay=0.5)
    for step in range(4):
        p.grad = torch.randn(6, 10, dtype=torch.float64)
        if step == 2:  # its state survives being saved
            state = optimizer.state_dict()
            optimizer = Muon([p], lr=1.0)
            optimizer.load_state_dict(state)
        optimizer.step()
        average = 0.95 * average + 0.05 * p.grad
        direction = orthogonal(0.05 * p.grad + 0.95 * average)
        expected = (1 - 0.1 * 0.5) * expected - 0.1 * 0.2 * 10**0.5 * direction
        torch.testing.assert_close(p.detach(), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_only_matrices_of_the_blocks_decay_and_each_weight_has_one_optimizer(name):
    gpt = tiny(tied=True, qk_norm=False, qkv_bias=True).float()
    before = {key: p.detach().clone() for key, p in gpt.named_parameters()}
    for p in gpt.parameters():
        p.grad = torch.zeros_like(p)
    optimizers = make_optimizers(gpt, name, lr=0.1, weight_decay=0.5)
    held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, gpt.parameters()))
    matrices = [key for key, p in before.items() if key.startswith("layers") and p.dim() == 2]
    assert [type(optimizer) for optimizer in optimizers] == {
        "muon": [Muon, torch.optim.AdamW],
        "adamw": [torch.optim.AdamW],
    }[name]
    if name == "muon":
        assert len(optimizers[0].param_groups[0]["params"]) == len(matrices)
    for optimizer in optimizers:
        assert all(group["lr"] == 0.1 for group in optimizer.param_groups)
        optimizer.step()
    for key, p in gpt.named_parameters():
        torch.testing.assert_close(p.detach(), before[key] * (0.95 if key in matrices else 1))
    assert {g["betas"] for g in optimizers[-1].param_groups} == {(0.9, 0.95)}


# ---- checkpoints ---------------------------------------------------------------------------------


def ranks_spec(pattern):
    """meta.json's tokenizer: bytes, then pieces, of which not all are made of two others."""
    pieces = " t|he| the|in|er|34|123|12|45|aa|aaaa|pq|qr|pqr|"
    pieces += "def|return| self|\n\n|  |é|日本|entire|'ll"
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [piece.encode() for piece in pieces.split("|")]
    ranks = [base64.b64encode(token).decode() for token in tokens]
    eot = len(tokens)
    return {"name": "x", "n_vocab": eot + 1, "eot": eot, "pat_str": pattern, "ranks": ranks}


DEMO = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def checkpoint_of(gpt, spec=None):
    """As rho.py writes it."""
    config = dict(vars(gpt.config))
    return {"model_config": config, "model": gpt.state_dict(), "tokenizer": spec, "steps": 7}


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    gpt = tiny(n_kv_head=2, tied=True).float()
    torch.save(checkpoint_of(gpt), tmp_path / "ref.pt")
    again, checkpoint = load_model(tmp_path / "ref.pt")
    assert again.config == gpt.config and checkpoint["steps"] == 7
    assert again.lm_head.weight is again.embed_tokens.weight
    tokens = tokens_of(gpt, 2, 9)
    assert torch.equal(again(tokens), gpt(tokens))
    short, _ = load_model(tmp_path / "ref.pt", block_size=9)
    assert torch.equal(short(tokens), gpt(tokens)) and short.config.block_size == 9
    assert weights_hash(again) == weights_hash(gpt) != weights_hash(short)
    with torch.no_grad():
        gpt.layers[1].mlp.up_proj.weight[3, 5] += 1e-6
    assert weights_hash(again) != weights_hash(gpt)


def test_a_cut_checkpoint_or_a_flipped_bit_is_named(tmp_path):
    path = tmp_path / "slm.pt"
    gpt = tiny().float()
    torch.save(checkpoint_of(gpt), path)
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert str(path) in line_of(load_checkpoint, path)
    generator = random.Random(0)
    refused = 0
    for _ in range(40):
        flipped = bytearray(whole)
        flipped[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        path.write_bytes(flipped)
        try:
            again, _ = load_model(path)
        except SystemExit as ended:
            refused += 1
            assert str(path) in ended.code
        else:  # a bit between the records
            assert weights_hash(again) == weights_hash(gpt)
    assert refused > 30


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("went off",)


def test_what_is_not_a_checkpoint_of_ours_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = checkpoint_of(tiny())
    wrong = {
        "list": [1, 2],
        "number": 3,
        "empty": {},
        "no weights": {"model_config": good["model_config"]},
        "numbers": good | {"model": {"x": 3}},
        "other weights": good | {"model": {"x": torch.zeros(3)}},
        "other shape": good | {"model_config": good["model_config"] | {"n_embd": 64}},
        "other field": good | {"model_config": good["model_config"] | {"dropout": 0.1}},
        "bomb": good | {"step": Bomb()},
    }
    for name, content in wrong.items():
        torch.save(content, f"{name}.pt")
    Path("pickle.pt").write_bytes(pickle.dumps(good | {"step": Bomb()}, protocol=2))
    Path("text.pt").write_text("Here are the weights:\n1 2 3\n")
    for name in [*wrong, "pickle", "text"]:
        assert f"{name}.pt" in line_of(load_model, f"{name}.pt"), name
    assert not os.path.exists("went off")  # weights_only: a checkpoint runs no code


# ---- Hugging Face folders in and out -------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("safetensors", reason="extra hf is not installed")
    transformers = pytest.importorskip("transformers", reason="extra dev is not installed")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


FAMILIES = {
    "Llama": {},
    "Llama 3.2": {"rope_parameters": {**LLAMA3, "rope_theta": 500.0}},
    "Llama linear": {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 300.0},
    "Qwen2": {"use_sliding_window": False, "sliding_window": 8},
    "Qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "Mistral": {"sliding_window": None, "tie_word_embeddings": True},
    "Mistral windowed": {"sliding_window": 7},
    "Mistral wide": {"sliding_window": 64},
}


def theirs(transformers, family, **changes):
    """A tiny random model of transformers."""
    keys = {
        "vocab_size": 40, "max_position_embeddings": 64, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-3, "initializer_range": 0.3,
    }  # fmt: skip
    name = family.split()[0]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**keys | FAMILIES[family] | changes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for p in model.parameters():
        if p.dim() == 1:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_each_family_comes_in_and_goes_out_with_its_logits_and_text(transformers, tmp_path, family):
    original = theirs(transformers, family)
    original.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 1
    gpt, checkpoint = load_model(tmp_path / "in")
    assert checkpoint == {} and gpt.num_params() == original.num_parameters()
    tokens = tokens_of(gpt, 2, 64)
    logits = original(tokens).logits
    close(gpt(tokens), logits)
    close(load_hf(tmp_path / "in", block_size=9)(tokens[:, :9]), logits[:, :9])

    prompts = [tokens[0, :n].tolist() for n in (5, 20, 2)]
    padded = torch.tensor([[0] * (20 - len(p)) + p for p in prompts])
    seen = torch.tensor([[0] * (20 - len(p)) + [1] * len(p) for p in prompts])
    original.generation_config.pad_token_id = 0
    written = original.generate(
        padded, attention_mask=seen, max_new_tokens=30, do_sample=False, eos_token_id=None
    )
    assert generate(gpt, prompts, 30) == written[:, 20:].tolist()

    save_hf(gpt, tmp_path / "new" / "out")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "out")
    assert exported.num_parameters() == original.num_parameters()
    close(exported(tokens).logits, logits)
    assert load_hf(tmp_path / "new" / "out").config == gpt.config


@pytest.fixture
def folder(transformers, tmp_path):
    """A Llama in two shards, as transformers writes it."""
    theirs(transformers, "Llama").save_pretrained(tmp_path, max_shard_size="60KB")
    return tmp_path


def edit(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def shard_of(folder, key, other=False):
    """The shard that the index gives a tensor to, or one of the others."""
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return next(folder / p for p in sorted(set(places.values())) if (p != places[key]) == other)


def change_weights(path, changes):
    from safetensors.torch import load_file, save_file

    weights = {name: tensor.clone() for name, tensor in load_file(path).items()} | changes
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    save_file(weights, path)


HEAD, UP = "lm_head.weight", "model.layers.1.mlp.up_proj.weight"


def test_a_tensor_comes_from_the_shard_that_the_index_names(folder):
    right = load_hf(folder)
    for key in (HEAD, UP):
        change_weights(shard_of(folder, key, other=True), {key: torch.zeros(1, 1)})
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    change_weights(shard_of(folder, HEAD), inv_freq)
    for name in ("consolidated.safetensors", "adapter_model.safetensors", "pytorch_model.bin"):
        (folder / name).write_bytes(b"something else")
    again = load_hf(folder)
    assert weights_hash(again) == weights_hash(right)
    with open(shard_of(folder, HEAD), "r+b") as file:  # a loaded model does not change with it
        file.write(bytes(shard_of(folder, HEAD).stat().st_size))
    assert weights_hash(again) == weights_hash(right)


@pytest.mark.parametrize("change", [{UP: None}, {UP: torch.zeros(3, 3)}, {HEAD: None}])
def test_a_tensor_that_does_not_fit_is_named(folder, change):
    (key,) = change
    change_weights(shard_of(folder, key), change)
    line = line_of(load_model, folder)
    assert key.removeprefix("model.") in line and str(folder) in line


def test_tied_means_one_matrix(folder):
    edit(folder / "config.json", tie_word_embeddings=True)
    assert "tie_word_embeddings" in line_of(load_model, folder)


def test_bfloat16_and_every_spelling_of_the_rotary_keys(transformers, tmp_path):
    theirs(transformers, "Llama 3.2").bfloat16().save_pretrained(tmp_path)
    original = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    old = {"type" if key == "rope_type" else key: value for key, value in LLAMA3.items()}
    for spelled in (
        {"rope_theta": 500.0, "rope_scaling": LLAMA3},
        {"rope_theta": 500.0, "rope_scaling": old},
        {"rope_parameters": {**LLAMA3, "rope_theta": 500.0}, "rope_scaling": None},
    ):
        plain = dict.fromkeys(["rope_theta", "rope_scaling", "rope_parameters"])
        edit(tmp_path / "config.json", **plain | spelled)
        gpt = load_hf(tmp_path)
        assert {p.dtype for p in gpt.parameters()} == {torch.float32}
        tokens = tokens_of(gpt, 2, 64)
        close(gpt(tokens), original(tokens).logits)


REFUSED = {
    "model_type": "gpt2",
    "hidden_act": "gelu",
    "attention_bias": True,
    "mlp_bias": True,
    "partial_rotary_factor": 0.5,
    "quantization_config": {"quant_method": "gptq"},
    "pretraining_tp": 2,
    "num_local_experts": 8,
    "logit_scale": 0.0625,
    "final_logit_softcapping": 30.0,
    "use_sliding_window": True,
    "yarn": {"rope_type": "yarn", "factor": 4.0},
    "dynamic": {"type": "dynamic", "factor": 4.0},
    "low_freq_factor": {"rope_type": "llama3", "factor": 8.0},
    "full_attention": {"full_attention": {"rope_theta": 1.0}, "sliding_attention": {}},
    "config.json": "linear",
    "hidden_size": None,
    "num_key_value_heads": 3,
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_gpt_has_no_form_for_is_named(folder, key):
    rope = key in ("yarn", "dynamic", "low_freq_factor", "full_attention", "config.json")
    edit(folder / "config.json", **{"rope_parameters" if rope else key: REFUSED[key]})
    line = line_of(load_model, folder)
    assert key.replace("num_key_value_heads", "n_kv_head") in line
    for size in ("2048", 0):
        edit(folder / "config.json", num_hidden_layers=size)
        line_of(load_model, folder)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0"
DAMAGED = {  # a file, what becomes of it
    "cut shard": ("shard", lambda old: old[:-100]),
    "pointer": ("shard", lambda old: POINTER),
    "missing shard": ("shard", lambda old: None),
    "no map": ("model.safetensors.index.json", lambda old: b"{}"),
    "list for an index": ("model.safetensors.index.json", lambda old: b"[]"),
    "cut config": ("config.json", lambda old: old[:-100]),
    "list": ("config.json", lambda old: b"[]"),
    "no config": ("config.json", lambda old: None),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_folder_is_one_line_with_its_file(folder, damage):
    name, change = DAMAGED[damage]
    path = shard_of(folder, HEAD) if name == "shard" else folder / name
    content = change(path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert str(path) in line_of(load_model, folder)


def test_of_pickled_weights_the_line_says_what_to_do(folder):
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    line = line_of(load_model, folder)
    assert "pytorch_model.bin" in line and "save_pretrained" in line


# ---- the tokenizer goes out, and the command -----------------------------------------------------

PATTERNS = {
    "demo": DEMO,
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "words only": r"\p{L}+",
}


def many_texts():
    """Random Unicode of several kinds, code, prose, and what is special."""
    generator = random.Random(0)
    alphabets = [range(32, 127), range(0x250), range(0xD800), range(0x10000, 0x30000)]
    alphabets += [[ord(c) for c in " \n\r\ta1é'\u00a0\u2003\u3000\u0301\u0661"]]
    texts = ["", "<|endoftext|>", "a <|endoftext|>b", "aaaaaaa aaaaa", "zpqr", "12345678\n\n\n 9"]
    for i in range(300):
        letters = generator.choices(alphabets[i % 5], k=generator.randint(1, 50))
        texts.append("".join(map(chr, letters)))
    lines = Path(model_module.__file__).read_text().splitlines(keepends=True)
    return texts + ["".join(lines[i : i + 20]) for i in range(0, len(lines), 20)]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_ranks_go_out_as_a_tokenizer_with_the_same_ids(transformers, tmp_path, pattern):
    spec = ranks_spec(PATTERNS[pattern])
    save_hf(tiny(vocab_size=spec["n_vocab"]).float(), tmp_path, spec)
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in many_texts():
        ids = get_tokenizer(spec).bpe.encode_ordinary(text)
        assert exported(text).input_ids == [spec["eot"], *ids], repr(text)
    assert exported.bos_token_id == exported.eos_token_id == spec["eot"]
    generation = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert generation.eos_token_id == [spec["eot"]] and not generation.do_sample


KINDS = {  # special tokens, of which the first begins a text where the file says so
    "sentencepiece": ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
    "byte level": ["<|endoftext|>", "<|im_end|>"],
}


def write_tokenizer(folder, kind):
    """A tokenizer.json as TinyLlama's, or one that adds no token, as Qwen's chat models have."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    if kind == "sentencepiece":
        bpe = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
        spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        bpe.normalizer = normalizers.Sequence(spaces)
        bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
        alphabet = []
    else:
        bpe = Tokenizer(models.BPE())
        bpe.normalizer = normalizers.NFC()
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": KINDS[kind], "initial_alphabet": alphabet}
    bpe.train([__file__], BpeTrainer(vocab_size=600, show_progress=False, **options))
    bpe.save(str(folder / "tokenizer.json"))
    eos = KINDS[kind][1]
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_json_goes_out_as_it_came_in(transformers, tmp_path, kind):
    save_hf(tiny(vocab_size=640).float(), tmp_path)
    write_tokenizer(tmp_path, kind)
    gpt, checkpoint = load_model(tmp_path)
    save_hf(gpt, tmp_path / "out", checkpoint["tokenizer"])
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    tokenizer = get_tokenizer(checkpoint["tokenizer"])
    for text in many_texts():
        assert exported(text).input_ids == [*tokenizer.prompt_start, *tokenizer.encode(text)], text
    assert len(tokenizer.prompt_start) == 1
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert set(generation.eos_token_id) == tokenizer.stops >= {0, 1}
    assert load_model(tmp_path / "out")[1]["tokenizer"]["eot"] == tokenizer.eot


def test_the_command_exports_a_student(transformers, tmp_path, capsys):
    spec = ranks_spec(DEMO)
    gpt = tiny(vocab_size=spec["n_vocab"]).float()
    torch.save(checkpoint_of(gpt, spec), tmp_path / "slm.pt")
    for _ in range(2):  # a second export takes the place of the first
        main([str(tmp_path / "slm.pt"), str(tmp_path / "hub")])
    assert str(tmp_path / "hub") in capsys.readouterr().out
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hub")
    tokens = tokenizer("the entire text", return_tensors="pt").input_ids
    with torch.no_grad():
        close(exported(tokens).logits, gpt(tokens))
    # It stops where ours stops.
    gpt.lm_head.weight.data[spec["eot"]] *= 3
    save_hf(gpt, tmp_path / "hub", spec)
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
    for text in ("the", "in def", "34 12", "er", "12"):
        tokens = tokenizer(text, return_tensors="pt").input_ids
        written = exported.generate(tokens, max_new_tokens=20)[0, tokens.shape[1] :].tolist()
        ours = generate(gpt, tokens.tolist(), 20, get_tokenizer(spec).stops)[0]
        assert ours == [token for token in written if token != spec["eot"]]


def test_an_export_keeps_what_is_there_and_half_of_one_is_no_model(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch", reason="extra hf is not installed")
    gpt = tiny().float()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    assert "thesis.tex" in line_of(save_hf, gpt, tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]
    line_of(save_hf, tiny(qk_norm=True, window=5), tmp_path / "out")
    assert not (tmp_path / "out").exists()  # no family has this shape

    def no_room(*args):
        raise OSError(28, "No space left on device")

    save_hf(gpt, tmp_path / "hub")
    monkeypatch.setattr(safetensors, "save_file", no_room)
    assert "hub" in line_of(save_hf, gpt, tmp_path / "hub")
    assert "config.json" in line_of(load_model, tmp_path / "hub")
