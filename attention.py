"""The attention functions that are handed to the model: packed rows under a mask rule, and a KV cache.

Nowhere is work done for the square of a packed row: on a CPU its documents are laid side by side, those of similar length
together; on a GPU flash attention takes their lengths, or FlexAttention the blocks that they touch.
"""

from functools import cache, cached_property
import inspect

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from masks import Labels, causal
from model import Config
from runs import fused

BLOCK = 128  # tokens; FlexAttention masks [BLOCK, BLOCK] of queries and keys at a time


class PackedAttention:
    """`attend` for one packed row: each document by itself, under `rule` (masks.py).

    On a GPU, causal rows in half precision run on flash attention and all others on FlexAttention; a CPU has PyTorch's SDPA.
    """

    def __init__(self, labels: Labels, rule=causal):
        self.labels, self.rule = labels, rule

    def __call__(self, layer, q, k, v):
        if not q.is_cuda:
            return self._side_by_side(q, k, v)
        if self.rule is causal and q.dtype != torch.float32:
            return _flash_varlen()(q, k, v, self.cu_seqlens, self.labels.longest)
        return self._flex(q, k, v)

    @cached_property
    def groups(self):
        """The documents by size class: (where their tokens are [documents, longest], which of those are real, the mask)."""
        document = self.labels.document
        starts = torch.cat([document.new_ones(1, dtype=torch.bool), document[1:] != document[:-1]]).nonzero().squeeze(1)
        lengths = torch.diff(starts, append=starts.new_tensor([len(document)]))
        size_class = lengths.float().log2().ceil()  # lengths of one class differ by a factor of two at most
        groups = []
        for size in size_class.unique():
            start, length = starts[size_class == size, None], lengths[size_class == size, None]
            offset = torch.arange(int(length.max()), device=document.device)
            valid = offset < length
            # beyond its end a document's last token is repeated as a query, and nobody sees it as a key
            grid = start + torch.minimum(offset, length - 1)
            mask = self.rule(self.labels, grid[:, :, None], grid[:, None, :]) & valid[:, None, :]
            groups.append((grid, valid, mask[:, None]))
        return groups

    @cached_property
    def order(self):
        """Where each token of the row is among the real tokens of all groups."""
        return torch.cat([grid[valid] for grid, valid, _ in self.groups]).argsort()

    def _side_by_side(self, q, k, v):
        parts = []
        for grid, valid, mask in self.groups:  # [documents, heads, longest, head_dim]
            gathered = (x.index_select(0, grid.flatten()).unflatten(0, grid.shape).transpose(1, 2) for x in (q, k, v))
            part = F.scaled_dot_product_attention(*gathered, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
            parts.append(part.transpose(1, 2)[valid])
        return torch.cat(parts)[self.order]

    @cached_property
    def cu_seqlens(self):
        """Where each document begins, int32 [documents + 1]; those that there are not are empty ones at the end."""
        document = self.labels.document
        numbers = torch.arange(self.labels.documents + 1, dtype=document.dtype, device=document.device)
        return torch.searchsorted(document, numbers, out_int32=True)

    @cached_property
    def block_mask(self) -> BlockMask:
        """Which blocks of keys a block of queries needs: from that in which its first document begins to its own."""
        labels, rule, document = self.labels, self.rule, self.labels.document
        first = torch.searchsorted(document, document[::BLOCK].contiguous()) // BLOCK
        own = torch.arange(len(first), device=document.device)
        indices = (first[:, None] + own).clamp(max=len(own) - 1)  # row i: first_i, first_i + 1, ...; own - first + 1 of them
        return BlockMask.from_kv_blocks((own - first + 1).int()[None, None], indices.int()[None, None], BLOCK_SIZE=BLOCK,
                                        mask_mod=lambda b, h, q, k: rule(labels, q, k), seq_lengths=(len(document),) * 2)

    def _flex(self, q, k, v):
        attention = fused(flex_attention, q)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        # Tiles of 64 keys: with short documents more than twice as fast as the default of 128. Never ROWS_GUARANTEED_SAFE, though
        # every query sees itself: one that sees nothing in its first tile of keys would come out as NaN.
        options = {"fwd_BLOCK_N": 64} if q.is_cuda and q.dtype != torch.float32 else None
        attended = attention(q, k, v, block_mask=self.block_mask, enable_gqa=q.shape[1] != k.shape[1], kernel_options=options)
        return attended[0].transpose(0, 1)


@cache
def _flash_varlen():
    """Causal flash attention, f(q, k, v, cu_seqlens, max_seqlen): flash_attn's where it is installed, else PyTorch's own."""
    try:
        from flash_attn import flash_attn_varlen_func
        return lambda q, k, v, cu, longest: flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True)
    except ImportError:
        from torch.nn.attention.varlen import varlen_attn
    # torch 2.11 takes fewer heads of k and v without being told
    gqa = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return lambda q, k, v, cu, longest: varlen_attn(q, k, v, cu, cu, longest, longest, window_size=(-1, 0), **gqa)


