"""Grading and the evaluation command."""

from contextlib import suppress
import json
import os
from pathlib import Path
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

import eval as evaluation
from lib import files, run
from lib.errors import UserError
from lib.files import read_jsonl
from lib.grader import boxed, grade


CASES = [
    ("18", "so \\boxed{18}", True),
    ("18", "\\boxed{17} then \\boxed{18.0}", True),
    ("18", "\\boxed{18} no, \\boxed{17}", False),
    ("1234", "\\boxed{1,234}", True),
    ("1,2", "\\boxed{12}", False),
    ("5", "\\boxed{sNaN}", False),
    ("3,5,7", "\\boxed{5,3,7}", True),
    ("3,5,7", "\\boxed{5,3,8}", False),
    ("70000", "\\boxed{\\$70{,}000}", True),
    ("0.5", "\\boxed{\\frac{1}{2}}", True),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "\\boxed{(3, \\pi/2)}", True),
    ("\\frac{14}{3}", "\\boxed{\\frac{13}{3}}", False),
    ("p - q", "\\boxed{p-q}", True),
    ("72", "The answer is 72.", True),
    ("72", "", False),
    ("72", "\\boxed{}", False),
    ("72", "\\boxed{72", False),
    # decimals within 1e-4 of the larger one, integers exactly
    ("0.3333", "\\boxed{0.33331}", True),
    ("0.3333", "\\boxed{0.334}", False),
    ("2.5", "\\boxed{2.50002}", True),
    ("100000", "\\boxed{100001}", False),
    ("-2.5", "\\boxed{2.5}", False),
    ("123456789.5", "\\boxed{123456789.6}", True),
    # what numbers look like
    ("72", "\\boxed{72 dollars}", True),
    ("6", "\\boxed{6 android phones}", True),
    ("3", "\\boxed{3 million}", False),
    ("10", "\\boxed{10 and a half}", False),
    ("72", "\\boxed{$72}", True),
    ("72", "\\boxed{\\$72}", True),
    ("72", "\\boxed{72,}", True),
    ("1234", "\\boxed{1 234}", True),
    ("72", "\\boxed{7.2e1}", True),
    ("18", "\\boxed{18\\%}", True),
    ("18", "\\boxed{18%}", True),
    ("1234567", "\\boxed{1{,}234{,}567}", True),
    ("5", "\\boxed{5x}", False),
    ("5", "\\boxed{5 x}", False),
    ("12", "\\boxed{1 2}", False),
]


@pytest.fixture(scope="module")
def verdicts():
    """{(gold, text): what the grader says} of all cases."""
    pairs = [(gold, text) for gold, text, _ in CASES]
    return dict(zip(pairs, grade(pairs, 5), strict=True))


@pytest.mark.parametrize("gold,text,right", CASES)
def test_verdicts(verdicts, gold, text, right):
    assert verdicts[gold, text] is right


def test_boxed():
    assert (
        boxed("a \\boxed{1} \\boxed{\\frac{1}{2}} b") == "\\frac{1}{2}"
        and boxed("none") is None
        and boxed("\\boxed{open") is None
    )


def test_hostile_answers_cost_seconds():
    begin, deep, digits = time.time(), "(" * 900 + "1" + ")" * 900, "9" * 10**6
    hostile = ("9**9**9**9", deep, "10^{10^{10^{10}}}", digits, "1000000!!")
    pairs = [("5", f"\\boxed{{{x}}}") for x in hostile] + [("5", "\x00\ud800")]
    fine = ("1/2", "\\boxed{\\frac{2}{4}}")  # the next one is graded all the same
    verdicts = grade([x for pair in pairs for x in (pair, fine)], 2)
    assert verdicts == [False, True] * len(pairs)
    assert time.time() - begin < 60
    assert grade([]) == []


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_the_grader_ends_with_its_parent(how):
    """Also while it works on an answer that takes forever."""
    program = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from lib.grader import grade
