"""The experiment on photographs: students told apart, its commands, and its measures against
loops."""

import os
import shutil

import numpy as np
import pytest

import common
import digits
from conftest import ROOT
from test_readme import parse

PHOTOS = ROOT.parent / "shared" / "real" / "digits"
here = pytest.mark.skipif(not PHOTOS.exists(), reason="the photographs are not here")


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


@here
def test_the_real_photographs_are_of_160_students():
    students = digits.find_students(PHOTOS)
    assert len(students) == 160 and sum(map(len, students)) == 1516


@here
@pytest.mark.parametrize("share, counts", ((1 / 4, (6, 2)), (1, (0, 8))))
def test_a_quarter_of_the_students_is_tested_or_all(share, counts, tmp_path):
    students = digits.find_students(PHOTOS)[:8]
    digits.write_photos(students, tmp_path, share)
    parts = [sorted(p.name for p in tmp_path.glob(f"photos/{part}/*")) for part in
             ("pool", "tested")]
    assert tuple(map(len, parts)) == counts and len({*parts[0], *parts[1]}) == 8
    number = int(parts[1][0][-3:])
    folder = tmp_path / "photos" / "tested" / parts[1][0]
    assert sorted(os.listdir(folder)) == [f"{digit}.jpg" for digit, _ in students[number]]


def test_the_nearest_hands_and_the_vote_against_loops():
    rng = np.random.default_rng(0)
    count = 60
    similarity = rng.normal(size=(count, count))
    shown = rng.integers(0, 3, count)
    persons = np.arange(count) // 6
    nearest = digits.find(similarity, persons)
    found = digits.score(nearest, shown)
    for i in range(count):
        others = [j for j in range(count) if persons[j] != persons[i]]
        others.sort(key=lambda j: -similarity[i, j])
        assert nearest[i].tolist() == others[:5]
        five = [int(shown[j]) for j in others[:5]]
        most = max(five, key=lambda digit: (five.count(digit), digit == five[0]))
        assert found["1-NN"][i] == (five[0] == shown[i])
        assert found["5-NN"][i] == (most == shown[i])


def test_the_interval_draws_persons_not_hands():
    """40 persons of 25 hands that are right or wrong together: as wide as that of 40 hands, five
    times as wide as that of 1,000."""
    right = np.arange(40) % 2
    one_each = digits.interval(right, np.arange(40)).split(" to ")
    assert digits.interval(np.repeat(right, 25), np.repeat(np.arange(40), 25)).split(" to ") \
        == one_each
    assert float(one_each[1]) - float(one_each[0]) == pytest.approx(2 * 1.96 * 0.5 / 40 ** 0.5,
                                                                    rel=0.15)


def test_joints_are_read_off_features_that_hold_them():
    """Features that are a linear map of the keypoints give them back; of other hands they give
    their mean."""
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 1, (200, 21, 2))
    persons = np.arange(200) // 5
    features = points.reshape(200, 42) @ rng.normal(size=(42, 64))
    assert digits.joint_errors(features, points, persons).max() < 0.01
    blind = digits.joint_errors(rng.normal(size=(200, 64)), points, persons).mean()
    to_mean = np.linalg.norm(points - points.mean(0), axis=2).mean()
    assert blind == pytest.approx(to_mean, rel=0.15)


def test_the_middle_of_a_pools_crops(extracted, tmp_path):
    """Hands cut at margin 2.6: half of the crop is what extraction with 1.3 shows."""
    digits.cut_middles(extracted, tmp_path / "half", 0.5)
    whole, half = common.load_hands(extracted), common.load_hands(tmp_path / "half")
    assert half.side == whole.side // 2 and len(half.keypoints) == len(whole.keypoints)
    first = whole.side // 4
    for row in (0, len(half.keypoints) - 1):
        seen = common.read_crop(half, row).astype(int)
        expected = common.read_crop(whole, row)[first:-first, first:-first]
        assert np.abs(seen - expected).mean() < 4
    assert np.allclose(half.keypoints, whole.keypoints - first)
    extent = np.ptp(half.keypoints, axis=1).max(1)
    assert np.allclose(half.side / extent, 1.3, rtol=0.03)


@pytest.mark.parametrize("pool", ((), ("--pool", "hands"), ("--pool", "hands", "given")))
def test_the_methods_differ_in_the_method_alone(pool, mined, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if pool:
        shutil.copytree(mined, "hands")
    args = parse(["digits.py", "photographs", "--seeds", 2, *pool], monkeypatch)
    made = {"hands", "given"} if pool else set()
    for _, done, words in digits.preparation(args):
        step = parse(words, monkeypatch)
        if words[0] == "mine_pairs.py":
            assert step.hands in made
        made.add(str(done.parent))
    assert ("digits/pairs" in made) == (len(pool) < 3)
    runs = {}
    for method in digits.METHODS:
        for _, done, words in digits.pretraining(args, method, 1):
            flags = vars(parse(words, monkeypatch))
            assert flags.pop("out") == str(done.parent) and flags["seed"] == 1
            assert {*flags["hands"], *flags["pairs"]} <= made
            runs[method] = flags
    compared = {"hands", "pairs", "method", "weighting", "target_temperature", "equivariance",
                "rotation", "crop_margin", "border", "crop_move", "paper", "keypoint_loss",
                "temperature",
                "weight_keypoints"}
    for method, flags in runs.items():
        assert {key for key in flags if flags[key] != runs["simhand"][key]} <= compared, method
    if pool:
        assert runs["simhand"]["hands"] == runs["simhand-paper"]["hands"] == ["hands"]
    else:
        assert abs(runs["simhand-paper"]["crop_move"] - 15 / 224) < 1e-4
