"""Phase 1: an encoder turns every r chain tokens into one latent token from which a decoder goes on.

    python train_phase1.py --step encoder --model runs/cot --data train.jsonl --out runs/encoder --compression 2
    python train_phase1.py --step decoder --init runs/encoder --data train.jsonl --out runs/decoder
    python train_phase1.py --step joint --init runs/decoder --data train.jsonl --out runs/joint

Encoder and decoder are two adapters on one frozen base. The loss is the mean cross-entropy over S_2..S_N, </think> and the
answer, given latents that are superpositions made by the encoder; with --w-anchor, also how far these are from their segments. See
docs/METHOD.md.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from data import Row, load_examples, num_latents, num_targets, num_tokens, pack_row
from graphs import run_row
import latents
from load_hf_weights import base_dtype, load_model, starting_point
import lora
from masks import causal, induction, supervision
from model import Model
from runs import UserError, at_least, finished_run, parser, read_json, run_main, start
from trainer import Task, add_training_arguments, train

LEARNS = {"encoder": ("encoder",), "decoder": ("decoder",), "joint": ("encoder", "decoder")}


class Encoder(nn.Module):
    """The base with the adapter "encoder" and the latent query L, a vector [hidden_size]; `rule` is its mask."""

    def __init__(self, model: Model, latent_query: torch.Tensor | None = None, rule=induction):
        super().__init__()
        self.model, self.rule = model, rule
        query = model.embed_tokens.weight.float().mean(0) if latent_query is None else latent_query
        self.latent_query = nn.Parameter(query.to(model.embed_tokens.weight.device, torch.float32))

    def forward(self, row: Row, k: int):
        """alpha of every latent of an encoder row, as (probs [n, k], ids [n, k] or None)."""
        return latents.induce(self.hidden_states(row)[row.latent_index], self.model.embed_tokens.weight.detach(), k)

    def hidden_states(self, row: Row) -> torch.Tensor:
        """[T, hidden_size] of an encoder row."""
        x = self.model.embed_tokens(row.ids)
        x = x.index_copy(0, row.latent_index, self.latent_query.to(x.dtype).expand(len(row.latent_index), -1))
        return run_row(self.model, x, row, self.rule, "encoder")


@dataclass
class Rows:
    """The same examples in encoder and in decoder layout."""
    encoder: Row
    decoder: Row


class Phase1(Task):
    """`learns` are the adapters that do. `w_anchor`: the weight of latents.anchor, which is not in the paper, while the encoder learns.
    Without `segments`, an ablation, the decoder is supervised on the answer alone."""

    def __init__(self, encoder: Encoder, r: int, k: int, learns: tuple[str, ...], segments: bool = True, w_anchor: float = 0.0):
        super().__init__()
        self.layout, self.rule = ("decoder", supervision) if segments else ("latent", causal)
        self.model, self.encoder, self.r, self.k, self.learns = encoder.model, encoder, r, k, learns
        if w_anchor and "encoder" in learns:
            self.weights = self.weights | {"anchor": w_anchor}
        if k != latents.HIDDEN:
            self.weights = self.weights | {"entropy": 0.0}  # of the latents, for metrics.jsonl: near zero they have collapsed
        self.encoder.requires_grad_(False)
        for name in learns:
            for p in lora.adapter_parameters(self.model, name).values():
                p.requires_grad_(True)
        self.encoder.latent_query.requires_grad_("encoder" in learns)

    def length(self, example):
        return max(num_tokens(layout, example, self.r) for layout in ("encoder", self.layout))

    def tokens(self, example):
        return sum(num_tokens(layout, example, self.r) for layout in ("encoder", self.layout))

    def counts(self, examples):
        N = sum(num_latents(e, self.r) for e in examples)
        return {"ce": sum(num_targets(self.layout, e, self.r) for e in examples), "anchor": N, "entropy": N}

    def row(self, examples):
        return Rows(pack_row("encoder", examples, self.r), pack_row(self.layout, examples, self.r))

    def forward(self, rows):
        row, E, parts = rows.encoder, self.model.embed_tokens.weight.detach(), {}
        with torch.set_grad_enabled(torch.is_grad_enabled() and "encoder" in self.learns):
            h = self.encoder.hidden_states(row)
            alpha = latents.induce(h[row.latent_index], E, self.k)
            if "anchor" in self.weights:
                parts["anchor"] = latents.anchor(h, E, row.target_index, row.targets)
        if "entropy" in self.weights:
            parts["entropy"] = latents.entropy(alpha[0].detach()).sum()
        row = rows.decoder
        x = self.model.embed_tokens(row.ids)
        x = x.index_copy(0, row.latent_index, latents.embed(*alpha, E, self.k).to(x.dtype))
        h = run_row(self.model, x, row, self.rule, "decoder")
        return parts | {"ce": latents.cross_entropy(h[row.target_index], self.model.head, row.targets)}

    def save(self, out: Path):
        query = {"latent_query": self.encoder.latent_query}
        lora.save_adapter(out / "encoder.safetensors", self.model, "encoder", query)
        lora.save_adapter(out / "decoder.safetensors", self.model, "decoder")


def load_encoder(run: str | Path, model: Model, dropout: float = 0.0) -> Encoder:
    """The encoder that a phase 1 run saved, as an adapter on `model`, the run's base."""
    extra = lora.load_adapter(Path(run) / "encoder.safetensors", model, "encoder", dropout)
    return Encoder(model, extra["latent_query"], causal if read_json(Path(run) / "config.json")["no_induction"] else induction)


