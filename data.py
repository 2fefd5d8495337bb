"""JSONL line -> Example -> layout -> packed row. The layouts are the table in docs/METHOD.md."""

from dataclasses import dataclass, is_dataclass

import numpy as np
import torch
import torch.nn.functional as F

from lib.errors import UserError
from lib.files import read_jsonl, reading
from lib.tokenizer import END_THINK, THINK
from masks import ANSWER, BLOCK, LATENT, PROMPT, TEXT, Labels, dual_track_positions


@dataclass
class Example:
    """Token ids of one example. `prompt` is Q <think>, `answer` ends with the end-of-turn token.

    alpha: in phase 2 its cached latents, (probs float16 [N, k], ids int32 [N, k]).
    """

    prompt: list[int]
    chain: list[int]
    end_think: list[int]
    answer: list[int]
    alpha: tuple = ()


def text_field(line, key):
    """line[key], a string that is not blank. Raises KeyError or ValueError."""
    value = line[key]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'the field "{key}" is empty or not a string')
    return value


def written_chain(line):
    """The chain of a line, without the think tags around it. Empty where "cot" is blank."""
    if not str(line["cot"]).strip():
        return ""
    chain = text_field(line, "cot").strip().removeprefix(THINK).removesuffix(END_THINK)
    if END_THINK in chain:
        raise ValueError(f'the field "cot" has {END_THINK} in its middle')
    return chain


def load_examples(path, tokenizer, say=print, chain=True):
    """Training examples from {"problem", "cot", "cot_answer"} lines.

    Examples whose chain holds no token of the vocabulary are skipped and counted. `chain` False:
    all chains are left empty.
    """
    lines = read_jsonl(path)
    examples = []
    for line in lines:
        with reading(line["_place"]):
            tokens = tokenizer.encode(written_chain(line)) if chain else []
            answer = tokenizer.encode(text_field(line, "cot_answer")) + [tokenizer.end_of_turn]
            prompt = tokenizer.prompt(text_field(line, "problem"))
        if tokens or not chain:
            examples.append(Example(prompt, tokens, tokenizer.end_think, answer))
    if skipped := len(lines) - len(examples):
        say(f"{path}: skipped {skipped} examples without a chain")
    if not examples:
        raise UserError(f"{path}: no line has a chain; name another file")
    return examples


def segments(chain, r):
    """S_1 ... S_N: the chain in pieces of r tokens, the last may be shorter."""
    return [chain[i : i + r] for i in range(0, len(chain), r)]


