"""The four functions that are the paper, against independent oracles; each known trap by name."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import rho
from model import GPT, GPTConfig
from rho import HeadLoss, score_tokens, select_tokens, selective_loss, token_loss


def by_hand(student_logits, ref_loss, targets, ratio):
    """The paper's loss in plain Python: lists, loops, math.log; of torch only the numbers."""
    losses = []
    for row, target in zip(student_logits, targets, strict=True):
        top = max(row)
        losses.append(math.log(sum(math.exp(z - top) for z in row)) + top - row[target])
    excess = [s - r for s, r in zip(losses, ref_loss, strict=True)]
    order = sorted(range(len(losses)), key=lambda i: -excess[i])
    kept = set(order[: round(ratio * len(losses))])
    return losses, kept, sum(losses[i] for i in kept) / max(1, len(kept))


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.6, 1.0])
def test_the_loss_equals_a_plain_python_loop(ratio):
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 8, 11, dtype=torch.float64) * 3, torch.randint(11, (3, 8))
    ref_loss = torch.rand(3, 8, dtype=torch.float64) * 4
    student_loss = token_loss(logits, targets)
    mask = select_tokens(score_tokens("excess", student_loss, ref_loss), ratio)
    losses, kept, expected = by_hand(
        logits.flatten(0, 1).tolist(),
        ref_loss.flatten().tolist(),
        targets.flatten().tolist(),
        ratio,
    )
    assert student_loss.flatten().tolist() == pytest.approx(losses, abs=1e-5)
    assert set(mask.flatten().nonzero()[:, 0].tolist()) == kept
    assert selective_loss(student_loss, mask).item() == pytest.approx(expected, abs=1e-5)


def test_hand_worked_example():
    """Six tokens; the excess is 1, -2, 0.5, 3, 0, -1; half of them are kept: 3, 1 and 0.5."""
    student_loss = torch.tensor([[2.0, 1.0, 1.5], [4.0, 2.0, 0.0]])
    ref_loss = torch.tensor([[1.0, 3.0, 1.0], [1.0, 2.0, 1.0]])
    mask = select_tokens(score_tokens("excess", student_loss, ref_loss), ratio=0.5)
    assert mask.tolist() == [[True, False, True], [True, False, False]]
    assert selective_loss(student_loss, mask).item() == pytest.approx((2 + 1.5 + 4) / 3)


def test_each_rule_ranks_as_it_says():
    student, ref, entropy = (
        torch.tensor([3.0, 1.0]),
        torch.tensor([0.5, 0.1]),
        torch.tensor([2.0, 1]),
    )
    assert score_tokens("excess", student, ref).tolist() == pytest.approx([2.5, 0.9])
    assert score_tokens("loss", student).tolist() == [3.0, 1.0]
    assert score_tokens("ref_loss", student, ref).tolist() == pytest.approx([-0.5, -0.1])
    assert score_tokens("ref_entropy", student, ref, entropy).tolist() == [-2.0, -1.0]
    once = score_tokens("random", student, generator=torch.Generator().manual_seed(1))
    again = score_tokens("random", student, generator=torch.Generator().manual_seed(1))
    assert once.equal(again) and once[0] != once[1]
    for select in ("excess", "ref_loss", "ref_entropy", "ref_both", "nonsense"):
        with pytest.raises(ValueError, match=select):
            score_tokens(select, student)
    with pytest.raises(ValueError, match="ref_both"):
        score_tokens("ref_both", student, ref_entropy=entropy)


def test_ref_both_selects_what_both_rules_select():
    """The paper's intersection: the k tokens of ref_both are in the top m of either rule, and m is
    the smallest size at which the two tops share as many."""
    torch.manual_seed(0)
    student, ref, entropy = torch.rand(3, 4, 25)
    both = select_tokens(score_tokens("ref_both", student, ref, entropy), 0.5)
    sizes = []
    for m in range(1, 101):
        rules = ("ref_loss", "ref_entropy")
        tops = [select_tokens(score_tokens(r, student, ref, entropy), m / 100) for r in rules]
        if (tops[0] & tops[1]).sum() >= 50:
            sizes.append(m)
            assert not (both & ~(tops[0] & tops[1])).any()
    assert 50 < sizes[0] < 100 and both.sum() == 50


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 40), st.floats(0.01, 1), st.integers(0, 2**31), st.booleans()
)
def test_exactly_k_are_selected_even_among_ties(B, T, ratio, seed, ties):
    torch.manual_seed(seed)
    score = torch.randint(3, (B, T)).float() if ties else torch.randn(B, T)
    valid = torch.rand(B, T) < 0.7
    for v in (None, valid):
        mask = select_tokens(score, ratio, valid=v)
        n = B * T if v is None else int(v.sum())
        assert mask.sum() == round(ratio * n)
        allowed = torch.ones_like(mask) if v is None else v
        assert not (mask & ~allowed).any()
        if mask.any() and (allowed & ~mask).any():
            assert score[mask].min() >= score[allowed & ~mask].max()


