"""Features of a vision model as a member of the sample that holds the image.

`KEY.features.safetensors` is a safetensors file:

    features    float16 (W, h, w): W values of each patch of the image, neither cropped at random
                nor mirrored
    metadata    model: the name of the vision model; image_size: "HxW", of the image in pixels;
                image_key: which of several images of the sample, as data.image_key

In: an array, or the bytes of a member, which may come from anybody. Out: the other.
"""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np
import safetensors.numpy

from vae_dist.data.buckets import Size
from vae_dist.data.tar import DamagedSampleError

MEMBER = "features.safetensors"
TYPE = np.dtype(np.float16)
NO_FEATURES = np.empty(0, TYPE)


class Features(NamedTuple):
    values: np.ndarray  # float16 (W, h, w)
    model: str
    image_size: str  # HxW
    image_key: str = ""

    def to_bytes(self) -> bytes:
        facts = {name: str(getattr(self, name)) for name in self._fields[1:]}
        values = np.ascontiguousarray(self.values)  # safetensors writes memory as it lies
        return safetensors.numpy.save({"features": values}, metadata=facts)

    @classmethod
    def from_bytes(cls, data: bytes) -> Features:
        """Raises DamagedSampleError."""
        try:
            values = safetensors.numpy.load(data)["features"]
            length = int.from_bytes(data[:8], "little")
            facts = json.loads(data[8 : 8 + length])["__metadata__"]
            if values.dtype != TYPE or values.ndim != 3 or not values.size:
                raise ValueError(f"{values.dtype} {values.shape} is no float16 (W, h, w)")
            if not np.isfinite(values).all():
                raise ValueError("its values are no finite numbers")
            key = facts.get("image_key", "")
            return cls(values, facts["model"], facts["image_size"], key)
        except Exception as error:  # whatever a decoder raises is damage
            raise DamagedSampleError(f"no features in .{MEMBER} ({error})") from None


def in_text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
