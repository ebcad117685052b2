"""A small base model of the tabletop world, trained in a minute on one CPU core.

    encoder_loss, predictor_loss = pretrain("runs/toy/base.pt")

It has the architecture of V-JEPA 2-AC at SIZE, and its file has the released checkpoint's layout.
"""
import io
import math
from functools import partial
from math import cos, pi
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import files
import model
from episodes.poses import pose_deltas
from tabletop.world import CAMERA_A, CAMERAS, GRAY, random_scenes, render, simulate


SIZE = dict(encoder_dim=64, encoder_depth=2, encoder_heads=2,
            predictor_dim=64, predictor_depth=2, predictor_heads=2, image_size=64)

ENCODER_BATCH, ENCODER_LR = 64, 4e-3            # frames
PREDICTOR_BATCH, PREDICTOR_LR = 16, 1.2e-2      # clips …
CLIP_FRAMES = 3                                 # … of so many frames
WARMUP_STEPS = 30


def pretrain(path, seed=0, encoder_steps=250, predictor_steps=1000, encoder_is_there=None):
    """Trains the base model on camera A and writes it as the released file is laid out.

    First the encoder, on frames from all around the table; then, with the encoder frozen, the
    predictor on clips of camera A. encoder_is_there: is called in between, when the file holds the
    encoder, which is all that latents need. Returns both last losses."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    encoder, predictor = model.build(SIZE)
    encoder_loss = _pretrain_encoder(encoder, rng, encoder_steps)
    if encoder_is_there:
        _write(path, encoder, predictor, None, math.nan)
        encoder_is_there()
    predictor_loss, optimizer = _pretrain_predictor(encoder, predictor, rng, predictor_steps)
    _write(path, encoder, predictor, optimizer, predictor_loss)
    return encoder_loss, predictor_loss


def _write(path, encoder, predictor, optimizer, loss):
    encoder, predictor = ({f"module.{name}": tensor for name, tensor in part.state_dict().items()}
                          for part in (encoder, predictor))
    file = io.BytesIO()
    torch.save(dict(encoder=encoder, predictor=predictor, target_encoder=encoder, opt=optimizer,
                    scaler=None, epoch=1, loss=loss, batch_size=PREDICTOR_BATCH, world_size=1,
                    lr=PREDICTOR_LR), file)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    files.write_file(path, file.getvalue())


def _pretrain_encoder(encoder, rng, steps):
    """Without labels: a linear decoder must redraw a frame from the mean of its tokens."""
    n_frames = min(8000, 32 * steps)
    frames = render(simulate(rng, n_frames, 1)[:, 0], random_scenes(rng, n_frames),
                    rng.uniform(0, 2 * pi, n_frames))
    frames = torch.from_numpy(frames).permute(0, 3, 1, 2)               # [K, 3, 64, 64] uint8
    targets = F.avg_pool2d(frames.float() / 255 - GRAY, 4).flatten(1)   # [K, 3 * 16 * 16]
    # Blobs cover little of a frame: unscaled, they would be too faint to be worth learning.
    targets /= targets.std()
    decoder = nn.Linear(SIZE["encoder_dim"], targets.shape[1])
    batch_loss = partial(_encoder_loss, encoder, decoder, frames, targets, rng)
    return _fit("encoder", [encoder, decoder], batch_loss, steps, ENCODER_LR)[0]


def _encoder_loss(encoder, decoder, frames, targets, rng):
    """Of a random batch. `WorldModel.encode` would serve, but it takes no gradient."""
    pick = torch.from_numpy(rng.integers(len(frames), size=ENCODER_BATCH))
    mean, std = (torch.tensor(values).view(3, 1, 1, 1)
                 for values in (model.IMAGENET_MEAN, model.IMAGENET_STD))
    clip = (frames[pick, :, None].float() / 255 - mean) / std           # [B, 3, 1, 64, 64]
    h = encoder(clip.expand(-1, -1, encoder.tubelet, -1, -1))           # [B, N, D]
    return F.mse_loss(decoder(model.layer_norm(h).mean(dim=1)), targets[pick])


def _pretrain_predictor(encoder, predictor, rng, steps):
    """By the objective of fine-tuning -> last loss, the optimizer's state."""
    n_clips = min(3000, PREDICTOR_BATCH * steps)
    poses = simulate(rng, n_clips, CLIP_FRAMES)                         # [K, T, 7]
    scenes = random_scenes(rng, n_clips)[:, None]
    frames = torch.from_numpy(render(poses, scenes, CAMERAS[CAMERA_A]))
    frames = frames.permute(0, 4, 1, 2, 3)                              # [K, 3, T, 64, 64] uint8
    world = model.WorldModel(encoder, predictor)
    h = torch.cat([world.encode(some) for some in frames.split(250)])   # [K, T, N, D]
    states = torch.from_numpy(poses).float()                            # [K, T, 7]
    actions = torch.zeros_like(states)
    actions[:, :-1] = torch.from_numpy(pose_deltas(poses))
    # Metres are small numbers: scaled up, they count from the first steps on.
    with torch.no_grad():
        predictor.action_encoder.weight *= 20
        predictor.state_encoder.weight *= 10
    batch_loss = partial(_predictor_loss, world, h, actions, states, rng)
    return _fit("predictor", [predictor], batch_loss, steps, PREDICTOR_LR)


def _predictor_loss(world, h, actions, states, rng):
    """Of a random batch."""
    pick = torch.from_numpy(rng.integers(len(h), size=PREDICTOR_BATCH))
    return sum(world.losses(h[pick], actions[pick], states[pick]).values())


def _fit(title, modules, batch_loss, steps, lr):
    """AdamW with warm-up and cosine decay -> last loss, the optimizer's state."""
    parameters = [p for module in modules for p in module.requires_grad_(True).parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.01,
                                  fused=True)
    for step in (bar := tqdm(range(steps), title, disable=None)):
        for group in optimizer.param_groups:
            warmup = min(1, (step + 1) / WARMUP_STEPS)
            group["lr"] = lr * warmup * (1 + cos(pi * step / steps)) / 2
        loss = batch_loss()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    for module in modules:
        module.requires_grad_(False)
    return loss.item(), optimizer.state_dict()
