"""The benchmark script: its arithmetic and its arguments. How fast anything is, no test says."""

import argparse
import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

PATH = Path(__file__).parent.parent / "experiments" / "benchmark.py"


@pytest.fixture(scope="module")
def benchmark():
    # Experiments are no part of the package that is installed.
    spec = importlib.util.spec_from_file_location("benchmark", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_flops_are_counted_without_compiling(benchmark):
    flops = benchmark.count_flops(jnp.matmul, jnp.ones((8, 16)), jnp.ones((16, 4)))
    assert flops == 2 * 8 * 16 * 4


def test_runs_take_turns_and_each_second_call_is_timed(benchmark, monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])

    def run(name):
        # A first call in a turn takes 100 seconds, a second one takes 1.
        clock[0] += 1 if order and order[-1] == name else 100
        order.append(name)

    seconds = benchmark.alternate({"a": lambda: run("a"), "b": lambda: run("b")}, 2)
    assert order == ["a", "a", "b", "b"] * 2
    assert {name: list(times) for name, times in seconds.items()} == {"a": [1, 1], "b": [1, 1]}


def test_a_ratio_is_the_median_over_the_turns(benchmark):
    row = benchmark.compared(np.array([1.0, 2.0, 9.0]), np.array([2.0, 2.0, 3.0]))
    assert row == {"PyTorch, s": "2", "ratio": "1.00 (0.50 to 3.00)"}


def test_the_loss_gives_a_row(benchmark):
    options = argparse.Namespace(rounds=1, peer=None)
    row = benchmark.bench_loss((16, 16, 8), step_s=1e3, options=options)
    assert row["volume"] == "16 x 16 x 8"
    assert float(row["seconds"]) > 0
    assert row["share of a step"] == "0.0%"
    assert benchmark.bench_loss((8, 8, 8), step_s=None, options=options)["share of a step"] == "?"


def test_residuals_are_what_the_gradient_needs_beside_its_arguments(benchmark):
    # d/dw sin(w x) y needs cos(w x) and the arguments; exp its own value.
    for fn in (jnp.sin, jnp.exp):
        loss = lambda w, x: (fn(w * x) * x).sum()  # noqa: B023, E731
        assert benchmark.count_residuals(loss, jnp.ones(100), jnp.ones(100)) == 400


def test_residuals_are_those_of_an_accelerator(benchmark):
    def loss(w, x):
        on_cpu = lambda w: jnp.sin(jnp.sin(w * x))  # noqa: E731
        return jax.lax.platform_dependent(w, cpu=on_cpu, default=jnp.sin).sum()

    assert benchmark.count_residuals(loss, jnp.ones(100), jnp.ones(100)) == 400
    kept = jax.make_jaxpr(lambda w, x: jax.vjp(loss, w, x)[1])(jnp.ones(100), jnp.ones(100))
    assert len(kept.jaxpr.outvars) > 1


@pytest.mark.slow
def test_the_script_writes_its_tables(benchmark, tmp_path, capsys):
    out = tmp_path / "benchmark.md"
    arguments = ["--setups", "small_phantom", "--rounds", "1", "--out", str(out)]
    benchmark.main([*arguments, "--sections", "step", "memory", "pipeline"])
    text = out.read_text()
    assert re.search(r"\| small_phantom \| 4 \| 4 \| training step \| \d+\.\d+ \|", text)
    assert re.search(r"\| phantom, 160 x 128 x 24 \| \d+\.\d \| \d+\.\d\d \| \d+ \|", text)
    without, with_checkpointing = re.findall(r"\| brats \| bfloat16 \| \w+ \| (\d+\.\d\d) \|", text)
    assert float(with_checkpointing) < float(without) / 3
    assert all(line in capsys.readouterr().out for line in text.splitlines()[:1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--setups", "prostate"], "invalid choice: 'prostate'"),
        (["--rounds", "0"], "--rounds and --batch-sizes must be at least 1"),
        (["--peer", "jax"], "invalid choice: 'jax'"),
    ],
)
def test_bad_arguments_end_with_code_2(benchmark, arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        benchmark.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_beside_a_peer_one_device_is_used_unless_more_are_asked_for(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: True)
    assert benchmark._parse([]).num_devices is None
    assert benchmark._parse(["--peer", "torch"]).num_devices == 1
    assert benchmark._parse(["--peer", "torch", "--num-devices", "2"]).num_devices == 2


def test_a_missing_peer_is_named(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        benchmark.main(["--peer", "torch"])
    assert "--peer torch needs torch and monai: pip install torch monai" in capsys.readouterr().err
