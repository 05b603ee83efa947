"""Which pre-training tells hand poses apart in real photographs? Sign digits 0 to 9, shown
by many students.

Reads the Sign Language Digits Dataset (github.com/ardamavi/Sign-Language-Digits-Dataset,
Apache-2.0) in its own layout: Dataset/DIGIT/IMG_NUMBER.JPG. A student is a "video". A quarter of
the students is held out; the hands of the others pre-train a ResNet-18 from nothing, by each
method, with each seed. Then each held-out hand looks for the most similar hand of another held-out
student, by the cosine of the frozen features: does it show the same digit? Everything else is equal
between the methods.

--pool pre-train on the hands of any other hands folder instead. Then the hands of all students are
tested, since no run has seen any of them, and their crops are cut as the pool's.

Every stage is a command, logged below OUT/logs; a second call goes on where the first stopped. Ends
with OUT/digits.md (the table) and OUT/picture.jpg (what is mined, and what held-out hands find).

    git clone https://github.com/ardamavi/Sign-Language-Digits-Dataset
    python tests/digits.py Sign-Language-Digits-Dataset --out digits
    python tests/digits.py Sign-Language-Digits-Dataset --pool data/hands --out digits-pool \
        --epochs 20 --batch-size 128
"""

import argparse
import os
import re
import shutil
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import experiment  # first: it makes the scripts importable
import common
from experiment import CORES, METHODS, PRECISION, TITLES, Column, Command

SIDE = 64  # of a view, px
# Degrees, to either side, by which the tested hands are turned.
TURNS = {"": 0, "turned, ": 90}
COLUMNS = {"1-NN": Column("1-NN", 3, max),
           "persons": Column("95 % over persons", 3, max),
           "5-NN": Column("5-NN", 3, max),
           "joints": Column("joints by ridge regression, % of the view", 2, min),
           "turned, 1-NN": Column("turned by up to 90°: 1-NN", 3, max),
           "turned, 5-NN": Column("5-NN", 3, max)}
ROWS = {"untrained": "untrained", "poses": "the keypoints themselves, upright",
        **{method: TITLES[method] for method in METHODS}}
PAPER_MARGIN = 1.3


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="the data set's folder, which holds Dataset/0 to Dataset/9")
    experiment.add_flags(parser, "digits", ROWS, 3)
    parser.add_argument("--pool", nargs="+", metavar="FOLDER", help="a hands folder to pre-train "
                        "on, instead of students, and the folder of its pairs (default: mined)")
    parser.add_argument("--margin", type=float, help="of all crops, as of extract_hands.py "
                        "(default: 1.3, since hands fill the photographs; with --pool the pool's). "
                        "Of a pool the middle of each crop is cut out")
    parser.add_argument("--epochs", type=int, default=20, help="of pre-training (default: 20)")
    parser.add_argument("--batch-size", type=int, default=64, help="pairs a step (default: 64)")
    args = parser.parse_args()
    args.methods = experiment.in_order(args.methods, ROWS)
    if args.pool:
        cut = common.logged_settings(args.pool[0])
        args.border = cut.get("border", "mirror")
        args.pool_margin = cut.get("margin", 2.6)
        args.margin = args.margin or args.pool_margin
        common.require(len(args.pool) < 3 and args.margin <= args.pool_margin,
                       f"--pool HANDS [PAIRS]; --margin {args.pool_margin} at most, the pool's")
    args.margin = args.margin or PAPER_MARGIN
    return args


def main():
    args = parse_args()
    out = args.out
    began = time.time()
    experiment.start(out, pool=args.pool, margin=args.margin, epochs=args.epochs,
                     batch_size=args.batch_size)
    if not (out / "photos").exists():
        write_photos(find_students(args.dataset), out, 1 if args.pool else 1 / 4)
    if args.pool and not (out / "hands").exists():
        cut_middles(args.pool[0], out / "hands", args.margin / args.pool_margin)
    experiment.run_lanes(out, [preparation(args)], 1)
    plan = [(method, seed) for seed in range(args.seeds) for method in args.methods
            if method in METHODS]
    experiment.run_lanes(out, [pretraining(args, method, seed) for method, seed in plan], CORES)
    results = {}
    found = {}
    for method in args.methods:
        results[ROWS[method]], found[method] = measure(args, method)
    draw_picture(args, found)
    runs = [run for method in args.methods for run in finished_runs(args, method)]
    text = report(args, results) + "\n" + experiment.made_by(runs) + "\n"
    (out / "digits.md").write_text(text)
    print(f"{text}\n{(time.time() - began) / 60:.0f} minutes in this call; wrote {out}/digits.md, "
          "picture.jpg")


