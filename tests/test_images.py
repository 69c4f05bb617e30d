"""The Dockerfiles: pinned, unprivileged, and with what KubeRay and the pods expect. What hadolint would say, and more."""

from __future__ import annotations

import re

import pytest
from imports import REPOSITORY

from tunesmith.cluster.kube.pods import HOME, MOUNT, USER

DEVICES = ("cpu", "gpu")


def instructions(device: str) -> list[tuple[str, str]]:
    """Each instruction of a Dockerfile with its arguments on one line."""
    text = (REPOSITORY / f"Dockerfile.{device}").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in whole.splitlines() if line.strip())]


def of(device: str, word: str) -> list[str]:
    return [rest for name, rest in instructions(device) if name == word]


@pytest.mark.parametrize("device", DEVICES)
def test_bases_have_a_whole_version_and_stages_the_same(device: str) -> None:
    bases = [rest.partition(" ")[0] for rest in of(device, "FROM")]
    assert len(bases) == 2
    assert len(set(bases)) == 1
    assert re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+-[a-z0-9.-]+", bases[0]), bases[0]


@pytest.mark.parametrize("device", DEVICES)
def test_the_image_runs_as_the_user_of_the_pods(device: str) -> None:
    assert of(device, "USER") == [f"{USER}:{USER}"]
    assert instructions(device)[-2][0] == "USER", "nothing is written after the user is chosen"
    accounts = next(rest for rest in of(device, "RUN") if "useradd" in rest)
    assert f"--uid {USER} --gid {USER}" in accounts
    assert f"--home-dir {HOME}" in accounts
    assert of(device, "WORKDIR")[-1] == MOUNT


@pytest.mark.parametrize("device", DEVICES)
def test_packages_come_from_the_lock_alone(device: str) -> None:
    installs = [rest for rest in of(device, "RUN") if "pip install" in rest]
    assert len(installs) == 2
    assert all("--no-deps" in rest for rest in installs)
    assert f"-r requirements/{device}.lock" in installs[0]
    assert "--no-build-isolation ." in installs[1]
    assert (REPOSITORY / "requirements" / f"{device}.lock").is_file()


@pytest.mark.parametrize("device", DEVICES)
def test_system_packages_are_few_and_leave_no_lists(device: str) -> None:
    runs = [rest for rest in of(device, "RUN") if re.search(r"\b(apt-get|dnf)\b", rest)]
    for rest in runs:
        bare = "--no-install-recommends" if "apt-get" in rest else "--setopt=install_weak_deps=False"
        assert bare in rest
        assert rest.endswith(("rm -rf /var/lib/apt/lists/*", "dnf clean all"))
        assert "upgrade" not in rest
    assert {"wget"} <= set(runs[-1].split())
    assert {"g++", "gcc-c++"} & set(runs[-1].split())


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_that_fails_fails_the_build(device: str) -> None:
    forgiven = [rest for rest in of(device, "RUN") if "||" in rest or ";" in rest]
    assert ["compileall" in rest and "&&" not in rest for rest in forgiven] == [True]


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_is_fetched_from_an_address_and_no_secret_is_kept(device: str) -> None:
    assert of(device, "ADD") == []
    assert "sudo" not in str(instructions(device))
    assert "://" not in str(instructions(device))
    stages = [word for word, _ in instructions(device)]
    last = len(stages) - stages[::-1].index("FROM")
    assert "ARG" not in stages[last:], "build arguments of the last stage stay in the image's history"
    for name in re.findall(r"(\w+)=", " ".join(of(device, "ENV"))):
        assert not re.search(r"TOKEN|PASSWORD|SECRET|KEY", name)


def test_only_what_an_image_needs_is_sent_to_the_builder() -> None:
    ignored = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored[0] == "*"
    for entry in ignored[1:]:
        if entry.startswith("!") and "*" not in entry:
            assert (REPOSITORY / entry[1:]).exists(), entry
    copied = {"pyproject.toml", "README.md", "LICENSE", "cluster", "trainers", "tuning", "serving"}
    assert {f"!{name}" for name in copied} <= set(ignored)
