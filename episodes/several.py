"""Several data sets or cameras in one run.

    --data.path=[data/droid_100, my_robot]                      each window once in an epoch
    --data.path=[data/droid_100, my_robot] --data.weights=[1, 3]    of four clips, three of my_robot

`config.data_sets` says which settings each has: `Several` makes one EpisodeSource of theirs, `Mix`
one order of clips with given shares.
"""
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import count

import config
from episodes.clips import START, Clips
from episodes.source import DamagedEpisode, episodes_from


def labels(sets):
    """A name for each data set, for logs and metrics: the last part of its path, the camera too
    where others differ in nothing else, and a number where even that is not enough."""
    names = [last_part(one) for one in sets]
    names = [f"{name}/{one.camera}" if names.count(name) > 1 else name
             for name, one in zip(names, sets)]
    return [name if names.count(name) == 1 else f"{name}-{i + 1}" for i, name in enumerate(names)]


def last_part(data):
    """Of a data set's path, without versions and patterns."""
    parts = [part for part in str(data.path).replace("\\", "/").split("/") if part]
    named = [part for part in parts if not part.replace(".", "").isdigit() and "*" not in part]
    return (named or parts or ["data"])[-1].removesuffix(".npz")


class Several:
    """An EpisodeSource of several. Its files are those of all, "0 FILE" the first one's; images
    travel with the number of their data set."""

    def __init__(self, sources):
        self.sources, self.key, self.data = sources, sources[0].key, sources[0].data
        self.files = [f"{i} {file}" for i, source in enumerate(sources) for file in source.files]

    def episodes(self, file):
        return self.episodes_from(file, 0, "")

    def episodes_from(self, file, first, split):
        i, source, file = self._find(file)
        for episode in episodes_from(source, file, first, split):
            if isinstance(episode, DamagedEpisode):
                yield replace(episode, location=f"{source.label}: {episode.location}")
            else:
                yield replace(episode, location=f"{source.label}: {episode.location}",
                              images=(i, episode.images), data=source.data)

    def size_of(self, file):
        _, source, file = self._find(file)
        return source.size_of(file)

    def gather(self, images, start):
        i, images = images
        return i, self.sources[i].gather(images, start)

    def decode(self, gathered):
        i, gathered = gathered
        return self.sources[i].decode(gathered)

    def every_frame(self, images):
        i, images = images
        return self.sources[i].every_frame(images)

    def _find(self, file):
        number, _, file = file.partition(" ")
        return int(number), self.sources[int(number)], file


class Mix(Clips):
    """Shuffled batches in which data sets have given shares. Each goes through its own clips, in an
    order and epochs of its own."""

    def __init__(self, loaders, data):
        """loaders: a Clips with `shuffle` for each data set. data: a DataConfig with weights, one
        for each path."""
        first = loaders[0]
        super().__init__(first.source, first.cfg, first.split, True, first.rank)
        self.loaders, self.shares = loaders, shares(data)
        self.state = START | {"taken": [0] * len(loaders),
                              "sets": [loader.state_dict() for loader in loaders]}

    def load_state_dict(self, state):
        # A run that read other data sets before begins with these.
        if len(state.get("sets", ())) != len(self.loaders):
            return
        for loader, place in zip(self.loaders, state["sets"]):
            loader.load_state_dict(place)
        self.state = state | {"sets": [loader.state_dict() for loader in self.loaders]}

    def _decoded_clips(self, state):
        taken, places = list(state["taken"]), list(state["sets"])
        with ExitStack() as stack:
            orders = [stack.enter_context(closing(loader._decoded_clips(place)))
                      for loader, place in zip(self.loaders, places)]
            for n in count(state["count"] + 1):
                # The one that is furthest behind its share: every batch has nearly the shares.
                k = max(range(len(orders)), key=lambda k: self.shares[k] * n - taken[k])
                places[k], clip, episode, start = next(orders[k])
                taken[k] += 1
                after = START | {"count": n, "taken": list(taken), "sets": list(places)}
                yield after, clip, episode, start

    def summary(self, n_clips):
        return [line for loader, share in zip(self.loaders, self.shares)
                for line in loader.summary(round(share * n_clips))]

    def report(self):
        return "; ".join(f"{loader.source.label}: {loader.report()}" for loader in self.loaders)


def shares(data):
    """The shares of the data sets of a DataConfig, which sum to 1: a path's weight is spread over
    its cameras."""
    paths = data.path if isinstance(data.path, tuple) else (data.path,)
    each = []
    for path, weight in zip(paths, data.weights):
        n = len(config.data_sets(replace(data, path=(path,), latents="")))
        each += [weight / n / sum(data.weights)] * n
    return each
