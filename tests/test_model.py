"""model.py: against transformers, float64 autograd and one-prompt-at-a-time generation."""

import json
import math
import os
import pickle
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_module
from model import (
    GPT,
    GPTConfig,
    KVCache,
    ModelError,
    all_losses,
    config_from_hf,
    generate,
    load_checkpoint,
    load_hf,
    load_model,
    main,
    save_hf,
    selected_loss,
)
from prepare_data import InputError, get_tokenizer

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


def tiny(dtype=torch.float32, seed=0, **changes):
    """A GPT whose weights are large enough for its choices to be far from ties."""
    torch.manual_seed(seed)
    shape = {"vocab_size": 40, "block_size": 48, "n_layer": 2, "n_embd": 32, "n_inner": 48}
    gpt = GPT(GPTConfig(**{**shape, **changes}))
    for p in gpt.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.3)
        else:  # norms all ones would hide norms that are swapped or forgotten
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return gpt.to(dtype).eval()


def tokens_of(gpt, *shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(gpt.config.vocab_size, shape, generator=generator)


def prompts_of(gpt, lengths):
    return [tokens_of(gpt, n, seed=10 + i).tolist() for i, n in enumerate(lengths)]


def alone(gpt, prompt, max_new_tokens, stop=()):
    """What generate means: one prompt, and the whole sequence again for each token."""
    sequence = list(prompt)
    for _ in range(max_new_tokens):
        token = gpt.head(gpt(torch.tensor([sequence])))[0, -1].argmax().item()
        if token in stop:
            break
        sequence.append(token)
    return sequence[len(prompt) :]


def error_of(function, *args):
    """The one line that a call fails with."""
    with pytest.raises(InputError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- the network ---------------------------------------------------------------------------------


def test_first_weights_are_those_of_the_published_results():
    torch.manual_seed(1337)
    gpt = GPT(GPTConfig())
    names = {
        "embed_tokens.weight": [0.0236474, 0.0231057, -0.0234328],
        "layers.0.self_attn.q_proj.weight": [-0.0280307, 0.00959342, 0.00743405],
        "layers.3.self_attn.o_proj.weight": [0.0053593, -0.00743131, 0.00841031],
        "layers.3.mlp.down_proj.weight": [-0.00113266, 0.000127714, -0.00368661],
        "lm_head.weight": [0.0179001, -0.00109218, 0.00694097],
    }
    weights = dict(gpt.named_parameters())
    for name, expected in names.items():
        found = weights[name].detach().flatten()[[0, 1000, -1]].tolist()
        assert found == pytest.approx(expected, rel=1e-5), name


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_token_changes_what_comes_after_it_and_nothing_before(shape):
    gpt = tiny(**SHAPES[shape], n_layer=1)
    tokens = tokens_of(gpt, 2, 24)
    before = gpt(tokens)
    for t in (1, 7, 23):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % gpt.config.vocab_size
        after = gpt(changed)
        end = t + (gpt.config.window or 24)
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[:, t:end] != before[:, t:end]).any(-1).all()
        assert torch.equal(after[:, end:], before[:, end:])


@torch.no_grad()
def test_positions_are_relative_and_matter():
    gpt = tiny(torch.float64, n_layer=1)
    a, b = torch.tensor([[3, 5, 7]]), torch.tensor([[5, 3, 7]])
    assert not torch.allclose(gpt(a)[:, -1], gpt(b)[:, -1])
    pad = torch.tensor([4])
    moved = torch.tensor([[0, 0, 0, 0, 3, 5, 7]])
    torch.testing.assert_close(gpt(moved, pad=pad)[:, 4:], gpt(a), atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_first_loss_is_that_of_a_guess(shape):
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=1000, n_embd=96, block_size=64, **SHAPES[shape]))
    tokens = tokens_of(gpt, 8, 65)
    losses, _ = all_losses(gpt(tokens[:, :-1]), gpt.lm_head.weight, tokens[:, 1:])
    assert losses.mean().item() == pytest.approx(math.log(1000), abs=0.05)


