"""Mining against brute force, and its refusals."""

import json

import cv2
import numpy as np
import pytest
import torch

import mine_pairs
from conftest import refused, run


def brute_force(embeddings, video, k):
    """One row at a time, in float64; ties on the float32 distance go to the lower index."""
    neighbours, distances = np.full((len(embeddings), k), -1), np.full((len(embeddings), k), np.inf, np.float32)
    for i, row in enumerate(embeddings.astype(np.float64)):
        d = np.sqrt(((embeddings.astype(np.float64) - row) ** 2).sum(1)).astype(np.float32)
        order = np.lexsort((np.arange(len(d)), d))
        others = [j for j in order if j != i and (video is None or video[j] != video[i])][:k]
        neighbours[i, :len(others)], distances[i, :len(others)] = others, d[others]
    return neighbours, distances


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("exclude", [True, False])
def test_equals_brute_force_with_crowded_videos_and_ties(k, exclude):
    rng = np.random.default_rng(k)
    video = np.sort(rng.integers(0, 6, 400)).astype(np.int32)
    centres = rng.normal(size=(6, 14))
    embeddings = (centres[video] + 0.01 * rng.normal(size=(400, 14))).astype(np.float32)  # near-duplicates in a video
    embeddings[::7] = np.round(embeddings[::7])  # equal rows in several videos: ties
    expected = brute_force(embeddings, video if exclude else None, k)
    found = mine_pairs.nearest(embeddings, video if exclude else None, k, torch.device("cpu"))
    assert np.array_equal(found[0], expected[0])
    assert np.allclose(found[1], expected[1], rtol=1e-6)


def test_a_hand_without_candidates_gets_minus_one_and_infinity():
    embeddings = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    video = np.array([0, 0, 0, 0, 0, 1, 1], np.int32)
    neighbours, distances = mine_pairs.nearest(embeddings, video, 5, torch.device("cpu"))
    assert (neighbours[:5, 2:] == -1).all() and np.isinf(distances[:5, 2:]).all() and (neighbours[5:] >= 0).all()
    assert ((neighbours >= 0) == np.isfinite(distances)).all()


def test_pca_equals_a_singular_value_decomposition():
    poses = np.random.default_rng(0).normal(size=(300, 42)) @ np.random.default_rng(1).normal(size=(42, 42))
    mean, components, explained = mine_pairs.fit_pca(poses, 14)
    _, singular, vt = np.linalg.svd(poses - poses.mean(0), full_matrices=False)
    signs = np.sign(vt[np.arange(42), np.abs(vt).argmax(1)])
    assert np.allclose(mean, poses.mean(0)) and np.allclose(components, (vt * signs[:, None])[:14], atol=1e-8)
    assert explained == pytest.approx((singular[:14] ** 2).sum() / (singular ** 2).sum())


def test_files_as_the_contract_says(mined):
    keypoints, video = np.load(mined / "keypoints.npy"), np.load(mined / "hands.npy")["video"]
    n, side = len(keypoints), 224
    pca, embeddings = np.load(mined / "pca.npy"), np.load(mined / "embeddings.npy")
    neighbours, distances = np.load(mined / "neighbours.npy"), np.load(mined / "distances.npy")
    for array, dtype, shape in ((pca, np.float32, (15, 42)), (embeddings, np.float32, (n, 14)),
                                (neighbours, np.int64, (n, 3)), (distances, np.float32, (n, 3))):
        assert array.dtype == dtype and array.shape == shape
    assert np.allclose((keypoints.reshape(n, 42) / side - pca[0]) @ pca[1:].T, embeddings, atol=1e-5)
    expected = brute_force(embeddings, video, 3)
    assert np.array_equal(neighbours, expected[0]) and np.allclose(distances, expected[1], rtol=1e-6)
    assert (video[neighbours] != video[:, None]).all()
    summary = json.loads((mined / "mining.jsonl").read_text().splitlines()[1])
    assert summary["hands"] == n and summary["without_neighbour"] == 0 and 0.9 < summary["explained_variance"] <= 1
    assert all(cv2.imread(str(mined / name)) is not None for name in ("pairs.jpg", "distances.png"))


