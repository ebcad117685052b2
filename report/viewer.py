"""What the viewer of report.html shows, packed into JSON: energies as they are in the arrays, and
images as JPEG."""
import base64
import io
import json

import matplotlib
import numpy as np
from PIL import Image

from analysis.compare import group_title
from analysis.figures import MAP, scale_end
from analysis.measures import AXES, COORDINATE_DECIMALS, FLAT_SHARE, is_flat
from analysis.table import PLANNERS, shown_names
from report.text import clean


IMAGE_SIZE, JPEG_QUALITY = 256, 85      # pixels of the longer side; 12 kB an image


def content(arrays, result):
    """A dict for page.js: plain numbers and text, arrays of numbers as `packed`."""
    kinds = {"l1": "energy", **({"l2": "l2"} if "l2_true" in arrays else {})}
    planes = [_plane(arrays, plane, kinds) for plane in arrays["planes"].tolist()]
    return {
        "checkpoints": [clean(name) for name in shown_names(result)],
        # What is shown first: the last checkpoint that is no control.
        "first": max(c for c, one in enumerate(result["checkpoints"].values())
                     if not one["control"]),
        "pairs": [_pair(arrays, p) for p in range(len(arrays["episodes"]))],
        "planes": planes,
        "truths": _rounded(arrays["true_actions"][:, :3]),
        "true": {kind: packed(arrays[f"{prefix}_true"]) for kind, prefix in kinds.items()},
        "plans": _plans(arrays),
        "flat_share": FLAT_SHARE,
        "map": base64.b64encode((255 * matplotlib.colormaps[MAP](np.arange(256))[:, :3]).round()
                                .astype(np.uint8).tobytes()).decode(),
    }


def to_json(value):
    """JSON that can stand within a script element: nothing in it ends the element or begins
    another one."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def packed(array):
    """Values as little-endian float32 in base64; the shape is known from the lists beside it."""
    return base64.b64encode(np.asarray(array, "<f4").tobytes()).decode()


def _rounded(array):
    return np.round(np.asarray(array, float), COORDINATE_DECIMALS).tolist()


def _pair(arrays, p):
    """images: context and goal as JPEG in base64, frames: their recorded frames; None: unknown."""
    images = frames = None
    if "frames" in arrays:
        images = [jpeg(frame) for frame in arrays["frames"][p]]
    if "frame_numbers" in arrays and arrays["frame_numbers"][p, 0] >= 0:
        frames = arrays["frame_numbers"][p].tolist()
    return {"episode": clean(str(arrays["episodes"][p])), "images": images, "frames": frames}


def jpeg(frame):
    """An image [height, width, 3] uint8, made smaller if it is large."""
    image, data = Image.fromarray(np.ascontiguousarray(frame)), io.BytesIO()
    image.thumbnail((IMAGE_SIZE, IMAGE_SIZE))
    image.save(data, "JPEG", quality=JPEG_QUALITY)
    return base64.b64encode(data.getvalue()).decode()


def _plane(arrays, plane, kinds):
    """ticks: of each axis in metres, one list for all pairs if they share them; of each kind the
    energies [C, P, K], flat: which of them are [C, P], and where the common colours end, in %."""
    actions = np.round(arrays[f"actions_{plane}"], COORDINATE_DECIMALS)
    ticks = [[np.unique(one[:, AXES.index(axis)]).tolist() for axis in plane] for one in actions]
    out = {"axes": list(plane), "title": group_title(plane),
           "ticks": ticks[:1] if all(one == ticks[0] for one in ticks) else ticks}
    for kind, prefix in kinds.items():
        energy = arrays[f"{prefix}_{plane}"]                            # [C, P, K]
        out[kind] = {"energy": packed(energy), "scale": scale_end(energy),
                     "flat": [[int(is_flat(one)) for one in row] for row in energy]}
    return out


def _plans(arrays):
    """Of each planner its name and the mean move of a step [C, P, 3], in metres: from the plan that
    looks as far ahead as the goal, or else the shortest."""
    plans, steps = [], int(arrays["steps"])
    for planner, name in PLANNERS.items():
        if f"{planner}_moves" not in arrays:
            continue
        moves = arrays[f"{planner}_moves"]                              # [C, P, H, 3]
        horizons = arrays.get("plan_horizons", 1 + np.arange(moves.shape[2])).tolist()
        h = horizons.index(steps) if steps in horizons else 0
        plans.append({"name": name, "moves": _rounded(moves[:, :, h] / horizons[h])})
    return plans