def test_what_does_not_fit_is_refused():
    gpt = tiny()
    with pytest.raises(ValueError, match="49 tokens do not fit block_size 48"):
        gpt(tokens_of(gpt, 1, 49))
    assert "n_kv_head" in error_of(lambda: GPTConfig(n_head=4, n_kv_head=3))
    assert "head_dim" in error_of(lambda: GPTConfig(head_dim=7))
    assert GPTConfig(n_head=8, n_kv_head=0).n_kv_head == 8


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_bfloat16_autocast_is_close_to_float32(shape):
    gpt = tiny(**SHAPES[shape])
    tokens = tokens_of(gpt, 3, 24)
    exact = gpt.head(gpt(tokens))
    with torch.autocast("cpu", torch.bfloat16):
        cache = KVCache(24)
        parts = [gpt(tokens[:, :20], cache)] + [gpt(tokens[:, [t]], cache) for t in range(20, 24)]
        for hidden in (gpt(tokens), torch.cat(parts, dim=1)):
            rough = gpt.head(hidden).float()
            assert ((rough - exact).norm() / exact.norm()).item() < 0.03
        assert [len(answer) for answer in generate(gpt, [[1, 2], [3]], 5)] == [5, 5]
    assert gpt.bfloat16()(tokens).dtype == torch.bfloat16


def test_recompute_stores_less_and_gives_the_same_gradients():
    gradients, stored = [], []
    for recompute in (False, True):
        gpt = tiny(n_layer=4)
        gpt.recompute = recompute
        sizes = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], lambda t: t
        )
        with hooks:
            hidden = gpt(tokens_of(gpt, 4, 40))
        hidden.square().sum().backward()
        stored.append(sum(sizes))
        gradients.append([p.grad for p in gpt.parameters() if p.grad is not None])
    assert stored[1] < stored[0] / 5
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


# ---- the cache, and generate ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_cached_equals_uncached(shape):
    gpt = tiny(torch.float64, **SHAPES[shape])
    tokens = tokens_of(gpt, 3, 20)
    whole = gpt(tokens)
    for prefill in (1, 7, 19):
        cache = KVCache(25)
        parts = [gpt(tokens[:, :prefill], cache)]
        parts += [gpt(tokens[:, [t]], cache) for t in range(prefill, 20)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-11, rtol=0)
    with pytest.raises(AssertionError, match="one token at a time"):
        gpt(tokens[:, :2], cache)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_row_of_a_padded_batch_is_that_row_alone(shape):
    gpt = tiny(torch.float64, **SHAPES[shape])
    lengths, T, new = [5, 12, 1], 12, 6
    pad = torch.tensor([T - n for n in lengths])
    tokens = tokens_of(gpt, 3, T + new)
    other = tokens.clone()
    for row, n in enumerate(pad):
        other[row, :n] = 39 - other[row, :n]
    # Every query sees something: some devices make NaN of an empty row.
    assert model_module.attention_mask(0, T, pad, gpt.config.window, "cpu").any(-1).all()
    cache = KVCache(T + new)
    parts = [gpt(tokens[:, :T], cache, pad)]
    parts += [gpt(tokens[:, [t]], cache, pad) for t in range(T, T + new)]
    for padded in (gpt(tokens, pad=pad), torch.cat(parts, dim=1)):
        assert padded.isfinite().all()
        for row, n in enumerate(pad):
            by_itself = gpt(tokens[[row], n:])[0]
            torch.testing.assert_close(padded[row, n:], by_itself, atol=1e-11, rtol=0)
    for row, n in enumerate(pad):  # which tokens the padding is made of does not matter
        assert torch.equal(gpt(other, pad=pad)[row, n:], gpt(tokens, pad=pad)[row, n:])


GPTS = {shape: tiny(torch.float64, **changes) for shape, changes in SHAPES.items()}


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from(list(SHAPES)),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=7),
    max_new_tokens=st.integers(0, 20),
    stop=st.sets(st.integers(0, 39), max_size=12),
    use_cache=st.booleans(),
)
@torch.no_grad()
def test_generate_answers_each_prompt_as_if_alone(shape, lengths, max_new_tokens, stop, use_cache):
    gpt = GPTS[shape]
    prompts = prompts_of(gpt, lengths)
    answers = generate(gpt, prompts, max_new_tokens, stop, use_cache=use_cache)
    assert answers == [alone(gpt, p, max_new_tokens, stop) for p in prompts]


def test_rows_that_ended_leave_the_batch_and_nothing_changes():
    gpt = tiny()
    prompts = prompts_of(gpt, [3, 9, 9, 1, 6, 9, 2, 9, 4, 7])
    free = generate(gpt, prompts, 30)
    assert [len(answer) for answer in free] == [30] * 10
    stop = {2, 3, 5, 7, 11}
    cut = [next((i for i, t in enumerate(answer) if t in stop), 30) for answer in free]
    assert len(set(cut)) > 4  # or this test tests little
    for use_cache in (True, False):
        batches = []
        hook = gpt.register_forward_hook(lambda m, args, out, seen=batches: seen.append(len(out)))
        answers = generate(gpt, prompts, 30, stop, use_cache=use_cache)
        hook.remove()
        assert answers == [answer[:n] for answer, n in zip(free, cut, strict=True)]
        assert batches == sorted(batches, reverse=True) and batches[0] == 10 > batches[-1]
        assert len(batches) == min(30, max(cut) + 1)  # and when all have ended, it ends


