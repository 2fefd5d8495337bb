"""The batched sampler against one-by-one decoding without a cache (the oracle, on transformers)."""

from dataclasses import replace
import gc
import random
import weakref

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from load_hf_weights import Reasoning, load_checkpoint, load_model
import oracle
import sample
from sample import SamplingParams, pick


def Sampling(thinking="latent", top_k=10, max_latents=256, max_new_tokens=512, **more):
    names = dict(max_latents=max_latents, max_new_tokens=max_new_tokens)
    return Reasoning(thinking, top_k), SamplingParams(model="", **names, **more)


class InOrder(sample.Sampler):
    """A sampler whose results come in the order of the prompts."""

    def generate(self, prompts, numbers=None, watch=None):
        pairs = [*super().generate(prompts, numbers, watch)]
        numbers = numbers or range(len(prompts))
        assert sorted(n for n, _ in pairs) == sorted(numbers)
        return [dict(pairs)[n] for n in numbers]


def Sampler(model, end_think, end_of_turn, settings, batch_size, replace=None):
    reasoning, params = settings
    return InOrder(model, reasoning, (end_think, end_of_turn), params, batch_size, replace)


def ids_of(r):
    """The tokens of each latent, as lists."""
    return [ids.tolist() for _, ids in r.latents]


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
    firsts = [ids[0] for r in results for ids in ids_of(r)]
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
    counts = {len(r.latents) for r in results}
    assert 9 in counts and len(counts) > 2, (
        counts
    )  # budgets used up, and rows that stop by themselves
    for prompt, r in zip(batch, results):
        thoughts, answer = oracle.think_and_answer(hf, prompt, end_think, eos, k, 9, 7)
        assert ids_of(r) == [ids.tolist() for _, ids in thoughts]
        for (ours, ids), (theirs, _) in zip(r.latents, thoughts):
            assert (ours.dtype, ids.dtype) == (np.float32, np.int64)
            torch.testing.assert_close(torch.from_numpy(ours).double(), theirs, atol=1e-4, rtol=0)
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
        for s in (plain, (plain[0], replace(plain[1], noise=1.0)))
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
        assert len(a.latents) == len(b.latents) == 0 and a.tokens == b.tokens
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
    assert len(r.latents) == 0


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
    """An intervention sees each latent, and what it returns is fed and recorded, as it is."""
    model, hf = pair
    batch, seen = prompts(4, seed=5), []

    def swap(sequence, probs, ids):
        assert (probs.dtype, ids.dtype) == (np.float32, np.int64)
        assert probs.shape == ids.shape == (3,) and isinstance(sequence.rng, np.random.Generator)
        seen.append((sequence.number, len(sequence.latents)))
        return np.array([0.1, 0.7, 0.2]), np.array([5, 6, 7])

    E, head = hf.get_input_embeddings().weight, hf.get_output_embeddings().weight
    for prompt, r in zip(
        batch,
        Sampler(model, [9], 262, Sampling("latent", 3, 5, 4, temperature=0), 3, swap).generate(
            batch
        ),
    ):
        assert ids_of(r) == [[5, 6, 7]] * len(r.latents)
        assert all(np.allclose(probs, [0.1, 0.7, 0.2]) for probs, _ in r.latents)
        with torch.no_grad():
            z = 0.7 * E[6] + 0.2 * E[7] + 0.1 * E[5]
            x = torch.cat([E[torch.tensor(prompt)], z.expand(len(r.latents), -1), E[9:10]])
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
    plain = run((settings[0], replace(settings[1], noise=0.0)), 12)
    for rows in zip(*results):
        assert all(ids_of(r) == ids_of(rows[0]) and r.tokens == rows[0].tokens for r in rows)
        for (a, _), (b, _) in zip(rows[0].latents, rows[1].latents):
            np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)
    by_id = lambda r: r.latents[0][0][r.latents[0][1].argsort()]
    noisy = [(by_id(r), by_id(p)) for r, p in zip(results[0], plain) if r.latents]
    assert noisy and all(
        not np.allclose(a, b) and np.abs(np.log(a / b)).max() < 4.6 for a, b in noisy
    )
    assert all(
        ids[0] != 9 and (np.diff(probs) <= 0).all() for r in results[0] for probs, ids in r.latents
    )  # the likeliest after noise comes first
    assert any(ids_of(r)[0] != ids_of(p)[0] for r, p in zip(results[0], plain) if r.latents)


