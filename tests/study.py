"""Does mining similar hands help, and when? A controlled study on rendered hands, where everything is known.

Renders videos (many persons, backgrounds and lights, things in front of the hands) as the pool, and labelled sets of
other persons; finds the pool's hands with MediaPipe; pre-trains with each method, all else equal, pictures seen
included; probes each backbone by nearest neighbours, fine-tunes the main methods on a share of the labels; 3 seeds.
Every method is also pre-trained twice as long (1 seed); the ablations have 1 seed.
Every stage is a command, logged below OUT/logs; a second call goes on where the first stopped. Ends with OUT/study.md
(what the mined pairs are, and a table for each experiment) and OUT/study.png.

    python tests/study.py                               # CPU size, for two cores
    python tests/study.py --size gpu --prepare          # render, extract and mine alone, say on another machine
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

# crop, input: px; train, test: labelled hands; shares: of the labels, for fine-tuning; probes: likewise, for knn, the
# last one for the ablations too. The CPU's pictures are tiny: many small steps tell more there than few good ones.
SIZES = {
    "cpu": dict(videos=80, seconds=8, crop=128, backbone="resnet18", input=32, train=1200, test=300, batch=64,
                epochs=13, warmup=1, tune_input=64, tune_batch=8, tune_epochs=8, shares=(0.1,), probes=(0.01, 0.1, 1.0),
                seeds=(0, 1, 2)),
    "gpu": dict(videos=260, seconds=8, crop=128, backbone="resnet50", input=96, train=1200, test=500, batch=512,
                epochs=40, warmup=4, tune_input=96, tune_batch=32, tune_epochs=30, shares=(0.01, 0.1, 1.0),
                probes=(0.01, 0.1, 1.0), seeds=(0, 1, 2))}
METHODS = {"none": (),  # no pre-training; else the pairs, of MINED, and flags of pretrain.py
           "simclr": ("mined", "--method", "simclr", "--weighting", "none"),
           "peclr": ("mined", "--method", "peclr", "--weighting", "none"),
           "simhand-unweighted": ("mined", "--weighting", "none"),
           "simhand": ("mined",),
           "simhand-temporal": ("temporal", "--weighting", "none")}
ABLATIONS = {"simhand-linear-pos": ("mined", "--weight-on", "pos"),
             "simhand-linear-neg": ("mined", "--weight-on", "neg"),
             "simhand-nonlinear": ("mined", "--weighting", "nonlinear"),
             # the others without weights, whose effect would cover theirs
             "unweighted-rotation-only": ("mined", "--weighting", "none", "--equivariance", "rotation"),
             "unweighted-shift-only": ("mined", "--weighting", "none", "--equivariance", "shift"),
             "unweighted-no-equivariance": ("mined", "--weighting", "none", "--equivariance", "none"),
             "unweighted-shift-in-hands": ("mined", "--weighting", "none", "--shift-unit", "hand"),
             "unweighted-top5": ("mined", "--weighting", "none", "--top-k", "5"),
             "unweighted-same-video": ("same-video", "--weighting", "none")}
LONGER = {f"{method}-longer": pretraining for method, pretraining in METHODS.items() if pretraining}
PRECISION = "bf16" if torch.cuda.is_available() or re.search(
    "avx512_bf16|amx_bf16", Path("/proc/cpuinfo").read_text()) else "fp32"  # elsewhere bf16 is slower
MINED = {"mined": ("--top-k", "5"), "temporal": ("--temporal",), "same-video": ("--same-video", "--top-k", "5")}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="study", help="folder for everything (default: study)")
    parser.add_argument("--size", choices=sorted(SIZES), default="cpu")
    parser.add_argument("--prepare", action="store_true", help="stop before pre-training")
    return parser.parse_args()


def main():
    args = parse_args()
    out, size, start = Path(args.out), SIZES[args.size], time.time()
    (out / "logs").mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0))
    jobs = cores if args.size == "cpu" else 1
    for name, done, command in preparation(out, size):
        run(out, name, done, command, cores)
    equal_pairs(out)
    if args.prepare:
        return
    follow_lanes(out, [lane(out, size, method, seed) for method, seed in plan(size)], jobs, cores // jobs)
    text = pair_report(out)
    panels = {}
    for title, command in comparisons(out, size):
        panels[title] = [Path(run) for run in command[1:command.index("--seeds")]]
        printed = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
        if printed.returncode:
            sys.exit(printed.stderr)
        text += f"\n### {title}\n\n" + (Path(command[-1]) / "table.md").read_text()
    (out / "study.md").write_text(text)
    draw(out / "study.png", panels)
    print(f"{text}\n{(time.time() - start) / 60:.0f} minutes in this call; wrote {out}/study.md and study.png")


def follow_lanes(out, lanes, jobs, threads):
    """Run the commands of each lane in order, `jobs` lanes side by side; the first that fails ends all."""
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
    """Run a command unless its last file is there; its output goes to a log, one line of it is said."""
    if done.exists():
        return
    start, log = time.time(), out / "logs" / f"{name}.log"
    with open(log, "a") as file:
        file.write(shlex.join(["python", *map(str, command)]) + "\n")
        file.flush()
        status = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                                env={**os.environ, "OMP_NUM_THREADS": str(threads)}).returncode
    if status:
        sys.exit(f"study.py: {name} ended with status {status}, see {log}; the same command goes on where this stopped")
    print(f"{name}: {time.time() - start:.0f} s", flush=True)


def preparation(out, size):
    """-> name, last file, command of the stages before pre-training."""
    out = out.absolute()
    yield "videos", out / "videos" / f"person{size['videos'] // 2 - 1:03d}_clip2.mp4", (
        "tests/synthetic.py", "videos", out / "videos", "--videos", size["videos"], "--seconds", size["seconds"],
        "--fps", 5, "--objects", 0.5, "--seed", 0)
    yield "labels", out / "labels_eval" / "evaluation_xyz.json", (
        "tests/synthetic.py", "freihand", out / "labels", "--train", size["train"], "--evaluation", size["test"],
        "--seed", 1)  # another seed: other persons and backgrounds
    yield "hands", out / "hands" / "hands.jpg", (
        "extract_hands.py", out / "videos", "--out", out / "hands", "--fps", 5, "--size", size["crop"])
    for name, flags in MINED.items():
        yield f"mine-{name}", out / "mined" / name / "pairs.jpg", (
            "mine_pairs.py", out / "hands", "--out", out / "mined" / name, *flags)


def equal_pairs(out):
    """OUT/pairs/NAME: the mined neighbours of those hands alone that have one of each kind: all methods see the same
    pictures equally often."""
    found = {name: np.load(out / "mined" / name / "neighbours.npy") for name in MINED}
    usable = np.all([neighbours[:, 0] >= 0 for neighbours in found.values()], 0)
    for name, neighbours in found.items():
        (out / "pairs" / name).mkdir(parents=True, exist_ok=True)
        np.save(out / "pairs" / name / "neighbours.npy", np.where(usable[:, None], neighbours, -1))


def plan(size):
    """-> (method, seed) of all that is compared, the most telling first."""
    return [(method, seed) for methods, seeds in ((METHODS, size["seeds"]), (LONGER | ABLATIONS, size["seeds"][:1]))
            for seed in seeds for method in methods]


def lane(out, size, method, seed):
    """-> name, last file, command of one method's stages, for one seed: pre-training, probes, fine-tuning."""
    out, pretraining = out.absolute(), (METHODS | LONGER | ABLATIONS)[method]
    small = ("--backbone", size["backbone"], "--seed", seed, "--precision", PRECISION)
    weights = "none"
    if pretraining:
        pairs, *flags = pretraining
        folder = out / "pretrained" / f"{method}-seed{seed}"
        weights = folder / "backbone.pt"
        yield f"pretrain-{method}-seed{seed}", weights, (
            "pretrain.py", out / "hands", "--pairs", out / "pairs" / pairs, *flags, "--out", folder, "--weights",
            "none", "--batch-size", size["batch"], "--epochs", size["epochs"] * (2 if method in LONGER else 1),
            "--warmup-epochs", size["warmup"], "--input-size", size["input"], "--optimizer", "adam", "--lr", 1e-3,
            *small)
    for head, shares, more in (("knn", size["probes"][-1:] if method in ABLATIONS else size["probes"],
                                ("--head", "knn", "--input-size", size["input"])),
                               ("tuned", () if method in ABLATIONS else size["shares"],
                                ("--batch-size", size["tune_batch"], "--epochs", size["tune_epochs"], "--rotation", 15,
                                 "--no-colour", "--input-size", size["tune_input"]))):  # few steps: easy views
        for share in shares:
            folder = out / f"{head}-{share}" / f"{method}-seed{seed}"
            yield f"{head}-{share}-{method}-seed{seed}", folder / "pred_xyz.npy", (
                "finetune.py", "--dataset", "freihand", "--root", out / "labels", "--weights", weights,
                "--label-fraction", share, "--out", folder, *more, *small)


