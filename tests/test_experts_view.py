"""What a user sees of experts: the page in headless Chromium where there is one, and the table of the terminal."""

from __future__ import annotations

import re
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from dlbc_runtime.experts import ExpertLayer, Experts, ExpertSpec
from dlbc_runtime.views.experts import notebook, page, short_names, view
from dlbc_runtime.views.experts_terminal import table
from dlbc_runtime.views.generation import generation_html
from dlbc_runtime.views.html import page as whole_page
from dlbc_runtime.views.numbers import percent, signed
from tests.browser import in_browser
from tests.experts_example import experts, explanation
from tests.generated import example

HOSTILE = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>\"' [red]$x$ \u2028"
HELP = """
const find = (selector) => document.querySelector('article.experts ' + selector);
const all = (selector) => [...document.querySelectorAll('article.experts ' + selector)];
const text = (selector) => find(selector).textContent;
const tip = () => [...document.getElementById('tip').children].map((one) => one.textContent);
const press = (element, key) => element.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true }));
const chosen = () => all('.word').findIndex((one) => one.classList.contains('chosen'));
const river = () => all('.river text').map((one) => one.textContent);
const point = (selector, x, y) => {
  const canvas = find(selector + ' canvas'), box = canvas.getBoundingClientRect();
  canvas.dispatchEvent(new MouseEvent('mousemove', { clientX: box.left + x, clientY: box.top + y, bubbles: true }));
  return tip();
};
const change = (element) => element.dispatchEvent(new Event('change', { bubbles: true }));
"""


def shown(found: Experts, script: str, folder: Path, **options: Any) -> Any:
    return in_browser(page(found), HELP + script, folder, **options)


def short(weight: float) -> str:
    return "<0.01" if weight < 0.005 else f"{weight:.2f}"


def test_the_maps_say_the_numbers_of_every_layer_and_expert(tmp_path: Path) -> None:
    """Cells are walked with the arrow keys: relevance, shared experts and the sum; and how often, beside it."""
    found = explanation(experts()).experts
    assert found is not None
    relevance, frequency = shown(found, """
        const walk = (selector) => {
          const grid = find(selector + ' .grid'), said = [];
          grid.focus(); press(grid, 'ArrowRight');
          for (let i = 0; i < 4; i++) press(grid, 'ArrowUp');
          for (let i = 0; i < 12; i++) press(grid, 'ArrowLeft');
          for (let row = 0; row < 4; row++) {
            for (let column = 0; column < 10; column++) { said.push(tip()); press(grid, 'ArrowRight'); }
            press(grid, 'ArrowDown');
            for (let i = 0; i < 12; i++) press(grid, 'ArrowLeft');
          }
          return said;
        };
        return [walk('.relevance'), walk('.frequency')];""", tmp_path)
    for row, layer in enumerate(found.layers):
        cells = relevance[10 * row:10 * row + 10]
        expected = [signed(total) for total in layer.totals]
        assert [value for value, _ in cells[:8]] == expected
        assert cells[3][1] == f"expert 3 of {layer.place}, {layer.counts[3]} of 8 tokens"
        assert cells[8] == [signed(float(layer.shared_total)), f"shared experts of {layer.place}"]
        assert cells[9] == [signed(float(layer.entering)), f"entered the experts of {layer.place}"]
        often = frequency[10 * row:10 * row + 9]
        for (value, where), load, count in zip(often[:8], layer.load, layer.counts, strict=True):
            assert abs(float(value.removesuffix(" %")) - 100 * load) <= 0.5 and where.endswith(f": {count} of 8 tokens")
        assert abs(float(often[8][0].removesuffix(" %")) - 100 * layer.normalised_entropy) <= 0.5


