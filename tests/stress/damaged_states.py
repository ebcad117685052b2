"""Steps that a program has damaged, not a disk: their files can be read, and their sums are right.
Part of damaged_checkpoints.py."""
import hashlib
import json

import torch
from safetensors.torch import load_file, save_file


FILES = ["adapter_config.json", "adapter_model.safetensors", "state.pt", "SHA256SUMS"]


def with_sums(damage):
    """The damage, with SHA256SUMS of what it leaves."""
    def both(folder, other):
        damage(folder)
        (folder / "SHA256SUMS").write_text("".join(
            f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n"
            for name in FILES[:3]))
    return both


def state(change, pick=lambda content: content):
    """change(the dict in state.pt) alters it; pick(it) is saved."""
    def damage(folder):
        content = torch.load(folder / "state.pt", weights_only=False)
        change(content)
        torch.save(pick(content), folder / "state.pt")
    return with_sums(damage)


def tensors(change):
    def damage(folder):
        path = folder / "adapter_model.safetensors"
        state = load_file(path)
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        # torch.load and load_file map the file that is about to be written.
        state = change({name: tensor.clone() for name, tensor in state.items()})
        state = {name: tensor.contiguous() for name, tensor in state.items()}
        save_file(state, path, header["__metadata__"])
    return with_sums(damage)


def peft(**values):
    def damage(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return with_sums(damage)


def first(optimizer):
    """The state of the first parameter in an optimizer's state."""
    return next(iter(optimizer["state"].values()))


def whole_states():
    """{name: damage} of steps with right sums: each ends in a line, or is taken at its word."""
    keys = ["step", "ranks", "optimizer", "optimizer_name", "scaler", "base", "history"]
    found = {f"state without {key}": state(lambda s, key=key: s.pop(key)) for key in keys}
    for value in (None, "text", -1, 1e400, [], {}, torch.zeros(3), ["text"], [{}], {"a": 1}):
        for key in keys:
            found[f"state with {key}={str(value)[:12]}"] = state(
                lambda s, key=key, value=value: s.update({key: value}))
    rank = {"rng": [None, torch.zeros(4), torch.zeros(7, dtype=torch.uint8), torch.zeros(5056)],
            "data": [{}, {"round": "0", "index": 0, "count": 0}, [0]], "cuda_rng": ["text"]}
    for key, values in rank.items():
        for value in values:
            found[f"rank with {key}={str(value)[:12]}"] = state(
                lambda s, key=key, value=value: s["ranks"][0].update({key: value}))
    for key in ("round", "index", "count"):
        for value in (-1, 10 ** 12, 10 ** 30, 0.5, True):
            found[f"data with {key}={value}"] = state(
                lambda s, key=key, value=value: s["ranks"][0]["data"].update({key: value}))
    era = {"lora.rank": "4", "batch_size": 0, "nonsense": 1, "seed": None, "max_steps": -3,
           "data.keys.pose": 7, "milestones": 3, "precision": "fp1", "lora.targets": []}
    for key, value in era.items():
        found[f"settings with {key}={value}"] = state(
            lambda s, key=key, value=value: s["history"][-1]["settings"].update({key: value}))
    return found | {
        "state is a list": state(len, lambda s: [1]),
        "state is a text": state(len, lambda s: s["base"]),
        "settings are missing": state(lambda s: s["history"][-1]["settings"].clear()),
        "moments of another shape": state(
            lambda s: first(s["optimizer"]).update(exp_avg=torch.zeros(3, 3))),
        "moments of text": state(lambda s: first(s["optimizer"]).update(exp_avg="text")),
        "moments that are missing": state(lambda s: first(s["optimizer"]).pop("exp_avg")),
        "moments that are not finite": state(
            lambda s: first(s["optimizer"])["exp_avg"].fill_(float("nan"))),
        "no parameter group": state(lambda s: s["optimizer"]["param_groups"].clear()),
        "fewer parameters": state(lambda s: s["optimizer"]["param_groups"][0]["params"].pop()),
        "a rate of text": state(lambda s: s["optimizer"]["param_groups"][0].update(betas="text")),
        "adapter of rank 2": tensors(lambda t: {k: v[:2] if "_A" in k else v[:, :2]
                                                for k, v in t.items()}),
        "adapter of half the layers": tensors(lambda t: dict(list(t.items())[::2])),
        "adapter that is not finite": tensors(lambda t: {k: v / 0 for k, v in t.items()}),
        "adapter of integers": tensors(lambda t: {k: v.int() for k, v in t.items()}),
        "adapter without tensors": tensors(lambda t: {}),
        "r of 8": peft(r=8), "r of text": peft(r="4"), "r of 10^30": peft(r=10 ** 30),
        "alpha of 1e400": peft(lora_alpha=1e400), "alpha is missing": peft(lora_alpha=None),
        "adapter is DoRA": peft(use_dora=True), "targets of a number": peft(target_modules=7),
    }
