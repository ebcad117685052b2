"""Adapters that others wrote: right, or refused in one line, with nothing changed."""
import copy
import json
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file, save_file
from stress import odd_adapters
from stress.spoiled_adapters import ADAPTERS, good_adapter

import lora
from files import peft


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_odd_adapter_loads_right_or_is_refused_in_one_line(tmp_path, name):
    with odd_adapters.time_limit():
        odd_adapters.try_adapter(name, tmp_path)


# PEFT itself

def predictor():
    return copy.deepcopy(odd_adapters.networks()[1])


SETTINGS = dict(r=4, lora_alpha=8, target_modules=["attn.qkv", "mlp.fc1"])


def with_peft(folder, convert=False, **settings):
    """Saves an adapter as PEFT does after training -> its outputs, and whether its base is ours."""
    library = pytest.importorskip("peft")
    base = {name: tensor.clone() for name, tensor in predictor().state_dict().items()}
    theirs = library.get_peft_model(predictor(), library.LoraConfig(**SETTINGS | settings))
    if convert:
        theirs.save_pretrained(folder / "untrained")
    random = torch.Generator().manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=random)
    state = {name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
             for name, tensor in theirs.state_dict().items()}
    ours = all(torch.equal(tensor, state[name]) for name, tensor in base.items() if name in state)
    path = {"path_initial_model_for_weight_conversion": str(folder / "untrained")}
    theirs.eval().save_pretrained(folder, **(path if convert else {}))
    return odd_adapters.outputs(theirs), ours


@pytest.mark.parametrize("start", sorted(peft.HARMLESS_STARTS - {"none"}))
def test_starts_that_are_called_harmless_leave_the_base_alone(tmp_path, start):
    outputs, same_base = with_peft(tmp_path, init_lora_weights={"true": True, "false": False}.get(
        start, start))
    ours = predictor()
    lora.load(ours, tmp_path)
    assert same_base and (odd_adapters.outputs(ours) - outputs).abs().max() < 1e-5


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_of_another_base_is_refused_and_right_once_converted(tmp_path, start, rslora):
    _, same_base = with_peft(tmp_path / "as_it_is", init_lora_weights=start, use_rslora=rslora)
    assert not same_base
    with pytest.raises(ValueError, match=f"init_lora_weights: '{start}'.*weight_conversion"):
        lora.load(predictor(), tmp_path / "as_it_is")
    outputs, _ = with_peft(tmp_path / "plain", convert=True, init_lora_weights=start,
                           use_rslora=rslora)
    ours = predictor()
    lora.load(ours, tmp_path / "plain")
    assert (odd_adapters.outputs(ours) - outputs).abs().max() < 1e-4


def test_targets_by_pattern_and_all_layers_still_load(tmp_path):
    for i, targets in enumerate([r".*\.(qkv|fc1)", "all-linear"]):
        outputs, _ = with_peft(tmp_path / str(i), target_modules=targets,
                               exclude_modules=["predictor_blocks.1.attn.qkv"])
        ours = predictor()
        lora.load(ours, tmp_path / str(i))
        assert (odd_adapters.outputs(ours) - outputs).abs().max() < 1e-5


@pytest.mark.parametrize("layers, fits", [
    ([0, 1, 2], True), ([0], False), (0, False), ([1, 9], False), ([], True), (None, True)])
def test_tensors_of_layers_that_the_config_leaves_out_are_refused(tmp_path, layers, fits):
    good_adapter(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layers_to_transform": layers}))
    if fits:
        assert lora.read(tmp_path)[1]
        return
    with pytest.raises(ValueError, match="has tensors of layer .*layers_to_transform .* leaves"):
        lora.read(tmp_path)


def test_every_key_of_pefts_config_is_known_or_refused(tmp_path):
    """Of the installed version: with their defaults the adapter loads; a value that switches
    something on is refused, unless the key is in the list of harmless ones."""
    library = pytest.importorskip("peft")
    good_adapter(tmp_path)
    path = tmp_path / "adapter_config.json"
    good = json.loads(path.read_text())
    defaults = library.LoraConfig().to_dict()
    path.write_text(json.dumps(defaults | good, default=str))
    lora.read(tmp_path)
    harmless = set(good) | peft.HARMLESS | {"init_lora_weights"}
    others = {field.name for field in fields(library.LoraConfig)} - harmless
    assert {"use_dora", "rank_pattern", "modules_to_save"} <= others
    for name in others:
        path.write_text(json.dumps(good | {name: [[0, 2]]}))
        with pytest.raises(ValueError, match=f"only plain LoRA is read, .*{name}"):
            lora.read(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_adapters_in_low_precision_load(tmp_path, dtype):
    good_adapter(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(state, path)
    ours = predictor()
    lora.load(ours, tmp_path)
    for name, tensor in lora.adapter_state(ours).items():
        assert torch.equal(tensor, state[name].float())
