"""Text to ids and back: tiktoken's BPE from a tokenizer.json, and each family's prompt.

The ids are those of Hugging Face `tokenizers`. A file that cannot be reproduced exactly is refused.
"""

from functools import lru_cache
import json
from pathlib import Path
import re
import unicodedata

import regex
import tiktoken

from lib.files import read_json, reading

THINK, END_THINK = "<think>", "</think>"
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."

# The pre-tokenizers that `regex` splits like Oniguruma does in tokenizers. tests/test_tokenizer.py
# compares them on every code point. A key is what split_pattern finds in tokenizer.json.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")
# Digits are cut out first, so spaces before a digit end their piece.
DIGITS_GPT2 = GPT2.replace(r" ?\p{N}+|", r"\p{N}|").replace(r"\s+(?!\S)", r"\s+(?=\p{N})|\s+(?!\S)")
SPLITS = {
    ("bytelevel",): GPT2,
    ("digits", "bytelevel"): DIGITS_GPT2,
    (LLAMA3,): LLAMA3,
    (QWEN,): QWEN,
}

NFC, NO_NORMALIZER = {"type": "NFC"}, {"type": "Sequence", "normalizers": []}
UNUSUAL = "byte_fallback dropout unk_token continuing_subword_prefix end_of_word_suffix".split()
STRIPS = "lstrip rstrip single_word".split()

