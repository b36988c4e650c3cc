"""Generation by Hugging Face transformers, for comparison with `pacs-worker bench rollout`.

Reads the work of that benchmark (its "work" object) on standard input and prints one JSON object.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers

parser = argparse.ArgumentParser()
parser.add_argument("--model", type=Path, required=True)
parser.add_argument("--repeats", type=int, default=3)
parser.add_argument("--threads", type=int, required=True)
parser.add_argument("--precision", choices=["BFloat16", "Float"], required=True)
options = parser.parse_args()
work = json.load(sys.stdin)

torch.set_num_threads(options.threads)
torch.manual_seed(1)
kind = torch.bfloat16 if options.precision == "BFloat16" else torch.float32
model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=kind).eval()
length = max(work["answer_lengths"])
if any(other != length for other in work["answer_lengths"]):
    sys.exit("all answers must have one length: a batch of transformers runs until its longest ends")
prompts = torch.randint(0, model.config.vocab_size, (work["groups"], work["prompt_tokens"]))
seconds = []
for repeat in range(options.repeats + 1):
    started = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            min_new_tokens=length, max_new_tokens=length, num_return_sequences=work["samples"],
            pad_token_id=0, eos_token_id=None,
        )
    assert output.shape == (work["groups"] * work["samples"], work["prompt_tokens"] + length)
    if repeat > 0:
        seconds.append(time.perf_counter() - started)
median = statistics.median(seconds)
print(json.dumps({
    "bench": "rollout", "by": f"transformers {transformers.__version__}, PyTorch {torch.__version__}",
    "seconds": median, "tokens_per_second": work["groups"] * work["samples"] * length / median,
}))
