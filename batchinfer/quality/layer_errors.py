"""Errors by layer: each layer of a model compared with the same layer of a reference model."""

import torch
from torch import Tensor

from batchinfer.engine.model_runner import ModelRunner
from batchinfer.kernels.rows import Rows, add_rows
from batchinfer.models.batch import Batch
from batchinfer.models.decoder import Decoder

SAME_BASIS = 0.5
"""The largest relative difference of two embeddings with which their residual streams can be compared.

Rounding to four bits makes a difference of about 0.1. Merging a rotation into the weights makes one of about 1.4, that
of two unrelated embeddings.
"""


class LayerErrors:
    """Sums of squared errors over tokens, by layer.

    A layer adds f(x) = output - input to the residual stream. Its own error compares that with the reference's, for
    the same input x, which comes from the reference: ||f_model(x) - f(x)|| / ||f(x)||. The stream's error compares the
    residual stream after the layer when the model runs on its own, so it includes the errors of all layers before. Both
    are measured in the types in which the models compute: with a stream in bfloat16 they include its rounding. A layer
    that reads the keys and values of another layer gets those of the model's run on its own.
    """

    def __init__(self, runner: ModelRunner, reference: ModelRunner) -> None:
        """Prepare the comparison. Raises `ValueError` if the models differ in the number of layers or in size."""
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
        """Compute a step with both models and add its errors; return their logits, [S, V] each.

        The step's first `tokens` tokens are no padding, and all of them are sampled. The model's logits are those of
        its run on its own.
        """
        ours, theirs = self.runner.decoder, self.reference.decoder
        caches, reference_caches = self.runner.caches, self.reference.caches
        at = ours.token_inputs(batch, caches)
        reference_at = theirs.token_inputs(reference_batch, reference_caches)
        own, x = ours.embed(batch), theirs.embed(reference_batch)
        for i, (cache, reference_cache) in enumerate(zip(caches, reference_caches, strict=True)):
            # A layer overwrites its input, so x is copied; the models may pad a step to different numbers of rows. Our
            # second call overwrites the first's keys and values.
            input_TD = _padded(x[:tokens], len(batch.tokens)).to(ours.stream)
            fed = _sum(ours.layer(i, cache, input_TD, None, batch, at))
            own = _sum(ours.layer(i, cache, own, None, batch, at))
            after = _sum(theirs.layer(i, reference_cache, x.clone(), None, reference_batch, reference_at))
            self._lost[i] += _squares(fed[:tokens], after[:tokens])
            self._added[i] += _squares(after[:tokens], x[:tokens])
            self._drift[i] += _squares(own[:tokens], after[:tokens])
            self._stream[i] += after[:tokens].double().square().sum()
            x = after
        return ours.logits(own, None), theirs.logits(x, None)

    def figures(self) -> list[tuple[float, float]]:
        """Return (own error, stream's error) of each layer."""
        own, stream = _relative(self._lost, self._added), _relative(self._drift, self._stream)
        return list(zip(own, stream, strict=True))


def _padded(x_tD: Tensor, rows: int) -> Tensor:
    """Return a copy of x with rows of zeros behind it, `rows` in all."""
    out = x_tD.new_zeros(rows, x_tD.shape[1])
    out[: len(x_tD)] = x_tD
    return out


def embedding_difference(decoder: Decoder, reference: Decoder) -> float:
    """Return the relative difference ||E_model - E|| / ||E|| of two embeddings E of the same shape [V, D]."""
    difference = total = 0.0
    for ours, theirs in zip(_chunks(decoder.embedding), _chunks(reference.embedding), strict=True):
        difference += float(_squares(ours, theirs))
        total += float(theirs.double().square().sum())
    return float((difference / total) ** 0.5)


def _chunks(embedding_VD: Tensor) -> list[Tensor]:
    """Split an embedding's rows into chunks, so that only a chunk at a time is copied to another type."""
    return [embedding_VD[first : first + 4096] for first in range(0, len(embedding_VD), 4096)]


def _relative(error: Tensor, of: Tensor) -> list[float]:
    """Return the square root of error / of, for sums of squares."""
    quotients: list[float] = (error / of.clamp(min=1e-30)).sqrt().tolist()
    return quotients


def _sum(stream: tuple[Tensor, Rows]) -> Tensor:
    """Add a layer's output to the residual stream."""
    return add_rows(*stream)


def _squares(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() - b.double()).square_().sum()
