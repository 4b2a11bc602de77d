from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from lamina.backends.backend import Case, Target
from lamina.backends.load import MachineLoad
from lamina.backends.onnxruntime import OnnxRuntime
from lamina.errors import BackendError, PassError
from lamina.ir.cache import cache_folder
from lamina.ir.program import Program
from lamina.ir.rewriter import Rewriter
from lamina.ir.shapes import observed_shapes
from lamina.passes.pass_ import Option, Site, Transform
from lamina.planner import prices as prices_module
from lamina.planner.price_bench import PriceBench, border_unit, capture
from lamina.planner.price_models import Extractor, Unit, emit_option, replicate
from lamina.planner.price_signature import describe, structure
from lamina.planner.price_store import Price, PriceStore
from lamina.planner.prices import Prices

ONE = Target("ort", "cpu", 1)
BACKEND = OnnxRuntime()


class Fake(Transform):
    """Matrix products as dynamic or static int8, or broken on purpose."""

    name = "fake"

    def emit(
        self, site: Site, option: Option, rewriter: Rewriter, nodes: Mapping[str, ir.Node]
    ) -> list[ir.Value]:
        x, w = nodes[site.nodes[0]].inputs[:2]
        assert x is not None
        assert w is not None
        assert w.const_value is not None
        array = w.const_value.numpy()
        scales = (np.abs(array).max(axis=0) / 63).astype(np.float32)  # no sum of two products saturates
        codes = rewriter.constant(np.rint(array / scales).astype(np.int8), f"{w.name}.codes")
        scale = rewriter.constant(scales, f"{w.name}.scale")
        if option.name == "refused":
            return [rewriter.op("NoSuchOperator", [x, codes])]
        if option.name == "raises":
            raise PassError("this site cannot be written")
        if option.name == "dynamic":
            quantized = rewriter.op("DynamicQuantizeLinear", [x], outputs=3).producer()
            assert quantized is not None
            a, s, z = quantized.outputs
            product = rewriter.op("MatMulInteger", [a, codes, z])
            return [
                rewriter.op(
                    "Mul", [rewriter.op("Cast", [product], {"to": 1}), rewriter.op("Mul", [s, scale])]
                )
            ]
        step = rewriter.constant(np.array(option.parameters["scale"], np.float32), "s")
        zero = rewriter.constant(np.array(option.parameters["zero_point"], np.uint8), "z")
        zeros = rewriter.constant(np.zeros(len(scales), np.int8), "wz")

        def through(value: ir.Value) -> ir.Value:
            q = rewriter.op("QuantizeLinear", [value, step, zero])
            return rewriter.op("DequantizeLinear", [q, step, zero])

        weight = rewriter.op("DequantizeLinear", [codes, scale, zeros], {"axis": 1})
        return [through(rewriter.op("MatMul", [through(x), weight]))]


STATIC = Option("static", {"scale": 0.05, "zero_point": 120}, "int8", "int8")


def model_of(text: str, **weights: np.ndarray) -> Program:
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]> {text}')
    for value in list(model.graph.inputs):
        if value.name in weights:
            value.const_value = ir.tensor(weights[value.name], name=value.name)
            value.type = ir.TensorType(value.const_value.dtype)
            value.shape = ir.Shape(weights[value.name].shape)
            model.graph.inputs.remove(value)
            model.graph.register_initializer(value)
    return Program(model)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def chain() -> Program:
    """Three products, two of one shape, and a lookup whose indices must stay in range."""
    return model_of(
        """g (int64[N] ids, float table, float w0, float w1, float w2) => (float[N,32] y) {
        [gather] e = Gather(table, ids)
        [mm0] a = MatMul(e, w0)
        [mm1] b = MatMul(a, w1)
        [sum] c = Add(a, b)
        [mm2] y = MatMul(c, w2)
        }""",
        table=random(1000, 64),
        w0=random(64, 64, seed=1),
        w1=random(64, 64, seed=2),
        w2=random(64, 32, seed=3),
    )


def product(name: str, read: str, made: str) -> Site:
    return Site("fake", name, "matmul", (name,), (read,), (made,), (f"w{name[-1]}",))


