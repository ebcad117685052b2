"""A tabletop world with a known answer: the whole story on a CPU, without any download.

    python toy.py                   # data, base model, adapters, landscapes: into runs/toy; two minutes

A small world model learns a robot arm from camera A. Camera B stands a quarter turn further around
the table: seen from there the base model reads actions along the wrong axes, and the minimum of its
energy lies at the turned action. LoRA on the predictor, trained on camera B, brings it back; the
same LoRA trained on the actions of other episodes does not.

Nothing here is special-cased elsewhere: the arm's clips are TFRecords in DROID's schema, the base
model is a checkpoint in the released file's layout, and both go through the same droid.py,
latents.py, train.py, energy.py and export.py as the real ones. In runs/toy:

    landscapes.png, comparison.json       what was seen
    data/r2d2_faceblur-train.tfrecord-*   exterior_image_1_left is camera A, _2_left is camera B
    base.pt                               a --model.checkpoint of size toy.SIZE
    lora/, control/                       run folders of toy.yaml, without and with shuffled actions
    energy_A/, energy_B/                  what energy.py writes, for clips of each camera; its figures come with
                                          python energy.py --from=runs/toy/energy_B/landscapes.npz
    checkpoints_for_colab.zip             the package
"""
import io
import json
import shutil
import sys
import time
from copy import deepcopy
from dataclasses import replace
from math import cos, pi
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.interpolate import RegularGridInterpolator
from scipy.spatial.transform import Rotation
from tqdm import tqdm

import compare
import config
import droid
import energy
import export
import figures
import latents
import model
import train

OUT = Path("runs/toy")
SIZE = dict(encoder_dim=64, encoder_depth=2, encoder_heads=2,
            predictor_dim=64, predictor_depth=2, predictor_heads=2, image_size=64)

# The world, in metres, radians and gripper closedness, as in DROID: x y z, roll pitch yaw, gripper.
# Roll counts from pi (the gripper points down), so that it crosses the ±pi seam as in DROID.
LOW = np.array([-0.22, -0.22, 0.04, -0.3, -0.3, -0.3, 0])
HIGH = np.array([0.22, 0.22, 0.24, 0.3, 0.3, 0.3, 1])
STEP = np.array([0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.2])        # the most that one step moves

PIXELS = 64
VIEW = 0.84                                                 # metres across the frame
ELEVATION = np.deg2rad(50)
CAMERA_A, CAMERA_B = "exterior_image_1_left", "exterior_image_2_left"
CAMERAS = {CAMERA_A: 0.0, CAMERA_B: pi / 2, "wrist_image_left": pi / 4}     # azimuth in radians
GRAY = 0.43
# The table is square with equal corners: from camera B only the arm seems to have turned.
CORNERS = np.array([[0.26, 0.26, 0], [-0.26, 0.26, 0], [-0.26, -0.26, 0], [0.26, -0.26, 0]])
BLOBS = np.array([                  # red, green, blue, opacity, standard deviation in metres
    *[[0.80, 0.80, 0.20, 0.8, 0.040]] * 4,      # the corners
    [0.10, 0.70, 0.15, 0.9, 0.035],             # an object, elsewhere in each episode
    [0.00, 0.00, 0.00, 0.9, 0.045],             # the arm's shadow: it tells height from depth
    [1.00, 0.20, 0.15, 1.0, 0.045],             # palm
    [0.75, 0.10, 0.90, 0.9, 0.030],             # two fingers
    [0.15, 0.25, 1.00, 0.9, 0.030]])


# --------------------------------------------------------------------------------------------------
# The world

