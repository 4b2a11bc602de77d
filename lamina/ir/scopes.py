"""Which module of the user's source a node came from, as far as the model still says."""

from __future__ import annotations

import ast

import onnx_ir as ir

_SCOPES, _NAMESPACE = "pkg.torch.onnx.name_scopes", "namespace"
_PARAMETERS = frozenset(
    {"weight", "bias", "gamma", "beta", "running_mean", "running_var", "kernel", "scale", "in_proj_weight"}
    | {"in_proj_bias", "weight_quantized", "weight_scale", "weight_zero_point", "embeddings"}
)


def scope_of(node: ir.Node) -> str | None:
    """The module path of ``node``, such as ``encoder.layer.0.attention.self.query``.

    Taken from the exporter's metadata, else from a path-like node name (``/encoder/layer.0/MatMul``), else
    from the name of a weight the node reads, or of the bias added to its output. None when nothing says.
    """
    metadata = node.metadata_props
    if _SCOPES in metadata:
        return _from_scopes(metadata[_SCOPES])
    if _NAMESPACE in metadata:
        return _from_namespace(metadata[_NAMESPACE])
    if node.name and node.name.startswith("/") and node.name.count("/") > 1:
        return ".".join(node.name.split("/")[1:-1])
    return _from_weights(node) or _from_bias(node)


def _from_scopes(text: str) -> str | None:
    try:
        path = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None
    return _innermost([str(p) for p in path[:-1]]) if isinstance(path, list) else None


def _from_namespace(text: str) -> str | None:
    return _innermost([level.split(": ")[0] for level in text.split("/")[:-1]])


def _innermost(path: list[str]) -> str | None:
    named = [p for p in path if p and not p.startswith("_empty_nn_module_stack")]
    return named[-1] if named else None


def _from_weights(node: ir.Node) -> str | None:
    for value in node.inputs:
        if value is not None and value.is_initializer():
            scope = _module_of(value.name or "")
            if scope:
                return scope
    return None


def _from_bias(node: ir.Node) -> str | None:
    users = list(node.outputs[0].uses()) if node.outputs else []
    if node.op_type == "MatMul" and len(users) == 1 and users[0].node.op_type == "Add":
        return _from_weights(users[0].node)
    return None


def _module_of(parameter: str) -> str | None:
    """``m.query.bias`` -> ``m.query``; ``dense/kernel:0`` -> ``dense``; None for other names."""
    path = parameter.split(":")[0].replace("/", ".").strip(".")
    module, _, leaf = path.rpartition(".")
    return module if module and leaf in _PARAMETERS else None
