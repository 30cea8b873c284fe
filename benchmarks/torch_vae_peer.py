"""The VAE of `benchmarks/vae_train_step.py` in PyTorch: the same function with torch's 3-D
convolutions, under the published names of its parameters; eager or torch.compile, and with
channels last in memory.

`vae_train_step.py` starts it as a process of its own; it prints lines of JSON (see `worker.py`).
"""

import numpy as np
import torch
import torch.nn.functional as F
import worker
from safetensors.torch import load_file
from torch import nn
from vae_cases import CASES, VAECase, make_pixels

KL_WEIGHT = 1e-6
MODES = ("eager", "compile", "eager_last", "compile_last")


class Causal(nn.Conv3d):
    """Zero frames in front, so that no output sees a later frame."""

    def __init__(self, wide, out, kernel):
        super().__init__(wide, out, kernel)
        kt, kh, kw = self.kernel_size
        self.around = (kw // 2, kw // 2, kh // 2, kh // 2, kt - 1, 0)

    def forward(self, x):
        return super().forward(F.pad(x, self.around) if any(self.around) else x)


class Norm(nn.Module):
    """Every position divided by the root mean square of its channels, times gamma."""

    def __init__(self, channels, axes):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * axes))

    def forward(self, x):
        return F.normalize(x, dim=1) * x.shape[1] ** 0.5 * self.gamma


class Residual(nn.Module):
    def __init__(self, wide, out):
        super().__init__()
        self.norm1, self.conv1 = Norm(wide, 3), Causal(wide, out, 3)
        self.norm2, self.conv2 = Norm(out, 3), Causal(out, out, 3)
        self.conv_shortcut = Causal(wide, out, 1) if wide != out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


def by_frame(module, x):
    """A 2-D module on every frame of (B, C, T, H, W)."""
    B, _, T = x.shape[:3]
    y = module(x.transpose(1, 2).flatten(0, 1))
    return y.unflatten(0, (B, T)).transpose(1, 2)


class Attention(nn.Module):
    """One head among the positions of a frame."""

    def __init__(self, channels):
        super().__init__()
        self.norm = Norm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def inside(self, x):
        q, k, v = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return self.proj(y.transpose(1, 2).unflatten(2, x.shape[2:]))

    def forward(self, x):
        return x + by_frame(self.inside, x)


class Middle(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.resnets = nn.ModuleList(Residual(channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Down(nn.Module):
    """Half the height and width; with `time` half the frames after the first."""

    def __init__(self, channels, time):
        super().__init__()
        self.resample = nn.Sequential(
            nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        if time:
            self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1))

    def forward(self, x):
        x = by_frame(self.resample, x)
        if not hasattr(self, "time_conv") or x.shape[2] == 1:
            return x
        return torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)


class Up(nn.Module):
    """Twice the height and width; with `time` two frames of every one after the first."""

    def __init__(self, channels, time):
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest"),
            nn.Conv2d(channels, channels // 2, 3, padding=1))
        if time:
            self.time_conv = Causal(channels, 2 * channels, (3, 1, 1))

    def forward(self, x):
        if hasattr(self, "time_conv") and x.shape[2] > 1:
            B, C, T, H, W = x.shape
            later = self.time_conv(x[:, :, 1:]).reshape(B, 2, C, T - 1, H, W)
            later = later.permute(0, 2, 3, 1, 4, 5).reshape(B, C, 2 * (T - 1), H, W)
            x = torch.cat([x[:, :, :1], later], dim=2)
        return by_frame(self.resample, x)


class Encoder(nn.Module):
    def __init__(self, case: VAECase):
        super().__init__()
        dims, wide = case.dims, case.dims[0]
        self.conv_in, blocks = Causal(3, wide, 3), []
        for level, out in enumerate(dims):
            for _ in range(case.num_res_blocks):
                blocks.append(Residual(wide, out))
                wide = out
            if level < len(dims) - 1:
                blocks.append(Down(out, case.temporal_downsample[level]))
        self.down_blocks = nn.ModuleList(blocks)
        self.mid_block, self.norm_out = Middle(wide), Norm(wide, 3)
        self.conv_out = Causal(wide, 2 * case.z_dim, 3)

    def forward(self, x):
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(self.mid_block(x))))


class UpLevel(nn.Module):
    def __init__(self, wide, out, count, up):
        super().__init__()
        self.resnets = nn.ModuleList(Residual(wide if i == 0 else out, out) for i in range(count))
        self.upsamplers = nn.ModuleList([] if up is None else [up])

    def forward(self, x):
        for block in (*self.resnets, *self.upsamplers):
            x = block(x)
        return x


class Decoder(nn.Module):
    def __init__(self, case: VAECase):
        super().__init__()
        dims, wide = case.dims, case.dims[-1]
        self.conv_in, self.mid_block, levels = Causal(case.z_dim, wide, 3), Middle(wide), []
        for level in reversed(range(len(dims))):
            out = dims[level]
            up = Up(out, case.temporal_downsample[level - 1]) if level else None
            levels.append(UpLevel(wide, out, case.num_res_blocks + 1, up))
            wide = out // 2 if level else out
        self.up_blocks = nn.ModuleList(levels)
        self.norm_out, self.conv_out = Norm(wide, 3), Causal(wide, 3, 3)

    def forward(self, x):
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VAE(nn.Module):
    """Pixels (B, 3, T, H, W) -> (reconstruction of the means, mean, log variance)."""

    def __init__(self, case: VAECase):
        super().__init__()
        self.encoder, self.decoder = Encoder(case), Decoder(case)
        self.quant_conv = Causal(2 * case.z_dim, 2 * case.z_dim, 1)
        self.post_quant_conv = Causal(case.z_dim, case.z_dim, 1)

    def forward(self, x):
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return self.decoder(self.post_quant_conv(mean)), mean, logvar


def loss_of(model, pixels):
    """(loss, reconstruction), as in our_vae_step.loss."""
    again, mean, logvar = model(pixels)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
    return (again - pixels).abs().mean() + KL_WEIGHT * kl.mean(), again


def main():
    options = worker.options()
    if options.threads:
        torch.set_num_threads(options.threads)
    case = CASES[options.case]
    model = VAE(case)
    model.load_state_dict(load_file(options.weights))
    model = model.to(options.device)
    pixels = torch.from_numpy(make_pixels(case, options.rows)).to(options.device)
    pixels = pixels.permute(0, 4, 1, 2, 3)
    pixels = pixels.contiguous()
    if options.check:
        loss, again = loss_of(model, pixels)
        loss.backward()
        np.savez(options.check, loss=loss.detach().numpy(),
                 again_BTHWC=again.detach().permute(0, 2, 3, 4, 1).numpy(),
                 gradient=model.encoder.conv_in.weight.grad.permute(2, 3, 4, 1, 0).numpy())
        return
    if options.mode.endswith("_last"):
        model, pixels = model.to(memory_format=torch.channels_last_3d), pixels.to(
            memory_format=torch.channels_last_3d)
    function = torch.compile(loss_of) if options.mode.startswith("compile") else loss_of

    def step():
        model.zero_grad(set_to_none=True)
        loss, _ = function(model, pixels)
        loss.backward()
        return float(loss.detach())

    def memory():
        return 0 if options.device == "cpu" else torch.cuda.max_memory_allocated()

    worker.serve(step, f"torch {torch.__version__}", sum(p.numel() for p in model.parameters()),
                 memory=memory)


if __name__ == "__main__":
    main()
