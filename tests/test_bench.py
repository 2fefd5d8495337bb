"""bench/rehearse.py: README's commands are valid, and its random checkpoint is one that loads."""

import importlib
import json
from pathlib import Path
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from lib.cli import parse
from load_hf_weights import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import rehearse  # noqa: E402


def settings(**more):
    words = {"config": "", "tokenizer": "", "data": "", "out": ""} | more
    return rehearse.Settings(**words)


@pytest.mark.parametrize("name", ["Llama-3.2-1B-Instruct", "DeepSeek-R1-Distill-Qwen-7B"])
def test_the_commands_of_readme_are_valid(name, monkeypatch):
    commands = [*rehearse.commands(settings(train="--max-steps 3", all_weights=True), name)]
    scripts = [script for script, *_ in commands]
    assert {"train_phase1.py", "cache_latents.py", "eval.py", "load_hf_weights.py"} < {*scripts}
    assert ("train_sft.py" in scripts) == ("1B" in name) and scripts.count("train_phase2.py") == 2
    for script, *words in commands:
        monkeypatch.setattr(sys, "argv", [script, *words])
        found = parse(importlib.import_module(script[:-3]).Settings, "")
        assert not script.startswith("train") or found.max_steps in (3, [3])
        assert script != "train_phase1.py" or found.model in (name, "runs/cot")


@pytest.mark.parametrize("config", sorted((ROOT / "bench" / "configs").glob("*.json")))
def test_a_random_checkpoint_loads_as_in_transformers(config, checkpoint, tmp_path):
    """The published config.json with a small shape."""
    small = json.loads(config.read_text()) | {"vocab_size": 300, "num_hidden_layers": 2}
    small |= {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    small |= {"intermediate_size": 48} | ({"head_dim": 8} if "head_dim" in small else {})
    (tmp_path / config.name).write_text(json.dumps(small))
    source = settings(config=str(tmp_path / config.name), tokenizer=str(checkpoint()))
    rehearse.write_checkpoint(tmp_path / "model", source)
    file = next((tmp_path / "model").glob("*.safetensors"))
    file.rename(file.with_name("model.safetensors"))  # transformers asks for an index otherwise
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ids = torch.arange(20)[None]
    ours = load_checkpoint(tmp_path / "model")
    assert ours.head.shape == (300, 32)
    for name, p in ours.named_parameters():
        hf_name = name if name.startswith("lm_head") else f"model.{name}"
        assert torch.equal(p, hf.get_parameter(hf_name)), name
    assert hf(ids).logits.isfinite().all()
