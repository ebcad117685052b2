"""The world: a gripper over a table, its random motion, and what three cameras see of it.

    poses = simulate(rng, n_episodes=2, length=27)                      # [2, 27, 7]
    scenes = random_scenes(rng, 2)                                      # [2, 2]
    frames = render(poses, scenes[:, None], CAMERAS[CAMERA_A])          # [2, 27, 64, 64, 3] uint8

Everything is drawn as soft blobs, seen by an orthographic camera that looks down at ELEVATION.
"""
from math import pi

import numpy as np
import torch
from scipy.spatial.transform import Rotation


# Poses in metres, radians and gripper closedness, as in DROID: x y z, roll pitch yaw, gripper.
# Roll counts from pi (the gripper points down), so that it crosses the seam at ±pi as in DROID.
LOW = np.array([-0.22, -0.22, 0.04, -0.3, -0.3, -0.3, 0])
HIGH = np.array([0.22, 0.22, 0.24, 0.3, 0.3, 0.3, 1])
STEP = np.array([0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.2])        # the most that one step moves

PIXELS = 64                                                 # width and height of a frame
VIEW = 0.84                                                 # metres across the frame
ELEVATION = np.deg2rad(50)
CAMERA_A, CAMERA_B = "exterior_image_1_left", "exterior_image_2_left"
# How far around the table each camera stands, in radians: B a quarter turn from A.
CAMERAS = {CAMERA_A: 0.0, CAMERA_B: pi / 2, "wrist_image_left": pi / 4}
GRAY = 0.43                                                 # the table top, 0..1
# The table is square with equal corners, so that from camera B only the arm seems to have turned.
CORNERS = np.array([[0.26, 0.26, 0], [-0.26, 0.26, 0], [-0.26, -0.26, 0], [0.26, -0.26, 0]])
BLOBS = np.array([                  # red, green, blue, opacity, standard deviation in metres
    *[[0.80, 0.80, 0.20, 0.8, 0.040]] * 4,      # the corners
    [0.10, 0.70, 0.15, 0.9, 0.035],             # an object, elsewhere in each episode
    [0.00, 0.00, 0.00, 0.9, 0.045],             # the arm's shadow: it tells height from depth
    [1.00, 0.20, 0.15, 1.0, 0.045],             # palm
    [0.75, 0.10, 0.90, 0.9, 0.030],             # two fingers
    [0.15, 0.25, 1.00, 0.9, 0.030]])


def simulate(rng, n_episodes, length):
    """Random walks of the gripper inside the workspace.

    Returns poses [n_episodes, length, 7] float64: xyz in m, extrinsic xyz Euler in rad, gripper."""
    pose = rng.uniform(LOW, HIGH, (n_episodes, 7))
    poses = [pose]
    for _ in range(length - 1):
        step = rng.uniform(-STEP, STEP, (n_episodes, 7))
        # Half of the steps translate only, as an arm does most of the time.
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
    """Frames of the arm from a camera.

    poses [..., 7] as from `simulate`; scene [..., 2] from `random_scenes` and azimuth [...] (how
    far around the table the camera stands, radians) broadcast against them.
    Returns uint8 [..., 64, 64, 3] RGB."""
    shape = np.broadcast_shapes(poses.shape[:-1], scene.shape[:-1], np.shape(azimuth))
    poses = np.broadcast_to(poses, (*shape, 7)).reshape(-1, 7)
    scene = np.broadcast_to(scene, (*shape, 2)).reshape(-1, 2)
    azimuth = np.broadcast_to(azimuth, shape).reshape(-1, 1)

    # The camera's axes: right and up span the image; z - 0.1 puts its centre into the workspace.
    x, y, z = _blob_positions(poses, scene).transpose(2, 0, 1)          # [K, M] each
    right = x * np.cos(azimuth) + y * np.sin(azimuth)
    away = y * np.cos(azimuth) - x * np.sin(azimuth)
    up = away * np.sin(ELEVATION) + (z - 0.1) * np.cos(ELEVATION)

    # A Gaussian blob is the product of one profile across the image and one down it.
    pixel = (np.arange(PIXELS) + 0.5) / PIXELS * VIEW - VIEW / 2        # metres
    width = 2 * BLOBS[:, 4, None] ** 2
    across = np.exp(-(pixel - right[..., None]) ** 2 / width)           # [K, M, 64]
    down = np.exp(-(pixel + up[..., None]) ** 2 / width)                # [K, M, 64]
    return _paint(torch.from_numpy(across).float(),
                  torch.from_numpy(down).float()).reshape(*shape, PIXELS, PIXELS, 3)


def _blob_positions(poses, scene):
    """poses [K, 7], scene [K, 2] -> the centres of the M blobs in metres, [K, M, 3]."""
    positions = np.zeros((len(poses), len(BLOBS), 3))
    positions[:, :4] = CORNERS
    positions[:, 4, :2] = scene
    positions[:, 5, :2] = poses[:, :2]
    positions[:, 6:] = poses[:, None, :3]
    closed, zero = poses[:, 6], np.zeros(len(poses))
    finger = np.stack([0.05 - 0.03 * closed, zero, zero + 0.05], axis=1)    # in the palm's axes
    turn = Rotation.from_euler("xyz", poses[:, 3:6])
    positions[:, 7] += turn.apply(finger)
    positions[:, 8] += turn.apply(finger * [-1, 1, 1])
    return positions


def _paint(across, down):
    """Profiles of the blobs, [K, M, 64] float32 each -> frames [K, 64, 64, 3] uint8."""
    colours = torch.from_numpy(BLOBS).float()
    frames = []
    # 32 frames at a time stay in the processor's cache.
    for some_across, some_down in zip(across.split(32), down.split(32)):
        frame = torch.full((len(some_across), 3, PIXELS, PIXELS), GRAY)
        for m, (*rgb, opacity, _) in enumerate(colours):                # one over the other
            cover = opacity * some_down[:, m, :, None] * some_across[:, m, None, :]
            frame = frame.lerp(torch.stack(rgb)[:, None, None], cover[:, None])
        frames.append((frame * 255).round().byte().permute(0, 2, 3, 1))
    return torch.cat(frames).numpy()


def make_episodes(rng, n_episodes, length):
    """Random episodes, each seen by all three cameras: a list of dicts as `write_rlds` takes."""
    poses, scenes = simulate(rng, n_episodes, length), random_scenes(rng, n_episodes)
    frames = {camera: render(poses, scenes[:, None], azimuth)
              for camera, azimuth in CAMERAS.items()}
    return [{"states": poses[i],
             "frames": {camera: view[i] for camera, view in frames.items()},
             "file_path": f"/toy/success/episode_{i:04d}/trajectory.h5"}
            for i in range(n_episodes)]
