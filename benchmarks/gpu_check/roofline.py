"""Seconds that requests take at least: two figures of a device place a run between two times.

In the `bound`, reading and computing overlap perfectly; in the `serial` time they take turns, as they do in most
engines' steps.
"""

from dataclasses import dataclass

from batchinfer.cost.cost_model import CostModel, Requests


@dataclass(frozen=True)
class Device:
    """Ceilings as measured."""

    operations_per_second: float  # of the matrix products in the type that the weights are multiplied in
    bytes_per_second: float  # of a copy, read and written bytes counted


@dataclass(frozen=True)
class Roofline:
    """A model whose weights have `weight_bytes` an element, on a device."""

    model: CostModel
    weight_bytes: float
    device: Device

    def bound_seconds(self, requests: Requests, batch: float) -> float:
        """For one of `batch` requests that run side by side: no engine can be faster on this device."""
        nbytes = self.model.bytes_read(requests) + self._weights_read(requests, batch)
        return max(self._computing(requests), nbytes / self.device.bytes_per_second)

    def serial_seconds(self, requests: Requests, batch: float) -> float:
        """The same where attention waits for the products, and each step's products take the longer of reading their
        weights and computing."""
        attention = self.model.bytes_read(requests) / self.device.bytes_per_second
        reading = self._weights_read(requests, batch) / self.device.bytes_per_second
        new = 2 * self._parameters * requests.output / self.device.operations_per_second
        return self._computing(requests) + attention + max(0.0, reading - new)

    def _computing(self, requests: Requests) -> float:
        return self.model.operations(requests) / self.device.operations_per_second

    def _weights_read(self, requests: Requests, batch: float) -> float:
        """Bytes of weights, a request's share of what all of the batch read together."""
        return requests.output * self._parameters * self.weight_bytes / batch

    @property
    def _parameters(self) -> int:
        return self.model.linear_parameters + self.model.head_parameters