def test_stop_may_be_an_id_or_several():
    gpt = tiny()
    prompts = prompts_of(gpt, [4, 7])
    free = generate(gpt, prompts, 12)
    token = free[0][3]
    expected = [a[: a.index(token)] if token in a else a for a in free]
    for stop in (token, {token}, [token], (token,)):
        assert generate(gpt, prompts, 12, stop) == expected
    assert len(expected[0]) <= 3


def test_generate_refuses_what_it_cannot_answer():
    gpt = tiny()
    for prompts in ([], [[1], []], [[1] * 40, [2]]):
        with pytest.raises(ValueError, match="block_size has room for prompts of 1 to 38 tokens"):
            generate(gpt, prompts, 10)
    assert len(generate(gpt, [[1] * 38], 10)[0]) == 10  # to the last position
    assert generate(gpt, [[1]], 0) == [[]]


def test_sampling_repeats_with_its_generator_and_follows_the_softmax():
    gpt = tiny(vocab_size=8)

    def draw(seed, n=20_000, **keywords):
        generator = torch.Generator().manual_seed(seed)
        return generate(gpt, [[3, 1]] * n, 1, temperature=1.5, generator=generator, **keywords)

    answers = draw(5)
    assert answers == draw(5) == draw(5, use_cache=False) != draw(6)
    counts = torch.tensor(answers).flatten().bincount(minlength=8)
    with torch.no_grad():
        share = (gpt.head(gpt(torch.tensor([[3, 1]])))[0, -1] / 1.5).softmax(-1)
    expected = share * len(answers)
    assert ((counts - expected) ** 2 / expected).sum().item() < 24.3  # chi², 7 degrees: p = 0.001
    assert (expected > 20).sum() > 3  # of more than a few tokens
    cold = generate(gpt, [[3, 1]] * 5, 6, temperature=1e-4)
    assert cold == generate(gpt, [[3, 1]] * 5, 6)


# ---- the loss in two phases ----------------------------------------------------------------------

B, T, C, V = 3, 10, 8, 50


def loss_inputs(dtype=torch.float32):
    torch.manual_seed(0)
    hidden = torch.randn(B, T, C).to(dtype).requires_grad_()
    head = torch.randn(V, C, requires_grad=True)
    return hidden, head, torch.randint(V, (B, T))


WEIGHTS = {
    "mask": torch.rand(B, T, generator=torch.Generator().manual_seed(2)) < 0.6,
    "soft": torch.rand(B, T, generator=torch.Generator().manual_seed(3)),
    "signed": torch.randn(B, T, generator=torch.Generator().manual_seed(4)).relu() - 0.5,
    "none": torch.zeros(B, T, dtype=torch.bool),
    "all": torch.ones(B, T, dtype=torch.bool),
    "one": torch.arange(B * T).view(B, T) == 17,
}


def by_definition(hidden, head, targets, weights):
    """(losses, gradient of hidden, gradient of head) by autograd in float64."""
    hidden = hidden.detach().double().requires_grad_()
    head = head.detach().double().requires_grad_()
    losses = F.cross_entropy((hidden @ head.T).flatten(0, 1), targets.flatten(), reduction="none")
    (losses * weights.flatten()).sum().backward()
    return losses.detach().view(targets.shape), hidden.grad, head.grad


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm().clamp(min=1e-9)).item()


@pytest.mark.parametrize("keep", [0, 2**28], ids=["recomputed", "kept"])
@pytest.mark.parametrize("block", [1, 7 * B * T, 2**20])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_both_phases_equal_the_definition_in_float64(monkeypatch, kind, block, keep):
    monkeypatch.setattr(model_module, "CPU_BLOCK", block)
    monkeypatch.setattr(model_module, "KEEP", keep)
    hidden, head, targets = loss_inputs()
    weights = WEIGHTS[kind]
    exact, exact_hidden, exact_head = by_definition(hidden, head, targets, weights)
    losses, kept = all_losses(hidden, head, targets)
    assert losses.shape == (B, T) and losses.dtype == torch.float32 and not losses.requires_grad
    assert bool(kept.logits) == bool(keep)
    torch.testing.assert_close(losses.double(), exact, atol=1e-5, rtol=0)
    # A second call with the same `kept`, and one with none, are as right as the first.
    for given_kept in (kept, kept, None):
        hidden.grad = head.grad = None
        loss = selected_loss(hidden, head, targets, weights, given_kept)
        (3 * loss).backward()
        assert loss.item() == pytest.approx((exact * weights).sum().item(), rel=1e-5, abs=1e-5)
        assert relative_error(hidden.grad, 3 * exact_hidden) < 3e-6
        assert relative_error(head.grad, 3 * exact_head) < 3e-6


