"""The rendered hands: exact geometry, repeatable files, and accepted as hands by MediaPipe."""

import json

import cv2
import numpy as np
import pytest
import synthetic
from common import PARENTS, load_hands
from scipy.spatial.transform import Rotation


@pytest.fixture
def videos(rendered):
    return rendered / "videos"


@pytest.fixture
def freihand(rendered):
    return rendered / "freihand"


def truths(folder):
    return {path.stem: np.load(path) for path in sorted(folder.glob("*.npy"))}


def contents(folder):
    return {path.relative_to(folder): path.read_bytes()
            for path in sorted(folder.rglob("*.*")) if path.is_file()}


def a_hand(left=False, name="open", turn=20.0):
    rng = np.random.default_rng(3)
    camera = np.array([(230, 0, 95.5), (0, 230, 95.5), (0, 0, 1)])
    view = synthetic.view_matrix(turn, 10, 15)
    return synthetic.make_hand(synthetic.make_person(0, 1), synthetic.pose_angles(name), view,
                               np.array((90.0, 100.0)), 330, camera, synthetic.make_light(rng),
                               left)


def test_the_seed_alone_decides(tmp_path):
    for name, seed, workers in (("a", 1, 1), ("b", 1, 2), ("c", 2, 1)):
        synthetic.write_videos(tmp_path / name, videos=2, seconds=1, fps=2, size=(160, 120),
                               seed=seed, workers=workers)
        synthetic.write_freihand(tmp_path / name / "freihand", train=2, evaluation=2, seed=seed)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys() and all(a[path] != c[path] for path in a)


def test_a_restart_renders_what_is_missing_alone(tmp_path):
    def write():
        synthetic.write_videos(tmp_path, videos=2, seconds=1, fps=2, size=(160, 120))

    write()
    before = contents(tmp_path)
    kept, lost = sorted(tmp_path.glob("*.mp4"))
    time = kept.stat().st_mtime_ns
    lost.unlink()
    write()
    assert contents(tmp_path) == before and kept.stat().st_mtime_ns == time


def test_videos_have_truth_inside_the_frame(videos):
    for name, truth in truths(videos).items():
        video = cv2.VideoCapture(str(videos / f"{name}.mp4"))
        assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 20 and video.get(cv2.CAP_PROP_FPS) == 5
        assert (video.get(cv2.CAP_PROP_FRAME_WIDTH),
                video.get(cv2.CAP_PROP_FRAME_HEIGHT)) == (640, 480)
        assert (truth["keypoints"] > 0).all() and (truth["keypoints"] < (639, 479)).all()


def test_frames_show_no_hand_one_or_two_apart(videos):
    seen = set()
    for truth in truths(videos).values():
        for frame in range(20):
            rows = truth[truth["frame"] == frame]
            seen.add(tuple(sorted(rows["left"].tolist())))
            if len(rows) == 2:
                left, right = rows["keypoints"][rows["left"].argsort()[::-1], :, 0]
                assert left.max() < right.min()
    assert seen == {(), (False,), (True,), (False, True)}


def test_hands_have_room_in_the_frame_and_some_lie_at_its_edge(videos):
    keypoints = np.concatenate(list(truths(videos).values()))["keypoints"]
    low, high = keypoints.min(1), keypoints.max(1)
    size = (high - low).max(1)
    assert size.min() > 640 / 12 and size.max() < 640 / 2.5 and 640 / 6 < np.median(size) < 640 / 3
    gap = np.minimum(low, (639, 479) - high).min(1)  # to the nearest edge of the frame
    assert gap.min() > 0 and 0.1 < (gap < size / 4).mean() < 0.35
    assert (gap > size / 2).mean() > 0.4


def palm_side(xyz, left):
    """xyz (21, 3), camera frame -> cosine between the palm's normal and the way to the
    camera: 1 palm, -1 back."""
    normal = np.cross(xyz[5] - xyz[0], xyz[17] - xyz[0]) * (-1 if left else 1)
    eye = -xyz[[0, 5, 17]].mean(0)
    return normal @ eye / np.linalg.norm(normal) / np.linalg.norm(eye)


def test_every_pose_from_palm_and_back(videos):
    rows = np.concatenate(list(truths(videos).values()))
    view = np.array([palm_side(row["xyz"], row["left"]) for row in rows])
    for pose, name in enumerate(synthetic.NAMES):
        mine = view[rows["pose"] == pose]
        assert mine.max() > 0.1 and mine.min() < -0.1, name


