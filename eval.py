"""Benchmark files to accuracy, chain length and speed.

    python eval.py --model runs/latent --data gsm8k-test.jsonl svamp-test.jsonl --out results

Reads {"problem", "answer"} lines (or training lines, whose answer is the box in `cot_answer`). Writes
OUT/<file>.predictions.jsonl, one line a problem, and OUT/<file>.json, the summary. Under torchrun, ranks share the problems.
"""

import json
from pathlib import Path
import time

import torch.distributed as dist
from tqdm import tqdm

from data import read_jsonl, text_field
from grade import Grader, boxed
from load_hf_weights import base_dtype, load_model
from runs import UserError, at_least, from_rank0, parser, read_json, run_main, start, write_json, write_text
from sample import Result, Sampling, add_sampling_arguments, generate, sampling
from tokenizer import Tokenizer


def load_problems(path: str) -> list[tuple[str, str]]:
    """(problem, reference answer) of every line."""
    problems = []
    for row in read_jsonl(path):
        problem = text_field(row, "problem", path)
        if "answer" in row or "cot_answer" not in row:
            answer = text_field(row, "answer", path)
        elif (answer := boxed(text_field(row, "cot_answer", path))) is None:
            raise UserError(f"{path}, line {row['_line']}: the field \"cot_answer\" holds no \\boxed{{...}}")
        problems.append((problem, answer))
    return problems


def split_chain(tokens: list[int], end_think: list[int]) -> tuple[list[int], list[int]]:
    """What was written before </think>, and after it; without </think> all is chain, and all is searched for an answer."""
    for i in range(len(tokens) - len(end_think) + 1):
        if tokens[i:i + len(end_think)] == end_think:
            return tokens[:i], tokens[i + len(end_think):]
    return tokens, tokens


def prediction(problem: str, gold: str, result: Result, tokenizer: Tokenizer, thinking: str, grader: Grader) -> dict:
    """One readable line: the problem, the chain (written, or the top tokens of its latents), the answer, the verdict."""
    chain, answer = split_chain(result.tokens, tokenizer.end_think) if thinking == "text" else ([], result.tokens)
    latents = [[[tokenizer.decode([i]), round(p, 3)] for p, i in zip(probs[:5], ids[:5])]
               for probs, ids in zip(result.probs.tolist(), result.ids.tolist())]
    text = tokenizer.decode(answer)
    return {"problem": problem, "chain": tokenizer.decode(chain), "latents": latents, "answer": text, "reference": gold,
            "correct": grader.grade(gold, text), "chain_length": len(chain) + len(latents), "answer_tokens": len(answer),
            "finished": result.finished}


def summarize(predictions: list[dict], seconds: float) -> dict:
    """Accuracy in percent with a 95% normal interval, #L (chain_length), answer tokens and seconds per problem."""
    n = len(predictions)
    accuracy = sum(p["correct"] for p in predictions) / n
    mean = lambda key: sum(p[key] for p in predictions) / n
    return {"accuracy": 100 * accuracy, "interval": 196 * (accuracy * (1 - accuracy) / n) ** 0.5, "count": n,
            "chain_length": mean("chain_length"), "answer_tokens": mean("answer_tokens"),
            "finished": 100 * mean("finished"), "seconds": seconds, "seconds_per_problem": seconds / n}


def run(model, tokenizer, problems, numbers, settings: Sampling, batch_size: int, desc: str, quiet: bool):
    """Predictions for `problems`, whose random numbers go by `numbers`, and the seconds of sampling (without grading)."""
    begin = time.time()
    with tqdm(total=len(problems), desc=desc, disable=quiet, mininterval=1, dynamic_ncols=True) as bar:
        results = generate(model, tokenizer, [p for p, _ in problems], settings, batch_size, numbers,
                           lambda i, r: bar.update())
    seconds = time.time() - begin
    with Grader() as grader:
        predictions = [prediction(problem, gold, result, tokenizer, settings.thinking, grader)
                       for (problem, gold), result in zip(problems, results)]
    return predictions, seconds


def main():
    p = parser(__doc__)
    add_sampling_arguments(p)
    p.add_argument("--data", nargs="+", required=True, help="benchmark files")
    p.add_argument("--out", required=True, help="directory of predictions and summaries")
    p.add_argument("--batch-size", type=at_least(1), default=64, help="rows that run side by side")
    p.add_argument("--latents", choices=["own", "random"], default="own",
                   help="random: put random tokens in the place of each latent's own")
    args = p.parse_args()
    rank, world, device = start(args.device)
    files = {Path(file).name.removesuffix(".gz").removesuffix(".jsonl"): file for file in args.data}
    if len(files) < len(args.data):
        raise UserError("--data: two of the files have the same name, which names their results; evaluate them one by one")
    problems_of = {name: load_problems(file) for name, file in files.items()}
    model, tokenizer, reasons = load_model(args.model, device, base_dtype(device))
    settings = sampling(args, reasons)
    settings.latents = args.latents
    made_with = {key: value for key, value in vars(args).items() if key not in ("data", "out", "device", "batch_size")}
    made_with |= {"thinking": settings.thinking, "top_k": settings.top_k}

    def check_out():
        write_text(Path(args.out) / ".writable", "")  # before the work, not after it
        (Path(args.out) / ".writable").unlink()
        for name in files:
            path = Path(args.out) / f"{name}.json"
            found = read_json(path) if path.exists() else made_with
            for key, value in made_with.items():
                if found.get(key) != value:
                    raise UserError(f"{path}: is of another evaluation ({key} is {found.get(key)!r} there, {value!r} here); "
                                    "choose another --out")
    from_rank0(check_out)
    if rank == 0:
        print(f"eval: {args.model} on {', '.join(f'{files[n]} ({len(ps)})' for n, ps in problems_of.items())}, "
              f"thinking {settings.thinking}, on {world} x {device}")
    for name, problems in problems_of.items():
        shard, numbers = problems[rank::world], range(rank, len(problems), world)
        mine, seconds = [], 0.0
        if shard:
            mine, seconds = run(model, tokenizer, shard, numbers, settings, args.batch_size, name, rank > 0)
        shares = [(mine, seconds)]
        if dist.is_initialized():
            shares = [None] * world
            dist.all_gather_object(shares, (mine, seconds))
        predictions = [None] * len(problems)
        for r, (part, _) in enumerate(shares):
            predictions[r::world] = part

        def write():
            summary = made_with | {"file": files[name]} | summarize(predictions, max(s for _, s in shares))
            write_text(Path(args.out) / f"{name}.predictions.jsonl",
                       "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in predictions))
            write_json(Path(args.out) / f"{name}.json", summary)
            return summary
        s = from_rank0(write)
        if rank == 0:
            print(f"{name}: accuracy {s['accuracy']:.1f} ± {s['interval']:.1f}%, #L {s['chain_length']:.1f}, answer tokens "
                  f"{s['answer_tokens']:.1f}, {s['seconds_per_problem']:.4f} s a problem; {args.out}/{name}.json")


if __name__ == "__main__":
    run_main(main)
