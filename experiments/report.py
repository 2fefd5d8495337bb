"""The table and the picture of results/results.json.

    python -m experiments.report                     # results/table.md, results/<task>.svg

A picture for each task: accuracy over the share of the written chain.
"""

import lib.errors  # noqa: F401  from here on an error is one line

from dataclasses import dataclass
import json
from pathlib import Path

from eval import table
from experiments.figures import draw_points
from lib.cli import parse
from lib.files import reading, write_text


@dataclass(frozen=True, kw_only=True)
class Settings:
    directory: str = "results"  # holds results.json, gets table.md and the pictures


def cell(row):
    return f"{row['accuracy']:.1f} ± {row['interval']:.1f}"


def main():
    directory = Path(parse(Settings, __doc__).directory)
    with reading(directory / "results.json"):
        rows = json.loads((directory / "results.json").read_text())
        parts = []
        for task in dict.fromkeys(row["task"] for row in rows):
            of_task = [row for row in rows if row["task"] == task]
            tests = list(dict.fromkeys(row["test"] for row in of_task))
            lines, points = {}, {}
            for row in of_task:
                line = lines.setdefault((row["row"], row["seed"]), {"share": "", "command": ""})
                line[row["test"]] = cell(row)
                if row["test"] == tests[0]:
                    line |= {"share": row["share"], "command": f"`{row['command']}`"}
                    point = (row["row"], row["share"], row["accuracy"], row["interval"])
                    points.setdefault((row["row"], row["seed"]), point)
            head = [task, "seed", *(f"{test}, %" for test in tests), "share", "command"]
            cells = [
                [name, str(seed), *(x.get(t, "") for t in tests), str(x["share"]), x["command"]]
                for (name, seed), x in lines.items()
            ]
            parts.append(table(head, cells))
            plain = [p for p in points.values() if "," not in p[0]]
            label = f"accuracy on {tests[0]}, %"
            draw_points(directory / f"{task}.svg", plain, "share of the written chain", label)
        write_text(directory / "table.md", "\n".join(parts))
        print(directory / "table.md")


if __name__ == "__main__":
    main()
