"""Texts with coloured words as one page of HTML that needs nothing else: no script, no font, no network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from onnx_lrp.errors import InputError
from onnx_lrp.show.text import Segment, TextCell, TextRow, colours, number, segments, text_rows

if TYPE_CHECKING:
    from onnx_lrp.explanation import Explanation

NO_BREAK = "\u00a0"
# White paper by its own account, also in a dark browser, since white is the colour of no relevance.
_STYLE = """
:root { color-scheme: only light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #1f2328;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { margin: 0; font-size: 1.35rem; font-weight: 600; }
.legend { display: flex; align-items: center; gap: .6rem; margin: .6rem 0 1.6rem; color: #59636e; font-size: .85rem; }
.legend i { width: 12rem; height: .6rem; border-radius: .3rem; border: 1px solid #d4d9df; }
table.texts { width: 100%; border-collapse: collapse; }
.texts > * > tr > * { padding: 1.1rem 1.5rem 1.1rem 0; border-top: 1px solid #d4d9df; text-align: start;
  vertical-align: top; font-weight: 400; }
.texts > * > tr > :last-child { padding-inline-end: 0; }
.texts > thead > tr > * { border: 0; padding-block: 0 .4rem; font-weight: 600; font-size: .9rem; }
.texts > tbody > tr > td { width: calc((100% - 12rem) / var(--columns)); }
.about { width: 12rem; font-size: .85rem; color: #59636e; overflow-wrap: anywhere; }
.about b { display: block; color: #1f2328; font-weight: 600; }
p { margin: 0; }
.said { font-size: .85rem; color: #59636e; }
.said b { color: #1f2328; font-weight: 600; }
.text { margin: .45rem 0 .55rem; line-height: 2; overflow-wrap: anywhere; }
.text data { padding: .18em .22em; border-radius: .25em; -webkit-print-color-adjust: exact; print-color-adjust: exact; }
.text data.glued { margin-inline-start: -.1em; }
.text .special, .text .padding { color: #59636e; font-size: .8em; border: 1px dashed #afb8c1; padding: .1em .3em;
  white-space: nowrap; }
.text .here { outline: 2px solid #1f2328; outline-offset: 1px; }
.sums { font-size: .85rem; color: #59636e; font-variant-numeric: tabular-nums; }
.sums span { white-space: nowrap; margin-inline-end: 1.1em; }
details { margin-top: .4rem; font-size: .85rem; color: #59636e; }
summary { cursor: pointer; width: max-content; }
.numbers { border-collapse: collapse; margin-top: .4rem; font-variant-numeric: tabular-nums; }
.numbers th, .numbers td { padding: .1rem 1.4rem .1rem 0; text-align: start; font-weight: 400; }
.numbers td:last-child { text-align: end; padding: .1rem 0; }
.numbers thead th { color: #1f2328; font-weight: 600; }
@media (max-width: 48rem) { .texts > thead { display: none; }
  .texts > * > tr > * { display: block; padding-inline-end: 0; }
  td[data-title]::before { content: attr(data-title); font-weight: 600; }
  .texts > tbody > tr > td, .about { width: auto; } .texts > * > tr > * + * { border: 0; padding-top: 0; } }
@media print { main { padding: 0; max-width: none; } details { display: none; } tbody tr { break-inside: avoid; } }
"""


def text_page(columns: Sequence[Explanation], titles: Sequence[str] = (), heading: str = "", **options: object) -> str:
    """Explanations of texts as a page: a row per text, red words for what is explained and blue ones against it.

    Every text has a scale of its own: full colour is its largest |relevance|. Special tokens and padding stand apart,
    without colour; what they add up to is said below each text.

    Args:
        columns: one or more explanations of the same texts.
        titles: one per column; default: their methods.
        heading: of the page; default: the method.
        options: ``tokenizer``, ``tokens``, ``labels``, ``names``, ``predictions``, ``truths``, ``words``: see
            :func:`onnx_lrp.show.text_rows`.

    Returns:
        A whole HTML document.

    Raises:
        InputError: nothing to draw, no tokens in it, or not one title per column.
    """
    if titles and len(titles) != len(columns):
        raise InputError(f"{len(titles)} titles for {len(columns)} explanations side by side; give one each")
    rows = text_rows(columns, **options)  # type: ignore[arg-type]
    titles = titles or [column.method for column in columns]
    if not heading:
        methods = ", ".join(dict.fromkeys(column.method for column in columns if column.method))
        heading = f"Relevance of words by {methods}" if methods else "Relevance of words"
    return page(rows, titles if len(columns) > 1 else (), heading)


def page(rows: Sequence[TextRow], titles: Sequence[str] = (), heading: str = "Relevance of words") -> str:
    """The document.

    Args:
        rows: the texts.
        titles: of the columns where there are several.
        heading: above all.
    """
    about = any(row.name or row.predicted or row.truth for row in rows)
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="only light">',
        f"<title>{escape(heading)}</title>",
        f"<style>{_STYLE}</style>",
        "</head>",
        "<body>",
        "<main>",
        f"<h1>{escape(heading)}</h1>",
        f'<p class="legend">against <i style="background:{_gradient()}"></i> for what is explained; '
        "full colour is the strongest word of a text</p>",
        f'<table class="texts" style="--columns:{len(rows[0].cells) if rows else 1}">',
    ]
    if titles:
        heads = ['<th scope="col">text</th>'] if about else []
        heads += [f'<th scope="col">{escape(title)}</th>' for title in titles]
        parts.append(f"<thead><tr>{''.join(heads)}</tr></thead>")
    parts.append("<tbody>")
    for row in rows:
        parts.append("<tr>")
        if about:
            name = f"<b>{escape(row.name)}</b>" if row.name else ""
            said = f"predicted {escape(row.predicted.replace(' %', NO_BREAK + '%'))}" if row.predicted else ""
            true = f"<br>true {escape(row.truth)}" if row.truth else ""
            parts.append(f'<th scope="row" class="about">{name}{said}{true}</th>')
        # Where a narrow screen shows columns one below the other, each says which it is.
        named = [f' data-title="{escape(title)}"' for title in titles] or [""] * len(row.cells)
        parts += [f"<td{name}>{''.join(_cell(cell))}</td>" for name, cell in zip(named, row.cells, strict=True)]
        parts.append("</tr>")
    parts += ["</tbody>", "</table>", "</main>", "</body>", "</html>", ""]
    return "\n".join(parts)


def _cell(cell: TextCell) -> Iterator[str]:
    yield f'<p class="said">explained <b>{escape(cell.explained)}</b>, score <b>{number(cell.score)}</b></p>\n'
    drawn = [list(segments(p, cell.scale, cell.marked if k == 0 else None)) for k, p in enumerate(cell.passages)]
    for passage in drawn:
        yield f'<p class="text" dir="auto">{"".join(_words(passage))}</p>\n'
    sums = [f"<span>{escape(name)} {number(total)}</span>" for name, total in cell.totals]
    if cell.scale:
        sums.append(f"<span>full colour \u00b1{cell.scale:.3g}</span>")
    yield f'<p class="sums">{" ".join(sums)}</p>\n'
    yield "<details><summary>numbers</summary>"
    yield '<table class="numbers"><thead><tr><th scope="col">place</th><th scope="col">token</th>'
    yield '<th scope="col">relevance</th></tr></thead><tbody>\n'
    for s in (segment for passage in drawn for segment in passage):
        name = f'<th scope="row" dir="auto">{escape(s.text)}</th>'
        yield f"<tr><td>{s.place}</td>{name}<td>{number(s.value)}</td></tr>\n"
    yield "</tbody></table></details>"


def _words(passage: Sequence[Segment]) -> Iterator[str]:
    """Tokens with their colours, spaces between words."""
    back, white = colours(np.array([s.share for s in passage]))
    for i, s in enumerate(passage):
        if i and not s.glued:
            yield " "
        classes: list[str] = [s.kind] if s.kind != "content" else []
        classes += (["glued"] if s.glued else []) + (["here"] if s.marked else [])
        named = f' class="{" ".join(classes)}"' if classes else ""
        colour = "#{:02x}{:02x}{:02x}".format(*back[i])
        style = f' style="background:{colour};color:{"#fff" if white[i] else "#000"}"' if s.kind == "content" else ""
        where = f"places {s.place} to {s.place + s.count - 1}" if s.count > 1 else f"place {s.place}"
        token = f", id {s.id}" if s.id >= 0 else ""
        here = ", explained here" if s.marked else ""
        title = escape(f"{s.text}: {number(s.value)} ({where}{token}{here})")
        yield f'<data value="{s.value!r}"{named}{style} title="{title}">{escape(s.text)}</data>'
        if "\u23ce" in s.text:
            yield "<br>"


def _gradient() -> str:
    steps = np.linspace(-1, 1, 9)
    return f"linear-gradient(90deg,{','.join('#{:02x}{:02x}{:02x}'.format(*c) for c in colours(steps)[0])})"
