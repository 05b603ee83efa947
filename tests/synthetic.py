"""Rendered articulated hands: videos and a labelled set in FreiHAND's layout, to run
everything without real data.

A 21-joint skeleton with human proportions is clothed in round cones joined by a smooth
minimum, found by sphere tracing in batches (torch, on the GPU when there is one) and
coloured by where a point lies on its bone: creases, nails, knuckles. Everything follows
from the seed. Hands are right-handed, a left one is the mirror image. Lengths are mm,
angles degrees.

The full world, the default, has 16 poses, seen from all around the forearm: among a few thousand
hands, most have none that is really similar. The small world is for short runs: eight poses that
nobody takes for one another, the palm towards the camera, and another person in each video, so that
every hand has similar ones of other persons.

    # NAME.mp4 and its truth, NAME.npy
    python tests/synthetic.py videos data/videos --videos 24 --seconds 10 --fps 5
    # FreiHAND's own layout
    python tests/synthetic.py freihand data/freihand --train 300 --evaluation 100
    # the small world
    python tests/synthetic.py videos data/small --videos 48 --world small
"""

import argparse
import concurrent.futures
import contextlib
import functools
import json
import multiprocessing
import os
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

# Hand frame: origin in the wrist, x to the thumb's side, y to the fingertips, z out of the
# palm. A right hand; knuckles from index to little finger.
KNUCKLES = np.array([(24, 89, -3), (3, 93, -6), (-16, 87, -5), (-33, 77, -1)], float)
PHALANGES = np.array([(44, 26, 19), (49, 30, 20), (45, 28, 20), (36, 21, 18)], float)
RADII = np.array([(11, 9.2, 8.0, 6.6), (11, 9.5, 8.2, 6.8), (10.5, 9.0, 7.8, 6.4),
                  (9.5, 7.8, 6.8, 5.6)])
ROLL = (-4, 0, 6, 14)  # turns the flexion planes of the fingers towards the middle of the palm
THUMB_BASE, THUMB_BONES, THUMB_RADII = np.array((20, 18, 6), float), (45, 33, 22), (13, 11.5, 10, 8)

# Index to little finger: (knuckle, middle joint) flexion; spread 0..1; thumb: to the side,
# out of the palm, roll, its two joints. The outermost joint bends by 0.72 of the middle one.
UP, DOWN = (2, 5), (86, 109)
POSES = {
    "open": ((UP, UP, UP, UP), 1.0, (45, 15, 40, 0, 0)),
    "flat": ((UP, UP, UP, UP), 0.1, (22, 10, 40, 5, 5)),
    "relaxed": (((18, 28), (24, 34), (28, 36), (30, 34)), 0.4, (32, 25, 30, 10, 15)),
    "fist": ((DOWN, DOWN, DOWN, DOWN), 0.0, (24, 43, -9, 28, 60)),
    "point": ((UP, DOWN, DOWN, DOWN), 0.0, (25, 45, -22, 46, 36)),
    "victory": ((UP, UP, DOWN, DOWN), 1.0, (25, 45, -22, 49, 39)),
    "three": ((UP, UP, UP, DOWN), 0.8, (25, 45, -22, 56, 44)),
    "four": ((UP, UP, UP, UP), 0.6, (20, 40, -15, 55, 60)),
    "pinch": (((50, 55), (45, 50), (40, 45), (35, 40)), 0.2, (35, 28, 7, 43, 33)),
    "ok": (((50, 55), (15, 15), (8, 10), (2, 8)), 0.7, (34, 28, 6, 43, 32)),
    "grasp": (((40, 45), (42, 48), (44, 48), (44, 46)), 0.4, (35, 45, 0, 15, 20)),
    "hook": (((10, 90), (10, 95), (10, 95), (10, 90)), 0.0, (25, 20, 30, 15, 20)),
    "thumbs_up": ((DOWN, DOWN, DOWN, DOWN), 0.0, (55, 10, 40, 0, -5)),
    "call": ((DOWN, DOWN, DOWN, UP), 0.4, (55, 15, 40, 0, -5)),
    "rock": ((UP, DOWN, DOWN, UP), 0.4, (25, 45, -22, 46, 36)),
    "gun": ((UP, DOWN, DOWN, DOWN), 0.0, (55, 10, 40, 0, -5)),
}
NAMES = list(POSES)
WORLDS = {"full": NAMES,
          "small": ["open", "fist", "point", "victory", "ok", "grasp", "call", "rock"]}
SPREAD = np.array((14, 2, -9, -20), float)  # of the knuckles at spread 1, positive to the thumb
SKINS = np.array([(238, 200, 178), (222, 176, 146), (196, 146, 112), (150, 105, 76),
                  (104, 72, 54)], float)  # RGB
BARE, NAILED, CLOTH = 0, 1, 2  # what a cone shows
NO_CREASE = 99  # creases lie at shares of a bone's length; this one lies off every hand
SHARP, SOFT = 1.0, 4.5  # mm: how far two fingers, two parts of the palm blend
TILE = 8  # pixels; the rays of a tile share the list of cones that they may meet
PERIOD = 1.0  # seconds from one pose to the next
FRAME = (640, 480)  # of the videos: width, height
LENGTHS = (110, 205)  # pixels of an open hand: a sixth to a third of the frame's width
AT_EDGE = 0.3  # share of the keyframes whose hand lies at the frame's edge; on the way it leaves it
ARM = 1000  # mm from the wrist to where an arm ends, out of the picture
TRUTH = [("frame", "<i4"), ("left", "?"), ("pose", "<i4"), ("keypoints", "<f4", (21, 2)),
         ("xyz", "<f4", (21, 3))]
# Videos show persons 0, 1, ...
TRAINING_PERSONS, EVALUATION_PERSONS = range(1000, 1032), range(2000, 2008)


