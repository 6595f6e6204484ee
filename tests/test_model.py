"""model.py: against transformers, torch.optim, float64 and one-prompt-at-a-time generation."""

import base64
import json
import os
import random
from pathlib import Path

import pytest
import torch

import model as model_module
from model import (
    GPT,
    GPTConfig,
    Muon,
    check_rows,
    generate,
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


def strong(model):
    """Weights that are large enough for the choices to be far from ties, and no norm all ones."""
    torch.manual_seed(0)
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.3)
        else:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return model.eval()


def tiny(**changes):
    shape = {"vocab_size": 40, "block_size": 48, "n_layer": 2, "n_embd": 32, "n_inner": 48}
    return strong(GPT(GPTConfig(**shape | changes)))


TOKENS = torch.randint(40, (2, 64), generator=torch.Generator().manual_seed(1))


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-5)


def line_of(function, *args):
    """The one line that a call ends the script with."""
    with pytest.raises(SystemExit) as ended:
        function(*args)
    assert isinstance(ended.value.code, str) and "\n" not in ended.value.code
    return ended.value.code


# ---- generate ------------------------------------------------------------------------------------


@torch.no_grad()
def alone(gpt, prompt, max_new_tokens, stop):
    """What generate means: one prompt, and the whole sequence again for each token."""
    answer = []
    for _ in range(max_new_tokens):
        token = gpt(torch.tensor([prompt + answer]))[0, -1].argmax().item()
        if token in stop:
            break
        answer.append(token)
    return answer


@pytest.mark.parametrize("shape", SHAPES)
def test_generate_answers_each_prompt_as_if_alone(shape):
    gpt = tiny(**SHAPES[shape]).double()
    choose = random.Random(shape)
    for n in (1, 3, 12):
        prompts = [choose.choices(range(40), k=choose.randint(1, 20)) for _ in range(n)]
        stop = choose.choices(range(40), k=choose.randint(0, 9))
        for max_new_tokens in (0, 20):
            expected = [alone(gpt, prompt, max_new_tokens, stop) for prompt in prompts]
            assert generate(gpt, prompts, max_new_tokens, stop) == expected


