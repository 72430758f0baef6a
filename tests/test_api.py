"""The conventions of the house, made executable by inspecting the public API of every module."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from types import ModuleType

import jax
import pytest

import afl_jax
from afl_jax.losses import LOSSES
from afl_jax.models.zoo import MODELS

MODULES = sorted(m.name for m in pkgutil.walk_packages(afl_jax.__path__, "afl_jax."))
every_module = pytest.mark.parametrize("name", MODULES)

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def public_members(module: ModuleType, kind: Callable[[object], bool]) -> Iterator:
    """What a module itself defines without a leading underscore; sees through `jax.jit`."""
    for name, member in vars(module).items():
        unwrapped = inspect.unwrap(member) if callable(member) else member
        if name.startswith("_") or not kind(unwrapped) or member.__module__ != module.__name__:
            continue
        yield unwrapped


def public_functions(name: str) -> list[Callable]:
    """Functions of a module, and the public methods that its classes define."""
    module = importlib.import_module(name)
    methods = [
        method.__func__ if isinstance(method, classmethod | staticmethod) else method
        for cls in public_members(module, inspect.isclass)
        for method_name, method in vars(cls).items()
        if not method_name.startswith("_")
    ]
    return [
        *public_members(module, inspect.isfunction),
        *[m for m in methods if inspect.isfunction(m) and m.__module__ == name],
    ]


def parameters_of(function: Callable) -> list[inspect.Parameter]:
    parameters = inspect.signature(function).parameters.values()
    return [p for p in parameters if p.name not in ("self", "cls")]


def violations(name: str, faults_of: Callable[[Callable], list[str]]) -> list[str]:
    return [f"{f.__qualname__}: {fault}" for f in public_functions(name) for fault in faults_of(f)]


# --- every public function -----------------------------------------------------------------------


@every_module
def test_docstrings_state_arguments_and_result(name):
    def faults_of(function: Callable) -> list[str]:
        doc = inspect.getdoc(function) or ""
        head, _, arguments = doc.partition("Args:\n")
        if not head.strip():
            return ["no docstring"]
        if "." in function.__qualname__:  # of a method one line can be enough
            return []
        faults = [
            f"Args lacks {p.name}" for p in parameters_of(function) if f"{p.name}:" not in arguments
        ]
        returns = inspect.signature(function).return_annotation
        if returns not in (None, "None") and not ("Returns:\n" in doc or "Yields:\n" in doc):
            faults.append("no Returns")
        return faults

    assert violations(name, faults_of) == []
    module = importlib.import_module(name)
    undocumented = [c.__name__ for c in public_members(module, inspect.isclass) if not c.__doc__]
    assert undocumented == []
    assert module.__doc__


@every_module
def test_annotations_are_complete(name):
    def faults_of(function: Callable) -> list[str]:
        signature = inspect.signature(function)
        faults = [p.name for p in parameters_of(function) if p.annotation is p.empty]
        return faults + ["return"] * (signature.return_annotation is signature.empty)

    assert violations(name, faults_of) == []


@every_module
def test_what_has_a_default_is_keyword_only(name):
    """Data is positional and hyperparameters, booleans above all, are named by the caller."""

    def faults_of(function: Callable) -> list[str]:
        return [
            p.name
            for p in parameters_of(function)
            if p.kind in POSITIONAL and (p.default is not p.empty or p.annotation in (bool, "bool"))
        ]

    assert violations(name, faults_of) == []


@every_module
def test_nothing_reduces_by_a_string(name):
    def faults_of(function: Callable) -> list[str]:
        return [p.name for p in parameters_of(function) if p.name == "reduction"]

    assert violations(name, faults_of) == []


@pytest.mark.parametrize("name", ["afl_jax", *MODULES])
def test_all_is_sorted_and_importable(name):
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", [])
    assert list(exported) == sorted(exported)
    assert [n for n in exported if not hasattr(module, n)] == []


def test_the_package_exports_what_it_imports():
    public = {name for name in vars(afl_jax) if not name.startswith("_")}
    modules = {name for name in public if inspect.ismodule(getattr(afl_jax, name))}
    assert public - modules == set(afl_jax.__all__)


# --- losses and models -------------------------------------------------------------------------


def test_registries_are_plain_dicts_of_callables():
    for registry in (LOSSES, MODELS):
        assert type(registry) is dict
        assert registry
        assert all(callable(value) for value in registry.values())


def test_every_public_function_that_is_a_loss_by_name_is_registered():
    functions = [
        function
        for name in MODULES
        if name.startswith("afl_jax.losses.")
        for function in public_functions(name)
        if function.__name__.endswith("_loss")
    ]
    assert {f"{name}_loss": f for name, f in LOSSES.items()} == {f.__name__: f for f in functions}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_have_one_signature(name):
    signature = inspect.signature(LOSSES[name])
    parameters = list(signature.parameters.values())
    assert [p.name for p in parameters if p.kind in POSITIONAL] == ["logits", "labels"]
    assert {p.kind for p in parameters[2:]} == {inspect.Parameter.KEYWORD_ONLY}
    assert [p.name for p in parameters[2:] if p.default is p.empty] == []
    assert "voxel_mask" in signature.parameters
    assert signature.return_annotation is jax.Array
