"""Faster versions of plain functions. Each has the plain function's result, and a test compares.

Each saves at least 3% of a step on a GPU, measured alone (bench/README.md). Skip this at first.
"""

from functools import cache

import torch
import torch.nn.functional as F

LOGITS = {"cpu": 2**23, "cuda": 2**28}  # vocabulary logits that live at a time


def precise(x):
    """float32. float64 stays float64."""
    return x if x.dtype == torch.float64 else x.float()


def chunks(hidden_states, vocab_size):
    """Slices of hidden_states [N, hidden_size] whose logits may live together."""
    size = max(1, LOGITS[hidden_states.device.type] // vocab_size)
    return [slice(i, i + size) for i in range(0, len(hidden_states), size)]


def zero_some(x, p):
    """x with each element zero with probability p: dropout without the factor 1 / (1 - p).

    A GPU hashes the element's index. PyTorch's random numbers take longer than all else there.
    """
    if not (p and x.is_cuda):
        return F.dropout(x, p) * (1 - p) if p else x
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

    Two products would write and read a wide result twice, so they are joined: [x low] [W B]^T.
    """
    if x.is_cuda and len(W) > W.shape[1]:
        return JoinedProduct.apply(x, low, W, B, bias)
    return (precise(F.linear(x, W, bias)) + precise(F.linear(low, B))).to(x.dtype)


class JoinedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, low, W, B, bias):
        ctx.save_for_backward(low, W, B)
        return F.linear(torch.cat([x, low], -1), torch.cat([W, B], -1), bias)

    @staticmethod
    def backward(ctx, grad):
        low, W, B = ctx.saved_tensors
        grad_x, grad_low = (grad @ torch.cat([W, B], -1)).split([W.shape[1], B.shape[1]], -1)
        return grad_x, grad_low, None, grad.T @ low, None


def kl_divergence(hidden_states, head, probs, ids, weights):
    """sum_n weights_n KL(alpha_n || q_n), q = softmax of the logits hidden_states [n, d] @ head^T.

    alpha is (probs [n, k], ids [n, k]); ids None: probs [n, V]. Logits live for one chunk at a
    time. The gradient is taken in forward, so that backward need not make them again.
    """
    return KLDivergence.apply(hidden_states, head, precise(probs), ids, weights)


class KLDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, head, probs, ids, weights):
        total, head = precise(h.new_zeros(())), head.to(h.dtype)
        learns = ctx.needs_input_grad
        grads = [torch.zeros_like(x) if need else None for x, need in zip((h, head), learns)]
        function = compiled(loss_and_gradient) if h.is_cuda else loss_and_gradient
        for part in chunks(h, len(head)):
            alpha = probs[part], None if ids is None else ids[part], weights[part]
            loss, grad = function(h[part] @ head.T, *alpha)
            total += loss
            if learns[0]:
                grads[0][part] = grad @ head
            if learns[1]:
                grads[1] += grad.T @ h[part]
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx, grad):
        return *(None if x is None else grad * x for x in ctx.saved_tensors), None, None, None


def loss_and_gradient(logits, probs, ids, weights):
    """sum_n weights_n KL(alpha_n || softmax(logits_n)), and its gradient in the logits [n, V]."""
    x, weights = precise(logits), weights[:, None]
    lse = x.logsumexp(-1, keepdim=True)
    log_q = (x if ids is None else x.gather(-1, ids)) - lse
    loss = (weights * (torch.xlogy(probs, probs) - probs * log_q)).sum()
    mass = weights * probs.sum(-1, keepdim=True)
    at_ids = (mass * log_q.exp() - weights * probs).to(logits.dtype)
    if ids is None:
        return loss, at_ids
    return loss, ((x - lse).exp() * mass).to(logits.dtype).scatter_(-1, ids, at_ids)


@cache
def compiled(function):
    return torch.compile(function, dynamic=True)


def recorded(run):
    """The replay of `run`, which works on fixed memory, as a CUDA graph. Calls it three times."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles, and lets libraries allocate what they keep
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
