"""PI-CAI's detection metrics: lesion-level AP, patient-level AUROC, and the score, their mean.

Computed by ``picai_eval``, the challenge's own code (extra ``picai``). A detection map is made of
the probabilities as the challenge's baselines do it: the connected components above 1 / 2.5 of the
largest probability, of more than ten voxels, each with its largest probability as confidence. A
candidate finds a lesion at an IoU of at least 0.1.

References:
    Saha et al., "Artificial intelligence and radiologists in prostate cancer detection on MRI
    (PI-CAI)", 2024, https://doi.org/10.1016/S1470-2045(24)00220-1
"""

import contextlib
import importlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from afl_jax.errors import InputError

# Of the largest probability over the lowest of a candidate.
_THRESHOLD_FACTOR = 2.5


class CaseDetections(NamedTuple):
    """The candidates and lesions of one case.

    Attributes:
        lesions: (1 for a true lesion, else 0; confidence; overlap) of every lesion and of every
            candidate that finds none; a lesion that is missed has confidence 0.
        confidence: That the case has a lesion, the largest of its candidates'.
    """

    lesions: list[tuple[int, float, float]]
    confidence: float


class DetectionScores(NamedTuple):
    """PI-CAI's three numbers; NaN where cases with and without lesions are not both there."""

    auroc: float
    ap: float
    score: float


def require_picai_eval() -> None:
    """Checks that ``picai_eval`` is installed.

    Raises:
        InputError: If it is not.
    """
    try:
        # They greet whoever imports them.
        with contextlib.redirect_stdout(None):
            importlib.import_module("picai_eval")
            importlib.import_module("report_guided_annotation")
    except ImportError as error:
        raise InputError(
            'PI-CAI\'s scores need an extra package: pip install "afl-jax[picai]".'
        ) from error


def detect_lesions(probs: NDArray, labels: NDArray) -> CaseDetections:
    """Matches the lesion candidates of a case with its lesions.

    Args:
        probs: ``[X, Y, Z]``, probability of a lesion.
        labels: ``[X, Y, Z]``; every voxel above 0 is lesion.

    Returns:
        The case's part of `detection_scores`.
    """
    from picai_eval.eval import evaluate_case
    from report_guided_annotation import extract_lesion_candidates

    # Nothing outside this box is candidate or lesion; candidates are masks of the whole volume.
    kept = (probs >= probs.max() / _THRESHOLD_FACTOR) | (labels > 0)
    (box,) = ndimage.find_objects(kept.astype(np.int8))
    probs, labels = probs[box], labels[box]
    lesions, confidence, *_ = evaluate_case(
        y_det=np.asarray(probs, np.float32),
        y_true=(labels > 0).astype(np.int32),
        y_det_postprocess_func=lambda probs: extract_lesion_candidates(
            probs, threshold="dynamic-fast", dynamic_threshold_factor=_THRESHOLD_FACTOR
        )[0],
    )
    return CaseDetections(
        [(int(is_lesion), float(c), float(overlap)) for is_lesion, c, overlap in lesions],
        float(confidence),
    )


def detection_scores(cases: Mapping[str, CaseDetections]) -> DetectionScores:
    """PI-CAI's scores over cases.

    Args:
        cases: Case id to its detections.

    Returns:
        ``auroc`` and the ``score`` are NaN unless there are cases with lesions and cases without;
        ``ap`` is NaN without any lesion.
    """
    from picai_eval.metrics import Metrics

    positive = {
        case_id: any(is_lesion for is_lesion, *_ in case.lesions) for case_id, case in cases.items()
    }
    metrics = Metrics(
        lesion_results={case_id: case.lesions for case_id, case in cases.items()},
        case_target={case_id: int(value) for case_id, value in positive.items()},
        case_pred={case_id: case.confidence for case_id, case in cases.items()},
    )
    ap = float(metrics.AP) if any(positive.values()) else np.nan
    both = len(set(positive.values())) == 2
    auroc = float(metrics.auroc) if both else np.nan
    return DetectionScores(auroc, ap, (auroc + ap) / 2)
