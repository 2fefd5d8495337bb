"""N_eff against a plain reading of its definition, on a model of transformers; and the command as a whole."""

import json
import math
import random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from attention import Runner
import cache_latents
from experiments import n_eff
from load_hf_weights import load_checkpoint
import lora
import oracle
from test_cache import phase1, phase2_arguments
from train_phase1 import Encoder
import train_phase2


def oracle_n_eff(hf, encode_spans, prompt, chains, thoughts):
    """By the letter of docs/METHOD.md, one latent, one solution, one span at a time; `thoughts`: (probs, ids) of every latent."""
    E = hf.get_input_embeddings().weight
    z = [sum(p * E[i] for p, i in zip(probs, ids)) for probs, ids in thoughts]
    x = torch.cat([E[torch.tensor(prompt)], torch.stack(z)])
    h = oracle.run(hf, x, torch.ones(len(x), len(x)).tril(), list(range(len(x))))
    logits = h @ hf.get_output_embeddings().weight.T
    scores = []
    for chain in chains:
        N = len(z)
        spans = [chain[i * len(chain) // N : (i + 1) * len(chain) // N] for i in range(N)]
        reference, unused, total = encode_spans(prompt, spans), set(range(N)), 0.0
        for n in range(N):
            cosine = {m: float(torch.cosine_similarity(z[n], reference[m], dim=0)) for m in unused}
            match = max(cosine, key=cosine.get)
            unused.remove(match)
            distribution = logits[len(prompt) - 1 + n].softmax(-1)
            top = distribution.topk(100).indices.tolist()
            total += (
                math.log(
                    max(1e-10, sum(float(distribution[t]) for t in set(spans[match]) & set(top)))
                )
                / N
            )
        scores.append(total)
    weights = [math.exp(s) for s in scores]
    return math.exp(-sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights))


@torch.no_grad()
def test_n_eff_is_its_definition(checkpoint):
    directory, rng = checkpoint("llama", True), random.Random(3)
    model = load_checkpoint(directory, dtype=torch.float64)
    hf = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64, attn_implementation="eager"
    )
    k, run = 4, Runner(model)
    encoder = Encoder(run, 1, k)
    encoder.latent_query.data.normal_(0, 0.5)
    lora.add_adapter(
        model, "encoder", 2, 4
    )  # B is zero: the encoder is the model itself, with latent queries

    def encode_spans(prompt, spans):
        E, L = hf.get_input_embeddings().weight, encoder.latent_query.double()
        rows, is_latent = list(E[torch.tensor(prompt)]), [False] * len(prompt)
        for span in spans:
            rows += [*E[torch.tensor(span)], L]
            is_latent += [False] * len(span) + [True]
        T = len(rows)
        mask = torch.tensor(
            [[k <= q and (not is_latent[k] or k == q) for k in range(T)] for q in range(T)]
        )
        h = oracle.run(hf, torch.stack(rows), mask, list(range(T)))
        out = []
        for q in range(T):
            if is_latent[q]:
                top, ids = (h[q] @ E.T).topk(k)
                out.append((top.softmax(-1)[:, None] * E[ids]).sum(0))
        return out

    for N in (1, 3, 5):
        prompt, chains = (
            [rng.randrange(260) for _ in range(7)],
            [[rng.randrange(260) for _ in range(n)] for n in (5, 9, 14)],
        )
        probs, ids = (
            torch.rand(N, k).double().softmax(-1),
            torch.stack([torch.randperm(260)[:k] for _ in range(N)]),
        )
        found = n_eff.distributions(run, prompt, probs, ids)
        value, chance = n_eff.n_eff(encoder, prompt, chains, *found, np.random.default_rng(0))
        assert value == pytest.approx(
            oracle_n_eff(hf, encode_spans, prompt, chains, list(zip(probs, ids))), rel=1e-4
        )
        assert 1 <= chance <= 3 and (N == 1) == (
            abs(value - chance) < 1e-9
        )  # one latent has one way to be matched


def test_the_command(command, checkpoint, data, tmp_path, monkeypatch):
    run, cache, other, out = (tmp_path / name for name in ("run", "cache", "other.jsonl", "out"))
    phase1(command, checkpoint, data, run)
    assert command(cache_latents.main, "--phase1", run, "--data", data, "--out", cache)[0] == 0
    assert (
        command(train_phase2.main, *phase2_arguments(run, data, cache, tmp_path / "latent"))[0] == 0
    )
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    other.write_text(
        "".join(json.dumps(line | {"cot": line["cot"][::-1] + "=7"}) + "\n" for line in lines[:20])
    )
    arguments = ["--model", tmp_path / "latent", "--out", out, "--max-latents", 3]
    code, printed, error = command(n_eff.main, *arguments, "--data", data, other, "--problems", 15)
    assert code == 0, error
    summary = json.loads((out / "n_eff.json").read_text())
    lines = [json.loads(line) for line in (out / "n_eff.problems.jsonl").read_text().splitlines()]
    compared = [line for line in lines if "n_eff" in line]
    assert summary["problems"] == len(lines) >= len(compared) > 3
    assert summary["n_eff"] == pytest.approx(np.mean([c["n_eff"] for c in compared]))
    assert all(1 <= c["n_eff"] <= c["paths"] + 1e-9 for c in compared)
    assert str(summary["n_eff"]) in printed
    code, _, error = command(n_eff.main, *arguments, "--out", tmp_path / "alone", "--data", data)
    alone = json.loads((tmp_path / "alone" / "n_eff.json").read_text())
    assert code == 0 and "n_eff" not in alone and alone["ecr@50"] >= alone["ecr@5"] > 0


def test_ecr():
    """How many tokens of a segment are among the K most likely of its latent, averaged over latents with a segment."""
    top = torch.tensor(
        [[1, 2, 3, 4, 5, 6], [3, 4, 9, 9, 9, 9], [5, 6, 0, 0, 0, 0], [7, 8, 0, 0, 0, 0]]
    )
    found = n_eff.ecr(top, [[6, 5], [4, 3], [1]])
    assert (
        found["ecr@5"] == (1 + 2 + 0) / 3 and found["ecr@10"] == found["ecr@50"] == (2 + 2 + 0) / 3
    )
