"""One picture on its way into a shard: kept byte for byte, or decoded, brought to size, encoded.

In: suffix and bytes. Out: suffix and bytes that the trainer reads, checked by decoding them.
A picture is kept when the trainer reads it as it is and neither size nor format asks for more.
Arrays (.npy, TIFF) and 16-bit PNG are kept always: what would change them is refused. Floats may be
NaN where a pixel is missing; a mask goes through the same resizing and crop as its picture.
"""

from __future__ import annotations

import io
from typing import Any, NamedTuple

from PIL import Image, ImageCms

from vae_dist.config.commands import PackCommand
from vae_dist.data.decode import (
    ARRAYS,
    MASK_MEMBER,
    damage_named,
    decode_mask,
    decode_own,
    foreign,
    has_alpha,
    is_png16,
    kind_of,
    open_by_pillow,
    other_profile,
)
from vae_dist.data.formats import dct_scale, orientation
from vae_dist.data.tar import DamagedSampleError
from vae_dist.data.transforms import resized_mask

FORMATS = {  # of Pillow, by suffix
    **{"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "bmp": "BMP", "gif": "GIF", "ppm": "PPM"},
    **{"avif": "AVIF", "jp2": "JPEG2000"},
}
STORED = ("jpg", "png", "webp")  # in a shard
LOSSY = ("jpg", "webp")
KEPT = "kept byte for byte"
TURNS = {  # by orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
Size = tuple[int, ...]  # (H, W)


class Picture(NamedTuple):
    suffix: str
    data: bytes
    shape: tuple[int, ...]  # C, H, W
    notes: tuple[str, ...] = ()  # what a user wants to know of it
    mask: bytes | None = None  # PNG of as many pixels


def prepare(data: bytes, command: PackCommand, *, mask: bytes | None = None) -> Picture:
    """The picture as it goes into the shard, and the .mask.png that came with it.

    Of the keys of `pack`, size, format, quality, background and max_pixels are followed. Raises
    DamagedSampleError, with the reason.
    """
    kind = kind_of(data)
    if kind is None:
        raise DamagedSampleError(foreign(data) or "no readable picture")
    if kind in ARRAYS or is_png16(data):
        if command.size or command.format not in ("keep", kind):
            name = "16-bit PNG" if kind == "png" else f".{kind}"
            raise DamagedSampleError(f"{name} is kept as it is; leave size and format away")
        shape = decode_own(kind, data, max_pixels=command.max_pixels).shape
        picture, have = Picture(kind, data, shape, (KEPT,)), shape[1:]
    else:
        # with a mask it is decoded in full, then resized: blocks of a reduced JPEG would leak
        picture, have = _prepared(kind, data, command, exact=mask is not None)
    if mask is not None:
        picture = picture._replace(mask=_mask_as_packed(mask, have, picture.shape[1:], command))
    return picture


def _prepared(kind: str, data: bytes, command: PackCommand, *, exact: bool) -> tuple[Picture, Size]:
    """The picture, and its (H, W) in the source, upright."""
    image = open_by_pillow(data, FORMATS[kind], command.max_pixels)
    profile = other_profile(image)
    have: Size = (image.height, image.width)
    background = command.background if has_alpha(image) else "none"
    notes: tuple[str, ...] = ()
    if getattr(image, "is_animated", False):
        notes = ("animated, the first frame is taken",)
    if kind in STORED:  # whatever becomes of it: what is damaged is decided in one place
        shape = decode_own(kind, data, max_pixels=command.max_pixels).shape
        have = shape[1:]
        is_same = command.format in ("keep", kind) and _target(have, command.size) == have
        if is_same and background == "none" and profile is None:
            return Picture(kind, data, shape, (KEPT, *notes)), have
    kept_as = "jpg" if kind in LOSSY else "png"
    suffix = kept_as if command.format == "keep" else command.format
    with damage_named(kind):
        if command.size and kind == "jpg" and not exact:
            longest = command.size if isinstance(command.size, int) else max(command.size)
            scale = dct_scale(image.height, image.width, (longest, longest))
            image.draft(None, (image.width // scale, image.height // scale))
        if (turn := TURNS.get(orientation(image.info))) is not None:
            image = image.transpose(turn)
        image = _resized(_converted(image, background, profile, suffix), command.size)
        file = io.BytesIO()
        options: dict[str, Any] = {"quality": command.quality} if suffix in LOSSY else {}
        image.save(file, FORMATS[suffix], **options)
    shape = (len(image.getbands()), image.height, image.width)
    notes += ("converted to sRGB",) if profile else ()
    return Picture(suffix, file.getvalue(), shape, notes), have


def _converted(
    image: Image.Image, background: str, profile: ImageCms.ImageCmsProfile | None, suffix: str
) -> Image.Image:
    """Upright image as L, RGB or RGBA, in sRGB and on the background."""
    if profile is not None:
        srgb = ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, profile, srgb) or image
        image.info.pop("icc_profile", None)
    if not has_alpha(image):
        return image.convert("L" if image.mode in ("1", "L") else "RGB")
    if background != "none":
        ground = Image.new("RGBA", image.size, background)
        return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")
    if suffix == "jpg":
        raise DamagedSampleError("transparent pixels; set background=white or black")
    return image.convert("RGBA")


def _target(have: Size, size: Any) -> Size:
    """(H, W) of the picture in the shard; a shorter side is never enlarged."""
    if not isinstance(size, int):
        return tuple(size)
    scale = size / min(have)
    return tuple(round(side * scale) for side in have) if 0 < scale < 1 else have


def _resized(image: Image.Image, size: Any) -> Image.Image:
    have = image.height, image.width
    height, width = _target(have, size)
    if (height, width) == have:
        return image
    return image.resize((width, height), Image.Resampling.BICUBIC, box=_box(have, size))


def _box(have: Size, size: Any) -> tuple[float, float, float, float]:
    """What of a picture is resized: all of it, or the middle of the shape of [H, W]; as Pillow has
    boxes: left, upper, right, lower."""
    height, width = have
    if isinstance(size, int):
        return (0, 0, width, height)
    wanted = size[1] / size[0]
    crop_width, crop_height = float(width), float(height)
    if width / height > wanted:
        crop_width = wanted * height
    elif width / height < wanted:
        crop_height = width / wanted
    left, top = (width - crop_width) * 0.5, (height - crop_height) * 0.5
    return (left, top, left + crop_width, top + crop_height)


def _mask_as_packed(data: bytes, have: Size, want: Size, command: PackCommand) -> bytes:
    """have, want: (H, W) of the picture in source and shard. Kept byte for byte where they are the
    same. Raises DamagedSampleError."""
    try:
        observed = decode_mask({MASK_MEMBER: data}, have, max_pixels=command.max_pixels)
    except DamagedSampleError as error:
        raise DamagedSampleError(f"its .{MASK_MEMBER}: {error}") from None
    if have == want:
        return data
    resized = resized_mask(observed[None], (want[0], want[1]), box=_box(have, command.size))
    file = io.BytesIO()
    Image.fromarray(255 * resized[0]).save(file, "PNG")
    return file.getvalue()
