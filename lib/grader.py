"""Is an answer right? Numbers are compared here.

math-verify judges all else in a process of its own, so a hostile answer costs seconds, not the run.
"""

import ctypes
from fractions import Fraction
import json
import logging
import math
import re
import resource
import signal
import subprocess
import sys
import time

import regex

LONGEST = 2000  # characters of an answer that are looked at, from its end
BOX = regex.compile(r"\\boxed(\{(?:[^{}]|(?1))*+\})")
NUMBER = re.compile(
    r"\s*\\?\$?\s*([-+]?(?:\d{1,3}(?:(?:,|\s|\\,|\{,\})\d{3})+|\d{1,40})(?:\.\d{0,40})?)"
    r"(e[-+]?\d{1,2})?\s*(?:\\?%|\s[a-z]{2,}(?:\s[a-z]+)*)?\s*[.,]?\s*",
    re.IGNORECASE,
)


def boxed(text):
    """The content of the last \\boxed{...} in `text`, braces balanced. None where there is none."""
    found = BOX.findall(text)
    return found[-1][1:-1] if found else None


def number(text):
    """The number that `text` looks like: 72, $72, 1,234, 7.2e1, 18%, 72 dollars. Or None."""
    if found := NUMBER.fullmatch(text):
        return Fraction(re.sub(r"[^\d.+-]", "", found[1]) + (found[2] or ""))


def compare(gold, answer):
    """Whether two texts are equal, or equal numbers. None: math-verify must judge.

    Integers are equal exactly, decimals within 1e-4 of the larger one.
    """
    a, b = number(gold), number(answer)
    if gold.strip() == answer.strip() or None in (a, b):
        return gold.strip() == answer.strip() or None
    return a == b or a.denominator * b.denominator > 1 and math.isclose(a, b, rel_tol=1e-4)


def grade(pairs, seconds=10):
    """Whether the answers are right: [(gold, text), ...] -> [bool, ...].

    An answer is the last \\boxed{} of its text, or else what math-verify finds in the text.
    `seconds` limits the time for one answer.
    """
    pairs = [(gold, boxed(text[-LONGEST:]), text[-LONGEST:]) for gold, text in pairs]
    verdicts = [None if answer is None else compare(gold, answer) for gold, answer, _ in pairs]
    asked = iter(ask([pair for pair, v in zip(pairs, verdicts) if v is None], seconds))
    return [next(asked) if v is None else v for v in verdicts]


def ask(pairs, seconds):
    """math-verify's verdicts. A pair that ends the worker is wrong, and another worker goes on."""
    if not pairs:
        return []
    import math_verify  # noqa: F401  fails here where it is not installed

    lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
    command = [sys.executable, __file__, str(seconds)]
    done = subprocess.run(command, input=lines, stdout=subprocess.PIPE, text=True)
    found = [word == "True" for word in done.stdout.split()]
    rest = pairs[len(found) + 1 :]
    return found + [False] + ask(rest, seconds) if len(found) < len(pairs) else found


def serve(seconds):
    """The worker: answers JSON lines with True or False. Ends with its parent."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    from math_verify import parse, verify

    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    for line in sys.stdin:
        gold, answer, text = json.loads(line)
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + seconds, -1))
        texts = f"\\boxed{{{gold}}}", text if answer is None else f"\\boxed{{{answer}}}"
        try:
            found = [parse(x, parsing_timeout=None) for x in texts]
            print(bool(verify(*found, timeout_seconds=None)), flush=True)
        except Exception:
            print(False, flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
