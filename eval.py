"""Benchmark files to accuracy, chain length and speed; and what the latents are good for.

    python eval.py --model runs/latent --data gsm8k-test.jsonl svamp-test.jsonl --out runs/eval
    python eval.py --model runs/latent --data aime-2024-test.jsonl --out runs/aime --samples 16
    python eval.py --model runs/latent --data gsm8k-test.jsonl --out runs/arms --arms free forced floor random other argmax cut-4

Reads {"problem", "answer"} lines (or training lines, whose answer is the box in `cot_answer`). Writes
OUT/<file>.predictions.jsonl, one line a sample, and OUT/<file>.json, the summary; for an arm other than free, <file>.<arm>. Under
torchrun, ranks share the problems. The same command again goes on with an evaluation that was stopped.

Arms: free (think, answer as the model likes), forced (think, then only what follows "\\boxed{"), floor (the same without
thinking), cut-M (at most M latents), top-M (latents of the M likeliest tokens alone); and in the place of each latent: random (random
tokens with its probabilities), argmax (its likeliest token alone), other (the latents that the model had for the next problem, and as
many), written (those that the encoder of phase 1 makes of the file's chain; the decoder of a phase 1 run is a model too, and this is the
best that it can do).
"""

import argparse
from dataclasses import dataclass, replace
import json
import math
from pathlib import Path
import re
import time

import torch
import torch.distributed as dist
from tqdm import tqdm

from cache_latents import encode
from data import Example, read_jsonl, segments, text_field, written_chain
from figures import table
from grade import Grader, boxed
from latents import HIDDEN, entropy
from load_hf_weights import base_dtype, fingerprint, load_model
from runs import UserError, at_least, file_hash, finished_run, from_rank0, hold, is_free, parser, read_json, run_main, start, write_json, write_text
from sample import OPENING, Result, Sampling, add_sampling_arguments, sampler, sampling
from tokenizer import Tokenizer
from train_phase1 import finished_encoder

ARMS = ("free", "forced", "floor", "random", "other", "argmax", "written")


@dataclass
class Problem:
    text: str
    answer: str
    chain: str | None  # the written one, where the file has it


def load_problems(path: str) -> list[Problem]:
    problems = []
    for row in read_jsonl(path):
        problem = text_field(row, "problem", path)
        if "answer" in row or "cot_answer" not in row:
            number = row.get("answer")
            is_number = type(number) is int or type(number) is float and math.isfinite(number)  # true and NaN are none
            answer = str(number) if is_number else text_field(row, "answer", path)
        elif (answer := boxed(text_field(row, "cot_answer", path))) is None:
            raise UserError(f"{path}, line {row['_line']}: the field \"cot_answer\" holds no \\boxed{{...}}")
        problems.append(Problem(problem, answer, written_chain(row, path) if row.get("cot") else None))
    return problems


def arm(text: str) -> str:
    """An argparse type: one of ARMS, or cut-M, or top-M."""
    if text not in ARMS and not re.fullmatch(r"cut-\d{1,9}|top-[1-9]\d{0,8}", text):
        raise argparse.ArgumentTypeError(f"{text} is none of {', '.join(ARMS)}, cut-M, top-M")
    return text


def settings_of(name: str, settings: Sampling) -> Sampling:
    """The settings with which an arm is sampled."""
    if name.startswith("cut-"):
        return replace(settings, max_latents=min(int(name[4:]), settings.max_latents))
    if name.startswith("top-"):
        return replace(settings, top_k=int(name[4:]))
    changes = {"free": {}, "forced": {"forced": True}, "floor": {"forced": True, "thinking": "none"}, "other": {"latents": "given"},
               "written": {"latents": "given"}, "argmax": {"top_k": 1}}
    return replace(settings, **changes.get(name, {"latents": name}))


def split_chain(tokens: list[int], end_think: list[int]) -> tuple[list[int], list[int]]:
    """What was written before </think>, and after it; without </think> all is chain, and all is searched for an answer."""
    for i in range(len(tokens) - len(end_think) + 1):
        if tokens[i:i + len(end_think)] == end_think:
            return tokens[:i], tokens[i + len(end_think):]
    return tokens, tokens


def effective_compression(ids: torch.Tensor, written: list[list[int]]) -> float | None:
    """ECR@K of one sample: how many tokens of a written segment are among the K ids [n, K] of its latent, averaged over the latents
    that have a segment."""
    pairs = [(set(top), segment) for top, segment in zip(ids.tolist(), written)]
    return sum(token in top for top, segment in pairs for token in segment) / len(pairs) if pairs else None


