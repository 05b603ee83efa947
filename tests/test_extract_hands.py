"""Extraction with the real MediaPipe, on rendered and real videos."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import cv2
import numpy as np
import pytest

import extract_hands
from common import HANDS_DTYPE, InputError, load_hands, open_folder, read_crop
from conftest import ENVIRONMENT, REAL, ROOT, listing, refused, run


def write_video(path, frames, fps=10):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, frames[0].shape[1::-1])
    for frame in frames:
        writer.write(frame)
    writer.release()


def test_files_as_the_contract_says(extracted):
    hands = load_hands(extracted)
    n = len(hands.keypoints)
    assert hands.crops.dtype == np.uint8 and hands.offsets.dtype == np.int64 and len(hands.offsets) == n + 1
    assert hands.keypoints.dtype == np.float32 and hands.hands.dtype == HANDS_DTYPE
    assert hands.videos == sorted(hands.videos) and len(hands.videos) == 8
    order = np.lexsort((hands.hands["frame"], hands.hands["video"]))
    assert np.array_equal(order, np.arange(n))
    assert all(read_crop(hands, i).shape == (224, 224, 3) for i in range(n))
    assert np.allclose(hands.hands["time"], hands.hands["frame"] / 5, atol=1e-3)
    assert ((hands.hands["score"] >= 0.5) & (hands.hands["score"] <= 1)).all()
    assert cv2.imread(str(extracted / "hands.jpg")) is not None
    log = [json.loads(line) for line in (extracted / "log.jsonl").read_text().splitlines()]
    assert log[0]["args"]["fps"] == 5 and log[1]["hands"] == n and log[1]["left"] == hands.hands["left"].sum()


def test_keypoints_lie_on_the_true_joints_and_left_hands_were_mirrored(extracted, rendered):
    """Box and keypoints of a row, put back into the source, must meet the truth that the renderer wrote."""
    hands, errors, sides = load_hands(extracted), [], []
    for row, keypoints in zip(hands.hands, hands.keypoints):
        truth = np.load((rendered / "videos" / hands.videos[row["video"]]).with_suffix(".npy"))
        truth = truth[truth["frame"] == row["frame"]]
        side = row["box"][2] - row["box"][0]
        assert row["box"][3] - row["box"][1] == side
        if row["left"]:
            keypoints = keypoints * (-1, 1) + (223, 0)
        source = (keypoints + 0.5) * side / 224 - 0.5 + row["box"][:2]
        if len(truth):
            each = np.linalg.norm(truth["keypoints"] - source, axis=2).mean(1) / side
            errors.append(each.min())
            if each.min() < 0.15:
                sides.append(truth["left"][each.argmin()] == row["left"])
    assert len(errors) > 140 and np.median(errors) < 0.06 and np.mean(sides) > 0.9


@pytest.mark.skipif(not REAL.is_dir(), reason="the real clips are not here")
def test_real_clips(tmp_path):
    run("extract_hands.py", REAL, "--out", tmp_path / "hands")
    hands = load_hands(tmp_path / "hands")
    for video, name in enumerate(hands.videos):
        frames = 13  # 378 frames at 30 a second, sampled at 0, 1, .. 12 s
        found = len(set(hands.hands["frame"][hands.hands["video"] == video]))
        assert found >= 0.9 * frames, f"{name}: hands in {found} of {frames} sampled frames"
    assert not hands.hands["left"].any()  # it is a right hand throughout


def test_frames_are_sampled_by_time_in_sequence(tmp_path):
    frames = [np.full((64, 64, 3), 10 * k, np.uint8) for k in range(25)]
    write_video(tmp_path / "a.mp4", frames, fps=10)
    found = [(index, round(seconds, 3), image.mean()) for index, seconds, image in
             extract_hands.sample_frames(tmp_path / "a.mp4", 3)]
    assert [f[0] for f in found] == [0, 4, 7, 10, 14, 17, 20, 24]  # first at or after 0, 1/3, 2/3, 1, ... s
    assert all(abs(seconds - index / 10) < 1e-3 and abs(mean - 10 * index) < 4 for index, seconds, mean in found)
    assert len(list(extract_hands.sample_frames(tmp_path / "a.mp4", 1000))) == 25  # no frame twice


@pytest.mark.parametrize("left", [False, True])
def test_crops_are_square_padded_and_carry_their_keypoints(left):
    """A hand at the border: a dot drawn at a keypoint is found at the crop's keypoint, what lies outside is black."""
    args = Namespace(margin=1.3, size=224)
    rng = np.random.default_rng(0)
    for corner in ((-20.0, 30.0), (230.0, -15.0), (100.0, 60.0)):
        points = corner + rng.uniform(0, 1, (21, 2)) * (80, 120)
        points[:2] = corner, np.add(corner, (80, 120))
        image = np.full((160, 280, 3), 40, np.uint8)
        inside = [k for k in range(21) if 3 < points[k, 0] < 276 and 3 < points[k, 1] < 156]
        crop, keypoints, box = extract_hands.cut_out(image, points, left, args)
        assert crop.shape == (224, 224, 3) and box[2] - box[0] == box[3] - box[1] == 156
        k = inside[len(inside) // 2]
        dotted = image.copy()
        x, y = np.round(points[k]).astype(int)
        dotted[y, x] = 255
        seen, _, _ = extract_hands.cut_out(dotted, points, left, args)
        mass = seen[..., 0].astype(float) - crop[..., 0]
        found = np.array([(mass.sum(a) * np.arange(224)).sum() / mass.sum() for a in (0, 1)])
        assert np.abs(found - keypoints[k]).max() < 224 / 156
        height, width = image.shape[:2]
        outside = (box[0] < 0) * -box[0] + (box[2] > width) * (box[2] - width)
        assert abs((crop[112, :, 0] == 0).sum() - outside * 224 / 156) <= 2
    away, _, _ = extract_hands.cut_out(image, points + 1000, left, args)
    assert away.shape == (224, 224, 3) and not away.any()  # wholly outside the picture


def test_the_same_hand_twice_gives_one_row():
    def marks(points):
        return Namespace(landmark=[Namespace(x=x, y=y) for x, y in points])

    def side(label, score):
        return Namespace(classification=[Namespace(label=label, score=score)])

    hand = np.random.default_rng(0).uniform(0.1, 0.4, (21, 2))
    other = hand + 0.5
    answer = Namespace(multi_hand_landmarks=[marks(hand), marks(hand + 0.003), marks(other)],
                       multi_handedness=[side("Left", 0.8), side("Left", 0.9), side("Right", 0.7)])
    detector = Namespace(process=lambda image: answer)
    image = np.zeros((200, 200, 3), np.uint8)
    found = extract_hands.find_hands(detector, image, Namespace(mirrored=False, min_size=32))
    assert [(left, score) for _, left, score in found] == [(False, 0.9), (True, 0.7)]  # "Left" is the mirrored label
    assert np.allclose(found[0][0], (hand + 0.003) * 200 - 0.5)
    selfie = extract_hands.find_hands(detector, image, Namespace(mirrored=True, min_size=32))
    assert [left for _, left, _ in selfie] == [True, False]
    assert not extract_hands.find_hands(detector, image, Namespace(mirrored=False, min_size=70))


def test_broken_videos_are_listed_and_the_run_goes_on(rendered, tmp_path):
    source = sorted((rendered / "videos").glob("*.mp4"))[0]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a_good.mp4").write_bytes(source.read_bytes())
    (tmp_path / "in" / "b_text.mp4").write_text("this is no video")
    (tmp_path / "in" / "c_cut.mp4").write_bytes(source.read_bytes()[:source.stat().st_size // 2])
    (tmp_path / "in" / "d_empty.mp4").write_bytes(b"")
    (tmp_path / "in" / "notes.txt").write_text("not looked at")
    out = tmp_path / "hands"
    printed = run("extract_hands.py", tmp_path / "in", "--out", out, "--fps", 5).stdout
    failed = dict(line.split("\t") for line in (out / "failed.txt").read_text().splitlines())
    assert sorted(failed) == ["b_text.mp4", "c_cut.mp4", "d_empty.mp4"] and "3 videos could not be read" in printed
    assert (out / "videos.txt").read_text().split() == ["a_good.mp4", *sorted(failed)]
    assert set(load_hands(out).hands["video"]) == {0}


def test_a_video_that_breaks_half_way_keeps_what_was_decoded(rendered, tmp_path):
    """Motion JPEG in AVI has no index to lose: cutting the file leaves good frames before the cut."""
    frames = [cv2.GaussianBlur(np.random.default_rng(k).integers(0, 255, (120, 160, 3), dtype=np.uint8), (5, 5), 2)
              for k in range(60)]
    writer = cv2.VideoWriter(str(tmp_path / "a.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (160, 120))
    for frame in frames:
        writer.write(frame)
    writer.release()
    data = (tmp_path / "a.avi").read_bytes()
    (tmp_path / "a.avi").write_bytes(data[:len(data) // 2])
    good = []
    with pytest.raises(extract_hands.BrokenVideo, match="breaks off at"):
        for index, _, _ in extract_hands.sample_frames(tmp_path / "a.avi", 10):
            good.append(index)
    assert good == list(range(len(good))) and 20 < len(good) < 40


def test_bad_input_is_refused_in_one_line(tmp_path, rendered):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.mp4").write_text("this is no video")
    assert "no such file or folder" in refused("extract_hands.py", tmp_path / "nowhere", "--out", tmp_path / "o")
    assert "holds no video" in refused("extract_hands.py", tmp_path / "empty", "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()
    line = run("extract_hands.py", tmp_path / "text", "--out", tmp_path / "o", status=2).stderr.splitlines()[-1]
    assert "no hand found in 1 videos; 1 could not be read: a.mp4: cannot be opened" in line
    assert not any((tmp_path / "o" / name).exists() for name in ("crops.npy", "keypoints.npy", "videos.txt"))
    (tmp_path / "file").write_text("")
    assert "expected a folder" in refused("extract_hands.py", rendered / "videos", "--out", tmp_path / "file")
    with pytest.raises(InputError, match="--fps"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["extract_hands.py", "a", "--out", "b", "--fps", "0"])
            extract_hands.parse_args()


def test_a_second_call_changes_nothing_and_new_videos_come_after_the_old(rendered, tmp_path, extracted):
    videos, out = tmp_path / "videos", tmp_path / "hands"
    videos.mkdir()
    names = sorted(p.name for p in (rendered / "videos").glob("*.mp4"))
    for name in names[1:3]:
        (videos / name).write_bytes((rendered / "videos" / name).read_bytes())
    run("extract_hands.py", videos, "--out", out, "--fps", 5)
    before = listing(out)
    run("extract_hands.py", videos, "--out", out, "--fps", 5)
    assert listing(out) == before
    assert "--fps was 5.0, is 1.0" in refused("extract_hands.py", videos, "--out", out)
    lock = open_folder(out)
    assert "another run is writing" in run("extract_hands.py", videos, "--out", out, "--fps", 5, status=2).stderr
    lock.close()
    old = np.load(out / "keypoints.npy")
    (videos / names[0]).write_bytes((rendered / "videos" / names[0]).read_bytes())  # sorts before the others
    run("extract_hands.py", videos, "--out", out, "--fps", 5)
    hands, whole = load_hands(out), load_hands(extracted)
    assert hands.videos == [names[1], names[2], names[0]] and np.array_equal(hands.keypoints[:len(old)], old)
    wanted = np.concatenate([np.flatnonzero(whole.hands["video"] == v) for v in (1, 2, 0)])
    assert np.array_equal(hands.keypoints, whole.keypoints[wanted])
    assert all(np.array_equal(read_crop(hands, i), read_crop(whole, j)) for i, j in enumerate(wanted))


def kill_when(condition, *arguments, wait=60):
    """Start extraction in a process group of its own and kill -9 all of it as soon as `condition` holds."""
    command = [sys.executable, ROOT / "extract_hands.py", *map(str, arguments)]
    process = subprocess.Popen(command, start_new_session=True, env=ENVIRONMENT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.time() + wait
    while not condition() and time.time() < end and process.poll() is None:
        time.sleep(0.005)
    met = condition()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return met


def test_killed_while_extracting_it_goes_on_to_the_same_bytes(rendered, extracted, tmp_path):
    arguments = (rendered / "videos", "--out", tmp_path / "hands", "--fps", 5, "--workers", 1)
    assert kill_when(lambda: len(list((tmp_path / "hands" / "parts").glob("*.npz"))) >= 2, *arguments)
    assert not (tmp_path / "hands" / "crops.npy").exists()
    run("extract_hands.py", *arguments)
    assert listing(tmp_path / "hands") == listing(extracted)


def test_killed_while_merging_it_goes_on_to_the_same_bytes(rendered, extracted, tmp_path):
    arguments = (rendered / "videos", "--out", tmp_path / "hands", "--fps", 5)
    kill_when(lambda: any((tmp_path / "hands" / name).exists() for name in (".merging.tmp", "merged")), *arguments)
    run("extract_hands.py", *arguments)
    assert listing(tmp_path / "hands") == listing(extracted)


def test_a_full_disk_ends_in_one_line_and_the_run_goes_on_when_there_is_space(rendered, extracted, tmp_path):
    """A limit on the size of files stands for the full disk: a part, then the merged crops, cannot be written."""
    arguments = (rendered / "videos", "--out", tmp_path / "hands", "--fps", 5)
    command = shlex.join(map(str, [sys.executable, ROOT / "extract_hands.py", *arguments]))
    for limit in (20, 1000):  # KiB
        result = subprocess.run(["bash", "-c", f"ulimit -f {limit}; {command}"], capture_output=True, text=True,
                                timeout=100, env=ENVIRONMENT)
        assert result.returncode == 2 and "Traceback" not in result.stderr
        assert result.stderr.splitlines()[-1].endswith("could not be written: File too large")
        assert not (tmp_path / "hands" / "crops.npy").exists()
    run("extract_hands.py", *arguments)
    assert listing(tmp_path / "hands") == listing(extracted)


def test_a_video_whose_worker_dies_is_tried_again(rendered, extracted, tmp_path):
    """The kernel kills a worker (as when memory runs out): the video is not lost."""
    arguments = (rendered / "videos", "--out", tmp_path / "hands", "--fps", 5, "--workers", 1)
    process = subprocess.Popen([sys.executable, ROOT / "extract_hands.py", *map(str, arguments)], env=ENVIRONMENT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "hands").glob("parts/*.npz")) and process.poll() is None:
        time.sleep(0.005)
    workers = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "spawn_main"], capture_output=True, text=True)
    os.kill(int(workers.stdout.split()[0]), signal.SIGKILL)
    assert process.wait() == 0
    assert listing(tmp_path / "hands") == listing(extracted)


def test_the_same_name_under_another_root_is_another_video(rendered, tmp_path):
    names = sorted(p.name for p in (rendered / "videos").glob("*.mp4"))
    for root, name in (("a", names[0]), ("b", names[1])):
        (tmp_path / root).mkdir()
        shutil.copy(rendered / "videos" / name, tmp_path / root / "clip.mp4")
    run("extract_hands.py", tmp_path / "a", "--out", tmp_path / "hands", "--fps", 5)
    assert "--root was" in refused("extract_hands.py", tmp_path / "b", "--out", tmp_path / "hands", "--fps", 5)


def test_links_and_odd_names(tmp_path):
    (tmp_path / "b.mp4").write_text("")
    (tmp_path / "a.mp4").symlink_to(tmp_path / "b.mp4")
    (tmp_path / ".hidden.mp4").write_text("")
    (tmp_path / "with space é.MOV").write_text("")
    assert extract_hands.list_videos([str(tmp_path)])[1] == ["a.mp4", "with space é.MOV"]  # one video, under one name
    for name in ("line\nbreak.mp4", "line\u2028break.mp4"):
        (tmp_path / name).write_text("")
        with pytest.raises(InputError, match="cannot be a line of videos.txt"):
            extract_hands.list_videos([str(tmp_path)])
        (tmp_path / name).unlink()


def test_a_damaged_hands_folder_is_not_merged_into(rendered, hands, tmp_path):
    shutil.copytree(rendered / "videos", tmp_path / "videos")
    log = (hands / "log.jsonl").read_text().replace(str(rendered / "videos"), str(tmp_path / "videos"))
    (hands / "log.jsonl").write_text(log)
    (tmp_path / "videos" / "new.mp4").write_bytes(next((tmp_path / "videos").glob("*.mp4")).read_bytes())
    (hands / "hands.npy").unlink()
    before = listing(hands)
    line = run("extract_hands.py", tmp_path / "videos", "--out", hands, "--fps", 5, status=2).stderr.splitlines()[-1]
    assert "hands.npy: missing" in line and {k: v for k, v in listing(hands).items() if k in before} == before


def test_a_merge_that_was_half_moved_is_finished(rendered, extracted, tmp_path):
    """The state that a kill leaves between two renames, made by hand: it lasts too short to be hit."""
    out = Path(shutil.copytree(extracted, tmp_path / "hands"))
    (out / "merged").mkdir()
    for name in ("keypoints.npy", "hands.npy", "videos.txt", "failed.txt"):
        (out / name).rename(out / "merged" / name)
    (out / "parts").mkdir()
    run("extract_hands.py", rendered / "videos", "--out", out, "--fps", 5)
    assert listing(out) == listing(extracted)
