"""Pictures of every kind become upright RGB; damaged and huge ones are refused with a reason."""

from __future__ import annotations

import io
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from gato.envs.readers.pictures import open_image, read_picture
from gato.envs.readers.reader import ReadOptions


def encoded(picture: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


@pytest.fixture
def quarters() -> Image.Image:
    """Return a picture, wider than high, whose upper left quarter is red and whose rest is blue."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[...] = (0, 0, 255)
    pixels[:10, :20] = (255, 0, 0)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
def test_formats_without_loss_are_exact(format, shown):
    pixels = shown[0].pixels
    np.testing.assert_array_equal(open_image(encoded(Image.fromarray(pixels), format)), pixels)


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "GIF"])
def test_other_formats_are_near(format, quarters):
    got = open_image(encoded(quarters, format)).astype(int)
    assert np.abs(got - np.asarray(quarters)).mean() < 8


def test_a_file_is_read_as_its_bytes_are(tmp_path, shown):
    (tmp_path / "a.png").write_bytes(shown[1].encoded())
    np.testing.assert_array_equal(open_image(tmp_path / "a.png"), shown[1].pixels)


def test_a_turned_photograph_is_set_upright(quarters):
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned: what is stored is to be turned clockwise
    stored = quarters.rotate(90, expand=True)
    got = open_image(encoded(stored, "JPEG", exif=exif, quality=95)).astype(int)
    assert got.shape == (20, 40, 3)
    assert np.abs(got - np.asarray(quarters)).mean() < 8


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode, quarters):
    layer = quarters.convert("RGBA")
    alpha = np.full((20, 40), 255, np.uint8)
    alpha[:, 20:] = 0
    layer.putalpha(Image.fromarray(alpha))
    raw = encoded(layer.quantize(8) if mode == "P" else layer.convert(mode))
    assert Image.open(io.BytesIO(raw)).mode == mode
    got = open_image(raw)
    assert (got[:, 20:] == 255).all()
    assert (got[:, :20] < 255).any(-1).all()


def test_grey_cmyk_and_single_bits_become_rgb(quarters):
    grey = open_image(encoded(quarters.convert("L")))
    assert grey.shape == (20, 40, 3)
    assert (grey[0, 0] == 76).all()  # how bright red is
    bits = Image.fromarray(np.eye(16, dtype=np.uint8) * 255).convert("1")
    assert (open_image(encoded(bits))[..., 1] == np.eye(16) * 255).all()
    for format in ("TIFF", "JPEG"):
        cmyk = open_image(encoded(quarters.convert("CMYK"), format)).astype(int)
        assert np.abs(cmyk - np.asarray(quarters)).mean() < 10


def test_sixteen_bits_become_eight():
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    got = open_image(encoded(Image.fromarray(values)))
    np.testing.assert_array_equal(got, np.repeat((values >> 8)[..., None], 3, 2))


def test_the_first_frame_of_an_animation_is_taken(quarters):
    frames = [Image.new("RGB", (20, 20), c) for c in ("red", "lime", "blue")]
    for format in ("GIF", "WEBP", "PNG"):
        raw = encoded(frames[0], format, save_all=True, append_images=frames[1:])
        assert (np.abs(open_image(raw).astype(int) - (255, 0, 0)) < 8).all()


def test_photographs_of_telephones_are_jpeg(quarters):
    # two pictures in one file
    raw = encoded(quarters, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    got = open_image(raw)
    assert np.abs(got.astype(int) - np.asarray(quarters)).mean() < 8


@pytest.mark.parametrize(
    ("picture", "format", "said"),
    [
        (Image.new("F", (8, 8), 0.5), "TIFF", "floating-point"),
        (Image.new("I", (8, 8), 70_000), "TIFF", "32 bits"),
        (Image.new("RGB", (8, 8)), "EPS", "no picture of the formats"),  # it would be run
        (Image.new("RGB", (8, 8)), "TGA", "no picture of the formats"),
    ],
)
def test_what_has_no_meaning_here_is_refused(picture, format, said):
    with pytest.raises(ValueError, match=said):
        open_image(encoded(picture, format))


@pytest.mark.parametrize("raw", [b"", b"no picture", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_what_is_no_picture_is_refused(raw):
    with pytest.raises(ValueError, match="picture"):
        open_image(raw)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no picture at .*gone\.png"):
        open_image(tmp_path / "gone.png")
    with pytest.raises(ValueError, match="no picture at"):
        open_image(tmp_path)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "BMP"])
def test_truncated_pictures_are_refused(format, shown):
    raw = shown[0].encoded(format)
    for share in (0.2, 0.5, 0.9):
        with pytest.raises(ValueError, match=r"damaged picture|no picture"):
            open_image(raw[: int(len(raw) * share)])


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"])
def test_damaged_pictures_are_read_or_refused_and_nothing_else(format, shown):
    rng, raw, refused = np.random.default_rng(0), shown[0].encoded(format), 0
    for _ in range(150):
        damaged = bytearray(raw)
        for at in rng.integers(0, min(len(raw), 400), 3):
            damaged[at] = rng.integers(256)
        try:
            got = open_image(bytes(damaged))
        except ValueError:
            refused += 1
        else:
            assert got.dtype == np.uint8
            assert got.shape[2] == 3
    assert refused


def test_a_huge_picture_is_refused_before_it_is_decoded(bomb, tmp_path, monkeypatch):
    def decode(self: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    with pytest.raises(ValueError, match="900000000"):
        open_image(bomb)
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(ValueError, match="900000000"):
        open_image(tmp_path / "bomb.png")
    # above Pillow's warning, below its error
    head = Image.new("1", (10_000, 10_000))
    with pytest.raises(ValueError, match="10000x10000"):
        open_image(encoded(head))


def test_a_huge_picture_takes_no_memory(bomb, tmp_path):
    (tmp_path / "bomb.png").write_bytes(bomb)
    code = """if True:
        import resource, sys
        from pathlib import Path
        from gato.envs.readers.pictures import open_image
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(20):
            try:
                open_image(Path(sys.argv[1]))
            except ValueError:
                pass
            else:
                raise SystemExit("not refused")
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    command = [sys.executable, "-c", code, str(tmp_path / "bomb.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20_000  # kilobytes; its pixels would take 110 MB and more


def test_a_png_that_unpacks_to_more_than_its_size_stays_small():
    # a header of 8x8 over a stream of 64 MB
    raw = encoded(Image.new("L", (8, 8)))
    at = raw.index(b"IDAT")
    content = zlib.compress(b"\0" * (64 << 20), 1)
    chunk = b"IDAT" + content
    long = raw[: at - 4] + len(content).to_bytes(4, "big") + chunk
    long += zlib.crc32(chunk).to_bytes(4, "big") + raw[raw.index(b"IEND") - 4 :]
    assert open_image(long).shape == (8, 8, 3)


def test_pictures_fit_into_patches_or_the_size_asked_for(tmp_path, quarters):
    path = tmp_path / "wide.png"
    path.write_bytes(encoded(quarters.resize((400, 200))))
    assert read_picture(path, ReadOptions()).shape == (64, 128, 3)
    assert read_picture(path, ReadOptions(image_size=(32, 16))).shape == (16, 32, 3)
    with pytest.raises(ValueError, match="multiples of 16"):
        read_picture(Path(path), ReadOptions(image_size=(30, 16)))