def test_gradient_is_the_slope_of_the_loss():
    hidden, head, targets = loss_inputs()
    weights = WEIGHTS["soft"]
    selected_loss(hidden, head, targets, weights).backward()
    for tensor in (hidden, head):
        direction = torch.randn(tensor.shape, dtype=torch.float64)
        values = []
        for step in (1e-6, -1e-6):
            moved = {id(t): t.detach().double() for t in (hidden, head)}
            moved[id(tensor)] += step * direction
            logits = moved[id(hidden)] @ moved[id(head)].T
            target = logits.gather(-1, targets[..., None])[..., 0]
            values.append((weights * (logits.logsumexp(-1) - target)).sum().item())
        slope = (values[0] - values[1]) / 2e-6
        assert (tensor.grad * direction).sum().item() == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("keep", [0, 2**28])
def test_in_bfloat16_the_products_are_rough_and_the_losses_close(monkeypatch, keep):
    monkeypatch.setattr(model_module, "KEEP", keep)
    hidden, head, targets = loss_inputs(torch.bfloat16)
    weights = WEIGHTS["soft"]
    exact, exact_hidden, exact_head = by_definition(hidden, head, targets, weights)
    losses, kept = all_losses(hidden, head, targets)
    selected_loss(hidden, head, targets, weights, kept).backward()
    assert losses.dtype == torch.float32 and hidden.grad.dtype == torch.bfloat16
    assert relative_error(losses, exact) < 0.01
    assert relative_error(hidden.grad, exact_hidden) < 0.02
    assert relative_error(head.grad, exact_head) < 0.02


def test_in_bfloat16_a_learned_token_keeps_its_small_gradient():
    hidden = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    head = torch.tensor([[8.0, 1.0], [0.0, 1.0], [0.0, 2.0]], requires_grad=True)
    selected_loss(hidden, head, torch.tensor([0]), torch.tensor([True])).backward()
    error = 1 - math.exp(8) / (math.exp(8) + 2)  # 0.00067; 1 - bfloat16(0.99933) is 0
    assert hidden.grad[0, 0].item() == pytest.approx(-8 * error, rel=0.01)
    assert head.grad[0, 0].item() == pytest.approx(-error, rel=0.01)


class Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_no_tensor_is_larger_than_a_block_where_no_logits_are_kept(monkeypatch):
    monkeypatch.setattr(model_module, "CPU_BLOCK", 2000)
    hidden, head = torch.randn(40, 4), torch.randn(500, 4, requires_grad=True)
    targets = torch.randint(500, (40,))
    with Largest() as largest:
        _, kept = all_losses(hidden, head, targets, keep=False)
        assert kept.logits == []
        selected_loss(hidden, head, targets, torch.ones(40), kept).backward()
    assert largest.numel == 2000  # of 20,000 logits


def test_a_target_outside_the_vocabulary_has_no_loss():
    hidden, head, targets = loss_inputs()
    targets[0, 3], targets[2, 5] = V, -100
    losses, kept = all_losses(hidden, head, targets)
    assert losses.isnan().nonzero().tolist() == [[0, 3], [2, 5]]
    assert selected_loss(hidden, head, targets, ~losses.isnan(), kept).isfinite()


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
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 300.0},
    "Qwen2": {"use_sliding_window": False, "sliding_window": 8},
    "Qwen3": {"head_dim": 16},
    "Mistral": {"sliding_window": None},
    "Mistral with a window": {"sliding_window": 7},
    "Mistral with a long window": {"sliding_window": 64},
}


def theirs(transformers, family, **changes):
    """A tiny random model of transformers."""
    settings = {
        "vocab_size": 40, "max_position_embeddings": 64, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-3, "initializer_range": 0.3,
    }  # fmt: skip
    name = {"Llama 3.2": "Llama", "linear": "Llama"}.get(family, family.split()[0])
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings | FAMILIES[family] | changes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for p in model.parameters():
        if p.dim() == 1:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return model


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_each_family_comes_in_and_goes_out_with_its_logits_and_text(
    transformers, tmp_path, family, tied
):
    original = theirs(transformers, family, tie_word_embeddings=tied)
    original.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 1
    gpt, checkpoint = load_model(tmp_path / "in")
    assert checkpoint == {} and gpt.num_params() == original.num_parameters()
    tokens = tokens_of(gpt, 2, 64)
    logits = original(tokens).logits
    torch.testing.assert_close(gpt.head(gpt(tokens)), logits, atol=5e-5, rtol=1e-5)

    prompts = prompts_of(gpt, [5, 20, 2])
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
    torch.testing.assert_close(exported(tokens).logits, logits, atol=5e-5, rtol=1e-5)
    assert load_hf(tmp_path / "new" / "out").config == gpt.config


