"""The section `decoder` of the configuration, which decoder.py alone reads."""
from dataclasses import dataclass


@dataclass
class DecoderConfig:
    width: int = 512
    depth: int = 8
    out_dir: str = "runs/decoder"
    max_steps: int = 10000
    batch_size: int = 32
    grad_accum: int = 1
    lr: float = 5e-4
