"""Command-line arguments in whatever spelling, and run folders in place of recipes.

Imports no PyTorch, as all that the command line needs (running/command_line.py)."""
import difflib
import os
import re
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import config
from files.text import BOOLS, expand_home
from running.best import STEP_BEST, about_best


DASHES = "-‐‑‒–—―−"         # what text editors and chats make of two hyphens
RUN = "give a run folder that train.py wrote"
FLAGS = ("all",)            # options without a value …
REPEATED = ("over",)        # … and with several


def split(args, options, defaults):
    """Arguments in whatever spelling -> a namespace: paths, keys of the config as --key=value,
    options as {name: value}. Raises ValueError for what can only be a slip.

    options: {name: meaning}; defaults: {dotted name of a key: default}."""
    given = SimpleNamespace(paths=[], keys=[], options={}, cfg=None, debug=False)
    waiting = list(args)
    while waiting:
        arg = waiting.pop(0)
        name, equals, value = arg.lstrip(DASHES).partition("=")
        name = name.replace("-", "_").lower()
        known = name in defaults or name in options
        if not arg.strip():
            raise ValueError("one argument is empty; is a variable of the shell not set?")
        if arg[0] not in DASHES and not (known and equals and not os.path.exists(arg)):
            given.paths.append(expand_home(arg))
            continue
        if not name:
            raise ValueError(f"{arg}: neither a file nor --key=value")
        following = waiting[0] if waiting else ""
        if following.startswith("=") or value.startswith("=") or (
                equals and not value and following and following[0] not in DASHES
                and not os.path.exists(following)):
            raise ValueError(f"{arg} {following}".rstrip() + f": write --{name}=VALUE, with one = "
                             "and no spaces")
        if name in FLAGS and name in options:
            if value:
                raise ValueError(f"--{name} takes no value: {options[name]}")
            given.options[name] = True
            continue
        if not equals and _is_value(following, name, defaults.get(name), known):
            equals, value = "=", waiting.pop(0)
        if name in REPEATED and name in options and value:
            given.options.setdefault(name, []).append(value)
            continue
        if name in options:
            if not value or given.options.setdefault(name, value) != value:
                raise ValueError(f"--{name} needs one value: {options[name]}")
            continue
        close = difflib.get_close_matches(name, options, n=1, cutoff=0.75)
        if close and not known:
            raise ValueError(f"unknown option --{name}; did you mean --{close[0]}?")
        given.keys.append(f"--{name}{equals}{value}")
    return given


def _is_value(following, name, default, known):
    """Whether the argument after a `--name` without = is its value."""
    if isinstance(default, bool):
        return following.lower() in BOOLS or (name, following) == ("resume", "changed")
    if re.match(r"-\.?\d", following):                  # a negative number
        return True
    is_other = following[:1] in DASHES or following.endswith((".yaml", ".yml"))
    return bool(following) and not is_other and (known or not os.path.exists(following))


def load(given):
    """The Config of recipes, run folders and keys. Raises ValueError as `config.load`."""
    args = []
    for path in given.paths:
        if os.path.isdir(path):
            run = run_folder(path)
            # What counted for one start of that run is left out.
            args += [f"{run}/config.yaml", f"--out_dir={run}", "--resume=false", "--init=",
                     "--stop_at=0", "--debug=false"]
        elif path.endswith(".npz"):
            raise ValueError(f"{path}: no recipe; energy.py --from={path} reads landscapes")
        else:
            args.append(path)
    return config.load([*args, *given.keys])


def run_folder(path):
    """The run folder that `path` names: itself, or the one of which it is a step. Raises
    ValueError if it is neither."""
    folder = Path(path)
    for candidate in (folder.parent, folder) if names_step(folder) else (folder,):
        # This project's own folder, and an unpacked package, have a config.yaml too.
        if (candidate / "config.yaml").is_file() and not (candidate / "config.py").exists():
            return candidate
    raise ValueError(f"{path}: no config.yaml in it; name a recipe, such as config.yaml, or {RUN}")


def is_step(path):
    # Neither step_04 nor other scripts' digits: each step has one name.
    return re.fullmatch(r"step_(0|[1-9][0-9]*)", Path(path).name)


def names_step(path):
    """Whether a path is that of a step_N or of step_best."""
    return bool(is_step(path)) or Path(path).name == STEP_BEST


def step_folders(run, text):
    """The folders of --steps=0,50,best in a run folder; step 0 may be missing. Raises
    ValueError."""
    steps = [step.strip().removeprefix("step_") for step in text.strip("[]").split(",")]
    if not all(step == "best" or step.isascii() and step.isdigit() for step in steps):
        raise ValueError(f"--steps={text}: give whole numbers, such as --steps=0,5000, or best")
    folders = [Path(run, STEP_BEST if step == "best" else f"step_{int(step)}")
               for step in dict.fromkeys(steps)]
    for folder in folders:
        if not folder.is_dir() and folder.name != "step_0":
            found = [f"step_{step}" for step in steps_of(run)]
            found += [STEP_BEST] * Path(run, STEP_BEST).is_dir()
            raise ValueError(f"{folder}: no such step; {run} has {', '.join(found) or 'no step'}")
    return folders


def folder_of(run, step):
    """The step_N folder of a run, or step_best if it is of that step and the other is gone."""
    folder, best = Path(run, f"step_{step}"), Path(run, STEP_BEST)
    with suppress(ValueError):
        if not folder.exists() and about_best(best)[0] == step:
            return best
    return folder


def steps_of(run):
    """Steps of which a run folder has the adapter, ascending."""
    return sorted(int(path.name.removeprefix("step_")) for path in Path(run).glob("step_*")
                  if is_step(path) and (path / "adapter_config.json").is_file())


def choices(overs, usage):
    """{dotted key: [values as text]} of several --over=KEY=VALUE,VALUE. Raises ValueError with
    `usage`."""
    found = {}
    for text in overs:
        name, _, values = text.partition("=")
        name = name.lstrip(DASHES).replace("-", "_").strip()
        # Commas within brackets belong to one value.
        parts = re.findall(r"(?:\[[^\]]*\]|\{[^}]*\}|[^,\[{])+", values)
        if not parts or len(",".join(parts)) < len(values):
            raise ValueError(f"--over={text}: takes a key and its values with commas between them, "
                             f"{usage}")
        known = found.setdefault(name, [])
        known += [value for part in parts if (value := part.strip()) not in known]
    return found


def main_steps(cfg, run):
    """--steps for a run folder if nothing is said: its milestones and the newest one."""
    steps = steps_of(run)
    return [step for step in steps if step in cfg.milestones or step == steps[-1]]
