"""Speed and memory, each figure beside a reference measured in the same run.

    python tests/bench.py extract      beside bare MediaPipe; the merge and the annotations of 2.0M hands
    python tests/bench.py mine         125,000 to 2.0M hands beside FAISS (pip install faiss-cpu; not needed otherwise)
    python tests/bench.py loader       views a second beside torchvision's transforms, and beside decoding alone
    python tests/bench.py loss         weights, loss and gradient of a batch beside the obvious way
    python tests/bench.py step         pretrain.py beside a bare ResNet: the paper's on a GPU, a small one on a CPU
    python tests/bench.py finetune     finetune.py beside the bare network, and its loader alone
    python tests/bench.py evaluate     a million samples beside a loop
    python tests/bench.py all

Prints one table, in Markdown. Every figure is wall-clock time, start-up of the processes included, unless it says
otherwise; run it on an idle machine. Takes minutes and, in a temporary folder (TMPDIR says where), 8 GB of disk.
"""

import argparse
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

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "real" / "handpose3d_stereo"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "all"])
    stage = parser.parse_args().stage
    processor = Path("/proc/cpuinfo").read_text().splitlines()
    model = [line.split(":")[1].strip() for line in processor if line.startswith("model name")]
    versions = [f"{name} {importlib.metadata.version(name)}"
                for name in ("torch", "opencv-python-headless", "mediapipe")]
    print(f"{len(os.sched_getaffinity(0))} cores of {model[0] if model else platform.machine()}, "
          f"Python {platform.python_version()}, {', '.join(versions)}; one run\n", flush=True)
    print("| stage | what | ours | reference | ratio | the reference is |\n|---|---|---|---|---|---|")
    for name in STAGES if stage == "all" else [stage]:
        with tempfile.TemporaryDirectory() as folder:
            for what, ours, reference, ratio, note in STAGES[name](Path(folder)):
                print(f"| {name} | {what} | {ours} | {reference} | {ratio} | {note} |", flush=True)


def script(*arguments):
    """Run a Python script. -> seconds, peak memory in GB of its main process."""
    start, memory = time.time(), 0
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([sys.executable, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            memory = max([memory, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))])
            time.sleep(0.02)
        if process.returncode:
            errors.seek(0)
            sys.exit(f"{arguments[0]} failed: {errors.read()[-500:]}")
    return time.time() - start, memory / 2 ** 20


# ---------------------------------------------------------------------------------------------- extraction

def extract(folder):
    """Rendered videos of 640 x 480 at 30 frames a second that change 5 times a second, looked at 5 times a second."""
    import synthetic

    synthetic.write_videos(folder / "rendered", videos=8, seconds=8, fps=5, size=(640, 480), seed=0)
    (folder / "videos").mkdir()
    for path in sorted((folder / "rendered").glob("*.mp4")):
        source = cv2.VideoCapture(str(path))
        first = folder / "videos" / f"{path.stem}-0.mp4"
        writer = cv2.VideoWriter(str(first), cv2.VideoWriter_fourcc(*"mp4v"), 30, (640, 480))
        while True:
            good, image = source.read()
            if not good:
                break
            for _ in range(6):
                writer.write(image)
        writer.release()
        for copy in range(1, 4):
            shutil.copy(first, folder / "videos" / f"{path.stem}-{copy}.mp4")
    yield from compare(folder, folder / "videos", 5, "rendered, 640 x 480, --fps 5", [1, 2])
    if REAL.is_dir():
        (folder / "real").mkdir()
        for path in REAL.glob("*.mp4"):
            for copy in range(16):
                shutil.copy(path, folder / "real" / f"{path.stem}-{copy}.mp4")
        yield from compare(folder, folder / "real", 1, "real clips, 720 x 720, --fps 1", [2])
    yield from merge(folder)
    yield from annotations(folder)


