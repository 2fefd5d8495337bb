"""A slow oracle for the tests: the method spelled out one position, one example, one step at a time.

Nothing here is shared with the code under test. No packing, no padding, no KV cache, no vectorizing: loops over
plain lists, and `transformers` for the model. Quotes in the comments are sentences of the page that docs/METHOD.md was written from.

The models given here are `transformers` causal LMs (Llama, Qwen2, Qwen3) in float64, in eval mode, with
`attn_implementation="eager"`. Inside, transformers still takes the softmax of attention, the norms and the rotary
angles in float32, so compare with a tolerance of about 1e-5, not 1e-12.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch


@dataclass
class Example:
    """One training example, as lists of token ids."""

    question: list[int]  # the prompt, up to where the assistant starts
    think: list[int]  # <think>
    chain: list[int]  # s_1..s_n
    end_think: list[int]  # </think>
    answer: list[int]  # the answer's text and the end-of-turn token


# ---------------------------------------------------------------------------------------------------------------------
# Layouts: which token stands where, who sees whom, at which position, predicting what.


def segments(chain, r):
    """[n] ids -> N = ceil(n/r) lists of r ids; the last may be shorter."""
    return [chain[start : start + r] for start in range(0, len(chain), r)]


def tokens(layout, ex, r):
    """The sequence: [T] of (id, or None for a latent; kind; segment).

    kind: "Q" for Q and <think>, "S" for the chain, "Z" for a latent (L or Z), "A" for </think> and the answer.
    segment: i for L_i, Z_i and the tokens of S_i, counted from 1; 0 for all others.
    """
    Q = [(t, "Q", 0) for t in ex.question + ex.think]
    end_think = [(t, "A", 0) for t in ex.end_think]
    A = [(t, "A", 0) for t in ex.answer]
    S = [[(t, "S", i) for t in segment] for i, segment in enumerate(segments(ex.chain, r), start=1)]
    assert layout in ("cot", "encoder", "decoder", "latent"), layout
    middle = []
    for i in range(1, len(S) + 1):  # S_i is S[i - 1], the list counts from 0
        Z_i = [(None, "Z", i)]
        if layout == "cot":  # "Q <think> s_1..s_n </think> A"
            middle += S[i - 1]
        elif layout == "encoder":  # "Q <think> S_1 L S_2 L ... S_N L </think>"
            middle += S[i - 1] + Z_i
        elif layout == "decoder":  # "Q <think> Z_1 S_2 Z_2 S_3 ... S_N Z_N </think> A": no S_1
            middle += (S[i - 1] if i > 1 else []) + Z_i
        elif layout == "latent":  # "Q <think> Z_1 Z_2 ... Z_N </think> A"
            middle += Z_i
    return Q + middle + end_think + ([] if layout == "encoder" else A)


def may_look(layout, seq, query, key):
    """True if the token at index `query` of the sequence may look at the one at index `key`."""
    if key > query:  # causal, in every layout
        return False
    if layout in ("cot", "latent"):
        return True
    _, q_kind, q_segment = seq[query]
    _, k_kind, k_segment = seq[key]

    if layout == "encoder":
        if k_kind == "Z":  # "nobody attends to an L except that L itself"
            return query == key
        return True

    assert layout == "decoder"
    if q_kind == "Q":  # "Q <think> sees Q <think>"
        return k_kind == "Q"
    if q_kind == "Z":  # "Z_i sees Q <think>, the earlier Zs and itself"
        return k_kind in ("Q", "Z")
    if q_kind == "S":  # "a token of S_{i+1} sees Z_i and its own segment, nothing else"
        if k_kind == "Z":
            return k_segment == q_segment - 1
        if k_kind == "S":
            return k_segment == q_segment
        return False
    if q_kind == "A":  # "</think> A sees Q <think>, every Z, and itself causally, never an S"
        return k_kind in ("Q", "Z", "A")
    raise ValueError(q_kind)


def mask(layout, ex, r):
    """[T, T] bool: row = query, column = key, True = may look."""
    seq = tokens(layout, ex, r)
    out = np.zeros((len(seq), len(seq)), dtype=bool)
    for query in range(len(seq)):
        for key in range(len(seq)):
            out[query, key] = may_look(layout, seq, query, key)
    return out


def packed_mask(layout, examples, r):
    """[sum T, sum T] bool: several examples in one row, none sees another."""
    blocks = [mask(layout, ex, r) for ex in examples]
    total = sum(len(block) for block in blocks)
    out = np.zeros((total, total), dtype=bool)
    start = 0
    for block in blocks:
        end = start + len(block)
        out[start:end, start:end] = block
        start = end
    return out


def positions(layout, ex, r):
    """[T] position ids."""
    seq = tokens(layout, ex, r)
    if layout != "decoder":
        return list(range(len(seq)))  # "0, 1, 2, ..."
    p = len(ex.question) + len(ex.think)
    N = len(segments(ex.chain, r))
    pos_of_Z = {i: p + i - 1 for i in range(1, N + 1)}  # "Z_i is at p+i-1"
    out, seen = [], {}  # seen[kind, segment]: how many of these have gone by
    for _, kind, segment in seq:
        j = seen.get((kind, segment), 0)
        if kind == "Q":
            out.append(j)
        if kind == "Z":
            out.append(pos_of_Z[segment])
        if kind == "S":  # "the j-th token (from 0) of the segment after Z_i is at
            out.append(pos_of_Z[segment - 1] + 1 + j)  # pos(Z_i)+1+j"
        if kind == "A":  # "</think> A continue from the last Z"
            out.append(p + N + j)
        seen[kind, segment] = j + 1
    return out


def labels(layout, ex, r):
    """[T]: the id that each position must predict, None where nothing is supervised."""
    supervised = {
        "cot": ("S", "A"),  # chain, </think>, A
        "encoder": (),
        "decoder": ("S", "A"),  # "the tokens of S_2..S_N, </think> and A (a Z is never a label)"
        "latent": ("A",),  # "CE(</think> A)"
    }[layout]
    seq = tokens(layout, ex, r)
    # "The position of Z_i predicts the first token of S_{i+1}, the last Z predicts </think>": in every layout a
    # supervised token is predicted by the position right before it.
    out = []
    for t in range(len(seq)):
        following = seq[t + 1] if t + 1 < len(seq) else (None, None, 0)
        out.append(following[0] if following[1] in supervised else None)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# The superposition and the model.


def superposition(h, E, k):
    """Hidden states [n, d], embeddings [V, d] -> alpha [n, k], ids [n, k] (likeliest first), z [n, d], in float64.

    k = 0 keeps the full vocabulary: alpha [n, V] in the vocabulary's order, ids 0..V-1. Differentiable in h.
    """
    h, E = h.double(), E.detach().double()  # "E the decoder's input embedding matrix (detached)"
    alphas, all_ids, zs = [], [], []
    for row in h:
        logits = E @ row  # "h gives logits h @ E^T"
        ids = list(range(len(E)))
        if k > 0:  # "keep the k largest"
            values = logits.tolist()
            ids = sorted(ids, key=lambda v: -values[v])[:k]
        ids = torch.tensor(ids)
        alpha = torch.softmax(logits[ids], dim=0)  # "alpha = softmax over those"
        alphas.append(alpha)
        all_ids.append(ids)
        zs.append(alpha @ E[ids])  # "z = sum alpha_i E[i]"
    width = k or len(E)
    if not alphas:
        return (
            h.new_zeros(0, width),
            torch.zeros(0, width, dtype=torch.long),
            h.new_zeros(0, E.shape[1]),
        )
    return torch.stack(alphas), torch.stack(all_ids), torch.stack(zs)


def run(hf, embeds, mask, positions):
    """Input embeddings [T, d], mask [T, T] bool, positions [T] -> hidden states [T, d] after the final norm."""
    allowed = torch.as_tensor(mask, dtype=torch.bool)
    additive = torch.zeros(allowed.shape, dtype=embeds.dtype).masked_fill(~allowed, float("-inf"))
    out = hf.model(
        inputs_embeds=embeds[None],
        attention_mask=additive[None, None],
        position_ids=torch.tensor(positions)[None],
        use_cache=False,
    )
    return out.last_hidden_state[0]


def forward(hf, layout, ex, r, z):
    """One example in one layout, z [N, d] (Z_i or L_i is z[i - 1]) -> hidden states [T, d]."""
    E = hf.get_input_embeddings().weight
    embeds = [
        z[segment - 1] if token is None else E[token] for token, _, segment in tokens(layout, ex, r)
    ]
    return run(hf, torch.stack(embeds), mask(layout, ex, r), positions(layout, ex, r))


def log_probs(hf, h):
    """Hidden states [..., d] -> log-probabilities [..., V] of the LM head."""
    return torch.log_softmax(h @ hf.get_output_embeddings().weight.T, dim=-1)


def token_losses(hf, h, wanted):
    """Hidden states [T, d], labels [T] -> a list with one cross-entropy per supervised token."""
    return [-log_probs(hf, h[t])[label] for t, label in enumerate(wanted) if label is not None]


def mean(scalars):
    return torch.stack(scalars).mean()


# ---------------------------------------------------------------------------------------------------------------------
# The losses.


def cot_loss(hf, examples, chain=True):
    """Mean cross-entropy over chain, </think> and A of all examples together -> scalar.

    chain=False: the answer-only version, Q <think> </think> A, over </think> and A.
    """
    losses = []
    for ex in examples:
        if not chain:
            ex = replace(ex, chain=[])
        h = forward(hf, "cot", ex, 1, z=None)  # r = 1: the cot layout has no latents, any r will do
        losses += token_losses(hf, h, labels("cot", ex, 1))
    return mean(losses)


def encode(hf_encoder, ex, latent_query, r, k, E):
    """One example through the encoder -> alpha [N, k], ids [N, k], z [N, d]. `E` is the decoder's [V, d]."""
    N = len(segments(ex.chain, r))
    h = forward(hf_encoder, "encoder", ex, r, z=[latent_query] * N)
    at_L = [t for t, (_, kind, _) in enumerate(tokens("encoder", ex, r)) if kind == "Z"]
    return superposition(h[at_L], E, k)  # "at each L the encoder's last hidden state"


