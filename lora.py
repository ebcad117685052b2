"""Low-rank adapters (arXiv:2106.09685), by hand: inject, save, load, merge.

    names = lora.inject(predictor, rank=16, alpha=32)   # freezes it and adapts 96 layers of ViT-g's predictor
    lora.save("step_1000", predictor)                   # adapter_model.safetensors + adapter_config.json
    lora.load(predictor, "step_1000")                   # injects where needed; reads PEFT's folders too

A layer computes y = x Wᵀ + b + s · dropout(x) Aᵀ Bᵀ with W and b frozen, A random and B zero at the start,
so that training starts at the base model. s is alpha / √rank (rank-stabilised, arXiv:2312.03732) or alpha / rank.
Adapters are float32 whatever the base is. The folder is PEFT's, so `PeftModel.from_pretrained` reads it.

Training `fold`s the update into a copy of the weights: y = x (W + s B A)ᵀ + b is then one matrix product, and the gradients of A and B
come through the rank. In half precision that copy is rounded, by about as much as the weights were; so what is measured
(validation, landscapes) is computed by the formula, in which base and adapted model share their weights. Dropout drops the same
inputs for all tokens of a micro-batch, on A's columns; PEFT draws anew for each token.
"""
import json
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

import folded
from config import LoraConfig
from files import write_file
from vjepa2_src.attention import has_kernels

PREFIX = "base_model.model."        # PEFT puts it before every module name


