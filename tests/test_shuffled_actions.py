"""data.shuffle_actions: the poses of other episodes with the same images, as a control."""
import json
import shutil
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import checkpoint
import config
import droid
import latents
import train
from episodes.identity import trained_on, trained_on_file, trained_with_shuffled_actions
from episodes.rounds import Place, rounds_of_epoch, with_others_poses
from small import SHADE, data_recipe, episode, recipe, which, write_episodes, write_trajectories


LAST = Place(0, 1)              # a round that is not the first of its epoch


def loader_of(path, *args, split="train"):
    return droid.create_dataloader(data_recipe(
        path, "--data.shuffle_actions=true", *args), split)


def seen(loader, n):
    """[(of the images, of the poses)] of the first n clips: (episode or None, first frame)."""
    found = []
    for batch in islice(loader, n):
        for i, name in enumerate(loader.names):
            images = name.split("ep_")[1][0], int(name.split(" @ ")[1].split()[0])
            if "frames" in batch:
                shade = batch["frames"][i, 0, 0].float().mean().item()
                assert shade == pytest.approx(SHADE * images[1], abs=1)
            found.append((images, which({"states": batch["states"][i:i + 1]})[0]))
    return found


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    return write_trajectories(tmp_path_factory.mktemp("npz"))


def n_clips(path, *args):
    cfg = data_recipe(path, *args)
    return len(list(droid.create_dataloader(cfg, "train", shuffle=False)))


# Whose poses

@pytest.mark.parametrize("args", [[], ["--data.offsets=any"], ["--data.shuffle_buffer=1"],
                                  ["--data.shuffle_buffer=12"]])
def test_images_stay_and_poses_are_of_other_episodes(npz, args):
    """In each epoch each pose once: a permutation."""
    n = n_clips(npz)
    plain = droid.create_dataloader(data_recipe(npz, *args), "train")
    names = [plain.names for _ in islice(plain, n)]
    loader = loader_of(npz, *args)
    pairs = seen(loader, n)
    if "--data.shuffle_buffer=1" not in args and "--data.offsets=any" not in args:
        other = loader_of(npz, *args)
        assert [other.names for _ in islice(other, n)] == names
    if "--data.offsets=any" not in args:
        assert Counter(a for a, _ in pairs) == Counter(b for _, b in pairs)
    same = [a[0] == b[0] for a, b in pairs]
    # A round of one clip and two episodes: the longer one has too few to exchange with.
    assert sum(same) <= (n / 2 if "--data.shuffle_buffer=1" in args else n / 4 * bool(args))
    assert not any(a == b for a, b in pairs)


def clips(*names):
    """Clips whose state tells which they are, of these episodes."""
    episodes = {name: SimpleNamespace(name=name, location=name, identity=f"{ord(name):x}")
                for name in names}
    from episodes.clips import Clip
    return [Clip(episodes[name], i, None, i, -i, 0) for i, name in enumerate(names)]


@pytest.mark.parametrize("names, same", [
    ("ab", 0), ("aabb", 0), ("aaabb", 1), ("abcabcabc", 0), ("aab", 1), ("aaaa", 4), ("abab", 0),
    ("abbbbc", 2), ("abcdefg", 0), ("aabbbcccc", 0), ("aaaaabc", 3)])
def test_of_another_episode_wherever_possible(names, same):
    """Of an episode with more than half of the clips, as many as there are others."""
    before = clips(*names)
    after = with_others_poses(before, LAST)
    assert [c.episode for c in after] == [c.episode for c in before]
    assert [c.start for c in after] == [c.start for c in before]
    assert sorted(c.states for c in after) == list(range(len(names)))
    assert all(c.states == -c.actions and c.states != c.start for c in after)
    assert sum(names[c.states] == names[c.start] for c in after) == same


def test_rounds_hold_two_recordings():
    """Also if one fills a round; cameras of one recording are one."""
    episodes = [clips(*text) for text in ("aaaa", "bb", "c", "cc", "ddd", "e")]
    for some in episodes:
        some[:] = [clip._replace(episode=some[0].episode) for clip in some]

    def rounds(mixed, size=2):
        found = rounds_of_epoch([0], lambda *_: iter(episodes), 0, size, True, Place(), mixed)
        return [sorted({c.episode.name for c in some}) for _, some in found]
    assert rounds(False) == [["a"], ["b"], ["c"], ["d"], ["e"]]
    assert rounds(True) == [["a", "b"], ["c", "d"], ["e"]]


