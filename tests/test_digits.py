"""The experiment on photographs: students told apart, and its metrics against loops."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import digits
from conftest import ENVIRONMENT, ROOT

PHOTOS = ROOT.parent / "shared" / "real" / "digits"


def test_students_are_told_apart_by_the_order_of_the_pictures(tmp_path):
    """Two students who show all digits, one who leaves out 0 to 4, and one who begins with a 7."""
    shown = [*range(10), *range(10), *range(5, 10), 7, 8]
    for number, digit in enumerate(shown):
        folder = tmp_path / "Dataset" / str(digit)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"IMG_{990 + 3 * number}.JPG").touch()  # 999 comes before 1002
    students = digits.find_students(tmp_path)
    assert [[digit for digit, _ in student] for student in students] == [
        list(range(10)), list(range(10)), list(range(5, 10)), [7, 8]]


@pytest.mark.skipif(not PHOTOS.exists(), reason="the photographs are not here")
def test_the_real_photographs_are_of_160_students():
    students = digits.find_students(PHOTOS)
    assert len(students) == 160 and sum(map(len, students)) == 1516


def test_the_command_refuses_a_folder_without_pictures(tmp_path):
    result = subprocess.run([sys.executable, ROOT / "tests" / "digits.py", tmp_path, "--out",
                             tmp_path / "out"], capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 1 and "expected pictures" in result.stderr, result.stderr


def test_retrieval_against_loops():
    rng = np.random.default_rng(0)
    count = 60
    features = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(count, 8))), dim=1)
    shown = rng.integers(0, 3, count)
    rows = np.zeros(count, [("video", "<i4")])
    rows["video"] = np.arange(count) // 6
    keypoints = rng.normal(size=(count, 21, 2)).astype(np.float32)
    hands = SimpleNamespace(rows=rows, keypoints=keypoints, side=64)
    nearest, metrics = digits.retrieve(features, hands, shown)
    right, voted = [], []
    for i in range(count):
        others = [j for j in range(count) if rows["video"][j] != rows["video"][i]]
        others.sort(key=lambda j: -float(features[i] @ features[j]))
        assert nearest[i].tolist() == others[:5]
        five = [int(shown[j]) for j in others[:5]]
        most = max(five, key=lambda digit: (five.count(digit), digit == five[0]))
        right.append(five[0] == shown[i])
        voted.append(most == shown[i])
    assert metrics["1-NN"] == pytest.approx(np.mean(right))
    assert metrics["5-NN"] == pytest.approx(np.mean(voted))
    poses = digits.as_poses(keypoints, 64, True).reshape(-1, 21, 2)
    gaps = [np.mean([np.linalg.norm(a - b) for a, b in zip(poses[i], poses[nearest[i, 0]])])
            for i in range(count)]
    assert metrics["pose"] == pytest.approx(np.mean(gaps))


@pytest.mark.skipif(not PHOTOS.exists(), reason="the photographs are not here")
def test_the_photos_of_a_quarter_of_the_students_are_held_out(tmp_path):
    students = digits.find_students(PHOTOS)[:8]
    digits.split_students(students, tmp_path)
    parts = {part: sorted(os.listdir(tmp_path / "photos" / part)) for part in ("pool", "held-out")}
    assert len(parts["held-out"]) == 2 and len(parts["pool"]) == 6
    assert not set(parts["pool"]) & set(parts["held-out"])
    number = int(parts["pool"][0][-3:])
    folder = tmp_path / "photos" / "pool" / parts["pool"][0]
    assert sorted(os.listdir(folder)) == [f"{digit}.jpg" for digit, _ in students[number]]
