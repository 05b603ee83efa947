"""Does mining similar hands help, and when? A controlled study on rendered hands, where
everything is known.

Renders videos (many persons, backgrounds and lights, things in front of the hands) as the
pool, and labelled sets of other persons; finds the pool's hands with MediaPipe; pre-trains
with each method, all else equal, pictures seen included; probes each backbone by nearest
neighbours, and fine-tunes those of the main methods on shares of the labels. Pre-trainings have
three seeds, those of ablations and of pools of other sizes one. The CPU size takes some hours on
two cores. Every stage is a command, logged below OUT/logs; a second call goes on where the first
stopped. Ends with study.md (what the mined pairs are, and a table for each experiment) and
study.png, in tests/ for the sizes cpu and gpu, and in OUT for the tiny one.

    python tests/study.py                       # CPU size, for two cores
    # render, extract and mine alone, say on another machine
    python tests/study.py --size gpu --prepare
    python tests/study.py --size gpu --out study-gpu
"""

import argparse
import time

import numpy as np

import experiment  # first: it makes the scripts importable
import common
from experiment import ALONE, CORES, METHODS, PRECISION, ROOT, TITLES, Column, Command

# crop, input: px, of pre-training and fine-tuning alike; train, test: labelled hands, four
# pictures of each for training; tunings: share of the labels, steps, number of seeds; probes: share
# of the labels and finetune.py's --crop of the frozen networks, the first one for the ablations
# too; pools: sizes of smaller pools, pre-trained on for as many steps.
SIZES = {
    "cpu": dict(videos=320, seconds=8, crop=128, backbone="resnet18", input=48, train=1200,
                test=300, batch=64, epochs=5, warmup=1, tune_batch=16,
                tunings=((0.1, 400, 8), (0.1, 1200, 1)), probes=((1.0, 2), (1.0, 1.25)),
                hands=12_000, pools=(),
                loader=("--workers", 0)),  # a lane a core: its own process makes the views
    "gpu": dict(videos=520, seconds=8, crop=128, backbone="resnet50", input=96, train=1200,
                test=500, batch=512, epochs=40, warmup=4, tune_batch=16,
                tunings=((0.01, 250, 8), (0.1, 400, 8), (0.1, 1200, 8), (1.0, 4000, 3)),
                probes=((1.0, 2), (1.0, 1.25), (0.1, 2), (0.01, 2)), hands=20_000,
                pools=(2500, 5000, 10_000), loader=()),
    # To see that all of it runs.
    "tiny": dict(videos=8, seconds=1, crop=64, backbone="resnet18", input=32, train=12, test=6,
                 batch=8, epochs=1, warmup=0, tune_batch=8, tunings=((0.5, 5, 1),),
                 probes=((1.0, 2),), hands=20, pools=(), loader=("--workers", 0))}
HANDS = {"hands": (), "hands-paper": ("--paper",)}
MINED = {"upright": ("--top-k", 5), "as-they-lie": ("--top-k", 5, "--no-rotation-free"),
         "temporal": ("--temporal",), "same-video": ("--same-video", "--top-k", 5)}
MAIN = {"none": (), **METHODS}
# Name: the pairs, flags of pretrain.py.
BALANCED = ("--weighting", "balanced", *ALONE)
ABLATIONS = {"linear": ("upright", ("--weighting", "linear", *ALONE)),
             "balanced": ("upright", BALANCED),
             "balanced-positives": ("upright", (*BALANCED, "--weight-on", "pos")),
             "balanced-all-pairs": ("upright", (*BALANCED, "--weight-on", "neg")),
             "as-they-lie": ("as-they-lie", METHODS["simhand"]),
             "top5": ("upright", (*METHODS["simhand"], "--top-k", 5)),
             "temporal": ("temporal", METHODS["simhand"]),
             "same-video": ("same-video", METHODS["simhand"])}
COLUMNS = {"mpjpe": Column("MPJPE, mm", 1, min),
           "pa_mpjpe": Column("PA-MPJPE, mm", 1, min),
           "auc_0_50": Column("AUC 0-50", 3, max)}