def rotation(axis, degrees):
    """Rotation matrix (3, 3) about the axis 0, 1 or 2."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.eye(3)
    matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = c, -s, s, c
    return matrix


def make_person(seed, number):
    """-> what stays the same for a person: bone lengths, thickness, colours, clothes."""
    rng = np.random.default_rng((seed, 1, number))
    tone = rng.uniform(0, len(SKINS) - 1)
    skin = np.array([np.interp(tone, range(len(SKINS)), SKINS[:, c]) for c in range(3)])
    skin = np.clip(skin * rng.uniform(0.94, 1.06, 3), 30, 250) / 255
    palm = 0.5 * skin + 0.5 * np.array((0.90, 0.68, 0.60))
    return {
        "scale": rng.uniform(0.90, 1.06), "fingers": rng.uniform(0.95, 1.05, 5),
        "thickness": rng.uniform(0.92, 1.10), "width": rng.uniform(0.94, 1.07), "skin": skin,
        "palm": palm, "nail": 0.4 * palm + 0.6 * np.array((0.95, 0.74, 0.70)),
        "sleeve": rng.uniform(25, 110) if rng.random() < 0.5 else None,
        "cloth": rng.uniform(0.08, 0.85) * rng.uniform(0.6, 1, 3), "phase": rng.uniform(0, 6.28, 4),
        "veins": rng.uniform(0.2, 1.0)}


def pose_angles(name, rng=None, noise=3.0):
    """-> (23,): four fingers x (knuckle, middle, outer joint, spread), five of the thumb,
    two of the wrist."""
    fingers, spread, thumb = POSES[name]
    angles = [(mcp, pip, 0.72 * pip, spread * side) for (mcp, pip), side in zip(fingers, SPREAD)]
    angles = np.concatenate([np.ravel(angles), thumb, (0, 0)])
    if rng is not None:
        angles[:21] += rng.normal(0, noise, 21)
        # Fingers that hold nothing fan out in depth, as nobody's lie in one plane.
        loose = np.array([mcp < 46 for mcp, _ in fingers])
        angles[0:16:4] += loose * (rng.normal(0, 4) + rng.normal(0, 8) * np.linspace(-1, 1, 4))
        angles[21:] += rng.normal(0, (14, 7))
    return angles


def skeleton(person, angles):
    """-> joints (21, 3) in the hand frame, frames (21, 3, 3): x, y along the bone that
    starts here, z palmar."""
    joints, frames = np.zeros((21, 3)), np.zeros((21, 3, 3))
    frames[0] = np.eye(3)
    for f in range(4):
        mcp, pip, dip, spread = angles[4 * f:4 * f + 4]
        first = 5 + 4 * f
        joints[first] = KNUCKLES[f] * (person["width"], 1, 1)
        frame = rotation(2, -spread) @ rotation(1, ROLL[f])
        for k, bend in enumerate((mcp, pip, dip)):
            frame = frame @ rotation(0, bend)
            frames[first + k] = frame
            bone = frame[:, 1] * PHALANGES[f, k] * person["fingers"][f + 1]
            joints[first + k + 1] = joints[first + k] + bone
        frames[first + 3] = frame
    side, out, roll, mcp, ip = np.radians(angles[16:21])
    along = np.array((np.sin(side) * np.cos(out), np.cos(side) * np.cos(out), np.sin(out)))
    pad = np.array((-np.cos(roll), 0, np.sin(roll)))
    pad -= along * (along @ pad)
    pad /= np.linalg.norm(pad)
    frame = np.stack([np.cross(along, pad), along, pad], 1)
    joints[1] = THUMB_BASE * (person["width"], 1, 1)
    for k, bend in enumerate((0, mcp, ip)):
        frame = frame @ rotation(0, np.degrees(bend))
        frames[1 + k] = frame
        joints[2 + k] = joints[1 + k] + frame[:, 1] * THUMB_BONES[k] * person["fingers"][0]
    frames[4] = frame
    return joints * person["scale"], frames


def clothe(person, joints, frames, angles, arm=ARM):
    """-> dict of arrays over C round cones: ends a, b (C, 3), their radii ra, rb (C,), the
    bone's frame (C, 3, 3), soft (C,) 1 where it blends into the palm, kind (C,), owner (C,)
    the cone whose texture it wears, creases (C, 2)."""
    s, thick = person["scale"], person["thickness"] * person["scale"]
    cones = []

    def add(a, b, ra, rb, frame=0, soft=1, kind=BARE, owner=None,
            creases=(NO_CREASE, NO_CREASE)):
        cones.append((np.array(a, float), np.array(b, float), ra * thick, rb * thick,
                      frames[frame], soft, kind, len(cones) if owner is None else owner, creases))

    def spot(x, y, z):
        return np.array((x * person["width"], y, z)) * s

    digits = [(1, THUMB_RADII)] + [(5 + 4 * f, RADII[f]) for f in range(4)]
    for first, radii in digits:
        for k in range(3):
            a, b, frame = joints[first + k], joints[first + k + 1], frames[first + k]
            if first == 1 and k == 0:
                continue  # the thumb's metacarpal belongs to the palm
            creases = ((0.44, 1), (0, 1), (0, NO_CREASE))[k]
            owner = len(cones)
            add(a, b, radii[k] * 0.94, radii[k + 1] * 0.96, first + k, 0,
                NAILED if k == 2 else BARE, owner, creases)
            pad = frame[:, 2] * thick * (2.6 if k < 2 else 1.4)
            add(a + 0.30 * (b - a) + pad, a + (0.7 if k < 2 else 0.9) * (b - a) + pad,
                0.90 * radii[k], (0.90 if k < 2 else 0.98) * radii[k + 1], first + k, 0, BARE,
                owner)
    bases = (13, 16, 2), (4, 16, 0), (-6, 15, 0), (-15, 14, 2)
    for f in range(4):
        first = 5 + 4 * f
        add(spot(*bases[f]), joints[first] + spot(0, -2, -1), 12.5, 8)
        add(joints[first], joints[first] + 0.36 * (joints[first + 1] - joints[first]), 7.6, 6.8,
            first)
    for a, b in ((5, 9), (9, 13), (13, 17)):
        add(0.88 * joints[a] + spot(0, 0, 4), 0.88 * joints[b] + spot(0, 0, 4), 7, 7)
    add(joints[1], joints[2], 11, 9.5, 1)
    add(spot(12, 17, 8), 0.3 * joints[1] + 0.7 * joints[2] + 2 * frames[1, :, 2], 13, 10, 1)
    add(0.45 * joints[1] + 0.55 * joints[2], 0.42 * joints[5] + spot(0, 0, 3), 8, 7)
    add(0.2 * joints[1] + 0.8 * joints[2], 0.70 * joints[5] + spot(0, 0, 2), 5, 7)
    add(spot(-17, 16, 7), 0.80 * joints[17] + spot(-1, 0, 6), 13.5, 9)
    turn = rotation(0, angles[21]) @ rotation(2, angles[22])

    def along_arm(side, down):
        return turn @ spot((10.6 + 0.0165 * down) * side, -down, 0)

    for side in (1, -1):
        add(spot(10 * side, 8, 0), along_arm(side, 25), 14, 15)
        add(along_arm(side, 25), along_arm(side, arm), 15.5, 16 + arm * 0.04)
    start, kind = (person["sleeve"], CLOTH) if person["sleeve"] else (arm - 1, BARE)
    grow = 1 if person["sleeve"] else 0.01
    for side in (1, 0, -1):
        add(along_arm(side, start), along_arm(side, arm), (22 + start * 0.03) * grow,
            (22 + arm * 0.04) * grow, soft=0, kind=kind)
    return {key: np.array([c[i] for c in cones]) for i, key in
            enumerate(("a", "b", "ra", "rb", "frame", "soft", "kind", "owner", "creases"))}


def make_hand(person, angles, view, centre, distance, camera, light, left=False):
    """A hand to render, a dict.

    view (3, 3) turns the hand frame to x right, y up, z to the viewer; the middle of the
    joints' box falls on the pixel centre (2,) at the distance; camera is the 3x3 matrix K;
    light is make_light's. left: the picture is flipped in the end, so that all of these are
    given as seen in a mirror."""
    joints, frames = skeleton(person, angles)
    turn = np.diag((1.0, -1, -1)) @ view
    xyz = joints @ turn.T
    middle = np.array((0.0, 0.0, distance - xyz[:, 2].mean()))
    for _ in range(4):  # perspective: move until the box lies where it should
        x0, y0, x1, y1 = box_of(project(xyz + middle, camera))
        missing = centre - np.array((x0 + x1, y0 + y1)) / 2
        middle[:2] += missing * distance / (camera[0, 0], camera[1, 1])
    # An arm that comes towards the camera ends before it gets nearer than half of the
    # hand's distance.
    down = (turn @ rotation(0, angles[21]) @ rotation(2, angles[22]))[2, 1]
    arm = ARM
    if down > 0.05:
        arm = min(ARM, max(120, 0.45 * distance / down / person["scale"]))
    return {"person": person, "cones": clothe(person, joints, frames, angles, arm), "turn": turn,
            "offset": middle, "xyz": xyz + middle, "camera": np.array(camera, float),
            "light": light, "left": left}


def project(xyz, camera):
    """xyz (J, 3) -> pixels (J, 2); pixel centres lie at integers."""
    uvw = xyz @ np.transpose(camera)
    return uvw[:, :2] / uvw[:, 2:]


def box_of(points):
    """-> x0, y0, x1, y1."""
    return np.concatenate([points.min(0), points.max(0)])


def hand_pixels(hand, width):
    """-> keypoints (21, 2) in the picture that render draws."""
    uv = project(hand["xyz"], hand["camera"])
    return np.stack([width - 1 - uv[:, 0], uv[:, 1]], 1) if hand["left"] else uv


def skin_distance(u, q, cone):
    """Signed distance to the hand (T, S) and the terms of the blend, of S points in each of
    T tiles to K cones.

    u (T, K, S): position along the cones, 0..1 between the ends; q (T, K, S): squared
    distance to their start. The palm's cones join by a wide smooth minimum, its result and
    the fingers' cones by a narrow one."""
    along = u.clamp(0, 1)
    d = (q - cone["l2"] * along * (2 * u - along)).clamp_min(1e-6).sqrt()
    d = d - cone["ra"] - cone["dr"] * along
    e = torch.exp(-d * cone["sharpness"])
    soft = (e * cone["soft"]).sum(1)
    total = (e * (1 - cone["soft"])).sum(1) + soft ** (SOFT / SHARP)
    return -SHARP * total.clamp_min(1e-35).log(), e, soft, total, along


