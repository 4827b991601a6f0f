"""How explanations look: the colour scale, tokens, the terminal, the page and the picture."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
import struct
import sys
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from dlbc_runtime.errors import DlbcError
from dlbc_runtime.explained import Explained, Method
from dlbc_runtime.explanation import Explanation
from dlbc_runtime.ledger import Ledger, LedgerRow
from dlbc_runtime.views import colour, terminal
from dlbc_runtime.views.html import page, report
from dlbc_runtime.views.numbers import number, percent, seconds, signed
from dlbc_runtime.views.panels import Features, Picture, Text, panel
from dlbc_runtime.views.png import as_picture, encode, heat_map, resized, shades, stretched
from dlbc_runtime.views.tokens import Token, display, visible

SCALES = [colour.LIGHT, colour.DARK, colour.HEAT, colour.HEAT_DARK]
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"' [red]$x$"
strength = st.floats(-1, 1)


def text(relevance: list[float], tokens: list[str] | None = None, **fields: object) -> Explanation:
    one = Explanation(outputs={}, relevance={"input_ids": np.array([relevance], np.float32)},
                      inputs={"input_ids": np.arange(len(relevance))[None]}, rules="attnlrp",
                      target=(Explained(output="logits", index=1, position=len(relevance) - 1, label=" Paris",
                                        value=2.0, probability=0.62),), method=Method("tiny", "numpy"))
    one = replace(one, **fields)  # type: ignore[arg-type]
    return one if tokens is None else one.with_tokens([tokens])


def table(rows: int = 1, features: int = 3) -> Explanation:
    relevance = np.linspace(-1, 2, rows * features, dtype=np.float32).reshape(rows, features)
    return Explanation(outputs={}, relevance={"x": relevance}, inputs={"x": relevance * 10},
                       target=tuple(Explained(row=row, index=row) for row in range(rows)))


def picture(height: int = 12, width: int = 16) -> Explanation:
    relevance = np.zeros((1, 3, height, width), np.float32)
    relevance[0, :, 2, 3], relevance[0, :, 5, 6] = 1, -1
    return Explanation(outputs={}, relevance={"x": relevance}, inputs={"x": relevance}, target=(Explained(index=3),))


def printed(explanation: Explanation, **options: object) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(terminal.render(explanation, **options))  # type: ignore[arg-type]
    return console.export_text()


# The colour scale


@pytest.mark.parametrize("scale", SCALES)
@given(first=strength, second=strength)
def test_stronger_is_further_from_neutral(scale: colour.Scale, first: float, second: float) -> None:
    weak, strong = sorted((first, second), key=abs)
    away = [abs(colour.lightness_of(scale.colour(one)) - scale.neutral) for one in (weak, strong)]
    assert away[0] <= away[1] + 0.006  # a step of one in 255


@pytest.mark.parametrize("scale", SCALES)
@given(one=strength)
def test_both_sides_look_equally_strong(scale: colour.Scale, one: float) -> None:
    lightness = [colour.lightness_of(scale.colour(value)) for value in (one, -one)]
    assert lightness[0] == pytest.approx(lightness[1], abs=0.01)


@pytest.mark.parametrize("scale", [colour.LIGHT, colour.DARK])
@given(one=strength)
def test_text_on_the_scale_can_be_read(scale: colour.Scale, one: float) -> None:
    assert colour.contrast(scale.colour(one), scale.ink) >= 4.5


@pytest.mark.parametrize("scale", SCALES)
def test_the_scale_at_its_ends(scale: colour.Scale) -> None:
    red, _, blue = scale.colour(1.0)
    assert red > blue and scale.colour(7.0) == scale.colour(math.inf) == (red, _, blue)
    red, _, blue = scale.colour(-1.0)
    assert blue > red
    assert scale.colour(math.nan) == scale.colour(0.0) and len(set(scale.colour(0.0))) == 1
    assert re.fullmatch("#[0-9a-f]{6}", scale.hex(0.3))


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=9))
def test_strengths_are_finite_odd_and_bounded(values: list[float]) -> None:
    array = np.array(values, np.float32)
    full = colour.limit(array)
    result = colour.strengths(array, full)
    assert np.isfinite(result).all() and (np.abs(result) <= 1).all()
    np.testing.assert_array_equal(colour.strengths(-array, full), -result)


def test_a_quantile_keeps_one_pixel_from_taking_all_colour() -> None:
    values = np.ones(1000)
    values[0] = 1e6
    assert colour.limit(values) == 1e6 and colour.limit(values, 0.99) == 1
    assert colour.limit(np.array([0.0] * 999 + [2.0]), 0.9) == 2
    assert colour.limit(np.array([])) == colour.limit(np.array([math.nan])) == 0


# Tokens and numbers


@pytest.mark.parametrize(("tokens", "shown"), [
    (["The", "Ġcapital", "Ċ", "Ġ", "<|end|>"], ["The", " capital", "⏎", "␣", "<|end|>"]),
    (["ĠcafÃ©", "ĠðŁ"], [" café", " \ufffd"]),
    (["▁The", "▁cap", "ital", "<0x0A>"], [" The", " cap", "ital", "⏎"]),
    (["[CLS]", "play", "##ing", "##"], ["[CLS]", " play", "ing", " ##"]),
    (["low", "er</w>", "case</w>"], ["low", "er", " case"]),
    ([" plain", "text\n\n", ""], [" plain", "text⏎⏎", "∅"]),
])
def test_tokens_lose_their_markers(tokens: list[str], shown: list[str]) -> None:
    found = [token.spaced if token.text and not token.breaks else visible(token) for token in display(tokens)]
    assert found == shown


@given(st.lists(st.text(max_size=8), max_size=6))
def test_every_token_can_be_shown(tokens: list[str]) -> None:
    assert len(display(tokens)) == len(tokens)
    assert all(visible(token) for token in display(tokens))


def test_numbers() -> None:
    assert [number(one) for one in (0, 0.031249, -4.1e-7, 12345, 1e9, math.inf)] == [
        "0", "0.0312", "−4.1e−7", "12345", "1e9", "∞"]
    assert (signed(0.5), signed(-0.5), signed(0), signed(math.nan)) == ("+0.5", "−0.5", "0", "not a number")
    assert [percent(one) for one in (0, 0.0001, 0.034, 0.62, 0.997, 0.9999, 1)] == [
        "0 %", "<0.1 %", "3.4 %", "62 %", "99.7 %", ">99.9 %", "100 %"]
    assert [seconds(one) for one in (2.5, 0.0123, 4e-6)] == ["2.5 s", "12.3 ms", "4 µs"]


# What is shown as what


def shown(value: npt.NDArray[np.generic], **fields: object) -> object:
    one = Explanation(outputs={}, relevance={"x": np.ones(value.shape, np.float32)}, inputs={"x": value},
                      target=(Explained(),))
    return panel(replace(one, **fields), "x", 0, 0)  # type: ignore[arg-type]


def test_each_input_is_shown_as_what_it_is() -> None:
    assert isinstance(shown(np.zeros((1, 5), np.int64)), Text)
    assert isinstance(shown(np.zeros((1, 5), np.int64), features={"x": tuple("abcde")}), Features)
    assert isinstance(shown(np.zeros((1, 5))), Features)
    assert isinstance(shown(np.zeros((1, 3, 8, 8))), Picture)
    assert isinstance(shown(np.zeros((1, 8, 9, 3))), Picture)
    assert isinstance(shown(np.zeros((1, 8, 8)), images=(np.zeros((8, 8, 3), np.uint8),)), Picture)
    embedded = shown(np.zeros((1, 2, 7)), tokens=(("a", "b"),))
    assert isinstance(embedded, Text) and embedded.relevance.tolist() == [7, 7]
    steps = shown(np.zeros((1, 4, 7)))
    assert isinstance(steps, Features) and steps.names == ("x[0]", "x[1]", "x[2]", "x[3]") and steps.values is None
    number_only = shown(np.zeros(1))
    assert isinstance(number_only, Features) and number_only.names == ("x",)


def test_masked_tokens_are_not_shown_unless_they_have_relevance() -> None:
    one = text([1, 0, 0.5, 0], ["a", "b", "[PAD]", "[PAD]"])
    one = replace(one, inputs={**one.inputs, "attention_mask": np.array([[1, 1, 0, 0]])})
    found = panel(one, "input_ids", 0, 0)
    assert isinstance(found, Text) and found.shown == (0, 1, 2)
    assert "(1 masked not shown)" in printed(one)
    assert "1 masked token is not shown" in page([one])


# The terminal


def test_text_on_the_terminal() -> None:
    out = printed(text([0.5, -0.25, 0.0], ["The", "Ġcapital", "Ġis"]))
    assert "explains: ' Paris' (p=0.62) at position 2, rules attnlrp" in out
    assert "The capital is" in out and "−0.5 against" in out and "sum +0.25" in out
    bars = [line.split() for line in out.splitlines() if "│" in line]
    assert [(bar[0], bar[1], bar[-1]) for bar in bars] == [("The", "0", "+0.5"), ("capital", "1", "−0.25")]
    assert "…" not in out


def test_colours_on_the_terminal_follow_its_background(monkeypatch: pytest.MonkeyPatch) -> None:
    def colours(**options: object) -> str:
        console = Console(width=80, force_terminal=True, color_system="truecolor", file=io.StringIO())
        console.print(terminal.render(text([1.0], ["The"]), **options))  # type: ignore[arg-type]
        file = console.file
        assert isinstance(file, io.StringIO)
        return file.getvalue()

    def background(scale: colour.Scale) -> str:
        return "48;2;{};{};{}".format(*scale.colour(1.0))

    assert background(colour.LIGHT) in colours(theme="light") and background(colour.DARK) in colours(theme="dark")
    monkeypatch.setenv("COLORFGBG", "0;15")
    assert background(colour.LIGHT) in colours()
    monkeypatch.setenv("COLORFGBG", "15;0")
    assert background(colour.DARK) in colours()


def test_rows_beyond_the_limit_are_counted() -> None:
    out = printed(table(rows=11))
    assert out.count("explains:") == 8 and "row 7" in out and "… 3 more rows" in out
    assert "… 1 more row\n" in printed(table(rows=2), rows=1)


def test_tables_and_pictures_on_the_terminal() -> None:
    out = printed(table().with_features(["age", "height", "weight"]))
    assert [line.split()[0] for line in out.splitlines() if "│" in line] == ["weight", "age", "height"]
    assert "▀" * 16 in printed(picture()) and "peak at 2, 3" in printed(picture())
    assert "more, all weaker" in printed(table(features=60))


def test_markup_in_names_is_only_text() -> None:
    out = printed(text([1.0, 2.0], ["[red]a[/red]", "[/]"]))
    assert "[red]a[/red]" in out and "[/]" in out


@pytest.mark.parametrize("values", [[math.nan, 1.0], [math.inf, -math.inf], [0.0, 0.0], [math.nan, math.nan], []])
def test_what_is_not_finite_or_empty_is_shown_all_the_same(values: list[float], tmp_path: Path) -> None:
    lost = sum(not math.isfinite(value) for value in values)
    one = text(values, ["a", "b"][:len(values)])
    assert (f"{lost} not finite" in printed(one)) == (lost > 0)
    assert (f"{lost} not finite" in page([one])) == (lost > 0)
    bars = Explanation(outputs={}, relevance={"x": np.array([values])}, inputs={"x": np.array([values])},
                       target=(Explained(probability=math.nan, value=math.nan),))
    assert printed(bars) and page([bars])
    for explanation in (one, bars):
        assert explanation.save(tmp_path / "e.png").stat().st_size > 0


def test_a_picture_that_is_not_finite_is_shown_all_the_same(tmp_path: Path) -> None:
    values = np.full((1, 3, 4, 5), math.nan, np.float32)
    one = Explanation(outputs={}, relevance={"x": values}, inputs={"x": values}, target=(Explained(),))
    assert "20 not finite" in printed(one) and "20 not finite" in page([one])
    assert one.save(tmp_path / "e.png").exists()


def test_show_prints_and_a_notebook_displays(capsys: pytest.CaptureFixture[str],
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    text([1.0], ["The"]).show()
    assert "explains:" in capsys.readouterr().out
    displayed: list[object] = []

    class Shell:
        kernel = object()

    class IPython:
        get_ipython = staticmethod(Shell)
        display = staticmethod(displayed.append)

    monkeypatch.setitem(sys.modules, "IPython", IPython())  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "IPython.display", IPython())  # type: ignore[arg-type]
    one = text([1.0], ["The"])
    one.show()
    assert displayed == [one] and capsys.readouterr().out == ""


# The page


class Elements(HTMLParser):
    """Every element of a page with its attributes, and its text."""

    VOID = frozenset({"meta", "img", "br", "input", "path", "circle"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, kind: str) -> list[dict[str, str | None]]:
        return [attrs for _, attrs in self.found if kind in (attrs.get("class") or "").split()]


def test_the_page_needs_nothing_else_and_forbids_the_rest() -> None:
    source = page([text([1.0, -0.5], ["a", "b"]), picture(), table()])
    elements = Elements(source)
    assert elements.open == []
    assert not {tag for tag, _ in elements.found} & {"link", "iframe", "object", "base", "form"}
    for _, attrs in elements.found:
        assert not any(name.startswith("on") or name in ("href", "srcset") for name in attrs)
        assert "src" not in attrs or (attrs["src"] or "").startswith("data:image/png;base64,")
    assert not re.search(r"https?://|@import|url\(", source)
    script = source[source.index("<script>") + 8:source.index("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in source


def test_text_from_anywhere_stays_text() -> None:
    row = LedgerRow(HOSTILE, HOSTILE, 1.0, 0.5, {HOSTILE: 0.5}, HOSTILE)
    one = text([1.0, -0.5], [HOSTILE, "Ġ" + HOSTILE], rules=HOSTILE,
               method=Method(HOSTILE, HOSTILE, 2.0, {HOSTILE: 1.0}, {HOSTILE: HOSTILE}),
               ledger_source=lambda: Ledger.of([row], seed=1.0, inputs={HOSTILE: 0.5}))
    one = replace(one.with_labels([HOSTILE, HOSTILE]), relevance={HOSTILE: one.relevance["input_ids"],
                                                                 "other": one.relevance["input_ids"]})
    one.conservation()
    bars = table().with_features([HOSTILE] * 3)
    clean, hostile = Elements(page([one, bars], "t")), Elements(page([one, bars], HOSTILE))
    for elements in (clean, hostile):
        tags = [tag for tag, _ in elements.found]
        assert tags.count("script") == 1 and "img" not in tags and elements.open == []
        assert all("onerror" not in attrs for _, attrs in elements.found)
    assert hostile.text.count("</script><script>alert(1)") > 10
    framed = Elements(one._repr_html_())
    assert [tag for tag, _ in framed.found] == ["iframe"]
    assert framed.found[0][1]["srcdoc"] == page([one]) and framed.found[0][1]["sandbox"] == "allow-scripts"


def test_tokens_and_bars_are_linked_and_described() -> None:
    elements = Elements(page([text([0.5, -0.25, 0.0], ["The", "Ġcapital", "Ġis"])]))
    words, bars = elements.of("word"), elements.of("bar")
    assert [word["aria-label"] for word in words] == ["The: +0.5", "capital: −0.25", "is: 0"]
    assert [word["style"] for word in words] == ["--t:1.0", "--t:0.5", "--t:0.0"]
    assert [word["tabindex"] for word in words] == ["0", "-1", "-1"]
    assert "here" in (words[2]["class"] or "").split()
    assert [bar["data-k"] for bar in bars] == [words[0]["data-k"], words[1]["data-k"]]
    assert words[0]["data-d"] == "position 0, 67 % of all"
    assert "Paris" in elements.text and "62 %" in elements.text


def test_the_page_follows_light_and_dark() -> None:
    source = page([text([1.0], ["a"])])
    assert "prefers-color-scheme:dark" in source and ":root[data-theme=dark]" in source
    assert colour.LIGHT.hex(1) in source and colour.DARK.hex(1) in source


def test_long_lists_are_folded_and_cut() -> None:
    source = page([text(list(np.linspace(1, 2, 300)), [f"t{i}" for i in range(300)])])
    elements = Elements(source)
    assert len(elements.of("word")) == 300 and len(elements.of("bar")) == 120
    assert "108 more" in elements.text and "The 180 weakest are not listed." in elements.text
    assert "… 36 more rows are not on this page." in Elements(page([table(rows=100)])).text


def test_pictures_on_the_page_carry_their_values() -> None:
    elements = Elements(page([picture().with_image(np.zeros((24, 32, 3), np.uint8))]))
    frame = elements.of("bare")[0]
    values = np.frombuffer(base64.b64decode(frame["data-shades"] or ""), np.uint8).reshape(12, 16)
    assert (values[2, 3], values[5, 6], values[0, 0]) == (254, 0, 127)
    assert len([tag for tag, _ in elements.found if tag == "img"]) == 4 and elements.of("over")
    large = Elements(page([picture(600, 1200)])).of("bare")[0]
    assert (large["data-height"], large["data-width"]) == ("256", "512")


def test_conservation_is_on_the_page_once_computed() -> None:
    ledger = Ledger.of([LedgerRow("a", "linear", 1.0, 0.6, {"bias": 0.5, "stabiliser": -0.1})], seed=1.0,
                       inputs={"input_ids": 0.6})
    one = text([0.6], ["a"], ledger_source=lambda: ledger)
    assert "Where the relevance went" not in page([one])
    one.conservation()
    elements = Elements(page([one]))
    assert "adds up" in elements.text and "does not" not in elements.text
    assert [share["style"] for share in elements.of("absorbed") if "style" in share] == ["width:41.67%", "width:8.33%"]
    off = text([0.6], ["a"], ledger_source=lambda: replace(ledger, seed=2.0))
    off.conservation()
    assert "does not add up" in page([off])


def test_the_conservation_table_has_the_largest_absorbers_first_and_the_sum_last() -> None:
    rows = [LedgerRow("a", "linear", 1.0, 0.9, {"bias": 0.1}, "epsilon(1e-9)"), LedgerRow("b", "reshape", 0.9, 0.9),
            LedgerRow("c", "softmax", 0.9, 0.4, {"bias": -0.1, "rule": 0.5}, "taylor")]
    one = text([0.4], ["x"], ledger_source=lambda: Ledger.of(rows, seed=1.0, inputs={"input_ids": 0.4}))
    one.conservation()
    table = page([one]).partition("<table>")[2].partition("</table>")[0]
    assert re.findall(r"<th scope=\"col\">(\w+)</th>", table) == [
        "place", "operation", "rule", "in", "out", "rule", "bias", "residual"]
    lines = [re.findall(r"<td>(.*?)</td>", row) for row in table.partition("<tbody>")[2].split("<tr>")[1:]]
    assert [line[:3] for line in lines] == [["c", "softmax", "taylor"], ["a", "linear", "epsilon(1e-9)"],
                                            ["b", "reshape", ""], ["sum", "", ""]]
    assert lines[0][3:] == ["0.9", "0.4", "0.5", "−0.1", "1.0e-01"] and lines[1][-1] == ""
    assert lines[3][3:] == ["1", "0.4", "0.5", "0", "1.0e-01"]


def test_a_report_compares(tmp_path: Path) -> None:
    first, second = text([1.0], ["a"], rules="attnlrp"), text([-1.0], ["a"], rules="cp-lrp")
    path = report([first, second], "two presets", tmp_path / "compare.html")
    elements = Elements(path.read_text(encoding="utf-8"))
    assert len(elements.of("column")) == 2 and "two presets" in elements.text
    assert len({word["data-k"] for word in elements.of("word")}) == 1  # hovering one shows both
    assert Elements(page([])).of("column") == []


# Pictures


def decoded(png: bytes) -> tuple[int, int, bytes]:
    """Height, width and raw rows of a PNG, its checksums verified."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, dict.fromkeys([b"IHDR", b"IDAT"], b"")
    while at < len(png):
        (length,), tag = struct.unpack(">I", png[at:at + 4]), png[at + 4:at + 8]
        body = png[at + 8:at + 8 + length]
        assert struct.unpack(">I", png[at + 8 + length:at + 12 + length])[0] == zlib.crc32(tag + body)
        chunks[tag] = chunks.get(tag, b"") + body
        at += 12 + length
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    return height, width, zlib.decompress(chunks[b"IDAT"])


