"""Faster versions of plain functions. Each has the plain function's result, and a test compares.

What each saves on a GPU was measured alone (bench/README.md). Skip this at first: `kl_of_logits`
is the plain loss.
"""

from functools import cache, partial

import torch
import torch.nn.functional as F

MAX_LOGITS = 2**26  # vocabulary logits that live at a time


def precise(x):
    """float32. float64 stays float64."""
    return x if x.dtype == torch.float64 else x.float()


def zero_some(x, p):
    """x with each element zero with probability p: dropout without the factor 1 / (1 - p).

    Hashes the element's index: faster than PyTorch's random numbers.
    """
    if not p:
        return x
    seed = torch.randint(2**31 - 1, (), device=x.device).int()
    index = torch.arange(x.numel(), dtype=torch.int32, device=x.device)
    return x.masked_fill(random_bits(index, seed).view(x.shape) < round((p - 0.5) * 2**32), 0)


def random_bits(index, seed):
    """Well-mixed int32 numbers from int32 indices and a seed."""
    for multiplier in (0x7FEB352D, 0x2C1B3C6D, 0x297A2D39):
        index = (index ^ (index >> 16 & 0xFFFF)) * multiplier ^ seed
    return index ^ (index >> 16 & 0xFFFF)


def add_low_rank(x, low, W, B, bias):
    """x W^T + low B^T + bias, for a frozen W [out, in] and a B [out, rank] that learns.

    A wide result comes from one product [x low] [W B]^T: two would write and read it twice.
    """
    if len(W) <= W.shape[1]:
        return (precise(F.linear(x, W, bias)) + precise(F.linear(low, B))).to(x.dtype)
    joined = F.linear(torch.cat([x, low], -1), torch.cat([W, B.detach()], -1), bias)
    return GradientOfB.apply(joined, low, B)


class GradientOfB(torch.autograd.Function):
    """Returns y, and gives B [out, rank] the gradient of low B^T. Autograd would also make W's."""

    @staticmethod
    def forward(ctx, y, low, B):
        ctx.save_for_backward(low)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, grad.T @ ctx.saved_tensors[0]


def kl_of_logits(logits, probs, ids, weights):
    """KLDivergence, a float32 scalar, for logits [n, V]; probs, ids [n, k] and weights [n]."""
    x = precise(logits)
    log_q = (x.gather(-1, ids) if ids.shape[1] else x) - x.logsumexp(-1, keepdim=True)
    return (weights[:, None] * (torch.xlogy(probs, probs) - probs * log_q)).sum()


gradient_and_kl = torch.func.grad_and_value(kl_of_logits)
compiled = cache(partial(torch.compile, dynamic=True))


class KLDivergence(torch.autograd.Function):
    """sum_n weights_n KL(alpha_n || q_n), q = softmax of the logits hidden_states [n, d] @ head^T.

    alpha is (probs [n, k], ids [n, k]); ids [n, 0]: probs [n, V]. Logits live for one chunk at a
    time. The gradient is taken in forward, so that backward need not make them again.
    """

    @staticmethod
    def forward(ctx, h, head, probs, ids, weights):
        total, grads_h = 0.0, []
        head = head.to(h.dtype)
        grad_head = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        function = compiled(gradient_and_kl) if h.is_cuda else gradient_and_kl
        tensors = h, precise(probs), ids, weights
        for part, *alpha in zip(*(x.split(MAX_LOGITS // len(head)) for x in tensors)):
            grad, loss = function(part @ head.T, *alpha)
            total += loss
            grads_h.append(grad @ head)
            if grad_head is not None:
                grad_head += grad.T @ part
        ctx.save_for_backward(torch.cat(grads_h), grad_head)
        return total

    @staticmethod
    def backward(ctx, grad):
        grad_h, grad_head = ctx.saved_tensors
        return grad * grad_h, None if grad_head is None else grad * grad_head, None, None, None


kl_divergence = KLDivergence.apply


def recorded(run):
    """The replay of `run`, which works on fixed memory, as a CUDA graph. Calls it three times."""
    run()  # compiles
    run()  # lets libraries allocate what they keep
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
