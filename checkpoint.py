"""Checkpoints: what a run saves, what it keeps, and how it is resumed.

    out_dir/config.yaml         the recipe, resolved
    out_dir/metrics.jsonl       one dict a line
    out_dir/step_N/             the adapter in PEFT's form, and state.pt for an exact resume

Every file is written beside itself and renamed, a step's folder too: a run that is killed at any
moment leaves whole checkpoints or none.
"""
import io
import pickle
import re
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import lora
from files import write_file
from running.mirror import fetch_newest
from running.ranks import gather_from_ranks


# Steps

def saved_steps(out):
    """Steps with a complete checkpoint in a run folder, ascending."""
    found = (re.fullmatch(r"step_(\d+)", path.parent.name)
             for path in Path(out).glob("step_*/state.pt"))
    return sorted(int(match[1]) for match in found if match)


def start_step(cfg, out, rank):
    """The step to go on from, 0 for a new run. Raises ValueError rather than mixing two runs."""
    if cfg.resume and cfg.gcs_dir and not saved_steps(out):
        if rank == 0:
            fetch_newest(cfg.gcs_dir, out)
        if dist.is_initialized():
            dist.barrier()
    steps = saved_steps(out)
    if steps and not cfg.resume:
        raise ValueError(f"{out} already holds step {steps[-1]}; go on with --resume or choose "
                         "another --out_dir")
    return steps[-1] if steps else 0


def check_all_saved(world):
    """Raises ValueError if something is trained that `save` does not save: before a run, not when
    its first checkpoint is due."""
    adapters = {id(p) for layer in lora.adapted_layers(world).values()
                for p in (layer.lora_A, layer.lora_B)}
    others = [name for name, p in world.named_parameters()
              if p.requires_grad and id(p) not in adapters]
    if others:
        raise ValueError(f"{', '.join(others[:3])}: trained, but only adapters are saved; freeze "
                         "them, or add them to checkpoint.save and checkpoint.load")


def save(folder, cfg, predictor, optimizer, scaler, loader):
    """Writes step_N/ under another name, renames it, then removes what rotation no longer keeps.

    All ranks call it, rank 0 writes. Raises OSError with the newest step that is safe."""
    rank_state = {"rng": torch.get_rng_state(), "data": loader.state_dict(), "cuda_rng": None}
    if torch.cuda.is_initialized():
        rank_state["cuda_rng"] = torch.cuda.get_rng_state()
    rank_states = gather_from_ranks(rank_state)
    if dist.is_initialized() and dist.get_rank():
        return
    state = {"step": int(folder.name.removeprefix("step_")), "ranks": rank_states,
             "optimizer": optimizer.state_dict(), "optimizer_name": cfg.optimizer,
             "scaler": scaler.state_dict(), "base": predictor.base_fingerprint}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    partial = folder.with_name(f"{folder.name}.tmp")
    try:
        lora.save(partial, predictor, base=cfg.model.checkpoint)
        write_file(partial / "state.pt", buffer.getbuffer())
        # `start_step` refuses a folder with a complete step_N, so this one is incomplete.
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        kept = saved_steps(folder.parent)
        newest = f"step {kept[-1]}" if kept else "none"
        raise OSError(f"{error}; make room and go on with --resume "
                      f"(newest checkpoint: {newest})") from None
    rotating = [step for step in saved_steps(folder.parent) if step not in cfg.milestones]
    for step in rotating[:-cfg.keep]:
        shutil.rmtree(folder.with_name(f"step_{step}"))


def load(folder, cfg, predictor, optimizer, scaler, loader):
    """The reverse of `save`, on all ranks. Raises ValueError if the file is damaged, or the run was
    of another base, LoRA shape or optimizer."""
    lora.load(predictor, folder)
    try:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{folder}/state.pt: damaged ({str(error).splitlines()[0][:100]}); remove "
                         f"{folder} to go on from the checkpoint before it") from None
    # bitsandbytes would take a state of PyTorch's AdamW without a word, and not use it.
    if state["optimizer_name"] != cfg.optimizer:
        raise ValueError(f"{folder}: was trained with --optimizer={state['optimizer_name']}, whose "
                         f"state {cfg.optimizer} cannot use; resume with the same one")
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    saved = state["ranks"]
    if len(saved) != world_size and rank == 0:
        tqdm.write(f"{folder}: saved by {len(saved)} ranks, resumed on {world_size}: the order of "
                   "clips changes")
    rank_state = saved[rank % len(saved)]
    loader.load_state_dict(rank_state["data"])
    torch.set_rng_state(rank_state["rng"])
    if rank_state["cuda_rng"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(rank_state["cuda_rng"])
