"""Multiplication: half the chain where every chain is a function of its problem (arXiv 2405.14838).

    python -m experiments.multiplication --model SmolLM2-135M-Instruct --data DIR --out runs/mult

DIR holds the published multiplication-4x4-test.jsonl (and 5x5). Digits are reversed. The chain is
the partial products, and in brackets the running sum after each except the first and the last.
Training data is generated, without the test problems. Writes OUT/results.json.
"""

import lib.errors  # noqa: F401  from here on an error is one line

from dataclasses import dataclass
import json
from pathlib import Path
import random

from experiments.pipeline import ARMS, BOTH, Pipeline, TaskSettings
from lib.cli import parse
from lib.files import read_jsonl, write_text
from lib.run import output_directory

EVAL = dict(temperature=0, max_latents=128, max_new_tokens=160, batch_size=512)


@dataclass(frozen=True, kw_only=True)
class Settings(TaskSettings):
    digits: int = 4  # of each factor
    problems: int = 131072  # to train on


def line(a, b, n):
    """The line of JSONL for two numbers of n digits."""
    text, total, steps = str(a)[::-1].ljust(n, "0"), 0, []
    for i, digit in enumerate(str(b).zfill(n)[::-1]):
        product = a * int(digit) * 10**i
        total += product
        steps.append(str(product).zfill(n + i + 1)[::-1])
        if 0 < i < n - 1:
            steps[-1] += f"({str(total).zfill(n + i + 1)[::-1]})"
    answer = str(total).zfill(2 * n)[::-1]
    problem = f"{text}*{str(b)[::-1].ljust(n, '0')}"
    box = f"\\boxed{{{answer}}}"
    return {"problem": problem, "cot": "+".join(steps), "cot_answer": box, "answer": answer}


def write_train(path, tests, s):
    rng, n, lines = random.Random(s.seed), s.digits, {}
    known = {row["problem"] for row in read_jsonl(tests)}
    while len(lines) < (16 if s.smoke else s.problems):
        row = line(*(rng.randrange(10 ** (n - 1), 10**n) for _ in range(2)), n)
        if row["problem"] not in known:
            lines[row["problem"]] = json.dumps(row) + "\n"
    write_text(path, "".join(lines.values()))


def main():
    s = parse(Settings, __doc__)
    name = f"multiplication-{s.digits}x{s.digits}"
    with output_directory(s.out, s, command=name) as out:
        run = Pipeline(name, out, s)
        tests = [out / f"{name}-test.jsonl"]
        lines = (Path(s.data) / tests[0].name).read_text().splitlines(True)
        write_text(tests[0], "".join(lines[: 4 if s.smoke else None]))
        if not (out / "train.jsonl").exists():
            write_train(out / "train.jsonl", Path(s.data) / tests[0].name, s)
        files = {"data": out / "train.jsonl"}
        cot = run.baselines(dict(BOTH, model=s.model, max_steps=500, **files), tests, EVAL)
        for r in s.rates:
            phase1 = dict(BOTH, compression=r, warmup=0.1, max_steps=(100, 100, 1000), w_segment=1)
            phase2 = dict(BOTH, all_weights=True, scheduled_sampling=0.5, keep=3, max_steps=4000)
            latent = run.latent(f"latent-r{r}", cot, phase1, phase2, **files)
            for kept in sorted(latent.glob("step-*")):
                run.rows(f"Latent r = {r}, {kept.name}", kept, tests, **EVAL)
            run.rows(f"Latent r = {r}", latent, tests, ARMS, **EVAL)


if __name__ == "__main__":
    main()
