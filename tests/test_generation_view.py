"""The page of an explained generation, in headless Chromium where there is one."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlbc_runtime.generation import GenerationExplanation
from dlbc_runtime.views.generation import generation_html, generation_notebook
from dlbc_runtime.views.numbers import percent, signed
from dlbc_runtime.views.page import embedded
from tests.browser import in_browser
from tests.generated import PROMPT, example, translated

HOSTILE = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>\"' [red]$x$ \u2028"
HELP = """
const words = () => [...document.querySelectorAll('.generation .word')];
const lit = () => Object.fromEntries(words().map((one, i) => [i, one.getAttribute('aria-label')])
                                     .filter(([, label]) => label.includes(': ')));
const text = (id) => document.getElementById(id).textContent;
const bars = (id) => [...document.querySelectorAll('#' + id + ' .bar')].map((bar) => bar.textContent);
const press = (element, key) => element.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true }));
const hover = (element) => element.dispatchEvent(new MouseEvent('mouseover', { bubbles: true }));
const choose = (selector) => document.querySelector(selector).click();
const chosen = () => words().findIndex((one) => one.classList.contains('chosen'));
"""


def shown(found: GenerationExplanation, script: str, folder: Path, **options: Any) -> Any:
    return in_browser(generation_html(found), HELP + script, folder, **options)


def numbers_of(lit: dict[str, str]) -> dict[int, str]:
    return {int(place): label.rpartition(": ")[2] for place, label in lit.items()}


def expected(relevance: np.ndarray) -> dict[int, str]:
    return {place: signed(float(one)) for place, one in enumerate(relevance) if one}


def test_a_generated_token_lights_its_sources_and_a_source_what_it_led_to(tmp_path: Path) -> None:
    found = example()
    prompt = len(PROMPT)
    first, hovered, source, influence, kept, later = shown(found, f"""
        const first = lit();
        hover(words()[{prompt + 3}]); const hovered = lit();
        hover(words()[2]); const source = lit();
        choose('input[value=to]'); hover(words()[{prompt}]); const influence = lit(); choose('input[value=from]');
        words()[{prompt + 5}].click(); hover(words()[1]); const kept = lit();
        words()[{prompt + 5}].click(); hover(words()[{prompt + 1}]);
        return [first, hovered, source, influence, kept, lit()];""", tmp_path)
    assert numbers_of(first) == expected(found.relevance[0])
    assert numbers_of(hovered) == expected(found.relevance[3])
    assert numbers_of(source) == {prompt + row: one for row, one in expected(found.relevance[:, 2]).items()}
    assert numbers_of(influence) == {prompt + row: one for row, one in expected(found.relevance[:, prompt]).items()}
    assert numbers_of(kept) == expected(found.relevance[5])  # what is kept stays while the pointer reads
    assert numbers_of(later) == expected(found.relevance[1])


def test_the_keyboard_does_all_of_it(tmp_path: Path) -> None:
    found = example()
    walked, last, kept, free, cell, column = shown(found, """
        const box = document.getElementById('text'), at = () => document.activeElement;
        words()[0].focus(); press(at(), 'ArrowRight'); press(at(), 'ArrowRight'); const walked = [chosen(), lit()];
        press(at(), 'End'); const last = chosen();
        press(at(), 'Enter'); const kept = at().getAttribute('aria-selected'); press(at(), 'Home');
        const stays = chosen(); press(at(), 'Escape'); const free = [stays, chosen()];
        const matrix = document.querySelector('.matrix'); matrix.focus();
        for (const key of ['ArrowDown', 'ArrowDown', 'ArrowRight']) press(matrix, key);
        const cell = [text('tip'), chosen()]; press(matrix, 'Enter'); matrix.blur();
        return [walked, last, kept, free, cell, chosen()];""", tmp_path)
    assert walked[0] == 2 and numbers_of(walked[1]) == {6 + r: v for r, v in expected(found.relevance[:, 2]).items()}
    assert last == 11 and kept == "true" and free == [11, 0]
    # The first arrow goes to the first cell, the next ones move: row 1, column 1.
    assert cell == [signed(float(found.relevance[1, 1])) + "“The” for “,”", 7] and column == 7


def test_words_sinks_and_layers(tmp_path: Path) -> None:
    found = example()
    words, apart, said, layer, named = shown(found, """
        choose('input[value=words]'); hover(words()[8]);
        const merged = [words().map((one) => one.textContent), lit(), text('chance')];
        choose('input[name=sink]'); const apart = lit(), said = text('apart');
        choose('input[value=tokens]');
        const slider = document.querySelector('input[name=layer]');
        slider.value = 2; slider.dispatchEvent(new Event('input', { bubbles: true })); hover(words()[9]);
        return [merged, apart, said, lit(), slider.getAttribute('aria-valuetext')];""", tmp_path)
    merged = found.words()
    assert words[0] == [token.strip() for token in merged.tokens]
    row = list(merged.explained).index(8 - merged.prompt_length)
    wanted = expected(merged.relevance[row])
    wanted.pop(8, None)  # the word itself
    assert numbers_of(words[1]) == wanted
    assert percent(float(merged.probabilities[8 - merged.prompt_length])) in words[2]
    assert numbers_of(apart) == {place: one for place, one in wanted.items() if place}
    assert said == f"first token <s>, shown apart: {signed(float(merged.relevance[row, 0]))}"
    assert named == "model.layers.1"
    of_layer = found.layers["model.layers.1"][3].copy()
    of_layer[0] = 0
    assert set(numbers_of(layer)) == set(np.flatnonzero(of_layer))
    for place, label in numbers_of(layer).items():  # a byte for each number
        assert float(label.replace("−", "-")) == pytest.approx(of_layer[place], abs=float(np.abs(of_layer).max()) / 100)


def test_sinks_that_were_apart_can_be_put_back(tmp_path: Path) -> None:
    whole, found = example(), example(sinks=True)
    before, after = shown(found, "const before = lit(); choose('input[name=sink]'); return [before, lit()];", tmp_path)
    assert numbers_of(before) == expected(found.relevance[0])
    assert numbers_of(after) == expected(whole.relevance[0])


def test_why_this_and_not_that(tmp_path: Path) -> None:
    found = example(contrast=True)
    rows = [tuple((7 if k == 0 else 50 + k, " London" if k == 0 else f" t{k}", 0.3 / (k + 1)) for k in range(3))] * 6
    found = replace(found, alternatives=tuple(rows))
    name, others, tags = shown(found, """return [text('name'), bars('alternatives'),
        [...document.querySelectorAll('#alternatives .tag')].map((one) => one.textContent)];""", tmp_path)
    assert name == "Paris rather than London"
    assert others == ["Parischosen90 %", "Londonnot this30 %", "t115 %", "t210 %"] and tags == ["chosen", "not this"]


def test_light_dark_and_the_matrix(tmp_path: Path) -> None:
    found = example()
    seen = {}
    for dark in (False, True):
        seen[dark] = shown(found, """
            const canvas = document.querySelector('canvas');
            const pixel = (row, column) => [...canvas.getContext('2d').getImageData(
                (column + 0.5) * canvas.width / 6, (row + 0.5) * canvas.height / 12, 1, 1).data].slice(0, 3);
            const colours = () => [getComputedStyle(document.body).backgroundColor, pixel(0, 1), pixel(11, 0)];
            const before = colours(); choose('#theme');
            return [before, colours(), canvas.clientWidth / canvas.clientHeight];""", tmp_path, dark=dark)
    assert seen[False][0] == seen[True][1] and seen[False][1] == seen[True][0]
    assert seen[False][0] != seen[True][0] and seen[False][2] == pytest.approx(0.5)
    red, _, blue = seen[False][0][1]
    assert (red > blue) == (found.relevance[1, 0] > 0)
    assert sum(seen[False][0][2]) > 700 > sum(seen[True][0][2])  # nothing above the diagonal: the page's colour


def test_what_is_not_explained_is_said(tmp_path: Path) -> None:
    found = example(explained=(1, 4), finished=False)
    where, columns, notice = shown(found, """words()[9].click();
        return [text('where'), document.querySelectorAll('.heads > div').length,
                document.querySelector('.notice').textContent];""", tmp_path)
    assert where.endswith("not explained") and columns == 2
    assert notice == "Interrupted: 2 of 6 new tokens are explained."


def test_an_encoders_tokens_are_sources_too(tmp_path: Path) -> None:
    found = translated()
    assert found.source_relevance is not None
    lit, source, switch = shown(found, """hover(words()[6]); return [lit(),
        [...document.querySelectorAll('#source .word')].map((one) => one.textContent),
        document.querySelector('input[name=sink]')];""", tmp_path)
    assert numbers_of(lit) == expected(np.concatenate([found.source_relevance[1], found.relevance[1]]))
    assert source == ["the", "house", ".", "</s>"] and switch is None


def test_a_narrow_page_does_not_scroll_sideways(tmp_path: Path) -> None:
    wide, view = shown(example(), "return [document.documentElement.scrollWidth, innerWidth];", tmp_path,
                       size=(500, 900))
    assert wide <= view


def test_text_stays_text(tmp_path: Path) -> None:
    found = example(contrast=True)
    tokens = (HOSTILE, *found.tokens[1:-1], HOSTILE)
    hostile = replace(found, tokens=tokens, against_tokens=(HOSTILE,) * 6,
                      alternatives=(((1, HOSTILE, 0.5),),) * 6, layers={HOSTILE: found.relevance},
                      rules=HOSTILE, method=replace(found.method, model=HOSTILE))
    page = generation_html(hostile)
    assert page.count("<script") == 2 and "<img" not in page and "onerror=alert(2)>" not in page
    kinds, first = in_browser(page, HELP + """words()[11].click(); choose('input[value=words]');
        const kinds = [...document.querySelectorAll('main *')].map((one) => one.tagName);
        return [kinds, words()[0].textContent];""", tmp_path)
    assert "SCRIPT" not in kinds and "IMG" not in kinds and first.startswith("</script><script>alert(1)")
    assert page in generation_notebook(hostile) or "srcdoc=" in generation_notebook(hostile)


def test_the_page_needs_nothing_else_and_is_small() -> None:
    rng = np.random.default_rng(0)
    length, new = 39, 20
    relevance = np.tril(rng.normal(size=(new, length)), length - new - 1).astype(np.float32)
    found = GenerationExplanation(
        ids=np.arange(length), prompt_length=length - new, tokens=tuple(f" token{i}" for i in range(length)),
        text="", probabilities=rng.random(new).astype(np.float32), explained=np.arange(new), relevance=relevance,
        values=rng.normal(size=new).astype(np.float32),
        alternatives=tuple(tuple((i, f" other{i}", 0.1) for i in range(5)) for _ in range(new)))
    page = generation_html(found)
    assert len(page.encode()) < 48_000
    assert not re.search(r"https?:|@import|url\(|<link|src=", page)
    layered = replace(found, layers={f"model.layers.{i}": relevance for i in range(30)})
    assert len(generation_html(layered).encode()) < 84_000


def test_numbers_that_are_none_and_no_tokens_at_all(tmp_path: Path) -> None:
    found = example()
    relevance = found.relevance.copy()
    relevance[0, 1] = np.nan
    broken = replace(found, relevance=relevance, probabilities=np.full(6, np.nan, np.float32),
                     values=np.full(6, np.inf, np.float32))
    notice, label = shown(broken, "return [document.querySelector('.notice').textContent, lit()[1]];", tmp_path)
    assert notice == "Numbers that are not finite: 1." and label == "The: not a number"
    nothing = replace(found, explained=np.array([], np.int64), relevance=np.zeros((0, 12), np.float32),
                      values=np.zeros(0, np.float32), layers={})
    assert shown(nothing, "return [chosen(), document.getElementById('map').hidden];", tmp_path) == [0, True]


def test_words_are_shown_as_they_are(tmp_path: Path) -> None:
    found = example().words()
    lit, switch = shown(found, "return [lit(), document.querySelector('input[name=level]')];", tmp_path)
    assert numbers_of(lit) == expected(found.relevance[0]) and switch is None


def test_embedded_data_cannot_leave_its_element() -> None:
    text = embedded([HOSTILE, {"a": None}])
    assert not set("<>&\u2028\u2029") & set(text) and json.loads(text) == [HOSTILE, {"a": None}]
    with pytest.raises(ValueError):
        embedded(float("nan"))