def prediction(problem: Problem, result: Result, tokenizer: Tokenizer, settings: Sampling, r: int, grader: Grader) -> dict:
    """One readable line: the problem, the chain (written, or the top tokens of its latents), the answer, the verdict."""
    chain, answer = split_chain(result.tokens, tokenizer.end_think) if settings.thinking == "text" else ([], result.tokens)
    latents = [[[tokenizer.decode([i]), round(p, 3)] for p, i in zip(probs[:5], ids[:5])]
               for probs, ids in zip(result.probs.tolist(), result.ids.tolist())]
    text = OPENING * settings.forced + tokenizer.decode(answer)
    line = {"problem": problem.text, "chain": tokenizer.decode(chain), "latents": latents, "answer": text,
            "reference": problem.answer, "correct": grader.grade(problem.answer, text),
            "chain_length": len(chain) + len(latents), "answer_tokens": len(answer), "finished": result.finished}
    if latents and settings.top_k > 0:  # of the whole vocabulary only the likeliest are kept
        line["entropy"] = round(float(entropy(result.probs).mean()), 4)
    written = tokenizer.encode(problem.chain) if problem.chain else []
    if written:
        line["written_length"] = len(written)
    if latents:
        written = segments(written, r)
        line |= {f"ecr@{k}": effective_compression(result.ids[:, :k], written) for k in (5, 10) if k <= result.ids.shape[1]}
        line["segments"] = len(written)
    return line


def pass_at(k: int, samples: int, right: int) -> float:
    """The chance that k of the samples, drawn without putting back, hold a right one (arXiv 2107.03374)."""
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def summarize(predictions: list[dict], samples: int, seconds: float) -> dict:
    """Accuracy in percent with a 95% normal interval over problems, pass@k, #L (chain_length), answer tokens, the entropy
    (in nats) and, where there are written chains, ECR@K of all latents and their tokens over #L (compression); seconds per sample.

    `predictions`: those of the first problem, then those of the second, ...
    """
    n = len(predictions) // samples
    right = [sum(p["correct"] for p in predictions[i * samples:(i + 1) * samples]) for i in range(n)]
    accuracy = sum(right) / samples / n
    variance = sum((c / samples - accuracy) ** 2 for c in right) / n
    mean = lambda key: sum(p[key] for p in predictions) / len(predictions)
    summary = {"accuracy": 100 * accuracy, "interval": 196 * (variance / n) ** 0.5, "count": n, "samples": samples}
    summary |= {f"pass@{k}": 100 * sum(pass_at(k, samples, c) for c in right) / n
                for k in sorted({*(2**i for i in range(1, samples.bit_length())), samples} - {1})}
    for key in ("entropy", "ecr@5", "ecr@10"):  # a prediction has the mean over its own
        known = [p for p in predictions if p.get(key) is not None]
        counts = [p["chain_length"] if key == "entropy" else min(p["chain_length"], p["segments"]) for p in known]
        if known:
            summary[key] = sum(n * p[key] for n, p in zip(counts, known)) / sum(counts)
    known = [p for p in predictions if "written_length" in p]
    if thought := sum(p["chain_length"] for p in known):
        summary["compression"] = sum(p["written_length"] for p in known) / thought
    return summary | {"chain_length": mean("chain_length"), "answer_tokens": mean("answer_tokens"),
                      "finished": 100 * mean("finished"), "seconds": seconds, "seconds_per_problem": seconds / len(predictions)}


def partial_files(path: Path) -> list[Path]:
    """What the ranks have sampled so far for the results at `path`."""
    name = re.compile(re.escape(f".{path.name}.") + r"\d+\.partial")
    return sorted(file for file in path.parent.iterdir() if name.fullmatch(file.name)) if path.parent.exists() else []


class Done:
    """What has been sampled so far, in files beside the results, one a rank: a stopped evaluation goes on from there."""

    def __init__(self, path: Path, rank: int):
        self.seconds, self.results = 0.0, {}
        for file in partial_files(path):
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:  # being written when the run was killed
                    continue
                n = len(row["ids"])  # may be 0
                probs, ids = torch.tensor(row["probs"]).reshape(n, -1 if n else 1), torch.tensor(row["ids"], dtype=torch.long)
                ids = ids.reshape(probs.shape)
                self.results[row["number"]] = Result(probs, ids, row["tokens"], row["finished"])
                self.seconds = max(self.seconds, row["seconds"])
        self.mine = path.with_name(f".{path.name}.{rank}.partial")

    def __enter__(self):
        self.mine.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.mine, "a", encoding="utf-8")
        self.file.write("\n")  # ends a broken line
        self.begin = time.time()
        return self

    def __exit__(self, *_):
        self.file.close()

    def add(self, number: int, result: Result) -> None:
        now = time.time()
        row = {"number": number, "tokens": result.tokens, "finished": result.finished, "probs": result.probs.tolist(),
               "ids": result.ids.tolist(), "seconds": self.seconds + now - self.begin}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        self.begin += time.time() - now  # writing down is not sampling
        self.results[number] = result


