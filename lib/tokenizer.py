"""Text to ids and back: tiktoken's BPE from a tokenizer.json, and each family's prompt.

The ids equal the ids of Hugging Face `tokenizers`. A file that cannot be reproduced exactly is
refused.
"""

from functools import lru_cache, partial
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
    "ByteLevel": GPT2,
    "Digits ByteLevel": DIGITS_GPT2,
    f"{LLAMA3} bytes": LLAMA3,
    f"{QWEN} bytes": QWEN,
}

NFC, NO_NORMALIZER = {"type": "NFC"}, {"type": "Sequence", "normalizers": []}
UNUSUAL = """byte_fallback dropout unk_token continuing_subword_prefix end_of_word_suffix
lstrip rstrip single_word add_prefix_space invert"""

# A family's end of turn, and its prompt, which begins with a token that only it has. The prompts
# are the authors' (Llama 3 without <|begin_of_text|>). The last is for a base model, or the demo's.
FAMILIES = {
    "<｜end▁of▁sentence｜>": (
        "<｜begin▁of▁sentence｜><｜User｜>{instruction}\n{problem}<｜Assistant｜>"
    ),
    "<|eot_id|>": (
        "<|start_header_id|>user<|end_header_id|>\n\n{instruction}\n{problem}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "<|im_end|>": (
        "<|im_start|>system\n{instruction}<|im_end|>\n<|im_start|>user\n{problem}<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "<|endoftext|>": "{problem}",
}


def byte_alphabet():
    """The printable character that byte-level BPE writes for each byte (GPT-2), inverted."""
    printable = [b for b in range(33, 256) if chr(b).isprintable()]
    hidden = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(hidden)}


def split_pattern(steps):
    """The regular expression for the pre-tokenizers of tokenizer.json. Raises ValueError."""
    names = []
    for step in steps:
        match step:
            case {"type": "ByteLevel", "use_regex": False}:
                names.append("bytes")
            case (
                {"pattern": {"Regex": name}, "behavior": "Isolated"}
                | {"type": "Digits" as name, "individual_digits": True}
                | {"type": "ByteLevel" as name}
            ):
                names.append(name)
    found = " ".join(names)
    if found not in SPLITS or len(names) < len(steps):
        raise ValueError(f"the pre-tokenizer is not supported: {steps}")
    return SPLITS[found]


def mergeable_ranks(model):
    """Bytes -> id for tiktoken, which merges the pair with the lowest id first.

    tokenizers does the same if ids grow in the order of the merges. Else raises ValueError.
    """
    alphabet = byte_alphabet()
    vocab = model["vocab"]
    pairs = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
    words = [a + b for a, b in pairs]
    ids = [vocab[word] for word in words]
    if ids != sorted(ids):
        raise ValueError("its merges do not follow the order of its ids")
    words += vocab if model.get("ignore_merges") else [t for t in vocab if len(t) == 1]
    ranks = {bytes(map(alphabet.get, t)): vocab[t] for t in words if set(t) <= alphabet.keys()}
    if len(set(ranks.values())) < len(ranks):
        raise ValueError("two tokens have the same id")
    return ranks


def any_of(texts):
    """A pattern that finds each of `texts`, and of two that begin alike the longer one."""
    texts = map(re.escape, sorted(texts, reverse=True))
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
            pre = spec.get("pre_tokenizer") or {}
            steps = pre.get("pretokenizers", [pre])
            self.pattern = regex.compile(split_pattern(steps))
            self._build(spec["model"], spec["added_tokens"], spec.get("normalizer"), steps)
            end, template = next(
                x for x in FAMILIES.items() if re.match("<.*?>|", x[1])[0] in ("", *self.added)
            )
            self.template = template.replace("{instruction}", INSTRUCTION)
            self.end_of_turn = self._end_of_turn(path, end)
            self.think = self._markup(THINK)
            self.end_think = self._markup(END_THINK)

    def _build(self, model, added, normalizer, steps):
        plain = [t for t in added if not t["special"]]
        odd = {key for part in (model, *plain, *steps) for key in UNUSUAL.split() if part.get(key)}
        if odd:
            raise ValueError(f"only byte-level BPE is supported, without {odd}")
        if normalizer not in (None, NFC, NO_NORMALIZER):
            raise ValueError(f"the normalizer {normalizer} is not supported")
        self.normalize = partial(unicodedata.normalize, "NFC") if normalizer == NFC else str
        ranks = mergeable_ranks(model)
        self.added = {t["content"]: t["id"] for t in added}
        self.vocab_size = max(*ranks.values(), *self.added.values()) + 1
        # A vocabulary may lack bytes (SmolLM2's does). tokenizers drops them after the split.
        self.missing = bytes(b for b in range(256) if bytes([b]) not in ranks)
        filler = {bytes([b]): self.vocab_size + i for i, b in enumerate(self.missing)}
        bpe = tiktoken.Encoding("", pat_str="", mergeable_ranks=ranks | filler, special_tokens={})
        self._bpe = lru_cache(2**16)(bpe._encode_single_piece)
        self._bytes = {i: t for t, i in ranks.items()} | {
            i: t.encode() for t, i in self.added.items()
        }
        self._plain = any_of(t["content"] for t in plain)
        self._any = any_of(self.added)

    def _end_of_turn(self, path, default):
        """The id that ends an answer: the checkpoint's eos_token, or else the family's."""
        for name, key in (
            ("tokenizer_config.json", "eos_token"),
            ("generation_config.json", "eos_token_id"),
        ):
            file = path.with_name(name)
            found = read_json(file).get(key) if file.exists() else None
            match found:
                case int(number) | [number, *_]:
                    return number
                case str(text) | {"content": text}:
                    return self.added[text]
        return self.added[default]

    def _markup(self, text, problem=""):
        """Ids of `text`, in which special tokens count. The problem is ordinary text."""
        ids = []
        for part in self._any.split(text):
            plain = part.replace("{problem}", problem)
            ids += [self.added[part]] if part in self.added else self.encode(plain)
        return ids

    def encode(self, text):
        """Ids of ordinary text. Special tokens written in it are ordinary characters."""
        ids = []
        for i, part in enumerate(self._plain.split(text)):
            if i % 2:  # an added token
                ids += [self.added[part]]
                continue
            for piece in self.pattern.findall(self.normalize(part)):
                if piece := piece.encode("utf-8", "replace").translate(None, self.missing):
                    ids += self._bpe(piece)
        return ids

    def decode(self, ids):
        """Text of `ids`. Bytes that are not UTF-8 become U+FFFD, unknown ids are left out."""
        return b"".join(self._bytes.get(int(i), b"") for i in ids).decode("utf-8", "replace")

    def prompt(self, problem):
        """`Q <think>`: the chat prompt of this family for `problem`."""
        return self._markup(self.template, problem) + self.think
