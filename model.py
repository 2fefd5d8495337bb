"""The Llama / Qwen2 / Qwen3 language model. Parameters have Hugging Face's names.

Tokens lie flat: tensors are [T, ...]. T counts the tokens of a packed row, or one token for each of
T sequences. The caller passes in what may differ: attention (attention.py) and, where adapters are
used, the projections (lora.py).
"""

from dataclasses import dataclass, field
from functools import partial
import math

import torch
from torch import nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Config:
    """The shape of a model, in the names of Hugging Face's config.json."""

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
    rope_scaling: dict = field(default_factory=dict)  # empty, or the fields of Llama 3's scaling
    tie_word_embeddings: bool = False


def project(x, *linears: nn.Linear):
    """The outputs of several linears that read the same x [T, in], computed in x's dtype."""
    biases = (None if m.bias is None else m.bias.to(x.dtype) for m in linears)
    return [F.linear(x, m.weight.to(x.dtype), b) for m, b in zip(linears, biases)]


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * h.to(x.dtype)


def rotary_frequencies(config):
    """The angle per position of each pair of channels, float32 [head_dim / 2]."""
    channels = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
    freqs = config.rope_theta ** -(channels / config.head_dim)
    if s := config.rope_scaling:
        # Llama 3.1 stretches long waves by `factor`, keeps short ones, and interpolates between.
        turns = s["original_max_position_embeddings"] * freqs / (2 * math.pi)
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freqs = freqs * (keep + (1 - keep) / s["factor"])
    return freqs


def rotate(x, cos, sin):
    """Rotary embedding of x [T, heads, head_dim]. Channel i pairs with i + head_dim / 2."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        width = config.hidden_size
        q = config.num_attention_heads * config.head_dim
        kv = config.num_key_value_heads * config.head_dim
        bias = config.model_type == "qwen2"
        self.q_proj = nn.Linear(width, q, bias=bias)
        self.k_proj = nn.Linear(width, kv, bias=bias)
        self.v_proj = nn.Linear(width, kv, bias=bias)
        self.o_proj = nn.Linear(q, width, bias=False)
        if config.model_type == "qwen3":
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(self, x, rope, attend, project):
        projected = project(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in projected)
        out = attend(rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope), v)
        return project(out.flatten(-2), self.o_proj)[0]


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x, project):
        gate, up = project(x, self.gate_proj, self.up_proj)
        return project(F.silu(gate) * up, self.down_proj)[0]


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rope, attend, project):
        x = x + self.self_attn(self.input_layernorm(x), rope, attend, project)
        return x + self.mlp(self.post_attention_layernorm(x), project)


class Model(nn.Module):
    """A causal language model on flat tokens. The caller embeds them, so latents can be inputs."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        width, vocab = config.hidden_size, config.vocab_size
        self.embed_tokens = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(width, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(width, vocab, bias=False)
        self.register_buffer("rope_frequencies", rotary_frequencies(config), persistent=False)

    @property
    def head(self):
        """The LM head's weight [vocab_size, hidden_size]. Tied models share the embedding."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, inputs_embeds, position_ids, attend, project=project, recompute=False):
        """inputs_embeds [T, hidden_size], position_ids int [T] -> hidden states [T, hidden_size].

        They come after the final norm: logits are `hidden_states @ model.head.T`. All is computed
        in the dtype of `inputs_embeds`. `attend` has a function for each layer: q [T, heads,
        head_dim], k and v [T, kv_heads, head_dim] -> [T, heads, head_dim]. `recompute`: backward
        computes each layer again, which takes less memory.
        """
        x = inputs_embeds
        angles = position_ids[:, None, None].float() * self.rope_frequencies
        rope = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer, attend_layer in zip(self.layers, attend):
            run = partial(checkpoint, layer, use_reentrant=False) if recompute else layer
            x = run(x, rope, attend_layer, project)
        return self.norm(x)

    def compile_layers(self, **options):
        """Compiles each layer; equal layers share the code. Fewer and larger kernels on a GPU."""
        for part in (*self.layers, self.norm):
            part.compile(dynamic=False, **options)
