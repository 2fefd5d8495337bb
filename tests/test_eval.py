"""Grading and the evaluation command."""

import gzip
import itertools
import json
import os
import time

import pytest
import torch

from data import read_jsonl
import eval as evaluation
from grade import Grader, boxed
import runs
from runs import UserError


@pytest.fixture(scope="module")
def grader():
    with Grader(seconds=5) as g:
        yield g


@pytest.mark.parametrize("gold,text,right", [
    ("18", "so \\boxed{18}", True), ("18", "\\boxed{17} then \\boxed{18.0}", True), ("18", "\\boxed{18} no, \\boxed{17}", False),
    ("1234", "\\boxed{1,234}", True), ("1,2", "\\boxed{12}", False), ("5", "\\boxed{sNaN}", False),
    ("3,5,7", "\\boxed{5,3,7}", True), ("3,5,7", "\\boxed{5,3,8}", False), ("70000", "\\boxed{\\$70{,}000}", True), ("0.5", "\\boxed{\\frac{1}{2}}", True),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "\\boxed{(3, \\pi/2)}", True), ("\\frac{14}{3}", "\\boxed{\\frac{13}{3}}", False),
    ("p - q", "\\boxed{p-q}", True), ("72", "The answer is 72.", True), ("72", "", False), ("72", "\\boxed{}", False), ("72", "\\boxed{72", False)])
def test_verdicts(grader, gold, text, right):
    assert grader.grade(gold, text) is right


def test_boxed():
    assert boxed("a \\boxed{1} \\boxed{\\frac{1}{2}} b") == "\\frac{1}{2}" and boxed("none") is None and boxed("\\boxed{open") is None


def test_hostile_answers_cost_seconds():
    begin = time.time()
    with Grader(seconds=2) as g:
        for hostile in ("\\boxed{9**9**9**9}", "\\boxed{" + "(" * 900 + "1" + ")" * 900 + "}", "\\boxed{10^{10^{10^{10}}}}", "\\boxed{" + "9" * 10**6 + "}",
                        "\\boxed{1000000!!}", "\x00\ud800"):
            assert g.grade("5", hostile) is False
        assert g.grade("1/2", "\\boxed{\\frac{2}{4}}") is True  # and the next one is graded all the same
    assert time.time() - begin < 60


@pytest.mark.parametrize("thinking", ["latent", "text", "none"])
def test_command(command, checkpoint, data, tmp_path, thinking):
    code, printed, error = command(evaluation.main, "--model", checkpoint(), "--data", data, "--out", tmp_path, "--thinking", thinking,
                                   "--max-latents", 3, "--max-new-tokens", 5, "--batch-size", 7, "--temperature", 0)
    assert code == 0, error
    summary = json.loads((tmp_path / "train.json").read_text())
    predictions = [json.loads(line) for line in (tmp_path / "train.predictions.jsonl").read_text().splitlines()]
    assert summary["count"] == len(predictions) == 40 and f"{summary['accuracy']:.1f}" in printed
    assert [p["problem"] for p in predictions] == [row["problem"] for row in map(json.loads, data.open())]
    assert [p["written_length"] for p in predictions] == [len(row["cot"]) for row in map(json.loads, data.open())]  # a token a character
    assert summary["chain_length"] == pytest.approx(sum(p["chain_length"] for p in predictions) / 40)
    assert all(len(p["latents"]) == p["chain_length"] <= 3 for p in predictions) if thinking == "latent" else not predictions[0]["latents"]


def test_accuracy_counts_right_answers():
    predictions = [{"correct": i < 3, "chain_length": i, "answer_tokens": 2, "finished": True} for i in range(4)]
    s = evaluation.summarize(predictions, 1, 8.0)
    assert not [key for key in s if key.startswith(("pass", "ecr"))]
    assert s["accuracy"] == 75 and s["chain_length"] == 1.5 and s["seconds_per_problem"] == 2 and s["interval"] == pytest.approx(42.4, abs=0.1)


