"""Figures become files: reproducible, anywhere, with clear errors."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qkv_jax import viz


def picture():
    return viz.attention_heatmap(np.eye(3), query_tokens=["a", "\n", "c"])


@pytest.mark.parametrize("suffix, signature", [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_the_same_figure_is_the_same_file(tmp_path, suffix, signature):
    first = viz.save_figure(picture(), tmp_path / "new" / "folder" / f"first.{suffix}")
    second = viz.save_figure(picture(), str(tmp_path / f"second.{suffix}"))
    assert first.read_bytes().startswith(signature)
    assert first.read_bytes() == second.read_bytes()


def test_another_suffix_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match=r"\.png or \.svg; got .*map\.gif"):
        viz.save_figure(picture(), tmp_path / "map.gif")


def test_an_unwritable_path_says_so(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match=r"cannot write the figure: .*file"):
        viz.save_figure(picture(), tmp_path / "file" / "map.png")


def test_drawing_needs_no_display_and_touches_no_global_figure(tmp_path):
    script = (
        "import sys, numpy as np\n"
        "from qkv_jax import viz\n"
        "assert 'matplotlib' not in sys.modules, 'importing viz imports matplotlib'\n"
        "import matplotlib\n"
        "before = dict(matplotlib.rcParams)\n"
        "viz.save_figure(viz.heads_figure(np.eye(3)[None]), sys.argv[1])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert dict(matplotlib.rcParams) == before\n"
    )
    root = Path(viz.__file__).parents[2]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "MPLBACKEND": "TkAgg"}
    command = [sys.executable, "-c", script, str(tmp_path / "map.png")]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "map.png").exists()
