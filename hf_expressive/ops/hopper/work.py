"""What both kernels agree on: in which order programs take work, and which keys a tile of queries sees.

`entries` are the plan's numbers for the tiles of a sequence, or `None` where visibility follows from
`limits`, (offset, left, right, number of keys), by arithmetic: see `plan`.
"""

# ruff: noqa: RUF059 - the tuples that hold a kernel's state are unpacked whole, by name
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .plan import FIELDS, ROWS

_FIELDS = gl.constexpr(FIELDS)
_ROWS = gl.constexpr(ROWS)


@gluon.jit
def place_in_bands(index, tiles, rows, band, tail):
    """(position among the tiles, row, whether in the last band) of a work item.

    Rows are worked on in bands of `band`, at the end one of `tail`: all first tiles of a band, then all
    second ones.
    """
    others = rows - tail
    is_last = index >= tiles * others
    first = gl.where(is_last, others, index // (tiles * band) * band)
    rest = index - tiles * first
    width = gl.where(is_last, tail, gl.minimum(band, others - first))
    return rest // width, first + rest % width, is_last


@gluon.jit
def entries_of(batch, table, patterns, count):
    """The plan's numbers for the `count` tiles of a sequence, or `None` where it needs none."""
    entries = table
    if table is not None:
        entries = table + gl.minimum(batch, patterns - 1) * count * _FIELDS
    return entries


@gluon.jit
def band_of(query, limits):
    """[start, end) of the keys that queries see by causality and sliding window."""
    offset, left, right, num_keys = limits
    start = gl.maximum(query + (offset + 1 - left), 0)
    return start, gl.minimum(query + (offset + right), num_keys)


@gluon.jit
def seen_by_any(tile, entries, limits):
    """[first, one past the last) of the keys that any query of a tile sees."""
    if entries is None:
        offset, left, right, num_keys = limits
        last = gl.minimum(tile * _ROWS + _ROWS, num_keys - offset) - 1
        start = band_of(tile * _ROWS, limits)[0]
        end = band_of(last, limits)[1]
    else:
        start = gl.load(entries + tile * _FIELDS)
        end = gl.load(entries + tile * _FIELDS + 1)
    return start, end


@gluon.jit
def seen_by_all(half, entries, limits):
    """[first, one past the last) of the keys that all queries of a half see, the tile's being 2·tile
    and 2·tile + 1."""
    if entries is None:
        start = band_of(half * (_ROWS // 2) + (_ROWS // 2 - 1), limits)[0]
        end = band_of(half * (_ROWS // 2), limits)[1]
    else:
        entry = entries + half // 2 * _FIELDS + half % 2 * 2
        start = gl.load(entry + 2)
        end = gl.load(entry + 3)
    return start, end


@gluon.jit
def count_seen_by_all(half, entries):
    """How many keys all queries of a half see, exact up to a block's; where there is a mask of keys."""
    return gl.load(entries + half // 2 * _FIELDS + half % 2 + 6)
