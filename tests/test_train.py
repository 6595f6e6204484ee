"""Training, scoring, resuming: that the loop is the definition, and that nothing is stale."""

import json
import os
import random
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

import rho
from model import GPT, GPTConfig, load_checkpoint, load_model, make_optimizers
from prepare_data import load_meta
from rho import Config, batch, learning_rate, open_windows

SMALL = {"n_layer": 1, "n_head": 2, "n_kv_head": 1, "n_embd": 16, "n_inner": 32, "block_size": 64}
QUICK = {"batch_size": 4, "micro_batch": 4, "tokens": 2560, "ref_tokens": 2560, "device": "cpu"}
QUICK |= {"evals": 5, "eval_windows": 4, "questions": 3}


@pytest.fixture
def cfg(tiny_data, tmp_path):
    return Config(data=str(tiny_data), out=str(tmp_path / "out"), ratio=0.6, **SMALL, **QUICK)


@pytest.fixture(scope="module")
def ref_files(tiny_data, tmp_path_factory):
    """The files of a reference, trained once for all tests that only need one."""
    out = tmp_path_factory.mktemp("ref")
    go(Config(data=str(tiny_data), out=str(out), **SMALL, **QUICK), "ref")
    return [out / "ref.pt", out / "ref.jsonl"]


@pytest.fixture
def ref(cfg, ref_files):
    """A test that asks for it finds a trained reference in cfg.out."""
    Path(cfg.out).mkdir()
    for path in ref_files:
        shutil.copy(path, cfg.out)


def go(cfg, stage, **changes):
    """Train a run; its model and the records of its log."""
    run = rho.run_config(replace(cfg, **changes), stage)
    rho.train_alone(run)
    lines = Path(run.out, f"{run.name}.jsonl").read_text().splitlines()
    return load_model(Path(run.out, f"{run.name}.pt"))[0], [json.loads(line) for line in lines]


def same(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(x.equal(y) for x, y in pairs)


def apart(a, b, cfg):
    """How far two trained models are from each other, as a share of how far training moved them.

    Adam and Muon make full steps of tiny gradients, so other rounding moves some weights.
    """
    torch.manual_seed(cfg.seed)
    start = GPT(a.config)
    flat = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (a, b, start)]
    return ((flat[0] - flat[1]).norm() / (flat[0] - flat[2]).norm()).item()


def without_seconds(records):
    return [{k: v for k, v in r.items() if "seconds" not in k} for r in records[1:]]


def score_files(cfg):
    return sorted(Path(cfg.out).glob("scores/*/*.f16"))


def dies_at(monkeypatch, function, call):
    """From now on the n-th call of a function of rho.py is Ctrl-C."""
    calls, real = [], getattr(rho, function)

    def dies(*args):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(rho, function, dies)


# ---- batches and the step ------------------------------------------------------------------------


def test_an_epoch_visits_every_window_once_and_the_next_in_another_order(cfg):
    steps = [batch(cfg, step, 10) for step in range(5)]
    epochs = np.concatenate(steps).reshape(2, 10)
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0].tolist() != epochs[1].tolist()
    # A pure function of seed and step, in any order of asking.
    assert all((batch(cfg, step, 10) == steps[step]).all() for step in (4, 0, 2))
    assert batch(replace(cfg, seed=2), 0, 10).tolist() != steps[0].tolist()
    assert [ids.tolist() for ids in rho.micro_batches(replace(cfg, micro_batch=3), 1, 10)] == [
        steps[1][:3].tolist(),
        steps[1][3:].tolist(),
    ]


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
    reference, _ = load_model(Path(cfg.out) / "ref.pt")
    inputs, targets, _ = open_windows(cfg, load_meta(cfg.data), "train")
    torch.manual_seed(cfg.seed)
    model = GPT(GPTConfig(vocab_size=reference.config.vocab_size, **SMALL))
    optimizers = make_optimizers(model, optimizer, cfg.lr, cfg.weight_decay)
    losses = []
    for step in range(3):
        ids = batch(cfg, step, len(inputs))
        x, y = [torch.from_numpy(a[ids].astype(np.int64)) for a in (inputs, targets)]
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
    assert apart(trained, go(cfg, "clm")[0], cfg) > 0.2
    assert apart(trained, go(cfg, "slm", select="loss")[0], cfg) > 0.2


