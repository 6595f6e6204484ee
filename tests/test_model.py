"""model.py: causal, cached as uncached, equal to transformers; files that are whole or refused."""

import errno
import json
import math
import os
import pickle
import resource
import signal
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import model as model_module
from model import (
    GPT,
    GPTConfig,
    KVCache,
    ModelError,
    generate,
    load_checkpoint,
    load_hf,
    load_model,
    save_hf,
)

SHAPES = {
    "plain": {},
    "grouped": {"n_head": 6, "n_kv_head": 2, "head_dim": 8},
    "llama": {"n_kv_head": 2, "qk_norm": False},
    "tied": {"n_kv_head": 1, "tied": True, "rope_theta": 500.0},
}


def tiny(dtype=torch.float32, seed=0, **changes):
    """A GPT whose weights are large enough for its choices to be far from ties."""
    torch.manual_seed(seed)
    shape = {"vocab_size": 40, "block_size": 48, "n_layer": 2, "n_embd": 32, "n_inner": 48}
    gpt = GPT(GPTConfig(**shape | changes))
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
    """What generate means, in five lines: one prompt, the whole sequence anew for each token."""
    sequence = list(prompt)
    for _ in range(max_new_tokens):
        token = gpt.head(gpt(torch.tensor([sequence])))[0, -1].argmax().item()
        if token in stop:
            break
        sequence.append(token)
    return sequence[len(prompt) :]


# ---- forward -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_later_token_changes_nothing_before_it(shape):
    gpt = tiny(**SHAPES[shape])
    tokens = tokens_of(gpt, 2, 24)
    before = gpt(tokens)
    for t in (1, 7, 23):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % gpt.config.vocab_size
        after = gpt(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[:, t:] != before[:, t:]).any(-1).all()


@torch.no_grad()
def test_positions_are_relative_and_matter():
    gpt = tiny(torch.float64, n_layer=1)
    a, b = torch.tensor([[3, 5, 7]]), torch.tensor([[5, 3, 7]])
    assert not torch.allclose(gpt(a)[:, -1], gpt(b)[:, -1])  # order of what came before matters
    pad = torch.tensor([4])
    moved = torch.tensor([[0, 0, 0, 0, 3, 5, 7]])  # and where it all stands does not
    torch.testing.assert_close(gpt(moved, pad=pad)[:, 4:], gpt(a), atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_initial_loss_is_that_of_a_guess(shape):
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=1000, n_embd=96, block_size=64, **SHAPES[shape]))
    tokens = tokens_of(gpt, 8, 65)
    logits = gpt.head(gpt(tokens[:, :-1]))
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(1000), abs=0.05)


@pytest.mark.parametrize("shape", SHAPES)
def test_number_of_parameters(shape):
    gpt = tiny(**SHAPES[shape])
    c = gpt.config
    attention = 2 * c.n_embd * c.n_head * c.head_dim + 2 * c.n_embd * c.n_kv_head * c.head_dim
    layer = attention + 3 * c.n_embd * c.n_inner + 2 * c.n_embd + 2 * c.head_dim * c.qk_norm
    matrices = (1 if c.tied else 2) * c.vocab_size * c.n_embd
    assert gpt.num_params() == matrices + c.n_layer * layer + c.n_embd


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_finite_differences(shape):
    gpt = tiny(torch.float64, **SHAPES[shape], block_size=8)
    tokens = tokens_of(gpt, 2, 8)

    def student_loss():
        return F.cross_entropy(gpt.head(gpt(tokens[:, :-1])).flatten(0, 1), tokens[:, 1:].flatten())

    student_loss().backward()
    for name, p in gpt.named_parameters():
        direction = torch.randn_like(p)
        with torch.no_grad():
            values = []
            for step in (1e-5, -2e-5):
                p.add_(direction, alpha=step)
                values.append(student_loss().item())
            p.add_(direction, alpha=1e-5)
        slope = (values[0] - values[1]) / 2e-5
        assert (p.grad * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-8), name


