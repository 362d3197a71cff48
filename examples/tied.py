"""Measures what tied embeddings cost on different stages: apart, refreshed, or one weight in plain training.

    python examples/tied.py --files "data/sotu/*.txt" --steps 600

Trains a small GPT-2 (its embedding is its output projection) on your text, with a byte-pair encoding made from it:
plainly with one weight and with two, and in two decoupled stages with two weights, refreshed every n steps or never.
"""

import argparse
import json
import tempfile
from itertools import islice
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

import decoupled_pp as dpp
from decoupled_pp.data import open_data
from decoupled_pp.pipeline.schedules import rate_factor
from decoupled_pp.settings.run import ScheduleSettings
from decoupled_pp.settings.sections import TextData

VOCABULARY, CONTEXT, ROWS = 4096, 128, 16


def make_tokenizer(files, folder):
    """Writes a byte-pair encoding of the text and returns its path."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train([str(file) for file in sorted(Path().glob(files))], vocab_size=VOCABULARY)
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


def make_model(seed):
    """Returns a small GPT-2 with one weight for embedding and projection."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=128, n_layer=4, n_head=4, n_positions=CONTEXT, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


@torch.no_grad()
def loss_of(model, batches):
    """Returns the mean loss per token."""
    model.eval()
    losses = [
        cross_entropy(model(ids, use_cache=False).logits.flatten(0, 1), target.flatten()) for ids, target in batches
    ]
    return float(torch.stack(losses).mean())


def tied_again(model):
    """Gives both weights the projection's values, as `dpp export --tied` does."""
    with torch.no_grad():
        model.transformer.wte.weight.copy_(model.lm_head.weight)
    return model


def train(way, every, *, seed, data, steps, lr, folder):
    """Returns the held-out loss, and that of the network exported tied."""
    model = make_model(seed)
    held_out = list(islice(data.validation.batches(), 20))
    schedule = ScheduleSettings(kind="cosine", warmup=steps // 20, final=0.1)
    sample = next(data.train.batches())[0]
    if way == "plain, one weight":
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
        factor = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(schedule, step, steps))
        for ids, target in islice(data.train.batches(), steps):
            cross_entropy(model(ids, use_cache=False).logits.flatten(0, 1), target.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
            factor.step()
        return loss_of(model, held_out), None
    found = dpp.split_transformers(model, {"input_ids": sample})
    stages = 1 if way == "plain, two weights" else 2
    plan = dpp.partition(found.layers, stages, "uniform", sample)
    trainer = dpp.Trainer(
        plan,
        critic="head",
        optimizer={"kind": "AdamW", "lr": lr, "arguments": {"weight_decay": 0.01}},
        schedule=schedule,
        checkpoints=folder if every else None,
        refresh_tied=every is not None,
        seed=seed,
        observer=lambda _: None,
    )
    trainer.fit(data.train, steps, save_every=every)
    trainer.export()
    return loss_of(model, held_out), loss_of(tied_again(model), held_out)


def main():
    """Trains every way, one after the other; print a line of JSON for each."""
    arguments = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    arguments.add_argument("--files", required=True)
    arguments.add_argument("--steps", type=int, default=600)
    arguments.add_argument("--lr", type=float, nargs="+", default=[3e-3])
    arguments.add_argument("--seeds", type=int, default=2)
    arguments.add_argument("--every", type=int, nargs="*", default=[10, 50, 200])
    arguments.add_argument("--output")
    chosen = arguments.parse_args()
    torch.set_num_threads(1)
    ways = [("plain, one weight", None), ("plain, two weights", None), ("apart", None)]
    ways += [("refreshed", every) for every in chosen.every]
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = make_tokenizer(chosen.files, Path(scratch))
        for lr in chosen.lr:
            for seed in range(chosen.seeds):
                settings = TextData(
                    kind="text", files=[chosen.files], tokenizer=tokenizer, context=CONTEXT, batch_size=ROWS
                )
                data = open_data(settings, seed)
                for way, every in ways:
                    folder = Path(scratch) / f"{lr}-{seed}-{way}-{every}"
                    loss, tied = train(way, every, seed=seed, data=data, steps=chosen.steps, lr=lr, folder=folder)
                    line = {"way": way, "every": every, "lr": lr, "seed": seed, "loss": loss, "exported_tied": tied}
                    print(json.dumps(line), flush=True)
                    if chosen.output:
                        with Path(chosen.output).open("a") as file:
                            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
