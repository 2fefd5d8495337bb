"""Phase 2: the decoder of phase 1, merged, learns to produce the cached latents by itself.

    python train_phase2.py --phase1 runs/joint --cache runs/cache --data train.jsonl --out runs/latent

Loss = w_ce * CE(</think> A) + w_kl * KL(alpha || q), q the softmax of the LM head at the position before each latent; KL is
averaged over the latents of an example, then over examples. With --own-share, part of the examples read, in the place of the
cached latents, what the model itself makes of the positions before them; with --init another student goes on. Where latents are
hidden states, their squared error is added. See docs/METHOD.md.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from cache_latents import encode, identity, read_cache
from data import Example, Row, load_examples, num_targets, num_tokens, pack_row
from graphs import run_row
import latents
from load_hf_weights import base_dtype, load_model, resolve, save_checkpoint
import lora
from masks import causal
from model import Model
from runs import UserError, at_least, finished_run, parser, run_main, start
from train_phase1 import finished_encoder
from trainer import Task, add_training_arguments, train

READ = 10  # tokens that a hidden state is read as, where latents are hidden states


@dataclass
class LatentExample(Example):
    """An example with its cached alpha: probs float16 [N, k] and ids int32 [N, k], or None for the full vocabulary."""
    probs: torch.Tensor
    ids: torch.Tensor | None


def with_latents(examples: list[Example], cached: list[tuple]) -> list[LatentExample]:
    return [LatentExample(**vars(e), probs=probs, ids=ids) for e, (probs, ids) in zip(examples, cached)]


@dataclass
class LatentRow:
    """A row in latent layout, alpha of its latents, and the weight [n] of each latent in the mean over its example."""
    row: Row
    probs: torch.Tensor
    ids: torch.Tensor | None
    weights: torch.Tensor


class Phase2(Task):
    """Trains the adapter "student" of `model`; all its weights instead where it has none, then `source` is its checkpoint directory.

    `noise` and `temperature` are those of latents.gumbel_noise, `end_think` the token that noise must not put on top. `own_share`, which
    the paper does not have: the share of examples that read the model's own latents in training.
    """

    def __init__(self, model: Model, r: int, k: int = 10, w_ce=1.0, w_kl=1.0, noise=0.0, temperature=1.0, end_think: int = 0,
                 source: Path | None = None, own_share=0.0):
        super().__init__()
        self.model, self.r, self.k, self.source = model.requires_grad_(True) if source else model, r, k, source
        self.noise, self.temperature, self.end_think, self.own_share = noise, temperature, end_think, own_share
        self.weights = {"ce": w_ce, "kl": w_kl} | ({"error": w_kl} if k == latents.HIDDEN else {})

    def length(self, example):
        return num_tokens("latent", example, self.r)

    def counts(self, examples):
        return {"ce": sum(num_targets("latent", e, self.r) for e in examples), "kl": len(examples), "error": len(examples)}

    def row(self, examples):
        weights = [torch.full((len(e.probs),), 1 / len(e.probs)) for e in examples]
        probs = torch.cat([e.probs for e in examples]).float()
        ids = None if examples[0].ids is None else torch.cat([e.ids for e in examples]).long()
        return LatentRow(pack_row("latent", examples, self.r), probs, ids, torch.cat(weights))

    def forward(self, batch):
        row, probs, ids, E = batch.row, batch.probs, batch.ids, self.model.embed_tokens.weight
        if self.noise and self.training:
            probs = latents.gumbel_noise(probs, ids, self.end_think, self.noise, self.temperature)
        x = self.model.embed_tokens(row.ids)
        x = x.to(base_dtype(x.device)) if self.source else x  # weights that learn are float32
        x = x.index_copy(0, row.latent_index, latents.embed(probs, ids, E.detach(), self.k).to(x.dtype))
        if self.own_share and self.training:
            chosen = torch.rand(row.labels.documents, device=x.device)[row.labels.document[row.latent_index]] < self.own_share
            x = x.index_copy(0, row.latent_index, torch.where(chosen[:, None], self._own_latents(x, row), x[row.latent_index]))
        h = self._run(x, row)
        before, parts = h[row.latent_index - 1], {}
        if self.k == latents.HIDDEN:  # besides being made, they are to be read as the words they stand for, never as </think>
            parts["error"] = latents.squared_error(before, probs, batch.weights)
            probs, ids = latents.induce(probs.to(E.dtype), E.detach(), READ)
        return parts | {"ce": latents.cross_entropy(h[row.target_index], self.model.head, row.targets),
                        "kl": latents.kl_divergence(before, self.model.head, probs, ids, batch.weights)}

    def _run(self, x, row):
        return run_row(self.model, x, row, causal, None if self.source else "student")

    @torch.no_grad()
    def _own_latents(self, x, row):
        """What inference would feed for each latent, were all before it the cached ones of x: where the model is in doubt a mixture, which no
        cached latent is, and which it has to learn to go on from."""
        self.model.eval()  # as inference, without dropout
        before = self._run(x, row)[row.latent_index - 1]
        self.model.train()
        own = latents.embed(*latents.induce(before, self.model.head.to(x.dtype), self.k), self.model.embed_tokens.weight, self.k)
        return own.to(x.dtype)

    def save(self, out: Path):
        if self.source:
            save_checkpoint(self.model, self.source, out / "model", {"thinking": "latent", "top_k": self.k, "compression": self.r})
        else:
            lora.save_adapter(out / "student.safetensors", self.model, "student")


def main():
    p = parser(__doc__)
    p.add_argument("--phase1", required=True, help="the phase 1 run that made the latents; the student starts from its decoder")
    p.add_argument("--cache", required=True, help="the latents that its encoder made of --data (cache_latents.py)")
    p.add_argument("--init", help="a phase 2 run of all weights to start from instead of the decoder of --phase1; its r may be another")
    p.add_argument("--compression", type=at_least(1), help="chain tokens per latent, r; default: that of --phase1")
    p.add_argument("--top-k", type=at_least(latents.HIDDEN), help="tokens in a superposition; default: that of --phase1")
    p.add_argument("--all-weights", action="store_true", help="all weights learn instead of an adapter")
    p.add_argument("--w-ce", type=at_least(0, float), default=1.0, help="weight of the answer's cross-entropy")
    p.add_argument("--w-kl", type=at_least(0, float), default=1.0, help="weight of the latents' KL")
    p.add_argument("--noise", type=at_least(0, float), default=0.0, help="scale of Gumbel noise on the latents; 0: none")
    p.add_argument("--noise-temperature", type=at_least(0.01, float), default=1.0, help="temperature of the noisy softmax")
    p.add_argument("--own-share", type=at_least(0, float, most=1), default=0.0, help="share of examples that read the model's own latents "
                   "instead of the cached ones, which stay the targets; 0: none, as in the paper")
    add_training_arguments(p, lr=3e-4, epochs=50)
    args = p.parse_args()
    args.command = "train_phase2"
    before = finished_run(args.phase1, "train_phase1")
    for key in ("compression", "top_k"):
        if getattr(args, key) not in (None, before[key]):
            raise UserError(f"{args.phase1}: was trained with {key} {before[key]}, not {getattr(args, key)}; leave --{key.replace('_', '-')} out")
        setattr(args, key, before[key])
    args.phase1 = str(Path(args.phase1).resolve())
    if args.all_weights and (args.lora_rank or args.lora_dropout is not None):
        raise UserError("--all-weights: there is no adapter; leave --lora-rank and --lora-dropout out")
    if not args.all_weights:
        args.lora_rank = args.lora_rank or lora.RANK
        args.lora_dropout = lora.DROPOUT if args.lora_dropout is None else args.lora_dropout
    if args.init:
        args.init, other = str(Path(args.init).resolve()), finished_run(args.init, "train_phase2")
        if not (args.all_weights and other["all_weights"]):
            raise UserError("--init: both trainings need --all-weights; an adapter learns on top of a decoder of phase 1")
        if other["top_k"] != args.top_k:
            raise UserError(f"--init {args.init}: was trained with top_k {other['top_k']}, and --phase1 with {args.top_k}; name runs of one")
        if resolve(other["phase1"])[0] != resolve(args.phase1)[0]:
            raise UserError(f"--init {args.init}: began with another checkpoint than --phase1; name runs of one")
    if args.all_weights and args.shard:
        raise UserError("--all-weights: every rank needs all weights; leave --shard out")
    if args.noise and args.top_k == latents.HIDDEN:
        raise UserError("--noise: is for superpositions, and these latents are hidden states")

    rank, world, device = start(args.device)
    torch.manual_seed(args.seed)
    dtype = torch.float32 if args.all_weights else base_dtype(device)
    model, tokenizer, _ = load_model(args.init or args.phase1, "cpu" if args.shard else device, dtype)
    if not args.all_weights:
        lora.add_adapter(model, "student", args.lora_rank, 2 * args.lora_rank, args.lora_dropout)
    plain = load_examples(args.data, tokenizer)
    made_from = identity(args.phase1, args.data, len(plain), args.compression, args.top_k)
    examples = with_latents(plain, read_cache(args.cache, made_from))
    valid = None
    if args.valid:  # a few latents: made now, by the encoder on its own base, a second whole copy for as long as that takes
        plain = load_examples(args.valid, tokenizer, skip=True)
        encoder = finished_encoder(args.phase1, device)
        valid = with_latents(plain, encode(encoder, plain, args.compression, args.top_k, args.row_tokens, device))
        del encoder
    task = Phase2(model, args.compression, args.top_k, args.w_ce, args.w_kl, args.noise, args.noise_temperature,
                  tokenizer.end_think[0], resolve(args.phase1)[0] if args.all_weights else None, args.own_share)
    train(task, examples, valid, args, rank, world, device)


if __name__ == "__main__":
    run_main(main)
