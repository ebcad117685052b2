"""Several files are read in turn: sorted data are mixed, each clip comes once an epoch, a resume
goes on in the middle of all open files, and earlier versions' places are understood."""
import numpy as np
import pytest

import checkpoint
import files
from episodes import clips, rounds, source
from episodes.source import Episode
from small import data_recipe


N_FILES, PER_FILE = 40, 10          # episodes of two clips each


class Sorted:
    """Episodes f/i of 40 files, each file a camera, a task or a day of its own. Every third one
    gives no clip, and `first_damaged` lists those first, as stored latents do."""
    files, key = [str(i) for i in range(N_FILES)], "frames"

    def __init__(self, first_damaged=False):
        self.first_damaged, self.begun = first_damaged, []

    def episodes(self, file):
        self.begun.append(file)
        numbers = range(PER_FILE + PER_FILE // 2)
        if self.first_damaged:
            numbers = sorted(numbers, key=lambda i: i % 3 != 2)
        for i in numbers:
            yield Episode(f"{file}/{i}", f"/success/{file}/{i}",
                          np.zeros((3 if i % 3 == 2 else 14, 7)), "images")

    def gather(self, images, start):
        return images


def order(cfg, state=clips.START, rank=0, world_size=1, some=None, n_epochs=1):
    """[(state after it, file, episode, start)] of the clips of the first epochs from a state on."""
    loader, found = clips.Clips(some or Sorted(), cfg, "train", True, rank, world_size), []
    loader.load_state_dict(state)
    for after, clip in loader._own_clips(loader.state):
        if clip is None:
            continue
        if after["epoch"] >= n_epochs:
            return found
        _, _, file, episode = clip.episode.name.split("/")
        found.append((after, file, int(episode), int(clip.start)))


def recipe(size=64, *args):
    return data_recipe("x", f"--data.shuffle_buffer={size}", "--data.check=false", *args)


def every_clip():
    return sorted((str(file), i, start) for file in range(N_FILES)
                  for i in range(PER_FILE + PER_FILE // 2) if i % 3 != 2 for start in (0, 4))


def test_neighbours_in_a_file_do_not_fill_a_batch():
    """Read one after the other, the 64 clips of a round would be of 4 files."""
    found = order(recipe(), n_epochs=2)
    assert len(found) == 2 * len(every_clip())
    for epoch, first, usual in ((0, 8, 8), (1, 0, 13)):
        of_clips = [file for after, file, *_ in found if after["epoch"] == epoch]
        batches = [len(set(of_clips[i:i + 32]))
                   for i in range(first * 32, len(of_clips) - 128, 32)]
        assert np.median(batches) >= usual and min(batches) >= 6, batches


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("size", [5, 64, 10_000])
def test_each_clip_comes_once_an_epoch(size, world_size):
    cfg = recipe(size)
    for epoch in (0, 1):
        found = [one[1:] for rank in range(world_size)
                 for one in order(cfg, rank=rank, world_size=world_size, n_epochs=2)
                 if one[0]["epoch"] == epoch]
        assert sorted(found) == every_clip()


def test_a_first_batch_opens_one_file():
    some = Sorted()
    loader = clips.Clips(some, recipe(1000), "train", True)
    next(loader._rounds(loader.state, rounds.ReadAhead(1e9)))
    assert len(some.begun) == 2         # 32 clips, 20 in a file


@pytest.mark.parametrize("at", [0, 31, 32, 95, 96, 500, 799, 801, 1100])
def test_a_resume_goes_on_in_all_open_files(at):
    cfg = recipe()
    expected = order(cfg, n_epochs=2)
    state = expected[at][0]
    assert order(cfg, state, n_epochs=2) == expected[at + 1:]
    # As JSON would give it back.
    listed = state | {"open": [list(one) for one in state["open"]]}
    assert order(cfg, listed, n_epochs=2) == expected[at + 1:]
    assert rounds.is_state(state) and rounds.is_state(listed)


def test_the_order_is_the_same_where_damaged_episodes_are_listed_first():
    """As in stored latents: what gives no clip takes no turn."""
    cfg = recipe()
    assert [one[1:] for one in order(cfg, n_epochs=2)] == [
        one[1:] for one in order(cfg, some=Sorted(True), n_epochs=2)]


@pytest.mark.parametrize("file, episode", [(0, 0), (7, 4), (7, 15), (39, 3)])
def test_a_place_of_an_earlier_version_leads_to_the_clips_that_were_to_follow(file, episode, capfd):
    """They read one file after the other. Between two rounds nothing comes twice or is left out."""
    files.say_once.cache_clear()
    cfg = recipe()
    old = {"epoch": 0, "round": 5, "file": file, "episode": episode, "index": 0, "count": 9}
    in_order = np.random.default_rng([cfg.seed, 0]).permutation(Sorted.files).tolist()
    expected = sorted(one for one in every_clip() if in_order.index(one[0]) > file or (
        in_order.index(one[0]) == file and one[1] >= episode))
    found = order(cfg, old)
    assert sorted(one[1:] for one in found) == expected and found[0][0]["count"] == 10
    assert "another order" not in capfd.readouterr().err
    order(cfg, old | {"index": 3})
    assert "files with several episodes are read in another order" in capfd.readouterr().err


@pytest.mark.parametrize("n_files, world_size", [(20, 1), (3, 1), (40, 3), (40, 2)])
def test_a_place_of_other_ranks_or_of_more_files_is_gone_on_from(n_files, world_size):
    class Few(Sorted):
        files = Sorted.files[:n_files]

    cfg = recipe()
    state = order(cfg)[500][0]
    found = [one[1:] for rank in range(world_size)
             for one in order(cfg, state, rank, world_size, Few(), n_epochs=2)
             if one[0]["epoch"] == 1]
    assert sorted(found) == [one for one in every_clip() if one[0] in Few.files]


@pytest.mark.parametrize("key, value", [
    ("open", ((1, -1),)), ("open", ((1,),)), ("open", 3), ("open", ("ab",)), ("round", -1),
    ("index", None), ("count", 1.0), ("taken", [1, "x"]), ("sets", [{"round": 1}]), ("file", True),
])
def test_a_place_that_none_can_be_is_damage(key, value):
    good = clips.START | {"open": ((3, 1), (0, 7)), "taken": [1, 2], "sets": [clips.START]}
    assert rounds.is_state(good) and not rounds.is_state(good | {key: value})
    assert not rounds.is_state([good]) and checkpoint.is_state is rounds.is_state


def test_a_source_that_cannot_skip_is_read_from_its_beginning():
    some = Sorted()
    names = [one.name for one in source.episodes_from(some, "3", 13, "train")]
    assert names == ["/success/3/13", "/success/3/14"] and some.begun == ["3"]
