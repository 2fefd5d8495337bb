"""The batched sampler against one-by-one decoding without a cache (the oracle, on transformers)."""

from dataclasses import replace
import gc
import random
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM

from attention import BLOCK, KVCache
from load_hf_weights import load_checkpoint, load_model
import oracle
import sample
from sample import SamplingParams, answer, pick


def Sampling(thinking="latent", top_k=10, max_latents=256, max_new_tokens=512, **more):
    names = dict(
        thinking=thinking, top_k=top_k, max_latents=max_latents, max_new_tokens=max_new_tokens
    )
    return SamplingParams(model="", **names, **more)


def Sampler(model, end_think, end_of_turn, params, batch_size, replace=None):
    return sample.Sampler(model, end_think, end_of_turn, params, batch_size, replace)


def prompts(count, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(260) for _ in range(rng.randint(1, 25))] for _ in range(count)]


@pytest.fixture(scope="module")
def pair(checkpoint):
    """Ours and transformers' float64 model; a lively head, so that rows stop thinking and answering at various times."""
    model = load_checkpoint(checkpoint("qwen3", False), dtype=torch.float64)
    hf = AutoModelForCausalLM.from_pretrained(
        checkpoint("qwen3", False), dtype=torch.float64, attn_implementation="eager"
    )
    return model, hf


def frequent(model, k, count=40):
    """The tokens most often greedily chosen by this random model: as </think> and end of turn, they make rows end."""
    settings = Sampling("latent", k, 12, 8, temperature=0)
    results = Sampler(model, [261], 262, settings, 8).generate(prompts(count))
    firsts = [int(ids[0]) for r in results for ids in r.ids]
    answers = [t for r in results for t in r.tokens]
    common = lambda xs: max(set(xs), key=xs.count)
    return common(firsts), common(answers)


@pytest.mark.parametrize("k", [1, 3])
def test_greedy_equals_one_by_one(pair, k):
    model, hf = pair
    stop, eos = frequent(model, k)
    end_think = [stop, 3, 4]
    settings = Sampling("latent", k, 9, 7, temperature=0)
    batch = prompts(24, seed=1)
    results = Sampler(model, end_think, eos, settings, batch_size=5).generate(
        batch
    )  # fewer rows than prompts: refilled
    counts = {len(r.ids) for r in results}
    assert 9 in counts and len(counts) > 2, (
        counts
    )  # budgets used up, and rows that stop by themselves
    for prompt, r in zip(batch, results):
        thoughts, answer = oracle.think_and_answer(hf, prompt, end_think, eos, k, 9, 7)
        assert r.ids.tolist() == [ids.tolist() for _, ids in thoughts]
        for ours, (theirs, _) in zip(r.probs, thoughts):
            torch.testing.assert_close(ours.double(), theirs, atol=1e-4, rtol=0)
        assert r.tokens + [eos] * r.finished == answer


def test_memory_is_let_go(pair):
    """A sampler that nobody holds any more is gone at once, and its cache with it."""
    held = Sampler(pair[0], [261], 262, Sampling("latent", 3, 2, 2), 2)
    held.generate(prompts(3))
    gone, cache = weakref.ref(held), weakref.ref(held.cache.kv)
    del held
    gc.collect()
    assert gone() is None and cache() is None


def test_nothing_to_do(pair):
    """No prompts; and settings for thinking where nobody thinks."""
    model, _ = pair
    assert Sampler(model, [9], 262, Sampling(), 4).generate([]) == []
    plain = Sampling("none", 3, max_new_tokens=5, temperature=0)
    results = [
        Sampler(model, [9], 262, s, 4).generate(prompts(3))
        for s in (plain, replace(plain, noise=1.0))
    ]
    assert [r.tokens for r in results[0]] == [r.tokens for r in results[1]]


def test_zero_latents(pair):
    """A budget of zero, the mode "none", and rows whose first arg-max is </think> are one and the same."""
    model, hf = pair
    batch = prompts(6, seed=2)
    results = [
        Sampler(model, [9, 8], 262, s, 4).generate(batch)
        for s in (
            Sampling("latent", 3, 0, 5, temperature=0),
            Sampling("none", 3, 9, 5, temperature=0),
        )
    ]
    for prompt, a, b in zip(batch, *results):
        assert len(a.ids) == len(b.ids) == 0 and a.tokens == b.tokens
        assert (
            a.tokens
            == oracle.think_and_answer(hf, prompt, [9, 8], 262, 3, 0, 5)[1][: len(a.tokens)]
        )
    with torch.no_grad():
        first = oracle.run(
            hf,
            hf.get_input_embeddings()(torch.tensor(batch[0])),
            torch.ones(len(batch[0]), len(batch[0])).tril(),
            list(range(len(batch[0]))),
        )
    stop = int((first[-1] @ hf.get_output_embeddings().weight.T).argmax())
    r = Sampler(model, [stop, 8], 262, Sampling("latent", 3, 9, 5, temperature=0), 4).generate(
        batch
    )[0]
    assert len(r.ids) == 0


