"""Speed and memory in one table: training steps, the networks alone, landscapes, planning, files.

    # ViT-g with random weights; prints the table and writes runs/bench/bench.json
    python -m bench.speed --device=cuda
    # within 15 GiB, as on a T4: the micro-batch that --memory picks
    python -m bench.speed --device=cuda --memory=15 --precision=fp16
    # on a CPU, in under a minute
    python -m bench.speed --model.size=tiny --data.clip_frames=4

Run it from the repository's root. Keys of config.yaml apply; --parts=training,networks,files picks
parts of the table. Tensors are random: no data set and no TensorFlow is needed.

Columns: ms is the median of --repeats=10 runs after a warm-up, spread the difference between the
slowest and the fastest; first s is the first call, compilation included. TFLOP/s count what the
objective needs (bench/flops.py); share is the part of the rate that one large matrix product
reaches on this device; GiB is the peak of GPU memory.

Rows named "plain" are the reference: float32 weights under autocast, PEFT's LoRA if PEFT is
installed, nothing of fast/. Rows with --compile=false are what train.py runs with that option:
weights in the precision of the run, our LoRA. All other rows run as the scripts do.
"""
import json
import re
import tempfile
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from running import script


# Before PyTorch, whose import takes seconds.
if __name__ == "__main__":
    arguments = script.begin("bench.speed", __doc__)

import numpy as np
import torch
from safetensors.torch import save_file

import config
import droid
import energy
import fast
import files
import lora
import model
import train
from bench.flops import encode_flops, flops_per_clip, predict_flops
from bench.table import Table
from episodes.stored import store_settings
from fast import memory


ROOT = Path(__file__).resolve().parent.parent
OUT = Path("runs/bench")
# Between two waits for the GPU, as in train.py, which runs grad_accum of them.
MICRO_BATCHES = 4


# Training

