"""results/hf_checks.py and results/memory.py: what can be tested without the large packages."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "results"))
import hf_checks
import memory

from model import GPT, GPTConfig, config_from_hf

FIELDS = {
    "llama.context_length": 64,
    "llama.block_count": 2,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 48,
    "llama.rope.freq_base": 100000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.tokens": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "1", "2", "a", "b"]
    + ["Ġ", "ab", "Ġab", "12"],
    "tokenizer.ggml.token_type": [3, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1],
    "tokenizer.ggml.merges": ["a b", "Ġ ab", "1 2"],
}


def test_rows_go_back_to_where_a_llamas_gguf_took_them_from():
    weight = torch.randn(4 * 6, 5)  # 4 heads of 6 rows
    halves = weight.view(4, 2, 3, 5)
    in_gguf = halves.transpose(1, 2).reshape(24, 5)  # as llama.cpp's converter does it
    assert not torch.equal(in_gguf, weight)
    assert torch.equal(hf_checks.rows_by_halves(in_gguf, 4), weight)


def test_every_tensor_of_a_gguf_gets_the_name_that_model_py_knows():
    config = config_from_hf(hf_checks.config_of(FIELDS))
    assert (config.n_head, config.n_kv_head, config.rope_theta) == (4, 2, 100000.0)
    assert config.tied and not config.qk_norm
    expected = {f"model.{name}" for name, _ in GPT(config).named_parameters()}
    kinds = [kind for kind in hf_checks.TENSORS if kind not in ("token_embd", "output_norm")]
    names = ["token_embd.weight", "output_norm.weight"]
    for block in (0, 1):
        names += [f"blk.{block}.{kind}.weight" for kind in kinds]
    assert {hf_checks.hf_name(name) for name in names} == expected


def test_the_tokenizer_of_a_gguf_cuts_digits_singly_and_merges_the_rest():
    pytest.importorskip("tokenizers", reason="extra hf is not installed")
    tokenizer = hf_checks.tokenizer_of(FIELDS)
    ids = tokenizer.encode("ab ab12").ids
    assert [tokenizer.id_to_token(i) for i in ids] == ["ab", "Ġab", "1", "2"]
    assert tokenizer.encode("<|im_end|>").ids == [2]
    assert tokenizer.decode(ids) == "ab ab12"


def test_a_family_counts_only_if_all_its_forms_passed():
    name = "tests/test_model.py::test_each_family[{}]"
    lines = [f"PASSED {name.format(f'Llama 3.2-{form}')}" for form in ("tied", "untied")]
    lines += [f"PASSED {name.format('Qwen2-tied')}", f"FAILED {name.format('Qwen2-untied')} - no"]
    assert hf_checks.passed_families("\n".join(lines)) == ["Llama 3.2"]


def test_records_stand_side_by_side_and_name_their_packages(tmp_path, capsys):
    path = tmp_path / "hf.json"
    hf_checks.record("one", {"n": 1}, path)
    hf_checks.record("two", {"n": 2}, path)
    hf_checks.record("one", {"n": 3}, path)
    content = json.loads(path.read_text())
    assert content["one"]["n"] == 3 and content["two"]["n"] == 2
    assert (
        content["one"]["packages"]["torch"] == str(torch.__version__) and content["one"]["commit"]
    )


def test_the_harness_task_asks_as_eval_math_does(tmp_path):
    yaml = pytest.importorskip("yaml")
    task = hf_checks.TASK.format(questions=tmp_path / "q.jsonl", new_tokens=64)
    task = yaml.safe_load(task)
    assert task["doc_to_text"] == "Question: {{question}}\nAnswer:"
    assert task["generation_kwargs"]["until"] == ["\nQuestion:", "\n\n\n"]
    assert task["doc_to_target"] == "{{answer.split('####')[-1].strip()}}"
    assert task["dataset_kwargs"]["data_files"]["test"] == str(tmp_path / "q.jsonl")


def test_verdicts_of_the_harness_come_in_the_order_of_the_questions(tmp_path):
    rows = [{"doc_id": 1, "exact_match": 0.0}, {"doc_id": 0, "exact_match": 1.0}]
    (tmp_path / "deep").mkdir()
    file = tmp_path / "deep" / "samples_rho_demo_2030.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    assert hf_checks.harness_verdicts(tmp_path) == [True, False]


def test_the_commands_of_train_are_commands_of_the_scripts():
    import prepare_data
    import rho

    args = argparse.Namespace(work="out/hf", reference="ref.jsonl", corpus=["a.jsonl", "b"])
    prepare, ref, slm = [line.split() for line in hf_checks.train_commands(args)]
    assert prepare[0] == "prepare_data.py" and ref[0] == slm[0] == "rho.py"
    cfg = rho.parse(slm[1:])
    assert (cfg.stage, cfg.tokens, cfg.lr, cfg.data) == ("slm", 100352, 8e-5, "out/hf/data")
    assert rho.parse(ref[1:]).ref_tokens == 8192
    for flag in prepare[1:]:
        if flag.startswith("--"):
            assert flag in Path(prepare_data.__file__).read_text()


def test_what_is_missing_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(hf_checks.importlib.util, "find_spec", lambda name: None)
    for check in (["smollm2"], ["lm_eval", "out/demo/slm.pt"]):
        with pytest.raises(SystemExit) as stop:
            hf_checks.main(check)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and "pip install" in error


# ---- memory.py -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # QK-norm in bfloat16, not fused
def test_the_sum_of_the_pieces_is_near_the_true_peak():
    for row in memory.check(quick=True):
        assert 0.95 < row["summed_over_peak"] < 1.15, row


def test_muon_keeps_one_number_for_a_matrix_entry_and_adamw_two():
    assert memory.state_bytes("muon") == (4, 8)
    assert memory.state_bytes("adamw") == (8, 8)


def test_more_fits_on_a_larger_card_with_recompute_and_in_one_process():
    config = GPTConfig(vocab_size=32000, n_layer=8, n_embd=1024, n_inner=2816, block_size=2048)
    pieces = memory.Pieces(*memory.count(config), 4, 8, 50000, 50000, 8, 2)
    largest = {}
    for card in (8, 24):
        for recompute in (False, True):
            largest[card, recompute] = memory.largest_micro_batch(config, pieces, card, recompute)
    assert 0 < largest[8, False] < largest[8, True] < largest[24, True]
    assert largest[8, False] < largest[24, False]
    needed = [memory.needed_bytes(config, pieces, 1, False, processes) for processes in (1, 2)]
    assert needed[1] - needed[0] == pytest.approx(4 * pieces.parameters)
