"""Adapter folders as PEFT writes them: adapter_config.json and adapter_model.safetensors.

An adapter is a few matrices, and the config says what they mean: which base they were trained on,
how they enter the output. Here they mean W + s · B A on the base as it is. So a config is refused
unless every key that is set is known to leave that meaning alone, those of later versions included.
"""
import math
import re
from contextlib import contextmanager
from pathlib import Path

from files.pickled import printable
from files.reading import file_size, parse_json, read_bytes, shown
from files.sums import SUMS, check_sums, read_sums
from files.weights import FLOATS, is_finite, open_safetensors


NAMES = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."        # PEFT puts it before every module name
CONFIG_LIMIT = 1 << 20              # bytes
TENSORS_LIMIT = 1 << 30             # bytes: rank 16 on 96 layers of ViT-g's predictor has 25 MB

# Keys of PEFT's LoraConfig whose values do not change what the tensors mean.
HARMLESS = {
    # for people and for PEFT's own bookkeeping
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision",
    "runtime_config", "task_type",
    # which layers are adapted: the names of the tensors say so
    "exclude_modules", "layers_pattern", "layers_to_transform", "target_modules",
    # options of other keys, without effect unless those are set
    "megatron_core", "qalora_group_size",
    # details of a start that init_lora_weights names; they stay when PEFT has converted an adapter
    "corda_config", "eva_config", "lora_ga_config",
    # about weights that two layers share; the networks here have none
    "ensure_weight_tying",
}
# Starts that leave the base weights as they are. Others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA …)
# take a part out of them, so the adapter fits another base.
HARMLESS_STARTS = {"true", "false", "none", "gaussian", "orthogonal", "eva", "mica"}
# These switch a variant on even when they are empty: PEFT takes {} for "with its defaults".
ON_WHEN_EMPTY = {"arrow_config", "kasa_config", "monteclora_config", "use_bdlora", "velora_config"}

CURES = {
    "alora_invocation_tokens": "it acts on some tokens only; train one without this key",
    "bias": "train with bias='none'",
    "use_dora": "PEFT's save_as_lora(folder, model, rank=…) makes a plain one that is close to it",
    "rank_pattern": "train with one rank for all layers",
    "alpha_pattern": "train with one alpha for all layers",
}
CONVERTIBLE = ("pissa", "olora", "corda", "lora_ga")
CONVERT = ("it was trained on changed base weights; PEFT saves it as plain LoRA with "
           "save_pretrained(folder, path_initial_model_for_weight_conversion=FOLDER), where FOLDER "
           "holds the adapter as it was before training")
OTHER_START = "that may change the base weights; train one with init_lora_weights=True"


def read(folder):
    """(adapter_config.json, {PEFT's name: tensor}, the base's fingerprint or "") of a PEFT folder.
    Raises ValueError as `open_adapter`."""
    with open_adapter(folder) as (config, shapes, tensor, base):
        return config, {name: tensor(name) for name in shapes}, base


@contextmanager
def open_adapter(folder):
    """Yields (adapter_config.json, {PEFT's name: shape}, read(name) -> tensor on the CPU, the
    base's fingerprint or "").

    No value is read before it is asked for. Raises ValueError in one line if the folder is
    incomplete or damaged, or no plain LoRA; `read` if a value is not finite in float32."""
    folder = Path(folder)
    weights = folder / "adapter_model.safetensors"
    try:
        data = read_bytes(folder / "adapter_config.json", CONFIG_LIMIT)
        size = file_size(weights)
    except FileNotFoundError:
        raise ValueError(f"{folder}: not an adapter folder: adapter_config.json and "
                         f"adapter_model.safetensors must be in it{_hint(folder)}") from None
    try:
        config = parse_json(data, "adapter_config.json")
    except ValueError as error:
        raise ValueError(f"{folder}: the adapter is cut short or damaged ({error})") from None
    sums = {name: digest for name, digest in read_sums(folder).items() if name in NAMES}
    try:
        check_sums(folder, sums)
    except ValueError as error:
        raise ValueError(f"{error}; copy it again (if it was edited, remove {SUMS})") from None
    _check_meaning(folder, config)
    if size > TENSORS_LIMIT:
        raise ValueError(f"{weights}: has {size:,} bytes, more than the {TENSORS_LIMIT:,} that are "
                         "read of an adapter; is it the right file?")
    with open_safetensors(weights) as (file, kinds):
        _check_tensors(folder, config, kinds)

        def read(name):
            tensor = file.get_tensor(name)
            # adapters are float32 here, whatever they are in the file
            if not is_finite(tensor.float()):
                raise ValueError(f"{folder}: tensor {name} is not finite (NaN or infinite in "
                                 "float32); the training went wrong, take an earlier step")
            return tensor

        base = (file.metadata() or {}).get("base_fingerprint", "")
        yield config, {name: shape for name, (shape, _) in kinds.items()}, read, base


