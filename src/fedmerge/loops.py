"""The inner loops of merging, compiled by numba: for models too large for a few torch calls.

Plain loops over arrays that `kernels` has checked; nothing else imports this, since numba takes
long to import. Columns are taken a tile at a time, small enough for a core's cache. In a tile, four
clients by five models are worked on at once, all in registers: every number is then loaded, and
converted to float64, a few times rather than once for each model. Where there are fewer, dummy rows
fill up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

TILE = 8192
"""Columns worked on at a time: long enough for memory to be read ahead, at 32 kB a row, and short
enough for what is read several times to stay in a core's second cache."""
CLIENTS = 4
MODELS = 5

Array = np.ndarray[Any, Any]


def compiled(function: Callable[..., None]) -> Callable[..., None]:
    """Compile `function` on its first call, and keep the machine code on disk where possible."""
    # Sums may be reordered, to be vectorised; infinity and NaN stay what they are.
    options: dict[str, Any] = {
        "fastmath": {"contract", "reassoc", "nsz"},
        "error_model": "numpy",
        "nogil": True,
    }
    try:
        made: Callable[..., None] = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's can be written
        made = numba.njit(**options)(function)
    return made


@compiled
def merge(models: Array, weights: Array, segments: Array, out: Array) -> None:
    """out (k, P) = weights (k, b, d) @ models (d, P), block by block."""
    k, d = len(out), len(models)
    spare, zero = np.zeros(TILE, out.dtype), np.zeros(TILE, models.dtype)
    w = np.zeros((2, MODELS), models.dtype)
    for q in range(len(segments)):
        block = segments[q, 2]
        for s in range(segments[q, 0], segments[q, 1], TILE):
            e = min(s + TILE, segments[q, 1])
            n = e - s
            for j in range(0, d, MODELS):
                m0 = models[j, s:e]
                m1 = models[j + 1, s:e] if j + 1 < d else zero[:n]
                m2 = models[j + 2, s:e] if j + 2 < d else zero[:n]
                m3 = models[j + 3, s:e] if j + 3 < d else zero[:n]
                m4 = models[j + 4, s:e] if j + 4 < d else zero[:n]
                for i in range(0, k, 2):
                    o0 = out[i, s:e]
                    o1 = out[i + 1, s:e] if i + 1 < k else spare[:n]
                    for a in range(2):
                        for b in range(MODELS):
                            there = i + a < k and j + b < d
                            w[a, b] = weights[i + a, block, j + b] if there else 0
                    a0, a1, a2, a3, a4 = w[0, 0], w[0, 1], w[0, 2], w[0, 3], w[0, 4]
                    b0, b1, b2, b3, b4 = w[1, 0], w[1, 1], w[1, 2], w[1, 3], w[1, 4]
                    if j == 0:
                        for c in range(n):
                            y0, y1, y2, y3, y4 = m0[c], m1[c], m2[c], m3[c], m4[c]
                            o0[c] = a0 * y0 + a1 * y1 + a2 * y2 + a3 * y3 + a4 * y4
                            o1[c] = b0 * y0 + b1 * y1 + b2 * y2 + b3 * y3 + b4 * y4
                    else:
                        for c in range(n):
                            y0, y1, y2, y3, y4 = m0[c], m1[c], m2[c], m3[c], m4[c]
                            o0[c] += a0 * y0 + a1 * y1 + a2 * y2 + a3 * y3 + a4 * y4
                            o1[c] += b0 * y0 + b1 * y1 + b2 * y2 + b3 * y3 + b4 * y4


