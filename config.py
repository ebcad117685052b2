"""The recipe: dataclasses with defaults, a YAML file over them, the command line over that.

    cfg = config.load(["config.yaml", "--max_steps=10", "--lora.rank=8", "--resume"])

Strict: an unknown key, a wrong type or a contradiction raises ValueError with one line that names the key
and the cure. `""` and `0` mean off. config.yaml says what each key means and in which unit.
"""
import difflib
import re
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path

import yaml

from files import write_file


@dataclass
class ModelConfig:
    checkpoint: str = "vjepa2-ac-vitg.pt"
    size: str | dict = "vitg"


@dataclass
class LoraConfig:
    rank: int = 16
    alpha: float = 32.0
    rslora: bool = True
    dropout: float = 0.05
    targets: tuple[str, ...] = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@dataclass
class KeysConfig:
    image: str = "steps/observation/{camera}"
    pose: str = "steps/observation/cartesian_position"
    gripper: str = "steps/observation/gripper_position"
    joint_velocity: str = "steps/action_dict/joint_velocity"
    episode: str = "episode_metadata/file_path"


@dataclass
class DataConfig:
    path: str = "gs://gresearch/robotics/droid_100/1.0.0"
    camera: str = "wrist_image_left"
    crop: str = "center"
    frame_step: int = 4
    clip_frames: int = 16
    clip_stride: int = 8
    only_success: bool = True
    drop_idle: bool = False
    val_fraction: float = 0.1
    shuffle_buffer: int = 512
    max_bad_episodes: int = 10
    latents: str = ""
    keys: KeysConfig = field(default_factory=KeysConfig)


@dataclass
class EnergyConfig:
    pairs: int = 16
    per_episode: int = 2
    min_move: float = 0.01
    steps: int = 1
    planes: tuple[str, ...] = ("xy", "xz", "yz")
    radius: float = 0.075
    grid: int = 21
    others: str = "truth"
    planners: tuple[str, ...] = ("cem", "gradient")
    horizon: int = 1
    cem_samples: int = 800
    cem_iterations: int = 10
    cem_elites: int = 10


@dataclass
class Config:
    out_dir: str = "runs/droid"
    max_steps: int = 5000
    batch_size: int = 2
    grad_accum: int = 16
    rollout: int = 2
    lr: float = 1e-4
    schedule: str = "cosine"
    warmup_steps: int = 500
    decay_steps: int = 500
    min_lr: float = 1e-6
    optimizer: str = "adamw8bit"
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    precision: str = "bf16"
    activation_checkpointing: bool = True
    compile: bool = True
    memory: float = 0.0
    device: str = ""
    seed: int = 0
    log_every: int = 10
    val_every: int = 500
    val_batches: int = 16
    save_every: int = 1000
    keep: int = 5
    milestones: tuple[int, ...] = (5000, 20000)
    gcs_dir: str = ""
    gcs_minutes: float = 30.0
    tensorboard: bool = False
    wandb: str = ""
    resume: bool = False
    debug: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    energy: EnergyConfig = field(default_factory=EnergyConfig)


# What --debug sets before the rest of the command line: every part of a run, in minutes.
DEBUG = dict(max_steps=3, batch_size=1, grad_accum=2, warmup_steps=1, decay_steps=1, log_every=1,
             val_every=3, val_batches=1, save_every=3)

CHOICES = {
    "schedule": ("cosine", "wsd"), "optimizer": ("adamw8bit", "adamw"),
    "precision": ("bf16", "fp16", "fp32"), "data.crop": ("center", "droid", "none"),
    "energy.others": ("zero", "truth"),
}
PLANES = ("xy", "xz", "yz", "xyz")
AT_LEAST = {
    "max_steps": 1, "batch_size": 1, "grad_accum": 1, "rollout": 0, "lr": 0, "min_lr": 0,
    "warmup_steps": 0, "decay_steps": 0, "weight_decay": 0, "grad_clip": 0, "log_every": 1,
    "val_every": 0, "val_batches": 1, "save_every": 1, "keep": 1, "gcs_minutes": 0, "memory": 0, "lora.rank": 1,
    "data.frame_step": 1, "data.clip_frames": 2, "data.clip_stride": 1, "data.val_fraction": 0,
    "data.shuffle_buffer": 1, "data.max_bad_episodes": 0, "lora.dropout": 0,
    "energy.pairs": 1, "energy.per_episode": 1, "energy.min_move": 0, "energy.steps": 1, "energy.radius": 1e-3,
    "energy.grid": 5, "energy.horizon": 1, "energy.cem_samples": 2, "energy.cem_iterations": 1, "energy.cem_elites": 2,
}


def load(args):
    """args: paths of YAML files and `--section.key=value`, left to right, the last word wins.

    A bare `--key` means true; dashes and underscores in keys are the same. Returns a checked Config."""
    cfg = Config()
    files = [arg for arg in args if not arg.startswith("--")]
    overrides = [arg for arg in args if arg.startswith("--")]
    for path in files:
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such config file (a key is set with --key=value)")
        _update(cfg, _parse(Path(path).read_text(), path) or {}, path)
    overrides = [_override(arg) for arg in overrides]
    if (["debug"], True) in overrides:
        _update(cfg, DEBUG, "--debug")
    for keys, value in overrides:
        for part in reversed(keys):
            value = {part: value}
        _update(cfg, value, "command line")
    if cfg.debug:
        cfg.out_dir += f"/debug-{time.strftime('%Y%m%d-%H%M%S')}"
    validate(cfg)
    return cfg


