"""Are these weights what they should be, and does the code compute with them as published?

    python energy.py check vjepa2-ac-vitg.pt                            # the released weights
    python energy.py check mine.pt --model.size=tiny --expected=mine.json

Two frames and two poses of a real Franka arm (franka_pair.npz) go through the encoder and the
predictor; energies and a landscape are compared with what the released weights give. --expected
names other values, {"true": 0.426, "zero": 0.480, "copy": 0.556, "minimum": [0.08, 0.08, 0.08],
"range_over_mean": 0.163}: the energies of the true action and of no action, the distance of the two
frames, and of 7 × 7 × 7 moves up to 12 cm the one of lowest energy, and (max - min) / mean.

What deviates is found out by trying (diagnosis.py): recipe.py has both networks written out a
second time. Where the code differs from that, the code is at fault; where both miss the expected
values, the file is. Either way the recipe is altered in one thing at a time (BGR images, axes
swapped …) until it gives what was found: that is the hint.
"""
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import model
from episodes import poses
from evaluation import diagnosis, energies
from evaluation.diagnosis import ENERGIES
from evaluation.recipe import AXES, CLIP, HALF, Recipe, signed_axes
from files import weights
from files.reading import check_fields, read_json, read_npz


PAIR = Path(__file__).with_name("franka_pair.npz")
# Measured with the released weights in float16, given with these digits.
RELEASED = {"true": 0.426, "zero": 0.480, "copy": 0.556, "range_over_mean": 0.163,
            "minimum": [0.08, 0.08, 0.08]}
SIZES = {11_760_743_310: "as the released file",
         5_269_870_323: "as vjepa2_ac_oss.pth.tar, a copy with the same weights"}
RADIUS, POINTS = 0.12, 7                # of the landscape, in metres
# What rounding explains of an energy. Measured against float32: 7e-5 in float16 and 4e-4 in
# bfloat16 with a small network; 5e-4 in bfloat16 with random weights of ViT-g's size.
ROUNDING = {torch.float32: 3e-6, torch.float16: 5e-4, torch.bfloat16: 2e-3}
SMALL = 10 ** 8                         # weights, up to which float32 costs next to nothing


@torch.no_grad()
def run(cfg, expected=None):
    """Prints the report on the file cfg.model.checkpoint -> whether it passed.

    expected: path of a JSON file, or None for the released weights' values. One pair cannot tell
    everything: its y is 2 mm and its gripper rests, so that of a file the weights for these are
    hardly tested. Raises ValueError for files that cannot be read or do not fit model.size,
    OSError."""
    size = model.resolve_size(cfg.model.size) | {"image_size": 256}     # the pair's, as published
    if not expected and size != model.SIZES["vitg"]:
        raise ValueError("check knows the values of the released weights alone, --model.size=vitg; "
                         "give those of a smaller network with --expected=FILE.json")
    expected, decimals = read_expected(expected) if expected else (RELEASED, (3, 3))
    check = Check(cfg, size, expected, decimals)
    faults = check.find_faults()
    check.show_table()
    for words in faults:
        print(f"DEVIATES: {words}")
    if check.verdict:
        print(check.verdict)
    if not faults:
        what = "the released weights" if expected is RELEASED else "the weights that are expected"
        print(f"These are {what}, and the code computes with them as published: images, encoder, "
              "latents, poses and predictor give the expected values.")
        if check.allowed["range_over_mean"] > 0.5 * expected["range_over_mean"]:
            print("The rounding that is allowed for is as large as this landscape, so that faults "
                  "in actions could hide in it; try --precision=fp32, or expected values with more "
                  "digits.")
    return not faults


def read_expected(path):
    """(values, (decimals of energies, decimals of range_over_mean)) of a JSON file. Raises
    ValueError."""
    try:
        values = read_json(path, limit=1 << 20)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file of expected values; it has keys such as "
                         f"{', '.join(RELEASED)}") from None
    numbers = [*ENERGIES, "range_over_mean"]
    check_fields(values, dict.fromkeys(numbers, float) | {"minimum": [float]}, path)
    if unknown := values.keys() - RELEASED.keys():
        raise ValueError(f"{path}: unknown key {min(unknown)!r:.60}; known: {', '.join(RELEASED)}")
    if any(not 0 <= values[key] < 100 for key in numbers):
        raise ValueError(f"{path}: {', '.join(numbers)} are expected between 0 and 100")
    if not any(np.allclose(values["minimum"], move, atol=1e-4) for move in _moves()[:, :3]
               if len(values["minimum"]) == 3):
        raise ValueError(f"{path}: minimum is {values['minimum']!r:.60}, expected three of -0.12, "
                         "-0.08 … 0.12")
    # JSON writers drop zeros at the end: energies have as many decimals as the longest of them.
    return values, (max(_decimals(values[key]) for key in ENERGIES),
                    _decimals(values["range_over_mean"]))


