"""Pictures measured where people see them: headless Chromium lays them out and says what does not fit.

A page holds many pictures at once, since starting the browser takes longer than all of them.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PROGRAM = next(filter(None, map(shutil.which, PROGRAMS)), None)

needs_browser = pytest.mark.skipif(PROGRAM is None, reason=f"no Chromium here: none of {', '.join(PROGRAMS)} is on the path")

THEMES = {"dark": "0", "light": "1"}

# Everything is measured as painted. A box is a group whose first child is its rectangle.
SCRIPT = r"""
const SLACK = 0.6;
const faults = [];
const rectOf = e => e.getBoundingClientRect();
const within = (a, b, s) => a.left >= b.left - s && a.right <= b.right + s && a.top >= b.top - s && a.bottom <= b.bottom + s;
const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > SLACK &&
  Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > SLACK;
const said = e => (e.textContent || "").trim().slice(0, 40);
// The height of the letters, not of the line: a font's box reaches above and below them.
const letters = t => { const r = rectOf(t), size = parseFloat(getComputedStyle(t).fontSize) * scaleOf(t);
  return {left: r.left, right: r.right, top: r.bottom - 0.22 * size - 0.73 * size, bottom: r.bottom - 0.02 * size}; };
const scaleOf = e => { const m = e.getScreenCTM(); return m ? Math.hypot(m.a, m.b) : 1; };
const luminance = color => { const c = color.match(/[\d.]+/g).slice(0, 3).map(v => { v /= 255;
  return v <= 0.03928 ? v / 12.92 : Math.pow((v + 0.055) / 1.055, 2.4); });
  return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2]; };
const contrast = (a, b) => { const [x, y] = [luminance(a), luminance(b)].sort((p, q) => q - p);
  return (x + 0.05) / (y + 0.05); };
const segments = p => { const n = p.getAttribute("d").match(/-?[\d.]+/g).map(Number), m = p.getScreenCTM(), out = [];
  const at = i => ({x: m.a * n[i] + m.c * n[i + 1] + m.e, y: m.b * n[i] + m.d * n[i + 1] + m.f});
  for (let i = 0; i + 3 < n.length; i += 2) { const a = at(i), b = at(i + 2);
    out.push({left: Math.min(a.x, b.x) - 0.5, right: Math.max(a.x, b.x) + 0.5, top: Math.min(a.y, b.y) - 0.5,
      bottom: Math.max(a.y, b.y) + 0.5}); }
  return out; };
// The last rectangle of a plain colour before the text, among those that its middle lies in.
const fillBehind = (t, r, fills) => { const x = (r.left + r.right) / 2, y = (r.top + r.bottom) / 2;
  for (const [e, b, fill] of fills)
    if (b.left <= x && x <= b.right && b.top <= y && y <= b.bottom && fill.startsWith("rgb") &&
        e.compareDocumentPosition(t) & Node.DOCUMENT_POSITION_FOLLOWING) return fill;
  return null; };
