"""CUDA graphs: what a GPU does again and again is recorded once and replayed as a whole.

A layer is some hundred small kernels, forward and backward, and launching them takes a CPU longer than running them takes the
GPU. Packed rows of one size (data.RowShape) need the same launches every time, and so does a decoding step (sample.py).
"""

from dataclasses import replace
from typing import Callable

import torch

from attention import PackedAttention
from data import Row
from model import Model


def recorded(run: Callable[[], None]) -> Callable[[], None]:
    """`run`, which works on fixed memory, as the replay of a CUDA graph. To record it, it is called three times."""
    _warm_up(run)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _warm_up(run: Callable[[], None]) -> None:
    """Two calls, in which functions are compiled and libraries allocate what they keep."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)


def run_row(model: Model, inputs_embeds: torch.Tensor, row: Row, rule, adapter: str | None = None) -> torch.Tensor:
    """Hidden states [T, hidden_size] of a packed row under a mask rule; `model.graphs`, if it is a dict, keeps the graphs.

    The result lives until the next row of the same kind is run. Parameters that learn need a `.grad`, to which backward adds.
    """
    if model.graphs is None:
        return model(inputs_embeds, row.position_ids, PackedAttention(row.labels, rule), adapter)
    kind = adapter, rule, len(row.ids), torch.is_grad_enabled(), model.training  # with dropout or without
    if kind not in model.graphs:
        model.graphs[kind] = _Graphs(model, inputs_embeds, row, rule, adapter)
    graphs = model.graphs[kind]
    if not torch.is_grad_enabled():
        return graphs.forward(inputs_embeds, row)
    return _Replay.apply(graphs.anchor, inputs_embeds, graphs, row)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, inputs_embeds, graphs, row):
        ctx.graphs = graphs
        return graphs.forward(inputs_embeds, row)

    @staticmethod
    def backward(ctx, grad):
        return None, ctx.graphs.backward(grad), None, None


class _Graphs:
    """Two recordings, on fixed memory: row to hidden states, and their gradient to that of the input and the parameters."""

    def __init__(self, model, inputs_embeds, row, rule, adapter):
        self.anchor = torch.zeros((), device=inputs_embeds.device, requires_grad=True)  # makes autograd come back to us
        self.inputs = [x.detach().clone() for x in self._inputs(inputs_embeds, row)]
        x, position_ids, *labels = self.inputs
        labels = replace(row.labels, **dict(zip(("document", "kind", "segment"), labels)))
        x.requires_grad_(inputs_embeds.requires_grad)
        self.learned = [p for p in model.parameters() if p.requires_grad] if torch.is_grad_enabled() else []
        record = lambda: model(x, position_ids, PackedAttention(labels, rule), adapter)

        with torch.random.fork_rng([inputs_embeds.device]):  # a resumed run, too, begins with this
            self._record(record, x)

    def _record(self, run, x):
        def both():
            h = run()
            self.grad = torch.zeros_like(h)
            if h.requires_grad:
                self._gradients(h, x)
        _warm_up(both)
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward_graph):
            h = run()
        if h.requires_grad:
            with torch.cuda.graph(self.backward_graph, pool=self.forward_graph.pool()):
                self.grad_input = self._gradients(h, x)
        self.hidden_states = h.detach()

    @staticmethod
    def _inputs(inputs_embeds, row):
        return inputs_embeds, row.position_ids, row.labels.document, row.labels.kind, row.labels.segment

    def _gradients(self, h, x):
        """Adds the parameters' gradients to their .grad; returns the input's."""
        wanted = self.learned + [x] * x.requires_grad
        gradients = torch.autograd.grad(h, wanted, self.grad, allow_unused=True)
        pairs = [(p.grad, g) for p, g in zip(self.learned, gradients) if g is not None]
        if pairs:
            torch._foreach_add_(*map(list, zip(*pairs)))
        return gradients[-1] if x.requires_grad else None

    def forward(self, inputs_embeds, row):
        torch._foreach_copy_([x.detach() for x in self.inputs], [x.detach() for x in self._inputs(inputs_embeds, row)])
        self.forward_graph.replay()
        return self.hidden_states.detach()

    def backward(self, grad):
        self.grad.copy_(grad)
        self.backward_graph.replay()
        return self.grad_input
