"""How recorded images become the square frames that the encoder takes."""
import struct

import numpy as np
import torch
import torch.nn.functional as F


MAX_PIXELS = 1 << 23    # of one image: a frame of a 4K camera has 8.3 million
MAX_SCANS = 100         # of a progressive JPEG, each of which decodes the whole image once more


def check_size(height, width, crop, size):
    """Raises ValueError for images that are empty or, before or after resizing, too large."""
    if not height or not width:
        raise ValueError(f"images of {height} × {width} pixels")
    _, _, _, _, h, w, _, _ = crop_window(height, width, crop, size)
    # A strip of a few pixels' height becomes millions of pixels wide when it is resized.
    if height * width > MAX_PIXELS or h * w > MAX_PIXELS:
        raise ValueError(f"images of {height} × {width} pixels: more than {MAX_PIXELS:,}, or a "
                         "strip; scale them down before they are stored")


def images_at_a_time(images, crop, size):
    """How many of the JPEG or PNG files [n] of a clip or an episode to decode at a time: a clip,
    or fewer if they are large.

    Raises ValueError unless all have one size, by their headers, that `check_size` takes: 187 kB
    of PNG can be 192 MB of pixels."""
    sizes = {image_size(image) for image in images}
    if None in sizes:
        raise ValueError("an image cannot be decoded: neither JPEG nor PNG, or a damaged header")
    if len(sizes) > 1:
        names = sorted(f"{height} × {width}" for height, width in sizes)
        raise ValueError(f"its images have different sizes: {', '.join(names[:4])}")
    [(height, width)] = sizes
    check_size(height, width, crop, size)
    return max(1, min(16, 4 * MAX_PIXELS // (height * width)))


def image_size(data):
    """(height, width) by the header of a JPEG or PNG file in memory, or None if it has none."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        width, height = struct.unpack(">II", data[16:24].ljust(8, b"\0"))
        return height, width
    if data[:2] != b"\xff\xd8":
        return None
    # A JPEG file is a list of segments: 0xff, a marker, the length of the rest.
    at = 2
    while at + 9 <= len(data):
        marker = data[at + 1]
        if data[at] != 0xff or marker == 0xff:
            at += 1                                     # filling, which decoders pass over
        elif 0xc0 <= marker <= 0xcf and marker not in (0xc4, 0xc8, 0xcc):       # SOF0 … SOF15
            too_slow = marker != 0xc0 and data.count(b"\xff\xda") > MAX_SCANS
            return None if too_slow else struct.unpack(">HH", data[at + 5:at + 9])
        elif marker in (0x00, 0x01) or 0xd0 <= marker <= 0xd8:
            at += 2                                     # markers without a length
        else:
            at += 2 + int.from_bytes(data[at + 2:at + 4])
    return None


def crop_window(height, width, crop, size):
    """How an image becomes size × size: (top, left, h, w) of the part to keep, (h, w) to resize it
    to, and (top, left) of the square to cut out of that.

    "center": the shortest side becomes 292 (at size 256), then the square in the middle. "droid":
    aspect ratio 1.35, squeezed, which the released weights were trained on. "none": squeezed."""
    if crop == "center":
        short = round(size * 292 / 256)
        h, w = short, int(short * width / height)
        if height > width:
            h, w = int(short * height / width), short
        return 0, 0, height, width, h, w, round((h - size) / 2), round((w - size) / 2)
    h, w = height, width
    if crop == "droid" and width > height * 1.35:
        w = round(height * 1.35)
    elif crop == "droid":
        h = round(width / 1.35)
    return (height - h) // 2, (width - w) // 2, h, w, size, size, 0, 0


def crop_frames(frames, crop, size):
    """frames [n, H, W, 3] uint8 array -> [n, size, size, 3] uint8 tensor.

    Bilinear, without antialias."""
    top, left, h, w, new_h, new_w, y, x = crop_window(*frames.shape[1:3], crop, size)
    cropped = np.empty((len(frames), size, size, 3), np.uint8)
    # In 8 bits: five times as fast as in floats, and never more than one level away from them.
    # Eight frames at a time: for a whole episode twice as fast, since what is cut away stays in
    # the processor's cache.
    for i in range(0, len(frames), 8):
        some = torch.from_numpy(frames[i:i + 8, top:top + h, left:left + w])
        some = F.interpolate(some.permute(0, 3, 1, 2), (new_h, new_w), mode="bilinear")
        some = some[:, :, y:y + size, x:x + size]                       # [8, 3, size, size]
        cropped[i:i + 8] = some.permute(0, 2, 3, 1).numpy()
    return torch.from_numpy(cropped)
