"""The configuration: dataclasses with defaults, overridden by YAML files and the command line.

    cfg = config.load(["config.yaml", "--max_steps=10", "--lora.rank=8", "--resume"])

Parsing is strict: an unknown key, a wrong type or a contradiction raises ValueError with one line
that names the key and the cure. `""` and `0` mean off. config.yaml says what each key means, and
its unit; running/command_line.py is what the scripts put in front.
"""
import copy
import difflib
import json
import os
import re
import sys
import time
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace

import yaml

from files import write_file
from files.reading import shown
from files.text import TYPES, expand_home, parse_yaml, read_yaml, to_list
from settings.decoder import DecoderConfig
from settings.limits import CHOICES, check_ranges, check_together  # noqa: F401


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
class GripperConfig:
    scale: float = 1.0
    invert: bool = False
    offset: float = 0.0


@dataclass
class DataConfig:
    path: str | tuple = "gs://gresearch/robotics/droid_100/1.0.0"
    weights: tuple[float, ...] = ()
    camera: str | tuple = "wrist_image_left"
    crop: str = "center"
    frame_step: int = 4
    step_seconds: float = 0.0
    fps: float = 0.0
    clip_frames: int = 16
    clip_stride: int = 8
    only_success: bool = True
    drop_idle: bool = False
    val_fraction: float = 0.1
    val_episodes: tuple[str, ...] = ()
    offsets: str = "grid"
    shuffle_buffer: int = 512
    read_ahead_mb: float = 512.0
    cache: str = ""
    cache_gb: float = 20.0
    max_bad_share: float = 0.05
    retry_minutes: float = 10.0
    latents: str | tuple = ""
    rotation: str = "euler_xyz"
    position_scale: float = 1.0
    pose_slice: str = ""
    check: bool = True
    shuffle_actions: bool = False
    gripper: GripperConfig = field(default_factory=GripperConfig)
    keys: KeysConfig = field(default_factory=KeysConfig)


@dataclass
class EnergyConfig:
    pairs: int = 16
    per_episode: int = 2
    min_move: float = 0.01
    allow_trained: bool = False
    steps: int = 1
    planes: tuple[str, ...] = ("xy", "xz", "yz")
    radius: float = 0.075
    grid: int = 21
    others: str = "truth"
    context: int = 1
    planners: tuple[str, ...] = ("cem",)
    objective: str = "l1"
    horizon: int = 1
    cem_samples: int = 800
    cem_iterations: int = 10
    cem_elites: int = 10
    protocol: str = ""
    also: str | dict = ""
    name: str = ""


