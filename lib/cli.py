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


def one_of(*names):
    """The type of a setting: one of the `names`."""

    def name(text):
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(names)}")
        return text

    return name


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
        flag, text, kind = "--" + f.name.replace("_", "-"), texts[f.name], f.type
        if kind is bool:
            p.add_argument(flag, action="store_true", help=text)
            continue
        more = {"required": True} if f.default is MISSING else {"default": f.default}
        if get_args(kind):  # a tuple
            kind, more["nargs"] = get_args(kind)[0], "+"
        if kind in (int, float):
            kind = number(kind)
        if more.get("default", "") != "":
            text += f" (default: {str(f.default).strip('(),')})"
        p.add_argument(flag, type=kind, help=text, **more)
    values = vars(p.parse_args())
    return settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
