"""The scores of one variant: distances of distributions with intervals, one-by-one distances, accuracy, copying."""

from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ado_tasks.datasets.shards import Dataset
from ado_tasks.metrics.accuracy import class_accuracy
from ado_tasks.metrics.coverage import precision_recall
from ado_tasks.metrics.frechet import Excess, Halves, beyond, draw_halves
from ado_tasks.metrics.interval import Interval
from ado_tasks.metrics.kernel import KernelSums, kernel_sums, kid_from_sums, real_sums
from ado_tasks.metrics.memorisation import memorisation
from ado_tasks.metrics.noninferiority import difference_from_sums, non_inferior
from ado_tasks.metrics.paired import paired_distance
from ado_tasks.metrics.random_features import random_features, standardisation, standardise
from ado_tasks.models.classifier import FeatureExtractor, Judge
from ado_tasks.sampling import Draw, Images

Features = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Reference:
    """Real images and their features: the part to measure against (verdicts: report), the train part, learned from."""

    report_images: Images
    train_images: Images
    report: Features
    train: Features
    groups: npt.NDArray[np.int64]  # of the same part: what is resampled together

    @staticmethod
    def of(data: Dataset, extractor: FeatureExtractor, part: str = "report") -> "Reference":
        """Of a dataset, with these features, to measure against `part`; what is chosen by takes "selection".

        The train part is cut to at most ten times that part.
        """
        report = data.split(part)
        train = data.split("train")
        images = report.batch(np.arange(len(report)))
        seen = train.batch(np.arange(min(len(train), 10 * len(report))))
        return Reference(images, seen, extractor.features(images), extractor.features(seen), report.groups)


@dataclass(frozen=True)
class Scores:
    """Of one variant, on the reference's part; docs/science.md (Metrics) says what each is."""

    fd: float
    fd_excess: float
    fd_over_train: dict[str, Any]
    fd_random: float
    kid: float
    kid_minus_teacher: dict[str, Any]
    paired_distance: float
    paired_distance_features: float
    precision: float
    recall: float
    class_accuracy: float | None
    class_accuracy_ci: list[float] | None
    memorisation: dict[str, float]

    def as_plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


@dataclass
class Yardstick:
    """What every variant is measured with; sums over the reference are made once."""

    reference: Reference
    extractor: FeatureExtractor
    judge: Judge | None
    margin: float
    draws: int
    seed: int
    _drawn: dict[int, Halves] = field(default_factory=dict, init=False)  # by number of samples
    _drawn_random: dict[int, Halves] = field(default_factory=dict, init=False)

    def features(self, images: Images) -> Features:
        """Own features (n, d), standardised."""
        return self.extractor.features(images)

    @cached_property
    def real_sums(self) -> Any:
        """Gram sums within the reference."""
        return real_sums(self._white_report, groups=self.reference.groups)

    @cached_property
    def _white_report(self) -> Features:
        return self.extractor.whitened(self.reference.report)

    def kernel_sums(self, features: Features) -> KernelSums:
        """Gram sums of a variant's features, and between them and the reference: of whitened ones."""
        return kernel_sums(self.extractor.whitened(features), self._white_report)

    @cached_property
    def random(self) -> tuple[Features, Features, Any]:
        """Random-convolution features of report and train images, standardised on the train part, and how."""
        train = random_features(self.reference.train_images)
        scale = standardisation(train)
        report = random_features(self.reference.report_images)
        return standardise(report, *scale), standardise(train, *scale), scale

    def excess(self, generated: Features) -> Excess:
        """FD beyond that of training images; every variant meets the same halves."""
        if len(generated) not in self._drawn:
            self._drawn[len(generated)] = self._halves(len(generated), self.reference.train, self.reference.report)
        return beyond(generated, self._drawn[len(generated)])

    def excess_random(self, images: Images) -> Excess:
        """The same in random features, the cross-check."""
        report, train, scale = self.random
        if len(images) not in self._drawn_random:
            self._drawn_random[len(images)] = self._halves(len(images), train, report)
        return beyond(standardise(random_features(images), *scale), self._drawn_random[len(images)])

    def _halves(self, samples: int, train: Features, report: Features) -> Halves:
        by = np.random.default_rng(self.seed)
        return draw_halves(samples, train, report, draws=self.draws, rng=by, groups=self.reference.groups)

    def describe(self) -> dict[str, Any]:
        """The floor, and the sizes."""
        floor = self.excess(self.reference.train).floor
        return {
            "floor_fd": {"mean": floor.mean, "range": [floor.low, floor.high], "n": floor.n, "draws": floor.draws},
            "n_real": len(self.reference.report),
            "n_train": len(self.reference.train),
        }


@dataclass(frozen=True)
class Base:
    """The teacher's samples that differences are taken to: Gram sums; the fine solution's images and features."""

    sums: KernelSums
    fine: Images
    fine_features: Features


def base_of(yardstick: Yardstick, teacher: Images, fine: Images) -> Base:
    """From the reference teacher's samples, and the fine solution of the first of them."""
    sums = yardstick.kernel_sums(yardstick.features(teacher))
    return Base(sums, fine, yardstick.features(fine))


def score(yardstick: Yardstick, images: Images, start: Draw, base: Base) -> Scores:
    """Every score of one variant's samples, drawn from `start`: the same noise as the base's."""
    reference = yardstick.reference
    found = yardstick.features(images)
    sums = yardstick.kernel_sums(found)
    difference = difference_from_sums(sums, base.sums, groups=reference.groups)
    over_train = yardstick.excess(found)
    count = len(base.fine)
    same = len(reference.report)
    sharpness = precision_recall(found[:same], reference.report[: len(found)])
    accuracy = _accuracy(yardstick, images, start)
    return Scores(
        fd=over_train.model,
        fd_excess=over_train.over_floor,
        fd_over_train={
            "value": over_train.excess, "range": [over_train.low, over_train.high], "ratio_to_floor": over_train.ratio,
            "train_fd": over_train.train, "below_floor": over_train.below_floor,
        },
        fd_random=yardstick.excess_random(images).model,
        kid=kid_from_sums(sums, yardstick.real_sums),
        kid_minus_teacher=_verdict(difference, yardstick.margin),
        paired_distance=paired_distance(images[:count], base.fine).mean,
        paired_distance_features=paired_distance(found[:count], base.fine_features).mean,
        precision=sharpness.precision,
        recall=sharpness.recall,
        class_accuracy=None if accuracy is None else accuracy.value,
        class_accuracy_ci=None if accuracy is None else [accuracy.low, accuracy.high],
        memorisation=_copying(yardstick, images),
    )  # fmt: skip


def _verdict(difference: Interval, margin: float) -> dict[str, Any]:
    return {
        "value": difference.value,
        "ci": [difference.low, difference.high],
        "margin": margin,
        "non_inferior": non_inferior(difference, margin),
    }


def _accuracy(yardstick: Yardstick, images: Images, start: Draw) -> Interval | None:
    if yardstick.judge is None or start.labels is None:
        return None
    return class_accuracy(yardstick.judge.predict(images), start.labels)


def _copying(yardstick: Yardstick, images: Images) -> dict[str, float]:
    reference = yardstick.reference
    found = memorisation(
        images[: len(reference.report_images)], reference.report_images, reference.train_images,
        rng=np.random.default_rng(yardstick.seed), groups=reference.groups,
    )  # fmt: skip
    return {"value": found.value, "low": found.low, "high": found.high, "close": found.close}
