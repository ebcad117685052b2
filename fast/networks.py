"""The plain networks' faster siblings: the same weights, names and results, to rounding.

`fast.accelerate` makes a plain module one of these by changing its class, so parameters, hooks and
state dicts stay what they are. What differs:

- attention in Triton kernels; for them the predictor puts the patches of all time steps first and
  the action and state tokens behind (the positions are in the rotations, so the order is free);
- the backward pass of the rotations and of the MLP in one piece each;
- adapters merged into a copy of the weights while training (merged_lora.py);
- the loss computes no time step twice: the rollout goes on from the KV cache of teacher forcing.
"""
from functools import lru_cache, partial
from itertools import repeat

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import lora
import model
from fast.attention import append_steps, first_steps, frame_causal_attention, has_fast_attention
from fast.compiler import eager
from fast.gelu import gelu
from fast.merged_lora import (
    GELU_TILE,
    QKV_TILE,
    FusedLoRAMLP,
    FusedLoRAQKV,
    MergedLoRALinear,
    can_fuse,
    write_merged,
)
from vjepa2_src.blocks import MLP, Attention, Block, apply_rope, rope_table, swap_pairs
from vjepa2_src.predictor import N_COND, Predictor


@lru_cache(maxsize=64)
def patches_first_rope(head_dim, frames, grid, device, first_frame):
    """`rope_table` for tokens in the order of this file: all patches, then [action, state] of each
    time step."""
    tables = rope_table(head_dim, frames, grid, grid, grid, N_COND, device, first_frame)
    with torch.inference_mode(False):               # cached, as rope_table
        tables = [table.unflatten(0, (frames, -1)) for table in tables]         # [T, 2+N, d]
        return tuple(torch.cat([table[:, N_COND:].flatten(0, 1), table[:, :N_COND].flatten(0, 1)])
                     for table in tables)


@lru_cache(maxsize=64)
def patches_first_mask(frames, past_frames, patches, device):
    """The causal mask [L, L'] for tokens in the order of this file, where no kernels run."""
    def steps_of(first, last):
        step = torch.arange(first, last, device=device)
        return torch.cat([step.repeat_interleave(patches), step.repeat_interleave(N_COND)])

    with torch.inference_mode(False):               # cached, as rope_table
        queries = steps_of(past_frames, past_frames + frames)
        return queries[:, None] >= steps_of(0, past_frames + frames)[None, :]


class SplitAndRotate(torch.autograd.Function):
    """qkv [B, L, 3, H, d] -> rotated q and k, and v, [B, H, L, d] each.

    The gradient is written in qkv's own order; autograd would put it together from three padded
    parts and copy it."""

    @staticmethod
    def forward(ctx, qkv, cosine, sine):
        ctx.save_for_backward(cosine, sine)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return apply_rope(q, cosine, sine), apply_rope(k, cosine, sine), v

    @staticmethod
    def backward(ctx, d_q, d_k, d_v):
        cosine, sine = ctx.saved_tensors
        # The transpose of the rotation. Sine is signed per channel, so its pairs are swapped too.
        d_q, d_k = ((d * cosine + swap_pairs(d) * swap_pairs(sine)).to(d.dtype)
                    for d in (d_q, d_k))
        return torch.stack([d.transpose(1, 2) for d in (d_q, d_k, d_v)], dim=2), None, None


class FastAttention(Attention):
    def forward(self, x, rope, frames, use_kernels, mask, past, keep):
        """x [B, L, D] -> [B, L, D], and the keys and values of the first `keep` time steps or None.

        frames = (T, N): x holds T time steps of N patches, behind them their action and state
        tokens. past: the (k, v) [B, H, L', d] of the time steps before, or None."""
        q, k, v = self.rotated_qkv(x, rope)                                     # [B, H, L, d]
        T, N = frames
        tokens = x.shape[1] // T
        if past is not None:
            k, v = (append_steps(old, new, N, tokens) for old, new in zip(past, (k, v)))
            T = k.shape[2] // tokens
        if use_kernels:
            x, _, *kept = frame_causal_attention(q, k, v, T, N, keep)
        else:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            kept = [first_steps(z, T, N, keep) for z in (k, v)] if keep else []
        return self.proj(x.transpose(1, 2).flatten(2)), kept if keep else None  # [B, L, D]

    def rotated_qkv(self, x, rope):
        if self.fuses():
            return FusedLoRAQKV.apply(*self.qkv.function_arguments(x), *rope, self.n_heads)
        return SplitAndRotate.apply(self.qkv(x).unflatten(-1, (3, self.n_heads, -1)), *rope)

    def fuses(self):
        return can_fuse(QKV_TILE, self.qkv)


class FastMLP(MLP):
    def forward(self, x):
        if self.fuses():
            x, *first = self.fc1.function_arguments(x)
            return FusedLoRAMLP.apply(x, *first, *self.fc2.function_arguments(x)[1:])
        return self.fc2(gelu(self.fc1(x)))

    def fuses(self):
        return can_fuse(GELU_TILE, self.fc1, self.fc2)


class FastBlock(Block):
    def forward(self, x, *arguments):
        """x [B, L, D] -> [B, L, D], keys and values; arguments as for `FastAttention`."""
        change, kept = self.attn(self.norm1(x), *arguments)
        x = x + change
        return x + self.mlp(self.norm2(x)), kept


