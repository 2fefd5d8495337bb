"""Benchmark files to accuracy, chain length and time; and what the latents are good for.

    python eval.py --model runs/latent --data gsm8k-test.jsonl svamp-test.jsonl --out runs/eval
    python eval.py --model runs/latent --data aime-2024-test.jsonl --out runs/aime --samples 16
    python eval.py --model runs/latent --data gsm8k-test.jsonl --out runs/arms --arms random cut-4

Reads {"problem", "answer"} lines, or training lines, whose answer is the box in "cot_answer".
Appends each prediction to OUT/<file>.<arm>.jsonl as it is made, and skips what is there. Writes
OUT/summary.json, of this command's files and arms. Under torchrun, ranks share the problems.

Arms:
    free     thinks and answers as the model likes
    forced   thinks, then gives only what follows "\\boxed{"
    floor    the same without thinking
    random   each latent has random tokens with its probabilities
    other    each latent is the previous problem's at the same place; too few of them repeat
    argmax   each latent is its most likely token
    cut-M    at most M latents
"""

import lib.errors  # noqa: F401  from here on an error is one line

from dataclasses import replace
import gc
import json
from pathlib import Path
import re
import time
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data import text_field, written_chain
from lib.cli import Count, parse, settings
from lib.errors import UserError
from lib.files import read_jsonl, reading, write_json, write_text
from lib.grader import boxed, grade
from lib.run import barrier, from_rank0, join, output_directory
from load_hf_weights import fingerprint, load_model
from sample import Sampler, SamplingParams

ARMS = r"free|forced|floor|random|other|argmax|cut-\d{1,6}"
MEANS = "correct chain_length written_length answer_tokens finished seconds".split()


@settings
class Settings(SamplingParams):
    data: tuple[str, ...]  # benchmark files
    out: str  # directory of predictions and summaries
    arms: tuple[str, ...] = ("free",)  # what to compare: see above
    samples: Count = 1  # answers to each problem, for pass@k
    batch_size: Count = 64  # sequences side by side


class Problem(NamedTuple):
    text: str
    answer: str
    chain: str  # the written one, empty where the file has none


def load_problems(path):
    """The problems of a file. Raises UserError with file and line."""
    problems = []
    for line in read_jsonl(path):
        with reading(line["_place"]):
            name, answer = "answer", line.get("answer")
            if "answer" not in line:
                name, answer = "box in cot_answer", boxed(text_field(line, "cot_answer"))
            answer = str(answer) if type(answer) in (int, float) else answer
            answer = text_field({name: answer}, name)
            chain = written_chain(line) if line.get("cot") else ""
            problems.append(Problem(text_field(line, "problem"), answer, chain))
    return problems


def split_chain(tokens, end_think):
    """The ids before </think>, and those after it. Without </think> both are all of `tokens`."""
    for i in range(len(tokens)):
        if tokens[i : i + len(end_think)] == end_think:
            return tokens[:i], tokens[i + len(end_think) :]
    return tokens, tokens


def summarize(lines, samples):
    """Means over predictions, sorted by problem. Accuracy in %, interval: half its 95% interval.

    pass@k: the share of problems that one of the k samples solves. chain_length is #L. compression
    is #chain tokens / #L. seconds_per_problem counts sampling only, of one sample.
    """
    columns = {key: np.array([line[key] for line in lines]) for key in MEANS}
    correct = columns["correct"].reshape(-1, samples)
    lengths = columns["chain_length"]
    interval = 1.96 * 100 * correct.mean(1).std() / len(correct) ** 0.5
    summary = {"accuracy": 100 * correct.mean(), "interval": interval, "count": len(correct)}
    if samples > 1:
        summary[f"pass@{samples}"] = 100 * correct.any(1).mean()
    summary |= {key: columns[key].mean() for key in ("chain_length", "answer_tokens", "finished")}
    summary["seconds_per_problem"] = columns["seconds"].mean()
    if thought := lengths[columns["written_length"] > 0].sum():
        summary["compression"] = columns["written_length"].sum() / thought
    return {key: float(x) for key, x in summary.items()}


