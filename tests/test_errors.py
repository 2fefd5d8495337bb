"""Users' mistakes: one clear sentence, exit code 1 or 2, no traceback, nothing half-written."""

import json
import shutil
import subprocess
import sys

import pytest

import cache_latents
import eval as evaluation
import load_hf_weights
import runs
import sample
import train_phase1
import train_phase2
import train_sft
from test_training import ROOT


@pytest.fixture
def fails(command):
    """fails(main, arguments, words...): the command ends with one sentence on stderr that holds all the words."""
    def check(main, arguments, *words, code=1):
        got, _, error = command(main, *arguments)
        assert got == code and "Traceback" not in error
        assert all(w in error for w in words), error
        if code == 1:
            assert error.startswith("error: ") and error.count("\n") == 1
    return check


def sft(model, data, out, *more):
    return ["--model", model, "--data", data, "--out", out, "--max-steps", 1, "--batch-size", 4, *more]


LINE = {"problem": "1+1", "cot": "2", "cot_answer": "\\boxed{2}"}


@pytest.mark.parametrize("text,words", [
    (json.dumps(LINE) + "\n{\"problem\": \n", ["line 2", "broken JSON"]),
    (json.dumps(LINE) + "\n[1]\n", ["line 2", "not a JSON object"]), (json.dumps(LINE) + "\n" + "1" * 5000, ["line 2", "broken JSON"]),
    ("[" * 100_000, ["line 1", "broken JSON"]),
    (json.dumps(LINE) + "\n\n" + json.dumps({k: v for k, v in LINE.items() if k != "cot"}), ["line 3", '"cot" is missing']),
    (json.dumps(LINE | {"problem": "  "}), ["line 1", '"problem" is empty']),
    (json.dumps(LINE | {"cot_answer": 7}), ["line 1", '"cot_answer" is not a string']),
    (json.dumps(LINE | {"cot": "<think></think>"}), ["line 1", "no chain"]),
    (json.dumps(LINE | {"cot": "<think>2</think>so 2"}), ["line 1", "in the midst of its chain"]),
    (json.dumps(LINE | {"cot": ["1", "2"]}), ["line 1", '"cot" is not a string']),
    ("", ["the file is empty"]), ("\n \n", ["the file is empty"]), ("\udcff", ["cannot be read"])])
def test_bad_data(fails, checkpoint, tmp_path, text, words):
    bad, out = tmp_path / "bad.jsonl", tmp_path / "out"
    bad.write_text(text, errors="surrogateescape")
    fails(train_sft.main, sft(checkpoint(), bad, out), "bad.jsonl", *words)
    assert not out.exists()


def test_an_unfinished_run_is_no_base(command, fails, checkpoint, data, tmp_path):
    run = tmp_path / "run"
    assert command(train_phase1.main, "--step", "encoder", *sft(checkpoint(), data, run), "--lora-rank", 2)[0] == 0
    (run / "finished.json").unlink()
    for main, step in ((train_phase1.main, ["--step", "encoder"]), (train_sft.main, [])):
        fails(main, [*step, "--model", run, "--data", data, "--out", tmp_path / "out"], "is not finished")
    fails(train_phase1.main, ["--step", "decoder", "--init", run, "--data", data, "--out", tmp_path / "out"], "is not finished")
    fails(cache_latents.main, ["--phase1", run, "--data", data, "--out", tmp_path / "out"], "is not finished")


def test_half_a_config_or_tokenizer(fails, checkpoint, data, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint(), broken)
    config = json.loads((broken / "config.json").read_text())
    for change, words in (({"vocab_size": "many"}, "vocab_size is 'many'"), ({"vocab_size": -1}, "vocab_size is -1"),
                          ({"num_attention_heads": 0, "head_dim": None}, "zero"), ({"rms_norm_eps": None}, "rms_norm_eps is None"),
                          ({"rope_parameters": {"rope_type": "llama3"}}, "is missing"), ({"rope_parameters": ["default"]}, "is not supported"),
                          ({"dtype": "int8"}, "dtype = 'int8' is not supported"), ({"torch_dtype": "auto"}, "torch_dtype = 'auto'")):
        (broken / "config.json").write_text(json.dumps(config | change))
        fails(train_sft.main, sft(broken, data, tmp_path / "out"), "config.json", words)
        assert not (tmp_path / "out").exists()
    (broken / "config.json").write_text(json.dumps(config))
    spec = json.loads((broken / "tokenizer.json").read_text())
    model = spec["model"]
    first, second, *_ = model["vocab"]
    for change in ({"model": {"type": "BPE", "vocab": {}}}, {"model": model | {"merges": ["a"]}},
                   {"model": model | {"vocab": model["vocab"] | {first: model["vocab"][second]}}}):
        (broken / "tokenizer.json").write_text(json.dumps(spec | change))
        fails(train_sft.main, sft(broken, data, tmp_path / "out"), "tokenizer.json: is not a whole tokenizer file")


