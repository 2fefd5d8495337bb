"""The table and the picture of results/results.json.

    python -m experiments.report                     # results/table.md, results/<task>.svg

Pictures for each task: accuracy over the share of the written chain, without the rows that have a
comma in their name, such as interventions. Where models were kept on the way, accuracy and loss
over the steps of phase 2.
"""

import lib.errors  # noqa: F401  from here on an error is one line

import json
from pathlib import Path

from experiments.figures import draw_points
from lib.files import reading, write_text

COLUMNS = "row test accuracy interval chain_length share seed steps minutes gpu command".split()


def report(directory):
    """Writes table.md and the pictures into the directory of results.json. Returns the table."""
    path = directory / "results.json"
    with reading(path):
        rows = json.loads(path.read_text())
    parts = []
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        cells = [["" if row[k] is None else str(row[k]) for k in COLUMNS] for row in of_task]
        cells = [[task, *COLUMNS[1:]], ["---"] * len(COLUMNS), *cells]
        parts.append("".join(f"| {' | '.join(line)} |\n" for line in cells))
        test = of_task[0]["test"]
        first = [
            (row["row"].partition(", step-")[0], row) for row in of_task if row["test"] == test
        ]
        plain = [(name, row) for name, row in first if "," not in row["row"]]
        kept = {name for name, row in first if name != row["row"]}
        curves = [(name, row) for name, row in first if name in kept]
        draw_points(directory / f"{task}.svg", plain, "share", "accuracy")
        for y in ("accuracy", "loss") if curves else ():
            draw_points(directory / f"{task}-{y}.svg", curves, "steps", y, "o-")
    write_text(directory / "table.md", "\n".join(parts))
    return "\n".join(parts)


if __name__ == "__main__":
    print(report(Path("results")))
