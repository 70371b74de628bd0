"""Tar shards in, batches of images out: index, order, streams, the writer and the digits."""

from vae_dist.data.bundled import load_digits, make_digits
from vae_dist.data.index import ShardError, ShardIndex, load_index
from vae_dist.data.order import Order
from vae_dist.data.reader import SkippedSample, image_settings
from vae_dist.data.stream import Batch, EvaluationBatch, EvaluationStream, TrainingStream
from vae_dist.data.transforms import ImageSettings
from vae_dist.data.writer import write_shards

__all__ = [
    "Batch",
    "EvaluationBatch",
    "EvaluationStream",
    "ImageSettings",
    "Order",
    "ShardError",
    "ShardIndex",
    "SkippedSample",
    "TrainingStream",
    "image_settings",
    "load_digits",
    "load_index",
    "make_digits",
    "write_shards",
]
