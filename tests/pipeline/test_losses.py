"""Losses by name, by reference and one's own: each is torch's own value, and knows how much a micro-batch counts."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

from decoupled_pp.core.errors import UsageError
from decoupled_pp.pipeline.losses import cross_entropy, find_loss, mse
from kit import refused


def test_cross_entropy_of_classes_and_of_tokens():
    logits, classes = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    assert torch.equal(cross_entropy(logits, classes), functional.cross_entropy(logits, classes))
    tokens_logits, tokens = torch.randn(2, 5, 3), torch.randint(3, (2, 5))
    by_hand = -tokens_logits.log_softmax(-1).gather(-1, tokens[..., None]).mean()
    torch.testing.assert_close(cross_entropy(tokens_logits, tokens), by_hand)


def test_ignored_targets_do_not_count():
    logits = torch.randn(3, 4)
    some, kept = torch.tensor([1, -100, 2]), torch.tensor([0, 2])
    torch.testing.assert_close(cross_entropy(logits, some), functional.cross_entropy(logits[kept], some[kept]))


def test_class_probabilities_and_tuples_of_targets():
    logits, shares = torch.randn(4, 3), torch.rand(4, 3).softmax(-1)
    assert torch.equal(cross_entropy(logits, (shares,)), functional.cross_entropy(logits, shares))
    assert torch.equal(mse(logits, (shares, torch.ones(1))), functional.mse_loss(logits, shares))


def test_finding_a_loss():
    logits, wanted = torch.randn(4, 3), torch.randn(4, 3)
    assert torch.equal(find_loss("cross_entropy")(logits, wanted.argmax(-1)), cross_entropy(logits, wanted.argmax(-1)))
    for choice in ("torch.nn.functional:l1_loss", functional.l1_loss, nn.L1Loss(), nn.L1Loss, "l1"):
        assert torch.equal(find_loss(choice)(logits, wanted), functional.l1_loss(logits, wanted))
    assert find_loss(mse) is mse
    with refused("unknown-kind", UsageError, "'crossentropy'", "did you mean 'cross_entropy'"):
        find_loss("crossentropy")
    with refused("unknown-setting", UsageError, "`loss.label_smoting`", "label_smoothing"):
        find_loss({"kind": "cross_entropy", "label_smoting": 0.1})
    with refused("factory-missing", UsageError, "`loss`", "'l3_loss'"):
        find_loss("torch.nn.functional:l3_loss")


SHAPES = [(6,), (2, 5), (4, 4)]  # (4, 4): as many positions as classes


@pytest.mark.parametrize("shape", SHAPES)
def test_one_hot_targets_are_class_indices(shape):
    """Along the classes, which are last, also where the sizes alone would not say which dimension that is."""
    logits, classes = torch.randn(*shape, 4), torch.randint(4, shape)
    one_hot = functional.one_hot(classes, 4)
    for target in (one_hot, one_hot.float()):
        torch.testing.assert_close(cross_entropy(logits, target), cross_entropy(logits, classes))
        torch.testing.assert_close(cross_entropy.per_sample(logits, target), cross_entropy.per_sample(logits, classes))
        assert cross_entropy.hits(logits, target) == cross_entropy.hits(logits, classes)


@pytest.mark.parametrize("width", [7, 4])
def test_where_the_classes_are(width):
    """Last of up to three dimensions, second of four; as torch says for its own; elsewhere where one says."""
    rows, images, tokens = torch.randn(2, 4, width), torch.randn(2, 4, 3, width), torch.randint(4, (2, width))
    last = rows.transpose(1, 2).contiguous()
    plain = functional.cross_entropy(rows, tokens)
    torch.testing.assert_close(cross_entropy(last, tokens), plain)
    torch.testing.assert_close(find_loss({"kind": "cross_entropy", "class_dim": 1})(rows, tokens), plain)
    assert torch.equal(find_loss(nn.CrossEntropyLoss())(rows, tokens), plain)
    pixels = torch.randint(4, (2, 3, width))
    assert torch.equal(cross_entropy(images, pixels), functional.cross_entropy(images, pixels))
    found = find_loss({"kind": "cross_entropy", "class_dim": 2})
    time_first = rows.permute(2, 0, 1)  # (T, B, C)
    torch.testing.assert_close(found(time_first, tokens.T), plain)
    for loss, logits in ((cross_entropy, last), (found, time_first)):
        target = tokens if loss is cross_entropy else tokens.T
        assert int(loss.hits(logits, target).correct) == int((rows.argmax(1) == tokens).sum())


@pytest.mark.parametrize("class_dim", [2, -3])
def test_a_dimension_that_the_output_does_not_have(class_dim):
    """As many samples as classes: counted from the other end it would be the batch."""
    with refused("no-such-dimension", UsageError, f"`class_dim` {class_dim}", "(4, 4)", "-2 to 1"):
        find_loss({"kind": "cross_entropy", "class_dim": class_dim})(torch.randn(4, 4), torch.arange(4))


def test_targets_that_do_not_fit_are_refused():
    with refused("loss-does-not-fit-targets", UsageError, "(2, 4, 5)", "class_dim"):
        cross_entropy(torch.randn(2, 4, 5), torch.randint(4, (2, 5)))
    with refused("loss-does-not-fit-targets", UsageError, "torch.float32"):
        cross_entropy(torch.randn(2, 4), torch.zeros(2))
    with refused("loss-does-not-fit-targets", UsageError, "(4, 1)"):
        mse(torch.randn(4, 1), torch.randn(4))


def test_class_indices_of_any_whole_type():
    logits = torch.randn(4, 2)
    for dtype in (torch.int32, torch.uint8, torch.bool):
        classes = torch.tensor([0, 1, 1, 0]).to(dtype)
        assert torch.equal(cross_entropy(logits, classes), functional.cross_entropy(logits, classes.long()))


WEIGHT = torch.tensor([1.0, 20.0, 0.5, 0.0])
LOSSES = {
    "cross_entropy": (nn.CrossEntropyLoss(), (8, 4), "classes"),
    "weighted": (nn.CrossEntropyLoss(weight=WEIGHT + 1, ignore_index=2, label_smoothing=0.1), (8, 4), "classes"),
    "images": (nn.CrossEntropyLoss(weight=WEIGHT), (8, 4, 3, 2), "classes"),
    "smoothed": (nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1), (8, 4, 3, 2), "classes"),
    "sum": (nn.CrossEntropyLoss(weight=WEIGHT + 1, reduction="sum"), (8, 4), "classes"),
    "soft": (nn.CrossEntropyLoss(weight=WEIGHT), (8, 4, 3), "shares"),
    "nll": (nn.NLLLoss(weight=WEIGHT, ignore_index=0), (8, 4), "classes"),
    "partial": (partial(functional.cross_entropy, ignore_index=1), (8, 4), "classes"),
    "mse": (nn.MSELoss(), (8, 4), "shares"),
    "huber": (nn.HuberLoss(delta=0.1), (8, 4), "shares"),
    "bce": (nn.BCEWithLogitsLoss(pos_weight=torch.arange(4.0)), (8, 4), "shares"),
    "kl": (nn.KLDivLoss(reduction="batchmean"), (8, 4), "shares"),
    "margin": (nn.MultiMarginLoss(), (8, 4), "classes"),
}


LOSSES_OF_CLASSES = nn.CrossEntropyLoss(weight=torch.arange(1.0, 5.0), label_smoothing=0.1, ignore_index=0)


def target_of(kind, shape):
    if kind == "shares":
        return torch.rand(shape).softmax(1)
    return torch.randint(shape[1], (shape[0], *shape[2:]))


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_of_any_size_make_the_whole(name):
    """The value is torch's own, and sum w_i L_i / sum w_i (or the sum of sums) that of all samples at once."""
    plain, shape, kind = LOSSES[name]
    torch.manual_seed(1)
    logits, target = torch.randn(shape), target_of(kind, shape)
    loss = find_loss(plain)
    whole = plain(logits, target)
    assert torch.equal(loss(logits, target), whole)
    parts = list(zip(logits.split([1, 5, 2]), target.split([1, 5, 2]), strict=True))
    weights = [loss.weight(part) for part in parts]
    losses = [loss(*part) if weight else torch.zeros(()) for part, weight in zip(parts, weights, strict=True)]
    joined = sum(losses)
    if not loss.sums:
        joined = sum(w * one for w, one in zip(weights, losses, strict=True)) / sum(weights)
    torch.testing.assert_close(joined, whole)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "margin"])
