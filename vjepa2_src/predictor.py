"""The action-conditioned predictor: from latents, actions and states of frames 0..t to the latents of t+1.

As released: width 1024, depth 24, 16 heads, MLP ratio 4, 305,220,992 parameters. The tokens of one time
step are [action, state, N patches]; attention is causal by time step and full inside it.
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
        T, N = actions.shape[1], self.grid ** 2
        if z.shape[1] != T * N or states.shape != actions.shape:
            raise ValueError(f"latents {list(z.shape)}, actions {list(actions.shape)}, states "
                             f"{list(states.shape)}: expected {T} x {N} tokens and equal shapes")
        dtype = self.predictor_norm.weight.dtype
        x = self.predictor_embed(z.to(dtype)).unflatten(1, (T, N))                  # [B, T, N, P]
        a = self.action_encoder(actions.to(dtype)).unsqueeze(2)                     # [B, T, 1, P]
        s = self.state_encoder(states.to(dtype)).unsqueeze(2)                       # [B, T, 1, P]
        x = torch.cat([a, s, x], dim=2).flatten(1, 2)                               # [B, T*(2+N), P]
        table = rope_table(self.head_dim, T, self.grid, self.grid, self.grid, N_COND, z.device)
        fast = has_fast_attention(x, T, self.head_dim)
        steps = T if fast else 1
        mask = causal_mask(T, N_COND + N, z.device) if T > 1 and not fast else None
        for block in self.predictor_blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                # the reentrant kind would leave adapters without gradients, silently
                # nothing in a block is random: LoRA's dropout is drawn before
                x = checkpoint(block, x, table, mask, steps, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, table, mask, steps)
        x = x.unflatten(1, (T, N_COND + N))[:, :, N_COND:].flatten(1, 2)            # [B, T*N, P]
        return self.predictor_proj(self.predictor_norm(x))
