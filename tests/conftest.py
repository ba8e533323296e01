"""Fixtures that several tests share. Small networks, few threads: the machine has two cores."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

# Beside other workers of pytest-xdist each has a core to itself, and shares it with the processes that it starts.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
# Where there is no GPU, its programs are interpreted; Triton asks when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from filelock import FileLock
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from torch import Tensor

from rampart.data import Dataset, Split, load_dataset

ALONE = "PYTEST_XDIST_WORKER" not in os.environ
SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def _threads() -> None:
    torch.set_num_threads(2 if ALONE else 1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return load_dataset("digits")


@pytest.fixture(scope="session")
def few_digits(digits: Dataset) -> Dataset:
    """200 images to train on, 100 to validate on."""
    return replace(digits, train=digits.train[:200], val=digits.val[:100], test=digits.test[:10])


class Sealed:
    """Images whose shape may be asked for, and nothing else."""

    shape = (10, 3, 32, 32)

    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"'{name}' of the test images was read")

    def __getitem__(self, index: object) -> object:
        raise AssertionError("test images were read")


class SealedSplit(Split):
    """A split that may be moved to a device, where nobody reads it either."""

    def to(self, device: torch.device | str) -> Split:
        return self

    def __len__(self) -> int:
        raise AssertionError("the test images were counted")

    def __getitem__(self, index: Tensor | slice) -> Split:
        raise AssertionError("test images were read")


@pytest.fixture
def sealed_digits(few_digits: Dataset) -> Dataset:
    """The same, whose test images nobody may read."""
    return replace(few_digits, test=SealedSplit(Sealed(), Sealed()))


@pytest.fixture(scope="session")
def fresh_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tracking store's database as MLflow makes it, in seconds, to be copied."""
    folder = tmp_path_factory.mktemp("fresh")
    store = SqlAlchemyStore(f"sqlite:///{folder}/mlflow.db", str(folder / "mlruns"))
    store.engine.dispose()
    return folder / "mlflow.db"


