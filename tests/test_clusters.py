"""The cluster files: what Ray's own launcher would refuse, we refuse here."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("path", sorted((ROOT / "clusters").glob("*.yaml")), ids=lambda path: path.name)
def test_a_cluster_file_fits_rays_schema(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(path.read_text())
    validate_config(prepare_config(config))
    del config["provider"]
    with pytest.raises(Exception, match="provider"):
        validate_config(config)


def test_ray_is_pinned_to_one_minor_version_everywhere() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = [line for line in project["dependencies"] if line.startswith("ray[")]
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ray==")]
    assert ranges == ["ray[default,tune]==2.60.*"]
    assert [pin.rpartition(".")[0] for pin in pins] == ["ray==2.60"]


def test_constraints_are_exact_pins_and_nothing_else() -> None:
    import re

    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9_.\-]+==[A-Za-z0-9_.\-+!]+", line), line
