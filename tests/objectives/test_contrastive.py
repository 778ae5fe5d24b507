"""InfoNCE against golden numbers and against a double loop over its definition; two ranks are test_parity's."""

from pathlib import Path

import pytest
import torch
from lightly.loss import NTXentLoss
from safetensors.torch import load_file
from torch import Tensor

from panfm.data.batch import NO_GROUP
from panfm.objectives.contrastive import Contrastive, ContrastiveConfig, Groups, compute_info_nce
from panfm.objectives.interface import EncodedView


def make_groups(images: Tensor, **known: Tensor) -> Groups:
    unknown = torch.full_like(images, NO_GROUP)
    return Groups(images, *(known.get(name, unknown) for name in ("lesions", "patients", "visits")))


def log_scale_of(temperature: float) -> Tensor:
    return torch.tensor(1 / temperature, dtype=torch.float64).log()


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_pairs_of_views_are_nt_xent(golden: Path, temperature: float) -> None:
    tensors = load_file(golden / "contrastive_ntxent.safetensors")
    z = torch.cat([tensors["in.z0"], tensors["in.z1"]]).double().requires_grad_()
    groups = make_groups(torch.arange(8).repeat(2))
    result = compute_info_nce(z, groups, log_scale_of(temperature), positives="views")
    result.loss.backward()
    torch.testing.assert_close(result.loss, tensors[f"out64.loss.T{temperature}"], rtol=0, atol=1e-9)
    expected = torch.cat([tensors[f"grad64.T{temperature}.z0"], tensors[f"grad64.T{temperature}.z1"]])
    torch.testing.assert_close(z.grad, expected, rtol=0, atol=1e-9)
    assert bool(result.has_positive.all())

    installed = NTXentLoss(temperature)(z[:8], z[8:])
    torch.testing.assert_close(result.loss, installed, rtol=0, atol=1e-9)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_lesions_are_the_multi_positive_loss(golden: Path, temperature: float) -> None:
    tensors = load_file(golden / "contrastive_multi_positive.safetensors")
    z = tensors["in.z"].double().requires_grad_()
    groups = make_groups(torch.arange(16), lesions=tensors["in.lesion_id"], patients=tensors["in.patient_id"])
    result = compute_info_nce(z, groups, log_scale_of(temperature), positives="lesion")
    result.loss.backward()
    torch.testing.assert_close(result.loss, tensors[f"out64.loss.T{temperature}"], rtol=0, atol=1e-9)
    torch.testing.assert_close(z.grad, tensors[f"grad64.T{temperature}.z"], rtol=0, atol=1e-9)
    assert int(result.has_positive.sum()) == 13


@pytest.mark.parametrize("autocast", [False, True])
def test_the_originals_numbers_in_float32_and_under_autocast(golden: Path, autocast: bool) -> None:
    pairs, lesions = (load_file(golden / f"contrastive_{name}.safetensors") for name in ("ntxent", "multi_positive"))
    groups = make_groups(torch.arange(16), lesions=lesions["in.lesion_id"], patients=lesions["in.patient_id"])
    z = torch.cat([pairs["in.z0"], pairs["in.z1"]])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        scale = log_scale_of(0.1).float()
        losses = (
            compute_info_nce(z, make_groups(torch.arange(8).repeat(2)), scale, positives="views").loss,
            compute_info_nce(lesions["in.z"], groups, scale, positives="lesion").loss,
        )
    for loss, tensors in zip(losses, (pairs, lesions), strict=True):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, tensors["out64.loss.T0.1"].float(), rtol=1e-5, atol=0)


def loop(z: Tensor, groups: Groups, temperature: float, positives: str, across_visits: bool) -> Tensor:
    """The definition, pair by pair."""
    z = z / z.norm(dim=1, keepdim=True)
    table = list(zip(*(values.tolist() for values in vars(groups).values()), strict=True))
    losses = []
    for i, (image, lesion, patient, visit) in enumerate(table):
        numerators, denominator = [], torch.zeros((), dtype=z.dtype)
        for j, (other_image, other_lesion, other_patient, other_visit) in enumerate(table):
            if i == j:
                continue
            same_lesion = lesion == other_lesion and lesion != NO_GROUP
            is_positive = image == other_image or (
                positives == "lesion" and same_lesion and (across_visits or visit == other_visit)
            )
            related = same_lesion or (patient == other_patient and patient != NO_GROUP)
            similarity = (z[i] @ z[j] / temperature).exp()
            if is_positive:
                numerators.append(similarity)
            if is_positive or not related:
                denominator = denominator + similarity
        if numerators:
            losses.append(sum(-(n / denominator).log() for n in numerators) / len(numerators))
    return sum(losses) / len(losses) if losses else torch.zeros((), dtype=z.dtype)


