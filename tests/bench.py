"""Speed and memory, each figure beside a reference measured in the same run.

    python tests/bench.py extract    beside bare MediaPipe; merge and annotations of 2.0M hands
    python tests/bench.py mine       125,000 to 2.0M hands, beside scipy's k-d tree
    python tests/bench.py loader     views a second, beside torchvision's transforms and beside
                                     decoding alone
    python tests/bench.py loss       weights, loss and gradient of a batch, beside the obvious way
    python tests/bench.py step       pretrain.py beside a bare ResNet: the paper's on a GPU, a
                                     small one on a CPU
    python tests/bench.py finetune   finetune.py beside the bare network, and its loader alone
    python tests/bench.py evaluate   a million samples, beside a loop
    python tests/bench.py all

Prints one table, in Markdown, and writes it to tests/bench.md when a stage has ended: its rows
replace those that it left there before, the rows of the other stages stay. Every figure is
wall-clock time, start-up of the processes included, unless it says otherwise; run it on an idle
machine. Takes minutes and, in a temporary folder (TMPDIR says where), 8 GB of disk.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import io
import json
import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import cv2
import numpy as np

# Nothing that loads torch is imported up here: the processes of bare MediaPipe import this file.

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "real" / "handpose3d_stereo"
RESULTS = ROOT / "tests" / "bench.md"
HEADER = ["| stage | what | ours | reference | ratio | the reference is |",
          "|---|---|---|---|---|---|"]
CORES = len(os.sched_getaffinity(0))
# common.py changes how torch's threads wait, for the process that imports it and its children. Our
# scripts do that by themselves; the bare networks wait as torch lets them.
ENVIRONMENT = dict(os.environ)
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


@dataclasses.dataclass
class Row:
    """A row of the table, without its stage."""
    what: str
    ours: str
    reference: str = ""
    ratio: str = ""  # above 1: ours is better
    note: str = ""  # what the reference is


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "all"])
    stage = parser.parse_args().stage
    command = f"python tests/bench.py {stage}"
    machine = describe_machine()
    print(f"{machine}; one run\n", *HEADER, sep="\n", flush=True)
    for name in STAGES if stage == "all" else [stage]:
        rows = []
        with tempfile.TemporaryDirectory() as folder:
            for row in STAGES[name](Path(folder)):
                rows.append(as_line(name, row))
                print(rows[-1], flush=True)
        write_results(RESULTS, name, rows, command, machine, datetime.date.today())


def describe_machine():
    """Processor and versions, in words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    processor = models[0] if models else platform.machine()
    torch = importlib.metadata.version("torch")
    mediapipe = importlib.metadata.version("mediapipe")
    return (f"{CORES} cores of {processor}, Python {platform.python_version()}, torch {torch}, "
            f"OpenCV {cv2.__version__}, mediapipe {mediapipe}")


def as_line(stage, row):
    return f"| {stage} | " + " | ".join(dataclasses.astuple(row)) + " |"


def write_results(path, stage, rows, command, machine, date):
    """Put the rows of a stage, lines of the table, into the file in place of those there; what the
    file says of other stages stays."""
    from common import atomic

    old = path.read_text().splitlines() if path.exists() else []
    table = []
    runs = []
    for name in STAGES:
        if name == stage:
            table += rows
            runs.append(f"- {name}: {date}, {machine}")
        else:
            table += [line for line in old if line.startswith(f"| {name} |")]
            runs += [line for line in old if line.startswith(f"- {name}: ")]
    lines = ["# Speed and memory", "",
             f"Written by `{command}` on {date}, on {machine}; one run.",
             "Rows of other stages are of earlier runs: below the table stands when and where each "
             "stage ran.",
             "", *HEADER, *table, "", *runs]
    with atomic(path) as file:
        file.write("".join(f"{line}\n" for line in lines).encode())


@dataclasses.dataclass
class Usage:
    seconds: float
    memory: float  # GB, the peak of the main process

    def __str__(self):
        return f"{self.seconds:.0f} s, {self.memory:.2f} GB"


def script(*arguments):
    """Run a Python script -> Usage."""
    command = [sys.executable, *map(str, arguments)]
    memory = 0
    start = time.time()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors,
                                   env=ENVIRONMENT)
        while process.poll() is None:
            memory = max(memory, peak_memory(process.pid))
            time.sleep(0.02)
        seconds = time.time() - start
        if process.returncode:
            errors.seek(0)
            sys.exit(f"{arguments[0]} failed: {errors.read()[-500:]}")
    return Usage(seconds, memory / 2 ** 30)


