"""Names of tensors that several parts look for, in one place."""

from __future__ import annotations

HEAD = "head."  # before the name of every tensor of a head
HEAD_WEIGHT, HEAD_BIAS = "head.weight", "head.bias"
HEAD_PRECISION, HEAD_OFFSET = "head.precision", "head.offset"  # of a quadratic head
HEAD_UNKNOWN = "head.unknown"  # (C,) bool, of a deployed model: rows that are no answer, see `server.heads.answering`
HEAD_COUNT, HEAD_PROTOTYPES, HEAD_SCALE = "head.count", "head.prototypes", "head.scale"  # of a head per source
SOURCE_CLIENT, SOURCE_TASK = "source.client", "source.task"  # where a source comes from