def test_a_step_clips_and_divides_by_what_was_selected_in_the_whole_batch(cfg, monkeypatch):
    """By plain gradient descent, for AdamW and Muon hide the size of a gradient; with a threshold,
    so that each part of the batch selects another number of tokens. No mean of means."""

    def sgd(model, name, lr, weight_decay):
        return [torch.optim.SGD(model.parameters(), lr)]

    monkeypatch.setattr(rho, "make_optimizers", sgd)
    cfg = replace(cfg, tokens=256, evals=1, lr=1.0, select="loss", threshold=6.65)
    for clip in (1e9, 0.01):
        whole, records = go(cfg, "slm", name=f"whole{clip}", clip=clip)
        in_parts, again = go(cfg, "slm", name=f"parts{clip}", clip=clip, micro_batch=1)
        assert apart(whole, in_parts, cfg) < 1e-4
        assert records[-1]["trained"] == again[-1]["trained"]
        assert 20 < records[-1]["trained"] < 236
        torch.manual_seed(cfg.seed)
        model = GPT(whole.config)
        inputs, targets, _ = open_windows(cfg, load_meta(cfg.data), "train")
        ids = batch(cfg, 0, len(inputs))
        x, y = [torch.from_numpy(a[ids].astype(np.int64)) for a in (inputs, targets)]
        loss = F.cross_entropy(model(x).mT, y, reduction="none")
        loss[loss > 6.65].mean().backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        with torch.no_grad():
            for p in model.parameters():
                p -= p.grad * min(1, clip / norm)
        assert apart(whole, model, cfg) < 1e-3


def test_the_whole_sequence_stays_the_input_and_a_rule_sees_windows(cfg, ref, monkeypatch):
    """What the text calls (B, T) is (B, T): half of each window, and no less of any."""
    seen, read, real = [], [], GPT.forward

    def half_of_each_window(score, ratio, threshold, valid):
        assert score.shape == valid.shape == (4, 64)
        best = score.topk(32, dim=1).indices
        seen.append(torch.zeros_like(valid).scatter(1, best, True))
        return seen[-1]

    def reads(model, tokens, *args, **kwargs):
        if torch.is_grad_enabled():
            read.append(tokens)
        return real(model, tokens, *args, **kwargs)

    monkeypatch.setattr(rho, "select_tokens", half_of_each_window)
    monkeypatch.setattr(GPT, "forward", reads)
    _, records = go(cfg, "slm")
    inputs, _, _ = open_windows(cfg, load_meta(cfg.data), "train")
    for step, tokens in enumerate(read):
        assert (tokens.numpy() == inputs[batch(cfg, step, len(inputs))]).all()
    assert len(seen) == len(read) == 10
    assert records[-1]["trained"] == 10 * 4 * 32


def test_ratio_one_is_clm_and_parts_change_nothing(cfg, ref):
    clm, _ = go(cfg, "clm")
    assert same(clm, go(cfg, "slm", ratio=1.0)[0])
    assert apart(clm, go(cfg, "clm", name="parts", micro_batch=1)[0], cfg) < 0.02


def test_weights_in_place_of_a_mask_train(cfg, ref, monkeypatch):
    def ones(score, ratio, threshold, valid):
        return torch.full_like(score, 0.25)

    clm, _ = go(cfg, "clm")
    monkeypatch.setattr(rho, "select_tokens", ones)
    weighted, records = go(cfg, "slm")  # all weights equal: a mean over all tokens
    assert apart(clm, weighted, cfg) < 0.02 and records[-1]["trained"] == 2560


