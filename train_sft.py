"""CoT-SFT: all weights learn to write the chain and the answer. The explicit baseline, and where phase 1 starts.

    python train_sft.py --model DIR --data train.jsonl --out runs/cot
    python train_sft.py --model DIR --data train.jsonl --out runs/answer-only --no-chain

The loss is the mean cross-entropy over the chain, </think> and the answer; with --no-chain the layout is
Q <think> </think> A.
"""

from pathlib import Path

from data import load_examples, num_targets, num_tokens, pack_row
from graphs import run_row
import latents
from load_hf_weights import PLAIN, base_dtype, load_model, resolve, save_checkpoint, starting_point
from masks import causal
from runs import parser, run_main, start
from trainer import Task, add_training_arguments, train


class CoTSFT(Task):
    def __init__(self, model, source, thinking: str):
        super().__init__()
        self.model, self.source, self.thinking = model.requires_grad_(True), source, thinking

    def length(self, example):
        return num_tokens("cot", example)

    def counts(self, examples):
        return {"ce": sum(num_targets("cot", e) for e in examples)}

    def row(self, examples):
        return pack_row("cot", examples)

    def forward(self, row):
        x = self.model.embed_tokens(row.ids).to(base_dtype(row.ids.device))  # the weights that learn are float32
        h = run_row(self.model, x, row, causal)
        return {"ce": latents.cross_entropy(h[row.target_index], self.model.head, row.targets)}

    def save(self, out: Path):
        save_checkpoint(self.model, self.source, out / "model", PLAIN | {"thinking": self.thinking})


def main():
    p = parser(__doc__)
    p.add_argument("--model", required=True, help="checkpoint directory or run to start from")
    p.add_argument("--no-chain", action="store_true", help="leave the chains out: the answer-only baseline")
    add_training_arguments(p, lr=2e-5, epochs=3, adapters=False)
    args = p.parse_args()
    args.command, args.model = "train_sft", starting_point(args.model)
    rank, world, device = start(args.device)
    model, tokenizer, _ = load_model(args.model, device)
    examples = load_examples(args.data, tokenizer, chain=not args.no_chain)
    valid = load_examples(args.valid, tokenizer, chain=not args.no_chain, skip=True) if args.valid else None
    task = CoTSFT(model, resolve(args.model)[0], "none" if args.no_chain else "text")
    train(task, examples, valid, args, rank, world, device)


if __name__ == "__main__":
    run_main(main)
