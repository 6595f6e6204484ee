"""Training, scoring, resuming: that the loop is the definition, and that nothing is stale."""

import importlib.util
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import rho
from model import GPT, GPTConfig, load_checkpoint, load_model
from prepare_data import InputError
from rho import (
    NEEDS,
    Config,
    Process,
    Windows,
    batch,
    check_config,
    learning_rate,
    score_corpus,
    train_arm,
)

SMALL = {"n_layer": 1, "n_head": 2, "n_kv_head": 1, "n_embd": 16, "n_inner": 32, "block_size": 64}
QUICK = {"batch_size": 4, "micro_batch": 4, "tokens": 2560, "ref_tokens": 2560, "device": "cpu"}
EVALUATIONS = {"evals": 5, "eval_windows": 4, "questions": 3}


def small_config(data, out):
    return Config(data=str(data), out=str(out), ratio=0.6, **SMALL, **QUICK, **EVALUATIONS)


@pytest.fixture
def cfg(tiny_data, tmp_path):
    return small_config(tiny_data, tmp_path / "out")


@pytest.fixture(scope="module")
def ref_files(tiny_data, tmp_path_factory):
    """The checkpoint and the log of a reference, trained once for all tests that only need one."""
    out = tmp_path_factory.mktemp("ref")
    cfg = small_config(tiny_data, out)
    train_arm(cfg, Process(cfg), "ref")
    return [out / "ref.pt", out / "ref.jsonl"]


@pytest.fixture
def ref(cfg, ref_files):
    """A test that asks for it finds a trained reference in cfg.out."""
    Path(cfg.out).mkdir()
    for path in ref_files:
        shutil.copy(path, cfg.out)


def go(cfg, stage, **changes):
    cfg = replace(cfg, **changes)
    records = train_arm(cfg, Process(cfg), stage)
    return load_model(Path(cfg.out) / f"{records[0]['run']}.pt")[0], records


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
    timed = ("seconds", "eval_seconds", "config", "commit")
    return [{k: v for k, v in r.items() if k not in timed} for r in records]


# ---- batches -------------------------------------------------------------------------------------


def test_an_epoch_visits_every_window_once_and_the_next_in_another_order():
    epochs = np.concatenate([batch(10, 4, 7, step) for step in range(5)]).reshape(2, 10)
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert list(epochs[0]) != list(epochs[1])
    assert list(batch(10, 4, 7, 3)) == list(batch(10, 4, 7, 3)) != list(batch(10, 4, 8, 3))
    assert len(set(batch(3, 8, 7, 0))) == 3  # more rows than windows: several epochs in one batch


