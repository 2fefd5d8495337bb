"""Runs the project's scripts one after another. A stopped pipeline goes on where it was."""

from functools import partial
from itertools import product
import json
from pathlib import Path
import signal
import subprocess
import sys
import time
from typing import Literal

import torch

from lib.cli import Count, Share, settings
from lib.files import read_json, read_jsonl, write_json, write_text

SFT = dict(lr=5e-4, batch_size=128, row_tokens=17408)  # all trainings of SmolLM2-135M
PHASE1 = SFT | dict(warmup=0.1, w_segment=1)
PHASE2 = SFT | dict(all_weights=True, scheduled_sampling=0.5)
ARMS = ("free", "random", "other", "argmax", "cut-4")
KINDS = {"latent": "Latent", "paper": "Latent (paper's losses)", "mux": "MUX"}
Trainings = tuple[Literal["answer-only", *KINDS], ...]
PAPER = {"w_segment": 0}, {"scheduled_sampling": 0}  # phase 1 and 2 without the additions
ROOT = Path(__file__).resolve().parent.parent


@settings
class RunSettings:
    out: str  # directory of everything that is made
    rates: tuple[Count, ...] = (2,)  # compression rates
    train: Trainings = ("answer-only", "latent", "mux")  # besides CoT-SFT
    rho: Share = 0.5  # of mux, the one-stage baseline: its --multiplex
    seed: int = 1  # of every random choice
    device: str = ""  # cpu, cuda or cuda:N; default: a GPU if there is one
    smoke: bool = False  # two steps of everything, to see that it runs


@settings
class TaskSettings(RunSettings):
    model: str  # checkpoint directory to start from
    data: str  # directory of the data files


def distinct(count, make, known=()):
    """`count` lines of make(): a dictionary for each problem, none of them in `known`."""
    lines = {}
    while len(lines) < count:
        line = make()
        if line["problem"] not in known:
            lines[line["problem"]] = line
    return lines


def write_jsonl(path, lines):
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def flags(**more):
    """--key value ... for a command line. True is a flag alone."""
    found = []
    for key, value in more.items():
        found.append("--" + key.replace("_", "-"))
        if value is not True:
            found += map(str, value if isinstance(value, list | tuple) else [value])
    return found


class Pipeline:
    """One seed of one task in the directory `out`. `evaluation`: settings of eval.py."""

    def __init__(self, task, out, s, evaluation):
        self.task, self.out = task, out
        self.s = s
        smaller = {"max_latents": 4, "max_new_tokens": 4} if s.smoke else {}
        self.evaluation = evaluation | smaller
        self.path = out / "results.json"
        known = json.loads(self.path.read_text()) if self.path.exists() else []
        self.results = {(row["row"], row["test"]): row for row in known}
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the script that runs, too

    def stage(self, script, name, **more):
        """Runs a script that writes out/name, or goes on with what is there. Returns the path."""
        print(f"\n{time.strftime('%H:%M:%S')} {name}: {script}", flush=True)
        words = flags(out=self.out / name, device=self.s.device, **more)
        if subprocess.run([sys.executable, ROOT / script, *words]).returncode:
            sys.exit(1)
        return self.out / name

    def train(self, script, name, **more):
        more |= {"max_steps": 2, "batch_size": 4} if self.s.smoke else {}
        return self.stage(script, name, seed=self.s.seed, **more)

    def generate(self, make, count, *published):
        """OUT/train.jsonl: `count` lines of make(), none of the files `published` of --data."""
        known = {line["problem"] for x in published for line in read_jsonl(f"{self.s.data}/{x}")}
        path = self.out / "train.jsonl"
        count = 16 if self.s.smoke else count
        write_jsonl(path, distinct(count, make, known).values())
        return path

    def copy(self, name):
        """The file `name` of --data, in `out`. Smoke mode takes four lines of it."""
        lines = [*open(f"{self.s.data}/{name}")]
        path = self.out / name
        write_text(path, "".join(lines[: 4 if self.s.smoke else None]).rstrip() + "\n")
        return path

    def run(self, data, tests, sft, phase1, phase2, arms=ARMS, valid=None):
        """Trains and tests everything. `data` is the training file.

        Of the students along a run the best one on the file `valid` is tested; without it, all are.
        """
        cot = self.train("train_sft.py", "cot", data=data, **sft)
        self.rows("CoT-SFT", cot, tests)
        if "answer-only" in self.s.train:
            direct = self.train("train_sft.py", "answer-only", data=data, no_chain=True, **sft)
            self.rows("answer-only", direct, tests)
        for r, kind in product(self.s.rates, filter(KINDS.get, self.s.train)):
            name = f"{kind}-r{r}"
            row = f"{KINDS[kind]} r = {r}"
            files = {"data": data}
            less1, less2 = PAPER if kind == "paper" else ({}, {})
            if kind == "mux":
                files["model"], how = cot, {"multiplex": self.s.rho, "compression": r}
            else:
                start = phase1 | less1 | files | {"model": cot, "compression": r}
                files["phase1"] = self.train("train_phase1.py", f"{name}-phase1", **start)
                how = {}
            cache = self.stage("cache_latents.py", f"{name}-cache", **files, **how)
            student = self.train("train_phase2.py", name, cache=cache, **files, **(phase2 | less2))
            kept = sorted(student.glob("step-*"), key=lambda x: int(x.name[5:]))
            if valid:
                student = max([student, *kept], key=partial(self.accuracy, valid))
            for model in () if valid else kept:
                self.rows(f"{row}, {model.name}", model, tests[:1])
            self.rows(row, student, tests, arms)

    def evaluate(self, run, tests, arms=("free",)):
        """{"<file>.<arm>": summary} of a run."""
        name = f"eval-{run.relative_to(self.out)}-{tests[0].stem}".replace("/", "-")
        more = self.evaluation | {"model": run, "data": tests, "arms": arms}
        return read_json(self.stage("eval.py", name, **more) / "summary.json")

    def accuracy(self, test, run):
        return self.evaluate(run, [test])[f"{test.stem}.free"]["accuracy"]

    def rows(self, name, run, tests, arms=("free",)):
        """Evaluates a run and adds its rows to out/results.json. CoT-SFT's come first.

        share: of the chain written in the test file, or else of CoT-SFT's.
        """
        of_run = run if run.parent == self.out else run.parent  # a kept model lies in its run
        phase1 = of_run.with_name(f"{of_run.name}-phase1").glob("*/finished.json")
        last, *others = (read_json(part) for part in (run / "finished.json", *phase1))
        on_gpu = torch.cuda.is_available() and self.s.device != "cpu"
        made = {
            "seed": self.s.seed,
            "steps": last["steps"],
            "loss": round(last["loss"], 4),
            "gpu": torch.cuda.get_device_name() if on_gpu else "CPU",
            "minutes": round(sum(x["seconds"] for x in (last, *others)) / 60, 1),
            "command": f"python -m experiments.{Path(sys.argv[0]).stem} {' '.join(sys.argv[1:])}",
        }
        for key, x in self.evaluate(run, tests, arms).items():
            test, arm = key.rsplit(".", 1)
            row = {"task": self.task, "row": name if arm == "free" else f"{name}, {arm}"}
            self.results[row["row"], test] = row
            row |= {"test": test, "chain_length": round(x["chain_length"], 2)}
            row |= {k: round(x[k], 1) for k in ("accuracy", "interval")} | made
            in_file = x["chain_length"] * x.get("compression", 0)
            written = in_file or self.results["CoT-SFT", test]["chain_length"] or 1
            row["share"] = round(x["chain_length"] / written, 2)
        write_json(self.path, [*self.results.values()])
