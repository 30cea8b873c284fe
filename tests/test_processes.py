"""Who is part of a run, and how it ends when one is missing or dies."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

from sora_jax import peer_loss, processes
from sora_jax.core.errors import UserError
from sora_jax.processes import Cluster

ROOT = pathlib.Path(__file__).parents[1]
JAX = {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "4"}
SLURM = {"SLURM_STEP_NODELIST": "gpu[07-09,12],x1", "SLURM_NTASKS": "32", "SLURM_PROCID": "9",
         "SLURM_LOCALID": "1", "SLURM_JOB_ID": "4099", "SLURM_STEP_TASKS_PER_NODE": "8(x4)"}


@pytest.mark.parametrize("environ, expected", [
    ({}, None),
    ({**JAX, "JAX_PROCESS_ID": "3"}, Cluster("environment", "host:1", 4, 3)),
    ({**JAX, "JOB_COMPLETION_INDEX": "2"}, Cluster("environment", "host:1", 4, 2)),
    ({**JAX, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
    (SLURM, Cluster("SLURM", "gpu07:61443", 32, 9)),
    ({**SLURM, "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, Cluster("SLURM", "gpu07:61443", 32, 9, (1,))),
    ({**SLURM, "CUDA_VISIBLE_DEVICES": "1"}, Cluster("SLURM", "gpu07:61443", 32, 9)),
    ({**SLURM, "CUDA_VISIBLE_DEVICES": "0,1", "SLURM_STEP_TASKS_PER_NODE": "1(x32)"},
     Cluster("SLURM", "gpu07:61443", 32, 9)),
    ({**SLURM, "SLURM_STEP_NODELIST": "n1,n2", "JAX_COORDINATOR_PORT": "7"},
     Cluster("SLURM", "n1:7", 32, 9)),
    ({**SLURM, "SLURM_NTASKS": "1"}, None),
    ({name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}, None),
    ({**SLURM, **JAX, "JAX_PROCESS_ID": "0"}, Cluster("environment", "host:1", 4, 0)),
])
def test_the_environment_says_who_this_process_is(environ, expected):
    assert processes.find(environ) == expected


def test_flags_come_before_the_environment():
    found = processes.find({**JAX, "JAX_PROCESS_ID": "3"}, "other:5", 2, 1)
    assert found == Cluster("flags", "other:5", 2, 1)


@pytest.mark.parametrize("environ, flags, expected", [
    (JAX, (), "without JAX_PROCESS_ID"),
    ({"JAX_COORDINATOR_ADDRESS": "host:1"}, (), "without JAX_NUM_PROCESSES and JAX_PROCESS_ID"),
    ({**JAX, "JAX_PROCESS_ID": "4"}, (), "from 0 to 3"),
    ({**JAX, "JAX_PROCESS_ID": "x"}, (), "whole numbers"),
    ({}, ("host", 2, 0), "expected HOST:PORT"),
    ({}, ("host:123456", 2, 0), "expected HOST:PORT"),
    ({}, (None, 2, None), "--num_processes=2 without --coordinator and --process_index"),
])
def test_half_a_description_is_refused_by_name(environ, flags, expected):
    with pytest.raises(UserError, match=expected):
        processes.find(environ, *flags)


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def test_a_coordinator_that_is_not_there_is_one_line_in_the_time_given():
    address = free_address()
    with pytest.raises(UserError, match=f"no coordinator at {address} .from flags. in 0.2 s"):
        processes.join(Cluster("flags", address, 2, 1), join_seconds=0.2)


PEER = """
import os, sys, time
from sora_jax import processes
processes.join(processes.find(os.environ), join_seconds=60, dead_peer_seconds=2)
print("joined", file=sys.stderr, flush=True)
time.sleep(300)
"""


@pytest.mark.parametrize("dead", [0, 1])
def test_a_killed_process_ends_the_other_with_one_line(dead):
    address = free_address()
    peers = [
        subprocess.Popen(
            [sys.executable, "-c", PEER], cwd=ROOT, text=True, stderr=subprocess.PIPE,
            env={**os.environ, "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2",
                 "JAX_PROCESS_ID": str(index)})
        for index in range(2)
    ]
    # Not before both have said so: who dies while the other still joins is noticed in another way.
    assert [peer.stderr.readline() for peer in peers] == ["joined\n"] * 2
    peers[dead].kill()
    said = [peer.communicate(timeout=120)[1].splitlines() for peer in peers]
    assert peers[dead].returncode == -signal.SIGKILL
    assert peers[1 - dead].returncode == -signal.SIGABRT
    line, = said[1 - dead]
    assert line.startswith(f"error: process {1 - dead} ends: process {dead} died or was cut off")


def relayed(text: str) -> str:
    out = []
    peer_loss.relay(text.splitlines(keepends=True), out.append, "process 0", "60", "5")
    return "".join(out)


# The shape of what jaxlib 0.10 and 0.12 write.
NOTE = ("E1120 23:04:36.428125   13853 coordination_service.cc:1549] [74] propagate: UNAVAILABLE:\n"
        "1\nThe tasks have crashed.\n")
FATAL = "F1120 23:04:36.429144   13864 client.h:80] " + peer_loss.FATAL + ". absl::Status: "
FRAMES = "*** Check failure stack trace: ***\n    @     0x7f3f63e40634  absl::SendToLog()\n"


def test_what_the_runtime_says_on_a_lost_peer_becomes_one_line_and_all_else_stays():
    silent = ("UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n"
              "1\n3\nThe tasks have crashed.\n\nRPC: /PollForError\n")
    text = relayed("before\n" + NOTE + FATAL + silent + FRAMES)
    assert text == ("before\nerror: process 0 ends: process 1 and 3 died or was cut off (no sign "
                    "of life for 5 s); start all processes again: they resume from the newest "
                    "checkpoint\n")
    late = relayed(FATAL + "DEADLINE_EXCEEDED: Deadline Exceeded\n\nRPC: /RegisterTask\n" + FRAMES)
    assert late.startswith("error: process 0: not all processes of this run came within 60 s")
    unknown = relayed(FATAL + "INTERNAL: something\nnew\n" + FRAMES)
    assert "(INTERNAL: something new)" in unknown and unknown.count("\n") == 1


def test_stderr_without_a_lost_peer_is_passed_on_whole():
    text = "a\nTraceback (most recent call last):\n  File\nValueError: x\n"
    assert relayed(text) == text
    assert sorted(relayed(NOTE + text).splitlines()) == sorted((NOTE + text).splitlines())