@pytest.fixture(autouse=True)
def store(tmp_path: Path, fresh_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test works in a folder of its own, with a tracking store and a cache of its own."""
    shutil.copy(fresh_store, tmp_path / "mlflow.db")
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database, database:
        database.execute("UPDATE experiments SET artifact_location = ?", (f"{tmp_path}/mlruns/0",))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture(scope="session")
def study_models() -> dict[str, Path]:
    """The six published models, by name."""
    folder = SHARED / "data" / "paper-models"
    if not folder.is_dir():
        pytest.skip("the study's published models are not beside this checkout (../shared/data/paper-models)")
    return {path.stem: path for path in sorted(folder.glob("*.npz"))}


# One small study serves all tests that look at what a study leaves behind.
TINY_STUDY = {
    "methods": "normal,certified",
    "augment": "False",
    "width": "0.125",
    "epochs": "2",
    "encoder_epochs": "1",
    "head_epochs": "1",
    "images": "6",
    "points": "30",
    "evaluate.eps": "4/255,16/255",
    "evaluate.certify_images": "40",
    "threads": "1",
}


def as_words(settings: Mapping[str, str]) -> list[str]:
    """`--name value …`, as they stand on a command line."""
    return [word for name, value in settings.items() for word in (f"--{name}", value)]


def run_rampart(
    step: str, settings: dict[str, str], folder: Path, store: str | None = None
) -> subprocess.CompletedProcess[str]:
    """`python -m rampart step --name value …` as a user's process; its store is in `folder` where no other is given."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    env |= {"MLFLOW_TRACKING_URI": store or f"sqlite:///{folder}/mlflow.db"}
    env |= {"PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    command = [sys.executable, "-m", "rampart", step, *as_words(settings)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def start_mlflow(
    words: list[str], folder: Path, port: int, env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """`mlflow …` that serves on that port, once it answers; its processes are a group of their own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", *words, "--port", str(port), "--workers", "1"],
        cwd=folder,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    for _ in range(240):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
            break
        except OSError:
            time.sleep(0.5)
    return process


@contextmanager
def mlflow_server(words: list[str], folder: Path, env: Mapping[str, str] | None = None) -> Iterator[str]:
    """`mlflow …` that serves on a port of its own; its address, once it answers."""
    port = free_port()
    process = start_mlflow(words, folder, port, env)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@dataclass(frozen=True)
class Study:
    """A finished study: its folder, and what it printed."""

    folder: Path
    output: str


@pytest.fixture(scope="session")
def finished_study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    base = tmp_path_factory.getbasetemp()
    # One study for all workers of pytest-xdist, whose folders lie side by side: the first makes it, the others wait.
    folder = (base if ALONE else base.parent) / "study"
    output = folder / "output.txt"
    with FileLock(f"{folder}.lock"):
        if not output.exists():
            folder.mkdir(exist_ok=True)
            done = run_rampart("main", TINY_STUDY, folder)
            assert done.returncode == 0, done.stderr[-3000:]
            output.write_text(done.stdout)
    return Study(folder, output.read_text())


@pytest.fixture
def study(finished_study: Study, store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Study]:
    """The finished study, its store being the one in use: to be read alone, for other tests read it, too."""
    monkeypatch.chdir(finished_study.folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{finished_study.folder}/mlflow.db")
    before = runs_in(finished_study.folder)
    yield finished_study
    assert runs_in(finished_study.folder) == before, "a test that adds runs to the study works on a copy: take own"


def runs_in(folder: Path) -> int:
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        (count,) = database.execute("SELECT count(*) FROM runs").fetchone()
    return int(count)


@pytest.fixture
def own(study: Study, store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished study's store alone, for a test to work on."""
    folder = store / "copy"
    folder.mkdir()
    shutil.copytree(study.folder / "mlruns", folder / "mlruns")
    shutil.copy(study.folder / "mlflow.db", folder)
    places = {"experiments": "artifact_location", "runs": "artifact_uri", "logged_models": "artifact_location"}
    with closing(sqlite3.connect(folder / "mlflow.db")) as database, database:
        for table, column in places.items():
            database.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (str(study.folder), str(folder)))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    return folder


class Postgres:
    """A PostgreSQL server of its own.

    Args:
        url: of its database.
    """

    def __init__(self, binaries: Path) -> None:
        self.binaries, self.port = binaries, free_port()
        self.folder = tempfile.mkdtemp(prefix="rampart-pg-", dir="/tmp")
        # It refuses to run as root.
        self.user = "nobody" if os.getuid() == 0 else None
        if self.user:
            shutil.chown(self.folder, self.user)
        self.url = f"postgresql://rampart@127.0.0.1:{self.port}/postgres"
        self._run("initdb", "-D", f"{self.folder}/data", "-A", "trust", "-U", "rampart")

    def start(self) -> None:
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1"
        self._run("pg_ctl", "-D", f"{self.folder}/data", "-w", "-l", f"{self.folder}/log", "-o", options, "start")

    def crash(self) -> None:
        """As if it were killed: it recovers when it is started."""
        self._run("pg_ctl", "-D", f"{self.folder}/data", "-m", "immediate", "stop")

    def _run(self, program: str, *words: str) -> None:
        command = [str(self.binaries / program), *words]
        subprocess.run(command, user=self.user, check=True, capture_output=True, cwd=self.folder)


@pytest.fixture
def postgres_server() -> Iterator[Postgres]:
    found = shutil.which("pg_ctl") or next(iter(map(str, Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))), None)
    if found is None:
        pytest.skip("PostgreSQL's server (pg_ctl) is not installed")
    server = Postgres(Path(found).resolve().parent)
    server.start()
    try:
        yield server
    finally:
        server.crash()
        shutil.rmtree(server.folder, ignore_errors=True)


@pytest.fixture
def postgres(postgres_server: Postgres) -> str:
    """The URL of a PostgreSQL server of its own."""
    return postgres_server.url
