"""Claims about reading datasets: what was written comes back, and damage is found at opening."""

import concurrent.futures
import json
import shutil
import sys

import numpy as np
import pytest

from sora_jax.core.errors import UserError
from sora_jax.data.decode import decode_video, encode_video
from sora_jax.data.records import content_digest
from sora_jax.data.sources import open_source
from sora_jax.data.video_folder import builder as builder_module
from sora_jax.data.video_folder.builder import Clip, VideoFolder
from sora_jax.data.video_folder.captions import Entry
from sora_jax.data.video_folder.check import Checked


def pixels(i):
    return np.random.default_rng(i).integers(0, 256, (1 + i % 3, 24, 32, 3), dtype=np.uint8)


def write_dataset(directory, captions=lambda i: (f"clip {i}", "längere Beschreibung 動画 " * 3)):
    """13 clips, in several shards, with every fifth one held out."""
    folder = directory / "videos"
    folder.mkdir(parents=True)
    clips = []
    for i in range(13):
        data = encode_video(pixels(i), 8)
        (folder / f"{i:02d}.nut").write_bytes(data)
        checked = Checked(content_digest(data), len(data), 1 + i % 3, 24, 32, 8.0, "png", (), ())
        entry = Entry(f"{i:02d}.nut", captions(i)[:1 + i % 2], metadata={"place": i})
        clips.append(Clip(entry, checked, "held_out" if i % 5 == 4 else "train"))
    old, builder_module.SHARD_BYTES = builder_module.SHARD_BYTES, 20_000
    try:
        builder = VideoFolder(folder=folder, clips=clips, data_dir=directory,
                              file_format="array_record")
        builder.download_and_prepare()
    finally:
        builder_module.SHARD_BYTES = old
    return builder.data_path


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture
def copy(dataset, tmp_path):
    return shutil.copytree(dataset, tmp_path / "copy")


def shards(directory, split="train"):
    return sorted(directory.glob(f"*-{split}.array_record-*"))


def test_records_come_back_as_written(dataset):
    train, held_out = open_source(dataset), open_source(dataset, "held_out")
    assert (len(train), len(held_out)) == (11, 2) and len(shards(dataset)) > 1
    record = train[5]
    assert record.id == "06.nut" and record.captions == ("clip 6",)
    np.testing.assert_array_equal(decode_video(record.video_bytes).pixels_THWC, pixels(6))
    assert record.digest == content_digest(record.video_bytes)
    assert (record.num_frames, record.height, record.width, record.fps) == (1, 24, 32, 8.0)
    assert record.metadata["columns"] == {"place": 6}
    assert "動画" in train[1].captions[1]
    with pytest.raises(IndexError):
        train[11]
    assert [r.id for r in train] == [f"{i:02d}.nut" for i in range(13) if i % 5 != 4]


def test_specs_are_those_of_the_records(copy):
    for attempt in range(2):  # built, then read from the index beside the shards
        source = open_source(copy)
        specs = source.specs()
        for i in range(len(source)):
            record = source[i]
            assert (specs.num_frames[i], specs.height[i], specs.width[i], specs.fps[i]) == (
                record.num_frames, record.height, record.width, record.fps)
            lengths = [len(caption.encode()) for caption in record.captions]
            assert [n for n in specs.caption_bytes[i] if n >= 0] == lengths
        assert (copy / "index-train.npz").exists()
    (copy / "index-train.npz").write_bytes(b"torn")
    np.testing.assert_array_equal(open_source(copy).specs().num_frames, specs.num_frames)


def test_fingerprint_follows_content_not_place(dataset, copy, tmp_path):
    same = open_source(copy).fingerprint
    assert same == open_source(dataset).fingerprint
    assert same != open_source(dataset, "held_out").fingerprint
    other = write_dataset(tmp_path / "other", captions=lambda i: (f"klip {i}", "b"))
    assert same != open_source(other).fingerprint
    for path in shards(copy):  # other shards under the old index, which must not be believed
        shutil.copy(other / path.name, path)
    shutil.copy(other / "dataset_info.json", copy)
    assert open_source(copy).fingerprint == open_source(other).fingerprint


def test_threads_read_the_same(dataset):
    source = open_source(dataset)
    expected = [record.digest for record in source]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for i, record in enumerate(pool.map(lambda i: source[i % 11], range(400))):
            assert record.digest == expected[i % 11]


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.9999])
@pytest.mark.parametrize("which", [0, -1])
def test_a_truncated_shard_is_found_at_opening(copy, kept, which):
    path = shards(copy)[which]
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * kept)])
    with pytest.raises(UserError, match=path.name):
        open_source(copy)


@pytest.mark.parametrize("kept", [0.0, 0.4])
def test_a_shard_whose_end_is_zeros_is_found_at_opening(copy, kept):
    path = shards(copy)[0]  # what a crash of the machine can leave behind: full size, no content
    data = path.read_bytes()
    start = int(len(data) * kept)
    path.write_bytes(data[:start] + bytes(len(data) - start))
    with pytest.raises(UserError, match=path.name):
        open_source(copy)


def test_a_flipped_bit_never_gives_a_wrong_record(copy):
    expected = {r.id: (r.digest, r.captions) for r in open_source(copy)}
    path = shards(copy)[0]
    whole = path.read_bytes()
    found = 0
    for position in np.random.default_rng(0).integers(0, 20_000, 25):
        data = bytearray(whole)
        data[position] ^= 4
        path.write_bytes(data)
        try:
            source = open_source(copy)
        except UserError:
            found += 1
            continue
        for i in range(len(source)):
            try:
                record = source[i]
            except UserError as error:
                assert f"record {i}" in str(error)
                found += 1
            else:
                assert expected[record.id] == (content_digest(record.video_bytes), record.captions)
    assert found


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_damaged_directories_are_named(copy, tmp_path):
    with pytest.raises(UserError, match="no split 'test'.*train, held_out"):
        open_source(copy, "test")
    with pytest.raises(UserError, match="there is no directory"):
        open_source(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is no dataset"):
        open_source(tmp_path / "empty")
    info = copy / "dataset_info.json"
    original = info.read_text()
    edit(info, lambda v: v["splits"][0].update(shardLengths=["0"]))
    with pytest.raises(UserError, match="is empty"):
        open_source(copy)
    info.write_text(original)
    edit(info, lambda v: v["splits"][0].update(numBytes="1"))
    with pytest.raises(UserError, match="says 1"):
        open_source(copy)
    info.write_text(original)
    edit(info, lambda v: v.update(fileFormat="tfrecord"))
    with pytest.raises(UserError, match="tfrecord"):
        open_source(copy)
    info.write_text(original[:-9])
    with pytest.raises(UserError, match="cannot be read"):
        open_source(copy)
    info.write_text(original)
    shards(copy)[0].unlink()
    with pytest.raises(UserError, match="is missing"):
        open_source(copy)


def test_features_that_name_another_class_import_nothing(copy, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "trap_module.py").write_text("class Trap: pass\n")
    edit(copy / "features.json", lambda v: v["featuresDict"]["features"]["id"].update(
        pythonClassName="trap_module.Trap"))
    with pytest.raises(UserError, match="trap_module.Trap"):
        open_source(copy)
    assert "trap_module" not in sys.modules


def test_features_of_another_kind_of_dataset_are_refused(copy):
    edit(copy / "features.json", lambda v: v["featuresDict"]["features"].pop("video"))
    with pytest.raises(UserError, match="lacks the features video"):
        open_source(copy)
