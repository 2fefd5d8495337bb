"""Is an answer right? Numbers are compared here, math-verify judges all else.

All runs in a process of its own, so a hostile answer costs seconds, not the run.
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
    r"(?i)\s*\\?\$?\s*([-+]?(?:\d{1,3}(?:(?:,|\s|\\,|\{,\})\d{3})+|\d{1,40})(?:\.\d{0,40})?)"
    r"(e[-+]?\d{1,2})?\s*(?:\\?%|\s(?!(?:hundred|thousand|million|billion|and|plus|minus)\b)"
    r"[a-z]{2,}(?:\s[a-z]+)*)?\s*[.,]?\s*"
)


def boxed(text):
    """The content of the last \\boxed{...} in `text`, braces balanced. None where there is none."""
    if found := BOX.findall(text):
        return found[-1][1:-1]


def number(text):
    """The number that `text` looks like: 72, $72, 1,234, 7.2e1, 18%, 7 dollars. 3 million: None."""
    if found := NUMBER.fullmatch(text):
        return Fraction(re.sub(r"[^\d.+-]", "", found[1]) + (found[2] or ""))


def judge(gold, text, parse, verify):
    """Whether the last \\boxed{} of `text`, or else what math-verify finds, equals `gold`.

    Integers are equal exactly, decimals within 1e-4 of the larger one.
    """
    try:
        if (answer := boxed(text)) is not None:
            a, b = number(gold), number(answer)
            if answer.strip() == gold.strip():
                return True
            if None not in (a, b):
                decimal = a.denominator * b.denominator > 1
                return a == b or decimal and math.isclose(a, b, rel_tol=1e-4)
            text = f"\\boxed{{{answer}}}"
        found = [parse(x, parsing_timeout=None) for x in (f"\\boxed{{{gold}}}", text)]
        return bool(verify(*found, timeout_seconds=None))
    except Exception:
        return False


def grade(pairs, seconds=10):
    """Whether the answers are right: [(gold, text), ...] -> [bool, ...].

    A worker judges them. `seconds` limits its CPU time for one answer. An answer that ends the
    worker is wrong, and another worker goes on.
    """
    if not pairs:
        return []
    lines = "".join(json.dumps([gold, text[-LONGEST:]]) + "\n" for gold, text in pairs)
    done = subprocess.run(
        [sys.executable, __file__, str(seconds)], input=lines, stdout=subprocess.PIPE, text=True
    )
    if done.returncode > 0:
        raise RuntimeError("the grader does not start; is math-verify installed?")
    verdicts = [word == "True" for word in done.stdout.split()]
    if done.returncode:
        verdicts += [False, *grade(pairs[len(verdicts) + 1 :], seconds)]
    return verdicts


def serve(seconds):
    """The worker: answers JSON lines [gold, text] with True or False. Ends with its parent."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    from math_verify import parse, verify

    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    for line in sys.stdin:
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + seconds, -1))
        print(judge(*json.loads(line), parse, verify), flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
