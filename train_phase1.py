"""Phase 1: an encoder turns every r chain tokens into one latent token. A decoder goes on from it.

    python train_phase1.py --model runs/cot --data train.jsonl --out runs/phase1 --compression 2

Encoder and decoder are two adapters on one frozen base. Three steps, each goes on from the last:
    encoder    the encoder's adapter and the latent query learn, the decoder is the base
    decoder    the decoder's adapter learns, the encoder is frozen
    joint      both learn
The loss is the mean cross-entropy over S_2..S_N, </think> and the answer. See docs/METHOD.md.
"""

import lib.errors  # noqa: F401  from here on an error is one line

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from data import PackedBatch, load_examples, num_latents, num_targets, pack_examples
from latents import cross_entropy, induce, segment_loss, superpose
from lib.cli import Count, Positive, Share, parse, settings
from lib.errors import UserError
from lib.files import read_json, write_json
from lib.run import join
from load_hf_weights import Reasoning, load_model
import lora
from masks import LATENT, RULES, causal, induction
from trainer import Task, TrainingSettings, make_runner, run_directory, train

LEARNS = {"encoder": ("encoder",), "decoder": ("decoder",), "joint": ("encoder", "decoder")}


@settings
class Settings(TrainingSettings):
    model: str  # the CoT-SFT model to start from: a run or a checkpoint directory
    steps: tuple[Literal[*LEARNS], ...] = tuple(LEARNS)  # which to train
    compression: Count = 2  # chain tokens per latent, r
    top_k: int = 10  # tokens in a superposition, 0 for all
    lr: tuple[float, ...] = (1e-4,)  # peak learning rate for each of --steps; the last for the rest
    epochs: tuple[Positive, ...] = (10.0,)  # passes over the data, likewise
    max_steps: tuple[int, ...] = (0,)  # optimizer steps, likewise; 0: as --epochs says
    lora_rank: Count = 64  # of both adapters; LoRA's alpha is twice that
    lora_dropout: Share = 0.1  # before adapters that learn
    w_segment: float = 0.0  # addition to the paper: ties each latent to its own segment
    no_induction: bool = False  # ablation: a plain causal mask for the encoder
    no_segments: bool = False  # ablation: a decoder without chain tokens
    shard: bool = False  # less memory: every rank keeps a share of the frozen layers only


@dataclass
class TwoLayouts:
    """The same examples in the encoder's and in the decoder's layout."""

    encoder: PackedBatch
    decoder: PackedBatch


def next_latents(row):
    """int [m], ascending: the number (0, 1, ...) of the L that follows each target of `row`.

    `row` is in the encoder's layout: as many Ls stand before the target.
    """
    return (row.labels.kind == LATENT).cumsum(0)[row.target_index]


class Encoder(nn.Module):
    """The adapter "encoder" on the base, and the latent query L, a vector [hidden_size].

    no_induction, an ablation: its mask is causal.
    """

    def __init__(self, runner, r, k, no_induction=False):
        super().__init__()
        self.runner, self.model = runner, runner.model
        self.r, self.k = r, k
        self.rule = causal if no_induction else induction
        self.latent_query = nn.Parameter(self.model.embed_tokens.weight.float().mean(0))

    def forward(self, row):
        """alpha of each latent, (probs, ids) [n, k], and the hidden state [n, d] at its L."""
        E, at = self.model.embed_tokens.weight.detach(), row.latent_index
        x = self.model.embed_tokens(row.ids)
        x = x.index_copy(0, at, self.latent_query.to(x.dtype).expand(len(at), -1))
        h = self.runner(x, row, self.rule, "encoder")[at]
        return *induce(h, E, self.k), h

    def load(self, out):
        """Reads what Phase1.save wrote."""
        more = lora.load_adapter(out / "encoder.safetensors", self.model, "encoder")
        self.latent_query.data.copy_(more["latent_query"])


