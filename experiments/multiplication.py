"""Multiplication: half the chain where every chain is a function of its problem (arXiv 2405.14838).

    python -m experiments.multiplication --model SmolLM2-135M-Instruct --data DIR --out runs/mult

DIR holds the published multiplication-4x4-test.jsonl (and 5x5). Digits are reversed. The chain is
the partial products, and in brackets the running sum after each except the first and the last.
Training data is generated, without the test problems. Writes OUT/results.json.
"""

import lib.errors  # noqa: F401  from here on an error is one line

from functools import partial
import random

from experiments.pipeline import PHASE1, PHASE2, SFT, Pipeline, TaskSettings
from lib.cli import number, parse, settings
from lib.run import output_directory

EVAL = dict(temperature=0, max_latents=128, max_new_tokens=160, batch_size=512)


@settings
class Settings(TaskSettings):
    digits: number(int, 3) = 4  # of each factor
    problems: int = 131072  # to train on
    steps: int = 6000  # of phase 2


def random_line(rng, n):
    return line(*(rng.randrange(10 ** (n - 1), 10**n) for _ in range(2)), n)


def line(a, b, n):
    """The line of JSONL for two numbers of n digits."""
    total = 0
    steps = []
    for i, digit in enumerate(str(b)[::-1]):
        product = a * int(digit) * 10**i
        total += product
        steps.append(str(product).zfill(n + i + 1)[::-1])
        if 0 < i < n - 1:
            steps[-1] += f"({str(total).zfill(n + i + 1)[::-1]})"
    answer = str(total).zfill(2 * n)[::-1]
    return {
        "problem": f"{str(a)[::-1]}*{str(b)[::-1]}",
        "cot": "+".join(steps),
        "cot_answer": f"\\boxed{{{answer}}}",
        "answer": answer,
    }


def main():
    s = parse(Settings, __doc__)
    name = f"multiplication-{s.digits}x{s.digits}"
    with output_directory(s.out, s, command=name) as out:
        pipeline = Pipeline(name, out, s, EVAL)
        test = pipeline.copy(f"{name}-test.jsonl")
        make = partial(random_line, random.Random(s.seed), s.digits)
        train = pipeline.generate(make, s.problems, test.name)
        sft = SFT | {"model": s.model, "max_steps": 500}
        # with 5 digits and w_segment 1, two of four phase 1 trainings left latents out of order
        phase1 = PHASE1 | {"w_segment": 1 if s.digits < 5 else 4, "max_steps": (100, 100, 2000)}
        phase2 = PHASE2 | {"max_steps": s.steps, "keep": 3}
        pipeline.run(train, [test], sft, phase1, phase2)


if __name__ == "__main__":
    main()
