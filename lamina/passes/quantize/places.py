"""What of a program a quantization site means: its nodes, weights, outputs, and the blocks that fit them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from lamina.errors import PassError
from lamina.ir.program import Program
from lamina.passes.pass_ import Option, Site
from lamina.passes.quantize.activations import value_named
from lamina.passes.quantize.graph import constant_array
from lamina.passes.quantize.linear import linear_of
from lamina.passes.quantize.weight_only import weight_place, weight_places


def placed(option: Option, site: Site, program: Program) -> Option:
    """The option, saying which outputs of a recurrent operator are read."""
    if site.kind != "recurrent":
        return option
    outputs = nodes_of(site, program)[site.nodes[0]].outputs
    places = [i for i, value in enumerate(outputs) if value.name in site.outputs]
    return replace(option, parameters={**option.parameters, "outputs": places})


def nodes_of(site: Site, program: Program) -> dict[str, ir.Node]:
    """The site's nodes by name.

    Raises:
        PassError: They are not in the program.
    """
    last = value_named(program, site.outputs[0])
    node = None if last is None else last.producer()
    if node is None:
        raise PassError(f"site '{site.name}' is not in the program", advice="ask for sites() of this program")
    found = {node.name or "": node}
    if len(site.nodes) > 1:
        makers = [v.producer() for v in node.inputs if v is not None]
        found[site.nodes[0]] = next(m for m in makers if m is not None and m.name == site.nodes[0])
    return found


def weights_of(site: Site, program: Program) -> list[np.ndarray]:
    """The site's weights, in the shapes they are stored in: two of a recurrent operator, else one."""
    nodes = nodes_of(site, program)
    node = nodes[site.nodes[0]]
    arrays = [constant_array(node.inputs[index]) for index, _ in weight_places(site, nodes)]
    return [array for array in arrays if array is not None]


def is_left(site: Site, program: Program) -> bool:
    """Whether the weight of a matrix product stands on its left."""
    return linear_of(site, nodes_of(site, program)).left


def takes_blocks(site: Site, program: Program, bits: int) -> bool:
    """Whether the weight of a matrix product may lie in blocks of that width for a fused kernel.

    trap: ONNX Runtime 1.32 multiplies by another matrix where 2-bit codes of several outputs share a byte and
    their number is no multiple of four: with optimizations on, and without a word.
    """
    product = linear_of(site, nodes_of(site, program))
    array = constant_array(product.weight)
    whole = bits != 2 or (array is not None and array.shape[product.channel_axis] % 4 == 0)
    return whole and not product.left


def stored_block(site: Site, program: Program, block: int) -> int | None:
    """The block nearest to ``block`` that divides the reduction, so that blocks need no padding.

    Smaller ones of at least 8 come first, then larger ones, at last the whole row. A table has one block a
    row, of an even number of elements: two codes share a byte.
    """
    nodes = nodes_of(site, program)
    index, axis = weight_place(site, nodes)
    array = constant_array(nodes[site.nodes[0]].inputs[index])
    depth = 0 if array is None else array.size // array.shape[axis]
    if site.kind == "embedding":
        return depth if depth % 2 == 0 else None
    sizes = (*range(block, 7, -1), *range(block + 1, depth + 1), depth)
    return next(b for b in sizes if depth % b == 0) if depth else None
