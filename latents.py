"""Latent tokens as arithmetic: superposition, the losses, and noise. See docs/METHOD.md.

A latent's distribution `alpha` is held as (probs, ids): probabilities float [N, k] and the tokens they belong to int [N, k];
ids is None where alpha covers the full vocabulary (k = 0) and probs is [N, V]. With k = HIDDEN, the ablation, a latent is no
distribution but the last hidden state itself: ids is None and probs is [N, hidden_size].
"""

import torch

from runs import fused

LOGITS = {"cpu": 2**23, "cuda": 2**28}  # how many vocabulary logits live at a time: few stay in a cache, many fill a GPU

HIDDEN = -1
GROUP = 128  # vocabulary logits whose maximum is looked at first where the k largest are searched
FEW = 16  # so many maxima are taken one after the other in compiled code


def precise(x: torch.Tensor) -> torch.Tensor:
    """float32, or float64 where it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def _chunks(hidden_states: torch.Tensor, vocab_size: int) -> list[slice]:
    """Slices of the rows [N], all about as long, whose logits may live together."""
    N = len(hidden_states)
    count = -(-N * vocab_size // LOGITS[hidden_states.device.type])
    return [slice(N * i // count, N * (i + 1) // count) for i in range(count)]


def largest(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row of x [N, V], the largest first, and where they are; both [N, k].

    Faster than topk, which reads x several times: they all lie in the k groups of columns that have the largest maxima, or among
    the columns left over.
    """
    V, groups = x.shape[1], x.shape[1] // GROUP
    top = _maxima if torch.compiler.is_compiling() and k <= FEW else torch.topk
    if groups <= k:
        return top(x, k)
    best = top(x[:, :groups * GROUP].unflatten(1, (groups, GROUP)).amax(-1), k)[1]
    columns = (best[:, :, None] * GROUP + torch.arange(GROUP, device=x.device)).flatten(1)
    columns = torch.cat([columns, torch.arange(groups * GROUP, V, device=x.device).expand(len(x), -1)], dim=1)
    values, places = top(x.gather(1, columns), k)
    return values, columns.gather(1, places)


