"""A trained VAE beside bicubic rescaling, JPEG and H.264, on the clips its evaluation judges.

    python benchmarks/vae_references.py --workdir=runs/vae_folder [--bits=8] [--clips=0]
        [--out=FILE]

All of them store the same clips: the held-out windows of WORKDIR's evaluation, at the same frames
and size, uint8. Bicubic may keep as many numbers (of 8 bits) as the VAE has latent values: latent
frames x height x width x channels; it keeps every frame, or the best of that and of time reduced to
a half or a quarter. JPEG and H.264 may take as many bytes as the latents at --bits
bits a value, in even steps per clip and channel (8 bytes more per channel for the range); what the
VAE makes of these quantised latents is what stands beside them. No entropy coding of the latents.
Weights are those of WORKDIR/vae.safetensors. Per clip each reference takes its best variant and
the highest quality that fits: see benchmarks/codecs_of_frames.py for what is counted.
"""

import argparse
import json
import pathlib

import numpy as np
from codecs_of_frames import Stored, h264, jpeg, quantized, rescaled

from sora_jax import run_config
from sora_jax.core.disk import write_whole
from sora_jax.evaluation.pixel_metrics import WINDOW, psnr, ssim
from sora_jax.evaluation.reconstruction import MAX_PSNR
from sora_jax.tasks import latents
from sora_jax.tasks.datasets import open_dataset
from sora_jax.tasks.vae import WEIGHTS
from sora_jax.weights.vae_files import load_vae

IN_VALUES = ("vae", "bicubic", "bicubic, every frame")  # what is counted; of the others bytes


def figures(stored_THWC, pixels_THWC, size: int, variant: str = "") -> dict:
    """psnr (dB), ssim (None below 11 pixels), size and variant of one clip, of uint8 pixels."""
    large = min(pixels_THWC.shape[1:3]) >= WINDOW
    return {"psnr": min(psnr(stored_THWC, pixels_THWC), MAX_PSNR), "size": size, "variant": variant,
            "ssim": ssim(stored_THWC, pixels_THWC) if large else None}


def compare(vae, pixels_THWC, latents_THWC, again_THWC, bits: int) -> dict[str, dict]:
    """{name: figures} of one clip; sizes are values of those in IN_VALUES, bytes of the others."""
    rough_THWC, num_bytes = quantized(latents_THWC, bits)
    (rough_again_THWC,) = latents.decode(vae, [rough_THWC])
    at_most = latents_THWC.size
    found = {"vae": figures(again_THWC, pixels_THWC, at_most)}
    for name, stored in (
        ("bicubic", rescaled(pixels_THWC, at_most)),
        ("bicubic, every frame", rescaled(pixels_THWC, at_most, time_factors=(1,))),
        (f"vae, {bits} bits", Stored(rough_again_THWC, num_bytes, "")),
        ("jpeg", jpeg(pixels_THWC, num_bytes)),
        ("h264", h264(pixels_THWC, num_bytes)),
    ):
        found[name] = figures(stored.pixels_THWC, pixels_THWC, stored.size, stored.variant)
    return found


def table(rows: list[dict]) -> str:
    """Means over the clips, as Markdown; the last column is the VAE at the same size over it."""
    names = list(rows[0]["figures"])
    lines = ["| | clips | PSNR, dB | SSIM | stored per clip | the VAE is better by, dB (worst) |",
             "|---|---|---|---|---|---|"]
    ours = names[0]
    for name in names:
        ours = name if name.startswith("vae") else ours
        of_name = [row["figures"][name] for row in rows]
        ssims = [x["ssim"] for x in of_name if x["ssim"] is not None]
        unit = "values" if name in IN_VALUES else "bytes"
        gains = [row["figures"][ours]["psnr"] - x["psnr"]
                 for row, x in zip(rows, of_name, strict=True)]
        lines.append(
            f"| {name} | {len(rows)} | {np.mean([x['psnr'] for x in of_name]):.2f} | "
            f"{np.mean(ssims):.3f} | {np.mean([x['size'] for x in of_name]):.0f} {unit} | "
            + ("|" if name == ours else f"{np.mean(gains):+.2f} ({min(gains):+.2f}) |"))
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="of a finished run of task vae")
    parser.add_argument("--bits", type=int, default=8, help="of a stored latent value, 1 to 16")
    parser.add_argument("--clips", type=int, default=0, help="the first ones alone; 0 = all")
    parser.add_argument("--out", default="", help="a JSON file of the figures per clip")
    options = parser.parse_args()
    if not 1 <= options.bits <= 16:
        parser.error(f"--bits={options.bits} should be 1 to 16")
    config = run_config.load_workdir(options.workdir)
    vae = load_vae(pathlib.Path(options.workdir) / WEIGHTS)
    held_out = open_dataset(config.data, options.workdir, "held_out")
    plan = latents.judged_clips(config, held_out, vae)[: options.clips or None]
    rows = []
    for item, record, *clip in latents.reconstructed(config, held_out, vae, plan):
        row = {"clip": f"{record.id}[{item.window.start_frame}]", "shape": clip[0].shape[:3],
               "figures": compare(vae, *clip, options.bits)}
        rows.append(row)
        print(f"{row['clip']} {'x'.join(map(str, row['shape']))}: " + ", ".join(
            f"{name} {x['psnr']:.1f} dB" + (f" ({x['variant']})" if x["variant"] else "")
            for name, x in row["figures"].items()), flush=True)
    print(f"\n{len(rows)} held-out clips of {config.data.dataset} {held_out.fingerprint[:12]}, "
          f"{config.vae.z_dim} channels, compression {vae.compression}, "
          f"{options.bits} bits a latent value\n\n{table(rows)}")
    if options.out:
        write_whole(options.out, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
