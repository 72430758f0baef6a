"""Batches: the order of cases, what fills the last batch, and exact resumption."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from messages import one_line

from afl_jax.data.loader import BUILDERS, create_loader, prepare
from afl_jax.errors import InputError


def create_source(num_cases: int = 5, shape=(4, 4, 2)) -> list[dict]:
    """Records as tfds decodes them; every voxel of a case holds its index."""
    return [
        {
            "image": np.full((*shape, 2), index, np.float32),
            "labels": np.full(shape, index, np.uint8),
            "case_id": f"case_{index}".encode(),
            "spacing": np.float32([1, 1, 3]),
            "content_start": np.int32([0, 1, 0]),
            "content_stop": np.int32([4, 3, 2]),
            "lesion_volume_mm3": np.float32(10 * index),
            "roughness": np.float32(np.nan),
        }
        for index in range(num_cases)
    ]


def orders(num_epochs: int, **options) -> list[list[int]]:
    """Case indices in the order of the stream, epoch by epoch, from batches of 2."""
    loader = create_loader(
        create_source(), batch_size=2, shuffle=True, num_epochs=num_epochs, **options
    )
    found: list[list[int]] = [[] for _ in range(num_epochs)]
    for batch in loader:
        columns = (batch["epoch"], batch["case_index"], batch["valid"])
        for epoch, case_index, valid in zip(*columns, strict=True):
            if valid:
                found[epoch].append(int(case_index))
    return found


def assert_same_batches(found: list[dict], expected: list[dict]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert set(one) == set(other)
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_a_batch_has_these_arrays():
    (batch,) = create_loader(create_source(3), batch_size=3, shuffle=False, num_epochs=1)
    assert {name: (array.shape, array.dtype.kind) for name, array in batch.items()} == {
        "image": ((3, 4, 4, 2, 2), "f"),
        "labels": ((3, 4, 4, 2), "u"),
        "voxel_mask": ((3, 4, 4, 2), "b"),
        "valid": ((3,), "b"),
        "epoch": ((3,), "i"),
        "case_index": ((3,), "i"),
        "case_id": ((3,), "U"),
        "spacing": ((3, 3), "f"),
        "lesion_volume_mm3": ((3,), "f"),
        "roughness": ((3,), "f"),
    }
    assert batch["image"].dtype == batch["lesion_volume_mm3"].dtype == np.float32
    assert batch["epoch"].dtype == batch["case_index"].dtype == np.int32
    assert batch["case_id"].tolist() == ["case_0", "case_1", "case_2"]
    # Padded along Y before 1 and from 3.
    np.testing.assert_array_equal(batch["voxel_mask"][0, 0, :, 0], [False, True, True, False])
    assert batch["voxel_mask"].sum() == 3 * 4 * 2 * 2


def test_rows_belong_together():
    for batch in create_loader(create_source(), batch_size=2, shuffle=True, num_epochs=2):
        for row, case_index in enumerate(batch["case_index"]):
            assert np.all(batch["image"][row] == case_index)
            assert np.all(batch["labels"][row] == case_index)
            assert batch["case_id"][row] == f"case_{case_index}"
            assert batch["lesion_volume_mm3"][row] == 10 * case_index


def test_in_order_the_last_batch_is_filled_with_invalid_rows():
    batches = list(create_loader(create_source(), batch_size=3, shuffle=False, num_epochs=1))
    assert [batch["case_index"].tolist() for batch in batches] == [[0, 1, 2], [3, 4, 3]]
    assert [batch["valid"].tolist() for batch in batches] == [[True] * 3, [True, True, False]]


def test_a_batch_larger_than_the_source_is_filled():
    (batch,) = create_loader(create_source(2), batch_size=5, shuffle=False, num_epochs=1)
    assert batch["valid"].tolist() == [True, True, False, False, False]
    assert batch["case_index"].tolist() == [0, 1, 0, 0, 0]


def test_every_epoch_is_another_permutation_and_drops_nothing():
    found = orders(num_epochs=6)
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in found)
    assert len({tuple(epoch) for epoch in found}) > 3


def test_the_order_follows_from_the_seed():
    assert orders(num_epochs=4, seed=1) == orders(num_epochs=4, seed=1)
    assert orders(num_epochs=4, seed=1) != orders(num_epochs=4, seed=2)
    assert orders(num_epochs=4, num_threads=0) == orders(num_epochs=4, num_threads=3)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_without_a_number_of_epochs_the_stream_goes_on(batch_size):
    loader = create_loader(create_source(), batch_size=batch_size, shuffle=True, num_epochs=None)
    batches = list(itertools.islice(loader, 40 // batch_size))
    assert [row for batch in batches for row in batch["epoch"].tolist()] == [
        position // 5 for position in range(40)
    ]
    assert all(batch["valid"].all() for batch in batches)


@pytest.mark.parametrize("num_threads", [0, 2])
@pytest.mark.parametrize("num_before", [0, 1, 4, 7])
def test_an_iterator_resumes_exactly(num_before, num_threads):
    def create():
        return create_loader(
            create_source(), batch_size=2, shuffle=True, num_epochs=4, num_threads=num_threads
        )

    uninterrupted = list(create())
    first = create()
    before = [next(first) for _ in range(num_before)]
    state = first.get_state()
    resumed = create()
    resumed.set_state(state)
    assert_same_batches(before + list(resumed), uninterrupted)


def test_processes_share_the_batches_of_one():
    options = {"batch_size": 4, "shuffle": True, "num_epochs": 3}
    alone = list(create_loader(create_source(), **options))
    shares = [
        list(create_loader(create_source(), **options, process_index=index, process_count=2))
        for index in range(2)
    ]
    joined = [
        {name: np.concatenate([first[name], second[name]]) for name in first}
        for first, second in zip(*shares, strict=True)
    ]
    assert_same_batches(joined, alone)


def test_a_batch_that_processes_cannot_share_is_refused():
    with pytest.raises(InputError, match=one_line("multiple of the 2 processes, got 3")):
        create_loader(create_source(), batch_size=3, shuffle=False, num_epochs=1, process_count=2)


def test_an_unknown_data_set_lists_the_choices(tmp_path):
    with pytest.raises(InputError, match=one_line(f"choose one of {sorted(BUILDERS)}")):
        prepare("fantom", data_dir=tmp_path)


def test_an_unknown_setting_lists_the_choices(tmp_path):
    with pytest.raises(InputError, match=one_line("no setting 'num_cases'; choose among [")):
        prepare("phantom", data_dir=tmp_path, num_cases=3)


def test_a_missing_setting_is_named(tmp_path):
    with pytest.raises(InputError, match=one_line("needs the setting 'source'")):
        prepare("folder", data_dir=tmp_path, shape=(8, 8, 8))


def test_a_data_set_is_prepared_and_loaded_without_tensorflow(tmp_path):
    program = """
import sys
from afl_jax.data.loader import create_loader, prepare
builder = prepare("phantom", data_dir=sys.argv[1], num_train=3, num_val=2, shape=(16, 16, 8))
source = builder.as_data_source("train")
for batch in create_loader(source, batch_size=2, shuffle=True, num_epochs=1):
    print(sorted(batch["case_id"].tolist()), batch["image"].shape)
print("tensorflow" in sys.modules)
"""
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    *batches, tensorflow = run.stdout.splitlines()
    assert len(batches) == 2
    assert all("(2, 16, 16, 8, 3)" in line for line in batches)
    assert tensorflow == "False"
