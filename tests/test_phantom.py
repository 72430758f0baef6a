"""The phantom: deterministic, varied as stated, visible, and not to be had by a threshold."""

import re
import subprocess
import sys

import numpy as np
import pytest
from scipy import ndimage

from afl_jax.data.phantom import CHANNELS, Phantom, PhantomCase, PhantomSettings, random_case
from afl_jax.data.preprocess import normalise
from afl_jax.errors import InputError

SETTINGS = PhantomSettings()


@pytest.fixture(scope="module")
def cases() -> list[PhantomCase]:
    """The first cases of the default data set that have a lesion."""
    found = [random_case(SETTINGS, "train", index) for index in range(20)]
    return [case for case in found if case.labels.array.any()]


def dice(prediction: np.ndarray, truth: np.ndarray) -> float:
    return 2 * np.sum(prediction & truth) / (np.sum(prediction) + np.sum(truth))


def test_a_case_follows_from_seed_split_and_index():
    first = random_case(SETTINGS, "train", 3)
    again = random_case(SETTINGS, "train", 3)
    np.testing.assert_array_equal(first.image.array, again.image.array)
    np.testing.assert_array_equal(first.labels.array, again.labels.array)
    others = [
        random_case(SETTINGS, "val", 3),
        random_case(SETTINGS, "train", 4),
        random_case(PhantomSettings(seed=1), "train", 3),
    ]
    for other in others:
        assert not np.array_equal(other.image.array, first.image.array)


def test_shapes_and_types(cases):
    for case in cases:
        assert case.image.array.shape == (48, 48, 16, len(CHANNELS))
        assert case.image.array.dtype == np.float32
        assert case.image.spacing == case.labels.spacing == (1.0, 1.0, 3.0)
        assert case.labels.array.dtype == np.uint8
        assert set(np.unique(case.labels.array)) == {0, 1}
        assert np.all(np.isfinite(case.image.array))


def test_lesions_range_from_a_handful_of_voxels_up(cases):
    sizes = []
    for case in cases:
        parts, _ = ndimage.label(case.labels.array, np.ones((3, 3, 3)))
        sizes.extend(np.bincount(parts.ravel())[1:].tolist())
        assert 1 <= parts.max() <= SETTINGS.max_num_lesions
    assert min(sizes) < 20
    assert max(sizes) > 200
    assert np.mean(np.array(sizes) < 10) < 0.2


def test_no_lesion_touches_air_or_the_rim(cases):
    for case in cases:
        labels = case.labels.array.astype(bool)
        rim = np.ones_like(labels)
        rim[1:-1, 1:-1, 1:-1] = False
        assert not np.any(labels & rim)
        # Air is below 0.2 in T2W; a lesion is above, its noise averaged.
        assert case.image.array[..., 0][labels].mean() > 0.2


def test_lesions_differ_from_their_surroundings_in_every_channel(cases):
    contrasts = []
    for case in cases:
        labels = case.labels.array.astype(bool)
        near = ndimage.binary_dilation(labels, iterations=3) & ~ndimage.binary_dilation(labels)
        inside, outside = case.image.array[labels], case.image.array[near]
        contrasts.append((inside.mean(axis=0) - outside.mean(axis=0)) / outside.std(axis=0))
    t2w, adc, hbv = np.mean(contrasts, axis=0)
    assert t2w < -1
    assert adc < -1
    assert hbv > 1
    # Contrast to noise of the channels together.
    assert 3 < np.linalg.norm([t2w, adc, hbv]) < 5


@pytest.mark.parametrize("channel", range(len(CHANNELS)), ids=CHANNELS)
def test_no_threshold_on_a_channel_solves_it(cases, channel):
    images = [normalise(case.image.array, method="zscore_nonzero")[..., channel] for case in cases]
    truths = [case.labels.array.astype(bool) for case in cases]
    best = max(
        np.mean([dice(sign * i > sign * t, truth) for i, truth in zip(images, truths, strict=True)])
        for t in np.quantile(images, np.linspace(0.01, 0.999, 80))
        for sign in (1, -1)
    )
    assert best < 0.5


def test_roughness_makes_the_surface_larger():
    def surface_to_volume(roughness: float) -> float:
        settings = PhantomSettings(
            roughness=(roughness, roughness),
            lesion_volume_mm3=(1500, 1500),
            max_num_lesions=1,
            empty_fraction=0,
        )
        ratios = []
        for index in range(6):
            labels = random_case(settings, "train", index).labels.array.astype(bool)
            ratios.append(np.sum(labels & ~ndimage.binary_erosion(labels)) / np.sum(labels))
        return float(np.mean(ratios))

    assert surface_to_volume(0.35) > 1.1 * surface_to_volume(0.0)


@pytest.mark.parametrize("empty_fraction", [0.0, 1.0])
def test_the_share_of_cases_without_lesion(empty_fraction):
    settings = PhantomSettings(empty_fraction=empty_fraction, shape=(16, 16, 8))
    for index in range(5):
        case = random_case(settings, "train", index)
        assert case.labels.array.any() == (empty_fraction == 0)
        assert np.isnan(case.roughness) == (empty_fraction == 1)


def test_records_say_how_large_and_how_rough_lesions_are(tmp_path):
    settings = PhantomSettings(num_train=3, num_val=2, shape=(24, 24, 8), empty_fraction=0)
    builder = Phantom.create(settings, data_dir=tmp_path)
    builder.prepare(num_workers=2)
    for split, num_cases in (("train", 3), ("val", 2)):
        source = builder.as_data_source(split)
        assert len(source) == num_cases
        for index, record in enumerate(source):
            case = random_case(settings, split, index)
            assert record["case_id"] == f"phantom_{split}_{index:04d}".encode()
            np.testing.assert_array_equal(record["labels"], case.labels.array)
            assert record["lesion_volume_mm3"] == case.labels.array.sum() * 3.0
            assert record["roughness"] == np.float32(case.roughness)
            assert 0 <= record["roughness"] <= 0.3
            np.testing.assert_array_equal(record["content_start"], 0)
            np.testing.assert_array_equal(record["content_stop"], (24, 24, 8))
            assert np.abs(record["image"].mean(axis=(0, 1, 2))).max() < 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        {"num_train": 0},
        {"shape": (48, 48)},
        {"shape": (48, 48, 4)},
        {"spacing": (1, 1, 0)},
        {"lesion_volume_mm3": (100, 10)},
        {"roughness": (0, 0.5)},
        {"empty_fraction": 1.5},
        {"seed": -1},
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(settings):
    (name,) = settings
    with pytest.raises(InputError, match=rf"\Aphantom: {re.escape(name)} must be [^\n]*\Z"):
        PhantomSettings(**settings)


def test_preparing_more_cases_takes_no_more_memory(tmp_path):
    program = """
import resource, sys
from afl_jax.data.loader import prepare
prepare("phantom", data_dir=sys.argv[1], num_train=int(sys.argv[2]), num_val=1, shape=(64, 64, 32))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""

    def peak_mb(num_train: int) -> float:
        arguments = [sys.executable, "-c", program, str(tmp_path), str(num_train)]
        run = subprocess.run(arguments, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return int(run.stdout) / 1024

    # 36 records of 1.7 MB more.
    assert peak_mb(40) - peak_mb(4) < 30
