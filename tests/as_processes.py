"""Several processes stood in for by threads of this one, to which shared_work talks.

Real processes do the same in test_two_processes.py; these start at once.
"""

import concurrent.futures
import threading

import jax

from sora_jax import processes


class Died(BaseException):
    """A process that is gone without a word."""


def run(monkeypatch, count: int, work) -> list:
    """What work(index) gives or raises in each of `count` processes, by index.

    Where one raises something else than the exceptions that programs handle, the others find its
    place empty: their exchange raises threading.BrokenBarrierError.
    """
    mine, barrier = threading.local(), threading.Barrier(count)
    said = [None] * count

    def exchange(text):
        said[mine.index] = text
        barrier.wait(60)
        heard = list(said)
        barrier.wait(60)
        return heard

    def one(index):
        mine.index = index
        try:
            return work(index)
        except Exception as error:
            return error
        except Died as error:
            barrier.abort()
            return error

    with monkeypatch.context() as patch:
        patch.setattr(jax, "process_index", lambda: mine.index)
        patch.setattr(jax, "process_count", lambda: count)
        patch.setattr(processes, "exchange", exchange)
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            return list(pool.map(one, range(count)))
