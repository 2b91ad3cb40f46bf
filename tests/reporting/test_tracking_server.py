"""The commands of docs/scale-out.md: an MLflow server on a real PostgreSQL takes a stage's run."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from isim.experiments import preset

ROOT = Path(__file__).parents[2]
PASSWORD = "of-the-admin-1"
# PostgreSQL refuses to run as root.
DEMOTE = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]

THERE = all(map(shutil.which, ("initdb", "pg_ctl", "createdb", "psql")))

pytestmark = pytest.mark.skipif(
    not THERE or None in map(importlib.util.find_spec, ("psycopg2", "flask_wtf")),
    reason="needs PostgreSQL's programs, psycopg2-binary and Flask-WTF",
)


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


def test_the_documented_server_takes_a_run(postgres, serve, free_port, tmp_path):
    section = (ROOT / "docs/scale-out.md").read_text().split("## MLflow on PostgreSQL")[1]
    found = re.findall(r"^    (\S.*)$", section, re.MULTILINE)
    install, create, password, key, command, export, account = found
    assert install == "pip install psycopg2-binary Flask-WTF"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "MLFLOW_", "DVC_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = kept | postgres | {"PATH": path}
    subprocess.run(["bash", "-c", create], env=env, check=True, timeout=60)
    assert "--port 5000" in command and "--host 0.0.0.0" in command
    # One worker starts faster; others must not reach it.
    command = command.replace("5000", str(free_port)).replace("0.0.0.0", "127.0.0.1")
    command = f"{{ {password}; }} <<< '{PASSWORD}' && {key} && {command} --workers 1"
    serve(["bash", "-c", command], env)
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"http://127.0.0.1:{free_port}/api/2.0/mlflow/experiments/get")
    preset.write("tiny", tmp_path / "params.yaml")
    export = export.replace("tracking-host:5000", f"127.0.0.1:{free_port}")
    own = env | {"PYTHONPATH": f"{ROOT}{os.pathsep}{kept.get('PYTHONPATH', '')}"}

    def prepare(given):
        words = f"{export} && {{ {account}; }} <<< '{given}' && python -m isim prepare"
        where = {"cwd": tmp_path, "env": own, "capture_output": True, "text": True}
        return subprocess.run(["bash", "-c", words], timeout=180, **where)

    refused = prepare("another-secret")
    assert refused.returncode == 2 and "MLFLOW_TRACKING_PASSWORD" in refused.stderr
    assert "another-secret" not in refused.stderr and len(refused.stderr.splitlines()[-1]) < 320
    done = prepare(PASSWORD)
    assert done.returncode == 0, done.stderr
    assert PASSWORD not in done.stdout + done.stderr
    assert not (tmp_path / "mlflow.db").exists()

    def ask(query):
        command = ["psql", "--no-align", "--tuples-only", "--command", query, "isim"]
        return subprocess.check_output(command, env=env, text=True).split()

    stages = "select t.value, r.status from runs r join tags t using (run_uuid)"
    # The other stages are to come.
    expected = ["pipeline|KILLED", "prepare|FINISHED"]
    assert sorted(ask(f"{stages} where t.key = 'stage'")) == expected
    assert int(ask("select count(*) from metrics")[0]) > 0
