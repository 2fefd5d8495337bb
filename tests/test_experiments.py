"""The smoke mode of the task files on a small random model: every stage runs, and rows come out."""

import json

from experiments import gsm8k, report


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
    before = (out / "latent-r2" / "finished.json").stat().st_mtime_ns
    assert command(gsm8k.main, *flags)[0] == 0  # nothing is made twice
    assert json.loads((out / "results.json").read_text()) == rows
    assert (out / "latent-r2" / "finished.json").stat().st_mtime_ns == before
    code, printed, error = command(report.main, "--directory", out)
    assert code == 0, error
    assert (out / "table.md").read_text() in printed
    assert (
        "| Latent r = 2 | 1 |" in (out / "table.md").read_text()
        and "<svg" in (out / "gsm8k.svg").read_text()
    )