def test_rows_that_ended_leave_the_batch_and_one_position_gets_logits():
    gpt = tiny()
    prompts = [TOKENS[0, i : 2 * i + 1].tolist() for i in range(10)]
    rows = []
    gpt.lm_head.register_forward_hook(lambda *args: rows.append(args[-1].numel() // 40))
    answers = generate(gpt, prompts, 30, {2, 3, 5, 7, 11})
    assert len(set(map(len, answers))) > 4  # or this test tests little
    assert len(rows) == min(30, max(map(len, answers)) + 1)  # when all have ended, it ends
    assert rows == sorted(rows, reverse=True) and rows[0] == 10 > rows[-1]


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_generate_runs_in_bfloat16_and_refuses_what_does_not_fit():
    gpt = tiny(**SHAPES["grouped"])
    with torch.autocast("cpu", torch.bfloat16):
        assert len(generate(gpt, [[1] * 38, [3]], 10)[0]) == 10  # to the last position
    for prompts in ([[1], []], [[1] * 39, [2]]):
        with pytest.raises(ValueError):
            generate(gpt, prompts, 10)
    assert "n_kv_head" in line_of(lambda: GPTConfig(n_head=4, n_kv_head=3))
    check_rows(gpt, {"n_vocab": 40}, "x")
    line = line_of(check_rows, gpt, {"n_vocab": 42}, "some.pt")
    assert all(part in line for part in ("some.pt", "41", "40"))


# ---- the optimizers ------------------------------------------------------------------------------

MATRICES = pytest.mark.parametrize("shape", [(24, 70), (70, 24), (40, 40)])


@MATRICES
def test_muon_is_that_of_torch_up_to_bfloat16(shape):
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    options = {"lr": 0.02, "weight_decay": 0.3}
    optimizers = [Muon([ours], **options)]
    optimizers += [torch.optim.Muon([theirs], **options, adjust_lr_fn="match_rms_adamw")]
    start = ours.detach().clone()
    for _ in range(6):
        ours.grad = theirs.grad = torch.randn(shape) + 0.5
        for optimizer in optimizers:
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.7
    assert (ours - theirs).norm() < 0.02 * (theirs - start).norm()


@MATRICES
def test_muon_keeps_singular_vectors_and_lifts_singular_values_to_one(shape):
    matrix = torch.randn(shape, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    S = S / S.norm()
    for _ in range(5):  # on the singular values alone
        S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
    exact = U @ S.diag() @ Vh
    torch.testing.assert_close(orthogonal(matrix), exact, atol=1e-9, rtol=0)
    assert S[:-2].min() > 0.6 and S.max() < 1.25
    # In float32, not in bfloat16, which this processor may only emulate.
    torch.testing.assert_close(orthogonal(matrix.float()), exact.float(), atol=1e-4, rtol=0)


def test_muon_steps_as_its_formula_says_and_continues_from_its_state():
    p = torch.nn.Parameter(torch.randn(6, 10, dtype=torch.float64))
    expected, average = p.detach().clone(), 0
    optimizer = Muon([p], lr=0.1, weight_decay=0.5)
    for _ in range(4):
        p.grad = torch.randn(6, 10, dtype=torch.float64)
        state = optimizer.state_dict()
        optimizer = Muon([p], lr=1.0)
        optimizer.load_state_dict(state)
        optimizer.step()
        average = 0.95 * average + 0.05 * p.grad
        direction = orthogonal(0.05 * p.grad + 0.95 * average)
        expected = (1 - 0.1 * 0.5) * expected - 0.1 * 0.2 * 10**0.5 * direction
        torch.testing.assert_close(p.detach(), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_each_weight_has_one_optimizer_and_only_matrices_of_the_blocks_decay(name):
    gpt = tiny(tied=True, qkv_bias=True)
    before = {key: p.detach().clone() for key, p in gpt.named_parameters()}
    optimizers = make_optimizers(gpt, name, lr=0.1, weight_decay=0.5)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, gpt.parameters()))
    assert isinstance(optimizers[0], Muon) == (name == "muon")
    assert groups[-1].get("betas") == (0.9, 0.95) and groups[-1]["fused"]
    for p in gpt.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        optimizer.step()
    matrices = [key for key, p in before.items() if key.startswith("layers") and p.dim() == 2]
    if name == "muon":
        assert len(groups[0]["params"]) == len(matrices) == 14
    for key, p in gpt.named_parameters():
        torch.testing.assert_close(p.detach(), before[key] * (0.95 if key in matrices else 1))


# ---- checkpoints ---------------------------------------------------------------------------------


def checkpoint_of(gpt, spec=None):
    """As rho.py writes it."""
    config = dict(vars(gpt.config))
    return {"model_config": config, "model": gpt.state_dict(), "tokenizer": spec, "step": 7}


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    gpt = tiny(n_kv_head=2, tied=True)
    torch.save(checkpoint_of(gpt), tmp_path / "ref.pt")
    again, checkpoint = load_model(tmp_path / "ref.pt")
    assert again.config == gpt.config and checkpoint["step"] == 7
    assert again.lm_head.weight is again.embed_tokens.weight
    assert torch.equal(again(TOKENS), gpt(TOKENS))
    short, _ = load_model(tmp_path / "ref.pt", block_size=9)
    assert short.config.block_size == 9
    assert weights_hash(again) == weights_hash(gpt) != weights_hash(short)
    again.layers[1].mlp.up_proj.weight.data[3, 5] += 1e-5
    assert weights_hash(again) != weights_hash(gpt)


def test_a_cut_checkpoint_or_a_flipped_bit_is_named(tmp_path):
    path = tmp_path / "slm.pt"
    gpt = tiny()
    torch.save(checkpoint_of(gpt), path)
    whole = path.read_bytes()
    damaged = [whole[:n] for n in (0, 1, 100, len(whole) // 2, len(whole) - 1)]
    for place in range(5, len(whole), len(whole) // 40):
        damaged.append(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            assert weights_hash(load_model(path)[0]) == weights_hash(gpt)  # it fell in a gap
        except SystemExit as ended:
            refused += 1
            assert str(path) in ended.code
    assert refused > 35


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("went off",)


def test_what_is_not_a_checkpoint_of_ours_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = checkpoint_of(tiny())
    config = good["model_config"]
    Path("text.pt").write_text("Here are the weights:\n1 2 3\n")
    wrong = {
        "list": [1, 2],
        "number": 3,
        "empty": {},
        "no weights": {"model_config": config},
        "other weights": good | {"model": {"x": torch.zeros(3)}},
        "other shape": good | {"model_config": config | {"n_embd": 64}},
        "other field": good | {"model_config": config | {"dropout": 0.1}},
        "bomb": good | {"step": Bomb()},
    }
    for name, content in wrong.items():
        torch.save(content, f"{name}.pt")
    for name in [*wrong, "text", "missing"]:
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


def theirs(transformers, family):
    """A tiny model of transformers."""
    keys = {
        "vocab_size": 40, "max_position_embeddings": 64, "hidden_size": 32, "num_hidden_layers": 3,
        "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-3, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    name = family.split()[0]
    config = getattr(transformers, f"{name}Config")(**keys | FAMILIES[family])
    return strong(getattr(transformers, f"{name}ForCausalLM")(config))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_each_family_comes_in_and_goes_out_with_its_logits(transformers, tmp_path, family):
    original = theirs(transformers, family)
    original.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 1
    gpt, checkpoint = load_model(tmp_path / "in")
    assert checkpoint == {} and gpt.num_params() == original.num_parameters()
    logits = original(TOKENS).logits
    close(gpt(TOKENS), logits)
    close(load_hf(tmp_path / "in", block_size=9)(TOKENS[:, :9]), logits[:, :9])

    save_hf(gpt, tmp_path / "new" / "out")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "out")
    assert exported.num_parameters() == original.num_parameters()
    close(exported(TOKENS).logits, logits)
    assert load_hf(tmp_path / "new" / "out").config == gpt.config


@pytest.fixture
def folder(transformers, tmp_path):
    """A Llama in several shards, as transformers writes it."""
    theirs(transformers, "Llama").save_pretrained(tmp_path, max_shard_size="60KB")
    return tmp_path


def edit(folder, **changes):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))


INDEX = "model.safetensors.index.json"


def shard_of(folder, key):
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    return folder / places[key]


def change_weights(path, changes):
    from safetensors.torch import load_file, save_file

    weights = {name: tensor.clone() for name, tensor in load_file(path).items()} | changes
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, path)


HEAD, UP = "lm_head.weight", "model.layers.1.mlp.up_proj.weight"


def test_a_tensor_comes_from_the_shard_that_the_index_names(folder):
    right = weights_hash(load_hf(folder))
    # Everywhere stale copies of what is in another shard, and the tables of the first Llamas.
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    for path in folder.glob("model-*"):
        stale = [key for key in index if index[key] != path.name]
        stale += ["model.layers.0.self_attn.rotary_emb.inv_freq"]
        change_weights(path, {key: torch.zeros(1) for key in stale})
    for name in ("consolidated.safetensors", "adapter_model.safetensors", "pytorch_model.bin"):
        (folder / name).write_bytes(b"something else")
    gpt = load_hf(folder)
    assert weights_hash(gpt) == right
    with open(shard_of(folder, HEAD), "r+b") as file:  # a loaded model does not change with it
        file.write(bytes(shard_of(folder, HEAD).stat().st_size))
    assert weights_hash(gpt) == right


@pytest.mark.parametrize("change", [{UP: None}, {UP: torch.zeros(3, 3)}, {HEAD: None}])
def test_a_tensor_that_does_not_fit_is_named(folder, change):
    (key,) = change
    change_weights(shard_of(folder, key), change)
    line = line_of(load_model, folder)
    assert key.removeprefix("model.") in line and str(folder) in line


def test_bfloat16_and_every_spelling_of_the_rotary_keys(transformers, tmp_path):
    theirs(transformers, "Llama 3.2").bfloat16().save_pretrained(tmp_path)
    original = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    old = {"type" if key == "rope_type" else key: value for key, value in LLAMA3.items()}
    for spelled in (
        {"rope_theta": 500.0, "rope_scaling": LLAMA3, "rope_parameters": None},
        {"rope_theta": 500.0, "rope_scaling": old},
        {"rope_parameters": {**LLAMA3, "rope_theta": 500.0}, "rope_scaling": None},
    ):
        edit(tmp_path, **spelled, head_dim=None, tie_word_embeddings=None)
        gpt = load_hf(tmp_path)
        assert gpt.lm_head.weight.dtype == torch.float32
        close(gpt(TOKENS), original(TOKENS).logits)


REFUSED = {  # each with what the line names
    "tie_word_embeddings": {"tie_word_embeddings": True},  # with another head stored
    "model_type": {"model_type": "gpt2"},
    "hidden_act": {"hidden_act": "gelu"},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "partial_rotary_factor": {"partial_rotary_factor": 0.5},
    "quantization_config": {"quantization_config": {"quant_method": "gptq"}},
    "num_local_experts": {"num_local_experts": 8},
    "logit_scale": {"logit_scale": 0.0625},
    "final_logit_softcapping": {"final_logit_softcapping": 30.0},
    "use_sliding_window": {"model_type": "qwen3", "use_sliding_window": True},
    "rope_type 'yarn'": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "rope_parameters": None},
    "low_freq_factor": {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
    "full_attention": {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
    "config.json": {"rope_parameters": "linear"},
    "n_kv_head": {"num_key_value_heads": 3},
    "layers": {"num_hidden_layers": 0},
    "config.json: ": {"hidden_size": "2048"},
    "norm_eps": {"rms_norm_eps": float("nan")},
}


@pytest.mark.parametrize("named", REFUSED)
def test_a_key_that_gpt_has_no_form_for_is_named(folder, named):
    edit(folder, **REFUSED[named])
    assert named in line_of(load_model, folder)


DAMAGES = {  # what becomes of a file
    "cut": lambda old: old[:-100],
    "list": lambda old: b"[]",
    "pointer": lambda old: b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
    "missing": None,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["config.json", INDEX, "shard"])
def test_a_damaged_folder_is_one_line_with_its_file(folder, name, damage):
    path = shard_of(folder, HEAD) if name == "shard" else folder / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(DAMAGES[damage](content))
    elif name == INDEX:  # then a single file is expected, and only the pickled weights are there
        path = folder / "pytorch_model.bin"
        path.write_bytes(b"")
    line = line_of(load_model, folder)
    assert path.name in line and str(folder) in line


# ---- the tokenizer goes out, and the command -----------------------------------------------------

PATTERNS = {
    "demo": r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "words only": r"\p{L}+",
}


def ranks_spec(pattern):
    """meta.json's tokenizer: bytes, then pieces, of which not all are made of two others."""
    pieces = " t|he| the|in|er|34|123|12|45|aa|aaaa|pq|qr|pqr|def|return|\n\n|  |é|日本|entire|'ll"
    tokens = [bytes([byte]) for byte in range(256)] + [
        piece.encode() for piece in pieces.split("|")
    ]
    ranks = [base64.b64encode(token).decode() for token in tokens]
    n = len(tokens)
    return {"name": "x", "n_vocab": n + 1, "eot": n, "pat_str": pattern, "ranks": ranks}


def many_texts():
    """Random Unicode of several kinds, code, and what is special."""
    choose = random.Random(0)
    alphabets = [range(32, 127), range(0x250), range(0xD800), range(0x10000, 0x30000)]
    alphabets += [[ord(c) for c in " \n\r\ta1é'\u00a0\u2003\u3000\u0301\u0661"]]
    texts = ["", "a <|endoftext|>b", "<s>", "aaaaaaa aaaaa", "zpqr", "12345678\n\n\n 9"]
    for i in range(300):
        letters = choose.choices(alphabets[i % 5], k=choose.randint(1, 50))
        texts.append("".join(map(chr, letters)))
    return texts + Path(model_module.__file__).read_text().split("\n\n")


def check_export(transformers, folder, spec):
    """The exported tokenizer gives the same ids behind the start, and names the same stops."""
    ours = get_tokenizer(spec)
    exported = transformers.AutoTokenizer.from_pretrained(folder)
    for text in many_texts():
        assert exported(text).input_ids == [*ours.prompt_start, *ours.encode(text)], repr(text)
    assert exported.eos_token_id == ours.eot and [exported.bos_token_id] == ours.prompt_start
    generation = transformers.GenerationConfig.from_pretrained(folder)
    assert set(generation.eos_token_id) == ours.stops and not generation.do_sample


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_the_command_exports_a_student(transformers, tmp_path, capsys, pattern):
    spec = ranks_spec(PATTERNS[pattern])
    gpt = tiny(vocab_size=spec["n_vocab"])
    torch.save(checkpoint_of(gpt, spec), tmp_path / "slm.pt")
    hub = str(tmp_path / "hub")
    for _ in range(2):  # a second export takes the place of the first
        main([str(tmp_path / "slm.pt"), hub])
    assert hub in capsys.readouterr().out
    exported = transformers.AutoModelForCausalLM.from_pretrained(hub)
    close(exported(TOKENS).logits[:, :48], gpt(TOKENS)[:, :48])
    check_export(transformers, hub, spec)


@pytest.mark.parametrize("start", ["<s>", None])
def test_a_tokenizer_json_goes_out_as_it_came_in(transformers, tmp_path, start):
    """One that puts a start token before a text, as TinyLlama's, or none, as Qwen's."""
    from tokenizers import ByteLevelBPETokenizer, processors

    bpe = ByteLevelBPETokenizer()
    special = ["<s>", "<|im_end|>", "<|endoftext|>"]
    bpe.train_from_iterator(many_texts(), 600, special_tokens=special, show_progress=False)
    if start:
        template = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
        bpe._tokenizer.post_processor = template
    save_hf(tiny(vocab_size=640), tmp_path)
    bpe.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    gpt, checkpoint = load_model(tmp_path)
    save_hf(gpt, tmp_path / "out", checkpoint["tokenizer"])
    check_export(transformers, tmp_path / "out", checkpoint["tokenizer"])
    assert get_tokenizer(checkpoint["tokenizer"]).stops >= {1, 2}  # the chat's end, and the text's


def test_an_export_keeps_what_is_there_and_half_of_one_is_no_model(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch", reason="extra hf is not installed")
    gpt = tiny()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    assert "thesis.tex" in line_of(save_hf, gpt, tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]
    line_of(save_hf, tiny(qk_norm=True, window=5), tmp_path / "out")  # no family has this shape
    assert not (tmp_path / "out").exists()

    def no_room(*args):
        raise OSError(28, "No space left on device")

    save_hf(gpt, tmp_path / "hub")
    monkeypatch.setattr(safetensors, "save_file", no_room)
    assert "hub" in line_of(save_hf, gpt, tmp_path / "hub")
    assert "config.json" in line_of(load_model, tmp_path / "hub")
