"""The toy's world: a rendered tabletop arm, its episodes in DROID's record format, and a small base model of it.

    episodes = tabletop.make_episodes(np.random.default_rng(0), n_episodes=120, length=27)
    tabletop.write_rlds("runs/toy/data", episodes, n_shards=4)      # exterior_image_1_left is camera A, _2_left camera B
    tabletop.pretrain("runs/toy/base.pt")                           # learns from camera A; the released file's layout
"""
import io
from math import cos, pi
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.spatial.transform import Rotation
from tqdm import tqdm

import config
import files
import droid
import model

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
    files.write_file(path, file.getvalue())
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