def test_many_prompts(checkpoint):
    """10,000 prompts of random length on 512 rows, looked at every 3 steps as on a GPU: every result is its own prompt's."""
    model = load_checkpoint(checkpoint("llama", True))
    rng = random.Random(8)
    different = prompts(200, seed=8)
    which = [rng.randrange(200) for _ in range(10_000)]
    settings = Sampling("latent", 3, 3, 4, temperature=0)
    sampler = Sampler(model, [9], 262, settings, 512)
    results = sampler.generate([different[i] for i in which])  # it looks that each comes once
    assert len(results) == 10_000
    alone = Sampler(model, [9], 262, settings, 1).generate(different)
    assert (
        len({(*r.tokens, *sum(ids_of(r), [])) for r in alone}) > 150
    )  # prompts are told apart by their results
    assert all(
        r.tokens == alone[i].tokens and ids_of(r) == ids_of(alone[i])
        for r, i in zip(results, which)
    )


def test_display_shows_the_result_as_it_grows(thinker, command):
    """What a person sees of a problem, piece by piece, is the result; of several, one after the other."""
    directory, problems = thinker("latent", 3), ["1+1", "2*3"]
    budgets = ["--max-latents", 4, "--max-new-tokens", 9, "--temperature", 1]
    code, both, error = command(
        sample.main, "--model", directory, "--prompt", *problems, *budgets, "--device", "cpu"
    )
    assert code == 0, error
    _, shown, _ = command(
        sample.main, "--model", directory, "--prompt", "1+1", *budgets, "--device", "cpu"
    )
    model, tokenizer, reasoning = load_model(directory)
    settings, seen = Sampling("latent", 3, 4, 9, temperature=1.0), []
    assert (reasoning.thinking, reasoning.top_k) == ("latent", 3)
    sampler = Sampler(model, tokenizer.end_think, tokenizer.end_of_turn, settings, 1)
    watch = lambda r: seen.append((len(r.latents), len(r.tokens)))  # noqa: E731
    (result,) = sampler.generate([tokenizer.prompt("1+1")], watch=watch)
    (second,) = sampler.generate([tokenizer.prompt("2*3")], [1])
    assert both.startswith(shown)
    for r, text in ((result, shown), (second, both.removeprefix(shown))):
        numbered = [line for line in text.splitlines() if line[:4].strip().isdigit()]
        count = len(r.latents)
        assert count > 0 and [int(line[:4]) for line in numbered[:count]] == list(
            range(1, count + 1)
        )
        for line, (probs, ids) in zip(numbered, r.latents):
            assert all(
                f"{tokenizer.decode([i])!r} " in line and f"{p:.2f}" in line
                for p, i in zip(probs, ids)
            )
        assert tokenizer.decode(r.tokens).rstrip("\N{REPLACEMENT CHARACTER}") in text
        assert ("[budget used up]" in text) != r.finished
    assert seen == sorted(seen) and seen[0] == (1, 0) and len(set(seen)) > len(result.tokens)