def test_the_random_control_trains_on_as_many_tokens_and_others_at_each_step(cfg, ref, monkeypatch):
    masks, real = [], rho.select_tokens
    monkeypatch.setattr(rho, "select_tokens", lambda *a: masks.append(real(*a)) or masks[-1])
    slm, records = go(cfg, "slm")
    masks.clear()
    control, again = go(cfg, "slm", select="random")
    assert records[-1]["trained"] == again[-1]["trained"]
    assert len({mask.numpy().tobytes() for mask in masks}) == 10
    assert apart(slm, control, cfg) > 0.2


@pytest.mark.parametrize("how", [{"threshold": 99.0}, {"ratio": 1e-4}])
def test_nothing_selected_makes_no_step_and_is_said(cfg, ref, capsys, how):
    model, records = go(cfg, "slm", **how)
    torch.manual_seed(cfg.seed)
    assert same(model, GPT(model.config))
    assert records[-1]["trained"] == 0 and records[-1]["empty_steps"] == 10
    assert "10 steps selected no token" in capsys.readouterr().out


def test_an_edited_loss_does_not_measure_itself(cfg, monkeypatch):
    _, plain = go(cfg, "clm", lr=0.0)
    monkeypatch.setattr(
        rho, "token_loss", lambda logits, y: 0.01 * logits.float().square().mean(-1)
    )
    _, edited = go(cfg, "clm", name="edited", lr=0.0)
    assert edited[-1]["val_loss"] == plain[-1]["val_loss"]


def test_fine_tuning_trains_on_the_tokens_of_answers_alone(cfg, ref, monkeypatch):
    masks, real = [], rho.select_tokens
    monkeypatch.setattr(rho, "select_tokens", lambda *a: masks.append(real(*a)) or masks[-1])
    _, records = go(cfg, "sft", init=f"{cfg.out}/ref.pt", tokens=512)
    answers = np.fromfile(Path(cfg.data, "sft_mask.bin"), np.uint8)
    n = len(open_windows(cfg, load_meta(cfg.data), "sft")[0])
    expected = answers[1 : n * 64 + 1].reshape(n, 64)[batch(cfg, 0, n)]
    assert (masks[0].numpy() == expected).all() and 0 < expected.sum() < expected.size


def test_bf16_trains_as_float32_does(cfg, ref, monkeypatch):
    """The path of a GPU, on the processor."""
    plain, records = go(cfg, "slm")
    monkeypatch.setattr(rho, "is_bf16", lambda device: True)
    half, again = go(cfg, "slm", name="half")
    assert len(score_files(cfg)) == 2  # of another precision
    assert next(iter(half.state_dict().values())).dtype == torch.float32
    assert not same(plain, half) and apart(plain, half, cfg) < 0.3
    assert again[-1]["val_loss"] == pytest.approx(records[-1]["val_loss"], abs=0.02)


def test_training_lowers_the_loss_and_goes_on_from_init(cfg, tiny_data):
    _, records = go(cfg, "clm", tokens=25_600, lr=3e-3)
    assert records[-1]["val_corpus_loss"] < records[1]["val_corpus_loss"] - 0.3
    _, more = go(cfg, "clm", name="more", init=f"{cfg.out}/clm.pt", lr=1e-5, evals=10)
    assert more[1]["val_loss"] == pytest.approx(records[-1]["val_loss"], abs=0.05)
    assert more[0]["tokens_before"] == 25_600


