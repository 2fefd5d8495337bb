"""The faster versions against the plain functions. What only a GPU runs is forced here, or is in test_gpu.py."""

import pytest
import torch
import torch.nn.functional as F

from lib import fast


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU, so that a CPU takes the GPU's way."""

    is_cuda = True


def on_gpu(x):
    return x.as_subclass(OnGPU)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
def test_zero_some(p):
    """Both ways: the right share, independent of the draw before and of the elements beside; the rest unchanged."""
    x = torch.ones(1000, 700)
    torch.manual_seed(0)
    for way in (x, on_gpu(x)):
        drawn = [torch.Tensor(fast.zero_some(way, p)) for _ in range(3)]
        assert all(
            set(d.unique().tolist()) <= {0.0, 1.0} or torch.allclose(d[d > 0], torch.ones(()))
            for d in drawn
        )
        drawn = [d.flatten() == 0 for d in drawn]
        pairs = (
            (drawn[0], drawn[1]),
            (drawn[0], drawn[2]),
            (drawn[1][:-1], drawn[1][1:]),
            (drawn[2][:-700], drawn[2][700:]),
        )
        for a, b in pairs:
            assert float(a.float().mean()) == pytest.approx(p, abs=3e-3)
            assert float((a & b).float().mean()) == pytest.approx(p * p, abs=3e-3)
    index = torch.arange(700_000, dtype=torch.int32)
    assert all(
        len(fast.random_bits(index, torch.tensor(s, dtype=torch.int32)).unique()) == len(index)
        for s in (3, 4, 123456789)
    )


@pytest.mark.parametrize("out", [5, 30])
@pytest.mark.parametrize("bias", [True, False])
def test_add_low_rank(out, bias):
    torch.manual_seed(out)
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    x, low, B, W = make(7, 12), make(7, 4), make(out, 4), torch.randn(out, 12, dtype=torch.float64)
    b = torch.randn(out, dtype=torch.float64) if bias else None
    plain = F.linear(x, W, b) + F.linear(low, B)
    weights = torch.randn(7, out, dtype=torch.float64)
    expected = torch.autograd.grad((plain * weights).sum(), (x, low, B))
    ours = fast.add_low_rank(x, low, W, B, b)
    torch.testing.assert_close(ours, plain)
    for a, e in zip(torch.autograd.grad((ours * weights).sum(), (x, low, B)), expected):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("full", [True, False])
def test_kl_divergence(full, monkeypatch):
    """In chunks, with its own gradients, against torch's functions on all logits."""
    monkeypatch.setattr(fast, "MAX_LOGITS", 4 * 30)
    torch.manual_seed(2)
    h, W = (torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (11, 30))
    alpha = torch.randn(11, 30, dtype=torch.float64).softmax(-1)
    probs, ids = (alpha, torch.empty(11, 0, dtype=torch.long)) if full else alpha.topk(5)
    weights = torch.rand(11, dtype=torch.float64)
    log_q = (h @ W.T).log_softmax(-1)
    log_q = log_q if full else log_q.gather(-1, ids)
    plain = (weights[:, None] * (torch.xlogy(probs, probs) - probs * log_q)).sum()
    ours = fast.kl_divergence(h, W, probs, ids, weights)
    torch.testing.assert_close(ours, plain)
    for a, b in zip(torch.autograd.grad(ours, (h, W)), torch.autograd.grad(plain, (h, W))):
        torch.testing.assert_close(a, b)
