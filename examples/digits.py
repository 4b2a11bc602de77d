"""Optimize the shipped digit classifier from Python. Run: python examples/digits.py."""

import lamina
from lamina import demo

result = lamina.optimize(
    demo.MODEL,
    "drop<=1%",
    data=demo.DATA,
    metric="top1",
    target="ort:cpu?threads=1",
    workload="32",
    seconds=12,
)
found = result.evidence
print(f"latency {found['latency_ratio']:.2f}x, size {found['size_ratio']:.2f}x of the original")
print(f"top1 {found['original']['metric']:.4f} -> {found['optimized']['metric']:.4f}")
print(f"{len(found['moves'])} moves, first: {found['moves'][0]['option']} at {found['moves'][0]['site']}")
result.save("out/digits")