def _hint(folder):
    """What is there instead, for the end of a sentence."""
    if folder.is_file():
        return f"; this is a file, give its folder {folder.parent}"
    if not folder.is_dir():
        return "; there is no such folder"
    pickled = folder / "adapter_model.bin"
    if pickled.is_file():
        code = (f"import torch, safetensors.torch as s; s.save_file(torch.load('{pickled}', "
                f"weights_only=True), '{folder / 'adapter_model.safetensors'}')")
        return f'; adapter_model.bin is an older form, convert it with: python -c "{code}"'
    found = sorted(path.parent for pattern in ("*/", "*/*/")
                   for path in folder.glob(f"{pattern}adapter_config.json"))
    if found:
        return f"; give the folder below it: {', '.join(map(str, found[:3]))}" + (
            ", …" if len(found) > 3 else "")
    missing = [name for name in NAMES if not (folder / name).exists()]
    return f"; there is no {' and no '.join(missing)}; copy the adapter again"


def _check_meaning(folder, config):
    """Raises ValueError unless the config says W + s · B A, with numbers that can be."""
    def refuse(key, cure):
        raise ValueError(f"{folder}: only plain LoRA is read, and this adapter has {key}: "
                         f"{shown(config.get(key))}; {cure}")

    if config.get("peft_type") != "LORA":
        refuse("peft_type", "it must be 'LORA'; PEFT's save_as_lora(folder, model, rank=…) makes "
                            "one that is close to it")
    for key, low, high, default in (("r", 1, 1 << 16, None), ("lora_alpha", 1e-9, 1e9, None),
                                    ("lora_dropout", 0, 0.9999, 0.0)):
        value = default if config.get(key) is None else config[key]
        types = (int,) if key == "r" else (int, float)
        # the type first: a bool is an int, and NaN is in no range
        if type(value) not in types or not low <= value <= high:
            what = "whole number" if key == "r" else "number"
            raise ValueError(f"{folder}: {key} in adapter_config.json is {shown(value)}, expected "
                             f"a {what} from {low:g} to {high:g}; it is damaged or not PEFT's")
        config[key] = value
    # as in PEFT, what is absent or null is off
    config["use_rslora"] = rslora = config.get("use_rslora") or False
    if type(rslora) is not bool:
        raise ValueError(f"{folder}: use_rslora in adapter_config.json is {shown(rslora)}, "
                         "expected true or false")
    start = str(config.get("init_lora_weights", True)).lower()
    if start not in HARMLESS_STARTS:
        refuse("init_lora_weights", CONVERT if start.startswith(CONVERTIBLE) else OTHER_START)
    known = HARMLESS | {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora",
                        "init_lora_weights"}
    for key, value in config.items():
        unset = not value and not (key in ON_WHEN_EMPTY and value == {})
        if key not in known and not unset and (key, value) != ("bias", "none"):
            refuse(shown(key)[1:-1], CURES.get(key, "what that does to the layers is not known "
                                                    "here; train one without this key"))


def _check_tensors(folder, config, kinds):
    """Raises ValueError unless the tensors are pairs A [r, in] and B [out, r] of target layers.

    kinds: {name: (shape, safetensors' name of the dtype)}."""
    layers = {}
    for name, (shape, dtype) in kinds.items():
        found = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", name)
        if not found:
            raise ValueError(f"{folder}: tensor {printable(name)} is not named "
                             f"{PREFIX}LAYER.lora_A.weight or lora_B.weight, as PEFT's "
                             "save_pretrained names them")
        if dtype not in FLOATS:
            raise ValueError(f"{folder}: tensor {printable(name)} is {dtype}, expected floating "
                             "point")
        layers.setdefault(found[1], {})[found[2]] = shape
    r, targets, numbers = (config.get(k) for k in ("r", "target_modules", "layers_to_transform"))
    numbers = [numbers] if type(numbers) is int else numbers
    if not layers:
        raise ValueError(f"{folder}: adapter_model.safetensors holds no tensors; copy it again")
    for layer, shapes in layers.items():
        A, B = shapes.get("A"), shapes.get("B")
        if A is None or B is None:
            which = "A" if A is None else "B"
            raise ValueError(f"{folder}: layer {printable(layer)} has no lora_{which}; copy the "
                             "adapter again")
        if len(A) != 2 or len(B) != 2 or A[0] != r or B[1] != r or not math.prod(A + B):
            raise ValueError(f"{folder}: layer {printable(layer)} has lora_A {list(A)} and lora_B "
                             f"{list(B)}, which does not fit r = {r}: expected [r, in], [out, r]")
        # a text is a regular expression or "all-linear"
        if isinstance(targets, list) and not any(
                layer == target or layer.endswith(f".{target}") for target in targets):
            raise ValueError(f"{folder}: has tensors of layer {printable(layer)}, which its "
                             f"target_modules {shown(targets)} do not name; copy the adapter again")
        # PEFT takes the first number in a name for the layer's, unless a target is the whole name
        number = next((int(part) for part in layer.split(".") if part.isdecimal()), None)
        if isinstance(targets, list) and layer not in targets and numbers and number not in numbers:
            raise ValueError(f"{folder}: has tensors of layer {printable(layer)}, which its "
                             f"layers_to_transform {shown(numbers)} leaves out; copy the adapter "
                             "again")
