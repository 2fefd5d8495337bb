"""Runs the project's scripts one after another. A stopped pipeline goes on where it was."""

from dataclasses import dataclass
import json
from pathlib import Path
import signal
import subprocess
import sys
import time

import torch

from lib.files import read_json, write_json
from lib.run import output_directory

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    model: str  # checkpoint directory to start from
    data: str  # directory of the data files
    out: str  # directory of everything that is made
    seed: int = 1  # of every random choice
    device: str = ""  # cpu, cuda or cuda:N; default: a GPU if there is one
    smoke: bool = False  # two steps of everything on a few lines, to see that it runs


def call(script, **settings):
    """Runs a script with --key value flags; ends this program if it fails. Passes signals on."""
    flags = []
    for key, value in settings.items():
        if value is not False:
            many = value if isinstance(value, (list, tuple)) else [value]
            flags += ["--" + key.replace("_", "-"), *([] if value is True else map(str, many))]
    process = subprocess.Popen([sys.executable, str(ROOT / script), *flags])
    old = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        code = process.wait()
    except KeyboardInterrupt:  # the script got it too, and saves its state
        process.wait()
        raise
    signal.signal(signal.SIGTERM, old)
    if code:
        sys.exit(1)


class Pipeline:
    """One seed of one task in the directory `out`."""

    def __init__(self, task, out, seed, device, smoke=False):
        self.task, self.out, self.seed, self.smoke = task, out, seed, smoke
        self.device, self.begin = {"device": device} if device else {}, time.time()

    def stage(self, script, name, done="finished.json", **settings) -> Path:
        """Runs a script that writes out/name, unless it is done. Returns the path."""
        path = self.out / name
        if not (path / done).exists():
            print(f"\n[{time.time() - self.begin:4.0f} s] {name}: {script}", flush=True)
            call(script, out=path, **settings, **self.device)
        return path

    def train(self, script, name, **settings) -> Path:
        settings |= {"max_steps": 2, "batch_size": 4} if self.smoke else {}
        return self.stage(script, name, seed=self.seed, **settings)

    def latent(self, name, cot, phase1, phase2, **data) -> Path:
        """Phase 1, the latent cache and phase 2 from the CoT-SFT model `cot`."""
        one = self.train("train_phase1.py", f"{name}-phase1", model=cot, **phase1, **data)
        made_from = {"phase1": one, "data": data["data"]}
        cache = self.stage("cache_latents.py", f"{name}-cache", "cache.json", **made_from)
        return self.train("train_phase2.py", name, phase1=one, cache=cache, **phase2, **data)

    def evaluate(self, run, tests, arms=("free",), **settings) -> dict:
        """{"<file>.<arm>": summary} of a run."""
        settings |= {"max_latents": 4, "max_new_tokens": 4} if self.smoke else {}
        name = f"eval-{run.relative_to(self.out)}-{tests[0].stem}".replace("/", "-")
        settings |= {"model": run, "data": tests, "arms": arms}
        path = self.stage("eval.py", name, "summary.json", **settings)
        return read_json(path / "summary.json")

    def best(self, run, valid, **settings) -> Path:
        """The model along the run that is right most often on the file `valid`."""
        models = [run, *sorted(run.glob("step-*"))]
        found = [self.evaluate(m, [valid], **settings)[f"{valid.stem}.free"] for m in models]
        return max(zip(models, found), key=lambda x: x[1]["accuracy"])[0]

    def rows(self, name, run, tests, arms=("free",), **settings) -> None:
        """Evaluates a run and adds its rows to out/results.json."""
        parts = [run, run.with_name(f"{run.name}-phase1") / "joint"]
        finished = [read_json(p / "finished.json") for p in parts if (p / "finished.json").exists()]
        path, gpu = self.out / "results.json", "CPU"
        if torch.cuda.is_available() and self.device != {"device": "cpu"}:
            gpu = torch.cuda.get_device_name()
        made = {"seed": self.seed, "steps": finished[0]["steps"], "gpu": gpu}
        made["minutes"] = round(sum(x["seconds"] for x in finished) / 60, 1)
        made["command"] = f"python -m experiments.{self.task} {' '.join(sys.argv[1:])}"
        rows = json.loads(path.read_text()) if path.exists() else []
        for key, x in self.evaluate(run, tests, arms, **settings).items():
            test, arm = key.rsplit(".", 1)
            row = {"task": self.task, "row": name if arm == "free" else f"{name}, {arm}"}
            row |= {"test": test, "accuracy": round(x["accuracy"], 1)}
            row |= {"interval": round(x["interval"], 1), "chain_length": x["chain_length"]}
            written = [
                r["chain_length"] for r in rows if (r["row"], r["test"]) == ("CoT-SFT", test)
            ]
            whole = x.get("compression", 0) * x["chain_length"] or (written or [0])[0]
            row |= {"share": round(x["chain_length"] / whole, 2) if whole else 0.0} | made
            rows = [r for r in rows if (r["row"], r["test"]) != (row["row"], test)] + [row]
        write_json(path, rows)


def begin(s: TaskSettings, task):
    """The locked output directory of a task, and its pipeline."""
    directory = output_directory(s.out, s, command=task)
    return directory, Pipeline(task, Path(s.out), s.seed, s.device, s.smoke)
