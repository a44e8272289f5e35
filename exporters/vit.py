"""Train and export a small vision transformer that tells which shape is in a picture.

Every picture of 24 by 24 holds one shape (disc, square, triangle, cross or ring) of a bright colour, anywhere, on a
dark and noisy ground among short bright lines, which are there in every class. The patches that the shape covers are
the evidence.

    python -m exporters.vit --out vit.onnx
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from torch.nn.functional import cross_entropy

from exporters.training import fit
from exporters.transformers import ViT, export

CLASSES = ("disc", "square", "triangle", "cross", "ring")
SIZE, PATCH, DARK = 24, 4, np.float32(0.225)  # the mean of the ground
PICTURES, STEPS, BATCH = 8192, 1600, 64


def outlines(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distances, roughly, to the five shapes of radius one around the origin: (classes, ...)."""
    radius, box = np.hypot(x, y), np.maximum(np.abs(x), np.abs(y))
    triangle = np.maximum(np.abs(x) * 0.866 + y * 0.5, -y) - 0.55
    arm, reach = np.minimum(np.abs(x), np.abs(y)), np.maximum(np.abs(x), np.abs(y))
    cross = np.maximum(arm - 0.28, reach - 1.0)
    return np.stack([radius - 0.95, box - 0.82, triangle, cross, np.abs(radius - 0.75) - 0.25])


def pictures(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw pictures of all classes in turn.

    Args:
        count: how many.
        seed: of everything random.

    Returns:
        Pictures float32 (count, 3, 24, 24) from 0 to 1, labels int64 (count,), and which pixels the shape covers,
        bool (count, 24, 24).
    """
    rng = np.random.default_rng(seed)
    grid = np.arange(SIZE) + 0.5
    labels = np.arange(count) % len(CLASSES)

    def each(low: float, high: float, *shape: int) -> np.ndarray:
        return rng.uniform(low, high, (count, *(shape or (1, 1))))

    image = each(0.1, 0.35, 3, 1, 1) + rng.normal(0, 0.06, (count, 3, SIZE, SIZE))
    for _ in range(3):  # short lines: what lies within half a pixel of a segment
        x, y, angle, length = each(0, SIZE), each(0, SIZE), each(0, np.pi), each(1.5, 3)
        dx, dy = grid[None, None, :] - x, grid[None, :, None] - y
        along, across = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
        cover = np.clip(1.2 - np.maximum(np.abs(across), np.abs(along) - length), 0, 1)[:, None]
        image += cover * (each(0.4, 1, 3, 1, 1) - image)
    reach = each(4, 5.5)
    x, y, turn = (each(6, SIZE - 6), each(6, SIZE - 6), each(-0.4, 0.4))
    dx, dy = (grid[None, None, :] - x) / reach, (grid[None, :, None] - y) / reach
    shapes = outlines(dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn))
    inside = np.clip(0.5 - shapes[labels, np.arange(count)] * reach, 0, 1)
    image += inside[:, None] * (each(0.5, 1, 3, 1, 1) - image)
    return np.clip(image, 0, 1).astype(np.float32), labels, inside > 0.5


def train(seed: int = 0, steps: int = STEPS) -> ViT:
    """Train the network: the same weights whenever it runs again on one machine."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = ViT(size=SIZE, patch=PATCH, classes=len(CLASSES), dim=48, heads=4, hidden=96, layers=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    drawn, classes, _ = pictures(PICTURES, seed + 1000)

    def loss() -> torch.Tensor:
        chosen = rng.integers(PICTURES, size=BATCH)
        images, labels = drawn[chosen][..., :: int(rng.choice([-1, 1]))], classes[chosen]
        # Some patches are dark, so that deleting one is nothing new.
        images = erase(images, rng.random((BATCH, (SIZE // PATCH) ** 2)) < rng.uniform(0, 0.2))
        return cross_entropy(model(torch.tensor(images)), torch.tensor(labels))

    fit(model, optimizer, 3e-3, steps, loss)
    return model


def erase(images: np.ndarray, patches: np.ndarray) -> np.ndarray:
    """Darken the patches that are true, (count, 36): patch by patch in rows."""
    side = SIZE // PATCH
    grown = patches.reshape(-1, side, side).repeat(PATCH, 1).repeat(PATCH, 2)
    return np.where(grown[:, None], DARK, images)


def accuracy(model: ViT, count: int = 2000, seed: int = 1) -> float:
    """Share of fresh pictures that get the right label."""
    images, labels, _ = pictures(count, seed)
    with torch.no_grad():
        found = model(torch.tensor(images)).argmax(-1).numpy()
    return float((found == labels).mean())


def write(model: ViT, path: str | Path | None, *, opset: int = 18, dynamo: bool = False) -> onnx.ModelProto:
    """Export the network; the batch stays open."""
    example = {"image": torch.tensor(pictures(2, 0)[0])}
    named = {"image": {0: "batch"}, "logits": {0: "batch"}}
    return export(model, path, example, "logits", named, opset=opset, dynamo=dynamo)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m exporters.vit", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", required=True, type=Path, help="the file to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--dynamo", action="store_true", help="use torch's newer exporter")
    parser.add_argument("--opset", type=int, default=18)
    args = parser.parse_args(arguments)
    model = train(args.seed, args.steps)
    print(f"accuracy on fresh pictures: {accuracy(model):.2%} (chance is {1 / len(CLASSES):.2%})")
    write(model, args.out, opset=args.opset, dynamo=args.dynamo)


if __name__ == "__main__":
    main()