def compare(folder, videos, fps, what, processes, rounds=2):
    """Frames a second of extraction, and of processes that only decode the same videos and call MediaPipe. A run over
    all videos less one over the first quarter: what starting takes is given apart."""
    import extract_hands

    model = extract_hands.find_model(None)  # before the clock runs: it may have to be made
    paths, rates = sorted(videos.glob("*.mp4")), {}
    lists = folder / "quarter.txt", folder / "all.txt"
    for path, chosen in zip(lists, (paths[::4], paths)):
        path.write_text("".join(f"{video}\n" for video in chosen))
    for workers in processes:
        seconds, frames = np.zeros((2, 2)), np.zeros((2, 2), int)
        for part, path in [*enumerate(lists)] * rounds:
            shutil.rmtree(folder / "hands", ignore_errors=True)
            seconds[0, part] += script(ROOT / "extract_hands.py", path, "--out", folder / "hands", "--fps", fps,
                                       "--workers", workers)[0]
            frames[0, part] += json.loads((folder / "hands" / "log.jsonl").read_text().splitlines()[-1])["frames"]
            start = time.time()
            context = multiprocessing.get_context("spawn")
            counts = context.Array("i", workers)
            cores, chosen = sorted(os.sched_getaffinity(0)), path.read_text().splitlines()
            bare = [context.Process(target=bare_mediapipe,
                                    args=(model, counts, k, cores[k % len(cores)],
                                          chosen[k::workers], fps))
                    for k in range(workers)]
            for process in bare:
                process.start()
            for process in bare:
                process.join()
            seconds[1, part] += time.time() - start
            frames[1, part] += sum(counts)
        assert (frames[0] == frames[1]).all(), f"ours and the reference looked at other frames: {frames}"
        rates[workers] = ours, reference = (frames[:, 1] - frames[:, 0]) / (seconds[:, 1] - seconds[:, 0])
        starting = (seconds[:, 0] - frames[:, 0] / rates[workers]) / rounds
        yield (f"{what}, {workers} worker{'s' * (workers > 1)}, {frames[0].sum()} frames", f"{ours:.1f} frames/s",
               f"{reference:.1f} frames/s", f"{ours / reference:.2f}", "decoding and bare MediaPipe, as many processes")
        yield ("start-up and end of these", f"{starting[0]:.1f} s", f"{starting[1]:.1f} s", "", "the same")
    if len(rates) > 1:
        yield (f"{what}, 2 workers over 1", f"{rates[2][0] / rates[1][0]:.2f}", f"{rates[2][1] / rates[1][1]:.2f}", "",
               "the same of bare MediaPipe")


def bare_mediapipe(model, counts, k, core, paths, fps):
    os.sched_setaffinity(0, {core})
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    import mediapipe

    options = mediapipe.tasks.vision.HandLandmarkerOptions(
        base_options=mediapipe.tasks.BaseOptions(model_asset_path=model), num_hands=2)
    detector = mediapipe.tasks.vision.HandLandmarker.create_from_options(options)
    for path in paths:
        video, due = cv2.VideoCapture(str(path)), 0
        while video.grab():
            if video.get(cv2.CAP_PROP_POS_MSEC) / 1000 >= due / fps - 1e-4:
                picture = cv2.cvtColor(video.retrieve()[1], cv2.COLOR_BGR2RGB)
                detector.detect(mediapipe.Image(mediapipe.ImageFormat.SRGB, picture))
                counts[k] += 1
                due += 1


def merge(folder, videos=30_000, hands=2_000_000):
    """Parts of that many hands, made up, with one crop of 32 px for all; then the command that merges them. Then one
    more video."""
    from common import HANDS_DTYPE
    import extract_hands

    rng, out = np.random.default_rng(0), folder / "merged"
    jpeg = cv2.imencode(".jpg", rng.integers(0, 255, (32, 32, 3), np.uint8))[1]
    names = [f"{k % 100:02d}/{k:05d}.mp4" for k in range(videos + 1)]
    counts = np.diff(np.linspace(0, hands, videos + 1).round().astype(int)).tolist() + [50]
    for what, first, last in (("merge", 0, videos), ("one video more,", videos, videos + 1)):
        (out / "parts").mkdir(parents=True, exist_ok=True)
        for name, count in zip(names[first:last], counts[first:last]):
            rows = np.zeros(count, HANDS_DTYPE)
            rows["frame"] = np.arange(count)
            path = extract_hands.part_path(out, name)
            np.savez(path, lengths=np.full(count, len(jpeg)), hands=rows, frames=count, reason="",
                     keypoints=rng.uniform(0, 32, (count, 21, 2)).astype(np.float32))
            with zipfile.ZipFile(path, "a") as part:
                part.writestr("crops", jpeg.tobytes() * count)
        (folder / "list.txt").write_text("".join(f"{folder}/{name}\n" for name in names[:last]))
        seconds, memory = script(ROOT / "extract_hands.py", folder / "list.txt", "--out", out, "--size", 32)
        assert len(np.load(out / "keypoints.npy", mmap_mode="r")) == sum(counts[:last])
        yield (f"{what} {last} videos, {sum(counts[:last])} hands, crops of {len(jpeg)} bytes",
               f"{seconds:.0f} s, {memory:.2f} GB", "", "", "at most 2 GB wanted")
    shutil.rmtree(out)


