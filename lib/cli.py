"""A command line made from a class of settings. A field's comment is the help text of its flag."""

import argparse
from dataclasses import MISSING, dataclass, fields
import inspect
import re
from typing import get_args

settings = dataclass(frozen=True, kw_only=True)  # decorates a class of settings


def number(kind, low=0, high=1e300):
    """The type of a numeric flag, from `low` to `high`. Plain int and float are 0 or more."""

    def convert(text):
        value = kind(text)
        if not low <= value <= high:
            raise ValueError
        return value

    convert.__name__ = f"{kind.__name__} ({low} or more)"
    return convert


Count, Share, Positive = number(int, 1), number(float, 0, 1), number(float, 1e-6)
Share.__name__ = "share (0 to 1)"


def comments(cls):
    """The comment after each field of a class of settings, its base classes included."""
    source = "".join(inspect.getsource(base) for base in cls.__mro__[-2::-1])
    return dict(re.findall(r"^    (\w+):.*?#\s(.*)$", source, re.M))


def parse(cls, description):
    """An instance of the settings `cls`, read from the command line."""
    p = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    texts = comments(cls)
    for f in fields(cls):
        kind, *many = *get_args(f.type), f.type  # tuple[kind, ...] takes several values
        text = texts[f.name]
        choices = get_args(kind)  # Literal["a", "b"] takes these words
        if kind is bool:
            more = {"action": "store_true"}
        else:
            if f.default not in (MISSING, ""):
                text += f" (default: {str(f.default).strip('(),')})"
            kind = number(kind) if kind in (int, float) else kind
            more = {
                "type": str if choices else kind,
                "choices": choices or None,
                "nargs": "+" if many else None,
                "required": f.default is MISSING,
            }
        p.add_argument("--" + f.name.replace("_", "-"), help=text, default=f.default, **more)
    return cls(**vars(p.parse_args()))