def sampled(model, tokenizer, problems, args, settings, path: Path, rank: int, world: int, given=None) -> tuple[dict, float]:
    """The results of all samples by number (problem times samples plus sample), and the seconds that it took, without a GPU's compilation and
    the writing down."""
    done = Done(path, rank)
    total = len(problems) * args.samples
    numbers = [n for n in range(total) if n not in done.results][rank::world]
    if dist.is_initialized():
        dist.barrier()  # all have read what there was before anybody writes
    thinker = sampler(model, tokenizer, settings, args.batch_size)
    prompts, given = [tokenizer.prompt(problems[n // args.samples].text) for n in numbers], given and [given[n] for n in numbers]
    if numbers:
        thinker.make_room(prompts, given)
    with done, tqdm(total=len(numbers), desc=path.name, disable=rank > 0, mininterval=1, dynamic_ncols=True) as bar:
        def progress(i, result):
            done.add(numbers[i], result)
            bar.update()
        thinker.generate(prompts, numbers, progress, given)
    if dist.is_initialized():
        dist.barrier()
    everything = Done(path, rank)
    if dist.is_initialized():
        dist.barrier()  # all have read it before anybody removes it
    return everything.results, everything.seconds


def phase1_of(run: str) -> str:
    """The phase 1 run that a run of phase 2 comes from, or `run` itself."""
    return read_json(Path(run) / "config.json").get("phase1", run)


def written_latents(run: str, problems: list[Problem], tokenizer: Tokenizer, device) -> list[tuple]:
    """The latents (probs, ids) that the encoder of phase 1 makes of the problems' written chains; `run`: of either phase."""
    phase1 = phase1_of(run)
    config = finished_run(phase1, "train_phase1")
    examples = [Example(tokenizer.prompt(p.text), tokenizer.encode(p.chain), tokenizer.end_think, []) for p in problems]
    encoded = encode(finished_encoder(phase1, device), examples, config["compression"], config["top_k"], 8192, device)
    return [(probs.float(), ids.long()) for probs, ids in encoded]


def evaluate(model, tokenizer, problems, args, free: Sampling, name: str, r: int, path: Path, made_with: dict, rank, world) -> dict:
    """Samples, grades and writes the arm `name` of one file; returns its summary. `free`: the settings of the arm free."""
    settings = settings_of(name, free)
    summary_file, lines_file = (path.with_name(path.name + end) for end in (".json", ".predictions.jsonl"))
    if summary_file.exists():  # of an earlier call with these settings: see check_out
        return read_json(summary_file)
    given = None
    if name == "other":  # the free arm's latents, of the same sample of the next problem
        own, _ = sampled(model, tokenizer, problems, args, free, path.with_name(path.name + "-own"), rank, world)
        given = [(own[n].probs, own[n].ids) for n in range(len(own))]
        given = given[args.samples:] + given[:args.samples]
    if name == "written":
        given = [alpha for alpha in written_latents(args.model, problems, tokenizer, model.embed_tokens.weight.device) for _ in range(args.samples)]
    results, seconds = sampled(model, tokenizer, problems, args, settings, path, rank, world, given)
    with Grader() as grader:
        mine = [prediction(problems[n // args.samples], results[n], tokenizer, settings, r, grader)
                for n in tqdm(range(rank, len(results), world), desc="grading", disable=rank > 0, mininterval=5, leave=False)]
    parts = [mine]
    if dist.is_initialized():
        parts = [None] * world
        dist.all_gather_object(parts, mine)
    predictions = [None] * len(results)
    for i, part in enumerate(parts):
        predictions[i::world] = part

    def write():
        write_text(lines_file, "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in predictions))
        write_json(summary_file, made_with | {"thinking": settings.thinking, "arm": name} | summarize(predictions, args.samples, seconds))
        for which in (path, path.with_name(path.name + "-own")):
            for file in partial_files(which):
                file.unlink()
        return read_json(summary_file)
    return from_rank0(write)


def main():
    p = parser(__doc__)
    add_sampling_arguments(p)
    p.add_argument("--data", nargs="+", required=True, help="benchmark files")
    p.add_argument("--out", required=True, help="directory of predictions and summaries")
    p.add_argument("--batch-size", type=at_least(1), default=64, help="rows that run side by side")
    p.add_argument("--samples", type=at_least(1), default=1, help="answers to each problem, for pass@k")
    p.add_argument("--arms", type=arm, nargs="+", default=["free"], help=f"what to compare: {', '.join(ARMS)}, cut-M, top-M")
    args = p.parse_args()
    rank, world, device = start(args.device)
    files = {Path(file).name.removesuffix(".gz").removesuffix(".jsonl"): file for file in args.data}
    if len(files) < len(args.data):
        raise UserError("--data: two of the files have the same name, which names their results; evaluate them one by one")
    for name in {"", "settings"} & files.keys():
        raise UserError(f"--data: results of {files[name]} would be named {name}.json, which is no name or has a meaning; rename the file")
    problems_of = {name: load_problems(file) for name, file in files.items()}
    hashes = {name: file_hash(file) for name, file in files.items()}
    model, tokenizer, reasons = load_model(args.model, device, base_dtype(device))
    settings = sampling(args, reasons, model.config.vocab_size)
    made_with = {key: value for key, value in vars(args).items() if key not in ("data", "out", "device", "batch_size", "arms")}
    made_with |= {"top_k": settings.top_k}
    out = Path(args.out)
    path_of = lambda name, which: out / (name if which == "free" else f"{name}.{which}")
    if len({path_of(name, which) for name in files for which in args.arms}) < len(files) * len(args.arms):
        raise UserError("--data, --arms: two of the results would have the same name; evaluate the files one by one")
    for which in args.arms:
        if settings_of(which, settings).thinking != "latent" and which not in ("free", "floor"):
            raise UserError(f"--arms {which}: is for thinking in latents, and this model's thinking is {settings.thinking}")
        kept = settings_of(which, settings).top_k
        if kept != settings.top_k and (settings.top_k == HIDDEN or kept > model.config.vocab_size):
            raise UserError(f"--arms {which}: is for superpositions, of at most the {model.config.vocab_size} tokens there are")
        if which == "written":
            if not all(p.chain and p.chain.strip() for problems in problems_of.values() for p in problems):
                raise UserError("--arms written: a problem without a written chain; give files in the training schema")
            before = read_json(Path(phase1_of(args.model)) / "config.json")
            if before.get("command") != "train_phase1" or before["top_k"] != settings.top_k:
                raise UserError(f"--arms written: {args.model} is no run of train_phase1.py or train_phase2.py with --top-k {settings.top_k}")
        if which == "other" and min(map(len, problems_of.values())) < 2:
            raise UserError("--arms other: needs at least two problems in a file")

    def check_out():
        path = out / "settings.json"  # of all that lies in OUT, finished or not
        if out.is_dir() and not path.exists() and not is_free(out):
            raise UserError(f"{out}: is there already and holds no evaluation; choose another --out")
        made_with["weights"] = fingerprint(args.model)
        made_with["files"] = (read_json(path).get("files", {}) if path.exists() else {}) | hashes
        found = read_json(path) if path.exists() else made_with
        for name, value in found.get("files", {}).items():
            if made_with["files"][name] != value:
                raise UserError(f"{files[name]}: has changed since {out} was begun; choose another --out")
        for key, value in made_with.items():
            if key not in ("files", "model") and found.get(key) != value:  # the model's weights are compared
                raise UserError(f"{path}: is of another evaluation ({key} is {found.get(key)!r} there, {value!r} here); "
                                "choose another --out")
        write_json(path, made_with)
    from_rank0(check_out)
    if rank == 0:
        print(f"eval: {args.model} on {', '.join(f'{files[n]} ({len(ps)})' for n, ps in problems_of.items())}, "
              f"thinking {settings.thinking}, {args.samples} sample(s) of each, on {world} x {device}")
    of_all, rows = {k: v for k, v in made_with.items() if k != "files"}, []
    with hold(out):
        for name, problems in problems_of.items():
            for which in args.arms:
                path = path_of(name, which)
                s = evaluate(model, tokenizer, problems, args, settings, which, reasons["compression"], path,
                             of_all | {"file": files[name]}, rank, world)
                rows.append([name, which, f"{s['accuracy']:.1f}% ± {s['interval']:.1f}", f"{s['chain_length']:.1f}", f"{s['answer_tokens']:.1f}",
                             f"{s['seconds_per_problem']:.4f}"])
                if rank == 0:
                    more = "".join(f", {k} {v:.1f}" for k, v in s.items() if k.startswith("pass@"))
                    print(f"{path.name}: accuracy {s['accuracy']:.1f} ± {s['interval']:.1f}%{more}, #L {s['chain_length']:.1f}, answer "
                          f"tokens {s['answer_tokens']:.1f}, {s['seconds_per_problem']:.4f} s a sample; {path}.json")
    if rank == 0 and len(rows) > 1:
        write_text(out / "table.md", text := table(["file", "arm", "accuracy (95% interval)", "#L", "answer tokens", "seconds per sample"], rows))
        print(f"\n{text}\n{out}/table.md")


if __name__ == "__main__":
    run_main(main)