def test_held_out_loss_is_the_mean_over_all_tokens(cfg):
    model, records = go(cfg, "clm")
    for key, split in (("val_loss", "val"), ("val_corpus_loss", "val_corpus")):
        inputs, targets, _ = open_windows(cfg, load_meta(cfg.data), split)
        x, y = [torch.from_numpy(a[:4].astype(np.int64)) for a in (inputs, targets)]
        loss = F.cross_entropy(model(x).double().mT, y, reduction="none")
        assert records[-1][key] == pytest.approx(loss.mean().item(), abs=1e-5)
    kept = np.load(Path(cfg.out, "clm-10.npy"))
    assert np.abs(kept - loss.detach().numpy()).max() < 0.01


# ---- the reference's scores ----------------------------------------------------------------------


def test_scores_on_disk_equal_an_online_reference(cfg, ref):
    cfg = rho.run_config(replace(cfg, select="ref_both", tokens=10**5), "slm")
    meta = load_meta(cfg.data)
    reference = rho.open_model(cfg.reference, cfg, meta)
    inputs, targets, _ = open_windows(cfg, meta, "train")
    scores = rho.score_corpus(cfg, meta, reference, inputs, targets)
    x, y = [torch.from_numpy(a.astype(np.int64)) for a in (inputs, targets)]
    with torch.no_grad():
        log_p = reference(x).double().log_softmax(-1)
    expected = {
        "ref_loss": -log_p.gather(-1, y[..., None])[..., 0],
        "ref_entropy": -(log_p.exp() * log_p).sum(-1),
    }
    for name, values in expected.items():
        torch.testing.assert_close(
            torch.from_numpy(scores[name][:]).double(), values, rtol=1e-3, atol=1e-3
        )


def test_only_windows_that_are_read_are_scored_and_a_longer_run_adds_more(cfg, ref):
    go(cfg, "slm", tokens=1280)
    first = np.fromfile(score_files(cfg)[0], np.float16).reshape(-1, 64)
    n = len(first)
    read = {int(w) for step in range(5) for w in batch(cfg, step, n)}
    assert set(np.flatnonzero(~np.isnan(first).any(1))) == read
    go(cfg, "slm", name="longer")
    (path,) = score_files(cfg)
    longer = np.fromfile(path, np.float16).reshape(-1, 64)
    assert (longer[sorted(read)] == first[sorted(read)]).all()
    assert (~np.isnan(longer).any(1)).sum() == 40


def test_interrupted_scoring_goes_on_to_the_same_bytes(cfg, ref, monkeypatch):
    go(cfg, "slm")
    (path,) = score_files(cfg)
    whole = path.read_bytes()
    path.unlink()
    with monkeypatch.context() as m:
        dies_at(m, "reference_values", 4)
        with pytest.raises(KeyboardInterrupt):
            go(cfg, "slm", name="cut")
        assert 0 < np.isnan(np.fromfile(path, np.float16)).mean() < 1
    calls, real = [], rho.reference_values
    monkeypatch.setattr(rho, "reference_values", lambda *a: calls.append(1) or real(*a))
    go(cfg, "slm", name="cut")
    assert path.read_bytes() == whole and len(calls) == 10 - 3


def test_a_stale_score_is_never_used(cfg, ref, monkeypatch, tmp_path):
    """Another reference, text, block size, loss or model code: other scores, in another folder."""
    go(cfg, "slm")
    seen = {str(score_files(cfg)[0])}
    saved = load_checkpoint(Path(cfg.out, "ref.pt"))
    saved["model"]["layers.0.mlp.up_proj.weight"][3, 3] += 1e-3
    torch.save(saved, Path(cfg.out, "other.pt"))
    data = shutil.copytree(cfg.data, tmp_path / "data")
    tokens = np.fromfile(data / "train.bin", np.uint16)
    tokens[::-1].copy().tofile(data / "train.bin")
    meta = json.loads((data / "meta.json").read_text())
    meta["files"]["train.bin"] = rho.sha256((data / "train.bin").read_bytes()).hexdigest()
    (data / "meta.json").write_text(json.dumps(meta))

    source = Path(rho.__file__).read_text()
    # A rule is no part of what scores depend on, token_loss is.
    other_rule = source.replace("return student_loss - ref_loss", "return ref_loss")
    assert rho.code_of(other_rule, rho.SCORING) == rho.SCORING_CODE
    for changes, code in (
        ({"reference": f"{cfg.out}/other.pt"}, {}),
        ({"data": str(data)}, {}),
        ({"block_size": 32}, {}),
        (
            {},
            {
                "SCORING_CODE": rho.code_of(
                    source.replace("flatten(0, -2)", "view(-1)"), rho.SCORING
                )
            },
        ),
        ({}, {"CODE": {**rho.CODE, "model.py": "other"}}),
    ):
        with monkeypatch.context() as m:
            for name, value in code.items():
                m.setattr(rho, name, value)
            go(cfg, "slm", name=f"run{len(seen)}", **changes)
        new = {str(path) for path in score_files(cfg)} - seen
        assert len(new) == 1, (changes, code)
        seen |= new


