"""Users' mistakes: one clear sentence, exit code 1 or 2, no traceback, nothing half-written."""

import fcntl
import hashlib
import json
import shutil
import subprocess
import sys

import pytest
import torch

import cache_latents
import eval as evaluation
from experiments.pipeline import flags
from lib import files, run as run_module
import load_hf_weights
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
            assert error.splitlines()[-1].startswith("error: ") and error.count("error: ") == 1

    return check


def sft(model, data, out, *more):
    return [*flags(model=model, data=data, out=out, max_steps=1, batch_size=4), *more]


LINE = {"problem": "1+1", "cot": "2", "cot_answer": "\\boxed{2}"}


@pytest.mark.parametrize(
    "text,words",
    [
        (json.dumps(LINE) + '\n{"problem": \n', ["line 2", "cannot be read"]),
        (json.dumps(LINE) + "\n[1]\n", ["line 2", "not a JSON object"]),
        (json.dumps(LINE) + "\n" + "1" * 5000, ["line 2", "cannot be read"]),
        ("[" * 100_000, ["line 1", "cannot be read"]),
        (
            json.dumps(LINE) + "\n\n" + json.dumps({k: v for k, v in LINE.items() if k != "cot"}),
            ["line 3", "'cot' is missing"],
        ),
        (json.dumps(LINE | {"problem": "  "}), ["line 1", '"problem" is empty']),
        (json.dumps(LINE | {"cot_answer": 7}), ["line 1", '"cot_answer" is empty or not a string']),
        (json.dumps(LINE | {"cot": "<think></think>"}), ["no line has a chain"]),
        (json.dumps(LINE | {"cot": ""}), ["no line has a chain"]),
        (json.dumps(LINE | {"cot": " "}), ["no line has a chain"]),
        (json.dumps(LINE | {"cot": 2}), ["line 1", '"cot" is empty or not a string']),
        (json.dumps(LINE | {"cot": "<think>2</think>so 2"}), ["line 1", "in its middle"]),
        (json.dumps(LINE | {"cot": ["1", "2"]}), ["line 1", '"cot" is empty or not a string']),
        ("", ["the file is empty"]),
        ("\n \n", ["the file is empty"]),
        ("\udcff", ["cannot be read"]),
    ],
)
def test_bad_data(fails, checkpoint, tmp_path, text, words):
    bad, out = tmp_path / "bad.jsonl", tmp_path / "out"
    bad.write_text(text, errors="surrogateescape")
    fails(train_sft.main, sft(checkpoint(), bad, out), "bad.jsonl", *words)
    assert not out.exists()


def test_an_unfinished_run_is_no_base(command, fails, checkpoint, data, tmp_path):
    run = tmp_path / "run"
    assert command(train_phase1.main, *sft(checkpoint(), data, run), "--lora-rank", 2)[0] == 0
    (run / "finished.json").unlink()
    more = ["--data", data, "--out", tmp_path / "out"]
    for main in (train_phase1.main, train_sft.main):
        fails(main, ["--model", run, *more], "is not finished")
    fails(
        cache_latents.main, ["--phase1", run, *more], "run is not finished; start its command again"
    )
    fails(load_hf_weights.main, ["--model", run, "--out", tmp_path / "out"], "is not finished")
    fails(
        train_phase2.main,
        ["--phase1", run, "--cache", run, "--data", data, "--out", tmp_path / "out"],
        "is not finished",
    )
    assert not (tmp_path / "out").exists()


def test_half_a_config_or_tokenizer(fails, checkpoint, data, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint(), broken)
    config = json.loads((broken / "config.json").read_text())
    for change, words in (
        ({"vocab_size": "many"}, "'>' not supported"),
        ({"vocab_size": -1}, "vocab_size = -1"),
        ({"num_attention_heads": 0, "head_dim": None}, "zero"),
        ({"rms_norm_eps": 0}, "rms_norm_eps = 0"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "is missing"),
        ({"rope_parameters": ["default"]}, "cannot be read"),
        ({"dtype": "int8"}, "dtype = 'int8' is not supported"),
        ({"torch_dtype": "auto", "dtype": None}, "dtype = 'auto'"),
    ):
        (broken / "config.json").write_text(json.dumps(config | change))
        fails(train_sft.main, sft(broken, data, tmp_path / "out"), "config.json", words)
        assert not (tmp_path / "out").exists()
    (broken / "config.json").write_text(json.dumps(config))
    spec = json.loads((broken / "tokenizer.json").read_text())
    model = spec["model"]
    first, second, *_ = model["vocab"]
    for change in (
        {"model": {"type": "BPE", "vocab": {}}},
        {"model": model | {"merges": ["a"]}},
        {"model": model | {"merges": ["ab"]}},
        {"model": model | {"vocab": model["vocab"] | {first: model["vocab"][second]}}},
    ):
        (broken / "tokenizer.json").write_text(json.dumps(spec | change))
        fails(train_sft.main, sft(broken, data, tmp_path / "out"), "tokenizer.json: ")


