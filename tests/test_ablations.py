"""The variants: hidden states as latents, no induction mask, no segments, all weights; against transformers in float64."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import cache_latents
from latents import HIDDEN
from load_hf_weights import load_checkpoint, load_model
import lora
import masks
import oracle
from sample import Sampler, Sampling
from test_cache import phase1, phase2_arguments
from test_sample import prompts
from test_training import examples, lively, mean_loss, merged_hf, theirs  # noqa: F401
from train_phase1 import Encoder, Phase1, load_encoder
from train_phase2 import LatentExample, Phase2
import train_phase2


def encoder_states(hf, ex, query, r, induction):
    """The encoder's hidden states at the latent queries, [N, d]."""
    tokens = oracle.tokens("encoder", ex, r)
    E, is_latent = hf.get_input_embeddings().weight, [kind == "Z" for _, kind, _ in tokens]
    x = torch.stack([query if latent else E[token] for (token, _, _), latent in zip(tokens, is_latent)])
    T = len(x)
    mask = torch.tensor([[k <= q and (not induction or not is_latent[k] or k == q) for k in range(T)] for q in range(T)])
    return oracle.run(hf, x, mask, list(range(T)))[is_latent]


@pytest.mark.parametrize("k,induction,segments", [(HIDDEN, True, True), (HIDDEN, False, False), (3, False, True), (3, True, False)])
def test_phase1_loss(checkpoint, examples, k, induction, segments):  # noqa: F811
    directory, r = checkpoint("qwen3", True), 2
    model = load_checkpoint(directory)
    for name in ("encoder", "decoder"):
        lora.add_adapter(model, name, 4, 8)
        lively(model, name)
    torch.manual_seed(7)
    encoder = Encoder(model, 0.5 * torch.randn(model.config.hidden_size), masks.induction if induction else masks.causal)
    task = Phase1(encoder, r, k, ("encoder", "decoder"), segments)
    hf_encoder, hf_decoder = (merged_hf(directory, model, name) for name in ("encoder", "decoder"))
    query, E, losses = encoder.latent_query.detach().double(), hf_decoder.get_input_embeddings().weight, []
    for ex in map(theirs, examples):
        h = encoder_states(hf_encoder, ex, query, r, induction)
        z = h if k == HIDDEN else oracle.superposition(h, E, k)[2]
        layout = "decoder" if segments else "latent"
        losses += oracle.token_losses(hf_decoder, oracle.forward(hf_decoder, layout, ex, r, z), oracle.labels(layout, ex, r))
    assert mean_loss(task, examples)[0] == pytest.approx(oracle.mean(losses).item(), abs=1e-4)


def test_phase2_loss_of_hidden_states(checkpoint, examples):  # noqa: F811
    """At the position before each latent its squared error, and the KL to the tokens that it reads as; and all weights can learn."""
    directory, r = checkpoint("qwen3", True), 2
    model, torch_generator = load_checkpoint(directory), torch.Generator().manual_seed(1)
    hf = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float64)
    E, with_latents, ce, errors = hf.get_input_embeddings().weight, [], [], []
    for e in examples:
        ex = theirs(e)
        h = torch.randn(len(oracle.segments(ex.chain, r)), model.config.hidden_size, generator=torch_generator)
        with_latents.append(LatentExample(**vars(e), probs=h, ids=None))
        out = oracle.forward(hf, "latent", ex, r, h.double())
        ce += oracle.token_losses(hf, out, oracle.labels("latent", ex, r))
        start = len(e.prompt) - 1
        before, (alpha, ids, _) = out[start:start + len(h)], oracle.superposition(h, E, 10)
        kl = (alpha * (alpha.log() - oracle.log_probs(hf, before).gather(-1, ids))).sum(-1)
        errors.append((before - h.double()).square().mean() + kl.mean())
    task = Phase2(model, r, HIDDEN, 0.7, 1.3, source=directory)
    loss, gradients = mean_loss(task, with_latents)
    assert loss == pytest.approx((0.7 * oracle.mean(ce) + 1.3 * torch.stack(errors).mean()).item(), abs=1e-4)
    assert set(gradients) == {f"model.{n}" for n, _ in model.named_parameters()}


