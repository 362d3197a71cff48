"""Heads, MLP-SR's architecture, factories and the check."""

import pytest
import torch
from torch import nn

from decoupled_pp import Trainer, partition
from decoupled_pp.core.datasets import DataInfo
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.objective import CriticContext
from decoupled_pp.critics import build_critic, check_critic
from decoupled_pp.critics.auglocal import AuglocalChain
from decoupled_pp.critics.head import LinearHead, TokenHead, matching_head
from decoupled_pp.models import build_model
from decoupled_pp.settings.critics import AutoCritic, FactoryCritic, HeadCritic, MlpSrCritic, VocabularyCritic
from decoupled_pp.settings.sections import GptModel, ResnetModel
from kit import ignore, refused


def context(hidden, output, stage=0):
    return CriticContext(stage, 3, 1, hidden, output, ())


@pytest.mark.parametrize(
    ("hidden", "output", "name"),
    [
        ((2, 6, 5, 4), (2, 10), "LinearHead"),
        ((2, 6), (2, 10), "LinearHead"),
        ((2, 5, 6), (2, 5, 11), "TokenHead"),
        ((2, 5, 6), (2, 10), "SequenceHead"),
    ],
)
@pytest.mark.parametrize("as_tuple", [False, True])
def test_head_by_shape(hidden, output, name, as_tuple):
    given = torch.randn(hidden)
    given = (given, torch.ones(2, dtype=torch.bool)) if as_tuple else given
    where = context(given, torch.randn(output))
    critic = build_critic(HeadCritic())(where)
    assert type(critic).__name__ == name
    check_critic(critic, where)


@pytest.mark.parametrize("size", [(8, 6), (16, 12), (4, 3), (5, 7)])
def test_dense_head_is_one_convolution_and_a_linear_interpolation(size):
    """And other sizes of images give other sizes of outputs, by the same ratio."""
    hidden = torch.randn(2, 6, 8, 6)
    where = context(hidden, torch.randn(2, 10, *size))
    for kind in (HeadCritic(), AutoCritic()):
        critic = build_critic(kind)(where)
        expected = critic.convolution(hidden)
        if size != (8, 6):
            expected = nn.functional.interpolate(expected, size=size, mode="bilinear", align_corners=False)
        assert torch.equal(critic(hidden), expected)
        assert critic(torch.randn(3, 6, 16, 12)).shape == (3, 10, 2 * size[0], 2 * size[1])
        check_critic(critic, where)


def test_patch_head_makes_the_pixels_of_every_token():
    """Tokens are patches in rows; another size of image has as many more."""
    hidden = torch.randn(2, 12, 6)
    where = context(hidden, torch.randn(2, 5, 6, 8))
    critic = build_critic(HeadCritic())(where)
    patches = critic.linear(critic.norm(hidden)).reshape(2, 3, 4, 5, 2, 2)
    assert torch.equal(critic(hidden), patches.permute(0, 3, 1, 4, 2, 5).reshape(2, 5, 6, 8))
    assert critic(torch.randn(1, 48, 6)).shape == (1, 5, 12, 16)
    check_critic(critic, where)


def test_token_head_has_no_bias_and_follows_the_dtype():
    critic = build_critic(HeadCritic())(context(torch.randn(2, 5, 6).bfloat16(), torch.randn(2, 5, 11)))
    assert critic.projection.bias is None
    assert {parameter.dtype for parameter in critic.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("hidden", "output"),
    [((2, 3, 4, 5, 6), (2, 10)), ((2, 5, 6), (2, 4, 11)), ((2, 6, 5, 4), (2, 10, 5)), ((2,), (2, 10))],
)
def test_head_refuses_other_shapes(hidden, output):
    with refused("critic-unfit", UsageError, "stage 1: "):
        build_critic(HeadCritic())(context(torch.randn(hidden), torch.randn(output), stage=1))


def test_head_refuses_integers():
    with refused("critic-unfit", UsageError, "stage 0: ", "int64"):
        build_critic(HeadCritic())(context(torch.zeros(2, 6, dtype=torch.int64), torch.randn(2, 10)))


@pytest.mark.parametrize(("shape", "options"), [((1, 6), {}), ((1, 6, 4, 4), {}), ((1, 6, 4, 4), {"linears": 0})])
def test_mlp_sr_refuses_to_train_on_a_single_sample(shape, options):
    critic = build_critic(MlpSrCritic(kind="mlp_sr", **options))(context(torch.randn(shape), torch.randn(1, 10)))
    with refused("batch-too-small"):
        critic(torch.randn(shape))
    assert critic.eval()(torch.randn(shape)).shape == (1, 10)
    assert critic.train()(torch.randn(2, *shape[1:])).shape == (2, 10)


