"""The command line of energy.py: comparisons, check, probe and plan.

Imports no PyTorch, as all that the command line needs (running/command_line.py)."""
import itertools
import math
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import config
from files.text import expand_home
from running.arguments import choices, load, main_steps, names_step, step_folders
from running.checks import check_adapter, check_base, check_sources, check_target, decoder_in


# What probe can vary of section energy; of data, what each data set can have of its own.
OF_A_LANDSCAPE = ("steps", "context", "planes", "grid", "radius", "others")
MOST_COMBINATIONS = 64
# Options that one command alone takes.
OF_A_COMMAND = {"over": "probe", "expected": "check"} | dict.fromkeys(
    ("image", "pose", "goal", "replay", "adapter"), "plan")
PLAN = ('python energy.py plan RUN --image=now.png --pose="[x,y,z,roll,pitch,yaw,gripper]" '
        "--goal=goal.png, or --replay=EPISODE")


def parse(given):
    """Adds `command` ("", check, probe or plan), and `source`, or `cfg`, `adapters`, what to say
    about their choice, `note`, and `decoder`, a file or ""."""
    options, given.source, given.adapters = given.options, "", []
    given.command, given.all, given.decoder = "", "all" in options, ""
    if given.paths[:1] in (["check"], ["probe"], ["plan"]) and not os.path.exists(given.paths[0]):
        given.command, *given.paths = given.paths
    # Elsewhere it is a slip of --adapters, which is told as all slips are.
    if "adapter" in options and given.command != "plan":
        raise ValueError("unknown option --adapter; did you mean --adapters?")
    for name, command in OF_A_COMMAND.items():
        if name in options and given.command != command:
            raise ValueError(f"--{name} applies to energy.py {command}")
    if "decoder" in options and given.command:
        raise ValueError(f"--decoder does not apply to energy.py {given.command}")
    if given.command == "plan":
        _plan(given)
    if given.command == "check":
        return _check(given)
    if "from" in options:
        others = [*given.paths, *given.keys,
                  *(f"--{name}" for name in options if name not in ("from", "all"))]
        if others:
            raise ValueError(f"{others[0]}: --from reads arrays alone, no settings apply")
        if given.command:
            raise ValueError(f"--from does not apply to energy.py {given.command}")
        given.source = _landscapes(expand_home(options["from"]))
        return given
    if "decoder" in options:
        given.decoder = decoder_in(expand_home(options["decoder"]))
    given.cfg = cfg = load(given)
    given.debug, given.note = cfg.debug, ""
    runs = [path for path in given.paths if os.path.isdir(path)]
    steps = options.get("steps")
    adapters = options.get("adapters", "") or options.get("adapter", "")
    folders = [path for path in runs if names_step(path)]
    if steps:
        folders += step_folders(cfg.out_dir, steps)
    elif runs and not adapters and not folders:
        folders = [Path(cfg.out_dir, f"step_{step}") for step in main_steps(cfg, cfg.out_dir)]
        given.note = f"{cfg.out_dir}: its milestones and the newest step; --steps=… names others"
        if not folders:
            raise ValueError(f"{runs[-1]}: holds no step_N; energy.py {runs[-1]}/config.yaml "
                             "measures the base model alone")
    # Step 0 is the baseline, which is always there.
    given.adapters = [str(folder) for folder in folders if Path(folder).is_dir()]
    given.adapters += [expand_home(name.strip()) for name in adapters.split(",") if name.strip()]
    for adapter in given.adapters:
        if adapter != "baseline":
            check_adapter(adapter)
    if given.command == "plan" and not given.replay:
        if len(given.adapters) > 1 and (adapters or steps):
            raise ValueError(f"plan takes one adapter, not {len(given.adapters)}: "
                             f"--adapter={given.adapters[-1]}")
        check_base(cfg.model.checkpoint)            # plans of images need no data
        return given
    check_sources(config.flat(cfg))
    if cfg.energy.also and given.command != "probe":
        second = config.second_data_set(cfg.data, cfg.energy.also)
        check_sources(config.flat(replace(cfg, data=second)))
    check_target(cfg.out_dir, folder=True)
    if given.command == "probe":
        given.combinations = _combinations(given)
    return given