@compiled
def scores(delta: Array, models: Array, segments: Array, out: Array) -> None:
    """out (k, b, d) float64 += <delta_i, models_j> over the columns of each block.

    A tile is summed up in the numbers' own dtype, by eight lanes or more, and its sums in float64.
    What overflows is done again in float64.
    """
    k, d = len(delta), len(models)
    zero, zeros = np.zeros(1, delta.dtype)[0], np.zeros(TILE, delta.dtype)
    r = np.zeros((CLIENTS, MODELS), delta.dtype)
    for q in range(len(segments)):
        block = segments[q, 2]
        for s in range(segments[q, 0], segments[q, 1], TILE):
            e = min(s + TILE, segments[q, 1])
            n = e - s
            for j in range(0, d, MODELS):
                m0 = models[j, s:e]
                m1 = models[j + 1, s:e] if j + 1 < d else zeros[:n]
                m2 = models[j + 2, s:e] if j + 2 < d else zeros[:n]
                m3 = models[j + 3, s:e] if j + 3 < d else zeros[:n]
                m4 = models[j + 4, s:e] if j + 4 < d else zeros[:n]
                for i in range(0, k, CLIENTS):
                    x0 = delta[i, s:e]
                    x1 = delta[i + 1, s:e] if i + 1 < k else zeros[:n]
                    x2 = delta[i + 2, s:e] if i + 2 < k else zeros[:n]
                    x3 = delta[i + 3, s:e] if i + 3 < k else zeros[:n]
                    a0 = a1 = a2 = a3 = a4 = b0 = b1 = b2 = b3 = b4 = zero
                    c0 = c1 = c2 = c3 = c4 = d0 = d1 = d2 = d3 = d4 = zero
                    for c in range(n):
                        v0, v1, v2, v3 = x0[c], x1[c], x2[c], x3[c]
                        y0, y1, y2, y3, y4 = m0[c], m1[c], m2[c], m3[c], m4[c]
                        a0 += v0 * y0
                        a1 += v0 * y1
                        a2 += v0 * y2
                        a3 += v0 * y3
                        a4 += v0 * y4
                        b0 += v1 * y0
                        b1 += v1 * y1
                        b2 += v1 * y2
                        b3 += v1 * y3
                        b4 += v1 * y4
                        c0 += v2 * y0
                        c1 += v2 * y1
                        c2 += v2 * y2
                        c3 += v2 * y3
                        c4 += v2 * y4
                        d0 += v3 * y0
                        d1 += v3 * y1
                        d2 += v3 * y2
                        d3 += v3 * y3
                        d4 += v3 * y4
                    r[0, 0], r[0, 1], r[0, 2], r[0, 3], r[0, 4] = a0, a1, a2, a3, a4
                    r[1, 0], r[1, 1], r[1, 2], r[1, 3], r[1, 4] = b0, b1, b2, b3, b4
                    r[2, 0], r[2, 1], r[2, 2], r[2, 3], r[2, 4] = c0, c1, c2, c3, c4
                    r[3, 0], r[3, 1], r[3, 2], r[3, 3], r[3, 4] = d0, d1, d2, d3, d4
                    for a in range(min(CLIENTS, k - i)):
                        for b in range(min(MODELS, d - j)):
                            found = np.float64(r[a, b])
                            if not np.isfinite(found):
                                found = np.float64(0)
                                for c in range(s, e):
                                    found += np.float64(delta[i + a, c]) * models[j + b, c]
                            out[i + a, block, j + b] += found


