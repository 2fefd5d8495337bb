"""Losses and steps of the three trainings: against the oracle, and the same however a batch is split, stopped and resumed."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
import json
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import textwrap
import types

import pytest
import torch
from transformers import AutoModelForCausalLM

from attention import Runner
import data as data_module
from data import load_examples
from experiments.pipeline import flags
import latents
from lib import files
from load_hf_weights import Reasoning, load_checkpoint, load_model
import load_hf_weights
import lora
import masks
import oracle
import train_phase1
from train_phase1 import Encoder, Phase1
import train_phase2
from train_phase2 import Phase2
import train_sft
import trainer

ROOT = Path(__file__).parent.parent


def theirs(example: data_module.Example) -> oracle.Example:
    return oracle.Example(
        example.prompt[:-3], example.prompt[-3:], example.chain, example.end_think, example.answer
    )


@pytest.fixture
def examples(checkpoint, data):
    _, tokenizer, _ = load_model(checkpoint())
    chosen = load_examples(data, tokenizer)[:6]
    assert len({len(e.chain) for e in chosen}) >= 3
    for e in chosen:
        e.end_think = [5, 6, 7]  # several tokens, as Llama's
    return chosen


def mean_loss(task, examples, row_tokens=10**9):
    """The loss of a step, dealt out to rows, with its gradients."""
    counts, total = task.counts(examples), 0.0
    for indices in data_module.distribute([task.length(e) for e in examples], 1, row_tokens, 1000):
        parts = task(task.pack([examples[i] for i in indices]))
        loss = sum(task.weights[k] * v / counts[k] for k, v in parts.items())
        loss.backward()
        total += loss.item()
    gradients = {n: p.grad.clone() for n, p in task.named_parameters() if p.grad is not None}
    task.zero_grad(set_to_none=True)
    return total, gradients


def lively(model, name):
    torch.manual_seed(len(name))
    for p in lora.adapter_parameters(model, name).values():
        p.data.normal_(0, 0.1)


def merged_hf(directory, model, name):
    """A float64 transformers model with our adapter's updates added to its weights, tracking gradients into `lora_B`."""
    hf = AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float64
    )
    weights = dict(hf.named_parameters())
    for path, linear in lora.projections(model):
        weights[f"model.{path}.weight"].data += linear.adapters[name].delta().detach().double()
    return hf


def phase1_task(directory, r=2, k=3, learns=("encoder", "decoder"), dropout=0.0, **more):
    model = load_checkpoint(directory)
    for name in ("encoder", "decoder"):
        lora.add_adapter(model, name, 4, 8, dropout)
        lively(model, name)
    torch.manual_seed(7)
    run = Runner(model)
    encoder = Encoder(run, r, k, more.pop("no_induction", False))
    encoder.latent_query.data = 0.5 * torch.randn(model.config.hidden_size)
    return Phase1(run, encoder, learns, **more)


def phase2_settings(**more):
    return train_phase2.Settings(data="", out="", phase1="", cache="", **more)


def phase2_task(directory, examples, r=2, k=3, **more):
    model = load_checkpoint(directory)
    lora.add_adapter(model, "student", 4, 8)
    lively(model, "student")
    torch.manual_seed(8)
    with_latents = []
    for e in examples:
        alpha = torch.randn(data_module.num_latents(e, r), model.config.vocab_size).softmax(-1)
        probs, ids = (alpha, alpha[:, :0].long()) if k == 0 else alpha.topk(k)
        with_latents.append(replace(e, alpha=(probs, ids)))
    s = phase2_settings(w_ce=0.7, w_kl=1.3, **more)
    task = Phase2(Runner(model), s, Reasoning("latent", k, r), examples[0].end_think[0])
    return task, with_latents


