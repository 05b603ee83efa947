"""Mining against brute force, and its refusals."""

import argparse
import json
import re
import shlex
import shutil

import cv2
import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

import common
import mine_pairs
from common import HANDS_DTYPE, Hands, best_turns, load_hands, read_crop
from conftest import TINY, refused, run, run_here, torchrun


def brute_force(embeddings, video, k):
    """One row at a time, in float64; ties on the float32 distance go to the lower index."""
    neighbours = np.full((len(embeddings), k), -1)
    distances = np.full((len(embeddings), k), np.inf, np.float32)
    for i, row in enumerate(embeddings.astype(np.float64)):
        square = sum((column - x) ** 2 for column, x in zip(embeddings.astype(np.float64).T, row))
        d = np.sqrt(square).astype(np.float32)
        order = np.lexsort((np.arange(len(d)), d))
        others = [j for j in order if j != i and (video is None or video[j] != video[i])][:k]
        neighbours[i, :len(others)], distances[i, :len(others)] = others, d[others]
    return neighbours, distances


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU"))]
LEAVES = [5, 16, None]  # rows in a leaf; None: all of these


def check(embeddings, video, k, device="cpu", leaf=None):
    expected = brute_force(embeddings, video, k)
    group = np.arange(len(embeddings)) if video is None else video
    found = mine_pairs.nearest(embeddings, group, k, torch.device(device), leaf=leaf)
    assert np.array_equal(found[0], expected[0]) and np.array_equal(found[1], expected[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("exclude", [True, False])
@pytest.mark.parametrize("k", [1, 3, 10])
def test_equals_brute_force_with_crowded_videos_and_ties(k, exclude, leaf, device):
    rng = np.random.default_rng(k)
    video = np.sort(rng.integers(0, 6, 400)).astype(np.int32)
    centres = rng.normal(size=(6, 14))
    # Near-duplicates in a video.
    embeddings = (centres[video] + 0.01 * rng.normal(size=(400, 14))).astype(np.float32)
    embeddings[::7] = np.round(embeddings[::7])  # equal rows in several videos: ties
    check(embeddings, video if exclude else None, k, device, leaf)


@pytest.mark.parametrize("case", ["plain", "crowds", "one giant video", "all equal", "outliers",
                                  "far from zero", "one dimension", "42 dimensions", "a grid"])
def test_equals_brute_force_in_hard_cases(case):
    rng = np.random.default_rng(0)
    video = np.sort(rng.integers(0, 20, 1500)).astype(np.int32)
    embeddings = rng.normal(size=(1500, 14)) * 0.8 ** np.arange(14)
    if case == "crowds":  # 75 near-duplicates each, at places that several videos share
        embeddings = rng.normal(size=(5, 14))[video % 5] + 1e-4 * rng.normal(size=(1500, 14))
    if case == "one giant video":
        video[:1400] = 0
    if case == "all equal":  # the lowest index of another video
        embeddings[100:1400] = 0.3
    if case == "outliers":
        embeddings[::50] *= 1000
    if case == "far from zero":  # products in float32 know the distances to 1e-1 only
        embeddings = 300 + 0.1 * embeddings
    if case == "one dimension":
        embeddings = embeddings[:, :1]
    if case == "42 dimensions":
        embeddings = rng.normal(size=(1500, 42))
    if case == "a grid":  # many equal distances that are not zero
        embeddings = rng.integers(0, 3, (1500, 4))
    rows = rng.permutation(1500)  # videos need not be sorted here
    check(embeddings[rows].astype(np.float32), video[rows], 2, leaf=32)


def test_equals_brute_force_where_so_many_pairs_are_equal_that_they_are_measured_in_turns(
        monkeypatch):
    monkeypatch.setattr(mine_pairs, "AT_ONCE", 500)
    rng = np.random.default_rng(0)
    embeddings = rng.integers(0, 2, (300, 3)).astype(np.float32)
    check(embeddings, rng.integers(0, 20, 300), 3, leaf=20)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_result_does_not_depend_on_the_number_of_threads_nor_changes_it(threads):
    rng = np.random.default_rng(0)
    video = np.repeat(np.arange(40), 50)
    embeddings = rng.normal(size=(2000, 5)).astype(np.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(embeddings, video, 4, leaf=20)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def rounded_as_tf32(x):
    """float32 with the 10 bits of mantissa that a tensor core keeps of an input."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def test_products_in_tf32_would_be_found_out(monkeypatch):
    """Which is what TORCH_ALLOW_TF32_CUBLAS_OVERRIDE makes of them on a GPU."""
    rng = np.random.default_rng(0)
    centres = 2 * rng.normal(size=(100, 14))
    embeddings = centres[rng.integers(0, 100, 1000)] + 0.01 * rng.normal(size=(1000, 14))
    video = rng.integers(0, 40, 1000)
    check(embeddings.astype(np.float32), video, 1)
    exact = torch.addmm

    def rounded(added, a, b, **more):
        return exact(added, rounded_as_tf32(a), rounded_as_tf32(b), **more)

    monkeypatch.setattr(torch, "addmm", rounded)
    with pytest.raises(AssertionError):
        check(embeddings.astype(np.float32), video, 1)


class Tagged(TorchFunctionMode):
    """Runs on the CPU what names a GPU, and notes for each tensor where it would lie."""

    def __init__(self):
        super().__init__()
        self.mixed = []  # calls whose tensors lie on two devices
        self.largest = 0  # of a tensor that would lie on the GPU, bytes

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        if name == "__get__" and getattr(function.__self__, "__name__", "") == "device":
            return torch.device(place_of(args[0]))
        target = kwargs.pop("device", None)
        if name == "to" and isinstance(args[1], torch.device):
            target = args[1]
            args = (args[0].clone(), "cpu")
        if name == "cpu":
            target = "cpu"
            args = (args[0].clone(),)
        places = {place_of(t) for t in tensors if t.dim()}
        if name in ("__getitem__", "__setitem__"):
            places = {place_of(args[0])} | {place for place in places if place != "cpu"}
        if len(places) > 1 or name == "numpy" and places != {"cpu"}:
            self.mixed.append(name)
        out = function(*args, **kwargs)
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor):
                tensor.place = str(target or max(places, default="cpu"))  # "cuda:0" > "cpu"
                if tensor.place != "cpu":
                    self.largest = max(self.largest, tensor.numel() * tensor.element_size())
        return out


def place_of(tensor):
    return getattr(tensor, "place", "cpu")


def search_as_on_a_gpu(top_k, rows=None):
    """3,000 rows searched on the CPU and as on a GPU -> both results, and the Tagged."""
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(3000, 14)).astype(np.float32)
    video = rng.integers(0, 40, 3000)
    expected = mine_pairs.nearest(embeddings, video, top_k, torch.device("cpu"), rows)
    with Tagged() as tagged:
        found = mine_pairs.nearest(embeddings, video, top_k, torch.device("cuda:0"), rows, 256)
    return expected, found, tagged


@pytest.mark.parametrize("rows", [None, np.arange(2000, 20, -7)])
def test_the_gpus_branch_never_mixes_devices_and_gives_the_cpus_answer(rows):
    expected, found, tagged = search_as_on_a_gpu(3, rows)
    assert tagged.largest > 0 and not tagged.mixed
    assert np.array_equal(found[0], expected[0]) and np.array_equal(found[1], expected[1])


def test_a_gpu_holds_no_block_above_half_a_gigabyte():
    """So that with its masks and copies a search needs less than 2 GB."""
    tagged = search_as_on_a_gpu(1)[2]
    assert tagged.largest * (mine_pairs.LEAF["cuda"] / 256) ** 2 <= 2 ** 29


def test_some_rows_are_searched_for_alone():
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(500, 5)).astype(np.float32)
    video = rng.integers(0, 9, 500)
    rows = rng.permutation(500)[:33]
    expected = brute_force(embeddings, video, 4)
    found = mine_pairs.nearest(embeddings, video, 4, torch.device("cpu"), rows, leaf=8)
    assert all(np.array_equal(found[k], expected[k][rows]) for k in (0, 1))


def write_hands(folder, keypoints, video, jpegs):
    folder.mkdir()
    rows = np.zeros(len(video), HANDS_DTYPE)
    rows["video"] = video
    np.save(folder / "hands.npy", rows)
    np.save(folder / "keypoints.npy", keypoints.astype(np.float32))
    np.save(folder / "offsets.npy", np.cumsum([0, *map(len, jpegs)]))
    np.save(folder / "crops.npy", np.concatenate(jpegs))
    names = "".join(f"clip{k}.mp4\n" for k in range(max(video) + 1))
    (folder / "videos.txt").write_text(names)


@pytest.fixture
def twice(tmp_path):
    """-> a hands folder in which video 6 is video 0 once more, encoded again in the dark, and
    video 5, of 30 hands, one picture throughout, which video 7 shows too; for each hand the number
    of its picture."""
    rng = np.random.default_rng(0)
    video = np.repeat([0, 1, 2, 3, 4, 5, 6, 7], [12, 12, 12, 12, 12, 30, 12, 5])
    picture = np.concatenate([np.arange(60), np.full(30, 60), np.arange(12), np.full(5, 60)])
    noise = rng.integers(0, 256, (61, 64, 64, 3), dtype=np.uint8)
    images = np.stack([cv2.GaussianBlur(image, (0, 0), 4) for image in noise])
    images = (images.astype(float) - 128) * 5 + 128
    quality = np.where(video == 6, 60, 95)
    jpegs = [cv2.imencode(".jpg", images[p].clip(0, 255), [cv2.IMWRITE_JPEG_QUALITY, int(q)])[1]
             for p, q in zip(picture, quality)]
    hands = rng.uniform(10, 54, (61, 21, 2))
    hands[60] = hands[:60].mean(0)
    keypoints = hands[picture] + 0.1 * rng.normal(size=(len(video), 21, 2))
    write_hands(tmp_path / "hands", keypoints, video, jpegs)
    return tmp_path / "hands", picture


def nearest_other_pictures(folder, picture, k):
    """Brute force over those of other videos that do not show the same picture."""
    embeddings = np.load(folder / "embeddings.npy").astype(np.float64)
    video = np.load(folder / "hands.npy")["video"]
    apart = np.linalg.norm(embeddings[:, None] - embeddings, axis=2)
    apart[(video[:, None] == video) | (picture[:, None] == picture)] = np.inf
    return apart.argsort(1)[:, :k], np.sort(apart, 1)[:, :k]


@pytest.mark.parametrize("top_k", [1, 4])
def test_a_video_that_lies_there_twice_pairs_no_hand_with_itself(twice, top_k):
    folder, picture = twice
    printed = run_here("mine_pairs.py", folder, "--top-k", top_k)
    expected = nearest_other_pictures(folder, picture, top_k)
    assert np.array_equal(np.load(folder / "neighbours.npy"), expected[0])
    assert np.allclose(np.load(folder / "distances.npy"), expected[1], rtol=1e-5)
    summary = json.loads((folder / "mining.jsonl").read_text().splitlines()[1])
    assert summary["same_picture"] == 12 + 30 + 12 + 5
    assert "59 hands have the same picture in another video, as in clip0.mp4 and clip6" in printed


def test_a_hand_of_which_all_others_are_copies_has_no_neighbour(twice, tmp_path):
    folder, picture = twice
    hands = mine_pairs.load_hands(folder)
    rows = np.flatnonzero(np.isin(hands.rows["video"], (5, 7)))
    pictures = mine_pairs.thumbnails(hands, rows, 0, 1)
    embeddings = np.random.default_rng(0).normal(size=(len(picture), 3)).astype(np.float32)
    pairs = mine_pairs.similar_hands(hands, rows, embeddings, pictures, 1, False,
                                     torch.device("cpu"))
    assert (pairs.neighbours == -1).all() and np.isinf(pairs.distances).all()
    assert set(hands.rows["video"][pairs.copies[rows[:30]]]) == {7}


def test_pictures_are_the_same_up_to_a_fifth_of_their_contrast():
    one = np.repeat([[78, 178]], 72, axis=1)  # standard deviation 50
    pictures = np.concatenate([one, one + 9, one + 11]).astype(np.uint8)
    found = mine_pairs.same_picture(pictures, np.array([0]), np.array([[1, 2]]))
    assert found.tolist() == [[True, False]]


def test_a_folder_of_one_picture_is_refused(twice):
    folder, _ = twice
    rows = np.load(folder / "hands.npy")
    jpegs = np.load(folder / "crops.npy")
    start, end = np.load(folder / "offsets.npy")[:2]
    np.save(folder / "crops.npy", np.tile(jpegs[start:end], len(rows)))
    np.save(folder / "offsets.npy", np.arange(len(rows) + 1) * (end - start))
    assert "no hand has a neighbour" in refused("mine_pairs.py", folder)


def test_the_own_video_may_show_the_same_picture_again(twice):
    """The ablation is about near-duplicates; those of other videos are left out there too."""
    folder, picture = twice
    run_here("mine_pairs.py", folder, "--same-video")
    video = np.load(folder / "hands.npy")["video"]
    neighbours = np.load(folder / "neighbours.npy")[:, 0]
    same = picture[neighbours] == picture
    assert same[video == 5].all() and not (same & (video[neighbours] != video)).any()


def test_the_next_command_runs_as_it_is_printed(twice, tmp_path):
    folder, _ = twice
    printed = run_here("mine_pairs.py", folder, "--out", tmp_path / "some pairs")
    words = shlex.split(printed.strip().splitlines()[-1])
    assert words == ["python", "pretrain.py", str(folder), "--pairs", str(tmp_path / "some pairs"),
                     "--batch-size", "16", "--out", "runs/some pairs"]
    # The probe keeps some of the hands: as many as the default batch has would not be left.
    assert "--batch-size 2048" in common.pretrain_command(folder, folder, 8600)
    assert "--batch-size" not in common.pretrain_command(folder, folder, 16384)


@pytest.mark.parametrize("flags, upright", [
    ([], True), (["--paper"], False), (["--paper", "--rotation-free"], True),
    (["--no-rotation-free"], False), (["--temporal"], False)])
def test_the_papers_hands_lie_as_they_do_unless_a_flag_says_otherwise(monkeypatch, flags, upright):
    monkeypatch.setattr("sys.argv", ["mine_pairs.py", "hands", *flags])
    assert mine_pairs.parse_args().rotation_free == upright


def test_two_ranks_write_the_bytes_of_one_process(mined, hands, tmp_path):
    result = torchrun("mine_pairs.py", hands, "--top-k", 3, "--no-rotation-free", "--out",
                      tmp_path / "elsewhere")
    assert result.stdout.count("wrote ") == 1
    for name in ("pca.npy", "embeddings.npy", "neighbours.npy", "distances.npy", "pairs.jpg"):
        assert (tmp_path / "elsewhere" / name).read_bytes() == (mined / name).read_bytes()


def mine_some(hands, out, limit):
    """-> the rows that were mined, and their neighbours."""
    run_here("mine_pairs.py", hands, "--limit", limit, "--seed", 3, "--no-rotation-free", "--out",
             out)
    neighbours = np.load(out / "neighbours.npy")[:, 0]
    assert len(neighbours) == len(np.load(hands / "keypoints.npy"))
    return np.flatnonzero(neighbours >= 0), neighbours


def test_limit_mines_as_if_there_were_no_other_hands(hands, tmp_path):
    rows, neighbours = mine_some(hands, tmp_path / "out", 60)
    assert len(rows) == 60 and np.diff(rows).max() > 1
    embeddings = np.load(tmp_path / "out" / "embeddings.npy")[rows]
    video = np.load(hands / "hands.npy")["video"][rows]
    assert np.array_equal(neighbours[rows], rows[brute_force(embeddings, video, 1)[0]][:, 0])
    poses = np.load(hands / "keypoints.npy")[rows].reshape(-1, 42) / 224
    assert np.allclose(np.load(tmp_path / "out" / "pca.npy")[0], poses.mean(0), atol=1e-6)
    distances = np.load(tmp_path / "out" / "distances.npy")[:, 0]
    assert np.array_equal(np.isfinite(distances), neighbours >= 0)


def test_the_seed_draws_the_limits_hands(hands):
    opened = load_hands(hands)
    rows = [mine_pairs.choose_rows(opened, argparse.Namespace(
        limit=60, dims=14, temporal=False, same_video=False, seed=seed)) for seed in (0, 1)]
    assert not np.array_equal(*rows)


def test_of_one_seed_the_smaller_limit_lies_in_the_larger(hands, tmp_path):
    few, many = (set(mine_some(hands, tmp_path / str(limit), limit)[0]) for limit in (60, 100))
    assert few < many


def test_pre_training_uses_the_hands_that_have_a_neighbour(hands, tmp_path):
    mine_some(hands, tmp_path / "60", 60)
    printed = run_here("pretrain.py", hands, "--pairs", tmp_path / "60", "--out", tmp_path / "run",
                       "--batch-size", 20, "--epochs", 1, "--warmup-epochs", 0, "--probe", 0, *TINY)
    assert re.search(r"^ +pool +60$", printed, re.M)


@pytest.mark.parametrize("limit, words", [
    (10**6, "fewer than --limit"), (10, "--limit 10: 10 hands, a PCA of --dims 14 needs 15")])
def test_limits_that_cannot_be_are_refused(hands, limit, words):
    assert words in refused("mine_pairs.py", hands, "--limit", limit)


def next_frames(rows, embeddings, folder, fps=None):
    """mine_pairs.next_frames of a hands folder that was extracted at this rate; None: not known."""
    if fps:
        (folder / "log.jsonl").write_text(json.dumps({"args": {"fps": fps}}) + "\n")
    hands = Hands(folder, crops=None, offsets=None, keypoints=None, rows=rows, videos=[])
    pairs = mine_pairs.next_frames(hands, embeddings)
    return pairs.neighbours[:, 0], pairs.distances[:, 0]


@pytest.fixture
def seen_again():
    """-> 11 rows of hands.npy of two videos, and embeddings."""
    rows = np.zeros(11, HANDS_DTYPE)
    rows["video"] = [0] * 8 + [1] * 3
    rows["frame"] = [0, 0, 30, 30, 30, 60, 150, 180, 0, 30, 60]
    rows["time"] = rows["frame"] / 30
    rows["left"] = [0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 1]
    x = np.array([10, 200, 90, 14, 10, 15, 10, 11, 50, 50, 51])
    rows["box"] = np.stack([x, x, x + 40, x + 40], 1)
    return rows, np.random.default_rng(0).normal(size=(11, 3)).astype(np.float32)


def test_temporal_pairs_are_the_nearest_box_of_the_same_side_in_the_next_frame(seen_again,
                                                                               tmp_path):
    neighbours, _ = next_frames(*seen_again, tmp_path)
    # Row 0: of two hands of its side the nearer; row 1: the other side; row 5 lies in frame 60,
    # which is followed by 150: not the next one.
    assert neighbours.tolist() == [3, 4, 5, 5, -1, -1, 7, -1, -1, 10, -1]


def test_the_nearest_box_is_that_with_the_nearest_middle(seen_again, tmp_path):
    rows, embeddings = seen_again
    rows = rows[[0, 2, 3]]
    rows["box"] = [[100, 100, 140, 140], [100, 100, 300, 300], [90, 90, 150, 150]]
    assert next_frames(rows, embeddings[:3], tmp_path)[0].tolist() == [2, -1, -1]


def test_a_frame_three_samples_later_is_not_the_next_one(seen_again, tmp_path):
    rows, embeddings = seen_again
    every_third = rows[[0, 2, 5, 3]]  # and then one that was sampled right after
    every_third["frame"] = [0, 90, 180, 210]
    every_third["time"] = [0, 3, 6, 7]
    found = next_frames(every_third, embeddings[:4], tmp_path)[0]
    assert found.tolist() == [1, 2, 3, -1]  # where the rate is not known, all look like it
    found = next_frames(every_third, embeddings[:4], tmp_path, fps=1)[0]
    assert found.tolist() == [-1, -1, 3, -1]


def test_the_next_frame_of_a_source_slower_than_its_sampling_is_the_next_one(seen_again, tmp_path):
    rows, embeddings = seen_again
    slow = rows[[0, 2, 5]]  # a source of 5 frames a second, sampled 10 times a second
    slow["frame"] = [0, 1, 2]
    slow["time"] = [0, 0.2, 0.4]
    assert next_frames(slow, embeddings[:3], tmp_path, fps=10)[0].tolist() == [1, 2, -1]


def test_distances_of_temporal_pairs_are_those_of_their_embeddings(seen_again, tmp_path):
    rows, embeddings = seen_again
    neighbours, distances = next_frames(rows, embeddings, tmp_path)
    assert (neighbours >= 0).sum() == 6
    for i, j in enumerate(neighbours):
        apart = np.linalg.norm(embeddings[i].astype(float) - embeddings[j])
        assert distances[i] == (np.inf if j < 0 else np.float32(apart))


def test_temporal_pairs_of_a_folder(hands):
    run_here("mine_pairs.py", hands, "--temporal")
    rows, neighbours = np.load(hands / "hands.npy"), np.load(hands / "neighbours.npy")[:, 0]
    paired = neighbours >= 0
    assert 0.5 < paired.mean() < 1
    for key, difference in (("video", 0), ("left", 0), ("frame", 1)):
        assert (rows[key][neighbours[paired]].astype(int) - rows[key][paired] == difference).all()


def test_published_hands_have_no_next_frame(hands):
    (hands / "log.jsonl").write_text('{"args": {"annotations": "hands.json", "fps": 1.0}}\n')
    assert "--temporal needs hands out of videos" in refused("mine_pairs.py", hands, "--temporal")


@pytest.mark.parametrize("log", ["", '{"another": "program"}\n', '{"args": ["--fps"]}\n'])
def test_without_the_extractions_log_the_rate_is_the_usual_gap(hands, log):
    run_here("mine_pairs.py", hands, "--temporal")
    expected = np.load(hands / "neighbours.npy")
    (hands / "log.jsonl").write_text(log)
    run_here("mine_pairs.py", hands, "--temporal")
    assert np.array_equal(np.load(hands / "neighbours.npy"), expected)


def test_temporal_pairs_need_sorted_rows(hands):
    np.save(hands / "hands.npy", np.load(hands / "hands.npy")[::-1])
    assert "rows must be sorted" in refused("mine_pairs.py", hands, "--temporal")


def test_temporal_pairs_of_single_frames_are_refused(hands):
    rows = np.load(hands / "hands.npy")
    rows["frame"], rows["video"] = 0, np.arange(len(rows))
    np.save(hands / "hands.npy", rows)
    (hands / "videos.txt").write_text("a.mp4\n" * len(rows))
    assert "no hand has a neighbour" in refused("mine_pairs.py", hands, "--temporal")


def test_pairs_are_not_written_into_another_hands_folder(hands, tmp_path):
    other = shutil.copytree(hands, tmp_path / "other")
    assert "is another hands folder" in refused("mine_pairs.py", hands, "--out", other)


def test_a_hand_without_candidates_gets_minus_one_and_infinity():
    embeddings = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    video = np.array([0, 0, 0, 0, 0, 1, 1], np.int32)
    neighbours, distances = mine_pairs.nearest(embeddings, video, 5, torch.device("cpu"))
    assert (neighbours[:5, 2:] == -1).all() and np.isinf(distances[:5, 2:]).all()
    assert (neighbours[5:] >= 0).all()
    assert ((neighbours >= 0) == np.isfinite(distances)).all()


def test_hands_beyond_the_first_65536_are_embedded_and_turned():
    keypoints = np.random.default_rng(0).normal(100, 30, (65_600, 21, 2)).astype(np.float32)
    hands = Hands(None, None, None, keypoints, None, None, side=224)
    pca, _, embeddings = mine_pairs.embed(hands, np.arange(100), 5, True)
    poses = mine_pairs.as_poses(keypoints[-9:], 224, True)
    assert np.allclose(embeddings[-9:], (poses - pca[0]) @ pca[1:].T, atol=1e-5)
    turns = common.pair_turns(keypoints, np.arange(65_600)[::-1, None])
    assert np.allclose(turns[-9:, 0], best_turns(keypoints[-9:], keypoints[8::-1]))


def test_pca_equals_a_singular_value_decomposition():
    mixture = np.random.default_rng(1).normal(size=(42, 42))
    poses = np.random.default_rng(0).normal(size=(300, 42)) @ mixture
    mean, components, explained = mine_pairs.fit_pca(poses, 14)
    _, singular, vt = np.linalg.svd(poses - poses.mean(0), full_matrices=False)
    signs = np.sign(vt[np.arange(42), np.abs(vt).argmax(1)])
    assert np.allclose(mean, poses.mean(0))
    assert np.allclose(components, (vt * signs[:, None])[:14], atol=1e-8)
    assert explained == pytest.approx((singular[:14] ** 2).sum() / (singular ** 2).sum())


def test_files_as_the_contract_says(mined):
    keypoints, video = np.load(mined / "keypoints.npy"), np.load(mined / "hands.npy")["video"]
    n, side = len(keypoints), 224
    pca, embeddings = np.load(mined / "pca.npy"), np.load(mined / "embeddings.npy")
    neighbours, distances = np.load(mined / "neighbours.npy"), np.load(mined / "distances.npy")
    for array, dtype, shape in ((pca, np.float32, (15, 42)), (embeddings, np.float32, (n, 14)),
                                (neighbours, np.int64, (n, 3)), (distances, np.float32, (n, 3))):
        assert array.dtype == dtype and array.shape == shape
    assert np.allclose((keypoints.reshape(n, 42) / side - pca[0]) @ pca[1:].T, embeddings,
                       atol=1e-5)
    expected = brute_force(embeddings, video, 3)
    assert np.array_equal(neighbours, expected[0])
    assert np.allclose(distances, expected[1], rtol=1e-6)
    assert (video[neighbours] != video[:, None]).all()
    summary = json.loads((mined / "mining.jsonl").read_text().splitlines()[1])
    assert summary["hands"] == n and summary["without_neighbour"] == 0
    assert 0.9 < summary["explained_variance"] <= 1
    assert all(cv2.imread(str(mined / name)) is not None for name in ("pairs.jpg", "distances.png"))


def test_the_summary_counts(mined):
    summary = json.loads((mined / "mining.jsonl").read_text().splitlines()[1])
    first = np.load(mined / "neighbours.npy")[:, 0]
    video = np.load(mined / "hands.npy")["video"]
    distances = np.load(mined / "distances.npy")[:, 0]
    assert summary["neighbours_from_videos"] == len({*video[first]})
    assert summary["most_often_chosen"] == max(np.bincount(first))
    assert summary["median_distance"] == pytest.approx(np.median(distances), abs=1e-4)


def test_a_crop_is_drawn_turned_as_its_pair_says(mined):
    hands = load_hands(mined)
    side = hands.side
    turned = cv2.warpAffine(read_crop(hands, 3), cv2.getRotationMatrix2D(
        ((side - 1) / 2,) * 2, 30, 1), (side, side), borderMode=cv2.BORDER_REFLECT_101)
    inner = slice(side // 4, -side // 4)
    hands.keypoints[3] = -500  # no skeleton in the picture
    drawn = common.draw_crop(hands, 3, side, turn=30.0)
    assert np.abs(drawn[inner, inner].astype(int) - turned[inner, inner]).mean() < 1


def test_a_crop_that_is_no_picture_is_named_before_the_search(hands):
    crops, offsets = np.load(hands / "crops.npy"), np.load(hands / "offsets.npy")
    crops[offsets[7]:offsets[7] + 4] = 0
    np.save(hands / "crops.npy", crops)
    assert f"crop 7, at {offsets[7]}, is not a JPEG" in refused("mine_pairs.py", hands)
    assert not (hands / "neighbours.npy").exists()


def test_a_second_mining_gives_the_same_bytes_and_out_leaves_the_folder_alone(
        mined, hands, tmp_path):
    before = sorted(p.name for p in hands.iterdir())
    run_here("mine_pairs.py", hands, "--top-k", 3, "--no-rotation-free", "--out",
             tmp_path / "elsewhere")
    assert sorted(p.name for p in hands.iterdir()) == before
    for name in ("pca.npy", "embeddings.npy", "neighbours.npy", "distances.npy"):
        assert (tmp_path / "elsewhere" / name).read_bytes() == (mined / name).read_bytes()
    run_here("mine_pairs.py", hands, "--out", tmp_path / "elsewhere")
    assert np.load(tmp_path / "elsewhere" / "neighbours.npy").shape[1] == 1


def damage(name):
    def change(folder):
        array = np.load(folder / name)
        yield "missing", lambda: (folder / name).unlink()
        yield "truncated", lambda: (folder / name).write_bytes((folder / name).read_bytes()[:-9])
        yield "expected", lambda: np.save(
            folder / name, array.astype("f8") if array.dtype.kind != "V" else np.zeros(3))
        yield "expected", lambda: np.save(folder / name, array[:-1])
    return change


@pytest.mark.parametrize("name", ["crops.npy", "offsets.npy", "keypoints.npy", "hands.npy"])
def test_damaged_hands_folders_are_named(hands, name):
    original = (hands / name).read_bytes()
    for word, action in damage(name)(hands):
        action()
        line = refused("mine_pairs.py", hands)
        assert ".npy" in line and word in line
        # The keypoints say how long the others must be.
        if name != "keypoints.npy" or word in ("missing", "truncated"):
            assert name in line
        (hands / name).write_bytes(original)
    assert not (hands / "neighbours.npy").exists()


def test_offsets_must_increase(hands):
    offsets = np.load(hands / "offsets.npy")
    offsets[3] = offsets[2]
    np.save(hands / "offsets.npy", offsets)
    assert "offsets.npy: must start at 0 and increase" in refused("mine_pairs.py", hands)


def test_bad_input_ends_a_real_process_with_status_2(tmp_path):
    result = run("mine_pairs.py", tmp_path / "nowhere", status=2)
    assert result.stderr.startswith(f"mine_pairs.py: {tmp_path / 'nowhere'}: no such folder")


@pytest.mark.parametrize("flags, words", [
    (["--dims", 43], "--dims must lie in 1..42"), (["--top-k", 0], "--top-k must be at least 1"),
    (["--temporal", "--top-k", 2], "--temporal pairs a hand"),
    (["--temporal", "--rotation-free"], "--same-video and --rotation-free")])
def test_flags_that_cannot_be_are_refused(tmp_path, flags, words):
    assert words in refused("mine_pairs.py", tmp_path, *flags)


def test_keypoints_that_cannot_be_are_named(hands):
    keypoints = np.load(hands / "keypoints.npy")
    far, bad, point = keypoints.copy(), keypoints.copy(), keypoints.copy()
    far[5] += 3000
    point[9] = 0
    bad[7, 3, 1] = np.nan
    for array, words in ((far, "keypoints.npy: some lie 10 crops away"),
                         (bad, "keypoints.npy: values must be finite, row 7"),
                         (point, "keypoints.npy: those of hand 9 are one point")):
        np.save(hands / "keypoints.npy", array)
        assert words in refused("mine_pairs.py", hands)


def test_a_single_video_is_refused(hands):
    rows = np.load(hands / "hands.npy")
    rows["video"] = 0
    np.save(hands / "hands.npy", rows)
    assert "come from one video" in refused("mine_pairs.py", hands)


def test_a_list_of_too_few_videos_is_named(hands):
    (hands / "videos.txt").write_text("only one\n")
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
    run_here("mine_pairs.py", hands, "--same-video")
    neighbours = np.load(hands / "neighbours.npy")[:, 0]
    assert (neighbours >= 0).all() and (neighbours != np.arange(len(rows))).all()


def test_upright_poses_against_complex_numbers():
    """A pose as complex numbers: its mean is taken away, it is divided by its size and by
    the direction of its palm."""
    keypoints = np.random.default_rng(0).normal(size=(50, 21, 2)).astype(np.float32) * 40 + 100
    found = mine_pairs.as_poses(keypoints, 224, True).reshape(50, 21, 2)
    z = keypoints[..., 0].astype(np.float64) - 1j * keypoints[..., 1]  # y up
    z -= z.mean(1, keepdims=True)
    z /= np.sqrt((abs(z) ** 2).mean(1, keepdims=True))
    palm = z[:, [5, 9, 13, 17]].mean(1) - z[:, 0]
    z *= 1j / (palm / abs(palm))[:, None]
    assert np.allclose(found[..., 0], z.real) and np.allclose(found[..., 1], -z.imag)


def test_pairs_are_the_nearest_upright_poses(hands):
    run_here("mine_pairs.py", hands, "--top-k", 2, "--dims", 42)
    folder = mine_pairs.load_hands(hands)
    poses = mine_pairs.as_poses(folder.keypoints, folder.side, True)
    neighbours, distances = np.load(hands / "neighbours.npy"), np.load(hands / "distances.npy")
    video = folder.rows["video"]
    for i, pose in enumerate(poses):
        gaps = np.where(video == video[i], np.inf, np.linalg.norm(poses - pose, axis=1))
        assert np.allclose(np.sort(gaps)[:2], distances[i], atol=1e-5)
        assert np.allclose(gaps[neighbours[i]], distances[i], atol=1e-5)
    assert np.isfinite(np.load(hands / "turns.npy")).all()
