"""Flower's own strategies (FedMedian, FedAdam, Krum, …) as a rule: `{name: flower, strategy: FedMedian}`. See `server.flower`."""

from server.flower import Aggregator

__all__ = ["Aggregator"]
