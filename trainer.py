"""The training loop of CoT-SFT and of both phases, and what a thing to train must offer.

The loss of a step is a sum over the whole batch divided by a count over the whole batch. Without
dropout, noise and scheduled sampling it is the same for any split into ranks and packed rows.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import lru_cache
import json
import math
from pathlib import Path
import shutil
import time

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from attention import Runner
from data import distribute, num_tokens, row_shape, to_device
from lib.cli import Count, Positive, Share, settings
from lib.errors import UserError
from lib.files import file_hash, read_tensors, write_json, write_tensors, write_text
from lib.run import barrier, output_directory
from load_hf_weights import fingerprint


@settings
class TrainingSettings:
    data: str  # training .jsonl or .jsonl.gz: problem, cot, cot_answer
    out: str  # run directory; the same command goes on where it stopped
    lr: float  # peak learning rate
    epochs: Positive = 3.0  # passes over the data
    max_steps: int = 0  # optimizer steps; 0: as --epochs says
    batch_size: Count = 128  # examples per step, over all ranks
    row_tokens: Count = 8192  # tokens of a packed row (micro-batch)
    warmup: Share = 0.05  # share of the steps before the cosine to zero
    save_every: float = 10.0  # seconds between saved states, more where saving takes long
    keep: int = 0  # models to keep on the way, as step-N beside the last (phase 1: adapters)
    checkpoint_activations: bool = False  # less memory: backward computes each layer again
    seed: int = 1  # of every random choice
    device: str = ""  # cpu, cuda or cuda:N; default: a GPU if there is one


class Task(nn.Module):
    """What `train` trains: a subclass has a model, and parameters that require gradients.

    counts(examples): {part: what the sum of that loss part over `examples` is divided by}.
    pack(examples, shape): a packed row of them on the CPU, a dataclass of tensors.
    forward(row): {part: float32 sum}, the loss parts of a row.
    save(out): writes what was learned. load(out): called instead of training if `out` is finished.
    runner: the Runner of its model.
    Loss = sum over parts of weight * sum / count. A part with weight 0 is logged only.
    """

    weights = {"ce": 1.0}
    layouts = ("cot",)  # in which an example is packed
    r = 1

    def length(self, example):
        """Tokens that `example` takes in a row."""
        return max(num_tokens(name, example, self.r) for name in self.layouts)

    def load(self, out):
        pass


def run_directory(s, command, start, reasoning, **facts):
    """The locked output directory of a training that starts from the model `start`."""
    origin = {"command": command, "start": str(Path(start).resolve())}
    origin |= {"weights": fingerprint(start), "data_hash": file_hash(s.data)}
    return output_directory(s.out, s, **origin, reasoning=asdict(reasoning), **facts)


def make_runner(model, process, shard=False, recompute=False):
    """Runs `model` on packed rows in the way that its device asks for. recompute: as Runner says.

    shard: spreads the frozen layers over the ranks, which gather a layer when they need it (FSDP2).
    """
    if shard:
        if process.world == 1:
            raise UserError("--shard: spreads a model over ranks; start the command with torchrun")
        from torch.distributed.fsdp import fully_shard  # this import takes a second

        layers = {p for n, p in model.layers.named_parameters() if ".adapters." not in n}
        for module in [*model.layers, model]:
            fully_shard(module, ignored_params=set(model.parameters()) - layers)
    if on_gpu := process.device.type == "cuda":
        model.compile_layers()
    return Runner(model, on_gpu and not shard, recompute, process.dtype)


@lru_cache(maxsize=2)
def shuffled(seed, epoch, count):
    return np.random.default_rng((seed, epoch)).permutation(count).tolist()


def batch_indices(step, batch_size, count, seed):
    """Which of `count` examples step number `step` (from 0) sees: a new order for each epoch."""
    places = range(step * batch_size, (step + 1) * batch_size)
    return [shuffled(seed, p // count, count)[p % count] for p in places]


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up over the share `warmup` of the steps, then a cosine to zero."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm + 1) / (steps - warm + 1)))


def train(task, examples, s, process, out):
    """Trains `task` on `examples` in the locked run directory `out`, or goes on with what is there.

    Writes metrics.jsonl, what task.save writes, and finished.json. resume.safetensors is there
    until the run is finished.
    """
    if (out / "finished.json").exists():
        process.say(f"{out}: is finished already")
        task.load(out)
    else:
        fitting = [e for e in examples if task.length(e) <= s.row_tokens]
        if skipped := len(examples) - len(fitting):
            process.say(f"skipped {skipped} examples longer than --row-tokens {s.row_tokens}")
        if not fitting:
            raise UserError(f"--row-tokens {s.row_tokens}: no example of {s.data} fits")
        if s.batch_size % process.world:
            raise UserError(f"--batch-size {s.batch_size}: the ranks need equal shares")
        Trainer(task, fitting, s, process, out).loop()
        task.runner.forget()
    barrier()
    (out / "resume.safetensors").unlink(missing_ok=True)


class Trainer:
    """One training: examples, optimizer and saved state. Every rank has one.

    The rows of a step are futures: a thread packs them while the step before runs.
    """

    def __init__(self, task, examples, s, process, out):
        self.task, self.examples, self.s, self.process, self.out = task, examples, s, process, out
        self.steps = s.max_steps or math.ceil(s.epochs * len(examples) / s.batch_size)
        device = process.device
        task.to(device).train()
        lengths = [*map(task.length, examples)]
        self.shape = row_shape(lengths, s.batch_size / process.world, s.row_tokens, device)
        self.learned = {n: p for n, p in task.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.learned.values(), betas=(0.9, 0.95), weight_decay=0.01, fused=device.type == "cuda"
        )
        for p in self.learned.values():
            p.grad = torch.zeros_like(p)  # else a CUDA graph's memory would hold it
        self.progress = {"steps": 0, "seconds": 0.0}
        self.packer = ThreadPoolExecutor(1)
        self.ddp = task
        if process.world > 1:  # a CUDA graph cannot be recorded once DDP holds the gradients
            _, rows = self.batch(0)
            task(to_device(rows[0].result(), device))
            options = dict(broadcast_buffers=False, init_sync=False, gradient_as_bucket_view=True)
            self.ddp = DistributedDataParallel(task, **options)
        if (out / "resume.safetensors").exists():
            self.load()

    def loop(self):
        first = self.progress["steps"]
        s, main = self.s, self.process.main
        self.announce(first)
        kept = {self.steps * i // (s.keep + 1) for i in range(1, s.keep + 1)}
        begin = time.time() - self.progress["seconds"]
        next_save = 0.0
        upcoming = self.batch(first)
        todo = range(first, self.steps)
        bar = tqdm(todo, self.out.name, self.steps, initial=first, disable=not main, mininterval=1)
        for step in bar:
            batch, upcoming = upcoming, self.batch(step + 1)  # packed while the GPU is busy
            self.step(step, *batch)
            bar.set_postfix(loss=self.progress["loss"], refresh=False)
            now = time.time()
            self.progress["seconds"] = now - begin
            if main and step + 1 in kept:
                self.finish(self.out / f"step-{step + 1}")
            if main and (now >= next_save or step + 1 == self.steps):
                self.save()  # at most 5% of the time is saving; --save-every 0: after each step
                next_save = now + (s.save_every and max(s.save_every, 20 * (time.time() - now)))
        barrier()  # no rank sees a finished run while it still trains
        if main:
            self.finish(self.out)
        self.process.say(f"{self.out}: {json.dumps(self.progress)}")

    def batch(self, step):
        """The examples of a step, and this rank's rows of it."""
        indices = batch_indices(step, self.s.batch_size, len(self.examples), self.s.seed)
        examples = [self.examples[i] for i in indices]
        return examples, self.rows(examples)

    def rows(self, examples):
        """This rank's rows of `examples`, as futures."""
        p, shape, lengths = self.process, self.shape, [*map(self.task.length, examples)]
        rows = distribute(lengths, p.world, shape.tokens, shape.examples)[p.rank :: p.world]
        return [
            self.packer.submit(self.task.pack, [examples[i] for i in row], shape) for row in rows
        ]

    def backward(self, examples, rows):
        """The gradient of the mean loss of `examples`. Returns {part: mean} over all ranks."""
        process = self.process
        weights = self.task.weights
        counts = self.task.counts(examples)
        sums = dict.fromkeys(weights, 0.0)
        for i, row in enumerate(rows):
            # ranks exchange gradients in the last backward only
            self.ddp.require_backward_grad_sync = i == len(rows) - 1
            parts = self.ddp(to_device(row.result(), process.device))
            loss = sum(weights[k] * x / counts[k] for k, x in parts.items())
            (process.world * loss).backward()  # DDP averages over ranks
            sums = {k: x + parts[k].detach() for k, x in sums.items()}
        return {k: x / counts[k] for k, x in zip(sums, process.sum(sums.values()))}

    def step(self, step, examples, rows):
        """One optimizer step."""
        begin = time.time()
        s, task = self.s, self.task
        # a step's dropout and noise depend on nothing else: a resumed run draws the same
        torch.manual_seed(hash((s.seed, step, self.process.rank)))
        means = self.backward(examples, rows)
        loss = sum(task.weights[k] * x for k, x in means.items())
        rate = learning_rate(step, self.steps, s.lr, s.warmup)
        self.optimizer.param_groups[0]["lr"] = rate
        norm = float(nn.utils.clip_grad_norm_(self.learned.values(), 1.0))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        if self.process.main and not math.isfinite(loss + norm):
            raise UserError(
                f"{self.out}: at step {step + 1} the loss is {loss:.4g}, its gradient {norm:.4g}; "
                "begin again in another --out with a smaller --lr"
            )
        self.progress |= {"steps": step + 1, "loss": loss}
        tokens = sum(num_tokens(name, e, task.r) for e in examples for name in task.layouts)
        line = {"step": step + 1, "loss": loss, **means, "lr": rate, "grad_norm": norm}
        line["tokens_per_s"] = round(tokens / (time.time() - begin))
        if self.process.main:
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")

    def announce(self, first):
        """Says what is trained on what. Drops metrics after the state from which a run goes on."""
        learned = sum(p.numel() for p in self.learned.values())
        path = self.out / "metrics.jsonl"
        self.process.say(
            f"{self.out}: {learned:,} parameters learn from {len(self.examples)} examples of "
            f"{self.s.data}, steps {first + 1} to {self.steps}, on {self.process.world} x "
            f"{self.process.device}"
        )
        if self.process.main:
            lines = path.read_text().splitlines(True) if path.exists() else []
            write_text(path, "".join(lines[:first]))

    def state(self):
        """{name: tensor} of what learns, and of the optimizer."""
        named = ((n, {"parameter": p} | self.optimizer.state[p]) for n, p in self.learned.items())
        return {f"{key}/{n}": x.data for n, tensors in named for key, x in tensors.items()}

    def save(self):
        write_tensors(self.out / "resume.safetensors", self.state(), self.progress)

    def load(self):
        path = self.out / "resume.safetensors"
        tensors, self.progress = read_tensors(path, self.process.device)
        for name, p in self.learned.items():
            p.data.copy_(tensors[f"parameter/{name}"])
            self.optimizer.state[p] = {
                key: tensors[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq")
            }

    def finish(self, out):
        """Writes a model: the last one, or one on the way."""
        self.task.save(out)
        if out != self.out and (self.out / "config.json").exists():
            shutil.copy(self.out / "config.json", out)
        write_json(out / "finished.json", self.progress)
