"""Self-distillation: the student sees less of an image than the teacher, and says the same about it (DINO, iBOT).

    teacher, views 0 and 1 whole      ->  heads  ->  centring or Sinkhorn-Knopp  ->  probabilities of prototypes
    student, view 0 partly hidden     ->  heads  ->  logits against them: of the image (DINO), of hidden places (iBOT)
             view 1, small local views                KoLeo spreads the images of a batch

All together are DINOv2 (Oquab et al., TMLR 2024). The teacher is the student's moving average (objectives/ema.py).
Losses run in float32 whatever the autocast. lightly's DINOLoss and IBOTPatchLoss were not taken: they have no
Sinkhorn-Knopp and no float32, and the latter's centre becomes NaN for good at the first batch without a hidden patch.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from panfm.config import config_class
from panfm.data.batch import Batch
from panfm.data.masking import MaskConfig
from panfm.models.heads import PrototypeHead
from panfm.objectives.centring import Centre, compute_sinkhorn
from panfm.objectives.ema import EmaConfig, EmaTeacher
from panfm.objectives.interface import EncodedView, Mean, Metric, ObjectiveOutput, ViewKey, compute_modality_losses
from panfm.objectives.koleo import compute_koleo

NUM_GLOBAL = 2  # views 0 and 1, which the teacher sees too


@config_class
class PrototypesConfig:
    """DINO's head: what both networks assign images and patches to."""

    num_prototypes: int = Field(default=65536, ge=2)
    """Number of prototypes (DINO: 65536; DINOv2's large models: 131072). Much more than there are images a batch costs
    memory only: a run on two CPU cores wants 1024."""
    hidden_dim: int = Field(default=2048, ge=1)
    """Width of the two hidden layers."""
    bottleneck_dim: int = Field(default=256, ge=1)
    """Width of the vectors that are compared with the prototypes."""


@config_class
class SelfDistillationConfig:
    """DINOv2's recipe on views 0 and 1 and all local views (augment.local_views)."""

    kind: Literal["self_distillation"] = "self_distillation"
    weight: float = Field(default=1.0, gt=0.0)
    """Factor of this loss in the sum."""
    ibot_weight: float = Field(default=1.0, ge=0.0)
    """Factor of the loss of hidden patches beside that of images; 0: DINO alone."""
    koleo_weight: float = Field(default=0.1, ge=0.0)
    """Factor of KoLeo on the student's image tokens of views 0 and 1; 0: without."""
    mask: MaskConfig | None = MaskConfig(kind="block", ratio=0.3)
    """What is hidden from the student. With iBOT a mask token takes the place of a hidden patch, which costs a whole
    encoding; with DINO alone hidden patches are left out, so masking makes it cheaper. None: nothing is hidden, and
    ibot_weight must be 0. DINOv2 draws the ratio anew from 0.1 to 0.5 for each image; here it is the mean of that."""
    masked_views: Literal[1, 2] = 1
    """1: view 0 alone is masked (DINOv2: half of the large views). 2: view 1 too."""
    prototypes: PrototypesConfig = PrototypesConfig()
    """The head, or both heads."""
    separate_heads: bool = False
    """Whether patches have a head of their own (DINOv2's large models) or share that of images (iBOT)."""
    centring: Literal["sinkhorn_knopp", "mean"] = "sinkhorn_knopp"
    """What keeps the teacher from collapsing: Sinkhorn-Knopp over the images of a step, all of which must then be in
    one micro batch of each rank (DINOv2's large models). mean: the running mean of its logits, which knows no batch."""
    centre_momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Share of the old centre that an update keeps, where centring is mean."""
    student_temperature: float = Field(default=0.1, gt=0.0)
    """Divides the student's cosines."""
    teacher_temperature: float = Field(default=0.04, gt=0.0)
    """Divides the teacher's cosines; the lower, the more certain is what the student is told. Too high from the start,
    and both come to agree on every prototype alike (loss = log num_prototypes). DINOv2: 0.07, after a warm-up."""
    warmup_teacher_temperature: float = Field(default=0.04, gt=0.0)
    """The same at the first step; from there it rises linearly."""
    warmup_teacher_samples: int = Field(default=0, ge=0)
    """Samples over which it rises (DINOv2: 30 of 100 or 500 epochs); 0: it never was another."""
    ema: EmaConfig = EmaConfig()
    """How the teacher follows."""


def compute_teacher_temperature(config: SelfDistillationConfig, step: int, global_batch_size: int) -> float:
    """The teacher's temperature at optimizer step `step` (0-based): a linear rise, then constant."""
    num_steps = math.ceil(config.warmup_teacher_samples / global_batch_size)
    share = min(step / num_steps, 1.0) if num_steps else 1.0
    return config.warmup_teacher_temperature + share * (config.teacher_temperature - config.warmup_teacher_temperature)


