"""A hub that cannot be reached, and one with an error of its own: the client tries again for 20 seconds."""

import pytest

from tests.hub.server import run_hub
from tests.test_download import assert_refused, fetch


@pytest.mark.parametrize(("is_running", "named"), [(True, "500"), (False, "refused")])
def test_failures_are_one_sentence(tmp_path, is_running, named):
    with run_hub() as hub:
        hub.failure = "broken"
        address = hub.address if is_running else "http://127.0.0.1:9"
        result = fetch(hub, tmp_path, "hf:owner/name", "model.bin", HF_ENDPOINT=address)
    assert_refused(result, f"check the connection to {address} (HF_ENDPOINT), or give a file", named)
