"""Which layer loses most: each layer of a model beside the same layer of a reference."""

import torch
from torch import Tensor

from batchinfer.engine.model_runner import ModelRunner
from batchinfer.kernels.rows import Rows, add_rows
from batchinfer.models.batch import Batch
from batchinfer.models.decoder import Decoder

SAME_BASIS = 0.5
"""Relative difference of two embeddings below which their residual streams are one. Rounding to as few as four bits
makes about 0.1; a rotation that was merged into the weights leaves nothing in common, which makes about 1.4."""


class LayerErrors:
    """Sums of squares over tokens, by layer.

    A layer's own error is that of what it adds to the residual stream, f(x) = output - input, with x from the
    reference for both: ||f_model(x) - f(x)|| / ||f(x)||. The stream's error is that of the stream after the layer when
    the model runs on its own, so it has gathered those of the layers before. Both are in the types that the models
    compute in: with a stream in bfloat16, rounding the sum is a part of the error.
    """

    def __init__(self, runner: ModelRunner, reference: ModelRunner) -> None:
        """A `ValueError` names the size in which the two differ."""
        self.runner, self.reference = runner, reference
        configs = (runner.decoder.config, reference.decoder.config)
        ours, theirs = ({"layers": len(c.layers), "hidden_size": c.hidden_size} for c in configs)
        for field, size in ours.items():
            if size != theirs[field]:
                raise ValueError(
                    f"{field} is {size} in the model and {theirs[field]} in the reference, and layers are compared one "
                    "by one"
                )
        layers = ours["layers"]
        self._lost, self._added, self._drift, self._stream = torch.zeros(4, layers, dtype=torch.float64)

    def step(self, batch: Batch, reference_batch: Batch, tokens: int) -> tuple[Tensor, Tensor]:
        """Add a step whose first `tokens` tokens are real and all sampled; logits [S, V] of the model, on its own, and
        of the reference."""
        ours, theirs = self.runner.decoder, self.reference.decoder
        caches, reference_caches = self.runner.caches, self.reference.caches
        places = ours.places(batch, caches[0])
        reference_places = theirs.places(reference_batch, reference_caches[0])
        own, x = ours.embed(batch), theirs.embed(reference_batch)
        for i, (cache, reference_cache) in enumerate(zip(caches, reference_caches, strict=True)):
            # A layer spends its input. Keys and values of the first of ours are overwritten by the second's.
            fed = _sum(ours.layer(i, cache, x.to(ours.stream, copy=True), None, batch, places))
            own = _sum(ours.layer(i, cache, own, None, batch, places))
            after = _sum(theirs.layer(i, reference_cache, x.clone(), None, reference_batch, reference_places))
            self._lost[i] += _squares(fed[:tokens], after[:tokens])
            self._added[i] += _squares(after[:tokens], x[:tokens])
            self._drift[i] += _squares(own[:tokens], after[:tokens])
            self._stream[i] += after[:tokens].double().square().sum()
            x = after
        return ours.logits(own, None), theirs.logits(x, None)

    def figures(self) -> list[tuple[float, float]]:
        """(own error, the stream's error) of each layer."""
        own, stream = _relative(self._lost, self._added), _relative(self._drift, self._stream)
        return list(zip(own, stream, strict=True))


def embedding_difference(decoder: Decoder, reference: Decoder) -> float:
    """||E_model - E|| / ||E|| of the two embeddings [V, D], which have one shape."""
    difference = total = 0.0
    for ours, theirs in zip(_pieces(decoder.embedding), _pieces(reference.embedding), strict=True):
        difference += float(_squares(ours, theirs))
        total += float(theirs.double().square().sum())
    return float((difference / total) ** 0.5)


def _pieces(embedding_VD: Tensor) -> list[Tensor]:
    """So that no copy of the whole is made in another type."""
    return [embedding_VD[first : first + 4096] for first in range(0, len(embedding_VD), 4096)]


def _relative(error: Tensor, of: Tensor) -> list[float]:
    """The root of one sum of squares over another."""
    quotients: list[float] = (error / of.clamp(min=1e-30)).sqrt().tolist()
    return quotients


def _sum(stream: tuple[Tensor, Rows]) -> Tensor:
    """The residual stream with what a layer adds to it."""
    return add_rows(*stream)


def _squares(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() - b.double()).square_().sum()
