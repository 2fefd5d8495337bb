"""The embedded default (`make demo`): a made-up task, a small model from scratch, all scripts.

    python -m experiments.demo --out demo --rates 2 4

The task is a machine with ten states and four buttons, each a permutation of the states. `4abd=`
asks where it ends if it starts in state 4. The written chain says button and new state at each
step: `a3b6d1`. Without steps the small model does not learn to compose 5 to 8 permutations. With
them it does.
"""

import lib.errors  # noqa: F401  from here on an error is one line

from functools import partial
from pathlib import Path
import random
import shutil

import torch

from experiments.figures import draw_masks
from experiments.pipeline import Pipeline, RunSettings, Trainings, distinct, write_jsonl
from experiments.report import report
from lib.cli import parse, settings
from lib.files import write_tensors
from lib.run import output_directory
from lib.tokenizer import END_THINK, THINK
from load_hf_weights import hf_name, read_config
from model import Model

BASE = Path(__file__).parent / "base"  # config.json, and byte-level BPE: the bytes and "boxed"
SFT = dict(lr=3e-3, max_steps=200, batch_size=128)
LORA = dict(lora_rank=16, lora_dropout=0)
PHASE1 = dict(batch_size=64, lr=(1e-3, 5e-3, 4e-3), max_steps=(30, 30, 120), w_segment=1, **LORA)
PHASE2 = dict(batch_size=128, lr=5e-3, max_steps=500, **LORA)
EVAL = dict(temperature=0, max_latents=20, max_new_tokens=40, batch_size=250)


@settings
class Settings(RunSettings):
    device: str = "cpu"  # cpu or cuda; the model is small
    train: Trainings = ("answer-only", "latent")  # besides CoT-SFT


def make_example(rng, buttons):
    """One line of the task, in the schema of training and of evaluation data."""
    state = rng.randrange(10)
    problem = str(state)
    chain = ""
    for _ in range(rng.randint(5, 8)):
        button = rng.choice(sorted(buttons))
        state = buttons[button][state]
        problem += button
        chain += f"{button}{state}"
    box = f"\\boxed{{{state}}}"
    return {"problem": problem + "=", "cot": chain, "cot_answer": box, "answer": str(state)}


def write_task(out, seed):
    """train and test .jsonl: 20,000 and 500 different problems about one machine."""
    rng = random.Random(seed)
    make = partial(make_example, rng, {name: rng.sample(range(10), 10) for name in "abcd"})
    train = distinct(20000, make)
    write_jsonl(out / "train.jsonl", train.values())
    write_jsonl(out / "test.jsonl", distinct(500, make, known=train).values())


@torch.no_grad()
def initialize(model, generator, std):
    """Random weights for training from scratch: matrices N(0, std^2), biases 0, norms 1."""
    for name, p in model.named_parameters():
        if p.ndim == 2:
            p.normal_(0, std, generator=generator)
        else:
            p.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


def write_model(directory, seed):
    """A checkpoint directory with random weights."""
    shutil.copytree(BASE, directory, dirs_exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    model = initialize(Model(read_config(directory)), generator, std=0.08)
    weights = {hf_name(n): p for n, p in model.named_parameters()}
    write_tensors(directory / "model.safetensors", weights)


def main():
    s = parse(Settings, __doc__)
    with output_directory(s.out, s, command="demo") as out:
        if not (out / "base" / "model.safetensors").exists():
            write_task(out, s.seed)
            write_model(out / "base", s.seed)
        sft = SFT | {"model": out / "base"}
        Pipeline("demo", out, s, EVAL).run(
            out / "train.jsonl", [out / "test.jsonl"], sft, PHASE1, PHASE2, ("free", "random")
        )
        parts = [[*"4abd=", THINK], [*"a3b6d1"], [END_THINK], ["1"]]
        draw_masks(out / "masks.svg", parts, s.rates[0])
        print(f"\n{report(out)}\n{out}/masks.svg, demo.svg, table.md")


if __name__ == "__main__":
    main()