def point_distance(p, cone):
    """p (T, 3, S) -> signed distance (T, S)."""
    u = (cone["axis"] @ p - cone["a_axis"]) / cone["l2"]
    q = (p * p).sum(1, keepdim=True) - 2 * (cone["a"] @ p) + cone["aa"]
    return skin_distance(u, q, cone)


def pack(hands, device):
    """The cones of N hands as tensors (N, C, ...) in the camera frame, with what
    skin_distance needs of them."""
    def stack(values):
        return torch.tensor(np.stack(values), dtype=torch.float32, device=device)
    a = stack([h["cones"]["a"] @ h["turn"].T + h["offset"] for h in hands])
    b = stack([h["cones"]["b"] @ h["turn"].T + h["offset"] for h in hands])
    cones = {"a": a, "axis": b - a, "ra": stack([h["cones"]["ra"] for h in hands])[..., None]}
    cones["dr"] = stack([h["cones"]["rb"] for h in hands])[..., None] - cones["ra"]
    cones["l2"] = (cones["axis"] ** 2).sum(-1, keepdim=True).clamp_min(1e-3)
    cones["aa"] = (a * a).sum(-1, keepdim=True)
    cones["a_axis"] = (a * cones["axis"]).sum(-1, keepdim=True)
    cones["soft"] = stack([h["cones"]["soft"] for h in hands])[..., None]
    cones["sharpness"] = 1 / (SHARP + (SOFT - SHARP) * cones["soft"])
    cones["frame"] = stack([h["turn"] @ h["cones"]["frame"] for h in hands]).flatten(2)
    for key in ("kind", "owner", "creases"):
        cones[key] = stack([h["cones"][key] for h in hands])
    return cones


def find_tiles(cones, cameras, width, height):
    """Tiles of TILE x TILE pixels that a cone may touch -> hand (T,), first pixel x, y
    (T,), touched (T, C)."""
    def to_pixels(p):
        z = p[..., 2:].clamp_min(60)
        return (p[..., :2] / z * cameras[:, None, :2] + cameras[:, None, 2:]), z[..., 0]
    a, za = to_pixels(cones["a"])
    b, zb = to_pixels(cones["a"] + cones["axis"])
    f = cameras[:, :1]
    # mm: so far a cone still changes the blend, or the shade.
    margin = 4 + 12 * cones["soft"][..., 0]
    ra = (cones["ra"][..., 0] + margin) / za * f * 1.04
    rb = ((cones["ra"] + cones["dr"])[..., 0] + margin) / zb * f * 1.04
    axis = b - a
    length2 = axis.square().sum(-1).clamp_min(1e-6)

    def touch(hand, first, side):
        """Tiles `side` pixels wide, of these hands (T,), from these pixels (T, 2) on -> touched
        (T, C)."""
        x, y = (first[:, None] + (side - 1) / 2 - a[hand]).unbind(-1)
        axis_x, axis_y = axis[hand].unbind(-1)
        along = ((x * axis_x + y * axis_y) / length2[hand]).clamp(0, 1)
        gap = torch.hypot(x - along * axis_x, y - along * axis_y)
        return gap - (ra[hand] + (rb - ra)[hand] * along) < side * 0.71

    # First large tiles, most of which no hand touches; then the small ones within the others.
    large = 8 * TILE
    first = places(width, height, large, a.device)
    hand = torch.arange(len(a), device=a.device).repeat_interleave(len(first))
    first = first.repeat(len(a), 1)
    kept = touch(hand, first, large).any(1)
    inner = places(large, large, TILE, a.device)
    hand = hand[kept].repeat_interleave(len(inner))
    first = (first[kept][:, None] + inner).flatten(0, 1)
    inside = (first[:, 0] < width) & (first[:, 1] < height)
    hand, first = hand[inside], first[inside]
    touched = touch(hand, first, TILE)
    kept = touched.any(1)
    return hand[kept], first[kept], touched[kept]


def places(width, height, side, device):
    """First pixels x, y (T, 2) of the squares of that side which cover a picture."""
    xs = torch.arange(0, width, side, device=device)
    ys = torch.arange(0, height, side, device=device)
    return torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1).reshape(-1, 2)


