"""Numbers that go wrong in training: what is not finite stops the run in one line that says where,
in which clips and why; spikes of the loss are kept with their clips.

    watch = Watch(cfg, world, out, device, newest, say)
    watch.add(losses, batch, names)                 # after each micro-batch
    losses, grad_norm = watch.check(step, grad_norm, stop)      # before the update, on all ranks

The GPU is waited for once a step. The cause is looked for only when there is something to explain.
"""
import json
import math
from collections import deque
from contextlib import suppress

import numpy as np
import torch
import torch.distributed as dist

import lora
from running import hang
from running.ranks import gather_from_ranks, rows_of_ranks


MOST_SKIPPED = 20       # steps in a row; after so many halvings fp16's scale is not what is wrong
WINDOW = 100            # steps whose losses are the measure for a spike …
FEWEST = 50             # … once there are so many
SPIKE = 6.0             # standard deviations above their mean
# ‖s B A‖ / ‖W‖ of adapters that compute nothing of use any more. Trained ones are below 1.
EXPLODED = 100.0
WEIGHTS, POSES, OVERFLOW = range(3)     # causes, the most certain ones first
MOST_POSE = 100.0       # m and rad: what is larger is suspected


class Watch:
    """What a run's losses and gradients tell. All ranks make one and come to the same decisions."""

    def __init__(self, cfg, world, out, device, newest, say):
        """newest(): the newest step to resume from, 0 for none. say(line): prints on rank 0."""
        self.cfg, self.world, self.out, self.device = cfg, world, out, device
        self.newest, self.say = newest, say
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.micro_batches = []                     # (losses, clips, poses) of this step
        self.suspects = []                          # (clips, poses) of those that went wrong
        self.recent = deque(maxlen=WINDOW)          # losses; a resumed run collects them anew
        self.bad_in_a_row = self.skipped = self.updates = self.updates_since_save = 0
        self.fault, self.spoiled = "", False        # of the losses in this row

    def add(self, losses, batch, names):
        """A micro-batch's losses: {name: scalar tensor}, whose memory may be used again. names: of
        its clips."""
        # Divided here, so that a CUDA graph's next replay does not overwrite them.
        losses = {name: value / self.cfg.grad_accum for name, value in losses.items()}
        poses = {key: batch[key] for key in ("states", "actions")}
        self.micro_batches.append((losses, list(names), poses))

    def check(self, step, grad_norm, stop):
        """-> ({name: loss}, norm of the gradient) of the step, over all ranks, as numbers.

        Tells `stop` what signals other ranks have seen. Raises ValueError if the run should not go
        on: at once, except for fp16, where the update of such a step is skipped."""
        hang.doing("the update", step)
        totals = {}
        for losses, _, _ in self.micro_batches:
            totals = {name: totals.get(name, 0) + value for name, value in losses.items()}
        signal = torch.full((), float(stop.number), device=self.device)
        row = [value.float().to(self.device) for value in (*totals.values(), grad_norm, signal)]
        rows = rows_of_ranks(torch.stack(row))
        stop.of_ranks = int(max(row[-1] for row in rows)) if len(rows) > 1 else None
        losses = {name: sum(row[i] for row in rows) / len(rows) for i, name in enumerate(totals)}

        bad = sorted(name for name, value in losses.items() if not math.isfinite(value))
        norm_is_finite = all(math.isfinite(row[-2]) for row in rows)
        if bad or not norm_is_finite:
            self._not_finite(step, bad)
        else:
            self.bad_in_a_row, self.fault, self.spoiled = 0, "", False
            self._look_for_spike(step, self.cfg.loss.total(losses))
        if norm_is_finite:
            self.updates, self.updates_since_save = self.updates + 1, self.updates_since_save + 1
        else:
            self.skipped += 1
        self.micro_batches = []
        return losses, rows[0][-2]

    def counts(self):
        """For the log: {"skipped": steps without an update since the last call}, with fp16."""
        if self.cfg.precision != "fp16":
            return {}
        skipped, self.skipped = self.skipped, 0
        return {"skipped": skipped}

    def validated(self, step, values):
        """The values of a validation again. Raises ValueError if one is not finite."""
        bad = sorted(name for name, value in values.items() if not math.isfinite(value))
        if bad:
            self.suspects = []
            raise ValueError(f"step {step}: {', '.join(bad)} not finite: {self._cause()[1]}; "
                             f"{self._saved()}")
        return values

    def worth_saving(self, last):
        """Whether a step differs from the checkpoint before it: otherwise it would only push an
        older one out. Raises ValueError if the adapters are of no use."""
        if last and not self.updates and self.fault:
            raise ValueError(f"{self.fault}; {self._saved()}")
        fault = self.unsound()
        if fault:
            raise ValueError(f"the adapters are {fault} and are not saved: lower --lr (now "
                             f"{self.cfg.lr:g}); {self._saved()}")
        worth, self.updates_since_save = bool(self.updates_since_save), 0
        return worth

    def unsaved(self):
        """Whether there is something to save before a run ends by an error: not if it is the
        adapters with which the losses are not finite."""
        return bool(self.updates_since_save and not self.spoiled and not self.unsound())

    def unsound(self):
        """What makes the adapters useless, or ""."""
        adapters = [p.isfinite().all() for p in self.world.parameters() if p.requires_grad]
        if not torch.stack(adapters).all():
            return "not finite"
        size = lora.update_norm(self.world)
        return "" if size <= EXPLODED else f"{size:.0e} times as large as the weights"

    # What is not finite

    def _not_finite(self, step, bad):
        """Raises ValueError, or with fp16 counts."""
        self.bad_in_a_row += 1
        too_many, fp16 = self.bad_in_a_row == MOST_SKIPPED, self.cfg.precision == "fp16"
        if fp16 and not too_many and (not bad or self.fault):
            return                  # the scale was too large, or that is said already
        # Of all of them, if only their gradients together are not finite.
        self.suspects = [(names, poses) for losses, names, poses in self.micro_batches
                         if not (bad and all(value.isfinite() for value in losses.values()))]
        clips = [name for names, _ in self.suspects for name in names]
        here = len(self.suspects), len(self.micro_batches), clips
        n_bad, n, clips = (sum(of_ranks[1:], of_ranks[0])
                           for of_ranks in zip(*gather_from_ranks(here)))
        what = (f"the loss ({', '.join(bad)}) is not finite in {n_bad} of {n} micro-batches"
                if bad else "the gradient is not finite")
        certainty, cause = self._cause()
        self.spoiled = bool(bad) and certainty in (WEIGHTS, OVERFLOW)
        self.fault = f"step {step}: {what} (clips: {_some(clips)}): {cause}"
        self._keep(step=step, loss=None, not_finite=bad or ["gradient"], clips=clips)
        if too_many:
            self.fault = f"{MOST_SKIPPED} steps in a row were not finite; {self.fault}"
        if too_many or not fp16:
            raise ValueError(f"{self.fault}; {self._saved(step - 1)}")
        self.say(f"{self.fault}; going on, for at most {MOST_SKIPPED} such steps in a row")

    def _cause(self):
        """(WEIGHTS, POSES or OVERFLOW; in words, with what to do)."""
        return min(gather_from_ranks(self._cause_here()))

    def _cause_here(self):
        cfg = self.cfg
        for name, parameter in self.world.named_parameters():
            if parameter.isfinite().all():
                continue
            if parameter.requires_grad:
                return WEIGHTS, f"the adapter {name} is not finite; lower --lr (now {cfg.lr:g})"
            other = " or use --precision=fp32" if cfg.precision == "fp16" else ""
            return WEIGHTS, (f"the base's weight {name} is not finite in {cfg.precision}; fetch "
                             f"{cfg.model.checkpoint} again{other}")
        size = lora.update_norm(self.world)
        if not size <= EXPLODED:
            return WEIGHTS, (f"the adapters have grown to {size:.0e} times the weights, so that "
                             f"the gradient is not finite; lower --lr (now {cfg.lr:g})")
        for names, poses in self.suspects:
            for key, values in poses.items():
                if not values.abs().max() < MOST_POSE:
                    return POSES, (f"{key} of {_some(names)} hold values up to "
                                   f"{values.abs().max():.0e}; repair or leave out these episodes")
        wider = {"fp16": "use --precision=bf16 or fp32, or ",
                 "bf16": "use --precision=fp32 or ", "fp32": ""}[cfg.precision]
        return OVERFLOW, (
            f"weights and data are finite, so that activations overflow {cfg.precision}; {wider}"
            f"lower --lr (now {cfg.lr:g})")

    def _saved(self, step=0):
        """The checkpoint to go on from. step: the one that will be saved if it is `unsaved`."""
        newest = step if step and self.unsaved() else self.newest()
        return f"newest checkpoint: {f'step {newest}, go on with --resume' if newest else 'none'}"

    # Spikes

    def _look_for_spike(self, step, loss):
        if len(self.recent) >= FEWEST:
            mean, std = np.mean(self.recent), np.std(self.recent)
            # Where the loss hardly varies, a percent is nothing to report.
            std = max(std, 0.01 * abs(mean))
            if loss > mean + SPIKE * std:
                clips = self._worst_clips()
                self.say(f"step {step}: the loss is {loss:.4f}, {(loss - mean) / std:.0f} standard "
                         f"deviations above the mean {mean:.4f}; spikes.jsonl; most in "
                         f"{_some(clips)}")
                self._keep(step=step, loss=loss, mean=float(mean), std=float(std), clips=clips)
                # As much as is no spike: if the losses stay there, they soon are the measure.
                loss = mean + SPIKE * std
        self.recent.append(loss)

    def _worst_clips(self):
        """The clips of the micro-batch with the largest loss on any rank."""
        sums = [float(self.cfg.loss.total(losses)) for losses, _, _ in self.micro_batches]
        here = max(range(len(sums)), key=sums.__getitem__)
        return max(gather_from_ranks((sums[here], self.micro_batches[here][1])))[1]

    def _keep(self, **entry):
        """A line of spikes.jsonl."""
        if self.rank == 0:
            # A log that cannot be written is no reason to lose the run.
            with suppress(OSError), open(self.out / "spikes.jsonl", "a") as file:
                file.write(json.dumps(entry) + "\n")


def _some(names, most=6):
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more, in spikes.jsonl" if rest > 0 else "")