def test_threshold_selects_all_above_and_only_those():
    score = torch.tensor([[0.5, 0.1, -3.0, 0.11]])
    assert select_tokens(score, threshold=0.1).tolist() == [[True, False, False, True]]
    valid = torch.tensor([[False, True, True, True]])
    assert select_tokens(score, threshold=0.1, valid=valid).tolist() == [
        [False, False, False, True]
    ]
    for both in ({}, {"ratio": 0.5, "threshold": 0.1}):
        with pytest.raises(ValueError, match="one of them"):
            select_tokens(score, **both)


# ---- the traps of other people's attempts, each by name ------------------------------------------


def test_trap_labels_shifted_twice_or_not_at_all():
    """A model that surely predicts `next = token + 1` has loss 0 on our windows, and only there."""
    tokens = torch.arange(9)[None]  # (1, T + 1)
    x, y = tokens[:, :-1], tokens[:, 1:]  # what Windows gives
    logits = 50.0 * F.one_hot(x + 1, 10).float()
    assert token_loss(logits, y).max() < 1e-6
    assert token_loss(logits[:, :-1], y[:, 1:]).min() > 10  # shifted twice
    assert token_loss(logits, x).min() > 10  # not at all


def test_trap_windows_are_shifted_once(tmp_path):
    np.arange(30, dtype=np.uint16).tofile(tmp_path / "train.bin")
    windows = rho.Windows(
        rho.Config(data=str(tmp_path), block_size=7),
        {"dtype": "uint16", "tokens": {"train": 30}},
        "train",
    )
    assert windows.n == 4
    x, y = windows[[0, 3]]
    assert x.tolist() == [[*range(0, 7)], [*range(21, 28)]]
    assert y.equal(x + 1)
    targets = torch.cat([windows[[w]][1].flatten() for w in range(4)])
    assert targets.tolist() == list(range(1, 29))  # every token a target, exactly once


def test_trap_excess_of_zero_when_the_reference_is_the_student():
    """With a real reference the excess is not zero, and the rule is not the rule of any other."""
    torch.manual_seed(0)
    models = [
        GPT(GPTConfig(vocab_size=50, n_layer=1, n_embd=16, n_head=2, n_kv_head=2)) for _ in "ab"
    ]
    x, y = torch.randint(50, (2, 4, 20))
    student, ref = (token_loss(m.head(m(x)), y).detach() for m in models)
    assert (student - ref).abs().mean() > 1e-3
    kept = {s: select_tokens(score_tokens(s, student, ref), 0.5) for s in ("excess", "loss")}
    assert not kept["excess"].equal(kept["loss"])
    itself = score_tokens("excess", student, student)
    assert itself.abs().max() == 0  # this is what a reference equal to the student gives: no signal


def test_trap_absolute_value_or_softmax_of_the_excess():
    """Signed: a token that the student knows far better than the reference comes last."""
    student, ref = torch.tensor([0.1, 1.0, 1.0]), torch.tensor([9.0, 0.9, 1.0])
    assert score_tokens("excess", student, ref).argsort(descending=True).tolist() == [1, 2, 0]


def test_trap_raw_logits_for_log_probabilities():
    """A constant added to the logits changes no loss; and losses are those of a distribution."""
    torch.manual_seed(0)
    logits = torch.randn(1, 5, 7)
    every = torch.stack([token_loss(logits, torch.full((1, 5), v)) for v in range(7)])
    assert every.neg().exp().sum(0).tolist() == [pytest.approx([1.0] * 5, abs=1e-5)]
    y = torch.randint(7, (1, 5))
    assert token_loss(logits + 100, y).allclose(token_loss(logits, y), atol=1e-4)


