"""Which pre-training tells hand poses apart in real photographs? Sign digits 0 to 9, shown
by many students.

Reads the Sign Language Digits Dataset (github.com/ardamavi/Sign-Language-Digits-Dataset,
Apache-2.0) in its own layout: Dataset/DIGIT/IMG_NUMBER.JPG. A student is a "video". A
quarter of the students is held out; the hands of the others pre-train a ResNet-18 from
nothing, by each method, with three seeds. Then each held-out hand looks for the most
similar hand of another held-out student, by the cosine of the frozen features: does it show
the same digit, and how far is its pose? Everything else is equal between the methods. Every
stage is a command, logged below OUT/logs; a second call goes on where the first stopped.
Ends with OUT/digits.md (the tables) and OUT/retrieved.jpg (queries and what they found).

    git clone https://github.com/ardamavi/Sign-Language-Digits-Dataset
    python tests/digits.py Sign-Language-Digits-Dataset --out digits
"""

import argparse
import os
import re
import shutil
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import common
from mine_pairs import as_poses
from study import CORES, PRECISION, follow_lanes, run

SEEDS = (0, 1, 2)
SIDE = 64  # of a view, px
# Degrees, to either side, by which the held-out hands are turned.
PROBES = {"upright": 0, "turned": 90}
COLUMNS = ("1-NN", "5-NN", "pose")
# The hands fill their photographs: crops of 2.6 would be mirror image for the most part.
EXTRACT = {"default": ("--margin", 1.3), "paper": ("--margin", 1.3, "--border", "black")}
MINE = {"default": (), "as-they-lie": ("--no-rotation-free",)}
PAPER = ("--border", "black", "--crop-move", 0.067, "--weighting", "linear")
# Name of a method: the hands and the pairs, of those above, and flags of pretrain.py; None:
# no pre-training.
METHODS = {"untrained": None,
           "simclr": ("default", "default", ("--method", "simclr")),
           "peclr": ("default", "default", ("--method", "peclr")),
           "simhand-paper": ("paper", "as-they-lie", PAPER),
           "simhand": ("default", "default", ())}
TITLES = {"untrained": "untrained", "simclr": "SimCLR", "peclr": "PeCLR",
          "simhand-paper": "SiMHand to the paper's letter", "simhand": "SiMHand"}
TRAINING = ("--backbone", "resnet18", "--weights", "none", "--input-size", SIDE, "--epochs", 40,
            "--batch-size", 64, "--optimizer", "adam", "--lr", 1e-3, "--warmup-epochs", 3,
            "--precision", PRECISION, "--workers", 0)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="the data set's folder, which holds Dataset/0 to Dataset/9")
    parser.add_argument("--out", default="digits", help="folder for everything (default: digits)")
    return parser.parse_args()


def find_students(dataset):
    """-> a list for each student of (digit, path). Each student shows the digits in order,
    one picture each, and the camera numbers the pictures: in the order of the numbers, the
    next student begins where the digit does not rise."""
    pictures = []
    for path in Path(dataset, "Dataset").glob("[0-9]/IMG_*.JPG"):
        number = int(re.search(r"IMG_(\d+)", path.name)[1])
        pictures.append((number, int(path.parent.name), path))
    if not pictures:
        sys.exit(f"digits.py: {dataset}: expected pictures Dataset/DIGIT/IMG_NUMBER.JPG")
    students = []
    before = 10
    for _, digit, path in sorted(pictures):
        if digit <= before:
            students.append([])
        students[-1].append((digit, path))
        before = digit
    return students


