"""Images with labels and further members, several sizes and damage, for `encode` and `decode`."""

import io
import json

import numpy as np
import safetensors.torch
import torch
import webdataset as wds
from PIL import Image

from tests.support.picture_sources import encoded
from tests.support.tiny_run import tiny_config, write_run
from vae_dist.data.writer import write_shards

SIZES = ((20, 16), (16, 16), (12, 24))


def write_photos(folder, count, *, damaged=(), sizes=SIZES):
    """Colour images with .cls, .json and .clip.txt in shards of about 7 samples; what they hold."""
    generator, samples = np.random.default_rng(0), []
    for number in range(count):
        height, width = sizes[number % len(sizes)]
        pixels = generator.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((width, height))
        samples.append(
            {
                "__key__": f"part{number // 5}/{number:04d}",
                "png": b"no PNG" if number in damaged else encoded(image),
                "cls": str(number % 3).encode(),
                "json": json.dumps({"number": number}).encode(),
                "clip.txt": bytes([number % 256, 0, 255]),
            }
        )
    write_shards(samples, folder, shard_bytes=7 * 4 * 1024, name="photos")
    return samples


def write_spatial_run(folder, data):
    """A run of random weights with a spatial latent of 3 channels at half the resolution."""
    config = tiny_config(latent="spatial", kind="gaussian", channels=3)
    config.data.train = config.data.validation = str(data)
    write_run(folder, config, SIZES[0])
    return folder


def samples_of(folder):
    """As a plain webdataset user reads them."""
    shards = sorted(str(path) for path in folder.glob("*.tar"))
    return list(wds.WebDataset(shards, shardshuffle=False))


def tensors_of(folder):
    return [safetensors.torch.load(s["latent.safetensors"]) for s in samples_of(folder)]


def source_image(photos, number):
    """The image of a sample, uint8 (1, C, H, W), read by webdataset and Pillow."""
    pixels = np.array(Image.open(io.BytesIO(samples_of(photos)[number]["png"])))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()