def find_students(dataset):
    """-> a list for each student of (digit, path). Each student shows the digits in order,
    one picture each, and the camera numbers the pictures: in the order of the numbers, the
    next student begins where the digit does not rise."""
    pictures = []
    for path in Path(dataset, "Dataset").glob("[0-9]/IMG_*.JPG"):
        number = int(re.search(r"IMG_(\d+)", path.name)[1])
        pictures.append((number, int(path.parent.name), path))
    common.require(pictures, f"{dataset}: expected pictures Dataset/DIGIT/IMG_NUMBER.JPG")
    students = []
    before = 10
    for _, digit, path in sorted(pictures):
        if digit <= before:
            students.append([])
        students[-1].append((digit, path))
        before = digit
    return students

def write_photos(students, out, share):
    """The pictures of each student as OUT/photos/PART/STUDENT/DIGIT.jpg; the part is "tested" for a
    share of the students, else "pool"."""
    order = np.random.default_rng(0).permutation(len(students))
    tested = order[:int(share * len(students))]
    temporary = out / ".photos.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    for number, pictures in enumerate(students):
        part = "tested" if number in tested else "pool"
        folder = temporary / part / f"student{number:03d}"
        folder.mkdir(parents=True)
        for digit, path in pictures:
            cv2.imwrite(str(folder / f"{digit}.jpg"), enlarge(path),
                        [cv2.IMWRITE_JPEG_QUALITY, 95])
    temporary.rename(out / "photos")


def enlarge(path):
    """A photograph with black around it, as in letterboxed video: the hands fill their pictures,
    and MediaPipe would not find them. -> BGR"""
    image = cv2.imread(str(path))
    common.require(image is not None, f"{path}: not a picture that OpenCV reads")
    image = cv2.resize(image, (384, 384), interpolation=cv2.INTER_CUBIC)
    return cv2.copyMakeBorder(image, 96, 96, 96, 96, cv2.BORDER_CONSTANT)


def cut_middles(pool, folder, share):
    """A copy of a hands folder whose crops show but the middle `share` of each crop's side: what
    extraction with a smaller --margin would have cut."""
    hands = common.load_hands(pool)
    side = round(share * hands.side)
    first = (hands.side - side) // 2
    crops = []
    for row in range(len(hands.keypoints)):
        crop = common.read_crop(hands, row)[first:first + side, first:first + side, ::-1]
        crops.append(cv2.imencode(".jpg", crop, [cv2.IMWRITE_JPEG_QUALITY, 95])[1])
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    np.save(temporary / "crops.npy", np.concatenate(crops))
    np.save(temporary / "offsets.npy", np.cumsum([0, *map(len, crops)]))
    np.save(temporary / "keypoints.npy", hands.keypoints - np.float32(first))
    np.save(temporary / "hands.npy", hands.rows)
    shutil.copy(hands.folder / "videos.txt", temporary)
    temporary.rename(folder)


# ----------------------------------------------------------------------------------- the commands

def folders(args, method):
    """-> the hands that a method is pre-trained on, their pairs, the hands that are tested."""
    paper = "-paper" if method == "simhand-paper" else ""
    if not args.pool:
        return tuple(args.out / f"{name}{paper}" for name in ("hands", "pairs", "tested"))
    pool, *given = map(Path, args.pool)
    hands = pool if args.margin == args.pool_margin else args.out / "hands"
    pairs = given[0] if given and not paper else args.out / f"pairs{paper}"
    return hands, pairs, args.out / "tested"  # a pool cannot be cut anew: its crops serve both


def preparation(args):
    """The commands before pre-training."""
    photos = args.out / "photos"
    for method in ("simhand", "simhand-paper"):
        if method not in args.methods:
            continue
        paper = ("--paper",) if method == "simhand-paper" else ()
        hands, pairs, tested = folders(args, method)
        margin = PAPER_MARGIN if paper else args.margin
        # A hand has as many pixels at any margin.
        flags = ("--size", round(128 * margin / PAPER_MARGIN), *(paper or ("--margin", margin)))
        if args.pool:
            flags = ("--size", common.load_hands(hands).side, "--margin", args.margin, "--border",
                     args.border)
        else:
            yield Command(f"extract-{hands.name}", hands / "hands.jpg", (
                "extract_hands.py", photos / "pool", "--out", hands, *flags))
        yield Command(f"extract-{tested.name}", tested / "hands.jpg", (
            "extract_hands.py", photos / "tested", "--out", tested, *flags))
        if pairs.parent == args.out:
            yield Command(f"mine-{pairs.name}", pairs / "pairs.jpg", (
                "mine_pairs.py", hands, "--out", pairs, *paper))


def finished_runs(args, method):
    return experiment.finished_runs(args.out / "pretrained", method, "backbone.pt")


