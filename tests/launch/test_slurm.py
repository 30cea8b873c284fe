"""SLURM's own opinion of launch/slurm.sbatch: `sbatch --test-only` asks a controller, here one with
two nodes that exist in its configuration alone.

Skipped where SLURM is not installed; .ci/run installs it (Debian: slurm-wlm).
"""

import getpass
import os
import pathlib
import shutil
import socket
import subprocess
import time

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "slurm.sbatch"
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"

pytestmark = pytest.mark.skipif(
    not shutil.which("slurmctld", path=PATH), reason="SLURM (slurmctld) is not installed")


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """A function that hands the script to sbatch --test-only, with more options."""
    directory = tmp_path_factory.mktemp("slurm")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    node = ("CPUs=64 Sockets=2 CoresPerSocket=32 ThreadsPerCore=1 Gres=gpu:8 RealMemory=512000 "
            "State=CLOUD")
    (directory / "state").mkdir()
    (directory / "gres.conf").write_text("NodeName=node[0-1] Name=gpu Count=8\n")
    (directory / "slurm.conf").write_text("\n".join((
        "ClusterName=test", "SlurmctldHost=localhost(127.0.0.1)", f"SlurmctldPort={port}",
        "CommunicationParameters=NoCtldInAddrAny",  # loopback only
        f"SlurmUser={getpass.getuser()}", "AuthType=auth/none", "CredType=cred/none",
        f"StateSaveLocation={directory / 'state'}",
        f"SlurmctldPidFile={directory / 'slurmctld.pid'}", "ProctrackType=proctrack/linuxproc",
        "SelectType=select/cons_tres", "SelectTypeParameters=CR_Core_Memory", "GresTypes=gpu",
        # nodes that would be started for a job: nothing has to run on them to be planned with
        "SuspendProgram=/bin/true", "ResumeProgram=/bin/true", "SuspendTime=60",
        f"NodeName=node0 NodeAddr=127.0.0.1 {node}", f"NodeName=node1 NodeAddr=127.0.0.1 {node}",
        "PartitionName=gpu Nodes=node[0-1] Default=YES MaxTime=INFINITE State=UP", "")))
    environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(directory / "slurm.conf")}
    controller = subprocess.Popen(
        ["slurmctld", "-D"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True)

    def answer(*options):
        return subprocess.run(["sbatch", "--test-only", *options, str(SCRIPT)], env=environment,
                              text=True, capture_output=True, timeout=60)

    try:
        until = time.monotonic() + 60
        while "Unable to contact" in answer().stderr and time.monotonic() < until:
            assert controller.poll() is None, controller.stdout.read()
            time.sleep(0.2)
        yield answer
    finally:
        controller.terminate()
        controller.communicate(timeout=30)


def test_slurm_would_start_the_script_on_two_nodes(ask):
    process = ask()
    assert process.returncode == 0, process.stderr
    assert "using 128 processors on nodes node[0-1] in partition gpu" in process.stderr


@pytest.mark.parametrize("option", ["--nodes=3", "--gpus-per-node=9", "--cpus-per-task=65"])
def test_slurm_refuses_what_the_nodes_do_not_have(ask, option):
    process = ask(option)
    assert process.returncode == 1 and "configuration is not available" in process.stderr
