"""The latent cache: what phase 1 computes is what is stored, and phase 2 refuses what does not fit."""

import json

import pytest
import torch

import cache_latents
from attention import Runner
from data import load_examples, num_latents, pack_examples
from experiments.pipeline import flags
from lib import files
from load_hf_weights import Reasoning, fingerprint, load_checkpoint, load_model
import lora
import train_phase1
import train_phase2
from train_phase1 import load_encoder


SMALL = dict(batch_size=8, row_tokens=1000, lora_rank=4)


def phase1(command, checkpoint, data, out, *more):
    settings = flags(model=checkpoint(), data=data, out=out, max_steps=3, top_k=3, lr=1e-2, **SMALL)
    code, _, error = command(train_phase1.main, "--steps", "encoder", *settings, *more)
    assert code == 0, error
    return out


@pytest.fixture
def run(command, checkpoint, data, tmp_path):
    return phase1(command, checkpoint, data, tmp_path / "run")


def phase2_arguments(run, data, cache, out, *more):
    return [*flags(phase1=run, cache=cache, data=data, out=out, max_steps=2, **SMALL), *more]


@pytest.mark.parametrize("k", [3, 0])
def test_cached_latents_are_those_of_phase1(command, checkpoint, data, tmp_path, monkeypatch, k):
    monkeypatch.setattr(cache_latents, "SHARD", 7)  # several shards
    run = phase1(command, checkpoint, data, tmp_path / "run", "--top-k", k)
    code, _, error = command(
        cache_latents.main,
        "--phase1",
        run,
        "--data",
        data,
        "--out",
        tmp_path / "cache",
        "--row-tokens",
        300,
    )
    assert code == 0, error
    assert len(list((tmp_path / "cache").glob("shard-*"))) == 6
    model, tokenizer, _ = load_model(checkpoint())
    encoder, examples = load_encoder(run, Runner(model)), load_examples(data, tokenizer)
    expected = json.loads((tmp_path / "cache" / "cache.json").read_text())
    found, cached = cache_latents.read_cache(tmp_path / "cache", expected)
    assert found == expected and found["compression"] == 2 and found["top_k"] == k
    assert len(cached) == len(examples) == 40
    for example, (probs, ids) in zip(examples, cached):
        with torch.no_grad():
            alpha, top, _ = encoder(pack_examples("encoder", [example], 2))
        assert len(probs) == num_latents(example, 2) and probs.dtype == torch.float16
        torch.testing.assert_close(probs.float(), alpha, atol=1e-3, rtol=0)
        assert (ids.shape[1] == 0 and k == 0) or (
            ids.dtype == torch.int32 and torch.equal(ids.long(), top)
        )


def test_multiplexed_latents(command, checkpoint, data, tmp_path):
    """alpha_j is proportional to rho^j, a token that occurs twice has both weights; phase 2 learns them."""
    cache, r, rho = tmp_path / "cache", 3, 0.7
    start = flags(model=checkpoint(), data=data, out=cache, multiplex=rho, compression=r)
    assert command(cache_latents.main, *start)[0] == 0
    _, tokenizer, _ = load_model(checkpoint())
    examples = load_examples(data, tokenizer)
    _, cached = cache_latents.read_cache(cache, {})
    for example, (probs, ids) in zip(examples, cached, strict=True):
        assert len(probs) == num_latents(example, r)
        for n, alpha in enumerate(zip(probs.tolist(), ids.tolist())):
            part = example.chain[n * r : (n + 1) * r]
            total, found = sum(rho**j for j in range(len(part))), dict.fromkeys(part, 0.0)
            for p, token in zip(*alpha):
                assert token in part or p == 0
                found[token] = max(p, found.get(token, 0))  # one entry for each token
            for token in part:
                both = sum(rho**j for j, other in enumerate(part) if other == token)
                assert found[token] == pytest.approx(both / total, abs=1e-3)
    out = tmp_path / "latent"
    more = flags(model=checkpoint(), cache=cache, data=data, out=out, max_steps=4, lr=1e-2, **SMALL)
    code, _, error = command(train_phase2.main, *more)
    assert code == 0, error
    first, *_, last = [
        json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()
    ]
    assert 0 < last["kl"] < first["kl"]
    assert load_model(out)[2] == Reasoning("latent", 10, r)
    for main, *both in (
        (train_phase2.main, *more, "--phase1", "x"),
        (cache_latents.main, *start, "--phase1", "x"),
    ):
        code, _, error = command(main, *both)
        assert code == 1 and "name either --phase1" in error


