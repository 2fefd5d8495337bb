"""A model's own chains, as data to train on: self-distillation.

    python distill.py --model runs/cot --data problems.jsonl --out own.jsonl --temperature 0
    python distill.py --model runs/cot --data problems.jsonl --out own.jsonl --samples 8 --temperature 1 --top-p 1

Reads {"problem"} lines, and writes {"problem", "cot", "cot_answer"} lines, in their order, of all chains that came to an end and a boxed
answer, right or wrong. Under torchrun, ranks share the problems.
"""

import json
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from data import read_jsonl, text_field
from eval import split_chain
from grade import boxed
from load_hf_weights import base_dtype, load_model
from runs import UserError, at_least, from_rank0, parser, run_main, start, write_text
from sample import add_sampling_arguments, sampler, sampling


def main():
    p = parser(__doc__)
    add_sampling_arguments(p)
    p.add_argument("--data", required=True, help="problems")
    p.add_argument("--out", required=True, help="JSONL file of what the model writes")
    p.add_argument("--batch-size", type=at_least(1), default=64, help="rows that run side by side")
    p.add_argument("--samples", type=at_least(1), default=1, help="chains for each problem")
    args = p.parse_args()
    rank, world, device = start(args.device)
    if Path(args.out).exists():
        raise UserError(f"{args.out}: is there already; choose another --out", shared=True)
    problems = [text_field(row, "problem", args.data) for row in read_jsonl(args.data)]
    model, tokenizer, reasons = load_model(args.model, device, base_dtype(device))
    settings = sampling(args, reasons, model.config.vocab_size)
    if settings.thinking != "text":
        raise UserError(f"--model {args.model}: thinks in {settings.thinking}; chains are written by one whose thinking is text", shared=True)
    numbers = range(rank, len(problems) * args.samples, world)
    if rank == 0:
        print(f"distill: {args.model} writes {args.samples} chain(s) for each of {len(problems)} problems of {args.data}, on {world} x {device}")
    with tqdm(total=len(numbers), disable=rank > 0, mininterval=1, dynamic_ncols=True) as bar:
        prompts = [tokenizer.prompt(problems[n // args.samples]) for n in numbers]
        results = sampler(model, tokenizer, settings, args.batch_size).generate(prompts, numbers, lambda i, result: bar.update())
    mine = {}
    for n, result in zip(numbers, results):
        chain, answer = (tokenizer.decode(part).strip() for part in split_chain(result.tokens, tokenizer.end_think))
        if result.finished and chain and answer != chain and boxed(answer) is not None:
            mine[n] = {"problem": problems[n // args.samples], "cot": chain, "cot_answer": answer}
    parts = [mine]
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, mine)

    def write():
        lines = [json.dumps(line, ensure_ascii=False) for _, line in sorted(item for part in parts for item in part.items())]
        write_text(args.out, "".join(line + "\n" for line in lines))
        print(f"{len(lines)} of {len(problems) * args.samples} chains came to an end and a boxed answer; {args.out}")
    from_rank0(write)


if __name__ == "__main__":
    run_main(main)