def peak_memory(process="self"):
    """Of a process, bytes; 0 once it has ended."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def call_apart(function, *arguments, **more):
    """Call a function of this file in a process of its own -> the numbers that it prints."""
    code = (f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import bench; "
            f"bench.{function.__name__}(*{arguments!r}, **{more!r})")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            env=ENVIRONMENT)
    if result.returncode:
        sys.exit(result.stderr[-500:])
    return [float(number) for number in result.stdout.split()]


def parse_args(module, *arguments):
    """The arguments of one of our scripts, as it parses them."""
    sys.argv = [f"{module.__name__}.py", *map(str, arguments)]
    return module.parse_args()


# -------------------------------------------------------------------------------------- extraction

def extract(folder, videos=8, seconds=8, copies=4, real_copies=16):
    """Rendered videos of 640 x 480 at 30 frames a second that change 5 times a second, looked at
    5 times a second; real clips, where they are."""
    import synthetic

    synthetic.write_videos(folder / "rendered", videos=videos, seconds=seconds, fps=5,
                           size=(640, 480), seed=0)
    (folder / "videos").mkdir()
    for path in sorted((folder / "rendered").glob("*.mp4")):
        first = folder / "videos" / f"{path.stem}-0.mp4"
        repeat_frames(path, first, 6)
        for copy in range(1, copies):
            shutil.copy(first, folder / "videos" / f"{path.stem}-{copy}.mp4")
    yield from compare(folder, folder / "videos", 5, "rendered, 640 x 480, --fps 5", [1, 2])
    if REAL.is_dir():
        (folder / "real").mkdir()
        for path in REAL.glob("*.mp4"):
            for copy in range(real_copies):
                shutil.copy(path, folder / "real" / f"{path.stem}-{copy}.mp4")
        yield from compare(folder, folder / "real", 1, "real clips, 720 x 720, --fps 1", [2])
    yield from merge(folder)
    yield from annotations(folder)


def repeat_frames(path, target, times):
    """Write a video of 640 x 480 anew, at 30 frames a second, each frame so many times."""
    source = cv2.VideoCapture(str(path))
    writer = cv2.VideoWriter(str(target), cv2.VideoWriter_fourcc(*"mp4v"), 30, (640, 480))
    while True:
        good, image = source.read()
        if not good:
            break
        for _ in range(times):
            writer.write(image)
    writer.release()


@dataclasses.dataclass
class Pace:
    """What the rounds took in all, over a quarter of the videos and over all of them."""
    rounds: int
    seconds: dict = dataclasses.field(default_factory=lambda: {"quarter": 0.0, "all": 0.0})
    frames: dict = dataclasses.field(default_factory=lambda: {"quarter": 0, "all": 0})

    def add(self, part, seconds, frames):
        self.seconds[part] += seconds
        self.frames[part] += frames

    def rate(self):
        """Frames a second, of all videos less the quarter: starting does not count."""
        frames = self.frames["all"] - self.frames["quarter"]
        return frames / (self.seconds["all"] - self.seconds["quarter"])

    def starting(self):
        """Seconds of a round that its frames did not take."""
        return (self.seconds["quarter"] - self.frames["quarter"] / self.rate()) / self.rounds


def compare(folder, videos, fps, what, processes, rounds=2):
    """Frames a second of extraction, and of processes that only decode the same videos and call
    MediaPipe. What starting takes is given apart."""
    import extract_hands

    model = extract_hands.find_model(None)  # before the clock runs: it may have to be made
    paths = sorted(map(str, videos.glob("*.mp4")))
    parts = {"quarter": paths[::4], "all": paths}
    paces = {}
    for workers in processes:
        ours = Pace(rounds)
        bare = Pace(rounds)
        for _ in range(rounds):
            for part, chosen in parts.items():
                ours.add(part, *run_extraction(folder, chosen, fps, workers))
                bare.add(part, *run_bare_mediapipe(model, chosen, fps, workers))
        assert ours.frames == bare.frames, f"looked at other frames: {ours}, the reference {bare}"
        paces[workers] = (ours, bare)
        count = "1 worker" if workers == 1 else f"{workers} workers"
        yield Row(f"{what}, {count}, {sum(ours.frames.values())} frames",
                  f"{ours.rate():.1f} frames/s", f"{bare.rate():.1f} frames/s",
                  f"{ours.rate() / bare.rate():.2f}",
                  "decoding and bare MediaPipe, as many processes")
        yield Row("start-up and end of these", f"{ours.starting():.1f} s",
                  f"{bare.starting():.1f} s", note="the same")
    if len(paces) > 1:
        gains = [two.rate() / one.rate() for one, two in zip(paces[1], paces[2])]
        yield Row(f"{what}, 2 workers over 1", f"{gains[0]:.2f}", f"{gains[1]:.2f}",
                  note="the same of bare MediaPipe")


def run_extraction(folder, videos, fps, workers):
    """-> seconds, frames looked at."""
    out = folder / "hands"
    shutil.rmtree(out, ignore_errors=True)
    listed = folder / "list.txt"
    listed.write_text("".join(f"{video}\n" for video in videos))
    usage = script(ROOT / "extract_hands.py", listed, "--out", out, "--fps", fps,
                   "--workers", workers)
    last = (out / "log.jsonl").read_text().splitlines()[-1]
    return usage.seconds, json.loads(last)["frames"]


def run_bare_mediapipe(model, videos, fps, workers):
    """-> seconds, frames looked at."""
    start = time.time()
    context = multiprocessing.get_context("spawn")
    counts = context.Array("i", workers)
    cores = sorted(os.sched_getaffinity(0))
    processes = []
    for k in range(workers):
        arguments = (model, counts, k, cores[k % len(cores)], videos[k::workers], fps)
        processes.append(context.Process(target=bare_mediapipe, args=arguments))
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return time.time() - start, sum(counts)


def bare_mediapipe(model, counts, k, core, videos, fps):
    os.sched_setaffinity(0, {core})
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    import mediapipe

    options = mediapipe.tasks.vision.HandLandmarkerOptions(
        base_options=mediapipe.tasks.BaseOptions(model_asset_path=model), num_hands=2)
    detector = mediapipe.tasks.vision.HandLandmarker.create_from_options(options)
    for path in videos:
        video = cv2.VideoCapture(path)
        due = 0
        while video.grab():
            if video.get(cv2.CAP_PROP_POS_MSEC) / 1000 >= due / fps - 1e-4:
                picture = cv2.cvtColor(video.retrieve()[1], cv2.COLOR_BGR2RGB)
                detector.detect(mediapipe.Image(mediapipe.ImageFormat.SRGB, picture))
                counts[k] += 1
                due += 1


def merge(folder, videos=30_000, hands=2_000_000):
    """Parts of that many hands, made up, with one crop of 32 px for all; then the command that
    merges them. Then one more video."""
    rng = np.random.default_rng(0)
    out = folder / "merged"
    jpeg = cv2.imencode(".jpg", rng.integers(0, 255, (32, 32, 3), np.uint8))[1]
    names = [f"{k % 100:02d}/{k:05d}.mp4" for k in range(videos + 1)]
    ends = np.linspace(0, hands, videos + 1).round().astype(int)
    counts = [*np.diff(ends).tolist(), 50]
    for what, first, last in (("merge", 0, videos), ("one video more,", videos, videos + 1)):
        (out / "parts").mkdir(parents=True, exist_ok=True)
        for name, count in zip(names[first:last], counts[first:last]):
            write_part(out, name, count, jpeg, rng)
        listed = folder / "list.txt"
        listed.write_text("".join(f"{folder}/{name}\n" for name in names[:last]))
        total = sum(counts[:last])
        usage = script(ROOT / "extract_hands.py", listed, "--out", out, "--size", 32)
        assert len(np.load(out / "keypoints.npy", mmap_mode="r")) == total
        yield Row(f"{what} {last} videos, {total} hands, crops of {len(jpeg)} bytes", str(usage),
                  note="at most 2 GB wanted")
    shutil.rmtree(out)


def write_part(out, name, count, jpeg, rng):
    """The part of a video, as extract_hands.py writes it."""
    from common import HANDS_DTYPE
    import extract_hands

    rows = np.zeros(count, HANDS_DTYPE)
    rows["frame"] = np.arange(count)
    keypoints = rng.uniform(0, 32, (count, 21, 2)).astype(np.float32)
    path = extract_hands.part_path(out, name)
    np.savez(path, lengths=np.full(count, len(jpeg)), hands=rows, keypoints=keypoints,
             frames=count, reason="")
    with zipfile.ZipFile(path, "a") as part:
        part.writestr("crops", jpeg.tobytes() * count)


def annotations(folder, hands=2_000_000):
    """A file like SiMHand's own, with that many hands, made up; then what it takes to read it."""
    path = folder / "hands.json"
    write_annotations(path, hands)
    size = path.stat().st_size / 1e9
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import extract_hands; "
            f"read = extract_hands.load_annotations({str(path)!r}, '/'); "
            f"assert len(read.rows) == {hands} and len(read.given) == {min(hands, 30_000)}")
    usage = script("-c", code)
    path.unlink()
    yield Row(f"annotations, {hands} hands, a file of {size:.1f} GB", str(usage),
              note="at most 8 GB wanted")


