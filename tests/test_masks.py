"""Layouts, masks, positions and labels against the oracle, on random packed examples."""

import random

import pytest
import torch

import data
import masks
import oracle
from train_phase1 import next_latents

KINDS = {"Q": masks.PROMPT, "S": masks.TEXT, "Z": masks.LATENT, "A": masks.ANSWER}


def random_example(rng) -> oracle.Example:
    ids = lambda low, high: [rng.randrange(1, 1000) for _ in range(rng.randint(low, high))]
    return oracle.Example(
        ids(1, 6), ids(1, 3), ids(1, 1) if rng.random() < 0.2 else ids(1, 15), ids(1, 3), ids(1, 4)
    )


def ours(example: oracle.Example) -> data.Example:
    return data.Example(
        example.question + example.think, example.chain, example.end_think, example.answer
    )


def test_worked_example():
    """The matrix and the positions of an example worked out by hand."""
    example = data.Example([1, 2, 3], [4, 5, 6, 7], [8], [9])
    row = data.pack_examples("decoder", [example], 2)
    assert (
        "\n".join(
            "".join("1" if x else "." for x in line)
            for line in masks.dense(masks.supervision, row.labels)
        )
        == """\
1........
11.......
111......
1111.....
...11....
...111...
1111..1..
1111..11.
1111..111"""
    )
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 4, 5, 6]


@pytest.mark.parametrize("name", masks.RULES)
def test_against_brute_force(name):
    rng = random.Random(name)
    for _ in range(120):
        r = rng.choice([1, 2, 3, 4, 16])
        examples = [random_example(rng) for _ in range(rng.randint(1, 4))]
        mine = [ours(e) for e in examples]
        row = data.pack_examples(name, mine, r)
        tokens = [t for e in examples for t in oracle.tokens(name, e, r)]
        assert [0 if t is None else t for t, _, _ in tokens] == row.ids.tolist()
        assert [KINDS[kind] for _, kind, _ in tokens] == row.labels.kind.tolist()
        assert row.latent_index.tolist() == [i for i, (t, _, _) in enumerate(tokens) if t is None]
        assert row.position_ids.tolist() == [
            p for e in examples for p in oracle.positions(name, e, r)
        ]
        assert (
            masks.dense(masks.RULES[name], row.labels).numpy()
            == oracle.packed_mask(name, examples, r)
        ).all()
        wanted = [
            (i, x)
            for i, x in enumerate(x for e in examples for x in oracle.labels(name, e, r))
            if x is not None
        ]
        if name == "encoder":  # each chain token belongs to the next latent, numbered from 0
            latents = row.latent_index.tolist()
            chain = [(place, t) for place, (t, kind, _) in enumerate(tokens) if kind == "S"]
            wanted = [(min(n for n, i in enumerate(latents) if i > place), t) for place, t in chain]
            assert list(zip(next_latents(row).tolist(), row.targets.tolist())) == wanted
            wanted = [(place - 1, t) for place, t in chain]
        assert list(zip(row.target_index.tolist(), row.targets.tolist())) == wanted
        assert sum(data.num_tokens(name, e, r) for e in mine) == len(tokens)
        if name != "encoder":
            assert sum(data.num_targets(name, e, r) for e in mine) == len(row.targets)


def test_documents_need_not_be_numbered_from_zero():
    labels = masks.Labels(torch.tensor([5, 5, 9]), torch.zeros(3), torch.zeros(3), None, 2)
    assert masks.dense(masks.causal, labels).tolist() == [
        [True, False, False],
        [True, True, False],
        [False, False, True],
    ]


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_pack(parts):
    rng = random.Random(parts)
    for _ in range(100):
        lengths = [rng.randint(1, 50) for _ in range(rng.randint(parts, 60))]
        most = rng.choice([60, 1, 3, 7])
        rows = data.distribute(lengths, parts, 50, most)
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        assert all(row and sum(lengths[i] for i in row) <= 50 and len(row) <= most for row in rows)
        assert len(rows) % parts == 0 or len(rows) == len(lengths) > parts
