"""Pages in headless Chromium: they run under their own security policy, with one more script that the test gives."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ("--headless", "--disable-gpu", "--no-first-run", "--disable-extensions", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars")


def in_browser(page: str, script: str, folder: Path, *, dark: bool = False, size: tuple[int, int] = (1000, 1400)
               ) -> Any:
    """What `script`, the body of a function that runs when the page stands, returns as JSON. AssertionError when the
    page or the script fails, or the page's policy had to stop something. Skips the test where there is no Chromium."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium to show the page in")
    added = ("addEventListener('securitypolicyviolation', (event) => found.refused.push(event.violatedDirective));"
             "addEventListener('error', (event) => found.errors.push(event.message));")
    last = ("const box = document.body.appendChild(document.createElement('pre')); box.id = 'found-by-test';"
            f"try {{ found.value = (() => {{ {script} }})(); }}"
            "catch (problem) { found.errors.push(String(problem)); }"
            "box.textContent = JSON.stringify(found);")
    scripts = ["const found = { refused: [], errors: [] };" + added, last]
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'" for one in scripts)
    page = page.replace("script-src ", f"script-src {hashes} ", 1)
    page = page.replace("<title>", f"<script>{scripts[0]}</script><title>", 1)
    page = page.replace("</body>", f"<script>{scripts[1]}</script></body>", 1)
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    options = [*QUIET, *(["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []),
               *(["--blink-settings=preferredColorScheme=0"] if dark else []),
               f"--window-size={size[0]},{size[1]}", f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run([CHROMIUM, *options, "--dump-dom", file.as_uri()], capture_output=True, timeout=120,
                          check=False)
    box = re.search('<pre id="found-by-test">(.*?)</pre>', done.stdout.decode("utf-8"), re.S)
    assert box is not None, done.stderr.decode("utf-8", "replace")[-2000:]
    found = json.loads(html.unescape(box[1]))
    assert found["errors"] == [] and found["refused"] == []
    return found.get("value")
