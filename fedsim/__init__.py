"""fedsim: a simulator for federated continual learning with parameter-efficient modules."""

__version__ = "0.3.0"
