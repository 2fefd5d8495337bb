"""The smoke mode of reproduce.py on a small random model: every stage runs, and the report is made of what was measured."""

import json

import pytest

import report
import reproduce
from runs import UserError


def test_smoke(command, checkpoint, data, tmp_path, monkeypatch):
    source, out = tmp_path / "data", tmp_path / "out"
    source.mkdir()
    for name in ("gsm8k-train", *reproduce.TESTS):
        (source / f"{name}.jsonl").write_text(data.read_text())
    train = [json.loads(line) for line in data.read_text().splitlines()]  # cues are the first words of longer problems
    (source / "gsm8k-train.jsonl").write_text("\n".join(json.dumps(row | {"problem": f"Tom has to say: {row['problem']}"}) for row in train))
    first, *others = data.read_text().splitlines()  # GSM8K has problems whose chain holds no equation
    (source / "gsm8k-valid.jsonl").write_text("\n".join([json.dumps(json.loads(first) | {"cot": ""}), *others]))
    arguments = ["--model", checkpoint(), "--data", source, "--out", out, "--smoke", "--device", "cpu", "--tests", "gsm8k-valid"]
    code, _, error = command(reproduce.main, *arguments, "--variants", "Latent-r2")
    assert code == 0, error
    results = json.loads((out / "results.json").read_text())
    assert set(results["runs"]) == {"Latent-r2"} and results["smoke"]  # CoT-SFT was trained as its start alone
    latent = results["runs"]["Latent-r2"]["seed1"]
    made = latent["made"]
    assert made["device"] == "CPU" and made["variant"] == vars(reproduce.VARIANTS["Latent-r2"]) and set(made["on_valid"]) == {"model", "step-1"}
    assert made["on_valid"][made["chosen"]] == latent["gsm8k-valid"]["accuracy"] == max(made["on_valid"].values())
    assert {"gsm8k-valid", "gsm8k-test", "gsm8k-test.floor", "gsm8k-test.cut-4", "phase1.valid.written",
            "student.valid.written"} <= set(latent)
    assert latent["gsm8k-valid"]["count"] == 4 and latent["phase1.valid.written"]["count"] == 3
    assert latent["gsm8k-test.cut-4"]["chain_length"] <= 4 and latent["gsm8k-test.floor"]["chain_length"] == 0
    table = (out / "table.md").read_text()
    assert f"| Latent-r2 | 1 | {latent['gsm8k-valid']['accuracy']:.1f}" in table and "SMOKE" in table
    made_before = (out / "seed1" / "phase1" / "r2--w-anchor1" / "joint" / "decoder.safetensors").stat().st_mtime
    code, printed, error = command(reproduce.main, *arguments, "--variants", "Latent-r2-own", "CoT-SFT", "--jobs", 2, "--alone")  # calls of its own
    assert code == 0, error + (out / "Latent-r2-own-1.log").read_text()
    results = json.loads((out / "results.json").read_text())
    assert set(results["runs"]) == {"CoT-SFT", "Latent-r2", "Latent-r2-own"} and "| Latent-r2-own | 1 |" in printed
    assert ["alone.gsm8k-test" in results["runs"][name]["seed1"] for name in ("CoT-SFT", "Latent-r2", "Latent-r2-own")] == [True, False, True]
    own = json.loads((out / "seed1" / "Latent-r2-own" / "model" / "config.json").read_text())
    assert own["data"].endswith("seed1/fresh/own.jsonl") and own["cache"].endswith("r2--w-anchor1/cache-own")
    assert (out / "seed1" / "phase1" / "r2--w-anchor1" / "joint" / "decoder.safetensors").stat().st_mtime == made_before  # shared
    (out / "seed1" / "Latent-r2-own" / "eval" / "settings.json").write_text("{}")
    (out / "seed1" / "Latent-r2-own" / "eval" / "gsm8k-test.json").unlink()
    code, _, error = command(reproduce.main, *arguments, "--variants", "Latent-r2-own", "CoT-SFT", "--jobs", 2)
    assert code == 1 and "1 calls failed, of which" in error and "another evaluation" in (out / "Latent-r2-own-1.log").read_text()
    monkeypatch.setitem(reproduce.VARIANTS, "Latent-r2", reproduce.Variant(2, epochs=3.0, arms=True))
    code, _, error = command(reproduce.main, *arguments, "--variants", "Latent-r2")
    assert code == 1 and "Latent-r2: was made when this variant was" in error and "'epochs': 1.0" in error
    results["runs"]["Latent-r2"]["seed1"]["gsm8k-valid"]["accuracy"] = 12.3
    (out / "results.json").write_text(json.dumps(results))
    assert command(report.main, out)[0] == 0
    assert "| Latent-r2 | 1 | 12.3" in (out / "table.md").read_text()
    assert all((out / name).read_text().startswith("<svg") for name in ("length.svg", "time.svg"))