def write_annotations(path, hands):
    rng = np.random.default_rng(0)
    points = [str(rng.uniform(0, 1, 63).tolist()) for _ in range(1000)]
    with open(path, "w") as file:
        file.write('{"images": [')
        for k in range(hands):
            comma = ", " if k else ""
            file.write(f'{comma}{{"id": {k}, "file_name": "Ego4D/{k % 30_000:05d}/{k:07d}.jpg", '
                       '"width": 1920, "height": 1080}')
        file.write('], "annotations": [')
        for k in range(hands):
            comma = ", " if k else ""
            file.write(f'{comma}{{"hand_id": "{k}", "image_id": {k}, '
                       '"boxes": "[600.5, 300.25, 800.5, 500]", "left_right": "Left", '
                       f'"keypoint_25d": {points[k % 1000]}, '
                       f'"positive_sample": [{hands - 1 - k}], "distance": [0.123456789]}}')
        file.write("]}")


# ------------------------------------------------------------------------------------------ mining

def mine(folder, sizes=(125_000, 250_000, 500_000, 1_000_000, 2_000_000), queries=2000):
    """The script on hands folders of made-up hands, 100 of a video, beside scipy's k-d tree, which
    is asked for some of the hands alone."""
    hands = folder / "hands"
    hands.mkdir()
    everything = made_up_hands(max(sizes))
    for size in sizes:
        video = np.arange(size) // 100
        write_hands(hands, everything[:size], video)
        usage = script(ROOT / "mine_pairs.py", hands)
        chosen = np.random.default_rng(0).choice(size, min(queries, size), replace=False)
        start = time.time()
        tree = plant_tree(hands / "embeddings.npy")
        building = time.time() - start
        start = time.time()
        distances = ask_tree(tree, video, chosen)
        asking = (time.time() - start) * size / len(chosen)
        ours = np.load(hands / "distances.npy")[chosen, 0]
        assert np.allclose(ours, distances, rtol=1e-5, atol=0), "the reference finds others"
        reference = building + asking
        yield Row(f"{size} hands, top-1 of other videos, {CORES} cores", str(usage),
                  f"{reference:.0f} s", f"{reference / usage.seconds:.1f}",
                  "scipy's cKDTree, asked for 8, 32, 128 ... neighbours until one is of another "
                  f"video; a random {len(chosen)} of the hands, times {size / len(chosen):g}")


