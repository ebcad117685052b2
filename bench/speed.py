"""Speed and memory, one table: training steps, the networks alone, landscapes, planning, loading, reading.

    python bench.py --device=cuda                           # ViT-g, random weights; a table, and runs/bench/bench.json
    python bench.py --device=cuda --memory=15 --precision=fp16      # within 15 GiB, as on a T4: what --memory picks
    python bench.py --model.size=tiny --data.clip_frames=4  # on a CPU, in under a minute

Keys of config.yaml apply. Tensors are random, no data set and no TensorFlow is needed. Times are medians of `--repeats=10` runs after
a warm-up, with the spread between the fastest and the slowest; first: the first call, compilation included. TFLOP/s count
what the objective needs: matrix products forward and for the inputs' gradients (frozen weights have none), attention of the pairs
that see each other forward and, twice that, backward; nothing twice for checkpointing; share: of the rate that a large matrix product reaches on this card. "plain" is the
reference: the same networks module by module, fp32 weights under autocast, dense mask, no compilation, PEFT's LoRA if PEFT is there.
"""
import dataclasses
import gc
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import config
import files
import droid
import energy
import folded
import latents
import lora
import model
from analysis import planners
import speed
import train
from vjepa2_src.predictor import N_COND

OUT = Path("runs/bench")
MICRO_BATCHES = 4           # between two waits for the GPU; train.py runs grad_accum of them


def block_weights(part):
    """Numbers in the matrices of a network's blocks."""
    return sum(p.numel() for block in part for p in block.parameters() if p.ndim == 2)


def flops_per_clip(cfg, from_frames):
    """Of the objective, forward and backward, for one clip."""
    size = model.resolve_size(cfg.model.size)
    _, predictor = model._empty(cfg.model.size)
    N, T = predictor.grid ** 2, cfg.data.clip_frames
    linear = block_weights(predictor.predictor_blocks)
    ends = 2 * size["encoder_dim"] * size["predictor_dim"]
    total = 0.0
    for steps, pairs in [(T - 1, T * (T - 1) / 2), *((1, n) for n in range(2, cfg.rollout + 1))]:      # of time steps
        total += 3 * 4 * pairs * (N + N_COND) ** 2 * size["predictor_dim"] * size["predictor_depth"]  # attention: backward is twice
        total += 2 * 2 * steps * (N + N_COND) * (linear + ends)                                 # forward, inputs' gradient
    return total + (T * encode_flops(cfg) if from_frames else 0)


def encode_flops(cfg):
    """Of one frame."""
    size = model.resolve_size(cfg.model.size)
    encoder, _ = model._empty(cfg.model.size)
    N = encoder.grid ** 2
    linear = sum(p.numel() for p in encoder.parameters() if p.ndim > 1)
    return 2 * N * linear + 4 * N * N * size["encoder_dim"] * size["encoder_depth"]


