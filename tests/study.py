"""Does mining similar hands help, and when? A controlled study on rendered hands, where
everything is known.

Renders videos (many persons, backgrounds and lights, things in front of the hands) as the
pool, and labelled sets of other persons; finds the pool's hands with MediaPipe; pre-trains
with each method, all else equal, pictures seen included; probes each backbone by nearest
neighbours, fine-tunes the main methods on shares of the labels; 3 seeds. Ablations, and
pools of other sizes, have 1 seed. The CPU size takes some hours on two cores. Every
stage is a command, logged below OUT/logs; a second call goes on where the first stopped.
Ends with tests/study.md (what the mined pairs are, and a table for each experiment) and
tests/study.png.

    python tests/study.py                       # CPU size, for two cores
    # render, extract and mine alone, say on another machine
    python tests/study.py --size gpu --prepare
    python tests/study.py --size gpu --out study-gpu
"""

import argparse
import concurrent.futures
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# crop, input: px, of pre-training and fine-tuning alike; train, test: labelled hands, four
# pictures of each for training; tunings: share of the labels, steps, number of seeds; probes:
# shares of the labels for knn, the last one for the ablations too; pools: sizes of smaller pools,
# pre-trained on for as many steps.
SIZES = {
    "cpu": dict(videos=320, seconds=8, crop=128, backbone="resnet18", input=48, train=1200,
                test=300, batch=64, epochs=5, warmup=1, tune_batch=16,
                tunings=((0.01, 250, 3), (0.1, 400, 3), (0.1, 1200, 1)),
                probes=(0.01, 0.1, 1.0), seeds=(0, 1, 2), hands=12_000, pools=(1500, 3000, 6000),
                loader=("--workers", 0)),  # a lane a core: its own process makes the views
    "gpu": dict(videos=520, seconds=8, crop=128, backbone="resnet50", input=96, train=1200,
                test=500, batch=512, epochs=40, warmup=4, tune_batch=16,
                tunings=((0.01, 250, 3), (0.1, 400, 3), (0.1, 1200, 3), (1.0, 4000, 3)),
                probes=(0.01, 0.1, 1.0), seeds=(0, 1, 2), hands=20_000,
                pools=(2500, 5000, 10_000), loader=())}
HANDS = {"hands": (), "hands-paper": ("--margin", 1.3, "--border", "black")}
MINED = {"upright": ("--top-k", 5), "as-they-lie": ("--top-k", 5, "--no-rotation-free"),
         "temporal": ("--temporal",), "same-video": ("--same-video", "--top-k", 5)}
PAPER = ("--border", "black", "--crop-move", 0.067, "--weighting", "linear")
# Name: hands, pairs, flags of pretrain.py; None: no pre-training.
METHODS = {"none": None,
           "simclr": ("hands", "upright", "--method", "simclr"),
           "peclr": ("hands", "upright", "--method", "peclr"),
           "simhand-paper": ("hands-paper", "as-they-lie", *PAPER),
           "simhand": ("hands", "upright")}
ABLATIONS = {"weighting-linear": ("hands", "upright", "--weighting", "linear"),
             "weighting-balanced": ("hands", "upright", "--weighting", "balanced"),
             "balanced-positives": ("hands", "upright", "--weighting", "balanced",
                                    "--weight-on", "pos"),
             "balanced-all-pairs": ("hands", "upright", "--weighting", "balanced",
                                    "--weight-on", "neg"),
             "as-they-lie": ("hands", "as-they-lie"),
             "top5": ("hands", "upright", "--top-k", 5),
             "temporal": ("hands", "temporal"),
             "same-video": ("hands", "same-video")}
RESULTS = ROOT / "tests"
CORES = len(os.sched_getaffinity(0))
# Elsewhere bf16 is slower.
PRECISION = "bf16" if torch.cuda.is_available() or re.search(
    "avx512_bf16|amx_bf16", Path("/proc/cpuinfo").read_text()) else "fp32"


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="study", help="folder for everything (default: study)")
    parser.add_argument("--size", choices=sorted(SIZES), default="cpu")
    parser.add_argument("--prepare", action="store_true", help="stop before pre-training")
    parser.add_argument("--report", action="store_true",
                        help="train nothing: make the tables from the runs that are there")
    return parser.parse_args()


