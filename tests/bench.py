"""Speed and memory, each figure beside a reference measured in the same run.

    python tests/bench.py extract    small clips, beside decoding and bare MediaPipe
    python tests/bench.py large      the same, 1920 x 1080, once a second
    python tests/bench.py mine       250,000 and 500,000 hands, beside scipy's k-d tree
    python tests/bench.py loader     views a second, beside torchvision's transforms
    python tests/bench.py loss       of a batch, with its gradient, beside the obvious way
    python tests/bench.py step       pretrain.py, of a small ResNet, beside the bare network
    python tests/bench.py finetune   finetune.py, the same
    python tests/bench.py estimate   what 10 to 4,000 hours of video take, from the others' rows
    python tests/bench.py all        all of these
    python tests/bench.py gpu        what wants a GPU, in six minutes (see bench_gpu.py)

Each stage writes its block of tests/bench.md (gpu: its blocks of tests/gpu.md) in place of the one
that it left there before. Figures are wall-clock time, start-up of the processes included where
nothing else is said; run it on an idle machine. Takes minutes, and some GB of disk in a temporary
folder (TMPDIR says where). --size tiny only shows that all of it runs.
"""

import argparse
import datetime
import functools
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import typing
from pathlib import Path

import cv2
import numpy as np
import torch
import torchvision
from scipy.spatial import cKDTree
from torch.nn import functional as F
from torchvision import transforms

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import common
import finetune
import mine_pairs
import pretrain
from made_up import enlarged, frames_of, made_up_hands, write_clips, write_hands, write_labels

CORES = len(os.sched_getaffinity(0))
CPU = torch.device("cpu")
SPAWN = multiprocessing.get_context("spawn")


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
    out = args.out or ROOT / "tests" / "bench.md"
    for name in [*STAGES, "estimate"] if args.stage == "all" else [args.stage]:
        if name == "estimate":
            run_stage(out, name, estimate(out), PLANS_COLUMNS)
            continue
        more = TINY[name] if args.size == "tiny" else {}
        with tempfile.TemporaryDirectory() as folder:
            run_stage(out, name, STAGES[name](Path(folder), **more))


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "estimate", "all", "gpu"])
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--out", type=Path, help="the file to write (default: tests/bench.md or "
                        "tests/gpu.md)")
    return parser.parse_args()


def run_stage(path, stage, rows, columns=COLUMNS):
    """Print a stage's rows, and write its block of the file, in place of the old, after each."""
    facts = ", ".join(f"{key} {value}" for key, value in common.run_facts("mediapipe").items())
    lines = [f"{datetime.date.today()}, {CORES} cores; {facts}", "", as_line(columns),
             "|" + "---|" * len(columns)]
    print(f"\n## {stage}\n", *lines, sep="\n", flush=True)
    blocks = read_blocks(path)
    for row in rows:
        lines.append(as_line(row))
        print(lines[-1], flush=True)
        blocks[stage] = "\n".join(lines)
        text = "".join(f"\n## {name}\n\n{block}\n" for name, block in blocks.items())
        path.write_text(f"# Speed and memory\n{text}")


def as_line(row):
    return "| " + " | ".join(row) + " |"


def read_blocks(path):
    """{stage: text} of such a file."""
    blocks = {}
    if path.exists():
        for part in path.read_text().split("\n## ")[1:]:
            name, text = part.split("\n", 1)
            blocks[name] = text.strip()
    return blocks


def run(script, *arguments):
    """Run a script of ours -> what it prints, seconds, GB of its main process at the most."""
    command = [sys.executable, ROOT / script, *map(str, arguments)]
    memory = 0
    start = time.time()
    with tempfile.TemporaryFile("w+") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
        while process.poll() is None:
            memory = max(memory, peak_memory(process.pid))
            time.sleep(0.02)
        seconds = time.time() - start
        file.seek(0)
        printed = file.read()
    if process.returncode:
        sys.exit(f"{script} failed: {printed[-500:]}")
    return printed, seconds, memory


