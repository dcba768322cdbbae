"""Makes test/fixtures/triton: PTX that Triton compiled for sm_80, small inputs, and PyTorch's results.

Foreign code for the emulator: native/emulator/test/foreign_test.cpp runs it. No GPU is needed here.

    python tools/triton_fixtures.py [name ...]     # needs torch (CPU), triton 3.x, numpy

With names, only those kernels are made anew; index.json keeps the others.
"""

import json
import math
import os
import re
import sys
from pathlib import Path

os.environ["TRITON_DISABLE_LINE_INFO"] = "1"

import numpy as np
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language.extra import libdevice

ROOT = Path(__file__).resolve().parent.parent / "test" / "fixtures" / "triton"
PTX_VERSION = 84  # a CUDA 12.4 driver loads it


# Kernels


@triton.jit
def softmax(out, x, n_cols, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < n_cols
    v = tl.load(x + row * n_cols + cols, mask=mask, other=-float("inf"))
    e = tl.exp(v - tl.max(v, axis=0))
    tl.store(out + row * n_cols + cols, e / tl.sum(e, axis=0), mask=mask)


@triton.jit
def layer_norm(out, x, weight, bias, mean_out, n_cols, eps, BLOCK: tl.constexpr):
    """Blocks of columns in a loop, f16 in and out."""
    row = tl.program_id(0)
    x += row * n_cols
    out += row * n_cols
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, n_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        total += tl.load(x + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=0) / n_cols
    square = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, n_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        v = tl.load(x + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
        v = tl.where(cols < n_cols, v - mean, 0.0)
        square += v * v
    rstd = 1 / tl.sqrt(tl.sum(square, axis=0) / n_cols + eps)
    tl.store(mean_out + row, mean)
    for start in range(0, n_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < n_cols
        v = (tl.load(x + cols, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
        w = tl.load(weight + cols, mask=mask)
        b = tl.load(bias + cols, mask=mask)
        tl.store(out + cols, v * w + b, mask=mask)


@triton.jit
def matmul(a, b, c, M, N, K, ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """a (M, K), b (K, N), c (M, N), all row-major."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    ks = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), dtype=ACC)
    for k in range(0, K, BK):
        x = tl.load(
            a + rows[:, None] * K + (k + ks)[None, :],
            mask=(rows[:, None] < M) & ((k + ks)[None, :] < K),
            other=0,
        )
        y = tl.load(
            b + (k + ks)[:, None] * N + cols[None, :],
            mask=((k + ks)[:, None] < K) & (cols[None, :] < N),
            other=0,
        )
        acc = tl.dot(x, y, acc, input_precision="tf32")
    tl.store(
        c + rows[:, None] * N + cols[None, :],
        acc.to(c.dtype.element_ty),
        mask=(rows[:, None] < M) & (cols[None, :] < N),
    )


@triton.jit
def matmul_nt(a, b, c, M, N, K, ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """The same with b (N, K)."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    ks = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), dtype=ACC)
    for k in range(0, K, BK):
        x = tl.load(
            a + rows[:, None] * K + (k + ks)[None, :],
            mask=(rows[:, None] < M) & ((k + ks)[None, :] < K),
            other=0,
        )
        y = tl.load(
            b + cols[None, :] * K + (k + ks)[:, None],
            mask=((k + ks)[:, None] < K) & (cols[None, :] < N),
            other=0,
        )
        acc = tl.dot(x, y, acc, input_precision="tf32")
    tl.store(
        c + rows[:, None] * N + cols[None, :],
        acc.to(c.dtype.element_ty),
        mask=(rows[:, None] < M) & (cols[None, :] < N),
    )


@triton.jit
def flash_attention(q, k, v, out, length, scale, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr):
    """Causal, (heads, length, D)."""
    block = tl.program_id(0)
    base = tl.program_id(1) * length * D
    rows = block * BM + tl.arange(0, BM)
    d = tl.arange(0, D)
    qs = tl.load(q + base + rows[:, None] * D + d[None, :], mask=rows[:, None] < length, other=0.0)
    top = tl.full([BM], -float("inf"), dtype=tl.float32)
    total = tl.zeros([BM], dtype=tl.float32)
    acc = tl.zeros([BM, D], dtype=tl.float32)
    for start in range(0, tl.minimum((block + 1) * BM, length), BN):
        cols = start + tl.arange(0, BN)
        ks = tl.load(k + base + cols[None, :] * D + d[:, None], mask=cols[None, :] < length, other=0.0)
        s = tl.dot(qs, ks) * (scale * 1.4426950408889634)
        s = tl.where((rows[:, None] >= cols[None, :]) & (cols[None, :] < length), s, -float("inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        vs = tl.load(v + base + cols[:, None] * D + d[None, :], mask=cols[:, None] < length, other=0.0)
        acc = tl.dot(p.to(tl.float16), vs, acc * shrink[:, None])
        top = new_top
    acc = acc / total[:, None]
    tl.store(out + base + rows[:, None] * D + d[None, :], acc.to(tl.float16), mask=rows[:, None] < length)


@triton.jit
def histogram_atomic(values, counts, sums, largest, n, BLOCK: tl.constexpr):
    """Per bin (value mod 16): how many, sum as f32, largest; one atomic per element and result."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    v = tl.load(values + i, mask=mask, other=0)
    bin = v & 15
    tl.atomic_add(counts + bin, 1, mask=mask)
    tl.atomic_add(sums + bin, v.to(tl.float32), mask=mask)
    tl.atomic_max(largest + bin, v, mask=mask)


@triton.jit
def histogram_shared(values, counts, n, BLOCK: tl.constexpr):
    """tl.histogram: atomics in shared memory, then one to global memory per bin."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    v = tl.load(values + i, mask=mask, other=0)
    h = tl.histogram(v & 15, 16, mask=mask)
    tl.atomic_add(counts + tl.arange(0, 16), h)


@triton.jit
def prefix_scan(x, sums, largest, n_cols, BLOCK: tl.constexpr):
    """Inclusive sum (i32) and reversed running maximum of each row."""
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < n_cols
    v = tl.load(x + row * n_cols + cols, mask=mask, other=0)
    tl.store(sums + row * n_cols + cols, tl.cumsum(v, axis=0), mask=mask)
    v = tl.where(mask, v, -2147483648)
    tl.store(largest + row * n_cols + cols, tl.associative_scan(v, 0, _larger, reverse=True), mask=mask)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def sort_rows(x, out, best, n_rows, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Bitonic sort of each row, and the index of its largest element."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    mask = rows[:, None] < n_rows
    v = tl.load(x + rows[:, None] * COLS + cols[None, :], mask=mask, other=0.0)
    tl.store(out + rows[:, None] * COLS + cols[None, :], tl.sort(v), mask=mask)
    tl.store(best + rows, tl.argmax(v, 1), mask=rows < n_rows)


@triton.jit
def gelu(x, out, n, BLOCK: tl.constexpr):
    """erf of libdevice on bf16."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(out + i, (0.5 * v * (1 + tl.erf(v * 0.7071067811865476))).to(tl.bfloat16), mask=i < n)


@triton.jit
def column_sum_lock(x, out, lock, n_rows, n_cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Blocks add their partial sums under a spin lock, as the layer norm tutorial does."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    mask = cols < n_cols
    v = tl.load(
        x + rows[:, None] * n_cols + cols[None, :], mask=(rows[:, None] < n_rows) & mask[None, :], other=0.0
    )
    part = tl.sum(v, axis=0)
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    part += tl.load(out + cols, mask=mask)
    tl.store(out + cols, part, mask=mask)
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0)


@triton.jit
def elementary(x, y, out, n, BLOCK: tl.constexpr):
    """out (6, n): of libdevice, then correctly rounded; sin and cos of large x reduce in local memory."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    a = tl.load(x + i, mask=mask, other=1.0)
    b = tl.load(y + i, mask=mask, other=1.0)
    tl.store(out + i, libdevice.sin(a), mask=mask)
    tl.store(out + n + i, libdevice.cos(a), mask=mask)
    tl.store(out + 2 * n + i, libdevice.log(b), mask=mask)
    tl.store(out + 3 * n + i, libdevice.tanh(b - 1), mask=mask)
    tl.store(out + 4 * n + i, tl.sqrt_rn(b), mask=mask)
    tl.store(out + 5 * n + i, tl.div_rn(a, b), mask=mask)


@triton.jit
def divide_i64(x, y, quotient, rest, n, BLOCK: tl.constexpr):
    """C's division of 64-bit integers: long inline code, 32-bit where both fit."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    a = tl.load(x + i, mask=mask, other=1)
    b = tl.load(y + i, mask=mask, other=1)
    tl.store(quotient + i, a // b, mask=mask)
    tl.store(rest + i, a % b, mask=mask)


@triton.jit
def philox(out, seed, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.randint(seed, i).to(tl.int32, bitcast=True), mask=i < n)


@triton.jit
def split_k(a, b, c, M, N, K, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """f16 atomics gather the parts of one product."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.arange(0, BN)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(tl.program_id(1) * BK, K, PARTS * BK):
        ks = k + tl.arange(0, BK)
        x = tl.load(
            a + rows[:, None] * K + ks[None, :], mask=(rows[:, None] < M) & (ks[None, :] < K), other=0
        )
        y = tl.load(
            b + ks[:, None] * N + cols[None, :], mask=(ks[:, None] < K) & (cols[None, :] < N), other=0
        )
        acc = tl.dot(x, y, acc)
    mask = (rows[:, None] < M) & (cols[None, :] < N)
    tl.atomic_add(c + rows[:, None] * N + cols[None, :], acc.to(tl.float16), mask=mask, sem="relaxed")


# Cases

TRITON_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.int8: "i8",
}
TYPE_NAMES = {t: str(t).removeprefix("torch.") for t in TRITON_TYPES}


class Case:
    """One kernel with its arguments, in the order of the Python signature.

    args: name -> ("in", tensor) | ("out", expected, atol, rtol[, initial]) | ("i32", n) | ("f32", x)
    """

    def __init__(self, name, kernel, grid, args, constexprs, warps=4, stages=2, line_info=False):
        self.name, self.kernel, self.grid, self.args = name, kernel, grid, args
        self.constexprs, self.warps, self.stages, self.line_info = constexprs, warps, stages, line_info

    def compile(self):
        signature, constexprs, attrs = {}, dict(self.constexprs), {}
        for i, name in enumerate(self.kernel.arg_names):
            if name in self.constexprs:
                signature[name] = "constexpr"
                continue
            kind, value = self.args[name][:2]
            if kind in ("in", "out"):
                signature[name] = "*" + TRITON_TYPES[value.dtype]
                attrs[(i,)] = [["tt.divisibility", 16]]
            else:
                signature[name] = {"i32": "i32", "f32": "fp32"}[kind]
                # The JIT tells the compiler so; cp.async and vector accesses depend on it.
                if kind == "i32" and value % 16 == 0:
                    attrs[(i,)] = [["tt.divisibility", 16]]
        knobs.compilation.disable_line_info = not self.line_info
        return triton.compile(
            ASTSource(fn=self.kernel, signature=signature, constexprs=constexprs, attrs=attrs),
            target=GPUTarget("cuda", 80, 32),
            options={"num_warps": self.warps, "num_stages": self.stages, "ptx_version": PTX_VERSION},
        )

    def write(self, root=ROOT):
        """Writes the PTX and gives the kernel's entry in index.json."""
        compiled = self.compile()
        ptx, meta = without_folders(compiled.asm["ptx"]), compiled.metadata
        entry = re.search(r"\.visible \.entry (\w+)\((.*?)\)", ptx, re.DOTALL)
        assert entry and entry[1] == meta.name
        declared = len(re.findall(r"\.param", entry[2]))
        # Trailing pointers to scratch memory: none of these kernels has any, so they are null.
        assert not meta.global_scratch_size and not meta.profile_scratch_size and meta.num_ctas == 1
        (root / f"{self.name}.ptx").write_text(ptx)
        params = []
        for name in self.kernel.arg_names:
            if name in self.constexprs:
                continue
            kind, value, *rest = self.args[name]
            if kind in ("i32", "f32"):
                params.append({"name": name, "kind": kind, "value": value})
            else:
                params.append({"name": name, **self.tensor(name, kind, value, *rest)})
        params += [{"name": f"scratch{i}", "kind": "null"} for i in range(declared - len(params))]
        return {
            "name": self.name,
            "ptx": f"{self.name}.ptx",
            "kernel": meta.name,
            "grid": list(self.grid),
            "block": [32 * meta.num_warps, 1, 1],
            "shared": meta.shared,
            "params": params,
        }

    def tensor(self, name, kind, value, *rest):
        """What index.json says of a tensor, whose elements go to a file."""
        file = f"{self.name}.{name}.bin"
        write_tensor(file, value)
        p = {"kind": kind, "dtype": TYPE_NAMES[value.dtype], "shape": list(value.shape), "file": file}
        if kind == "out":
            p["atol"], p["rtol"] = rest[0], rest[1]
            if len(rest) > 2:
                p["initial"] = f"{self.name}.{name}.initial.bin"
                write_tensor(p["initial"], rest[2])
        return p


def without_folders(ptx):
    """Debug sections name this machine's folders: `.file` lines keep the base name, the folder of the compile
    unit (one .b8 a character) becomes as many dots."""
    ptx = re.sub(r'(\.file\s+\d+ ")[^"]*/', r"\1", ptx)
    folder = str(Path(__file__).resolve().parent)
    spelled = "".join(rf"(\.b8 ){ord(c)}(\b[^\n]*\n)" for c in folder)
    ptx = re.sub(spelled, lambda m: "".join(f".b8 46{m[i]}" for i in range(2, m.re.groups + 1, 2)), ptx)
    assert folder not in ptx and not re.search(spelled, ptx) and "site-packages" not in ptx
    return ptx


def write_tensor(file, tensor):
    """Raw little-endian elements, row-major."""
    (ROOT / file).write_bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())


def normal(rng, *shape, dtype=torch.float32, scale=1.0):
    return torch.from_numpy((rng.standard_normal(shape) * scale).astype(np.float32)).to(dtype)


def integers(rng, low, high, *shape, dtype=torch.int32):
    return torch.from_numpy(rng.integers(low, high, shape, dtype=np.int32)).to(dtype)


def ceil_div(a, b):
    return -(-a // b)


def tf32(x, ptx):
    """The operand as the tensor core sees it: rounded where the PTX has cvt.rna, else cut to 10 bits."""
    bits = x.view(torch.int32)
    if "cvt.rna.tf32" in ptx:
        bits = bits + 0x1000
    return (bits & ~0x1FFF).view(torch.float32)


def matmul_case(name, rng, kernel, dtype, m, n, k, tile, warps, stages, out=torch.float32):
    nt = kernel is matmul_nt
    if dtype == torch.int8:
        a, b = (
            integers(rng, -128, 128, m, k, dtype=dtype),
            integers(rng, -128, 128, *((n, k) if nt else (k, n)), dtype=dtype),
        )
        acc = tl.int32
    else:
        a, b = normal(rng, m, k, dtype=dtype), normal(rng, *((n, k) if nt else (k, n)), dtype=dtype)
        acc = tl.float32
    bm, bn, bk = tile
    constexprs = {"ACC": acc, "BM": bm, "BN": bn, "BK": bk}
    grid = (ceil_div(m, bm), ceil_div(n, bn), 1)

    def case(expected, atol, rtol):
        args = {
            "a": ("in", a),
            "b": ("in", b),
            "c": ("out", expected, atol, rtol),
            "M": ("i32", m),
            "N": ("i32", n),
            "K": ("i32", k),
        }
        return Case(name, kernel, grid, args, constexprs, warps, stages)

    right = b.T if nt else b
    if dtype == torch.int8:
        return case(torch.matmul(a.int(), right.int()), 0, 0)
    exact = torch.matmul(a.double(), right.double())
    bound = float(torch.matmul(a.double().abs(), right.double().abs()).max())
    if dtype == torch.float32:
        ptx = case(exact.float(), 0, 0).compile().asm["ptx"]
        seen = torch.matmul(tf32(a, ptx).double(), tf32(right.contiguous(), ptx).double())
        # PyTorch's own f32 product lies within what tf32 loses, two operands of 2^-10 at worst.
        assert float((seen - torch.matmul(a, right)).abs().max()) <= bound * 2**-9
        exact = seen
    # Tensor cores may cut each addition below 24 bits: k terms of at most `bound` in all.
    atol = bound * 2**-22 * math.sqrt(k)
    expected = exact.to(out)
    rtol = {torch.float32: 0.0, torch.float16: 2**-10, torch.bfloat16: 2**-7}[out]
    return case(expected, atol, rtol)


def cases():
    rng = np.random.default_rng(20)

    x = normal(rng, 5, 781, scale=3)
    x[2] = -torch.arange(781) * 0.5  # most terms underflow
    x[3, 5:] = -float("inf")
    yield Case(
        "softmax",
        softmax,
        (5, 1, 1),
        {"out": ("out", torch.softmax(x, -1), 1e-7, 1e-5), "x": ("in", x), "n_cols": ("i32", 781)},
        {"BLOCK": 1024},
        warps=8,
        line_info=True,
    )

    x = normal(rng, 4, 333, dtype=torch.float16, scale=2) + 1
    weight, bias = normal(rng, 333), normal(rng, 333)
    expected = torch.nn.functional.layer_norm(x.float(), (333,), weight, bias, 1e-5)
    yield Case(
        "layer_norm",
        layer_norm,
        (4, 1, 1),
        {
            "out": ("out", expected.half(), 1e-5, 2**-10),
            "x": ("in", x),
            "weight": ("in", weight),
            "bias": ("in", bias),
            "mean_out": ("out", x.float().mean(-1), 1e-6, 1e-6),
            "n_cols": ("i32", 333),
            "eps": ("f32", 1e-5),
        },
        {"BLOCK": 128},
    )

    tile = (64, 64, 32)
    yield matmul_case("matmul_f16", rng, matmul, torch.float16, 70, 80, 112, tile, 4, 3, torch.float16)
    yield matmul_case("matmul_bf16", rng, matmul, torch.bfloat16, 67, 96, 80, tile, 4, 2)
    yield matmul_case(
        "matmul_bf16_odd", rng, matmul, torch.bfloat16, 35, 37, 75, (32, 32, 32), 2, 2, torch.bfloat16
    )
    yield matmul_case("matmul_f16_nt", rng, matmul_nt, torch.float16, 40, 75, 144, (32, 64, 32), 4, 4)
    yield matmul_case("matmul_tf32", rng, matmul, torch.float32, 65, 69, 75, tile, 4, 3)
    yield matmul_case("matmul_int8", rng, matmul, torch.int8, 71, 80, 144, tile, 4, 3)
    yield matmul_case("matmul_int8_nt", rng, matmul_nt, torch.int8, 66, 67, 160, tile, 4, 2)

    heads, length, d = 2, 100, 64
    q, k, v = (normal(rng, heads, length, d, dtype=torch.float16) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=True
    )
    yield Case(
        "flash_attention",
        flash_attention,
        (ceil_div(length, 64), heads, 1),
        {
            # Probabilities are rounded to f16 before the second product.
            "q": ("in", q),
            "k": ("in", k),
            "v": ("in", v),
            "out": ("out", expected.half(), float(v.abs().max()) * 2**-11, 2**-10),
            "length": ("i32", length),
            "scale": ("f32", d**-0.5),
        },
        {"BM": 64, "BN": 32, "D": d},
        stages=3,
    )

    n = 1003
    v = integers(rng, 0, 1 << 12, n)
    bins = (v & 15).long()
    counts = torch.bincount(bins, minlength=16).int()
    sums = torch.zeros(16).scatter_add(0, bins, v.float())  # whole numbers under 2^24: exact in any order
    largest = torch.full((16,), -1, dtype=torch.int32).scatter_reduce(0, bins, v, "amax")
    yield Case(
        "histogram_atomic",
        histogram_atomic,
        (ceil_div(n, 256), 1, 1),
        {
            "values": ("in", v),
            "counts": ("out", counts, 0, 0, torch.zeros_like(counts)),
            "sums": ("out", sums, 0, 0, torch.zeros_like(sums)),
            "largest": ("out", largest, 0, 0, torch.full_like(largest, -1)),
            "n": ("i32", n),
        },
        {"BLOCK": 256},
    )
    yield Case(
        "histogram_shared",
        histogram_shared,
        (ceil_div(n, 512), 1, 1),
        {"values": ("in", v), "counts": ("out", counts, 0, 0, torch.zeros_like(counts)), "n": ("i32", n)},
        {"BLOCK": 512},
    )

    x = integers(rng, -1000, 1000, 3, 501)
    yield Case(
        "prefix_scan",
        prefix_scan,
        (3, 1, 1),
        {
            "x": ("in", x),
            "sums": ("out", x.cumsum(-1).int(), 0, 0),
            "largest": ("out", x.flip(-1).cummax(-1).values.flip(-1), 0, 0),
            "n_cols": ("i32", 501),
        },
        {"BLOCK": 512},
    )

    x = normal(rng, 7, 64)
    yield Case(
        "sort_rows",
        sort_rows,
        (2, 1, 1),
        {
            "x": ("in", x),
            "out": ("out", x.sort(-1).values, 0, 0),
            "best": ("out", x.argmax(-1).int(), 0, 0),
            "n_rows": ("i32", 7),
        },
        {"ROWS": 4, "COLS": 64},
    )

    x = normal(rng, 777, dtype=torch.bfloat16, scale=2)
    yield Case(
        "gelu_bf16",
        gelu,
        (ceil_div(777, 512), 1, 1),
        {
            "x": ("in", x),
            "out": ("out", torch.nn.functional.gelu(x.float()).bfloat16(), 1e-6, 2**-7),
            "n": ("i32", 777),
        },
        {"BLOCK": 512},
    )

    x = integers(rng, -50, 50, 61, 77).float()
    yield Case(
        "column_sum_lock",
        column_sum_lock,
        (ceil_div(61, 16), 1, 1),
        {
            "x": ("in", x),
            "out": ("out", x.sum(0), 0, 0, torch.zeros(77)),
            "lock": ("out", torch.zeros(1, dtype=torch.int32), 0, 0, torch.zeros(1, dtype=torch.int32)),
            "n_rows": ("i32", 61),
            "n_cols": ("i32", 77),
        },
        {"ROWS": 16, "COLS": 128},
    )

    x = normal(rng, 150, scale=10)
    x[::3] *= 1e7
    y = normal(rng, 150).abs() + 0.01
    # 5e-7: four units in the last place of 1, more than CUDA documents for any of them.
    functions = [x.double().sin(), x.double().cos(), y.double().log(), (y - 1).double().tanh()]
    exact = [y.sqrt(), x / y]
    expected = torch.stack([f.float() for f in functions] + exact)
    args = {"x": ("in", x), "y": ("in", y), "out": ("out", expected, 5e-7, 2e-7), "n": ("i32", 150)}
    yield Case("elementary", elementary, (2, 1, 1), args, {"BLOCK": 128})

    x = torch.from_numpy(rng.integers(-(2**62), 2**62, 140)) >> torch.arange(140) % 60
    y = (torch.from_numpy(rng.integers(1, 2**62, 140)) >> torch.arange(140) * 7 % 61).clamp(min=1)
    y[::5] *= -1
    args = {
        "x": ("in", x),
        "y": ("in", y),
        "quotient": ("out", torch.div(x, y, rounding_mode="trunc"), 0, 0),
        "rest": ("out", torch.fmod(x, y), 0, 0),
        "n": ("i32", 140),
    }
    yield Case("divide_i64", divide_i64, (2, 1, 1), args, {"BLOCK": 128})

    seed, n = 0x1234567, 300
    args = {"out": ("out", philox_numbers(seed, n), 0, 0), "seed": ("i32", seed), "n": ("i32", n)}
    yield Case("philox", philox, (3, 1, 1), args, {"BLOCK": 128})

    # Small whole numbers: every partial sum is exact in f16.
    a, b = integers(rng, -2, 3, 45, 200).half(), integers(rng, -2, 3, 200, 32).half()
    c = torch.matmul(a.double(), b.double()).half()
    args = {
        "a": ("in", a),
        "b": ("in", b),
        "c": ("out", c, 0, 0, torch.zeros_like(c)),
        "M": ("i32", 45),
        "N": ("i32", 32),
        "K": ("i32", 200),
    }
    yield Case("split_k_f16", split_k, (2, 3, 1), args, {"PARTS": 3, "BM": 32, "BN": 32, "BK": 32}, 4, 2)

    yield matmul_case(
        "matmul_opt_in", rng, matmul, torch.float16, 33, 48, 272, (64, 64, 64), 8, 5, torch.float16
    )


def philox_numbers(seed, n):
    """First word of Philox4x32-10 (Salmon et al. 2011) with key (seed, 0) and counters (i, 0, 0, 0)."""
    numbers = []
    for i in range(n):
        c, k = [i, 0, 0, 0], [seed, 0]
        for _ in range(10):
            p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            low = 0xFFFFFFFF
            c = [(q >> 32) ^ c[1] ^ k[0], q & low, (p >> 32) ^ c[3] ^ k[1], p & low]
            k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
        numbers.append(c[0])
    return torch.from_numpy(np.array(numbers, dtype=np.uint32).view(np.int32))


def main(wanted):
    ROOT.mkdir(parents=True, exist_ok=True)
    index_file = ROOT / "index.json"
    old = {}
    if wanted:
        old = {c["name"]: c for c in json.loads(index_file.read_text())["cases"]}
    else:
        for file in ROOT.iterdir():
            file.unlink()
    made = []
    for case in cases():
        if wanted and case.name not in wanted:
            if case.name in old:
                made.append(old[case.name])
            continue
        made.append(case.write())
        ptx = (ROOT / f"{case.name}.ptx").read_text()
        ops = sorted({m for m in re.findall(r"\b(mma\.\S+|ldmatrix\S+|cp\.async\.c[ag]\S*|atom\.\S+)", ptx)})
        print(f"{case.name}: {len(ptx.splitlines())} lines, shared {made[-1]['shared']}, {' '.join(ops)}")
    index_file.write_text(index_text(made))


def index_text(made):
    """JSON with one line per parameter."""
    lines = ["{", f' "triton": "{triton.__version__}", "torch": "{torch.__version__}",', ' "cases": [']
    for i, case in enumerate(made):
        head = json.dumps({k: v for k, v in case.items() if k != "params"})
        params = ",\n".join("   " + json.dumps(p) for p in case["params"])
        lines.append(f'  {head[:-1]}, "params": [\n{params}]}}' + ("," if i + 1 < len(made) else ""))
    return "\n".join([*lines, " ]", "}", ""])


if __name__ == "__main__":
    main(sys.argv[1:])