def main():
    args = parse_args()
    out, size, start = Path(args.out), SIZES[args.size], time.time()
    (out / "logs").mkdir(parents=True, exist_ok=True)
    jobs = CORES if args.size == "cpu" else 1
    for name, done, command in preparation(out, size):
        run(out, name, done, command, CORES)
    equal_pairs(out)
    if args.prepare:
        return
    if not args.report:
        follow_lanes(out, [lane(out, size, method, seed) for method, seed in plan(size)], jobs,
                     CORES // jobs)
    text = describe(out, size) + pair_report(out)
    panels = {}
    for title, folder, baseline, runs in comparisons(out, size):
        panels[title] = [run for run in runs if (run / "pred_xyz.npy").exists()]
        command = ("evaluate.py", *panels[title], "--seeds", "--baseline", baseline, "--out",
                   folder)
        printed = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT,
                                 capture_output=True, text=True)
        if printed.returncode:
            sys.exit(printed.stderr)
        text += f"\n### {title}\n\n" + (folder / "table.md").read_text()
    heading = ("# Does mining similar hands help?\n\n"
               f"Written by `python tests/study.py --size {args.size}`.\n\n")
    (RESULTS / "study.md").write_text(f"{heading}![The study's runs](study.png)\n\n{text}")
    draw(RESULTS / "study.png", panels)
    print(f"{text}\n{(time.time() - start) / 60:.0f} minutes in this call; wrote "
          f"{RESULTS}/study.md and study.png")


def follow_lanes(out, lanes, jobs, threads):
    """Run the commands of each lane in order, `jobs` lanes side by side; the first that
    fails ends all."""
    stop = threading.Event()

    def follow(lane):
        for name, done, command in lane:
            if not stop.is_set():
                try:
                    run(out, name, done, command, threads)
                except BaseException:
                    stop.set()
                    raise

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(follow, lane) for lane in lanes]:
            future.result()


def run(out, name, done, command, threads):
    """Run a command unless its last file is there; its output goes to a log, one line of it
    is said."""
    if done.exists():
        return
    start, log = time.time(), out / "logs" / f"{name}.log"
    with open(log, "a") as file:
        file.write(shlex.join(["python", *map(str, command)]) + "\n")
        file.flush()
        status = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, stdout=file,
                                stderr=subprocess.STDOUT,
                                env={**os.environ, "OMP_NUM_THREADS": str(threads)}).returncode
    if status:
        sys.exit(f"study.py: {name} ended with status {status}, see {log}; the same command goes "
                 "on where this stopped")
    print(f"{name}: {time.time() - start:.0f} s", flush=True)


def preparation(out, size):
    """-> name, last file, command of the stages before pre-training."""
    out = out.absolute()
    yield "videos", out / "videos" / f"person{size['videos'] // 2 - 1:03d}_clip2.mp4", (
        "tests/synthetic.py", "videos", out / "videos", "--videos", size["videos"], "--seconds",
        size["seconds"], "--fps", 5, "--objects", 0.5, "--seed", 0, "--workers", CORES)
    yield "labels", out / "labels_eval" / "evaluation_xyz.json", (
        "tests/synthetic.py", "freihand", out / "labels", "--train", size["train"], "--evaluation",
        size["test"], "--seed", 1)  # another seed: other persons and backgrounds
    for name, flags in HANDS.items():
        yield name, out / name / "hands.jpg", (
            "extract_hands.py", out / "videos", "--out", out / name, "--fps", 5, "--size",
            size["crop"], *flags)
    for name, flags in MINED.items():
        yield f"mine-{name}", out / "mined" / name / "pairs.jpg", (
            "mine_pairs.py", out / "hands", "--out", out / "mined" / name, *flags)
    for count in size["pools"]:
        yield f"mine-pool{count}", out / "pairs" / f"pool{count}" / "pairs.jpg", (
            "mine_pairs.py", out / "hands", "--out", out / "pairs" / f"pool{count}", "--limit",
            count, *MINED["upright"])


def equal_pairs(out):
    """OUT/pairs/NAME: the mined neighbours of those hands alone that have one of each kind:
    all methods see the same pictures equally often."""
    found = {name: np.load(out / "mined" / name / "neighbours.npy") for name in MINED}
    usable = np.all([neighbours[:, 0] >= 0 for neighbours in found.values()], 0)
    for name, neighbours in found.items():
        folder = out / "pairs" / name
        folder.mkdir(parents=True, exist_ok=True)
        turns = out / "mined" / name / "turns.npy"
        if turns.exists():
            np.save(folder / "turns.npy",
                    np.where(usable[:, None], np.load(turns), np.float32(np.nan)))
        np.save(folder / "neighbours.npy", np.where(usable[:, None], neighbours, -1))


