"""The picture of the errors by layer: what stands where, read back from the SVG."""

from dataclasses import replace
from xml.etree import ElementTree

import pytest

from batchinfer.jobs.evaluate import Evaluation, LayerError
from batchinfer.jobs.plot import BAR, BOTTOM, LINE, TOP, WORST, layer_plot

SVG = "{http://www.w3.org/2000/svg}"
DONE = Evaluation(
    model="org/a<b>&c",
    reference="org/name",
    quantization="auto",
    kv_cache_dtype="auto",
    scheme="GPTQ, 4 bits",
    data="t.parquet",
    column="text",
    context=512,
    rows=10,
    windows=20,
    tokens=10_000,
    perplexity=11.595,
    bits_per_byte=1.0,
    divergence=0.0322,
    top1_agreement=0.8994,
    layers=None,
    seconds=1.0,
    notes=[],
)


def drawn(layers: list[LayerError]) -> ElementTree.Element:
    return ElementTree.fromstring(layer_plot(DONE, layers))


def bars(svg: ElementTree.Element) -> list[tuple[float, str]]:
    """(height, colour) of each."""
    found = [rect for rect in svg.iter(f"{SVG}rect") if rect.find(f"{SVG}title") is not None]
    return [(float(rect.attrib["height"]), rect.attrib["fill"]) for rect in found]


def test_bars_and_points_have_the_heights_of_their_errors() -> None:
    svg = drawn([LayerError(0, 0.02, 0.01), LayerError(1, 0.08, 0.05), LayerError(2, 0.04, 0.1)])
    scale = (BOTTOM - TOP) / 10  # the axis ends at 10 %
    heights, colours = zip(*bars(svg), strict=True)
    assert heights == pytest.approx([2 * scale, 8 * scale, 4 * scale], abs=0.1)
    assert colours == (BAR, WORST, BAR)
    points = [c for c in svg.iter(f"{SVG}circle") if c.attrib["fill"] == LINE][1:]  # the first is the legend's
    assert [BOTTOM - float(c.attrib["cy"]) for c in points] == pytest.approx([scale, 5 * scale, 10 * scale], abs=0.1)
    texts = [text.text for text in svg.iter(f"{SVG}text")]
    assert texts[:2] == ["org/a<b>&c", "GPTQ, 4 bits; reference org/name"]
    assert texts[2] == "perplexity 11.5950  ·  KL divergence 0.032200 nats a token  ·  top-1 agreement 89.94 %"
    assert {"layer 1: adds the most", "0 %", "10 %", "0", "1", "2"} <= set(texts)


@pytest.mark.parametrize("layers", [1, 7, 28, 126])
@pytest.mark.parametrize("error", [0.0, 1e-7, 0.0123, 0.1, 3.0])
def test_any_model_fits_into_the_field(layers: int, error: float) -> None:
    svg = drawn([LayerError(i, error, error / 2) for i in range(layers)])
    heights = [height for height, _ in bars(svg)]
    assert len(heights) == layers
    assert heights == [0.0] * layers if error == 0 else min(heights) > 0.4 * (BOTTOM - TOP)
    assert max(heights) <= BOTTOM - TOP + 0.1
    labels = [text.text for text in svg.iter(f"{SVG}text") if text.text and text.text.endswith(" %")][1:]
    assert 2 <= len(labels) <= 12 and len(set(labels)) == len(labels)


def test_a_long_name_is_cut() -> None:
    svg = ElementTree.fromstring(layer_plot(replace(DONE, scheme="x" * 300), [LayerError(0, 0.1, 0.1)]))
    assert max(len(text.text or "") for text in svg.iter(f"{SVG}text")) <= 90