def _maxima(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """topk of few columns, one maximum after the other: compiled, a single small kernel."""
    columns, found = torch.arange(x.shape[1], device=x.device), []
    for _ in range(k):
        found.append(x.max(-1))
        x = x.masked_fill(columns == found[-1].indices[:, None], -torch.inf)
    return tuple(torch.stack(both, dim=-1) for both in zip(*found))


def top_probs(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """alpha of logits [N, V]: softmax in float32 over the k largest, the most likely first; k = 0 keeps all."""
    if k == 0:
        return precise(logits).softmax(-1), None
    top, ids = largest(precise(logits), k)
    return top.softmax(-1), ids


def superpose(probs: torch.Tensor, ids: torch.Tensor | None, embedding: torch.Tensor) -> torch.Tensor:
    """z = sum_v alpha_v e_v, [N, hidden_size], from the embedding matrix [V, hidden_size]."""
    if ids is None:
        return probs.to(embedding.dtype) @ embedding
    return torch.einsum("nk,nkd->nd", probs.to(embedding.dtype), embedding[ids])


def embed(probs, ids, embedding: torch.Tensor, k: int) -> torch.Tensor:
    """What is fed for a latent, [N, hidden_size]: its superposition, or with k = HIDDEN the hidden state that it is."""
    return probs if k == HIDDEN else superpose(probs, ids, embedding)


def induce(hidden_states: torch.Tensor, embedding: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """alpha of the encoder's hidden states [N, hidden_size] at the latent queries: softmax over the k largest of h E^T.

    Differentiable in the hidden states. The full logits serve only to find the k ids; they are not kept for backward.
    """
    if k == HIDDEN:
        return precise(hidden_states), None
    if k == 0:
        return top_probs(hidden_states @ embedding.T, 0)
    with torch.no_grad():
        ids = torch.cat([largest(hidden_states[part] @ embedding.T, k)[1]
                         for part in _chunks(hidden_states, len(embedding))])
    logits = (precise(hidden_states)[:, None] * precise(embedding[ids])).sum(-1)  # float32 whatever the model's dtype
    return logits.softmax(-1), ids


def _loss_and_gradient(logits, probs, ids, weights):
    """Of one chunk: sum_n weights_n KL(probs_n || softmax(logits_n)), and its gradient in the logits, in their dtype and place."""
    x, weights = precise(logits), weights[:, None]
    lse = x.logsumexp(-1, keepdim=True)
    log_q = (x if ids is None else x.gather(-1, ids)) - lse
    loss = (weights * (torch.xlogy(probs, probs) - probs * log_q)).sum()
    mass = weights * probs.sum(-1, keepdim=True)
    at_ids = mass * log_q.exp() - weights * probs
    if ids is None:
        return loss, at_ids.to(logits.dtype)
    return loss, x.sub_(lse).exp_().mul_(mass).to(logits.dtype).scatter_(-1, ids, at_ids.to(logits.dtype))


class _KLDivergence(torch.autograd.Function):
    """sum_n weights_n KL(probs_n || q_n). Logits live for a chunk only: forward already takes the gradients, for backward
    to scale."""

    @staticmethod
    def forward(ctx, hidden_states, head, probs, ids, weights):
        total, weight = precise(hidden_states.new_zeros(())), head.to(hidden_states.dtype)
        grad_hidden, grad_head = (torch.zeros_like(x) if needed else None
                                  for x, needed in zip((hidden_states, head), ctx.needs_input_grad))
        for part in _chunks(hidden_states, len(head)):
            h = hidden_states[part]
            logits = h @ weight.T
            loss, grad = fused(_loss_and_gradient, logits)(logits, probs[part], None if ids is None else ids[part], weights[part])
            total += loss
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight
            if grad_head is not None:
                grad_head += grad.T @ h
        ctx.save_for_backward(grad_hidden, grad_head)
        return total

    @staticmethod
    def backward(ctx, grad):
        return *(None if x is None else grad * x for x in ctx.saved_tensors), None, None, None


def kl_divergence(hidden_states, head, probs, ids, weights) -> torch.Tensor:
    """sum_n weights_n KL(alpha_n || q_n), q the softmax of the full logits hidden_states [N, d] @ head^T, in float32."""
    if not torch.is_grad_enabled():
        hidden_states, head = hidden_states.detach(), head.detach()
    return _KLDivergence.apply(hidden_states, head, precise(probs), ids, weights)


def cross_entropy(hidden_states: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropies of labels [N] under logits hidden_states [N, d] @ head^T, in float32.

    The KL from a distribution that is certain of its label.
    """
    ones = precise(hidden_states.new_ones(len(labels)))
    return kl_divergence(hidden_states, head, ones[:, None], labels[:, None], ones)


def anchor(hidden_states, embedding: torch.Tensor, latent: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """How far latents are from the segments that they stand for, summed over them: the cross-entropy of a segment's own tokens under the
    encoder's full distribution, the first weighing most, each next one half of that.

    hidden_states [T, hidden_size]; tokens int [M] and, in ascending order, `latent` [M]: where in hidden_states the latent of each is.
    """
    first = torch.searchsorted(latent, latent)
    size = torch.searchsorted(latent, latent, right=True) - first
    place = torch.arange(len(latent), device=latent.device) - first
    weights = 0.5 ** place / (2 - 0.5 ** (size - 1))
    return kl_divergence(hidden_states[latent], embedding, torch.ones_like(weights)[:, None], tokens[:, None], weights)


def entropy(probs: torch.Tensor) -> torch.Tensor:
    """-sum_k p_k log p_k of each distribution of probs [..., k], in nats."""
    return -torch.xlogy(probs, probs).sum(-1)


def squared_error(hidden_states: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """sum_n weights_n |h_n - t_n|^2 / hidden_size, in float32, of hidden states and of the latents that they are
    to be, both [N, hidden_size]."""
    return (weights * (precise(hidden_states) - precise(targets)).square().mean(-1)).sum()


def perturb(probs, ids, gumbel, forbidden: int, scale: float, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha' = softmax((log alpha + s g) / t), s g clamped to [-1.5, 3], for numbers `gumbel` like probs [N, k]; and, bool [N],
    whether that puts the token `forbidden` on top."""
    draw = ((probs.float().log() + (scale * gumbel).clamp(-1.5, 3.0)) / temperature).softmax(-1)
    top = draw.argmax(-1, keepdim=True)
    return draw, (top if ids is None else ids.gather(-1, top)).squeeze(-1) == forbidden


def gumbel_noise(probs, ids, forbidden: int, scale: float, temperature: float, tries: int = 100) -> torch.Tensor:
    """alpha' as `perturb` makes it of Gumbel numbers; probabilities like `probs`.

    Drawn again where it would make the token `forbidden` (the first of </think>) the most likely; a latent that has it on
    top after `tries` draws keeps its own alpha.
    """
    noisy, redraw = probs.float().clone(), torch.ones(len(probs), dtype=torch.bool, device=probs.device)
    for _ in range(tries):
        gumbel = -torch.empty_like(noisy).exponential_().log()
        draw, ends = perturb(probs, ids, gumbel, forbidden, scale, temperature)
        noisy = torch.where((redraw & ~ends)[:, None], draw, noisy)
        redraw = redraw & ends
        if not redraw.any():
            break
    return noisy
