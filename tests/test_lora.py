"""LoRA against peft: forward, gradients, merge, several adapters."""

import types

import peft
import pytest
import torch
from torch import nn

from conftest import hf_model
from lib.errors import UserError
from load_hf_weights import load_checkpoint
import lora
from test_model import hidden_states

IDS = torch.arange(3, 28)


def forward(model, adapter):
    return hidden_states(model, IDS, [len(IDS)], adapter) @ model.head.T


@pytest.fixture
def pair(checkpoint):
    """Our model and peft's with the same two random adapters, "encoder" of rank 4 and "decoder" of rank 3."""
    model = load_checkpoint(checkpoint("qwen2", True))
    theirs = hf_model("qwen2", True)
    for i, (name, rank) in enumerate((("encoder", 4), ("decoder", 3))):
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=5,
            target_modules=[
                "q_proj",
                "k_proj",
                "v_proj",
                "o_proj",
                "gate_proj",
                "up_proj",
                "down_proj",
            ],
            task_type="CAUSAL_LM",
        )
        theirs = (
            peft.get_peft_model(theirs, config, name)
            if i == 0
            else (theirs.add_adapter(name, config), theirs)[1]
        )
        lora.add_adapter(model, name, rank, lora_alpha=5)
        torch.manual_seed(i)
        parameters = dict(theirs.named_parameters())
        for key, p in lora.adapter_parameters(model, name).items():
            p.data.normal_(0, 0.3)
            path, which = key.rsplit(".", 1)
            parameters[f"base_model.model.model.{path}.{which}.{name}.weight"].data.copy_(p.data)
    return model, theirs


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_forward_and_gradients(pair, name):
    model, theirs = pair
    theirs.set_adapter(name)
    ours, expected = forward(model, name), theirs(IDS[None]).logits[0]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)) / ours.numel()
    (ours * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    for key, p in lora.adapter_parameters(model, name).items():
        path, which = key.rsplit(".", 1)
        torch.testing.assert_close(
            p.grad,
            gradients[f"base_model.model.model.{path}.{which}.{name}.weight"],
            atol=1e-5,
            rtol=1e-5,
        )
    other = {"encoder": "decoder", "decoder": "encoder"}[name]
    assert all(p.grad is None for p in lora.adapter_parameters(model, other).values())


def test_merge(pair):
    model, theirs = pair
    base, with_adapter = forward(model, None), forward(model, "decoder")
    assert (base - with_adapter).abs().max() > 0.1
    lora.merge(model, "decoder")
    torch.testing.assert_close(forward(model, None), with_adapter, atol=1e-5, rtol=1e-5)
    theirs.set_adapter("decoder")
    torch.testing.assert_close(
        forward(model, None),
        theirs.merge_and_unload(adapter_names=["decoder"])(IDS[None]).logits[0],
        atol=1e-5,
        rtol=1e-5,
    )


def test_dropout_acts_in_training_only(pair):
    model, _ = pair
    lora.add_adapter(model, "student", 4, 8, dropout=0.5)
    for p in lora.adapter_parameters(model, "student").values():
        p.data.normal_()
    model.train()
    assert not torch.equal(forward(model, "student"), forward(model, "student"))
    model.eval()
    assert torch.equal(forward(model, "student"), forward(model, "student"))


def test_save_and_load(pair, checkpoint, tmp_path):
    model, _ = pair
    lora.save_adapter(tmp_path / "a.safetensors", model, "encoder", latent_query=torch.ones(3))
    fresh = load_checkpoint(checkpoint("qwen2", True))
    assert lora.load_adapter(tmp_path / "a.safetensors", fresh, "other").keys() == {"latent_query"}
    assert torch.equal(forward(fresh, "other"), forward(model, "encoder"))
    with pytest.raises(
        UserError, match="layers.0.self_attn.q_proj.lora_B is damaged, or of another"
    ):
        lora.load_adapter(
            tmp_path / "a.safetensors", load_checkpoint(checkpoint("qwen3", True)), "other"
        )


def test_dropout_keeps_the_mean():
    torch.manual_seed(0)
    m = nn.Linear(50, 7)
    m.adapters = nn.ModuleDict({"a": lora.Adapter(m, 4, 8, 0.5)})
    m.adapters["a"].lora_B.data.normal_()
    x = torch.randn(50)
    mean = lora.project(x.expand(40_000, 50), m, adapter="a")[0].mean(0)
    plain = lora.project(x, m.eval(), adapter="a")[0]
    torch.testing.assert_close(mean, plain, atol=0.1, rtol=0)


def test_merge_rounds_once():
    torch.manual_seed(0)
    model = types.SimpleNamespace(layers=nn.ModuleList([nn.Linear(64, 64).bfloat16()]))
    lora.add_adapter(model, "a", 4, 8)
    m = model.layers[0]
    m.adapters["a"].lora_B.data.normal_()
    expected = (m.weight.float() + m.adapters["a"].delta()).bfloat16()
    lora.merge(model, "a")
    assert torch.equal(m.weight, expected)