BY_HAND = "\n## What did not help\n"  # from this heading on, study.md is kept


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = (*MAIN, *ABLATIONS)
    experiment.add_flags(parser, "study", rows, 3)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--prepare", action="store_true", help="stop before pre-training")
    parser.add_argument("--report", action="store_true",
                        help="train nothing: make the tables from the runs that are there")
    args = parser.parse_args()
    args.methods = experiment.in_order(args.methods, rows)
    return args


def main():
    args = parse_args()
    out = args.out
    size = SIZES[args.size]
    began = time.time()
    experiment.start(out, size=args.size, **size)
    jobs = 1 if args.size == "gpu" else CORES
    experiment.run_lanes(out, [preparation(args)], 1)
    equal_pairs(out)
    if args.prepare:
        return
    if not args.report:
        experiment.run_lanes(out, [lane(args, method, seed) for method, seed in plan(args)], jobs)
    parts = [describe(out, size), pair_report(out)]
    panels = comparisons(args)
    experiment.run_lanes(out, [evaluation(out, panels)], 1)
    parts += [block(title, runs) for title, runs in panels.items()]
    results = out if args.size == "tiny" else ROOT / "tests"
    text = "\n".join(["# Does mining similar hands help?\n",
                      f"Written by `python tests/study.py --size {args.size}`.\n",
                      "![The study's runs](study.png)\n", *parts, ""])
    path = results / "study.md"
    if path.exists():  # the list of what did not help is written by hand
        text += "".join(path.read_text().partition(BY_HAND)[1:])
    path.write_text(text)
    draw(results / "study.png", panels)
    print(f"{text}\n{(time.time() - began) / 60:.0f} minutes in this call; wrote "
          f"{results}/study.md and study.png")


# ----------------------------------------------------------------------------------- the commands

def preparation(args):
    """The commands before pre-training."""
    out = args.out
    size = SIZES[args.size]
    yield Command("videos", None, (
        "tests/synthetic.py", "videos", out / "videos", "--videos", size["videos"], "--seconds",
        size["seconds"], "--fps", 5, "--objects", 0.5, "--seed", 0, "--workers", CORES))
    yield Command("labels", out / "labels_eval" / "evaluation_xyz.json", (
        "tests/synthetic.py", "freihand", out / "labels", "--train", size["train"], "--evaluation",
        size["test"], "--seed", 1))  # another seed: other persons and backgrounds
    for name, flags in HANDS.items():
        if flags and "simhand-paper" not in args.methods:
            continue
        yield Command(f"extract-{name}", out / name / "hands.jpg", (
            "extract_hands.py", out / "videos", "--out", out / name, "--fps", 5, "--size",
            size["crop"], *flags))
    for name, flags in MINED.items():
        yield Command(f"mine-{name}", out / "mined" / name / "pairs.jpg", (
            "mine_pairs.py", out / "hands", "--out", out / "mined" / name, *flags))
    for count in size["pools"]:
        yield Command(f"mine-pool{count}", out / "pairs" / f"pool{count}" / "pairs.jpg", (
            "mine_pairs.py", out / "hands", "--out", out / "pairs" / f"pool{count}", "--limit",
            count, *MINED["upright"]))


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
    """{name of a smaller pool: its hands}"""
    return {f"pool{count}": count for count in size["pools"]}


def plan(args):
    """-> (method, seed) of all pre-trainings, the most telling first."""
    main = [(method, seed) for seed in range(args.seeds) for method in args.methods
            if method in MAIN]
    once = [*pools(SIZES[args.size]), *(method for method in args.methods if method in ABLATIONS)]
    return main + [(method, 0) for method in once]


