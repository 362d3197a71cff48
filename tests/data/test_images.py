"""Augmentation, normalisation and the built-in digits."""

from itertools import islice

import torch

from decoupled_pp.data import open_data
from decoupled_pp.data.images import channel_statistics, crop_and_flip
from decoupled_pp.data.seeds import Purpose, generator
from decoupled_pp.data.splits import stratified_split
from decoupled_pp.settings.sections import DigitsData


def test_an_augmented_image_is_one_of_the_crops_and_flips_of_its_padding():
    images = torch.arange(1.0, 6 * 2 * 5 * 7 + 1).reshape(6, 2, 5, 7)
    labels = torch.arange(6)
    out, target = crop_and_flip((images, labels), generator(0, Purpose.AUGMENTATION, 3))
    again, _ = crop_and_flip((images, labels), generator(0, Purpose.AUGMENTATION, 3))
    other, _ = crop_and_flip((images, labels), generator(0, Purpose.AUGMENTATION, 4))
    assert torch.equal(out, again) and not torch.equal(out, other)
    assert torch.equal(target, labels) and out.shape == images.shape
    for before, after in zip(images, out, strict=True):
        padded = torch.nn.functional.pad(before, (4, 4, 4, 4))
        crops = [padded[:, y : y + 5, x : x + 7] for y in range(9) for x in range(9)]
        assert any(torch.equal(after, crop) or torch.equal(after, crop.flip(2)) for crop in crops)


def test_every_shift_and_both_directions_occur_about_equally_often():
    """One bright pixel in the middle: where it lands tells the shift; a marker beside it tells the direction."""
    image = torch.zeros(4000, 1, 9, 9)
    image[:, 0, 4, 4], image[:, 0, 4, 5] = 1.0, 0.5
    out, _ = crop_and_flip((image, torch.zeros(4000)), generator(0, Purpose.AUGMENTATION))
    spots = (out == 1.0).nonzero()
    assert len(spots) == 4000  # a shift of at most 4 keeps the middle inside
    for axis in (2, 3):
        counts = torch.bincount(spots[:, axis], minlength=9)
        assert counts.min() > 350 and counts.max() < 540  # 444 expected, standard deviation 20
    right = sum(int(x < 8 and out[n, 0, y, x + 1] == 0.5) for n, _, y, x in spots.tolist())
    assert 1600 < right < 1950  # half of the 8/9 whose neighbour to the right is inside


def test_statistics_equal_those_of_torch_and_a_constant_channel_is_harmless():
    images = torch.randint(256, (50, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[:, 2] = 9
    mean, deviation = channel_statistics(images)
    values = images.double()
    torch.testing.assert_close(mean.double(), values.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(deviation[:2].double(), values.std((0, 2, 3), correction=0)[:2], rtol=1e-6, atol=0)
    assert deviation[2] == 1.0


def test_a_stratified_split_is_a_partition_with_the_same_shares():
    labels = torch.tensor([0] * 10 + [1] * 30 + [2])
    train, held = stratified_split(labels, 0.2, seed=0)
    assert sorted(train.tolist() + held.tolist()) == list(range(41))
    assert torch.bincount(labels[held], minlength=3).tolist() == [2, 6, 0]
    assert not torch.equal(held, stratified_split(labels, 0.2, seed=1)[1])


def test_digits_are_the_1797_scans_in_two_parts():
    from sklearn.datasets import load_digits

    data = open_data(DigitsData(kind="digits", batch_size=50, validation_batch_size=100), seed=3)
    assert (data.info.form, data.info.shape, data.info.outputs) == ("image", (1, 8, 8), 10)
    held = list(data.validation.batches())
    train = [next(data.train.batches(n)) for n in range(1437 // 50)]
    held_images = torch.cat([images for images, _ in held])
    train_images = torch.cat([images for images, _ in train])
    assert abs(len(held_images) - 0.2 * 1797) <= 5  # each of the 10 classes is rounded by itself
    assert torch.bincount(torch.cat([labels for _, labels in held])).min() >= 34
    assert train_images.dtype == torch.float32 and train[0][1].dtype == torch.int64
    assert abs(train_images.mean()) < 0.02 and abs(train_images.std() - 1) < 0.02

    bunch = load_digits()
    real = torch.from_numpy(bunch.images).reshape(-1, 64)
    images = torch.cat((held_images, train_images)).reshape(-1, 64)
    raw = ((images - images.min()) / (images.max() - images.min()) * 16).round()
    labels = torch.cat([labels for _, labels in held + train])
    where = {tuple(pixels): number for number, pixels in enumerate(real.int().tolist())}
    numbers = [where[tuple(pixels)] for pixels in raw.int().tolist()]
    assert len(set(numbers)) == len(numbers), "a scan is in both parts, or twice"
    assert [int(bunch.target[number]) for number in numbers] == labels.tolist()


def test_the_seed_decides_order_and_split():
    def firsts(seed):
        data = open_data(DigitsData(kind="digits"), seed)
        return [
            labels.tolist() for source in (data.train, data.validation) for _, labels in islice(source.batches(), 1)
        ]

    assert firsts(0) == firsts(0)
    assert firsts(0)[0] != firsts(1)[0] and firsts(0)[1] != firsts(1)[1]
