import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gubs.ufm import loss as module
from gubs.ufm.loss import Denominators, k3, policy_loss, step_means, token_logprobs

VOCAB, DIM, LONGEST = 11, 5, 7
LENGTHS = [1, 7, 3, 0, 5, 2, 6, 1, 4, 7, 2, 3]
"""Response lengths of the step's sequences; one is empty."""


def step_batch(seed=0):
    """Features, tokens, mask, advantages and the other models' log-probs of one optimiser step, float64."""
    g = torch.Generator().manual_seed(seed)
    n = len(LENGTHS)
    mask = torch.arange(LONGEST)[None] < torch.tensor(LENGTHS)[:, None]
    noise = [torch.randn(n, LONGEST, generator=g, dtype=torch.float64) for _ in range(3)]
    return {
        "x": torch.randn(n, LONGEST, DIM, generator=g, dtype=torch.float64),
        "ids": torch.randint(VOCAB, (n, LONGEST), generator=g),
        "mask": mask,
        "advantage": torch.randn(n, generator=g, dtype=torch.float64),
        "old": -2.4 + 0.2 * noise[0],
        "ref": -2.4 + 0.2 * noise[1],
        "rollout": -2.4 + 0.4 * noise[2],
    }


def model():
    torch.manual_seed(1)
    return torch.nn.Linear(DIM, VOCAB, dtype=torch.float64)


def loss_of(net, b, denominators, level, **rest):
    logp = token_logprobs(net(b["x"]), b["ids"])
    kept = {"beta": 0.04, "clip": 0.2, "rollout_logp": b["rollout"], **rest}
    return policy_loss(
        logp, b["old"], b["ref"], b["advantage"], b["mask"], denominators=denominators, level=level, **kept
    )


def rows(b, index):
    return {name: value[index] for name, value in b.items()}


def split(ranks, micro):
    """The step's rows, dealt to ranks and cut into micro-batches of unlike sizes."""
    parts = []
    for rank in range(ranks):
        own = torch.arange(len(LENGTHS))[rank::ranks]
        edges = [0, *[1 + 2 * i for i in range(micro - 1)], len(own)]
        parts.append([own[a:b] for a, b in itertools.pairwise(edges)])
    return parts


def train_once(ranks, micro, level, naive=False):
    """One SGD step; each rank adds its micro-batches up and the ranks' gradients are averaged as DeepSpeed does."""
    b, net = step_batch(), model()
    whole = Denominators.of(b["mask"])
    totals = [torch.zeros_like(p) for p in net.parameters()]
    value, sums = 0.0, {}
    for rank_rows in split(ranks, micro):
        net.zero_grad()
        for index in rank_rows:
            part = rows(b, index)
            denominators = Denominators.of(part["mask"]) if naive else whole
            loss, s = loss_of(net, part, denominators, level)
            factor = 1 / micro if naive else ranks  # times what the runtime will divide by
            (loss * factor).backward()
            value += loss.item() * factor / ranks
            sums = {k: sums.get(k, 0) + v for k, v in s.items()}
        totals = [t + p.grad / ranks for t, p in zip(totals, net.parameters(), strict=True)]
    weights = [p.detach() - 0.1 * t for p, t in zip(net.parameters(), totals, strict=True)]
    return value, totals, weights, step_means(sums)