def test_what_does_not_fit_is_refused():
    gpt = tiny()
    with pytest.raises(ValueError, match="49 tokens do not fit block_size 48"):
        gpt(tokens_of(gpt, 1, 49))
    with pytest.raises(ModelError, match="n_kv_head"):
        GPTConfig(n_head=4, n_kv_head=3)
    with pytest.raises(ModelError, match="head_dim"):
        GPTConfig(head_dim=7)
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
        answers = generate(gpt, [[1, 2], [3]], 5)
    assert [len(a) for a in answers] == [5, 5]
    assert gpt.bfloat16()(tokens).dtype == torch.bfloat16


# ---- the cache, and generate ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_cache_gives_what_no_cache_gives(shape):
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
    cache = KVCache(T + new)
    parts = [gpt(tokens[:, :T], cache, pad)]
    parts += [gpt(tokens[:, [t]], cache, pad) for t in range(T, T + new)]
    for padded in (gpt(tokens, pad=pad), torch.cat(parts, dim=1)):
        assert padded.isfinite().all()
        for row, n in enumerate(pad):
            by_itself = gpt(tokens[[row], n:])[0]
            torch.testing.assert_close(padded[row, n:], by_itself, atol=1e-11, rtol=0)
    for row, n in enumerate(pad):  # what the filling says is never heard
        assert torch.equal(gpt(other, pad=pad)[row, n:], gpt(tokens, pad=pad)[row, n:])


GPTS = {shape: tiny(torch.float64, **changes) for shape, changes in SHAPES.items()}


@settings(max_examples=25, deadline=None, derandomize=True)
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
    assert len(expected[0]) <= 3 and token not in expected[0]


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
    assert ((counts - expected) ** 2 / expected).sum().item() < 24.3  # χ², 7 degrees: p = 0.001
    assert (expected > 20).sum() > 3  # of more than a few tokens
    cold = generate(gpt, [[3, 1]] * 5, 6, temperature=1e-4)
    assert cold == generate(gpt, [[3, 1]] * 5, 6)


# ---- Hugging Face --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("safetensors", reason="extra hf is not installed")
    transformers = pytest.importorskip("transformers", reason="extra dev is not installed")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@torch.no_grad()
def test_transformers_loads_what_save_hf_writes(transformers, tmp_path, kind, tied):
    changes = {"head_dim": 12, "qk_norm": True} if kind == "qwen3" else {"qk_norm": False}
    gpt = tiny(n_kv_head=2, tied=tied, rope_theta=700.0, norm_eps=1e-4, **changes)
    save_hf(gpt, tmp_path / "made" / "here", eot=39)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "made" / "here")
    assert type(theirs).__name__ == {"llama": "Llama", "qwen3": "Qwen3"}[kind] + "ForCausalLM"
    assert theirs.config.eos_token_id == 39
    assert sum(p.numel() for p in theirs.parameters()) == gpt.num_params()
    tokens = tokens_of(gpt, 2, 48)
    torch.testing.assert_close(theirs(tokens).logits, gpt.head(gpt(tokens)), atol=2e-5, rtol=2e-5)
    again = load_hf(tmp_path / "made" / "here")
    assert again.config == gpt.config
    assert torch.equal(again(tokens), gpt(tokens))

    prompts, T = prompts_of(gpt, [5, 9, 2]), 9
    padded = torch.tensor([[0] * (T - len(p)) + p for p in prompts])
    seen = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts])
    theirs.generation_config.pad_token_id = 0
    written = theirs.generate(
        padded, attention_mask=seen, max_new_tokens=15, do_sample=False, eos_token_id=None
    )
    assert written[:, T:].tolist() == generate(gpt, prompts, 15)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Mistral"])