def test_bad_gzip(fails, checkpoint, tmp_path):
    (tmp_path / "bad.jsonl.gz").write_bytes(b"\x1f\x8b no gzip")
    fails(
        train_sft.main,
        sft(checkpoint(), tmp_path / "bad.jsonl.gz", tmp_path / "out"),
        "bad.jsonl.gz",
        "cannot be read",
    )


def test_missing_files(fails, checkpoint, data, tmp_path):
    nowhere, empty = tmp_path / "nowhere", tmp_path / "empty"
    empty.mkdir()
    fails(
        train_sft.main,
        sft(checkpoint(), nowhere, tmp_path / "out"),
        "nowhere: cannot be read (No such file",
    )
    fails(
        train_sft.main,
        sft(nowhere, data, tmp_path / "out"),
        "nowhere/config.json: cannot be read (No such file",
    )
    fails(
        train_sft.main,
        sft(empty, data, tmp_path / "out"),
        "empty/config.json: cannot be read (No such file",
    )
    fails(
        evaluation.main,
        ["--model", checkpoint(), "--data", nowhere, "--out", tmp_path / "out"],
        "nowhere: cannot be read (No such file",
    )
    fails(
        sample.main,
        ["--model", empty, "--prompt", "1"],
        "empty/config.json: cannot be read (No such file",
    )
    fails(
        load_hf_weights.main,
        ["--model", nowhere, "--out", tmp_path / "out"],
        "nowhere/config.json: cannot be read (No such file",
    )
    fails(train_phase1.main, ["--data", data, "--out", tmp_path / "out"], "--model", code=2)
    fails(
        train_phase2.main,
        ["--phase1", checkpoint(), "--cache", empty, "--data", data, "--out", tmp_path / "out"],
        "is not a finished run of train_phase1.py",
    )
    fails(
        cache_latents.main,
        ["--phase1", checkpoint(), "--data", data, "--out", tmp_path / "out"],
        "is not a finished run of train_phase1.py",
    )
    fails(train_sft.main, sft(checkpoint(), tmp_path, tmp_path / "out"), "Is a directory")
    fails(train_sft.main, sft(checkpoint(), data, data / "below"), "Not a directory")
    fails(
        evaluation.main,
        ["--model", checkpoint(), "--data", data, "--out", data],
        "Not a directory",
    )
    fails(
        evaluation.main,
        ["--model", checkpoint(), "--data", data, data, "--out", tmp_path / "out"],
        "same name",
    )
    assert not (tmp_path / "out").exists()
    fails(
        train_phase1.main,
        [*sft(checkpoint(), data, tmp_path / "out"), "--top-k", 1000],
        "out of range",
    )


def test_unknown_architecture_and_truncated_weights(fails, checkpoint, data, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint(), broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    fails(train_sft.main, sft(broken, data, tmp_path / "out"), "model.safetensors: cannot be read")
    (broken / "config.json").write_text('{"model_type": "gpt2"}')
    fails(
        train_sft.main, sft(broken, data, tmp_path / "out"), "model_type = 'gpt2' is not supported"
    )
    (broken / "config.json").write_text('{"model_type": ')
    fails(train_sft.main, sft(broken, data, tmp_path / "out"), "config.json: cannot be read")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--compression", 0],
        ["--batch-size", 0],
        ["--row-tokens", 0],
        ["--lora-rank", 0],
        ["--warmup", 1.1],
        ["--top-k", -2],
        ["--compression", "two"],
        ["--steps", "all"],
        ["--lora-dropout", -1],
        ["--lora-dropout", 2],
        ["--seed", -1],
        ["--epochs", "inf"],
        ["--epochs", "1e999"],
        ["--epochs", "nan"],
    ],
)
def test_bad_values(command, fails, checkpoint, data, tmp_path, arguments):
    out = tmp_path / "out"
    fails(train_phase1.main, [*sft(checkpoint(), data, out), *arguments], code=2)
    assert command(train_phase1.main, *sft(checkpoint(), data, out))[0] == 0  # no obstacle


