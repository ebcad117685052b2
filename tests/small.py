"""What the tests run on: a small base checkpoint, .npz trajectories, Triton without a GPU."""
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from parity import tiny

import config


def write(folder):
    """base.pt in the released layout, with weights by formula, and data/episode_{0..5}.npz of 12 frames each."""
    encoder, predictor = tiny()
    parts = {name: {f"module.{k}": v for k, v in part.state_dict().items()}
             for name, part in (("encoder", encoder), ("predictor", predictor))}
    torch.save(parts, folder / "base.pt")
    (folder / "data").mkdir()
    write_episodes(folder / "data", n=6, length=12, patches=4, move=0.05)
    return folder


def write_episodes(folder, n, length, patches, move):
    """episode_{0..n-1}.npz of `length` frames of patches x patches colours, 16 pixels each; poses wander by about `move` (m) a frame."""
    random = np.random.default_rng(0)
    for i in range(n):
        poses = np.cumsum(random.normal(0, move, (length, 7)), axis=0)
        poses[:, 6] = 0.5
        frames = random.integers(0, 256, (length, patches, patches, 3)).repeat(16, 1).repeat(16, 2).astype(np.uint8)
        np.savez(folder / f"episode_{i}.npz", observations=frames, states=poses)


def recipe(base, out, *args):
    return config.load([
        "config.yaml", f"--out_dir={out}", f"--model.checkpoint={base}/base.pt", "--model.size=tiny", "--device=cpu",
        f"--data.path={base}/data", "--data.crop=none", "--data.frame_step=1", "--data.clip_frames=4",
        "--data.clip_stride=2", "--data.val_fraction=0.3", "--precision=fp32", "--batch_size=2", "--grad_accum=2",
        "--max_steps=6", "--warmup_steps=2", "--lr=1e-2", "--log_every=1", "--val_every=3", "--val_batches=2",
        "--save_every=100", "--lora.rank=4", *args])


def interpret(code):
    """What Python code prints, in words, with Triton's kernels run by its interpreter on the CPU; skips the test where that cannot be."""
    pytest.importorskip("triton")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300,
                            env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
    if "only 0-dimensional arrays" in result.stderr:
        pytest.skip("the interpreter of this Triton does not work with this NumPy")
    assert result.returncode == 0, result.stderr
    return result.stdout.split()
