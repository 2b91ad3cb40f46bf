"""The user interface: its command, what it tells others (nothing), and whom it answers."""

import pytest

from isim.errors import UserError
from isim.reporting import store, ui


def test_the_address_of_the_store_is_in_no_list_of_processes(tracked):
    """A run whose process died is marked before it is shown."""
    run = tracked.run()
    tracked.client.set_tag(run.run_id, "isim.process", "of a boot long ago")
    tracked.client.update_run(run.run_id, status="RUNNING")
    words, environment, address = ui.command(tracked.root, 5055)
    uri = store.tracking_uri(tracked.root)
    assert environment["MLFLOW_BACKEND_STORE_URI"] == uri and not any(uri in w for w in words)
    assert environment["MLFLOW_DISABLE_TELEMETRY"] == environment["DO_NOT_TRACK"] == "true"
    assert words[words.index("--host") + 1] == "127.0.0.1"
    # The view of training runs; MLflow's own first one is of language models.
    assert address.endswith("/runs?workflowType=machine_learning") and ":5055/" in address
    assert tracked.client.get_run(run.run_id).info.status == "KILLED"
    experiment = tracked.client.get_experiment_by_name("isim")
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_a_server_has_one_of_its_own(tracked, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hidd3n@tracking:5000")
    with pytest.raises(UserError, match="open that address") as caught:
        ui.command(tracked.root, 5000)
    assert "hidd3n" not in str(caught.value)