def annotations(folder, hands=2_000_000):
    """A file like SiMHand's own, with that many hands, made up; then what it takes to read it."""
    rng = np.random.default_rng(0)
    points = [str(rng.uniform(0, 1, 63).tolist()) for _ in range(1000)]
    with open(folder / "hands.json", "w") as file:
        file.write('{"images": [')
        file.write(", ".join(f'{{"id": {k}, "file_name": "Ego4D/{k % 30_000:05d}/{k:07d}.jpg", "width": 1920, '
                             f'"height": 1080}}' for k in range(hands)))
        file.write('], "annotations": [')
        for k in range(hands):
            file.write(f'{", " * (k > 0)}{{"hand_id": "{k}", "image_id": {k}, "boxes": "[600.5, 300.25, 800.5, 500]", '
                       f'"left_right": "Left", "keypoint_25d": {points[k % 1000]}, '
                       f'"positive_sample": [{hands - 1 - k}], "distance": [0.123456789]}}')
        file.write("]}")
    size = (folder / "hands.json").stat().st_size / 1e9
    seconds, memory = script("-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import extract_hands; "
                             f"a = extract_hands.load_annotations({str(folder / 'hands.json')!r}, '/'); "
                             f"assert len(a.rows) == {hands} and len(a.given) == 30_000")
    (folder / "hands.json").unlink()
    yield (f"annotations, {hands} hands, a file of {size:.1f} GB", f"{seconds:.0f} s, {memory:.2f} GB", "", "",
           "at most 8 GB wanted")


# ---------------------------------------------------------------------------------------------- mining

