"""What a GPU adds to packed rows, as far as a CPU can show it: FlexAttention's blocks, filler, compilation, recomputation."""

from dataclasses import replace
import math
import random

import pytest
import torch

import attention
from attention import PackedAttention, Runner
import data
from experiments import demo
import latents
from load_hf_weights import Reasoning
import lora
import masks
from model import Config, Model
from test_training import phase2_settings
from train_phase1 import Encoder, Phase1
from train_phase2 import Phase2

CONFIG = Config(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    tie_word_embeddings=True,
)
RULES = [("latent", masks.causal), ("encoder", masks.induction), ("decoder", masks.supervision)]


def random_examples(count: int, seed: int, k: int = 5) -> list[data.Example]:
    rng = random.Random(seed)
    ids = lambda n: [rng.randrange(300) for _ in range(n)]
    plain = [
        data.Example(
            ids(rng.randint(3, 40)), ids(rng.randint(1, 90)), [5, 6], ids(rng.randint(2, 20))
        )
        for _ in range(count)
    ]
    alpha = lambda n: (torch.rand(n, k).softmax(-1), torch.randint(300, (n, k)))
    return [replace(e, alpha=alpha(data.num_latents(e, 3))) for e in plain]


def task_of(phase: int, dropout: float = 0.0):
    torch.manual_seed(0)
    model = demo.initialize(
        Model(CONFIG).requires_grad_(False), torch.Generator().manual_seed(1), 0.1
    )
    for name in ("encoder", "decoder", "student"):
        lora.add_adapter(model, name, 4, 8, dropout)
        for p in lora.adapter_parameters(model, name).values():
            p.data.normal_(0, 0.1)
    run = Runner(model)
    if phase == 1:
        return Phase1(run, Encoder(run, 3, 5), ("encoder", "decoder"))
    return Phase2(run, phase2_settings(), Reasoning("latent", 5, 3), 0)