grade([("5", "\\\\boxed{{10^{{10^{{10^{{10}}}}}}}}")], 1000)"""
    parent = subprocess.Popen([sys.executable, "-c", program])
    worker, begin = None, time.time()
    while not worker or processor_seconds(worker) < 4:  # its imports take one
        time.sleep(0.1)
        worker = worker or child_of(parent.pid)
        assert time.time() - begin < 60
    assert is_running(worker)
    os.kill(parent.pid, how)
    parent.wait()
    for _ in range(100):
        if not is_running(worker):
            break
        time.sleep(0.1)
    assert not is_running(worker)


def child_of(pid):
    """A child process, if there is one."""
    for status in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError):
            if f"\nPPid:\t{pid}\n" in status.read_text():
                return int(status.parent.name)


def processor_seconds(pid):
    user, system = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def is_running(pid):
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


@pytest.mark.parametrize("thinking", ["latent", "text", "none"])
def test_command(command, thinker, data, tmp_path, thinking):
    code, printed, error = command(
        evaluation.main,
        "--model",
        thinker(thinking),
        "--data",
        data,
        "--out",
        tmp_path,
        "--max-latents",
        3,
        "--max-new-tokens",
        5,
        "--batch-size",
        7,
        "--temperature",
        0,
    )
    assert code == 0, error
    summary = json.loads((tmp_path / "summary.json").read_text())["train.free"]
    predictions = [
        json.loads(line) for line in (tmp_path / "train.free.jsonl").read_text().splitlines()
    ]
    assert summary["count"] == len(predictions) == 40
    (line,) = [x for x in printed.splitlines() if x.startswith("train.free: ")]
    assert f"accuracy {summary['accuracy']:.4g}" in line and "count 40" in line
    rows = [json.loads(line) for line in data.open()]
    assert [p["problem"] for p in predictions] == [row["problem"] for row in rows]
    assert [p["written_length"] for p in predictions] == [
        len(row["cot"]) for row in rows
    ]  # a token a character
    lengths = [p["chain_length"] for p in predictions]
    assert summary["chain_length"] == pytest.approx(sum(lengths) / 40)
    if sum(lengths):
        assert summary["compression"] == pytest.approx(
            sum(len(row["cot"]) for row in rows) / sum(lengths)
        )
    if thinking == "latent":
        assert all(len(p["latents"]) == p["chain_length"] <= 3 for p in predictions)
    else:
        assert not predictions[0]["latents"]


def line_of(correct=True, length=1, **more):
    line = {"correct": correct, "chain_length": length, "answer_tokens": 2, "finished": True}
    return line | {"seconds": 2.0, "written_length": 0} | more


def test_accuracy_counts_right_answers():
    s = evaluation.summarize([line_of(i < 3, i) for i in range(4)], 1)
    assert not [key for key in s if key.startswith(("pass", "compression"))]
    assert s["accuracy"] == 75 and s["chain_length"] == 1.5 and s["seconds_per_problem"] == 2
    assert s["interval"] == pytest.approx(42.4, abs=0.1)
    lines = [
        line_of(length=3, written_length=7),
        line_of(length=2),
        line_of(length=1, written_length=3),
    ]
    assert (
        evaluation.summarize(lines, 1)["compression"] == 2.5
    )  # of the problems with a written chain


def without_seconds(path):
    """The text of a file of predictions, without what a clock said."""
    return re.sub(r', "seconds": [^,}]*', "", path.read_text())


def test_ranks_share_the_problems(command, thinker, data, tmp_path):
    """Two ranks write the file that one writes: nothing lost, doubled or out of order, sampled answers included."""
    from test_training import torchrun

    arguments = [
        "--model",
        thinker(),
        "--data",
        data,
        "--max-latents",
        3,
        "--max-new-tokens",
        5,
        "--temperature",
        1,
    ]
    assert command(evaluation.main, *arguments, "--out", tmp_path / "one")[0] == 0
    torchrun(2, "eval.py", *arguments, "--out", tmp_path / "two", "--device", "cpu")
    one, two = (without_seconds(tmp_path / x / "train.free.jsonl") for x in ("one", "two"))
    assert one == two and one.count("\n") == 40


def test_split_chain():
    assert evaluation.split_chain([1, 2, 8, 9, 3], [8, 9]) == (
        [1, 2],
        [3],
    ) and evaluation.split_chain([8, 9], [8, 9]) == ([], [])
    assert evaluation.split_chain([1, 8], [8, 9]) == ([1, 8], [1, 8])


def test_summary_of_several_samples():
    """Two problems with four samples each. pass@4: one of the four is right."""
    right = (True, False, False, False, False, False, False, False)
    s = evaluation.summarize([line_of(x) for x in right], 4)
    assert (s["accuracy"], s["pass@4"], s["count"]) == (12.5, 50, 2)
    assert s["interval"] == pytest.approx(1.96 * 12.5 / 2**0.5)


ARGUMENTS = [
    "--max-latents",
    4,
    "--max-new-tokens",
    6,
    "--temperature",
    1,
    "--batch-size",
    16,
]


def test_stopped_evaluation_goes_on(command, thinker, data, tmp_path, monkeypatch):
    """Killed in the middle of a line: what was done is kept, and the result is that of an unbroken run."""
    arguments = ["--model", thinker("latent", 5), "--data", data, *ARGUMENTS, "--samples", 2]
    assert command(evaluation.main, *arguments, "--out", tmp_path / "whole")[0] == 0
    real, done, stopped = evaluation.Arm.prediction, [], tmp_path / "stopped" / "train.free.jsonl"

    def prediction(self, problem, r):
        if len(done) == 33:
            with open(stopped, "a") as f:
                f.write('{"number": 7, "answer": "\\\\boxed{7}')
            raise KeyboardInterrupt
        done.append(problem.text)
        return real(self, problem, r)

    with monkeypatch.context() as m:
        m.setattr(evaluation.Arm, "prediction", prediction)
        assert command(evaluation.main, *arguments, "--out", tmp_path / "stopped")[0] == 130
    assert len(stopped.read_text().splitlines()) == 34
    again = []
    with monkeypatch.context() as m:
        m.setattr(
            evaluation.Arm,
            "prediction",
            lambda self, p, r: again.append(p.text) or real(self, p, r),
        )
        assert command(evaluation.main, *arguments, "--out", tmp_path / "stopped")[0] == 0
    assert len(again) == 80 - 33
    assert without_seconds(stopped) == without_seconds(tmp_path / "whole" / "train.free.jsonl")
    with run.output_directory(tmp_path / "stopped"):
        code, _, error = command(evaluation.main, *arguments, "--out", tmp_path / "stopped")
        assert code == 1 and "another process works on it" in error
    code, _, error = command(
        evaluation.main, *arguments, "--out", tmp_path / "stopped", "--seed", 9
    )
    assert code == 1 and "was made with seed = 1, not 9" in error
    other = tmp_path / "other" / "train.jsonl"  # a file of the same name
    other.parent.mkdir()
    lines = data.read_text().splitlines(True)
    for changed in (
        lines[::-1],
        lines[:1],
        [x.replace('"answer": "1"', '"answer": "2"') for x in lines],
    ):
        other.write_text("".join(changed))
        assert changed != lines
        code, _, error = command(
            evaluation.main, *arguments, "--out", tmp_path / "stopped", "--data", other
        )
        assert code == 1 and "predicts other problems" in error
    stopped.write_text("{\n" + stopped.read_text())
    code, _, error = command(evaluation.main, *arguments, "--out", tmp_path / "stopped")
    assert code == 1 and f"{stopped}: cannot be read" in error


def test_arms(command, checkpoint, thinker, data, tmp_path):
    """Each arm does what it says; one line of each."""
    arms = ["free", "forced", "floor", "random", "other", "argmax", "cut-2", "cut-9"]
    code, printed, error = command(
        evaluation.main,
        "--model",
        thinker("latent", 3),
        "--data",
        data,
        "--out",
        tmp_path,
        *ARGUMENTS,
        "--arms",
        *arms,
    )
    assert code == 0, error
    lines = {
        arm: [json.loads(x) for x in (tmp_path / f"train.{arm}.jsonl").read_text().splitlines()]
        for arm in arms
    }
    tokens = lambda arm: [[[t for t, _ in latent] for latent in p["latents"]] for p in lines[arm]]
    free = tokens("free")
    assert max(map(len, free)) == 4
    assert all(
        p["answer"].startswith("\\boxed{") for arm in ("forced", "floor") for p in lines[arm]
    ) and not any(tokens("floor"))
    assert tokens("forced") == free
    for i, latents in enumerate(tokens("other")):  # of the problem before, at the same place
        before = free[i - 1]
        assert all(x == before[n % len(before)] for n, x in enumerate(latents) if before)
    assert sum(map(len, tokens("other"))) > 40
    assert tokens("cut-2") == [x[:2] for x in free]
    assert tokens("cut-9") == free  # the budget of 4 holds
    assert all(x[0] == y[0][:1] for x, y in zip(tokens("argmax"), free) if y) and tokens(
        "argmax"
    ) != [[x[:1] for x in p] for p in free]
    assert all(
        [w for _, w in latent] == [1] for line in lines["argmax"] for latent in line["latents"]
    )
    assert tokens("random") != free
    summaries = json.loads((tmp_path / "summary.json").read_text())
    assert list(summaries) == [f"train.{arm}" for arm in arms]
    shown = [line for line in printed.splitlines() if line.startswith("train.")]
    assert [line.split(": ")[0] for line in shown] == list(summaries)
    for line, summary in zip(shown, summaries.values()):
        assert all(f"{key} {x:.4g}" in line for key, x in summary.items())
    code, _, error = command(
        evaluation.main,
        "--model",
        checkpoint(),
        "--data",
        data,
        "--out",
        tmp_path / "text",
        "--arms",
        "random",
    )
    assert code == 1 and "--arms random: this model does not think in latents" in error
    nonsense = ["--data", data, "--out", tmp_path / "top", "--arms", "nonsense"]
    assert command(evaluation.main, "--model", checkpoint(), *nonsense)[0] == 1


def test_real_benchmarks():
    """The files' own answers, boxed, are right, and wrong with a digit more, and so are at least 99% of MATH-500's written solutions."""
    folder = os.environ.get("LATENT_SFT_DATA")
    if not folder:
        pytest.skip("LATENT_SFT_DATA names no folder of benchmark files")
    for name in ("gsm8k", "aime-2024", "aime-2025", "gsm-hard", "svamp", "multiarith"):
        problems = evaluation.load_problems(f"{folder}/{name}-test.jsonl")
        right = [(p.answer, f"So it is \\boxed{{ {p.answer}}}.") for p in problems]
        wrong = [(p.answer, f"So it is \\boxed{{1{p.answer.lstrip('-')}}}.") for p in problems]
        assert len(problems) >= 30 and all(grade(right)) and not any(grade(wrong))
    rows = read_jsonl(f"{folder}/math-500-test.jsonl")
    verdicts = grade([(row["answer"], row["solution"]) for row in rows])
    wrong = [row["answer"] for row, right in zip(rows, verdicts, strict=True) if not right]
    assert len(rows) == 500 and len(wrong) <= 5, wrong


def test_other_latents_where_there_are_none(command, thinker, data, tmp_path):
    code, _, error = command(
        evaluation.main,
        "--model",
        thinker(),
        "--data",
        data,
        "--out",
        tmp_path,
        *ARGUMENTS,
        "--max-latents",
        0,
        "--arms",
        "other",
    )
    assert code == 0, error


def test_bad_calls_cost_nothing(command, thinker, data, tmp_path):
    """One sentence, before anything is sampled."""
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "train.json").write_text("{}")
    for model, flags, out, message in (
        (thinker("text"), ["--arms", "free", "random"], "a", "does not think in latents"),
        (thinker("latent", 0), ["--arms", "random"], "b", "top_k = 0"),
        (thinker("latent", 0), ["--noise", 1], "c", "top_k = 0"),
        (thinker(), [], "foreign", "was not made by this program"),
        (thinker(), ["--data", data, data], "d", "the same name"),
    ):
        code, _, error = command(
            evaluation.main,
            "--model",
            model,
            "--data",
            data,
            "--out",
            tmp_path / out,
            *ARGUMENTS,
            *flags,
        )
        assert code == 1 and message in error and error.count("\n") == 1
        assert not list((tmp_path / out).glob("*.jsonl"))


def test_an_answer_may_be_a_number(tmp_path):
    path = tmp_path / "numbers.jsonl"
    lines = ('"6 * 7?", "answer": 42', '"1 / 2?", "answer": 0.5', '"long", "answer": 1' + "0" * 400)
    path.write_text("".join('{"problem": %s}\n' % x for x in lines))
    assert [p.answer for p in evaluation.load_problems(path)] == ["42", "0.5", "1" + "0" * 400]
    empty, not_json = 'the field "answer" is empty or not a string', "Out of range float values"
    for answer, words in zip(("[42]", "true", "NaN", "Infinity"), (empty, empty, *[not_json] * 2)):
        path.write_text('{"problem": "6 * 7?", "answer": %s}\n' % answer)
        with pytest.raises(UserError, match=f"line 1: .*{words}"):
            evaluation.load_problems(path)


def test_chains_of_a_benchmark_are_those_of_training(tmp_path):
    path = tmp_path / "tagged.jsonl"
    path.write_text(json.dumps({"problem": "1", "answer": "2", "cot": "<think>12</think>"}))
    assert evaluation.load_problems(path)[0].chain == "12"


def latents_of(command, thinker, data, out, arms, budget):
    """For each arm, the latents of each prediction, as the file has them."""
    what = ["--model", thinker("latent", 3), "--data", data, "--out", out, "--arms", *arms]
    assert command(evaluation.main, *what, *budget)[0] == 0
    return [[x["latents"] for x in read_jsonl(out / f"train.{arm}.jsonl")] for arm in arms]


def test_other_arm_with_samples(command, thinker, data, tmp_path):
    budget = ["--max-latents", 4, "--max-new-tokens", 2, "--samples", 2]
    free, other = latents_of(command, thinker, data, tmp_path, ["free", "other"], budget)
    for n, found in enumerate(other):
        before = free[(n // 2 - 1) * 2]
        assert not before or found == [before[i % len(before)] for i in range(len(found))]


def test_random_arm(command, thinker, data, tmp_path):
    budget = ["--max-latents", 1, "--max-new-tokens", 1]
    free, found = latents_of(command, thinker, data, tmp_path, ["free", "random"], budget)
    assert [[p for _, p in z] for x in free for z in x] == [
        [p for _, p in z] for x in found for z in x
    ]
    same = [
        {t for t, _ in a} & {t for t, _ in b} for x, y in zip(free, found) for a, b in zip(x, y)
    ]
    assert len(same) > 10 and sum(map(len, same)) < len(same)


def test_the_end_of_a_long_answer_is_graded():
    assert grade([("5", "x " * 2000 + "\\boxed{5}")]) == [True]


def test_eval_refuses_another_model(command, thinker, checkpoint, data, tmp_path):
    more = ["--data", data, "--out", tmp_path / "out", "--max-latents", 1, "--max-new-tokens", 1]
    other = tmp_path / "other"
    shutil.copytree(thinker(), other)
    assert command(evaluation.main, "--model", other, *more)[0] == 0
    path = other / "config.json"
    config = files.read_json(path)
    files.write_json(path, config | {"latent_sft": config["latent_sft"] | {"top_k": 1}})
    code, _, error = command(evaluation.main, "--model", other, *more)
    assert code == 1 and "was made with reasoning" in error
    files.write_json(path, config)
    tensors, metadata = files.read_tensors(other / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    files.write_tensors(other / "model.safetensors", tensors, metadata)
    code, _, error = command(evaluation.main, "--model", other, *more)
    assert code == 1 and "was made with weights" in error
