"""A small analysis as plain data, with whatever names a test wants."""

from __future__ import annotations

from typing import Any


def part(name: str, kind: str, parameters: int = 0, **more: Any) -> dict[str, Any]:
    made = {
        "name": name,
        "kind": kind,
        "parameters": parameters,
        "flops": 2 * parameters,
        "macs": parameters,
        "bytes_moved": 4 * parameters,
        "bytes_crossing": 8,
        "intensity": 0.5,
        "bound": "compute",
        "roof_share": 0.5,
        "latency_s": parameters * 1e-8,
        "metrics": {},
        "members": [],
        "options": [],
    }
    return {**made, **more}


def sample(layers: int = 3, prefix: str = "layers.", timed: bool = True) -> dict[str, Any]:
    """``layers`` blocks of attention and mlp, a head outside; influences rise with depth."""
    blocks, branches, operators = [], [], []
    for layer in range(layers):
        members = []
        for step, kind in enumerate(("attention", "mlp")):
            name = f"{prefix}{layer}.{kind}"
            nodes = [f"{name}.up", f"{name}.act", f"{name}.down"]
            error = 0.001 * (1 + 2 * layer + step)
            operators += [
                part(
                    nodes[0], "MatMul", 1000, metrics={"quantization-error-w4": error}, options=["w8", "w4"]
                ),
                part(nodes[1], "Relu"),
                part(nodes[2], "MatMul", 1000, metrics={"quantization-error-w4": error / 2}),
            ]
            rated = {"block-influence": 0.05 * (1 + 2 * layer + step), "angular-distance": 0.1}
            options = [
                "drop",
                "rank-4",
                "full",
                "w8a8-dynamic",
                "w8",
                "w4",
                "stored-w4",
                "float16",
                "third-party",
            ]
            branches.append(part(name, kind, 2000, metrics=rated, members=nodes, options=options))
            members.append(name)
        rated = {"block-influence": 0.1 * (1 + layer)}
        blocks.append(part(f"{prefix}{layer}", "block", 4000, metrics=rated, members=members))
    operators.append(part(f"{prefix}head", "Gemm", 500, metrics={"quantization-error-w4": 0.02}))
    operators += [part(f"{prefix}norm{i}", "LayerNormalization", 10) for i in range(3)]
    depths = [*(b["name"] for b in branches), "end"]
    angles = [[abs(i - j) / len(depths) for j in range(len(depths))] for i in range(len(depths))]
    whole = sum(o["latency_s"] for o in operators)
    totals = {
        "flops": sum(o["flops"] for o in operators),
        "parameters": sum(o["parameters"] for o in operators),
        "weight_bytes": 4 * sum(o["parameters"] for o in operators),
        "peak_activation_bytes": 4096,
    }
    errors = [
        [o["metrics"]["quantization-error-w4"] / 100, o["metrics"]["quantization-error-w4"]]
        for o in operators
        if o["metrics"]
    ]
    found = {
        "model": "model.onnx",
        "target": "ort:cpu?threads=1",
        "blocks": blocks,
        "branches": branches,
        "operators": operators,
        "totals": totals | ({"operators_latency_s": whole, "other_latency_s": 0.0} if timed else {}),
        "shapes": {"x": [1, 16]},
        "samples": {"all": 12, "looked": 0},
        "skipped": {},
        "refusals": {},
        "matrices": {
            "angular-distance": {"rows": depths, "columns": depths, "values": angles},
            "quantization-error": {
                "rows": [o["name"] for o in operators if o["metrics"]],
                "columns": ["8", "4"],
                "values": errors,
            },
        },
        "pairs": {},
        "damages": {},
        "gradients": {},
        "offers": [{"transform": "drop"}, {"transform": "quantize"}],
        "folds": [],
        "metric": None,
        "seconds": {},
    }
    if not timed:
        for parts in (blocks, branches, operators):
            for one in parts:
                one |= {"latency_s": None, "bound": None, "roof_share": None}
    return found


HOSTILE = '<script>alert("x")</script>&amp;\x1b[31m]]>\u202e[bold]"\'\x00\n'
