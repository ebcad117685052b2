"""The command line of all scripts: help, spelling, run folders, and what can be checked at once.

running/script.py shows how the scripts use it. Imports neither PyTorch nor TensorFlow, which take
seconds: help, a typo or a wrong path is answered before. Every script takes a run folder in place
of a recipe. Errors are one line, with exit code 1.
"""
import json
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from textwrap import wrap
from types import SimpleNamespace

import config
from episodes.retry import is_remote
from files.text import expand_home
from running import energy_line, stop, sweep_line
from running.arguments import (
    RUN,
    load,
    main_steps,
    names_step,
    run_folder,
    split,
    step_folders,
)
from running.best import STEP_BEST, about_best
from running.checks import (
    check_adapter,
    check_base,
    check_packages,
    check_sources,
    check_target,
    check_training,
    decoder_in,
)


HELP = ("-h", "--help", "help", "-help", "--h", "-?", "/?")

# Options besides the keys of config.yaml, and what they mean.
OPTIONS = {
    "train.py": {}, "latents.py": {}, "decoder.py": {}, "toy.py": {},
    "droid.py": {"out": "inspect: folder for inspect.json and inspect.png (default inspect/NAME, "
                        "after the data)"},
    "energy.py": {
        "steps": "of the run folder, as in --steps=50,200; if neither these nor --adapters are "
                 "given, its milestones and the newest one",
        "adapters": "folders of adapters, as in --adapters=runs/x/step_50,other",
        "decoder": "a folder that decoder.py wrote: what the checkpoints imagine, in pixels: "
                   "strips, videos, PSNR and SSIM, in NAME/imagination",
        "from": "landscapes.npz: metrics and figures again, from the energies in it",
        "over": "probe: a key and its values, as in --over=data.frame_step=4,8,15; several --over "
                "make all combinations",
        "expected": "check: a JSON file of values to expect, in place of the released weights'",
        "all": "all metrics of all groups below the verdict",
        "image": "plan: what the camera sees now, a PNG or JPEG of 32 × 32 pixels or more",
        "pose": "plan: the gripper's pose then, as the data have it, such as "
                "\"[0.4,0,0.3,3.14,0,0,0]\"",
        "goal": "plan: an image of what is wanted",
        "replay": "plan: the name of a recorded episode, or a part of it: the closed loop on its "
                  "frames",
        "adapter": "plan: the folder of an adapter; without it the base model, of a run its newest "
                   "step"},
    "sweep.py": {
        "over": "a key and its values, as in --over=lr=1e-5,1e-4; several --over make all "
                "combinations; for random and tpe also a range, --over=lr=1e-5..1e-2",
        "sampler": "grid (default), random or tpe",
        "runs": "of random and tpe: how many (default 16)",
        "halvings": "times that the worse half is stopped (default 1: at half of the steps)",
        "workers": "runs at a time (default: one for each GPU)"},
    "export.py": {
        "dtype": "slim: bf16 (default), fp16 or fp32",
        "steps": "package: as in --steps=0,5000 (0 is the base model); by default 0, the "
                 "milestones and the newest one",
        "trajectories": "package: how many at most (default 16)",
        "decoder": "package: a folder that decoder.py wrote, for the notebook to show what the "
                   "models imagine"},
    "bench.speed": {"parts": "of the table: training,networks,files (default: all)",
                    "repeats": "of each measurement (default 10)"},
    "bench.measure": {"file": "load, slim: where the large file is, or is written "
                              "(default runs/released_layout.pt)"},
    "bench.toy_study": {"seeds": "as in --seeds=0,1 (default 0,1,2,3,4)"},
}
WITHOUT_KEYS = ("toy.py", "bench.toy_study")
COPY = "python droid.py copy gs://…/droid_100/1.0.0 FOLDER"
# export.py's: arguments, and the options that apply.
COMMANDS = {
    "slim": ("SOURCE.pt TARGET.safetensors", ("dtype",)),
    "baseline": ("RECIPE FOLDER", ()),
    "adapter": ("RUN/step_N FOLDER", ()),
    "merge": ("[RECIPE] RUN/step_N TARGET.pt", ()),
    "package": ("RUN", ("steps", "trajectories", "decoder")),
    "verify": ("PACKAGE.zip", ()),
}


