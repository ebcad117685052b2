"""The analysis of energy.py: landscapes, plans and controls of the base model and of adapters.

    arrays = analyse(cfg, ["runs/droid/step_5000"], "runs/droid/energy/step_5000/landscapes.npz")

All checkpoints are measured on the same pairs, and what depends on the pairs alone is computed
once. What is done is saved as it goes: after a kill the same call goes on from there.
analysis/__init__.py lists the arrays.
"""
import hashlib
import os
import re
import sys
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import config
import droid
import lora
import model
from analysis.arrays import check
from analysis.planners import (
    GRADIENT_ITERATIONS,
    GRADIENT_STARTS,
    JEPA_WMS_ITERATIONS,
    JEPA_WMS_SAMPLES,
    cem,
    cem_jepa_wms,
    gradient_plan,
    mppi,
)
from episodes.identity import trained_with_shuffled_actions
from episodes.pairs import choose_clips, seen_in_training
from episodes.stored import all_finite, check_store
from evaluation.described import described
from evaluation.energies import (
    L1,
    L2,
    chunk_size,
    landscapes,
    sequence_energies,
    uncompiled,
)
from evaluation.pair_arrays import losses_and_horizons, pair_arrays
from evaluation.protocol import plan_horizons, with_protocol
from evaluation.unfinished import UNFINISHED, Unfinished
from files import write_npz
from files.reading import read_npz
from files.text import unique_ends


CLIPS_AT_A_TIME = 4         # for losses: as many tokens as a batch of actions
BASELINE = "baseline"
LONGEST_NAME = 100          # bytes of a folder's name, of the 255 that file systems take
VERSION = 2                 # of what is measured: results of another one are not taken over


def read_clips(cfg):
    """Validation clips to measure on: `episodes.pairs.choose_clips`."""
    return choose_clips(droid.validation_loaders(cfg), cfg)


def _choose(cfg):
    """cfg, its clips to measure on, and the loaders that they are of."""
    loaders = droid.validation_loaders(cfg)
    return cfg, choose_clips(loaders, cfg), loaders


def choose_adapter(predictor, adapter, lora_config):
    """Puts an adapter folder, or for "baseline" one that changes nothing, into the predictor in
    place of any other. Returns ||s B A|| / ||W||, the size of the update.

    The baseline carries an adapter of zeros so that all checkpoints go through the same arithmetic:
    differences between them come from the adapters alone."""
    lora.remove(predictor)
    if adapter == BASELINE:
        c = lora_config
        lora.inject(predictor, c.rank, c.alpha, 0.0, c.targets, c.rslora)
    else:
        lora.load(predictor, adapter)
    predictor.requires_grad_(False).eval()
    return lora.update_norm(predictor)


# What is measured

def analyse(cfg, adapters, path):
    """Landscapes, plans and controls of the baseline and of each adapter folder, on the same pairs.

    Writes the arrays to `path` and returns them. Raises ValueError for an adapter that does not
    fit, before anything is computed."""
    return next(Analysis(cfg, adapters).measure([path]))


@dataclass
class PairSet:
    """Pairs of one data set, and what depends on them alone."""
    cfg: object
    clips: list
    names: list             # of the checkpoints: the ends of their paths, with what to know of them
    settings: str           # fingerprint of everything that the results depend on
    about: object           # gives the arrays for the report, of `evaluation.described`
    h: list = ()            # P x [T, N, D], once they are encoded
    arrays: dict | None = None