def test_the_loss_of_a_sample_is_that_of_a_micro_batch_of_it_alone(name):
    plain, shape, kind = LOSSES[name]
    torch.manual_seed(1)
    logits, target = torch.randn(shape), target_of(kind, shape)
    alone = torch.stack([plain(logits[i : i + 1], target[i : i + 1]) for i in range(len(logits))])
    found = find_loss(plain).per_sample(logits, target)
    if name == "kl":  # torch's mean over elements, of a batch of one
        alone = alone / shape[1]
    torch.testing.assert_close(found, alone, equal_nan=True)


SECTIONS = [
    ({"kind": "cross_entropy", "weight": [1, 2, 3, 4], "label_smoothing": 0.1, "ignore_index": 0}, LOSSES_OF_CLASSES),
    ({"kind": "nll", "weight": WEIGHT}, lambda o, y: functional.nll_loss(o, y, WEIGHT)),
    ({"kind": "factory", "factory": "torch.nn:MultiMarginLoss", "arguments": {"p": 2}}, nn.MultiMarginLoss(p=2)),
    ({"kind": "factory", "factory": "torch.nn.functional:cross_entropy", "arguments": {"label_smoothing": 0.2}},
     nn.CrossEntropyLoss(label_smoothing=0.2)),
]  # fmt: skip


