"""CoT-SFT: all weights learn to write the chain and the answer. Phase 1 starts from this model.

    python train_sft.py --model DIR --data train.jsonl --out runs/cot
    python train_sft.py --model DIR --data train.jsonl --out runs/answer-only --no-chain

The loss is the mean cross-entropy over the chain, </think> and the answer.
"""

import lib.errors  # noqa: F401  from here on an error is one line

from data import load_examples, num_targets, pack_examples
from latents import cross_entropy
from lib.cli import parse, settings
from lib.run import join
from load_hf_weights import Reasoning, load_model, resolve, save_checkpoint
from masks import RULES
from trainer import Task, TrainingSettings, make_runner, run_directory, train


@settings
class Settings(TrainingSettings):
    model: str  # checkpoint directory or run to start from
    no_chain: bool = False  # leave the chains out: the answer-only baseline
    lr: float = 2e-5  # peak learning rate


class CoTSFT(Task):
    def __init__(self, runner, source, reasoning):
        super().__init__()
        self.runner, self.model = runner, runner.model.requires_grad_(True)
        self.source, self.reasoning = source, reasoning

    def counts(self, examples):
        return {"ce": sum(num_targets("cot", e) for e in examples)}

    def pack(self, examples, shape=None):
        return pack_examples("cot", examples, shape=shape)

    def forward(self, row):
        h = self.runner(self.model.embed_tokens(row.ids), row, RULES["cot"])
        return {"ce": cross_entropy(h[row.target_index], self.model.head, row.targets)}

    def save(self, out):
        save_checkpoint(self.model, self.source, out / "model", self.reasoning)


def main():
    s = parse(Settings, __doc__)
    process = join(s.device)
    model, tokenizer, _ = load_model(s.model, process.device)
    examples = load_examples(s.data, tokenizer, process.say, not s.no_chain)
    reasoning = Reasoning("none" if s.no_chain else "text")
    task = CoTSFT(
        make_runner(model, process, recompute=s.checkpoint_activations),
        resolve(s.model)[0],
        reasoning,
    )
    with run_directory(s, "train_sft", s.model, reasoning) as out:
        train(task, examples, s, process, out)


if __name__ == "__main__":
    main()
