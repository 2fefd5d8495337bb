"""What a model writes, as training data: a model that learned four lines by heart writes them again."""

import json

import distill
from test_training import torchrun
import train_sft

LINES = [{"problem": f"{a}+{a}", "cot": f"{a};{2 * a};", "cot_answer": f"\\boxed{{{2 * a}}}"} for a in (1, 2, 3, 4)]


def test_what_was_learned_is_written(command, checkpoint, tmp_path):
    data, run = tmp_path / "train.jsonl", tmp_path / "run"
    data.write_text("\n".join(map(json.dumps, LINES)))
    code, _, error = command(train_sft.main, "--model", checkpoint(), "--data", data, "--out", run, "--device", "cpu", "--lr", "1e-2",
                             "--max-steps", 150, "--batch-size", 4)
    assert code == 0, error
    problems = tmp_path / "problems.jsonl"
    problems.write_text("\n".join(json.dumps({"problem": line["problem"]}) for line in LINES))
    flags = ["--model", run, "--data", problems, "--device", "cpu", "--temperature", "0", "--max-new-tokens", "30"]
    code, printed, error = command(distill.main, *flags, "--out", tmp_path / "own.jsonl")
    assert code == 0 and "4 of 4 chains" in printed, error
    assert [json.loads(line) for line in (tmp_path / "own.jsonl").read_text().splitlines()] == LINES
    torchrun(2, "distill.py", *flags, "--samples", 2, "--out", tmp_path / "two.jsonl")
    assert [json.loads(line) for line in (tmp_path / "two.jsonl").read_text().splitlines()] == [line for line in LINES for _ in range(2)]
    code, printed, _ = command(distill.main, *flags[:-1], "5", "--out", tmp_path / "short.jsonl")  # no answer fits
    assert code == 0 and "0 of 4 chains" in printed and (tmp_path / "short.jsonl").read_text() == ""
    code, _, error = command(distill.main, *flags, "--out", tmp_path / "own.jsonl")
    assert code == 1 and "own.jsonl: is there already" in error
    code, _, error = command(distill.main, *flags, "--thinking", "latent", "--out", tmp_path / "latent.jsonl")
    assert code == 1 and "thinks in latent" in error and not (tmp_path / "latent.jsonl").exists()
