"""One line for every error. Importing this module installs the hook that prints it."""

import os
from pathlib import Path
import sys
import traceback

ROOT = str(Path(__file__).resolve().parent.parent)


class UserError(Exception):
    """A user's mistake in one sentence: what is wrong, where, what to do.

    everywhere: all ranks raise it, and rank 0 prints it.
    """

    def __init__(self, sentence, everywhere=False):
        super().__init__(sentence)
        self.everywhere = everywhere


def is_ours(frame):
    return frame.filename.startswith(ROOT) and ".venv" not in frame.filename


def explain(error):
    """The line for `error`. Empty where there is nothing to say: Ctrl-C, or a closed pipe."""
    text = " ".join(str(error).split())[:500]
    if isinstance(error, (KeyboardInterrupt, BrokenPipeError)):
        return ""
    if isinstance(error, UserError):
        return "" if error.everywhere and os.environ.get("RANK", "0") != "0" else text
    if isinstance(error, MemoryError) or "memory" in text and "alloc" in text:
        return "out of memory; use --checkpoint-activations or smaller --row-tokens, --batch-size"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    frames = traceback.extract_tb(error.__traceback__)
    place = [f" in {Path(f.filename).name}:{f.lineno}" for f in frames if is_ours(f)]
    where = f"{type(error).__name__}{(place or [''])[-1]}"
    return f"{where}: {text}; set LATENT_SFT_DEBUG=1 for the traceback"


def report(kind, error, trace):
    """Prints the line of an uncaught exception to stderr. Has the signature of sys.excepthook."""
    if os.environ.get("LATENT_SFT_DEBUG"):
        sys.__excepthook__(kind, error, trace)
    elif line := explain(error):
        print(f"error: {line}", file=sys.stderr)
    if isinstance(error, BrokenPipeError):  # nothing more can be printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


sys.excepthook = report
if hasattr(sys.stdout, "reconfigure"):
    sys.stdout.reconfigure(errors="replace")