@pytest.mark.parametrize("size", [0, 100])
def test_a_short_score_file_is_refused_by_name(cfg, ref, size):
    go(cfg, "slm")
    (path,) = score_files(cfg)
    os.truncate(path, size)
    with pytest.raises(SystemExit, match="ref_loss.f16"):
        go(cfg, "slm", name="again")


def test_a_reference_with_nan_stops_before_training(cfg, ref):
    saved = load_checkpoint(Path(cfg.out, "ref.pt"))
    saved["model"]["lm_head.weight"][5] = torch.nan
    torch.save(saved, Path(cfg.out, "ref.pt"))
    with pytest.raises(SystemExit, match="ref.pt.*not finite"):
        go(cfg, "slm")
    assert not Path(cfg.out, "slm.pt").exists()


# ---- resuming, and what makes two runs the same --------------------------------------------------


@pytest.mark.parametrize("stage, select", [("clm", ""), ("slm", ""), ("slm", "random")])
@pytest.mark.parametrize("where, call", [("evaluate", 3), ("learning_rate", 9)])
def test_a_resumed_run_is_bit_identical(cfg, ref, monkeypatch, stage, select, where, call):
    """Killed at an evaluation; and between two, with a checkpoint after each step."""
    cfg = replace(cfg, select=select, save_minutes=20 if where == "evaluate" else 1e-9)
    whole, records = go(cfg, stage, name="whole")
    with monkeypatch.context() as m:
        dies_at(m, where, call)
        with pytest.raises(KeyboardInterrupt):
            go(cfg, stage, name="cut")
    resumed, again = go(cfg, stage, name="cut")
    assert same(whole, resumed)
    assert without_seconds(records) == without_seconds(again) and len(again) == 6


