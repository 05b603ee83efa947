"""Cut the hands out of videos: the pool that SiMHand pre-trains on.

Reads videos, samples them by time, finds hands and their 21 keypoints with MediaPipe Hands, and writes a hands folder:
crops.npy, offsets.npy, keypoints.npy, hands.npy, videos.txt (see README), with hands.jpg to look at, failed.txt and
log.jsonl. Left hands are mirrored, so that every crop shows a right hand. Stop it at any moment and run the same
command again: it goes on. Videos added to the input later are appended.

    python extract_hands.py ~/ego4d/v1/full_scale --out data/ego4d
    python extract_hands.py demo/videos --out demo/hands --fps 5 --workers 2
"""

import argparse
import hashlib
import importlib.util
import multiprocessing
import os
import queue
import shutil
import signal
import threading
import time
from collections import deque
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from common import (HANDS_DTYPE, InputError, atomic, check_flags, draw_crop, load_hands, open_folder, print_settings,
                    read_log, refuse_other_arguments, require, run_script, save_array, save_image, sheet, start_log,
                    write_log)

SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")
RENEW = 20  # videos until a worker is replaced: MediaPipe's memory grows with what it has seen
FINAL = ("crops.npy", "offsets.npy", "keypoints.npy", "hands.npy", "videos.txt", "failed.txt")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="+", help="folders, searched for " + ", ".join(SUFFIXES) + ", or single files")
    parser.add_argument("--out", required=True, help="hands folder to write")
    # what is sampled and kept
    parser.add_argument("--fps", type=float, default=1.0,
                        help="frames a second that are looked at, by the stream's own time (paper: 1)")
    parser.add_argument("--max-hands", type=int, default=2, help="hands a frame at most (paper: 2)")
    parser.add_argument("--min-score", type=float, default=0.5,
                        help="MediaPipe's detection confidence, 0 to 1, below which nothing is a hand (default: 0.5)")
    parser.add_argument("--min-size", type=float, default=32, help="longer side of the keypoints' box, source pixels, "
                        "below which a hand is dropped: less is a smear at 224 px")
    parser.add_argument("--mirrored", action="store_true",
                        help="the videos are selfies, shown as in a mirror: left and right are told the other way")
    # the crops
    parser.add_argument("--size", type=int, default=224, help="side of the crops in pixels (paper: 224)")
    parser.add_argument("--margin", type=float, default=1.3,
                        help="side of the square over the longer side of the keypoints' box (paper: 1.3)")
    parser.add_argument("--quality", type=int, default=95, help="JPEG quality of the crops, 1 to 100")
    # the machine
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)),
                        help="processes, a video at a time each (default: one a core)")
    args = parser.parse_args()
    check_flags(args)
    require(args.fps > 0 and min(args.workers, args.max_hands) >= 1 and args.size >= 8 and 1 <= args.quality <= 100,
            "--fps must be above 0, --workers and --max-hands at least 1, --size at least 8, --quality 1 to 100")
    require(args.min_score <= 1 and 1 <= args.margin <= 10 and args.size <= 4096,
            "--min-score must lie in 0..1, --margin in 1..10, --size must be at most 4096")
    return args


