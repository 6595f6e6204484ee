"""The four functions that are the paper, against independent oracles; each known trap by name."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import rho
from rho import NEEDS, score_tokens, select_tokens, selective_loss, token_loss


def quotient(student_loss, mask):
    """Equation 3: the numerator over the denominator."""
    loss_sum, mask_sum = selective_loss(student_loss, mask)
    return loss_sum / mask_sum


def by_hand(logits, targets, ref_loss, ratio):
    """The paper's loss in plain Python: of lists, by loops and math.log."""
    losses = []
    for i, row in enumerate(logits):
        losses.append(math.log(sum(math.exp(z) for z in row)) - row[targets[i]])
    excess = [loss - ref_loss[i] for i, loss in enumerate(losses)]
    order = sorted(range(len(losses)), key=lambda i: -excess[i])
    kept = order[: round(ratio * len(losses))]
    return losses, sorted(kept), sum(losses[i] for i in kept) / len(kept)


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.6, 1.0])
def test_the_loss_equals_a_plain_python_loop(ratio):
    logits = torch.randn(3, 8, 11, dtype=torch.float64) * 3
    targets = torch.randint(11, (3, 8))
    ref_loss = torch.rand(3, 8) * 4
    student_loss = token_loss(logits, targets)
    mask = select_tokens(score_tokens("excess", student_loss, ref_loss), ratio)
    flat = logits.flatten(0, 1).tolist(), targets.flatten().tolist(), ref_loss.flatten().tolist()
    losses, kept, expected = by_hand(*flat, ratio)
    assert student_loss.flatten().tolist() == pytest.approx(losses, abs=1e-5)
    assert mask.flatten().nonzero().flatten().tolist() == kept
    assert quotient(student_loss, mask).item() == pytest.approx(expected, abs=1e-5)


def test_hand_worked_example():
    """Six tokens; the excess is 1, -2, 0.5, 3, 0, -1; half of them are kept: 3, 1 and 0.5."""
    student_loss = torch.tensor([[2.0, 1.0, 1.5], [4.0, 2.0, 0.0]])
    ref_loss = torch.tensor([[1.0, 3.0, 1.0], [1.0, 2.0, 1.0]])
    mask = select_tokens(score_tokens("excess", student_loss, ref_loss), ratio=0.5)
    assert mask.tolist() == [[True, False, True], [True, False, False]]
    loss_sum, mask_sum = selective_loss(student_loss, mask)
    assert loss_sum == 2 + 1.5 + 4 and mask_sum == 3


def test_soft_weights_give_the_weighted_mean():
    weights = torch.tensor([[0.1, 0.0, 0.3]])  # they sum to less than one token
    loss = quotient(torch.tensor([[1.0, 2.0, 4.0]]), weights)
    assert loss.item() == pytest.approx(1.3 / 0.4)


@pytest.mark.parametrize(
    "mask", [torch.ones(2), torch.tensor([[1, -0.1]]), torch.tensor([[1, torch.nan]])]
)
def test_what_is_no_mask_is_refused(mask):
    with pytest.raises(ValueError, match="mask"):
        selective_loss(torch.ones(1, 2), mask)


# ---- the rules -----------------------------------------------------------------------------------


def test_each_rule_ranks_as_it_says():
    student, ref, entropy = torch.tensor([[3.0, 1.0], [0.5, 0.1], [2.0, 1.0]])
    assert score_tokens("excess", student, ref).tolist() == pytest.approx([2.5, 0.9])
    assert score_tokens("loss", student).tolist() == [3.0, 1.0]
    assert score_tokens("ref_loss", student, ref).tolist() == pytest.approx([-0.5, -0.1])
    assert score_tokens("ref_entropy", student, ref, entropy).tolist() == [-2.0, -1.0]
    assert score_tokens("all", student).tolist() == [0.0, 0.0]


def test_random_scores_follow_their_generator():
    scores = []
    for seed in (1, 1, 2):
        generator = torch.Generator().manual_seed(seed)
        scores.append(score_tokens("random", torch.ones(2, 3), generator=generator))
    assert scores[0].equal(scores[1]) and not scores[0].equal(scores[2])
    assert scores[0].unique().numel() == 6


def test_a_rule_without_a_branch_raises():
    with pytest.raises(ValueError, match="no such rule"):
        score_tokens("excess ", *torch.rand(3, 2, 3))


@pytest.mark.parametrize("select", NEEDS)
def test_a_rule_needs_what_is_said_and_lets_no_gradient_through(select):
    """Also the trap: a gradient through the score."""
    student_loss = torch.rand(2, 3, requires_grad=True)
    known = {name: torch.rand(2, 3) for name in NEEDS[select]}
    score = score_tokens(select, student_loss, **known)
    assert score.shape == (2, 3) and not score.requires_grad
    for name in known:
        with pytest.raises((TypeError, AttributeError)):
            score_tokens(select, student_loss, **known | {name: None})


def test_ref_both_selects_what_both_rules_select():
    """The paper's intersection: the k tokens of ref_both are in the top m of either rule, and m is
    the smallest size at which the two tops share as many."""
    student, ref, entropy = torch.rand(3, 4, 25)
    both = select_tokens(score_tokens("ref_both", student, ref, entropy), 0.5)
    for m in range(50, 101):
        easy = select_tokens(score_tokens("ref_loss", student, ref), m / 100)
        sure = select_tokens(score_tokens("ref_entropy", student, ref_entropy=entropy), m / 100)
        if (easy & sure).sum() >= 50:
            break
    assert 50 < m < 100 and both.sum() == 50
    assert (easy & sure)[both].all()


