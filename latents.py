"""Latent tokens as arithmetic: superposition, losses and noise. Softmaxes and losses in float32.

A latent's distribution alpha is (probs, ids): the k most likely tokens, float and int [n, k].
For the full vocabulary (k = 0) probs is [n, vocab_size] and ids is [n, 0].
"""

import torch

from lib.fast import MAX_LOGITS, kl_divergence, precise


def top_probs(logits, k):
    """alpha of logits [n, V]: softmax over the k largest, most likely first; k = 0: over all."""
    if k == 0:
        return precise(logits).softmax(-1), logits[:, :0].long()
    top, ids = logits.topk(k)
    return precise(top).softmax(-1), ids


def superpose(probs, ids, embedding):
    """z = sum_v alpha_v e_v, [n, hidden_size], from the embedding matrix [V, hidden_size]."""
    if not ids.shape[1]:
        return probs.to(embedding.dtype) @ embedding
    return torch.einsum("nk,nkd->nd", probs.to(embedding.dtype), embedding[ids])


def induce(hidden_states, embedding, k):
    """alpha of hidden states [n, hidden_size]: top_probs of h E^T, E an embedding or head.

    Differentiable in the hidden states. For k > 0 the full logits only find the k ids. The k logits
    are then computed again, in float32 and with a gradient. So no gradient is [n, V].
    """
    if k == 0:
        return top_probs(hidden_states @ embedding.T, 0)
    with torch.no_grad():
        parts = hidden_states.split(MAX_LOGITS // len(embedding))
        ids = torch.cat([(part @ embedding.T).topk(k).indices for part in parts])
    logits = (precise(hidden_states)[:, None] * precise(embedding[ids])).sum(-1)
    return logits.softmax(-1), ids


def cross_entropy(hidden_states, head, targets, weights=None):
    """Sum of weight * cross-entropy, a float32 scalar: the KL from a one-hot distribution.

    hidden_states [n, d], head [V, d], targets int [n]. weights: float [n], or None, all 1.
    """
    ones = torch.ones_like(targets, dtype=torch.float32)
    weights = ones if weights is None else weights
    return kl_divergence(hidden_states, head, ones[:, None], targets[:, None], weights)


def segment_loss(hidden_states, embedding, latent, tokens, r):
    """Not in the paper. Keeps each latent on the tokens of its own segment, in order.

    The cross-entropy of a segment's tokens under the encoder's full distribution at its L, summed
    over latents. A token's weight falls geometrically with its place, from 1 to 1/2 over r places.
    The weights of a segment are scaled to sum 1. hidden_states [n, hidden_size] at the Ls; tokens
    int [m]; latent int [m], ascending: the number of the latent of each token.
    """
    size = latent.bincount()
    place = torch.arange(len(latent), device=latent.device) - torch.searchsorted(latent, latent)
    by_place = 0.5 ** torch.linspace(0, 1, r, device=latent.device)
    weights = by_place[place] / by_place.cumsum(0)[size[latent] - 1]
    return cross_entropy(hidden_states[latent], embedding, tokens, weights)


def add_noise(probs, ids, gumbel, forbidden, scale, temperature):
    """alpha' = softmax((log alpha + c g) / t), c g clamped to [-1.5, 3]; `gumbel` g like probs.

    A latent whose alpha' would have the token `forbidden` on top keeps its alpha.
    """
    probs = precise(probs)
    noisy = ((probs.log() + (scale * gumbel).clamp(-1.5, 3.0)) / temperature).softmax(-1)
    top = noisy.argmax(-1, keepdim=True)
    top = ids.gather(-1, top) if ids.shape[-1] else top
    return torch.where(top == forbidden, probs, noisy)


def gumbel_like(probs):
    """Standard Gumbel numbers, float32, in the shape and on the device of `probs`."""
    return -torch.empty_like(probs, dtype=torch.float32).exponential_().log()