def main():
    args = parse_args()
    require(importlib.util.find_spec("mediapipe"), "mediapipe is not installed (pip install -r requirements.txt)")
    root, names = list_videos(args.videos)
    out = Path(args.out)
    lock = open_folder(out)  # held until the process ends
    args.root = str(root)  # names are relative to it: the same name under another root is another video
    move_merged(out)
    if (out / "log.jsonl").exists() and ((out / "videos.txt").exists() or any(out.glob("parts/*.npz"))):
        refuse_other_arguments(out, read_log(out / "log.jsonl")[0]["args"], args, free=("workers", "videos", "out"))
    else:
        start_log(out, args)
    merged = (out / "videos.txt").read_text().splitlines() if (out / "videos.txt").exists() else []
    new = sorted(set(names) - set(merged))
    parts = out / "parts"
    parts.mkdir(exist_ok=True)
    todo = [name for name in new if not part_path(parts, name).exists()]
    print_settings(args, videos=len(names), already_merged=len(merged), to_do=len(todo))

    start, frames, hands, died = time.time(), 0, 0, {}
    starting = threading.Lock()
    results = start_workers(deque(todo), starting, root, parts, args)
    with tqdm(total=len(names), initial=len(names) - len(todo), unit="video", disable=not todo) as bar:
        for _ in todo:
            result = results.get()
            if "fatal" in result:
                starting.acquire()  # and kept: no worker starts while this process ends
                raise InputError(result["fatal"])
            if "died" in result:
                died[result["died"]] = result["reason"]
            frames, hands = frames + result["frames"], hands + result["hands"]
            bar.set_postfix_str(f"{hands} hands, {frames / (time.time() - start):.1f} frames/s")
            bar.update()

    merge(out, merged, [name for name in new if name not in died], died)
    summarise(out, frames, time.time() - start)


def list_videos(inputs):
    """-> the folder that names are relative to, and the sorted names of all videos."""
    found = []
    for path in map(Path, inputs):
        if path.is_dir():
            found += [p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file() and p.name[0] != "."]
        elif path.is_file():
            found.append(path)
        else:
            raise InputError(f"{path}: no such file or folder, expected videos")
    require(found, f"{', '.join(inputs)}: holds no video, expected {', '.join(SUFFIXES)}")
    roots = [path if path.is_dir() else path.parent for path in map(Path, inputs)]
    root = Path(os.path.commonpath([os.path.abspath(path) for path in roots]))
    found = {os.path.realpath(path): path for path in sorted(found, reverse=True)}.values()  # a link is no other video
    names = sorted({Path(os.path.abspath(path)).relative_to(root).as_posix() for path in found})
    for name in names:
        require(len(name.splitlines()) == 1 and name == name.encode(errors="replace").decode(),
                f"{root / name!a}: this name cannot be a line of videos.txt, rename the video")
    return root, names


def part_path(parts, name):
    return parts / (hashlib.sha1(name.encode()).hexdigest()[:20] + ".npz")


# ---------------------------------------------------------------------------------------------- workers

def start_workers(todo, starting, root, parts, args):
    """Run the videos of the deque `todo` through `args.workers` processes, each started while the lock `starting` is
    held. -> queue of one result for each video."""
    results = queue.Queue()
    context = multiprocessing.get_context("spawn")
    cores = sorted(os.sched_getaffinity(0))

    def feed(core):  # one thread for each worker; a video whose worker dies is tried once more, in a fresh one
        again = set()
        while todo:
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs, core, root, parts, args), daemon=True)
            try:
                with starting:
                    process.start()
            except OSError as error:
                results.put({"fatal": f"a worker process could not be started: {error}"})
                return
            theirs.close()
            for _ in range(RENEW):
                try:
                    name = todo.popleft()
                except IndexError:
                    break
                try:
                    ours.send(name)
                    results.put(ours.recv())
                except (EOFError, OSError):
                    process.join()
                    if name in again:
                        reason = f"the worker ended with status {process.exitcode} twice, see worker.log"
                        results.put({"died": name, "reason": reason, "frames": 0, "hands": 0})
                    else:
                        again.add(name)
                        todo.appendleft(name)
                    break
            ours.close()
            process.join()

    for k in range(min(args.workers, len(todo))):
        threading.Thread(target=feed, args=(cores[k % len(cores)],), daemon=True).start()
    return results