@pytest.mark.parametrize("positives", ["views", "lesion"])
@pytest.mark.parametrize("across_visits", [False, True])
@pytest.mark.parametrize("num_views", [1, 2])
def test_groups_visits_and_unknowns_follow_the_definition(positives: str, across_visits: bool, num_views: int) -> None:
    torch.manual_seed(0)
    lesions = torch.tensor([1, 1, 1, 2, 2, 3, NO_GROUP, NO_GROUP, 4, 4])
    patients = torch.tensor([7, 7, 7, 7, 7, 8, 8, NO_GROUP, NO_GROUP, NO_GROUP])
    visits = torch.tensor([10, 10, 11, 12, NO_GROUP, NO_GROUP, 13, NO_GROUP, 15, 14])
    groups = Groups(*(values.repeat(num_views) for values in (torch.arange(10), lesions, patients, visits)))
    z = torch.randn(10 * num_views, 6, dtype=torch.float64)
    gradients = []
    for function in (compute_info_nce, loop):
        leaf, log_scale = z.clone().requires_grad_(), log_scale_of(0.2).requires_grad_()
        if function is loop:
            loss = loop(leaf, groups, 1 / log_scale.exp(), positives, across_visits)
        else:
            result = compute_info_nce(leaf, groups, log_scale, positives=positives, across_visits=across_visits)
            loss = result.loss
        if num_views == 2 or positives == "lesion":
            loss.backward()
            gradients.append((loss.detach(), leaf.grad, log_scale.grad))
        else:
            assert float(loss.detach()) == 0.0  # one view an image, and images as positives: nothing to attract
    for ours, expected in zip(*gradients, strict=True) if gradients else ():
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


def encode(z: Tensor) -> EncodedView:
    """A view whose two patch tokens (behind a CLS that is not looked at) have the mean z [B, D]."""
    tokens = torch.stack([z + 100, z - 1, z + 1], dim=1)
    return EncodedView(torch.zeros(len(z), 3, 8, 8, dtype=torch.uint8), tokens, 1, None)


def test_without_a_positive_the_loss_is_zero_and_every_gradient_exists(make_batch) -> None:
    objective = Contrastive(ContrastiveConfig(positives="lesion", num_views=1), input_dim=8)
    for size, lesions in ((4, [1, 2, 3, 4]), (1, [1]), (2, [NO_GROUP, NO_GROUP])):
        z = torch.randn(size, 8, requires_grad=True)
        objective.zero_grad()
        output = objective((encode(z),), make_batch(size, lesions=lesions))
        output.loss.backward()
        assert float(output.loss.detach()) == 0.0
        assert float(output.metrics["share_with_positive"]) == 0.0
        assert z.grad is not None and not z.grad.any()
        assert all(p.grad is not None and not p.grad.any() for p in objective.parameters())


def test_a_batch_with_nothing_but_ignored_images_has_finite_gradients() -> None:
    z = torch.randn(3, 4, requires_grad=True)
    same = torch.tensor([5, 5, 5])  # one patient, three lesions: no positive, no negative
    result = compute_info_nce(z, make_groups(torch.arange(3), patients=same), torch.zeros(1), positives="lesion")
    result.loss.backward()
    assert float(result.loss.detach()) == 0.0 and not z.grad.any()


def test_duplicates_and_extreme_logits_are_finite() -> None:
    z = torch.ones(6, 4, requires_grad=True)
    result = compute_info_nce(z, make_groups(torch.arange(3).repeat(2)), torch.tensor([4.6]), positives="views")
    result.loss.backward()
    assert float(result.loss.detach()) == pytest.approx(torch.tensor(5.0).log().item(), abs=1e-5)  # five alike
    assert z.grad.isfinite().all()


def test_loss_is_float32_under_autocast() -> None:
    torch.manual_seed(0)
    z = torch.randn(16, 32).bfloat16()
    groups = make_groups(torch.arange(8).repeat(2))
    with torch.autocast("cpu", torch.bfloat16):
        ours = compute_info_nce(z, groups, log_scale_of(0.1).float(), positives="views").loss
    exact = compute_info_nce(z.double(), groups, log_scale_of(0.1), positives="views").loss
    assert ours.dtype == torch.float32
    assert float(ours) == pytest.approx(float(exact), abs=1e-5)


def test_temperature_is_trained_down_to_its_floor(make_batch) -> None:
    torch.manual_seed(0)
    z = torch.eye(4, 8)
    batch = make_batch(4, lesions=[NO_GROUP] * 4)
    objective = Contrastive(ContrastiveConfig(temperature=0.5), input_dim=8)
    optimizer = torch.optim.SGD([objective.log_scale], lr=20.0)
    seen = []
    for _ in range(6):
        output = objective((encode(z), encode(z)), batch)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        seen.append(float(output.metrics["temperature"]))
    assert seen[0] == pytest.approx(0.5) and seen[-1] == pytest.approx(0.01)

    fixed = Contrastive(ContrastiveConfig(learnable_temperature=False), input_dim=8)
    assert not fixed.log_scale.requires_grad
