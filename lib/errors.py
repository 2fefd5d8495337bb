"""One line for every error. Importing this module installs the hook that prints it."""

import os
from pathlib import Path
import sys
import traceback

ROOT = str(Path(__file__).resolve().parent.parent)


class UserError(Exception):
    """A user's mistake in one sentence: what is wrong, where, what to do."""


def explain(error):
    """The line for `error`. Empty where there is nothing to say.

    That is so for Ctrl-C, for a closed pipe, and for a rank that another one left.
    """
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename2 or error.filename}: {error.strerror}"
    if isinstance(error, (KeyboardInterrupt, BrokenPipeError)) or "closed by peer" in text:
        return ""
    if isinstance(error, MemoryError) or "memory" in text and "alloc" in text:
        return "out of memory; use smaller sizes (--row-tokens, ...) or --checkpoint-activations"
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if f.filename.startswith(ROOT) and ".venv" not in f.filename]
    place = "".join(f" in {Path(f.filename).name}:{f.lineno}" for f in ours[-1:])
    return f"{type(error).__name__}{place}: {text}; set LATENT_SFT_DEBUG=1 for the traceback"


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
