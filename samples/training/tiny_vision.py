"""The training twin of the vision tower of `samples/tiny`: Llama 4's, differentiable, with the checkpoint's names.

Shares no code with the inference package `model`, so that each checks the other. Also holds the tower's configuration,
and turns images into its input.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

VISION_CONFIG: dict[str, Any] = {
    "model_type": "llama4_vision_model",
    "image_size": 112,
    "patch_size": 14,
    "num_channels": 3,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,  # of the layers; also four concatenated patches in the adapter
    "hidden_act": "gelu",
    "norm_eps": 1e-5,
    "rope_theta": 10000,
    "attention_dropout": 0.0,
    "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 256,
    "projector_output_dim": 256,
    "projector_dropout": 0.0,
    "vision_output_dim": 256,
    "multi_modal_projector_bias": False,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "initializer_range": 0.02,
}
_C = VISION_CONFIG
TILE = _C["image_size"]  # side in pixels
SIDE = TILE // _C["patch_size"]  # patches per side
TILE_TOKENS = round((SIDE * _C["pixel_shuffle_ratio"]) ** 2)
HINTED_LAYER = 1  # whose output the auxiliary loss of the training reads


class PatchEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(_C["num_channels"] * _C["patch_size"] ** 2, _C["hidden_size"], bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        b, channels, p = pixels.shape[0], _C["num_channels"], _C["patch_size"]
        patches = pixels.view(b, channels, SIDE, p, SIDE, p).permute(0, 2, 4, 1, 3, 5)
        return self.linear(patches.reshape(b, SIDE * SIDE, -1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        c = _C["hidden_size"]
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(c, c) for _ in range(4))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (
            project(x).view(b, t, _C["num_attention_heads"], -1).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (_rotate(y, cos, sin) for y in (q, k))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


def _phases() -> Tensor:
    """Angles (T, head size / 2): first half by column, second by row, both from 1; zero for the class token."""
    half = _C["hidden_size"] // _C["num_attention_heads"] // 2
    frequencies = _C["rope_theta"] ** -(torch.arange(0, half, 2) / half)
    rows, columns = torch.meshgrid(torch.arange(SIDE) + 1.0, torch.arange(SIDE) + 1.0, indexing="ij")
    phases = torch.cat([columns.reshape(-1, 1) * frequencies, rows.reshape(-1, 1) * frequencies], -1)
    return F.pad(phases, (0, 0, 0, 1))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(_C["hidden_size"], _C["intermediate_size"])
        self.fc2 = nn.Linear(_C["intermediate_size"], _C["hidden_size"])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(), MLP()
        self.input_layernorm = nn.LayerNorm(_C["hidden_size"], eps=_C["norm_eps"])
        self.post_attention_layernorm = nn.LayerNorm(_C["hidden_size"], eps=_C["norm_eps"])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class AdapterMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(_C["intermediate_size"], _C["projector_input_dim"], bias=False)
        self.fc2 = nn.Linear(_C["projector_output_dim"], _C["projector_output_dim"], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.fc2(F.gelu(self.fc1(x))))


class Adapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = AdapterMLP()

    def forward(self, x: Tensor) -> Tensor:
        """(B, patches, C) -> (B, patches / 4, out): concatenates squares of 2 x 2 patches, in row-major order."""
        b, _, c = x.shape
        squares = x.view(b, SIDE // 2, 2, SIDE // 2, 2, c).transpose(2, 3)
        return self.mlp(squares.reshape(b, TILE_TOKENS, 4 * c))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(_C["num_hidden_layers"]))


class VisionModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        c = _C["hidden_size"]
        self.patch_embedding = PatchEmbedding()
        self.class_embedding = nn.Parameter(torch.randn(c) * c**-0.5)
        self.positional_embedding_vlm = nn.Parameter(torch.randn(SIDE * SIDE + 1, c) * c**-0.5)
        self.layernorm_pre, self.layernorm_post = (nn.LayerNorm(c, eps=_C["norm_eps"]) for _ in range(2))
        self.model = Encoder()
        self.vision_adapter = Adapter()


class Projector(nn.Module):
    def __init__(self, text_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(_C["vision_output_dim"], text_size, bias=False)


class VisionForTraining(nn.Module):
    """Maps tiles into the text model's embedding space.

    `hinted`: the patches' hidden states (B, patches, C) after HINTED_LAYER in the last forward, for an auxiliary loss.
    """

    hinted: Tensor

    def __init__(self, text_size: int) -> None:
        super().__init__()
        self.vision_model, self.multi_modal_projector = VisionModel(), Projector(text_size)
        self.register_buffer("cos", _phases().cos(), persistent=False)
        self.register_buffer("sin", _phases().sin(), persistent=False)
        for name, p in self.named_parameters():
            if p.ndim > 1 and "embedding_vlm" not in name:
                gain = 1.5 if "adapter" in name else 1.0  # makes up for GELU, which halves its input
                ends = "o_proj" in name or ".mlp.fc2" in name.partition("layers")[2]
                nn.init.normal_(p, std=gain * (p.shape[1] * (2 * _C["num_hidden_layers"] if ends else 1)) ** -0.5)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, TILE, TILE) -> (B, TILE_TOKENS, text size)."""
        vision = self.vision_model
        x = vision.patch_embedding(pixels)
        x = torch.cat([x, vision.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)], 1)
        x = vision.layernorm_pre(x + vision.positional_embedding_vlm)
        for number, layer in enumerate(vision.model.layers):
            x = layer(x, self.cos, self.sin)
            if number == HINTED_LAYER:
                self.hinted = x[:, :-1]
        return self.multi_modal_projector.linear_1(vision.vision_adapter(vision.layernorm_post(x)[:, :-1]))


def to_pixels(tiles: list[Image.Image]) -> Tensor:
    """RGB images of TILE x TILE as the tower's input: from -1 to 1, rounded to bfloat16."""
    rows = [torch.frombuffer(bytearray(tile.tobytes()), dtype=torch.uint8) for tile in tiles]
    pixels = torch.stack(rows).view(-1, TILE, TILE, 3).permute(0, 3, 1, 2)
    return ((pixels.float() / 255 - 0.5) / 0.5).bfloat16().float().contiguous()