# A family's end of turn, and its prompt, which begins with a token that only it has. The prompts
# are the authors' (Llama 3 without <|begin_of_text|>). "plain" is a base model, or the demo's.
FAMILIES = {
    "deepseek": (
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜><｜User｜>{instruction}\n{problem}<｜Assistant｜>",
    ),
    "llama3": (
        "<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\n{instruction}\n{problem}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "chatml": (
        "<|im_end|>",
        "<|im_start|>system\n{instruction}<|im_end|>\n<|im_start|>user\n{problem}<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    "plain": ("<|endoftext|>", "{problem}"),
}


def byte_alphabet():
    """The printable character that byte-level BPE writes for each byte (GPT-2), inverted."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(hidden)}


def split_pattern(pre):
    """The regular expression for the `pre_tokenizer` of tokenizer.json. Raises ValueError."""
    steps = []
    for step in pre.get("pretokenizers", [pre]):
        match step:
            case {"type": "Digits", "individual_digits": True}:
                steps.append("digits")
            case {
                "type": "Split",
                "pattern": {"Regex": r},
                "behavior": "Isolated",
                "invert": False,
            }:
                steps.append(r)
            case {"type": "ByteLevel", "add_prefix_space": False}:
                steps += ["bytelevel"] * step.get("use_regex", True)
            case _:
                steps.append(None)
    if tuple(steps) not in SPLITS or "ByteLevel" not in str(pre):
        raise ValueError(f"the pre-tokenizer is not supported: {json.dumps(pre)[:200]}")
    return SPLITS[tuple(steps)]


def mergeable_ranks(model):
    """Bytes -> id for tiktoken, which merges the pair with the lowest id first.

    tokenizers does the same if ids grow in the order of the merges. Else raises ValueError.
    """
    alphabet, vocab = byte_alphabet(), model["vocab"]
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    words = [a + b for a, b in merges]
    ids = [vocab[word] for word in words]
    if ids != sorted(ids):
        raise ValueError("its merges do not follow the order of its ids")
    words += vocab if model.get("ignore_merges") else [t for t in vocab if len(t) == 1]
    ranks = {bytes(map(alphabet.get, t)): vocab[t] for t in words if set(t) <= alphabet.keys()}
    if len(set(ranks.values())) < len(ranks):
        raise ValueError("two tokens have the same id")
    return ranks


def any_of(texts):
    """A pattern that finds each of `texts`, the longest first."""
    texts = map(re.escape, sorted(texts, key=len, reverse=True))
    return re.compile(f"({'|'.join(texts) or '(?!)'})")


class Tokenizer:
    """The tokenizer of a checkpoint directory.

    Encoding equals `tokenizers` with encode_special_tokens=True and no template. Text never gives a
    special token. Added tokens with `"special": false` (Qwen3's <think>) are found in text.
    """

    def __init__(self, directory):
        """Reads directory/tokenizer.json. Raises UserError."""
        path = Path(directory) / "tokenizer.json"
        spec = read_json(path)
        with reading(path):
            self._build(spec["model"], spec["added_tokens"], spec.get("normalizer"))
            self.pattern = regex.compile(split_pattern(spec.get("pre_tokenizer") or {}))
            end, template = self._choose_family()
            # special tokens are at odd places
            parts = any_of(self.added).split(template.replace("{instruction}", INSTRUCTION))
            self._prompt = [[self.added[x]] if i % 2 else x for i, x in enumerate(parts)]
            self.end_of_turn = self._end_of_turn(path, end)
            self.think, self.end_think = self._marker(THINK), self._marker(END_THINK)

    def _build(self, model, added, normalizer):
        plain = [t for t in added if not t["special"]]
        if model.get("type", "BPE") != "BPE" or any(map(model.get, UNUSUAL)):
            raise ValueError("only byte-level BPE is supported")
        if normalizer not in (None, NFC, NO_NORMALIZER):
            raise ValueError(f"the normalizer {normalizer} is not supported")
        if any(t.get(key) for t in plain for key in STRIPS):
            raise ValueError("added tokens that strip are not supported")
        form = {"NFC": unicodedata.normalize}.get((normalizer or {}).get("type"))
        self.normalize = (lambda text: form("NFC", text)) if form else str
        ranks, self.added = mergeable_ranks(model), {t["content"]: t["id"] for t in added}
        self.vocab_size = max(*ranks.values(), *self.added.values()) + 1
        # A vocabulary may lack bytes (SmolLM2's does). tokenizers drops them after the split.
        self.missing = bytes(b for b in range(256) if bytes([b]) not in ranks)
        filler = {bytes([b]): self.vocab_size + i for i, b in enumerate(self.missing)}
        options = dict(pat_str="", mergeable_ranks=ranks | filler, special_tokens={})
        self._bpe = lru_cache(2**16)(tiktoken.Encoding("", **options)._encode_single_piece)
        self._bytes = {i: t for t, i in ranks.items()} | {
            i: t.encode() for t, i in self.added.items()
        }
        # Added tokens are found in raw text first, then in normalized text.
        self._raw = any_of(t["content"] for t in plain if not t.get("normalized"))
        self._normalized = any_of(
            self.normalize(t["content"]) for t in plain if t.get("normalized")
        )

    def _choose_family(self):
        for end, template in FAMILIES.values():
            special = re.match(r"<.*?>|", template)[0] or end
            if special in self.added:
                return end, template
        raise ValueError("its chat format is not known")

    def _end_of_turn(self, path, default):
        """The id that ends an answer: the checkpoint's eos_token, or else the family's."""
        files = path.with_name("tokenizer_config.json"), path.with_name("generation_config.json")
        config, generation = (read_json(file) if file.exists() else {} for file in files)
        token, ids = config.get("eos_token"), generation.get("eos_token_id")
        if token is None and ids is not None:
            return ids[0] if isinstance(ids, list) else ids
        return self.added[token["content"] if isinstance(token, dict) else token or default]

    def _marker(self, text):
        return [self.added[text]] if text in self.added else self.encode(text)

    def encode(self, text):
        """Ids of ordinary text. Special tokens written in it are ordinary characters."""
        ids = []
        for i, raw in enumerate(self._raw.split(text)):  # those at odd places are added tokens
            parts = [raw] if i % 2 else self._normalized.split(self.normalize(raw))
            for j, part in enumerate(parts, i % 2):
                if j % 2:
                    ids.append(self.added[part])
                    continue
                for piece in self.pattern.findall(part):
                    piece = piece.encode("utf-8", "replace").translate(None, self.missing)
                    ids += self._bpe(piece) if piece else []
        return ids

    def decode(self, ids):
        """Text of `ids`. Bytes that are not UTF-8 become U+FFFD, unknown ids are left out."""
        return b"".join(self._bytes.get(int(i), b"") for i in ids).decode("utf-8", "replace")

    def prompt(self, problem):
        """`Q <think>`: the chat prompt of this family for `problem`."""
        ids = []
        for part in self._prompt:  # the problem goes into ordinary text, never into a special token
            text = isinstance(part, str)
            ids += self.encode(part.replace("{problem}", problem)) if text else part
        return ids + self.think
