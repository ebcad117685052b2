"""The configuration: dataclasses with defaults, overridden by YAML files and the command line.

    cfg = config.load(["config.yaml", "--max_steps=10", "--lora.rank=8", "--resume"])

Parsing is strict: an unknown key, a wrong type or a contradiction raises ValueError with one line
that names the key and the cure. `""` and `0` mean off. config.yaml says what each key means, and
its unit.
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
    retry_minutes: float = 10.0
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
    dist_timeout_minutes: float = 5.0
    tensorboard: bool = False
    wandb: str = ""
    resume: bool | str = False
    init: str = ""
    stop_at: int = 0
    debug: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    energy: EnergyConfig = field(default_factory=EnergyConfig)


# What --debug sets: three small steps that still validate and save, so that every part of a run is
# executed within minutes. The rest of the command line overrides it.
DEBUG = dict(max_steps=3, batch_size=1, grad_accum=2, warmup_steps=1, decay_steps=1, log_every=1,
             val_every=3, val_batches=1, save_every=3)

CHOICES = {
    "schedule": ("cosine", "wsd"),
    "optimizer": ("adamw8bit", "adamw"),
    "precision": ("bf16", "fp16", "fp32"),
    "data.crop": ("center", "droid", "none"),
    "energy.others": ("zero", "truth"),
}
PLANES = ("xy", "xz", "yz", "xyz")
PLANNERS = ("cem", "gradient")
AT_LEAST = {
    "max_steps": 1, "batch_size": 1, "grad_accum": 1, "rollout": 0,
    "lr": 0, "min_lr": 0, "warmup_steps": 0, "decay_steps": 0, "weight_decay": 0, "grad_clip": 0,
    "memory": 0, "log_every": 1, "val_every": 0, "val_batches": 1, "save_every": 1, "keep": 1,
    "gcs_minutes": 0, "dist_timeout_minutes": 0.05, "stop_at": 0, "seed": 0,
    "lora.rank": 1, "lora.alpha": 1e-9, "lora.dropout": 0,
    "data.frame_step": 1, "data.clip_frames": 2, "data.clip_stride": 1, "data.val_fraction": 0,
    "data.retry_minutes": 0, "data.shuffle_buffer": 1, "data.max_bad_episodes": 0,
    "energy.pairs": 1, "energy.per_episode": 1, "energy.min_move": 0, "energy.steps": 1,
    "energy.radius": 1e-3, "energy.grid": 5, "energy.horizon": 1,
    "energy.cem_samples": 2, "energy.cem_iterations": 1, "energy.cem_elites": 2,
}


def load(args):
    """Returns the checked Config of `args`, a list of command-line arguments.

    args: paths of YAML files and `--section.key=value`. Files are read first, then the keys; later
    ones override earlier ones. A bare `--key` means true; dashes and underscores in keys are the
    same. Raises ValueError as `validate`, and for unknown keys, wrong types and bad YAML."""
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
        # a.b=1 becomes {"a": {"b": 1}}, so that files and the command line take the same checks
        for key in reversed(keys):
            value = {key: value}
        _update(cfg, value, "command line")
    if cfg.debug:
        cfg.out_dir += f"/debug-{time.strftime('%Y%m%d-%H%M%S')}"
    validate(cfg)
    return cfg


def _override(arg):
    """--section.key=value -> (["section", "key"], value)."""
    key, equals, text = arg.removeprefix("--").partition("=")
    value = _parse(text, arg) if equals else True
    return key.replace("-", "_").split("."), "" if value is None else value


def _parse(text, where):
    """The value of YAML text. `where` names its file or argument in the error."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def _update(cfg, values, where, section=""):
    """Sets the fields of the dataclass `cfg` from a dict, which may hold dicts for its sections."""
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
            # the default tells the type: the present value may be an empty list
            default = getattr(type(cfg), key)
            setattr(cfg, key, _typed(default, new, where, name))


