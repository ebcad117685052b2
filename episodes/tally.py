"""What becomes of the episodes of a data set: counted, and judged when too few can be used."""
import math
import sys
from collections import Counter

from tqdm import tqdm

import config


ENOUGH = 20         # episodes of which the share of bad ones tells something
OTHER = "of the other split"


class Tally:
    """Counts episodes by what becomes of them.

        tally.add(episode, "used")          # or why it is not
        tally.leave_out(damaged)
        tally.check()                       # after each file; at_end=True after the last one

    latents.py and the loaders use it. Raises ValueError as soon as it is clear that the data cannot
    be used as they are."""

    def __init__(self, data, split=""):
        self.data, self.split = data, split
        paths = [str(one.latents or one.path) for one in config.data_sets(data)]
        self.path = ", ".join(dict.fromkeys(paths))
        self.status = {}            # location of an episode that is not bad: what became of it
        self.bad = {}               # location: episodes lost there
        self.n_bad = self.n_bad_here = 0            # of both splits, and of this one
        self.names = set()          # the first few
        self.longest = self.n_success = 0           # frames; episodes
        self.sorts_failures = False     # whether names tell success from failure at all

    def add(self, episode, status):
        if episode.location in self.bad:
            return
        self.status.setdefault(episode.location, status)
        self.n_success += episode.success
        self.sorts_failures |= "/failure/" in episode.name
        self.longest = max(self.longest, len(episode.poses))
        if len(self.names) < 3:
            self.names.add(episode.name)

    def leave_out(self, damaged, of_this_split=True):
        """Counts a DamagedEpisode, and reports it if it is one of this split."""
        if damaged.location in self.bad:
            return
        self.status.pop(damaged.location, None)
        self.bad[damaged.location] = damaged.lost
        self.n_bad += damaged.lost
        if of_this_split:
            self.n_bad_here += damaged.lost
            tqdm.write(f"left out: {damaged}", file=sys.stderr)
        self.check(damaged)

    def check(self, damaged=None, at_end=False):
        """Raises ValueError if too large a share is damaged or lost, or if data.only_success leaves
        nothing. at_end: all episodes were seen."""
        most, n = self.data.max_bad_share, len(self.status) + self.n_bad
        # What is lost behind one break counts as one observation.
        enough = n * len(self.bad) >= ENOUGH * self.n_bad
        limit = most * n
        if n < ENOUGH and most:
            limit = max(limit, n / 2)               # of ten episodes, one may well be damaged
        elif not at_end:
            limit += 2 * math.sqrt(limit)           # what chance may add in a sample
        if self.n_bad > limit and (enough or at_end and self.status or not most):
            last = f", the last is {damaged}" if damaged else ""
            raise ValueError(
                f"{self.path}: {self.n_bad:,} of {n:,} episodes are damaged or lost, more than a "
                f"share of {most:g}{last}; repair the data or raise --data.max_bad_share")
        unsorted = not self.n_success and not self.sorts_failures
        n = len(self.status)
        if self.data.only_success and unsorted and n >= (1 if at_end else ENOUGH):
            raise self._no_success_error()

    def _no_success_error(self):
        example = f", such as {sorted(self.names)[0]!r}" if self.names else ""
        return ValueError(f"{self.path}: none of {len(self.status)} episodes has /success/ in its "
                          f"name (data.keys.episode){example}: set --data.only_success=false")

    def counts(self):
        """Counter of this split's episodes by what became of them."""
        counts = Counter(list(self.status.values()))        # a thread adds to it
        del counts[OTHER]
        if self.n_bad_here:
            counts["damaged"] = self.n_bad_here
        return counts

    def report(self):
        counts = self.counts()
        parts = ", ".join(f"{n:,} {status}" for status, n in counts.most_common())
        return f"{counts.total():,} episodes of this split" + (parts and f": {parts}")

    def no_clips_error(self, span, rank, source=None):
        """The error to raise after a pass over the data without a single clip of `span` recorded
        frames, with the cure that belongs to the most common reason."""
        counts, n_others = self.counts(), list(self.status.values()).count(OTHER)
        survey = getattr(source, "survey", None)
        if survey and survey.exact and not survey.names and survey.status:
            counts = survey.status              # none of either split can be used
        reason = max(counts, key=counts.get, default="")
        where = f"on rank {rank} " if rank else ""
        raise_it = "raise" if self.split == "val" else "lower"
        cures = {
            "": f"{raise_it} --data.val_fraction (now {self.data.val_fraction:g})",
            "used": "there are fewer clips than ranks: use fewer ranks",
            "too short": f"a clip spans {span} recorded frames and the longest episode has "
                         f"{self.longest}: lower --data.clip_frames or --data.frame_step",
            "too idle": "no stretch in which joints move is long enough: set "
                        "--data.drop_idle=false",
            "without /success/": "set --data.only_success=false",
            "damaged": "repair the data; stderr says what is wrong with each",
        }
        cure = cures[reason]
        if not reason and not n_others:
            cure = "there is no episode at all"
        elif not reason and n_others == 1 and self.split == "val":
            cure = "there is one recording, and validation needs another one: record more"
        elif not reason and len(self.names) == 1 and n_others > 1:
            another = ("set --data.keys.episode= to another key, or to nothing"
                       if getattr(source, "named", True) else
                       "`episode` in the files is to be another one for each recording")
            cure = (f"all {n_others:,} episodes are named {next(iter(self.names))!r}, and the name "
                    f"decides the split: {another}")
        elif reason and n_others > counts.total():
            cure += f", or {cures['']}"
        return ValueError(f"{self.path}: no clip for {self.split} {where}in {self.report()}, "
                          f"{n_others:,} of the other; {cure}")