def test_means_over_latents():
    """Entropy and ECR@K are means over all latents (DESIGN.md), not over problems; ECR@K over those that have a written segment."""
    line = lambda n, entropy, ecr, segments: {"correct": True, "chain_length": n, "answer_tokens": 2, "finished": True, "segments": segments,
                                              "ecr@5": ecr} | ({"entropy": entropy} if n else {})
    s = evaluation.summarize([line(3, 1.0, 2.0, 1), line(1, 0.5, 1.0, 3), line(0, None, None, 4), line(2, 2.0, None, 0)], 1, 8.0)
    assert s["entropy"] == pytest.approx((3 * 1.0 + 0.5 + 2 * 2.0) / 6) and s["ecr@5"] == pytest.approx(1.5)
    lines = [line(3, 1.0, 2.0, 1) | {"written_length": 7}, line(2, 0.5, 1.0, 3), line(1, None, None, 4) | {"written_length": 3}]
    assert evaluation.summarize(lines, 1, 8.0)["compression"] == 2.5 and "compression" not in s  # of the problems with a written chain


def test_ranks_share_the_problems(command, checkpoint, data, tmp_path):
    """Two ranks write the file that one writes: nothing lost, doubled or out of order, sampled answers included."""
    from test_training import torchrun
    arguments = ["--model", checkpoint(), "--data", data, "--thinking", "latent", "--max-latents", 3, "--max-new-tokens", 5, "--temperature", 1]
    assert command(evaluation.main, *arguments, "--out", tmp_path / "one")[0] == 0
    torchrun(2, "eval.py", *arguments, "--out", tmp_path / "two", "--device", "cpu")
    one, two = ((tmp_path / x / "train.predictions.jsonl").read_text() for x in ("one", "two"))
    assert one == two and one.count("\n") == 40


def test_results_need_a_name(command, checkpoint, data, tmp_path):
    for name in (".jsonl", "settings.jsonl.gz"):
        (tmp_path / name).write_bytes(gzip.compress(data.read_bytes()) if name.endswith(".gz") else data.read_bytes())
        code, _, error = command(evaluation.main, "--model", checkpoint(), "--data", tmp_path / name, "--out", tmp_path / "out", *ARGUMENTS)
        assert code == 1 and name in error and "rename the file" in error and not (tmp_path / "out").exists()


def test_split_chain():
    assert evaluation.split_chain([1, 2, 8, 9, 3], [8, 9]) == ([1, 2], [3]) and evaluation.split_chain([8, 9], [8, 9]) == ([], [])
    assert evaluation.split_chain([1, 8], [8, 9]) == ([1, 8], [1, 8])


def test_pass_at_k():
    """The estimator against drawing samples, and in a summary of two problems with four samples each."""
    for right in range(6):
        subsets = list(itertools.combinations([True] * right + [False] * (5 - right), 2))
        assert evaluation.pass_at(2, 5, right) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    line = lambda correct: {"correct": correct, "chain_length": 1, "answer_tokens": 2, "finished": True}
    s = evaluation.summarize([line(x) for x in (True, False, False, False, True, True, True, True)], 4, 8.0)
    assert (s["accuracy"], s["pass@2"], s["pass@4"], s["count"]) == (62.5, pytest.approx(75), 100, 2)
    assert s["interval"] == pytest.approx(1.96 * 37.5 / 2**0.5)


def test_no_entropy_where_only_the_likeliest_tokens_are_known(command, checkpoint, data, tmp_path):
    for k, known in ((3, True), (0, False)):
        assert command(evaluation.main, "--model", checkpoint(), "--data", data, "--out", tmp_path / str(k), *ARGUMENTS, "--top-k", k)[0] == 0
        summary = json.loads((tmp_path / str(k) / "train.json").read_text())
        assert ("entropy" in summary) == known
        assert ("ecr@5" in summary) == (k != 3)  # of 3 tokens there are no 5 likeliest