def trace(ray, radius, cone):
    """Sphere tracing, first a ray a tile, then every ray.

    ray (T, 3, S) with z = 1, radius (T, 1) of a pixel at depth 1 -> depth (T, S) where the
    ray came nearest to the skin, gap (T, S) that it left there in pixels: 0 for a hit,
    below 1 at the edge of the silhouette."""
    norm = magnitude(ray, 1)[:, 0]
    near = cone["a"][..., 2:] - cone["ra"]
    far = cone["a"][..., 2:] + torch.where(cone["ra"] > 0, cone["ra"], 0)
    near = torch.minimum(near, near + cone["axis"][..., 2:] - cone["dr"]).amin(1).clamp_min(40)
    far = torch.maximum(far, far + cone["axis"][..., 2:] + cone["dr"]).amax(1)  # both T, 1
    middle = ray.mean(2, keepdim=True)
    across, scale, t = radius * TILE * 0.75, magnitude(middle, 1)[:, 0], near
    for _ in range(12):
        d = point_distance(middle * t[:, None], cone)[0]
        t = t + (d - across * t).clamp(0) / (scale + across)
    depth = t.expand(-1, ray.shape[2]).contiguous()
    gap = torch.full_like(depth, 1e9)
    # Every tile takes a few steps, then only those where a ray still flies on.
    tile = torch.arange(len(ray), device=ray.device)
    state = [depth, gap, depth, norm, (cone["axis"] @ ray) / cone["l2"], -2 * (cone["a"] @ ray),
             radius, far]
    cone = {key: cone[key] for key in ("l2", "ra", "dr", "sharpness", "soft", "aa", "a_axis")}
    for steps in (5, 3, 3, 4, 6, 10, 20):
        t, best, best_t, norm, ray_axis, ray_a, radius, far = state
        start, n2 = cone["a_axis"] / cone["l2"], (norm * norm)[:, None]
        for _ in range(steps):
            s = t[:, None]
            d = skin_distance(s * ray_axis - start, s * (s * n2 + ray_a) + cone["aa"], cone)[0]
            g = d / (t * radius)
            closer = g < best
            best, best_t = torch.where(closer, g, best), torch.where(closer, t, best_t)
            t = t + d / norm
        depth[tile], gap[tile] = best_t, best
        flying = ((g > 0.2) & (t < far)).any(1).nonzero()[:, 0]
        if not len(flying):
            break
        tile = tile[flying]
        state = [value[flying] for value in (t, best, best_t, norm, ray_axis, ray_a, radius, far)]
        cone = {key: value[flying] for key, value in cone.items()}
    return depth, gap


def magnitude(vectors, dim):
    """As torch's norm, which takes several times as long where vectors are short. The dimension
    stays, with size 1."""
    return vectors.square().sum(dim, keepdim=True).sqrt()


def unit(vectors, dim):
    return vectors / magnitude(vectors, dim).clamp_min(1e-12)


def fade(x, low, high):
    """0 below low, 1 above high, smooth between."""
    x = ((x - low) / (high - low)).clamp(0, 1)
    return x * x * (3 - 2 * x)


def line(x, width):
    return torch.exp(-(x / width) ** 2)


def paint(in_palm, v, u, w, length, r, palmar, kind, creases, spot, person):
    """Colour of skin, nails and cloth at P points, all in mm of an average hand.

    in_palm (P,): 1 on the palm and the arm, 0 on a finger; v, u, w (P,): along, across and
    palmar on the bone of that length that ends with radius r; palmar (P,): 1 facing to the
    palm's side, -1 to the back; spot (P, 3): in the hand frame; person: its colours, a row
    for each point -> linear RGB (P, 3), gloss (P,)."""
    x, y = spot[:, 0], spot[:, 1]
    inner, outer = fade(palmar, -0.15, 0.45), fade(-palmar, 0.0, 0.5)
    colour = person["skin"] + (person["palm"] - person["skin"]) * inner[:, None]
    # Creases of the fingers inside, wrinkles of the knuckles outside.
    dark = torch.zeros_like(v)
    wrinkle = torch.zeros_like(v)
    for k in range(2):
        s = v - creases[:, k] * length
        dark = dark + line(s, 1.0) + 0.4 * line(s.abs() - 2.4, 0.8)
        joint = (creases[:, k] != 0.44).float()  # not the line where the finger leaves the palm
        bow = 0.012 * u * u * s.sign()
        folds = 0.6 + 0.4 * torch.cos(2 * s + bow)
        wrinkle = wrinkle + joint * line(s, 5) * line(u, 0.8 * r) * folds
    dark = dark * inner * (1 - in_palm)
    # The three lines of the palm, the lines of the wrist.
    life = ((x - 34) ** 2 + (y - 36) ** 2).sqrt() - 36
    life = line(life, 1.2) * fade(y, 6, 20) * fade(-x, -32, -24) * fade(-y, -76, -70)
    head = y - (50 + 0.25 * (x + 25) + 0.0018 * (x + 25) ** 2)
    head = line(head, 1.2) * fade(x, -28, -15) * fade(-x, -32, -26)
    heart = line(y - (62 + 0.1 * (x + 38) + 0.0068 * (x + 38) ** 2), 1.2) * fade(-x, -15, -8)
    wrist = line(y + 1, 1.0) + 0.7 * line(y + 6, 1.0)
    dark = dark + in_palm * inner * (0.9 * life + 0.8 * head + 0.9 * heart + 0.8 * wrist)
    # Tendons, knuckles and veins on the back.
    back = in_palm * outer
    tendon, knuckle = torch.zeros_like(v), torch.zeros_like(v)
    for (kx, ky, _), bx in zip(KNUCKLES.tolist(), (9, 3, -3, -9)):
        share = ((y - 8) / (ky - 8)).clamp(0, 1)
        off = x - (bx + (kx - bx) * share)
        tendon = tendon + (line(off, 2.0) - 0.7 * line(off - 4.5, 2.5)) * fade(share, 0.25, 0.6)
        knuckle = knuckle + line(((x - kx) ** 2 + (y - ky - 3) ** 2).sqrt(), 8)
    phase = person["phase"]
    vein = torch.sin(0.16 * x + 1.5 * torch.sin(0.05 * y + phase[:, 0]) + phase[:, 1])
    vein = line(vein, 0.25) * fade(y, -60, 10) * fade(-y, -85, -60) * back * person["veins"][:, 0]
    mottle = torch.sin(0.23 * x + 2 * torch.sin(0.11 * y + phase[:, 2]))
    mottle = mottle * torch.sin(0.19 * y + 0.1 * x + phase[:, 3])
    tips = (kind == NAILED).float() * fade(v, 4, 18)
    pink = 0.5 * tips * inner + 0.6 * back * knuckle
    pink = pink + 0.35 * wrinkle * outer * (1 - in_palm) + 0.15 * in_palm * inner
    tint = torch.stack([-0.01 * pink, -0.11 * pink, -0.10 * pink], 1)
    tint = tint + torch.stack([-0.10 * vein, -0.05 * vein, -0.01 * vein], 1)
    shade = 1 - 0.32 * dark.clamp(0, 1) - 0.20 * (wrinkle * outer * (1 - in_palm))
    shade = shade - 0.12 * back * knuckle.clamp(0, 1)
    shade = shade + 0.06 * tendon * back + 0.03 * mottle
    colour = (colour * (1 + tint)) * shade[:, None]
    gloss = torch.full_like(v, 0.08)
    # Nails: from the middle of the last bone to the end, on the back.
    side = u.abs() / r
    end = length + (0.80 - 0.45 * side * side) * r
    rim = torch.minimum(torch.minimum(v - 0.42 * length, end - v), (0.72 - side) * r)
    nailed = (kind == NAILED).float() * (w < 0).float()
    nail, border = nailed * fade(rim, -0.3, 0.5), nailed * line(rim + 0.3, 0.8)
    tone = person["nail"] * (1 + 0.10 * fade(v - end, -2.6, -1.6))[:, None]
    colour = colour * (1 - 0.22 * border)[:, None]
    colour = colour + (tone - colour) * nail[:, None] * 0.85
    gloss = gloss + 0.25 * nail
    cloth = (kind == CLOTH).float()
    weave = 1 + 0.06 * torch.sin(0.5 * y + 2 * torch.sin(0.08 * x + phase[:, 0])) + 0.05 * mottle
    colour = colour + (person["cloth"] * weave[:, None] - colour) * cloth[:, None]
    return colour.clamp(0.01, 1) ** 2.2, gloss * (1 - cloth)


