"""The Llama / Qwen2 / Qwen3 decoder in one file. Parameters have Hugging Face's names.

Tokens lie flat: every tensor is [T, ...], where T counts the tokens of one packed row (training, prefill) or one token
for each of T sequences (decoding). What keeps sequences apart is the attention function that the caller hands in, so
this file knows neither masks nor caches nor kernels.
"""

from dataclasses import dataclass, field
import math
from typing import Callable

import torch
from torch import nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lora import LoRALinear, project
from runs import fused


@dataclass(frozen=True)
class Config:
    """Shape of a model; names are those of Hugging Face's config.json."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    model_type: str = "llama"  # "llama", "qwen2" or "qwen3"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict = field(default_factory=dict)  # empty, or the fields of "rope_type": "llama3"
    tie_word_embeddings: bool = False


# attend(layer, q, k, v): q [T, heads, head_dim], k and v [T, kv_heads, head_dim] -> [T, heads, head_dim]
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * h.to(x.dtype)


def rotary_frequencies(config: Config) -> torch.Tensor:
    """Angle per position of each pair of channels, float32 [head_dim / 2]; plain RoPE or Llama 3's scaling of it."""
    freqs = config.rope_theta ** -(torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    if s := config.rope_scaling:
        # Llama 3.1: long waves are stretched by `factor`, short ones kept, those between interpolated.
        turns = s["original_max_position_embeddings"] * freqs / (2 * math.pi)  # full turns within the trained context
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freqs = freqs * (keep + (1 - keep) / s["factor"])
    return freqs


def rotary_angles(position_ids: torch.Tensor, frequencies: torch.Tensor, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every token's angles, each [T, 1, head_dim / 2]."""
    angles = position_ids[:, None, None].float() * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [T, heads, head_dim]; channel i pairs with i + head_dim / 2, as in Hugging Face's weights."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


class Attention(nn.Module):
    """The projections of self-attention; what happens between them is the caller's `attend`."""

    def __init__(self, config: Config):
        super().__init__()
        self.head_dim = config.head_dim
        width, q = config.hidden_size, config.num_attention_heads * config.head_dim
        kv = config.num_key_value_heads * config.head_dim
        qkv_bias = config.model_type == "qwen2"
        self.q_proj = LoRALinear(width, q, bias=qkv_bias)
        self.k_proj = LoRALinear(width, kv, bias=qkv_bias)
        self.v_proj = LoRALinear(width, kv, bias=qkv_bias)
        self.o_proj = LoRALinear(q, width, bias=False)
        if config.model_type == "qwen3":
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def qkv(self, x, rope, adapter):
        projected = project(x, [self.q_proj, self.k_proj, self.v_proj], adapter)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in projected)
        return rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope), v

    def output(self, attended, adapter):
        return self.o_proj(attended.flatten(-2), adapter)


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = LoRALinear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = LoRALinear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = LoRALinear(config.intermediate_size, config.hidden_size, bias=False)

    def gated(self, x, adapter):
        gate, up = project(x, [self.gate_proj, self.up_proj], adapter)
        return F.silu(gate) * up


class Block(nn.Module):
    """One layer: what comes before attention and what comes after it, each compiled as a whole on a GPU."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer = layer
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def before(self, x, rope, adapter):
        return self.self_attn.qkv(self.input_layernorm(x), rope, adapter)

    def after(self, x, attended, adapter):
        x = x + self.self_attn.output(attended, adapter)
        h = self.mlp.gated(self.post_attention_layernorm(x), adapter)
        if len(h) == 1:  # decoding, where a product is fused with what makes its input: keep silu out of it, done once for each output
            torch._dynamo.graph_break()
        return x + self.mlp.down_proj(h, adapter)

    def forward(self, x, rope, attend: Attend, adapter):
        q, k, v = fused(Block.before, x)(self, x, rope, adapter)
        return fused(Block.after, x)(self, x, attend(self.layer, q, k, v), adapter)


class Model(nn.Module):
    """A causal language model over flat tokens. Callers embed their input, so that latents can stand among tokens."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("rope_frequencies", rotary_frequencies(config), persistent=False)
        self.checkpoint_activations = False  # True: backward recomputes each layer from its input, in less memory
        self.graphs = None  # a dict: rows are replayed as CUDA graphs (graphs.py)

    @property
    def head(self) -> torch.Tensor:
        """The LM head's weight [vocab_size, hidden_size]; the input embedding where they are tied."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, attend: Attend, adapter: str | None = None):
        """inputs_embeds [T, hidden_size], position_ids int [T] -> hidden states [T, hidden_size] after the final norm.

        `adapter` names the LoRA adapter to use, None the base alone. Logits are `hidden_states @ model.head.T`, to be
        taken only at the positions where they are needed. All is computed in the dtype of `inputs_embeds`.
        """
        x = inputs_embeds
        rope = fused(rotary_angles, x)(position_ids, self.rope_frequencies, x.dtype)
        for layer in self.layers:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, attend, adapter, use_reentrant=False)
            else:
                x = layer(x, rope, attend, adapter)
        return fused(RMSNorm.forward, x)(self.norm, x)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator, std: float = 0.02) -> "Model":
        """Random weights for training from scratch: matrices N(0, std^2), biases 0, norms 1."""
        for name, p in self.named_parameters():
            if p.ndim == 2:
                p.normal_(0, std, generator=generator)
            else:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
        return self
