"""What train.py measures on validation clips, the same ones each time.

    validation = Validation(cfg, batches, autocast, device)
    values = validation.measure(world)              # {name: number}, for metrics.jsonl
    print(validation.line(values)); validation.warnings(values)

A latent L1 alone says little: beside it stand a copy of the frame before (what a model reaches that
predicts no change) and the same predictions under shuffled and zero actions (what it reaches
without knowing the action). In `values`:

    val_loss, val_teacher_forcing, val_rollout      the losses; val_loss is their weighted sum
    val_l1, val_copy, val_shuffled, val_zero        L1 one frame ahead, each frame from all before:
                                                    own prediction, copy, others' actions, none;
    val_shuffle_ratio                               val_shuffled / val_l1: 1 if actions are ignored
    val_shuffle_error                               its standard error, from the differences between
                                                    the clips; not with fewer than 8 clips
    val_l1_k, val_l2_k, val_copy_l1_k, …            k frames ahead of the first, on own predictions
    val_relative_range, val_flat                    of landscapes: range / mean of the energies, and
                                                    the share of those with less than 1 %
    val_percentile, val_spearman, …                 of landscapes that are not flat: see
                                                    analysis/measures.py
    update/attn.qkv, grad/attn.qkv, …               ‖s B A‖ / ‖W‖ and norm of the gradient by kind
                                                    of layer
    ms_val                                          milliseconds that this validation took
"""
import time
from collections import Counter
from functools import partial

import numpy as np
import torch

import lora
from analysis import measures
from episodes.pairs import true_action
from evaluation.decoding import load_decoder
from evaluation.energies import L1, grid, landscapes, roll_out, shell, uncompiled
from running import ranks


HORIZONS = (1, 2, 4, 8)     # frames ahead that are logged
POINTS = 11                 # of the grid in x and y, on each axis
N_SHELL = 32                # actions as long as the true one
N_SHOWN = 2                 # clips of which there are pictures
# L1 with shuffled / own actions below which actions hardly matter. A warning comes earlier than the
# verdict of energy.py (compare.IGNORED), which has intervals.
IGNORED = 1.01
SURE = 2                    # standard errors by which the ratio is above 1 if that is no chance
MIN_CLIPS = 8               # from which a standard error is estimated
FLATTER = 0.5               # of the range at the beginning


@torch.no_grad()
def evaluate(world, batches, cfg, autocast, device, also=None):
    """Mean losses over the validation batches of all ranks: {"val_loss": their weighted sum,
    "val_…"}, and of several data sets "val_loss/NAME" for each.

    batches: a list, or {data set: a list}. also: called with h [B, T, N, D] and the actions and
    states of each batch."""
    world.eval()
    sums, clips = Counter(), Counter()              # {(data set, loss): loss × clips}
    for name, some in (batches if isinstance(batches, dict) else {"": batches}).items():
        for batch in some:
            batch = {key: value.to(device) for key, value in batch.items()}
            # Too seldom, and in too many shapes, to be worth compiling.
            with uncompiled(world), autocast:
                h = batch["h"].float() if "h" in batch else world.encode(batch["frames"])
                losses = world.losses(h, batch["actions"], batch["states"], cfg.rollout)
                if also:
                    also(h, batch["actions"], batch["states"])
            sums.update({(name, loss): value.item() * len(h) for loss, value in losses.items()})
            clips[name] += len(h)
    world.train()
    sums, clips = map(ranks.add_up, (sums, clips))      # a rank may have no clip
    means, of_sets = Counter(), {name: Counter() for name in clips}
    for (name, loss), value in sums.items():
        means[loss] += value / clips.total()
        of_sets[name][loss] += value / clips[name]
    values = {"val_loss": cfg.loss.total(means)}
    values |= {f"val_{loss}": value for loss, value in means.items()}
    if len(clips) > 1:
        values |= {f"val_loss/{name}": cfg.loss.total(some) for name, some in of_sets.items()}
    return values