def finished_encoder(run: str | Path, device) -> Encoder:
    """The encoder of a finished phase 1 run on a base of its own, ready to make latents."""
    model = load_model(finished_run(run, "train_phase1")["model"], device, base_dtype(device))[0]
    return load_encoder(run, model).to(device).eval()


def main():
    p = parser(__doc__)
    p.add_argument("--step", choices=LEARNS, required=True, help="whose adapter learns: the encoder's, the decoder's, both")
    p.add_argument("--model", help="the CoT-SFT model, a run or a checkpoint directory; default: that of --init")
    p.add_argument("--init", help="the phase 1 run whose adapters this step starts from; step encoder may do without")
    p.add_argument("--compression", type=at_least(1), help="chain tokens per latent, r; default: that of --init, or 2")
    p.add_argument("--top-k", type=at_least(latents.HIDDEN), help="tokens in a superposition, 0 for all; -1: the last hidden states "
                   "instead, an ablation; default: that of --init, or 10")
    p.add_argument("--no-induction", action="store_true", default=None, help="a plain causal mask for the encoder, an ablation")
    p.add_argument("--no-segments", action="store_true", default=None, help="a decoder without chain tokens, an ablation")
    p.add_argument("--w-anchor", type=at_least(0, float), help="weight of a loss that keeps each latent on the tokens of its own segment "
                   "while the encoder learns; default: that of --init, or 0, which is the paper's")
    add_training_arguments(p, lr=1e-4, epochs=10)
    p.set_defaults(lora_dropout=lora.DROPOUT)
    args = p.parse_args()
    args.command = "train_phase1"
    if not (args.init or args.model):
        raise UserError("--model: name the CoT-SFT model to start from (or --init, a phase 1 run)")
    if args.step != "encoder" and not args.init:
        raise UserError(f"--init: the step {args.step} starts from a run of the step before; name it")
    args.model = args.model and starting_point(args.model)
    args.init = args.init and str(Path(args.init).resolve())
    before = finished_run(args.init, "train_phase1") if args.init else {}
    for key, default in (("model", None), ("compression", 2), ("top_k", 10), ("lora_rank", lora.RANK), ("no_induction", False),
                         ("no_segments", False)):
        given = getattr(args, key)
        if given is None:
            setattr(args, key, before.get(key, default))
        elif before and given != before[key]:
            raise UserError(f"{args.init}: was trained with {key} {before[key]}, not {given}; "
                            f"leave --{key.replace('_', '-')} out")

    if args.w_anchor is None:
        args.w_anchor = before.get("w_anchor", 0.0)
    rank, world, device = start(args.device)
    torch.manual_seed(args.seed)
    model, tokenizer, _ = load_model(args.model, "cpu" if args.shard else device, base_dtype(device))
    dropout = {name: args.lora_dropout * (name in LEARNS[args.step]) for name in LEARNS["joint"]}  # none before an adapter that is frozen
    if args.init:
        encoder = load_encoder(args.init, model, dropout["encoder"])
        lora.load_adapter(Path(args.init) / "decoder.safetensors", model, "decoder", dropout["decoder"])
    else:
        for name in dropout:
            lora.add_adapter(model, name, args.lora_rank, 2 * args.lora_rank, dropout[name])
        encoder = Encoder(model, rule=causal if args.no_induction else induction)
    if args.top_k > model.config.vocab_size:
        raise UserError(f"--top-k {args.top_k}: the vocabulary has only {model.config.vocab_size} tokens")
    examples = load_examples(args.data, tokenizer)
    valid = load_examples(args.valid, tokenizer, skip=True) if args.valid else None
    task = Phase1(encoder, args.compression, args.top_k, LEARNS[args.step], not args.no_segments, args.w_anchor)
    train(task, examples, valid, args, rank, world, device)


if __name__ == "__main__":
    run_main(main)
