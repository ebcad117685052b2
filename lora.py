"""Low-rank adapters (arXiv:2106.09685), by hand: inject, save, load, merge.

    names = lora.inject(predictor, rank=16, alpha=32)   # freezes it, adapts 96 layers of ViT-g's
    lora.save("step_1000", predictor)                   # a PEFT folder
    lora.load(predictor, "step_1000")                   # injects where needed

A layer computes y = x Wᵀ + b + s · dropout(x) Aᵀ Bᵀ with W and b frozen, A random and B zero at the
start, so that training starts at the base model. s is alpha / √rank (rank-stabilised,
arXiv:2312.03732) or alpha / rank. Adapters are float32 whatever the base is. Folders are PEFT's.
"""
import io
import json
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from config import LoraConfig
from files import write_file, write_safetensors
from files.peft import PREFIX, open_adapter, read  # noqa: F401 (lora.read is public)
from files.pickled import printable


class LoRALinear(nn.Linear):
    """y = x Wᵀ + b + s · dropout(x) Aᵀ Bᵀ. It shares the tensors W and b with the layer that it
    replaces, so checkpoint names stay as they are."""

    def __init__(self, base, rank, scale, dropout):
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scale, self.dropout = scale, dropout
        kind = dict(dtype=torch.float32, device=base.weight.device)
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **kind))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **kind))
        nn.init.kaiming_uniform_(self.lora_A, a=5 ** 0.5)
        self.train(base.training)

    def forward(self, x):
        dropped = F.dropout(x, self.dropout, self.training)
        low_rank = self.scale * F.linear(dropped, self.lora_A.to(x.dtype))      # [..., rank]
        return super().forward(x) + F.linear(low_rank, self.lora_B.to(low_rank.dtype))


def adapted_layers(module):
    """{name: LoRALinear} of all adapted layers inside `module`."""
    return {name: m for name, m in module.named_modules() if isinstance(m, LoRALinear)}


def _replace(module, name, layer):
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, layer)


def inject(module, rank=16, alpha=32.0, dropout=0.0, targets=LoraConfig.targets, rslora=True):
    """Freezes `module` and adapts, in place, every nn.Linear whose name is a target or ends in
    ".target". Returns their names. Raises ValueError if a target matches nothing."""
    if adapted_layers(module):
        raise ValueError("this module is already adapted; call lora.remove(module) first")
    targets = tuple(targets)
    linear = [name for name, m in module.named_modules() if type(m) is nn.Linear]
    chosen = set()
    for target in targets:
        found = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not found:
            endings = sorted({".".join(name.split(".")[-2:]) for name in linear})
            raise ValueError(f"lora.targets: {target!r} matches no linear layer; there are "
                             f"{', '.join(endings)}")
        chosen.update(found)
    module.requires_grad_(False)
    scale, names = alpha / rank ** (0.5 if rslora else 1), [n for n in linear if n in chosen]
    for name in names:
        _replace(module, name, LoRALinear(module.get_submodule(name), rank, scale, dropout))
    module.lora_config = LoraConfig(rank, float(alpha), rslora, dropout, targets)
    return names


def remove(module):
    """Takes all adapters out, in place: the base model again, in its own tensors."""
    for name, layer in adapted_layers(module).items():
        _replace(module, name, _plain_linear(layer, layer.weight))


def _plain_linear(layer, weight):
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    plain.weight, plain.bias = weight, layer.bias
    return plain.train(layer.training)


@torch.no_grad()
def merge(module):
    """Replaces every adapted layer by a plain nn.Linear with W + s · B A, computed in float32.

    Returns {name: adapted layer} for `unmerge`. Raises ValueError unless the base is float32:
    rounding the sum to bf16 would lose most of a small update."""
    layers = adapted_layers(module)
    for name, layer in layers.items():
        if layer.weight.dtype != torch.float32:
            raise ValueError(f"merge needs float32 base weights, {name} has {layer.weight.dtype}; "
                             "load the base with dtype=torch.float32")
    for name, layer in layers.items():
        merged = layer.weight + layer.scale * layer.lora_B @ layer.lora_A
        _replace(module, name, _plain_linear(layer, nn.Parameter(merged, requires_grad=False)))
    return layers


def unmerge(module, layers):
    """Puts the layers that `merge` returned back: exactly the model from before."""
    for name, layer in layers.items():
        _replace(module, name, layer)


