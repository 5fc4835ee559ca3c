"""What the plugin offers, and where ``ram_file`` goes by default."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from erllama_core.errors import TierError
from erllama_core.interfaces.block import ObjectId, ObjectKind
from erllama_core.providers import ByteSize, TierProvider
from erllama_tier_disk import plugin
from erllama_tier_disk.options import DiskOptions, RamFileOptions
from erllama_tier_disk.shm import private_folder


def provider(name: str) -> TierProvider:
    return {item.name: item for item in plugin.erllama_tiers()}[name]


def test_entry_point_leads_to_the_plugin() -> None:
    """Installed, the distribution announces this module to the plugin host."""
    (entry,) = (item for item in entry_points(group="erllama") if item.name == "disk")
    assert entry.load() is plugin


def test_announcing_is_cheap() -> None:
    """Finding the plugin and asking what it offers does not import the store."""
    code = (
        "import sys, erllama_tier_disk.plugin as p; p.erllama_tiers();"
        "assert 'erllama_tier_disk.store' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def test_both_kinds_store_below_their_root(tmp_path: Path) -> None:
    """Each provider's factory takes its own options and opens a tier that works."""
    object_id = ObjectId(ObjectKind.KV, 0, bytes(32))
    for name, options in (
        ("disk", DiskOptions(root=tmp_path / "disk", quota_bytes=ByteSize(1000))),
        ("ram_file", RamFileOptions(root=tmp_path / "ram_file", quota_bytes=ByteSize(1000))),
    ):
        kind = provider(name)
        assert isinstance(options, kind.config)
        tier = kind.factory(options)
        tier.put(object_id, [b"data"])
        assert (tmp_path / name) in Path(tier.location(object_id)).parents
        assert tier.usage().quota_bytes == 1000
        tier.close()


@pytest.mark.parametrize("quota", [0, -1])
def test_a_quota_without_room_is_refused(tmp_path: Path, quota: int) -> None:
    """No object would ever fit, so the mistake is told when the options are read."""
    with pytest.raises(ValueError, match="quota_bytes"):
        DiskOptions(root=tmp_path, quota_bytes=ByteSize(quota))


def use_instead_of_shared_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "erllama_tier_disk.shm.private_folder",
        lambda *, create: private_folder(folder, create=create),
    )


def test_a_read_only_default_folder_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read-only ram_file tier without a root says that there is nothing, and makes nothing."""
    use_instead_of_shared_memory(tmp_path, monkeypatch)
    with pytest.raises(TierError, match="creates nothing"):
        provider("ram_file").factory(RamFileOptions(read_only=True))
    assert list(tmp_path.iterdir()) == []
    provider("ram_file").factory(RamFileOptions()).close()
    tier = provider("ram_file").factory(RamFileOptions(read_only=True))
    assert list(tier.scan()) == []
    tier.close()


def test_the_default_folder_is_this_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a root, ram_file makes a private folder and uses it again."""
    use_instead_of_shared_memory(tmp_path, monkeypatch)
    before = os.umask(0)
    try:
        tier = provider("ram_file").factory(RamFileOptions())
    finally:
        os.umask(before)
    folder = tmp_path / f"erllama-{os.geteuid()}"
    object_id = ObjectId(ObjectKind.KV, 0, bytes(32))
    assert folder in Path(tier.location(object_id)).parents
    assert folder.stat().st_mode & 0o777 == 0o700
    assert private_folder(tmp_path) == folder


def test_a_default_folder_that_another_may_change_is_refused(tmp_path: Path) -> None:
    """Links and folders open to others are not trusted in a place where anyone may put them."""
    folder = tmp_path / f"erllama-{os.geteuid()}"
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TierError, match="not a private folder"):
        private_folder(tmp_path)
    folder.unlink()
    folder.mkdir()
    folder.chmod(0o770)
    with pytest.raises(TierError, match="not a private folder"):
        private_folder(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a folder away")
def test_a_default_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    """Whoever made the folder first could change what models are restored from."""
    folder = private_folder(tmp_path)
    os.chown(folder, 12345, -1)
    with pytest.raises(TierError, match="owner 12345"):
        private_folder(tmp_path)


def test_without_shared_memory_a_root_must_be_given(tmp_path: Path) -> None:
    """Where there is no /dev/shm, the message says which option to set."""
    with pytest.raises(TierError, match="set its root"):
        private_folder(tmp_path / "missing")
