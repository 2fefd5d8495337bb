"""GSM8K: half the chain on a real model whose chains are in doubt.

    python -m experiments.gsm8k --model SmolLM2-135M-Instruct --data DIR --out runs/gsm8k

DIR holds gsm8k-train.jsonl, gsm8k-sub-train.jsonl.gz (optional), gsm8k-valid.jsonl and the test
files. Trains answer-only, CoT-SFT, and Latent with r = 2 and 4. Of each Latent run the model that
is right most often on gsm8k-valid is tested. Writes OUT/results.json.
"""

import lib.errors  # noqa: F401  from here on an error is one line

from dataclasses import dataclass
import gzip
from pathlib import Path

from experiments.pipeline import ARMS, BOTH, Pipeline, TaskSettings
from lib.cli import parse
from lib.files import write_text
from lib.run import output_directory

TESTS = ("gsm8k-test", "svamp-test", "multiarith-test", "gsm-hard-test")
EVAL = dict(temperature=0, max_latents=64, max_new_tokens=160, batch_size=512)


@dataclass(frozen=True, kw_only=True)
class Settings(TaskSettings):
    minutes: float = 14.0  # scales the epochs: about the minutes of one H100


def lines_of(path, limit):
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        return [line for line in file if line.strip()][:limit]


def main():
    s = parse(Settings, __doc__)
    limit, source, scale = 4 if s.smoke else None, Path(s.data), s.minutes / 60
    names = TESTS[:1] if s.smoke else TESTS
    with output_directory(s.out, s, command="gsm8k") as out:
        run = Pipeline("gsm8k", out, s)
        more = source / "gsm8k-sub-train.jsonl.gz"
        lines = 3 * lines_of(source / "gsm8k-train.jsonl", limit)
        lines += lines_of(more, limit) if more.exists() else []
        write_text(out / "train.jsonl", "".join(lines))
        for name in ("gsm8k-valid", *names):
            write_text(out / f"{name}.jsonl", "".join(lines_of(source / f"{name}.jsonl", limit)))
        valid, tests = out / "gsm8k-valid.jsonl", [out / f"{name}.jsonl" for name in names]
        files = {"data": out / "train.jsonl"}
        sft = dict(BOTH, model=s.model, epochs=4 * scale, **files)
        cot = run.baselines(sft, tests, EVAL)
        epochs = [x * scale for x in (0.35, 0.15, 1.0)]
        phase1 = dict(BOTH, warmup=0.1, w_segment=1, epochs=epochs)
        phase2 = dict(BOTH, all_weights=True, scheduled_sampling=0.5, keep=2, epochs=12 * scale)
        for r in s.rates:
            phase1["compression"] = r
            latent = run.latent(f"latent-r{r}", cot, phase1, phase2, **files)
            best = run.best(latent, valid, **EVAL)
            run.rows(f"Latent r = {r}", best, tests, ARMS, **EVAL)


if __name__ == "__main__":
    main()