@pytest.mark.parametrize(
    "kind,tied,r,k",
    [
        ("llama", True, 2, 3),
        ("qwen2", False, 3, 0),
        ("qwen3", True, 1, 10),
        ("llama", False, 100, 1),
    ],
)
def test_phase1_loss(checkpoint, examples, kind, tied, r, k):
    task = phase1_task(checkpoint(kind, tied), r, k)
    hf = [merged_hf(checkpoint(kind, tied), task.model, name) for name in ("encoder", "decoder")]
    query = task.encoder.latent_query.detach().double().requires_grad_(True)
    expected = oracle.phase1_loss(*hf, list(map(theirs, examples)), query, r, k)
    loss, gradients = mean_loss(task, examples)
    assert loss == pytest.approx(expected.item(), abs=1e-4)
    alphas = torch.cat(
        [
            oracle.latents(hf[0], theirs(e), query, r, k, hf[1].get_input_embeddings().weight)[0]
            for e in examples
        ]
    )
    probs = task.encoder(task.pack(examples).encoder)[0]
    for found, wanted in zip(probs.double(), alphas, strict=True):
        torch.testing.assert_close(
            *(x.sort(descending=True)[0] for x in (found, wanted)), atol=1e-4, rtol=0
        )
    expected.backward()
    torch.testing.assert_close(
        gradients["encoder.latent_query"].double(), query.grad, atol=1e-4, rtol=1e-3
    )


@pytest.mark.parametrize("kind,tied,r", [("llama", True, 1), ("qwen2", False, 3)])
def test_segment_loss(checkpoint, examples, kind, tied, r):
    """The cross-entropy of each segment's own tokens, with weights that fall geometrically from 1 to 1/2, under the full softmax at its latent; and its gradient."""
    examples[0].chain[:3] = [7, 7, 9]  # a token twice in a segment
    directory = checkpoint(kind, tied)
    task, without = phase1_task(directory, r, w_segment=0.3), phase1_task(directory, r)
    hf = [merged_hf(directory, task.model, name) for name in ("encoder", "decoder")]
    query, anchors = task.encoder.latent_query.detach().double().requires_grad_(True), []
    for ex in map(theirs, examples):
        alphas = oracle.encode(hf[0], ex, query, r, 0, hf[1].get_input_embeddings().weight)[0]
        for alpha, segment in zip(alphas, oracle.segments(ex.chain, r), strict=True):
            shares = [2.0 ** (-j / max(r - 1, 1)) for j in range(len(segment))]
            anchors.append(
                -sum(
                    share / sum(shares) * alpha[token].log()
                    for share, token in zip(shares, segment)
                )
            )
    expected = torch.stack(anchors).mean()
    (loss, gradients), (loss_without, gradients_without) = (
        mean_loss(task, examples),
        mean_loss(without, examples),
    )
    assert loss - loss_without == pytest.approx(0.3 * expected.item(), abs=1e-4)
    expected.backward()
    name = "encoder.latent_query"
    torch.testing.assert_close(
        (gradients[name] - gradients_without[name]).double(), 0.3 * query.grad, atol=1e-4, rtol=1e-3
    )
    assert (
        phase1_task(directory, r, learns=("decoder",), w_segment=0.3).weights
        == phase1_task(directory, r, learns=("decoder",)).weights
    )


@pytest.mark.parametrize("kind,tied,k", [("llama", True, 3), ("qwen2", False, 0)])
def test_phase2_loss(checkpoint, examples, kind, tied, k):
    task, with_latents = phase2_task(checkpoint(kind, tied), examples, k=k)
    hf = merged_hf(checkpoint(kind, tied), task.model, "student")
    alphas = [
        (probs, torch.arange(probs.shape[1]).expand_as(probs) if not ids.shape[1] else ids)
        for probs, ids in (e.alpha for e in with_latents)
    ]
    expected, ce, kl = oracle.phase2_loss(hf, list(map(theirs, examples)), alphas, 0.7, 1.3)
    assert mean_loss(task, with_latents)[0] == pytest.approx(expected.item(), abs=1e-4)
    parts = task(task.pack(with_latents))
    assert parts["ce"].item() / task.counts(with_latents)["ce"] == pytest.approx(
        ce.item(), abs=1e-4
    )
    assert parts["kl"].item() / len(examples) == pytest.approx(kl.item(), abs=1e-4)


