"""Is an answer right? Plain numbers have to be equal, exactly; of all else math-verify decides, in a process of its own: a hostile
answer costs seconds, not the run."""

from decimal import Decimal
import json
import re
import select
import subprocess
import sys

LONGEST = 2000  # characters of an answer that are looked at, from its end


def boxed(text: str) -> str | None:
    """The content of the last \\boxed{...} in `text`, braces balanced; None where there is none."""
    start = text.rfind("\\boxed{")
    depth = 0
    for i in range(start + 6, len(text) if start >= 0 else 0):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start + 7:i]
    return None


def _number(text: str) -> Decimal | None:
    """The plain decimal number that `text` is, with or without thousands separators; None for anything else."""
    plain = re.fullmatch(r"\s*\$?([-+]?(?:\d{1,40}|\d{1,3}(?:,\d{3}){1,12})(?:\.\d{0,40})?)\s*", text)
    return Decimal(plain[1].replace(",", "")) if plain else None


class Grader:
    """`grade(gold, text)`; use as a context manager. `seconds` is the limit for one answer; what runs over it is wrong."""

    def __init__(self, seconds: float = 10.0):
        self.seconds, self.worker = seconds, None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.worker:
            self.worker.kill()
            self.worker.wait()
        self.worker = None

    def grade(self, gold: str, text: str) -> bool:
        """Whether the model's `text` ends in an answer (its last \\boxed{}, else what math-verify finds) equal to `gold`."""
        answer = boxed(text[-LONGEST:])
        if answer is not None:
            if answer.strip() == gold.strip():
                return True
            ours, theirs = _number(answer), _number(gold)
            if ours is not None and theirs is not None:
                return ours == theirs
        return self._ask(gold, text[-LONGEST:] if answer is None else f"\\boxed{{{answer}}}")

    def _ask(self, gold: str, answer: str) -> bool:
        if self.worker is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self.worker = subprocess.Popen([sys.executable, __file__], text=True, **pipes)
            if not self.worker.stdout.readline():  # it says that it is ready: imports do not count against the limit
                from runs import UserError  # here, so that the worker need not load torch
                raise UserError("grade.py: math-verify does not start; is it installed? (pip install -r requirements.txt)")
        try:
            print(json.dumps([gold, answer]), file=self.worker.stdin, flush=True)
            if select.select([self.worker.stdout], [], [], self.seconds)[0] and (verdict := self.worker.stdout.readline()):
                return json.loads(verdict)
        except BrokenPipeError:
            pass
        self.__exit__()  # too slow, or dead
        return False


def _serve() -> None:
    """Answers JSON lines [gold, answer] on stdin with true or false on stdout."""
    import logging
    from math_verify import parse, verify
    logging.disable()
    print("ready", flush=True)
    for line in sys.stdin:
        gold, answer = json.loads(line)
        try:
            reference, found = (parse(x, parsing_timeout=None) for x in (f"\\boxed{{{gold}}}", answer))
            verdict = verify(reference, found, timeout_seconds=None)
        except Exception:
            verdict = False
        print(json.dumps(bool(verdict)), flush=True)


if __name__ == "__main__":
    _serve()
