"""The reference algorithm written plainly in PyTorch, the way research code has it.

Every block makes its own adaLN modulation at every step, reused or not; Python decides per block
and step; each block keeps a queue of the two newest pairs of branch outputs (before the gate),
pushed after every call; and with the gradient the difference of the two is taken at every step,
used or not. Source: "Accelerating Diffusion Transformer via Gradient-Optimized Cache", ICCV 2025,
section 3, and what its code is known to do.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from goc_deploy.exporters.architectures.dit import spec_from_tensors
from goc_deploy.exporters.architectures.dit_model import Block, DiT, modulate, unpatchify
from goc_deploy.exporters.checkpoint import load_checkpoint

Pair = tuple[Tensor, Tensor]


def read_dit(checkpoint: Path, heads: int | None) -> DiT:
    """Read a DiT in float32, whatever its checkpoint is stored in; ``heads`` as of an export."""
    tensors = load_checkpoint(checkpoint, "auto").tensors
    with torch.device("meta"):
        model = DiT(spec_from_tensors(tensors, heads))
    model.load_state_dict(dict(tensors), assign=True)
    return model.float().eval().requires_grad_(False)


def attention(block: Block, x: Tensor) -> Tensor:
    """The attention branch with PyTorch's fused kernel, (B, T, D) to (B, T, D)."""
    batch, tokens, hidden = x.shape
    heads = block.attn.heads
    q, k, v = (
        block.attn.qkv(x).reshape(batch, tokens, 3, heads, hidden // heads).permute(2, 0, 3, 1, 4)
    )
    mixed = F.scaled_dot_product_attention(q, k, v)  # (B, heads, T, D / heads)
    return block.attn.proj(mixed.transpose(1, 2).reshape(batch, tokens, hidden))


class EagerDiT:
    """A DiT with an optional cache.

    Args:
        model: the weights.
        reused: steps that compute no branch.
        eta: weight of the trend at reused steps from 3 on; None reuses plainly.
    """

    def __init__(
        self, model: DiT, reused: frozenset[int] = frozenset(), eta: float | None = None
    ) -> None:
        self.model, self.reused, self.eta = model, reused, eta
        self.queues: list[list[Pair]] = []

    def __call__(self, x: Tensor, timesteps: Tensor, labels: Tensor, step: int) -> Tensor:
        """Predict for a batch at a step; step 0 starts anew."""
        model = self.model
        if step == 0:
            self.queues = [[] for _ in model.blocks]
        condition = model.t_embedder(timesteps) + model.y_embedder(labels)  # (B, D)
        x = model.x_embedder(x) + model.pos_embed  # (B, T, D)
        for block, queue in zip(model.blocks, self.queues, strict=True):
            x = self._block(block, queue, x, condition, step)
        shift, scale = model.final_layer.adaLN_modulation(condition).chunk(2, dim=1)
        return unpatchify(model.final_layer.linear(modulate(x, shift, scale)), model.spec)

    def _block(
        self, block: Block, queue: list[Pair], x: Tensor, condition: Tensor, step: int
    ) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.adaLN_modulation(
            condition
        ).chunk(6, dim=1)
        trend: Pair | None = None
        if self.eta is not None and step >= 2:
            trend = (queue[0][0] - queue[1][0], queue[0][1] - queue[1][1])
        if step in self.reused:
            attn, mlp = queue[0]
            if trend is not None and self.eta is not None:
                attn, mlp = attn + self.eta * trend[0], mlp + self.eta * trend[1]
            x = x + gate_a.unsqueeze(1) * attn
            x = x + gate_m.unsqueeze(1) * mlp
        else:
            attn = attention(block, modulate(x, shift_a, scale_a))
            x = x + gate_a.unsqueeze(1) * attn
            mlp = block.mlp(modulate(x, shift_m, scale_m))
            x = x + gate_m.unsqueeze(1) * mlp
        queue.insert(0, (attn, mlp))
        del queue[2:]
        return x