def write_hands(hands, keypoints, video):
    """A hands folder of these keypoints (N, 21, 2) in crops of side 1, all crops black."""
    from common import HANDS_DTYPE

    size = len(keypoints)
    jpeg = cv2.imencode(".jpg", np.zeros((16, 16, 3), np.uint8))[1].ravel()
    rows = np.zeros(size, HANDS_DTYPE)
    rows["video"] = video
    rows["frame"] = np.arange(size) % 100
    np.save(hands / "hands.npy", rows)
    np.save(hands / "keypoints.npy", keypoints * 16)
    np.save(hands / "offsets.npy", np.arange(size + 1) * len(jpeg))
    np.save(hands / "crops.npy", np.tile(jpeg, size))
    (hands / "videos.txt").write_text("a.mp4\n" * (video.max() + 1))


def plant_tree(path):
    from scipy.spatial import cKDTree

    return cKDTree(np.load(path))


def ask_tree(tree, video, queries):
    """-> distances (Q,) of the nearest neighbours of these rows in other videos."""
    distances = np.full(len(queries), np.inf)
    left = np.arange(len(queries))  # those that have none yet
    wanted = 8
    while len(left):
        asked = queries[left]
        near, rows = tree.query(tree.data[asked], min(wanted, tree.n), workers=CORES)
        other = video[rows] != video[asked][:, None]
        found = other.any(1)
        first = other.argmax(1)
        distances[left[found]] = near[found, first[found]]
        left = left[~found]
        wanted *= 4
    return distances


