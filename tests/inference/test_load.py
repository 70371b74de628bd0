"""From a run folder, which may come from anybody, to a model and the images that it is shown."""

import pytest
import torch

from tests.support.tiny_run import random_pixels, tiny_config, write_images, write_run
from vae_dist.config.commands import RunCommand
from vae_dist.config.errors import ConfigError
from vae_dist.data.tar import DamagedSampleError
from vae_dist.inference.latents import from_bytes, to_bytes
from vae_dist.inference.load import load_model, open_images


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


def test_an_index_is_written_beside_what_the_user_names_alone(tmp_path):
    write_images(tmp_path / "own", random_pixels(3, 8, 6))
    (index,) = (tmp_path / "own").glob("*.idx")
    index.unlink()
    config = tiny_config()
    config.data.validation, config.data.retry_s = str(tmp_path / "own"), 7.0
    config.data.train, config.data.bundled = str(tmp_path / "new" / "train"), "digits"
    with pytest.raises(ConfigError, match="has no index"):
        open_images(config, "", create=True)
    assert not index.exists() and not (tmp_path / "new").exists()
    found = open_images(config, str(tmp_path / "own"), create=True)
    assert index.exists() and found.retry_s == found.reader().retry_s == 7
    with pytest.raises(ConfigError, match="data="):
        open_images(config, str(tmp_path / "no"), create=True)


def test_a_run_folder_names_local_paths_and_http_alone():
    config = tiny_config()
    for place in ("pipe:rm x", "file:///x.tar", "s3://bucket/x", "https://host/x::file:///x"):
        for spec in (place, ["data", place], {"path": "data", "index": place}):
            config.data.validation = spec
            with pytest.raises(ConfigError, match=r"validation=.*only local paths and http\(s\)"):
                open_images(config, "", create=True)


def test_damaged_latents_are_named():
    for tensor in (torch.full((2,), torch.inf), torch.zeros(2, dtype=torch.int64)):
        with pytest.raises(DamagedSampleError, match="no latents in"):
            from_bytes(to_bytes({"mean": tensor}, (4, 5)))
