"""Who sees whom, and at which position. Each rule of the method is written once, here.

A mask is a rule, not a matrix: `rule(labels, q, k)` takes two integer tensors of token indices that
broadcast. It returns a bool tensor: may token q look at token k?
"""

from dataclasses import dataclass

import numpy as np
import torch

PROMPT, TEXT, LATENT, ANSWER = 0, 1, 2, 3  # Q <think> | a chain token | L or Z | </think> A
BLOCK = 128  # tokens: a GPU masks blocks of [BLOCK queries, BLOCK keys]


@dataclass
class Labels:
    """What the rules know about each of the T tokens of a packed row. Int32 tensors.

    document: [T], which example, ascending.
    kind: [T], PROMPT, TEXT, LATENT or ANSWER.
    segment: [T], the latent that a token belongs to: i for S_i, L_i and Z_i. In the decoder S_{i+1}
        continues Z_i and has i. 0 for prompt and answer.
    starts: [documents + 1], where each document begins, and T. Unused documents have length 0.
    longest: an int, at least the length of the longest document.
    """

    document: torch.Tensor
    kind: torch.Tensor
    segment: torch.Tensor
    starts: torch.Tensor
    longest: int


def earlier(q, k):
    """Within one document: a token sees itself and what comes before it. The KV cache's rule."""
    return k <= q


def causal(labels, q, k):
    """A token sees itself and the earlier tokens of its own document."""
    return (labels.document[q] == labels.document[k]) & earlier(q, k)


def induction(labels, q, k):
    """Encoder: causal, and nobody attends to a latent query L except that L itself."""
    return causal(labels, q, k) & ((labels.kind[k] != LATENT) | (q == k))


def supervision(labels, q, k):
    """Decoder: causal. A chain token sees its Z and its own segment. Others see no chain token."""
    same_segment = labels.segment[q] == labels.segment[k]  # prompt and answer have 0
    seen_by_others = labels.kind[k] != TEXT
    is_text = labels.kind[q] == TEXT
    return causal(labels, q, k) & torch.where(is_text, same_segment, seen_by_others)


RULES = {"cot": causal, "encoder": induction, "decoder": supervision, "latent": causal}  # by layout


def dense(rule, labels):
    """The rule as a bool matrix [T, T], rows are queries. For tests and pictures."""
    index = torch.arange(len(labels.kind), device=labels.kind.device)
    return rule(labels, index[:, None], index[None, :])


def dual_track_positions(kind):
    """Position ids [T] of one example in the decoder layout, from the kinds [T] of its tokens.

    Prompt, latents and answer are numbered as if no chain token stood between them: phase 1 sees
    the positions of inference. A chain token's position is its latent's plus its distance to it.
    """
    index = np.arange(len(kind))
    on_track = kind != TEXT
    last_on_track = np.maximum.accumulate(np.where(on_track, index, 0))
    return np.cumsum(on_track) - 1 + index - last_on_track