def test_effective_compression():
    ids = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]])
    assert evaluation.effective_compression(ids, [[1, 9], [4, 3], [0]]) == 1.0  # 1 of (1, 9), 2 of (4, 3), 0 of (0); the last has none
    assert evaluation.effective_compression(ids[:0], [[1]]) is None


ARGUMENTS = ["--thinking", "latent", "--max-latents", 4, "--max-new-tokens", 6, "--temperature", 1, "--batch-size", 16]


def test_stopped_evaluation_goes_on(command, checkpoint, data, tmp_path, monkeypatch):
    """Killed in the middle of a line: what was done is kept, and the result is that of a run that was not stopped."""
    arguments = ["--model", checkpoint(), "--data", data, *ARGUMENTS, "--samples", 2, "--top-k", 5]
    assert command(evaluation.main, *arguments, "--out", tmp_path / "whole")[0] == 0
    real, done = evaluation.Done.add, []

    def add(self, number, result):
        if len(done) == 33:
            self.file.write('{"number": 7, "tok')
            raise KeyboardInterrupt
        done.append(number)
        real(self, number, result)
    monkeypatch.setattr(evaluation.Done, "add", add)
    assert command(evaluation.main, *arguments, "--out", tmp_path / "stopped")[0] == 130
    again = []
    monkeypatch.setattr(evaluation.Done, "add", lambda self, number, result: again.append(number) or real(self, number, result))
    assert command(evaluation.main, *arguments, "--out", tmp_path / "stopped")[0] == 0
    assert sorted(done + again) == list(range(80)) and len(again) == 80 - 33
    one, two = ((tmp_path / x / "train.predictions.jsonl").read_text() for x in ("whole", "stopped"))
    assert one == two and not list((tmp_path / "stopped").glob(".*.partial"))
    with runs.hold(tmp_path / "stopped"):
        code, _, error = command(evaluation.main, *arguments, "--out", tmp_path / "stopped")
        assert code == 1 and "another process is at work on it" in error
    # another arm that was stopped is another matter
    partial = tmp_path / "stopped" / ".train.random.0.partial"
    partial.write_text("{}")
    (tmp_path / "stopped" / "train.json").unlink()
    again.clear()
    assert command(evaluation.main, *arguments, "--out", tmp_path / "stopped")[0] == 0
    assert len(again) == 80 and partial.read_text() == "{}" and (tmp_path / "stopped" / "train.predictions.jsonl").read_text() == one
    assert json.loads((tmp_path / "whole" / "train.json").read_text())["ecr@5"] >= 0
    code, _, error = command(evaluation.main, *arguments, "--out", tmp_path / "stopped", "--seed", 9)
    assert code == 1 and "is of another evaluation (seed is 1 there, 9 here)" in error


def test_arms(command, checkpoint, data, tmp_path):
    """Each arm does what it says; one table."""
    arms = ["free", "forced", "floor", "random", "other", "argmax", "top-1", "top-2", "cut-2"]
    code, printed, error = command(evaluation.main, "--model", checkpoint(), "--data", data, "--out", tmp_path, *ARGUMENTS, "--top-k", 3,
                                   "--arms", *arms)
    assert code == 0, error
    lines = {arm: [json.loads(x) for x in (tmp_path / f"train{'' if arm == 'free' else '.' + arm}.predictions.jsonl").read_text().splitlines()]
             for arm in arms}
    tokens = lambda arm: [[[t for t, _ in latent] for latent in p["latents"]] for p in lines[arm]]
    free = tokens("free")
    assert max(map(len, free)) == 4
    assert all(p["answer"].startswith("\\boxed{") for arm in ("forced", "floor") for p in lines[arm]) and not any(tokens("floor"))
    assert tokens("forced") == free and tokens("other") == free[1:] + free[:1]
    assert tokens("cut-2") == [x[:2] for x in free]
    assert all(x[0] == y[0][:1] for x, y in zip(tokens("argmax"), free) if y) and tokens("argmax") != [[x[:1] for x in p] for p in free]
    assert all([w for _, w in latent] == [1] for line in lines["argmax"] for latent in line["latents"])
    assert tokens("top-1") == tokens("argmax")
    assert all(len(latent) == 2 for p in lines["top-2"] for latent in p["latents"])
    assert tokens("random") != free
    assert all(f"| train | {arm} |" in printed for arm in arms) and (tmp_path / "table.md").read_text().count("\n| train |") == len(arms)
    code, _, error = command(evaluation.main, "--model", checkpoint(), "--data", data, "--out", tmp_path / "text", "--arms", "random")
    assert code == 1 and "this model's thinking is text" in error
    code, _, error = command(evaluation.main, "--model", checkpoint(), "--data", data, "--out", tmp_path / "top", *ARGUMENTS, "--arms", "top-999999")
    assert code == 1 and "--arms top-999999: is for superpositions, of at most" in error