def pools(size):
    """-> {method: pre-training} of the smaller pools, {method: epochs}: as many steps as
    with the whole pool."""
    methods = {f"pool{count}": ("hands", f"pool{count}") for count in size["pools"]}
    epochs = {f"pool{count}": round(size["epochs"] * size["hands"] / count)
              for count in size["pools"]}
    return methods, epochs


def plan(size):
    """-> (method, seed) of all that is compared, the most telling first."""
    main = [(method, seed) for seed in size["seeds"] for method in METHODS]
    return main + [(method, size["seeds"][0]) for method in (*pools(size)[0], *ABLATIONS)]


def lane(out, size, method, seed):
    """-> name, last file, command of one method's stages, for one seed: pre-training,
    probes, fine-tuning."""
    out = out.absolute()
    smaller, epochs = pools(size)
    pretraining = (METHODS | ABLATIONS | smaller)[method]
    small = ("--backbone", size["backbone"], "--seed", seed, "--precision", PRECISION,
             "--input-size", size["input"], *size["loader"])
    weights = "none"
    if pretraining:
        hands, pairs, *flags = pretraining
        folder = out / "pretrained" / f"{method}-seed{seed}"
        weights = folder / "backbone.pt"
        yield f"pretrain-{method}-seed{seed}", weights, (
            "pretrain.py", out / hands, "--pairs", out / "pairs" / pairs, *flags, "--out", folder,
            "--weights", "none", "--batch-size", size["batch"], "--epochs",
            epochs.get(method, size["epochs"]), "--warmup-epochs", size["warmup"], "--optimizer",
            "adam", "--lr", 1e-3, *small)
    finetune = ("finetune.py", "--dataset", "freihand", "--root", out / "labels", "--border",
                "mirror", "--weights", weights, *small)
    for share in size["probes"] if method in METHODS else size["probes"][-1:]:
        folder = out / f"knn-{share}" / f"{method}-seed{seed}"
        yield f"knn-{share}-{method}-seed{seed}", folder / "pred_xyz.npy", (
            *finetune, "--head", "knn", "--label-fraction", share, "--out", folder)
    for share, steps, seeds in size["tunings"]:
        if method not in METHODS or seed not in size["seeds"][:seeds]:
            continue
        name = f"tuned-{share}-{steps}"
        folder = out / name / f"{method}-seed{seed}"
        pictures = 0.9 * share * 4 * size["train"]  # a tenth of the labels is for validation
        yield f"{name}-{method}-seed{seed}", folder / "pred_xyz.npy", (
            *finetune, "--head", "linear", "--batch-size", size["tune_batch"], "--epochs",
            round(steps * size["tune_batch"] / pictures), "--rotation", 15, "--no-colour",
            "--label-fraction", share, "--out", folder)  # few steps: easy views


def comparisons(out, size):
    """-> title, folder of the tables, baseline, runs of each experiment."""
    out = out.absolute()

    def runs_of(name, methods):
        return [out / name / f"{method}-seed{seed}" for method, seed in plan(size)
                if method in methods]

    for share in size["probes"]:
        name = f"knn-{share}"
        title = f"Frozen, nearest of {share:.0%} of the labels"
        yield title, out / "tables" / name, "peclr", runs_of(name, METHODS)
    for share, steps, seeds in size["tunings"]:
        name = f"tuned-{share}-{steps}"
        title = f"Fine-tuned on {share:.0%} of the labels, {steps} steps"
        runs = runs_of(name, METHODS)[:seeds * len(METHODS)]
        yield title, out / "tables" / name, "peclr", runs
    name = f"knn-{size['probes'][-1]}"
    for title, methods in (("Ablations", ABLATIONS), ("Smaller pools", pools(size)[0])):
        folder = out / "tables" / title.lower().replace(" ", "-")
        yield (f"{title}, frozen, nearest of all labels", folder, "simhand",
               runs_of(name, ("simhand", *methods)))