@torch.no_grad()
def test_load_hf_reads_what_transformers_writes(transformers, tmp_path, kind, tied):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        rms_norm_eps=1e-3,
        initializer_range=0.3,
        **{"head_dim": 16} if kind == "Qwen3" else {},
        **{"sliding_window": None} if kind == "Mistral" else {},
    )
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for p in theirs.parameters():
        if p.dim() == 1:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    gpt, checkpoint = load_model(tmp_path)  # a folder: by load_hf
    assert checkpoint == {} and gpt.config.qk_norm == (kind == "Qwen3")
    tokens = tokens_of(gpt, 2, 64)
    torch.testing.assert_close(gpt.head(gpt(tokens)), theirs(tokens).logits, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "gpt2"},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"model_type": "mistral", "sliding_window": 16},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}},
    ],
)
def test_load_hf_refuses_what_gpt_is_not(tmp_path, changes):
    pytest.importorskip("safetensors", reason="extra hf is not installed")
    config = {"model_type": "llama", "num_attention_heads": 4, "hidden_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    for load in (load_hf, load_model):
        with pytest.raises(ModelError) as error:
            load(tmp_path)
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_load_hf_of_before_grouped_queries(tmp_path):
    """The first Llamas' config.json has neither head_dim nor num_key_value_heads nor rope_theta."""
    pytest.importorskip("safetensors", reason="extra hf is not installed")
    gpt = tiny(n_head=8, qk_norm=False)
    save_hf(gpt, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for later in ("head_dim", "num_key_value_heads", "rope_theta", "tie_word_embeddings"):
        del config[later]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_hf(tmp_path).config == gpt.config
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="holds no model"):
        load_model(tmp_path)


# ---- checkpoints ---------------------------------------------------------------------------------


def checkpoint_of(gpt):
    return {"model_config": vars(gpt.config), "model": gpt.state_dict(), "step": 7}


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    path = tmp_path / "new folder" / "ref.pt"
    gpt = tiny(n_kv_head=2, tied=True)
    with model_module.whole_file(path) as f:
        torch.save(checkpoint_of(gpt), f)
    again, checkpoint = load_model(path)
    assert again.config == gpt.config and checkpoint["step"] == 7
    assert torch.equal(again(tokens_of(gpt, 2, 9)), gpt(tokens_of(gpt, 2, 9)))
    assert os.listdir(path.parent) == ["ref.pt"]
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path / "none.pt")


def full_disk(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def write_half(checkpoint, f):
    f.write(b"half of it")
    full_disk()


@contextmanager
def room_for(n_bytes):
    """No file may grow beyond n_bytes, so torch.save itself meets the error, at any point."""
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("where", ["write", "fsync", "rename", 0, 300, 2**16, -1])
def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path, monkeypatch, where):
    path, new = tmp_path / "slm.pt", {"step": 2, "model": torch.zeros(2**16)}
    torch.save(new, path)
    size = path.stat().st_size
    torch.save({"step": 1}, path)
    old = path.read_bytes()
    if where == "write":
        monkeypatch.setattr(torch, "save", write_half)
    elif where == "fsync":
        monkeypatch.setattr(model_module.os, "fsync", full_disk)
    elif where == "rename":
        monkeypatch.setattr(model_module.os, "replace", full_disk)
    room = nullcontext() if isinstance(where, str) else room_for(where % size)
    with pytest.raises(OSError) as error, room, model_module.whole_file(path) as f:
        torch.save(new, f)
    assert error.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert path.read_bytes() == old and load_checkpoint(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["slm.pt"]


def test_a_checkpoint_cut_short_is_named_in_one_line(tmp_path):
    path = tmp_path / "slm.pt"
    torch.save(checkpoint_of(tiny()), path)
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError) as error:
            load_model(path)
        assert "slm.pt is cut short" in str(error.value) and "\n" not in str(error.value)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("went off",)


def test_what_is_not_a_checkpoint_of_ours_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gpt = tiny()
    good = checkpoint_of(gpt)
    wrong = {
        "list": [1, 2],
        "number": 3,
        "empty": {},
        "no weights": {"model_config": good["model_config"]},
        "other weights": good | {"model": {"x": torch.zeros(3)}},
        "other shape": good | {"model_config": good["model_config"] | {"n_embd": 64}},
        "other field": good | {"model_config": good["model_config"] | {"dropout": 0.1}},
        "no shape": good | {"model_config": good["model_config"] | {"n_kv_head": 3}},
        "bomb": good | {"step": Bomb()},
    }
    for name, content in wrong.items():
        torch.save(content, f"{name}.pt")
    with open("pickle.pt", "wb") as f:
        pickle.dump(good | {"step": Bomb()}, f, protocol=2)
    with open("text.pt", "w") as f:
        f.write("Here are the weights:\n1 2 3\n")
    for name in [*wrong, "pickle", "text"]:
        with pytest.raises(ModelError) as error:
            load_model(f"{name}.pt")
        assert "\n" not in str(error.value), name
        assert f"{name}.pt" in str(error.value) or name == "no shape"
    assert not os.path.exists("went off")  # weights_only: a checkpoint runs no code
