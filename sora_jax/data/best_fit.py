"""Best fit of clips into rows of three capacities: video tokens, text tokens, clips."""

import numpy as np

OPEN_ROWS = 64  # rows of a window that may still grow
LOOSE_SHARE = 0.97  # a row less full than this is packed again together with other windows' rows


def pack(tokens_O, text_O, config):
    """Row of each clip: best fit in the given order inside windows, then once more for the clips
    of the loose rows that the ends of windows leave. config: a PackingConfig."""
    row_O = np.full(len(tokens_O), -1, np.int64)
    todo = np.arange(len(tokens_O))
    num_rows = 0
    while len(todo):
        local = _best_fit_windows(tokens_O[todo], text_O[todo], config)
        counts_R = np.bincount(local)
        full_R = np.bincount(local, tokens_O[todo]) >= LOOSE_SHARE * config.row_tokens
        full_R |= counts_R >= config.max_clips
        if len(todo) <= config.window or not full_R.any():
            full_R[:] = True
        name_R = num_rows + np.cumsum(full_R) - 1
        kept = full_R[local]
        row_O[todo[kept]] = name_R[local[kept]]
        num_rows += int(full_R.sum())
        todo = todo[~kept]
    return row_O


def _best_fit_windows(tokens_O, text_O, config):
    """Row of each clip, each window of clips by itself, all windows advanced together.

    A window keeps OPEN_ROWS rows open. A clip goes to the fullest row that holds it; where none
    does, the fullest row is closed and a new one takes its slot.
    """
    num_windows = -(-len(tokens_O) // config.window)
    length = -(-len(tokens_O) // num_windows)
    num_windows = -(-len(tokens_O) // length)
    grid = np.full(num_windows * length, -1)
    grid[: len(tokens_O)] = np.arange(len(tokens_O))
    grid_WL = grid.reshape(num_windows, length)
    free_WK = np.full((num_windows, OPEN_ROWS), -1, np.int32)
    text_WK, clips_WK = np.zeros_like(free_WK), np.zeros_like(free_WK)
    row_WK = np.zeros(free_WK.shape, np.int64)
    count_W = np.zeros(num_windows, np.int64)
    row_WL = np.zeros(grid_WL.shape, np.int64)
    for i in range(length):
        n = num_windows - int(grid_WL[-1, i] < 0)  # only the last window may be shorter
        windows = np.arange(n)
        item_W = grid_WL[:n, i]
        need_W, words_W = tokens_O[item_W], text_O[item_W]
        free = free_WK[:n]
        fits = (free >= need_W[:, None]) & (text_WK[:n] >= words_W[:, None]) & (clips_WK[:n] > 0)
        score = np.where(fits, free, np.iinfo(np.int32).max)
        slot_W = score.argmin(axis=1)
        new = windows[~fits[windows, slot_W]]
        if len(new):
            slot_W[new] = free[new].argmin(axis=1)
            place = new, slot_W[new]
            free_WK[place], text_WK[place] = config.row_tokens, config.row_text
            clips_WK[place], row_WK[place] = config.max_clips, count_W[new]
            count_W[new] += 1
        place = windows, slot_W
        free_WK[place] -= need_W.astype(np.int32)
        text_WK[place] -= words_W.astype(np.int32)
        clips_WK[place] -= 1
        row_WL[:n, i] = row_WK[place]
    first_W = np.concatenate([[0], np.cumsum(count_W)[:-1]])
    return (row_WL + first_W[:, None]).reshape(-1)[: len(tokens_O)]
