"""Peer: ONNX Runtime on the CPU, f32, random weights; the engine under onnxruntime-node and transformers.js.

usage: ort_peer.py clip THREADS BATCH FOLDER | convnext THREADS SIZE FOLDER
The graph is exported with PyTorch into FOLDER the first time. Protocol as in torch_peer.py.
"""
import json
import os
import subprocess
import sys
import time

work, threads, size, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
shape = (size, 3, 336, 336) if work == "clip" else (1, 3, size, size)
path = os.path.join(folder, f"{work}-{size}.onnx")


def export():
    import torch

    # A torchvision built for another torch: declare the ops that its import looks for (none is used).
    library = torch.library.Library("torchvision", "DEF")
    for op in ("nms", "qnms"):
        try:
            library.define(op + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:
            pass

    if work == "clip":
        from transformers import CLIPVisionConfig, CLIPVisionModel

        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                config = CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                                          num_attention_heads=16, image_size=336, patch_size=14)
                self.model = CLIPVisionModel(config).eval()
                encoder = getattr(self.model, "vision_model", self.model).encoder
                encoder.layers = encoder.layers[:-1]

            def forward(self, x):
                return self.model(x).last_hidden_state
    else:
        import timm

        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.model = timm.create_model("convnext_large", pretrained=False).eval()

            def forward(self, x):
                y, maps = self.model.stem(x), []
                for stage in self.model.stages:
                    y = stage(y)
                    maps.append(y)
                return tuple(maps)

    os.makedirs(folder, exist_ok=True)
    torch.onnx.export(Model().eval(), (torch.randn(*shape),), path + ".part", dynamo=True, external_data=True,
                      verbose=False)
    # The graph names its data file, so only the graph is renamed: it appears when both are complete.
    os.replace(path + ".part", path)


if len(sys.argv) > 5:
    export()
    sys.exit()

import numpy as np
import onnxruntime as ort

if not os.path.exists(path):  # in a process of its own, so that PyTorch's memory and threads are gone
    done = subprocess.run([sys.executable, *sys.argv, "export"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                          text=True)
    if done.returncode:
        sys.exit("export failed: " + (done.stderr.strip().splitlines() or ["?"])[-1])
options = ort.SessionOptions()
options.intra_op_num_threads = threads
session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
feed = {session.get_inputs()[0].name: np.random.default_rng(0).standard_normal(shape, dtype=np.float32)}
print(json.dumps({"name": f"ONNX Runtime {ort.__version__}"}), flush=True)
for _ in sys.stdin:
    begin, cpu = time.perf_counter(), time.process_time()
    session.run(None, feed)
    lap = {"seconds": time.perf_counter() - begin, "cpu": time.process_time() - cpu}
    print(json.dumps(lap), flush=True)