def test_trap_mask_is_not_an_attention_mask():
    """The whole sequence stays the input: an unselected token still shapes what follows it."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50, n_layer=2, n_embd=16, n_head=2, n_kv_head=2))
    x, y = torch.randint(50, (2, 1, 12))
    other = x.clone()
    other[0, 3] = (x[0, 3] + 1) % 50
    only_last = torch.zeros(1, 12, dtype=torch.bool).index_fill(1, torch.tensor([11]), True)
    losses = [selective_loss(token_loss(model.head(model(t)), y), only_last) for t in (x, other)]
    assert losses[0] != losses[1]


def test_trap_ignored_targets_counted_into_k():
    score, valid = torch.arange(10.0)[None], torch.tensor([[True] * 4 + [False] * 6])
    mask = select_tokens(score, ratio=0.5, valid=valid)
    assert mask.sum() == 2 and mask[0, 2:4].all()


def test_trap_nan_when_nothing_is_selected():
    student_loss = torch.rand(2, 3, requires_grad=True)
    loss = selective_loss(student_loss, torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and student_loss.grad.abs().sum() == 0
    assert select_tokens(torch.rand(2, 3), ratio=0.01).sum() == 0
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    nothing = lambda s: torch.zeros_like(s, dtype=torch.bool)  # noqa: E731
    loss, _, _ = HeadLoss.apply(hidden, weight, torch.randint(9, (6,)), nothing)
    loss.backward()
    assert loss == 0 and hidden.grad.abs().sum() == 0 and weight.grad.abs().sum() == 0


def test_trap_gradient_through_the_score():
    student_loss = torch.rand(2, 3, requires_grad=True)
    for select in list(rho.RULES)[:4]:
        score = score_tokens(select, student_loss, torch.rand(2, 3), torch.rand(2, 3))
        assert not score.requires_grad


def test_trap_mean_of_means_under_accumulation():
    """The sum of sums over the sum of counts is the mean; the mean of parts' means is not."""
    loss = torch.tensor([1.0, 2.0, 3.0, 10.0])
    parts = [
        (loss[:3], torch.ones(3, dtype=torch.bool)),
        (loss[3:], torch.ones(1, dtype=torch.bool)),
    ]
    means = sum(selective_loss(*p) for p in parts) / 2
    exact = sum((part * m).sum() for part, m in parts) / sum(m.sum() for _, m in parts)
    assert exact == selective_loss(loss, torch.ones(4, dtype=torch.bool)) != means


# ---- the fast twin -------------------------------------------------------------------------------


def pick(rule, ref_loss, **how):
    return lambda student_loss: select_tokens(score_tokens(rule, student_loss, ref_loss), **how)


@pytest.mark.parametrize(
    "how", [{"ratio": 1.0}, {"ratio": 0.6}, {"ratio": 0.05}, {"threshold": 0.3}]
)
@pytest.mark.parametrize("block", [2**22, 40 * 7, 1])  # vocabulary in one, by sevens, one by one
@pytest.mark.parametrize("keep", [2**28, 0])  # logits kept for the gradient, or computed again
@pytest.mark.parametrize("told", [True, False])  # how many will be selected
def test_fast_twin_equals_the_definition(how, block, keep, told, monkeypatch):
    """Loss, mask and both gradients against float64 autograd through the plain masked form."""
    monkeypatch.setattr(rho, "BLOCK", {True: block})
    monkeypatch.setattr(rho, "KEEP", keep)
    torch.manual_seed(0)
    N, C, vocabulary = 40, 6, 37
    hidden, weight = torch.randn(N, C).double(), torch.randn(vocabulary, C).double() / 2
    targets, ref_loss = torch.randint(vocabulary, (N,)), 6 * torch.rand(N)
    choose = pick("excess", ref_loss, **how)
    plain = [t.clone().requires_grad_() for t in (hidden, weight)]
    student_loss = F.cross_entropy(plain[0] @ plain[1].T, targets, reduction="none")
    mask = choose(student_loss)
    expected = selective_loss(student_loss, mask)
    expected.backward()
    fast = [t.float().requires_grad_() for t in (hidden, weight)]
    k = round(how["ratio"] * N) if told and "ratio" in how else None
    total, losses, fast_mask = HeadLoss.apply(*fast, targets, choose, k)
    (total / fast_mask.sum()).backward()
    assert fast_mask.equal(mask) and 0 < mask.sum() <= N
    assert losses.double().allclose(student_loss, atol=1e-5)
    assert (total / mask.sum()).item() == pytest.approx(expected.item(), abs=1e-5)
    for f, p in zip(fast, plain, strict=True):
        assert f.grad.double().allclose(p.grad, atol=1e-6)
        assert f.grad.abs().max() > 1e-3