class Validation:
    """See above. All ranks make one and measure together; each rank has clips of its own."""

    def __init__(self, cfg, batches, autocast, device, earlier=(), encoder=""):
        """batches: {data set: list of batches} of this rank. earlier: validations of the run that
        is resumed, as dicts. encoder: its fingerprint, for cfg.val_decoder. Raises ValueError for a
        decoder of another encoder."""
        self.cfg, self.batches, self.autocast, self.device = cfg, batches, autocast, device
        if cfg.val_decoder:
            self.decode = load_decoder(cfg.val_decoder, encoder, device)
        clips = [{key: value[i] for key, value in batch.items()}
                 for some in batches.values() for batch in some
                 for i in range(len(batch["actions"]))]
        # Of all ranks in one order, so that the numbers do not depend on how many there are.
        own = [(clip["actions"].cpu(), _moved(clip["states"])) for clip in clips]
        # The first ones are of different episodes.
        self.shown = clips[:N_SHOWN] if cfg.val_decoder and ranks.rank() == 0 else []
        of_ranks = ranks.gather_from_ranks(own)
        order = sorted((i, rank) for rank, of_rank in enumerate(of_ranks)
                       for i in range(len(of_rank)))
        everyone = [of_ranks[rank][i] for i, rank in order]
        mine = [g for g, (_, rank) in enumerate(order) if rank == ranks.rank()]
        # Of the clip that follows: they are spread over the episodes, so that it is of another one,
        # where one half-way round is of the same if there are as many rounds.
        n = len(everyone)
        self.shuffled = [everyone[(g + 1) % n][0] for g in mine] if n > 1 else []
        # Landscapes: of clips that move between context and goal, spread over all of them.
        moving = [g for g, (_, moved) in enumerate(everyone) if moved >= cfg.energy.min_move]
        evenly = np.linspace(0, len(moving) - 1, min(len(moving), cfg.val_landscapes))
        chosen = {moving[i] for i in evenly.round().astype(int)}
        self.pairs = [clip for g, clip in zip(mine, clips) if g in chosen]
        # Those of earlier versions hold losses alone.
        self.first = next((entry for entry in earlier if "val_l1" in entry), None)
        self.began, self.seconds, self.warned = time.monotonic(), 0.0, set()
        for entry in earlier:           # what was said before is not said again
            if self.first and "val_l1" in entry:
                self.warnings(entry)

    @torch.no_grad()
    def measure(self, world):
        """{name: number} of everything above, the same on all ranks. What the clips cannot tell,
        such as the effect of other actions with one clip, is not in it."""
        began, sums, counts = time.monotonic(), Counter(), Counter()
        values = evaluate(world, self.batches, self.cfg, self.autocast, self.device,
                          partial(self._add_distances, world, sums, counts))
        # The name that the field uses: of all cheap numbers it predicts success in planning best.
        values["val_l1"] = values["val_teacher_forcing"]
        world.eval()
        with uncompiled(world), self.autocast:
            for clip in self.pairs:
                for name, value in self._landscape(world, clip).items():
                    if np.isfinite(value):
                        sums[name] += value
                        counts[name] += 1
        world.train()
        sums, counts = map(ranks.add_up, (sums, counts))
        values |= {name: sums[name] / counts[name] for name in sorted(counts)}
        if "val_shuffled" in values and values["val_l1"]:
            values["val_shuffle_ratio"] = values["val_shuffled"] / values["val_l1"]
            n = counts["val_shuffled"]
            if n >= MIN_CLIPS:
                squares = max(0, sums["rise_squared"] - sums["rise"] ** 2 / n)
                error = (squares / (n - 1) / n) ** 0.5
                values["val_shuffle_error"] = error / values["val_l1"]
        values |= {f"update/{kind}": norm for kind, norm in update_norms(world).items()}
        self.seconds += time.monotonic() - began
        values["ms_val"] = 1e3 * (time.monotonic() - began)
        self.first = self.first or values
        return values

    def _on_device(self, clip):
        return {key: torch.as_tensor(value)[None].to(self.device) for key, value in clip.items()}

    def _add_distances(self, world, sums, counts, h, actions, states):
        """Adds those of a batch to two Counters: of distances, and of clips."""
        n, first = len(h), counts["val_copy"]
        found = {"val_copy": (h[:, 1:] - h[:, :-1]).abs().mean(),
                 "val_zero": self._l1(world, h, torch.zeros_like(actions), states).mean()}
        if self.shuffled:
            other = torch.stack(self.shuffled[first:first + n]).to(actions)
            l1 = self._l1(world, h, other, states)
            found["val_shuffled"] = l1.mean()
            # Clip by clip: clips differ more in how hard they are than in what the actions do.
            rise = (l1 - self._l1(world, h, actions, states)).double()
            sums["rise"] += rise.sum().item()
            sums["rise_squared"] += rise.square().sum().item()
        ahead = [k for k in HORIZONS if k < h.shape[1]]
        rolled = roll_out(world, h, actions, states, max(ahead))                # [B, k, N, D]
        for k in ahead:
            off, still = rolled[:, k - 1] - h[:, k], h[:, 0] - h[:, k]
            found |= {f"val_l1_{k}": off.abs().mean(), f"val_l2_{k}": off.square().mean(),
                      f"val_copy_l1_{k}": still.abs().mean(),
                      f"val_copy_l2_{k}": still.square().mean()}
        for name, value in found.items():
            sums[name] += value.item() * n
            counts[name] += n

    def _l1(self, world, h, actions, states):
        """Of each clip, one frame ahead: [B]."""
        z = world.predict(h[:, :-1], actions[:, :-1], states[:, :-1])           # [B, T-1, N, D]
        return world.distances(z, h[:, 1:])[:, L1]

    def _landscape(self, world, clip):
        """Of the first frame as context and the second as goal: {name: number or NaN}."""
        clip = self._on_device(clip)
        h = (clip["h"][0].float() if "h" in clip else
             world.encode(clip["frames"][:, :, :2])[0])                         # [≥ 2, N, D]
        states = clip["states"][0].cpu()
        truth = true_action(states.numpy(), 1)
        # Wide enough for this clip's move, and the same each time.
        radius = max(self.cfg.energy.radius, 1.25 * np.abs(truth[:2]).max())
        plane, sphere = grid("xy", radius, POINTS, truth), shell(truth, N_SHELL)
        actions = np.concatenate([plane, sphere, truth[None]])
        energies = landscapes(world, h[:1], states[:1], h[1], actions)[:, L1].cpu().numpy()
        on_plane, on_shell = energies[:len(plane)], energies[len(plane):-1]
        found = measures.metrics(plane, on_plane, truth)
        out = {"val_relative_range": found["relative_range"], "val_flat": found["flat"]}
        if found["flat"]:           # the order of its energies means nothing
            return out
        sides = measures.shell(sphere[:, :3], on_shell, truth[:3], energies[-1])
        return out | {"val_percentile": found["rank"], "val_spearman": found["spearman"],
                      "val_shell_percentile": sides["shell_percentile"]}

    @torch.no_grad()
    def pictures(self, world):
        """{name: [T, S, 2·S, 3] uint8} of some clips as they move: the decoded truth on the left,
        on the right what the model imagines from the first frame on, with the true actions. {} on
        other ranks than 0, and without a decoder."""
        found = {}
        world.eval()
        with uncompiled(world), self.autocast:
            for i, clip in enumerate(map(self._on_device, self.shown)):
                h = clip["h"].float() if "h" in clip else world.encode(clip["frames"])
                z = roll_out(world, h, clip["actions"], clip["states"])         # [1, T-1, N, D]
                imagined = self.decode(torch.cat([h[:, :1], z], dim=1)[0])
                found[f"imagined_{i}"] = torch.cat([self.decode(h[0]), imagined], dim=2).numpy()
        world.train()
        return found

    # In words

    def line(self, values):
        """What a validation found, in one line."""
        v = values
        others = [f"{name} {v[key]:.3g}" for name, key in
                  (("copy", "val_copy"), ("others' actions", "val_shuffled"),
                   ("no actions", "val_zero")) if key in v]
        parts = [f"val_loss {v['val_loss']:.4g}", f"L1 {v['val_l1']:.3g} ({', '.join(others)})"]
        k = max((k for k in HORIZONS if f"val_l1_{k}" in v), default=1)
        if k > 1:
            parts.append(f"{k} ahead {v[f'val_l1_{k}']:.3g} (copy {v[f'val_copy_l1_{k}']:.3g})")
        if "val_relative_range" in v:
            flat = f", {_percent(v['val_flat'])} of them flat" if v["val_flat"] else ""
            parts.append(f"landscapes: range {_percent(v['val_relative_range'])} of the mean{flat}")
        if "val_percentile" in v:
            parts.append(f"truth at {v['val_percentile']:.0f} %, at "
                         f"{v.get('val_shell_percentile', np.nan):.0f} % among equal lengths "
                         "(chance 50)")
        parts += [f"{key.removeprefix('val_loss/')} {value:.4g}" for key, value in v.items()
                  if key.startswith("val_loss/")]
        if v is not self.first:
            share = self.seconds / max(time.monotonic() - self.began, 1e-9)
            parts.append(f"validation took {_percent(share)} of the time")
        return "; ".join(parts)

    def warnings(self, values):
        """What a falling loss may hide, one line each, when it begins."""
        first, found = self.first, {}
        ratio = values.get("val_shuffle_ratio", np.nan)
        if values is not first and ratio < IGNORED:
            before = first.get("val_shuffle_ratio", np.nan)
            found["ignored"] = (
                "WARNING: actions are hardly used: L1 with others' actions is "
                f"{ratio:.4f} times that with the true ones ({before:.4f} at the beginning)")
        now, before = (v.get("val_relative_range", np.nan) for v in (values, first))
        if now < FLATTER * before and values["val_loss"] < first["val_loss"]:
            found["flatter"] = (
                "WARNING: the loss falls and the landscapes flatten: their range is "
                f"{_percent(now)} of the mean energy, {_percent(before)} at the beginning")
        # Said once, when it begins: repeated every 500 steps it would be read by nobody.
        new = [line for kind, line in found.items() if kind not in self.warned]
        self.warned = set(found)
        return new

    def verdict(self, values, best=""):
        """What a run came to, in one line at its end."""
        first, l1 = self.first, values["val_l1"]
        copy = l1 / values["val_copy"] if values["val_copy"] else np.nan
        lines = [f"the model {_use_of_actions(values)}",
                 f"it is {'better' if copy < 1 else 'no better'} than copying the last frame (L1 "
                 f"{l1:.4g} against {values['val_copy']:.4g})"]
        if first is not values and first["val_l1"]:
            change = l1 / first["val_l1"] - 1
            lines.append(f"L1 one frame ahead {'fell' if change < 0 else 'rose'} by "
                         f"{_percent(abs(change))} since the beginning")
        lines += [best] * bool(best) + ["energy.py measures it on more, with intervals"]
        return "verdict: " + "; ".join(lines)