def test_what_is_missing_is_said(command, checkpoint, tmp_path):
    code, _, error = command(reproduce.main, "--out", tmp_path / "out", "--model", checkpoint(), "--data", tmp_path)
    assert code == 1 and "gsm8k-train.jsonl: no such file" in error and not (tmp_path / "out").exists()
    for name, row in (("svamp-test", {"problem": "1+1"}), ("gsm8k-train", {"problem": "1+1", "cot_answer": "2"}),
                      ("gsm8k-valid", {"problem": "1+1", "answer": "2", "cot": "1"})):
        files = {file: {"problem": "1+1", "answer": "2", "cot": "1", "cot_answer": "2"} for file in ("gsm8k-train", *reproduce.TESTS)} | {name: row}
        for file, line in files.items():
            (tmp_path / f"{file}.jsonl").write_text(json.dumps(line))
        code, _, error = command(reproduce.main, "--out", tmp_path / "out", "--model", checkpoint(), "--data", tmp_path)
        assert code == 1 and f"{name}.jsonl, line 1: the field" in error and not (tmp_path / "out").exists()
    code, _, error = command(report.main, tmp_path / "nothing")
    assert code == 1 and "results.json: no such file" in error
    for text in ('{"runs": {}}', '{"accuracy": 1}', '{"runs": {"CoT-SFT": {"seed1": {"gsm8k-test": {}}}}}'):
        (tmp_path / "results.json").write_text(text)
        code, _, error = command(report.main, tmp_path)
        assert code == 1 and "results.json: " in error and "reproduce.py" in error


def test_own_chains(monkeypatch, tmp_path):
    """Of what models write, problems that are new and ask, and chains that add up, are trained on."""
    row = lambda problem, cot, answer: json.dumps({"problem": problem, "cot": cot, "cot_answer": answer})
    fine = [row("c", "<<2*3=6>> <<6/4=1.50>>", "\\boxed{1.5}"), row("f", "<<(1+2)*.5=1.5>>", "\\boxed{1.5}")]
    wrong = [row("a", "<<2*3=7>>", "\\boxed{7}"), row("b", "<<2*3=6>>", "\\boxed{7}"), row("d", "two", "\\boxed{2}"),
             row("e", "<<9**9=9>>", "\\boxed{9}"), row("g", "<<2(3)=6>>", "\\boxed{6}"), row("h", "<<1/0=6>>", "\\boxed{6}"),
             row("i", "<<x=6>> <<2*3=6>>", "\\boxed{6}"), row("j", "<<2*3=6>>", "six"), row("k", "<<2**3=8>>", "\\boxed{8}"),
             row("l", "<<7//2=3>>", "\\boxed{3}"), row("m", "so <<2*3=6>>", "\\boxed{6}"), row("n", f"<<{9000 * '-'}6=6>>", "\\boxed{6}")]
    written = {"problems": [row("Tom has", "3 eggs. How many?", "1"), row("Tom has", "3 eggs. How many?", "2"), row("Tom has", "4.", "1"),
                            row("Tom", "asks?", "1"), row("Tom", "is  tested?", "1")], "chains": [wrong[0], fine[0], *wrong[1:], fine[1]]}
    write = lambda path, lines: (path.parent.mkdir(parents=True, exist_ok=True), path.write_text("\n".join(lines) + "\n"))
    monkeypatch.setattr(reproduce, "stage", lambda script, flags, out, *done, data, **others: write(
        out / "chains.jsonl", written["problems" if data.name == "cues.jsonl" else "chains"]) if script == "distill.py" else None)
    given = row("Tom  asks?", "<<1+1=3>>", "\\boxed{3}")  # is not looked at
    write(tmp_path / "train.jsonl", [given])
    for name in reproduce.TESTS:
        write(tmp_path / f"{name}.jsonl", [row("Tom is tested?", "", "1")])
    written["problems"], found = [row("Tom has", "4.", "1")], written["problems"]
    with pytest.raises(UserError, match="holds no new question"):
        reproduce.fresh_problems("checkpoint", tmp_path, tmp_path / "fresh", "", smoke=False)
    written["problems"] = found
    problems = reproduce.fresh_problems("checkpoint", tmp_path, tmp_path / "fresh", "", smoke=False)
    assert problems.read_text() == '{"problem": "Tom has 3 eggs. How many?"}\n'
    written["chains"], found = wrong, written["chains"]
    with pytest.raises(UserError, match="holds no chain that adds up"):
        reproduce.own_chains("run", problems, tmp_path, tmp_path / "fresh", "", smoke=False)
    written["chains"] = found
    reproduce.own_chains("run", problems, tmp_path, tmp_path / "fresh", "", smoke=False)
    assert (tmp_path / "fresh" / "own.jsonl").read_text().splitlines() == fine
    assert (tmp_path / "fresh" / "fresh.jsonl").read_text().splitlines() == [given, *fine]
