# SPDX-License-Identifier: BSD-3-Clause
"""Looks at every page of the built site in a browser, on a telephone and on a desk, light and dark: no page is wider
than the screen, and axe-core finds nothing that people with disabilities cannot use.

python docs/axe.py [build/docs]    needs Chromium with its chromedriver, selenium and axe-playwright-python

Where there is no browser it says so and ends with 0; on GitHub, whose workflow installs one, that is an error.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SCREENS = {"telephone": (390, 844), "desk": (1280, 900)}
SCHEMES = ("light", "dark")
WIDER = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
OF_COLOURS = ["color-contrast", "link-in-text-block"]
RUN_AXE = """
const done = arguments[arguments.length - 1];
const options = {resultTypes: ["violations"], iframes: false};
if (arguments[0]) options.runOnly = {type: "rule", values: arguments[0]};
axe.run(document, options).then(
  (results) => done(results.violations.map((violation) => ({
    rule: violation.id, help: violation.help,
    places: violation.nodes.map((node) => node.target.join(" ") + ": " + node.html.slice(0, 160)),
  }))),
  (error) => done([{rule: "axe", help: String(error), places: []}]),
);
"""
SHOWN = 3  # places of a violation
PATIENCE = 300  # seconds for a page: those of the API are long


def axe_source() -> str:
    """axe-core, as a package from PyPI has it."""
    package = importlib.util.find_spec("axe_playwright_python")
    assert package is not None and package.origin is not None
    (path,) = Path(package.origin).parent.rglob("axe.min.js")
    return path.read_text(encoding="utf-8")


def start(browser: str, driver: str) -> Any:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    chrome.set_script_timeout(PATIENCE)
    return chrome


def set_screen(chrome: Any, screen: str, scheme: str) -> None:
    width, height = SCREENS[screen]
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": screen == "telephone"}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [
        {"name": "prefers-color-scheme", "value": scheme},
        {"name": "prefers-reduced-motion", "value": "reduce"},
    ]
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def look(chrome: Any, rules: list[str] | None) -> list[str]:
    """What is wrong with the page as it stands, by these rules or by all that axe has on."""
    wider = chrome.execute_script(WIDER)
    problems = [f"is {wider} pixels wider than the screen"] if wider > 0 else []
    for violation in chrome.execute_async_script(RUN_AXE, rules):
        places = "".join(f"\n    {place}" for place in violation["places"][:SHOWN])
        more = len(violation["places"]) - SHOWN
        places += f"\n    and {more} more" if more > 0 else ""
        problems.append(f"{violation['rule']}: {violation['help']}{places}")
    return problems


def problems_of(chrome: Any, page: Path, axe: str) -> list[str]:
    """On every screen in every scheme; all but colours are the same in each scheme."""
    chrome.get(page.as_uri())
    chrome.execute_script(axe)
    problems = []
    for screen in SCREENS:
        for scheme in SCHEMES:
            set_screen(chrome, screen, scheme)
            rules = None if scheme == SCHEMES[0] else OF_COLOURS
            problems += [f"{screen}, {scheme}: {problem}" for problem in look(chrome, rules)]
    return problems


def main() -> int:
    site = Path(sys.argv[1] if len(sys.argv) > 1 else "build/docs").resolve()
    pages = sorted(site.rglob("*.html"))
    if not pages:
        raise SystemExit(f"{site} holds no page; make docs builds them")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        print("no browser: axe not run (it needs Chromium and chromedriver)")
        return 1 if os.environ.get("GITHUB_ACTIONS") else 0
    axe, begin, count = axe_source(), time.monotonic(), 0
    chrome = start(browser, driver)
    try:
        for page in pages:
            problems = problems_of(chrome, page, axe)
            count += len(problems)
            print("".join(f"{page.relative_to(site)}, {problem}\n" for problem in problems), end="", flush=True)
    finally:
        chrome.quit()
    looks = len(SCREENS) * len(SCHEMES)
    print(f"{len(pages)} pages, {looks} looks at each, in {time.monotonic() - begin:.0f} s: {count or 'no'} problems")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