def num_latents(e, r):
    """N: the number of segments, and so of latents, of an example."""
    return -(-len(e.chain) // r)


def layout(name, e, parts):
    """ids, kind, segment, position of every token of `e`, each int [T]. A latent has id 0.

    `name` is "cot", "encoder", "decoder" or "latent". `parts` are the segments S_1 ... S_N.
    """
    ids, kind, segment = [], [], []

    def add(tokens, kind_of_all, i=0):
        ids.extend(tokens)
        kind.extend([kind_of_all] * len(tokens))
        segment.extend([i] * len(tokens))

    add(e.prompt, PROMPT)
    for i, part in enumerate(parts, 1):
        if name in ("cot", "encoder"):
            add(part, TEXT, i)
        if name == "decoder" and i > 1:
            add(part, TEXT, i - 1)  # S_i continues Z_{i-1}
        if name != "cot":
            add([0], LATENT, i)
    add(e.end_think, ANSWER)
    if name != "encoder":
        add(e.answer, ANSWER)
    ids, kind, segment = (np.array(x, dtype=np.int64) for x in (ids, kind, segment))
    positions = dual_track_positions(kind) if name == "decoder" else np.arange(len(ids))
    return ids, kind, segment, positions


def num_tokens(name, e, r=1):
    """The length of a layout."""
    n = len(e.chain)
    text = {"decoder": max(n - r, 0), "latent": 0}.get(name, n)
    latents = num_latents(e, r) * (name != "cot")
    answer = len(e.answer) * (name != "encoder")
    return len(e.prompt) + text + latents + len(e.end_think) + answer


def num_targets(name, e, r=1):
    """How many targets a layout but the encoder's has: chain tokens, </think> and the answer."""
    return num_tokens(name, e, r) - len(e.prompt) - num_latents(e, r) * (name != "cot")


@dataclass
class PackedBatch:
    """Examples one after another in one row of T tokens.

    ids, position_ids: int [T]. latent_index: int [n], where the latents are.
    targets: int [m], tokens to predict. target_index: int [m], the position before each.
    """

    ids: torch.Tensor
    position_ids: torch.Tensor
    labels: Labels
    latent_index: torch.Tensor
    target_index: torch.Tensor
    targets: torch.Tensor


def pack(name, layouts, shape=None):
    """One packed row from what `layout` made of each example, with filler up to a GPU's `shape`."""
    if bound := shape and shape.longest:
        for start in range(sum(len(x[0]) for x in layouts), shape.tokens, bound):
            n = min(bound, shape.tokens - start)
            layouts = [*layouts, [np.zeros(n, np.int64)] * 4]  # prompts that no loss sees
    ids, kind, segment, positions = (torch.from_numpy(np.concatenate(x)) for x in zip(*layouts))
    lengths = torch.tensor([len(x[0]) for x in layouts])
    if bound:
        lengths = F.pad(lengths, (0, shape.documents - len(lengths)))
    document = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(lengths)
    starts = F.pad(lengths.cumsum(0), (1, 0)).int()
    labels = Labels(document, kind.int(), segment.int(), starts, bound or int(lengths.max()))
    latent_index = (kind == LATENT).nonzero().squeeze(1)
    target = kind == TEXT if name == "encoder" else (kind == TEXT) | (kind == ANSWER)
    at = target.nonzero().squeeze(1)
    return PackedBatch(ids, positions, labels, latent_index, at - 1, ids[at])


def pack_examples(name, examples, r=1, shape=None):
    """One packed row of `examples` in the layout `name`; `shape` as for `pack`."""
    return pack(name, [layout(name, e, segments(e.chain, r)) for e in examples], shape)


@dataclass(frozen=True)
class RowShape:
    """What all rows of a run have in common: at most so many tokens and examples.

    `longest` is 0 on a CPU. On a GPU rows are filled up to `tokens`. Flash attention launches work
    for `documents` (examples and filler) times `longest`: both are tight bounds.
    """

    tokens: int
    examples: int
    documents: int = 0
    longest: int = 0


def row_shape(lengths, batch_size, row_tokens, device):
    """Rows that a step of `batch_size` examples of such lengths fills well.

    On a GPU there are no more rows than `row_tokens` asks for. They are only as long as an
    unusually long batch needs (mean + two standard deviations).
    """
    mean = np.mean(lengths)
    longest = max(lengths)
    if device.type != "cuda":
        return RowShape(max(row_tokens, longest), len(lengths))
    expected = batch_size * mean + 2 * batch_size**0.5 * np.std(lengths)
    tokens = max(expected / np.ceil(expected / row_tokens), longest)
    tokens = int(np.ceil(tokens / BLOCK)) * BLOCK
    examples = int(1.25 * tokens / mean) + 2
    return RowShape(tokens, examples, examples + tokens // longest + 2, longest)


def to_device(x, device):
    """A tensor, or a dataclass of such things, on `device`."""
    if isinstance(x, torch.Tensor):
        return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x
    if is_dataclass(x):
        return type(x)(*(to_device(y, device) for y in vars(x).values()))
    return x


def distribute(lengths, ranks, budget, most):
    """Lists of indices: items into evenly loaded rows of at most `budget` tokens and `most` items.

    Longest first, each to the row with the least in it. No row is empty. The number of rows is a
    multiple of `ranks`, unless that takes more rows than items. No item may be over the budget.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    count = max(-(-sum(lengths) // budget), -(-len(lengths) // most))
    while True:
        count = min(-(-count // ranks) * ranks, len(lengths))
        rows = [[] for _ in range(count)]
        loads = [0] * count
        for i in order:
            row = loads.index(min(loads))
            rows[row].append(i)
            loads[row] += lengths[i]
        fits = max(loads) <= budget and max(map(len, rows)) <= most
        if fits or count == len(lengths):
            return rows
        count += max(1, count // 10)
