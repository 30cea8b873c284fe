"""The files of launch/: each is well-formed, starts the same command, and that command parses."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import kubernetes_validate
import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SHELL = ("tpu_vm.sh", "slurm.sbatch")
JOB_SETS = ("gke_tpu.yaml", "gke_gpu.yaml")
DOCKER = ("Dockerfile.cuda", "Dockerfile.tpu")
FILES = (*SHELL, *JOB_SETS, *DOCKER, "skypilot.yaml")


def document(name: str) -> dict:
    return yaml.safe_load((LAUNCH / name).read_text())


def pod(name: str) -> dict:
    (job,) = document(name)["spec"]["replicatedJobs"]
    return job["template"]["spec"]["template"]["spec"]


def docker_lines(name: str) -> list[tuple[str, str]]:
    lines = (LAUNCH / name).read_text().splitlines()
    return [tuple(line.split(" ", 1)) for line in lines if line and not line.startswith("#")]


def train_arguments(name: str) -> list[str]:
    """What a file gives to `python -m sora_jax.train`."""
    if name in JOB_SETS:
        words = pod(name)["containers"][0]["command"]
    elif name in DOCKER:
        words = json.loads(dict(docker_lines(name))["CMD"])
    else:
        text = document(name)["run"] if name.endswith(".yaml") else (LAUNCH / name).read_text()
        (line,) = re.findall(r"^ *(python -m sora_jax\.train .*)$", text, re.MULTILINE)
        words = [word.strip('"') for word in line.split() if "$" not in word and word != "||"]
    assert words[:3] == ["python", "-m", "sora_jax.train"]
    return words[3:]


def test_every_file_starts_the_same_command_and_it_parses():
    for name in FILES:
        assert train_arguments(name) == ["--config=configs/base.py", "--workdir=/runs/base"], name
    parse = ("import sys; from absl import flags; from sora_jax import run_config, runtime, train\n"
             "runtime.parse_flags(['train', *sys.argv[1:]])\n"
             "print(run_config.resolve(flags.FLAGS.config).task)")
    process = subprocess.run(
        [sys.executable, "-c", parse, *train_arguments(FILES[0])], cwd=ROOT, text=True,
        capture_output=True, timeout=300)
    assert process.stdout == "diffusion\n", process.stderr


@pytest.mark.parametrize("name", [*FILES, "local.py"])
def test_every_head_says_what_is_needed_and_the_command(name):
    head = (LAUNCH / name).read_text()[:1500]
    (command,) = re.findall(r"^#? ?Command: +(.*)$", head, re.MULTILINE)
    assert re.search(r"^#? ?Needs: ", head, re.MULTILINE)
    own = {"Dockerfile.cuda": "launch/Dockerfile.cuda", "Dockerfile.tpu": "launch/Dockerfile.tpu"}
    assert own.get(name, f"launch/{name}") in command
    assert f"launch/{name}" in (ROOT / "docs" / "launch.md").read_text()


@pytest.mark.parametrize("name", SHELL)
def test_shell_scripts_pass_shellcheck(name):
    beside = pathlib.Path(sys.executable).with_name("shellcheck")
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    process = subprocess.run([program, str(LAUNCH / name)], text=True, capture_output=True)
    assert process.returncode == 0, process.stdout


@pytest.mark.parametrize("name", JOB_SETS)
def test_a_job_set_names_only_what_it_has_and_counts_its_pods_once(name):
    whole = document(name)
    assert (whole["apiVersion"], whole["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert "kueue.x-k8s.io/queue-name" in whole["metadata"]["labels"]
    assert set(whole["spec"]) <= {"failurePolicy", "replicatedJobs", "network"}
    assert whole["spec"]["failurePolicy"]["maxRestarts"] > 0
    (replicated,) = whole["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["parallelism"] == job["completions"] and job["completionMode"] == "Indexed"
    assert job["backoffLimit"] == 0  # a lost pod restarts the set, not the pod alone
    spec = pod(name)
    assert spec["restartPolicy"] == "Never"  # as a pod failure policy demands
    (container,) = spec["containers"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert rule["onExitCodes"]["values"] == [2]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in spec["volumes"]}
    assert container["resources"]["requests"] == container["resources"]["limits"]
    environ = {entry["name"]: entry["value"] for entry in container.get("env", ())}
    if "gpu" in name:
        assert environ["JAX_NUM_PROCESSES"] == str(job["parallelism"])
        set_name = whole["metadata"]["name"]
        host = f"{set_name}-{replicated['name']}-0-0.{set_name}"
        assert environ["JAX_COORDINATOR_ADDRESS"].split(":")[0] == host
    else:  # hosts of the slice times its chips
        rows, columns = spec["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
        chips = job["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
        assert int(rows) * int(columns) == chips


@pytest.mark.parametrize("name", JOB_SETS)
def test_the_job_of_a_job_set_is_valid_for_kubernetes(name):
    (replicated,) = document(name)["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "one"},
           "spec": replicated["template"]["spec"]}
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(job, version, strict=True)
    job["spec"]["paralelism"] = job["spec"].pop("parallelism")
    with pytest.raises(kubernetes_validate.ValidationError, match="paralelism"):
        kubernetes_validate.validate(job, version, strict=True)


def test_the_skypilot_task_asks_for_spot_nodes_and_tells_processes_their_places():
    task = document("skypilot.yaml")
    assert set(task) == {
        "name", "num_nodes", "resources", "workdir", "file_mounts", "setup", "run"}
    assert task["resources"]["use_spot"] and task["resources"]["job_recovery"]["strategy"]
    lines = task["run"].splitlines()
    script = "\n".join(line for line in lines if line.startswith("export"))
    process = subprocess.run(
        ["bash", "-euc", script + "\nenv"], text=True, capture_output=True, check=True,
        env={"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2",
             "SKYPILOT_NODE_RANK": "1", "PATH": os.environ["PATH"]})
    assert {"JAX_COORDINATOR_ADDRESS=10.0.0.1:8476", "JAX_NUM_PROCESSES=2", "JAX_PROCESS_ID=1"} <= (
        set(process.stdout.splitlines()))


@pytest.mark.parametrize("name", DOCKER)
def test_dockerfiles_copy_what_there_is_and_install_an_extra_there_is(name):
    lines = docker_lines(name)
    assert lines[0][0] == "FROM"
    assert {word for word, _ in lines} <= {"FROM", "WORKDIR", "COPY", "RUN", "VOLUME", "CMD"}
    for _, paths in (line for line in lines if line[0] == "COPY"):
        for path in paths.split()[:-1]:
            assert (ROOT / path).exists(), path
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extra,) = re.findall(r"-e '\.\[(\w+)\]'", dict(lines)["RUN"])
    assert extra in project["optional-dependencies"] and name.endswith(extra)
    needed = {project["readme"], *project["license-files"], "pyproject.toml", "requirements.lock"}
    assert needed <= {word for key, value in lines if key == "COPY" for word in value.split()}


def stub(directory: pathlib.Path, name: str, body: str) -> None:
    path = directory / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def test_the_tpu_script_requests_runs_and_requests_again_after_a_preemption(tmp_path):
    states = tmp_path / "states"  # one a question; the last word of the run is its exit code
    states.write_text("NONE WAITING_FOR_RESOURCES ACTIVE SUSPENDED SUSPENDED NONE ACTIVE".replace(
        " ", "\n") + "\n")
    codes = tmp_path / "codes"
    codes.write_text("1\n0\n")
    stub(tmp_path, "git", "true")
    stub(tmp_path, "sleep", "true")
    stub(tmp_path, "gcloud", f"""
        take() {{ head -n1 "$1"; sed -i 1d "$1"; }}
        echo "$*" | tr '\\n' ' ' >> {tmp_path}/calls; echo >> {tmp_path}/calls
        case "$*" in
          *describe*) state=$(take {states}); [[ $state != NONE ]] && echo "$state";;
          *sora_jax.train*) exit "$(take {codes})";;
        esac""")
    process = subprocess.run(
        [LAUNCH / "tpu_vm.sh", "--config.seed=3"], text=True, capture_output=True, timeout=60,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PROJECT": "p",
             "ZONE": "z", "NFS": "h:/x"})
    assert process.returncode == 0, process.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    kinds = [kind for call in calls for kind in
             ("create", "scp", "sora_jax.train", "delete") if re.search(rf"\b{kind}\b", call)
             and not (kind == "create" and "queued-resources create" not in call)]
    assert kinds == ["create", "scp", "sora_jax.train", "delete",  # preempted
                     "create", "scp", "sora_jax.train", "delete"]
    runs = [call for call in calls if "sora_jax.train" in call]
    assert all("--workdir=/runs/base '--config.seed=3'" in call for call in runs)
    assert all("--worker=all" in call for call in runs)


@pytest.mark.parametrize("code, requeued", [(0, False), (42, True), (2, False)])
def test_the_slurm_script_queues_again_what_was_stopped_and_nothing_else(
        tmp_path, code, requeued):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text("")
    stub(tmp_path, "srun", f'echo "$@"; exit {code}')
    stub(tmp_path, "scontrol", 'echo "scontrol $*"')
    process = subprocess.run(
        ["bash", LAUNCH / "slurm.sbatch", "--config.seed=3"], text=True, capture_output=True,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path),
             "SLURM_JOB_ID": "7"})
    assert process.returncode == code
    started, *more = process.stdout.splitlines()
    assert shlex.split(started)[-3:] == [
        "--config=configs/base.py", "--workdir=/runs/base", "--config.seed=3"]
    assert more == (["scontrol requeue 7"] if requeued else [])