def _typed(default, new, where, name):
    """Returns `new` in the type of `default`; only differences of notation are accepted."""
    wanted = type(default)
    if wanted is float and type(new) in (int, str):
        # YAML 1.1 reads 1e-4 (without a dot) as a string
        with suppress(ValueError):
            return float(new)
    if wanted is tuple and type(new) is list:
        item = type(default[0])
        if all(type(x) is item for x in new):
            return tuple(new)
        raise ValueError(f"{where}: {name} expects a list of {item.__name__}, got {new!r}")
    # a path or a name may look like a number: --out_dir=2026
    if wanted is str and type(new) in (int, float):
        return str(new)
    if name == "resume" and new == "changed":
        return new
    if name == "model.size" and type(new) in (str, dict):
        return new
    if type(new) is not wanted:
        wants = {tuple: "a list, [a, b]", bool: "true or false"}.get(wanted, wanted.__name__)
        raise ValueError(f"{where}: {name} expects {wants}, got {new!r}; write --{name}=VALUE")
    return new


def validate(cfg):
    """Raises ValueError for values out of range and for keys that contradict each other."""
    for name, choices in CHOICES.items():
        if _get(cfg, name) not in choices:
            raise ValueError(f"{name} is {_get(cfg, name)!r}; choose from {', '.join(choices)}")
    for name, least in AT_LEAST.items():
        # not (a >= b) rather than a < b, so that nan is refused too
        if not _get(cfg, name) >= least:
            raise ValueError(f"{name} is {_get(cfg, name)}; it must be at least {least}")
    _validate_training(cfg)
    _validate_energy(cfg.energy)
    if cfg.out_dir.startswith("gs://"):
        raise ValueError("out_dir is a local folder; give the bucket as --gcs_dir=gs://…")
    if cfg.gcs_dir and not cfg.gcs_dir.startswith("gs://"):
        raise ValueError(f"gcs_dir {cfg.gcs_dir!r} must start with gs://")


def _get(cfg, name):
    """The value of a dotted name such as data.crop."""
    for key in name.split("."):
        cfg = getattr(cfg, key)
    return cfg


def _validate_training(cfg):
    if not re.fullmatch(r"|cpu|cuda(:\d+)?", cfg.device):
        raise ValueError(f"device is {cfg.device!r}; "
                         "write --device=cpu, --device=cuda or --device=cuda:1")
    frames = cfg.data.clip_frames
    if cfg.rollout >= frames:
        raise ValueError(f"rollout {cfg.rollout} needs more than {cfg.rollout} frames and "
                         f"data.clip_frames is {frames}; set --rollout={frames - 1} or less")
    if cfg.lora.dropout >= 1:
        raise ValueError(f"lora.dropout is {cfg.lora.dropout}; it must be below 1")
    if not cfg.lora.targets:
        raise ValueError("lora.targets is empty: nothing would be trained; "
                         "name layers such as attn.qkv")
    if cfg.data.val_fraction > 1:
        raise ValueError(f"data.val_fraction is {cfg.data.val_fraction}; "
                         "it must be at most 1 (all episodes are for validation)")
    if cfg.val_every and not cfg.data.val_fraction:
        raise ValueError("val_every needs validation episodes and data.val_fraction is 0; "
                         "set one of the two")
    if cfg.lr < cfg.min_lr:
        raise ValueError(f"min_lr {cfg.min_lr} is above lr {cfg.lr}; lower it or raise lr")
    if cfg.schedule == "wsd" and cfg.decay_steps > cfg.max_steps:
        raise ValueError(f"decay_steps {cfg.decay_steps} is above max_steps {cfg.max_steps}; "
                         "lower it or raise max_steps")


def _validate_energy(energy):
    for plane in energy.planes:
        if plane not in PLANES:
            raise ValueError(f"energy.planes has {plane!r}; choose from {', '.join(PLANES)}")
    for planner in energy.planners:
        if planner not in PLANNERS:
            raise ValueError(f"energy.planners has {planner!r}; choose from {', '.join(PLANNERS)}")
    if energy.cem_elites > energy.cem_samples:
        raise ValueError(f"energy.cem_elites {energy.cem_elites} is above energy.cem_samples "
                         f"{energy.cem_samples}; lower it or raise cem_samples")


def save(cfg, path):
    """Writes the resolved config as YAML; `load([path])` returns an equal one."""
    write_file(path, dump(cfg).encode())


def dump(cfg):
    """The resolved config as YAML text."""
    return yaml.safe_dump(_tuples_to_lists(asdict(cfg)), sort_keys=False)


def _tuples_to_lists(value):
    # YAML has lists only; PyYAML would tag tuples as Python objects, which safe_load refuses
    if isinstance(value, dict):
        return {key: _tuples_to_lists(v) for key, v in value.items()}
    return list(value) if isinstance(value, tuple) else value
