"""One process or many under torchrun, and the directory that they write to."""

import atexit
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
import fcntl
import gc
import json
import os
from pathlib import Path
import signal

import torch
import torch.distributed as dist

from lib.errors import UserError
from lib.files import read_json, write_json

# Settings that may differ when a run goes on. The hash of the data may not.
FREE = "out device data valid model phase1 cache save_every keep arms shard".split()
FREE += ["checkpoint_activations"]


@dataclass(frozen=True)
class Process:
    """This process among `world` others. `device` is its own."""

    rank: int
    world: int
    device: torch.device

    @property
    def main(self):
        return self.rank == 0

    def say(self, line):
        if self.main:
            print(line, flush=True)

    def sum(self, values):
        """The sum of each value over all ranks, as floats."""
        total = torch.tensor([float(x) for x in values], dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()


def join(device) -> Process:
    """This process and its device; joins torchrun's process group if there is one.

    `device` is "cpu", "cuda", "cuda:N", or "" for a GPU if there is one.
    """
    gc.set_threshold(100_000)  # millions of small lists: the default walks them again and again
    names = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    rank, world, local = (int(os.environ.get(name, default)) for name, default in names)
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(f"cuda:{local}" if name == "cuda" else name)
        torch.zeros(1, device=chosen)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
    except (RuntimeError, AssertionError):
        gpus = f"this machine has {torch.cuda.device_count()} usable GPUs"
        raise UserError(f"--device {name}: rank {rank} cannot use it; {gpus}") from None
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return Process(rank, world, chosen)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def from_rank0(function):
    """Calls `function` on rank 0 and returns its result on all ranks. All raise its UserError."""
    if not dist.is_initialized():
        return function()
    box = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = function()
        except UserError as e:
            box[1] = str(e)
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise UserError(box[1], everywhere=True)
    return box[0]


def free_memory(device):
    """Bytes that PyTorch can still take on a GPU. Infinite on a CPU."""
    if device.type != "cuda":
        return float("inf")
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


@contextmanager
def output_directory(out, settings=None, **facts):
    """Locks the directory `out` for this process group, and makes or checks out/config.json.

    A directory is taken if it is new, empty, or was made by this function. Temporary files of
    killed processes are removed. config.json holds `settings`, a dataclass, and `facts`. Raises
    UserError where others made what is there. Yields the path.
    """
    out = Path(out)

    def take():
        foreign = out.exists() and not (out / ".lock").exists()
        if foreign and (not out.is_dir() or any(not f.name.startswith(".") for f in out.iterdir())):
            raise UserError(f"{out}: exists and was not made by this program; choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another process works on it; choose another --out") from None
        except OSError:
            pass  # a file system without locks
        for temporary in out.rglob(".*.tmp"):
            temporary.unlink()
        if settings:
            defaults = {f.name: f.default for f in fields(settings)}
            begin_or_continue(out / "config.json", asdict(settings) | facts, defaults)
        locks.append(lock)

    locks = []  # the lock lasts as long as the file is open
    from_rank0(take)
    try:
        yield out
    finally:
        for lock in locks:
            lock.close()


def begin_or_continue(path, new, defaults):
    """Writes config.json, or compares it if there are results. A missing key is a default."""
    new, files = json.loads(json.dumps(new)), path.parent.rglob("*")
    kinds = (".safetensors", ".jsonl")
    if not (path.exists() and any(f.suffix in kinds and f.name != "metrics.jsonl" for f in files)):
        return write_json(path, new)
    old = json.loads(json.dumps(defaults, default=str)) | read_json(path)
    for key in new.keys() - set(FREE):
        if old.get(key) != new[key]:
            was = f"was made with {key} = {old.get(key)!r}, not {new[key]!r}"
            raise UserError(f"{path.parent}: {was}; choose another --out, or the same settings")


class Stopper:
    """Turns Ctrl-C and SIGTERM into a flag, so that a run ends after a whole step.

    A second Ctrl-C ends it at once.
    """

    def __enter__(self):
        self.asked = False
        self.old = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number, frame):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_):
        for number, handler in self.old.items():
            signal.signal(number, handler)