@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("micro", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_micro_batches_and_ranks_equal_one_batch(ranks, micro, level):
    """Wrong here: the number of GPUs or of accumulation steps changes what is learned."""
    one, many = train_once(1, 1, level), train_once(ranks, micro, level)
    assert many[0] == pytest.approx(one[0], rel=1e-12)
    for a, b in zip(one[1] + one[2], many[1] + many[2], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-15)
    assert many[3] == pytest.approx(one[3], rel=1e-12), "logged means too"


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_the_naive_mean_is_wrong(level):
    """Means of micro-batches, averaged: another gradient. If it were the same, the test above would prove nothing."""
    one, naive = train_once(1, 1, level), train_once(2, 3, level, naive=True)
    gap = (naive[1][0] - one[1][0]).norm() / one[1][0].norm()
    assert gap > 0.1


def test_value_by_hand():
    """Two sequences of 2 and 1 tokens. Wrong here: sign, KL's place or the levels' denominators."""
    logp = torch.log(torch.tensor([[0.5, 0.2], [0.4, 0.9]]))
    old = torch.log(torch.tensor([[0.25, 0.4], [0.4, 0.1]]))
    ref = torch.log(torch.tensor([[0.5, 0.4], [0.8, 0.1]]))
    mask = torch.tensor([[1, 1], [1, 0]])
    advantage = torch.tensor([1.0, -2.0])
    # ratios 2, .5 | 1; k3: d = 0, ln 2 | ln 2 -> 0, 1 - ln 2 = .306853 | .306853
    # per token -ratio A + .04 k3: -2, -.5 + .012274 | 2 + .012274
    common = {"denominators": Denominators.of(mask), "beta": 0.04}
    sequence, sums = policy_loss(logp, old, ref, advantage, mask, **common)
    assert sequence.item() == pytest.approx(((-2 - 0.487726) / 2 + 2.012274) / 2, abs=1e-6)
    token, _ = policy_loss(logp, old, ref, advantage, mask, level="token", **common)
    assert token.item() == pytest.approx((-2 - 0.487726 + 2.012274) / 3, abs=1e-6)
    assert sums["tokens"] == 3
    assert sums["samples"] == 2
    means = step_means(sums)
    assert means["ratio"] == pytest.approx(3.5 / 3)
    assert means["kl"] == pytest.approx(2 * 0.306853 / 3, abs=1e-6)
    # clip .2: with A 1 the ratio 2 counts 1.2, .5 stays .5 (the pessimistic one); the second sequence's ratio is 1
    clipped, sums = policy_loss(logp, old, ref, advantage, mask, clip=0.2, **common)
    assert clipped.item() == pytest.approx(((-1.2 - 0.487726) / 2 + 2.012274) / 2, abs=1e-6)
    assert step_means(sums)["clipped"] == pytest.approx(1 / 3)


def test_health_at_step_0():
    """Equal log-probs: ratio exactly 1, KL exactly 0, and the gradient is the policy gradient A * grad logp."""
    b, net = step_batch(), model()
    logp = token_logprobs(net(b["x"]), b["ids"])
    whole = Denominators.of(b["mask"])
    same = logp.detach()
    loss, sums = policy_loss(
        logp, None, same, b["advantage"], b["mask"], denominators=whole, beta=0.04, rollout_logp=same
    )
    means = step_means(sums)
    assert means == {"ratio": 1, "kl": 0, "kl_old": 0, "clipped": 0, "mismatch": 1, "drift": 0, "capped": 0}
    (got,) = torch.autograd.grad(loss, logp, retain_graph=True)
    lengths = torch.tensor(LENGTHS).clamp(min=1)
    expected = torch.where(b["mask"], -b["advantage"][:, None] / lengths[:, None] / 11, 0.0)
    torch.testing.assert_close(got, expected)
    assert whole == Denominators(samples=11, tokens=sum(LENGTHS)), "the empty sequence is no sample"


def test_truncated_importance_weights():
    """exp(old - rollout) = 4, .5, capped at 2. Wrong here: the engines' mismatch is not corrected, or unbounded."""
    old = torch.zeros(1, 2)
    logp = old.clone().requires_grad_()
    rollout = torch.log(torch.tensor([[0.25, 2.0]])).requires_grad_()
    mask, advantage = torch.ones(1, 2), torch.tensor([1.0])
    common = {"denominators": Denominators(1, 2), "beta": 0.0, "level": "token"}
    loss, sums = policy_loss(logp, old, None, advantage, mask, rollout_logp=rollout, **common)
    assert loss.item() == pytest.approx(-(2 + 0.5) / 2)
    loss.backward()
    assert logp.grad[0].tolist() == pytest.approx([-1, -0.25])
    assert rollout.grad is None, "weights are constants"
    assert step_means(sums)["mismatch"] == pytest.approx((4 + 2) / 2)
    assert step_means(sums)["drift"] == pytest.approx((4 - 1 - math.log(4) + 0.5 - 1 + math.log(2)) / 2)
    assert step_means(sums)["capped"] == 0.5
    tighter, _ = policy_loss(logp, old, None, advantage, mask, rollout_logp=rollout, tis_cap=1.0, **common)
    assert tighter.item() == pytest.approx(-(1 + 0.5) / 2)
    watched, sums = policy_loss(logp, old, None, advantage, mask, rollout_logp=rollout, tis_cap=0.0, **common)
    assert watched.item() == -1
    assert step_means(sums)["mismatch"] == pytest.approx((4 + 2) / 2), "not corrected, but seen"
    off, sums = policy_loss(logp, old, None, advantage, mask, **common)
    assert off.item() == -1
    assert "mismatch" not in sums


def test_old_and_reference_get_no_gradient():
    b, net = step_batch(), model()
    others = {k: b[k].clone().requires_grad_() for k in ("old", "ref", "rollout", "advantage")}
    loss, _ = loss_of(net, b | others, Denominators.of(b["mask"]), "sequence")
    loss.backward()
    assert all(t.grad is None for t in others.values())


@settings(max_examples=50, deadline=None)
@given(st.floats(-8, 0), st.floats(-8, 0))
def test_k3_and_its_gradient(logp, ref):
    """Never negative, 0 where equal, gradient 1 - exp(ref - logp). Wrong here: the KL pulls the wrong way."""
    x = torch.tensor(logp, dtype=torch.float64, requires_grad=True)
    y = torch.tensor(ref, dtype=torch.float64)
    value = k3(x, y)
    value.backward()
    assert value.item() >= 0
    assert value.item() == pytest.approx((y - x).exp().item() - (ref - logp) - 1, abs=1e-9)
    assert x.grad.item() == pytest.approx(1 - (y - x).exp().item(), abs=1e-9)


def test_k3_of_near_equals_is_not_noise():
    """exp(d) - d - 1 in float32 rounds to 0 or to below it; d^2 / 2 is right."""
    d = k3(torch.tensor([-1.0]), torch.tensor([-1.0 + 1e-3]))
    assert d.item() == pytest.approx(0.5e-6, rel=0.02)


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_empty_responses_and_rubbish_in_the_padding(level):
    """Wrong here: one empty answer, or what stands behind an answer, turns the weights into NaN."""
    b, net = step_batch(), model()
    whole = Denominators.of(b["mask"])
    clean, clean_sums = loss_of(net, b, whole, level)
    rubbish = dict(b)
    for name, bad in (("old", -torch.inf), ("ref", torch.nan), ("rollout", torch.inf)):
        rubbish[name] = torch.where(b["mask"], b[name], bad)
    dirty, dirty_sums = loss_of(net, rubbish, whole, level)
    assert dirty.item() == clean.item()
    assert dirty_sums == clean_sums
    dirty.backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_a_micro_batch_without_responses_still_has_a_backward_pass():
    """Wrong here: one rank has no graph to run backward on and the others wait for it for ever."""
    b, net = rows(step_batch(), [3]), model()
    loss, sums = loss_of(net, b, Denominators(5, 30), "sequence")
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in net.parameters())
    assert sums["tokens"] == 0
    assert step_means(sums) == {}


