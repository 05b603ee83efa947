"""Extraction with the real MediaPipe, on rendered and real videos."""

import json
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from argparse import Namespace
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

import common
import extract_hands
from common import HANDS_DTYPE, InputError, load_hands, open_folder, read_crop
from conftest import (ENVIRONMENT, REAL, ROOT, TINY, fork, listing, refused, run, run_here,
                      torchrun)
from extract_hands import Hand, Square, crop_hand, square_around


def write_video(path, frames, fps=10):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps,
                             frames[0].shape[1::-1])
    for frame in frames:
        writer.write(frame)
    writer.release()


def write_clip(path, pictures, codec="libx264", rate=10, pix_fmt="yuv420p", options=None,
               ratio=None, first=0, **container):
    """Write pictures as a video by PyAV. ratio: of its pixels, width over height. first: time of
    its first frame in frames."""
    with av.open(str(path), "w", **container) as file:
        stream = file.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if ratio:
            stream.codec_context.sample_aspect_ratio = ratio
        for number, picture in enumerate(pictures, first):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts = number
            frame.time_base = Fraction(1, rate)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return str(path)


def greys(count, height=48, width=64, step=5):
    """Pictures whose grey tells their number."""
    return [np.full((height, width, 3), step * k, np.uint8) for k in range(count)]


def numbers(frames, step=5):
    """What the pictures say of their numbers."""
    return [round(float(frame.image.mean()) / step) for frame in frames]


@pytest.fixture(scope="module")
def detector():
    with extract_hands.start_detector(extract_hands.find_model(None)) as made:
        yield made


@pytest.fixture(scope="module")
def hand_picture(rendered, detector):
    """A picture with a hand, and what is found in it."""
    for path in sorted((rendered / "videos").glob("*.mp4")):
        for frame in extract_hands.sample_frames(str(path), 1):
            hands = extract_hands.find_hands(detector, frame.image, 32, False, 2.6)
            if len(hands) == 1 and hands[0].score > 0.9:
                return frame.image, hands[0]


def hands_of(path, detector, fps=1.0):
    """All that extraction finds in a video: [(frame's number, Hand)]."""
    args = Namespace(fps=fps, all_frames=False, min_size=32, mirrored=False, margin=2.6)
    found = []
    for frame, hands in extract_hands.read_video(str(path), None, detector, args):
        found += [(frame.index, hand) for hand in hands]
    return found


@pytest.mark.parametrize("name, settings", [
    ("interlaced.mkv", {"options": {"x264-params": "tff=1"}}),
    ("interlaced.mpg", {"codec": "mpeg2video", "rate": 25, "options": {"flags": "+ilme+ildct"}}),
    ("av1.mp4", {"codec": "libsvtav1", "options": {"preset": "12"}}),
    ("vp9.webm", {"codec": "libvpx-vp9", "options": {"deadline": "realtime"}}),
    ("hevc.mp4", {"codec": "libx265", "options": {"preset": "ultrafast", "x265-params":
                                                  "log-level=none"}}),
    ("ten_bit.mp4", {"pix_fmt": "yuv420p10le"}),
    ("open_gop.mp4", {"options": {"x264-params": "open-gop=1:bframes=3:keyint=8:scenecut=0"}}),
    ("late.mkv", {"first": 36_000}),
    ("late.ts", {"first": 36_000}),
    ("wide_pixels.mp4", {"ratio": Fraction(4, 3)})])
