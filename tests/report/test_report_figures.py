from __future__ import annotations

import io
from pathlib import Path
from xml.etree import ElementTree

import pytest
from sample_analysis import HOSTILE, sample

from lamina.errors import OutputError
from lamina.report import raster
from lamina.report.charts import MOST_CELLS_A_SIDE, Scale, color_of, heat_map
from lamina.report.drawing import MISSING, Drawing, Label, Rect, svg
from lamina.report.figures import figures, refuse_to_overwrite, write_figures

SVG = "{http://www.w3.org/2000/svg}"


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def measured() -> dict:
    found = sample()
    found["damages"] = {"metric": "kl", "samples": 8}
    found["matrices"]["output-kl"] = {**found["matrices"]["quantization-error"]}
    depths = found["matrices"]["angular-distance"]["rows"]
    found["matrices"]["linear-cka"] = found["matrices"]["angular-distance"]
    values = [[0.1] * len(depths), [0.2, *([None] * (len(depths) - 1))]]
    found["matrices"]["skip-effect"] = {"rows": depths[:2], "columns": depths, "values": values}
    return found


@pytest.mark.parametrize("prefix", ["layers.", HOSTILE, "解析."])
def test_figures_are_valid_self_contained_xml(prefix: str) -> None:
    found = measured()
    found = {
        **found,
        **{k: v for k, v in sample(prefix=prefix).items() if k != "matrices"},
        "damages": found["damages"],
    }
    found["matrices"] = {**measured()["matrices"], **sample(prefix=prefix)["matrices"]}
    made = figures(found)
    assert set(made) == {"similarity", "cka", "skip-effect", "importance", "bits", "bits-damage"}
    for drawing in made.values():
        text = svg(drawing)
        root = ElementTree.fromstring(text)
        assert root.tag == f"{SVG}svg"
        assert {e.tag for e in root.iter()} <= {SVG + t for t in ("svg", "title", "rect", "line", "text")}
        assert not any(n.endswith("href") or n.startswith("on") for e in root.iter() for n in e.attrib)


def test_names_survive_escaping() -> None:
    drawing = Drawing("t", 10, 10, [Label(0, 0, "<b>&\"'"), Rect(0, 0, 1, 1, "#000000", "a<b & \x00")])
    root = ElementTree.fromstring(svg(drawing))
    assert root.find(f"{SVG}text").text == "<b>&\"'"
    assert root.findall(f"{SVG}rect")[1].find(f"{SVG}title").text == "a<b & \\x00"


def test_everything_lies_on_the_sheet() -> None:
    for drawing in figures(measured()).values():
        for item in drawing.items:
            if isinstance(item, Rect):
                assert item.x >= 0
                assert item.x + item.width <= drawing.width
                assert item.y >= 0
                assert item.y + item.height <= drawing.height


def test_a_heat_map_has_a_cell_a_value_and_grey_where_there_is_none() -> None:
    drawing = heat_map("t", (), ["a", "b"], ["x", "y", "z"], [[0, 1, None], [0.5, 1, 0]])
    cells = {i.tip: i.fill for i in drawing.items if isinstance(i, Rect) and i.tip}
    assert cells == {
        "a / x: 0": color_of(0),
        "a / y: 1": color_of(1),
        "a / z: no number": MISSING,
        "b / x: 0.5": color_of(0.5),
        "b / y: 1": color_of(1),
        "b / z: 0": color_of(0),
    }


def test_many_depths_are_thinned_evenly_and_it_is_said() -> None:
    names = [str(i) for i in range(500)]
    drawing = heat_map("t", (), names, names, [[0.0] * 500] * 500)
    rects = [i for i in drawing.items if isinstance(i, Rect)]
    assert MOST_CELLS_A_SIDE**2 <= len(rects) < MOST_CELLS_A_SIDE**2 + 60
    assert any(isinstance(i, Label) and i.text == "160 of 500 rows shown" for i in drawing.items)


def test_scales() -> None:
    line = Scale.of([2.0, 4.0])
    assert [line.share(v) for v in (1, 2, 3, 4, 9)] == [0, 0, 0.5, 1, 1]
    log = Scale.of([0.0, 1e-4, 1.0], log=True)
    assert [log.share(v) for v in (0.0, 1e-4, 1e-2, 1.0)] == pytest.approx([0, 0, 0.5, 1])
    for same in (
        Scale.of([3.0, 3.0]),
        Scale.of([], log=True),
        Scale.of([0.0], log=True),
        Scale.of([5.0], log=True),
    ):
        assert all(0 <= same.share(v) <= 1 for v in (0.0, 3.0, 5.0))


def test_colors_run_from_dark_to_light() -> None:
    light = [sum(int(color_of(s / 8)[i : i + 2], 16) for i in (1, 3, 5)) for s in range(9)]
    assert light == sorted(light)
    assert color_of(-1) == color_of(0)
    assert color_of(2) == color_of(1)


def test_files_are_written_and_not_overwritten(tmp_path: Path) -> None:
    written, _ = write_figures(sample(), tmp_path, write)
    assert {p.name for p in written if p.suffix == ".svg"} == {"similarity.svg", "importance.svg", "bits.svg"}
    assert all(p.stat().st_size for p in written)
    with pytest.raises(OutputError, match=r"already holds .*similarity\.svg") as stopped:
        refuse_to_overwrite(tmp_path)
    assert stopped.value.advice == "choose another directory, or --force to replace them"


def test_other_files_are_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    refuse_to_overwrite(tmp_path)


def test_png_is_two_pixels_a_point_and_holds_the_colors(tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image")
    drawing = Drawing("t", 40, 30, [Rect(10, 10, 10, 10, "#33658a"), Label(20, 28, "up", turned=True)])
    image = image_module.open(io.BytesIO(raster.png(drawing))).convert("RGB")
    assert image.size == (80, 60)
    assert image.getpixel((22, 22)) == (0x33, 0x65, 0x8A)
    assert image.getpixel((2, 2)) == (255, 255, 255)


def test_turned_text_runs_upwards_from_its_place() -> None:
    image_module = pytest.importorskip("PIL.Image")
    drawing = Drawing("t", 60, 60, [Label(30, 50, "IIII", 12, turned=True)])
    image = image_module.open(io.BytesIO(raster.png(drawing))).convert("L")
    left, top, right, bottom = image.point(lambda v: 255 if v < 128 else 0).getbbox()
    assert bottom <= 101
    assert bottom >= 90
    assert right <= 61
    assert bottom - top > right - left - 6


def test_without_pillow_there_is_svg_and_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    written, also_png = write_figures(sample(), tmp_path, write)
    assert not also_png
    assert {p.suffix for p in written} == {".svg"}
    with pytest.raises(OutputError, match=r"pip install 'lamina\[plot\]'"):
        raster.png(Drawing("t", 1, 1))


def test_a_drawing_too_large_for_an_image_is_refused() -> None:
    pytest.importorskip("PIL")
    with pytest.raises(OutputError, match="use the SVG file"):
        raster.png(Drawing("t", 10_000, 10_000))


def test_one_number_that_is_not_finite_does_not_spoil_the_bars() -> None:
    found = sample()
    found["branches"][0]["metrics"]["block-influence"] = float("nan")
    ElementTree.fromstring(svg(figures(found)["importance"]))
