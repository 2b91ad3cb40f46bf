"""The commands of docs/scale-out.md: an MLflow server on a real PostgreSQL takes a stage's run."""

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# PostgreSQL refuses to run as root.
DEMOTE = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]

pytestmark = [
    pytest.mark.skipif(
        not all(map(shutil.which, ("initdb", "pg_ctl", "createdb", "psql"))),
        reason="needs PostgreSQL's programs",
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("psycopg2") is None, reason="needs psycopg2-binary"
    ),
]


def documented():
    """Commands of the section on PostgreSQL, in order."""
    section = (ROOT / "docs/scale-out.md").read_text().split("## MLflow on PostgreSQL")[1]
    return re.findall(r"^    (\S.*)$", section, re.MULTILINE)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def postgres():
    """Environment of a client of a fresh cluster that is reached by a socket alone."""
    # Not pytest's folder, which is closed to other users.
    folder = Path(tempfile.mkdtemp(prefix="isim-pg-"))
    demote = DEMOTE if os.geteuid() == 0 else []
    if demote:
        shutil.chown(folder, "nobody", "nogroup")

    def call(*command):
        done = subprocess.run(
            [*demote, *command], cwd=folder, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr

    control = ["pg_ctl", "--pgdata", str(folder / "data"), "--wait"]
    try:
        call("initdb", "--pgdata", str(folder / "data"), "--username=isim", "--auth=trust")
        options = f"-c listen_addresses= -c fsync=off -k {folder}"
        call(*control, "--log", str(folder / "log"), "--options", options, "start")
        try:
            yield {"PGHOST": str(folder), "PGUSER": "isim"}
        finally:
            call(*control, "--mode=immediate", "stop")
    finally:
        shutil.rmtree(folder)


def test_the_documented_server_takes_a_run(postgres, prepared_project, tmp_path):
    install, create, serve, export = documented()
    assert install == "pip install psycopg2-binary"
    port = free_port()
    own = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "DO_NOT_TRACK": "true"}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "MLFLOW_", "DVC_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = kept | postgres | own | {"PATH": path}
    subprocess.run(["bash", "-c", create], env=env, check=True, timeout=60)
    assert "--port 5000" in serve and "--host 0.0.0.0" in serve
    # One worker starts faster; others must not reach it.
    serve = serve.replace("5000", str(port)).replace("0.0.0.0", "127.0.0.1") + " --workers 1"
    log = (tmp_path / "log").open("w+")
    server = subprocess.Popen(
        ["bash", "-c", serve],
        cwd=tmp_path,
        env=env,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        address = f"http://127.0.0.1:{port}"
        end = time.monotonic() + 180
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                assert server.poll() is None and time.monotonic() < end, Path(log.name).read_text()
                time.sleep(0.2)
        project = tmp_path / "project"
        project.mkdir()
        shutil.copy(prepared_project / "params.yaml", project)
        export = export.replace("tracking-host:5000", f"127.0.0.1:{port}")
        command = f"{export} && python -m isim prepare"
        subprocess.run(
            ["bash", "-c", command],
            cwd=project,
            env=env | {"PYTHONPATH": f"{ROOT}{os.pathsep}{kept.get('PYTHONPATH', '')}"},
            check=True,
            timeout=180,
        )
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        log.close()
    assert not (project / "mlflow.db").exists()

    def ask(query):
        command = ["psql", "--no-align", "--tuples-only", "--command", query, "isim"]
        return subprocess.run(
            command, env=env, check=True, capture_output=True, text=True
        ).stdout.split()

    stages = "select t.value, r.status from runs r join tags t using (run_uuid)"
    assert sorted(ask(f"{stages} where t.key = 'stage'")) == [
        "pipeline|FINISHED",
        "prepare|FINISHED",
    ]
    assert int(ask("select count(*) from metrics")[0]) > 0
