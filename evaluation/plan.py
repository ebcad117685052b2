"""What to do next: the action of lowest energy, from an image, a pose and a goal image.

    python energy.py plan runs/droid --image=now.png --pose="[0.4,0,0.3,3.14,0,0,0]" --goal=goal.png

    planner = Planner(cfg, "runs/droid/step_5000")
    goal = planner.encode(goal_image)                                   # [H, W, 3] uint8 RGB
    plan = planner.plan(planner.encode(image), pose, goal)              # plan.actions [H, 7]

A robot takes plan.actions[0], and plans again from what it sees then (docs/planning.md).
"""
import warnings
from dataclasses import replace

import numpy as np
import torch

import config
import lora
import model
from analysis.measures import FLAT_SHARE, is_flat
from episodes import plausible
from episodes.conversion import to_poses
from episodes.crops import MAX_PIXELS, check_size, crop_frames
from episodes.poses import apply_action
from episodes.source import with_rate
from evaluation.analysis import BASELINE, choose_adapter, run_planner
from evaluation.energies import L1, L2, chunk_size, grid, sequence_energies
from evaluation.protocol import plan_horizons, with_protocol


# Of a data set: what decides how an image, a pose and the length of a step are read.
AS_RECORDED = ("crop", "rotation", "position_scale", "pose_slice", "gripper", "frame_step",
               "step_seconds", "fps")
SMALLEST = 32           # pixels of a side: scaled up from fewer, an image shows next to nothing
TOO_LARGE = f"more than {MAX_PIXELS:,}; scale the image down"
POINTS = 5              # an axis, of the moves that show how deep the landscape is


class Planner:
    """The networks under one adapter. cfg: a Config; its energy section says how to plan.

    Raises ValueError for an adapter that does not fit."""

    def __init__(self, cfg, adapter=BASELINE):
        cfg = with_protocol(cfg)
        if not cfg.energy.planners:
            raise ValueError("energy.planners is empty; plan needs one, --energy.planners=[cem]")
        if cfg.energy.context > 1:
            raise ValueError(f"energy.context is {cfg.energy.context}; plan knows one frame: "
                             "--energy.context=1")
        self.device = model.resolve_device(cfg.device)
        precision = model.resolve_precision(cfg.precision, self.device)
        self.cfg, self.data = cfg, data_of(cfg)
        self.size = model.resolve_size(cfg.model.size)["image_size"]
        torch.manual_seed(cfg.seed)
        encoder, predictor = model.load(cfg.model.checkpoint, cfg.model.size,
                                        model.DTYPES[precision], self.device)
        self.world = model.WorldModel(encoder, predictor).eval()
        self.chunk = chunk_size(cfg, self.device)
        if model.can_accelerate(cfg, self.device):
            import fast
            fast.accelerate(self.world, cfg)
        self.choose(adapter)

    def choose(self, adapter):
        """Plans with another adapter folder from now on, or with "baseline", the model without."""
        choose_adapter(self.world.predictor, adapter, self.cfg.lora)
        # An adapter of zeros changes no bit, and costs a third of the time.
        if adapter == BASELINE:
            lora.remove(self.world.predictor)
        self.adapter = adapter

    def encode(self, image):
        """An image of SMALLEST pixels a side or more, [H, W, 3] uint8 RGB, as recorded: it is
        cropped as data.crop says. Returns its latents [N, D]. Raises ValueError."""
        image = np.asarray(image)
        check_image(image, "an image", self.data.crop, self.size)
        frame = crop_frames(image[None], self.data.crop, self.size)             # [1, S, S, 3]
        frame = frame.permute(3, 0, 1, 2)[None].to(self.device)                 # [1, 3, 1, S, S]
        return self.world.encode(frame)[0, 0]

    def energies(self, h, pose, goal, actions):
        """Of sequences of actions [K, H, 7] from latents h [N, D] and a pose [7] to latents `goal`:
        [K], by energy.objective."""
        column = {"l1": L1, "l2": L2}[self.cfg.energy.objective]
        actions = torch.as_tensor(actions, dtype=torch.float32)
        return sequence_energies(self.world, h[None], np.asarray(pose)[None], goal, actions,
                                 self.chunk)[:, column]

    def plan(self, h, pose, goal):
        """The Plan (analysis/planners.py) of energy.horizon actions by the first of
        energy.planners. h, goal: latents [N, D]; pose: [7], metres and radians. Raises
        ValueError."""
        e, horizon = self.cfg.energy, plan_horizons(self.cfg)[-1]
        return run_planner(e.planners[0], lambda actions: self.energies(h, pose, goal, actions),
                           horizon, e, self.cfg.seed, self.device)

    def landscape(self, h, pose, goal):
        """Energies of POINTS³ single moves along x y z up to energy.radius, in NumPy."""
        moves = grid("xyz", self.cfg.energy.radius, POINTS)[:, None]            # [K, 1, 7]
        with torch.no_grad():
            return self.energies(h, pose, goal, moves).cpu().numpy()