def test_a_step_twice(fails, checkpoint, data, tmp_path):
    arguments = [
        *sft(checkpoint(), data, tmp_path / "out"),
        "--steps",
        "encoder",
        "joint",
        "encoder",
    ]
    fails(train_phase1.main, arguments, "--steps: names a step twice")


def test_what_a_flag_takes_is_named(fails, thinker):
    start = ["--model", thinker(), "--prompt", "1"]
    for flag, value, words in (
        ("--top-p", 1.5, "invalid share (0 to 1) value: '1.5'"),
        ("--noise-temperature", 0, "invalid float (1e-06 or more) value: '0'"),
        ("--temperature", -1, "invalid float (0 or more) value: '-1'"),
    ):
        fails(sample.main, [*start, flag, value], flag, words, code=2)
    start = ["--model", 1, "--data", 1, "--out", 1, "--steps", "joints"]
    fails(train_phase1.main, start, "invalid choice: 'joints'", "decoder", code=2)


def test_closed_stdout():
    """A program without a standard output, like a daemon, starts."""
    line = f"{sys.executable} {ROOT / 'train_sft.py'} --help >&-"
    assert subprocess.run(line, shell=True, stderr=subprocess.DEVNULL).returncode == 0


def test_too_long_examples_are_counted(command, fails, checkpoint, data, tmp_path):
    code, printed, _ = command(
        train_sft.main, *sft(checkpoint(), data, tmp_path / "out", "--row-tokens", 60)
    )
    assert code == 0 and "skipped " in printed and "examples longer than --row-tokens 60" in printed
    fails(
        train_sft.main,
        sft(checkpoint(), data, tmp_path / "none", "--row-tokens", 3),
        f"--row-tokens 3: no example of {data} fits",
    )
    assert (
        command(train_sft.main, *sft(checkpoint(), data, tmp_path / "none"))[0] == 0
    )  # the failed start is no obstacle


def test_a_start_that_failed_is_no_obstacle(
    command, fails, checkpoint, data, tmp_path, monkeypatch
):
    """Settings count once there is a result that they describe."""
    out = tmp_path / "out"
    fails(train_phase1.main, [*sft(checkpoint(), data, out), "--shard"], "--shard", "torchrun")
    with monkeypatch.context() as m:
        m.setattr(train_sft.CoTSFT, "forward", lambda *a: (_ for _ in ()).throw(MemoryError))
        fails(train_sft.main, sft(checkpoint(), data, out), "out of memory", "--row-tokens")
    assert command(train_sft.main, *sft(checkpoint(), data, out, "--lr", 0.1))[0] == 0
    assert json.loads((out / "config.json").read_text())["lr"] == 0.1