def test_text_mode_is_plain_generation(pair):
    model, hf = pair
    batch = prompts(5, seed=3)
    for prompt, r in zip(
        batch,
        Sampler(model, [9, 8], 262, Sampling("text", 3, 9, 10, temperature=0), 2).generate(batch),
    ):
        expected = hf.generate(
            torch.tensor([prompt]),
            max_new_tokens=10,
            do_sample=False,
            eos_token_id=262,
            pad_token_id=0,
        )[0, len(prompt) :]
        assert r.tokens + [262] * r.finished == expected.tolist()


def test_sampling_does_not_depend_on_the_batch(pair):
    model, _ = pair
    batch = prompts(12, seed=4)
    settings = Sampling("latent", 3, 4, 6, temperature=1.0, top_p=0.9, seed=5)
    results = [Sampler(model, [9], 262, settings, size).generate(batch) for size in (1, 5, 12)]
    assert results[0][0].tokens and [r.tokens for r in results[0]] == [
        r.tokens for r in results[1]
    ] == [r.tokens for r in results[2]]
    other = Sampler(
        model, [9], 262, Sampling("latent", 3, 4, 6, temperature=1.0, top_p=0.9, seed=6), 5
    ).generate(batch)
    assert [r.tokens for r in other] != [r.tokens for r in results[0]]


def test_replaced_latents(pair):
    """An intervention sees each latent, and what it returns is fed and recorded, the most likely first."""
    model, hf = pair
    batch, seen = prompts(4, seed=5), []

    def swap(sequence, probs, ids):
        seen.append((sequence.number, len(sequence.latents)))
        return torch.tensor([0.1, 0.7, 0.2]), torch.tensor([5, 6, 7])

    E, head = hf.get_input_embeddings().weight, hf.get_output_embeddings().weight
    for prompt, r in zip(
        batch,
        Sampler(model, [9], 262, Sampling("latent", 3, 5, 4, temperature=0), 3, swap).generate(
            batch
        ),
    ):
        assert r.ids.tolist() == [[6, 7, 5]] * len(r.ids) and torch.allclose(
            r.probs, torch.tensor([0.7, 0.2, 0.1])
        )
        with torch.no_grad():
            z = 0.7 * E[6] + 0.2 * E[7] + 0.1 * E[5]
            x = torch.cat([E[torch.tensor(prompt)], z.expand(len(r.ids), -1), E[9:10]])
            h = oracle.run(hf, x, torch.ones(len(x), len(x)).tril(), list(range(len(x))))
            assert r.tokens[0] == int((h[-1] @ head.T).argmax()) or not r.tokens
    assert {n for n, _ in seen} == {0, 1, 2, 3} and max(n for _, n in seen) <= 5


@pytest.mark.parametrize("top_p", [0.3, 0.75, 1.0])
def test_pick(top_p):
    """Frequencies are those of the nucleus, renormalized."""
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log().expand(4000, 4)
    uniform = (torch.arange(4000) + 0.5) / 4000
    got = torch.bincount(pick(logits, uniform, 1.0, top_p), minlength=4) / 4000
    expected = {0.3: [0, 1, 0, 0], 0.75: [0, 2 / 3, 0, 1 / 3], 1.0: [0.1, 0.5, 0.15, 0.25]}[top_p]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float), atol=1e-3, rtol=0)


def test_noise_does_not_depend_on_the_batch(pair):
    """Gumbel noise while thinking: the same for a row whatever runs beside it, of the scale asked for, never </think> on top."""
    model, _ = pair
    batch = prompts(12, seed=6)
    settings = Sampling("latent", 3, 4, 6, temperature=1.0, noise=1.0, seed=5)
    run = lambda settings, size: Sampler(model, [9], 262, settings, size).generate(batch)
    results = [run(settings, size) for size in (1, 5, 12)]
    plain = run(replace(settings, noise=0.0), 12)
    for rows in zip(*results):
        assert all(torch.equal(r.ids, rows[0].ids) and r.tokens == rows[0].tokens for r in rows)
        torch.testing.assert_close(rows[0].probs, rows[1].probs, atol=1e-5, rtol=0)
    by_id = lambda r: r.probs[0][r.ids[0].argsort()]
    noisy = [(by_id(r), by_id(p)) for r, p in zip(results[0], plain) if len(r.ids)]
    assert noisy and all(
        not torch.allclose(a, b) and float((a / b).log().abs().max()) < 4.6 for a, b in noisy
    )
    assert all(
        (r.ids[:, 0] != 9).all() and (r.probs.diff(dim=-1) <= 0).all() for r in results[0]
    )  # the likeliest after noise comes first
    assert any(not torch.equal(r.ids[0], p.ids[0]) for r, p in zip(results[0], plain) if len(r.ids))


