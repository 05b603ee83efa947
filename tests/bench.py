"""Speed and memory, each figure beside a reference measured in the same run.

    python tests/bench.py extract    small clips, beside decoding and bare MediaPipe
    python tests/bench.py large      the same, 1920 x 1080, once a second
    python tests/bench.py mine       125,000 to 500,000 hands, beside scipy's k-d tree
    python tests/bench.py loader     views a second, beside torchvision's transforms
    python tests/bench.py loss       weights or targets, loss and gradient of a batch, beside the
                                     obvious way
    python tests/bench.py step       pretrain.py, of a small ResNet, beside the bare network
    python tests/bench.py finetune   finetune.py, the same
    python tests/bench.py estimate   what 10 to 4,000 hours of video take, from the other stages'
                                     rows; measures nothing
    python tests/bench.py all        all of these
    python tests/bench.py gpu        what wants a GPU, in six minutes (see bench_gpu.py)

Each stage writes its block of tests/bench.md (gpu: its blocks of tests/gpu.md) in place of the one
that it left there before. Figures are wall-clock time, start-up of the processes included where
nothing else is said; run it on an idle machine. Takes minutes and, in a temporary folder (TMPDIR
says where), 8 GB of disk. --size tiny only shows that all of it runs.
"""

import argparse
import datetime
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import typing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch
import torchvision
from PIL import Image
from scipy.spatial import cKDTree
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import common
import finetune
import mine_pairs
import pretrain
from made_up import (enlarged, frames_of, made_up_hands, write_clip, write_hands,
                     write_labels)

CORES = len(os.sched_getaffinity(0))


class Row(typing.NamedTuple):
    what: str
    ours: str
    reference: str = ""
    ratio: str = ""  # above 1: ours is better
    note: str = ""  # what the reference is


COLUMNS = Row("what", "ours", "reference", "ratio", "the reference is")


def main():
    args = parse_args()
    if args.stage == "gpu":
        import bench_gpu

        return bench_gpu.measure(args)
    for name in STAGES if args.stage == "all" else [args.stage]:
        if name == "estimate":
            run_stage(args.out, name, estimate(args.out), PLANS_COLUMNS)
            continue
        more = TINY[name] if args.size == "tiny" else {}
        with tempfile.TemporaryDirectory() as folder:
            rows = STAGES[name](Path(folder), **more)
            packages = ["mediapipe"] if name in ("extract", "large") else []
            run_stage(args.out, name, rows, packages=packages)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "estimate", "all", "gpu"])
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda",
                        help="of gpu: with cpu and --size tiny it runs anywhere")
    parser.add_argument("--out", type=Path, help="the file to write (default: tests/bench.md or "
                        "tests/gpu.md)")
    args = parser.parse_args()
    if args.out is None:
        args.out = ROOT / "tests" / ("gpu.md" if args.stage == "gpu" else "bench.md")
    return args


def run_stage(path, stage, rows, columns=COLUMNS, packages=()):
    """Print a stage's rows as they come, and write its block of the file after each of them."""
    facts = ", ".join(f"{key} {value}" for key, value in common.run_facts(*packages).items())
    lines = [f"{datetime.date.today()}, {CORES} cores; {facts}", "", as_line(columns),
             "|" + "---|" * len(columns)]
    print(f"\n## {stage}\n", *lines, sep="\n", flush=True)
    for row in rows:
        lines.append(as_line(row))
        print(lines[-1], flush=True)
        write_block(path, stage, lines)


def as_line(row):
    return "| " + " | ".join(row) + " |"


def write_block(path, stage, lines):
    """Put a stage's lines under its heading, in place of those there."""
    blocks = read_blocks(path)
    blocks[stage] = "\n".join(lines)
    with common.atomic(path) as file:
        file.write(b"# Speed and memory\n")
        for name, block in blocks.items():
            file.write(f"\n## {name}\n\n{block}\n".encode())


def read_blocks(path):
    """{stage: text} of such a file."""
    blocks = {}
    if path.exists():
        for part in path.read_text().split("\n## ")[1:]:
            name, text = part.split("\n", 1)
            blocks[name] = text.strip()
    return blocks