def directions(xyz, left):
    """xyz (N, 21, 3), left (N,) -> turn, tilt, roll (N, 3) of the palms in degrees, as
    draw_view gives them."""
    palm = np.vstack([np.zeros(3), synthetic.KNUCKLES])
    angles = []
    for joints, mirrored in zip(xyz[:, [0, 5, 9, 13, 17]], left):
        # x right, y up, z to the viewer
        seen = (joints - joints[0]) * (-1 if mirrored else 1, -1, -1)
        turn = Rotation.align_vectors(seen, palm)[0]
        angles.append(turn.as_euler("ZXY", degrees=True)[::-1])
    return np.array(angles)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The truth of four videos of the small world."""
    folder = tmp_path_factory.mktemp("small")
    synthetic.write_videos(folder, videos=4, seconds=3, fps=3, size=(160, 120), world="small")
    return truths(folder)


def test_the_small_world_has_another_person_in_each_video(small):
    assert [name.split("_")[0] for name in small] == [f"person00{k}" for k in range(4)]


def test_the_small_world_has_eight_poses(small):
    rows = np.concatenate(list(small.values()))
    assert len(synthetic.WORLDS["small"]) == 8
    assert {synthetic.NAMES[pose] for pose in rows["pose"]} == set(synthetic.WORLDS["small"])


def test_the_small_world_shows_palms_alone(small):
    rows = np.concatenate(list(small.values()))
    hands = [synthetic.freihand_sample(split, i, 224, 0, "small")
             for split in ("training", "evaluation") for i in range(40)]
    xyz = np.concatenate([rows["xyz"], [hand["xyz"] for hand in hands]])
    left = np.concatenate([rows["left"], np.zeros(len(hands), bool)])
    angles = np.abs(directions(xyz, left)).max(0)
    assert (angles < (42, 22, 47)).all() and (angles > (30, 15, 35)).all()
    assert min(map(palm_side, xyz, left)) > 0.5


def test_one_person_a_video(videos):
    for truth in truths(videos).values():
        bones = np.linalg.norm(truth["xyz"] - truth["xyz"][:, PARENTS], axis=2)
        np.testing.assert_allclose(bones, bones[:1].repeat(len(bones), 0), atol=1e-3)


def test_camera_projects_xyz_on_keypoints_inside_the_silhouette():
    hands = [a_hand(name=name, turn=turn) for name in synthetic.NAMES for turn in (0, 90, 180)]
    _, cover, keypoints = synthetic.render(hands, (192, 192))
    for hand, mask, points in zip(hands, cover, keypoints):
        uvw = hand["xyz"] @ hand["camera"].T
        np.testing.assert_allclose(uvw[:, :2] / uvw[:, 2:], points, atol=1e-3)
        x, y = np.round(points).astype(int).T
        assert (mask[y, x] > 0.9).all()


def test_left_hand_is_the_mirror_image():
    (right, left), cover, keypoints = synthetic.render([a_hand(), a_hand(left=True)], (192, 192))
    np.testing.assert_array_equal(left, right[:, ::-1])
    np.testing.assert_array_equal(cover[1], cover[0][:, ::-1])
    np.testing.assert_allclose(keypoints[1], keypoints[0] * (-1, 1) + (191, 0), atol=1e-3)


def read(path):
    return np.array(json.loads(path.read_text()))


@pytest.mark.parametrize("split, count, versions", [("training", 16, 4), ("evaluation", 8, 1)])
def test_freihand_layout(split, count, versions, freihand):
    folder = freihand if split == "training" else freihand.parent / "freihand_eval"
    assert len(list((freihand / split / "rgb").glob("*.jpg"))) == count * versions
    xyz, cameras = read(folder / f"{split}_xyz.json"), read(freihand / f"{split}_K.json")
    assert xyz.shape == (count, 21, 3) and cameras.shape == (count, 3, 3)
    np.testing.assert_allclose(read(freihand / f"{split}_scale.json"),
                               np.linalg.norm(xyz[:, 9] - xyz[:, 10], axis=1), rtol=1e-6)
    palm = np.linalg.norm(xyz[:, 9] - xyz[:, 0], axis=1)  # metres
    assert palm.min() > 0.078 and palm.max() < 0.102
    uvw = np.einsum("nij,nkj->nki", cameras, xyz)
    uv = uvw[..., :2] / uvw[..., 2:]
    assert (uv > 0).all() and (uv < 223).all()


def test_freihand_versions_share_the_hand(freihand):
    for i in range(16):
        versions = [cv2.imread(str(freihand / f"training/rgb/{i + 16 * k:08d}.jpg")).astype(int)
                    for k in range(4)]
        assert versions[0].shape == (224, 224, 3)
        hand = synthetic.freihand_sample("training", i, 224, 0)
        cover = synthetic.render([hand], (224, 224))[1][0]
        inside = cv2.erode((cover > 0.99).astype(np.uint8), np.ones((9, 9))) > 0
        outside = cv2.dilate((cover > 0.01).astype(np.uint8), np.ones((9, 9))) == 0
        for version in versions[1:]:
            difference = np.abs(version - versions[0])
            assert difference[inside].mean() < 3 < 10 < difference[outside].mean()


def test_persons_of_training_and_evaluation_differ():
    train, evaluation = synthetic.TRAINING_PERSONS, synthetic.EVALUATION_PERSONS
    assert not set(train) & set(evaluation)
    bones = {split: [synthetic.freihand_sample(split, i, 224, 0)["person"]["scale"]
                     for i in range(8)]
             for split in ("training", "evaluation")}
    assert not set(bones["training"]) & set(bones["evaluation"])


def test_mediapipe_takes_them_for_hands(videos, extracted):
    """Measured with this set (172 hands, mediapipe 0.10.31, CPU): 96.5 % found, 94.0 % of them
    called by the right side."""
    hands = load_hands(extracted)
    found = []
    count = 0
    for name, truth in truths(videos).items():
        count += len(truth)
        mine = hands.rows[hands.rows["video"] == hands.videos.index(f"{name}.mp4")]
        for row in truth:
            low, high = row["keypoints"].min(0), row["keypoints"].max(0)
            boxes = mine["box"].reshape(-1, 2, 2).mean(1)
            near = np.linalg.norm(boxes - (low + high) / 2, axis=1) < (high - low).max() / 4
            near &= mine["frame"] == row["frame"]
            found += [row["left"] == side for side in mine["left"][near][:1]]
    assert len(found) > 0.88 * count and np.mean(found) > 0.9, (len(found), count, np.mean(found))
