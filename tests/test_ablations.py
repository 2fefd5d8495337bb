"""The ablations: no induction mask, no segments, all weights; against transformers in float64."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from attention import Runner
import cache_latents
from load_hf_weights import Reasoning, load_checkpoint, load_model
import masks
import oracle
from test_cache import phase1, phase2_arguments
from test_training import examples, mean_loss, merged_hf, phase1_task, phase2_settings, theirs  # noqa: F401
from train_phase1 import load_encoder
from train_phase2 import Phase2
import train_phase2


def encoder_states(hf, ex, query, r, induction):
    """The encoder's hidden states at the latent queries, [N, d]."""
    tokens = oracle.tokens("encoder", ex, r)
    E, is_latent = hf.get_input_embeddings().weight, [kind == "Z" for _, kind, _ in tokens]
    x = torch.stack(
        [query if latent else E[token] for (token, _, _), latent in zip(tokens, is_latent)]
    )
    T = len(x)
    mask = torch.tensor(
        [
            [k <= q and (not induction or not is_latent[k] or k == q) for k in range(T)]
            for q in range(T)
        ]
    )
    return oracle.run(hf, x, mask, list(range(T)))[is_latent]


@pytest.mark.parametrize(
    "k,induction,segments", [(0, False, False), (3, False, True), (3, True, False)]
)
def test_phase1_loss(checkpoint, examples, k, induction, segments):  # noqa: F811
    directory, r = checkpoint("qwen3", True), 2
    task = phase1_task(directory, r, k, no_segments=not segments, no_induction=not induction)
    model, encoder = task.model, task.encoder
    hf_encoder, hf_decoder = (merged_hf(directory, model, name) for name in ("encoder", "decoder"))
    query, E, losses = (
        encoder.latent_query.detach().double(),
        hf_decoder.get_input_embeddings().weight,
        [],
    )
    for ex in map(theirs, examples):
        h = encoder_states(hf_encoder, ex, query, r, induction)
        z = oracle.superposition(h, E, k)[2]
        layout = "decoder" if segments else "latent"
        losses += oracle.token_losses(
            hf_decoder, oracle.forward(hf_decoder, layout, ex, r, z), oracle.labels(layout, ex, r)
        )
    assert mean_loss(task, examples)[0] == pytest.approx(oracle.mean(losses).item(), abs=1e-4)


def test_all_weights_learn(checkpoint, examples):  # noqa: F811
    """Without an adapter every weight gets the gradient that transformers gives it."""
    directory, r = checkpoint("qwen3", False), 2
    model, generator = load_checkpoint(directory), torch.Generator().manual_seed(1)
    hf = AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float64
    )
    with_latents, alphas = [], []
    for e in examples:
        alpha = (
            torch.randn(len(oracle.segments(e.chain, r)), 272, generator=generator)
            .softmax(-1)
            .topk(4)
        )
        alphas.append(alpha)
        with_latents.append(replace(e, alpha=(alpha[0], alpha[1])))
    task = Phase2(Runner(model), phase2_settings(all_weights=True), Reasoning("latent", 4, r), 0)
    loss, gradients = mean_loss(task, with_latents)
    expected, *_ = oracle.phase2_loss(hf, list(map(theirs, examples)), alphas)
    assert loss == pytest.approx(expected.item(), abs=1e-4)
    assert set(gradients) == {f"model.{n}" for n, _ in model.named_parameters()}
    expected.backward()
    named = dict(hf.named_parameters())
    for n in ("lm_head.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"):
        ours = gradients["model." + n.removeprefix("model.")]
        torch.testing.assert_close(ours.double(), named[n].grad, atol=1e-4, rtol=1e-3)


def all_weights(*arguments):
    arguments = phase2_arguments(*arguments, "--all-weights")
    at = arguments.index("--lora-rank")
    return arguments[:at] + arguments[at + 2 :]


@pytest.mark.parametrize("flags", [["--top-k", 0, "--no-induction"], ["--no-segments"]])
def test_the_commands(command, checkpoint, data, tmp_path, flags):
    """The flags of phase 1 hold for what is made from its run; all weights that phase 2 trained are what is loaded."""
    run, cache, latent = tmp_path / "run", tmp_path / "cache", tmp_path / "latent"
    phase1(command, checkpoint, data, run, *flags)
    assert command(cache_latents.main, "--phase1", run, "--data", data, "--out", cache)[0] == 0
    model = load_model(run)[0]
    rule = masks.causal if "--no-induction" in flags else masks.induction
    assert load_encoder(run, Runner(load_checkpoint(checkpoint()))).rule is rule
    code, _, error = command(
        train_phase2.main, *all_weights(run, data, cache, latent, "--lr", 1e-3)
    )
    assert code == 0, error
    learned, _, reasoning = load_model(latent)
    assert reasoning == Reasoning("latent", 0 if "--top-k" in flags else 3, 2)
    assert any(not torch.equal(a, b) for a, b in zip(learned.parameters(), model.parameters()))
