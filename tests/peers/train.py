"""Training steps in hand-written PyTorch, for comparison with `pacs-worker bench train`.

Reads the work of that benchmark (its "work" object) on standard input and prints one JSON object. The method is the
fastest that eager PyTorch allows: one row a group with its prompt once, a block mask, the LM head at answer positions
only, bfloat16 compute with float32 master weights where the processor multiplies it, fused AdamW.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

parser = argparse.ArgumentParser()
parser.add_argument("--model", type=Path, required=True)
parser.add_argument("--steps", type=int, default=5)
parser.add_argument("--threads", type=int, required=True)
parser.add_argument("--precision", choices=["BFloat16", "Float"], required=True)
options = parser.parse_args()
work = json.load(sys.stdin)

torch.set_num_threads(options.threads)
torch.manual_seed(1)
compute = torch.bfloat16 if options.precision == "BFloat16" else torch.float32
config = json.loads((options.model / "config.json").read_text())
layers, width, heads = config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"]
kv_heads = config.get("num_key_value_heads", heads)
head_dim = config.get("head_dim") or width // heads
eps = config["rms_norm_eps"]
theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
master = {}
for file in sorted(options.model.glob("*.safetensors")):
    master.update({name: tensor.float().clone() for name, tensor in load_file(file).items()})
if config.get("tie_word_embeddings"):
    master.pop("lm_head.weight", None)
weights = {name: tensor.to(compute).clone().requires_grad_(True) for name, tensor in master.items()}
optimizer = torch.optim.AdamW(list(master.values()), lr=1e-6, weight_decay=0.01, fused=True)
inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
embedding = weights["model.embed_tokens.weight"]
head = weights.get("lm_head.weight", embedding)


def rotate(x, cos, sin):
    half = head_dim // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def hidden_states(tokens, positions, bounds, masks):
    angles = positions.float()[:, None] * inverse
    angles = torch.cat([angles, angles], -1)[:, None]
    cos, sin = angles.cos().to(compute), angles.sin().to(compute)
    x = F.embedding(tokens, embedding)
    for layer in range(layers):
        get = lambda name: weights.get(f"model.layers.{layer}.{name}")  # noqa: E731
        h = F.rms_norm(x, (width,), get("input_layernorm.weight"), eps)
        project = lambda part, n: F.linear(  # noqa: E731
            h, get(f"self_attn.{part}_proj.weight"), get(f"self_attn.{part}_proj.bias")
        ).view(-1, n, head_dim)
        q, k, v = project("q", heads), project("k", kv_heads), project("v", kv_heads)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        parts = []
        for (start, end), mask in zip(bounds, masks):
            cut = lambda t: t[start:end].transpose(0, 1)[None]  # noqa: E731
            a = F.scaled_dot_product_attention(cut(q), cut(k), cut(v), attn_mask=mask, enable_gqa=True)
            parts.append(a[0].transpose(0, 1).reshape(end - start, heads * head_dim))
        x = x + F.linear(torch.cat(parts), get("self_attn.o_proj.weight"))
        h = F.rms_norm(x, (width,), get("post_attention_layernorm.weight"), eps)
        gate, up = F.linear(h, get("mlp.gate_proj.weight")), F.linear(h, get("mlp.up_proj.weight"))
        x = x + F.linear(F.silu(gate) * up, get("mlp.down_proj.weight"))
    return x


def pack():
    """All groups one after the other: inputs, positions, rows that predict, and what attends to what."""
    prompt, samples = work["prompt_tokens"], work["samples"]
    positions, predictors, owner, bounds, masks, total = [], [], [], [], [], 0
    for group in range(work["groups"]):
        start, segment = total, [0] * prompt
        positions += range(prompt)
        total += prompt
        for sample in range(samples):
            length = work["answer_lengths"][group * samples + sample]
            predictors += [start + prompt - 1] + list(range(total, total + length - 1))
            owner += [group * samples + sample] * length
            positions += range(prompt, prompt + length - 1)
            segment += [sample + 1] * (length - 1)
            total += length - 1
        segment = torch.tensor(segment)
        causal = torch.ones(len(segment), len(segment), dtype=torch.bool).tril()
        masks.append(causal & ((segment[None] == segment[:, None]) | (segment[None] == 0)))
        bounds.append((start, total))
    return total, torch.tensor(positions), torch.tensor(predictors), torch.tensor(owner), bounds, masks


total, positions, predictors, owner, bounds, masks = pack()
samples, groups = work["samples"], work["groups"]
labels = (torch.arange(groups * samples) % 2).float().view(groups, samples)
seconds = []
for step in range(options.steps + 1):
    started = time.perf_counter()
    tokens = torch.randint(0, config["vocab_size"], (total,))
    targets = torch.randint(0, config["vocab_size"], (len(predictors), 1))
    x = hidden_states(tokens, positions, bounds, masks)
    x = F.rms_norm(x[predictors], (width,), weights["model.norm.weight"], eps)
    logprobs = torch.log_softmax(F.linear(x, head).float(), -1).gather(1, targets)[:, 0]
    ratios = torch.zeros(groups * samples).index_add(0, owner, logprobs - logprobs.detach()).view(groups, samples)
    scores = ratios - (ratios.sum(1, keepdim=True) - ratios) / (samples - 1)
    F.binary_cross_entropy_with_logits(scores, labels).backward()
    for name, tensor in master.items():
        tensor.grad = weights[name].grad.float()
        weights[name].grad = None
    torch.nn.utils.clip_grad_norm_(list(master.values()), 1.0)
    optimizer.step()
    with torch.no_grad():
        for name, tensor in master.items():
            weights[name].copy_(tensor)
    if step > 0:
        seconds.append(time.perf_counter() - started)
median = statistics.median(seconds)
answers = sum(work["answer_lengths"])
sequence_tokens = answers + groups * samples * work["prompt_tokens"]
print(json.dumps({
    "bench": "train", "by": f"PyTorch {torch.__version__}", "seconds": median,
    "sequence_tokens_per_second": sequence_tokens / median, "computed_tokens": total,
}))