@pytest.mark.parametrize(("section", "plain"), SECTIONS)
def test_arguments_in_a_section(section, plain):
    logits, classes = torch.randn(6, 4), torch.randint(1, 4, (6,))
    assert torch.equal(find_loss(section)(logits, classes), plain(logits, classes))


def test_arguments_of_losses_between_shapes():
    logits, wanted = torch.randn(6, 4), torch.rand(6, 4)
    weight = [1.0, 2.0, 3.0, 4.0]
    found = find_loss({"kind": "bce_with_logits", "pos_weight": weight})(logits, wanted.round().long())
    assert torch.equal(found, nn.BCEWithLogitsLoss(pos_weight=torch.tensor(weight))(logits, wanted.round()))
    for kind, plain in (("huber", nn.HuberLoss(delta=0.5)), ("smooth_l1", nn.SmoothL1Loss(beta=0.5))):
        key = "delta" if kind == "huber" else "beta"
        assert torch.equal(find_loss({"kind": kind, key: 0.5})(logits, wanted), plain(logits, wanted))


class Derived(nn.CrossEntropyLoss):
    """As tokens are often judged."""

    def forward(self, output, target):
        return super().forward(output.flatten(0, -2), target.flatten())


def test_a_module_derived_from_torchs_counts_as_torchs_does():
    logits, target = torch.randn(2, 5, 4), torch.tensor([[1, 2, 0, 0, 0], [3, 0, 1, 1, 0]])
    loss = find_loss(Derived(ignore_index=0))
    assert loss.weight((logits, target)) == 5
    assert torch.equal(loss(logits, target), Derived(ignore_index=0)(logits, target))


def test_class_weights_in_double_precision():
    logits, classes = torch.randn(5, 4, dtype=torch.float64), torch.arange(5) % 4
    found = find_loss({"kind": "cross_entropy", "weight": WEIGHT})(logits, classes)
    assert torch.equal(found, functional.cross_entropy(logits, classes, weight=WEIGHT.double()))


KINDS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
TYPED = [*({"kind": kind, "weight": [1, 2, 3, 4]} for kind in ("cross_entropy", "nll")), "mse", "huber", "smooth_l1",
         {"kind": "bce_with_logits", "pos_weight": [1, 2, 3, 4]}]  # fmt: skip


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("section", TYPED, ids=str)
def test_outputs_of_any_type_beside_weights_and_targets_of_any(section, dtype):
    """Targets in double precision, as numpy makes them, and weights in single; the gradient is of the output's type."""
    torch.manual_seed(1)
    logits = torch.randn(5, 4, dtype=dtype, requires_grad=True)
    is_of_classes = "weight" in section
    target = torch.arange(5) % 4 if is_of_classes else torch.rand(5, 4, dtype=torch.float64)
    loss = find_loss(section)
    found = loss(logits, target)
    found.backward()
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(found.double(), loss(logits.detach().double(), target), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("shape", [(4,), (2, 3)])
@pytest.mark.parametrize(
    "loss", ["cross_entropy", {"kind": "cross_entropy", "weight": [1, 2, 3]}, nn.CrossEntropyLoss()]
)
def test_a_class_that_the_network_does_not_have(loss, shape):
    target = torch.full(shape, 7)
    logits = torch.randn(*shape, 3)
    if isinstance(loss, nn.Module):
        logits = logits.movedim(-1, 1)
    with refused("target-out-of-range", UsageError, "Target 7", "3 classes, 0 to 2", "-100"):
        find_loss(loss)(logits, target)


@pytest.mark.parametrize("kind", ["cross_entropy", "nll", "bce_with_logits"])
def test_another_number_of_weights_than_classes(kind):
    name = "pos_weight" if kind == "bce_with_logits" else "weight"
    for width in (3, 5):
        output = torch.randn(2, width)
        target = torch.ones(2, width) if name == "pos_weight" else torch.tensor([0, 1])
        with refused("weights-do-not-fit-classes", UsageError, f"`loss.{name}` has (4,) weights", f"(2, {width})"):
            find_loss({"kind": kind, name: WEIGHT})(output, target)


def test_ctc_by_its_name():
    torch.manual_seed(1)
    logits, labels = torch.randn(3, 9, 5), torch.randint(1, 5, (3, 4))
    target = labels, torch.tensor([9, 7, 8]), torch.tensor([4, 2, 3])
    plain = functional.ctc_loss(logits.log_softmax(-1).transpose(0, 1), *target)
    for loss, output in ((find_loss("ctc"), logits), (find_loss(nn.CTCLoss()), logits.log_softmax(-1).transpose(0, 1))):
        assert torch.equal(loss(output, target), plain)
        assert loss.weight((output, target)) == 3
        assert loss.hits(output, target) is None
        torch.testing.assert_close(loss.per_sample(output, target).mean(), plain)


def test_a_function_of_ones_own_says_what_it_is():
    logits, target = torch.randn(4, 6, 3), torch.randint(3, (4, 6))

    def summed(output, target):
        return functional.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="sum")

    assert not find_loss(summed).sums
    assert find_loss(summed).weight((logits, target)) == 4
    assert find_loss(summed).hits(logits, target) is None
    summed.reduction = "sum"
    summed.count = lambda target: (target != -100).sum()
    summed.class_dim = -1
    loss = find_loss(summed)
    assert loss.sums
    assert loss.weight((logits, target)) == 24
    assert int(loss.hits(logits, target).correct) == int((logits.argmax(-1) == target).sum())
    assert find_loss(lambda output, target: output.mean()).hits(logits[:, 0], target[:, 0]) is not None
    assert find_loss(lambda output, target: output.mean()).hits(logits[:, 0], torch.rand(4, 3)) is None