class Analysis:
    """The base model, the adapters to compare, and the pairs of one data set or, with energy.also,
    of two: `sets`."""

    def __init__(self, cfg, adapters, choices=()):
        """Reads the pairs, and of the base model its fingerprint: what was measured before is found
        without a network. Raises ValueError.

        choices: other sets to measure in place of those of cfg: (Config, clips as from
        `read_clips`)."""
        cfg = with_protocol(cfg)
        self.device = model.resolve_device(cfg.device)
        if cfg.memory:
            from fast import memory
            cfg = memory.cap_gpu_memory(cfg, self.device)
        self.precision = model.resolve_precision(cfg.precision, self.device)
        self.cfg, self.world, self.networks = cfg, None, None
        both = [cfg]
        if choices:
            both = [one for one, _ in choices]
        elif cfg.energy.also:
            both.append(replace(cfg, data=config.second_data_set(cfg.data, cfg.energy.also)))
        self.from_latents = all(one.data.latents for one in both)
        self.base, encoder_fingerprint = self.fingerprints()
        for one in both:
            if one.data.latents:
                check_store(one, encoder_fingerprint)
        self.adapters = [BASELINE, *(adapter for adapter in adapters if adapter != BASELINE)]
        self.names = names_of(self.adapters)
        # On networks without weights: what does not fit is told before the data are read.
        predictor = model.empty_networks(cfg.model.size)[1]
        predictor.base_fingerprint = self.base
        for adapter in self.adapters[1:]:
            lora.load(predictor, adapter)
            lora.remove(predictor)
        self.digests = [digest_of(adapter) for adapter in self.adapters]
        tqdm.write(f"{model.device_name(self.device)}, {self.precision}; base "
                   f"{cfg.model.checkpoint} ({self.base})")
        self.sets = [self._pairs(*choice) for choice in choices or map(_choose, both)]
        if cfg.energy.also and not choices and self.sets[0].settings == self.sets[1].settings:
            raise ValueError(f"energy.also: {_in_words(cfg.energy.also)} gives the pairs of the "
                             "first data set again (.npz files have one camera); name another path")

    def fingerprints(self):
        """Those of the base model and of its encoder."""
        of_base = self.cfg.model
        if of_base.checkpoint == "random":          # in no file: made here, and kept
            self._load_networks()
            predictor = self.networks[1]
            return predictor.base_fingerprint, predictor.encoder_fingerprint
        with model.open_checkpoint(of_base.checkpoint, of_base.size) as (_, _, prints):
            return prints["base_fingerprint"], prints["encoder_fingerprint"]

    def _load_networks(self):
        if self.networks:
            return
        torch.manual_seed(self.cfg.seed)
        self.networks = model.load(
            self.cfg.model.checkpoint, self.cfg.model.size, model.DTYPES[self.precision],
            self.device, encoder=not self.from_latents)

    def load(self, sets):
        """Loads the networks, tells how large each adapter is, and encodes the frames of some of
        `sets`; then the encoder's memory is free again. Raises ValueError."""
        # One base model serves all sets: it takes minutes to load and most of the memory.
        self._load_networks()
        encoder, predictor = self.networks
        self.world = world = model.WorldModel(encoder, predictor)
        self.norms = [choose_adapter(predictor, adapter, self.cfg.lora)
                      for adapter in self.adapters]
        for name, norm in zip(self.names, self.norms):
            warning = ""
            if norm == 0 and name != BASELINE:
                warning = " WARNING: B is zero in all its layers, this is the baseline"
            tqdm.write(f"  {name}: update / weights {norm:.2e}{warning}")
        if self.device.type == "cpu" and sum(p.numel() for p in world.parameters()) > 1e8:
            tqdm.write("no GPU: an action takes seconds at this size; --energy.pairs=1 "
                       "--energy.grid=7 --energy.planners=[] is a start")
        for pairs in sets:
            self._encode(pairs)
        self.networks = world.encoder = encoder = None
        self.chunk = min(chunk_size(replace(self.cfg, energy=pairs.cfg.energy), self.device)
                         for pairs in sets)
        lora.remove(predictor)
        if model.can_accelerate(self.cfg, self.device):
            import fast
            fast.accelerate(world, self.cfg)

    def folders(self, cfg):
        """Where the results of each of `sets` go: out_dir/energy/NAME, and for energy.also a folder
        in there. What was measured with other settings or weights is not written over: then the
        name gets a number."""
        # As many whole characters as a file system takes.
        name = "+".join(name.replace("/", "-") for name in self.names[1:]) or BASELINE
        name = os.fsencode(name)[:LONGEST_NAME].decode(errors="ignore")
        folder = free_folder(Path(cfg.out_dir, "energy"), cfg.energy.name or name, self.sets[:1])
        return [folder, *(free_folder(folder, "also", [pairs]) for pairs in self.sets[1:])]

    def _pairs(self, cfg, clips, loaders=None):
        """A PairSet, without latents. loaders: those of the clips, if the report is to tell of
        them."""
        allowed = cfg.energy.allow_trained
        seen = seen_in_training(clips, self.adapters, allowed)              # [C, P]
        names = [f"{name} (trained on {row.sum()} of these {len(row)})" if row.any() else name
                 for name, row in zip(self.names, seen)]
        # Not before it is needed: images of latents have to be looked for.
        about = partial(described, cfg, clips, loaders, self.adapters) if loaders else dict
        return PairSet(cfg, clips, names, self._settings(cfg, clips), about)

    def _encode(self, pairs):
        """Adds the latents to a PairSet, and the arrays that depend on them alone."""
        pairs.h = [clip["h"].to(self.device).float() if "h" in clip
                   else self.world.encode(clip["frames"][None].to(self.device))[0]
                   for clip in pairs.clips]                             # P x [T, N, D]
        for clip, x in zip(pairs.clips, pairs.h):
            _check_finite(all_finite(x), f"the latents of {clip['episode']}", self.precision)
        pairs.arrays = pair_arrays(pairs.cfg, pairs.clips, pairs.h) | pairs.about() | {
            "device": np.array(model.device_name(self.device)), "dtype": np.array(self.precision),
            "base": np.array(self.base), "settings": np.array(pairs.settings)}
        # For the words: the settings of a set are the same whether it stands alone or not.
        if pairs.cfg.energy.also and pairs is not self.sets[0]:
            pairs.arrays["also"] = np.array(_in_words(pairs.cfg.energy.also))

    def _settings(self, cfg, clips):
        """A fingerprint of the pairs, the weights and how they are measured."""
        # The bytes that go in, and not the names of their files, which may be written anew.
        known = hashlib.sha256(repr((
            VERSION, asdict(replace(cfg.energy, name="", also="")), cfg.seed, self.precision,
            self.device.type, cfg.compile, self.base, asdict(cfg.lora), self.digests,
            [is_control(adapter) for adapter in self.adapters])).encode())
        for clip in clips:
            known.update(f"{clip['episode']} {clip['frame_step']}\n".encode(errors="replace"))
            known.update(clip["states"].numpy().tobytes())
            inputs = clip["h"] if "h" in clip else clip["frames"]
            known.update(inputs.contiguous().view(torch.uint8).numpy().tobytes())
        return known.hexdigest()

    def measure(self, paths):
        """Measures all checkpoints on each of `sets` and yields its arrays, which are written to
        its path, after each checkpoint too. What an earlier call has written there is taken over;
        no network is loaded where nothing is left to do. Raises ValueError and OSError."""
        done = [_finished(path, pairs) for pairs, path in zip(self.sets, paths)]
        left = [pairs for pairs, arrays in zip(self.sets, done) if arrays is None]
        if left:
            self.load(left)
        for pairs, path, arrays in zip(self.sets, paths, done):
            yield self._measure(pairs, Path(path)) if arrays is None else arrays

    def _measure(self, pairs, path):
        cfg, clips, world = pairs.cfg, pairs.clips, self.world
        arrays = dict(pairs.arrays)
        per_pair = _evaluations(cfg, arrays)
        with Unfinished(path, pairs.settings) as done:
            # None: hidden without a terminal, but a notebook has none and shows it all the same.
            bar = tqdm(total=per_pair * len(clips) * len(pairs.names), unit="action",
                       unit_scale=True, smoothing=0.05,
                       disable=False if "ipykernel" in sys.modules else None)
            found = []
            for c, (name, adapter) in enumerate(zip(pairs.names, self.adapters)):
                bar.set_description(name)
                # After a kill, pairs of this checkpoint may be done.
                left = [p for p in range(len(clips)) if (c, p) not in done]
                bar.update(per_pair * (len(clips) - len(left)))
                if adapter == BASELINE and (c, "null") not in done:
                    done[c, "null"] = {"null_difference": self._null_difference(pairs)}
                elif left or (c, "losses") not in done:
                    choose_adapter(world.predictor, adapter, cfg.lora)
                for p in left:
                    done[c, p] = self._one_pair(pairs, p, name)
                    bar.update(per_pair)
                if (c, "losses") not in done:
                    done[c, "losses"] = self._losses(pairs, name)
                rows = [done[c, p] for p in range(len(clips))]
                found.append({key: np.stack([row[key] for row in rows]) for key in rows[0]}
                             | done[c, "losses"])
                arrays |= {key: np.stack([one[key] for one in found]) for key in found[0]}
                n = len(found)
                arrays |= done[0, "null"] | {
                    "checkpoints": np.array(pairs.names[:n]),
                    "update_norm": np.array(self.norms[:n]),
                    "is_control": np.array([is_control(x) for x in self.adapters[:n]], int),
                    "training_steps": np.array([_training_step(x) for x in pairs.names[:n]])}
                if "run_of" in pairs.arrays:
                    arrays["run_of"] = pairs.arrays["run_of"][:n]
                write_npz(path, **arrays)
            bar.close()
        return arrays

    def _null_difference(self, pairs):
        """The largest energy difference of the base model, on the first pair's first plane, to
        itself with adapters of zeros: must be 0."""
        lora.remove(self.world.predictor)
        without = self._first_landscape(pairs)
        choose_adapter(self.world.predictor, BASELINE, pairs.cfg.lora)
        difference = (without - self._first_landscape(pairs)).abs().max().item()
        if difference == 0:
            # They change no bit, and cost a quarter of the time.
            lora.remove(self.world.predictor)
        return np.array(difference)

    def _first_landscape(self, pairs):
        e = pairs.cfg.energy
        return self._energies(pairs, 0, pairs.arrays[f"actions_{e.planes[0]}"][0])

    def _energies(self, pairs, p, actions):
        """L1 and L2 of actions [K, 7] for pair p: [K, 2]."""
        e, h, states = pairs.cfg.energy, pairs.h[p], pairs.clips[p]["states"]
        n = e.context
        return landscapes(self.world, h[:n], states[:n], h[n - 1 + e.steps], actions, e.steps,
                          self.chunk)

    def _one_pair(self, pairs, p, name):
        """The arrays of one checkpoint and one pair: those with [C, P, …] in landscapes.npz."""
        e, arrays = pairs.cfg.energy, pairs.arrays
        # In one call, so that all chunks but the last are full ones.
        actions = {plane: arrays[f"actions_{plane}"][p] for plane in [*e.planes, "shell", "ray"]}
        actions |= {"true": arrays["true_actions"][p][None], "zero": np.zeros((1, 7)),
                    "negatives": arrays["negatives"][p]}
        energies = self._energies(pairs, p, np.concatenate(list(actions.values())))
        _check_finite(energies.isfinite().all(),
                      f"the energies of {pairs.clips[p]['episode']} under {name}", self.precision)
        out = {}
        parts = energies.cpu().split([len(x) for x in actions.values()])
        for key, part in zip(actions, parts):
            part = part[0] if key in ("true", "zero") else part
            out |= {f"energy_{key}": part[..., L1].numpy(), f"l2_{key}": part[..., L2].numpy()}
        for planner in e.planners:
            out |= self._plans(pairs, p, planner)
        return out

    def _losses(self, pairs, name):
        """What `losses_and_horizons` measures of one checkpoint, of all pairs: [P, …] each."""
        n, found = CLIPS_AT_A_TIME, []
        with uncompiled(self.world):
            for i in range(0, len(pairs.clips), n):
                found.append(losses_and_horizons(self.world, pairs.h[i:i + n],
                                                 pairs.clips[i:i + n],
                                                 pairs.arrays["shuffled"][i:i + n]))
        out = {key: np.concatenate([part[key] for part in found]) for key in found[0]}
        # Those of shuffled actions may be undefined.
        for p, clip in enumerate(pairs.clips):
            finite = np.isfinite([out["loss"][p], out["loss_zero"][p], *out["horizon_l1"][p]])
            _check_finite(finite.all(), f"the losses of {clip['episode']} under {name}",
                          self.precision)
        return out

    def _plans(self, pairs, p, planner):
        """What a planner finds for pair p, at each horizon."""
        cfg, h, states = pairs.cfg, pairs.h[p], pairs.clips[p]["states"]
        e, n = cfg.energy, cfg.energy.context
        column = {"l1": L1, "l2": L2}[e.objective]
        gradient = planner == "gradient"
        chunk = min(self.chunk, GRADIENT_STARTS) if gradient else self.chunk
        plans = []
        with uncompiled(self.world) if gradient else nullcontext():
            for steps in plan_horizons(cfg):
                def energy_of(actions, goal=h[n - 1 + steps]):
                    return sequence_energies(self.world, h[:n], states[:n], goal, actions,
                                             chunk)[:, column]
                plans.append(run_planner(planner, energy_of, steps, e, cfg.seed, self.device))
        return {f"{planner}_moves": np.stack([plan.actions[:, :3].sum(0) for plan in plans]),
                f"{planner}_energy": np.array([plan.energy for plan in plans]),
                f"{planner}_seconds": np.array([plan.seconds for plan in plans])}