def pretraining(args, method, seed):
    """The command that pre-trains by one method with one seed."""
    hands, pairs, _ = folders(args, method)
    folder = args.out / "pretrained" / f"{method}-seed{seed}"
    flags = METHODS[method]
    if method == "simhand-paper":  # 15/224 of a crop of the paper's margin
        flags += ("--crop-move", round(15 / 224 * PAPER_MARGIN / args.margin, 4))
    yield Command(f"pretrain-{method}-seed{seed}", folder / "backbone.pt", (
        "pretrain.py", hands, "--pairs", pairs, *flags, "--backbone", "resnet18", "--weights",
        "none", "--input-size", SIDE, "--epochs", args.epochs, "--warmup-epochs",
        round(0.075 * args.epochs), "--batch-size", args.batch_size, "--optimizer", "adam", "--lr",
        1e-3, "--probe", 0, "--precision", PRECISION, "--workers", 0, "--seed", seed, "--out",
        folder))


# ------------------------------------------------------------------------------------ the measures

def measure(args, method):
    """-> {column: a value for each seed, or a text}, and the rows that each hand found upright with
    the first seed (N, 5)."""
    hands = common.load_hands(folders(args, method)[2])
    persons = hands.rows["video"]
    digits = digits_of(args.out, hands)
    if method == "poses":
        poses = common.upright(hands.keypoints).reshape(-1, 42)
        found = find(-np.linalg.norm(poses[:, None] - poses, axis=2), persons)
        hits = score(found, digits)
        row = {name: f"{values.mean():.3f}" for name, values in hits.items()}
        return row | {"persons": interval(hits["1-NN"], persons)}, found
    networks = ["none"] * args.seeds
    if method in METHODS:
        networks = [run / "backbone.pt" for run in finished_runs(args, method)]
    border = "black" if method == "simhand-paper" else "mirror"
    measured = []
    for seed, weights in enumerate(networks):
        torch.manual_seed(seed)  # of an untrained network
        backbone = common.load_backbone("resnet18", weights)
        measured.append(measure_network(backbone, border, hands, digits))
    row = {}
    for name in measured[0][1]:
        row[name] = [float(hits[name].mean()) for _, hits in measured]
    right = np.mean([hits["1-NN"] for _, hits in measured], axis=0)
    return row | {"persons": interval(right, persons)}, measured[0][0]


def measure_network(backbone, border, hands, digits):
    """-> rows that each hand found upright (N, 5), and {column: a number of each hand (N,)}."""
    persons = hands.rows["video"]
    hits = {}
    for kind, rotation in TURNS.items():
        features, points = embed(backbone, hands, border, rotation)
        found = find(features @ features.T, persons)
        hits |= {kind + name: values for name, values in score(found, digits).items()}
        if not kind:
            nearest = found
            hits["joints"] = 100 * joint_errors(features, points / SIDE, persons)
    return nearest, hits


def digits_of(out, hands):
    """-> the digit that each hand of a hands folder shows (N,): the name of its picture."""
    digits = []
    for row in hands.rows:
        names = sorted(os.listdir(out / "photos" / "tested" / hands.videos[row["video"]]))
        digits.append(int(names[row["frame"]][0]))
    return np.array(digits)


def embed(backbone, hands, border, rotation):
    """Frozen features of all hands of a folder, each in one view, turned by up to `rotation`
    degrees, colours as they are -> (N, 512), of length 1, and the keypoints in the views
    (N, 21, 2). The circle about a hand's keypoints touches the view's edges: in 64 px each finger
    counts. All methods see the same views."""
    images = []
    points = []
    for row, keypoints in enumerate(hands.keypoints):
        view = common.sample_view(np.random.default_rng(row), keypoints, hands.side, SIDE,
                                  rotation=rotation, move=0, half_side=(1, 1), colour=False)
        image, seen = common.apply_view(view, common.read_crop(hands, row), keypoints, SIDE, border)
        images.append(image)
        points.append(seen)
    backbone.eval()
    with torch.no_grad():
        features = [backbone(common.normalise(some))
                    for some in torch.from_numpy(np.stack(images)).split(64)]
    return F.normalize(torch.cat(features), dim=1).numpy(), np.stack(points)


def find(similarity, persons):
    """similarity (N, N) -> the rows of each hand's five most similar hands of other persons."""
    similarity = np.where(persons[:, None] == persons, -np.inf, similarity)
    return np.argsort(-similarity, axis=1, kind="stable")[:, :5]


def score(nearest, digits):
    """Of each hand whether the nearest one shows its digit, and whether the vote of five does."""
    vote = 1 + 0.5 ** np.arange(1, 6)  # of equal numbers of votes those with the nearest hand win
    votes = np.stack([((digits[nearest] == digit) * vote).sum(1) for digit in range(10)], 1)
    return {"1-NN": digits[nearest[:, 0]] == digits, "5-NN": votes.argmax(1) == digits}


