"""The training loop that CoT-SFT and both phases share, and what a thing to train must offer.

The loss of a step is a sum over the whole batch divided by a count over the whole batch, whatever ranks and micro-batches
(packed rows) the batch is dealt to; so the gradient is the same however it is split.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
import json
import math
from pathlib import Path
import time

import numpy as np
import torch
from torch import nn
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

from data import RowShape, pack, row_shape, to_device
from lora import DROPOUT, RANK
from runs import (Stopper, UserError, at_least, file_hash, from_rank0, hold, open_run, read_json, read_tensors,
                  write_json, write_tensors, write_text)


class Task(nn.Module):
    """What `train` trains. Parameters with requires_grad learn; `weights` says how the loss parts add up, one of weight 0 is only told."""
    weights: dict[str, float] = {"ce": 1.0}

    def length(self, example) -> int:
        """Tokens that `example` takes of a row's budget: those of its longest layout."""
        raise NotImplementedError

    def tokens(self, example) -> int:
        """Tokens of `example` that go through the model."""
        return self.length(example)

    def counts(self, examples) -> dict[str, float]:
        """The number by which the sum of each loss part over `examples` is divided."""
        raise NotImplementedError

    def row(self, examples):
        """A packed row of `examples`, on the CPU: a dataclass of tensors."""
        raise NotImplementedError

    def forward(self, row) -> dict[str, torch.Tensor]:
        """The loss parts of a row, each a float32 sum."""
        raise NotImplementedError

    def loss(self, parts: dict, counts: dict[str, float]) -> torch.Tensor:
        """What a row's `parts` add to the loss of a batch that has these `counts`."""
        return sum(self.weights[k] * part / counts[k] for k, part in parts.items())

    def save(self, out: Path) -> None:
        """Writes what was learned into the run directory."""
        raise NotImplementedError


def add_training_arguments(p: argparse.ArgumentParser, lr: float, epochs: float, adapters: bool = True) -> None:
    p.add_argument("--data", required=True, help="training .jsonl or .jsonl.gz: problem, cot, cot_answer")
    p.add_argument("--valid", help="like --data; its loss is measured now and then")
    p.add_argument("--out", required=True, help="run directory; the same command goes on where it stopped")
    p.add_argument("--epochs", type=at_least(0.001, float), default=epochs, help="passes over the data")
    p.add_argument("--max-steps", type=at_least(1), help="optimizer steps, instead of --epochs")
    p.add_argument("--batch-size", type=at_least(1), default=128, help="examples per step, over all ranks")
    p.add_argument("--row-tokens", type=at_least(1), default=8192, help="tokens of a packed row, that is of a micro-batch")
    p.add_argument("--lr", type=at_least(0, float), default=lr, help="peak learning rate")
    p.add_argument("--warmup", type=at_least(0, float, most=0.99), default=0.05, help="share of the steps, before the cosine to zero")
    p.add_argument("--weight-decay", type=at_least(0, float), default=0.01, help="AdamW's, on matrices")
    p.add_argument("--clip", type=at_least(0, float), default=1.0, help="largest gradient norm; 0: any")
    p.add_argument("--valid-every", type=at_least(1), help="steps between validations; default: a tenth of the run")
    p.add_argument("--save-every", type=at_least(1), help="steps between resumable states; default: 10 seconds, or 20 times what the last one "
                   "took, 10 minutes at most")
    p.add_argument("--keep", type=at_least(0), default=0, help="models to keep on the way, at even distances: OUT/step-N, each as good as a run")
    if adapters:
        p.add_argument("--lora-rank", type=at_least(1), help=f"rank of new adapters; alpha is twice that; default: {RANK}")
        p.add_argument("--lora-dropout", type=at_least(0, float, most=0.99), help=f"dropout before new adapters; default: {DROPOUT}")
        p.add_argument("--shard", action="store_true", help="less memory: every rank keeps a share of the frozen layers only")
    else:
        p.set_defaults(shard=False)
    p.add_argument("--checkpoint-activations", action="store_true", help="less memory: backward computes each layer again")


