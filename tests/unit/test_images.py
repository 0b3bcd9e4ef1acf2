"""Files to pixels: what torchvision's transforms give on PIL images, and an error for other files."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from rafaga import images
from rafaga.bundle import ImagePreparation, Interpolation
from rafaga.errors import InvalidImage
from rafaga.formats import FORMATS, Stopped
from tests.integration import messages

LIMIT = 50_000_000
IMAGENET = ImagePreparation(height=224, width=224, channels=3, resize_shorter=256)
MNIST = ImagePreparation(height=28, width=28, channels=1)
FREE = ImagePreparation(height=None, width=None, channels=3)
WHOLE = "whole JPEG, PNG, WebP, GIF or BMP file"
BOUNDED = ImagePreparation(height=None, width=None, channels=3, resize_shorter=80, max_longer=133)


def prepare(data: bytes, preparation: ImagePreparation = IMAGENET) -> np.ndarray:
    return images.prepare(data, preparation, LIMIT).pixels


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smooth, as photos are, and different everywhere."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (7 + k) + seed) + np.cos(y / (11 + 2 * k)) + np.sin((x + y) / (23 + k)) for k in range(4)]
    pixels = (np.stack(waves, -1) * 42 + 128).clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels[..., :3]).convert(mode) if mode != "RGBA" else Image.fromarray(pixels)


def png(width: int, height: int, bits: int, lines: bytes) -> bytes:
    """Of three colours, whatever `lines` are."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def commented_gif() -> bytes:
    """Of many comments."""
    data = encoded(picture(8, 8).convert("P"), "GIF")
    screen = 13 + 3 * 2 ** ((data[10] & 7) + 1)
    return data[:screen] + b"!\xfe" + b"\x01x" * 200_000 + b"\0" + data[screen:]


def compressed_bmp() -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, 4, 4, 1, 8, 1, 8, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + 40 + 1024) + head + bytes(1024) + bytes((16, 1, 0, 1)) * 2


def by_torchvision(image: Image.Image, preparation: ImagePreparation) -> np.ndarray:
    transforms = pytest.importorskip("torchvision.transforms")
    how = transforms.InterpolationMode(preparation.interpolation.value)
    size = preparation.resize_shorter or (preparation.height, preparation.width)
    steps = [transforms.Resize(size, how, max_size=preparation.max_longer)]
    if preparation.resize_shorter and preparation.height:
        steps.append(transforms.CenterCrop((preparation.height, preparation.width)))
    pixels = np.asarray(transforms.Compose(steps)(image.convert("L" if preparation.channels == 1 else "RGB")))
    return pixels[..., np.newaxis] if preparation.channels == 1 else pixels


def assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal but for the last bit of a few values: coordinates are rounded in another place."""
    assert got.shape == expected.shape
    assert got.dtype == np.uint8
    difference = np.abs(got.astype(int) - expected.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


class TestLikeTorchvision:
    @pytest.mark.parametrize(
        ("preparation", "size"),
        [
            *((IMAGENET, size) for size in ((256, 256), (500, 333), (333, 500), (257, 900), (1000, 260), (97, 41))),
            *((IMAGENET, size) for size in ((3, 2), (1, 1))),
            *((BOUNDED, size) for size in ((64, 48), (48, 64), (30, 90), (500, 100))),
            (MNIST, (90, 70)),
            (ImagePreparation(height=64, width=64, channels=3, resize_shorter=48), (100, 100)),  # padded
        ],
    )
    def test_sizes(self, preparation: ImagePreparation, size: tuple[int, int]) -> None:
        image = picture(*size)
        assert_close(prepare(encoded(image), preparation), by_torchvision(image, preparation))

    @pytest.mark.parametrize("preparation", [IMAGENET, ImagePreparation(height=160, width=200, channels=3)])
    @pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1", "CMYK"])
    def test_modes(self, mode: str, preparation: ImagePreparation) -> None:
        image = picture(300, 280).convert(mode)
        data = encoded(image, "JPEG" if mode == "CMYK" else "PNG")
        with Image.open(io.BytesIO(data)) as opened:
            assert_close(prepare(data, preparation), by_torchvision(opened, preparation))

    @pytest.mark.parametrize("interpolation", Interpolation)
    @pytest.mark.parametrize("shorter", [None, 256])
    @pytest.mark.parametrize("size", [(300, 280), (500, 333)])
    def test_interpolations(self, size: tuple[int, int], shorter: int | None, interpolation: Interpolation) -> None:
        image = picture(*size)
        preparation = ImagePreparation(
            height=224, width=224, channels=3, resize_shorter=shorter, interpolation=interpolation
        )
        assert_close(prepare(encoded(image), preparation), by_torchvision(image, preparation))

    def test_large_jpegs_are_shrunk_while_decoding(self) -> None:
        """Not bit by bit what a full decode gives, and near enough to it. Nearest picks pixels of the file itself."""
        image = picture(2400, 1600)
        data = encoded(image, "JPEG", quality=95)
        got = prepare(data).astype(int)
        assert np.abs(got - by_torchvision(image, IMAGENET).astype(int)).mean() < 1.0
        nearest = ImagePreparation(height=100, width=100, channels=3, interpolation=Interpolation.NEAREST)
        with Image.open(io.BytesIO(data)) as opened:
            assert_close(prepare(data, nearest), by_torchvision(opened, nearest))


class TestOrientation:
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_says_which_side_is_up(self, orientation: int) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        pixels = np.zeros((64, 96, 3), np.uint8)
        pixels[:32, :32] = (255, 0, 0)
        data = encoded(Image.fromarray(pixels), "JPEG", exif=exif, quality=100)
        stored = ImagePreparation(height=None, width=None, channels=3, exif_orientation=False)
        assert images.prepare(data, stored, LIMIT).size == prepare(data, stored).shape[:2] == (64, 96)
        got, size = images.prepare(data, FREE, LIMIT)
        assert size == got.shape[:2]
        assert got.shape == ((96, 64, 3) if orientation >= 5 else (64, 96, 3))
        # Where the corner that was drawn first is to be seen: top left, top right, bottom right or bottom left.
        rows, columns = got.shape[:2]
        corners = [got[8, 8], got[8, columns - 8], got[rows - 8, columns - 8], got[rows - 8, 8]]
        assert int(np.argmax([c[0] for c in corners])) == [0, 1, 2, 3, 0, 1, 2, 3][orientation - 1]

    @pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # by Pillow
    def test_damaged_exif_does_not_prevent_decoding(self) -> None:
        image = picture(40, 30)
        data = encoded(image, "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff nonsense")
        assert prepare(data, FREE).shape == (30, 40, 3)


class TestFormats:
    @pytest.mark.parametrize(("kind", "frames"), [("WEBP", 1), ("BMP", 1), ("GIF", 2), ("WEBP", 2)])
    def test_the_first_frame_as_png_gives_it(self, kind: str, frames: int) -> None:
        image, second = picture(300, 280), picture(300, 280, seed=1)
        if kind == "GIF":
            image = image.quantize(64)
        animation = {"save_all": True, "append_images": [second]} if frames > 1 else {}
        assert_close(prepare(encoded(image, kind, lossless=True, **animation)), by_torchvision(image, IMAGENET))

    def test_sixteen_bits_are_scaled(self) -> None:
        """Pillow's conversion would clip grey to white. Of colours it keeps the higher byte."""
        grey = np.arange(0, 65_536, 65_535 // 255, dtype=np.uint16).reshape(16, 16)
        data = encoded(Image.fromarray(grey))
        assert prepare(data, ImagePreparation(height=None, width=None, channels=1)).ravel().tolist() == list(range(256))
        assert prepare(data, FREE)[..., 1].ravel().tolist() == list(range(256))
        lines = b"".join(b"\0" + np.repeat(line, 3).astype(">u2").tobytes() for line in grey)
        assert prepare(png(16, 16, 16, lines), FREE)[..., 1].ravel().tolist() == list(range(256))


class TestRefused:
    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"", WHOLE),
            (b"not an image", WHOLE),
            (b"\xff\xd8\xff", WHOLE),
            (b"\x89PNG\r\n\x1a\n", WHOLE),
            (b"RIFF\x10\0\0\0WEBPVP8 \0\0\0\0", WHOLE),
            (b"GIF89a" + bytes(99), WHOLE),
            (b"BM" + bytes(99), WHOLE),
            (encoded(picture(20, 20), "TIFF"), "WebP, GIF or BMP file, got TIFF: convert it first"),
            (b"\0\0\0\x1cftypheic" + bytes(99), "got HEIC: convert it first"),
            (b"\0\0\0\x1cftypavif" + bytes(99), "got AVIF: convert it first"),
            (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "got SVG: convert it first"),
            (b"%PDF-1.7", "got PDF: convert it first"),
            # Every scan visits all pixels, and an empty one is 75 bytes.
            (messages.many_scans(100), "at most 100 scans in a JPEG file, got 1"),
            (commented_gif(), "header has too many parts"),
            # Pillow decodes it in Python, pixel by pixel.
            (compressed_bmp(), "a compressed BMP file"),
        ],
        ids=lambda value: value[:30] if isinstance(value, str) else "",
    )
    def test_other_files(self, data: bytes, message: str) -> None:
        with pytest.raises(InvalidImage, match=message):
            prepare(data)

    @pytest.mark.parametrize("kind", FORMATS)
    @pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
    def test_truncated_files(self, kind: str, share: float) -> None:
        data = encoded(picture(200, 200), kind)
        with pytest.raises(InvalidImage):
            prepare(data[: int(len(data) * share)])

    @pytest.mark.filterwarnings("ignore:.*DecompressionBomb")  # a damaged header may say any size
    @pytest.mark.parametrize("kind", FORMATS)
    def test_damaged_files_give_pixels_or_a_clean_error(self, kind: str) -> None:
        data = encoded(picture(120, 100), kind)
        rng = np.random.default_rng(0)
        for _ in range(200):
            damaged = bytearray(data)
            for at in rng.integers(0, len(data), 3):
                damaged[at] = rng.integers(0, 256)
            with suppress(InvalidImage):
                assert prepare(bytes(damaged)).shape == (224, 224, 3)

    @pytest.mark.parametrize(
        ("size", "message"),
        [
            ((8000, 8000), "at most 50000000 pixels, got 64000000"),
            ((14_143, 14_143), "more than 50000000 pixels"),
            ((60_000, 60_000), "more than 50000000 pixels"),
            ((2**31 - 1, 1), "more than 50000000 pixels"),
            # Pillow keeps a pointer per row: of 95 kB of PNG, 1x49,000,000 pixels, it made 1.5 GB.
            ((1, 16_385), "at most 16384 pixels a side, got 16385x1"),
        ],
    )
    def test_a_bomb_is_refused_by_its_header(self, size: tuple[int, int], message: str) -> None:
        """A small file that declares hundreds of megapixels: nothing of that size is ever allocated."""
        data = png(*size, 8, bytes(1000))
        tracemalloc.start()
        try:
            with pytest.raises(InvalidImage, match=message):
                prepare(data)
            assert tracemalloc.get_traced_memory()[1] < 10e6
        finally:
            tracemalloc.stop()

    @pytest.mark.parametrize("kind", [b"VP8X", b"VP8 ", b"VP8L"])
    def test_the_canvas_of_a_webp_file_is_checked_before_it_is_allocated(
        self, kind: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its decoder allocates it twice, as soon as Pillow opens the file."""
        side = 16_000
        heads = {
            b"VP8X": bytes(4) + (side - 1).to_bytes(3, "little") * 2,
            b"VP8 ": bytes(3) + b"\x9d\x01\x2a" + side.to_bytes(2, "little") * 2,
            b"VP8L": b"\x2f" + (side - 1 | side - 1 << 14).to_bytes(4, "little") + bytes(5),
        }
        data = b"RIFF" + (22).to_bytes(4, "little") + b"WEBP" + kind + (10).to_bytes(4, "little") + heads[kind]
        monkeypatch.delattr(Image, "open")
        with pytest.raises(InvalidImage, match="at most 50000000 pixels, got 256000000"):
            prepare(data)

    def test_a_sliver_is_not_blown_up(self) -> None:
        """1x16384 pixels, shorter side to 256: the whole of it would be of a gigapixel."""
        sliver = encoded(Image.new("RGB", (1, 16_384)))
        assert prepare(sliver).shape == (224, 224, 3)
        assert prepare(encoded(Image.new("RGB", (16_384, 1)))).shape == (224, 224, 3)
        assert prepare(encoded(picture(1000, 7)), BOUNDED).shape == (1, 133, 3)
        with pytest.raises(InvalidImage, match="smaller image"):
            prepare(sliver, ImagePreparation(height=None, width=None, channels=3, resize_shorter=256))

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP"])
    def test_a_decode_whose_caller_has_gone_is_stopped(self, kind: str) -> None:
        """1. A whole decode asks many times whether to go on. 2. Told to stop at any of them, it does."""
        noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)
        data = encoded(Image.fromarray(noise), kind)
        asked: list[bool] = []
        images.prepare(data, FREE, LIMIT, lambda: bool(asked.append(False)))  # type: ignore[func-returns-value]
        assert len(asked) > len(data) / 32_768
        for last in (0, len(asked) // 2, len(asked) - 1):
            asks = iter(range(last + 1))
            with pytest.raises(Stopped):
                images.prepare(data, FREE, LIMIT, lambda: next(asks) == last)  # noqa: B023
