"""Makes docs/images/demo.png: three explanations of the demo on one page, seen by headless Chromium.

    python examples/readme_picture.py [--browser chromium]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from demo import compiled_once, contrast_part, image_part, table_part
from PIL import Image

from dlbc_runtime.views.html import report

WIDTH, HEIGHT = 1800, 900
TO = Path(__file__).parents[1] / "docs" / "images" / "demo.png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHOSEN = ((contrast_part, "auto"), (image_part, "auto"), (table_part, "auto"))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--browser", default=next(filter(shutil.which, BROWSERS), None))
    browser = parser.parse_args().browser
    if browser is None:
        print("no Chromium found: install it, or name it with --browser", file=sys.stderr)
        return 1
    explanations = []
    for make, rules in CHOSEN:
        part = make()
        explanation = part.named(compiled_once(part, rules)(**part.inputs, target=part.target))
        explanation.conservation()
        explanations.append(explanation)
    with tempfile.TemporaryDirectory() as folder:
        page = report(explanations, "What made them say so", Path(folder) / "page.html")
        shot = Path(folder) / "shot.png"
        subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
                        "--disable-background-networking", "--force-device-scale-factor=1",
                        f"--user-data-dir={folder}/profile", f"--window-size={WIDTH},{HEIGHT}",
                        f"--screenshot={shot}", page.as_uri()], check=True, capture_output=True, timeout=120)
        TO.parent.mkdir(parents=True, exist_ok=True)
        # 86 shades a channel: two thirds of the size, and no difference to see.
        Image.open(shot).convert("RGB").point(lambda shade: 3 * round(shade / 3)).save(TO, optimize=True)
    print(f"wrote {TO}: {TO.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
