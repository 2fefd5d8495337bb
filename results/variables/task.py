"""A made-up task whose chains have more than one right order: `g=6;a=5;b=d+a;d=a+e;e=2;b?` asks for b, and the chain computes what is
needed, a step for each variable, in a random order that works: `d5+2=7;b7+5=2;`, modulo 10.

    python results/variables/task.py OUT             # from the repository's root: OUT/base, a small random model, and OUT/*.jsonl
    python results/variables/task.py OUT lengths     # odd digits are written twice
    python results/variables/task.py OUT few         # OUT/few: 4,000 problems of OUT/train.jsonl, 20,000 other ones of it, and 4,000 new ones to test
"""

import json
from pathlib import Path
import random
import re
import sys

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import demo  # noqa: E402
from runs import write_text  # noqa: E402


def make_problem(rng: random.Random) -> tuple[str, str, dict, dict]:
    """(text, the variable asked for, values, {variable: (left, operator, right)} of those that are computed)."""
    names, value, steps, text = rng.sample("abcdefgh", rng.randint(4, 5)), {}, {}, {}
    given = rng.randint(2, 3)
    for i, v in enumerate(names):
        if i < given:
            value[v] = rng.randrange(10)
            text[v] = f"{v}={value[v]}"
        else:
            (x, y), operator = rng.sample(names[:i], 2), rng.choice("+-")
            value[v] = (value[x] + value[y] if operator == "+" else value[x] - value[y]) % 10
            steps[v], text[v] = (x, operator, y), f"{v}={x}{operator}{y}"
    order = list(text)
    rng.shuffle(order)
    return ";".join(text[v] for v in order) + f";{names[-1]}?", names[-1], value, steps


def make_example(rng: random.Random) -> dict:
    needed = set()
    while len(needed) < 2:
        problem, asked, value, steps = make_problem(rng)
        needed, unseen = set(), [asked]
        while unseen:
            v = unseen.pop()
            if v in steps and v not in needed:
                needed.add(v)
                unseen += [steps[v][0], steps[v][2]]
    chain, known = "", value.keys() - steps.keys()
    while needed:
        v = rng.choice(sorted(v for v in needed if {steps[v][0], steps[v][2]} <= known))
        x, operator, y = steps[v]
        chain += f"{v}{value[x]}{operator}{value[y]}={value[v]};"
        known |= {v}
        needed.remove(v)
    return {"problem": problem, "cot": chain, "cot_answer": f"\\boxed{{{value[asked]}}}", "answer": str(value[asked])}


def with_lengths(row: dict) -> dict:
    """The same problem where a number has one character or two, which does not help to reason."""
    twice = lambda text: re.sub(r"[13579]", r"\g<0>\g<0>", text)
    return row | {"problem": twice(row["problem"]), "cot": twice(row["cot"])}


def write_few(out: Path) -> None:
    lines, rng, test = (out / "train.jsonl").read_text().splitlines(keepends=True), random.Random(99), []
    seen = {json.loads(line)["problem"] for line in lines}
    while len(test) < 4000:
        if (row := make_example(rng))["problem"] not in seen:
            test.append(json.dumps(row) + "\n")
    for name, part in (("train", lines[:4000]), ("fresh", lines[4000:24000]), ("test", test)):
        write_text(out / "few" / f"{name}.jsonl", "".join(part))


def main():
    if sys.argv[2:] == ["few"]:
        return write_few(Path(sys.argv[1]))
    out, rng, lengths = Path(sys.argv[1]), random.Random(1), sys.argv[2:] == ["lengths"]
    demo.CONFIG |= {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
    for name, count in (("train", 60000), ("valid", 300), ("test", 500)):
        rows = [with_lengths(row) if lengths else row for row in (make_example(rng) for _ in range(count))]
        write_text(out / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    demo.write_model(out / "base", 1)


if __name__ == "__main__":
    main()