def test_an_output_of_another_run(command, fails, checkpoint, data, tmp_path):
    out = tmp_path / "out"
    assert command(train_sft.main, *sft(checkpoint(), data, out))[0] == 0
    before = {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}
    fails(
        train_sft.main,
        sft(checkpoint(), data, out, "--lr", 0.5),
        "was made with lr = 2e-05, not 0.5",
    )
    fails(train_phase1.main, [*sft(checkpoint(), data, out)], 'was made with command = "train_sft"')
    fails(
        cache_latents.main,
        ["--model", out, "--data", data, "--out", out],
        'was made with command = "train_sft", not "cache_latents"',
    )
    assert before == {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    fails(
        train_sft.main, sft(checkpoint(), data, tmp_path / "full"), "was not made by this program"
    )
    fails(
        load_hf_weights.main,
        ["--model", checkpoint(), "--out", tmp_path / "full"],
        "was not made by this program",
    )
    assert [f.name for f in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    exported = tmp_path / "exported"
    assert command(load_hf_weights.main, "--model", out, "--out", exported)[0] == 0
    fails(
        train_sft.main,
        sft(checkpoint(), data, exported),
        'was made with command = null, not "train',
    )


def test_an_export_after_a_stopped_one(command, checkpoint, tmp_path):
    """Nothing of the first model stays in the directory."""
    start, out = tmp_path / "start", tmp_path / "out"
    shutil.copytree(checkpoint(), start)
    (start / "vocab.json").write_text("{}")
    assert command(load_hf_weights.main, "--model", start, "--out", out)[0] == 0
    (out / "config.json").unlink()
    assert command(load_hf_weights.main, "--model", checkpoint(), "--out", out)[0] == 0
    assert (start / "vocab.json").exists() and not (out / "vocab.json").exists()


def test_a_damaged_run(command, fails, checkpoint, data, tmp_path):
    """A run without its model, and an adapter that is not finite."""
    out = tmp_path / "out"
    assert command(train_sft.main, *sft(checkpoint(), data, out))[0] == 0
    shutil.rmtree(out / "model")
    fails(
        load_hf_weights.main,
        ["--model", out, "--out", tmp_path / "x"],
        "out/config.json: 'adapter'",
    )
    phase1 = tmp_path / "phase1"
    assert command(train_phase1.main, *sft(checkpoint(), data, phase1), "--lora-rank", 4)[0] == 0
    file = phase1 / "joint" / "decoder.safetensors"
    tensors, metadata = files.read_tensors(file)
    tensors["layers.0.self_attn.q_proj.lora_B"][0, 0] = float("nan")
    files.write_tensors(file, tensors, metadata)
    fails(load_hf_weights.main, ["--model", phase1, "--out", tmp_path / "y"], "lora_B is damaged")


def test_a_start_model_that_changed(command, fails, checkpoint, data, tmp_path):
    """Adapters belong to the weights that they learned on. An old run, without the hash, goes on."""
    start, out = tmp_path / "start", tmp_path / "out"
    shutil.copytree(checkpoint(), start)
    arguments = [*sft(start, data, out), "--lora-rank", 4]
    assert command(train_phase1.main, *arguments)[0] == 0
    weights, metadata = files.read_tensors(start / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    files.write_tensors(start / "model.safetensors", weights, metadata)
    fails(train_phase1.main, arguments, "was made with weights = ")
    config = files.read_json(out / "config.json")
    files.write_json(out / "config.json", {k: x for k, x in config.items() if k != "weights"})
    assert command(train_phase1.main, *arguments)[0] == 0


def test_hash_of_the_end(tmp_path):
    """Only the last bytes of a file count, and all of a file that is no longer."""
    long, short = tmp_path / "long", tmp_path / "short"
    long.write_bytes(b"abcdef")
    short.write_bytes(b"def")
    assert files.file_hash(long, last=3) == files.file_hash(short, last=4) == files.file_hash(short)
    assert files.file_hash(long) != files.file_hash(long, last=3)
    twice = hashlib.sha256(2 * hashlib.sha256(b"def").digest()).hexdigest()
    assert files.file_hash(short, long, last=3) == twice[:16]


@pytest.mark.parametrize("script,limit", [("train_sft.py", 60_000), ("train_phase1.py", 20_000)])
def test_full_disk(command, checkpoint, data, tmp_path, script, limit):
    """A disk that takes no file over `limit` bytes, from the second save on: one sentence, and the first save survives."""
    out = tmp_path / "out"
    arguments = sft(checkpoint(), data, out, "--max-steps", 4, "--save-every", 0)
    if script == "train_phase1.py":
        arguments = ["--steps", "encoder", *arguments, "--lora-rank", 4]
    program = f"""
import resource, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import trainer, {script[:-3]} as script
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
real = trainer.Trainer.save
def save(self):
    real(self)
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
trainer.Trainer.save = save
script.main()"""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (
        done.returncode == 1
        and len(errors) == 1
        and "cannot be written" in errors[0]
        and "Traceback" not in done.stderr
    ), done.stderr
    assert all(files.read_tensors(file)[0] for file in out.rglob("*.safetensors"))  # whole
    assert not list(out.rglob("*.tmp")) and list(out.rglob("resume.safetensors"))
    main = {"train_sft.py": train_sft.main, "train_phase1.py": train_phase1.main}[script]
    code, printed, _ = command(
        main, *arguments
    )  # room again: it goes on from the save that survived
    assert code == 0 and "steps 2 to 4" in printed


def test_two_at_work_on_one_run(command, fails, checkpoint, data, tmp_path):
    """A second process is turned away; what one left that was killed while it wrote goes."""
    out = tmp_path / "out"
    arguments = sft(checkpoint(), data, out, "--max-steps", 2)
    assert command(train_sft.main, *arguments)[0] == 0
    (out / "finished.json").unlink()  # as if it was not done
    with run_module.output_directory(out):
        fails(train_sft.main, arguments, "another process works on it")
    (out / ".resume.safetensors.123.tmp").write_text("half")
    assert command(train_sft.main, *arguments)[0] == 0
    assert not list(out.glob(".*.tmp"))


def test_awkward_data(command, fails, checkpoint, data, tmp_path):
    """Lines without a chain are skipped and counted. Half a character is an error."""
    mixed, bad = (tmp_path / f"{name}.jsonl" for name in ("mixed", "bad"))
    mixed.write_text(json.dumps(LINE | {"cot": ""}) + "\n" + json.dumps(LINE) + "\n")
    code, printed, _ = command(train_sft.main, *sft(checkpoint(), mixed, tmp_path / "out"))
    assert code == 0 and printed.count("skipped 1 examples without a chain") == 1
    bad.write_text(json.dumps(LINE | {"problem": "\ud83d"}))
    fails(
        evaluation.main,
        ["--model", checkpoint(), "--data", bad, "--out", tmp_path / "no"],
        "line 1",
        "surrogates",
    )
    bad.write_text(json.dumps(LINE | {"cot": ["1", "\ud83d"]}))
    fails(train_sft.main, sft(checkpoint(), bad, tmp_path / "no"), "line 1", "surrogates")
    bad.write_text(json.dumps(LINE | {"problem": "\ud83d\ude00"}))  # a whole one
    assert command(train_sft.main, *sft(checkpoint(), bad, tmp_path / "whole"))[0] == 0
    spaces = json.dumps(LINE | {"problem": " " * 10**6 + "1"})  # made tiktoken's own split panic
    bad.write_text(spaces + "\n" + json.dumps(LINE))
    code, printed, _ = command(train_sft.main, *sft(checkpoint(), bad, tmp_path / "spaces"))
    assert code == 0 and "skipped 1 examples longer than --row-tokens" in printed
    assert not (tmp_path / "no").exists()


def test_from_the_shell(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "sample.py", "--model", tmp_path, "--prompt", "1"],
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 1
        and done.stderr
        == f"error: {tmp_path}/config.json: cannot be read (No such file or directory)\n"
    )


@pytest.mark.parametrize(
    "script",
    [train_sft, train_phase1, train_phase2, cache_latents, sample, evaluation, load_hf_weights],
)
def test_help(command, script):
    code, printed, _ = command(script.main, "--help")
    assert code == 0 and printed.count("--") >= 3 and "usage: " in printed


def test_a_step_that_is_no_number(command, checkpoint, data, tmp_path):
    """Ends the run before anything of the step is saved."""
    out = tmp_path / "out"
    more = flags(max_steps=9, lr="1e30", save_every=0)
    code, _, error = command(train_sft.main, *sft(checkpoint(), data, out, *more))
    last = error.strip().splitlines()[-1]
    assert (
        code == 1
        and last.startswith("error: ")
        and "nan" in last
        and "smaller --lr" in last
        and "Traceback" not in error
    )
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert (
        f"at step {len(steps) + 1} " in last
        and steps == list(range(1, len(steps) + 1))
        and not (out / "finished.json").exists()
    )


def test_the_lock_comes_before_all_writing(command, fails, checkpoint, data, tmp_path):
    """A start that finds the directory locked leaves the other start's settings as they are."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_text("theirs")
    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fails(train_sft.main, sft(checkpoint(), data, out), "another process works on it")
        assert sorted(f.name for f in out.iterdir()) == [".lock", "config.json"]
        assert (out / "config.json").read_text() == "theirs"


def test_export_through_a_link(command, checkpoint, tmp_path):
    """The link stays a link, and nothing lies beside it."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    code, _, error = command(
        load_hf_weights.main, "--model", checkpoint(), "--out", tmp_path / "link"
    )
    assert code == 0, error
    assert sorted(f.name for f in tmp_path.iterdir()) == ["disk", "link"]
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "config.json").exists()