def run_planner(planner, energy_of, horizon, e, seed, device):
    """A Plan. planner: of energy.planners; e: an EnergyConfig."""
    common = dict(horizon=horizon, seed=seed, device=device)
    if planner == "cem_jepa_wms":               # with its own samples and iterations
        return cem_jepa_wms(energy_of, **common)
    if planner == "gradient":
        return gradient_plan(energy_of, box=e.radius, **common)
    common |= dict(samples=e.cem_samples, iterations=e.cem_iterations, box=e.radius)
    if planner == "mppi":
        return mppi(energy_of, **common)
    return cem(energy_of, elites=e.cem_elites, **common)


def names_of(adapters):
    """The baseline, then each folder under the shortest end of its path that no other one has.
    Raises ValueError for a folder that is there twice."""
    paths = [Path(adapter).resolve() for adapter in adapters if adapter != BASELINE]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"--adapters names a folder twice: {twice}")
    return [BASELINE, *unique_ends(paths, [BASELINE])]


def free_folder(parent, name, sets):
    """The folder of that name, or NAME-2 and so on, in which nothing else than these sets was
    measured: a table that took hours is not to give way to one with other settings."""
    return next(folder for folder in numbered(parent, name)
                if _settings_of(folder) in ("", *(pairs.settings for pairs in sets)))