def test_a_second_mining_gives_the_same_bytes_and_out_leaves_the_folder_alone(mined, hands, tmp_path):
    before = sorted(p.name for p in hands.iterdir())
    run("mine_pairs.py", hands, "--top-k", 3, "--out", tmp_path / "elsewhere")
    assert sorted(p.name for p in hands.iterdir()) == before
    for name in ("pca.npy", "embeddings.npy", "neighbours.npy", "distances.npy"):
        assert (tmp_path / "elsewhere" / name).read_bytes() == (mined / name).read_bytes()
    assert "is replaced" in run("mine_pairs.py", hands, "--out", tmp_path / "elsewhere").stdout
    assert np.load(tmp_path / "elsewhere" / "neighbours.npy").shape[1] == 1


def damage(name):
    def change(folder):
        array = np.load(folder / name)
        yield "missing", lambda: (folder / name).unlink()
        yield "truncated", lambda: (folder / name).write_bytes((folder / name).read_bytes()[:-9])
        yield "expected", lambda: np.save(folder / name, array.astype("f8") if array.dtype.kind != "V" else np.zeros(3))
        yield "expected", lambda: np.save(folder / name, array[:-1])
    return change


@pytest.mark.parametrize("name", ["crops.npy", "offsets.npy", "keypoints.npy", "hands.npy"])
def test_damaged_hands_folders_are_named(hands, name):
    original = (hands / name).read_bytes()
    for word, action in damage(name)(hands):
        action()
        line = refused("mine_pairs.py", hands)
        assert ".npy" in line and word in line
        if name != "keypoints.npy" or word in ("missing", "truncated"):  # the keypoints say how long the others must be
            assert name in line
        (hands / name).write_bytes(original)
    assert not (hands / "neighbours.npy").exists()


def test_other_bad_input_is_refused_in_one_line(hands, tmp_path):
    run("mine_pairs.py", tmp_path / "nowhere", status=2)  # the status of a real process, once
    rows, keypoints = np.load(hands / "hands.npy"), np.load(hands / "keypoints.npy")
    assert "no such folder" in refused("mine_pairs.py", tmp_path / "nowhere")
    most = len(rows) - np.bincount(rows["video"]).min()
    assert f"more than {most} candidates" in refused("mine_pairs.py", hands, "--top-k", most + 1)
    assert "--dims must lie in 1..42" in refused("mine_pairs.py", hands, "--dims", 43)
    bad = keypoints.copy()
    bad[7, 3, 1] = np.nan
    np.save(hands / "keypoints.npy", bad)
    assert "keypoints.npy: values must be finite, row 7" in refused("mine_pairs.py", hands)
    np.save(hands / "keypoints.npy", np.broadcast_to(keypoints[:1], keypoints.shape).copy())
    assert "needs them to vary" in refused("mine_pairs.py", hands)
    np.save(hands / "keypoints.npy", keypoints)
    one = rows.copy()
    one["video"] = 0
    np.save(hands / "hands.npy", one)
    assert "come from one video" in refused("mine_pairs.py", hands)
    (hands / "videos.txt").write_text("only one\n")
    np.save(hands / "hands.npy", rows)
    assert "videos.txt: has 1 lines" in refused("mine_pairs.py", hands)


def test_fewer_hands_than_dimensions(hands):
    offsets = np.load(hands / "offsets.npy")
    np.save(hands / "offsets.npy", offsets[:11])
    np.save(hands / "crops.npy", np.load(hands / "crops.npy")[:offsets[10]])
    for name in ("keypoints.npy", "hands.npy"):
        np.save(hands / name, np.load(hands / name)[:10])
    line = refused("mine_pairs.py", hands)
    assert "10 hands" in line and "needs 15" in line


def test_same_video_allows_the_own_video(hands):
    rows = np.load(hands / "hands.npy")
    rows["video"] = 0
    np.save(hands / "hands.npy", rows)
    run("mine_pairs.py", hands, "--same-video")
    neighbours = np.load(hands / "neighbours.npy")[:, 0]
    assert (neighbours >= 0).all() and (neighbours != np.arange(len(rows))).all()
