"""The model on packed rows under a mask rule; the attention functions of that, and of a KV cache.

Which kernel serves which step:
    causal rows on a GPU, bf16      flash attention over documents of any length (varlen)
    other rows on a GPU             FlexAttention
    packed rows on a CPU            SDPA with dense masks, on groups of documents of similar length
    decoding with the KV cache      FlexAttention on a GPU, SDPA on a CPU
No step costs the square of a packed row's length.
"""

from collections import defaultdict
from copy import deepcopy
from functools import cache, cached_property, partial
import gc
import inspect
from itertools import repeat

import torch
from torch import nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.utils.rnn import pad_sequence

from lora import project
from masks import BLOCK, causal, earlier


class PackedAttention:
    """Attention of one packed row with masks.Labels: each document by itself, under `rule`."""

    def __init__(self, labels, rule=causal):
        self.labels, self.rule = labels, rule
        if labels.document.is_cuda:  # made here, outside the compiled layers
            self.block_mask = self._block_mask()

    def __call__(self, q, k, v):
        if not q.is_cuda:
            return self._by_length(q, k, v)
        if self.rule is causal and q.dtype != torch.float32:
            return flash_varlen()(q, k, v, self.labels.starts, self.labels.longest)
        return self._flex(q, k, v)

    @cached_property
    def groups(self):
        """[(token indices [documents, length], mask)] of documents of similar length.

        Lengths in a group differ by a factor of two at most. Behind the end of a document indices
        are -1: as keys nobody sees them, as queries they see all (else their softmax is NaN).
        """
        by_size, T = defaultdict(list), len(self.labels.document)
        for tokens in torch.arange(T).split(self.labels.starts.diff().tolist()):
            by_size[len(tokens).bit_length()].append(tokens)
        grids = [pad_sequence(x, batch_first=True, padding_value=-1) for x in by_size.values()]
        seen = (
            self.rule(self.labels, x[:, :, None], x[:, None]) & (x >= 0)[:, None] for x in grids
        )
        return [(x, (mask | (x < 0)[:, :, None])[:, None]) for x, mask in zip(grids, seen)]

    def _by_length(self, q, k, v):
        out = torch.zeros_like(q)
        gqa = q.shape[1] != k.shape[1]
        for grid, mask in self.groups:
            at = grid.clamp(min=0).flatten()
            shape, real = grid.shape, grid >= 0
            qkv = (x.index_select(0, at).unflatten(0, shape).transpose(1, 2) for x in (q, k, v))
            part = F.scaled_dot_product_attention(*qkv, attn_mask=mask, enable_gqa=gqa)
            out = out.index_copy(0, grid[real], part.transpose(1, 2)[real])
        return out

    def _block_mask(self):
        """A block of queries needs the key blocks from its first document's to its own."""
        labels, rule, T = self.labels, self.rule, len(self.labels.document)
        first = labels.starts[labels.document[::BLOCK]] // BLOCK
        own = torch.arange(len(first), dtype=torch.int32, device=first.device)
        indices = (first[:, None] + own).clamp(max=len(own) - 1)  # row i: first_i, first_i + 1, ...
        return BlockMask.from_kv_blocks(
            (own - first + 1)[None, None],
            indices[None, None],
            BLOCK_SIZE=BLOCK,
            mask_mod=lambda b, h, q, k: rule(labels, q, k),
            seq_lengths=(T, T),
        )

    def _flex(self, q, k, v):
        # Tiles of 64 keys: twice as fast as 128 on short documents. ROWS_GUARANTEED_SAFE would give
        # NaN for a query that sees nothing in its first tile.
        options = {"fwd_BLOCK_N": 64} if q.dtype != torch.float32 else None
        more = dict(enable_gqa=q.shape[1] != k.shape[1], kernel_options=options)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return flex_attention(q, k, v, block_mask=self.block_mask, **more)[0].transpose(0, 1)


@cache
def flash_varlen():
    """Causal flash attention f(q, k, v, starts, longest): flash_attn's, or else PyTorch's own."""
    try:
        from flash_attn import flash_attn_varlen_func as flash

        return lambda q, k, v, at, n: flash(q, k, v, at, at, n, n, causal=True)
    except ImportError:
        from torch.nn.attention.varlen import varlen_attn
    # torch 2.11 takes grouped heads without this argument
    gqa = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return lambda q, k, v, at, n: varlen_attn(q, k, v, at, at, n, n, window_size=(-1, 0), **gqa)