def shade_tiles(hand, ray, depth, gap, cone, index, cones, scene):
    """Colour of the pixels that show the hand -> tile, pixel (P,), RGB (P, 3) as the eye
    sees it, 0..1."""
    p = ray * depth[:, None]                                                     # T, 3, S
    _, e, soft, total, along = point_distance(p, cone)
    weight = e * torch.where(cone["soft"] > 0.5, soft[:, None] ** (SOFT / SHARP - 1), 1)
    weight = weight / total[:, None].clamp_min(1e-30)
    normal = p * weight.sum(1, keepdim=True) - cone["a"].mT @ weight
    normal = normal - cone["axis"].mT @ (weight * along)
    # Each cone's direction has length |p - c|, not 1: the thicker cone counts more, which
    # only smooths the normals.
    normal = unit(normal, dim=1)
    palmar_axis = cone["frame"].unflatten(-1, (3, 3))[..., 2].mT @ weight        # T, 3, S
    palmar = (normal * unit(palmar_axis, dim=1)).sum(1)
    open_near = point_distance(p + 5 * normal, cone)[0] / 5
    open_far = point_distance(p + 14 * normal, cone)[0] / 14
    open_sky = (0.35 + 0.4 * open_near.clamp(0, 1) + 0.4 * open_far.clamp(0, 1)).clamp(0, 1)

    tile, pixel = (gap < 1).nonzero(as_tuple=True)
    best = index[tile, weight.argmax(1)[tile, pixel]]
    n = hand[tile]
    owner = cones["owner"][n, best].long()
    p, normal = p.mT[tile, pixel], normal.mT[tile, pixel]
    scale = scene["scale"][n]
    rel = p - cones["a"][n, owner]
    x, y, z = cones["frame"][n, owner].unflatten(-1, (3, 3)).unbind(-1)
    v, u, w = ((rel * axis).sum(-1) / scale for axis in (y, x, z))
    length = cones["l2"][n, owner, 0].sqrt() / scale
    r = (cones["ra"] + cones["dr"])[n, owner, 0] / scale
    spot = torch.einsum("pij,pi->pj", scene["turn"][n], p - scene["offset"][n]) / scale[:, None]
    in_palm = cones["soft"][n, best, 0]
    person = {key: value[n] for key, value in scene["person"].items()}
    albedo, gloss = paint(in_palm, v, u, w, length, r, palmar[tile, pixel], cones["kind"][n, owner],
                          cones["creases"][n, owner], spot, person)
    light, eye = scene["light"][n], -unit(ray.mT[tile, pixel], dim=1)
    lit = (normal * light).sum(1, keepdim=True)
    # Light that wanders in the skin: red most.
    wrap = torch.tensor((0.32, 0.20, 0.15), device=p.device)
    lit = ((lit + wrap) / (1 + wrap)).clamp(0) ** 1.2
    ao = open_sky[tile, pixel][:, None]
    sky = 0.5 - 0.5 * normal[:, 1:2]
    ambient = scene["ground"][n] + (scene["sky"][n] - scene["ground"][n]) * sky
    half = unit(light + eye, dim=1)
    shine = (normal * half).sum(1).clamp(0) ** 22 * gloss
    rim = (1 - (normal * eye).sum(1).clamp(0, 1)) ** 3 * 0.05
    ao_tint = ao ** torch.tensor((0.85, 1.1, 1.15), device=p.device)  # hollows are redder
    colour = albedo * (ambient * ao_tint + scene["sun"][n] * lit * ao ** 0.7)
    colour = colour + (shine * ao[:, 0])[:, None] * scene["sun"][n] + rim[:, None] * ambient
    return tile, pixel, colour.clamp(0, 1) ** (1 / 2.2)


def default_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def render(hands, size=(192, 192), device=None):
    """hands: a list from make_hand; size: width, height.

    -> BGR uint8 (N, height, width, 3) on black, coverage float32 (N, height, width),
    keypoints (N, 21, 2) in pixels."""
    threads = torch.get_num_threads()
    # Many small tensors: a second thread gains little and loses much where the cores are busy.
    torch.set_num_threads(1)
    try:
        return draw_hands(hands, size, device or default_device())
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def draw_hands(hands, size, device):
    width, height = size
    cones = pack(hands, device)

    def stack(values):
        return torch.tensor(np.stack(values), dtype=torch.float32, device=device)
    cameras = stack([h["camera"][[0, 1, 0, 1], [0, 1, 2, 2]] for h in hands])
    people = [h["person"] for h in hands]
    scene = {"turn": stack([h["turn"] for h in hands]),
             "offset": stack([h["offset"] for h in hands]),
             "scale": stack([p["scale"] for p in people]),
             "person": {key: stack([np.atleast_1d(p[key]) for p in people])
                        for key in ("skin", "palm", "nail", "cloth", "phase", "veins")}}
    for i, key in enumerate(("light", "sun", "sky", "ground")):
        scene[key] = stack([h["light"][i] for h in hands])
    hand, first, touched = find_tiles(cones, cameras, width, height)
    order = touched.sum(1).argsort(stable=True)
    picture = torch.zeros(len(hands) * height * width, 3, dtype=torch.uint8, device=device)
    cover = torch.zeros(len(hands) * height * width, device=device)
    step = torch.arange(TILE * TILE, device=device)
    chunk = 192 if device == "cpu" else 16384
    for part in order.split(chunk):
        n, mask = hand[part], touched[part]
        slots = int(mask.sum(1).max())
        index = mask.byte().argsort(dim=1, descending=True, stable=True)[:, :slots]
        used = mask.gather(1, index)
        cone = {key: value[n[:, None], index] for key, value in cones.items()}
        # An empty slot: far from everything.
        cone["ra"] = torch.where(used[..., None], cone["ra"], -1e3)
        px = first[part, :1] + step % TILE                                       # T, S
        py = first[part, 1:] + step // TILE
        k = cameras[n]
        ray = torch.stack([(px - k[:, 2:3]) / k[:, :1], (py - k[:, 3:]) / k[:, 1:2],
                           torch.ones_like(px)], 1).float()
        radius = 1 / k[:, :1]
        depth, gap = trace(ray, radius, cone)
        keep = (gap.amin(1) < 1).nonzero()[:, 0]
        if not len(keep):
            continue
        cone = {key: value[keep] for key, value in cone.items()}
        tile, pixel, colour = shade_tiles(n[keep], ray[keep], depth[keep], gap[keep], cone,
                                          index[keep], cones, scene)
        t = keep[tile]
        x, y = px[t, pixel], py[t, pixel]
        inside = (x < width) & (y < height)
        place = ((n[t] * height + y) * width + x)[inside]
        picture[place] = (colour.flip(1) * 255 + 0.5).byte()[inside]
        cover[place] = (1.25 - 1.25 * gap[t, pixel]).clamp(0, 1)[inside]
    picture = picture.reshape(len(hands), height, width, 3).cpu().numpy()
    cover = cover.reshape(len(hands), height, width).cpu().numpy()
    for i, h in enumerate(hands):
        if h["left"]:
            picture[i] = picture[i, :, ::-1].copy()
            cover[i] = cover[i, :, ::-1].copy()
    keypoints = np.stack([hand_pixels(h, width) for h in hands])
    return picture, cover, keypoints


