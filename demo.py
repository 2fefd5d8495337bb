"""The embedded default (`make demo`): a made-up task, a small model from scratch, and the whole pipeline through the scripts."""

import json
from pathlib import Path
import random

from model import Config, Model
from tokenizer import END_THINK, THINK, _byte_alphabet


def solve(rng, ops, low, high, mod):
    n = rng.randint(low, high)
    x = rng.randrange(mod)
    problem, chain = str(x), []
    for _ in range(n):
        op, y = rng.choice(ops), rng.randrange(mod)
        z = {"+": x + y, "-": x - y, "*": x * y}[op] % mod
        problem += f"{op}{y}"
        chain.append(f"{x}{op}{y}={z};")
        x = z
    return problem + "=", "".join(chain), str(x)


def write_tokenizer(out: Path) -> None:
    """A byte-level BPE tokenizer.json of 263 tokens: the bytes, `boxed`, and three special tokens."""
    vocab = {c: i for i, c in enumerate(_byte_alphabet())}
    merges = ["b o", "bo x", "box e", "boxe d"]
    for m in merges:
        vocab[m.replace(" ", "")] = len(vocab)
    added = [{"id": len(vocab) + i, "content": t, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False} for i, t in enumerate(("<|endoftext|>", THINK, END_THINK))]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    (out / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None,
        "decoder": byte_level, "model": {"type": "BPE", "vocab": vocab, "merges": merges}}))
