"""Profiles on the hub: what is pushed comes back, and what the hub refuses is one clear error. Nothing is sent."""

from types import SimpleNamespace

import huggingface_hub
import pytest

from prefixkv_cache import PrefixProfile, ProfileError


class Hub:
    """A stand-in for the hub, in a folder: what HfApi and hf_hub_download do, for the little that we ask of them."""

    def __init__(self, folder):
        self.folder, self.calls = folder, []

    def __call__(self, token=None):
        self.calls.append(("login", token))
        return self

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok
        self.calls.append(("create", repo_id, private))
        (self.folder / repo_id).mkdir(parents=True, exist_ok=True)

    def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id, commit_message, **more):
        self.calls.append(("upload", repo_id, more))
        (self.folder / repo_id / path_in_repo).write_bytes(path_or_fileobj)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def download(self, repo_id, filename, **more):
        self.calls.append(("download", repo_id, more))
        path = self.folder / repo_id / filename
        if not path.exists():
            raise huggingface_hub.errors.HFValidationError(f"404:\n no {filename}")
        return str(path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.download)
    return hub


def test_what_goes_to_the_hub_comes_back(hub):
    profile = PrefixProfile.load("llava-1.5-7b")
    url = profile.push_to_hub("me/a-model", private=True, token="secret", revision="main")
    assert url == "https://hub/me/a-model/commit/1"
    assert hub.calls == [
        ("login", "secret"),
        ("create", "me/a-model", True),
        ("upload", "me/a-model", {"revision": "main"}),
    ]
    assert PrefixProfile.from_pretrained("me/a-model", revision="main") == profile
    assert hub.calls[-1] == ("download", "me/a-model", {"revision": "main"})
    profile.push_to_hub("me/a-model", filename="all.safetensors")
    assert PrefixProfile.from_pretrained("me/a-model", filename="all.safetensors") == profile


def test_a_pull_request_makes_no_repository(hub):
    (hub.folder / "you/model").mkdir(parents=True)
    PrefixProfile.load("llava-1.5-7b").push_to_hub("you/model", create_pr=True)
    assert [call[0] for call in hub.calls] == ["login", "upload"]


def test_from_pretrained_reads_folders_and_files(tmp_path, hub):
    profile = PrefixProfile.load("llava-1.5-7b")
    profile.save(tmp_path / "prefixkv-profile.safetensors")
    assert PrefixProfile.from_pretrained(tmp_path) == profile
    assert PrefixProfile.from_pretrained(str(tmp_path)) == profile
    assert PrefixProfile.from_pretrained(tmp_path / "prefixkv-profile.safetensors") == profile
    assert hub.calls == []


def test_what_the_hub_refuses_is_one_clear_error(tmp_path, hub):
    profile = PrefixProfile.load("llava-1.5-7b")
    with pytest.raises(
        ProfileError, match=r"cannot get 'prefixkv-profile.safetensors' of 'me/none' from the hub: 404: no"
    ):
        PrefixProfile.from_pretrained("me/none")
    with pytest.raises(ProfileError, match="there is no such file"):
        PrefixProfile.from_pretrained(tmp_path)
    with pytest.raises(ProfileError, match=r"ends in \.safetensors"):
        profile.push_to_hub("me/a-model", filename="profile.bin")
    with pytest.raises(ProfileError, match="cannot upload"):
        profile.push_to_hub("you/none", create_pr=True)
