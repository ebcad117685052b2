"""A run's own settings: kept with each checkpoint, and compared when it is resumed.

What a key decides tells what happens to it on --resume: keys of where and how (ON_EACH_START) are
those of the command line; a key that the command line does not give is the run's own; of those that
it does, some may change on the way (MAY_CHANGE) and are said, and all others change what is learned
and are refused, unless by --resume=changed.
"""
import copy
import os
from pathlib import Path

import config
import lora


ON_EACH_START = {"out_dir", "resume", "init", "stop_at", "debug", "device", "memory"}
MAY_CHANGE = {
    "max_steps", "schedule", "lr", "min_lr", "warmup_steps", "decay_steps", "weight_decay",
    "grad_clip", "log_every", "val_every", "val_batches", "val_landscapes", "best",
    "save_every", "keep", "milestones",
    "activation_checkpointing", "compile", "gcs_dir", "gcs_minutes", "tensorboard",
    "val_decoder", "wandb", "dist_timeout_minutes", "data.retry_minutes", "data.max_bad_share",
    "data.read_ahead_mb", "data.cache", "data.cache_gb",
    # The base is known by its fingerprint, wherever its file lies: lora.load compares it.
    "model.checkpoint",
    # Compared as clips a step.
    "batch_size", "grad_accum"}
# Neither trained with nor to be found in a checkpoint, so that equal runs have equal bytes.
NOT_KEPT = ON_EACH_START | {"gcs_dir", "gcs_minutes", "tensorboard", "val_decoder", "wandb",
                            "dist_timeout_minutes", "data.retry_minutes", "data.read_ahead_mb",
                            "data.cache", "data.cache_gb"}
OF_THE_SCHEDULE = {"max_steps", "schedule", "lr", "min_lr", "warmup_steps", "decay_steps"}


def flat(cfg):
    """{dotted name: value} of a Config, without the sections that train.py does not read."""
    return {name: value for name, value in config.flat(cfg).items()
            if not name.startswith(("energy.", "decoder."))}


def kept(cfg):
    """What a checkpoint keeps: {dotted name: value} of what was trained, on what, with which
    schedule, how long."""
    return {name: value for name, value in flat(cfg).items() if name not in NOT_KEPT}


def fault_of(kept):
    """What is wrong with settings that a checkpoint keeps, or "": a missing key is one that came
    with a later version, unless a resume needs it."""
    for name, default in flat(config.Config()).items():
        value = kept.get(name, default)
        fits = type(value) is type(default) or name == "model.size"
        if name in config.LISTS and type(value) is tuple:
            fits = value and all(
                type(one) is str or type(one) is dict and one.keys() <= {*config.OF_A_DATA_SET}
                for one in value)
        if not fits:
            return f"{name} is {value!r}"
    missing = {"batch_size", "grad_accum", "precision"} - kept.keys()
    return f"no {missing.pop()}" if missing else ""


def own_settings(out, history, say):
    """{dotted name: value} of a run, from its config.yaml and over it what its checkpoint keeps.

    history: as in state.pt, empty for old ones. Raises ValueError if neither tells."""
    path, kept = Path(out) / "config.yaml", history[-1]["settings"] if history else {}
    try:
        return flat(config.load([str(path)])) | kept
    except (ValueError, OSError) as error:
        if not history:
            raise ValueError(f"{error}; what the run was trained with is not known then: "
                             "--init=STEP_FOLDER starts a new run from its adapter") from None
        say(f"{error}; its checkpoint tells its settings")
        return kept


def begun(cfg, say):
    """The Config with which a run goes on that was begun and has no step yet: where the command
    line gives none its own settings, above all the adapter that it was begun from.

    Raises ValueError if they cannot be read."""
    path = Path(cfg.out_dir, "config.yaml")
    if not path.is_file():
        return cfg
    try:
        own = flat(config.load([str(path)]))
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}; or remove it, and the run begins anew") from None
    now, merged = flat(cfg), copy.deepcopy(cfg)
    given = now.keys() if cfg.given is None else cfg.given
    adopted = {name: value for name, value in own.items()
               if name not in ON_EACH_START | set(given) and now[name] != value}
    if own["init"] and not cfg.init:
        adopted["init"] = own["init"]
    for name, value in adopted.items():
        _set(merged, name, value)
    _say_adopted(cfg, adopted, say)
    return merged


def merge(cfg, own, start, ranks, saved_ranks, certain, say):
    """The Config with which a run goes on at step `start`.

    cfg: of the command line; own: from `own_settings`; ranks and saved_ranks: processes now and
    then; certain: whether `own` is the checkpoint's own word, and not only that of a config.yaml,
    which older versions let other runs overwrite; say(text) prints a line. Raises ValueError for
    changes that have to be asked for."""
    now, merged, adopted, changed = flat(cfg), copy.deepcopy(cfg), {}, {}
    given = now.keys() if cfg.given is None else cfg.given
    for name, value in own.items():
        if name in ON_EACH_START or name not in now or now[name] == value:
            continue
        if name not in given:
            adopted[name] = value
            _set(merged, name, value)
        elif name == "milestones":
            merged.milestones = tuple(sorted({*value, *now[name]}))
        else:
            changed[name] = (value, now[name])
    merged.resume, merged.init = False, _own_init(cfg, own, start)
    _keep_clips_a_step(merged, own, given, ranks, saved_ranks, say)
    refused = {name: values for name, values in changed.items() if name not in MAY_CHANGE}
    clips = own["batch_size"] * own["grad_accum"] * saved_ranks
    clips_now = merged.batch_size * merged.grad_accum * ranks
    if clips != clips_now:
        refused["batch_size x grad_accum x ranks"] = (clips, clips_now)
    if refused and cfg.resume != "changed" and certain:
        names = ", ".join(f"{name} {_short(a)}, now {_short(b)}"
                          for name, (a, b) in refused.items())
        as_before = " ".join(f"--{name}={_short(a)}" for name, (a, _) in refused.items()
                             if name in own)
        raise ValueError(
            f"{cfg.out_dir}: was trained with another {names}; to go on as before "
            f"{'set ' + as_before if as_before else 'choose batch_size and grad_accum so'}; "
            f"--resume=changed changes it from here on, --init={cfg.out_dir}/step_{start} starts "
            "another run from its adapter")
    _say_adopted(cfg, adopted, say)
    for name, (a, b) in (changed | refused).items():
        say(f"changed from step {start} on: {name} from {_short(a)} to {_short(b)}")
    config.validate(merged)
    return merged