# ---- the selection -------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 6), st.integers(1, 40), st.floats(0.01, 1), st.integers(0, 2**31), st.booleans()
)
def test_exactly_k_are_selected_even_among_ties(B, T, ratio, seed, ties):
    torch.manual_seed(seed)
    score = torch.randint(3, (B, T)).float() if ties else torch.randn(B, T)
    valid = torch.rand(B, T) < 0.7
    mask = select_tokens(score, ratio, valid=valid)
    rest = valid & ~mask
    assert mask.sum() == round(ratio * int(valid.sum())) and not (mask & ~valid).any()
    if mask.any() and rest.any():
        assert score[mask].min() >= score[rest].max()


def test_threshold_selects_all_above_and_only_those():
    score = torch.tensor([[0.5, 0.1, -3.0, 0.11, 0.9]])
    valid = torch.tensor([[True, True, True, True, False]])
    mask = select_tokens(score, threshold=0.1, valid=valid)
    assert mask.tolist() == [[True, False, False, True, False]]


@pytest.mark.parametrize("how", [{"ratio": 1.0}, {"threshold": -5.0}])
def test_a_score_of_minus_infinity_is_never_selected(how):
    """What a rule excludes stays out, also where the ratio asks for more than is left."""
    score = torch.tensor([[1.0, -torch.inf, 2.0]])
    assert select_tokens(score, **how).tolist() == [[True, False, True]]


def test_scores_may_be_integers():
    assert select_tokens(torch.tensor([[3, 1, 2]]), ratio=2 / 3).tolist() == [[True, False, True]]


@pytest.mark.parametrize("how", [{"ratio": 0.5}, {"threshold": 0.0}])
def test_scores_that_are_nan_or_of_another_shape_raise(how):
    with pytest.raises(ValueError, match="NaN"):
        select_tokens(torch.tensor([[1.0, torch.nan]]), **how)
    with pytest.raises(ValueError, match="scores"):
        # One score a position would be repeated in every window, silently.
        select_tokens(torch.rand(4), **how, valid=torch.ones(2, 4, dtype=torch.bool))


# ---- the traps of other people's attempts, each by name ------------------------------------------


def test_trap_labels_shifted_twice_or_not_at_all(tmp_path):
    """A model that surely predicts `next = token + 1` has loss 0 on our windows, and only there."""
    np.arange(30, dtype=np.uint16).tofile(tmp_path / "train.bin")
    cfg = rho.Config(data=str(tmp_path), block_size=7)
    meta = {"dtype": "uint16", "tokens": {"train": 30}}
    inputs, targets, valid = rho.open_windows(cfg, meta, "train")
    assert targets.flatten().tolist() == [*range(1, 29)]  # every token a target, exactly once
    x, y = [rho.take(array, range(4), cfg) for array in (inputs, targets)]
    assert token_loss(50.0 * F.one_hot(x + 1, 40).float(), y).max() < 1e-6
    assert valid.all() and valid.shape == inputs.shape == (4, 7)


def test_trap_absolute_value_or_softmax_of_the_excess():
    """Signed: a token that the student knows far better than the reference comes last."""
    student, ref = torch.tensor([0.1, 1.0, 1.0]), torch.tensor([9.0, 0.9, 1.0])
    score = score_tokens("excess", student, ref)
    assert score.argsort(descending=True).tolist() == [1, 2, 0]
    torch.testing.assert_close(score, torch.tensor([-8.9, 0.1, 0.0]))  # in nats, no softmax


def test_trap_mask_inverted():
    """The token that only the reference knows is trained on, noise and the learned are not."""
    student, ref = torch.tensor([[5.0, 5.0, 0.1]]), torch.tensor([[0.2, 5.0, 0.1]])
    mask = select_tokens(score_tokens("excess", student, ref), ratio=1 / 3)
    assert mask.tolist() == [[True, False, False]]


def test_trap_raw_logits_for_log_probabilities():
    """Losses are those of a distribution."""
    logits = torch.randn(1, 5, 7)
    every = torch.stack([token_loss(logits, torch.full((1, 5), v)) for v in range(7)])
    torch.testing.assert_close(every.neg().exp().sum(0), torch.ones(1, 5))


def test_trap_ignored_targets_counted_into_k():
    score, valid = torch.arange(10.0)[None], torch.tensor([[True] * 4 + [False] * 6])
    mask = select_tokens(score, ratio=0.5, valid=valid)
    assert mask.sum() == 2 and mask[0, 2:4].all()


def test_unselected_tokens_give_no_gradient():
    student_loss = torch.rand(4, 5, requires_grad=True)
    mask = select_tokens(score_tokens("excess", student_loss, torch.rand(4, 5)), ratio=0.4)
    quotient(student_loss, mask).backward()
    assert student_loss.grad.equal(mask / 8)
    # The trap of a NaN when nothing is selected: the numerator's gradient is 0.
    student_loss.grad = None
    loss_sum, mask_sum = selective_loss(student_loss, torch.zeros(4, 5, dtype=torch.bool))
    loss_sum.backward()
    assert loss_sum == mask_sum == student_loss.grad.count_nonzero() == 0


def test_import_has_no_side_effects(tmp_path):
    environment = {"PYTHONPATH": str(Path(rho.__file__).parent)}
    command = [sys.executable, "-c", "import rho; print(rho.__name__)"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert (done.stdout, done.stderr) == (b"rho\n", b"") and not list(tmp_path.iterdir())
