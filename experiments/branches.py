"""ProsQA: does a latent hold several branches of the search? From the predictions of eval.py.

    python -m experiments.branches --model runs/prosqa/latent-r4 --data prosqa-test.jsonl \\
        --predictions runs/prosqa/eval-latent-r4-prosqa-test/prosqa-test.free.jsonl

Takes the latents at which the written chain names a class. Prints how much of the five largest
probabilities lies on (the first token of) this class, and on the other children of the class
reached so far; and in how many problems both are over 0.05. Means, for each sentence of the chain.
"""

import lib.errors  # noqa: F401  from here on an error is one line

from collections import defaultdict
import re

import numpy as np

from lib.cli import parse, settings
from lib.files import read_jsonl
from lib.tokenizer import Tokenizer
from load_hf_weights import resolve

IS_A = r"(\w+) is a (\w+)\."


def first(tokenizer, name):
    """The first token of a class, as text."""
    return tokenizer.decode(tokenizer.encode(f" {name}")[:1])


@settings
class Settings:
    model: str  # the run that was evaluated
    data: str  # the benchmark file, with chains
    predictions: str  # of the arm "free"


def main():
    s = parse(Settings, __doc__)
    base, _, reasoning = resolve(s.model)
    tokenizer = Tokenizer(base)
    found = defaultdict(list)
    for line, made in zip(read_jsonl(s.data), read_jsonl(s.predictions), strict=True):
        edges = [(a, first(tokenizer, b)) for a, b in re.findall(IS_A, line["problem"])]
        for sentence, match in enumerate(re.finditer(IS_A, line["cot"]), 1):
            before = tokenizer.encode(line["cot"][: match.start(2) - 1])
            right = first(tokenizer, match[2])
            others = {child for parent, child in edges if parent == match[1]} - {right}
            for latent in made["latents"][len(before) // reasoning.compression :][:1]:
                mass = dict(latent)
                masses = mass.get(right, 0), sum(mass.get(x, 0) for x in others)
                found[sentence].append([*masses, min(masses) > 0.05])
    for sentence, values in found.items():
        print(f"sentence {sentence}, {len(values)} problems: {np.mean(values, axis=0).round(3)}")


if __name__ == "__main__":
    main()
