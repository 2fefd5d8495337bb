"""The embedded default (`make demo`): a made-up task, a small model from scratch, all scripts.

    python -m experiments.demo --out demo --rates 2 4

The task is a machine with ten states and four buttons, each a permutation of the states. `4abd=`
asks where it ends if it starts in state 4. The written chain says button and new state at each
step: `a3b6d1`. Without steps a small model cannot compose 5 to 8 permutations; with them it can.
"""

import lib.errors  # noqa: F401  from here on an error is one line

from dataclasses import dataclass
import json
from pathlib import Path
import random

import torch

from experiments.figures import draw_latents, draw_masks
from experiments.pipeline import Pipeline, RunSettings
from experiments.report import report
from lib.cli import parse
from lib.files import read_jsonl, write_json, write_tensors, write_text
from lib.run import output_directory
from lib.tokenizer import END_THINK, THINK, byte_alphabet
from load_hf_weights import hf_name, read_config
from model import Model

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 264,
    "hidden_size": 96,
    "intermediate_size": 288,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 300.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
    "dtype": "float32",
}
SFT = dict(lr=3e-3, max_steps=200, batch_size=128)
LORA = dict(lora_rank=16, lora_dropout=0)
PHASE1 = dict(batch_size=64, lr=(1e-3, 5e-3, 4e-3), max_steps=(30, 30, 120), w_segment=1, **LORA)
PHASE2 = dict(batch_size=128, lr=5e-3, max_steps=500, **LORA)
EVAL = dict(temperature=0, max_latents=20, max_new_tokens=40, batch_size=250)


@dataclass(frozen=True, kw_only=True)
class Settings(RunSettings):
    device: str = "cpu"  # cpu or cuda; the model is small


def make_example(rng: random.Random, buttons: dict[str, list[int]]) -> dict:
    """One line of the task, in the schema of training and of evaluation data."""
    state = rng.randrange(10)
    problem, chain = str(state), ""
    for _ in range(rng.randint(5, 8)):
        button = rng.choice(sorted(buttons))
        state = buttons[button][state]
        problem, chain = problem + button, f"{chain}{button}{state}"
    box = f"\\boxed{{{state}}}"
    return {"problem": problem + "=", "cot": chain, "cot_answer": box, "answer": str(state)}


def write_task(out: Path, seed: int) -> None:
    """train and test .jsonl: 20,000 and 500 different problems about one machine."""
    rng, seen = random.Random(seed), set()
    buttons = {name: rng.sample(range(10), 10) for name in "abcd"}
    for name, count in (("train", 20000), ("test", 500)):
        lines = []
        while len(lines) < count:
            example = make_example(rng, buttons)
            if example["problem"] not in seen:
                seen.add(example["problem"])
                lines.append(json.dumps(example) + "\n")
        write_text(out / f"{name}.jsonl", "".join(lines))


def write_tokenizer(directory: Path) -> None:
    """Byte-level BPE: the 256 bytes, the word "boxed", and three special tokens."""
    vocab = {c: i for i, c in enumerate(byte_alphabet())}
    merges = ["b o", "bo x", "box e", "boxe d"]
    vocab |= {m.replace(" ", ""): len(vocab) + i for i, m in enumerate(merges)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": len(vocab) + i, "content": text, "special": True, **flags}
        for i, text in enumerate(("<|endoftext|>", THINK, END_THINK))
    ]
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    spec = {"version": "1.0", "added_tokens": added, "normalizer": None, "post_processor": None}
    spec |= {"pre_tokenizer": byte_level, "decoder": byte_level}
    spec["model"] = {"type": "BPE", "vocab": vocab, "merges": merges}
    write_json(directory / "tokenizer.json", spec)


@torch.no_grad()
def initialize(model, generator, std):
    """Random weights for training from scratch: matrices N(0, std^2), biases 0, norms 1."""
    for name, p in model.named_parameters():
        if p.ndim == 2:
            p.normal_(0, std, generator=generator)
        else:
            p.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


def write_model(directory: Path, seed: int) -> None:
    """A checkpoint directory with random weights."""
    write_tokenizer(directory)
    write_json(directory / "config.json", CONFIG)
    generator = torch.Generator().manual_seed(seed)
    model = initialize(Model(read_config(directory)), generator, std=0.08)
    weights = {hf_name(n): p for n, p in model.named_parameters()}
    write_tensors(directory / "model.safetensors", weights)


def draw(out: Path, r: int) -> None:
    """masks.svg of a short example, and latents.svg of a short test problem that came out right."""
    parts = [["4", "a", "b", "d", "=", THINK], list("a3b6d1"), [END_THINK], ["1"]]
    draw_masks(out / "masks.svg", parts, r)
    pairs = zip(
        read_jsonl(out / "test.jsonl"),
        read_jsonl(out / f"eval-latent-r{r}-test" / "test.free.jsonl"),
    )
    problem, line = min(pairs, key=lambda x: (not x[1]["correct"], len(x[0]["cot"])))
    chain = [problem["cot"][i : i + r] for i in range(0, len(problem["cot"]), r)]
    draw_latents(out / "latents.svg", line["problem"], chain, line["latents"], line["answer"])


def main():
    s = parse(Settings, __doc__)
    with output_directory(s.out, s) as out:
        if not (out / "base" / "model.safetensors").exists():
            write_task(out, s.seed)
            write_model(out / "base", s.seed)
        run, tests = Pipeline("demo", out, s), [out / "test.jsonl"]
        data = {"data": out / "train.jsonl"}
        cot = run.baselines(SFT | data | {"model": out / "base"}, tests, EVAL)
        for r in s.rates:
            phase1 = PHASE1 | {"compression": r}
            latent = run.latent(f"latent-r{r}", cot, phase1=phase1, phase2=PHASE2, **data)
            run.rows(f"Latent r = {r}", latent, tests, ("free", "random"), **EVAL)
        draw(out, s.rates[0])
        print(f"\n{report(out)}\n{out}/masks.svg, latents.svg, demo.svg, table.md")


if __name__ == "__main__":
    main()