def joint_errors(features, points, persons):
    """Mean distance of the joints (N,), in sides of the view, between the detector's keypoints and
    what ridge regression, fitted on other persons (five folds), makes of the frozen features."""
    model = make_pipeline(StandardScaler(), RidgeCV(10.0 ** np.arange(-2, 6)))
    folds = GroupKFold(min(5, len(np.unique(persons))))
    predicted = cross_val_predict(model, features, points.reshape(len(points), 42), groups=persons,
                                  cv=folds)
    return np.linalg.norm(predicted.reshape(points.shape) - points, axis=2).mean(1)


def interval(values, persons, resamples=2000):
    """Where 95 % of the means of `values` (N,) lie when persons, each with all its hands, are
    drawn again with replacement, as a text."""
    _, person = np.unique(persons, return_inverse=True)
    count = person.max() + 1
    drawn = np.random.default_rng(0).multinomial(count, [1 / count] * count, resamples)
    means = drawn @ np.bincount(person, values) / (drawn @ np.bincount(person))
    return " to ".join(f"{end:.3f}" for end in np.percentile(means, (2.5, 97.5)))


def report(args, results):
    """{row of the table: its values} -> Markdown."""
    pool, _, tested = folders(args, "simhand")
    hands = common.load_hands(pool)
    tested = common.load_hands(tested)
    who = "all, since no run has seen any of them" if args.pool else "no run has seen them"
    baseline = TITLES["simhand"]
    return "\n".join([
        f"{len(hands.keypoints)} hands of {len(hands.videos)} "
        f"{'videos' if args.pool else 'students'} to pre-train on, {args.epochs} epochs; "
        f"{len(tested.keypoints)} hands of {len(tested.videos)} students look for their like among "
        f"each other ({who}). Share that finds the same digit, by the nearest hand of another "
        "student and by the vote of five.", "",
        experiment.table(results, COLUMNS, baseline),
        "± standard deviation over n seeds of pre-training; p: Welch's two-sided test over these "
        f"seeds, against {baseline}. The interval is over persons: 2,000 bootstrap resamples of "
        "the students, each with all its hands, of the mean over the seeds.", "",
        experiment.findings(results, "1-NN", COLUMNS["1-NN"], baseline), ""])


def draw_picture(args, found, queries=3, each=3):
    """OUT/picture.jpg, 1,200 px wide: two frames, their hands, what mining found for them; then
    held-out hands of three digits, drawn by chance, and what they find by PeCLR's features and by
    ours.

    found: {method: rows (N, 5) that each tested hand found}.
    """
    pool, pairs, tested = map(Path, folders(args, "simhand"))
    hands = common.load_hands(pool)
    neighbours = np.load(pairs / "neighbours.npy")[:, 0]
    rng = np.random.default_rng(0)
    tiles = {}  # {(row, column): title, picture}
    for column, hand in zip((0, 4), rng.choice(np.flatnonzero(neighbours >= 0), 2)):
        frame = common.read_crop(hands, hand) if args.pool else photo_of(args.out, hands, hand)
        tiles[0, column] = "a frame", frame
        tiles[0, column + 1] = "its hand", common.draw_crop(hands, hand, 200)
        other = common.draw_crop(hands, neighbours[hand], 200)
        tiles[0, column + 2] = "mined match", other
    hands = common.load_hands(tested)
    digits = digits_of(args.out, hands)
    methods = [method for method in ("peclr", "simhand") if method in found]
    for row, digit in enumerate(rng.choice(np.unique(digits), queries, replace=False), 1):
        query = rng.choice(np.flatnonzero(digits == digit))
        tiles[row, 0] = f"not seen before: {digit}", common.read_crop(hands, query)
        for first, method in zip((1, 4), methods):
            for k, other in enumerate(found[method][query, :each]):
                right = "right" if digits[other] == digits[query] else "WRONG"
                title = f"{TITLES[method]} finds: {right}"
                tiles[row, first + k] = title, common.read_crop(hands, other)
    with common.figure(args.out / "picture.jpg", (12, 1.9 * (1 + queries)), dpi=100) as drawn:
        for (row, column), (title, picture) in tiles.items():
            axis = drawn.add_subplot(1 + queries, 1 + 2 * each, 1 + row * (1 + 2 * each) + column)
            axis.imshow(picture)
            axis.set_title(title, fontsize=10, color="red" if "WRONG" in title else "black")
            axis.axis("off")


def photo_of(out, hands, row):
    """The photograph that a hand was cut out of, RGB."""
    folder = out / "photos" / "pool" / hands.videos[hands.rows["video"][row]]
    return common.read_picture(sorted(folder.iterdir())[hands.rows["frame"][row]])


if __name__ == "__main__":
    common.run_script(main)
