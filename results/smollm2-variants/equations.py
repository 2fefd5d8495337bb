"""What the first three latents say, a piece of the first equation each, and whether it is right; from first_latents.jsonl.gz: for each
problem of gsm8k-test these latents of Latent-pieces (their five likeliest tokens), the chain that CoT-SFT of the same seed wrote, and
whether each answered right.

    python results/smollm2-variants/equations.py

The anchor gives the tokens of a piece the weights 1, 1/2, 1/4 ... (as shares). A latent is read as the row of up to five of its tokens,
the first of them and no other an operator or <<, whose weights come closest to its own (sum of absolute differences).
"""

from collections import defaultdict
import gzip
from itertools import product
import json
import math
from pathlib import Path
import re

HEADS = ("<<", "+", "-", "*", "/", "=")
EQUATION = re.compile(r"\s*<<([\d.]+)([-+*/])([\d.]+)=([\d.]+)>>")


def read(latent: list) -> str:
    found, best = "", math.inf
    for n in range(1, 6):
        for tokens in product([token for token, _ in latent], repeat=n):
            if tokens[0].strip() not in HEADS or any(token.strip() in HEADS for token in tokens[1:]):
                continue
            weights = defaultdict(float)
            for i, token in enumerate(tokens):
                weights[token] += 0.5 ** i / (2 - 0.5 ** (n - 1))
            distance = sum(abs(weights.get(token, 0) - p) for token, p in latent)
            if distance < best:
                found, best = "".join(tokens), distance
    return found


def right(equation) -> bool:
    a, operator, b, c = equation.groups()
    try:
        return abs(eval(f"{float(a)} {operator} {float(b)}") - float(c)) < 0.01
    except (ValueError, ZeroDivisionError):
        return False


problems = [json.loads(line) for line in gzip.open(Path(__file__).with_name("first_latents.jsonl.gz"), "rt", encoding="utf-8")]
for problem in problems:
    problem["entropy"] = sum(-p * math.log(p) for latent in problem["latents"] for _, p in latent if p) / len(problem["latents"])
    problem["read"], problem["written"] = EQUATION.match("".join(map(read, problem["latents"]))), EQUATION.match(problem["chain"])
    a, b = problem["read"], problem["written"]
    problem["same"] = bool(a and b and a.groups()[:3] == b.groups()[:3])
for seed in (1, 2):
    part = sorted((p for p in problems if p["seed"] == seed), key=lambda p: p["entropy"])
    print(f"seed {seed}, in sixths: entropy up to; read as an equation; that one right; the written one right; same operands; Latent; CoT-SFT, %")
    for i in range(6):
        sixth = part[len(part) * i // 6:len(part) * (i + 1) // 6]
        share = lambda some, of: 100 * sum(map(bool, some)) / len(of)
        reads, writes = ([p[key] for p in sixth if p[key]] for key in ("read", "written"))
        print(f"  {sixth[-1]['entropy']:.2f} {share(reads, sixth):5.0f} {share(map(right, reads), reads):5.0f} {share(map(right, writes), writes):5.0f}"
              f" {share((p['same'] for p in sixth), sixth):5.0f} {share((p['right'] for p in sixth), sixth):5.0f}"
              f" {share((p['chain_right'] for p in sixth), sixth):5.0f}")