def test_a_layer_is_opened_and_a_token_followed(tmp_path: Path) -> None:
    found = explanation(experts()).experts
    assert found is not None
    layer, strongest = found.layers[2], int(np.abs(found.by_token()[0]).argmax())
    first, opened, cell, followed, ranked = shown(found, """
        const first = [text('.strip-name'), chosen()];
        const grid = find('.frequency .grid'); grid.focus(); press(grid, 'ArrowDown');
        for (const key of ['ArrowUp', 'ArrowUp', 'ArrowUp', 'ArrowUp', 'ArrowDown', 'ArrowDown', 'Enter'])
          press(grid, key);
        const opened = [text('.strip-name'), text('.strip .sum b'),
                        all('.strip .side div').map((one) => one.textContent)];
        const strip = find('.strip .grid'); strip.focus(); press(strip, 'ArrowDown');
        for (let i = 0; i < 9; i++) press(strip, 'ArrowUp');
        press(strip, 'ArrowDown'); press(strip, 'Enter');
        const cell = [tip(), chosen()];
        press(find('.words'), 'ArrowRight');
        const followed = [chosen(), river(), find('.river').getAttribute('aria-label')];
        find('input[name=ranked]').click();
        const at = find('.relevance .grid'); at.focus(); press(at, 'ArrowDown');
        for (let i = 0; i < 12; i++) press(at, 'ArrowLeft');
        for (let i = 0; i < 4; i++) press(at, 'ArrowUp');
        return [first, opened, cell, followed, tip()];""", tmp_path)
    assert first[0].startswith("model.layers.") and first[1] == strongest
    assert opened[:2] == ["model.layers.2.mlp: token by expert", signed(float(layer.entering))]
    assert opened[2] == ["The", "capital", "of", "France", "is", "the", "city", "of"]
    slot = layer.ids[0, 1].tolist().index(0) if 0 in layer.ids[0, 1] else None
    assert cell[0] == (["0", "expert 0 was not chosen for “capital”"] if slot is None else [
        signed(float(layer.relevance[0, 1, slot])),
        f"expert 0, “capital”, weight {short(float(layer.weights[0, 1, slot]))}"])
    assert cell[1] == 1 and followed[0] == 2
    for one in found.top(2, k=99):
        name = "shared" if one.expert is None else f"expert {one.expert}"
        assert name in followed[1] and signed(one.relevance) in followed[1]
        assert f"{name} {signed(one.relevance)}" in followed[2]
    best = found.layers[0].top(1)[0]
    assert ranked[0] == signed(best[1]) and ranked[1].startswith(f"expert {best[0]} of model.layers.0.mlp")


def test_rows_and_targets_are_chosen(tmp_path: Path) -> None:
    found = explanation(experts(rows=(2, 5), targets=2)).experts
    assert found is not None
    names, seeds, sums = shown(found, """
        const [row, seed] = [find('select[name=row]'), find('select[name=seed]')];
        const grid = find('.relevance .grid');
        const sum = () => { const box = find('.relevance canvas').getBoundingClientRect();
                            return point('.relevance', box.width - 3, 3)[0]; };
        const sums = [sum()];
        seed.value = 1; change(seed); sums.push(sum());
        row.value = 1; change(row); sums.push(sum());
        const names = (pick) => [...pick.options].map((one) => one.textContent);
        return [names(row), names(seed), sums];""", tmp_path)
    assert names == ["row 0", "row 1"] and seeds == ["Paris", "Paris"]
    assert sums == [signed(float(found.of_row(row, seed).layers[0].entering)) for row, seed in ((0, 0), (0, 1), (1, 0))]


def test_a_large_model_fits_the_page_in_light_and_dark(tmp_path: Path) -> None:
    """48 layers of 128 experts: nothing wider than the page, every second layer named, weak layers folded."""
    found = explanation(experts(48, 128, 8, (1, 30), seed=3)).experts
    assert found is not None
    script = """
        const before = river().length;
        const folded = river().some((one) => /^38 more/.test(one));
        find('input[name=all]').click();
        return [document.documentElement.scrollWidth <= innerWidth,
                find('.relevance canvas').getBoundingClientRect().width,
                all('.relevance .side div').filter((one) => one.textContent).length, folded, river().length > before,
                getComputedStyle(document.body).backgroundColor];"""
    light = shown(found, script, tmp_path)
    dark = shown(found, script, tmp_path, dark=True)
    assert light[:5] == dark[:5] == [True, light[1], 24, True, True] and light[1] < 880
    assert light[5] != dark[5]