@torch.no_grad()
def test_bfloat16_weights_come_in_as_float32_and_other_files_do_not_matter(transformers, tmp_path):
    theirs(transformers, "Llama").bfloat16().save_pretrained(tmp_path)
    original = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name in ("consolidated.safetensors", "adapter_model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(b"something else")
    gpt = load_hf(tmp_path)
    tokens = tokens_of(gpt, 2, 64)
    assert {p.dtype for p in gpt.parameters()} == {torch.float32}
    logits = original(tokens).logits
    torch.testing.assert_close(gpt.head(gpt(tokens)), logits, atol=5e-5, rtol=1e-5)


def test_block_size_caps_the_tables_of_a_model_for_long_contexts(transformers, tmp_path):
    original = theirs(transformers, "Mistral with a window", max_position_embeddings=10**6)
    original.save_pretrained(tmp_path)
    gpt, _ = load_model(tmp_path, block_size=32)
    assert gpt.config.block_size == 32 and len(gpt.cos) == 32 and gpt.config.window == 7
    assert load_model(tmp_path, block_size=7)[0].config.window == 0


TINYLLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32",
    "vocab_size": 32000, "max_position_embeddings": 2048, "hidden_size": 2048,
    "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4, "hidden_act": "silu", "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
    "rope_scaling": None, "attention_bias": False, "pretraining_tp": 1, "initializer_range": 0.02,
    "tie_word_embeddings": False, "use_cache": True, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def test_tinyllama_has_the_tensors_that_transformers_gives_it(transformers):
    with torch.device("meta"):
        original = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINYLLAMA))
        gpt = GPT(config_from_hf(TINYLLAMA))
    expected = {k.removeprefix("model."): v.shape for k, v in original.state_dict().items()}
    assert {k: v.shape for k, v in gpt.state_dict().items()} == expected
    assert gpt.num_params() == 1_100_048_384 and gpt.config.norm_eps == 1e-5


def test_every_spelling_of_the_rotary_keys_is_read():
    shape = {**TINYLLAMA, "rope_theta": None}
    flat = {**LLAMA3, "rope_theta": 5e5}
    old = {"type" if key == "rope_type" else key: value for key, value in LLAMA3.items()}
    for spelled in (
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": old},
        {"rope_parameters": flat},
        {"rope_parameters": {"full_attention": flat}},
    ):
        config = config_from_hf({**shape, **spelled})
        assert config.rope_theta == 5e5 and config.rope_scaling == LLAMA3
    config = config_from_hf({**shape, "rope_parameters": {"rope_type": "default"}})
    assert config.rope_theta == 10000.0 and config.rope_scaling is None


def test_an_old_llama_without_the_later_keys_is_read():
    later = ("num_key_value_heads", "rope_theta", "rope_scaling", "tie_word_embeddings")
    config = config_from_hf({k: v for k, v in TINYLLAMA.items() if k not in later})
    assert (config.n_kv_head, config.head_dim, config.tied) == (32, 64, False)


def test_what_is_left_out_is_what_the_family_has():
    assert config_from_hf({**TINYLLAMA, "model_type": "qwen3"}).head_dim == 128
    mistral = {**TINYLLAMA, "model_type": "mistral", "max_position_embeddings": 8192}
    assert config_from_hf(mistral).window == 4096
    assert config_from_hf({**mistral, "sliding_window": 8191}).window == 8191
    assert config_from_hf({**mistral, "sliding_window": 8192}).window == 0


