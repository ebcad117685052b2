"""The order of clips: each once an epoch, by the seed, for all ranks; resumed exactly; begun
anywhere with data.offsets=any; for validation spread over the episodes."""
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import droid
from episodes import clips, rounds, windows
from episodes.source import Episode
from small import (
    LENGTHS,
    SHADE,
    all_clips,
    data_recipe,
    take,
    which,
)


def test_an_epoch_holds_every_clip_once_in_an_order_that_the_seed_decides(source):
    folder, names = source
    n = len(all_clips(names))
    orders = [which(take(droid.create_dataloader(data_recipe(folder, f"--seed={seed}")), 2 * n))
              for seed in (0, 0, 1)]
    assert sorted(orders[0][:n]) == sorted(orders[0][n:]) == all_clips(names)
    assert orders[0] == orders[1] and orders[0] != orders[2]
    assert orders[0][:n] != orders[0][n:] != sorted(orders[0][n:])


@pytest.mark.parametrize("offsets", [[], ["--data.offsets=any"]])
@pytest.mark.parametrize("stop", [1, 5, 13])
def test_resuming_gives_the_clips_that_would_have_followed(source, stop, offsets, monkeypatch):
    """Also across rounds and epochs: 13 batches of 3 are more than one epoch of 28 or 33 clips."""
    monkeypatch.setattr(rounds, "FIRST_ROUND", 4)
    cfg = data_recipe(source[0], "--batch_size=3", "--data.shuffle_buffer=9", *offsets)
    loader = droid.create_dataloader(cfg)
    batches = iter(loader)
    for _ in range(stop):
        next(batches)
    state = loader.state_dict()
    following = [next(batches) for _ in range(4)]
    fresh = droid.create_dataloader(cfg)
    fresh.load_state_dict(state)
    for expected, batch in zip(following, fresh):
        assert all(torch.equal(expected[key], batch[key]) for key in expected)


def any_windows(names):
    """What `which` gives for all clips of these episodes, from any recorded frame on."""
    return sorted((name, start) for name in names for start in range(LENGTHS[name] - 6))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_with_any_offset_each_epoch_has_other_windows_and_all_come_in_turn(source, world_size):
    """Between two clips of an episode there are 4 recorded frames: all of its windows come in 4
    epochs, each once, or in as many as it has if these are fewer."""
    folder, names = source
    cfg = data_recipe(folder, "--data.offsets=any", "--data.shuffle_buffer=9")
    source = droid.open_source(cfg)
    epochs = {}
    for rank in range(world_size):
        loader = clips.Clips(source, cfg, "train", True, rank, world_size)
        for state, clip, one, start in loader._decoded_clips(loader.state):
            if state["epoch"] == 4:
                break
            epochs.setdefault(state["epoch"], []).append((one.name, start))
            assert round(100 * clip["states"][0, 0]) == start
            gray = clip["frames"].float().mean(dim=(0, 2, 3)) / SHADE       # of frames [T]
            assert (gray - start - 2 * torch.arange(4)).abs().max() < 0.3
    assert len({tuple(sorted(seen)) for seen in epochs.values()}) == 4
    every = sorted(window for seen in epochs.values() for window in seen)
    assert [start for _, start in every] == [start for _, start in any_windows(names)]
    for name in {name for name, _ in every}:
        n = len(source_poses(source, name))
        for seen in epochs.values():
            starts = sorted(start for other, start in seen if other == name)
            assert np.diff(starts).tolist() == [4] * (len(starts) - 1)
            assert starts[0] < 4 and starts[-1] > n - 7 - 4


def source_poses(source, name):
    return next(episode.poses for file in source.files for episode in source.episodes(file)
                if episode.name == name)


def test_an_episode_with_few_windows_gives_one_of_them_in_each_epoch():
    data = data_recipe("x", "--data.frame_step=15", "--data.clip_frames=8").data    # 106 frames
    seen = [windows.clip_starts([(10, 119)], data, windows.drawn(3, epoch, "name")).tolist()
            for epoch in range(9)]
    assert sorted(sum(seen[:4], [])) == [10, 11, 12, 13] and seen[4:8] == seen[:4]
    assert windows.clip_starts([(0, 105), (5, 9)], data, windows.drawn(3, 0, "name")).tolist() == []
    other = [windows.clip_starts([(10, 119)], data, windows.drawn(4, epoch, "name")).tolist()
             for epoch in range(4)]
    assert other != seen[:4]


def test_ranks_share_no_clip_and_miss_none(source):
    folder, names = source
    cfg = data_recipe(folder)
    source = droid.open_source(cfg)
    for world_size in (2, 3):
        loaders = [clips.Clips(source, cfg, "train", False, rank, world_size)
                   for rank in range(world_size)]
        shares = [which(take(loader, 1000)) for loader in loaders]
        assert sorted(sum(shares, [])) == all_clips(names)


@pytest.mark.parametrize("seed, rank, world_size, order", [
    (0, 0, 1, "c8 c0 c16 c12 c4 e16 d20 e20 b20 b28 b32 b8 b24 b16"),
    (5, 0, 1, "e12 e4 e16 e8 e0 e20 d4 d0 a20 c16 c4 c12 a8 c8"),
    (5, 1, 2, "e4 e8 e20 d0 d12 d16 d8 b16 a16 a20 a8 d28 d8 d20"),
])
def test_the_order_is_that_of_earlier_versions(npz, monkeypatch, seed, rank, world_size, order):
    """Clips 0 to 7 and 34 to 39: or old checkpoints would resume with other clips than would have
    followed."""
    monkeypatch.setattr(rounds, "FIRST_ROUND", 4)
    cfg = data_recipe(npz, f"--seed={seed}", "--data.shuffle_buffer=9")
    loader = clips.Clips(droid.open_source(cfg), cfg, "train", True, rank, world_size)
    seen = [f"{name}{start}" for name, start in which(take(loader, 40))]
    assert seen[:8] + seen[34:] == order.split()
    assert loader.state_dict()["count"] == 40 * world_size