@pytest.mark.parametrize("mix", [0.1, 0.3, 1 / 3, 0.5, 0.9])
@pytest.mark.parametrize("size", [1, 4, 7])
def test_mix_is_a_share_of_the_windows_and_each_text_keeps_its_order(mix, size):
    """10 corpus windows and 6 clean ones (numbers 10 to 15), over several epochs of the two."""
    steps = [batch(10, size, 7, step, mix, 6) for step in range(140 // size)]
    ids = np.concatenate(steps)
    assert all(len(step) == size for step in steps) and set(ids) == set(range(16))
    assert (ids >= 10).cumsum().tolist() == [int(p * mix) for p in range(1, len(ids) + 1)]
    for mine, n in ((ids[ids < 10], 10), (ids[ids >= 10] - 10, 6)):
        unmixed = [batch(n, 1, 7, position)[0] for position in range(len(mine))]
        assert mine.tolist() == unmixed
        epochs = [mine[start : start + n].tolist() for start in range(0, len(mine) - n + 1, n)]
        assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
        assert len(epochs) < 2 or epochs[0] != epochs[1]  # in another order


def test_mix_a_batch_depends_on_the_step_alone():
    """So a resumed run goes on with the windows that come next."""
    forward = [batch(10, 4, 7, step, 0.3, 6).tolist() for step in range(20)]
    rho.permutation.cache_clear()
    assert [batch(10, 4, 7, step, 0.3, 6).tolist() for step in reversed(range(20))] == forward[::-1]
    assert [batch(10, 4, 8, step, 0.3, 6).tolist() for step in range(20)] != forward


def test_without_mix_the_order_is_that_of_the_seed_and_epoch():
    epochs = [np.random.default_rng((7, epoch)).permutation(10) for epoch in range(4)]
    for more in ((), (0.0,), (0.0, 6)):
        steps = [batch(10, 4, 7, step, *more) for step in range(10)]
        assert np.concatenate(steps).tolist() == np.concatenate(epochs).tolist()


def test_learning_rate_warms_up_and_falls_to_its_end():
    cfg = Config(lr=1.0, warmup=0.1, lr_end=0.1)
    rates = [learning_rate(cfg, s, 100) for s in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 == max(rates)
    assert rates[100] == pytest.approx(0.1) and all(np.diff(rates[10:]) < 0)


# ---- the loop is the definition ------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_equals_the_plain_definition(cfg, ref, optimizer):
    """Three steps of --stage slm, repeated with token_loss, select_tokens and autograd alone.

    This fails when the mask is dropped, the shift doubled, the scores stale, or the excess zero.
    """
    cfg = replace(cfg, optimizer=optimizer, tokens=3 * 256, evals=1)
    trained, records = go(cfg, "slm")
    reference, _ = load_model(Path(cfg.out) / "ref.pt")
    process = Process(cfg)
    windows = Windows(cfg, process.meta, "train")
    torch.manual_seed(cfg.seed)
    model = GPT(GPTConfig(vocab_size=300, **SMALL))
    optimizers = rho.make_optimizers(cfg, model)
    losses = []
    for step in range(3):
        x, y = windows[batch(windows.n, 4, cfg.seed, step)]
        with torch.no_grad():
            ref_loss = rho.token_loss(reference.head(reference(x)), y).half().float()
        student_loss = rho.token_loss(model.head(model(x)), y)
        mask = rho.select_tokens(rho.score_tokens("excess", student_loss, ref_loss), cfg.ratio)
        loss = rho.selective_loss(student_loss, mask)
        loss.backward()
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        for o in optimizers:
            for group in o.param_groups:
                group["lr"] = learning_rate(cfg, step, 3)
            o.step()
            o.zero_grad()
    assert records[-1]["selected_loss"] == pytest.approx(np.mean(losses), abs=2e-4)
    assert records[-1]["trained"] == 3 * round(0.6 * 256)
    assert apart(trained, model, cfg) < 0.02
    assert apart(trained, go(cfg, "clm")[0], cfg) > 0.2
    assert apart(trained, go(cfg, "slm", select="loss")[0], cfg) > 0.2


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay_is_for_the_matrices_inside_the_blocks(cfg, optimizer):
    """Not for embeddings, the head and norms, as the models of this kind are trained."""
    cfg = replace(cfg, optimizer=optimizer, weight_decay=0.3)
    model = GPT(GPTConfig(vocab_size=300, **SMALL))
    decay = {}
    for group in [g for o in rho.make_optimizers(cfg, model) for g in o.param_groups]:
        decay.update((parameter, group["weight_decay"]) for parameter in group["params"])
    for name, parameter in model.named_parameters():
        inside = "proj" in name  # q_proj to down_proj; the rest are norms, embedding and head
        assert decay.pop(parameter) == (0.3 if inside else 0.0), name
    assert not decay


def test_a_step_divides_by_the_mask_and_clips(cfg):
    """By hand, with plain gradient descent: AdamW and Muon hide the size of a gradient."""
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    descent = torch.optim.SGD(model.parameters(), lr=100.0)
    model.weight.grad = torch.tensor([[6.0, 8.0]])  # a sum over two tokens: the mean is (3, 4)
    cfg = replace(cfg, clip=1.0)
    norm = rho.take_step(cfg, Process(cfg), model, [descent], step=5, mask_sum=2.0)
    assert norm == pytest.approx(5)
    expected = -learning_rate(cfg, 5, cfg.steps) * torch.tensor([[0.6, 0.8]])
    torch.testing.assert_close(model.weight.data, expected)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("micro_batch", [4, 2, 1])
def test_mix_gradient_equals_a_plain_loop(cfg, ref, fast, micro_batch, monkeypatch):
    """One step of two corpus windows and two clean ones, token by token.

    A micro-batch of one holds corpus or clean text alone.
    """
    cfg = replace(cfg, optimizer="adamw", clip=1e9, fast=fast, micro_batch=micro_batch)
    real, seen = rho.take_step, []

    def spy(cfg, process, model, *rest):
        norm = real(cfg, process, model, *rest)
        seen.append([parameter.grad.clone() for parameter in model.parameters()])
        return norm

    monkeypatch.setattr(rho, "take_step", spy)
    _, records = go(cfg, "slm", mix=0.5, tokens=256, evals=1)

    # At a half, every second window is clean text.
    corpus, clean = (np.fromfile(f"{cfg.data}/{name}.bin", np.uint16) for name in ("train", "ref"))
    step = []
    for place in range(2):
        for text in (corpus, clean):
            order = np.random.default_rng((cfg.seed, 0)).permutation((len(text) - 1) // 64)
            first = order[place] * 64
            step.append((text is clean, torch.from_numpy(text[first : first + 65].astype(int))))
    reference, _ = load_model(Path(cfg.out) / "ref.pt")
    torch.manual_seed(cfg.seed)
    model = GPT(GPTConfig(vocab_size=300, **SMALL))
    trained_on = []
    for start in range(0, 4, micro_batch):
        candidates = []
        for is_clean, tokens in step[start : start + micro_batch]:
            mine, known = (
                m.head(m(tokens[None, :-1]))[0].log_softmax(-1) for m in (model, reference)
            )
            for position, target in enumerate(tokens[1:].tolist()):
                loss = -mine[position, target]
                if is_clean:
                    trained_on.append(loss)
                else:
                    excess = loss.item() + known[position, target].half().item()
                    candidates.append((excess, loss))
        candidates.sort(key=lambda pair: -pair[0])
        kept = round(0.6 * len(candidates))
        trained_on += [loss for _, loss in candidates[:kept]]
    mean = sum(trained_on) / len(trained_on)
    mean.backward()

    assert len(seen) == 1 and records[-1]["trained"] == len(trained_on)
    assert records[-1]["selected_loss"] == pytest.approx(mean.item(), abs=1e-5)
    for got, parameter in zip(seen[0], model.parameters(), strict=True):
        error = (got - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-4


@pytest.mark.parametrize("select", [rule for rule in NEEDS if rule != "all"])
def test_mix_counts_all_of_the_clean_text_and_the_ratio_of_the_corpus(cfg, ref, tiny_data, select):
    """40 windows at 0.3: 12 of clean text. At positions 3, 6, 9, 13, 16, 19 and so on."""
    _, records = go(cfg, "slm", select=select, mix=0.3)
    clean_in_step = [int(0.3 * 4 * (s + 1)) - int(0.3 * 4 * s) for s in range(10)]
    assert sum(clean_in_step) == 12
    of_corpus = sum(round(0.6 * 64 * (4 - clean)) for clean in clean_in_step)
    if select == "oracle":
        kinds = np.load(tiny_data / "kinds.npz")["train"][1:]
        n = len(kinds) // 64
        visited = np.random.default_rng((cfg.seed, 0)).permutation(n)[:28]
        of_corpus = sum((kinds[w * 64 : w * 64 + 64] == 0).sum() for w in visited)
    assert records[-1]["trained"] == 12 * 64 + of_corpus
    assert np.isfinite(records[-1]["val_loss"])


@pytest.mark.parametrize("fast", [True, False])
def test_mix_trains_on_clean_text_where_nothing_is_selected(cfg, ref, fast, capsys):
    _, records = go(cfg, "slm", threshold=50.0, mix=0.5, fast=fast)
    assert records[-1]["trained"] == 20 * 64
    # It is said all the same: the rule does nothing.
    assert [record["empty_steps"] for record in records[1:]] == [2] * 5
    said = capsys.readouterr().out
    assert "2 steps selected no token and trained on clean text alone" in said


def test_mix_a_step_without_a_corpus_window_is_not_empty(cfg, ref):
    """A batch of one at a mix of 0.5: every second step is clean text."""
    _, records = go(cfg, "slm", mix=0.5, batch_size=1, tokens=640)
    assert [record["empty_steps"] for record in records[1:]] == [0] * 5


def test_mix_of_plain_clm_trains_on_every_token(cfg):
    mixed, records = go(cfg, "clm", mix=0.5)
    assert records[-1]["trained"] == records[-1]["tokens"] == 2560
    assert records[-1]["selected_loss"] == pytest.approx(records[-1]["student_loss"])
    assert apart(mixed, go(cfg, "clm")[0], cfg) > 0.2


@pytest.mark.parametrize("flags", [{}, {"threshold": 0.05}, {"micro_batch": 2}, {"mix": 0.3}])
def test_the_fast_form_trains_as_the_plain_functions_do(cfg, ref, flags):
    fast, records = go(cfg, "slm", **flags)
    plain, again = go(cfg, "slm", name="plain", fast=False, **flags)
    assert apart(fast, plain, cfg) < 0.02
    assert records[-1]["val_loss"] == pytest.approx(again[-1]["val_loss"], abs=1e-4)
    assert abs(records[-1]["trained"] - again[-1]["trained"]) <= 2  # ties at the threshold


@pytest.mark.parametrize("fast", [True, False])
def test_a_rule_per_sequence_sees_sequences(cfg, ref, monkeypatch, fast):
    """What the text calls (B, T) is (B, T): half of each window, and no less of any."""
    seen = []

    def half_of_each_window(score, ratio, threshold, valid):
        assert score.shape == valid.shape == (4, 64)
        best = score.topk(32, dim=1).indices
        mask = torch.zeros_like(valid).scatter(1, best, True)
        seen.append(mask)
        return mask

    monkeypatch.setattr(rho, "select_tokens", half_of_each_window)
    _, records = go(cfg, "slm", fast=fast)
    assert len(seen) == 10 and all((mask.sum(1) == 32).all() for mask in seen)
    assert records[-1]["trained"] == 10 * 4 * 32


@pytest.mark.parametrize("fast", [True, False])
def test_soft_weights_train_in_either_form(cfg, ref, monkeypatch, fast):
    """A selection may weigh instead of choose; both forms move the weights alike."""

    def weigh(score, ratio, threshold, valid):
        return torch.sigmoid(2 * score)

    monkeypatch.setattr(rho, "select_tokens", weigh)
    soft, records = go(cfg, "slm", fast=fast)
    other, _ = go(cfg, "slm", name="other", fast=not fast)
    assert apart(soft, other, cfg) < 0.02 < apart(soft, go(cfg, "clm")[0], cfg)
    assert records[-1]["trained"] == 2560  # every token has a weight


def tenth_more(real, *inputs):
    return 1.1 * real(*inputs)


def half_the_gradient(real, *inputs):
    """The value stays the same."""
    loss = real(*inputs)
    return (loss + loss.detach()) / 2


def mean_over_the_number(real, student_loss, mask):
    """The same as long as the mask is no weight."""
    return (student_loss * mask).sum() / (mask > 0).sum()


def easy_tokens_left_alone(real, logits, targets):
    return real(logits, targets).clamp(min=0.3)


def little_of_small_selections(real, student_loss, mask):
    return (student_loss * mask).sum() / mask.sum().clamp(min=100)


def nothing_for_late_ids(real, logits, targets):
    """The demo's ids go to 299."""
    return real(logits, targets) * (targets < 250)


@pytest.mark.parametrize(
    "name, edit",
    [
        ("token_loss", nothing_for_late_ids),
        ("token_loss", tenth_more),
        ("token_loss", half_the_gradient),
        ("selective_loss", tenth_more),
        ("selective_loss", half_the_gradient),
        ("selective_loss", mean_over_the_number),
        ("token_loss", easy_tokens_left_alone),
        ("selective_loss", little_of_small_selections),
    ],
)
def test_an_edited_loss_that_the_fast_form_would_not_run_is_refused(cfg, monkeypatch, name, edit):
    """Else a student changes the loss, and measures the old one."""
    monkeypatch.setattr(rho, name, partial(edit, getattr(rho, name)))
    with pytest.raises(InputError, match="add --fast false"):
        rho.check_fast_form(768)  # the demo's vocabulary, in which random targets are all hard
    with pytest.raises(InputError, match="add --fast false"):
        go(cfg, "clm")
    go(cfg, "clm", fast=False)


def test_an_edited_loss_does_not_measure_itself(cfg, monkeypatch):
    """Held-out losses are model.py's in every arm. One step at a tiny rate: the same weights."""
    settings = {"tokens": 256, "evals": 1, "lr": 1e-9}
    plain = go(cfg, "clm", **settings)[1][-1]
    monkeypatch.setattr(rho, "token_loss", partial(tenth_more, rho.token_loss))
    edited = go(cfg, "clm", name="edited", fast=False, **settings)[1][-1]
    assert edited["student_loss"] == pytest.approx(1.1 * plain["student_loss"], rel=1e-3)
    assert edited["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-3)


def test_the_whole_sequence_stays_the_input(cfg, ref):
    """Before the first step both arms have the same losses: the mask hides nothing from them."""
    cfg = replace(cfg, tokens=256, evals=1)
    slm, clm = go(cfg, "slm")[1][-1], go(cfg, "clm")[1][-1]
    assert slm["student_loss"] == pytest.approx(clm["student_loss"], abs=1e-6)
    assert slm["trained"] == round(0.6 * 256) and clm["trained"] == 256


def test_ratio_one_is_plain_clm(cfg, ref):
    assert same(go(cfg, "clm")[0], go(cfg, "slm", ratio=1.0)[0])


def test_accumulation_changes_nothing_for_clm(cfg):
    whole, parts = (go(cfg, "clm", micro_batch=m, name=f"m{m}")[0] for m in (4, 1))
    assert apart(whole, parts, cfg) < 0.02


def test_threshold_under_accumulation_is_one_mean(cfg, ref):
    """Micro-batches select unequal numbers here; the step must divide by their sum, once."""
    cfg = replace(cfg, tokens=256, evals=1, threshold=0.05)
    whole, parts = (go(cfg, "slm", micro_batch=m, name=f"m{m}")[0] for m in (4, 1))
    assert apart(whole, parts, cfg) < 0.02


def test_ranks_in_fine_tuning_are_those_among_the_answers(cfg):
    """What may not be trained on would push the ranks of the rest apart, in one of two inputs."""
    process = Process(cfg)
    windows = Windows(cfg, process.meta, "sft")
    ids = np.arange(4)
    shape = (windows.n, windows.T)
    inputs = {name: np.random.rand(*shape) for name in ("ref_loss", "ref_entropy")}
    questions = ~windows.valid(np.arange(windows.n)).numpy()
    inputs["ref_loss"][questions] *= 0.1  # of a low loss, but not of a low entropy
    _, y, valid, _, values = rho.fetch(process, windows, inputs, ids)
    student_loss = torch.zeros(y.shape)
    score = rho.score_tokens("ref_both", student_loss, **values)
    mask = rho.select_tokens(score, 0.5, valid=valid)

    answers = {name: torch.from_numpy(of_all[ids])[valid] for name, of_all in inputs.items()}
    score = rho.score_tokens("ref_both", student_loss[valid], **answers)
    assert 0 < valid.sum() < valid.numel()
    assert mask[valid].equal(rho.select_tokens(score, 0.5)) and not mask[~valid].any()


def test_random_control_trains_on_as_many_other_tokens(cfg, ref):
    slm, random = go(cfg, "slm"), go(cfg, "slm", select="random")
    assert slm[1][-1]["trained"] == random[1][-1]["trained"] == round(0.6 * 256) * 10
    assert apart(slm[0], random[0], cfg) > 0.2
    assert same(random[0], go(cfg, "slm", select="random", name="again")[0])


def test_random_control_draws_other_tokens_at_each_step_on_each_rank(cfg, monkeypatch):
    """The same places of every window would be another corpus, not a control."""
    drawn = []

    def draw(*given):
        mask = rho_select(*given)
        drawn.append(mask.flatten().tolist())
        return mask

    rho_select = rho.select_tokens
    monkeypatch.setattr(rho, "select_tokens", draw)
    for rank in (0, 1):
        process = Process(cfg)
        process.rank = rank
        process.share = lambda step_windows: step_windows
        other = replace(cfg, select="random", micro_batch=2, name=f"rank{rank}")
        train_arm(other, process, "slm")
    assert len(drawn) == 2 * 10 * 2 == len(set(map(tuple, drawn)))


@pytest.mark.parametrize(
    "weights, says",
    [
        (lambda score: score - score.mean(), "negative or NaN"),
        (lambda score: torch.full_like(score, torch.nan), "negative or NaN"),
        (lambda score: score.sigmoid()[0], r"gave \(32,\) for \(\d+, 32\) tokens"),
    ],
)
def test_what_is_no_mask_and_no_weight_is_refused(cfg, monkeypatch, weights, says):
    """With a negative sum, or a NaN in it, no step was made, and nothing was said."""
    monkeypatch.setattr(rho, "select_tokens", lambda score, *_: weights(score))
    with pytest.raises(InputError, match=f"select_tokens gave .*{says}|{says}"):
        go(cfg, "slm", select="loss", block_size=32)


def test_nothing_selected_makes_no_step_and_says_so(cfg, ref, capsys):
    model, records = go(cfg, "slm", threshold=50.0, name="nothing")
    torch.manual_seed(cfg.seed)
    assert same(model, GPT(model.config))  # not even weight decay moved it
    assert records[-1]["trained"] == 0 and records[-1]["empty_steps"] == 2
    said = capsys.readouterr().out
    assert "2 steps selected no token and were not made" in said


def test_momentum_moves_nothing_while_nothing_is_selected(cfg, ref, monkeypatch):
    """Muon normalises: stale momentum alone would move the weights at full speed."""
    real, calls = rho.select_tokens, []

    def then_nothing(score, *rest):
        calls.append(1)
        return real(score, *rest) & (len(calls) <= 5)

    monkeypatch.setattr(rho, "select_tokens", then_nothing)
    model, records = go(cfg, "slm", name="half", evals=2)
    monkeypatch.undo()
    assert records[1]["val_loss"] == records[2]["val_loss"]
    assert [r["empty_steps"] for r in records[1:]] == [0, 5]


def test_oracle_trains_on_the_clean_target_tokens(cfg, tiny_data):
    _, records = go(cfg, "slm", select="oracle")
    assert records[0]["config"]["select"] == "oracle" and records[0]["config"]["ratio"] is None
    kinds = np.load(tiny_data / "kinds.npz")["train"][1:]
    windows = Windows(cfg, Process(cfg).meta, "train")
    visited = np.concatenate([batch(windows.n, 4, cfg.seed, s) for s in range(10)])
    clean = sum((kinds[w * 64 : w * 64 + 64] == 0).sum() for w in visited)
    assert records[-1]["trained"] == clean


# ---- scores --------------------------------------------------------------------------------------


def test_scores_on_disk_equal_an_online_reference(cfg, ref):
    process = Process(cfg)
    windows = Windows(cfg, process.meta, "train")
    cfg = replace(cfg, tokens=10**6, select="ref_both")
    scores = score_corpus(cfg, process, windows)
    reference, _ = load_model(Path(cfg.out) / "ref.pt")
    x, y = windows[np.arange(windows.n)]
    logp = reference.head(reference(x)).double().log_softmax(-1)
    loss = -logp.gather(-1, y[..., None])[..., 0].detach()
    entropy = -(logp.exp() * logp).sum(-1).detach()
    for name, exact in (("ref_loss", loss), ("ref_entropy", entropy)):
        stored = torch.from_numpy(np.array(scores[name])).double()
        assert ((stored - exact).abs() <= 2**-11 * exact + 1e-4).all()


@pytest.mark.parametrize("mix", [0.0, 0.3])
def test_only_visited_windows_are_scored_and_more_are_added(cfg, mix):
    cfg = replace(cfg, mix=mix)
    train_arm(replace(cfg, mix=0.0), Process(cfg), "ref")
    process = Process(cfg)
    windows = Windows(cfg, process.meta, "train", "ref")
    some = np.array(score_corpus(cfg, process, windows)["ref_loss"])
    done = ~np.isnan(some).any(1)
    steps = [batch(windows.n, 4, cfg.seed, s, mix, windows.n_clean) for s in range(10)]
    visited = {int(w) for w in np.concatenate(steps) if w < windows.n}
    assert set(done.nonzero()[0]) == visited and len(visited) == 40 - int(40 * mix)
    every = np.array(score_corpus(replace(cfg, tokens=10**6), process, windows)["ref_loss"])
    assert not np.isnan(every).any() and (every[done] == some[done]).all()


@pytest.mark.parametrize("mix", [0.0, 0.1, 0.3, 1 / 3, 0.9])
def test_mix_visited_windows_are_those_of_the_batches(mix):
    """Also where the run takes more than an epoch: 1 to 40 steps, 100 windows."""
    few = SimpleNamespace(n=100, n_clean=6)
    seen = set()
    for steps in range(1, 41):
        cfg = Config(mix=mix, seed=7, batch_size=4, block_size=64, tokens=steps * 256)
        ids = batch(few.n, 4, 7, steps - 1, mix, few.n_clean)
        seen |= {int(w) for w in ids if w < few.n}
        assert rho.visited_windows(cfg, few).tolist() == sorted(seen)


def test_mix_clean_windows_need_no_stored_score(cfg, ref):
    """All that the run does not visit is NaN in the file, window 0 among it."""
    cfg = replace(cfg, seed=2)  # of an order in which 0 comes late
    model, records = go(cfg, "slm", mix=0.3)
    scores = np.fromfile(next(Path(cfg.out, "scores").rglob("*.f16")), np.float16)
    scores = scores.reshape(-1, 64)
    scored = ~np.isnan(scores).any(1)
    assert np.isnan(scores[0]).all() and scored.sum() == 28
    assert all(np.isfinite(r["selected_loss"]) and np.isfinite(r["val_loss"]) for r in records[1:])
    assert all(parameter.isfinite().all() for parameter in model.parameters())

    process = Process(cfg)
    windows = Windows(cfg, process.meta, "train", "ref")
    a, b = scored.nonzero()[0][:2]
    ids = np.array([windows.n, a, windows.n + 5, b])
    *_, corpus, rule_values = rho.fetch(process, windows, {"ref_loss": scores}, ids)
    assert corpus.tolist() == [False, True, False, True]
    values = rule_values["ref_loss"].numpy()
    assert (values == scores[[a, b]]).all() and np.isfinite(values).all()


def test_mix_a_rule_of_ones_own_sees_the_corpus_alone(cfg, ref, monkeypatch):
    """Also one that divides by what a clean window has not: it would be 0 / 0."""
    seen = []

    def divided(select, student_loss, ref_loss, generator):
        seen.append((len(student_loss), len(ref_loss)))
        return -ref_loss / ref_loss

    monkeypatch.setattr(rho, "score_tokens", divided)
    go(cfg, "slm", mix=0.3, name="divided")
    windows = [batch(100, cfg.batch_size, 1, step, 0.3, 50) for step in range(cfg.steps)]
    corpus = sum(int((ids < 100).sum()) for ids in windows)
    assert sum(n for n, _ in seen) == sum(n for _, n in seen) == corpus


def test_interrupted_scoring_goes_on(cfg, ref, monkeypatch):
    process = Process(cfg)
    windows = Windows(cfg, process.meta, "train")
    cfg = replace(cfg, tokens=10**6)
    calls, real = [], rho.score_batch

    def dies(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(rho, "score_batch", dies)
    with pytest.raises(KeyboardInterrupt):
        score_corpus(cfg, process, windows)
    assert np.isnan(np.fromfile(next(Path(cfg.out, "scores").rglob("*.f16")), np.float16)).any()
    scores = np.array(score_corpus(cfg, process, windows)["ref_loss"])
    assert not np.isnan(scores).any()
    before = len(calls)
    score_corpus(cfg, process, windows)
    assert len(calls) == before  # nothing is scored twice


def test_a_slow_rank_scores_its_whole_share(cfg, ref, monkeypatch):
    """The fast one must not write its scores before the slow one has looked at what is missing."""
    # Python's parser, by which code_hash reads the code, is not made for two threads.
    monkeypatch.setattr(rho, "code_hash", lambda *_: "")
    barrier = threading.Barrier(2, timeout=600)
    monkeypatch.setattr(Process, "wait", lambda self: barrier.wait())
    real = rho.unscored

    def look(scores, ids):
        if threading.current_thread().name == "slow":
            time.sleep(0.5)
        return real(scores, ids)

    monkeypatch.setattr(rho, "unscored", look)

    def score(rank):
        process = Process(cfg)
        process.rank, process.world = rank, 2
        score_corpus(cfg, process, Windows(cfg, process.meta, "train"))

    slow = threading.Thread(target=score, args=[1], name="slow")
    slow.start()
    score(0)
    slow.join()
    scores = np.fromfile(next(Path(cfg.out, "scores").rglob("*.f16")), np.float16)
    assert (~np.isnan(scores)).sum() == cfg.tokens


def test_of_a_longer_run_only_the_new_windows_are_scored(cfg, ref, monkeypatch):
    """The others stay to the last bit: a run has begun with them."""
    go(cfg, "slm", tokens=1280)
    path = next(Path(cfg.out, "scores").rglob("*.f16"))
    before = np.fromfile(path, np.float16)
    real, scored = rho.all_losses, []

    def one_more(hidden, weight, targets, **options):
        scored.append(targets.numel())
        return real(hidden, weight, targets, **options)[0] + 1, None

    monkeypatch.setattr(rho, "all_losses", one_more)
    process = Process(cfg)
    score_corpus(cfg, process, Windows(cfg, process.meta, "train"))
    after = np.fromfile(path, np.float16)
    known = ~np.isnan(before)
    assert (after[known] == before[known]).all()
    assert known.sum() == sum(scored) == 1280 and (~np.isnan(after)).sum() == 2560


def test_losses_that_are_there_stay_when_entropies_are_added(cfg, ref, monkeypatch):
    process = Process(cfg)
    windows = Windows(cfg, process.meta, "train")
    before = np.array(score_corpus(cfg, process, windows)["ref_loss"])
    real = rho.all_losses
    monkeypatch.setattr(rho, "all_losses", lambda *args, **more: (real(*args, **more)[0] + 1, None))
    scores = score_corpus(replace(cfg, select="ref_both"), process, windows)
    assert (np.isnan(scores["ref_loss"]) == np.isnan(before)).all()
    assert np.nanmax(np.abs(scores["ref_loss"] - before)) == 0
    assert (np.isnan(scores["ref_entropy"]) == np.isnan(before)).all()


def test_without_the_fast_form_the_reference_is_scored_by_token_loss(cfg, ref, monkeypatch):
    """So an edited token_loss is used for student and reference, and no older score is."""
    process = Process(cfg)
    windows = Windows(cfg, process.meta, "train")
    fast = np.array(score_corpus(cfg, process, windows)["ref_loss"])
    plain = replace(cfg, fast=False)
    slow = np.array(score_corpus(plain, process, windows)["ref_loss"])
    np.testing.assert_allclose(slow, fast, atol=0.01)

    real = rho.token_loss

    def doubled(logits, targets):
        return 2 * real(logits, targets)

    monkeypatch.setattr(rho, "token_loss", doubled)
    edited = np.array(score_corpus(plain, process, windows)["ref_loss"])
    np.testing.assert_allclose(edited, 2 * slow, atol=0.02)
    assert len(list(Path(cfg.out, "scores").glob("*/*.f16"))) == 3


def test_a_stale_score_is_never_used(cfg, ref, monkeypatch):
    """The folder's name covers what a loss depends on: weights, corpus, window, precision, code."""
    process, path = Process(cfg), Path(cfg.out) / "ref.pt"

    def folders(cfg=cfg, process=process):
        score_corpus(cfg, process, Windows(cfg, process.meta, "train"))
        return len([path for path in (Path(cfg.out) / "scores").iterdir() if path.is_dir()])

    assert folders() == folders() == 1
    assert folders(replace(cfg, block_size=32)) == 2
    process.meta["files"]["train.bin"] = "another corpus"
    assert folders() == 3
    checkpoint = load_checkpoint(path)
    checkpoint["model"]["norm.weight"][0] += 1e-6
    torch.save(checkpoint, path)
    assert folders() == 4
    assert folders(replace(cfg, fast=False)) == 5
    halved = Process(cfg)
    halved.dtype = torch.bfloat16
    halved.meta["files"]["train.bin"] = "another corpus"
    assert folders(process=halved) == 6
    monkeypatch.setitem(rho.FILES, GPT, rho.FILES[GPT] + "\nother_code = True\n")
    assert folders() == 7
    go(cfg, "slm")
    go(cfg, "ref", ref_tokens=1280, restart=True)
    with pytest.raises(InputError, match="scores of the reference"):
        go(cfg, "slm")


def test_every_weight_counts_in_the_hash_of_a_model():
    model = GPT(GPTConfig(vocab_size=300, **SMALL))
    seen = {rho.weights_hash(model)}
    for parameter in model.parameters():
        for place in (0, -1):
            with torch.no_grad():
                parameter.view(-1)[place] += 1e-6
            seen.add(rho.weights_hash(model))
    assert len(seen) == 1 + 2 * len(list(model.parameters()))


def test_the_reference_stays_as_it_was(cfg, ref):
    before = (Path(cfg.out) / "ref.pt").read_bytes()
    go(cfg, "slm")
    assert (Path(cfg.out) / "ref.pt").read_bytes() == before


def test_reference_of_another_size_than_the_student(cfg):
    go(cfg, "ref", n_embd=8, n_inner=16)
    student, _ = go(cfg, "slm")
    assert student.config.n_embd == 16


# ---- logs and resuming ---------------------------------------------------------------------------


@pytest.mark.parametrize("stage, mix", [("clm", 0.0), ("slm", 0.0), ("slm", 0.3)])
def test_a_resumed_run_is_bit_identical(cfg, ref, stage, mix, monkeypatch):
    cfg = replace(cfg, mix=mix)
    whole, records = go(cfg, stage, name="whole")
    calls, real = [], rho.evaluate

    def dies(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as m:
        m.setattr(rho, "evaluate", dies)
        with pytest.raises(KeyboardInterrupt):
            go(cfg, stage, name="cut")
    resumed, again = go(cfg, stage, name="cut")
    assert same(whole, resumed)
    assert without_seconds(records)[1:] == without_seconds(again)[1:]
    lines = (Path(cfg.out) / "cut.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == again and len(lines) == 6


def test_a_checkpoint_between_evaluations_resumes_bit_identically(cfg, ref, monkeypatch):
    """--save_minutes: what had added up since the last evaluation is in the checkpoint, too."""
    whole, records = go(cfg, "slm", name="whole")
    real, steps = rho.take_step, []

    def dies(*args):
        steps.append(1)
        if len(steps) == 4:  # after one evaluation, at step 2, and one step more
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as m:
        m.setattr(rho, "take_step", dies)
        with pytest.raises(KeyboardInterrupt):
            go(cfg, "slm", name="cut", save_minutes=1e-9)
    assert load_checkpoint(Path(cfg.out) / "cut.pt")["step"] == 3
    resumed, again = go(cfg, "slm", name="cut")
    assert same(whole, resumed)
    assert without_seconds(records)[1:] == without_seconds(again)[1:]


def test_a_finished_run_is_skipped_and_says_so(cfg, capsys):
    go(cfg, "clm")
    assert "finished already" not in capsys.readouterr().out
    log, checkpoint = Path(cfg.out) / "clm.jsonl", Path(cfg.out) / "clm.pt"
    before = log.read_text(), checkpoint.stat().st_mtime_ns
    log.unlink()  # as after a kill between checkpoint and log
    go(cfg, "clm")
    assert (log.read_text(), checkpoint.stat().st_mtime_ns) == before
    assert "clm.pt: finished already" in capsys.readouterr().out


def test_an_unfinished_run_is_not_called_finished(cfg, capsys, monkeypatch):
    def dies(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(rho, "report", dies)
        with pytest.raises(KeyboardInterrupt):
            go(cfg, "clm", save_minutes=1e-9)
    capsys.readouterr()
    go(cfg, "clm")
    said = capsys.readouterr().out
    assert "resumes at step 1" in said and "finished already" not in said


@pytest.mark.parametrize(
    "change, named",
    [
        ({"lr": 1e-3}, "--lr was 0.00075"),
        ({"tokens": 5120}, "--tokens was 2560"),
        ({"evals": 4}, "--evals was 5"),
        ({"seed": 2}, "--seed was 1337"),
        ({"fast": False}, "--fast was True"),
        ({"mix": 0.3, "name": "clm"}, "--mix was 0.0"),
    ],
)
def test_another_run_of_the_same_name_is_refused_and_says_what_differs(cfg, change, named):
    go(cfg, "clm")
    before = (Path(cfg.out) / "clm.pt").read_bytes()
    with pytest.raises(InputError, match=f"clm.pt is another run .*{named}.*--name.*--restart"):
        go(cfg, "clm", **change)
    assert (Path(cfg.out) / "clm.pt").read_bytes() == before
    _, records = go(cfg, "clm", restart=True, **change)
    name, value = next(iter(change.items()))
    assert records[0]["config"][name] == value


def test_a_changed_rule_is_another_run_and_a_comment_is_not(cfg, monkeypatch):
    """The identity of a run covers what the code does. (An old result was once shown as new.)"""
    source = Path(rho.__file__).read_text()
    rule = "return student_loss - ref_loss"
    docstring = '"""How much each token is worth'
    assert source.count(rule) == source.count(docstring) == 1
    other_words = source.replace(docstring, '"""What a token is worth') + "\n# a comment\n"
    hashes = []
    for text in (source, other_words, source.replace(rule, "return -ref_loss")):
        monkeypatch.setitem(rho.FILES, rho.Config, text)
        hashes.append(rho.code_hash(rho.Config))
    assert hashes[0] == hashes[1] != hashes[2]
    monkeypatch.undo()
    go(cfg, "clm")
    monkeypatch.setattr(rho, "code_hash", lambda *_: "other")
    with pytest.raises(InputError, match="code of rho.py"):
        go(cfg, "clm")


def test_an_edit_while_a_run_goes_on_is_not_its_code(cfg, tmp_path, monkeypatch):
    """Python executes what it has read at its start, so that is what a run is stamped with."""
    before = rho.code_hash(Config), rho.SOURCES[rho.token_loss]
    edited = tmp_path / "rho.py"
    edited.write_text(Path(rho.__file__).read_text().replace("student_loss - ref_loss", "ref_loss"))
    monkeypatch.setattr(rho.inspect, "getsourcefile", lambda _: str(edited))
    monkeypatch.setattr(rho.inspect, "getsource", lambda _: "edited")
    assert (rho.code_hash(Config), rho.SOURCES[rho.token_loss]) == before


def test_another_run_is_refused_before_the_corpus_is_scored(cfg, ref, monkeypatch):
    go(cfg, "slm")
    monkeypatch.setattr(rho, "score_batch", None)
    with pytest.raises(InputError, match="slm.pt is another run .--block_size was 64"):
        go(cfg, "slm", block_size=32)


def test_the_oracle_knows_nothing_of_text_for_fine_tuning(cfg):
    go(cfg, "clm")
    with pytest.raises(InputError, match="oracle: of .*sft.bin the truth is not known"):
        go(cfg, "sft", init=f"{cfg.out}/clm.pt", select="oracle")


def test_scores_from_elsewhere_are_another_run(cfg, ref, monkeypatch):
    """A diff that averages two references gives other numbers, under the same file name."""
    go(cfg, "slm")
    real = rho.score_corpus

    def shifted(*args):
        return {k: np.array(v) + np.float16(0.5) for k, v in real(*args).items()}

    monkeypatch.setattr(rho, "score_corpus", shifted)
    with pytest.raises(InputError, match="scores of the reference"):
        go(cfg, "slm")


@pytest.mark.parametrize("weight", ["lm_head.weight", "layers.0.self_attn.q_proj.weight"])
def test_a_run_that_began_with_another_model_is_another_run(cfg, weight):
    """The file that --init names is the same, what is in it is not."""
    go(cfg, "clm")
    start, flags = Path(cfg.out) / "clm.pt", {"name": "on", "init": f"{cfg.out}/clm.pt"}
    go(cfg, "clm", **flags)
    saved = load_checkpoint(start)
    saved["model"][weight] /= 2
    torch.save(saved, start)
    with pytest.raises(InputError, match="first weights"):
        go(cfg, "clm", **flags)


def test_another_number_of_processes_is_another_run(cfg):
    """The top k are taken in each process, so two processes select other tokens than one."""
    go(cfg, "clm")
    process = Process(cfg)
    process.world = 2
    with pytest.raises(InputError, match="number of processes"):
        rho.train_arm(cfg, process, "clm")


def test_of_two_writers_the_second_is_refused(cfg):
    cfg = replace(cfg, name="both")
    with (
        rho.only_writer(Path(cfg.out) / "both.pt"),
        pytest.raises(InputError, match="both.pt is being written by another run"),
    ):
        go(cfg, "clm")
    go(cfg, "clm")  # the lock is gone with its holder


def test_a_signal_saves_after_the_step_and_the_run_resumes(cfg, ref, monkeypatch):
    whole, records = go(cfg, "slm", name="whole")
    real, steps = rho.take_step, []

    def signalled(*args):
        steps.append(1)
        if len(steps) == 5:
            signal.raise_signal(signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(rho, "take_step", signalled)
    with pytest.raises(rho.Interrupted) as stop:
        go(cfg, "slm", name="cut")
    assert stop.value.args == (signal.SIGTERM,)
    assert load_checkpoint(Path(cfg.out) / "cut.pt")["step"] == 5
    resumed, again = go(cfg, "slm", name="cut")
    assert same(whole, resumed)
    assert without_seconds(records)[1:] == without_seconds(again)[1:]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(cfg, monkeypatch):
    real, steps = rho.take_step, []

    def diverges(cfg, process, model, optimizers, step, mask_sum):
        norm = real(cfg, process, model, optimizers, step, mask_sum)
        steps.append(1)
        if len(steps) == 5:
            model.norm.weight.data[0] = torch.nan
        return norm

    monkeypatch.setattr(rho, "take_step", diverges)
    with pytest.raises(InputError, match="clm: the loss is not finite at step 5, windows"):
        go(cfg, "clm")
    saved = load_checkpoint(Path(cfg.out) / "clm.pt")
    assert saved["step"] == 4
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


def test_a_weight_that_is_not_finite_is_never_saved(cfg, monkeypatch):
    real, steps = rho.take_step, []

    def diverges(cfg, process, model, *rest):
        norm = real(cfg, process, model, *rest)
        steps.append(1)
        if len(steps) == 4:  # the step before an evaluation
            model.norm.weight.data[0] = torch.inf
        return norm

    monkeypatch.setattr(rho, "take_step", diverges)
    with pytest.raises(InputError, match="weight is not finite"):
        go(cfg, "clm")
    assert load_checkpoint(Path(cfg.out) / "clm.pt")["step"] == 2


def test_a_reference_with_nan_scores_nothing(cfg, ref):
    path = Path(cfg.out) / "ref.pt"
    saved = load_checkpoint(path)
    saved["model"]["norm.weight"][0] = torch.nan
    torch.save(saved, path)
    with pytest.raises(InputError, match="ref.pt: its ref_loss is not finite"):
        go(cfg, "slm")


@pytest.mark.parametrize("size", [0, 100])
def test_a_short_score_file_is_refused(cfg, ref, size):
    """It would be extended with zeros, which count as scores."""
    go(cfg, "slm")
    path = next(Path(cfg.out, "scores").rglob("*.f16"))
    os.truncate(path, size)
    with pytest.raises(InputError, match=f"ref_loss.f16 has {size} bytes"):
        go(cfg, "slm", name="again")


def test_a_flipped_bit_in_the_scores_is_found(cfg, ref):
    go(cfg, "slm")
    path = next(Path(cfg.out, "scores").rglob("*.f16"))
    content = bytearray(path.read_bytes())
    content[1001] ^= 4
    path.write_bytes(content)
    with pytest.raises(InputError, match="ref_loss.f16 is damaged"):
        go(cfg, "slm", name="again")


def test_the_log_says_what_was_run_and_what_came_of_it(cfg, ref):
    _, records = go(cfg, "slm", select="random")
    first, last = records[0], records[-1]
    assert first["run"] == "slm-random" and first["config"]["ratio"] == 0.6
    assert {"commit", "torch", "device", "params", "threads"} <= set(first)
    assert [r["step"] for r in records[1:]] == [2, 4, 6, 8, 10]
    assert last["selected_loss"] == pytest.approx(last["student_loss"], rel=0.05)
    assert last["trained"] == 10 * round(0.6 * 256) == 1540
    assert last["questions"] == 3 and 0 <= last["right"] <= 3
    assert last["val_loss"] > 0 and last["val_corpus_loss"] > 0


def test_the_log_counts_the_seconds_of_all_steps_since_the_start(cfg, monkeypatch):
    """By a clock on which each look takes a second: so does each step."""
    ticks = itertools.count()
    monkeypatch.setattr(rho, "time", SimpleNamespace(time=lambda: next(ticks)))
    _, records = go(cfg, "clm")
    assert [record["seconds"] for record in records[1:]] == [2, 4, 6, 8, 10]
    answering = sum(record["eval_seconds"] for record in records[1:])
    assert answering >= 5 and rho.total_seconds(records) == 10 + answering


def notes(cfg, name):
    return [note for note in rho.table_notes(rho.read_runs(cfg.out)) if note.startswith(f"{name} ")]


def finished_at(name, cfg, right, before):
    """A log in which a run answers `right` of 10 at two evaluations."""
    identity = {"text": "train.bin"}
    config = {"seed": 1}
    header = {"config": config, "identity": identity, "steps": 2, "step": 0}
    records = [header | {"models_before": before}]
    for step, answers in enumerate(right, start=1):
        records.append({"step": step, "tokens": 100 * step, "right": answers, "questions": 10})
    Path(cfg.out).mkdir(exist_ok=True)
    rho.save_log(Path(cfg.out, f"{name}.pt"), records)


@pytest.mark.parametrize(
    "clm_before, slm_before, cost",
    [
        ({}, {}, ""),
        ({}, {"ref.pt": 50}, ", 50 of its reference not counted"),
        ({}, {"hub": None}, ", those of its reference not counted"),
        ({"ref.pt": 50}, {"ref.pt": 50}, ""),  # both began with it
        ({"base.pt": 7}, {"base.pt": 7, "ref.pt": 50}, ", 50 of its reference not counted"),
    ],
)
def test_the_note_counts_what_clm_did_not_need(cfg, clm_before, slm_before, cost):
    finished_at("clm", cfg, [1, 2], clm_before)
    finished_at("slm", cfg, [3, 4], slm_before)
    note = "slm is at clm's final accuracy after 100 tokens: 2.0 times fewer"
    assert notes(cfg, "slm") == [note + cost]


def in_all(cfg):
    """{run: the cell of the table's column "in all"}."""
    titles, *rows = rho.table_rows(rho.read_runs(cfg.out))
    return {row[0].removesuffix(" *"): row[titles.index("in all")] for row in rows}


def test_the_log_counts_the_reference_and_the_first_model_once_each(cfg):
    """The reference reads 1280 tokens, slm 2560, fine-tuning 768, and the last run 512."""
    cfg = replace(cfg, ref_tokens=1280, sft_tokens=768)
    ref, slm, sft = (f"{cfg.out}/{name}.pt" for name in ("ref", "slm", "sft"))
    logs = [
        go(cfg, "ref"),
        go(cfg, "clm"),
        go(cfg, "slm", select="random"),
        go(cfg, "slm"),
        go(cfg, "slm", name="from-ref", init=ref, reference=ref),
        go(cfg, "sft", init=slm),
        go(cfg, "slm", name="long", init=sft, tokens=512),
        go(cfg, "slm", name="two", init=f"{cfg.out}/clm.pt", tokens=512),
    ]
    assert {records[0]["run"]: records[0]["models_before"] for _, records in logs} == {
        "ref": {},
        "clm": {},
        "slm-random": {},
        "slm": {ref: 1280},
        "from-ref": {ref: 1280},
        "sft": {ref: 1280, slm: 2560},
        "long": {ref: 1280, slm: 2560, sft: 768},
        "two": {ref: 1280, f"{cfg.out}/clm.pt": 2560},
    }
    assert in_all(cfg) == {
        "ref": "1,280",
        "clm": "2,560",
        "slm-random": "2,560",
        "slm": "3,840",
        "from-ref": "3,840",
        "sft": "4,608",
        "long": "5,120",
        "two": "4,352",
    }


def test_a_checkpoint_counts_once_however_its_path_is_written(cfg, ref):
    ref = Path(cfg.out) / "ref.pt"
    go(cfg, "slm", init=str(ref), reference=f"{cfg.out}/./ref.pt")
    go(cfg, "slm", init=str(ref.resolve()), reference=os.path.relpath(ref), name="again")
    assert in_all(cfg)["slm"] == in_all(cfg)["again"] == "5,120"


def test_the_table_says_that_a_reference_was_trained_again_since(cfg):
    go(cfg, "ref")
    go(cfg, "clm")
    go(cfg, "slm")
    go(cfg, "slm", name="on", init=f"{cfg.out}/slm.pt")
    made_with = [note for note in said_by_table(cfg) if "was made with another" in note]
    assert not made_with
    go(cfg, "ref", restart=True, lr=1e-4)
    found = [note for note in said_by_table(cfg) if "was made with another" in note]
    assert found == [
        f"{run} was made with another ref.pt than the one above" for run in ("on", "slm")
    ]


def said_by_table(cfg):
    return sorted(rho.table_notes(rho.read_runs(cfg.out)))


def test_a_reference_that_is_measured_otherwise_is_marked(cfg):
    go(cfg, "ref", tokens=512, lr=1e-3, seed=8)
    go(cfg, "clm")
    assert rho.table_rows(rho.read_runs(cfg.out))[1][0] == "ref"
    go(cfg, "ref", restart=True, eval_windows=1)
    assert rho.table_rows(rho.read_runs(cfg.out))[1][0] == "ref *"
    assert any(note.startswith("* ref cannot be compared") for note in said_by_table(cfg))
    header, *records = rho.read_log(Path(cfg.out) / "ref.jsonl")
    header["config"]["eval_windows"] = cfg.eval_windows
    rho.save_log(Path(cfg.out) / "ref.pt", [header, *records])
    assert rho.table_rows(rho.read_runs(cfg.out))[1][0] == "ref"
    header["identity"]["val.bin"] = "another"
    rho.save_log(Path(cfg.out) / "ref.pt", [header, *records])
    assert rho.table_rows(rho.read_runs(cfg.out))[1][0] == "ref *"


def test_a_reference_of_other_clean_text_is_said(cfg, ref, capsys):
    go(cfg, "slm")
    assert "another ref.bin" not in capsys.readouterr().out
    checkpoint = load_checkpoint(Path(cfg.out) / "ref.pt")
    checkpoint["identity"]["ref.bin"] = "0" * 64
    torch.save(checkpoint, Path(cfg.out) / "other.pt")
    go(cfg, "slm", name="again", reference=f"{cfg.out}/other.pt")
    assert "other.pt was trained with another ref.bin than that of" in capsys.readouterr().out


@pytest.mark.parametrize(
    "stage, flags, says",
    [
        ("slm", {"select": "loss", "threshold": 0.5}, "--ratio 0.6 has no effect: --threshold"),
        ("clm", {}, "--ratio 0.6 has no effect: every token is trained on"),
        ("slm", {"select": "random", "reference": "no.pt"}, "--reference no.pt has no effect"),
        ("ref", {"tokens": 512}, "--tokens 512 has no effect: --stage ref has --ref_tokens"),
    ],
)
def test_a_flag_without_effect_is_said(cfg, capsys, stage, flags, says):
    go(replace(cfg, stage=stage, tokens=1024, ref_tokens=1024), stage, **flags)
    assert says in capsys.readouterr().out
    go(replace(cfg, stage="slm", tokens=1024, ref_tokens=1024, name="slm"), "slm", select="random")
    assert "has no effect" not in capsys.readouterr().out


def test_tokens_that_may_not_be_trained_on_have_no_rank(cfg, tiny_data):
    """Fine-tuning ranks the tokens of answers, whatever the questions' are like."""
    process = Process(cfg)
    windows = rho.Windows(cfg, process.meta, "sft")
    ids = np.arange(4)
    inputs = {"ref_loss": np.random.default_rng(0).random((windows.n, cfg.block_size))}
    *_, valid, _, values = rho.fetch(process, windows, inputs, ids)
    assert 0 < valid.sum() < valid.numel()
    assert values["ref_loss"][~valid].isposinf().all()
    assert values["ref_loss"][valid].isfinite().all()


def test_a_run_that_is_replaced_leaves_no_losses_behind(cfg):
    go(cfg, "clm")
    folder = Path(cfg.out) / "clm"
    before = {path.name for path in folder.glob("*.npy")}
    go(cfg, "clm", restart=True, evals=1, tokens=1024)
    assert len(before) > 1 and len(list(folder.glob("*.npy"))) == 1


def test_the_command_in_a_log_leaves_out_restart(cfg, monkeypatch):
    monkeypatch.setattr(sys, "argv", "rho.py --restart true --stage clm --restart --seed 3".split())
    _, records = go(cfg, "clm")
    assert records[0]["command"] == "python rho.py --stage clm --seed 3"


def test_a_resumed_run_still_counts_its_reference(cfg, ref, monkeypatch):
    def dies(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(rho, "report", dies)
        with pytest.raises(KeyboardInterrupt):
            go(cfg, "slm", save_minutes=1e-9)
    _, records = go(cfg, "slm")
    assert records[0]["models_before"] == {f"{cfg.out}/ref.pt": 2560}
    assert in_all(cfg)["slm"] == "5,120"


def test_mix_is_in_the_default_name(cfg):
    cfg = replace(cfg, mix=0.3)
    for stage, select, name in (
        ("clm", "", "clm-mix"),
        ("slm", "", "slm-mix"),
        ("slm", "excess", "slm-mix"),
        ("slm", "random", "slm-random-mix"),
    ):
        named = rho.arm_config(replace(cfg, select=select), stage)
        assert named.name == name and named.mix == 0.3
    assert rho.arm_config(replace(cfg, name="mine"), "slm").name == "mine"
    assert rho.arm_config(replace(cfg, mix=0.0), "slm").name == "slm"


@pytest.mark.parametrize(
    "flags, then",
    [
        ("--stage ref --block_size 256 --lr 2e-3", "--stage slm --block_size 256 --lr 0.002"),
        ("--stage ref --ratio 0.3 --tied", "--stage slm --tied True"),
        ("--stage ref --name mine", "--stage slm --reference out/demo/mine.pt"),
        ("--stage clm --init base --out o", "--stage slm --out o --init base"),
        ("--stage clm --mix 0.3 --lr 2e-3 --out o", "--stage table --out o"),
        ("--stage score --mix 0.3 --block_size 64", "--stage slm --mix 0.3 --block_size 64"),
        ("--stage slm --select random --block_size 64", "--stage table --out out/demo"),
        ("--stage sft --init x.pt", "--stage table --out out/demo"),
        ("--stage score --reference r.pt", "--stage slm --reference r.pt"),
        ("--stage score --select ref_both", "--stage slm --select ref_both"),
    ],
)
def test_the_next_command_is_of_the_same_experiment(flags, then):
    """With the same model and text: a reference of other windows would score other windows."""
    command = rho.next_command(rho.parse(flags.split()))
    assert command == f"python rho.py {then}"
    assert rho.parse(command.split()[2:])  # it can be typed


def test_the_next_command_of_two_processes_starts_two(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    command = rho.next_command(rho.parse(["--stage", "ref", "--out", "a b"]))
    assert command == "torchrun --nproc_per_node=2 rho.py --stage slm --out 'a b'"


def test_next_is_said_at_the_end(cfg, capsys):
    rho.run_stage(replace(cfg, stage="ref"))
    assert "\nnext: python rho.py --stage slm --data " in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--stage=ref", "--mix=0.3"], "--mix: clean text is mixed into the corpus."),
        (["--stage=sft", "--mix=0.3", "--init=x.pt"], "--mix: clean text is mixed into the corpus"),
        (["--stage=dynamics", "--mix=0.3"], "--mix: clean text is mixed into the corpus."),
        (["--stage=all", "--mix=0.3"], "--mix need a single stage"),
        (["--stage=slm", "--mix=0.95"], "--mix 0.95: must be at most 0.9"),
        (["--stage=slm", "--mix=-0.1"], "--mix -0.1: must be at least 0"),
        (["--stage=slm", "--mix=nan"], "--mix nan: must be a finite number"),
    ],
)
def test_mix_where_it_has_no_meaning_is_refused_in_one_line(cfg, capsys, flags, says):
    with pytest.raises(SystemExit) as end:
        rho.main([f"--data={cfg.data}", f"--out={cfg.out}", "--device=cpu", *flags])
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.startswith("rho.py: ") and says in said and said.count("\n") == 1
    assert not Path(cfg.out).exists()


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--stage=slm --name=clm", "--name clm: is the name of the run of --stage clm"),
        ("--stage=clm --mix=0.3 --name=clm", "--name clm: is the name of the run of --stage clm"),
        ("--stage=clm --name=ref", "--name ref: is the name of the run of --stage ref"),
        ("--stage=clm --name=..", "--name ..: must be a plain name"),
        ("--stage=all --reference=x.pt", "--reference: --stage all trains its own"),
        ("--stage=clm --tokens=1e25", "must be at most"),
        ("--stage=clm --n_embd=2 --n_head=4 --n_kv_head=4", "head_dim even"),
    ],
)
def test_flags_that_would_mislead_are_refused_in_one_line(cfg, capsys, flags, says):
    with pytest.raises(SystemExit) as end:
        rho.main([f"--data={cfg.data}", f"--out={cfg.out}", "--device=cpu", *flags.split()])
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.startswith("rho.py: ") and says in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"
        ),
    ],
)
def test_too_little_memory_is_said_in_one_line(cfg, capsys, monkeypatch, error):
    def fails(cfg):
        raise error

    monkeypatch.setattr(rho, "run_stage", fails)
    with pytest.raises(SystemExit) as end:
        rho.main(["--device=cpu"])
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert "out of memory. Lower --micro_batch" in said and said.count("\n") == 1


@pytest.mark.parametrize("text", ["", "[]\n", "3\n", '{"config": {}}\n7\n'])
def test_a_log_of_something_else_is_called_damaged(cfg, capsys, text):
    go(cfg, "clm")
    log = Path(cfg.out) / "clm.jsonl"
    log.write_text(text)
    for flags in ([f"--data={cfg.data}", "--stage=clm"], ["--stage=table"]):
        with pytest.raises(SystemExit) as end:
            rho.main([f"--out={cfg.out}", "--device=cpu", *flags])
        said = capsys.readouterr().err
        assert end.value.code == 2
        assert f"{log} is damaged. Delete it" in said and said.count("\n") == 1


def test_mix_without_clean_text_names_the_file_that_is_missing(cfg):
    process = Process(cfg)
    del process.meta["tokens"]["ref"]
    cfg = replace(cfg, mix=0.3)
    with pytest.raises(InputError, match="ref.bin is not there: .*--ref"):
        train_arm(cfg, process, "clm")


def test_held_out_loss_is_the_mean_over_tokens(cfg):
    model, records = go(cfg, "clm", eval_windows=10**6)
    windows = Windows(cfg, Process(cfg).meta, "val")
    x, y = windows[np.arange(windows.n)]
    logp = model.head(model(x)).double().log_softmax(-1)
    assert records[-1]["val_loss"] == pytest.approx(
        -logp.gather(-1, y[..., None]).mean().item(), abs=1e-4
    )


def test_training_lowers_the_loss(cfg):
    _, records = go(cfg, "clm", tokens=25600)
    assert records[-1]["val_loss"] < records[1]["val_loss"] - 0.3


def test_starting_from_a_checkpoint_goes_on_from_its_weights(cfg):
    first, records = go(cfg, "clm", tokens=10240)
    init = str(Path(cfg.out) / "clm.pt")
    _, more = go(cfg, "clm", init=init, name="more", lr=1e-6, tokens=256, evals=1)
    assert more[-1]["val_loss"] == pytest.approx(records[-1]["val_loss"], abs=1e-2)


def test_bf16_autocast_trains_as_float32_does(cfg, ref, monkeypatch):
    """What CUDA runs, here on the processor."""
    full, records = go(cfg, "slm")
    real = Process.__init__

    def half(self, cfg):
        real(self, cfg)
        self.dtype = torch.bfloat16

    monkeypatch.setattr(Process, "__init__", half)
    _, halved = go(cfg, "slm", name="half")
    assert halved[-1]["val_loss"] == pytest.approx(records[-1]["val_loss"], abs=0.02)
    assert halved[-1]["val_loss"] != records[-1]["val_loss"]


def test_each_evaluation_keeps_the_loss_of_every_held_out_token(cfg):
    model, records = go(cfg, "clm")
    losses = [np.load(Path(cfg.out) / "clm" / f"{r['step']}.npy") for r in records[1:]]
    assert len(losses) == 5 and all(values.dtype == np.float16 for values in losses)
    means = [values.mean(dtype=float) for values in losses]
    assert means == pytest.approx([r["val_corpus_loss"] for r in records[1:]], abs=2e-3)
    x, y = Windows(cfg, Process(cfg).meta, "val_corpus")[np.arange(4)]
    last = rho.token_loss(model.head(model(x)), y).detach().numpy()
    assert losses[-1] == pytest.approx(last, abs=0.01)


def test_dynamics_goes_on_from_the_trained_model_in_both_arms(cfg, ref):
    cfg = replace(cfg, lr=1e-2, questions=0)
    learned = go(cfg, "clm", tokens=25_600)[1][-1]["val_corpus_loss"]
    rho.run_stage(replace(cfg, stage="dynamics", tokens=16 * 256, lr=1e-3))
    for arm in ("clm", "slm"):
        lines = Path(cfg.out, f"dynamics-{arm}.jsonl").read_text().splitlines()
        header, *records = map(json.loads, lines)
        assert header["config"]["seed"] == cfg.seed + 1  # not the pages of clm in their order
        assert [record["step"] for record in records] == list(range(1, 17))
        assert learned < 4.5 and abs(records[0]["val_corpus_loss"] - learned) < 0.3  # scratch: 5.7
        assert len(list(Path(cfg.out, f"dynamics-{arm}").iterdir())) == 16


# ---- several processes ---------------------------------------------------------------------------


# Each argument is a command line of rho.py; torchrun gives a port to each command.
SEVERAL_COMMANDS = f"""
import os
import shlex
import sys
sys.path.insert(0, {str(Path(rho.__file__).parent)!r})
import rho
port = int(os.environ["MASTER_PORT"])
for number, command in enumerate(sys.argv[1:]):
    os.environ["MASTER_PORT"] = str(port + number)
    rho.main(shlex.split(command))
"""


@pytest.fixture
def two_ranks(cfg, two_processes, tmp_path):
    """two_ranks(commands) starts two gloo processes, as torchrun does, that run rho.py's commands.

    The commands run one after the other, for a process takes seconds to start.
    """
    started = []

    def start(*commands, script=SEVERAL_COMMANDS):
        path = tmp_path / "commands.py"
        path.write_text(script)
        sizes = [f"--{k}={v}" for k, v in {**SMALL, **QUICK, **EVALUATIONS}.items()]
        places = [f"--data={cfg.data}", f"--out={cfg.out}"]
        usual = shlex.join([*sizes, *places])
        command = [sys.executable, str(path), *(f"{usual} {command}" for command in commands)]
        for environment in two_processes(ports=len(commands)):
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            started.append(subprocess.Popen(command, env=environment, **pipes))
        return started[-2:]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_two_processes_train_as_one(cfg, ref, two_ranks):
    """The same global batch: the same losses; the same bytes of scores; rank 0 alone writes."""
    clm, alone = go(cfg, "clm")
    score_corpus(cfg, Process(cfg), Windows(cfg, Process(cfg).meta, "train"))
    scores = next(Path(cfg.out, "scores").rglob("*.f16"))
    expected_scores = scores.read_bytes()
    scores.unlink()
    # Top k within each window (micro-batch of one), so that who holds the window is no matter.
    slm = "--stage=slm --micro_batch=1 --ratio=0.6 --mix=0.3"
    commands = ["--stage=clm --name=two", "--stage=score", f"{slm} --name=two-slm --evals=1"]
    ranks = two_ranks(*(f"{command} --questions=0" for command in commands))
    said, errors = zip(*(p.communicate(timeout=600) for p in ranks), strict=True)
    assert [p.returncode for p in ranks] == [0, 0], errors
    assert said[0] and not said[1]
    two, _ = load_model(Path(cfg.out) / "two.pt")
    assert apart(clm, two, cfg) < 0.02
    lines = (Path(cfg.out) / "two.jsonl").read_text().splitlines()
    # The norm shows a gradient that was averaged over the ranks; the optimizers would not.
    for key in ("student_loss", "grad_norm"):
        of_two = [json.loads(line)[key] for line in lines[1:]]
        assert of_two == pytest.approx([record[key] for record in alone[1:]], rel=1e-3)
    assert scores.read_bytes() == expected_scores

    one, alone = go(cfg, "slm", micro_batch=1, mix=0.3)
    two, checkpoint = load_model(Path(cfg.out, "two-slm.pt"))
    assert apart(one, two, cfg) < 0.02 < 0.2 < apart(clm, two, cfg)
    expected = 12 * 64 + 28 * round(0.6 * 64)  # of 40 windows 12 are clean text
    assert checkpoint["records"][-1]["trained"] == alone[-1]["trained"] == expected


@pytest.mark.parametrize("mix", [0.25, 0.5, 0.6])
def test_mix_gives_each_rank_its_part_of_the_clean_windows(cfg, mix):
    """Every second window to a rank would give all clean ones, at a mix of 0.5, to one of two."""
    ranks = [Process(cfg), Process(cfg)]
    for number, process in enumerate(ranks):
        process.rank, process.world = number, 2
    for step in range(10):
        windows = batch(100, 8, 7, step, mix, 60)
        shares = [process.share(windows) for process in ranks]
        assert np.concatenate(shares).tolist() == windows.tolist()
        clean = [int((share >= 100).sum()) for share in shares]
        assert max(clean) - min(clean) <= 1


def test_a_rank_that_dies_ends_the_job_with_one_line(cfg, two_ranks):
    ranks = two_ranks("--stage=clm --tokens=100000000 --evals=100000")
    while not (Path(cfg.out) / "clm.pt").exists():
        assert ranks[0].poll() is None and ranks[1].poll() is None
        time.sleep(0.01)
    ranks[1].kill()
    _, said = ranks[0].communicate(timeout=600)
    assert ranks[0].returncode == 2
    assert said.count("\n") == 1 and "another process has stopped" in said
    assert load_model(Path(cfg.out) / "clm.pt")


SLOW_SAVING = """
import time
save_run = rho.save_run
def slow(*given):
    time.sleep(2)
    save_run(*given)
rho.save_run = slow
"""


def test_no_rank_leaves_before_rank_0_has_saved(cfg, two_ranks):
    """One that left at once aborted in 1 run of 15: gloo still held the last tensor it summed."""
    slowly = SEVERAL_COMMANDS.replace("import rho\n", f"import rho\n{SLOW_SAVING}")
    ranks = two_ranks("--stage=clm --evals=1", script=slowly)
    _, said = ranks[1].communicate(timeout=600)
    assert ranks[1].returncode == 0, said
    assert load_checkpoint(Path(cfg.out) / "clm.pt")["records"][-1]["step"] == 10


THREADS_AT_THE_END = f"""
import os
import shlex
import sys
import time
from pathlib import Path
sys.path.insert(0, {str(Path(rho.__file__).parent)!r})
import rho
port = int(os.environ["MASTER_PORT"])
for number, command in enumerate(sys.argv[1:]):
    os.environ["MASTER_PORT"] = str(port + number)
    status = 0
    try:
        rho.main(shlex.split(command))
    except SystemExit as end:
        status = end.code
    names = ["gloo"]
    for _ in range(50):  # a thread that has ended stays in the list for a moment
        if any("gloo" in name for name in names):
            time.sleep(0.1)
            names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    print("status", status, "threads:", names, file=sys.stderr)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux names the threads")
def test_no_thread_of_gloo_outlives_main(cfg, ref, two_ranks):
    """One that does aborts the process at its exit, now and then.

    Training imports torch.distributed.nn, whose default arguments kept the group alive.
    """
    slm = "--stage=slm --name=two --evals=1 --questions=0"
    # Once to its end, and once refused.
    for rank in two_ranks(slm, f"{slm} --reference=none.pt", script=THREADS_AT_THE_END):
        _, said = rank.communicate(timeout=600)
        assert rank.returncode == 0, said
        statuses = [line.split()[1] for line in said.splitlines() if line.startswith("status")]
        assert statuses == ["0", "2"] and "gloo" not in said, said


def test_batch_that_cannot_be_shared_out_is_refused(cfg):
    with pytest.raises(InputError, match="--batch_size 5: not a multiple of 2"):
        check_config(replace(cfg, stage="clm", batch_size=5), world=2)


# ---- the changes of results/variants, which the README invites to try ----------------------------

VARIANTS = sorted(Path(rho.__file__).parent.glob("results/variants/*.diff"))


@pytest.fixture
def changed(tmp_path, monkeypatch):
    """changed(name): rho.py as a module with results/variants/NAME.diff applied."""

    def load(name):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(rho.__file__, folder)
        diff = next(path for path in VARIANTS if path.stem == name)
        subprocess.run(["git", "apply", str(diff)], cwd=folder, check=True)
        spec = importlib.util.spec_from_file_location(f"rho_{name}", folder / "rho.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


def variant(module, cfg, **changes):
    cfg = module.Config(**vars(replace(cfg, **{"select": "excess", **changes})))
    return module.train_arm(cfg, module.Process(cfg), "slm")


# The flags that a change is for. Two references, where it takes two: ref and other.
VARIANT_FLAGS = {
    "distilled": {"fast": False},
    "easy": {"select": "loss"},
    "fixed": {"select": "ref_loss"},
    "tanh": {"select": "loss"},
}


@pytest.mark.parametrize("name", [path.stem for path in VARIANTS])
def test_variants_train_and_are_not_the_rule_itself(cfg, ref, changed, name):
    flags = VARIANT_FLAGS.get(name, {})
    plain = go(cfg, "slm", name="plain", **flags)[1][-1]
    if name in ("fixed", "halves"):
        go(cfg, "ref", name="other", seed=2)
        flags = {**flags, "reference": f"{cfg.out}/ref.pt,{cfg.out}/other.pt"}
    look = variant(changed(name), cfg, name=name, **flags)[-1]
    assert np.isfinite(look["val_loss"]) and look["tokens"] == plain["tokens"]
    alike = look["val_loss"] == plain["val_loss"]
    assert alike == (name == "averaged")  # one reference, averaged, is that reference


def test_variant_of_two_references_is_the_mean_of_both(cfg, ref, changed):
    """With the same reference twice the scores stay; with two they are the mean."""
    go(cfg, "ref", name="other", seed=2)
    module, paths = changed("averaged"), [f"{cfg.out}/{name}.pt" for name in ("ref", "other")]
    windows, seen = Windows(cfg, Process(cfg).meta, "train"), []
    known = [
        score_corpus(replace(cfg, reference=p), Process(cfg), windows)["ref_loss"] for p in paths
    ]
    rule = module.score_tokens
    monitor = lambda *a, ref_loss, **k: seen.append(ref_loss) or rule(*a, ref_loss=ref_loss, **k)  # noqa: E731
    module.score_tokens = monitor
    variant(module, cfg, name="both", reference=",".join(paths))
    first = batch(windows.n, cfg.batch_size, cfg.seed, 0)
    mean = torch.from_numpy((known[0][first].astype(float) + known[1][first]) / 2)
    torch.testing.assert_close(seen[0].double(), mean, atol=0.01, rtol=0)
    assert np.abs(known[0][first] - known[1][first]).max() > 0.1


def test_variant_falling_trains_on_what_its_line_says(cfg, ref, changed):
    trained = variant(changed("falling"), cfg, ratio=0.3)[-1]["trained"]
    n = cfg.batch_size * cfg.block_size
    assert trained == sum(round((1 - 0.7 * step / cfg.steps) * n) for step in range(cfg.steps))


def test_variants_of_the_score_by_hand(changed):
    """Excess 3, 1, -4 and 2; the third token is beyond the reference, the last too, but less."""
    student, known = torch.tensor([[3.5, 1.2, 1.0, 4.0]]), torch.tensor([[0.5, 0.2, 5.0, 2.0]])
    orders = {"absolute": [2, 0, 3, 1], "sure": [0, 1, 2, 3]}
    for name, order in orders.items():
        score = changed(name).score_tokens("excess", student, known)[0]
        assert score.argsort(descending=True, stable=True).tolist() == order, name
        assert torch.isinf(score).tolist() == [False, False, name == "sure", name == "sure"]
