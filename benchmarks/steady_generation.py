"""A generation that does not end: python steady_generation.py MODEL STAMPS DEVICE. Writes when each step of 8 tokens was done.

Until standard input closes it generates (on cpu: with all cores), 64 steps from the same prompts again and again. STAMPS becomes
lines of CLOCK_MONOTONIC seconds; `ready` on standard output says that the first round is over.
"""

from __future__ import annotations

import select
import sys
import time
from typing import Any

BATCH = 8
STEPS = 64


def main(model_path: str, stamps_path: str, device: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList

    model: Any = AutoModelForCausalLM.from_pretrained(
        model_path, dtype=torch.bfloat16, local_files_only=True, use_safetensors=True
    ).to(device)
    prompts = torch.arange(BATCH * 16).reshape(BATCH, 16).to(device) % model.config.vocab_size
    setup = GenerationConfig(do_sample=False, max_new_tokens=STEPS, min_new_tokens=STEPS, pad_token_id=0)
    with open(stamps_path, "w", buffering=1) as stamps:  # noqa: PTH123

        class Stamp(StoppingCriteria):
            def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:  # noqa: ARG002
                stamps.write(f"{time.monotonic():.6f}\n")
                return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=device)

        first = True
        while not select.select([sys.stdin], [], [], 0)[0]:
            model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                generation_config=setup,
                stopping_criteria=StoppingCriteriaList([Stamp()]),
            )
            if first:
                print("ready", flush=True)
                first = False


if __name__ == "__main__":
    main(*sys.argv[1:])