def latents(hf_encoder, ex, latent_query, r, k, E):
    """One entry of the latent cache -> alpha [N, k], ids [N, k] (not rounded to float16)."""
    with torch.no_grad():
        alpha, ids, _ = encode(hf_encoder, ex, latent_query, r, k, E)
    return alpha, ids


def phase1_loss(hf_encoder, hf_decoder, examples, latent_query, r, k):
    """Mean cross-entropy over S_2..S_N, </think> and A of all examples together -> scalar. latent_query: [d]."""
    E = hf_decoder.get_input_embeddings().weight
    losses = []
    for ex in examples:
        _, _, z = encode(hf_encoder, ex, latent_query, r, k, E)
        h = forward(hf_decoder, "decoder", ex, r, z)
        losses += token_losses(hf_decoder, h, labels("decoder", ex, r))
    return mean(losses)


def phase2_loss(hf, examples, alphas, w_ce=1.0, w_kl=1.0):
    """examples and their (alpha [N, k], ids [N, k]) -> scalars (w_ce * ce + w_kl * kl, ce, kl)."""
    E = hf.get_input_embeddings().weight.detach()
    ce, kl = [], []
    for ex, (alpha, ids) in zip(examples, alphas, strict=True):
        N = len(alpha)
        ex = replace(
            ex, chain=[0] * N
        )  # the chain is not read: one stand-in per latent, with r = 1
        alpha, ids = alpha.double(), ids.long()
        z = [
            alpha[i] @ E[ids[i]] for i in range(N)
        ]  # "Z built from the cached alpha with the model's own E"
        h = forward(hf, "latent", ex, 1, z)
        ce += token_losses(hf, h, labels("latent", ex, 1))

        p = len(ex.question) + len(ex.think)
        of_example = []
        for i in range(N):
            log_q = log_probs(
                hf, h[p + i - 1]
            )  # "the position before each Z (so <think> predicts Z_1)"
            total = torch.zeros((), dtype=torch.float64)
            for a, v in zip(alpha[i], ids[i]):  # "KL(alpha || q)", with 0 log 0 = 0
                if a > 0:
                    total = total + a * (torch.log(a) - log_q[v])
            of_example.append(total)
        # "averaged over the latents of an example, then over examples"; an example without latents counts as 0
        kl.append(mean(of_example) if of_example else torch.zeros((), dtype=torch.float64))
    ce, kl = mean(ce), mean(kl)
    return w_ce * ce + w_kl * kl, ce, kl