def numbered(parent, name):
    """Yields the folders NAME, NAME-2, NAME-3, …"""
    yield parent / name
    for n in count(2):
        yield parent / f"{name}-{n}"


def _settings_of(folder):
    """The fingerprint of the results in a folder, finished or not; "" if there are none, or none
    that can be read."""
    for path in (folder / "landscapes.npz", folder / UNFINISHED):
        with suppress(OSError, ValueError):
            return str(read_npz(path, ["settings"]).get("settings", "of an earlier version"))
    return ""


def _finished(path, pairs):
    """The arrays of a PairSet if an earlier call has measured all of it, else None."""
    with suppress(OSError, ValueError):
        arrays = read_npz(path)
        if (str(arrays.get("settings")) == pairs.settings
                and arrays["checkpoints"].tolist() == pairs.names):
            check(arrays)
            # Left behind by a kill between the last two steps.
            Path(path).with_name(UNFINISHED).unlink(missing_ok=True)
            tqdm.write(f"{path}: is finished and has these settings; nothing is computed anew")
            if "command" not in arrays:                 # of an earlier version
                arrays = pairs.about() | arrays
                write_npz(path, **arrays)
            return arrays
    return None


def _in_words(also):
    """energy.also as text."""
    if isinstance(also, str):
        return also
    return ", ".join(f"{key} {value}" for key, value in also.items())[:200]


