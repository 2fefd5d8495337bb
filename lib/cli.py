"""A command line made from a dataclass. A field's comment is the help text of its flag."""

import argparse
from dataclasses import MISSING, fields
import inspect
import math
import re
from typing import get_args


def number(kind):
    """The type of a numeric flag: finite and not negative."""

    def convert(text):
        value = kind(text)
        if not 0 <= value < math.inf:
            raise ValueError
        return value

    convert.__name__ = f"{kind.__name__} (0 or more)"
    return convert


def comments(settings):
    """The comment behind each field of a dataclass, its base classes included."""
    source = "".join(inspect.getsource(cls) for cls in settings.__mro__[-2::-1])
    found = re.findall(r"^    (\w+):.*?#\s(.*)$", source, re.M)
    return {name: text.replace("%", "%%") for name, text in found}


def parse(settings, description):
    """An instance of the dataclass `settings`, read from the command line."""
    p, texts = argparse.ArgumentParser(description=description), comments(settings)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    for f in fields(settings):
        many, text = get_args(f.type), texts[f.name]
        kind = many[0] if many else f.type  # a tuple takes several values
        if kind is not bool and f.default not in (MISSING, ""):
            text += f" (default: {str(f.default).strip('(),')})"
        kind = number(kind) if kind in (int, float) else kind
        value = {"type": kind, "nargs": "+" if many else None}
        more = {"action": "store_true"} if kind is bool else value
        more["required"] = f.default is MISSING
        p.add_argument("--" + f.name.replace("_", "-"), help=text, default=f.default, **more)
    values = vars(p.parse_args()).items()
    return settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in values})