def test_full_vocabulary(pair):
    """With top-k 0 the next input is the superposition of the whole vocabulary; results keep ten tokens."""
    model, hf = pair
    E, head = hf.get_input_embeddings().weight, hf.get_output_embeddings().weight
    batch = prompts(5, seed=10)
    for prompt, r in zip(
        batch,
        Sampler(model, [261], 262, Sampling("latent", 0, 4, 3, temperature=0), 3).generate(batch),
    ):
        x = list(E[torch.tensor(prompt)])
        assert r.latents and all(probs.shape == ids.shape == (10,) for probs, ids in r.latents)
        with torch.no_grad():
            for probs, ids in r.latents:
                h = oracle.run(
                    hf, torch.stack(x), torch.ones(len(x), len(x)).tril(), list(range(len(x)))
                )[-1]
                alpha = (h @ head.T).softmax(-1)
                assert alpha.topk(10).indices.tolist() == ids.tolist()
                torch.testing.assert_close(
                    torch.from_numpy(probs).double(), alpha.topk(10).values, atol=1e-6, rtol=1e-4
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


def test_sampling_does_not_change_the_thoughts(pair):
    model, _ = pair
    stop, eos = frequent(model, 3)
    greedy, hot = (
        Sampler(
            model, [stop, 3], eos, Sampling("latent", 3, 9, 2, temperature=t, top_p=1.0), 5
        ).generate(prompts(24, 1))
        for t in (0, 5)
    )
    assert [ids_of(r) for r in greedy] == [ids_of(r) for r in hot]


def test_noise_depends_on_the_seed(pair):
    a, b = (
        Sampler(
            pair[0], [9], 262, Sampling("latent", 3, 4, 2, temperature=0, noise=1.0, seed=s), 5
        ).generate(prompts(4))
        for s in (5, 6)
    )
    assert any((x.latents[0][0] != y.latents[0][0]).any() for x, y in zip(a, b))


def test_temperature_of_pick():
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log().expand(4000, 4)
    uniform = (torch.arange(4000) + 0.5) / 4000
    got = torch.bincount(sample.pick(logits, uniform, 0.5, 1.0), minlength=4) / 4000
    squares = torch.tensor([0.1, 0.5, 0.15, 0.25]) ** 2
    torch.testing.assert_close(got, squares / squares.sum(), atol=1e-3, rtol=0)


def test_top_p_is_used(pair):
    greedy, narrow = (
        Sampler(
            pair[0], [9], 262, Sampling("text", max_new_tokens=6, temperature=t, top_p=1e-6), 4
        ).generate(prompts(4))
        for t in (0, 1)
    )
    assert [r.tokens for r in greedy] == [r.tokens for r in narrow]


def test_each_token_has_its_own_random_number(pair, monkeypatch):
    seen, real = [], sample.pick
    monkeypatch.setattr(
        sample, "pick", lambda logits, u, *a: seen.append(float(u)) or real(logits, u, *a)
    )
    Sampler(pair[0], [9], 300, Sampling("text", max_new_tokens=20, temperature=1.0), 1).generate(
        prompts(1)
    )
    assert len({*seen}) == len(seen) >= 20


def test_memory_for_the_whole_budget(pair):
    settings = Sampling("text", max_latents=0, max_new_tokens=200, temperature=0)
    (r,) = Sampler(pair[0], [9], 300, settings, 1).generate(prompts(1))  # 300 is no token
    assert len(r.tokens) == 200


def test_memory_grows(pair):
    settings = Sampling("text", max_latents=0, max_new_tokens=5, temperature=0)
    sampler = Sampler(pair[0], [9], 262, settings, 1)
    sampler.generate([[1]])
    long = [[i % 250 for i in range(200)]]
    fresh = Sampler(pair[0], [9], 262, settings, 1).generate(long)
    assert sampler.generate(long)[0].tokens == fresh[0].tokens


def test_noise_temperature_of_the_sampler(pair):
    plain, flat = (
        Sampler(
            pair[0], [261], 262, Sampling("latent", 3, 1, 1, temperature=0, **more), 4
        ).generate(prompts(4))
        for more in ({}, {"noise": 1e-6, "noise_temperature": 2.0})
    )
    for a, b in zip(plain, flat):
        roots = a.latents[0][0] ** 0.5
        np.testing.assert_allclose(b.latents[0][0], roots / roots.sum(), atol=1e-4)
