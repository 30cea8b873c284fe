"""The diffusion transformer of `benchmarks/train_step.py` in PyTorch, with torch's own fused
parts: scaled_dot_product_attention (on GPUs FlexAttention with a mask of blocks, too), layer and
RMS norms, fused AdamW, foreach clipping and averaging; eager or torch.compile.

`train_step.py` starts it as a process of its own; it prints lines of JSON (see `worker.py`).
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
import worker
from cases import Case, make_batch, make_case
from torch import nn

THETA = 10_000.0


def linear(wide, out, zero=False, bias=True):
    layer = nn.Linear(wide, out, bias=bias)
    (nn.init.zeros_ if zero else nn.init.xavier_uniform_)(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class Block(nn.Module):
    """adaLN-zero attention, cross-attention and MLP. Source: DiT, arXiv 2212.09748, figure 3."""

    def __init__(self, case: Case):
        super().__init__()
        width, self.heads, self.rope = case.width, case.num_heads, case.rope
        self.mod = linear(width, 6 * width, zero=True)
        self.qkv, self.out = linear(width, 3 * width), linear(width, width)
        self.mlp_in, self.mlp_out = linear(width, 4 * width), linear(4 * width, width)
        if case.rope:
            self.q_norm, self.k_norm = (nn.RMSNorm(width // self.heads, eps=1e-6)
                                        for _ in range(2))
        self.crosses = bool(case.text_tokens)
        if self.crosses:
            self.cross_q, self.cross_kv = linear(width, width), linear(case.text_width, 2 * width)
            self.cross_out = linear(width, width, zero=True)
            if case.rope:
                self.cross_q_norm, self.cross_k_norm = (
                    nn.RMSNorm(width // self.heads, eps=1e-6) for _ in range(2))

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1))

    def attend(self, q, k, v, mask):
        q, k, v = (x.transpose(1, 2).to(v.dtype) for x in (q, k, v))
        if callable(mask):
            y = mask(q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return y.transpose(1, 2).flatten(2)

    def forward(self, x, condition, own, angles, mask, text, text_mask):
        mod = self.mod(F.silu(condition))
        mod = mod if own is None else torch.gather(mod, 1, own.expand(-1, -1, mod.shape[-1]))
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = mod.chunk(6, dim=-1)
        h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale_1) + shift_1
        q, k, v = map(self.split, self.qkv(h).chunk(3, dim=-1))
        if self.rope:
            q, k = rotate(self.q_norm(q), *angles), rotate(self.k_norm(k), *angles)
        x = x + gate_1 * self.out(self.attend(q, k, v, mask))
        if self.crosses:
            q = self.split(self.cross_q(F.layer_norm(x, x.shape[-1:], eps=1e-6)))
            k, v = map(self.split, self.cross_kv(text).chunk(2, dim=-1))
            if self.rope:
                q, k = self.cross_q_norm(q), self.cross_k_norm(k)
            x = x + self.cross_out(self.attend(q, k, v, text_mask))
        h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale_2) + shift_2
        return x + gate_2 * self.mlp_out(F.gelu(self.mlp_in(h), approximate="tanh"))


class DiT(nn.Module):
    """Tokens (B, N, D), times (B, S) -> outputs (B, N, out_width)."""

    def __init__(self, case: Case):
        super().__init__()
        self.patch_in = linear(case.in_width, case.width)
        self.time_in, self.time_out = linear(256, case.width), linear(case.width, case.width)
        if not case.text_tokens:
            self.label_table = nn.Parameter(0.02 * torch.randn(case.num_classes + 1, case.width))
        self.blocks = nn.ModuleList(Block(case) for _ in range(case.num_layers))
        self.head_mod = linear(case.width, 2 * case.width, zero=True)
        self.patch_out = linear(case.width, case.out_width, zero=True)

    def forward(self, tokens, time, label, own, place, angles, mask, text, text_mask):
        frequency = torch.exp(-math.log(THETA) / 128 * torch.arange(128, device=tokens.device))
        angle = 1000 * time[..., None] * frequency
        features = torch.cat([angle.cos(), angle.sin()], -1)
        condition = self.time_out(F.silu(self.time_in(features)))
        if hasattr(self, "label_table"):
            condition = condition + self.label_table[label]
        x = self.patch_in(tokens)
        x = x if place is None else x + place
        for block in self.blocks:
            x = block(x, condition, own, angles, mask, text, text_mask)
        mod = self.head_mod(F.silu(condition))
        mod = mod if own is None else torch.gather(mod, 1, own.expand(-1, -1, mod.shape[-1]))
        shift, scale = mod.chunk(2, dim=-1)
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        return self.patch_out(x).float()


def rotate(x, cos, sin):
    """Pairs (2i, 2i + 1) of channels rotated: cos, sin (B, N, 1, E) hold each angle twice."""
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack([-odd, even], -1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)


def rotary(position, head_width):
    """cos and sin of the rotary angles, (B, N, 1, E). Source: Wan 2.1's split of a head."""
    side = 2 * (head_width // 6)
    parts = []
    for axis, width in enumerate((head_width - 2 * side, side, side)):
        frequency = THETA ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        parts.append(position[..., axis, None] * frequency.to(position.device, torch.float32))
    angles = torch.cat(parts, -1).repeat_interleave(2, -1)[:, :, None]
    return angles.cos(), angles.sin()


def sincos2d(position, width):
    """Fixed features (B, N, width) of (w, h). Source: DiT's code."""
    frequency = THETA ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    parts = []
    for axis in (2, 1):
        angle = position[..., axis, None] * frequency.to(position.device, torch.float32)
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, -1)