def test_many_prompts(checkpoint):
    """10,000 prompts of random length on 512 rows, looked at every 3 steps as on a GPU: every result is its own prompt's."""
    model = load_checkpoint(checkpoint("llama", True))
    rng = random.Random(8)
    different = prompts(200, seed=8)
    which = [rng.randrange(200) for _ in range(10_000)]
    settings = Sampling("latent", 3, 3, 4, temperature=0)
    sampler, order = Sampler(model, [9], 262, settings, 512), []
    results = sampler.generate([different[i] for i in which], done=lambda i, r: order.append(i))
    assert sorted(order) == list(range(10_000))
    alone = Sampler(model, [9], 262, settings, 1).generate(different)
    assert (
        len({(*r.tokens, *r.ids.flatten().tolist()) for r in alone}) > 150
    )  # prompts are told apart by their results
    assert all(
        r.tokens == alone[i].tokens and torch.equal(r.ids, alone[i].ids)
        for r, i in zip(results, which)
    )


def test_display_shows_the_result_as_it_grows(checkpoint, capsys):
    """What a person sees of a problem, piece by piece, is the result."""
    model, tokenizer, _ = load_model(checkpoint())
    settings, seen = Sampling("latent", 3, 4, 9, temperature=1.0), []
    sampler = Sampler(model, tokenizer.end_think, tokenizer.end_of_turn, settings, 1)
    answer(sampler, tokenizer, "1+1")
    shown = capsys.readouterr().out
    watch = lambda i, r: seen.append((len(r.ids), len(r.tokens)))  # noqa: E731
    (result,) = sampler.generate([tokenizer.prompt("1+1")], watch=watch)
    numbered = [line for line in shown.splitlines() if line[:4].strip().isdigit()]
    assert len(result.ids) > 0 and [int(line[:4]) for line in numbered[: len(result.ids)]] == list(
        range(1, len(result.ids) + 1)
    )
    for line, probs, ids in zip(numbered, result.probs.tolist(), result.ids.tolist()):
        assert all(
            f"{tokenizer.decode([i])!r} " in line and f"{p:.2f}" in line for p, i in zip(probs, ids)
        )
    assert tokenizer.decode(result.tokens).rstrip("\N{REPLACEMENT CHARACTER}") in shown
    assert seen == sorted(seen) and seen[0] == (1, 0) and len(set(seen)) > len(result.tokens)


def test_rows_wait_for_room(pair, monkeypatch):
    """With memory for three rows of the cache, the others wait, and nothing else changes."""
    model, _ = pair
    batch, settings = prompts(9, seed=9), Sampling("latent", 3, 4, 5, temperature=0)
    expected = Sampler(model, [9], 262, settings, 9).generate(batch)
    length = BLOCK  # more than a row needs
    monkeypatch.setattr(
        sample,
        "free_memory",
        lambda device: 3.9 / 0.8 * KVCache.bytes_per_row(model.config, length, torch.float64),
    )
    sampler = Sampler(model, [9], 262, settings, 9)
    assert [r.tokens for r in sampler.generate(batch)] == [
        r.tokens for r in expected
    ] and sampler.cache.kv.shape[2] == 3
    assert KVCache.bytes_per_row(model.config, length, torch.float64) * 3 == sampler.cache.kv.nbytes


def test_full_vocabulary(pair):
    """With top-k 0 the next input is the superposition of the whole vocabulary; results keep ten tokens."""
    model, hf = pair
    E, head = hf.get_input_embeddings().weight, hf.get_output_embeddings().weight
    batch = prompts(5, seed=10)
    for prompt, r in zip(
        batch,
        Sampler(model, [261], 262, Sampling("latent", 0, 4, 3, temperature=0), 3).generate(batch),
    ):
        x, size = list(E[torch.tensor(prompt)]), len(r.ids)
        assert size and r.ids.shape == (size, 10)
        with torch.no_grad():
            for probs, ids in zip(r.probs, r.ids):
                h = oracle.run(
                    hf, torch.stack(x), torch.ones(len(x), len(x)).tril(), list(range(len(x)))
                )[-1]
                alpha = (h @ head.T).softmax(-1)
                assert alpha.topk(10).indices.tolist() == ids.tolist()
                torch.testing.assert_close(
                    probs.double(), alpha.topk(10).values, atol=1e-6, rtol=1e-4
                )
                x.append(alpha @ E)


def test_a_tiny_temperature_is_greedy(pair):
    model, _ = pair
    batch = prompts(4, seed=11)
    greedy, tiny = (
        Sampler(model, [9], 262, Sampling("text", max_new_tokens=6, temperature=t), 4).generate(
            batch
        )
        for t in (0, 1e-40)
    )
    assert [r.tokens for r in greedy] == [r.tokens for r in tiny]