SITES = [product("mm0", "e", "a"), product("mm1", "a", "b"), product("mm2", "c", "y")]
LOOKUP = Site("fake", "gather", "embedding", ("gather",), ("ids",), ("e",), ("table",))
BRANCH = Site("drop", "branch", "mlp", ("mm1", "sum"), ("a",), ("c",), ("w1",))


def case(rows: int, name: str = "c") -> Case:
    return Case(name, {"ids": np.random.default_rng(rows).integers(0, 1000, rows)})


@pytest.fixture
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests run beside each other; what is under test must not depend on it."""
    quiet = lambda *_: MachineLoad(2, 0.0, 0.0)  # noqa: E731
    monkeypatch.setattr("lamina.planner.prices.machine_load", quiet)
    monkeypatch.setattr("lamina.planner.price_bench.machine_load", quiet)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, calm: None) -> list[str]:
    """Signatures measured; measuring itself is replaced, it has its own tests."""
    seen: list[str] = []

    def measure(self: PriceBench, signature: str, unit: Unit, feeds: Mapping[str, np.ndarray]) -> Price:
        BACKEND.compile(unit.model, ONE).run(feeds)
        seen.append(signature)
        return Price(signature, float(len(seen)), 0.0, 1, "2026-01-01T00:00:00+00:00", True)

    monkeypatch.setattr(PriceBench, "measure", measure)
    return seen


# -- units ------------------------------------------------------------------------------------------


def unit_of(program: Program, site: Site, feeds: Mapping[str, np.ndarray]) -> Unit:
    return Extractor(program).extract(site, observed_shapes(program, feeds))


def test_a_unit_computes_what_its_site_computes() -> None:
    program, feeds = chain(), case(5).feeds
    unit = unit_of(program, BRANCH, feeds)
    captured = capture(program, ["a", "c"], feeds)
    got = BACKEND.compile(unit.model, ONE).run(unit.feeds(captured))
    np.testing.assert_allclose(got["c"], captured["c"], rtol=1e-4, atol=1e-4)
    assert [tuple(v.shape or ()) for v in unit.model.graph.inputs] == [(5, 64)]
    assert unit.weight_bytes == 64 * 64 * 4


def test_a_unit_reads_constants_nodes_and_values_of_its_subgraphs() -> None:
    program = model_of(
        """g (float[4] x, bool flag) => (float[4] y) {
        [k] k = Constant<value = float[4] {1.0, 2.0, 3.0, 4.0}>()
        [d] d = Add(x, x)
        [if] y = If(flag) <
            then_branch = t () => (float[4] u) { u = Mul(d, k) },
            else_branch = f () => (float[4] v) { v = Sub(d, x) } >
        }"""
    )
    feeds = {"x": random(4), "flag": np.array(True)}
    site = Site("fake", "if", "if", ("if",), ("flag", "d", "x"), ("y",))
    unit = unit_of(program, site, feeds)
    captured = capture(program, list(unit.sources.values()), feeds)
    model, aliases = replicate(unit, 3)
    arrays = unit.feeds(captured)
    got = BACKEND.compile(model, ONE).run({**arrays, **{a: arrays[n] for a, n in aliases.items()}})
    assert len(got) == 3
    for value in got.values():
        np.testing.assert_allclose(value, 2 * feeds["x"] * np.array([1, 2, 3, 4]), rtol=1e-6)


def test_static_options_lose_their_border_conversions() -> None:
    program, feeds = chain(), case(5).feeds
    unit = unit_of(program, SITES[0], feeds)
    emit_option(unit, SITES[0], Fake(), STATIC)
    assert [v.dtype for v in unit.model.graph.inputs] == [ir.DataType.UINT8]
    assert [v.dtype for v in unit.model.graph.outputs] == [ir.DataType.UINT8]
    assert [n.op_type for n in unit.model.graph] == [
        "DequantizeLinear",
        "DequantizeLinear",
        "MatMul",
        "QuantizeLinear",
    ]
    assert "w0" not in unit.model.graph.initializers, "the float weight left with the float node"
    assert BACKEND.audit(unit.model, ONE).counts == {"QLinearMatMul": 1}
    captured = capture(program, ["e", "a"], feeds)
    fed = unit.feeds(captured)
    (codes,) = fed.values()
    expected = np.clip(np.rint(captured["e"] / np.float32(0.05)) + 120, 0, 255)
    np.testing.assert_array_equal(codes, expected)
    (got,) = BACKEND.compile(unit.model, ONE).run(fed).values()
    restored = (got.astype(np.float32) - 120) * 0.05
    inside = np.abs(captured["a"]) < 5
    np.testing.assert_allclose(restored[inside], captured["a"][inside], atol=1.0)


def test_an_option_with_one_integer_border_keeps_the_other() -> None:
    unit = unit_of(chain(), SITES[0], case(5).feeds)
    emit_option(unit, SITES[0], Fake(), Option("static", STATIC.parameters, "int8", "float"))
    assert [v.dtype for v in unit.model.graph.inputs] == [ir.DataType.UINT8]
    assert unit.model.graph[-1].op_type == "DequantizeLinear"


def test_replicas_are_not_merged_by_the_runtime() -> None:
    unit = unit_of(chain(), SITES[0], case(5).feeds)
    emit_option(unit, SITES[0], Fake(), Option("dynamic"))
    model, aliases = replicate(unit, 4)
    assert len(aliases) == 3
    assert BACKEND.audit(model, ONE).counts == {"DynamicQuantizeMatMul": 4}


def test_signatures_know_shapes_and_not_values() -> None:
    program = chain()
    seen = observed_shapes(program, case(5).feeds)
    first, second, third = (describe(Extractor(program).extract(s, seen).model.graph) for s in SITES)
    assert first == second == "%2:float[5,64] = MatMul(%0:float[5,64], %1:const float[64,64]); -> %2"
    assert third != first
    assert describe(unit_of(program, SITES[0], case(6).feeds).model.graph) != first


def test_structure_forgets_numbers_and_keeps_sizes() -> None:
    a = {"scale": 0.1, "zero_point": 3, "block": 32, "inputs": [{"scale": 1.0, "zero_point": 9}], "sym": True}
    b = {"scale": 0.7, "zero_point": 8, "block": 32, "inputs": [{"scale": 2.0, "zero_point": 1}], "sym": True}
    assert structure(a) == structure(b)
    assert structure({**a, "block": 64}) != structure(a)
    assert structure({**a, "zero_point": 0}) != structure(a), "a Relu may have gone into the quantizer"
    assert structure([0.1] * 9) == "list of 9"


def test_capture_gives_inputs_inner_values_and_outputs() -> None:
    program, feeds = chain(), case(3).feeds
    got = capture(program, ["ids", "e", "y"], feeds)
    np.testing.assert_array_equal(got["ids"], feeds["ids"])
    table = program.graph.initializers["table"].const_value
    assert table is not None
    np.testing.assert_array_equal(got["e"], table.numpy()[feeds["ids"]])
    assert got["y"].shape == (3, 32)
    assert len(program.graph.outputs) == 1, "the program was changed"


# -- the table --------------------------------------------------------------------------------------


def test_every_signature_is_measured_once_and_kept(tmp_path: Path, counted: list[str]) -> None:
    program, workload = chain(), (case(4, "small"), case(16, "large"))
    requests = [(site, Fake(), [Option("dynamic")]) for site in SITES]
    calls: list[tuple[int, int]] = []
    table = Prices(ONE, BACKEND, tmp_path).price(
        program, requests, workload, progress=lambda done, total: calls.append((done, total))
    )
    assert len(table) == 3 * 2 * 2
    assert len(counted) == 2 * 2 * 2, "mm0 and mm1 share their prices"
    assert table["fake", "mm0", "dynamic", "small"] == table["fake", "mm1", "dynamic", "small"]
    assert table["fake", "mm0", "float", "small"] != table["fake", "mm0", "float", "large"]
    assert calls[0] == (0, 8)
    assert calls[-1] == (8, 8)
    again = Prices(ONE, BACKEND, tmp_path).price(program, requests, workload)
    assert again == table
    assert len(counted) == 8, "nothing is measured twice on one device"


def test_other_threads_have_other_prices(tmp_path: Path, counted: list[str]) -> None:
    requests = [(SITES[0], Fake(), [])]
    Prices(ONE, BACKEND, tmp_path).price(chain(), requests, (case(4),))
    Prices(Target("ort", "cpu", 2), BACKEND, tmp_path).price(chain(), requests, (case(4),))
    assert len(counted) == 2
    assert len(list(tmp_path.glob("prices-*.json"))) == 2


def test_indices_stay_in_range(tmp_path: Path, counted: list[str]) -> None:
    table = Prices(ONE, BACKEND, tmp_path).price(chain(), [(LOOKUP, Fake(), [])], (case(4),))
    assert table["fake", "gather", "float", "c"] == 1.0


def test_drop_is_free_and_its_branch_one_unit(tmp_path: Path, counted: list[str]) -> None:
    class Drop(Fake):
        name = "drop"

    table = Prices(ONE, BACKEND, tmp_path).price(chain(), [(BRANCH, Drop(), [Option("drop")])], (case(4),))
    assert table == {("drop", "branch", "float", "c"): 1.0, ("drop", "branch", "drop", "c"): 0.0}
    assert "MatMul" in counted[0]
    assert "Add" in counted[0]


@pytest.mark.parametrize(
    ("name", "reason"), [("refused", "NoSuchOperator"), ("raises", "this site cannot be written")]
)
def test_an_option_that_cannot_run_costs_infinity(
    tmp_path: Path, counted: list[str], name: str, reason: str
) -> None:
    prices = Prices(ONE, BACKEND, tmp_path)
    table = prices.price(chain(), [(SITES[0], Fake(), [Option(name), Option("dynamic")])], (case(4),))
    assert table["fake", "mm0", name, "c"] == math.inf
    assert math.isfinite(table["fake", "mm0", "dynamic", "c"])
    assert reason in prices.failures["fake", "mm0", name, "c"]


def test_a_site_that_cannot_stand_alone_is_reported(tmp_path: Path, counted: list[str]) -> None:
    prices = Prices(ONE, BACKEND, tmp_path)
    lost = Site("fake", "lost", "matmul", ("nowhere",), ("x",), ("y",))
    table = prices.price(chain(), [(lost, Fake(), [Option("dynamic")])], (case(4),))
    assert table["fake", "lost", "float", "c"] == 0.0
    assert table["fake", "lost", "dynamic", "c"] == math.inf
    assert "'nowhere'" in prices.failures["fake", "lost", "dynamic", "c"]


def test_other_backends_are_refused() -> None:
    with pytest.raises(BackendError, match="priced on ONNX Runtime only"):
        Prices(Target("tvm", "llvm"), BACKEND)


def test_a_price_taken_on_a_busy_machine_is_taken_again_on_a_quiet_one(
    tmp_path: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [(SITES[0], Fake(), [])]
    prices = Prices(ONE, BACKEND, tmp_path)
    prices.price(chain(), requests, (case(4),))
    prices.store.put(Price(counted[0], 99.0, 0.0, 1, "2026-01-01T00:00:00+00:00", quiet=False))
    monkeypatch.setattr(prices_module, "machine_load", lambda: MachineLoad(2, 9.0, 0.9))
    assert prices.price(chain(), requests, (case(4),))["fake", "mm0", "float", "c"] == 99.0
    monkeypatch.setattr(prices_module, "machine_load", lambda: MachineLoad(2, 0.0, 0.0))
    assert prices.price(chain(), requests, (case(4),))["fake", "mm0", "float", "c"] == 2.0


# -- on disk ----------------------------------------------------------------------------------------


def price_of(signature: str, seconds: float = 1.0) -> Price:
    return Price(signature, seconds, 0.1, 4, "2026-01-01T00:00:00+00:00", True)


def test_the_file_is_readable_and_survives_corruption(tmp_path: Path) -> None:
    store = PriceStore({"device": "cpu"}, tmp_path)
    store.put(price_of("MatMul of 3x3", 0.25))
    store.save()
    raw = json.loads(store.path.read_text())
    assert raw["device"] == "cpu"
    (row,) = raw["prices"].values()
    assert (row["signature"], row["seconds"], row["date"][:4]) == ("MatMul of 3x3", 0.25, "2026")
    store.path.write_text(store.path.read_text()[:-40])
    broken = PriceStore({"device": "cpu"}, tmp_path)
    assert broken.get("MatMul of 3x3") is None
    broken.put(price_of("other"))
    broken.save()
    assert PriceStore({"device": "cpu"}, tmp_path).get("other") == price_of("other")
    assert [p.name for p in tmp_path.iterdir()] == [store.path.name], "no torn or temporary files"


def test_two_processes_keep_each_others_prices(tmp_path: Path) -> None:
    first, second = PriceStore({}, tmp_path), PriceStore({}, tmp_path)
    first.put(price_of("a"))
    second.put(price_of("b"))
    first.save()
    second.save()
    merged = PriceStore({}, tmp_path)
    assert merged.get("a")
    assert merged.get("b")


def test_a_folder_that_cannot_be_written_costs_only_the_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = PriceStore({}, tmp_path / "file")
    store.put(price_of("a"))
    store.save()
    assert store.get("a") == price_of("a")


def test_the_cache_folder_can_be_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


# -- real measurements ------------------------------------------------------------------------------


def test_real_prices_order_as_the_work_does(tmp_path: Path) -> None:
    program = model_of(
        """g (float[N,256] x, float w0, float w1) => (float[N,512] y) {
        [mm0] a = MatMul(x, w0)
        [mm1] y = MatMul(a, w1)
        }""",
        w0=random(256, 256),
        w1=random(256, 512, seed=1),
    )
    sites = [product("mm0", "x", "a"), product("mm1", "a", "y")]
    workload = tuple(Case(str(n), {"x": random(n, 256)}) for n in (8, 64))
    prices = Prices(ONE, BACKEND, tmp_path)
    table = prices.price(program, [(s, Fake(), [Option("dynamic"), STATIC]) for s in sites], workload)
    assert all(0 < seconds < 0.05 for seconds in table.values())
    assert table["fake", "mm1", "float", "64"] > 1.3 * table["fake", "mm0", "float", "64"]
    assert table["fake", "mm0", "float", "64"] > 3 * table["fake", "mm0", "float", "8"]
    assert not prices.failures


def test_the_price_does_not_depend_on_the_number_of_replicas() -> None:
    program = model_of(
        "g (float[64,128] x, float w0) => (float[64,128] y) { [mm0] y = MatMul(x, w0) }", w0=random(128, 128)
    )
    feeds = {"x": random(64, 128)}
    unit = unit_of(program, product("mm0", "x", "y"), feeds)
    with PriceBench(ONE, 0) as bench:
        many = bench.measure("many", unit, feeds)
        bench._limit = unit.weight_bytes
        one = bench.measure("one", unit, feeds)
    assert many.replicas > one.replicas == 1
    assert many.seconds == pytest.approx(one.seconds, rel=0.6)  # other tests may run beside this one


def test_borders_grow_with_the_tensor_and_are_kept(tmp_path: Path) -> None:
    prices = Prices(ONE, BACKEND, tmp_path)
    kinds = ("quantize", "dequantize")
    for kind in kinds:
        flat = [prices.border((n,), kind) for n in (100, 3000, 30_000)]  # type: ignore[arg-type]
        assert 0 < flat[0] < flat[1] < flat[2] < 1e-3
    assert prices.border((1, 16, 32, 32), "quantize") > 0
    kept = PriceStore(prices.store.identity, tmp_path)
    assert kept.get("border quantize of 32768 elements") is not None
    assert kept.get("border quantize of 32768 elements with layout") is not None


def test_border_units_convert() -> None:
    unit, feeds = border_unit(512, "quantize", False)
    assert BACKEND.compile(unit.model, ONE).run(feeds)["y"].dtype == np.uint8
    unit, feeds = border_unit(512, "dequantize", True)
    assert BACKEND.compile(unit.model, ONE).run(feeds)["y"].shape == (1, 4, 16, 8)
