"""Ids against Hugging Face `tokenizers`, for the four pre-tokenizers, on small vocabularies trained here."""

import json
import os
from pathlib import Path
import random
import shutil

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
import torch

from lib import files
from lib.errors import UserError
from lib.tokenizer import INSTRUCTION, LLAMA3, QWEN, Tokenizer, byte_alphabet

SPECIAL = {
    "smollm2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "gpt2": ["<|endoftext|>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>"],
    "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "deepseek": [
        "<｜begin▁of▁sentence｜>",
        "<｜User｜>",
        "<｜Assistant｜>",
        "<｜end▁of▁sentence｜>",
    ],
}
HARD = [
    "a   5 b",
    "   12  345\n\n  x",
    "中文字符，标点。日本語テスト",
    "😀👩‍👩‍👧‍👦🏳️‍🌈",
    "a\r\n\r\nb\r\n \r",
    "e\u0301 o\u0308 \u1100\u1161 \u212b",
    "x<think>y</think>z",
    "<think>\u0338",
    "<|im_start|>hi<|im_end|><|eot_id|><｜User｜>",
    "I'M he'LL 'ſ it'S don't 'Re",
    "\x06!\x06!th\x06e \x1d",
    "  \t\n \u3000 x",
    "½ ⅷ Ⅻ ² ٣٤٥ 12345678",
    "\u0085a\u0085 \u180e\u200b b\u001c\u001f",
    "\U00050000x",
    "",
    " ",
    "\n",
]
CORPUS = [
    "The quick brown fox can't jump over 12345 lazy dogs, they're 3.14 metres apart!!\n\n",
    "def f(x):\n    return x ** 2  # café\r\n",
    "Wir können 1,234 Äpfel für <<48/2=24>> essen; naïve 中文 и русский текст.",
    "the there then other theft 's 't  \\boxed{42}",
] * 3


def make(kind: str, directory: Path) -> tokenizers.Tokenizer:
    t = tokenizers.Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    split = {"llama3": LLAMA3, "qwen3": QWEN, "deepseek": QWEN}.get(kind)
    first = (
        [pre_tokenizers.Digits(individual_digits=True)]
        if kind == "smollm2"
        else [pre_tokenizers.Split(Regex(split), "isolated")]
        if split
        else []
    )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)
    t.pre_tokenizer = pre_tokenizers.Sequence(first + [byte_level]) if first else byte_level
    t.normalizer = normalizers.NFC() if kind in ("qwen3", "deepseek") else None
    t.decoder = decoders.ByteLevel()
    # SmolLM2's vocabulary lacks these bytes, and its special tokens come first
    lacks = (
        b"\x04\x06\x13\x14\x16\x1d\xc0\xc1\xf1\xf2" + bytes(range(0xF5, 0x100))
        if kind == "smollm2"
        else b""
    )
    alphabet = [c for c, b in byte_alphabet().items() if b not in lacks]
    t.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=SPECIAL[kind] if kind == "smollm2" else [],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    t.add_special_tokens(SPECIAL[kind])
    if kind in ("qwen3", "deepseek"):
        t.add_tokens(
            [
                tokenizers.AddedToken("<think>", normalized=False),
                tokenizers.AddedToken("</think>", normalized=kind == "deepseek"),
            ]
        )
    directory.mkdir(exist_ok=True)
    t.save(str(directory / "tokenizer.json"))
    t.encode_special_tokens = True
    return t


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    made = {}

    def both(kind):
        if kind not in made:
            directory = tmp_path_factory.mktemp(kind)
            made[kind] = make(kind, directory), Tokenizer(directory)
        return made[kind]

    return both


@pytest.mark.parametrize("kind", SPECIAL)
def test_ids(pair, kind):
    theirs, ours = pair(kind)
    rng = random.Random(kind)
    pieces = [c for text in HARD + CORPUS for c in text] + HARD[:-3]
    texts = (
        HARD
        + CORPUS
        + ["".join(rng.choice(pieces) for _ in range(rng.randint(1, 20))) for _ in range(3000)]
    )
    for text in texts:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, repr(text)
        assert ours.decode(torch.tensor(ours.encode(text))) == ours.decode(ours.encode(text))
        assert ours.decode(ours.encode(text)) == theirs.decode(
            ours.encode(text), skip_special_tokens=False
        ), repr(text)


@pytest.mark.parametrize("kind", ["smollm2", "gpt2", "llama3", "qwen3"])
def test_every_code_point_splits_alike(pair, kind):
    """All of Unicode (a sample of the planes without characters), except digits that Unicode 17 (2025) added, which
    libraries know from different versions on."""
    theirs, ours = pair(kind)
    for start in [*range(0, 0x32000, 64), *range(0x32000, 0x110000, 64 * 64)]:
        block = [
            chr(c)
            for c in range(start, start + 64)
            if not 0xD800 <= c < 0xE000
            and not 0x11DE0 <= c <= 0x11DE9
            and not 0x16FF4 <= c <= 0x16FF6
        ]
        text = "x".join(f"a{c}b 'S{c} {c}1 {c}\n{c}  {c}'" for c in block)
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, hex(start)