def simulate(rng, n_episodes, length):
    """Random walks of the gripper inside the workspace; half of the steps translate only.

    Returns poses [n_episodes, length, 7] float64: xyz in m, extrinsic xyz Euler in rad, gripper."""
    pose = rng.uniform(LOW, HIGH, (n_episodes, 7))
    poses = [pose]
    for _ in range(length - 1):
        step = rng.uniform(-STEP, STEP, (n_episodes, 7))
        step[rng.random(n_episodes) < 0.5, 3:] = 0
        pose = np.clip(pose + step, LOW, HIGH)
        poses.append(pose)
    poses = np.stack(poses, axis=1)                                     # [n_episodes, length, 7]
    poses[..., 3] = poses[..., 3] % (2 * pi) - pi                       # roll around ±pi
    return poses


def random_scenes(rng, n):
    """Where the object lies on the table: [n, 2] metres."""
    return rng.uniform(-0.25, 0.25, (n, 2))


def render(poses, scene, azimuth):
    """Frames of the arm, from an orthographic camera that looks down at ELEVATION.

    poses [..., 7] as from `simulate`; scene [..., 2] from `random_scenes` and azimuth [...] (how
    far around the table the camera stands, radians) broadcast against them.
    Returns uint8 [..., 64, 64, 3] RGB."""
    shape = np.broadcast_shapes(poses.shape[:-1], scene.shape[:-1], np.shape(azimuth))
    poses = np.broadcast_to(poses, (*shape, 7)).reshape(-1, 7)
    scene = np.broadcast_to(scene, (*shape, 2)).reshape(-1, 2)
    azimuth = np.broadcast_to(azimuth, shape).reshape(-1, 1)

    places = np.zeros((len(poses), len(BLOBS), 3))                      # [K, M, 3]: M blobs
    places[:, :4] = CORNERS
    places[:, 4, :2] = scene
    places[:, 5, :2] = poses[:, :2]
    places[:, 6:] = poses[:, None, :3]
    closed, zero = poses[:, 6], np.zeros(len(poses))
    finger = np.stack([0.05 - 0.03 * closed, zero, zero + 0.05], axis=1)    # in the palm's axes
    turn = Rotation.from_euler("xyz", poses[:, 3:6])
    places[:, 7] += turn.apply(finger)
    places[:, 8] += turn.apply(finger * [-1, 1, 1])

    x, y, z = places.transpose(2, 0, 1)                                 # [K, M] each
    right = x * np.cos(azimuth) + y * np.sin(azimuth)
    away = y * np.cos(azimuth) - x * np.sin(azimuth)
    up = away * np.sin(ELEVATION) + (z - 0.1) * np.cos(ELEVATION)
    pixel = (np.arange(PIXELS) + 0.5) / PIXELS * VIEW - VIEW / 2        # metres
    width = 2 * BLOBS[:, 4, None] ** 2
    across = torch.from_numpy(np.exp(-(pixel - right[..., None]) ** 2 / width)).float() # [K, M, 64]
    down = torch.from_numpy(np.exp(-(pixel + up[..., None]) ** 2 / width)).float()
    colours = torch.from_numpy(BLOBS).float()

    frames = []
    for across, down in zip(across.split(32), down.split(32)):          # small enough for the cache
        frame = torch.full((len(across), 3, PIXELS, PIXELS), GRAY)
        for m, (*rgb, opacity, _) in enumerate(colours):                # painted one over the other
            cover = opacity * down[:, m, :, None] * across[:, m, None, :]
            frame = frame.lerp(torch.stack(rgb)[:, None, None], cover[:, None])
        frames.append((frame * 255).round().byte().permute(0, 2, 3, 1))
    return torch.cat(frames).numpy().reshape(*shape, PIXELS, PIXELS, 3)


def make_episodes(rng, n_episodes, length):
    """What write_rlds takes: random episodes, each seen by all three cameras."""
    poses, scenes = simulate(rng, n_episodes, length), random_scenes(rng, n_episodes)
    frames = {camera: render(poses, scenes[:, None], angle) for camera, angle in CAMERAS.items()}
    return [{"states": poses[i], "frames": {camera: view[i] for camera, view in frames.items()},
             "file_path": f"/toy/success/episode_{i:04d}/trajectory.h5"} for i in range(n_episodes)]