class Runner:
    """Runs a model on packed rows.

    graphs: rows of one shape are replayed as CUDA graphs. recompute: backward computes each layer
    again, which takes less memory; then there are no graphs. dtype: of the layers' arithmetic.
    """

    def __init__(self, model, graphs=False, recompute=False, dtype=None):
        self.model, self.recompute, self.dtype = model, recompute, dtype
        self.graphs = graphs and not recompute
        self.recorded = {}

    def __call__(self, inputs_embeds, row, rule, adapter=None):
        """inputs_embeds [T, hidden_size] of a PackedBatch -> hidden states [T, hidden_size].

        `rule` is of masks.py. `adapter` names the LoRA adapter to use, None the base alone.
        """
        if not self.graphs:
            return self.run(inputs_embeds, row, rule, adapter)
        key = rule, adapter, self.model.training
        if key not in self.recorded:
            self.recorded[key] = RecordedRow(self, inputs_embeds, row, rule, adapter)
        return self.recorded[key].replay(inputs_embeds, row)

    def forget(self):
        """Drops recorded and compiled code. It serves only the parameters that learned so far."""
        self.recorded.clear()
        torch.compiler.reset()
        gc.collect()

    def run(self, inputs_embeds, row, rule, adapter):
        """The same without graphs."""
        attend = repeat(PackedAttention(row.labels, rule))
        adapted = partial(project, adapter=adapter)
        x = inputs_embeds.to(self.dtype or inputs_embeds.dtype)
        return self.model(x, row.position_ids, attend, adapted, self.recompute)


class RecordedRow(nn.Module):
    """One row in fixed memory; forward and backward are recorded as CUDA graphs."""

    def __init__(self, runner, inputs_embeds, row, rule, adapter):
        super().__init__()
        self.runner, self.row, self.rule, self.adapter = runner, deepcopy(row), rule, adapter
        x = inputs_embeds.detach().clone().requires_grad_(inputs_embeds.requires_grad)
        with torch.random.fork_rng([x.device]):  # so that a resumed run draws the same numbers
            torch.cuda.make_graphed_callables(self, (x,), allow_unused_input=True)

    def parameters(self, recurse=True):
        """The parameters that the recorded backward makes gradients of."""
        model = self.runner.model
        for name, p in (*model.layers.named_parameters(), *model.norm.named_parameters()):
            used = f".adapters.{self.adapter}." in name or ".adapters." not in name
            if p.requires_grad and used:
                yield p

    def forward(self, x):
        return self.runner.run(x, self.row, self.rule, self.adapter)

    def replay(self, inputs_embeds, row):
        """Hidden states [T, hidden_size] of `row`, which has the shape of the recorded one."""
        self.row.position_ids.copy_(row.position_ids)
        for name in ("document", "kind", "segment", "starts"):
            getattr(self.row.labels, name).copy_(getattr(row.labels, name))
        return self(inputs_embeds)


class KVCache:
    """Keys and values of `slots` sequences of up to `length` tokens, a multiple of BLOCK.

    kv is [layers, 2, slots, kv_heads, length, head_dim]. Each slot is a sequence of its own and may
    be reused.
    """

    def __init__(self, config, slots, length, device, dtype):
        heads = config.num_key_value_heads
        shape = (config.num_hidden_layers, 2, slots, heads, length, config.head_dim)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)
        self.group = config.num_attention_heads // heads  # query heads that share keys and values
        self.lengths = torch.zeros(slots, dtype=torch.long, device=device)  # tokens read so far
        blocks = torch.arange(length // BLOCK, dtype=torch.int32, device=device)
        self.blocks = blocks.repeat(slots, 1, 1, 1)

    def prefill(self, slots, labels, position_ids):
        """Attention of each layer for packed prompts: document i goes to cache slot slots[i]."""
        attend = PackedAttention(labels)
        slot = slots[labels.document]
        self.lengths[slots] = labels.starts.diff().long()

        def of_layer(kv):
            def prefill(q, k, v):
                # such an index puts tokens first: [T, 2, kv_heads, head_dim]
                kv[:, slot, :, position_ids] = torch.stack((k, v), 1)
                return attend(q, k, v)

            return prefill

        return [of_layer(kv) for kv in self.kv]

    def decode(self, active):
        """Attention, one for each layer, of the next token of every slot, at position `lengths`.

        Only slots in bool `active` grow by it.
        """
        position = self.lengths.clone()
        self.lengths += active
        if position.is_cuda:
            mask = self.block_mask(position)
        else:
            mask = earlier(position[:, None, None, None], torch.arange(int(position.max()) + 1))
        return [CachedAttention(kv, position, mask) for kv in self.kv]

    def block_mask(self, position):
        """Reads only the blocks that a slot has filled."""
        return BlockMask.from_kv_blocks(
            (position // BLOCK + 1).int()[:, None, None],
            self.blocks,
            BLOCK_SIZE=BLOCK,
            mask_mod=lambda b, h, q, k: earlier(position[b], k),
            seq_lengths=(self.group, self.kv.shape[-2]),
            compute_q_blocks=False,
        )


class CachedAttention:
    """One layer's attention of one token per slot: stores its k and v at `position`, then looks."""

    def __init__(self, kv, position, mask):
        self.kv, self.position, self.mask = kv, position, mask

    def __call__(self, q, k, v):
        slots = torch.arange(len(q), device=q.device)
        self.kv[:, slots, :, self.position] = torch.stack((k, v), 1)
        q = q.unflatten(1, (k.shape[1], -1))  # heads that share keys are queries at one position
        if isinstance(self.mask, BlockMask):
            return flex_attention(q, *self.kv, block_mask=self.mask).flatten(1, 2)
        keys, values = self.kv[..., : self.mask.shape[-1], :]
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask).flatten(1, 2)