def test_png_is_png() -> None:
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    steps = bytes([3] * 6)  # from each pixel to the next
    assert decoded(encode(pixels)) == (2, 3, b"\1\0\1\2" + steps + b"\1\x09\x0a\x0b" + steps)
    image = pytest.importorskip("PIL.Image")
    np.testing.assert_array_equal(np.asarray(image.open(io.BytesIO(encode(pixels)))), pixels)
    heat = np.asarray(image.open(io.BytesIO(heat_map(np.array([[1.0, 0.0, -2.0]]), 2.0))).convert("RGBA"))
    assert [tuple(pixel) for pixel in heat[0].tolist()] == [
        (*colour.HEAT.colour(1), 129), (*colour.HEAT.colour(1), 0), (*colour.HEAT.colour(-1), 255)]


def test_shades_and_sizes() -> None:
    assert shades(np.array([-9.0, -1, 0, math.nan, 1]), 1.0).tolist() == [0, 0, 127, 127, 254]
    assert resized(np.array([[1.0, 3.0], [5.0, 7.0]]), 1, 1).tolist() == [[4.0]]
    assert resized(np.eye(2), 4, 4).tolist() == np.kron(np.eye(2), np.ones((2, 2))).tolist()
    assert resized(np.ones((5, 7, 3)), 2, 3) == pytest.approx(np.ones((2, 3, 3)))
    assert stretched(np.array([[[-1.0], [1.0]]])).tolist() == [[[0, 0, 0], [255, 255, 255]]]
    assert as_picture(np.zeros((2, 2))).dtype == np.uint8


@pytest.mark.parametrize("make", [lambda: text([0.5, -0.2], ["$a", "Ċ"]), lambda: table(rows=2, features=30), picture,
                                  lambda: picture().with_image(np.zeros((24, 32, 3), np.uint8)),
                                  lambda: Explanation(outputs={}, relevance={}, inputs={})])
def test_pictures_are_drawn(make: object, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert callable(make)
    height, width, _ = decoded(make().save(tmp_path / "e.png").read_bytes())
    assert height >= 100 and width == 1350
    assert "matplotlib.pyplot" not in sys.modules  # which would have state of its own


def test_without_matplotlib_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DlbcError, match=r"pip install 'dlbc\[plots\]'"):
        table().save(tmp_path / "e.png")


def test_a_blank_token_keeps_its_space() -> None:
    assert display([" ", "\n"]) == [Token("", space=True), Token("", breaks=1)]
