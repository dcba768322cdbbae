"""Peer of `npm run gpu:verify`: PyTorch on the GPU, bf16, one line of JSON a case.

Reads {"cases": [{"key": ..., "kind": ..., ...}]} from standard input. Prints {"about": ...} with the versions, {"limits":
{"copy": bytes/s, "gemm": FLOP/s}}, then {"key": ..., "seconds": [...]} for each case, or {"key": ..., "error": ...}.
Times are of CUDA graphs of 32 repeats over operands that together exceed the L2 cache where 32 sets of them do.
"""
import json
import sys
import time

import torch
import torch.nn.functional as F

REPEATS, ROUNDS, COLD = 32, 9, 192e6
bf16 = torch.bfloat16


def say(**line):
    print(json.dumps(line), flush=True)


def normal(*shape, dtype=bf16):
    return torch.randn(*shape, device="cuda", dtype=dtype)


def linear(m, n, k):
    x, w = normal(m, k), normal(n, k) * 0.03
    return 2 * (m * k + n * k + m * n), lambda: F.linear(x, w)


def attention(tokens, keys, heads, kvHeads, d, causal):
    q, k, v = (normal(1, h, n, d) for h, n in ((heads, tokens), (kvHeads, keys), (kvHeads, keys)))
    grouped = heads != kvHeads
    run = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
    return 4 * d * (tokens * heads + keys * kvHeads), run


def layer_norm(tokens, channels):
    x, w, b = normal(tokens, channels), normal(channels), normal(channels)
    return 4 * tokens * channels, lambda: F.layer_norm(x, (channels,), w, b)


def rms_norm(tokens, channels):
    x, w = normal(tokens, channels), normal(channels)
    return 4 * tokens * channels, lambda: F.rms_norm(x, (channels,), w)


def group_norm(batch, side, channels):
    x = normal(batch, channels, side, side).to(memory_format=torch.channels_last)
    w, b = normal(channels), normal(channels)
    return 4 * batch * side * side * channels, lambda: F.silu(F.group_norm(x, 32, w, b))


def conv2d(batch, side, c, o, kernel, stride, before, after, times):
    x = normal(batch, c, side, side).to(memory_format=torch.channels_last)
    w = (normal(o, c, kernel, kernel) * 0.03).to(memory_format=torch.channels_last)
    bias = normal(o)

    def run():
        y = F.interpolate(x, scale_factor=float(times), mode="nearest") if times > 1 else x
        y = F.pad(y, (before, after, before, after)) if before != after else y
        return F.conv2d(y, w, bias, stride=stride, padding=before if before == after else 0)

    return 2 * batch * side * side * c, run


def depthwise(side, channels):
    x = normal(1, channels, side, side).to(memory_format=torch.channels_last)
    w, bias = normal(channels, 1, 7, 7), normal(channels)
    gamma, beta = normal(channels), normal(channels)

    def run():
        y = F.conv2d(x, w, bias, padding=3, groups=channels)
        return F.layer_norm(y.permute(0, 2, 3, 1), (channels,), gamma, beta)

    return 4 * side * side * channels, run


KINDS = {
    "linear": linear,
    "attention": attention,
    "layerNorm": layer_norm,
    "rmsNorm": rms_norm,
    "groupNorm": group_norm,
    "conv2d": conv2d,
    "depthwise": depthwise,
}


def measure(make):
    """Seconds of one call, a number a round."""
    size, first = make()
    runs = [first] + [make()[1] for _ in range(min(REPEATS, int(COLD / size) + 1) - 1)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        for run in runs[:3]:
            run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(REPEATS):
                runs[i % len(runs)]()

        def lap(replays):
            begin = time.perf_counter()
            for _ in range(replays):
                graph.replay()
            stream.synchronize()
            return time.perf_counter() - begin

        lap(2)
        replays = max(1, int(0.05 / lap(1)))
        return [lap(replays) / replays / REPEATS for _ in range(ROUNDS)]


def copying():
    x = torch.empty(1 << 28, dtype=torch.uint8, device="cuda").random_()
    y = torch.empty_like(x)
    return 2 << 28, lambda: y.copy_(x)


def main():
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU")
    say(about=f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}")
    n = 8192
    gemm = 2 * n**3 / min(measure(lambda: linear(n, n, n)))
    say(limits={"copy": (2 << 28) / min(measure(copying)), "gemm": gemm})
    for case in json.load(sys.stdin)["cases"]:
        key, kind = case.pop("key"), case.pop("kind")
        try:
            say(key=key, seconds=measure(lambda: KINDS[kind](**case)))
        except Exception as error:  # a peer that cannot is no reason to stop
            say(key=key, error=str(error).splitlines()[0])
        torch.cuda.empty_cache()


main()
