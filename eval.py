"""Benchmark files to accuracy, chain length and time; and what the latents are good for.

    python eval.py --model runs/latent --data gsm8k-test.jsonl svamp-test.jsonl --out runs/eval
    python eval.py --model runs/latent --data aime-2024-test.jsonl --out runs/aime --samples 16
    python eval.py --model runs/latent --data gsm8k-test.jsonl --out runs/arms --arms random cut-4

Reads {"problem", "answer"} lines, or training lines, whose answer is the box in "cot_answer".
Appends each prediction to OUT/<file>.<arm>.jsonl as it is made, and skips what is there. Writes
OUT/summary.json and OUT/table.md. Under torchrun, ranks share the problems.

Arms:
    free     thinks and answers as the model likes
    forced   thinks, then gives only what follows "\\boxed{"
    floor    the same without thinking
    random   each latent has random tokens with its probabilities
    other    each latent is one of the problem before, at the same place
    argmax   each latent is its most likely token
    cut-M    at most M latents
"""

import lib.errors  # noqa: F401  from here on an error is one line

from dataclasses import dataclass, replace
import json
import math
from pathlib import Path
import re
import time

import torch
from tqdm import tqdm

from data import text_field, written_chain
from lib.cli import parse
from lib.errors import UserError
from lib.files import read_jsonl, reading, write_json, write_text
from lib.grader import Grader, boxed
from lib.run import barrier, from_rank0, join, output_directory
from load_hf_weights import base_dtype, fingerprint, load_model
from sample import Sampler, SamplingParams, complete

OPENING = "\\boxed{"  # a forced answer begins with it


def arm(text):
    """The type of a setting: the name of an arm."""
    if not re.fullmatch(r"free|forced|floor|random|other|argmax|cut-\d{1,6}", text):
        raise ValueError
    return text


@dataclass(frozen=True, kw_only=True)
class Settings(SamplingParams):
    data: tuple[str, ...]  # benchmark files
    out: str  # directory of predictions and summaries
    arms: tuple[arm, ...] = ("free",)  # what to compare: see above
    samples: int = 1  # answers to each problem, for pass@k
    batch_size: int = 64  # sequences side by side


@dataclass
class Problem:
    text: str
    answer: str
    chain: str  # the written one, empty where the file has none


def load_problems(path):
    """The problems of a file. Raises UserError with file and line."""
    problems = []
    for row in read_jsonl(path):
        with reading(path, row["_line"]):
            answer = row["answer"] if "answer" in row else boxed(text_field(row, "cot_answer"))
            if type(answer) is int or type(answer) is float and math.isfinite(answer):
                answer = str(answer)
            answer = text_field({"answer": answer}, "answer")
            chain = written_chain(row) if row.get("cot") else ""
            problems.append(Problem(text_field(row, "problem"), answer, chain))
    return problems


def split_chain(tokens, end_think):
    """The ids before </think>, and those behind it. Without </think> all are both."""
    for i in range(len(tokens) - len(end_think) + 1):
        if tokens[i : i + len(end_think)] == end_think:
            return tokens[:i], tokens[i + len(end_think) :]
    return tokens, tokens


def pass_at(k, samples, right):
    """The chance that k of the samples, drawn without putting back, hold a right one."""
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def summarize(lines, samples):
    """Means over predictions, those of the first problem first. Accuracy in %, with a 95% interval.

    chain_length is #L. compression is #chain tokens / #L. seconds_per_problem counts sampling only.
    """
    n, mean = len(lines) // samples, lambda key: sum(p[key] for p in lines) / len(lines)
    right = [sum(p["correct"] for p in lines[i * samples : (i + 1) * samples]) for i in range(n)]
    accuracy = mean("correct")
    deviation = (sum((c / samples - accuracy) ** 2 for c in right) / n) ** 0.5
    summary = {"accuracy": 100 * accuracy, "interval": 196 * deviation / n**0.5, "count": n}
    for k in sorted({*(2**i for i in range(1, samples.bit_length())), samples} - {1}):
        summary[f"pass@{k}"] = 100 * sum(pass_at(k, samples, c) for c in right) / n
    summary |= {key: mean(key) for key in ("chain_length", "answer_tokens", "finished")}
    summary["seconds_per_problem"] = mean("seconds")
    thought = sum(p["chain_length"] for p in lines if p["written_length"])
    if thought:
        summary["compression"] = sum(p["written_length"] for p in lines) / thought
    return summary


