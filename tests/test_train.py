"""Training, scoring, resuming: that the loop is the definition, and that nothing is stale."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch.nn.utils import parameters_to_vector

import rho
from model import GPT, GPTConfig, load_checkpoint, load_model, make_optimizers, weights_hash
from prepare_data import load_meta
from rho import Config, batch, learning_rate, open_windows

SMALL = {"n_layer": 1, "n_head": 2, "n_kv_head": 1, "n_embd": 16, "n_inner": 32, "block_size": 64}
QUICK = {"batch_size": 4, "micro_batch": 4, "tokens": 2560, "ref_tokens": 2560, "device": "cpu"}
QUICK |= {"evals": 5, "eval_windows": 4, "questions": 3}


@pytest.fixture
def cfg(tiny_data, tmp_path):
    return Config(data=str(tiny_data), out=str(tmp_path / "out"), ratio=0.6, **SMALL, **QUICK)


@pytest.fixture(scope="module")
def ref_out(tiny_data, tmp_path_factory):
    """A folder with a reference, trained once for all tests that only need one."""
    out = tmp_path_factory.mktemp("ref")
    go(Config(data=str(tiny_data), out=str(out), **SMALL, **QUICK), "ref")
    return out


@pytest.fixture
def ref(cfg, ref_out):
    """A test that asks for it finds a trained reference in cfg.out."""
    shutil.copytree(ref_out, cfg.out)


def go(cfg, stage, **changes):
    """Train a run; its model and the records of its log."""
    run = rho.run_config(replace(cfg, **changes), stage)
    rho.train_alone(run)
    lines = Path(run.out, f"{run.name}.jsonl").read_text().splitlines()
    return load_model(Path(run.out, f"{run.name}.pt"))[0], [json.loads(line) for line in lines]


def untrained(cfg):
    """The model that a run of SMALL starts from."""
    torch.manual_seed(cfg.seed)
    return GPT(GPTConfig(load_meta(cfg.data)["tokenizer"]["n_vocab"], **SMALL))


def apart(a, b, cfg):
    """How far two trained models are from each other, as a share of how far training moved them.

    Adam and Muon make full steps of tiny gradients, so other rounding moves some weights.
    """
    models = (a, b, untrained(cfg))
    a, b, start = [parameters_to_vector(model.parameters()) for model in models]
    return ((a - b).norm() / (a - start).norm()).item()


def windows(cfg, split="train"):
    """All inputs and all targets of a text, (n, T) each."""
    inputs, targets, _ = open_windows(cfg, load_meta(cfg.data), split)
    return [torch.from_numpy(array.astype(np.int64)) for array in (inputs, targets)]


def without_seconds(records):
    return [{k: v for k, v in r.items() if "seconds" not in k} for r in records[1:]]


def score_files(cfg):
    return sorted(Path(cfg.out).glob("scores/*/*.f16"))


def calls_of(monkeypatch, function, dies_at=None):
    """A list of what a function of rho.py returns from now on; its n-th call may be Ctrl-C."""
    results, real = [], getattr(rho, function)

    def remembers(*args):
        results.append(None)
        if len(results) == dies_at:
            raise KeyboardInterrupt
        results[-1] = real(*args)
        return results[-1]

    monkeypatch.setattr(rho, function, remembers)
    return results


def flags(cfg, **changes):
    """A command line that says what `cfg` does."""
    changes = SMALL | QUICK | {"ratio": 0.6, "data": cfg.data, "out": cfg.out} | changes
    return [f"--{name}={value}" for name, value in changes.items()]


# ---- batches and the step ------------------------------------------------------------------------


def test_an_epoch_visits_every_window_once_and_the_next_in_another_order(cfg):
    steps = [batch(cfg, step, 10).tolist() for step in range(5)]
    ids = sum(steps, [])
    assert sorted(ids[:10]) == sorted(ids[10:]) == list(range(10)) and ids[:10] != ids[10:]
    assert batch(replace(cfg, seed=2), 0, 10).tolist() != steps[0]
    parts = rho.micro_batches(replace(cfg, micro_batch=3), 1, 10)
    assert [part.tolist() for part in parts] == [steps[1][:3], steps[1][3:]]


def test_learning_rate_warms_up_and_falls_to_its_end(cfg):
    cfg = replace(cfg, lr=2.0, warmup=0.1, lr_end=0.1, tokens=100 * 256)
    rates = [learning_rate(cfg, step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[55] == pytest.approx(0.2 + 1.8 / 2)  # half way down the cosine
    assert rates[10] == 2.0 and 0.2 < rates[-1] < 0.21 and rates[10:] == sorted(rates[10:])[::-1]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_equals_three_steps_by_hand(cfg, ref, optimizer):
    """--stage slm by token_loss, select_tokens and autograd alone, with an online reference.

    This fails when the mask is dropped, the shift doubled, the scores stale, or the excess zero.
    """
    cfg = replace(cfg, optimizer=optimizer, tokens=3 * 256, evals=1)
    trained, records = go(cfg, "slm")
    reference, _ = load_model(Path(cfg.out, "ref.pt"))
    inputs, targets = windows(cfg)
    model = untrained(cfg)
    optimizers = make_optimizers(model, optimizer, cfg.lr, cfg.weight_decay)
    losses = []
    for step in range(3):
        ids = batch(cfg, step, len(inputs))
        x, y = inputs[ids], targets[ids]
        with torch.no_grad():
            ref_loss = rho.token_loss(reference(x), y).half().float()
        student_loss = rho.token_loss(model(x), y)
        mask = rho.select_tokens(student_loss.detach() - ref_loss, cfg.ratio)
        loss = student_loss[mask].mean()
        loss.backward()
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        for o in optimizers:
            for group in o.param_groups:
                group["lr"] = learning_rate(cfg, step)
            o.step()
            o.zero_grad()
    assert records[-1]["selected_loss"] == pytest.approx(np.mean(losses), abs=2e-4)
    assert records[-1]["trained"] == 3 * round(0.6 * 256)
    assert apart(trained, model, cfg) < 0.02
    assert apart(trained, go(cfg, "clm")[0], cfg) > 0.2  # or this test tests little


def test_a_step_clips_and_divides_by_what_was_selected_in_the_whole_batch(cfg, monkeypatch):
    """By plain gradient descent, for AdamW and Muon hide the size of a gradient; with a threshold,
    so that each part of the batch selects another number of tokens. No mean of means."""

    def sgd(model, name, lr, weight_decay):
        return [torch.optim.SGD(model.parameters(), lr)]

    monkeypatch.setattr(rho, "make_optimizers", sgd)
    cfg = replace(cfg, tokens=256, evals=1, lr=1.0, select="loss", threshold=6.65)
    inputs, targets = windows(cfg)
    ids = batch(cfg, 0, len(inputs))
    for clip in (1e9, 0.01):
        trained, records = go(cfg, "slm", name=f"clip{clip}", clip=clip, micro_batch=1)
        model = untrained(cfg)
        loss = F.cross_entropy(model(inputs[ids]).mT, targets[ids], reduction="none")
        mask = loss > 6.65
        assert 20 < records[-1]["trained"] == mask.sum() < 236
        loss[mask].mean().backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        with torch.no_grad():
            for p in model.parameters():
                p -= p.grad * min(1, clip / norm)
        assert apart(trained, model, cfg) < 1e-3


def test_the_whole_sequence_stays_the_input_and_a_rule_sees_windows(cfg, ref, monkeypatch):
    """What the text calls (B, T) is (B, T): half of each window, and no less of any."""
    read, real = [], GPT.forward

    def half_of_each_window(score, ratio, threshold, valid):
        assert score.shape == valid.shape == (4, 64)
        return score > score.median(dim=1, keepdim=True).values

    def reads(model, tokens):
        if torch.is_grad_enabled():
            read.append(tokens)
        return real(model, tokens)

    monkeypatch.setattr(rho, "select_tokens", half_of_each_window)
    monkeypatch.setattr(GPT, "forward", reads)
    _, records = go(cfg, "slm")
    inputs, _ = windows(cfg)
    assert len(read) == 10 and records[-1]["trained"] == 10 * 4 * 32
    assert all(tokens.equal(inputs[batch(cfg, i, len(inputs))]) for i, tokens in enumerate(read))


def test_ratio_one_is_clm_and_so_are_equal_weights(cfg, ref, monkeypatch):
    clm, _ = go(cfg, "clm")
    assert weights_hash(clm) == weights_hash(go(cfg, "slm", ratio=1.0)[0])
    monkeypatch.setattr(rho, "select_tokens", lambda score, *_: torch.full_like(score, 0.25))
    weighted, records = go(cfg, "slm", name="weighted")
    assert apart(clm, weighted, cfg) < 0.02 and records[-1]["trained"] == 2560


def test_the_random_control_trains_on_as_many_tokens_and_others_at_each_step(cfg, monkeypatch):
    masks = calls_of(monkeypatch, "select_tokens")
    _, records = go(cfg, "slm", select="random")
    assert records[-1]["trained"] == 10 * round(0.6 * 256)
    assert len({mask.numpy().tobytes() for mask in masks}) == 10


@pytest.mark.parametrize("how", [{"threshold": 99.0}, {"ratio": 1e-4}])
def test_nothing_selected_makes_no_step_and_is_said(cfg, ref, capsys, how):
    model, records = go(cfg, "slm", **how)
    assert weights_hash(model) == weights_hash(untrained(cfg))
    assert records[-1]["trained"] == 0 and records[-1]["empty_steps"] == 10
    assert "10 steps selected no token" in capsys.readouterr().out


def test_fine_tuning_trains_on_the_tokens_of_answers_alone(cfg, ref, monkeypatch):
    masks = calls_of(monkeypatch, "select_tokens")
    go(cfg, "sft", init=f"{cfg.out}/ref.pt", tokens=256)
    answers = np.fromfile(Path(cfg.data, "sft_mask.bin"), np.bool_)
    n = len(windows(cfg, "sft")[0])
    expected = answers[1 : n * 64 + 1].reshape(n, 64)[batch(cfg, 0, n)]
    assert (masks[0].numpy() == expected).all() and 0 < expected.sum() < expected.size


def test_bf16_trains_as_float32_does(cfg, ref, monkeypatch):
    """The path of a GPU, on the processor."""
    plain, records = go(cfg, "slm")
    monkeypatch.setattr(rho, "is_bf16", lambda device: True)
    half, again = go(cfg, "slm", name="half")
    assert len(score_files(cfg)) == 2  # of another precision
    assert half.lm_head.weight.dtype == torch.float32 and 0 < apart(plain, half, cfg) < 0.3
    assert again[-1]["val_loss"] == pytest.approx(records[-1]["val_loss"], abs=0.02)


def test_training_lowers_the_loss_and_goes_on_from_init(cfg):
    _, records = go(cfg, "clm", tokens=25_600, lr=3e-3)
    assert records[-1]["val_corpus_loss"] < records[1]["val_corpus_loss"] - 0.3
    base = f"{cfg.out}/clm.pt"
    _, more = go(cfg, "clm", name="more", init=base, lr=1e-5, evals=10)
    assert more[1]["val_loss"] == pytest.approx(records[-1]["val_loss"], abs=0.05)
    # What reference and student both began with counts once.
    _, ref = go(cfg, "ref", init=base)
    _, slm = go(cfg, "slm", init=base)
    before = [records[0]["tokens_before"] for records in (more, ref, slm)]
    assert before == [25_600, 25_600, 25_600 + 2560]


def test_held_out_loss_is_the_mean_over_all_tokens_whatever_is_trained(cfg, monkeypatch):
    """An edited loss does not measure itself."""
    monkeypatch.setattr(rho, "token_loss", lambda logits, y: logits.square().mean(-1))
    model, records = go(cfg, "clm")
    for key, split in (("val_loss", "val"), ("val_corpus_loss", "val_corpus")):
        x, y = [array[:4] for array in windows(cfg, split)]
        loss = F.cross_entropy(model(x).double().mT, y, reduction="none")
        assert records[-1][key] == pytest.approx(loss.mean().item(), abs=1e-5)
    kept = np.load(Path(cfg.out, "clm-10.npy"))
    assert np.abs(kept - loss.detach().numpy()).max() < 0.01


# ---- the reference's scores ----------------------------------------------------------------------


def test_scores_on_disk_equal_an_online_reference(cfg, ref):
    go(cfg, "slm", select="ref_both")
    reference, _ = load_model(Path(cfg.out, "ref.pt"))
    inputs, targets = windows(cfg)
    with torch.no_grad():
        log_p = reference(inputs).double().log_softmax(-1)
    expected = {
        "ref_loss": -log_p.gather(-1, targets[..., None])[..., 0],
        "ref_entropy": -(log_p.exp() * log_p).sum(-1),
    }
    for path in score_files(cfg):
        scores = np.fromfile(path, np.float16).reshape(-1, 64)
        read = ~np.isnan(scores[:, 0])
        np.testing.assert_allclose(scores[read], expected[path.stem][read], rtol=1e-3, atol=1e-3)
    assert len(score_files(cfg)) == 2 and read.sum() == 40


def test_interrupted_scoring_goes_on_to_the_same_bytes(cfg, ref, monkeypatch):
    """Of the windows that are read, and of no others."""
    go(cfg, "slm")
    (path,) = score_files(cfg)
    whole = path.read_bytes()
    scores = np.frombuffer(whole, np.float16).reshape(-1, 64)
    read = np.concatenate([batch(cfg, step, len(scores)) for step in range(10)])
    assert set(np.flatnonzero(~np.isnan(scores).any(1))) == set(read)
    path.unlink()
    with monkeypatch.context() as m:
        calls_of(m, "reference_values", dies_at=4)
        with pytest.raises(KeyboardInterrupt):
            go(cfg, "slm", name="cut")
        assert 0 < np.isnan(np.fromfile(path, np.float16)).mean() < 1
    calls = calls_of(monkeypatch, "reference_values")
    go(cfg, "slm", name="cut")
    assert path.read_bytes() == whole and len(calls) == 10 - 3


def other_reference(cfg, change):
    """A reference that differs in one weight."""
    saved = load_checkpoint(Path(cfg.out, "ref.pt"))
    saved["model"]["layers.0.mlp.up_proj.weight"][3, 3] += change
    torch.save(saved, Path(cfg.out, "other.pt"))
    return f"{cfg.out}/other.pt"


def test_a_stale_score_is_never_used(cfg, ref, monkeypatch, tmp_path):
    """Another reference, text, block size, loss or model code: other scores, in another folder."""
    go(cfg, "slm")
    go(cfg, "slm", name="a", reference=other_reference(cfg, 1e-3))
    go(cfg, "slm", name="b", block_size=32)
    data = shutil.copytree(cfg.data, tmp_path / "data")
    tokens = np.fromfile(data / "train.bin", np.uint16)[::-1]
    tokens.tofile(data / "train.bin")
    meta = json.loads((data / "meta.json").read_text())
    meta["files"]["train.bin"] = rho.sha256(tokens.tobytes()).hexdigest()
    (data / "meta.json").write_text(json.dumps(meta))
    go(cfg, "slm", name="c", data=str(data))
    source = Path(rho.__file__).read_text()
    loss = source.replace("flatten(0, -2)", "view(-1)")
    monkeypatch.setattr(rho, "SCORING_CODE", rho.code_of(loss, rho.SCORING))
    go(cfg, "slm", name="d")
    monkeypatch.setitem(rho.CODE, "model.py", "edited")
    go(cfg, "slm", name="e")
    assert len(score_files(cfg)) == 6
    # A rule is no part of what scores depend on.
    monkeypatch.undo()
    rule = source.replace("return student_loss - ref_loss", "return ref_loss")
    assert rho.code_of(rule, rho.SCORING) == rho.SCORING_CODE


def test_a_short_score_file_is_refused_by_name(cfg, ref):
    go(cfg, "slm")
    (path,) = score_files(cfg)
    os.truncate(path, 100)
    with pytest.raises(SystemExit, match="ref_loss.f16"):
        go(cfg, "slm", name="again")


def test_a_reference_with_nan_stops_before_training(cfg, ref):
    with pytest.raises(SystemExit, match="other.pt.*not finite"):
        go(cfg, "slm", reference=other_reference(cfg, torch.nan))
    assert not Path(cfg.out, "slm.pt").exists()


# ---- resuming, and what makes two runs the same --------------------------------------------------


@pytest.mark.parametrize("stage, select", [("clm", ""), ("slm", ""), ("slm", "random")])
@pytest.mark.parametrize("where, call", [("evaluate", 3), ("learning_rate", 9)])
def test_a_resumed_run_is_bit_identical(cfg, ref, monkeypatch, stage, select, where, call):
    """Killed at an evaluation; and between two, with a checkpoint after each step."""
    cfg = replace(cfg, select=select, save_minutes=20 if where == "evaluate" else 1e-9)
    whole, records = go(cfg, stage, name="whole")
    with monkeypatch.context() as m:
        calls_of(m, where, dies_at=call)
        with pytest.raises(KeyboardInterrupt):
            go(cfg, stage, name="cut")
    resumed, again = go(cfg, stage, name="cut")
    assert weights_hash(whole) == weights_hash(resumed)
    assert without_seconds(records) == without_seconds(again) and len(again) == 6


def test_a_killed_process_ends_bit_identical(cfg, ref):
    """SIGKILL, wherever it strikes: while scoring, training, evaluating or saving."""
    long = {"tokens": 12_800, "save_minutes": 1e-9}
    whole, records = go(cfg, "slm", name="whole", **long)
    shutil.rmtree(Path(cfg.out, "scores"))
    command = [sys.executable, rho.__file__, *flags(cfg, stage="slm", name="cut", **long)]
    for _ in range(2):
        process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
        while process.poll() is None and not score_files(cfg):
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.5))
        process.kill()
        process.wait()
    resumed, again = go(cfg, "slm", name="cut", **long)
    assert weights_hash(whole) == weights_hash(resumed)
    assert without_seconds(records) == without_seconds(again)


def test_a_finished_run_is_left_as_it_is(cfg, capsys, monkeypatch):
    go(cfg, "clm")
    monkeypatch.setattr(rho, "open_windows", None)
    monkeypatch.setattr(rho.torch, "save", None)
    go(cfg, "clm")
    assert "finished already" in capsys.readouterr().out


NAMED = {"init": "first weights", "corpus": "mixed.bin"}


@pytest.mark.parametrize("flag", "ratio select lr tokens seed evals reference init corpus".split())
def test_another_run_of_the_same_name_is_refused_and_told_apart(cfg, ref, flag):
    go(cfg, "slm", name="mine")
    before = Path(cfg.out, "mine.pt").read_bytes()
    other = {"ratio": 0.5, "select": "loss", "lr": 1e-3, "tokens": 5120, "seed": 2, "evals": 4}
    other |= {"init": f"{cfg.out}/ref.pt", "corpus": "mixed"}
    other["reference"] = other_reference(cfg, 1e-3)
    change = {flag: other[flag]}
    with pytest.raises(SystemExit, match=f"mine.pt is another run: {NAMED.get(flag, flag)}"):
        go(cfg, "slm", name="mine", **change)
    assert Path(cfg.out, "mine.pt").read_bytes() == before
    _, records = go(cfg, "slm", name="mine", **change, restart=True)
    assert records[0]["flags"][flag] == other[flag]


def test_after_init_the_shape_is_that_of_the_file(cfg, ref, capsys):
    init = f"{cfg.out}/ref.pt"
    go(cfg, "clm", init=init)
    _, records = go(cfg, "clm", init=init, n_layer=5, n_embd=64)
    assert "finished already" in capsys.readouterr().out
    assert records[0]["identity"]["n_layer"] == 1


def test_questions_that_are_too_long_are_counted(cfg, capsys):
    go(cfg, "clm", block_size=8)
    assert "0 of 3 right (3 not asked: longer than --block_size)" in capsys.readouterr().out


def test_edited_code_is_another_run_and_a_comment_is_not(cfg, ref, monkeypatch):
    source = Path(rho.__file__).read_text()
    other_words = source.replace("Selective Language", "Other Language", 1)
    assert rho.code_of(source) == rho.code_of(f"# a comment\n{other_words}\n")
    edited = source.replace("return student_loss - ref_loss", "return ref_loss - student_loss")
    go(cfg, "slm")
    monkeypatch.setitem(rho.CODE, "rho.py", rho.code_of(edited))
    with pytest.raises(SystemExit, match="rho.py"):
        go(cfg, "slm")
    monkeypatch.undo()
    monkeypatch.setattr(rho, "WORLD", 2)
    with pytest.raises(SystemExit, match="ranks was 1 and is 2"):
        go(cfg, "slm")


def test_all_says_what_the_last_run_lacks_before_the_first(cfg, tmp_path):
    data = shutil.copytree(cfg.data, tmp_path / "data")
    meta = json.loads((data / "meta.json").read_text())
    del meta["tokens"]["mixed"], meta["files"]["mixed.bin"]
    (data / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(SystemExit, match="mixed.bin is missing.*--mix"):
        rho.main(flags(cfg, data=data))
    assert not Path(cfg.out).exists()


def test_of_two_writers_the_second_is_refused(cfg):
    Path(cfg.out).mkdir()
    message = "clm.pt is being written by another"
    with FileLock(Path(cfg.out, "clm.lock")), pytest.raises(SystemExit, match=message):
        go(cfg, "clm")
    go(cfg, "clm")


def test_what_is_not_finite_stops_the_run_and_keeps_the_checkpoint(cfg, monkeypatch):
    calls_of(monkeypatch, "evaluate", dies_at=3)
    with pytest.raises(KeyboardInterrupt):
        go(cfg, "slm", select="loss")
    path = Path(cfg.out, "slm-loss.pt")
    before = path.read_bytes()
    real = rho.token_loss
    with monkeypatch.context() as m:
        m.setattr(rho, "token_loss", lambda *a: real(*a) * torch.nan)
        with pytest.raises(SystemExit, match="slm-loss: .* not finite at step"):
            go(cfg, "slm", select="loss")
    assert path.read_bytes() == before
    with pytest.raises(SystemExit, match="not finite"):
        go(cfg, "clm", name="wild", lr=1e30)


@pytest.mark.parametrize("name", ["ref", "slm"])
def test_damaged_files_are_named(cfg, ref, name):
    Path(cfg.out, f"{name}.pt").write_bytes(b"PK\x03\x04 no checkpoint")
    with pytest.raises(SystemExit, match=f"{name}.pt"):
        go(cfg, "slm")


# ---- logs and the table --------------------------------------------------------------------------


def test_the_log_says_what_was_run_and_what_came_of_it(cfg, ref):
    _, records = go(cfg, "slm", init=f"{cfg.out}/ref.pt")
    first, last = records[0], records[-1]
    assert (first["flags"]["ratio"], first["flags"]["select"]) == (0.6, "excess")
    assert first["torch"] == torch.__version__ and first["commit"] and first["threads"] == 1
    assert first["identity"]["rho.py"] == rho.CODE["rho.py"]
    assert first["tokens_before"] == 2560  # one file counts once: it is reference and init
    assert [r["tokens"] for r in records[1:]] == [512, 1024, 1536, 2048, 2560]
    assert last["trained"] == 10 * round(0.6 * 256) and last["questions"] == 3
    assert last["seconds"] > 0 and last["eval_seconds"] > 0


def test_tokens_to_reach_is_for_good_and_on_a_straight_line():
    for key, values, goal, tokens in (
        ("loss", [4.0, 2.5, 3.2, 2.8, 2.0], 3.0, 350),
        ("loss", [4.0, 2.5, 3.2], 3.0, None),  # it was there, and ends worse
        ("loss", [4.0, 2.0], 4.5, 100),
        ("right", [5, 1, 3, 9], 6, 350),
    ):
        records = [{}] + [{"tokens": 100 * i, key: value} for i, value in enumerate(values, 1)]
        assert rho.tokens_to_reach(records, {key: goal}, key) == pytest.approx(tokens)
    assert rho.tokens_to_reach(records, {"loss": 3.0}, "loss") is None
    assert rho.tokens_to_reach(records, {"right": 0}, "right") is None


def test_the_table_shows_own_runs_and_what_differs(cfg, ref, capsys, tmp_path):
    go(cfg, "clm")
    go(cfg, "slm", name="mine", lr=1e-3)
    go(cfg, "clm", corpus="mixed", tokens=5120)
    capsys.readouterr()
    rho.main(["--stage", "table", "--out", cfg.out])
    said = capsys.readouterr().out.splitlines()
    ref, clm, mixed, mine = [set(line.replace(", ", " ").split()) for line in said[2:6]]
    assert re.search(r"ref .* [0-3] of 3 ", said[2])
    assert "ref" in ref and "clm" in clm and "lr" not in clm
    assert {"clm-mixed", "mixed.bin"} < mixed and {"mine", "5,120", "lr", "select"} < mine
    path = Path(cfg.out, "clm.jsonl")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    rho.main(["--stage", "table", "--out", cfg.out])
    assert "clm (unfinished)" in capsys.readouterr().out
    Path(cfg.out, "mine.jsonl").write_text("{")
    for out, named in ((cfg.out, "mine.jsonl"), (tmp_path, "--stage clm")):
        with pytest.raises(SystemExit, match=named):
            rho.main(["--stage", "table", "--out", str(out)])


# ---- the command line ----------------------------------------------------------------------------

MISLEADING = """
--stage slm --ratio 0             => --ratio
--stage slm --ratio nan           => --ratio
--stage slm --ratio 1.5           => --ratio
--stage slm --threshold nan       => --threshold
--name mine                       => --name
--stage clm --lr -1               => --lr
--stage clm --lr inf              => --lr
--stage clm --tokens 0            => --tokens
--stage clm --tokens 1.5          => --tokens
--stage clm --batch_size 0        => --batch_size
--stage clm --clip -1             => --clip
--stage clm --warmup 2            => --warmup
--stage clm --seed -1             => --seed
--stage slm --select exces        => --select
--stage clm --select random       => --select
--stage clm --ratio 0.3           => --ratio
--stage sft --init x --ratio 0.3  => --ratio
--stage ref --threshold 1         => --threshold
--stage ref --tokens 5e6          => --ref_tokens
--select random                   => --stage
--corpus mixed                    => --stage
--stage slm --name ../x           => --name
--stage slm --name clm            => --name
--stage sft                       => --init
--stage clm --tokns 5             => --tokns
--stage slm                       => ref.pt
--stage clm --block_size 99999    => --block_size
--stage clm --init nowhere.pt     => nowhere.pt
--stage clm --data nowhere        => nowhere
"""


@pytest.mark.parametrize("line", MISLEADING.strip().splitlines())
def test_flags_that_would_mislead_are_refused(cfg, capsys, line):
    arguments, named = line.split(" => ")
    with pytest.raises(SystemExit) as error:
        rho.main(["--data", cfg.data, "--out", cfg.out, "--device", "cpu", *arguments.split()])
    said = f"{error.value} {capsys.readouterr().err}"
    assert named in said and error.value.code != 0 and not list(Path(cfg.out).glob("*.pt"))


def test_every_field_is_a_flag():
    cfg = rho.parse("--tokens 1e6 --tied --no-qk_norm --threshold -0.5 --lr 3e-4".split())
    assert (cfg.tokens, cfg.tied, cfg.qk_norm) == (1_000_000, True, False)
    assert (cfg.threshold, cfg.lr, cfg.n_layer) == (-0.5, 3e-4, Config.n_layer)
    assert rho.run_config(cfg, "slm").ratio is None
    for stage, changes, name in (
        ("ref", {}, "ref"),
        ("slm", {}, "slm"),
        ("slm", {"select": "random"}, "slm-random"),
        ("clm", {"corpus": "mixed"}, "clm-mixed"),
    ):
        assert rho.run_config(Config(**changes), stage).name == name


def test_ctrl_c_is_one_line(cfg, ref):
    command = [sys.executable, rho.__file__, *flags(cfg, stage="slm", tokens=1e9, select="loss")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "parameters" in process.stdout.readline()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.strip().count("\n") == 0 and "same" in errors


# ---- several ranks -------------------------------------------------------------------------------


def test_two_ranks_train_as_one(cfg, ref):
    """The same parts of the same batches: scores of the same bytes, the same weights up to the
    order of sums; rank 0 alone writes and speaks."""
    rules = ("excess", "random")
    alone = {rule: go(cfg, "slm", select=rule, micro_batch=2) for rule in rules}
    (scores,) = score_files(cfg)
    expected = scores.read_bytes()
    scores.unlink()
    # One group for both runs, since a process takes seconds to start.
    script = "import rho; leave = rho.dist.destroy_process_group\n"
    script += "rho.dist.destroy_process_group = lambda: None\n"
    script += "rho.start_ranks('cpu'); rho.start_ranks = lambda device: None\n"
    for rule in rules:
        arguments = flags(cfg, stage="slm", select=rule, name=f"two-{rule}", micro_batch=2)
        script += f"rho.main({arguments})\n"
    script += "leave()\n"
    port = str(20_000 + os.getpid() % 10_000)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(rho.__file__).parent)}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = []
    for rank in "01":
        environment = os.environ | shared | {"RANK": rank}
        ranks.append(subprocess.Popen([sys.executable, "-c", script], env=environment, **options))
    said = [process.communicate(timeout=300) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    assert said[0][0] and not said[1][0]
    assert scores.read_bytes() == expected
    for rule, (model, records) in alone.items():
        two, checkpoint = load_model(Path(cfg.out, f"two-{rule}.pt"))
        assert apart(model, two, cfg) < 0.02
        for key in ("trained", "selected_loss", "val_loss"):
            assert checkpoint["records"][-1][key] == pytest.approx(records[-1][key], rel=1e-3)
