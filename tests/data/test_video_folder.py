"""Claims about a user's folder: captions, splits, no file harms another, whole or nothing."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from sora_jax.core.errors import UserError
from sora_jax.data.decode import decode_video, encode_video
from sora_jax.data.sources import open_source
from sora_jax.data.video_folder import FolderOptions, prepare, worker
from sora_jax.data.video_folder.captions import read_folder
from sora_jax.data.video_folder.check import check_file
from sora_jax.data.video_folder.worker import check_files
from tests.data.clips import moving_square, write_clip
from tests.outside_data import ROOT


def mp4(num_frames=5, **options):
    return write_clip(moving_square(num_frames), **options)


def fill(folder, files):
    """Writes {name: bytes, text or None (an empty video file)}."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content or b"")
    return folder


def captions_of(folder, **options):
    return {e.file_name: e.captions for e in read_folder(folder, **options).entries}


def test_csv_with_bom_quotes_unicode_and_nested_folders(tmp_path):
    fill(tmp_path, {
        "a.mp4": None, "day one/é 動.mp4": None, "B.MOV": None,
        "metadata.csv": '\ufefffile_name,caption,long_caption,fps\r\n'
                        'a.mp4,"red, ""round"" ball","it rolls\nfar",8\r\n'
                        'day one/é 動.mp4,Ünï 動画,,9\r\n./B.MOV,x,x,\r\n'})
    assert captions_of(tmp_path) == {
        "a.mp4": ('red, "round" ball', "it rolls far"), "day one/é 動.mp4": ("Ünï 動画",),
        "B.MOV": ("x",)}
    assert read_folder(tmp_path).entries[1].metadata == {"fps": "8"}
    assert captions_of(tmp_path, caption_columns=("long_caption",)) == {
        "a.mp4": ("it rolls far",), "B.MOV": ("x",)}


def test_jsonl_may_hold_lists_of_captions(tmp_path):
    rows = [{"file_name": "a.mp4", "captions": ["one", " ", "two"], "split": "test"},
            {"file_name": "b.mp4", "captions": "three", "tags": [1, 2], "split": None}]
    fill(tmp_path, {"a.mp4": None, "b.mp4": None,
                    "metadata.jsonl": "\n".join(map(json.dumps, rows)) + "\n\n"})
    found = read_folder(tmp_path)
    assert [(e.captions, e.split, e.metadata) for e in found.entries] == [
        (("one", "two"), "held_out", {}), (("three",), None, {"tags": [1, 2]})]


def test_text_files_beside_the_videos(tmp_path):
    fill(tmp_path, {"a.mp4": None, "a.txt": "\ufeffshort\n\n long  one \nshort\n",
                    "sub/b.webm": None, "sub/b.txt": "b", "c.mp4": None, "d.mp4": None,
                    "d.txt": " \n", ".hidden.mp4": None, ".cache/x.mp4": None,
                    "notes.md": "no video"})
    found = read_folder(tmp_path)
    assert {e.file_name: e.captions for e in found.entries} == {
        "a.mp4": ("short", "long one"), "sub/b.webm": ("b",)}
    refused = dict(found.refused)
    assert set(refused) == {"c.mp4", "d.mp4"}
    assert "no c.txt" in refused["c.mp4"] and "empty" in refused["d.mp4"]


def test_rows_that_cannot_be_used_are_refused_one_by_one(tmp_path):
    (tmp_path / "videos").mkdir()
    outside = fill(tmp_path, {"secret.mp4": None})
    fill(tmp_path / "videos", {
        "a.mp4": None, "b.mp4": None, "unnamed.mp4": None,
        "metadata.csv": f"file_name,text\na.mp4,first\na.mp4,second\nb.mp4,\nabsent.mp4,x\n"
                        f"../secret.mp4,x\n{outside}/secret.mp4,x\n,x\n"})
    os.mkfifo(tmp_path / "videos" / "fifo.mp4")
    found = read_folder(tmp_path / "videos")
    assert [(e.file_name, e.captions) for e in found.entries] == [("a.mp4", ("first",))]
    refused = found.refused
    for name, words in (("a.mp4", "named again"), ("b.mp4", "no caption"),
                        ("absent.mp4", "no such file"), ("../secret.mp4", "outside the folder"),
                        (f"{outside}/secret.mp4", "outside"), ("metadata.csv line 8", "file_name"),
                        ("unnamed.mp4", "not named"), ("fifo.mp4", "not named")):
        assert any(name == n and words in reason for n, reason in refused), name


