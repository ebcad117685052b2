"""The video encoder: a vision transformer over tubelets of 2 frames × 16 × 16 pixels.

ViT-g/16 as released: width 1408, depth 40, 22 heads, MLP ratio 48/11, 1,012,173,952 parameters.
"""
import torch.nn as nn
import torch.nn.functional as F

from vjepa2_src.blocks import Block, init_weights, rope_table


class PatchEmbed(nn.Module):
    """Cuts a clip into tubelets and projects each: a 3-D convolution without overlap."""

    def __init__(self, dim, patch, tubelet):
        super().__init__()
        self.proj = nn.Conv3d(3, dim, (tubelet, patch, patch), stride=(tubelet, patch, patch))

    def forward(self, clip):
        """clip [B, 3, T, H, W] -> [B, (T / tubelet) * rows * cols, D], frame slowest."""
        tubelet, patch, _ = self.proj.kernel_size
        x = clip.unflatten(4, (-1, patch)).unflatten(3, (-1, patch)).unflatten(2, (-1, tubelet))
        x = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)      # [B, L, 3*2*16*16]
        # One matrix product: the convolution itself is slow in half precision on many builds.
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)     # [B, L, D]


class Encoder(nn.Module):
    def __init__(self, dim, depth, n_heads, image_size=256, patch=16, tubelet=2, mlp_ratio=48 / 11):
        super().__init__()
        self.dim, self.patch, self.tubelet = dim, patch, tubelet
        self.grid = image_size // patch
        self.head_dim = dim // n_heads
        self.patch_embed = PatchEmbed(dim, patch, tubelet)
        self.blocks = nn.ModuleList(Block(dim, n_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def init_weights(self):
        init_weights(self, len(self.blocks))

    def forward(self, clip):
        """clip [B, 3, T, H, W], RGB normalised with ImageNet's mean and std, any float dtype.

        T, H and W must be multiples of tubelet, patch and patch. Returns
        [B, (T / tubelet) * (H / patch) * (W / patch), dim] in the weights' dtype (autocast's under
        it). Raises ValueError for other sizes."""
        _, _, T, H, W = clip.shape
        if T % self.tubelet or H % self.patch or W % self.patch:
            raise ValueError(f"clip of {T} frames of {H}x{W} pixels: need multiples of "
                             f"{self.tubelet} frames and {self.patch} pixels")
        rope = rope_table(self.head_dim, T // self.tubelet, H // self.patch, W // self.patch,
                          self.grid, 0, clip.device)
        x = self.patch_embed(clip.to(self.norm.weight.dtype))               # [B, L, D]
        for block in self.blocks:
            x = block(x, rope)
        return self.norm(x)