# --------------------------------------------------------------------------------------------------
# DROID's format

def write_rlds(folder, episodes, n_shards):
    """Writes episodes as TFRecord shards in the schema of droid 1.0.0, one record per episode.

    episodes: dicts of "states" [n, 7] (as from `simulate`), "frames" {camera: uint8 [n, H, W, 3]}
    and "file_path", a unique name with /success/ or /failure/ in it."""
    tf = droid.tensorflow()

    def feature(value):
        if isinstance(value, list):
            return tf.train.Feature(bytes_list=tf.train.BytesList(value=value))
        if value.dtype.kind == "f":
            return tf.train.Feature(float_list=tf.train.FloatList(value=value.ravel()))
        return tf.train.Feature(int64_list=tf.train.Int64List(value=value.ravel()))

    Path(folder).mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(episodes), desc=Path(folder).name, unit="episode", disable=None)
    for shard in range(n_shards):
        path = Path(folder) / f"r2d2_faceblur-train.tfrecord-{shard:05d}-of-{n_shards:05d}"
        with tf.io.TFRecordWriter(str(path)) as file:
            for episode in episodes[shard::n_shards]:
                fields = _droid_fields(tf, episode)
                features = {name: feature(value) for name, value in fields.items()}
                example = tf.train.Example(features=tf.train.Features(feature=features))
                file.write(example.SerializeToString())
                bar.update()
    bar.close()


def _droid_fields(tf, episode):
    """One episode under DROID's names: lists of bytes, float and int arrays."""
    states, path = np.asarray(episode["states"], float), episode["file_path"]
    n, success = len(states), "/success/" in path
    commands = np.concatenate([states[1:], states[-1:]])                # absolute: where to go next
    moves = commands - states
    moves[:, 3:6] = (moves[:, 3:6] + pi) % (2 * pi) - pi
    velocity = moves * 15                                               # DROID records at 15 Hz
    last = np.arange(n) == n - 1
    fields = {f"steps/observation/{camera}": [tf.io.encode_jpeg(x, quality=95).numpy() for x in v]
              for camera, v in episode["frames"].items()}
    for prefix, pose in (("observation", states), ("action_dict", commands)):
        fields[f"steps/{prefix}/cartesian_position"] = pose[:, :6]
        fields[f"steps/{prefix}/gripper_position"] = pose[:, 6]
        fields[f"steps/{prefix}/joint_position"] = pose         # this arm has no joints: 7 numbers
    return fields | {
        "steps/action_dict/cartesian_velocity": velocity[:, :6],
        "steps/action_dict/gripper_velocity": velocity[:, 6],
        "steps/action_dict/joint_velocity": velocity,
        "steps/action": commands,
        "steps/is_first": (np.arange(n) == 0).astype(int),
        "steps/is_last": last.astype(int),
        "steps/is_terminal": last.astype(int),
        "steps/reward": (last & success).astype(float),
        "steps/discount": np.ones(n),
        "steps/language_instruction": [b"move the gripper"] * n,
        "steps/language_instruction_2": [b""] * n,
        "steps/language_instruction_3": [b""] * n,
        "episode_metadata/file_path": [path.encode()],
        "episode_metadata/recording_folderpath": [f"{Path(path).parent}/recordings/MP4".encode()],
    }


# --------------------------------------------------------------------------------------------------
# The base model