def peak_memory(process="self"):
    """Of a process, GB; 0 once it has ended."""
    found = re.search(r"VmHWM:\s*(\d+)", Path(f"/proc/{process}/status").read_text())
    return int(found[1]) / 2 ** 20 if found else 0


# -------------------------------------------------------------------------------------- extraction

def extract(folder, clips=8, seconds=8, copies=8):
    """Videos of 640 x 480 that change 5 times a second, looked at 5 times a second."""
    videos = write_clips(folder, frames_of, clips, seconds, copies)
    for workers in (1, 2):
        yield compare(folder, videos, "640 x 480, --fps 5", 5, workers, "PyAV")


def large(folder, seconds=30, copies=16):
    """As cameras write them."""
    videos = write_clips(folder, enlarged, 1, seconds, copies)
    for decoder in DECODERS:
        yield compare(folder, videos, "1080p, H.264, --fps 1", 1, 1, decoder)


def compare(folder, videos, what, fps, workers, decoder):
    """Frames a second of extraction, and of processes that only decode the same videos and call
    MediaPipe: by PyAV, which skips as extraction does, or by OpenCV, as extraction once did.
    Starting does not count: a quarter of the videos is taken off."""
    import extract_hands

    model = extract_hands.find_model(None)  # before the clock runs: it may have to be made
    took = np.array([[run_extraction(folder, chosen, fps, workers),
                      run_bare_mediapipe(model, chosen, fps, workers, decoder)]
                     for chosen in (videos[::4], videos)])
    seconds, frames = (took[1] - took[0]).T
    assert frames[0] == frames[1], f"looked at other frames: {took}"
    ours, bare = frames / seconds
    return Row(f"{what}, {workers} workers, {took[:, 0, 1].sum():.0f} frames, start-up apart",
               f"{ours:.1f} frames/s", f"{bare:.1f} frames/s", f"{ours / bare:.2f}",
               f"decoding by {decoder} and bare MediaPipe, as many processes")


def run_extraction(folder, videos, fps, workers):
    """-> seconds, frames looked at."""
    out = Path(tempfile.mkdtemp(dir=folder)) / "hands"
    _, seconds, _ = run("extract_hands.py", *videos, "--out", out, "--fps", fps, "--workers",
                        workers)
    return seconds, common.read_log(out / "log.jsonl")[-1]["frames"]


def run_bare_mediapipe(model, videos, fps, workers, decoder):
    """-> seconds, frames looked at."""
    start = time.time()
    tasks = [(model, k, videos[k::workers], fps, decoder) for k in range(workers)]
    with SPAWN.Pool(workers) as pool:
        frames = sum(pool.starmap(bare_mediapipe, tasks))
    return time.time() - start, frames