def _use_of_actions(values):
    ratio = values.get("val_shuffle_ratio", np.nan)
    error = values.get("val_shuffle_error", np.nan)
    if not np.isfinite(ratio):
        return "was not tried with other actions"
    spread = f" ± {error:.2g}" if np.isfinite(error) else ""
    found = f"(L1 with others' {ratio:.3g}{spread} times as high)"
    if ratio < IGNORED:
        return f"hardly uses the actions {found}"
    if not np.isfinite(error):
        return f"seems to use the actions {found}, on fewer than {MIN_CLIPS} clips"
    if ratio - SURE * error <= 1:
        return f"is not shown to use the actions {found}: this may be chance"
    return f"uses the actions {found}"


def _percent(share):
    """0.0123 -> "1.2 %", 1.234 -> "123 %"."""
    return f"{100 * share:.0f} %" if abs(share) >= 0.1 else f"{100 * share:.2g} %"


def _moved(states):
    """Metres from the first pose to the second."""
    return float((states[1, :3] - states[0, :3]).norm())


def kind_of(name):
    """"predictor_blocks.3.attn.qkv" -> "attn.qkv"."""
    return ".".join(name.split(".")[-2:])


def update_norms(world):
    """{kind of layer: ‖s B A‖ / ‖W‖ over its layers}."""
    kinds = {}
    for name, layer in lora.adapted_layers(world).items():
        kinds.setdefault(kind_of(name), []).append(layer)
    return {kind: lora.update_norm(torch.nn.ModuleList(layers)) for kind, layers in kinds.items()}


def gradient_norms(world):
    """{"grad/KIND": norm of the gradient of the adapters of a kind of layer}; without those that
    are not finite, as with fp16 where its scale is too large."""
    squares = Counter()
    for name, layer in lora.adapted_layers(world).items():
        for parameter in (layer.lora_A, layer.lora_B):
            if parameter.grad is not None:
                squares[f"grad/{kind_of(name)}"] += parameter.grad.float().square().sum()
    norms = {kind: float(value) ** 0.5 for kind, value in squares.items()}
    return {kind: norm for kind, norm in norms.items() if np.isfinite(norm)}
