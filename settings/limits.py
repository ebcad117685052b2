"""The values that each key may have, and which keys contradict each other.

Works on {dotted name: value}, as `config.flat` gives it; config.py says what the keys are."""
import re


CHOICES = {
    "schedule": ("cosine", "wsd"),
    "optimizer": ("adamw8bit", "adamw"),
    "precision": ("bf16", "fp16", "fp32"),
    "data.crop": ("center", "droid", "none"),
    "data.offsets": ("grid", "any"),
    "data.rotation": ("euler_xyz", "degrees", "quat_xyzw", "quat_wxyz", "rotvec", "rot6d",
                      "rot6d_rows"),
    "best": ("", "val_l1", "val_loss", "percentile", "spearman", "shuffle_ratio"),
    "energy.others": ("zero", "truth"), "energy.objective": ("l1", "l2"),
    "energy.protocol": ("", "jepa_wms"),
    "energy.planes": ("xy", "xz", "yz", "xyz"),
    "energy.planners": ("cem", "cem_jepa_wms", "mppi", "gradient"),
}
AT_LEAST = {
    "max_steps": 1, "batch_size": 1, "grad_accum": 1, "rollout": 0,
    "lr": 0, "min_lr": 0, "warmup_steps": 0, "decay_steps": 0, "weight_decay": 0, "grad_clip": 0,
    "memory": 0, "log_every": 1, "val_every": 0, "val_batches": 1, "save_every": 1, "keep": 1,
    "gcs_minutes": 0, "dist_timeout_minutes": 0.05, "stop_at": 0, "seed": 0,
    "lora.rank": 1, "lora.alpha": 1e-9, "lora.dropout": 0,
    "data.frame_step": 1, "data.clip_frames": 2, "data.clip_stride": 1, "data.val_fraction": 0,
    "data.retry_minutes": 0, "data.shuffle_buffer": 1, "data.read_ahead_mb": 0, "data.cache_gb": 0,
    "data.max_bad_share": 0,
    "data.step_seconds": 0, "data.fps": 0, "data.position_scale": 1e-9,
    "energy.pairs": 1, "energy.per_episode": 1, "energy.min_move": 0, "energy.steps": 1,
    "energy.radius": 1e-3, "energy.grid": 5, "energy.horizon": 1,
    "energy.cem_samples": 2, "energy.cem_iterations": 1, "energy.cem_elites": 2,
    "energy.context": 1, "loss.teacher_forcing": 0, "loss.rollout": 0, "val_landscapes": 0,
    "decoder.width": 64, "decoder.depth": 1, "decoder.max_steps": 1, "decoder.batch_size": 1,
    "decoder.grad_accum": 1, "decoder.lr": 0,
}
# Of longer times timers overflow.
AT_MOST = {"lora.dropout": 0.99, "data.val_fraction": 1, "data.max_bad_share": 1,
           "decoder.width": 8192, "decoder.depth": 256,
           "gcs_minutes": 1e6, "dist_timeout_minutes": 1e6, "data.retry_minutes": 1e6}


def check_ranges(values):
    """Raises ValueError for a value that is out of range, or none of those to choose from."""
    for name, choices in CHOICES.items():
        value = values[name]
        for one in value if isinstance(value, tuple) else [value]:
            if one not in choices:
                known = ", ".join(choice or '""' for choice in choices)
                raise ValueError(f"{name} is {one!r}; choose from {known}")
    for name, least in AT_LEAST.items():
        # beyond these no number can be computed with: whole ones up to 2^53, others in float32
        most = AT_MOST.get(name, 2 ** 53 if type(values[name]) is int else 3e38)
        # not (a >= b) rather than a < b, so that nan is refused too
        if not least <= values[name] <= most:
            limit = f"at most {most}" if values[name] > most else f"at least {least}"
            raise ValueError(f"{name} is {values[name]}; it must be {limit}")
    if not values["data.gripper.scale"]:
        raise ValueError("data.gripper.scale is 0; give what the gripper's numbers are to be "
                         "multiplied by to become 0..1")


def check_together(values):
    """Raises ValueError for keys that contradict each other."""
    v = values
    if not re.fullmatch(r"|cpu|cuda(:\d\d?)?", v["device"]):
        raise ValueError(f"device is {v['device']!r}; "
                         "write --device=cpu, --device=cuda or --device=cuda:1")
    n_paths = len(v["data.path"]) if isinstance(v["data.path"], tuple) else 1
    weights = v["data.weights"]
    if weights and (len(weights) != n_paths or min(weights) < 0 or not sum(weights)):
        raise ValueError(f"data.weights is {list(weights)}; give a share for each of the {n_paths} "
                         "data sets in data.path, 0 or more")
    # A rollout begins at the first frame of a clip, and each frame after it is predicted.
    frames = v["data.clip_frames"]
    if v["rollout"] >= frames:
        raise ValueError(f"rollout {v['rollout']} needs more than {v['rollout']} frames and "
                         f"data.clip_frames is {frames}; set --rollout={frames - 1} or less")
    if not v["loss.teacher_forcing"] and not (v["loss.rollout"] and v["rollout"]):
        raise ValueError("loss.teacher_forcing is 0 and so is the rollout loss (loss.rollout or "
                         "rollout): nothing would be learned; give one of them a weight")
    for name in ("lora.targets", "energy.planes"):
        if not v[name] or "" in v[name]:
            raise ValueError(f"{name} is empty; give one at least, as config.yaml does")
    if v["val_every"] and not (v["data.val_fraction"] or v["data.val_episodes"]):
        raise ValueError("val_every needs validation episodes and data.val_fraction is 0; "
                         "set one of the two")
    if v["best"] in ("percentile", "spearman") and v["val_every"] and not v["val_landscapes"]:
        raise ValueError(f"best: {v['best']} needs landscapes in validation; set "
                         "--val_landscapes=4 or more")
    if v["lr"] < v["min_lr"]:
        raise ValueError(f"min_lr {v['min_lr']} is above lr {v['lr']}; lower it or raise lr")
    if v["schedule"] == "wsd" and v["decay_steps"] > v["max_steps"]:
        raise ValueError(f"decay_steps {v['decay_steps']} is above max_steps {v['max_steps']}; "
                         "lower it or raise max_steps")
    if v["energy.cem_elites"] > v["energy.cem_samples"]:
        raise ValueError(f"energy.cem_elites {v['energy.cem_elites']} is above energy.cem_samples "
                         f"{v['energy.cem_samples']}; lower it or raise cem_samples")
    if not re.fullmatch(r"[\w.+=,-]{0,100}", v["energy.name"]) or v["energy.name"] in (".", ".."):
        raise ValueError(f"energy.name is {v['energy.name']!r}; it names a folder: letters, "
                         "digits and . _ + = , -")
    if v["decoder.width"] % 64:
        raise ValueError(f"decoder.width is {v['decoder.width']}; give a multiple of 64, which is "
                         "the width of a head")
    if v["out_dir"].startswith("gs://"):
        raise ValueError("out_dir is a local folder; give the bucket as --gcs_dir=gs://…")
    if v["gcs_dir"] and not v["gcs_dir"].startswith("gs://"):
        raise ValueError(f"gcs_dir {v['gcs_dir']!r} must start with gs://")