@dataclass
class LossConfig:
    teacher_forcing: float = 1.0
    rollout: float = 1.0

    def total(self, losses):
        """The weighted sum of {name: loss} as from `WorldModel.losses`: what is trained. A loss
        that has no weight here counts 1."""
        return sum(getattr(self, name, 1.0) * value for name, value in losses.items())


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
    val_landscapes: int = 4
    val_decoder: str = ""
    best: str = "val_l1"
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
    loss: LossConfig = field(default_factory=LossConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    energy: EnergyConfig = field(default_factory=EnergyConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    given = None                                # see `load`; no field, so that it is not saved


# What --debug sets: three small steps that still validate and save, so that every part of a run is
# executed within minutes. The rest of the command line overrides it.
DEBUG = dict(max_steps=3, batch_size=1, grad_accum=2, warmup_steps=1, decay_steps=1, log_every=1,
             val_every=3, val_batches=1, save_every=3)

PATHS = ("out_dir", "init", "val_decoder", "model.checkpoint", "data.path", "data.latents",
         "data.cache", "decoder.out_dir")
# One or several of them. A data set in data.path can have values of its own: see `data_sets`.
LISTS = ("data.path", "data.camera", "data.latents")
OF_A_DATA_SET = ("path", "camera", "crop", "frame_step", "step_seconds", "fps", "only_success",
                 "drop_idle", "rotation", "position_scale", "pose_slice", "gripper", "keys")
# Keys of older versions: (today's, default of then)
REPLACED = {"data.max_bad_episodes": ("data.max_bad_share", "10")}
COMMAND_LINE = "command line"                                   # in `given` and in errors


def load(args):
    """Returns the checked Config of `args`, a list of command-line arguments.

    args: paths of YAML files and `--section.key=value`. Files are read first, then the keys; later
    ones override earlier ones. A bare `--key` means true; dashes and underscores in keys are the
    same. Raises ValueError as `validate`, and for unknown keys, wrong types and bad YAML.

    Its `given` says where values are from: {dotted name: "command line" or a file}, for all keys on
    the command line and for those in files that differ from the defaults. Any other Config, one
    from dataclasses.replace too, has None."""
    cfg = Config()
    cfg.given = {}
    for path in args:
        if not path.startswith("--"):
            _update(cfg, read_yaml(path), path, cfg.given)
    for arg in args:
        if arg.startswith("--"):
            name, equals, text = arg.removeprefix("--").partition("=")
            value = text if equals else True
            # a.b=1 becomes {"a": {"b": 1}}, so that files and the command line take the same checks
            for key in reversed(name.split(".")):
                value = {key: value}
            _update(cfg, value, COMMAND_LINE, cfg.given)
    # The config.yaml of a debug run, read again, stays as it is.
    if cfg.debug and not re.search(r"(^|/)debug-\d{8}-\d{6}/*$", cfg.out_dir):
        vars(cfg).update((k, v) for k, v in DEBUG.items() if cfg.given.get(k) != COMMAND_LINE)
        cfg.out_dir += f"/debug-{time.strftime('%Y%m%d-%H%M%S')}"
    validate(cfg)
    return cfg


def flat(cfg, section=""):
    """{dotted name: value} of all keys."""
    values = {}
    for f in fields(cfg):
        name, value = section + f.name, getattr(cfg, f.name)
        values |= flat(value, f"{name}.") if is_dataclass(value) else {name: value}
    return values


def _update(cfg, values, where, given, section=""):
    """Sets the fields of the dataclass `cfg` from a dict, which may hold dicts for its sections."""
    known = [f.name for f in fields(cfg)]
    if isinstance(values, str) and values.startswith("{"):
        values = parse_yaml(values, where)
    if not isinstance(values, dict):
        raise ValueError(f"{where}: {section[:-1] or 'a recipe'} has keys such as "
                         f"{section}{known[0]}; got {shown(values) if values else 'nothing'}")
    for key, new in values.items():
        key = key.replace("-", "_")
        name = f"{section}{key}"
        if key not in known:
            if name not in REPLACED or where == COMMAND_LINE:
                raise ValueError(f"{where}: unknown key {name}; {_hint(name, section, known)}")
            if new != REPLACED[name][1]:
                print(f"{where}: {name} is passed over: {REPLACED[name][0]} now", file=sys.stderr)
        elif is_dataclass(getattr(cfg, key)):
            _update(getattr(cfg, key), new, where, given, f"{name}.")
        else:
            # the default tells the type: the present value may be an empty list
            default = getattr(type(cfg), key)
            new = _typed(default, new, where, name)
            setattr(cfg, key, new)
            given.pop(name, None)
            if where == COMMAND_LINE or new != default:
                given[name] = where


def _hint(name, section, known):
    """What may have been meant by an unknown key."""
    # Who mistypes lr does not mean that of decoder.py.
    names = [name for name in flat(Config()) if not name.startswith("decoder.")]
    names += {other.rpartition(".")[0] for other in names} - {""}
    key = name.split(".")[-1]
    close = [other for other in names if key and other.split(".")[-1].startswith(key)][:3]
    close += difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    if name in REPLACED:
        close = [REPLACED[name][0]]
    if close:
        return f"did you mean {' or '.join(dict.fromkeys(close))}?"
    return f"known: {', '.join(section + key for key in known)}"


def _typed(default, new, where, name):
    """`new` in the type of `default`. new: text, a list or dict of it, True for a bare --key."""
    if name in ("model.size", "energy.also") and isinstance(new, str) and new.startswith("{"):
        new = parse_yaml(new, where)
    if name == "energy.also" and (isinstance(new, dict) or str(new).endswith((".yaml", ".yml"))):
        return _typed_data_set(new, where, also=True)
    if name == "model.size" and isinstance(new, dict):
        return {key: _typed(0, value, where, f"{name}.{key}") for key, value in new.items()}
    if name == "resume" and new == "changed" or new is True and isinstance(default, bool):
        return new
    if name in LISTS and (isinstance(new, list) or re.fullmatch(r"\[.*[,{].*\]", str(new), re.S)
                          and not os.path.lexists(new)):
        items = [_typed_data_set(item, where) if name == "data.path" and (
                     isinstance(item, dict) or str(item).endswith((".yaml", ".yml")))
                 else _typed(default, item, where, name) for item in to_list(new)]
        # One of a list is the same as it alone, except for a data set with values of its own.
        return items[0] if len(items) == 1 and isinstance(items[0], str) else tuple(items)
    convert, expected = TYPES[type(default)]
    try:
        value = convert(new)
    except (ValueError, KeyError):
        got = "no value" if new is True else shown(new)
        raise ValueError(f"{where}: {name} expects {expected}, got {got}; write --{name}=VALUE"
                         ) from None
    if isinstance(value, list):
        item_default = default[0] if default else 0.0 if name == "data.weights" else ""
        return tuple(_typed(item_default, item, where, name) for item in value)
    return expand_home(value) if name in PATHS else value


def _typed_data_set(item, where, also=False):
    """A data set in data.path with values of its own, a dict or a YAML file with a section `data`
    -> {key: value}. also: one beside it, in energy.also, which may be of the same path."""
    if isinstance(item, str):
        where, item = item, (read_yaml(item) or {}).get("data")
    if not isinstance(item, dict) or not item or not (also or item.get("path")):
        raise ValueError(f"{where}: a data set has a path, such as {{path: my_robot, camera: "
                         f"front}}; got {shown(item) if item else 'no section data'}")
    for key in item:
        if key not in OF_A_DATA_SET + ("latents",) * also:
            raise ValueError(f"{where}: data.{key} is not of one data set, but of all; a data set "
                             f"in data.path can have {', '.join(OF_A_DATA_SET)}")
    data, typed = DataConfig(), {}
    _update(data, item, where, {}, "data.")
    for key, value in item.items():
        new = getattr(data, key)
        # of a section such as keys only what is given
        typed[key] = {k: getattr(new, k) for k in value} if is_dataclass(new) else new
    return typed


def data_sets(data):
    """The data sets of a DataConfig one by one: a DataConfig each, with one path, one camera and
    one folder of latents. A list of cameras gives one data set for each camera."""
    sets = []
    for path in data.path if isinstance(data.path, tuple) else [data.path]:
        one = copy.deepcopy(data)
        _update_typed(one, path if isinstance(path, dict) else {"path": path})
        cameras = one.camera if isinstance(one.camera, tuple) else [one.camera]
        sets += [replace(one, camera=camera) for camera in cameras]
    latents = data.latents if isinstance(data.latents, tuple) else [data.latents] * len(sets)
    if data.latents and len(latents) != len(sets) or data.latents and len(set(latents)) < len(sets):
        raise ValueError(f"data.latents names {len(set(latents))} folders for {len(sets)} data "
                         "sets (paths and cameras); give one for each, in their order")
    return [replace(one, latents=folder) for one, folder in zip(sets, latents)]


def second_data_set(data, also):
    """The DataConfig of energy.also: a path, a camera of the same data, or a dict of both and
    more. It is read as frames unless the dict names stored latents."""
    if isinstance(also, str):
        is_path = os.path.exists(also) or "/" in also
        also = {"path": also} if is_path else {"camera": also}
    second = replace(copy.deepcopy(data), latents="", weights=())
    # Data sets in data.path with values of their own: here those of `also` count.
    if isinstance(second.path, tuple):
        second.path = tuple({key: value for key, value in item.items() if key not in also}
                            if isinstance(item, dict) else item for item in second.path)
    _update_typed(second, also)
    return second


def _update_typed(cfg, values):
    for key, value in values.items():
        if is_dataclass(getattr(cfg, key)):
            _update_typed(getattr(cfg, key), value)
        else:
            setattr(cfg, key, value)


def validate(cfg):
    """Raises ValueError for values out of range and for keys that contradict each other."""
    sets = data_sets(cfg.data)
    if not sets:
        raise ValueError("data.path is empty; give --data.path=FOLDER or a pattern")
    for one in sets:
        check_ranges(flat(replace(cfg, data=one)))
    check_together(flat(cfg))
    if cfg.energy.also:
        for one in data_sets(second_data_set(cfg.data, cfg.energy.also)):
            try:
                check_ranges(flat(replace(cfg, data=one)))
            except ValueError as error:
                raise ValueError(f"energy.also: {error}") from None


def save(cfg, path):
    """Writes the resolved config as YAML; `load([path])` returns an equal one."""
    write_file(path, dump(cfg).encode())


def dump(cfg):
    """The resolved config as YAML text."""
    # Through JSON tuples become lists; PyYAML would tag them as Python objects, which nobody reads.
    return yaml.safe_dump(json.loads(json.dumps(asdict(cfg))), sort_keys=False)