let texts = 0, boxes = 0, worst = 99;
document.querySelectorAll("svg").forEach((svg, i) => {
  const heading = svg.querySelector("title"), name = (heading ? said(heading) : "") + " [" + i + "]";
  const fault = what => faults.push(name + ": " + what);
  const all = [...svg.querySelectorAll("text")].filter(t => said(t)), sizes = new Map(all.map(t => [t, letters(t)]));
  const groups = [...svg.querySelectorAll("g.box")], frame = new Map(groups.map(g => [g, rectOf(g.firstElementChild)]));
  const fills = [...svg.querySelectorAll("rect")].map(e => [e, rectOf(e), getComputedStyle(e).fill]).reverse();
  texts += all.length; boxes += groups.length;
  const whole = rectOf(svg);
  for (const t of all) {
    if (!within(sizes.get(t), whole, 0)) fault("outside the picture: " + said(t));
    const box = t.closest("g.box");
    if (box && !within(sizes.get(t), frame.get(box), SLACK)) fault("outside its box: " + said(t));
    const behind = fillBehind(t, sizes.get(t), fills), c = behind ? contrast(getComputedStyle(t).fill, behind) : 0;
    worst = Math.min(worst, c);
    if (c < 4.5) fault("contrast " + c.toFixed(2) + ": " + said(t));
  }
  all.forEach((t, j) => all.slice(j + 1).forEach(u => {
    if (meet(sizes.get(t), sizes.get(u))) fault("text on text: " + said(t) + " / " + said(u)); }));
  groups.forEach((g, j) => {
    const outer = g.parentElement.closest("g.box");
    if (outer && !within(frame.get(g), frame.get(outer), 0)) fault("a box leaves its box: " + said(g));
    if (!within(frame.get(g), whole, 0)) fault("a box leaves the picture: " + said(g));
    groups.slice(j + 1).forEach(h => {
      if (!g.contains(h) && !h.contains(g) && meet(frame.get(g), frame.get(h)))
        fault("box on box: " + said(g) + " / " + said(h)); });
    all.forEach(t => {
      if (!g.contains(t) && meet(sizes.get(t), frame.get(g))) fault("text on a box: " + said(t) + " / " + said(g)); });
  });
  svg.querySelectorAll(".glyph").forEach(g => { const r = rectOf(g);
    all.forEach(t => { if (meet(sizes.get(t), r)) fault("text on a drawing: " + said(t)); });
    const box = g.closest("g.box");
    if (box && !within(r, frame.get(box), SLACK)) fault("a drawing leaves its box: " + said(box)); });
  // An arrow ends at a box, at a sum, or below a word.
  const ends = [...frame.values(), ...[...svg.querySelectorAll("circle")].map(rectOf)];
  const inside = (x, y, r, s) => x > r.left - s && x < r.right + s && y > r.top - s && y < r.bottom + s;
  const touches = (x, y, r) => inside(x, y, r, 1.6) && !inside(x, y, r, -1.6);
  svg.querySelectorAll("path.tip").forEach(p => { const [x, y] = p.getAttribute("d").match(/-?[\d.]+/g).map(Number);
    const m = p.getScreenCTM(), at = [m.a * x + m.e, m.d * y + m.f];
    const below = all.some(t => { const r = sizes.get(t);
      return at[0] > r.left && at[0] < r.right && at[1] > r.bottom && at[1] < r.bottom + 14; });
    if (!below && !ends.some(r => touches(...at, r))) fault("an arrow ends nowhere: " + at); });
  svg.querySelectorAll("path.flow").forEach(p => segments(p).forEach(s => {
    all.forEach(t => { if (meet(sizes.get(t), s)) fault("a line through text: " + said(t)); });
    groups.forEach(g => { if (!g.contains(p) && meet(frame.get(g), s)) fault("a line through a box: " + said(g)); }); }));
});
const scroll = document.documentElement.scrollWidth - document.documentElement.clientWidth;
const result = {faults, texts, boxes, worst, scroll, dark: matchMedia("(prefers-color-scheme: dark)").matches,
  background: getComputedStyle(document.querySelector("svg rect")).fill};
const out = document.createElement("pre"); out.id = "measured"; out.textContent = JSON.stringify(result);
document.body.append(out);
"""


def run(*arguments: str) -> str:
    """What Chromium prints with these arguments."""
    assert PROGRAM is not None
    command = [PROGRAM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def measure(body: str, theme: str, folder: Path) -> dict[str, Any]:
    """What is wrong with the pictures of a page, and how many texts and boxes were looked at."""
    page = folder / f"{theme}.html"
    body = re.sub(r"<meta http-equiv=[^>]*>|<\?xml[^>]*>", "", body)
    page.write_text(f"<!DOCTYPE html><meta charset='utf-8'>{body}<script>{SCRIPT}</script>", encoding="utf-8")
    printed = run(
        f"--blink-settings=preferredColorScheme={THEMES[theme]}", "--window-size=1400,1000", "--dump-dom", page.as_uri()
    )
    found = re.search(r'<pre id="measured">(.*?)</pre>', printed, re.DOTALL)
    assert found, printed[-2000:]
    measured: dict[str, Any] = json.loads(html.unescape(found[1]))
    return measured


def colour(code: str) -> str:
    """`#rrggbb` as a browser says it."""
    return f"rgb({', '.join(str(int(code[i : i + 2], 16)) for i in (1, 3, 5))})"