def _override(arg):
    key, equals, text = arg.removeprefix("--").partition("=")
    value = _parse(text, arg) if equals else True
    return key.replace("-", "_").split("."), "" if value is None else value


def _parse(text, where):
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def _update(cfg, values, where, section=""):
    if not isinstance(values, dict):
        raise ValueError(f"{where}: {section or 'it '}expects `key: value` lines, got {values!r}")
    known = [f.name for f in fields(cfg)]
    for key, new in values.items():
        name = f"{section}{key}"
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {section}{close[0]}?" if close else f"known: {', '.join(known)}"
            raise ValueError(f"{where}: unknown key {name}; {hint}")
        old = getattr(cfg, key)
        if is_dataclass(old):
            _update(old, new, where, f"{name}.")
        else:
            setattr(cfg, key, _typed(getattr(type(cfg), key), new, where, name))     # the default's type: old may be empty


def _typed(default, new, where, name):
    """`new` as the type of `default`; only changes of notation are forgiven."""
    wanted = type(default)
    if wanted is float and type(new) in (int, str):
        with suppress(ValueError):
            return float(new)               # YAML 1.1 reads 1e-4 as a string
    if wanted is tuple and type(new) is list:
        item = type(default[0])
        if all(type(x) is item for x in new):
            return tuple(new)
        raise ValueError(f"{where}: {name} expects a list of {item.__name__}, got {new!r}")
    if wanted is str and type(new) in (int, float):
        return str(new)                     # --out_dir=2026
    if name == "model.size" and type(new) in (str, dict):
        return new
    if type(new) is not wanted:
        wants = {"tuple": "a list, [a, b]", "bool": "true or false"}.get(wanted.__name__, wanted.__name__)
        raise ValueError(f"{where}: {name} expects {wants}, got {new!r}; write --{name}=VALUE")
    return new


def validate(cfg):
    """Raises ValueError for values out of range and for keys that contradict each other."""
    def get(name):
        value = cfg
        for part in name.split("."):
            value = getattr(value, part)
        return value

    for name, choices in CHOICES.items():
        if get(name) not in choices:
            raise ValueError(f"{name} is {get(name)!r}; choose from {', '.join(choices)}")
    for name, least in AT_LEAST.items():
        if not get(name) >= least:
            raise ValueError(f"{name} is {get(name)}; it must be at least {least}")
    if not re.fullmatch(r"|cpu|cuda(:\d+)?", cfg.device):
        raise ValueError(f"device is {cfg.device!r}; write --device=cpu, --device=cuda or --device=cuda:1")
    if cfg.rollout >= cfg.data.clip_frames:
        raise ValueError(f"rollout {cfg.rollout} needs more than {cfg.rollout} frames and data.clip_frames is "
                         f"{cfg.data.clip_frames}; set --rollout={cfg.data.clip_frames - 1} or less")
    if cfg.lora.dropout >= 1 or cfg.data.val_fraction > 1:
        raise ValueError("lora.dropout must be below 1, and data.val_fraction 1 (all episodes are for validation) or less")
    if not cfg.lora.targets:
        raise ValueError("lora.targets is empty: nothing would be trained; name layers such as attn.qkv")
    if cfg.val_every and not cfg.data.val_fraction:
        raise ValueError("val_every needs validation episodes and data.val_fraction is 0; set one of the two")
    if cfg.lr < cfg.min_lr:
        raise ValueError(f"min_lr {cfg.min_lr} is above lr {cfg.lr}")
    if cfg.schedule == "wsd" and cfg.decay_steps > cfg.max_steps:
        raise ValueError(f"decay_steps {cfg.decay_steps} is above max_steps {cfg.max_steps}")
    for plane in cfg.energy.planes:
        if plane not in PLANES:
            raise ValueError(f"energy.planes has {plane!r}; choose from {', '.join(PLANES)}")
    for planner in cfg.energy.planners:
        if planner not in ("cem", "gradient"):
            raise ValueError(f"energy.planners has {planner!r}; choose from cem, gradient")
    if cfg.energy.cem_elites > cfg.energy.cem_samples:
        raise ValueError(f"energy.cem_elites {cfg.energy.cem_elites} is above cem_samples {cfg.energy.cem_samples}")
    if cfg.out_dir.startswith("gs://"):
        raise ValueError("out_dir is a local folder; give the bucket as --gcs_dir=gs://…")
    if cfg.gcs_dir and not cfg.gcs_dir.startswith("gs://"):
        raise ValueError(f"gcs_dir {cfg.gcs_dir!r} must start with gs://")


def save(cfg, path):
    """Writes the resolved recipe as YAML; `load([path])` gives it back."""
    write_file(path, dump(cfg).encode())


def dump(cfg):
    """The resolved recipe as YAML text."""
    return yaml.safe_dump(_plain(asdict(cfg)), sort_keys=False)


def _plain(value):
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value