def pretrain(path, seed=0, encoder_steps=250, predictor_steps=1600):
    """Trains the base model on camera A and writes it as the released file is laid out.

    First the encoder, without labels, on frames from all around the table: the mean of a frame's
    tokens must redraw the frame. Then, with the encoder frozen, the predictor on clips of camera A.
    Returns both last losses."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    encoder, predictor = model.build(SIZE)
    encoder_loss = _pretrain_encoder(encoder, rng, encoder_steps)
    predictor_loss, optimizer = _pretrain_predictor(encoder, predictor, rng, predictor_steps)
    encoder, predictor = ({f"module.{name}": tensor for name, tensor in part.state_dict().items()}
                          for part in (encoder, predictor))
    file = io.BytesIO()
    torch.save(dict(encoder=encoder, predictor=predictor, target_encoder=encoder, opt=optimizer,
                    scaler=None, epoch=1, loss=predictor_loss, batch_size=16, world_size=1,
                    lr=8e-3), file)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    config.write_file(path, file.getvalue())
    return encoder_loss, predictor_loss


def _pretrain_encoder(encoder, rng, steps, batch=64):
    n_frames = min(8000, 32 * steps)
    frames = render(simulate(rng, n_frames, 1)[:, 0], random_scenes(rng, n_frames),
                    rng.uniform(0, 2 * pi, n_frames))
    frames = torch.from_numpy(frames).permute(0, 3, 1, 2)               # [K, 3, 64, 64] uint8
    small = F.avg_pool2d(frames.float() / 255 - GRAY, 4).flatten(1)     # [K, 3 * 16 * 16]
    small /= small.std()                # or the blobs are too faint to be worth learning
    mean = torch.tensor(model.IMAGENET_MEAN).view(3, 1, 1, 1)
    std = torch.tensor(model.IMAGENET_STD).view(3, 1, 1, 1)
    decoder = nn.Linear(SIZE["encoder_dim"], small.shape[1])

    def loss():
        pick = torch.from_numpy(rng.integers(n_frames, size=batch))
        clip = (frames[pick, :, None].float() / 255 - mean) / std       # [batch, 3, 1, 64, 64]
        h = model.layer_norm(encoder(clip.expand(-1, -1, encoder.tubelet, -1, -1)))  # [batch, N, D]
        return F.mse_loss(decoder(h.mean(dim=1)), small[pick])

    return _fit("encoder", [encoder, decoder], loss, steps, lr=4e-3)[0]


def _pretrain_predictor(encoder, predictor, rng, steps, batch=16, T=3):
    n_clips = min(3000, batch * steps)
    poses = simulate(rng, n_clips, T)
    frames = torch.from_numpy(render(poses, random_scenes(rng, n_clips)[:, None], 0.0))
    world = model.WorldModel(encoder, predictor)
    frames = frames.permute(0, 4, 1, 2, 3)                              # [K, 3, T, 64, 64] uint8
    h = torch.cat([world.encode(x) for x in frames.split(250)])         # [K, T, N, D]
    states = torch.from_numpy(poses).float()                            # [K, T, 7]
    actions = torch.zeros_like(states)
    actions[:, :-1] = torch.from_numpy(droid.pose_deltas(poses))
    with torch.no_grad():               # metres are small numbers: let them count from the start
        predictor.action_encoder.weight *= 20
        predictor.state_encoder.weight *= 10

    def loss():
        pick = torch.from_numpy(rng.integers(n_clips, size=batch))
        return sum(world.losses(h[pick], actions[pick], states[pick]).values())

    return _fit("predictor", [predictor], loss, steps, lr=8e-3)


def _fit(title, modules, loss_of_batch, steps, lr, warmup=30):
    """AdamW with warm-up and cosine decay -> last loss, the optimizer's state."""
    parameters = [p for module in modules for p in module.requires_grad_(True).parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.01)
    for step in (bar := tqdm(range(steps), title, disable=None)):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / warmup) * (1 + cos(pi * step / steps)) / 2
        loss = loss_of_batch()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    for module in modules:
        module.requires_grad_(False)
    return loss.item(), optimizer.state_dict()


# --------------------------------------------------------------------------------------------------
# The story