def shape_of(*rows):
    """A shape that holds the rows, with filler."""
    tokens = max(len(row.ids) for row in rows)
    count, longest = (
        max(f(row) for row in rows)
        for f in (lambda r: len(r.labels.starts), lambda r: r.labels.longest)
    )
    return data.RowShape(
        -(-tokens // attention.BLOCK) * attention.BLOCK, count, count + 50, max(longest, 64)
    )


def padded(task, examples, shape=None):
    """The rows of a task, with filler."""
    rows = vars(task.pack(examples)).values()
    inner = [x for x in rows if isinstance(x, data.PackedBatch)]
    rows = task.pack(examples, shape or shape_of(*inner))
    tokens = {len(x.ids) for x in vars(rows).values() if isinstance(x, data.PackedBatch)}
    assert len(tokens) == 1 and min(tokens) > max(len(x.ids) for x in inner)
    return data.to_device(rows, torch.device("cpu"))


def loss_and_gradients(task, rows):
    torch.manual_seed(5)
    task.zero_grad(set_to_none=True)
    loss = sum(task(rows).values())
    loss.backward()
    return loss.detach(), {
        n: p.grad.clone() for n, p in task.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("name,rule", RULES)
@torch.no_grad()  # FlexAttention has no backward on a CPU; test_gpu.py has it
def test_flex_attention(name, rule):
    """FlexAttention, told only which blocks to look at and the rule, gives what SDPA gives for each document by itself."""
    for seed in range(5):
        examples = random_examples(9, seed)
        shape = shape_of(data.pack_examples(name, examples, 3))
        row = data.pack_examples(name, examples, 3, shape)
        T = len(row.ids)
        q, k, v = (torch.randn(T, heads, 16) for heads in (4, 2, 2))
        attend = PackedAttention(row.labels, rule)
        attend.block_mask = attend._block_mask()
        torch.testing.assert_close(
            attend._flex(q, k, v), attend._by_length(q, k, v), atol=1e-5, rtol=0
        )
        blocks = attend.block_mask.kv_num_blocks.sum()
        assert (
            T >= 4 * attention.BLOCK
            and blocks < (T // attention.BLOCK) * (T // attention.BLOCK + 1) / 2
        )  # fewer than causal


@torch.no_grad()
def test_flex_attention_on_a_cache():
    """A GPU's decoding, which looks at the blocks that a row has filled, gives what SDPA gives."""
    length, cache = (
        3 * attention.BLOCK,
        attention.KVCache(CONFIG, 5, 3 * attention.BLOCK, "cpu", torch.float32),
    )
    position = torch.tensor([0, 5, attention.BLOCK - 1, attention.BLOCK, length - 1])
    torch.manual_seed(0)
    q, k, v = torch.randn(5, 4, 16), *torch.randn(2, 5, 2, 16)
    cache.kv.normal_()
    cache.lengths.copy_(position)
    dense = cache.decode(torch.tensor([True, True, False, True, True]))[1]
    assert cache.lengths.tolist() == (position + torch.tensor([1, 1, 0, 1, 1])).tolist()
    blocks = attention.CachedAttention(cache.kv[1], position, cache.block_mask(position))
    torch.testing.assert_close(dense(q, k, v), blocks(q, k, v), atol=1e-5, rtol=0)
    assert torch.equal(cache.kv[1, 0, 2, :, position[2]], k[2])


def test_documents_for_flash_attention():
    examples = random_examples(3, 1)
    row = data.pack_examples("cot", examples)
    lengths = torch.bincount(row.labels.document).tolist()
    shape = data.RowShape(2 * len(row.ids), 3, 9, row.labels.longest)
    full = data.pack_examples("cot", examples, shape=shape)
    starts = full.labels.starts
    assert len(full.ids) == shape.tokens and full.labels.longest == shape.longest
    for x, y in ((row.ids, full.ids), (row.position_ids, full.position_ids)):
        assert torch.equal(x, y[: len(x)])
    assert torch.equal(row.targets, full.targets)
    assert torch.equal(row.target_index, full.target_index)
    as_on_a_cpu = data.pack_examples("cot", examples, shape=data.RowShape(shape.tokens, 3))
    assert torch.equal(as_on_a_cpu.ids, row.ids)
    assert torch.equal(
        torch.bincount(full.labels.document), starts.diff()[: full.labels.document[-1] + 1]
    )
    assert len(starts) == 10 and starts.diff()[:3].tolist() == lengths
    assert starts[-1] == len(full.ids) and int(starts.diff().max()) <= shape.longest


def test_row_shape_holds_what_is_packed():
    rng = random.Random(2)
    for _ in range(100):
        lengths = [rng.randint(2, rng.choice([10, 300])) for _ in range(60)]
        budget = rng.randint(max(lengths), 2000)
        shape = data.row_shape(lengths, 20, budget, torch.device("cuda"))
        assert shape.tokens % attention.BLOCK == 0 and shape.tokens < budget + attention.BLOCK
        for indices in data.distribute(lengths[:20], 1, shape.tokens, shape.examples):
            assert len(indices) <= shape.examples
            filler = shape.tokens - sum(lengths[i] for i in indices)
            assert filler >= 0 and max(lengths[i] for i in indices) <= shape.longest
            for shorter in (
                1,
                rng.random(),
            ):  # of a row's two layouts one may be far shorter than what was packed by
                filler = shape.tokens - sum(math.ceil(shorter * lengths[i]) for i in indices)
                assert len(indices) + -(-filler // shape.longest) <= shape.documents


@pytest.mark.parametrize("phase", [1, 2])
def test_filler_counts_for_nothing(phase):
    task, examples = task_of(phase), random_examples(6, 3)
    expected, gradients = loss_and_gradients(task, task.pack(examples))
    for shape in (None, data.RowShape(1024, 6, 60, 140)):
        loss, with_filler = loss_and_gradients(task, padded(task, examples, shape))
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-6)
        for n in gradients:
            torch.testing.assert_close(with_filler[n], gradients[n], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("phase", [1, 2])
def test_computed_in_the_precision_of_the_model(phase):
    """Nothing on the way rounds to less: a model in float64 has losses in float64."""
    examples, losses = random_examples(6, 5), []
    for dtype in (torch.float32, torch.float64):
        task = task_of(phase).to(dtype)
        losses.append(task(task.pack(examples)))
    for key, loss in losses[1].items():
        assert loss.dtype == torch.float64
        torch.testing.assert_close(losses[0][key].double(), loss, atol=0, rtol=1e-5)


@pytest.mark.parametrize("phase", [1, 2])
def test_checkpointed_activations(phase):
    """Layers computed again in backward, with the dropout of the first time."""
    task = task_of(phase, dropout=0.3).train()
    rows = task.pack(random_examples(6, 4))
    expected, gradients = loss_and_gradients(task, rows)
    task.runner.recompute = True
    loss, again = loss_and_gradients(task, rows)
    assert loss == expected and all(torch.equal(again[n], gradients[n]) for n in gradients)


def kept_for_backward(loss):
    """Sizes of all tensors that the graph behind `loss` keeps."""
    nodes, seen, kept = [loss.grad_fn], set(), []
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names = [n for n in dir(node) if n.startswith("_saved_")]
        held = [*getattr(node, "saved_tensors", ()), *(getattr(node, n) for n in names)]
        held += [*getattr(node, "__dict__", {}).values()]
        kept += [x.numel() for x in held if isinstance(x, torch.Tensor)]
        nodes += [x for x, _ in node.next_functions]
    return kept


def test_no_logits_are_kept():
    """Neither loss keeps the logits of all rows for backward, whatever the head."""
    h, head = torch.randn(40, 8, requires_grad=True), torch.randn(500, 8, requires_grad=True)
    plain = (h @ head.T).log_softmax(-1).sum()
    assert max(kept_for_backward(plain)) == 40 * 500  # which would be seen
    losses = (
        latents.cross_entropy(h, head, torch.randint(500, (40,))),
        latents.kl_divergence(
            h, head, torch.rand(40, 3), torch.randint(500, (40, 3)), torch.rand(40)
        ),
    )
    for loss in losses:
        kept = kept_for_backward(loss)
        assert kept and max(kept) <= head.numel() < 40 * 500


def test_nothing_is_compiled_anew(monkeypatch):
    """The layers that a GPU compiles, traced here as a whole: rows of one shape need nothing new after the first step."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    flex = PackedAttention._flex

    def init(self, labels, rule=masks.causal):
        self.labels, self.rule = labels, rule
        self.block_mask = self._block_mask()

    monkeypatch.setattr(PackedAttention, "__init__", init)
    monkeypatch.setattr(
        PackedAttention, "__call__", lambda self, q, k, v: flex(self, q, k, v).detach() + 0 * q
    )
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *a: None)
    task, graphs = task_of(1, dropout=0.1).train(), []
    task.model.compile_layers(backend="eager", fullgraph=True)
    for step in range(6):
        shape = data.RowShape(2048, 20, 60, 200)
        loss_and_gradients(task, padded(task, random_examples(4 + step % 5, step), shape))
        graphs.append(counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert graphs[0] == graphs[-1] == 3  # the layer with each adapter, and the last norm