def test_the_right_hand_in_every_kind_of_video(tmp_path, detector, hand_picture, name, settings):
    """A second of black, a second with the hand, a second of black."""
    image, hand = hand_picture
    height, width = image.shape[:2]
    rate = settings.get("rate", 10)
    if "ratio" in settings:  # as a camera writes 1440 x 1080 for 1920 x 1080
        image = cv2.resize(image, (width * 3 // 4, height), interpolation=cv2.INTER_AREA)
    black = np.zeros_like(image)
    path = write_clip(tmp_path / name, [black] * rate + [image] * rate + [black] * rate, **settings)
    black_alone = write_clip(tmp_path / f"black_{name}", [black] * rate, **settings)
    if "interlaced" in name:
        with av.open(path) as file:
            assert next(file.decode(video=0)).interlaced_frame
    ((index, found),) = hands_of(path, detector)
    assert rate <= index <= rate + 3
    assert np.abs(found.points - hand.points).max() < 0.02 * width
    assert found.is_left == hand.is_left
    assert not hands_of(black_alone, detector)  # nothing is left of the video before it


def test_the_hands_are_those_of_another_decoder(extracted, rendered, detector):
    """OpenCV decodes these videos right."""
    hands = load_hands(extracted)
    for video, name in enumerate(hands.videos[:3]):
        reader = cv2.VideoCapture(str(rendered / "videos" / name))
        rows = np.flatnonzero(hands.rows["video"] == video)
        for index in range(20):
            image = cv2.cvtColor(reader.read()[1], cv2.COLOR_BGR2RGB)
            wanted = extract_hands.find_hands(detector, image, 32, False, 2.6)
            here = rows[hands.rows["frame"][rows] == index]
            assert len(here) == len(wanted)
            for row, hand in zip(hands.rows[here], wanted):
                square = hand.square
                box = (square.left, square.top, square.left + square.side,
                       square.top + square.side)
                assert np.abs(row["box"] - box).max() <= 4 and row["left"] == hand.is_left


@pytest.mark.parametrize("name, settings", [
    ("h264.mp4", {"options": {"x264-params": "bframes=3:b-adapt=0:scenecut=0"}}),
    ("few_key_frames.mkv", {"options": {"x264-params": "bframes=3:keyint=400"}}),
    ("phone.mp4", {"options": {"x264-params": "bframes=0:keyint=15:scenecut=0"}}),
    ("motion.avi", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}),
    ("mpeg4.avi", {"codec": "mpeg4"}),
    ("hevc.mp4", {"codec": "libx265", "options": {"x265-params": "log-level=none"}})])
def test_what_skipping_looks_at_comes_three_frames_later_at_most(tmp_path, name, settings):
    path = write_clip(tmp_path / name, greys(125, step=2), rate=30, **settings)
    quick = list(extract_hands.sample_frames(path, 1))
    every = list(extract_hands.sample_frames(path, 1, all_frames=True))
    assert [frame.index for frame in every] == [0, 30, 60, 90, 120]
    assert len(quick) == 5
    for late, frame in zip(quick, every):
        assert 0 <= late.index - frame.index <= 3
        assert late.time == pytest.approx(late.index / 30, abs=2e-3)
        assert numbers([late], 2)[0] == pytest.approx(late.index, abs=1)


@pytest.mark.parametrize("name, codec, options", [
    ("usual.mp4", "libx264", {}),
    ("slow.mkv", "libx264", {"preset": "slow", "bf": "8"}),
    ("hevc.mp4", "libx265", {"x265-params": "log-level=none"}),
    ("mpeg4.mp4", "mpeg4", {"bf": "2"})])
def test_what_skipping_looks_at_is_the_picture_of_a_whole_decoding(tmp_path, name, codec, options):
    """By x264's defaults P frames refer to B frames: whoever skips those sees pictures fall to
    pieces, if they have texture and move."""
    large = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    large = cv2.resize(large, (450, 300), interpolation=cv2.INTER_CUBIC)
    pictures = []
    for k in range(150):
        x = int(100 + 90 * np.sin(k / 9))
        y = int(70 + 60 * np.cos(k / 7))
        turn = cv2.getRotationMatrix2D((80, 60), 20 * np.sin(k / 5), 1)
        pictures.append(cv2.warpAffine(large[y:y + 120, x:x + 160], turn, (160, 120)))
    path = write_clip(tmp_path / name, pictures, codec, rate=30, options=options)
    with av.open(path) as file:
        whole = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    frames = list(extract_hands.sample_frames(path, 1))
    assert len(frames) == 5
    for frame in frames:
        assert np.array_equal(frame.image, whole[frame.index]), frame.index


def test_the_frames_after_a_pause_are_numbered_on(tmp_path):
    """A lecture: 30 frames a second, then one in twenty seconds. Skipping comes too late there, and
    the rest is decoded whole."""
    times = [*range(150), *range(150, 270, 12), *range(270, 270 + 20 * 600, 600)]
    path = str(tmp_path / "lecture.mp4")
    with av.open(path, "w") as file:
        stream = file.add_stream("libx264", rate=30, options={
            "bf": "3", "x264-params": "b-adapt=0:b-pyramid=none:scenecut=0"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for picture, time in zip(greys(len(times), step=1), times):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts = time
            frame.time_base = Fraction(1, 30)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    frames = list(extract_hands.sample_frames(path, 1))
    assert (np.diff([frame.index for frame in frames]) > 0).all()
    assert [frame.time for frame in frames[-18:]] == pytest.approx(
        [time / 30 for time in times[-18:]], abs=1e-3)


@pytest.mark.parametrize("name", ["a.mkv", "a.webm", "a.flv", "a.wmv", "a.mp4", "a.ts"])
def test_time_stamps_in_milliseconds_cost_no_frame(tmp_path, name):
    codec = {".webm": "libvpx-vp9", ".wmv": "wmv2"}.get(Path(name).suffix, "libx264")
    path = write_clip(tmp_path / name, greys(60, step=4), codec, rate=30)
    for fps in (30, 15, 3):
        found = [frame.index for frame in extract_hands.sample_frames(path, fps)]
        assert found == list(range(0, 60, 30 // fps))


def test_where_skipping_comes_too_late_the_video_is_decoded_whole(tmp_path):
    """With sixteen frames in a row that no other needs, at ten a second."""
    path = write_clip(tmp_path / "a.mp4", greys(45),
                      options={"x264-params": "bframes=16:b-adapt=0:b-pyramid=0:scenecut=0"})
    assert numbers(extract_hands.sample_frames(path, 1)) == [0, 10, 20, 30, 40]


def test_a_clock_that_restarts_counts_on_and_each_frame_has_its_size(tmp_path):
    """Two streams one after another, as dashcams and downloads write them."""
    first = write_clip(tmp_path / "a.ts", greys(20))
    second = write_clip(tmp_path / "b.ts", greys(20, 96, 128))
    joined = tmp_path / "c.ts"
    joined.write_bytes(Path(first).read_bytes() + Path(second).read_bytes())
    frames = list(extract_hands.sample_frames(str(joined), 5))
    assert [frame.index for frame in frames] == list(range(0, 40, 2))
    assert numbers(frames) == [*range(0, 20, 2)] * 2
    assert [frame.image.shape for frame in frames] == [(48, 64, 3)] * 10 + [(96, 128, 3)] * 10


def test_a_clock_that_was_set_while_recording_counts_on(tmp_path):
    path = write_clip(tmp_path / "a.mp4", greys(50), options={"bf": "0"})
    with av.open(path) as file, av.open(str(tmp_path / "b.mkv"), "w") as copy:
        stream = copy.add_stream_from_template(file.streams.video[0])
        for number, packet in enumerate(file.demux()):
            if packet.dts is not None:
                leap = int(1.7e9 / packet.time_base) * (number >= 25)
                packet.pts += leap
                packet.dts += leap
                packet.stream = stream
                copy.mux(packet)
    frames = list(extract_hands.sample_frames(str(tmp_path / "b.mkv"), 2))
    assert numbers(frames) == [frame.index for frame in frames] == list(range(0, 50, 5))


def test_a_video_that_leaves_frames_out_or_was_trimmed_is_whole(tmp_path):
    gap = str(tmp_path / "gap.avi")
    with av.open(gap, "w") as file:
        stream = file.add_stream("mpeg4", rate=30)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for number in [*range(30), *range(30, 291, 10)]:
            frame = av.VideoFrame.from_ndarray(greys(1)[0], "rgb24")
            frame.pts = number
            frame.time_base = Fraction(1, 30)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    assert len(list(extract_hands.sample_frames(gap, 1))) == 10

    # As a phone's editor does: the first 2 of 10 seconds are shown, all samples are kept.
    path = Path(write_clip(tmp_path / "trimmed.mp4", greys(100, step=2), options={"bf": "0"}))
    content = bytearray(path.read_bytes())
    for box, offset in ((b"mvhd", 20), (b"tkhd", 24), (b"elst", 12)):
        place = content.index(box) + offset
        whole = int.from_bytes(content[place:place + 4], "big")
        content[place:place + 4] = (whole // 5).to_bytes(4, "big")
    path.write_bytes(content)
    assert numbers(extract_hands.sample_frames(str(path), 1), 2) == [0, 10]


def test_a_folder_with_parts_of_its_own_is_left_alone(tmp_path):
    for name in ("parts", "merged"):
        folder = tmp_path / f"of_{name}"
        (folder / name).mkdir(parents=True)
        write_clip(folder / name / "a.mp4", greys(5))
        assert "would be in the way" in refused("extract_hands.py", folder, "--out", folder)
        assert (folder / name / "a.mp4").exists()


def test_a_cut_file_a_short_one_and_one_without_pictures(tmp_path):
    grain = np.random.default_rng(0).integers(-2, 3, (50, 48, 64, 3))
    pictures = [(grey + some).clip(0, 255).astype(np.uint8) for grey, some in zip(greys(50), grain)]
    path = write_clip(tmp_path / "a.mp4", pictures, options={"g": "5", "crf": "2"},
                      container_options={"movflags": "faststart"})
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[:len(content) * 6 // 10])
    frames = []
    with pytest.raises(extract_hands.BrokenVideo, match=r"breaks off at \d\.\d s of 5\.0 s"):
        for frame in extract_hands.sample_frames(path, 10):
            frames.append(frame)
    assert 5 < len(frames) < 45 and numbers(frames) == [frame.index for frame in frames]

    short = write_clip(tmp_path / "short.mp4", greys(2))
    assert numbers(extract_hands.sample_frames(short, 1)) == [0]
    assert numbers(extract_hands.sample_frames(short, 10)) == [0, 1]

    with av.open(str(tmp_path / "sound.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=44_100)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 44_100), np.float32), "fltp", "stereo")
        frame.sample_rate = 44_100
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    unknown = tmp_path / "unknown.mp4"
    unknown.write_bytes(Path(short).read_bytes().replace(b"avc1", b"xyz1"))
    (tmp_path / "empty.mp4").write_bytes(b"")
    for name, message in (("sound", "holds no video track"), ("unknown", "codec is unknown"),
                          ("empty", "Invalid data"), ("gone", "No such file")):
        with pytest.raises(extract_hands.BrokenVideo, match=message):
            hands_of(tmp_path / f"{name}.mp4", None)


def test_files_as_the_contract_says(extracted):
    hands = load_hands(extracted)
    n = len(hands.keypoints)
    assert (hands.crops.dtype == np.uint8 and hands.offsets.dtype == np.int64
            and len(hands.offsets) == n + 1)
    assert hands.keypoints.dtype == np.float32 and hands.rows.dtype == HANDS_DTYPE
    assert hands.videos == sorted(hands.videos) and len(hands.videos) == 8
    order = np.lexsort((hands.rows["frame"], hands.rows["video"]))
    assert np.array_equal(order, np.arange(n))
    assert all(read_crop(hands, i).shape == (224, 224, 3) for i in range(n))
    assert np.allclose(hands.rows["time"], hands.rows["frame"] / 5, atol=1e-3)
    assert ((hands.rows["score"] >= 0.5) & (hands.rows["score"] <= 1)).all()
    assert cv2.imread(str(extracted / "hands.jpg")) is not None
    log = [json.loads(line) for line in (extracted / "log.jsonl").read_text().splitlines()]
    assert (log[0]["args"]["fps"] == 5 and log[1]["hands"] == n
            and log[1]["left"] == hands.rows["left"].sum())


def test_keypoints_lie_on_the_true_joints_and_left_hands_were_mirrored(extracted, rendered):
    """Box and keypoints of a row, put back into the source, must meet the truth that the
    renderer wrote."""
    hands, errors, sides = load_hands(extracted), [], []
    for row, keypoints in zip(hands.rows, hands.keypoints):
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
    run("extract_hands.py", REAL, "--out", tmp_path / "hands", "--fps", 10)
    hands = load_hands(tmp_path / "hands")
    for video, name in enumerate(hands.videos):
        frames = 126  # 378 frames at 30 a second
        found = len(set(hands.rows["frame"][hands.rows["video"] == video]))
        assert found >= 0.9 * frames, f"{name}: hands in {found} of {frames} sampled frames"
    assert hands.rows["left"].mean() <= 0.02  # it is a right hand throughout; measured: 4 of 247


def test_frames_are_sampled_by_time_in_sequence(tmp_path):
    frames = [np.full((64, 64, 3), 10 * k, np.uint8) for k in range(25)]
    write_video(tmp_path / "a.mp4", frames, fps=10)
    found = list(extract_hands.sample_frames(str(tmp_path / "a.mp4"), 3))
    # The first at or after 0, 1/3, 2/3, 1, ... s.
    assert [frame.index for frame in found] == [0, 4, 7, 10, 14, 17, 20, 24]
    assert all(abs(frame.time - frame.index / 10) < 1e-3 for frame in found)
    assert all(abs(frame.image.mean() - 10 * frame.index) < 4 for frame in found)
    # No frame twice.
    assert len(list(extract_hands.sample_frames(str(tmp_path / "a.mp4"), 1000))) == 25


@pytest.mark.parametrize("left", [False, True])
def test_crops_are_square_padded_and_carry_their_keypoints(left):
    """A hand at the border: a dot drawn at a keypoint is found at the crop's keypoint, what
    lies outside is black."""
    rng = np.random.default_rng(0)
    for corner in ((-20.0, 30.0), (230.0, -15.0), (100.0, 60.0)):
        points = corner + rng.uniform(0, 1, (21, 2)) * (80, 120)
        points[:2] = corner, np.add(corner, (80, 120))
        image = np.full((160, 280, 3), 40, np.uint8)
        inside = [k for k in range(21) if 3 < points[k, 0] < 276 and 3 < points[k, 1] < 156]
        square = square_around(points, 1.3)
        hand = Hand(points, left, 1.0, square)
        crop, keypoints = crop_hand(image, hand, 224, "black")
        assert crop.shape == (224, 224, 3) and square.side == 156
        k = inside[len(inside) // 2]
        dotted = image.copy()
        x, y = np.round(points[k]).astype(int)
        dotted[y, x] = 255
        seen, _ = crop_hand(dotted, hand, 224, "black")
        mass = seen[..., 0].astype(float) - crop[..., 0]
        found = np.array([(mass.sum(a) * np.arange(224)).sum() / mass.sum() for a in (0, 1)])
        assert np.abs(found - keypoints[k]).max() < 224 / 156
        width = image.shape[1]
        outside = max(-square.left, 0) + max(square.left + 156 - width, 0)
        assert abs((crop[112, :, 0] == 0).sum() - outside * 224 / 156) <= 2
    hand = Hand(points, left, 1.0, Square(1000, 1000, 156))
    away, _ = crop_hand(image, hand, 224, "black")
    assert away.shape == (224, 224, 3) and not away.any()  # wholly outside the picture


@pytest.mark.parametrize("margin", [1.3, 2.6])
def test_no_view_of_a_hand_at_a_corner_shows_black_that_the_picture_did_not_have(margin):
    rng = np.random.default_rng(0)
    image = rng.integers(90, 256, (240, 320, 3), dtype=np.uint8)
    darkest = {}
    for border in ("mirror", "black"):
        values = []
        for corner in ((2, 2), (238, 2), (2, 158), (238, 158)):
            points = corner + rng.uniform(0, 1, (21, 2)) * 80
            hand = Hand(points, False, 1.0, square_around(points, margin))
            crop, seen = crop_hand(image, hand, 112, border)
            for _ in range(50):
                view = common.sample_view(rng, seen, 112, 64, colour=False)
                values.append(common.apply_view(view, crop, seen, 64, border)[0].min())
        darkest[border] = np.array(values)
    assert darkest["mirror"].min() >= 90
    assert (darkest["black"] == 0).mean() > 0.5  # what the test would find


def test_beyond_the_frame_a_crop_shows_the_mirrored_frame():
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    square = Square(-20, -5, 50)  # beyond it on three sides
    crop, _ = crop_hand(image, Hand(np.zeros((21, 2)), False, 1.0, square), 50)
    rows = np.abs((np.arange(50) - 5 + 29) % 58 - 29)
    columns = np.abs((np.arange(50) - 20 + 39) % 78 - 39)
    assert np.array_equal(crop, image[rows][:, columns])


def test_the_same_hand_twice_gives_one_row():
    def marks(points):
        return [Namespace(x=x, y=y) for x, y in points]

    def side(label, score):
        return [Namespace(category_name=label, score=score)]

    hand = np.random.default_rng(0).uniform(0.1, 0.4, (21, 2))
    other = hand + 0.5
    answer = Namespace(hand_landmarks=[marks(hand), marks(hand + 0.003), marks(other)],
                       handedness=[side("Right", 0.8), side("Right", 0.9), side("Left", 0.7)])
    detector = Namespace(detect=lambda image: answer)
    image = np.zeros((200, 200, 3), np.uint8)

    def find(mirrored=False, min_size=32):
        return extract_hands.find_hands(detector, image, min_size, mirrored, 2.6)

    found = find()
    assert [(hand.is_left, hand.score) for hand in found] == [(False, 0.9), (True, 0.7)]
    assert np.allclose(found[0].points, (hand + 0.003) * 200 - 0.5)
    assert [hand.is_left for hand in find(mirrored=True)] == [True, False]
    assert not find(min_size=70)


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
    assert (sorted(failed) == ["b_text.mp4", "c_cut.mp4", "d_empty.mp4"]
            and "3 videos could not be read" in printed)
    assert ((out / "videos.txt").read_text().split() == ["a_good.mp4"]
            and set(load_hands(out).rows["video"]) == {0})
    before = listing(out)
    # What could not be read is tried again.
    run("extract_hands.py", tmp_path / "in", "--out", out, "--fps", 5)
    assert listing(out) == before
    (tmp_path / "in" / "b_text.mp4").write_bytes(source.read_bytes())
    run("extract_hands.py", tmp_path / "in", "--out", out, "--fps", 5)
    hands = load_hands(out)
    assert (hands.videos == ["a_good.mp4", "b_text.mp4"]
            and "b_text" not in (out / "failed.txt").read_text())
    assert np.array_equal(*(hands.keypoints[hands.rows["video"] == video] for video in (0, 1)))


def test_bad_input_is_refused_in_one_line(tmp_path, rendered):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.mp4").write_text("this is no video")
    assert "no such file or folder" in refused("extract_hands.py", tmp_path / "nowhere",
                                               "--out", tmp_path / "o")
    assert "holds no video" in refused("extract_hands.py", tmp_path / "empty",
                                       "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()
    line = run("extract_hands.py", tmp_path / "text", "--out", tmp_path / "o",
               status=2).stderr.splitlines()[-1]
    assert "no hand found in 1 videos; 1 could not be read, see failed.txt" in line
    assert (tmp_path / "o" / "failed.txt").read_text().startswith("a.mp4\tInvalidDataError")
    assert not any((tmp_path / "o" / name).exists()
                   for name in ("crops.npy", "keypoints.npy", "videos.txt"))
    (tmp_path / "file").write_text("")
    assert "File exists" in refused("extract_hands.py", rendered / "videos",
                                    "--out", tmp_path / "file")
    for flag, value in (("--fps", 0), ("--margin", 0), ("--max-hands", 0), ("--min-score", 2),
                        ("--quality", 101)):
        assert flag in refused("extract_hands.py", rendered / "videos", "--out", tmp_path / "new",
                               flag, value)
    assert not (tmp_path / "new").exists()


def test_a_second_call_changes_nothing_and_new_videos_come_after_the_old(rendered, tmp_path,
                                                                         extracted):
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
    assert "another run is writing" in run("extract_hands.py", videos, "--out", out, "--fps", 5,
                                           status=2).stderr
    lock.close()
    old = np.load(out / "keypoints.npy")
    # Sorts before the others.
    (videos / names[0]).write_bytes((rendered / "videos" / names[0]).read_bytes())
    run("extract_hands.py", videos, "--out", out, "--fps", 5)
    hands, whole = load_hands(out), load_hands(extracted)
    assert (hands.videos == [names[1], names[2], names[0]]
            and np.array_equal(hands.keypoints[:len(old)], old))
    wanted = np.concatenate([np.flatnonzero(whole.rows["video"] == v) for v in (1, 2, 0)])
    assert np.array_equal(hands.keypoints, whole.keypoints[wanted])
    assert all(np.array_equal(read_crop(hands, i), read_crop(whole, j))
               for i, j in enumerate(wanted))


def kill_when(condition, *arguments, wait=60):
    """Start extraction in a process group of its own and kill -9 all of it as soon as
    `condition` holds."""
    process = fork(["extract_hands.py", *arguments], os.devnull, os.devnull)
    end = time.time() + wait
    while not condition() and time.time() < end and process.is_alive():
        time.sleep(0.005)
    met = condition()
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return met


def test_killed_while_extracting_it_goes_on_to_the_same_bytes(rendered, extracted, tmp_path):
    arguments = (rendered / "videos", "--out", tmp_path / "hands", "--fps", 5, "--workers", 1)
    assert kill_when(lambda: len(list((tmp_path / "hands" / "parts").glob("*.npz"))) >= 2,
                     *arguments)
    assert not (tmp_path / "hands" / "crops.npy").exists()
    run("extract_hands.py", *arguments)
    assert listing(tmp_path / "hands") == listing(extracted)


def run_on_full_disk(limit, *arguments):
    """Extraction where no file can be larger than `limit` KiB: 20 are too few for a part, 1000 for
    the merged crops alone. -> CompletedProcess"""
    command = shlex.join(map(str, [sys.executable, ROOT / "extract_hands.py", *arguments]))
    return subprocess.run(["bash", "-c", f"ulimit -f {limit}; {command}"], capture_output=True,
                          text=True, timeout=100, env=ENVIRONMENT)


# Runs the script; the process is killed with -9 just before the renaming of that number. Each file
# of a merge is written under a private name and renamed, so these are the moments that matter.
KILLED = """
import os, runpy, signal, sys
left = int(sys.argv[1])
def counted(rename):
    def renamed(source, target):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        rename(source, target)
    return renamed
os.replace = counted(os.replace)
os.rename = counted(os.rename)
sys.argv = sys.argv[2:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def unmerged(rendered, tmp_path_factory):
    """A hands folder all of whose parts wait to be merged."""
    out = tmp_path_factory.mktemp("unmerged") / "hands"
    result = run_on_full_disk(1000, rendered / "videos", "--out", out, "--fps", 5)
    assert result.returncode == 2
    shutil.rmtree(out / ".merging.tmp")
    assert len(list(out.glob("parts/*.npz"))) == 8
    return out


@pytest.mark.parametrize("renamings, left", [
    (3, ".merging.tmp"),  # failed.txt and two arrays are written
    (7, ".merging.tmp"),  # all files are written, but not yet said to be complete
    (8, "merged"),  # they are complete, none is in its place
    (10, "merged"),  # some are in their places
    (13, "merged")])  # all but videos.txt
def test_killed_while_merging_it_goes_on_to_the_same_bytes(unmerged, rendered, extracted, tmp_path,
                                                           renamings, left):
    out = Path(shutil.copytree(unmerged, tmp_path / "hands"))
    arguments = (rendered / "videos", "--out", out, "--fps", 5)
    (tmp_path / "killed.py").write_text(KILLED)
    run(tmp_path / "killed.py", renamings, ROOT / "extract_hands.py", *arguments,
        status=-signal.SIGKILL)
    assert (out / left).is_dir() and not (out / "videos.txt").exists()
    run_here("extract_hands.py", *arguments)
    assert listing(out) == listing(extracted)


def test_a_full_disk_ends_in_one_line_and_the_run_goes_on_when_there_is_space(rendered, extracted,
                                                                              tmp_path):
    arguments = (rendered / "videos", "--out", tmp_path / "hands", "--fps", 5)
    for limit in (20, 1000):
        result = run_on_full_disk(limit, *arguments)
        assert result.returncode == 2 and "Traceback" not in result.stderr
        assert result.stderr.splitlines()[-1].endswith("could not be written: File too large")
        assert not (tmp_path / "hands" / "crops.npy").exists()
    run("extract_hands.py", *arguments)
    assert listing(tmp_path / "hands") == listing(extracted)


def wait_for_a_part(out, process):
    while not list(out.glob("parts/*.npz")):
        assert process.poll() is None, "it ended before it could be disturbed"
        time.sleep(0.005)


def test_a_video_whose_worker_dies_is_tried_again_by_the_next_call(rendered, extracted, tmp_path):
    """The kernel kills a worker (as when memory runs out): the others are not lost with it."""
    out = tmp_path / "hands"
    arguments = (rendered / "videos", "--out", out, "--fps", 5, "--workers", 1)
    command = [sys.executable, ROOT / "extract_hands.py", *map(str, arguments)]
    process = subprocess.Popen(command, env=ENVIRONMENT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    wait_for_a_part(out, process)
    time.sleep(0.1)  # by now the worker is at the next video
    workers = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "spawn_main"],
                             capture_output=True, text=True)
    os.kill(int(workers.stdout.split()[0]), signal.SIGKILL)
    printed, _ = process.communicate(timeout=100)
    assert process.returncode == 0 and "1 videos could not be read" in printed
    (failed,) = (out / "failed.txt").read_text().splitlines()
    name, reason = failed.split("\t")
    assert reason == "its worker process died, see worker.log"
    others = (out / "videos.txt").read_text().split()
    assert len(others) == 7 and name not in others
    run("extract_hands.py", *arguments)
    assert (out / "videos.txt").read_text().split() == [*others, name]
    assert (out / "failed.txt").read_text() == ""
    hands = load_hands(out)
    whole = load_hands(extracted)
    order = [whole.videos.index(video) for video in hands.videos]
    wanted = np.concatenate([np.flatnonzero(whole.rows["video"] == video) for video in order])
    assert np.array_equal(hands.keypoints, whole.keypoints[wanted])


def test_after_ctrl_c_it_goes_on_to_the_same_bytes(rendered, extracted, tmp_path):
    """The workers are killed by the script that ends: no video is to blame, none is listed."""
    out = tmp_path / "hands"
    arguments = (rendered / "videos", "--out", out, "--fps", 5, "--workers", 2)
    command = [sys.executable, ROOT / "extract_hands.py", *map(str, arguments)]
    # A shell's background job ignores Ctrl-C, and so would every process that it starts.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, env=ENVIRONMENT, text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    signal.signal(signal.SIGINT, handler)
    wait_for_a_part(out, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130 and "Traceback" not in errors
    assert errors.splitlines()[-1] == "extract_hands.py: stopped; give the same command again"
    assert not (out / "videos.txt").exists()
    run("extract_hands.py", *arguments)
    assert listing(out) == listing(extracted)


def test_the_same_name_under_another_root_is_another_video(rendered, tmp_path):
    names = sorted(p.name for p in (rendered / "videos").glob("*.mp4"))
    for root, name in (("a", names[0]), ("b", names[1])):
        (tmp_path / root).mkdir()
        shutil.copy(rendered / "videos" / name, tmp_path / root / "clip.mp4")
    run("extract_hands.py", tmp_path / "a", "--out", tmp_path / "hands", "--fps", 5)
    arguments = ("--out", tmp_path / "hands", "--fps", 5)
    assert "none of its 1 videos is among the inputs" in refused("extract_hands.py", tmp_path / "b",
                                                                 *arguments)
    run("extract_hands.py", tmp_path / "a", tmp_path / "b", *arguments)
    assert (tmp_path / "hands" / "videos.txt").read_text().split() == ["clip.mp4", "../b/clip.mp4"]


def found(*inputs):
    """Names, relative to their root, of what list_sources finds."""
    root, sources, _ = extract_hands.list_sources([str(path) for path in inputs])
    return sorted(os.path.relpath(path, root) for path in sources)


def test_links_and_odd_names(tmp_path):
    (tmp_path / "b.mp4").write_text("")
    (tmp_path / "a.mp4").symlink_to(tmp_path / "b.mp4")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / ".hidden.mp4").write_text("")
    (tmp_path / "with space é.MOV").write_text("")
    assert found(tmp_path) == ["b.mp4", "with space é.MOV"]  # one video, under one name
    (tmp_path / "elsewhere").symlink_to(tmp_path)
    assert found(tmp_path / "elsewhere") == found(tmp_path / "a.mp4", tmp_path) == found(tmp_path)
    for name in ("line\nbreak.mp4", "line\u2028break.mp4", "tab\t.mp4", "stills\n"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_text("")
        assert "cannot be a line of videos.txt" in refused("extract_hands.py", tmp_path,
                                                           "--out", tmp_path / "o")
        shutil.rmtree(tmp_path / name)


def test_several_inputs_lists_and_folders_of_stills(tmp_path, monkeypatch):
    for name in ("ego/x/1.mp4", "ego/2.mkv", "ego/cover.jpg", "doh/3.webm", "doh/frames/b.png",
                 "doh/frames/a.JPG", "doh/frames/notes.md", "ours/log.jsonl", "ours/hands.jpg",
                 "doh/.cache/4.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert found(tmp_path / "ego") == ["2.mkv", "x/1.mp4"]
    assert found(tmp_path / "ego" / "2.mkv") == ["2.mkv"]
    assert found(tmp_path / "doh" / "frames") == ["frames"]
    everything = ["doh/3.webm", "doh/frames", "ego/2.mkv", "ego/x/1.mp4"]
    assert found(tmp_path) == found(tmp_path / "ego", tmp_path / "doh") == everything
    # The cover, the notes, and what we wrote and drew.
    passed_over = extract_hands.list_sources([str(tmp_path)])[2]
    assert len(passed_over) == 4 and str(tmp_path / "doh/frames/notes.md") in passed_over
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_bytes(
        "\ufeffego/2.mkv\r\n\r\n  doh/frames \r\nego/gone.mp4".encode())
    assert found("list.txt") == ["doh/frames", "ego/2.mkv", "ego/gone.mp4"]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(InputError, match="empty.txt: holds no video"):
        found("empty.txt")


def test_a_list_with_a_missing_video_and_a_broken_still(rendered, tmp_path):
    source = sorted((rendered / "videos").glob("*.mp4"))[0]
    (tmp_path / "stills").mkdir()
    for frame in extract_hands.sample_frames(str(source), 5):
        cv2.imwrite(str(tmp_path / "stills" / f"{frame.index:03d}.png"), frame.image[:, :, ::-1])
    (tmp_path / "stills" / "003.png").write_text("no picture")
    # More pixels than OpenCV will take.
    header = b"IHDR" + struct.pack(">IIBBBBB", 200_000, 200_000, 8, 2, 0, 0, 0)
    (tmp_path / "stills" / "huge.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header
        + struct.pack(">I", zlib.crc32(header)) + bytes(99))
    (tmp_path / "list.txt").write_text(
        f"{tmp_path / 'stills'}\n{source}\n{tmp_path / 'gone.mp4'}\n")
    out = tmp_path / "hands"
    printed = run("extract_hands.py", tmp_path / "list.txt", "--out", out, "--fps", 5).stdout
    failed = dict(line.split("\t") for line in (out / "failed.txt").read_text().splitlines())
    prefix = os.path.relpath(tmp_path, os.path.commonpath([tmp_path, source.parent]))
    assert failed.keys() == {f"{prefix}/gone.mp4", f"{prefix}/stills"}
    assert "No such file" in failed[f"{prefix}/gone.mp4"]
    assert failed[f"{prefix}/stills"].startswith("2 of 21 pictures are missing or cannot be read, "
                                                 "the first: '003.png'")
    hands = load_hands(out)
    stills, video = ([v.startswith(prefix) for v in hands.videos].index(still)
                     for still in (True, False))
    a, b = ((hands.rows["video"] == stills),
            (hands.rows["video"] == video) & (hands.rows["frame"] != 3))
    assert "frames 39" in printed and a.sum() == b.sum() > 10
    for key in ("frame", "time", "box", "left"):
        assert np.allclose(hands.rows[key][a], hands.rows[key][b])
    assert np.allclose(hands.keypoints[a], hands.keypoints[b])


def retime(path, ticks):
    """Give every frame of an mp4 its own duration (ticks of 1/10240 s), as phones do: variable
    frame rate."""
    data = bytearray(path.read_bytes())
    at = data.index(b"stts") - 4
    size, = struct.unpack(">I", data[at:at + 4])
    table = struct.pack(">I4sII", 16 + 8 * len(ticks), b"stts", 0, len(ticks))
    data[at:at + size] = table + b"".join(struct.pack(">II", 1, tick) for tick in ticks)
    for box in (b"moov", b"trak", b"mdia", b"minf", b"stbl"):
        at = data.index(box) - 4
        data[at:at + 4] = struct.pack(">I", struct.unpack(">I", data[at:at + 4])[0]
                                      + 16 + 8 * len(ticks) - size)
    at = data.index(b"edts")
    data[at:at + 4] = b"free"  # the edit list, which would cut off what comes after the old end
    path.write_bytes(data)


def test_frames_of_a_video_with_variable_frame_rate(tmp_path):
    write_video(tmp_path / "a.mp4", [np.full((48, 64, 3), 20 * k, np.uint8) for k in range(9)],
                fps=10)
    retime(tmp_path / "a.mp4", [1024, 7168, 1024, 30720, 1024, 1024, 10240, 1024, 1024])
    times = np.cumsum([0, 0.1, 0.7, 0.1, 3, 0.1, 0.1, 1, 0.1])
    for fps in (1, 3, 1000):
        first = sorted({int(np.argmax(times >= k / fps - 1e-4))
                        for k in range(int(times[-1] * fps + 1e-4) + 1)})
        sampled = list(extract_hands.sample_frames(str(tmp_path / "a.mp4"), fps))
        assert np.allclose([frame.time for frame in sampled], times[first], atol=1e-3)
        assert all(abs(frame.image.mean() - 20 * k) < 5 for k, frame in zip(first, sampled))
        # Numbers are times by the mean rate, 9 frames in 5.3 s, but never the same twice.
        numbers = np.array([frame.index for frame in sampled])
        assert (np.diff(numbers) > 0).all()
        assert np.abs(numbers - times[first] * 9 / 5.3).max() <= 3


@pytest.mark.parametrize("matrix, show", [
    ((0, 1, -1, 0, 48, 0), lambda held: np.rot90(held, 3)),
    ((-1, 0, 0, -1, 64, 48), lambda held: np.rot90(held, 2)),
    ((0, -1, 1, 0, 0, 64), np.rot90),
    ((-1, 0, 0, 1, 64, 0), lambda held: held[:, ::-1]),
    ((1, 0, 0, -1, 0, 48), lambda held: held[::-1]),
    ((0, 1, 1, 0, 0, 0), lambda held: held.transpose(1, 0, 2))])
def test_phone_videos_come_out_upright(tmp_path, matrix, show):
    """The camera was held turned, or the selfie is to be mirrored; the file's display matrix
    (x' = a x + c y + tx, y' = b x + d y + ty) says so."""
    held = np.zeros((48, 64, 3), np.uint8)
    held[:24, :32] = 255
    write_video(tmp_path / "a.mp4", [held] * 3)
    a, b, c, d, x, y = (value << 16 for value in matrix)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    at = data.index(b"tkhd") + 44
    data[at:at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, x, y, 1 << 30)
    (tmp_path / "a.mp4").write_bytes(data)
    frames = list(extract_hands.sample_frames(str(tmp_path / "a.mp4"), 10))
    assert len(frames) == 3
    wanted = show(held)
    for frame in frames:
        assert frame.image.shape == wanted.shape
        assert np.abs(frame.image.astype(int) - wanted).mean() < 8


@pytest.mark.parametrize("suffix, codec", [("mkv", "MJPG"), ("webm", "VP80"), ("avi", "MJPG"),
                                           ("mov", "mp4v")])
def test_every_container_is_read(tmp_path, suffix, codec):
    writer = cv2.VideoWriter(str(tmp_path / f"a.{suffix}"), cv2.VideoWriter_fourcc(*codec), 10,
                             (64, 48))
    for k in range(12):
        writer.write(np.full((48, 64, 3), 20 * k, np.uint8))
    writer.release()
    sampled = list(extract_hands.sample_frames(str(tmp_path / f"a.{suffix}"), 2))
    assert [frame.index for frame in sampled] == [0, 5, 10]
    assert found(tmp_path) == [f"a.{suffix}"]
    assert all(abs(frame.image.mean() - 20 * frame.index) < 8 for frame in sampled)


def ranks(log, *arguments, number="RANK", count="WORLD_SIZE"):
    """Start the command once for each of two ranks, as torchrun (RANK) or srun (SLURM_PROCID)
    would. What they print goes to a log. -> the processes."""
    return [fork(["extract_hands.py", *arguments], log, log, **{number: str(rank), count: "2"})
            for rank in range(2)]


def succeed(processes, log):
    for process in processes:
        process.join(100)
        assert process.exitcode == 0, log.read_text()


def printed(setting, result):
    """What the ranks say about a setting at their start, one value of each."""
    return re.findall(rf"^  {setting} +(.*)$", result.stdout, re.M)


def test_two_ranks_give_the_bytes_of_one_process(rendered, extracted, tmp_path):
    result = torchrun("extract_hands.py", rendered / "videos", "--out", tmp_path / "hands",
                      "--fps", 5)
    assert sorted(printed("rank", result)) == ["0 of 2", "1 of 2"]
    assert printed("to_do", result) == ["4", "4"]
    assert "wrote " in result.stdout
    assert listing(tmp_path / "hands") == listing(extracted)


def test_one_rank_waits_for_the_other_and_a_killed_one_is_made_good(rendered, extracted, tmp_path):
    arguments = (rendered / "videos", "--out", tmp_path / "hands", "--fps", 5, "--workers", 1)
    slurm = dict(number="SLURM_PROCID", count="SLURM_STEP_NUM_TASKS")
    first, second = ranks(tmp_path / "log", *arguments, **slurm)
    while not list((tmp_path / "hands").glob("parts/*.npz")) and first.is_alive():
        time.sleep(0.005)
    # One process instead of two, meanwhile.
    with pytest.raises(InputError, match="another run is writing"):
        open_folder(tmp_path / "hands")
    second.kill()
    succeed([first], tmp_path / "log")
    assert "are not done yet" in (tmp_path / "log").read_text()
    assert not (tmp_path / "hands" / "crops.npy").exists()
    second.join()
    succeed(ranks(tmp_path / "log", *arguments, **slurm), tmp_path / "log")
    assert listing(tmp_path / "hands") == listing(extracted)


def test_two_ranks_may_try_to_merge_at_once(rendered, extracted, tmp_path):
    arguments = (rendered / "videos", "--out", tmp_path / "hands", "--fps", 5)
    assert kill_when(lambda: len(list((tmp_path / "hands" / "parts").glob("*.npz"))) == 8,
                     *arguments)
    # Nothing is left but to merge, if even that.
    succeed(ranks(tmp_path / "log", *arguments), tmp_path / "log")
    assert listing(tmp_path / "hands") == listing(extracted)


def test_a_training_run_is_no_place_for_hands(rendered, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    assert f"{tmp_path}: holds a training run, choose another --out" in refused(
        "extract_hands.py", rendered / "videos", "--out", tmp_path)


def test_a_worker_that_cannot_start_ends_the_run(rendered, tmp_path):
    """As where a library is missing that MediaPipe loads: no video is to blame."""
    (tmp_path / "stub" / "mediapipe").mkdir(parents=True)
    (tmp_path / "stub" / "mediapipe" / "__init__.py").write_text("raise ImportError('libGL.so.1')")
    command = [sys.executable, ROOT / "extract_hands.py", rendered / "videos",
               "--out", tmp_path / "hands"]
    result = subprocess.run(command, env={**ENVIRONMENT, "PYTHONPATH": str(tmp_path / "stub")},
                            capture_output=True, text=True, timeout=100)
    assert result.returncode == 2
    assert "MediaPipe could not be started: libGL.so.1" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "hands" / "failed.txt").exists()


def test_a_damaged_hands_folder_is_not_merged_into(rendered, hands, tmp_path):
    shutil.copytree(rendered / "videos", tmp_path / "videos")
    log = (hands / "log.jsonl").read_text().replace(str(rendered / "videos"),
                                                    str(tmp_path / "videos"))
    (hands / "log.jsonl").write_text(log)
    (tmp_path / "videos" / "new.mp4").write_bytes(
        next((tmp_path / "videos").glob("*.mp4")).read_bytes())
    (hands / "hands.npy").unlink()
    before = listing(hands)
    line = run("extract_hands.py", tmp_path / "videos", "--out", hands, "--fps", 5,
               status=2).stderr.splitlines()[-1]
    assert ("hands.npy: missing" in line
            and {k: v for k, v in listing(hands).items() if k in before} == before)


def published_crop(image, box, size=224):
    """The square of 1.3 boxes, cut off at the picture's border and squeezed to a square,
    step by step as DATASETS.md describes the published loader. -> crop, and its corners in
    the picture."""
    x1, y1, x2, y2 = (int(value) for value in box)
    wide, high = int(1.3 * (x2 - x1)), int(1.3 * (y2 - y1))
    dx, dy = int((wide - (x2 - x1)) / 2), int((high - (y2 - y1)) / 2)
    x1, y1, x2, y2 = x1 - dx, y1 - dy, x2 + dx, y2 + dy
    half = max(x2 - x1, y2 - y1) // 2
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    corners = [int(x - half), int(y - half), int(x + half), int(y + half)]
    corners[0::2] = np.clip(corners[0::2], 0, image.shape[1])
    corners[1::2] = np.clip(corners[1::2], 0, image.shape[0])
    return cv2.resize(image[corners[1]:corners[3], corners[0]:corners[2]], (size, size)), corners


@pytest.fixture
def annotated(tmp_path):
    """Hand100M in small: two folders of pictures, in each of which dots mark the joints of
    two hands. One picture is missing, one hand touches the border. -> folder, annotations,
    {hand_id: (source points, is left)}"""
    rng = np.random.default_rng(0)
    images, annotations, truth = [], [], {}
    for number, name in enumerate(["v2/b.png", "v1/00.png", "v1/01.png", "v2/a.png"]):
        image = np.full((240, 320, 3), 60, np.uint8)
        # An absolute one is allowed.
        file_name = str(tmp_path / "frames" / name) if name == "v2/a.png" else name
        images.append({"id": 70 + number, "file_name": file_name, "width": 320, "height": 240})
        for k, corner in enumerate([(-12, 40), (180, 100)]):
            points = corner + np.round(rng.uniform(15, 95, (21, 2)))
            box = [*(points.min(0) - 0.4), *(points.max(0) + 0.7)]
            for x, y in points.astype(int):
                image[y, x] = 255
            hand_id = str(100 * (number + 1) + k)
            truth[hand_id] = points, k == 1
            _, (x0, y0, x1, y1) = published_crop(image, box)
            normalised = (points + 0.5 - (x0, y0)) / (x1 - x0, y1 - y0)
            annotations.append({"hand_id": hand_id, "image_id": 70 + number,
                                "boxes": json.dumps(box), "left_right": ["Right", "Left"][k],
                                "positive_sample": [], "distance": [],
                                "keypoint_25d": np.c_[normalised, np.zeros(21)].ravel().tolist()})
        if name != "v1/01.png":
            (tmp_path / "frames" / name).parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(tmp_path / "frames" / name), image)
    # 300, 301 are in the missing picture, 999 nowhere.
    wanted = {"100": [401, 200], "101": [300, 201], "200": [100], "201": [999, 400],
              "300": [100], "301": [100], "400": [300, 301], "401": [100, 200]}
    # Integers, where hand_id is a string: so the published file has it.
    for annotation in annotations:
        annotation["positive_sample"] = wanted[annotation["hand_id"]]
        annotation["distance"] = [0.25, 0.5][:len(annotation["positive_sample"])]
    (tmp_path / "hands.json").write_text(
        json.dumps({"info": {}, "images": images, "annotations": annotations}))
    return tmp_path, annotations, truth


@pytest.mark.parametrize("margin", [1.3, 2.6])
def test_the_authors_annotations_become_a_hands_folder(annotated, margin):
    folder, annotations, truth = annotated
    out = folder / "hands"
    arguments = ("--annotations", folder / "hands.json", "--frames", folder / "frames",
                 "--out", out, "--margin", margin)
    printed = run("extract_hands.py", *arguments).stdout
    hands = load_hands(out)
    # Their pairs are there already.
    assert printed.splitlines()[-1].endswith(
        f"pretrain.py {out} --batch-size 2 --out runs/hands")
    assert hands.videos == ["v1", "v2"] and hands.rows["video"].tolist() == [0, 0, 1, 1, 1, 1]
    assert hands.rows["frame"].tolist() == [0, 0, 0, 0, 1, 1]
    order = ["200", "201", "400", "401", "100", "101"]
    for row, keypoints, i in zip(hands.rows, hands.keypoints, order):
        points, left = truth[i]
        annotation = next(a for a in annotations if a["hand_id"] == i)
        assert (row["left"] == left
                and row["box"][3] - row["box"][1] == row["box"][2] - row["box"][0])
        picture = np.full((240, 320, 3), 60, np.uint8)
        theirs, corners = published_crop(picture, json.loads(annotation["boxes"]))
        # Wholly inside: the very square of the authors, or one twice as wide about its middle.
        if i[2] == "1":
            (x0, y0, x1, y1), more = corners, (margin / 1.3 - 1) / 2
            grown = [x0 - more * (x1 - x0), y0 - more * (y1 - y0),
                     x1 + more * (x1 - x0), y1 + more * (y1 - y0)]
            assert np.abs(row["box"] - grown).max() <= (margin != 1.3)
        keypoints = keypoints * (-1, 1) + (223, 0) if left else keypoints
        side = row["box"][2] - row["box"][0]
        assert np.abs((keypoints + 0.5) * side / 224 - 0.5 + row["box"][:2] - points).max() < 1e-3
    for i in range(6):  # and the dots are where the keypoints say
        crop = read_crop(hands, i).astype(int)[..., 0]
        inside = [p for p in np.round(hands.keypoints[i]).astype(int)
                  if (p > 4).all() and (p < 219).all() and crop[p[1], p[0]] > 0
                  and crop[p[1] - 4:p[1] + 5, p[0] - 4:p[0] + 5].min() > 20]
        assert len(inside) > 10 and all(crop[y, x] > 90 for x, y in inside)
    neighbours, distances = np.load(out / "neighbours.npy"), np.load(out / "distances.npy")
    number = {i: k for k, i in enumerate(order)}
    assert neighbours.tolist() == [
        [number["100"], -1], [number["400"], -1], [-1, -1], [number["100"], number["200"]],
        [number["401"], number["200"]], [number["201"], -1]]
    assert (distances[:, 0].tolist() == [0.25, 0.5, np.inf, 0.25, 0.25, 0.5]
            and distances[3, 1] == 0.5)
    assert "2 of 8 annotated hands dropped" in printed
    assert "1 of 2 pictures are missing" in (out / "failed.txt").read_text()
    before = listing(out)
    run("extract_hands.py", *arguments)
    assert listing(out) == before
    run("pretrain.py", out, "--out", folder / "run", "--batch-size", 4, "--epochs", 1,
        "--warmup-epochs", 0, *TINY)


@pytest.mark.parametrize("change, message", [
    (lambda a: a.pop("hand_id"), "KeyError('hand_id')"),
    (lambda a: a.update(keypoint_25d=[0.5] * 62), "cannot reshape"),
    (lambda a: a.update(keypoint_25d=[float("nan")] * 63), "hand 100: its keypoints"),
    (lambda a: a.update(keypoint_25d=[12.0] * 63), "hand 100: its keypoints"),
    (lambda a: a.update(boxes="[5, 5, 5, 9]"), "hand 100: its keypoints"),
    (lambda a: a.update(boxes="[1, 2, 30]"), "cannot reshape"),
    (lambda a: a.update(boxes="[NaN, 2, 30, 40]"), "hand 100: its keypoints"),
    (lambda a: a.update(image_id="70"), "KeyError('70')"),
    (lambda a: a.update(left_right="left"), "KeyError('left')")])
def test_an_odd_annotation_is_left_out_and_a_file_of_them_refused(annotated, change, message,
                                                                  capsys):
    folder = annotated[0]
    content = json.loads((folder / "hands.json").read_text())
    change(content["annotations"][0])
    (folder / "hands.json").write_text(json.dumps(content))
    read = extract_hands.load_annotations(str(folder / "hands.json"), str(folder / "frames"))
    printed = capsys.readouterr().out
    assert len(read.rows) == 7 and "1 of its annotations cannot be used" in printed
    assert message in printed
    for annotation in content["annotations"]:
        annotation.pop("boxes", None)
    (folder / "hands.json").write_text(json.dumps(content))
    arguments = ("--annotations", folder / "hands.json", "--out", folder / "hands")
    for text in (json.dumps(content), "{"):
        (folder / "hands.json").write_text(text)
        assert "expected SiMHand's" in refused("extract_hands.py", *arguments,
                                               "--frames", folder / "frames")
    assert "no such folder" in refused("extract_hands.py", *arguments,
                                       "--frames", folder / "nowhere")
    assert "with --frames" in refused("extract_hands.py", *arguments)
    assert "--fps has no effect" in refused("extract_hands.py", *arguments, "--frames", folder,
                                            "--fps", 2)
    assert not (folder / "hands").exists()


def test_published_hands_out_of_a_video_and_of_another_size(tmp_path):
    """VIDEO.mp4 in place of VIDEO/: the named frames, counted as they come. The file was annotated
    at twice the size."""
    frames = tmp_path / "frames"
    frames.mkdir()
    write_clip(frames / "v.mp4", greys(40, 120, 160), options={"x264-params": "bframes=3"})
    images = []
    annotations = []
    keypoints = np.c_[np.random.default_rng(0).uniform(0.1, 0.9, (21, 2)), np.zeros(21)]
    for k, number in enumerate((33, 3, 99)):
        images.append({"id": k, "file_name": f"v/frame_{number:06d}.jpg", "width": 320,
                       "height": 240})
        annotations.append({"hand_id": str(k), "image_id": k, "boxes": "[100, 80, 200, 180]",
                            "left_right": "Right", "keypoint_25d": keypoints.ravel().tolist(),
                            "positive_sample": [1 - k], "distance": [0.5]})
    (tmp_path / "hands.json").write_text(json.dumps({"images": images,
                                                     "annotations": annotations}))
    printed = run("extract_hands.py", "--annotations", tmp_path / "hands.json", "--frames", frames,
                  "--out", tmp_path / "hands", "--margin", 1.3).stdout
    hands = load_hands(tmp_path / "hands")
    assert hands.videos == ["v.mp4"] and hands.rows["frame"].tolist() == [0, 1]
    assert hands.rows["time"].tolist() == pytest.approx([0.3, 3.3], abs=1e-6)
    greys_of_crops = [round(float(read_crop(hands, k).mean()) / 5) for k in (0, 1)]
    assert greys_of_crops == [3, 33]
    # Half of the published square of 130 about (150, 130).
    assert np.abs(hands.rows["box"] - (42.5, 32.5, 107.5, 97.5)).max() <= 1
    assert np.abs(hands.keypoints / 224 - keypoints[:, :2]).max() < 0.02
    assert np.load(tmp_path / "hands" / "neighbours.npy").tolist() == [[1], [0]]
    assert "1 of 3 pictures are missing" in (tmp_path / "hands" / "failed.txt").read_text()
    following = shlex.split(printed.splitlines()[-1])
    assert Path(following[1]).is_file() and following[1].endswith("pretrain.py")


def test_ranks_are_those_of_a_step_and_share_cores(monkeypatch):
    """A batch script runs once, with SLURM_PROCID 0 and the job's SLURM_NTASKS; srun alone sets
    SLURM_STEP_*."""
    cores = list(range(8))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: cores)
    for name, value in (("SLURM_JOB_ID", 7), ("SLURM_PROCID", 0), ("SLURM_LOCALID", 0),
                        ("SLURM_NTASKS", 4)):
        monkeypatch.setenv(name, str(value))
    assert extract_hands.find_ranks() == (0, 1, cores)
    for name, value in (("SLURM_PROCID", 3), ("SLURM_LOCALID", 1), ("SLURM_STEP_NUM_TASKS", 4),
                        ("SLURM_STEP_NUM_NODES", 2), ("SLURM_CPUS_ON_NODE", 8)):
        monkeypatch.setenv(name, str(value))
    assert extract_hands.find_ranks() == (3, 4, [1, 3, 5, 7])
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "16")  # each task has cores of its own
    assert extract_hands.find_ranks() == (3, 4, cores)
    for name, value in (("RANK", 2), ("WORLD_SIZE", 3), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    assert extract_hands.find_ranks() == (2, 3, [0, 2, 4, 6])


def test_paper_sets_defaults_that_flags_override(monkeypatch):
    def parse(*flags):
        monkeypatch.setattr(sys, "argv", ["extract_hands.py", "a", "--out", "b", *flags])
        args = extract_hands.parse_args()
        return args.margin, args.border

    assert parse() == (2.6, "mirror")
    assert parse("--paper") == (1.3, "black")
    assert parse("--margin", "2", "--paper") == (2.0, "black")
    assert parse("--paper", "--border", "mirror") == (1.3, "mirror")


def test_a_list_as_windows_writes_it_and_one_with_nul_bytes(tmp_path):
    (tmp_path / "é.mp4").write_text("")
    (tmp_path / "list.txt").write_text(f"{tmp_path / 'é.mp4'}\r\n", "utf-16")
    assert found(tmp_path / "list.txt") == ["é.mp4"]
    (tmp_path / "nul.txt").write_text(f"{tmp_path / 'é.mp4'}\0")
    assert "nul.txt: holds NUL bytes" in refused("extract_hands.py", tmp_path / "nul.txt",
                                                 "--out", tmp_path / "o")


def test_no_worker_outlives_its_parent(rendered, tmp_path):
    out = tmp_path / "hands"
    command = [sys.executable, ROOT / "extract_hands.py", rendered / "videos", "--out", out,
               "--fps", "5", "--workers", "2"]
    process = subprocess.Popen(list(map(str, command)), env=ENVIRONMENT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_a_part(out, process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    children = [int(child) for child in children.stdout.split()]
    assert len(children) >= 2
    process.kill()  # the parent alone
    process.wait()
    end = time.time() + 20
    while any(Path(f"/proc/{child}").exists() for child in children) and time.time() < end:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{child}").exists() for child in children)
