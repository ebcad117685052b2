"""Adapter folders as PEFT writes them: adapter_config.json and adapter_model.safetensors."""
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open


PREFIX = "base_model.model."        # PEFT puts it before every module name


def read(folder):
    """(adapter_config.json, {PEFT's name: tensor}, the base's fingerprint or "") of a PEFT folder.
    Raises ValueError if the folder is incomplete or no plain LoRA."""
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
        raise ValueError(f"{folder}: the adapter is cut short or damaged ({error}); copy it again"
                         ) from None
    extras = [key for key in ("use_dora", "lora_bias", "modules_to_save", "rank_pattern",
                              "alpha_pattern", "fan_in_fan_out") if peft.get(key)]
    if peft.get("peft_type") != "LORA" or peft.get("bias", "none") != "none" or extras:
        raise ValueError(f"{folder}: only plain LoRA is read, this adapter is "
                         f"{peft.get('peft_type')} with {', '.join(extras) or 'trained biases'}")
    return peft, state, base