@pytest.mark.parametrize(("size", "reduced"), [((32, 32), (8, 8)), ((9, 6), (3, 2)), ((3, 3), (1, 1))])
def test_mlp_sr_architecture(size, reduced):
    """CRITICS.md section 1: pool to ceil(H/4), 3 x conv1x1, 2x2, 3 x linear of 4C, output."""
    channels = 6
    where = context(torch.randn(4, channels, *size), torch.randn(4, 10))
    critic = build_critic(MlpSrCritic(kind="mlp_sr"))(where)
    seen = []

    def note(part, given, result):
        seen.append((type(part).__name__, tuple(result.shape[1:])))

    handles = [
        part.register_forward_hook(note)
        for part in critic.modules()
        if isinstance(part, nn.Conv2d | nn.Linear | nn.BatchNorm1d | nn.BatchNorm2d | nn.ReLU)
    ]
    critic(where.hidden)
    for handle in handles:
        handle.remove()
    image, vector = (channels, *reduced), (4 * channels,)
    assert seen == (
        [("Conv2d", image), ("BatchNorm2d", image), ("ReLU", image)] * 3
        + [("Linear", vector), ("BatchNorm1d", vector), ("ReLU", vector)] * 3
        + [("Linear", (10,))]
    )
    assert all(part.kernel_size == (1, 1) for part in critic.modules() if isinstance(part, nn.Conv2d))


def test_mlp_sr_on_vectors_is_the_linear_part():
    where = context(torch.randn(4, 6), torch.randn(4, 10))
    critic = build_critic(MlpSrCritic(kind="mlp_sr", linears=2))(where)
    shapes = [tuple(part.weight.shape) for part in critic.modules() if isinstance(part, nn.Linear)]
    assert shapes == [(6, 6), (6, 6), (10, 6)]
    check_critic(critic, where)


@pytest.mark.parametrize(("hidden", "output"), [((2, 5, 6), (2, 10)), ((2, 6), (2, 5, 10))])
def test_mlp_sr_refuses_other_shapes(hidden, output):
    with refused("critic-unfit", UsageError, "critic mlp_sr"):
        build_critic(MlpSrCritic(kind="mlp_sr"))(context(torch.randn(hidden), torch.randn(output)))


class OwnCritic(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.norm = nn.BatchNorm1d(inputs)
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, hidden):
        return self.linear(self.norm(hidden))


def make_critic(context, outputs):
    return OwnCritic(context.hidden.shape[1], outputs) if outputs else "no module"


def own(outputs):
    return build_critic(
        FactoryCritic(kind="factory", factory=f"{__name__}:make_critic", arguments={"outputs": outputs})
    )


def test_factory_and_check_leave_no_trace():
    where = context(torch.randn(4, 6), torch.randn(4, 10))
    critic = own(10)(where)
    critic.norm.eval()
    state = {key: value.clone() for key, value in critic.state_dict().items()}
    check_critic(critic, where)
    assert all(torch.equal(value, critic.state_dict()[key]) for key, value in state.items())
    assert critic.training
    assert not critic.norm.training


def test_check_names_stage_class_and_both_shapes():
    where = context(torch.randn(4, 6), torch.randn(4, 10), stage=1)
    with refused("critic-wrong-output", UsageError, "stage 1: critic OwnCritic", "(4, 6)", "(4, 9)", "(4, 10)"):
        check_critic(own(9)(where), where)


def test_check_names_a_critic_that_fails():
    where = context(torch.randn(4, 6), torch.randn(4, 10), stage=1)
    with refused("critic-fails", UsageError, "stage 1: critic OwnCritic", "(4, 6)"):
        check_critic(OwnCritic(7, 10), where)


def test_check_refuses_a_critic_that_works_in_place():
    where = context(torch.randn(4, 6), torch.randn(4, 10))
    kept = where.hidden.clone()
    with refused("critic-changes-input", UsageError, "stage 0: critic Sequential"):
        check_critic(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 10)), where)
    assert torch.equal(where.hidden, kept)


def test_factory_returning_something_else():
    with refused("factory-wrong-result", UsageError, "`critic.factory`", "str"):
        own(0)(context(torch.randn(4, 6), torch.randn(4, 10)))


