"""Run directories and the habits of all commands: settings, atomic files, errors in one sentence, devices and ranks."""

import argparse
from contextlib import ExitStack, contextmanager, suppress
import fcntl
from functools import cache
import gc
import hashlib
import json
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys

from safetensors import SafetensorError, safe_open
import safetensors.torch
import torch
import torch.distributed as dist


class UserError(Exception):
    """A mistake of the user's, told in one sentence: what is wrong, where, what to do. shared: all ranks raise it, rank 0 speaks."""

    def __init__(self, sentence: str, shared: bool = False):
        super().__init__(sentence)
        self.shared = shared


def read_json(path: str | Path) -> dict:
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is {Path(path).parent} the right directory?") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise UserError(f"{path}: cannot be read as JSON ({e})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object")
    return value


@contextmanager
def atomic(path: str | Path):
    """Yields a temporary path beside `path`; renames it to `path` at the end, or removes it if anything fails."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except (OSError, SafetensorError, UnicodeEncodeError) as e:
        raise UserError(f"{path}: cannot be written ({e}); the previous version, if any, is untouched") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text(path: str | Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def save_file(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """safetensors' own, for all whom the umask lets read: that makes files for their owner alone."""
    path.touch()
    mode = path.stat().st_mode
    safetensors.torch.save_file(tensors, path, metadata)
    path.chmod(mode)


