"""Write docs/settings.md from the configuration of a run: `python tools/settings.py`."""

from __future__ import annotations

from pathlib import Path

from peftree.setting_rows import page

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"

if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
