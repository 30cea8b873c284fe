"""What commands are told before they import jax."""

import subprocess
import sys

import pytest

from sora_jax.core import startup

OWN = startup.OLDER_LOOPS.split("=")[0]


def flags_after_tuning(monkeypatch, given):
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # so that no process starts anew
    monkeypatch.setenv("XLA_FLAGS", given)
    startup.tune()
    return startup.os.environ["XLA_FLAGS"].split()


def installed(monkeypatch, **versions):
    def version(name):
        if name not in versions:
            raise startup.importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(startup.importlib.metadata, "version", version)


def test_flags_of_the_compiler_join_those_of_the_user(monkeypatch):
    own = startup.compiler_flags().split()
    assert flags_after_tuning(monkeypatch, "--a=1") == ["--a=1", *own]
    assert flags_after_tuning(monkeypatch, "") == own


def test_what_the_user_says_stays(monkeypatch):
    assert flags_after_tuning(monkeypatch, f"{OWN}=true") == [f"{OWN}=true"]


@pytest.mark.parametrize("version, known", [
    ("0.10.2", True), ("0.11.2", False), ("0.12.0.1", False), ("0.100.0", False)])
def test_only_a_jaxlib_that_knows_a_flag_gets_it(monkeypatch, version, known):
    installed(monkeypatch, jaxlib=version)
    assert bool(startup.compiler_flags()) == known


@pytest.mark.parametrize("package", ["libtpu", "jax-cuda13-plugin"])
def test_an_accelerator_is_left_alone(monkeypatch, package):
    installed(monkeypatch, **{"jaxlib": "0.10.2", package: "1"})
    assert startup.compiler_flags() == ""


def test_the_installed_jaxlib_knows_the_flags():
    """It ends the process at others."""
    source = ("from sora_jax.core import startup; startup.tune(); "
              "import jax; print(jax.jit(lambda x: x + 1)(1))")
    process = subprocess.run([sys.executable, "-c", source], text=True, capture_output=True)
    assert process.stdout == "2\n", process.stderr[-2000:]
