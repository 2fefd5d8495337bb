"""ProsQA: does a latent hold several branches of the search? From the predictions of eval.py.

    python -m experiments.branches --model runs/prosqa/latent-r4 --data prosqa-test.jsonl \\
        --predictions runs/prosqa/eval-latent-r4-prosqa-test/prosqa-test.free.jsonl

Takes the latents at which the written chain names a class. Prints how much of the five largest
probabilities lies on (the first token of) this class, on the other children of the class reached so
far, and on all other classes. Means over problems, for each sentence of the chain.
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
    tokenizer, found = Tokenizer(base), defaultdict(list)
    pairs = zip(read_jsonl(s.data), read_jsonl(s.predictions), strict=True)
    for row, latents in [(row, line["latents"]) for row, line in pairs]:
        edges = [(a, first(tokenizer, b)) for a, b in re.findall(IS_A, row["problem"])]
        for sentence, match in enumerate(re.finditer(IS_A, row["cot"]), 1):
            before = tokenizer.encode(row["cot"][: match.start(2) - 1])
            right, classes = {first(tokenizer, match[2])}, {b for _, b in edges}
            children = {b for a, b in edges if a == match[1]}
            for latent in latents[len(before) // reasoning.compression :][:1]:
                groups, mass = (right, children - right, classes - children), dict(latent)
                found[sentence].append([sum(mass.get(x, 0) for x in group) for group in groups])
    for sentence, masses in found.items():
        print(f"sentence {sentence}, {len(masses)} problems: {np.mean(masses, axis=0).round(3)}")


if __name__ == "__main__":
    main()
