"""Makes bench/kernels/triton: the kernels that ours are compared with, compiled by Triton for sm_80 without a GPU.

    python tools/triton_kernels.py [name ...]      # needs torch (CPU), triton 3.x, numpy

`npm run bench:kernels` reads what this writes and counts it as it counts ours; nothing is computed here. index.json has
the form of test/fixtures/triton's, with buffers of any contents instead of files, so native/emulator/test/foreign_test.cpp
can launch it.
"""

import json
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton_fixtures import TYPE_NAMES, Case, ceil_div, index_text

ROOT = Path(__file__).resolve().parent.parent / "bench" / "kernels" / "triton"


@triton.jit
def matmul(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    """c (M, N) = a (M, K) b^T, b (N, K), as in Triton's tutorial: rows wrap around instead of masks, K in whole
    slices, blocks in groups that share columns in the L2 cache."""
    block = tl.program_id(0)
    rows_of_blocks, columns_of_blocks = tl.cdiv(M, BM), tl.cdiv(N, BN)
    group = block // (GROUP * columns_of_blocks)
    first = group * GROUP
    height = tl.minimum(rows_of_blocks - first, GROUP)
    row = first + (block % (GROUP * columns_of_blocks)) % height
    column = (block % (GROUP * columns_of_blocks)) // height
    rows = (row * BM + tl.arange(0, BM)) % M
    cols = (column * BN + tl.arange(0, BN)) % N
    ks = tl.arange(0, BK)
    a += rows[:, None] * K + ks[None, :]
    b += cols[None, :] * K + ks[:, None]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for _ in range(0, K, BK):
        acc = tl.dot(tl.load(a), tl.load(b), acc)
        a += BK
        b += BK
    rows = row * BM + tl.arange(0, BM)
    cols = column * BN + tl.arange(0, BN)
    inside = (rows[:, None] < M) & (cols[None, :] < N)
    tl.store(c + rows[:, None] * N + cols[None, :], acc.to(c.dtype.element_ty), mask=inside)


@triton.jit
def flash_attention(
    q,
    k,
    v,
    out,
    length,
    row,
    scale,
    CAUSAL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    D: tl.constexpr,
):
    """(length, heads, D): q, k and v are rows `row` apart. Tiles without a mask first, then those that need one."""
    block = tl.program_id(0)
    head = tl.program_id(1) * D
    rows = block * BM + tl.arange(0, BM)
    d = tl.arange(0, D)
    qs = tl.load(q + head + rows[:, None] * row + d[None, :], mask=rows[:, None] < length, other=0.0)
    scale *= 1.4426950408889634
    top = tl.full([BM], -float("inf"), dtype=tl.float32)
    total = tl.zeros([BM], dtype=tl.float32)
    acc = tl.zeros([BM, D], dtype=tl.float32)
    whole = (block * BM if CAUSAL else length) // BN * BN
    end = tl.minimum((block + 1) * BM, length) if CAUSAL else length
    for start in range(0, whole, BN):
        cols = start + tl.arange(0, BN)
        s = tl.dot(qs, tl.load(k + head + cols[None, :] * row + d[:, None]))
        new_top = tl.maximum(top, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        vs = tl.load(v + head + cols[:, None] * row + d[None, :])
        acc = tl.dot(p.to(q.dtype.element_ty), vs, acc * shrink[:, None])
        top = new_top
    for start in range(whole, end, BN):
        cols = start + tl.arange(0, BN)
        s = tl.dot(
            qs, tl.load(k + head + cols[None, :] * row + d[:, None], mask=cols[None, :] < length, other=0.0)
        )
        seen = cols[None, :] < length
        if CAUSAL:
            seen = seen & (rows[:, None] >= cols[None, :])
        s = tl.where(seen, s * scale, -float("inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        vs = tl.load(v + head + cols[:, None] * row + d[None, :], mask=cols[:, None] < length, other=0.0)
        acc = tl.dot(p.to(q.dtype.element_ty), vs, acc * shrink[:, None])
        top = new_top
    width = tl.num_programs(1) * D
    acc = acc / total[:, None]
    where = out + head + rows[:, None] * width + d[None, :]
    tl.store(where, acc.to(q.dtype.element_ty), mask=rows[:, None] < length)


@triton.jit
def softmax(out, x, n_cols, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < n_cols
    v = tl.load(x + row * n_cols + cols, mask=mask, other=-float("inf"))
    e = tl.exp(v - tl.max(v, axis=0))
    tl.store(out + row * n_cols + cols, e / tl.sum(e, axis=0), mask=mask)


@triton.jit
def layer_norm(out, x, weight, bias, n_cols, eps, BLOCK: tl.constexpr):
    """A row in registers, read once."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < n_cols
    v = tl.load(x + row * n_cols + cols, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(v, axis=0) / n_cols
    centred = tl.where(mask, v - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, axis=0) / n_cols + eps)
    y = centred * rstd * tl.load(weight + cols, mask=mask) + tl.load(bias + cols, mask=mask)
    tl.store(out + row * n_cols + cols, y.to(out.dtype.element_ty), mask=mask)


class Peer(Case):
    """`op` and `size` say what of ours it stands beside; buffers have shapes and no contents."""

    def __init__(self, name, op, kernel, grid, args, constexprs, warps, stages, work):
        super().__init__(name, kernel, grid, args, constexprs, warps, stages)
        self.op, self.work = op, work

    def write(self):
        least, flops = self.work
        entry = super().write(ROOT)
        return {"name": self.name, "op": self.op, "bytes": least, "tensorFlops": flops, **entry}

    def tensor(self, name, kind, value):
        return {"kind": "buffer", "dtype": TYPE_NAMES[value.dtype], "shape": list(value.shape)}


def buffer(*shape, dtype=torch.bfloat16):
    return ("in", torch.empty(shape, dtype=dtype, device="meta"))


def matmul_peer(name, m, n, k, tile, warps, stages):
    bm, bn, bk = tile
    args = {"a": buffer(m, k), "b": buffer(n, k), "c": buffer(m, n)}
    args |= {"M": ("i32", m), "N": ("i32", n), "K": ("i32", k)}
    grid = (ceil_div(m, bm) * ceil_div(n, bn), 1, 1)
    work = (2 * (m * k + n * k + m * n), 2 * m * n * k)
    return Peer(
        name, "linear", matmul, grid, args, {"BM": bm, "BN": bn, "BK": bk, "GROUP": 8}, warps, stages, work
    )


def attention_peer(name, length, heads, d, causal, tile, warps, stages):
    bm, bn = tile
    row = 3 * heads * d
    args = {"q": buffer(length, row), "k": buffer(length, row), "v": buffer(length, row)}
    args |= {"out": buffer(length, heads * d), "length": ("i32", length), "row": ("i32", row)}
    args["scale"] = ("f32", d**-0.5)
    constexprs = {"CAUSAL": causal, "BM": bm, "BN": bn, "D": d}
    pairs = length * (length + 1) // 2 if causal else length * length
    work = (2 * 4 * length * heads * d, 4 * pairs * heads * d)
    grid = (ceil_div(length, bm), heads, 1)
    return Peer(name, "attention", flash_attention, grid, args, constexprs, warps, stages, work)


def peers():
    # Gemma-2B's gate and up projection over a prefill of 1,024 tokens, in the tiles that ours have.
    size = (1024, 32768, 2048)
    yield matmul_peer("matmul_128x128x32", *size, (128, 128, 32), 4, 4)
    yield matmul_peer("matmul_128x128x32_8w", *size, (128, 128, 32), 8, 4)
    yield matmul_peer("matmul_128x64x32", *size, (128, 64, 32), 4, 4)
    yield matmul_peer("matmul_64x64x32", *size, (64, 64, 32), 4, 4)
    # A decode step of 16 sequences or fewer: Triton's smallest tile of rows.
    yield matmul_peer("matmul_16x64x128", 16, 32768, 2048, (16, 64, 128), 4, 4)

    # CLIP-L/14-336, and the prefill of Vicuna-7B and Gemma-2B (whose keys Triton would read once a query head too).
    yield attention_peer("flash_attention_64", 577, 16, 64, False, (128, 64), 4, 3)
    yield attention_peer("flash_attention_128", 1024, 32, 128, True, (128, 64), 8, 3)
    yield attention_peer("flash_attention_256", 1024, 8, 256, True, (64, 32), 4, 2)

    # SDXL's VAE, shorter: of several tiles the one with the fewest stall cycles, in more memory than sm_86 has.
    yield attention_peer("flash_attention_512", 1024, 1, 512, False, (64, 32), 8, 2)

    f32 = torch.float32
    args = {"out": buffer(9232, 577, dtype=f32), "x": buffer(9232, 577, dtype=f32), "n_cols": ("i32", 577)}
    work = (2 * 4 * 9232 * 577, 0)
    yield Peer("softmax_577", "softmax", softmax, (9232, 1, 1), args, {"BLOCK": 1024}, 4, 2, work)
    args = {"out": buffer(577, 1024), "x": buffer(577, 1024), "weight": buffer(1024, dtype=f32)}
    args |= {"bias": buffer(1024, dtype=f32), "n_cols": ("i32", 1024), "eps": ("f32", 1e-5)}
    work = (2 * 2 * 577 * 1024 + 2 * 4 * 1024, 0)
    yield Peer("layer_norm_1024", "layerNorm", layer_norm, (577, 1, 1), args, {"BLOCK": 1024}, 4, 2, work)


def main(wanted):
    ROOT.mkdir(parents=True, exist_ok=True)
    index_file = ROOT / "index.json"
    old = {c["name"]: c for c in json.loads(index_file.read_text())["cases"]} if wanted else {}
    made = []
    for peer in peers():
        made.append(peer.write() if not wanted or peer.name in wanted else old[peer.name])
        print(f"{peer.name}: {made[-1]['block'][0]} threads, {made[-1]['shared']} bytes shared")
    index_file.write_text(index_text(made))


if __name__ == "__main__":
    main(sys.argv[1:])
