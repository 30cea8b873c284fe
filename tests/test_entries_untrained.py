"""What the train command says without training: plans of every config, and mistakes."""

import pytest
from commands import NOT_OPTIMIZED, ROOT, call_warm

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_compiles_in_plan_mode(name):
    of_folder = "folder" in name or name in ("finetune_wan", "vae_wan")
    folder = ["--config.data.folder=somewhere"] if of_folder else []
    vae = ["--config.latents.vae=builtin:moving_shapes"]
    mesh = ["mesh.num_devices=8", "mesh.sequence=2", "mesh.tensor=2", "optim.optimizer=adamw",
            "optim.accumulate_steps=2", "model.unroll=1", "model.remat=offload",
            "optim.offload=('optimizer', 'parameters')"] if name == "base_edit" else []
    process = call_warm(
        "sora_jax.train", f"--config=configs/{name}.py:runlocal", "--mode=plan", *folder, *vae,
        *(f"--config.{field}" for field in mesh), flags=NOT_OPTIMIZED)
    assert not mesh or "data+fsdp, sequence" in process.stdout
    for told in ("host_bytes_per_device", "host_moved_bytes_per_device"):
        assert (told in process.stdout) == bool(mesh)
    assert "parameters" in process.stdout and "state_bytes" in process.stdout


MISTAKES = {
    "unknown key": (["--config.optim.learnin_rate=1"], "learnin_rate"),
    "config argument": (None, "runlocal"),
    "wrong type": (["--config.num_steps=many"], "num_steps"),
    "no steps": (["--config.num_steps=0"], "num_steps = 0"),
    "unknown task": (["--config.task=dream"], "diffusion, distill, vae"),
    "unknown dataset": (["--config.data.dataset=imagenet"], "moving_shapes"),
    "no folder": (["--config.data.dataset=video_folder"], "data.folder"),
    "absent vae": (["--config.latents.vae=/nowhere.safetensors"], "/nowhere.safetensors"),
    "heads": (["--config.model.num_heads=5"], "5 heads"),
    "devices": (["--config.mesh.fsdp=3"], "mesh.fsdp = 3"),
    "chip": (["--config.mesh.chip=v9"], "allowed: v5e, v5p"),
    "coordinator": (["--coordinator=127.0.0.1:9", "--num_processes=2", "--process_index=1",
                     "--join_timeout_seconds=1"], "no coordinator at 127.0.0.1:9"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_users_mistake_is_one_line_and_writes_nothing(name, tmp_path):
    arguments, expected = MISTAKES[name]
    config = "configs/base.py:runlocal" if arguments is not None else "configs/base.py:tiny"
    process = call_warm("sora_jax.train", f"--config={config}", f"--workdir={tmp_path / 'w'}",
                        *(arguments or []), check=False)
    assert process.returncode not in (0, None)
    assert "Traceback" not in process.stderr, process.stderr
    (line,) = [line for line in process.stderr.splitlines() if expected in line]
    assert not (tmp_path / "w" / "checkpoints").exists()