class Arm:
    """One model under one intervention: makes predictions of a file's problems."""

    def __init__(self, name, s, model, tokenizer, reasoning):
        self.name, self.s, self.tokenizer, self.grader = name, s, tokenizer, Grader()
        self.opening = OPENING if name in ("forced", "floor") else ""
        ends = tokenizer.end_think + tokenizer.encode(self.opening), tokenizer.end_of_turn
        params, self.vocab_size = complete(s, reasoning), model.config.vocab_size
        if params.thinking != "latent" and name not in ("free", "floor"):
            raise UserError(f"--arms {name}: this model does not think in latents")
        self.free = Sampler(model, *ends, replace(params, max_new_tokens=1), s.batch_size)
        if name == "floor":
            params = replace(params, thinking="none")
        if name == "argmax":
            params = replace(params, top_k=1)
        if name.startswith("cut-"):
            params = replace(params, max_latents=min(int(name[4:]), s.max_latents))
        function = {"random": self.random_tokens, "other": self.of_others}.get(name)
        self.params = params
        self.sampler = Sampler(model, *ends, params, s.batch_size, function)

    def random_tokens(self, sequence, probs, ids):
        return probs, torch.randint(self.vocab_size, ids.shape, generator=sequence.generator)

    def of_others(self, sequence, probs, ids):
        """The latent of the problem before, at the same place (counted around)."""
        r, n = self.others[sequence.number], len(sequence.latents) - 1
        return (r.probs[n % len(r.ids)], r.ids[n % len(r.ids)]) if len(r.ids) else (probs, ids)

    def predict(self, problems, numbers, record):
        """Calls record(prediction) for each sample, as it is made.

        The number of a sample is that of its problem * samples + which sample it is.
        """
        samples, prompt = self.s.samples, self.tokenizer.prompt
        prompts = [prompt(problems[n // samples].text) for n in numbers]
        if self.name == "other":
            before = [prompt(problems[n // samples - 1].text) for n in numbers]
            self.others = dict(zip(numbers, self.free.generate(before, numbers)))
        if numbers:
            self.sampler.prepare(prompts)
        begin = time.perf_counter()

        def done(i, result):
            nonlocal begin
            seconds = time.perf_counter() - begin
            line = self.prediction(problems[numbers[i] // samples], result)
            line["correct"] = self.grader.grade(line["reference"], line["answer"])
            record({"number": numbers[i], **line, "seconds": seconds})
            begin = time.perf_counter()  # grading and writing are not sampling

        self.sampler.generate(prompts, numbers, done)

    def prediction(self, problem, r):
        """A readable line about a sample r, a sample.Result, without its verdict."""
        decode, chain, answer = self.tokenizer.decode, [], r.tokens
        if self.params.thinking == "text":
            chain, answer = split_chain(r.tokens, self.tokenizer.end_think)
        top = [zip(p[:5], ids[:5]) for p, ids in zip(r.probs.tolist(), r.ids.tolist())]
        return {
            "problem": problem.text,
            "chain": decode(chain),
            "latents": [[[decode([i]), round(p, 3)] for p, i in latent] for latent in top],
            "answer": self.opening + decode(answer),
            "reference": problem.answer,
            "chain_length": len(chain) + len(r.ids),
            "written_length": len(self.tokenizer.encode(problem.chain)),
            "answer_tokens": len(answer),
            "finished": r.finished,
        }


def read_predictions(path, problems, samples):
    """The predictions in `path` by number. Rewrites them in order, without a broken last line."""
    lines = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        if text.endswith("}"):
            line = json.loads(text)
            lines[line["number"]] = line
            if line["problem"] != problems[line["number"] // samples].text:
                raise UserError(f"{path}: predicts other problems; choose another --out")
    ordered = (json.dumps(lines[n], ensure_ascii=False) + "\n" for n in sorted(lines))
    write_text(path, "".join(ordered))
    return lines


def evaluate(arm, problems, path, process):
    """Predicts what is missing in `path`. Returns the summary."""
    samples, count = arm.s.samples, len(problems) * arm.s.samples
    have = from_rank0(lambda: read_predictions(path, problems, samples))
    numbers = [n for n in range(count) if n not in have][process.rank :: process.world]
    bar = tqdm(total=len(numbers), desc=path.name, disable=not process.main, mininterval=1)
    with bar, open(path, "ab", buffering=0) as file:

        def record(line):
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            bar.update()

        arm.predict(problems, numbers, record)
    barrier()
    lines = from_rank0(lambda: read_predictions(path, problems, samples))
    return summarize([lines[n] for n in range(count)], samples)


HEAD = ["file", "arm", "accuracy (95% interval)", "#L", "answer tokens", "s per sample"]


def cells(file, arm, x):
    """A row of the table."""
    passed = "".join(f", {k} {v:.1f}" for k, v in x.items() if k.startswith("pass@"))
    accuracy = f"{x['accuracy']:.1f}% ± {x['interval']:.1f}{passed}"
    lengths = [f"{x['chain_length']:.1f}", f"{x['answer_tokens']:.1f}"]
    return [file, arm, accuracy, *lengths, f"{x['seconds_per_problem']:.4f}"]


def table(head, rows):
    """In Markdown."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *rows))


def main():
    s = parse(Settings, __doc__)
    process = join(s.device)
    files = {Path(f).name.removesuffix(".gz").removesuffix(".jsonl"): f for f in s.data}
    if len(files) < len(s.data):
        raise UserError("--data: two files have the same name, which names their results")
    problems = {name: load_problems(file) for name, file in files.items()}
    loaded = load_model(s.model, process.device, base_dtype(process.device))
    arms, summaries, rows = [Arm(name, s, *loaded) for name in s.arms], {}, []
    weights = from_rank0(lambda: fingerprint(s.model))
    with output_directory(s.out, s, command="eval", weights=weights) as out:
        for file, of_file in problems.items():
            for arm in arms:
                name = f"{file}.{arm.name}"
                summaries[name] = evaluate(arm, of_file, out / f"{name}.jsonl", process)
                rows.append(cells(file, arm.name, summaries[name]))
        text = table(HEAD, rows)
        if process.main:
            write_json(out / "summary.json", summaries)
            write_text(out / "table.md", text)
        process.say(f"\n{text}\n{out}/table.md")


if __name__ == "__main__":
    main()
