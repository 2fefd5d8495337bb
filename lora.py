"""LoRA (arXiv 2106.09685): one frozen base, several named adapters, one chosen per forward call.

An adapter adds scale * dropout(x) A^T B^T to a linear's output. Adapters are added to a model's
linears from outside; model.py does not know them.
"""

import torch
from torch import nn
import torch.nn.functional as F

from lib.errors import UserError
from lib.fast import add_low_rank, zero_some
from lib.files import read_tensors, write_tensors
from model import project as base_project


class Adapter(nn.Module):
    """A [rank, in] and B [out, rank] in float32. B starts at zero, so the adapter adds nothing."""

    def __init__(self, linear, rank, lora_alpha, dropout):
        super().__init__()
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)
        self.scale, self.dropout = lora_alpha / rank, dropout

    def delta(self):
        """The update [out, in] of the linear's weight."""
        return self.scale * self.lora_B @ self.lora_A


def project(x, *linears, adapter):
    """Like model.project, with the adapters of that name added. A frozen one has no dropout.

    Linears that read the same x share its dropout, and one product with all their A. `adapter` None
    is the base alone.
    """
    if adapter is None:
        return base_project(x, *linears)
    chosen = [m.adapters[adapter] for m in linears]
    p = chosen[0].dropout if chosen[0].training and chosen[0].lora_A.requires_grad else 0.0
    A = torch.cat([a.lora_A for a in chosen]).to(x.dtype)
    lows = F.linear(zero_some(x, p), A).chunk(len(chosen), -1)
    outputs = []
    for m, a, low in zip(linears, chosen, lows):
        W, B = m.weight.to(x.dtype), (a.scale / (1 - p) * a.lora_B).to(x.dtype)
        outputs.append(add_low_rank(x, low, W, B, None if m.bias is None else m.bias.to(x.dtype)))
    return outputs


def projections(model):
    """The projections of all layers, with their paths: q, k, v, o, gate, up, down."""
    found = model.layers.named_modules(prefix="layers")
    return [(path, m) for path, m in found if isinstance(m, nn.Linear)]


def add_adapter(model, name, rank, lora_alpha, dropout=0.0):
    """Gives every projection a new adapter of that name, in float32, beside those it has."""
    for _, linear in projections(model):
        if not hasattr(linear, "adapters"):
            linear.adapters = nn.ModuleDict()
        linear.adapters[name] = Adapter(linear, rank, lora_alpha, dropout)


def adapter_parameters(model, name):
    """{"layers.0.self_attn.q_proj.lora_A": parameter, ...} of the adapter `name`."""
    return {
        f"{path}.{key}": p
        for path, linear in projections(model)
        for key, p in linear.adapters[name].named_parameters()
    }


@torch.no_grad()
def merge(model, name):
    """Adds the adapter to the base weights and removes it. The sum is float32, then cast."""
    for _, linear in projections(model):
        linear.weight.copy_(linear.weight.float() + linear.adapters.pop(name).delta())


def save_adapter(path, model, name, **more: torch.Tensor):
    """Writes the adapter `name`, and tensors that belong to it (the latent query), to one file."""
    a = projections(model)[0][1].adapters[name]
    rank = len(a.lora_A)
    metadata = {"rank": rank, "alpha": a.scale * rank}
    write_tensors(path, adapter_parameters(model, name) | more, metadata)


def load_adapter(path, model, name):
    """Reads file `path` into the adapter `name`, made if there is none. Returns other tensors."""
    tensors, metadata = read_tensors(path)
    if name not in getattr(projections(model)[0][1], "adapters", {}):
        add_adapter(model, name, metadata["rank"], metadata["alpha"])
    for key, p in adapter_parameters(model, name).items():
        t = tensors.pop(key, None)
        if t is None or t.shape != p.shape or not t.isfinite().all():
            raise UserError(f"{path}: {key} is damaged, or of another model")
        p.data.copy_(t)
    return tensors
