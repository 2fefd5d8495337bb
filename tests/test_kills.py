"""Every command is killed at its file operations and started again: nothing is lost, nothing stays.

This file is also the program that a test starts, once per command: it forks a process for each kill.
"""

import hashlib
import json
import os
from pathlib import Path
import signal
import subprocess
import sys

import pytest

ROOT = Path(__file__).resolve().parent.parent
POINTS = 3  # kills per command, spread over its file operations
VOLATILE = {"seconds", "seconds_per_problem", "tokens_per_s", "out"}
WRITES = os.O_WRONLY | os.O_RDWR


def digest(out):
    """{file: its contents} of a directory, without times and without the path of the directory."""
    found = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file() and p.name != ".lock"):
        if path.suffix in (".json", ".jsonl") and "tokenizer" not in path.name:
            texts = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            lines = [json.loads(x) for x in texts]
            for line in lines:
                for name, value in list(line.items()):
                    if name in VOLATILE:
                        del line[name]
                    elif isinstance(value, dict):
                        line[name] = {k: v for k, v in value.items() if k not in VOLATILE}
            found[str(path.relative_to(out))] = lines
        else:
            found[str(path.relative_to(out))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def run_child(main, arguments, out, kill_at, counted):
    """Runs a command in a fork. At its file operation number `kill_at` on `out` it kills itself."""
    import torch

    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    torch.set_num_threads(1)
    log = os.open(counted.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    count = 0

    def hook(event, args):
        nonlocal count
        writes = event in ("os.rename", "os.remove", "os.mkdir")
        writes = writes or event == "open" and isinstance(args[2], int) and args[2] & WRITES
        if writes and str(args[0]).startswith(str(out)):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    sys.argv = ["script", *arguments, "--out", str(out)]
    code = 0
    try:
        main()
    except BaseException as e:
        sys.excepthook(type(e), e, e.__traceback__)
        code = 1
    counted.write_text(str(count))
    os._exit(code)


def program(name, work, arguments):
    """Compares what each killed and repeated run leaves with what the unbroken run left."""
    sys.path.insert(0, str(ROOT))
    main, counted = __import__(name).main, work / "count"
    whole = work / "whole"
    assert run_child(main, arguments, whole, 0, counted) == 0, counted.with_suffix(
        ".log"
    ).read_text()
    expected, operations = digest(whole), int(counted.read_text())
    points = sorted({1 + i * (operations - 1) // (POINTS - 1) for i in range(POINTS)})
    for point in points:
        out = work / f"killed-{point}"
        assert run_child(main, arguments, out, point, counted) == -signal.SIGKILL
        code, log = run_child(main, arguments, out, 0, counted), counted.with_suffix(".log")
        assert code == 0 or "holds a model already" in log.read_text(), log.read_text()
        found = digest(out)
        assert found == expected, (
            point,
            {k for k in found | expected if found.get(k) != expected.get(k)},
        )
    print(f"{name}: {operations} file operations, killed at {points}")


@pytest.fixture(scope="module")
def arguments(checkpoint, thinker, data, tmp_path_factory):
    """{command: its arguments without --out}. What one command needs, another made."""
    work = tmp_path_factory.mktemp("kills")
    short = work / "short.jsonl"
    short.write_text("".join(data.read_text().splitlines(True)[:6]))
    common = ["--data", short, "--device", "cpu"]
    training = ["--max-steps", 3, "--batch-size", 4, "--save-every", 0, *common]
    adapters = [*training, "--lora-rank", 4]
    sampling = ["--max-latents", 3, "--max-new-tokens", 4, "--temperature", 0]
    made = {
        "train_sft": ["--model", checkpoint(), *training, "--keep", 1],
        "train_phase1": ["--model", checkpoint(), *adapters],
        "cache_latents": ["--phase1", work / "train_phase1", *common],
        "train_phase2": [
            "--phase1",
            work / "train_phase1",
            "--cache",
            work / "cache_latents",
            *adapters,
        ],
        "eval": ["--model", thinker(), "--arms", "free", "random", *sampling, *common],
        "load_hf_weights": ["--model", checkpoint()],
    }
    for name in ("train_phase1", "cache_latents"):
        command = [sys.executable, ROOT / f"{name}.py", *made[name], "--out", work / name]
        subprocess.run([*map(str, command)], check=True, capture_output=True)
    return made


NAMES = "train_sft train_phase1 cache_latents train_phase2 eval load_hf_weights".split()


@pytest.mark.parametrize("name", NAMES)
def test_killed_and_started_again(name, arguments, tmp_path):
    command = [sys.executable, __file__, name, tmp_path, *arguments[name]]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)


if __name__ == "__main__":
    program(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