def fitting(examples: list, length, row_tokens: int, rank: int, where: str) -> list:
    """The examples no longer than a row; says how many were skipped. Raises UserError when none is left."""
    kept = [e for e in examples if length(e) <= row_tokens]
    if rank == 0 and len(kept) < len(examples):
        print(f"{where}: skipped {len(examples) - len(kept)} of {len(examples)} examples, "
              f"longer than --row-tokens {row_tokens}")
    if not kept:
        raise UserError(f"{where}: no example fits into --row-tokens {row_tokens}; "
                        f"the shortest needs {min(map(length, examples))}")
    return kept


@lru_cache(maxsize=2)
def _shuffled(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def batch_indices(step: int, batch_size: int, count: int, seed: int) -> list[int]:
    """Which of `count` examples step number `step` (from 0) sees: a function of the seed, so a resumed run goes on alike."""
    places = range(step * batch_size, (step + 1) * batch_size)
    return [int(_shuffled(seed, p // count, count)[p % count]) for p in places]


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over the share `warmup` of the steps, then a cosine to zero."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm + 1) / (steps - warm + 1)))


def _save_state(path: Path, progress: dict, learned: dict, optimizer) -> None:
    tensors = {f"parameter/{n}": p for n, p in learned.items()}
    for n, p in learned.items():
        tensors |= {f"{key}/{n}": optimizer.state[p][key] for key in ("exp_avg", "exp_avg_sq")}
    write_tensors(path, tensors, {"progress": json.dumps(progress)})


def _load_state(path: Path, learned: dict, optimizer) -> dict:
    """The progress of a run whose state is saved at `path`, or of one that begins: what finished.json will say."""
    if not path.exists():
        return {"steps": 0, "loss": None, "valid": None, "seconds": 0.0}
    tensors, metadata = read_tensors(path)
    progress = json.loads(metadata["progress"])
    for n, p in learned.items():
        p.data.copy_(tensors[f"parameter/{n}"])
        moments = {key: tensors[f"{key}/{n}"].to(p) for key in ("exp_avg", "exp_avg_sq")}
        fused = optimizer.defaults["fused"]  # the fused kernel counts its steps on the GPU
        optimizer.state[p] = {"step": torch.tensor(float(progress["steps"]), device=p.device if fused else "cpu")} | moments
    return progress


def _reduced(values: dict[str, float], device) -> dict[str, float]:
    """Sums over all ranks."""
    total = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return dict(zip(values, total.tolist()))


def deal(task: Task, examples: list, row_tokens: int, shape: RowShape | None, rank: int, world: int) -> list[tuple[list, float]]:
    """The rows of a batch that are this rank's, each with its weight: 1, or 0 where it only repeats another.

    All ranks get as many, since sharded layers are gathered by all of them together. Rows are as long as `shape` says, if there is one.
    """
    tokens, most = (shape.tokens, shape.examples) if shape else (row_tokens, None)
    rows = pack([task.length(e) for e in examples], tokens, world, most)
    rows = [[examples[i] for i in indices] for indices in rows]
    mine = rows[rank::world]
    repeats = -(-len(rows) // world) - len(mine)
    return [(row, 1.0) for row in mine] + [(rows[0], 0.0)] * repeats


def flat_gradients(parameters: list[nn.Parameter]) -> torch.Tensor:
    """Gives all parameters a zero gradient and returns these as one vector: ranks add it up in one message."""
    flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = grad.view_as(p)
    return flat


def shard(model, device: torch.device, world: int) -> None:
    """Spreads the frozen layers of `model` over the ranks, which gather a layer when they need it (FSDP2).

    Adapters, embeddings and head stay whole on every rank. Raises UserError without torchrun.
    """
    if not dist.is_initialized():
        raise UserError("--shard: spreads a model over ranks; start the command with torchrun")
    mesh = dist.init_device_mesh(device.type, (world,))
    in_layers = {p for n, p in model.layers.named_parameters() if ".adapters." not in n}
    whole = set(model.parameters()) - in_layers
    for module in [*model.layers, model]:
        fully_shard(module, mesh=mesh, ignored_params=whole)


@torch.no_grad()
def evaluate(task: Task, examples: list, row_tokens: int, shape: RowShape | None, rank: int, world: int, device) -> dict:
    """Mean loss parts over `examples`, without noise and dropout."""
    task.eval()
    sums = {k: 0.0 for k in task.weights}
    for row, real in deal(task, examples, row_tokens, shape, rank, world):
        parts = task(to_device(task.row(row), device, shape))
        sums = {k: sums[k] + real * float(parts[k]) for k in sums}
    task.train()
    counts = task.counts(examples)
    means = {k: v / counts[k] for k, v in _reduced(sums, device).items()}
    return {"loss": sum(task.weights[k] * v for k, v in means.items())} | means


def train(task: Task, examples: list, valid: list | None, args, rank: int, world: int, device: torch.device) -> None:
    """Trains `task` on `examples` into args.out, or goes on with the run that is there. Raises UserError.

    Writes config.json, metrics.jsonl, what task.save writes, and resume.safetensors until the run is finished.
    """
    out = Path(args.out)
    if args.batch_size < world:
        raise UserError(f"--batch-size {args.batch_size}: every one of the {world} ranks needs at least one example a step")
    examples = fitting(examples, task.length, args.row_tokens, rank, args.data)
    valid = fitting(valid, task.length, args.row_tokens, rank, args.valid) if valid else None
    from_rank0(lambda: open_run(out, vars(args) | {"data_hash": file_hash(args.data)}))
    if (out / "finished.json").exists():
        if rank == 0:
            print(f"{out}: is finished already")
        return
    held = hold(out)
    steps = args.max_steps or max(1, math.ceil(args.epochs * len(examples) / args.batch_size))
    valid_every = args.valid_every or max(1, steps // 10)

    if args.shard:
        shard(task.model, device, world)
    task.model.checkpoint_activations = args.checkpoint_activations
    shape = None
    if device.type == "cuda":
        shape = row_shape([task.length(e) for e in examples + (valid or [])], args.batch_size / world, args.row_tokens)
        if not (args.shard or args.checkpoint_activations):  # these are for models so large that launches don't matter
            task.model.graphs = {}
    task.to(device).train()
    learned = {n: p for n, p in task.named_parameters() if p.requires_grad}
    matrices, others = ([p for p in learned.values() if (p.ndim >= 2) == m] for m in (True, False))
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": others, "weight_decay": 0.0}], lr=args.lr,
                                  betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=device.type == "cuda")
    gradients = flat_gradients(list(learned.values()))
    progress = _load_state(out / "resume.safetensors", learned, optimizer)
    first, begin = progress["steps"], time.time() - progress["seconds"]
    due_after = lambda took: time.monotonic() + min(max(10, 20 * took), 600)  # where all weights learn a state is gigabytes
    next_save = due_after(0)
    if rank == 0:
        _truncate_metrics(out / "metrics.jsonl", first)
        learning, total = (sum(p.numel() for p in ps) for ps in (learned.values(), task.parameters()))
        origin = vars(args).get("init") or vars(args).get("phase1") or args.model
        print(f"{args.command}: {learning:,} of {total:,} parameters of {origin} learn from {args.data} ({len(examples)} examples), "
              f"{steps} steps of {args.batch_size} on {world} x {device}" + (f", going on at step {first}" if first else ""))

    def save():
        nonlocal next_save
        if rank == 0:
            start = time.monotonic()
            task.save(out)
            progress["seconds"] = time.time() - begin
            _save_state(out / "resume.safetensors", progress, learned, optimizer)
            next_save = due_after(time.monotonic() - start)

    keeping = {steps * i // (args.keep + 1) for i in range(1, args.keep + 1)}

    def keep(step):
        if rank == 0:
            kept = out / f"step-{step}"
            kept.mkdir(exist_ok=True)
            task.save(kept)
            write_json(kept / "config.json", read_json(out / "config.json"))
            write_json(kept / "finished.json", {"steps": step})  # the last: until then nobody takes it for whole

    metrics = open(out / "metrics.jsonl", "a", encoding="utf-8") if rank == 0 else None
    record = (lambda **values: print(json.dumps(values), file=metrics, flush=True)) if rank == 0 else (lambda **_: None)
    bar = tqdm(total=steps, initial=first, disable=rank > 0, desc=out.name, mininterval=1, dynamic_ncols=True)

    def load(step):
        """The batch of a step; this rank's rows of it, as deal has them, which a thread builds while the GPU is busy."""
        batch = [examples[i] for i in batch_indices(step, args.batch_size, len(examples), args.seed)]
        rows = deal(task, batch, args.row_tokens, shape, rank, world)
        return batch, [(loader.submit(task.row, row), real) for row, real in rows]

    with held, Stopper() as stopper, bar, ThreadPoolExecutor(1) as loader:
        upcoming = load(first)
        for step in range(first, steps):
            tick = time.time()
            torch.manual_seed(hash((args.seed, step, rank)))  # dropout and noise: nothing else to save for a resume
            (batch, rows), upcoming = upcoming, load(step + 1)
            counts, sums = task.counts(batch), {k: 0.0 for k in task.weights}
            for row, real in rows:
                parts = task(to_device(row.result(), device, shape))
                (real * task.loss(parts, counts)).backward()
                sums = {k: sums[k] + real * parts[k].detach() for k in sums}
            if world > 1:
                dist.all_reduce(gradients)

            lr = learning_rate(step, steps, args.lr, args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            grad_norm = nn.utils.clip_grad_norm_(learned.values(), args.clip or math.inf)
            optimizer.step()
            gradients.zero_()

            totals = _reduced(sums | {"stop": float(stopper.asked)}, device)
            stop = totals.pop("stop") > 0
            means = {k: v / counts[k] for k, v in totals.items()}
            loss = sum(task.weights[k] * v for k, v in means.items())
            progress |= {"steps": step + 1, "loss": loss}
            norm = float(grad_norm)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise UserError(f"{out}: at step {step + 1} the loss is {loss:.4g} and the norm of its gradient {norm:.4g}; nothing of "
                                "that step is saved; begin anew, in another --out, with a smaller --lr or other data", shared=True)
            tokens = sum(task.tokens(e) for e in batch)
            record(step=step + 1, loss=loss, **means, lr=lr, grad_norm=norm,
                   tokens_per_s=round(tokens / (time.time() - tick)))
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update()
            if valid and ((step + 1) % valid_every == 0 or step + 1 == steps):
                progress["valid"] = evaluate(task, valid, args.row_tokens, shape, rank, world, device)
                record(step=step + 1, **{f"valid_{k}": v for k, v in progress["valid"].items()})
            if step + 1 in keeping:
                keep(step + 1)
            due = (step + 1) % args.save_every == 0 if args.save_every else time.monotonic() > next_save
            if stop or due or step + 1 == steps:
                save()
            if stop and step + 1 < steps:
                bar.close()
                if rank == 0:
                    print(f"{out}: stopped after step {step + 1} of {steps}; the same command goes on from there")
                raise KeyboardInterrupt
        bar.close()
        if world > 1:
            dist.barrier()  # nobody still looks for the state that is about to go
        if rank == 0:
            metrics.close()
            write_json(out / "finished.json", progress)
            (out / "resume.safetensors").unlink()
            print(f"{out}: loss {progress['loss']:.4f}, " + (f"validation {progress['valid']['loss']:.4f}, " if progress["valid"] else "")
                  + f"{steps} steps, {progress['seconds']:.0f} s")


def _truncate_metrics(path: Path, step: int) -> None:
    """Drops what a run wrote after the state from which it goes on."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        write_text(path, "".join(line + "\n" for line in kept))