def test_equal_contents_give_equal_bytes(tmp_path):
    """Also of the metadata, whose order safetensors does not keep."""
    tensors = {name: torch.ones(2) for name in "abc"}
    for i in range(8):
        files.write_tensors(tmp_path / f"{i}.safetensors", tensors, {"rank": 4, "alpha": 8.0})
    assert len({(tmp_path / f"{i}.safetensors").read_bytes() for i in range(8)}) == 1


def test_a_chat_tokenizer_without_its_end(fails, checkpoint, data, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint(), broken)
    spec = json.loads((broken / "tokenizer.json").read_text())
    spec["added_tokens"] = [
        t | {"content": "<|im_start|>"} if t["content"] == "<|endoftext|>" else t
        for t in spec["added_tokens"]
    ]
    (broken / "tokenizer.json").write_text(json.dumps(spec))
    (broken / "generation_config.json").unlink()  # it names the end by its id
    words = "tokenizer.json", "'<|im_end|>' is missing"
    fails(train_sft.main, sft(broken, data, tmp_path / "out"), *words)


def test_a_reader_keeps_the_old_file(tmp_path):
    files.write_text(tmp_path / "x", "old")
    with open(tmp_path / "x") as reader:
        files.write_text(tmp_path / "x", "new")
        assert reader.read() == "old" and (tmp_path / "x").read_text() == "new"
