"""GSM8K: half the chain on a real model whose chains are in doubt.

    python -m experiments.gsm8k --model SmolLM2-135M-Instruct --data DIR --out runs/gsm8k

DIR holds gsm8k-train.jsonl (taken three times), gsm8k-sub-train.jsonl.gz (variants with new
numbers), gsm8k-valid.jsonl and the test files. Models are chosen on gsm8k-valid.
"""

import lib.errors  # noqa: F401  from here on an error is one line

import gzip
from itertools import islice
from pathlib import Path

from experiments.pipeline import PHASE1, PHASE2, SFT, Pipeline, TaskSettings
from lib.cli import parse
from lib.files import write_text
from lib.run import output_directory

TESTS = ("gsm8k-test", "svamp-test", "multiarith-test", "gsm-hard-test")
EVAL = dict(temperature=0, max_latents=64, max_new_tokens=160, batch_size=512)


def main():
    s = parse(TaskSettings, __doc__)
    with output_directory(s.out, s, command="gsm8k") as out:
        pipeline = Pipeline("gsm8k", out, s, EVAL)
        train = pipeline.copy("gsm8k-train.jsonl")
        more = gzip.open(Path(s.data) / "gsm8k-sub-train.jsonl.gz", "rt")
        variants = islice(more, 4 if s.smoke else None)
        write_text(train, 3 * train.read_text() + "".join(variants))
        valid, *tests = (pipeline.copy(f"{name}.jsonl") for name in ("gsm8k-valid", *TESTS))
        sft = SFT | {"model": s.model, "epochs": 0.93}
        phase1 = PHASE1 | {"epochs": (0.082, 0.035, 0.23)}
        phase2 = PHASE2 | {"epochs": 2.8, "keep": 2}
        pipeline.run(train, tests, sft, phase1, phase2, valid=valid)


if __name__ == "__main__":
    main()