@pytest.mark.parametrize("tied,k", [(True, 3), (False, 0)])
def test_own_latents(checkpoint, examples, tied, k):
    """Fed what the model makes of the position before each cached latent, by the LM head, the loss still asks for the cached ones;
    in evaluation the cached ones are fed."""
    directory = checkpoint("llama", tied)
    task, with_latents = phase2_task(directory, examples, k=k, scheduled_sampling=1.0)
    hf, ce, kl = merged_hf(directory, task.model, "student"), [], []
    E, head = hf.get_input_embeddings().weight, hf.get_output_embeddings().weight
    for e, ex in zip(with_latents, map(theirs, examples)):
        probs, ids = e.alpha
        V, N, start = len(E), len(probs), len(e.prompt) - 1
        alpha = (
            probs.double()
            if k == 0
            else torch.zeros(N, V, dtype=torch.double).scatter(1, ids, probs.double())
        )
        logits = oracle.forward(hf, "latent", ex, 2, alpha @ E)[start : start + N] @ head.T
        kept = (
            torch.ones(N, V, dtype=torch.bool)
            if k == 0
            else logits >= logits.topk(k).values[:, -1:]
        )
        own = logits.masked_fill(~kept, -torch.inf).softmax(-1)
        out = oracle.forward(hf, "latent", ex, 2, own @ E)
        ce += oracle.token_losses(hf, out, oracle.labels("latent", ex, 2))
        log_q = (out[start : start + N] @ head.T).log_softmax(-1)
        kl.append((torch.xlogy(alpha, alpha) - alpha * log_q).sum(-1).mean())
    expected = (0.7 * oracle.mean(ce) + 1.3 * torch.stack(kl).mean()).item()
    assert mean_loss(task, with_latents)[0] == pytest.approx(expected, abs=1e-4)
    model = load_checkpoint(directory)
    gradients = []
    for share in (0.0, 1e-9):  # the pass that makes own latents takes no gradient
        task2 = Phase2(
            Runner(model),
            phase2_settings(scheduled_sampling=share, all_weights=True),
            Reasoning("latent", k, 2),
            0,
        )
        gradients.append(mean_loss(task2, with_latents)[1])
    assert (
        gradients[0].keys() == gradients[1].keys() and "model.embed_tokens.weight" in gradients[0]
    )
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
    task.eval()
    cached, _ = phase2_task(directory, examples, k=k)
    assert (
        mean_loss(task, with_latents)[0]
        == pytest.approx(mean_loss(cached, with_latents)[0], abs=1e-6)
        != pytest.approx(expected, abs=1e-3)
    )


@pytest.mark.parametrize("chain", [True, False])
def test_cot_loss(checkpoint, data, chain):
    model, tokenizer, _ = load_model(checkpoint())
    examples = load_examples(data, tokenizer, chain=chain)[:6]
    hf = AutoModelForCausalLM.from_pretrained(
        checkpoint(), attn_implementation="eager", dtype=torch.float64
    )
    expected = oracle.cot_loss(hf, list(map(theirs, examples)), chain)
    task = train_sft.CoTSFT(Runner(model), checkpoint(), Reasoning())
    assert mean_loss(task, examples)[0] == pytest.approx(expected.item(), abs=1e-4)


def tasks(directory, examples):
    model = load_checkpoint(directory)
    return {
        "cot": (train_sft.CoTSFT(Runner(model), directory, Reasoning()), examples),
        "phase1": (phase1_task(directory, w_segment=1.0), examples),
        "phase2": phase2_task(directory, examples),
    }


@pytest.mark.parametrize("name", ["cot", "phase1", "phase2"])
def test_packing_changes_nothing(checkpoint, examples, name):
    """One row of all examples gives the loss and the gradients of the examples one at a time."""
    task, batch = tasks(checkpoint(), examples)[name]
    loss, gradients = mean_loss(task, batch)
    alone, alone_gradients = mean_loss(task, batch, row_tokens=1)
    assert len(data_module.distribute([task.length(e) for e in batch], 1, 1, 99)) == len(batch)
    assert len(gradients) > 5
    assert loss == pytest.approx(alone, abs=1e-5)
    for n in gradients:
        torch.testing.assert_close(gradients[n], alone_gradients[n], atol=1e-5, rtol=1e-3)


def test_each_phase1_step_trains_what_it_says(checkpoint, examples):
    for step, names in train_phase1.LEARNS.items():
        _, gradients = mean_loss(phase1_task(checkpoint(), learns=names), examples)
        assert {
            n for n in ("encoder", "decoder") if any(f"adapters.{n}." in g for g in gradients)
        } == set(names)
        assert ("encoder.latent_query" in gradients) == ("encoder" in names)


