"""Every script on a real pretrained model (LATENT_SFT_MODEL, a checkpoint directory): losses fall, the export answers alike.

LATENT_SFT_DATA may name a folder with gsm8k-train.jsonl; else a few problems written for this test are used.
"""

import json
import os
from pathlib import Path

import pytest
import torch

import cache_latents
import eval as evaluation
from experiments.pipeline import flags
import load_hf_weights
from load_hf_weights import load_model
import sample
from lib.tokenizer import Tokenizer
import train_phase1
import train_phase2
import train_sft

pytestmark = pytest.mark.skipif(
    "LATENT_SFT_MODEL" not in os.environ, reason="LATENT_SFT_MODEL names no checkpoint directory"
)

ROWS = [
    (
        "A box holds 12 pencils. How many pencils are in 4 boxes if 5 are broken?",
        "<<12*4=48>> <<48-5=43>>",
        "43",
    ),
    (
        "Lea reads 15 pages a day for 6 days and 10 pages on Sunday. How many pages is that?",
        "<<15*6=90>> <<90+10=100>>",
        "100",
    ),
    (
        "A rope of 36 m is cut into 4 equal parts, and one part is halved. How long is a half?",
        "<<36/4=9>> <<9/2=4.5>>",
        "4.5",
    ),
]


@pytest.fixture(scope="module")
def train_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("real") / "train.jsonl"
    source = Path(os.environ.get("LATENT_SFT_DATA", "/nonexistent")) / "gsm8k-train.jsonl"
    lines = (
        source.read_text().splitlines()[:2]
        if source.exists()
        else [
            json.dumps({"problem": p, "cot": c, "cot_answer": f"\\boxed{{{a}}}", "answer": a})
            for p, c, a in ROWS[:2]
        ]
    )
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_whole_pipeline(command, train_file, tmp_path, monkeypatch):
    model, data = os.environ["LATENT_SFT_MODEL"], ["--data", train_file]
    settings = [*data, "--max-steps", 6, "--batch-size", 2, "--save-every", 100, "--device", "cpu"]

    def trained(main, out, *arguments, steps=(".",)):
        """Runs a training of 6 steps, each on all examples, and checks that its loss fell."""
        code, _, error = command(main, *arguments, "--out", tmp_path / out, *settings)
        assert code == 0, error
        for step in steps:
            losses = [
                json.loads(line)["loss"]
                for line in (tmp_path / out / step / "metrics.jsonl").open()
            ]
            assert len(losses) == 6 and sum(losses[-2:]) / 2 < 0.95 * losses[0], losses
        return tmp_path / out

    cot = trained(train_sft.main, "cot", "--model", model, "--lr", 1e-4)
    small = ["--lora-rank", 16, "--lora-dropout", 0]
    lora, rates = ["--lr", 1e-3, *small], ["--lr", 1e-3, 1e-3, 3e-4, *small]
    phase1 = trained(
        train_phase1.main, "phase1", "--model", cot, *rates, steps=("encoder", "decoder", "joint")
    )
    assert (
        command(
            cache_latents.main,
            "--phase1",
            phase1,
            *data,
            "--out",
            tmp_path / "cache",
            "--device",
            "cpu",
        )[0]
        == 0
    )
    latent = trained(
        train_phase2.main, "latent", "--phase1", phase1, "--cache", tmp_path / "cache", *lora
    )

    greedy = dict(model=latent, max_new_tokens=12, temperature=0, device="cpu")
    ask = flags(prompt="What is 3*4+5?", max_latents=6, **greedy)
    code, printed, error = command(sample.main, *ask)
    lines = printed.splitlines()
    assert code == 0 and lines[0].startswith("   1  '") and len(lines) >= 3, error
    benchmark = flags(out=tmp_path / "eval", max_latents=8, **greedy)
    code, _, error = command(evaluation.main, *data, *benchmark)
    assert (
        code == 0
        and json.loads((tmp_path / "eval" / "summary.json").read_text())["train.free"]["count"] == 2
    ), error

    # the exported directory thinks and answers in transformers as it does here
    exported = tmp_path / "exported"
    assert command(load_hf_weights.main, "--model", latent, "--out", exported)[0] == 0
    ours, tokenizer, reasoning = load_model(exported)
    assert reasoning == load_hf_weights.Reasoning("latent", 10, 2)

    def sampled(problem, reasoning=reasoning, **more):
        params = sample.SamplingParams(model="", temperature=0.0, **more)
        ends = tokenizer.end_think, tokenizer.end_of_turn
        sampler = sample.Sampler(ours, reasoning, ends, params)
        return dict(sampler.generate([tokenizer.prompt(problem)]))[0]

    result = sampled("What is 3*4+5?", max_latents=6, max_new_tokens=12)
    from transformers import AutoModelForCausalLM
    import oracle

    hf = AutoModelForCausalLM.from_pretrained(
        exported, attn_implementation="eager", dtype=torch.float32
    )
    monkeypatch.setattr(oracle, "superposition", lambda h, E, k: _float_superposition(h, E, k))
    thoughts, answer = oracle.think_and_answer(
        hf,
        tokenizer.prompt("What is 3*4+5?"),
        tokenizer.end_think,
        tokenizer.end_of_turn,
        10,
        6,
        12,
    )
    assert len(result.latents) == len(thoughts)
    for (ours_p, ours_ids), (p, ids) in zip(result.latents, thoughts):  # nearly equal ones may swap
        assert ours_ids[0] == ids[0]
        found, expected = dict(zip(ours_ids, ours_p)), dict(zip(ids.tolist(), p.tolist()))
        assert found == pytest.approx(expected, abs=1e-3)
    assert result.tokens + [tokenizer.end_of_turn] * result.finished == answer
    text = hf.generate(
        torch.tensor([tokenizer.prompt("Hello")]), max_new_tokens=8, do_sample=False, pad_token_id=0
    )[0].tolist()
    written = sampled("Hello", load_hf_weights.Reasoning("text"), max_new_tokens=8).tokens
    assert text[len(tokenizer.prompt("Hello")) :][: len(written)] == written


def _float_superposition(h, E, k):
    """The oracle's superposition for a vocabulary of tens of thousands, in float32."""
    top, ids = (h @ E.detach().T).topk(k)
    alpha = top.softmax(-1)
    return alpha, ids, torch.stack([a @ E[i] for a, i in zip(alpha, ids)])


def test_real_logits():
    """float32 logits of a real text equal transformers'."""
    from transformers import AutoModelForCausalLM
    from test_model import logits_of

    path = os.environ["LATENT_SFT_MODEL"]
    ids = torch.tensor(Tokenizer(path).prompt(ROWS[0][0]))
    with torch.no_grad():
        ours = logits_of(load_model(path)[0], ids, [len(ids)])
        theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids[None]).logits[
            0
        ]
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=1e-4)
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
