"""What compiles and trains in seconds: a tiny network, a tiny phantom, a tiny folder of images."""

import json
from pathlib import Path

import numpy as np

from afl_jax.data.volume import Volume, write_volume

TINY = [
    *("--model.name", "resnet18_unet", "--model.width", "4"),
    *("--model.decoder-features", "8", "8", "4", "4", "4"),
    *(
        "--model.strides",
        *["2", "2", "1", "2", "2", "2", "1", "1", "1", "2", "2", "2", "1", "1", "1"],
    ),
    *("--batch-size", "2", "--num-epochs", "2", "--eval-every", "1", "--num-devices", "1"),
    *("--optimizer.schedule", "constant"),
]
PHANTOM = ["--data.shape", "16", "16", "8", "--data.num-train", "4", "--data.num-val", "3"]


def make_folder(root: Path, labels: dict[str, np.ndarray], *, num_labels: int = 2) -> Path:
    """A data set in MSD layout."""
    rng = np.random.default_rng(0)
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    for name, array in labels.items():
        image = rng.random((16, 16, 8), np.float32) + array[:16, :16, :8]
        write_volume(root / "imagesTr" / f"{name}.nii.gz", Volume(image))
        write_volume(root / "labelsTr" / f"{name}.nii.gz", Volume(array))
    entries = [
        {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
        for name in labels
    ]
    content = {
        "modality": {"0": "MRI"},
        "labels": {str(label): f"label {label}" for label in range(num_labels)},
        "training": entries,
    }
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def some_labels(shape=(16, 16, 8), value: int = 1) -> np.ndarray:
    array = np.zeros(shape, np.uint8)
    array[4:9, 5:9, 2:5] = value
    return array