def made_up_hands(count, length=100, seed=0):
    """Keypoints (count, 21, 2) in crops of side 1 of hands with five fingers that turn and bend
    slowly: within one of the videos of `length` frames they are near-duplicates."""
    rng = np.random.default_rng(seed)
    bend = 45 + 35 * walk(rng, count, length, 5)[:, :, None]
    bend = bend + 12 * walk(rng, count, length, 15).reshape(count, 5, 3)
    bend = np.radians(bend).clip(-0.3, 1.8)
    spread = np.radians(np.array([-55, -15, 0, 12, 25]) + 5 * walk(rng, count, length, 5))
    roots = np.array([[-2.5, 3], [-2.2, 8.6], [0, 9], [1.9, 8.4], [3.6, 7.6]])
    bones = np.array([[3.6, 3.2, 2.6], [4.4, 2.6, 2.2], [4.9, 3, 2.4], [4.5, 2.8, 2.4],
                      [3.5, 2.1, 2]])
    joints = np.zeros((count, 21, 3), np.float32)  # cm, the wrist at 0
    for finger in range(5):
        joint = 1 + 4 * finger
        joints[:, joint, :2] = roots[finger]
        sine = np.sin(spread[:, finger])
        cosine = np.cos(spread[:, finger])
        angle = 0
        for k in range(3):
            angle = angle + bend[:, finger, k] * (0.5 if finger == 0 else 1)
            way = np.stack([sine * np.cos(angle), cosine * np.cos(angle), -np.sin(angle)], 1)
            joints[:, joint + 1] = joints[:, joint] + bones[finger, k] * way
            joint += 1
    points = joints @ first_two_rows(walk(rng, count, length, 4)).transpose(0, 2, 1)
    points = points + 0.08 * rng.normal(size=(count, 21, 2)).astype(np.float32)
    low = points.min(1)
    high = points.max(1)
    side = 1.3 * (high - low).max(1)[:, None, None]
    return ((points - (low + high)[:, None] / 2) / side + 0.5).astype(np.float32)


def walk(rng, count, length, dims, keep=0.998):
    """-> (count, dims) float32: normal numbers that change slowly within each `length` rows."""
    steps = rng.normal(size=(length, count // length, dims)).astype(np.float32)
    for k in range(1, length):
        steps[k] = keep * steps[k - 1] + (1 - keep ** 2) ** 0.5 * steps[k]
    return steps.swapaxes(0, 1).reshape(count, dims)


def first_two_rows(quaternions):
    """-> (N, 2, 3), of the rotation matrices of quaternions (N, 4) of any length."""
    w, x, y, z = quaternions.T / np.linalg.norm(quaternions, axis=1)
    across = [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)]
    along = [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)]
    return np.stack([*across, *along], 1).reshape(-1, 2, 3)


# ------------------------------------------------------------------------------------ pre-training

