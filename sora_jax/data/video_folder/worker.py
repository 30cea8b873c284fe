"""Files are checked in child processes, so that no file can hang, crash or starve preparation.

A child reads one JSON line per file on its standard input and answers with one JSON line. What
FFmpeg prints there is read as well: it often knows of damage that the decoder hides.
"""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import queue
import re
import select
import signal
import subprocess
import sys
import tempfile
import time

from sora_jax.core.child import start
from sora_jax.data.open_video import DecodeError
from sora_jax.data.video_folder.check import OUT_OF_MEMORY, Checked, check_file
from sora_jax.data.video_folder.options import FolderOptions

START_SECONDS = 60.0
"""Added to the first answer's limit: a child imports numpy and FFmpeg on a busy machine."""
WAIT_FACTOR = 5
GRACE_SECONDS = 5.0
"""A child stops by itself after its limit of computing time; one that hangs or waits for a busy
machine is killed after WAIT_FACTOR times that limit, and this much more."""
HARMLESS = re.compile(
    r"^\[swscaler|edit list|creation time|Consider increasing|deprecated|Skipping unhandled|"
    r"misdetection possible|timestamps? .*unset|invalid timestamps|non monoton", re.IGNORECASE)


def check_files(folder, names, options: FolderOptions, on_done=None) -> dict:
    """{name: Checked, or the reason (str) why the file is refused}, for files of a folder.

    on_done(number of files done) is called after every file.
    """
    jobs, results = queue.SimpleQueue(), {}
    for name in names:
        jobs.put(name)

    def work():
        child = None
        while True:
            try:
                name = jobs.get_nowait()
            except queue.Empty:
                break
            path, used = pathlib.Path(folder) / name, child is not None
            child = child or _Child(options.memory_bytes)
            results[name] = child.check(path, options)
            if not child.alive and used and OUT_OF_MEMORY in str(results[name]):
                # perhaps only because of what the files before it left behind
                child = _Child(options.memory_bytes)
                results[name] = child.check(path, options)
            if not child.alive:
                child = None
            if on_done is not None:
                on_done(len(results))
        if child is not None:
            child.close()

    with concurrent.futures.ThreadPoolExecutor(options.num_workers) as pool:
        for future in [pool.submit(work) for _ in range(options.num_workers)]:
            future.result()
    return results


class _Child:
    """A child process; close it."""

    def __init__(self, memory_bytes):
        self._process = start(
            "sora_jax.data.video_folder.worker", str(memory_bytes), stderr=subprocess.DEVNULL,
            bufsize=0)
        self._extra_seconds = START_SECONDS
        self.alive = True

    def check(self, path, options):
        """Checked, or the reason of refusal; afterwards the child may have been stopped."""
        request = json.dumps({"path": os.fspath(path), **dataclasses.asdict(options)})
        try:
            self._process.stdin.write(request.encode() + b"\n")
            answer = self._answer(WAIT_FACTOR * options.timeout_seconds + GRACE_SECONDS
                                  + self._extra_seconds)
        except BrokenPipeError:
            answer = b""
        self._extra_seconds = 0.0
        if answer is None:
            self.close()
            return f"decoding it hung (limit: {options.timeout_seconds:g} s of computing)"
        if not answer:
            return self._death()
        answer = json.loads(answer)
        if "refused" in answer:
            if OUT_OF_MEMORY in answer["refused"]:
                self.close()
            return answer["refused"]
        return Checked(**{**answer, "changes": tuple(answer["changes"]),
                          "notes": tuple(answer["notes"])})

    def _answer(self, seconds):
        """The next line; b"" where the child has died, None where it does not answer in time."""
        end, line = time.monotonic() + seconds, b""
        while not line.endswith(b"\n"):
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                return None
            piece = os.read(self._process.stdout.fileno(), 2**16)
            if not piece:
                return b""
            line += piece
        return line

    def _death(self):
        code = self._process.wait()
        self.close()
        cause = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return (f"decoding it ended the process ({cause}): it {OUT_OF_MEMORY}, or FFmpeg has a "
                "fault")

    def close(self):
        self.alive = False
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


class _Complaints:
    """What FFmpeg prints to standard error since the last file began."""

    def __init__(self):
        self._file = tempfile.TemporaryFile(buffering=0)
        os.dup2(self._file.fileno(), 2)
        self.begin()

    def begin(self):
        """Forgets everything."""
        os.ftruncate(2, 0)
        os.lseek(2, 0, os.SEEK_SET)
        self._seen = 0

    def next(self) -> str | None:
        """The first new line that tells of damage, or None."""
        size = os.fstat(2).st_size
        if size == self._seen:
            return None
        new = os.pread(2, size - self._seen, self._seen).decode(errors="replace")
        self._seen = size
        lines = [line for line in new.splitlines() if line.strip() and not HARMLESS.search(line)]
        # "[h264 @ 0x55d0c8] no frame!": who and what, without the address
        return re.sub(r"^\[(\S+) @ 0x[0-9a-f]+\] *", r"\1: ", lines[0]).strip() if lines else None


def _serve(memory_bytes):
    import av.logging

    _limit_memory(memory_bytes)
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    complaints = _Complaints()
    # FFmpeg's own printing: handing its messages to Python can deadlock with its threads.
    av.logging.restore_default_callback()
    for line in sys.stdin:
        request = json.loads(line)
        path = request.pop("path")
        complaints.begin()
        try:
            answer = dataclasses.asdict(
                check_file(path, FolderOptions(**request), complaints.next))
        except DecodeError as error:
            cause = complaints.next()
            reason = f"{error.reason}; {cause}" if cause else error.reason
            if isinstance(error.__cause__, MemoryError) and OUT_OF_MEMORY not in reason:
                reason = f"{OUT_OF_MEMORY} ({reason})"
            answer = {"refused": reason}
        except MemoryError:
            answer = {"refused": OUT_OF_MEMORY}
        except Exception as error:
            answer = {"refused": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer).encode() + b"\n")


def _limit_memory(memory_bytes):
    """Address space beyond what the interpreter and its libraries have mapped already."""
    try:
        import resource

        with open("/proc/self/statm") as file:
            limit = int(file.read().split()[0]) * resource.getpagesize() + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):  # where there is no such limit, time limits remain
        pass


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