class KVCache:
    """Keys and values of `rows` sequences of up to `length` tokens; each row is its own sequence and may be reused."""

    def __init__(self, config: Config, rows: int, length: int, device, dtype):
        shape = (config.num_hidden_layers, 2, rows, config.num_key_value_heads, length, config.head_dim)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)
        self.group = config.num_attention_heads // config.num_key_value_heads  # heads that share keys and values
        self.blocks = torch.arange(length // BLOCK, dtype=torch.int32, device=device).repeat(rows, 1, 1, 1)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)  # tokens read so far: the next position

    @staticmethod
    def bytes_per_row(config: Config, length: int, dtype) -> int:
        return 2 * config.num_hidden_layers * length * config.num_key_value_heads * config.head_dim * dtype.itemsize

    def prefill(self, rows: torch.Tensor, labels: Labels, position_ids: torch.Tensor):
        """`attend` that reads one packed row of prompts and stores document i in cache row `rows[i]`, from its start."""
        attend, row = PackedAttention(labels), rows[labels.document]
        self.lengths[rows] = torch.bincount(labels.document, minlength=len(rows))

        def prefill(layer, q, k, v):
            self.kv[layer, :, row, :, position_ids] = torch.stack((k, v), 1)
            return attend(layer, q, k, v)
        return prefill

    def decode(self, active: torch.Tensor, longest: int):
        """`attend` for one more token of every row, at position `lengths`; only rows in bool `active` grow by it.

        `longest`: at least as many tokens as any row will then have. A GPU asks the rows themselves, block by block.
        """
        position = self.lengths.clone()
        attend = self._attend_blocks(position) if position.is_cuda else self._attend_all(position, longest)
        self.lengths += active

        def decode(layer, q, k, v):
            fused(_append, position)(k, v, self.kv[layer], position)
            # heads that share keys and values are so many queries at one position
            return attend(q.unflatten(1, (k.shape[1], -1)), *self.kv[layer]).flatten(1, 2)
        return decode

    @staticmethod
    def _attend_all(position, longest):
        mask = torch.arange(longest, device=position.device) <= position[:, None, None, None]
        return lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :, :longest], v[:, :, :longest], attn_mask=mask)

    def _attend_blocks(self, position):
        mask = BlockMask.from_kv_blocks((position // BLOCK + 1).int()[:, None, None], self.blocks, BLOCK_SIZE=BLOCK,
                                        mask_mod=lambda b, h, q, k: k <= position[b], seq_lengths=(self.group, self.kv.shape[-2]),
                                        compute_q_blocks=False)
        return lambda q, k, v: fused(flex_attention, q)(q, k, v, block_mask=mask)


def _append(k, v, kv, position):
    """Puts k and v [rows, kv_heads, head_dim] into kv [2, rows, kv_heads, length, head_dim] at `position` [rows]."""
    kv[:, torch.arange(len(position), device=position.device), :, position] = torch.stack((k, v), 1)
