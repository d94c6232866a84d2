"""Drawing the errors by layer as an SVG file on a white background, which any browser shows."""

import math
from collections.abc import Iterator
from html import escape
from pathlib import Path

from batchinfer.jobs.charts import FONT, steps_to, text
from batchinfer.jobs.evaluate import Evaluation, LayerError

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 92, 736, 142, 380  # edges of the area with the bars
INK, FAINT, BAR, WORST, LINE = "#1f2933", "#5f6b7a", "#9dbfe3", "#2f6db0", "#d9622b"
MOST_LETTERS = 90


def layer_plot(done: Evaluation, layers: list[LayerError]) -> str:
    """Return an SVG: a bar for the error that each layer adds, and a line for the error accumulated in the residual
    stream."""
    worst = max(layers, key=lambda layer: layer.own)
    step, top = steps_to(100 * max(max(layer.own, layer.stream) for layer in layers))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" {FONT} font-size="13"><title>Errors by layer of {escape(_name(done.model))}</title>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        *_head(done, worst),
        *_axes(len(layers), step, top),
        *_bars(layers, worst, top),
        *_line(layers, top),
    ]
    return "\n".join([*parts, "</svg>\n"])


def _head(done: Evaluation, worst: LayerError) -> Iterator[str]:
    yield _text(24, 34, _name(done.model), INK, more=' font-size="18" font-weight="bold"')
    yield _text(24, 56, f"{done.scheme}; reference {_name(str(done.reference))}", FAINT)
    figures = f"perplexity {done.perplexity:.4f}"
    if done.divergence is not None and done.top1_agreement is not None:
        figures += f"  ·  KL divergence {done.divergence:.6f} nats a token"
        figures += f"  ·  top-1 agreement {100 * done.top1_agreement:.2f} %"
    yield _text(24, 80, figures, INK, more=' font-weight="bold"')
    yield f'<rect x="24" y="99" width="13" height="13" fill="{BAR}"/>'
    yield _text(43, 110, "error that the layer adds", INK)
    yield f'<rect x="240" y="99" width="13" height="13" fill="{WORST}"/>'
    yield _text(259, 110, f"layer {worst.layer}: adds the most", INK)
    yield f'<path d="M434 105.5h26" stroke="{LINE}" stroke-width="2.5"/>'
    yield f'<circle cx="447" cy="105.5" r="4" fill="{LINE}"/>'
    yield _text(468, 110, "accumulated error of the stream after it", INK)


def _axes(layers: int, step: float, top: float) -> Iterator[str]:
    digits = max(0, -math.floor(math.log10(step)))
    for i in range(round(top / step) + 1):
        y = _y(i * step, top)
        yield f'<path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="{FAINT if i == 0 else "#e3e7ec"}"/>'
        yield _text(LEFT - 9, y + 4.5, f"{i * step:.{digits}f} %", FAINT, anchor="end")
    every = math.ceil(layers / 20)
    for layer in range(0, layers, every):
        yield _text(_x(layer, layers), BOTTOM + 20, str(layer), FAINT, anchor="middle")
    yield _text((LEFT + RIGHT) / 2, BOTTOM + 44, "layer", INK, anchor="middle")
    middle = (TOP + BOTTOM) / 2
    yield _text(18, middle, "relative error", INK, anchor="middle", more=f' transform="rotate(-90 18 {middle})"')


def _bars(layers: list[LayerError], worst: LayerError, top: float) -> Iterator[str]:
    width = min(80.0, 0.66 * (RIGHT - LEFT) / len(layers))
    for layer in layers:
        x, y = _x(layer.layer, len(layers)) - width / 2, _y(100 * layer.own, top)
        shown = f"layer {layer.layer}: adds {100 * layer.own:.3f} %, stream {100 * layer.stream:.3f} %"
        yield (
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{BOTTOM - y:.1f}" '
            f'fill="{WORST if layer is worst else BAR}"><title>{shown}</title></rect>'
        )


def _line(layers: list[LayerError], top: float) -> Iterator[str]:
    points = [(_x(layer.layer, len(layers)), _y(100 * layer.stream, top)) for layer in layers]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    yield f'<path d="M{path}" fill="none" stroke="#ffffff" stroke-width="5.5" stroke-linejoin="round"/>'
    yield f'<path d="M{path}" fill="none" stroke="{LINE}" stroke-width="2.5" stroke-linejoin="round"/>'
    for x, y in points if len(points) <= 40 else ():
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{LINE}" stroke="#ffffff" stroke-width="1.5"/>'


def _x(layer: int, layers: int) -> float:
    return LEFT + (layer + 0.5) * (RIGHT - LEFT) / layers


def _y(percent: float, top: float) -> float:
    return BOTTOM - percent / top * (BOTTOM - TOP)


def _name(model: str) -> str:
    """Return a folder's name without its path; the name of a model on the Hub keeps its organization."""
    return Path(model).name if Path(model).exists() else model


def _text(x: float, y: float, shown: str, fill: str, anchor: str = "start", more: str = "") -> str:
    cut = shown if len(shown) <= MOST_LETTERS else shown[: MOST_LETTERS - 1] + "…"
    return text(x, y, cut, fill, anchor, more)
