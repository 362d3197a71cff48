"""Trains two stages on scikit-learn's digits; the README shows this script.

python examples/digits.py                               # both stages in this process
torchrun --nproc-per-node 2 examples/digits.py          # one rank per stage
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import decoupled_pp as dpp

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x = torch.tensor(images / 16, dtype=torch.float32)
y = torch.tensor(labels)
batches = [(x[rows], y[rows]) for rows in torch.randperm(len(x)).split(32)]

layers = [
    nn.Sequential(nn.Linear(64, 128), nn.ReLU()),
    nn.Sequential(nn.Linear(128, 128), nn.ReLU()),
    nn.Sequential(nn.Linear(128, 128), nn.ReLU()),
    nn.Linear(128, 10),
]
plan = dpp.partition(layers, stages=2, by="uniform", sample=x[:32])
trainer = dpp.Trainer(plan, critic="head", optimizer={"kind": "AdamW", "lr": 1e-3})
report = trainer.fit(batches[:45], steps=1000, validate=batches[45:])

model = trainer.export()  # your own layers, trained, as one plain nn.Module
accuracies = [round(one.val_accuracy, 3) for one in report.exits]
print(f"{accuracies} {report.links[0].payload_bytes_backward} bytes backward")