def data_of(cfg):
    """The DataConfig by which images and poses are read. Raises ValueError if that is not one."""
    sets = config.data_sets(cfg.data)
    for one in sets:
        other = next((key for key in AS_RECORDED if getattr(one, key) != getattr(sets[0], key)), "")
        if other:
            raise ValueError(f"data.path names data sets with different {other}; name the one of "
                             "the images and the pose: --data.path=…")
    data = replace(sets[0], path=cfg.data.path)
    return with_rate(data, 0, "plan") if data.step_seconds else data


def check_image(image, name, crop, size):
    """Raises ValueError unless an array is an image from which can be planned, and which can be
    cropped by data.crop to a square of `size`."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"{name} is {image.dtype} {list(image.shape)}, expected uint8 [H, W, 3], "
                         "RGB")
    height, width, _ = image.shape
    if min(height, width) < SMALLEST:
        raise ValueError(f"{name} has {height} × {width} pixels, too few to plan from; give it as "
                         f"the camera takes it, with {SMALLEST} pixels a side or more")
    try:
        check_size(height, width, crop, size)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def read_image(path):
    """An image file as [H, W, 3] uint8 RGB. Raises ValueError."""
    # Pillow comes with Matplotlib.
    from PIL import Image, ImageOps
    try:
        # What Pillow warns of does no harm here, and is not for who plans.
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            # By the header: a small file can be gigabytes of pixels.
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.height} × {image.width} pixels are {TOO_LARGE}")
            if image.mode not in ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr"):
                raise ValueError(f"of mode {image.mode}; store it with 8 bits a colour")
            # As a viewer shows it: phones note how they were held.
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such image") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{path}: cannot be read as an image (its pixels are {TOO_LARGE})"
                         ) from None
    # What Pillow raises for damaged files is of many kinds.
    except Exception as error:
        raise ValueError(f"{path}: cannot be read as an image ({error})") from None


def read_pose(numbers, data):
    """A pose as the data's are recorded, converted by data.rotation and so on: [7] float64.

    numbers: a list. Raises ValueError, also for what is likely another unit."""
    try:
        pose = to_poses(np.array([numbers], np.float64), None, data)[0]
    except (TypeError, ValueError) as error:
        raise ValueError(f"--pose: {error}") from None
    if not np.isfinite(pose).all():
        raise ValueError("--pose: a number is not finite")
    faults = plausible.pose_faults(pose, data) if data.check else []
    if faults:
        raise ValueError(f"--pose: {'; '.join(faults)}; --data.check=false takes it as it is")
    return pose


def plan(cfg, image, pose, goal, adapter=BASELINE):
    """Words on what to do: image, goal: files; pose: a list of numbers; adapter: a folder. Raises
    ValueError and OSError."""
    # Before the networks, which take minutes to load.
    data, size = data_of(cfg), model.resolve_size(cfg.model.size)["image_size"]
    pose, images = read_pose(pose, data), [read_image(image), read_image(goal)]
    for path, one in zip((image, goal), images):
        check_image(one, path, data.crop, size)
    # Whoever compares two cameras plans nonsense, which no number below would show.
    (h, w), (goal_h, goal_w) = (one.shape[:2] for one in images)
    if abs(w / h - goal_w / goal_h) > 0.02 * w / h:
        raise ValueError(f"{image} has {h} × {w} pixels and {goal} {goal_h} × {goal_w}: other "
                         "shapes are other cameras, or one of them was cropped")
    planner = Planner(cfg, adapter)
    now, goal = map(planner.encode, images)
    found = planner.plan(now, pose, goal)
    still = planner.energies(now, pose, goal, np.zeros((1, len(found.actions), 7))).item()
    energies = planner.landscape(now, pose, goal)
    return "\n".join(_words(planner, pose, found, still, energies))


def _words(planner, pose, found, still, energies):
    """still: the energy of no move, for as many steps as the plan has."""
    e = planner.cfg.energy
    data = planner.data
    seconds = f" ({data.frame_step / data.fps:.2g} s)" if data.fps else ""
    yield (f"{e.planners[0]} under {planner.adapter}: a step is {data.frame_step} recorded frame"
           f"{'s' * (data.frame_step > 1)}{seconds}, moves of up to {100 * e.radius:g} cm an "
           f"axis; poses in m and rad; {found.seconds:.1f} s")
    for step, action in enumerate(found.actions, start=1):
        pose = apply_action(pose, action)
        x, y, z = 100 * action[:3]
        turn = "  turn {:+.1f} {:+.1f} {:+.1f}°".format(*np.rad2deg(action[3:6]))
        yield (f"  step {step}: x {x:+.1f} y {y:+.1f} z {z:+.1f} cm{turn * bool(action[3:6].any())}"
               f"  gripper {action[6]:+.2f}  ->  "
               f"[{', '.join(f'{value:.4g}' for value in pose.round(4) + 0.0)}]")
    low, high, middle = energies.min(), energies.max(), energies.mean()
    yield (f"energy {found.energy:.4f}; no move {still:.4f}; {len(energies)} single moves "
           f"{low:.4f} to {high:.4f}, a range of {(high - low) / middle:.1%} of their mean")
    if is_flat(energies):
        yield (f"WARNING: the landscape is flat (below {FLAT_SHARE:.0%}): whatever the model is "
               "asked, it sees no difference, and the plan means nothing")
    if found.energy >= still:
        yield "WARNING: the plan is no better than not to move"
