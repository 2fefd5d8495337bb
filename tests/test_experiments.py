"""The smoke mode of the task files on a small random model: every stage runs, and rows come out."""

import gzip
import json
import os
from pathlib import Path
import random
import re
import shutil
from xml.dom import minidom

import pytest
import tokenizers

from experiments import branches, figures, gsm8k, multiplication, prosqa, report


def smoke(command, main, model, source, out, *kinds):
    """The rows that the smoke mode of a task makes."""
    flags = ["--model", model, "--data", source, "--out", out, "--device", "cpu"]
    code, _, error = command(main, *flags, "--smoke", "--train", *kinds)
    assert code == 0, error
    return json.loads((out / "results.json").read_text())


def test_gsm8k(command, checkpoint, data, tmp_path):
    source = tmp_path / "data"
    source.mkdir()
    for name in ("gsm8k-train", "gsm8k-valid", *gsm8k.TESTS):
        (source / f"{name}.jsonl").write_text(data.read_text())
    with gzip.open(source / "gsm8k-sub-train.jsonl.gz", "wt") as file:
        file.write(data.read_text())
    rows = smoke(command, gsm8k.main, checkpoint(), source, tmp_path / "out", "mux")
    assert [*dict.fromkeys(r["row"] for r in rows)][:2] == ["CoT-SFT", "MUX r = 2"]
    assert {"MUX r = 2, random", "MUX r = 2, cut-4"} <= {r["row"] for r in rows}
    latent = next(r for r in rows if r["row"] == "MUX r = 2")
    assert latent["test"] == "gsm8k-test" and latent["seed"] == 1 and latent["steps"] == 2
    assert latent["gpu"] == "CPU" and "--smoke" in latent["command"] and 0 <= latent["share"]
    table = report.report(tmp_path / "out")
    assert (
        f"| MUX r = 2 | gsm8k-test | {latent['accuracy']} | {latent['interval']} |" in table
        and "<svg" in (tmp_path / "out" / "gsm8k.svg").read_text()
    )
    assert len((tmp_path / "out" / "gsm8k-train.jsonl").read_text().splitlines()) == 16


def test_multiplication(command, checkpoint, tmp_path):
    """The published rule, and the smoke mode."""
    row = multiplication.line(6361, 8527, 4)
    assert row["problem"] == "1636*7258" and row["answer"] == str(6361 * 8527)[::-1]
    products = [str(6361 * d * 10**i)[::-1] for i, d in enumerate((7, 2, 5, 8))]
    assert [x.split("(")[0].rstrip("0") for x in row["cot"].split("+")] == [
        x.rstrip("0") for x in products
    ]
    source, out = tmp_path / "data", tmp_path / "out"
    source.mkdir()
    tests = [multiplication.line(1234 + i, 5678 + i, 4) for i in range(6)]
    text = "".join(json.dumps(x) + "\n" for x in tests)
    (source / "multiplication-4x4-test.jsonl").write_text(text)
    rows = smoke(command, multiplication.main, checkpoint(), source, out, "answer-only", "latent")
    latent = next(r for r in rows if r["row"] == "Latent r = 2")
    assert (
        latent["test"] == "multiplication-4x4-test" and latent["seed"] == 1 and latent["steps"] == 2
    )
    assert latent["gpu"] == "CPU" and "--smoke" in latent["command"] and 0 <= latent["share"]
    names = {r["row"] for r in rows}
    assert {
        "CoT-SFT",
        "Latent r = 2, step-1",
        "Latent r = 2, random",
        "Latent r = 2, cut-4",
    } <= names
    table = report.report(out)
    assert (out / "table.md").read_text() == table
    assert f"| Latent r = 2 | {latent['test']} | {latent['accuracy']} |" in table
    for name in ("", "-accuracy", "-loss"):
        assert "<svg" in (out / f"multiplication-4x4{name}.svg").read_text()
    known = {x["problem"] for x in tests}
    made = [json.loads(x) for x in (out / "train.jsonl").read_text().splitlines()]
    assert len(made) == 16 and not known & {x["problem"] for x in made}


