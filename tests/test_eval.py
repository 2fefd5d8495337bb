"""Grading and the evaluation command."""

import json
import time

import pytest

import eval as evaluation
from grade import Grader, boxed


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
    assert summary["chain_length"] == pytest.approx(sum(p["chain_length"] for p in predictions) / 40)
    assert all(len(p["latents"]) == p["chain_length"] <= 3 for p in predictions) if thinking == "latent" else not predictions[0]["latents"]


def test_accuracy_counts_right_answers():
    predictions = [{"correct": i < 3, "chain_length": i, "answer_tokens": 2, "finished": True} for i in range(4)]
    s = evaluation.summarize(predictions, 8.0)
    assert s["accuracy"] == 75 and s["chain_length"] == 1.5 and s["seconds_per_problem"] == 2 and s["interval"] == pytest.approx(42.4, abs=0.1)


def test_ranks_share_the_problems(command, checkpoint, data, tmp_path):
    """Two ranks write the file that one writes: nothing lost, doubled or out of order, sampled answers included."""
    from test_training import torchrun
    arguments = ["--model", checkpoint(), "--data", data, "--thinking", "latent", "--max-latents", 3, "--max-new-tokens", 5, "--temperature", 1]
    assert command(evaluation.main, *arguments, "--out", tmp_path / "one")[0] == 0
    torchrun(2, "eval.py", *arguments, "--out", tmp_path / "two", "--device", "cpu")
    one, two = ((tmp_path / x / "train.predictions.jsonl").read_text() for x in ("one", "two"))
    assert one == two and one.count("\n") == 40


def test_split_chain():
    assert evaluation.split_chain([1, 2, 8, 9, 3], [8, 9]) == ([1, 2], [3]) and evaluation.split_chain([8, 9], [8, 9]) == ([], [])
    assert evaluation.split_chain([1, 8], [8, 9]) == ([1, 8], [1, 8])
