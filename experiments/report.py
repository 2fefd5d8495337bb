"""The table and the picture of results/results.json.

    python -m experiments.report                     # results/table.md, results/<task>.svg

A picture for each task: accuracy over the share of the written chain.
"""

import lib.errors  # noqa: F401  from here on an error is one line

from dataclasses import dataclass
import json
from pathlib import Path

from experiments.figures import draw_points
from lib.cli import parse
from lib.files import reading, write_text


@dataclass(frozen=True, kw_only=True)
class Settings:
    directory: str = "results"  # holds results.json, gets table.md and the pictures


def table(head, rows):
    """A table in Markdown."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *rows))


def report(directory) -> str:
    """Writes table.md and the pictures into the directory of results.json. Returns the table."""
    parts = []
    with reading(directory / "results.json"):
        rows = json.loads((directory / "results.json").read_text())
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task, lines = [row for row in rows if row["task"] == task], {}
        tests = [*dict.fromkeys(row["test"] for row in of_task)]
        for row in of_task:
            key = row["row"], str(row["seed"]), f"`{row['command']}`"
            line = lines.setdefault(key, {"#L": f"{row['chain_length']:.1f}"})
            line |= {"share": f"{row['share']:.2f}", "command": key[2]}
            line[row["test"]] = f"{row['accuracy']:.1f} ± {row['interval']:.1f}"
        head = [*tests, "#L", "share", "command"]
        cells = [[*key[:2], *(x.get(c, "") for c in head)] for key, x in lines.items()]
        parts.append(table([task, "seed", *head], cells))
        plain = [row for row in of_task if row["test"] == tests[0] and "," not in row["row"]]
        points = [(x["row"], x["share"], x["accuracy"], x["interval"]) for x in plain]
        label = f"accuracy on {tests[0]}, %"
        draw_points(directory / f"{task}.svg", points, "share of the written chain", label)
    write_text(directory / "table.md", "\n".join(parts))
    return "\n".join(parts)


def main():
    print(report(Path(parse(Settings, __doc__).directory)))


if __name__ == "__main__":
    main()
