"""The picture of the package, asserted: who may import whom, and what importing it costs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "afl_jax"

# module -> the internal modules it may import. `errors` is open to all.
ALLOWED: dict[str, set[str]] = {
    "__init__": {"irregularity", "losses.__init__", "models.zoo", "statistics"},
    "errors": set(),
    "statistics": set(),
    "distance": {"statistics"},
    "irregularity": {"distance", "statistics"},
    "losses.__init__": {
        "losses.adaptive_focal",
        "losses.boundary",
        "losses.compound",
        "losses.distribution",
        "losses.region",
    },
    "losses.channels": set(),
    "losses.adaptive_focal": {"irregularity", "losses.channels", "statistics"},
    "losses.boundary": {"distance", "losses.channels"},
    "losses.distribution": {"losses.channels"},
    "losses.region": {"losses.channels"},
    "losses.compound": {
        "losses.boundary",
        "losses.channels",
        "losses.distribution",
        "losses.region",
    },
    "metrics": set(),
    "lesions": set(),
    "config": set(),
    "presets": {"config"},
    "models.__init__": set(),
    "models.blocks": set(),
    "models.encoder": {"models.blocks"},
    "models.decoder": {"models.blocks"},
    "models.zoo": {"models.blocks", "models.decoder", "models.encoder"},
    "models.pretrained": set(),
    "data.__init__": set(),
    "data.headers": set(),
    "data.volume": {"data.headers", "files"},
    "data.cases": {"data.preprocess", "data.volume"},
    "data.preprocess": {"data.headers", "data.volume", "lesions"},
    "data.augment": set(),
    "data.records": {"data.cases", "data.preprocess", "data.volume", "files", "lesions"},
    "data.brats2018": {"data.cases", "data.preprocess", "data.records", "data.volume"},
    "data.picai2022": {"data.cases", "data.preprocess", "data.records", "data.volume"},
    "data.folder": {"data.cases", "data.preprocess", "data.records", "data.volume"},
    "data.phantom": {"data.cases", "data.preprocess", "data.records", "data.volume"},
    "data.loader": {
        "data.brats2018",
        "data.folder",
        "data.phantom",
        "data.picai2022",
        "data.records",
    },
    "training": set(),
    "parallel": set(),
    "checkpoint": {"config"},
    "inference": set(),
    "files": set(),
    "signals": set(),
    "fingerprint": set(),
    "comparison": set(),
    "reports": {"files"},
    "figures": {"files", "reports"},
    "evaluation": {"irregularity", "lesions", "metrics", "reports"},
    "detection": set(),
    "html_report": {"figures", "reports"},
    "loop": {"checkpoint", "config", "metrics", "parallel", "reports", "signals"},
}
# The command line is where names become objects: it alone may import everything.
COMPOSITION_ROOT = re.compile(r"cli|commands\..+")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def internal_imports(path: Path) -> set[str]:
    """Internal modules that a file imports anywhere in it, lazily or not."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; the house imports absolutely"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    names = {name.removeprefix("afl_jax.") for name in found if name.startswith("afl_jax.")}
    names |= {f"{name}.__init__" for name in names}
    return {name for name in names if name in MODULES} - {"errors"}


def test_every_module_has_its_place_in_the_table():
    assert {name for name in MODULES if not COMPOSITION_ROOT.fullmatch(name)} == set(ALLOWED)


@pytest.mark.parametrize("module", sorted(ALLOWED))
def test_a_module_imports_only_what_the_design_allows(module: str):
    assert internal_imports(MODULES[module]) <= ALLOWED[module]


def test_only_parallel_names_pmap():
    pmap = re.compile(r"jax\.pmap|import pmap")
    naming = {name for name, path in MODULES.items() if pmap.search(path.read_text())}
    assert naming == {"parallel"}


def test_top_level_holds_what_the_design_lists():
    allowed = {"pyproject.toml", "afl_jax", "experiments", "tests", "README.md", "LICENSE"}
    root = PACKAGE.parent
    listed = subprocess.run(
        ["git", "ls-files"], cwd=root, capture_output=True, text=True, check=False
    ).stdout.split()
    if not listed:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in listed}
    assert {name for name in top if not name.startswith(".")} == allowed


def test_importing_the_package_is_cheap():
    program = (
        "import sys, afl_jax;"
        "heavy = {'tensorflow', 'tensorflow_datasets', 'SimpleITK', 'matplotlib', 'grain',"
        " 'orbax', 'scipy.stats', 'tyro', 'torch'};"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []
