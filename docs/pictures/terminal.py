"""Draw `terminal.svg`, which types `terminal.txt` line by line: `python docs/pictures/terminal.py` makes it anew.

The text is of a real session, some of whose lines are left out. Commands begin with `$`. The picture moves by CSS,
which browsers run in an image, too; for people who want no motion it stands still.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

HERE = Path(__file__).parent
LINE, LEFT, TOP, WIDTH = 18, 16, 40, 800
BUTTONS = ("#ff5f57", "#febc2e", "#28c840")
COMMAND, OUTPUT = 1.2, 0.35
"""Seconds before a command appears, and before a line of what it says."""

STYLE = """
text { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #d4d4d4; }
text.command { fill: #9cdcfe; font-weight: 600; }
text { white-space: pre; animation: appear 0.01s linear both; }
@keyframes appear { from { opacity: 0; } to { opacity: 1; } }
@media (prefers-reduced-motion: reduce) { text { animation: none; } }
""".strip()


def draw(path: Path) -> Path:
    """Write the moving picture of the session beside this script to `path`."""
    lines = (HERE / "terminal.txt").read_text(encoding="utf-8").splitlines()
    height = TOP + LINE * len(lines) + 8
    drawn, at = [], 0.0
    for i, line in enumerate(lines):
        command = line.startswith("$ ")
        at += COMMAND if command else OUTPUT
        kind = ' class="command"' if command else ""
        place = f'x="{LEFT}" y="{TOP + LINE * i + 12}" style="animation-delay: {at:.2f}s"'
        drawn.append(f'<text{kind} {place} xml:space="preserve">{escape(line)}</text>')
    dots = [f'<circle cx="{20 + 18 * i}" cy="18" r="5.5" fill="{colour}"/>' for i, colour in enumerate(BUTTONS)]
    size = f'viewBox="0 0 {WIDTH} {height}"'
    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="fpt in a terminal">',
        f"<style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#1e1e1e"/>',
        *dots,
        *drawn,
        "</svg>",
    ]
    path.write_text("\n".join(svg) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    print(draw(HERE / "terminal.svg"))
