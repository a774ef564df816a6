"""The page in a real browser: it renders, its slider and its zoom work, it fits a phone, it asks for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fewstep import report
from tests.browser import CHROMIUM, Browser
from tests.test_report import NASTY, fill, other

pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no {CHROMIUM} to show the page in")

SHOWN = "[...document.querySelectorAll('.film img')].filter((img) => img.offsetWidth > 0).map((img) => img.alt)"
RIGHT = 39


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parts = ("log", "evals", "table", "config", "origin", "images", "pairs")
    return report.write_report(fill(tmp_path_factory.mktemp("runs") / "run", *parts))


@pytest.fixture(scope="module")
def versus(tmp_path_factory: pytest.TempPathFactory, page: Path) -> Path:
    second = other(tmp_path_factory.mktemp("runs") / "second")
    return report.write_comparison([report.RunDir(page.parent), second], second.root / "versus.html")


def quiet(browser: Browser, page: Path) -> bool:
    """Nothing on the console, and no request but for the page and what it holds itself."""
    asked = [url for url in browser.requests if not url.startswith("data:")]
    return browser.errors == [] and set(asked) == {page.as_uri()}


def fresh(browser: Browser, page: Path, width: int = 1280, dark: bool = False) -> None:
    browser.errors.clear()
    browser.requests.clear()
    browser.open(page, width, 844, dark)


def test_it_renders_and_asks_for_nothing(browser: Browser, page: Path) -> None:
    fresh(browser, page)
    assert browser.run("document.querySelector('h1').innerText") == NASTY
    assert browser.run("[...document.images].every((img) => img.complete && img.naturalWidth > 0)")
    assert browser.run("document.querySelectorAll('.charts svg').length") == 9
    assert browser.run("document.scripts.length") == 1
    assert quiet(browser, page)


def test_the_watch_on_the_console_sees_mistakes(browser: Browser, page: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.html"
    wrong.write_text("<script>missing()</script><img src='http://localhost:1/x.png'>")
    fresh(browser, wrong)
    assert any("missing is not defined" in error for error in browser.errors) and not quiet(browser, wrong)
    # The policy of the page stops a script that slipped in.
    slipped = tmp_path / "slipped.html"
    slipped.write_text(page.read_text().replace("</main>", "<script>document.title = 'owned'</script></main>"))
    fresh(browser, slipped)
    assert browser.run("document.title") == NASTY and any("Content Security" in error for error in browser.errors)


def test_the_slider_moves(browser: Browser, page: Path) -> None:
    fresh(browser, page)
    assert browser.run(SHOWN) == ["samples at step 3,000"]
    slider = "const input = document.querySelector('.film input');"
    browser.run(f"{slider} input.value = 3; input.dispatchEvent(new Event('input')); input.focus()")
    third = browser.run(SHOWN)
    assert len(third) == 1 and browser.run("document.querySelector('output').innerText") in third[0]
    browser.press("ArrowRight", RIGHT)
    assert browser.run("document.querySelector('.film input').value") == "4"
    fourth = browser.run(SHOWN)
    assert len(fourth) == 1 and fourth != third and quiet(browser, page)


def test_a_pair_is_enlarged(browser: Browser, page: Path) -> None:
    fresh(browser, page)
    said = "document.querySelector('dialog p').innerText"
    widths = "[...document.querySelectorAll('dialog img')].map((img) => img.offsetWidth)"
    browser.run("document.querySelectorAll('.pair')[1].click()")
    assert browser.run("document.querySelector('dialog').open") and browser.run(said) == f"prompt 1 {NASTY}"
    small = browser.run("document.querySelector('.pair img').offsetWidth")
    assert len(browser.run(widths)) == 2 and min(browser.run(widths)) > 2 * small
    assert browser.run("getComputedStyle(document.querySelector('dialog img')).imageRendering") == "pixelated"
    browser.press("ArrowRight", RIGHT)
    assert browser.run(said) == f"prompt 2 {NASTY}"
    browser.press("Escape", 27)
    assert not browser.run("document.querySelector('dialog').open") and quiet(browser, page)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("which", ["page", "versus"])
def test_it_fits_a_phone(browser: Browser, which: str, dark: bool, request: pytest.FixtureRequest) -> None:
    shown: Path = request.getfixturevalue(which)
    fresh(browser, shown, 390, dark)
    assert browser.run("document.documentElement.scrollWidth") == 390
    assert (
        browser.run(
            "Math.min(...[...document.querySelectorAll('p, td, dd')].map(size))".replace(
                "size", "(e) => parseFloat(getComputedStyle(e).fontSize)"
            )
        )
        >= 13
    )
    ink, ground = (browser.run(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    assert (brightness(ink) > 200 and brightness(ground) < 40) == dark
    assert (brightness(ink) < 40 and brightness(ground) > 200) != dark
    assert quiet(browser, shown)


def brightness(colour: str) -> float:
    return sum(map(float, colour.removeprefix("rgb(").removesuffix(")").split(","))) / 3
