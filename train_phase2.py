"""Phase 2: the student, phase 1's decoder, learns to make the cached latents by itself.

    python train_phase2.py --phase1 runs/phase1 --cache runs/cache --data train.jsonl --out latent
    python train_phase2.py --model runs/cot --cache runs/cache --data train.jsonl --out mux

The second form is MUX, an addition to the paper: there is no phase 1.

Loss = w_ce * CE(</think> A) + w_kl * KL(alpha || q), q the softmax of the LM head at the position
before each latent. KL is averaged over the latents of an example, then over examples.
"""

import lib.errors  # noqa: F401  from here on an error is one line

from dataclasses import dataclass

import torch

from cache_latents import identity, read_cache, start_of
from data import PackedBatch, load_examples, num_targets, pack_examples
from latents import add_noise, cross_entropy, gumbel_like, induce, superpose
from lib.cli import Count, Positive, Share, parse, settings
from lib.fast import kl_divergence
from lib.run import join
from load_hf_weights import Reasoning, load_model, resolve, save_checkpoint
import lora
from masks import RULES
from trainer import Task, TrainingSettings, make_runner, run_directory, train


@settings
class Settings(TrainingSettings):
    cache: str  # the latents of --data (cache_latents.py)
    phase1: str = ""  # the phase 1 run that made them; the student starts from its decoder
    model: str = ""  # addition to the paper (MUX): the model to start from, without phase 1
    lr: float = 3e-4  # peak learning rate
    epochs: Positive = 60.0  # passes over the data
    w_ce: float = 1.0  # weight of the cross-entropy of </think> and answer
    w_kl: float = 1.0  # weight of the latents' KL
    noise: float = 0.0  # scale of the Gumbel noise on the latents, input and target
    noise_temperature: Positive = 1.0  # temperature of the noisy softmax
    scheduled_sampling: Share = 0.0  # addition: chance that an example reads its own latents
    all_weights: bool = False  # all weights learn, not an adapter
    lora_rank: Count = 64  # of the adapter; LoRA's alpha is twice that
    lora_dropout: Share = 0.1  # before the adapter
    shard: bool = False  # less memory: every rank keeps a share of the layers, if they are frozen


@dataclass
class LatentRow:
    """A row in latent layout, its alpha, and the weight [n] of each latent in the mean of KL."""

    row: PackedBatch
    probs: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


class Phase2(Task):
    """The adapter "student" learns, or with s.all_weights all weights.

    end_think: the token that noise must not put on top. source: the checkpoint directory from which
    `save` copies config and tokenizer beside all weights.
    """

    layouts = ("latent",)

    def __init__(self, runner, s, reasoning, end_think, source=None):
        super().__init__()
        self.runner, self.model, self.s, self.source = runner, runner.model, s, source
        self.reasoning, self.r, self.end_think = reasoning, reasoning.compression, end_think
        self.weights = {"ce": s.w_ce, "kl": s.w_kl}
        self.adapter = None if s.all_weights else "student"
        if s.all_weights:
            self.model.requires_grad_(True)

    def counts(self, examples):
        return {"ce": sum(num_targets("latent", e, self.r) for e in examples), "kl": len(examples)}

    def pack(self, examples, shape=None):
        probs, ids = map(torch.cat, zip(*(e.alpha for e in examples)))
        sizes = torch.tensor([len(e.alpha[0]) for e in examples])
        weights = (1 / sizes).repeat_interleave(sizes)
        row = pack_examples("latent", examples, self.r, shape)
        return LatentRow(row, probs.float(), ids.long(), weights)

    def forward(self, batch):
        s, row = self.s, batch.row
        probs, ids = batch.probs, batch.ids
        E, head = self.model.embed_tokens.weight.detach(), self.model.head
        if s.noise and self.training:
            g = gumbel_like(probs)
            probs = add_noise(probs, ids, g, self.end_think, s.noise, s.noise_temperature)
        x = self.model.embed_tokens(row.ids)
        x = x.index_copy(0, row.latent_index, superpose(probs, ids, E))
        if s.scheduled_sampling and self.training:
            x = self.with_own_latents(x, row, E)
        h = self.runner(x, row, RULES["latent"], self.adapter)
        before = h[row.latent_index - 1]  # the position before Z_i predicts Z_i
        kl = kl_divergence(before, head, probs, ids, batch.weights)
        return {"ce": cross_entropy(h[row.target_index], head, row.targets), "kl": kl}

    def with_own_latents(self, x, row, E):
        """x with the model's own latents in some examples, drawn at random. Targets stay.

        All come from one pass over x, with the cached latents. This is no rollout.
        A cached latent belongs to one written chain. Where the model is in doubt, its own latent
        mixes several continuations.
        """
        labels = row.labels
        index = row.latent_index
        with torch.no_grad():
            self.eval()  # as inference, without dropout
            before = self.runner(x, row, RULES["latent"], self.adapter)[index - 1]
            self.train()
            own = induce(before, self.model.head.to(before.dtype), self.reasoning.top_k)
        chance = torch.rand(len(labels.starts) - 1, device=x.device)
        chosen = chance[labels.document[index]] < self.s.scheduled_sampling
        z = torch.where(chosen[:, None], superpose(*own, E), x[index])
        return x.index_copy(0, index, z)

    def save(self, out):
        if self.s.all_weights:
            save_checkpoint(self.model, self.source, out / "model", self.reasoning)
        else:
            lora.save_adapter(out / "student.safetensors", self.model, "student")


def main():
    s = parse(Settings, __doc__)
    process = join(s.device)
    torch.manual_seed(s.seed)
    dtype = torch.float32 if s.all_weights else process.dtype
    start = start_of(s)
    shard = s.shard and not s.all_weights
    # with --shard the layers are spread later
    model, tokenizer, _ = load_model(start, "cpu" if shard else process.device, dtype)
    examples = load_examples(s.data, tokenizer, process.say)
    made, cached = read_cache(s.cache, identity(s, len(examples)))
    reasoning = Reasoning("latent", made["top_k"], made["compression"])
    for example, alpha in zip(examples, cached):
        example.alpha = alpha
    facts = {"multiplex": made.get("multiplex")}
    if not s.all_weights:
        facts["adapter"] = "student.safetensors"
        lora.add_adapter(model, "student", s.lora_rank, 2 * s.lora_rank, s.lora_dropout)
    runner = make_runner(model, process, shard, s.checkpoint_activations)
    task = Phase2(runner, s, reasoning, tokenizer.end_think[0], resolve(start)[0])
    with run_directory(s, "train_phase2", start, reasoning, **facts) as out:
        train(task, examples, s, process, out)


if __name__ == "__main__":
    main()
