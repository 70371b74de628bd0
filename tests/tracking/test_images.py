import numpy as np
import torch
from PIL import Image

from vae_dist.tracking import images as module
from vae_dist.tracking.images import grid, save_png, single, to_uint8


def flat(levels, *, size=28):
    """Images of one level each, uint8."""
    values = torch.tensor(list(levels), dtype=torch.uint8).view(-1, 1, 1, 1)
    return values.expand(-1, 1, size, size)


def test_to_uint8_inverts_the_scaling_of_all_levels():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.float() / 127.5 - 1.0), levels)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
    wide = torch.tensor([0, 128, 129, 257, 65535 - 129, 65535]).to(torch.uint16)
    assert to_uint8(wide).tolist() == [0, 0, 1, 1, 254, 255]


def test_grids_place_images_row_by_row_enlarged_without_blending():
    picture = np.asarray(grid(flat([10, 20, 30, 40, 50])))
    pitch = 84 + 2  # 28 pixels three times, and a line of two
    assert picture.shape == (2 * pitch + 2, 3 * pitch + 2)
    assert picture[44::pitch, 44::pitch].tolist() == [[10, 20, 30], [40, 50, picture[0, 0]]]
    assert (picture[:, [0, 1, pitch, pitch + 1]] == picture[0, 0]).all()
    assert grid(flat([1], size=64)).size == (68, 68)  # large images are not enlarged
    image = torch.randint(0, 256, (1, 3, 28, 20), dtype=torch.uint8)
    inner = np.asarray(grid(image))[2:-2, 2:-2]
    assert (inner == image[0].permute(1, 2, 0).numpy().repeat(3, 0).repeat(3, 1)).all()
    # images of several sizes stand in the middle of their cells
    picture = np.asarray(grid([flat([10], size=60)[0], flat([20])[0, :, :20, :]]))
    second = picture[2:62, 64:124]
    assert picture.shape == (64, 2 * 62 + 2) and (picture[2:62, 2:62] == 10).all()
    assert (second[20:40, 16:44] == 20).all() and (second == 20).sum() == 20 * 28
    # two channels are magenta and green, and of many the first three are shown
    levels = torch.tensor([10, 200, 30, 40], dtype=torch.uint8).view(4, 1, 1)
    assert np.asarray(single(levels[:2]))[0, 0].tolist() == [10, 200, 10]
    assert np.asarray(grid([levels.expand(4, 50, 50)]))[10, 10].tolist() == [10, 200, 30]


def test_reconstructions_stand_directly_below_their_inputs():
    picture = module.side_by_side(flat(range(1, 7)), flat(range(101, 107)))  # 4 columns
    column = np.asarray(picture)[:, 44]
    starts = [int(np.argmax(column == level)) for level in (1, 101, 5, 105)]
    within, between, again = np.diff(starts) - 84
    assert 0 < within == again < between


def test_a_png_is_found_by_name_and_step_and_what_its_caption_says(tmp_path):
    image = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    for name in ("by_class_00000020", "by_class_00000010", "other", "samples_00000010"):
        path = save_png(single(image), tmp_path / "deep" / f"{name}.png")
        assert (np.asarray(Image.open(path)) == image.permute(1, 2, 0).numpy()).all()
    found = {name: list(paths) for name, paths in module.find_images(tmp_path / "deep").items()}
    assert found == {"by_class": [10, 20], "samples": [10]}
    metrics = {"eval/neg_elbo_nats": 94.12, "eval/bits_per_dim": 0.1732}
    assert module.image_caption(1500, metrics) == "step 1500 | 94.12 nats | 0.1732 bits/dim"
    assert module.image_caption(3, {"eval/bits_per_dim": None}) == "step 3"
