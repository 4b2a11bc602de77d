"""Train the model `lamina demo` ships: a residual convnet on scikit-learn's digits (8x8, 10 classes).

The data set is the test part of Alpaydin and Kaynak's "Optical Recognition of Handwritten Digits" (UCI,
CC BY 4.0), as scikit-learn packages it. Usage: python tools/demo/train.py lamina/demo
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from sklearn.datasets import load_digits
from torch import nn

WIDTH, BLOCKS, EPOCHS = 28, 6, 30
TRAINED = 900  # rows used for training; the other 897 ship as the demo's samples


class Block(nn.Module):
    """x + conv(relu(conv(x))), then relu."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.conv2 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The block's output, shaped like ``x``."""
        return torch.relu(x + self.conv2(torch.relu(self.conv1(x))))


class Digits(nn.Module):
    """Stem, residual blocks, mean, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.blocks = nn.Sequential(*[Block() for _ in range(BLOCKS)])
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits ``[b, 10]`` of images ``[b, 1, 8, 8]``."""
        x = self.blocks(torch.relu(self.stem(images)))
        return self.head(x.mean(dim=(2, 3)))


def main(folder: Path) -> None:
    torch.manual_seed(0)
    data = load_digits()
    images = (data.images[:, None] / 16.0).astype(np.float32)
    labels = data.target.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order], labels[order]
    train_x, train_y = torch.from_numpy(images[:TRAINED]), torch.from_numpy(labels[:TRAINED])
    model = Digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)
    steps = EPOCHS * (TRAINED // 50)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(TRAINED)[: TRAINED // 50 * 50].split(50):
            shift = [int(s) for s in torch.randint(-1, 2, (2,))]
            batch = torch.roll(train_x[rows], shift, dims=(2, 3))
            loss = nn.functional.cross_entropy(model(batch), train_y[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        right = model(torch.from_numpy(images[TRAINED:])).argmax(1).numpy() == labels[TRAINED:]
    print(f"top-1 on {len(right)} rows not trained on: {right.mean():.4f}")
    program = torch.onnx.export(
        model,
        (train_x[:2],),
        dynamo=True,
        opset_version=18,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        verbose=False,
    )
    folder.mkdir(parents=True, exist_ok=True)
    for node in program.model.graph:  # paths of the machine that trained it are nobody's business
        node.metadata_props.clear()
    ir.save(program.model, folder / "digits.onnx")
    np.savez_compressed(folder / "digits.npz", images=images[TRAINED:], labels=labels[TRAINED:])
    for path in sorted(folder.glob("digits.*")):
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