def test_fast_twin_in_bf16_is_close():
    """The path of a GPU, on a processor: products in bf16, losses in float32."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 16), torch.randn(37, 16) / 4
    targets, mask = torch.randint(37, (50,)), torch.rand(50) < 0.6
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        h, w = (t.clone().requires_grad_() for t in (hidden, weight))
        total, losses, _ = HeadLoss.apply(h.to(dtype), w, targets, lambda _: mask)
        total.backward()
        assert losses.dtype == w.grad.dtype == h.grad.dtype == torch.float32
        grads.append((total.detach()[None], losses, h.grad, w.grad))
    for full, half in zip(*grads, strict=True):
        assert 0 < (full - half).norm() < 0.01 * full.norm()


def test_fast_twin_in_bf16_keeps_the_small_gradient_of_a_learned_token():
    """softmax minus one-hot is formed in float32: in bf16, 0.999 is 1 and the difference 0."""
    weight = torch.eye(4, requires_grad=True)
    hidden = torch.tensor([[8.0, 0, 0, 0]], requires_grad=True)
    all_of_it = lambda s: torch.ones_like(s, dtype=torch.bool)  # noqa: E731
    total, _, _ = HeadLoss.apply(hidden.bfloat16(), weight, torch.tensor([0]), all_of_it, 1)
    total.backward()
    expected = torch.tensor([8.0, 0, 0, 0]).softmax(-1)[0].item() - 1
    assert hidden.grad[0, 0].item() == pytest.approx(expected, rel=0.01)
    assert weight.grad[0, 0].item() == pytest.approx(8 * expected, rel=0.01)


def test_gradient_equals_finite_differences():
    """d(selective loss)/d(parameter) of a whole tiny GPT, the mask held fixed, in float64."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=13, block_size=6, n_layer=1, n_head=2, n_kv_head=1, n_embd=8))
    model = model.double()
    x, y = torch.randint(13, (2, 2, 6))
    mask = select_tokens(score_tokens("excess", torch.rand(2, 6), torch.rand(2, 6)), ratio=0.5)

    def loss():
        logp = model.head(model(x)).log_softmax(-1)  # float64; token_loss itself works in float32
        return selective_loss(-logp.gather(-1, y[..., None])[..., 0], mask)

    loss().backward()
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        i = int(torch.randint(p.numel(), (1,), generator=generator))
        with torch.no_grad():
            flat, step = p.view(-1), 1e-5
            flat[i] += step
            up = loss().item()
            flat[i] -= 2 * step
            down = loss().item()
            flat[i] += step
        assert p.grad.view(-1)[i].item() == pytest.approx((up - down) / (2 * step), abs=1e-7)


def test_unselected_tokens_give_no_gradient():
    torch.manual_seed(0)
    hidden = torch.randn(20, 4, requires_grad=True)
    weight, targets = torch.randn(9, 4, requires_grad=True), torch.randint(9, (20,))
    choose = pick("excess", torch.rand(20), ratio=0.4)
    total, _, mask = HeadLoss.apply(hidden, weight, targets, choose)
    total.backward()
    assert (hidden.grad.abs().sum(1) > 0).equal(mask)


# ---- token dynamics ------------------------------------------------------------------------------


def test_token_dynamics_equal_a_line_fitted_by_hand():
    """Least squares from its textbook formula, token by token, in plain Python."""
    rng = np.random.default_rng(0)
    start, drift = rng.uniform(0, 5, 300), rng.uniform(-1, 1, 300)
    losses = start + np.linspace(0, 1, 16)[:, None] * drift + rng.normal(0, 0.2, (16, 300))
    losses = losses.astype(np.float16)
    found = rho.token_dynamics(losses)
    mean_last = sum(map(float, losses[-1])) / 300
    for token, kind in zip(losses.astype(float).T.tolist(), found, strict=True):
        mean = sum(token) / 16
        slope = sum((x - 7.5) * (y - mean) for x, y in enumerate(token))
        change = 15 * slope / sum((x - 7.5) ** 2 for x in range(16))
        flat = "L->L" if token[-1] <= mean_last else "H->H"
        assert kind == ("L->H" if change > 0.2 else "H->L" if change < -0.2 else flat)
    assert set(found) == {"H->H", "L->H", "H->L", "L->L"}


def test_token_dynamics_by_hand():
    losses = np.array([[4, 1, 3, 0.1], [4, 1.5, 2, 0.2], [4, 2, 1, 0.1]])
    assert rho.token_dynamics(losses).tolist() == ["H->H", "L->H", "H->L", "L->L"]


def test_import_has_no_side_effects(tmp_path):
    import subprocess
    import sys

    code = "import rho, os; assert not os.listdir('.'); print(rho.selective_loss.__module__)"
    root = str(rho.Path(rho.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": root}, capture_output=True
    )
    assert done.stdout == b"rho\n" and done.stderr == b""