class Arm:
    """One model under one intervention: makes predictions of a file's problems."""

    def __init__(self, name, s, model, tokenizer, reasoning):
        if not re.fullmatch(ARMS, name):
            raise UserError(f"--arms {name}: is none of {ARMS}")
        if reasoning.thinking != "latent" and name not in ("free", "floor"):
            raise UserError(f"--arms {name}: this model does not think in latents")
        self.name, self.s, self.tokenizer = name, s, tokenizer
        self.opening = "\\boxed{" if name in ("forced", "floor") else ""
        ends = tokenizer.end_think + tokenizer.encode(self.opening), tokenizer.end_of_turn
        # makes the latents of the arm "other"
        self.donor = Sampler(model, reasoning, ends, replace(s, max_new_tokens=1), s.batch_size)
        change = {"floor": {"thinking": "none"}, "argmax": {"top_k": 1}}.get(name, {})
        reasoning = replace(reasoning, **change)
        if name.startswith("cut-"):
            s = replace(s, max_latents=min(int(name[4:]), s.max_latents))
        function = {"random": self.random_tokens, "other": self.of_others}.get(name)
        self.sampler = Sampler(model, reasoning, ends, s, s.batch_size, function)

    def random_tokens(self, sequence, probs, ids):
        return probs, sequence.rng.integers(len(self.sampler.model.head), size=len(ids))

    def of_others(self, sequence, probs, ids):
        """The latent of the problem before, at the same place (counted around).

        If that problem has none, the own latent stays.
        """
        latents = self.others[sequence.number].latents or [(probs, ids)]
        return latents[(len(sequence.latents) - 1) % len(latents)]

    def predict(self, problems, numbers):
        """Yields a prediction for each sample, as it is made.

        The number of a sample is (number of its problem) * samples + (which sample it is).
        """
        samples = self.s.samples
        prompt = self.tokenizer.prompt
        prompts = [prompt(problems[n // samples].text) for n in numbers]
        if self.name == "other":
            before = [prompt(problems[n // samples - 1].text) for n in numbers]
            self.others = dict(self.donor.generate(before, numbers))
        self.sampler.prepare(prompts)
        begin = time.perf_counter()
        for number, result in self.sampler.generate(prompts, numbers):
            line = {"number": number, "seconds": time.perf_counter() - begin}
            yield line | self.prediction(problems[number // samples], result)
            begin = time.perf_counter()  # decoding and writing are not sampling

    def prediction(self, problem, r):
        """A readable line about a sample r, a sample.Sequence, without its verdict."""
        decode = self.tokenizer.decode
        chain, answer = [], r.tokens
        if self.sampler.thinking == "text":
            chain, answer = split_chain(answer, self.tokenizer.end_think)
        top = [zip(probs[:5].tolist(), ids.tolist()) for probs, ids in r.latents]
        return {
            "problem": problem.text,
            "chain": decode(chain),
            "latents": [[[decode([i]), round(p, 3)] for p, i in latent] for latent in top],
            "answer": self.opening + decode(answer),
            "reference": problem.answer,
            "chain_length": len(chain) + len(r.latents),
            "written_length": len(self.tokenizer.encode(problem.chain)),
            "answer_tokens": len(answer),
            "finished": r.finished,
        }


def read_predictions(path, problems, samples):
    """The predictions in `path` by number. Rewrites them in order, graded, all lines whole."""
    lines = {}
    path.touch()
    for text in path.read_bytes().split(b"\n")[:-1]:  # a killed process leaves half a line
        with reading(path):
            line = json.loads(text)
        lines[line["number"]] = line
        index = line["number"] // samples
        if index >= len(problems) or (line["problem"], line["reference"]) != problems[index][:2]:
            raise UserError(f"{path}: predicts other problems; choose another --out")
    new = [line for line in lines.values() if "correct" not in line]
    for line, right in zip(new, grade([(x["reference"], x["answer"]) for x in new])):
        line["correct"] = right
    text = "".join(json.dumps(lines[n], ensure_ascii=False) + "\n" for n in sorted(lines))
    write_text(path, text)
    return lines


def evaluate(arm, problems, path, process):
    """Predicts what is missing in `path`. Returns the summary."""
    samples = arm.s.samples
    count = len(problems) * samples
    have = from_rank0(lambda: read_predictions(path, problems, samples))
    numbers = [n for n in range(count) if n not in have][process.rank :: process.world]
    lines = arm.predict(problems, numbers)
    with open(path, "ab", buffering=0) as file:
        for line in tqdm(lines, path.name, len(numbers), disable=not process.main):
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    barrier()
    lines = from_rank0(lambda: read_predictions(path, problems, samples))
    return summarize([lines[n] for n in range(count)], samples)


def main():
    s = parse(Settings, __doc__)
    process = join(s.device)
    problems = {re.sub(r"(\.jsonl)?(\.gz)?$", "", Path(f).name): load_problems(f) for f in s.data}
    if len(problems) < len(s.data):
        raise UserError("--data: two files have the same name, which names their results")
    loaded = load_model(s.model, process.device, process.dtype)
    arms = [Arm(name, s, *loaded) for name in s.arms]
    summaries = {}
    with output_directory(
        s.out, s, command="eval", weights=fingerprint(s.model), reasoning=vars(loaded[2])
    ) as out:
        while arms:
            arm = arms.pop(0)
            gc.collect()  # frees the KV cache of the arm before
            for file, of_file in problems.items():
                name = f"{file}.{arm.name}"
                summaries[name] = evaluate(arm, of_file, out / f"{name}.jsonl", process)
                values = (f"{key} {x:.4g}" for key, x in summaries[name].items())
                process.say(f"{name}: {', '.join(values)}")
        write_json(out / "summary.json", summaries)
        process.say(f"{out}/summary.json")


if __name__ == "__main__":
    main()
