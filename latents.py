"""Latent tokens as arithmetic: superposition, the two losses, and noise. See docs/METHOD.md.

A latent's distribution `alpha` is held as (probs, ids): probabilities float [N, k] and the tokens they belong to int [N, k];
ids is None where alpha covers the full vocabulary (k = 0) and probs is [N, V].
"""

import torch
import torch.nn.functional as F

CHUNK = 1024  # rows of vocabulary logits alive at a time


def precise(x: torch.Tensor) -> torch.Tensor:
    """float32, or float64 where it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def top_probs(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """alpha of logits [N, V]: softmax in float32 over the k largest, the most likely first; k = 0 keeps all."""
    if k == 0:
        return precise(logits).softmax(-1), None
    top, ids = precise(logits).topk(k, dim=-1)
    return top.softmax(-1), ids


def superpose(probs: torch.Tensor, ids: torch.Tensor | None, embedding: torch.Tensor) -> torch.Tensor:
    """z = sum_v alpha_v e_v, [N, hidden_size], from the embedding matrix [V, hidden_size]."""
    if ids is None:
        return probs.to(embedding.dtype) @ embedding
    return torch.einsum("nk,nkd->nd", probs.to(embedding.dtype), embedding[ids])


def induce(hidden_states: torch.Tensor, embedding: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """alpha of the encoder's hidden states [N, hidden_size] at the latent queries: softmax over the k largest of h E^T.

    Differentiable in the hidden states. The full logits serve only to find the k ids; they are not kept for backward.
    """
    if k == 0:
        return top_probs(hidden_states @ embedding.T, 0)
    with torch.no_grad():
        ids = torch.cat([(h @ embedding.T).topk(k, dim=-1).indices for h in hidden_states.split(CHUNK)])
    logits = (precise(hidden_states)[:, None] * precise(embedding[ids])).sum(-1)  # no matmul: autocast leaves it float32
    return logits.softmax(-1), ids


def cross_entropy(hidden_states: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropies of labels [M] under logits hidden_states [M, d] @ head^T, in float32."""
    total = precise(hidden_states.new_zeros(()))
    for h, y in zip(hidden_states.split(CHUNK), labels.split(CHUNK)):
        total = total + F.cross_entropy(precise(h @ head.T), y, reduction="sum")
    return total


def kl_divergence(hidden_states, head, probs, ids, weights) -> torch.Tensor:
    """sum_n weights_n KL(alpha_n || q_n), q the softmax of the full logits hidden_states [N, d] @ head^T, in float32."""
    total = precise(hidden_states.new_zeros(()))
    for i in range(0, len(probs), CHUNK):
        part = slice(i, i + CHUNK)
        log_q = precise(hidden_states[part] @ head.T).log_softmax(-1)
        log_q = log_q if ids is None else log_q.gather(-1, ids[part])
        p = precise(probs[part])
        total = total + (weights[part] * (torch.xlogy(p, p) - p * log_q).sum(-1)).sum()
    return total


def gumbel_noise(probs, ids, forbidden: int, scale: float, temperature: float, tries: int = 100) -> torch.Tensor:
    """alpha' = softmax((log alpha + s g) / t), g Gumbel, s g clamped to [-1.5, 3]; probabilities like `probs`.

    Drawn again where it would make the token `forbidden` (the first of </think>) the most likely; a latent that has it on
    top after `tries` draws keeps its own alpha.
    """
    noisy, redraw = probs.float().clone(), torch.ones(len(probs), dtype=torch.bool, device=probs.device)
    for _ in range(tries):
        gumbel = -torch.empty_like(noisy).exponential_().log()
        draw = ((probs.float().log() + (scale * gumbel).clamp(-1.5, 3.0)) / temperature).softmax(-1)
        top = draw.argmax(-1, keepdim=True)
        ends = (top if ids is None else ids.gather(-1, top)).squeeze(-1) == forbidden
        noisy = torch.where((redraw & ~ends)[:, None], draw, noisy)
        redraw = redraw & ends
        if not redraw.any():
            break
    return noisy