REFUSED = {
    "model_type": {"model_type": "gpt2"},
    "hidden_act": {"hidden_act": "gelu"},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "partial_rotary_factor": {"rope_parameters": {"partial_rotary_factor": 0.5}},
    "quantization_config": {"quantization_config": {"quant_method": "gptq"}},
    "pretraining_tp": {"pretraining_tp": 2},
    "num_local_experts": {"num_local_experts": 8},
    "logit_scale": {"logit_scale": 0.0625},
    "final_logit_softcapping": {"final_logit_softcapping": 30.0},
    "rope_type 'yarn'": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "rope_type 'dynamic'": {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "low_freq_factor": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    "rope_scaling": {"rope_scaling": "linear"},
    "rope_parameters": {"rope_parameters": {"full": {"rope_theta": 1.0}, "local": {}}},
    "sliding_window": {"sliding_window": 16},
    "sliding_window 16": {"model_type": "qwen3", "sliding_window": 16, "use_sliding_window": True},
    "hidden_size": {"hidden_size": "2048"},
    "vocab_size": {"vocab_size": None},
    "num_hidden_layers": {"num_hidden_layers": 0},
    "rms_norm_eps": {"rms_norm_eps": math.nan},
    "n_kv_head": {"num_key_value_heads": 5},
}


@pytest.mark.parametrize("named", REFUSED)
def test_a_key_that_gpt_has_no_form_for_is_named(tmp_path, named):
    (tmp_path / "config.json").write_text(json.dumps({**TINYLLAMA, **REFUSED[named]}))
    message = error_of(load_model, tmp_path)
    assert named in message and str(tmp_path / "config.json") in message


@pytest.fixture
def folder(tmp_path):
    """An exported GPT."""
    pytest.importorskip("safetensors", reason="extra hf is not installed")
    save_hf(tiny(qk_norm=False), tmp_path)
    return tmp_path


def change_weights(folder, **changes):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        weights[name] = tensor
        if tensor is None:
            del weights[name]
    save_file({k: v.clone() for k, v in weights.items()}, folder / "model.safetensors")


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({UP: None}, UP.removeprefix("model.")),
        ({UP: torch.zeros(3, 3)}, UP.removeprefix("model.")),
        ({"model.layers.1.mlp.up_proj.bias": torch.zeros(48)}, "mlp.up_proj.bias"),
        ({"lm_head.weight": None}, "lm_head.weight"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(folder, changes, named):
    change_weights(folder, **changes)
    message = error_of(load_model, folder)
    assert named in message and str(folder) in message


def test_tied_means_one_matrix(folder):
    change_config(folder, tie_word_embeddings=True)
    message = error_of(load_model, folder)
    assert "tie_word_embeddings" in message and "lm_head.weight" in message
    change_weights(folder, **{"lm_head.weight": load_weights(folder)["model.embed_tokens.weight"]})
    gpt, _ = load_model(folder)
    assert gpt.lm_head.weight is gpt.embed_tokens.weight


def load_weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_stored_rotary_tables_are_left_out(folder):
    before = load_hf(folder)
    change_weights(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    assert torch.equal(load_hf(folder).lm_head.weight, before.lm_head.weight)


def test_a_loaded_model_does_not_change_with_its_file(folder):
    gpt = load_hf(folder)
    before = gpt.lm_head.weight.tolist()
    with open(folder / "model.safetensors", "r+b") as file:
        file.write(bytes((folder / "model.safetensors").stat().st_size))
    assert gpt.lm_head.weight.tolist() == before


SHARDS = '{"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}'
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0"
HALF = object()
# What a file of the folder becomes (None: it is gone), the file that is named, and the remedy.
DAMAGED = {
    "pickle": ({"model.safetensors": None, "pytorch_model.bin": "x"}, "bin", "save_pretrained"),
    "shard": ({"model.safetensors.index.json": SHARDS}, "-00001-of-00002.safetensors", "download"),
    "no map": ({"model.safetensors.index.json": "{}"}, "index.json", "download"),
    "no weights": ({"model.safetensors": None}, "model.safetensors not found", "download"),
    "cut weights": ({"model.safetensors": HALF}, "model.safetensors", "download"),
    "pointer": ({"model.safetensors": POINTER}, "model.safetensors", "git lfs pull"),
    "cut config": ({"config.json": HALF}, "config.json", "download"),
    "list": ({"config.json": "[]"}, "config.json", "download"),
    "deep": ({"config.json": "[" * 10**5}, "config.json", "download"),
    "no config": ({"config.json": None}, "config.json not found", "Hugging Face folder"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_folder_is_one_line_with_its_file_and_remedy(folder, damage):
    changes, named, remedy = DAMAGED[damage]
    for name, content in changes.items():
        old = (folder / name).read_bytes() if (folder / name).exists() else b""
        (folder / name).unlink(missing_ok=True)
        if content is HALF:
            (folder / name).write_bytes(old[: len(old) // 2])
        elif content is not None:
            (folder / name).write_text(content)
    message = error_of(load_model, folder)
    assert f"{folder}{os.sep}" in message and named in message and remedy in message


def test_without_the_extra_the_line_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "pip install safetensors tokenizers" in error_of(load_model, folder)
    assert "pip install safetensors tokenizers" in error_of(save_hf, tiny(), folder)


# ---- the tokenizer goes out ----------------------------------------------------------------------

PATTERNS = {
    "demo": r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "words only": r"\p{L}+",
}


def ranks_spec(pattern):
    """meta.json's tokenizer: bytes, then pieces, of which not all are made of two others."""
    import base64

    pieces = " t|he| the|in|er|34|123|12|45|aa|aaaa|pq|qr|pqr|"
    pieces += "def|return| self|\n\n|  |é|日本|entire|'ll"
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [piece.encode() for piece in pieces.split("|")]
    return {
        "name": "small",
        "n_vocab": len(tokens) + 1,
        "eot": len(tokens),
        "pat_str": pattern,
        "ranks": [base64.b64encode(token).decode() for token in tokens],
    }


def many_texts():
    """Random Unicode of several kinds, code, prose, and what is special."""
    generator = random.Random(0)
    alphabets = [
        range(32, 127),
        range(0x250),
        range(0xD800),
        range(0x10000, 0x30000),
        [ord(c) for c in " \n\r\ta1é'\u00a0\u2003\u3000\u0301\u0661"],
    ]
    texts = ["", "<|endoftext|>", "a <|endoftext|>b", "aaaaaaa aaaaa", "zpqr", "12345678\n\n\n 9"]
    for i in range(300):
        letters = generator.choices(alphabets[i % 5], k=generator.randint(1, 50))
        texts.append("".join(map(chr, letters)))
    for path in (Path(__file__), Path(model_module.__file__)):
        lines = path.read_text().splitlines(keepends=True)
        texts += ["".join(lines[i : i + 20]) for i in range(0, len(lines), 20)]
    return texts


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_exported_tokenizer_gives_the_same_ids(transformers, tmp_path, pattern):
    spec = ranks_spec(PATTERNS[pattern])
    save_hf(tiny(vocab_size=spec["n_vocab"]), tmp_path, spec)
    encoding = get_tokenizer(spec)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = many_texts()
    assert len(texts) > 330
    for text in texts:
        ids = encoding.encode_ordinary(text)
        assert tokenizer(text).input_ids == [spec["eot"], *ids], repr(text)
        assert tokenizer(text, add_special_tokens=False).input_ids == ids
        if pattern != "words only":
            assert tokenizer.decode(ids) == text
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == spec["eot"]
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (config.bos_token_id, config.eos_token_id) == (spec["eot"], spec["eot"])
    assert config.dtype == torch.float32
    generation = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert generation.eos_token_id == spec["eot"] and not generation.do_sample
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_tokenizer_json_goes_out_as_it_came_in(transformers, tmp_path):
    """A SentencePiece kind, as TinyLlama's, and a byte-level kind that adds nothing, as Qwen's."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    kinds = {"sentencepiece": tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))}
    kinds["byte level"] = tokenizers.Tokenizer(models.BPE())
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    kinds["sentencepiece"].normalizer = normalizers.Sequence(spaces)
    kinds["sentencepiece"].post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    kinds["byte level"].pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    kinds["byte level"].normalizer = normalizers.NFC()
    kinds["byte level"].decoder = decoders.ByteLevel()
    special = {"sentencepiece": ["<s>", "</s>"], "byte level": ["<|endoftext|>"]}
    special["sentencepiece"] += [f"<0x{byte:02X}>" for byte in range(256)]
    for kind, tokenizer in kinds.items():
        source = tmp_path / kind
        source.mkdir()
        alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "byte level" else []
        trainer = trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=special[kind],
            initial_alphabet=alphabet,
            show_progress=False,
        )
        tokenizer.train([str(Path(__file__))], trainer)
        tokenizer.save(str(source / "tokenizer.json"))
        save_hf(tiny(vocab_size=640, qk_norm=False), source)
        gpt, checkpoint = load_model(source)  # a folder with a tokenizer.json gives its spec
        save_hf(gpt, tmp_path / f"{kind} out", checkpoint["tokenizer"])
        exported = transformers.AutoTokenizer.from_pretrained(tmp_path / f"{kind} out")
        encoding = get_tokenizer(checkpoint["tokenizer"])
        for text in many_texts():
            ids = [0, *encoding.encode_ordinary(text)]
            assert exported(text).input_ids == ids, (kind, text)


# ---- checkpoints, and the command ----------------------------------------------------------------

OLD_FIELDS = (
    "vocab_size block_size n_layer n_head n_kv_head n_embd n_inner head_dim qk_norm tied "
    "rope_theta norm_eps"
)


def checkpoint_of(gpt):
    """As rho.py wrote it at first, without the fields that came later."""
    config = {name: getattr(gpt.config, name) for name in OLD_FIELDS.split()}
    spec = ranks_spec(PATTERNS["demo"])
    return {"model_config": config, "model": gpt.state_dict(), "tokenizer": spec, "steps": 7}


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    gpt = tiny(n_kv_head=2, tied=True)
    torch.save(checkpoint_of(gpt), tmp_path / "ref.pt")
    again, checkpoint = load_model(tmp_path / "ref.pt")
    assert again.config == gpt.config and checkpoint["steps"] == 7
    assert again.lm_head.weight is again.embed_tokens.weight
    tokens = tokens_of(gpt, 2, 9)
    assert torch.equal(again(tokens), gpt(tokens))
    assert len(load_model(tmp_path / "ref.pt", block_size=9)[0].cos) == 9
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path / "none.pt")


def test_a_cut_checkpoint_or_a_flipped_bit_is_named_in_one_line(tmp_path):
    path = tmp_path / "slm.pt"
    gpt = tiny()
    torch.save(checkpoint_of(gpt), path)
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert f"{path} is cut short, damaged" in error_of(load_checkpoint, path)
    weight = whole.index(gpt.lm_head.weight.detach().numpy().tobytes()[:64])
    flipped = bytearray(whole)
    flipped[weight + 2] ^= 1
    path.write_bytes(flipped)
    assert f"{path} is cut short, damaged" in error_of(load_model, path)


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
        "no shape": good | {"model_config": good["model_config"] | {"n_kv_head": 3}},
        "bomb": good | {"step": Bomb()},
    }
    for name, content in wrong.items():
        torch.save(content, f"{name}.pt")
    Path("pickle.pt").write_bytes(pickle.dumps(good | {"step": Bomb()}, protocol=2))
    Path("text.pt").write_text("Here are the weights:\n1 2 3\n")
    for name in [*wrong, "pickle", "text"]:
        assert f"{name}.pt" in error_of(load_model, f"{name}.pt"), name
    assert not os.path.exists("went off")  # weights_only: a checkpoint runs no code


def test_the_command_exports_a_student(transformers, tmp_path, capsys):
    spec = ranks_spec(PATTERNS["demo"])
    gpt = tiny(vocab_size=spec["n_vocab"])
    torch.save(checkpoint_of(gpt), tmp_path / "slm.pt")
    for _ in range(2):  # a second export takes the place of the first
        main([str(tmp_path / "slm.pt"), str(tmp_path / "hub")])
    assert str(tmp_path / "hub") in capsys.readouterr().out
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "hub")(
        "the entire text", return_tensors="pt"
    ).input_ids
    assert tokens[0, 0] == spec["eot"]
    with torch.no_grad():
        logits = gpt.head(gpt(tokens))
        torch.testing.assert_close(exported(tokens).logits, logits, atol=5e-5, rtol=1e-5)
    assert sorted(os.listdir(tmp_path / "hub")) == sorted(model_module.EXPORTED)


def test_the_command_fails_in_one_line_and_keeps_what_is_there(tmp_path, capsys):
    pytest.importorskip("safetensors", reason="extra hf is not installed")
    spec = ranks_spec(PATTERNS["demo"])
    good = checkpoint_of(tiny(vocab_size=spec["n_vocab"]))
    torch.save(good, tmp_path / "slm.pt")
    torch.save({**good, "tokenizer": {"name": "nobody's"}}, tmp_path / "nobodys.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    for arguments, named in {
        ("none.pt", "hub"): "none.pt not found",
        ("text.pt", "hub"): "text.pt",
        ("nobodys.pt", "hub"): "nobody's",
        ("mine", "hub"): "mine is a folder",
        ("slm.pt", "mine"): "thesis.tex",
        ("slm.pt", "file"): "file",
        ("slm.pt",): "FOLDER",
    }.items():
        with pytest.raises(SystemExit) as ended:
            main([str(tmp_path / name) for name in arguments])
        out, err = capsys.readouterr()
        assert ended.value.code == 2 and out == "" and err.count("\n") == 1, arguments
        assert named in err and err.startswith("model.py: ")
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]
    with pytest.raises(SystemExit) as ended:
        main(["-h"])
    assert ended.value.code == 0 and "CKPT" in capsys.readouterr().out


def test_a_shape_of_no_family_is_not_exported(tmp_path):
    pytest.importorskip("safetensors", reason="extra hf is not installed")
    message = error_of(save_hf, tiny(qk_norm=True, window=5), tmp_path / "out")
    assert "Qwen3" in message and "Mistral" in message and not (tmp_path / "out").exists()


def test_an_export_cut_off_is_no_model(folder, monkeypatch):
    def no_room(*args):
        raise OSError(28, "No space left on device")

    import safetensors.torch

    monkeypatch.setattr(safetensors.torch, "save_file", no_room)
    with pytest.raises(OSError):
        save_hf(tiny(qk_norm=False), folder)
    assert "config.json not found" in error_of(load_model, folder)
    shutil.rmtree(folder)
    assert isinstance(ModelError("x"), InputError)