def test_what_is_left_over_is_left_out_and_a_single_clip_refused(base, tmp_path):
    one = clips("a")
    assert with_others_poses(one, LAST) == []
    with pytest.raises(ValueError, match="there is only one; read more episodes"):
        with_others_poses(one, Place())
    shutil.copy(base / "data/episode_0.npz", tmp_path)
    with pytest.raises(ValueError) as error:
        train.train(recipe(base, tmp_path / "run", f"--data.path={tmp_path}", "--val_every=0",
                           "--data.val_fraction=0", "--data.clip_frames=12", "--batch_size=1",
                           "--optimizer=adamw", "--data.shuffle_actions=true"))
    assert "data.shuffle_actions" in str(error.value) and "\n" not in str(error.value)


def test_epochs_with_one_clip_left_over_go_on(base, tmp_path):
    """33 clips: a first round of 32, and one clip that has none to exchange with."""
    write_episodes(tmp_path, n=33, length=4, patches=4, move=0.05)
    loader = droid.create_dataloader(recipe(
        base, tmp_path / "run", f"--data.path={tmp_path}", "--data.val_fraction=0", "--val_every=0",
        "--batch_size=1", "--data.shuffle_actions=true"), "train")
    names = [loader.names[0] for _ in islice(loader, 32 + 33)]
    assert len(set(names[:32])) == 32 and len(set(names[32:])) == 33


# The same again

def test_the_same_each_time_and_resumed_within_a_round(npz):
    args = ["--data.shuffle_buffer=12", "--seed=3"]
    whole = [batch["actions"] for batch in islice(loader_of(npz, *args), 25)]
    for n in (1, 7, 20):
        first, second = loader_of(npz, *args), loader_of(npz, *args)
        parts = [batch["actions"] for batch in islice(first, n)]
        second.load_state_dict(first.state_dict())
        parts += [batch["actions"] for batch in islice(second, 25 - n)]
        assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    other = [batch["actions"] for batch in islice(loader_of(npz, *args[:1], "--seed=4"), 25)]
    assert not all(torch.equal(a, b) for a, b in zip(whole, other))


