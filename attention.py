"""The attention functions that are handed to the model: packed rows under a mask rule, and a KV cache.

Both run on PyTorch's scaled_dot_product_attention. The documents of a packed row are first laid side by side, those of
similar length together, so that the work is that of the documents and not of the square of the row.
"""

import torch
import torch.nn.functional as F

from masks import Labels, causal
from model import Config


class PackedAttention:
    """`attend` for one packed row: each document by itself, under `rule` (masks.py)."""

    def __init__(self, labels: Labels, rule=causal):
        document = labels.document
        starts = torch.cat([document.new_ones(1, dtype=torch.bool), document[1:] != document[:-1]]).nonzero().squeeze(1)
        lengths = torch.diff(starts, append=starts.new_tensor([len(document)]))
        size_class = lengths.float().log2().ceil()  # lengths of one class differ by a factor of two at most
        self.groups = []
        for size in size_class.unique():
            start, length = starts[size_class == size], lengths[size_class == size, None]
            offset = torch.arange(int(length.max()), device=document.device)
            valid = offset < length  # [documents, longest]
            # beyond its end a document's last token is repeated as a query, and nobody sees it as a key
            grid = start[:, None] + torch.minimum(offset, length - 1)
            mask = rule(labels, grid[:, :, None], grid[:, None, :]) & valid[:, None, :]
            self.groups.append((grid, valid, mask[:, None]))
        self.order = torch.cat([grid[valid] for grid, valid, _ in self.groups]).argsort()

    def __call__(self, layer, q, k, v):
        parts = []
        for grid, valid, mask in self.groups:
            part = _attention(*(x[grid].transpose(1, 2) for x in (q, k, v)), mask)  # [documents, heads, longest, head_dim]
            parts.append(part.transpose(1, 2)[valid])
        return torch.cat(parts)[self.order]


def _attention(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


class KVCache:
    """Keys and values of `rows` sequences of up to `length` tokens; each row is its own sequence and may be reused."""

    def __init__(self, config: Config, rows: int, length: int, device, dtype):
        shape = (config.num_hidden_layers, rows, length, config.num_key_value_heads, config.head_dim)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)  # tokens read so far: the next position

    def prefill(self, rows: torch.Tensor, labels: Labels, position_ids: torch.Tensor):
        """`attend` that reads one packed row of prompts and stores document i in cache row `rows[i]`, from its start."""
        attend, row = PackedAttention(labels), rows[labels.document]
        self.lengths[rows] = torch.bincount(labels.document, minlength=len(rows))

        def prefill(layer, q, k, v):
            self.k[layer, row, position_ids], self.v[layer, row, position_ids] = k, v
            return attend(layer, q, k, v)
        return prefill

    def decode(self, active: torch.Tensor):
        """`attend` for one more token of every row, at position `lengths`; only rows in bool `active` grow by it."""
        row, position = torch.arange(len(self.lengths), device=self.lengths.device), self.lengths.clone()
        longest = int(position.max()) + 1
        mask = (torch.arange(longest, device=position.device) <= position[:, None])[:, None, None]
        self.lengths += active

        def decode(layer, q, k, v):
            self.k[layer, row, position], self.v[layer, row, position] = k, v
            keys, values = (cache[layer, :, :longest].transpose(1, 2) for cache in (self.k, self.v))
            return _attention(q[:, :, None], keys, values, mask)[:, :, 0]
        return decode