def test_phase2_refuses_what_does_not_fit(command, checkpoint, data, run, tmp_path):
    cache, out = tmp_path / "cache", tmp_path / "latent"
    assert command(cache_latents.main, "--phase1", run, "--data", data, "--out", cache)[0] == 0
    other_data = tmp_path / "other.jsonl"
    other_data.write_text(data.read_text().replace("boxed{1", "boxed{2"))
    shorter = tmp_path / "shorter.jsonl"
    shorter.write_text("".join(data.open().readlines()[:30]))
    other_run = phase1(command, checkpoint, data, tmp_path / "other", "--seed", 2)
    other_base = phase1(command, lambda: checkpoint("qwen3", True), data, tmp_path / "base")
    for arguments, words in (
        (phase2_arguments(run, other_data, cache, out), "data_hash is"),
        (phase2_arguments(run, shorter, cache, out), "count is 40 in the cache and 30 here"),
        (phase2_arguments(other_run, data, cache, out), "encoder is"),
        (phase2_arguments(other_base, data, cache, out), "encoder is"),
        (phase2_arguments(run, data, tmp_path / "nowhere", out), "is not a finished cache"),
        (flags(model=checkpoint(), cache=cache, data=data, out=out), "and None here"),
    ):
        code, _, error = command(train_phase2.main, *arguments)
        assert code == 1 and words in error and error.count("\n") == 1, error
        assert not out.exists()
    assert (
        command(
            train_phase2.main,
            *phase2_arguments(run, data, cache, out, "--noise", 1),
        )[0]
        == 0
    )
    assert (out / "student.safetensors").exists()
    last = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][-1]
    assert {"ce", "kl"} <= last.keys()


def test_a_damaged_or_unfinished_cache_is_refused(command, data, run, tmp_path):
    cache = tmp_path / "cache"
    assert command(cache_latents.main, "--phase1", run, "--data", data, "--out", cache)[0] == 0
    shard = cache / "shard-00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    code, _, error = command(
        train_phase2.main, *phase2_arguments(run, data, cache, tmp_path / "latent")
    )
    assert code == 1 and "shard-00000.safetensors: cannot be read" in error
    shard.unlink()
    code, _, error = command(
        train_phase2.main, *phase2_arguments(run, data, cache, tmp_path / "latent")
    )
    assert code == 1 and "shards are missing" in error
    (cache / "cache.json").unlink()  # as if it had been stopped: it goes on, and ends the same
    assert command(cache_latents.main, "--phase1", run, "--data", data, "--out", cache)[0] == 0
    assert shard.read_bytes() == whole


def test_the_cache_refuses_an_output_of_another_run(command, checkpoint, data, run, tmp_path):
    cache = tmp_path / "cache"
    assert command(cache_latents.main, "--phase1", run, "--data", data, "--out", cache)[0] == 0
    for name, *more in (("rate", "--compression", 3), ("seed", "--seed", 2)):
        other = ["--phase1", phase1(command, checkpoint, data, tmp_path / name, *more)]
        code, _, error = command(cache_latents.main, *other, "--data", data, "--out", cache)
        assert code == 1 and "was made with " in error, name