def test_tokens_that_look_like_markup_stay_text(tmp_path: Path) -> None:
    layer = experts(1, rows=(1, 2)).layers[0]
    evil = ExpertLayer.of(ExpertSpec(HOSTILE, 8, True, 2), layer.ids, layer.weights, layer.relevance, layer.shared)
    words, name = shown(Experts((evil,), tokens=((HOSTILE, "b"),)),
                        "return [all('.word').map((one) => one.textContent), text('.strip-name')];", tmp_path)
    assert words[0] == HOSTILE and name == f"{HOSTILE}: token by expert"


def test_masked_tokens_are_left_out_and_irrelevant_ones_say_so(tmp_path: Path) -> None:
    layer = experts(1, rows=(1, 8), shared=False).layers[0]
    mask, relevance = np.array([[0, 0, 1, 1, 1, 1, 1, 1]], bool), layer.relevance.copy()
    relevance[0, 3] = 0
    found = Experts((ExpertLayer.of(layer.spec, layer.ids, layer.weights, relevance, visible=mask),))
    words, said, where, often = shown(found, """
        all('.word')[1].click();
        all('.word')[2].dispatchEvent(new MouseEvent('mouseover', { bubbles: true }));
        const where = tip();
        return [all('.word').map((one) => one.textContent), text('.river'), where, point('.frequency', 3, 3)];
        """, tmp_path)
    assert words == ["2", "3", "4", "5", "6", "7"] and said == "No relevance entered experts at “3”."
    assert where == [signed(float(found.layers[0].by_token[0, 4])), "entered experts at position 4"]
    assert often[0] == percent(float(found.layers[0].load[0])) and often[1].endswith(" of 6 tokens")


def test_numbers_that_are_none_break_nothing(tmp_path: Path) -> None:
    layer = experts(1, rows=(1, 8), shared=False).layers[0]
    weights, relevance = layer.weights.copy(), layer.relevance.copy()
    weights[0, 0], relevance[0, 1, 0], relevance[0, 2, 1] = np.nan, np.nan, np.inf
    found = Experts((ExpertLayer.of(layer.spec, layer.ids, weights, relevance),))
    texts = shown(found, """
        const said = [];
        for (const word of all('.word')) { word.click(); said.push(text('.river')); }
        return said;""", tmp_path)
    assert len(texts) == 8 and all("expert" in text for text in texts[3:])
    assert "0" in printed(found) and len(found.top(3, k=9)) == 2
    found.save(tmp_path / "experts.json")


def test_a_token_of_a_generation_turns_to_its_experts(tmp_path: Path) -> None:
    """A click on a generated token chooses its target in the experts; one on the prompt leaves them."""
    own = experts(2, rows=(1, 12), targets=6)
    found = replace(example(), experts=own)
    picked, sums = in_browser(generation_html(found), HELP + """
        const words = [...document.querySelectorAll('#text .word')], pick = find('select[name=seed]');
        const at = () => { const box = find('.relevance canvas').getBoundingClientRect();
                           return [pick.selectedIndex, point('.relevance', box.width - 3, 3)[0]]; };
        const found = [at()];
        words[9].click(); found.push(at());
        words[9].click(); words[2].click(); found.push(at());
        return [[...pick.options].map((one) => one.textContent), found];""", tmp_path)
    assert len(picked) == 6 and found.experts is not None
    first, fourth = (signed(float(own.layers[0].entering[row])) for row in (0, 3))
    assert sums == [[0, first], [3, fourth], [3, fourth]]


def test_the_experts_are_a_part_of_the_explanation_page(tmp_path: Path) -> None:
    found = explanation(experts(rows=(2, 8)))
    cards, tips = in_browser(whole_page([found]), HELP + """
        const own = point('.relevance', 3, 3);
        const path = find('.river path'), box = path.getBoundingClientRect();
        path.dispatchEvent(new MouseEvent('mouseover', { bubbles: true }));
        path.dispatchEvent(new MouseEvent('mousemove', { bubbles: true, clientX: box.left + 9, clientY: box.top + 9 }));
        return [document.querySelectorAll('article.card').length, [own, tip(), document.getElementById('tip').hidden]];
        """, tmp_path)
    assert cards == 3 and found.experts is not None
    assert tips[0][0] == signed(float(found.experts.of_row(0).layers[0].totals[0])) and not tips[2]
    plain = whole_page([explanation(experts(1))]).count("<script")
    assert plain == 2 and '<article class="card experts"' not in whole_page([without()])


