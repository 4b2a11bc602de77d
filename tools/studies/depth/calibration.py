"""What a repair of resnet56 is worth by the images it is fitted on: how many, and whether seen in training.

    python -m tools.studies.depth.calibration

Two branches gone (layer2.4, layer3.2), repaired at once, scored on 2,000 report images. The images that the
network was not trained on are of the selection set, on which nothing else is chosen here.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping

import numpy as np

from lamina.data import Dataset
from lamina.passes.compensate import Compensation, compensate
from lamina.planner.apply import apply_moves
from lamina.planner.mend import standing
from tools.bench.cases import CASES, training_images
from tools.studies.depth.repair import drops
from tools.studies.depth.scoring import Study

GONE = ("layer2.4", "layer3.2")


def images(selection: np.ndarray) -> Mapping[str, tuple[np.ndarray, Compensation]]:
    """Name -> images and how to fit on them."""
    many = Compensation(rows=2000, tokens=65536)
    training = training_images()
    return {
        "256 training": (training[:256], Compensation()),
        "256 unseen": (selection[1000:1256], Compensation()),
        "2000 training": (training, many),
    }


def main() -> None:
    """Print one line a calibration set."""
    argparse.ArgumentParser(
        prog="python -m tools.studies.depth.calibration",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    case = next(c for c in CASES if c.name == "resnet56")
    study = Study.of(case, 48, 2000)
    moves = [m for m in drops(study.program) if m.site.name in GONE]
    plain = apply_moves(study.program, moves)
    for name, (x, how) in images(case.load()["selection"]["x"]).items():
        start = time.process_time()
        made = compensate(
            study.program,
            plain,
            Dataset({"x": x}, {}, case.batch_size),
            stands_for=standing(moves, plain),
            how=how,
            divergence=study.order.divergence,
            threads=1,
        )
        seconds = time.process_time() - start
        found = study.report.report(study.report(made.program))
        low, high = found["damage_ci95"]
        print(
            f"{name}: damage {100 * found['damage']:+.2f} ({100 * low:+.2f} to {100 * high:+.2f}), "
            f"kl {found['divergence']:.4f}, {len(made.fitted)} operators, {seconds:.0f} CPU s",
            flush=True,
        )


if __name__ == "__main__":
    main()