# For the scripts

def begin(script, doc):
    """The first lines of a script: signals, then everything that needs no PyTorch. Returns what
    `run` takes for args. Ends the process after --help and after an error."""
    with one_line_errors(script):
        return parse(script, doc, sys.argv[1:])


def run(script, doc, args, work):
    """The main function of a script: work(arguments), errors in one line.

    args: of the command line, or what `begin` returned."""
    with one_line_errors(script):
        arguments = parse(script, doc, args) if isinstance(args, list) else args
    with one_line_errors(script, arguments.debug):
        work(arguments)
    if not isinstance(args, list):
        sys.exit(stop.exit_code())


@contextmanager
def one_line_errors(script, debug=False):
    """Errors that the user can mend end the process with one line. debug: with a full traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        if debug or isinstance(error, RuntimeError) and not (
                is_io_error(error) or re.search("out of memory|allocate memory", str(error))):
            raise
        message = " ".join(str(error).split()) or "out of memory"
        stop.fail(message, script)


def is_io_error(error):
    """Whether an exception is about a file: PyTorch's are a RuntimeError."""
    return isinstance(error, OSError) or isinstance(error, RuntimeError) and re.search(
        "PytorchStreamWriter|inline_container|iostream|Parent directory|No space left", str(error))


def parse(script, doc, args):
    """What a script is to do: a Config (train.py, latents.py, decoder.py), or what `split` returns
    (energy.py and export.py with more, see below).

    Prints help and ends the process if it is asked for, or if there are no arguments where some
    are needed. Raises ValueError as `config.load`, and for paths that are not there."""
    needs_some = script in ("train.py", "latents.py", "decoder.py", "energy.py", "droid.py",
                            "sweep.py", "bench.measure")
    if set(args) & set(HELP) or needs_some and not args:
        text = help_text(script, doc)
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "replace").decode(encoding))
        sys.exit(0)
    keys = {} if script in WITHOUT_KEYS else config.flat(config.Config())
    given = split(args, OPTIONS[script], keys)
    if script in WITHOUT_KEYS and given.paths + given.keys:
        raise ValueError(f"{(given.paths + given.keys)[0]}: {script} takes no such argument")
    functions = {"train.py": _train, "latents.py": _latents, "decoder.py": _decoder,
                 "energy.py": energy_line.parse, "export.py": _export, "droid.py": _droid,
                 "sweep.py": sweep_line.parse}
    return functions[script](given) if script in functions else given


# Help

def help_text(script, doc):
    """The docstring, the script's options, and all keys as config.yaml explains them."""
    parts = [doc.strip()]
    if OPTIONS[script]:
        parts.append("Options:\n" + "\n".join(
            _entry(f"--{name}=…", wrap(meaning, 68)) for name, meaning in OPTIONS[script].items()))
    if script not in WITHOUT_KEYS:
        keys = config.flat(config.Config())
        entries = [_entry(f"--{name}={value}", lines) if name in keys
                   else "\n" + _entry(f"{name}:", lines)
                   for name, (value, lines) in key_meanings().items()]
        parts.append("Keys with their defaults. A YAML file has them as `key: value`, a run folder "
                     "in its place\ngives those of the run:\n" + "\n".join(entries))
    return "\n\n".join(parts)