def without() -> Any:
    return replace(explanation(experts(1)), experts=None)


def test_a_page_holds_as_many_rows_as_it_can_bear(monkeypatch: pytest.MonkeyPatch) -> None:
    found = experts(2, rows=(5, 4))
    monkeypatch.setattr("dlbc_runtime.views.experts.CHOICES", 2 * 2 * 4 * 2)  # two rows of two layers
    assert view(found).about.endswith("and shared ones. 3 more rows are not on this page.")
    assert view(experts(2, rows=(1, 4), targets=3)).about.endswith("shared ones. 1 more target is not on this page.")
    assert "sandbox=" in notebook(found) and found._repr_html_() == notebook(found)


@pytest.mark.parametrize(("places", "names"), [
    (["model.layers.0.mlp", "model.layers.1.mlp"], ["0", "1"]),
    (["m.0.attention", "m.0.mlp", "m.1.attention", "m.1.mlp"], ["0.attention", "0.mlp", "1.attention", "1.mlp"]),
    (["model.layers.3.mlp"], ["3.mlp"]),
    (["mlp", "mlp.inner"], ["mlp", "mlp.inner"]),
])
def test_layers_are_called_by_what_tells_them_apart(places: list[str], names: list[str]) -> None:
    assert short_names(places) == names


# --- the terminal -------------------------------------------------------------------------------------

def printed(found: Experts, *, width: int = 110, colours: bool = False, **options: int) -> str:
    console = Console(file=StringIO(), width=width, force_terminal=colours,
                      color_system="truecolor" if colours else None)
    console.print(table(found, **options))
    file = console.file
    assert isinstance(file, StringIO)
    return file.getvalue()


def test_the_table_has_a_line_for_each_layer() -> None:
    found = explanation(experts()).experts
    assert found is not None
    text = printed(found)
    assert "4 layers of 8 experts, 2 for each token, and shared ones; explains ' Paris'" in text
    for number, layer in enumerate(found.layers):
        line = next(one for one in text.splitlines() if one.startswith(f"{number} "))
        top = ", ".join(f"#{expert} {signed(total)}" for expert, total in layer.top(3))
        busy = int(layer.load.argmax())
        for part in (signed(float(layer.entering)), signed(float(layer.shared_total)), top,
                     f"#{busy} {percent(float(layer.load[busy]))}", f"{layer.normalised_entropy:.2f}"):
            assert part in line
    assert "▀" not in text  # a map says nothing without colours


def test_the_table_draws_maps_where_there_are_colours_and_room() -> None:
    found = experts(2, 128, 8)
    wide, narrow = printed(found, width=140, colours=True), printed(found, width=60, colours=True)
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in wide.splitlines()]
    assert [line.count("▀") for line in lines if "▀" in line] == [64, 64]  # two experts to a column
    assert "▀" not in narrow


def test_the_table_of_a_deep_model_keeps_its_strongest_layers() -> None:
    found = experts(30, rows=(2, 8))
    text = printed(found, row=1, limit=5)
    sizes = [abs(float(layer.entering)) for layer in found.of_row(1).layers]
    kept = sorted(np.argsort(sizes)[-5:].tolist())
    assert [int(line.split()[0]) for line in text.splitlines()[3:8]] == kept
    assert "… 25 more layers, with less relevance" in text


def test_experts_that_got_nothing_are_said_to_have_none(capsys: pytest.CaptureFixture[str]) -> None:
    ids = np.zeros((1, 2, 1), int)
    Experts((ExpertLayer.of(ExpertSpec("mlp", 4), ids, np.ones((1, 2, 1)), np.zeros((1, 2, 1))),)).show()
    assert "none has relevance" in capsys.readouterr().out