class Usage(typing.NamedTuple):
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
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
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


def call_apart(function, *arguments):
    """Call a function of this file in a process of its own -> the numbers that it prints."""
    code = (f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import bench; "
            f"bench.{function.__name__}(*{arguments!r})")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr[-500:])
    return [float(number) for number in result.stdout.split()]


# -------------------------------------------------------------------------------------- extraction

def extract(folder, videos=8, seconds=8, copies=4, rounds=2):
    """Rendered videos of 640 x 480 at 30 frames a second that change 5 times a second, looked at
    5 times a second."""
    render(folder / "rendered", videos, seconds)
    (folder / "videos").mkdir()
    for path in sorted((folder / "rendered").glob("*.mp4")):
        first = folder / "videos" / f"{path.stem}-0.mp4"
        write_clip(first, (picture for picture in frames_of(path) for _ in range(6)))
        for copy in range(1, copies):
            shutil.copy(first, folder / "videos" / f"{path.stem}-{copy}.mp4")
    for workers in (1, 2):
        yield compare(folder, folder / "videos", 5, "640 x 480, --fps 5", workers, rounds)


def large(folder, seconds=30, rounds=2):
    """Rendered videos as cameras write them, with three B-frames in a row."""
    render(folder / "rendered", 1, 8)
    (folder / "videos").mkdir()
    rendered = next((folder / "rendered").glob("*.mp4"))
    write_clip(folder / "videos" / "0.mp4", enlarged(rendered, 30 * seconds))
    for copy in range(1, 8):
        shutil.copy(folder / "videos" / "0.mp4", folder / "videos" / f"{copy}.mp4")
    for opencv in (False, True):
        yield compare(folder, folder / "videos", 1, "1080p, H.264, --fps 1", 1, rounds, opencv)


def render(folder, videos, seconds):
    import synthetic  # here: only clips need it

    synthetic.write_videos(folder, videos=videos, seconds=seconds, fps=5, size=(640, 480), seed=0)


def compare(folder, videos, fps, what, workers, rounds, opencv=False):
    """Frames a second of extraction, and of processes that only decode the same videos and call
    MediaPipe: by PyAV, which skips as extraction does, or by OpenCV, as extraction once did.
    Starting does not count: a quarter of the videos is taken off."""
    import extract_hands

    model = extract_hands.find_model(None)  # before the clock runs: it may have to be made
    paths = sorted(map(str, videos.glob("*.mp4")))
    seconds = np.zeros((2, 2))  # ours and bare; of a quarter and of all
    frames = np.zeros((2, 2), int)
    for _ in range(rounds):
        for part, chosen in enumerate((paths[::4], paths)):
            for who, took in enumerate((run_extraction(folder, chosen, fps, workers),
                                        run_bare_mediapipe(model, chosen, fps, workers, opencv))):
                seconds[who, part] += took[0]
                frames[who, part] += took[1]
    assert (frames[0] == frames[1]).all(), f"looked at other frames: {frames}"
    ours, bare = (frames[:, 1] - frames[:, 0]) / (seconds[:, 1] - seconds[:, 0])
    decoder = "OpenCV" if opencv else "PyAV"
    return Row(f"{what}, {workers} workers, {frames[0].sum()} frames, start-up apart",
               f"{ours:.1f} frames/s", f"{bare:.1f} frames/s", f"{ours / bare:.2f}",
               f"decoding by {decoder} and bare MediaPipe, as many processes")


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


def run_bare_mediapipe(model, videos, fps, workers, opencv):
    """-> seconds, frames looked at."""
    start = time.time()
    cores = sorted(os.sched_getaffinity(0))

    def work(k):
        core = cores[k % len(cores)]
        return call_apart(bare_mediapipe, model, core, videos[k::workers], fps, opencv)[0]

    with ThreadPoolExecutor(workers) as pool:
        frames = sum(pool.map(work, range(workers)))
    return time.time() - start, frames


