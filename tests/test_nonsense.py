"""Twenty kinds of nonsense for every command: one line on stderr, exit code 1 or 2, and no results."""

import gzip
import importlib
import json

import pytest

from experiments import n_eff

SCRIPTS = "train_sft train_phase1 cache_latents train_phase2 sample eval load_hf_weights".split()
LINE = {"problem": "1+1", "cot": "1+1=2", "cot_answer": "\\boxed{2}"}
# what a path may lead to: {name: bytes of a file, or None for a directory}
PATHS = {
    "nothing": "",
    "a directory": None,
    "an empty file": b"",
    "zeros": b"\0" * 100,
    "half a JSON": b'{"problem": "1',
    "a list": b"[1, 2]\n",
    "a number": b"7\n",
    "another encoding": '{"problem": "é"}'.encode("latin-1"),
    "no fields": b"{}\n",
    "empty fields": json.dumps(dict.fromkeys(LINE, "")).encode(),
    "numbers for texts": json.dumps(dict.fromkeys(LINE, 1)).encode(),
    "half a character": b'{"problem": "\\ud83d", "cot": "1", "cot_answer": "\\\\boxed{1}"}',
    "deep nesting": b"[" * 100_000,
    "a huge number": b'{"problem": ' + b"9" * 5000 + b"}",
}
FLAGS = [
    ["--seed", "nan"],
    ["--seed", "-1"],
    ["--seed", "1e3"],
    ["--device", "gpu"],
    ["--device", "cuda:99"],
    ["--no-such-flag"],
    ["--out"],
    ["stray"],
]


@pytest.fixture
def arguments(checkpoint, thinker, data, tmp_path):
    """{command: (its main, {flag: a good value})}."""
    out = {"--out": tmp_path / "out"}
    steps, model, file = {"--max-steps": 1, "--batch-size": 2}, checkpoint(), {"--data": data}
    needs = {
        "train_sft": {"--model": model, **file, **out, **steps},
        "train_phase1": {"--model": model, **file, **out, **steps},
        "cache_latents": {"--phase1": model, **file, **out},
        "train_phase2": {"--phase1": model, "--cache": tmp_path, **file, **out, **steps},
        "sample": {"--model": thinker(), "--prompt": "1"},
        "eval": {"--model": thinker(), **file, **out},
        "load_hf_weights": {"--model": model, **out},
    }
    found = {name: (importlib.import_module(name).main, needs[name]) for name in SCRIPTS}
    found["n_eff"] = n_eff.main, {"--model": thinker(), **file, **out}
    return found


def kinds(good, tmp_path):
    """The nonsense for a command: (what it is, its arguments)."""
    plain = [str(x) for pair in good.items() for x in pair]
    for flags in FLAGS:
        yield flags, [*flags, *plain]
    yield "nothing at all", []
    for flag in good.keys() & {"--model", "--phase1", "--cache", "--data", "--directory"}:
        for name, content in PATHS.items():
            if name == "half a character" and flag != "--data":
                continue
            path = tmp_path / name
            if content is None:
                path.mkdir(exist_ok=True)
            elif content != "":
                path.write_bytes(content)
            yield (flag, name), [str(x) for p in (good | {flag: path}).items() for x in p]
    if "--data" in good:
        path = tmp_path / "cut.jsonl.gz"
        path.write_bytes(gzip.compress(json.dumps(LINE).encode() * 100)[:-9])
        yield "half a gzip", [str(x) for p in (good | {"--data": path}).items() for x in p]


@pytest.mark.parametrize("name", [*SCRIPTS, "n_eff"])
def test_nonsense(command, arguments, tmp_path, name):
    main, good = arguments[name]
    count = 0
    for what, given in kinds(good, tmp_path):
        code, _, error = command(main, *given)
        lines = [line for line in error.splitlines() if "error: " in line]
        assert code in (1, 2) and len(lines) == 1 and "Traceback" not in error, (what, error)
        assert not list(tmp_path.glob("out/*.safetensors")), what
        count += 1
    assert count >= 20
