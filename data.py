"""From JSONL to packed rows: examples, the four layouts (docs/METHOD.md), and packing without padding."""

from dataclasses import dataclass, fields, is_dataclass, replace
import gzip
import heapq
import json
from pathlib import Path
import zlib

import numpy as np
import torch
import torch.nn.functional as F

from attention import BLOCK
from masks import ANSWER, LATENT, PROMPT, TEXT, Labels, dual_track_positions
from runs import UserError
from tokenizer import END_THINK, THINK, Tokenizer


@dataclass
class Example:
    """Token ids (int lists) of one training example. `prompt` is Q <think>, `answer` ends with the end-of-turn token."""
    prompt: list[int]
    chain: list[int]
    end_think: list[int]
    answer: list[int]


def read_jsonl(path: str | Path) -> list[dict]:
    """The objects of a .jsonl or .jsonl.gz file; blank lines are skipped. Raises UserError with file and line."""
    path, rows = Path(path), []
    if not path.is_file():
        raise UserError(f"{path}: {'is not a file' if path.exists() else 'no such file'}; name a .jsonl or .jsonl.gz file")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    row = json.loads(line)
                    if "\\u" in line:
                        json.dumps(row, ensure_ascii=False).encode()
                    if not isinstance(row, dict):
                        raise UserError(f"{path}, line {number}: not a JSON object; write one {{...}} per line")
                    rows.append(row | {"_line": number})
    except json.JSONDecodeError as e:
        raise UserError(f"{path}, line {number}: broken JSON ({e.msg}, column {e.colno}); mend or delete it") from None
    except UnicodeEncodeError:
        raise UserError(f"{path}, line {number}: holds half a character (a lone surrogate); mend it") from None
    except (UnicodeDecodeError, OSError, EOFError, zlib.error) as e:
        raise UserError(f"{path}: cannot be read ({e}); fetch or make it again") from None
    except (ValueError, RecursionError) as e:  # an integer of thousands of digits, a nest of thousands of brackets
        raise UserError(f"{path}, line {number}: broken JSON ({e}); mend or delete it") from None
    if not rows:
        raise UserError(f"{path}: the file is empty; it needs at least one line")
    return rows


def text_field(row: dict, key: str, path) -> str:
    """row[key], which must be a string with something in it. Raises UserError with file and line."""
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        state = "missing" if key not in row else "empty" if isinstance(value, str) else "not a string"
        raise UserError(f"{path}, line {row['_line']}: the field \"{key}\" is {state}; every line needs it as text")
    return value


def written_chain(row: dict, path) -> str:
    """A row's chain, without the think tags around it. Raises UserError with file and line."""
    cot = text_field(row, "cot", path)
    cot = cot.lstrip().removeprefix(THINK) if cot.lstrip().startswith(THINK) else cot
    return cot.rstrip().removesuffix(END_THINK) if cot.rstrip().endswith(END_THINK) else cot


def training_fields(row: dict, path, chain: bool = True) -> tuple[str, str, str]:
    """Problem, written chain (empty without `chain`) and answer of a line to train on. Raises UserError with file and line."""
    problem, answer = text_field(row, "problem", path), text_field(row, "cot_answer", path)
    cot = written_chain(row, path) if chain else ""
    if chain and (not cot.strip() or END_THINK in cot):
        what = f"{END_THINK} in the midst of its chain" if cot.strip() else "no chain between its think tags"
        raise UserError(f"{path}, line {row['_line']}: the field \"cot\" holds {what}")
    return problem, cot, answer


def load_examples(path: str | Path, tokenizer: Tokenizer, chain: bool = True, skip: bool = False) -> list[Example]:
    """Training examples from {"problem", "cot", "cot_answer"} lines.

    Without `chain` the chains are left empty. `skip`: leaves out lines whose chain is empty, which benchmarks have and which are an
    error otherwise.
    """
    examples = []
    for row in read_jsonl(path):
        if skip and chain and row.get("cot") == "":
            continue
        problem, cot, answer = training_fields(row, path, chain)
        examples.append(Example(tokenizer.prompt(problem), tokenizer.encode(cot), tokenizer.end_think,
                                tokenizer.encode(answer) + [tokenizer.end_of_turn]))
    if not examples:
        raise UserError(f"{path}: no line has a chain; name another file")
    return examples