def comparisons(out, size):
    """-> title, command of evaluate.py, whose last word is the folder that it writes to."""
    out = out.absolute()
    for head, title, shares in (("tuned", "Fine-tuned on {:.0%} of the labels", size["shares"]), (
            "knn", "Frozen, nearest of {:.0%} of the labels", size["probes"])):
        for share in shares:
            runs = [out / f"{head}-{share}" / f"{method}-seed{seed}" for method, seed in plan(size)
                    if method not in ABLATIONS]
            yield title.format(share), ("evaluate.py", *runs, "--seeds", "--baseline", "peclr", "--out",
                                        out / "tables" / f"{head}-{share}")
    runs = [out / "knn-1.0" / f"{method}-seed{seed}" for method, seed in plan(size)
            if method in ("simhand", "simhand-unweighted", *ABLATIONS)]
    yield "Ablations, frozen, nearest of all labels", (
        "evaluate.py", *runs, "--seeds", "--baseline", "simhand-unweighted", "--out", out / "tables" / "ablations")


def draw(path, panels):
    """A panel for each experiment: the MPJPE of each method's seeds as dots, their mean as a line."""
    figure = Figure(figsize=(13, 6.4), layout="constrained")
    for axis, (title, runs) in zip(figure.subplots(2, -(-len(panels) // 2)).flat, panels.items()):
        errors = {}
        for run in runs:
            metrics = json.loads((run / "metrics.json").read_text())
            errors.setdefault(run.name.rpartition("-seed")[0], []).append(metrics["mpjpe"])
        for y, values in enumerate(errors.values()):
            axis.plot(values, [y] * len(values), "o", color="C0", alpha=0.6)
            axis.plot([np.mean(values)] * 2, [y - 0.3, y + 0.3], color="C1", linewidth=2)
        axis.set(yticks=range(len(errors)), yticklabels=errors, xlabel="MPJPE, mm, wrist-aligned")
        axis.set_title(title, fontsize=9)
        axis.invert_yaxis()
        axis.grid(alpha=0.3)
    for axis in figure.axes[len(panels):]:
        axis.remove()
    figure.savefig(path, dpi=110)


def pair_report(out):
    """What the pairs are, by the renderer's truth -> Markdown. Of each pair: distance of the keypoints in crops, of the
    poses in space, relative to the wrist and after Procrustes, and whether the pose goes by the same name."""
    import evaluate
    from common import load_hands

    hands, lines = load_hands(out / "hands"), []
    truth = {name: np.load((out / "videos" / name).with_suffix(".npy")) for name in hands.videos}
    rows = []
    for hand in hands.hands:
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
        apart = np.linalg.norm(hands.keypoints[usable] - hands.keypoints[other], axis=2).mean(1) / hands.side
        valid = np.ones((len(usable), 21), bool)
        distances = evaluate.distances(xyz[other], xyz[usable], valid, valid[:, 0])
        same = np.mean(rows["pose"][usable] == rows["pose"][other])
        lines.append(f"| {name} | {len(usable)} | {100 * np.mean(apart):.1f} | {distances[''].mean():.1f} | "
                     f"{distances['pa_'].mean():.1f} | {100 * same:.0f} % |")
    return ("### What the pairs are\n\n| pairs | hands | keypoints apart, % of the crop | apart in space, mm | after "
            "Procrustes, mm | same pose |\n|---|---|---|---|---|---|\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