def test_prosqa(command, checkpoint, tmp_path):
    """The right class descends from the person alone, the chain is a shortest path; and the smoke mode."""
    people = prosqa.PEOPLE.split()
    rng, source = random.Random(1), tmp_path / "data"
    lines = [prosqa.make_example(rng) for _ in range(60)]
    for row in lines:
        edges = re.findall(r"(\w+) is a (\w+)\.", row["problem"])
        person, *asked = re.search(r"Is (\w+) a (\w+) or (\w+)\?", row["problem"]).groups()
        answer = row["cot_answer"][7:-1]

        def distance(start, end, edges=edges):
            seen, steps = {start}, 0
            while end not in seen:
                more = seen | {b for a, b in edges if a in seen}
                if more == seen:
                    return None
                seen, steps = more, steps + 1
            return steps

        (wrong,) = {*asked} - {answer}
        assert (
            distance(person, answer) == row["cot"].count(".") >= 3
            and distance(person, wrong) is None
        )
        others = [p for p in people if p != person and distance(p, wrong)]
        assert others and any(distance(p, answer) is None for p in others)
        steps = re.findall(r"(\w+) is a (\w+)\.", row["cot"])
        assert steps[0][0] == person and steps[-1][1] == answer and {*steps} <= {*edges}
        assert all(a[1] == b[0] for a, b in zip(steps, steps[1:]))
    source.mkdir()
    for name, some in (("valid", lines[:30]), ("test", lines[30:])):
        text = "".join(json.dumps(x | {"answer": x["cot_answer"][7:-1]}) + "\n" for x in some)
        (source / f"prosqa-{name}.jsonl").write_text(text)
    out = tmp_path / "out"
    rows = smoke(command, prosqa.main, checkpoint(), source, out, "mux")
    assert {"CoT-SFT", "MUX r = 2", "MUX r = 2, argmax"} <= {r["row"] for r in rows}
    made = [json.loads(x)["problem"] for x in (out / "train.jsonl").read_text().splitlines()]
    assert len({*made}) == 16 and not {*made} & {x["problem"] for x in lines}


def test_pictures_are_xml(tmp_path):
    parts = [["2", "*"], list("<&>é"), ["</think>"], ["1"]]
    figures.draw_masks(tmp_path / "m.svg", parts, 2)
    row = {"test": "x", "share": 0.5, "accuracy": 10.0, "interval": 1.0}
    figures.draw_points(tmp_path / "p.svg", [("a <", row)], "share", "accuracy")
    for name in "mp":
        assert minidom.parse(str(tmp_path / f"{name}.svg")).documentElement.tagName == "svg"


@pytest.mark.skipif("LATENT_SFT_MODEL" not in os.environ, reason="LATENT_SFT_MODEL is not set")
def test_branches(command, tmp_path):
    """Made-up latents: 0.5 on the class of the chain, 0.3 on its sibling, 0.1 on another class."""
    source, model = Path(os.environ["LATENT_SFT_MODEL"]), tmp_path / "model"
    hf = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    model.mkdir()
    shutil.copy(source / "tokenizer.json", model)
    reasoning = {"thinking": "latent", "top_k": 10, "compression": 4}
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "latent_sft": reasoning}))

    def tokens(text):
        return [hf.decode([i]) for i in hf.encode(text, add_special_tokens=False).ids]

    problem = (
        "Tom is a gerpus. Every gerpus is a bompus. Tom is a zumpus. Every zumpus is a hilpus."
    )
    chain = "Tom is a gerpus. Every gerpus is a bompus."
    latents = [[["x", 0.9]] for _ in range(0, len(tokens(chain)), 4)]
    for before, classes in (
        ("Tom is a", ("gerpus", "zumpus", "hilpus")),
        ("Tom is a gerpus. Every gerpus is a", ("bompus", None, "hilpus")),
    ):
        held = [[tokens(f" {c}")[0], p] for c, p in zip(classes, (0.5, 0.3, 0.1)) if c]
        latents[len(tokens(before)) // 4] = held
    for name, line in (
        ("data", {"problem": problem, "cot": chain}),
        ("found", {"problem": problem, "latents": latents}),
    ):
        (tmp_path / name).write_text(json.dumps(line) + "\n")
    flags = ["--data", tmp_path / "data", "--predictions", tmp_path / "found"]
    code, printed, error = command(branches.main, "--model", model, *flags)
    assert code == 0, error
    assert printed.splitlines() == [
        "sentence 1, 1 problems: [0.5 0.3 1. ]",
        "sentence 2, 1 problems: [0.5 0.  0. ]",
    ]
