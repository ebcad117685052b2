"""A good image of a TFRecord, and 40 ways to spoil it or to write it otherwise.

IMAGES is {name: (make() -> the files of a clip's images, what is said)}: words of the error, RIGHT
if they are decoded, None if neither is sure."""
import io
import struct
import zlib
from functools import partial

import numpy as np
from PIL import Image


RIGHT = ""
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)
PIXELS = PIXELS.repeat(8, 0).repeat(8, 1)                       # [48, 64, 3]
GRAY = np.repeat(PIXELS[..., :1], 3, axis=2)


def encoded(form, pixels=PIXELS, mode="RGB", **options):
    data = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(data, form, **options)
    return data.getvalue()


JPEG, PNG = encoded("JPEG", quality=95), encoded("PNG")


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(height, width, depth=8, colour=2, rows=None, extra=b"", interlace=0):
    """A PNG of black, or of `rows`, by hand: 192 MB of pixels become 187 kB."""
    n = width * depth * {0: 1, 2: 3, 4: 2, 6: 4}[colour] // 8
    packer = zlib.compressobj(9)
    data = packer.compress(bytes(n + 1) * height if rows is None else rows) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", data)
            + chunk(b"IEND", b""))


ROWS = b"".join(b"\0" + row.tobytes() for row in PIXELS)


def png_16_bit():
    """PIXELS with 16 bits a value: their own 8, twice."""
    rows = b"".join(b"\0" + np.repeat(row.ravel(), 2).tobytes() for row in PIXELS)
    return png(48, 64, depth=16, rows=rows)


def with_size(height, width):
    """A JPEG whose header has another size."""
    at = JPEG.index(b"\xff\xc0") + 5
    return JPEG[:at] + struct.pack(">HH", height, width) + JPEG[at + 4:]


def segment(marker, data):
    return bytes([0xff, marker]) + struct.pack(">H", len(data) + 2) + data


def thumbnail():
    """EXIF with a small JPEG inside, whose size is not that of the image."""
    small = encoded("JPEG", PIXELS[:8, :8])
    return JPEG[:2] + segment(0xe1, b"Exif\0\0" + small) + JPEG[2:]


def scans(n):
    """A progressive JPEG whose last scan comes n times."""
    data = encoded("JPEG", quality=95, progressive=True)
    last = data[data.rindex(b"\xff\xda"):-2]
    return data[:-2] + last * n + b"\xff\xd9"


def all_of(image):
    return lambda: [image() if callable(image) else image] * 4


IMAGES = {
    # Written otherwise
    "JPEG": (all_of(JPEG), RIGHT),
    "PNG": (all_of(PNG), RIGHT),
    "progressive JPEG": (all_of(partial(encoded, "JPEG", quality=95, progressive=True)), RIGHT),
    "gray JPEG": (all_of(partial(encoded, "JPEG", GRAY, "L", quality=95)), RIGHT),
    "CMYK JPEG": (all_of(partial(encoded, "JPEG", mode="CMYK", quality=95)), RIGHT),
    "gray PNG": (all_of(partial(encoded, "PNG", GRAY, "L")), RIGHT),
    "PNG with alpha": (all_of(partial(encoded, "PNG", mode="RGBA")), RIGHT),
    "gray PNG with alpha": (all_of(partial(encoded, "PNG", GRAY, "LA")), RIGHT),
    "PNG of 16 bits": (all_of(png_16_bit), RIGHT),
    "a JPEG with a thumbnail": (all_of(thumbnail), RIGHT),
    "filling before the markers": (all_of(JPEG[:2] + b"\xff" * 9 + JPEG[2:]), RIGHT),
    "a JPEG with a comment": (all_of(JPEG[:2] + segment(0xfe, b"x" * 60_000) + JPEG[2:]), RIGHT),
    "garbage at the end": (all_of(JPEG + bytes(100)), RIGHT),
    # Sizes
    "a PNG of 8,000²": (all_of(partial(png, 8000, 8000)), "8000 × 8000 pixels"),
    "a PNG of 3,000²": (all_of(partial(png, 3000, 3000)), "3000 × 3000 pixels"),
    "a strip": (all_of(partial(png, 1, 8_000_000)), "cannot be decoded"),
    "a PNG of 2^31 pixels a side": (all_of(PNG[:16] + b"\x7f\xff\xff\xff" * 2 + PNG[24:]),
                                    "2147483647 × 2147483647 pixels"),
    "a PNG of no pixel": (all_of(PNG[:16] + bytes(8) + PNG[24:]), "0 × 0 pixels"),
    "a JPEG of 65,500²": (all_of(with_size(65500, 65500)), "65500 × 65500 pixels"),
    "a JPEG of no line": (all_of(with_size(0, 64)), "0 × 64 pixels"),
    "a JPEG taller than its data": (all_of(with_size(2000, 64)), None),
    "two sizes": (lambda: [JPEG, encoded("JPEG", PIXELS[:24])] * 2,
                  "different sizes: 24 × 64, 48 × 64"),
    "JPEG and PNG of two sizes": (lambda: [JPEG, png(8, 8)] * 2, "different sizes"),
    "JPEG and PNG": (lambda: [JPEG, PNG] * 2, RIGHT),
    "16 images of a 4K camera": (lambda: [png(2160, 3840)] * 16, None),
    "a comment of 60 MB in a PNG": (all_of(partial(png, 48, 64, rows=ROWS, extra=chunk(
        b"zTXt", b"x\0\0" + zlib.compress(bytes(60_000_000), 9)))), RIGHT),
    "1,000 scans": (all_of(partial(scans, 1000)), "cannot be decoded"),
    # Other formats, and no images
    "GIF": (all_of(partial(encoded, "GIF")), "neither JPEG nor PNG"),
    "BMP": (all_of(partial(encoded, "BMP")), "neither JPEG nor PNG"),
    "WebP": (all_of(partial(encoded, "WEBP")), "neither JPEG nor PNG"),
    "TIFF": (all_of(partial(encoded, "TIFF")), "neither JPEG nor PNG"),
    "raw pixels": (all_of(PIXELS.tobytes()), "neither JPEG nor PNG"),
    "empty": (all_of(b""), "cannot be decoded"),
    "text": (all_of(b"image_0001.jpg"), "cannot be decoded"),
    # Damages
    "a cut JPEG": (all_of(JPEG[:len(JPEG) // 2]), "cannot be decoded"),
    "a cut PNG": (all_of(PNG[:len(PNG) // 2]), "cannot be decoded"),
    "a JPEG's first bytes": (all_of(JPEG[:3]), "cannot be decoded"),
    "a PNG's first bytes": (all_of(PNG[:12]), "0 × 0 pixels"),
    "no start of image": (all_of(JPEG[2:]), "cannot be decoded"),
    "altered tables": (all_of(JPEG.replace(b"\xff\xc4", b"\xff\xc8")), "cannot be decoded"),
    "altered PNG header": (all_of(PNG[:24] + b"\x09" + PNG[25:]), "cannot be decoded"),
    "altered PNG data": (all_of(PNG[:60] + bytes(20) + PNG[80:]), "cannot be decoded"),
    "one bad image of four": (lambda: [JPEG, JPEG, JPEG[:100], JPEG], "cannot be decoded"),
}