def hands_folder(folder, count, fps=10):
    """A mined hands folder of that many crops of 224 px, those of the real clips (else of rendered
    videos) repeated. -> the folder, how many there are before they are repeated."""
    source = REAL
    if not REAL.is_dir():
        import synthetic

        source = folder / "videos"
        synthetic.write_videos(source, videos=8, seconds=4, fps=10, size=(640, 480), seed=0)
    out = folder / "hands"
    script(ROOT / "extract_hands.py", source, "--out", out, "--fps", fps)
    crops = np.load(out / "crops.npy")
    sizes = np.diff(np.load(out / "offsets.npy"))
    keypoints = np.load(out / "keypoints.npy")
    rows = np.load(out / "hands.npy")
    times = -(-count // len(rows))  # rounded up
    offsets = np.concatenate([[0], np.cumsum(np.tile(sizes, times)[:count])])
    np.save(out / "crops.npy", np.tile(crops, times)[:offsets[-1]])
    np.save(out / "offsets.npy", offsets)
    np.save(out / "keypoints.npy", np.tile(keypoints, (times, 1, 1))[:count])
    np.save(out / "hands.npy", np.tile(rows, times)[:count])
    np.save(out / "neighbours.npy", np.roll(np.arange(count), 1)[:, None])
    return out, len(rows)


def loader(folder, micro=128, fps=10):
    """Views of 128 px made by as many processes as there are cores, in the loader of
    pretrain.py."""
    import torch
    import common
    import pretrain

    torch.set_num_threads(1)
    batches = 20 * CORES
    count = micro * batches
    hands, crops = hands_folder(folder, count, fps)
    args = parse_args(pretrain, hands, "--out", "unused", "--batch-size", micro,
                      "--workers", CORES)
    data = pretrain.load_data(args)
    plan = pretrain.make_plan(args, len(data.pool), 0, 1, torch.device("cpu"))
    items = pretrain.hands_of_steps(0, batches, len(data.pool), plan, args)
    ours = common.load_items(pretrain.Pairs(data, args), items, CORES, pretrain.collate)
    our_rate = views_a_second(ours, batches, micro)
    items = [range(start, start + micro) for start in range(0, count, micro)]
    usual = common.load_items(UsualPairs(data.folders[0]), items, CORES, stack_views)
    usual_rate = views_a_second(usual, batches, micro)
    yield Row(f"views of 128 px from {crops} crops, per core, {CORES} processes",
              f"{our_rate:.0f} views/s", f"{usual_rate:.0f} views/s",
              f"{our_rate / usual_rate:.2f}", "torchvision's transforms on PIL pictures")

    cv2.setNumThreads(0)
    pairs = calls_a_second(lambda hand: pretrain.make_pair(data, hand, 0, args))
    decoded = calls_a_second(lambda hand: cv2.imdecode(jpeg(data.folders[0], hand), 1))
    yield Row("the same, in one process, no loader around", f"{2 * pairs:.0f} views/s",
              f"{decoded:.0f} crops/s", f"{2 * pairs / decoded:.2f}", "decoding the crops alone")


class UsualPairs:
    """Item k: two views of crop k, as torchvision's transforms make them, (3, 128, 128) each."""

    def __init__(self, hands):
        from torchvision import transforms

        self.hands = hands
        self.transform = transforms.Compose([
            transforms.RandomAffine(45, (0.07, 0.07),
                                    interpolation=transforms.InterpolationMode.BILINEAR),
            transforms.RandomResizedCrop(128, (0.4, 1.0), (1.0, 1.0)),
            transforms.ColorJitter(0.5, 0, 0.5, 0.5),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])

    def __getitem__(self, k):
        from PIL import Image

        views = []
        for _ in range(2):
            picture = Image.open(io.BytesIO(jpeg(self.hands, k)))
            views.append(self.transform(picture.convert("RGB")))
        return views


def jpeg(hands, k):
    """The bytes of crop k of a hands folder."""
    start, end = hands.offsets[k:k + 2]
    return hands.crops[start:end]


def stack_views(pairs):
    import torch

    return torch.stack(sum(pairs, []))


def views_a_second(batches, count, micro):
    """Of a loader's `count` batches of `micro` pairs, for each process; the best of three times."""
    waiting = 2 * CORES  # batches that were made while the processes started
    for _ in range(waiting):
        next(batches)
    timed = (count - waiting) // 4

    def work():
        for _ in range(timed):
            next(batches)

    seconds = best_seconds(work, 3)
    batches.close()
    return timed * 2 * micro / seconds / CORES


def calls_a_second(call, calls=200):
    """call: called with 0, 1, 2 ...; the best of eight times."""
    def work():
        for k in range(calls):
            call(k)

    return calls / best_seconds(work, 8)


def best_seconds(work, times):
    """The least that a call of work() takes, called so many times."""
    seconds = []
    for _ in range(times):
        start = time.time()
        work()
        seconds.append(time.time() - start)
    return min(seconds)


def step(folder, runs=None, fps=10):
    """Dry runs of pretrain.py, its loader included, beside forward and backward of the backbone
    alone on tensors that are already on the device, as many views at a time as pass the network
    together. runs: batch, micro-batch and steps of each."""
    import torch

    if torch.cuda.is_available():
        backbone = "resnet50"
        size = 128
        where = f"bf16, {torch.cuda.get_device_name()}"
        runs = runs or ((512, 512, 40), (8192, 512, 6))
        compiled = (False, True)
    else:
        backbone = "resnet18"
        size = 64
        where = "fp32, CPU"
        runs = runs or ((32, 32, 30), (32, 8, 30))
        compiled = (False,)
    hands, _ = hands_folder(folder, max(batch for batch, _, _ in runs), fps)
    for batch, micro, steps in runs:
        for compile_it in compiled:
            command = [ROOT / "pretrain.py", hands, "--out", folder / "run", "--weights", "none",
                       "--backbone", backbone, "--input-size", size, "--batch-size", batch,
                       "--micro-batch", micro, "--steps", steps]
            if compile_it:
                command.append("--compile")
            rate, memory = dry_run(command)
            bare = call_apart(bare_network, backbone, 2 * micro, size, compiled=compile_it)[0]
            how = "compiled, " if compile_it else ""
            note = "the bare network"
            if micro < batch:
                note += "; ours embeds twice: 0.75 at most"
            yield Row(f"{backbone}, {size} px, {batch} pairs, {micro} at a time, {how}{where}",
                      f"{rate:.0f} views/s, {memory}", f"{bare:.0f} views/s",
                      f"{rate / bare:.2f}", note)


def dry_run(command):
    """-> views a second, and its memory in words."""
    result = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True,
                            env=ENVIRONMENT)
    if result.returncode:
        sys.exit(result.stderr[-500:])
    rate, memory = re.search(r"(\d+) views/s, .*? a step, ([\d.]+ GB)", result.stdout).groups()
    return float(rate), memory


def bare_network(name, images, size, detnet=False, compiled=False, times=10):
    """Print pictures a second of forward and backward, of a ResNet or of DetNet on it."""
    import torch  # before our scripts: its threads wait as torch lets them
    import torchvision
    import finetune

    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = finetune.DetNet(name, "none") if detnet else torchvision.models.get_model(name)
    network = network.to(device, memory_format=torch.channels_last).train()
    if compiled:
        network.compile()
    pictures = torch.randn(images, 3, size, size, device=device)
    pictures = pictures.to(memory_format=torch.channels_last)
    for k in range(2 * times):  # the first half warms up
        if k == times:
            wait_for(device)
            start = time.time()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            outputs = network(pictures)
        if not detnet:
            outputs = [outputs]
        sum(output.float().sum() for output in outputs).backward()
    wait_for(device)
    print(times * images / (time.time() - start))