class Table:
    def __init__(self, device, repeats):
        self.device, self.repeats, self.rows, self.peak = device, repeats, [], None
        n = 8192 if device.type == "cuda" else 512
        a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
        self.row("one large matrix product", lambda: a @ a, flops=2 * n ** 3)
        self.peak = self.rows[0]["tflops"]

    def row(self, name, work, clips=0, flops=0.0, repeats=0, calls=1):
        """Times `work`; clips and flops of one call. calls: one after the other without waiting for the GPU."""
        gc.collect()
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()        # the first call counts: a graph's memory is taken there
        try:
            first = self._seconds(work)
            times = sorted(self._seconds(work, calls) / calls for _ in range(repeats or self.repeats))
        except torch.OutOfMemoryError:
            print(f"{name:<66} out of memory", flush=True)
            return None
        median = times[len(times) // 2]
        row = {"name": name, "ms": 1e3 * median, "spread_ms": 1e3 * (times[-1] - times[0]), "first_s": first}
        if clips:
            row |= {"clips": clips, "ms_per_clip": 1e3 * median / clips, "clips_per_s": clips / median}
        if flops:
            row |= {"tflops": flops / median / 1e12} | {"share": flops / median / 1e12 / (self.peak or flops / median / 1e12)}
        if cuda:
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2 ** 30
        self.rows.append(row)
        print(line(row), flush=True)
        return row

    def _seconds(self, work, calls=1):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            work()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


HEAD = f"{'':<66}{'ms':>10}{'spread':>9}{'first s':>9}{'ms/clip':>9}{'clips/s':>9}{'TFLOP/s':>9}{'share':>7}{'GiB':>7}"


def line(row):
    def cell(key, width, digits, scale=1):
        return f"{scale * row[key]:>{width}.{digits}f}" if key in row else " " * width
    return (f"{row['name']:<66}" + cell("ms", 10, 1) + cell("spread_ms", 9, 1) + cell("first_s", 9, 1) + cell("ms_per_clip", 9, 1)
            + cell("clips_per_s", 9, 1) + cell("tflops", 9, 2 if row.get("tflops", 9) < 1 else 0)
            + (f"{100 * row['share']:>6.0f}%" if "share" in row else " " * 7) + cell("peak_gib", 7, 1))


# What is timed

class Training:
    """A micro-batch as train.py runs it, on random clips."""

    def __init__(self, cfg, device, clips, from_frames, checkpointing=False, compiled=True, plain=False):
        precision = model.resolve_precision(cfg.precision, device)
        dtype = model.DTYPES[precision]
        size = model.resolve_size(cfg.model.size)
        torch.manual_seed(cfg.seed)
        encoder, predictor = model.build(cfg.model.size, torch.float32 if plain else dtype, device)
        # PEFT's dropout would draw other masks when a block is recomputed
        if not (plain and _peft(predictor, dataclasses.replace(cfg.lora, dropout=0.0) if checkpointing else cfg.lora)):
            lora.inject(predictor, **dataclasses.asdict(cfg.lora))
        predictor.activation_checkpointing = checkpointing
        world = model.WorldModel(encoder if from_frames else None, predictor).train()
        self.trainable = [p for p in world.parameters() if p.requires_grad]
        T, S = cfg.data.clip_frames, size["image_size"]
        self.batch = {"actions": 0.05 * torch.randn(clips, T, 7), "states": torch.randn(clips, T, 7)}
        if from_frames:
            self.batch["frames"] = torch.randint(0, 256, (clips, 3, T, S, S), dtype=torch.uint8)
        else:
            self.batch["h"] = model.layer_norm(torch.randn(clips, T, (S // 16) ** 2, size["encoder_dim"])).to(dtype)
        scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        self.graphed = compiled and speed.compiles(cfg, device)
        write_folded = speed.compile_world(world) if self.graphed else folded.write_folded
        fold = (lambda: None) if plain else partial(lora.fold, predictor, write_folded)
        self.work = partial(train.forward_backward, world, fold, scaler, autocast, cfg.rollout, 1)
        if self.graphed:
            self.work = speed.Graphed(self.work, self.trainable)
        if device.type == "cuda":
            self.batch = {key: value.pin_memory() for key, value in self.batch.items()}
        self.device, self.plain = device, plain

    def __call__(self):
        batch = self.batch if self.graphed else {key: value.to(self.device, non_blocking=True) for key, value in self.batch.items()}
        if not self.plain:
            return self.work(batch)
        with mock.patch("vjepa2_src.predictor.has_fast_attention", return_value=False), mock.patch("model.WorldModel.losses", plain_losses):
            return self.work(batch)


def plain_losses(world, h, actions, states, rollout):
    """`WorldModel.losses` without a memory: each step of the rollout goes through all steps before it again."""
    z = world.predict(h[:, :-1], actions[:, :-1], states[:, :-1])
    own = z[:, :1]
    for n in range(2, rollout + 1):
        own = torch.cat([own, world.predict(torch.cat([h[:, :1], own], dim=1), actions[:, :n], states[:, :n])[:, -1:]], dim=1)
    return {"teacher_forcing": F.l1_loss(z, h[:, 1:].float()), "rollout": F.l1_loss(own, h[:, 1:rollout + 1].float())}


def _peft(predictor, cfg):
    """PEFT's LoRA on the same layers, if PEFT is there."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        return False
    predictor.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=cfg.rank, lora_alpha=cfg.alpha, lora_dropout=cfg.dropout, use_rslora=cfg.rslora,
                                       target_modules=list(cfg.targets)), predictor)
    return True


def training(table, cfg):
    """The rows of training."""
    device = table.device
    frames, stored = flops_per_clip(cfg, True), flops_per_clip(cfg, False)
    small = device.type != "cuda"
    for name, clips, options in (
            ("plain", 2, dict(from_frames=True, compiled=False, plain=True)),
            ("plain, checkpointing", 2, dict(from_frames=True, compiled=False, plain=True, checkpointing=True)),
            ("eager", 2, dict(from_frames=True, compiled=False)),
            ("", 2, dict(from_frames=True)), ("", 8, dict(from_frames=True)),
            ("checkpointing", 2, dict(from_frames=True, checkpointing=True)),
            ("", 2, dict(from_frames=False)), ("", 8, dict(from_frames=False)),
            ("checkpointing", 1, dict(from_frames=False, checkpointing=True))):
        if small and clips > 2:
            continue
        source = "frames" if options["from_frames"] else "latents"
        work = Training(cfg, device, clips, **options)
        table.row(f"step from {source}, {clips} clips{', ' if name else ''}{name}", work, clips,
                  clips * (frames if options["from_frames"] else stored), calls=1 if "plain" in name else MICRO_BATCHES)
        trainable = work.trainable
        del work
    for name in ("adamw8bit", "adamw"):
        try:
            optimizer = train._optimizer(dataclasses.replace(cfg, optimizer=name), trainable, device)
        except ValueError as error:
            print(f"{name}: {error}")
            continue
        for parameter in trainable:
            parameter.grad = torch.ones_like(parameter)

        def update():
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
        table.row(f"clip and optimizer step, {name}", update)


def picked(table, cfg):
    """What train.py does within --memory, and the time to 5,000 and 20,000 steps."""
    clips = cfg.batch_size * cfg.grad_accum
    for source in ("frames", "latents"):
        own = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, latents="" if source == "frames" else "latents"))
        try:
            own, text = speed.fit(own, speed.compiles(own, table.device))
        except ValueError as error:
            print(error)
            continue
        print(f"from {source}: {text}")
        work = Training(own, table.device, own.batch_size, source == "frames", own.activation_checkpointing)
        row = table.row(f"step from {source}, {own.batch_size} clips, as picked", work, own.batch_size,
                        own.batch_size * flops_per_clip(own, source == "frames"), calls=MICRO_BATCHES)
        if row:
            row["hours_5000"] = 5000 * clips * row["ms_per_clip"] / 3.6e6
            print(f"  {clips} clips a step: 5,000 steps in {row['hours_5000']:.1f} h, 20,000 in {4 * row['hours_5000']:.1f} h on this card")
        del work


def networks(table, cfg):
    """The encoder, the predictor, landscapes and planning."""
    device, size = table.device, model.resolve_size(cfg.model.size)
    precision = model.resolve_precision(cfg.precision, device)
    dtype = model.DTYPES[precision]
    torch.manual_seed(cfg.seed)
    world = model.WorldModel(*model.build(cfg.model.size, dtype, device))
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    N, D, S = world.predictor.grid ** 2, size["encoder_dim"], size["image_size"]
    n_frames = 128 if device.type == "cuda" else 4
    frames = torch.randint(0, 256, (1, 3, n_frames, S, S), dtype=torch.uint8, device=device)
    if speed.compiles(cfg, device):
        speed.compile_blocks(world.encoder.blocks)

    def encode():
        with autocast:
            world.encode(frames)
    table.row(f"encoder, {n_frames} frames", encode, flops=n_frames * encode_flops(cfg))
    world.encoder = None
    h = model.layer_norm(torch.randn(2, N, D, device=device))
    states, chunk = torch.zeros(1, 7), energy.chunk_size(cfg, device)
    K = 1000 if device.type == "cuda" else 50
    actions = 0.05 * torch.randn(K, 7)
    linear = block_weights(model._empty(cfg.model.size)[1].predictor_blocks)        # without the adapter's
    flops = K * (N + N_COND) * (2 * (linear + 2 * D * size["predictor_dim"])
                                + 4 * (N + N_COND) * size["predictor_dim"] * size["predictor_depth"])

    def landscape():
        return energy.landscape(world, h[:1], states, h[1], actions, chunk=chunk)

    table.row(f"{K} candidate actions, one step, eager", landscape, flops=flops)
    eagerly = landscape().cpu()
    if speed.compiles(cfg, device):
        speed.compile_world(world)
    table.row(f"{K} candidate actions, one step", landscape, flops=flops)
    print(f"  compiled and eager energies differ by {(landscape().cpu() - eagerly).abs().max():.1e}; they range over "
          f"{eagerly.max() - eagerly.min():.1e}")
    lora.inject(world.predictor, **dataclasses.asdict(cfg.lora))
    table.row(f"{K} candidate actions, one step, with an adapter", landscape, flops=flops)
    lora.remove(world.predictor)
    e = cfg.energy
    samples, iterations = (e.cem_samples, e.cem_iterations) if device.type == "cuda" else (20, 2)

    def energy_of(actions):
        return energy.rollout(world, h[:1], states, h[1], actions, chunk)
    table.row(f"CEM, {samples} samples x {iterations}", lambda: planners.cem(energy_of, 1, samples, iterations, min(e.cem_elites, samples),
                                                                          device=device), repeats=3)

    def by_gradient():
        with speed.eager():
            planners.gradient_plan(energy_of, device=device)
    if device.type == "cuda":
        table.row("gradient planner, 8 starts x 60", by_gradient, repeats=2)


def files(table, cfg):
    """Loading a slim file, and reading random clips of a store of latents (page cache)."""
    from safetensors.torch import save_file
    size = model.resolve_size(cfg.model.size)
    with tempfile.TemporaryDirectory() as folder:
        parts = model.build(cfg.model.size, torch.bfloat16)
        tensors = model._full_names(*(part.state_dict() for part in parts))
        save_file({k: v.contiguous() for k, v in tensors.items()}, f"{folder}/slim.safetensors", model.fingerprints(tensors))
        del parts, tensors
        table.row("slim file (page cache) to the device", lambda: model.load(f"{folder}/slim.safetensors", cfg.model.size, torch.bfloat16,
                                                                             table.device), repeats=3)
        store, clips = Path(folder) / "latents", 32 * cfg.batch_size
        write_store(store, (size["image_size"] // 16) ** 2, size["encoder_dim"], cfg, n_files=4, n_frames=200)
        own = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, latents=str(store), val_fraction=0.0))
        batches = iter(droid.create_dataloader(own))

        def read():
            for _ in range(clips // cfg.batch_size):
                next(batches)
        table.row(f"reading {clips} random clips of stored latents, {cfg.batch_size} a batch", read, clips)
        batches.close()


def write_store(folder, N, D, cfg, n_files, n_frames):
    """A store as latents.py leaves it, of random values: one episode of `n_frames` on the grid a file."""
    folder.mkdir()
    poses = np.zeros((n_frames * cfg.data.frame_step, 7))
    for i in range(n_files):
        torch.randn(n_frames, N, D).to(torch.bfloat16).view(torch.int16).numpy().tofile(folder / f"{i:05d}.bin")
        files.write_npz(folder / f"{i:05d}.npz", places=np.array([str(i)]), names=np.array([str(i)]), success=np.array([True]),
                         rows=np.array([n_frames]), lengths=np.array([len(poses)]), poses=poses, joint_velocity=np.zeros((len(poses), 0)),
                         damaged=np.zeros((0, 3)), sha256="")
    made_with = latents._settings(cfg, "") | {"dtype": "bf16", "tokens": N, "width": D, "drop_idle": False,
                                              "files": [str(i) for i in range(n_files)]}
    files.write_file(folder / "store.json", json.dumps(made_with).encode())


PARTS = {"training": training, "networks": networks, "files": files}


def main(args):
    if any(arg in ("-h", "--help") for arg in args):
        print(__doc__)
        return
    own = {key: text for key, _, text in (arg.partition("=") for arg in args) if key in ("--repeats", "--parts")}
    args = [arg for arg in args if arg.partition("=")[0] not in own]
    try:
        cfg = config.load(["config.yaml", *args])
        device = model.resolve_device(cfg.device)
        cfg = speed.limit(cfg, device)
        repeats, parts = int(own.get("--repeats", 10)), own["--parts"].split(",") if "--parts" in own else [*PARTS]
        if repeats < 1 or not set(parts) <= PARTS.keys():
            raise ValueError(f"--repeats is a number from 1, --parts are some of {','.join(PARTS)}")
    except ValueError as error:
        sys.exit(f"bench.py: {error}")
    if device.type != "cuda":
        cfg.precision = "fp32"                  # what a CPU trains in
    print(f"{model.device_name(device)}, torch {torch.__version__}, {model.resolve_precision(cfg.precision, device)}, "
          f"{cfg.model.size}, clips of {cfg.data.clip_frames} frames\n{HEAD}")
    table = Table(device, repeats)
    for part in parts:
        (picked if part == "training" and cfg.memory else PARTS[part])(table, cfg)
    OUT.mkdir(parents=True, exist_ok=True)
    result = {"device": model.device_name(device), "torch": torch.__version__, "precision": cfg.precision, "memory": cfg.memory,
              "rows": table.rows}
    path = OUT / f"bench{f'_{cfg.memory:g}_GiB' if cfg.memory else ''}.json"
    files.write_file(path, json.dumps(result, indent=1).encode())
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
