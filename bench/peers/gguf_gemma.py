"""Writes a Gemma-2B-shaped GGUF with random weights for llama.cpp.

usage: gguf_gemma.py OUT.gguf bf16|q8_0|q4_0     (needs gguf and numpy)
"""
import sys

import gguf
import numpy as np

out, kind = sys.argv[1], sys.argv[2]
layers, hidden, inner, heads, kv_heads, head_dim, vocabulary = 18, 2048, 16384, 8, 1, 256, 256000
dtype = {
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}[kind]
file_type = {
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}[kind]

writer = gguf.GGUFWriter(out, "gemma")
writer.add_name("random-gemma-2b")
writer.add_context_length(8192)
writer.add_embedding_length(hidden)
writer.add_block_count(layers)
writer.add_feed_forward_length(inner)
writer.add_head_count(heads)
writer.add_head_count_kv(kv_heads)
writer.add_layer_norm_rms_eps(1e-6)
writer.add_key_length(head_dim)
writer.add_value_length(head_dim)
writer.add_file_type(file_type)
writer.add_tokenizer_model("llama")
tokens = [b"<pad>", b"<eos>", b"<bos>", b"<unk>"] + [f"<0x{i:02X}>".encode() for i in range(256)]
tokens += [f"t{i}".encode() for i in range(vocabulary - len(tokens))]
writer.add_token_list(tokens)
writer.add_token_scores([float(-i) for i in range(vocabulary)])
writer.add_token_types([3, 3, 3, 2] + [6] * 256 + [1] * (vocabulary - 260))
writer.add_bos_token_id(2)
writer.add_eos_token_id(1)
writer.add_pad_token_id(0)
writer.add_unk_token_id(3)

base = np.random.default_rng(0).standard_normal((2048, 2048), dtype=np.float32) * 0.02


def add(name, rows, columns):
    tiled = np.tile(base, (-(-rows // 2048), -(-columns // 2048)))[:rows, :columns]
    writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(tiled), dtype), raw_dtype=dtype)


add("token_embd.weight", vocabulary, hidden)
writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
for i in range(layers):
    block = f"blk.{i}."
    writer.add_tensor(block + "attn_norm.weight", np.ones(hidden, np.float32))
    writer.add_tensor(block + "ffn_norm.weight", np.ones(hidden, np.float32))
    add(block + "attn_q.weight", heads * head_dim, hidden)
    add(block + "attn_k.weight", kv_heads * head_dim, hidden)
    add(block + "attn_v.weight", kv_heads * head_dim, hidden)
    add(block + "attn_output.weight", hidden, heads * head_dim)
    add(block + "ffn_gate.weight", inner, hidden)
    add(block + "ffn_up.weight", inner, hidden)
    add(block + "ffn_down.weight", hidden, inner)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