def wait_for(device):
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def loss(folder, few=1024, many=8192):
    """Weights, loss and gradient of one batch, beside the same with a (2N, 2N, 21, 2) tensor, for
    which memory suffices with few pairs."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    seconds, memory = call_apart(time_loss, few, device, times=3)
    slow, much = call_apart(time_loss, few, device, times=3, broadcasting=True)
    yield Row(f"{few} pairs, {device}", f"{seconds:.2f} s, {memory:.2f} GB",
              f"{slow:.2f} s, {much:.2f} GB", f"{slow / seconds:.1f}, {much / memory:.1f}",
              "broadcasting")
    seconds, memory = call_apart(time_loss, many, device, times=1)
    yield Row(f"{many} pairs, {device}", f"{seconds:.2f} s, {memory:.2f} GB",
              note="at most 6 GB wanted")


def time_loss(pairs, device, times, broadcasting=False):
    """Print the seconds that the fastest time took, and the GB used beyond what was in use."""
    from common import nt_xent, pair_weights
    import torch

    torch.manual_seed(0)
    k1, k2 = torch.rand(2, pairs, 21, 2, device=device) * 128
    z1 = torch.randn(pairs, 128, device=device).requires_grad_()
    z2 = torch.randn(pairs, 128, device=device).requires_grad_()
    weigh = pair_weights
    lose = nt_xent
    if broadcasting:
        weigh = broadcast_weights
        lose = plain_nt_xent
    before = used_memory(device)
    seconds = []
    for _ in range(times):
        start = time.time()
        normal1 = torch.nn.functional.normalize(z1, dim=1)
        normal2 = torch.nn.functional.normalize(z2, dim=1)
        lose(normal1, normal2, *weigh(k1, k2)).backward()
        z1.grad.sum().item()
        seconds.append(time.time() - start)
    print(min(seconds), (used_memory(device) - before) / 2 ** 30)


def used_memory(device):
    """The most so far, bytes."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return peak_memory()


def broadcast_weights(k1, k2):
    """pair_weights by one tensor (2N, 2N, 21, 2)."""
    import torch

    every = torch.cat([k1, k2])
    pairs = (every[:, None] - every[None]).square().sum(3).sqrt().mean(2)
    positive = (k1 - k2).square().sum(2).sqrt().mean(1)
    return [(d.max() - d) / (d.max() - d.min()) for d in (positive, pairs)]


def plain_nt_xent(z1, z2, pos_weight, neg_weight):
    """nt_xent with all (2N, 2N) similarities at once."""
    import torch

    z = torch.cat([z1, z2])
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (z @ z.T * neg_weight / 0.5).masked_fill(itself, -1e9)
    positive = (z1 * z2).sum(1) * pos_weight / 0.5
    return (logits.logsumexp(1) - positive.repeat(2)).mean()


# ------------------------------------------------------------------------------------- fine-tuning