def _own_init(cfg, own, start):
    """The adapter that a run was begun from, "" for none: it has had its effect. Raises ValueError
    if another one is asked for."""
    init = own.get("init", cfg.init)            # unknown if its config.yaml is lost
    if cfg.init and (not init or os.path.realpath(cfg.init) != os.path.realpath(init)):
        raise ValueError(
            f"{cfg.out_dir}: was begun {f'from {init}' if init else 'without --init'} and is at "
            f"step {start}: --init={cfg.init} comes too late; leave it out, or choose another "
            "--out_dir for a new run from there")
    return init


def _say_adopted(cfg, adopted, say):
    """What a bare --resume would not show: where the run differs from the recipe."""
    if adopted and cfg.given is not None:
        differs = ", ".join(f"{name} {_short(value)}" for name, value in adopted.items())
        say(f"{cfg.out_dir}: goes on with its own {differs}")


def _keep_clips_a_step(merged, own, given, ranks, saved_ranks, say):
    """On another number of processes the accumulation changes, so that the clips of a step do not:
    unless the command line says what it is to be."""
    if ranks == saved_ranks or {"batch_size", "grad_accum"} & set(given):
        return
    clips = own["batch_size"] * own["grad_accum"] * saved_ranks
    fits = [n for n in range(merged.batch_size, 0, -1) if clips % (n * ranks) == 0]
    if fits:
        merged.batch_size, merged.grad_accum = fits[0], clips // (fits[0] * ranks)
        say(f"{ranks} ranks instead of {saved_ranks}: --batch_size={merged.batch_size} "
            f"--grad_accum={merged.grad_accum} for the same {clips} clips a step")


def new_history(history, cfg, start):
    """The history that the next checkpoints hold: [{"from_step", "settings"}], longer by one where
    settings changed."""
    settings = kept(cfg)
    if history and history[-1]["settings"] == settings:
        return history
    return [*history, {"from_step": start, "settings": settings}]


def with_adapter_of(cfg):
    """For --init: the Config with the adapter's rank, alpha, rslora and targets.

    Raises ValueError if the command line gives others."""
    peft, state, _ = lora.read(cfg.init)
    layers = {name.removeprefix(lora.PREFIX).rsplit(".lora_", 1)[0] for name in state}
    shape = {"rank": peft["r"], "alpha": float(peft["lora_alpha"]),
             "rslora": bool(peft.get("use_rslora", False)), "targets": _targets(peft, layers)}
    cfg = copy.deepcopy(cfg)
    for key, value in shape.items():
        now = getattr(cfg.lora, key)
        if f"lora.{key}" in (cfg.given or ()) and now != value:
            raise ValueError(f"{cfg.init}: has lora.{key} {_short(value)}, and {_short(now)} is "
                             f"asked for; leave --lora.{key} out, or start without --init")
        setattr(cfg.lora, key, value)
    return cfg


def _targets(peft, layers):
    """target_modules, or the layers by their full names if those are not simply the ends of
    names."""
    names = peft.get("target_modules")
    plain = isinstance(names, list) and all(
        any(layer == name or layer.endswith(f".{name}") for name in names) for layer in layers)
    return tuple(names if plain else sorted(layers))


def rate_note(own, cfg, start, lr_at):
    """What a changed schedule does to the learning rate at step `start`, or ""."""
    before = _with(cfg, {name: own[name] for name in OF_THE_SCHEDULE if name in own})
    old, new = (lr_at(start, c) for c in (before, cfg))
    if abs(new - old) <= 0.01 * max(old, new):
        return ""
    return (f"learning rate at step {start + 1}: {new:.2e}, and {old:.2e} as planned before. To "
            f"train further without a jump, plan the longer run at first (--max_steps="
            f"{cfg.max_steps} --stop_at={start}, then --resume), or lower --lr")


def _with(cfg, values):
    cfg = copy.deepcopy(cfg)
    for name, value in values.items():
        _set(cfg, name, value)
    return cfg


def _set(cfg, name, value):
    *sections, key = name.split(".")
    for section in sections:
        cfg = getattr(cfg, section)
    setattr(cfg, key, value)


def _short(value):
    text = f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
    text = text.lower() if isinstance(value, bool) else text or '""'
    return text if len(text) <= 60 else f"{text[:57]}..."


def saved(cfg):
    """The Config as a run folder's config.yaml holds it: without what counts for one start only."""
    cfg = copy.deepcopy(cfg)
    cfg.resume, cfg.stop_at, cfg.debug = False, 0, False
    return cfg