def test_frozen_adapter_has_no_dropout(checkpoint, examples):
    """Dropout acts before the adapters that learn, and before no other."""
    for step, names in train_phase1.LEARNS.items():
        task = phase1_task(checkpoint(), learns=names, dropout=0.5).train()
        row = task.pack(examples)
        for name in ("encoder", "decoder"):
            x = task.model.embed_tokens(row.encoder.ids)
            a, b = (task.runner(x, row.encoder, masks.causal, name) for _ in range(2))
            assert torch.equal(a, b) == (name not in names), step


def test_noise_acts_in_training_only(checkpoint, examples):
    task, batch = phase2_task(checkpoint(), examples, noise=1.0)
    row = task.pack(batch)
    assert not torch.equal(task.train()(row)["kl"], task(row)["kl"])
    assert torch.equal(task.eval()(row)["kl"], task(row)["kl"])


# ---- whole steps, through the commands ----


def sft(checkpoint, data, out, *more):
    settings = dict(batch_size=8, row_tokens=1000, lr=1e-2)
    return [*flags(model=checkpoint(), data=data, out=out, **settings), *more]


def weights(run: Path) -> dict:
    model = load_model(run)[0]
    return {n: p.detach() for n, p in model.named_parameters()}


def torchrun(ranks: int, script: str, *arguments):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
        str(ROOT / script),
    ]
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr


def same(a, b):
    assert a.keys() == b.keys()
    for n in a:
        torch.testing.assert_close(a[n], b[n], atol=1e-5, rtol=0)


def test_one_step_with_any_split(command, checkpoint, data, tmp_path):
    """One optimizer step with 1, 2 and 4 micro-batches, and with 2 ranks, gives the same weights."""
    reference = None
    for rows, row_tokens in ((1, 1000), (2, 250), (4, 120)):
        out = tmp_path / str(rows)
        assert (
            command(
                train_sft.main,
                *sft(checkpoint, data, out, "--max-steps", 1, "--row-tokens", row_tokens),
            )[0]
            == 0
        )
        _, tokenizer, _ = load_model(checkpoint())
        examples = load_examples(data, tokenizer)
        batch = [examples[i] for i in trainer.batch_indices(0, 8, len(examples), 1)]
        lengths = [data_module.num_tokens("cot", e) for e in batch]
        assert len(data_module.distribute(lengths, 1, row_tokens, 99)) == rows
        reference = reference or weights(out)
        same(weights(out), reference)
    torchrun(
        2,
        "train_sft.py",
        *sft(checkpoint, data, tmp_path / "ranks", "--max-steps", 1, "--device", "cpu"),
    )
    same(weights(tmp_path / "ranks"), reference)
    start = {n: p for n, p in load_checkpoint(checkpoint()).named_parameters()}
    assert any((reference[n] - start[n]).abs().max() > 1e-3 for n in start)


def phase1_arguments(checkpoint, data, out, *more):
    return [
        "--steps",
        "encoder",
        *sft(checkpoint, data, out),
        "--lora-rank",
        4,
        "--top-k",
        3,
        *more,
    ]