def test_a_killed_process_ends_bit_identical(cfg, ref, tmp_path):
    """SIGKILL, wherever it strikes: while scoring, training, evaluating or saving."""
    flags = [f"--{k}={v}" for k, v in {**SMALL, **QUICK, "data": cfg.data, "out": cfg.out}.items()]
    command = [sys.executable, rho.__file__, "--stage=slm", "--save_minutes=1e-9", *flags]
    flags_of_long = ["--tokens=12800", "--name=cut"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    whole, records = go(cfg, "slm", name="whole", tokens=12_800, save_minutes=1e-9, ratio=0.5)
    shutil.rmtree(Path(cfg.out, "scores"))
    for _ in range(2):
        process = subprocess.Popen([*command, *flags_of_long], env=environment)
        while process.poll() is None and not score_files(cfg):
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
    resumed, again = go(cfg, "slm", name="cut", tokens=12_800, save_minutes=1e-9, ratio=0.5)
    assert same(whole, resumed) and without_seconds(records) == without_seconds(again)


def test_a_finished_run_is_left_as_it_is(cfg, capsys, monkeypatch):
    go(cfg, "clm")
    stamp = Path(cfg.out, "clm.pt").stat().st_mtime_ns
    monkeypatch.setattr(rho, "open_windows", None)
    go(cfg, "clm")
    assert "finished already" in capsys.readouterr().out
    assert Path(cfg.out, "clm.pt").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    "change, named",
    [
        ({"ratio": 0.5}, "ratio"),
        ({"select": "loss"}, "select"),
        ({"lr": 1e-3}, "lr"),
        ({"tokens": 5120}, "tokens"),
        ({"seed": 2}, "seed"),
        ({"evals": 4}, "evals"),
        ({"reference": "other"}, "reference"),
        ({"init": "ref"}, "first weights"),
        ({"corpus": "mixed"}, "mixed.bin"),
    ],
)
def test_another_run_of_the_same_name_is_refused_and_told_apart(cfg, ref, change, named):
    go(cfg, "slm", name="mine")
    before = Path(cfg.out, "mine.pt").read_bytes()
    saved = load_checkpoint(Path(cfg.out, "ref.pt"))
    saved["model"]["lm_head.weight"][3, 3] += 1e-3
    torch.save(saved, Path(cfg.out, "other.pt"))
    change = {k: f"{cfg.out}/{v}.pt" if v in ("other", "ref") else v for k, v in change.items()}
    with pytest.raises(SystemExit, match=f"mine.pt is another run: {named}"):
        go(cfg, "slm", name="mine", **change)
    assert Path(cfg.out, "mine.pt").read_bytes() == before
    _, records = go(cfg, "slm", name="mine", **change, restart=True)
    flag = next(iter(change))
    assert records[0]["flags"][flag] == change[flag]


def test_edited_code_is_another_run_and_a_comment_is_not(cfg, ref, monkeypatch):
    source = Path(rho.__file__).read_text()
    other_words = source.replace("Selective Language", "Other Language", 1)
    assert rho.code_of(source) == rho.code_of(f"# a comment\n{other_words}\n")
    rule = "return student_loss - ref_loss"
    assert source.count(rule) == 1
    edited = source.replace(rule, "return ref_loss - student_loss")
    go(cfg, "slm")
    monkeypatch.setattr(rho, "CODE", {**rho.CODE, "rho.py": rho.code_of(edited)})
    with pytest.raises(SystemExit, match="rho.py"):
        go(cfg, "slm")
    monkeypatch.undo()
    monkeypatch.setattr(rho, "WORLD", 2)
    with pytest.raises(SystemExit, match="ranks was 1 and is 2"):
        go(cfg, "slm")


def test_of_two_writers_the_second_is_refused(cfg):
    Path(cfg.out).mkdir()
    with (
        FileLock(Path(cfg.out, "clm.lock")),
        pytest.raises(SystemExit, match="clm.pt is being written by another"),
    ):
        go(cfg, "clm")
    go(cfg, "clm")


def test_what_is_not_finite_stops_the_run_and_keeps_the_checkpoint(cfg, monkeypatch):
    dies_at(monkeypatch, "evaluate", 3)
    with pytest.raises(KeyboardInterrupt):
        go(cfg, "slm", select="loss")
    before = Path(cfg.out, "slm-loss.pt").read_bytes()
    real = rho.token_loss
    with monkeypatch.context() as m:
        m.setattr(rho, "token_loss", lambda *a: real(*a) * torch.nan)
        with pytest.raises(SystemExit, match="slm-loss: .* not finite at step"):
            go(cfg, "slm", select="loss")
    assert Path(cfg.out, "slm-loss.pt").read_bytes() == before
    with pytest.raises(SystemExit, match="not finite"):
        go(cfg, "clm", name="wild", lr=1e30)


def test_damaged_files_are_named(cfg, ref):
    for path in (Path(cfg.out, "ref.pt"), Path(cfg.out, "slm.pt")):
        path.write_bytes(b"PK\x03\x04 no checkpoint")
        with pytest.raises(SystemExit, match=path.name):
            go(cfg, "slm", select="loss", name="slm") if path.stem == "slm" else go(cfg, "slm")