def bare_mediapipe(model, number, videos, fps, decoder):
    """-> frames looked at, on a core of its own."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})
    import mediapipe

    options = mediapipe.tasks.vision.HandLandmarkerOptions(
        base_options=mediapipe.tasks.BaseOptions(model_asset_path=model), num_hands=2)
    detector = mediapipe.tasks.vision.HandLandmarker.create_from_options(options)
    count = 0
    for path in videos:
        due = 0
        for seconds, picture in DECODERS[decoder](path, fps):
            if seconds >= due / fps - 1e-4:
                detector.detect(mediapipe.Image(mediapipe.ImageFormat.SRGB, picture()))
                due += 1
        count += due
    return count


def by_pyav(path, fps):
    """Yields the seconds of each frame of a video, and a function that makes its picture. At long
    intervals frames that no other needs are skipped."""
    import av

    with av.open(path) as file:
        codec = file.streams.video[0].codec_context
        codec.thread_count = 1
        if fps <= 2:
            codec.skip_frame = "NONREF"
        for frame in file.decode(video=0):
            yield frame.time, functools.partial(frame.to_ndarray, format="rgb24")


def by_opencv(path, fps):
    """The same, without skipping."""
    video = cv2.VideoCapture(path)
    while video.grab():
        seconds = video.get(cv2.CAP_PROP_POS_MSEC) / 1000
        yield seconds, lambda: cv2.cvtColor(video.retrieve()[1], cv2.COLOR_BGR2RGB)


DECODERS = {"PyAV": by_pyav, "OpenCV": by_opencv}


# ------------------------------------------------------------------------------------------ mining

def mine(folder, counts=(250_000, 500_000)):
    """Made-up hands, 100 of a video, beside scipy's k-d tree, which is asked for some of the hands
    alone. The crops are small there: what it takes to notice copies is measured apart."""
    keypoints = made_up_hands(max(counts))
    video = np.arange(max(counts)) // 100
    for count in counts:
        hands = write_hands(folder / "hands", keypoints[:count], video[:count], 16, 4000)
        _, seconds, memory = run("mine_pairs.py", hands)
        chosen = np.random.default_rng(0).choice(count, min(2000, count), replace=False)
        distances, usual = ask_tree(hands / "embeddings.npy", video[:count], chosen)
        ours = np.load(hands / "distances.npy")[chosen, 0]
        # A few pictures are there more than once, and mining passes over copies.
        assert np.isclose(ours, distances, rtol=1e-5).mean() > 0.98, "the reference finds others"
        yield Row(f"{count} hands, top-1 of other videos", f"{seconds:.0f} s, {memory:.2f} GB",
                  f"{usual:.0f} s", f"{usual / seconds:.1f}", "scipy's cKDTree, asked for 8, 32, "
                  f"128 ... neighbours until one is of another video; a random {len(chosen)} of "
                  f"the hands, times {count / len(chosen):g}")
    rows = np.arange(min(20_000, count))
    write_hands(folder / "large", keypoints[rows], video[rows], 224)
    start = time.time()
    thumbnails = mine_pairs.thumbnails(common.load_hands(folder / "large"), rows, 0, 1)
    mine_pairs.same_picture(thumbnails, rows, np.roll(rows, 1)[:, None])
    yield Row("noticing copies, crops of 224 px",
              f"{1e6 * (time.time() - start) / len(rows):.0f} µs a hand")


def ask_tree(path, video, queries):
    """-> distances (Q,) of the nearest neighbours of these rows in other videos; the seconds that
    all rows would take."""
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
    asking = (time.time() - built) * tree.n / len(queries)
    return distances, built - start + asking


# ---------------------------------------------------------------------------------------- training

def loader(folder, micro=128, batches=20 * CORES):
    """Views of 128 px made by as many processes as there are cores."""
    count = micro * batches
    hands = write_hands(folder / "hands", made_up_hands(count), np.arange(count) // 100, 224)
    sys.argv = ["pretrain.py", str(hands), "--out", "unused", "--batch-size", str(micro),
                "--workers", str(CORES)]
    args = pretrain.parse_args()
    data = pretrain.load_data(args)
    plan = pretrain.make_plan(args, len(data.pool), 0, 1, CPU)
    rate = views_a_second(pretrain.load_batches(data, 0, batches, plan, args), 2 * micro)
    pictures = folder / "pictures" / "hands"
    pictures.mkdir(parents=True)
    for k, (start, end) in enumerate(itertools.pairwise(data.folders[0].offsets)):
        (pictures / f"{k}.jpg").write_bytes(data.folders[0].crops[start:end])
    usual = torchvision.datasets.ImageFolder(pictures.parent, transforms.Compose([
        transforms.RandomAffine(45, (0.07, 0.07),
                                interpolation=transforms.InterpolationMode.BILINEAR),
        transforms.RandomResizedCrop(128, (0.4, 1.0), (1.0, 1.0)),
        transforms.ColorJitter(0.5, 0, 0.5, 0.5),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]))
    usual = torch.utils.data.DataLoader(usual, 2 * micro, num_workers=CORES)
    usual_rate = views_a_second(iter(usual), 2 * micro)
    yield Row("views of 128 px from crops of 224, a core, as many processes as cores",
              f"{rate:.0f} views/s", f"{usual_rate:.0f} views/s", f"{rate / usual_rate:.2f}",
              "torchvision's transforms on PIL pictures")


def views_a_second(batches, views):
    """Of each process of a loader of batches of so many views."""
    for _ in range(2 * CORES):  # those that were made while the processes started
        next(batches)
    start = time.time()
    count = sum(1 for _ in batches)
    return count * views / (time.time() - start) / CORES


def step(folder, batch=32, steps=30):
    """A dry run of pretrain.py, its loader included, beside forward and backward of the backbone
    alone on tensors that are there already."""
    hands = write_hands(folder / "hands", made_up_hands(400), np.arange(400) // 100, 224)
    printed, _, _ = run("pretrain.py", hands, "--out", folder / "run", "--weights", "none",
                        "--device", "cpu", "--backbone", "resnet18", "--input-size", 64,
                        "--batch-size", batch, "--micro-batch", batch, "--steps", steps)
    rate, memory = re.search(r"(\d+) views/s, .*? a step, ([\d.]+ GB)", printed).groups()
    bare = bare_network(torchvision.models.resnet18(), 2 * batch)
    yield Row(f"resnet18, 64 px, {batch} pairs, {batch} at a time, fp32, CPU",
              f"{rate} views/s, {memory}", f"{bare:.0f} views/s", f"{float(rate) / bare:.2f}",
              "the bare network")


def bare_network(network, images, times=10):
    """Pictures of 64 px a second of forward and backward, on the CPU."""
    network = network.to(memory_format=torch.channels_last).train()
    pictures = torch.randn(images, 3, 64, 64).to(memory_format=torch.channels_last)
    for k in range(2 * times):  # the first half warms up
        if k == times:
            start = time.time()
        outputs = network(pictures)
        sum(output.sum() for output in outputs).backward()
    return times * images / (time.time() - start)


def loss(folder, few=1024, many=8192):
    """Weights or targets, with gradient. A (2N, 2N, 21, 2) tensor would be too large for many."""
    pool = SPAWN.Pool(1, maxtasksperchild=1)  # each in a process of its own
    for ours in (weighted_loss, soft_loss):
        for pairs in (few, many):
            seconds, memory = pool.apply(time_loss, (ours, pairs))
            reference = ()
            if ours == soft_loss and pairs == few:
                slow, much = pool.apply(time_loss, (broadcast, pairs))
                reference = (f"{slow:.2f} s, {much:.2f} GB",
                             f"{slow / seconds:.1f}, {much / memory:.1f}", "broadcasting")
            yield Row(f"{ours.__name__.replace('_', ' ')}, {pairs} pairs",
                      f"{seconds:.2f} s, {memory:.2f} GB", *reference)
    pool.terminate()


def time_loss(loss, pairs):
    """-> the seconds that it takes, and the GB used beyond what was in use."""
    torch.manual_seed(0)
    k1, k2 = torch.rand(2, pairs, 21, 2) * 128
    z1, z2 = torch.randn(2, pairs, 128, requires_grad=True)
    before = peak_memory()
    for _ in range(2):  # the first one warms up
        start = time.time()
        loss(F.normalize(z1), F.normalize(z2), k1, k2).backward()
    return time.time() - start, peak_memory() - before


def weighted_loss(z1, z2, k1, k2):
    return common.nt_xent(z1, z2, *common.pair_weights(k1, k2))


def soft_loss(z1, z2, k1, k2):
    return common.nt_xent(z1, z2, target=common.soft_targets(k1, k2, 0.06))


def broadcast(z1, z2, k1, k2):
    """soft_loss by one tensor (2N, 2N, 21, 2), and all (2N, 2N) similarities at once."""
    every = torch.cat([k1, k2])
    every = every - every.mean(1, keepdim=True)
    every = F.normalize(every.flatten(1)).view_as(every) * 21 ** 0.5
    distances = (every[:, None] - every[None]).square().sum(3).sqrt().mean(2)
    target = distances.fill_diagonal_(torch.inf).div(-0.06).softmax(1)
    z = torch.cat([z1, z2])
    similarities = (z @ z.T / 0.5).fill_diagonal_(-1e9)
    return -(target * similarities.log_softmax(1)).sum(1).mean()


def tune(folder, count=400, batch=16):
    """An epoch of finetune.py, its loader included, beside DetNet's forward and backward on tensors
    that are there already."""
    run("finetune.py", *write_labels(folder, count), "--out", folder / "run", "--weights", "none",
        "--backbone", "resnet18", "--input-size", 64, "--batch-size", batch, "--epochs", 2,
        "--device", "cpu")
    rows = common.read_log(folder / "run" / "log.jsonl")
    rate = next(row for row in rows if row.get("epoch") == 2)["pictures_per_s"]
    bare = bare_network(finetune.DetNet("resnet18", "none"), batch)
    yield Row(f"DetNet on resnet18, 64 px, batch {batch}, fp32, CPU", f"{rate:.0f} pictures/s",
              f"{bare:.0f} pictures/s", f"{rate / bare:.2f}", "the bare network")


# -------------------------------------------------------------------- estimates for whole data sets

# Hours of video, and megapixels of a frame. Ego4D's are those of its own list of 9,650 videos.
PLANS = {"10 h": (10, 2.07), "1,000 h": (1000, 2.07), "4,000 h": (4000, 2.07),
         "Ego4D: 3,877 h, 2.24 MP": (3877, 2.24)}
PLANS_COLUMNS = ["1920 x 1080, one frame a second, one hand a frame", *PLANS, "sum"]


def estimate(path):
    """What each stage would take, from what the other stages measured into the same file."""
    hours, megapixels = np.array([*PLANS.values()]).T
    hands = 3600 * hours  # as many as frames
    fps = measured(path, "large", "1080p")[0]
    half = measured(path, "mine", "250000 hands")[0]
    seconds, memory = measured(path, "mine", "500000 hands")
    growth = np.log2(seconds / half)
    copies = measured(path, "mine", "noticing copies")[0]
    views = measured(path, "step", "32 at a time")[0]

    def row(what, values, words):
        return [what, *(f"{x:,.0f}" if x >= 10 else f"{x:.2g}" for x in values), words]

    yield row("extract, hours of one core", hands / fps * megapixels / 2.07 / 3600,
              f"frames / {fps:g} a second x megapixels / 2.07")
    yield row("hands folder, GB of disk", hands * 13.4e-6,
              "13.4 KB a crop, as those of signers' videos have")
    yield row(f"mine, hours of {CORES} cores",
              (seconds * (hands / 5e5) ** growth + copies / 1e6 * hands) / 3600,
              f"{seconds:g} s x (hands / 0.5M) ^ {growth:.2f}, as from 250,000 to 500,000, and "
              f"{copies:g} µs a hand for copies")
    yield row("mine, GB of memory", hands / 5e5 * memory, f"{memory:g} GB for 500,000 hands")
    yield row("pre-train ResNet-18 at 64 px for 100 epochs, hours of these cores",
              200 * hands / views / 3600, f"2 views x 100 x hands / {views:g} a second")


def measured(path, stage, what):
    """The numbers in the cell "ours" of a stage's first row of that name."""
    for line in read_blocks(path).get(stage, "").splitlines():
        cells = line.removeprefix("| ").split(" | ")
        if what in cells[0]:
            return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", cells[1])]
    sys.exit(f"{path}: no row of {stage} with \"{what}\", run that stage first")


STAGES = {"extract": extract, "large": large, "mine": mine, "loader": loader, "loss": loss,
          "step": step, "finetune": tune}
TINY = {"extract": dict(clips=4, seconds=1, copies=1), "large": dict(seconds=1, copies=4),
        "mine": dict(counts=(500, 1000)), "loader": dict(micro=4),
        "loss": dict(few=32, many=64), "step": dict(batch=4, steps=2),
        "finetune": dict(count=40, batch=4)}

if __name__ == "__main__":
    main()
