"""Llama 4's vision tower: pixels of image tiles -> text-model embeddings. Parameter names equal the checkpoint's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers import Linear
from model.rope import rotate
from model.transfers import to_device
from model.vision.config import VisionConfig


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm with uninitialised weights; its default eps of 1e-5 is the reference's."""

    def reset_parameters(self) -> None:
        pass


class PatchEmbedding(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.linear = Linear(config.num_channels * config.patch_size**2, config.hidden_size, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, P, C), patches in row-major order."""
        size = self.patch_size
        squares = pixels.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (N, 3, rows, y, columns, x)
        return self.linear(squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        c = config.hidden_size
        self.head_dim = config.head_dim
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (Linear(c, c) for _ in range(4))

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """x (N, T, C) and rotation (T, D // 2) -> (N, T, C); bidirectional attention within each tile."""
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, rotation), rotate(k, rotation)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, scale=self.head_dim**-0.5)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class VisionLayer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.input_layernorm = LayerNorm(config.hidden_size)
        self.self_attn = VisionAttention(config)
        self.post_attention_layernorm = LayerNorm(config.hidden_size)
        self.mlp = VisionMLP(config)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """(N, T, C) -> the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), rotation)
        return x.add_(self.mlp(self.post_attention_layernorm(x)))


class VisionTrunk(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))


class AdapterMLP(nn.Module):
    """Two linear layers, each followed by a GELU."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.intermediate_size, config.projector_input_dim, bias=False)
        self.fc2 = Linear(config.projector_input_dim, config.projector_output_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.fc2(F.gelu(self.fc1(x))))


class VisionAdapter(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.side = config.shuffle
        self.mlp = AdapterMLP(config)

    def forward(self, patches: Tensor) -> Tensor:
        """(N, P, C) -> (N, tokens_per_tile, vision_output_dim)."""
        return self.mlp(pixel_shuffle(patches, self.side))


class VisionModel(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embedding = PatchEmbedding(config)
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.positional_embedding_vlm = nn.Parameter(torch.empty(config.patches_per_tile + 1, config.hidden_size))
        self.layernorm_pre = LayerNorm(config.hidden_size)
        self.model = VisionTrunk(config)
        self.layernorm_post = LayerNorm(config.hidden_size)
        self.vision_adapter = VisionAdapter(config)

    def forward(self, pixels: Tensor, rotation: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, tokens_per_tile, vision_output_dim)."""
        x = self.layernorm_pre(self.embed(pixels))
        for layer in self.model.layers:
            x = layer(x, rotation)
        return self.vision_adapter(self.layernorm_post(x)[:, :-1])

    def embed(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, P + 1, C): patches in row-major order, then the class token; learned positions added."""
        patches = self.patch_embedding(pixels)
        return torch.cat([patches, self.class_embedding.expand(len(patches), 1, -1)], 1) + self.positional_embedding_vlm


class Projector(nn.Module):
    def __init__(self, config: VisionConfig, text_hidden_size: int) -> None:
        super().__init__()
        self.linear_1 = Linear(config.vision_output_dim, text_hidden_size, bias=False)


class VisionTower(nn.Module):
    """The vision model and its projection into a text model of width `text_hidden_size`."""

    def __init__(self, config: VisionConfig, text_hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionModel(config)
        self.multi_modal_projector = Projector(config, text_hidden_size)
        self._rotation: Tensor | None = None  # computed in the first forward: on the meta device it would be empty

    @property
    def device(self) -> torch.device:
        return self.vision_model.class_embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_model.class_embedding.dtype

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> Tensor:
        """Normalized pixels (N, 3, image_size, image_size) of N tiles -> (N, tokens_per_tile, text_hidden_size).

        Pixels are converted to the weights' dtype and device. Tiles are independent; the tokens of a tile are in
        row-major order.
        """
        size = self.config.image_size
        assert pixels.shape[1:] == (self.config.num_channels, size, size), pixels.shape
        if self._rotation is None or self._rotation.device != self.device:
            self._rotation = to_device(grid_rotation(self.config), self.device)
        features = self.vision_model(to_device(pixels.to(self.dtype), self.device), self._rotation)
        return self.multi_modal_projector.linear_1(features)


def grid_rotation(config: VisionConfig) -> Tensor:
    """Rotations as unit complex numbers: a tile's patches in row-major order, then the class token.

    Returns (P + 1, head_dim // 2) complex64. The first half of a head's pairs rotates by the patch's column, the second
    by its row, both counted from 1; the class token is not rotated. Angles are computed in float64.
    """
    half = config.head_dim // 2
    frequencies = config.rope_theta ** -(torch.arange(0, half, 2, dtype=torch.float64) / half)
    turns = torch.arange(1, config.grid + 1)[:, None] * frequencies  # (grid, D / 4)
    columns, rows = turns.repeat(config.grid, 1), turns.repeat_interleave(config.grid, 0)
    patches = torch.cat([columns, rows], 1)
    angles = torch.cat([patches, torch.zeros_like(patches[:1])])
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def pixel_shuffle(patches: Tensor, side: int) -> Tensor:
    """Merges squares of side x side patches: (N, P, C) -> (N, P // side**2, side**2 * C).

    Patches, squares, and the patches within a square are all in row-major order.
    """
    grid = round(patches.shape[1] ** 0.5)
    squares = patches.unflatten(1, (grid // side, side, grid // side, side))
    return squares.transpose(2, 3).flatten(3).flatten(1, 2)