class Phase1(Task):
    """`learns` names the adapters that learn, w_segment weighs latents.segment_loss.

    no_segments, an ablation: the decoder has the latent layout, so only answers are targets.
    """

    def __init__(self, runner, encoder, learns, no_segments=False, w_segment=0.0):
        super().__init__()
        self.runner, self.model, self.encoder, self.learns = runner, runner.model, encoder, learns
        self.r, self.layouts = encoder.r, ("encoder", "latent" if no_segments else "decoder")
        if w_segment and "encoder" in learns:
            self.weights = {"ce": 1.0, "segment": w_segment}
        self.requires_grad_(False)
        for name in learns:
            for p in lora.adapter_parameters(self.model, name).values():
                p.requires_grad_(True)
        encoder.latent_query.requires_grad_("encoder" in learns)

    def counts(self, examples):
        return {
            "ce": sum(num_targets(self.layouts[1], e, self.r) for e in examples),
            "segment": sum(num_latents(e, self.r) for e in examples),
        }

    def pack(self, examples, shape=None):
        return TwoLayouts(*(pack_examples(name, examples, self.r, shape) for name in self.layouts))

    def forward(self, rows):
        enc, dec = rows.encoder, rows.decoder
        E = self.model.embed_tokens.weight.detach()
        probs, ids, at_L = self.encoder(enc)
        z = superpose(probs, ids, E)
        x = self.model.embed_tokens(dec.ids).index_copy(0, dec.latent_index, z)
        h = self.runner(x, dec, RULES[self.layouts[1]], "decoder")
        parts = {"ce": cross_entropy(h[dec.target_index], self.model.head, dec.targets)}
        if "segment" in self.weights:
            parts["segment"] = segment_loss(at_L, E, next_latents(enc), enc.targets, self.r)
        return parts

    def save(self, out):
        query = self.encoder.latent_query
        lora.save_adapter(out / "encoder.safetensors", self.model, "encoder", latent_query=query)
        lora.save_adapter(out / "decoder.safetensors", self.model, "decoder")

    def load(self, out):
        self.encoder.load(out)
        lora.load_adapter(out / "decoder.safetensors", self.model, "decoder")


def finished_phase1(path):
    """The config of a finished phase 1 run. Raises UserError if `path` is not such a run."""
    config = read_json(Path(path) / "config.json")
    if config.get("command") != "train_phase1" or not (Path(path) / "finished.json").exists():
        raise UserError(f"{path}: is not a finished run of train_phase1.py")
    return config


def load_encoder(phase1, runner):
    """The encoder of a finished phase 1 run: an adapter on runner.model, the base of that run."""
    config = finished_phase1(phase1)
    encoder = Encoder(runner, config["compression"], config["top_k"], config["no_induction"])
    encoder.load(Path(phase1) / config["steps"][-1])
    return encoder.eval()


def main():
    s = parse(Settings, __doc__)
    if len({*s.steps}) < len(s.steps):
        raise UserError("--steps: names a step twice")
    process = join(s.device)
    torch.manual_seed(s.seed)
    # with --shard the layers are spread later
    model, tokenizer, _ = load_model(s.model, "cpu" if s.shard else process.device, process.dtype)
    examples = load_examples(s.data, tokenizer, process.say)
    for name in LEARNS["joint"]:
        lora.add_adapter(model, name, s.lora_rank, 2 * s.lora_rank, s.lora_dropout)
    runner = make_runner(model, process, s.shard, s.checkpoint_activations)
    encoder = Encoder(runner, s.compression, s.top_k, s.no_induction)
    reasoning = Reasoning("latent", s.top_k, s.compression)
    adapter = f"{s.steps[-1]}/decoder.safetensors"
    with run_directory(s, "train_phase1", s.model, reasoning, adapter=adapter) as out:
        lists = {"lr": s.lr, "epochs": s.epochs, "max_steps": s.max_steps}
        for i, step in enumerate(s.steps):
            task = Phase1(runner, encoder, LEARNS[step], s.no_segments, s.w_segment)
            each = {key: values[min(i, len(values) - 1)] for key, values in lists.items()}
            train(task, examples, replace(s, **each), process, out / step)
        write_json(out / "finished.json", {})


if __name__ == "__main__":
    main()
