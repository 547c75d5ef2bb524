"""``push`` against a stand-in for the Hub on this machine."""

import os
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from families import FAMILIES

import hf_compress
from hf_compress.errors import HubError
from hf_compress.hub import push as push_function
from hf_compress.hub import upload as push_module

sys.path.insert(0, str(Path(__file__).parent))
from stand_in import COMMIT, StandIn

TOKEN = "hf_secret"
CARD = "---\ntags: [hf_compress]\n---\n\n# A model\n"


@pytest.fixture
def hub(monkeypatch):
    """A running stand-in; no waiting between tries, and big files by LFS, which the stand-in speaks, not by Xet."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(push_module, "_FIRST_WAIT", 0.001)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    server = StandIn(TOKEN)
    yield server
    server.close()


@pytest.fixture
def folder(tmp_path):
    """A finished run: what is published, and what is not."""
    model, _ = FAMILIES["resnet_basic"]()
    made = tmp_path / "run"
    model.save_pretrained(made)
    (made / "README.md").write_text(CARD)
    (made / "widths.png").write_bytes(b"\x89PNG" + bytes(range(256)) * 100)
    (made / "model.onnx").write_bytes(os.urandom(30_000))
    for name in ("metrics.json", "plan.json", "recipe.yaml", "preprocessor_config.json"):
        (made / name).write_text("{}\n")
    for name in ("stages/1/model/model.safetensors", "checkpoint-10/config.json", "logs/x.png", ".hidden.png"):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text("not for the Hub")
    for name in ("optimizer.pt", "trainer_state.json", "notes.txt", ".env", "training_args.bin"):
        (made / name).write_text("not for the Hub")
    return made


PUBLISHED = {
    "README.md", "config.json", "metrics.json", "model.onnx", "model.safetensors", "plan.json", "preprocessor_config.json",
    "recipe.yaml", "widths.png",
}  # fmt: skip


def check_arrived(hub, repo, folder):
    assert set(hub.files[repo]) == PUBLISHED
    for name, content in hub.files[repo].items():
        assert content == (folder / name).read_bytes(), name


@pytest.mark.parametrize("private", [False, True])
def test_files_arrive_intact_and_nothing_else_does(hub, folder, private):
    url = push_function(folder, "user/small", private=private, token=TOKEN, endpoint=hub.url)
    assert url == f"{hub.url}/user/small/commit/{COMMIT}"
    check_arrived(hub, "user/small", folder)
    assert hub.count("/lfs/[0-9a-f]{64}") == 3  # the weights, the ONNX file and the picture
    assert hub.visibility["user/small"] == ("private" if private else None)


def test_the_default_upload_path_of_huggingface_hub(hub, folder, monkeypatch):
    """With Xet installed, files are sent by another piece of huggingface_hub; small ones reach the same endpoints."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    hub.lfs_above = 10**9
    push_function(folder, "user/small", token=TOKEN, endpoint=hub.url)
    check_arrived(hub, "user/small", folder)


def test_pushing_again_updates(hub, folder):
    push_function(folder, "user/small", token=TOKEN, endpoint=hub.url)
    (folder / "metrics.json").write_text('{"accuracy": 1}')
    push_function(folder, "user/small", token=TOKEN, endpoint=hub.url)
    check_arrived(hub, "user/small", folder)


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("where", ["/api/repos/create", "/api/validate-yaml", "/commit/main"])
def test_an_overloaded_server_is_tried_again(hub, folder, status, where):
    hub.failures[where] = [status, status]
    push_function(folder, "user/small", token=TOKEN, endpoint=hub.url)
    check_arrived(hub, "user/small", folder)
    assert hub.count(where) >= 3


def test_tries_end_and_waits_grow(hub, folder, monkeypatch):
    waits = []
    monkeypatch.setattr(push_module, "_FIRST_WAIT", 1.0)
    monkeypatch.setattr(time, "sleep", waits.append)
    hub.failures["/api/repos/create"] = [503] * 100
    with pytest.raises(HubError, match=r"after 4 tries: .*503.*Try again later"):
        push_function(folder, "user/small", token=TOKEN, endpoint=hub.url, retries=3)
    assert waits == [1, 2, 4]
    assert hub.count("/api/repos/create") == 4


def test_no_connection_is_tried_again_and_explained(hub, folder):
    hub.close()
    with pytest.raises(HubError, match=r"after 3 tries: .*refused.*Try again later"):
        push_function(folder, "user/small", token=TOKEN, endpoint=hub.url, retries=2)


@pytest.mark.parametrize(("status", "remedy"), [(401, "not valid"), (403, "write access"), (404, "Check the name")])
def test_a_refusal_is_not_tried_again(hub, folder, status, remedy):
    hub.failures["/api/repos/create"] = [status] * 100
    with pytest.raises(HubError, match=remedy) as caught:
        push_function(folder, "user/small", token=TOKEN, endpoint=hub.url)
    assert hub.count("/api/repos/create") == 1
    assert TOKEN not in str(caught.value)


def test_a_wrong_token_is_refused(hub, folder):
    with pytest.raises(HubError, match=r"401.*not valid"):
        push_function(folder, "user/small", token="hf_wrong", endpoint=hub.url)
    assert hub.files == {}


def test_without_a_token_nothing_is_read_or_sent(hub, tmp_path):
    with pytest.raises(HubError, match=r"no access token.*HF_TOKEN.*hf auth login"):
        push_function(tmp_path / "no such folder", "user/small", endpoint=hub.url)
    assert hub.requests == []


def test_the_token_of_the_environment_is_used(hub, folder, monkeypatch):
    monkeypatch.undo()  # the real get_token
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push_function(folder, "user/small", endpoint=hub.url)
    check_arrived(hub, "user/small", folder)


def test_offline_is_refused(hub, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        push_function(folder, "user/small", token=TOKEN, endpoint=hub.url)
    assert hub.requests == []


def test_a_folder_without_a_model_is_refused(hub, tmp_path):
    for place in (tmp_path, tmp_path / "missing"):
        with pytest.raises(HubError, match=r"no config\.json"):
            push_function(place, "user/small", token=TOKEN, endpoint=hub.url)
    assert hub.requests == []


@pytest.mark.parametrize("repo", ["user/a/b", "user/na me", ""])
def test_a_bad_name_is_refused_at_once(hub, folder, repo):
    with pytest.raises(HubError, match=r"could not be uploaded: .*Correct it"):
        push_function(folder, repo, token=TOKEN, endpoint=hub.url)


def test_a_bad_card_is_named_before_any_weight_is_sent(hub, folder):
    (folder / "README.md").write_text("---\ntags: nonsense\n---\n")
    with pytest.raises(HubError, match=r"Invalid metadata.*tags must be a list"):
        push_function(folder, "user/small", token=TOKEN, endpoint=hub.url)
    assert hub.blobs == {} and hub.count("validate-yaml") == 1


LOADING = """
import sys, torch
import hf_compress
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained("user/small")
images = torch.load(sys.argv[1])
with torch.no_grad():
    torch.save(model(images).logits, sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.multi_process
def test_a_pushed_model_loads_in_a_new_process_by_its_id(hub, tmp_path):
    model, images = FAMILIES["resnet_basic"]()
    hf_compress.prune(model, macs=0.5, example_inputs=images[:1])
    model.save_pretrained(tmp_path / "small")
    (tmp_path / "small" / "README.md").write_text(CARD)
    push_function(tmp_path / "small", "user/small", token=TOKEN, endpoint=hub.url)
    torch.save(images, tmp_path / "images.pt")
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", LOADING, str(tmp_path / "images.pt"), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(images).logits)