def backdrop(rng, width, height):
    """A made-up room or table, uint8 BGR (height, width, 3): a gradient, patches of light,
    things, grain."""
    def tint(low=30, high=225, colourful=0.35):
        grey = rng.uniform(low, high)
        return np.clip(grey + colourful * rng.normal(0, 45, 3), 0, 255)
    y, x = np.mgrid[:height, :width] / max(width, height)
    angle = rng.uniform(0, 6.28)
    ramp = ((x * np.cos(angle) + y * np.sin(angle)) % 1)[..., None]
    picture = np.ascontiguousarray(tint() * ramp + tint() * (1 - ramp), np.float32)
    kind = rng.integers(4)
    if kind == 0:  # boards
        stripe = np.sin((x * np.sin(angle) + y * np.cos(angle)) * rng.uniform(20, 60)
                        + 2 * cv2.resize(rng.normal(0, 1, (4, 5)), (width, height),
                                         interpolation=cv2.INTER_CUBIC))
        picture += stripe[..., None].astype(np.float32) * rng.uniform(5, 25)
    for cells, strength in ((3, 1), (9, 0.8), (30, 0.4))[:rng.integers(1, 4)]:
        grey, coloured = rng.uniform(4, 20), rng.uniform(0, 6)
        patches = rng.normal(0, grey, (cells, cells, 1))
        patches = patches + rng.normal(0, coloured, (cells, cells, 3))
        patches = cv2.resize(patches, (width, height), interpolation=cv2.INTER_CUBIC)
        picture += strength * patches.astype(np.float32)
    for _ in range(rng.integers(0, 14) if kind else 2):  # things
        cx, cy, w, h = rng.uniform(0, (width, height, width / 3, height / 3))
        box = cv2.boxPoints(((cx, cy), (w + 8, h + 8), rng.uniform(0, 30))).astype(np.int32)
        if rng.random() < 0.6:
            cv2.fillPoly(picture, [box], tint().tolist(), cv2.LINE_AA)
        else:
            axes = (int(w / 2) + 4, int(h / 2) + 4)
            cv2.ellipse(picture, (int(cx), int(cy)), axes, 0, 0, 360, tint().tolist(), -1,
                        cv2.LINE_AA)
    picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.6, 3))
    picture = picture + rng.normal(0, rng.uniform(0, 4), picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8)


def make_light(rng):
    """-> direction to the light in the camera frame, its linear RGB, RGB of the light from
    above and from below."""
    direction = np.array((rng.normal(0, 0.6), -rng.uniform(0.2, 1.2), -rng.uniform(0.3, 1.2)))
    warm = np.array((1.0, 1, 1)) + rng.uniform(-0.10, 0.14) * np.array((1.0, 0.1, -1))
    sun, sky, ground = rng.uniform(0.9, 1.35), rng.uniform(0.28, 0.48), rng.uniform(0.5, 0.8)
    return direction / np.linalg.norm(direction), sun * warm, sky * np.ones(3), sky * ground * warm


def draw_view(rng, side=None, upright=False, world="full"):
    """-> degrees: turn about the forearm's axis (0 shows the palm, 180 the back), tilt,
    roll in the picture.

    The turn is uniform over the circle, over one half of it where side says "palm" or
    "back"; upright: little roll. This was fixed before any detector saw a hand. The small
    world shows the palm, whatever else is asked for."""
    if world == "small":
        return rng.uniform(-40, 40), rng.uniform(-20, 20), rng.uniform(-45, 45)
    turn = rng.uniform(-90, 90) + (180 if (side == "back" if side else rng.random() < 0.5) else 0)
    return turn, np.clip(rng.normal(0, 25), -60, 60), rng.normal(0, 15 if upright else 45)


def view_matrix(turn, tilt, roll):
    return rotation(2, roll) @ rotation(0, tilt) @ rotation(1, turn)


def place_hand(person, angles, view, spot, length, camera, size, light, left=False, area=None):
    """A hand whose box lies inside the area (x0, y0, x1, y1), at spot (2,) in 0..1 of the
    room there.

    length: pixels of an open hand; light as seen in the picture."""
    matrix = view_matrix(*view)
    extent = np.ptp(skeleton(person, angles)[0] @ matrix.T, axis=0)[:2]
    area = np.array(area or (0, 0, *size), float)
    if left:  # make_hand wants all as seen in a mirror
        area[[0, 2]] = size[0] - area[[2, 0]]
        light, spot = (light[0] * (-1, 1, 1), *light[1:]), np.array((1 - spot[0], spot[1]))
    room = area[2:] - area[:2]
    # Half way between a box of fixed size and a hand of fixed distance: a fist is smaller
    # than an open hand, not tiny.
    side = min(length * (extent.max() / 185) ** 0.5, *(0.85 * room * extent.max() / extent))
    distance, centre = camera[0, 0] * extent.max() / side, (area[:2] + area[2:]) / 2
    for _ in range(3):
        hand = make_hand(person, angles, matrix, centre, distance, camera, light, left)
        box = box_of(project(hand["xyz"], hand["camera"]))
        half = (box[2:] - box[:2]) / 2
        distance = max(distance * 2 * half.max() / side, 250)
        centre = area[:2] + half + 5 + spot * np.maximum(room - 2 * half - 10, 0)
    return make_hand(person, angles, matrix, centre, distance, camera, light, left)


def blend(background, hands, pictures, covers, rng, blur, noise, front=()):
    """The hands over the background, the far ones first, then what is in front of them,
    pairs of picture and cover, through a lens and a sensor -> uint8 BGR."""
    picture = background.astype(np.float32)
    for i in sorted(range(len(hands)), key=lambda i: -hands[i]["offset"][2]):
        lay_over(picture, pictures[i], covers[i])
    for thing, cover in front:
        lay_over(picture, thing, cover)
    picture = cv2.GaussianBlur(picture, (0, 0), blur)
    picture += noise * rng.standard_normal(picture.shape, np.float32)
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


