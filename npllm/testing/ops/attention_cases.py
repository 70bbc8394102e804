"""The corpus of attention: sizes and places where kernels go wrong, each at the scales of scores where it shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from npllm.arrays import Array
from npllm.testing.case import Case, Draw

# Finite, and loud where it is read.
GARBAGE = 300.0

Pair = tuple[int, int]
Change = Callable[[np.random.Generator, dict[str, Array]], dict[str, Array]]


def shaped(queries: tuple[int, ...], keys: tuple[int, ...], heads: Pair = (4, 2), widths: Pair = (64, 64)) -> Draw:
    """Normal numbers of which scores are about `scale` after 1/sqrt(K). `heads` are (H, G), `widths` (K, V).

    Heads differ in how sharply they look and in where their values lie, so that no head can stand for another.
    """
    (H, G), (K, V) = heads, widths
    sharp_H1, place_G1 = np.linspace(0.7, 1.3, H)[:, None], 0.25 * np.arange(G)[:, None]

    def draw(dice: np.random.Generator, scale: float) -> dict[str, Array]:
        q = scale * sharp_H1 * dice.standard_normal((*queries, H, K))
        k, v = dice.standard_normal((*keys, G, K)), dice.standard_normal((*keys, G, V)) + place_G1
        return {"q": q, "k": k, "v": v}

    return draw


def dense(B: int, T: int, S: int, heads: Pair = (4, 2), widths: Pair = (64, 64)) -> Draw:
    return shaped((B, T), (B, S), heads, widths)


def ragged(queries: Sequence[int], keys: Sequence[int], heads: Pair = (4, 2), widths: Pair = (64, 64)) -> Draw:
    """Rows of so many queries and keys, packed one after the other."""
    drawn = shaped((sum(queries),), (sum(keys),), heads, widths)
    offsets = {"query_offsets": queries, "key_offsets": keys}
    bounds = {name: np.concatenate([[0], np.cumsum(counts)]).astype(np.int32) for name, counts in offsets.items()}
    return lambda dice, scale: drawn(dice, scale) | {name: x.copy() for name, x in bounds.items()}


def changed(draw: Draw, *changes: Change) -> Draw:
    """What `draw` draws, after `changes`."""

    def both(dice: np.random.Generator, scale: float) -> dict[str, Array]:
        arrays = draw(dice, scale)
        for change in changes:
            arrays |= change(dice, arrays)
        return arrays

    return both


def sinks(at: float = 0.0, spread: float = 2.0) -> Change:
    """A sink per head, around `at`."""

    def change(dice: np.random.Generator, x: dict[str, Array]) -> dict[str, Array]:
        return {"sinks": at + spread * dice.standard_normal((x["q"].shape[-2],))}

    return change


def padded(*lengths: int, garbage: float = GARBAGE) -> Change:
    """Rows of these lengths, with `garbage` times other numbers behind them."""

    def change(dice: np.random.Generator, x: dict[str, Array]) -> dict[str, Array]:
        behind = np.arange(x["k"].shape[1])[None, :, None, None] >= np.array(lengths)[:, None, None, None]
        noise = {name: garbage * dice.standard_normal(x[name].shape) for name in "kv"}
        arrays = {name: np.where(behind, noise[name], x[name]) for name in "kv"}
        return arrays | {"lengths": np.array(lengths, np.int32)}

    return change


def paged(*lengths: int, page: int = 16, order: str = "shuffled", shared: int = 0) -> Change:
    """The keys of rows of these lengths in pages, among pages of NaN; the first `shared` pages of all rows are row 0's."""

    def change(dice: np.random.Generator, x: dict[str, Array]) -> dict[str, Array]:
        wide = -(-max(lengths) // page)
        ids = np.arange(len(lengths) * wide + 2)
        ids = ids[::-1] if order == "reversed" else dice.permutation(ids)
        pages = np.full((len(lengths), wide), ids[-1], np.int32)
        stored = {name: np.full((len(ids), page, *x[name].shape[2:]), np.nan) for name in "kv"}
        for r, length in enumerate(lengths):
            used = -(-length // page)
            pages[r, :used] = ids[r * wide : r * wide + used]
            pages[r, :shared] = pages[0, :shared]
            s = np.arange(length)
            for name in "kv":
                stored[name][pages[r, s // page], s % page] = x[name][r, :length]
        return stored | {"pages": pages, "lengths": np.array(lengths, np.int32)}

    return change


def leaning(q: float, k: float) -> Change:
    """All queries and keys lean along one direction: every score is about q k sqrt(K) after 1/sqrt(K), give or take one."""
    return lambda dice, x: {"q": x["q"] + q, "k": x["k"] + k}


def level(of_q: float, of_k: float) -> Change:
    """The first feature of all queries and of all keys is the same: scores lie around scale of_q of_k, give or take one."""

    def change(dice: np.random.Generator, x: dict[str, Array]) -> dict[str, Array]:
        q, k = x["q"].copy(), x["k"].copy()
        q[..., 0], k[..., 0] = of_q, of_k
        return {"q": q, "k": k}

    return change


def values(at: float = 0.0, size: float = 1.0) -> Change:
    return lambda dice, x: {"v": at + size * x["v"]}


def cancelling(dice: np.random.Generator, x: dict[str, Array]) -> dict[str, Array]:
    """Keys come twice, with values that cancel but for a hundredth."""
    k, v = (np.repeat(x[name][:, ::2], 2, axis=1)[:, : x[name].shape[1]] for name in "kv")
    sign = np.where(np.arange(v.shape[1]) % 2, -1.0, 1.0)[:, None, None]
    return {"k": k, "v": sign * v + 0.01 * dice.standard_normal(v.shape)}


def equal(dice: np.random.Generator, x: dict[str, Array]) -> dict[str, Array]:
    """Queries of zero: every visible key counts the same."""
    return {"q": np.zeros_like(x["q"])}


def unseen(*keys: int | slice) -> Change:
    """NaN in the keys and values of places that no query may see."""

    def change(dice: np.random.Generator, x: dict[str, Array]) -> dict[str, Array]:
        arrays = {name: x[name].copy() for name in "kv"}
        for key in keys:
            for array in arrays.values():
                array[:, key] = np.nan
        return arrays

    return change


def case(name: str, tags: str, draw: Draw, *scales: float, width: int = 64, **settings: Any) -> Case:
    settings.setdefault("scale", width**-0.5)
    return Case("attention", name, draw, settings, frozenset(tags.split()), scales or (1.0,))


# More heads than a kernel may take at a time: all on one, in groups of seven, in groups of five.
MANY = ((32, 1, "mqa"), (28, 4, "gqa"), (40, 8, "gqa"))

PREFILL = (
    case("d64", "prefill basic gqa", dense(2, 96, 96), 0.25, 1, 4, 16),
    *(
        case(f"d{K}", "prefill widths gqa", dense(1, 70, 70, widths=(K, V)), 1, 4, width=K)
        for K, V in ((40, 40), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256))
    ),
    *(
        case(f"h{H}-kv{G}", f"prefill heads {kind}", dense(1, 48, 48, (H, G)), 1, 4)
        for H, G, kind in ((8, 8, "mha"), (8, 4, "gqa"), (8, 1, "mqa"), (6, 2, "gqa"), (6, 3, "gqa"))
    ),
    *(
        case(f"h{H}-kv{G}", f"prefill heads many {kind}", dense(1, 24, 24, (H, G), (32, 32)), 2, width=32)
        for H, G, kind in MANY
    ),
    case("one", "prefill odd", dense(1, 1, 1)),
    case("no-queries", "prefill odd", dense(2, 0, 5)),
    case("no-keys", "prefill odd masked", dense(2, 3, 0)),
    case("two-three", "prefill odd", dense(1, 2, 3)),
    *(case(f"t{T}", "prefill odd block", dense(1, T, T, (2, 1)), 2) for T in (15, 16, 17, 63, 64, 65, 97, 127, 128, 129)),
    case("scale-one", "prefill scale", dense(1, 80, 80), 0.125, 0.5, scale=1.0),
    case("scale-odd", "prefill scale", dense(1, 80, 80), 1, 4, scale=0.0721),
    case("equal-scores", "prefill ties", changed(dense(1, 129, 129), equal)),
    case("equal-scores-offset", "prefill ties values", changed(dense(1, 100, 100), equal, values(5.0, 1.0))),
    case("values-offset", "prefill values", changed(dense(1, 96, 96), values(8.0)), 1, 4),
    case("values-cancel", "prefill values", changed(dense(1, 96, 96), cancelling), 0.5, 2),
    case("values-small", "prefill values", changed(dense(1, 80, 80), values(0.0, 2e-3)), 1, 8),
    case("values-large", "prefill values large", changed(dense(1, 80, 80), values(0.0, 3e3)), 1, 8),
    case("more-queries", "prefill odd masked", dense(2, 40, 23), 1, 4),
)

DECODE = (
    case("append", "prefill append", dense(2, 20, 100), 1, 4),
    case("append-one-more", "prefill append odd", dense(2, 31, 32), 1, 4),
    case("decode", "decode gqa", dense(4, 1, 200, (8, 2)), 1, 4),
    case("decode-long", "decode gqa long", dense(2, 1, 1009, (8, 2)), 1, 6),
    case("decode-mqa", "decode mqa", dense(3, 1, 130, (8, 1)), 1, 4),
    *(
        case(f"decode-h{H}-kv{G}", f"decode heads many {kind}", dense(3, 1, 48, (H, G), (32, 32)), 2, width=32)
        for H, G, kind in MANY
    ),
    case("decode-first", "decode odd", dense(5, 1, 1, (8, 2))),
    *(case(f"mtp{T}", "decode mtp", dense(4, T, 161, (8, 2)), 1, 4) for T in (2, 3, 4)),
)

MASKS = (
    *(
        case(f"window{w}", "prefill window", dense(1, 100, 100), 1, 4, window=w)
        for w in (1, 2, 16, 31, 32, 33, 64, 99, 100, 101)
    ),
    case("window-append", "prefill window append", dense(2, 20, 90), 1, 4, window=40),
    case("window-decode", "decode window", dense(4, 1, 300, (8, 2)), 1, 4, window=128),
    case("window-mtp", "decode window mtp", dense(4, 3, 150, (8, 2)), 1, 4, window=65),
    *(case(f"chunk{c}", "prefill chunk", dense(1, 100, 100), 1, 4, chunk=c) for c in (16, 33, 50, 99, 100)),
    case("chunk-append", "prefill chunk append", dense(2, 40, 90), 1, 4, chunk=32),
    case("chunk-decode-last", "decode chunk", dense(4, 1, 128, (8, 2)), 1, 4, chunk=64),
    case("chunk-decode-first", "decode chunk", dense(4, 1, 129, (8, 2)), 1, 4, chunk=64),
    case("chunk-window", "prefill chunk window", dense(1, 100, 100), 1, 4, chunk=40, window=24),
)

SCORES = (
    case("softcap50", "prefill softcap", dense(1, 80, 80), 4, 16, 60, softcap=50.0),
    case("softcap30", "prefill softcap", dense(1, 80, 80), 4, 40, softcap=30.0),
    case("softcap-window", "prefill softcap window", dense(1, 96, 96), 8, 40, softcap=50.0, window=32),
    case("softcap-decode", "decode softcap", dense(4, 1, 150, (8, 2)), 8, 40, softcap=50.0),
    case("softcap-negative", "prefill softcap", changed(dense(1, 60, 60), leaning(-4.0, 4.0)), softcap=20.0),
    case("large-logits", "prefill large overflow", dense(1, 64, 64), 200, 2000),
    case("large-positive", "prefill large", changed(dense(1, 64, 64), leaning(8.0, 8.0))),
    case("large-negative", "prefill large", changed(dense(1, 64, 64), leaning(-8.0, 8.0))),
    case("far-negative", "prefill large", changed(dense(1, 64, 64), leaning(-30.0, 32.0)), scale=1.0),
    case("far-negative-decode", "decode large", changed(dense(4, 1, 64), leaning(-30.0, 32.0)), scale=1.0),
    case("sinks", "prefill sinks", changed(dense(1, 90, 90), sinks()), 1, 4),
    case("sinks-large", "prefill sinks", changed(dense(1, 64, 64), sinks(6.0)), 1, 4),
    case("sinks-small", "prefill sinks", changed(dense(1, 64, 64), sinks(-30.0, 5.0))),
    # Some fifty keys together weigh as much as one sink four above them.
    case("sinks-level", "prefill sinks level", changed(dense(1, 64, 64), level(-15.5, 15.5), sinks(-27.0, 1.0))),
    case("sinks-level-high", "prefill sinks level", changed(dense(1, 64, 64), level(18.0, 18.0), sinks(43.0, 1.0))),
    case("sinks-scale", "prefill sinks scale", changed(dense(1, 64, 64), level(23.5, 23.5), sinks(43.0)), scale=0.0721),
    case("sinks-window", "prefill sinks window", changed(dense(1, 100, 100), sinks()), 1, 4, window=16),
    case("sinks-decode", "decode sinks window", changed(dense(4, 1, 200, (8, 2)), sinks(1.0)), 1, 4, window=128),
    case("sinks-softcap", "prefill sinks softcap", changed(dense(1, 80, 80), sinks(3.0)), 8, 40, softcap=5.0),
    case("sinks-masked", "prefill sinks masked", changed(dense(1, 40, 23), sinks()), 1, 4),
)

FORMS = (
    case("padded", "prefill padded masked", changed(dense(4, 33, 64), padded(64, 33, 20, 0)), 1, 4),
    case("padded-decode", "decode padded masked", changed(dense(5, 1, 100, (8, 2)), padded(100, 1, 0, 99, 16)), 1, 4),
    case("padded-window", "prefill padded window", changed(dense(3, 24, 80), padded(80, 47, 25)), 1, 4, window=16),
    case("ragged", "prefill ragged", ragged((20, 0, 33, 17, 1), (20, 0, 33, 17, 1)), 1, 4),
    case("ragged-append", "prefill ragged append", ragged((5, 0, 33, 1, 16), (24, 7, 64, 30, 16)), 1, 4),
    case("ragged-decode", "decode ragged", ragged((1, 1, 1, 1), (65, 1, 128, 30), (8, 2)), 1, 4),
    case("ragged-masked", "prefill ragged masked", ragged((9, 12, 20), (9, 0, 12)), 1, 4),
    case("ragged-window", "prefill ragged window", ragged((30, 3, 21), (60, 50, 21)), 1, 4, window=17),
    case("ragged-sinks", "prefill ragged sinks", changed(ragged((30, 3, 21), (60, 50, 21)), sinks()), 1, 4),
    case("paged", "decode paged", changed(dense(5, 1, 128, (8, 2)), paged(128, 1, 65, 47, 16)), 1, 4),
    case("paged-reversed", "decode paged", changed(dense(4, 1, 96, (8, 2)), paged(96, 33, 80, 95, order="reversed")), 1, 4),
    case("paged-shared", "decode paged", changed(dense(4, 1, 96, (8, 2)), paged(96, 40, 80, 65, shared=2)), 1, 4),
    case("paged-by-one", "decode paged odd", changed(dense(4, 1, 40, (8, 2)), paged(40, 1, 17, 33, page=1)), 1, 4),
    case("paged-empty", "decode paged masked", changed(dense(4, 2, 64, (8, 2)), paged(64, 0, 1, 33)), 1, 4),
    case("paged-mtp", "decode paged mtp", changed(dense(4, 3, 100, (8, 2)), paged(100, 17, 64, 47)), 1, 4),
    case("paged-prefill", "prefill paged append", changed(dense(3, 30, 70), paged(70, 30, 49, shared=1)), 1, 4),
    case("paged-window", "decode paged window", changed(dense(4, 1, 100, (8, 2)), paged(100, 60, 49, 33)), 1, 4, window=32),
    case("paged-softcap", "decode paged softcap", changed(dense(3, 1, 80, (8, 2)), paged(80, 17, 64)), 8, 40, softcap=50.0),
    case("paged-sinks", "decode paged sinks", changed(dense(4, 1, 80, (8, 2)), paged(80, 17, 64, 47), sinks()), 1, 4),
)  # fmt: skip

HOSTILE = (
    case("nan-window", "hostile decode window", changed(dense(3, 1, 90), unseen(slice(0, 58))), window=32),
    case("nan-chunk", "hostile decode chunk", changed(dense(3, 2, 100), unseen(slice(0, 64))), chunk=32),
    case("nan-padded", "hostile decode padded", changed(dense(3, 2, 64), padded(64, 20, 0, garbage=float("nan")))),
)

CASES = PREFILL + DECODE + MASKS + SCORES + FORMS + HOSTILE