def key_meanings():
    """{dotted name: (default as text, lines of its comment)} of what config.yaml holds, sections
    included."""
    meanings, names = {}, []
    path = Path(config.__file__).with_name("config.yaml")
    for line in path.read_text(encoding="utf-8").splitlines():
        code, _, comment = re.sub(r"(^|\s)#\s?", "\0", line, count=1).partition("\0")
        key = re.match(r"( *)(\w+):(.*)", code)
        if key:
            names = [*names[:len(key[1]) // 2], key[2]]
            # Without the spaces that would end the argument in a shell.
            value = key[3].strip().replace(", ", ",")
            meanings[".".join(names)] = value, [comment] if comment else []
        elif comment and line.startswith(" "):          # goes on; headings stand on the left
            meanings[".".join(names)][1].append(comment)
    return meanings


def _entry(left, lines):
    left, lines = f"  {left}".ljust(32), lines or [""]
    # Beside what is explained, or below it if that is long.
    if left.endswith(" "):
        left, lines = left + lines[0], lines[1:]
    return "\n".join([left, *(" " * 32 + line for line in lines)]).rstrip()


# What each script takes

def _train(given):
    cfg = load(given)
    for path in given.paths:
        if os.path.isdir(path) and not cfg.resume and Path(cfg.out_dir) == run_folder(path):
            raise ValueError(f"{path}: to go on with this run add --resume; for another one with "
                             "its settings --out_dir=NEW" + (
                                 f", which --init={path} starts from here" * names_step(path)))
    check_training(cfg)
    return cfg


def _latents(given):
    cfg = load(given)
    values = config.flat(cfg)
    check_sources(values | {"data.latents": ""})
    for data in config.data_sets(cfg.data):
        if data.latents:
            check_target(data.latents, folder=True)
    return cfg


def _decoder(given):
    cfg = load(given)
    at_top, own = cfg.given.get("out_dir"), cfg.given.get("decoder.out_dir")
    out = cfg.out_dir if at_top == config.COMMAND_LINE != own else cfg.decoder.out_dir
    goes_on = cfg.resume and Path(out, "config.yaml").is_file()
    if not cfg.data.latents and not goes_on:
        raise ValueError("a decoder is trained on stored latents: store them with python latents.py"
                         " config.yaml, then give --data.latents=FOLDER")
    # The frames lie where those of the latents did; the base model is not needed.
    check_sources(config.flat(cfg) | {"model.checkpoint": "random", "data.path": ()})
    check_packages(config.flat(cfg) | {"optimizer": "adamw"})
    check_target(out, folder=True)
    return cfg


def _droid(given):
    """Adds `command` and `cfg`. For inspect, paths that are neither recipes nor run folders are
    data.path."""
    usage = "python droid.py inspect FOLDER [RECIPE.yaml …] [--key=value …]"
    given.command, *paths = given.paths or [""]
    if given.command == "copy":
        return _copy(given, paths)
    if given.command != "inspect":
        raise ValueError(f"{given.command or 'droid.py'}: no command; there are: {usage}; "
                         f"{COPY} (--help explains them)")
    given.paths = [path for path in paths if _is_recipe(path)]
    data = [path for path in paths if not _is_recipe(path)]
    keys = [key for key in given.keys if key.startswith("--data.path=")]
    if data and keys:
        raise ValueError(f"{data[0]}: data.path is also given as {keys[0]}; leave one out")
    if not (data or keys or given.paths):
        raise ValueError(f"name a folder of data: {usage}")
    if data:
        # What a recipe says of its own data sets does not apply to others.
        own = load(SimpleNamespace(paths=given.paths, keys=[])).data
        own_weights = own.weights and not any("--data.weights=" in key for key in given.keys)
        given.keys += ["--data.latents="] * bool(own.latents)
        given.keys += ["--data.weights=[]"] * bool(own_weights)
        given.keys.append(f"--data.path={data[0] if len(data) == 1 else _list(data)}")
    given.debug, given.cfg = False, load(given)
    check_sources(config.flat(given.cfg) | {"model.checkpoint": "random"})
    if "out" in given.options:
        given.options["out"] = expand_home(given.options["out"])
        check_target(given.options["out"], folder=True)
    return given


def _copy(given, paths):
    """Adds `cfg` and leaves the two paths."""
    others = [key for key in given.keys if not key.startswith("--data.retry_minutes=")]
    others += [f"--{name}" for name in given.options]
    if len(paths) != 2:
        raise ValueError(f"copy takes 2 paths, got {len(paths)}: {COPY}")
    if others:
        raise ValueError(f"{others[0]} does not apply to copy; --data.retry_minutes does")
    if is_remote(paths[1]):
        raise ValueError(f"{paths[1]}: copy writes into a folder of this machine: {COPY}")
    check_target(paths[1], folder=True)
    given.paths, given.debug, given.cfg = paths, False, config.load(given.keys)
    return given


def _list(paths):
    simple = all(re.fullmatch(r"[\w./~+-][\w./~:*+-]*", path) for path in paths)
    return f"[{','.join(paths)}]" if simple else json.dumps(paths, ensure_ascii=False)


def _is_recipe(path):
    """Whether a path is a recipe or a run folder, and no data set, which may hold a config.yaml."""
    if not os.path.isdir(path):
        return path.endswith((".yaml", ".yml"))
    try:
        run = run_folder(path)
    except ValueError:
        return False
    others = [*run.glob("*.npz"), *run.glob("*.tfrecord*"), *run.glob("meta/info.json")]
    return all(name.name == "landscapes.npz" for name in others)


def _export(given):
    """Adds `command`, `cfg` and for package `steps`, `trajectories` and `decoder`."""
    usage = "; ".join(f"python export.py {name} {paths}" for name, (paths, _) in COMMANDS.items())
    if not given.paths:
        raise ValueError(f"name a command: {usage} (--help explains them)")
    given.command, *given.paths = given.paths
    if given.command not in COMMANDS:
        raise ValueError(f"{given.command}: no command; there are {', '.join(COMMANDS)} "
                         "(--help explains them)")
    wanted, options = COMMANDS[given.command]
    n_wanted, n = len(wanted.split()), len(given.paths)
    if n != n_wanted and (given.command, n) != ("merge", 2):
        raise ValueError(f"{given.command} takes {n_wanted} paths, got {n}: "
                         f"python export.py {given.command} {wanted}")
    ignored = [f"--{name}" for name in given.options if name not in options]
    if given.command in ("adapter", "verify"):
        ignored += given.keys
    if ignored:
        raise ValueError(f"{ignored[0]} does not apply to {given.command}")
    return _EXPORTS[given.command](given)


def _slim(given):
    source, target = given.paths
    given.dtype = given.options.get("dtype", "bf16")
    choices = config.CHOICES["precision"]
    if given.dtype not in choices:
        raise ValueError(f"--dtype={given.dtype}: choose from {', '.join(choices)}")
    given.cfg = config.load(given.keys)
    check_base(source)
    check_target(target, sources=[source])
    return given


def _baseline(given):
    recipe, target = given.paths
    given.paths = [recipe]
    given.cfg = load(given)
    given.paths = [target]
    check_base(given.cfg.model.checkpoint)
    check_target(target, new=True)
    return given


def _adapter(given):
    check_adapter(given.paths[0])
    check_target(given.paths[1], new=True)
    return given


def _merge(given):
    *recipe, step, target = given.paths
    check_adapter(step)
    given.paths = recipe or [run_folder(step)]
    given.cfg = load(given)
    given.paths = [step, target]
    check_base(given.cfg.model.checkpoint)
    check_target(target, sources=[given.cfg.model.checkpoint])
    return given


def _package(given):
    run, trajectories = given.paths[0], given.options.get("trajectories", "16")
    if not os.path.isdir(run):
        raise ValueError(f"{run}: no such folder; {RUN}")
    given.cfg = load(given)
    run = run_folder(run)
    steps = given.options.get("steps") or ",".join(map(str, [0, *main_steps(given.cfg, run)]))
    folders = step_folders(run, steps)
    numbers = [about_best(f)[0] if f.name == STEP_BEST else int(f.name[5:]) for f in folders]
    given.paths, given.steps = [run], list(dict.fromkeys(numbers))
    if not re.fullmatch(r"0*[1-9]\d{0,8}", trajectories):
        raise ValueError(f"--trajectories={trajectories}: give a whole number from 1")
    given.trajectories = int(trajectories)
    decoder = given.options.get("decoder", "")
    given.decoder = decoder and decoder_in(expand_home(decoder))
    check_target(".", folder=True)
    check_sources(config.flat(given.cfg) | {"data.latents": ""})
    return given


def _verify(given):
    if not os.path.exists(given.paths[0]):
        raise ValueError(f"{given.paths[0]}: no such file or folder")
    return given


_EXPORTS = {"slim": _slim, "baseline": _baseline, "adapter": _adapter, "merge": _merge,
            "package": _package, "verify": _verify}
