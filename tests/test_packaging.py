"""What ships in the wheel is found from another folder, as is the one file that `ray submit` copies."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the package as a wheel unpacks it, and nothing of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)], check=True
    )
    (wheel,) = folder.glob("raycv-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return folder / "site"


def python(installed, *arguments, cwd):
    """Runs Python with the installed package before the checkout, in a folder of its own."""
    code = f"import sys; sys.path.insert(0, {str(installed)!r})"
    (cwd / "sitecustomize.py").write_text(code)
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), "PYTHONPATH": f"{cwd}:{installed}"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.core
def test_configs_sample_and_model_travel_in_the_wheel(installed, tmp_path):
    where = python(installed, "-c", "import raycv; print(raycv.__file__)", cwd=tmp_path)
    assert where.stdout.startswith(str(installed)), where.stdout + where.stderr
    shown = python(installed, "-m", "raycv.run", "experiment=quickstart", "--cfg", "job", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    config = yaml.safe_load(shown.stdout)
    assert config["model"]["name"] == "raycv://models/tiny_llama"
    code = (
        "from pathlib import Path; from raycv.common.locations import resolve;"
        "from raycv.data.dataset import load_dataset;"
        "from raycv.model.base_model import fetch_base;"
        "from raycv.rendering.page import html_of;"
        "html_of({'run': 'mine', 'subtitle': '', 'notice': '', 'control': False}, []);"
        "sample = Path(resolve('raycv://data/sample')); print(len(load_dataset(sample, sample).pairs));"
        "print(fetch_base('raycv://models/tiny_llama', None).path)"
    )
    found = python(installed, "-c", code, cwd=tmp_path)
    pairs, model = found.stdout.split()
    assert int(pairs) == 990
    assert model.startswith(str(installed))


@pytest.mark.core
def test_the_copied_script_runs_as_ray_submit_runs_it(installed, tmp_path):
    shutil.copy(ROOT / "raycv" / "run.py", tmp_path / "run.py")
    refused = python(installed, "run.py", "cv.folds=1", cwd=tmp_path)
    assert refused.returncode == 2
    assert "cv.folds: must be 2 or more; received 1" in refused.stderr
    missing = python(installed, "run.py", "cv.folds=5", cwd=tmp_path)
    assert missing.returncode == 2
    assert "irlab-udc/redsm5" in missing.stderr


@pytest.mark.core
def test_nothing_gated_or_local_is_in_the_wheel(installed):
    names = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    assert not any("data/redsm5/" in name for name in names)
    assert not any(name.endswith((".db", ".lock")) or "/runs/" in name for name in names)
    assert any(name == "raycv/bundled/configs/run.yaml" for name in names)