class LoRALinear(nn.Linear):
    """A linear layer that shares the tensors of the one it replaces, so checkpoint names stay as they are."""

    def __init__(self, base, rank, scale, dropout):
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scale, self.dropout = scale, dropout
        kind = dict(dtype=torch.float32, device=base.weight.device)
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **kind))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **kind))
        nn.init.kaiming_uniform_(self.lora_A, a=5 ** 0.5)
        self.keep = torch.ones(base.in_features, **kind)                        # of the inputs: 0 or 1 / (1 - dropout)
        self.folded, self.kernels = None, False                                 # W + s B A, and whether Triton kernels take it: `fold`
        self.train(base.training)

    def forward(self, x):
        if self.folded is not None and self.training:
            return folded.LinearFunction.apply(*self.parts(x))
        A = self._A()
        low = F.linear(x, A.to(x.dtype))                                        # [..., rank]
        return super().forward(x) + self.scale * F.linear(low, self.lora_B.to(low.dtype))

    def _A(self):
        return self.lora_A * self.keep if self.training and self.dropout else self.lora_A       # drops inputs without touching x

    def parts(self, x):
        """x, W + s B A, bias, A, B, all of the dtype to compute in, and s: as the functions of folded.py take them."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.folded.dtype
        x, weight, A, B = (tensor.to(dtype) for tensor in (x, self.folded, self._A(), self.lora_B))
        return x, weight, None if self.bias is None else self.bias.to(dtype), A, B, self.scale


def _adapted(module):
    return {name: m for name, m in module.named_modules() if isinstance(m, LoRALinear)}


def _replace(module, name, layer):
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, layer)


def inject(module, rank=16, alpha=32.0, dropout=0.0, targets=LoraConfig.targets, rslora=True):
    """Freezes `module` and adapts, in place, every nn.Linear whose name is a target or ends in ".target".

    Returns the names of the adapted layers. Raises ValueError if a target matches nothing."""
    targets = tuple(targets)
    linear = [name for name, m in module.named_modules() if type(m) is nn.Linear]
    chosen = {target: [n for n in linear if n == target or n.endswith(f".{target}")] for target in targets}
    for target, names in chosen.items():
        if not names:
            endings = sorted({".".join(n.split(".")[-2:]) for n in linear})
            adapted = " (already adapted?)" if _adapted(module) else ""
            raise ValueError(f"lora.targets: {target!r} matches no linear layer{adapted}; there are {', '.join(endings)}")
    module.requires_grad_(False)
    scale = alpha / rank ** (0.5 if rslora else 1)
    names = [name for name in linear if any(name in found for found in chosen.values())]
    for name in names:
        _replace(module, name, LoRALinear(module.get_submodule(name), rank, scale, dropout))
    for part in module.modules():
        if type(part) in folded.FUSED:
            part.__class__ = folded.FUSED[type(part)]
    module.lora_config = LoraConfig(rank, float(alpha), rslora, dropout, targets)
    return names


def adapter_state(module):
    """{PEFT's name: tensor} of all adapters, on their device, not copied."""
    return {f"{PREFIX}{name}.lora_{which}.weight": getattr(layer, f"lora_{which}").detach()
            for name, layer in _adapted(module).items() for which in "AB"}


@torch.no_grad()
def fold(module, write=None):
    """Draws dropout anew and puts W + s B A beside each adapter's W, for the training mode's calls until it is called again: once
    for each micro-batch. write: `folded.write_folded`, maybe compiled."""
    for layer in _adapted(module).values():
        A = layer.lora_A
        if layer.dropout:
            layer.keep.bernoulli_(1 - layer.dropout).div_(1 - layer.dropout)
            A = A * layer.keep
        if layer.folded is None:
            layer.folded = torch.empty_like(layer.weight)
        layer.kernels = has_kernels(layer.folded)
        (write or folded.write_folded)(layer.folded, layer.weight, A, layer.lora_B, layer.scale)


def save(folder, module, base=""):
    """Writes the adapters of `module` as a PEFT folder: `files`. Raises OSError if the disk is full."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, data in files(module, base).items():
        write_file(Path(folder) / name, data)


def files(module, base=""):
    """{file name: bytes} of the PEFT folder of `module`'s adapters.

    base: path or name of the base model, for the reader. The base's fingerprint goes into the
    safetensors header, where `load` checks it."""
    lora = module.lora_config
    peft = dict(peft_type="LORA", task_type=None, inference_mode=True, base_model_name_or_path=base,
                r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, use_rslora=lora.rslora,
                target_modules=list(lora.targets), bias="none", fan_in_fan_out=False)
    state = {name: tensor.cpu().contiguous() for name, tensor in adapter_state(module).items()}
    header = {"format": "pt", "base_fingerprint": getattr(module, "base_fingerprint", "")}
    return {"adapter_model.safetensors": to_safetensors(state, header),
            "adapter_config.json": json.dumps(peft, indent=2).encode()}


def read(folder):
    """adapter_config.json, {PEFT's name: tensor} and the base's fingerprint ("" if unknown) of a PEFT LoRA folder.

    Raises ValueError if the folder is incomplete or uses what plain LoRA has not."""
    folder = Path(folder)
    try:
        peft = json.loads((folder / "adapter_config.json").read_text())
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            base = (file.metadata() or {}).get("base_fingerprint", "")
            state = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise ValueError(f"{folder}: not an adapter folder: adapter_config.json and "
                         "adapter_model.safetensors must be in it") from None
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{folder}: the adapter is cut short or damaged ({error}); copy it again") from None
    extras = [key for key in ("use_dora", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern",
                              "fan_in_fan_out") if peft.get(key)]
    if peft.get("peft_type") != "LORA" or peft.get("bias", "none") != "none" or extras:
        raise ValueError(f"{folder}: only plain LoRA is read, this adapter is {peft.get('peft_type')} with "
                         f"{', '.join(extras) or 'trained biases'}")
    return peft, state, base


def load(module, folder):
    """Reads a PEFT LoRA folder into `module`, injecting the layers that it names if there are none yet.

    Raises ValueError, before anything is changed, if the folder is incomplete, uses what plain LoRA has
    not, was trained on another base, or has other layers or another rank than those already there."""
    peft, state, base = read(folder)
    ours = getattr(module, "base_fingerprint", "")
    if base and ours and base != ours:
        raise ValueError(f"{folder}: trained on another base model (fingerprint {base}, this one is {ours}); "
                         "give the checkpoint that it was trained on")
    linear = {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}
    layers = sorted({name.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for name in state})
    there = _adapted(module)
    expected = {}
    for name in there or layers:
        if name not in linear:
            raise ValueError(f"{folder}: adapts {name}, which this model does not have")
        expected[f"{PREFIX}{name}.lora_A.weight"] = (peft["r"], linear[name].in_features)
        expected[f"{PREFIX}{name}.lora_B.weight"] = (linear[name].out_features, peft["r"])
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    trained = {"rank": peft["r"], "alpha": float(peft["lora_alpha"]), "rslora": peft.get("use_rslora", False)}
    for key, value in trained.items() if there else ():
        if value != getattr(module.lora_config, key):
            raise ValueError(f"{folder}: was trained with another LoRA {key}; set --lora.{key}={str(value).lower()}")
    if not state or found != expected:
        wrong = sorted(name for name, _ in found.items() ^ expected.items())
        raise ValueError(f"{folder}: the adapter does not fit the model's layers: "
                         f"{len(wrong)} names or shapes differ ({', '.join(wrong[:2])}, …)")
    if not there:
        inject(module, peft["r"], peft["lora_alpha"], peft.get("lora_dropout", 0.0), layers,
               peft.get("use_rslora", False))
    for name, layer in _adapted(module).items():
        layer.lora_A.data.copy_(state[f"{PREFIX}{name}.lora_A.weight"])
        layer.lora_B.data.copy_(state[f"{PREFIX}{name}.lora_B.weight"])


@torch.no_grad()
def merge(module):
    """Replaces every adapted layer by a plain nn.Linear with W + s · B A, computed in float32.

    Returns {name: adapted layer} for `unmerge`; drop it to free the memory. Raises ValueError unless the base
    is float32: rounding the sum to bf16 would lose a good part of a small update."""
    layers = _adapted(module)
    for name, layer in layers.items():
        if layer.weight.dtype != torch.float32:
            raise ValueError(f"merge needs float32 base weights, {name} has {layer.weight.dtype}; "
                             "load the base with dtype=torch.float32")
    for name, layer in layers.items():
        _replace(module, name, _plain(layer, nn.Parameter(layer.weight + layer.scale * layer.lora_B @ layer.lora_A, False)))
    return layers


def _plain(layer, weight):
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    plain.weight, plain.bias = weight, layer.bias
    return plain.train(layer.training)


@torch.no_grad()
def update_norm(module):
    """How large the adapters' update is against the weights: ||s B A|| / ||W|| over all adapted layers; 0 without any."""
    update = weights = 0.0
    for layer in _adapted(module).values():
        gram = (layer.lora_B.double().T @ layer.lora_B.double()) * (layer.lora_A.double() @ layer.lora_A.double().T)
        update += layer.scale ** 2 * gram.sum().item()                      # ||B A||² = sum(BᵀB ∘ AAᵀ)
        weights += layer.weight.float().square().sum().item()
    return (max(0.0, update) / weights) ** 0.5 if weights else 0.0


def remove(module):
    """Takes all adapters out, in place: the base model again, in its own tensors."""
    for name, layer in _adapted(module).items():
        _replace(module, name, _plain(layer, layer.weight))


def unmerge(module, layers):
    """Puts the layers that `merge` returned back: exactly the model from before."""
    for name, layer in layers.items():
        _replace(module, name, layer)
