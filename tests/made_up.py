"""Clips, hands folders and labelled pictures that are made up, for the benchmarks: speed does not
ask for a hand that MediaPipe would find, but in the clips."""

import shutil
from fractions import Fraction

import cv2
import numpy as np

from common import HANDS_DTYPE, draw_hand
from finetune import SAMPLE, make_samples


def write_clips(folder, pictures_of, clips, seconds, copies):
    """Rendered videos, each so many times. pictures_of: frames_of or enlarged. -> their paths"""
    import synthetic  # here: only clips need it

    synthetic.write_videos(folder / "rendered", videos=clips, seconds=min(seconds, 8), fps=5,
                           size=(640, 480), seed=0)
    for path in sorted((folder / "rendered").glob("*.mp4")):
        first = folder / f"{path.stem}-0.mp4"
        write_clip(first, pictures_of(path, 30 * seconds))
        for copy in range(1, copies):
            shutil.copy(first, folder / f"{path.stem}-{copy}.mp4")
    return sorted(map(str, folder.glob("*.mp4")))


def frames_of(path, count):
    """Yields `count` pictures of a video of 5 a second, RGB, over and over, each 6 times."""
    import av

    with av.open(str(path)) as file:
        pictures = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    for k in range(count):
        yield pictures[k // 6 % len(pictures)]


def enlarged(path, count):
    """The same at 1920 x 1080, wandering and with grain, as cameras make them."""
    rng = np.random.default_rng(0)
    grain = rng.normal(0, 3, (1080, 1920, 3))
    for k, picture in enumerate(frames_of(path, count)):
        large = cv2.resize(picture, (2000, 1160))
        x = int(40 + 40 * np.sin(k / 20))
        y = int(40 + 40 * np.cos(k / 31))
        picture = large[y:y + 1080, x:x + 1920] + np.roll(grain, 97 * k, 1)
        yield np.clip(picture, 0, 255).astype(np.uint8)


def write_clip(path, pictures):
    """A video of these pictures at 30 a second, H.264 with three B-frames in a row."""
    import av

    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=30, options={
            "preset": "veryfast", "bf": "3", "x264-params": "b-adapt=0"})
        stream.pix_fmt = "yuv420p"
        for k, picture in enumerate(pictures):
            if k == 0:
                stream.height, stream.width = picture.shape[:2]
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts = k
            frame.time_base = Fraction(1, 30)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def made_up_hands(count, length=100, seed=0):
    """Keypoints (count, 21, 2) in crops of side 1 of hands with five fingers that turn and bend
    slowly: within one of the videos of `length` frames they are near-duplicates."""
    rng = np.random.default_rng(seed)
    bend = 45 + 35 * walk(rng, count, length, 5)[:, :, None]
    bend = bend + 12 * walk(rng, count, length, 15).reshape(count, 5, 3)
    bend = np.radians(bend).clip(-0.3, 1.8)
    spread = np.radians(np.array([-55, -15, 0, 12, 25]) + 5 * walk(rng, count, length, 5))
    roots = np.array([[-2.5, 3], [-2.2, 8.6], [0, 9], [1.9, 8.4], [3.6, 7.6]])
    bones = np.array([[3.6, 3.2, 2.6], [4.4, 2.6, 2.2], [4.9, 3, 2.4], [4.5, 2.8, 2.4],
                      [3.5, 2.1, 2]])
    joints = np.zeros((count, 21, 3), np.float32)  # cm, the wrist at 0
    for finger in range(5):
        joint = 1 + 4 * finger
        joints[:, joint, :2] = roots[finger]
        sine = np.sin(spread[:, finger])
        cosine = np.cos(spread[:, finger])
        angle = 0
        for k in range(3):
            angle = angle + bend[:, finger, k] * (0.5 if finger == 0 else 1)
            way = np.stack([sine * np.cos(angle), cosine * np.cos(angle), -np.sin(angle)], 1)
            joints[:, joint + 1] = joints[:, joint] + bones[finger, k] * way
            joint += 1
    points = joints @ first_two_rows(walk(rng, count, length, 4)).transpose(0, 2, 1)
    points = points + 0.08 * rng.normal(size=(count, 21, 2)).astype(np.float32)
    low = points.min(1)
    high = points.max(1)
    side = 1.3 * (high - low).max(1)[:, None, None]
    return ((points - (low + high)[:, None] / 2) / side + 0.5).astype(np.float32)


