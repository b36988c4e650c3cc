"""The updates of `pacs-worker replay`, computed again with plain PyTorch: one sequence at a time, autograd throughout.

    pacs-worker replay --job job.toml --groups groups.jsonl --out replayed
    python tests/peers/replay.py --job job.toml --groups groups.jsonl --replayed replayed

Prints a JSON line for each job, of which there may be several: how far the weights of the folder `replayed` are from
those computed here, and how far these have moved from where they started. Needs Python 3.11 and torch, nothing else;
models of the Qwen2 and Qwen3 architectures in float32. `objectives.py` next to it has the losses.
"""

import argparse
import json
import pathlib
import struct
import tomllib

import torch

import objectives

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
        """Log-probs of the answer's tokens, and the entropies of what they were drawn from, float64."""
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        hidden = self.hidden(row["prompt_tokens"] + row["tokens"])
        start = len(row["prompt_tokens"]) - 1
        every = (hidden[start:-1] @ head.T / temperature).log_softmax(-1)
        chosen = every.gather(1, torch.tensor(row["tokens"])[:, None])[:, 0]
        return chosen.double(), -(every.exp() * every).sum(-1).double()

    def values(self, row):
        """Estimates of the return before each token of the answer, float64."""
        hidden = self.hidden(row["prompt_tokens"] + row["tokens"])
        return (hidden[len(row["prompt_tokens"]) - 1 : -1] @ self.weights["value_head.weight"].T)[:, 0].double()

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


def distance(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


class Trainer:
    """Policy, reference and, for `ppo`, critic of a job."""

    def __init__(self, job, config, start):
        self.job, self.config = job, config
        self.objective = objectives.settings(job.get("objective", {}))
        self.temperature = job.get("rollout", {}).get("temperature", 1.0)
        self.max_new_tokens = job["rollout"]["max_new_tokens"]
        self.policy, self.reference = Model(config, start), Model(config, start)
        self.optimizer = self.policy.optimizer(job, job["optimizer"]["learning_rate"])
        self.critic = None
        if self.objective["kind"] == "ppo":
            trunk = {name: weight for name, weight in start.items() if name != "lm_head.weight"}
            self.critic = Model(config, trunk | {"value_head.weight": torch.zeros(1, config["hidden_size"])})
            self.critic_optimizer = self.critic.optimizer(job, self.objective["critic_learning_rate"])

    def step(self, step, groups):
        """Step `step`, from 0, on the rows of these groups."""
        s, rows = self.objective, [row for group in groups for row in group]
        self.reset(step)
        with torch.no_grad():
            self.note(rows)
        if s["kind"] not in objectives.ANSWER_LOSSES:
            objectives.set_advantages(rows, s)
        parts = self.job["batch"].get("mini_batches", 4)
        for part in range(parts):
            mine = [row for i, group in enumerate(groups) if i * parts // len(groups) == part for row in group]
            if self.critic is not None:
                new_values = [self.critic.values(row) for row in mine]
                update(self.critic, self.critic_optimizer, objectives.value_loss(mine, new_values, s), self.job)
            if step < s.get("critic_warmup_steps", 0):
                continue
            for row in mine:
                row["new"], row["entropies"] = self.policy.logprobs(row, self.temperature)
            of_answers = objectives.ANSWER_LOSSES.get(s["kind"])
            loss = of_answers(mine, s) if of_answers else objectives.policy_loss(mine, s, self.max_new_tokens)
            update(self.policy, self.optimizer, loss, self.job)

    def reset(self, step):
        """Takes the policy as reference where this step is due to, and forgets the optimizer's moments if wanted."""
        period = self.objective["reference_reset_steps"]
        if step == 0 or period == 0 or step % period != 0:
            return
        self.reference = Model(self.config, {name: weight.detach() for name, weight in self.policy.weights.items()})
        if self.objective.get("reset_optimizer"):
            self.optimizer = self.policy.optimizer(self.job, self.job["optimizer"]["learning_rate"])

    def note(self, rows):
        """Gives answers what is known of them before the first update of a step."""
        for row in rows:
            row["truncated"] = row.get("truncated", len(row["tokens"]) >= self.max_new_tokens)
            row["rollout"] = torch.tensor(row.get("sampled_logprobs") or row["logprobs"], dtype=torch.float32).double()
            row["reference"] = self.reference.logprobs(row, self.temperature)[0]
            pacs = self.objective["kind"] == "pacs"
            row["old"] = row["reference"] if pacs else self.policy.logprobs(row, self.temperature)[0]
            if self.job["batch"].get("old_logprobs", "learner") == "rollout":
                row["old"] = torch.tensor(row["logprobs"], dtype=torch.float32).double()
            if self.critic is not None:
                row["values"] = self.critic.values(row)


def compare(job, groups, replayed):
    """Takes the steps of one job, and measures how far the weights of a folder are from where they lead."""
    job = tomllib.loads(pathlib.Path(job).read_text())
    rows = [json.loads(line) for line in pathlib.Path(groups).read_text().splitlines() if line.strip()]
    config = json.loads((pathlib.Path(job["model"]["path"]) / "config.json").read_text())
    start = load_weights(job["model"]["path"])
    trainer = Trainer(job, config, start)
    groups, size = objectives.by_group(rows), job["batch"]["prompts_per_step"]
    steps = len(groups) // size
    for step in range(steps):
        trainer.step(step, groups[step * size : (step + 1) * size])
    theirs = load_weights(replayed)
    ours = {name: weight.detach() for name, weight in trainer.policy.weights.items()}
    assert ours.keys() == theirs.keys(), "the folders have different parameters"
    distances = {"largest_difference": distance(ours, theirs), "largest_move": distance(ours, start)}
    return {"objective": trainer.objective["kind"], "steps": steps} | distances


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("job", "groups", "replayed"):
        parser.add_argument(f"--{name}", required=True, action="append")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for files in zip(arguments.job, arguments.groups, arguments.replayed, strict=True):
        print(json.dumps(compare(*files)), flush=True)


if __name__ == "__main__":
    main()
