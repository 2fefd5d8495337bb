"""ProsQA (arXiv 2412.06769): finding the chain is a search, so a latent can hold branches.

    python -m experiments.prosqa --model SmolLM2-135M-Instruct --data DIR --out runs/prosqa

DIR holds prosqa-test.jsonl and prosqa-valid.jsonl. Training problems are generated alike.
"""

import lib.errors  # noqa: F401  from here on an error is one line

from functools import partial
import random

from experiments.pipeline import PHASE1, PHASE2, SFT, Pipeline, TaskSettings
from lib.cli import parse
from lib.run import output_directory

EVAL = dict(temperature=0, max_latents=96, max_new_tokens=160, batch_size=512)
PEOPLE = "Alex Bob Carol Davis Eva Fae Gabriel Jack Max Oliver Polly Rex Sally Sam Stella Tom Wren"
CLASSES = """
bompus boompus brimpus chorpus dumpus felpus fompus gerpus gorpus grimpus gwompus hilpus impus
jelpus jompus kerpus lempus lorpus numpus quimpus rempus rompus rorpus scrompus shumpus sterpus
storpus terpus timpus tumpus vumpus worpus wumpus yerpus yimpus yumpus zhorpus zumpus
"""
PROBLEMS = 17886  # to train on, as many as were published
PARENTS = {0: 0.05, 1: 0.28, 2: 0.33, 3: 0.22, 4: 0.08, 5: 0.04}  # draws; one may come twice
LENGTHS = {3: 0.40, 4: 0.43, 5: 0.14, 6: 0.02}  # of a chain, in sentences
WRONG = {1: 0.21, 2: 0.53, 3: 0.26}  # how far the wrong class is from the other person


def draw(rng, chances):
    return rng.choices([*chances], [*chances.values()])[0]


def make_graph(rng):
    """The parents of each node, and {node: shortest path} of what descends from each of the two
    people, nodes 0 and 1."""
    parents = [set(), set()]
    depth = [0, 0]
    paths = [{0: [0]}, {1: [1]}]
    for node in range(2, round(rng.triangular(14, 28, 26))):
        banned = [*paths, {}][draw(rng, {0: 0.35, 1: 0.35, 2: 0.3})]
        allowed = [n for n in range(node) if n not in banned]
        weights = [1 + 1.5 * depth[n] for n in allowed]
        chosen = {*rng.choices(allowed, weights, k=draw(rng, PARENTS))}
        parents.append(chosen)
        depth.append(min((depth[n] + 1 for n in chosen), default=0))
        for known in paths:
            if found := [known[n] for n in chosen if n in known]:
                known[node] = [*min(found, key=len), node]
    return parents, paths


def make_example(rng):
    """One line of JSONL. Person 0 is asked about; a class that only person 1 reaches is wrong."""
    far = draw(rng, LENGTHS)
    near = draw(rng, WRONG)
    right, wrong = [], []
    while not (right and wrong):
        parents, (mine, others) = make_graph(rng)
        right = [path for n, path in mine.items() if len(path) == far + 1 and n not in others]
        wrong = [n for n, path in others.items() if len(path) == near + 1 and n not in mine]
    people, classes = (rng.sample(x, len(x)) for x in (PEOPLE.split(), CLASSES.split()))
    names = [(classes if some else people).pop() for some in parents]

    def sentence(parent, node):
        return f"{'Every ' if parents[parent] else ''}{names[parent]} is a {names[node]}."

    facts = [sentence(parent, n) for n, some in enumerate(parents) for parent in some]
    path = rng.choice(right)
    asked = rng.sample([names[path[-1]], names[rng.choice(wrong)]], 2)
    question = f"Is {names[0]} a {asked[0]} or {asked[1]}?"
    return {
        "problem": " ".join([*rng.sample(facts, len(facts)), question]),
        "cot": " ".join(map(sentence, path, path[1:])),
        "cot_answer": f"\\boxed{{{names[path[-1]]}}}",
    }


def main():
    s = parse(TaskSettings, __doc__)
    with output_directory(s.out, s, command="prosqa") as out:
        pipeline = Pipeline("prosqa", out, s, EVAL)
        valid, test = (pipeline.copy(f"prosqa-{name}.jsonl") for name in ("valid", "test"))
        make = partial(make_example, random.Random(s.seed))
        train = pipeline.generate(make, PROBLEMS, valid.name, test.name)
        sft = SFT | {"model": s.model, "max_steps": 700}
        phase1 = PHASE1 | {"max_steps": (50, 50, 400)}
        phase2 = PHASE2 | {"max_steps": 700, "keep": 2}
        pipeline.run(train, [test], sft, phase1, phase2, valid=valid)


if __name__ == "__main__":
    main()