def bare_mediapipe(model, core, videos, fps, opencv):
    """Print the frames looked at."""
    os.sched_setaffinity(0, {core})
    import mediapipe

    options = mediapipe.tasks.vision.HandLandmarkerOptions(
        base_options=mediapipe.tasks.BaseOptions(model_asset_path=model), num_hands=2)
    detector = mediapipe.tasks.vision.HandLandmarker.create_from_options(options)
    count = 0
    for path in videos:
        for picture in (by_opencv if opencv else by_pyav)(path, fps):
            detector.detect(mediapipe.Image(mediapipe.ImageFormat.SRGB, picture))
            count += 1
    print(count)


def by_opencv(path, fps):
    """Yields the pictures of a video at or after each k / fps seconds."""
    video = cv2.VideoCapture(path)
    due = 0
    while video.grab():
        if video.get(cv2.CAP_PROP_POS_MSEC) / 1000 >= due / fps - 1e-4:
            yield cv2.cvtColor(video.retrieve()[1], cv2.COLOR_BGR2RGB)
            due += 1


def by_pyav(path, fps):
    """The same; at long intervals frames that no other needs are skipped."""
    import av

    due = 0
    with av.open(path) as file:
        codec = file.streams.video[0].codec_context
        codec.thread_count = 1
        if fps <= 2:
            codec.skip_frame = "BIDIR" if codec.name == "h264" else "NONREF"
        for frame in file.decode(video=0):
            if frame.time >= due / fps - 1e-4:
                yield frame.to_ndarray(format="rgb24")
                due += 1


# ------------------------------------------------------------------------------------------ mining

def mine(folder, counts=(125_000, 250_000, 500_000), queries=2000,
         looked_at=20_000):
    """The script on hands folders of made-up hands, 100 of a video, beside scipy's k-d tree, which
    is asked for some of the hands alone; and what it takes to notice copies."""
    keypoints = made_up_hands(max(counts))
    video = np.arange(max(counts)) // 100
    for count in counts:
        hands = write_hands(folder / "hands", keypoints[:count], video[:count], 16, 4000)
        usage = script(ROOT / "mine_pairs.py", hands)
        chosen = np.random.default_rng(0).choice(count, min(queries, count), replace=False)
        building, asking, distances = ask_tree(hands / "embeddings.npy", video[:count], chosen)
        ours = np.load(hands / "distances.npy")[chosen, 0]
        # A few pictures are there more than once, and mining passes over copies.
        assert np.isclose(ours, distances, rtol=1e-5).mean() > 0.98, "the reference finds others"
        assert (ours >= distances * (1 - 1e-5)).all(), "the reference finds nearer ones"
        reference = building + asking * count / len(chosen)
        yield Row(f"{count} hands, top-1 of other videos", str(usage), f"{reference:.0f} s",
                  f"{reference / usage.seconds:.1f}", "scipy's cKDTree, asked for 8, 32, 128 ... "
                  f"neighbours until one is of another video; a random {len(chosen)} of the hands, "
                  f"times {count / len(chosen):g}")
    yield copies(folder, looked_at, usage.seconds / count)


