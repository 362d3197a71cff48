"""Plans a Llama of 6.7 billion parameters for eight stages, and trains one of them in this process's memory.

    MALLOC_MMAP_THRESHOLD_=1048576 python examples/one_stage_of_7b.py [STAGE]

The whole network exists on the meta device only (shapes, no storage); the stage gets fresh weights. Prints what every
stage would need, and what the one was seen to need. The variable makes glibc give back freed memory at once.
"""

import resource
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import decoupled_pp as dpp
from decoupled_pp.core.channels import Ends, Nowhere
from decoupled_pp.core.packets import Packet, PacketKind
from decoupled_pp.pipeline.feed import Feed, Itinerary
from decoupled_pp.pipeline.losses import find_loss
from decoupled_pp.settings.run import OptimizerSettings
from decoupled_pp.training.build import build_stages
from decoupled_pp.training.choices import choose_critic
from decoupled_pp.training.memory import predict_memory
from decoupled_pp.training.recipe import Recipe

STAGES, TOKENS, GIB = 8, 512, 2**30
CRITIC = {"kind": "vocabulary", "rank": 64, "tokens": 0.25}


def now():
    """Returns the resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


start = time.time()
config = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)
with torch.device("meta"):
    model = LlamaForCausalLM(config)
tokens = torch.zeros(1, TOKENS, dtype=torch.int64)
found = dpp.split_transformers(model, {"input_ids": tokens})
plan = dpp.partition(found.layers, STAGES, "parameters", tokens, critic=CRITIC)
critic = choose_critic(CRITIC)
loss = find_loss("cross_entropy")
optimizer = OptimizerSettings(kind="AdamW", lr=1e-4)
predicted = predict_memory(plan, critic, loss=loss, optimizer=optimizer)
print(
    f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion parameters, planned in {time.time() - start:.1f} s"
)
for index, one in enumerate(predicted):
    parts = {
        "weights": one.weights,
        "gradients": one.gradients,
        "optimizer": one.optimizer,
        "activations": one.activations,
    }
    listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    print(f"stage {index}: {plan.sizes[index]} layers, {listed}; at most {one.peak / GIB:.2f} GiB")

chosen = int(sys.argv[1]) if len(sys.argv) > 1 else STAGES // 2
before = now()
cpu = torch.device("cpu")
(stage,) = build_stages(plan, Recipe(loss, critic, optimizer), [chosen], cpu)
alone = Ends(Feed(None, None, Itinerary(steps=0), cpu), Nowhere())
hidden = torch.randn(1, TOKENS, config.hidden_size)
with torch.no_grad():
    sides = found.layers[0](tokens.to("meta"))[1:]
sides = tuple(torch.zeros_like(side, device="cpu") for side in sides)
for number in range(2):
    begun = time.time()
    packet = Packet(PacketKind.TRAIN, number, (hidden, *sides), torch.randint(0, 32000, (1, TOKENS)))
    done = stage.train(packet, alone, lambda phase: None)
    print(f"step {number}: loss {done.loss:.3f}, {time.time() - begun:.0f} s")
seen = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
print(f"predicted {predicted[chosen].peak / GIB:.2f} GiB, seen {seen / GIB:.2f} GiB at the most")
