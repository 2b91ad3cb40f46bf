"""MLflow's user interface on the runs of a project: on this machine alone, and telling nobody."""

import os
import sys
from pathlib import Path

from isim.errors import UserError, without_secrets
from isim.reporting import store


def command(root: Path, port: int) -> tuple[list[str], dict[str, str], str]:
    """Prepare the store, and return a command, its environment, and the address to open.

    The store's address, which may hold a password, is in the environment alone: every user of a
    machine can read the arguments of a process.

    Raises:
        UserError: The store cannot be used, or is a server, which has its own user interface.
    """
    uri = store.tracking_uri(root)
    if uri.startswith(("http://", "https://")):
        raise UserError(
            f"the runs are on the MLflow server {without_secrets(uri)[:150]}: open that address in "
            "a browser, or unset MLFLOW_TRACKING_URI to see those of mlflow.db"
        )
    experiment = store.refresh(root)
    environment = os.environ | {
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        # With one worker it starts several times faster in a quarter of the memory.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    words = [sys.executable, "-m", "mlflow", "ui", "--workers", "1", "--host", "127.0.0.1"]
    place = f"#/experiments/{experiment}/runs?workflowType=machine_learning"
    return [*words, "--port", str(port)], environment, f"http://127.0.0.1:{port}/{place}"
