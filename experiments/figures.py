"""The pictures: both masks of one example, points with intervals."""

import matplotlib
from matplotlib import pyplot as plt
import numpy as np

from data import Example, pack_examples
from lib.files import atomic
from masks import ANSWER, LATENT, PROMPT, RULES, TEXT, dense

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = ""
COLORS = {PROMPT: "#8ab4d8", TEXT: "#c9ccd1", LATENT: "#f2a541", ANSWER: "#7fbf7b"}


def save(figure, path):
    with atomic(path) as temporary:
        figure.savefig(temporary, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def draw_masks(path, parts, r):
    """Encoder and decoder mask. A coloured cell: the query (row) may look at the key (column).

    The number after a token is its position. `parts` are the texts of the tokens of prompt, chain,
    </think> and answer.
    """
    texts = sum(parts, [])
    numbers = iter(range(len(texts)))
    example = Example(*([next(numbers) for _ in part] for part in parts))
    figure, axes = plt.subplots(1, 2, figsize=(12, 6), layout="constrained")
    for axis, name in zip(axes, ("encoder", "decoder")):
        row = pack_examples(name, [example], r)
        kinds = row.labels.kind.tolist()
        allowed = dense(RULES[name], row.labels).numpy()
        colors = np.array([matplotlib.colors.to_rgb(COLORS[kind]) for kind in kinds])
        axis.imshow(np.where(allowed[..., None], colors, 1.0))
        names = [texts[i] for i in row.ids.tolist()]
        for i, at in enumerate(row.latent_index.tolist(), 1):
            names[at] = f"{'L' if name == 'encoder' else 'Z'}{i}"
        axis.set_xticks(range(len(names)), names, rotation=90)
        numbered = zip(names, row.position_ids.tolist())
        axis.set_yticks(range(len(names)), [f"{x}  {p:2d}" for x, p in numbered])
        for i in range(len(names)):
            axis.axhline(i - 0.5, color="white")
            axis.axvline(i - 0.5, color="white")
        axis.set_title(f"{name}: {RULES[name].__name__} mask")
    save(figure, path)


def draw_points(path, rows, x, y, style="o"):
    """A point for each (name, row): row[x], row[y], and its interval where y is the accuracy."""
    figure, axis = plt.subplots()
    axis.set_prop_cycle(color=plt.cm.tab20.colors)
    for group in dict(rows):  # each name once
        found = [row for name, row in rows if name == group]
        xs, ys = ([row[key] for row in found] for key in (x, y))
        intervals = [row["interval"] * (y == "accuracy") for row in found]
        axis.errorbar(xs, ys, intervals, fmt=style, capsize=3, label=group)
    axis.set(xlabel=x, ylabel=f"{y}, {rows[0][1]['test']}", ylim=(0, None))
    axis.legend(loc=(1.02, 0))
    save(figure, path)