def mux_student(command, checkpoint, data, tmp_path, out, *more):
    cache = tmp_path / "cache"
    assert command(cache_latents.main, *flags(model=checkpoint(), data=data, out=cache))[0] == 0
    arguments = flags(
        model=checkpoint(),
        cache=cache,
        data=data,
        out=tmp_path / out,
        max_steps=1,
        batch_size=8,
        lora_rank=4,
    )
    code, _, error = command(train_phase2.main, *arguments, *more)
    assert code == 0, error
    return files.read_tensors(tmp_path / out / "student.safetensors")


def test_phase2_is_seeded(command, checkpoint, data, tmp_path):
    a, b = (mux_student(command, checkpoint, data, tmp_path, x)[0] for x in "ab")
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_lora_alpha_is_twice_the_rank(command, checkpoint, data, tmp_path):
    assert mux_student(command, checkpoint, data, tmp_path, "a")[1] == {"rank": 4, "alpha": 8}
    run = phase1(command, checkpoint, data, tmp_path / "run")
    for name in ("encoder", "decoder"):
        assert files.read_tensors(run / "encoder" / f"{name}.safetensors")[1] == {
            "rank": 4,
            "alpha": 8,
        }


def test_encoder_of_the_last_step(command, checkpoint, data, tmp_path):
    more = ["--steps", "encoder", "joint"]
    run = phase1(command, checkpoint, data, tmp_path / "run", *more)
    encoder = train_phase1.load_encoder(run, Runner(load_checkpoint(checkpoint())))
    last = files.read_tensors(run / "joint" / "encoder.safetensors")[0]
    assert torch.equal(encoder.latent_query, last["latent_query"])


def test_a_cache_of_other_last_step_is_refused(command, checkpoint, data, tmp_path):
    run, cache = (
        phase1(command, checkpoint, data, tmp_path / "run", "--steps", "encoder", "joint"),
        tmp_path / "cache",
    )
    assert command(cache_latents.main, "--phase1", run, "--data", data, "--out", cache)[0] == 0
    file = run / "joint" / "encoder.safetensors"
    tensors, metadata = files.read_tensors(file)
    files.write_tensors(file, tensors | {"latent_query": 2 * tensors["latent_query"]}, metadata)
    code, _, error = command(
        train_phase2.main, *phase2_arguments(run, data, cache, tmp_path / "out")
    )
    assert code == 1 and "encoder is" in error


def test_the_cache_is_finished_last(command, checkpoint, data, tmp_path, monkeypatch):
    seen, out = [], tmp_path / "cache"
    monkeypatch.setattr(
        cache_latents,
        "barrier",
        lambda: seen.append(sorted(x.suffix for x in out.glob("[!.]*") if x.name != "config.json")),
    )
    assert command(cache_latents.main, *flags(model=checkpoint(), data=data, out=out))[0] == 0
    assert seen == [[".safetensors"]]


def test_a_student_has_both_adapters(command, checkpoint, data, tmp_path):
    run, cache, out = (tmp_path / x for x in ("run", "cache", "out"))
    phase1(command, checkpoint, data, run, "--steps", "joint")
    assert command(cache_latents.main, "--phase1", run, "--data", data, "--out", cache)[0] == 0
    assert command(train_phase2.main, *phase2_arguments(run, data, cache, out))[0] == 0
    expected = load_checkpoint(checkpoint())
    for file in (run / "joint" / "decoder.safetensors", out / "student.safetensors"):
        lora.load_adapter(file, expected, "x")
        lora.merge(expected, "x")
    assert all(
        torch.equal(a, b)
        for a, b in zip(load_model(out)[0].parameters(), expected.parameters(), strict=True)
    )


def test_the_fingerprint_holds_the_adapters(command, checkpoint, data, tmp_path):
    run = phase1(command, checkpoint, data, tmp_path / "run")
    before, file = fingerprint(run), run / "encoder" / "decoder.safetensors"
    tensors, metadata = files.read_tensors(file)
    files.write_tensors(file, {n: t + 1 for n, t in tensors.items()}, metadata)
    assert fingerprint(run) != before
