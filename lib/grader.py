"""Is an answer right? Numbers are compared here.

math-verify judges all else in a process of its own, so a hostile answer costs seconds, not the run.
"""

import ctypes
import json
import logging
import math
import re
import resource
import select
import signal
import subprocess
import sys
import time

LONGEST = 2000  # characters of an answer that are looked at, from its end
NUMBER = re.compile(
    r"\s*\\?\$?\s*([-+]?(?:\d{1,3}(?:(?:,|\s|\\,|\{,\})\d{3})+|\d{1,40})(?:\.\d{0,40})?)"
    r"(e[-+]?\d{1,2})?\s*(?:\\?%|\s[a-z]{2,}(?:\s[a-z]+)*)?\s*[.,]?\s*",
    re.IGNORECASE,
)


def boxed(text):
    """The content of the last \\boxed{...} in `text`, braces balanced. None where there is none."""
    start = text.rfind("\\boxed{")
    depth = 0
    for i in range(start + 6, len(text) if start >= 0 else 0):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start + 7 : i]


def number(text):
    """The number that `text` looks like: 72, $72, 1,234, 7.2e1, 18%, 72 dollars. Or None."""
    if found := NUMBER.fullmatch(text):
        digits = re.sub(r"[^\d.+-]", "", found[1]) + (found[2] or "")
        return int(digits) if digits.lstrip("+-").isdigit() else float(digits)


class Grader:
    """grade(gold, text). `seconds` is the limit for one answer."""

    def __init__(self, seconds=10.0):
        self.seconds, self.worker = seconds, None

    def grade(self, gold, text):
        """Whether the last \\boxed{} of `text`, or else what math-verify finds, equals `gold`.

        Integers are equal exactly, decimals within 1e-4 of the larger one.
        """
        answer = boxed(text[-LONGEST:])
        if answer is None:
            return self._ask(gold, text[-LONGEST:])
        ours, theirs = number(answer), number(gold)
        if answer.strip() == gold.strip() or None in (ours, theirs):
            return answer.strip() == gold.strip() or self._ask(gold, f"\\boxed{{{answer}}}")
        return (
            ours == theirs
            or bool(ours % 1 or theirs % 1)
            and math.isclose(ours, theirs, rel_tol=1e-4)
        )

    def _ask(self, gold, answer):
        if self.worker is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self.worker = subprocess.Popen([sys.executable, __file__], text=True, **pipes)
            if not self.worker.stdout.readline():  # "ready": imports do not count as grading
                raise RuntimeError("math-verify does not start; is it installed?")
        try:
            print(json.dumps([gold, answer]), file=self.worker.stdin, flush=True)
            answered = select.select([self.worker.stdout], [], [], self.seconds)[0]
            if answered and (verdict := self.worker.stdout.readline()):
                return json.loads(verdict)
        except BrokenPipeError:
            pass
        self.worker.kill()  # too slow, or dead
        self.worker = None
        return False


def serve():
    """Answers JSON lines [gold, answer] on stdin with true or false. Ends with its parent."""
    from math_verify import parse, verify

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    print("ready", flush=True)
    for line in sys.stdin:
        gold, answer = json.loads(line)
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 60, -1))
        try:
            texts = f"\\boxed{{{gold}}}", answer
            verdict = verify(*(parse(x, parsing_timeout=None) for x in texts), timeout_seconds=None)
        except Exception:
            verdict = False
        print(json.dumps(bool(verdict)), flush=True)


if __name__ == "__main__":
    serve()