def test_bad_gzip(fails, checkpoint, tmp_path):
    (tmp_path / "bad.jsonl.gz").write_bytes(b"\x1f\x8b no gzip")
    fails(train_sft.main, sft(checkpoint(), tmp_path / "bad.jsonl.gz", tmp_path / "out"), "bad.jsonl.gz", "cannot be read")


def test_missing_files(fails, checkpoint, data, tmp_path):
    nowhere, empty = tmp_path / "nowhere", tmp_path / "empty"
    empty.mkdir()
    fails(train_sft.main, sft(checkpoint(), nowhere, tmp_path / "out"), "nowhere: no such file")
    fails(train_sft.main, sft(nowhere, data, tmp_path / "out"), "nowhere/config.json: no such file")
    fails(train_sft.main, sft(empty, data, tmp_path / "out"), "empty/config.json: no such file")
    fails(evaluation.main, ["--model", checkpoint(), "--data", nowhere, "--out", tmp_path / "out"], "nowhere: no such file")
    fails(sample.main, ["--model", empty, "--prompt", "1"], "empty/config.json: no such file")
    fails(sample.main, ["--model", checkpoint(), "--prompt", " "], "--prompt", "empty")
    fails(load_hf_weights.main, ["--model", nowhere, "--out", tmp_path / "out"], "nowhere/config.json: no such file")
    fails(train_phase1.main, ["--step", "encoder", "--data", data, "--out", tmp_path / "out"], "--model")
    fails(train_phase1.main, ["--step", "joint", "--model", checkpoint(), "--data", data, "--out", tmp_path / "out"], "--init")
    fails(train_phase2.main, ["--phase1", checkpoint(), "--cache", empty, "--data", data, "--out", tmp_path / "out"], "is no run of train_phase1.py")
    fails(cache_latents.main, ["--phase1", checkpoint(), "--data", data, "--out", tmp_path / "out"], "is no run of train_phase1.py")
    fails(train_sft.main, sft(checkpoint(), tmp_path, tmp_path / "out"), "is not a file")
    fails(train_sft.main, sft(checkpoint(), data, data / "below"), "cannot be written")
    fails(evaluation.main, ["--model", checkpoint(), "--data", data, "--out", data], "cannot be written")
    fails(evaluation.main, ["--model", checkpoint(), "--data", data, data, "--out", tmp_path / "out"], "same name")
    fails(train_phase1.main, ["--step", "encoder", *sft(checkpoint(), data, tmp_path / "out"), "--top-k", 1000], "--top-k 1000", "272")
    assert not (tmp_path / "out").exists()


def test_unknown_architecture_and_truncated_weights(fails, checkpoint, data, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint(), broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    fails(train_sft.main, sft(broken, data, tmp_path / "out"), "model.safetensors: not a whole safetensors file")
    (broken / "config.json").write_text('{"model_type": "gpt2"}')
    fails(train_sft.main, sft(broken, data, tmp_path / "out"), "architecture 'gpt2' is not supported")
    (broken / "config.json").write_text('{"model_type": ')
    fails(train_sft.main, sft(broken, data, tmp_path / "out"), "config.json: cannot be read as JSON")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--compression", 0], ["--top-k", -2], ["--compression", "two"], ["--step", "all"], ["--batch-size", 0],
                                       ["--lora-dropout", 1.5], ["--warmup", 100], ["--seed", -1], ["--epochs", 0], ["--epochs", "inf"]])
def test_bad_numbers(fails, checkpoint, data, tmp_path, arguments):
    fails(train_phase1.main, ["--step", "encoder", *sft(checkpoint(), data, tmp_path / "out"), *arguments], arguments[0], code=2)
    assert not (tmp_path / "out").exists()


def test_too_long_examples_are_counted(command, fails, checkpoint, data, tmp_path):
    code, printed, _ = command(train_sft.main, *sft(checkpoint(), data, tmp_path / "out", "--row-tokens", 60))
    assert code == 0 and "skipped " in printed and "of 40 examples, longer than --row-tokens 60" in printed
    fails(train_sft.main, sft(checkpoint(), data, tmp_path / "none", "--row-tokens", 3), "no example fits into --row-tokens 3")
    assert command(train_sft.main, *sft(checkpoint(), data, tmp_path / "none"))[0] == 0  # the failed start left nothing behind


