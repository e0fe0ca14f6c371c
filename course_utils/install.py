"""Install what the course needs and this Python lacks; the notebooks' first cell ends here."""

import importlib
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement  # comes with Jupyter
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.txt"
KEEP = ("torch", "torchvision", "numpy")         # built for each other and the platform's GPU
AGAIN = "switch the notebook's internet on (on Kaggle: Settings, Internet) and run this cell again"


def installed_versions():
    """The version of each installed package; the first on the path counts, as in an import."""
    versions = {}
    for package in metadata.distributions():
        name, version = package.metadata["Name"], package.version
        try:
            versions.setdefault(canonicalize_name(name), str(Version(version)))
        except (InvalidVersion, TypeError):              # a broken or half-removed package
            continue
    return versions


def unmet(lines, versions):
    """The requirements in `lines` that `versions` lack or hold in a version out of range."""
    found = []
    for line in lines:
        line = line.split("#")[0].strip()
        if not line:
            continue
        wanted = Requirement(line)
        name = canonicalize_name(wanted.name)
        if name == "jupyter" or (wanted.marker and not wanted.marker.evaluate()):
            continue                                     # the notebook runs in a Jupyter already
        version = versions.get(name)
        if version is None or not wanted.specifier.contains(version, prereleases=True):
            found.append(wanted)
    return found


def in_use(names):
    """Those of the installed packages `names` of which something is imported already."""
    imported = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    return [name for name in names
            if any(str(file.locate()) in imported for file in metadata.files(name) or ())]


def pip_install(wanted, pinned):
    """Install `wanted` and leave the packages in `pinned`, a dict of versions, as they are."""
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "installed.txt"
        constraints.write_text("".join(f"{n}=={v}\n" for n, v in pinned.items()))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--retries=2",
                   "--disable-pip-version-check", "--constraint", str(constraints),
                   *map(str, wanted)]
        return subprocess.run(command, capture_output=True, text=True)


def reason(text):
    """The last line of an error text that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no reason given"]
    errors = [line for line in lines if line.lower().startswith("error")]
    return (errors or lines)[-1]


def install_missing():
    """Install only what is missing or out of range; inside a clone, only say what that is.

    Everything else keeps its version. Where that cannot be, only `KEEP` does. Raises RuntimeError
    with one sentence that says what to do when pip fails.
    """
    if sys.version_info < (3, 10):  # noqa: UP036, nothing has checked it yet
        raise RuntimeError("The course needs Python 3.10 or newer: choose another kernel, or on "
                           "Studio Lab let it build the environment of environment.yml.")
    versions = installed_versions()
    wanted = unmet(REQUIREMENTS.read_text(encoding="utf-8").splitlines(), versions)
    if not wanted:
        return
    names = ", ".join(map(str, wanted))
    in_clone = Path.cwd().is_relative_to(REQUIREMENTS.parent)
    if in_clone and "PAPERSPACE_FQDN" not in os.environ:     # Gradient opens a clone of its own
        print(f'This Python lacks {names}: run %pip install -r "{REQUIREMENTS}" in a cell.')
        return
    print(f"Installing {names}; this can take some minutes.")
    to_install = {canonicalize_name(r.name) for r in wanted}
    pinned = {n: v for n, v in versions.items() if n not in to_install}
    loaded = in_use(r.name for r in wanted if canonicalize_name(r.name) in versions)
    done = pip_install(wanted, pinned)
    if "ResolutionImpossible" in done.stderr:
        done = pip_install(wanted, {n: v for n, v in pinned.items() if n in KEEP})
    if done.returncode != 0:
        offline = "No matching distribution" in done.stderr or "onnection" in done.stderr
        advice = AGAIN if offline else f'run %pip install -r "{REQUIREMENTS}" in a Python of yours'
        raise RuntimeError(f"Could not install {names}: {advice} (pip said: "
                           f"{reason(done.stderr)}).")
    importlib.invalidate_caches()
    if loaded:
        print(f"Replaced while in use: {', '.join(loaded)}. "
              "Restart the kernel once and run from the top.")