@compiled
def add(coef: Array, delta: Array, segments: Array, total: Array) -> None:
    """total (d, P) float64 += sum_i coef (k, b, d) delta (k, P), block by block."""
    k, d = len(delta), len(total)
    zero, spare = np.zeros(TILE, delta.dtype), np.zeros(TILE)
    w = np.zeros((CLIENTS, MODELS))
    for q in range(len(segments)):
        block = segments[q, 2]
        for s in range(segments[q, 0], segments[q, 1], TILE):
            e = min(s + TILE, segments[q, 1])
            n = e - s
            for i in range(0, k, CLIENTS):
                x0 = delta[i, s:e]
                x1 = delta[i + 1, s:e] if i + 1 < k else zero[:n]
                x2 = delta[i + 2, s:e] if i + 2 < k else zero[:n]
                x3 = delta[i + 3, s:e] if i + 3 < k else zero[:n]
                for j in range(0, d, MODELS):
                    t0 = total[j, s:e]
                    t1 = total[j + 1, s:e] if j + 1 < d else spare[:n]
                    t2 = total[j + 2, s:e] if j + 2 < d else spare[:n]
                    t3 = total[j + 3, s:e] if j + 3 < d else spare[:n]
                    t4 = total[j + 4, s:e] if j + 4 < d else spare[:n]
                    for a in range(CLIENTS):
                        for b in range(MODELS):
                            there = i + a < k and j + b < d
                            w[a, b] = coef[i + a, block, j + b] if there else 0.0
                    a0, a1, a2, a3, a4 = w[0, 0], w[0, 1], w[0, 2], w[0, 3], w[0, 4]
                    b0, b1, b2, b3, b4 = w[1, 0], w[1, 1], w[1, 2], w[1, 3], w[1, 4]
                    c0, c1, c2, c3, c4 = w[2, 0], w[2, 1], w[2, 2], w[2, 3], w[2, 4]
                    d0, d1, d2, d3, d4 = w[3, 0], w[3, 1], w[3, 2], w[3, 3], w[3, 4]
                    if j + MODELS <= d:
                        for c in range(n):
                            v0, v1 = np.float64(x0[c]), np.float64(x1[c])
                            v2, v3 = np.float64(x2[c]), np.float64(x3[c])
                            t0[c] += a0 * v0 + b0 * v1 + c0 * v2 + d0 * v3
                            t1[c] += a1 * v0 + b1 * v1 + c1 * v2 + d1 * v3
                            t2[c] += a2 * v0 + b2 * v1 + c2 * v2 + d2 * v3
                            t3[c] += a3 * v0 + b3 * v1 + c3 * v2 + d3 * v3
                            t4[c] += a4 * v0 + b4 * v1 + c4 * v2 + d4 * v3
                    else:
                        # Dummies would be the same memory, which is not worth vectorising.
                        for b in range(d - j):
                            t = total[j + b, s:e]
                            a0, b0, c0, d0 = w[0, b], w[1, b], w[2, b], w[3, b]
                            for c in range(n):
                                v0, v1 = np.float64(x0[c]), np.float64(x1[c])
                                v2, v3 = np.float64(x2[c]), np.float64(x3[c])
                                t[c] += a0 * v0 + b0 * v1 + c0 * v2 + d0 * v3


@compiled
def step(
    models: Array, total: Array, mass: Array, segments: Array, n_params: int, out: Array
) -> None:
    """out (d, P) = models - total / mass, for buffers total / mass; unused models stay."""
    for q in range(len(segments)):
        block = segments[q, 2]
        # No segment may hold both parameters and buffers: the caller cuts there.
        buffers = segments[q, 0] >= n_params
        for s in range(segments[q, 0], segments[q, 1], TILE):
            e = min(s + TILE, segments[q, 1])
            for j in range(len(models)):
                own, t, o, by = models[j, s:e], total[j, s:e], out[j, s:e], mass[block, j]
                if not by > 0:
                    for c in range(e - s):
                        o[c] = own[c]
                elif buffers:
                    for c in range(e - s):
                        o[c] = t[c] / by
                else:
                    for c in range(e - s):
                        o[c] = own[c] - t[c] / by


@compiled
def sketch(delta: Array, sign: Array, turn: Array, start: int, size: int, out: Array) -> None:
    """out (k, size) += chunks of `size` columns, with signs, each turned round by its own number.

    delta (k, P); the columns are those from `start` on, sign (n,) and turn (chunks,) of them.
    """
    k, n = len(delta), len(sign)
    sums = np.zeros((k, 2 * size), out.dtype)
    for chunk in range(len(turn)):
        s = chunk * size
        m = min(size, n - s)
        g = sign[s : s + m]
        for i in range(k):
            x = delta[i, start + s : start + s + m]
            t = sums[i, turn[chunk] : turn[chunk] + m]
            for c in range(m):
                t[c] += x[c] * g[c]
    for i in range(k):
        for c in range(size):
            out[i, c] += sums[i, c] + sums[i, c + size]


@compiled
def finite(delta: Array, out: Array) -> None:
    """out (k,) bool: whether all of delta (k, P) is finite."""
    for i in range(len(delta)):
        x = delta[i]
        total = x[:1].sum() * 0
        for c in range(len(x)):
            total += x[c] * 0
        out[i] = total == 0
