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

BOTH = dict(lr=5e-4, batch_size=128, row_tokens=17408)  # of all trainings of SmolLM2-135M
ARMS = ("free", "random", "other", "argmax", "cut-4")
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    out: str = "demo"  # directory of everything that is made
    rates: tuple[int, ...] = (2,)  # compression rates
    seed: int = 1  # of every random choice
    device: str = ""  # cpu, cuda or cuda:N; default: a GPU if there is one
    smoke: bool = False  # two steps of everything on a few lines, to see that it runs


@dataclass(frozen=True, kw_only=True)
class TaskSettings(RunSettings):
    model: str  # checkpoint directory to start from
    data: str  # directory of the data files


def flags(**settings):
    """--key value ... for a command line. True is a flag alone, False is none."""
    found = []
    for key, value in settings.items():
        if value is not False:
            many = value if isinstance(value, list | tuple) else [value]
            found += ["--" + key.replace("_", "-"), *([] if value is True else map(str, many))]
    return found


def call(script, **settings):
    """Runs a script. If the script or this program fails, both end."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if subprocess.run([sys.executable, str(ROOT / script), *flags(**settings)]).returncode:
        sys.exit(1)


class Pipeline:
    """One seed of one task in the directory `out`."""

    def __init__(self, task, out, s):
        self.task, self.out, self.s, self.begin = task, out, s, time.time()

    def stage(self, script, name, **settings) -> Path:
        """Runs a script that writes out/name, or goes on with what is there. Returns the path."""
        print(f"\n[{time.time() - self.begin:4.0f} s] {name}: {script}", flush=True)
        call(script, out=self.out / name, device=self.s.device, **settings)
        return self.out / name

    def train(self, script, name, **settings) -> Path:
        settings |= {"max_steps": 2, "batch_size": 4} if self.s.smoke else {}
        return self.stage(script, name, seed=self.s.seed, **settings)

    def latent(self, name, cot, phase1, phase2, **data) -> Path:
        """Phase 1, the latent cache and phase 2 from the CoT-SFT model `cot`."""
        one = self.train("train_phase1.py", f"{name}-phase1", model=cot, **phase1, **data)
        cache = self.stage("cache_latents.py", f"{name}-cache", phase1=one, data=data["data"])
        return self.train("train_phase2.py", name, phase1=one, cache=cache, **phase2, **data)

    def baselines(self, sft, tests, evaluation) -> Path:
        """CoT-SFT and answer-only with their rows. Returns the CoT-SFT run."""
        cot = self.train("train_sft.py", "cot", **sft)
        self.rows("CoT-SFT", cot, tests, **evaluation)
        direct = self.train("train_sft.py", "answer-only", no_chain=True, **sft)
        self.rows("answer-only", direct, tests, **evaluation)
        return cot

    def evaluate(self, run, tests, arms=("free",), **settings) -> dict:
        """{"<file>.<arm>": summary} of a run."""
        settings |= {"max_latents": 4, "max_new_tokens": 4} if self.s.smoke else {}
        name = f"eval-{run.relative_to(self.out)}-{tests[0].stem}".replace("/", "-")
        settings |= {"model": run, "data": tests, "arms": arms}
        return read_json(self.stage("eval.py", name, **settings) / "summary.json")

    def best(self, run, valid, **settings) -> Path:
        """The model along the run that is right most often on the file `valid`."""
        models = [run, *sorted(run.glob("step-*"))]
        found = [self.evaluate(m, [valid], **settings)[f"{valid.stem}.free"] for m in models]
        return max(zip(models, found), key=lambda x: x[1]["accuracy"])[0]

    def rows(self, name, run, tests, arms=("free",), **settings) -> None:
        """Evaluates a run and adds its rows to out/results.json. The first ones are CoT-SFT's."""
        parts = [run / "finished.json", run.with_name(f"{run.name}-phase1") / "joint/finished.json"]
        finished = [read_json(part) for part in parts if part.exists()]
        on_gpu = torch.cuda.is_available() and self.s.device != "cpu"
        made = {
            "seed": self.s.seed,
            "steps": finished[0]["steps"],
            "gpu": torch.cuda.get_device_name() if on_gpu else "CPU",
            "minutes": round(sum(x["seconds"] for x in finished) / 60, 1),
            "command": f"python -m experiments.{Path(sys.argv[0]).stem} {' '.join(sys.argv[1:])}",
        }
        path = self.out / "results.json"
        rows = (
            {(r["row"], r["test"]): r for r in json.loads(path.read_text())}
            if path.exists()
            else {}
        )
        for key, x in self.evaluate(run, tests, arms, **settings).items():
            test, arm = key.rsplit(".", 1)
            row = {"task": self.task, "row": name if arm == "free" else f"{name}, {arm}"}
            row |= {"test": test, **{k: round(x[k], 1) for k in ("accuracy", "interval")}}
            row["chain_length"] = x["chain_length"]
            rows[row["row"], test] = row
            written = rows.get(("CoT-SFT", test), row)["chain_length"]
            row |= {"share": round(x["chain_length"] / written, 2) if written else 0.0} | made
        write_json(path, [*rows.values()])
