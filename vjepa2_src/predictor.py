"""The action-conditioned predictor: latents, actions and states of frames 0..t -> latents of t+1.

As released: width 1024, depth 24, 16 heads, MLP ratio 4, 305,220,992 parameters.
"""
from functools import lru_cache
from itertools import repeat

import torch
import torch.nn as nn

from vjepa2_src.blocks import Block, init_weights, rope_table


N_COND = 2          # condition tokens per time step: the action and the state


@lru_cache(maxsize=64)
def causal_mask(frames, past_frames, tokens, device):
    """[frames * tokens, (past_frames + frames) * tokens] bool, True where a query may look.

    Attention is causal by time step and full inside it: the patches of a frame see the frame's own
    action and state, and the reverse, and all of the frames before."""
    with torch.inference_mode(False):       # cached, as rope_table
        step = torch.arange(past_frames + frames, device=device).repeat_interleave(tokens)
        return step[past_frames * tokens:, None] >= step[None, :]


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

    def init_weights(self):
        init_weights(self, len(self.predictor_blocks))

    def forward(self, z, actions, states, kv_cache=None):
        """z [B, T*N, encoder_dim], actions [B, T, 7], states [B, T, 7], any float dtype.

        Actions and states as in `droid.pose_deltas`: metres, radians, gripper 0..1. Returns
        [B, T*N, encoder_dim]: for each frame t the latents of frame t+1, not layer-normed, in the
        weights' dtype (autocast's under it).

        kv_cache: a list, empty before the first call and updated in place: one list per block, of
        keys and values. A sequence is then continued without computing its beginning again.
        Raises ValueError for shapes that do not fit each other."""
        T, N = actions.shape[1], self.grid ** 2
        tokens = N_COND + N
        x = self.embed(z, actions, states).flatten(1, 2)                            # [B, L, P]

        if kv_cache is not None and not kv_cache:
            kv_cache.extend([] for _ in self.predictor_blocks)
        past = kv_cache[0][0].shape[2] // tokens if kv_cache and kv_cache[0] else 0     # time steps
        rope = rope_table(self.head_dim, T, self.grid, self.grid, self.grid, N_COND, z.device, past)
        # A single time step sees everything that is there: no mask.
        mask = causal_mask(T, past, tokens, z.device) if T > 1 else None
        for block, cache in zip(self.predictor_blocks, kv_cache or repeat(None)):
            x = block(x, rope, mask, cache)

        patches = x.unflatten(1, (T, tokens))[:, :, N_COND:].flatten(1, 2)          # [B, T*N, P]
        return self.predictor_proj(self.predictor_norm(patches))

    def embed(self, z, actions, states):
        """The tokens of each time step, in the order of the paper: action, state, patches.

        Returns [B, T, 2 + N, P]. (The order itself carries no meaning: the positions are in the
        rotations, and the action and state token differ by their encoders.)"""
        T, N = actions.shape[1], self.grid ** 2
        if z.shape[1] != T * N or states.shape != actions.shape:
            raise ValueError(f"latents {list(z.shape)}, actions {list(actions.shape)}, states "
                             f"{list(states.shape)}: expected {T} x {N} tokens and equal shapes")
        dtype = self.predictor_norm.weight.dtype
        action = self.action_encoder(actions.to(dtype)).unsqueeze(2)                # [B, T, 1, P]
        state = self.state_encoder(states.to(dtype)).unsqueeze(2)                   # [B, T, 1, P]
        patches = self.predictor_embed(z.to(dtype)).unflatten(1, (T, N))            # [B, T, N, P]
        return torch.cat([action, state, patches], dim=2)
