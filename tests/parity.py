"""Small networks with weights by formula, and figures that the official modules gave for them.

For parameter `name` of `part` ("encoder" or "predictor"):
RandomState(crc32("part.name")).standard_normal(shape), as 1 + 0.1 w for norm weights, 0.1 w for
other 1-D tensors, w / sqrt(fan in) for the rest. NumPy's RandomState stream is frozen, so no weight
file is needed."""
import math
import zlib
from pathlib import Path

import numpy as np
import torch

import model


# the full arrays, where they are at hand
SHARED = Path(__file__).resolve().parents[2] / "shared"


def weights(part, module):
    state = {}
    for name, tensor in module.state_dict().items():
        random = np.random.RandomState(zlib.crc32(f"{part}.{name}".encode()))
        w = random.standard_normal(tuple(tensor.shape))
        if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
            w = 1 + 0.1 * w
        elif w.ndim == 1:
            w = 0.1 * w
        else:
            w = w / math.sqrt(math.prod(w.shape[1:]))
        state[name] = torch.tensor(w, dtype=torch.float32)
    return state


def tiny(**size):
    """The small encoder and predictor with weights by formula, in fp32."""
    encoder, predictor = model.build(model.SIZES["tiny"] | size)
    encoder.load_state_dict(weights("encoder", encoder))
    predictor.load_state_dict(weights("predictor", predictor))
    prints = dict.fromkeys(("base_fingerprint", "encoder_fingerprint"), "by formula")
    model.set_fingerprints(encoder, predictor, prints)
    return encoder, predictor


def inputs():
    """clip [2, 3, 8, 64, 64] (normalised), states [2, 8, 7], actions [2, 7, 7], all float32."""
    random = np.random.RandomState(7)
    shapes = (2, 3, 8, 64, 64), (2, 8, 7), (2, 7, 7)
    clip, states, actions = (random.standard_normal(shape) for shape in shapes)
    return (torch.tensor(x, dtype=torch.float32) for x in (clip, 0.3 * states, 0.1 * actions))


# Every (size / 8)th value of what the official modules return, from the middle of the first eighth.
FIGURES = {
    "encoder_tubelet": [0.287485, 1.347837, -0.121496, -1.187050,
                        0.646410, -1.543436, -2.107856, 0.859933],
    "encoder_per_frame": [-0.410606, -1.880787, 0.406551, -0.778550,
                          -1.092554, -0.938151, 0.395730, 1.172524],
    "latents": [-0.427505, -1.902919, 0.369566, -0.761040,
                -1.077691, -0.961266, 0.351096, 1.147249],
    "predictor": [-0.049289, 1.273855, 0.379367, 0.066902,
                  0.667639, 0.877083, 0.269271, 0.371094],
}
# an integer n: rollout of n steps
LOSSES = {"teacher_forcing": 1.1181856, 2: 1.1018052, 3: 1.1170727}
