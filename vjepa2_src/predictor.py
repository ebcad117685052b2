"""The action-conditioned predictor: from latents, actions and states of frames 0..t to the latents of t+1.

As released: width 1024, depth 24, 16 heads, MLP ratio 4, 305,220,992 parameters. A time step has N patches, an action and a
state; attention is causal by time step and full inside it. The order of tokens is ours (positions are in the rotations): the
patches of all steps, then [action, state] of each.
"""
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from vjepa2_src.attention import has_fast_attention
from vjepa2_src.blocks import Block, causal_mask, init_weights, rope_table

N_COND = 2          # condition tokens per time step: the action and the state


class Predictor(nn.Module):
    def __init__(self, encoder_dim, dim, depth, n_heads, image_size=256, patch=16, mlp_ratio=4.0):
        super().__init__()
        self.grid = image_size // patch
        self.head_dim = dim // n_heads
        self.predictor_embed = nn.Linear(encoder_dim, dim)
        self.action_encoder = nn.Linear(7, dim)
        self.state_encoder = nn.Linear(7, dim)
        self.extrinsics_encoder = nn.Linear(6, dim)     # in the released file; nothing uses it
        self.predictor_blocks = nn.ModuleList(Block(dim, n_heads, mlp_ratio) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(dim, eps=1e-6)
        self.predictor_proj = nn.Linear(dim, encoder_dim)
        self.activation_checkpointing = False           # recompute each block in the backward pass

    def init_weights(self):
        init_weights(self, len(self.predictor_blocks))

    def forward(self, z, actions, states):
        """z [B, T*N, encoder_dim], actions [B, T, 7], states [B, T, 7], any float dtype.

        Actions and states as in `droid.pose_deltas`: metres, radians, gripper 0..1. Returns
        [B, T*N, encoder_dim]: for each frame t the latents of frame t+1, not layer-normed, in the
        weights' dtype (autocast's under it).
        """
        return self.remember(z, actions, states)[0]

    def remember(self, z, actions, states, memory=None, keep=0):
        """As `forward`, in parts: -> predictions, the memory of time steps seen so far.

        memory: what an earlier call returned; z, actions and states are then one time step that follows (T = 1), and no
        step is computed twice. keep: time steps to remember, from the very first; 0 for none."""
        T, N = actions.shape[1], self.grid ** 2
        if z.shape[1] != T * N or states.shape != actions.shape:
            raise ValueError(f"latents {list(z.shape)}, actions {list(actions.shape)}, states "
                             f"{list(states.shape)}: expected {T} x {N} tokens and equal shapes")
        assert memory is None or T == 1, T
        dtype = self.predictor_norm.weight.dtype
        conditions = torch.stack([self.action_encoder(actions.to(dtype)), self.state_encoder(states.to(dtype))], dim=2)   # [B, T, 2, P]
        x = torch.cat([self.predictor_embed(z.to(dtype)), conditions.flatten(1, 2)], dim=1)     # [B, T*N + T*2, P]
        seen = memory[0][0].shape[2] // (N + N_COND) if memory else 0
        table = rope_table(self.head_dim, T, self.grid, self.grid, self.grid, N_COND, z.device, seen)
        fast = has_fast_attention(x, N, self.head_dim)
        mask = causal_mask(T, N, N_COND, z.device) if T > 1 and not fast else None
        remembered = []
        for block, past in zip(self.predictor_blocks, memory or [None] * len(self.predictor_blocks)):
            arguments = x, table, (T, N), fast, mask, past, keep
            if self.activation_checkpointing and torch.is_grad_enabled():
                # the reentrant kind would leave adapters without gradients, silently
                # nothing in a block is random: LoRA's dropout is drawn before
                x, kept = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x, kept = block(*arguments)
            remembered.append(kept)
        return self.predictor_proj(self.predictor_norm(x[:, :T * N])), remembered if keep else None