@torch.no_grad()
def test_sampler_in_hidden_states(checkpoint):
    directory = checkpoint("llama", True)
    model = load_checkpoint(directory, dtype=torch.float64)
    hf = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, attn_implementation="eager")
    E, head = hf.get_input_embeddings().weight, hf.get_output_embeddings().weight
    batch = prompts(6, seed=11)
    for prompt, r in zip(batch, Sampler(model, [9], 262, Sampling("latent", HIDDEN, 4, 3, temperature=0), 4).generate(batch)):
        x, tokens = list(E[torch.tensor(prompt)]), []
        last = lambda: oracle.run(hf, torch.stack(x), torch.ones(len(x), len(x)).tril(), list(range(len(x))))[-1]
        for ids in r.ids:
            h = last()
            assert int(ids[0]) == int((head @ h).argmax()) != 9
            x.append(h)
        x.append(E[9])
        for _ in range(3):
            tokens.append(int((head @ last()).argmax()))
            x.append(E[tokens[-1]])
        assert len(r.ids) and r.tokens == tokens


def all_weights(*arguments):
    arguments = phase2_arguments(*arguments, "--all-weights")
    at = arguments.index("--lora-rank")
    return arguments[:at] + arguments[at + 2:]


@pytest.mark.parametrize("flags", [["--top-k", HIDDEN, "--no-induction"], ["--no-segments"]])
def test_the_commands(command, checkpoint, data, tmp_path, flags):
    """The flags of phase 1 hold for what is made from its run, and all weights that phase 2 trained are what is loaded."""
    run, cache, latent = tmp_path / "run", tmp_path / "cache", tmp_path / "latent"
    phase1(command, checkpoint, data, run, *flags)
    assert command(cache_latents.main, "--phase1", run, "--data", data, "--out", cache)[0] == 0
    model = load_model(run)[0]
    assert load_encoder(run, load_checkpoint(checkpoint())).rule == (masks.causal if "--no-induction" in flags else masks.induction)
    code, _, error = command(train_phase2.main, *all_weights(run, data, cache, latent, "--valid", data, "--lr", 1e-3))
    assert code == 0, error
    learned, _, reasons = load_model(latent)
    assert reasons["thinking"] == "latent" and reasons["top_k"] == (HIDDEN if "--top-k" in flags else 3) and reasons["compression"] == 2
    assert any(not torch.equal(a, b) for a, b in zip(learned.parameters(), model.parameters()))
    if "--top-k" in flags:
        code, _, error = command(train_phase2.main, *phase2_arguments(run, data, cache, tmp_path / "noisy", "--noise", 1))
        assert code == 1 and "are hidden states" in error


def test_a_student_goes_on_with_another_compression(command, checkpoint, data, tmp_path):
    """With --init phase 2 starts from that student, not from the decoder of its own phase 1."""
    run, cache, student = {}, {}, tmp_path / "student"
    for r in (2, 3):
        run[r], cache[r] = phase1(command, checkpoint, data, tmp_path / f"run-{r}", "--compression", r), tmp_path / f"cache-{r}"
        assert command(cache_latents.main, "--phase1", run[r], "--data", data, "--out", cache[r])[0] == 0
    assert command(train_phase2.main, *all_weights(run[2], data, cache[2], student, "--lr", 1e-3))[0] == 0
    code, _, error = command(train_phase2.main, *all_weights(run[3], data, cache[3], tmp_path / "after", "--init", student, "--lr", 0))
    assert code == 0, error
    (before, *_), (after, _, reasons) = load_model(student), load_model(tmp_path / "after")
    assert reasons["compression"] == 3
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(load_model(run[3])[0].parameters(), after.parameters()))
    other = phase1(command, lambda: checkpoint("qwen2"), data, tmp_path / "other")
    hidden = phase1(command, checkpoint, data, tmp_path / "hidden", "--top-k", HIDDEN)
    for make, of, init, words in ((all_weights, run[3], run[3], "is no run of train_phase2.py"), (all_weights, other, student, "another checkpoint"),
                                  (all_weights, hidden, student, "with top_k 3, and --phase1 with -1"),
                                  (phase2_arguments, run[3], student, "need --all-weights")):
        code, _, error = command(train_phase2.main, *make(of, data, cache[3], tmp_path / "nothing", "--init", init))
        assert code == 1 and words in error and not (tmp_path / "nothing").exists()