def lane(args, method, seed):
    """The commands of one method, for one seed: pre-training, probes, fine-tunings."""
    out = args.out
    size = SIZES[args.size]
    name = f"{method}-seed{seed}"
    network = ("--backbone", size["backbone"], "--precision", PRECISION, "--input-size",
               size["input"], *size["loader"])
    weights = "none"
    if method != "none":
        weights = out / "pretrained" / name / "backbone.pt"
        yield Command(f"pretrain-{name}", weights, (
            "pretrain.py", *pretraining(out, size, method), "--out", weights.parent, "--weights",
            "none", "--batch-size", size["batch"], "--warmup-epochs", size["warmup"],
            "--optimizer", "adam", "--lr", 1e-3, "--probe", 0, "--seed", seed, *network))
    labels = ("finetune.py", "--dataset", "freihand", "--root", out / "labels", "--border",
              "mirror", "--weights", weights, *network)
    for share, crop in size["probes"] if method in MAIN else size["probes"][:1]:
        folder = probe_folder(out, share, crop) / name
        yield Command(f"{folder.parent.name}-{name}", folder / "pred_xyz.npy", (
            *labels, "--head", "knn", "--crop", crop, "--label-fraction", share, "--seed", seed,
            "--out", folder))
    for share, steps, tunings in size["tunings"] if method in MAIN else ():
        pictures = 0.9 * share * 4 * size["train"]  # a tenth of the labels is for validation
        epochs = round(steps * size["tune_batch"] / pictures)
        for tuning in range(seed, tunings, args.seeds):
            folder = out / f"tuned-{share}-{steps}" / f"{method}-seed{tuning}"
            yield Command(f"{folder.parent.name}-{folder.name}", folder / "pred_xyz.npy", (
                *labels, "--head", "linear", "--batch-size", size["tune_batch"], "--epochs", epochs,
                "--rotation", 15, "--no-colour",  # few steps: easy views
                "--label-fraction", share, "--seed", tuning, "--out", folder))


def pretraining(out, size, method):
    """-> the arguments of pretrain.py that make a method: hands, pairs, epochs, flags."""
    hands = "hands"
    pairs = "upright"
    epochs = size["epochs"]
    flags = METHODS["simhand"]
    if method in METHODS:
        flags = METHODS[method]
    if method == "simhand-paper":
        hands = "hands-paper"
        pairs = "as-they-lie"
    if method in ABLATIONS:
        pairs, flags = ABLATIONS[method]
    if method in pools(size):
        pairs = method
        epochs = round(epochs * size["hands"] / pools(size)[method])  # as many steps
    return out / hands, "--pairs", out / "pairs" / pairs, "--epochs", epochs, *flags


# ------------------------------------------------------------------------------------- the report

def comparisons(args):
    """-> {title of an experiment: {method: the folders of its runs that are there}}"""
    out = args.out
    size = SIZES[args.size]
    panels = {}
    main = [method for method in args.methods if method in MAIN]
    for share, crop in size["probes"]:
        title = f"Frozen, nearest of {share:.0%} of the labels, --crop {crop}"
        panels[title] = finished(probe_folder(out, share, crop), main)
    for share, steps, _ in size["tunings"]:
        title = f"Fine-tuned on {share:.0%} of the labels, {steps} steps"
        panels[title] = finished(out / f"tuned-{share}-{steps}", main)
    folder = probe_folder(out, *size["probes"][0])
    others = {"Ablations": [method for method in args.methods if method in ABLATIONS],
              "Smaller pools": [*pools(size)]}
    for title, methods in others.items():
        if methods:
            title = f"{title}, frozen, nearest of all labels"
            panels[title] = finished(folder, [*methods, "simhand"])
    return panels


def probe_folder(out, share, crop):
    return out / f"knn-{share}-{crop}"


def finished(folder, methods):
    """-> {method: the folders of its finished runs}"""
    runs = {}
    for method in methods:
        several = experiment.finished_runs(folder, method, "pred_xyz.npy")
        if several:
            runs[method] = several
    return runs


def evaluation(out, panels):
    for number, runs in enumerate(panels.values()):
        yield Command(f"evaluate-{number}", None, (
            "evaluate.py", *(run for several in runs.values() for run in several), "--seeds",
            "--baseline", "simhand", "--out", out / "tables" / str(number)))