@pytest.mark.parametrize("files, words", [
    (None, "there is no folder"),
    ({"a.txt": "x"}, "holds no video"),
    ({"a.mp4": None}, "no caption"),
    ({"a.mp4": None, "metadata.csv": "name,caption\na.mp4,x\n"}, "no column file_name"),
    ({"a.mp4": None, "metadata.csv": "file_name,size\na.mp4,x\n"}, "no caption column.*size"),
    ({"a.mp4": None, "metadata.csv": "file_name,caption\nb.mp4,x\n"}, "no such file"),
    ({"a.mp4": None, "metadata.csv": "file_name,caption\na.mp4,x, y\n"}, "line 2.*quotes"),
    ({"a.mp4": None, "metadata.csv": "file_name,caption\n"}, "not named"),
    ({"a.mp4": None, "metadata.csv": ""}, "not named"),
    ({"a.mp4": None, "metadata.csv": b"file_name,caption\na.mp4,\xff\n"}, "not UTF-8"),
    ({"a.mp4": None, "metadata.jsonl": '{"file_name": "a.mp4"\n'}, "line 1 is not JSON"),
    ({"a.mp4": None, "metadata.jsonl": "[1]\n"}, "JSON object"),
    ({"a.mp4": None, "metadata.csv": "file_name,caption,split\na.mp4,x,maybe\n"}, "'maybe'"),
    ({"a.mp4": None, "metadata.csv": "file_name,caption\n", "metadata.jsonl": ""}, "holds both"),
])
def test_a_users_mistake_is_one_clear_line(tmp_path, files, words):
    folder = tmp_path / "videos"
    if files is not None:
        fill(folder, files)
    with pytest.raises(UserError, match=words) as error:
        prepare(folder, tmp_path / "data", ONE_WORKER)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "data").exists()


