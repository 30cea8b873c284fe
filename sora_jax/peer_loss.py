"""Relays a process's stderr; a program of its own: peer_loss.py WHO JOIN_SECONDS DEAD_SECONDS.

jax's runtime ends a process that has lost a peer by abort(), after a screen of its own words and a
stack of C++ frames. This relay writes one line in their place. It imports nothing but the standard
library and ends with its input.
"""

import re
import signal
import sys

FATAL = "Terminating process because the JAX distributed service detected fatal errors"
# What the runtime notes on the way there: an absl log line of one of these files.
NOTES = re.compile(
    r"[IWE]\d{4} .*\b(coordination_service\w*|preemption_sync_manager|client)\.cc:\d+\]")
OTHER = re.compile(r"[IWEF]\d{4} |Traceback|error:")  # ends a note of several lines
_RESUME = "start all processes again: they resume from the newest checkpoint"


def explain(report: str, who: str, join_seconds: str, dead_seconds: str) -> str:
    """One line on the runtime's report of why it ends this process."""
    if "RegisterTask" in report or "Barrier timed out. Id: [Init]" in report:
        return (f"error: {who}: not all processes of this run came within {join_seconds} s; are "
                "all running, with the same number of processes and the same coordinator?")
    silent = re.search(r"stopped sending heartbeats\):\s*((?:\d+\s+)+)", report)
    if silent:
        names = " and ".join(silent[1].split())
        return (f"error: {who} ends: process {names} died or was cut off (no sign of life for "
                f"{dead_seconds} s); {_RESUME}")
    if "Failed to send RPC to coordination service" in report or "Socket closed" in report:
        return f"error: {who} ends: process 0 died or was cut off; {_RESUME}"
    told = " ".join(report.partition("absl::Status:")[2].split())[:300]
    return f"error: {who} ends: the run has lost a process ({told}); {_RESUME}"


def relay(lines, write, who: str, join_seconds: str, dead_seconds: str) -> None:
    """Writes the lines that are not the runtime's report, and one line in its place.

    The runtime's notes are held back: they are left out before a report, else written at the end.
    """
    lines, report, notes, in_note = iter(lines), None, [], False
    for line in lines:
        if FATAL in line:
            report = ""
        if report is not None:
            if line.startswith("***"):  # C++ frames follow
                break
            report += line
            continue
        in_note = bool(NOTES.match(line)) or in_note and not OTHER.match(line)
        if in_note:
            notes.append(line)
        else:
            write(line)
    if report is None:
        write("".join(notes))
        return
    write(explain(report, who, join_seconds, dead_seconds) + "\n")
    for _ in lines:  # read, so that the process does not wait for room in the pipe
        pass


def main():
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)

    def write(text):
        sys.stdout.write(text)
        sys.stdout.flush()

    sys.stdin.reconfigure(errors="replace")
    relay(sys.stdin, write, *sys.argv[1:4])


if __name__ == "__main__":
    main()