def test_the_default_goes_by_the_form_of_the_output(context_of):
    """Copies of layers at 7x7 for images; a head for tokens and vectors, and where no layer can be copied."""
    resnet = build_model(ResnetModel(kind="resnet", depth=14, width=4), DataInfo("image", (3, 16, 16), 5))
    critic = build_critic(AutoCritic())(context_of(resnet, torch.randn(2, 3, 16, 16), 2))
    assert isinstance(critic, AuglocalChain) and len(critic.layers) == 2
    assert critic.narrowing(torch.randn(2, 4, 16, 16)).shape[2:] == (7, 7)
    gpt = build_model(GptModel(kind="gpt", width=8, depth=2, heads=2), DataInfo("tokens", (6,), 11))
    assert isinstance(build_critic(AutoCritic())(context_of(gpt, torch.zeros(2, 6, dtype=torch.int64), 2)), TokenHead)
    own = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.LazyLinear(5))
    assert isinstance(build_critic(AutoCritic())(context_of(own, torch.randn(2, 3, 9, 9), 1)), LinearHead)


def test_padding_is_left_out_of_the_mean_over_a_sequence():
    """Judged alike whether a sequence stands alone or padded beside a longer one."""
    head = matching_head(torch.zeros(1, 4, 8), torch.zeros(1, 3), 0)
    rows = torch.randn(2, 6, 8)
    mask = torch.arange(6) < torch.tensor([[4], [6]])
    together = head((rows, mask, torch.zeros(2, 6)))
    assert torch.allclose(together[:1], head(rows[:1, :4]), atol=1e-6)
    assert torch.allclose(together[1:], head(rows[1:]), atol=1e-6)
    assert torch.equal(head((rows, mask, mask)), head(rows))  # which of two is meant is not known


PLACES = [
    ((4,), None, -1),
    ((4,), -1, -1),
    ((4,), 1, 1),
    ((5,), 1, 1),
    ((4, 4), None, 1),
    ((4, 4), -1, -1),
    ((6, 4), 3, -1),
]


@pytest.mark.parametrize(("positions", "class_dim", "place"), PLACES)
def test_where_the_classes_are_decides_how_a_head_reads_its_stage_and_not_equal_sizes(positions, class_dim, place):
    """A change at one position changes the judgement of that position, in all classes, and of no other."""
    rows, output = (torch.randn(2, *positions, 4).movedim(-1, place) for _ in range(2))
    changed = rows.clone().movedim(place, -1)
    changed[1, 2] += torch.randn_like(changed[1, 2])
    changed = changed.movedim(-1, place)
    head = matching_head(rows, output, 0, class_dim)
    judged = head(rows)
    assert judged.shape == output.shape
    moved = (judged != head(changed)).movedim(place, -1)
    assert moved[1, 2].all()
    moved[1, 2] = False
    assert not moved.any()


def test_features_elsewhere_than_classes_are_refused():
    with refused(
        "critic-unfit", UsageError, "(2, 6, 8)", "(2, 5, 6), features and classes in dimension 1", "class_dim"
    ):
        matching_head(torch.randn(2, 6, 8), torch.randn(2, 5, 6), 0, class_dim=1)


@pytest.mark.parametrize("width", [4, 6])
def test_a_network_over_time_learns_with_its_classes_in_dimension_1(width):
    """Labels per position, as many positions as classes and features; of other sizes, too."""
    torch.manual_seed(0)
    layers = [nn.Conv1d(3, width, 3, padding=1), nn.ReLU(), nn.Conv1d(width, 4, 1)]
    inputs = torch.randn(8, 3, 4)
    labels = inputs.argmax(1)
    plan = partition(layers, 2, [2, 1], inputs, loss=nn.CrossEntropyLoss(), device="cpu")
    options = {"critic": "head", "optimizer": {"kind": "Adam", "lr": 0.05}, "observer": ignore, "device": "cpu"}
    report = Trainer(plan, loss=nn.CrossEntropyLoss(), **options).fit(
        [(inputs, labels)], 150, validate=[(inputs, labels)]
    )
    assert all(one.val_accuracy > 0.9 for one in report.exits)


def test_the_vocabulary_critic_refuses_classes_elsewhere():
    where = CriticContext(0, 2, 1, torch.randn(2, 4, 4), torch.randn(2, 4, 4), (), class_dim=1)
    with refused("critic-unfit", UsageError, "last dimension"):
        build_critic(VocabularyCritic(kind="vocabulary"))(where)