def num_latents(example: Example, r: int) -> int:
    """N = ceil(n / r)."""
    return -(-len(example.chain) // r)


def segments(chain: list[int], r: int) -> list[list[int]]:
    """S_1 ... S_N."""
    return [chain[i:i + r] for i in range(0, len(chain), r)]


def layout(name: str, example: Example, r: int = 1, ends: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    """ids, kind, segment and position of every token of `example`, each int [T]; latents have id 0.

    `name` is "cot", "encoder", "decoder" or "latent", the rows of the table in docs/METHOD.md. `ends`: where S_1 ... S_N end in the chain,
    int [N], if not after every r tokens; for the encoder.
    """
    chain, n = np.array(example.chain, int), len(example.chain)
    ends = np.minimum(r * np.arange(1, num_latents(example, r) + 1), n) if ends is None else ends
    if name == "encoder":
        before = ends  # L_i stands behind S_i
    elif name == "decoder":
        chain, before = chain[r:], ends - min(r, n)  # no S_1; Z_i stands before S_{i+1}, the last one at the end
    elif name == "latent":
        chain, before = chain[:0], 0 * ends
    else:
        before = ends[:0]
    body = np.insert(chain, before, 0)
    is_latent = np.insert(np.zeros(len(chain), bool), before, True)
    segment = np.cumsum(is_latent)  # a latent's number, and that of the text behind it
    ends_and_answer = example.end_think + example.answer if name != "encoder" else example.end_think
    head, tail = len(example.prompt), len(ends_and_answer)
    ids = np.concatenate([example.prompt, body, ends_and_answer]).astype(np.int64)
    kind = np.concatenate([np.full(head, PROMPT), np.where(is_latent, LATENT, TEXT), np.full(tail, ANSWER)])
    segment = np.concatenate([np.zeros(head, int), segment, np.zeros(tail, int)])
    positions = dual_track_positions(kind) if name == "decoder" else np.arange(len(ids))
    return ids, kind, segment, positions


def num_tokens(name: str, example: Example, r: int = 1) -> int:
    """Length of a layout, without building it."""
    n, fixed = len(example.chain), len(example.prompt) + len(example.end_think)
    latents = 0 if name == "cot" else num_latents(example, r)
    text = {"cot": n, "encoder": n, "decoder": max(n - r, 0), "latent": 0}[name]
    return fixed + latents + text + (len(example.answer) if name != "encoder" else 0)


def num_targets(name: str, example: Example, r: int = 1) -> int:
    """How many tokens of a layout are labels: its chain tokens, </think> and the answer."""
    return num_tokens(name, example, r) - len(example.prompt) - (0 if name == "cot" else num_latents(example, r))


@dataclass
class Row:
    """Examples packed into one row of T tokens.

    ids, position_ids: int [T]. labels: masks.Labels. latent_index: int [n], where the latents stand.
    target_index, targets: int [M], positions whose next token is a label, and that label; in the encoder layout the latent of each chain
    token, and that token.
    """
    ids: torch.Tensor
    position_ids: torch.Tensor
    labels: Labels
    latent_index: torch.Tensor
    target_index: torch.Tensor
    targets: torch.Tensor


def pack_row(name: str, examples: list[Example], r: int = 1, ends: list[np.ndarray] | None = None) -> Row:
    """One packed row of `examples` in the layout `name`; `ends`: of each, see `layout`."""
    parts = [layout(name, e, r, ends and ends[i]) for i, e in enumerate(examples)]
    ids, kind, segment, positions = (torch.from_numpy(np.concatenate(x)) for x in zip(*parts))
    lengths = [len(p[0]) for p in parts]
    document = torch.arange(len(parts)).repeat_interleave(torch.tensor(lengths))
    labels = Labels(document.int(), kind.int(), segment.int(), len(parts), max(lengths))
    is_target = kind == TEXT if name == "encoder" else (kind == TEXT) | (kind == ANSWER)
    labeled, latent_index = is_target.nonzero().squeeze(1), (kind == LATENT).nonzero().squeeze(1)
    target_index = latent_index[torch.searchsorted(latent_index, labeled)] if name == "encoder" else labeled - 1  # the one right before
    return Row(ids, positions, labels, latent_index, target_index, ids[labeled])


@dataclass(frozen=True)
class RowShape:
    """What all rows of a training run on a GPU have in common: their tokens, and bounds on examples, on documents (these and filler) and
    on the longest one. Tight ones, since flash attention starts work for every document and length that there might be."""
    tokens: int
    examples: int
    documents: int
    longest: int


def row_shape(lengths: list[int], batch_size: float, row_tokens: int) -> RowShape:
    """Rows that a step of `batch_size` examples of such lengths fills well: no more rows than `row_tokens` asks for, and those
    no longer than an unusually long batch (by two standard deviations) needs."""
    lengths = np.array(lengths)
    expected = batch_size * lengths.mean() + 2 * batch_size**0.5 * lengths.std()
    tokens = max(expected / np.ceil(expected / row_tokens), lengths.max())
    tokens, longest = int(np.ceil(tokens / BLOCK)) * BLOCK, int(lengths.max())
    examples = int(1.25 * tokens / lengths.mean()) + 2
    return RowShape(tokens, examples, examples + tokens // longest + 2, longest)  # a layout shorter than `lengths` leaves more to fill


def padded(row: Row, shape: RowShape | None = None) -> Row:
    """`row` with documents of filler, which no loss looks at, up to `shape`, or else to a multiple of BLOCK tokens."""
    old, T = row.labels, len(row.ids)
    shape = shape or RowShape(-(-T // BLOCK) * BLOCK, old.documents, old.documents + 1, max(old.longest, BLOCK))
    n = shape.tokens - T
    ids, position_ids, kind, segment = (F.pad(x, (0, n)) for x in (row.ids, row.position_ids, old.kind, old.segment))
    document = torch.cat([old.document, old.documents + torch.arange(n, dtype=torch.int32) // shape.longest])
    labels = Labels(document, kind, segment, shape.documents, shape.longest)
    return replace(row, ids=ids, position_ids=position_ids, labels=labels)


def to_device(x, device: torch.device, shape: RowShape | None = None):
    """`x`, a tensor or a dataclass of such things, on `device`; nobody waits for the copies. Rows are padded for a GPU."""
    if isinstance(x, torch.Tensor):
        return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
    if isinstance(x, Row) and device.type == "cuda":
        x = padded(x, shape)
    if is_dataclass(x):
        return replace(x, **{f.name: to_device(getattr(x, f.name), device, shape) for f in fields(x)})
    return x


def pack(lengths: list[int], budget: int, parts: int = 1, most: int | None = None) -> list[list[int]]:
    """Deals items out to rows of at most `budget` tokens and `most` items, evenly loaded, none of them empty; returns lists of indices.

    Longest first, each to the row with the least in it. The number of rows is a multiple of `parts`, unless that takes more
    rows than items. Needs at least `parts` items and none over the budget.
    """
    order, most = sorted(range(len(lengths)), key=lambda i: -lengths[i]), most or len(lengths)
    needed = max(-(-sum(lengths) // budget), -(-len(lengths) // most))
    count = min(-(-needed // parts) * parts, len(lengths))
    while True:
        rows, loads, heaviest = [[] for _ in range(count)], [(0, row) for row in range(count)], 0
        for i in order:
            load, row = heapq.heappop(loads)
            rows[row].append(i)
            heaviest = max(heaviest, load + lengths[i])
            if len(rows[row]) < most:
                heapq.heappush(loads, (load + lengths[i], row))
        if heaviest <= budget or count == len(lengths):
            return rows
        count = min(count + max(1, count // 10 // parts) * parts, len(lengths))
