"""The pictures: both masks of one example, one problem's latents, points with intervals."""

import matplotlib
from matplotlib import pyplot as plt
import numpy as np

from data import Example, pack_examples
from lib.files import atomic
from masks import ANSWER, LATENT, PROMPT, RULES, TEXT, dense

matplotlib.use("Agg")
matplotlib.rcParams.update({"font.family": "monospace", "font.size": 9, "svg.hashsalt": ""})
COLORS = {PROMPT: "#8ab4d8", TEXT: "#c9ccd1", LATENT: "#f2a541", ANSWER: "#7fbf7b"}


def save(figure, path) -> None:
    with atomic(path) as temporary:
        kind = str(path).rsplit(".", 1)[1]
        figure.savefig(temporary, format=kind, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def printable(text: str) -> str:
    return text.replace("$", r"\$") if text.isprintable() else repr(text)[1:-1]


def draw_masks(path, parts: list[list[str]], r: int) -> None:
    """Encoder and decoder mask. A coloured cell: the query (row) may look at the key (column).

    The number behind a token is its position. `parts` are the texts of the tokens of prompt, chain,
    </think> and answer.
    """
    texts = ["", *sum(parts, [])]
    numbers = iter(range(1, len(texts)))
    example = Example(*([next(numbers) for _ in part] for part in parts))
    figure, axes = plt.subplots(1, 2, figsize=(12, 6), layout="constrained")
    for axis, name in zip(axes, ("encoder", "decoder")):
        row = pack_examples(name, [example], r)
        kinds, allowed = row.labels.kind.tolist(), dense(RULES[name], row.labels).numpy()
        colors = np.array([matplotlib.colors.to_rgb(COLORS[kind]) for kind in kinds])
        axis.imshow(np.where(allowed[..., None], colors, 1.0))
        names = [printable(texts[i]) for i in row.ids.tolist()]
        for i, at in enumerate(row.latent_index.tolist(), 1):
            names[at] = f"{'L' if name == 'encoder' else 'Z'}{i}"
        axis.set_xticks(range(len(names)), names, rotation=90)
        labels = [f"{x}  {p:2d}" for x, p in zip(names, row.position_ids.tolist())]
        axis.set_yticks(range(len(names)), labels)
        axis.set_title(f"{name}: {RULES[name].__name__} mask")
        axis.hlines(np.arange(len(names)) - 0.5, -0.5, len(names) - 0.5, color="white")
        axis.vlines(np.arange(len(names)) - 0.5, -0.5, len(names) - 0.5, color="white")
    save(figure, path)


def draw_latents(path, problem, chain, latents, answer) -> None:
    """Each latent's top tokens with their weights, beside the segment that it stands for.

    chain: texts of the written chain, cut at the compression rate. latents: [[token, weight], ...]
    of each, as eval.py writes them.
    """
    count = max(len(latents), len(chain), 1)
    figure, axis = plt.subplots(figsize=(9, 0.45 * count + 1))
    for y in range(count):
        axis.text(-0.4, y, printable(chain[y]) if y < len(chain) else "", va="center", ha="right")
        for x, (token, p) in enumerate(latents[y] if y < len(latents) else ()):
            axis.barh(y, 0.9 * p, left=x, height=0.7, color=COLORS[LATENT], alpha=0.7)
            axis.text(x + 0.02, y, f"{printable(token)}  {p:.2f}", va="center")
    axis.set(xlim=(-1.2, 5), ylim=(count - 0.5, -0.5), xticks=[], yticks=[])
    axis.set_title(f"{printable(problem)}\nwritten segment | latent: its top tokens")
    axis.set_xlabel(f"answer: {printable(answer)}")
    axis.set_frame_on(False)
    save(figure, path)


def draw_points(path, points: list[tuple], x_label: str, y_label: str) -> None:
    """Points (name, x, y, half of y's interval) on axes from zero."""
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for name, x, y, interval in points:
        color = COLORS[LATENT if "atent" in name or "MUX" in name else PROMPT]
        axis.errorbar(x, y, interval, fmt="o", color=color, capsize=3)
        axis.annotate(name, (x, y), xytext=(6, 4), textcoords="offset points")
    axis.set(xlabel=x_label, ylabel=y_label)
    axis.set_xlim(left=min(0, axis.get_xlim()[0]))
    axis.set_ylim(bottom=0)
    save(figure, path)