def test_what_is_no_loss_is_refused():
    logits, target = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 0])
    for kind in (nn.CrossEntropyLoss(reduction="none"), nn.MultiMarginLoss(reduction="none")):
        with refused("loss-is-no-scalar"):
            find_loss(kind)
    with refused("loss-is-no-scalar", UsageError, "float"):
        find_loss(lambda output, target: 0.5)(logits, target)
    with refused("loss-is-no-scalar", UsageError, "(4,)"):
        find_loss(lambda output, target: output.sum(1))(logits, target)
    with refused("unknown-loss", UsageError, "class GaussianNLLLike"):
        find_loss(GaussianNLLLike)
    with refused("not-callable", UsageError, "`loss` is 3"):
        find_loss(3)
    with refused("loss-has-parameters", UsageError, "Learned", "scale"):
        find_loss(Learned())
    with refused("loss-count-unusable", UsageError, "-1.0"):
        find_loss(Miscounted()).weight((logits, target))


def pairs(output, target, margin):
    return output.mean()


class Doubled(nn.MSELoss):
    def forward(self, output, target, scale):
        return scale * super().forward(output, target)


OF_THREE = [nn.GaussianNLLLoss(), nn.GaussianNLLLoss, nn.CosineEmbeddingLoss, nn.TripletMarginLoss(), pairs, Doubled(),
            functional.gaussian_nll_loss, "torch.nn:MarginRankingLoss"]  # fmt: skip


@pytest.mark.parametrize("choice", OF_THREE)
def test_a_loss_of_more_than_output_and_target_is_refused_with_a_cure_that_works(choice):
    with refused("not-callable", UsageError, "missing a required argument", "loss(output, *target)"):
        find_loss(choice)


def test_a_loss_of_three_as_its_refusal_says():
    output, wanted, variance = torch.randn(4, 3), torch.randn(4, 3), torch.rand(4, 3)
    loss = nn.GaussianNLLLoss()
    found = find_loss(lambda output, target: loss(output, *target))
    assert torch.equal(found(output, (wanted, variance)), loss(output, wanted, variance))


class GaussianNLLLike(nn.Module):
    def __init__(self, variance):
        super().__init__()


class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


class Miscounted:
    def __call__(self, output, target):
        return output.mean()

    def count(self, target):
        return -1


def detached(output, target):
    return functional.cross_entropy(output.detach(), target)


def as_number(output, target):
    return torch.tensor(functional.cross_entropy(output, target).item())


def by_argmax(output, target):
    return (output.argmax(-1) != target).float().mean()


def by_numpy(output, target):
    return torch.tensor(output.numpy().mean()) if output.requires_grad else output.mean()


@pytest.mark.parametrize("loss", [detached, as_number, by_argmax, by_numpy])
def test_a_loss_without_a_gradient_is_refused_where_one_is_wanted(loss):
    logits, target = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 0])
    with refused("loss-without-gradient", UsageError, loss.__name__):
        find_loss(loss)(logits, target)
    with torch.no_grad():
        find_loss(loss)(logits, target)
    find_loss(loss)(logits.detach(), target)  # nothing there is to be trained
