"""Pictures as SVG: both masks for one example, the latents of one problem beside its written chain, and points with intervals; and tables."""

from html import escape
from pathlib import Path

from data import Example, pack_row
from masks import ANSWER, LATENT, PROMPT, TEXT, dense, induction, supervision
from runs import write_text

COLORS = {PROMPT: "#8ab4d8", TEXT: "#c9ccd1", LATENT: "#f2a541", ANSWER: "#7fbf7b"}
CELL = 22


def table(head: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *rows))


def _svg(width: float, height: float, parts: list[str]) -> str:
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
            'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="13">'
            '<rect width="100%" height="100%" fill="white"/>' + "".join(parts) + "</svg>\n")


def _text(x: float, y: float, text: str, **style) -> str:
    attributes = "".join(f' {k.replace("_", "-")}="{v}"' for k, v in style.items())
    return f'<text x="{x:.1f}" y="{y:.1f}" xml:space="preserve"{attributes}>{escape(text)}</text>'


def _rect(x: float, y: float, width: float, height: float, color: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{color}"/>'


def draw_masks(path: str | Path, example: Example, tokens: list[str], r: int) -> None:
    """Encoder and decoder mask of `example`; a coloured cell is a key (column) that the query (row) may look at.

    `tokens` are the texts of prompt, chain, </think> and answer, one per token.
    """
    head, parts, top, left, height = len(example.prompt), [], 96, 110, 0
    for name, rule in (("encoder", induction), ("decoder", supervision)):
        row = pack_row(name, [example], r)
        kinds, allowed, latent = row.labels.kind.tolist(), dense(rule, row.labels), 0
        spoken = iter(tokens[:head] + tokens[head + (r if name == "decoder" else 0):])
        names = []
        for kind in kinds:
            latent += kind == LATENT
            names.append(f"{'L' if name == 'encoder' else 'Z'}{latent}" if kind == LATENT else next(spoken))
        size = len(kinds)
        parts.append(_text(left, 22, f"{name}: {rule.__name__} mask, r = {r}", font_weight="bold"))
        for i in range(size):
            y = top + CELL * i + 15
            parts.append(_text(left - 6, y, names[i], text_anchor="end", fill="#222"))
            parts.append(_text(left + CELL * size + 6, y, str(row.position_ids[i].item()), fill="#888"))
            x = left + CELL * i + 15
            parts.append(_text(x, top - 6, names[i], transform=f"rotate(-60 {x} {top - 6})", fill="#222"))
            for j in range(size):
                color = COLORS[kinds[j]] if allowed[i, j] else "#f6f6f6"
                parts.append(_rect(left + CELL * j, top + CELL * i, CELL - 2, CELL - 2, color))
        parts.append(_text(left + CELL * size + 6, top - 6, "pos", fill="#888"))
        left += CELL * size + 170
        height = max(height, top + CELL * size + 20)
    write_text(path, _svg(left - 110, height, parts))


def draw_latents(path: str | Path, problem: str, chain: list[str], prediction: dict) -> None:
    """What a model thought about `problem`: each latent's top tokens with their weights as bars, beside the segment of the
    written chain (`chain`, cut at the compression rate) that it stands for, and the answer. `prediction` is eval.py's."""
    latents, line, bar = prediction["latents"], 32, 100
    columns = max(map(len, latents), default=1)
    parts = [_text(16, 26, problem, font_weight="bold"), _text(16, 56, "chain", fill="#888"),
             _text(110, 56, "latent: its likeliest tokens", fill="#888")]
    for n in range(max(len(latents), len(chain))):
        y = 84 + line * n
        parts.append(_text(16, y, chain[n] if n < len(chain) else "", fill="#222"))
        if n < len(latents):
            parts.append(_text(84, y, str(n + 1), fill="#888", text_anchor="end"))
            for c, (token, p) in enumerate(latents[n]):
                x = 110 + (bar + 24) * c
                parts.append(_rect(x, y + 4, bar * p, 5, COLORS[LATENT]))
                parts.append(_text(x, y, token if token.isprintable() else repr(token)[1:-1], fill="#222"))
                parts.append(_text(x + bar, y, f"{p:.2f}", fill="#888", text_anchor="end"))
    y = 84 + line * max(len(latents), len(chain)) + 8
    verdict = "right" if prediction["correct"] else f"wrong, it is {prediction['reference']}"
    parts.append(_text(16, y, f"answer: {prediction['answer']}   ({verdict})", font_weight="bold"))
    write_text(path, _svg(130 + (bar + 24) * columns, y + 20, parts))


def draw_points(path: str | Path, points: list[tuple[str, float, float, float]], x_label: str, y_label: str) -> None:
    """(name, x, y, half the height of its interval) as labelled points on axes that begin at zero."""
    left, top, width, height = 60, 20, 560, 340
    x_max, y_max = max(max(x for _, x, _, _ in points), 1e-9) * 1.15, min(100, max(y + d for _, _, y, d in points) * 1.1 + 1)
    at = lambda x, y: (left + width * x / x_max, top + height * (1 - y / y_max))
    parts = [_rect(left, top + height, width, 1, "#888"), _rect(left, top, 1, height, "#888"),
             _text(left + width, top + height + 40, x_label, text_anchor="end"), _text(left + 8, top + 4, y_label)]
    for i in range(6):
        x, y = x_max * i / 5, y_max * i / 5
        parts.append(_text(at(x, 0)[0], top + height + 18, f"{x:.3g}", text_anchor="middle", fill="#888"))
        parts.append(_text(left - 6, at(0, y)[1] + 4, f"{y:.3g}", text_anchor="end", fill="#888"))
    for name, x, y, d in points:
        (cx, cy), color = at(x, y), COLORS[LATENT] if "atent" in name or name.startswith("r") else COLORS[PROMPT]
        parts.append(_rect(cx - 0.75, at(x, y + d)[1], 1.5, height * 2 * d / y_max, color))
        parts.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="5" fill="{color}"/>')
        parts.append(_text(cx + 9, cy + 4, name))
    write_text(path, _svg(left + width + 140, top + height + 60, parts))