def _decimals(value):
    return min(12, len(np.format_float_positional(value, trim="-").partition(".")[2]))


def _moves():
    return energies.grid("xyz", RADIUS, POINTS)                                     # [343, 7]


class Recorded(model.WorldModel):
    """Keeps the last predictions that energies are computed from, z: [K, N, D]."""
    z = None

    def distances(self, z, h):
        self.z = z
        return super().distances(z, h)


class Check:
    """One file: what is `measured` and `expected`, by name."""

    def __init__(self, cfg, size, expected, decimals):
        """Loads the networks, and prints what is known of the file."""
        path, self.device = cfg.model.checkpoint, model.resolve_device(cfg.device)
        if path == "random":
            raise ValueError("check compares a file with known values; random weights have none")
        self.dtype = _dtype(cfg, size, self.device)
        encoder, predictor = model.load(path, size, self.dtype, self.device)
        # Before anything is computed: what is computed with other weights says nothing of the file.
        self.wrong = _not_as_in_file(path, size, encoder, predictor)
        if self.device.type == "cpu":
            # Most of the time goes here, and many CPUs compute float32 four times faster.
            predictor.float()
        self.world = Recorded(encoder, predictor).eval()
        n_bytes = Path(path).stat().st_size
        print(f"{path}: {n_bytes:,} bytes ({SIZES.get(n_bytes, 'not those of a known file')})\n"
              f"fingerprint {predictor.base_fingerprint}: of names, shapes and 64 values of each "
              f"tensor; sha256sum {Path(path).name} covers every byte\n"
              f"{model.device_name(self.device)}, {str(self.dtype).removeprefix('torch.')}"
              + "; ViT-g takes minutes on a CPU" * (self.device.type == "cpu"), flush=True)

        pair = read_npz(PAIR)
        self.frames = torch.from_numpy(pair["frames"]).to(self.device)      # [2, 256, 256, 3]
        self.states = pair["states"].astype(np.float64)                     # [2, 7]
        self.expected, self.measured, self.verdict = expected, {}, ""
        energy = ROUNDING[self.dtype]
        if expected is RELEASED:
            energy = max(energy, ROUNDING[torch.float16])    # in which these were measured
        self.allowed = {key: 0.5 * 10.0 ** -decimals[0] + energy for key in ENERGIES}
        self.allowed["range_over_mean"] = (0.5 * 10.0 ** -decimals[1]
                                           + 2 * energy / max(expected["zero"], energy))
        # The share of it that the digits leave open: within it no value fits better than another.
        self.rounding, self.digits = energy, 0.5 * 10.0 ** -decimals[0] / self.allowed["zero"]
        e = replace(cfg.energy, context=1, steps=1, horizon=1)
        self.chunk = energies.chunk_size(replace(cfg, energy=e), self.device)

    @cached_property
    def h_by_recipe(self):
        return Recipe().encode(self.world.encoder, self.frames)

    # Comparing

    def find_faults(self):
        """Measures; a sentence for each fault."""
        if self.wrong:
            self.energies()
            return [self.wrong]
        if faults := self.energies():
            return faults
        faults = diagnosis.of_code(self)
        values = diagnosis.by_recipe(self)
        if not self.off(values) <= 1:
            if not faults:
                self.verdict = ("The code computes with this file as published: the file, or the "
                                "expected values, are at fault.")
            faults += diagnosis.of_file(self, values)
        elif faults:
            self.verdict = ("It is the code and not the file: evaluation/recipe.py gives the "
                            "expected values with these weights.")
        # The landscape takes minutes on a CPU, and would tell nothing new.
        if faults:
            return faults
        if not self.off(self.measured) <= 1:
            return [f"the code gives other energies than the recipe with the same predictions: "
                    f"{diagnosis.off_values(self, self.measured)}."]
        return self.landscape()

    def energies(self):
        """Measures copy, zero and true as energy.py does; faults that keep them from being
        measured."""
        self.h = h = self.world.encode(self.frames.permute(3, 0, 1, 2)[None])[0]        # [2, N, D]
        wanted = [2, self.world.predictor.grid ** 2, self.world.encoder.dim]
        if list(h.shape) != wanted:
            return [f"{CLIP}: two frames were encoded to latents {list(h.shape)} instead of "
                    f"{wanted}; each frame is to be encoded alone, doubled to one tubelet."]
        self.action = poses.pose_deltas(self.states)[0]
        move = np.where(np.arange(7) < 3, self.action, 0)
        probes = np.stack([np.zeros(7), self.action, move])
        *found, of_move = energies.landscape(self.world, h[:1], self.states[:1], h[1],
                                             probes).tolist()
        self.measured = dict(zip(("zero", "true"), found))
        if self.expected is RELEASED:
            # Whether the published value is of the move alone, without its rotation, is not said.
            self.allowed["true"] += abs(of_move - found[1])
        self.measured["copy"] = (h[0].float() - h[1].float()).abs().mean().item()
        if not np.isfinite(list(self.measured.values())).all():
            return [f"energies are not finite in {self.dtype}; try --precision=fp32."]
        return []

    def off(self, values, keys=None):
        """The largest difference from the expected values, as a share of what is allowed."""
        return np.max([abs(values[key] - self.expected[key]) / self.allowed[key]
                       for key in keys or values])

    # The landscape

    def landscape(self):
        """Measures minimum and range / mean; faults."""
        h, moves, found = self.h, _moves(), []
        chunk = min(self.chunk, 7 if self.device.type == "cpu" else POINTS ** 3)
        with tqdm(total=len(moves), desc="landscape", unit="action", leave=False,
                  delay=2) as progress:
            for some in np.array_split(moves, -(-len(moves) // chunk)):
                found.append(energies.landscape(self.world, h[:1], self.states[:1], h[1], some,
                                                chunk=chunk).cpu())
                progress.update(len(some))
        found = torch.cat(found)
        lowest, mean = moves[found.argmin(), :3], found.mean().item()
        self.measured |= {"minimum": [round(x, 2) for x in lowest.tolist()],
                          "range_over_mean": (found.max() - found.min()).item() / mean}
        wanted = np.array(self.expected["minimum"])
        at_wanted = found[np.abs(moves[:, :3] - wanted).max(axis=1).argmin()]
        faults = []
        # Within rounding, more than one move can be the lowest.
        if not at_wanted - found.min() <= self.rounding:
            turns = [words for words, turn in signed_axes()[:12]
                     if np.allclose(turn @ lowest, wanted, atol=1e-3)]
            faults.append(
                f"the energies are right and the minimum is at {self.measured['minimum']} instead "
                f"of {self.expected['minimum']}: it depends on the axes of the actions"
                + (f"; {AXES}, {' or '.join(turns[:3])} would explain it." if turns else "."))
        if not self.off(self.measured, ["range_over_mean"]) <= 1:
            faults.append(f"range / mean of the landscape is off and the energies are right: "
                          f"{self.measured['range_over_mean']:.4g} instead of "
                          f"{self.expected['range_over_mean']}; it depends on how much the "
                          "predictor heeds the actions, and on half-widths of the grid.")
        return faults

    def show_table(self):
        print(f"\n{'':24}{'measured':>20}{'expected':>20}{'difference':>13}{'allowed':>10}")
        for key, words in ({key: ENERGIES[key] for key in ("true", "zero", "copy")}
                           | {"range_over_mean": "range / mean, 7 × 7 × 7"}).items():
            found, wanted = self.measured.get(key), self.expected[key]
            cells = ([f"{found:.6g}", f"{wanted:g}", f"{found - wanted:+.1e}"] if found is not None
                     else ["not measured", f"{wanted:g}", ""])
            print(f"{words:24}{cells[0]:>20}{cells[1]:>20}{cells[2]:>13}"
                  f"{self.allowed[key]:>10.1e}")
        found, wanted = (", ".join(f"{v:+.2f}" for v in values) if values else "not measured"
                         for values in (self.measured.get("minimum"), self.expected["minimum"]))
        print(f"{'minimum (m)':24}{found:>20}{wanted:>20}\n")


# Loading

def _dtype(cfg, size, device):
    """What is computed in: as --precision says, if it does; else float32 where that is cheap."""
    n_weights = sum(p.numel() for network in model.empty_networks(size)
                    for p in network.parameters())
    free = weights.free_memory(device) or 0
    asked = cfg.precision != "bf16" or "precision" in (cfg.given or {})
    if not asked and (n_weights < SMALL or device.type == "cpu" and free > 8 * n_weights):
        return torch.float32
    return model.DTYPES[model.resolve_precision(cfg.precision, device)]


def _not_as_in_file(path, size, encoder, predictor):
    """How the weights in memory differ from the file, in words; empty if they do not."""
    loaded = weights.flat_names(encoder.state_dict(), predictor.state_dict())
    with model.open_checkpoint(path, size) as (names, read, _):
        def same(name):
            pair = loaded[name], read(name)
            a, b = (t.flatten()[::max(1, t.numel() // 256)].float().cpu() for t in pair)
            return pair[0].shape == pair[1].shape and torch.allclose(a, b, rtol=0.01, atol=1e-6)

        wrong = [name for name in names if name not in loaded or not same(name)]
    return wrong and (f"{HALF}: {len(wrong)} of {len(names)} tensors in memory are missing or not "
                      f"those of the file ({', '.join(wrong[:3])}{', …' * (len(wrong) > 3)}): the "
                      "loading of the weights is at fault.")