def recipe(out, *overrides):
    """toy.yaml, with everything in `out`."""
    return config.load([str(Path(__file__).with_name("toy.yaml")), f"--out_dir={out}/lora", f"--data.path={out}/data",
                        f"--model.checkpoint={out}/base.pt", *overrides])


def prepare(out, seed, n_episodes, encoder_steps, predictor_steps):
    """Writes data/ (all cameras), shuffled/ (camera B's images under the poses of other episodes) and base.pt -> the episodes."""
    episodes = make_episodes(np.random.default_rng(1 + seed), n_episodes, length=27)
    write_rlds(out / "data", episodes, n_shards=4)
    write_rlds(out / "shuffled", [one | {"states": other["states"], "frames": {CAMERA_B: one["frames"][CAMERA_B]}}
                                  for one, other in zip(episodes, episodes[1:] + episodes[:1])], n_shards=4)
    print(f"{out}/data: {len(episodes)} episodes of {len(episodes[0]['states'])} frames, {len(CAMERAS)} cameras, 4 shards")
    losses = pretrain(out / "base.pt", seed, encoder_steps, predictor_steps)
    print(f"{out}/base.pt: learned from camera A; losses {losses[0]:.4f} (encoder), {losses[1]:.4f} (predictor)")
    return episodes


def finetune(out, cfg, data, run, stop_at=0):
    """LoRA on camera B of the records in `data`, encoded once, into `run`; stops once at a step and goes on, as users do."""
    cfg = replace(cfg, out_dir=f"{out}/{run}", data=replace(cfg.data, path=f"{out}/{data}", latents=f"{out}/latents_{data}"))
    latents.encode(deepcopy(cfg))
    if stop_at:
        train.train(replace(cfg, max_steps=stop_at, decay_steps=0))
    last = train.train(replace(cfg, resume=True))
    if last.name != f"step_{cfg.max_steps}":       # stopped by Ctrl-C: half-trained adapters tell nothing
        sys.exit(f"toy.py: stopped at {last}")
    return last


def look(out, cfg, camera, adapters, planes, planners, folder):
    """What energy.py does but for its figures, on clips of one camera -> its arrays and its comparison."""
    cfg = replace(cfg, data=replace(cfg.data, camera=camera), energy=replace(cfg.energy, planes=planes, planners=planners))
    arrays = energy.analyse(cfg, adapters, out / folder / "landscapes.npz")
    return arrays, compare.write(out / folder, arrays)