# ---- logs and the table --------------------------------------------------------------------------


def test_the_log_says_what_was_run_and_what_came_of_it(cfg, ref):
    _, records = go(cfg, "slm", init=f"{cfg.out}/ref.pt")
    first, last = records[0], records[-1]
    assert first["flags"]["ratio"] == 0.6 and first["flags"]["select"] == "excess"
    assert first["torch"] == torch.__version__ and first["flags"]["device"] == "cpu"
    assert (
        first["commit"] and first["threads"] and first["identity"]["rho.py"] == rho.CODE["rho.py"]
    )
    assert first["tokens_before"] == 2560  # one file counts once: it is reference and init
    assert [r["tokens"] for r in records[1:]] == [512, 1024, 1536, 2048, 2560]
    assert last["trained"] == 10 * round(0.6 * 256) and last["questions"] == 3
    assert last["seconds"] >= records[1]["seconds"] > 0 and last["eval_seconds"] > 0


def test_tokens_to_reach_is_for_good_and_on_a_straight_line():
    losses = [4.0, 2.5, 3.2, 2.8, 2.0]
    records = [{}] + [{"tokens": 100 * i, "loss": x} for i, x in enumerate(losses, 1)]
    goal = {"loss": 3.0, "right": 0}
    assert rho.tokens_to_reach(records, goal, "loss") == pytest.approx(350)
    assert rho.tokens_to_reach(records, {"loss": 1.9}, "loss") is None
    assert rho.tokens_to_reach(records[:4], goal, "loss") is None  # it was there, and ends worse
    assert rho.tokens_to_reach(records, {"loss": 4.5}, "loss") == 100
    answers = [{}] + [{"tokens": 100 * i, "right": x} for i, x in enumerate([5, 1, 3, 9], 1)]
    assert rho.tokens_to_reach(answers, {"right": 6}, "right") == pytest.approx(350)
    assert rho.tokens_to_reach(answers, {"right": 9}, "right") == 400
    assert rho.tokens_to_reach(answers, {"loss": 9}, "loss") is None


def test_the_table_shows_own_runs_and_what_differs(cfg, ref, capsys, tmp_path):
    go(cfg, "clm")
    go(cfg, "slm", name="mine", lr=1e-3)
    go(cfg, "clm", corpus="mixed", tokens=5120)
    capsys.readouterr()
    rho.main(["--stage", "table", "--out", cfg.out])
    said = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in said[2:6]}
    assert [*rows] == ["ref", "clm", "clm-mixed", "mine"]
    assert "5,120" in rows["mine"] and "lr" in rows["mine"] and "select" in rows["mine"]
    assert "mixed.bin" in rows["clm-mixed"] and "lr" not in rows["clm"].split()
    Path(cfg.out, "mine.jsonl").write_text("{")
    with pytest.raises(SystemExit, match="mine.jsonl"):
        rho.main(["--stage", "table", "--out", cfg.out])
    with pytest.raises(SystemExit, match="--stage clm"):
        rho.main(["--stage", "table", "--out", str(tmp_path)])


