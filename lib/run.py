"""One process or many under torchrun, and the directory that they write to."""

import atexit
from contextlib import contextmanager
from dataclasses import asdict, dataclass
import fcntl
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist

from lib.errors import UserError
from lib.files import read_json, write_json

# Settings that may differ when a run goes on. A fact (the data's hash, ...) may not.
FREE = """out device data model phase1 cache save_every keep arms shard checkpoint_activations
train rates"""


@dataclass(frozen=True)
class Process:
    """This process, one of `world`. `device` is its own."""

    rank: int
    world: int
    device: torch.device

    @property
    def main(self):
        return self.rank == 0

    @property
    def dtype(self):
        """Of a frozen base, and of arithmetic: bfloat16 on a GPU."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def say(self, line):
        if self.main:
            print(line, flush=True)

    def sum(self, values):
        """The sum of each value over all ranks, as floats."""
        total = torch.tensor([*map(float, values)], dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()


def join(device):
    """This process and its device; joins torchrun's process group if there is one.

    `device` is "cpu", "cuda", "cuda:N", or "" for a GPU if there is one.
    """
    env = os.environ.get
    rank, world, local = int(env("RANK", 0)), int(env("WORLD_SIZE", 1)), int(env("LOCAL_RANK", 0))
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = torch.device(f"cuda:{local}" if name == "cuda" else name)
    torch.zeros(1, device=chosen)  # fails here where there is no such device
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return Process(rank, world, chosen)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def from_rank0(function):
    """Calls `function` on rank 0 and returns its result on all ranks. Its error ends all ranks."""
    if not dist.is_initialized():
        return function()
    box = [function() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    return box[0]


@contextmanager
def output_directory(out, settings=None, **facts):
    """Locks the directory `out` for this process group, and makes or checks out/config.json.

    A directory is taken if it is new, empty, or was made by this function. Temporary files of
    killed processes are removed. config.json holds `settings`, a dataclass, and `facts`. Raises
    UserError if another command or other settings made what is there. Yields the path.
    """
    out = Path(out)
    locks = []  # a lock lasts as long as its file is open

    def take():
        if out.exists() and not (out / ".lock").exists() and any(out.iterdir()):
            raise UserError(f"{out}: exists and was not made by this program; choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        locks.append(open(out / ".lock", "w"))
        try:
            fcntl.flock(locks[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{out}: another process works on it; wait, or choose another --out"
            ) from None
        except OSError:
            pass  # a file system without locks
        for temporary in out.rglob(".*.tmp"):
            temporary.unlink()
        if settings:
            begin_or_continue(out, settings, facts)

    from_rank0(take)
    yield out


def begin_or_continue(out, settings, facts):
    """Writes config.json, or compares it if there are results.

    A missing key is a default. A missing `command` is another command.
    """
    path = out / "config.json"
    new = facts | asdict(settings) | facts  # facts come first and win
    if not (path.exists() and [*out.rglob("*.safetensors"), *out.glob("*.*.jsonl")]):
        return write_json(path, new)
    old = read_json(path)
    for key in new:
        default = None if key == "command" else getattr(type(settings), key, new[key])
        was = json.dumps(old.get(key, default))
        if (key in facts or key not in FREE.split()) and was != json.dumps(new[key]):
            raise UserError(
                f"{out}: was made with {key} = {was}, not {json.dumps(new[key])}; "
                "choose another --out, or the same settings"
            )
