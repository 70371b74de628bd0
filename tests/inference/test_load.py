"""From a run folder, which may come from anybody, to a model and the images that it is shown."""

import numpy as np
import pytest
import torch

from tests.support.tiny_run import tiny_config, write_images, write_run
from vae_dist.config.commands import RunCommand
from vae_dist.config.errors import ConfigError
from vae_dist.data.tar import DamagedSampleError
from vae_dist.inference.latents import from_bytes, to_bytes
from vae_dist.inference.load import first_examples, load_model, open_images


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("channels", value) for value in ([8, 16], [8, 2**24])),  # of 20 PB
        *(("norm_groups", 3), ("blocks", 10**9)),
        *(("image_size", value) for value in ([8], [8, -6], "large")),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_memory_is_taken(tmp_path, key, value):
    run = write_run(tmp_path, tiny_config(), (8, 6))
    if key == "image_size":
        run.checkpoints.amend(20, {key: value}, best_step=None)
    else:
        setattr((config := run.config()).model, key, value)
        run.write_config(config)
    with pytest.raises(ConfigError, match="do not fit the model of its config"):
        load_model(RunCommand(run=str(tmp_path), device="cpu"))


def test_images_come_from_the_validation_shards_or_those_given(tmp_path):
    pixels = np.full((4, 8, 6), 10, np.uint8)
    pixels[1] = 0  # written as no PNG
    write_images(tmp_path / "a", pixels)
    write_images(tmp_path / "b", np.full((3, 8, 6), 20, np.uint8))
    config = tiny_config()
    config.data.validation, config.data.retry_s = str(tmp_path / "a"), 7.0
    for data, level in (("", 10), (str(tmp_path / "b"), 20)):
        found = open_images(config, data, create=True)
        assert found.retry_s == found.reader().retry_s == 7
        images = first_examples(found, 100).images
        assert images.shape == (3, 1, 8, 6)  # unreadable ones are left out
        assert (images == level).all()
    with pytest.raises(ConfigError, match="data="):
        open_images(config, str(tmp_path / "c"), create=True)
    # nothing is written beside what a run folder names, only beside what the user does
    (index,) = (tmp_path / "b").glob("*.idx")
    index.unlink()
    config.data.validation = str(tmp_path / "b")
    config.data.train, config.data.bundled = str(tmp_path / "new" / "train"), "digits"
    with pytest.raises(ConfigError, match="has no index"):
        open_images(config, "", create=True)
    assert not index.exists() and not (tmp_path / "new").exists()
    open_images(config, str(tmp_path / "b"), create=True)
    assert index.exists()


def test_a_run_folder_names_local_paths_and_http_alone():
    config = tiny_config()
    for spec in (
        "pipe:touch hacked",
        "file:///etc/x.tar",
        "s3://bucket/x.tar",
        "https://host/x::file:///x.tar",
        ["data", "pipe:touch hacked"],
        {"path": "data", "index": "gs://bucket/index"},
        [{"path": "memory://x.tar", "weight": 1}, {"path": "data", "weight": 1}],
    ):
        config.data.validation = spec
        with pytest.raises(ConfigError, match=r"data.validation=.*only local paths and http\(s\)"):
            open_images(config, "", create=True)


def test_damaged_latents_are_named():
    good = to_bytes({"mean": torch.zeros(2, 3)}, (4, 5))
    assert from_bytes(good)[1] == (4, 5)
    infinite = to_bytes({"mean": torch.full((2,), torch.inf)}, (4, 5))
    whole = to_bytes({"mean": torch.zeros(2, dtype=torch.int64)}, (4, 5))
    for data in (b"", good[:-1], good[:9], infinite, whole):
        with pytest.raises(DamagedSampleError, match="no latents in"):
            from_bytes(data)