def lay_over(picture, thing, cover):
    """Change the picture to the thing where it covers it."""
    rows, columns = np.flatnonzero(cover.any(1)), np.flatnonzero(cover.any(0))
    if len(rows):
        part = np.s_[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
        picture[part] += (thing[part] - picture[part]) * cover[part][..., None]


def plan_videos(videos, seconds, fps, seed, world="full"):
    """-> for each video its name, its person, when it is empty, and one or two tracks
    (left, keyframes).

    All is drawn before any is rendered, so that every pose comes from the palm's side as
    often as from the back."""
    rng = np.random.default_rng((seed, 2))
    pairs, plan = [], []
    clips = 1 if world == "small" else 2  # of each person
    count = int(np.ceil(seconds / PERIOD)) + 1
    for v in range(videos):
        sides = [(v % 3 == 1)] + ([v % 3 != 1] if v % 8 == 3 else [])
        gap = rng.uniform(0.1, 0.7) if v % 4 == 1 else 2
        gap, tracks = (gap, gap + 0.2), []
        for left in sides:
            keys = []
            for k in range(count):
                if not pairs:
                    pairs = [(name, side) for name in WORLDS[world] for side in ("palm", "back")]
                    rng.shuffle(pairs)
                unseen = gap[0] <= k * PERIOD / seconds < gap[1] or k == count - 1
                name, side = pairs[-1] if unseen else pairs.pop()
                spot = draw_spot(rng)
                if len(sides) == 2:  # hands apart, each on its own side
                    spot[0] = 0.6 * spot[0] + (0 if left else 0.4)
                low, high = LENGTHS
                keys.append({"pose": NAMES.index(name), "angles": pose_angles(name, rng),
                             "spot": spot, "view": draw_view(rng, side, len(sides) == 2, world),
                             "length": low * (high / low) ** rng.random()})
            tracks.append((left, keys))
        person, clip = divmod(v, clips)
        plan.append({"name": f"person{person:03d}_clip{clip + 1}", "person": person,
                     "tracks": tracks, "gap": gap})
    return plan


def draw_spot(rng):
    """-> where a hand lies in the room that it has, (2,) in 0..1: in the frame, or now and then at
    its edge, below or at a side, where the hands of a person who wears the camera come from."""
    spot = rng.uniform(0.1, 0.9, 2)
    if rng.random() < AT_EDGE:
        axis, end = ((0, 0), (0, 1), (1, 1))[rng.integers(3)]
        spot[axis] = end
    return spot


def pose_at(keys, time):
    """Between two keyframes, poses held a while, all else on its way -> pose index, angles,
    view, spot, length."""
    def smooth(x):
        return x * x * (3 - 2 * x)
    k = min(int(time / PERIOD), len(keys) - 2)
    a, b, x = keys[k], keys[k + 1], time / PERIOD - k
    way, held = smooth(x), smooth(np.clip((x - 0.25) / 0.65, 0, 1))
    change = np.subtract(b["view"], a["view"])
    change[0] = (change[0] + 180) % 360 - 180
    angles = a["angles"] + held * (b["angles"] - a["angles"])
    spot, length = (a[key] + way * (b[key] - a[key]) for key in ("spot", "length"))
    return (a if held < 0.5 else b)["pose"], angles, a["view"] + way * change, spot, length


def make_object(rng, width, height):
    """A box or a disc that goes round in front of a hand, in pictures of this size."""
    return {"half": rng.uniform(0.08, 0.22, 2), "phase": rng.uniform(0, 2 * np.pi, 2),
            "speed": rng.uniform(0.15, 0.5, 2), "turn": rng.uniform(0, 180),
            "box": rng.random() < 0.5,
            "texture": backdrop(rng, width, height) * np.float32(rng.uniform(0.5, 1.2))}


def cover_of(thing, keypoints, time):
    """What the object covers at that time, seconds, in front of the hand with these keypoints,
    (H, W) in 0..1."""
    half = np.ptp(keypoints, axis=0).max() * thing["half"]
    way = np.sin(thing["phase"] + 2 * np.pi * thing["speed"] * time) * 0.45
    centre = (keypoints.min(0) + keypoints.max(0)) / 2 + way * np.ptp(keypoints, axis=0)
    box = tuple(map(float, centre)), tuple(map(float, 2 * half)), thing["turn"]
    cover = np.zeros(thing["texture"].shape[:2], np.uint8)
    if thing["box"]:
        cv2.fillPoly(cover, [np.round(cv2.boxPoints(box) * 8).astype(int)], 255, cv2.LINE_AA, 3)
    else:
        cv2.ellipse(cover, box, 255, -1, cv2.LINE_AA)
    return cover / np.float32(255)


def write_videos(folder, videos=24, seconds=10, fps=5, size=FRAME, seed=0, device=None, objects=0.0,
                 world="full", workers=1):
    """Videos of one person each, NAME.mp4, and the truth, NAME.npy: one row (TRUTH) for
    each hand of each frame. objects: share of the videos in which something moves in front
    of the hands. world: a key of WORLDS. workers: processes, a video at a time each; their
    number changes nothing in the files.

    keypoints are pixels of the picture (centres at integers), xyz mm in the camera frame,
    pose an index into NAMES."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    count = round(seconds * fps)
    write = functools.partial(write_video, folder, count, fps, size, seed, device, objects)
    plan = list(enumerate(plan_videos(videos, seconds, fps, seed, world)))
    with contextlib.ExitStack() as stack:
        each = map
        if workers > 1:
            context = multiprocessing.get_context("spawn")  # a fork would break torch's threads
            pool = concurrent.futures.ProcessPoolExecutor(workers, context)
            each = stack.enter_context(pool).map
        for _ in tqdm(each(write, plan), desc="videos", unit="video", total=videos):
            pass


def write_video(folder, count, fps, size, seed, device, objects, numbered):
    """numbered: a number v and the video of that number in the plan."""
    v, video = numbered
    target, truth = folder / f"{video['name']}.mp4", folder / f"{video['name']}.npy"
    if target.exists() and truth.exists():
        return
    rng = np.random.default_rng((seed, 3, v))
    hidden = np.random.default_rng((seed, 6, v)).random() < objects
    frames, rows = draw_video(video, rng, count, fps, size, seed, device, v if hidden else None)
    partial = folder / f".{video['name']}.partial.mp4"
    writer = cv2.VideoWriter(str(partial), cv2.VideoWriter_fourcc(*"mp4v"), fps, size)
    if not writer.isOpened():
        raise OSError(f"{partial}: OpenCV cannot write mp4v videos")
    for frame in frames:
        writer.write(frame)
    writer.release()
    with open(partial.with_suffix(".npy"), "wb") as file:
        np.save(file, rows)
    os.replace(partial.with_suffix(".npy"), truth)
    os.replace(partial, target)


def draw_video(video, rng, count, fps, size, seed, device, thing=None):
    """-> count frames, truth. thing: number of an object in front of the hands, None for none."""
    width, height = size
    person, light = make_person(seed, video["person"]), make_light(rng)
    focal = rng.uniform(0.9, 1.5) * width
    camera = np.array([(focal, 0, (width - 1) / 2), (0, focal, (height - 1) / 2), (0, 0, 1)])
    room = backdrop(rng, width + 32, height + 32)
    drift = rng.uniform(0, 32, (2, 2)) * rng.integers(0, 2)
    blur, noise = rng.uniform(0.6, 1.2), rng.uniform(1, 3)
    hands, owners, rows = [], [], []
    for frame in range(count):
        if video["gap"][0] <= frame / count < video["gap"][1]:
            continue
        for left, keys in video["tracks"]:
            pose, angles, view, spot, length = pose_at(keys, frame / fps)
            area = None
            if len(video["tracks"]) == 2:
                # Crossed arms would hide a hand: the right hand stays on the right.
                area = (0, 0, width / 2 - 12, height) if left else (
                    width / 2 + 12, 0, width, height)
            hands.append(place_hand(person, angles, view, spot, length, camera, size, light, left,
                                    area))
            owners.append(frame)
            xyz = hands[-1]["xyz"] * ((-1, 1, 1) if left else (1, 1, 1))
            rows.append((frame, left, pose, hand_pixels(hands[-1], width), xyz))
    pictures, covers = [], []
    for start in range(0, len(hands), 16):
        drawn = render(hands[start:start + 16], size, device)
        pictures.extend(drawn[0])
        covers.extend(drawn[1])
    if thing is not None:
        thing = make_object(np.random.default_rng((seed, 7, thing)), width, height)
    frames = []
    for frame in range(count):
        x, y = (drift[0] + (drift[1] - drift[0]) * frame / count).tolist()
        move = np.array([(1, 0, -x), (0, 1, -y)])
        mine = [i for i, owner in enumerate(owners) if owner == frame]
        front = []
        if thing is not None:
            front = [(thing["texture"], cover_of(thing, rows[i][3], frame / fps)) for i in mine]
        frames.append(blend(cv2.warpAffine(room, move, size), [hands[i] for i in mine],
                            [pictures[i] for i in mine], [covers[i] for i in mine], rng, blur,
                            noise, front))
    return frames, np.array(rows, TRUTH)


def freihand_sample(split, i, size, seed, world="full"):
    """-> the hand of one annotation."""
    rng = np.random.default_rng((seed, 4, split == "training", i))
    persons = TRAINING_PERSONS if split == "training" else EVALUATION_PERSONS
    person = make_person(seed, persons[i % len(persons)])
    poses = WORLDS[world]
    names = [poses[i % len(poses)], poses[rng.integers(len(poses))]]
    share = 0.5 * rng.random() ** 3
    angles = (1 - share) * pose_angles(names[0], rng) + share * pose_angles(names[1], rng)
    view = draw_view(rng, world=world)
    joints, _ = skeleton(person, angles)
    extent = np.ptp(joints @ view_matrix(*view).T, axis=0)[:2].max()
    distance, side = rng.uniform(450, 950), size * rng.uniform(0.42, 0.68)
    focal = side * distance / extent
    centre = (size - 1) / 2 + rng.normal(0, 0.18 * size, 2)
    camera = np.array([(focal, 0, centre[0]), (0, focal, centre[1]), (0, 0, 1)])
    middle = (size - 1) / 2 + rng.uniform(-0.08, 0.08, 2) * size
    return make_hand(person, angles, view_matrix(*view), middle, distance, camera, make_light(rng))


def write_freihand(folder, train=300, evaluation=100, size=224, seed=0, device=None, world="full"):
    """A labelled set in FreiHAND's layout: right hands, four versions of a training
    picture, xyz in metres.

    evaluation_xyz.json lies in the sibling folder FOLDER_eval. The persons of the two
    splits differ."""
    folder = Path(folder)
    sibling = folder.parent / f"{folder.name}_eval"
    for split, count, versions in (("training", train, 4), ("evaluation", evaluation, 1)):
        rgb = folder / split / "rgb"
        rgb.mkdir(parents=True, exist_ok=True)
        sibling.mkdir(parents=True, exist_ok=True)
        names = [[rgb / f"{i + k * count:08d}.jpg" for k in range(versions)] for i in range(count)]
        hands = [freihand_sample(split, i, size, seed, world) for i in range(count)]
        for start in tqdm(range(0, count, 32), desc=f"freihand {split}", unit="batch"):
            # Always the same batches: their mix changes the last digits.
            ids = range(start, min(start + 32, count))
            if all(name.exists() for i in ids for name in names[i]):
                continue
            pictures, covers, _ = render([hands[i] for i in ids], (size, size), device)
            for i, picture, cover in zip(ids, pictures, covers):
                write_versions(names[i], hands[i], picture, cover,
                               (seed, 5, split == "training", i))
        xyz = [hand["xyz"] / 1000 for hand in hands]
        lists = {folder / f"{split}_K.json": [hand["camera"] for hand in hands],
                 folder / f"{split}_scale.json": [np.linalg.norm(joints[9] - joints[10])
                                                  for joints in xyz],
                 (folder if split == "training" else sibling) / f"{split}_xyz.json": xyz}
        for path, values in lists.items():
            if not path.exists():
                partial = path.with_name(f".{path.name}.partial")
                partial.write_text(json.dumps([value.tolist() for value in values]))
                os.replace(partial, path)


def write_versions(names, hand, picture, cover, seed):
    """The same hand before several backgrounds; the first of four is a green screen."""
    size = len(picture)
    rng = np.random.default_rng(seed)
    blur, noise = rng.uniform(0.3, 0.7), rng.uniform(0.5, 3)
    for k, name in enumerate(names):
        scene = backdrop(rng, size, size)
        if name.exists():
            continue
        if len(names) == 4 and k == 0:
            scene = np.full((size, size, 3), (60, 160, 50))
            scene = scene + np.linspace(0, 30, size)[:, None, None]
        drawn = blend(scene, [hand], [picture], [cover], np.random.default_rng(seed), blur, noise)
        partial = name.with_name(f".{name.stem}.partial.jpg")
        cv2.imwrite(str(partial), drawn, (cv2.IMWRITE_JPEG_QUALITY, 95))
        os.replace(partial, name)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    videos = tasks.add_parser("videos", help="videos and their truth")
    videos.add_argument("out")
    videos.add_argument("--videos", type=int, default=24, help="how many")
    videos.add_argument("--seconds", type=float, default=10, help="length of each")
    videos.add_argument("--fps", type=float, default=5, help="frames a second")
    videos.add_argument("--objects", type=float, default=0,
                        help="share of the videos with objects in front of hands")
    videos.add_argument("--workers", type=int, default=1, help="processes, a video at a time each; "
                        "the files are the same with any number (default: 1)")
    freihand = tasks.add_parser("freihand", help="a labelled set in FreiHAND's layout")
    freihand.add_argument("out")
    freihand.add_argument("--train", type=int, default=300,
                          help="training hands, four pictures each")
    freihand.add_argument("--evaluation", type=int, default=100, help="evaluation hands")
    for task in (videos, freihand):
        task.add_argument("--world", choices=sorted(WORLDS), default="full",
                          help="full: 16 poses from all sides; small: eight, the palm towards the "
                          "camera, so that hands of different persons look alike (default: full)")
        task.add_argument("--seed", type=int, default=0)
        task.add_argument("--device", help="cuda or cpu; default: cuda when there is one")
    return parser.parse_args()


def main():
    args = parse_args()
    if args.task == "videos":
        write_videos(args.out, args.videos, args.seconds, args.fps, seed=args.seed,
                     device=args.device, objects=args.objects, world=args.world,
                     workers=args.workers)
    else:
        write_freihand(args.out, args.train, args.evaluation, seed=args.seed, device=args.device,
                       world=args.world)


if __name__ == "__main__":
    main()
