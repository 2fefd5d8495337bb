"""A model's own chains, as data to train on: self-distillation.

    python distill.py --model runs/cot --data problems.jsonl --out runs/own --temperature 0
    python distill.py --model runs/cot --data problems.jsonl --out runs/own --samples 8 --temperature 1 --top-p 1

Reads {"problem"} lines; writes OUT/chains.jsonl, in their order, with "cot" and "cot_answer" added or replaced: all chains that came to an
end and a boxed answer, right or wrong. Under torchrun, ranks share the problems. The same command again goes on where it was stopped.
"""

import json
from pathlib import Path

from data import read_jsonl, text_field
from eval import Problem, partial_files, sampled, split_chain
from grade import boxed
from load_hf_weights import base_dtype, fingerprint, load_model, resolve, starting_point
from runs import UserError, at_least, file_hash, from_rank0, hold, open_run, parser, run_main, start, write_text
from sample import add_sampling_arguments, sampling


def main():
    p = parser(__doc__)
    add_sampling_arguments(p)
    p.add_argument("--data", required=True, help="problems")
    p.add_argument("--out", required=True, help="directory of what the model writes")
    p.add_argument("--batch-size", type=at_least(1), default=64, help="rows that run side by side")
    p.add_argument("--samples", type=at_least(1), default=1, help="chains for each problem")
    args = p.parse_args()
    rank, world, device = start(args.device)
    args.model, thinking = starting_point(args.model), args.thinking or resolve(args.model)[2]["thinking"]
    if thinking != "text":
        raise UserError(f"--model {args.model}: its thinking is {thinking}; name a model that writes chains, of train_sft.py say", shared=True)
    rows = read_jsonl(args.data)
    problems = [Problem(text_field(row, "problem", args.data), "", None) for row in rows]
    settings = {key: value for key, value in vars(args).items() if key != "batch_size"}
    settings |= {"command": "distill", "data_hash": file_hash(args.data), "weights": fingerprint(args.model)}
    out, total = Path(args.out), len(rows) * args.samples
    from_rank0(lambda: open_run(out, settings))
    with hold(out):
        if (out / "chains.jsonl").exists():
            if rank == 0:
                print(f"{out}/chains.jsonl: is there already")
            return
        model, tokenizer, reasons = load_model(args.model, device, base_dtype(device))
        if rank == 0:
            print(f"distill: {args.model} writes {args.samples} chain(s) for each of {len(rows)} problems of {args.data}, on {world} x {device}")
        results, _ = sampled(model, tokenizer, problems, args, sampling(args, reasons, model.config.vocab_size), out / "chains.jsonl", rank, world)

        def write():
            lines = []
            for n in range(total):
                tokens, row = results[n].tokens, rows[n // args.samples]
                written, answered = split_chain(tokens, tokenizer.end_think)
                chain, answer = tokenizer.decode(written).strip(), tokenizer.decode(answered).strip()
                if results[n].finished and len(written) < len(tokens) and chain and boxed(answer) is not None:
                    line = row | {"cot": chain, "cot_answer": answer}
                    del line["_line"]
                    lines.append(json.dumps(line, ensure_ascii=False) + "\n")
            write_text(out / "chains.jsonl", "".join(lines))
            for file in partial_files(out / "chains.jsonl"):
                file.unlink()
            print(f"{len(lines)} of {total} chains came to an end and a boxed answer; {out}/chains.jsonl")
        from_rank0(write)


if __name__ == "__main__":
    run_main(main)