def draw(path, panels):
    """A panel for each experiment: the MPJPE of each method's seeds as dots, their mean as
    a line."""
    figure = Figure(figsize=(15, 6.4), layout="constrained")
    for axis, (title, runs) in zip(figure.subplots(2, -(-len(panels) // 2)).flat, panels.items()):
        errors = {}
        for run in runs:
            metrics = json.loads((run / "metrics.json").read_text())
            errors.setdefault(run.name.rpartition("-seed")[0], []).append(metrics["mpjpe"])
        for y, values in enumerate(errors.values()):
            axis.plot(values, [y] * len(values), "o", color="C0", alpha=0.6)
            axis.plot([np.mean(values)] * 2, [y - 0.3, y + 0.3], color="C1", linewidth=2)
        axis.set(yticks=range(len(errors)), yticklabels=errors, xlabel="MPJPE, mm, wrist-aligned")
        axis.set_title(title, fontsize=8)
        axis.invert_yaxis()
        axis.grid(alpha=0.3)
    for axis in figure.axes[len(panels):]:
        axis.remove()
    figure.savefig(path, dpi=110)


def describe(out, size):
    """What all runs share, in words."""
    hands = len(np.load(out / "hands" / "keypoints.npy", mmap_mode="r"))
    used = np.load(out / "pairs" / "upright" / "neighbours.npy")[:, 0] >= 0
    return (f"{hands} hands of {size['videos'] // 2} persons in {size['videos']} rendered videos, "
            f"{used.sum()} of them with a pair of each kind; {size['backbone']} pre-trained on "
            f"these from nothing, {size['input']} px, {size['epochs']} epochs in batches of "
            f"{size['batch']} pairs. Labels: {size['train']} hands of other persons, four pictures "
            f"each; {size['test']} test pictures. Fine-tuned with a linear head in batches of "
            f"{size['tune_batch']}.\n\n")


def pair_report(out):
    """What the pairs are, by the renderer's truth -> Markdown. Of each pair: distance of
    the keypoints in crops, of the poses in space, relative to the wrist and after
    Procrustes, and whether the pose goes by the same name."""
    import evaluate
    from common import load_hands

    hands, lines = load_hands(out / "hands"), []
    truth = {name: np.load((out / "videos" / name).with_suffix(".npy")) for name in hands.videos}
    rows = []
    for hand in hands.rows:
        mine = truth[hands.videos[hand["video"]]]
        mine = mine[mine["frame"] == hand["frame"]]
        low, high = mine["keypoints"].min(1), mine["keypoints"].max(1)
        centre = (hand["box"][:2] + hand["box"][2:]) / 2
        rows.append(mine[np.linalg.norm((low + high) / 2 - centre, axis=1).argmin()])
    rows = np.array(rows)
    xyz, usable = rows["xyz"].copy(), None
    xyz[rows["left"], :, 0] *= -1
    rng = np.random.default_rng(0)
    for name in (*MINED, "at random"):
        if name in MINED:
            other = np.load(out / "pairs" / name / "neighbours.npy")[:, 0]
            usable = np.flatnonzero(other >= 0)
            other = other[usable]
        else:
            other = rng.integers(len(rows), size=len(usable))
        turn = np.zeros(len(usable))
        if (out / "pairs" / name / "turns.npy").exists():
            turn = np.load(out / "pairs" / name / "turns.npy")[usable, 0]
        seen = hands.keypoints[other] - hands.keypoints[other].mean(1, keepdims=True)
        seen = turned(seen, turn) - hands.keypoints[usable]
        seen = seen + hands.keypoints[usable].mean(1, keepdims=True)
        apart = np.linalg.norm(seen, axis=2).mean(1) / hands.side
        every = np.ones((len(usable), 21), bool)
        distances = evaluate.distances(turned(xyz[other], turn), xyz[usable], every, every[:, 0])
        same = np.mean(rows["pose"][usable] == rows["pose"][other])
        lines.append(f"| {name} | {len(usable)} | {100 * np.mean(apart):.1f} | "
                     f"{distances[''].mean():.1f} | {distances['pa_'].mean():.1f} | "
                     f"{100 * same:.0f} % |")
    return ("### What the pairs are\n\n| pairs | hands | keypoints apart from their means, % of "
            "the crop | apart in space, mm | after Procrustes, mm | same pose |\n"
            "|---|---|---|---|---|---|\n" + "\n".join(lines) + "\n")


def turned(points, degrees):
    """points (N, 21, 2 or 3) turned in the picture's plane, as cv2.getRotationMatrix2D turns it."""
    cos, sin = np.cos(np.radians(degrees))[:, None], np.sin(np.radians(degrees))[:, None]
    x, y = points[:, :, 0], points[:, :, 1]
    flat = np.stack([cos * x + sin * y, cos * y - sin * x], 2)
    return np.concatenate([flat, points[:, :, 2:]], 2)


if __name__ == "__main__":
    main()
