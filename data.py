"""From JSONL to packed rows: examples, the four layouts (docs/METHOD.md), and packing without padding."""

from dataclasses import dataclass, fields, is_dataclass, replace
import gzip
import heapq
from itertools import accumulate
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
    """Token ids (int lists) of one training example. `prompt` is Q <think>, `answer` ends with the end-of-turn token. ends: where the
    pieces of a chain that is a list end; a latent stands for each where r is 0."""
    prompt: list[int]
    chain: list[int]
    end_think: list[int]
    answer: list[int]
    ends: list[int] | None = None


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


def written_chain(row: dict, path) -> str | list[str]:
    """A row's chain: a text, without the think tags around it, or the list of its pieces. Raises UserError with file and line."""
    cot = row.get("cot")
    if isinstance(cot, list):
        if not cot or not all(isinstance(piece, str) and piece for piece in cot):
            raise UserError(f"{path}, line {row['_line']}: the field \"cot\" is a list, and not of texts with something in them; mend it")
        return cot
    cot = text_field(row, "cot", path)
    cot = cot.lstrip().removeprefix(THINK) if cot.lstrip().startswith(THINK) else cot
    return cot.rstrip().removesuffix(END_THINK) if cot.rstrip().endswith(END_THINK) else cot


def encode_chain(chain: str | list[str], tokenizer: Tokenizer) -> tuple[list[int], list[int] | None]:
    """Token ids of a chain and, if it is in pieces, where each ends."""
    if isinstance(chain, str):
        return tokenizer.encode(chain), None
    ids = [tokenizer.encode(piece) for piece in chain]
    return [i for piece in ids for i in piece], list(accumulate(map(len, ids)))


def load_examples(path: str | Path, tokenizer: Tokenizer, chain: bool = True, skip: bool = False, r: int = 1) -> list[Example]:
    """Training examples from {"problem", "cot", "cot_answer"} lines, "cot" a text or, as it has to be where r is 0, a list of its pieces.

    Without `chain` the chains are left empty. `skip`: leaves out lines whose chain is empty, which benchmarks have and which are an
    error otherwise.
    """
    examples = []
    for row in read_jsonl(path):
        if skip and chain and row.get("cot") in ("", []):
            continue
        problem, answer = text_field(row, "problem", path), text_field(row, "cot_answer", path)
        cot = written_chain(row, path) if chain else ""
        if chain and not "".join(cot).strip():
            raise UserError(f"{path}, line {row['_line']}: the field \"cot\" holds no chain between its think tags")
        if not r and isinstance(cot, str):
            raise UserError(f"{path}, line {row['_line']}: --compression 0 is for chains in pieces, and here are whole texts; make \"cot\" "
                            "a list of texts")
        ids, ends = encode_chain(cot, tokenizer)
        examples.append(Example(tokenizer.prompt(problem), ids, tokenizer.end_think, tokenizer.encode(answer) + [tokenizer.end_of_turn], ends))
    if not examples:
        raise UserError(f"{path}: no line has a chain; name another file")
    return examples


def num_latents(example: Example, r: int) -> int:
    """N = ceil(n / r), or as many as there are pieces."""
    return -(-len(example.chain) // r) if r else len(example.ends)


def segment_ends(example: Example, r: int) -> np.ndarray:
    """Where S_1 ... S_N end in the chain, int [N]."""
    return np.minimum(r * np.arange(1, num_latents(example, r) + 1), len(example.chain)) if r else np.array(example.ends, int)


def _first(example: Example, r: int) -> int:
    """How many tokens S_1 has."""
    return min(r, len(example.chain)) if r else sum(example.ends[:1])


def segments(chain: str | list[str], tokenizer: Tokenizer, r: int) -> list[list[int]]:
    """S_1 ... S_N of a written chain, as token ids; none where r is 0 and it is not in pieces."""
    ids, ends = encode_chain(chain, tokenizer)
    ends = segment_ends(Example([], ids, [], [], ends or []), r).tolist()
    return [ids[begin:end] for begin, end in zip([0, *ends], ends)]


def layout(name: str, example: Example, r: int = 1) -> tuple[np.ndarray, ...]:
    """ids, kind, segment and position of every token of `example`, each int [T]; latents have id 0.

    `name` is "cot", "encoder", "decoder" or "latent", the rows of the table in docs/METHOD.md.
    """
    chain, ends = np.array(example.chain, int), segment_ends(example, r)
    if name == "encoder":
        before = ends  # L_i stands behind S_i
    elif name == "decoder":
        first = _first(example, r)
        chain, before = chain[first:], ends - first  # no S_1; Z_i stands before S_{i+1}, the last one at the end
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
    text = {"cot": n, "encoder": n, "decoder": n - _first(example, r), "latent": 0}[name]
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


def pack_row(name: str, examples: list[Example], r: int = 1) -> Row:
    """One packed row of `examples` in the layout `name`."""
    parts = [layout(name, e, r) for e in examples]
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
