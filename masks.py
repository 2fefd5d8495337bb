"""Who may look at whom, and at which position: the two masks and the dual-track positions, each rule written once.

A mask is a rule over per-token labels, not a matrix. `rule(labels, q, k)` takes integer tensors of token indices into one
packed row, broadcast against each other, and says for each pair whether query q may look at key k; whoever needs a
matrix evaluates the rule on a grid. See docs/METHOD.md.
"""

from dataclasses import dataclass

import numpy as np
import torch

PROMPT, TEXT, LATENT, ANSWER = 0, 1, 2, 3  # kinds: Q <think> | a chain token | L or Z | </think> A


@dataclass
class Labels:
    """What the rules know of each token of a packed row; int32 tensors of shape [T].

    document: which example. kind: PROMPT, TEXT, LATENT or ANSWER. segment: i for L_i and Z_i and for the chain tokens that
    may see Z_i in the decoder layout (S_{i+1}), so a token and the latent it continues share a number; 0 elsewhere.
    Tokens of a document stand together, in order. `documents` and `longest` are how many there are and the tokens of the
    longest, or more: kernels are launched for as many.
    """
    document: torch.Tensor
    kind: torch.Tensor
    segment: torch.Tensor
    documents: int
    longest: int


def causal(labels: Labels, q, k):
    """Every token sees itself and what stands before it in its own document (cot and latent layouts)."""
    return (labels.document[q] == labels.document[k]) & (k <= q)


def induction(labels: Labels, q, k):
    """Encoder: causal, and nobody attends to a latent query except that query itself."""
    return causal(labels, q, k) & ((labels.kind[k] != LATENT) | (q == k))


def supervision(labels: Labels, q, k):
    """Decoder: a chain token sees its latent and its own segment; all others see everything but chain tokens."""
    own_segment = labels.segment[q] == labels.segment[k]  # prompt and answer have 0, which no chain token has
    return causal(labels, q, k) & torch.where(labels.kind[q] == TEXT, own_segment, labels.kind[k] != TEXT)


def dense(rule, labels: Labels) -> torch.Tensor:
    """The rule as a bool matrix [T, T], rows are queries; for tests and pictures."""
    index = torch.arange(len(labels.kind), device=labels.kind.device)
    return rule(labels, index[:, None], index[None, :])


def dual_track_positions(kind: np.ndarray) -> np.ndarray:
    """Position ids [T] of one example in the decoder layout, from the kinds [T] of its tokens.

    Prompt, latents and answer count as if no chain token stood between them, so phase 1 sees the positions of
    inference; a chain token's position is its latent's plus its distance from it.
    """
    index = np.arange(len(kind))
    on_track = kind != TEXT
    last_on_track = np.maximum.accumulate(np.where(on_track, index, 0))
    return np.cumsum(on_track) - 1 + index - last_on_track
