"""LoRA by hand (arXiv 2106.09685): one frozen base, several named adapters, one chosen per forward call."""

import torch
from torch import nn
import torch.nn.functional as F

from latents import precise
from runs import UserError, read_tensors, write_tensors

RANK, DROPOUT = 64, 0.1  # the authors', where a command names no other


class Adapter(nn.Module):
    """`x -> scale * dropout(x) A^T B^T`, with A [rank, in] and B [out, rank]; B starts at zero, so it starts as nothing.

    The product is taken in `project`, for all linears that read the same x.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        # float32 whatever the base's dtype: these are the weights that learn
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, device=linear.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, device=linear.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=5 ** 0.5)
        self.scale, self.dropout = alpha / rank, dropout

    def delta(self) -> torch.Tensor:
        """The weight update [out, in] that this adapter stands for."""
        return self.scale * self.lora_B @ self.lora_A


class LoRALinear(nn.Linear):
    """A linear layer that can carry adapters; `adapter` names the one to add, None leaves the base alone."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.adapters = nn.ModuleDict()

    def forward(self, x, adapter: str | None = None):
        return project(x, [self], adapter)[0]


def project(x: torch.Tensor, linears: list[LoRALinear], adapter: str | None) -> list[torch.Tensor]:
    """What each of `linears` makes of the same x [..., in]: q, k and v, or gate and up. All is computed in x's dtype.

    Their adapters share one dropout and one product with A, so that a small rank still makes a matrix worth a kernel.
    """
    weights, biases = zip(*((m.weight.to(x.dtype), None if m.bias is None else m.bias.to(x.dtype)) for m in linears))
    if adapter is None:
        return [F.linear(x, weight, bias) for weight, bias in zip(weights, biases)]
    adapters = [m.adapters[adapter] for m in linears]
    p = adapters[0].dropout if adapters[0].training else 0.0
    dropped = x.masked_fill(_random_mask(x, p), 0) if p else x  # what is left is scaled by 1 / (1 - p), with B
    A = torch.cat([a.lora_A for a in adapters]).to(x.dtype)
    low = F.linear(dropped, A).split([len(a.lora_A) for a in adapters], -1)
    B = [(a.scale / (1 - p) * a.lora_B).to(x.dtype) for a in adapters]
    return [_joined(x, *arguments) for arguments in zip(low, weights, B, biases)]


def _joined(x, low, W, B, bias):
    """x W^T + low B^T + bias."""
    if len(W) > W.shape[1]:  # wider than x
        return _JoinedProduct.apply(x, low, W, B, bias)
    # adding in float32 also keeps torch.compile from an addmm, which would first copy the base's output
    return (precise(F.linear(x, W, bias)) + precise(F.linear(low, B))).to(x.dtype)


class _JoinedProduct(torch.autograd.Function):
    """The same, rounded once, as one product, [x low] [W B]^T, for a frozen W [out, in] and a B [out, rank] that learns.

    Two products would write and read their wide result twice, which costs a GPU more than the small product itself.
    """

    @staticmethod
    def forward(ctx, x, low, W, B, bias):
        ctx.save_for_backward(low, W, B)
        return F.linear(torch.cat([x, low], -1), torch.cat([W, B], -1), bias)

    @staticmethod
    def backward(ctx, grad):
        low, W, B = ctx.saved_tensors
        grad_x, grad_low = (grad @ torch.cat([W, B], -1)).split([W.shape[1], B.shape[1]], -1)
        return grad_x, grad_low, None, grad.flatten(0, -2).T @ low.flatten(0, -2), None


def _random_mask(x: torch.Tensor, p: float) -> torch.Tensor:
    """bool, like x, True with probability p."""
    if x.is_cuda:
        seed = torch.randint(2**31 - 1, (), device=x.device).int()
        return _hash(torch.arange(x.numel(), dtype=torch.int32, device=x.device), seed).view(x.shape) < round((p - 0.5) * 2**32)
    # a CPU draws its random numbers one after the other, and one of 64 bits will do for four elements
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2**63, None)
    return (bits.view(torch.int16)[:x.numel()] < round((p - 0.5) * 2**16)).view(x.shape)


def _hash(index: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    """Well-mixed int32 from int32 indices and a random seed: for a dropout as good as PyTorch's numbers, which, computed inside a
    fused kernel, take longer than all else that it does."""
    for multiplier in (0x7FEB352D, 0x2C1B3C6D, 0x297A2D39):
        index = (index ^ (index >> 16 & 0xFFFF)) * multiplier ^ seed
    return index ^ (index >> 16 & 0xFFFF)


def _carriers(model: nn.Module):
    return [(name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear)]


def add_adapter(model: nn.Module, name: str, rank: int, alpha: float, dropout: float = 0.0) -> None:
    """Gives every projection of `model` (q, k, v, o, gate, up, down) a fresh adapter called `name`."""
    for _, linear in _carriers(model):
        linear.adapters[name] = Adapter(linear, rank, alpha, dropout)


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """{"layers.0.self_attn.q_proj.lora_A": parameter, ...} of the adapter `name`; a live view, also what is saved."""
    return {f"{path}.{key}": p
            for path, linear in _carriers(model) for key, p in linear.adapters[name].named_parameters()}


@torch.no_grad()
def merge(model: nn.Module, name: str) -> None:
    """Adds the adapter's update to the base weights, in float32."""
    for _, linear in _carriers(model):
        linear.weight.copy_(linear.weight.float() + linear.adapters[name].delta())


def remove_adapter(model: nn.Module, name: str) -> None:
    for _, linear in _carriers(model):
        del linear.adapters[name]


def save_adapter(path, model: nn.Module, name: str, extra: dict[str, torch.Tensor] | None = None) -> None:
    """Writes adapter `name`, and tensors that belong to it (the encoder's latent query), as one safetensors file."""
    _, first = _carriers(model)[0]
    rank, scale = len(first.adapters[name].lora_A), first.adapters[name].scale
    tensors = adapter_parameters(model, name) | (extra or {})
    write_tensors(path, tensors, {"rank": str(rank), "alpha": str(scale * rank)})


def load_adapter(path, model: nn.Module, name: str, dropout: float = 0.0) -> dict[str, torch.Tensor]:
    """Adds the adapter in file `path` to `model` as `name`; returns the file's other tensors. Raises UserError."""
    tensors, metadata = read_tensors(path)
    if not {"rank", "alpha"} <= metadata.keys():
        raise UserError(f"{path}: not an adapter file of this program")
    add_adapter(model, name, int(metadata["rank"]), float(metadata["alpha"]), dropout)
    for key, parameter in adapter_parameters(model, name).items():
        if key not in tensors or tensors[key].shape != parameter.shape:
            state = "misshapen" if key in tensors else "missing"
            raise UserError(f"{path}: {key} is {state}; is this the adapter of another model?")
        parameter.data.copy_(tensors.pop(key))
    return tensors