def test_an_output_of_another_run(command, fails, checkpoint, data, tmp_path):
    out = tmp_path / "out"
    assert command(train_sft.main, *sft(checkpoint(), data, out))[0] == 0
    before = {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}
    fails(train_sft.main, sft(checkpoint(), data, out, "--lr", 0.5), "belongs to another run (lr is 2e-05 there, 0.5 here)")
    fails(train_phase1.main, ["--step", "encoder", *sft(checkpoint(), data, out)], "belongs to another run")
    assert before == {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    fails(train_sft.main, sft(checkpoint(), data, tmp_path / "full"), "no run directory")
    fails(load_hf_weights.main, ["--model", checkpoint(), "--out", tmp_path / "full"], "not empty")
    assert [f.name for f in (tmp_path / "full").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("script,limit", [("train_sft.py", 60_000), ("train_phase1.py", 20_000)])
def test_full_disk(command, checkpoint, data, tmp_path, script, limit):
    """A disk that takes no file over `limit` bytes, from the second save on: one sentence, and the first save survives."""
    out = tmp_path / "out"
    arguments = sft(checkpoint(), data, out, "--max-steps", 4, "--save-every", 2)
    if script == "train_phase1.py":
        arguments = ["--step", "encoder", *arguments, "--lora-rank", 4]
    program = f"""
import resource, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import trainer, {script[:-3]} as script
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
real, saves = trainer._save_state, []
def save_state(*a):
    real(*a)
    saves.append(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
trainer._save_state = save_state
script.run_main(script.main)"""
    done = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(errors) == 1 and "cannot be written" in errors[0] and "Traceback" not in done.stderr, done.stderr
    assert all(runs.read_tensors(file)[0] for file in out.rglob("*.safetensors"))  # whole
    assert not list(out.rglob("*.tmp")) and (out / "resume.safetensors").exists()
    main = {"train_sft.py": train_sft.main, "train_phase1.py": train_phase1.main}[script]
    code, printed, _ = command(main, *arguments)  # room again: it goes on from the save that survived
    assert code == 0 and "going on at step 2" in printed


def test_two_at_work_on_one_run(command, fails, checkpoint, data, tmp_path):
    """A second process is turned away; what one left that was killed while it wrote goes."""
    out = tmp_path / "out"
    arguments = sft(checkpoint(), data, out, "--max-steps", 2)
    assert command(train_sft.main, *arguments)[0] == 0
    (out / "finished.json").unlink()  # as if it was not done
    with runs.hold(out):
        fails(train_sft.main, arguments, "another process is at work")
    (out / ".resume.safetensors.123.tmp").write_text("half")
    assert command(train_sft.main, *arguments)[0] == 0
    assert not list(out.glob(".*.tmp"))


def test_awkward_data(command, fails, checkpoint, data, tmp_path):
    """Benchmarks have problems without a chain: no obstacle to a validation. Half a character is told, and a file that would overwrite."""
    valid, bad, settings = (tmp_path / f"{name}.jsonl" for name in ("valid", "bad", "settings"))
    valid.write_text(json.dumps(LINE | {"cot": ""}) + "\n" + json.dumps(LINE) + "\n")
    assert command(train_sft.main, *sft(checkpoint(), data, tmp_path / "out", "--valid", valid))[0] == 0
    fails(train_sft.main, sft(checkpoint(), valid, tmp_path / "no"), "line 1", '"cot" is empty')
    valid.write_text(json.dumps(LINE | {"cot": ""}))
    fails(train_sft.main, sft(checkpoint(), data, tmp_path / "no", "--valid", valid), "no line has a chain")
    bad.write_text(json.dumps(LINE | {"problem": "\ud83d"}))
    fails(evaluation.main, ["--model", checkpoint(), "--data", bad, "--out", tmp_path / "no"], "line 1", "lone surrogate")
    bad.write_text(json.dumps(LINE | {"cot": ["1", "\ud83d"]}))
    fails(train_sft.main, sft(checkpoint(), bad, tmp_path / "no"), "line 1", "lone surrogate")
    bad.write_text(json.dumps(LINE | {"problem": "\ud83d\ude00"}))  # a whole one
    assert command(train_sft.main, *sft(checkpoint(), bad, tmp_path / "whole"))[0] == 0
    settings.write_text(data.read_text())
    fails(evaluation.main, ["--model", checkpoint(), "--data", settings, "--out", tmp_path / "no"], "rename the file")
    assert not (tmp_path / "no").exists()


def test_from_the_shell(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "sample.py", "--model", tmp_path, "--prompt", "1"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == f"error: {tmp_path}/config.json: no such file; is {tmp_path} the right directory?\n"


@pytest.mark.parametrize("script", [train_sft, train_phase1, train_phase2, cache_latents, sample, evaluation, load_hf_weights])
def test_help(command, script):
    code, printed, _ = command(script.main, "--help")
    assert code == 0 and "default" in printed and printed.count("--") >= 3


def test_a_step_that_is_no_number(command, checkpoint, data, tmp_path):
    """Ends the run before anything of the step is saved."""
    out = tmp_path / "out"
    code, _, error = command(train_sft.main, "--model", checkpoint(), "--data", data, "--out", out, "--batch-size", 4, "--max-steps", 9,
                             "--lr", "1e30", "--save-every", 1)
    last = error.strip().splitlines()[-1]
    assert code == 1 and last.startswith("error: ") and "nan" in last and "smaller --lr" in last and "Traceback" not in error
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert f"at step {len(steps) + 1} " in last and steps == list(range(1, len(steps) + 1)) and not (out / "finished.json").exists()
