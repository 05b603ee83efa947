"""Which pre-training tells hand poses apart in real photographs? Sign digits 0 to 9, shown by many students.

Reads the Sign Language Digits Dataset (github.com/ardamavi/Sign-Language-Digits-Dataset, Apache-2.0) in its own layout:
Dataset/DIGIT/IMG_NUMBER.JPG. A student is a "video". A quarter of the students is held out; the hands of the others
pre-train a ResNet-18 from nothing, by each method, with three seeds. Then each held-out hand looks for the most similar
hand of another held-out student, by the cosine of the frozen features: does it show the same digit, and how far is its
pose? Everything else is equal between the methods. Every stage is a command, logged below OUT/logs; a second call goes
on where the first stopped. Ends with OUT/digits.md (the tables) and OUT/retrieved.jpg (queries and what they found).

    git clone https://github.com/ardamavi/Sign-Language-Digits-Dataset
    python tests/digits.py Sign-Language-Digits-Dataset --out digits
"""

import argparse
import json
import os
import re
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
from study import follow_lanes, run

SEEDS = (0, 1, 2)
EXTRACT = {"default": (), "paper": ("--margin", "1.3", "--border", "black")}
MINE = {"default": (), "as-they-lie": ()}
LETTER = ("--border", "black", "--crop-move", "0.067", "--weighting", "linear")
# row of the table: hands, pairs, flags of pretrain.py
METHODS = {"untrained": None,
           "SimCLR": ("default", "default", ("--method", "simclr", "--weighting", "none")),
           "PeCLR": ("default", "default", ("--method", "peclr", "--weighting", "none")),
           "SiMHand": ("default", "default", ()),
           "SiMHand, to the paper's letter": ("paper", "as-they-lie", LETTER)}
TRAINING = ("--backbone", "resnet18", "--weights", "none", "--input-size", 64, "--epochs", 30, "--batch-size", 256,
            "--optimizer", "adam", "--lr", 1e-3, "--warmup-epochs", 3, "--precision", "fp32", "--workers", 0)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="the data set's folder, which holds Dataset/0 to Dataset/9")
    parser.add_argument("--out", default="digits", help="folder for everything (default: digits)")
    return parser.parse_args()


def find_students(dataset):
    """-> a list for each student of (digit, path). Each student shows the digits in order, one picture each, and the
    camera numbers the pictures: in the order of the numbers, the next student begins where the digit does not rise."""
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


def write_photos(students, out):
    """The pictures enlarged, so that MediaPipe finds their hands, in a folder for each student: OUT/STUDENT/DIGIT.jpg.
    Their edges are continued: a hand that fills its picture is found more often with some room around it."""
    for number, pictures in enumerate(students):
        folder = out / f"student{number:03d}"
        folder.mkdir(parents=True)
        for digit, path in pictures:
            image = cv2.imread(str(path))
            image = cv2.resize(image, (384, 384), interpolation=cv2.INTER_CUBIC)
            image = cv2.copyMakeBorder(image, 96, 96, 96, 96, cv2.BORDER_REPLICATE)
            cv2.imwrite(str(folder / f"{digit}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 95])


def embed(backbone, hands, border, side):
    """Frozen features of all hands of a folder, each seen upright in a fixed square -> (N, 512), of length 1."""
    views = []
    for row, points in enumerate(hands.keypoints):
        view = common.sample_view(np.random.default_rng(0), points, hands.side, side, rotation=0, margin=(1.2, 1.2),
                                  move=0, colour=False)
        views.append(common.apply_view(view, common.read_crop(hands, row), points, side, border)[0])
    backbone.eval()
    with torch.no_grad():
        features = [backbone(common.normalise(torch.from_numpy(np.stack(views[k:k + 64]))))
                    for k in range(0, len(views), 64)]
    return F.normalize(torch.cat(features), dim=1)


def retrieve(features, hands, digits):
    """Each hand's nearest hands of other students -> their rows (N, 5), and the metrics."""
    video = torch.from_numpy(hands.hands["video"].astype(np.int64))
    similarity = features @ features.T
    similarity[video[:, None] == video] = -2
    nearest = similarity.topk(5, dim=1).indices.numpy()
    votes = np.stack([(digits[nearest] == digit).sum(1) for digit in range(10)], 1) * 10
    votes[np.arange(len(digits)), digits[nearest[:, 0]]] += 1  # the nearest one decides between equal votes
    poses = as_poses(hands.keypoints, hands.side, rotation_free=True).reshape(-1, 21, 2)
    apart = np.linalg.norm(poses[nearest[:, 0]] - poses, axis=2).mean()
    return nearest, {"1-NN": float(np.mean(digits[nearest[:, 0]] == digits)),
                     "5-NN": float(np.mean(votes.argmax(1) == digits)), "pose": float(apart)}