class FastPredictor(Predictor):
    """`Predictor` for tokens in the order of this file. Its KV caches are its own, too."""

    activation_checkpointing = False
    merges = 0                                      # how often adapters were merged
    write_merged = staticmethod(write_merged)       # `fast.accelerate` puts a compiled one here

    def forward(self, z, actions, states, kv_cache=None):
        past = kv_cache or None
        steps = actions.shape[1]
        if past:
            steps += past[0][0].shape[2] // (N_COND + self.grid ** 2)
        z, kept = self.run(z, actions, states, past, keep=0 if kv_cache is None else steps)
        if kv_cache is not None:
            kv_cache[:] = kept
        return z

    def run(self, z, actions, states, past=None, keep=0):
        """As `forward`, without a side effect -> predictions, and the (k, v) of each block for the
        first `keep` time steps of the sequence, or None. past: what an earlier call returned."""
        # Adapters are merged where a sequence begins. What continues it uses the same copy.
        if self.training and past is None:
            self.merge_adapters()
        T, N = actions.shape[1], self.grid ** 2
        x = self.embed(z, actions, states)                                      # [B, T, 2+N, P]
        x = torch.cat([x[:, :, N_COND:].flatten(1, 2), x[:, :, :N_COND].flatten(1, 2)], dim=1)
        n_past = past[0][0].shape[2] // (N_COND + N) if past else 0
        rope = patches_first_rope(self.head_dim, T, self.grid, z.device, n_past)
        use_kernels = has_fast_attention(x, N, self.head_dim)
        mask = None
        if T > 1 and not use_kernels:
            mask = patches_first_mask(T, n_past, N, z.device)

        # In training alone: planning by gradient is in eval mode and small.
        checkpointing = (self.activation_checkpointing and self.training
                         and torch.is_grad_enabled())
        kept = []
        for block, block_past in zip(self.predictor_blocks, past or repeat(None)):
            if checkpointing:
                # Nothing in a block is random, dropout is drawn by `merge_adapters`: no random
                # state has to be kept, which CUDA graphs would not allow.
                block = partial(checkpoint, self.run_block, block, self.merges,
                                use_reentrant=False, preserve_rng_state=False)
            x, kv = block(x, rope, (T, N), use_kernels, mask, block_past, keep)
            kept.append(kv)
        z = self.predictor_proj(self.predictor_norm(x[:, :T * N]))              # [B, T*N, D]
        return z, kept if keep else None

    def run_block(self, block, merges, *arguments):
        """Runs a block, in the forward pass and again in the backward pass."""
        if merges != self.merges:
            raise RuntimeError("the adapters were merged again since this forward pass: call "
                               "backward before the next forward, or use --compile=false")
        return block(*arguments)

    def merge_adapters(self):
        self.merges += 1
        for layer in lora.adapted_layers(self).values():
            layer.__class__ = MergedLoRALinear      # also what was injected since `accelerate`
            layer.merge(self.write_merged)


def l1_of_raw(z, h):
    """L1 between predictions z [B, …, D] that are not layer-normed yet and latents h of that shape
    or [N, D]: means [B], float32."""
    return (model.layer_norm(z) - h.float()).abs().flatten(1).mean(dim=1)


def l1_and_l2(z, h):
    """`WorldModel.distances`."""
    d = (z - h.float()).abs().flatten(1)
    return torch.stack([d.mean(dim=1), d.square().mean(dim=1)], dim=1)


class FastWorldModel(model.WorldModel):
    # `fast.accelerate` puts compiled ones here.
    l1_and_l2, l1_of_raw = staticmethod(l1_and_l2), staticmethod(l1_of_raw)
    layer_norm = staticmethod(model.layer_norm)

    def predict(self, h, actions, states, kv_cache=None):
        z = self.predictor(h.flatten(1, 2), actions, states, kv_cache)
        return self.layer_norm(z).unflatten(1, h.shape[1:3])                    # [B, T, N, D]

    def distances(self, z, h):
        return self.l1_and_l2(z, h)

    def losses(self, h, actions, states, rollout=2):
        """`WorldModel.losses`, with no time step computed twice: teacher forcing keeps the keys and
        values of its first time step, which is the rollout's first too."""
        T, N = h.shape[1:3]
        if rollout >= T:
            raise ValueError(f"rollout {rollout} needs more than {rollout} frames, "
                             f"the clip has {T}")
        run = self.predictor.run
        z, kv = run(h[:, :-1].flatten(1, 2), actions[:, :-1], states[:, :-1],
                    keep=int(rollout > 1))                                      # [B, (T-1)*N, D]
        z = z.unflatten(1, (T - 1, N))                                          # [B, T-1, N, D]
        losses = {"teacher_forcing": self.l1_of_raw(z, h[:, 1:]).mean(),
                  "rollout": z.new_zeros((), dtype=torch.float32)}
        if rollout:
            predicted = [z[:, :1]]                                              # [B, 1, N, D]
            for n in range(1, rollout):
                last = self.layer_norm(predicted[-1]).flatten(1, 2)
                z, kv = run(last, actions[:, n:n + 1], states[:, n:n + 1], kv,
                            keep=n + 1 if n + 1 < rollout else 0)
                predicted.append(z.unflatten(1, (1, N)))
            predicted = torch.cat(predicted, dim=1)
            losses["rollout"] = self.l1_of_raw(predicted, h[:, 1:rollout + 1]).mean()
        return losses

    def forward(self, *args, **kwargs):
        # Validation runs in eval mode, too seldom to be worth compiling for its shapes.
        if self.training:
            return super().forward(*args, **kwargs)
        with self.uncompiled():
            return super().forward(*args, **kwargs)

    def uncompiled(self):
        """Within this context compiled parts run eagerly."""
        return eager()
