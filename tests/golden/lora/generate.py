#!/usr/bin/env python3
"""Regenerates the adapter fixtures in this folder (see README.md).

    pip install torch transformers==5.24.0 peft==0.21.2 safetensors
    python generate.py [--out .]
"""
import argparse, json, os, shutil
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

HERE = os.path.dirname(os.path.abspath(__file__))
CASES = {
    "qwen2-tied": dict(r=3, lora_alpha=5, target_modules="all-linear"),
    "qwen3": dict(r=2, lora_alpha=4, target_modules="all-linear"),
    "llama3": dict(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "v_proj", "down_proj"]),
    "phi3": dict(r=2, lora_alpha=3, target_modules="all-linear"),
    "gemma3": dict(r=2, lora_alpha=4, target_modules="all-linear"),
}


def make(name, settings, out):
    folder = os.path.join(HERE, "..", "models", name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    torch.manual_seed(11)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, bias="none", **settings))
    # B starts at zero, which would leave A without a gradient and the model as it is.
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(out)
    os.remove(os.path.join(out, "README.md"))
    path = os.path.join(out, "adapter_config.json")
    config = json.load(open(path))
    # The folder that it was made in is of no interest, and PEFT has the modules in the order of a set.
    config["base_model_name_or_path"] = name
    config["target_modules"] = sorted(config["target_modules"])
    json.dump(config, open(path, "w"), indent=2, sort_keys=True)

    inputs = load_file(os.path.join(folder, "expected.safetensors"))
    ids, lengths = inputs["input_ids"], inputs["lengths"].tolist()
    logprobs, loss, count = torch.zeros(ids.shape, dtype=torch.float32), 0.0, sum(lengths) - len(lengths)
    for i, length in enumerate(lengths):
        tokens = ids[i, :length]
        logits = model(tokens[None]).logits[0].float()
        chosen = torch.log_softmax(logits[:-1], -1).gather(1, tokens[1:, None])[:, 0]
        logprobs[i, 1:length] = chosen.detach()
        loss = loss - chosen.sum() / count
    loss.backward()
    expected = {"logprobs": logprobs}
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected["grad." + parameter_name.replace(".default", "")] = parameter.grad
    save_file(expected, os.path.join(out, "expected.safetensors"))
    print(name, count, "tokens, loss", loss.item())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default=HERE)
    out = parser.parse_args().out
    for name, settings in CASES.items():
        target = os.path.join(out, name)
        shutil.rmtree(target, ignore_errors=True)
        make(name, settings, target)
