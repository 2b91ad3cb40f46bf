"""Wheels of this isim, and variables of a shell that knows nothing of the caller's settings."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def wheel(folder):
    """Build a wheel without a network, in `folder`, where setuptools leaves `build/`, too."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "isim", folder / "isim")
    code = "from setuptools.build_meta import build_wheel; build_wheel('.')"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def environment(state, **changes):
    """Variables without the caller's for DVC, git, isim, MLflow, Python; DVC's lie in `state`."""
    ours = ("DVC_", "GIT_", "ISIM_", "MLFLOW_", "PYTHON")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "DVC_GLOBAL_CONFIG_DIR": str(state / "global"),
        "DVC_SYSTEM_CONFIG_DIR": str(state / "system"),
        "DVC_SITE_CACHE_DIR": str(state / "site"),
        "ISIM_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
        **changes,
    }
