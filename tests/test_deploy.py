"""What deploy/ holds fits together, as far as that can be seen without Docker, SLURM and Kubernetes."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import click
import mlflow.cli
import pytest
import yaml

from rampart.settings import resolve

DEPLOY = Path(__file__).parents[1] / "deploy"


@pytest.fixture
def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def test_only_the_proxy_is_reachable_and_by_this_machine_alone_until_told_otherwise(compose: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in compose["services"].items() if "ports" in service}
    assert list(published) == ["proxy"]
    assert all(port.startswith("${BIND:-127.0.0.1}:") for port in published["proxy"])
    assert "--app-name basic-auth" in compose["services"]["mlflow"]["command"]


def test_every_secret_is_asked_for_and_none_is_in_the_files(compose: dict[str, Any]) -> None:
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", (DEPLOY / "compose.yaml").read_text()))
    lines = [line for line in (DEPLOY / "env.example").read_text().splitlines() if line and not line.startswith("#")]
    given = dict(line.split("=", 1) for line in lines)
    assert used == set(given)
    assert {name for name, value in given.items() if value} == {"HOST", "BIND"}


def test_services_depend_on_services_and_use_configs_that_there_are(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for service in services.values():
        for needed, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert "healthcheck" in services[needed]
        assert {config["source"] for config in service.get("configs", [])} <= set(compose["configs"])
        volumes = {volume.partition(":")[0] for volume in service.get("volumes", [])}
        assert volumes <= set(compose["volumes"])


def test_the_server_is_given_options_that_mlflow_knows(compose: dict[str, Any]) -> None:
    command = shlex.split(re.sub(r"\$\{(\w+)[^}]*\}", r"\1", compose["services"]["mlflow"]["command"]))
    assert command[:2] == ["mlflow", "server"]
    with click.Context(mlflow.cli.server) as context:
        options, _, _ = mlflow.cli.server.make_parser(context).parse_args(command[2:])
    assert options["app_name"] == "basic-auth"
    assert options["artifacts_destination"] == "s3://mlflow"
    versions = re.findall(r"mlflow\S*==(\S+?)\"", (DEPLOY / "server.Dockerfile").read_text())
    assert versions == [mlflow.__version__]


def test_images_are_built_from_files_that_there_are() -> None:
    for line in (DEPLOY / "worker.Dockerfile").read_text().splitlines():
        if line.startswith("COPY"):
            assert all((DEPLOY.parent / name).exists() for name in line.split()[1:-1])


def test_cluster_files_give_the_study_settings_that_it_knows() -> None:
    job = yaml.safe_load((DEPLOY / "kuberay.yaml").read_text())
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:4] == ["python", "-m", "rampart", "main"]
    resolve("main", {name.lstrip("-"): value for name, value in zip(words[4::2], words[5::2], strict=True)})
    script = DEPLOY / "slurm.sh"
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    (line,) = (line for line in script.read_text().splitlines() if line.startswith("python -m rampart main"))
    assert '--executor ray --address "$head:$port" "$@"' in line