def compute_dino_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """DINO's loss of each image: student logits [2 + L, B, K], teacher probabilities [2, B, K] -> [B].

        mean over all pairs (teacher view t, student view s != t) of  -sum_k p_tk log softmax(logits_s / temperature)_k

    Student views 0 and 1 are the teacher's own, the others are local. Caron et al., ICCV 2021; without local views
    DINOv2's code divides the two pairs by three, which is not followed.
    """
    # The loss is linear in p, so the pairs of a local view need one product with the sum of both teacher views.
    log_shares = F.log_softmax(student / temperature, dim=-1)  # [2 + L, B, K]
    losses = -(teacher.flip(0) * log_shares[:NUM_GLOBAL]).sum(dim=(0, 2))
    if len(student) > NUM_GLOBAL:
        losses = losses - (teacher.sum(dim=0) * log_shares[NUM_GLOBAL:].sum(dim=0)).sum(dim=1)
    return losses / (2 * len(student) - 2)


def compute_ibot_loss(student: Tensor, teacher: Tensor, hidden: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """iBOT's loss of each image of one view: logits and probabilities [M, K] of the M hidden patches -> [B].

        mean over an image's hidden patches of  -sum_k p_k log softmax(logits / temperature)_k;  0 where it has none

    hidden: int64 [M], the places of the patches in the flattened mask [B, N]. Zhou et al., ICLR 2022.
    """
    losses = -(teacher * F.log_softmax(student / temperature, dim=-1)).sum(dim=1)  # [M]
    # Every place once: unlike adding by image, this has a fixed order on a GPU.
    placed = losses.new_zeros(mask.numel()).index_copy(0, hidden, losses).view(mask.shape)
    return placed.sum(dim=1) / mask.sum(dim=1).clamp(min=1)


class SelfDistillation(nn.Module):
    """DINO on images, iBOT on hidden patches, KoLeo; the sum of the three, each by its weight.

    local_views: numbers of the small views in Batch.views. teacher: gets a moving average of the heads.
    """

    def __init__(
        self,
        config: SelfDistillationConfig,
        input_dim: int,
        *,
        has_cls: bool,
        local_views: Sequence[int],
        teacher: EmaTeacher,
        name: str,
        global_batch_size: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.has_cls = has_cls
        self.global_batch_size = global_batch_size
        has_ibot = config.ibot_weight > 0
        num_masked = 0 if config.mask is None else config.masked_views
        self.view_keys = (
            *(ViewKey(view, masked=view < num_masked, replaced=has_ibot and view < num_masked) for view in (0, 1)),
            *(ViewKey(view, masked=False) for view in local_views),
            *(ViewKey(view, masked=False, encoder="teacher") for view in (0, 1)),
        )
        self.head = self._build_head(input_dim)
        self.patch_head = self._build_head(input_dim) if has_ibot and config.separate_heads else None
        heads = (("head", self.head), ("patch_head", self.patch_head))
        # In a tuple, so that they are no submodules: the head of images, and that of patches where it is another one.
        self.teacher_heads = tuple(teacher.follow(f"{name}.{key}", head) for key, head in heads if head is not None)

        def build_centre(wanted: bool) -> Centre | None:
            wanted = wanted and config.centring == "mean"
            return Centre(config.prototypes.num_prototypes, config.centre_momentum) if wanted else None

        self.centre, self.patch_centre = build_centre(True), build_centre(has_ibot)
        self.begin_step(0)

    def begin_step(self, step: int) -> None:
        """Take the schedule's values for optimizer step `step`, before its first forward."""
        self.temperature = compute_teacher_temperature(self.config, step, self.global_batch_size)
        for centre in (self.centre, self.patch_centre):
            if centre is not None:
                centre.begin_step()

    def after_step(self) -> None:
        """Move the centres, once after an applied optimizer step; every rank must call it."""
        for centre in (self.centre, self.patch_centre):
            if centre is not None:
                centre.after_step()

    def forward(self, views: tuple[EncodedView, ...], batch: Batch) -> ObjectiveOutput:
        """The views of `view_keys` -> loss, its parts, and whether the teacher is about to collapse."""
        config, students, teachers = self.config, views[:-NUM_GLOBAL], views[-NUM_GLOBAL:]
        metrics: dict[str, Metric] = {}
        wholes = [self._get_image_token(view) for view in students]  # [B, D] each
        student_logits = self.head(torch.cat(wholes)).unflatten(0, (len(students), -1))  # [2 + L, B, K]
        with torch.no_grad():
            teacher_logits = self.teacher_heads[0](torch.cat([self._get_image_token(view) for view in teachers]))
        targets = self._assign(teacher_logits, self.centre)  # [2 * B, K]
        with torch.autocast(targets.device.type, enabled=False):
            dino = compute_dino_loss(student_logits, targets.unflatten(0, (NUM_GLOBAL, -1)), config.student_temperature)
        losses = dino
        metrics["dino_loss"] = dino.detach().mean()
        if config.ibot_weight:
            ibot, patch_metrics = self._compute_ibot(students, teachers, batch)
            losses = losses + config.ibot_weight * ibot
            metrics |= {"ibot_loss": ibot.detach().mean(), **patch_metrics}
        if config.koleo_weight:
            koleo = compute_koleo(wholes[0]) + compute_koleo(wholes[1])
            losses = losses + config.koleo_weight * koleo
            metrics["koleo_loss"] = koleo.detach().mean()
        loss = losses.mean()
        metrics |= {"teacher_temperature": targets.new_full((), self.temperature), **_describe_teacher(targets)}
        if self.centre is not None:
            metrics["centre_norm"] = self.centre.value.norm()
        metrics |= compute_modality_losses(losses, batch.modalities)
        return ObjectiveOutput(loss, {"loss": loss.detach(), **metrics})

    def _compute_ibot(
        self, students: tuple[EncodedView, ...], teachers: tuple[EncodedView, ...], batch: Batch
    ) -> tuple[Tensor, dict[str, Metric]]:
        """Loss of each image [B], the mean over both large views, an unmasked one counting as 0, as in DINOv2."""
        assert batch.masks is not None, "iBOT needs masks in the batch"
        places = [view.hidden for view in students if view.hidden is not None]  # of view 0, and of view 1 if masked
        chosen = [
            torch.cat([_take_places(view, hidden) for view, hidden in zip(seen, places, strict=False)])
            for seen in (students, teachers)
        ]  # [M, D] of the student, of the teacher
        student_logits = (self.patch_head or self.head)(chosen[0])  # [M, K]
        with torch.no_grad():
            teacher_logits = self.teacher_heads[-1](chosen[1])
        targets = self._assign(teacher_logits, self.patch_centre)
        losses = student_logits.new_zeros(batch.size)
        sizes = [len(hidden) for hidden in places]
        with torch.autocast(targets.device.type, enabled=False):
            parts = zip(student_logits.split(sizes), targets.split(sizes), places, strict=True)
            for view, (own, expected, hidden) in enumerate(parts):
                mask = batch.masks[view]
                losses = losses + compute_ibot_loss(own, expected, hidden, mask, self.config.student_temperature)
        # As many patches as there are images say how certain the teacher is of patches; all would cost another pass.
        described = _describe_teacher(targets[:: max(1, len(targets) // (NUM_GLOBAL * batch.size))])
        metrics: dict[str, Metric] = {f"ibot_{name}": value for name, value in described.items()}
        if self.patch_centre is not None:
            metrics["ibot_centre_norm"] = self.patch_centre.value.norm()
        return losses / NUM_GLOBAL, metrics

    def _get_image_token(self, view: EncodedView) -> Tensor:
        """What stands for the whole image [B, D]: CLS, or the mean of the patches where the encoder has none."""
        return view.tokens[:, 0] if self.has_cls else view.pooled

    def _assign(self, logits: Tensor, centre: Centre | None) -> Tensor:
        if centre is None:
            return compute_sinkhorn(logits, self.temperature)
        probabilities: Tensor = centre(logits, self.temperature)
        return probabilities

    def _build_head(self, input_dim: int) -> PrototypeHead:
        sizes = self.config.prototypes
        return PrototypeHead(input_dim, sizes.hidden_dim, sizes.bottleneck_dim, sizes.num_prototypes)


def _take_places(view: EncodedView, places: Tensor) -> Tensor:
    """The patch tokens of a view at these places of its flattened grid: [M, D]."""
    return view.tokens[:, view.num_prefix :].flatten(0, 1).index_select(0, places)


def _describe_teacher(probabilities: Tensor) -> dict[str, Metric]:
    """How certain the teacher is, and how much its assignments tell images apart: probabilities [n, K].

    teacher_entropy: mean entropy of a row over log K; 1: every prototype is as likely, 0: it is sure of one.
    teacher_information: entropy of the mean row less the mean entropy, in nats, at most log n; 0 for a collapse of
    either kind, on one prototype or on all.
    """
    count = probabilities.new_full((), len(probabilities))
    entropy = torch.special.entr(probabilities).sum()  # of all rows
    entropy_of_mean = torch.special.entr(probabilities.sum(dim=0) / count.clamp(min=1)).sum()
    return {
        "teacher_entropy": Mean(entropy / math.log(probabilities.shape[1]), count),
        "teacher_information": Mean(count * entropy_of_mean - entropy, count),
    }