@torch.no_grad()
def update_norm(module):
    """||s B A|| / ||W|| over all adapted layers: the size of the update; 0 without any."""
    update, weights = 0.0, 0.0
    for layer in adapted_layers(module).values():
        A, B = layer.lora_A.double(), layer.lora_B.double()
        # ||B A||² = sum(BᵀB ∘ AAᵀ): rank × rank, where B A would be as large as W.
        update += layer.scale ** 2 * ((B.T @ B) * (A @ A.T)).sum().item()
        weights += layer.weight.float().square().sum().item()
    return (max(0.0, update) / weights) ** 0.5 if weights else 0.0


# PEFT's files

def adapter_state(module):
    """{PEFT's name: tensor} of all adapters, on their device, not copied."""
    return {f"{PREFIX}{name}.lora_{which}.weight": getattr(layer, f"lora_{which}").detach()
            for name, layer in adapted_layers(module).items() for which in "AB"}


def save(folder, module, base=""):
    """Writes the adapters of `module` as a PEFT folder. Raises OSError."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, data in adapter_files(module, base).items():
        write_file(Path(folder) / name, data)


def adapter_files(module, base=""):
    """{file name: bytes} of the PEFT folder of `module`'s adapters; equal adapters, equal bytes.

    base: path or name of the base model. Its fingerprint goes into the header; `load` checks it."""
    if not adapted_layers(module):
        raise ValueError("no adapters to save: call lora.inject on this module first")
    lora = module.lora_config
    peft = dict(peft_type="LORA", task_type=None, inference_mode=True,
                base_model_name_or_path=base, r=lora.rank, lora_alpha=lora.alpha,
                lora_dropout=lora.dropout, use_rslora=lora.rslora,
                target_modules=list(lora.targets), bias="none", fan_in_fan_out=False)
    state, buffer = adapter_state(module), io.BytesIO()
    header = {"format": "pt", "base_fingerprint": getattr(module, "base_fingerprint", "")}
    write_safetensors(buffer, sorted(state), state.__getitem__, header)
    return {"adapter_model.safetensors": buffer.getvalue(),
            "adapter_config.json": json.dumps(peft, indent=2).encode()}


@torch.no_grad()
def load(module, folder, any_base=False):
    """Reads a PEFT LoRA folder into `module`, injecting the layers that it names if it has none.

    Raises ValueError, before anything is changed, if the folder is incomplete, no plain LoRA, of
    another base (unless any_base), not finite, or has other layers or another rank than those that
    are there already."""
    linear = {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}
    present, shapes = adapted_layers(module), {}
    with open_adapter(folder) as (peft, found, tensor, base):
        ours = getattr(module, "base_fingerprint", "")
        if base and ours and base != ours and not any_base:
            raise ValueError(f"{folder}: trained on another base model (fingerprint "
                             f"{printable(base)}, not {printable(ours)}); give the checkpoint "
                             "that it was trained on")
        layers = sorted({name.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for name in found})
        for name in present or layers:
            if name not in linear:
                raise ValueError(f"{folder}: adapts {printable(name)}, which this model does not "
                                 "have")
            shapes[f"{PREFIX}{name}.lora_A.weight"] = (peft["r"], linear[name].in_features)
            shapes[f"{PREFIX}{name}.lora_B.weight"] = (linear[name].out_features, peft["r"])
        if present:
            trained = {"rank": peft["r"], "alpha": float(peft["lora_alpha"]),
                       "rslora": peft["use_rslora"]}
            for key, value in trained.items():
                if value != getattr(module.lora_config, key):
                    raise ValueError(f"{folder}: was trained with another LoRA {key}; "
                                     f"set --lora.{key}={str(value).lower()}")
        if found != shapes:
            wrong = sorted({name for name, _ in found.items() ^ shapes.items()})
            raise ValueError(f"{folder}: the adapter does not fit the model's layers: {len(wrong)} "
                             "names or shapes differ "
                             f"({', '.join(map(printable, wrong[:2]))}, …)")
        # all of them are read and checked before the first is used
        state = {name: tensor(name) for name in found}
    if not present:
        inject(module, peft["r"], peft["lora_alpha"], peft["lora_dropout"], layers,
               peft["use_rslora"])
    for name, layer in adapted_layers(module).items():
        layer.lora_A.copy_(state[f"{PREFIX}{name}.lora_A.weight"])
        layer.lora_B.copy_(state[f"{PREFIX}{name}.lora_B.weight"])
