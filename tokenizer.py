"""Text to ids and back: tiktoken's BPE built from a checkpoint's `tokenizer.json`, and each family's prompt.

Only what tiktoken reproduces exactly is accepted: the ids are those of Hugging Face `tokenizers`, or loading fails.
"""

import json
import re
import unicodedata
from pathlib import Path

import regex
import tiktoken

from runs import UserError, read_json

THINK, END_THINK = "<think>", "</think>"
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."

# The pre-tokenizers known to split alike in Oniguruma (tokenizers) and fancy-regex (tiktoken); tests/test_tokenizer.py
# compares them on every code point. Keys are the patterns as `_split_pattern` finds them in tokenizer.json.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
           r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_QWEN = _LLAMA3.replace("{1,3}", "")
# Single digits are cut out first, so a run of spaces before one is a run at the end of its piece.
_DIGITS_GPT2 = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
_SPLITS = {("bytelevel",): _GPT2, ("digits", "bytelevel"): _DIGITS_GPT2, (_LLAMA3,): _LLAMA3, (_QWEN,): _QWEN}


def byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE files write for each byte (the GPT-2 convention), inverted."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(hidden)}


def _split_pattern(pre: dict | None, where: str) -> str:
    """tiktoken's regular expression for the `pre_tokenizer` of tokenizer.json, or UserError."""
    steps = []
    for step in (pre or {}).get("pretokenizers", [pre or {}]):
        kind = step.get("type")
        if kind == "Digits" and step.get("individual_digits"):
            steps.append("digits")
        elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            steps.append(step["pattern"].get("Regex"))
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            steps += ["bytelevel"] if step.get("use_regex", True) else []
        else:
            steps.append(f"{kind}?")
    if tuple(steps) not in _SPLITS or '"ByteLevel"' not in json.dumps(pre):
        raise UserError(f"{where}: the pre-tokenizer {json.dumps(pre, ensure_ascii=False)[:300]} is not one this program "
                        "reproduces exactly (GPT-2, Llama 3, Qwen and SmolLM2 byte-level BPE are); use another checkpoint")
    return _SPLITS[tuple(steps)]


def _cut(text: str, pattern: re.Pattern | None) -> list[str]:
    """`text` in pieces; those at odd places are matches of `pattern`."""
    return pattern.split(text) if pattern else [text]