class TrainingStep:
    """A micro-batch as train.py runs it, on random clips: forward and backward at each call.

    from_frames: with the encoder, otherwise from latents. plain: the reference in the module's
    docstring. Checkpointing and compilation are those of cfg."""

    def __init__(self, cfg, device, clips, from_frames, plain=False):
        self.device = device
        precision = model.resolve_precision(cfg.precision, device)
        dtype = model.DTYPES[precision]
        torch.manual_seed(cfg.seed)
        weights = torch.float32 if plain else dtype
        encoder, predictor = model.build(cfg.model.size, weights, device)
        if not (plain and inject_peft(predictor, cfg.lora)):
            lora.inject(predictor, **asdict(cfg.lora))
        world = model.WorldModel(encoder if from_frames else None, predictor).train()
        self.trainable = [p for p in world.parameters() if p.requires_grad]
        self.accelerated = model.can_accelerate(cfg, device) and not plain
        if self.accelerated:
            fast.accelerate(world, cfg)
        elif cfg.activation_checkpointing:
            model.checkpoint_activations(predictor)

        self.batch = random_batch(cfg, clips, from_frames, dtype)
        if device.type == "cuda":
            self.batch = {key: value.pin_memory() for key, value in self.batch.items()}
        scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        self.step = partial(train.forward_backward, world, scaler=scaler, autocast=autocast,
                            rollout=cfg.rollout, grad_accum=1)
        if self.accelerated:
            self.step = fast.CUDAGraph(self.step, self.trainable)

    def __call__(self):
        batch = self.batch
        if not self.accelerated:                    # a CUDA graph copies its inputs itself
            batch = {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
        return self.step(batch)


def random_batch(cfg, clips, from_frames, dtype):
    """Like one from `droid.create_dataloader`; latents are of `dtype`, as stored ones."""
    size = model.resolve_size(cfg.model.size)
    T, S = cfg.data.clip_frames, size["image_size"]
    batch = {"actions": 0.05 * torch.randn(clips, T, 7), "states": torch.randn(clips, T, 7)}
    if from_frames:
        batch["frames"] = torch.randint(0, 256, (clips, 3, T, S, S), dtype=torch.uint8)
    else:
        h = torch.randn(clips, T, (S // 16) ** 2, size["encoder_dim"])
        batch["h"] = model.layer_norm(h).to(dtype)
    return batch


def inject_peft(predictor, cfg):
    """PEFT's LoRA on the layers that lora.inject adapts. Returns whether PEFT is installed."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        return False
    predictor.requires_grad_(False)
    peft = LoraConfig(r=cfg.rank, lora_alpha=cfg.alpha, lora_dropout=cfg.dropout,
                      use_rslora=cfg.rslora, target_modules=list(cfg.targets))
    inject_adapter_in_model(peft, predictor)
    return True


def time_training(table, cfg):
    """The rows of training: steps, then the optimizer."""
    device = table.device
    kept = replace(cfg, activation_checkpointing=False)
    recomputed = replace(cfg, activation_checkpointing=True)
    for source, clips, variant, option, plain in (
            ("frames", 2, kept, "plain", True),
            ("frames", 2, recomputed, "plain, checkpointing", True),
            ("frames", 2, replace(kept, compile=False), "--compile=false", False),
            ("frames", 2, kept, "", False),
            ("frames", 8, kept, "", False),
            ("frames", 2, recomputed, "checkpointing", False),
            ("latents", 2, kept, "", False),
            ("latents", 8, kept, "", False),
            ("latents", 1, recomputed, "checkpointing", False)):
        if device.type != "cuda" and clips > 2:     # takes long and tells nothing new
            continue
        name = f"step from {source}, {clips} clips" + (f", {option}" if option else "")
        from_frames = source == "frames"
        step = TrainingStep(variant, device, clips, from_frames, plain)
        table.row(name, step, clips, clips * flops_per_clip(cfg, from_frames),
                  calls=1 if plain else MICRO_BATCHES)
        trainable = step.trainable
        del step                                    # its memory is needed by the next one
    for optimizer in ("adamw8bit", "adamw"):
        time_optimizer(table, replace(cfg, optimizer=optimizer), trainable)


def time_optimizer(table, cfg, trainable):
    """One row: clipping and the optimizer's step on these parameters."""
    try:
        optimizer = train.build_optimizer(cfg, trainable, table.device)
    except ValueError as error:                     # bitsandbytes is not installed
        print(f"{cfg.optimizer}: {error}")
        return
    for parameter in trainable:
        parameter.grad = torch.ones_like(parameter)

    def clip_and_step():
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()

    table.row(f"clip and optimizer step, {cfg.optimizer}", clip_and_step)


def time_picked(table, cfg):
    """What train.py runs within --memory, and how long 5,000 and 20,000 steps take."""
    for source in ("frames", "latents"):
        from_frames = source == "frames"
        data = replace(cfg.data, latents="" if from_frames else "latents")
        picked = replace(cfg, data=data)
        try:
            accelerated = model.can_accelerate(cfg, table.device)
            picked, text = memory.choose_micro_batch(picked, accelerated)
        except ValueError as error:                 # not even one clip fits
            print(error)
            continue
        print(f"from {source}: {text}")
        clips = picked.batch_size
        step = TrainingStep(picked, table.device, clips, from_frames)
        row = table.row(f"step from {source}, {clips} clips, as picked", step, clips,
                        clips * flops_per_clip(picked, from_frames), calls=MICRO_BATCHES)
        del step
        if row:
            clips_per_step = cfg.batch_size * cfg.grad_accum
            row["hours_5000"] = 5000 * clips_per_step * row["ms_per_clip"] / 3.6e6
            print(f"  {clips_per_step} clips a step: 5,000 steps in {row['hours_5000']:.1f} h, "
                  f"20,000 in {4 * row['hours_5000']:.1f} h on this device")


# The networks alone

def time_networks(table, cfg):
    """The rows of the encoder, of landscapes and of planning."""
    device = table.device
    accelerated = model.can_accelerate(cfg, device)
    dtype = model.DTYPES[model.resolve_precision(cfg.precision, device)]
    torch.manual_seed(cfg.seed)
    world = model.WorldModel(*model.build(cfg.model.size, dtype, device))
    if accelerated:
        fast.accelerate(world, cfg)
    time_encoder(table, cfg, world, dtype)
    if accelerated:
        fast.restore(world)
    world.encoder = None                            # landscapes do without it, as in energy.py

    size = model.resolve_size(cfg.model.size)
    h = torch.randn(2, world.predictor.grid ** 2, size["encoder_dim"], device=device)
    h, states = model.layer_norm(h), torch.zeros(1, 7)
    K = 1000 if device.type == "cuda" else 50
    actions, chunk = 0.05 * torch.randn(K, 7), energy.chunk_size(cfg, device)
    landscape = partial(energy.landscape, world, h[:1], states, h[1], actions, chunk=chunk)
    flops = K * predict_flops(cfg)
    table.row(f"{K} candidate actions, one step, plain", landscape, flops=flops)
    plain = landscape().cpu()
    if accelerated:
        fast.accelerate(world, cfg)
    table.row(f"{K} candidate actions, one step", landscape, flops=flops)
    difference, depth = (landscape().cpu() - plain).abs().max(), plain.max() - plain.min()
    print(f"  accelerated and plain energies differ by {difference:.1e} at most; the landscape is "
          f"{depth:.1e} deep")
    lora.inject(world.predictor, **asdict(cfg.lora))
    table.row(f"{K} candidate actions, one step, with an adapter", landscape, flops=flops)
    lora.remove(world.predictor)

    energy_of = partial(energy.sequence_energy, world, h[:1], states, h[1], chunk=chunk)
    time_planners(table, cfg, world, energy_of)


def time_encoder(table, cfg, world, dtype):
    device, on_gpu = table.device, table.device.type == "cuda"
    n_frames = 128 if on_gpu else 4
    S = model.resolve_size(cfg.model.size)["image_size"]
    frames = torch.randint(0, 256, (1, 3, n_frames, S, S), dtype=torch.uint8, device=device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def encode():
        with autocast:
            world.encode(frames)

    table.row(f"encoder, {n_frames} frames", encode, flops=n_frames * encode_flops(cfg))


def time_planners(table, cfg, world, energy_of):
    device, on_gpu = table.device, table.device.type == "cuda"
    e = cfg.energy
    samples, iterations = (e.cem_samples, e.cem_iterations) if on_gpu else (20, 2)
    cem = partial(energy.cem, energy_of, samples=samples, iterations=iterations,
                  elites=min(e.cem_elites, samples), device=device)
    table.row(f"CEM, {samples} samples x {iterations}", cem, repeats=3)

    def plan_by_gradient():
        with energy.uncompiled(world):              # as in energy.py
            energy.gradient_plan(energy_of, device=device)

    if on_gpu:
        table.row("gradient planner, 8 starts x 60", plan_by_gradient, repeats=2)


# Files

def time_files(table, cfg):
    """Loading a checkpoint, and reading random clips of stored latents, both from the page
    cache."""
    size, clips = model.resolve_size(cfg.model.size), 32 * cfg.batch_size
    with tempfile.TemporaryDirectory() as folder:
        path, store = f"{folder}/slim.safetensors", Path(folder) / "latents"
        write_checkpoint(path, cfg.model.size)
        load = partial(model.load, path, cfg.model.size, torch.bfloat16, table.device)
        table.row("slim checkpoint (page cache) to the device", load, repeats=3)

        N = (size["image_size"] // 16) ** 2
        write_store(store, N, size["encoder_dim"], cfg, n_files=4, n_frames=200)
        # random numbers: no robot moves so
        data = replace(cfg.data, latents=str(store), val_fraction=0.0, check=False)
        batches = iter(droid.create_dataloader(replace(cfg, data=data)))

        def read():
            for _ in range(clips // cfg.batch_size):
                next(batches)

        table.row(f"reading {clips} random clips of stored latents, {cfg.batch_size} a batch",
                  read, clips)
        batches.close()                             # ends the thread that reads ahead


def write_checkpoint(path, size):
    """Random weights as `export.py slim` leaves them."""
    networks = model.build(size, torch.bfloat16)
    tensors = model.flat_names(*(network.state_dict() for network in networks))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, model.fingerprints(tensors))


def write_store(folder, N, D, cfg, n_files, n_frames):
    """Random latents as latents.py leaves them, in each file one episode of `n_frames` frames on
    the grid of data.frame_step."""
    folder.mkdir()
    length = n_frames * cfg.data.frame_step         # recorded steps
    for i in range(n_files):
        h = torch.randn(n_frames, N, D).to(torch.bfloat16)
        h.view(torch.int16).numpy().tofile(folder / f"{i:05d}.bin")
        files.write_npz(
            folder / f"{i:05d}.npz", places=np.array([str(i)]), names=np.array([str(i)]),
            success=np.array([True]), rows=np.array([n_frames]), lengths=np.array([length]),
            poses=np.zeros((length, 7)), joint_velocity=np.zeros((length, 0)),
            damaged=np.zeros((0, 3)), sha256="")
    settings = store_settings(cfg, "") | {
        "dtype": "bf16", "tokens": N, "width": D, "drop_idle": False,
        "files": [str(i) for i in range(n_files)]}
    files.write_file(folder / "store.json", json.dumps(settings).encode())


# The command line

PARTS = {"training": time_training, "networks": time_networks, "files": time_files}


def load_config(args):
    """config.yaml of the repository, and keys from the command line. Raises ValueError."""
    return config.load([str(ROOT / "config.yaml"), *args])


def main(args):
    """args: of the command line, or what `script.begin` returned."""
    script.run("bench.speed", __doc__, args, _run)


def _run(given):
    repeats = given.options.get("repeats", "10")
    parts = given.options.get("parts", ",".join(PARTS)).split(",")
    if not re.fullmatch(r"0*[1-9]\d{0,5}", repeats) or not set(parts) <= PARTS.keys():
        raise ValueError("--repeats is a whole number from 1, --parts are some of "
                         f"{','.join(PARTS)}; got {repeats} and {','.join(parts)}")
    repeats = int(repeats)
    cfg = load_config(given.paths + given.keys)
    device = model.resolve_device(cfg.device)
    cfg = memory.cap_gpu_memory(cfg, device)
    if device.type != "cuda":
        cfg = replace(cfg, precision="fp32")        # what a CPU trains in

    name = model.device_name(device)
    print(f"{name}, torch {torch.__version__}, {model.resolve_precision(cfg.precision, device)}, "
          f"{cfg.model.size}, clips of {cfg.data.clip_frames} frames")
    table = Table(device, repeats)
    for part in parts:
        if part == "training" and cfg.memory:
            time_picked(table, cfg)
        else:
            PARTS[part](table, cfg)
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"bench{f'_{cfg.memory:g}_GiB' if cfg.memory else ''}.json"
    result = {"device": name, "torch": torch.__version__, "precision": cfg.precision,
              "memory": cfg.memory, "rows": table.rows}
    files.write_file(path, json.dumps(result, indent=1).encode())
    print(path)


if __name__ == "__main__":
    main(arguments)