def walk(rng, count, length, dims, keep=0.998):
    """-> (count, dims) float32: normal numbers that change slowly within each `length` rows."""
    steps = rng.normal(size=(length, -(-count // length), dims)).astype(np.float32)
    for k in range(1, length):
        steps[k] = keep * steps[k - 1] + (1 - keep ** 2) ** 0.5 * steps[k]
    return steps.swapaxes(0, 1).reshape(-1, dims)[:count]


def first_two_rows(quaternions):
    """-> (N, 2, 3), of the rotation matrices of quaternions (N, 4) of any length."""
    w, x, y, z = quaternions.T / np.linalg.norm(quaternions, axis=1)
    across = [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)]
    along = [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)]
    return np.stack([*across, *along], 1).reshape(-1, 2, 3)


def write_hands(folder, keypoints, video, side=16, pictures=64):
    """A hands folder of these keypoints (N, 21, 2) in crops of side 1, mined so that each hand is
    the next one's neighbour. The crops are `pictures` different ones, over and over. -> folder"""
    folder.mkdir(exist_ok=True)
    count = len(keypoints)
    jpegs = [made_up_picture(k, side, keypoints[k % count] * side) for k in range(pictures)]
    times = -(-count // pictures)  # rounded up
    lengths = np.tile([len(jpeg) for jpeg in jpegs], times)[:count]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rows = np.zeros(count, HANDS_DTYPE)
    rows["video"] = video
    rows["frame"] = np.arange(count) % 100
    np.save(folder / "hands.npy", rows)
    np.save(folder / "keypoints.npy", keypoints * np.float32(side))
    np.save(folder / "offsets.npy", offsets)
    np.save(folder / "crops.npy", np.tile(np.concatenate(jpegs), times)[:offsets[-1]])
    np.save(folder / "neighbours.npy", np.roll(np.arange(count), 1)[:, None])
    (folder / "videos.txt").write_text("".join(f"{k}.mp4\n" for k in range(video.max() + 1)))
    return folder


def made_up_picture(seed, side, keypoints):
    """A JPEG of a hand before something blurred; at 224 px as many bytes as a real crop has."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (12, 12, 3), np.uint8)
    image = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)
    image = cv2.add(image, rng.integers(0, 6, image.shape, np.uint8))
    image = draw_hand(image, keypoints, (210, 160, 130))
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].ravel()


def write_labels(folder, count, side=224, pictures=200):
    """An own data set for finetune.py: so many pictures, over and over, with made-up labels. -> its
    flags"""
    points = made_up_hands(pictures)
    (folder / "labels").mkdir(parents=True, exist_ok=True)
    for k, uv in enumerate(points * side):
        (folder / f"{k}.jpg").write_bytes(made_up_picture(k, side, uv).tobytes())
    depth = 600 + np.random.default_rng(0).normal(0, 10, (pictures, 21, 1))
    xyz = np.concatenate([points * 250, depth], 2)
    row = np.arange(count) % pictures
    samples = make_samples(1.75, path=[f"{k}.jpg" for k in row], uv=points[row] * side,
                           xyz=xyz[row], valid=True, width=side, scene=row, group=row)
    for name in ("train", "test"):
        np.save(folder / "labels" / f"{name}.npy", samples.view(SAMPLE))
    return ["--dataset", "own", "--root", folder, "--labels", folder / "labels"]