@pytest.mark.parametrize("n, world_size", [(1, 1), (3, 1), (4, 2), (9, 1), (9, 3), (500, 2)])
def test_validation_is_spread_over_the_episodes(source, n, world_size):
    folder, names = source
    cfg = data_recipe(folder, "--data.val_fraction=1")
    source = droid.open_source(cfg)
    def clips_of(rank):
        return clips.Clips(source, cfg, "val", False, rank, world_size, n)
    shares = [which(take(clips_of(rank), 1000)) for rank in range(world_size)]
    found = sum(shares, [])
    every = all_clips(names)
    assert len(set(found)) == len(found) == min(n * world_size, len(every))
    assert {len(share) for share in shares} <= {n, len(every) // world_size,
                                                len(every) // world_size + 1}
    per_episode = [sum(name == one for one, _ in found) for name in names]
    there = [sum(name == one for one, _ in every) for name in names]
    most = max(per_episode)
    assert all(k >= min(most - 1, all_) for k, all_ in zip(per_episode, there))
    assert which(take(clips_of(0), 1000)) == shares[0]              # the same ones each time


@pytest.mark.parametrize("n, n_read, n_episodes", [(10, 5, 10), (40, 8, 16), (200, 17, 34)])
def test_validation_reads_no_more_than_it_needs(n, n_read, n_episodes):
    """Of two episodes a file, with 6 clips each: 16 episodes are enough if they have n clips."""
    read = []

    class Endless:
        files, key = [str(i) for i in range(1000)], "frames"

        def episodes(self, file):
            read.append(file)
            for i in range(2):
                yield Episode("place", f"/success/{file}/{i}", np.zeros((30, 7)), "images")

        def gather(self, images, start):
            return images

        def decode(self, images):
            return torch.zeros(3, 4, 8, 8)

    cfg = data_recipe("x", "--data.val_fraction=1", "--data.check=false")
    loader = clips.Clips(Endless(), cfg, "val", False, 0, 1, n)
    seen = [episode.name for _, _, episode, _ in loader._decoded_clips(clips.START)]
    assert len(seen) == n and len(read) == n_read and len(set(seen)) == n_episodes
    assert max(map(int, read)) > 20                 # not the first ones of a large data set


def test_validation_of_many_episodes_of_one_clip_is_chosen_quickly():
    def clips_of(file, epoch, n_skipped):
        yield [SimpleNamespace(episode=SimpleNamespace(name=file))]

    begin = time.monotonic()
    found = rounds.spread_over_episodes([str(i) for i in range(600)], clips_of, 512, 512)
    assert len({clip.episode.name for clip in found}) == 512
    assert time.monotonic() - begin < 5             # 0.2 s; of quadratic time for each, 50 s


@pytest.mark.parametrize("n", [0, 10])
def test_leaving_ends_the_thread_also_while_no_clip_comes(n):
    read = []

    class OtherSplit:
        files, key = [str(i) for i in range(10_000)], "frames"

        def episodes(self, file):
            time.sleep(0.02)
            read.append(file)
            yield Episode(file, f"/success/{file}", np.zeros((30, 7)), "images")

    def leave(seconds):
        if len(read) > 3:
            raise KeyboardInterrupt

    cfg = data_recipe("x", "--data.val_fraction=0.5", "--data.clip_frames=400")
    loader = clips.Clips(OtherSplit(), cfg, "train", not n, 0, 1, n)
    loader._while_waiting = leave
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        next(iter(loader))
    assert time.monotonic() - begin < 4             # after JOIN_SECONDS it would be left behind
    seen = len(read)
    time.sleep(0.1)
    assert len(read) == seen


@pytest.mark.parametrize("limit, n_read", [(10 ** 9, 24), (0, 9), (250, 11)])
def test_the_next_round_is_read_meanwhile_but_no_more_than_fits(limit, n_read):
    """Rounds of 8 clips of 100 bytes: of what comes after the first, two rounds are read at most
    (one that waits, one that is being read), or as many clips as fit and the one that does not."""
    ahead, read = rounds.ReadAhead(limit), []

    def rounds_of_eight():
        for number in range(6):
            clips_ = []
            for i in range(8):
                read.append(i)
                clips_.append(SimpleNamespace(n_bytes=100))
                ahead.add(100)
            yield rounds.Place(0, number), clips_

    ready = ahead.rounds(rounds_of_eight())
    place, some = next(ready)
    assert place.round == 0 and len(some) == 8
    deadline = time.monotonic() + 10
    while len(read) < n_read and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    assert len(read) == n_read
    assert [place.round for place, _ in ready] == [1, 2, 3, 4, 5] and len(read) == 48


def test_episodes_that_prove_damaged_when_decoded_are_judged_at_the_end_of_the_pass(npz):
    """Not when they were read, which is earlier: all of them are named first."""
    class Broken:
        files, key = [str(i) for i in range(12)], "frames"

        def episodes(self, file):
            yield Episode(file, f"/success/{file}", np.zeros((30, 7)), "images")

        def gather(self, images, start):
            return images

        def decode(self, images):
            time.sleep(0.01)
            raise ValueError("it is broken")

    cfg = data_recipe("x", "--data.check=false")
    for shuffle in (False, True):
        loader = clips.Clips(Broken(), cfg, "train", shuffle)
        with pytest.raises(ValueError, match="no clip for train"):
            assert not list(loader)
            raise loader.no_clips_error()
        assert len(loader.tally.bad) == 12