# ---- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--stage slm --ratio 0", "--ratio"),
        ("--stage slm --ratio nan", "--ratio"),
        ("--stage slm --ratio 1.5", "--ratio"),
        ("--stage slm --threshold nan", "--threshold"),
        ("--name mine", "--name"),
        ("--stage clm --lr -1", "--lr"),
        ("--stage clm --lr inf", "--lr"),
        ("--stage clm --tokens 0", "--tokens"),
        ("--stage clm --tokens 1.5", "--tokens"),
        ("--stage clm --batch_size 0", "--batch_size"),
        ("--stage clm --clip -1", "--clip"),
        ("--stage clm --warmup 2", "--warmup"),
        ("--stage clm --seed -1", "--seed"),
        ("--stage slm --select exces", "--select"),
        ("--stage clm --select random", "--select"),
        ("--stage slm --name ../x", "--name"),
        ("--stage slm --name clm", "--name"),
        ("--stage sft", "--init"),
        ("--stage clm --tokns 5", "--tokns"),
        ("--stage slm", "ref.pt"),
        ("--stage clm --block_size 99999", "--block_size"),
        ("--stage clm --init nowhere.pt", "nowhere.pt"),
        ("--stage clm --data nowhere", "nowhere"),
    ],
)
def test_flags_that_would_mislead_are_refused(cfg, capsys, flags, named):
    places = ["--data", cfg.data, "--out", cfg.out, "--device", "cpu"]
    with pytest.raises(SystemExit) as error:
        rho.main([*places, *flags.split()])
    said = f"{error.value} {capsys.readouterr().err}"
    assert named in said and error.value.code != 0 and not list(Path(cfg.out).glob("*.pt"))


def test_every_field_is_a_flag():
    cfg = rho.parse("--tokens 1e6 --tied --no-qk_norm --threshold -0.5 --lr 3e-4".split())
    assert (cfg.tokens, cfg.tied, cfg.qk_norm) == (1_000_000, True, False)
    assert (cfg.threshold, cfg.lr, cfg.n_layer) == (-0.5, 3e-4, Config.n_layer)
    assert rho.run_config(cfg, "slm").ratio is None
    names = [rho.run_config(Config(**c), s).name for s, c in (
        ("ref", {}), ("clm", {}), ("slm", {}), ("slm", {"select": "random"}),
        ("clm", {"corpus": "mixed"}), ("slm", {"corpus": "mixed"}),
    )]  # fmt: skip
    assert names == ["ref", "clm", "slm", "slm-random", "clm-mixed", "slm-mixed"]


def test_ctrl_c_is_one_line(cfg, ref):
    flags = [f"--{k}={v}" for k, v in {**SMALL, **QUICK, "data": cfg.data, "out": cfg.out}.items()]
    command = [sys.executable, rho.__file__, "--stage=clm", *flags, "--tokens=1e9"]
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
    runs = [("clm", ""), ("slm", ""), ("slm", "random")]
    alone = [go(cfg, stage, select=select, micro_batch=2) for stage, select in runs]
    (scores,) = score_files(cfg)
    expected = scores.read_bytes()
    scores.unlink()
    flags = {**SMALL, **QUICK, "micro_batch": 2, "ratio": 0.6, "data": cfg.data, "out": cfg.out}
    usual = [f"--{name}={value}" for name, value in flags.items()]
    # One group for all three runs, since a process takes seconds to start.
    script = "import rho; leave = rho.dist.destroy_process_group\n"
    script += "rho.dist.destroy_process_group = lambda: None\n"
    script += "rho.start_ranks('cpu'); rho.start_ranks = lambda device: None\n"
    for stage, select in runs:
        own = [f"--stage={stage}", f"--select={select}", f"--name=two-{stage}{select}"]
        script += f"rho.main({usual + own})\n"
    script += "leave()\n"
    port = str(20_000 + os.getpid() % 10_000)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(rho.__file__).parent)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=os.environ | shared | {"RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    said = [process.communicate(timeout=300) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    assert said[0][0] and not said[1][0]
    assert score_files(cfg)[0].read_bytes() == expected
    for (model, records), (stage, select) in zip(alone, runs, strict=True):
        two, checkpoint = load_model(Path(cfg.out, f"two-{stage}{select}.pt"))
        assert apart(model, two, cfg) < 0.02
        for key in ("trained", "selected_loss", "val_loss"):
            of_two = [record[key] for record in checkpoint["records"][1:]]
            assert of_two == pytest.approx([record[key] for record in records[1:]], rel=1e-3)
    assert apart(alone[0][0], alone[1][0], cfg) > 0.2