def work(connection, core, root, parts, args):
    """A worker process: extract the videos whose names arrive, answer each with its counts."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)  # the parent decides, and takes its workers with it
    os.sched_setaffinity(0, {core})  # before MediaPipe starts its threads: it has no option for their number
    threading.Thread(target=leave_with, args=(os.getppid(),), daemon=True).start()
    with open(parts.parent / "worker.log", "ab") as log:
        os.dup2(log.fileno(), 2)  # decoder and model speak to stderr, through the progress bar
    import mediapipe

    with mediapipe.solutions.hands.Hands(static_image_mode=True, max_num_hands=args.max_hands,
                                         min_detection_confidence=args.min_score) as detector:
        while True:
            try:
                name = connection.recv()
            except EOFError:
                return
            try:
                connection.send(extract_video(root, name, parts, detector, args))
            except InputError as error:
                connection.send({"fatal": str(error)})


def leave_with(parent):
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def extract_video(root, name, parts, detector, args):
    """All hands of one video -> its part file, and the counts."""
    crops, keypoints, hands, frames, reason = [], [], [], 0, ""
    try:
        for frame, seconds, image in sample_frames(root / name, args.fps):
            frames += 1
            for points, left, score in find_hands(detector, image, args):
                crop, points, box = cut_out(image, points, left, args)
                quality = [cv2.IMWRITE_JPEG_QUALITY, args.quality]
                crops.append(cv2.imencode(".jpg", crop[:, :, ::-1], quality)[1].ravel())
                keypoints.append(points)
                hands.append((0, frame, seconds, box, left, score))
    except BrokenVideo as error:
        reason = str(error)
    return save_part(parts, name, crops, keypoints, hands, frames, reason)


class BrokenVideo(Exception):
    """A source that cannot be opened, or that ends before its own length says."""


def sample_frames(path, fps):
    """Yield (index, time in s, RGB picture) of the first frame at or after k / fps, for each k. Decodes in sequence:
    a seek can land on another frame than it says. Raises BrokenVideo after the last good frame."""
    video = cv2.VideoCapture(str(path))
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


def find_hands(detector, image, args):
    """-> list of (keypoints (21, 2) in source pixels, is a left hand, score), each hand once."""
    found = detector.process(image)
    height, width = image.shape[:2]
    hands = []
    for marks, side in zip(found.multi_hand_landmarks or [], found.multi_handedness or []):
        points = np.array([(mark.x, mark.y) for mark in marks.landmark]) * (width, height) - 0.5
        label, score = side.classification[0].label, side.classification[0].score
        left = (label == "Left") == args.mirrored  # the label is meant for a mirrored picture
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


def cut_out(image, points, left, args):
    """-> square crop (size, size, 3), keypoints (21, 2) in its pixels, box x0 y0 x1 y1 in source pixels.

    The square lies on whole pixels; outside the picture it is black, never squeezed.
    """
    low, high = points.min(0), points.max(0)
    side = max(int(round(args.margin * (high - low).max())), 1)
    x0, y0 = np.round((low + high + 1) / 2 - side / 2).astype(int).tolist()  # edges: pixel i covers i .. i + 1 here
    inside = image[max(y0, 0):max(y0 + side, 0), max(x0, 0):max(x0 + side, 0)]
    square = np.zeros((side, side, 3), np.uint8)
    top, leftmost = max(-y0, 0), max(-x0, 0)
    square[top:top + inside.shape[0], leftmost:leftmost + inside.shape[1]] = inside
    shrink = cv2.INTER_AREA if side > args.size else cv2.INTER_LINEAR
    crop = cv2.resize(square, (args.size, args.size), interpolation=shrink)
    points = (points + 0.5 - (x0, y0)) * (args.size / side) - 0.5
    if left:
        crop = crop[:, ::-1]
        points = points * (-1, 1) + (args.size - 1, 0)
    return crop, points.astype(np.float32), (x0, y0, x0 + side, y0 + side)


def save_part(parts, name, crops, keypoints, hands, frames, reason):
    """One video's result, atomically. -> its counts."""
    with atomic(part_path(parts, name)) as file:
        np.savez(file, crops=np.concatenate([np.empty(0, np.uint8), *crops]),
                 lengths=np.array([len(crop) for crop in crops], np.int64),
                 keypoints=np.array(keypoints, np.float32).reshape(-1, 21, 2), hands=np.array(hands, HANDS_DTYPE),
                 frames=frames, reason=np.array(reason))
    return {"frames": frames, "hands": len(hands)}


# ---------------------------------------------------------------------------------------------- merging

