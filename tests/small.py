"""What the tests run on: a small base checkpoint, episodes, Triton without a GPU."""
import os
import resource
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

import config
import tabletop
from parity import tiny


# Episodes whose clips tell where they are from: frame t is gray, of value SHADE * t, and its x is
# t cm; y is the number of the episode, in tenths.
LENGTHS = {"a": 30, "b": 41, "c": 23, "d": 36, "e": 28}
NAMES = {name: f"/lab/{'failure' if name == 'e' else 'success'}/ep_{name}/trajectory.h5"
         for name in LENGTHS}
SHADE = 6


def write(folder):
    """base.pt in the released layout, with weights by formula, and data/episode_{0..5}.npz of 12
    frames each."""
    encoder, predictor = tiny()
    parts = {name: {f"module.{k}": v for k, v in part.state_dict().items()}
             for name, part in (("encoder", encoder), ("predictor", predictor))}
    torch.save(parts, folder / "base.pt")
    (folder / "data").mkdir()
    write_episodes(folder / "data", n=6, length=12, patches=4, move=0.05)
    return folder


def write_episodes(folder, n, length, patches, move):
    """episode_{0..n-1}.npz of `length` frames of patches x patches colours, 16 pixels each.

    Poses wander by about `move` (m, rad) a frame."""
    random = np.random.default_rng(0)
    for i in range(n):
        poses = np.cumsum(random.normal(0, move, (length, 7)), axis=0)
        poses[:, 6] = 0.5
        frames = random.integers(0, 256, (length, patches, patches, 3)).astype(np.uint8)
        frames = frames.repeat(16, 1).repeat(16, 2)
        np.savez(folder / f"episode_{i}.npz", observations=frames, states=poses)


def torchrun(*command, **env):
    """A script on two processes with gloo, which must end well -> subprocess.CompletedProcess."""
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         *map(str, command)], capture_output=True, text=True, timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env)
    assert result.returncode == 0, result.stderr
    return result


def run_python(args, folder, timeout=100):
    """Runs a fresh interpreter in `folder`, which does not see this checkout."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run([sys.executable, *args], cwd=folder, capture_output=True, text=True,
                          env=environment | {"OMP_NUM_THREADS": "1"}, timeout=timeout)


def recipe(base, out, *args):
    """The settings of a short run on what `write` has written."""
    return config.load([
        "config.yaml", f"--out_dir={out}", f"--model.checkpoint={base}/base.pt",
        "--model.size=tiny", "--device=cpu", f"--data.path={base}/data", "--data.crop=none",
        "--data.frame_step=1", "--data.clip_frames=4", "--data.clip_stride=2",
        "--data.val_fraction=0.3", "--precision=fp32", "--batch_size=2", "--grad_accum=2",
        "--max_steps=6", "--warmup_steps=2", "--lr=1e-2", "--log_every=1", "--val_every=3",
        "--val_batches=2", "--save_every=100", "--lora.rank=4", *args])


def episode(name, shape=(24, 32)):
    """One of LENGTHS as tabletop.write_rlds takes it: all cameras see the same."""
    n, number = LENGTHS[name], list(LENGTHS).index(name)
    random = np.random.default_rng(number)
    states = np.zeros((n, 7))
    states[:, 0], states[:, 1] = np.arange(n) / 100, number / 10
    states[:, 3:6] = np.cumsum(random.normal(0, 0.2, (n, 3)), 0) + [np.pi, 0, 0]
    # As recorded angles are, between -π and π: roll crosses the seam.
    states[:, 3:6] = Rotation.from_euler("xyz", states[:, 3:6]).as_euler("xyz")
    states[:, 6] = random.uniform(0, 1, n)
    gray = (SHADE * np.arange(n, dtype=np.uint8))[:, None, None, None]
    frames = np.broadcast_to(gray, (n, *shape, 3))
    return {"states": states, "frames": dict.fromkeys(tabletop.CAMERAS, frames),
            "file_path": NAMES[name]}


def write_records(folder):
    """All of LENGTHS as two TFRecord shards; skips the test without TensorFlow."""
    pytest.importorskip("tensorflow")
    tabletop.write_rlds(folder, [episode(name) for name in LENGTHS], n_shards=2)
    return folder


def write_trajectories(folder):
    """All of LENGTHS as ep_NAME.npz, two of them with a batch axis."""
    for name in LENGTHS:
        one = episode(name)
        frames, states = one["frames"]["wrist_image_left"], one["states"]
        if name in "ab":
            frames, states = frames[None], states[None]
        np.savez(folder / f"ep_{name}.npz", observations=frames, states=states)
    return folder


def data_recipe(path, *args):
    """The settings that read clips of 4 frames, 2 recorded frames apart, from a folder."""
    return config.load([
        "config.yaml", f"--data.path={path}", "--model.size=tiny", "--data.crop=none",
        "--batch_size=1", "--data.frame_step=2", "--data.clip_frames=4", "--data.clip_stride=2",
        "--data.val_fraction=0", "--val_every=0", *args])


def take(loader, n):
    """The first n clips, or all if there are fewer, as one batch."""
    batches = []
    for batch in loader:
        batches.append(batch)
        if sum(len(b["frames"]) for b in batches) >= n:
            break
    return {key: torch.cat([b[key] for b in batches])[:n] for key in batches[0]}


def which(batch):
    """[(episode, first frame)] of the clips, read off the states."""
    first = batch["states"][:, 0]
    return [("abcde"[round(10 * s[1].item())], round(100 * s[0].item())) for s in first]


def all_clips(names="abcd", span=7, stride=4):
    """What `which` gives for the clips of `data_recipe`, in order."""
    return sorted((name, start) for name in names
                  for start in range(0, LENGTHS[name] - span + 1, stride))


@contextmanager
def open_files_left(n):
    """This process may open n more files than it has open, and no more."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    gaps = [os.open(os.devnull, os.O_RDONLY) for _ in range(highest)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(gaps) + 1 + n, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in gaps:
            os.close(fd)


def flip(path, at):
    """Alters one byte of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


def interpret(code):
    """What Python code prints, in words, with Triton's kernels run by its interpreter on the CPU.

    Skips the test where that cannot be."""
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
    if "only 0-dimensional arrays" in result.stderr:
        pytest.skip("the interpreter of this Triton does not work with this NumPy")
    assert result.returncode == 0, result.stderr
    return result.stdout.split()