def story(out=OUT, seed=0, n_episodes=120, encoder_steps=250, predictor_steps=1600, overrides=()):
    """Everything from the data to the figure, into `out` -> the landscapes seen from both cameras and their comparisons:
    (arrays A, arrays B, comparison A, comparison B)."""
    out = Path(out)
    cfg = recipe(out, f"--seed={seed}", *overrides)
    prepare(out, seed, n_episodes, encoder_steps, predictor_steps)
    finetune(out, cfg, "data", "lora", stop_at=cfg.max_steps * 2 // 3)
    control = finetune(out, cfg, "shuffled", "control")
    shutil.rmtree(out / "shuffled_control", ignore_errors=True)
    print(export.adapter(control, out / "shuffled_control"))
    adapters = [out / f"lora/step_{step}" for step in train.saved_steps(out / "lora")]
    A, result_A = look(out, cfg, CAMERA_A, adapters, ("xy",), (), "energy_A")
    B, result_B = look(out, cfg, CAMERA_B, [*adapters, out / "shuffled_control"], cfg.energy.planes, cfg.energy.planners, "energy_B")
    config.write_file(out / "comparison.json", json.dumps({"camera_A": result_A, "camera_B": result_B}, indent=1).encode())
    draw(A, B, out / "landscapes.png")
    print(export.package(out / "lora", [0, cfg.max_steps], 8, out / export.PACKAGE))
    return A, B, result_A, result_B


def turned(moves):
    """Moves in x and y as they look from camera B to a model that knows camera A: [..., 2]."""
    return np.stack([moves[..., 1], -moves[..., 0]], axis=-1)


def turned_error(arrays, c=0):
    """cm from checkpoint c's minimum in x and y to the turned true action: [P]."""
    P, lowest = len(arrays["episodes"]), arrays["energy_xy"][c].argmin(axis=1)
    return 100 * np.linalg.norm(arrays["actions_xy"][np.arange(P), lowest, :2] - turned(arrays["true_actions"][:, :2]), axis=1)


def tell(A, B, result_A, result_B):
    """What was seen: a table, and five lines."""
    base, last, control = "baseline", [name for name in result_B["checkpoints"] if name.startswith("step_")][-1], "shuffled_control"
    rows = {what: _numbers(arrays, result, name) for what, arrays, result, name in (
        ("base model, camera A", A, result_A, base), ("base model, camera B", B, result_B, base), ("LoRA, camera B", B, result_B, last),
        ("control, camera B", B, result_B, control), ("LoRA, back on camera A", A, result_A, last))}
    titles = ("minimum", "to turned", "Spearman", "Δx–Δz", "CEM", "W*")
    print(f"\n{'cm from the true action':<24}" + "".join(f"{title:>11}" for title in titles))
    for what, cells in rows.items():
        print(f"{what:<24}" + "".join(f"{cell:>11}" for cell in cells))
    on_A, on_B, lora, shuffled, back = rows.values()
    print(f"""
Camera A, where it learned: the base model's energy is lowest {on_A[0]} cm from the true action.
Camera B, a quarter turn on: {on_B[0]} cm, but {on_B[1]} cm from the turned action (W* {on_B[5]}): it reads actions in wrong axes.
LoRA on camera B brings the minimum back: {lora[0]} cm (W* {lora[5]}), and CEM finds the action to {lora[4]} cm.
The same LoRA on the actions of other episodes does not: {shuffled[0]} cm, Spearman {shuffled[2]}.
What it cost: back on camera A the minimum lies {back[0]} cm off (W* {back[5]}).""")


def _numbers(arrays, result, name):
    """A row of `tell`'s table."""
    def mean(group, number, digits):
        cell = one["numbers"].get(group, {}).get(number)
        return "" if cell is None else "undefined" if cell["mean"] is None else f"{cell['mean']:.{digits}f}"

    one, angle = result["checkpoints"][name], result["checkpoints"][name]["calibration"]["xy"]["angle"]
    return [mean("xy", "argmin_error", 1), f"{turned_error(arrays, list(result['checkpoints']).index(name)).mean():.1f}",
            mean("xy", "spearman", 2), mean("xz", "argmin_error", 1), mean("cem 1", "error", 1), "none" if angle is None else f"{angle:.0f}°"]


def draw(A, B, path, n_pairs=3):
    """The story in one figure: rows are pairs, then the mean over all pairs around the true action; columns what the cameras
    see, then the base model on A and on B, LoRA on B, and the control."""
    names = B["checkpoints"].tolist()
    last = max(c for c, name in enumerate(names) if name.startswith("step_"))
    columns = [("base model\ncamera A", A, 0), ("base model\ncamera B", B, 0), ("LoRA\ncamera B", B, last),
               ("control\ncamera B", B, names.index("shuffled_control"))]
    above = [arrays["energy_xy"][c] - arrays["energy_xy"][c].min(axis=1, keepdims=True) for _, arrays, c in columns]
    scale = dict(cmap=figures.MAP, vmin=0, vmax=np.quantile(above, 0.95), origin="lower")
    n = round(A["actions_xy"].shape[1] ** 0.5)
    ticks = 100 * np.unique(np.round(A["actions_xy"][0, :, 0], 9))
    edge = ticks[-1] + (ticks[1] - ticks[0]) / 2
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(7, 1.18 * (n_pairs + 1) + 0.6), layout="constrained")
        panels = figure.subplots(n_pairs + 1, 6, width_ratios=[0.8, 0.8, 1, 1, 1, 1])
        for row, pair in enumerate(np.unique(A["episodes"], return_index=True)[1][:n_pairs]):      # one of an episode
            for panel, arrays, title in zip(panels[row], (A, B), ("camera A", "camera B")):
                panel.imshow(arrays["frames"][pair, 0])
                panel.set(xticks=[], yticks=[])
                panel.set_title(f"{title}\nsees" if row == 0 else "")
            for panel, (title, arrays, c), energies in zip(panels[row, 2:], columns, above):
                cube, truth = energies[pair].reshape(n, n), 100 * arrays["true_actions"][pair, :2]
                image = panel.imshow(cube.T, extent=(-edge, edge) * 2, **scale)
                lowest = ticks[list(np.unravel_index(cube.argmin(), cube.shape))]
                panel.plot(*lowest, "o", ms=5, mfc="none", mec="white", mew=1.1, clip_on=False)
                panel.plot(*turned(truth), "D", ms=3.5, mfc="none", mec="#56B4E9", mew=1)
                panel.plot(*truth, "P", ms=6, mfc="#D55E00", mec="white", mew=0.5)
                panel.set_title(title if row == 0 else "")
                panel.tick_params(labelbottom=False, labelleft=arrays is A)
            panels[row, 2].set_ylabel(f"pair {row + 1}\nΔy (cm)")
        reach = np.linspace(-0.08, 0.08, 17)
        for panel, (title, arrays, c), energies in zip(panels[-1, 2:], columns, above):
            mean = _around_the_truth(arrays, energies.reshape(-1, n, n), ticks / 100, reach)
            panel.imshow(mean.T, extent=(-8.5, 8.5) * 2, **scale)
            panel.plot(0, 0, "P", ms=6, mfc="#D55E00", mec="white", mew=0.5)
            panel.set_xlabel("Δx (cm)")
            panel.tick_params(labelleft=arrays is A)
        panels[-1, 2].set_ylabel("mean around\nthe truth (cm)")
        for panel in panels[-1, :2]:
            panel.remove()
        bar = figure.colorbar(image, ax=panels[:, -1], aspect=30, shrink=0.6, pad=0.04, extend="max")
        bar.set_label("energy above the panel's minimum")
        marks = [Line2D([], [], ls="", marker="P", mfc="#D55E00", mec="white", mew=0.5, ms=6),
                 Line2D([], [], ls="", marker="D", mfc="none", mec="#56B4E9", mew=1, ms=3.5),
                 Line2D([], [], ls="", marker="o", mfc="none", mec="0.3", mew=1.1, ms=5)]
        figure.legend(marks, ["true action", "as it looks from camera B", "minimum"], loc="outside upper center", ncols=3)
        data = io.BytesIO()
        figure.savefig(data, dpi=300, format="png")
    config.write_file(path, data.getbuffer())


def _around_the_truth(arrays, cubes, ticks, reach):
    """Mean over pairs of the landscapes [P, n, n], moved so that each true action lies at zero; what falls outside is left out."""
    offsets = np.stack(np.meshgrid(reach, reach, indexing="ij"), axis=-1)               # [R, R, 2] metres
    moved = [RegularGridInterpolator((ticks, ticks), cube, bounds_error=False)(truth[:2] + offsets)
             for cube, truth in zip(cubes, arrays["true_actions"])]
    return np.nanmean(moved, axis=0)


def main(args):
    if args:
        sys.exit(__doc__)
    torch.set_num_threads(1)        # such small networks gain little from more, and numbers repeat
    shutil.rmtree(OUT, ignore_errors=True)          # this folder is the toy's own
    started = time.monotonic()
    seen = story()
    tell(*seen)
    print(f"{OUT}: landscapes.png, comparison.json, {export.PACKAGE}, lora/, energy_A/, energy_B/; {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