@pytest.mark.parametrize("flags", [[], ["--shard", "--checkpoint-activations"]])
def test_phase1_ranks(command, checkpoint, data, tmp_path, flags):
    """Phase 1 with 1 and 2 ranks, two steps (the second starts from a B that is no longer zero), of four examples that need
    a row each; also with the layers spread over the ranks."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(sorted(data.read_text().splitlines(keepends=True), key=len)[-4:]))
    lengths = [
        phase1_task(checkpoint()).length(e) for e in load_examples(few, load_model(checkpoint())[1])
    ]
    longest = max(lengths)
    assert len(data_module.distribute(lengths, 2, longest, 99)) == 4
    more = [
        "--steps",
        "joint",
        "--max-steps",
        2,
        "--lora-dropout",
        0,
        "--batch-size",
        4,
        "--row-tokens",
        longest,
    ]
    code, _, error = command(
        train_phase1.main, *phase1_arguments(checkpoint, few, tmp_path / "one", *more)
    )
    assert code == 0, error
    torchrun(
        2,
        "train_phase1.py",
        *phase1_arguments(checkpoint, few, tmp_path / "two", *more, *flags, "--device", "cpu"),
    )
    for step in ("joint",):
        for name in ("encoder", "decoder"):
            same(
                *(
                    files.read_tensors(tmp_path / x / step / f"{name}.safetensors")[0]
                    for x in ("one", "two")
                )
            )
        first, second = (
            files.read_json(tmp_path / x / step / "finished.json") for x in ("one", "two")
        )
        assert first["loss"] == pytest.approx(second["loss"], abs=1e-5)
        one, two = (metrics(tmp_path / x / step) for x in ("one", "two"))
        assert len(one) == len(two) == 2
        for a, b in zip(one, two):
            assert a.keys() == b.keys() >= {"step", "loss", "ce", "lr", "grad_norm"}
            for key in a.keys() - {"tokens_per_s"}:
                assert a[key] == pytest.approx(b[key], abs=1e-4)


def metrics(run: Path) -> list:
    return [json.loads(line) for file in sorted(run.rglob("metrics.jsonl")) for line in file.open()]


def losses(run: Path) -> list:
    return [(m["step"], m["loss"]) for m in metrics(run)]


def test_stop_and_resume(command, checkpoint, data, tmp_path, monkeypatch):
    """A run stopped in step 5 of 8 (dropout on) goes on with the very losses of one that was not stopped; so do the models it keeps."""
    arguments = ["--max-steps", 8, "--lora-dropout", 0.2, "--save-every", 100, "--keep", 3]
    assert (
        command(
            train_phase1.main, *phase1_arguments(checkpoint, data, tmp_path / "whole", *arguments)
        )[0]
        == 0
    )

    real, count = trainer.nn.utils.clip_grad_norm_, [0]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

    def interrupt(*a):  # a Ctrl-C in the middle of the fifth step
        count[0] += 1
        if count[0] == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*a)

    monkeypatch.setattr(trainer.nn.utils, "clip_grad_norm_", interrupt)
    code, printed, _ = command(
        train_phase1.main, *phase1_arguments(checkpoint, data, tmp_path / "stopped", *arguments)
    )
    assert code == 130 and len(losses(tmp_path / "stopped")) == 4
    assert sorted(p.name for p in (tmp_path / "stopped" / "encoder").glob("step-*")) == [
        "step-2",
        "step-4",
    ]
    assert (
        command(
            train_phase1.main, *phase1_arguments(checkpoint, data, tmp_path / "stopped", *arguments)
        )[0]
        == 0
    )
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    for model in (".", "step-2", "step-4", "step-6"):
        a, b = (
            files.read_tensors(tmp_path / x / "encoder" / model / "encoder.safetensors")[0]
            for x in ("stopped", "whole")
        )
        assert all(torch.equal(a[n], b[n]) for n in a)
    last = files.read_tensors(tmp_path / "whole" / "encoder" / "encoder.safetensors")[0]
    assert not torch.equal(a["latent_query"], last["latent_query"])
    moved = shutil.copy(data, tmp_path / "moved.jsonl")  # where the same data lies does not matter
    code, printed, _ = command(
        train_phase1.main, *phase1_arguments(checkpoint, moved, tmp_path / "stopped", *arguments)
    )
    assert code == 0 and "finished already" in printed


def test_phase1_is_one_command(command, checkpoint, data, tmp_path, monkeypatch):
    """Three steps, each from the last. Stopped in the second step, it goes on to the same adapters."""
    flags = [
        "--steps",
        "encoder",
        "decoder",
        "joint",
        "--lr",
        1e-2,
        2e-2,
        3e-2,
        "--max-steps",
        2,
        3,
        4,
        "--save-every",
        0,
    ]
    whole, stopped = (
        phase1_arguments(checkpoint, data, tmp_path / x, *flags) for x in ("whole", "stopped")
    )
    assert command(train_phase1.main, *whole)[0] == 0
    rates = [
        [json.loads(x)["lr"] for x in (tmp_path / "whole" / step / "metrics.jsonl").open()]
        for step in train_phase1.LEARNS
    ]
    assert [len(x) for x in rates] == [2, 3, 4] and [max(x) for x in rates] == [1e-2, 2e-2, 3e-2]
    tensors = lambda run, step, name: files.read_tensors(
        tmp_path / run / step / f"{name}.safetensors"
    )[0]  # noqa: E731
    equal = lambda a, b: all(torch.equal(a[n], b[n]) for n in a)  # noqa: E731
    assert equal(tensors("whole", "encoder", "encoder"), tensors("whole", "decoder", "encoder"))
    assert not equal(tensors("whole", "encoder", "decoder"), tensors("whole", "decoder", "decoder"))
    assert not equal(tensors("whole", "decoder", "encoder"), tensors("whole", "joint", "encoder"))
    model, _, reasoning = load_model(tmp_path / "whole")
    assert reasoning == Reasoning("latent", 3, 2)
    base = load_checkpoint(checkpoint())
    lora.load_adapter(tmp_path / "whole" / "joint" / "decoder.safetensors", base, "decoder")
    lora.merge(base, "decoder")
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), base.parameters(), strict=True)
    )

    real, count = trainer.nn.utils.clip_grad_norm_, [0]

    def killed(*a):
        count[0] += 1
        if count[0] == 5:  # the last step of decoder
            raise RuntimeError("killed")
        return real(*a)

    monkeypatch.setattr(trainer.nn.utils, "clip_grad_norm_", killed)
    code, _, error = command(train_phase1.main, *stopped)
    assert (
        code == 1
        and "RuntimeError in test_training.py" in error
        and not (tmp_path / "stopped" / "finished.json").exists()
    )
    assert (
        command(load_hf_weights.main, "--model", tmp_path / "stopped", "--out", tmp_path / "no")[0]
        == 1
    )
    assert command(train_phase1.main, *stopped)[0] == 0
    assert losses(tmp_path / "whole") == losses(tmp_path / "stopped")
    for name in ("encoder", "decoder"):
        assert equal(tensors("whole", "joint", name), tensors("stopped", "joint", name))


def test_killed_between_saves(checkpoint, data, tmp_path):
    """kill -9 loses only what came after the last save: metrics written since are dropped, the losses repeat."""
    script = textwrap.dedent(f"""
        import os, sys, types; sys.path.insert(0, {str(ROOT)!r})
        import train_phase1, trainer
        real, count, kill = trainer.nn.utils.clip_grad_norm_, [0], sys.argv.pop(1) == "kill"
        def killer(*a):
            count[0] += 1
            if kill and count[0] == 6: os.kill(os.getpid(), 9)
            return real(*a)
        trainer.nn.utils.clip_grad_norm_ = killer
        trainer.time = types.SimpleNamespace(time=lambda: count[0])  # a step takes a second
        train_phase1.main()""")
    arguments = phase1_arguments(
        checkpoint, data, tmp_path / "run", "--max-steps", 7, "--save-every", 3
    )
    go = lambda how: subprocess.run(
        [sys.executable, "-c", script, how, *map(str, arguments)], capture_output=True, text=True
    )
    assert go("kill").returncode == -9
    before = losses(tmp_path / "run")
    assert len(before) == 5
    _, progress = files.read_tensors(tmp_path / "run" / "encoder" / "resume.safetensors")
    assert progress["steps"] == 4
    done = go("go")
    assert done.returncode == 0 and "steps 5 to 7, " in done.stdout
    after = losses(tmp_path / "run")
    assert after[:5] == before and [s for s, _ in after] == list(range(1, 8))


def test_saving_takes_little_of_the_time(command, checkpoint, data, tmp_path, monkeypatch):
    """States are saved again and again, --save-every seconds apart, and for at most a twentieth of the time."""
    clock, saves, takes = [0.0], [], 7

    def slow_save(self):
        clock[0] += takes
        saves.append(self.progress["steps"])
        real(self)

    def tick(*a):
        clock[0] += 2
        return clip(*a)

    real, clip = trainer.Trainer.save, trainer.nn.utils.clip_grad_norm_
    monkeypatch.setattr(trainer.Trainer, "save", slow_save)
    monkeypatch.setattr(trainer.nn.utils, "clip_grad_norm_", tick)
    monkeypatch.setattr(trainer.time, "time", lambda: clock[0])
    for takes, more, expected in (
        (7, ["--max-steps", 160], [1, 68, 135, 160]),  # a save of 7 is due every 140; the end
        (7, ["--max-steps", 160, "--save-every", 200], [1, 98, 160]),
        (0, ["--max-steps", 20, "--save-every", 13], [1, 8, 15, 20]),
        (0, ["--max-steps", 4, "--save-every", 0], [1, 2, 3, 4]),
    ):
        saves.clear()
        out = tmp_path / "-".join(map(str, [takes, *more]))
        assert command(train_sft.main, *sft(checkpoint, data, out, *more))[0] == 0
        assert saves == expected


def test_a_run_that_died_at_its_very_end(command, checkpoint, data, tmp_path, monkeypatch):
    """Killed after its last save: the same command finishes it."""

    def full(*a):
        raise files.UserError("no room")

    with monkeypatch.context() as m:
        m.setattr(trainer, "write_json", full)
        assert (
            command(train_sft.main, *sft(checkpoint, data, tmp_path / "run", "--max-steps", 2))[0]
            == 1
        )
    again = sft(checkpoint, data, tmp_path / "run", "--max-steps", 2)
    assert command(train_sft.main, *again)[0] == 0
    finished = files.read_json(tmp_path / "run" / "finished.json")
    assert finished["steps"] == 2 and finished["loss"] == losses(tmp_path / "run")[-1][1]
    assert not (tmp_path / "run" / "resume.safetensors").exists()


def test_learning_rate_and_order():
    rates = [trainer.learning_rate(s, 100, 2.0, 0.05) for s in range(100)]
    assert rates[0] == pytest.approx(0.4) and rates[4] == max(rates) == 2.0 and 0 < rates[-1] < 0.01
    assert all(a > b for a, b in zip(rates[4:], rates[5:]))
    seen = [i for step in range(5) for i in trainer.batch_indices(step, 8, 20, seed=3)]
    assert sorted(seen[:20]) == sorted(seen[20:]) == list(range(20)) and seen[:20] != seen[20:]


def test_every_rank_gets_as_many_rows():
    """Each example counts once."""

    class Numbers(trainer.Task):
        def length(self, example):
            return example

        def pack(self, examples, shape=None):
            assert shape.tokens == 20
            return examples

    with ThreadPoolExecutor(1) as packer:
        for count in range(3, 25, 3):  # ranks have equal shares of a batch
            shares = []
            for rank in range(3):
                part = types.SimpleNamespace(
                    task=Numbers(),
                    packer=packer,
                    shape=data_module.RowShape(20, 99),
                    process=types.SimpleNamespace(rank=rank, world=3),
                )
                shares.append(trainer.Trainer.rows(part, list(range(10, 10 + count))))
            assert len({len(rows) for rows in shares}) == 1
            real = [e for rows in shares for row in rows for e in row.result()]
            assert sorted(real) == list(range(10, 10 + count))


def test_what_the_optimizer_does(command, checkpoint, data, tmp_path, monkeypatch):
    seen, real = [], torch.optim.AdamW.step

    def step(self):
        (group,) = self.param_groups
        norm = sum(p.grad.square().sum() for p in group["params"]) ** 0.5
        seen.append((group["lr"], group["weight_decay"], group["betas"], float(norm)))
        return real(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    assert (
        command(train_sft.main, *sft(checkpoint, data, tmp_path / "run", "--max-steps", 3))[0] == 0
    )
    lines = metrics(tmp_path / "run")
    assert max(m["grad_norm"] for m in lines) > 1.1
    for m, (lr, decay, betas, norm) in zip(lines, seen, strict=True):
        assert (lr, decay, betas) == (m["lr"], 0.01, (0.9, 0.95))
        assert norm == pytest.approx(min(m["grad_norm"], 1), rel=1e-4)


def test_seed_step_and_rank_draw_anew(monkeypatch):
    drawn = []
    monkeypatch.setattr(trainer.torch, "manual_seed", drawn.append)
    for seed, step, rank in ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1)):
        s, process = types.SimpleNamespace(seed=seed), types.SimpleNamespace(rank=rank)
        part = types.SimpleNamespace(s=s, process=process, task=None, backward=lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.Trainer.step(part, step, [], [])
    assert len({*drawn}) == 4


def test_epochs(command, checkpoint, data, tmp_path):
    """40 examples, 8 a step: 0.3 epochs are a step and a half, so two."""
    assert (
        command(train_sft.main, *sft(checkpoint, data, tmp_path / "run", "--epochs", 0.3))[0] == 0
    )
    assert len(metrics(tmp_path / "run")) == 2


def test_order_depends_on_the_seed():
    assert trainer.batch_indices(0, 8, 20, 3) != trainer.batch_indices(0, 8, 20, 4)


def test_time_goes_on(command, checkpoint, data, tmp_path, monkeypatch):
    clock, clip = [0], trainer.nn.utils.clip_grad_norm_

    def tick(*a):
        clock[0] += 1
        if clock[0] == 3:
            raise RuntimeError
        return clip(*a)

    monkeypatch.setattr(trainer.nn.utils, "clip_grad_norm_", tick)
    monkeypatch.setattr(trainer.time, "time", lambda: clock[0])
    arguments = sft(checkpoint, data, tmp_path / "run", "--max-steps", 4, "--save-every", 0)
    assert [command(train_sft.main, *arguments)[0] for _ in range(2)] == [1, 0]
    assert files.read_json(tmp_path / "run" / "finished.json")["seconds"] == 4


def test_all_weights_gradient_of_the_embedding(checkpoint, examples):
    directory, r = checkpoint("qwen3", False), 2
    model = load_checkpoint(directory)
    hf = AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float64
    )
    with_latents, alphas = [], []
    for e in examples:
        alphas.append(torch.randn(len(oracle.segments(e.chain, r)), 272).softmax(-1).topk(4))
        with_latents.append(replace(e, alpha=(alphas[-1][0], alphas[-1][1])))
    task = Phase2(Runner(model), phase2_settings(all_weights=True), Reasoning("latent", 4, r), 0)
    _, gradients = mean_loss(task, with_latents)
    oracle.phase2_loss(hf, list(map(theirs, examples)), alphas)[0].backward()
    expected = hf.get_input_embeddings().weight.grad
    torch.testing.assert_close(
        gradients["model.embed_tokens.weight"].double(), expected, atol=1e-4, rtol=1e-3
    )


def test_noise_is_input_and_target(checkpoint, examples):
    task, batch = phase2_task(checkpoint(), examples, noise=0.7, noise_temperature=1.5)
    row = task.pack(batch)
    torch.manual_seed(3)
    noisy = task.train()(row)
    torch.manual_seed(3)
    g = latents.gumbel_like(row.probs)
    row.probs = latents.add_noise(row.probs, row.ids, g, task.end_think, 0.7, 1.5)
    plain = task.eval()(row)
    assert all(torch.equal(noisy[key], plain[key]) for key in plain)


def test_own_latents_are_drawn_by_example_and_without_dropout(checkpoint, examples):
    task, batch = phase2_task(checkpoint(), examples, scheduled_sampling=0.5)
    for _, linear in lora.projections(task.model):
        linear.adapters["student"].dropout = 0.5
    batch, row = task.pack(batch), task.pack(batch).row
    E = task.model.embed_tokens.weight
    x = task.model.embed_tokens(row.ids)
    x = x.index_copy(0, row.latent_index, latents.superpose(batch.probs, batch.ids, E))
    task.train()
    states = []
    for _ in range(20):
        new = task.with_own_latents(x, row, E)
        changed = (new != x).any(-1)[row.latent_index]
        by_example = changed.split(torch.bincount(row.labels.document[row.latent_index]).tolist())
        assert all(c.all() or not c.any() for c in by_example)
        states += new[row.latent_index][:1].detach()
    assert len(torch.stack(states).unique(dim=0)) == 2  # the cached one and the own one


def test_latent_query_starts_as_the_mean_embedding(checkpoint):
    model = load_checkpoint(checkpoint())
    query = train_phase1.Encoder(Runner(model), 2, 3).latent_query
    torch.testing.assert_close(query.data, model.embed_tokens.weight.mean(0))


def test_no_chain(command, checkpoint, data, tmp_path, monkeypatch):
    seen, real = [], train_sft.train
    monkeypatch.setattr(
        train_sft,
        "train",
        lambda task, examples, *a: seen.extend(examples) or real(task, examples, *a),
    )
    assert (
        command(
            train_sft.main, *sft(checkpoint, data, tmp_path / "run", "--max-steps", 1, "--no-chain")
        )[0]
        == 0
    )
    assert len(seen) == 40 and not any(e.chain for e in seen)
    assert load_model(tmp_path / "run")[2].thinking == "none"


def test_tokens_of_an_example(checkpoint, tmp_path):
    line = {"problem": "1+1", "cot": "<think>2</think>", "cot_answer": "\\boxed{2}"}
    (tmp_path / "x.jsonl").write_text(json.dumps(line))
    t = load_model(checkpoint())[1]
    (e,) = data_module.load_examples(tmp_path / "x.jsonl", t)
    assert (e.prompt, e.chain, e.end_think) == (t.prompt("1+1"), t.encode("2"), t.end_think)
    assert e.answer == [*t.encode("\\boxed{2}"), t.end_of_turn]
