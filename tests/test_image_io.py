"""Picture files of every kind, honest and hostile, through `open_image`."""

import io
import itertools
import resource
import struct
import time
import zlib

import numpy as np
import PIL.Image
import pytest
from PIL import ImageCms

from openchameleon.errors import UserError
from openchameleon.image_io import open_image, to_rgb


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


def saved(picture: PIL.Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def png(
    width: int, height: int, depth: int, colour: int, raw: bytes, interlace: int = 0, parts: int = 1
) -> bytes:
    """A PNG written by hand, so that its header and its rows may disagree."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    body = zlib.compress(raw)
    cuts = [len(body) * i // parts for i in range(parts + 1)]
    idat = b"".join(chunk(b"IDAT", body[a:b]) for a, b in itertools.pairwise(cuts))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + idat + chunk(b"IEND", b"")


@pytest.mark.parametrize("format", ["PNG", "BMP", "WEBP"])
def test_lossless_formats_give_the_exact_pixels(format):
    pixels = noise(13, 7)
    options = {"lossless": True} if format == "WEBP" else {}
    picture = open_image(saved(PIL.Image.fromarray(pixels), format, **options))
    assert picture.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(picture), pixels)


def test_jpeg_and_gif_give_nearly_the_pixels():
    flat = PIL.Image.new("RGB", (16, 16), (200, 30, 60))
    for data in (saved(flat, "JPEG", quality=95), saved(flat, "GIF")):
        difference = np.asarray(open_image(data)).astype(int) - (200, 30, 60)
        assert np.abs(difference).max() <= 3


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1)])
def test_one_pixel_wide_pictures_open(size):
    assert open_image(saved(PIL.Image.new("RGB", size), "PNG")).size == size


def test_a_path_opens_as_its_bytes_do(tmp_path):
    path = tmp_path / "a b \N{CAT FACE}.png"
    PIL.Image.fromarray(noise(5, 4)).save(path)
    for source in (path, str(path)):
        np.testing.assert_array_equal(np.asarray(open_image(source)), noise(5, 4))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_set_upright(orientation):
    T = PIL.Image.Transpose
    undo = {2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE,
            6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270}  # fmt: skip
    upright = PIL.Image.fromarray(noise(6, 4))
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    picture = open_image(saved(stored, "PNG", exif=exif))
    np.testing.assert_array_equal(np.asarray(picture), noise(6, 4))


def test_broken_exif_does_not_refuse_the_picture():
    data = saved(PIL.Image.new("RGB", (8, 8)), "JPEG", exif=b"Exif\x00\x00garbage" * 3)
    assert open_image(data).size == (8, 8)


def test_transparency_is_blended_with_white():
    rgba = PIL.Image.new("RGBA", (3, 1))
    for x, colour in enumerate([(255, 0, 0, 255), (255, 0, 0, 0), (255, 0, 0, 128)]):
        rgba.putpixel((x, 0), colour)
    pixels = np.asarray(open_image(saved(rgba, "PNG")))[0].astype(int)
    assert pixels[0].tolist() == [255, 0, 0]
    assert pixels[1].tolist() == [255, 255, 255]
    assert np.abs(pixels[2] - (255, 127, 127)).max() <= 1


def test_transparency_of_grey_and_palette_pictures_is_blended_with_white():
    grey = PIL.Image.new("LA", (2, 1), (0, 255))
    grey.putpixel((1, 0), (0, 0))
    assert np.asarray(open_image(saved(grey, "PNG")))[0, :, 0].tolist() == [0, 255]
    palette = PIL.Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    pixels = np.asarray(open_image(saved(palette, "PNG", transparency=0)))[0]
    assert pixels.tolist() == [[255, 255, 255], [40, 50, 60]]


def test_sixteen_bit_levels_are_scaled_not_clipped():
    grey = open_image(png(1, 1, 16, 0, b"\0" + struct.pack(">H", 40000)))
    assert abs(grey.getpixel((0, 0))[0] - 156) <= 1
    colour = open_image(png(1, 1, 16, 2, b"\0" + struct.pack(">HHH", 40000, 0, 65535)))
    assert np.abs(np.array(colour.getpixel((0, 0))) - (156, 0, 255)).max() <= 1


def test_one_bit_and_cmyk_pictures_have_the_right_colours():
    one_bit = open_image(saved(PIL.Image.new("1", (2, 2), 1), "PNG"))
    assert one_bit.getpixel((0, 0)) == (255, 255, 255)
    cmyk = PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # magenta and yellow ink: red
    red = open_image(saved(cmyk, "JPEG", quality=95)).getpixel((4, 4))
    assert np.abs(np.array(red) - (255, 0, 0)).max() <= 3


def test_a_colour_profile_is_converted_and_a_broken_one_ignored():
    flat = PIL.Image.new("RGB", (4, 4), (200, 100, 50))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    same = open_image(saved(flat, "PNG", icc_profile=srgb)).getpixel((0, 0))
    assert np.abs(np.array(same) - (200, 100, 50)).max() <= 2
    assert open_image(saved(flat, "PNG", icc_profile=b"?" * 200)).getpixel((0, 0)) == (200, 100, 50)


def test_a_profile_with_swapped_primaries_changes_the_colours():
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = profile.find(b"rXYZ"), profile.find(b"bXYZ")
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    data = saved(PIL.Image.new("RGB", (2, 2), (255, 0, 0)), "PNG", icc_profile=bytes(profile))
    red_level, _, blue_level = open_image(data).getpixel((0, 0))
    assert blue_level > 200
    assert red_level < 60


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_the_first_frame_of_an_animation_is_taken(format):
    frames = [PIL.Image.new("RGB", (8, 8), c) for c in ("red", "blue", "lime")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = saved(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert open_image(data).getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("side", [12_000, 60_000])
def test_a_bomb_is_refused_from_its_header_without_memory(side):
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(UserError, match="too large"):
        open_image(png(side, side, 8, 2, b""))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    ("format", "at", "claim"),
    [("GIF", 6, struct.pack("<HH", 60_000, 60_000)),
     ("BMP", 18, struct.pack("<ii", 60_000, 60_000)),
     ("JPEG", b"\xff\xc0", struct.pack(">HH", 60_000, 60_000))],
)  # fmt: skip
def test_other_formats_cannot_claim_too_many_pixels_either(format, at, claim):
    data = bytearray(saved(PIL.Image.new("RGB", (16, 16)), format))
    at = at if isinstance(at, int) else data.find(at) + 5
    data[at : at + len(claim)] = claim
    with pytest.raises(UserError, match="too large"):
        open_image(bytes(data))


def test_rows_that_inflate_without_end_are_read_no_further_than_the_header_says():
    data = png(4, 4, 8, 0, bytes(60_000_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert open_image(data).size == (4, 4)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000


def test_max_pixels_and_max_bytes_are_the_callers():
    data = saved(PIL.Image.new("RGB", (10, 10)), "PNG")
    assert open_image(data, max_pixels=100).size == (10, 10)
    with pytest.raises(UserError, match="too large"):
        open_image(data, max_pixels=99)
    with pytest.raises(UserError, match="too large"):
        open_image(data, max_bytes=len(data) - 1)


@pytest.mark.parametrize("rows", [0, 10, 63])
def test_a_png_with_missing_rows_is_refused(rows):
    with pytest.raises(UserError, match="rows of the picture are missing"):
        open_image(png(64, 64, 8, 2, bytes(rows * (1 + 64 * 3))))


@pytest.mark.parametrize("parts", [1, 7])
def test_a_whole_png_of_one_colour_has_all_its_rows(parts):
    data = png(900, 700, 8, 2, bytes(700 * (1 + 900 * 3)), parts=parts)
    assert open_image(data).size == (900, 700)


def test_an_interlaced_png_is_measured_by_its_passes():
    sizes = [(1, 1), (1, 1), (2, 1), (1, 2), (3, 1), (2, 3), (5, 2)]  # of a 5 x 5 picture
    raw = b"".join(b"\0" + b"\x80" * columns for columns, rows in sizes for _ in range(rows))
    assert open_image(png(5, 5, 8, 0, raw, interlace=1)).getpixel((4, 4)) == (128, 128, 128)
    with pytest.raises(UserError, match="missing"):
        open_image(png(5, 5, 8, 0, raw[:-6], interlace=1))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
def test_a_truncated_file_is_refused(format):
    data = saved(PIL.Image.fromarray(noise(64, 64)), format)
    for kept in (len(data) // 2, len(data) // 10):
        with pytest.raises(UserError):
            open_image(data[:kept])


def test_no_damage_raises_anything_but_a_user_error():
    rng = np.random.default_rng(1)
    picture = PIL.Image.fromarray(noise(24, 24, 4))
    for format in ("PNG", "JPEG", "GIF", "BMP", "WEBP"):
        clean = saved(picture.convert("RGB") if format in ("JPEG", "BMP") else picture, format)
        for _ in range(60):
            data = bytearray(clean)
            for at in rng.integers(0, len(data), 8):
                data[at] = rng.integers(0, 256)
            try:
                assert open_image(bytes(data), max_pixels=1 << 20).mode == "RGB"
            except UserError:
                continue


@pytest.mark.parametrize(
    "data",
    [b"<html><body>404</body></html>", b"just text", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"8BPS\0\1",
     b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"II*\0\x08\0\0\0", b"\x89PNG\r\n\x1a\n"],
)  # fmt: skip
def test_what_is_no_picture_is_refused_by_name(data, tmp_path):
    path = tmp_path / "thing.png"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"thing\.png is not a picture that can be read"):
        open_image(path)


def test_missing_empty_and_folder_are_told_apart(tmp_path):
    (tmp_path / "empty.png").touch()
    with pytest.raises(UserError, match=r"empty\.png is empty"):
        open_image(tmp_path / "empty.png")
    with pytest.raises(UserError, match=r"There is no picture .*gone\.png"):
        open_image(tmp_path / "gone.png")
    with pytest.raises(UserError, match="is a folder"):
        open_image(tmp_path)
    for bad in ("a\0b.png", "/dev/null", "x" * 5000):
        with pytest.raises(UserError):
            open_image(bad)


def test_to_rgb_leaves_a_plain_rgb_picture_alone():
    picture = PIL.Image.new("RGB", (2, 2))
    assert to_rgb(picture) is picture