def test_unknown_caption_column_is_named(tmp_path):
    fill(tmp_path, {"a.mp4": None, "metadata.csv": "file_name,caption\na.mp4,x\n"})
    with pytest.raises(UserError, match="no column prose .*caption, file_name"):
        prepare(tmp_path, tmp_path / "data", FolderOptions(caption_columns=("prose",)))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with every kind of file, its dataset and its report."""
    root = tmp_path_factory.mktemp("prepared")
    good = {f"good{i:02d}.mp4": mp4(5 + i) for i in range(11)}
    long = mp4(60, container="matroska")
    files = {
        **good, "cut.mkv": long[:len(long) * 7 // 10], "text.mp4": "no video",
        "twin.mp4": good["good03.mp4"], "still.mp4": mp4(1),
        "turned.mp4": mp4(4, matrix=[0, 2**16, 0, -2**16, 0, 0, 0, 0, 2**30]),
        "grows.h264": mp4(12, container="h264") + write_clip(
            moving_square(12, 64, 96), container="h264"),
        "short.h264": mp4(3, container="h264") + write_clip(
            moving_square(3, 64, 96), container="h264"),
    }
    rows = "".join(f"{name},caption of {name}\n" for name in files)
    fill(root / "videos", {**files, "metadata.csv": "file_name,caption\n" + rows})
    directory = prepare(root / "videos", root / "data")
    with open(os.path.join(directory, "report.json"), encoding="utf-8") as file:
        return root, directory, json.load(file)


def test_report_says_what_became_of_every_file(prepared):
    root, directory, report = prepared
    assert report["counts"] == {"kept": 13, "changed": 2, "refused": 3, "train": 14, "held_out": 1}
    changed = {item["file_name"]: item for item in report["changed"]}
    assert 8 <= changed["cut.mkv"]["num_frames"] < 60
    assert "prematurely" in changed["cut.mkv"]["changes"][0]
    assert changed["grows.h264"]["num_frames"] == 12
    assert "from 64x48 to 96x64" in changed["grows.h264"]["changes"][0]
    refused = {item["file_name"]: item["reason"] for item in report["refused"]}
    assert set(refused) == {"text.mp4", "twin.mp4", "short.h264"}
    assert "same content as good03.mp4" in refused["twin.mp4"]
    assert "3 good frames" in refused["short.h264"]
    kept = {item["file_name"]: item for item in report["kept"]}
    assert (kept["turned.mp4"]["height"], kept["turned.mp4"]["width"]) == (64, 48)
    assert "90 degrees" in kept["turned.mp4"]["notes"][0]
    text = open(os.path.join(directory, "report.txt"), encoding="utf-8").read()
    for name in (*changed, *refused):
        assert name in text


def test_dataset_holds_what_the_report_says(prepared):
    root, directory, report = prepared
    items = {item["file_name"]: item for item in report["kept"] + report["changed"]}
    seen = {}
    for split in ("train", "held_out"):
        for record in open_source(directory, split):
            item = items[record.id]
            assert item["split"] == split
            assert record.video_bytes == (root / "videos" / record.id).read_bytes()
            assert record.captions == (f"caption of {record.id}",)
            video = decode_video(record.video_bytes, num_frames=record.num_frames)
            assert video.pixels_THWC.shape == (item["num_frames"], item["height"], item["width"], 3)
            if record.num_frames > 1:
                assert video.fps == pytest.approx(record.fps)
            seen[record.id] = record
    assert set(seen) == set(items)


def test_same_files_are_not_prepared_again_and_others_do_not_replace(prepared, monkeypatch):
    root, directory, _ = prepared
    before = sorted(os.listdir(root / "data"))
    module = sys.modules["sora_jax.data.video_folder.prepare"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "check_files", lambda *args: pytest.fail("checked again"))
        assert prepare(root / "videos", root / "data") == directory
        assert sorted(os.listdir(root / "data")) == before
        for options, seed in ((FolderOptions(), 1), (FolderOptions(held_out_share=0.2), 0),
                              (FolderOptions(min_side=20), 0)):
            with pytest.raises(pytest.fail.Exception):
                prepare(root / "videos", root / "data", options, seed)
        same = FolderOptions(num_workers=1)
        assert prepare(root / "videos", root / "data", same) == directory


ONE_WORKER = FolderOptions(num_workers=1)


def small_folder(tmp_path, num_clips=3):
    return fill(tmp_path / "videos", {
        **{f"{i}.mp4": mp4(3 + i) for i in range(num_clips)},
        **{f"{i}.txt": f"clip {i}" for i in range(num_clips)}})


def ids(directory, split="train"):
    return {record.id for record in open_source(directory, split)}


def test_splits(tmp_path):
    folder = small_folder(tmp_path)
    seen = [ids(prepare(folder, tmp_path / "data", ONE_WORKER, seed), "held_out")
            for seed in range(4)]
    assert {len(names) for names in seen} == {1} and len(set(map(frozenset, seen))) > 1
    rows = "file_name,caption,split\n0.mp4,x,train\n1.mp4,x,validation\n2.mp4,x,\n"
    fill(folder, {"metadata.csv": rows})
    directory = prepare(folder, tmp_path / "data", ONE_WORKER)
    assert (ids(directory, "held_out"), ids(directory)) == ({"1.mp4"}, {"0.mp4", "2.mp4"})
    fill(folder, {"metadata.csv": rows.replace("train", "test").replace(",\n", ",test\n")})
    with pytest.raises(UserError, match="none is left for training"):
        prepare(folder, tmp_path / "data", ONE_WORKER)
    fill(folder, {"metadata.csv": rows.replace("validation", "train").replace(",\n", ",train\n")})
    directory = prepare(folder, tmp_path / "data", ONE_WORKER)
    assert len(ids(directory, "held_out")) == 1
    assert "split column holds out no clip" in open(os.path.join(directory, "report.txt")).read()


def test_every_nth_clip_by_name_is_held_out_whatever_the_split_column_says(tmp_path):
    folder = small_folder(tmp_path, 5)
    rows = "file_name,caption,split\n" + "".join(f"{i}.mp4,x,test\n" for i in (3, 0, 4, 1, 2))
    fill(folder, {"metadata.csv": rows, "0.mp4": "no video"})  # a refused file has no place
    every = FolderOptions(num_workers=1, held_out_every=2)
    directory = prepare(folder, tmp_path / "data", every)
    assert (ids(directory, "held_out"), ids(directory)) == ({"2.mp4", "4.mp4"}, {"1.mp4", "3.mp4"})
    assert "held_out_every = 2" in open(os.path.join(directory, "report.txt")).read()
    fill(folder, {"metadata.csv": rows.replace("test", "train")})
    again = prepare(folder, tmp_path / "data", every)
    assert again != directory and ids(again, "held_out") == {"2.mp4", "4.mp4"}
    assert "by their hash" not in open(os.path.join(again, "report.txt")).read()
    with pytest.raises(UserError, match="holds out none of 4 usable clips"):
        prepare(folder, tmp_path / "data", FolderOptions(num_workers=1, held_out_every=5))
    with pytest.raises(UserError, match="held_out_every = 1 should be 2 or more"):
        FolderOptions(held_out_every=1)


def test_datasets_of_before_there_was_held_out_every_are_found_again():
    assert "held_out_every" not in FolderOptions().identity()
    assert FolderOptions(held_out_every=4).identity()["held_out_every"] == 4


def test_one_clip_alone_is_not_held_out(tmp_path):
    directory = prepare(small_folder(tmp_path, 1), tmp_path / "data", ONE_WORKER)
    assert ids(directory) == {"0.mp4"}
    with pytest.raises(UserError, match="no split 'held_out'"):
        open_source(directory, "held_out")
    assert "no clip is held out" in open(os.path.join(directory, "report.txt")).read()


def test_interrupted_preparation_leaves_no_dataset(tmp_path, monkeypatch):
    folder = small_folder(tmp_path)
    from sora_jax.data.video_folder import builder

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(builder, "make_example", full_disk)
        with pytest.raises(UserError, match="no space left"):
            prepare(folder, tmp_path / "data", ONE_WORKER)
        assert os.listdir(tmp_path / "data") == []
    code = ("import os, sys; from sora_jax.data.video_folder import builder, prepare; "
            "builder.make_example = lambda *a, **k: os._exit(9); prepare(*sys.argv[1:])")
    assert subprocess.run([sys.executable, "-c", code, folder, tmp_path / "data"]).returncode == 9
    assert not [n for n in os.listdir(tmp_path / "data") if not n.startswith(".")]
    assert len(open_source(prepare(folder, tmp_path / "data", ONE_WORKER))) == 2


def test_a_file_that_changes_meanwhile_is_an_error(tmp_path, monkeypatch):
    folder = small_folder(tmp_path)
    module = sys.modules["sora_jax.data.video_folder.prepare"]

    def check_then_touch(*args):
        results = check_files(*args)
        (folder / "1.mp4").write_bytes(mp4(9))
        return results

    monkeypatch.setattr(module, "check_files", check_then_touch)
    with pytest.raises(UserError, match="1.mp4 changed"):
        prepare(folder, tmp_path / "data", ONE_WORKER)
    assert os.listdir(tmp_path / "data") == []


def test_a_hanging_or_dying_child_costs_only_its_file(tmp_path, monkeypatch):
    folder = small_folder(tmp_path)
    monkeypatch.setattr(worker, "GRACE_SECONDS", 0.5)
    children, signals = [], {"0.mp4": signal.SIGSTOP, "1.mp4": signal.SIGKILL}
    start = worker._Child.__init__

    def remember(self, *args):
        start(self, *args)
        children.append(self)
        self._extra_seconds = 120.0

    check = worker._Child.check

    def disturbed(self, path, options):
        if path.name in signals:
            time.sleep(0.05)
            self._extra_seconds = 0.0
            self._process.send_signal(signals[path.name])
        return check(self, path, options)

    monkeypatch.setattr(worker._Child, "__init__", remember)
    monkeypatch.setattr(worker._Child, "check", disturbed)
    results = check_files(folder, ["0.mp4", "1.mp4", "2.mp4"], FolderOptions(
        timeout_seconds=0.1, num_workers=1))
    assert "hung" in results["0.mp4"] and "SIGKILL" in results["1.mp4"]
    assert results["2.mp4"].num_frames == 5
    assert all(child._process.poll() is not None for child in children) and len(children) == 3


def test_the_time_limit_stops_a_slow_file(tmp_path):
    fill(tmp_path, {"slow.mp4": mp4(200)})
    results = check_files(tmp_path, ["slow.mp4"], FolderOptions(timeout_seconds=0.0))
    assert "longer than 0 s" in results["slow.mp4"]


def test_one_files_hunger_for_memory_harms_no_other(tmp_path):
    large = np.zeros((2, 6000, 5000, 3), np.uint8)
    fill(tmp_path, {"a.mov": encode_video(large, 8, "qtrle"), "b.mp4": mp4(), "c.mp4": mp4(6)})
    options = FolderOptions(num_workers=1, memory_bytes=60 * 2**20)
    results = check_files(tmp_path, ["b.mp4", "a.mov", "c.mp4"], options)
    assert "too much memory" in results["a.mov"]
    assert (results["b.mp4"].num_frames, results["c.mp4"].num_frames) == (5, 6)


def test_limits_of_a_file(tmp_path):
    path = os.fspath(fill(tmp_path, {"a.mp4": mp4(9)}) / "a.mp4")
    for options, words in ((FolderOptions(max_file_bytes=100), "100 bytes"),
                           (FolderOptions(max_pixels=100), "max_pixels"),
                           (FolderOptions(min_side=49), "least side of 49")):
        with pytest.raises(UserError, match=words):
            check_file(path, options)


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "your_videos.md").read_text(encoding="utf-8")
    code = text.split("## From Python\n")[1]
    files = {"ball.mp4": mp4(5), "day2/cat.webm": mp4(7, container="matroska")}
    listed = textwrap.dedent(text.split("day2/cat.webm\n\n", 1)[1].split("\n\n")[0])
    assert listed.startswith("file_name,short_caption,long_caption,split\n")
    fill(tmp_path / "my_videos", {**files, "metadata.csv": listed})
    monkeypatch.chdir(tmp_path)
    exec(textwrap.dedent(code), {})
    assert "('A red ball rolls.', 'A red ball rolls over a table, from left to right.')" in (
        capsys.readouterr().out)


def test_when_no_file_can_be_used_the_reasons_are_given(tmp_path):
    fill(tmp_path / "videos", {"a.mp4": "text", "a.txt": "x", "b.mp4": "b" * 99, "b.txt": "x"})
    with pytest.raises(UserError, match="none of the 2 files.*a.mp4: .*b.mp4: "):
        prepare(tmp_path / "videos", tmp_path / "data")


def test_two_preparations_at_once_agree(tmp_path):
    folder = small_folder(tmp_path, 1)
    code = ("import sys; from sora_jax.data.video_folder import FolderOptions, prepare; "
            "print(prepare(*sys.argv[1:], FolderOptions(num_workers=1)))")
    both = []

    def run():
        both.append(subprocess.run(
            [sys.executable, "-c", code, folder, tmp_path / "data"], capture_output=True, text=True,
            check=True).stdout)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert both[0] == both[1] and len(os.listdir(tmp_path / "data")) == 1
    assert len(open_source(both[0].strip())) == 1