class Peer:
    """One variant: model, batch, optimizer, average, and `step`."""

    def __init__(self, case: Case, mode: str, device: str):
        torch.manual_seed(0)
        self.case, self.device = case, device
        self.model = DiT(case).to(device)
        self.ema = [p.detach().clone() for p in self.model.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=(0.9, 0.99), fused=True)
        batch = {name: torch.from_numpy(x).to(device) for name, x in make_batch(case).items()}
        segment = batch["segment_BN"].long()
        self.tokens, self.label, self.real = batch["tokens_BND"], batch["label_BS"], segment > 0
        alone = case.max_clips == 1
        self.own = None if alone else (segment - 1).clamp(min=0)[..., None]
        position = batch["position_BN3"].float()
        self.angles = rotary(position, case.width // case.num_heads) if case.rope else None
        self.place = None if case.rope else sincos2d(position, case.width)
        self.mask = None if alone else self.mask_of(segment, mode)
        self.text = self.text_mask = None
        if case.text_tokens:
            self.text = batch["text_embedding_BMD"]
            self.text_mask = (segment[:, :, None] == batch["text_segment_BM"][:, None])[:, None]
            self.text_mask |= ~self.real[:, None, :, None]  # a query without keys gives NaN
        self.loss = self.loss_of if mode == "eager" else torch.compile(self.loss_of)

    def mask_of(self, segment, mode):
        if mode == "flex":
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention

            B, N = segment.shape
            blocks = create_block_mask(
                lambda b, h, q, k: segment[b, q] == segment[b, k], B, None, N, N, self.device)
            return lambda q, k, v: flex_attention(q, k, v, block_mask=blocks)
        return (segment[:, :, None] == segment[:, None])[:, None]

    def forward(self, tokens, time):
        with torch.autocast(self.device.split(":")[0], torch.bfloat16,
                            enabled=self.case.dtype == "bfloat16"):
            return self.model(tokens, time, self.label, self.own, self.place, self.angles,
                              self.mask, self.text, self.text_mask)

    def loss_of(self, noise, time):
        """Mean squared velocity error of useful tokens, each clip at a time of its own."""
        token_time = time[..., None] if self.own is None else torch.gather(time[..., None], 1,
                                                                           self.own)
        noised = (1 - token_time) * self.tokens + token_time * noise
        out = self.forward(noised, time)
        target = (noise - self.tokens).repeat(1, 1, out.shape[-1] // noise.shape[-1])
        error = ((out - target) ** 2).mean(-1)
        return (error * self.real).sum() / self.real.sum()

    def step(self):
        """Forward, backward, clipping, AdamW and the average of weights; the loss."""
        noise = torch.randn_like(self.tokens)
        time = torch.rand(self.label.shape, device=self.device)
        loss = self.loss(noise, time)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, list(self.model.parameters()), 0.001)
        return float(loss.detach())


def load(model: nn.Module, arrays: dict[str, np.ndarray]) -> None:
    """Our parameters ("blocks/qkv/kernel", layers stacked) into the peer: every one is used."""
    left = set(arrays)
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        layer = int(parts.pop(1)) if parts[0] == "blocks" else None
        if parts[-1] == "weight":
            parts[-1] = "scale" if parts[-2].endswith("norm") else "kernel"
        key = "/".join(parts)
        value = arrays[key] if layer is None else arrays[key][layer]
        value = value.T if parts[-1] == "kernel" else value
        assert value.shape == tuple(parameter.shape), (name, value.shape)
        parameter.data.copy_(torch.from_numpy(np.ascontiguousarray(value)))
        left.discard(key)
    assert not left, f"parameters that the peer lacks: {sorted(left)}"


def main():
    options = worker.options()
    if options.threads:
        torch.set_num_threads(options.threads)
    peer = Peer(make_case(options.case, options.rows), options.mode, options.device)
    if options.check:
        given = dict(np.load(options.check))
        inputs = [torch.from_numpy(given.pop(name)) for name in ("noised_BND", "time_BS")]
        load(peer.model, given)
        with torch.no_grad():
            np.save(options.check + ".out.npy", peer.forward(*inputs).numpy())
        return
    if options.device == "cpu":
        a = torch.randn(2048, 2048)
        peak = lambda: float((a @ a)[0, 0])  # noqa: E731
    else:
        peak = None
    parameters = sum(p.numel() for p in peer.model.parameters())

    def memory():
        return 0 if options.device == "cpu" else torch.cuda.max_memory_allocated()

    worker.serve(peer.step, f"torch {torch.__version__}", parameters, peak, memory)


if __name__ == "__main__":
    main()
