"""Figures that processes compute together are those of one, for what test_two_processes.py leaves
to it: edits and the accuracy of features."""

import types

import numpy as np
import pytest
from as_processes import run

from configs import base_edit, features
from sora_jax import run_config
from sora_jax.data.transforms import ClipWindow
from sora_jax.evaluation import edits, evaluators
from sora_jax.tasks import features as features_task
from sora_jax.tasks.sampling import Sampler


@pytest.mark.parametrize("count", [2, 3, 9])
def test_edits_are_shared_by_clips_and_each_has_its_own_seed(monkeypatch, count):
    config = run_config.resolve(base_edit.get_config("runlocal"))
    num = config.evaluation.edits
    planned = [types.SimpleNamespace(
        spec=types.SimpleNamespace(frames=(9, 17)[i % 3 > 0], height=32, width=32), record=i,
        window=ClipWindow(0, 17, 8.0, False)) for i in range(3 * num)]
    source = [types.SimpleNamespace(
        video_bytes=b"", id=str(i), height=32, width=32, captions=(f"clip {i}",),
        metadata={"number": i}) for i in range(3 * num)]
    read = []

    def decode_clip(video_bytes, window, height, width, id):
        read.append(int(id))
        return np.full((17, 32, 32, 3), int(id), np.uint8)

    def clip_figures(editor, clip):
        number = int(clip.pixels_THWC[0, 0, 0, 0])
        assert clip.prompt == f"clip {number}"
        return {"x": [0.1 * number * (editor.seed % 1000)], "seen": [None, 1.0][: 1 + number % 2]}

    for name, value in (("open_dataset", lambda *_: source), ("clip_plan", lambda *_: planned),
                        ("decode_clip", decode_clip), ("clip_figures", clip_figures)):
        monkeypatch.setattr(edits, name, value)
    model = types.SimpleNamespace(config=types.SimpleNamespace(patch=(1, 2, 2)))
    vae = types.SimpleNamespace(compression=types.SimpleNamespace(time=4, space=8))
    sampler = Sampler(model, vae, None, config.packing, None)
    (one,) = run(monkeypatch, 1, lambda _: edits.edit_report(config, sampler, {}, ""))
    chosen = [i for i in range(3 * num) if i % 3][:num]
    assert one["edit_x"] == pytest.approx(np.mean([0.1 * i * n for n, i in enumerate(chosen)]))
    assert read == chosen
    read.clear()
    assert run(monkeypatch, count, lambda _: edits.edit_report(config, sampler, {}, "")) == [
        one] * count
    assert sorted(read) == chosen, "every clip is read by one process"


@pytest.mark.parametrize("count", [2, 5])
def test_batches_of_features_are_shared(monkeypatch, count):
    config = run_config.resolve(features.get_config("runlocal"))
    seen = []

    class Batches:
        def iterate(self, start_step):
            seen.append(start_step)
            yield {"pixels_BTHWC": np.float32(start_step)}

    def loss(config, params, batch, key):
        return 0.0, {"accuracy": batch["pixels_BTHWC"] ** 2}

    monkeypatch.setattr(evaluators, "open_dataset", lambda *_: None)
    monkeypatch.setattr(evaluators.pixel_batches, "pixel_batches", lambda *_, **__: Batches())
    monkeypatch.setattr(features_task, "loss", loss)
    found = run(monkeypatch, count, lambda _: evaluators.evaluate_features(config, {}, ""))
    num = evaluators.FEATURE_BATCHES
    assert found == [{"held_out_accuracy": sum(i**2 for i in range(num)) / num}] * count
    assert sorted(seen) == list(range(num))