def write_photos(pictures, folder):
    """The pictures of one student as FOLDER/DIGIT.jpg, enlarged and with black around them,
    as in letterboxed video, so that MediaPipe finds the hands, which fill their
    pictures."""
    folder.mkdir(parents=True)
    for digit, path in pictures:
        image = cv2.imread(str(path))
        if image is None:
            sys.exit(f"digits.py: {path}: not a picture that OpenCV reads")
        image = cv2.resize(image, (384, 384), interpolation=cv2.INTER_CUBIC)
        image = cv2.copyMakeBorder(image, 96, 96, 96, 96, cv2.BORDER_CONSTANT)
        cv2.imwrite(str(folder / f"{digit}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 95])


def main():
    args = parse_args()
    out = Path(args.out).absolute()
    (out / "logs").mkdir(parents=True, exist_ok=True)
    start = time.time()
    if not (out / "photos").exists():
        split_students(find_students(args.dataset), out)
    for name, done, command in preparation(out):
        run(out, name, done, command, CORES)
    plan = [(method, seed) for seed in SEEDS for method in METHODS]
    follow_lanes(out, [lane(out, method, seed) for method, seed in plan], CORES, 1)
    results = {}
    for method, seed in plan:
        nearest, metrics = probe(out, method, seed)
        results.setdefault(method, []).append(metrics)
        if method == "simhand" and seed == SEEDS[0]:
            draw_retrieved(out, nearest)
    text = table(out, results)
    (out / "digits.md").write_text(text)
    minutes = (time.time() - start) / 60
    print(f"{text}\n{minutes:.0f} minutes in this call; wrote {out}/digits.md, retrieved.jpg")


def split_students(students, out):
    """Write the photos: OUT/photos/pool for pre-training, OUT/photos/held-out of a quarter
    of the students."""
    order = np.random.default_rng(0).permutation(len(students))
    held_out = order[:len(students) // 4]
    temporary = out / ".photos.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    for number, pictures in enumerate(students):
        part = "held-out" if number in held_out else "pool"
        write_photos(pictures, temporary / part / f"student{number:03d}")
    temporary.rename(out / "photos")


def preparation(out):
    """-> name, last file, command of the stages before pre-training."""
    for hands, flags in EXTRACT.items():
        for part, folder in (("pool", f"hands-{hands}"), ("held-out", f"held-out-{hands}")):
            yield f"extract-{folder}", out / folder / "hands.jpg", (
                "extract_hands.py", out / "photos" / part, "--out", out / folder, "--size", 128,
                *flags)
    for hands, pairs in {METHODS[method][:2] for method in METHODS if METHODS[method]}:
        folder = out / f"pairs-{hands}-{pairs}"
        yield f"mine-{hands}-{pairs}", folder / "pairs.jpg", (
            "mine_pairs.py", out / f"hands-{hands}", "--out", folder, *MINE[pairs])


def lane(out, method, seed):
    """-> name, last file, command of the pre-training of one method with one seed; nothing
    for no pre-training."""
    if METHODS[method]:
        hands, pairs, flags = METHODS[method]
        folder = out / "pretrained" / f"{method}-seed{seed}"
        yield f"pretrain-{method}-seed{seed}", folder / "backbone.pt", (
            "pretrain.py", out / f"hands-{hands}", "--pairs", out / f"pairs-{hands}-{pairs}",
            *flags, *TRAINING, "--seed", seed, "--out", folder)


def probe(out, method, seed):
    """Metrics of one method with one seed -> rows that each held-out hand found (N, 5), and
    {column: value}."""
    hands_name, _, flags = METHODS[method] or METHODS["simhand"]
    border = "black" if "black" in flags else "mirror"
    hands = common.load_hands(out / f"held-out-{hands_name}")
    digits = digits_of(out, hands)
    torch.manual_seed(seed)  # of the untrained network
    weights = "none"
    if METHODS[method]:
        weights = out / "pretrained" / f"{method}-seed{seed}" / "backbone.pt"
    backbone = common.load_backbone("resnet18", weights)
    result = {}
    for kind, rotation in PROBES.items():
        features = embed(backbone, hands, border, rotation)
        nearest, metrics = retrieve(features, hands, digits)
        result |= {f"{kind} {name}": value for name, value in metrics.items()}
    return nearest, result


def digits_of(out, hands):
    """-> the digit that each hand of a hands folder shows (N,): the name of its picture."""
    digits = []
    for row in hands.rows:
        names = sorted(os.listdir(out / "photos" / "held-out" / hands.videos[row["video"]]))
        digits.append(int(names[row["frame"]][0]))
    return np.array(digits)


def table(out, results):
    """{method: metrics of each seed} -> Markdown."""
    pool = common.load_hands(out / "hands-default")
    held_out = common.load_hands(out / "held-out-default")
    lines = [f"{len(pool.keypoints)} hands of {len(pool.videos)} students for pre-training; "
             f"{len(held_out.keypoints)} hands of {len(held_out.videos)} other students look for "
             "their like among each other. Share that finds the same digit, by the nearest and by "
             "the vote of five; how far the nearest one's pose is, in hand sizes. Mean and "
             f"standard deviation of {len(SEEDS)} seeds.", ""]
    titles = [f"{kind}, {name}" for kind in PROBES for name in COLUMNS]
    lines.append("| pre-training | " + " | ".join(titles) + " |")
    lines.append("|---" * (1 + len(titles)) + "|")
    for method, runs in results.items():
        cells = []
        for kind in PROBES:
            for name in COLUMNS:
                values = np.array([metrics[f"{kind} {name}"] for metrics in runs])
                cells.append(f"{values.mean():.3f} ± {values.std(ddof=1):.3f}")
        lines.append(f"| {TITLES[method]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw_retrieved(out, nearest):
    """OUT/retrieved.jpg: a hand of each digit, and the five that it found."""
    hands = common.load_hands(out / "held-out-default")
    digits = digits_of(out, hands)
    tiles = []
    for digit in range(10):
        row = int(np.flatnonzero(digits == digit)[0])
        tiles.append(common.draw_crop(hands, row, 128, f"digit {digit}"))
        tiles += [common.draw_crop(hands, other, 128, str(digits[other])) for other in nearest[row]]
    common.save_image(out / "retrieved.jpg", common.sheet(tiles, 12))


def embed(backbone, hands, border, rotation):
    """Frozen features of all hands of a folder, each in one view like those of
    pre-training, turned by up to `rotation` degrees, colours as they are -> (N, 512), of
    length 1. All methods see the same views."""
    views = []
    for row, points in enumerate(hands.keypoints):
        view = common.sample_view(np.random.default_rng(row), points, hands.side, SIDE,
                                  rotation=rotation, move=0, half_side=(1.2, 1.2), colour=False)
        views.append(common.apply_view(view, common.read_crop(hands, row), points, SIDE, border)[0])
    views = torch.from_numpy(np.stack(views))
    backbone.eval()
    with torch.no_grad():
        features = [backbone(common.normalise(some)) for some in views.split(64)]
    return F.normalize(torch.cat(features), dim=1)


def retrieve(features, hands, digits):
    """Each hand's nearest hands of other students -> their rows (N, 5), and the metrics."""
    video = torch.from_numpy(hands.rows["video"].astype(np.int64))
    similarity = features @ features.T
    similarity[video[:, None] == video] = -2
    nearest = similarity.topk(5, dim=1).indices.numpy()
    vote = 1 + 0.5 ** np.arange(1, 6)  # of equal numbers of votes those with the nearest hand win
    votes = np.stack([((digits[nearest] == digit) * vote).sum(1) for digit in range(10)], 1)
    poses = as_poses(hands.keypoints, hands.side, True).reshape(-1, 21, 2)
    apart = np.linalg.norm(poses[nearest[:, 0]] - poses, axis=2).mean()
    return nearest, {"1-NN": float(np.mean(digits[nearest[:, 0]] == digits)),
                     "5-NN": float(np.mean(votes.argmax(1) == digits)), "pose": float(apart)}


if __name__ == "__main__":
    main()
