"""What a model writes, as training data: a model that learned a few lines by heart writes them again."""

import json

import pytest

import distill
import sample
from test_training import torchrun
import train_sft

LINES = [{"problem": f"{a}+{a}", "cot": f"{a};{2 * a};", "cot_answer": f"\\boxed{{{2 * a}}}"} for a in (1, 2, 3, 4)]
OTHERS = [{"problem": "5+5", "cot": "5;", "cot_answer": "10"}, {"problem": "6+6", "cot": "\\boxed{6}", "cot_answer": "\\boxed{6}"}]


@pytest.fixture
def learned(command, checkpoint, tmp_path):
    """(run, file of its problems, each with its number): six lines, learned by heart; of the fifth the answer is not boxed."""
    data, problems = tmp_path / "train.jsonl", tmp_path / "problems.jsonl"
    data.write_text("\n".join(map(json.dumps, LINES + OTHERS)))
    problems.write_text("\n".join(json.dumps({"problem": line["problem"], "number": i}) for i, line in enumerate(LINES + OTHERS)))
    code, _, error = command(train_sft.main, "--model", checkpoint(), "--data", data, "--out", tmp_path / "run", "--device", "cpu", "--lr", "1e-2",
                             "--max-steps", 200, "--batch-size", 6)
    assert code == 0, error
    return tmp_path / "run", problems


def written(out):
    return [json.loads(line) for line in (out / "chains.jsonl").read_text().splitlines()]


def test_what_was_learned_is_written(command, learned, tmp_path, monkeypatch):
    run, problems = learned
    flags = ["--model", run, "--data", problems, "--device", "cpu", "--max-new-tokens", 40]
    code, printed, error = command(distill.main, *flags, "--temperature", 0, "--out", tmp_path / "own")
    assert code == 0 and "5 of 6 chains" in printed, error
    expected = [line | {"number": i} for i, line in enumerate(LINES + OTHERS) if line["cot_answer"] != "10"]
    assert written(tmp_path / "own") == expected  # the last says nothing else before and after </think>
    before = (tmp_path / "own" / "chains.jsonl").stat().st_mtime_ns
    assert command(distill.main, *flags, "--temperature", 0, "--out", tmp_path / "own")[0] == 0
    assert (tmp_path / "own" / "chains.jsonl").stat().st_mtime_ns == before
    code, _, error = command(distill.main, *flags, "--temperature", 1, "--out", tmp_path / "own")
    assert code == 1 and "belongs to another run (temperature" in error

    sampled = [*flags, "--temperature", 3, "--top-p", 1, "--samples", 8]  # now and then right; many never end, or answer without a box
    code, printed, _ = command(distill.main, *sampled, "--out", tmp_path / "one")
    assert code == 0 and 0 < len(written(tmp_path / "one")) < 48
    torchrun(2, "distill.py", *sampled, "--out", tmp_path / "two")
    assert written(tmp_path / "two") == written(tmp_path / "one")

    def killed(self, prompts, numbers, progress, given=None):  # after nine results
        results = iter(generate(self, prompts[:9], numbers[:9], progress, given))
        raise KeyboardInterrupt(list(results))
    generate = sample.Sampler.generate
    monkeypatch.setattr(sample.Sampler, "generate", killed)
    assert command(distill.main, *sampled, "--out", tmp_path / "stopped")[0] == 130 and not (tmp_path / "stopped" / "chains.jsonl").exists()
    monkeypatch.setattr(sample.Sampler, "generate", lambda self, prompts, *others: generate(self, prompts, *others) if len(prompts) == 39 else None)
    assert command(distill.main, *sampled, "--out", tmp_path / "stopped")[0] == 0
    assert written(tmp_path / "stopped") == written(tmp_path / "one")
    assert [file.name for file in (tmp_path / "stopped").iterdir() if file.name.endswith(".partial")] == []


def test_what_is_left_out(command, learned, tmp_path, monkeypatch):
    """Of three results one did not end within the budget, one has no </think>, one is whole."""
    run, problems = learned
    lines = problems.read_text().splitlines()[:3]
    problems.write_text("\n".join(lines))
    tokenizer = distill.load_model(run)[1]
    close, box = tokenizer.end_think, tokenizer.encode("\\boxed{2}")
    tokens = [(box + close + box, False), (box + box, True), (box + close + box, True)]
    monkeypatch.setattr(distill, "sampled", lambda *_: ({n: sample.Result(None, None, *t) for n, t in enumerate(tokens)}, 0.0))
    code, printed, error = command(distill.main, "--model", run, "--data", problems, "--out", tmp_path / "out", "--device", "cpu")
    assert code == 0 and "1 of 3 chains" in printed, error
    assert written(tmp_path / "out") == [{"problem": "3+3", "number": 2, "cot": "\\boxed{2}", "cot_answer": "\\boxed{2}"}]


def test_bad_calls_cost_nothing(command, learned, checkpoint, tmp_path):
    run, problems = learned
    flags = ["--data", problems, "--device", "cpu", "--out", tmp_path / "out"]
    code, _, error = command(distill.main, "--model", run, *flags, "--thinking", "latent")
    assert code == 1 and "its thinking is latent; name a model that writes chains" in error and not (tmp_path / "out").exists()
    (run / "finished.json").unlink()
    code, _, error = command(distill.main, "--model", run, *flags)
    assert code == 1 and "not finished" in error and not (tmp_path / "out").exists()
    problems.write_text('{"problem": "1"}\n{"problem": 2}')
    code, _, error = command(distill.main, "--model", checkpoint(), *flags)
    assert code == 1 and "problems.jsonl, line 2" in error and not (tmp_path / "out").exists()
    (tmp_path / "out").write_text("mine")
    problems.write_text('{"problem": "1"}')
    code, _, error = command(distill.main, "--model", checkpoint(), *flags)
    assert code == 1 and "choose another --out" in error and (tmp_path / "out").read_text() == "mine"