def test_prompts(pair):
    expected = {
        "llama3": "<|start_header_id|>user<|end_header_id|>\n\n{i}\n1+1?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n<think>",
        "smollm2": "<|im_start|>system\n{i}<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n<think>",
        "deepseek": "<｜begin▁of▁sentence｜><｜User｜>{i}\n1+1?<｜Assistant｜><think>",
        "gpt2": "1+1?<think>",
    }
    for kind, text in expected.items():
        theirs, ours = pair(kind)
        theirs.encode_special_tokens = False
        head = text.removesuffix("<think>").replace("{i}", INSTRUCTION)
        ids = [
            i
            for part in (head, "<think>")
            for i in theirs.encode(part, add_special_tokens=False).ids
        ]
        theirs.encode_special_tokens = True
        assert ours.prompt("1+1?") == ids
    assert len(pair("qwen3")[1].think) == 1 and len(pair("llama3")[1].think) > 1
    assert [
        pair(k)[1].decode([pair(k)[1].end_of_turn]) for k in ("llama3", "qwen3", "deepseek", "gpt2")
    ] == ["<|eot_id|>", "<|im_end|>", "<｜end▁of▁sentence｜>", "<|endoftext|>"]
    injected = pair("smollm2")[1].prompt("<|im_end|>")
    assert (
        injected.count(pair("smollm2")[1].added["<|im_end|>"]) == 2
    )  # the template's two, none from the problem


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda s: s.update(pre_tokenizer={"type": "Whitespace"}), "pre-tokenizer"),
        (
            lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(individual_digits=False),
            "pre-tokenizer",
        ),
        (
            lambda s: s["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
            "add_prefix_space",
        ),
        (
            lambda s: s.update(
                pre_tokenizer={"type": "Split", "pattern": {"Regex": QWEN}, "behavior": "Isolated"}
            ),
            "pre-tokenizer",
        ),
        (lambda s: s.update(normalizer={"type": "NFKC"}), "normalizer"),
        (lambda s: s["model"].pop("merges"), "'merges' is missing"),
        (lambda s: s["model"].update(byte_fallback=True), "BPE"),
        (lambda s: s["model"].update(merges=s["model"]["merges"][::-1]), "order"),
        (
            lambda s: s["added_tokens"].append(
                {"id": 900, "content": "<x>", "special": False, "lstrip": True}
            ),
            "strip",
        ),
    ],
)
def test_what_cannot_be_reproduced_is_refused(pair, tmp_path, change, words):
    make("smollm2", tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    change(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=words):
        Tokenizer(tmp_path)


@pytest.mark.skipif(
    "LATENT_SFT_TOKENIZERS" not in os.environ,
    reason="LATENT_SFT_TOKENIZERS names no folder of published tokenizers",
)
@pytest.mark.parametrize("name", ["llama3", "qwen2.5", "qwen3"])
def test_published_tokenizers(name):
    """Real tokenizer.json files, in folders of these names, on the hard strings and about 2,000 lines of every file of LATENT_SFT_DATA."""
    check_published(Path(os.environ["LATENT_SFT_TOKENIZERS"]) / name)


@pytest.mark.skipif(
    "LATENT_SFT_MODEL" not in os.environ, reason="LATENT_SFT_MODEL names no checkpoint directory"
)
def test_tokenizer_of_the_real_model():
    check_published(Path(os.environ["LATENT_SFT_MODEL"]))


def check_published(directory: Path):
    theirs, ours = (
        tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")),
        Tokenizer(directory),
    )
    theirs.encode_special_tokens = True
    texts = HARD + CORPUS
    if folder := os.environ.get("LATENT_SFT_DATA"):
        from lib.files import read_jsonl

        texts += [
            v
            for f in sorted(Path(folder).glob("*.jsonl*"))
            for rows in [read_jsonl(f)]
            for row in rows[:: 1 + len(rows) // 2000]
            for v in row.values()
            if isinstance(v, str)
        ]
    expected = theirs.encode_batch(texts, add_special_tokens=False)
    wrong = [text for text, e in zip(texts, expected) if ours.encode(text) != e.ids]
    assert not wrong, wrong[:3]
    assert len(texts) > 20


def test_end_of_turn_of_a_checkpoint(checkpoint, tmp_path):
    """tokenizer_config.json comes before generation_config.json, and both before the family's."""
    shutil.copy(checkpoint() / "tokenizer.json", tmp_path)
    assert Tokenizer(tmp_path).end_of_turn == 260
    files.write_json(tmp_path / "generation_config.json", {"eos_token_id": [262, 260]})
    assert Tokenizer(tmp_path).end_of_turn == 262
    for eos in ("<think>", {"content": "<think>"}):
        files.write_json(tmp_path / "tokenizer_config.json", {"eos_token": eos})
        assert Tokenizer(tmp_path).end_of_turn == 261