def test_what_cannot_be_right_is_refused():
    b, net = step_batch(), model()
    whole = Denominators.of(b["mask"])
    with pytest.raises(ValueError, match="skip it"):
        loss_of(net, b, Denominators(0, 0), "sequence")
    with pytest.raises(ValueError, match="unknown level"):
        loss_of(net, b, whole, "tokens")
    with pytest.raises(ValueError, match="beta"):
        loss_of(net, b | {"ref": None}, whole, "token")
    with pytest.raises(ValueError, match="rollout_logp"):
        loss_of(net, b | {"rollout": b["rollout"][:, :1]}, whole, "token")
    with pytest.raises(ValueError, match="advantage"):
        loss_of(net, b | {"advantage": b["advantage"][:, None]}, whole, "token")
    with pytest.raises(ValueError, match="fit ids"):
        token_logprobs(torch.zeros(2, 3, 4), torch.zeros(2, 2, dtype=torch.long))


@pytest.mark.parametrize("chunk", [1, 3 * 4 * VOCAB, 2**20])
def test_token_logprobs_equal_log_softmax(chunk, monkeypatch):
    """Values and gradients, with chunks that do and do not divide the rows."""
    monkeypatch.setattr(module, "_CHUNK_BYTES", chunk)
    torch.manual_seed(0)
    logits = (5 * torch.randn(3, 5, VOCAB, dtype=torch.float64)).requires_grad_()
    ids = torch.randint(VOCAB, (3, 5))
    expected = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(token_logprobs(logits, ids), expected)
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, ids), (logits,))
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x[:, 1:], ids[:, 1:]), (logits,)), "a slice in the middle"


def test_token_logprobs_are_stable_and_wide():
    """Wrong here: bf16 log-probs (steps of 1/16 at -10) make the ratio noise, or a large logit overflows."""
    huge = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    assert token_logprobs(huge, torch.tensor([0])).tolist() == [0]
    assert token_logprobs(huge, torch.tensor([1])).tolist() == [-1e4]
    torch.manual_seed(0)
    narrow = (4 * torch.randn(6, 50)).bfloat16().requires_grad_()
    ids = torch.randint(50, (6,))
    got = token_logprobs(narrow, ids)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, narrow.float().log_softmax(-1).gather(-1, ids[:, None])[:, 0])
    got.sum().backward()
    assert narrow.grad.dtype == torch.bfloat16
    masked = torch.tensor([[0.0, -torch.inf, 0.0]], requires_grad=True)
    token_logprobs(masked, torch.tensor([0])).sum().backward()
    assert masked.grad.isfinite().all(), "a forbidden token has no gradient"


def test_token_logprobs_of_nothing():
    assert token_logprobs(torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0)
