"""Keeps the books of one weight update, for every kind of engine: which tensors must arrive and which have."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pipeline.model import fp8
from pipeline.model.checksum import checksum
from pipeline.rollout.engine import WeightUpdateError
from pipeline.types import WeightBucket


class UpdateSession:
    """Admits the buckets of one version, and knows when all of them are there.

    ``expected`` maps every tensor name of the model to its shape; with ``codes`` a matrix may also come as FP8 codes in
    blocks, its scale in the same bucket. Any disagreement raises ``WeightUpdateError``: a wrong version, a repeated
    bucket, a checksum that does not match the bytes, an unknown or repeated name, another shape, codes without their
    scale.
    """

    def __init__(
        self, engine: str, version: int, expected: Mapping[str, tuple[int, ...]], *, codes: bool = True
    ) -> None:
        self.version = version
        self._codes = codes
        self._engine = engine
        self._expected = expected
        self._missing = set(expected)
        self._count: int | None = None
        self._buckets: set[int] = set()
        self._verified = False

    def admit(self, bucket: WeightBucket) -> None:
        """Check one bucket completely before any of its bytes is used."""
        label = f"bucket {bucket.index + 1}/{bucket.count}"
        if self._verified:
            raise self._error(f"{label} came after verify_update")
        if bucket.version != self.version:
            raise self._error(f"{label} is of version {bucket.version}; finish or restart the update of {self.version}")
        if self._count not in (None, bucket.count):
            raise self._error(f"{label} announces {bucket.count} buckets, earlier ones announced {self._count}")
        if bucket.index in self._buckets or not 0 <= bucket.index < bucket.count:
            raise self._error(f"{label} arrived twice or is out of range")
        if (actual := checksum(bucket.tensors)) != bucket.checksum:
            raise self._error(f"{label} has checksum {actual:#010x}, its sender computed {bucket.checksum:#010x}")
        try:
            tensors = fp8.without_scales(bucket.tensors)
        except ValueError as error:
            raise self._error(f"{label}: {error}") from error
        for name, tensor in tensors.items():
            self._admit_tensor(label, name, tensor)
        self._count = bucket.count
        self._buckets.add(bucket.index)

    def finish(self, version: int) -> None:
        """Check that every bucket and every tensor arrived."""
        if version != self.version:
            raise self._error(f"verify_update({version}) while version {self.version} is being loaded")
        if self._count is None or len(self._buckets) != self._count:
            raise self._error(f"{len(self._buckets)} of {self._count or 'an unknown number of'} buckets arrived")
        if self._missing:
            raise self._error(f"{len(self._missing)} tensors never arrived, first {min(self._missing)!r}")

    def verified(self) -> None:
        """What arrived has been verified; from now on nothing more is admitted."""
        self._verified = True

    def commit(self, version: int) -> None:
        """Check that ``version`` is what has been verified."""
        if version != self.version or not self._verified:
            state = "verified" if self._verified else "not verified yet"
            raise self._error(f"commit_update({version}), but what is loaded is version {self.version}, {state}")

    def _admit_tensor(self, label: str, name: str, tensor: torch.Tensor) -> None:
        shape = tuple(tensor.shape)
        if name not in self._expected:
            raise self._error(f"{label}: {name!r} is not a parameter of the model that start() loaded")
        if name not in self._missing:
            raise self._error(f"{label}: {name!r} arrived twice")
        if shape != tuple(self._expected[name]):
            raise self._error(f"{label}: {name!r} has shape {shape}, the model has {tuple(self._expected[name])}")
        if tensor.dtype == fp8.CODES and not self._codes:
            raise self._error(f"{label}: {name!r} came as FP8 codes, but the engine was started without FP8")
        self._missing.discard(name)

    def _error(self, what: str) -> WeightUpdateError:
        return WeightUpdateError(f"{self._engine}: update to version {self.version}: {what}")