def test_real_benchmarks(grader):
    """The files' own answers, boxed, are right, and wrong with a digit more, and so are at least 99% of MATH-500's written solutions."""
    folder = os.environ.get("LATENT_SFT_DATA")
    if not folder:
        pytest.skip("LATENT_SFT_DATA names no folder of benchmark files")
    for name in ("gsm8k", "aime-2024", "aime-2025", "gsm-hard", "svamp", "multiarith"):
        problems = evaluation.load_problems(f"{folder}/{name}-test.jsonl")
        assert len(problems) >= 30 and all(grader.grade(p.answer, f"So it is \\boxed{{ {p.answer}}}.") for p in problems)
        assert not any(grader.grade(p.answer, f"So it is \\boxed{{1{p.answer.lstrip('-')}}}.") for p in problems)
    rows = read_jsonl(f"{folder}/math-500-test.jsonl")
    wrong = [row["answer"] for row in rows if not grader.grade(row["answer"], row["solution"])]
    assert len(rows) == 500 and len(wrong) <= 5, wrong


def test_other_latents_where_there_are_none(command, checkpoint, data, tmp_path):
    code, _, error = command(evaluation.main, "--model", checkpoint(), "--data", data, "--out", tmp_path, *ARGUMENTS, "--max-latents", 0,
                             "--arms", "other")
    assert code == 0, error


def test_bad_calls_cost_nothing(command, checkpoint, data, tmp_path):
    """One sentence, before anything is sampled."""
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "train.json").write_text("{}")
    twin = tmp_path / "train.random.jsonl"
    twin.write_text(data.read_text())
    for flags, out, message in ((["--arms", "free", "random", "--thinking", "text"], "a", "this model's thinking is text"),
                                (["--arms", "other", "--top-k", 0], "b", "another --top-k than 0"),
                                (["--top-k", 5000], "c", "the vocabulary has only"), ([], "foreign", "holds no evaluation"),
                                (["--data", data, twin, "--arms", "free", "random"], "d", "the same name")):
        code, _, error = command(evaluation.main, "--model", checkpoint(), "--data", data, "--out", tmp_path / out, *ARGUMENTS, *flags)
        assert code == 1 and message in error and error.count("\n") == 1
        assert not list((tmp_path / out).glob("*predictions*"))


def test_an_answer_may_be_a_number(tmp_path):
    path = tmp_path / "numbers.jsonl"
    path.write_text('{"problem": "6 * 7?", "answer": 42}\n{"problem": "1 / 2?", "answer": 0.5}\n{"problem": "long", "answer": 1%s}\n' % ("0" * 400))
    assert [p.answer for p in evaluation.load_problems(path)] == ["42", "0.5", "1" + "0" * 400]
    for answer in ("[42]", "true", "NaN", "Infinity"):
        path.write_text('{"problem": "6 * 7?", "answer": %s}\n' % answer)
        with pytest.raises(UserError, match='line 1: the field "answer" is not a string'):
            evaluation.load_problems(path)


def test_chains_of_a_benchmark_are_those_of_training(tmp_path):
    path = tmp_path / "tagged.jsonl"
    path.write_text(json.dumps({"problem": "1", "answer": "2", "cot": "<think>12</think>"}))
    assert evaluation.load_problems(path)[0].chain == "12"