def mine(folder, sizes=(125_000, 250_000, 500_000, 1_000_000, 2_000_000), queries=2000):
    """The script on hands folders of made-up hands, 100 of a video, beside FAISS's brute force on some queries."""
    from common import HANDS_DTYPE

    try:
        import faiss
    except ImportError:
        faiss = None
    hands, threads = folder / "hands", len(os.sched_getaffinity(0))
    hands.mkdir()
    everything = made_up_hands(max(sizes))
    jpeg = cv2.imencode(".jpg", np.zeros((16, 16, 3), np.uint8))[1]
    for size in sizes:
        rows = np.zeros(size, HANDS_DTYPE)
        rows["video"], rows["frame"] = np.arange(size) // 100, np.arange(size) % 100
        np.save(hands / "hands.npy", rows)
        np.save(hands / "keypoints.npy", everything[:size] * 16)
        np.save(hands / "offsets.npy", np.arange(size + 1) * len(jpeg))
        np.save(hands / "crops.npy", np.tile(jpeg, size))
        (hands / "videos.txt").write_text("a.mp4\n" * (size // 100))
        seconds, memory = script(ROOT / "mine_pairs.py", hands)
        ours, reference, ratio = f"{seconds:.0f} s, {memory:.2f} GB", "", ""
        if faiss:
            embeddings = np.load(hands / "embeddings.npy")
            index = faiss.IndexFlatL2(embeddings.shape[1])
            index.add(embeddings)
            faiss.omp_set_num_threads(threads)
            start = time.time()
            index.search(embeddings[::size // queries], 2)
            flat = (time.time() - start) * size / len(embeddings[::size // queries])
            reference, ratio = f"{flat:.0f} s", f"{flat / seconds:.1f}"
        yield (f"{size} hands, top-1 of other videos, {threads} cores", ours, reference, ratio,
               f"FAISS IndexFlatL2, {queries} of the queries, times {size // queries}; it excludes nothing")


def made_up_hands(count, length=100, seed=0):
    """Keypoints (count, 21, 2) in crops of side 1 of hands with five fingers that turn and bend slowly: within one of
    the videos of `length` frames they are near-duplicates."""
    rng = np.random.default_rng(seed)

    def walk(dims, keep=0.998):
        steps = rng.normal(size=(length, count // length, dims)).astype(np.float32)
        for k in range(1, length):
            steps[k] = keep * steps[k - 1] + (1 - keep ** 2) ** 0.5 * steps[k]
        return steps.swapaxes(0, 1).reshape(count, dims)

    bend = np.radians(45 + 35 * walk(5)[:, :, None] + 12 * walk(15).reshape(count, 5, 3)).clip(-0.3, 1.8)
    spread = np.radians(np.array([-55, -15, 0, 12, 25]) + 5 * walk(5))
    roots = np.array([[-2.5, 3], [-2.2, 8.6], [0, 9], [1.9, 8.4], [3.6, 7.6]])
    bones = np.array([[3.6, 3.2, 2.6], [4.4, 2.6, 2.2], [4.9, 3, 2.4], [4.5, 2.8, 2.4], [3.5, 2.1, 2]])
    joints = np.zeros((count, 21, 3), np.float32)  # cm, the wrist at 0
    for finger in range(5):
        joints[:, 1 + 4 * finger, :2], angle = roots[finger], 0
        for k in range(3):
            angle = angle + bend[:, finger, k] * (0.5 if finger == 0 else 1)
            way = np.stack([np.sin(spread[:, finger]) * np.cos(angle), np.cos(spread[:, finger]) * np.cos(angle),
                            -np.sin(angle)], 1)
            joints[:, 2 + 4 * finger + k] = joints[:, 1 + 4 * finger + k] + bones[finger, k] * way
    w, x, y, z = (turn := walk(4)).T / np.linalg.norm(turn, axis=1)
    seen = np.stack([1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w),
                     2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)], 1).reshape(-1, 2, 3)
    points = joints @ seen.transpose(0, 2, 1) + 0.08 * rng.normal(size=(count, 21, 2)).astype(np.float32)
    low, high = points.min(1), points.max(1)
    side = 1.3 * (high - low).max(1)[:, None, None]
    return ((points - (low + high)[:, None] / 2) / side + 0.5).astype(np.float32)


# ---------------------------------------------------------------------------------------------- pre-training

def hands_folder(folder, count):
    """A mined hands folder of `count` crops of 224 px, those of the real clips (else of rendered videos) repeated."""
    source = REAL
    if not REAL.is_dir():
        import synthetic

        source = folder / "videos"
        synthetic.write_videos(source, videos=8, seconds=4, fps=10, size=(640, 480), seed=0)
    script(ROOT / "extract_hands.py", source, "--out", folder / "hands", "--fps", 10)
    sizes, first = np.diff(np.load(folder / "hands" / "offsets.npy")), np.load(folder / "hands" / "keypoints.npy")
    times = -(-count // len(first))
    crops = np.load(folder / "hands" / "crops.npy")
    rows = np.tile(np.load(folder / "hands" / "hands.npy"), times)[:count]
    offsets = np.concatenate([[0], np.cumsum(np.tile(sizes, times)[:count])])
    np.save(folder / "hands" / "crops.npy", np.tile(crops, times)[:offsets[-1]])
    np.save(folder / "hands" / "offsets.npy", offsets)
    np.save(folder / "hands" / "keypoints.npy", np.tile(first, (times, 1, 1))[:count])
    np.save(folder / "hands" / "hands.npy", rows)
    np.save(folder / "hands" / "neighbours.npy", np.roll(np.arange(count), 1)[:, None])
    return folder / "hands", len(first)


def loader(folder, micro=128):
    """Views of 128 px made by as many processes as there are cores, in the loader of pretrain.py."""
    import torch
    from PIL import Image
    from torchvision import transforms
    import common
    import pretrain

    torch.set_num_threads(1)
    processes = len(os.sched_getaffinity(0))
    batches = 20 * processes
    hands, crops = hands_folder(folder, micro * batches)
    sys.argv = ["pretrain.py", str(hands), "--out", "unused", "--batch-size", str(micro),
                "--workers", str(processes)]
    args = pretrain.parse_args()
    data = pretrain.load_data(args)
    jpegs, offsets = data.folders[0].crops, data.folders[0].offsets
    transform = transforms.Compose([
        transforms.RandomAffine(45, (0.07, 0.07), interpolation=transforms.InterpolationMode.BILINEAR),
        transforms.RandomResizedCrop(128, (0.4, 1.0), (1.0, 1.0)), transforms.ColorJitter(0.5, 0, 0.5, 0.5),
        transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])

    def usual(rows):
        files = (io.BytesIO(jpegs[offsets[i]:offsets[i + 1]]) for i in rows for _ in (0, 1))
        return torch.stack([transform(Image.open(file).convert("RGB")) for file in files])

    rates = []
    plan = pretrain.make_plan(args, len(data.pool), 0, 1, torch.device("cpu"))
    items = pretrain.hands_of_steps(0, batches, len(data.pool), plan, args)
    for views in (common.load_items(pretrain.Pairs(data, args), items, processes, pretrain.collate),
                  torch.utils.data.DataLoader(range(micro * batches), batch_size=micro, collate_fn=usual,
                                              num_workers=processes, worker_init_fn=common.start_worker)):
        views, times = iter(views), []
        for _ in range(2 * processes):
            next(views)  # made while the processes started
        for _ in range(3):
            start = time.time()
            for _ in range((batches - 2 * processes) // 4):
                next(views)
            times.append(time.time() - start)
        rates.append((batches - 2 * processes) // 4 * 2 * micro / min(times) / processes)
    yield (f"views of 128 px from {crops} crops, per core, {processes} processes", f"{rates[0]:.0f} views/s",
           f"{rates[1]:.0f} views/s", f"{rates[0] / rates[1]:.2f}", "torchvision's transforms on PIL pictures")
    cv2.setNumThreads(0)
    seconds = []
    for work in (pretrain.make_pair, lambda data, i, *_: cv2.imdecode(jpegs[offsets[i]:offsets[i + 1]], 1)):
        times = []
        for _ in range(8):
            start = time.time()
            for i in range(200):
                work(data, i, 0, args)
            times.append(time.time() - start)
        seconds.append(min(times))
    yield ("the same, in one process, no loader around", f"{400 / seconds[0]:.0f} views/s",
           f"{200 / seconds[1]:.0f} crops/s", f"{2 * seconds[1] / seconds[0]:.2f}", "decoding the crops alone")


def step(folder):
    """Dry runs of pretrain.py, its loader included, beside forward and backward of the backbone alone on tensors that
    are already on the device, as many views at a time as pass the network together."""
    import torch

    gpu = torch.cuda.is_available()
    backbone, size, runs = ("resnet50", 128, ((512, 512, 40), (8192, 512, 6))) if gpu else \
        ("resnet18", 64, ((32, 32, 30), (32, 8, 30)))
    where = f"bf16, {torch.cuda.get_device_name()}" if gpu else "fp32, CPU"
    hands, _ = hands_folder(folder, max(batch for batch, _, _ in runs))
    for batch, micro, steps in runs:
        for flags in ((), ("--compile",)) if gpu else ((),):
            command = ("--out", folder / "run", "--backbone", backbone, "--weights", "none", "--input-size", size,
                       "--batch-size", batch, "--micro-batch", micro, "--steps", steps, *flags)
            ours = subprocess.run([sys.executable, *map(str, (ROOT / "pretrain.py", hands, *command))],
                                  capture_output=True, text=True)
            if ours.returncode:
                sys.exit(ours.stderr[-500:])
            bare = bare_rate(backbone, 2 * micro, size, compiled=bool(flags))
            rate, memory = re.search(r"(\d+) views/s, .*? a step, ([\d.]+ GB)", ours.stdout).groups()
            yield (f"{backbone}, {size} px, {batch} pairs, {micro} at a time{', compiled' * len(flags)}, {where}",
                   f"{rate} views/s, {memory}", f"{bare:.0f} views/s", f"{float(rate) / bare:.2f}",
                   "the bare network" + ("; ours embeds twice: 0.75 at most" if micro < batch else ""))


def bare_network(name, images, size, detnet=False, compiled=False, times=10):
    """Prints pictures a second of forward and backward, of a ResNet or of DetNet on it."""
    import torch
    import torchvision
    import finetune

    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = finetune.DetNet(name, "none") if detnet else torchvision.models.get_model(name)
    network = network.to(device, memory_format=torch.channels_last).train()
    if compiled:
        network.compile()
    pictures = torch.randn(images, 3, size, size, device=device).to(memory_format=torch.channels_last)
    for k in range(2 * times):
        if k == times:
            (torch.cuda.synchronize if device == "cuda" else int)()
            start = time.time()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            outputs = network(pictures)
        sum(output.float().sum() for output in (outputs if detnet else [outputs])).backward()
    (torch.cuda.synchronize if device == "cuda" else int)()
    print(times * images / (time.time() - start))


def bare_rate(*arguments, **more):
    """-> what `bare_network` prints, run in a process of its own."""
    code = (f"import sys; sys.path[:0] = [{str(ROOT / 'tests')!r}]; import bench; "
            f"bench.bare_network(*{arguments!r}, **{more!r})")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return float(result.stdout) if result.returncode == 0 else sys.exit(result.stderr[-500:])


def loss(folder):
    """Weights, loss and gradient of one batch, beside the same with a (2N, 2N, 21, 2) tensor."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for pairs in (1024, 8192):
        seconds, memory = measure_loss(pairs, device, False)
        ours = f"{seconds:.2f} s, {memory:.2f} GB"
        if pairs == 8192:
            yield f"{pairs} pairs, {device}", ours, "", "", "at most 6 GB wanted"
        else:
            slow, much = measure_loss(pairs, device, True)
            yield (f"{pairs} pairs, {device}", ours, f"{slow:.2f} s, {much:.2f} GB",
                   f"{slow / seconds:.1f}, {much / memory:.1f}", "broadcasting")


def measure_loss(pairs, device, reference):
    """In a process of its own -> seconds, and GB used beyond what was in use before."""
    code = f"""if True:
        import pathlib, sys, time, torch
        sys.path.insert(0, {str(ROOT)!r})
        from common import nt_xent, pair_weights

        def used():
            if {device!r} == "cuda":
                return torch.cuda.max_memory_allocated()
            status = pathlib.Path("/proc/self/status").read_text().splitlines()
            return [int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")][0]

        def broadcast(k1, k2):
            every = torch.cat([k1, k2])
            d = (every[:, None] - every[None]).square().sum(3).sqrt().mean(2)
            p = (k1 - k2).square().sum(2).sqrt().mean(1)
            return ((x.max() - x) / (x.max() - x.min()) for x in (p, d))

        def plain(z1, z2, pos_weight, neg_weight):
            z = torch.cat([z1, z2])
            itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
            logits = (z @ z.T * neg_weight / 0.5).masked_fill(itself, -1e9)
            return (logits.logsumexp(1) - ((z1 * z2).sum(1) * pos_weight / 0.5).repeat(2)).mean()

        torch.manual_seed(0)
        k1, k2 = torch.rand(2, {pairs}, 21, 2, device={device!r}) * 128
        z1, z2 = (torch.randn({pairs}, 128, device={device!r}).requires_grad_() for _ in range(2))
        weigh, loss = (broadcast, plain) if {reference} else (pair_weights, nt_xent)
        before, times = used(), []
        for _ in range(3 if {pairs} == 1024 else 1):
            start = time.time()
            loss(*(torch.nn.functional.normalize(z, dim=1) for z in (z1, z2)), *weigh(k1, k2)).backward()
            z1.grad.sum().item()
            times.append(time.time() - start)
        print(min(times), (used() - before) / 2 ** 30)
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return map(float, result.stdout.split()) if result.returncode == 0 else sys.exit(result.stderr)


# ---------------------------------------------------------------------------------------------- fine-tuning

def tune(folder):
    """An epoch of finetune.py, its loader included, beside DetNet's forward and backward on tensors that are already on
    the device. The pictures are rendered, few of them repeated."""
    import synthetic
    import torch
    import common
    import finetune

    gpu = torch.cuda.is_available()
    backbone, size, batch, times = ("resnet50", 128, 128, 40) if gpu else ("resnet18", 64, 16, 2)
    synthetic.write_freihand(folder / "few", train=50, evaluation=8, seed=0)
    shutil.copytree(folder / "few", folder / "set")
    shutil.copytree(folder / "few_eval", folder / "set_eval")
    for name in ("K", "xyz"):
        path = folder / "set" / f"training_{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) * times))
    rgb = folder / "set" / "training" / "rgb"
    for picture in rgb.iterdir():
        picture.unlink()
    for k in range(4 * 50 * times):  # version by version, each of 50 x times samples
        version, sample = divmod(k, 50 * times)
        os.link(folder / "few" / "training" / "rgb" / f"{50 * version + sample % 50:08d}.jpg", rgb / f"{k:08d}.jpg")
    command = ["finetune.py", "--dataset", "freihand", "--root", folder / "set", "--out", folder / "run", "--weights",
               "none", "--backbone", backbone, "--input-size", size, "--batch-size", batch, "--epochs", 2]
    script(ROOT / command[0], *command[1:])
    rows = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    ours = [row["pictures_per_s"] for row in rows if row.get("epoch") == 2][0]
    bare = bare_rate(backbone, batch, size, detnet=True)
    where = f"bf16, {torch.cuda.get_device_name()}" if gpu else "fp32, CPU"
    yield (f"DetNet on {backbone}, {size} px, batch {batch}, {where}", f"{ours:.0f} pictures/s",
           f"{bare:.0f} pictures/s", f"{ours / bare:.2f}", "the bare network")
    sys.argv = list(map(str, command))
    args = finetune.parse_args()
    torch.set_num_threads(1)
    for width, height in ((224, 224), (640, 480)):  # FreiHAND's and DexYCB's
        if width > 224:
            for picture in {path.stat().st_ino: path for path in rgb.iterdir()}.values():
                large = cv2.resize(cv2.imread(str(picture)), (width, height), interpolation=cv2.INTER_CUBIC)
                picture.write_bytes(cv2.imencode(".jpg", large)[1])  # its other names show it too
            path, scale = folder / "set" / "training_K.json", np.diag([width / 224, height / 224, 1])
            path.write_text(json.dumps((scale @ json.loads(path.read_text())).tolist()))
        train = finetune.load_data(args).train
        steps = len(train) // batch
        plan = finetune.Plan(0, 1, torch.device("cpu"), "fp32", steps, 10 * steps)
        batches = finetune.rows_of_steps(0, len(train), plan, args)
        pictures = finetune.Pictures(train, finetune.make_crops(args))
        loader = common.load_items(pictures, batches, args.workers, finetune.collate)
        for _ in range(3 * steps):
            next(loader)  # made while the processes started
        start = time.time()
        for _ in range(6 * steps):
            next(loader)
        rate = 6 * steps * batch / (time.time() - start)
        yield (f"its loader alone, {args.workers} processes, pictures of {width} x {height}", f"{rate:.0f} pictures/s",
               f"{bare:.0f} pictures/s", f"{rate / bare:.1f}", "the bare network")


# ---------------------------------------------------------------------------------------------- evaluation

def score(folder):
    """The whole of evaluate.py on a million samples, a tenth of their joints not valid, bootstrap and plots included;
    beside a loop over 5,000 samples, scaled up, that takes the aligned error alone, as FreiHAND's evaluation does."""
    from scipy.linalg import orthogonal_procrustes

    rng, shape = np.random.default_rng(0), (1_000_000, 21, 3)
    truth = rng.normal(0, 40, shape).astype(np.float32) + np.float32([0, 0, 600])
    truth[:, 9] = truth[:, 0] + np.float32([0, 90, 0])
    np.save(folder / "gt_xyz.npy", truth)
    prediction = truth + rng.normal(0, 15, shape).astype(np.float32)
    np.save(folder / "pred_xyz.npy", prediction)
    np.save(folder / "valid.npy", rng.uniform(size=shape[:2]) > 0.1)
    start = time.time()
    for t, p in zip(truth[:5000].astype(float), prediction[:5000].astype(float)):
        t, p = t - t.mean(0), p - p.mean(0)
        rotation, size = orthogonal_procrustes(t, p / np.linalg.norm(p))
        np.linalg.norm(p / np.linalg.norm(p) @ rotation.T * size - t, axis=1)
    loop = (time.time() - start) * len(truth) / 5000
    del truth, prediction
    seconds, memory = script(ROOT / "evaluate.py", folder)
    yield ("1,000,000 samples, all metrics, 1,000 resamples", f"{seconds:.0f} s, {memory:.2f} GB", f"{loop:.0f} s",
           f"{loop / seconds:.1f}", "a loop for PA-MPJPE alone")


STAGES = {"extract": extract, "mine": mine, "loader": loader, "loss": loss, "step": step, "finetune": tune,
          "evaluate": score}

if __name__ == "__main__":
    main()
