"""The commands a user types, as real processes, on a run of configs/base.py:runlocal.

All compile without optimization but one test of sampling; tests/test_resume.py trains with it.
Those of the README begin as a user's do, the others with their imports made already.
"""

import functools
import json
import re
import shlex

import av
import numpy as np
import pytest
from commands import NOT_OPTIMIZED, ROOT, call, call_warm
from PIL import Image

quick = functools.partial(call_warm, flags=NOT_OPTIMIZED)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """The workdir of a finished trial run."""
    workdir = tmp_path_factory.mktemp("run")
    quick("sora_jax.train", "--config=configs/base.py:runlocal", f"--workdir={workdir}")
    return workdir


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def frames(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_training_writes_metrics_samples_checkpoints_events_and_an_evaluation(run):
    metrics = lines(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(5, 41, 5))
    assert all(float(np.float32(row["loss"])) == row["loss"] for row in metrics)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    (evaluation,) = lines(run / "eval.jsonl")
    assert evaluation["step"] == 40
    assert {"prompt_match", "latents_prompt_match", "vae_psnr", "vae_ssim",
            "validation_loss"} <= set(evaluation)
    samples = sorted(path.name for path in (run / "samples").iterdir())
    assert "step_0000010.png" in samples and "step_0000040_03.mp4" in samples
    assert frames(run / "samples" / "step_0000040_00.mp4").ndim == 4
    assert list((run / "tensorboard").rglob("events.out.tfevents.*"))
    assert (run / "checkpoints" / "40").is_dir()


def test_the_same_command_again_finds_nothing_left_to_train(run):
    before = (run / "metrics.jsonl").read_bytes()
    quick("sora_jax.train", "--config=configs/base.py:runlocal", f"--workdir={run}")
    assert (run / "metrics.jsonl").read_bytes() == before


def test_adapters_are_trained_beside_a_run_and_sampled_as_a_file(run, tmp_path):
    """The same picture from the base with the file as from the workdir of the adapters, and another
    than from the base; a base that is not theirs is one line."""
    lora = tmp_path / "lora"
    process = quick(
        "sora_jax.train", "--config=configs/base.py:runlocal", f"--workdir={lora}",
        f"--config.init.weights={run}", "--config.lora.rank=2", "--config.optim.optimizer=adamw",
        "--config.optim.learning_rate=0.05", "--config.optim.warmup_steps=1",
        "--config.num_steps=10", "--config.sampling.num_clips=0",
        "--config.evaluation.num_prompts=0", f"--config.data.data_dir={run / 'data'}",
        f"--config.latents.directory={run / 'latents'}")
    adapters = lora / "adapters.safetensors"
    assert f"wrote {adapters}" in process.stdout

    def sample(name, workdir, *arguments, check=True):
        return quick("sora_jax.sample", f"--workdir={workdir}", f"--out={tmp_path / name}.png",
                     "--prompt=a red circle moves left", "--size=32x32", "--frames=1", "--steps=2",
                     *arguments, check=check)

    sample("file", run, f"--adapters={adapters}")
    sample("workdir", lora)
    sample("base", run)
    file, workdir, base = (np.asarray(Image.open(tmp_path / f"{name}.png"), np.float32)
                           for name in ("file", "workdir", "base"))
    # on the mean: bfloat16 operands of products turn a last bit of a weight into levels of pixels
    assert np.abs(file - base).mean() > 4
    assert np.abs(file - workdir).mean() < 0.1 * np.abs(file - base).mean()
    process = sample("other", run, f"--adapters={adapters}", "--checkpoint_step=20", check=False)
    assert process.returncode == 2
    assert f"belong to {run} (digest" in process.stderr


def test_eval_mode_evaluates_the_checkpoints_that_have_no_figures(run):
    expected = {int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal()}
    quick("sora_jax.train", "--config=configs/base.py:runlocal", f"--workdir={run}", "--mode=eval")
    rows = {row["step"]: row for row in lines(run / "eval.jsonl")}
    assert set(rows) == expected == {20, 40}
    assert rows[20]["validation_loss"] != rows[40]["validation_loss"]


def test_sampling_makes_the_asked_size_and_length_and_depends_on_seed_and_prompt(run, tmp_path):
    def sample(name, *arguments, flags=""):
        call_warm("sora_jax.sample", f"--workdir={run}", f"--out={tmp_path / name}", "--steps=2",
                  *arguments, flags=flags)
        return tmp_path / name

    red = "--prompt=a red circle moves left"
    a = sample("a.mp4", red, "--size=32x64", "--frames=9", "--seed=0")
    assert frames(a).shape == (9, 32, 64, 3)
    again = sample("b.mp4", red, "--size=32x64", "--frames=9", "--seed=0")
    assert a.read_bytes() == again.read_bytes()
    other = sample("c.mp4", red, "--size=32x64", "--frames=9", "--seed=1")
    assert a.read_bytes() != other.read_bytes()
    still = sample("d.png", "--prompt=a blue square", "--size=48x32", "--frames=1",
                   flags=NOT_OPTIMIZED)
    assert np.asarray(Image.open(still)).shape == (48, 32, 3)


def test_several_prompts_write_numbered_clips_and_a_sheet(run, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\na blue square\n")
    quick("sora_jax.sample", f"--workdir={run}", f"--prompt_file={prompts}", "--size=32x32",
          "--frames=1", "--steps=2", "--sampler=unipc", "--guidance=2", "--negative_prompt=grey",
          "--guidance_interval=0.1,0.9", "--guidance_rescale=0.7", f"--out={tmp_path / 'x.png'}")
    names = sorted(path.name for path in tmp_path.glob("x_*"))
    assert names == ["x_00.png", "x_01.png", "x_sheet.png"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A user's folder: drawn clips as MP4 with captions in metadata.csv, and a broken file."""
    from sora_jax.data.encode import write_mp4
    from sora_jax.data.moving_shapes.world import ShapesSpec, generate

    directory = tmp_path_factory.mktemp("clips")
    spec = ShapesSpec(sizes=((64, 96, 0.5), (96, 64, 0.5)), frames=((17, 1.0),))
    rows = ["file_name,caption"]
    for index in range(12):
        clip = generate(1, index, spec)
        write_mp4(directory / f"{index}.mp4", clip.pixels_THWC, 8.0)
        rows.append(f'{index}.mp4,"{clip.short_caption}"')
    (directory / "broken.mp4").write_bytes(b"no video")
    (directory / "metadata.csv").write_text("\n".join([*rows, "broken.mp4,nothing"]) + "\n")
    return directory


def readme_commands() -> list[str]:
    """The commands of the README after the installation, without the prompt for a virtualenv."""
    lines = (ROOT / "README.md").read_text().splitlines()
    return [line for line in lines if line.startswith("python -m sora_jax")]


def test_every_command_of_the_readme_runs(run, folder, tmp_path):
    commands = readme_commands()
    assert {"sample", "vae_folder", "folder", "eval"} <= {
        word for command in commands
        for word in re.findall(r"sora_jax\.(sample)|configs/(\w+)\.py|--mode=(\w+)", command)
        for word in word
    }
    for command in commands:
        command = re.sub(r"(configs/\w+\.py)", r"\1:runlocal", command)
        command = command.replace("runs/base", str(run)).replace("=DIR", f"={folder}")
        command = command.replace("runs/vae_folder", f"{tmp_path}/vae_folder")
        words = [word.replace("x.mp4", str(tmp_path / "x.mp4")) for word in shlex.split(command)]
        if "--workdir" not in command:
            name = re.search(r"configs/(\w+)\.py", command)[1]
            words += [f"--workdir={tmp_path / name}", "--config.num_steps=8",
                      "--config.optim.warmup_steps=2"]
        call(*words[2:], flags=NOT_OPTIMIZED)
    assert frames(tmp_path / "x.mp4").shape == (17, 64, 96, 3)
    report = next((tmp_path / "folder" / "data").rglob("report.txt")).read_text()
    assert "broken.mp4" in report
    assert (tmp_path / "folder" / "eval.jsonl").exists()
    assert list((tmp_path / "folder" / "samples").glob("*.mp4"))


def test_a_workdir_of_another_config_is_refused_by_field(run):
    process = call_warm("sora_jax.train", "--config=configs/base.py:runlocal", f"--workdir={run}",
                        "--config.model.width=32", check=False)
    assert process.returncode == 2
    assert "model.width is 64 there and 32 here" in process.stderr


def test_a_stale_latent_cache_is_refused_by_name(run, tmp_path):
    process = call_warm(
        "sora_jax.train", "--config=configs/base.py:runlocal", f"--workdir={tmp_path}",
        f"--config.latents.directory={run}/latents", "--config.data.seed=5", check=False,
    )
    assert process.returncode == 2
    assert "stale" in process.stderr and "dataset is" in process.stderr


@pytest.mark.parametrize("arguments, expected", [
    (["--size=30x64"], "near are 16x64, 32x64"),
    (["--size=big"], "HEIGHTxWIDTH"),
    (["--frames=8"], "near are 5 and 9"),
    (["--steps=0"], "--steps=0"),
    (["--sampler=leapfrog"], "--sampler=leapfrog is unknown; allowed: euler, heun"),
    (["--guidance_interval=0.9,0.1"], "--guidance_interval=0.9,0.1"),
    (["--out=x.gif"], ".mp4"),
])
def test_sampling_says_what_it_can_do(run, arguments, expected):
    process = call_warm("sora_jax.sample", f"--workdir={run}", "--prompt=a red circle", *arguments,
                        check=False)
    assert process.returncode == 2 and expected in process.stderr
    assert "Traceback" not in process.stderr