def _landscapes(path):
    """The landscapes.npz that --from names: a file, the one in a folder, or the only one in the
    folders of an energy/ or a run folder. Raises ValueError."""
    file = Path(path)
    if file.is_dir():
        # Of a second data set, also/, are read with the first.
        found = next((some for depth in ("", "*/", "energy/*/") if (
            some := sorted(file.glob(f"{depth}landscapes.npz")))), [])
        if len(found) > 1:
            raise ValueError(f"{path}: holds several comparisons; give one of them: --from="
                             + ", --from=".join(str(one.parent) for one in found))
        if found and found[0].parent != file:
            print(f"{found[0]}: the only one in {path}")
        file = found[0] if found else file / "landscapes.npz"
    if not file.exists():
        raise ValueError(f"{file}: no such file; energy.py RUN --steps=… writes it")
    return str(file)


def _plan(given):
    """Adds `replay`, or `image`, `goal` and `pose`, a list of numbers. Raises ValueError."""
    options = given.options
    given.replay = options.get("replay", "")
    others = [name for name in options if name not in
              ("image", "pose", "goal", "replay", "adapter", "adapters", "steps")]
    if others:
        raise ValueError(f"--{others[0]} does not apply to plan: {PLAN}")
    if "adapter" in options and "adapters" in options:
        raise ValueError("--adapter and --adapters: give one of them")
    from_images = [name for name in ("image", "pose", "goal") if options.get(name)]
    if given.replay:
        if from_images:
            raise ValueError(f"--{from_images[0]}: a replay takes its images and poses from the "
                             "episode")
        return
    if len(from_images) < 3:
        missing = next(name for name in ("image", "pose", "goal") if name not in from_images)
        raise ValueError(f"plan needs --{missing}: {PLAN}")
    given.image, given.goal = expand_home(options["image"]), expand_home(options["goal"])
    for path in (given.image, given.goal):
        if not os.path.isfile(path):
            raise ValueError(f"{path}: no such image")
    try:
        given.pose = [float(part) for part in options["pose"].strip(" []()").split(",")]
    except ValueError:
        raise ValueError(f"--pose={options['pose']:.80}: expected numbers with commas between "
                         "them: x y z, rotation, gripper, such as [0.4,0,0.3,3.14,0,0,0]"
                         ) from None


def _check(given):
    """Adds `cfg` with the file in it."""
    usage = "python energy.py check vjepa2-ac-vitg.pt"
    others = [f"--{name}" for name in given.options if name != "expected"]
    if others:
        raise ValueError(f"{others[0]} does not apply to check: {usage}")
    if len(given.paths) != 1:
        raise ValueError(f"check takes one file, got {len(given.paths)}: {usage}")
    given.cfg = config.load([*given.keys, f"--model.checkpoint={given.paths[0]}"])
    given.debug = given.cfg.debug
    check_base(given.cfg.model.checkpoint)
    return given


def _combinations(given):
    """[(what is set, as text; the Config)] of all combinations of --over. Raises ValueError."""
    usage = "such as --over=data.frame_step=4,8,15"
    if not given.options.get("over"):
        raise ValueError(f"probe needs --over, {usage}")
    values = choices(given.options["over"], usage)
    for name in values:
        of_data, of_energy = name.removeprefix("data."), name.removeprefix("energy.")
        if name in config.flat(config.Config()) and not (
                of_data != name and of_data.split(".")[0] in config.OF_A_DATA_SET
                or of_energy != name and of_energy in OF_A_LANDSCAPE):
            raise ValueError(
                f"--over={name}=…: probe compares landscapes on the same moments under other "
                f"values of {', '.join(f'data.{key}' for key in config.OF_A_DATA_SET)}, "
                f"{', '.join(f'energy.{key}' for key in OF_A_LANDSCAPE)}; {usage}")
    n = math.prod(map(len, values.values()))
    if n > MOST_COMBINATIONS:
        raise ValueError(f"--over: makes {n:,} combinations; give {MOST_COMBINATIONS} at most")
    found = []
    for chosen in itertools.product(*values.values()):
        keys = [f"--{name}={value}" for name, value in zip(values, chosen)]
        cfg = load(SimpleNamespace(paths=given.paths, keys=[*given.keys, *keys]))
        check_sources(config.flat(cfg))
        title = " ".join(f"{name.rpartition('.')[2]}={value}"
                         for name, value in zip(values, chosen))
        found.append((title, cfg))
    return found