def merge(out, merged, new, died):
    """Append the parts of the new videos to what is merged already, as a set: all files are written in a folder of
    their own, whose renaming says that it is complete; a merge cut short is done again or finished by move_merged."""
    if not new and not died:
        return
    parts, temporary = out / "parts", out / ".merging.tmp"
    temporary.mkdir()  # open_folder has cleared what a killed merge left
    old = load_hands(out) if merged else None
    failed = (out / "failed.txt").read_text().splitlines() if merged and (out / "failed.txt").exists() else []
    failed = [line for line in failed if line.split("\t")[0] in set(merged)]  # the others are tried again each time
    lengths, keypoints, hands = ([np.diff(old.offsets)], [old.keypoints], [old.hands]) if old else ([], [], [])
    for number, name in enumerate(new, len(merged)):
        with np.load(part_path(parts, name), allow_pickle=False) as part:
            rows = part["hands"]
            rows["video"] = number
            lengths.append(part["lengths"])
            keypoints.append(part["keypoints"])
            hands.append(rows)
            if str(part["reason"]):
                failed.append(f"{name}\t{part['reason']}")
    failed += [f"{name}\t{reason}" for name, reason in died.items()]
    offsets = np.cumsum(np.concatenate([[0], *lengths])).astype(np.int64)
    (temporary / "failed.txt").write_text("".join(line + "\n" for line in failed))
    if offsets[-1] == 0:
        shutil.copy(temporary / "failed.txt", out / "failed.txt")
        shutil.rmtree(parts)  # so that another try reads the videos again
        shutil.rmtree(temporary)
        broken = f"; {len(failed)} could not be read: {failed[0].replace(chr(9), ': ')}" if failed else ""
        tried = [*new, *died]
        raise InputError(f"{tried[0]}{' ...' if len(tried) > 1 else ''}: no hand found in {len(tried)} videos{broken}")
    save_array(temporary / "offsets.npy", offsets)
    save_array(temporary / "keypoints.npy", np.concatenate(keypoints))
    save_array(temporary / "hands.npy", np.concatenate(hands))
    with atomic(temporary / "crops.npy") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (int(offsets[-1]),)}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(old.crops) if old else 0, 1 << 24):
            file.write(old.crops[start:start + (1 << 24)])
        for name in new:
            with np.load(part_path(parts, name), allow_pickle=False) as part:
                file.write(part["crops"])
    (temporary / "videos.txt").write_text("".join(name + "\n" for name in [*merged, *new]))
    temporary.rename(out / "merged")
    move_merged(out)


def move_merged(out):
    """Put a complete merge in its place, however far an earlier try got."""
    merged = out / "merged"
    if not merged.is_dir():
        return
    for name in FINAL:
        if (merged / name).exists():
            os.replace(merged / name, out / name)
    shutil.rmtree(out / "parts", ignore_errors=True)
    merged.rmdir()


def summarise(out, frames, seconds):
    hands = load_hands(out)
    failed = (out / "failed.txt").read_text().splitlines()
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.choice(len(hands.keypoints), min(60, len(hands.keypoints)), replace=False))
    tiles = [draw_crop(hands, i, 160, "was left" if hands.hands["left"][i] else "right") for i in chosen]
    save_image(out / "hands.jpg", sheet(tiles, 12))
    left = int(hands.hands["left"].sum())
    total = len(hands.keypoints)
    summary = {"videos": len(hands.videos), "frames_now": frames, "hands": total, "left": left, "right": total - left,
               "failed": len(failed), "seconds": round(seconds, 1)}
    if frames:
        summary["frames_a_second"] = round(frames / seconds, 1)
        write_log(out, summary)
    print("  ".join(f"{key} {value}" for key, value in summary.items()))
    if failed:
        print(f"{len(failed)} videos could not be read to their end, see {out / 'failed.txt'}; the first: "
              f"{failed[0].replace(chr(9), ': ')}")
    print(f"wrote {out}, see {out / 'hands.jpg'}; next: python mine_pairs.py {out}")


if __name__ == "__main__":
    run_script(main)