def test_ranks_share_one_permutation(npz):
    args = ["--data.shuffle_actions=true"]
    from episodes.clips import Clips
    n, pairs = n_clips(npz), []
    for rank in range(2):
        cfg = data_recipe(npz, *args)
        loader = Clips(droid.create_dataloader(cfg, "train").source, cfg, "train", True, rank, 2)
        pairs += seen(loader, n // 2)
    assert len(set(b for _, b in pairs)) == len(pairs) and all(a[0] != b[0] for a, b in pairs)


def test_validation_is_untouched(npz):
    args = ["--data.val_fraction=0.5"]
    plain, control = (list(droid.create_dataloader(data_recipe(
        npz, *args, f"--data.shuffle_actions={on}"), "val", shuffle=False))
                      for on in ("false", "true"))
    assert plain and all(torch.equal(a[k], b[k]) for a, b in zip(plain, control) for k in a)


def test_several_data_sets_and_stored_latents(base, tmp_path):
    """Sets whose episodes have equal names are told apart, and latents give what frames give."""
    for name, seed_moves in (("one", 0.05), ("two", 0.04)):
        (tmp_path / name).mkdir()
        write_episodes(tmp_path / name, n=2, length=12, patches=4, move=seed_moves)
    args = [f"--data.path=[{tmp_path}/one,{tmp_path}/two]", "--data.val_fraction=0",
            "--val_every=0", "--batch_size=20", "--data.shuffle_actions=true"]

    def read(*more):
        cfg = recipe(base, tmp_path / "run", *args, *more)
        return next(iter(droid.create_dataloader(cfg, "train")))
    plain, control = read("--data.shuffle_actions=false"), read()
    assert torch.equal(plain["frames"], control["frames"])
    rows = [{tuple(s.flatten().tolist()) for s in batch["states"]} for batch in (plain, control)]
    assert rows[0] == rows[1] and not any(map(torch.equal, plain["states"], control["states"]))
    stored = f"--data.latents=[{tmp_path}/l1,{tmp_path}/l2]"
    latents.encode(recipe(base, tmp_path / "run", *args, stored))
    of_latents = read(stored)
    assert torch.equal(of_latents["actions"], control["actions"]) and "h" in of_latents


def test_from_records_and_their_cache(rlds, tmp_path):
    args = [f"--data.cache={tmp_path}/cache", "--data.camera=wrist_image_left"]
    n = n_clips(rlds, *args)
    epochs = [Counter(b for _, b in seen_of_records(loader_of(rlds, *args), n)) for _ in range(2)]
    assert epochs[0] == epochs[1] and max(epochs[0].values()) == 1


def seen_of_records(loader, n):
    pairs = [(loader.names[0], which(batch)[0]) for batch in islice(loader, n)]
    assert all(f"ep_{b[0]}" not in a for a, b in pairs)
    return pairs


# That it is a control

SHORT = ["--optimizer=adamw", "--max_steps=1", "--val_every=0", "--grad_accum=1"]


def test_an_adapter_says_so_and_so_does_what_begins_from_it(base, tmp_path):
    control = train.train(recipe(base, tmp_path / "control", *SHORT, "--data.shuffle_actions=true"))
    plain = train.train(recipe(base, tmp_path / "plain", *SHORT))
    assert trained_with_shuffled_actions(control) and not trained_with_shuffled_actions(plain)
    assert trained_on(control).keys() == trained_on(plain).keys()   # of the images that it saw
    after = train.train(recipe(base, tmp_path / "after", *SHORT, f"--init={control}"))
    again = train.train(recipe(base, tmp_path / "after", *SHORT, "--resume", "--max_steps=2"))
    assert trained_with_shuffled_actions(after) and trained_with_shuffled_actions(again)
    with pytest.raises(ValueError, match="another data.shuffle_actions"):
        train.train(recipe(base, tmp_path / "plain", *SHORT, "--resume", "--max_steps=2",
                           "--data.shuffle_actions=true"))
    changed = train.train(recipe(base, tmp_path / "control", *SHORT, "--resume=changed",
                                 "--max_steps=2", "--data.shuffle_actions=false"))
    assert trained_with_shuffled_actions(changed)
    from evaluation import analysis
    if hasattr(analysis, "trained_with_shuffled_actions"):
        assert analysis.trained_with_shuffled_actions(control)


def test_one_that_begins_from_an_unknown_adapter_says_so_too(base, tmp_path):
    """Whose episodes nobody knows: they stay unknown."""
    plain = train.train(recipe(base, tmp_path / "plain", *SHORT))
    for name in ("trained_on.json", "SHA256SUMS"):
        (plain / name).unlink()
    args = [*SHORT, f"--init={plain}"]
    control = train.train(recipe(base, tmp_path / "x", *args, "--data.shuffle_actions=true"))
    assert trained_with_shuffled_actions(control) and trained_on(control) is None
    other = train.train(recipe(base, tmp_path / "y", *args))
    assert not (other / "trained_on.json").exists()
    checkpoint.read_state(control)
    assert json.loads(trained_on_file({}, False)) == {"episodes": {}}


def test_a_control_is_warned_of_and_the_same_run_without_is_not(base, tmp_path, capsys):
    """A world in which the action decides the next frame: an edge stands where the arm is, and the
    arm goes anywhere."""
    (tmp_path / "data").mkdir()
    random, columns = np.random.default_rng(0), np.linspace(-2, 2, 64)
    for i in range(24):
        states = np.zeros((12, 7))
        states[:, 0], states[:, 6] = random.uniform(-2, 2, 12), 0.5
        bright = 1 / (1 + np.exp(-5 * (columns - states[:, :1])))               # [T, 64]
        frames = np.broadcast_to(255 * bright[:, None, :, None], (12, 64, 64, 3)).astype(np.uint8)
        np.savez(tmp_path / f"data/{i}.npz", observations=frames, states=states)
    targets = "action_encoder,state_encoder,predictor_proj,attn.qkv,attn.proj,mlp.fc1,mlp.fc2"
    for control in ("false", "true"):
        train.train(recipe(
            base, tmp_path / control, f"--data.path={tmp_path}/data", "--data.check=false",
            "--data.clip_frames=3", "--rollout=0", "--max_steps=70", "--val_every=70",
            "--batch_size=12", "--grad_accum=1", "--lr=2e-3", "--min_lr=1e-4", "--warmup_steps=10",
            "--optimizer=adamw", f"--lora.targets=[{targets}]", "--lora.rank=16",
            "--lora.dropout=0", "--val_landscapes=2", "--log_every=1000",
            "--seed=1", "--activation_checkpointing=false", f"--data.shuffle_actions={control}"))
        said = [line for line in capsys.readouterr().out.splitlines()
                if line.startswith(("WARNING", "verdict"))]
        if control == "false":
            assert len(said) == 1 and "the model uses the actions" in said[0]
        else:
            assert any(line.startswith("WARNING: actions are hardly used") for line in said)
            assert "hardly uses the actions" in said[-1]


def test_is_no_key_of_one_data_set():
    with pytest.raises(ValueError, match="shuffle_actions is not of one data set"):
        config.load(["--data.path=[{path: a, shuffle_actions: true}, b]"])
    assert np.isfinite(len(episode("a")["states"]))