class Tokenizer:
    """The tokenizer of a checkpoint directory.

    Encoding equals `tokenizers` with `encode_special_tokens=True` and no template: text never yields a special token,
    whatever it says; added tokens that the file marks `"special": false` (Qwen3's `<think>`) are found in text.
    """

    def __init__(self, directory: str | Path, model_type: str = ""):
        """Reads `directory/tokenizer.json`; `model_type` (config.json's) helps to choose the prompt. Raises UserError."""
        path = Path(directory) / "tokenizer.json"
        try:
            self._build(read_json(path), path, model_type)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise UserError(f"{path}: is not a whole tokenizer file ({e!r})") from None

    def _build(self, spec: dict, path: Path, model_type: str) -> None:
        model, added, normalizer = spec.get("model", {}), spec.get("added_tokens", []), spec.get("normalizer")
        unusual = ("byte_fallback", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
        if model.get("type", "BPE") != "BPE" or any(model.get(key) for key in unusual):
            raise UserError(f"{path}: only plain byte-level BPE is supported, not {model.get('type')} with its settings")
        if normalizer not in (None, {"type": "NFC"}, {"type": "Sequence", "normalizers": []}):
            raise UserError(f"{path}: the normalizer {json.dumps(normalizer)[:200]} is not one this program reproduces "
                            "exactly")
        if any(t.get("lstrip") or t.get("rstrip") or t.get("single_word") for t in added if not t["special"]):
            raise UserError(f"{path}: added tokens that strip spaces or match whole words only are not supported")
        self.normalize = (lambda s: unicodedata.normalize("NFC", s)) if normalizer == {"type": "NFC"} else (lambda s: s)
        self.pattern = _split_pattern(spec.get("pre_tokenizer"), str(path))

        ranks = _mergeable_ranks(model, str(path))
        if len(set(ranks.values())) < len(ranks):
            raise ValueError("two tokens have the same id")
        self.added = {t["content"]: t["id"] for t in added}
        self.vocab_size = max([*ranks.values(), *self.added.values()]) + 1  # the embedding may have more rows
        # A vocabulary may lack some bytes (SmolLM2 does); tokenizers drops them after the split, and so does `_encode`.
        self.missing = bytes(b for b in range(256) if bytes([b]) not in ranks)
        self._has_missing = re.compile(b"[" + re.escape(self.missing) + b"]") if self.missing else None
        filler = {bytes([b]): self.vocab_size + i for i, b in enumerate(self.missing)}
        self._bpe = tiktoken.Encoding(str(path), pat_str=self.pattern, mergeable_ranks=ranks | filler, special_tokens={})
        self._bytes = {i: t for t, i in ranks.items()} | {i: t.encode() for t, i in self.added.items()}

        plain = [t for t in added if not t["special"]]  # matched in text: first raw, then in normalized text, the longest
        self._raw, self._normalized = (
            re.compile("(" + "|".join(map(re.escape, sorted(group, key=len, reverse=True))) + ")") if group else None
            for group in ([t["content"] for t in plain if not t.get("normalized")],
                          [self.normalize(t["content"]) for t in plain if t.get("normalized")]))
        self.family = self._choose_family(model_type, str(path))
        self.think, self.end_think = self._marker(THINK), self._marker(END_THINK)
        # token ids, and the text that the problem goes into
        parts = [part.replace("{instruction}", INSTRUCTION) for part in _FAMILIES[self.family][1]]
        self._prompt = [part if "{problem}" in part else [self.added[part]] if part in self.added else self.encode(part) for part in parts]

    def _choose_family(self, model_type: str, where: str) -> str:
        for family, (token, _) in _FAMILIES.items():
            if token in self.added and (family != "llama3" or model_type in ("", "llama")):
                return family
        raise UserError(f"{where}: no known chat format: none of {', '.join(t for t, _ in _FAMILIES.values())} is a token")

    def _marker(self, text: str) -> list[int]:
        return [self.added[text]] if text in self.added else self.encode(text)

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text; special tokens written in it are ordinary characters."""
        ids = []
        for i, raw in enumerate(_cut(text, self._raw)):
            if i % 2:
                ids.append(self.added[raw])
                continue
            for j, piece in enumerate(_cut(self.normalize(raw), self._normalized)):
                ids += [self.added[piece]] if j % 2 else self._encode(piece)
        return ids

    def _encode(self, text: str) -> list[int]:
        if not (self._has_missing and self._has_missing.search(text.encode("utf-8", "replace"))):
            return self._bpe.encode_ordinary(text)
        pieces = (p.encode("utf-8", "replace").translate(None, self.missing) for p in regex.findall(self.pattern, text))
        return [i for piece in pieces if piece for i in self._bpe._encode_single_piece(piece)]

    def decode(self, ids) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, and ids without a token are left out."""
        return b"".join(self._bytes.get(int(i), b"") for i in ids).decode("utf-8", "replace")

    def prompt(self, problem: str) -> list[int]:
        """`Q <think>`: the chat prompt of this family for `problem`, ready to think."""
        ids = []
        for part in self._prompt:  # the problem is filled into ordinary text only, never into a special token
            ids += self.encode(part.replace("{problem}", problem)) if isinstance(part, str) else part
        return ids + self.think

    @property
    def end_of_turn(self) -> int:
        """The id that ends an answer."""
        return self.added[_END_OF_TURN[self.family]]


# How each family is recognised (a token it has) and its prompt, as the authors have it (Llama 3 without <|begin_of_text|>); special tokens
# stand alone, the rest is ordinary text.
_FAMILIES = {
    "deepseek": ("<｜Assistant｜>", ["<｜begin▁of▁sentence｜>", "<｜User｜>", "{instruction}\n{problem}",
                                   "<｜Assistant｜>"]),
    "llama3": ("<|start_header_id|>", ["<|start_header_id|>", "user", "<|end_header_id|>", "\n\n{instruction}\n{problem}",
                                       "<|eot_id|>", "<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n"]),
    "chatml": ("<|im_start|>", ["<|im_start|>", "system\n{instruction}", "<|im_end|>", "\n", "<|im_start|>",
                                "user\n{problem}", "<|im_end|>", "\n", "<|im_start|>", "assistant\n"]),
    "plain": ("<|endoftext|>", ["{problem}"]),  # no chat tokens: a base model, or the demo's
}
_END_OF_TURN = {"deepseek": "<｜end▁of▁sentence｜>", "llama3": "<|eot_id|>", "chatml": "<|im_end|>",
                "plain": "<|endoftext|>"}


def _mergeable_ranks(model: dict, where: str) -> dict[bytes, int]:
    """Bytes -> id for tiktoken, which merges the pair with the lowest id first.

    That is what `tokenizers` does if and only if ids grow in the order of the merges, which is checked here. A merge rule
    whose product could also be made from two other tokens is no danger: byte-pair training reaches each token one way.
    """
    alphabet, vocab = byte_alphabet(), model["vocab"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    products = [a + b for a, b in merges]
    ids = [vocab.get(t, -1) for t in products]
    if any(i < 0 for i in ids) or any(i > j for i, j in zip(ids, ids[1:])):
        raise UserError(f"{where}: its merges do not follow the order of its ids, so tiktoken would cut text differently")
    words = {t for t in vocab if len(t) == 1} | set(products) | (set(vocab) if model.get("ignore_merges") else set())
    return {bytes(alphabet[c] for c in t): vocab[t] for t in words if all(c in alphabet for c in t)}