def copies(folder, count, rest):
    """What noticing copies takes: a thumbnail of each crop of 224 px, and their comparison. rest:
    seconds a hand of all that mining does, with crops so small that thumbnails take no time."""
    folder = write_hands(folder / "large", made_up_hands(count), np.arange(count) // 100, 224)
    hands = common.load_hands(folder)
    rows = np.arange(count)
    start = time.time()
    pictures = mine_pairs.thumbnails(hands, rows, 0, 1)
    mine_pairs.same_picture(pictures, rows, np.roll(rows, 1)[:, None])
    ours = (time.time() - start) / count
    return Row("noticing copies, crops of 224 px", f"{1e6 * ours:.0f} µs a hand",
               f"{1e6 * rest:.0f} µs a hand", f"{rest / ours:.1f}", "mining as above, the last row")


def ask_tree(path, video, queries):
    """-> seconds of building and of asking, distances (Q,) of the nearest neighbours of these rows
    in other videos."""
    start = time.time()
    tree = cKDTree(np.load(path))
    built = time.time()
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
    return built - start, time.time() - built, distances


# ------------------------------------------------------------------------------------ pre-training

def loader(folder, micro=128, batches=20 * CORES):
    """Views of 128 px made by as many processes as there are cores, in the loader of
    pretrain.py."""
    torch.set_num_threads(1)
    count = micro * batches
    hands = write_hands(folder / "hands", made_up_hands(count), np.arange(count) // 100, 224)
    sys.argv = list(map(str, ["pretrain.py", hands, "--out", "unused", "--batch-size", micro]))
    args = pretrain.parse_args()
    data = pretrain.load_data(args)
    plan = pretrain.make_plan(args, len(data.pool), 0, 1, torch.device("cpu"))
    items = pretrain.hands_of_steps(0, batches, len(data.pool), plan, args)
    ours = common.load_items(pretrain.Pairs(data, args), items, CORES, pretrain.collate)
    our_rate = views_a_second(ours, batches, micro)
    items = [range(start, start + micro) for start in range(0, count, micro)]
    usual = common.load_items(UsualPairs(data.folders[0]), items, CORES, stack_views)
    usual_rate = views_a_second(usual, batches, micro)
    yield Row("views of 128 px from crops of 224, a core, as many processes as cores",
              f"{our_rate:.0f} views/s", f"{usual_rate:.0f} views/s",
              f"{our_rate / usual_rate:.2f}", "torchvision's transforms on PIL pictures")


class UsualPairs:
    """Item k: two views of crop k, as torchvision's transforms make them, (3, 128, 128) each."""

    def __init__(self, hands):
        transforms = torchvision.transforms
        self.hands = hands
        self.transform = transforms.Compose([
            transforms.RandomAffine(45, (0.07, 0.07),
                                    interpolation=transforms.InterpolationMode.BILINEAR),
            transforms.RandomResizedCrop(128, (0.4, 1.0), (1.0, 1.0)),
            transforms.ColorJitter(0.5, 0, 0.5, 0.5),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])

    def __getitem__(self, k):
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


def best_seconds(work, times):
    """The least that a call of work() takes, called so many times."""
    seconds = []
    for _ in range(times):
        start = time.time()
        work()
        seconds.append(time.time() - start)
    return min(seconds)


def step(folder, runs=((32, 32), (32, 8)), steps=30):
    """Dry runs of pretrain.py, its loader included, beside forward and backward of the backbone
    alone on tensors that are there already, as many views at a time as pass the network
    together. runs: batch and micro-batch of each."""
    hands = write_hands(folder / "hands", made_up_hands(400), np.arange(400) // 100, 224)
    for batch, micro in runs:
        rate, memory = dry_run(hands, "--out", folder / "run", "--weights", "none", "--device",
                               "cpu", "--backbone", "resnet18", "--input-size", 64, "--batch-size",
                               batch, "--micro-batch", micro, "--steps", steps)
        bare = call_apart(bare_network, 2 * micro, False, max(1, steps // 3))[0]
        note = "the bare network"
        if micro < batch:
            note += "; ours embeds twice: 0.75 at most"
        yield Row(f"resnet18, 64 px, {batch} pairs, {micro} at a time, fp32, CPU",
                  f"{rate:.0f} views/s, {memory}", f"{bare:.0f} views/s",
                  f"{rate / bare:.2f}", note)


def dry_run(*arguments):
    """Of pretrain.py -> views a second, and its memory in words."""
    command = [sys.executable, ROOT / "pretrain.py", *arguments]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr[-500:])
    rate, memory = re.search(r"(\d+) views/s, .*? a step, ([\d.]+ GB)", result.stdout).groups()
    return float(rate), memory


def bare_network(images, detnet=False, times=10):
    """Print pictures of 64 px a second of forward and backward, of a ResNet-18 or of DetNet on it,
    on the CPU."""
    network = finetune.DetNet("resnet18", "none") if detnet else torchvision.models.resnet18()
    network = network.to(memory_format=torch.channels_last).train()
    pictures = torch.randn(images, 3, 64, 64).to(memory_format=torch.channels_last)
    for k in range(2 * times):  # the first half warms up
        if k == times:
            start = time.time()
        outputs = network(pictures)
        if not detnet:
            outputs = [outputs]
        sum(output.sum() for output in outputs).backward()
    print(times * images / (time.time() - start))


def loss(folder, few=1024, many=8192):
    """Weights or soft targets, loss and gradient of one batch, beside the same with a
    (2N, 2N, 21, 2) tensor, for which memory suffices with few pairs."""
    for ours, usual in ((weighted_loss, broadcast_weighted), (soft_loss, broadcast_soft)):
        name = ours.__name__.replace("_", " ")
        seconds, memory = call_apart(time_loss, ours.__name__, few, 3)
        slow, much = call_apart(time_loss, usual.__name__, few, 3)
        yield Row(f"{name}, {few} pairs", f"{seconds:.2f} s, {memory:.2f} GB",
                  f"{slow:.2f} s, {much:.2f} GB", f"{slow / seconds:.1f}, {much / memory:.1f}",
                  "broadcasting")
        seconds, memory = call_apart(time_loss, ours.__name__, many, 1)
        yield Row(f"{name}, {many} pairs", f"{seconds:.2f} s, {memory:.2f} GB",
                  note="at most 6 GB wanted")


def time_loss(name, pairs, times):
    """Print the seconds that the fastest time took, and the GB used beyond what was in use."""
    torch.manual_seed(0)
    k1, k2 = torch.rand(2, pairs, 21, 2) * 128
    z1 = torch.randn(pairs, 128).requires_grad_()
    z2 = torch.randn(pairs, 128).requires_grad_()
    before = peak_memory()

    def work():
        globals()[name](F.normalize(z1), F.normalize(z2), k1, k2).backward()

    seconds = best_seconds(work, times)
    print(seconds, (peak_memory() - before) / 2 ** 30)


def weighted_loss(z1, z2, k1, k2):
    return common.nt_xent(z1, z2, *common.pair_weights(k1, k2))


def soft_loss(z1, z2, k1, k2):
    return common.nt_xent(z1, z2, target=common.soft_targets(k1, k2, 0.06))


def broadcast_weighted(z1, z2, k1, k2):
    """weighted_loss by one tensor (2N, 2N, 21, 2), and all (2N, 2N) similarities at once."""
    positive = (k1 - k2).square().sum(2).sqrt().mean(1)
    pos_weight, neg_weight = [(d.max() - d) / (d.max() - d.min())
                              for d in (positive, broadcast_distances(k1, k2))]
    logits = broadcast_similarities(z1, z2, neg_weight)
    positive = (z1 * z2).sum(1) * pos_weight / 0.5
    return (logits.logsumexp(1) - positive.repeat(2)).mean()


def broadcast_soft(z1, z2, k1, k2):
    """soft_loss in the same way."""
    centred = [k - k.mean(1, keepdim=True) for k in (k1, k2)]
    d = broadcast_distances(*[F.normalize(k.flatten(1)).view_as(k) * 21 ** 0.5 for k in centred])
    target = d.fill_diagonal_(torch.inf).div(-0.06).softmax(1)
    return -(target * broadcast_similarities(z1, z2, 1).log_softmax(1)).sum(1).mean()


def broadcast_distances(k1, k2):
    every = torch.cat([k1, k2])
    return (every[:, None] - every[None]).square().sum(3).sqrt().mean(2)


def broadcast_similarities(z1, z2, weight):
    z = torch.cat([z1, z2])
    itself = torch.eye(len(z), dtype=torch.bool)
    return (z @ z.T * weight / 0.5).masked_fill(itself, -1e9)


# ------------------------------------------------------------------------------------- fine-tuning

def tune(folder, count=400, batch=16):
    """An epoch of finetune.py, its loader included, beside DetNet's forward and backward on tensors
    that are there already."""
    script(ROOT / "finetune.py", *write_labels(folder, count), "--out", folder / "run",
           "--weights", "none", "--backbone", "resnet18", "--input-size", 64, "--batch-size", batch,
           "--epochs", 2, "--device", "cpu")
    rows = common.read_log(folder / "run" / "log.jsonl")
    ours = next(row for row in rows if row.get("epoch") == 2)["pictures_per_s"]
    bare = call_apart(bare_network, batch, True, 10)[0]
    yield Row(f"DetNet on resnet18, 64 px, batch {batch}, fp32, CPU", f"{ours:.0f} pictures/s",
              f"{bare:.0f} pictures/s", f"{ours / bare:.2f}", "the bare network")


# -------------------------------------------------------------------- estimates for whole data sets

# Hours of video, and megapixels of a frame. Ego4D's are those of its own list of 9,650 videos.
PLANS = {"10 h": (10, 2.07), "1,000 h": (1000, 2.07), "4,000 h": (4000, 2.07),
         "Ego4D: 3,877 h, 2.24 MP": (3877, 2.24)}
PLANS_COLUMNS = ["1920 x 1080, one frame a second, one hand a frame", *PLANS, "sum"]


def estimate(path):
    """What each stage would take, from what the other stages measured into the same file."""
    fps = measured(path, "large", "1080p")[0]
    half = measured(path, "mine", "250000 hands")[0]
    mine_seconds, mine_memory = measured(path, "mine", "500000 hands")
    growth = np.log2(mine_seconds / half)
    copies_seconds = measured(path, "mine", "noticing copies")[0] / 1e6
    views = measured(path, "step", "32 at a time")[0]
    loaded = measured(path, "loader", "views of 128 px")[0]

    def row(what, figure, words):
        cells = []
        for hours, pixels in PLANS.values():
            value = figure(3600 * hours, pixels)
            cells.append(f"{value:,.0f}" if value >= 10 else f"{value:.2g}")
        return [what, *cells, words]

    yield row("frames, thousands", lambda n, _: n / 1e3, "3,600 an hour")
    yield row("extract, hours of one core", lambda n, mp: n / fps * mp / 2.07 / 3600,
              f"frames / {fps:g} a second x megapixels / 2.07")
    yield row("hands folder, GB of disk", lambda n, _: n * 13.4e-6,
              "13.4 KB a crop, as those of signers' videos have")
    yield row(f"mine, hours of {CORES} cores",
              lambda n, _: (mine_seconds * (n / 5e5) ** growth + copies_seconds * n) / 3600,
              f"{mine_seconds:g} s x (hands / 0.5M) ^ {growth:.2f}, as from 250,000 to 500,000, "
              f"and {1e6 * copies_seconds:g} µs a hand for copies")
    yield row("mine, GB of memory", lambda n, _: n / 5e5 * mine_memory,
              f"{mine_memory:g} GB for 500,000 hands")
    yield row("pre-train ResNet-18 at 64 px for 100 epochs, hours of these cores",
              lambda n, _: 200 * n / views / 3600, f"2 views x 100 x hands / {views:g} a second")
    yield row("views for ResNet-50, hours of one core", lambda n, _: 200 * n / loaded / 3600,
              f"2 views x 100 x hands / {loaded:g} a second; how fast a GPU takes them: gpu.md")


def measured(path, stage, what):
    """The numbers in the cell "ours" of a stage's first row of that name."""
    for line in read_blocks(path).get(stage, "").splitlines():
        cells = line.removeprefix("| ").split(" | ")
        if what in cells[0]:
            return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", cells[1])]
    sys.exit(f"{path}: no row of {stage} with \"{what}\", run that stage first")


STAGES = {"extract": extract, "large": large, "mine": mine, "loader": loader, "loss": loss,
          "step": step, "finetune": tune}
TINY = {"extract": dict(videos=4, seconds=1, copies=1, rounds=1),
        "large": dict(seconds=1, rounds=1),
        "mine": dict(counts=(500, 1000), queries=100, looked_at=50),
        "loader": dict(micro=4), "loss": dict(few=32, many=64),
        "step": dict(runs=((4, 4), (4, 2)), steps=2), "finetune": dict(count=40, batch=4)}

if __name__ == "__main__":
    main()
