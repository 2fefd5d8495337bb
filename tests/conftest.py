"""Small random checkpoints, made-up data, and a way to call the commands."""

import json
import os
from pathlib import Path
import random
import shutil
import sys

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["OMP_NUM_THREADS"] = "1"  # everything here is small; for the processes that tests start
torch.set_num_threads(1)

from experiments import demo  # noqa: E402
from lib import errors  # noqa: E402


def pytest_configure(config):
    if (
        config.option.markexpr != "gpu"
    ):  # comparisons to 1e-5 are for float32 on a CPU, also where a GPU is
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


VOCAB = 272  # rows of the tiny models' embedding; the demo tokenizer has 263 ids
SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=0,
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def hf_model(kind: str, tied: bool, dtype=torch.float32, seed: int = 0):
    """A small random transformers model with lively weights: biases and norms are not left at their defaults."""
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    torch.manual_seed(seed)
    config, model = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[kind]
    rope = LLAMA3_ROPE if kind == "llama" else {"rope_type": "default", "rope_theta": 10000.0}
    extra = {"head_dim": 12} if kind == "qwen3" else {}
    hf = model(
        config(
            **SHAPE,
            **extra,
            tie_word_embeddings=tied,
            rope_parameters=rope,
            attn_implementation="eager",
        )
    )
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return hf.to(dtype).eval()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(kind="llama", tied=True) -> directory of a small random checkpoint with the demo's tokenizer."""
    made = {}

    def make(kind="llama", tied=True) -> Path:
        if (kind, tied) not in made:
            path = tmp_path_factory.mktemp(f"{kind}-{'tied' if tied else 'untied'}")
            hf_model(kind, tied).save_pretrained(path)
            shutil.copy(demo.BASE / "tokenizer.json", path)
            made[kind, tied] = path
        return made[kind, tied]

    return make


@pytest.fixture(scope="session")
def thinker(checkpoint, tmp_path_factory):
    """thinker(thinking, top_k) -> a checkpoint, of random weights, that says how it reasons."""

    def make(thinking="latent", top_k=10) -> Path:
        path = tmp_path_factory.mktemp("thinker") / "model"
        shutil.copytree(checkpoint(), path)
        config = json.loads((path / "config.json").read_text())
        config["latent_sft"] = {"thinking": thinking, "top_k": top_k, "compression": 2}
        (path / "config.json").write_text(json.dumps(config))
        return path

    return make


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """40 training examples of very unequal lengths."""
    path, rng = tmp_path_factory.mktemp("data") / "train.jsonl", random.Random(0)
    with open(path, "w") as f:
        for i in range(40):
            chain = "".join(
                rng.choice("0123456789+-=;") for _ in range(rng.choice([1, 2, 3, 7, 20, 60]))
            )
            row = {
                "problem": "".join(rng.choice("0123456789+-") for _ in range(rng.randint(1, 30))),
                "cot": chain,
                "cot_answer": f"\\boxed{{{rng.randrange(100)}}}",
                "answer": "1",
            }
            f.write(json.dumps(row) + "\n")
    return path


@pytest.fixture
def command(monkeypatch, capsys):
    """command(main, "--flag", value, ...) -> (exit code, stdout, stderr) of a script's main, called in this process."""

    def call(main, *arguments):
        capsys.readouterr()  # what was printed before is not the command's
        monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as e:
            code = e.code
        except BaseException as e:
            errors.report(type(e), e, e.__traceback__)
            code = 130 if isinstance(e, KeyboardInterrupt) else 1
        return code, *capsys.readouterr()

    return call
