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


def matching(pattern):
    """The type of a setting: text that matches `pattern` as a whole."""

    def text(text):
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"{text!r} is none of {pattern}")
        return text

    return text


def comments(settings):
    """The comment behind each field of a dataclass and of those that it extends."""
    source = "".join(inspect.getsource(cls) for cls in settings.__mro__[-2::-1])
    found = re.findall(r"^    (\w+):.*?#\s(.*)$", source, re.M)
    return {name: text.replace("%", "%%") for name, text in found}


def parse(settings, description):
    """An instance of the dataclass `settings`, read from the command line."""
    form, texts = argparse.RawDescriptionHelpFormatter, comments(settings)
    p = argparse.ArgumentParser(description=description, formatter_class=form)
    for f in fields(settings):
        flag, text, default = "--" + f.name.replace("_", "-"), texts[f.name], f.default
        if f.type is bool:
            p.add_argument(flag, action="store_true", help=text)
            continue
        more, (kind, *many) = {"required": True}, get_args(f.type) or [f.type]  # a tuple, or one
        if default is not MISSING:
            more = {"default": default}
            text += f" (default: {str(default).strip('(),')})" if default != "" else ""
        kind = number(kind) if kind in (int, float) else kind
        p.add_argument(flag, type=kind, nargs="+" if many else None, help=text, **more)
    values = vars(p.parse_args())
    return settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