def is_control(adapter):
    return adapter != BASELINE and trained_with_shuffled_actions(adapter)


def digest_of(adapter):
    """SHA-256 of an adapter folder's weights and settings; "" for the baseline."""
    if adapter == BASELINE:
        return ""
    files = sorted(path for path in Path(adapter).glob("adapter_*") if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _training_step(name):
    found = re.search(r"step_(\d+)", name)
    return int(found[1]) if found else 0 if name == BASELINE else -1


def _evaluations(cfg, arrays):
    """How many actions are evaluated per pair and checkpoint, for the progress bar; a step of the
    gradient planner counts three (forward and backward)."""
    e = cfg.energy
    keys = [*(f"actions_{name}" for name in [*e.planes, "shell", "ray"]), "negatives"]
    n = e.steps * (sum(arrays[key].shape[1] for key in keys) + 2)       # 2: the true one and zero
    of_planner = {"cem": e.cem_samples * e.cem_iterations,
                  "mppi": e.cem_samples * e.cem_iterations,
                  "cem_jepa_wms": JEPA_WMS_SAMPLES * JEPA_WMS_ITERATIONS,
                  "gradient": 3 * GRADIENT_STARTS * (GRADIENT_ITERATIONS + 1)}
    return n + sum(h * of_planner[planner] for h in plan_horizons(cfg) for planner in e.planners)


def _check_finite(finite, what, precision):
    """Raises ValueError: planners and figures would stumble over what is not finite."""
    if not finite:
        cure = ("use --precision=bf16 or fp32" if precision == "fp16" else
                "the weights have grown too large; take an earlier step")
        raise ValueError(f"{what} are not finite in {precision} (NaN or infinite); {cure}")