# ---------------------------------------------------------------------------------------------------------------------
# Inference.


@torch.no_grad()
def think_and_answer(hf, prompt_ids, end_think, eos, k, max_latents, max_answer):
    """Greedy inference for one problem, everything read again at every step. `prompt_ids` is Q and <think>.

    -> a list of (alpha [k], ids [k]), one per latent; a list of at most `max_answer` answer ids, eos included.
    """
    E = hf.get_input_embeddings().weight
    head = hf.get_output_embeddings().weight
    embeds = [E[t] for t in prompt_ids]  # what has been fed so far

    def last_hidden():
        T = len(embeds)
        return run(hf, torch.stack(embeds), np.tril(np.ones((T, T), dtype=bool)), list(range(T)))[
            -1
        ]

    thoughts = []
    while True:  # "Repeat: logits at the last position;"
        h = last_hidden()
        if (head @ h).argmax().item() == end_think[
            0
        ]:  # "if the arg-max is the first token of </think>"
            break
        if len(thoughts) == max_latents:  # "(or the latent budget is used up) stop thinking"
            break
        alpha, ids, _ = superposition(
            h[None], head, k
        )  # "else feed the top-k superposition": logits from the LM
        embeds.append(alpha[0] @ E[ids[0]])  # head, as in phase 2's q; embeddings from E
        thoughts.append((alpha[0], ids[0]))
    embeds += [E[t] for t in end_think]  # "and feed all of </think>"

    answer = []
    while len(answer) < max_answer:  # "then sample the answer as usual", greedy here
        token = (head @ last_hidden()).argmax().item()
        answer.append(token)
        if token == eos:
            break
        embeds.append(E[token])
    return thoughts, answer
