"""The smoke mode of the task files on a small random model: every stage runs, and rows come out."""

import json

from xml.dom import minidom

from experiments import figures, gsm8k, multiplication, report


def test_gsm8k(command, checkpoint, data, tmp_path):
    source, out = tmp_path / "data", tmp_path / "out"
    source.mkdir()
    for name in ("gsm8k-train", "gsm8k-valid", *gsm8k.TESTS):
        (source / f"{name}.jsonl").write_text(data.read_text())
    flags = [
        "--model",
        checkpoint(),
        "--data",
        source,
        "--out",
        out,
        "--smoke",
        "--device",
        "cpu",
        "--rates",
        2,
    ]
    code, _, error = command(gsm8k.main, *flags)
    assert code == 0, error
    rows = json.loads((out / "results.json").read_text())
    assert [r["row"] for r in rows][:3] == ["CoT-SFT", "answer-only", "Latent r = 2"]
    assert {"Latent r = 2, random", "Latent r = 2, cut-4"} <= {r["row"] for r in rows}
    latent = rows[2]
    assert latent["test"] == "gsm8k-test" and latent["seed"] == 1 and latent["steps"] == 2
    assert latent["gpu"] == "CPU" and "--smoke" in latent["command"] and 0 <= latent["share"]
    code, printed, error = command(report.main, "--directory", out)
    assert code == 0, error
    assert (out / "table.md").read_text() in printed
    assert (
        "| Latent r = 2 | 1 |" in (out / "table.md").read_text()
        and "<svg" in (out / "gsm8k.svg").read_text()
    )


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
    flags = ["--model", checkpoint(), "--data", source, "--out", out, "--smoke", "--device", "cpu"]
    code, _, error = command(multiplication.main, *flags)
    assert code == 0, error
    rows = [r["row"] for r in json.loads((out / "results.json").read_text())]
    assert {"CoT-SFT", "answer-only", "Latent r = 2", "Latent r = 2, random"} <= set(rows)
    known = {x["problem"] for x in tests}
    made = [json.loads(x) for x in (out / "train.jsonl").read_text().splitlines()]
    assert len(made) == 16 and not known & {x["problem"] for x in made}


def test_pictures_are_xml_whatever_tokens_hold(tmp_path):
    odd = ["\x00", "\x1b[0m", "$x_{", "<&>", "\ufffe", "é"]
    latents = [[[token, 0.5], ["b", 0.25]] for token in odd]
    figures.draw_latents(tmp_path / "l.svg", "".join(odd), odd, latents, "\x07")
    figures.draw_masks(tmp_path / "m.svg", [odd[:2], odd, ["</think>"], ["1"]], 2)
    figures.draw_points(tmp_path / "p.svg", [("a $", 0.5, 10.0, 1.0)], "x", "y")
    for name in "lmp":
        assert minidom.parse(str(tmp_path / f"{name}.svg")).documentElement.tagName == "svg"