def tune(folder, hands=50):
    """An epoch of finetune.py, its loader included, beside DetNet's forward and backward on tensors
    that are already on the device; then the loader alone. The pictures are rendered, few of them
    repeated."""
    import torch
    import finetune

    if torch.cuda.is_available():
        backbone = "resnet50"
        size = 128
        batch = 128
        times = 40
        where = f"bf16, {torch.cuda.get_device_name()}"
    else:
        backbone = "resnet18"
        size = 64
        batch = 16
        times = 2
        where = "fp32, CPU"
    write_labelled_set(folder, hands, times)
    command = ["--dataset", "freihand", "--root", folder / "set", "--out", folder / "run",
               "--weights", "none", "--backbone", backbone, "--input-size", size,
               "--batch-size", batch, "--epochs", 2]
    script(ROOT / "finetune.py", *command)
    log = (folder / "run" / "log.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in log]
    second = next(row for row in rows if row.get("epoch") == 2)
    ours = second["pictures_per_s"]
    bare = call_apart(bare_network, backbone, batch, size, detnet=True)[0]
    yield Row(f"DetNet on {backbone}, {size} px, batch {batch}, {where}",
              f"{ours:.0f} pictures/s", f"{bare:.0f} pictures/s", f"{ours / bare:.2f}",
              "the bare network")

    args = parse_args(finetune, *command)
    torch.set_num_threads(1)
    for width, height in ((224, 224), (640, 480)):  # FreiHAND's and DexYCB's
        if width > 224:
            enlarge(folder / "set", width, height)
        rate = pictures_a_second(args)
        yield Row(f"its loader alone, {args.workers} processes, pictures of {width} x {height}",
                  f"{rate:.0f} pictures/s", f"{bare:.0f} pictures/s", f"{rate / bare:.1f}",
                  "the bare network")


def write_labelled_set(folder, hands, times):
    """A set in FreiHAND's layout, each of so many training hands in it so many times."""
    import synthetic

    synthetic.write_freihand(folder / "few", train=hands, evaluation=8, seed=0)
    shutil.copytree(folder / "few", folder / "set")
    shutil.copytree(folder / "few_eval", folder / "set_eval")
    for name in ("K", "xyz"):
        path = folder / "set" / f"training_{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) * times))
    rgb = folder / "set" / "training" / "rgb"
    for picture in rgb.iterdir():
        picture.unlink()
    for k in range(4 * hands * times):  # version by version, each of all samples
        version, sample = divmod(k, hands * times)
        source = f"{hands * version + sample % hands:08d}.jpg"
        os.link(folder / "few" / "training" / "rgb" / source, rgb / f"{k:08d}.jpg")


def enlarge(root, width, height):
    """Make the training pictures, of 224 x 224 so far, of this size."""
    pictures = {}  # one name of each file
    for path in (root / "training" / "rgb").iterdir():
        pictures[path.stat().st_ino] = path
    for path in pictures.values():
        large = cv2.resize(cv2.imread(str(path)), (width, height), interpolation=cv2.INTER_CUBIC)
        path.write_bytes(cv2.imencode(".jpg", large)[1])  # its other names show it too
    path = root / "training_K.json"
    scale = np.diag([width / 224, height / 224, 1])
    path.write_text(json.dumps((scale @ json.loads(path.read_text())).tolist()))


def pictures_a_second(args):
    """Of the loader of finetune.py."""
    import torch
    import common
    import finetune

    train = finetune.load_data(args).train
    steps = len(train) // args.batch_size
    plan = finetune.Plan(0, 1, torch.device("cpu"), "fp32", steps, 10 * steps)
    batches = finetune.rows_of_steps(0, len(train), plan, args)
    pictures = finetune.Pictures(train, finetune.make_crops(args))
    batches = common.load_items(pictures, batches, args.workers, finetune.collate)
    for _ in range(3 * steps):  # made while the processes started
        next(batches)
    start = time.time()
    for _ in range(6 * steps):
        next(batches)
    seconds = time.time() - start
    batches.close()
    return 6 * steps * args.batch_size / seconds


# -------------------------------------------------------------------------------------- evaluation

def score(folder, samples=1_000_000, looped=5000):
    """The whole of evaluate.py on a million samples, a tenth of their joints not valid, bootstrap
    and plots included; beside a loop over some samples, scaled up, that takes the aligned error
    alone, as FreiHAND's evaluation does."""
    rng = np.random.default_rng(0)
    shape = (samples, 21, 3)
    truth = rng.normal(0, 40, shape).astype(np.float32) + np.float32([0, 0, 600])
    truth[:, 9] = truth[:, 0] + np.float32([0, 90, 0])
    np.save(folder / "gt_xyz.npy", truth)
    prediction = truth + rng.normal(0, 15, shape).astype(np.float32)
    np.save(folder / "pred_xyz.npy", prediction)
    np.save(folder / "valid.npy", rng.uniform(size=shape[:2]) > 0.1)
    start = time.time()
    for t, p in zip(truth[:looped].astype(float), prediction[:looped].astype(float)):
        aligned_errors(t, p)
    loop = (time.time() - start) * samples / looped
    del truth, prediction
    usage = script(ROOT / "evaluate.py", folder)
    yield Row(f"{samples:,} samples, all metrics, 1,000 resamples", str(usage), f"{loop:.0f} s",
              f"{loop / usage.seconds:.1f}",
              f"a loop for PA-MPJPE alone, {looped} of the samples, times {samples / looped:g}")


def aligned_errors(truth, prediction):
    """(21, 3) twice -> (21,), the distances after Procrustes alignment."""
    from scipy.linalg import orthogonal_procrustes

    truth = truth - truth.mean(0)
    prediction = prediction - prediction.mean(0)
    prediction = prediction / np.linalg.norm(prediction)
    rotation, size = orthogonal_procrustes(truth, prediction)
    return np.linalg.norm(prediction @ rotation.T * size - truth, axis=1)


STAGES = {"extract": extract, "mine": mine, "loader": loader, "loss": loss, "step": step,
          "finetune": tune, "evaluate": score}

if __name__ == "__main__":
    main()