def write_tensors(path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    with atomic(path) as temporary:
        save_file({k: t.detach().contiguous() for k, t in tensors.items()}, temporary, metadata)


def read_tensors(path: str | Path, device="cpu") -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file."""
    try:
        with safe_open(path, "pt", device=str(device)) as f:
            return {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path}: not a whole safetensors file ({e}); fetch or make it again") from None


def file_hash(*paths: str | Path) -> str:
    """Short SHA-256 over the bytes of the files, in order."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            with open(path, "rb") as f:
                while block := f.read(1 << 20):
                    digest.update(block)
        except OSError as e:
            raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    return digest.hexdigest()[:16]


# ---- ranks and devices: one process, or many under torchrun ----

def start(device: str | None) -> tuple[int, int, torch.device]:
    """(rank, world size, device); joins torchrun's process group if there is one, NCCL on GPUs and gloo without."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if name.startswith("cuda:") and "RANK" in os.environ:
            raise RuntimeError("under torchrun each rank takes a GPU of its own; leave it out")
        if name == "cuda" and local >= torch.cuda.device_count():
            raise RuntimeError(f"rank {rank} finds {torch.cuda.device_count()} GPUs; start no more ranks than that")
        chosen = torch.device(f"cuda:{local}" if name == "cuda" else name)
        if chosen.type not in ("cpu", "cuda"):
            raise RuntimeError("only CPUs and CUDA GPUs are")
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name}: not usable here ({str(e).splitlines()[0]})") from None
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return rank, world, chosen


def from_rank0(function):
    """The result of `function`, called on rank 0 alone and told to all; a UserError is raised on all."""
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
        raise UserError(box[1], shared=True)
    return box[0]


def free_memory(device: torch.device) -> float:
    """Bytes that a GPU has left, those included that PyTorch keeps for later; a CPU is not asked."""
    if device.type != "cuda":
        return float("inf")
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@cache
def _compiled(function, **options):
    return torch.compile(function, options=options or None)


def fused(function, x: torch.Tensor):
    """`function`; where `x` is on a GPU, compiled (anew only when a second size comes), its pointwise work fused into few kernels.

    For one token, a single row of `x`, products are fused too, and small ones join: all that they do is to read weights.
    """
    if not x.is_cuda:
        return function
    return _compiled(function, coordinate_descent_tuning=True, combo_kernels=True) if len(x) == 1 else _compiled(function)


# ---- run directories ----

# What may differ when a run goes on; the hash of --data may not, and a cache is compared with data and model.
FREE = {"out", "device", "data", "valid", "cache", "save_every", "valid_every", "keep", "shard", "checkpoint_activations"}


def is_free(out: Path) -> bool:
    """Whether `out` may become an output directory: it is not there, or empty."""
    return not out.exists() or out.is_dir() and not any(out.iterdir())


def locked(path: Path, wait: bool = True):
    """The file `path` as this process's own until it is closed; BlockingIOError if another process has it and shall not be waited for."""
    file = open(path, "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:
        pass  # a file system without locks
    return file


def hold(out: Path) -> ExitStack:
    """The directory `out` as the own of this process, or of all ranks, until what is returned is closed; UserError if others have it.

    What a process left that was killed while it wrote is removed.
    """
    held = ExitStack()  # of rank 0's lock

    def take():
        try:
            held.enter_context(locked(out / ".lock", wait=False))
        except BlockingIOError:
            raise UserError(f"{out}: another process is at work on it; wait for that, or choose another --out") from None
        for temporary in list(out.rglob(".*.tmp")):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)
    from_rank0(take)
    return held


def open_run(out: str | Path, settings: dict) -> None:
    """Makes the run directory `out` with its config.json, or checks that it is this very run."""
    out = Path(out)
    config = out / "config.json"
    if not config.exists():
        if not is_free(out):
            raise UserError(f"{out}: is there already and is no run directory; choose another --out")
        write_json(config, settings)
        return
    old = read_json(config)
    for key in sorted(settings.keys() | old.keys()):
        if key not in FREE and old.get(key) != settings.get(key):
            raise UserError(f"{out}: belongs to another run ({key} is {old.get(key)!r} there, {settings.get(key)!r} here); "
                            "choose another --out, or the same settings to go on")


class Stopper:
    """Turns Ctrl-C and SIGTERM into a flag, so that a run ends after a whole step; a second Ctrl-C ends it at once."""

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


# ---- command lines ----

class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines; appends defaults, except where there is none or the text speaks of it."""

    def _get_help_string(self, action):
        return action.help if action.default is None or "default" in action.help else super()._get_help_string(action)


def parser(description: str, seed: bool = True, device: bool = True) -> argparse.ArgumentParser:
    """A parser with the flags that commands share."""
    p = argparse.ArgumentParser(description=description, formatter_class=_Help)
    if seed:
        p.add_argument("--seed", type=at_least(0, most=2**63 - 1), default=1, help="of every random choice")
    if device:
        p.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    return p


def at_least(low, kind=int, most=None):
    """An argparse type: a finite number not below `low`, and not above `most` if that is given."""
    def number(text):
        value = kind(text)
        if not low <= value < float("inf") or most is not None and value > most:
            raise argparse.ArgumentTypeError(f"must be a number of at least {low}{'' if most is None else f' and at most {most}'}, not {text}")
        return value
    number.__name__ = kind.__name__
    return number


def finished_run(path: str | Path, command: str) -> dict:
    """The settings of the run of `command` (a script's name) in `path`; UserError if it is no such run, or not finished."""
    path = Path(path)
    config = read_json(path / "config.json")
    if config.get("command") != command:
        raise UserError(f"{path}: is no run of {command}.py")
    if not (path / "finished.json").exists():
        raise UserError(f"{path}: this run is not finished; start its command again, it goes on where it stopped")
    return config


def call(script: str, settings: str, lock=None, **paths) -> None:
    """Runs another script of this program with the flags `settings` and --key value for each of `paths` (a value may be a list); ends
    this one, with its exit code, if it fails. Ctrl-C reaches it too, and SIGTERM is passed on: it saves what it has. The file `lock`
    stays open as long as it runs, even if this program is killed."""
    flags = [str(x) for key, value in paths.items() for x in ("--" + key, *(value if isinstance(value, list) else [value]))]
    process = subprocess.Popen([sys.executable, Path(__file__).parent / script, *flags, *settings.split()],
                               pass_fds=[] if lock is None else [lock.fileno()])
    asked = []

    def stop(number, frame):
        asked.append(128 + number)
        process.terminate()
    old = signal.signal(signal.SIGTERM, stop)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        code = process.wait() or 130
    signal.signal(signal.SIGTERM, old)
    if code or asked:
        sys.exit(code or asked[0])


def run_main(main) -> None:
    """Calls main(); a UserError becomes one line on stderr and exit code 1."""
    gc.set_threshold(100_000)  # examples are lists by the million, which the default walks over again and again while they are read
    code = 0
    try:
        main()
    except UserError as e:
        rank = int(os.environ.get("RANK", 0))
        if not (rank and e.shared):
            print("error: " + (f"rank {rank}: " if rank else "") + str(e), file=sys.stderr)
        code = 1
    except OSError as e:  # a full disk, mostly; what was saved before is whole
        print(f"error: {e.filename or 'a file'}: {e.strerror}; mend that and start the command again", file=sys.stderr)
        code = 1
    except torch.OutOfMemoryError as e:
        print("error: out of GPU memory; --checkpoint-activations needs less, and so, in another --out, do fewer --row-tokens or a smaller "
              f"--batch-size ({e})", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 130
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)