def block(title, runs):
    """An experiment's table, what it shows, and what made it -> Markdown."""
    rows = {TITLES.get(method, method): experiment.read_metrics(several, COLUMNS)
            for method, several in runs.items()}
    baseline = TITLES["simhand"]
    notes = "Mean ± standard deviation over n runs"
    if title.startswith("Fine-tuned"):
        notes += (", each with its own choice of labels; they start in turn from the method's "
                  "pre-trainings, so that several of the n may share one")
    notes += f"; p: Welch's two-sided test over the runs, against {baseline}."
    every = [run for several in runs.values() for run in several]
    return "\n".join([f"\n### {title}\n", experiment.table(rows, COLUMNS, baseline),
                      f"{notes} {experiment.findings(rows, 'mpjpe', COLUMNS['mpjpe'], baseline)} "
                      f"{experiment.made_by(every)}"])


def draw(path, panels):
    """A panel for each experiment: the MPJPE of each method's runs as dots, their mean as a
    line."""
    with common.figure(path, (15, 6.4)) as figure:
        grid = figure.subplots(2, -(-len(panels) // 2)).flat
        for axis, (title, runs) in zip(grid, panels.items()):
            for y, several in enumerate(runs.values()):
                values = experiment.read_metrics(several, COLUMNS)["mpjpe"]
                axis.plot(values, [y] * len(values), "o", color="C0", alpha=0.6)
                axis.plot([np.mean(values)] * 2, [y - 0.3, y + 0.3], color="C1", linewidth=2)
            axis.set(yticks=range(len(runs)), yticklabels=runs, xlabel="MPJPE, mm, wrist-aligned")
            axis.set_title(title, fontsize=8)
            axis.invert_yaxis()
            axis.grid(alpha=0.3)
        for axis in figure.axes[len(panels):]:
            axis.remove()


def describe(out, size):
    """What all runs share, in words."""
    hands = len(np.load(out / "hands" / "keypoints.npy", mmap_mode="r"))
    used = np.load(out / "pairs" / "upright" / "neighbours.npy")[:, 0] >= 0
    return (f"{hands} hands of {size['videos'] // 2} persons in {size['videos']} rendered videos, "
            f"{used.sum()} of them with a pair of each kind; {size['backbone']} pre-trained on "
            f"these from nothing, {size['input']} px, {size['epochs']} epochs in batches of "
            f"{size['batch']} pairs. Labels: {size['train']} hands of other persons, four pictures "
            f"each; {size['test']} test pictures. Fine-tuned with a linear head in batches of "
            f"{size['tune_batch']}.\n")


def pair_report(out):
    """What the pairs are, by the renderer's truth -> Markdown. Of each pair: distance of
    the keypoints in crops, of the poses in space, relative to the wrist and after
    Procrustes, and whether the pose goes by the same name."""
    import evaluate

    hands = common.load_hands(out / "hands")
    lines = []
    truth = {name: np.load((out / "videos" / name).with_suffix(".npy")) for name in hands.videos}
    rows = []
    for hand in hands.rows:
        mine = truth[hands.videos[hand["video"]]]
        mine = mine[mine["frame"] == hand["frame"]]
        low = mine["keypoints"].min(1)
        high = mine["keypoints"].max(1)
        centre = (hand["box"][:2] + hand["box"][2:]) / 2
        rows.append(mine[np.linalg.norm((low + high) / 2 - centre, axis=1).argmin()])
    rows = np.array(rows)
    xyz = rows["xyz"].copy()
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
    cos = np.cos(np.radians(degrees))[:, None]
    sin = np.sin(np.radians(degrees))[:, None]
    x = points[:, :, 0]
    y = points[:, :, 1]
    flat = np.stack([cos * x + sin * y, cos * y - sin * x], 2)
    return np.concatenate([flat, points[:, :, 2:]], 2)


if __name__ == "__main__":
    common.run_script(main)
