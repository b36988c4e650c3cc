"""The updates of `pacs-worker replay`, computed again with plain PyTorch: one sequence at a time, autograd throughout.

    pacs-worker replay --job job.toml --groups groups.jsonl --out replayed
    python tests/peers/replay.py --job job.toml --groups groups.jsonl --replayed replayed

Prints one JSON line: how far the weights of the folder `replayed` are from those computed here, and how far these have
moved from where they started. Needs Python 3.11 and torch, nothing else; models of the Qwen2 and Qwen3 architectures in
float32; the objectives `pacs`, `grpo` and `ppo`, with those of their settings that are read below.
"""

import argparse
import json
import pathlib
import struct
import tomllib

import torch

KINDS = {"F32": torch.float32, "BF16": torch.bfloat16}


def load_weights(folder):
    """Parameters of a Hugging Face folder by name, float32."""
    weights = {}
    for file in sorted(pathlib.Path(folder).glob("model*.safetensors")):
        data = file.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            flat = torch.frombuffer(bytearray(data[start:end]), dtype=KINDS[entry["dtype"]])
            weights[name] = flat.float().reshape(entry["shape"])
    return weights


class Model:
    """A causal language model, or a value model: then `value_head` takes the place of the LM head."""

    def __init__(self, config, weights):
        self.config = config
        self.weights = {name: weight.clone().requires_grad_() for name, weight in weights.items()}

    def linear(self, x, name):
        y = x @ self.weights[f"{name}.weight"].T
        bias = self.weights.get(f"{name}.bias")
        return y if bias is None else y + bias

    def norm(self, x, name):
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return x * scale * self.weights[f"{name}.weight"]

    def hidden(self, tokens):
        """Hidden states after the final norm, [T, D], of one plain sequence."""
        c = self.config
        length, heads, kv_heads = len(tokens), c["num_attention_heads"], c["num_key_value_heads"]
        width = c.get("head_dim") or c["hidden_size"] // heads
        theta = (c.get("rope_parameters") or c)["rope_theta"]
        frequencies = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
        cos, sin = (torch.cat([f(angles)] * 2, -1).float()[:, None] for f in (torch.cos, torch.sin))

        def rotate(x):
            first, second = x.chunk(2, -1)
            return x * cos + torch.cat([-second, first], -1) * sin

        mask = torch.full((length, length), float("-inf")).triu(1)
        x = self.weights["model.embed_tokens.weight"][torch.tensor(tokens)]
        for layer in range(c["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            y = self.norm(x, f"{name}.input_layernorm")
            q = self.linear(y, f"{name}.self_attn.q_proj").view(length, heads, width)
            k = self.linear(y, f"{name}.self_attn.k_proj").view(length, kv_heads, width)
            v = self.linear(y, f"{name}.self_attn.v_proj").view(length, kv_heads, width)
            if f"{name}.self_attn.q_norm.weight" in self.weights:
                q, k = self.norm(q, f"{name}.self_attn.q_norm"), self.norm(k, f"{name}.self_attn.k_norm")
            q, k = rotate(q), rotate(k)
            k, v = (z.repeat_interleave(heads // kv_heads, 1) for z in (k, v))
            scores = torch.einsum("qnh,knh->nqk", q, k) / width**0.5 + mask
            y = torch.einsum("nqk,knh->qnh", scores.softmax(-1), v).reshape(length, heads * width)
            x = x + self.linear(y, f"{name}.self_attn.o_proj")
            y = self.norm(x, f"{name}.post_attention_layernorm")
            gate, up = self.linear(y, f"{name}.mlp.gate_proj"), self.linear(y, f"{name}.mlp.up_proj")
            x = x + self.linear(torch.nn.functional.silu(gate) * up, f"{name}.mlp.down_proj")
        return self.norm(x, "model.norm")

    def logprobs(self, row, temperature):
        """Log-probs of the answer's tokens."""
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        hidden = self.hidden(row["prompt_tokens"] + row["tokens"])
        start = len(row["prompt_tokens"]) - 1
        logits = hidden[start:-1] @ head.T / temperature
        return logits.log_softmax(-1).gather(1, torch.tensor(row["tokens"])[:, None])[:, 0]

    def values(self, row):
        """Estimates of the return before each token of the answer."""
        hidden = self.hidden(row["prompt_tokens"] + row["tokens"])
        return (hidden[len(row["prompt_tokens"]) - 1 : -1] @ self.weights["value_head.weight"].T)[:, 0]

    def optimizer(self, job, learning_rate):
        o = job.get("optimizer", {})
        betas = (o.get("beta1", 0.9), o.get("beta2", 0.999))
        settings = {"eps": o.get("epsilon", 1e-8), "weight_decay": o.get("weight_decay", 0.01), "foreach": False}
        return torch.optim.AdamW(self.weights.values(), lr=learning_rate, betas=betas, **settings)


def update(model, optimizer, loss, job):
    optimizer.zero_grad()
    if loss.requires_grad:
        loss.backward()
    for weight in model.weights.values():
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    torch.nn.utils.clip_grad_norm_(model.weights.values(), job.get("optimizer", {}).get("max_grad_norm", 1.0))
    optimizer.step()


def by_group(rows):
    groups = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    return groups.values()


def pacs_loss(rows, objective):
    """Weighted cross entropy of the labels with leave-one-out scores of the log-ratios."""
    losses = []
    for group in by_group(rows):
        ratios = [(row["new"].double() - row["old"].double()).sum() for row in group]
        proxies = objective.get("beta", 1.0) * torch.stack(ratios)
        n, labels = len(group), [row["label"] for row in group]
        scores = proxies - (proxies.sum() - proxies) / (n - 1)
        for score, label in zip(scores, labels):
            weight = n / (len(set(labels)) * labels.count(label))
            losses.append(weight * torch.nn.functional.binary_cross_entropy_with_logits(score, score.new_tensor(label)))
    return torch.stack(losses).mean()


def clipped_loss(rows, objective):
    """Mean over answers of the mean over their tokens of the clipped surrogate."""
    low, high, dual = (objective.get(k, d) for k, d in (("clip_low", 0.2), ("clip_high", 0.2), ("dual_clip", 3.0)))
    losses = []
    for row in rows:
        ratio, advantage = (row["new"].double() - row["old"].double()).exp(), row["advantages"]
        loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))
        losses.append(torch.where(advantage < 0, torch.minimum(loss, -advantage * dual), loss).mean())
    return torch.stack(losses).mean()


def value_loss(rows, critic, objective):
    clip, losses = objective.get("value_clip", 0.5), []
    for row in rows:
        new, old, returns = critic.values(row).double(), row["values"], row["returns"]
        held = new.clamp(old - clip, old + clip)
        losses.append(torch.maximum((new - returns) ** 2, (held - returns) ** 2).mean())
    return torch.stack(losses).mean()


def group_advantages(rows):
    for group in by_group(rows):
        rewards = torch.tensor([row["reward"] for row in group], dtype=torch.float64)
        standard = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        for row, advantage in zip(group, standard):
            row["advantages"] = advantage.expand(len(row["tokens"]))


def estimated_advantages(rows, critic, objective):
    """Generalised advantage estimation, whitened over the step."""
    gamma, trust = objective.get("gamma", 1.0), objective.get("lambda", 1.0)
    for row in rows:
        with torch.no_grad():
            values = row["values"] = critic.values(row).double()
        advantages, following, value_after = torch.zeros_like(values), 0.0, 0.0
        for t in reversed(range(len(values))):
            reward = row["reward"] if t == len(values) - 1 else 0.0
            following = reward + gamma * value_after - values[t] + gamma * trust * following
            advantages[t], value_after = following, values[t]
        row["advantages"], row["returns"] = advantages, advantages + values
    every = torch.cat([row["advantages"] for row in rows])
    for row in rows:
        row["advantages"] = (row["advantages"] - every.mean()) / (every.var() + 1e-8).sqrt()


def distance(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("job", "groups", "replayed"):
        parser.add_argument(f"--{name}", required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    job = tomllib.loads(pathlib.Path(arguments.job).read_text())
    objective, batch = job.get("objective", {}), job["batch"]
    kind = objective.get("kind", "pacs")
    assert kind in ("pacs", "grpo", "ppo"), f"{kind} is not computed here"
    temperature = job.get("rollout", {}).get("temperature", 1.0)
    rows = [json.loads(line) for line in pathlib.Path(arguments.groups).read_text().splitlines() if line.strip()]

    config = json.loads((pathlib.Path(job["model"]["path"]) / "config.json").read_text())
    start = load_weights(job["model"]["path"])
    policy = Model(config, start)
    optimizer = policy.optimizer(job, job["optimizer"]["learning_rate"])
    critic = None
    if kind == "ppo":
        trunk = {name: weight for name, weight in start.items() if name != "lm_head.weight"}
        critic = Model(config, trunk | {"value_head.weight": torch.zeros(1, config["hidden_size"])})
        critic_optimizer = critic.optimizer(job, objective.get("critic_learning_rate", 1e-5))

    groups = list(by_group(rows))
    size, parts = batch["prompts_per_step"], batch.get("mini_batches", 4)
    steps = len(groups) // size
    for step in range(steps):
        of_step = groups[step * size : (step + 1) * size]
        every = [row for group in of_step for row in group]
        for row in every:
            with torch.no_grad():
                row["old"] = policy.logprobs(row, temperature)
        if kind == "grpo":
            group_advantages(every)
        elif kind == "ppo":
            estimated_advantages(every, critic, objective)
        for part in range(parts):
            mine = [row for i, group in enumerate(of_step) if i * parts // size == part for row in group]
            if critic is not None:
                update(critic, critic_optimizer, value_loss(mine, critic, objective), job)
            if step < objective.get("critic_warmup_steps", 0):
                continue
            for row in mine:
                row["new"] = policy.logprobs(row, temperature)
            loss = pacs_loss(mine, objective) if kind == "pacs" else clipped_loss(mine, objective)
            update(policy, optimizer, loss, job)

    theirs = load_weights(arguments.replayed)
    ours = {name: weight.detach() for name, weight in policy.weights.items()}
    assert ours.keys() == theirs.keys(), "the folders have different parameters"
    result = {"largest_difference": distance(ours, theirs), "largest_move": distance(ours, start)}
    print(json.dumps({"objective": kind, "steps": steps} | result))


if __name__ == "__main__":
    main()
