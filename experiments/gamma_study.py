r"""What gamma is on real lesions, form by form, and what it follows: their size or their shape.

    python -m experiments.gamma_study \
        --labels picai_labels/csPCa_lesion_delineations/human_expert/resampled

Claim: on the masks of PI-CAI (github.com/DIAGNijmegen/picai_labels, CC BY-NC 4.0), stretched to the
paper's grid of 160 x 128 x 24, gamma as published is near 0 and follows the size of the lesions;
with region ``surface`` it is nearly the same number for all; ours follows irregularity and not
size. Masks without lesion are left out. Two minutes on two cores.

Irregularity is measured twice. `irregularity.surface_irregularity` is what our gamma is made of, so
that a correlation with it shows nothing new. The other, concavity, shares no formula with it: the
share of the convex hull of each lesion, in mm, that the lesion does not fill, which needs no area.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from scipy import stats
from scipy.spatial import ConvexHull

from afl_jax import lesions, reports
from afl_jax.data.preprocess import prepare_image, prepare_labels
from afl_jax.data.volume import Volume, read_volume
from afl_jax.errors import InputError
from afl_jax.irregularity import surface_irregularity
from afl_jax.statistics import focusing_gamma
from experiments.end_to_end import run_script

SHAPE = (160, 128, 24)


def _published(labels: jax.Array, spacing: jax.Array, **options: str | float) -> jax.Array:
    del spacing  # In voxels, as the paper has it.
    return focusing_gamma(labels, **options)


FORMS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "volume (published)": _published,
    "volume, scale 20": functools.partial(_published, scale=20.0),
    "surface": functools.partial(_published, region="surface"),
    "irregularity, scale 5": lambda x, spacing: 5 * surface_irregularity(x, spacing=spacing),
}


def main(labels: Path, out: Path | None = None) -> int:
    """Prints the distribution and the rank correlations of gamma.

    Args:
        labels: Folder of masks, ``*.nii.gz``.
        out: A CSV file, for a row of each mask.

    Returns:
        The exit code.
    """
    paths = sorted(labels.glob("*.nii.gz"))
    if not paths:
        raise InputError(f"--labels {labels} has no *.nii.gz: name the folder of the masks.")
    forms = {name: jax.jit(form) for name, form in FORMS.items()}
    rows = []
    for path in paths:
        mask = _prepare(read_volume(path))
        if not mask.array.any():
            continue
        batch = jnp.asarray(mask.array)[None], jnp.array([mask.spacing], jnp.float32)
        rows.append(
            {
                "case_id": path.name.removesuffix(".nii.gz"),
                "volume_mm3": float(mask.array.sum() * np.prod(mask.spacing)),
                "irregularity": float(surface_irregularity(batch[0], spacing=batch[1])[0]),
                "concavity": concavity(mask.array, mask.spacing),
            }
            | {name: float(form(*batch)[0]) for name, form in forms.items()}
        )
    if out is not None:
        reports.write_csv(out, rows)
    Console().print(_markdown(rows, len(paths)), highlight=False, soft_wrap=True)
    return 0


def _prepare(labels: Volume) -> Volume:
    """0 and 1 on the paper's grid, lesions keeping their volume."""
    grid = prepare_image(labels, shape=SHAPE, resize=True, normalisation="none")
    prepared = prepare_labels(labels, grid)
    return Volume(np.asarray(prepared.array > 0), prepared.spacing)


def concavity(mask: NDArray[np.bool_], spacing: tuple[float, ...]) -> float:
    """Share of the convex hulls of the lesions that the lesions do not fill.

    Args:
        mask: ``[X, Y, Z]`` with at least one lesion.
        spacing: mm.

    Returns:
        In [0, 1); 0 for a block of voxels. The hull is that of the voxels' corners.
    """
    components, num_components = lesions.label_components(mask)
    corners = np.stack(np.meshgrid(*[(-0.5, 0.5)] * 3), axis=-1).reshape(-1, 3)
    hulls = 0.0
    for number in range(1, num_components + 1):
        voxels = np.argwhere(components == number)
        points = (voxels[:, None] + corners).reshape(-1, 3) * spacing
        hulls += ConvexHull(np.unique(points, axis=0)).volume
    return 1 - float(mask.sum() * np.prod(spacing)) / hulls


def _markdown(rows: list[dict[str, float]], num_masks: int) -> str:
    def column(name: str) -> NDArray[np.float64]:
        return np.array([row[name] for row in rows])

    def rank_correlation(name: str, other: str) -> str:
        result = stats.spearmanr(column(name), column(other))
        return f"{result.statistic:+.2f} ({result.pvalue:.3f})"

    lines = [
        f"{len(rows)} of {num_masks} masks have a lesion. Spearman's rank correlation (p):",
        "",
        "| gamma | min | 10 % | median | 90 % | max | volume | irregularity | concavity |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    properties = ("volume_mm3", "irregularity", "concavity")
    for name in (*FORMS, "irregularity", "concavity"):
        quantiles = np.quantile(column(name), [0, 0.1, 0.5, 0.9, 1])
        cells = [f"{value:.4f}" for value in quantiles]
        cells += [rank_correlation(name, other) for other in properties]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_script(main))
