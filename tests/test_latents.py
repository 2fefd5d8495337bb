"""Superposition, losses and noise against float64 references and the oracle."""

import pytest
import torch
import torch.nn.functional as F

import latents
from lib import fast
import oracle


@pytest.mark.parametrize("k", [0, 1, 3, 10])
def test_superposition(k):
    torch.manual_seed(k)
    h, E = torch.randn(7, 16), torch.randn(50, 16)
    probs, ids = latents.induce(h, E, k)
    z = latents.superpose(probs, ids, E)
    alpha, top, expected = oracle.superposition(h, E, k)
    assert ids.shape[1] == 0 or (ids == top).all()
    torch.testing.assert_close(probs.double(), alpha, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(z.double(), expected, atol=1e-5, rtol=1e-5)
    again, _ = latents.top_probs(h @ E.T, k)
    torch.testing.assert_close(again, probs)


def test_top_k_of_everything_is_the_full_softmax():
    torch.manual_seed(0)
    h, E = torch.randn(5, 8, dtype=torch.float64), torch.randn(20, 8, dtype=torch.float64)
    full = latents.superpose(*latents.induce(h, E, 0), E)
    torch.testing.assert_close(
        latents.superpose(*latents.induce(h, E, 20), E), full, atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("k", [0, 3])
def test_gradients(k, monkeypatch):
    torch.manual_seed(1)
    h, W = (
        torch.randn(4, 5, dtype=torch.float64, requires_grad=True),
        torch.randn(9, 5, dtype=torch.float64, requires_grad=True),
    )
    E = W.detach().clone()
    labels = torch.tensor([0, 8, 3, 3])
    probs, ids = oracle.superposition(torch.randn(4, 5), E, k)[:2]
    ids, weights = (ids[:, :0] if k == 0 else ids), torch.rand(4, dtype=torch.float64)
    monkeypatch.setattr(fast, "MAX_LOGITS", 3 * 9)
    assert torch.autograd.gradcheck(lambda h: latents.superpose(*latents.induce(h, E, k), E), h)
    assert torch.autograd.gradcheck(lambda h, W: latents.cross_entropy(h, W, labels), (h, W))
    assert torch.autograd.gradcheck(
        lambda h, W: latents.kl_divergence(h, W, probs, ids, weights), (h, W)
    )


def test_losses_in_chunks(monkeypatch):
    monkeypatch.setattr(fast, "MAX_LOGITS", 4 * 30)
    torch.manual_seed(2)
    h, W, labels = torch.randn(11, 6), torch.randn(30, 6), torch.randint(30, (11,))
    logits = h.double() @ W.double().T
    assert float(latents.cross_entropy(h, W, labels)) == pytest.approx(
        float(F.cross_entropy(logits, labels, reduction="sum")), rel=1e-5
    )
    probs, ids = latents.top_probs(torch.randn(11, 30), 5)
    weights, log_q = torch.rand(11), logits.log_softmax(-1)
    expected = sum(
        w * sum(p * (p.log() - log_q[n, i]) for p, i in zip(probs[n].double(), ids[n]))
        for n, w in enumerate(weights.double())
    )
    assert float(latents.kl_divergence(h, W, probs, ids, weights)) == pytest.approx(
        float(expected), rel=1e-5
    )


def test_kl_takes_zero_probabilities():
    probs = torch.tensor([[1.0, 0.0]])
    loss = latents.kl_divergence(
        torch.zeros(1, 2), torch.zeros(3, 2), probs, torch.tensor([[0, 1]]), torch.ones(1)
    )
    assert float(loss) == pytest.approx(torch.tensor(3.0).log().item())


def test_noise():
    """The noise is clamped. A latent that would have the forbidden token on top keeps its alpha."""
    torch.manual_seed(3)
    probs, ids = (
        torch.tensor([0.4, 0.35, 0.25]).repeat(4000, 1),
        torch.tensor([7, 8, 9]).expand(4000, 3),
    )
    noisy = latents.add_noise(probs, ids, latents.gumbel_like(probs), 8, 1.0, 1.0)
    torch.testing.assert_close(noisy.sum(-1), torch.ones(4000))
    kept = (noisy == probs).all(-1)
    assert not (noisy.argmax(-1) == 1).any() and (noisy.argmax(-1) == 2).any()
    assert 0.2 < kept.float().mean() < 0.5
    moved = (noisy / probs).log()
    assert float((moved.max(-1).values - moved.min(-1).values).max()) <= 4.5 + 1e-4
    # Without a forbidden token the log-ratio of two entries moves by the difference of two Gumbels:
    # logistic, median 0.
    free = latents.add_noise(probs, ids, latents.gumbel_like(probs), 0, 1.0, 1.0)
    difference = (free[:, 0] / free[:, 1]).log() - (probs[:, 0] / probs[:, 1]).log()
    assert abs(float(difference.median())) < 0.15 and 1.0 < float(difference.std()) < 2.0
    g = torch.randn(5, 3)
    by_hand = ((probs[:5].log() + (0.5 * g).clamp(-1.5, 3)) / 2).softmax(-1)
    torch.testing.assert_close(
        latents.add_noise(probs[:5], torch.empty(5, 0, dtype=torch.long), g, 99, 0.5, 2.0), by_hand
    )
    sure = torch.tensor([[0.0, 1.0]])
    noisy = latents.add_noise(sure, torch.tensor([[7, 8]]), latents.gumbel_like(sure), 8, 1.0, 1.0)
    assert torch.equal(noisy, sure)


def test_alpha_is_float32():
    assert latents.top_probs(torch.randn(2, 5).bfloat16(), 3)[0].dtype == torch.float32
